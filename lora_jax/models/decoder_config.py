"""The sizes of a decoder of the Llama family, and how a Hugging Face `config.json` writes them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.errors import InputError

FAMILY = ("llama", "mistral", "qwen2")
_MOST_LAYERS = 10_000  # a broken file must not ask for more work than any real one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Llama 3's scaling of the rotary frequencies, by wavelength against the length of pretraining.

    Wavelengths below `original / high` stay, those above `original / low` are divided by `factor`, with a smooth step between.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """The scaled frequencies."""
        low, high, original = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        length = 2 * np.pi / frequencies
        smooth = np.clip((original / length - low) / (high - low), 0, 1)
        between = (1 - smooth) * frequencies / self.factor + smooth * frequencies
        scaled = np.where(length > original / low, frequencies / self.factor, between)
        return np.where(length < original / high, frequencies, scaled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRope:
    """All rotary frequencies divided by `factor`."""

    factor: float

    def scale(self, frequencies: np.ndarray) -> np.ndarray:
        """The scaled frequencies."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The sizes of a decoder of the Llama family.

    Args:
      qkv_bias: whether the query, key and value projections have biases; `output_bias`: the output projection.
      rope_scaling: how the rotary frequencies are scaled, if they are.
      sliding_window: the tokens that a query of a sliding layer sees, itself included.
      sliding_layers: the layers that see no more than that; the others see all tokens before.
      eos_token_ids: the ids that end a text.

    Raises:
      InputError: sizes that do not fit together.
    """

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Llama3Rope | LinearRope | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        for name in _SIZES:
            _check_number(name, getattr(self, name), int)
        if self.num_hidden_layers > _MOST_LAYERS:
            raise InputError(f"num_hidden_layers is {self.num_hidden_layers}; at most {_MOST_LAYERS} can be read")
        for name in ("rms_norm_eps", "rope_theta"):
            _check_number(name, getattr(self, name), float)
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads {self.num_attention_heads}, num_key_value_heads {self.num_key_value_heads}"
            raise InputError(f"the key-value heads must divide the attention heads, but there are {heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even, to be rotated in pairs, not {self.head_dim}")
        if self.sliding_layers:
            _check_number("sliding_window", self.sliding_window, int)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        sliding = set(self.sliding_layers)
        return tuple(self.sliding_window if i in sliding else None for i in range(self.num_hidden_layers))

    def frequencies(self) -> np.ndarray:
        """The rotary frequencies `theta^(-2i / head_dim)`, scaled: `(head_dim / 2,)` in float32."""
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float32) / np.float32(self.head_dim)
        plain = (1 / np.float32(self.rope_theta) ** exponents).astype(np.float32)
        return plain if self.rope_scaling is None else self.rope_scaling.scale(plain).astype(np.float32)


_SIZES = tuple(f.name for f in dataclasses.fields(LlamaConfig) if f.type is int)


def _check_number(name: str, value: Any, kind: type) -> None:
    if isinstance(value, bool) or not isinstance(value, int | kind) or not 0 < value < float("inf"):
        raise InputError(f"{name} must be a positive {'whole number' if kind is int else 'number'}, not {value!r}")


def read_config(fields: Mapping[str, Any]) -> LlamaConfig:
    """The sizes from the fields of a `config.json`, in the spelling of any version of transformers.

    Raises:
      InputError: another architecture, a field that is missing or out of range, or one that asks for what the model can't do.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> config = read_config(dict(model_type="llama", rope_theta=5e5, **sizes))
    >>> config.num_key_value_heads, config.head_dim, config.rope_theta
    (2, 2, 500000.0)
    """
    model_type = fields.get("model_type")
    if model_type not in FAMILY:
        raise InputError(f"the model_type is {model_type!r}; this loader reads {', '.join(map(repr, FAMILY))}")
    _refuse(fields)
    heads, width = (_whole(fields, name) for name in ("num_attention_heads", "hidden_size"))
    bias = model_type == "qwen2" or _flag(fields, "attention_bias")
    theta, scaling = _rope(fields)
    window, sliding = _window(fields, model_type)
    return LlamaConfig(
        model_type=model_type,
        num_attention_heads=heads,
        hidden_size=width,
        num_key_value_heads=_whole(fields, "num_key_value_heads", 8 if model_type == "mistral" else heads) or heads,
        head_dim=_whole(fields, "head_dim", width // heads),
        max_position_embeddings=_whole(fields, "max_position_embeddings", 2048),
        **{name: _whole(fields, name) for name in ("vocab_size", "intermediate_size", "num_hidden_layers")},
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=bias,
        output_bias=bias and model_type == "llama",
        mlp_bias=model_type == "llama" and _flag(fields, "mlp_bias"),
        tie_word_embeddings=_flag(fields, "tie_word_embeddings"),
        sliding_window=window,
        sliding_layers=sliding,
        bos_token_id=next(iter(token_ids(fields, "bos_token_id")), None),
        eos_token_ids=token_ids(fields, "eos_token_id"),
        pad_token_id=next(iter(token_ids(fields, "pad_token_id")), None),
    )


def _refuse(fields: Mapping[str, Any]) -> None:
    """Options that change what the model computes and that this one does not have."""
    for name, only in {"hidden_act": "silu", "partial_rotary_factor": 1.0}.items():
        if fields.get(name, only) != only:
            raise InputError(f"{name} is {fields[name]!r}; only {only!r} can be read")


def _whole(fields: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = fields.get(name)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"it lacks {name}")
    _check_number(name, value, int)
    return value


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, not {value!r}")
    return value


def token_ids(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The token ids of a field that holds none, one or a list.

    Raises:
      InputError: it holds something else.
    """
    value = fields.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f"{name} must be a token id or a list of them, not {value!r}")
    return tuple(ids)


def _rope(fields: Mapping[str, Any]) -> tuple[float, Llama3Rope | LinearRope | None]:
    """The base and the scaling of the rotary frequencies.

    transformers 5 writes both in `rope_parameters`, older versions `rope_theta` and `rope_scaling`.
    """
    settings = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(settings, dict):
        raise InputError(f"rope_parameters must be an object, not {settings!r}")
    kind = settings.get("rope_type", settings.get("type", "default"))
    theta = settings.get("rope_theta", fields.get("rope_theta", 10000.0))
    _check_number("rope_theta", theta, float)
    if settings.get("partial_rotary_factor", 1.0) != 1.0 or any(isinstance(v, dict) for v in settings.values()):
        raise InputError(f"the rotary settings {settings!r} can't be read: every layer must rotate its whole heads alike")
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"the rope_type is {kind!r}; 'default', 'linear' and 'llama3' can be read")
    scaling: Any = {"linear": LinearRope, "llama3": Llama3Rope}.get(kind)
    if scaling is None:
        return theta, None
    known = {"original_max_position_embeddings": fields.get("max_position_embeddings"), **settings}
    values = {f.name: known.get(f.name) for f in dataclasses.fields(scaling)}
    for name, value in values.items():
        _check_number(f"the rope scaling's {name}", value, float)
    return theta, scaling(**values)


def _window(fields: Mapping[str, Any], model_type: str) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window, and which layers have one."""
    count = min(_whole(fields, "num_hidden_layers"), _MOST_LAYERS + 1)
    default = {"llama": None, "mistral": 4096, "qwen2": 4096}[model_type]
    window = fields.get("sliding_window", default)
    if model_type == "llama" or window is None or (model_type == "qwen2" and not _flag(fields, "use_sliding_window")):
        return None, ()
    _check_number("sliding_window", window, int)
    if model_type == "mistral":
        return window, tuple(range(count))
    kinds = fields.get("layer_types")
    if kinds is None:
        first = fields.get("max_window_layers", 28)
        if not isinstance(first, int) or first < 0:
            raise InputError(f"max_window_layers must be a whole number, not {first!r}")
        return window, tuple(range(first, count))
    if not isinstance(kinds, list) or len(kinds) != count or set(map(str, kinds)) - {"full_attention", "sliding_attention"}:
        raise InputError(f"layer_types must be 'full_attention' or 'sliding_attention' for each of the {count} layers")
    return window, tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")


def hf_config(config: LlamaConfig) -> dict[str, Any]:
    """The fields of a `config.json` that transformers, and `load`, read as this model.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> config = read_config(dict(model_type="mistral", sliding_window=3, num_key_value_heads=1, **sizes))
    >>> read_config(hf_config(config)) == config
    True
    """
    architecture = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    copied = (*_SIZES, "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "pad_token_id", "model_type")
    rope: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        kind = "linear" if isinstance(config.rope_scaling, LinearRope) else "llama3"
        rope["rope_scaling"] = {"rope_type": kind, "type": kind, **dataclasses.asdict(config.rope_scaling)}
    extra: dict[str, Any] = {}
    if config.model_type == "llama":
        extra = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    elif config.model_type == "mistral":
        extra = {"sliding_window": config.sliding_window}
    elif config.sliding_layers:
        kinds = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
        extra = {"use_sliding_window": True, "sliding_window": config.sliding_window, "layer_types": kinds}
    ids = config.eos_token_ids
    return {
        "architectures": [architecture[config.model_type]],
        **{name: getattr(config, name) for name in copied},
        "eos_token_id": None if not ids else ids[0] if len(ids) == 1 else list(ids),
        "hidden_act": "silu",
        **rope,
        **extra,
    }
