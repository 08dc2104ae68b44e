"""Make reference LoRA adapters with Hugging Face PEFT, and the outputs that PEFT gets from them.

Run with Python 3.11, torch 2.13.0 (CPU), peft 0.21.2, transformers 5.23.0, safetensors 0.8.0:

    python make_reference.py OUT [CASES.json] [NAME ...]

A case with "peft" was made with that version instead (0.19.0 with transformers 5.5.0): experts were laid out otherwise then.

OUT/<model>/base/          config.json, model.safetensors of a tiny random model (Hugging Face names). Where `save_pretrained`
                           would rename or split what PEFT sees (mixtral, vit), and for a plain torch module, state.safetensors
                           instead: the model's state dict
OUT/<model>/inputs.safetensors    what the model is called with
OUT/<case>/                adapter_config.json, adapter_model.safetensors as PEFT saves them
                           (in OUT/<case>/<name>/ if the case gives the adapter a name)
OUT/<case>/expected.safetensors   "output": logits with the adapter active; "base_output": logits of the base model;
                           "delta:<parameter>": PEFT's merged weight minus the original base weight, for each parameter that
                           merging changes (names of the state dict, Hugging Face orientation). Left out for tied parameters
                           where the merged model is not the adapted one: PEFT merges the adapter of one use into both uses,
                           and tied adapters twice
OUT/<case>/case.json       the case, versions, "merge" (how far the merged model's logits are from "output", or why PEFT
                           can't merge), "reload" (how far the logits are after loading the directory into a fresh base)

A case: model, lora (the arguments of LoraConfig, or of VeraConfig where "tuner" says so), and optionally convert (PiSSA or OLoRA turned into plain LoRA), adapter_name,
file_dtype (of the saved tensors).
"""

import json
import pathlib
import shutil
import sys

import peft
import safetensors.torch
import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)


class Plain(torch.nn.Module):
    """An embedding, three convolutions (one grouped) and two linear layers, from no library."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(24, 8)
        self.conv1 = torch.nn.Conv1d(8, 12, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(3, 8, (3, 2), stride=2)
        self.grouped = torch.nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.hidden = torch.nn.Linear(18, 16)
        self.head = torch.nn.Linear(16, 5, bias=False)

    def forward(self, input_ids, pixel_values):
        text = torch.tanh(self.conv1(self.embed(input_ids).transpose(1, 2))).mean(2)
        image = torch.tanh(self.grouped(torch.tanh(self.conv2(pixel_values)))).mean((2, 3))
        return self.head(torch.tanh(self.hidden(torch.cat([text, image], 1))))


def llama(**kw):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64, **kw))


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Gates and ups together are 16 wide, as the hidden states are: a pair's shapes do not tell which of its sides is which.
SQUARE = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
MODELS = {
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(vocab_size=64, num_labels=3, intermediate_size=48, max_position_embeddings=32, **SMALL)
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, intermediate_size=40, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **SMALL
        )
    ),
    "mixtral-square": lambda: MixtralForCausalLM(
        MixtralConfig(intermediate_size=8, num_local_experts=3, num_experts_per_tok=2, **SQUARE)
    ),
    "gpt-oss-square": lambda: GptOssForCausalLM(
        GptOssConfig(intermediate_size=8, num_local_experts=3, num_experts_per_tok=2, head_dim=8, **SQUARE)
    ),
    "vit": lambda: ViTForImageClassification(
        ViTConfig(intermediate_size=48, image_size=16, patch_size=4, num_labels=5, **SMALL)
    ),
    "plain": Plain,
}

TIED = {
    "llama-tied": ("model.embed_tokens.weight", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
}


def make_model(name):
    torch.manual_seed(sum(map(ord, name)))
    model = MODELS[name]()
    for parameter in model.parameters():  # no zeros, no ones: every parameter must be read to get the output right
        parameter.data = parameter.data + 0.02 * torch.randn_like(parameter)
    return model.eval()


def make_inputs(name):
    generator = torch.Generator().manual_seed(7)
    if name == "vit":
        return {"pixel_values": torch.rand(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(0, 24 if name == "plain" else 64, (2, 9), generator=generator)
    if name == "plain":
        return {"input_ids": ids, "pixel_values": torch.rand(2, 3, 16, 16, generator=generator)}
    if name == "bert":
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        return {"input_ids": ids, "attention_mask": mask}
    return {"input_ids": ids}


def run(model, name):
    with torch.no_grad():
        out = model(**make_inputs(name))
    return getattr(out, "logits", out)


def randomise(model):
    """Move every trainable parameter off its initial value, as training would."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = 0.1 if "lora_" in name or "vera_" in name else 0.02
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)  # in place: tied ones stay tied


def write(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, path)


def save_base(out, name):
    """The model's directory, once."""
    folder = out / name
    if folder.exists():
        return
    model = make_model(name)
    write(folder / "inputs.safetensors", make_inputs(name))
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder / "base")
        saved = set(safetensors.torch.load_file(folder / "base" / "model.safetensors"))
        if not set(dict(model.named_parameters())) <= saved:
            (folder / "base" / "model.safetensors").unlink()
            write(folder / "base" / "state.safetensors", model.state_dict())
    else:
        write(folder / "base" / "state.safetensors", model.state_dict())


def round_to(model, dtype):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(parameter.data.to(dtype))


def cast_file(path, dtype):
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({k: v.to(dtype) for k, v in tensors.items()}, path, {"format": "pt"})


def difference(a, b):
    return float((a - b).abs().max())


def merge(model, case, before, expected):
    """Add the deltas to `expected`, and say how far the merged model's logits are from the adapted model's."""
    tied = TIED.get(case["model"], ())
    try:
        merged = model.merge_and_unload()
    except Exception as error:  # PEFT refuses in several ways, and may have merged some layers before
        return f"{type(error).__name__}: {error}"
    off = difference(run(merged, case["model"]), expected["output"])
    for key, value in merged.state_dict().items():
        if key in before and difference(value, before[key]) > 0 and not (off > 1e-3 and key in tied):
            expected["delta:" + key] = value - before[key]
    return off


def make_case(out, name, case):
    save_base(out, case["model"])
    target = out / name
    shutil.rmtree(target, ignore_errors=True)
    base = make_model(case["model"])
    before = {key: value.clone() for key, value in base.state_dict().items()}
    expected = {"base_output": run(base, case["model"])}
    torch.manual_seed(3)
    adapter_name = case.get("adapter_name", "default")
    config = {"vera": peft.VeraConfig}.get(case.get("tuner"), peft.LoraConfig)(**case["lora"])
    model = peft.get_peft_model(base, config, adapter_name=adapter_name)
    kwargs = {}
    if case.get("convert"):
        kwargs["path_initial_model_for_weight_conversion"] = str(target / "_init")
        model.save_pretrained(target / "_init")
    randomise(model)
    if "file_dtype" in case:
        round_to(model, getattr(torch, case["file_dtype"]))
    model.eval()
    expected["output"] = run(model, case["model"])
    model.save_pretrained(target, **kwargs)
    shutil.rmtree(target / "_init", ignore_errors=True)
    folder = target if adapter_name == "default" else target / adapter_name
    (target / "README.md").unlink(missing_ok=True)
    if "file_dtype" in case:
        cast_file(folder / "adapter_model.safetensors", getattr(torch, case["file_dtype"]))
    again = peft.PeftModel.from_pretrained(make_model(case["model"]), folder).eval()
    notes = {"reload": difference(run(again, case["model"]), expected["output"])}
    notes["merge"] = merge(model, case, before, expected)
    write(target / "expected.safetensors", expected)
    versions = {module.__name__: module.__version__ for module in (torch, peft, transformers)}
    (target / "case.json").write_text(json.dumps({**case, **notes, "versions": versions}, indent=1) + "\n")
    moved = difference(expected["output"], expected["base_output"])
    print(f"{name}: {len(expected) - 2} deltas, output moved by {moved:.3g}, {notes}")


if __name__ == "__main__":
    out = pathlib.Path(sys.argv[1])
    file = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else pathlib.Path(__file__).with_name("cases.json")
    cases = json.loads(file.read_text())
    for name in sys.argv[3:] or cases:
        make_case(out, name, cases[name])
