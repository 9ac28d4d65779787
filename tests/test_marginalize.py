"""Lesson 5: what a next-token model already knows about the tokens after next."""
import gzip
import itertools
import json
import math
import shutil

import pytest
import torch
import torch.nn as nn

from conftest import assert_one_line_error, command, tiny_gpt
from data.loader import Corpus
from data.prepare import get_tokenizer, prepare
from marginalize import (Probe, draw, estimate, german_half, interval, look_ahead, marginalize, measure, measure_layers,
                         questions, score, train_probes, truncation, unigram)
from model import GPT, GPTConfig, InputError
from common import load_checkpoint, save_checkpoint


def small_gpt(vocab_size=5, **config):
    return tiny_gpt(vocab_size=vocab_size, block_size=16, **config)


def texts(B=2, T=6, vocab_size=5):
    torch.manual_seed(1)
    return torch.randint(0, vocab_size, (B, T))


@torch.no_grad()
def brute_force(gpt, idx, horizon, paths=None):
    """The definition: for one text (T,), every way through the tokens in between (or some `paths` of them) is appended
    to the text, which is read again from its start. -> (V,)"""
    total = torch.zeros(gpt.config.vocab_size)
    for path in itertools.product(range(gpt.config.vocab_size), repeat=horizon - 1) if paths is None else paths:
        text = torch.cat([idx, torch.tensor(path, dtype=torch.long)])
        probs = gpt(text[None])[0][0].softmax(-1)                           # (T + horizon - 1, V)
        weight = 1.0
        for i, token in enumerate(path):
            weight = weight * probs[len(idx) - 1 + i, token]
        total += weight * probs[-1]
    return total


# What it is

@pytest.mark.parametrize("horizon", [1, 2, 3, 4])
def test_exact_marginals_are_the_sum_over_all_continuations(horizon):
    gpt, idx = small_gpt(), texts()
    probs, mass = marginalize(gpt, idx, horizon)
    torch.testing.assert_close(probs, torch.stack([brute_force(gpt, row, horizon) for row in idx]))
    torch.testing.assert_close(mass, torch.ones(2))


def test_at_horizon_one_it_is_the_models_own_prediction():
    gpt, idx = small_gpt(), texts()
    torch.testing.assert_close(marginalize(gpt, idx, 1)[0], gpt(idx)[0][:, -1].softmax(-1))


def test_many_positions_of_a_window_are_answered_as_if_each_were_the_end_of_a_text():
    gpt, idx, position = small_gpt(), texts(3, 9), torch.tensor([[0, 4, 8], [3, 3, 1], [7, 2, 5]])
    probs, mass = marginalize(gpt, idx, 3, position=position)
    expected = [[brute_force(gpt, row[:t + 1], 3) for t in ts] for row, ts in zip(idx, position.tolist())]
    torch.testing.assert_close(probs, torch.stack([torch.stack(row) for row in expected]))
    torch.testing.assert_close(mass, torch.ones(3, 3))


def markov_chain(P):
    """A GPT whose next token depends on the last one only, with transition probabilities P (V, V)."""
    V = len(P)
    gpt = GPT(GPTConfig(block_size=16, vocab_size=V, n_layer=1, n_head=1, n_embd=V)).double().eval()
    gpt.lm_head = nn.Linear(V, V, bias=False).double()                      # no longer tied to the embedding
    with torch.no_grad():
        for p in gpt.parameters():
            p.zero_()                                                       # the layer adds nothing
        gpt.transformer.wte.weight.copy_(torch.eye(V))                      # one-hot tokens, which ln_f normalises to
        spread = math.sqrt((1 / V) * (1 - 1 / V) + 1e-5)                    # (one-hot - 1/V) / spread
        gpt.transformer.ln_f.weight.fill_(spread)
        gpt.transformer.ln_f.bias.fill_(1 / V)                              # and back to one-hot
        gpt.lm_head.weight.copy_(P.log().T)
    return gpt


def test_a_markov_chains_marginals_are_the_powers_of_its_matrix():
    torch.manual_seed(2)
    P = torch.rand(7, 7, dtype=torch.double).softmax(-1)
    gpt, every_token = markov_chain(P), torch.arange(7)[:, None]
    for horizon in (1, 2, 3, 4):
        probs, mass = marginalize(gpt, every_token, horizon)
        torch.testing.assert_close(probs, torch.linalg.matrix_power(P, horizon), rtol=0, atol=1e-12)
        torch.testing.assert_close(mass, torch.ones(7, dtype=torch.double), rtol=0, atol=1e-12)


# Truncation

def test_top_k_follows_the_best_k_tokens_of_every_node():
    gpt, idx, k = small_gpt(), texts(1), 2
    first = gpt(idx)[0][0, -1].topk(k).indices.tolist()
    paths = [(v, w) for v in first for w in gpt(torch.cat([idx[0], torch.tensor([v])])[None])[0][0, -1].topk(k).indices]
    probs, mass = marginalize(gpt, idx, 3, branches=k)
    torch.testing.assert_close(probs[0], brute_force(gpt, idx[0], 3, paths))
    torch.testing.assert_close(mass, probs.sum(-1))


def test_a_beam_follows_the_most_probable_paths():
    gpt, idx, k = small_gpt(), texts(1), 3

    def joint(path):                                                        # log p(path | text)
        text = torch.cat([idx[0], torch.tensor(path)])
        log_p = gpt(text[None])[0][0].log_softmax(-1)
        return sum(log_p[idx.shape[1] - 1 + i, v].item() for i, v in enumerate(path))
    beam = [()]
    for _ in range(3):
        beam = sorted([(*path, v) for path in beam for v in range(5)], key=joint, reverse=True)[:k]
    probs, mass = marginalize(gpt, idx, 4, branches=k, method="beam")
    torch.testing.assert_close(probs[0], brute_force(gpt, idx[0], 4, beam))
    torch.testing.assert_close(mass.item(), sum(math.exp(joint(path)) for path in beam))


@pytest.mark.parametrize("method", ["top-k", "beam"])
def test_truncation_becomes_exact_as_k_grows(method):
    gpt, idx = small_gpt(), texts()
    exact, _ = marginalize(gpt, idx, 2)
    captured, distance = [], []
    for k in range(1, 6):
        probs, mass = marginalize(gpt, idx, 2, k, method)
        captured.append(mass)
        distance.append((probs - exact).abs().sum(-1))
    assert all((a < b).all() for a, b in zip(captured, captured[1:]))
    assert all((a > b).all() for a, b in zip(distance, distance[1:]))
    torch.testing.assert_close(probs, exact)
    torch.testing.assert_close(mass, torch.ones(2))


@pytest.mark.parametrize("method", ["top-k", "beam"])
def test_a_truncated_probability_is_a_lower_bound_and_the_missing_mass_bounds_the_error(method):
    gpt, idx = small_gpt(), texts()
    exact, _ = marginalize(gpt, idx, 3)
    probs, mass = marginalize(gpt, idx, 3, 2, method)
    assert (mass < 0.9).all()                                               # something is missing
    assert (probs <= exact + 1e-6).all() and (exact <= probs + (1 - mass)[:, None] + 1e-6).all()


# Monte Carlo

def test_the_estimate_is_unbiased_and_its_standard_error_is_its_spread():
    gpt, idx = small_gpt(), texts(1)
    exact, _ = marginalize(gpt, idx, 3)
    found = [estimate(gpt, idx, 3, samples=3, seed=seed, max_nodes=2) for seed in range(400)]   # read in two parts
    probs, error = (torch.cat(t).double() for t in zip(*found))             # (400, V)
    assert ((probs.mean(0) - exact[0]).abs() < 4 * probs.std(0) / math.sqrt(400)).all()
    torch.testing.assert_close(error.square().mean(0).sqrt(), probs.std(0), rtol=0.15, atol=0)
    torch.testing.assert_close(probs.sum(-1), torch.ones(400).double())


def test_one_random_path_does_not_know_its_error():
    assert estimate(small_gpt(), texts(), 3, samples=1)[1].isnan().all()


def test_the_estimate_at_many_positions_is_that_of_each():
    gpt, idx, position = small_gpt(), texts(2, 6), torch.tensor([[1, 5], [3, 4]])
    probs, error = estimate(gpt, idx, 2, 4000, position)
    exact, _ = marginalize(gpt, idx, 2, position=position)
    assert probs.shape == error.shape == (2, 2, 5) and ((probs - exact).abs() < 5 * error + 1e-6).all()


def test_the_estimate_depends_on_its_seed_only():
    gpt, idx = small_gpt(), texts()
    a, b, c = (estimate(gpt, idx, 3, 4, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


# The look ahead: shared prefix, bounded memory

@pytest.mark.parametrize("max_nodes", [3, 7, 64, 10_000])
@pytest.mark.parametrize("branches, method", [(None, "top-k"), (2, "top-k"), (3, "beam")])
def test_the_memory_bound_is_kept_and_changes_nothing(max_nodes, branches, method):
    gpt, idx, position = small_gpt(), texts(5, 8), torch.arange(8).expand(5, 8)
    expected, _ = marginalize(gpt, idx, 3, branches, method, position)
    rows = []
    gpt.lm_head.register_forward_hook(lambda module, _, logits: rows.append(logits.shape[:-1].numel()))
    probs, _ = marginalize(gpt, idx, 3, branches, method, position, max_nodes)
    torch.testing.assert_close(probs, expected)
    assert max(rows) <= max_nodes


def test_a_text_is_read_once_however_many_positions_and_branches_there_are():
    gpt, idx, position = small_gpt(), texts(1, 12), torch.arange(12)[None]
    read = []
    gpt.transformer.wte.register_forward_hook(lambda module, args, _: read.append(args[0].numel()))
    marginalize(gpt, idx, 2, position=position)
    assert sum(read) == 12 + 12 * 5                                         # the text, and one token for each branch


def test_many_texts_and_many_positions_share_a_forward_pass():
    gpt, idx, position = small_gpt(), texts(4, 6), torch.arange(6).expand(4, 6)
    passes = []
    gpt.transformer.wte.register_forward_hook(lambda module, args, _: passes.append(args[0].shape))
    marginalize(gpt, idx, 2, position=position)
    assert passes == [(4, 6), (4, 6 * 5)]                                   # the texts; all branches of all positions


def test_all_distances_come_from_one_look_ahead():
    gpt, idx, position = small_gpt(), texts(2, 6), torch.tensor([[2, 5], [0, 4]])
    for rows, columns, marginals in look_ahead(gpt, idx, position, 3):
        for distance, m in enumerate(marginals, 1):
            expected = marginalize(gpt, idx, distance, position=position)[0][rows, columns]
            torch.testing.assert_close(m.probs, expected)


def test_dropout_is_off_while_looking_ahead():
    gpt, idx = small_gpt(dropout=0.5), texts()
    expected = marginalize(gpt, idx, 2)[0]
    assert torch.equal(marginalize(gpt.train(), idx, 2)[0], expected)


@pytest.mark.parametrize("options, words", [
    (dict(horizon=0), "horizon must be at least 1"), (dict(horizon=12), "need a context of 17"),
    (dict(horizon=2, branches=6), "more than the vocabulary of 5"), (dict(horizon=2, branches=0), "at least 1"),
    (dict(horizon=2, method="guess"), "unknown method"), (dict(horizon=2, method="beam"), "needs a number"),
    (dict(horizon=2, branches=4, method="beam", max_nodes=3), "at least 4"),
    (dict(horizon=2, max_nodes=0), "max_nodes"),
    (dict(horizon=2, branches=10**7, method="sample"), "at most a million"),
    (dict(horizon=2, position=torch.tensor([[1]])), "2 texts but positions for 1"),
    (dict(horizon=2, position=torch.tensor([[6], [0]])), r"0\.\.5"),
    (dict(horizon=2, position=torch.tensor([[-1], [0]])), r"0\.\.5")])
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        marginalize(small_gpt(), texts(), **options)


def test_texts_that_cannot_be_are_refused():
    for idx in (torch.zeros(1, 0, dtype=torch.long), torch.zeros(0, 4, dtype=torch.long)):
        with pytest.raises(InputError, match="no text"):
            marginalize(small_gpt(), idx, 2)
    with pytest.raises(InputError, match="another tokenizer"):
        marginalize(small_gpt(), torch.tensor([[5]]), 2)


def test_the_last_horizon_that_fits_the_context_works():
    gpt, idx = small_gpt(vocab_size=2), texts(1, 6, 2)
    torch.testing.assert_close(marginalize(gpt, idx, 11)[0][0], brute_force(gpt, idx[0], 11))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("branches, method", [(None, "top-k"), (3, "beam")])
def test_a_gpu_gives_the_same_marginals(branches, method):
    gpt, idx = small_gpt(), texts()
    expected, _ = marginalize(gpt, idx, 3, branches, method)
    found, _ = marginalize(gpt.cuda(), idx.cuda(), 3, branches, method)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
    probs, error = estimate(gpt, idx.cuda(), 3, 2000)
    assert ((probs - marginalize(gpt, idx.cuda(), 3)[0]).abs() < 5 * error + 1e-4).all()


# Measuring

def test_the_score_of_a_prediction_is_the_rank_and_the_log_probability_of_the_right_token():
    probs = torch.tensor([[0.2, 0.4, 0.1], [0.2, 0.4, 0.1]])                # captured mass 0.7
    rank, nats = score(probs, torch.tensor([1, 2]))
    assert rank.tolist() == [0, 2]
    torch.testing.assert_close(nats, torch.tensor([-math.log(4 / 7), -math.log(1 / 7)]))


def test_the_interval_treats_windows_and_not_positions_as_independent():
    windows = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    mean, half = interval(windows)
    assert interval(windows.expand(4, 100)) == pytest.approx((mean, half))
    assert mean == 0.5 and half == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)


def test_windows_do_not_overlap_and_positions_are_spread_over_their_second_half(corpus):
    corpus = Corpus(corpus)
    windows, position = questions(corpus, 32, 4, n_windows=10_000, n_positions=3)
    assert len(windows) == len(corpus.val) // 33
    assert position.tolist() == [[16, 22, 28]] * len(windows)               # 28 + 4 is the last token


def test_the_german_half_is_what_follows_a_tab_up_to_the_newline():
    tokenizer = get_tokenizer("bytes")
    tokens = torch.tensor([list(b"xy\nA dog\tEin Hund\nA c")])
    german = bytes(t for t, g in zip(tokens[0].tolist(), german_half(tokens, tokenizer)[0]) if g)
    assert german == b"Ein Hund\n"


@pytest.fixture(scope="module")
def translations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multi30k")
    for split in ("train", "val"):
        for language, word in (("en", "dog"), ("de", "hund")):
            lines = "".join(f"{word} {i * i} {word}\n" for i in range(200))
            (folder / f"{split}.{language}.gz").write_bytes(gzip.compress(lines.encode()))
    return Corpus(prepare("multi30k", out=folder / "corpus", local=folder))


def test_multi30k_is_asked_only_where_all_of_the_answer_is_german(translations):
    corpus = translations
    windows, position = questions(corpus, 64, 3, n_windows=10, n_positions=5)
    assert windows.shape[1] == 65 and position.shape == (len(windows), 5) and position.min() >= 32
    for window, ts in zip(windows, position):
        for t in ts.tolist():
            line = bytes(window[:t + 1].tolist()).split(b"\n")[-1]          # what is known of its line
            answer = bytes(window[t + 1:t + 4].tolist())
            assert b"\t" in line and b"\t" not in answer and b"\n" not in answer[:-1]
    english = unigram(corpus)[ord("g")]                                     # "dog": not counted
    assert english < 1e-3 < unigram(corpus)[ord("h")]


def test_measure_asks_the_model_its_heads_and_the_baselines_the_same_questions(corpus, run_folder):
    corpus, (model, _) = Corpus(corpus), load_checkpoint(run_folder)
    model.eval().offsets = (1, 2, 4)                                        # as if it had no other heads
    windows, position = questions(corpus, 32, 4, 12, 2)
    records = measure(model, windows, position, 4, unigram(corpus), branches=8, progress=False)
    assert [(r["distance"], r["reader"]) for r in records] == [
        (1, "model"), (1, "unigram"),
        (2, "marginalisation"), (2, "own head"), (2, "greedy rollout"), (2, "unigram"),
        (3, "marginalisation"), (3, "greedy rollout"), (3, "unigram"),
        (4, "marginalisation"), (4, "own head"), (4, "greedy rollout"), (4, "unigram")]
    found = {(r["distance"], r["reader"]): r["nats"][0] for r in records}
    lines = {(r["distance"], r["reader"]): r for r in records}

    row = torch.arange(12)[:, None]
    target = {d: windows[row, position + d] for d in (1, 2, 3, 4)}

    def nats(probs, d):
        return -(probs.gather(-1, target[d][..., None])[..., 0] / probs.sum(-1)).log().mean().item()

    def right(probs, d, k):                                                 # share of targets among the best k
        return (probs.topk(k).indices == target[d][..., None]).any(-1).double().mean().item()
    for d in (1, 2, 3, 4):
        probs, mass = marginalize(model.gpt, windows[:, :29], d, 8, "beam", position)
        line, top1 = lines[d, "marginalisation" if d > 1 else "model"], right(probs, d, 1)
        assert (line["top1"][0], line["top5"][0]) == (top1, right(probs, d, 5))
        if d > 1:
            assert line["mass"][0] == pytest.approx(mass.mean().item())
            gain = right(unigram(corpus).expand(12, 2, -1), d, 1) - top1
            assert lines[d, "unigram"]["top1_gain"][0] == pytest.approx(gain)
        assert found[d, "marginalisation" if d > 1 else "model"] == pytest.approx(nats(probs, d), rel=1e-4)
        assert found[d, "unigram"] == pytest.approx(nats(unigram(corpus).expand(12, 2, -1), d), rel=1e-4)
    for d in (2, 4):
        logits = model(windows[:, :29])[d][row, position]
        assert found[d, "own head"] == pytest.approx(nats(logits.softmax(-1), d), rel=1e-4)
    greedy = []                                                             # two tokens written, then asked
    for window, ts in zip(windows, position.tolist()):
        for t in ts:
            text = window[:t + 1]
            for _ in range(2):
                text = torch.cat([text, model.gpt(text[None])[0][0, -1].argmax()[None]])
            greedy.append(model.gpt(text[None])[0][0, -1].softmax(-1))
    assert found[3, "greedy rollout"] == pytest.approx(nats(torch.stack(greedy).view(12, 2, -1), 3), rel=1e-4)


def test_truncation_is_compared_with_the_exact_answer_where_it_can_be_paid_for():
    gpt, windows = small_gpt(), texts(4, 9)
    records = truncation(gpt, windows, torch.tensor([[3, 5]] * 4), 4, nodes=110, progress=False)
    assert {(r["distance"], r["questions"]) for r in records} == {(2, 8), (3, 4)}   # 5, 25 and 125 nodes for each
    r, position = next(r for r in records if r["distance"] == 3 and r["k"] == 4), torch.tensor([[3]] * 4)
    exact, _ = marginalize(gpt, windows, 3, position=position)
    for method in ("top-k", "beam"):
        probs, mass = marginalize(gpt, windows, 3, 4, method, position)
        expected = (probs / mass[..., None] - exact).abs().sum(-1).mean().item() / 2
        assert r["tv"][method][0] == pytest.approx(expected, rel=1e-4)
        assert r["mass"][method] == pytest.approx(mass.mean().item())
    probs, error = estimate(gpt, windows, 3, 4, position)
    assert r["tv"]["sample"][0] == pytest.approx((probs - exact).abs().sum(-1).mean().item() / 2, rel=1e-4)
    assert r["standard_error"] == pytest.approx(error.sum(-1).mean().item() / 2, rel=1e-4)


# Layer by layer

def test_the_logit_lens_on_the_last_layer_is_the_model():
    gpt, idx = small_gpt(), texts()
    stream = gpt.residual_stream(idx)
    assert len(stream) == 1 + gpt.config.n_layer
    torch.testing.assert_close(Probe(gpt.config.n_embd)(gpt, stream[-1]), gpt(idx)[0])


def test_the_lens_reads_each_layer_with_the_final_norm_and_unembedding():
    gpt, windows, position = small_gpt(), texts(4, 9), torch.tensor([[3, 5]] * 4)
    records = measure_layers(gpt, {2: [Probe(32)] * 3}, windows, position)
    for r in records:
        logits = gpt.lm_head(gpt.transformer.ln_f(gpt.residual_stream(windows)[r["layer"]]))[:, [3, 5]]
        nats = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, [5, 7]].flatten())
        assert r["nats"][0] == pytest.approx(nats.item(), rel=1e-4)


def test_a_layers_state_is_what_the_rest_of_the_model_needs():
    gpt, idx = small_gpt(), texts()
    stream = gpt.residual_stream(idx)
    for i, block in enumerate(gpt.transformer.h):
        torch.testing.assert_close(block(stream[i]), stream[i + 1])


def test_probes_learn_and_leave_the_backbone_alone(corpus):
    corpus, gpt = Corpus(corpus), tiny_gpt(vocab_size=257, block_size=32)
    before = {k: v.clone() for k, v in gpt.state_dict().items()}
    windows, position = questions(corpus, 32, 2, 8, 4)
    probes = train_probes(gpt, corpus, steps=60, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in gpt.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in gpt.parameters())
    assert not any(torch.equal(a.affine.weight, b.affine.weight) for a, b in zip(*probes.values()))
    nats = {(r["layer"], r["distance"], r["reader"]): r["nats"][0]
            for r in measure_layers(gpt, probes, windows, position)}
    assert len(nats) == 3 * 2 * 2
    for layer, distance in itertools.product(range(3), (1, 2)):             # held out
        assert nats[layer, distance, "probe"] < 0.95 * nats[layer, distance, "lens"]


def test_a_probe_of_a_distance_is_trained_on_tokens_at_that_distance(tmp_path):
    (tmp_path / "abc.txt").write_text("abc" * 3000)
    corpus, gpt = Corpus(prepare(str(tmp_path / "abc.txt"), out=tmp_path / "abc")), tiny_gpt(
        vocab_size=257, block_size=32)
    probes = train_probes(gpt, corpus, steps=100, progress=False)
    windows, position = questions(corpus, 32, 2, 4, 4)
    for r in measure_layers(gpt, probes, windows, position):
        if r["reader"] == "probe":
            assert r["top1"][0] > 0.6                                       # the token at the other distance: 0


def test_a_probe_is_trained_by_a_plain_loop_and_of_multi30k_on_the_german_half_only(translations):
    gpt, layer, distance = tiny_gpt(vocab_size=257, block_size=64), 1, 2
    probe = train_probes(gpt, translations, steps=3, batch_size=2, lr=0.1, progress=False)[distance][layer]
    again = Probe(32)
    optimizer = torch.optim.Adam(again.parameters())
    for step in range(3):
        idx = translations.batch("train", 2, 65, step)
        logits = again(gpt, gpt.residual_stream(idx[:, :-1])[layer])
        losses = [-logits[b, t].log_softmax(-1)[idx[b, t + distance]] for b in range(2) for t in range(63)
                  if german_half(idx, translations.tokenizer)[b, t + distance]]
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 3)
        for p, g in zip(again.parameters(), torch.autograd.grad(sum(losses) / len(losses), again.parameters())):
            p.grad = g
        optimizer.step()
    torch.testing.assert_close(probe.affine.weight, again.affine.weight)


# The command line

FAST = ["--windows", 4, "--positions", 2, "--branches", 4, "--exact-nodes", 600, "--device", "cpu"]


def test_the_command_prints_and_writes_what_it_measured(run_folder, tmp_path):
    out = tmp_path / "result.json"
    result = command("marginalize.py", run_folder, *FAST, "--layers", "--probe-steps", 5, "--out", out)
    assert result.returncode == 0, result.stderr
    assert "marginalisation" in result.stdout and "own head" in result.stdout and "t+2 probe" in result.stdout
    found = json.loads(out.read_text())
    assert found["environment"]["torch"] == torch.__version__ and "marginalize.py" in found["command"]
    run, = found["runs"]
    assert run["windows"] == 4 and len(run["layers"]) == 3 * 2 * 2 and len(run["table"]) == 4 * 4 - 2
    assert {r["k"] for r in run["truncation"]} == {1, 4, 16, 64}
    own = next(r for r in run["table"] if r["reader"] == "own head")        # numbers are printed in percent
    assert f"written to {out}" in result.stdout
    shown = next(line for line in result.stdout.splitlines() if line.startswith("t+2  own head"))
    assert f"{100 * own['top1'][0]:.1f} ±" in shown and f"{own['nats'][0]:.3f} ±" in shown


def test_results_go_into_the_run_folder_unless_told_otherwise(run_folder, tmp_path):
    shutil.copy(run_folder / "checkpoint.pt", tmp_path)
    assert command("marginalize.py", tmp_path, *FAST, "--horizon", 2, "--exact-nodes", 0).returncode == 0
    assert json.loads((tmp_path / "marginalize.json").read_text())["horizon"] == 2


def test_the_figure_shows_the_numbers_of_the_result(run_folder, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    result = command("marginalize.py", run_folder, *FAST, "--layers", "--probe-steps", 5, "--out", tmp_path / "a.json")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "a.json").read_text())
    by_distance, by_layer = draw(results, plt).axes
    drawn = {h.get_label(): h[0].get_ydata().tolist() for h in by_distance.containers + by_layer.containers}
    run, = results["runs"]
    assert drawn["own head"] == [r["top1"][0] for r in run["table"] if r["reader"] in ("model", "own head")]
    assert drawn["t+2, probe"] == [r["top1"][0] for r in run["layers"] if (r["distance"], r["reader"]) == (2, "probe")]


@pytest.mark.parametrize("method", ["exact", "top-k", "sample"])
def test_every_method_can_be_asked_for(method, run_folder, tmp_path):
    out = tmp_path / "result.json"
    result = command("marginalize.py", run_folder, *FAST, "--method", method, "--horizon", 2, "--exact-nodes", 0,
                     "--out", out)
    assert result.returncode == 0, result.stderr
    line = next(r for r in json.loads(out.read_text())["runs"][0]["table"] if r["reader"] == "marginalisation")
    model, state = load_checkpoint(run_folder)
    corpus = Corpus(state["args"]["data"])
    windows, position = questions(corpus, 32, 2, 4, 2)
    branches = None if method == "exact" else 4
    again = measure(model, windows, position, 2, unigram(corpus), branches, "top-k" if method == "exact" else method)
    assert line == json.loads(json.dumps(next(r for r in again if r["reader"] == "marginalisation")))
    assert ("mass" in line) == (method != "sample")


def test_gpt2_weights_can_be_measured_like_a_run(corpus, tmp_path):
    tiny_gpt(vocab_size=257, block_size=32).save_pretrained(tmp_path / "gpt2")
    result = command("marginalize.py", tmp_path / "gpt2", "--data", corpus, *FAST)
    assert result.returncode == 0, result.stderr
    assert_one_line_error(command("marginalize.py", tmp_path / "gpt2", *FAST), "--data")


@pytest.mark.parametrize("options, words", [
    (["--horizon", 0], ["horizon"]), (["--horizon", 17], ["horizon of 17", "context of 32"]),
    (["--branches", 258], ["258", "vocabulary of 257"]), (["--branches", 0], ["branches"]),
    (["--method", "beam", "--branches", 64, "--max-nodes", 8], ["max_nodes"]), (["--windows", 0], ["--windows"]),
    (["--positions", 40], ["--positions"]), (["--max-nodes", 0], ["--max-nodes"]),
    (["--data", "nowhere"], ["no corpus"]), (["--method", "exact", "--horizon", 12], ["exact", "branches"]),
    (["--device", "tpu"], ["tpu"]), (["--out", "no/such/folder/x.json"], ["--out"]), (["--out", "x.png"], ["--out"]),
    (["--exact-nodes", -1], ["--exact-nodes"]), (["--windows", 1], ["--windows"]), (["--seed", 2**63], ["--seed"]),
    (["--method", "magic"], ["magic"])])
def test_bad_options_are_one_line(options, words, run_folder):
    assert_one_line_error(command("marginalize.py", run_folder, *FAST, *options), *words)


def test_weights_that_are_not_finite_are_one_line(run_folder, tmp_path):
    model, state = load_checkpoint(run_folder)
    model.gpt.lm_head.weight.data[3, 3] = math.nan
    save_checkpoint(tmp_path / "checkpoint.pt", model, **state)
    assert_one_line_error(command("marginalize.py", tmp_path, *FAST), "not finite")


def test_a_run_that_is_none_or_a_corpus_of_another_tokenizer_is_one_line(run_folder, corpus, tmp_path):
    assert_one_line_error(command("marginalize.py", tmp_path, *FAST), "no checkpoint")
    model, state = load_checkpoint(run_folder)
    save_checkpoint(tmp_path / "checkpoint.pt", model, **{**state, "tokenizer": "gpt2"})
    assert_one_line_error(command("marginalize.py", tmp_path, *FAST), "bytes tokens", "gpt2 tokens")
    tiny_gpt(vocab_size=31).save_pretrained(tmp_path / "gpt2")
    assert_one_line_error(command("marginalize.py", tmp_path / "gpt2", "--data", corpus, *FAST), "257", "31")
