"""Lesson 5: what a next-token model already knows about later tokens. The fast look-ahead must
equal the sum as a loop, marginalize_reference."""
import itertools
import json
import math
from functools import partial

import pytest
import torch

from common import load_checkpoint
from conftest import command, tiny_gpt, tiny_model
from data.loader import Corpus
from decode import generate_reference
from marginalize import (evaluation_positions, interval, look_ahead, marginalize,
                         marginalize_reference, measure, score)
from test_heads import PeakOfLargeTensors

assert_close = torch.testing.assert_close
V = 5  # tokens, few enough for every path
small_gpt = partial(tiny_gpt, vocab_size=V, block_size=16)


def texts(B=2, T=6):
    torch.manual_seed(1)
    return torch.randint(0, V, (B, T))


# What it is
@torch.no_grad()
def markov_chain(P):
    """A GPT whose next token depends on the last one only, with transition probabilities P."""
    n = len(P)
    gpt = tiny_gpt(vocab_size=n, n_head=1, n_embd=n).double()
    for p in gpt.parameters():
        p.zero_()  # the layers add nothing
    gpt.transformer.wte.weight.copy_(torch.eye(n))  # ln_f maps to (one-hot - 1/n) / spread
    gpt.transformer.ln_f.weight.fill_(math.sqrt((1 / n) * (1 - 1 / n) + 1e-5))
    gpt.transformer.ln_f.bias.fill_(1 / n)  # and back to one-hot
    gpt.lm_head.weight = torch.nn.Parameter(P.log().T)  # no longer the embedding
    return gpt


@pytest.mark.parametrize("horizon", [1, 2, 3, 4])
def test_a_markov_chains_marginals_are_the_powers_of_its_matrix(horizon):
    torch.manual_seed(2)
    P = torch.rand(7, 7, dtype=torch.double).softmax(-1)
    probs, _ = marginalize(markov_chain(P), torch.arange(7)[:, None], horizon, 7 ** 3)
    assert_close(probs, torch.linalg.matrix_power(P, horizon), rtol=0, atol=1e-12)


def test_one_look_ahead_sums_all_continuations_to_each_distance_from_each_position():
    gpt = small_gpt(block_size=8)  # which three tokens after the last position just fit
    position = torch.tensor([[0, 4, 5], [3, 3, 1]])
    for distance, (probs, _) in enumerate(look_ahead(gpt, texts(), position, 3, V ** 2), 1):
        for b, p in itertools.product(range(2), range(3)):
            text = texts()[b, :position[b, p] + 1]
            assert_close(probs[b, p], marginalize_reference(gpt, text, distance))


def test_a_beam_follows_the_most_probable_paths():
    gpt = small_gpt()
    text = texts(1)[0]

    def probability(path):
        return marginalize_reference(gpt, text, len(path) + 1, [path]).sum().item()
    paths = [()]
    for _ in range(3):
        longer = [(*path, v) for path in paths for v in range(V)]
        paths = sorted(longer, key=probability, reverse=True)[:3]
    probs, mass = marginalize(gpt, text[None], 4, branches=3)
    assert_close(probs[0], marginalize_reference(gpt, text, 4, paths))
    assert_close(mass.item(), sum(map(probability, paths)))


# What it costs
def test_all_branches_of_all_positions_and_texts_share_one_pass_after_the_prefill():
    gpt = small_gpt()
    passes = []
    gpt.transformer.wte.register_forward_hook(lambda module, x, _: passes.append(x[0].shape))
    list(look_ahead(gpt, texts(4), torch.arange(6).expand(4, 6), 2, 3))
    assert passes == [(4, 6), (4, 6 * 3)]


def test_the_tensors_of_a_large_vocabulary_stay_bounded():
    model = tiny_model((1, 2), vocab_size=50257, n_embd=8)
    position = torch.arange(32, 48).expand(3, 16)
    with PeakOfLargeTensors(2 ** 26) as counter:  # two windows of 16 positions and 32 branches
        measure(model, torch.randint(0, 50257, (3, 65)), position, 3, 32, progress=False)
    assert counter.peak == 0


# Measuring it
def test_a_score_is_whether_the_target_is_best_and_its_negative_log_probability():
    probs = torch.tensor([[0.2, 0.4, 0.1], [0.2, 0.4, 0.1]])  # captured mass 0.7
    right, nats = score(probs, torch.tensor([1, 2]))
    assert right.tolist() == [True, False]
    assert_close(nats, torch.tensor([-math.log(4 / 7), -math.log(1 / 7)]))


def test_the_interval_treats_windows_and_not_positions_as_independent():
    values = torch.tensor([[1.0], [0.0], [1.0], [0.0]]).expand(4, 100)
    assert interval(values) == pytest.approx((0.5, 1.96 * math.sqrt(1 / 3) / 2))


def test_windows_do_not_overlap_and_positions_are_spread_over_their_second_half(corpus):
    corpus = Corpus(corpus)
    windows, position = evaluation_positions(corpus, 32, 4, n_windows=10_000, n_positions=3)
    assert len(windows) == len(corpus.val) // 33
    assert position.tolist() == [[16, 22, 28]] * len(windows)  # 28 + 4 is the last token


@torch.no_grad()
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("branches", [1, V ** 2])
def test_measure_asks_all_predictors_the_same_questions(sequential, branches):
    model = tiny_model((1, 2, 4), sequential=sequential, gpt=small_gpt())
    windows = texts(6, 17)
    position = torch.tensor([[8, 13]]).expand(6, 2)

    def expected(name, d, text, t):
        """What a predictor says of token t + d, found in another way -> (V,)"""
        if name == "own head":  # reads up to the token before the target
            return model(text[None, :t + d])[d][0, t].softmax(-1)
        if branches == 1 < d:  # a greedy rollout
            path = generate_reference(model, text[:t + 1].tolist(), d - 1, offsets=(1,))
            return model.gpt(torch.cat([text[:t + 1], torch.tensor(path)])[None])[0, -1].softmax(-1)
        return marginalize_reference(model.gpt, text[:t + 1], d)
    records = measure(model, windows, position, 3, branches, progress=False)
    asked = [(r["distance"], r["predictor"]) for r in records]
    assert asked == [(1, "model"), (2, "marginalisation"), (2, "own head"), (3, "marginalisation")]
    best = {}
    for (d, name), r in zip(asked, records):
        probs = torch.stack([expected(name, d, w, t) for w in windows for t in (8, 13)])
        right, nats = score(probs.view(6, 2, V), windows.gather(1, position + d))
        assert r["top1"] == interval(right)
        assert r["top1_gain"] == interval(right.float() - best.setdefault(d, right).float())
        assert r["nats"] == pytest.approx(interval(nats), rel=1e-4)
        whole = name != "marginalisation" or branches > 1
        assert (r["mass"][0] == pytest.approx(1)) == whole


def test_dropout_is_off_while_measuring():
    model = tiny_model((1, 2), vocab_size=V, block_size=16, dropout=0.5)
    position = torch.arange(8, 12).expand(4, 4)
    expected = measure(model, texts(4, 17), position, 2, 1000, progress=False)
    assert measure(model.train(), texts(4, 17), position, 2, 1000, progress=False) == expected


# The command line
def test_the_command_prints_and_writes_what_it_measured(run_folder, tmp_path):
    out = tmp_path / "result.json"
    result = command("marginalize.py", run_folder, "--windows", 4, "--positions", 2, "--branches",
                     4, "--horizon", 2, "--device", "cpu", "--out", out)
    assert result.returncode == 0, result.stderr
    model, state = load_checkpoint(run_folder)
    corpus = Corpus(state["args"]["data"])
    records = measure(model, *evaluation_positions(corpus, 32, 2, 4, 2), 2, 4, progress=False)
    written = json.loads(out.read_text())
    assert written["runs"] == {str(run_folder): json.loads(json.dumps(records))}
    assert written["environment"]["torch"] == torch.__version__
    for r in records:
        assert f"t+{r['distance']:<3}{r['predictor']}" in result.stdout
        assert f"{r['nats'][0]:.3f} ±{r['nats'][1]:.3f}" in result.stdout
