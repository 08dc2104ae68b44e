"""The command in the process of a test."""

from lora_jax.command import cli


def call(arguments, capsys, code=0):
    """Run the command in this process; returns what it printed."""
    found = cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert found == code, printed.err
    assert "Traceback" not in printed.err
    return printed.out if code == 0 else printed.err
