"""Lesson 7: the study does each piece once, compares like with like, and the README says what its results say."""
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import ROOT, TINY, assert_one_line_error, command

sys.path.insert(0, str(ROOT / "experiments"))
import findings
import study
from study import MTP, PARTS, RECIPES, SEEDS, SIZES, Piece, Shape, Study, do_all, flops, parities, results_of

TINY_SIZE = replace(SIZES["quick"], ladder=(Shape(1, 1, 16),), base=Shape(1, 1, 16), steps=20, batch_size=2)


# Pieces

def add(name, a, b):
    """A piece's work: says in a file that it was done."""
    with open(study.Here.folder / "done.txt", "a") as f:
        f.write(name + "\n")
    return dict(sum=a + b)


def pieces(b=2):
    return [Piece("x", add, dict(name="x", a=1, b=b)), Piece("y", add, dict(name="y", a=0, b=0)),
            Piece("z", add, dict(name="z", a=5, b=5), needs=("x",)),
            Piece("t", add, dict(name="t", a=1, b=1), alone=True)]


def test_each_piece_is_done_once_and_again_when_it_or_what_it_needs_has_changed(tmp_path):
    def done():
        return (tmp_path / "done.txt").read_text().split()
    assert do_all(pieces(), tmp_path, "cpu", jobs=2) == {"x": {"sum": 3}, "y": {"sum": 0}, "z": {"sum": 10},
                                                         "t": {"sum": 2}}
    assert sorted(done()) == ["t", "x", "y", "z"] and done()[-1] == "t"     # what measures time comes last
    assert do_all(pieces(), tmp_path, "cpu", jobs=2)["x"] == {"sum": 3} and len(done()) == 4
    (tmp_path / "y.json").write_text('{"arguments": {"na')                  # as a crash could leave it
    assert do_all(pieces(b=4), tmp_path, "cpu", jobs=2)["x"] == {"sum": 5}
    assert sorted(done()[4:]) == ["x", "y", "z"]
    assert results_of(tmp_path, pieces(b=7)).keys() == {"y", "t"}           # z was computed from another x,
    do_all(pieces(b=7)[:1], tmp_path, "cpu", jobs=1)                        # and still is when the new one is there
    assert results_of(tmp_path, pieces(b=7)).keys() == {"x", "y", "t"}


def test_the_time_of_pieces_that_share_the_cores_is_told_from_that_of_pieces_alone(tmp_path):
    for piece, seconds in zip(pieces(), (1, 2, 3, 4)):
        study.kept(tmp_path, piece).write_text(json.dumps(dict(seconds=seconds)))
    assert study.seconds_of(tmp_path, pieces()) == {"side by side": 6, "alone": 4}


def test_an_error_in_a_piece_is_said_and_what_is_done_is_kept(tmp_path):
    bad = Piece("bad", add, dict(name="bad", a=1, b="no number"), needs=("x",))
    with pytest.raises(TypeError):
        do_all([*pieces(), bad], tmp_path, "cpu", jobs=1)
    assert "x" in results_of(tmp_path, pieces())


def test_a_study_that_is_stopped_goes_on_where_it_was(tmp_path):
    """The planning part, in a process of its own, which is asked to stop while it trains."""
    options = ["--quick", "--only", "planning", "--folder", tmp_path, "--results", tmp_path, "--device", "cpu"]
    script = "\n".join([
        "import sys; sys.path.insert(0, 'experiments')", "import study", "from dataclasses import replace",
        "if __name__ == '__main__':",
        "    study.SIZES['quick'] = replace(study.SIZES['quick'], plan_bits=8, plan_steps=20); study.main()"])
    (tmp_path / "tiny.py").write_text(script.replace("'experiments'", repr(str(ROOT / "experiments"))))
    process = subprocess.Popen([sys.executable, tmp_path / "tiny.py", *options, "--jobs", "1"], cwd=ROOT, text=True,
                               stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(tmp_path.glob("plan-*.json")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130 and "the same command goes on" in process.stderr.read()
    first = {f: f.stat().st_mtime_ns for f in tmp_path.glob("plan-*.json")}
    assert 0 < len(first) < 9 and not (tmp_path / "study_quick_planning.json").exists()
    result = command(tmp_path / "tiny.py", *options)
    assert result.returncode == 0, result.stderr
    assert all(f.stat().st_mtime_ns == when for f, when in first.items())
    found = json.loads((tmp_path / "study_quick_planning.json").read_text())
    assert [row["label"] for row in found["rows"]] == ["NTP", "MTP", "leap k=2"]
    assert all(len(v) == len(SEEDS) for row in found["rows"] for v in row["values"].values())
    assert found["environment"]["torch"] == torch.__version__ and "--only planning" in found["command"]


# What is compared

def test_flops_are_those_of_the_matrix_products():
    """Forward, and twice as many backward: for the weights and for the inputs. A frozen backbone has no backward pass,
    and the heads on it need a gradient of their own weights and of the inputs of the frozen unembedding only."""
    shape = dict(n_layer=1, n_head=1, n_embd=16, batch_size=2, block_size=32)
    options = ["--offsets", "1,2", *(f"--{k.replace('_', '-')}={v}" for k, v in shape.items())]
    tokens, C, T, V = 64, 16, 32, 257
    layer = 2 * tokens * 12 * C * C + 4 * tokens * T * C                    # weights, and attention over T positions
    head = 2 * (tokens - 2) * (C * C + V * C)                               # the last position has no target for it
    ntp = 2 * tokens * V * C
    frozen, joint = flops(options)
    assert joint == pytest.approx(3 * (layer + ntp + head), rel=0.03)
    assert frozen == layer + 2 * head


@pytest.mark.parametrize("label", RECIPES)
def test_every_recipe_gets_the_same_compute(label):
    made = Study(TINY_SIZE)
    piece = made.pieces[made.joint("x", 0, **RECIPES[label])]
    options = dict(zip(piece.arguments["options"], piece.arguments["options"][1:]))
    frozen, joint = flops(piece.arguments["options"])
    steps, alone = int(options["--steps"]), int(options.get("--head-warmup", 0))
    assert alone * frozen + (steps - alone) * joint == pytest.approx(made.added, abs=max(frozen, joint))


def test_every_part_names_pieces_that_exist_and_seeds_differ_in_nothing_else():
    made = Study(SIZES["quick"])
    for part in PARTS.values():
        for label, names in part(made):
            assert set(names) <= made.pieces.keys(), label
            for name in names:
                assert all(need in made.pieces for need in made.pieces[name].needs)
    order = list(made.pieces)
    assert all(order.index(n) < order.index(p.name) for p in made.pieces.values() for n in p.needs)
    runs = {n: p.arguments["options"] for n, p in made.pieces.items() if p.function is study.train_run}
    for name, options in runs.items():
        same, seed = runs[f"{name[:-1]}0"], name[-1]
        assert options == [*same[:-1], seed] and same[-2:] == ["--seed", "0"]


def test_a_run_is_measured_with_its_own_heads_and_its_own_corpus(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(study.Here, "folder", tmp_path)
    monkeypatch.setattr(study.Here, "device", torch.device("cpu"))
    options = ["--data", str(corpus), "--offsets", MTP, "--steps", "30", *TINY[:-3], "--dtype", "float32",
               "--block-size", "64"]
    study.train_run("base", options, None, None)
    before = (tmp_path / "base" / "checkpoint.pt").stat().st_mtime_ns
    study.train_run("base", options, None, None)                            # it is there already
    assert (tmp_path / "base" / "checkpoint.pt").stat().st_mtime_ns == before
    study.train_run("base", [*options, "--lr", "1e-3"], None, None)         # with other settings it is another run
    assert (tmp_path / "base" / "checkpoint.pt").stat().st_mtime_ns != before
    study.own_text("own", "base", 300, seed=0)
    heads = ("heads", [*options, "--backbone-lr", "0"], "base", "own")
    study.train_run(*heads)
    first, own = study.load("heads")
    assert own.folder == tmp_path / "own"
    study.train_run("base", [*options, "--lr", "1e-2"], None, None)         # another base: other heads
    study.train_run(*heads)
    assert not torch.equal(study.load("heads")[0].heads["2"].blocks[0].weight, first.heads["2"].blocks[0].weight)
    found = study.foresee("base", windows=4)
    assert found["nats"] > 0 and {"own head t+2", "marginalisation t+4", "accuracy of offset 3"} <= found.keys()
    found = study.draft("base", (1, 2, 3, 4), prompts=2)
    assert found["greedy, NTP"] == 1 <= found["greedy, chain"] and found["sampled, tree, identical"]


def test_the_answer_of_the_planning_task_is_the_reversed_running_parity():
    x = parities(5, 100, torch.Generator().manual_seed(0))
    for bits in x.tolist():
        running = [sum(bits[:i + 1]) % 2 for i in range(5)]
        assert bits[5] == 2 and bits[6:] == running[::-1]


def test_a_row_holds_a_number_per_seed_and_all_training_behind_it():
    def run(name, init=None, own=None):
        arguments = dict(name=name, options=["--steps", name], init=init, own=own)
        return Piece(name, study.train_run, arguments, [n for n in (init, own) if n])
    behind = [run("base"), Piece("own", study.own_text, {}, ["base"]), run("heads", "base", "own"),
              Piece("m0", study.foresee, {}, ["heads"]), Piece("m1", study.foresee, {}, ["other"])]
    results = dict(m0=dict(a=1, b=2), m1=dict(a=3, b=4), again=dict(c=5))
    rows = [("row", ["m0", "m1"]), ("row", ["again"])]
    behind.append(Piece("again", study.speed, {}, ["heads"]))
    assert study.table(rows, {p.name: p for p in behind}, results) == [dict(
        label="row", values=dict(a=[1, 3], b=[2, 4], c=[5]),
        train=dict(base="--steps base", heads="--steps heads --init base --data own"))]


# What is said about it

@pytest.mark.parametrize("differences, said", [
    ([[1, 2, 3]], "reproduced"), ([[1, 2, 3], [1, 1, 0.1]], "reproduced"),
    ([[-1, -1, -3]], "not reproduced"), ([[1, 2, 3], [-1, -1, -1]], "not reproduced"),
    ([[1, -1, 3]], "cannot be seen at this size"), ([[0, 1, 1]], "cannot be seen at this size")])
def test_a_claim_holds_only_if_every_seed_says_so(differences, said):
    assert findings.verdict(*(np.array(d, dtype=float) for d in differences)) == said


def test_the_break_even_is_where_both_write_as_much():
    a, b = (1, 2, 3, 4), (1, 3, 5, 7)
    g = findings.break_even(a, b)

    def written(offsets, g):
        return findings.expected(offsets, lambda o: np.exp(-g * (o - 1)))
    assert written(a, g) == pytest.approx(written(b, g))
    assert written(b, g / 2) > written(a, g / 2) and written(b, 2 * g) < written(a, 2 * g)
    assert written(a, 0) == 4 and written(b, 0) == 7


def test_the_attenuation_is_that_of_the_accuracies(tmp_path):
    values = {f"accuracy of offset {o}": [np.exp(-g * (o - 1)) for g in (0.1, 0.5)] for o in (1, 2, 3, 4)}
    part = results_file(tmp_path, {"MTP": values})
    assert findings.attenuation(part, "MTP").tolist() == pytest.approx([0.1, 0.5])


def test_numbers_are_means_with_the_lowest_and_the_highest_in_brackets():
    assert findings.spread(np.array([1.0, 2.0, 6.0])) == "3.00 [1.00, 6.00]" and findings.spread(np.array([2.0])) == "2.00"
    assert findings.percent(np.array([0.25, 0.5])) == "37.5 [25.0, 50.0]"


def results_file(folder, rows):
    """rows {label: {name: list}} as the results of a part."""
    path = folder / "study_quick_adapt.json"
    path.write_text(json.dumps(dict(rows=[dict(label=label, values=v, train={}) for label, v in rows.items()])))
    return findings.Part(path)


@pytest.mark.parametrize("frozen, joint, scratch, said", [
    (0.40, 0.45, 0.60, ["reproduced", "reproduced", "reproduced", "reproduced"]),
    (0.52, 0.45, 0.30, ["not reproduced", "not reproduced", "reproduced", "not reproduced"]),
    (0.40, 0.55, 0.50, ["reproduced", "reproduced", "not reproduced", "not reproduced"])])
def test_what_is_said_of_adaptation_follows_from_its_numbers(frozen, joint, scratch, said, tmp_path):
    """The mark that heads have to reach, 0.5 at t+2, is the marginalisation of the model that they are added to."""
    rows = {"NTP, marginalised": {"marginalisation t+2": [0.5, 0.5], "nats": [1.0, 2.0]}}
    for label in [*RECIPES, "from scratch"]:
        top1 = scratch if label == "from scratch" else frozen if label.startswith("frozen") else joint
        rows[label] = {"own head t+2": [top1, top1 + 0.01], "nats": [1.5, 2.25]}
    results_file(tmp_path, rows)
    part = findings.load(tmp_path, "quick")["adapt"]
    assert part["joint, weight 1", "lost"].tolist() == [0.5, 0.25]          # seed by seed
    claims = list(findings.of_adapt(part))
    assert [claims[i].verdict for i in (0, 1, 2, -1)] == said
    assert "NTP lost 0.375 [0.250, 0.500]" in claims[1].measured


@pytest.mark.parametrize("size", SIZES)
def test_tables_and_the_readme_say_what_the_result_files_say(size):
    folder = ROOT / "experiments" / "results"
    if not list(folder.glob(f"study_{size}_*.json")):
        pytest.skip("there are no results of this size")
    parts = findings.load(folder, size)
    assert (folder / f"study_{size}.md").read_text() == findings.tables(parts, size)
    marked = findings.MARKED.search((ROOT / "README.md").read_text())
    if marked[1] == size:
        assert marked[0] == findings.findings_table(parts, size)


@pytest.mark.parametrize("script, options, words", [
    ("study.py", ["--only", "nothing"], "--only"), ("study.py", ["--jobs", "0"], "--jobs"),
    ("study.py", ["--results", "no/such"], "--results"), ("study.py", ["--device", "tpu"], "not available"),
    ("study.py", ["--size", "huge"], "--size"), ("study.py", ["--folder", "README.md"], "README.md"),
    ("findings.py", ["--results", "no/such"], "no results"), ("findings.py", ["--size", "x"], "--size")])
def test_bad_options_are_one_line(script, options, words):
    options = options if "--size" in options or script != "study.py" else ["--quick", *options]
    assert_one_line_error(command(f"experiments/{script}", *options), words)
