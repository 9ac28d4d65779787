"""Lesson 8: how to compare methods fairly: equal compute, several seeds, verdicts from numbers."""
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, TINY, assert_one_line_error, command, process
from decode import chain
from experiments import findings, study
from experiments.calibrate import expected_tokens_per_step, held_out_acceptance
from experiments.findings import INCONCLUSIVE, NOT_REPRODUCED, RESULTS, REPRODUCED
from experiments.study import MTP, PARTS, RECIPES, SIZES, Piece, Study, do, done_of, stamps


# ----------------------------------------------------------------------------------------------
# What is compared

def test_flops_are_those_of_the_matrix_products():
    """Forward, and twice as many backward: for the weights and for the inputs. A frozen backbone
    has no backward pass; its heads need the gradients of their own weights, and of the inputs of
    the frozen unembedding only."""
    options = ["--offsets", "1,2", "--n-layer", "1", "--n-head", "1", "--n-embd", "16",
               "--batch-size", "2", "--block-size", "32"]
    tokens, C, T, V = 64, 16, 32, 257
    layer = 2 * tokens * 12 * C * C + 4 * tokens * T * C            # weights; attention over T
    head = 2 * (tokens - 2) * (C * C + V * C)                       # the last token has no target
    ntp = 2 * tokens * V * C
    frozen, joint = study.flops(options)
    assert joint == pytest.approx(3 * (layer + ntp + head), rel=0.03)
    assert frozen == layer + 2 * head


@pytest.mark.parametrize("label", RECIPES)
def test_every_recipe_gets_the_same_compute(label):
    made = Study(SIZES["quick"])
    options = made.pieces[made.joint("x", 0, **RECIPES[label])].arguments["options"]
    frozen, joint = study.flops(options[:options.index("--steps")])
    value = dict(zip(options, options[1:]))
    steps, alone = int(value["--steps"]), int(value.get("--head-warmup", 0))
    spent = alone * frozen + (steps - alone) * joint
    assert spent == pytest.approx(made.added, abs=max(frozen, joint))


def test_a_larger_budget_for_adding_heads_is_also_one_for_training_from_scratch():
    one, three = (Study(replace(SIZES["quick"], adaptation=n)) for n in (1, 3))
    assert three.added == 3 * one.added
    assert three.total - three.added == one.total - one.added > 0


def test_seeds_differ_in_nothing_but_the_seed():
    made = Study(SIZES["quick"])
    for part in PARTS.values():
        list(part(made))
    runs = {p.name: p.arguments["options"] for p in made.pieces.values()
            if p.function is study.train_run}
    for name, options in runs.items():
        assert options[:-1] == runs[f"{name[:-1]}0"][:-1] and options[-2:] == ["--seed", name[-1]]


# ----------------------------------------------------------------------------------------------
# What is measured

@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """This process as a worker of the study. -> the study's folder"""
    study.Here.folder, study.Here.device = tmp_path_factory.mktemp("study"), torch.device("cpu")
    yield study.Here.folder
    study.Here.folder = study.Here.device = None


OPTIONS = [*map(str, TINY), "--offsets", MTP, "--steps", "30", "--block-size", "64"]


@pytest.fixture(scope="module")
def run_on_letters(here, corpus):
    """A run whose held-out text is random letters: it can foresee nothing but what it writes."""
    shutil.copytree(corpus, here / "corpus")
    size = (here / "corpus" / "val.bin").stat().st_size // 2
    letters = np.random.default_rng(0).integers(97, 123, size).astype("<u2")
    letters.tofile(here / "corpus" / "val.bin")
    study.train_run("run", [*OPTIONS, "--steps", "90"], None, str(here / "corpus"), None)
    return study.load("run")


def test_what_a_model_knows_is_measured_on_held_out_text(run_on_letters):
    model, text = run_on_letters
    windows, (asked, position) = text.windows("val", 16, 65), study.questions(text, 64, 4, 16, 16)
    with torch.no_grad():
        nats = F.cross_entropy(model.gpt(windows[:, :-1])[0].transpose(1, 2), windows[:, 1:])
        predicted = model.gpt(asked[:, :-1])[0].argmax(-1).gather(1, position)
    right = (predicted == asked.gather(1, position + 1)).float().mean()
    found = study.foresee("run", windows=16)
    assert found["nats"] == pytest.approx(nats.item()) and nats > np.log(26)
    assert found["model t+1"] == pytest.approx(right.item())
    for what in ("model t+1", "marginalisation t+2", "own head t+2", "accuracy of offset 2"):
        assert found[what] < 0.15, what
    assert all(v < 0.15 for v in study.read_layers("run", 16, probe_steps=20).values())


def test_drafting_is_measured_on_held_out_text_and_on_what_the_model_writes(run_on_letters):
    model, text = run_on_letters
    found = study.draft("run", (1, 2, 3, 4), prompts=2)
    tree = chain({j: (j, 0) for j in (2, 3, 4)})
    held_out = held_out_acceptance(model, text.windows("val", 64, 65)[::2], tree)
    assert found["real text, chain"] == held_out[0]
    assert 1 <= found["real text, chain"] < 1.15 < found["greedy, chain"]
    assert found["greedy, NTP"] == found["sampled, NTP"] == 1
    assert found["greedy, chain"] > found["sampled, chain"]
    assert found["real text, tree"] > found["real text, chain"]
    assert all(same for name, same in found.items() if name.endswith("identical"))
    for way in ("chain", "tree"):
        a = [rate for name, rate in found.items() if name.startswith(f"{way}, candidate")]
        assert found[f"formula, {way}"] == pytest.approx(expected_tokens_per_step(a))


def test_the_answer_of_the_planning_task_is_the_reversed_running_parity():
    x = study.parities(5, torch.arange(32))
    assert len({tuple(bits[:5]) for bits in x.tolist()}) == 32
    for bits in x.tolist():
        running = [sum(bits[:i + 1]) % 2 for i in range(5)]
        assert bits[5] == 2 and bits[6:] == running[::-1]


def test_planning_is_asked_about_inputs_that_were_not_trained_on(here, monkeypatch):
    parities, seen = study.parities, []
    monkeypatch.setattr(study, "parities", lambda n, x: seen.append(x.tolist()) or parities(n, x))
    found = study.plan((1, 2), seed=0, bits=5, steps=10)
    *batches, asked = seen
    assert len(batches) == 10 and batches[0] != batches[1]
    assert len(set(asked)) == 8 and not set(asked) & set(sum(batches, []))
    assert set(found) == {"whole answer", *(f"token {i}" for i in range(1, 6))}


# ----------------------------------------------------------------------------------------------
# What is concluded

YES, NO, NONE = REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE


@pytest.mark.parametrize("differences, expected", [
    ([[1, 2, 3]], YES), ([[1, 2, 3], [1, 1, 0.1]], YES), ([[-1, -1, -3]], NO),
    ([[1, 2, 3], [-1, -1, -1]], NO), ([[1, -1, 3]], NONE), ([[0, 1, 1]], NONE)])
def test_a_claim_holds_only_if_every_seed_agrees(differences, expected):
    assert findings.verdict(*(np.array(d, dtype=float) for d in differences)) == expected


def test_numbers_are_means_with_the_lowest_and_the_highest_in_brackets():
    assert findings.spread(np.array([1.0, 2.0, 6.0])) == "3.00 [1.00, 6.00]"
    assert findings.spread(np.array([2.0])) == "2.00"
    assert findings.percent(np.array([0.25, 0.5])) == "37.5 [25.0, 50.0]"


def verdicts(part):
    return [f.verdict for f in findings.FINDINGS[part.results["part"]](part)]


def each_kind(label, way, number):
    """The same number of a row in all three kinds of text."""
    return {(label, f"{kind}, {way}"): number for kind in findings.KINDS}


TWO_STAGES, SOME_SEEDS = findings.ON_A_BASE + "two stages", (9, 9, 0)
MORE, LESS = f"{YES}, but NTP lost more", f"{NO}, but NTP lost less"
LARGEST = ("python, 4 x 96", "marginalisation t+2")
HEAD, EVERYWHERE = "own head t+2", "accuracy of offset 2"
RATES = "+ differential rates"
GREEDY, SAMPLED = (("leap k=2", f"compiled, {k}, chain, speedup") for k in ("greedy", "sampled"))


@pytest.mark.parametrize("name, changes, expected", [               # {index of the claim: verdict}
    ("scale", {LARGEST: 9}, {0: YES}), ("scale", {LARGEST: 0}, {0: NO}),
    ("scale", {LARGEST: SOME_SEEDS}, {0: NONE}),
    ("scale", {("python, 1 x 16", "unigram t+2"): 9}, {0: NO}),
    ("scale", {("multi30k, 2 x 64", "marginalisation t+2"): 9}, {1: YES}),
    ("scale", {("shakespeare, 2 x 64", "marginalisation t+2"): 9}, {1: NO}),
    ("scale", {("shakespeare, 2 x 64", "model t+1"): 0.01}, {1: NO}),
    ("layers", {("NTP", "probe t+2 layer 3"): 9}, {0: YES}),
    ("layers", {("NTP", "probe t+2 layer 4"): 9}, {0: NO, 1: NO}),
    ("layers", {("NTP", "probe t+1 layer 4"): 9, ("MTP", "probe t+2 layer 4"): 9}, {1: YES}),
    ("layers", {("MTP", "probe t+2 layer 4"): 0}, {1: NO}),
    ("adapt", {("NTP, marginalised", "marginalisation t+2"): 9}, {0: YES}),
    ("adapt", {("frozen, WHS", HEAD): 9}, {0: NO}),
    ("adapt", {("frozen, WHS", HEAD): SOME_SEEDS}, {0: NONE}),
    ("adapt", {("joint, weight 1", EVERYWHERE): 9, ("joint, weight 1", "lost"): 9}, {1: MORE}),
    ("adapt", {("NTP, trained on", "marginalisation t+2"): 9}, {2: YES}),
    ("adapt", {("NTP, trained on", "marginalisation t+2"): 0}, {2: NO}),
    ("adapt", {("joint, weight 0.3", HEAD): 9}, {2: NO}),
    ("adapt", {(RATES, EVERYWHERE): 9, (RATES, "lost"): -9}, {3: YES, 4: NO}),
    ("adapt", {(RATES, EVERYWHERE): 0, (RATES, "lost"): -9}, {3: LESS, 4: MORE}),
    ("adapt", {("frozen, WHS", EVERYWHERE): 9}, {5: YES, 7: NO}),
    ("adapt", {("+ WHS", EVERYWHERE): 9, ("+ WHS", "lost"): SOME_SEEDS}, {6: YES, 7: YES, 8: NO}),
    ("adapt", {("from scratch", EVERYWHERE): 9, ("from scratch", "lost"): 9}, {8: MORE}),
    ("leap", {("MTP", "accuracy of offset 4"): 0.001}, {0: YES}),
    ("leap", {("leap k=3", "accuracy of offset 10"): 9}, {0: NO}),
    ("leap", each_kind("leap k=2", "chain", 9), {1: YES, 3: NO}),   # its attenuation is too high
    ("leap", each_kind("leap k=2", "chain", 0), {1: NO, 3: YES}),
    ("leap", each_kind("leap k=2", "chain", SOME_SEEDS), {1: NONE, 3: NONE}),
    ("leap", each_kind("leap k=2", "tree", 9), {2: YES}),
    ("leap", each_kind("MTP", "chain", 9), {4: YES, 5: NO}),
    ("leap", each_kind("MTP", "chain", 0), {4: NO, 5: YES}),
    ("leap", {**each_kind(TWO_STAGES, "chain", 9), (TWO_STAGES, "nats"): 0}, {6: YES, 7: YES}),
    ("leap", {**each_kind(TWO_STAGES, "chain", 0), (TWO_STAGES, "nats"): 9}, {6: NO, 7: NO}),
    ("leap", {GREEDY: 9, SAMPLED: SOME_SEEDS}, {8: f"{YES} (greedy); {NONE} (sampled)"}),
    ("planning", {("NTP", "token 1"): 0, ("leap k=2", "whole answer"): 0}, {0: YES, 1: NO}),
    ("planning", {("NTP", "token 1"): SOME_SEEDS}, {0: NONE}),
    ("backbone", {("MTP", "nats"): 0}, {0: YES}), ("backbone", {("MTP", "nats"): 9}, {0: NO}),
    ("backbone", {("NTP, same text", "nats"): 99}, {0: NO}),        # not at equal compute
    ("headline", {("MTP, 8 bytes", "compiled, greedy, tree, speedup"): 5.1}, {0: "reached"}),
    ("headline", {("MTP, 8 bytes", "compiled, greedy, chain, speedup"): 5.1}, {0: "reached"})])
def test_verdicts_follow_from_the_numbers(name, changes, expected):
    """What would be concluded from the quick study if some of its numbers were different."""
    part = findings.load(RESULTS, "quick")[name]
    for (label, key), number in changes.items():
        seeds = number if isinstance(number, tuple) else (number,) * len(part.values[label][key])
        part.values[label][key] = list(seeds)
    found = verdicts(part)
    assert {i: found[i] for i in expected} == expected


def test_a_study_without_a_compiler_says_nothing_about_speed():
    part = findings.load(RESULTS, "quick")["leap"]
    before = verdicts(part)
    del part.values["MTP"]["compiled, greedy, chain, speedup"]
    assert verdicts(part) == before[:-1]


def part(name, **rows):
    """A part from rows {label: {name: list of numbers, one per seed}}."""
    return findings.Part(dict(part=name, rows=[dict(label=label, values=values)
                                               for label, values in rows.items()]))


def test_what_next_token_prediction_lost_is_compared_seed_by_seed():
    lost = part("adapt", base={"nats": [1.0, 2.0]}, heads={"nats": [1.5, 2.25]})["heads", "lost"]
    assert lost.tolist() == [0.5, 0.25]


def test_attenuation_and_break_even_follow_the_papers_formula():
    decay = {f"accuracy of offset {o}": [np.exp(-g * (o - 1)) for g in (0.1, 0.5)]
             for o in (1, 2, 3, 4)}
    fit = findings.attenuation(part("leap", MTP=decay), "MTP")
    assert fit.tolist() == pytest.approx([0.1, 0.5])

    def tokens(offsets, g):
        return findings.expected(offsets, lambda o: np.exp(-g * (o - 1)))
    mtp, leap = (1, 2, 3, 4), (1, 3, 5, 7)
    g = findings.break_even(mtp, leap)
    assert tokens(mtp, 0) == 4 and tokens(leap, 0) == 7
    assert tokens(mtp, g) == pytest.approx(tokens(leap, g))
    assert tokens(leap, g / 2) > tokens(mtp, g / 2) and tokens(leap, 2 * g) < tokens(mtp, 2 * g)


@pytest.mark.parametrize("size", SIZES)
def test_the_tables_are_those_of_the_result_files(size):
    if not list(RESULTS.glob(f"study_{size}_*.json")):
        pytest.skip("there are no results of this size")
    page = (RESULTS / f"study_{size}.md").read_text()
    assert page == findings.tables(findings.load(RESULTS, size), size)


def test_the_findings_in_docs_are_those_of_the_result_files():
    page = findings.PAGE.read_text()
    assert findings.MARKED.search(page) and findings.with_findings(page, RESULTS) == page


@pytest.mark.parametrize("file", sorted(RESULTS.glob("study_*_*.json")), ids=lambda f: f.stem)
def test_the_study_would_train_today_what_its_result_files_report(file):
    """Whoever changes a recipe, a size or how compute is counted has to measure again."""
    found = json.loads(file.read_text())
    made = Study(SIZES[found["size"]])
    rows = list(PARTS[found["part"]](made))
    today = study.table(rows, made.pieces, {name: dict(result={}) for name in made.pieces})
    assert [[r["label"], r["train"]] for r in today] == [
        [r["label"], r["train"]] for r in found["rows"]]
    assert found["settings"] == json.loads(json.dumps(asdict(SIZES[found["size"]])))


# ----------------------------------------------------------------------------------------------
# Guards: how pieces run

def add(name, a, b, data=""):
    """The work of a piece: note in a file that it ran, and in which process."""
    with open(study.Here.folder / "done.txt", "a") as f:
        f.write(f"{name} {os.getpid()}\n")
    return dict(sum=a + b)


def pieces(b=2):
    """x; y; z, which needs x; t and u, which measure time."""
    return [Piece("x", add, dict(name="x", a=1, b=b)), Piece("y", add, dict(name="y", a=0, b=0)),
            Piece("z", add, dict(name="z", a=5, b=5), needs=("x",)),
            Piece("t", add, dict(name="t", a=1, b=1), alone=True),
            Piece("u", add, dict(name="u", a=2, b=1), alone=True)]


def sums(done):
    return {name: content["result"]["sum"] for name, content in done.items()}


def test_a_piece_runs_once_and_again_when_it_or_what_it_needs_has_changed(here):
    def run(some):
        """As do_all, in this process. -> the names of the pieces that ran"""
        (here / "done.txt").write_text("")
        for piece in some:
            if piece.name not in done_of(here, some):
                do(piece, stamps(some)[piece.name])
        return [line.split()[0] for line in (here / "done.txt").read_text().splitlines()]
    assert run(pieces()) == ["x", "y", "z", "t", "u"] and run(pieces()) == []
    assert sums(done_of(here, pieces())) == dict(x=3, y=0, z=10, t=2, u=3)
    (here / "y.json").write_text('{"arguments": {"na')              # as a crash could leave it
    assert run(pieces()) == ["y"]
    assert run(pieces(b=7)[:1]) == ["x"] and "z" not in done_of(here, pieces(b=7))
    assert run(pieces(b=7)) == ["z"]


def test_a_piece_runs_again_when_its_corpus_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    some = [Piece("run", add, dict(data="")), Piece("m", add, {}, needs=("run",))]
    found = []
    for train_hash in ("1", "2"):
        (tmp_path / "meta.json").write_text(json.dumps(dict(train_sha256=train_hash)))
        found.append(stamps(some))
    assert all(found[0][name] != found[1][name] for name in ("run", "m"))


def test_a_training_run_resumes_and_starts_anew_if_it_comes_from_something_else(here, corpus):
    def run(name, init=None, own=None, **options):
        flags = [x for k, v in options.items() for x in (f"--{k.replace('_', '-')}", str(v))]
        how = dict(name=name, options=[*OPTIONS, *flags], init=init, data=str(corpus), own=own)
        return Piece(name, study.train_run, how, tuple(n for n in (init, own) if n))

    def metrics(*some):
        for piece in some:
            do(piece, stamps(some)[piece.name])
        return (here / "base" / "metrics.jsonl").read_text().splitlines()

    def head():
        return study.load("heads")[0].heads["2"].state_dict()["blocks.0.weight"]
    own = Piece("own", study.own_text, dict(name="own", run="base", tokens=300, seed=0), ("base",))
    heads = run("heads", init="base", own="own", backbone_lr=0)
    first = metrics(run("base"))
    assert metrics(run("base")) == first                            # it is finished
    study.train_run(**run("base", steps=60).arguments)              # as one stopped half-way
    assert (here / "base" / "metrics.jsonl").read_text().splitlines()[:len(first)] == first
    assert len(metrics(run("base", lr=1e-3), own, heads)) == len(first)   # another run: anew
    before = head()
    assert study.load("heads")[1].folder == here / "own"
    metrics(run("base", lr=1e-2), own, heads)                       # another base: other heads
    assert not torch.equal(head(), before)


def test_results_hold_a_number_per_seed_and_the_training_and_the_time_behind_it():
    def run(name, init=None, own=None):
        how = dict(name=name, options=["--steps", name], init=init, data="data/text", own=own)
        return Piece(name, study.train_run, how, [n for n in (init, own) if n])
    some = [run("base"), Piece("own", study.own_text, {}, ["base"]), run("heads", "base", "own"),
            run("other"), Piece("m0", study.foresee, {}, ["heads"]),
            Piece("m1", study.foresee, {}, ["heads"]),
            Piece("again", study.speed, {}, ["heads"], alone=True)]
    results = dict(m0=dict(a=1, b=2), m1=dict(a=3, b=4), again=dict(c=5))
    done = {p.name: dict(result=results.get(p.name), seconds=1.2, environment=dict(date=str(i)))
            for i, p in enumerate(some)}
    rows, by_name = [("row", ["m0", "m1"]), ("row", ["again"])], {p.name: p for p in some}
    assert study.table(rows, by_name, done) == [dict(
        label="row", values=dict(a=[1, 3], b=[2, 4], c=[5]),
        train=dict(base="--data data/text --steps base",
                   heads="--data own --steps heads --init base"))]
    assert study.circumstances(rows[:1], by_name, done) == dict(
        environment=dict(date="5"), seconds={"side by side": 6, "alone": 0})
    assert study.circumstances(rows, by_name, done)["seconds"] == {"side by side": 6, "alone": 1}


@pytest.mark.slow
def test_what_measures_time_runs_after_everything_else_and_one_at_a_time(tmp_path):
    some = pieces()[3:] + pieces()[:3]
    assert sums(study.do_all(some, tmp_path, "cpu", jobs=2)) == dict(x=3, y=0, z=10, t=2, u=3)
    lines = (tmp_path / "done.txt").read_text().splitlines()
    name, pid = zip(*(line.split() for line in lines))
    assert sorted(name[:3]) == ["x", "y", "z"] and name[3:] == ("t", "u")
    assert pid[3] == pid[4] not in pid[:3]


@pytest.mark.slow
def test_an_error_in_a_piece_is_raised_and_what_is_done_is_kept(tmp_path):
    bad = Piece("bad", add, dict(name="bad", a=1, b="no number"), needs=("x",))
    with pytest.raises(TypeError):
        study.do_all([*pieces(), bad], tmp_path, "cpu", jobs=1)
    assert "x" in done_of(tmp_path, pieces())


TINY_STUDY = f"""
import os, sys
from dataclasses import replace
from functools import wraps
sys.path.insert(0, {str(ROOT)!r})
from experiments import study
plan = study.plan

@wraps(plan)
def announced(**how):
    os.write(1, b"begun\\n")
    return plan(**how)

study.plan = announced
study.SIZES["quick"] = replace(study.SIZES["quick"], plan_bits=4, plan_steps=2)
if __name__ == "__main__":
    study.main()
"""                                                                 # workers import this, too


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_is_stopped_leaves_no_process_and_continues_where_it_was(how, tmp_path):
    script = tmp_path / "tiny_study.py"
    script.write_text(TINY_STUDY)
    options = ["--quick", "--only", "planning", "--folder", tmp_path, "--results", tmp_path,
               "--device", "cpu"]
    command = [sys.executable, script, *options, "--jobs", "1"]
    first = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(2):                                              # one is done, one has begun
        assert first.stdout.readline() == "begun\n"
    first.send_signal(how)
    _, errors = first.communicate(timeout=60)                       # until nobody has stdout open
    if how == signal.SIGTERM:
        assert first.returncode == 130 and "the same command continues" in errors
    done = {f: f.stat().st_mtime_ns for f in tmp_path.glob("plan-*.json")
            if "result" in json.loads(f.read_text())}
    assert 0 < len(done) < 9 and not (tmp_path / "study_quick_planning.json").exists()

    result = process(script, *options)
    assert result.returncode == 0, result.stderr
    assert all(f.stat().st_mtime_ns == when for f, when in done.items())
    found = json.loads((tmp_path / "study_quick_planning.json").read_text())
    assert [row["label"] for row in found["rows"]] == ["NTP", "MTP", "leap k=2"]
    assert all(len(v) == 3 for row in found["rows"] for v in row["values"].values())
    assert found["environment"]["torch"] == torch.__version__


# ----------------------------------------------------------------------------------------------
# Guards: the command lines

def test_the_study_lists_its_pieces_in_an_order_in_which_they_can_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                                     # main changes it
    result = command("experiments/study.py", "--quick", "--list", "--folder", tmp_path)
    order, made = result.stdout.split(), Study(SIZES["quick"])
    for part in PARTS.values():
        for _, names in part(made):
            assert set(names) <= set(order)
    assert all(order.index(n) < order.index(p.name) for p in made.pieces.values() for n in p.needs)


@pytest.mark.slow
def test_findings_makes_its_page_and_figures_in_any_folder(tmp_path):
    pytest.importorskip("matplotlib")
    page = findings.PAGE.read_text()
    for file in RESULTS.glob("study_quick_*.json"):
        shutil.copy(file, tmp_path)
    result = process("experiments/findings.py", "--size", "quick", "--results", tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "study_quick.md").read_text() == (RESULTS / "study_quick.md").read_text()
    assert {f.stem for f in tmp_path.glob("*.png")} == {f"study_quick_{part}" for part in PARTS}
    assert findings.PAGE.read_text() == page                        # of the project's own results


def test_a_decoder_that_wrote_another_text_has_no_findings(tmp_path):
    values = {"greedy, chain, identical": [True, True], "sampled, tree, identical": [True, False]}
    rows = [dict(label="MTP", values=values, train={})]
    (tmp_path / "study_quick_leap.json").write_text(json.dumps(dict(part="leap", rows=rows)))
    result = command("experiments/findings.py", "--results", tmp_path)
    assert_one_line_error(result, "another text")


@pytest.mark.parametrize("script, options, words", [
    ("study.py", ["--only", "nothing"], "--only"), ("study.py", ["--jobs", "0"], "--jobs"),
    ("study.py", ["--results", "no/such"], "--results"),
    ("study.py", ["--device", "tpu"], "not available"), ("study.py", ["--size", "huge"], "--size"),
    ("study.py", ["--folder", ROOT / "README.md"], "README.md"),
    ("findings.py", ["--results", "no/such"], "no results"),
    ("findings.py", ["--size", "x"], "--size")])
def test_bad_options_are_one_line(script, options, words):
    options = ["--size", "quick", *options]
    assert_one_line_error(command(f"experiments/{script}", *options), words)
