"""What PEFT says which modules a configuration targets, and with which rank and alpha: random configurations over module names.

Run with the versions of `make_reference.py`: python make_targets.py > targets.json
"""

import itertools
import json
import random
import sys

from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

BLOCKS = ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.experts.0.w1", "mlp.experts.1.w1", "norm"]
MODULES = [
    *(f"model.layers.{i}.{block}" for i in (0, 1, 10) for block in BLOCKS),
    *(f"model.vision.blocks.{i}.{block}" for i in (0, 1) for block in BLOCKS[:3]),
    "model.norm", "model.embed_tokens", "lm_head", "q_proj", "score.norm", "h.0.attn.c_attn", "layers.1.q_proj",
]  # fmt: skip
TARGETS = ["q_proj", "k_proj", "up_proj", "w1", "lm_head", "embed_tokens", "self_attn.q_proj", "proj", "experts.0.w1", "c_attn"]
TARGETS += ["model.layers.1.self_attn.q_proj", "layers.1.q_proj", "model.layers.10.mlp.up_proj"]
REGEXES = [
    r".*\.layers\.[01]\..*proj",
    r".*q_proj",
    "q_proj",
    r".*\.(q|k)_proj$",
    r"(?i).*NORM",
    r"model\.(layers|vision).*w1",
    "",
]
SAVED = ["norm", "lm_head", "embed_tokens", "layers.1", "mlp", "score"]
KEYS = [
    "q_proj",
    "k_proj",
    "^model.layers.1.self_attn.q_proj",
    "layers.0.self_attn.q_proj",
    r".*\.1\..*",
    "proj",
    "w1",
    "up_proj|k_proj",
]


def some(rng, items, most=3):
    return rng.sample(items, rng.randint(1, most))


def configuration(rng):
    fields = {"target_modules": rng.choice(REGEXES) if rng.random() < 0.3 else some(rng, TARGETS)}
    if rng.random() < 0.3:
        fields["exclude_modules"] = rng.choice(REGEXES) if rng.random() < 0.5 else some(rng, TARGETS)
    if rng.random() < 0.3:
        fields["modules_to_save"] = some(rng, SAVED)
    if isinstance(fields["target_modules"], list) and rng.random() < 0.5:
        fields["layers_to_transform"] = rng.choice([0, 1, [1], [0, 10], []])
        if rng.random() < 0.5:
            fields["layers_pattern"] = rng.choice(["layers", "blocks", ["blocks", "layers"], ["h"], [], ""])
    for name, values in (("rank_pattern", (1, 2, 3)), ("alpha_pattern", (5, 7, 9))):
        if rng.random() < 0.6:
            fields[name] = {key: rng.choice(values) for key in some(rng, KEYS)}
    return {"r": 8, "lora_alpha": 16, "use_rslora": rng.random() < 0.3, **fields}


def truth(fields, module):
    config = LoraConfig(**fields)
    found = check_target_module_exists(config, module)
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
    return [bool(found) and not isinstance(found, _ExcludedModule), rank, alpha / (rank**0.5 if config.use_rslora else rank)]


def main():
    rng, cases = random.Random(0), []
    for fields in itertools.islice(iter(lambda: configuration(rng), None), 150):
        try:
            cases.append({"fields": fields, "answers": [truth(fields, module) for module in MODULES]})
        except ValueError as error:
            print(fields, error, file=sys.stderr)
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    print(f'{{"modules":{json.dumps(MODULES)},\n"cases":[\n{lines}\n]}}')


if __name__ == "__main__":
    main()
