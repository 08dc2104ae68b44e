"""Make reference training steps of LoRA's variants with Hugging Face PEFT.

Run with Python 3.11, torch 2.13.0 (CPU), peft 0.21.2, transformers 5.23.0, safetensors 0.8.0:

    python make_reference.py OUT

OUT/cases.json           for each case the model, the arguments of PEFT's configuration, the scale of each adapted module, the
                         optimiser's arguments, which names are trained, and the versions
OUT/<case>.safetensors   "base:<name>"      the model's parameters, as torch has them
                         "adapter:<name>"   the adapter's, off their initial values (PEFT's names without its prefix and
                                            without the adapter's name)
                         "input", "output", "projection"   the loss is sum(output * projection)
                         "gradient:<name>"  of the loss, for each trained parameter
                         "after:<name>"     each trained parameter after one step of the optimiser
                         "active"           aLoRA: which tokens the adapter sees

All is float32, and without dropout. LoRA-FA's projection is made in float32 too, where PEFT would use bfloat16.
"""

import contextlib
import json
import pathlib
import sys

import peft
import peft.optimizers.lorafa
import safetensors.torch
import torch
import transformers
from peft.tuners.lora.variants import calculate_alora_offsets

VOCAB, TOKENS, WIDTH, HIDDEN, OUT = 12, 7, 6, 8, 5
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


class Mlp(torch.nn.Module):
    """Two linear layers on vectors."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = torch.nn.Linear(WIDTH, HIDDEN), torch.nn.Linear(HIDDEN, OUT)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(x)))


class Words(Mlp):
    """An embedding and the two linear layers."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)

    def forward(self, x):
        return super().forward(self.embed(x))


class Tied(torch.nn.Module):
    """An embedding that is the head too."""

    def __init__(self):
        super().__init__()
        self.config, self._tied_weights_keys = transformers.PretrainedConfig(tie_word_embeddings=True), ["head.weight"]
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.hidden, self.head = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.head(torch.tanh(self.hidden(self.embed(x))))


class Conv(torch.nn.Module):
    """A convolution, the mean over the positions and a linear layer."""

    def __init__(self, dimensions):
        super().__init__()
        kind, window = (torch.nn.Conv1d, 3) if dimensions == 1 else (torch.nn.Conv2d, (3, 2))
        self.conv, self.head = kind(3, HIDDEN, window, stride=2, padding=1), torch.nn.Linear(HIDDEN, OUT)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x)).flatten(2).mean(2))


MODELS = {"mlp": Mlp, "words": Words, "tied": Tied, "conv1d": lambda: Conv(1), "conv2d": lambda: Conv(2)}
PAIR = {"r": 3, "lora_alpha": 5, "target_modules": ["hidden", "head"]}
EMBEDDED = {"r": 3, "lora_alpha": 5, "target_modules": ["embed", "hidden"]}
CONV = {"r": 2, "lora_alpha": 3, "target_modules": ["conv", "head"]}
# The optimiser is AdamW where none is named.
CASES = {
    "lora": {"model": "mlp", "config": PAIR},
    "lora-embedding": {"model": "words", "config": EMBEDDED},
    "lora-conv1d": {"model": "conv1d", "config": CONV},
    "lora-conv2d": {"model": "conv2d", "config": CONV},
    "rslora": {"model": "mlp", "config": PAIR | {"use_rslora": True, "rank_pattern": {"head": 2}}},
    "dora": {"model": "mlp", "config": PAIR | {"use_dora": True}},
    "dora-embedding": {"model": "words", "config": EMBEDDED | {"use_dora": True}},
    "dora-conv1d": {"model": "conv1d", "config": CONV | {"use_dora": True}},
    "dora-conv2d": {"model": "conv2d", "config": CONV | {"use_dora": True}},
    "lora-bias": {"model": "mlp", "config": PAIR | {"lora_bias": True}},
    "lora-bias-conv2d": {"model": "conv2d", "config": CONV | {"lora_bias": True}},
    "vera": {"model": "mlp", "vera": True, "config": {"r": 4, "target_modules": ["hidden", "head"], "projection_prng_key": 7}},
    "tokens": {"model": "words", "config": PAIR | {"trainable_token_indices": {"embed": [9, 0, 4]}}},
    "tokens-tied": {
        "model": "tied",
        "config": {"r": 3, "lora_alpha": 5, "target_modules": ["hidden"], "trainable_token_indices": [9, 0, 4]},
    },
    "alora": {"model": "words", "config": PAIR | {"alora_invocation_tokens": [3, 5], "task_type": "CAUSAL_LM"}},
    "lora-plus": {
        "model": "words",
        "optimizer": "lora-plus",
        "config": PAIR | {"target_modules": ["embed", "hidden", "head"], "bias": "all"},
    },
    "lora-fa": {
        "model": "words",
        "optimizer": "lora-fa",
        "config": PAIR | {"rank_pattern": {"head": 2}, "bias": "all"},
    },
}


def make_input(name):
    generator = torch.Generator().manual_seed(7)
    if name.startswith("conv"):
        return torch.randn(4, 3, *(8, 6)[: int(name[4])], generator=generator)
    if name == "mlp":
        return torch.randn(4, WIDTH, generator=generator)
    # For aLoRA: the invocation 3 5 is there twice, once, not at all, and cut off.
    ids = [[1, 3, 5, 9, 3, 5, 2], [3, 5, 0, 4, 7, 7, 9], [5, 3, 0, 1, 2, 9, 4], [0, 9, 6, 4, 3, 5, 3]]
    return torch.tensor(ids)


def make_model(name):
    torch.manual_seed(sum(map(ord, name)))
    model = MODELS[name]()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def wrap(case, base):
    """PEFT's model; a tuner alone, since the wrappers for tasks ask for a model of transformers."""
    if case.get("vera"):
        config, tuner = peft.VeraConfig(**case["config"]), peft.VeraModel
    else:
        config, tuner = peft.LoraConfig(**case["config"]), peft.LoraModel
    return tuner(base, config, "default").eval(), config


def randomise(model):
    generator = torch.Generator().manual_seed(11)
    for parameter in trained(model).values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)  # in place: tied ones stay tied


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def short(name):
    """A parameter's name without PEFT's prefix and the adapter's name."""
    return ".".join(part for part in name.removeprefix("model.").split(".") if part != "default")


def make_optimizer(case, model):
    """The optimiser and its arguments, as the tests need them."""
    kind = case.get("optimizer", "adamw")
    if kind == "adamw":
        return torch.optim.AdamW(trained(model).values(), **ADAMW), ADAMW
    if kind == "lora-plus":
        decay = {"loraplus_lr_ratio": 16.0, "loraplus_lr_embedding": 2e-3, "loraplus_weight_decay": 0.01}
        rest = {name: ADAMW[name] for name in ("lr", "betas", "eps")}
        made = peft.optimizers.create_loraplus_optimizer(model, torch.optim.AdamW, **rest, **decay)
        return made, rest | decay
    peft.optimizers.lorafa.is_bf16_available = lambda: False
    made = peft.optimizers.create_lorafa_optimizer(model, r=PAIR["r"], lora_alpha=PAIR["lora_alpha"], lr=ADAMW["lr"])
    return made, {name: made.defaults[name] for name in ("betas", "eps", "weight_decay")} | {"lr": ADAMW["lr"]}


def make_case(out, name, case):
    base = make_model(case["model"])
    tensors = {f"base:{key}": value for key, value in base.state_dict().items()}
    tensors = {key: value.clone() for key, value in tensors.items()}
    model, config = wrap(case, base)
    randomise(model)
    optimizer, arguments = make_optimizer(case, model)
    x = make_input(case["model"])
    tensors |= {"input": x}
    hooks = contextlib.nullcontext()
    if getattr(config, "alora_invocation_tokens", None):
        offsets = calculate_alora_offsets({"default": config}, "default", x)
        hooks = model._enable_peft_forward_hooks(alora_offsets=offsets)
        tensors["active"] = torch.arange(TOKENS) >= TOKENS - torch.tensor([o or 0 for o in offsets])[:, None]
    tensors |= {f"adapter:{short(n)}": p.clone() for n, p in model.named_parameters() if "lora_" in n}
    tensors |= {f"adapter:{short(n)}": p.clone() for n, p in trained(model).items()}
    if case.get("vera"):
        tensors |= {f"adapter:{side}": getattr(model, side)["default"] for side in ("vera_A", "vera_B")}
    with hooks:
        output = model(x)
    projection = torch.cos(torch.arange(output.numel())).reshape(output.shape)
    (output * projection).sum().backward()
    tensors |= {"output": output, "projection": projection}
    tensors |= {f"gradient:{short(n)}": p.grad.clone() for n, p in trained(model).items()}
    optimizer.step()
    tensors |= {f"after:{short(n)}": p for n, p in trained(model).items()}
    detached = {key: value.detach().contiguous().clone() for key, value in tensors.items()}
    safetensors.torch.save_file(detached, out / f"{name}.safetensors")
    scales = {short(n): m.scaling["default"] for n, m in model.named_modules() if getattr(m, "scaling", None)}
    names = [short(n) for n in trained(model)]
    smallest = min(float(tensors[f"gradient:{n}"].abs().max()) for n in names)
    print(f"{name}: {len(names)} trained, the smallest gradient's largest entry is {smallest:.2g}")
    return {**case, "scales": scales, "optimizer_arguments": arguments, "trained": names}


if __name__ == "__main__":
    out = pathlib.Path(sys.argv[1])
    made = {name: make_case(out, name, case) for name, case in CASES.items()}
    versions = {module.__name__: module.__version__ for module in (torch, peft, transformers)}
    (out / "cases.json").write_text(json.dumps({"versions": versions, "cases": made}, indent=1) + "\n")
