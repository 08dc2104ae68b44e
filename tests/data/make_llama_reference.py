"""Make tiny decoders with Hugging Face transformers, and the logits that transformers gets from them.

Run with Python 3.11, torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0:

    python make_llama_reference.py OUT

OUT/<model>/config.json, model.safetensors   the model, with the weights in the dtype that `MODELS` says
OUT/<model>/expected.safetensors             input_ids, attention_mask (padding on the left);
                                             "output": logits of input_ids in float32; "masked": with the mask
"""

import pathlib
import sys

import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

SIZES = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA_3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "llama3": (LlamaForCausalLM, torch.float32, LlamaConfig(
        **SIZES, num_hidden_layers=2, head_dim=8, attention_bias=True, mlp_bias=True, eos_token_id=[2, 3],
        rope_parameters={**LLAMA_3, "original_max_position_embeddings": 64})),
    "linear": (LlamaForCausalLM, torch.float16, LlamaConfig(
        **SIZES, num_hidden_layers=2, tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0})),
    "mistral": (MistralForCausalLM, torch.bfloat16, MistralConfig(**SIZES, num_hidden_layers=2, sliding_window=4)),
    "qwen2": (Qwen2ForCausalLM, torch.bfloat16, Qwen2Config(
        **SIZES, num_hidden_layers=3, use_sliding_window=True, sliding_window=3, max_window_layers=1,
        tie_word_embeddings=True)),
}  # fmt: skip


def make(name, directory):
    make_model, dtype, config = MODELS[name]
    torch.manual_seed(sum(map(ord, name)))
    model = make_model(config).eval()
    for parameter in model.parameters():  # no zeros, no ones: every parameter must be read to get the output right
        parameter.data = (parameter.data + 0.3 * torch.randn_like(parameter)).to(dtype).float()
    ids = torch.randint(0, config.vocab_size, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        expected = {"output": model(ids).logits, "masked": model(ids, attention_mask=mask).logits}
    model.to(dtype).save_pretrained(directory)
    (directory / "generation_config.json").unlink()
    safetensors.torch.save_file({**expected, "input_ids": ids, "attention_mask": mask}, directory / "expected.safetensors")


if __name__ == "__main__":
    for name in MODELS:
        make(name, pathlib.Path(sys.argv[1]) / name)
