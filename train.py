"""One training loop for every recipe: a GPT from scratch, with multi-token heads or without, or heads on a GPT.

    python data/prepare.py python
    python train.py --data data/python --offsets 1,2,3,4 --out runs/mtp
    python train.py --resume runs/mtp          # after Ctrl-C, a crash or a power cut
    python train.py --init runs/ntp --offsets 1,2,3,4 --backbone-lr 0 --out runs/heads     # a frozen backbone

The loop is the usual one (batch, loss, clip, step) around heads.joint_loss. How the papers' recipes differ, in what
counts how much at which step, is one function, `recipe`. And a run can be stopped anywhere: batches are a function of
(seed, step), checkpoints hold all other state and are written atomically, so a run that was killed and resumed ends
with the same weights, bit for bit on a CPU, as one that was not.

A run folder holds checkpoint.pt and metrics.jsonl (one JSON object per line: training losses and validation results).
torchrun --nproc_per_node N train.py ... shares every batch among N processes, one for each GPU; it is the same run.

Read: the recipe, optimizers and schedule, where a run starts, evaluation, several processes, the loop, the command line.
"""
import argparse
import json
import math
import os
import re
import signal
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from common import (Diverged, Progress, load_checkpoint, load_model, one_line_errors, pick_device, save_checkpoint,
                    say_once)
from data.loader import Corpus
from data.prepare import OWN_TEXT
from heads import HeadsConfig, MultiTokenGPT, joint_loss, parse_offsets, predictions_and_targets
from model import GPT, GPTConfig, InputError

# ---------------------------------------------------------------------------------------------------------------------
# The recipe

CURRICULA = ("none", "forward", "reverse")


def recipe(args, offsets, step):
    """What a step trains: the weight of each offset's loss (0: left out), and the backbone's share of the learning rate
    (0: frozen). All recipes of both papers are settings of this one function of the step:

    backbone_lr       1: heads and backbone alike; between: differential learning rates; 0: heads on a frozen backbone
    head_warmup       for so many steps the backbone is frozen, then both train (Mehra et al.; L-MTP, stage 1 and 2)
    head_weight       of every head's loss against offset 1's (L-MTP's beta)
    head_ramp         steps in which that weight grows from 0, once both train
    offset_weights    {offset: a further factor}
    curriculum        forward: offset 1 alone first, then one more in each equal part of the run; reverse: all first,
                      then one less (arXiv 2505.22757)
    """
    share = 0.0 if step < args.head_warmup else args.backbone_lr
    ramp = min(1.0, (step + 1 - args.head_warmup) / args.head_ramp) if args.head_ramp and share else 1.0
    weights = {o: args.head_weight * ramp * args.offset_weights.get(o, 1.0) for o in offsets[1:]}
    weights[1] = 1.0 if share else 0.0                                      # the backbone's own, tied unembedding
    stage = 1 + step * len(offsets) // args.steps                           # 1 .. len(offsets)
    active = {"none": offsets, "forward": offsets[:stage], "reverse": offsets[:len(offsets) + 1 - stage]}
    return {o: weights[o] if o in active[args.curriculum] else 0.0 for o in offsets}, share


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers and schedule

class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024), for matrices: every step moves a matrix equally far in all its
    directions, not mostly along the few that dominate the gradient.

    The same update as torch.optim.Muon with adjust_lr_fn="match_rms_adamw", which makes one matrix after the other
    orthogonal, and always in bfloat16. That is hundreds of small launches on a GPU, and slow on CPUs that only emulate
    bfloat16. Here all matrices of one shape are one stack, in a dtype that the device multiplies in.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, columns), params in by_shape.items():
                for p in params:
                    if p not in self.state:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads, buffers = [p.grad for p in params], [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                updates = torch._foreach_lerp(grads, buffers, group["momentum"])    # Nesterov: one step ahead
                updates = orthogonalize(torch.stack(updates)).to(params[0].dtype)   # (n, rows, columns)
                # Their root mean square is about that of AdamW's updates, so that the same learning rate suits both.
                size = group["lr"] * 0.2 * math.sqrt(max(rows, columns))
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.unbind()), alpha=-size)


def orthogonalize(matrices):
    """(n, rows, columns) -> the same directions with all singular values near 1: about U V^T of each U S V^T.

    Five Newton-Schulz iterations x <- a x + b (x x^T) x + c (x x^T)^2 x, which map every singular value s to
    a s + b s^3 + c s^5. These coefficients lift small ones fast and leave all of them in about 0.7..1.2.
    """
    x = matrices.to(torch.bfloat16 if multiplies_in_bfloat16(matrices.device) else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x                                                 # x x^T is then the smaller square
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)                # no singular value above 1
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


def multiplies_in_bfloat16(device):
    """Whether the hardware does (GPUs since Ampere, CPUs with AVX512-BF16), and not merely emulates it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()     # a private function


def make_optimizers(model, name, lr, weight_decay):
    """The list of optimizers for `name`. Each of their parameter groups says whether it is of the "backbone" or of the
    heads, in group["part"].

    "adamw": AdamW for everything, weight decay on matrices only. "muon": Muon for the matrices inside layers and heads,
    AdamW for the rest (embeddings, norms, biases); on small models it needs far fewer steps.
    """
    groups = {}                                                             # {(kind, part): parameters}
    for key, p in model.named_parameters():
        in_layer = ".h." in key or key.startswith("heads.")
        kind = "vectors" if p.dim() < 2 else "hidden" if in_layer and name == "muon" else "matrices"
        groups.setdefault((kind, "backbone" if key.startswith("gpt.") else "heads"), []).append(p)
    adamw, muon = [], []
    for (kind, part), params in groups.items():
        (muon if kind == "hidden" else adamw).append(
            dict(params=params, part=part, weight_decay=0.0 if kind == "vectors" else weight_decay))
    return [torch.optim.AdamW(adamw, lr=lr, betas=(0.9, 0.95))] + (
        [Muon(muon, lr=lr)] if muon else [])


def lr_factor(step, steps, warmup, final):
    """Learning rate of a step as a share of the highest: linear warm-up from 0, then a cosine down to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


# ---------------------------------------------------------------------------------------------------------------------
# Where a run starts

def start_from(path, heads_config):
    """A model with the backbone of `path` (see load_model), and its heads where it has the same kind for an offset; the
    others start as they always do. -> (MultiTokenGPT, the rest of the checkpoint's state)"""
    found, state = load_model(path)
    model = MultiTokenGPT(found.gpt, heads_config)
    old, new = found.heads_config, heads_config
    if (old.kind, old.n_layer, old.own_unembedding) == (new.kind, new.n_layer, new.own_unembedding):
        for o in set(found.offsets[1:]) & set(model.offsets[1:]):
            model.heads[str(o)] = found.heads[str(o)]
            if new.own_unembedding:
                model.unembeddings[str(o)] = found.unembeddings[str(o)]
            if old.whs and new.whs:
                model.mixes[str(o)] = found.mixes[str(o)]
    return model, state


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and speed

@torch.no_grad()
def evaluate(model, windows, batch_size, autocast=nullcontext):
    """windows (n, T + 1) of held-out tokens -> {offset: mean nats}, {offset: top-1 accuracy}."""
    model.eval()
    batches = windows.split(batch_size)
    loss, accuracy = ({o: 0.0 for o in model.offsets} for _ in range(2))
    for idx in batches:
        idx = idx.to(model.gpt.lm_head.weight.device)
        with autocast():
            h = model.hidden_states(idx[:, :-1])
            for o in model.offsets:
                logits, targets = predictions_and_targets(model, h, idx, o)
                share = len(idx) / len(windows)
                loss[o] += F.cross_entropy(logits, targets).item() * share
                accuracy[o] += (logits.argmax(-1) == targets).float().mean().item() * share
    model.train()
    return loss, accuracy


def bars(shares):
    """Shares of one as little bars: [0, 0.5, 1] -> " ▄█"."""
    return "".join(" ▁▂▃▄▅▆▇█"[round(8 * share)] for share in shares)


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "L4": 121e12, "T4": 65e12}  # dense bf16


def mfu(model, tokens_per_second, device):
    """Model FLOPs utilisation: the 6N + 12LCT FLOPs per token that training needs (PaLM, appendix B) over what the
    GPU's data sheet promises. None on a CPU or an unknown GPU, and with a frozen backbone, which needs less."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((p for key, p in PEAK_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)
    if peak is None or not model.gpt.lm_head.weight.requires_grad:
        return None
    c = model.gpt.config
    n = sum(p.numel() for p in model.parameters())
    if not model.unembeddings:                                              # the shared one works for each head
        n += len(model.heads) * model.gpt.lm_head.weight.numel()
    return tokens_per_second * (6 * n + 12 * c.n_layer * c.n_embd * c.block_size) / peak


@contextmanager
def bfloat16(device):
    """Autocast to bfloat16. On a CPU attention is then made of plain products, in bfloat16 all the way: PyTorch's fused
    kernel takes two to three times as long there."""
    with torch.autocast(device.type, torch.bfloat16):
        if device.type != "cpu":
            yield
            return
        allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()    # of all devices, in spite of its name
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes: each takes its share of every batch, and gradients are averaged before the update. PyTorch's
# DistributedDataParallel would do that during *the* backward pass; joint_loss makes one for every head, so there is one
# all-reduce at the end of them instead, of everything at once.

def process():
    """This process's rank and how many there are: (0, 1) unless torchrun has started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average(tensors):
    """Replace tensors (of one dtype and device) by their means over all processes, with one all-reduce."""
    if process()[1] > 1:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= process()[1]
        for t, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(mean.view_as(t))


def asked_to_stop(stop, device):
    """Whether any process has been sent a signal."""
    asked = torch.tensor(float(bool(stop)), device=device)
    average([asked])
    return asked.item() > 0


@contextmanager
def processes(device):
    """Join the processes that torchrun has started, if it has, for the time of the body."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield
    if several:
        dist.barrier()                                                      # none leaves while another still saves
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# The loop

def make_model(args, corpus):
    """The model that a run starts with: from args.init, with the dropout of this run, or from scratch. Raises
    InputError."""
    heads_config = HeadsConfig(args.offsets, args.head_kind, args.head_layers, args.own_unembedding, args.whs)
    if not args.init:
        if not args.backbone_lr:
            raise InputError("--backbone-lr 0 freezes a backbone that has learnt nothing: give one with --init")
        return MultiTokenGPT(GPT(GPTConfig(args.block_size, corpus.vocab_size, args.n_layer, args.n_head, args.n_embd,
                                           args.dropout)), heads_config)
    model, state = start_from(args.init, heads_config)
    name = corpus.meta["tokenizer"]
    if state.get("tokenizer", name) != name or model.gpt.config.vocab_size != corpus.vocab_size:
        raise InputError(f"{args.init} does not know {corpus.folder}'s {corpus.vocab_size} tokens ({name})")
    for module in (model.gpt.config, *model.modules()):
        if hasattr(module, "dropout"):
            module.dropout = args.dropout
    return model


def compute_gradients(model, optimizers, corpus, step, args, autocast):
    """Set the step's learning rate and compute its clipped gradients over `accumulate` batches. The update itself is
    left to the caller, who may want to look first. -> {offset: mean loss} and the gradient norm, on the device."""
    weights, share = recipe(args, model.offsets, step)
    model.gpt.requires_grad_(share > 0)                                     # frozen: no gradient, no update, no decay
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = args.lr * lr_factor(step, args.steps, args.warmup, args.final_lr)
            group["lr"] *= share if group["part"] == "backbone" else 1.0
        optimizer.zero_grad()
    losses, (rank, world) = {o: 0.0 for o in model.offsets if weights[o]}, process()
    for micro in range(args.accumulate):
        idx = corpus.batch("train", args.batch_size, model.gpt.config.block_size + 1, step * args.accumulate + micro,
                           args.seed)[rank::world].to(args.device, non_blocking=True)
        with autocast():
            part = joint_loss(model, idx, weights, backward=True, scale=1 / args.accumulate)
        losses = {o: losses[o] + part[o] / args.accumulate for o in part}
    average([p.grad for p in model.parameters() if p.grad is not None] + list(losses.values()))
    return losses, torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)


def restore(state, optimizers, corpus):
    """Put a checkpoint's state back into optimizers and random number generators. -> the steps it has done."""
    if state["corpus"] != corpus.meta["train_sha256"]:
        raise InputError(f"{corpus.folder} is not the corpus that this run was started on; prepare that one again")
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"])
    return state["step"]


def trim_metrics(path, step):
    """Drop from metrics.jsonl what comes after `step`, which is about to be done again, and a line cut short."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except ValueError:
            pass
    part = path.with_name(path.name + ".part")
    part.write_text("".join(line + "\n" for line in kept))
    os.replace(part, path)


def train(args, model=None, state=None):
    """Run `args` (see parse_args and check_args) to the last step, from a checkpoint's (model, state) or from scratch.

    Returns the model. Raises InputError and CorpusError for bad input, Diverged when the loss is not finite, OSError
    when saving fails, KeyboardInterrupt after Ctrl-C (once a checkpoint is saved).
    """
    device, out, metrics = torch.device(args.device), Path(args.out), Path(args.out) / "metrics.jsonl"
    corpus, (rank, world) = Corpus(args.data), process()
    if args.batch_size % world:
        raise InputError(f"--batch-size {args.batch_size} cannot be shared by {world} processes")
    torch.manual_seed(args.seed)
    model = (model or make_model(args, corpus)).to(device).train()
    windows = corpus.windows("val", args.eval_windows, model.gpt.config.block_size + 1)
    corpus.batch("train", 1, model.gpt.config.block_size + 1, step=0)       # too small a corpus fails now, not later
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    first = restore(state, optimizers, corpus) if state else 0
    if rank:                                                                # every process drops out other units
        torch.manual_seed(args.seed + 1_000_003 * (first * world + rank))
    ntp_before = state["ntp_before"] if state else None                     # what the backbone lost until then
    autocast = (lambda: bfloat16(device)) if args.dtype == "bfloat16" else nullcontext
    if args.compile:                                                        # one program, used by every layer
        for block in model.gpt.transformer.h:
            block.compile()

    def save(step):                                                         # the first process speaks for all
        if rank == 0:
            save_checkpoint(
                out / "checkpoint.pt", model, step=step, args=vars(args), corpus=corpus.meta["train_sha256"],
                tokenizer=corpus.meta["tokenizer"], optimizers=[o.state_dict() for o in optimizers],
                rng=torch.get_rng_state(), ntp_before=ntp_before,
                cuda_rng=torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def log(**record):
        if rank == 0:
            with open(metrics, "a") as f:
                f.write(json.dumps(record) + "\n")

    def say(text):
        if rank == 0:
            tqdm.write(text)

    def say_layer_weights():
        for o, shares in model.layer_weights().items():
            say(f"  the head of offset {o} reads layers 1 to {len(shares)}: {bars(shares)}  "
                + " ".join(f"{share:.0%}" for share in shares))

    out.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        trim_metrics(metrics, first if state else -1)
    if not state:
        if args.init:                                                       # what it costs is always measured
            loss, accuracy = evaluate(model, windows, args.batch_size, autocast)
            log(step=0, val_loss=loss, val_accuracy=accuracy)
            ntp_before = loss[1]
        if args.whs:
            log(step=0, layer_weights=model.layer_weights())
            say_layer_weights()
        save(0)                                                             # from here on the run can be resumed
    stop = []                                                               # a signal is obeyed between two steps
    handlers = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    say(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, offsets {model.offsets}, on {device}, "
        f"{args.dtype}{f', {world} processes' * (world > 1)}; run folder {out}")
    if corpus.meta.get("source", "").startswith(OWN_TEXT):
        say(f"held-out text is {corpus.meta['source']} here, and so is what next-token prediction loses measured on")
    bar = Progress(range(first, args.steps), args.progress and rank == 0, initial=first, total=args.steps, desc="train",
                   unit="step", leave=True)
    tokens_per_step = args.batch_size * args.accumulate * model.gpt.config.block_size
    since, seen = time.perf_counter(), first
    advice = f": lower --lr or raise --warmup. {out / 'checkpoint.pt'} of an earlier step stands"
    try:
        for step in bar:
            losses, norm = compute_gradients(model, optimizers, corpus, step, args, autocast)
            done, stopping = step + 1, bool(stop)
            validate = done == args.steps or done % args.eval_every == 0
            look = validate or done % args.log_every == 0
            if world > 1:                                                   # stop together, at a step where all look
                stopping = look and asked_to_stop(stop, device)
            if look or stopping:                                            # the only wait for the device
                losses = {o: float(l) for o, l in losses.items()}
                if not math.isfinite(norm + sum(losses.values())):
                    raise Diverged(f"the loss is not finite at step {done}" + advice)
                now = time.perf_counter()
                speed, since, seen = tokens_per_step * (done - seen) / (now - since), now, done
                utilisation = mfu(model, speed / world, device)
                log(step=done, loss={o: round(l, 4) for o, l in losses.items()}, grad_norm=round(float(norm), 4),
                    lr=args.lr * lr_factor(step, args.steps, args.warmup, args.final_lr),
                    tokens_per_second=round(speed), mfu=utilisation)
                bar.set_postfix_str(" ".join(f"{o}:{l:.2f}" for o, l in losses.items()) + f", {speed / 1e3:.1f}k tok/s"
                                    + (f", MFU {utilisation:.0%}" if utilisation else ""))
            for optimizer in optimizers:
                optimizer.step()
            if (validate or stopping) and not all(p.isfinite().all() for p in model.parameters()):
                raise Diverged(f"the weights are not finite after step {done}" + advice)
            if validate:
                loss, accuracy = evaluate(model, windows, args.batch_size, autocast)
                log(step=done, val_loss=loss, val_accuracy=accuracy, layer_weights=model.layer_weights())
                say(f"step {done}, held-out nats and accuracy by offset: "
                    + "  ".join(f"{o}: {loss[o]:.3f} {accuracy[o]:.0%}" for o in model.offsets)
                    + (f"; NTP lost {loss[1] - ntp_before:+.4f} nats against {args.init}" if args.init else ""))
                say_layer_weights()
                since = time.perf_counter()
            if validate or stopping:
                save(done)
            if stopping:
                raise KeyboardInterrupt(f"stopped; go on with: python train.py --resume {args.out}")
    finally:
        bar.close()
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def parse_args(argv=None):
    """The command line as a namespace."""
    p = argparse.ArgumentParser(
        prog="train.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Train a GPT from scratch, or heads on one that exists (--init): next-token only (--offsets 1), "
                    "MTP heads (1,2,3,4), leap heads (1,3,5,7) or any other offsets. Ctrl-C saves and stops; --resume "
                    "RUN goes on.")
    p.add_argument("--data", default="data/python", help="corpus folder made by data/prepare.py")
    p.add_argument("--out", default="runs/new", help="run folder: checkpoint.pt and metrics.jsonl")
    p.add_argument("--resume", metavar="RUN", help="go on with this run and its settings; of the other options only "
                   "--device, --compile and --no-progress count")
    p.add_argument("--overwrite", action="store_true", help="start anew where --out already holds a checkpoint")
    p.add_argument("--init", metavar="MODEL", help="start from a run of ours or from GPT-2's weights (gpt2, a folder, "
                   "a file): its backbone with its shape, and its heads where they fit")
    g = p.add_argument_group("heads")
    g.add_argument("--offsets", default="1,2,3,4", help="what each position predicts: 1 is the next token")
    g.add_argument("--head-kind", default="resblock", choices=["resblock", "block"],
                   help="residual blocks, or transformer layers")
    g.add_argument("--head-layers", type=int, default=1, help="layers per head")
    g.add_argument("--own-unembedding", action="store_true", help="each head trains its own copy of the unembedding")
    g.add_argument("--whs", action="store_true", help="weighted hidden states: each head reads a learned weighted sum "
                   "of all layers instead of the last one")
    g = p.add_argument_group("recipe")
    g.add_argument("--backbone-lr", type=float, default=1.0, metavar="SHARE", help="the backbone's learning rate as a "
                   "share of --lr: 0 freezes it, 0.1 lets it follow the heads slowly")
    g.add_argument("--head-warmup", type=int, default=0, metavar="STEPS", help="first train the heads alone")
    g.add_argument("--head-weight", type=float, default=1.0, help="weight of each head's loss against offset 1's")
    g.add_argument("--head-ramp", type=int, default=0, metavar="STEPS", help="let that weight grow from 0, after the "
                   "warm-up if there is one")
    g.add_argument("--offset-weights", default="", metavar="O:W,...", help="further factors, as in 2:1,3:0.5")
    g.add_argument("--curriculum", default="none", choices=CURRICULA, help="forward: add offsets one by one during the "
                   "run; reverse: remove them")
    g = p.add_argument_group("model", "of a GPT from scratch; --init brings its own, except for the dropout")
    g.add_argument("--n-layer", type=int, default=4, help="transformer layers")
    g.add_argument("--n-head", type=int, default=4, help="attention heads per layer")
    g.add_argument("--n-embd", type=int, default=128, help="width")
    g.add_argument("--block-size", type=int, default=256, help="context in tokens")
    g.add_argument("--dropout", type=float, default=0.0, help="dropout rate")
    g = p.add_argument_group("optimization")
    g.add_argument("--steps", type=int, default=2000, help="optimizer steps")
    g.add_argument("--batch-size", type=int, default=8, help="sequences per forward pass, of all processes together")
    g.add_argument("--accumulate", type=int, default=1, help="forward passes per optimizer step")
    g.add_argument("--optimizer", default="muon", choices=["muon", "adamw"],
                   help="muon: Muon for hidden matrices, AdamW for the rest")
    g.add_argument("--lr", type=float, default=5e-3, help="highest learning rate; about 1e-3 for adamw")
    g.add_argument("--final-lr", type=float, default=0.0, help="last learning rate as a share of the highest")
    g.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    g.add_argument("--weight-decay", type=float, default=0.1, help="on matrices")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    g.add_argument("--seed", type=int, default=0, help="initial weights, batches and dropout")
    g = p.add_argument_group("machine")
    g.add_argument("--device", default=argparse.SUPPRESS, help="auto (the default), cpu, cuda, cuda:1, mps")
    g.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                   help="bfloat16 runs under autocast; auto: bfloat16 where the hardware has it")
    g.add_argument("--compile", action="store_true", default=argparse.SUPPRESS,
                   help="torch.compile the layers (needs a C++ compiler)")
    g.add_argument("--eval-every", type=int, default=500, help="steps between validations, which also save")
    g.add_argument("--eval-windows", type=int, default=64, help="held-out windows per validation")
    g.add_argument("--log-every", type=int, default=10, help="steps between lines in metrics.jsonl")
    g.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")
    p.error = lambda message: p.exit(2, f"train.py: error: {message}\n")    # one line, without the usage
    return p.parse_args(argv)


def check_args(args):
    """Fill in what "auto" means here. Raises InputError for values that cannot be meant."""
    args.offsets = parse_offsets(args.offsets)
    try:
        args.offset_weights = {int(o): float(w) for o, w in (
            pair.split(":") for pair in args.offset_weights.split(",") if pair)}
    except ValueError:
        raise InputError(f"--offset-weights is a list as in 2:1,3:0.5, not {args.offset_weights!r}") from None
    if not set(args.offset_weights) <= set(args.offsets[1:]) or not all(
            0 <= w < math.inf for w in args.offset_weights.values()):
        raise InputError("--offset-weights are weights from 0 on, of offsets after 1 that the model has")
    args.compile = getattr(args, "compile", False)
    args.device = str(pick_device(getattr(args, "device", "auto")))
    if args.dtype == "auto":
        args.dtype = "bfloat16" if multiplies_in_bfloat16(torch.device(args.device)) else "float32"
    for name in ("steps", "batch_size", "accumulate", "eval_every", "eval_windows", "log_every"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("lr", "clip"):
        if not 0 < getattr(args, name) < math.inf:
            raise InputError(f"--{name} must be positive and finite")
    for name, most in dict(warmup=2**63, weight_decay=1, head_weight=1e9, final_lr=1, backbone_lr=1e3,
                           head_warmup=args.steps, head_ramp=2**63, seed=2**63 - 1).items():
        if not 0 <= getattr(args, name) <= most:
            raise InputError(f"--{name.replace('_', '-')} must be in 0..{most:g}, not {getattr(args, name)}")
    for step in (0, max(0, args.head_warmup - 1), args.steps - 1):          # where fewest heads train without it
        if not any(recipe(args, args.offsets, step)[0].values()):
            raise InputError(f"step {step + 1} would train nothing: while the backbone is frozen there must be heads "
                             "that train, with --curriculum and --offset-weights as well")
    if args.init == "":
        raise InputError("--init needs a run, or GPT-2's weights")
    if not args.out or Path(args.out).exists() and not Path(args.out).is_dir():
        raise InputError(f"--out must be a folder, not {args.out!r}")


def main():
    """Train or resume; bad input is one line and status 2, a diverged run status 1, a stopped one 130."""
    args = parse_args()
    with one_line_errors("train.py", memory="--batch-size, --block-size or the model"):
        model = state = None
        if args.resume is not None:
            model, state = load_checkpoint(args.resume)
            if "args" not in state:
                raise InputError(f"{args.resume} holds a model but not the state of a run; it cannot be resumed")
            unknown = vars(parse_args([])).keys() - state["args"].keys()
            now = {k: v for k, v in vars(args).items() if k in ("device", "compile", "progress")}
            out = Path(args.resume)
            args = argparse.Namespace(**{**state["args"], **now, "out": str(out if out.is_dir() else out.parent)})
            args.device = str(pick_device(args.device))
            if state["step"] >= args.steps:
                return say_once(f"{args.out} is finished: {state['step']} of {args.steps} steps")
            if unknown:
                raise InputError(f"{args.out} was started by a train.py that did not know {', '.join(sorted(unknown))}")
        else:
            check_args(args)
            if (Path(args.out) / "checkpoint.pt").exists() and not args.overwrite:
                raise InputError(f"{args.out} already holds a run: --resume {args.out}, --overwrite, or another --out")
        with processes(torch.device(args.device)):
            train(args, model, state)
        say_once(f"done: python decode.py {args.out}")


if __name__ == "__main__":
    main()
