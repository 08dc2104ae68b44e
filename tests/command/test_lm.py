"""Runs of the task lm on a tiny Llama: training, going on, generating, and the way to other tools and back."""

import dataclasses
import json
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax as lj
from lora_jax.command import cli, finetune, hf_export, inspect, metrics, run
from lora_jax.command.options import RunConfig
from lora_jax.command.tasks import registry
from lora_jax.data import tokenizer
from lora_jax.models import llama
from tests.support import gguf_write, interrupting, tiny, tiny_lm
from tests.support.calling import call
from tests.support.run_lines import lasting

pytestmark = pytest.mark.usefixtures("usual_promotion")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tiny_lm.home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def reference(home):
    """A run that was never stopped."""
    assert cli.main(tiny_lm.options(home, home / "reference")) == 0
    return home / "reference"


def same_files(one, two):
    ours, theirs = (jax.tree.leaves(lj.checkpoint.load(d / "adapters")) for d in (one, two))
    assert len(ours) == len(theirs) > 20
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(ours, theirs))
    assert lasting(one) == lasting(two)
    for file in ("curve.png", "config.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


def test_perplexity_falls(reference):
    lines = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(31)) and all(
        tuple(line) == ("step", "loss", "perplexity", "learning_rate", "grad_norm", "skipped", "tokens_per_second")
        for line in lines
    )
    measured = {line["step"]: line["perplexity"] for line in lines if line["perplexity"] is not None}
    assert list(measured) == [0, 10, 20, 30]
    assert measured[0] > 200 and measured[30] < 0.2 * measured[0]
    config = run.read_config(reference)
    assert (config.task, config.labels, len(config.data_sha256), len(config.date)) == ("lm", [], 64, 10)


def test_perplexity_is_that_of_each_text_alone(home, reference):
    """The first perplexity of the run, from the texts themselves."""
    loaded = llama.load(home / "model")
    session = registry.prepare(run.read_config(reference))
    logits_of = jax.jit(loaded.apply)
    total, count = 0.0, 0
    for batch in session.task.test_batches():
        for ids, segments, targets in zip(batch["input_ids"], batch["segment_ids"], batch["targets"]):
            for segment in range(1, segments.max() + 1):
                [here] = np.nonzero(segments == segment)
                alone = np.zeros((1, len(ids)), np.int32)
                alone[0, : len(here)] = ids[here]
                logits = np.asarray(logits_of(loaded.variables, alone), np.float64)[0, : len(here) - 1]
                chosen = logits[np.arange(len(here) - 1), ids[here[1:]]]
                losses = np.log(np.exp(logits).sum(-1)) - chosen
                total, count = total + losses @ targets[here[1:]], count + targets[here].sum()
    assert metrics.read(reference)[0]["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-5)


def test_the_loss_of_a_batch_is_a_sum_of_its_parts(reference):
    task = registry.prepare(run.read_config(reference)).task
    batch = next(task.train_batches(0))
    batch["targets"] = batch["targets"] & (np.arange(48) < np.array([[48], [20], [3], [1]]))  # the first place follows nothing
    params = lj.attach(task.variables, lj.checkpoint.load(reference / "adapters"))
    loss = lambda rows: task.loss(params, {name: array[rows] for name, array in batch.items()}, jax.random.key(0))
    whole, parts = loss(slice(0, 4)), [loss(slice(i, i + 1)) for i in range(4)]
    assert isinstance(whole, lj.train.Weighted) and parts[3].weight == 0 == parts[3].total
    assert int(whole.weight) == batch["targets"][:, 1:].sum() == sum(int(part.weight) for part in parts)
    assert float(whole.total) == pytest.approx(sum(float(part.total) for part in parts), rel=1e-6)


def test_a_stopped_run_ends_alike(home, reference, tmp_path, capsys, monkeypatch):
    directory, arguments = tmp_path / "run", tiny_lm.options(home, tmp_path / "run")
    for stop, signum, code in ((8, signal.SIGINT, 130), (21, signal.SIGTERM, 143)):
        with monkeypatch.context() as patch:
            interrupting.at_step(patch, stop, signum)
            assert f"finetune --resume {directory}" in call(arguments, capsys, code=code)
        assert lj.checkpoint.restore(directory / "adapters").step == stop
        arguments = ["finetune", "--resume", directory]
    printed = call(arguments, capsys)
    assert "held-out perplexity on " in printed and " tokens: " in printed
    same_files(directory, reference)


def test_generate(home, reference, capsys):
    asked = ["generate", reference, "--prompt", "The cat", "--max-new-tokens", 12]
    greedy = call(asked, capsys)
    assert greedy.startswith("The cat") and greedy == call(asked, capsys)
    loaded = llama.load(home / "model")
    merged = lj.merge(loaded.variables, lj.checkpoint.load(reference / "adapters"))
    ids, logits_of = tiny_lm.tokenizer().encode("The cat").ids, jax.jit(loaded.apply)
    for _ in range(12):
        padded = np.zeros((1, 32), np.int32)  # of one shape; what comes later is not seen
        padded[0, : len(ids)] = ids
        ids.append(int(logits_of(merged, padded)[0, len(ids) - 1].argmax()))
        if ids[-1] == 2:
            break
    assert greedy == tiny_lm.tokenizer().decode(ids) + "\n"
    assert call([*asked, "--base"], capsys) != greedy
    drawn = [call([*asked, "--temperature", 3, "--seed", seed], capsys) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert not call([*asked, "--chat"], capsys).startswith("The cat")


def test_inspect(reference, capsys):
    rows = {line.split()[0]: line.split()[1:] for line in call(["inspect", reference], capsys).splitlines()[1:]}
    assert set(rows) == set(lj.checkpoint.load(reference / "adapters"))
    assert rows["params/layer_0/mlp/up_proj/kernel"][:3] == ["32x48", "4", "4"]
    assert float(rows["params/layer_0/mlp/up_proj/kernel"][3]) > 0.01


def test_inspect_with_a_magnitude():
    """With m twice the norm of W + s A B, the kernel acts as 2 (W + s A B)."""
    weight, a, b = (
        np.random.default_rng(i).normal(size=shape).astype(np.float32) for i, shape in enumerate([(6, 5), (6, 2), (2, 5)])
    )
    whole = weight + 0.5 * a @ b
    magnitude = jnp.asarray(2 * np.linalg.norm(whole, axis=0))
    layout = lj.Layout((), (0,), (1,))
    pair = lj.LowRank(
        jnp.asarray(a), jnp.asarray(b), layout, scale=0.5, magnitude=magnitude, bias=jnp.ones(5), bias_path="bias"
    )
    [row] = inspect._rows({"w": pair}, {"w": weight})
    change = 2 * whole - weight
    assert (row.shape, row.rank, row.scale) == ((6, 5), 2, 0.5)
    assert row.change == pytest.approx(np.linalg.norm(change) / np.linalg.norm(weight), rel=1e-5)
    assert row.effective_rank == pytest.approx(
        float(lj.algebra.effective_rank(jnp.linalg.svd(change, compute_uv=False))), rel=1e-5
    )
    assert inspect._rows({"w": pair}, {})[0].change is None


# --- other tools ------------------------------------------------------------------------------------------------------


def tensors(directory):
    return safetensors.numpy.load_file(directory / "adapter_model.safetensors")


def test_peft_and_back(home, reference, tmp_path, capsys):
    printed = call(["export", reference, "--format", "peft", "--out", tmp_path / "a"], capsys)
    size = sum(file.stat().st_size for file in (tmp_path / "a").iterdir())
    assert printed == f"written: {tmp_path / 'a'} ({size:,} bytes)\n"
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (fields["task_type"], fields["r"], fields["lora_alpha"]) == ("CAUSAL_LM", 4, 16)
    assert fields["base_model_name_or_path"] == str(home / "model")
    call(["import", tmp_path / "a", "--model", home / "model", "--out", tmp_path / "run"], capsys)
    ask = ["generate", "RUN", "--prompt", "The owl", "--max-new-tokens", 8]
    both = [call([directory if word == "RUN" else word for word in ask], capsys) for directory in (reference, tmp_path / "run")]
    assert both[0] == both[1]
    assert "32x48" in call(["inspect", tmp_path / "run"], capsys)
    call(["export", tmp_path / "run", "--format", "peft", "--out", tmp_path / "b"], capsys)
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert len(first) == 28 and {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in second.items()}
    again = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert {k: again[k] for k in ("r", "lora_alpha", "task_type")} == {k: fields[k] for k in ("r", "lora_alpha", "task_type")}
    assert "there is no training to go on with" in call(["finetune", "--resume", tmp_path / "run"], capsys, code=2)


@pytest.mark.parametrize("shards", [1, 2])
def test_merged(home, reference, tmp_path, capsys, monkeypatch, shards):
    whole = (home / "model" / "model.safetensors").stat().st_size
    monkeypatch.setattr(hf_export, "SHARD_BYTES", whole if shards == 1 else whole // 2)
    call(["export", reference, "--format", "merged", "--out", tmp_path / "out"], capsys)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == shards
    ours, theirs = llama.load(home / "model"), llama.load(tmp_path / "out")
    ids = jnp.arange(20)[None] * 7
    params = lj.merge(ours.variables, lj.checkpoint.load(reference / "adapters"))
    np.testing.assert_array_equal(ours.apply(params, ids), theirs.apply(theirs.variables, ids))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (home / "model" / name).read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    refusal = call(["export", reference, "--format", "merged", "--out", tmp_path / "out"], capsys, code=2)
    assert "is not an empty directory" in refusal
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refusal = call(["export", reference, "--format", "merged", "--out", "."], capsys, code=2)
    assert "is where you are, and can't be replaced: choose another --out" in refusal


def test_merged_keeps_the_dtypes_of_the_base(home, reference, tmp_path, capsys):
    base = tmp_path / "model"
    shutil.copytree(home / "model", base)
    half = safetensors.numpy.load_file(base / "model.safetensors")
    half = {name: tensor.astype(jnp.bfloat16) if "mlp" in name else tensor for name, tensor in half.items()}
    safetensors.numpy.save_file(half, base / "model.safetensors")
    shutil.copytree(reference, tmp_path / "run")
    fields = json.loads((reference / "config.json").read_text()) | {"model": str(base), "model_sha256": "", "dtype": "bfloat16"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(fields))
    call(["export", tmp_path / "run", "--format", "merged", "--out", tmp_path / "out"], capsys)
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in written.items()} == {name: tensor.dtype for name, tensor in half.items()}
    assert call(["generate", tmp_path / "run", "--prompt", "The bee", "--max-new-tokens", 4], capsys).startswith("The bee")


def test_merged_of_a_gguf_file(tmp_path, capsys):
    base = gguf_write.write(tmp_path / "tiny.gguf", "base", tokens=True)
    config = RunConfig(task="lm", model=str(base), rank=2)
    run.create(tmp_path / "run", config)
    loaded = llama.load(base)
    adapters = lj.init(jax.random.key(0), config.lora, loaded.apply, loaded.variables, jnp.zeros((1, 4), jnp.int32))
    adapters = {path: dataclasses.replace(pair, b=jnp.ones_like(pair.b)) for path, pair in adapters.items()}
    lj.checkpoint.save(tmp_path / "run" / "adapters", adapters, config=config.lora)
    call(["export", tmp_path / "run", "--format", "merged", "--out", tmp_path / "out"], capsys)
    merged, ids = llama.load(tmp_path / "out"), jnp.arange(9)[None]
    want = loaded.apply(lj.merge(loaded.variables, adapters), ids)
    np.testing.assert_array_equal(merged.apply(merged.variables, ids), want)
    assert np.abs(want - loaded.apply(loaded.variables, ids)).max() > 0.1
    ours, theirs = (tokenizer.load(source, loaded.config.vocab_size) for source in (base, tmp_path / "out"))
    text = "hello <|user|> hold 12"
    assert ours.ids([text])[0].tolist() == theirs.ids([text])[0].tolist()
    assert (ours.special_tokens, ours.template) == (theirs.special_tokens, theirs.template)
    assert cli.main(["export", str(tmp_path / "run"), "--format", "peft", "--out", str(tmp_path / "peft")]) == 0
    assert "note: the adapters were trained on the weights of a GGUF file" in capsys.readouterr().err


KINDS = {
    "texts.txt": (
        "\n\n\n".join("The cat meows. " * i for i in range(1, 30)),
        r"\d+ texts were longer than a row and were split",
    ),
    "texts.csv": ("prompt,completion\n" + "".join(f"The cat{'.' * i},meows {i}\n" for i in range(60)), "pairs were left out"),
    "texts.jsonl": (
        "".join(
            json.dumps(
                {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "moos " * (1 + i % 8)}]}
            )
            + "\n"
            for i in range(40)
        ),
        "chats were longer than a row and were cut at their end",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_the_other_kinds_of_data(home, tmp_path, capsys, name):
    content, said = KINDS[name]
    (tmp_path / name).write_text(content)
    options = tiny_lm.options(home, tmp_path / "run", data=tmp_path / name, steps=2, dtype="bfloat16", held_out=50)
    printed = call(options, capsys)
    assert "documents to train on" in printed and "documents held out" in printed
    assert re.search(said, printed), printed
    assert metrics.read(tmp_path / "run")[-1]["perplexity"] > 1


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The base of classifiers, beside reviews."""
    return tiny.home(tmp_path_factory.mktemp("home")) / "model"


@pytest.fixture(scope="module")
def classifier(bert):
    """A run of two steps of the other task."""
    home = bert.parent
    assert cli.main(tiny.options(home, home / "classifier", steps=2)) == 0
    return home / "classifier"


def test_a_classifier_there_and_back(bert, classifier, tmp_path, capsys):
    call(["export", classifier, "--format", "peft", "--out", tmp_path / "a"], capsys)
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert fields["task_type"] == "SEQ_CLS" and fields["modules_to_save"] == ["classifier"]
    assert all(name.startswith("base_model.model.") for name in tensors(tmp_path / "a"))
    call(["import", tmp_path / "a", "--model", bert, "--out", tmp_path / "run"], capsys)
    call(["export", tmp_path / "run", "--format", "peft", "--out", tmp_path / "b"], capsys)
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in second.items()}
    said = [call(["predict", run, "--text", "good film"], capsys).split("\t")[1] for run in (classifier, tmp_path / "run")]
    assert said[0] == said[1]
    call(["export", classifier, "--format", "merged", "--out", tmp_path / "out"], capsys)
    loaded = lj.models.bert.load(tmp_path / "out")
    assert loaded.labels == ("bad", "good") and not loaded.new
    base = lj.models.bert.load(bert, num_labels=2)
    params = lj.merge(base.variables, lj.checkpoint.load(classifier / "adapters"))
    ids = jnp.arange(6)[None]
    np.testing.assert_array_equal(loaded.apply(loaded.variables, ids), base.apply(params, ids))


def test_a_head_that_is_the_base_s_is_written_in_its_own_dtype(bert, classifier, tmp_path, capsys):
    """PEFT looks for it whenever it loads a classifier's adapters."""
    shutil.copytree(bert, tmp_path / "bert")
    weights = safetensors.numpy.load_file(tmp_path / "bert" / "model.safetensors")
    half = {name: tensor.astype(jnp.bfloat16) for name, tensor in weights.items()}
    safetensors.numpy.save_file(half, tmp_path / "bert" / "model.safetensors")
    call(["export", classifier, "--format", "peft", "--out", tmp_path / "a"], capsys)
    pairs = {name: tensor for name, tensor in tensors(tmp_path / "a").items() if "classifier" not in name}
    safetensors.numpy.save_file(pairs, tmp_path / "a" / "adapter_model.safetensors")
    fields = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(fields | {"modules_to_save": None}))
    call(["import", tmp_path / "a", "--model", tmp_path / "bert", "--out", tmp_path / "run"], capsys)
    call(["export", tmp_path / "run", "--format", "peft", "--out", tmp_path / "b"], capsys)
    written = tensors(tmp_path / "b")
    [head] = [name for name in written if name.endswith("classifier.weight")]
    np.testing.assert_array_equal(written[head], half["classifier.weight"], strict=True)
    assert {name: written[name].dtype for name in pairs} == {name: np.float32 for name in pairs}


def test_a_pooling_that_transformers_lacks(bert, tmp_path, capsys):
    shutil.copytree(bert, tmp_path / "bert")
    weights = safetensors.numpy.load_file(tmp_path / "bert" / "model.safetensors")
    encoder = {name: tensor for name, tensor in weights.items() if "classifier" not in name}
    safetensors.numpy.save_file(encoder, tmp_path / "bert" / "model.safetensors")
    (tmp_path / "bert" / "modules.json").write_text("[]")
    (tmp_path / "bert" / "1_Pooling").mkdir()
    (tmp_path / "bert" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    config = RunConfig(model=str(tmp_path / "bert"), labels=["bad", "good"], max_length=16, rank=2)
    run.create(tmp_path / "classifier", config)
    base = lj.models.bert.load(tmp_path / "bert", num_labels=2)
    adapters = lj.init(jax.random.key(0), config.lora, base.apply, base.variables, jnp.zeros((1, 4), jnp.int32))
    lj.checkpoint.save(tmp_path / "classifier" / "adapters", adapters, config=config.lora)
    refusal = call(["export", tmp_path / "classifier", "--format", "merged", "--out", tmp_path / "out"], capsys, code=2)
    assert (
        "reads the mean of the tokens alone, but transformers' BertForSequenceClassification has more layers there" in refusal
    )
    assert not (tmp_path / "out").exists()
    assert cli.main(["export", str(tmp_path / "classifier"), "--format", "peft"]) == 0
    assert "note: the head of this model reads the mean" in capsys.readouterr().err
    assert (tmp_path / "classifier" / "peft" / "adapter_config.json").is_file()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_runs_of_the_other_task(reference, classifier, capsys):
    assert "use `lora-jax generate` with it, not `predict`" in call(["predict", reference, "--text", "a"], capsys, code=2)
    assert "use `lora-jax predict` with it, not `generate`" in call(["generate", classifier, "--prompt", "a"], capsys, code=2)


GENERATE = {
    "no tokens": (["--max-new-tokens", 0], "--max-new-tokens must be at least 1, not 0"),
    "temperature": (["--temperature", -1], "--temperature must be at least 0 and finite, not -1.0"),
    "seed": (["--seed", -1], "--seed must be at least 0, not -1"),
    "too long": (["--max-new-tokens", 64], "are more than the model's 64 positions"),
    "empty": (["--prompt", ""], "the prompt is empty"),
}


@pytest.mark.parametrize("case", GENERATE)
def test_bad_generate(reference, capsys, case):
    arguments, message = GENERATE[case]
    assert message in call(["generate", reference, "--prompt", "The", *arguments], capsys, code=2)


def drop(file, *names):
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in fields.items() if key not in names}))


FINETUNE = {
    "no model": (None, {"model": "nothing"}, "there is no directory"),
    "no data": (None, {"data": "nothing.txt"}, "there is no file"),
    "another task's option": (None, {"label_field": "label"}, "--label-field is an option of --task classify"),
    "dtype": (None, {"dtype": "int8"}, "dtype must be one of float32, bfloat16, not 'int8'"),
    "float16": (None, {"dtype": "float16"}, "dtype float16 is not for training: without a loss scale, gradients below 6e-8"),
    "held out": (None, {"held_out": 0}, "held_out must be a whole number of at least 1"),
    "row": (None, {"max_length": 65}, "max_length 65 is above the 64 positions of the model"),
    "no end mark": (lambda home: drop(home / "model" / "tokenizer_config.json", "eos_token"), {}, "names no eos_token"),
    "no tokenizer": (lambda home: (home / "model" / "tokenizer.json").unlink(), {}, "has no tokenizer.json"),
    "other architecture": (lambda home: (home / "model" / "config.json").write_text('{"model_type": "bert"}'), {}, "model_type"),
    "tokenizer settings": (lambda home: (home / "model" / "tokenizer_config.json").write_text("["), {}, "is not JSON"),
    "columns": (lambda home: (home / "texts.jsonl").write_text('{"a": 1}\n'), {}, "must have the columns of one kind of data"),
    "little": (lambda home: (home / "texts.jsonl").write_text('{"text": "a"}\n'), {}, "the data is too little"),
}  # fmt: skip


@pytest.mark.parametrize("case", FINETUNE)
def test_bad_finetune(home, tmp_path, capsys, monkeypatch, case):
    spoil, changes, message = FINETUNE[case]
    shutil.copytree(home / "model", tmp_path / "model")
    shutil.copy(home / "texts.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(finetune, "_train")
    if spoil:
        spoil(tmp_path)
    assert message in call(tiny_lm.options(tmp_path, tmp_path / "run", **changes), capsys, code=2)
    assert not (tmp_path / "run").exists()


def test_a_template_that_hides_the_turns(home, tmp_path, capsys):
    shutil.copytree(home / "model", tmp_path / "model")
    source = "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(source)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    (tmp_path / "texts.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    refusal = call(tiny_lm.options(tmp_path, tmp_path / "run"), capsys, code=2)
    assert "texts.jsonl, line 1: the chat template writes what is before the assistant's turn (message 2) in" in refusal


def test_resume_with_changed_data(home, reference, tmp_path, capsys):
    shutil.copytree(reference, tmp_path / "run")
    tiny_lm.texts(tmp_path / "texts.jsonl", count=20)
    fields = json.loads((reference / "config.json").read_text()) | {"data": str(tmp_path / "texts.jsonl")}
    (tmp_path / "run" / "config.json").write_text(json.dumps(fields))
    assert "has changed since the run began" in call(["finetune", "--resume", tmp_path / "run"], capsys, code=2)


def test_resume_with_another_tokenizer(home, reference, tmp_path, capsys):
    """The weights are the same, but the ids would mean other words."""
    shutil.copytree(reference, tmp_path / "run")
    shutil.copytree(home / "model", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    fields = json.loads(file.read_text())
    del fields["model"]["merges"][5:]
    file.write_text(json.dumps(fields))
    options = json.loads((reference / "config.json").read_text()) | {"model": str(tmp_path / "model")}
    (tmp_path / "run" / "config.json").write_text(json.dumps(options))
    assert "the same texts have other tokens than when the run began" in call(
        ["finetune", "--resume", tmp_path / "run"], capsys, code=2
    )
    old = {name: value for name, value in options.items() if name != "tokens_sha256"} | {"format_version": 4}
    assert run.RunConfig.from_json(json.dumps(old), "config.json").tokens_sha256 == ""  # which fits any tokens


def test_bad_import(home, reference, tmp_path, capsys):
    call(["export", reference, "--format", "peft", "--out", tmp_path / "a"], capsys)
    into = ["import", tmp_path / "a", "--out", tmp_path / "run", "--model"]
    assert "there is no directory" in call([*into, tmp_path / "nothing"], capsys, code=2)
    tiny_lm.model(tmp_path / "wider", hidden_size=64, head_dim=16)
    assert "shape" in call([*into, tmp_path / "wider"], capsys, code=2)
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"\0" * 40)
    assert "adapter_model.safetensors" in call([*into, home / "model"], capsys, code=2)
    assert "is not an empty directory" in call([*into[:3], home, *into[4:], home / "model"], capsys, code=2)
    assert "has no " in call(["import", home, "--model", home / "model", "--out", tmp_path / "run"], capsys, code=2)
    assert not (tmp_path / "run").exists()
