"""Runs whose layers are scanned: they learn what runs with layers one by one learn, and all commands take them."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lj
from lora_jax.command import cli, run
from lora_jax.models import llama
from tests.support import interrupting, tiny_lm

pytestmark = pytest.mark.usefixtures("usual_promotion")
MEMORY = ("--remat", "products", "--attention-block", "16", "--accumulate", "2")
SCANNED = ("--scan-layers", *MEMORY)


def call(arguments, capsys, code=0):
    """Run the command in this process; returns what it printed."""
    capsys.readouterr()
    found = cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert found == code, printed.err
    return printed.out if code == 0 else printed.err


def train(home, out, *more, **changes):
    assert cli.main([*tiny_lm.options(home, out, **{"steps": 6, **changes}), *map(str, more)]) == 0
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny_lm.home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def scanned(home):
    return train(home, home / "scanned", *SCANNED)


@pytest.fixture(scope="module")
def plain(home):
    return train(home, home / "plain")


def adapters(directory):
    return lj.checkpoint.load(directory / "adapters")


def scores(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["perplexity"] for line in lines if line["perplexity"] is not None]


def exported(directory, form, out, capsys):
    call(["export", directory, "--format", form, "--out", out], capsys)
    [file] = out.glob("*.safetensors")
    return safetensors.numpy.load_file(file)


def test_its_options_are_recorded(scanned):
    config = run.read_config(scanned)
    assert (config.scan_layers, config.remat, config.attention_block, config.accumulate) == (True, "products", 16, 2)
    assert set(adapters(scanned)) == {f"params/layers/{module}/kernel" for module in (
        "self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "self_attn/o_proj", "mlp/gate_proj", "mlp/up_proj",
        "mlp/down_proj")}  # fmt: skip


def test_it_learns(scanned):
    before, *_, after = scores(scanned)
    assert after < 0.8 * before


def test_it_goes_on_where_the_other_would(home, plain, tmp_path, capsys):
    """From the same pairs both runs end with the same ones, in both directions."""
    start = train(home, tmp_path / "start", steps=1)
    ends = {name: train(home, tmp_path / name, *more, "--adapter", start, rank=None, steps=3) for name, more in
            {"one": (), "scanned": SCANNED}.items()}  # fmt: skip
    ours, theirs = (exported(ends[name], "peft", tmp_path / f"{name}-peft", capsys) for name in ("scanned", "one"))
    assert set(ours) == set(theirs) and len(ours) == 28
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, atol=2e-4, err_msg=name)
    np.testing.assert_allclose(scores(ends["scanned"]), scores(ends["one"]), rtol=1e-4)
    back = train(home, tmp_path / "back", "--adapter", ends["scanned"], rank=None, steps=1)
    assert "params/layer_1/mlp/up_proj/kernel" in adapters(back)
    assert scores(back)[0] == pytest.approx(scores(ends["scanned"])[-1], rel=1e-5)


def test_a_stopped_run_ends_alike(home, scanned, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        interrupting.at_step(patch, 4)
        call([*tiny_lm.options(home, tmp_path / "run", steps=6), *SCANNED], capsys, code=130)
    call(["finetune", "--resume", tmp_path / "run"], capsys)
    jax.tree.map(np.testing.assert_array_equal, adapters(tmp_path / "run"), adapters(scanned))
    assert (tmp_path / "run" / "config.json").read_text() == (scanned / "config.json").read_text()


def test_generate(home, scanned, capsys):
    """The same text as the merged model with layers one by one."""
    said = call(["generate", scanned, "--prompt", "The cat", "--max-new-tokens", 6], capsys)
    model = llama.load(home / "model", scan_layers=True)
    merged = lj.merge(model.variables, adapters(scanned))
    ids, logits_of = tiny_lm.tokenizer().encode("The cat").ids, jax.jit(model.apply)
    for _ in range(6):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(logits_of(merged, padded)[0, len(ids) - 1].argmax()))
    assert said == tiny_lm.tokenizer().decode(ids) + "\n"


def rows(printed):
    return {line.split()[0]: line.split()[1:] for line in printed.splitlines()[1:]}


def test_inspect(home, scanned, tmp_path, capsys):
    """A row for each layer, which says what the row of a run with the same adapters, one by one, says."""
    exported(scanned, "peft", tmp_path / "peft", capsys)
    call(["import", tmp_path / "peft", "--model", home / "model", "--out", tmp_path / "run"], capsys)
    ours, theirs = (rows(call(["inspect", directory], capsys)) for directory in (scanned, tmp_path / "run"))
    names = {f"params/layer_{i}/{rest}": f"params/layers/{rest}[{i}]" for i in range(2) for rest in
             ("mlp/up_proj/kernel", "self_attn/k_proj/kernel")}  # fmt: skip
    assert len(ours) == len(theirs) == 14
    for plain, stacked in names.items():
        assert ours[stacked][:3] == theirs[plain][:3]
        np.testing.assert_allclose(*([float(x) for x in row[3:]] for row in (ours[stacked], theirs[plain])), atol=0.011)


@pytest.mark.slow
def test_inspect_of_a_base_that_pissa_changed(home, tmp_path, capsys):
    """And of a run whose layers have magnitudes."""
    for more in (("--init", "pissa"), ("--dora",)):
        out = train(home, tmp_path / more[-1].strip("-"), "--scan-layers", *more, "--targets", "up_proj", steps=2)
        found = rows(call(["inspect", out], capsys))
        assert set(found) == {f"params/layers/mlp/up_proj/kernel[{i}]" for i in range(2)}
        assert all(float(row[3]) > 0 for row in found.values())


def test_merged(home, scanned, tmp_path, capsys):
    exported(scanned, "merged", tmp_path / "merged", capsys)
    ours, theirs = llama.load(tmp_path / "merged", scan_layers=True), llama.load(home / "model", scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, ours.variables, lj.merge(theirs.variables, adapters(scanned)))


@pytest.mark.slow
def test_a_quantised_base(home, tmp_path, capsys):
    given = ("--quantize", "nf4", "--block", 16, "--dtype", "bfloat16")
    out = train(home, tmp_path / "run", *SCANNED, *given, steps=2)
    assert call(["generate", out, "--prompt", "The cat", "--max-new-tokens", 2], capsys).startswith("The cat")
    assert len(exported(out, "peft", tmp_path / "peft", capsys)) == 28


@pytest.mark.slow
def test_a_sweep(home, tmp_path, capsys):
    """Each run is the one that `finetune` makes."""
    line = [*tiny_lm.options(home, tmp_path / "out", steps=3, rank=None, learning_rate=None), *SCANNED]
    call(["sweep", *line[1:], "--rank", 2, 4, "--learning-rate", 0.02], capsys)
    alone = train(home, tmp_path / "alone", *SCANNED, rank=2, steps=3)
    assert run.read_config(tmp_path / "out" / "1") == run.read_config(alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), adapters(tmp_path / "out" / "1"), adapters(alone))
    assert rows(call(["inspect", tmp_path / "out" / "2"], capsys))["params/layers/mlp/up_proj/kernel[1]"][:2] == ["32x48", "4"]


def test_runs_of_before_have_none_of_it(plain, tmp_path, capsys):
    """A run of format 5 that was stopped after its fifth step ends with the bits that it would have ended with."""
    shutil.copytree(plain, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    fields = json.loads(file.read_text())
    new = {"scan_layers": False, "remat": "none", "attention_block": None, "accumulate": 1, "model_commit": ""}
    assert {name: fields.pop(name) for name in new} == new
    file.write_text(json.dumps(fields | {"format_version": 5}))
    shutil.rmtree(tmp_path / "run" / "adapters" / "6")
    call(["finetune", "--resume", tmp_path / "run"], capsys)
    jax.tree.map(np.testing.assert_array_equal, adapters(tmp_path / "run"), adapters(plain))
    assert file.read_text() == (plain / "config.json").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--accumulate", 3], "accumulate=3 does not divide batch_size=4 into equal parts"),
        (["--accumulate", 0], "accumulate must be a whole number of at least 1, not 0"),
        (["--attention-block", 0], "attention_block must be at least 1, not 0"),
        (["--remat", "half"], "remat must be one of none, products, full, not 'half'"),
        (
            ["--mesh", "data=4", "--accumulate", 2],
            "a batch of 4 rows can't be cut into 2 equal microbatches (accumulate), each in",
        ),
    ],
)
def test_what_is_refused(home, tmp_path, capsys, given, message):
    if "--mesh" in given:
        given = ["--mesh", f"data={jax.device_count()}", "--batch-size", 8, *given[2:]]
        message = "a batch of 8 rows can't be cut into 2 equal microbatches (accumulate), each in 8 equal parts"
    assert message in call([*tiny_lm.options(home, tmp_path / "run"), *given], capsys, code=2)
    assert not (tmp_path / "run").exists()


def test_other_tasks_have_no_blocks_of_attention(capsys):
    assert "--attention-block is an option of --task lm and dpo" in call(["finetune", "--attention-block", 8], capsys, code=2)
