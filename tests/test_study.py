"""Lesson 7: the study does each piece once, compares like with like, and the README says what its results say."""
import json
import os
import shutil
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
from decode import chain, expected_tokens_per_step, held_out_acceptance
from study import MTP, PARTS, RECIPES, SEEDS, SIZES, Piece, Shape, Study, do, do_all, done_of, flops, parities, stamps

TINY_SIZE = replace(SIZES["quick"], ladder=(Shape(1, 1, 16),), base=Shape(1, 1, 16), steps=20, batch_size=2)


# Pieces

def add(name, a, b, data=""):
    """A piece's work: says in a file that it was done, and by which process."""
    with open(study.Here.folder / "done.txt", "a") as f:
        f.write(f"{name} {os.getpid()}\n")
    return dict(sum=a + b)


def pieces(b=2):
    return [Piece("x", add, dict(name="x", a=1, b=b)), Piece("y", add, dict(name="y", a=0, b=0)),
            Piece("z", add, dict(name="z", a=5, b=5), needs=("x",)),
            *(Piece(name, add, dict(name=name, a=a, b=1), alone=True) for name, a in (("t", 1), ("u", 2)))]


def sums(done):
    return {name: kept["result"]["sum"] for name, kept in done.items()}


def test_each_piece_is_done_once_and_again_when_it_or_what_it_needs_has_changed(tmp_path):
    def log():
        return [line.split()[0] for line in (tmp_path / "done.txt").read_text().splitlines()]
    assert sums(do_all(pieces(), tmp_path, "cpu", jobs=2)) == dict(x=3, y=0, z=10, t=2, u=3)
    assert sorted(log()[:3]) == ["x", "y", "z"] and log()[3:] == ["t", "u"]
    assert sums(do_all(pieces(), tmp_path, "cpu", jobs=2))["x"] == 3 and len(log()) == 5
    (tmp_path / "y.json").write_text('{"arguments": {"na')                  # as a crash could leave it
    assert sums(do_all(pieces(b=4), tmp_path, "cpu", jobs=2))["x"] == 5
    assert sorted(log()[5:]) == ["x", "y", "z"]
    assert done_of(tmp_path, pieces(b=7)).keys() == {"y", "t", "u"}         # z was computed from another x,
    do_all(pieces(b=7)[:1], tmp_path, "cpu", jobs=1)                        # and still is when the new one is there
    assert done_of(tmp_path, pieces(b=7)).keys() == {"x", "y", "t", "u"}
    for file in list(tmp_path.glob("*.json")):                              # a copy of the folder is as good
        shutil.copy(file, file.with_suffix(".copy")), file.unlink(), os.rename(file.with_suffix(".copy"), file)
    assert done_of(tmp_path, pieces(b=7)).keys() == {"x", "y", "t", "u"}


def test_what_measures_time_runs_after_all_else_and_one_at_a_time(tmp_path):
    do_all(pieces()[3:] + pieces()[:3], tmp_path, "cpu", jobs=2)
    name, process = zip(*(line.split() for line in (tmp_path / "done.txt").read_text().splitlines()))
    assert name[3:] == ("t", "u") and process[3] == process[4] not in process[:3]


def test_a_piece_is_done_again_when_its_corpus_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    (tmp_path / "corpus").mkdir()
    measured = Piece("m", add, {}, needs=("run",))
    some, found = [Piece("run", add, dict(data="corpus")), measured, Piece("other", add, {})], []
    for train_hash in ("1", "2"):
        (tmp_path / "corpus" / "meta.json").write_text(json.dumps(dict(train_sha256=train_hash, val_sha256="0")))
        found.append(stamps(some))
    assert {name for name in found[0] if found[0][name] != found[1][name]} == {"run", "m"}


def test_where_and_how_long_is_said_of_what_is_behind_a_part_and_of_nothing_else():
    done = {p.name: dict(seconds=s, environment=dict(date=date)) for p, s, date in zip(
        pieces(), (1, 2, 3.4, 4, 5), ("2026-01-03", "2026-01-09", "2026-01-02", "2026-01-01", "2026-01-01"))}
    found = study.circumstances([("a", ["z"]), ("b", ["z", "t"])], {p.name: p for p in pieces()}, done)
    assert found == dict(environment=dict(date="2026-01-03"), seconds={"side by side": 4, "alone": 4})


def wait_for_ever(name):
    """A piece that does not end."""
    (study.Here.folder / "begun").touch()
    signal.pause()


def test_no_process_goes_on_without_the_first(tmp_path):
    """They share its stdout, which is at its end when the last of them has closed it."""
    script = tmp_path / "first.py"
    script.write_text("\n".join([
        f"import sys; sys.path[:0] = [{str(ROOT / 'experiments')!r}, {str(ROOT / 'tests')!r}, {str(ROOT)!r}]",
        "from pathlib import Path", "from test_study import Piece, do_all, wait_for_ever", "if __name__ == '__main__':",
        "    do_all([Piece('x', wait_for_ever, dict(name='x'))], Path(sys.argv[1]), 'cpu', 1)"]))
    process = subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "begun").exists():
        time.sleep(0.05)
    process.kill()
    process.communicate(timeout=60)                                         # raises TimeoutExpired if one lives on


def test_an_error_in_a_piece_is_said_and_what_is_done_is_kept(tmp_path):
    bad = Piece("bad", add, dict(name="bad", a=1, b="no number"), needs=("x",))
    with pytest.raises(TypeError):
        do_all([*pieces(), bad], tmp_path, "cpu", jobs=1)
    assert "x" in done_of(tmp_path, pieces())


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
    while time.monotonic() < deadline and len(list(tmp_path.glob("plan-*.json"))) < 2:   # one is done, one begun
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130 and "the same command goes on" in process.stderr.read()
    first = {f: f.stat().st_mtime_ns for f in tmp_path.glob("plan-*.json") if "result" in json.loads(f.read_text())}
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


def test_a_larger_budget_for_adding_heads_is_also_one_for_training_from_scratch():
    one, three = (Study(replace(TINY_SIZE, adaptation=n)) for n in (1, 3))
    assert three.added == 3 * one.added and three.total - three.added == one.total - one.added > 0


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


@pytest.fixture
def here(tmp_path, monkeypatch):
    """This process as one that does pieces."""
    monkeypatch.setattr(study.Here, "folder", tmp_path)
    monkeypatch.setattr(study.Here, "device", torch.device("cpu"))
    return tmp_path


OPTIONS = ["--offsets", MTP, "--steps", "30", *TINY[:-3], "--dtype", "float32", "--block-size", "64"]


def test_a_run_is_trained_once_resumed_and_trained_anew_if_it_comes_from_something_else(here, corpus):
    def base(steps=30, **other):
        flags = [x for k, v in other.items() for x in (f"--{k}", str(v))]
        options = [*OPTIONS, "--steps", str(steps), *flags]
        return Piece("base", study.train_run, dict(name="base", options=options, init=None, data=str(corpus), own=None))
    own = Piece("own", study.own_text, dict(name="own", run="base", tokens=300, seed=0), ("base",))
    heads = Piece("heads", study.train_run, dict(name="heads", options=[*OPTIONS, "--backbone-lr", "0"], init="base",
                                                 data=str(corpus), own="own"), ("base", "own"))

    def done(*some):
        for piece in some:
            do(piece, stamps(some)[piece.name])
        return (here / "base" / "metrics.jsonl").read_text().splitlines()

    def heads_weight():
        return study.load("heads")[0].heads["2"].blocks[0].weight.clone()
    first = done(base())
    assert done(base()) == first                                            # it is there already
    study.train_run(**base(60).arguments)                                   # as one that was stopped half-way
    assert (here / "base" / "metrics.jsonl").read_text().splitlines()[:len(first)] == first
    assert study.load("base")[0] is not None and len(done(base(lr=1e-3))) == len(first)     # another run: anew
    done(base(), own, heads)
    before, corpus_of_heads = heads_weight(), study.load("heads")[1]
    assert corpus_of_heads.folder == here / "own"
    done(base(lr=1e-2), own, heads)                                         # another base: other heads
    assert not torch.equal(heads_weight(), before)


def test_models_are_measured_on_held_out_text(here, corpus):
    """Here that is random letters, of which nothing can be foreseen but what the model itself writes."""
    shutil.copytree(corpus, here / "corpus")
    size = (here / "corpus" / "val.bin").stat().st_size // 2
    np.random.default_rng(0).integers(97, 123, size).astype("<u2").tofile(here / "corpus" / "val.bin")
    study.train_run("run", [*OPTIONS, "--steps", "90"], None, str(here / "corpus"), None)
    found = study.foresee("run", windows=16)
    assert found["nats"] > np.log(26)
    for what in ("model t+1", "marginalisation t+2", "own head t+2", "accuracy of offset 2", "greedy rollout t+3"):
        assert found[what] < 0.15, what
    model, text = study.load("run")
    windows, (asked, position) = text.windows("val", 16, 65), study.questions(text, 64, 4, 16, 16)
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model.gpt(windows[:, :-1])[0].transpose(1, 2), windows[:, 1:]).item()
        guess = model.gpt(asked[:, :-1])[0].argmax(-1).gather(1, position)
    assert found["nats"] == pytest.approx(nats)
    assert found["model t+1"] == pytest.approx((guess == asked.gather(1, position + 1)).float().mean().item())
    assert all(v < 0.15 for v in study.read_layers("run", 16, probe_steps=40).values())
    found = study.draft("run", (1, 2, 3, 4), prompts=2)
    assert found["real text, chain"] == held_out_acceptance(model, text.windows("val", 64, 65)[::2], chain(
        {j: (j, 0) for j in (2, 3, 4)}))[0]
    assert 1 <= found["real text, chain"] < 1.15 < found["greedy, chain"]   # what it writes itself it can foresee
    assert found["greedy, NTP"] == found["sampled, NTP"] == 1 and found["greedy, chain"] > found["sampled, chain"]
    assert all(found[f"{kind}, {way}, identical"] for kind in ("greedy", "sampled") for way in ("NTP", "chain", "tree"))
    for way in ("chain", "tree"):
        a = [share for name, share in found.items() if name.startswith(f"{way}, candidate")]
        assert found[f"formula, {way}"] == pytest.approx(expected_tokens_per_step(a))
    assert found["real text, tree"] > found["real text, chain"]


def test_the_answer_of_the_planning_task_is_the_reversed_running_parity():
    x = parities(5, torch.arange(32))
    assert len({tuple(bits[:5]) for bits in x.tolist()}) == 32
    for bits in x.tolist():
        running = [sum(bits[:i + 1]) % 2 for i in range(5)]
        assert bits[5] == 2 and bits[6:] == running[::-1]


def test_planning_is_asked_about_inputs_that_were_not_trained_on(here, monkeypatch):
    seen = []
    monkeypatch.setattr(study, "parities", lambda n, inputs: seen.append(inputs.tolist()) or parities(n, inputs))
    found = study.plan((1, 2), seed=0, bits=5, steps=60)
    *batches, asked = seen
    assert len(batches) == 60 and len(set(asked)) == 8 and not set(asked) & set(sum(batches, []))
    assert batches[0] != batches[1] and set(found) == {"whole answer", *(f"token {i}" for i in range(1, 6))}
    assert found != study.plan((1,), seed=0, bits=5, steps=60)


def test_a_row_holds_a_number_per_seed_and_all_training_behind_it():
    def run(name, init=None, own=None):
        how = dict(name=name, options=["--steps", name], init=init, data="data/text", own=own)
        return Piece(name, study.train_run, how, [n for n in (init, own) if n])
    some = [run("base"), Piece("own", study.own_text, {}, ["base"]), run("heads", "base", "own"),
            Piece("m0", study.foresee, {}, ["heads"]), Piece("m1", study.foresee, {}, ["other"]),
            Piece("again", study.speed, {}, ["heads"])]
    done = {n: dict(result=r) for n, r in dict(m0=dict(a=1, b=2), m1=dict(a=3, b=4), again=dict(c=5)).items()}
    assert study.table([("row", ["m0", "m1"]), ("row", ["again"])], {p.name: p for p in some}, done) == [dict(
        label="row", values=dict(a=[1, 3], b=[2, 4], c=[5]),
        train=dict(base="--data data/text --steps base", heads="--data own --steps heads --init base"))]


RESULTS = ROOT / "experiments" / "results"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("study_*_*.json")), ids=lambda file: file.stem)
def test_the_study_would_train_today_what_its_result_files_say(file):
    """Whoever changes a recipe, a size or how compute is counted has to measure again."""
    found = json.loads(file.read_text())
    made = Study(SIZES[found["size"]])
    rows = list(PARTS[found["part"]](made))
    today = study.table(rows, made.pieces, {name: dict(result={}) for name in made.pieces})
    assert [(r["label"], r["train"]) for r in today] == [(r["label"], r["train"]) for r in found["rows"]]
    assert found["settings"] == json.loads(json.dumps(study.asdict(SIZES[found["size"]])))


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
    assert findings.spread(np.array([1.0, 2.0, 6.0])) == "3.00 [1.00, 6.00]"
    assert findings.spread(np.array([2.0])) == "2.00"
    assert findings.percent(np.array([0.25, 0.5])) == "37.5 [25.0, 50.0]"


def results_file(folder, rows):
    """rows {label: {name: list}} as the results of a part."""
    path = folder / "study_quick_adapt.json"
    path.write_text(json.dumps(dict(rows=[dict(label=label, values=v, train={}) for label, v in rows.items()])))
    return findings.Part(path)


def part(folder, rows):
    """Results of two seeds, {label: {name: number}}: the second seed has the same number, or a pair says both."""
    return results_file(folder, {label: {k: list(v) if isinstance(v, tuple) else [v, v] for k, v in values.items()}
                                 for label, values in rows.items()})


def verdicts(claims):
    return [claim.verdict for claim in claims]


@pytest.mark.parametrize("frozen, joint, scratch, said", [
    (0.40, 0.45, 0.60, ["reproduced", "reproduced", "reproduced", "reproduced, but NTP lost more"]),
    (0.56, 0.45, 0.30, ["not reproduced", "not reproduced", "reproduced", "not reproduced"]),
    (0.40, 0.51, 0.50, ["reproduced", "reproduced", "reproduced", "not reproduced"]),
    (0.40, 0.55, 0.50, ["reproduced", "reproduced", "not reproduced", "not reproduced"])])
def test_what_is_said_of_adaptation_follows_from_its_numbers(frozen, joint, scratch, said, tmp_path):
    """Marginalisation is at 0.5 at t+2, and at 0.53 when the model has been trained on for as long as the heads. Heads
    among themselves are compared by their accuracy everywhere, which here is a tenth less."""
    rows = {"NTP, marginalised": {"marginalisation t+2": 0.5, "nats": (1.0, 2.0)},
            "NTP, trained on": {"marginalisation t+2": 0.53, "nats": (0.9, 1.9)}}
    for label in [*RECIPES, "from scratch"]:
        top1 = scratch if label == "from scratch" else frozen if label.startswith("frozen") else joint
        rows[label] = {"own head t+2": (top1, top1 + 0.01), "nats": (1.5, 2.25),
                       "accuracy of offset 2": (top1 - 0.1, top1 - 0.09)}
    rows["from scratch"]["nats"] = (1.6, 2.3)
    part(tmp_path, rows)
    adapt = findings.load(tmp_path, "quick")["adapt"]
    assert adapt["joint, weight 1", "lost"].tolist() == [0.5, 0.25]         # seed by seed
    claims = list(findings.of_adapt(adapt))
    assert [claims[i].verdict for i in (0, 1, 2, -1)] == said
    assert "NTP lost 0.375 [0.250, 0.500]" in claims[1].measured
    assert f"t+2 {100 * (joint - 0.095):.1f}" in claims[1].measured


def test_every_recipe_counts_against_its_own_mark_and_against_others_everywhere(tmp_path):
    rows = {"NTP, marginalised": {"marginalisation t+2": 0.5, "nats": 1},
            "NTP, trained on": {"marginalisation t+2": 0.7, "nats": 1}}
    no, unseen = "not reproduced", "cannot be seen at this size"

    def said(label, asked=0.46, everywhere=0.4, nats=1):
        """All recipes alike but one."""
        heads = {recipe: (0.46, 0.4, 1) for recipe in [*RECIPES, "from scratch"]} | {label: (asked, everywhere, nats)}
        heads = {recipe: dict(zip(("own head t+2", "accuracy of offset 2", "nats"), v)) for recipe, v in heads.items()}
        part(tmp_path, rows | heads)
        return verdicts(findings.of_adapt(findings.load(tmp_path, "quick")["adapt"]))
    # frozen below, joint against frozen, joint below, rates, warm-up, WHS frozen, WHS joint, WHS best, from scratch
    assert said("frozen, WHS") == ["reproduced", unseen, "reproduced", *[unseen] * 6]
    assert said("frozen, WHS", asked=0.6)[0] == no and said("joint, weight 0.3", asked=0.6)[2] == "reproduced"
    assert said("frozen, WHS", asked=(0.1, 0.6))[0] == unseen               # also if it is not the best one on average
    assert said("joint, weight 0.3", asked=0.8)[2] == no
    assert [said("frozen, WHS", everywhere=0.5)[i] for i in (5, 7)] == ["reproduced", no]
    assert said("+ differential rates", everywhere=0.3, nats=0.9)[3] == f"{no}, but NTP lost less"
    assert said("+ differential rates", everywhere=0.3, nats=1.1)[3] == no
    assert said("+ WHS", everywhere=0.5, nats=1.1)[6:8] == ["reproduced, but NTP lost more"] * 2


@pytest.mark.parametrize("large, prose, prose_t1, said", [
    (0.5, 0.3, 0.6, ["reproduced", "reproduced"]), (0.35, 0.3, 0.6, ["not reproduced", "reproduced"]),
    (0.5, 0.55, 0.6, ["reproduced", "not reproduced"]), (0.5, 0.4, 0.42, ["reproduced", "not reproduced"]),
    ((0.5, 0.35), 0.3, 0.6, ["cannot be seen at this size", "reproduced"])])
def test_what_is_said_of_scale_follows_from_its_numbers(large, prose, prose_t1, said, tmp_path):
    def row(t2, t1=0.6, unigram=0.2):
        return {"marginalisation t+2": t2, "model t+1": t1, "unigram t+2": unigram}
    rows = {"python, 2 x 64": row(0.4), "python, 4 x 96": row(large), "shakespeare, 2 x 64": row(prose, prose_t1),
            "multi30k, 2 x 64": row(0.5)}
    assert verdicts(findings.of_scale(part(tmp_path, rows))) == said
    rows["python, 2 x 64"] = row(0.4, unigram=0.45)                         # it knows less than how often tokens are
    assert verdicts(findings.of_scale(part(tmp_path, rows)))[0] == "not reproduced"


@pytest.mark.parametrize("two, one, said", [
    ([0.1, 0.3, 0.5, 0.3, 0.35], [0.1, 0.2, 0.3, 0.5, 0.7], ["reproduced", "reproduced"]),
    ([0.1, 0.2, 0.2, 0.3, 0.55], [0.1, 0.1, 0.1, 0.5, 0.7], ["not reproduced", "not reproduced"]),
    ([0.1, 0.3, 0.3, 0.35, 0.4], [0.1, 0.2, 0.3, 0.4, 0.5], ["not reproduced", "reproduced"]),
    ([0.1, 0.2, 0.2, 0.5, 0.6], [0.1, 0.2, 0.3, 0.3, 0.4], ["not reproduced", "not reproduced"])])
def test_what_is_said_of_layers_follows_from_their_probes(two, one, said, tmp_path):
    def row(t2):
        return {f"probe t+{d} layer {i}": v for d, values in ((1, one), (2, t2)) for i, v in enumerate(values)}
    rows = {"NTP": row(two), "MTP": row([0.1, 0.2, 0.2, 0.4, 0.5])}
    assert verdicts(findings.of_layers(part(tmp_path, rows))) == said


def leap_rows(g, leap, gentle=1.3, nats=1.0):
    """Models whose accuracy falls with the attenuation g: MTP writes 2 tokens per step everywhere, leap k=2 so many."""
    def row(written, offsets=(), nats=1.0, given=2.0):
        found = {f"{kind}, {way}": written for kind in findings.KINDS for way in ("chain", "tree")}
        found |= {f"accuracy of offset {o}": np.exp(-g * (o - 1)) for o in offsets}
        return {**found, "formula, chain": given, "nats": nats, "compiled, greedy, chain, speedup": written,
                "compiled, sampled, chain, speedup": 1}
    rows = {label: row(2.0 if label == "MTP" else leap, offsets) for label, offsets in findings.OFFSETS.items()}
    rows["leap k=2"]["formula, chain"] = rows["leap k=3"]["formula, chain"] = 3.0
    for label, written, loss in (("one stage", 1.7, 2.0), ("one gentle stage", gentle, nats), ("two stages", 1.5, 1.1)):
        rows[f"leap k=2 on a base, {label}"] = row(written, nats=loss)
    return rows


def test_what_is_said_of_leaping_follows_from_its_numbers(tmp_path):
    yes, no, unseen = "reproduced", "not reproduced", "cannot be seen at this size"

    def said(*given, **more):
        return verdicts(findings.of_leap(part(tmp_path, leap_rows(*given, **more))))
    # attenuation; tokens per step: chain, tree; break-even; formula: apart, given; two stages: tokens, nats; wall-clock
    assert said(0.4, 1.5) == [yes, no, no, yes, yes, no, yes, no, f"{no} (greedy); {unseen} (sampled)"]
    assert said(0.05, 1.5) == [yes, no, no, no, no, no, yes, no, f"{no} (greedy); {unseen} (sampled)"]
    assert said(0.05, 2.5) == [yes, yes, yes, yes, yes, yes, yes, no, f"{yes} (greedy); {unseen} (sampled)"]
    assert said(-0.1, (1.5, 2.5), gentle=1.6, nats=1.2)[:3] == [no, unseen, unseen]
    assert said(0.4, 1.5, gentle=1.6, nats=1.2)[6:8] == [no, yes]
    rows = leap_rows(0.4, 1.5)
    rows["leap k=3"]["accuracy of offset 10"] = 1.0
    assert verdicts(findings.of_leap(part(tmp_path, rows)))[0] == no        # one offset that is better than the last
    del rows["MTP"]["compiled, greedy, chain, speedup"]                     # where nothing compiles
    assert len(verdicts(findings.of_leap(part(tmp_path, rows)))) == 8


@pytest.mark.parametrize("ntp, mtp, leap, said", [
    (0.5, 1.0, 1.0, ["reproduced", "cannot be seen at this size"]),
    ((0.5, 0.9), 0.8, 0.7, ["cannot be seen at this size", "not reproduced"]),
    (0.9, 0.8, 0.85, ["not reproduced", "reproduced"])])
def test_what_is_said_of_planning_follows_from_its_numbers(ntp, mtp, leap, said, tmp_path):
    rows = {label: {"whole answer": v, "token 1": v, "token 2": 1} for label, v in
            (("NTP", ntp), ("MTP", mtp), ("leap k=2", leap))}
    assert verdicts(findings.of_planning(part(tmp_path, rows))) == said


@pytest.mark.parametrize("text, compute, said", [
    (2.0, 1.9, "reproduced"), (2.0, 1.4, "not reproduced"), (1.4, 1.3, "not reproduced")])
def test_a_better_backbone_is_better_with_as_much_text_and_with_as_much_compute(text, compute, said, tmp_path):
    rows = {"NTP, same text": {"nats": text}, "NTP, same compute": {"nats": compute}, "MTP": {"nats": 1.5},
            "leap k=2": {"nats": 1.0}}
    assert verdicts(findings.of_backbone(part(tmp_path, rows))) == [said]


@pytest.mark.parametrize("chain, tree, block, said", [
    (4.9, 4.0, 4, "missed"), (4.9, 5.1, 4, "reached"), (5.1, 1.0, 1, "reached")])
def test_the_headline_is_the_faster_of_chain_and_tree(chain, tree, block, said, tmp_path):
    values = {f"compiled, {kind}, {way}, {what}": v if kind == "greedy" and what == "speedup" else b if what == "block"
              else 9.0 for kind in ("greedy", "sampled") for way, v, b in (("chain", chain, 8), ("tree", tree, block))
              for what in ("speedup", "tokens_per_step", "block")}
    values |= {f"compiled, real text, {way}": 2.0 for way in ("chain", "tree")}
    (claim,) = findings.of_headline(results_file(tmp_path, {"m": {k: [v] for k, v in values.items()}}))
    assert claim.verdict == said and f"greedy {chain:.2f}x (9.00 tokens per step)" in claim.measured
    assert ("NTP, no other pays" in claim.measured) == (block == 1)


def test_nothing_is_said_of_a_decoder_that_wrote_another_text(tmp_path):
    part(tmp_path, {"MTP": {"greedy, chain, identical": (True, True), "sampled, tree, identical": (True, False)}})
    with pytest.raises(findings.InputError, match="another text"):
        findings.load(tmp_path, "quick")


def test_findings_makes_its_page_and_figures_from_result_files_anywhere(tmp_path):
    pytest.importorskip("matplotlib")
    readme = (ROOT / "README.md").read_text()
    for file in RESULTS.glob("study_quick_*.json"):
        shutil.copy(file, tmp_path)
    result = command("experiments/findings.py", "--size", "quick", "--results", tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "study_quick.md").read_text() == (RESULTS / "study_quick.md").read_text()
    assert {f.name for f in tmp_path.glob("*.png")} == {f"study_quick_{part}.png" for part in PARTS}
    assert (ROOT / "README.md").read_text() == readme                       # which is about the project's own results


@pytest.mark.parametrize("size", SIZES)
def test_tables_say_what_the_result_files_say(size):
    folder = ROOT / "experiments" / "results"
    if not list(folder.glob(f"study_{size}_*.json")):
        pytest.skip("there are no results of this size")
    parts = findings.load(folder, size)
    assert (folder / f"study_{size}.md").read_text() == findings.tables(parts, size)


def test_the_readmes_findings_are_those_of_the_result_files():
    readme = (ROOT / "README.md").read_text()
    assert findings.MARKED.search(readme) and findings.with_findings(readme, ROOT / "experiments" / "results") == readme


@pytest.mark.parametrize("script, options, words", [
    ("study.py", ["--only", "nothing"], "--only"), ("study.py", ["--jobs", "0"], "--jobs"),
    ("study.py", ["--results", "no/such"], "--results"), ("study.py", ["--device", "tpu"], "not available"),
    ("study.py", ["--size", "huge"], "--size"), ("study.py", ["--folder", "README.md"], "README.md"),
    ("findings.py", ["--results", "no/such"], "no results"), ("findings.py", ["--size", "x"], "--size")])
def test_bad_options_are_one_line(script, options, words):
    options = options if "--size" in options or script != "study.py" else ["--quick", *options]
    assert_one_line_error(command(f"experiments/{script}", *options), words)
