"""Train steps that differentiate the adapters only, jitted or pmapped, and an evaluation step.

`init_state` makes what a step changes, `make_train_step` the step, and `make_eval_step` measures. A loss that is a mean over
learnt tokens is a `Weighted`. `make_pmap_train_step`, `replicate` and `unreplicate` are for `jax.pmap`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax import sharding
from lora_jax.core.adapter import Adapter, attach
from lora_jax.core.errors import InputError
from lora_jax.core.weighted import Weighted
from lora_jax.training.gradients import loss_and_gradient
from lora_jax.training.optim import optimizer
from lora_jax.training.steps import CompiledStep, is_array

__all__ = [
    "TrainState",
    "Weighted",
    "init_state",
    "make_eval_step",
    "make_pmap_train_step",
    "make_train_step",
    "replicate",
    "unreplicate",
]

LossFn = Callable[[Any, Any, jax.Array], Any]
_AXIS = "batch"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "adapters", "opt_state", "key", "skipped"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a train step changes.

    Args:
      step: int32 scalar, the steps made, skipped ones included.
      adapters: `{path: adapter}`.
      opt_state: the state of `optimizer(tx)` over the adapters.
      key: a PRNG key; step i uses `fold_in(key, i)`.
      skipped: int32 scalar, the steps whose loss or gradient was not finite.

    >>> import lora_jax as lj
    >>> state = init_state({"head": lj.Full(jnp.ones(2))}, optax.sgd(0.1), key=jax.random.key(0))
    >>> int(state.step), list(state.adapters)
    (0, ['head'])
    """

    step: jax.Array
    adapters: Any
    opt_state: Any
    key: jax.Array
    skipped: jax.Array


def init_state(adapters: Mapping[str, Adapter], tx: optax.GradientTransformation, *, key: jax.Array) -> TrainState:
    """The state before the first step. The adapters are copied, since steps donate the state.

    Where the adapters are on a mesh, so is all of the state, the optimiser's moments like the adapters. Of shapes
    (`jax.ShapeDtypeStruct`) it makes shapes.

    Args:
      adapters: `{path: adapter}`.
      tx: the optimiser of the trained leaves, as `make_train_step` gets it.
      key: a PRNG key, for dropout and whatever else the loss draws.

    >>> import lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)), lj.Layout((), (0,), (1,)))
    >>> state = init_state({"w": pair}, optax.sgd(0.1, momentum=0.9), key=jax.random.key(0))
    >>> [leaf.shape for leaf in jax.tree.leaves(state.opt_state)]
    [(3, 1), (1, 2)]
    """

    def start(adapters: dict[str, Adapter], key: jax.Array) -> TrainState:
        copy = lambda tree: jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)
        zero = lambda: jnp.zeros((), jnp.int32)
        copies = copy(adapters)
        return TrainState(zero(), copies, optimizer(tx).init(copies), copy(key), zero())

    arrays = dict(adapters)
    if any(map(sharding.on_mesh, jax.tree.leaves(arrays))):
        return sharding.make(start, lambda state: sharding.state_shardings(state, arrays), arrays, key)
    return jax.eval_shape(start, arrays, key) if sharding.is_abstract((arrays, key)) else start(arrays, key)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
    like: TrainState | None = None,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Any]]]:
    """A jitted step `(state, variables, batch) -> (state, metrics)`; the state is donated.

    The loss is differentiated with respect to the adapters only. A step whose loss or gradient is not finite changes neither
    adapters nor optimiser state and is counted. Leaves of `variables` that are no arrays (numbers of Python, strings,
    functions) are part of the program, as under `equinox.filter_jit`: another value is compiled anew.

    Args:
      loss_fn: `(params, batch, key) -> loss` or `(loss, aux)`; `params` is the attached tree, for `lora(fn)`. A loss that is a
        mean over what differs from row to row, learnt tokens say, is a `Weighted`: the sum, and what to divide it by. A plain
        scalar says that all microbatches, devices and processes weigh the same. For a mean over the learnt tokens of each
        that is wrong: few tokens would weigh as much as many, and none would count as a loss of 0.
      tx: the optimiser of the trained leaves.
      accumulate: the number of equal microbatches that the batch's leading axis is cut into, one after the other. Totals,
        weights and gradients are added up in float32 at least and divided once; aux is the mean of the microbatches', and each
        `Weighted` in it is divided like the loss.
      max_grad_norm: clip the gradient to this global norm (`optax.clip_by_global_norm`), in float32 at least.
      like: a state on a mesh, or its shapes: the results stay where it is. Left to itself the compiler may cut them further,
        and the second step is then compiled again.

    Returns:
      The step. Its metrics are `loss`, `grad_norm` (before clipping), `skipped` (so far) and, if there is one, `aux`. A batch
      whose weights are all zero has no mean: its step is skipped. `step.trace` and `step.lower` are those of `jax.jit`.

    Raises:
      InputError: an option is out of range. When the step is taken: the batch can't be cut, a `Weighted` holds no scalars, or a
        leaf of `variables` is neither an array nor hashable.

    >>> import jax, jax.numpy as jnp, optax, lora_jax as lj
    >>> def model(params, x):
    ...     return x @ params["w"]
    >>> params, x = {"w": jnp.eye(3)}, jnp.ones((4, 3))
    >>> adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=1), model, params, x)
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean((lj.lora(model)(params, batch) - 2.0) ** 2)
    >>> state = init_state(adapters, optax.adam(0.1), key=jax.random.key(1))
    >>> step = make_train_step(loss_fn, optax.adam(0.1), accumulate=2)
    >>> for _ in range(50):
    ...     state, metrics = step(state, params, x)
    >>> bool(metrics["loss"] < 0.1), int(metrics["skipped"])
    (True, 0)
    """
    check_options(accumulate, max_grad_norm)
    step = functools.partial(update, loss_fn, tx, accumulate, max_grad_norm, None)
    # Off a mesh nothing is said: results that are told their device are not what an untold state is, and compile all again.
    on_mesh = any(map(sharding.on_mesh, jax.tree.leaves(like)))
    where = (jax.tree.map(lambda leaf: leaf.sharding, like), None) if on_mesh else None
    return CompiledStep(step, functools.partial(jax.jit, donate_argnums=0, out_shardings=where))


def make_pmap_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    max_grad_norm: float | None = None,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Any]]]:
    """`make_train_step` under `jax.pmap`: totals, weights and gradients of the devices are added up as those of microbatches.

    The step takes a state and variables that `replicate` put on every device, and a batch whose leaves have a leading axis of
    the number of devices. Each device has a dropout key of its own. Metrics have the leading axis too; all its entries are
    equal.

    Args:
      loss_fn: as in `make_train_step`, of one device's batch.
      tx: the optimiser of the trained leaves.
      accumulate: the number of equal microbatches that each device's batch is cut into.
      max_grad_norm: clip the gradient of all devices to this global norm.

    Returns:
      The step `(state, variables, batch) -> (state, metrics)`; the state is donated.

    Raises:
      InputError: as `make_train_step`.

    >>> import lora_jax as lj
    >>> def loss_fn(params, batch, key):
    ...     return jnp.mean(lj.lora(lambda p, x: x @ p["w"])(params, batch) ** 2)
    >>> pair = lj.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)), lj.Layout((), (0,), (1,)))
    >>> state = replicate(init_state({"w": pair}, optax.sgd(0.1), key=jax.random.key(0)))
    >>> variables, count = replicate({"w": jnp.ones((3, 2))}), jax.local_device_count()
    >>> step = make_pmap_train_step(loss_fn, optax.sgd(0.1))
    >>> state, metrics = step(state, variables, jnp.ones((count, 4, 3)))
    >>> float(metrics["loss"][0]), int(unreplicate(state).step)
    (9.0, 1)
    """
    check_options(accumulate, max_grad_norm)
    step = functools.partial(update, loss_fn, tx, accumulate, max_grad_norm, _AXIS)
    return CompiledStep(step, functools.partial(jax.pmap, axis_name=_AXIS, donate_argnums=0))


def replicate(tree: Any, devices: Any = None) -> Any:
    """A copy of the tree's arrays on each device, under a new leading axis, as `make_pmap_train_step` wants it.

    Args:
      tree: a state, or variables; leaves that are no arrays stay as they are.
      devices: which; all of this process by default.

    >>> replicate({"w": jnp.ones((3, 2)), "name": "base"}, jax.local_devices()[:1])["w"].shape
    (1, 3, 2)
    """
    devices = jax.local_devices() if devices is None else devices
    mesh = jax.sharding.Mesh(devices, (_AXIS,))
    on_devices = jax.sharding.NamedSharding(mesh, jax.P(_AXIS))

    def spread(leaf: Any) -> Any:
        if not is_array(leaf):
            return leaf
        copies = [jax.device_put(jnp.asarray(leaf)[None], device) for device in devices]
        return jax.make_array_from_single_device_arrays((len(devices), *leaf.shape), on_devices, copies)

    return jax.tree.map(spread, tree)


def unreplicate(tree: Any) -> Any:
    """The first device's copy of a replicated tree.

    Args:
      tree: what `replicate` made, or a step under `pmap` returned.

    >>> unreplicate(replicate({"w": jnp.ones((3, 2))}))["w"].shape
    (3, 2)
    """
    return jax.tree.map(lambda leaf: leaf[0] if is_array(leaf) else leaf, tree)


def make_eval_step(metric_fn: Callable[[Any, Any], Any]) -> Callable[[Mapping[str, Adapter], Any, Any], Any]:
    """A jitted `(adapters, variables, batch) -> metric_fn(params, batch)`; nothing is donated, no dropout.

    To measure a mean over several batches, return sums, and divide once at the end. Leaves of `variables` that are no arrays
    are part of the program, as in `make_train_step`.

    Args:
      metric_fn: of the attached tree, for `lora(fn)`, and a batch: any tree of arrays.

    Raises:
      InputError: when it is called: the adapters do not fit the variables, or a leaf of these is neither an array nor hashable.
      TypeError: when it is called: an adapter is none.

    >>> import lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)), lj.Layout((), (0,), (1,)))
    >>> evaluate = make_eval_step(lambda params, x: lj.lora(lambda p, x: x @ p["w"])(params, x).sum())
    >>> float(evaluate({"w": pair}, {"w": jnp.zeros((3, 2))}, jnp.ones((4, 3))))
    24.0
    """
    return CompiledStep(lambda adapters, variables, batch: metric_fn(attach(variables, adapters), batch), jax.jit)


def check_options(accumulate: int, max_grad_norm: float | None) -> None:
    """Raise an InputError where an option of a step is out of range."""
    if not isinstance(accumulate, int) or accumulate < 1:
        raise InputError(f"accumulate must be a whole number of at least 1, not {accumulate!r}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise InputError(f"max_grad_norm must be positive, not {max_grad_norm!r}")


def update(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    accumulate: int,
    max_grad_norm: float | None,
    axis_name: str | None,
    state: TrainState,
    variables: Any,
    batch: Any,
) -> tuple[TrainState, dict[str, Any]]:
    """One step, not compiled; under `pmap`, of the batches of all devices along `axis_name`."""
    key = jax.random.fold_in(state.key, state.step)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

    def of_adapters(adapters: Mapping[str, Adapter], batch: Any, key: jax.Array) -> Any:
        return loss_fn(attach(variables, adapters), batch, key)

    loss, aux, grads = loss_and_gradient(of_adapters, state.adapters, batch, key, accumulate, axis_name)
    norm = optax.tree.norm(grads)
    if max_grad_norm is not None:
        clip = optax.clip_by_global_norm(max_grad_norm)
        grads, _ = clip.update(grads, clip.init(grads))
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    def changed() -> tuple[Any, Any]:
        own = jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, state.adapters)
        updates, opt_state = optimizer(tx).update(own, state.opt_state, state.adapters)
        return optax.apply_updates(state.adapters, updates), opt_state

    # One `cond`, not a `where` for each leaf: XLA would copy every donated moment at the start of the program.
    adapters, opt_state = jax.lax.cond(finite, changed, lambda: (state.adapters, state.opt_state))
    skipped = state.skipped + jnp.where(finite, 0, 1)
    state = TrainState(state.step + 1, adapters, opt_state, state.key, skipped)
    metrics = {"loss": loss, "grad_norm": norm, "skipped": skipped}
    return state, metrics if aux is None else {**metrics, "aux": aux}
