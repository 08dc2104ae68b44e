"""`LoraConfig`: what to adapt and how, validated when it is made."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from lora_jax.adapters.words import WORDS
from lora_jax.core import paths
from lora_jax.core.adapter import Layout
from lora_jax.core.errors import InputError
from lora_jax.core.files import parse_json

FORMAT_VERSION = 3
SINCE: dict[int, tuple[str, ...]] = {  # which fields a version was the first to have
    2: ("method", "dora", "lora_bias", "d_initial", "trainable_token_indices", "alora_invocation_tokens"),
    3: ("layouts", "branch_dtype"),
}
Pattern = Any  # a string or a compiled regular expression; a string once the configuration is made


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    r"""Which parameters get a low-rank pair, of which rank and scale.

    An adapted kernel W acts as `W + s A B`, with `s = alpha / rank` (LoRA, https://arxiv.org/abs/2106.09685) or
    `s = alpha / sqrt(rank)` (rsLoRA, https://arxiv.org/abs/2312.03732).

    A *pattern* is one or more whole path components that end the path, with or without the parameter's own name (`query`,
    `attn/query` and `query/kernel` all match `params/layer_0/attn/query/kernel`), or a regular expression for the whole path,
    given as `re.compile(...)` or as a string that starts with `re:`. Every pattern must match something.

    Args:
      rank: r, the inner size of each pair; at most the smaller side of the kernel. Where a word finds a kernel with a smaller
        side, its pair has that rank (and VeRA's, which is one for all, leaves it out).
      alpha: the numerator of the scale.
      targets: patterns, or one word: `"all-linear"` (every kernel that `fn` uses in products only; never an embedding) or
        `"attention"` (those of them below a module whose name contains `attn` or `attention`). Words look at parameters only:
        below `params` where a tree has it beside other collections, and at `nnx.Param`s. What they pass over is logged, and
        is in `explain(...).passed_over` with the reasons.
      exclude: patterns of parameters that get no pair, whatever `targets` says.
      rank_pattern: `{pattern: rank}`; the first match wins over `rank`.
      alpha_pattern: `{pattern: alpha}`; the first match wins over `alpha`.
      layers: layer indices to adapt, in unrolled models (`layer_3/...`) and inside scan-stacked kernels alike.
      scaling: `"lora"` (alpha / r) or `"rslora"` (alpha / sqrt r).
      dropout: the rate on the input of the low-rank branch, used where `lora(fn, key=...)` gets a key.
      init: `"kaiming"` (A uniform in +-1/sqrt(fan_in), B zero; as PEFT), `"gaussian"` (A of std 1/r, B zero) or
        `"orthogonal"` (neither zero, but A B = 0; all ranks even). An embedding has A zero and B N(0, 1) always, as in PEFT.
        Starts that change the base or look at data are in `lora_jax.initializers`.
      dtype: the dtype of the adapters, whatever the kernel's.
      branch_dtype: what the branches `s (x A) B` are computed in; a wider one than the input's is added to `x W` before
        that is rounded. `None`: the input's. On a bfloat16 base `"float32"` does as PEFT, whose branches have the dtype of
        its adapters. Looked-up rows are added up in float32 whatever this says.
      batch_axes: `{pattern: axes}`: axes of a kernel that hold separate matrices (experts in a dense einsum, say) where the
        use alone would read them otherwise.
      layouts: `{pattern: Layout}` of kernels whose use does not tell it: those that only a function with a derivative rule of
        its own takes, say, and that `init(..., on_unsupported="materialize")` adapts.
      train: patterns of parameters that are trained whole (heads, norms, biases).
      method: `"lora"`; `"lora_fa"`: A is never trained (LoRA-FA, https://arxiv.org/abs/2308.03303; its optimiser is
        `lj.optim.lora_fa`); or `"vera"`: random A and B that all kernels share are never trained, only a scale for each inner
        and each outer number (VeRA, https://arxiv.org/abs/2310.11454; it has no alpha).
      dora: train a magnitude for each output, too (DoRA, https://arxiv.org/abs/2402.09353).
      lora_bias: train a bias beside B, too. `merge` adds it to the parameter `bias` beside the kernel.
      d_initial: where VeRA's inner scales start; its outer ones start at 0.
      trainable_token_indices: `{pattern: indices}`: of these embeddings the rows with these indices are trained.
      alora_invocation_tokens: the adapters act from this sequence of tokens on (aLoRA, https://arxiv.org/abs/2504.12397):
        `lora(fn, active=active_from(input_ids, tokens))`.

    Raises:
      InputError: an option is out of range or of the wrong type; the message names it.

    >>> LoraConfig(rank=8, alpha=16, targets=["query", "value"]).scale(8, 16)
    2.0
    >>> config = LoraConfig(rank=4, targets="all-linear", rank_pattern={"mlp/up": 8}, train=["classifier"])
    >>> LoraConfig.from_json(config.to_json()) == config
    True
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[Pattern] | Literal["all-linear", "attention"] = "all-linear"
    exclude: Sequence[Pattern] = ()
    rank_pattern: Mapping[Pattern, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[Pattern, float] = dataclasses.field(default_factory=dict)
    layers: Sequence[int] | None = None
    scaling: Literal["lora", "rslora"] = "lora"
    dropout: float = 0.0
    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"
    dtype: Any = "float32"
    branch_dtype: Any = None
    batch_axes: Mapping[Pattern, Sequence[int]] = dataclasses.field(default_factory=dict)
    layouts: Mapping[Pattern, Layout] = dataclasses.field(default_factory=dict)
    train: Sequence[Pattern] = ()
    method: Literal["lora", "lora_fa", "vera"] = "lora"
    dora: bool = False
    lora_bias: bool = False
    d_initial: float = 0.1
    trainable_token_indices: Mapping[Pattern, Sequence[int]] = dataclasses.field(default_factory=dict)
    alora_invocation_tokens: Sequence[int] | None = None

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)
        put("rank", _rank("rank", self.rank))
        put("alpha", _alpha("alpha", self.alpha))
        put("targets", _targets(self.targets))
        for name in ("exclude", "train"):
            put(name, _patterns(name, getattr(self, name)))
        tables = {
            "rank_pattern": _rank, "alpha_pattern": _alpha, "batch_axes": _indices, "layouts": _layout,
            "trainable_token_indices": _rows,
        }  # fmt: skip
        for name, check in tables.items():
            put(name, _pattern_table(name, getattr(self, name), check))
        put("layers", None if self.layers is None else _layers(self.layers))
        _choice("scaling", self.scaling, ("lora", "rslora"))
        _choice("init", self.init, ("kaiming", "gaussian", "orthogonal"))
        put("dropout", _number("dropout", self.dropout))
        if not 0.0 <= self.dropout < 1.0:
            raise InputError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        put("dtype", _float_dtype("dtype", self.dtype))
        put("branch_dtype", None if self.branch_dtype is None else _float_dtype("branch_dtype", self.branch_dtype))
        put("alora_invocation_tokens", _invocation(self.alora_invocation_tokens))
        put("d_initial", _number("d_initial", self.d_initial))
        if not 0 < abs(self.d_initial) < float("inf"):
            raise InputError(f"d_initial must be finite and not zero, or nothing would be trained, not {self.d_initial!r}")
        _choice("method", self.method, ("lora", "lora_fa", "vera"))
        for name in ("dora", "lora_bias"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if not self.targets and not self.train and not self.trainable_token_indices:
            raise InputError(
                "targets, train and trainable_token_indices are all empty, so nothing would be trained: name a pattern in one"
            )
        self._refuse_combinations()

    def _refuse_combinations(self) -> None:
        """Raise for options that can't work together, or that the method would not use."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}

        def changed(*names: str) -> list[str]:
            return [name for name in names if getattr(self, name) not in (defaults[name], {})]

        idle = (
            [] if self.targets else changed("method", "dora", "lora_bias", "dropout", "branch_dtype", "alora_invocation_tokens")
        )
        if idle:
            raise InputError(f"{', '.join(idle)} is for low-rank pairs, but targets is empty: leave it out, or name targets")
        if self.method == "vera":
            unused = changed("alpha", "alpha_pattern", "scaling", "init", "rank_pattern")
            if unused:
                raise InputError(
                    f"method='vera' has no use for {', '.join(unused)}: its matrices are shared, of one rank, of a start of "
                    "their own, and have no scale. Leave the option out"
                )
            if changed("dora", "lora_bias"):
                raise InputError("method='vera' trains a scale for each output already: leave dora and lora_bias out")
        elif changed("d_initial"):
            raise InputError(f"d_initial is for method='vera' only, not for {self.method!r}")
        odd = [rank for rank in (self.rank, *self.rank_pattern.values()) if rank % 2]
        if self.init == "orthogonal" and odd:
            raise InputError(f"init='orthogonal' shares each rank out over two halves, so it must be even, not {odd[0]}")
        if self.method == "lora_fa" and self.init == "orthogonal":
            raise InputError("method='lora_fa' needs an init with B zero: use 'kaiming' or 'gaussian'")

    def __hash__(self):
        return hash(self.to_json())

    def scale(self, rank: int, alpha: float) -> float:
        """The factor s of the low-rank term: alpha / rank or alpha / sqrt(rank).

        Args:
          rank: of a pair.
          alpha: of the same.
        """
        return float(alpha / (rank if self.scaling == "lora" else rank**0.5))

    def to_json(self) -> str:
        """The configuration as JSON text with a format version; the fields of the newest are in it where they are used."""
        newest = SINCE[FORMAT_VERSION]
        idle = [name for name in newest if getattr(self, name) in (None, {})]
        version = FORMAT_VERSION if len(idle) < len(newest) else FORMAT_VERSION - 1
        used = {name: value for name, value in dataclasses.asdict(self).items() if name not in idle}
        return json.dumps({"format_version": version, **used}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "LoraConfig":
        """Read what `to_json` wrote, of this version or an older one.

        Args:
          text: JSON.

        Raises:
          InputError: the text is not JSON, has another format version, or a field that is unknown, missing or invalid.
        """
        fields = parse_json(text, "the LoRA configuration")
        if not isinstance(fields, dict):
            raise InputError(f"the LoRA configuration must be a JSON object, not {type(fields).__name__}")
        version = fields.pop("format_version", None)
        if version not in (1, *SINCE):
            raise InputError(
                f"the LoRA configuration has format version {version!r}; this lora_jax reads 1 to {FORMAT_VERSION}"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        known, needed = (names - _since(after) for after in (version, min(version, FORMAT_VERSION - 1)))
        for problem, names in (("unknown", set(fields) - known), ("missing", needed - set(fields))):
            if names:
                raise InputError(f"the LoRA configuration has {problem} fields: {', '.join(sorted(names))}")
        return cls(**fields)


def _since(version: int) -> set[str]:
    """The fields that a version did not have."""
    return {name for since, names in SINCE.items() if since > version for name in names}


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{name} must be a number, not {value!r}")
    return float(value)


def _rank(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
    return value


def _alpha(name: str, value: Any) -> float:
    if not 0 < _number(name, value) < float("inf"):
        raise InputError(f"{name} must be positive and finite, not {value!r}")
    return float(value)


def _indices(name: str, value: Any) -> list[int]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InputError(f"{name} must be a list of whole numbers, not {value!r}")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int):
            raise InputError(f"{name} must be a list of whole numbers, not {value!r}")
    if len(set(value)) != len(value):
        raise InputError(f"{name} names an index twice: {value!r}")
    return list(value)


def _layout(name: str, value: Any) -> Layout:
    axes = value if isinstance(value, Mapping) else dataclasses.asdict(value) if isinstance(value, Layout) else {}
    if set(axes) != {"batch", "inputs", "outputs"}:
        raise InputError(f"{name} must be a Layout(batch=(...), inputs=(...), outputs=(...)), not {value!r}")
    return Layout(**{role: tuple(_indices(f"{name}.{role}", numbers)) for role, numbers in axes.items()})


def _rows(name: str, value: Any) -> list[int]:
    rows = _indices(name, value)
    if not rows or min(rows) < 0:
        raise InputError(f"{name} must be a non-empty list of indices of at least 0, not {value!r}")
    return rows


def _invocation(value: Any) -> list[int] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise InputError(f"alora_invocation_tokens must be a non-empty list of token ids, not {value!r}")
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in value):
        raise InputError(f"alora_invocation_tokens must be whole numbers of at least 0, not {value!r}")
    return list(value)


def _layers(value: Any) -> list[int]:
    layers = _indices("layers", value)
    if not layers or min(layers) < 0:
        raise InputError(f"layers must be a non-empty list of indices of at least 0, not {value!r}")
    return sorted(layers)


def _patterns(name: str, value: Any) -> list[str]:
    if isinstance(value, str | re.Pattern) or not isinstance(value, Sequence):
        raise InputError(f"{name} must be a list of patterns, not {value!r}; write [{value!r}]")
    return [paths.normalize(pattern) for pattern in value]


def _targets(value: Any) -> Any:
    if isinstance(value, str):
        if value not in WORDS:
            raise InputError(f"targets must be a list of patterns or one of {', '.join(map(repr, WORDS))}, not {value!r}; "
                             f"write [{value!r}] for one pattern")  # fmt: skip
        return value
    return _patterns("targets", value)


def _pattern_table(name: str, value: Any, check: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{name} must be a dict from pattern to value, not {value!r}")
    return {paths.normalize(pattern): check(f"{name}[{pattern!r}]", item) for pattern, item in value.items()}


def _float_dtype(name: str, value: Any) -> str:
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise InputError(f"{name} must name a floating-point dtype, not {value!r}") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"{name} must be a floating-point dtype, not {dtype.name}")
    return dtype.name
