"""Lesson 8: how to compare methods so that a reviewer believes it: right controls, intervals over
seeds and windows, nothing chosen and crowned by the same data, work that can be stopped."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from conftest import ROOT, tiny_model
from data.loader import Corpus
from data.prepare import get_tokenizer, write_corpus
from experiments import (findings, study_layers, study_recipes, study_runs, study_scale,
                         study_tasks)
from experiments.study import PARTS, needs
from experiments.calibrate import simulate_steps
from experiments.study_leap import METHODS, drafting
from experiments.study_runs import SIZES, Shape, Study, flops, foresee, kept
from experiments.verdicts import estimate, holm, verdict
from heads import draft_sources, joint_loss
from marginalize import marginalize, questions
from test_experiments import accepted_by_brute_force


# ----------------------------------------------------------------------------------------------
# Statistics

def test_an_interval_over_seeds_is_students_and_over_windows_that_of_many_draws():
    rng = np.random.default_rng(0)
    seeds, windows = np.array([[1.0], [2.0], [4.5]]), rng.normal(0, 1, (1, 200))
    found = estimate(lambda d: d, 0.0, seeds + 0 * windows, n=100_000)
    half = 4.303 * np.std(seeds, ddof=1) / 3 ** 0.5  # two degrees of freedom
    assert found["high"] - found["effect"] == pytest.approx(half, rel=0.05)
    found = estimate(lambda d: d, 0.0, 0 * seeds + windows)
    half = 1.96 * windows.std() / 200 ** 0.5
    assert found["high"] - found["effect"] == pytest.approx(half, rel=0.05)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
def test_a_95_percent_interval_covers_the_truth_about_so_often(seeds, spread):
    rng, covered = np.random.default_rng(1), 0
    for _ in range(300):
        difference = (rng.normal(0, spread, (seeds, 1)) + rng.normal(0, 1, (1, 60))
                      + rng.normal(0, 1, (seeds, 60)))
        found = estimate(lambda d: d, 0.0, difference, n=500)
        covered += found["low"] <= 0 <= found["high"]
    assert 0.92 <= covered / 300


def test_pairing_removes_what_windows_have_in_common_and_nothing_is_concluded_from_nothing():
    windows = np.random.default_rng(0).normal(0, 10, (3, 50))
    found = estimate(lambda a, b: a - b, 0.5, windows + 1, windows)
    assert found["low"] == pytest.approx(1) and found["high"] == pytest.approx(1)
    assert found["by_seed"] == pytest.approx([1, 1, 1]) and found["p"] < 0.001
    for nothing in (estimate(lambda a, b: a / b, 0, 0 * windows, 0 * windows),
                    estimate(lambda a: a, 0, windows[:1] + 100)):  # one seed
        assert verdict(nothing, nothing["p"]) == "undecided"


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize("low, high, p, expected", [
    (0.6, 2, 0.01, "supported"), (0.6, 2, 0.06, "undecided"), (0.4, 2, 0.01, "undecided"),
    (0.1, 0.4, 0.01, "refuted (negligible)"), (-2, 0.1, 0.01, "refuted (negligible)"),
    (-2, -1, 0.01, "refuted (opposite)"), (-2, -1, 0.5, "undecided")])
def test_a_verdict_is_about_the_interval_and_the_smallest_effect(low, high, p, expected):
    assert verdict(dict(low=low, high=high, smallest=0.5), p) == expected


# ----------------------------------------------------------------------------------------------
# Runs and measurements that are kept

SIZE = replace(SIZES["quick"], seeds=(1, 2), base=Shape(2, 1, 16), steps=6, adapt=4,
               pair_steps=6, frozen_steps=4, depths=(1,), windows=6, positions=4)


@pytest.fixture(scope="module")
def study(tmp_path_factory, corpus):
    return Study(SIZE, tmp_path_factory.mktemp("study"))


def test_a_run_is_made_once_again_if_its_options_change_and_goes_on_if_stopped(study, corpus):
    def weights(**options):
        run = study.run("run", 1, data=corpus, **options)
        return (run / "checkpoint.pt").stat().st_mtime_ns, study.load(run)[0].state_dict()
    made, first = weights(eval_every=2)
    assert weights(eval_every=2)[0] == made
    assert weights(eval_every=3)[0] > made
    stopped = dict(eval_every=2, steps=6)
    made, whole = weights(**stopped)
    checkpoint = study.folder / "run-s1" / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | dict(step=0), checkpoint)  # as if it had been stopped...
    made, again = weights(**stopped)
    assert any((again[k] != whole[k]).any() for k in whole)  # ... so it went on from its weights


def test_a_measurement_is_made_again_when_its_run_is_newer(tmp_path):
    file, run = tmp_path / "found.json", tmp_path / "run"
    run.write_text("")
    assert kept(file, [run], lambda: 1) == kept(file, [run], lambda: 2) == 1
    os.utime(run, (time.time() + 10,) * 2)
    assert kept(file, [run], lambda: 3) == 3


@pytest.fixture(scope="module")
def heads(study, corpus):
    """A run with heads for all offsets, on a frozen backbone."""
    base = study.base(1, corpus)
    return study.run("heads", 1, base, corpus, offsets="1,2,3,4,5,6,7", backbone_lr=0)


def test_foresee_counts_what_is_right_in_each_window(study, heads):
    model, text = study.load(heads)
    windows, position = (t[::2] for t in questions(text, 128, 2, 12, 4))
    found = foresee(study, heads)
    with torch.no_grad():
        predicted = {o: logits.argmax(-1) for o, logits in model(windows[:, :-1]).items()}
    exact = marginalize(model.gpt, windows[:, :-1], 2, None, position=position)[0].argmax(-1)
    for what, guess, distance in (("t+1", predicted[1].gather(1, position), 1),
                                  ("t+2 head", predicted[2].gather(1, position), 2),
                                  ("t+2 marginalised", exact, 2)):
        right = (guess == windows.gather(1, position + distance)).sum(1).tolist()
        assert found[what] == right, what
        assert all(a <= b for a, b in zip(right, found[f"top5 {what}"]))


def test_drafting_counts_the_steps_and_tokens_of_a_decoder_that_follows(study, corpus, heads):
    model, text = study.load(heads)
    found = drafting(study, heads, corpus)
    windows, sources = text.windows("val", 6, 129), draft_sources(METHODS["leap"])
    for i, row in enumerate(accepted_by_brute_force(model, windows, sources)):
        assert found["leap, accepted"][i] == pytest.approx(np.mean(row), abs=1e-4)
        steps = simulate_steps(torch.tensor([row]))
        assert found["leap, steps"][i] == len(steps)
        assert found["leap, tokens"][i] == len(steps) + sum(steps)
    assert len(found["leap, sampled"]) == 64 and max(found["leap, sampled"]) <= 112


# ----------------------------------------------------------------------------------------------
# Controls and choices

def test_the_control_of_translation_moves_no_german_byte(study, tmp_path, monkeypatch):
    lines = [f"dog {i % 7}{'a' * (i % 5)}\thund {i}\n" for i in range(60)]
    splits = dict(train=["".join(lines)], val=["".join(lines)])
    write_corpus(tmp_path / "pairs", splits, get_tokenizer("bytes"),
                 dict(source="multi30k", tokenizer="bytes"))
    monkeypatch.setattr(study_scale, "Corpus", lambda _: Corpus(tmp_path / "pairs"))
    before, after = Corpus(tmp_path / "pairs"), Corpus(study_scale.shuffled(study))
    a, b = (torch.from_numpy(np.array(c.train).astype(np.int64)) for c in (before, after))
    german = before.predicted(a)
    assert torch.equal(german, after.predicted(b)) and torch.equal(a[german], b[german])
    assert (a != b).any() and sorted(a.tolist()) == sorted(b.tolist())


def test_a_head_can_read_one_layer_and_training_does_not_change_which(study, corpus):
    base = study.base(1, corpus)
    start = study_layers.reading(study, base, 1, seed=1)
    run = study.run("reads-1", 1, start, corpus, whs=True, **study_layers.HEADS)
    model, idx = study.load(run)[0], torch.arange(8)[None]
    assert model.layer_weights() == {2: [1.0, 0.0]}
    with torch.no_grad():
        layer = model.gpt.transformer.ln_f(model.gpt.residual_stream(idx)[1])
        expected = model.gpt.lm_head(model.heads["2"].blocks[0](layer))
        assert torch.allclose(model(idx)[2], expected, atol=1e-5)


def test_a_configuration_is_chosen_by_accuracy_among_those_that_lose_little():
    rows = {"base": {"nats": [32.0]}}
    for rate, nats, right in ((1, 32.5, 5), (2, 33.0, 9)):
        found = {"nats": [nats], "t+2 head": [right], "scale": 1, "rate": rate}
        rows[f"joint, 1 x {rate}"] = found
    rows["joint, slower backbone, 0.1 x 1"] = dict(rows["joint, 1 x 1"], scale=0.1)
    assert study_recipes.chosen(rows, "joint", 32) == (1, 1)
    rows["joint, 1 x 1"]["nats"] = [40.0]
    assert study_recipes.chosen(rows, "joint", 32) == (1, 2)  # the least, if all lose too much


@pytest.mark.parametrize("frozen", [False, True])
def test_compute_is_counted_as_pytorch_counts_it(frozen):
    from torch.utils.flop_counter import FlopCounterMode
    model = tiny_model((1, 2), kind="block", block_size=128, vocab_size=257).to("meta")
    model.gpt.requires_grad_(not frozen)
    weights = {1: 0.0, 2: 1.0} if frozen else None
    with FlopCounterMode(display=False) as counter:
        joint_loss(model, torch.zeros(1, 129, dtype=torch.long, device="meta"), weights,
                   backward=True)
    assert flops(Shape(2, 1, 32), heads=1, frozen=frozen) * 128 == pytest.approx(
        counter.get_total_flops(), rel=0.01)


def test_the_answer_of_the_planning_task_is_the_reversed_running_parity():
    tokens, asked = study_tasks.parities(5, 20, torch.Generator().manual_seed(0))
    for bits in tokens.tolist():
        assert bits[5] == 2 and bits[6:] == [sum(bits[:i + 1]) % 2 for i in range(5)][::-1]
    assert asked.nonzero()[:, 1].tolist() == [6] * 20


def test_how_a_task_is_learnt_does_not_depend_on_patience():
    def curve(patience):
        study, V = Study(replace(SIZE, patience=patience), "."), study_tasks.STORY["vocab_size"]
        return study_tasks.learn(study, study_tasks.stories, Shape(1, 1, 16), 0, V, 8, "1")["curve"]
    assert curve(150) == curve(250)[:6]


def test_a_name_that_returns_has_the_second_token_that_it_had():
    tokens, asked = study_tasks.stories(20, torch.Generator().manual_seed(0))
    for row, where in zip(tokens.tolist(), asked.tolist()):
        known = {}
        for i in range(0, len(row), 3):
            assert where[i + 1] == (row[i] in known) and not where[i] and not where[i + 2]
            assert known.setdefault(row[i], row[i + 1]) == row[i + 1]


# ----------------------------------------------------------------------------------------------
# What is concluded

def test_leap_breaks_even_where_both_formulas_agree():
    g = findings.break_even()
    assert 0.1 < g < 0.2
    for method, offsets in METHODS.items():
        assert findings.tokens_at(0.0, method) == offsets[-1]
    accuracy = np.exp(-0.3 * np.arange(1, 7)).mean()
    assert findings.attenuation(np.array([accuracy]))[0] == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize("gain, expected", [(0.5, "supported"), (-0.5, "refuted (opposite)"),
                                            (0.0, "refuted (negligible)"), (0.02, "undecided")])
def test_the_page_says_what_the_results_say(tmp_path, gain, expected):
    rng, page = np.random.default_rng(0), tmp_path / "page.md"

    def measured(more):
        return {"nats": [64.0] * 40, "t+1": [16] * 40, "leap, steps": [50] * 40,
                "leap, sampled": [50] * 40,
                "leap, tokens": list(50 * (2 + more) + rng.normal(0, 1, 40))}
    more = {"base": 0, "trained on": 0, "first stage": 0, "two stages": gain, "one stage": 0,
            "two stages on the corpus": 0}
    rows = {row: {seed: measured(x) for seed in (1, 2, 3)} for row, x in more.items()}
    write_results(tmp_path, "stages", rows)
    page.write_text("By hand.\n" + "".join(findings.MARKS) + "The end.\n")
    findings.main(["--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert f"### Two stages write more tokens per step than one gentle stage: {expected}" in text
    assert "better: refuted" in text  # no difference at all
    assert text.startswith("By hand.") and text.endswith("The end.\n")
    write_results(tmp_path, "frozen", {})  # of an older study
    for folder in (tmp_path / "none", tmp_path):  # without results the page stays
        with pytest.raises(SystemExit):
            findings.main(["--results", str(folder), "--page", str(page)])
    assert page.read_text() == text


@pytest.mark.parametrize("longer, expected", [(2.0, "supported"), (3.0, "undecided")])
def test_heads_that_still_improve_are_not_said_to_stay_below(tmp_path, longer, expected):
    def by_seed(right, what="t+2 head"):
        return {seed: {what: [right] * 40} for seed in range(4)}  # of four positions per window
    write_results(tmp_path, "frozen", {
        "backbone": by_seed(3.9, "t+2 marginalised"), "1 layers, 2 steps": by_seed(2.0),
        "1 layers, 4 steps": by_seed(longer)})
    [(claim, found)] = findings.judge(findings.load(tmp_path))["frozen"]
    assert found == expected and claim.found["effect"] > 10


def test_sooner_counts_the_pairs_of_which_a_method_learnt_its_task(tmp_path):
    def row(*by_seed):  # (steps, accuracy in the end)
        return {seed: dict(steps=steps, curve=[0.5, right])
                for seed, (steps, right) in enumerate(by_seed, 1)}
    write_results(tmp_path, "planning", {
        "12 bits, MTP": row((400, 1), (400, 1), (800, 0)),
        "12 bits, leap": row((100, 1), (200, 1), (800, 0)),     # 2 doublings, 1, nothing
        "14 bits, MTP": row((800, 0), (800, 0), (800, 0)),
        "14 bits, leap": row((400, 1), (800, 0), (800, 0))})    # at least 1, nothing, nothing
    part = findings.load(tmp_path)["planning"]
    part.rows = {name: dict(reversed(by_seed.items())) for name, by_seed in part.rows.items()}
    pairs = [(f"{n} bits, MTP", f"{n} bits, leap") for n in (12, 14)]
    assert findings.sooner(part, pairs)["by_seed"] == pytest.approx([1.5, 1])
    assert findings.sooner(part, pairs, cost=2)["by_seed"] == pytest.approx([0.5, 0])
    assert "14 bits, leap 667 (2 of 3 not)" in findings.steps_of(part, part.rows)
    assert np.isnan(findings.sooner(part, pairs[1:])["effect"])  # of one seed


def write_results(folder, name, rows):
    (folder / f"study_quick_{name}.json").write_text(json.dumps(
        dict(command="", size=asdict(SIZE), rows=rows)))


@pytest.mark.slow
def test_every_part_measures_what_its_claims_need(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(study_runs, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("python", "logs"):
        (tmp_path / "data" / name).symlink_to(corpus)
    claims = dict(recipes=3, layers=1, frozen=1, leap=4, stages=2, scale=3)
    for name in claims:
        by_seed = {seed: PARTS[name](Study(SIZE, tmp_path), seed) for seed in (0, 1)}
        rows = {row: {seed: found[row] for seed, found in by_seed.items() if row in found}
                for row in by_seed[0] | by_seed[1]}
        write_results(tmp_path, name, rows)
    judged = findings.judge(findings.load(tmp_path))
    assert {name: len(found) for name, found in judged.items()} == claims


# ----------------------------------------------------------------------------------------------
# The command

def test_a_job_begins_after_those_whose_runs_it_reads():
    assert needs("recipes", 2) == {("base", 2), ("recipes", 0)}
    assert needs("recipes", 0) == needs("leap", 0) == {("base", 0)}
    assert needs("planning", 1) == needs("base", 1) == set()


@pytest.mark.slow
def test_a_study_that_was_killed_goes_on_and_leaves_no_process_behind(tmp_path):
    options = ["--only", "planning", "--jobs", "1", "--folder", str(tmp_path / "runs"),
               "--results", str(tmp_path)]
    again = [sys.executable, "-c", "from experiments import study, study_runs as r\n"
             "r.SIZES['quick'].__dict__.update(seeds=(1,), bits=(4,), patience=50)\n"
             f"study.main({options})"]
    first = subprocess.Popen(again, cwd=ROOT, start_new_session=True)
    while not (made := list((tmp_path / "runs").glob("planning*.json"))):
        time.sleep(0.1)
        assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.wait()
    seen = {path: path.stat().st_mtime_ns for path in made}
    subprocess.run(again, cwd=ROOT, check=True, timeout=120)
    assert all(path.stat().st_mtime_ns == then for path, then in seen.items())
    with pytest.raises(ProcessLookupError):  # the workers of the first have ended
        os.killpg(first.pid, 0)
    rows = json.loads((tmp_path / "study_quick_planning.json").read_text())["rows"]
    assert len(rows) == 5 and all("1" in row for row in rows.values())
