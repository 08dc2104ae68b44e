"""Losses of preferences: of two answers to a prompt, the chosen one should be likelier than the rejected one."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.core.errors import InputError

DPOKind = Literal["sigmoid", "ipo", "hinge"]


class Preference(NamedTuple):
    """What a loss of preferences gives.

    Args:
      losses: of each pair, `(pairs,)`.
      chosen_rewards: the implicit reward of each chosen answer, without a gradient, `(pairs,)`.
      rejected_rewards: that of each rejected one, `(pairs,)`.

    >>> found = Preference(jnp.array([0.2, 0.9]), jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0]))
    >>> found.margins.tolist(), float((found.margins > 0).mean())  # and the accuracy
    ([2.0, -1.0], 0.5)
    """

    losses: jax.Array
    chosen_rewards: jax.Array
    rejected_rewards: jax.Array

    @property
    def margins(self) -> jax.Array:
        """How much larger the reward of the chosen answer is, `(pairs,)`."""
        return self.chosen_rewards - self.rejected_rewards


def dpo(
    chosen: jax.Array,
    rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    beta: float = 0.1,
    kind: DPOKind = "sigmoid",
    label_smoothing: float = 0.0,
) -> Preference:
    """Direct preference optimisation (https://arxiv.org/abs/2305.18290, equation 7), and losses like it.

    With the difference of log-ratios `d = (chosen - reference_chosen) - (rejected - reference_rejected)`, the loss of a pair is
    `-log sigmoid(beta d)`, for `"hinge"` `max(0, 1 - beta d)` (SLiC, https://arxiv.org/abs/2305.10425), and for `"ipo"`
    `(d - 1 / (2 beta))^2` (https://arxiv.org/abs/2310.12036, equation 17). The reference of adapters is the base without them:
    the same function of `variables`, for which no second model is needed.

    Args:
      chosen: log p of each chosen answer given its prompt, summed over its tokens, `(pairs,)`; for `"ipo"` the mean over them,
        as its authors computed it.
      rejected: the same of the rejected answers, `(pairs,)`.
      reference_chosen: the same of the chosen answers by the reference, `(pairs,)`.
      reference_rejected: the same of the rejected answers by the reference, `(pairs,)`.
      beta: how strongly the model is held to the reference.
      kind: the loss.
      label_smoothing: how often a label is wrong, below 1/2: the loss of the swapped pair has this weight (cDPO,
        https://ericmitchell.ai/cdpo.pdf). For `"sigmoid"`.

    Raises:
      InputError: an option is out of range.

    >>> log_p = jnp.array([-10.0])
    >>> found = dpo(log_p, log_p - 5, log_p, log_p - 5)
    >>> round(float(found.losses[0]), 4), float(found.margins[0])  # the model is its reference: log 2
    (0.6931, 0.0)
    """
    _check_beta(beta)
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"label_smoothing must be at least 0 and below 0.5, not {label_smoothing!r}")
    if label_smoothing and kind != "sigmoid":
        raise InputError(f"label_smoothing is for kind='sigmoid', not for {kind!r}: leave it out")
    ratios = chosen - reference_chosen, rejected - reference_rejected
    difference = ratios[0] - ratios[1]
    match kind:
        case "sigmoid":
            right, swapped = jax.nn.log_sigmoid(beta * difference), jax.nn.log_sigmoid(-beta * difference)
            losses = -(1 - label_smoothing) * right - label_smoothing * swapped
        case "hinge":
            losses = jax.nn.relu(1 - beta * difference)
        case "ipo":
            losses = (difference - 1 / (2 * beta)) ** 2
        case _:
            raise InputError(f"kind must be 'sigmoid', 'ipo' or 'hinge', not {kind!r}")
    return Preference(losses, *(beta * jax.lax.stop_gradient(ratio) for ratio in ratios))


def orpo(chosen: jax.Array, rejected: jax.Array, *, beta: float = 0.1) -> Preference:
    """Odds ratio preference optimisation (https://arxiv.org/abs/2403.07691, equations 6 and 7), which needs no reference.

    With `odds(p) = p / (1 - p)` of the mean likelihood of a token, the loss of a pair is
    `-log p_chosen - beta log sigmoid(log odds(p_chosen) - log odds(p_rejected))`.

    Args:
      chosen: the mean over its tokens of log p of each chosen answer, `(pairs,)`, at most 0.
      rejected: the same of the rejected answers, `(pairs,)`.
      beta: the weight of the odds ratio; lambda in the paper.

    Raises:
      InputError: `beta` is not positive.

    >>> found = orpo(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.5])), beta=1.0)
    >>> round(float(found.losses[0] / jnp.log(2)), 4)  # log 2 for the answer, log 2 for even odds
    2.0
    """
    _check_beta(beta)
    odds = (chosen - rejected) - (_log_1_minus_exp(chosen) - _log_1_minus_exp(rejected))
    losses = -chosen - beta * jax.nn.log_sigmoid(odds)
    return Preference(losses, *(beta * jax.lax.stop_gradient(log_p) for log_p in (chosen, rejected)))


def _check_beta(beta: float) -> None:
    if not 0 < beta < float("inf"):
        raise InputError(f"beta must be positive and finite, not {beta!r}")


def _log_1_minus_exp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x < 0, exact near 0 and far below it (Maechler 2012); at 0, which x is rounded to, finite."""
    x = jnp.minimum(x, -jnp.finfo(x.dtype).tiny)
    near = x > -0.6931472
    return jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, x, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, x))))
