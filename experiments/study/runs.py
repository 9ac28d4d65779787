"""What the parts of the study share: how large it is, its runs of train.py, its held-out text.

A run is a folder that train.py wrote. A run that is there, with the same options and younger than
what it was made from, is kept; one that was stopped goes on.
"""
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import train
from common import load_checkpoint, save_checkpoint
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
    positions: int = 8   # in each, where a model is marginalised
    prompts: int = 256   # of text to write
    shape: dict = field(default_factory=lambda: dict(n_layer=4, n_head=2, n_embd=64))


SIZES = {"quick": Size((1, 2), 600, 300, 200, 256, prompts=64),
         "full": Size((1, 2, 3, 4, 5), 2000, 1500, 800, 768)}


@contextmanager
def trained_for(offset):
    """Within, train.py trains everything for one offset alone: another `recipe`."""
    before = train.recipe
    if offset is not None:
        train.recipe = lambda args, offsets, step: (
            {o: float(o == offset) for o in offsets}, 1.0)
    try:
        yield
    finally:
        train.recipe = before


class Study:
    """Makes the runs of a size in a folder."""

    def __init__(self, size, folder):
        self.size = size
        self.folder = Path(folder).resolve()
        self.texts = {}

    def run(self, name, seed, init=None, data="python", only=None, **options):
        """A run of train.py, from scratch or from the run `init`; with only=2 it is trained for
        offset 2 alone. -> its folder"""
        out = self.folder / f"{name}-{seed}"
        if init is None:
            options = dict(steps=self.size.steps, block_size=CONTEXT, **self.size.shape) | options
        else:
            options = dict(init=init, steps=self.size.head_steps) | options
        options.setdefault("warmup", options["steps"] // 10)
        options = dict(lr=1e-2, batch_size=8, offsets="1", eval_every=options["steps"],
                       dtype="float32", device="cpu", data=ROOT / "data" / data, out=out,
                       seed=seed) | options
        argv = ["--no-progress", "--overwrite"]
        for key, value in options.items():
            argv += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
        args = train.make_parser().parse_args(argv)
        train.check_args(args)
        made = out / "checkpoint.pt"
        if made.exists() and (init is None
                              or made.stat().st_mtime > (init / "checkpoint.pt").stat().st_mtime):
            state = load_checkpoint(out)[1]
            if state["args"] | dict(resume=None) == vars(args):
                if state["step"] < args.steps:
                    argv = ["--resume", str(out), "--no-progress"]
                else:
                    return out
        with trained_for(only):
            train.main(argv)
        return out

    def base(self, seed, data="python"):
        """The next-token model of a corpus. The smaller corpora are soon learnt."""
        if data == "python":
            return self.run(f"ntp-{data}", seed)
        return self.run(f"ntp-{data}", seed, data=data, steps=self.size.steps * 6 // 10)

    def first_layers(self, run, n):
        """A run with the first n layers of another one's backbone, its embeddings and its final
        norm. Of no layers: with one layer that adds nothing."""
        out = run.with_name(f"{run.name}-first-{n}")
        made = out / "checkpoint.pt"
        if made.exists() and made.stat().st_mtime > (run / "checkpoint.pt").stat().st_mtime:
            return out
        model, state = load_checkpoint(run)
        weights = model.gpt.state_dict()
        gpt = GPT(replace(model.gpt.config, n_layer=max(n, 1)))
        gpt.load_state_dict({name: weights[name] for name in gpt.state_dict()})
        if n == 0:
            for name, p in gpt.named_parameters():
                if "c_proj" in name:
                    torch.nn.init.zeros_(p)
        out.mkdir(exist_ok=True)
        save_checkpoint(made, MultiTokenGPT(gpt, model.heads_config), **state)
        return out

    def corpus(self, run):
        """The corpus of a run."""
        return Corpus(load_checkpoint(run)[1]["args"]["data"])

    def text(self, run):
        """The held-out text of a run's corpus. -> Text"""
        corpus = self.corpus(run)
        if corpus.folder not in self.texts:
            self.texts[corpus.folder] = held_out(corpus, self.size.windows)
        return self.texts[corpus.folder]


def load(run):
    """A run's model."""
    return load_checkpoint(run)[0].eval()


# ---- Held-out text ---------------------------------------------------------------------------

@dataclass
class Text:
    """Held-out windows (W, CONTEXT + 1) int64, and the number of the file that each comes from
    (W,) int64. Windows of one file are alike: files are what a bootstrap draws."""
    windows: torch.Tensor
    files: torch.Tensor

    def by_file(self, values):
        """One number per window (W,) -> their sums by file, a list"""
        sums = torch.zeros(int(self.files.max()) + 1, dtype=torch.double)
        sums.index_add_(0, self.files, values.double())
        return [round(x, 4) for x in sums.tolist()]

    def counts(self):
        """How many windows each file has."""
        return [int(n) for n in self.files.bincount()]


def held_out(corpus, n):
    """Up to n windows without overlap, evenly spread. A window whose second half, which is what is
    asked, stands in the training text as well is left out. Where text is not divided into ten
    files, its stretches count as such. -> Text"""
    T = CONTEXT + 1
    n = min(n, len(corpus.val) // T)
    starts = np.linspace(0, len(corpus.val) - T, n, dtype=int)
    windows = gather(corpus.val, starts, T)
    train_bytes = np.asarray(corpus.train).tobytes()
    halves = windows[:, T // 2:].numpy().astype("<u2")
    new = torch.tensor([half.tobytes() not in train_bytes for half in halves])
    ends = np.flatnonzero(np.asarray(corpus.val) == corpus.tokenizer.eot_token)
    files = np.searchsorted(ends, starts) if len(ends) > 9 else np.arange(n) * 40 // n
    return Text(windows[new], torch.from_numpy(files)[new])


# ---- Steps through real text -----------------------------------------------------------------

def chain_steps(model, text, offsets=None):
    """In how many steps offsets (None: the model's) write each window but for its prompt (W,)"""
    windows = text.windows[:, :-1]
    accepted = accepted_drafts(model, offsets or model.offsets, windows)
    return step_begins(accepted, PROMPT - 1).sum(1)
