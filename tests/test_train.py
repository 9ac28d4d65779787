"""Lesson 3: one loop trains all offsets, and stopping a run does not change its result."""
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import train
from common import load_checkpoint, save_checkpoint
from conftest import QUICK, ROOT, TINY, command, tiny_gpt, tiny_model
from data.loader import Corpus
from heads import joint_loss
from test_model import save_gpt2


def settings(*options):
    """The arguments of a run, as train.py checks them."""
    options = ("--device", "cpu", "--offsets", "1,3", *options)
    args = train.make_parser().parse_args([str(o) for o in options])
    train.check_args(args)
    return args


def small_model(*args, **config):
    """A model that fits the corpus, in training mode."""
    return tiny_model(*args, vocab_size=257, block_size=32, **config).train()


def run(*options):
    """Run train.py to its end. -> what it printed"""
    result = command("train.py", *options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def records(folder, key):
    """The lines of metrics.jsonl that have `key`."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]


def same_weights(a, b):
    """Whether two modules have the same weights, bit for bit."""
    b = b.state_dict()
    return all(torch.equal(value, b[key]) for key, value in a.state_dict().items())


def test_training_lowers_the_loss_of_every_offset(run_folder):
    logged = [record["loss"] for record in records(run_folder, "loss")]
    assert set(logged[0]) == {"1", "2", "3", "4", "5", "7"}
    assert all(logged[-1][o] < logged[0][o] - 0.5 for o in logged[0])
    assert 0.2 < records(run_folder, "val_accuracy")[-1]["val_accuracy"]["1"] <= 1


def test_training_steps_are_those_of_a_loop_written_by_hand():
    args = settings(*"--lr 0.01 --warmup 4 --head-weight 3".split())
    batches = torch.randint(0, 257, (2, 6, 32))
    ours = small_model((1, 3)).double()
    optimizers = train.make_optimizers(ours, "adamw", args.lr, args.weight_decay)
    norms = [train.train_step(ours, optimizers, batches[t], t, args)[1] for t in (0, 1)]

    model = small_model((1, 3)).double()
    optimizer = torch.optim.AdamW([dict(params=[p], weight_decay=0.1 if p.dim() == 2 else 0.0)
                                   for p in model.parameters()], betas=(0.9, 0.95))
    for step, idx in enumerate(batches):
        loss = 0
        for o, weight in ((1, 1), (3, 3)):
            logits = model(idx)[o][:, :-o]
            loss += weight * F.cross_entropy(logits.flatten(0, 1), idx[:, o:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norms[step].item() == pytest.approx(norm.item())
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1) / 4  # warm-up
        optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), model.parameters()):
        torch.testing.assert_close(a, b, msg=name)


def test_evaluation_is_the_plain_mean_over_positions():
    model = tiny_model((1, 3))
    windows = torch.randint(0, 31, (5, 21))
    loss, accuracy = train.evaluate(model, windows, batch_size=2)
    logits = model.eval()(windows)[3][:, :-3]
    targets = windows[:, 3:]
    p = logits.softmax(-1).gather(-1, targets[..., None])
    assert loss[3] == pytest.approx(-p.log().mean().item(), rel=1e-5)
    assert accuracy[3] == pytest.approx((logits.argmax(-1) == targets).float().mean().item())


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    factors = [train.lr_factor(step, steps=110, warmup=10) for step in range(110)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10::25] == pytest.approx([1, 0.5 + 0.5 ** 1.5, 0.5, 0.5 - 0.5 ** 1.5])


def test_bfloat16_gradients_are_those_of_float32_up_to_rounding():
    model = small_model()
    idx = torch.randint(0, 257, (4, 33))
    losses = []
    gradients = []
    for precision in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        model.zero_grad()
        with precision:
            losses.append(joint_loss(model, idx, backward=True)[3].item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]
    assert F.cosine_similarity(*gradients, dim=0) > 0.98


# ---- Optimizers and recipes ------------------------------------------------------------------

@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_parameter_has_one_optimizer_and_only_matrices_decay(name):
    model = tiny_model(kind="block", whs=True, sequential=True)
    found = [(id(p), type(optimizer), group["weight_decay"])
             for optimizer in train.make_optimizers(model, name, 1e-3, 0.1)
             for group in optimizer.param_groups for p in group["params"]]
    expected = []
    embeddings = (model.gpt.transformer.wte.weight, model.gpt.transformer.wpe.weight)
    for p in model.parameters():
        inner = p.dim() == 2 and not any(p is embedding for embedding in embeddings)
        optimizer = train.Muon if inner and name == "muon" else torch.optim.AdamW
        expected.append((id(p), optimizer, 0.1 if p.dim() == 2 else 0.0))
    assert sorted(found, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 40), (1, 6)])
def test_muon_makes_the_updates_of_pytorchs_in_float32(shape, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch.optim.Muon's dtype
    monkeypatch.setattr(train, "has_native_bfloat16", lambda device: False)
    torch.manual_seed(0)
    ours = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    options = dict(lr=0.02, weight_decay=0.1)
    optimizers = [train.Muon(ours, **options),
                  torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)]
    for step in range(20):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = q.grad = None if step % 3 == i else torch.randn(shape)  # as while frozen
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def moved_by(model, args, steps):
    """Train `steps`. -> {name: what the weights have changed by}, without those that stayed"""
    torch.manual_seed(0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizers = train.make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    for step in steps:
        train.train_step(model, optimizers, torch.randint(0, 257, (2, 33)), step, args)
    moved = {key: value - before[key] for key, value in model.state_dict().items()}
    return {key: change for key, change in moved.items() if change.any()}


def parts(moved):
    return {key.split(".")[0] for key in moved}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("kind, sequential", [("resblock", True), ("block", False)])
def test_a_frozen_backbone_keeps_every_bit_while_the_heads_learn(optimizer, kind, sequential):
    model = small_model((1, 3), kind, sequential=sequential)
    args = settings("--backbone-lr", 0, "--optimizer", optimizer)
    weights_of_heads = {f"heads.{name}" for name, _ in model.heads.named_parameters()}
    assert set(moved_by(model, args, range(3))) == weights_of_heads
    assert all(p.grad is None for p in model.gpt.parameters())  # not even computed


def test_head_warm_up_freezes_the_backbone_first_and_then_trains_both():
    model = small_model((1, 3))
    args = settings("--head-warmup", 2)
    assert train.recipe(args, (1, 3), 1) == ({1: 0.0, 3: 1.0}, 0.0)
    assert parts(moved_by(model, args, [0, 1])) == {"heads"}
    assert parts(moved_by(model, args, [2])) == {"heads", "gpt"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_differential_learning_rates_scale_the_backbones_updates_only(optimizer):
    settings_of = [settings("--optimizer", optimizer, "--backbone-lr", x) for x in (1.0, 0.25)]
    whole, quarter = (moved_by(small_model((1, 3)), args, [0]) for args in settings_of)
    for key, change in whole.items():
        change = change * (0.25 if key.startswith("gpt.") else 1.0)
        torch.testing.assert_close(quarter[key], change, rtol=1e-2, atol=1e-6, msg=key)


def test_a_log_shows_progress_by_the_clock_and_not_at_every_validation(corpus, tmp_path):
    options = ["--data", corpus, "--out", tmp_path, "--steps", 6, "--eval-every", 2, *TINY]
    options.remove("--no-progress")
    result = command("train.py", *options)
    assert result.stdout.count("held-out nats") == 4
    assert result.stderr.count("train:") == 2  # at the beginning and at the end
    assert "train:   0%|0/6 steps, 00:00 gone, ? to go\n" in result.stderr


# ---- Heads on a model that exists ------------------------------------------------------------

@pytest.mark.parametrize("options, kept", [
    ("--whs", {2}), ("", set()), ("--whs --head-kind block", set()),
    ("--whs --sequential", set()), ("--whs --head-layers 2", set())])
def test_a_start_keeps_the_backbone_and_the_heads_of_the_same_kind(
        options, kept, corpus, tmp_path):
    was = small_model((1, 2, 3), whs=True)
    save_checkpoint(tmp_path / "checkpoint.pt", was)
    args = settings("--init", tmp_path, "--offsets", "1,2,6", *options.split())
    for key, value in train.make_model(args, Corpus(corpus)).state_dict().items():
        part, offset = key.split(".")[:2]
        same = key in was.state_dict() and torch.equal(value, was.state_dict()[key])
        assert same == (part == "gpt" or int(offset) in kept), key


def test_a_run_can_start_from_gpt2_weights(corpus, tmp_path):
    gpt = tiny_gpt(vocab_size=257, block_size=16)
    out = tmp_path / "run"
    run("--data", corpus, "--out", out, "--init", save_gpt2(gpt, tmp_path), "--offsets", "1,2",
        "--backbone-lr", 0, "--steps", 2, *QUICK)
    assert same_weights(gpt, load_checkpoint(out)[0].gpt)


# ---- Stopping and going on -------------------------------------------------------------------

def long_run(corpus, out, steps, *options):
    """The options of a run with dropout that logs every step and saves every fourth."""
    return ["--data", corpus, "--out", out, "--offsets", "1,2,4", "--steps", steps,
            "--eval-every", 4, "--dropout", 0.1, "--log-every", 1, *TINY, *options]


def assert_same_run(a, b):
    assert same_weights(load_checkpoint(a)[0], load_checkpoint(b)[0])
    a, b = ({(record["step"], "loss" in record): record for record in records(folder, "step")}
            for folder in (a, b))
    assert a == b  # no step is missing; the last line counts if a step was done twice


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(*long_run(corpus, out, 14))
    return out


@pytest.fixture
def copied(uninterrupted, tmp_path):
    """A copy of the uninterrupted run, to be changed."""
    return shutil.copytree(uninterrupted, tmp_path / "copy")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(
        number, corpus, tmp_path, uninterrupted, monkeypatch):
    batch = Corpus.batch

    def batch_and_signal(self, split, size, length, step, *seed):
        if step == 9:
            signal.raise_signal(number)
        return batch(self, split, size, length, step, *seed)
    monkeypatch.setattr(Corpus, "batch", batch_and_signal)
    result = command("train.py", *long_run(corpus, tmp_path, 14))
    monkeypatch.undo()
    advice = f"train.py: stopped; go on with: python train.py --resume {tmp_path}\n"
    assert (result.returncode, result.stderr) == (130, advice)
    assert load_checkpoint(tmp_path)[1]["step"] == 10
    run("--resume", tmp_path)
    assert_same_run(tmp_path, uninterrupted)


def test_a_resumed_run_may_be_longer_and_have_another_rate_and_says_so(copied):
    printed = run("--resume", copied, "--steps", 16, "--lr", 0.001)
    assert printed.startswith("resumed at step 14 with {")
    assert records(copied, "changed") == [dict(step=14, changed=dict(steps=16, lr=0.001))]
    last = records(copied, "lr")[-1]
    assert (last["step"], last["lr"]) == (16, 0.001 * train.lr_factor(15, 16, 2))
    assert run("--resume", copied).endswith("finished: 16 steps; --steps N goes on\n")
    assert "train:" in command("train.py", "--resume", copied, "--steps", 17).stderr


def test_a_run_goes_on_where_its_corpus_has_moved(copied, corpus, tmp_path):
    model, state = load_checkpoint(copied)
    state["args"]["data"] = "gone"
    save_checkpoint(copied / "checkpoint.pt", model, **state)
    shutil.copytree(corpus, tmp_path / "new")
    run("--resume", copied, "--data", tmp_path / "new", "--steps", 16)
    assert load_checkpoint(copied)[1]["args"]["data"] == str(tmp_path / "new")


def test_numbers_that_are_not_finite_stop_a_run_and_the_advice_helps(copied):
    good = (copied / "checkpoint.pt").read_bytes()
    options = "--steps 30 --log-every 20 --eval-every 20 --lr 1e18 --no-progress".split()
    result = command("train.py", "--resume", copied, *options)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "not finite at step 20" in result.stderr
    assert (copied / "checkpoint.pt").read_bytes() == good
    advice = result.stderr.split("python train.py ")[1].split()
    run(*advice, "--lr", 0.001)  # a quarter of 1e18 is too much still


# ---- Checkpoints, processes, progress --------------------------------------------------------

def test_a_checkpoint_brings_back_the_same_model(tmp_path):
    model = tiny_model(kind="block", n_layer=2, whs=True, sequential=True)
    save_checkpoint(tmp_path / "checkpoint.pt", model)
    again, _ = load_checkpoint(tmp_path)
    assert again.heads_config == model.heads_config and again.gpt.config == model.gpt.config
    assert same_weights(again, model) and not again.training
    assert again.gpt.lm_head.weight is again.gpt.transformer.wte.weight  # still tied


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_killed_process_that_is_resumed_ends_with_the_same_weights(
        number, status, corpus, tmp_path):
    stopped = tmp_path / "stopped"
    child = subprocess.Popen(
        [sys.executable, "train.py", *map(str, long_run(corpus, stopped, 60))], cwd=ROOT,
        text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    log = stopped / "metrics.jsonl"
    while child.poll() is None and not (log.exists() and log.read_text().count("\n") >= 12):
        pass
    child.send_signal(number)
    stderr = child.communicate()[1]
    assert child.returncode == status
    assert stderr.count("\n") == (number == signal.SIGINT)  # one line, no traceback
    assert load_checkpoint(stopped)[1]["step"] < 60
    run("--resume", stopped)
    run(*long_run(corpus, tmp_path / "whole", 60))
    assert_same_run(stopped, tmp_path / "whole")
