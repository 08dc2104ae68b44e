"""What `lj.peft.save_gguf` writes acts in llama.cpp itself as it does here: the same greedy tokens and log-probabilities.

Run in an environment of its own (Python 3.12: xllamacpp 2026.10.11549, which has llama.cpp built for CPUs, and lora_jax's own for
tests), from the repository's root:

    python -m tests.support.llama_cpp

For each family a tiny base is written as a GGUF file and read back here; random adapters of all its kernels are exported, and
llama.cpp goes on from a prompt with the two files.
"""

import argparse
import os
import pathlib
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import xllamacpp

import lora_jax as lj
from lora_jax.models import llama
from tests.support import gguf_adapters, gguf_write

PROMPT = [5, 9, 3, 7, 11, 2, 8]
# llama.cpp has no untied head in a Gemma, and no biases in an OLMo; it looks GELU up in a table of float16.
CASES = [case for case in gguf_adapters.BASES if case not in ("gemma", "olmo3")]
TOLERANCES = dict.fromkeys(("gemma2", "gemma3", "starcoder2"), 3e-3)
EXACT = 1e-5
LORA = lj.LoraConfig(**gguf_adapters.EVERYTHING)


def base_file(case, file, size):
    """A base with a vocabulary, which llama.cpp wants, and windows that are longer than the text: it knows some by itself."""
    words = ["<|end|>", *(f"w{i}" for i in range(1, size))]
    more = {
        "add_tokenizer_model": "gpt2", "add_tokenizer_pre": "gpt-2", "add_token_list": words, "add_token_merges": ["w 1"],
        "add_token_types": [3] + [1] * (size - 1), "add_eos_token_id": 0, "add_bos_token_id": 0,
    }  # fmt: skip
    more |= {"add_sliding_window": 64} if case in ("gemma2", "gemma3", "mistral") else gguf_adapters.METADATA.get(case, {})
    write = gguf_write.write_family if case in gguf_write.CONVERTED else gguf_write.write
    return write(file, case, **more)


def theirs(base, adapter, size):
    """llama.cpp's tokens after the prompt, and the log-probability of each token of the vocabulary at each of them."""
    given = xllamacpp.CommonParams()
    given.model.path, given.n_ctx, given.n_parallel, given.verbosity, given.warmup = str(base), 32, 1, 0, False
    given.cpuparams.n_threads, given.n_gpu_layers = 1, 0
    given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    given.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    asked = {"prompt": PROMPT, "n_predict": 6, "temperature": 0, "n_probs": size, "cache_prompt": False}
    said = xllamacpp.Server(given).handle_completions(asked)
    found = []
    for step in said["choices"][0]["logprobs"]["content"]:
        by_token = {one["id"]: one["logprob"] for one in step["top_logprobs"]}
        found.append((step["id"], np.array([by_token[token] for token in range(size)])))
    return found


def check(case, directory):
    """How far the log-probabilities differ, and how far the adapters move them."""
    size = llama.load(gguf_adapters.source(case)).config.vocab_size
    base = base_file(case, directory / "base.gguf", size)
    model = llama.load(base)
    adapters = gguf_adapters.drawn(model, LORA)
    adapter = gguf_adapters.save(directory / "adapter.gguf", model, adapters)
    after = lj.merge(model.variables, adapters)
    ids, off, effect = list(PROMPT), 0.0, 0.0
    for token, scores in theirs(base, adapter, size):
        ours, plain = (
            np.asarray(jax.nn.log_softmax(model.apply(x, jnp.array([ids]))[0, -1])) for x in (after, model.variables)
        )
        off, effect = max(off, np.abs(ours - scores).max()), max(effect, np.abs(ours - plain).max())
        assert token == ours.argmax(), f"{case}: llama.cpp goes on with {token}, not {ours.argmax()}"
        ids.append(token)
    return off, effect


def main():
    """Run the cases, print how far apart the log-probabilities are, and fail if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}")
    wrong = []
    for case in parser.parse_args().cases or CASES:
        with tempfile.TemporaryDirectory() as directory:
            off, effect = check(case, pathlib.Path(directory))
        print(f"{case}: log-probabilities differ by {off:.2g}; the adapters move them by {effect:.2g}", flush=True)
        if off > TOLERANCES.get(case, EXACT) or effect < 0.1:
            wrong.append(case)
    print(f"llama.cpp of xllamacpp {xllamacpp.__version__}: {len(wrong)} wrong")
    return f"not equal: {', '.join(wrong)}" if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
