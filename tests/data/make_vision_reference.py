"""Make what the vision models give for images of other sizes, and a DINOv2 with gated MLPs, with transformers.

Run with torch 2.13.0 (CPU), peft 0.21.2, transformers 5.24.0 in the directory `families`, beside `vit` and `dinov2`:

    python ../make_vision_reference.py

<case>/sizes.safetensors: images `HxW.input` of other sizes than the model's, and the logits `HxW.output` of the base for them.
dinov2_gated/: as the other cases: base, adapter, inputs, expected.
"""

import pathlib

import peft
import safetensors.torch
import torch
import transformers

SIZES = {"vit": [(24, 24), (12, 20), (16, 20)], "dinov2": [(35, 35), (14, 42), (30, 45)]}
GATED = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "mlp_ratio": 2, "image_size": 12, "patch_size": 4}


def moved(model, seed):
    """Every parameter that trains off its initial value."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data + 0.1 * torch.randn(p.shape, generator=g)
    return model.eval()


def gated(folder):
    torch.manual_seed(0)
    config = transformers.Dinov2Config(**GATED, use_swiglu_ffn=True, qkv_bias=False, num_labels=3)
    moved(transformers.Dinov2ForImageClassification(config), 5).save_pretrained(folder / "base")
    model = transformers.Dinov2ForImageClassification.from_pretrained(folder / "base").eval()
    pixels = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(7))
    expected = {"base_output": model(pixels).logits.detach()}
    options = peft.LoraConfig(r=2, lora_alpha=5, target_modules="all-linear")
    adapted = moved(peft.get_peft_model(model, options), 11)
    expected["output"] = adapted(pixels).logits.detach()
    adapted.peft_config["default"].base_model_name_or_path = "../base"
    adapted.save_pretrained(folder / "adapter")
    (folder / "adapter" / "README.md").unlink(missing_ok=True)
    safetensors.torch.save_file({"pixel_values": pixels}, folder / "inputs.safetensors")
    safetensors.torch.save_file(expected, folder / "expected.safetensors")


def sizes(folder):
    model = transformers.AutoModelForImageClassification.from_pretrained(folder / "base").eval()
    options = {"interpolate_pos_encoding": True} if folder.name == "vit" else {}
    g, found = torch.Generator().manual_seed(9), {}
    for height, width in SIZES[folder.name]:
        pixels = torch.rand(2, 3, height, width, generator=g)
        found[f"{height}x{width}.input"] = pixels
        found[f"{height}x{width}.output"] = model(pixels, **options).logits.detach()
    safetensors.torch.save_file(found, folder / "sizes.safetensors")


if __name__ == "__main__":
    gated(pathlib.Path("dinov2_gated"))
    for name in SIZES:
        sizes(pathlib.Path(name))
