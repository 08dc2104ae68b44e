"""The parts of a vision encoder, and the families that are made of them: how `config.json` and checkpoints write each.

A family is a row of `FAMILIES`: the fields of its `config.json`, what parts they ask for, and what its tensors are called. To
add one whose parts are here, write a row and its tests; a part that is new is a field of `VisionConfig` and a few lines of
`lora_jax.models.vision`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.core.errors import InputError
from lora_jax.huggingface.names import listing

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The sizes and parts of a vision encoder with a classification head.

    Args:
      family: the name of its row in `FAMILIES`.
      image_size: (height, width) of the images that the position embeddings are for; `patch_size`: of a patch.
      layer_scales: whether what attention and MLP add is multiplied by a vector first.
      gated: whether the MLP is `down(silu(gate(x)) * up(x))`, and not `down(act(up(x)))`.
      patches_in_head: whether the head reads the class token and the mean of the patches, and not the class token alone.
      initializer_range: the deviation of a new head's kernel.

    Raises:
      InputError: sizes that are out of range or do not fit together; the message names the field of `config.json`.
    """

    family: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    intermediate_size: int
    image_size: Size
    patch_size: Size
    num_channels: int
    num_labels: int
    hidden_act: str
    layer_norm_eps: float
    initializer_range: float
    qkv_bias: bool
    layer_scales: bool = False
    gated: bool = False
    patches_in_head: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name), field.type)
        if 0 in self.grid:
            raise InputError(f"the patch_size {self.patch_size} is larger than the image_size {self.image_size}")

    @property
    def grid(self) -> Size:
        """The rows and columns of patches that have a position embedding each."""
        (height, width), (rows, columns) = self.image_size, self.patch_size
        return height // rows, width // columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A row of the table.

    Args:
      architecture: transformers' image classifier; `processor`: its image processor, where a checkpoint names none.
      prefix: of all tensors but the head's.
      layers: what stands before a layer's tensors; "#" is its number.
      modules: of a layer, what transformers calls our norms and layer scales.
      fields: those of `config.json` that are honoured beside the ones of all families, and what they are where left out.
      idle: fields that change nothing of the classifier's logits.
      parts: what the fields ask for, as arguments of `VisionConfig`.
      older: (in files, in transformers' memory) for each part of a name that differs, to be replaced in this order.
      joined: tensors of files that are two of the memory's, the first one's rows above the second's.
      written: fields that say that a checkpoint lacks what only pretraining needs.
    """

    architecture: str
    processor: str
    prefix: str
    layers: str
    modules: Mapping[str, str]
    fields: Mapping[str, Any]
    idle: frozenset[str]
    parts: Callable[[Mapping[str, Any]], dict[str, Any]]
    older: tuple[tuple[str, str], ...]
    joined: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    written: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _vit_parts(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"intermediate_size": fields["intermediate_size"]}


def _dinov2_parts(fields: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("hidden_size", "mlp_ratio"):
        _check(name, fields[name], float)
    gated, inner = fields["use_swiglu_ffn"], int(fields["hidden_size"] * fields["mlp_ratio"])
    _check("use_swiglu_ffn", gated, bool)
    if gated:  # two thirds, up to a multiple of 8
        inner = -(-int(inner * 2 / 3) // 8) * 8
    height, width = _pair("image_size", fields["image_size"])
    if height != width:
        raise InputError(f"image_size must be square, as the position embeddings of DINOv2 are, not {height} x {width}")
    return {"intermediate_size": inner, "gated": gated, "layer_scales": True, "patches_in_head": True}


_OLDER_ATTENTION = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)
FAMILIES = {
    "vit": Family(
        architecture="ViTForImageClassification",
        processor="ViTImageProcessor",
        prefix="vit.",
        layers="layers.#.",
        modules={"norm_before": "layernorm_before", "norm_after": "layernorm_after"},
        fields={"intermediate_size": 3072, "layer_norm_eps": 1e-12, "patch_size": 16},
        idle=frozenset({"encoder_stride", "pooler_act", "pooler_output_size"}),
        parts=_vit_parts,
        older=(
            ("encoder.layer.", "layers."),
            *_OLDER_ATTENTION,
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ),
    ),
    "dinov2": Family(
        architecture="Dinov2ForImageClassification",
        processor="BitImageProcessor",
        prefix="dinov2.",
        layers="encoder.layer.#.",
        modules={
            "norm_before": "norm1",
            "norm_after": "norm2",
            "scale_attention": "layer_scale1.lambda1",
            "scale_mlp": "layer_scale2.lambda1",
        },
        fields={"mlp_ratio": 4, "use_swiglu_ffn": False, "layer_norm_eps": 1e-6, "patch_size": 14},
        idle=frozenset(
            {"layerscale_value", "use_mask_token", "drop_path_rate"}  # the start and the noise of pretraining
            | {"out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states"}  # of backbones
        ),
        parts=_dinov2_parts,
        older=(*_OLDER_ATTENTION, ("mlp.weights_out", "mlp.down_proj")),
        joined={"mlp.weights_in": ("mlp.gate_proj", "mlp.up_proj")},
        written={"use_mask_token": False},
    ),
}
_FIELDS: Mapping[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "num_channels": 3,
    "hidden_act": "gelu",
    "initializer_range": 0.02,
    "qkv_bias": True,
    "head_dim": None,
    "num_labels": 2,
    "id2label": None,
}
_ONLY = {"is_decoder": False, "is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {}}
_IDLE = frozenset(
    {"model_type", "architectures", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "label2id"}
    | {"dtype", "torch_dtype", "torchscript", "use_bfloat16", "gradient_checkpointing", "attn_implementation"}  # ways, not what
    | {
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "use_cache",
        "chunk_size_feed_forward",
        "tie_word_embeddings",
        "quantization_config",
    }
    | {"hidden_dropout_prob", "attention_probs_dropout_prob", "problem_type", "finetuning_task"}  # of transformers' training
)


def read_config(fields: Mapping[str, Any], num_labels: int | None = None) -> VisionConfig:
    """The sizes and parts from the fields of a `config.json`; a field that is left out is what transformers has for it.

    Args:
      fields: of the file.
      num_labels: the number of classes; `None`: as many as the fields say.

    Raises:
      InputError: another architecture, a field that is out of range, or one that is not known and may change the logits.

    >>> read_config({"model_type": "dinov2", "use_swiglu_ffn": True}).intermediate_size
    2048
    """
    family = FAMILIES.get(str(fields.get("model_type")))
    if family is None:
        known = ", ".join(map(repr, FAMILIES))
        raise InputError(f"the model_type is {fields.get('model_type')!r}; this loader reads {known}")
    for name, only in _ONLY.items():
        if fields.get(name, only) != only:
            raise InputError(f"{name} is {fields[name]!r}; only {only!r} can be read")
    defaults = {**_FIELDS, **family.fields}
    unknown = set(fields) - set(defaults) - set(_ONLY) - _IDLE - family.idle
    if unknown:
        raise InputError(f"the fields {listing(sorted(unknown))} are not known here and may change what the model computes")
    values = {**defaults, **{name: fields[name] for name in defaults if name in fields}}
    labels, stored = values.pop("id2label"), values.pop("num_labels")
    if not isinstance(labels, dict | None):
        raise InputError(f"id2label must be an object of names by index, not {labels!r:.80}")
    values["num_labels"] = (len(labels) if labels else stored) if num_labels is None else num_labels
    parts = family.parts(values)
    for name in ("image_size", "patch_size"):
        values[name] = _pair(name, values[name])
    if values["head_dim"] is None:
        for name in ("hidden_size", "num_attention_heads"):
            _check(name, values[name], int)
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    kept = {f.name: values[f.name] for f in dataclasses.fields(VisionConfig) if f.name in values}
    return VisionConfig(**{"family": fields["model_type"], **kept, **parts})


def _pair(name: str, value: Any) -> Size:
    """A height and a width, which may be written as one number."""
    pair = tuple(value) if isinstance(value, list) else (value, value)
    _check(name, pair, Size)
    return pair  # type: ignore[return-value]  the check has seen that it is one


def _check(name: str, value: Any, kind: Any) -> None:
    """Raise an InputError unless a value is of a field's kind; numbers are above zero."""
    words = {int: "a positive whole number", float: "a positive number", bool: "true or false", str: "a text"}
    words[Size] = "a positive whole number or two of them"
    numbers = value if kind == Size and isinstance(value, tuple) and len(value) == 2 else (value,)
    if kind in (bool, str):
        right = isinstance(value, kind)
    else:
        allowed = int | float if kind is float else int
        right = all(isinstance(n, allowed) and not isinstance(n, bool) and 0 < n < float("inf") for n in numbers)
    if not right:
        raise InputError(f"{name} must be {words[kind]}, not {value!r:.80}")
