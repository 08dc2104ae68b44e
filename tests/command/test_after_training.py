"""What one does with runs: `eval`, `merge`, `rank` and `chat`, on tiny models."""

import dataclasses
import datetime
import io
import json
import math
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.command import chat, cli, run
from lora_jax.command.options import DrawOptions
from lora_jax.command.tasks import labels
from lora_jax.data import language
from lora_jax.data import tokenizer as text_tokenizer
from lora_jax.models import generation, llama
from tests.support import tiny, tiny_lm
from tests.support.calling import call
from tests.support.marks import every_other

pytestmark = pytest.mark.usefixtures("usual_promotion")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny_lm.model(home / "model", max_position_embeddings=256)
    tiny_lm.texts(home / "texts.jsonl")
    return home


def altered(source, directory, **changes):
    """A copy of a run, other options in its `config.json`."""
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return directory


def drawn(first, directory, seed, scan_layers=False, **changes):
    """A run on the same base with random adapters."""
    config = dataclasses.replace(run.read_config(first), scan_layers=scan_layers)
    loaded, key = llama.load(config.model, scan_layers=scan_layers), jax.random.key(seed)
    made = lj.init(key, lj.LoraConfig(**changes), loaded.apply, loaded.variables, jnp.ones((1, 4), jnp.int32))
    moved = {path: dataclasses.replace(a, b=jax.random.normal(key, a.b.shape)) for path, a in made.items()}
    run.derive(directory, config, moved, {"command": "test"})
    return directory


@pytest.fixture(scope="module")
def first(home):
    assert cli.main(tiny_lm.options(home, home / "first")) == 0
    return home / "first"


@pytest.fixture(scope="module")
def second(home, first):
    """Of another rank and scale, and of fewer targets."""
    return drawn(first, home / "second", 1, rank=2, alpha=5, targets="attention")


@pytest.fixture(scope="module")
def third(home, first):
    """What can be mixed with the first one, value by value."""
    return drawn(first, home / "third", 2, rank=4)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    home = tiny.home(tmp_path_factory.mktemp("classifier"))
    for seed, steps in {"0": 40, "1": 2}.items():
        assert cli.main([*tiny.options(home, home / seed, steps=steps), "--seed", seed]) == 0
    return home


def merged(home, adapters):
    """The model with weights that have the adapters in them."""
    loaded = llama.load(home / "model")
    return loaded, lj.merge(loaded.variables, adapters)


# --- eval -------------------------------------------------------------------------------------------------------------


def by_hand(home, variables, loaded, file):
    """Perplexity and accuracy of each document alone, but for its end."""
    tokenizer = text_tokenizer.load(home / "model", loaded.config.vocab_size)
    corpus = language.read(file, "text", ("prompt", "completion"), "messages")
    total, right, count = 0.0, 0, 0
    for [document] in language.encode(corpus, tokenizer, 48, None).documents:
        targets = document.targets & (document.tokens != tokenizer.end)
        padded = np.pad(document.tokens, (0, 48 - len(targets)))[None]
        logits = np.asarray(loaded.model.apply(variables, padded), np.float64)[0, : len(targets) - 1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        following = document.tokens[1:]
        total -= log_p[np.arange(len(following)), following] @ targets[1:]
        right, count = right + ((log_p.argmax(-1) == following) & targets[1:]).sum(), count + targets.sum()
    return math.exp(total / count), right / count


def test_eval_of_language(home, first, tmp_path, capsys):
    file = tiny_lm.texts(tmp_path / "held_out.jsonl", count=9)
    found = json.loads(call(["eval", first, "--data", file, "--base", "--json"], capsys))
    loaded, with_adapters = merged(home, run.load_adapters(first))
    assert found["data"].startswith("9 documents, ")
    for name, variables in {"run": with_adapters, "base": loaded.variables}.items():
        perplexity, accuracy = by_hand(home, variables, loaded, file)
        assert found[name]["perplexity"] == pytest.approx(perplexity, rel=1e-4)
        assert found[name]["token_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert found["run"]["perplexity"] < 0.5 * found["base"]["perplexity"]
    lines = call(["eval", first, "--data", file, "--base"], capsys).splitlines()
    assert lines[1].split() == ["run", "base"]
    assert lines[2].split() == ["perplexity", *(f"{found[name]['perplexity']:.4f}" for name in ("run", "base"))]


@pytest.mark.slow
def test_eval_by_exact_match(home, third, tmp_path, capsys):
    """What the model writes alone, up to a token that is made its end, it writes in a batch; something else it does not."""
    loaded, variables = merged(home, run.load_adapters(third))
    tokenizer = text_tokenizer.load(home / "model", loaded.config.vocab_size)
    write = lambda prompt, ends: np.asarray(
        llama.generate(loaded, variables, tokenizer.prompt(prompt, chat=False)[None], max_new_tokens=8, eos_ids=ends).tokens[0]
    )
    decode = lambda new: tokenizer.tokenizer.decode(new.tolist())
    prompts = [f"The {animal}{end}" for animal in tiny_lm.ANIMALS for end in ("", " m", ".")]
    alone = [write(prompt, ()) for prompt in prompts]
    end = next(int(new[i]) for new in alone for i in range(1, 8) if new[i] not in new[:i] and decode(new[:i]).strip())
    rows, right = [{"prompt": "The bee", "completion": " sings"}], [False]
    for prompt in prompts:
        new = write(prompt, (end,))
        text = decode(new[new != end]) or "nothing"
        right.append(end in new and text != "nothing")
        rows.append({"prompt": prompt, "completion": text})
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = altered(third, tmp_path / "run", ends=[end])
    found = json.loads(call(["eval", ended, "--data", file, "--exact-match", "--json"], capsys))["run"]
    assert any(right) and found["exact_match"] == pytest.approx(np.mean(right))
    assert found.keys() == {"perplexity", "token_accuracy", "exact_match"}


def test_eval_of_a_classifier(classifier, tmp_path, capsys):
    texts = tiny.reviews(tmp_path / "more.csv", count=30)
    directory = classifier / "0"
    found = json.loads(call(["eval", directory, "--data", texts, "--base", "--json"], capsys))
    rows = [line.rsplit(",", 1) for line in texts.read_text().splitlines()[1:]]
    said = [
        line.split("\t")[0]
        for line in call(["predict", directory, *(x for text, _ in rows for x in ("--text", text))], capsys).splitlines()
    ]
    counts = [[sum((true, s) == (a, b) for (_, true), s in zip(rows, said)) for b in ("bad", "good")] for a in ("bad", "good")]
    assert found["run"]["confusion"] == counts and found["run"]["accuracy"] == pytest.approx(np.trace(counts) / 30)
    assert sum(map(sum, found["base"]["confusion"])) == 30
    assert found["base"]["confusion"] != counts
    text = call(["eval", directory, "--data", texts], capsys)
    assert "precision" in text and "what was said" in text
    (one := tmp_path / "one.csv").write_text("review,verdict\n" + "".join(f"{text},bad\n" for text, _ in rows))
    said_bad = said.count("bad")
    found = json.loads(call(["eval", directory, "--data", one, "--json"], capsys))
    assert found["run"]["confusion"] == [[said_bad, 30 - said_bad], [0, 0]]  # of one label, which is data enough


def test_precision_recall_and_f1():
    found = labels.report(("a", "b", "c"), np.array([[3.0, 1, 0], [2, 4, 0], [0, 0, 0]]))
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["classes"]["a"] == pytest.approx({"precision": 0.6, "recall": 0.75, "f1": 2 / 3})
    assert found["classes"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_padding_is_of_no_class_and_infinite_logits_are_seen():
    logits = jnp.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert labels.confusion(logits, {"labels": jnp.array([0, 0, -1])}).tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert jnp.isnan(labels.confusion(logits.at[2, 0].set(jnp.inf), {"labels": jnp.array([0, 0, -1])})).all()


def test_eval_of_preferences(home, tmp_path, capsys):
    rows = [{"prompt": f"The cat {i}", "chosen": " meows.", "rejected": " barks."} for i in range(20)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = tiny_lm.options(home, tmp_path / "run", task="dpo", data=file, steps=3, max_length=24, eval_data=file)
    call(line, capsys)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    found = json.loads(call(["eval", tmp_path / "run", "--data", file, "--base", "--json"], capsys))
    assert found["run"] == {name: pytest.approx(last[name], rel=1e-5) for name in ("reward_accuracy", "reward_margin")}
    assert found["base"] == {"reward_accuracy": 0.5, "reward_margin": 0.0}


def test_what_can_not_be_measured(home, first, classifier, tmp_path, capsys):
    texts, odd = home / "texts.jsonl", tmp_path / "odd.csv"
    odd.write_text("review,verdict\nfine,middling\nbad,bad\n")
    assert "there is no run in" in call(["eval", tmp_path, "--data", texts], capsys, code=2)
    assert "there is no file or folder" in call(["eval", first, "--data", tmp_path / "none.txt"], capsys, code=2)
    error = call(["eval", first, "--data", texts, "--label-field", "x"], capsys, code=2)
    assert "--label-field is an option of --task classify" in error
    assert "--exact-match is for runs of --task lm and files" in call(
        ["eval", first, "--data", texts, "--exact-match"], capsys, 2
    )
    assert "the labels middling; those of the run are bad, good" in call(["eval", classifier / "0", "--data", odd], capsys, 2)
    assert "max_length 257 is above the 256 positions" in call(["eval", first, "--data", texts, "--max-length", 257], capsys, 2)


# --- merge ------------------------------------------------------------------------------------------------------------


def test_merged_runs_are_the_weighted_sum(home, first, second, tmp_path, capsys):
    out = tmp_path / "both"
    assert call(["merge", first, second, "--method", "cat", "--weights", 0.5, -1, "--out", out], capsys) == f"run: {out}\n"
    one, two, both = map(run.load_adapters, (first, second, out))
    assert both.keys() == one.keys() > two.keys()
    for path, pair in both.items():
        wanted = 0.5 * one[path].delta() - (two[path].delta() if path in two else 0.0)
        np.testing.assert_allclose(pair.delta(), wanted, rtol=1e-5, atol=1e-6)
    config = run.read_config(out)
    assert config.made["runs"] == [str(first), str(second)] and config.made["weights"] == [0.5, -1]
    assert (config.made["command"], config.made["method"], config.data, config.data_sha256) == ("merge", "cat", None, "")
    assert call(["generate", out, "--prompt", "The cat", "--max-new-tokens", 2], capsys).startswith("The cat")
    assert "layer_0" in call(["inspect", out], capsys)
    assert "written" in call(["export", out, "--format", "peft"], capsys)
    assert "`lora-jax merge`: there is no training to go on with" in call(["finetune", "--resume", out], capsys, code=2)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "ties_svd"])
def test_methods_are_those_of_the_library(first, third, method, tmp_path, capsys):
    more = [] if method == "linear" else ["--density", 0.5]
    call(["merge", first, third, "--method", method, *more, "--seed", 3, "--out", tmp_path / "out"], capsys)
    options = {} if method == "linear" else {"density": 0.5}
    options |= {"key": jax.random.key(3)} if "dare" in method else {}
    wanted = lj.combine([run.load_adapters(first), run.load_adapters(third)], [0.5, 0.5], method, **options)
    found = run.load_adapters(tmp_path / "out")
    assert found.keys() == wanted.keys()
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_merged_classifiers_have_the_mean_of_the_heads(classifier, tmp_path, capsys):
    runs = [classifier / "0", classifier / "1"]
    call(["merge", *runs, "--weights", 3, 1, "--out", tmp_path / "out"], capsys)
    one, two, both = map(run.load_adapters, (*runs, tmp_path / "out"))
    path = next(path for path in one if path.endswith("classifier/kernel"))
    np.testing.assert_allclose(both[path].value, 0.75 * one[path].value + 0.25 * two[path].value, rtol=1e-6, atol=1e-7)
    assert call(["predict", tmp_path / "out", "--text", "superb cast"], capsys).endswith("superb cast\n")
    error = call(["merge", *runs, "--weights", 1, -1, "--out", tmp_path / "none"], capsys, code=2)
    assert "weights with a sum above 0, not 0" in error and not (tmp_path / "none").exists()


def test_what_can_not_be_merged(home, first, second, classifier, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    other = altered(first, tmp_path / "other", model_sha256="another")
    stacked = altered(first, tmp_path / "stacked", scan_layers=True)
    assert "merge takes two runs or more, not 1" in call(["merge", first, *out], capsys, code=2)
    assert "there is no run in" in call(["merge", first, tmp_path, *out], capsys, code=2)
    assert "trained on another base" in call(["merge", first, other, *out], capsys, code=2)
    assert "trained on another base" in call(["merge", first, classifier / "0", *out], capsys, code=2)
    assert "is held in another way" in call(["merge", first, stacked, *out], capsys, code=2)
    assert "has 1 numbers for 2 runs" in call(["merge", first, second, "--weights", 1, *out], capsys, code=2)
    assert "--weights must be numbers, not ['a']" in call(["merge", first, second, "--weights", "a", *out], capsys, code=2)
    assert "--method must be one of linear" in call(["merge", first, second, "--method", "mean", *out], capsys, code=2)
    assert "pairs of the ranks [2, 4]" in call(["merge", first, second, "--method", "linear", *out], capsys, code=2)
    assert "needs a density" in call(["merge", first, second, "--method", "ties", *out], capsys, code=2)
    assert not (tmp_path / "out").exists()
    assert "is not an empty directory" in call(["merge", first, second, "--out", home], capsys, code=2)


# --- rank -------------------------------------------------------------------------------------------------------------


def test_ranks_that_are_needed(home, first, tmp_path, capsys):
    rows = {row[0]: row[1:] for row in map(str.split, call(["rank", first, "--keep", 0.9], capsys).splitlines()[1:])}
    adapters, leaves = run.load_adapters(first), lj.core.paths.flatten(llama.load(home / "model").variables)[0]
    assert rows.keys() == adapters.keys()
    for path, (rank, effective, needed, norm, share) in rows.items():
        delta = np.asarray(adapters[path].delta(), np.float64)
        values = np.linalg.svd(delta, compute_uv=False)[:4]
        kept = np.cumsum(values**2) / (values**2).sum()
        parts = values / values.sum()
        assert (int(rank), int(needed)) == (4, 1 + int((kept < 0.9).sum()))
        assert float(effective) == pytest.approx(np.exp(-(parts * np.log(parts)).sum()), abs=0.006)
        assert float(norm) == pytest.approx(np.linalg.norm(delta), rel=1e-3)
        assert float(share) == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(leaves[path]), abs=6e-5)
    assert len({row[2] for row in rows.values()}) > 1


def test_a_truncated_run(first, tmp_path, capsys):
    out = tmp_path / "out"
    assert f"run: {out}" in call(["rank", first, "--keep", 0.9, "--truncate", "--out", out], capsys)
    before, after = run.load_adapters(first), run.load_adapters(out)
    assert before.keys() == after.keys() and max(pair.rank for pair in after.values()) < 4
    for path, pair in after.items():
        lost = np.linalg.norm(pair.delta() - before[path].delta()) ** 2 / np.linalg.norm(before[path].delta()) ** 2
        assert lost <= 0.1
    assert run.read_config(out).made == {"command": "rank", "runs": [str(first)], "keep": 0.9}
    assert call(["generate", out, "--prompt", "The cat", "--max-new-tokens", 2], capsys).startswith("The cat")


def test_options_of_rank(first, home, tmp_path, capsys):
    assert "--truncate and --out" in call(["rank", first, "--truncate"], capsys, code=2)
    assert "--truncate and --out" in call(["rank", first, "--out", tmp_path / "out"], capsys, code=2)
    assert "--keep must be above 0 and at most 1, not 0" in call(["rank", first, "--keep", 0], capsys, code=2)
    assert "is not an empty directory" in call(["rank", first, "--truncate", "--out", home], capsys, code=2)
    magnitudes = {
        path: dataclasses.replace(a, magnitude=jnp.ones(a.b.shape[1:])) for path, a in run.load_adapters(first).items()
    }
    run.derive(tmp_path / "dora", run.read_config(first), magnitudes, {})
    error = call(["rank", tmp_path / "dora", "--truncate", "--out", tmp_path / "out"], capsys, code=2)
    assert "changes more than its product" in error and not (tmp_path / "out").exists()


# --- chat -------------------------------------------------------------------------------------------------------------


def talk(monkeypatch, lines, *arguments):
    """The command with these lines on its standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return cli.main(["chat", *map(str, arguments)])


def answers(home, first, second, which, conversation, count=6, system=None):
    """What the model with merged weights answers to the last of a conversation."""
    adapters = {"first": first, "second": second}
    loaded = llama.load(home / "model")
    variables = loaded.variables if which == "none" else lj.merge(loaded.variables, run.load_adapters(adapters[which]))
    tokenizer = text_tokenizer.load(home / "model", loaded.config.vocab_size)
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 9, conversation)]
    messages = [{"role": "system", "content": system}, *messages] if system else messages
    text = tokenizer.chat(datetime.date.today()).render(messages, add_generation_prompt=True)
    [ids] = tokenizer.ids([text], special=False)
    found = llama.generate(loaded, variables, ids[None], max_new_tokens=count, eos_ids=(2,))
    return tokenizer.tokenizer.decode(np.asarray(found.tokens[0])[: int(found.lengths[0])].tolist(), skip_special_tokens=True)


def test_a_chat(home, first, second, monkeypatch, capsys):
    lines = [
        "Hi",
        "/adapter 2",
        "/reset",
        "Hi",
        "/adapter none",
        "/reset",
        "Hi",
        "/adapter x",
        "/what",
        "",
        "/help",
        "/quit",
        "Hi",
    ]
    assert talk(monkeypatch, lines, first, second, "--max-new-tokens", 6) == 0
    printed = capsys.readouterr()
    wanted = [answers(home, first, second, which, ["Hi"]) for which in ("first", "second", "none")]
    assert printed.out == "".join(f"{text}\n" for text in wanted) and len(set(wanted)) == 3
    assert "adapter: second (of 1 first, 2 second, none)" in printed.err
    assert "there are no adapters 'x', but first, second, none" in printed.err
    assert "there is no command /what" in printed.err and "/reset   " in printed.err


def test_what_the_system_says(home, first, second, monkeypatch, capsys):
    lines = ["Hi", "/system", "Hi", "/system Bark", "Hi", "/reset", "Hi"]
    assert talk(monkeypatch, lines, first, "--max-new-tokens", 6, "--system", "Bark") == 0
    told, untold = (answers(home, first, second, "first", ["Hi"], system=system) for system in ("Bark", None))
    assert capsys.readouterr().out.splitlines() == [told, untold, told, told] and told != untold
    generate = ["generate", first, "--prompt", "Hi", "--max-new-tokens", 6, "--system", "Bark"]
    assert call([*generate, "--chat"], capsys).strip() == told.strip()
    assert "--system is a message of a chat: give --chat, too" in call(generate, capsys, code=2)


def test_a_conversation_goes_on_until_it_is_too_long(home, first, second, monkeypatch, capsys):
    assert talk(monkeypatch, ["Hi", "So", "The cat meows. " * 60], first, "--max-new-tokens", 4) == 0
    printed = capsys.readouterr()
    one = answers(home, first, second, "first", ["Hi"], 4)
    assert printed.out == f"{one}\n{answers(home, first, second, 'first', ['Hi', one, 'So'], 4)}\n"
    assert "are more than the model's 256 positions: /reset begins a new one" in printed.err


def test_switching_compiles_nothing(first, second, capsys):
    one = chat.prepare([first, second], DrawOptions(max_new_tokens=4))
    one.hear("Hi")
    counts = generation._begin._cache_size(), generation._add._cache_size()
    for name in ("second", "none", "first"):
        one.hear("/reset")
        one.hear(f"/adapter {name}")
        one.hear("Hi")
    assert (generation._begin._cache_size(), generation._add._cache_size()) == counts
    capsys.readouterr()


def test_an_interrupt_stops_an_answer_and_not_the_chat(first, monkeypatch, capsys):
    whole = llama.stream

    def interrupted(*given, **more):
        for i, token in enumerate(whole(*given, **more)):
            if i == 2:
                raise KeyboardInterrupt
            yield token

    one = chat.prepare([first], DrawOptions(max_new_tokens=8))
    monkeypatch.setattr(llama, "stream", interrupted)
    one.hear("Hi")
    printed = capsys.readouterr()
    assert "(stopped)" in printed.err and one.messages[-1] == {"role": "assistant", "content": printed.out[:-1]}
    monkeypatch.setattr(llama, "stream", whole)
    one.hear("So")
    assert len(one.messages) == 4


def test_characters_of_many_bytes_come_whole(first, monkeypatch, capsys):
    one = chat.prepare([first], DrawOptions(max_new_tokens=8))
    text = "né 🦉 – x"
    [ids] = one.base.tokenizer.following_ids([text])
    assert len(ids) > len(text)
    monkeypatch.setattr(llama, "stream", lambda *given, **more: iter(ids.tolist()))
    pieces = list(one._pieces(ids))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces) and len(pieces) >= len(text)
    monkeypatch.setattr(llama, "stream", lambda *given, **more: iter(ids[:2].tolist()))  # the second byte of é is missing
    assert "".join(one._pieces(ids)) == "n\ufffd"


@pytest.mark.parametrize("length, temperature", [(3, 0.8), (16, 0.0), (17, 0.0)])
def test_a_stream_is_what_generate_writes(home, first, length, temperature):
    loaded = llama.load(home / "model")
    params, ids = lj.attach(loaded.variables, run.load_adapters(first)), np.arange(5, 5 + length)
    options = {"max_new_tokens": 9, "eos_ids": (2,), "temperature": temperature, "key": jax.random.key(3)}
    wanted = llama.generate(loaded, params, ids[None], **options)
    found = list(llama.stream(loaded, params, ids, **options))
    assert found == np.asarray(wanted.tokens[0])[: int(wanted.lengths[0])].tolist()
    end = found[4]
    assert list(llama.stream(loaded, params, ids, **options | {"eos_ids": (end,)})) == found[: found.index(end) + 1]


def test_who_can_not_chat(home, first, classifier, tmp_path, capsys):
    assert "use `lora-jax predict` with it, not `chat`" in call(["chat", classifier / "0"], capsys, code=2)
    assert "there is no run in" in call(["chat", first, tmp_path], capsys, code=2)
    assert "trained on another base" in call(
        ["chat", first, altered(first, tmp_path / "other", model_sha256="x")], capsys, code=2
    )
    assert "--max-new-tokens must be at least 1" in call(["chat", first, "--max-new-tokens", 0], capsys, code=2)


# --- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", every_other([False, True]))
def test_rows_of_several_runs_are_those_of_each(first, second, scan, tmp_path, capsys):
    """Of other ranks, scales and targets; with scanned layers, of runs that were trained so."""
    runs = [first, second]
    if scan:
        options = {"scan_layers": True, "targets": "attention"}
        runs = [drawn(first, tmp_path / f"{rank}", rank, rank=rank, alpha=5, **options) for rank in (2, 4)]
    prompts = ["The cat", "The dog barks. The"]
    options = [*(x for prompt in prompts for x in ("--prompt", prompt)), "--max-new-tokens", 6]
    assert cli.main(["generate", *map(str, [*runs, *options])]) == 0
    printed = capsys.readouterr()
    alone = {
        (directory, prompt): call(["generate", directory, "--prompt", prompt, "--max-new-tokens", 6], capsys)
        for directory in runs
        for prompt in prompts
    }
    wanted = "".join(
        f"--- {directory}, prompt {1 + prompts.index(prompt)}\n{text}" for (directory, prompt), text in alone.items()
    )
    assert printed.out == wanted and len(set(alone.values())) > 2
    assert "tokens a second" in printed.err
    assert "name one run" in call(["generate", *runs, "--prompt", "a", "--base"], capsys, code=2)
