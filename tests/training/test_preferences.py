"""Losses of preferences against TRL's, in value and gradient (`tests/data/make_preferences_reference.py`)."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.errors import InputError

REFERENCE = json.loads((pathlib.Path(__file__).parents[1] / "data" / "preferences.json").read_text())
LOG_P = jnp.asarray(REFERENCE["log_p"], jnp.float32)


def preference(kind, log_p):
    if kind == "orpo":
        return lj.losses.orpo(*log_p[:2], beta=REFERENCE["beta"])
    more = {"label_smoothing": REFERENCE["label_smoothing"]} if kind == "smoothed" else {"kind": kind}
    return lj.losses.dpo(*log_p, beta=REFERENCE["beta"], **more)


@pytest.mark.parametrize("kind", REFERENCE["kinds"])
def test_losses_are_those_of_trl(kind):
    want = REFERENCE["kinds"][kind]
    np.testing.assert_allclose(preference(kind, LOG_P).losses, want["losses"], rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda log_p: preference(kind, log_p).losses.sum())(LOG_P)
    np.testing.assert_allclose(gradient[:2], want["gradients"], rtol=1e-5, atol=1e-6)


def test_rewards():
    chosen, rejected, *reference = np.asarray(LOG_P)
    found, beta = lj.losses.dpo(*LOG_P, beta=0.5), 0.5
    np.testing.assert_allclose(found.chosen_rewards, beta * (chosen - reference[0]), rtol=1e-6)
    np.testing.assert_allclose(found.margins, beta * (chosen - reference[0] - rejected + reference[1]), rtol=1e-5)
    np.testing.assert_allclose(lj.losses.orpo(*LOG_P[:2], beta=0.5).rejected_rewards, beta * rejected, rtol=1e-6)
    assert not jax.grad(lambda log_p: lj.losses.dpo(*log_p).margins.sum())(LOG_P).any()


@pytest.mark.parametrize("log_p", [0.0, -1e-7, -1e-3, -0.6931, -50.0, -200.0])
def test_the_odds_are_finite_everywhere(log_p):
    value, slope = jax.value_and_grad(lambda x: lj.losses.orpo(x[None], jnp.array([-1.0])).losses.sum())(jnp.float32(log_p))
    assert np.isfinite(value) and np.isfinite(slope)
    value, slopes = jax.value_and_grad(lambda x: lj.losses.orpo(*x).losses.sum())((jnp.full(1, log_p), jnp.zeros(1)))
    assert np.isfinite(value) and np.isfinite(slopes).all()  # of an answer that is certain to float32
    assert slopes[0] <= -1  # by -log p


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be positive and finite, not 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5, not 0.5"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "label_smoothing is for kind='sigmoid', not for 'ipo': leave it out"),
        ({"kind": "other"}, "kind must be 'sigmoid', 'ipo' or 'hinge', not 'other'"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        lj.losses.dpo(*LOG_P, **options)
