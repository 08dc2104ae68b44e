"""What PEFT's initialisers make of one linear layer, for each without chance.

Run with Python 3.11, torch 2.13.0 (CPU), peft 0.21.2, safetensors 0.8.0, attrs: python make_reference.py OUT

OUT/given.safetensors: `weight` (12, 20) of a linear layer without bias, its `inputs` (60, 20), a `target` (60, 12), the
`gradient` (12, 20) of the mean of `(inputs weight^T - target)^2`, and for EVA the weights `eva.0` and `eva.1` of two layers, which
meet `eva.inputs` (60, 20) and `eva.inputs eva.0^T`. OUT/<case>.safetensors: `a` (r, 20), `b` (12, r) and the changed `base`, with r = 4 and
alpha = 8; of EVA `a.0` and `a.1`.
"""

import itertools
import pathlib
import sys

import peft
import safetensors.torch
import torch
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga

IN, OUT, RANK, ALPHA = 20, 12, 4, 8


class One(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.layer = torch.nn.Linear(IN, OUT, bias=False)
        self.layer.weight.data = weight.clone()

    def forward(self, x):
        return self.layer(x)


class Two(torch.nn.Module):
    """Layers of few and of many directions in their inputs, so that ranks move."""

    def __init__(self, weights):
        super().__init__()
        self.first, self.second = (torch.nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights)
        self.first.weight.data, self.second.weight.data = (w.clone() for w in weights)

    def forward(self, x):
        return self.second(self.first(x))


def given():
    """Spectra that fall, since PEFT finds some of these singular vectors with a randomised SVD."""
    torch.manual_seed(0)
    normal = torch.randn
    return {
        "weight": normal(OUT, IN) * torch.logspace(0, -1, OUT)[:, None],
        "inputs": normal(60, IN) * torch.linspace(1.5, 0.5, IN), "target": normal(60, OUT),
        "eva.inputs": normal(60, IN) * torch.logspace(0.5, -2, IN) + normal(IN),
        "eva.0": normal(16, IN) * torch.logspace(0, -2, 16)[:, None], "eva.1": normal(OUT, 16),
    }  # fmt: skip


def config(**options):
    return peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"], **options)


def adapted(model, settings, out, case):
    layer = peft.get_peft_model(model, settings).base_model.model.layer
    tensors = {"a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight, "base": layer.base_layer.weight}
    save(tensors, out / f"{case}.safetensors")


def save(tensors, file):
    safetensors.torch.save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, file)
    file.chmod(0o644)


def loss_step(model, data):
    ((model(data["inputs"]) - data["target"]) ** 2).mean().backward()


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    data = given()
    for name in ("pissa", "olora"):
        adapted(One(data["weight"]), config(init_lora_weights=name), out, name)
    for mode in ("ipm", "kpm"):
        model, settings = One(data["weight"]), config(init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode))
        preprocess_corda(model, settings, run_model=lambda model=model: model(data["inputs"]))
        adapted(model, settings, out, f"corda-{mode}")
    for direction, scale in itertools.product(("ArB2r", "A2rBr", "ArBr"), ("stable", "weight_svd", "gd_scale", "unit")):
        if direction != "ArB2r" and scale != "stable":
            continue
        model = One(data["weight"])
        settings = config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(direction=direction, scale=scale))
        preprocess_loraga(model, settings, lambda model=model: loss_step(model, data))
        data["gradient"] = model.layer._peft_loraga_grad.clone()
        adapted(model, settings, out, f"lora_ga-{direction}-{scale}")
    for rho in (1.0, 2.0):
        settings = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=["first", "second"], init_lora_weights="eva",
            eva_config=EvaConfig(rho=rho, use_label_mask=False, tau=0.999),
        )  # fmt: skip
        model = peft.get_peft_model(Two([data["eva.0"], data["eva.1"]]), settings)
        peft.initialize_lora_eva_weights(
            model, [data["eva.inputs"]], forward_fn=lambda model, x: model(x),
            prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False,
        )  # fmt: skip
        layers = model.base_model.model.first, model.base_model.model.second
        save({f"a.{i}": x.lora_A["default"].weight for i, x in enumerate(layers)}, out / f"eva-{rho}.safetensors")
        print("eva", rho, [x.r["default"] for x in layers], [x.scaling["default"] for x in layers])
    save(data, out / "given.safetensors")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
