"""Adapters as GGUF files, which llama.cpp puts on a base with `--lora`."""

import collections
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lora_jax.adapters import algebra
from lora_jax.core import files
from lora_jax.core.adapter import Adapter, LowRank, Rows
from lora_jax.core.errors import InputError
from lora_jax.huggingface import gguf_names, gguf_reader
from lora_jax.huggingface.names import HFName
from lora_jax.peft.slots import slots
from lora_jax.peft.split_layers import Cut
from lora_jax.peft.writing import check_arrays, most_common, parameter_shape, shortest_alpha

_EMBEDDING = "token_embd.weight"
_WHOLE = "merge it into the base (lora_jax.merge, lora-jax export --format merged), and convert the whole model"


def save_gguf(
    file: str | os.PathLike[str],
    adapters: Mapping[str, Adapter],
    *,
    names: Mapping[str, HFName],
    architecture: str,
    heads: tuple[int, int],
    base_model: str | None = None,
) -> None:
    """Write adapters as llama.cpp reads them (`llama-cli -m base.gguf --lora FILE`); needs the package `gguf`.

    The file has A `(r, in)` and B `(out, r)` in float32 for each of the base's tensors, stacked for experts, and one alpha: a
    pair acts as `alpha / r B A`. What a pair's own scale differs from that is multiplied into its B, and so are VeRA's vectors
    into A and B.

    Of a model of `lora_jax.models.llama`, its `gguf_fields` gives the names, the architecture and the heads.

    Args:
      file: to be written; an existing one is replaced.
      adapters: `{path: adapter}`, of which each must be a `LowRank` pair without a magnitude or a bias.
      names: `{path: HFName}`, as they are in files.
      architecture: what llama.cpp calls the family of the base, `"llama"` or `"qwen3moe"` say.
      heads: how many heads of queries and of keys the base has.
      base_model: the base's name, recorded in the file.

    Raises:
      InputError: an adapter has no name, is abstract, or is one that llama.cpp can't express; the message names it.
      ImportError: the package is not installed.

    >>> import tempfile, jax.numpy as jnp, lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((8, 2)), jnp.ones((2, 4)), lj.Layout((), (0,), (1,)), scale=4.0)
    >>> names = {"v": lj.peft.HFName("model.layers.0.self_attn.v_proj.weight", "i o -> o i")}
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     file = f"{directory}/adapter.gguf"
    ...     lj.peft.save_gguf(file, {"v": pair}, names=names, architecture="llama", heads=(2, 1))
    ...     found = lj.models.gguf_files.GgufFile(file)
    >>> found.metadata["adapter.lora.alpha"], found.shapes
    (8.0, {'blk.0.attn_v.weight.lora_a': (2, 8), 'blk.0.attn_v.weight.lora_b': (4, 2)})
    """
    gguf = gguf_reader.package()
    check_arrays(adapters, names)
    pairs = {path: _pair(path, adapter) for path, adapter in adapters.items()}
    invocation, cuts = _invocation(pairs.values()), _cuts(pairs, names, architecture)
    alphas = [shortest_alpha(found[0].scale, _rank(found)) for found in cuts.values()]
    alpha = float(most_common([value for value in alphas if value] or [1.0]))  # llama.cpp takes 0 for none
    file = pathlib.Path(file)
    temporary = file.with_name(f".{file.name}.new")
    with files.writing(file):
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        if invocation:
            kinds = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
            writer.add_key_value(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, list(invocation), *kinds)
        if base_model is not None:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, base_model)
        for stored, found in cuts.items():
            for part, array in zip("ab", _factors(stored, found, alpha, architecture, heads)):
                writer.add_tensor(f"{stored}.lora_{part}", np.ascontiguousarray(array, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        temporary.replace(file)


def _pair(path: str, adapter: Adapter) -> LowRank:
    """The pair that an adapter is, with a scale that is one number."""
    if not isinstance(adapter, LowRank):
        what = "trained rows" if isinstance(adapter, Rows) else "parameter trained whole"
        raise InputError(f"{path}: llama.cpp has low-rank pairs alone, and no {what}: {_WHOLE}")
    for what, part in {"magnitude (DoRA)": adapter.magnitude, "bias": adapter.bias}.items():
        if part is not None:
            raise InputError(f"{path}: llama.cpp has no pairs with a {what}: {_WHOLE}")
    pair = adapter.widened().folded()
    return pair if isinstance(pair.scale, float) else algebra.scale_folded(pair)


def _invocation(pairs: Iterable[LowRank]) -> tuple[int, ...] | None:
    """The one invocation sequence of all pairs."""
    found = {pair.invocation for pair in pairs}
    if len(found) > 1:
        raise InputError("llama.cpp has one invocation sequence for all pairs, but these have several, or only some have one")
    return next(iter(found), None)


def _cuts(pairs: Mapping[str, LowRank], names: Mapping[str, HFName], architecture: str) -> dict[str, list[Cut]]:
    """The part of a pair for each of the base's tensors, or for those of experts the part for each expert."""
    layout, cuts = gguf_names.of(architecture, experts=True), collections.defaultdict(list)
    for path, pair in pairs.items():
        if tied := names[path].tied:
            raise InputError(f"{path} is also {tied}, and llama.cpp applies a pair to one of the two only: {_WHOLE}")
        for slot in slots({path: names[path]}, {path: parameter_shape(pair)}).values():
            stored = layout.stored(slot.tensor)
            if stored is None:
                raise InputError(f"{path}: llama.cpp has no {slot.tensor} in models of the architecture {architecture!r}")
            cuts[stored].append(Cut(slot, pair))
    for stored, found in cuts.items():
        if len({cut.slot.path for cut in found}) > 1 or (gguf_names.EXPERTS in stored) != (len(found) > 1):
            raise InputError(
                f"{found[0].slot.path}: llama.cpp has all experts in {stored}: adapt the experts of a layer in one"
            )
    adapted = {stored: found for stored, found in cuts.items() if _rank(found)}
    if not adapted:
        raise InputError("llama.cpp needs a low-rank pair, and these adapters have none")
    return adapted


def _rank(cuts: Sequence[Cut]) -> int:
    return max(cut.rank for cut in cuts)


def _factors(
    stored: str, cuts: Sequence[Cut], alpha: float, architecture: str, heads: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a tensor: `(r, in)` and `(out, r)`, after an axis of experts where it has one."""
    rank = _rank(cuts)
    padded = lambda array, axis: np.pad(array, [(0, rank - array.shape[i] if i == axis else 0) for i in range(2)])
    pairs = [(padded(a, 0), padded(b, 1)) for a, b in (cut.factors() for cut in cuts)]
    a, b = (np.stack(parts) if len(cuts) > 1 else parts[0] for parts in zip(*pairs))
    b = b * (cuts[0].scale / (alpha / rank))
    if gguf_names.of(architecture).interleaves(stored):
        queries, keys = heads
        count = keys if "attn_k" in stored else queries
        if len(b) % (2 * count):
            raise InputError(f"{cuts[0].slot.path}: {count} heads can't share {len(b)} rows: heads= must be those of the base")
        b = b[np.argsort(gguf_names.interleaved(len(b), count))]
    return (a.T if stored == _EMBEDDING else a), b
