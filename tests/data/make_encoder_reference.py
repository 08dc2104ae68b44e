"""What the encoders of `families/` give before a head: the mean of the tokens that are not padding, and the first token.

Run with Python 3.11, torch 2.13.0 (CPU), transformers 5.24.0, safetensors:

    python tests/data/make_encoder_reference.py

families/<case>/pooled.safetensors   "mean" and "cls", each (batch, hidden), of the case's inputs
"""

import pathlib

import safetensors.torch
import torch
import transformers

ENCODERS = ("distilbert", "electra", "modernbert", "modernbert_mean", "roberta", "xlm_roberta")

for name in ENCODERS:
    case = pathlib.Path(__file__).parent / "families" / name
    model = transformers.AutoModel.from_pretrained(case / "base", attn_implementation="eager").eval()
    inputs = safetensors.torch.load_file(case / "inputs.safetensors")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    real = inputs["attention_mask"][:, :, None].float()
    pooled = {"mean": (hidden * real).sum(1) / real.sum(1), "cls": hidden[:, 0].contiguous()}
    safetensors.torch.save_file(pooled, case / "pooled.safetensors")
