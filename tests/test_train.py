"""Lesson 3: one loop trains all offsets, and a run can be stopped anywhere without changing its result."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, TINY, assert_one_line_error, command, tiny_gpt, tiny_model
from data.loader import Corpus
from heads import HeadsConfig, MultiTokenGPT, joint_loss
from model import InputError
import train as train_module
from train import (Muon, Progress, bars, bfloat16, check_args, compute_gradients, evaluate, load_checkpoint, lr_factor,
                   make_model, make_optimizers, orthogonalize, parse_args, recipe, save_checkpoint, start_from,
                   trim_metrics)


def weights(folder):
    return load_checkpoint(folder)[0].state_dict()


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def without_configs(state):
    """What save_checkpoint wants besides the model, which brings its own configs."""
    return {k: v for k, v in state.items() if k not in ("gpt_config", "heads_config")}


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Learning

def test_training_lowers_the_loss_of_every_offset(run_folder):
    logged = [r["loss"] for r in records(run_folder) if "loss" in r]
    assert set(logged[0]) == {"1", "2", "3", "4", "5", "7"}
    assert all(logged[-1][o] < logged[0][o] - 0.5 for o in logged[0])


def test_validation_reports_loss_and_accuracy_of_every_offset(run_folder):
    last = [r for r in records(run_folder) if "val_loss" in r][-1]
    assert last["step"] == 120
    assert set(last["val_loss"]) == set(last["val_accuracy"]) == {"1", "2", "3", "4", "5", "7"}
    assert 0.2 < last["val_accuracy"]["1"] <= 1


def test_evaluation_is_the_plain_mean_over_positions():
    model, windows = tiny_model((1, 3)), torch.randint(0, 31, (5, 21))
    loss, accuracy = evaluate(model, windows, batch_size=2)
    model.eval()
    logits, targets = model(windows[:, :-1])[3][:, :18], windows[:, 3:]
    p = logits.softmax(-1).gather(-1, targets[..., None])
    assert loss[3] == pytest.approx(-p.log().mean().item(), rel=1e-5)
    assert accuracy[3] == pytest.approx((logits.argmax(-1) == targets).float().mean().item())


def settings(*options):
    """The arguments of a training run, as train.py checks them."""
    args = parse_args([str(o) for o in ("--device", "cpu", "--offsets", "1,3", *options)])
    check_args(args)
    return args


def test_offsets_one_is_plain_next_token_training(corpus, tmp_path):
    result = command("train.py", "--data", corpus, "--out", tmp_path, "--offsets", "1", "--steps", 5, *TINY)
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(tmp_path)[0].offsets == (1,)


def test_gradient_accumulation_gives_the_gradients_of_the_larger_batch(corpus):
    model = tiny_model(vocab_size=257, block_size=32)
    whole = Corpus(corpus).batch("train", 4, 33, step=0)
    joint_loss(model, whole, backward=True)
    once = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    for half in whole.split(2):
        joint_loss(model, half, backward=True, scale=0.5)
    for k, p in model.named_parameters():
        torch.testing.assert_close(p.grad, once[k], rtol=1e-4, atol=1e-6)


def test_bfloat16_gradients_are_those_of_float32_but_for_rounding(corpus):
    model, idx = tiny_model(vocab_size=257, block_size=64), Corpus(corpus).batch("train", 4, 65, step=0)
    flag, found = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(), []
    for precision in (nullcontext(), bfloat16(torch.device("cpu"))):
        model.zero_grad()
        with precision:
            losses = {o: loss.item() for o, loss in joint_loss(model, idx, backward=True).items()}
        found.append((losses, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (losses, exact), (rounded, close) = found
    assert rounded == pytest.approx(losses, rel=0.02) and rounded != losses
    assert F.cosine_similarity(exact, close, dim=0) > 0.98
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == flag


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    factors = [lr_factor(step, steps=110, warmup=10, final=0.1) for step in range(110)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(factors) == factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55) and factors[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_belongs_to_exactly_one_optimizer(name):
    model = tiny_model(kind="block", whs=True)
    optimizers = make_optimizers(model, name, 1e-3, 0.1)
    held = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for o in optimizers for g in o.param_groups for p in g["params"] if g["weight_decay"]}
    assert decayed == {id(p) for p in model.parameters() if p.dim() == 2}   # never norms and biases
    if name == "muon":                                                      # never embeddings: they are lookup tables
        assert id(model.gpt.lm_head.weight) not in {id(p) for g in optimizers[1].param_groups for p in g["params"]}


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 40), (1, 6)])
def test_muon_moves_as_pytorchs_does_in_float32(shape, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)       # in which torch.optim.Muon always computes
    monkeypatch.setattr(train_module, "multiplies_in_bfloat16", lambda device: False)
    torch.manual_seed(0)
    ours = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizers = [Muon(ours, lr=0.02, weight_decay=0.1),
                  torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")]
    for step in range(20):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = q.grad = None if step % 3 == i else torch.randn(shape)  # frozen parts sit out steps
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_muon_goes_on_from_its_state_with_the_same_bits():
    torch.manual_seed(0)
    grads = torch.randn(6, 2, 12, 5)
    whole, first, second = ([torch.ones(12, 5, requires_grad=True) for _ in range(2)] for _ in range(3))

    def run(params, grads, state=None):
        optimizer = Muon(params, lr=0.1)
        if state:
            optimizer.load_state_dict(state)
        for step in grads:
            for p, grad in zip(params, step):
                p.grad = grad
            optimizer.step()
        return optimizer.state_dict()
    run(whole, grads)
    state = run(first, grads[:3])
    with torch.no_grad():
        for p, q in zip(second, first):
            p.copy_(q)
    run(second, grads[3:], state)
    assert all(torch.equal(p, q) for p, q in zip(whole, second))


def test_orthogonalized_matrices_keep_their_directions_and_lose_their_lengths():
    torch.manual_seed(0)
    matrices = torch.randn(3, 12, 30)
    for x, m in zip(orthogonalize(matrices), matrices):
        u, s, v = torch.linalg.svd(m, full_matrices=False)
        assert ((u.T @ x.float() @ v.T).diag() > 0.6).all() and (torch.linalg.svdvals(x.float()) < 1.25).all()
        off = u.T @ x.float() @ v.T
        assert (off - off.diag().diag()).abs().max() < 0.1                  # bfloat16, where the hardware has it


# Recipes

def step_by_step(model, corpus, args, first=0, last=1):
    """Train `model` for the steps first..last-1, as train.train does. -> the losses of the last one"""
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    for step in range(first, last):
        losses, _ = compute_gradients(model, optimizers, Corpus(corpus), step, args, nullcontext)
        for optimizer in optimizers:
            optimizer.step()
    return losses


def changed(model, before):
    """Which parts of a model differ from the weights `before`: a subset of {"backbone", "heads"}."""
    return {"backbone" if k.startswith("gpt.") else "heads" for k, v in model.state_dict().items()
            if not torch.equal(v, before[k])}


def copy_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind, own", [("resblock", False), ("resblock", True), ("block", False)])
def test_a_frozen_backbone_keeps_every_bit_and_only_the_heads_learn(optimizer, kind, own, corpus):
    model = tiny_model((1, 3), kind, own=own, vocab_size=257, block_size=32).train()
    before = copy_of(model)
    losses = step_by_step(model, corpus, settings("--backbone-lr", 0, "--optimizer", optimizer, "--batch-size", 2),
                          last=3)
    assert changed(model, before) == {"heads"} and losses.keys() == {3}
    assert all(p.grad is None for p in model.gpt.parameters())              # not even computed


def test_head_warm_up_freezes_the_backbone_first_and_then_trains_both(corpus):
    model = tiny_model((1, 3), vocab_size=257, block_size=32).train()
    args, before = settings("--head-warmup", 2, "--batch-size", 2, "--optimizer", "adamw"), copy_of(model)
    step_by_step(model, corpus, args, last=2)
    assert changed(model, before) == {"heads"}
    step_by_step(model, corpus, args, first=2, last=3)
    assert changed(model, before) == {"heads", "backbone"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_differential_learning_rates_scale_the_backbones_updates_only(optimizer, corpus):
    moved = {}
    for share in (1.0, 0.25):
        model = tiny_model((1, 3), vocab_size=257, block_size=32).train()
        before = copy_of(model)
        step_by_step(model, corpus, settings("--backbone-lr", share, "--batch-size", 2, "--optimizer", optimizer))
        moved[share] = {k: v - before[k] for k, v in model.state_dict().items()}
    for k in moved[1.0]:
        ratio = 0.25 if k.startswith("gpt.") else 1.0
        torch.testing.assert_close(moved[0.25][k], ratio * moved[1.0][k], rtol=1e-2, atol=1e-6, msg=k)


def weights_at(step, *options):
    return recipe(settings("--steps", 90, *options), (1, 3, 5), step)[0]


def test_the_weight_of_the_heads_can_be_constant_ramped_and_per_offset():
    options = ("--offsets", "1,3,5", "--head-weight", 0.5, "--offset-weights", "5:0.1")
    assert weights_at(0, *options) == {1: 1.0, 3: 0.5, 5: 0.05}
    assert weights_at(0, *options, "--head-ramp", 10) == pytest.approx({1: 1.0, 3: 0.05, 5: 0.005})
    assert weights_at(9, *options, "--head-ramp", 10) == weights_at(50, *options, "--head-ramp", 10) == {
        1: 1.0, 3: 0.5, 5: 0.05}
    both = (*options, "--head-ramp", 10, "--head-warmup", 20)               # the ramp begins where both begin to train
    assert weights_at(19, *both) == {1: 0.0, 3: 0.5, 5: 0.05} and weights_at(29, *both)[3] == 0.5
    assert weights_at(20, *both) == pytest.approx({1: 1.0, 3: 0.05, 5: 0.005})


def test_a_curriculum_adds_or_removes_offsets_in_equal_parts_of_the_run():
    def offsets(step, curriculum):
        return [o for o, w in weights_at(step, "--offsets", "1,3,5", "--curriculum", curriculum).items() if w]
    assert [offsets(step, "forward") for step in (0, 29, 30, 60, 89)] == [[1], [1], [1, 3], [1, 3, 5], [1, 3, 5]]
    assert [offsets(step, "reverse") for step in (0, 29, 30, 60, 89)] == [[1, 3, 5], [1, 3, 5], [1, 3], [1], [1]]


def test_an_offset_of_weight_zero_costs_nothing_and_changes_nothing(corpus):
    model = tiny_model((1, 3), vocab_size=257, block_size=32).train()
    calls = []
    model.heads["3"].register_forward_hook(lambda *_: calls.append(1))
    before = copy_of(model)
    losses = step_by_step(model, corpus, settings("--curriculum", "forward", "--batch-size", 2, "--weight-decay", 0.5))
    assert changed(model, before) == {"backbone"} and losses.keys() == {1} and not calls


def test_a_run_can_start_from_another_ones_backbone_and_says_what_next_token_prediction_lost(run_folder, corpus,
                                                                                            tmp_path):
    out = tmp_path / "frozen"
    result = command("train.py", "--data", corpus, "--out", out, "--init", run_folder, "--offsets", "1,2,6",
                     "--backbone-lr", 0, "--steps", 4, *TINY)
    assert result.returncode == 0, result.stderr
    assert f"NTP lost +0.0000 nats against {run_folder}" in result.stdout
    was, now = load_checkpoint(run_folder)[0], load_checkpoint(out)[0]
    assert all(torch.equal(a, b) for a, b in zip(was.gpt.parameters(), now.gpt.parameters()))
    validations = [r["val_loss"] for r in records(out) if "val_loss" in r]
    assert len(validations) == 2 and validations[0]["1"] == validations[1]["1"]
    last = [r for r in records(run_folder) if "val_loss" in r][-1]
    assert validations[0]["2"] == pytest.approx(last["val_loss"]["2"])
    assert validations[1]["6"] < validations[0]["6"]                        # its heads are kept, a new one learns
    result = command("train.py", "--data", corpus, "--out", tmp_path / "joint", "--init", out, "--offsets", "1,2,6",
                     "--lr", 0.1, "--steps", 3, *TINY)                      # the second stage: now the backbone too
    before, after = (r["val_loss"]["1"] for r in records(tmp_path / "joint") if "val_loss" in r)
    assert f"NTP lost {after - before:+.4f} nats" in result.stdout and after != before


def test_a_resumed_run_still_knows_what_next_token_prediction_had_been(run_folder, corpus, tmp_path):
    out = tmp_path / "frozen"
    command("train.py", "--data", corpus, "--out", out, "--init", run_folder, "--backbone-lr", 0, "--steps", 2, *TINY)
    model, state = load_checkpoint(out)
    state["args"]["steps"] = 4                                              # as if it had been stopped half-way
    save_checkpoint(out / "checkpoint.pt", model, **without_configs(state))
    assert "NTP lost +0.0000 nats" in command("train.py", "--resume", out, "--no-progress").stdout


@pytest.mark.parametrize("now, kept", [
    (HeadsConfig((1, 2, 6), own_unembedding=True, whs=True), {2}), (HeadsConfig((1, 2, 3), "block"), set()),
    (HeadsConfig((1, 2, 3), n_layer=2, own_unembedding=True), set()), (HeadsConfig((1, 2, 3), whs=True), set())])
def test_a_start_keeps_the_backbone_and_the_heads_that_fit(now, kept, tmp_path):
    was = tiny_model((1, 2, 3), own=True, whs=True)
    save_checkpoint(tmp_path / "checkpoint.pt", was)
    model, _ = start_from(tmp_path, now)
    fresh = MultiTokenGPT(was.gpt, now).state_dict()
    for key, value in model.state_dict().items():
        part, *rest = key.split(".")
        old = part == "gpt" or int(rest[0]) in kept
        assert torch.equal(value, was.state_dict()[key] if old else fresh[key]) or part == "heads" and not old, key
    model(torch.randint(0, 31, (1, 5)))                                     # and all parts fit together


def test_a_run_can_start_from_gpt2_weights(corpus, tmp_path):
    gpt = tiny_gpt(vocab_size=257, block_size=16)
    gpt.save_pretrained(tmp_path / "gpt2")
    result = command("train.py", "--data", corpus, "--out", tmp_path / "run", "--init", tmp_path / "gpt2", "--offsets",
                     "1,2", "--backbone-lr", 0, "--steps", 2, *TINY)
    assert result.returncode == 0, result.stderr
    model, state = load_checkpoint(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), model.gpt.parameters()))


def test_a_start_has_the_dropout_of_this_run_and_knows_the_corpus(corpus, tmp_path):
    tiny_gpt(vocab_size=257, dropout=0.5).save_pretrained(tmp_path / "gpt2")
    for dropout in (0.0, 0.25):
        model = make_model(settings("--init", tmp_path / "gpt2", "--dropout", dropout), Corpus(corpus))
        assert {m.dropout for m in (model.gpt.config, *model.modules()) if hasattr(m, "dropout")} == {dropout}
    tiny_gpt(vocab_size=31).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="does not know .* 257 tokens"):
        make_model(settings("--init", tmp_path / "gpt2"), Corpus(corpus))


def test_weighted_hidden_states_are_reported_and_drawn_from_the_start_on(corpus, tmp_path):
    result = command("train.py", "--data", corpus, "--out", tmp_path / "run", "--offsets", "1,3", "--whs",
                     "--own-unembedding", "--steps", 2, "--lr", 0.1, *TINY)
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(tmp_path / "run")[0].heads_config == HeadsConfig((1, 3), own_unembedding=True, whs=True)
    start, end = (r["layer_weights"]["3"] for r in records(tmp_path / "run") if "layer_weights" in r)
    assert start == [0.5, 0.5] and end != start and sum(end) == pytest.approx(1)
    lines = [line for line in result.stdout.splitlines() if "reads layers 1 to 2" in line]
    assert len(lines) == 2 and f"{bars(start)}  50% 50%" in lines[0] and bars(end) in lines[1]
    assert bars([0, 0.25, 0.5, 1]) == " ▂▄█"


# Stopping and going on

def start(corpus, out, steps, *options):
    return ["train.py", "--data", str(corpus), "--out", str(out), "--offsets", "1,2,4", "--steps", str(steps),
            "--eval-every", "4", "--dropout", "0.1", "--log-every", "1", *TINY, *options]


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert command(*start(corpus, out, 40)).returncode == 0
    return out


def run_until_step(arguments, out, step, number):
    """Start training and send it a signal once metrics.jsonl has reached `step`. -> (exit status, stderr)"""
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        metrics = out / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count('"loss"') >= step:
            process.send_signal(number)
            break
    return process.wait(60), process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_and_resumed_ends_with_the_weights_of_one_that_was_not(number, corpus, tmp_path,
                                                                                     uninterrupted):
    out = tmp_path / "stopped"
    status, stderr = run_until_step(start(corpus, out, 40), out, 9, number)
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:                                                                   # Ctrl-C: one line, no traceback
        assert status == 130 and stderr.strip().splitlines() == [f"stopped; go on with: python train.py --resume {out}"]
    assert 0 < load_checkpoint(out)[1]["step"] < 40
    result = command("train.py", "--resume", out, "--no-progress")
    assert result.returncode == 0, result.stderr
    assert_same_weights(out, uninterrupted)
    a, b = ([{**r, "tokens_per_second": None} for r in records(f)] for f in (out, uninterrupted))
    assert a == b                                                           # no step twice, none missing


def test_a_run_killed_before_its_first_validation_can_be_resumed(corpus, tmp_path):
    out = tmp_path / "early"
    assert run_until_step(start(corpus, out, 30, "--eval-every", "1000"), out, 2, signal.SIGKILL)[0] == -signal.SIGKILL
    assert load_checkpoint(out)[1]["step"] == 0
    assert command("train.py", "--resume", out, "--no-progress").returncode == 0
    assert load_checkpoint(out)[1]["step"] == 30


def test_a_line_of_metrics_cut_short_by_a_crash_is_dropped_on_resuming(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4, "loss": {"1": 2.5}}\n{"step": 8, "loss": {"1": 2.0}}\n{"step": 9, "loss": {"1": 1.9}')
    trim_metrics(path, 6)
    assert path.read_text() == '{"step": 4, "loss": {"1": 2.5}}\n'


def test_one_training_step_is_the_step_of_a_loop_written_by_hand(corpus):
    # accumulate, clip, head weight, warm-up: AdamW on the mean of two batches, by hand with autograd's plain sum.
    args = settings("--lr", 0.01, "--steps", 10, "--warmup", 4, "--accumulate", 2, "--batch-size", 3, "--clip", 0.1,
                    "--head-weight", 0.3)
    ours, by_hand = (tiny_model((1, 3), vocab_size=257, block_size=32) for _ in range(2))
    data = Corpus(corpus)
    optimizers = make_optimizers(ours, "adamw", args.lr, 0.1)
    compute_gradients(ours, optimizers, data, 1, args, nullcontext)
    optimizers[0].step()
    optimizer, = make_optimizers(by_hand, "adamw", args.lr * 2 / 4, 0.1)    # second of four warm-up steps
    loss = 0
    for micro in (2, 3):
        idx = data.batch("train", 3, 33, step=micro)
        for o, weight in ((1, 1.0), (3, 0.3)):
            logits = by_hand(idx[:, :-1])[o][:, :33 - o]
            loss += weight / 2 * F.cross_entropy(logits.flatten(0, 1), idx[:, o:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1)
    optimizer.step()
    for (k, a), b in zip(ours.named_parameters(), by_hand.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=k)


def test_resuming_a_finished_run_says_so_and_changes_nothing(uninterrupted):
    before = (uninterrupted / "checkpoint.pt").read_bytes()
    result = command("train.py", "--resume", uninterrupted)
    assert result.returncode == 0 and "finished" in result.stdout
    assert (uninterrupted / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("eval_every", [1, 4])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(eval_every, corpus, tmp_path):
    out = tmp_path / "diverges"
    status = command(*start(corpus, out, 8)).returncode
    assert status == 0
    model, state = load_checkpoint(out)
    state["args"].update(steps=400, lr=float("inf"), eval_every=eval_every)  # the next steps can only go wrong
    save_checkpoint(out / "checkpoint.pt", model, **without_configs(state))
    good = weights(out)
    result = command("train.py", "--resume", out, "--no-progress")
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1 and "not finite" in result.stderr
    assert all(torch.equal(good[k], v) and v.isfinite().all() for k, v in weights(out).items())


# Checkpoints

def test_a_checkpoint_brings_back_the_same_model(tmp_path):
    model = tiny_model(kind="block", own=True, n_layer=2)
    save_checkpoint(tmp_path / "checkpoint.pt", model, step=3)
    again, state = load_checkpoint(tmp_path)
    assert state["step"] == 3 and again.heads_config == model.heads_config and again.gpt.config == model.gpt.config
    for k, v in model.state_dict().items():
        assert torch.equal(again.state_dict()[k], v), k
    assert again.gpt.lm_head.weight is again.gpt.transformer.wte.weight     # still tied


def test_nobody_ever_sees_a_half_written_checkpoint(tmp_path):
    model, path = tiny_model(n_embd=256), tmp_path / "checkpoint.pt"
    save_checkpoint(path, model, step=1)
    whole, child = path.stat().st_size, os.fork()
    if child == 0:
        for _ in range(20):
            save_checkpoint(path, model, step=1)
        os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):                          # as a kill at this moment would leave it
        assert path.stat().st_size == whole


def test_a_disk_that_is_full_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny_model(), step=1)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))     # no file may grow beyond this: a full disk
    try:
        with pytest.raises(OSError, match="cannot save a checkpoint.*previous one is kept"):
            save_checkpoint(path, tiny_model(seed=1), step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_truncated_or_foreign_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(InputError, match="no checkpoint"):
        load_checkpoint(tmp_path)
    save_checkpoint(path, tiny_model(), step=1)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(path)
    path.write_text("not a checkpoint at all")
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(path)
    for foreign in ({"weights": torch.ones(3)}, [1, 2], {"gpt_config": {"depth": 3}, "heads_config": {}, "model": {}}):
        torch.save(foreign, path)
        with pytest.raises(InputError, match="not a checkpoint"):
            load_checkpoint(path)


def test_loading_a_checkpoint_never_runs_code_hidden_in_it(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))
    torch.save({"model": Attack()}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_whose_heads_do_not_fit_is_refused(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", tiny_model((1, 2, 3)), step=1)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["heads_config"]["offsets"] = (1, 2, 3, 4)
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match="not a checkpoint of this train.py"):
        load_checkpoint(tmp_path)


# Several processes

def torchrun(*arguments):
    return command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, *arguments)


def losses_of(folder):
    """The loss of every offset and the norm of the gradient at every step that was logged."""
    return {r["step"]: {**r["loss"], "norm": r["grad_norm"]} for r in records(folder) if "loss" in r}


@pytest.fixture(scope="module")
def one_and_two(corpus, tmp_path_factory):
    """The same run by one process and by two."""
    folder = tmp_path_factory.mktemp("processes")
    options = ["train.py", "--data", corpus, "--offsets", "1,2,4", "--head-kind", "block", "--head-warmup", 2,
               "--steps", 8, *TINY, "--optimizer", "adamw", "--lr", 1e-3, "--accumulate", 2, "--log-every", 1]
    for run, result in ((folder / "one", command(*options, "--out", folder / "one")),
                        (folder / "two", torchrun(*options, "--out", folder / "two"))):
        assert result.returncode == 0, result.stderr
        assert result.stdout.count(f"done: python decode.py {run}") == 1    # one process speaks
    return folder / "one", folder / "two"


def assert_same_curve(a, b):
    a, b = losses_of(a), losses_of(b)
    assert a.keys() == b.keys() and len(a) >= 8
    for step, losses in a.items():
        assert b[step] == pytest.approx(losses, rel=1e-3), step


def test_two_processes_are_one_run(one_and_two):
    assert_same_curve(*one_and_two)


def test_one_process_goes_on_where_two_stopped_and_two_where_one_did(one_and_two, tmp_path):
    ends = []
    for folder, resume in zip(one_and_two, (torchrun, command)):
        model, state = load_checkpoint(folder)
        state["args"].update(steps=12, out=str(tmp_path / folder.name))     # as if it had been stopped at step 8
        (tmp_path / folder.name).mkdir()
        shutil.copy(folder / "metrics.jsonl", tmp_path / folder.name)
        save_checkpoint(tmp_path / folder.name / "checkpoint.pt", model, **without_configs(state))
        result = resume("train.py", "--resume", tmp_path / folder.name, "--no-progress")
        assert result.returncode == 0, result.stderr
        ends.append(tmp_path / folder.name)
    assert_same_curve(*ends)
    assert max(losses_of(ends[0])) == 12


def test_each_process_reads_its_share_and_gradients_travel_in_one_piece(corpus, monkeypatch):
    calls, read = [], []
    monkeypatch.setattr("train.process", lambda: (0, 2))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda t: calls.append(t.numel()))
    model = tiny_model((1, 2, 3, 4), "block", vocab_size=257, block_size=32)
    model.gpt.transformer.wte.register_forward_hook(lambda module, args, _: read.append(len(args[0])))
    compute_gradients(model, make_optimizers(model, "adamw", 1e-3, 0.1), Corpus(corpus), 0,
                      settings("--offsets", "1,2,3,4", "--batch-size", 6, "--accumulate", 2), nullcontext)
    assert read == [3, 3]
    assert calls == [sum(p.numel() for p in model.parameters()) + 4]        # and the four losses


def test_several_processes_stop_together_when_one_is_asked_to(corpus, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    status, stderr = run_until_step([*launch, *start(corpus, tmp_path / "run", 100_000)], tmp_path / "run", 5,
                                    signal.SIGTERM)
    assert status != 0 and stderr.count("stopped; go on with") == 1
    assert 5 <= load_checkpoint(tmp_path / "run")[1]["step"] < 100_000


def test_a_batch_that_cannot_be_shared_is_one_line(corpus, tmp_path):
    result = torchrun("train.py", "--data", corpus, "--out", tmp_path / "run", *TINY, "--batch-size", 3)
    assert result.returncode != 0 and result.stderr.count("--batch-size 3 cannot be shared by 2 processes") == 1


# Bad input: one line on stderr, status 2, nothing lost

@pytest.mark.parametrize("options, words", [
    (["--data", "no/such/corpus"], ["no/such/corpus", "prepare.py"]), (["--offsets", "2,3"], ["start with 1"]),
    (["--offsets", "1,x"], ["numbers"]), (["--n-embd", "31"], ["multiple of n_head"]), (["--steps", "0"], ["--steps"]),
    (["--batch-size", "0"], ["--batch-size"]), (["--device", "tpu"], ["not available"]),
    (["--offsets", "1,40"], ["beyond the model's context"]), (["--block-size", "90000"], ["shorter", "90001"]),
    (["--head-layers", "0"], ["at least one layer"]), (["--lr", "-1"], ["--lr"]), (["--lr", "inf"], ["--lr"]),
    (["--seed", "-1"], ["--seed"]), (["--weight-decay", "-1"], ["--weight-decay"]), (["--warmup", "-5"], ["--warmup"]),
    (["--steps", "x"], ["--steps"]), (["--nonsense"], ["--nonsense"]), (["--device", "meta"], ["not available"]),
    (["--n-embd", "1000000000", "--n-head", "1"], ["memory"]), (["--init", "no/such"], ["no checkpoint"]),
    (["--offset-weights", "2"], ["2:1,3:0.5"]), (["--offset-weights", "9:1"], ["--offset-weights"]),
    (["--offset-weights", "2:-1"], ["--offset-weights"]), (["--backbone-lr", "-1"], ["--backbone-lr"]),
    (["--head-warmup", "999999"], ["--head-warmup"]), (["--backbone-lr", "0", "--offsets", "1"], ["train nothing"]),
    (["--curriculum", "forward", "--head-warmup", "5"], ["train nothing"]), (["--curriculum", "up"], ["--curriculum"]),
    (["--curriculum", "reverse", "--backbone-lr", "0"], ["train nothing"]), (["--init", ""], ["--init"]),
    (["--curriculum", "reverse", "--head-warmup", "2000"], ["step 2000", "train nothing"]),
    (["--backbone-lr", "0"], ["learnt nothing"]), (["--eval-windows", str(10**15)], ["memory"])])
def test_bad_options_are_one_line(options, words, corpus, tmp_path):
    data = [] if "--data" in options else ["--data", corpus]
    assert_one_line_error(command("train.py", *data, "--out", tmp_path / "run", *TINY, *options), *words)
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_a_file_or_empty_is_refused(corpus, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", ""):
        assert_one_line_error(command("train.py", "--data", corpus, "--out", out, *TINY), "--out")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_is_never_overwritten_by_accident(run_folder, corpus):
    before = (run_folder / "checkpoint.pt").read_bytes()
    result = command("train.py", "--data", corpus, "--out", run_folder, *TINY)
    assert_one_line_error(result, "already holds a run", "--resume", "--overwrite")
    assert (run_folder / "checkpoint.pt").read_bytes() == before


def test_a_run_of_an_older_train_py_is_not_resumed_but_refused(run_folder, tmp_path):
    model, state = load_checkpoint(run_folder)
    del state["args"]["head_ramp"]
    save_checkpoint(tmp_path / "checkpoint.pt", model, **{**without_configs(state), "step": 30})
    assert_one_line_error(command("train.py", "--resume", tmp_path), "did not know head_ramp")


def test_resuming_nothing_or_on_another_corpus_is_refused(run_folder, corpus, tmp_path):
    assert_one_line_error(command("train.py", "--resume", tmp_path), "no checkpoint")
    model, state = load_checkpoint(run_folder)
    save_checkpoint(tmp_path / "checkpoint.pt", model, **{**without_configs(state), "step": 30, "corpus": "another"})
    assert_one_line_error(command("train.py", "--resume", tmp_path), "not the corpus")


def test_progress_is_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(Progress, "every", 0.0)
    bar = Progress(range(3), desc="train", unit="step")
    for _ in bar:
        bar.set_postfix_str("1:2.10")
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("train: ") for line in lines)
    assert "3/3 steps" in lines[-1] and "1:2.10" in lines[-1] and "to go" in lines[-1]
    monkeypatch.setattr(Progress, "every", 3600.0)                          # and none too often, nor an empty one
    list(Progress(range(3)))
    list(Progress(range(3), show=False))
    assert capsys.readouterr().err == ""
