"""The study: both papers' claims, tried on models small enough to train here.

    python experiments/study.py --quick                 # everything within 25 minutes on 2 CPU cores
    python experiments/study.py --size patient          # the same models, trained five times as long
    python experiments/study.py                         # larger, for one large GPU
    python experiments/study.py --only adapt leap       # some of its parts
    python experiments/findings.py --size quick         # figures and README table from the results, again

A part of the study asks a few questions of one paper. It consists of *pieces*: a run of train.py, or a measurement of
one. Pieces are functions of their arguments; what one found is kept in a file of the study's folder, so the study can
be stopped (Ctrl-C, kill -9) and continued, and two parts share what both need. A piece is done again when its
arguments, its corpus or what it needs have changed; who changes what a piece *does* removes its file. Pieces run side
by side, a core for each; those that measure time run at the end and alone.

Every row of every table is trained three times, with other initial weights and other batches (the seed), and what is
compared is compared seed by seed. A part ends as experiments/results/study_SIZE_PART.json.

Read: the sizes, pieces, what pieces do, the parts, the command line.
"""
import argparse
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
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train
from common import Progress, environment, load_checkpoint, one_line_errors, pick_device, write_whole
from data.loader import Corpus
from data.prepare import prepare
from decode import Decoder, calibrate, can_compile, chain, compare, held_out_records, write_corpus_of_its_own
from heads import HeadsConfig, MultiTokenGPT, draft_sources, joint_loss
from marginalize import measure, measure_layers, questions, train_probes, unigram
from model import GPT, GPTConfig, InputError

SEEDS = (0, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# The sizes

class Shape(NamedTuple):
    """Of a backbone."""
    n_layer: int
    n_head: int
    n_embd: int


@dataclass
class Size:
    """How large the study is. All else is the same in every size."""
    ladder: tuple                     # backbones, small to large
    base: Shape                       # the one that all parts but the first are about
    steps: int                        # in which a backbone learns to predict the next token
    batch_size: int                   # windows in each
    block_size: int                   # tokens of a window
    lr: float                         # highest learning rate; half of it where heads are added to a backbone
    adaptation: int                   # compute for adding them, in units that Study explains
    windows: int                      # held-out windows, with 16 questions each
    probe_steps: int
    prompts: int                      # for decoding
    own_tokens: int                   # that the backbone writes for L-MTP's first stage
    plan_bits: int                    # of the planning task
    plan_steps: int


TEXTS = Shape(2, 2, 64)               # in every ladder: small enough not to learn the smallest corpus, 1 MB, by heart
SIZES = dict(
    quick=Size(ladder=(Shape(1, 1, 16), Shape(1, 1, 32), TEXTS, Shape(4, 2, 96)), base=Shape(4, 2, 96),
               steps=1200, batch_size=8, block_size=128, lr=1e-2, adaptation=1, windows=64, probe_steps=150,
               prompts=32, own_tokens=60_000, plan_bits=9, plan_steps=1000),
    full=Size(ladder=(TEXTS, Shape(4, 2, 128), Shape(6, 4, 256), Shape(6, 6, 384)), base=Shape(6, 4, 256),
              steps=2000, batch_size=64, block_size=256, lr=5e-3, adaptation=2, windows=128, probe_steps=500,
              prompts=64, own_tokens=500_000, plan_bits=10, plan_steps=2000))
SIZES["patient"] = replace(SIZES["quick"], steps=6000, windows=128, probe_steps=750, own_tokens=300_000)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces

@dataclass
class Piece:
    """Something that is done once: function(**arguments), when all pieces in `needs` are there."""
    name: str
    function: Callable
    arguments: dict
    needs: tuple = ()
    alone: bool = False               # it measures time


class Here:
    """What a process that does pieces knows: the study's folder and the device."""
    folder = device = None


def enter(folder, device, threads):
    """Prepare a process for pieces. Ctrl-C is for the first process, without which this one ends; and for training,
    which then saves."""
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
    """{name: hash of all that a piece's result depends on: its arguments, its corpus and what it needs}"""
    found = {}
    for piece in pieces:                                                    # what is needed comes first
        meta = ROOT / piece.arguments.get("data", "") / "meta.json"
        corpus = json.loads(meta.read_text()) if meta.exists() else {}
        behind = [piece.arguments, [corpus.get(f"{split}_sha256") for split in ("train", "val")],
                  [found[name] for name in piece.needs]]
        found[piece.name] = hashlib.sha256(json.dumps(behind, sort_keys=True).encode()).hexdigest()
    return found


def kept(folder, name):
    """The file in which a piece's result is. Before it is there: only the stamp of what is begun."""
    return folder / f"{name}.json"


def read(file):
    """A file of `kept`; {} if there is none, or a damaged one."""
    try:
        return json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def do(piece, stamp):
    """Do a piece in this process, and keep what it returns. A run or corpus that was begun is gone on with."""
    start, file = time.perf_counter(), kept(Here.folder, piece.name)
    if read(file).get("stamp") != stamp:
        shutil.rmtree(Here.folder / piece.name, ignore_errors=True)         # it came from something else
        write_whole(file, json.dumps(dict(stamp=stamp)))
    with open(Here.folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        result = piece.function(**piece.arguments)
    write_whole(file, json.dumps(dict(
        stamp=stamp, arguments=piece.arguments, seconds=round(time.perf_counter() - start, 1),
        environment=environment(Here.device), result=result)))


def done_of(folder, pieces):
    """{name: what is kept of it} of the pieces that have been done."""
    stored = {name: (stamp, read(kept(folder, name))) for name, stamp in stamps(pieces).items()}
    return {name: found for name, (stamp, found) in stored.items() if found.get("stamp") == stamp and "result" in found}


def do_all(pieces, folder, device, jobs):
    """Do what is not done yet, `jobs` pieces at a time, then alone what measures time. -> done_of"""
    done, stamp = set(done_of(folder, pieces)), stamps(pieces)
    threads = torch.get_num_threads()
    with Progress(total=len(pieces), initial=len(done), desc="study", unit="piece", leave=True) as bar:

        def side_by_side(todo, jobs, threads):
            waiting, running = [p for p in todo if p.name not in done], {}
            with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), enter,
                                     (folder, device, threads)) as pool:
                try:
                    while waiting or running:
                        for piece in [p for p in waiting if set(p.needs) <= done][:jobs - len(running)]:
                            running[pool.submit(do, piece, stamp[piece.name])] = piece.name
                            waiting.remove(piece)
                        bar.set_postfix_str(", ".join(sorted(running.values())))
                        for future in wait(running, return_when=FIRST_COMPLETED).done:
                            future.result()
                            done.add(running.pop(future))
                            bar.update()
                except BaseException:                                       # training saves when it is terminated
                    for child in multiprocessing.active_children():
                        child.terminate()
                    raise
        side_by_side([p for p in pieces if not p.alone], jobs, max(1, threads // jobs))
        side_by_side([p for p in pieces if p.alone], 1, threads)
    return done_of(folder, pieces)


# ---------------------------------------------------------------------------------------------------------------------
# What pieces do. All but the first return {name of a number: number}.

def train_run(name, options, init, data, own):
    """A run of train.py with these options, from another run if that is given, on a corpus, or on one of the study's
    folder, `own`. Goes on where it was stopped."""
    out = Here.folder / name
    options = [*options, "--data", str(Here.folder / own if own else data), "--out", str(out), "--no-progress",
               "--device", str(Here.device)]
    args = train.parse_args(options + (["--init", str(Here.folder / init)] if init else []))
    train.check_args(args)
    model, state = load_checkpoint(out) if (out / "checkpoint.pt").exists() else (None, None)
    if state is None or state["step"] < args.steps:
        train.train(args, model, state)


def load(name):
    """A run of this study and its corpus."""
    model, state = load_checkpoint(Here.folder / name)
    return model.to(Here.device).eval(), Corpus(state["args"]["data"])


def foresee(run, windows, horizon=4):
    """What a model knows of t+1 .. t+4, marginalised and by its own heads, at the same places of held-out text for all;
    and the loss (nats) and accuracy of every offset everywhere in other windows."""
    model, corpus = load(run)
    block_size = model.gpt.config.block_size
    loss, accuracy = train.evaluate(model, corpus.windows("val", windows, block_size + 1), 8)
    asked, position = (t.to(Here.device) for t in questions(corpus, block_size, horizon, windows, 16))
    table = measure(model, asked, position, horizon, unigram(corpus).to(Here.device), 32, progress=False)
    return dict(nats=loss[1], parameters=sum(p.numel() for p in model.gpt.parameters()),
                **{f"accuracy of offset {o}": a for o, a in accuracy.items()},
                **{f"{r['reader']} t+{r['distance']}": r["top1"][0] for r in table},
                **{f"layer weights {o}": shares for o, shares in model.layer_weights().items()})


def read_layers(run, windows, probe_steps):
    """The accuracy of every layer for t+1 and t+2, by the logit lens and by trained probes."""
    model, corpus = load(run)
    asked, position = (t.to(Here.device) for t in questions(corpus, model.gpt.config.block_size, 2, windows, 16))
    probes = train_probes(model.gpt, corpus, (1, 2), probe_steps, progress=False)
    return {f"{r['reader']} t+{r['distance']} layer {r['layer']}": r["top1"][0]
            for r in measure_layers(model.gpt, probes, asked, position)}


def draft(run, offsets, prompts, nodes=15):
    """Tokens per step of a chain and of a tree of as many candidates for all: on real text, greedy and sampled; and the
    papers' formula."""
    model, corpus = load(run)
    length = model.gpt.config.block_size
    ways = {"chain": chain(draft_sources(offsets)),
            "tree": calibrate(model, corpus.windows("val", 64, length + 1)[1::2], nodes, progress=False)["tree"]}
    found = {}
    for way, r in zip(ways, held_out_records(model, corpus, list(ways.values()))):
        found |= {f"real text, {way}": r["tokens_per_step"], f"formula, {way}": r["expected_tokens_per_step"]}
        found |= {f"{way}, candidate at distance {j}": a for j, a in r["acceptance"].items()}
    for kind, way, r in written(model, corpus, ways, prompts, rounds=1, batch_size=32):
        found |= {f"{kind}, {way}": r["tokens_per_step"], f"{kind}, {way}, identical": r["identical"]}
    return found


def written(model, corpus, ways, prompts, **how):
    """`compare` NTP and other ways, {name: tree}, continuing 16 held-out tokens to the end of the context. Yields
    ("greedy" or "sampled", name, record)."""
    methods, length = list(dict.fromkeys([(), *ways.values()])), model.gpt.config.block_size
    records, _ = compare(model, methods, corpus.windows("val", prompts, 16).tolist(), length - 16, (0.0, 1.0),
                         progress=False, **how)
    for i, kind in enumerate(("greedy", "sampled")):
        for way, tree in {"NTP": (), **ways}.items():
            yield kind, way, records[i * len(methods) + methods.index(tree)]


def speed(run, prompts, trees=False):
    """Wall-clock speedup over our own compiled NTP decoder, batch 1: of the chain of all offsets, or also of the tree
    that calibrate finds for this machine and for what the model writes greedily after training text."""
    model, corpus = load(run)
    ways = {"chain": chain(draft_sources(model.offsets))}
    if trees:
        begun = corpus.windows("train", 32, 16).tolist()
        written_on = Decoder(model).generate(begun, model.gpt.config.block_size - 16).tokens
        windows = torch.tensor([a + b for a, b in zip(begun, written_on)])
        ways["tree"] = calibrate(model, windows, compile=True, progress=False)["tree"]
    return {f"compiled, {kind}, {way}, {what}": r[what]
            for kind, way, r in written(model, corpus, ways, prompts, rounds=3, compile=True)
            for what in ("block", "tokens_per_step", "tokens_per_second", "speedup", "identical")} | {
            f"compiled, real text, {way}": held_out_records(model, corpus, [tree])[0]["tokens_per_step"]
            for way, tree in ways.items()}


def own_text(name, run, tokens, seed):
    """A corpus that a model writes itself."""
    model, corpus = load(run)
    write_corpus_of_its_own(model, corpus, Here.folder / name, tokens, batch_size=128, seed=seed, source=run,
                            progress=False)


def parities(n, inputs):
    """The planning task: inputs (count,), numbers of n bits -> (count, 2n + 1) tokens x_1 .. x_n = y_n .. y_1, bits and
    2 for "=", with y_i = x_1 + ... + x_i modulo 2. Backwards: who has read y_(i+1) finds y_i with a glance at x_(i+1),
    but y_n, the first one, takes all."""
    x = inputs[:, None] >> torch.arange(n) & 1
    return torch.cat([x, torch.full((len(x), 1), 2), (x.cumsum(1) % 2).flip(1)], dim=1)


def plan(offsets, seed, bits, steps):
    """Train on the planning task with three quarters of all inputs, and ask for the answers to the others: how often
    each of their tokens is right, given those before it, and all of them."""
    inputs = torch.randperm(2 ** bits, generator=torch.Generator().manual_seed(0))  # for every seed the same quarter
    known, asked = inputs[2 ** bits // 4:], inputs[:2 ** bits // 4]

    def batch(split, batch_size, length, step, seed):
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        return parities(bits, known[torch.randint(len(known), (batch_size,), generator=generator)])
    args = train.parse_args(["--offsets", ",".join(map(str, offsets)), "--steps", str(steps), "--batch-size", "128",
                             "--lr", "2e-3", "--device", str(Here.device), "--seed", str(seed)])
    train.check_args(args)
    torch.manual_seed(seed)
    model = MultiTokenGPT(GPT(GPTConfig(2 * bits, 3, 3, 4, 64)), HeadsConfig(offsets)).to(Here.device)
    optimizers = train.make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    for step in range(steps):
        train.compute_gradients(model, optimizers, SimpleNamespace(batch=batch), step, args, nullcontext)
        for optimizer in optimizers:
            optimizer.step()
    test = parities(bits, asked).to(Here.device)
    with torch.no_grad():
        right = (model.gpt(test[:, :-1])[0].argmax(-1) == test[:, 1:])[:, bits:].float()    # (asked, bits)
    return {"whole answer": right.prod(1).mean().item(),
            **{f"token {i}": r for i, r in enumerate(right.mean(0).tolist(), 1)}}


# ---------------------------------------------------------------------------------------------------------------------
# The parts. Each yields rows: a label and the names of the pieces, one per seed, in which its numbers are. A row may
# come several times, with other numbers.

def flops(options):
    """Floating point operations of a training step with these options of train.py, forward and backward: (while the
    heads warm up, afterwards). Counted on a model without memory, as PyTorch counts them."""
    args = train.parse_args([*options, "--device", "cpu"])
    train.check_args(args)
    with torch.device("meta"):
        model = MultiTokenGPT(GPT(GPTConfig(args.block_size, 257, args.n_layer, args.n_head, args.n_embd)),
                              HeadsConfig(args.offsets, args.head_kind, args.head_layers, whs=args.whs))
        idx = torch.zeros(args.batch_size, args.block_size + 1, dtype=torch.long)
    found = []
    for share in (0, args.backbone_lr):
        model.gpt.requires_grad_(share > 0)
        with FlopCounterMode(display=False) as counter:
            joint_loss(model, idx, {} if share else {1: 0}, backward=True)
        found.append(counter.get_total_flops())
    return tuple(found)


class Study:
    """The pieces of a size, shared by its parts.

    All recipes may spend the same compute (floating point operations of the model; the optimizer's are not counted) on
    adding heads to a base. The unit of it is what three resblock heads cost that are trained from scratch along with a
    backbone, on as much text as a base reads. What is trained from scratch gets the compute of a base and of adding
    heads together.
    """

    def __init__(self, size):
        self.size, self.pieces = size, {}                                   # {name: Piece}
        ntp, mtp = (size.steps * flops(self.options(offsets=o))[1] for o in ("1", MTP))
        self.added = size.adaptation * (mtp - ntp)
        self.total = ntp + self.added

    def options(self, shape=None, offsets="1", **more):
        """Of train.py."""
        size = self.size
        more = {**(shape or size.base)._asdict(), "batch_size": size.batch_size, "block_size": size.block_size, **more}
        flags = [[f"--{k.replace('_', '-')}"] + ([] if v is True else [str(v)]) for k, v in more.items()]
        return ["--offsets", offsets, *sum(flags, [])]

    def add(self, name, function, arguments, needs=(), alone=False):
        """A piece, once. -> its name"""
        self.pieces.setdefault(name, Piece(name, function, arguments, tuple(needs), alone))
        return name

    def run(self, name, seed, compute=None, steps=None, warm_up=0.0, init=None, data="python", own=None, **options):
        """A training run of so many steps, or of so much compute, of which the share `warm_up` is for the heads alone;
        from the run `init`, on a corpus, or on the corpus `own` of this study. -> the piece's name"""
        options = self.options(**options, lr=self.size.lr / 2 if init else self.size.lr)
        if compute:
            frozen, joint = flops(options)
            alone = round(warm_up * compute / frozen)
            steps = alone + round((1 - warm_up) * compute / joint)
            options += ["--head-warmup", str(alone)] if alone else []
        options += ["--steps", str(steps), "--warmup", str(min(100, steps // 8)), "--eval-every",
                    str(max(1, steps // 4)), "--seed", str(seed)]
        name = f"{name}-s{seed}"
        arguments = dict(name=name, options=options, init=init, data=f"data/{data}", own=own)
        return self.add(name, train_run, arguments, [n for n in (init, own) if n])

    def base(self, seed, shape=None, data="python"):
        """The next-token model of a shape, a corpus and a seed."""
        shape = shape or self.size.base
        name = f"ntp-{data}-{shape.n_layer}x{shape.n_embd}"
        return self.run(name, seed, steps=self.size.steps, shape=shape, data=data)

    def scratch(self, name, offsets, seed):
        """Heads and backbone from scratch, with the compute of a base and its adaptation together."""
        return self.run(name, seed, compute=self.total, offsets=offsets)

    def joint(self, name, seed, offsets="1,2,3,4", **options):
        """Heads on a base, or with offsets "1" only more training, with the compute of an adaptation."""
        return self.run(name, seed, compute=self.added, init=self.base(seed), offsets=offsets, **options)

    def two_stages(self, name, seed, offsets):
        """L-MTP's recipe on a base, with the compute of an adaptation: the heads alone, on text that the base has
        written (which is not counted); then all, on the corpus, the heads' losses weighing a tenth."""
        base, own = self.base(seed), f"own-s{seed}"
        self.add(own, own_text, dict(name=own, run=base, tokens=self.size.own_tokens, seed=seed), [base])
        first = self.run(f"{name}-stage1", seed, compute=0.3 * self.added, init=base, own=own, offsets=offsets,
                         backbone_lr=0)
        return self.run(f"{name}-stage2", seed, compute=0.7 * self.added, init=first, offsets=offsets, backbone_lr=0.1,
                        head_weight=0.1)

    def measured(self, function, run, **arguments):
        """A measurement of a run. -> the piece's name"""
        alone = function is speed
        return self.add(f"{function.__name__}-{run}", function, dict(run=run, **arguments), [run], alone)

    def foresight(self, run):
        """What a run knows of later tokens. -> the piece's name"""
        return self.measured(foresee, run, windows=self.size.windows)


def scale(study):
    """Paper A, claims 1 and 2: what next-token models know about later tokens, by their size and by the text."""
    for shape in study.size.ladder:
        yield f"python, {shape.n_layer} x {shape.n_embd}", [study.foresight(study.base(s, shape)) for s in SEEDS]
    for data in ("shakespeare", "multi30k"):
        label = f"{data}, {TEXTS.n_layer} x {TEXTS.n_embd}"
        yield label, [study.foresight(study.base(s, TEXTS, data)) for s in SEEDS]


MTP, LEAP2, LEAP3 = "1,2,3,4", "1,3,5,7", "1,4,7,10"


def layers(study):
    """Paper A, claim 3: what each layer knows, of a model trained for the next token, and of one with heads."""
    how = dict(windows=study.size.windows, probe_steps=study.size.probe_steps)
    yield "NTP", [study.measured(read_layers, study.base(s), **how) for s in SEEDS]
    yield "MTP", [study.measured(read_layers, study.scratch("mtp", MTP, s), **how) for s in SEEDS]


RECIPES = {                                                                 # label: options of train.py
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
    """Paper A, claims 3 to 6: how heads get on a next-token model, with the same compute for each recipe."""
    yield "NTP, marginalised", [study.foresight(study.base(s)) for s in SEEDS]
    yield "NTP, trained on", [study.foresight(study.joint("ntp-trained-on", s, offsets="1")) for s in SEEDS]
    for label, options in RECIPES.items():
        name = label.replace("+ ", "joint ").replace(", ", "-").replace(" ", "-")
        yield label, [study.foresight(study.joint(name, s, **options)) for s in SEEDS]
    yield "from scratch", [study.foresight(study.scratch("mtp", MTP, s)) for s in SEEDS]


def leap(study):
    """Paper B: adjacent against leaping heads, as many and trained as long, and L-MTP's two stages against one."""
    def both(label, runs, offsets):
        offsets = tuple(map(int, offsets.split(",")))
        yield label, [study.measured(draft, r, offsets=offsets, prompts=study.size.prompts) for r in runs]
        yield label, [study.foresight(r) for r in runs]
    for label, name, offsets in (("MTP", "mtp", MTP), ("leap k=2", "leap2", LEAP2), ("leap k=3", "leap3", LEAP3)):
        runs = [study.scratch(name, offsets, s) for s in SEEDS]
        yield from both(label, runs, offsets)
        yield label, [study.measured(speed, r, prompts=8) for r in runs]
    gently = dict(backbone_lr=0.1, head_weight=0.1)                         # as in the second of two stages
    for label, of_seed in (("one stage", lambda s: study.joint("leap2-joint", s, LEAP2)),
                           ("one gentle stage", lambda s: study.joint("leap2-joint-gently", s, LEAP2, **gently)),
                           ("two stages", lambda s: study.two_stages("leap2", s, LEAP2))):
        yield from both(f"leap k=2 on a base, {label}", [of_seed(s) for s in SEEDS], LEAP2)


def planning(study):
    """A task in which looking ahead matters by construction: next-token training against heads that look further."""
    for label, offsets in (("NTP", "1"), ("MTP", MTP), ("leap k=2", LEAP2)):
        yield label, [study.add(f"plan-{label.replace(' ', '-')}-s{s}", plan, dict(
            offsets=tuple(map(int, offsets.split(","))), seed=s, bits=study.size.plan_bits,
            steps=study.size.plan_steps)) for s in SEEDS]


def backbone(study):
    """What heads do to the next-token model itself, from scratch: with the same text, and with the same compute."""
    steps = round(study.total / flops(study.options(offsets=MTP))[1])       # of MTP: at adaptation 1 those of a base
    same = study.base if steps == study.size.steps else lambda s: study.run("ntp-same-text", s, steps=steps)
    yield "NTP, same text", [study.foresight(same(s)) for s in SEEDS]
    yield "NTP, same compute", [study.foresight(study.run("ntp-same-compute", s, study.total)) for s in SEEDS]
    for label, name, offsets in (("MTP", "mtp", MTP), ("leap k=2", "leap2", LEAP2), ("leap k=3", "leap3", LEAP3)):
        yield label, [study.foresight(study.scratch(name, offsets, s)) for s in SEEDS]


def headline(study):
    """The fastest decoder that we have for held-out code: 8 bytes at once, and the tree that is fastest here; in a
    context twice as long, with as much text in a batch."""
    run = study.run("mtp8", SEEDS[0], study.total, offsets="1,2,3,4,5,6,7,8", block_size=2 * study.size.block_size,
                    batch_size=study.size.batch_size // 2)
    yield "MTP, 8 bytes", [study.measured(speed, run, prompts=study.size.prompts, trees=True)]


PARTS = {f.__name__: f for f in (scale, layers, adapt, leap, planning, backbone, headline)}


def behind(names, pieces):
    """Names, and all that these pieces need, in the order in which they can be done."""
    found = {}
    for name in names:
        found |= dict.fromkeys([*behind(pieces[name].needs, pieces), name])
    return list(found)


def table(rows, pieces, done):
    """rows as a part yields them -> [{label, values: {name of a number: one per seed}, train: {run: its options}, of
    the first seed}]"""
    found = {}
    for label, names in rows:
        row = found.setdefault(label, dict(label=label, values={}, train={}))
        for piece in (pieces[n] for n in behind(names[:1], pieces)):
            if piece.function is train_run:
                how = piece.arguments
                source = ["--init", how["init"]] if how["init"] else []
                row["train"][piece.name] = " ".join(["--data", how["own"] or how["data"], *how["options"], *source])
        for key in done[names[0]]["result"]:
            row["values"][key] = [done[n]["result"][key] for n in names]
    return list(found.values())


def circumstances(rows, pieces, done):
    """Where and when these rows' last piece was done, and how long all that is behind them took, one piece after the
    other: {"side by side": those that share the cores, "alone": those that measure time}."""
    names = behind([n for _, names in rows for n in names], pieces)
    taken = {"side by side": 0.0, "alone": 0.0}
    for name in names:
        taken["alone" if pieces[name].alone else "side by side"] += done[name]["seconds"]
    return dict(environment=max((done[n]["environment"] for n in names), key=lambda e: e["date"]),
                seconds={kind: round(seconds) for kind, seconds in taken.items()})


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def parse_args():
    """The command line as a namespace."""
    p = argparse.ArgumentParser(
        prog="study.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Try both papers' claims on small models: train them, measure them, and write results, figures and "
                    "the README's table. It can be stopped at any time; the same command goes on.",
        epilog="parts: " + "; ".join(f"{name}: {f.__doc__.splitlines()[0]}" for name, f in PARTS.items()))
    p.add_argument("--size", choices=list(SIZES), default="full", help="quick: within 25 minutes on 2 CPU cores; "
                   "patient: the same models, trained five times as long; full: for one large GPU")
    p.add_argument("--quick", dest="size", action="store_const", const="quick",
                   default=argparse.SUPPRESS, help="the same as --size quick")
    p.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", default=list(PARTS),
                   help="do these parts only: %(choices)s")
    p.add_argument("--jobs", type=int, default=argparse.SUPPRESS,
                   help="pieces that run side by side (default: one per CPU core, at most 8)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--folder", default=argparse.SUPPRESS, metavar="FOLDER",
                   help="for the models and all that is found (default: runs/study-SIZE)")
    p.add_argument("--results", default=str(ROOT / "experiments" / "results"), metavar="FOLDER",
                   help="for study_SIZE_PART.json")
    p.add_argument("--list", action="store_true", help="only say which pieces there are and which are done")
    p.error = lambda message: p.exit(2, f"study.py: error: {message}\n")
    return p.parse_args()


def main():
    """Do the study; bad input is one line and status 2, a stopped study status 130."""
    args = parse_args()
    with one_line_errors("study.py", memory="--jobs"):
        name, device = args.size, pick_device(args.device)
        if name == "full" and device.type == "cpu":
            print("the full study would take days without a GPU; there is --quick", file=sys.stderr)
        jobs = getattr(args, "jobs", min(8, os.cpu_count()))
        if jobs < 1:
            raise InputError("--jobs must be at least 1")
        results_folder = Path(args.results).resolve()
        if not os.access(results_folder, os.W_OK):
            raise InputError(f"--results {args.results} is not a writable folder")
        folder = Path(getattr(args, "folder", ROOT / "runs" / f"study-{name}")).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(ROOT)                                                      # where data/ is, also for other processes
        study = Study(SIZES[name])
        rows = {part: list(PARTS[part](study)) for part in PARTS if part in args.only}
        done = done_of(folder, study.pieces.values())
        if args.list:
            for piece in study.pieces:
                print(f"{'done' if piece in done else '':5}{piece}")
            return
        if any(p.alone and p.name not in done for p in study.pieces.values()) and not can_compile(device):
            print("torch.compile does not work here, so no speeds are measured", file=sys.stderr)
            study.pieces = {n: p for n, p in study.pieces.items() if not p.alone}
            rows = {part: [row for row in some if row[1][0] in study.pieces] for part, some in rows.items()}
        pieces = list(study.pieces.values())
        for data in sorted({piece.arguments["data"] for piece in pieces if piece.function is train_run}):
            if not (ROOT / data / "meta.json").exists():
                prepare(Path(data).name)
            Corpus(data)                                                    # what is wrong with it is said now
        signal.signal(signal.SIGTERM, signal.default_int_handler)           # as Ctrl-C
        try:
            do_all(pieces, folder, device, jobs)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on") from None
        finally:                                                            # what is complete is written in any case
            done = done_of(folder, pieces)
            for part, part_rows in rows.items():
                if part_rows and all(n in done for _, names in part_rows for n in names):
                    write_whole(results_folder / f"study_{name}_{part}.json", json.dumps(dict(
                        part=part, size=name, command=f"python experiments/study.py --size {name} --only {part}",
                        **circumstances(part_rows, study.pieces, done), settings=asdict(study.size), seeds=SEEDS,
                        rows=table(part_rows, study.pieces, done)), indent=1) + "\n")
        print(f"next: python experiments/findings.py --size {name}")


if __name__ == "__main__":
    main()
