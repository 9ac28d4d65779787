"""One training loop for every recipe: a GPT from scratch, with or without heads, or heads alone.

    python train.py --data data/python --offsets 1,2,3,4 --out runs/mtp
    python train.py --resume runs/mtp           # after Ctrl-C, a crash or a power cut
    python train.py --init runs/ntp --backbone-lr 0 --out runs/heads    # a frozen backbone

The papers' recipes differ in which losses count how much at which step: that is one function,
`recipe`. A run can be stopped anywhere: batches are a function of (seed, step), checkpoint.pt
holds all other state, and a resumed run ends with the same weights, bit for bit on a CPU.
"""
import json
import math
import signal
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import data  # before PyTorch: Ctrl-C is one line from here on
import torch
import torch.nn.functional as F

from common import (Parser, corpus_of, has_native_bfloat16, load_checkpoint,
                    load_model, one_line_errors, pick_device, progress_bar, save_checkpoint)
from data.loader import Corpus
from data.prepare import InputError, require
from heads import HeadsConfig, MultiTokenGPT, joint_loss, parse_offsets, predictions_and_targets
from model import GPT, GPTConfig


def recipe(args, offsets, step):
    """What a step trains -> ({offset: weight of its loss}, lr scale of the backbone). The papers'
    recipes are settings of this function:

    backbone_lr  lr scale of the backbone: 1 (joint), less (differential rates), 0 (frozen)
    head_warmup  first steps, which train the heads alone (Mehra et al.; L-MTP, stage 1)
    head_weight  weight of each head's loss relative to offset 1's (beta in L-MTP)
    """
    lr_scale = 0.0 if step < args.head_warmup else args.backbone_lr
    weights = dict.fromkeys(offsets, args.head_weight)
    weights[1] = 1.0 if lr_scale else 0.0  # it trains the backbone only
    return weights, lr_scale


# ---- Optimizers and learning rate ------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Jordan et al. 2024): a step moves a matrix equally far in all
    directions. Makes the updates of torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but for
    all matrices of a group, which have one shape, at once, and not in emulated bfloat16."""

    def __init__(self, params, lr, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = []
            for p in params:
                mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                mean.lerp_(p.grad, 0.05)
                updates.append(p.grad.lerp(mean, 0.95))  # Nesterov momentum
            # AdamW's updates have about this root mean square, so one lr suits both.
            size = group["lr"] * 0.2 * math.sqrt(max(updates[0].shape))
            for p, update in zip(params, orthogonalize(torch.stack(updates))):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-size)


def orthogonalize(matrices):
    """(n, rows, columns) -> about U V^T of each U S V^T, in bfloat16 or float32.

    Five Newton-Schulz iterations x <- a x + b (x x^T) x + c (x x^T)^2 x map every singular value
    s to a s + b s^3 + c s^5, and bring all of them to about 0.7..1.2."""
    native = has_native_bfloat16(matrices.device)
    x = matrices.to(torch.bfloat16 if native else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # x x^T is then the smaller square
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


def make_optimizers(model, name, lr, weight_decay):
    """-> list of optimizers; group["part"] of a parameter group is "backbone" or "heads".

    "adamw": AdamW for all parameters, with weight decay on matrices only. "muon": Muon for the
    matrices inside layers and heads, AdamW for the rest (embeddings, norms, biases)."""
    adamw = {}  # {what the parameters of a group have in common: the group}
    muon = {}
    for key, p in model.named_parameters():
        part = "backbone" if key.startswith("gpt.") else "heads"
        decay = weight_decay if p.dim() == 2 else 0.0
        inner = p.dim() == 2 and "wte" not in key and "wpe" not in key
        groups = muon if inner and name == "muon" else adamw
        shape = p.shape if groups is muon else None
        group = dict(params=[], part=part, weight_decay=decay)
        groups.setdefault((part, decay, shape), group)["params"].append(p)
    optimizers = [torch.optim.AdamW([*adamw.values()], lr=lr, betas=(0.9, 0.95))]
    if muon:
        optimizers.append(Muon([*muon.values()], lr=lr))
    return optimizers


def lr_factor(step, steps, warmup):
    """lr as a fraction of the highest one: linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# ---- The model at the start, validation ------------------------------------------------------

def make_model(args, corpus):
    """The model of a new run: from scratch; or with the backbone of args.init, and with its heads
    if they are of the same kind. Raises InputError, also if that model has other tokens."""
    config = HeadsConfig(args.offsets, args.head_kind, args.head_layers, args.whs, args.sequential)
    shape = {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
    if args.init is None:
        require(args.backbone_lr, "--backbone-lr 0 freezes an untrained backbone; --init gives one")
        gpt = GPT(GPTConfig(vocab_size=corpus.vocab_size, **shape))
        return MultiTokenGPT(gpt, config)
    require(not shape, f"the model of --init has its own {', '.join(shape)}")
    found, state = load_model(args.init)
    corpus_of(args.init, found, state, corpus.folder)  # raises if it has other tokens
    model = MultiTokenGPT(found.gpt, config)
    if replace(found.heads_config, offsets=args.offsets) == config:
        model.load_state_dict(found.state_dict(), strict=False)  # of the offsets in both
    return model


@torch.no_grad()
def evaluate(model, windows, batch_size, autocast=nullcontext()):
    """windows (n, T + 1) int64 -> {offset: mean loss in nats}, {offset: top-1 accuracy}."""
    model.eval()
    loss = dict.fromkeys(model.offsets, 0.0)
    accuracy = dict.fromkeys(model.offsets, 0.0)
    for idx in windows.split(batch_size):
        fraction = len(idx) / len(windows)
        with autocast:
            h = model.hidden_states(idx[:, :-1])
            for o in model.offsets:
                logits, targets = predictions_and_targets(model, h, idx, o)
                loss[o] += F.cross_entropy(logits, targets).item() * fraction
                right = logits.argmax(-1) == targets
                accuracy[o] += right.float().mean().item() * fraction
    model.train()
    return loss, accuracy


# ---- The loop --------------------------------------------------------------------------------

def train_step(model, optimizers, idx, step, args, autocast=nullcontext()):
    """Train on idx (B, T + 1) -> {offset: loss}, the gradient's norm before clipping (tensors)."""
    torch.manual_seed(args.seed + 1_000_003 * step)  # of dropout: a resumed run goes on alike
    weights, lr_scale = recipe(args, model.offsets, step)
    lr = args.lr * lr_factor(step, args.steps, args.warmup)
    model.gpt.requires_grad_(lr_scale > 0)  # frozen: no gradient, update or decay
    for optimizer in optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_scale if group["part"] == "backbone" else lr
    with autocast:
        losses = joint_loss(model, idx, weights, backward=True)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return losses, norm


def log(args, **record):
    """Append a line to metrics.jsonl. After a resume the last line of a step counts."""
    with open(Path(args.out) / "metrics.jsonl", "a") as f:
        f.write(json.dumps(record) + "\n")


def validate(args, model, windows, autocast, step):
    """Log and print how good all offsets are."""
    loss, accuracy = evaluate(model, windows, args.batch_size, autocast)
    log(args, step=step, val_loss=loss, val_accuracy=accuracy)
    shown = "  ".join(f"{o}: {loss[o]:.3f} {accuracy[o]:.0%}" for o in model.offsets)
    print(f"step {step}, held-out nats and accuracy by offset: {shown}", flush=True)


@contextmanager
def signals_received():
    """A list of the Ctrl-Cs and SIGTERMs so far, to be obeyed between two steps."""
    received = []
    before = {number: signal.signal(number, lambda n, _: received.append(n))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def restore(args, fixed, optimizers, state):
    """Take up a checkpoint's state -> the next step. Raises InputError for another corpus, or for
    the checkpoint of an older train.py."""
    require(state["corpus"] == fixed["corpus"], f"{args.data} is not the corpus that this run was "
            "started on; name that one with --data")
    try:
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
    except ValueError as error:
        raise InputError(f"{args.out} was saved by another train.py; start a run from it with "
                         f"--init ({error})") from None
    if state["changed"]:
        print(f"resumed at step {state['step']} with {state['changed']}")
        log(args, step=state["step"], changed=state["changed"])
    return state["step"]


def train(args, model=None, state=None):
    """Run `args` (see check_args) to the last step, from a checkpoint's (model, state) if given. ->
    the model. Raises InputError for bad input, FloatingPointError if a number is not finite,
    OSError if saving fails, KeyboardInterrupt after Ctrl-C, once saved."""
    device = torch.device(args.device)
    out = Path(args.out)
    corpus = Corpus(args.data)
    args.data = str(corpus.folder)
    torch.manual_seed(args.seed)
    model = (model or make_model(args, corpus)).to(device).train()
    length = model.gpt.config.block_size + 1
    windows = corpus.windows("val", args.eval_windows, length).to(device)
    corpus.batch("train", 1, length, 0)  # too small a corpus fails now
    optimizers = make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    fixed = dict(corpus=corpus.fingerprint(), tokenizer=corpus.tokenizer.name)
    first = restore(args, fixed, optimizers, state) if state else 0

    def save(step):
        save_checkpoint(
            out / "checkpoint.pt", model, step=step, args=vars(args), **fixed,
            optimizers=[optimizer.state_dict() for optimizer in optimizers])

    out.mkdir(parents=True, exist_ok=True)
    print(f"offsets {model.offsets}, on {device}, {args.dtype}; run folder {out}", flush=True)
    if not state:
        (out / "metrics.jsonl").unlink(missing_ok=True)
        validate(args, model, windows, autocast, 0)
        save(0)  # from here on the run can be resumed

    bar = progress_bar(range(first, args.steps), args.progress, initial=first,
                       total=args.steps, desc="train", unit="step")
    with signals_received() as signals, bar:
        for step in bar:
            idx = corpus.batch("train", args.batch_size, length, step, args.seed)
            losses, norm = train_step(model, optimizers, idx.to(device), step, args, autocast)
            done = step + 1
            milestone = done == args.steps or done % args.eval_every == 0
            if not (milestone or done % args.log_every == 0 or signals):
                continue  # without waiting for the device
            numbers = (norm, *losses.values(), *model.parameters())
            if not all(t.isfinite().all() for t in numbers):
                raise FloatingPointError(
                    f"losses or weights are not finite at step {done}; go on from an earlier step "
                    f"with: python train.py --resume {out} --lr {args.lr / 4:g}")
            losses = {str(o): loss.item() for o, loss in losses.items()}
            log(args, step=done, loss=losses, grad_norm=norm.item(),
                lr=args.lr * lr_factor(step, args.steps, args.warmup))
            bar.set_postfix(losses, refresh=False)
            if milestone:
                if not bar.leave:  # progress_bar: on a terminal
                    bar.clear()
                validate(args, model, windows, autocast, done)
            if milestone or signals:
                save(done)
            if signals:
                raise KeyboardInterrupt(f"stopped; go on with: python train.py --resume {out}")
    return model


# ---- The command line ------------------------------------------------------------------------

SHAPE = dict(n_layer="transformer layers", n_head="attention heads per layer", n_embd="width",
             block_size="context in tokens", dropout="dropout rate")
MAY_CHANGE = {"steps", "lr", "warmup", "batch_size", "data", "eval_every", "eval_windows",
              "log_every", "device", "dtype"}  # in a resumed run


def make_parser():
    """The options."""
    p = Parser(prog="train.py", description="Train a GPT from scratch, or heads on one "
                       "(--init). Ctrl-C saves and stops; --resume goes on.")
    p.option("data", "data/python", "corpus folder made by data/prepare.py")
    p.option("out", "runs/new", "run folder: checkpoint.pt and metrics.jsonl")
    p.option("resume", None, "go on with this run, one process at a time; may change its length, "
             "rate, batch and machine, but not what it is", metavar="RUN")
    p.option("overwrite", False, "start anew where --out already holds a run")
    p.option("init", None, "start from the backbone, and the heads that fit, of a run or of GPT-2 "
             "weights (gpt2, a folder, a file)", metavar="MODEL")
    p.group = p.add_argument_group("heads")
    p.option("offsets", "1,2,3,4", "1: next-token only; 1,2,3,4: MTP; 1,3,5,7: leap; any others")
    p.option("head-kind", "resblock", "residual or transformer blocks",
             choices=["resblock", "block"])
    p.option("head-layers", 1, "blocks per head", least=1)
    p.option("whs", False, "weighted hidden states: each head reads a mean of all layers")
    p.option("sequential", False, "each head also reads the token just before the one it predicts")
    p.group = p.add_argument_group("recipe")
    p.option("backbone-lr", 1.0, "lr scale of the backbone; 0 freezes it")
    p.option("head-warmup", 0, "first steps, which train the heads alone")
    p.option("head-weight", 1.0, "weight of each head's loss relative to offset 1's")
    p.group = p.add_argument_group("model from scratch (a model of --init has its own)")
    for name, help in SHAPE.items():
        usual = getattr(GPTConfig, name)
        p.option(name.replace("_", "-"), None, f"{help}; else {usual}", type=type(usual))
    p.group = p.add_argument_group("optimization")
    p.option("steps", 2000, "optimizer steps", least=1)
    p.option("batch-size", 8, "sequences per step", least=1)
    p.option("optimizer", "muon", "for hidden matrices; AdamW for the rest",
             choices=["muon", "adamw"])
    p.option("lr", 5e-3, "highest learning rate; about 1e-3 for adamw")
    p.option("warmup", 100, "steps of linear warm-up")
    p.option("weight-decay", 0.1, "on matrices")
    p.option("seed", 0, "of weights, batches and dropout")
    p.group = p.add_argument_group("machine")
    p.option("device", "auto", "auto, cpu, cuda, cuda:1 or mps")
    p.option("dtype", "auto", "bfloat16 is autocast; auto: if the hardware multiplies in it",
             choices=["auto", "float32", "bfloat16"])
    p.option("eval-every", 500, "steps between validations, which also save", least=1)
    p.option("eval-windows", 64, "held-out windows per validation", least=1)
    p.option("log-every", 10, "steps between lines in metrics.jsonl", least=1)
    p.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")
    return p


def check_args(args):
    """Parse the offsets and fill in "auto", in place. Raises InputError for impossible values."""
    args.offsets = parse_offsets(args.offsets)
    device = pick_device(args.device)
    args.device = str(device)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if has_native_bfloat16(device) else "float32"
    require(args.backbone_lr or not args.head_warmup,
            "--head-warmup changes nothing while the backbone is frozen")
    always_trains = args.backbone_lr and not args.head_warmup
    require(always_trains or args.offsets != (1,) and args.head_weight, "heads must train while "
            "the backbone is frozen; give more --offsets and a --head-weight")


def resume(parser, argv, path):
    """A run to go on with: its own settings, but for those of the command line. -> args, model,
    state. Raises InputError for a setting that would make it another run."""
    model, state = load_checkpoint(path)
    require("args" in state, f"{path} holds a model but no run to resume")
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    saved = state["args"] | dict(resume=path, out=str(folder))
    saved.pop("progress", None)
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    args.out = str(Path(args.out))
    args.data = str(Corpus(args.data).folder)
    check_args(args)
    state["changed"] = {name: value for name, value in vars(args).items()
                        if value != saved.get(name, value)}
    for name in state["changed"].keys() - MAY_CHANGE:
        raise InputError(f"--{name.replace('_', '-')} does not go with --resume; another run would "
                         f"start with --init {path}")
    return args, model, state


def main(argv=None):
    """Train or resume. Bad input is one line and status 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_line_errors("train.py"):
        if args.resume is not None:
            args, model, state = resume(parser, argv, args.resume)
            if state["step"] >= args.steps:
                return print(f"{args.out} is finished: {state['step']} steps; --steps N goes on")
            train(args, model, state)
        else:
            check_args(args)
            require(args.out, "--out must name a folder")
            require(args.overwrite or not (Path(args.out) / "checkpoint.pt").exists(),
                    f"{args.out} already holds a run; give --resume {args.out}, --overwrite or "
                    "another --out")
            train(args)
        print(f"done: python decode.py {args.out}")


if __name__ == "__main__":
    main()
