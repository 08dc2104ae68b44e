"""The parameters of a decoder: their shapes, and where each stands in a Hugging Face checkpoint."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from lora_jax.core.errors import InputError
from lora_jax.huggingface.names import HFName, Kind
from lora_jax.models.decoder import NORMS
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.families import FAMILIES

Entry = tuple[tuple[int, ...], HFName]


class _OfLayer(NamedTuple):
    """A parameter of a layer; `{l}` in its name stands for the layer."""

    path: str
    shape: tuple[int, ...]
    name: str
    axes: str
    kind: Kind = "linear"
    order: int = 0


_LLAMA = {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head", "layers": "model.layers"}


def parameters(config: DecoderConfig, scan_layers: bool = False) -> dict[str, Entry]:
    """The shape and the Hugging Face name of each parameter, by path.

    Args:
      config: the model's sizes and parts.
      scan_layers: whether the layers' parameters are stacked.

    Raises:
      InputError: layers that are not alike can't be stacked.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=3, max_position_embeddings=8)
    >>> config = DecoderConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=2, **sizes)
    >>> shape, name = parameters(config, scan_layers=True)["params/layers/self_attn/k_proj/kernel"]
    >>> shape, name.name, name.axes
    ((3, 4, 2), 'model.layers.{l}.self_attn.k_proj.weight', 'l i o -> o i')
    """
    names = _names(config)
    table = dict(_outside(config, names))
    count = config.num_hidden_layers
    if scan_layers:
        if len(set(config.has_experts)) > 1:
            raise InputError("scan_layers needs layers that are alike, but only some of these have experts: leave it out")
        for one in _layer(config, names, config.has_experts[0]):
            name = HFName(one.name, f"l {one.axes}", one.kind, one.order)
            table[f"layers/{one.path}"] = (count, *one.shape), name
    for i, has_experts in enumerate(() if scan_layers else config.has_experts):
        for one in _layer(config, names, has_experts):
            name = HFName(one.name.replace("{l}", str(i)), one.axes, one.kind, one.order)
            table[f"layer_{i}/{one.path}"] = one.shape, name
    return {f"params/{path}": entry for path, entry in table.items()}


def stored(config: DecoderConfig, scan_layers: bool = False) -> dict[str, HFName]:
    """The name of each parameter in files, where that is not the one in memory."""
    family = FAMILIES[config.model_type]
    found = {}
    for path, (_, name) in parameters(config, scan_layers).items():
        _, place, *module = path.split("/")
        template, axes = family.stored.get("/".join(["experts", *module[1:-1]]), ("", ""))
        mark = "l " if place == "layers" else ""
        if module[:1] == ["mlp"] and module[-1] == "kernel" and name.axes.split("->")[0] == f"{mark}{axes}".split("->")[0]:
            layer = "{l}" if place == "layers" else place.removeprefix("layer_")
            found[path] = HFName(f"{_names(config)['layers']}.{layer}.{template}", mark + axes)
    return found


def _names(config: DecoderConfig) -> dict[str, str]:
    return _LLAMA | dict(FAMILIES[config.model_type].names)


def _outside(config: DecoderConfig, names: dict[str, str]) -> Iterator[tuple[str, Entry]]:
    """The parameters outside the layers."""
    width = config.hidden_size
    tied = f"{names['lm_head']}.weight" if config.tie_word_embeddings else ""
    embedding = HFName(f"{names['embed_tokens']}.weight", kind="embedding", tied=tied)
    yield "embed_tokens/embedding", ((config.vocab_size, width), embedding)
    if config.learnt_positions:
        shape = config.max_position_embeddings, width
        yield "embed_positions/embedding", (shape, HFName(f"{names['embed_positions']}.weight", kind="embedding"))
    for one in _norm("norm", names["norm"], width, config):
        yield one.path, (one.shape, HFName(one.name, one.axes))
    if not tied:
        yield "lm_head/kernel", ((width, config.vocab_size), HFName(f"{names['lm_head']}.weight", "i o -> o i"))


def _norm(path: str, name: str, width: int, config: DecoderConfig) -> Iterator[_OfLayer]:
    for ours, theirs in (("scale", "weight"), ("bias", "bias"))[: 1 + (config.norm == "layer")]:
        yield _OfLayer(f"{path}/{ours}", (width,), f"{name}.{theirs}", "o -> o")


def _layer(config: DecoderConfig, names: dict[str, str], has_experts: bool) -> Iterator[_OfLayer]:
    """The parameters of one layer."""
    theirs = lambda path: f"{names['layers']}.{{l}}.{names.get(path, path.replace('/', '.'))}"
    norms = {name: config.hidden_size for name in NORMS[config.norms] if name is not None}
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    for name, size in (("q_norm", queries), ("k_norm", keys)) if config.qk_norm else ():
        norms[f"self_attn/{name}"] = config.head_dim if config.qk_norm == "heads" else size
    for norm, width in norms.items():
        yield from _norm(norm, theirs(norm), width, config)
    if config.sinks:
        yield _OfLayer("self_attn/sinks", (config.num_attention_heads,), theirs("self_attn/sinks"), "o -> o")
    conv1d = FAMILIES[config.model_type].conv1d
    for path, (into, out, bias) in _dense(config, has_experts).items():
        kind: Kind = "conv1d" if conv1d else "parameter" if path == "mlp/router" else "linear"
        axes, name = "i o -> i o" if conv1d else "i o -> o i", theirs("experts/router" if path == "mlp/router" else path)
        yield _OfLayer(f"{path}/kernel", (into, out), f"{name}.weight", axes, kind)
        if bias:
            yield _OfLayer(f"{path}/bias", (out,), f"{name}.bias", "o -> o")
    if has_experts:
        yield from _experts(config, theirs)


def _dense(config: DecoderConfig, has_experts: bool) -> dict[str, tuple[int, int, bool]]:
    """The width before and after each product with a kernel, and whether a bias follows."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    if config.fused is None:
        shapes = {
            f"self_attn/{name}_proj": (width, n, config.qkv_bias) for name, n in (("q", queries), ("k", keys), ("v", keys))
        }
    else:
        shapes = {"self_attn/qkv_proj": (width, queries + 2 * keys, config.qkv_bias)}
    shapes["self_attn/o_proj"] = queries, width, config.output_bias
    if has_experts:
        assert config.experts is not None
        return shapes | {"mlp/router": (width, config.experts.count, config.experts.bias)}
    if config.gated and config.fused is not None:
        shapes["mlp/gate_up_proj"] = width, 2 * inner, config.mlp_bias
    else:
        shapes |= {f"mlp/{name}_proj": (width, inner, config.mlp_bias) for name in ("gate", "up")[not config.gated :]}
    return shapes | {"mlp/down_proj": (inner, width, config.mlp_bias)}


def _experts(config: DecoderConfig, theirs: Callable[[str], str]) -> Iterator[_OfLayer]:
    """The kernels of all experts, joined as transformers has them: gpt-oss's with the input first."""
    experts, width = config.experts, config.hidden_size
    assert experts is not None
    turned = experts.interleaved
    kind: Kind = "parameter_transposed" if turned else "parameter"
    halves = (experts.width, 2) if turned else (2, experts.width)
    up, down = theirs("experts/gate_up_proj"), theirs("experts/down_proj")
    axes = ("e i o c -> e i (o c)", "e i o -> e i o") if turned else ("e i c o -> e (c o) i", "e i o -> e o i")
    yield _OfLayer("mlp/gate_up_proj/kernel", (experts.count, width, *halves), up, axes[0], kind, 0)
    yield _OfLayer("mlp/down_proj/kernel", (experts.count, experts.width, width), down, axes[1], kind, 1)
    if experts.bias:
        flat = "e o c -> e (o c)" if turned else "e c o -> e (c o)"
        yield _OfLayer("mlp/gate_up_proj/bias", (experts.count, *halves), f"{up}_bias", flat)
        yield _OfLayer("mlp/down_proj/bias", (experts.count, width), f"{down}_bias", "e o -> e o")
