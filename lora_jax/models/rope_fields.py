"""The rotary settings of a `config.json`, in the spelling of any version of transformers.

transformers 5 writes base and scaling in `rope_parameters`, older versions `rope_theta` and `rope_scaling`; models whose
sliding layers rotate otherwise have settings for each kind of layer.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lora_jax.core.errors import InputError
from lora_jax.models.config_fields import Fields
from lora_jax.models.decoder_config import check_number
from lora_jax.models.rotary import DynamicRope, LinearRope, Llama3Rope, LongRope, Rope, Scaling, YarnRope

_KINDS: dict[str, type[Scaling] | None] = {
    "default": None, "linear": LinearRope, "llama3": Llama3Rope, "yarn": YarnRope, "dynamic": DynamicRope, "longrope": LongRope,
    "su": LongRope,
}  # fmt: skip
_OF_ALL = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_rope(fields: Fields, head_dim: int, partial: bool) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `rotary_dim` of a decoder whose layers all rotate alike.

    Args:
      fields: those of the file.
      head_dim: the size of a head.
      partial: whether a part of it may be rotated alone.

    Raises:
      InputError: settings that are out of range or not known.
    """
    settings = _settings(fields)
    if any(isinstance(value, dict) for value in settings.values()):
        raise InputError(f"the rotary settings {settings!r} can't be read: every layer of this family must rotate alike")
    rope = _rope(settings, fields, _theta(fields))
    part = settings.get("partial_rotary_factor", _partial(fields))
    check_number("partial_rotary_factor", part, float)
    if part != 1 and not partial:
        raise InputError(f"partial_rotary_factor is {part}; this family rotates whole heads")
    rotated = int(head_dim * part)
    return {"rope_theta": rope.theta, "rope_scaling": rope.scaling, "rotary_dim": None if part == 1 else rotated}


def read_ropes(fields: Fields, theta: float, sliding_theta: float | None = None) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `sliding_rope` of a decoder whose sliding layers have settings of their own.

    Args:
      fields: those of the file.
      theta: the base where the file has none.
      sliding_theta: that of sliding layers; `None`: as in the others.

    Raises:
      InputError: settings that are out of range or not known.
    """
    theta, settings = fields.number("rope_theta", theta), _settings(fields)
    if not any(isinstance(value, dict) for value in settings.values()):
        settings = {"full_attention": settings}
    if odd := set(settings) - {"full_attention", "sliding_attention"}:
        raise InputError(f"rope_parameters has settings for {', '.join(sorted(odd))}; sliding and full attention can be read")
    if any((own or {}).get("partial_rotary_factor", 1) != 1 for own in settings.values()):
        raise InputError("partial_rotary_factor is not 1; this family rotates whole heads")
    full = _rope(settings.get("full_attention") or {}, fields, theta)
    sliding = _rope(settings.get("sliding_attention") or {}, fields, sliding_theta or theta)
    return {"rope_theta": full.theta, "rope_scaling": full.scaling, "sliding_rope": None if sliding == full else sliding}


def _settings(fields: Fields) -> dict[str, Any]:
    scaling, settings = fields.get("rope_scaling"), fields.get("rope_parameters")
    settings = scaling or settings or {}
    if not isinstance(settings, dict):
        raise InputError(f"rope_parameters must be an object, not {settings!r}")
    return settings


def _theta(fields: Fields) -> float:
    return fields.number("rotary_emb_base", fields.number("rope_theta", 10000.0))


def _partial(fields: Fields) -> float:
    return fields.number("rotary_pct", fields.number("partial_rotary_factor", 1.0))


def _rope(settings: Mapping[str, Any], fields: Fields, theta: float) -> Rope:
    theta = settings.get("rope_theta", theta)
    check_number("rope_theta", theta, float)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in _KINDS:
        raise InputError(f"the rope_type is {kind!r}; {', '.join(map(repr, _KINDS))} can be read")
    made = _KINDS[kind]
    names = set() if made is None else {f.name for f in dataclasses.fields(made)}
    extra = {"mscale", "mscale_all_dim"} if made is YarnRope else {"factor"} if made is LongRope else set()
    spare = {"original_max_position_embeddings"} if made is not None else set()
    if odd := {name for name, value in settings.items() if value is not None} - names - extra - spare - _OF_ALL:
        raise InputError(f"the rotary settings of the type {kind!r} have {', '.join(sorted(odd))}, which can't be read")
    return Rope(theta, None if made is None else _scaling(made, settings, fields))


def _scaling(made: type[Scaling], settings: Mapping[str, Any], fields: Fields) -> Scaling:
    original = _original(made, settings, fields)
    known = {**settings, "original_max_position_embeddings": original}
    values: dict[str, Any] = {
        field.name: _value(field, known.get(field.name))
        for field in dataclasses.fields(made)
        if known.get(field.name) is not None or field.default is dataclasses.MISSING
    }
    if made is YarnRope:
        values.setdefault("attention_factor", _yarn_factor(settings, values["factor"]))
    if made is LongRope:
        stretch = settings.get("factor") or fields.whole("max_position_embeddings") / original
        factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        values.setdefault("attention_factor", factor)
    return made(**values)


def _original(made: type[Scaling], settings: Mapping[str, Any], fields: Fields) -> Any:
    """The length of pretraining, which may be written beside the rotary settings; else the longest."""
    name = "original_max_position_embeddings"
    own, beside = settings.get(name), fields.maybe_whole(name)
    if own and beside and own != beside:
        raise InputError(f"{name} is {beside}, but {own} in the rotary settings: correct the one that is wrong")
    if made is DynamicRope or (made is not LinearRope and not (own or beside)):
        return fields.whole("max_position_embeddings")
    return own or beside


def _value(field: dataclasses.Field[Any], value: Any) -> Any:
    if field.type == tuple[float, ...]:
        if not isinstance(value, list) or not all(isinstance(x, int | float) for x in value):
            raise InputError(f"the rope scaling's {field.name} must be a list of numbers, not {value!r}")
        return tuple(value)
    if field.type is bool:
        if not isinstance(value, bool):
            raise InputError(f"the rope scaling's {field.name} must be true or false, not {value!r}")
        return value
    check_number(f"the rope scaling's {field.name}", value, float)
    return value


def _yarn_factor(settings: Mapping[str, Any], stretch: float) -> float:
    """What YaRN multiplies cosines and sines by, as DeepSeek's models set it where they do."""

    def of(scale: float) -> float:
        return 0.1 * scale * math.log(stretch) + 1.0 if stretch > 1 else 1.0

    scale, whole = settings.get("mscale"), settings.get("mscale_all_dim")
    return of(scale) / of(whole) if scale and whole else of(1.0)
