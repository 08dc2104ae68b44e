"""What PEFT's `add_weighted_adapter` makes of two adapters, for each method without chance.

Run with Python 3.11, torch 2.13.0 (CPU), peft 0.21.2, safetensors 0.8.0: python make_reference.py OUT

OUT/adapters.safetensors: `0.a`, `0.b`, `1.a`, `1.b` (lora_A and lora_B of a linear layer, 7 -> 6, rank 3); OUT/<method>.safetensors:
`a`, `b` of the result (linear, ties, magnitude_prune), and its `delta` of scale 1.
"""

import pathlib
import sys

import peft
import safetensors.torch
import torch

WEIGHTS, ALPHAS, DENSITY = [0.7, -0.4], [6, 9], 0.6
METHODS = ["linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(7, 6)

    def forward(self, x):
        return self.layer(x)


def adapted():
    torch.manual_seed(0)
    model = peft.get_peft_model(Model(), peft.LoraConfig(r=3, lora_alpha=ALPHAS[0], target_modules=["layer"]), "0")
    model.add_adapter("1", peft.LoraConfig(r=3, lora_alpha=ALPHAS[1], target_modules=["layer"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)
    return model


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    layer = adapted().base_model.model.layer
    given = {f"{i}.{x}": getattr(layer, f"lora_{x.upper()}")[i].weight.data for i in "01" for x in "ab"}
    safetensors.torch.save_file(given, out / "adapters.safetensors")
    for method in METHODS:
        for majority in ("total", "frequency") if method.startswith("ties") else ("total",):
            model = adapted()
            options = {} if method in ("linear", "cat", "svd") else {"density": DENSITY, "majority_sign_method": majority}
            model.base_model.add_weighted_adapter(["0", "1"], WEIGHTS, "new", combination_type=method, svd_rank=2, **options)
            layer = model.base_model.model.layer
            a, b = layer.lora_A["new"].weight.data, layer.lora_B["new"].weight.data
            tensors = {"a": a, "b": b, "delta": layer.get_delta_weight("new").data}
            tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
            safetensors.torch.save_file(tensors, out / f"{method}-{majority}.safetensors")
            print(method, majority, layer.scaling["new"])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
