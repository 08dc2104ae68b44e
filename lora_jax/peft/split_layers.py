"""An adapter cut into the tensors that a file has of it, one for each layer of a stack."""

from typing import Any

import numpy as np

from lora_jax.core.adapter import LowRank
from lora_jax.core.errors import InputError
from lora_jax.core.methods.dora import column_norm
from lora_jax.peft.slots import RANK, Slot, encode, roles, stored_shape


class Cut:
    """The part of an adapter that belongs to one tensor."""

    def __init__(self, slot: Slot, adapter: LowRank):
        self.slot, self.adapter = slot, adapter
        self.at = dict(zip(slot.name.indexed, slot.index))
        self.roles = roles(slot.name, len(slot.shape))
        batch = adapter.layout.batch
        if adapter.ranks is None:
            self.rank = adapter.rank
        else:
            ranks = np.reshape(adapter.ranks, [slot.shape[axis] for axis in batch])
            self.rank = int(self._pick(ranks, batch)[0].max())
        self.scale: Any = adapter.scale
        if not isinstance(adapter.scale, float):
            scales = np.unique(self._pick(np.asarray(adapter.scale), batch)[0])
            if len(scales) > 1:
                raise InputError(
                    f"{slot.path}: an adapter file has one alpha for all of {slot.tensor}, but the scale varies in it: {scales}"
                )
            self.scale = scales[0]

    def _pick(self, array: Any, axes: tuple[int, ...]) -> tuple[np.ndarray, tuple[int, ...]]:
        """An array along these axes at the slot's index, and the axes that are left."""
        index = tuple(self.at.get(axis, slice(None)) for axis in axes)
        return np.asarray(array)[index], tuple(axis for axis in axes if axis not in self.at)

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """lora_A and lora_B."""
        found = []
        for array, axes in zip((self.adapter.a, self.adapter.b), self.adapter.axes()):
            part, labels = self._pick(array, axes)
            part = np.take(part, range(self.rank), axis=labels.index(RANK))
            for expert in reversed(self.roles.experts):
                if expert not in labels:
                    part, labels = np.broadcast_to(part, (self.slot.shape[expert], *part.shape)), (expert, *labels)
            found.append((part, labels))
        wanted = {"a": set(self.roles.flat_inputs), "b": set(self.roles.outputs)}
        if [self._lies_along(labels) for _, labels in found] == [wanted["b"], wanted["a"]]:
            found.reverse()  # W = A B is the transpose of what Hugging Face has: W^T = B^T A^T
        for (_, labels), (part, axes) in zip(found, wanted.items()):
            if self._lies_along(labels) != axes:
                raise InputError(
                    f"{self.slot.path}: {self.adapter.layout} does not go with {self.slot.tensor}, whose {part.upper()} "
                    f"lies along the axes {sorted(axes)} of the shape {self.slot.shape}: LoraConfig(batch_axes=...) can say so"
                )
        (a, a_labels), (b, b_labels) = found
        return encode(self.slot, "a", a, a_labels, self.rank), encode(self.slot, "b", b, b_labels, self.rank)

    def _lies_along(self, labels: tuple[int, ...]) -> set[int]:
        return set(labels) - {RANK, *self.roles.experts}

    def magnitude(self, base: Any) -> np.ndarray:
        """lora_magnitude_vector; for an adapter without one, the norm that leaves it as it is."""
        value = self.adapter.magnitude
        if value is None:
            if base is None:
                raise InputError(
                    f"{self.slot.path} has no magnitude, but other adapters have: PEFT has one for all or none, so pass "
                    "save(..., variables=) the base"
                )
            value = column_norm(base, self.adapter)
        return self._along_outputs("magnitude", value)

    def bias(self) -> np.ndarray:
        """The bias of lora_B, zero where the adapter has none."""
        value = self.adapter.bias
        if value is None:
            return np.zeros(stored_shape(self.slot, "bias", self.rank), np.asarray(self.adapter.b).dtype)
        return self._along_outputs("bias", value)

    def vectors(self) -> dict[str, np.ndarray]:
        """VeRA's lambda_d and lambda_b."""
        adapter = self.adapter
        if adapter.lambda_d is None:
            raise InputError(
                f"{self.slot.path} has no vectors of VeRA's, but other adapters have: PEFT has them for all or none"
            )
        if self.scale != 1:
            raise InputError(f"{self.slot.path}: PEFT's VeRA has no scale, but this adapter has {self.scale}")
        d, labels = self._pick(adapter.lambda_d, (*adapter.layout.batch, RANK))
        d = encode(self.slot, "lambda_d", np.take(d, range(self.rank), axis=-1), labels, self.rank)
        return {"lambda_d": d, "lambda_b": self._along_outputs("lambda_b", adapter.lambda_b)}

    def _along_outputs(self, part: str, value: Any) -> np.ndarray:
        array, labels = self._pick(value, (*self.adapter.layout.batch, *self.adapter.layout.outputs))
        if set(labels) != set(self.roles.outputs):
            raise InputError(f"{self.slot.path}: the adapter's {part} does not lie along the outputs of {self.slot.tensor}")
        return encode(self.slot, part, array, labels, self.rank)
