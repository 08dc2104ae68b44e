"""Signals that come while a run trains."""

import signal

from lora_jax.command.progress import Progress


def at_step(monkeypatch, stop, signum=signal.SIGINT):
    """A signal comes once a step of that number is done, until the patch is taken back."""
    step = Progress.step

    def stopping(self, number, *losses):
        step(self, number, *losses)
        if number == stop:
            signal.raise_signal(signum)

    monkeypatch.setattr(Progress, "step", stopping)
