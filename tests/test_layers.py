"""A module imports only from lower layers of the design, and `import lora_jax` stays light."""

import ast
import pathlib
import subprocess
import sys

import pytest

import lora_jax

ROOT = pathlib.Path(lora_jax.__file__).parent
LAYERS = {
    0: ["_compat", "paths", "collectives"],
    1: ["topology", "config", "adapter", "weight", "names", "alora", "flops"],
    2: ["sharding", "quant", "moves", "products", "dora", "vera", "peft.settings", "peft.slots", "peft.rules"],
    3: ["terms"],
    4: ["transform", "peft.replay", "peft.tokens", "peft.vera", "peft.cutting", "peft.stacking"],
    5: ["usage", "starts"],
    6: ["losses", "init", "algebra", "merging", "optim", "report", "packing", "moments"],
    7: ["ragged", "train", "nnx", "mixing", "initializers.pairs"],
    8: [
        "checkpoint",
        "files",
        "many",
        "tables",
        "fetch",
        "chat",
        "initializers.spectral",
        "initializers.quantized",
        "initializers.gradient",
        "initializers.activations",
    ],
    9: ["metrics", "data"],
    10: ["curve", "progress", "run", "models.llama_config"],
    11: ["models.checkpoint_files", "models.gguf_reader", "models.decoder", "models.shapes"],
    12: ["models.gguf_files", "models.generation", "models.reading", "peft.storage"],
    13: ["models.bert", "models.llama", "text_tokenizer", "task", "peft.reading"],
    14: ["hosts", "classify", "lm_data", "hf_directory", "peft.writing", "steps"],
    15: ["rows", "estimate"],
    16: ["lm", "plan"],
    17: ["session", "plan_table", "plan_plot"],
    18: ["finetune", "inspection"],
    19: ["generate", "sweep", "transfer"],
    20: ["cli"],
}
LAYER = {module: layer for layer, modules in LAYERS.items() for module in modules}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py") if path.name != "__init__.py"
}
THIRD_PARTY = {
    "matplotlib",
    "flax",
    "orbax",
    "grain",
    "tokenizers",
    "rich",
    "safetensors",
    "transformers",
    "jinja2",
    "gguf",
    "qwix",
}


def imported(path):
    """The lora_jax modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lora_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_jax."):
            module = node.module.removeprefix("lora_jax.")
            yield from [module] if module in FILES else (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("lora_jax.") for a in node.names if a.name.startswith("lora_jax"))


def test_every_module_has_a_layer():
    assert set(FILES) == set(LAYER)


@pytest.mark.parametrize("module", FILES)
def test_imports_come_from_lower_layers(module):
    for other in imported(FILES[module]):
        if other in LAYER:
            assert LAYER[other] < LAYER[module], f"{module} (layer {LAYER[module]}) imports {other} (layer {LAYER[other]})"


@pytest.mark.parametrize("module", FILES)
def test_private_jax_stays_in_one_place(module):
    text = FILES[module].read_text()
    assert "jax._src" not in text
    assert module == "_compat" or "jax.extend" not in text.replace("names `jax.extend`", "")


@pytest.mark.parametrize("module", FILES)
def test_no_file_is_long(module):
    assert len(FILES[module].read_text().splitlines()) <= 450


def test_the_top_level_is_small_and_light():
    assert len([name for name in vars(lora_jax) if not name.startswith("_") and name not in FILES]) <= 25
    code = f"import lora_jax, sys; sys.exit(', '.join(sorted({THIRD_PARTY!r} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "", f"`import lora_jax` loads {done.stderr}"
