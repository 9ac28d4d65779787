"""The study: its controls, its statistics, and that its page says what its results say."""
import json
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line_error, command

import train
from common import load_checkpoint
from data.loader import Corpus
from data.prepare import prepare
from experiments.study import paper_a, paper_b, report, runs
from experiments.study.claims import Results, number
from experiments.study.lens import layers, train_probes
from experiments.study.runs import Size, Study, Text, chain_steps, held_out
from experiments.study.verdicts import estimate, holm, judge
from test_decode import counting_model

PAGE = report.PAGE.read_text()


def study_of(tmp_path, **size):
    """A study that takes seconds, on a corpus of its own."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 200)
    data = prepare(str(tmp_path / "text.txt"), out=str(tmp_path / "corpus"), val_fraction=0.2)
    shape = dict(n_layer=4, n_head=1, n_embd=16)
    size = dict(steps=4, head_steps=3, joint_steps=4, windows=6, prompts=2, shape=shape) | size
    return Study(Size((1, 2), **size), tmp_path / "runs"), data


# Runs
def test_a_run_is_kept_until_an_option_or_what_it_was_made_from_changes(tmp_path):
    study, data = study_of(tmp_path)
    base = study.run("ntp", 1, data=data)
    heads = study.run("heads", 1, base, data=data, offsets="1,2", backbone_lr=0)
    made = (heads / "checkpoint.pt").stat().st_mtime_ns
    assert study.run("heads", 1, base, data=data, offsets="1,2", backbone_lr=0) == heads
    assert (heads / "checkpoint.pt").stat().st_mtime_ns == made
    study.run("heads", 1, base, data=data, offsets="1,2", backbone_lr=0, lr=1e-3)
    again = (heads / "checkpoint.pt").stat().st_mtime_ns
    assert again > made
    (base / "checkpoint.pt").touch()
    study.run("heads", 1, base, data=data, offsets="1,2", backbone_lr=0, lr=1e-3)
    assert (heads / "checkpoint.pt").stat().st_mtime_ns > again


def test_a_run_that_was_stopped_goes_on_and_is_kept(tmp_path, monkeypatch):
    study, data = study_of(tmp_path)
    step = train.train_step

    def stopped_at_2(*args):
        if args[3] == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(*args)
    monkeypatch.setattr(train, "train_step", stopped_at_2)
    with pytest.raises(KeyboardInterrupt):
        study.run("ntp", 1, data=data)
    monkeypatch.setattr(train, "train_step", step)
    made = [(study.run("ntp", 1, data=data) / "checkpoint.pt").stat().st_mtime_ns for _ in "ab"]
    assert load_checkpoint(tmp_path / "runs" / "ntp-1")[1]["step"] == 4
    assert made[0] == made[1]


def test_a_run_for_one_offset_learns_that_offset_alone(tmp_path):
    study, data = study_of(tmp_path, steps=40)
    run = study.run("direct", 1, data=data, offsets="1,2", recipe=paper_a.token_after_alone)
    records = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
    assert all(set(record["loss"]) == {"2"} for record in records if "loss" in record)
    assert records[-1]["val_loss"]["2"] < records[-1]["val_loss"]["1"]


@pytest.mark.parametrize("n", [0, 1, 3])
def test_the_first_layers_of_a_model_are_those_layers(n, tmp_path):
    study, data = study_of(tmp_path)
    base = study.run("ntp", 1, data=data)
    idx = torch.arange(12)[None]
    whole, first = [load_checkpoint(run)[0] for run in (base, study.first_layers(base, n))]
    assert torch.equal(layers(first, idx)[-1], layers(whole, idx)[n])


# What is measured
def test_a_window_whose_second_half_stands_in_the_training_text_is_left_out(monkeypatch):
    train, val = np.random.default_rng(0).integers(0, 256, (2, 3000)).astype(np.uint16)
    val[::250] = 256  # where files end
    starts = np.linspace(0, 3000 - 129, 23, dtype=int)
    val[starts[4] + 64:starts[4] + 129] = train[500:565]
    corpus = SimpleNamespace(train=train, val=val, tokenizer=SimpleNamespace(eot_token=256))
    monkeypatch.setattr(runs, "Corpus", lambda folder: corpus)
    text = held_out("a folder", 23)
    assert [w[0] for w in text.windows.tolist()] == val[np.delete(starts, 4)].tolist()
    ends = np.flatnonzero(val == 256)
    assert text.files.tolist() == [(ends < s).sum() for s in np.delete(starts, 4)]


def test_the_table_of_counts_backs_off_to_the_longest_context_that_it_knows():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 3, 400)
    window = rng.integers(0, 3, (5, 129))
    right = np.zeros((5, 63))
    for i, row in enumerate(window):
        for j, t in enumerate(range(64, 127)):
            for n in range(8, 0, -1):
                later = [train[p + 2] for p in range(8, 398)
                         if (train[p - n + 1:p + 1] == row[t - n + 1:t + 1]).all()]
                if later:  # of equally frequent tokens the table takes the last
                    counts = np.bincount(later, minlength=3)
                    right[i, j] = 2 - counts[::-1].argmax() == row[t + 2]
                    break
    text = Text(SimpleNamespace(train=train), torch.from_numpy(window), torch.arange(5))
    found = paper_a.back_off(None, text, np.arange(64, 127))
    assert found["t+2, asked"] == pytest.approx(right.mean(1), abs=1e-4)


def test_probes_learn_what_a_layer_holds(tmp_path):
    study, data = study_of(tmp_path)
    run = study.run("ntp", 1, data=data)
    model = load_checkpoint(run)[0]
    torch.manual_seed(0)
    corpus = Corpus(data)
    idx = corpus.batch("train", 4, 129, 0)
    h = layers(model, idx[:, :-1])
    losses = []
    for steps in (1, 60):
        weight, bias = train_probes(model, corpus, steps, 0)[2]
        logits = torch.baddbmm(bias, h.flatten(1, 2), weight.mT)[-1]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], idx.flatten()[2:2 + 511]))
    assert losses[1] < losses[0]


def test_a_chain_that_is_always_right_writes_a_window_in_as_few_steps_as_can_be():
    text = Text(None, torch.arange(65)[None] % 32, torch.tensor([0]))
    model = counting_model((1, 2, 3, 4))
    assert chain_steps(model, text).tolist() == [12]  # 48 tokens after a prompt of 16
    assert chain_steps(model, text, (1,)).tolist() == [48]


def test_the_theory_expects_the_mean_of_independent_drafts():
    rng = np.random.default_rng(0)
    accuracy = {3: 0.8, 5: 0.5, 7: 0.3}
    p = [0.8, 0.8, 0.5, 0.5, 0.3, 0.3]  # of distances 2..7
    drawn = (rng.random((100_000, 6)) < p).cumprod(1).sum(1).mean()
    assert 1 + drawn == pytest.approx(paper_b.expected(accuracy, (1, 3, 5, 7)), abs=0.02)
    x = paper_b.BREAK_EVEN
    assert paper_b.formula(x, "leap") > paper_b.formula(x, "MTP")
    assert paper_b.formula(x + 0.01, "leap") < paper_b.formula(x + 0.01, "MTP")


# Statistics
def results_of(effect, seeds=5, seed_noise=0.002, file_noise=0.02, rng=0):
    """Two rows whose means differ by about `effect`: by that exactly, without seed_noise."""
    rng = np.random.default_rng(rng)
    counts = rng.integers(1, 20, 40)
    by_file = file_noise * rng.standard_normal(40)
    by_file += effect - by_file @ counts / counts.sum()
    rows = {"a": {"x": {}}, "b": {"x": {}}}
    for seed in range(1, seeds + 1):
        by_seed = by_file + seed_noise * rng.standard_normal()
        rows["a"]["x"][str(seed)] = ((0.5 + by_seed) * counts).tolist()
        rows["b"]["x"][str(seed)] = (0.5 * counts).tolist()
    return Results(dict(rows=dict(part=rows), counts=dict(python=counts.tolist()),
                        seeds=list(range(1, seeds + 1))))


EFFECT = "part/a/x - part/b/x"  # in points


@pytest.mark.parametrize("effect, verdict", [
    (0.05, "supported"), (-0.05, "opposite"), (0.0, "negligible"), (0.01, "undecided"),
    (-0.01, "undecided")])
def test_the_verdict_is_where_the_interval_lies(effect, verdict):
    found, = judge(results_of(effect), [EFFECT])
    assert found["verdict"] == verdict


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for rng in range(60):
        random = results_of(0.02, seeds=3, seed_noise=0.01, file_noise=0, rng=rng)
        found = estimate(random, EFFECT)
        covered += found["low"] < 2 < found["high"]
    assert covered >= 53


def test_holms_correction_multiplies_by_the_claims_that_are_left():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


# The page
def wrong_numbers(page, results):
    """The marked numbers of a page that differ from the results: a list of (text, key, value)"""
    found = []
    for text, key in re.findall(r"([-+]?\d+(?:\.\d+)?)%?<!--(.+?)-->", page):
        end, _, effect = key.rpartition(": ")
        value = estimate(results, effect)[end or "effect"]
        decimals = len(text.partition(".")[2])
        if f"{value:.{decimals}f}" != text.lstrip("+"):
            found.append((text, key, value))
    return found


def unmarked_numbers(page):
    """Numbers with a decimal point in the page's prose that no comment explains."""
    prose = page.split(report.BEGIN)[0] + page.split(report.END)[1].split("## Log")[0]
    prose = re.sub(r"```.*?```|`[^`]*`|\d{4}\.\d{5}", "", prose, flags=re.S)  # code, arXiv's ids
    prose = re.sub("<!--.*?-->", "<!---->", prose)
    return re.findall(r"(?<![\w.])[-+]?\d+\.\d+%?(?!<!--)(?![\d.%])", prose)


def test_the_page_holds_the_table_of_the_committed_results():
    table = PAGE.split(report.BEGIN)[1].split(report.END)[0]
    assert table == report.table(report.load("full"))


def test_every_number_of_the_page_is_that_of_the_results():
    assert wrong_numbers(PAGE, report.load("full")) == []
    assert unmarked_numbers(PAGE) == []


def test_a_wrong_or_unexplained_number_is_found():
    results = results_of(0.05)
    value = number(results, "part/a/x")
    right, wrong = [f"{v:.1f}%<!--part/a/x-->" for v in (value, value + 0.2)]
    assert wrong_numbers(f"It is {right}.", results) == []
    assert len(wrong_numbers(f"It is {wrong}.", results)) == 1
    page = f"It is 12.5% or {right}. {report.BEGIN} 3.4 {report.END} See arXiv 2505.17505."
    assert unmarked_numbers(page) == ["12.5%"]


def test_figures_and_results_that_the_page_names_are_there():
    for path in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (ROOT / "docs" / path).exists(), path


@pytest.mark.parametrize("script, options, words", [
    ("study", ["--size", "huge"], "huge"), ("study", ["--jobs", "0"], "--jobs"),
    ("study", ["--out", "missing/x.json"], "missing"), ("study", ["--folder", __file__], "exists"),
    ("report", ["--size", "quick"], "study.py --size quick")])
def test_bad_options_are_one_line(script, options, words):
    assert_one_line_error(command(f"experiments/study/{script}.py", *options), words)
