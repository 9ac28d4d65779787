"""Lesson 5, in the laboratory: what truncating the sum costs, and what each layer knows."""
import json

import pytest
import torch
import torch.nn.functional as F

from conftest import assert_one_line_error, command, process, tiny_gpt
from data.loader import Corpus
from data.prepare import prepare
from experiments.layers import Probe, draw, measure_layers, train_probes, truncation
from marginalize import estimate, interval, marginalize, questions


def small_gpt():
    return tiny_gpt(vocab_size=5, block_size=16)


def windows_and_positions():
    torch.manual_seed(1)
    return torch.randint(0, 5, (4, 9)), torch.tensor([[3, 5]] * 4)


def probe_gpt():
    return tiny_gpt(vocab_size=257, block_size=32)


# Truncation

def test_truncation_is_compared_with_the_exact_answer_where_it_is_affordable():
    gpt, (windows, position) = small_gpt(), windows_and_positions()
    records = truncation(gpt, windows, position, 4, nodes=110, progress=False)
    # A position has 5, 25 and 125 branches: all 8 positions at t+2, 4 at t+3, none at t+4.
    assert {(r["distance"], r["questions"]) for r in records} == {(2, 8), (3, 4)}
    r, t = next(r for r in records if (r["distance"], r["k"]) == (3, 4)), position[:, :1]
    exact, _ = marginalize(gpt, windows, 3, position=t)
    for method in ("top-k", "beam"):
        probs, mass = marginalize(gpt, windows, 3, 4, method, t)
        expected = interval((probs / mass[..., None] - exact).abs().sum(-1) / 2)
        assert r["tv"][method] == pytest.approx(expected, rel=1e-4)
        assert r["mass"][method] == pytest.approx(mass.mean().item())
    probs, error = estimate(gpt, windows, 3, 4, t)
    expected = interval((probs - exact).abs().sum(-1) / 2)
    assert r["tv"]["sample"] == pytest.approx(expected, rel=1e-4)
    assert r["standard_error"] == pytest.approx(error.sum(-1).mean().item() / 2, rel=1e-4)


# Layers

def test_the_logit_lens_on_the_last_layer_is_the_model():
    gpt, (idx, _) = small_gpt(), windows_and_positions()
    torch.testing.assert_close(Probe(32)(gpt, gpt.residual_stream(idx)[-1]), gpt(idx)[0])


def test_the_lens_reads_each_layer_with_the_final_norm_and_unembedding():
    gpt, (windows, position) = small_gpt(), windows_and_positions()
    records = measure_layers(gpt, {2: [Probe(32)] * 3}, windows, position)
    assert sorted({r["layer"] for r in records}) == [0, 1, 2]
    for r in records:
        x = gpt.residual_stream(windows)[r["layer"]]
        logits = gpt.lm_head(gpt.transformer.ln_f(x))[:, [3, 5]]
        nats = F.cross_entropy(logits.flatten(0, 1), windows[:, [5, 7]].flatten())
        assert r["nats"][0] == pytest.approx(nats.item(), rel=1e-4)


def test_a_probe_is_trained_by_a_plain_loop_on_the_predicted_tokens_only(corpus):
    corpus, gpt, layer, distance = Corpus(corpus), probe_gpt(), 1, 2
    corpus.predicted = lambda tokens: tokens % 3 == 0
    probes = train_probes(gpt, corpus, steps=3, batch_size=2, lr=0.1, progress=False)
    again = Probe(32)
    optimizer = torch.optim.Adam(again.parameters())
    for step in range(3):
        idx = corpus.batch("train", 2, 33, step)
        logits = again(gpt, gpt.residual_stream(idx[:, :-1])[layer])
        losses = [-logits[b, t].log_softmax(-1)[idx[b, t + distance]]
                  for b in range(2) for t in range(31) if idx[b, t + distance] % 3 == 0]
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 3)
        loss = sum(losses) / len(losses)
        again.affine.weight.grad, again.affine.bias.grad = torch.autograd.grad(
            loss, (again.affine.weight, again.affine.bias))
        optimizer.step()
    torch.testing.assert_close(probes[distance][layer].affine.weight, again.affine.weight)


def test_probes_learn_and_leave_the_backbone_alone(corpus):
    corpus, gpt = Corpus(corpus), probe_gpt()
    before = {k: v.clone() for k, v in gpt.state_dict().items()}
    probes = train_probes(gpt, corpus, steps=60, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in gpt.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in gpt.parameters())
    for one, two in zip(probes[1], probes[2]):
        assert not torch.equal(one.affine.weight, two.affine.weight)
    records = measure_layers(gpt, probes, *questions(corpus, 32, 2, 8, 4))
    nats = {(r["layer"], r["distance"], r["reader"]): r["nats"][0] for r in records}
    assert len(nats) == 3 * 2 * 2
    for layer, distance, _ in nats:  # on held-out text
        assert nats[layer, distance, "probe"] < 0.95 * nats[layer, distance, "lens"]


def test_a_probe_of_a_distance_is_trained_on_tokens_at_that_distance(tmp_path):
    (tmp_path / "abc.txt").write_text("abc" * 3000)
    corpus = Corpus(prepare(str(tmp_path / "abc.txt"), out=tmp_path / "abc"))
    gpt = probe_gpt()
    probes = train_probes(gpt, corpus, steps=100, progress=False)
    for r in measure_layers(gpt, probes, *questions(corpus, 32, 2, 4, 4)):
        if r["reader"] == "probe":
            assert r["top1"][0] > 0.6  # the token at the other distance: 0


# The command line

SCRIPT = "experiments/layers.py"
FAST = ["--windows", 4, "--positions", 2, "--branches", 4, "--device", "cpu"]


def test_the_command_prints_all_tables_and_draws_what_it_wrote(run_folder, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    out, parts = tmp_path / "a.json", ["--exact-nodes", 600, "--probe-steps", 3]
    result = command(SCRIPT, run_folder, *FAST, *parts, "--out", out)
    assert result.returncode == 0, result.stderr
    for words in ("own head", "total variation", "t+2 probe", f"written to {out}"):
        assert words in result.stdout
    assert (tmp_path / "a.png").stat().st_size > 10_000
    results = json.loads(out.read_text())
    run, = results["runs"]
    assert {r["k"] for r in run["truncation"]} == {1, 4, 16, 64} and len(run["layers"]) == 12
    by_distance, by_layer = draw(results, plt).axes
    drawn = {curve.get_label(): curve[0].get_ydata().tolist()
             for curve in by_distance.containers + by_layer.containers}
    assert drawn["own head"] == [
        r["top1"][0] for r in run["table"] if r["reader"] in ("model", "own head")]
    assert drawn["t+2, probe"] == [
        r["top1"][0] for r in run["layers"] if (r["distance"], r["reader"]) == (2, "probe")]


@pytest.mark.parametrize("options, words", [
    (["--exact-nodes", -1], ["--exact-nodes"]), (["--probe-steps", -1], ["--probe-steps"]),
    (["--out", "x.png"], ["--out"]), (["--windows", 1], ["--windows"])])
def test_bad_options_are_one_line(options, words, run_folder):
    assert_one_line_error(command(SCRIPT, run_folder, *FAST, *options), *words)


@pytest.mark.slow
def test_the_script_runs_as_a_process_and_leaves_out_parts_on_demand(run_folder):
    none = ["--exact-nodes", 0, "--probe-steps", 0]
    result = process(SCRIPT, run_folder, *FAST, *none)
    assert result.returncode == 0, result.stderr
    assert "own head" in result.stdout
    assert "total variation" not in result.stdout and "probe" not in result.stdout
