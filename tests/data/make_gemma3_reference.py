"""Make a tiny Gemma 3 of texts and images with transformers, a PEFT adapter of its text part, and what they give for texts.

Run with Python 3.11, torch 2.13.0 (CPU), peft 0.21.2, transformers 5.24.0, safetensors:

    python tests/data/make_gemma3_reference.py

families/gemma3_images/: as the other cases of families/: base, adapter, inputs, expected.
"""

import pathlib

import peft
import safetensors.torch
import torch
import transformers

OUT = pathlib.Path(__file__).parent / "families" / "gemma3_images"
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 8, "head_dim": 8,
    "max_position_embeddings": 128, "sliding_window": 4, "query_pre_attn_scalar": 24, "sliding_window_pattern": 2,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}  # fmt: skip
SIGHT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
    "vision_use_head": False, "model_type": "siglip_vision_model",
}  # fmt: skip
TOKENS = {
    "boi_token_index": 60,
    "eoi_token_index": 61,
    "image_token_index": 62,
    "mm_tokens_per_image": 4,
    "eos_token_id": [1, 3],
}


def moved(model, seed):
    """Every parameter that trains off its initial value."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data + 0.1 * torch.randn(p.shape, generator=g)
    return model.eval()


if __name__ == "__main__":
    torch.manual_seed(0)
    config = transformers.Gemma3Config(text_config=TEXT, vision_config=SIGHT, **TOKENS)
    moved(transformers.Gemma3ForConditionalGeneration(config), 5).save_pretrained(OUT / "base")
    (OUT / "base" / "generation_config.json").unlink(missing_ok=True)
    load = transformers.Gemma3ForConditionalGeneration.from_pretrained
    model = load(OUT / "base", attn_implementation="eager").eval()
    ids = torch.randint(4, 60, (2, 11), generator=torch.Generator().manual_seed(7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = {"base_output": model(**inputs).logits.detach()}
    options = peft.LoraConfig(r=3, lora_alpha=5, target_modules=r".*language_model.*_proj")
    adapted = moved(peft.get_peft_model(model, options), 11)
    expected["output"] = adapted(**inputs).logits.detach()
    adapted.peft_config["default"].base_model_name_or_path = "../base"
    adapted.save_pretrained(OUT / "adapter")
    (OUT / "adapter" / "README.md").unlink(missing_ok=True)
    safetensors.torch.save_file(inputs, OUT / "inputs.safetensors")
    safetensors.torch.save_file(expected, OUT / "expected.safetensors")
