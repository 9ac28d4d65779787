"""What the parts of the study share: how large it is, its runs of train.py, its held-out text.

A run is a folder that train.py wrote. What is there, with the same options and younger than what
it was made from, is kept; a run that was stopped goes on.
"""
import functools
import json
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import train
from common import load_checkpoint, save_checkpoint, write_results
from data.loader import Corpus, gather
from heads import MultiTokenGPT, accepted_drafts, step_begins
from model import GPT

SELECT = 0   # the seed on which rates and a layer are chosen; its models judge nothing
CONTEXT = 128
PROMPT = 16  # tokens of a window that are given where text is written
CORPORA = ("python", "shakespeare", "logs")


@dataclass
class Size:
    """How large the study is."""
    seeds: tuple      # those that judge
    steps: int        # of models from scratch
    head_steps: int   # of heads on a frozen model
    joint_steps: int  # of joint training, which takes about as long as those
    windows: int      # of held-out text
    prompts: int      # of text to write
    shape: dict = field(default_factory=lambda: dict(n_layer=4, n_head=2, n_embd=64))


SIZES = {"quick": Size((1, 2), 600, 300, 200, 256, 64),
         "full": Size((1, 2, 3, 4, 5), 2000, 1500, 800, 768, 256)}


def fresh(path, *runs):
    """Whether a file is there and younger than the runs that it was made from."""
    return path.exists() and all(
        path.stat().st_mtime > (run / "checkpoint.pt").stat().st_mtime for run in runs)


class Study:
    """Makes the runs of a size in a folder, and keeps what is measured of them."""

    def __init__(self, size, folder):
        self.size = size
        self.folder = Path(folder).resolve()

    def run(self, name, seed, init=None, data="python", recipe=train.recipe, **options):
        """A run of train.py, from scratch or from the run `init`. -> its folder"""
        out = self.folder / re.sub("[ ,]+", "-", f"{name}-{seed}")
        if init is None:
            usual = dict(steps=self.size.steps, block_size=CONTEXT, **self.size.shape)
        else:
            usual = dict(steps=self.size.head_steps, init=str(init))
        usual |= dict(lr=1e-2, offsets="1", dtype="float32", device="cpu", progress=False,
                      data=str(ROOT / "data" / data), out=str(out), seed=seed)
        args = train.make_parser().parse_args([])  # train.py's defaults
        assert options.keys() <= vars(args).keys(), options
        vars(args).update(usual | options)
        args.warmup = args.steps // 10
        args.eval_every = args.steps
        train.check_args(args)
        begun = ()
        if fresh(out / "checkpoint.pt", *[init] if init else []):
            model, state = load_checkpoint(out)
            if state["args"] == vars(args):
                if state["step"] == args.steps:
                    return out
                begun = model, state | dict(changed={})
        before = train.recipe
        train.recipe = recipe
        try:
            train.train(args, *begun)
        finally:
            train.recipe = before
        return out

    def base(self, seed, data="python"):
        """The next-token model of a corpus. The smaller corpora are soon learnt."""
        steps = self.size.steps if data == "python" else self.size.steps * 6 // 10
        return self.run(f"ntp-{data}", seed, data=data, steps=steps)

    def first_layers(self, run, n):
        """A run with the first n layers of another one's backbone, its embeddings and its final
        norm. Of no layers: with one layer that adds nothing."""
        out = run.with_name(f"{run.name}-first-{n}")
        if fresh(out / "checkpoint.pt", run):
            return out
        model, state = load_checkpoint(run)
        gpt = GPT(replace(model.gpt.config, n_layer=max(n, 1)))
        gpt.load_state_dict(model.gpt.state_dict(), strict=False)
        for name, p in gpt.named_parameters():
            if n == 0 and "c_proj" in name:
                torch.nn.init.zeros_(p)
        out.mkdir(exist_ok=True)
        save_checkpoint(out / "checkpoint.pt", MultiTokenGPT(gpt, model.heads_config), **state)
        return out

    def measure(self, run, measures):
        """What measures, functions of a model and a text, find of a run. -> {name: sums by file}"""
        model, state = load_checkpoint(run)
        text = held_out(state["args"]["data"], self.size.windows)
        found = {}
        for measure in measures:
            found |= measure(model, text)
        return found

    def read(self, name):
        """What is kept under a name."""
        return json.loads((self.folder / f"{name}.json").read_text())

    def keep(self, name, find, *runs):
        """Keep what find() finds of some runs in NAME.json, unless it is there. (Delete that to
        find it anew.) -> it"""
        path = self.folder / f"{name}.json"
        if not fresh(path, *runs):
            write_results(path, find())
        return self.read(name)


# ---- Held-out text ---------------------------------------------------------------------------

@dataclass
class Text:
    """Held-out windows (W, CONTEXT + 1) int64 of a corpus, and the number of the file that each
    comes from (W,) int64. Windows of one file are alike: files are what a bootstrap draws."""
    corpus: Corpus
    windows: torch.Tensor
    files: torch.Tensor

    def by_file(self, values):
        """One number per window (W,) -> their sums by file, a list"""
        return [round(x, 4) for x in self.files.bincount(values.double()).tolist()]


@functools.cache
def held_out(folder, n):
    """Up to n windows without overlap, evenly spread, of a corpus. A window whose second half,
    which is what is asked, stands in the training text as well is left out. Where text is not
    divided into ten files, its stretches count as such. -> Text"""
    corpus = Corpus(folder)
    T = CONTEXT + 1
    n = min(n, len(corpus.val) // T)
    starts = np.linspace(0, len(corpus.val) - T, n, dtype=int)
    windows = gather(corpus.val, starts, T)
    train_bytes = np.asarray(corpus.train).tobytes()
    halves = windows[:, T // 2:].numpy().astype("<u2")
    new = torch.tensor([half.tobytes() not in train_bytes for half in halves])
    ends = np.flatnonzero(np.asarray(corpus.val) == corpus.tokenizer.eot_token)
    files = np.searchsorted(ends, starts) if len(ends) > 9 else np.arange(n) * 40 // n
    return Text(corpus, windows[new], torch.from_numpy(files)[new])


def chain_steps(model, text, offsets=None):
    """In how many steps offsets (None: the model's) write each window but for its prompt (W,)"""
    accepted = accepted_drafts(model, offsets or model.offsets, text.windows[:, :-1])
    return step_begins(accepted, PROMPT - 1).sum(1)
