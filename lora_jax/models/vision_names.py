"""What Hugging Face calls the parameters of the vision models, in files and in transformers' memory."""

import dataclasses
from collections.abc import Mapping

from lora_jax.huggingface.names import HFName
from lora_jax.models.vision_config import FAMILIES, Family, VisionConfig


def modern(name: str, family: Family) -> str:
    """What transformers calls a tensor in memory, from the name in a file: of any version, of the classifier or the encoder.

    >>> modern("encoder.layer.0.attention.attention.query.weight", FAMILIES["vit"])
    'vit.layers.0.attention.q_proj.weight'
    """
    if name.startswith(("embeddings.", "encoder.", "layers.", "layernorm.", "pooler.")):
        name = f"{family.prefix}{name}"
    for old, new in family.older:
        name = name.replace(old, new)
    return name


def file_names(names: Mapping[str, HFName], config: VisionConfig) -> dict[str, HFName]:
    """The name of each parameter in files, from those in memory.

    They are those in the memory of transformers 4 as well, so that `peft.load` reads its adapters by them.
    Both halves of a gated MLP, which are one tensor there, have the names of transformers 5.

    Args:
      names: what `hf_names` gave.
      config: the model's sizes and parts.

    >>> from lora_jax.models.vision_config import read_config
    >>> config = read_config({"model_type": "vit"})
    >>> file_names(hf_names(config), config)["params/encoder/layer_0/mlp/up/kernel"].name
    'vit.encoder.layer.0.intermediate.dense.weight'
    """
    found = dict(names)
    for old, new in reversed(FAMILIES[config.family].older):
        found = {path: dataclasses.replace(name, name=name.name.replace(new, old)) for path, name in found.items()}
    return found


def hf_names(config: VisionConfig, scan_layers: bool = False) -> dict[str, HFName]:
    """The name of each parameter in transformers' image classifier, by path: as in memory, and so as PEFT has it.

    Args:
      config: the model's sizes and parts.
      scan_layers: whether the layers' parameters are stacked.

    >>> from lora_jax.models.vision_config import read_config
    >>> names = hf_names(read_config({"model_type": "vit"}))
    >>> names["params/encoder/layer_0/attention/query/kernel"]
    HFName(name='vit.layers.0.attention.q_proj.weight', axes='i o -> o i', kind='linear', order=0, tied='')
    """
    family = FAMILIES[config.family]
    dense = {"attention/query": "attention.q_proj", "attention/key": "attention.k_proj", "attention/value": "attention.v_proj"}
    dense |= {"attention/out": "attention.o_proj"}
    if config.gated:
        dense |= {f"mlp/{ours}": f"mlp.{ours}_proj" for ours in ("gate", "up", "down")}
    else:
        dense |= {"mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2"}
    embeddings = f"{family.prefix}embeddings."
    table = {
        "embeddings/cls_token": HFName(f"{embeddings}cls_token", kind="parameter"),
        "embeddings/position": HFName(f"{embeddings}position_embeddings", kind="parameter"),
        "embeddings/patch/kernel": HFName(f"{embeddings}patch_embeddings.projection.weight", "h w i o -> o i h w", "conv"),
        "embeddings/patch/bias": HFName(f"{embeddings}patch_embeddings.projection.bias"),
        "norm/scale": HFName(f"{family.prefix}layernorm.weight"),
        "norm/bias": HFName(f"{family.prefix}layernorm.bias"),
        "classifier/kernel": HFName("classifier.weight", "i o -> o i"),
        "classifier/bias": HFName("classifier.bias"),
    }
    kernel, vector = ("l i o -> o i", "l o -> o") if scan_layers else ("i o -> o i", "")
    places = {"layers": "{l}"} if scan_layers else {f"layer_{i}": str(i) for i in range(config.num_hidden_layers)}
    for place, number in places.items():
        ours, theirs = f"encoder/{place}", family.prefix + family.layers.replace("#", number)
        for module, name in dense.items():
            table[f"{ours}/{module}/kernel"] = HFName(f"{theirs}{name}.weight", kernel)
            if config.qkv_bias or module.split("/")[1] not in ("query", "key", "value"):
                table[f"{ours}/{module}/bias"] = HFName(f"{theirs}{name}.bias", vector)
        for module, name in family.modules.items():
            if module.startswith("norm"):
                table[f"{ours}/{module}/scale"] = HFName(f"{theirs}{name}.weight", vector)
                table[f"{ours}/{module}/bias"] = HFName(f"{theirs}{name}.bias", vector)
            else:
                table[f"{ours}/{module}"] = HFName(f"{theirs}{name}", vector)
    return {f"params/{path}": name for path, name in table.items()}
