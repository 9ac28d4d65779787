"""What the parts of the study share: its sizes, runs of train.py, and what a run knows.

A run is a folder that train.py wrote, a measurement a JSON file beside it. Both are kept, and made
again when something that they were made from is newer: the rule of make.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train
from common import load_checkpoint, write_whole
from data.loader import Corpus
from marginalize import marginalize, questions

SELECT = 0  # the seed on which the best of several is chosen; it judges nothing


class Shape(NamedTuple):
    """The shape of a backbone."""
    n_layer: int
    n_head: int
    n_embd: int


@dataclass
class Size:
    """How large the study is. Everything else is the same in every size."""
    seeds: tuple            # those that judge
    base: Shape             # the backbone of most parts
    deep: Shape             # "large models specialise early"; None: left out
    steps: int              # to train a base,
    deep_steps: int         # ... the deep one,
    pair_steps: int         # ... one that translates; 0: left out
    adapt: int              # to add heads to it
    frozen_steps: int       # to train heads on a frozen one until they hardly improve
    depths: tuple           # transformer layers per frozen head
    rates: tuple            # learning rates of heads, of which the best is chosen
    bits: tuple             # of the planning task
    patience: int           # steps after which a task is given up
    small: tuple = (Shape(1, 1, 16), Shape(2, 2, 32))  # smaller backbones
    windows: int = 192      # held-out windows...
    positions: int = 32     # ... and positions asked in each


SIZES = dict(
    quick=Size(seeds=(1, 2, 3), base=Shape(3, 2, 64), deep=None, steps=1200, deep_steps=0,
               pair_steps=0, adapt=400, frozen_steps=800, depths=(1, 2), rates=(6e-3, 2e-2),
               bits=(), patience=800),
    patient=Size(seeds=(1, 2, 3, 4, 5), base=Shape(4, 2, 64), deep=Shape(12, 4, 128), steps=4000,
                 deep_steps=2000, pair_steps=3000, adapt=800, frozen_steps=4000,
                 depths=(1, 2, 4), rates=(2e-3, 6e-3, 2e-2), bits=(9, 12, 14, 16),
                 patience=6000))


def flops(shape, heads=0, residual=0, frozen=False, context=128, vocab_size=257):
    """Floating-point operations to train on a token, forward and twice as many backward: of a
    backbone with heads of one transformer layer, or of one residual block. A frozen backbone runs
    forward, and its unembedding passes gradients on to the heads."""
    C = shape.n_embd
    layer, block, unembed = 24 * C * C + 4 * context * C, 2 * C * C, 2 * vocab_size * C
    trunk, added, n = shape.n_layer * layer, heads * layer + residual * block, heads + residual
    if frozen:
        return trunk + 3 * added + 2 * n * unembed
    return 3 * (trunk + added + (1 + n) * unembed)


def newer(path, made_from):
    """Whether a file is there and newer than all that it was made from."""
    times = [p.stat().st_mtime for p in made_from]
    return path.exists() and path.stat().st_mtime >= max(times, default=0)


class Study:
    """Makes the runs and measurements of a size in a folder, and finds those that are there."""

    def __init__(self, size, folder):
        self.size, self.folder = size, Path(folder)

    def run(self, name, seed, init=None, data="python", shape=None, **options):
        """A run of train.py with these options. It starts from the run `init`; `data` is a corpus
        of data/ or a folder. Goes on if it was stopped. -> its folder"""
        out, data = self.folder / f"{name}-s{seed}", ROOT / "data" / data  # or data, if absolute
        steps = options.setdefault("steps", self.size.adapt if init else self.size.steps)
        options = dict(offsets="1", block_size=128, batch_size=8, warmup=max(1, steps // 10),
                       eval_every=500, eval_windows=16, lr=1e-2, seed=seed, data=data, out=out,
                       device="cpu") | (shape or self.size.base)._asdict() | options
        if init:
            options["init"] = init
        argv = ["--no-progress", "--overwrite"]
        for key, value in options.items():
            argv += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
        made_from = [data / "meta.json"] + ([init / "checkpoint.pt"] if init else [])
        if newer(out / "checkpoint.pt", made_from):
            state, args = load_checkpoint(out)[1], train.parse_args(argv)
            train.check_args(args)
            if state["args"] == vars(args):
                if state["step"] < args.steps:
                    train.main(["--resume", str(out), "--no-progress"])
                return out
        train.main(argv)
        return out

    def base(self, seed, data="python", shape=None, **options):
        """The next-token model of a corpus, a shape and a seed."""
        shape = shape or self.size.base
        return self.run(f"ntp-{Path(data).name}-{shape.n_layer}x{shape.n_embd}", seed, data=data,
                        shape=shape, **options)

    def load(self, run, data=None):
        """A run -> its model, and the corpus `data` or else its own"""
        model, state = load_checkpoint(run)
        return model.eval(), Corpus(ROOT / "data" / (data or state["args"]["data"]))

    def measured(self, run, function, **how):
        """function(study, run, **how), kept as JSON beside the run."""
        asked = "-".join([function.__name__, *map(str, how.values())])
        return kept(Path(f"{run}-{asked}.json"), [run / "checkpoint.pt"],
                    lambda: function(self, run, **how))


def kept(file, made_from, function):
    """function(), kept as JSON in `file` until something that it was made from is newer."""
    if not newer(file, made_from):
        write_whole(file, json.dumps(function()))
    return json.loads(file.read_text())


def asked_of(study, run, corpus, block_size):
    """`questions` about t+2: of every second held-out window. A run of the seed that selects is
    asked about the other ones, so a choice has not seen the windows on which it is judged."""
    size, selects = study.size, run.name.endswith(f"-s{SELECT}")
    both = questions(corpus, block_size, 2, 2 * size.windows, size.positions)
    return [tensor[int(selects)::2] for tensor in both]


@torch.no_grad()
def foresee(study, run, marginal=True, data=None):
    """What a run knows about t+1 and t+2, at the same held-out positions for all models of a
    corpus. -> {what: a number per window, the sum over its positions}: "nats", "t+1", "t+2
    marginalised" and "t+2 head" (right ones among the first); "top5 ..." (among the first 5)."""
    model, corpus = study.load(run, data)
    windows, position = asked_of(study, run, corpus, model.gpt.config.block_size)
    parts = []
    for idx, t in zip(windows.split(16), position.split(16)):
        row = torch.arange(len(t))[:, None]
        h = model.hidden_states(idx[:, :-1])
        # {what: (distance, probs (w, P, V))}
        probs = {"t+1": (1, model.offset_logits(h, 1)[row, t].softmax(-1))}
        if marginal:
            probs["t+2 marginalised"] = 2, marginalize(
                model.gpt, idx[:, :int(t.max()) + 1], 2, 32, "beam", t)[0]
        if 2 in model.offsets:
            logits = model.offset_logits(h, 2, next_tokens=idx[:, 1:])
            probs["t+2 head"] = 2, logits[row, t].softmax(-1)
        found = {}
        for what, (distance, p) in probs.items():
            right = p.gather(-1, idx.gather(1, t + distance)[..., None])  # (w, P, 1)
            rank = (p > right).sum(-1)
            found |= {what: (rank < 1).sum(1), f"top5 {what}": (rank < 5).sum(1)}
            if distance == 1:
                found["nats"] = -right[..., 0].log().sum(1)
        parts.append(found)
    whole = {what: torch.cat([part[what] for part in parts]).tolist() for what in parts[0]}
    return whole | dict(nats=np.round(whole["nats"], 2).tolist())
