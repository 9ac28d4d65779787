"""Lesson 5: what a next-token model already knows about later tokens.

The fast look-ahead must equal the sum as a loop, marginalize_reference."""
import gzip
import json
import math

import pytest
import torch
import torch.nn as nn

from common import load_checkpoint, save_checkpoint
from conftest import assert_one_line_error, command, process, tiny_gpt, tiny_model
from data.loader import Corpus
from data.prepare import prepare
from marginalize import (estimate, interval, look_ahead, marginalize, marginalize_reference,
                         measure, questions, score, unigram)
from model import GPT, GPTConfig, InputError

assert_close = torch.testing.assert_close


def small_gpt(vocab_size=5, **config):
    return tiny_gpt(vocab_size=vocab_size, block_size=16, **config)


def texts(B=2, T=6, vocab_size=5):
    torch.manual_seed(1)
    return torch.randint(0, vocab_size, (B, T))


# What it is

@pytest.mark.parametrize("horizon", [1, 2, 3, 4])
def test_the_look_ahead_is_the_sum_over_all_continuations(horizon):
    gpt, idx = small_gpt(), texts()
    probs, mass = marginalize(gpt, idx, horizon)
    assert_close(probs, torch.stack([marginalize_reference(gpt, row, horizon) for row in idx]))
    assert_close(mass, torch.ones(2))


def test_each_of_many_positions_is_answered_as_if_it_ended_the_text():
    gpt, idx, position = small_gpt(), texts(3, 9), torch.tensor([[0, 4, 8], [3, 3, 1], [7, 2, 5]])
    probs, mass = marginalize(gpt, idx, 3, position=position)
    expected = [marginalize_reference(gpt, row[:t + 1], 3)
                for row, ts in zip(idx, position.tolist()) for t in ts]
    assert_close(probs, torch.stack(expected).view(3, 3, 5))
    assert_close(mass, torch.ones(3, 3))


def markov_chain(P):
    """A GPT whose next token depends on the last one only, with transition probabilities P."""
    V = len(P)
    config = GPTConfig(block_size=16, vocab_size=V, n_layer=1, n_head=1, n_embd=V)
    gpt = GPT(config).double().eval()
    gpt.lm_head = nn.Linear(V, V, bias=False).double()  # no longer tied to the embedding
    with torch.no_grad():
        for p in gpt.parameters():
            p.zero_()  # the layer adds nothing
        gpt.transformer.wte.weight.copy_(torch.eye(V))  # ln_f maps to (one-hot - 1/V) / spread
        spread = math.sqrt((1 / V) * (1 - 1 / V) + 1e-5)
        gpt.transformer.ln_f.weight.fill_(spread)
        gpt.transformer.ln_f.bias.fill_(1 / V)  # and back to one-hot
        gpt.lm_head.weight.copy_(P.log().T)
    return gpt


@pytest.mark.parametrize("horizon", [1, 2, 3, 4])
def test_a_markov_chains_marginals_are_the_powers_of_its_matrix(horizon):
    torch.manual_seed(2)
    P = torch.rand(7, 7, dtype=torch.double).softmax(-1)
    probs, mass = marginalize(markov_chain(P), torch.arange(7)[:, None], horizon)
    assert_close(probs, torch.linalg.matrix_power(P, horizon), rtol=0, atol=1e-12)
    assert_close(mass, torch.ones(7, dtype=torch.double), rtol=0, atol=1e-12)


# Truncation

def joint(gpt, idx, path):
    """p(path | idx)"""
    probs = gpt(torch.cat([idx, torch.tensor(path)])[None])[0][0].softmax(-1)
    return math.prod(probs[len(idx) - 1 + i, v].item() for i, v in enumerate(path))


def test_top_k_follows_the_best_k_tokens_after_every_node():
    gpt, idx, k = small_gpt(), texts(1), 2

    def best(path):
        return gpt(torch.tensor([idx[0].tolist() + path]))[0][0, -1].topk(k).indices.tolist()
    paths = [(v, w) for v in best([]) for w in best([v])]
    probs, mass = marginalize(gpt, idx, 3, branches=k)
    assert_close(probs[0], marginalize_reference(gpt, idx[0], 3, paths))
    assert_close(mass, probs.sum(-1))


def test_a_beam_follows_the_most_probable_paths():
    gpt, idx, k, paths = small_gpt(), texts(1), 3, [()]
    for _ in range(3):
        longer = [(*path, v) for path in paths for v in range(5)]
        paths = sorted(longer, key=lambda path: joint(gpt, idx[0], path), reverse=True)[:k]
    probs, mass = marginalize(gpt, idx, 4, branches=k, method="beam")
    assert_close(probs[0], marginalize_reference(gpt, idx[0], 4, paths))
    assert_close(mass.item(), sum(joint(gpt, idx[0], path) for path in paths))


@pytest.mark.parametrize("method", ["top-k", "beam"])
def test_truncation_becomes_exact_as_k_grows(method):
    gpt, idx = small_gpt(), texts()
    exact, _ = marginalize(gpt, idx, 2)
    found = [marginalize(gpt, idx, 2, k, method) for k in range(1, 6)]
    distance = [(probs - exact).abs().sum(-1) for probs, _ in found]
    assert all((a < b).all() for (_, a), (_, b) in zip(found, found[1:]))  # captured mass
    assert all((a > b).all() for a, b in zip(distance, distance[1:]))
    assert_close(found[-1], (exact, torch.ones(2)))


@pytest.mark.parametrize("method", ["top-k", "beam"])
def test_a_truncated_probability_is_a_lower_bound_and_the_missing_mass_bounds_its_error(method):
    gpt, idx = small_gpt(), texts()
    exact, _ = marginalize(gpt, idx, 3)
    probs, mass = marginalize(gpt, idx, 3, 2, method)
    assert (mass < 0.9).all()  # something is missing
    assert (probs <= exact + 1e-6).all() and (exact <= probs + (1 - mass)[:, None] + 1e-6).all()


# Sampled paths

def test_the_estimate_is_unbiased_and_its_standard_error_is_its_spread():
    gpt, idx = small_gpt(), texts(1)
    exact, _ = marginalize(gpt, idx, 3)
    found = [estimate(gpt, idx, 3, samples=3, max_nodes=2, seed=seed) for seed in range(400)]
    probs, error = (torch.cat(t).double() for t in zip(*found))  # (400, V)
    assert ((probs.mean(0) - exact[0]).abs() < 4 * probs.std(0) / math.sqrt(400)).all()
    assert_close(error.square().mean(0).sqrt(), probs.std(0), rtol=0.15, atol=0)
    assert_close(probs.sum(-1), torch.ones(400).double())


def test_one_sampled_path_does_not_know_its_error():
    assert estimate(small_gpt(), texts(), 3, samples=1)[1].isnan().all()


def test_many_positions_are_estimated_each_by_its_own_paths():
    gpt, idx, position = small_gpt(), texts(), torch.tensor([[1, 5], [3, 4]])
    probs, error = estimate(gpt, idx, 2, 4000, position)
    exact, _ = marginalize(gpt, idx, 2, position=position)
    assert probs.shape == error.shape == (2, 2, 5)
    assert ((probs - exact).abs() < 5 * error + 1e-6).all()


def test_the_estimate_depends_on_its_seed_only():
    gpt, idx = small_gpt(), texts()
    a, b, c = (estimate(gpt, idx, 3, 4, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


# The look-ahead shares the prefix, and its memory is bounded

@pytest.mark.parametrize("max_nodes, branches, method", [
    (3, None, "top-k"), (64, None, "top-k"), (7, 2, "top-k"), (3, 3, "beam"), (10_000, 3, "beam")])
def test_the_memory_bound_is_kept_and_changes_nothing(max_nodes, branches, method):
    gpt, idx, position = small_gpt(), texts(5, 8), torch.arange(8).expand(5, 8)
    expected, _ = marginalize(gpt, idx, 3, branches, method, position)
    rows = []
    gpt.lm_head.register_forward_hook(lambda module, _, y: rows.append(y.shape[:-1].numel()))
    probs, _ = marginalize(gpt, idx, 3, branches, method, position, max_nodes)
    assert_close(probs, expected)
    assert max(rows) <= max_nodes


def test_all_branches_of_all_positions_and_texts_share_one_pass_after_the_prefill():
    gpt, idx, position = small_gpt(), texts(4, 6), torch.arange(6).expand(4, 6)
    passes = []
    gpt.transformer.wte.register_forward_hook(lambda module, x, _: passes.append(x[0].shape))
    marginalize(gpt, idx, 2, position=position)
    assert passes == [(4, 6), (4, 6 * 5)]


def test_all_distances_come_from_one_look_ahead():
    gpt, idx, position = small_gpt(), texts(), torch.tensor([[2, 5], [0, 4]])
    for rows, columns, sums in look_ahead(gpt, idx, position, 3):
        for distance, (probs, _) in enumerate(sums, 1):
            expected, _ = marginalize(gpt, idx, distance, position=position)
            assert_close(probs, expected[rows, columns])


def test_dropout_is_off_while_looking_ahead():
    gpt, idx = small_gpt(dropout=0.5), texts()
    expected = marginalize(gpt, idx, 2)[0]
    assert torch.equal(marginalize(gpt.train(), idx, 2)[0], expected)


def test_the_last_horizon_that_fits_the_context_works():
    gpt, idx = small_gpt(vocab_size=2), texts(1, 8, 2)
    assert_close(marginalize(gpt, idx, 9)[0][0], marginalize_reference(gpt, idx[0], 9))
    with pytest.raises(InputError, match="context of 16"):
        marginalize(gpt, idx, 10)


# Measuring it

def test_a_score_is_the_rank_and_the_negative_log_probability_of_the_target():
    probs = torch.tensor([[0.2, 0.4, 0.1], [0.2, 0.4, 0.1]])  # captured mass 0.7
    rank, nats = score(probs, torch.tensor([1, 2]))
    assert rank.tolist() == [0, 2]
    assert_close(nats, torch.tensor([-math.log(4 / 7), -math.log(1 / 7)]))


def test_the_interval_treats_windows_and_not_positions_as_independent():
    windows = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    mean, half = interval(windows)
    assert interval(windows.expand(4, 100)) == pytest.approx((mean, half))
    assert mean == 0.5 and half == pytest.approx(1.96 * math.sqrt(1 / 3) / 2)


def test_windows_do_not_overlap_and_positions_are_spread_over_their_second_half(corpus):
    corpus = Corpus(corpus)
    windows, position = questions(corpus, 32, 4, n_windows=10_000, n_positions=3)
    assert len(windows) == len(corpus.val) // 33
    assert position.tolist() == [[16, 22, 28]] * len(windows)  # 28 + 4 is the last token


@pytest.fixture(scope="module")
def translations(tmp_path_factory):
    """A small multi30k: lines of English, a tab and German."""
    folder = tmp_path_factory.mktemp("multi30k")
    for split in ("train", "val"):
        for language, word in (("en", "dog"), ("de", "hund")):
            lines = "".join(f"{word} {i * i} {word}\n" for i in range(200))
            (folder / f"{split}.{language}.gz").write_bytes(gzip.compress(lines.encode()))
    return Corpus(prepare("multi30k", out=folder / "corpus", local=folder))


def test_only_the_german_half_of_multi30k_is_predicted(translations, corpus):
    tokens = torch.tensor([list(b"og\nA dog\tEin Hund\nA c"), list(b"\tHund\nA dog\tEin Hund ")])
    german = translations.predicted(tokens)
    found = [bytes(row[kept].tolist()) for row, kept in zip(tokens, german)]
    assert found == [b"Ein Hund\n", b"Hund\nEin Hund "]
    assert Corpus(corpus).predicted(tokens).all()


def test_positions_of_multi30k_are_those_whose_answer_is_all_german(translations):
    windows, position = questions(translations, 64, 3, n_windows=10, n_positions=5)
    assert windows.shape[1] == 65 and position.shape == (len(windows), 5) and position.min() >= 32
    for window, ts in zip(windows, position):
        for t in ts.tolist():
            line = bytes(window[:t + 1].tolist()).split(b"\n")[-1]  # what is known of its line
            answer = bytes(window[t + 1:t + 4].tolist())
            assert b"\t" in line and b"\t" not in answer and b"\n" not in answer[:-1]
    frequency = unigram(translations)
    assert frequency[ord("g")] < 1e-3 < frequency[ord("h")]  # "dog" does not count


@torch.no_grad()
def test_measure_asks_all_readers_the_same_questions(corpus, run_folder):
    corpus, (model, _) = Corpus(corpus), load_checkpoint(run_folder)
    model.eval().offsets = (1, 2, 4)  # as if it had no other heads
    windows, position = questions(corpus, 32, 4, 12, 2)
    idx, row, frequency = windows[:, :29], torch.arange(12)[:, None], unigram(corpus)
    records = measure(model, windows, position, 4, frequency, branches=8, progress=False)
    expected = {}  # the distributions (12, 2, V), found in other ways
    for d in (1, 2, 3, 4):
        expected[d, "marginalisation" if d > 1 else "model"], mass = marginalize(
            model.gpt, idx, d, 8, "beam", position)
        if d in (2, 4):
            expected[d, "own head"] = model(idx)[d][row, position].softmax(-1)
        if d > 1:
            expected[d, "greedy rollout"] = torch.stack([torch.stack([
                model.gpt(greedy(model.gpt, w[:t + 1], d - 1))[0][0, -1].softmax(-1)
                for t in ts]) for w, ts in zip(windows, position.tolist())])
        expected[d, "unigram"] = frequency.expand(12, 2, -1)
    assert [(r["distance"], r["reader"]) for r in records] == list(expected)
    assert [r["mass"][0] for r in records if "mass" in r][-1] == pytest.approx(mass.mean().item())
    for r in records:
        d, probs = r["distance"], expected[r["distance"], r["reader"]]
        target = windows[row, position + d]
        rank, nats = score(probs, target)
        assert r["top1"] == interval(rank < 1) and r["top5"] == interval(rank < 5)
        assert r["nats"] == pytest.approx(interval(nats), rel=1e-4)
        if d > 1 and r["reader"] != "marginalisation":
            base = score(expected[d, "marginalisation"], target)[0] < 1
            assert r["top1_gain"] == interval((rank < 1).float() - base.float())


@torch.no_grad()
def test_a_conditional_head_is_asked_with_the_token_that_it_reads(corpus):
    model = tiny_model((1, 3), conditional=True, vocab_size=257, block_size=32)
    windows, position = questions(Corpus(corpus), 32, 3, 12, 2)
    frequency = unigram(Corpus(corpus))
    found = measure(model, windows, position, 3, frequency, branches=1, progress=False)
    row = torch.arange(12)[:, None]
    logits = model(windows[:, :32])[3][row, position]  # its head at t reads token t + 1
    _, nats = score(logits.softmax(-1), windows[row, position + 3])
    own = next(r for r in found if r["reader"] == "own head")
    assert own["nats"] == pytest.approx(interval(nats), rel=1e-4)


def greedy(gpt, text, n):
    """The text (T,) and n tokens that the gpt writes greedily -> (1, T + n)"""
    for _ in range(n):
        text = torch.cat([text, gpt(text[None])[0][0, -1].argmax()[None]])
    return text[None]


# The command line

FAST = ["--windows", 4, "--positions", 2, "--branches", 4, "--device", "cpu"]


@pytest.mark.parametrize("method", ["beam", "exact", "top-k", "sample"])
def test_the_command_prints_and_writes_what_it_measured(method, run_folder, tmp_path):
    out, how = tmp_path / "result.json", ["--horizon", 2, "--method", method]
    result = command("marginalize.py", run_folder, *FAST, *how, "--out", out)
    assert result.returncode == 0, result.stderr
    found = json.loads(out.read_text())
    run, = found["runs"]
    model, state = load_checkpoint(run_folder)
    corpus, branches = Corpus(state["args"]["data"]), None if method == "exact" else 4
    asked = questions(corpus, 32, 2, 4, 2)
    table = measure(model, *asked, 2, unigram(corpus), branches, method, progress=False)
    assert run["table"] == json.loads(json.dumps(table))
    assert ("mass" in run["table"][2]) == (method != "sample")
    assert (found["horizon"], found["method"], found["branches"]) == (2, method, branches)
    assert found["environment"]["torch"] == torch.__version__
    assert found["command"].startswith("marginalize.py")
    assert set(run) == {"run", "name", "parameters", "steps", "data", "data_sha256", "offsets",
                        "windows", "positions", "table"}
    head = next(r for r in table if r["reader"] == "own head")
    line = next(line for line in result.stdout.splitlines() if line.startswith("t+2  own head"))
    assert f"{100 * head['top1'][0]:.1f} ±" in line and f"{head['nats'][0]:.3f} ±" in line


def test_gpt2_weights_can_be_measured_like_a_run(corpus, tmp_path):
    pytest.importorskip("safetensors")
    tiny_gpt(vocab_size=257, block_size=32).save_pretrained(tmp_path / "gpt2")
    result = command("marginalize.py", tmp_path / "gpt2", "--data", corpus, *FAST)
    assert result.returncode == 0, result.stderr
    assert_one_line_error(command("marginalize.py", tmp_path / "gpt2", *FAST), "--data")


# Guards

@pytest.mark.parametrize("options, words", [
    (dict(horizon=0), "horizon must be at least 1"),
    (dict(horizon=2, branches=6), "vocabulary of 5"), (dict(horizon=2, branches=0), "1 to 5"),
    (dict(horizon=2, method="guess"), "unknown method"),
    (dict(horizon=2, method="beam"), "needs a number"),
    (dict(horizon=2, branches=4, method="beam", max_nodes=3), "at least 4"),
    (dict(horizon=2, max_nodes=0), "max_nodes"),
    (dict(horizon=2, branches=10**7, method="sample"), "1 to 1000000"),
    (dict(horizon=2, position=torch.tensor([[1]])), "2 texts, but positions for 1"),
    (dict(horizon=2, position=torch.tensor([[6], [0]])), r"0\.\.5"),
    (dict(horizon=2, position=torch.tensor([[-1], [0]])), r"0\.\.5"),
    (dict(horizon=2, idx=torch.zeros(1, 0, dtype=torch.long)), "no text"),
    (dict(horizon=2, idx=torch.zeros(0, 4, dtype=torch.long)), "no text"),
    (dict(horizon=2, idx=torch.tensor([[5]])), r"0\.\.4")])
def test_what_does_not_fit_the_model_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        marginalize(small_gpt(), **{"idx": texts(), **options})


@pytest.mark.parametrize("options, words", [
    (["--horizon", 0], ["horizon"]), (["--horizon", 17], ["horizon of 17", "context of 32"]),
    (["--branches", 258], ["258", "vocabulary of 257"]), (["--branches", 0], ["branches"]),
    (["--branches", 64, "--max-nodes", 8], ["max_nodes"]), (["--max-nodes", 0], ["max_nodes"]),
    (["--windows", 0], ["--windows"]), (["--windows", 1], ["--windows"]),
    (["--positions", 0], ["--positions"]), (["--positions", 40], ["--positions"]),
    (["--data", "nowhere"], ["no corpus"]), (["--method", "magic"], ["magic"]),
    (["--method", "exact", "--horizon", 12], ["exact", "branches"]),
    (["--device", "tpu"], ["tpu"]), (["--seed", 2**63], ["--seed"]),
    (["--out", "no/such/folder/x.json"], ["--out"])])
def test_bad_options_are_one_line(options, words, run_folder):
    assert_one_line_error(command("marginalize.py", run_folder, *FAST, *options), *words)


def test_weights_that_are_not_finite_are_one_line(run_folder, tmp_path):
    model, state = load_checkpoint(run_folder)
    model.gpt.lm_head.weight.data[3, 3] = math.nan
    save_checkpoint(tmp_path / "checkpoint.pt", model, **state)
    assert_one_line_error(command("marginalize.py", tmp_path, *FAST), "not finite")


def test_a_missing_run_or_a_corpus_of_another_tokenizer_is_one_line(run_folder, tmp_path):
    assert_one_line_error(command("marginalize.py", tmp_path, *FAST), "no checkpoint")
    model, state = load_checkpoint(run_folder)
    save_checkpoint(tmp_path / "checkpoint.pt", model, **{**state, "tokenizer": "gpt2"})
    assert_one_line_error(command("marginalize.py", tmp_path, *FAST), "bytes", "gpt2 tokens")


@pytest.mark.slow
def test_the_script_runs_as_a_process(run_folder):
    result = process("marginalize.py", run_folder, *FAST)
    assert result.returncode == 0, result.stderr
    assert "own head" in result.stdout


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("branches, method", [(None, "top-k"), (3, "beam")])
def test_a_gpu_gives_the_same_marginals(branches, method):
    gpt, idx = small_gpt(), texts()
    expected, _ = marginalize(gpt, idx, 3, branches, method)
    found, _ = marginalize(gpt.cuda(), idx.cuda(), 3, branches, method)
    assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
    probs, error = estimate(gpt, idx.cuda(), 3, 2000)
    assert ((probs - marginalize(gpt, idx.cuda(), 3)[0]).abs() < 5 * error + 1e-4).all()
