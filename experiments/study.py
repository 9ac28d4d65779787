"""The study: both papers' claims, tried on models that are small enough to train here.

    python experiments/study.py --quick            # everything, in 25 minutes on 2 CPU cores
    python experiments/study.py --size patient     # the same models, trained five times as long
    python experiments/study.py                    # larger models, for one large GPU
    python experiments/study.py --only adapt leap  # some of the parts
    python experiments/findings.py --size quick    # the tables and figures of the results

Each part of the study asks one paper a few questions. A part consists of *pieces*: a run of
train.py, or a measurement of a run. A piece is a function of its arguments, and its result is
kept in a file of the study's folder. So the study can be stopped (Ctrl-C, kill -9) and continued,
and two parts can share a piece. A piece is repeated when its arguments, its corpus or the pieces
that it needs have changed. If you change what a piece *does*, remove its file. Pieces run side by
side, one per core; those that measure time run at the end, alone.

Every row of every table is trained three times, with different initial weights and batches (the
seed), and comparisons are made seed by seed. Each part writes
experiments/results/study_SIZE_PART.json.

From the top: the sizes, how pieces run, what they do, the parts, the command line.
"""
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
from argparse import SUPPRESS
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train
from common import (Parser, Progress, environment, load_checkpoint, one_line_errors, pick_device,
                    write_whole)
from data.loader import Corpus
from data.prepare import prepare
from decode import Decoder, can_compile, chain, compare
from experiments.calibrate import calibrate, held_out_records
from experiments.layers import measure_layers, train_probes
from experiments.own_text import write_own_text
from heads import HeadsConfig, MultiTokenGPT, draft_sources, joint_loss
from marginalize import measure, questions, unigram
from model import GPT, GPTConfig, InputError

SEEDS = (0, 1, 2)


# ----------------------------------------------------------------------------------------------
# The sizes

class Shape(NamedTuple):
    """The shape of a backbone."""
    n_layer: int
    n_head: int
    n_embd: int


@dataclass
class Size:
    """How large the study is. Everything else is the same in every size."""
    ladder: tuple                 # the backbones, small to large
    base: Shape                   # the backbone of all parts but the first
    steps: int                    # to train a backbone on the next token
    batch_size: int               # windows in a step
    block_size: int               # tokens in a window
    lr: float                     # highest learning rate; half of it when heads join a backbone
    adaptation: int               # compute for adding heads, in units that Study defines
    windows: int                  # held-out windows, with 16 questions each
    probe_steps: int              # to train the layer probes
    prompts: int                  # for decoding
    own_tokens: int               # that the backbone writes for L-MTP's first stage
    plan_bits: int                # of the planning task
    plan_steps: int


TEXTS = Shape(2, 2, 64)           # in every ladder; too small to memorise a corpus of 1 MB
SIZES = dict(
    quick=Size(
        ladder=(Shape(1, 1, 16), Shape(1, 1, 32), TEXTS, Shape(4, 2, 96)), base=Shape(4, 2, 96),
        steps=1200, batch_size=8, block_size=128, lr=1e-2, adaptation=1, windows=64,
        probe_steps=150, prompts=32, own_tokens=60_000, plan_bits=9, plan_steps=1000),
    full=Size(
        ladder=(TEXTS, Shape(4, 2, 128), Shape(6, 4, 256), Shape(6, 6, 384)),
        base=Shape(6, 4, 256), steps=2000, batch_size=64, block_size=256, lr=5e-3, adaptation=2,
        windows=128, probe_steps=500, prompts=64, own_tokens=500_000, plan_bits=10,
        plan_steps=2000))
SIZES["patient"] = replace(SIZES["quick"], steps=6000, windows=128, probe_steps=750,
                           own_tokens=300_000)


# ----------------------------------------------------------------------------------------------
# How pieces run

@dataclass
class Piece:
    """A unit of work that runs once: function(**arguments), after all pieces in `needs`."""
    name: str
    function: Callable
    arguments: dict
    needs: tuple = ()
    alone: bool = False           # it measures time


class Here:
    """What a worker process knows: the study's folder and the device."""
    folder = device = None


def enter(folder, device, threads):
    """Prepare a worker process. It ignores Ctrl-C, which is for the first process, and ends when
    the first process ends. On SIGTERM it exits; training saves before that."""
    Here.folder, Here.device = folder, torch.device(device)
    os.chdir(ROOT)
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())

    def end_with_the_first():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=end_with_the_first, daemon=True).start()


def stamps(pieces):
    """{name: hash of everything that the piece's result depends on}: its arguments, its corpus
    and the stamps of the pieces that it needs. `pieces` holds needed pieces first."""
    found = {}
    for piece in pieces:
        meta = ROOT / piece.arguments.get("data", "") / "meta.json"
        corpus = json.loads(meta.read_text()) if meta.exists() else {}
        behind = [piece.arguments,
                  [corpus.get(f"{split}_sha256") for split in ("train", "val")],
                  [found[name] for name in piece.needs]]
        text = json.dumps(behind, sort_keys=True)
        found[piece.name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def result_file(folder, name):
    """The file for a piece's result. While the piece runs, it holds only the stamp."""
    return folder / f"{name}.json"


def read(file):
    """The content of a result_file; {} if it is missing or damaged."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def do(piece, stamp):
    """Run a piece in this process and write its result. A run that was begun continues."""
    start, file = time.perf_counter(), result_file(Here.folder, piece.name)
    if read(file).get("stamp") != stamp:
        shutil.rmtree(Here.folder / piece.name, ignore_errors=True)  # from other arguments
        write_whole(file, json.dumps(dict(stamp=stamp)))
    with open(Here.folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        result = piece.function(**piece.arguments)
    write_whole(file, json.dumps(dict(
        stamp=stamp, arguments=piece.arguments, seconds=round(time.perf_counter() - start, 1),
        environment=environment(Here.device), result=result)))


def done_of(folder, pieces):
    """{name: content of the result file} of the pieces that are done."""
    found = {}
    for name, stamp in stamps(pieces).items():
        content = read(result_file(folder, name))
        if content.get("stamp") == stamp and "result" in content:
            found[name] = content
    return found


def do_all(pieces, folder, device, jobs):
    """Run what is not done yet, `jobs` pieces at a time; then, one by one, what measures time.
    -> done_of"""
    done, stamp = set(done_of(folder, pieces)), stamps(pieces)
    threads, spawn = torch.get_num_threads(), multiprocessing.get_context("spawn")
    bar = Progress(total=len(pieces), initial=len(done), desc="study", unit="piece", leave=True)

    def side_by_side(todo, jobs, threads):
        waiting, running = [p for p in todo if p.name not in done], {}
        with ProcessPoolExecutor(jobs, spawn, enter, (folder, device, threads)) as pool:
            try:
                while waiting or running:
                    ready = [p for p in waiting if set(p.needs) <= done]
                    for piece in ready[:jobs - len(running)]:
                        running[pool.submit(do, piece, stamp[piece.name])] = piece.name
                        waiting.remove(piece)
                    bar.set_postfix_str(", ".join(sorted(running.values())))
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        future.result()
                        done.add(running.pop(future))
                        bar.update()
            except BaseException:
                for child in multiprocessing.active_children():
                    child.terminate()                               # a training run then saves
                raise
    with bar:
        side_by_side([p for p in pieces if not p.alone], jobs, max(1, threads // jobs))
        side_by_side([p for p in pieces if p.alone], 1, threads)
    return done_of(folder, pieces)


# ----------------------------------------------------------------------------------------------
# What pieces do. Measurements return {name of a number: number}.

def train_run(name, options, init, data, own):
    """A run of train.py with these options on the corpus `data`, or on `own`, a corpus in the
    study's folder. Starts from the run `init` if given; resumes where it was stopped."""
    out = Here.folder / name
    options = [*options, "--data", str(Here.folder / own if own else data), "--out", str(out),
               "--no-progress", "--device", str(Here.device)]
    options += ["--init", str(Here.folder / init)] if init else []
    args = train.parse_args(options)
    train.check_args(args)
    model, state = load_checkpoint(out) if (out / "checkpoint.pt").exists() else (None, None)
    if state is None or state["step"] < args.steps:
        train.train(args, model, state)


def load(name):
    """A run of this study -> its model, its corpus"""
    model, state = load_checkpoint(Here.folder / name)
    return model.to(Here.device).eval(), Corpus(state["args"]["data"])


def questions_for(model, corpus, horizon, windows):
    """Held-out windows and 16 positions in each, the same for all models, on the device."""
    asked, position = questions(corpus, model.gpt.config.block_size, horizon, windows, 16)
    return asked.to(Here.device), position.to(Here.device)


def foresee(run, windows, horizon=4):
    """What a model knows about t+1 .. t+4, marginalised and by its own heads, at the same
    held-out positions for all models. Also the loss (nats) and the accuracy of every offset, at
    every position of other windows."""
    model, corpus = load(run)
    held_out = corpus.windows("val", windows, model.gpt.config.block_size + 1)
    loss, accuracy = train.evaluate(model, held_out, 8)
    asked, position = questions_for(model, corpus, horizon, windows)
    frequencies = unigram(corpus).to(Here.device)
    table = measure(model, asked, position, horizon, frequencies, 32, progress=False)
    found = dict(nats=loss[1], parameters=sum(p.numel() for p in model.gpt.parameters()))
    found |= {f"accuracy of offset {o}": a for o, a in accuracy.items()}
    found |= {f"{r['reader']} t+{r['distance']}": r["top1"][0] for r in table}
    return found | {f"layer weights {o}": weights for o, weights in model.layer_weights().items()}


def read_layers(run, windows, probe_steps):
    """The accuracy of every layer for t+1 and t+2, by the logit lens and by trained probes."""
    model, corpus = load(run)
    asked, position = questions_for(model, corpus, 2, windows)
    probes = train_probes(model.gpt, corpus, (1, 2), probe_steps, progress=False)
    return {f"{r['reader']} t+{r['distance']} layer {r['layer']}": r["top1"][0]
            for r in measure_layers(model.gpt, probes, asked, position)}


def draft(run, offsets, prompts, nodes=15):
    """Tokens per step of a chain and of a tree with `nodes` draft tokens, on held-out text,
    greedy and sampled; and what the papers' formula expects."""
    model, corpus = load(run)
    windows = corpus.windows("val", 64, model.gpt.config.block_size + 1)[1::2]
    ways = {"chain": chain(draft_sources(offsets)),
            "tree": calibrate(model, windows, nodes, progress=False)["tree"]}
    found = {}
    for way, r in zip(ways, held_out_records(model, corpus, list(ways.values()))):
        found[f"real text, {way}"] = r["tokens_per_step"]
        found[f"formula, {way}"] = r["expected_tokens_per_step"]
        found |= {f"{way}, candidate at distance {j}": a for j, a in r["acceptance"].items()}
    for kind, way, r in written(model, corpus, ways, prompts, rounds=1, batch_size=32):
        found[f"{kind}, {way}"] = r["tokens_per_step"]
        found[f"{kind}, {way}, identical"] = r["identical"]
    return found


def written(model, corpus, ways, prompts, **how):
    """`compare` NTP and other ways, {name: tree}, which continue 16 held-out tokens to the end of
    the context. Yields ("greedy" or "sampled", name, record)."""
    ways = {"NTP": (), **ways}
    trees = list(dict.fromkeys(ways.values()))
    begun = corpus.windows("val", prompts, 16).tolist()
    new_tokens = model.gpt.config.block_size - 16
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        records = compare(model, trees, begun, new_tokens, temperature, progress=False, **how)
        for way, tree in ways.items():
            yield kind, way, records[trees.index(tree)]


def speed(run, prompts, trees=False):
    """The wall-clock speedup over compiled NTP decoding at batch size 1: of the chain of all
    offsets and, with `trees`, of the tree that calibrate finds for this machine. That tree is
    grown on what the model writes greedily after training text."""
    model, corpus = load(run)
    ways = {"chain": chain(draft_sources(model.offsets))}
    if trees:
        begun = corpus.windows("train", 32, 16).tolist()
        texts = Decoder(model).generate(begun, model.gpt.config.block_size - 16).tokens
        windows = torch.tensor([a + b for a, b in zip(begun, texts)])
        ways["tree"] = calibrate(model, windows, compile=True, progress=False)["tree"]
    found = {}
    for kind, way, r in written(model, corpus, ways, prompts, rounds=3, compile=True):
        for what in ("block", "tokens_per_step", "tokens_per_second", "speedup", "identical"):
            found[f"compiled, {kind}, {way}, {what}"] = r[what]
    for way, tree in ways.items():
        (r,) = held_out_records(model, corpus, [tree])
        found[f"compiled, real text, {way}"] = r["tokens_per_step"]
    return found


def own_text(name, run, tokens, seed):
    """A corpus that a model writes itself."""
    model, corpus = load(run)
    write_own_text(model, corpus, Here.folder / name, tokens, batch_size=128, seed=seed,
                   source=run, progress=False)


def parities(n, inputs):
    """The planning task: running parities, in reverse. inputs (B,): numbers of n bits
    -> tokens (B, 2n + 1): x_1 .. x_n = y_n .. y_1, bits and 2 for "=".

    y_i = x_1 + ... + x_i modulo 2. So y_i follows from y_(i+1) and x_(i+1) alone; but y_n, which
    comes first, takes all of x.
    """
    x = inputs[:, None] >> torch.arange(n) & 1                      # (B, n)
    equals = torch.full((len(x), 1), 2)
    return torch.cat([x, equals, (x.cumsum(1) % 2).flip(1)], dim=1)


def plan(offsets, seed, bits, steps):
    """Train on the planning task with three quarters of all inputs, then ask for the others: how
    often each token of the answer is right, given those before it, and how often all are."""
    inputs = torch.randperm(2 ** bits, generator=torch.Generator().manual_seed(0))  # for all seeds
    known, asked = inputs[2 ** bits // 4:], inputs[:2 ** bits // 4]

    def batch(split, batch_size, length, step, seed):
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        return parities(bits, known[torch.randint(len(known), (batch_size,), generator=generator)])
    corpus = SimpleNamespace(batch=batch)
    args = train.parse_args([
        "--offsets", ",".join(map(str, offsets)), "--steps", str(steps), "--batch-size", "128",
        "--lr", "2e-3", "--device", str(Here.device), "--seed", str(seed)])
    train.check_args(args)
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(block_size=2 * bits, vocab_size=3, n_layer=3, n_head=4, n_embd=64))
    model = MultiTokenGPT(gpt, HeadsConfig(offsets)).to(Here.device)
    optimizers = train.make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    for step in range(steps):
        train.compute_gradients(model, optimizers, corpus, step, args, nullcontext)
        for optimizer in optimizers:
            optimizer.step()
    test = parities(bits, asked).to(Here.device)                    # (asked, 2 * bits + 1)
    with torch.no_grad():
        predicted = model.gpt(test[:, :-1])[0].argmax(-1)
    right = (predicted == test[:, 1:])[:, bits:].float()            # (asked, bits)
    return {"whole answer": right.prod(1).mean().item(),
            **{f"token {i}": r for i, r in enumerate(right.mean(0).tolist(), 1)}}


# ----------------------------------------------------------------------------------------------
# The parts. Each yields rows: a label, and the names of the pieces, one per seed, that hold its
# numbers. A label may come several times, with other numbers.

def flops(options):
    """Floating-point operations of a training step with these options of train.py, forward and
    backward, as PyTorch counts them. -> (while the heads warm up, afterwards)"""
    return count_flops(tuple(options))


@lru_cache(maxsize=None)
def count_flops(options):
    """The same for a tuple, which can be kept: every seed asks again."""
    args = train.parse_args([*options, "--device", "cpu"])
    train.check_args(args)
    with torch.device("meta"):
        gpt = GPT(GPTConfig(args.block_size, 257, args.n_layer, args.n_head, args.n_embd))
        heads = HeadsConfig(args.offsets, args.head_kind, args.head_layers, whs=args.whs)
        model = MultiTokenGPT(gpt, heads)
        idx = torch.zeros(args.batch_size, args.block_size + 1, dtype=torch.long)
    found = {}
    for lr_scale in {0, args.backbone_lr}:
        model.gpt.requires_grad_(lr_scale > 0)
        with FlopCounterMode(display=False) as counter:
            joint_loss(model, idx, {} if lr_scale else {1: 0}, backward=True)
        found[lr_scale] = counter.get_total_flops()
    return found[0], found[args.backbone_lr]


class Study:
    """The pieces of one size, shared by its parts.

    Every recipe may spend the same compute on adding heads to a base: floating-point operations
    of the model, without the optimizer's. The unit is what three resblock heads cost when they
    are trained from scratch along with a backbone, on as much text as a base reads. A model that
    is trained from scratch gets the compute of a base and of adding heads together.
    """

    def __init__(self, size):
        self.size, self.pieces = size, {}                           # {name: Piece}
        ntp, mtp = (size.steps * flops(self.options(offsets=o))[1] for o in ("1", MTP))
        self.added = size.adaptation * (mtp - ntp)
        self.total = ntp + self.added

    def options(self, shape=None, offsets="1", **more):
        """Options of train.py."""
        size = self.size
        sizes = dict(batch_size=size.batch_size, block_size=size.block_size)
        flags = ["--offsets", offsets]
        for key, value in {**(shape or size.base)._asdict(), **sizes, **more}.items():
            flags += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
        return flags

    def add(self, name, function, arguments, needs=(), alone=False):
        """Add a piece unless it is there. -> its name"""
        self.pieces.setdefault(name, Piece(name, function, arguments, tuple(needs), alone))
        return name

    def run(self, name, seed, compute=None, steps=None, warm_up=0.0, init=None, data="python",
            own=None, **options):
        """A training run of `steps` steps, or of so much `compute`, of which the fraction
        `warm_up` goes to the heads alone. Starts from the run `init`; trains on a corpus, or on
        the corpus `own` of this study. -> the piece's name"""
        options = self.options(**options, lr=self.size.lr / 2 if init else self.size.lr)
        if compute:
            frozen, joint = flops(options)
            alone = round(warm_up * compute / frozen)
            steps = alone + round((1 - warm_up) * compute / joint)
            options += ["--head-warmup", str(alone)] if alone else []
        options += ["--steps", str(steps), "--warmup", str(min(100, steps // 8)),
                    "--eval-every", str(max(1, steps // 4)), "--seed", str(seed)]
        name = f"{name}-s{seed}"
        arguments = dict(name=name, options=options, init=init, data=f"data/{data}", own=own)
        return self.add(name, train_run, arguments, [n for n in (init, own) if n])

    def base(self, seed, shape=None, data="python"):
        """The next-token model of a shape, a corpus and a seed."""
        shape = shape or self.size.base
        name = f"ntp-{data}-{shape.n_layer}x{shape.n_embd}"
        return self.run(name, seed, steps=self.size.steps, shape=shape, data=data)

    def scratch(self, name, offsets, seed):
        """Heads and backbone from scratch, with the compute of a base and its adaptation."""
        return self.run(name, seed, compute=self.total, offsets=offsets)

    def joint(self, name, seed, offsets="1,2,3,4", **options):
        """Heads on a base (offsets "1": only more training), with the compute of an adaptation."""
        return self.run(name, seed, compute=self.added, init=self.base(seed), offsets=offsets,
                        **options)

    def two_stages(self, name, seed, offsets):
        """L-MTP's recipe on a base, with the compute of an adaptation. First the heads alone, on
        text that the base wrote (writing it is not counted); then everything, on the corpus, with
        a weight of 0.1 on the heads' losses."""
        base, own = self.base(seed), f"own-s{seed}"
        self.add(own, own_text, dict(name=own, run=base, tokens=self.size.own_tokens, seed=seed),
                 [base])
        first = self.run(f"{name}-stage1", seed, compute=0.3 * self.added, init=base, own=own,
                         offsets=offsets, backbone_lr=0)
        return self.run(f"{name}-stage2", seed, compute=0.7 * self.added, init=first,
                        offsets=offsets, backbone_lr=0.1, head_weight=0.1)

    def measured(self, function, run, **arguments):
        """A measurement of a run. -> the piece's name"""
        name = f"{function.__name__}-{run}"
        return self.add(name, function, dict(run=run, **arguments), [run], function is speed)

    def foresight(self, run):
        """What a run knows about later tokens. -> the piece's name"""
        return self.measured(foresee, run, windows=self.size.windows)


def scale(study):
    """Paper A, claims 1 and 2: what NTP models know about later tokens, by size and by text."""
    for shape in study.size.ladder:
        runs = [study.base(s, shape) for s in SEEDS]
        yield f"python, {shape.n_layer} x {shape.n_embd}", [study.foresight(r) for r in runs]
    for data in ("shakespeare", "multi30k"):
        runs = [study.base(s, TEXTS, data) for s in SEEDS]
        yield f"{data}, {TEXTS.n_layer} x {TEXTS.n_embd}", [study.foresight(r) for r in runs]


MTP, LEAP2, LEAP3 = "1,2,3,4", "1,3,5,7", "1,4,7,10"
METHODS = (("MTP", "mtp", MTP), ("leap k=2", "leap2", LEAP2), ("leap k=3", "leap3", LEAP3))


def layers(study):
    """Paper A, claim 3: what each layer knows, in a next-token model and in one with heads."""
    how = dict(windows=study.size.windows, probe_steps=study.size.probe_steps)
    yield "NTP", [study.measured(read_layers, study.base(s), **how) for s in SEEDS]
    yield "MTP", [study.measured(read_layers, study.scratch("mtp", MTP, s), **how) for s in SEEDS]


RECIPES = {                                                         # label: options of train.py
    "frozen, resblock heads": dict(backbone_lr=0),
    "frozen, transformer layer": dict(backbone_lr=0, head_kind="block"),
    "frozen, 2 transformer layers": dict(backbone_lr=0, head_kind="block", head_layers=2),
    "frozen, 4 transformer layers": dict(backbone_lr=0, head_kind="block", head_layers=4),
    "frozen, WHS": dict(backbone_lr=0, whs=True),
    "joint, weight 0.1": dict(head_weight=0.1),
    "joint, weight 0.3": dict(head_weight=0.3),
    "joint, weight 1": dict(),
    "+ differential rates": dict(backbone_lr=0.1),
    "+ head warm-up": dict(backbone_lr=0.1, warm_up=0.3),
    "+ WHS": dict(backbone_lr=0.1, warm_up=0.3, whs=True),
}


def adapt(study):
    """Paper A, claims 3 to 6: how to add heads to a next-token model, at equal compute."""
    yield "NTP, marginalised", [study.foresight(study.base(s)) for s in SEEDS]
    more = [study.joint("ntp-trained-on", s, offsets="1") for s in SEEDS]
    yield "NTP, trained on", [study.foresight(r) for r in more]
    for label, options in RECIPES.items():
        name = label.replace("+ ", "joint ").replace(", ", "-").replace(" ", "-")
        yield label, [study.foresight(study.joint(name, s, **options)) for s in SEEDS]
    yield "from scratch", [study.foresight(study.scratch("mtp", MTP, s)) for s in SEEDS]


def leap(study):
    """Paper B: adjacent heads against as many leaping ones; L-MTP's two stages against one."""
    def both(label, runs, offsets):
        offsets, prompts = tuple(map(int, offsets.split(","))), study.size.prompts
        yield label, [study.measured(draft, r, offsets=offsets, prompts=prompts) for r in runs]
        yield label, [study.foresight(r) for r in runs]
    for label, name, offsets in METHODS:
        runs = [study.scratch(name, offsets, s) for s in SEEDS]
        yield from both(label, runs, offsets)
        yield label, [study.measured(speed, r, prompts=8) for r in runs]
    gentle = dict(backbone_lr=0.1, head_weight=0.1)                 # as in the second stage
    stages = {
        "one stage": [study.joint("leap2-joint", s, LEAP2) for s in SEEDS],
        "one gentle stage": [study.joint("leap2-joint-gently", s, LEAP2, **gentle) for s in SEEDS],
        "two stages": [study.two_stages("leap2", s, LEAP2) for s in SEEDS]}
    for label, runs in stages.items():
        yield from both(f"leap k=2 on a base, {label}", runs, LEAP2)


def planning(study):
    """A task that needs planning by construction: next-token training against more heads."""
    how = dict(bits=study.size.plan_bits, steps=study.size.plan_steps)
    for label, offsets in (("NTP", "1"), ("MTP", MTP), ("leap k=2", LEAP2)):
        name, offsets = f"plan-{label.replace(' ', '-')}", tuple(map(int, offsets.split(",")))
        yield label, [study.add(f"{name}-s{s}", plan, dict(offsets=offsets, seed=s, **how))
                      for s in SEEDS]


def backbone(study):
    """What heads do to the next-token model itself, from scratch, at equal text and compute."""
    steps = round(study.total / flops(study.options(offsets=MTP))[1])  # of MTP
    if steps == study.size.steps:                                   # as at adaptation 1
        same_text = [study.base(s) for s in SEEDS]
    else:
        same_text = [study.run("ntp-same-text", s, steps=steps) for s in SEEDS]
    yield "NTP, same text", [study.foresight(r) for r in same_text]
    same_compute = [study.run("ntp-same-compute", s, study.total) for s in SEEDS]
    yield "NTP, same compute", [study.foresight(r) for r in same_compute]
    for label, name, offsets in METHODS:
        yield label, [study.foresight(study.scratch(name, offsets, s)) for s in SEEDS]


def headline(study):
    """The fastest decoder for held-out code: 8 bytes at once, and the tree that is fastest here.
    With a context twice as long, and as much text in a batch."""
    size = study.size
    run = study.run("mtp8", SEEDS[0], study.total, offsets="1,2,3,4,5,6,7,8",
                    block_size=2 * size.block_size, batch_size=size.batch_size // 2)
    yield "MTP, 8 bytes", [study.measured(speed, run, prompts=size.prompts, trees=True)]


PARTS = {f.__name__: f for f in (scale, layers, adapt, leap, planning, backbone, headline)}


def behind(names, pieces):
    """These names, and those of all pieces that they need, in an order in which they can run."""
    found = {}
    for name in names:
        found |= dict.fromkeys([*behind(pieces[name].needs, pieces), name])
    return list(found)


def table(rows, pieces, done):
    """Rows as a part yields them -> [{label, values: {name of a number: one per seed}, train:
    {run: its options} of the first seed}]"""
    found = {}
    for label, names in rows:
        row = found.setdefault(label, dict(label=label, values={}, train={}))
        for piece in (pieces[n] for n in behind(names[:1], pieces)):
            if piece.function is train_run:
                how = piece.arguments
                options = ["--data", how["own"] or how["data"], *how["options"]]
                options += ["--init", how["init"]] if how["init"] else []
                row["train"][piece.name] = " ".join(options)
        for key in done[names[0]]["result"]:
            row["values"][key] = [done[n]["result"][key] for n in names]
    return list(found.values())


def circumstances(rows, pieces, done):
    """The environment of the last piece behind these rows, and the seconds that all pieces behind
    them took, one after the other: {"side by side": those that share the cores, "alone": those
    that measure time}."""
    names = behind([n for _, names in rows for n in names], pieces)
    taken = {"side by side": 0.0, "alone": 0.0}
    for name in names:
        taken["alone" if pieces[name].alone else "side by side"] += done[name]["seconds"]
    return dict(environment=max((done[n]["environment"] for n in names), key=lambda e: e["date"]),
                seconds={kind: round(seconds) for kind, seconds in taken.items()})


# ----------------------------------------------------------------------------------------------
# The command line

def parse_args(argv=None):
    """The command line as a namespace."""
    p = Parser(
        prog="study.py",
        description="Try both papers' claims on small models: train them, measure them, write the "
                    "results. It can be stopped at any time; the same command continues it.",
        epilog="parts: " + "; ".join(
            f"{name}: {part.__doc__.splitlines()[0]}" for name, part in PARTS.items()))
    p.add_argument("--size", choices=list(SIZES), default="full",
                   help="quick: 25 minutes on 2 CPU cores; patient: the same models, trained five "
                   "times as long; full: for one large GPU")
    p.add_argument("--quick", dest="size", action="store_const", const="quick", default=SUPPRESS,
                   help="the same as --size quick")
    p.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", default=list(PARTS),
                   help="only these parts: %(choices)s")
    p.add_argument("--jobs", type=int, default=SUPPRESS,
                   help="pieces that run side by side (default: one per CPU core, at most 8)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--folder", default=SUPPRESS, metavar="FOLDER",
                   help="for the models and the pieces' results (default: runs/study-SIZE)")
    p.add_argument("--results", default=str(ROOT / "experiments" / "results"), metavar="FOLDER",
                   help="for study_SIZE_PART.json")
    p.add_argument("--list", action="store_true",
                   help="only list the pieces, and which of them are done")
    return p.parse_args(argv)


def write_results(folder, name, rows, study, done):
    """Write the result file of every part whose pieces are all done."""
    for part, part_rows in rows.items():
        if part_rows and all(n in done for _, names in part_rows for n in names):
            write_whole(folder / f"study_{name}_{part}.json", json.dumps(dict(
                part=part, size=name,
                command=f"python experiments/study.py --size {name} --only {part}",
                **circumstances(part_rows, study.pieces, done), settings=asdict(study.size),
                seeds=SEEDS, rows=table(part_rows, study.pieces, done)), indent=1) + "\n")


def main(argv=None):
    """Run the study."""
    args = parse_args(argv)
    with one_line_errors("study.py", memory="--jobs"):
        name, device = args.size, pick_device(args.device)
        if name == "full" and device.type == "cpu":
            print("the full study takes days without a GPU; try --quick", file=sys.stderr)
        jobs = getattr(args, "jobs", min(8, os.cpu_count()))
        if jobs < 1:
            raise InputError("--jobs must be at least 1")
        results = Path(args.results).resolve()
        if not os.access(results, os.W_OK):
            raise InputError(f"--results {args.results} is not a writable folder")
        folder = Path(getattr(args, "folder", ROOT / "runs" / f"study-{name}")).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(ROOT)                                              # the corpora are in data/
        study = Study(SIZES[name])
        rows = {part: list(PARTS[part](study)) for part in PARTS if part in args.only}
        done = done_of(folder, study.pieces.values())
        if args.list:
            for piece in study.pieces:
                print(f"{'done' if piece in done else '':5}{piece}")
            return
        to_time = [p for p in study.pieces.values() if p.alone and p.name not in done]
        if to_time and not can_compile(device):
            print("torch.compile does not work here, so speeds are not measured", file=sys.stderr)
            study.pieces = {n: p for n, p in study.pieces.items() if not p.alone}
            for part, some in rows.items():
                rows[part] = [(label, names) for label, names in some if names[0] in study.pieces]
        pieces = list(study.pieces.values())
        for data in sorted({p.arguments["data"] for p in pieces if p.function is train_run}):
            if not (ROOT / data / "meta.json").exists():
                prepare(Path(data).name)
            Corpus(data)                                            # raises if it is damaged
        signal.signal(signal.SIGTERM, signal.default_int_handler)   # as Ctrl-C
        try:
            do_all(pieces, folder, device, jobs)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command continues") from None
        finally:                                                    # also of a stopped study
            write_results(results, name, rows, study, done_of(folder, pieces))
        print(f"next: python experiments/findings.py --size {name}")


if __name__ == "__main__":
    main()
