"""Adapters from Hugging Face PEFT's directories."""

import dataclasses
import pathlib
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core import paths
from lora_jax.core.adapter import Adapter, Full, LowRank, Rows, check
from lora_jax.core.errors import InputError
from lora_jax.huggingface.names import HFName, listing
from lora_jax.peft import changed_bases, files, token_rows, vera
from lora_jax.peft.config import Settings
from lora_jax.peft.expert_layouts import Experts, has_experts, turned_back, turned_kinds, turned_over
from lora_jax.peft.slots import Slot, aligned, decode, nested, place, slots, stored_shape, tensor_names
from lora_jax.peft.stack_layers import Found, bias_path, stacked

_COPY = re.compile(r"(.*?)\.(modules_to_save|original_module)\.(.*)")
_OF_IMAGES = re.compile(r"(^|\.)(vision_tower|multi_modal_projector)\.")
_PAIR = re.compile(r"(\.base_layer)*\.(lora_(A\.weight|embedding_A)|vera_lambda_b)$")


def load(
    directory: str | pathlib.Path,
    variables: Any,
    *,
    names: Mapping[str, HFName],
    adapter: str | None = None,
    strict: bool = True,
    experts: Experts | None = None,
) -> dict[str, Adapter]:
    """The adapters of a Hugging Face PEFT directory, for the parameters of a JAX model.

    Everything that PEFT's LoRA and VeRA configurations can say is honoured or refused. An adapter made on a base that PiSSA
    or OLoRA changed is turned into one of twice the rank on the original base: `s (B A - B0 A0)`, with the initialiser's
    `B0 A0`. PEFT computes a branch in its adapter's dtype, lora_jax in the input's: on a bfloat16 base
    `dataclasses.replace(pair, branch_dtype="float32")` has PEFT's results.

    Args:
      directory: what `PeftModel.save_pretrained` wrote: `adapter_config.json` and `adapter_model.safetensors`.
      variables: the base's parameters (shapes suffice where nothing has to be compared or made again).
      names: `{path: HFName}` for every parameter that Hugging Face has; see `match` and `rules`.
      adapter: the name of an adapter that was saved under one, in `directory/<name>/`.
      strict: whether a tensor that no parameter takes is an error, or only a warning.
      experts: how A and B of fused experts are laid out, as PEFT did before 0.19.1 (`"old"`) or since (`"new"`): for a file of
        which neither `peft_version` nor shapes tell.

    Returns:
      `{path: adapter}` in the dtype of the file. A stacked parameter has one adapter, with the true rank of each layer.

    Raises:
      MissingError: a file is missing. An `adapter_model.bin` is never opened.
      InputError: a damaged file, an unknown field, a tensor that is missing, of the wrong shape or not taken, an adapter of
        one use of a tied parameter, or experts of an unknown layout; the message lists them.

    >>> import tempfile, jax.numpy as jnp, lora_jax as lj
    >>> from lora_jax import peft
    >>> names = {"dense/kernel": peft.HFName("encoder.dense.weight", "i o -> o i")}
    >>> pair = lj.LowRank(jnp.ones((3, 2)), jnp.ones((2, 4)), lj.Layout((), (0,), (1,)), scale=0.5)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     peft.save(directory, {"dense/kernel": pair}, names=names)
    ...     loaded = peft.load(directory, {"dense": {"kernel": jnp.zeros((3, 4))}}, names=names)
    >>> loaded["dense/kernel"].scale, loaded["dense/kernel"].b.shape
    (0.5, (2, 4))
    """
    where = files.locate(directory, adapter)
    fields, tensors = files.read(where)
    is_vera = fields.get("peft_type") == vera.KIND
    settings = Settings.from_fields(vera.as_lora(fields, where / files.CONFIG) if is_vera else fields, where / files.CONFIG)
    leaves, _ = paths.flatten(variables)
    unknown = [path for path in names if path not in leaves]
    if unknown:
        raise InputError(
            f"the names are those of another model: these paths are not in the variables: {listing(unknown)} (dots and slashes "
            "of a key are `%2E` and `%2F` in a path)"
        )
    found = _Reader(where, settings, tensors, leaves, names, is_vera, experts)
    adapters = found.adapters()
    found.finish(strict)
    return adapters


class _Reader:
    """One directory's tensors, each of which some parameter must take."""

    def __init__(
        self,
        directory: pathlib.Path,
        settings: Settings,
        tensors: Any,
        leaves: Any,
        names: Any,
        is_vera: bool,
        experts: Experts | None,
    ):
        self.is_vera, self.mark = is_vera, "lambda_b" if is_vera else "a"  # what tells a pair
        self.experts: Experts | None = experts
        self.directory, self.settings, self.tensors, self.leaves = directory, settings, dict(tensors), leaves
        self.left, self.file = dict.fromkeys(tensors), directory / files.WEIGHTS
        adapted = {_PAIR.sub("", name) for name in tensors if _PAIR.search(name)}
        self.slots = aligned(slots(names, {path: jnp.shape(leaves[path]) for path in names}), adapted)
        self.missing: list[str] = []

    def adapters(self) -> dict[str, Adapter]:
        """Every adapter, in the order of the parameters."""
        pairs, whole, rows = self._pairs(), self._whole(), self._rows()
        if self.missing:
            raise InputError(
                f"{self.directory}: {files.CONFIG} asks for tensors that {files.WEIGHTS} lacks: {listing(self.missing)}"
            )
        both = sorted(set(pairs) & set(whole))
        if both:
            raise InputError(
                f"{self.directory}: {listing(both)} would get a pair in some layers and be trained whole in others: use a "
                "model whose layers are not stacked"
            )
        both = sorted(set(rows) & (set(pairs) | set(whole)))
        if both:
            raise InputError(f"{self.directory}: {listing(both)} would get rows and something else: PEFT has no such adapters")
        made: dict[str, Adapter] = {path: self._low_rank(found) for path, found in pairs.items()}
        made |= {path: self._full(path, found) for path, found in whole.items()} | rows
        return {path: made[path] for path in self.leaves if path in made}

    def finish(self, strict: bool) -> None:
        """Complain of tensors that are left."""
        for slot in self.slots.values():
            if slot.name.tied and any(name.startswith(f"{slot.name.tied.rpartition('.')[0]}.") for name in self.left):
                raise InputError(self._half_tied(slot, f"changes {slot.name.tied.rpartition('.')[0]} alone"))
        if not self.left:
            return
        problem = (
            f"{self.file} has {len(self.left)} tensors that no parameter takes: "
            f"{listing(sorted(map(files.full_name, self.left)))}"
        )
        if strict:
            advice = "Is it an adapter of this model, and do the names cover it?"
            if any(_OF_IMAGES.search(name) for name in self.left):
                advice = (
                    "The model's part for images is not read: adapt its texts alone, by target_modules='.*language_model.*'."
                )
            raise InputError(f"{problem}. {advice} strict=False leaves them out")
        warnings.warn(problem, stacklevel=3)

    # --- pairs ---

    def _pairs(self) -> dict[str, list[Found]]:
        pairs: dict[str, list[Found]] = {}
        for slot in self.slots.values():
            if slot.is_kernel and self._is_target(slot):
                pairs.setdefault(slot.path, []).append(self._pair(slot, slot.module, tensor_names(slot)))
        wrapped = {slot: tensor_names(slot, depth) for slot, depth in self._wrapped()}
        turned = self._turned_experts(wrapped)
        for slot, tensors in wrapped.items():
            pairs.setdefault(slot.path, []).append(self._pair(slot, slot.tensor, tensors, turned=slot in turned))
        for found in [f for listed in pairs.values() for f in listed]:
            self._same_base(found.slot)
            self._same_tied_pair(found)
        return pairs

    def _is_target(self, slot: Slot) -> bool:
        targets = self.settings.target_modules
        if isinstance(targets, str) and targets.lower() == "all-linear":  # PEFT saves the list that it stands for
            return slot.name.kind != "embedding" and tensor_names(slot)[self.mark] in self.tensors
        tied = self.settings.ensure_weight_tying and tensor_names(slot)["a"] in self.tensors
        return tied or self.settings.targets(slot.module)

    def _wrapped(self) -> list[tuple[Slot, int]]:
        """The parameters that PEFT adapts by themselves, each with its place among the wrappers of its module."""
        by_module: dict[str, list[Slot]] = {}
        for slot in self.slots.values():
            if len(slot.name.groups(len(slot.shape))) > 1 and self.settings.targets_parameter(slot.tensor):
                by_module.setdefault(slot.module, []).append(slot.as_parameter())
        return [placed for group in by_module.values() for placed in nested(group)]

    def _turned_experts(self, wrapped: Mapping[Slot, Mapping[str, str]]) -> set[Slot]:
        """The experts of which the file has A and B the other way round, as older PEFT wrote them."""
        shapes = {slot: np.shape(self.tensors[names["a"]]) for slot, names in wrapped.items() if names["a"] in self.tensors}
        found = {slot: (self.settings.rank(slot.tensor), shape) for slot, shape in shapes.items() if has_experts(slot)}
        kinds = turned_kinds(found, self.settings.peft_version, self.experts, self.file)
        return {slot for slot in found if slot.name.kind in kinds}

    def _pair(self, slot: Slot, name: str, tensors: Mapping[str, str], turned: bool = False) -> Found:
        settings = self.settings
        self._check_linear(slot)
        rank = self._tied_rank(slot) or settings.rank(name)
        wanted = ["lambda_d", "lambda_b"] if self.is_vera else ["a", "b"]
        wanted += ["magnitude"] if settings.use_dora else []
        wanted += ["bias"] if settings.lora_bias and "bias" in tensors else []
        parts = {}
        for part in wanted:
            stored = turned_over(slot) if turned else slot
            tensor = self._take(tensors[part], stored_shape(stored, part, rank), slot.path)
            if tensor is not None:
                parts[part] = decode(stored, part, tensor, rank)
        if turned and not self.missing:
            parts |= turned_back(slot, parts)
        if self.is_vera:
            parts |= self._shared(slot, rank)
        found = Found(slot, rank, settings.scale(name), parts)
        # An embedding's pair starts as ever, whatever the initialiser.
        replayed = settings.replays and slot.name.kind != "embedding"
        return self._replayed(found) if replayed and not self.missing else found

    def _check_linear(self, slot: Slot) -> None:
        special = "VeRA" if self.is_vera else "aLoRA" if self.settings.invocation else ""
        if special and slot.name.kind not in ("linear", "conv1d"):
            raise InputError(
                f"{self.directory}: PEFT has {special} for linear layers only, and {slot.tensor} is of another kind"
            )

    def _shared(self, slot: Slot, rank: int) -> dict[str, np.ndarray]:
        """VeRA's A and B, which are there once."""
        self._forget(vera.SHARED.values())
        missing = [name for name in vera.SHARED.values() if name not in self.tensors]
        self.missing += [name for name in missing if name not in self.missing]
        return {} if missing else vera.factors(self.tensors, slot, rank)

    def _tied_rank(self, slot: Slot) -> int | None:
        """The rank of a head whose pair PEFT ties to that of the embedding, whatever the patterns say of the head."""
        if not self.settings.ensure_weight_tying or slot.name.kind == "embedding" or slot.is_parameter:
            return None
        head = [self.tensors.get(tensor_names(slot)[part]) for part in "ab"]
        for other in self.slots.values():
            twin = [self.tensors.get(tensor_names(other)[part]) for part in "ba"] if other.name.kind == "embedding" else [None]
            if all(x is not None and y is not None and np.array_equal(x, y.T) for x, y in zip(head, twin)):
                return int(np.shape(head[0])[0])
        return None

    def _take(self, name: str, shape: tuple[int, ...], path: str) -> np.ndarray | None:
        """A tensor of the file, which no other parameter may take then."""
        if name not in self.tensors:
            self.missing.append(files.PREFIX + name)
            return None
        tensor = self.tensors[name]
        self.left.pop(name, None)
        if tensor.ndim == len(shape) > 2 and tensor.shape[1] > shape[1] and tensor.shape[1] % shape[1] == 0:
            raise InputError(
                f"{path}: in a grouped convolution PEFT's adapter takes all channels to each group, which is no change of the "
                f"kernel ({files.PREFIX + name} has the shape {tensor.shape}, the kernel's own would be {shape})"
            )
        if tensor.shape != shape:
            raise InputError(
                f"{self.file}: {files.PREFIX + name} has the shape {tensor.shape}; {path} of the shape "
                f"{jnp.shape(self.leaves[path])} and the configuration's rank need {shape}"
            )
        return tensor

    def _replayed(self, found: Found) -> Found:
        """A pair of twice the rank on the original base, from one on the base that the initialiser changed."""
        if self._is_abstract(found.slot.path):
            raise InputError(
                f"{found.slot.path}: init_lora_weights={self.settings.replays!r} needs the base's values, not shapes"
            )
        changed = changed_bases.on_original_base
        a, b = changed(self.settings.replays, found.slot, self._base(found.slot), found.parts, found.scale)
        return dataclasses.replace(found, rank=2 * found.rank, parts={**found.parts, "a": a, "b": b})

    def _low_rank(self, listed: list[Found]) -> LowRank:
        """One adapter from the pairs of all of a parameter's tensors."""
        arrays, fields = stacked(listed)
        fields |= {part: self._array(array) for part, array in arrays.items()}
        return LowRank(
            **fields,
            dropout=float(self.settings.lora_dropout),
            bias_path=bias_path(listed, self.slots, arrays["bias"].shape) if "bias" in arrays else None,
            invocation=self.settings.invocation,
            frozen=("a", "b") if self.is_vera else (),
        )

    # --- rows of tables ---

    def _rows(self) -> dict[str, Rows]:
        tables = {slot: self.settings.rows(slot.module) or () for slot in self.slots.values() if token_rows.is_table(slot)}
        found = [slot for slot, indices in tables.items() if indices and token_rows.key(slot) in self.tensors]
        asked = self.settings.trainable_token_indices
        wanted = [slot for slot, indices in tables.items() if indices]
        if isinstance(asked, Mapping):
            self._check_tables(asked, tables)
        else:  # of the input embedding, whatever it is called
            found = wanted = found[:1]
            self.missing += [f"*.{token_rows.DELTA}"] if asked and not found else []
        made: dict[str, Rows] = {}
        for slot in found:
            tensor = self._take(token_rows.key(slot), (len(tables[slot]), slot.name.shape(slot.shape)[1]), slot.path)
            twins = [twin for twin in tables if twin not in found and self._is_copy(twin, slot)]
            if tensor is None:
                continue
            for table in (slot, *twins):
                rows = Rows(self._array(token_rows.decode(table, tensor)), tables[slot], token_rows.layout(table, self.slots))
                check(table.path, rows, table.shape)
                made[table.path] = rows
        self.missing += [files.PREFIX + token_rows.key(slot) for slot in wanted if slot not in found and slot.path not in made]
        return made

    def _check_tables(self, asked: Iterable[str], tables: Iterable[Slot]) -> None:
        modules = [tensor.rpartition(".")[0] for slot in tables for tensor in (slot.tensor, slot.name.tied)]
        for name in asked:
            if not any(module.endswith(name) for module in modules):
                raise InputError(f"{self.directory}: trainable_token_indices: no module is called {name!r}")

    def _is_copy(self, twin: Slot, slot: Slot) -> bool:
        """Whether two parameters are one in PEFT's base: a head that was tied to the embedding gets its rows too."""
        if twin.name.shape(twin.shape) != slot.name.shape(slot.shape):
            return False
        if self._is_abstract(twin.path) or self._is_abstract(slot.path):
            raise InputError(f"{twin.path}: whether it is tied to {slot.path} needs the base's values, not shapes")
        return self._is_base(twin, self._base(slot))

    # --- parameters trained whole ---

    def _whole(self) -> dict[str, list[tuple[Slot, np.ndarray]]]:
        whole: dict[str, list[tuple[Slot, np.ndarray]]] = {}
        for slot in self.slots.values():
            key = self._whole_key(slot)
            if key is not None:
                tensor = self._take(key, slot.name.shape(slot.shape), slot.path)
                if tensor is not None:
                    whole.setdefault(slot.path, []).append((slot, tensor))
            else:  # PEFT adds the embeddings of a model whose vocabulary was changed, tied ones under both names
                both = (slot.tensor, slot.name.tied)
                self._forget(name for name in both if name in self.left and self._is_base(slot, self.tensors[name]))
        for listed in whole.values():
            for slot, tensor in listed:
                self._same_tied_value(slot, tensor)
        self._drop_copies()
        return whole

    def _whole_key(self, slot: Slot) -> str | None:
        """What the file calls a parameter that the configuration trains whole; `None` if it does not."""
        settings = self.settings
        if settings.saves(slot.module) or (settings.ensure_weight_tying and slot.tensor in self.tensors):
            return slot.tensor
        kernel = self.slots.get(f"{slot.module}.weight")
        adapted = kernel is not None and kernel.is_kernel and self._is_target(kernel)
        if slot.parameter != "bias" or settings.bias == "none" or (settings.bias == "lora_only" and not adapted):
            return None
        inside = f"{slot.module}.base_layer.bias"  # as PEFT writes it since its layers wrap the base's
        return inside if adapted and inside in self.tensors else slot.tensor

    def _drop_copies(self) -> None:
        """With bias="all" PEFT writes a saved module's biases three times: also the wrapper's, and the one that is not used."""
        for name in list(self.left):
            found = _COPY.fullmatch(name)
            if found is None:
                continue
            outer, wrapper, inner = found.groups()
            for rest in (inner, inner.partition(".")[2]):  # without and with the adapter's name
                saved = self.tensors.get(f"{outer}.{rest}")
                if saved is not None and (wrapper == "original_module" or np.array_equal(self.tensors[name], saved)):
                    self.left.pop(name, None)

    def _full(self, path: str, listed: list[tuple[Slot, np.ndarray]]) -> Full:
        shape = jnp.shape(self.leaves[path])
        covered = len(listed) == len(listed[0][0].name.tensors(shape))
        if not covered and self._is_abstract(path):
            raise InputError(f"{path}: the file has only some of its layers, so the base's values are needed, not shapes")
        value = np.empty(shape, listed[0][1].dtype) if covered else np.array(self.leaves[path], listed[0][1].dtype)
        for slot, tensor in listed:
            value[place(slot, range(len(shape)), len(shape))] = slot.name.restore(tensor, shape)
        return Full(self._array(value))

    # --- the base ---

    def _is_abstract(self, path: str) -> bool:
        return isinstance(self.leaves[path], jax.ShapeDtypeStruct)

    def _base(self, slot: Slot) -> np.ndarray:
        return np.asarray(slot.name.export(self.leaves[slot.path], slot.index))

    def _is_base(self, slot: Slot, tensor: np.ndarray) -> bool:
        return not self._is_abstract(slot.path) and np.array_equal(tensor, self._base(slot).astype(tensor.dtype))

    def _same_base(self, slot: Slot) -> None:
        """PEFT saves the base of an embedding beside its adapter, and puts it in the base's place when it loads."""
        for tensor_name in filter(None, (slot.tensor, slot.name.tied)):
            copy = f"{tensor_name.rpartition('.')[0]}.base_layer.weight"
            if copy not in self.left:
                continue
            if not self._is_base(slot, self.tensors[copy]):
                raise InputError(
                    f"{self.file}: {files.PREFIX + copy} of the shape {self.tensors[copy].shape} replaces "
                    f"the base's weight, but is not equal to {slot.path} of the shape {slot.shape}: give the base this weight"
                )
            del self.left[copy]

    # --- tied parameters: one here, used twice there ---

    def _same_tied_pair(self, found: Found) -> None:
        """An adapter of a tied parameter must be there for both uses, as PEFT's `ensure_weight_tying` makes it."""
        slot = found.slot
        if not slot.name.tied or self.missing:
            return
        head = slot.name.tied.rpartition(".")[0]
        keys = [f"{head}.lora_A.weight", f"{head}.lora_B.weight"]
        own = tensor_names(slot)
        twins = [self.tensors[own["b"]].T, self.tensors[own["a"]].T]
        if not all(key in self.tensors and np.array_equal(self.tensors[key], twin) for key, twin in zip(keys, twins)):
            raise InputError(self._half_tied(slot, f"changes {slot.module} alone"))
        if self.settings.scale(head) != found.scale:  # PEFT looks up each use's own rank and alpha
            raise InputError(self._half_tied(slot, f"has another scale for {slot.module} than for {head}"))
        self._forget(keys)

    def _same_tied_value(self, slot: Slot, tensor: np.ndarray) -> None:
        if not slot.name.tied:
            return
        if slot.name.tied not in self.tensors or not np.array_equal(self.tensors[slot.name.tied], tensor):
            raise InputError(self._half_tied(slot, f"changes {slot.module} alone"))
        self._forget([slot.name.tied])

    def _half_tied(self, slot: Slot, what: str) -> str:
        return (
            f"{self.directory}: the adapter {what}, but {slot.path} is both {slot.tensor} and {slot.name.tied}: use a "
            "model that has a parameter for each (llama.load(..., tie=False); --untie on a command line), or an adapter of "
            "both (PEFT's ensure_weight_tying)"
        )

    def _forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.left.pop(key, None)

    def _array(self, array: np.ndarray) -> jax.Array:
        if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
            raise InputError(f"{self.file} has {array.dtype} tensors: set jax_enable_x64 to read them as they are")
        return jnp.asarray(array)
