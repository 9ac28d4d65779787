"""Lesson 3: one loop trains all offsets, and stopping a run does not change its result."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import train
from common import Progress, load_checkpoint, save_checkpoint
from conftest import ROOT, TINY, assert_one_line_error, command, process, tiny_gpt, tiny_model
from data.loader import Corpus
from heads import HeadsConfig, MultiTokenGPT, joint_loss
from model import InputError


def settings(*options):
    """The arguments of a run, as train.py checks them."""
    args = train.parse_args([str(o) for o in ("--device", "cpu", "--offsets", "1,3", *options)])
    train.check_args(args)
    return args


def small_model(*args, **config):
    """A model that fits the corpus, in training mode."""
    return tiny_model(*args, vocab_size=257, block_size=32, **config).train()


def records(folder, key):
    """The lines of metrics.jsonl that have `key`."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if key in r]


# ----------------------------------------------------------------------------------------------
# Learning

def test_training_lowers_the_loss_of_every_offset(run_folder):
    logged = [r["loss"] for r in records(run_folder, "loss")]
    assert set(logged[0]) == {"1", "2", "3", "4", "5", "7"}
    assert all(logged[-1][o] < logged[0][o] - 0.5 for o in logged[0])
    last = records(run_folder, "val_loss")[-1]
    assert last["step"] == 120 and 0.2 < last["val_accuracy"]["1"] <= 1
    assert logged[0].keys() == last["val_loss"].keys() == last["val_accuracy"].keys()


def test_one_training_step_is_the_step_of_a_loop_written_by_hand(corpus):
    # accumulation, clipping, head weight, warm-up: AdamW on the mean of two batches
    args = settings("--lr", 0.01, "--steps", 10, "--warmup", 4, "--accumulate", 2,
                    "--batch-size", 3, "--clip", 0.1, "--head-weight", 0.3)
    ours, by_hand = small_model((1, 3)), small_model((1, 3))
    data = Corpus(corpus)
    optimizers = train.make_optimizers(ours, "adamw", args.lr, 0.1)
    norm = train.compute_gradients(ours, optimizers, data, 1, args, nullcontext)[1]
    optimizers[0].step()

    lr = args.lr * 2 / 4  # the second of four warm-up steps
    optimizer, = train.make_optimizers(by_hand, "adamw", lr, 0.1)
    loss = 0
    for i in (2, 3):
        idx = data.batch("train", 3, 33, step=i)
        for o, weight in ((1, 1.0), (3, 0.3)):
            logits = by_hand(idx[:, :-1])[o][:, :33 - o]
            loss += weight / 2 * F.cross_entropy(logits.flatten(0, 1), idx[:, o:].flatten())
    loss.backward()
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.1))
    optimizer.step()
    for (k, a), b in zip(ours.named_parameters(), by_hand.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5, msg=k)


def test_evaluation_is_the_plain_mean_over_positions():
    model, windows = tiny_model((1, 3)), torch.randint(0, 31, (5, 21))
    loss, accuracy = train.evaluate(model, windows, batch_size=2)
    model.eval()
    logits, targets = model(windows[:, :-1])[3][:, :18], windows[:, 3:]
    p = logits.softmax(-1).gather(-1, targets[..., None])
    assert loss[3] == pytest.approx(-p.log().mean().item(), rel=1e-5)
    assert accuracy[3] == pytest.approx((logits.argmax(-1) == targets).float().mean().item())


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    factors = [train.lr_factor(step, steps=110, warmup=10, final=0.1) for step in range(110)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(factors) == factors[10] == 1.0
    assert factors[60] == pytest.approx(0.55) and factors[-1] == pytest.approx(0.1, abs=1e-3)


def test_bfloat16_gradients_are_those_of_float32_but_for_rounding(corpus):
    model, idx = small_model(), Corpus(corpus).batch("train", 4, 33, step=0)
    flag, found = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(), []
    for precision in (nullcontext(), train.bfloat16(torch.device("cpu"))):
        model.zero_grad()
        with precision:
            losses = {o: l.item() for o, l in joint_loss(model, idx, backward=True).items()}
        found.append((losses, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (losses, exact), (rounded, close) = found
    assert rounded == pytest.approx(losses, rel=0.02) and rounded != losses
    assert F.cosine_similarity(exact, close, dim=0) > 0.98
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == flag


# ----------------------------------------------------------------------------------------------
# Optimizers

@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_belongs_to_exactly_one_optimizer(name):
    model = tiny_model(kind="block", whs=True)
    optimizers = train.make_optimizers(model, name, 1e-3, 0.1)
    groups = [group for o in optimizers for group in o.param_groups]
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.dim() == 2}  # no norms, no biases
    embedding = id(model.gpt.lm_head.weight)  # a lookup table: not for Muon
    assert embedding in {id(p) for g in optimizers[0].param_groups for p in g["params"]}


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 40), (1, 6)])
def test_muon_makes_the_updates_of_pytorchs_in_float32(shape, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch.optim.Muon's dtype
    monkeypatch.setattr(train, "multiplies_in_bfloat16", lambda device: False)
    torch.manual_seed(0)
    ours = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    how = dict(lr=0.02, weight_decay=0.1)
    optimizers = [train.Muon(ours, **how),
                  torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **how)]
    for step in range(20):
        for i, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = q.grad = None if step % 3 == i else torch.randn(shape)  # as while frozen
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_orthogonalized_matrices_keep_their_directions_and_lose_their_lengths():
    torch.manual_seed(0)
    matrices = torch.randn(3, 12, 30)
    for x, m in zip(train.orthogonalize(matrices).float(), matrices):
        u, _, v = torch.linalg.svd(m, full_matrices=False)
        x = u.T @ x @ v.T  # about the identity
        assert ((0.6 < x.diag()) & (x.diag() < 1.25)).all()
        assert (x - x.diag().diag()).abs().max() < 0.1


# ----------------------------------------------------------------------------------------------
# Recipes

def train_steps(model, corpus, args, steps):
    """Train `steps` as train.train does. -> the losses of the last one, {part: what its weights
    have changed by}"""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizers = train.make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    data = Corpus(corpus)
    for step in steps:
        losses, _ = train.compute_gradients(model, optimizers, data, step, args, nullcontext)
        for optimizer in optimizers:
            optimizer.step()
    moved = {k: v - before[k] for k, v in model.state_dict().items()}
    return losses, {k: v for k, v in moved.items() if v.any()}


def parts(moved):
    return {"backbone" if k.startswith("gpt.") else "heads" for k in moved}


@pytest.mark.parametrize("optimizer, kind, own", [
    ("muon", "resblock", False), ("adamw", "resblock", True), ("muon", "block", False),
    ("adamw", "block", False)])
def test_a_frozen_backbone_keeps_every_bit_while_the_heads_learn(optimizer, kind, own, corpus):
    model = small_model((1, 3), kind, own=own)
    args = settings("--backbone-lr", 0, "--optimizer", optimizer, "--batch-size", 2)
    losses, moved = train_steps(model, corpus, args, range(3))
    assert parts(moved) == {"heads"} and losses.keys() == {3}
    assert all(p.grad is None for p in model.gpt.parameters())  # not even computed


def test_head_warm_up_freezes_the_backbone_first_and_then_trains_both(corpus):
    model, args = small_model((1, 3)), settings("--head-warmup", 2, "--batch-size", 2)
    assert parts(train_steps(model, corpus, args, range(2))[1]) == {"heads"}
    assert parts(train_steps(model, corpus, args, range(2, 3))[1]) == {"heads", "backbone"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_differential_learning_rates_scale_the_backbones_updates_only(optimizer, corpus):
    moved = []
    for scale in (1.0, 0.25):
        args = settings("--backbone-lr", scale, "--batch-size", 2, "--optimizer", optimizer)
        moved.append(train_steps(small_model((1, 3)), corpus, args, range(1))[1])
    for k, whole in moved[0].items():
        whole = whole * (0.25 if k.startswith("gpt.") else 1.0)
        torch.testing.assert_close(moved[1][k], whole, rtol=1e-2, atol=1e-6, msg=k)


def weights_at(step, *options):
    args = settings("--steps", 90, "--offsets", "1,3,5", "--head-weight", 0.5, *options)
    return train.recipe(args, (1, 3, 5), step)[0]


@pytest.mark.parametrize("options, step, expected", [
    ("--offset-weights 5:0.1", 0, {1: 1.0, 3: 0.5, 5: 0.05}),
    ("--head-ramp 10", 0, {1: 1.0, 3: 0.05, 5: 0.05}),
    ("--head-ramp 10", 9, {1: 1.0, 3: 0.5, 5: 0.5}),
    ("--head-ramp 10", 50, {1: 1.0, 3: 0.5, 5: 0.5}),
    ("--head-ramp 10 --head-warmup 20", 19, {1: 0.0, 3: 0.5, 5: 0.5}),
    ("--head-ramp 10 --head-warmup 20", 20, {1: 1.0, 3: 0.05, 5: 0.05})])
def test_the_weight_of_the_heads_can_differ_by_offset_and_grow(options, step, expected):
    assert weights_at(step, *options.split()) == pytest.approx(expected)


@pytest.mark.parametrize("curriculum, expected", [
    ("forward", [[1], [1], [1, 3], [1, 3, 5], [1, 3, 5]]),
    ("reverse", [[1, 3, 5], [1, 3, 5], [1, 3], [1], [1]])])
def test_a_curriculum_adds_or_removes_offsets_in_equal_parts_of_the_run(curriculum, expected):
    weights = [weights_at(step, "--curriculum", curriculum) for step in (0, 29, 30, 60, 89)]
    assert [[o for o, w in at.items() if w] for at in weights] == expected


def test_an_offset_of_weight_zero_costs_nothing_and_changes_nothing(corpus):
    model, calls = small_model((1, 3)), []
    model.heads["3"].register_forward_hook(lambda *_: calls.append(1))
    args = settings("--curriculum", "forward", "--batch-size", 2, "--weight-decay", 0.5)
    losses, moved = train_steps(model, corpus, args, range(1))
    assert parts(moved) == {"backbone"} and losses.keys() == {1} and not calls


# ----------------------------------------------------------------------------------------------
# Heads on a model that exists

@pytest.fixture(scope="module")
def frozen(run_folder, corpus, tmp_path_factory):
    """Heads on the frozen backbone of run_folder, and what train.py printed."""
    out = tmp_path_factory.mktemp("runs") / "frozen"
    result = command("train.py", "--data", corpus, "--out", out, "--init", run_folder,
                     "--offsets", "1,2,6", "--backbone-lr", 0, "--steps", 4, *TINY)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_a_run_can_add_heads_to_the_frozen_backbone_of_another(frozen, run_folder):
    was, now = load_checkpoint(run_folder)[0], load_checkpoint(frozen[0])[0]
    assert all(torch.equal(a, b) for a, b in zip(was.gpt.parameters(), now.gpt.parameters()))
    start, end = (r["val_loss"] for r in records(frozen[0], "val_loss"))
    before = records(run_folder, "val_loss")[-1]["val_loss"]
    assert start["2"] == pytest.approx(before["2"])  # the old head is kept
    assert end["6"] < start["6"]  # a new one learns


def test_a_run_says_what_next_token_prediction_lost(frozen, corpus, tmp_path):
    assert "NTP lost +0.0000 nats" in frozen[1]
    result = command("train.py", "--data", corpus, "--out", tmp_path, "--init", frozen[0],
                     "--offsets", "1,2,6", "--lr", 0.1, "--steps", 3, *TINY)
    before, after = (r["val_loss"]["1"] for r in records(tmp_path, "val_loss"))
    assert f"NTP lost {after - before:+.4f} nats" in result.stdout and after != before


@pytest.mark.parametrize("now, kept", [
    (HeadsConfig((1, 2, 6), own_unembedding=True, whs=True), {2}),
    (HeadsConfig((1, 2, 3), "block"), set()), (HeadsConfig((1, 2, 3), whs=True), set()),
    (HeadsConfig((1, 2, 3), own_unembedding=True, whs=True, conditional=True), set()),
    (HeadsConfig((1, 2, 3), n_layer=2, own_unembedding=True), set())])
def test_a_start_keeps_the_backbone_and_the_heads_of_the_same_kind(now, kept, tmp_path):
    was = tiny_model((1, 2, 3), own=True, whs=True)
    save_checkpoint(tmp_path / "checkpoint.pt", was)
    model, _ = train.start_from(tmp_path, now)
    fresh = MultiTokenGPT(was.gpt, now).state_dict()
    for key, value in model.state_dict().items():
        part, offset, *_ = key.split(".")
        old = part == "gpt" or int(offset) in kept
        if old or part not in ("heads", "next_token"):  # new ones may start at random
            assert torch.equal(value, was.state_dict()[key] if old else fresh[key]), key


def test_a_run_can_start_from_gpt2_weights(corpus, tmp_path):
    pytest.importorskip("safetensors")
    gpt = tiny_gpt(vocab_size=257, block_size=16)
    gpt.save_pretrained(tmp_path / "gpt2")
    out = tmp_path / "run"
    result = command("train.py", "--data", corpus, "--out", out, "--init", tmp_path / "gpt2",
                     "--offsets", "1,2", "--backbone-lr", 0, "--steps", 2, *TINY)
    assert result.returncode == 0, result.stderr
    trained = load_checkpoint(out)[0].gpt
    assert all(torch.equal(a, b) for a, b in zip(gpt.parameters(), trained.parameters()))


def test_a_start_has_the_dropout_of_this_run_and_the_tokens_of_the_corpus(corpus, tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", tiny_model(vocab_size=257, dropout=0.5))
    model = train.make_model(settings("--init", tmp_path, "--dropout", 0.25), Corpus(corpus))
    modules = (model.gpt.config, *model.modules())
    assert {m.dropout for m in modules if hasattr(m, "dropout")} == {0.25}
    save_checkpoint(tmp_path / "checkpoint.pt", tiny_model(vocab_size=31))
    with pytest.raises(InputError, match="257 .* 31 "):
        train.make_model(settings("--init", tmp_path), Corpus(corpus))


def test_weighted_hidden_states_log_their_weights_from_the_start_on(corpus, tmp_path):
    result = command("train.py", "--data", corpus, "--out", tmp_path, "--offsets", "1,3", "--whs",
                     "--own-unembedding", "--steps", 2, "--lr", 0.1, *TINY)
    assert result.returncode == 0, result.stderr
    start, end = (r["layer_weights"]["3"] for r in records(tmp_path, "layer_weights"))
    assert start == [0.5, 0.5] and end != start and sum(end) == pytest.approx(1)
    assert " ".join(f"{w:.0%}" for w in end) in result.stdout


# ----------------------------------------------------------------------------------------------
# Stopping and going on

def long_run(corpus, out, steps, *options):
    """The command line of a run with dropout that logs every step and saves every fourth."""
    return ["train.py", "--data", corpus, "--out", out, "--offsets", "1,2,4", "--steps", steps,
            "--eval-every", 4, "--dropout", 0.1, "--log-every", 1, *TINY, *options]


def edit(folder, out, args={}, **changes):
    """Copy a run with other arguments or other state."""
    model, state = load_checkpoint(folder)
    state = {**state, **changes, "args": state["args"] | args}
    out.mkdir(exist_ok=True)
    shutil.copy(folder / "metrics.jsonl", out)
    save_checkpoint(out / "checkpoint.pt", model, **state)


def assert_same_run(a, b):
    models = [load_checkpoint(folder)[0].state_dict() for folder in (a, b)]
    assert all(torch.equal(v, models[1][k]) for k, v in models[0].items())
    a, b = ([{**r, "tokens_per_second": 0} for r in records(folder, "step")] for folder in (a, b))
    assert a == b  # no step is missing, none is there twice


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert command(*long_run(corpus, out, 14)).returncode == 0
    return out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(
        number, corpus, tmp_path, uninterrupted, monkeypatch):
    batch = Corpus.batch

    def batch_and_signal(self, split, size, length, step, *seed):
        if step == 9:
            signal.raise_signal(number)
        return batch(self, split, size, length, step, *seed)
    monkeypatch.setattr(Corpus, "batch", batch_and_signal)
    result = command(*long_run(corpus, tmp_path, 14))
    monkeypatch.undo()
    assert result.returncode == 130
    assert result.stderr == f"stopped; go on with: python train.py --resume {tmp_path}\n"
    assert load_checkpoint(tmp_path)[1]["step"] == 10
    result = command("train.py", "--resume", tmp_path, "--no-progress")
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path, uninterrupted)


def test_a_resumed_run_still_knows_what_next_token_prediction_had_been(frozen, tmp_path):
    edit(frozen[0], tmp_path, args=dict(steps=6))  # as if it had been stopped at step 4
    result = command("train.py", "--resume", tmp_path, "--no-progress")
    assert "NTP lost +0.0000 nats" in result.stdout


def test_resuming_a_finished_run_says_so_and_changes_nothing(uninterrupted):
    before = (uninterrupted / "checkpoint.pt").read_bytes()
    result = command("train.py", "--resume", uninterrupted)
    assert result.returncode == 0 and "finished" in result.stdout
    assert (uninterrupted / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("eval_every", [1, 4])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
        eval_every, uninterrupted, tmp_path):
    edit(uninterrupted, tmp_path, args=dict(steps=400, lr=float("inf"), eval_every=eval_every))
    good = (tmp_path / "checkpoint.pt").read_bytes()
    result = command("train.py", "--resume", tmp_path, "--no-progress")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and "not finite" in result.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


def test_a_line_of_metrics_cut_short_by_a_crash_is_dropped(tmp_path):
    path, first = tmp_path / "metrics.jsonl", '{"step": 4, "loss": {"1": 2.5}}\n'
    path.write_text(first + '{"step": 8, "loss": {"1": 2.0}}\n{"step": 5, "loss": {"1": 1.9}')
    train.trim_metrics(path, 6)
    assert path.read_text() == first


# ----------------------------------------------------------------------------------------------
# Checkpoints

def test_a_checkpoint_brings_back_the_same_model(tmp_path):
    model = tiny_model(kind="block", own=True, n_layer=2)
    save_checkpoint(tmp_path / "checkpoint.pt", model, step=3)
    again, state = load_checkpoint(tmp_path)
    assert state["step"] == 3
    assert again.heads_config == model.heads_config and again.gpt.config == model.gpt.config
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    assert again.gpt.lm_head.weight is again.gpt.transformer.wte.weight  # still tied


def test_a_missing_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(InputError, match="no checkpoint"):
        load_checkpoint(tmp_path)
    save_checkpoint(path, tiny_model((1, 2, 3)), step=1)
    whole, state = path.read_bytes(), torch.load(path, weights_only=True)
    for damaged in (whole[:len(whole) // 2], b"not a checkpoint at all"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is not a checkpoint.* damaged"):
            load_checkpoint(path)
    more_heads = state | dict(heads_config=state["heads_config"] | dict(offsets=(1, 2, 3, 4)))
    other_config = {"gpt_config": {"depth": 3}, "heads_config": {}, "model": {}}
    for foreign in ({"weights": torch.ones(3)}, [1, 2], other_config, more_heads):
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


@pytest.mark.slow
def test_nobody_ever_sees_a_half_written_checkpoint(tmp_path):
    model, path = tiny_model(n_embd=256), tmp_path / "checkpoint.pt"
    save_checkpoint(path, model, step=1)
    whole, child = path.stat().st_size, os.fork()
    if child == 0:
        for _ in range(20):
            save_checkpoint(path, model, step=1)
        os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):  # what a kill at this moment would leave
        assert path.stat().st_size == whole


@pytest.mark.slow
def test_a_disk_that_is_full_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny_model(), step=1)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # of any file
    try:
        with pytest.raises(OSError, match="cannot save a checkpoint.*previous one is kept"):
            save_checkpoint(path, tiny_model(seed=1), step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]


# ----------------------------------------------------------------------------------------------
# Processes: a real one, killed ones, several

def test_train_py_runs_as_a_script(corpus, tmp_path):
    result = process("train.py", "--data", corpus, "--out", tmp_path, "--offsets", 1,
                     "--steps", 2, *TINY)
    assert result.returncode == 0, result.stderr
    assert f"done: python decode.py {tmp_path}" in result.stdout
    assert load_checkpoint(tmp_path)[0].offsets == (1,)  # plain next-token training


def signal_at_step(arguments, out, step, number):
    """Start a run and send it a signal when metrics.jsonl reaches `step`. -> status, stderr"""
    child = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, text=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    while child.poll() is None:
        if (out / "metrics.jsonl").exists() and len(records(out, "loss")) >= step:
            child.send_signal(number)
            break
    return child.wait(120), child.communicate()[1]


@pytest.mark.slow
@pytest.mark.parametrize("number, status, eval_every", [
    (signal.SIGKILL, -9, 4), (signal.SIGINT, 130, 4), (signal.SIGKILL, -9, 1000)])
def test_a_killed_process_that_is_resumed_ends_with_the_same_weights(
        number, status, eval_every, corpus, tmp_path):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    run = long_run(corpus, stopped, 60, "--eval-every", eval_every)
    found, stderr = signal_at_step(run, stopped, 9, number)
    assert found == status
    assert stderr.count("\n") == (number == signal.SIGINT)  # one line, no traceback
    assert load_checkpoint(stopped)[1]["step"] < 60  # 0 if no validation has saved
    assert command("train.py", "--resume", stopped, "--no-progress").returncode == 0
    assert command(*long_run(corpus, whole, 60, "--eval-every", eval_every)).returncode == 0
    assert_same_run(stopped, whole)


def test_each_rank_reads_its_part_and_gradients_travel_in_one_piece(corpus, monkeypatch):
    sent, read = [], []
    monkeypatch.setattr(train, "WORLD_SIZE", 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda t: sent.append(t.numel()))
    model = small_model((1, 2, 3, 4), "block")
    model.gpt.transformer.wte.register_forward_hook(lambda _, args, __: read.append(len(args[0])))
    args = settings("--offsets", "1,2,3,4", "--batch-size", 6, "--accumulate", 2)
    optimizers = train.make_optimizers(model, "adamw", 1e-3, 0.1)
    train.compute_gradients(model, optimizers, Corpus(corpus), 0, args, nullcontext)
    assert read == [3, 3]
    assert sent == [sum(p.numel() for p in model.parameters()) + 4]  # and the four losses


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]


def torchrun(*arguments):
    return process(*TORCHRUN, *arguments)


def assert_same_curve(a, b):
    """The losses of all offsets and the norm of the gradient agree at every step."""
    a, b = ({r["step"]: {**r["loss"], "norm": r["grad_norm"]} for r in records(folder, "loss")}
            for folder in (a, b))
    assert a.keys() == b.keys() and len(a) >= 8
    for step in a:
        assert b[step] == pytest.approx(a[step], rel=1e-3), step


@pytest.mark.slow
def test_two_processes_are_one_run_and_either_can_go_on_where_the_other_stopped(corpus, tmp_path):
    options = ["train.py", "--data", corpus, "--offsets", "1,2,4", "--head-kind", "block",
               "--head-warmup", 2, "--steps", 8, *TINY, "--optimizer", "adamw", "--lr", 1e-3,
               "--accumulate", 2, "--log-every", 1]
    for name, launch, resume in (("one", command, torchrun), ("two", torchrun, command)):
        run, resumed = tmp_path / name, tmp_path / f"{name}_resumed"
        result = launch(*options, "--out", run)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count(f"done: python decode.py {run}") == 1  # rank 0 prints
        edit(run, resumed, args=dict(steps=12))  # as if it had been stopped at step 8
        result = resume("train.py", "--resume", resumed, "--no-progress")
        assert result.returncode == 0, result.stderr
    assert_same_curve(tmp_path / "one", tmp_path / "two")
    assert_same_curve(tmp_path / "one_resumed", tmp_path / "two_resumed")


@pytest.mark.slow
def test_several_processes_stop_together_when_one_is_asked_to(corpus, tmp_path):
    run = [*TORCHRUN, *long_run(corpus, tmp_path, 100_000)]
    status, stderr = signal_at_step(run, tmp_path, 5, signal.SIGTERM)
    assert status != 0 and stderr.count("stopped; go on with") == 1
    assert 5 <= load_checkpoint(tmp_path)[1]["step"] < 100_000


def test_a_batch_that_cannot_be_split_is_refused(corpus, monkeypatch):
    monkeypatch.setattr(train, "WORLD_SIZE", 3)
    with pytest.raises(InputError, match="--batch-size must be a multiple of the 3 processes"):
        train.train(settings("--data", corpus, "--batch-size", 4))


# ----------------------------------------------------------------------------------------------
# Bad input: one line on stderr, status 2, nothing lost

@pytest.mark.parametrize("options, words", [
    ("--data no/such/corpus", ["no/such/corpus", "prepare.py"]),
    ("--offsets 2,3", ["start with 1"]), ("--offsets 1,x", ["numbers"]),
    ("--offsets 1,40", ["beyond the model's context"]),
    ("--n-embd 31", ["multiple of n_head"]), ("--head-layers 0", ["at least one layer"]),
    ("--block-size 90000", ["shorter", "90001"]), ("--device tpu", ["not available"]),
    ("--device meta", ["not available"]), ("--steps 0", ["--steps"]), ("--steps x", ["--steps"]),
    ("--batch-size 0", ["--batch-size"]), ("--lr -1", ["--lr"]), ("--lr inf", ["--lr"]),
    ("--lr nan", ["--lr"]), ("--seed -1", ["--seed"]), ("--weight-decay -1", ["--weight-decay"]),
    ("--warmup -5", ["--warmup"]), ("--nonsense", ["--nonsense"]),
    ("--n-embd 1000000000 --n-head 1", ["memory"]), (f"--eval-windows {10**15}", ["memory"]),
    ("--init no/such", ["no checkpoint"]), ("--init=", ["no checkpoint"]),
    ("--offset-weights 2", ["2:1,3:0.5"]), ("--offset-weights 9:1", ["--offset-weights"]),
    ("--offset-weights 2:-1", ["--offset-weights"]), ("--backbone-lr -1", ["--backbone-lr"]),
    ("--backbone-lr 0", ["untrained"]), ("--head-warmup 999999", ["--head-warmup"]),
    ("--head-ramp 2 --backbone-lr 0", ["--head-ramp", "frozen"]),
    ("--curriculum up", ["--curriculum"]), ("--backbone-lr 0 --offsets 1", ["train nothing"]),
    ("--curriculum forward --head-warmup 5", ["train nothing"]),
    ("--curriculum reverse --backbone-lr 0", ["train nothing"]),
    ("--curriculum reverse --head-warmup 2000", ["step 2000", "train nothing"])])
def test_bad_options_are_one_line(options, words, corpus, tmp_path):
    out = tmp_path / "run"
    result = command("train.py", "--data", corpus, "--out", out, *TINY, *options.split())
    assert_one_line_error(result, *words)
    assert not out.exists()


def test_what_lies_at_the_output_is_never_overwritten_by_accident(run_folder, corpus, tmp_path):
    (tmp_path / "file").write_text("mine")
    before = (run_folder / "checkpoint.pt").read_bytes()
    for out, words in ((tmp_path / "file", ["--out"]), ("", ["--out"]),
                       (run_folder, ["already holds a run", "--resume", "--overwrite"])):
        result = command("train.py", "--data", corpus, "--out", out, *TINY)
        assert_one_line_error(result, *words)
    assert (tmp_path / "file").read_text() == "mine"
    assert (run_folder / "checkpoint.pt").read_bytes() == before


def test_a_run_that_is_older_than_an_option_has_its_default(run_folder, tmp_path):
    model, state = load_checkpoint(run_folder)
    state["args"] |= dict(steps=121, out=str(tmp_path))
    del state["args"]["conditional"], state["args"]["head_ramp"]
    save_checkpoint(tmp_path / "checkpoint.pt", model, **state)
    result = command("train.py", "--resume", tmp_path)
    assert result.returncode == 0 and load_checkpoint(tmp_path)[1]["step"] == 121, result.stderr


def test_conditional_heads_are_trained_by_the_same_loop(corpus, tmp_path):
    result = command("train.py", "--data", corpus, "--out", tmp_path, "--offsets", "1,3",
                     "--conditional", "--steps", 40, *TINY)
    assert result.returncode == 0, result.stderr
    model, _ = load_checkpoint(tmp_path)
    assert model.heads_config == HeadsConfig((1, 3), conditional=True)
    assert model.heads["3"].next_token.proj.weight.abs().max() > 0  # it has learned
    assert records(tmp_path, "loss")[-1]["loss"]["3"] < records(tmp_path, "loss")[0]["loss"]["3"]


def test_a_run_that_is_overwritten_leaves_nothing_behind(corpus, tmp_path):
    for steps in (3, 2):
        result = command(*long_run(corpus, tmp_path, steps, "--overwrite", "--whs"))
        assert result.returncode == 0, result.stderr
    assert [r["step"] for r in records(tmp_path, "step")] == [0, 1, 2, 2]  # 0, 2: validations


def test_what_cannot_be_resumed_is_refused(run_folder, tmp_path):
    def assert_refused(*words):
        assert_one_line_error(command("train.py", "--resume", tmp_path), *words)
    assert_refused("no checkpoint")
    edit(run_folder, tmp_path, step=30, corpus="another")
    assert_refused("not the corpus")
    save_checkpoint(tmp_path / "checkpoint.pt", load_checkpoint(run_folder)[0])
    assert_refused("no run to resume")


def test_progress_is_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(Progress, "every", 0.0)
    bar = Progress(range(3), desc="train", unit="step")
    for _ in bar:
        bar.set_postfix({"1": 2.1})
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(line.startswith("train: ") for line in lines)
    assert "3/3 steps" in lines[-1] and "1=2.1" in lines[-1] and "to go" in lines[-1]
    monkeypatch.setattr(Progress, "every", 3600.0)  # none too often, and no empty one
    list(Progress(range(3)))
    list(Progress(range(3), show=False))
    assert capsys.readouterr().err == ""
