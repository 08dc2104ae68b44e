"""The parts of a vision encoder, and the families that are made of them: how `config.json` and checkpoints write each.

A family is a row of `FAMILIES`: the fields of its `config.json`, what parts they ask for, and what its tensors are called. To
add one whose parts are here, write a row and its tests; a part that is new is a field of `VisionConfig` and a few lines of
`lora_jax.models.vision`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.core.errors import InputError
from lora_jax.models.activations import FUNCTIONS
from lora_jax.models.config_fields import Fields
from lora_jax.models.decoder_config import check_number

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The sizes and parts of a vision encoder with a classification head.

    Args:
      family: the name of its row in `FAMILIES`.
      hidden_size, num_hidden_layers, num_attention_heads, head_dim, intermediate_size: as in `config.json`.
      image_size: (height, width) of the images that the position embeddings are for.
      patch_size: (height, width) of a patch.
      num_channels: of the images, 3 for colours.
      num_labels: the outputs of the head.
      hidden_act: what stands between the MLP's layers, one of `activations.FUNCTIONS`.
      layer_norm_eps: what is added under the root of each norm.
      initializer_range: the deviation of a new head's kernel.
      qkv_bias: whether the query, key and value projections have biases.
      layer_scales: whether what attention and MLP add is multiplied by a vector first.
      gated: whether the MLP is `down(silu(gate(x)) * up(x))`, and not `down(act(up(x)))`.
      patches_in_head: whether the head reads the class token and the mean of the patches, and not the class token alone.

    Raises:
      InputError: sizes that are out of range or do not fit together; the message names the field of `config.json`.

    >>> read_config({"model_type": "vit", "image_size": 32, "patch_size": 8}).grid
    (4, 4)
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
            if field.type in (int, float):
                check_number(field.name, getattr(self, field.name), field.type)
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
      defaults: what fields of `config.json` are where it lacks them.
      ignored: fields that change nothing of the classifier's logits.
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
    defaults: Mapping[str, Any]
    ignored: tuple[str, ...]
    parts: Callable[[Fields], dict[str, Any]]
    older: tuple[tuple[str, str], ...]
    joined: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    written: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _dinov2_parts(fields: Fields) -> dict[str, Any]:
    inner = int(fields.whole("hidden_size") * fields.number("mlp_ratio"))
    gated = fields.flag("use_swiglu_ffn")
    if gated:  # two thirds, up to a multiple of 8
        inner = -(-int(inner * 2 / 3) // 8) * 8
    height, width = _pair(fields, "image_size")
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
        defaults={"intermediate_size": 3072, "layer_norm_eps": 1e-12, "patch_size": 16},
        ignored=("encoder_stride", "pooler_act", "pooler_output_size"),
        parts=lambda fields: {"intermediate_size": fields.whole("intermediate_size")},
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
        defaults={"mlp_ratio": 4, "layer_norm_eps": 1e-6, "patch_size": 14},
        ignored=(
            *("layerscale_value", "use_mask_token", "drop_path_rate"),  # the start and the noise of pretraining
            *("out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states"),  # of backbones
        ),
        parts=_dinov2_parts,
        older=(*_OLDER_ATTENTION, ("mlp.weights_out", "mlp.down_proj")),
        joined={"mlp.weights_in": ("mlp.gate_proj", "mlp.up_proj")},
        written={"use_mask_token": False},
    ),
}
_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224, "num_channels": 3}


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
    model_type = str(fields.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(map(repr, FAMILIES))
        raise InputError(f"the model_type is {fields.get('model_type')!r}; this loader reads {known}")
    read = Fields(fields, {}, {**_DEFAULTS, **family.defaults})
    read.only_an_encoder()
    read.ignore(*family.ignored)
    sizes = {name: read.whole(name) for name in ("hidden_size", "num_attention_heads", "num_channels")}
    sizes["num_hidden_layers"] = read.layers()
    labels = read.num_labels() or 2
    config = VisionConfig(
        family=model_type,
        **sizes,
        head_dim=read.whole("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"]),
        image_size=_pair(read, "image_size"),
        patch_size=_pair(read, "patch_size"),
        num_labels=labels if num_labels is None else num_labels,
        hidden_act=read.choice("hidden_act", FUNCTIONS, "gelu"),
        layer_norm_eps=read.number("layer_norm_eps"),
        initializer_range=read.number("initializer_range", 0.02),
        qkv_bias=read.flag("qkv_bias", True),
        **family.parts(read),
    )
    read.refuse_others()
    return config


def _pair(fields: Fields, name: str) -> Size:
    """A height and a width, which may be written as one number."""
    value = fields.get(name)
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
        raise InputError(f"{name} must be a positive whole number or two of them, not {value!r:.80}")
    return pair[0], pair[1]
