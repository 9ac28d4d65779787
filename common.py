"""What every command line here needs: devices, progress, result files, one-line errors,
checkpoints, corpora.

Nothing here is about multi-token prediction. Look up what you need.
"""
import argparse
import datetime
import io
import os
import platform
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from data.loader import Corpus
from data.prepare import CorpusError, get_tokenizer
from heads import HeadsConfig, MultiTokenGPT
from model import GPT, GPT2_NAMES, GPTConfig, InputError, load_tensors


class Diverged(Exception):
    """The loss or the weights became NaN or infinite."""


def pick_device(name):
    """"auto", "cpu", "cuda", "cuda:1" or "mps" -> torch.device. Raises InputError."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:  # torchrun: one device per process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if torch.device(name).type in ("cpu", "cuda", "mps"):
            return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        pass
    raise InputError(f"device {name!r} is not available here; try --device cpu")


def environment(device):
    """What a measurement depends on, for result files."""
    cuda = device.type == "cuda"
    return dict(torch=torch.__version__, python=platform.python_version(), device=str(device),
                device_name=torch.cuda.get_device_name(device) if cuda else platform.machine(),
                threads=torch.get_num_threads(), date=datetime.date.today().isoformat())


# ----------------------------------------------------------------------------------------------
# Command lines

class Parser(argparse.ArgumentParser):
    """argparse whose --help shows the defaults and whose errors are one line."""

    def __init__(self, **how):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, **how)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


@contextmanager
def one_line_errors(script, memory):
    """Run the body of a command line. What a user can mend becomes one line on stderr and status
    2; `memory` names what to lower when memory runs out. A diverged run exits with status 1, a
    stopped one with 130. Bugs keep their traceback."""
    say = print_rank_0
    try:
        return (yield)
    except (InputError, CorpusError, OSError) as error:
        message, status = f"{script}: error: {error}", 2
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not out_of_memory and "allocate memory" not in str(error):
            raise
        message, status = f"{script}: error: not enough memory; lower {memory}", 2
        say = print  # any rank may find this
    except Diverged as error:
        message, status = f"{script}: {error}", 1
    except KeyboardInterrupt as error:
        message, status = str(error) or "stopped", 130
    say(message, file=sys.stderr)
    sys.exit(status)


def print_rank_0(*what, **how):
    """print, in the first process of torchrun only."""
    if os.environ.get("RANK", "0") == "0":
        print(*what, **how)


class Progress(tqdm):
    """tqdm's bar on a terminal; elsewhere, as in a log, a line every `every` seconds."""
    every = 10.0

    def __init__(self, iterable=None, show=True, **how):
        self.terminal, self.shown = sys.stderr.isatty(), time.monotonic()
        how["desc"] = f"{how['desc']}: " if "desc" in how else ""
        if not self.terminal:  # tqdm's own writing goes nowhere
            how.update(file=io.StringIO(), miniters=1, bar_format="{desc}{n_fmt}/{total_fmt} "
                       "{unit}s, {elapsed} gone, {remaining} to go, {rate_fmt}{postfix}")
        super().__init__(iterable, **dict(leave=False, dynamic_ncols=True, disable=not show) | how)

    def display(self, msg=None, pos=None):
        """Called by tqdm whenever there is something new to show."""
        if self.terminal:
            return super().display(msg, pos)
        if time.monotonic() - self.shown >= self.every:
            self.shown = time.monotonic()
            print(self, file=sys.stderr, flush=True)
        return True


def check_output(option, path):
    """Raise InputError if the file that an option names cannot be written."""
    if path and Path(path).is_dir():
        raise InputError(f"--{option} {path} is a folder; name a file")
    if path and not os.access(Path(path).parent, os.W_OK):
        raise InputError(f"--{option} {path}: the folder is missing or cannot be written to")


def write_whole(path, text):
    """Write a text file so that it is either whole or absent."""
    part = Path(f"{path}.part")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------
# Checkpoints, and the corpus that belongs to one

def save_checkpoint(path, model, **state):
    """Write the model and `state` (step, optimizers, ...) to a file that is whole at every
    moment: into a file beside it, flushed to the disk, then renamed. Raises OSError; the old
    checkpoint then stays."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    state |= dict(model=model.state_dict(), gpt_config=asdict(model.gpt.config),
                  heads_config=asdict(model.heads_config))
    try:
        with open(part, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer: RuntimeError
        part.unlink(missing_ok=True)
        kept = "; the previous one is kept" if path.exists() else ""
        reason = str(error).splitlines()[0]
        raise OSError(f"cannot save a checkpoint to {path}{kept}: {reason}") from None


def load_checkpoint(path):
    """A run folder or a checkpoint file -> (MultiTokenGPT on the CPU, dict of the other state).

    Never runs code from the file. Raises InputError if it is missing, damaged or foreign."""
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}; make one: python train.py --out RUN")
    state = load_tensors(path, "a checkpoint of train.py")
    try:
        gpt = GPT(GPTConfig(**state["gpt_config"]))
        model = MultiTokenGPT(gpt, HeadsConfig(**state["heads_config"]))
        model.load_state_dict(state.pop("model"))
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is not a checkpoint of this train.py: {reason}") from None
    return model, state


def load_model(path):
    """A run of train.py, or GPT-2 weights (what GPT.from_pretrained takes). -> (MultiTokenGPT on
    the CPU in eval mode, dict of a checkpoint's other state). Raises InputError."""
    file = Path(path).suffix in (".safetensors", ".bin")
    if file or str(path) in GPT2_NAMES or (Path(path) / "config.json").exists():
        return MultiTokenGPT(GPT.from_pretrained(path), HeadsConfig((1,))).eval(), {}
    model, state = load_checkpoint(path)
    return model.eval(), state


def tokenizer_of(path, model, state):
    """The tokenizer of a model from load_model. Raises InputError if nothing says which it is."""
    by_size = {257: "bytes", 50257: "gpt2"}
    name = state.get("tokenizer") or by_size.get(model.gpt.config.vocab_size)
    if name is None:
        raise InputError(f"{path} does not say which tokenizer it was trained with")
    return get_tokenizer(name)


def corpus_of(path, model, state, data=None):
    """The corpus `data`, or else the one that the model from load_model(path) was trained on.
    Raises InputError and CorpusError, also if it has another tokenizer."""
    data = data or state.get("args", {}).get("data")
    if not data:
        raise InputError(f"{path} does not say what it was trained on; name a corpus with --data")
    corpus, size = Corpus(data), model.gpt.config.vocab_size
    found, wanted = corpus.meta["tokenizer"], state.get("tokenizer", "")
    if found != (wanted or found) or corpus.vocab_size != size:
        raise InputError(f"{corpus.folder} has {corpus.vocab_size} {found} tokens, {path} knows "
                         f"{size} {wanted} tokens; prepare the corpus with another --tokenizer")
    return corpus


def import_pyplot():
    """matplotlib.pyplot. Raises InputError if matplotlib, an optional package, is missing."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("figures need matplotlib: pip install -e '.[experiments]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot
