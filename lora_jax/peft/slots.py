"""Which tensor of a Hugging Face model is which part of which parameter, and how PEFT lays a pair for it out.

PEFT keeps A as `(r, in)` and B as `(out, r)`; of convolutions A as `(r, in, *window)` and B as `(out, r, 1, ...)`; of fused
experts A as `(experts r, in)`, expert by expert, and B as `(out, r experts)`, rank by rank.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from lora_jax.core.adapter import Layout
from lora_jax.core.errors import InputError
from lora_jax.huggingface.names import HFName, Kind

RANK = -1


@dataclasses.dataclass(frozen=True)
class Slot:
    """One tensor of a Hugging Face model as a part of a parameter.

    Args:
      path: the parameter.
      name: where it stands there.
      shape: the parameter's shape.
      index: the tensor's place along the parameter's indexed axes.
      tensor: the tensor's name.
    """

    path: str
    name: HFName
    shape: tuple[int, ...]
    index: tuple[int, ...]
    tensor: str

    @property
    def module(self) -> str:
        """The name of the module that the tensor belongs to."""
        return self.tensor.rpartition(".")[0]

    @property
    def parameter(self) -> str:
        """The tensor's name within its module."""
        return self.tensor.rpartition(".")[2]

    @property
    def is_kernel(self) -> bool:
        """Whether PEFT can give the tensor's module a pair."""
        return self.parameter == "weight" and len(self.name.groups(len(self.shape))) > 1 and not self.is_parameter

    def as_parameter(self) -> "Slot":
        """The slot of a weight that PEFT adapts as a parameter, whatever its module."""
        return self if self.is_parameter else self.of_kind("parameter")

    def of_kind(self, kind: Kind) -> "Slot":
        """The same slot, as if its tensor were of another kind."""
        return dataclasses.replace(self, name=dataclasses.replace(self.name, kind=kind))

    @property
    def is_parameter(self) -> bool:
        """Whether PEFT adapts the tensor as a parameter of its own."""
        return self.name.kind in ("parameter", "parameter_transposed")


def slots(names: Mapping[str, HFName], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """The slots of parameters by the name of the tensor.

    Raises:
      InputError: two parameters share a tensor, or a parameter does not have the axes that its name tells.
    """
    found: dict[str, Slot] = {}
    for path, shape in shapes.items():
        name = names[path]
        for index, tensor in name.tensors(shape).items():
            slot = Slot(path, name, tuple(shape), index, tensor)
            other = found.setdefault(tensor, slot)
            if other is not slot:
                raise InputError(f"{other.path} and {path} are both {tensor} in Hugging Face: give each a name of its own")
    return found


def aligned(found: Mapping[str, Slot], modules: Collection[str]) -> dict[str, Slot]:
    """The slots by the names of a model that has other outermost modules, if none of its modules is known otherwise.

    A model class without a head leaves the outermost name out (`BertModel`: `encoder.layer.0...`, not `bert.encoder...`); one
    with more around it adds some (`language_model.model.layers.0...`).

    Args:
      found: the slots.
      modules: the modules of an adapter file.

    >>> slot = Slot("w", HFName("bert.pooler.dense.weight"), (2, 2), (), "bert.pooler.dense.weight")
    >>> list(aligned({slot.tensor: slot}, ["pooler.dense"]))
    ['pooler.dense.weight']
    """
    known = {slot.module for slot in found.values()}
    if not modules or not known.isdisjoint(modules):
        return dict(found)
    deep = lambda tensor: tensor.count(".") > 1
    inner = {tensor: tensor.partition(".")[2] if deep(tensor) else tensor for tensor in found}
    if not {name.rpartition(".")[0] for name in inner.values()}.isdisjoint(modules):
        renamed = inner
    else:
        ends = ((module, name) for module in modules for name in known if module.endswith(f".{name}"))
        module, name = max(ends, key=lambda pair: len(pair[1]), default=("", ""))
        renamed = {tensor: module.removesuffix(name) + tensor for tensor in found}
    return {renamed[tensor]: dataclasses.replace(slot, tensor=renamed[tensor]) for tensor, slot in found.items()}


@dataclasses.dataclass(frozen=True)
class Roles:
    """The axes of a parameter by their role in PEFT's pair, as one tensor of it has them."""

    experts: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[int, ...]

    @property
    def flat_inputs(self) -> tuple[int, ...]:
        return tuple(axis for group in self.inputs for axis in group)

    def labels(self, part: str) -> tuple[int, ...]:
        """The axes along which PEFT's tensor lies, in its order, joined ones apart."""
        if part == "a":
            return (*self.experts, RANK, *self.flat_inputs)
        if part == "lambda_d":
            return (RANK,)
        return (*self.outputs, RANK, *self.experts) if part == "b" else self.outputs


def roles(name: HFName, ndim: int) -> Roles:
    """Which axes of a parameter PEFT contracts with the input, and which reach the output.

    >>> roles(HFName("q_proj.weight", "d n h -> (n h) d"), 3)
    Roles(experts=(), inputs=((0,),), outputs=(1, 2))
    """
    groups = name.groups(ndim)
    experts = groups[0] if name.kind in ("parameter", "parameter_transposed") and len(groups) == 3 else ()
    first, *rest = groups[1:] if experts else groups
    if name.kind in ("embedding", "conv1d", "parameter_transposed"):
        return Roles(experts, (first,), tuple(axis for group in rest for axis in group))
    return Roles(experts, tuple(rest), first)


def layout(name: HFName, ndim: int) -> Layout:
    """The layout of a pair as PEFT has it: one for each tensor, and for each expert."""
    found = roles(name, ndim)
    batch = (*name.indexed, *found.experts)
    return Layout(tuple(sorted(batch)), tuple(sorted(found.flat_inputs)), tuple(sorted(found.outputs)))


def stored_shape(slot: Slot, part: str, rank: int) -> tuple[int, ...]:
    """The shape of PEFT's tensor for `"a"`, `"b"`, `"magnitude"`, `"bias"`, or VeRA's `"lambda_d"` or `"lambda_b"`."""
    found, window = roles(slot.name, len(slot.shape)), ()
    size = lambda axes: math.prod(slot.shape[axis] for axis in axes)
    if slot.name.kind == "conv":
        window = (1,) * (len(found.inputs) - 1)
    ranks, out = rank * size(found.experts), size(found.outputs)
    if part == "a":
        return (ranks, *map(size, found.inputs)) if window else (ranks, size(found.flat_inputs))
    if part == "b":
        return (out, ranks, *window)
    if part == "lambda_d":
        return (rank,)
    return (1, out, *window) if part == "magnitude" and window else (out,)


def decode(slot: Slot, part: str, tensor: np.ndarray, rank: int) -> np.ndarray:
    """PEFT's tensor with its axes as a pair has them: `(*experts, *in, r)`, `(*experts, r, *out)`, `(r)` or `(*out)`."""
    found = roles(slot.name, len(slot.shape))
    labels = found.labels(part)
    array = tensor.reshape([rank if label == RANK else slot.shape[label] for label in labels])
    return array.transpose([labels.index(label) for label in _pair_order(found, part)])


def encode(slot: Slot, part: str, array: np.ndarray, labels: Sequence[int], rank: int) -> np.ndarray:
    """The inverse of `decode`, from an array with any order of axes."""
    wanted = roles(slot.name, len(slot.shape)).labels(part)
    return array.transpose([labels.index(label) for label in wanted]).reshape(stored_shape(slot, part, rank))


def _pair_order(found: Roles, part: str) -> tuple[int, ...]:
    experts, inputs, outputs = map(sorted, (found.experts, found.flat_inputs, found.outputs))
    orders = {"a": (*experts, *inputs, RANK), "b": (*experts, RANK, *outputs), "lambda_d": (RANK,)}
    return orders.get(part, tuple(outputs))


def tensor_names(slot: Slot, depth: int = 0) -> dict[str, str]:
    """What PEFT calls a slot's tensors, after the prefix.

    Args:
      depth: how many wrappers of other parameters of the same module lie around this one.
    """
    module = slot.module + ".base_layer" * depth
    if slot.name.kind == "embedding":
        pair = {"a": f"{module}.lora_embedding_A", "b": f"{module}.lora_embedding_B"}
    else:
        pair = {"a": f"{module}.lora_A.weight", "b": f"{module}.lora_B.weight", "bias": f"{module}.lora_B.bias"}
    vera = {part: f"{module}.vera_{part}" for part in ("lambda_d", "lambda_b")}
    return {**pair, **vera, "magnitude": f"{module}.lora_magnitude_vector"}


def place(slot: Slot, axes: Any, ndim: int) -> tuple[Any, ...]:
    """The index of a slot's part in an array that lies along these axes of the parameter."""
    at = dict(zip(slot.name.indexed, slot.index))
    return tuple(at.get(axis, slice(None)) for axis in axes) + (slice(None),) * (ndim - len(axes))


def nested(group: Sequence[Slot]) -> list[tuple[Slot, int]]:
    """The adapted parameters of one module, each with the number of wrappers around it: the last registered is outermost."""
    ordered = sorted(group, key=lambda slot: slot.name.order)
    if len({slot.name.order for slot in group}) != len(group):
        alike = ", ".join(slot.path for slot in group)
        raise InputError(f"{alike} are parameters of one module: give their names an `order`, as the module registers them")
    return [(slot, len(ordered) - 1 - i) for i, slot in enumerate(ordered)]
