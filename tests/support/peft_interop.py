"""What `lora_jax.peft.save` writes loads in PEFT: no warning, no missing or unexpected key, the same logits.

Run in an environment of its own (Python 3.11: torch 2.13.0, peft 0.21.2, transformers 5.24.0, and lora_jax):

    python tests/support/peft_interop.py

For each case: a tiny random torch model is saved, loaded on our side, adapted by random adapters, and these exported. PEFT loads
them onto the torch model with warnings as errors.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
import tempfile
import warnings

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import peft
import peft_command
import peft_twins
import safetensors.numpy
import torch
import transformers as t

import lora_jax as lj
from lora_jax.models import bert, llama

TOLERANCE = 1e-4
FAMILIES = pathlib.Path(__file__).parents[1] / "data" / "families"
OURS = ("lora_", "vera_", "modules_to_save", "trainable_tokens_delta")
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 32}
IDS = np.random.default_rng(7).integers(1, 64, (2, 9))
USED = IDS[0, 4:6].tolist()  # two tokens in the middle of the first row
INVOCATION = USED
TOKENS = {"rank": 4, "targets": ["up_proj"], "trainable_token_indices": {"embed_tokens": USED}}


# --- torch models ---


def make_bert():
    return t.BertForSequenceClassification(t.BertConfig(num_hidden_layers=2, num_labels=3, **SIZES))


def make_encoder(model_type, **fields):
    config = t.CONFIG_MAPPING[model_type](num_hidden_layers=2, num_labels=3, pad_token_id=0, **SIZES, **fields)
    return t.AutoModelForSequenceClassification.from_config(config)


def make_family(name):
    config = t.AutoConfig.from_pretrained(FAMILIES / name / "base", attn_implementation="eager")
    return t.AutoModelForCausalLM.from_config(config)


def make_distilbert():
    sizes = {"vocab_size": 64, "dim": 32, "n_heads": 4, "n_layers": 2, "hidden_dim": 48, "max_position_embeddings": 32}
    return t.DistilBertForSequenceClassification(t.DistilBertConfig(num_labels=3, **sizes))


def make_llama(tied=False):
    return t.LlamaForCausalLM(t.LlamaConfig(num_hidden_layers=3, num_key_value_heads=2, tie_word_embeddings=tied, **SIZES))


def make_gpt2():
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, **ends))


def make_mixtral():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return t.MixtralForCausalLM(t.MixtralConfig(num_hidden_layers=2, num_key_value_heads=2, **experts, **SIZES))


def randomised(make, **kw):
    """A model without a parameter at zero or one, so that each must be read to get the output right."""
    torch.manual_seed(0)
    model = make(**kw)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


# --- how they are loaded here: a function, its parameters and their names ---


def load_bert(model, directory):
    loaded = bert.load(directory)
    return loaded.apply, loaded.variables, loaded.names


def load_llama(scan_layers):
    def load(model, directory):
        loaded = llama.load(directory, scan_layers=scan_layers)
        return loaded.apply, loaded.variables, loaded.names

    return load


# --- cases ---


@dataclasses.dataclass
class Case:
    """A torch model, how it is loaded here, and what is adapted."""

    make: object
    load: object
    config: lj.LoraConfig
    task: str = "CAUSAL_LM"
    kw: dict = dataclasses.field(default_factory=dict)


PATTERNS = {"rank_pattern": {"gate_proj": 2}, "alpha_pattern": {"k_proj": 5.0}}
EXPERTS = lj.LoraConfig(
    rank=3,
    targets=["gate_up_proj", "down_proj", "q_proj/weight", "v_proj/weight"],
    rank_pattern={"q_proj/weight": 2},
    batch_axes={"gate_up_proj": (0,), "down_proj": (0,)},
)
BERT = {"rank": 4, "targets": ["query", "up", "down"], "train": ["classifier"]}
HEAD = {"rank": 4, "exclude": ["re:.*/classifier/.*"], "train": ["re:.*/classifier/.*"]}
CASES = {
    "bert": Case(make_bert, load_bert, lj.LoraConfig(rank=4, targets=["query", "value"], train=["classifier"]), "SEQ_CLS"),
    "bert, all biases": Case(
        make_bert, load_bert, lj.LoraConfig(rank=4, targets="attention", train=["bias", "classifier/kernel"]), "SEQ_CLS"
    ),
    "bert, DoRA": Case(make_bert, load_bert, lj.LoraConfig(**BERT, dora=True), "SEQ_CLS"),
    "bert, LoRA biases": Case(make_bert, load_bert, lj.LoraConfig(**BERT, lora_bias=True), "SEQ_CLS"),
    "bert, VeRA": Case(make_bert, load_bert, lj.LoraConfig(**BERT, method="vera"), "SEQ_CLS"),
    "roberta": Case(make_encoder, load_bert, lj.LoraConfig(**HEAD), "SEQ_CLS", {"model_type": "roberta"}),
    "roberta, all": Case(make_encoder, load_bert, lj.LoraConfig(rank=4), None, {"model_type": "roberta"}),
    "xlm-roberta, DoRA": Case(
        make_encoder, load_bert, lj.LoraConfig(**HEAD, dora=True), "SEQ_CLS", {"model_type": "xlm-roberta"}
    ),
    "electra": Case(make_encoder, load_bert, lj.LoraConfig(**HEAD), "SEQ_CLS", {"model_type": "electra", "embedding_size": 16}),
    "distilbert": Case(make_distilbert, load_bert, lj.LoraConfig(**HEAD), "SEQ_CLS"),
    "modernbert": Case(make_encoder, load_bert, lj.LoraConfig(**HEAD), "SEQ_CLS", {"model_type": "modernbert"}),
    "modernbert, all": Case(make_encoder, load_bert, lj.LoraConfig(rank=4), None, {"model_type": "modernbert"}),
    "llama": Case(make_llama, load_llama(False), lj.LoraConfig(rank=4, targets="all-linear", scaling="rslora", **PATTERNS)),
    "llama, scanned": Case(make_llama, load_llama(True), lj.LoraConfig(rank=4, targets="all-linear", **PATTERNS)),
    "llama, scanned, some layers": Case(
        make_llama,
        load_llama(True),
        lj.LoraConfig(rank=4, targets=["up_proj", "down_proj"], layers=[0, 2], rank_pattern={"down_proj": 3}),
    ),
    "llama, scanned, DoRA": Case(make_llama, load_llama(True), lj.LoraConfig(rank=4, targets="attention", dora=True)),
    "llama, scanned, VeRA": Case(make_llama, load_llama(True), lj.LoraConfig(rank=6, targets="all-linear", method="vera")),
    "llama, scanned, aLoRA": Case(
        make_llama, load_llama(True), lj.LoraConfig(rank=4, targets="all-linear", alora_invocation_tokens=INVOCATION)
    ),
    "llama, trained tokens": Case(make_llama, load_llama(False), lj.LoraConfig(**TOKENS)),
    "llama, tied, trained tokens": Case(make_llama, load_llama(True), lj.LoraConfig(**TOKENS), kw={"tied": True}),
    "llama, embedding and head": Case(
        make_llama, load_llama(False), lj.LoraConfig(rank=4, targets=["embed_tokens", "lm_head", "up_proj"])
    ),
    "llama, tied": Case(
        make_llama, load_llama(False), lj.LoraConfig(rank=4, targets=["embed_tokens", "up_proj"]), kw={"tied": True}
    ),
    "gpt2": Case(make_gpt2, peft_twins.load_gpt2, lj.LoraConfig(rank=4, targets=["c_attn", "c_proj"])),
    "gpt2, embeddings": Case(make_gpt2, peft_twins.load_gpt2, lj.LoraConfig(rank=4, targets=["wte", "wpe"])),
    "gpt2, aLoRA with biases": Case(
        make_gpt2,
        peft_twins.load_gpt2,
        lj.LoraConfig(rank=4, targets=["c_attn"], lora_bias=True, alora_invocation_tokens=INVOCATION),
    ),
    "gpt2, trained tokens": Case(
        make_gpt2,
        peft_twins.load_gpt2,
        lj.LoraConfig(rank=4, targets=["c_attn"], trainable_token_indices={"wte": USED, "wpe": [2]}),
    ),
    "mixtral": Case(make_mixtral, peft_twins.load_mixtral, EXPERTS),
}
DECODERS = (
    "gemma", "gemma2", "gemma3", "gemma3_images", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama_yarn", "mixtral", "olmo2",
    "olmo3", "phi3", "phi3_longrope", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
for number, family in enumerate(DECODERS):
    made = lj.LoraConfig(rank=3, alpha=5, targets=["re:.*/layer.*/kernel"])
    CASES[f"family {family}"] = Case(make_family, load_llama(number % 2 == 1), made, kw={"name": family})


def moved(adapters):
    """Adapters off their initial values, as training would leave them; what is frozen or pads smaller ranks stays."""
    rng = np.random.default_rng(3)
    step = lambda label, leaf: leaf + (0.1 if label == "adapter" else 0.0) * rng.normal(size=leaf.shape).astype(np.float32)
    out = jax.tree.map(step, lj.labels(adapters), adapters)
    for path, adapter in out.items():
        if isinstance(adapter, lj.LowRank):
            out[path] = jax.tree.map(lambda leaf, pair=adapter: pair.where_adapted(leaf, 0.0), adapter)
    return out


def check(case, directory):
    """Both sides' logits, after the adapter went from one to the other; asserts on warnings and keys."""
    randomised(case.make, **case.kw).save_pretrained(directory / "base")
    apply, variables, names = case.load(randomised(case.make, **case.kw), directory / "base")
    adapters = moved(lj.init(jax.random.key(0), case.config, apply, variables, IDS))
    lj.peft.save(directory, adapters, names=names, config=case.config, task_type=case.task, variables=variables)
    tokens = case.config.alora_invocation_tokens
    adapted = lj.lora(apply, active=None if tokens is None else lj.active_from(IDS, tokens))
    ours = adapted(lj.attach(variables, adapters), IDS)
    again = lj.peft.load(directory, variables, names=names)
    back = adapted(lj.attach(variables, again), IDS)
    base = randomised(case.make, **case.kw)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # transformers' own, whenever PEFT asks for it
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = peft.PeftModel.from_pretrained(base, directory).eval()
        loaded = model.load_adapter(directory, "default")
    unknown = list(loaded.unexpected_keys)
    missing = [key for key in loaded.missing_keys if any(word in key for word in OURS)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as it saves, PEFT takes the biases of its own lora_bias for broken matrices
        taken = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    stored = set(safetensors.numpy.load_file(directory / "adapter_model.safetensors"))
    frozen = {key for key in taken ^ stored if "base_layer" in key or "original_module" in key or ".modules_to_save." in key}
    assert not [key for key in stored if key.endswith(".base_layer.weight")], "the base's own weights are in the file"
    assert not unknown and not missing, f"unexpected {unknown}, missing {missing}"
    assert taken ^ stored == frozen, f"only in PEFT {sorted(taken - stored)}, only in the file {sorted(stored - taken)}"
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(IDS)).logits.numpy()
        unadapted = randomised(case.make, **case.kw)(input_ids=torch.from_numpy(IDS)).logits.numpy()
    return np.asarray(ours), np.asarray(back), theirs, unadapted


def main():
    """Run the cases, print how far apart the logits are, and fail if one is wrong."""
    t.utils.logging.disable_progress_bar()
    t.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    known = CASES | peft_command.CASES
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(known)}")
    wrong = []
    for name in parser.parse_args().cases or known:
        with tempfile.TemporaryDirectory() as directory:
            if name in CASES:
                ours, back, theirs, unadapted = check(CASES[name], pathlib.Path(directory))
            else:
                ours, theirs, back, unadapted = peft_command.check(known[name], pathlib.Path(directory), IDS)
        off, again, effect = (float(np.abs(x).max()) for x in (ours - theirs, back - theirs, theirs - unadapted))
        other = "loaded again" if name in CASES else "merged"
        print(f"{name}: logits differ by {off:.2g}, {other} by {again:.2g}; the adapter moves them by {effect:.2g}")
        if max(off, again) > TOLERANCE or effect < 100 * TOLERANCE:
            wrong.append(name)
    print(f"peft {peft.__version__}, transformers {t.__version__}, torch {torch.__version__}: {len(wrong)} wrong")
    return f"not equal: {', '.join(wrong)}" if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
