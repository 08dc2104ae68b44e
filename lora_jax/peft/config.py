"""`adapter_config.json`: what PEFT's LoRA configuration says about each module, by PEFT's own rules.

The rules are those of PEFT 0.21 (`peft.tuners.tuners_utils.check_target_module_exists`, `peft.utils.other.get_pattern_key`).
Files come from anywhere, so every field is checked, and a regular expression that takes too long is refused.
"""

import dataclasses
import functools
import math
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import regex

from lora_jax.core.errors import InputError
from lora_jax.huggingface.names import listing

CHANGED_BASE = ("pissa", "olora")  # the change can be made again
PLAIN = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
# Fields that say nothing about what the adapter computes, or that matter while it is made or trained only.
NO_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode", "loftq_config",
    "lora_ga_config", "megatron_config", "megatron_core", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip

_LONGEST = 20_000
_FUZZY = re.compile(r"\{[0-9,]*[a-z<]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The fields of a PEFT LoRA configuration that decide what an adapter computes.

    Raises:
      InputError: a field has a value that PEFT would not take.
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    lora_dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    bias: str = "none"
    lora_bias: bool = False
    use_dora: bool = False
    ensure_weight_tying: bool = False
    alora_invocation_tokens: Sequence[int] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    init_lora_weights: bool | str | None = True
    peft_version: str | None = None
    _match: Any = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "_match", _Matcher())
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, getattr(self, name) or {})
        for names, fits, what in _TYPES:
            for name in names:
                value = getattr(self, name)
                if not fits(value):
                    raise InputError(f"{name} must be {what}, not {value!r:.80}")
        if self.invocation and self.use_dora:
            raise InputError("alora_invocation_tokens: PEFT has no aLoRA with use_dora")

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], source: Any) -> "Settings":
        """The configuration in a file's fields.

        Raises:
          InputError: another `peft_type`, a field that is unknown and not empty, or a bad value; the message names the source.
        """
        fields = dict(fields)
        kind = fields.pop("peft_type", None)
        if kind != "LORA":
            raise InputError(f"{source}: the peft_type is {kind!r}; only 'LORA' and 'VERA' can be read")
        known = {field.name for field in dataclasses.fields(cls) if field.init}
        check_known(fields, known | NO_EFFECT, source)
        try:
            settings = cls(**{name: value for name, value in fields.items() if name in known})
            settings.check_init()
        except ValueError as error:
            raise InputError(f"{source}: {error}") from None
        return settings

    @property
    def replays(self) -> str:
        """The initialiser whose change of the base has to be made again; empty if there is none."""
        init = str(self.init_lora_weights).lower()
        return init if init in CHANGED_BASE else ""

    def check_init(self) -> None:
        """Raise an InputError if the adapter belongs to a base that was changed in a way that can't be made again."""
        if str(self.init_lora_weights).lower() not in (*PLAIN, *CHANGED_BASE):
            raise InputError(
                f"init_lora_weights is {self.init_lora_weights!r:.80}: the adapter belongs to base weights that this "
                "initialiser changed by chance or by data, so it would be wrong on the original ones. Convert it in PEFT: "
                "model.save_pretrained(directory, path_initial_model_for_weight_conversion=<the adapter as first saved>)"
            )

    @property
    def invocation(self) -> tuple[int, ...] | None:
        """The tokens from which on the adapter acts; `None` if it always does."""
        return tuple(self.alora_invocation_tokens or ()) or None

    def rows(self, module: str) -> tuple[int, ...] | None:
        """The rows of a table that are trained; PEFT matches by the ends of names. A list is for the input embedding."""
        indices = self.trainable_token_indices
        if isinstance(indices, Mapping):
            indices = next((listed for name, listed in indices.items() if module.endswith(name)), None)
        return None if indices is None else tuple(indices)

    def rank(self, name: str) -> int:
        """r of a module, by its full name."""
        return self._by_pattern("rank_pattern", name, self.r)

    def scale(self, name: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA, of a module."""
        alpha, rank = self._by_pattern("alpha_pattern", name, self.lora_alpha), self.rank(name)
        return float(alpha / (math.sqrt(rank) if self.use_rslora else rank))

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names the module or one around it; PEFT matches by the ends of names."""
        parts = module.split(".")
        around = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(name.endswith(tuple(self.modules_to_save or ())) for name in around)

    def targets(self, module: str) -> bool:
        """Whether the module gets a pair by `target_modules`."""
        if self._excluded(module):
            return False
        targets = self.target_modules
        if targets is None:
            return False
        if isinstance(targets, str):
            return bool(self._match(targets, module, "target_modules"))
        if module in targets:
            return True
        return _ends(module, targets) and self._in_layers(module)

    def targets_parameter(self, parameter: str) -> bool:
        """Whether a parameter gets a pair by `target_parameters`."""
        return _ends(parameter, self.target_parameters or ())

    def _by_pattern(self, field: str, name: str, default: Any) -> Any:
        """The value of the first key that matches, as PEFT's `get_pattern_key`."""
        table = getattr(self, field)
        found = (value for key, value in table.items() if self._match(rf"(.*\.)?({key})$", name, field, whole=False))
        return next(found, default)

    def _excluded(self, module: str) -> bool:
        exclude = self.exclude_modules
        if exclude and (
            self._match(exclude, module, "exclude_modules") if isinstance(exclude, str) else _ends(module, exclude)
        ):
            return True
        saved = self.modules_to_save or ()
        return any(self._match(rf"(^|.*\.){name}($|\..*)", module, "modules_to_save", whole=False) for name in saved)

    def _in_layers(self, module: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns or () if pattern]
        for expression in expressions or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            found = self._match(expression, module, "layers_pattern", whole=False)
            if found:
                return int(found["idx"]) in ([layers] if isinstance(layers, int) else layers)
        return False


def check_known(fields: Mapping[str, Any], known: Collection[str], source: Any) -> None:
    """Raise an InputError if a field that is not known says something."""
    odd = [f"{name}={value!r:.80}" for name, value in fields.items() if name not in known and not _is_empty(value)]
    if odd:
        raise InputError(
            f"{source} sets fields that are not supported, so the adapter could mean something else: {listing(odd)}"
        )


class _Matcher:
    """Regular expressions of one file, which may take four seconds together.

    >>> _Matcher()(r".*\\.[02]\\.q_proj", "layers.2.q_proj", "target_modules").group()
    'layers.2.q_proj'
    """

    def __init__(self):
        self._left = 4.0

    def __call__(self, pattern: str, name: str, field: str, *, whole: bool = True) -> Any:
        """The match of a field's pattern with a name, or with its beginning.

        Raises:
          InputError: it is not a regular expression, or takes too long.
        """
        began = time.monotonic()
        try:
            if self._left <= 0:
                raise TimeoutError
            compiled = _compiled(pattern, field)
            return (compiled.fullmatch if whole else compiled.match)(name, timeout=max(self._left, 1e-3))
        except TimeoutError:
            raise InputError(f"{field}: the regular expressions take too long, at {pattern!r:.80} on {name!r:.80}") from None
        finally:
            self._left -= time.monotonic() - began


@functools.lru_cache(maxsize=1 << 15)
def _compiled(pattern: str, field: str) -> Any:
    if len(pattern) > _LONGEST:
        raise InputError(f"{field}: a regular expression of {len(pattern)} characters is too long: list the modules instead")
    try:
        re.compile(pattern)  # PEFT uses this module, and the other one has more syntax
        if _FUZZY.search(pattern):
            raise regex.error("its braces have another meaning here")
        return regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise InputError(f"{field}: {pattern!r:.80} is not a regular expression ({error})") from None


def _ends(name: str, targets: Sequence[str]) -> bool:
    return name in targets or name.endswith(tuple(f".{target}" for target in targets))


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_table(is_item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(is_item, value.values()))


def _is_list(kind: type) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, list) and all(isinstance(item, kind) for item in value))


def _is_one_or_list(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind) or _is_list(kind)(value)


def _is_indices(value: Any) -> bool:
    """Whether a value is a list of different whole numbers of at least 0."""
    whole = isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
    return whole and bool(value) and len(set(value)) == len(value)


def _is_rows(value: Any) -> bool:
    return value is None or _is_indices(value) or _is_table(_is_indices)(value)


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


_TYPES: list[tuple[tuple[str, ...], Callable[[Any], bool], str]] = [
    (("r",), _is_rank, "a whole number of at least 1"),
    (("lora_alpha",), _is_number, "a number"),
    (("lora_dropout",), lambda value: _is_number(value) and 0 <= value < 1, "a number of at least 0 and below 1"),
    (("rank_pattern",), _is_table(_is_rank), "an object of whole numbers of at least 1"),
    (("alpha_pattern",), _is_table(_is_number), "an object of numbers"),
    (("target_modules", "exclude_modules", "layers_pattern"), _is_one_or_list(str), "a string or a list of strings"),
    (("layers_to_transform",), _is_one_or_list(int), "a whole number or a list of them"),
    (("modules_to_save", "target_parameters"), _is_list(str), "a list of strings"),
    (
        ("use_rslora", "lora_bias", "use_dora", "ensure_weight_tying"),
        lambda value: isinstance(value, bool),
        "true or false",
    ),
    (("peft_version",), lambda value: value is None or isinstance(value, str), "a string"),
    (("alora_invocation_tokens",), _is_list(int), "a list of whole numbers"),
    (("trainable_token_indices",), _is_rows, "a list of different whole numbers of at least 0, or an object of such lists"),
    (("bias",), lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
]
