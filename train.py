"""One training loop for every recipe: a GPT from scratch, with or without heads, or heads alone.

    python train.py --data data/python --offsets 1,2,3,4 --out runs/mtp
    python train.py --resume runs/mtp           # after Ctrl-C, a crash or a power cut
    python train.py --init runs/ntp --backbone-lr 0 --out runs/heads    # a frozen backbone
    torchrun --nproc_per_node N train.py ...    # splits every batch among N GPUs

The papers' recipes differ in which losses count how much at which step: that is one function,
`recipe`. A run can be stopped anywhere: batches are a function of (seed, step), checkpoint.pt
holds all other state, and a resumed run ends with the same weights, bit for bit on a CPU.
"""
import argparse
import json
import math
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

from common import (RANK, WORLD_SIZE, Parser, Progress, corpus_of, load_checkpoint, load_model,
                    one_line_errors, pick_device, print_rank_0, save_checkpoint, write_whole)
from data.loader import Corpus
from data.prepare import OWN_TEXT
from heads import HeadsConfig, MultiTokenGPT, joint_loss, parse_offsets, predictions_and_targets
from model import GPT, GPTConfig, require


def recipe(args, offsets, step):
    """What a step trains -> ({offset: weight of its loss}, lr scale of the backbone).

    The papers' recipes are settings of this function:

    backbone_lr     lr scale of the backbone: 1 (joint), less (differential rates), 0 (frozen)
    head_warmup     first steps, which train the heads alone (Mehra et al.; L-MTP, stage 1)
    head_weight     weight of each head's loss relative to offset 1's (beta in L-MTP)
    head_ramp       steps in which that weight grows from 0, once both train
    offset_weights  {offset: a further factor}
    curriculum      forward: offset 1 first, then one more in each equal part of the run;
                    reverse: all offsets first, then one less (arXiv 2505.22757)
    """
    lr_scale = 0.0 if step < args.head_warmup else args.backbone_lr
    ramp = 1.0
    if args.head_ramp and lr_scale:
        ramp = min(1.0, (step + 1 - args.head_warmup) / args.head_ramp)
    stage = 1 + step * len(offsets) // args.steps  # 1 .. len(offsets)
    active = dict(none=len(offsets), forward=stage, reverse=len(offsets) + 1 - stage)
    weights = dict.fromkeys(offsets, 0.0)  # 0: the offset is left out
    for o in offsets[:active[args.curriculum]]:
        weights[o] = args.head_weight * ramp * args.offset_weights.get(o, 1.0)
    weights[1] = 1.0 if lr_scale else 0.0  # it trains the backbone only
    return weights, lr_scale


# ----------------------------------------------------------------------------------------------
# Optimizers and learning rate

class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024): a step moves a matrix equally far in all
    directions. torch.optim.Muon with adjust_lr_fn="match_rms_adamw" makes the same updates, but
    one matrix at a time (slow on GPUs) and in bfloat16 (slow on CPUs that emulate it)."""

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        """Update all matrices that have a gradient, those of one shape together."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for shape in {p.shape for p in trained}:
                params = [p for p in trained if p.shape == shape]
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                grads = [p.grad for p in params]
                buffers = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                updates = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov
                updates = orthogonalize(torch.stack(updates)).to(params[0].dtype)
                # AdamW's updates have about this root mean square, so one lr suits both.
                size = group["lr"] * 0.2 * math.sqrt(max(shape))
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates.unbind()), alpha=-size)


def orthogonalize(matrices):
    """(n, rows, columns) -> about U V^T of each U S V^T, in bfloat16 or float32.

    Five Newton-Schulz iterations x <- a x + b (x x^T) x + c (x x^T)^2 x map every singular value
    s to a s + b s^3 + c s^5, and bring all of them to about 0.7..1.2.
    """
    fast = multiplies_in_bfloat16(matrices.device)
    x = matrices.to(torch.bfloat16 if fast else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # x x^T is then the smaller square
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


def multiplies_in_bfloat16(device):
    """Whether the hardware does (GPUs since Ampere, CPUs with AVX512-BF16), not an emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def make_optimizers(model, name, lr, weight_decay):
    """-> list of optimizers; group["part"] of a parameter group is "backbone" or "heads".

    "adamw": AdamW for all parameters, with weight decay on matrices only. "muon": Muon for the
    matrices inside layers and heads, AdamW for the rest (embeddings, norms, biases).
    """
    groups = {}  # {(kind, part): parameters}
    for key, p in model.named_parameters():
        part = "backbone" if key.startswith("gpt.") else "heads"
        inner = ".h." in key or ".blocks." in key
        kind = "vector" if p.dim() < 2 else "hidden" if inner and name == "muon" else "matrix"
        groups.setdefault((kind, part), []).append(p)
    adamw, muon = [], []
    for (kind, part), params in groups.items():
        decay = 0.0 if kind == "vector" else weight_decay
        group = dict(params=params, part=part, weight_decay=decay)
        (muon if kind == "hidden" else adamw).append(group)
    optimizers = [torch.optim.AdamW(adamw, lr=lr, betas=(0.9, 0.95))]
    return optimizers + [Muon(muon, lr=lr)] if muon else optimizers


def lr_factor(step, steps, warmup, final):
    """lr as a fraction of the highest one: linear warm-up, then a cosine down to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


# ----------------------------------------------------------------------------------------------
# The model at the start, validation, precision

def start_from(path, heads_config):
    """A model with the backbone of `path` (see load_model), and with its heads if they are of the
    same kind; the others are new. -> (MultiTokenGPT, the rest of the checkpoint's state)"""
    found, state = load_model(path)
    model = MultiTokenGPT(found.gpt, heads_config)
    old = replace(found.heads_config, offsets=heads_config.offsets, whs=heads_config.whs)
    if old == heads_config:
        model.load_state_dict(found.state_dict(), strict=False)  # of the offsets in both
    return model, state


def make_model(args, corpus):
    """The model of a new run: from scratch, or from args.init with this run's dropout.
    Raises InputError, also if that model does not fit the corpus."""
    heads_config = HeadsConfig(args.offsets, args.head_kind, args.head_layers,
                               args.own_unembedding, args.whs, args.conditional)
    if args.init is not None:
        model, state = start_from(args.init, heads_config)
        corpus_of(args.init, model, state, corpus.folder)
        for module in (model.gpt.config, *model.modules()):
            if hasattr(module, "dropout"):
                module.dropout = args.dropout
        return model
    require(args.backbone_lr, "--backbone-lr 0 freezes an untrained backbone; --init gives one")
    return MultiTokenGPT(GPT(GPTConfig(args.block_size, corpus.vocab_size, args.n_layer,
                                       args.n_head, args.n_embd, args.dropout)), heads_config)


@torch.no_grad()
def evaluate(model, windows, batch_size, autocast=nullcontext):
    """windows (n, T + 1) int64 -> {offset: mean loss in nats}, {offset: top-1 accuracy}."""
    model.eval()
    loss, accuracy = dict.fromkeys(model.offsets, 0.0), dict.fromkeys(model.offsets, 0.0)
    for idx in windows.split(batch_size):
        fraction = len(idx) / len(windows)
        idx = idx.to(model.gpt.lm_head.weight.device)
        with autocast():
            h = model.hidden_states(idx[:, :-1])
            for o in model.offsets:
                logits, targets = predictions_and_targets(model, h, idx, o)
                loss[o] += F.cross_entropy(logits, targets).item() * fraction
                accuracy[o] += (logits.argmax(-1) == targets).float().mean().item() * fraction
    model.train()
    return loss, accuracy


@contextmanager
def bfloat16(device):
    """Autocast to bfloat16. On a CPU attention is made of plain products, all in bfloat16, which
    is faster there than PyTorch's fused kernel."""
    flags, cpu = torch.backends.cuda, device.type == "cpu"  # the flags are the CPU's as well
    allowed = flags.fp16_bf16_reduction_math_sdp_allowed()
    flags.allow_fp16_bf16_reduction_math_sdp(allowed or cpu)
    attention = sdpa_kernel(SDPBackend.MATH) if cpu else nullcontext()
    try:
        with torch.autocast(device.type, torch.bfloat16), attention:
            yield
    finally:
        flags.allow_fp16_bf16_reduction_math_sdp(allowed)


# ----------------------------------------------------------------------------------------------
# The loop. Under torchrun each process takes a part of every batch, then all average their
# gradients. DistributedDataParallel cannot: joint_loss runs backward once per head.

def all_reduce_mean(tensors):
    """Replace tensors (of one dtype and device) by their means over all processes."""
    if WORLD_SIZE > 1:
        flat = parameters_to_vector(tensors)
        dist.all_reduce(flat)
        vector_to_parameters(flat / WORLD_SIZE, tensors)


def compute_gradients(model, optimizers, corpus, step, args, autocast):
    """Set a step's learning rates and compute its clipped gradients over args.accumulate batches.
    -> {offset: mean loss}, norm of the gradient before clipping (tensors)"""
    weights, lr_scale = recipe(args, model.offsets, step)
    lr = args.lr * lr_factor(step, args.steps, args.warmup, args.final_lr)
    model.gpt.requires_grad_(lr_scale > 0)  # frozen: no gradient, update or decay
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_scale if group["part"] == "backbone" else lr
        optimizer.zero_grad()
    losses = {}
    length = model.gpt.config.block_size + 1
    for i in range(step * args.accumulate, (step + 1) * args.accumulate):
        idx = corpus.batch("train", args.batch_size, length, i, args.seed)
        idx = idx[RANK::WORLD_SIZE].to(args.device, non_blocking=True)  # (B, T + 1)
        with autocast():
            part = joint_loss(model, idx, weights, True, 1 / args.accumulate, args.distill)
        losses = {o: losses.get(o, 0.0) + part[o] / args.accumulate for o in part}
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    all_reduce_mean([*grads, *losses.values()])
    return losses, clip_grad_norm_(model.parameters(), args.clip)


def log(args, **record):
    """Append a line to metrics.jsonl."""
    if RANK == 0:
        with open(Path(args.out) / "metrics.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")


def trim_metrics(path, step):
    """Drop the lines after `step`, whose steps will be done again, and one that a crash cut."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    write_whole(path, "".join(line for line in whole if json.loads(line)["step"] <= step))


def validate(args, model, windows, autocast, step, ntp_before=None):
    """Log and print how good all offsets are. -> the loss of offset 1"""
    loss, accuracy = evaluate(model, windows, args.batch_size, autocast)
    layer_weights = model.layer_weights()
    log(args, step=step, val_loss=loss, val_accuracy=accuracy, layer_weights=layer_weights)
    shown = "  ".join(f"{o}: {loss[o]:.3f} {accuracy[o]:.0%}" for o in model.offsets)
    if args.init is not None and step:
        shown += f"; NTP lost {loss[1] - ntp_before:+.4f} nats against {args.init}"
    for o, weights in layer_weights.items():
        shown += f"\n  layers of offset {o}: " + " ".join(f"{w:.0%}" for w in weights)
    print_rank_0(f"step {step}, held-out nats and accuracy by offset: {shown}")
    return loss[1]


@contextmanager
def signals_received():
    """A list of the Ctrl-Cs and SIGTERMs so far, to be obeyed between two steps."""
    received, numbers = [], (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda n, _: received.append(n)) for n in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(args, model=None, state=None):
    """Run `args` (see check_args) to the last step, from a checkpoint's (model, state) if given.

    Returns the model. Raises InputError and CorpusError for bad input, FloatingPointError if a
    number is not finite, OSError if saving fails, KeyboardInterrupt after Ctrl-C, once saved.
    """
    device, out, corpus = torch.device(args.device), Path(args.out), Corpus(args.data)
    require(args.batch_size % WORLD_SIZE == 0,
            f"--batch-size must be a multiple of the {WORLD_SIZE} processes")
    torch.manual_seed(args.seed)
    model = (model or make_model(args, corpus)).to(device).train()
    T = model.gpt.config.block_size
    windows = corpus.windows("val", args.eval_windows, T + 1)
    corpus.batch("train", 1, T + 1, step=0)  # too small a corpus fails now
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    autocast = (lambda: bfloat16(device)) if args.dtype == "bfloat16" else nullcontext
    first, ntp_before = 0, None  # offset 1's loss before this run
    if state:
        require(state["corpus"] == corpus.meta["train_sha256"],
                f"{corpus.folder} is not the corpus that this run was started on")
        first, ntp_before = state["step"], state["ntp_before"]
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], device)
    if RANK:  # every rank drops out other units
        torch.manual_seed(args.seed + 1_000_003 * (first * WORLD_SIZE + RANK))
    for block in model.gpt.transformer.h if args.compile else []:
        block.compile()  # one program for all layers

    def save(step):
        if RANK == 0:
            save_checkpoint(
                out / "checkpoint.pt", model, step=step, args=vars(args), ntp_before=ntp_before,
                corpus=corpus.meta["train_sha256"], tokenizer=corpus.meta["tokenizer"],
                optimizers=[o.state_dict() for o in optimizers], rng=torch.get_rng_state(),
                cuda_rng=torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    out.mkdir(parents=True, exist_ok=True)
    if RANK == 0:
        trim_metrics(out / "metrics.jsonl", first if state else -1)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print_rank_0(f"{size:.2f}M parameters, offsets {model.offsets}, on {device}, {args.dtype}, "
                 f"{WORLD_SIZE} process(es); run folder {out}")
    if corpus.meta.get("source", "").startswith(OWN_TEXT):
        print_rank_0(f"the validation text, as the training text, is {corpus.meta['source']}")
    if not state:
        ntp_before = validate(args, model, windows, autocast, 0)
        save(0)  # from here on the run can be resumed

    bar = Progress(range(first, args.steps), args.progress, initial=first, total=args.steps,
                   desc="train", unit="step", leave=True)
    since, seen = time.perf_counter(), first
    with signals_received() as signals, bar:
        for step in bar:
            losses, norm = compute_gradients(model, optimizers, corpus, step, args, autocast)
            for optimizer in optimizers:
                optimizer.step()
            done = step + 1
            milestone = done == args.steps or done % args.eval_every == 0
            if not (milestone or done % args.log_every == 0 or (signals and WORLD_SIZE == 1)):
                continue  # without waiting for the device
            stop = torch.tensor(float(len(signals)), device=device)
            all_reduce_mean([stop])  # one rank's signal stops all
            if not all(t.isfinite().all() for t in (norm, *losses.values(), *model.parameters())):
                raise FloatingPointError(f"losses or weights are not finite at step {done}; lower "
                                         f"--lr or raise --warmup. {out} keeps an earlier step")
            losses = {str(o): round(loss.item(), 4) for o, loss in losses.items()}
            tokens = args.batch_size * args.accumulate * T * (done - seen)
            speed = round(tokens / (time.perf_counter() - since))
            log(args, step=done, loss=losses, grad_norm=round(norm.item(), 4),
                lr=args.lr * lr_factor(step, args.steps, args.warmup, args.final_lr),
                tokens_per_second=speed)
            bar.set_postfix(losses, tokens_s=speed)
            if milestone:
                bar.clear()
                validate(args, model, windows, autocast, done, ntp_before)
            if milestone or stop:
                save(done)
            if stop:
                raise KeyboardInterrupt(f"stopped; go on with: python train.py --resume {out}")
            since, seen = time.perf_counter(), done
    return model


# ----------------------------------------------------------------------------------------------
# The command line

def parse_args(argv=None, args=None):
    """The command line as a namespace; what is not given is as in `args` or has its default."""
    p = group = Parser(prog="train.py", description="Train a GPT from scratch, or heads on one "
                       "(--init). Ctrl-C saves and stops; --resume goes on.")

    def add(name, default, help, **how):
        kind = dict(action="store_true") if default is False else dict(type=type(default))
        group.add_argument(f"--{name}", default=default, help=help, **kind, **how)

    add("data", "data/python", "corpus folder made by data/prepare.py")
    add("out", "runs/new", "run folder: checkpoint.pt and metrics.jsonl")
    p.add_argument("--resume", metavar="RUN", help="go on with this run; the other options count "
                   "only for a new run, but for --device, --compile and --no-progress")
    add("overwrite", False, "start anew where --out already holds a run")
    p.add_argument("--init", metavar="MODEL", help="start from the backbone, and the heads that "
                   "fit, of a run or of GPT-2 weights (gpt2, a folder, a file)")
    group = p.add_argument_group("heads")
    add("offsets", "1,2,3,4", "1: next-token only; 1,2,3,4: MTP; 1,3,5,7: leap; any others")
    add("head-kind", "resblock", "residual or transformer blocks", choices=["resblock", "block"])
    add("head-layers", 1, "blocks per head")
    add("own-unembedding", False, "each head trains its own copy of the unembedding")
    add("whs", False, "weighted hidden states: each head reads a mean of all layers")
    add("conditional", False, "each head also reads the next token, which a decoder knows")
    group = p.add_argument_group("recipe")
    add("backbone-lr", 1.0, "lr scale of the backbone; 0 freezes it")
    add("head-warmup", 0, "first steps, which train the heads alone")
    add("head-weight", 1.0, "weight of each head's loss relative to offset 1's")
    add("head-ramp", 0, "steps in which that weight grows from 0, after the warm-up")
    add("offset-weights", "", "further factors, as in 2:1,3:0.5")
    add("distill", 0.0, "fraction of a head's loss against the model's own distribution")
    add("curriculum", "none", "add or remove offsets", choices=["none", "forward", "reverse"])
    group = p.add_argument_group("model from scratch (with --init: only the dropout)")
    add("n-layer", 4, "transformer layers")
    add("n-head", 4, "attention heads per layer")
    add("n-embd", 128, "width")
    add("block-size", 256, "context in tokens")
    add("dropout", 0.0, "dropout rate")
    group = p.add_argument_group("optimization")
    add("steps", 2000, "optimizer steps")
    add("batch-size", 8, "sequences per forward pass, over all processes")
    add("accumulate", 1, "forward passes per optimizer step")
    add("optimizer", "muon", "for hidden matrices; AdamW for the rest", choices=["muon", "adamw"])
    add("lr", 5e-3, "highest learning rate; about 1e-3 for adamw")
    add("final-lr", 0.0, "last learning rate as a fraction of the highest")
    add("warmup", 100, "steps of linear warm-up")
    add("weight-decay", 0.1, "on matrices")
    add("clip", 1.0, "largest gradient norm")
    add("seed", 0, "of weights, batches and dropout")
    group = p.add_argument_group("machine")
    add("device", "auto", "auto, cpu, cuda, cuda:1 or mps")
    add("dtype", "auto", "bfloat16 is autocast; auto chooses it if the hardware multiplies in it",
        choices=["auto", "float32", "bfloat16"])
    add("compile", False, "torch.compile the layers (needs a C++ compiler)")
    add("eval-every", 500, "steps between validations, which also save")
    add("eval-windows", 64, "held-out windows per validation")
    add("log-every", 10, "steps between lines in metrics.jsonl")
    p.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")
    return p.parse_args(argv, args)


def check_args(args):
    """Parse the lists and fill in "auto", in place. Raises InputError for impossible values."""
    args.offsets = parse_offsets(args.offsets)
    try:
        pairs = [pair.split(":") for pair in args.offset_weights.split(",") if pair]
        args.offset_weights = weights = {int(o): float(w) for o, w in pairs}
        legal = all(o in args.offsets[1:] and 0 <= w < math.inf for o, w in weights.items())
    except ValueError:
        legal = False
    require(legal, "--offset-weights must be weights from 0 on of heads, as in 2:1,3:0.5")
    args.device = str(pick_device(args.device))
    if args.dtype == "auto":
        fast = multiplies_in_bfloat16(torch.device(args.device))
        args.dtype = "bfloat16" if fast else "float32"
    least = dict(steps=1, batch_size=1, accumulate=1, eval_every=1, eval_windows=1, log_every=1,
                 lr=1e-12, clip=1e-12)
    most = dict(weight_decay=1, final_lr=1, distill=1, backbone_lr=1e3, head_warmup=args.steps)
    for name, value in vars(args).items():
        low, high = least.get(name, 0), most.get(name, 2**63 - 1)
        if isinstance(value, (int, float)):
            require(low <= value <= high, f"--{name.replace('_', '-')} must be in {low}..{high:g}")
    require(args.backbone_lr or not (args.head_warmup or args.head_ramp),
            "--head-warmup and --head-ramp change nothing while the backbone is frozen")
    for step in (0, max(0, args.head_warmup - 1), args.steps - 1):  # fewest losses count there
        require(any(recipe(args, args.offsets, step)[0].values()), f"step {step + 1} would train "
                "nothing: heads must train while the backbone is frozen")
    require(args.out and not Path(args.out).is_file(), f"--out must be a folder, not {args.out!r}")


def main(argv=None):
    """Train or resume."""
    args, model, state = parse_args(argv), None, None
    with one_line_errors("train.py", memory="--batch-size, --block-size or the model"):
        if args.resume is None:
            check_args(args)
            require(args.overwrite or not (Path(args.out) / "checkpoint.pt").exists(),
                    f"{args.out} already holds a run; give --resume {args.out}, --overwrite "
                    "or another --out")
        else:
            path = Path(args.resume)
            model, state = load_checkpoint(path)
            require("args" in state, f"{path} holds a model but no run to resume")
            # An option that is younger than the run has its default.
            now = parse_args(argv, argparse.Namespace(**state["args"]))
            machine = dict(device=now.device, compile=now.compile, progress=args.progress)
            args = argparse.Namespace(**vars(now) | state["args"] | machine)
            args.out = str(path if path.is_dir() else path.parent)
            if state["step"] >= args.steps:
                return print_rank_0(f"{args.out} is finished: {args.steps} steps")
            args.device = str(pick_device(args.device))
        if WORLD_SIZE > 1:
            if args.device != "cpu":
                torch.cuda.set_device(args.device)
            dist.init_process_group("gloo" if args.device == "cpu" else "nccl")
        train(args, model, state)
        if WORLD_SIZE > 1:
            dist.destroy_process_group()
        print_rank_0(f"done: python decode.py {args.out}")


if __name__ == "__main__":
    main()
