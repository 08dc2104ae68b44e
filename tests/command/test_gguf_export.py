"""Adapters as GGUF files: what llama.cpp would do with them is what the run's own model does."""

import dataclasses
import json
import shutil

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import lora_jax as lj
from lora_jax.command import cli, options, run
from lora_jax.models import llama
from tests.support import gguf_write, tiny, tiny_lm
from tests.support.gguf_adapters import BASES, EVERYTHING, FAMILIES, METADATA, drawn, save, source
from tests.support.marks import every_other


def base_file(case, file):
    """A base of a family, as llama.cpp's converter writes it."""
    if case in gguf_write.CONVERTED:
        return gguf_write.write_family(file, case, **METADATA.get(case, {}))
    more = {"add_sliding_window": 4} if case == "mistral" else {}
    return gguf_write.write(file, case, **more)


def merge(base, adapter):
    """Change the tensors of a file in their place, by llama.cpp's rule."""
    read, written = gguf.GGUFReader(adapter), gguf.GGUFReader(base, "r+")
    tensors, bases = ({tensor.name: tensor.data for tensor in one.tensors} for one in (read, written))
    alpha = read.get_field("adapter.lora.alpha").contents()
    assert read.get_field("general.type").contents() == "adapter" and read.get_field("adapter.type").contents() == "lora"
    assert read.get_field("general.architecture").contents() == written.get_field("general.architecture").contents()
    changed = {name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")}
    assert {f"{name}.lora_{part}" for name in changed for part in "ab"} == set(tensors)
    for name in changed:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert a.dtype == b.dtype == np.float32
        scale = alpha / b.shape[-1]
        bases[name][:] += scale * (a @ b.T if name == "token_embd.weight" else b @ a)
    written.data.flush()
    return changed


def same(got, want):
    for path, leaf in lj.paths.flatten(want)[0].items():
        found = lj.paths.flatten(got)[0][path]
        np.testing.assert_allclose(found, leaf, rtol=0, atol=2e-6 * float(jnp.abs(leaf).max()), err_msg=path)


@pytest.mark.parametrize(
    ("case", "scan_layers"), every_other([*((case, False) for case in BASES), ("llama_yarn", True), ("mixtral", True)])
)
def test_every_kernel_of_a_family(case, scan_layers, tmp_path):
    """Adapters of a directory, on the GGUF file of the same model: ranks and scales that one alpha does not fit."""
    model = llama.load(source(case), scan_layers=scan_layers)
    adapters = drawn(model, lj.LoraConfig(**EVERYTHING))
    file = save(tmp_path / "adapter.gguf", model, adapters)
    base = base_file(case, tmp_path / "base.gguf")
    before = llama.load(base, scan_layers=scan_layers).variables
    merge(base, file)
    same(llama.load(base, scan_layers=scan_layers).variables, lj.merge(before, adapters))
    same(before, model.variables)


def test_one_alpha_that_fits_changes_no_factor(tmp_path):
    """Of rsLoRA, where it is no `alpha / r` of its own; the tensors are those of the pairs."""
    model = llama.load(gguf_write.BASE)
    adapters = drawn(model, lj.LoraConfig(rank=4, alpha=6.0, scaling="rslora", targets=["v_proj"]))
    read = gguf.GGUFReader(save(tmp_path / "adapter.gguf", model, adapters))
    assert read.get_field("adapter.lora.alpha").contents() == 12.0
    tensors = {tensor.name: tensor.data for tensor in read.tensors}
    pair = adapters["params/layer_1/self_attn/v_proj/kernel"]
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight.lora_a"], pair.a.T)
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight.lora_b"], pair.b.T)


@pytest.mark.parametrize(
    "lora",
    [
        {"targets": ["embed_tokens", "lm_head", "q_proj"]},
        {"targets": "all-linear", "method": "vera"},
        {"targets": ["up_proj"], "layers": [1]},
    ],
)
def test_other_pairs(lora, tmp_path):
    model = llama.load(gguf_write.BASE)
    adapters = drawn(model, lj.LoraConfig(rank=4, **lora))
    base = gguf_write.write(tmp_path / "base.gguf", "base")
    changed = merge(base, save(tmp_path / "adapter.gguf", model, adapters))
    assert len(changed) == len(adapters)
    same(llama.load(base).variables, lj.merge(model.variables, adapters))


@pytest.mark.parametrize("factor", [0.0, -2.0])
def test_scales_that_are_not_positive(factor, tmp_path):
    """llama.cpp takes an alpha of 0 for none."""
    model = llama.load(gguf_write.BASE)
    adapters = lj.algebra.scale(drawn(model, lj.LoraConfig(rank=4, targets=["up_proj", "q_proj"])), factor)
    base, file = gguf_write.write(tmp_path / "base.gguf", "base"), save(tmp_path / "adapter.gguf", model, adapters)
    assert gguf.GGUFReader(file).get_field("adapter.lora.alpha").contents() == (16.0 * factor or 1.0)
    merge(base, file)
    same(llama.load(base).variables, lj.merge(model.variables, adapters))


def test_experts_of_some_layers_of_a_stack(tmp_path):
    """The pairs of a layer that has none are left out."""
    model = llama.load(source("qwen3_moe"), scan_layers=True)
    adapters = drawn(model, lj.LoraConfig(rank=3, targets=["re:.*/mlp/(gate_up|down)_proj/kernel"], layers=[1]))
    base = base_file("qwen3_moe", tmp_path / "base.gguf")
    changed = merge(base, save(tmp_path / "adapter.gguf", model, adapters))
    assert changed == {f"blk.1.ffn_{name}_exps.weight" for name in ("gate", "up", "down")}
    same(llama.load(base, scan_layers=True).variables, lj.merge(model.variables, adapters))


def test_what_a_file_says_beside(tmp_path):
    model = llama.load(gguf_write.BASE)
    lora = lj.LoraConfig(rank=2, targets=["v_proj"], alora_invocation_tokens=(3, 4))
    read = gguf.GGUFReader(save(tmp_path / "adapter.gguf", model, drawn(model, lora), base_model="tiny"))
    assert read.get_field("adapter.alora.invocation_tokens").contents() == [3, 4]
    assert read.get_field("adapter.alora.invocation_tokens").types[-1] == gguf.GGUFValueType.UINT32
    assert read.get_field("general.base_model.0.name").contents() == "tiny"
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.gguf"]


REFUSED = {
    "DoRA": ({"targets": ["v_proj"], "dora": True}, r"no pairs with a magnitude \(DoRA\): merge it into the base"),
    "bias": ({"targets": ["v_proj"], "lora_bias": True}, "no pairs with a bias"),
    "whole": ({"targets": ["v_proj"], "train": ["norm"]}, "norm/scale: llama.cpp has low-rank pairs alone, and no parameter trained"),
    "rows": ({"targets": ["v_proj"], "trainable_token_indices": {"embed_tokens": [1]}}, "and no trained rows"),
    "none": ({"targets": [], "train": []}, "llama.cpp needs a low-rank pair"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_has_not(case, tmp_path):
    fields, says = REFUSED[case]
    model = llama.load(gguf_write.BASE)
    lora = None if case == "none" else lj.LoraConfig(rank=2, **fields)
    ids = jnp.ones((1, 4), jnp.int32)
    adapters = {} if lora is None else lj.init(jax.random.key(0), lora, model.apply, model.variables, ids)
    with pytest.raises(lj.InputError, match=says):
        save(tmp_path / "adapter.gguf", model, adapters)
    assert not list(tmp_path.iterdir())


def test_one_invocation_sequence_for_all_pairs(tmp_path):
    model = llama.load(gguf_write.BASE)
    adapters = drawn(model, lj.LoraConfig(rank=2, targets=["v_proj"], alora_invocation_tokens=(3, 4)))
    first = next(iter(adapters))
    for invocation in (None, (5,)):
        mixed = adapters | {first: dataclasses.replace(adapters[first], invocation=invocation)}
        with pytest.raises(lj.InputError, match=r"llama\.cpp has one invocation sequence for all pairs"):
            save(tmp_path / "adapter.gguf", model, mixed)
    assert not list(tmp_path.iterdir())


def pair(rows, *inputs):
    axes = tuple(range(len(inputs) + 1))
    return lj.LowRank(jnp.ones((*inputs, 2)), jnp.ones((2, rows)), lj.Layout((), axes[:-1], axes[-1:]))


@pytest.mark.parametrize(
    ("name", "heads", "says"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (3, 3), "3 heads can't share 8 rows: heads= must be those of the base"),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", (2, 1), "has all experts in blk.0.ffn_gate_exps.weight"),
        ("transformer.h.0.attn.c_attn.weight", (2, 1), "llama.cpp has no transformer.h.0.attn.c_attn.weight in models of the"),
    ],
)
def test_names_and_heads_that_do_not_fit(name, heads, says, tmp_path):
    names = {"w": lj.peft.HFName(name, "i o -> o i")}
    with pytest.raises(lj.InputError, match=says):
        lj.peft.save_gguf(tmp_path / "a.gguf", {"w": pair(8, 4)}, names=names, architecture="llama", heads=heads)
    assert not list(tmp_path.iterdir())


# --- the command ------------------------------------------------------------------------------------------------------

with_promotion = pytest.mark.usefixtures("usual_promotion")


def make_run(directory, base, lora, **fields):
    config = options.RunConfig(task="lm", model=str(base), rank=lora.rank, date="2025-01-01", **fields)
    run.create(directory, config)
    model = llama.load(base, tie=False if config.untie else None)
    adapters = drawn(model, lora)
    lj.checkpoint.save(directory / "adapters", adapters, config=lora)
    return model, adapters


def export(directory, capsys):
    code = cli.main(["export", str(directory), "--format", "gguf"])
    return code, capsys.readouterr()


@with_promotion
def test_a_run_on_a_gguf_file(tmp_path, capsys):
    base = gguf_write.write(tmp_path / "tiny.gguf", "base", tokens=True)
    model, adapters = make_run(tmp_path / "run", base, lj.LoraConfig(**EVERYTHING))
    code, said = export(tmp_path / "run", capsys)
    assert (code, said.err) == (0, "") and "written:" in said.out
    file = tmp_path / "run" / "gguf" / "adapter.gguf"
    assert gguf.GGUFReader(file).get_field("general.base_model.0.name").contents() == "tiny.gguf"
    shutil.copy(base, tmp_path / "merged.gguf")
    merge(tmp_path / "merged.gguf", file)
    same(llama.load(tmp_path / "merged.gguf").variables, lj.merge(model.variables, adapters))


@with_promotion
def test_a_head_that_the_run_has_untied(tmp_path, capsys):
    base = tiny_lm.model(tmp_path / "model")
    make_run(tmp_path / "run", base, lj.LoraConfig(rank=2, targets=["lm_head"]), untie=True)
    code, said = export(tmp_path / "run", capsys)
    assert code == 2 and "in the base's GGUF file the head is the embedding, which this run has untied" in said.err
    make_run(tmp_path / "tied", base, lj.LoraConfig(rank=2, targets=["embed_tokens"]))
    code, said = export(tmp_path / "tied", capsys)
    assert code == 2 and "is also lm_head.weight, and llama.cpp applies a pair to one of the two only" in said.err
    assert not (tmp_path / "run" / "gguf").exists()


@with_promotion
def test_a_family_that_llama_cpp_files_are_not_written_for(tmp_path, capsys):
    base = tmp_path / "model"
    shutil.copytree(FAMILIES / "stablelm" / "base", base)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"cat": 0}, unk_token="cat")).save(str(base / "tokenizer.json"))
    fields = json.loads((base / "config.json").read_text())
    make_run(tmp_path / "run", base, lj.LoraConfig(rank=2, targets=["q_proj"]))
    (base / "model.safetensors").unlink()  # it is not even read
    code, said = export(tmp_path / "run", capsys)
    assert code == 2 and f"{fields['model_type']} models can't be written for llama.cpp; these can: llama, " in said.err


@with_promotion
def test_a_classifier(tmp_path, capsys):
    tiny.model(tmp_path / "model")
    run.create(tmp_path / "run", options.RunConfig(model=str(tmp_path / "model")))
    code, said = export(tmp_path / "run", capsys)
    assert code == 2 and "--format gguf is for language models" in said.err and "'classify'" in said.err


@with_promotion
def test_a_tokenizer_and_embeddings_of_its_own(tmp_path, capsys):
    """The tokens alone are said; with embeddings it is refused."""
    base = tiny_lm.model(tmp_path / "model")
    make_run(tmp_path / "run", base, lj.LoraConfig(rank=2, targets=["q_proj"]))
    own = tmp_path / "run" / "base"
    own.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, own / name)
    code, said = export(tmp_path / "run", capsys)
    assert code == 0 and "note: the run has a tokenizer or chat template of its own, which is not in the file" in said.err
    shutil.rmtree(tmp_path / "run" / "gguf")
    safetensors.numpy.save_file({"model.embed_tokens.weight": np.zeros((301, 32), np.float32)}, own / run.EMBEDDINGS)
    code, said = export(tmp_path / "run", capsys)
    assert code == 2 and "has embeddings of a vocabulary of its own, which no adapter of llama.cpp can bring" in said.err
    assert not (tmp_path / "run" / "gguf").exists()


@with_promotion
def test_a_quantised_base(tmp_path, capsys):
    base = tiny_lm.model(tmp_path / "model")
    make_run(tmp_path / "run", base, lj.LoraConfig(rank=2, targets=["q_proj"]), quantize="int8", block=16)
    code, said = export(tmp_path / "run", capsys)
    assert code == 0 and "note: the adapters were trained beside kernels quantised to int8" in said.err
