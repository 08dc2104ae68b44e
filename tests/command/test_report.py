"""`report.html`: one file by itself whose figures are those of the run, whatever the task and however the run ended."""

import dataclasses
import html
import html.parser
import json
import pathlib
import re
import shlex
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.adapters import initializers
from lora_jax.command import cli, config_files, generate, metrics, options, predict, run, trainer
from lora_jax.command.options import RunConfig
from lora_jax.command.report import changes, curves, reproduce
from lora_jax.command.report import page as report_page
from lora_jax.command.tasks import continuations, registry
from lora_jax.core import paths, quantized
from lora_jax.core.adapter import Rows
from lora_jax.core.fields import table
from lora_jax.data import language
from lora_jax.models import bert, llama
from tests.support import tiny, tiny_images, tiny_lm
from tests.support.marks import every_other, slow_unless

pytestmark = pytest.mark.usefixtures("usual_promotion")
VOID = {"meta", "img", "circle", "path", "br", "link", "input"}
EVIL = '<script>alert("x")</script>'


class Page(html.parser.HTMLParser):
    """The texts of a page in their order, the tags that it has and what it refers to."""

    def __init__(self, file):
        super().__init__()
        self.texts, self.tags, self.open, self.references = [], set(), [], []
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] != "style":
            self.texts.append(" ".join(data.split()))

    @property
    def text(self):
        return " ".join(self.texts)

    def after(self, word, count=1):
        """The texts that follow the first that is this one."""
        place = self.texts.index(word) + 1
        return self.texts[place : place + count]


def base(config):
    """The parameters of a classifier's base."""
    return bert.load(config.model, num_labels=2, seed=config.seed).variables


def page(directory):
    """The report of a run, which needs nothing beside itself."""
    found = Page(directory / "report.html")
    assert not found.tags & {"script", "link", "iframe", "object"}
    assert all(reference.startswith("data:image/") for reference in found.references)
    assert not re.search(r"url\(|@import", found.source)
    return found


def trained(line):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert cli.main([str(word) for word in line]) == 0
    return pathlib.Path(line[line.index("--out") + 1])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Bases and data of each task; every review begins with a tag."""
    home = tmp_path_factory.mktemp("home")
    tiny.home(home)
    header, *rows = (home / "reviews.csv").read_text().splitlines()
    (home / "reviews.csv").write_text(
        "\n".join([header, *('"<script>alert(""x"")</script> ' + row.replace(",", '",') for row in rows)])
    )
    (home / "lm").mkdir()
    tiny_lm.home(home / "lm")
    draw = [{"prompt": f"The cat {i}", "chosen": " meows.", "rejected": " barks."} for i in range(43)]
    for name, rows in {"pairs": draw[:40], "held": draw[40:]}.items():
        (home / "lm" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@pytest.fixture(scope="module")
def classified(home):
    return trained([*tiny.options(home, home / "classified", steps=30), "--max-length", "24"])


@pytest.fixture(scope="module")
def continued(home):
    return trained(tiny_lm.options(home / "lm", home / "continued"))


@pytest.fixture(scope="module")
def preferred(home):
    line = ["finetune", "--task", "dpo", "--model", home / "lm" / "model", "--data", home / "lm" / "pairs.jsonl"]
    line += ["--eval-data", home / "lm" / "held.jsonl", "--rank", 4, "--steps", 8, "--max-length", 24]
    return trained([*line, "--learning-rate", 0.02, "--out", home / "preferred"])


# --- what it says -----------------------------------------------------------------------------------------------------


def test_results(classified):
    found, lines = page(classified), metrics.read(classified)
    before, after = (f"{line['test_accuracy']:.1%}" for line in (lines[0], lines[-1]))
    assert found.after("test accuracy", 3) == [before, "→", after]
    assert found.texts[0] == "classified: model on reviews.csv"
    assert found.after("base model") == [run.read_config(classified).model] and found.after("steps") == ["30"]
    size = lj.summary(base(run.read_config(classified)), run.load_adapters(classified))
    assert found.after("size of the adapters") == [f"{size.adapter_bytes / 1024:.1f} KiB"]
    assert f"{size.trainable:,} trained parameters of {size.parameters:,}" in found.text


def test_options_and_versions(classified):
    found, config = page(classified), run.read_config(classified)
    given = found.texts[found.texts.index("Options") :]
    said = given[: next(i for i, text in enumerate(given) if text.endswith("options that are the defaults"))]
    assert dict(zip(said[1::2], said[2::2])) == {
        name: reproduce.text(value) for name, value in config_files.said(config).items()
    }
    own = [name for name, row in table(RunConfig).items() if "classify" in row.more.get("tasks", ("classify",))]
    assert set(own) <= set(given) and config.data_sha256 in given and "messages_field" not in given
    assert found.after("jax") == [jax.__version__] and jax.devices()[0].device_kind in found.text


def test_texts_are_escaped(classified):
    found = page(classified)
    assert EVIL in found.text and "<script" not in found.source and "&lt;script&gt;" in found.source


def test_curves_are_the_metrics(classified):
    lines = metrics.read(classified)
    found = re.search(r"most frequent class: ([\d.]+)%", page(classified).text)
    assert found is not None
    loss, score, *others = curves.charts(lines, metrics.ACCURACY, ("most frequent class", float(found[1]) / 100))
    titles = ["training loss", "test accuracy (%)", "learning rate", "gradient norm"]
    assert [one.title for one in (loss, score, *others)] == titles
    heights = dict((float(text), y) for y, text in loss.yticks)
    (top, one), (bottom, other) = heights.popitem(), next(iter(heights.items()))
    places = [tuple(map(float, place.split(","))) for place in loss.faint[1:].split("L")]
    assert len(places) == 30
    for (x, y), line in zip(places, lines[1:]):
        assert bottom + (y - other) / (one - other) * (top - bottom) == pytest.approx(line["loss"], abs=1e-3)
        assert x == pytest.approx(56 + line["step"] / 30 * (424 - 56), abs=0.06)
    assert len(score.points) == 4 and score.labels[-1][2] == f"{lines[-1]['test_accuracy']:.1%}"
    source = (classified / "report.html").read_text()
    assert all(one.line in source for one in (loss, score, *others))
    assert re.findall(r"<figcaption>(.*?)<", source) == [f"{title} " if title == titles[0] else title for title in titles]


@pytest.mark.parametrize("unit", slow_unless(lambda unit: unit != "pairs", ["examples", "tokens", "pairs"]))
def test_what_depends_on_time_is_a_fact_and_no_curve(request, unit):
    directory = request.getfixturevalue({"examples": "classified", "tokens": "continued", "pairs": "preferred"}[unit])
    [speed] = page(directory).after("speed")
    values = [line[f"{unit}_per_second"] for line in metrics.read(directory)[1:]]
    assert speed.endswith(f" {unit}/s")
    assert float(speed.split()[0].replace(",", "")) == pytest.approx(np.median(values), rel=1e-3)
    assert "per second" not in page(directory).text


def test_further_metrics_have_curves():
    lines = [
        {"step": i, "loss": None if i == 3 else 1.0, "perplexity": 9.0 - i if i % 2 == 0 else None, "learning_rate": 1e-5 * i,
         "grad_norm": 2.0, "skipped": 0, "tokens_per_second": 10.0, "reward_margin": 0.5}
        for i in range(2000)
    ]  # fmt: skip
    found = curves.charts(lines, metrics.PERPLEXITY)
    names = ["training loss", "held-out perplexity", "learning rate", "gradient norm", "reward margin"]
    assert [one.title for one in found] == names
    assert all(len(one.line) < 8000 for one in found) and not found[2].points
    assert all("nan" not in one.line for one in found)


# --- adapters ---------------------------------------------------------------------------------------------------------


def dense(weight, adapter):
    """||dW||, ||W|| and the effective rank of a parameter, from dW itself."""
    change = np.asarray(lj.merge({"w": weight}, {"w": adapter})["w"], np.float64) - np.asarray(weight, np.float64)
    values = np.linalg.svd(change.reshape(len(change), -1), compute_uv=False)
    share = values[values > 1e-6 * values[0]] / values.sum()
    return np.linalg.norm(change), np.linalg.norm(weight), np.exp(-(share * np.log(share)).sum())


def test_numbers_of_the_adapters(classified):
    found, config = page(classified), run.read_config(classified)
    weights = paths.flatten(base(config))[0]
    for path, adapter in run.load_adapters(classified).items():
        size, weight, spread = dense(weights[path], adapter)
        cells = found.after(path, 7)
        assert cells[0] == " × ".join(map(str, weights[path].shape))
        assert float(cells[4]) == pytest.approx(size, rel=6e-3)
        if weight:
            assert float(cells[5]) == pytest.approx(size / weight, rel=1e-3, abs=6e-5)
        if isinstance(adapter, lj.LowRank):
            assert cells[1:3] == ["LoRA", "4"] and float(cells[6]) == pytest.approx(spread, abs=6e-3)


KERNEL = jax.random.normal(jax.random.key(1), (10, 6, 5))
PAIR = lj.LowRank(jax.random.normal(jax.random.key(2), (10, 6, 2)), jax.random.normal(jax.random.key(3), (10, 2, 5)),
                  lj.Layout((0,), (1,), (2,)), scale=0.5)  # fmt: skip


def test_layers_of_a_stack_are_a_range_or_rows():
    [many] = changes.changes({"w": KERNEL}, {"w": PAIR})
    one_by_one = [dense(KERNEL[i], lj.LowRank(PAIR.a[i], PAIR.b[i], lj.Layout((), (0,), (1,)), scale=0.5)) for i in range(10)]
    assert many.effective_rank is not None
    for ours, theirs in zip((many.size, many.weight, many.effective_rank), np.array(one_by_one).T):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    few = lj.LowRank(PAIR.a[:3], PAIR.b[:3], PAIR.layout, scale=0.5, ranks=(2, 0, 2))
    rows = changes.changes({"w": KERNEL[:3]}, {"w": few})
    assert [(row.path, row.shape, row.rank, row.parameters) for row in rows] == [
        ("w[0]", (6, 5), "2", 22),
        ("w[2]", (6, 5), "2", 22),
    ]
    np.testing.assert_allclose([row.size[0] for row in rows], [one_by_one[0][0], one_by_one[2][0]], rtol=1e-5)


@pytest.mark.parametrize("kind", ["DoRA", "whole", "2 rows", "VeRA"])
def test_other_kinds(kind):
    weight, draw = KERNEL[0], lambda *shape: jax.random.normal(jax.random.key(4), shape)
    layout = lj.Layout((), (0,), (1,))
    adapter = {
        "DoRA": lj.LowRank(PAIR.a[0], PAIR.b[0], layout, magnitude=jnp.abs(draw(5))),
        "VeRA": lj.LowRank(PAIR.a[0], PAIR.b[0], layout, lambda_d=draw(2), lambda_b=draw(5)),
        "whole": lj.Full(draw(6, 5)),
        "2 rows": Rows(draw(2, 5), (1, 3), layout),
    }[kind]
    [row] = changes.changes({"w": weight}, {"w": adapter})
    size, whole, spread = dense(weight, adapter)
    assert row.kind == kind
    np.testing.assert_allclose([row.size[0], row.weight[0]], [size, whole], rtol=1e-5)
    if kind == "VeRA":
        assert row.effective_rank is not None and row.effective_rank[0] == pytest.approx(spread, rel=1e-5)
    else:
        assert row.effective_rank is None


def test_a_base_that_was_changed_counts_as_it_was():
    weight = KERNEL[0]
    pair = lj.LowRank(PAIR.a[0], jnp.zeros((2, 5)), lj.Layout((), (0,), (1,)))
    residual, initial = initializers.pissa({"w": weight}, {"w": pair})
    moved = {"w": jax.tree.map(lambda leaf: leaf + 0.1, initial["w"])}
    [row] = changes.changes(residual, moved, initial)
    change = np.asarray(lj.merge(residual, moved)["w"], np.float64) - np.asarray(weight, np.float64)
    assert row.size[0] == pytest.approx(np.linalg.norm(change), rel=1e-4)
    assert row.weight[0] == pytest.approx(np.linalg.norm(weight), rel=1e-5)
    assert (row.rank, row.parameters) == ("2", 22)


# --- examples ---------------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_predict(classified):
    found = page(classified)
    texts = [text for text in found.texts[found.texts.index("Held-out examples") :] if text.startswith(EVIL)]
    assert len(texts) == 6
    for text, probabilities in zip(texts, predict.predict(classified, texts)):
        label = found.after(text)[0].removeprefix("label: ")
        after = found.texts[found.texts.index("after", found.texts.index(text)) + 1]
        best = max(probabilities, key=lambda one: probabilities[one])
        sign, said, share = after.split()
        assert (sign, said) == ("✓" if best == label else "✗", best)
        assert float(share.rstrip("%")) == pytest.approx(100 * probabilities[best], abs=0.06)


def test_texts_go_on_as_generate_writes_them(continued):
    shown = {
        name: [html.unescape(text) for text in re.findall(rf"<dt>{name}</dt><dd[^>]*>(.*?)</dd>", page(continued).source, re.S)]
        for name in ("prompt", "before", "after")
    }
    assert len(shown["prompt"]) == 2 and shown["before"] != shown["after"]
    for when in ("before", "after"):
        how = options.GenerateOptions(max_new_tokens=8, base=when == "before")
        for prompt, said in zip(shown["prompt"], shown[when], strict=True):
            assert prompt + said == generate.generate(continued, prompt, how)


def documents(*cuts):
    """Documents of so many tokens, learnt from a place on; `None`: nothing is."""
    return [
        language.Document(np.arange(length, dtype=np.int32), np.arange(length) >= (length if begin is None else begin))
        for length, begin in cuts
    ]


def prompts_of(held_out, begins):
    """The prompts that are shown, as many tokens, and what the model says after them."""
    model = llama.init(tiny_lm.sizes(), jax.random.key(0))
    tokenizer = types.SimpleNamespace(tokenizer=types.SimpleNamespace(decode=lambda ids, **_: "".join(map(chr, ids))))
    found = continuations.examples(tokenizer, model, (), None, held_out, begins)
    embedding = "params/embed_tokens/embedding"
    params = lj.attach(model.variables, {embedding: lj.Full(paths.flatten(model.variables)[0][embedding])})
    answers = found.answer(lambda fn, batch: np.asarray(jax.jit(fn)(params, batch)))
    assert all(len(text) == 8 for text in answers)
    return [len(one["prompt"]) for one in found.shown]


def test_whole_texts_are_shown_first():
    begins = [1, 1, 9, 5, 20]
    assert prompts_of(documents((2, 1), (4, None), (30, 9), (13, 5), (40, 20)), begins) == [5, 9]
    assert prompts_of(documents((2, 1), (30, 20)), [1, 20]) == [16, 1]  # of a long prompt the end


def test_a_text_of_which_nothing_is_learnt_is_not_shown():
    assert prompts_of(documents((9, None), (9, 3)), [0, 3]) == [3]
    assert prompts_of(documents((9, None)), [0]) == []


def test_margins_are_those_of_the_test(preferred):
    found, last = page(preferred), metrics.read(preferred)[-1]
    margins = [tuple(map(float, pair)) for pair in re.findall(r"([-\d.]+) → <strong[^>]*>([-\d.]+)", found.source)]
    assert len(margins) == 3 and {before for before, _ in margins} == {0.0}
    assert np.mean([after for _, after in margins]) == pytest.approx(last["reward_margin"], abs=6e-4)
    assert found.after("chosen") == ["meows."] and found.after("rejected") == ["barks."]


def test_pictures_are_in_the_page(tmp_path):
    home = tiny_images.home(tmp_path)
    directory = trained(tiny_images.options(home, home / "run", 4))
    found = page(directory)
    assert len(found.references) == 6 and all(one.startswith("data:image/jpeg;base64,") for one in found.references)
    assert found.text.count("label: ") == 6


# --- runs that end in other ways --------------------------------------------------------------------------------------


def test_the_best_adapters_are_those_of_the_report(home, capsys):
    line = [*tiny.options(home, home / "best", steps=12), "--keep", "best", "--eval-every", "2", "--max-length", "24"]
    line[line.index("--learning-rate") + 1] = "0.05"
    directory = trained(line)
    found, best = page(directory), metrics.best(metrics.read(directory))
    assert best is not None and found.after("test accuracy", 3)[2] == f"{best.score:.1%}"
    step = lj.checkpoint.restore(directory / "best").step
    assert step == best.step and (best.step == 12 or f"of step {best.step}, the best of all tests" in found.text)
    path = "params/encoder/layer_0/mlp/up/kernel"
    values = lj.algebra.singular_values(lj.checkpoint.load(directory / "best"))[path]
    assert float(found.after(path, 5)[4]) == pytest.approx(float(jnp.linalg.norm(values)), rel=6e-3)


@pytest.mark.parametrize("many", every_other([False, True]))
def test_a_diverged_run(home, many):
    name = f"diverged-{many}"
    line = [*tiny.options(home, home / name, steps=12), "--max-length", "24", "--max-grad-norm", "0", "--optimizer", "sgd"]
    line[line.index("--learning-rate") + 1] = "1e30"
    if many:
        line = ["sweep", *line[1:]]
        place = line.index("--learning-rate") + 2
        line[place:place] = ["0.01"]
    assert cli.main(line) == (0 if many else 3)
    found = page(home / name / "1" if many else home / name)
    assert "The run diverged:" in found.text and "steps was not finite" in found.text
    assert "Held-out examples" not in found.texts
    if many:
        assert (
            "diverged" not in page(home / name / "2").text.replace(name, "")
            and "Held-out examples" in page(home / name / "2").texts
        )


@pytest.mark.slow
def test_each_run_of_a_sweep_has_its_own(home):
    line = ["sweep", *tiny.options(home, home / "sweep", steps=6)[1:], "--seed", "0", "3", "--max-length", "24"]
    line[line.index("--rank") + 1 : line.index("--rank") + 2] = ["2", "4"]
    trained(line)
    for i, rank in enumerate([2, 2, 4, 4], 1):
        directory = home / "sweep" / str(i)
        found, lines = page(directory), metrics.read(directory)
        assert found.after("test accuracy", 3)[2] == f"{lines[-1]['test_accuracy']:.1%}"
        weights = paths.flatten(base(run.read_config(directory)))[0]
        for path, adapter in run.load_adapters(directory).items():
            size, weight, _ = dense(weights[path], adapter)
            cells = found.after(path, 7)
            assert cells[2] == (str(rank) if isinstance(adapter, lj.LowRank) else "–")
            assert not weight or float(cells[5]) == pytest.approx(size / weight, rel=1e-3, abs=6e-5)


@pytest.mark.slow
def test_a_run_that_goes_on_from_other_adapters(home, classified):
    line = [*tiny.options(home, home / "further", steps=4), "--max-length", "24", "--adapter", str(classified)]
    directory = trained([*line[: line.index("--rank")], *line[line.index("--rank") + 2 :]])
    assert "before" in page(directory).texts
    assert cli.main(["finetune", "--resume", str(directory), "--steps", "2"]) == 0
    found = page(directory)  # what it began with is not at hand any more
    assert "after" in found.texts and "before" not in found.texts and found.after("steps") == ["6"]


@pytest.mark.parametrize("rate", every_other(["1e30", "0.005"]))
def test_a_report_that_fails_is_a_warning(home, monkeypatch, capsys, rate):
    name = f"unreported-{rate}"
    line = [*tiny.options(home, home / name, steps=4), "--max-length", "24", "--max-grad-norm", "0", "--optimizer", "sgd"]
    line[line.index("--learning-rate") + 1] = rate

    def broken(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(report_page, "write", broken)
    assert cli.main(line) == (3 if rate == "1e30" else 0)
    output, errors = capsys.readouterr()
    warning, *others = errors.splitlines()
    assert warning == f"lora-jax: {home / name} is finished, but its report could not be made (RuntimeError: no ink)"
    assert [f"{home / name} diverged at step" in text for text in others] == [True] * (rate == "1e30")
    assert "after" in output and "report:" not in output and (home / name / "curve.png").exists()


@pytest.mark.slow
def test_a_sweep_has_its_results_without_its_reports(home, monkeypatch, capsys):
    line = ["sweep", *tiny.options(home, home / "unreported", steps=2)[1:], "--seed", "0", "3", "--max-length", "24"]

    def broken(*_):
        assert (home / "unreported" / "results.json").exists() and (home / "unreported" / "sweep.png").exists()
        raise RuntimeError("no ink")

    monkeypatch.setattr(report_page, "write", broken)
    assert cli.main(line) == 0
    output, errors = capsys.readouterr()
    assert errors.count("no ink") == 2 and "best run:" in output


def test_a_run_that_is_stopped_while_its_report_is_made(home, monkeypatch, capsys):
    directory = home / "stopped"

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report_page, "write", interrupted)
        assert cli.main([*tiny.options(home, directory, steps=4), "--max-length", "24"]) == 130
    output, errors = capsys.readouterr()
    made_by = f"the run is finished, and its report is made by: lora-jax finetune --resume {directory}"
    assert errors == f"lora-jax: stopped by SIGINT; {made_by}\n" and "report:" not in output
    assert not (directory / "report.html").exists() and lj.checkpoint.restore(directory / "adapters").step == 4
    assert cli.main(["finetune", "--resume", str(directory)]) == 0
    assert page(directory).after("steps") == ["4"] and f"report: {directory / 'report.html'}" in capsys.readouterr().out


def test_a_signal_after_the_last_step_is_heard(home, monkeypatch, capsys):
    train = trainer.Trainer.train

    def late(self, *given):
        train(self, *given)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer.Trainer, "train", late)
    assert cli.main([*tiny.options(home, home / "late", steps=4), "--max-length", "24"]) == 130
    assert f"go on with: lora-jax finetune --resume {home / 'late'}" in capsys.readouterr().err
    assert lj.checkpoint.restore(home / "late" / "adapters").step == 4


# --- how a base is held and adapted -----------------------------------------------------------------------------------


def cells_of(directory):
    """The shape, rank, number of parameters, ||dW||, its share and effective rank of each row of the table."""
    rows = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', page(directory).source, re.S)
    return {path: re.findall(r"<td data-label[^>]*>(.*?)</td>", cells) for path, cells in rows}


@pytest.mark.parametrize(
    "given",
    every_other(
        [["--quantize", "int8", "--block", "16"], ["--scan-layers", "--quantize", "nf4", "--block", "16"], ["--scan-layers", "--dora"],
         ["--scan-layers"], ["--mesh", "data=2,fsdp=2,model=2"]]
    ),
    ids="".join,
)  # fmt: skip
def test_the_table_of_a_run(home, tmp_path, given):
    line = tiny_lm.options(home / "lm", tmp_path / "run", steps=3, targets="up_proj", max_length=24, batch_size=8)
    directory = trained([*line, *given])
    config = run.read_config(directory)
    weights = paths.flatten(registry.prepare(config).task.variables)[0]
    found, seen = cells_of(directory), 0
    for path, adapter in run.load_adapters(directory).items():
        whole = quantized.dense(weights[path])
        change = np.asarray(lj.merge({"w": whole}, {"w": adapter})["w"], np.float64) - np.asarray(whole, np.float64)
        places = [(f"{path}[{i}]", change[i], whole[i]) for i in range(2)] if config.scan_layers else [(path, change, whole)]
        for name, own, weight in places:
            shape, kind, rank, count, size, share, spread = found[name]
            assert shape == " × ".join(map(str, own.shape)) and (kind, rank) == ("DoRA" if config.dora else "LoRA", "4")
            assert int(count) == 4 * sum(own.shape) + (own.shape[1] if config.dora else 0)
            assert float(size) == pytest.approx(np.linalg.norm(own), rel=6e-3)
            assert float(share) == pytest.approx(np.linalg.norm(own) / np.linalg.norm(weight), abs=6e-5)
            assert (spread == "–") == config.dora
            seen += 1
    assert seen == len(found) == 2
    assert {"before", "after"} <= set(page(directory).texts)


def test_pairs_of_a_changed_base_are_as_they_were_trained(home, tmp_path):
    line = [*tiny.options(home, tmp_path / "run", steps=4), "--max-length", "24", "--init", "pissa"]
    directory = trained(line)
    trained_pairs, whole = run.load_trained(directory), run.load_adapters(directory)
    weights = paths.flatten(registry.prepare(run.read_config(directory)).task.variables)[0]
    pairs = [path for path, adapter in whole.items() if isinstance(adapter, lj.LowRank)]
    for path in pairs:
        _, _, rank, count, size, share, _ = cells_of(directory)[path]
        own = trained_pairs[path]
        assert (rank, int(count.replace(",", ""))) == ("4", own.a.size + own.b.size)
        change, weight, _ = dense(weights[path], whole[path])
        assert float(size) == pytest.approx(change, rel=6e-3)
        assert float(share) == pytest.approx(change / weight, rel=1e-3, abs=6e-5)
    assert pairs


# --- the command ------------------------------------------------------------------------------------------------------


def parsed(command):
    """The options that a command line says."""
    line = cli.parser().parse_args(shlex.split(command)[1:])
    given = config_files.given_run(line)
    return options.new_run(given.pop("task", "classify"), given)


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("classify", {}),
        ("classify", {"data": ["/a file.csv", "/b$(x).csv"], "weights": [0.5, 2], "text_field": "it's", "label_field": "-l"}),
        ("classify", {"rank_pattern": {"query": 4, "re:.*/up/.*": 16}, "alpha_pattern": {"query": 0.1}, "layers": [0, 2, 3]}),
        ("classify", {"targets": ["query", "key"], "exclude": ["re:.*/layer_0/.*"], "dropout": 0.1, "dora": True, "warmup": 0}),
        ("lm", {"learning_rate": 1e-05, "alpha": 1 / 3, "untie": True, "quantize": "nf4", "keep": "best", "patience": 2}),
        ("lm", {"dtype": "bfloat16", "scan_layers": True, "remat": "full", "attention_block": 128, "steps": 7}),
        ("dpo", {"loss": "ipo", "beta": 0.25, "eval_data": "/held out.jsonl", "schedule": "wsd", "min_rate": 1e-6}),
        ("images", {"model": "/m", "data": "/d", "flip": False, "crop": 1.0}),
    ],
)
def test_the_command_makes_the_same_options(task, given):
    config = options.new_run(task, given)
    [command] = reproduce.commands(config, pathlib.Path("run"))
    assert parsed(command) == config


def test_the_commands_of_a_run_that_was_trained_further():
    config = options.new_run("lm", {"steps": 50, "rank": 4})
    further, out = RunConfig(**{**vars(config), "finished": [20, 30]}), pathlib.Path("a run-again").absolute()
    first, *later = reproduce.commands(further, pathlib.Path("a run"))
    assert [shlex.split(command)[2:] for command in later] == [
        ["--resume", str(out), "--steps", "10"],
        ["--resume", str(out), "--steps", "20"],
    ]
    assert parsed(first).steps == 20 and cli.parser().parse_args(shlex.split(first)[1:]).out == out
    assert reproduce.planned(further, 50) == ""
    patient = dataclasses.replace(further, patience=2)
    assert "trained further at step 20, 30" in reproduce.planned(patient, 50)
    assert "stopped by its patience at step 40" in reproduce.planned(patient, 40)


@pytest.mark.slow
def test_the_command_of_a_run_with_adapters_leaves_their_options_to_them(home, classified):
    line = [*tiny.options(home, home / "from", steps=2), "--max-length", "24", "--adapter", str(classified)]
    directory = trained([*line[: line.index("--rank")], *line[line.index("--rank") + 2 :]])
    [command] = page(directory).after("To make it again")
    assert "--targets" not in command and "--rank" not in command
    assert f"--adapter {classified}" in command
    again = trained([*shlex.split(command)[1:], "--out", home / "from-again"])
    assert (directory / "config.json").read_bytes() == (again / "config.json").read_bytes()


def test_the_command_of_a_run_is_in_its_report(classified):
    config, found = run.read_config(classified), page(classified)
    [command] = found.after("To make it again")
    recorded = {name: getattr(config, name) for name, row in table(RunConfig).items() if row.more.get("recorded")}
    assert RunConfig(**{**vars(parsed(command)), **recorded}) == config
