"""Adapters as Hugging Face PEFT's directories."""

import collections
import dataclasses
import itertools
import math
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.config import LoraConfig
from lora_jax.core import paths
from lora_jax.core.adapter import Adapter, Full, LowRank, Rows
from lora_jax.core.errors import InputError
from lora_jax.huggingface.names import HFName, listing
from lora_jax.peft import expert_layouts, files, token_rows, vera
from lora_jax.peft.slots import RANK, Slot, nested, slots, tensor_names
from lora_jax.peft.split_layers import Cut

# PEFT saves these modules by itself, and looks for them when it loads.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_VERA = "VeRA's vectors"
_NEVER = {("magnitudes", "biases"), ("magnitudes", "invocation sequences")} | {
    (other, _VERA) for other in ("magnitudes", "biases", "invocation sequences", "trained rows")
}


def save(
    directory: str | pathlib.Path,
    adapters: Mapping[str, Adapter],
    *,
    names: Mapping[str, HFName],
    config: LoraConfig | None = None,
    adapter: str | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    variables: Any = None,
    changed: Collection[str] = (),
) -> None:
    """Write adapters as Hugging Face PEFT does, for `PeftModel.from_pretrained`, vLLM and all else that reads its format.

    Args:
      directory: where `adapter_config.json` and `adapter_model.safetensors` go; files of these names are replaced.
      adapters: `{path: adapter}`; `LowRank` becomes lora_A and lora_B (with its magnitude and bias) or VeRA's two vectors,
        `Full` becomes a module to save, or a trained bias, `Rows` become trained tokens.
      names: `{path: HFName}`; see `match` and `rules`.
      config: what the adapters were made with: it says whether alpha is over sqrt(r) (`use_rslora`). Without it every alpha is
        over r, which also those readers know that ignore `use_rslora`.
      adapter: a name to save under, in `directory/<name>/`.
      base_model: the base's name or directory, for `base_model_name_or_path`.
      task_type: PEFT's `"CAUSAL_LM"`, `"SEQ_CLS"`, ...
      variables: the base, needed where PEFT stores more than what is trained: the other parameters of a module, in the base's
        own dtype, and the magnitudes of layers without one. Nothing else of the base is written.
      changed: paths of tables of `variables` that are not the base model's own (of a resized vocabulary, say): they are written
        beside their pairs.

    Raises:
      InputError: an adapter has no name, is abstract or can't be expressed in PEFT; the message names it and says what to do.

    >>> import tempfile, lora_jax as lj
    >>> names = {"dense/kernel": HFName("encoder.dense.weight", "i o -> o i")}
    >>> pair = lj.LowRank(jnp.ones((3, 2)), jnp.ones((2, 4)), lj.Layout((), (0,), (1,)), scale=0.5)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     save(directory, {"dense/kernel": pair}, names=names, base_model="my-base")
    ...     sorted(file.name for file in pathlib.Path(directory).iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    check_arrays(adapters, names)
    leaves = {} if variables is None else paths.flatten(variables)[0]
    absent = [path for path in changed if path not in leaves]
    if absent:
        raise InputError(f"changed: save(..., variables=) has no such tables: {listing(absent)}")
    writer = _Writer(adapters, names, config, leaves, task_type, changed)
    fields = writer.fields() | {"base_model_name_or_path": base_model, "task_type": task_type}
    files.write(files.locate(directory, adapter), fields, writer.tensors)


def check_arrays(adapters: Mapping[str, Adapter], names: Mapping[str, HFName]) -> None:
    """Raise an InputError unless all adapters have names, and are made of arrays with finite values."""
    unnamed = [path for path in adapters if path not in names]
    if unnamed:
        raise InputError(f"names has no Hugging Face name for {listing(unnamed)}")
    abstract = [path for path, a in adapters.items() if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(a))]
    if abstract:
        raise InputError(f"only arrays can be saved, but these adapters are abstract: {listing(abstract)}")
    broken = [path for path, a in adapters.items() if not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(a))]
    if broken:
        raise InputError(f"these adapters hold NaN or infinite values: {listing(broken)}")


@dataclasses.dataclass
class _Pair:
    """One module's pair as PEFT has it."""

    slot: Slot
    rank: int
    scale: float

    @property
    def key(self) -> str:
        """The name that PEFT matches patterns with."""
        return self.slot.tensor if self.slot.is_parameter else self.slot.module


class _Writer:
    """The tensors of an adapter set, and what the configuration must say of them."""

    def __init__(
        self,
        adapters: Any,
        names: Any,
        config: LoraConfig | None,
        leaves: Mapping[str, Any],
        task_type: Any,
        changed: Collection[str],
    ):
        self.names, self.config, self.leaves, self.task_type = names, config, leaves, task_type
        self.changed = changed
        self.pairs: list[_Pair] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.low_rank = {path: a for path, a in adapters.items() if isinstance(a, LowRank)}
        self.full = {path: a for path, a in adapters.items() if isinstance(a, Full)}
        self.rows = {path: a for path, a in adapters.items() if isinstance(a, Rows)}
        self.dora = any(a.magnitude is not None for a in self.low_rank.values())
        self.lora_bias = any(a.bias is not None for a in self.low_rank.values())
        self.vera = any(a.lambda_d is not None for a in self.low_rank.values())
        self.invocation = self._invocation()
        self.tied: set[str] = set()
        self._check_together()
        self._write_pairs()
        self.saved, self.bias = self._write_whole()
        self.indices = self._write_rows()

    # --- pairs ---

    def _write_pairs(self) -> None:
        by_module: dict[str, list[Slot]] = collections.defaultdict(list)
        cut = {}
        for path, adapter in self.low_rank.items():
            for slot in slots({path: self.names[path]}, {path: parameter_shape(adapter)}).values():
                pair = Cut(slot, adapter)
                if pair.rank:
                    if not slot.module:
                        raise InputError(f"{path}: the name {slot.tensor!r} has no module, and PEFT adapts modules")
                    cut[slot.tensor] = pair
                    by_module[slot.module].append(slot)
        if not cut:
            raise InputError("PEFT needs a low-rank pair, and these adapters have none: save them with lora_jax.checkpoint")
        for group in by_module.values():
            for slot, depth in nested(group) if group[0].is_parameter else [(slot, 0) for slot in group]:
                self._write_pair(cut[slot.tensor], tensor_names(slot, depth))

    def _write_pair(self, cut: Cut, keys: Mapping[str, str]) -> None:
        slot = cut.slot
        extra = [part for part, has in (("magnitude", self.dora), ("bias", self.lora_bias)) if has]
        for part in extra:
            if part not in keys or slot.is_parameter:
                raise InputError(f"{slot.path}: PEFT has no {part} for {slot.tensor} ({slot.name.kind}), so it can't be saved")
        if (self.invocation or self.vera) and slot.name.kind not in ("linear", "conv1d"):
            what = _VERA if self.vera else "invocation sequences"
            raise InputError(f"{slot.path}: PEFT has {what} for linear layers only, not for {slot.name.kind} weights")
        a, b = cut.factors()
        parts = {"a": a, "b": b}
        if self.vera:
            self.tensors |= vera.share(self.tensors, slot.path, parts)
            parts = cut.vectors()
        if "magnitude" in extra:
            parts["magnitude"] = cut.magnitude(self.leaves.get(slot.path))
        if "bias" in extra:
            parts["bias"] = cut.bias()
        self.tensors |= {keys[part]: array for part, array in parts.items()}
        self.pairs.append(_Pair(slot, cut.rank, cut.scale))
        if slot.name.tied:
            self._write_twin(cut, parts)
        if slot.path in self.changed:
            table = slot.name.export(np.asarray(self.leaves[slot.path]), slot.index)
            self.tensors[f"{slot.module}.base_layer.weight"] = table

    def _write_twin(self, cut: Cut, parts: Mapping[str, np.ndarray]) -> None:
        """A tied parameter's adapter is there for both uses, as `ensure_weight_tying` makes it."""
        slot = cut.slot
        if len(parts) > 2:
            raise InputError(f"{slot.path} is also {slot.name.tied}: PEFT ties pairs only, not magnitudes or biases")
        head = dataclasses.replace(cut.slot, tensor=slot.name.tied)
        self.tensors |= {f"{head.module}.lora_A.weight": parts["b"].T, f"{head.module}.lora_B.weight": parts["a"].T}
        self.pairs.append(_Pair(head, cut.rank, cut.scale))  # PEFT looks up the rank and alpha of each use
        self.tied.add(head.module)

    def _invocation(self) -> tuple[int, ...] | None:
        """The one invocation sequence of all pairs."""
        found = {adapter.invocation for adapter in self.low_rank.values()}
        if len(found) > 1:
            raise InputError("PEFT has one invocation sequence for all pairs, but these have several, or only some have one")
        invocation = next(iter(found), None)
        if invocation and self.task_type != "CAUSAL_LM":
            raise InputError("PEFT looks for an invocation sequence in causal language models only: pass task_type='CAUSAL_LM'")
        return invocation

    def _check_together(self) -> None:
        has = {"magnitudes": self.dora, "biases": self.lora_bias, "invocation sequences": self.invocation, _VERA: self.vera}
        has["trained rows"] = self.rows
        for one, other in _NEVER:
            if has[one] and has[other]:
                raise InputError(f"PEFT has no adapters with both {one} and {other}: save a set with one of them")

    # --- rows of tables ---

    def _write_rows(self) -> dict[str, list[int]]:
        """Write the rows; returns `trainable_token_indices`, by full names."""
        listed, known = {}, {name.name for name in self.names.values()}
        modules = {name.rpartition(".")[0] for name in known}
        shapes = {path: _rows_shape(rows) for path, rows in self.rows.items()}
        for slot in slots(self.names, shapes).values():
            rows = self.rows[slot.path]
            if not token_rows.is_table(slot) or token_rows.layout(slot, known) != rows.layout:
                raise InputError(f"{slot.path}: PEFT trains rows of tables, and {slot.tensor} is none with {rows.layout}")
            alike = sorted(other for other in modules - {slot.module} if other.endswith(slot.module))
            if alike:
                raise InputError(f"PEFT would train rows of {listing(alike)} along with {slot.module}, whose name ends alike")
            self.tensors[token_rows.key(slot)] = token_rows.encode(slot, rows)
            listed[slot.module] = list(rows.indices)
        return listed

    # --- parameters trained whole ---

    def _write_whole(self) -> tuple[list[str], str]:
        """Write what is trained whole; returns `modules_to_save` and `bias`."""
        module = {path: self._whole(name.name.rpartition(".")[0]) for path, name in self.names.items()}
        biases = {path for path, name in self.names.items() if name.name.endswith(".bias")}
        adapted = {module[path] for path in self.low_rank}
        heads = {name for name in module.values() if name.endswith(_HEADS.get(self.task_type, ()))}
        saved = {module[path] for path in self.full if path not in biases} | heads
        free = {path for path in self.full if module[path] not in saved}
        beside = {path for path in biases if module[path] in adapted}
        alone = not free <= beside or any(self._is_alone(slot) for path in free for slot in self._slots_of(path))
        if alone and free == {path for path in biases if module[path] not in saved}:
            mode, wanted = "all", free
        else:
            saved |= {module[path] for path in free - beside}
            mode, wanted = ("lora_only", beside) if free & beside else ("none", set())
        clash = [path for path in (*self.low_rank, *self.rows) if module[path] in saved]
        if clash:
            raise InputError(f"PEFT can't give a pair or rows to a module that it saves whole: {listing(clash)}")
        written = {path for path in self.names if module[path] in saved} | wanted
        self._check_at_hand(written)
        modules = {self._whole(slot.module) for path in written - wanted for slot in self._write_value(path)}
        for path in wanted:
            self._write_bias(path, mode)
        self._check_ends(modules, {module[path] for path in self.names} - saved)
        return sorted(modules | {head for head in self.tied if f"{head}.weight" in self.tensors}), mode

    def _whole(self, module: str) -> str:
        """The module that PEFT saves by itself and of which this one is a part (RoBERTa's head has two layers), or this one."""
        outer = itertools.accumulate(re.split(r"(?=\.)", module))
        return next((name for name in outer if name.endswith(_HEADS.get(self.task_type, ()))), module)

    def _check_at_hand(self, paths: set[str]) -> None:
        missing = sorted(path for path in paths if path not in self.full and path not in self.leaves)
        if missing:
            raise InputError(
                f"PEFT stores whole modules, and the biases of all adapted layers, so it needs {listing(missing)} too: train "
                "them as well, or pass save(..., variables=) the base"
            )

    def _check_ends(self, saved: set[str], others: set[str]) -> None:
        """PEFT takes every module whose name ends like one of `modules_to_save`."""
        for name in saved:
            alike = sorted(other for other in others if other.endswith(name))
            if alike:
                raise InputError(
                    f"PEFT would save {listing(alike)} along with {name}, whose name ends alike: train them whole too"
                )

    def _value(self, path: str) -> np.ndarray:
        """A parameter that is trained whole, or one that PEFT stores beside it."""
        return np.asarray(self.full[path].value if path in self.full else self.leaves[path])

    def _slots_of(self, path: str) -> list[Slot]:
        return list(slots({path: self.names[path]}, {path: self._value(path).shape}).values())

    def _is_alone(self, bias: Slot) -> bool:
        """Whether a bias is trained in a layer without a pair."""
        if any(bias.module == pair.slot.module for pair in self.pairs):
            return False
        value, base = self._value(bias.path), self.leaves.get(bias.path)
        return base is None or not np.array_equal(*(bias.name.export(np.asarray(x), bias.index) for x in (value, base)))

    def _write_value(self, path: str) -> list[Slot]:
        """The tensors of a parameter in a module that is saved."""
        value, found = self._value(path), self._slots_of(path)
        for slot in found:
            self.tensors[slot.tensor] = slot.name.export(value, slot.index)
            if slot.name.tied:
                self.tensors[slot.name.tied] = self.tensors[slot.tensor]
                self.tied.add(slot.name.tied.rpartition(".")[0])
        return found

    def _write_bias(self, path: str, mode: str) -> None:
        """A trained bias; in an adapted layer PEFT calls it that of the base layer."""
        value, adapted = self._value(path), {pair.slot.module for pair in self.pairs}
        for slot in self._slots_of(path):
            tensor = slot.name.export(value, slot.index)
            if slot.module in adapted:
                self.tensors[f"{slot.module}.base_layer.bias"] = tensor
            elif mode == "all":
                self.tensors[slot.tensor] = tensor
            elif self._is_alone(slot):
                raise InputError(
                    f"{path}: {slot.module} has no pair, and PEFT trains the biases of adapted layers only (or all): give it "
                    "one, or if this bias is the base's, pass save(..., variables=) the base"
                )

    # --- the configuration ---

    def fields(self) -> dict[str, Any]:
        """`adapter_config.json`."""
        rslora = self.config is not None and self.config.scaling == "rslora"
        alphas = {pair.key: shortest_alpha(pair.scale, math.sqrt(pair.rank) if rslora else pair.rank) for pair in self.pairs}
        ranks = {pair.key: pair.rank for pair in self.pairs}
        # PEFT warns of patterns for parameters, though it follows them.
        first = [pair.key for pair in self.pairs if pair.slot.is_parameter] or list(ranks)
        rank, alpha = (most_common(table[key] for key in first) for table in (ranks, alphas))
        dropouts = {a.dropout for a in self.low_rank.values()}
        if len(dropouts) > 1:
            raise InputError(f"PEFT has one dropout for all adapters, but these have {sorted(dropouts)}")
        kernels = [pair.slot for pair in self.pairs if not pair.slot.is_parameter]
        parameters = [pair.slot.tensor for pair in self.pairs if pair.slot.is_parameter]
        if parameters and dropouts != {0.0}:
            raise InputError(f"PEFT has no dropout for parameters such as {parameters[0]}: set the adapters' dropout to 0.0")
        kinds = {slot.name.kind for slot in kernels} | ({"linear"} if self.tied else set())
        fields = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": alpha,
            "use_rslora": rslora,
            "rank_pattern": {_exactly(key): value for key, value in ranks.items() if value != rank},
            "alpha_pattern": {_exactly(key): value for key, value in alphas.items() if value != alpha},
            "lora_dropout": dropouts.pop(),
            "target_modules": sorted({slot.module for slot in kernels}),
            "target_parameters": sorted(parameters) or None,
            "modules_to_save": self.saved or None,
            "bias": self.bias,
            "lora_bias": self.lora_bias,
            "use_dora": self.dora,
            "ensure_weight_tying": bool(self.tied),
            "alora_invocation_tokens": list(self.invocation) if self.invocation else None,
            "trainable_token_indices": self.indices or None,
            "fan_in_fan_out": "conv1d" in kinds and "linear" not in kinds,
            "init_lora_weights": True,
            "inference_mode": True,
            "peft_version": expert_layouts.WRITTEN,
        }
        return vera.from_lora(fields) if self.vera else fields


def most_common(values: Iterable[float]) -> Any:
    """The value that is there most often; of several, the largest."""
    return max(collections.Counter(values).items(), key=lambda item: (item[1], item[0]))[0]


def _exactly(name: str) -> str:
    """A pattern that matches this name alone, whatever the order of the table (PEFT sorts it when it saves)."""
    return "^" + re.escape(name)


def shortest_alpha(scale: float, divisor: float) -> float | int:
    """The shortest alpha with `alpha / divisor == scale`."""
    for digits in range(1, 18):
        alpha = float(f"{scale * divisor:.{digits}g}")
        if type(scale)(alpha / divisor) == scale:
            break
    return int(alpha) if alpha.is_integer() else alpha


def _rows_shape(rows: Rows) -> tuple[int, ...]:
    """The shape of a parameter with these rows, as far as they tell: the last of them is its last."""
    sizes = dict(zip(rows.layout.inputs + rows.layout.outputs, (1 + max(rows.indices), *jnp.shape(rows.values)[1:])))
    return tuple(sizes[axis] for axis in sorted(sizes))


def parameter_shape(adapter: LowRank) -> tuple[int, ...]:
    """The shape of the parameter that a pair belongs to."""
    sizes = {
        axis: size for axes, array in zip(adapter.axes(), (adapter.a, adapter.b)) for axis, size in zip(axes, jnp.shape(array))
    }
    return tuple(sizes[axis] for axis in sorted(sizes) if axis != RANK)
