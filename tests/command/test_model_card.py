"""The model card of a PEFT export, and exports on the hub."""

import json
import pathlib
import re
import shutil
import sys

import huggingface_hub
import pytest
import safetensors.numpy

import lora_jax as lj
from lora_jax.command import cli, model_card, options, run
from lora_jax.command.metrics import read
from lora_jax.models import llama
from tests.support import gguf_adapters, gguf_write, hub, tiny, tiny_lm

pytestmark = pytest.mark.usefixtures("usual_promotion")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model with a run on it."""
    directory = tiny_lm.home(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert cli.main(tiny_lm.options(directory, directory / "run", steps=4, eval_every=2, targets="attention")) == 0
    return directory


def card(home, name, out):
    assert cli.main(["export", str(home / name), "--format", "peft", "--out", str(out)]) == 0
    return huggingface_hub.ModelCard.load(out / "README.md")


def test_a_trained_run(home, tmp_path):
    found = card(home, "run", tmp_path / "tiny-cats")
    assert found.data.to_dict() == {
        "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "transformers", "lora_jax"]
    }  # fmt: skip
    scores = {line["step"]: line["perplexity"] for line in read(home / "run") if line.get("perplexity")}
    assert f"| before | {scores[0]:.2f} |" in found.text and f"| after 4 steps | {scores[4]:.2f} |" in found.text
    config = run.read_config(home / "run")
    for said in (
        "# run",
        'PeftModel.from_pretrained(base, "path/to/these/files")',
        "| data | texts.jsonl |",
        "| steps | `4` |",
        '| targets | `["attention"]` |',
        config.data_sha256,
    ):
        assert said.replace('["attention"]', json.dumps(config.targets)) in found.text
    assert 'AutoModelForCausalLM.from_pretrained("path/to/the/base")' in found.text
    assert "vllm serve path/to/the/base --enable-lora --max-lora-rank 8 --lora-modules run=path/to/these/files" in found.text
    assert "## Notes" not in found.text
    assert str(home) not in found.content and "\n\n\n" not in found.content and "|  |" not in found.content


def test_the_adapters_of_the_best_test(home, tmp_path):
    words = tiny_lm.options(home, home / "best", steps=4, eval_every=2, keep="best", learning_rate=0.0001)
    assert cli.main(words) == 0
    lines = [json.loads(line) for line in (home / "best" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:  # the middle test is the best
        line |= {"perplexity": {0: 9.0, 2: 5.0, 4: 7.0}[line["step"]]} if line["perplexity"] else {}
    [kept] = (home / "best" / "best").iterdir()
    kept.rename(kept.with_name("2"))
    (home / "best" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "| after 2 of 4 steps | 5.00 |" in card(home, "best", tmp_path / "out").text


def test_a_run_that_was_stopped(home, tmp_path):
    """Its newest adapters are of a step that was not measured."""
    shutil.copytree(home / "run", tmp_path / "run")
    for line in (found := read(home / "run")):
        line |= {"perplexity": None} if line["step"] == 4 else {}
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    assert "| after 4 steps | not measured |" in card(tmp_path, "run", tmp_path / "out").text


def test_runs_without_training_have_no_results(home, tmp_path):
    assert cli.main(["merge", str(home / "run"), str(home / "run"), "--out", str(home / "both")]) == 0
    card(home, "run", tmp_path / "peft")
    words = ["import", str(tmp_path / "peft"), "--model", str(home / "model"), "--out", str(home / "imported")]
    assert cli.main(words) == 0
    merged, imported = (card(home, name, tmp_path / name).text for name in ("both", "imported"))
    assert "made of other adapters with `lora-jax merge`, without training" in merged and '"runs": ["run", "run"]' in merged
    assert "imported from another PEFT directory" in imported
    for text in (merged, imported):
        assert not re.search("Results|Training|data|learning_rate", text) and str(home) not in text


def test_a_base_that_is_on_the_hub_too(home, tmp_path, capsys):
    """Its name is that of `--base-model`; one that imported adapters have is said."""
    named = ["--base-model", "some-owner/tiny"]
    words = ["export", str(home / "run"), "--format", "peft", "--out", str(tmp_path / "peft")]
    assert cli.main([*words, *named]) == 0
    found = huggingface_hub.ModelCard.load(tmp_path / "peft" / "README.md")
    assert found.data.base_model == "some-owner/tiny" and 'from_pretrained("some-owner/tiny")' in found.text
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "some-owner/tiny"
    capsys.readouterr()
    words = ["import", str(tmp_path / "peft"), "--model", str(home / "model"), "--out", str(tmp_path / "run")]
    assert cli.main(words) == 0
    assert (
        "name some-owner/tiny as their base; files of `lora-jax export --base-model some-owner/tiny` name it"
        in capsys.readouterr().err
    )
    refused = {
        ("merged", *named): "--base-model is for the formats peft and gguf",
        ("peft", "--base-model", "tiny"): "--base-model is OWNER/NAME, what the hub calls the base, not 'tiny'",
        ("peft", "--base-model", "some-owner/tiny@main"): "not 'some-owner/tiny@main'",
    }
    for more, message in refused.items():
        assert cli.main(["export", str(home / "run"), "--out", str(tmp_path / "not"), "--format", *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "not").exists()


def test_a_run_that_went_on_with_other_adapters(home, tmp_path):
    """Its rank, scale and targets are those of the adapters, also where they were rsLoRA's."""
    model = llama.load(home / "model")
    lora = lj.LoraConfig(rank=2, alpha=6.0, scaling="rslora", targets=["q_proj"])
    lj.peft.save(tmp_path / "given", gguf_adapters.drawn(model, lora), names=model.names, config=lora)
    words = tiny_lm.options(home, tmp_path / "run", rank=None, steps=1)
    assert cli.main([*words, "--adapter", str(tmp_path / "given")]) == 0
    text = card(tmp_path, "run", tmp_path / "out").text
    assert "| rank | `2` |" in text and '| targets | `["q_proj"]` |' in text
    [alpha] = re.findall(r"\| alpha \| `([\d.]+)` \|", text)
    assert float(alpha) / 2 == pytest.approx(6 / 2**0.5)


def test_vera_has_no_alpha(home, tmp_path):
    assert cli.main(tiny_lm.options(home, tmp_path / "vera", steps=1, method="vera", targets="q_proj")) == 0
    assert cli.main([*tiny_lm.options(home, tmp_path / "run", rank=None, steps=1), "--adapter", str(tmp_path / "vera")]) == 0
    text = card(tmp_path, "run", tmp_path / "out").text
    assert "| rank | `4` |" in text and "| alpha |" not in text


def test_a_classifier(tmp_path):
    tiny.home(tmp_path)
    assert cli.main(tiny.options(tmp_path, tmp_path / "run", steps=2)) == 0
    found = card(tmp_path, "run", tmp_path / "out")
    assert found.data.pipeline_tag == "text-classification" and "| labels | bad, good |" in found.text
    assert "num_labels=2, ignore_mismatched_sizes=True" in found.text and "vLLM" not in found.text
    assert re.search(r"\| before \| [\d.]+% \|", found.text)


def test_the_title_is_that_of_the_run(home, monkeypatch):
    """Also where the export is in RUN/peft, and the run is the working directory."""
    monkeypatch.chdir(home / "run")
    assert cli.main(["export", ".", "--format", "peft"]) == 0
    assert huggingface_hub.ModelCard.load("peft/README.md").text.strip().startswith("# run\n")


def test_notes_of_a_mean_pooled_classifier(tmp_path, capsys):
    tiny.home(tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    safetensors.numpy.save_file({name: x for name, x in tensors.items() if "classifier" not in name}, weights)
    (tmp_path / "model" / "modules.json").write_text("[]")
    pooling = tmp_path / "model" / "1_Pooling" / "config.json"
    pooling.parent.mkdir()
    pooling.write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    assert cli.main(tiny.options(tmp_path, tmp_path / "run", steps=1)) == 0
    found = card(tmp_path, "run", tmp_path / "out")
    assert "\n## Notes\n\n- The head of this model reads the mean of the tokens alone; BertForSequence" in found.text
    assert "note: the head of this model reads the mean of the tokens alone" in capsys.readouterr().err


def test_notes_of_a_quantised_run_on_a_gguf_file(tmp_path):
    """With pairs of several ranks."""
    base = gguf_write.write(tmp_path / "tiny.gguf", "base", tokens=True)
    lora = lj.LoraConfig(**gguf_adapters.EVERYTHING)
    adapters = gguf_adapters.drawn(llama.load(base), lora)
    run.create(tmp_path / "run", options.RunConfig(task="lm", model=str(base), quantize="int8", block=16))
    lj.checkpoint.save(tmp_path / "run" / "adapters", adapters, config=lora)
    text = card(tmp_path, "run", tmp_path / "out").text
    for said in (
        "- The adapters were trained beside kernels quantised to int8; with the base as it is stored",
        "- The adapters were trained on the weights of a GGUF file, which PEFT can't apply them to",
        "- The pairs have several ranks or scales",
        "| base | `tiny.gguf` |",
    ):
        assert said in text
    assert "vLLM" not in text and '| quantize | `"int8"` |' in text and "adapter_config.json names it" not in text


PLAIN = {"peft_type": "LORA", "r": 4, "bias": "none", "rank_pattern": {}}


def made_card(directory, task, **fields):
    """The card of a run that was not trained here, with these fields of `adapter_config.json`."""
    (directory / "adapter_config.json").write_text(json.dumps(PLAIN | fields))
    config = options.RunConfig(task=task, imported="peft", labels=["a", "b"] if task == "images" else [])
    where = {"base": "some-owner/tiny", "is_of_the_hub": True, "name": "run", "repository": None}
    model_card.Card(config=config, lines=[], step=None, notes=[], **where).write(directory)
    return huggingface_hub.ModelCard.load(directory / "README.md")


def test_images(tmp_path):
    found = made_card(tmp_path, "images")
    assert found.data.pipeline_tag == "image-classification" and "vLLM" not in found.text
    assert 'AutoModelForImageClassification.from_pretrained("some-owner/tiny", num_labels=2' in found.text


@pytest.mark.parametrize(
    ("task", "fields", "tags"),
    [("lm", {"use_dora": True}, ["lora", "dora"]), ("dpo", {}, ["lora", "dpo"]), ("lm", {}, ["lora"])],
)
def test_tags(task, fields, tags, tmp_path):
    found = made_card(tmp_path, task, **fields).data
    assert found.tags == ["base_model:adapter:some-owner/tiny", *tags, "transformers", "lora_jax"]
    assert (found.base_model, found.pipeline_tag) == ("some-owner/tiny", "text-generation")


@pytest.mark.parametrize(
    "fields",
    [
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"use_dora": True},
        {"lora_bias": True},
        {"alora_invocation_tokens": [3]},
        {"bias": "all"},
        {"peft_type": "VERA"},
    ],
)
def test_what_vllm_does_not_serve(fields, tmp_path):
    assert "With vLLM" in made_card(tmp_path, "lm").text
    assert "vLLM" not in made_card(tmp_path, "lm", **fields).text


# --- the hub ----------------------------------------------------------------------------------------------------------

CALL = "import sys; from lora_jax.command import cli; sys.exit(cli.main(sys.argv[1:]))"
FETCH = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1]))"


def push(directory, form, out, *more, name="tester/cats", **where):
    return hub.python(CALL, "export", directory / "run", "--format", form, "--out", out, "--push-to-hub", name, *more, **where)


@pytest.mark.parametrize(
    ("form", "more", "message"),
    [
        ("peft", ["--private", "--commit-message", "All cats"], "All cats"),
        ("merged", [], "Upload model"),
        ("gguf", [], "Upload adapters"),
    ],
)
def test_what_arrives_is_the_export(form, more, message, home, tmp_path):
    with hub.serving() as server:
        server.uploads = tmp_path / "uploads"
        where = {"home": tmp_path / "cache", "hub": server, "token": server.token}
        said = push(home, form, tmp_path / "out", *more, **where)
        assert said.splitlines()[-1] == f"pushed: http://127.0.0.1:{server.server_port}/tester/cats", said
        assert server.private == ({"tester/cats"} if "--private" in more else set()) and server.commits == [message]
        fetched = hub.python(FETCH, "tester/cats", **where)
        content = lambda directory: {file.name: file.read_bytes() for file in directory.iterdir()}
        assert content(pathlib.Path(fetched)) == content(tmp_path / "out")
        assert not [name for name, text in content(tmp_path / "out").items() if str(home).encode() in text]
        if form == "peft":
            assert push(home, form, tmp_path / "again", "--private", **where).startswith("written")
            assert server.commits[1] == "Upload adapters"
    if form == "peft":
        words = ["import", fetched, "--model", str(home / "model"), "--out", str(tmp_path / "imported")]
        assert cli.main(words) == 0
        card = (tmp_path / "out" / "README.md").read_text()
        assert (
            '"tester/cats")' in card and "# cats\n" in card and "adapter_config.json names it 'model', without the path" in card
        )
        assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "model"


@pytest.mark.slow
def test_what_a_push_needs_is_said_before_any_work(home, tmp_path):
    out = tmp_path / "out"
    with hub.serving() as server:
        server.uploads = tmp_path / "uploads"
        where = {"home": tmp_path / "cache", "hub": server, "token": server.token}
        assert "'cats' is no name of a repository" in push(home, "peft", out, name="cats", **where)
        assert "is no name of a repository" in push(home, "peft", out, name="tester/cats@v1", **where)
        assert "nobody is logged in to the Hugging Face hub" in push(home, "peft", out, **{**where, "token": None})
        assert "tester/cats can't be pushed to" in push(home, "peft", out, **{**where, "token": "hf_other"})
        said = push(home, "peft", out, name="another/cats", **where)
        assert "another/cats is not yours: give one of tester, a-club as its owner" in said
        server.role = "read"
        assert "the token only reads: make one that may write" in push(home, "peft", out, **where)
        server.role = "write"
        server.add("tester/cats", home / "model")
        assert "tester/cats is there already and is public" in push(home, "peft", out, "--private", **where)
        assert not server.commits
    assert "can't be pushed to" in push(home, "peft", out, home=tmp_path / "cache", token="hf_some")  # offline
    assert not out.exists()


def test_a_push_that_fails_late_can_be_tried_again(home, tmp_path):
    """With a token that does not say what it may do, for an organisation."""
    out = tmp_path / "all cats"
    with hub.serving() as server:
        server.uploads, server.role, server.refuses = tmp_path / "uploads", "fineGrained", True
        where = {"home": tmp_path / "cache", "hub": server, "token": server.token}
        said = push(home, "peft", out, "--private", name="A-Club/cats", **where)
    again = f"`hf upload A-Club/cats '{out}' --private --commit-message 'Upload adapters'` sends it"
    assert "A-Club/cats can't be pushed to" in said and said.endswith(f"; the export is in {out}, and {again}")
    assert (out / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("more", [["--private"], ["--commit-message", "All cats"]])
def test_options_of_a_push_alone(more, home, tmp_path, capsys):
    assert cli.main(["export", str(home / "run"), "--format", "peft", "--out", str(tmp_path / "out"), *more]) == 2
    assert "--private and --commit-message need --push-to-hub" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_package(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    words = ["export", str(home / "run"), "--format", "peft", "--out", str(tmp_path / "out"), "--push-to-hub", "a/b"]
    assert cli.main(words) == 2
    assert "pip install 'lora-jax[hub]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
