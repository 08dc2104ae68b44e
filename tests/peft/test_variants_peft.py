"""Outputs, gradients and one optimiser step of each variant, against those of Hugging Face PEFT (`data/variants`)."""

import dataclasses
import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.core.adapter import Rows

DATA = pathlib.Path(__file__).parents[1] / "data" / "variants"
CASES = json.loads((DATA / "cases.json").read_text())["cases"]
PARTS = {
    r"lora_(embedding_)?A(\.weight)?": "a",
    r"lora_(embedding_)?B(\.weight)?": "b",
    r"lora_B\.bias": "bias",
    r"lora_magnitude_vector\.weight": "magnitude",
    r"vera_lambda_d": "lambda_d",
    r"vera_lambda_b": "lambda_b",
}
KERNEL = {"embed": "embed/embedding", "conv": "conv/kernel", "hidden": "hidden/kernel", "head": "head/kernel"}


def plus(x, bias):
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def linear(p, x):
    return plus(x @ p["kernel"], p["bias"])


def mlp(params, x):
    return linear(params["head"], jnp.tanh(linear(params["hidden"], x)))


def words(params, ids):
    return mlp(params, params["embed"]["embedding"][ids])


def tied(params, ids):
    table = params["embed"]["embedding"]
    return jnp.tanh(linear(params["hidden"], table[ids])) @ table.T


def conv(params, x):
    spatial = x.ndim - 2
    numbers = ("NWC", "WIO", "NWC") if spatial == 1 else ("NHWC", "HWIO", "NHWC")
    x = jnp.moveaxis(x, 1, -1)
    p, padding = params["conv"], [(1, 1)] * spatial
    x = jax.lax.conv_general_dilated(x, p["kernel"], (2,) * spatial, padding, dimension_numbers=numbers)
    return linear(params["head"], jnp.tanh(plus(x, p["bias"])).mean(tuple(range(1, 1 + spatial))))


MODELS = {"mlp": mlp, "words": words, "tied": tied, "conv1d": conv, "conv2d": conv}


@dataclasses.dataclass
class Reference:
    """One case: torch's tensors, and what they are here."""

    name: str

    def __post_init__(self):
        self.case = CASES[self.name]
        self.config = self.case["config"]
        self.tensors = load_file(DATA / f"{self.name}.safetensors")
        self.model = MODELS[self.case["model"]]
        self.x = jnp.asarray(self.tensors["input"])

    def variables(self):
        tree = {}
        for name, tensor in self.named("base").items():
            module, leaf = name.split(".")
            if leaf == "weight":
                leaf = KERNEL[module].split("/")[1]
                tensor = tensor if module == "embed" else swapped(tensor)
            tree.setdefault(module, {})[leaf] = jnp.asarray(tensor)
        if self.case["model"] == "tied":
            del tree["head"]
        return tree

    def named(self, kind):
        return {name.removeprefix(f"{kind}:"): t for name, t in self.tensors.items() if name.startswith(f"{kind}:")}

    def adapters(self, kind="adapter"):
        """The adapters, with the gradients or the values after a step in the place of what is trained."""
        tensors = self.named("adapter") | self.named(kind)
        made = {}
        for module, path in KERNEL.items():
            parts = {part: tensor for name, tensor in tensors.items() for part, tensor in self.part(module, name, tensor)}
            if "value" in parts:
                made[f"{module}/bias"] = lj.Full(parts.pop("value"))
            if "values" in parts:
                made[path] = Rows(**parts, indices=self.indices(), layout=layout(2))
            elif parts:
                made[path] = self.pair(module, parts, tensors)
        return made

    def part(self, module, name, tensor):
        """The field of an adapter that a tensor of this module is, if it is one of its own."""
        own, _, rest = name.partition(".")
        if own != module:
            return
        if rest == "base_layer.bias":
            yield "value", jnp.asarray(tensor)
        if rest == "token_adapter.trainable_tokens_delta":
            yield "values", jnp.asarray(tensor)
        for pattern, part in PARTS.items():
            if re.fullmatch(pattern, rest):
                flat = tensor.reshape(tensor.shape[:2] if part == "b" else -1)
                yield part, jnp.asarray(swapped(tensor) if part == "a" else flat.T)

    def pair(self, module, parts, tensors):
        if "lambda_d" in parts:
            (out,), (width, _) = parts["lambda_b"].shape, self.variables()[module]["kernel"].shape
            parts |= {"a": jnp.asarray(tensors["vera_A"][:, :width].T), "b": jnp.asarray(tensors["vera_B"][:out].T)}
            return lj.LowRank(layout=layout(2), frozen=("a", "b"), **parts)
        tokens = self.config.get("alora_invocation_tokens")
        return lj.LowRank(
            layout=layout(parts["a"].ndim),
            scale=self.case["scales"][module],
            frozen=("a",) if self.case.get("optimizer") == "lora-fa" else (),
            invocation=None if tokens is None else tuple(tokens),
            **parts,
        )

    def indices(self):
        indices = self.config["trainable_token_indices"]
        return tuple(indices["embed"] if isinstance(indices, dict) else indices)

    def loss(self, adapters):
        active = {}
        if "active" in self.tensors:
            active = {"active": lj.active_from(self.x, tuple(self.config["alora_invocation_tokens"]))}
        output = lj.lora(self.model, **active)(lj.attach(self.variables(), adapters), self.x)
        return jnp.sum(output * self.tensors["projection"]), output


def layout(ndim):
    return lj.Layout((), tuple(range(ndim - 1)), (ndim - 1,))


def swapped(tensor):
    """(out, in, *window) as (*window, in, out)."""
    return tensor.transpose(*range(2, tensor.ndim), 1, 0)


def trained(adapters):
    """The trained arrays by name."""
    labels = jax.tree.leaves(lj.labels(adapters))
    leaves = jax.tree_util.tree_leaves_with_path(adapters)
    return {jax.tree_util.keystr(path): leaf for (path, leaf), label in zip(leaves, labels, strict=True) if label == "adapter"}


def assert_near(got, want, name=""):
    off = np.linalg.norm(np.asarray(got) - np.asarray(want))
    assert off <= 1e-5 * np.linalg.norm(want), f"{name}: {off / np.linalg.norm(want):.2g}"


def assert_same_trained(got, want):
    got, want = trained(got), trained(want)
    assert set(got) == set(want)
    for name in want:
        assert_near(got[name], want[name], name)


def torchs_optimizer(case):
    """The optimiser of a case, as optax has it."""
    options = case["optimizer_arguments"]
    rate, adam = options["lr"], {"b1": options["betas"][0], "b2": options["betas"][1], "eps": options["eps"]}
    if case.get("optimizer") == "lora-plus":
        decay = {"weight_decay": options["loraplus_weight_decay"], "mask": lj.optim.decay_mask}
        rates = {"embed": options["loraplus_lr_embedding"]}
        make = functools.partial(optax.adamw, **adam, **decay)
        return lj.optim.lora_plus(make, rate, options["loraplus_lr_ratio"], rates=rates)
    if case.get("optimizer") == "lora-fa":
        adam["eps"] /= math.sqrt(1 - adam["b2"])  # PEFT adds it before the first step's correction of the second moment
        return lj.optim.lora_fa(optax.adamw(rate, **adam, weight_decay=options["weight_decay"]))
    return optax.adamw(rate, **adam, weight_decay=options["weight_decay"])


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_a_step_equal_peft(name, lenient):
    reference = Reference(name)
    adapters = reference.adapters()
    tx = lj.optimizer(torchs_optimizer(reference.case))

    @jax.jit
    def step(adapters):
        (_, output), gradients = jax.value_and_grad(reference.loss, has_aux=True)(adapters)
        updates, _ = tx.update(gradients, tx.init(adapters), adapters)
        return output, gradients, optax.apply_updates(adapters, updates)

    output, gradients, after = step(adapters)
    assert_near(output, reference.tensors["output"])
    assert len(trained(adapters)) == len(reference.case["trained"])
    assert_same_trained(gradients, reference.adapters("gradient"))
    assert_same_trained(after, reference.adapters("after"))


def test_alora_is_active_where_peft_has_it():
    reference = Reference("alora")
    got = lj.active_from(reference.x, tuple(reference.config["alora_invocation_tokens"]))
    np.testing.assert_array_equal(got, reference.tensors["active"])
