"""What every command line here needs: devices, one-line errors, progress, files, checkpoints.

Nothing here is about multi-token prediction. Look up what you need.
"""
import argparse
import io
import os
import platform
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from data.loader import Corpus
from data.prepare import CorpusError, get_tokenizer
from heads import HeadsConfig, MultiTokenGPT
from model import GPT, GPT2_NAMES, GPTConfig, InputError, load_tensors, require

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these in each of its processes
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name):
    """"auto", "cpu", "cuda", "cuda:1" or "mps" -> torch.device. Raises InputError."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:  # torchrun: one device per process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with suppress(RuntimeError, AssertionError):
        if torch.device(name).type in ("cpu", "cuda", "mps"):
            return torch.empty(0, device=name).device
    raise InputError(f"device {name!r} is not available here; try --device cpu")


def cpu_name():
    """What Linux calls the CPU; elsewhere its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (names or [platform.machine()])[0]


def environment(device):
    """What a measurement depends on, for result files."""
    cuda = device.type == "cuda"
    return dict(torch=torch.__version__, python=platform.python_version(), device=str(device),
                device_name=torch.cuda.get_device_name(device) if cuda else cpu_name(),
                threads=torch.get_num_threads(), date=time.strftime("%Y-%m-%d"))


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
    2; `memory` names what to lower when memory runs out. Numbers that are not finite end it with
    status 1, Ctrl-C with 130. Bugs keep their traceback."""
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
    except FloatingPointError as error:
        message, status = f"{script}: {error}", 1
    except KeyboardInterrupt as error:
        message, status = str(error) or "stopped", 130
    say(message, file=sys.stderr)
    sys.exit(status)


def print_rank_0(*what, **how):
    """print, in the first process of torchrun only."""
    if RANK == 0:
        print(*what, **how)


class Progress(tqdm):
    """tqdm's bar on a terminal; elsewhere, as in a log, a line every `every` seconds."""
    every = 10.0

    def __init__(self, iterable=None, show=True, leave=False, **how):
        self.terminal, self.shown = sys.stderr.isatty(), time.monotonic()
        if not self.terminal:  # tqdm's own writing goes nowhere
            how |= dict(file=io.StringIO(), bar_format="{l_bar} {n_fmt}/{total_fmt} {unit}s, "
                        "{elapsed} gone, {remaining} to go, {rate_fmt}{postfix}")
        show = show and RANK == 0
        super().__init__(iterable, leave=leave, dynamic_ncols=True, disable=not show, **how)

    def display(self, msg=None, pos=None):
        """Called by tqdm whenever there is something new to show."""
        if self.terminal:
            super().display(msg, pos)
        elif time.monotonic() - self.shown >= self.every:
            self.shown = time.monotonic()
            print(self, file=sys.stderr, flush=True)


def check_output(option, path):
    """Raise InputError if the file that an option names cannot be written."""
    if path:
        require(not Path(path).is_dir(), f"--{option} {path} is a folder; name a file")
        require(os.access(Path(path).parent, os.W_OK),
                f"--{option} {path}: the folder is missing or cannot be written to")


# ----------------------------------------------------------------------------------------------
# Files: results, checkpoints, and the corpus that belongs to a checkpoint

@contextmanager
def whole_file(path):
    """A binary file to write, which at every moment is either the old one or the whole new one:
    a file beside it, flushed to the disk, then renamed."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path, text):
    """Write a text file that is never half-written."""
    with whole_file(path) as f:
        f.write(text.encode())


def save_checkpoint(path, model, **state):
    """Write the model and `state` (step, optimizers, ...) to a file. Raises OSError; the old
    checkpoint then stays."""
    state |= dict(model=model.state_dict(), gpt_config=asdict(model.gpt.config),
                  heads_config=asdict(model.heads_config))
    try:
        with whole_file(path) as f:
            torch.save(state, f)
    except (OSError, RuntimeError) as error:  # torch's zip writer: RuntimeError
        kept = "; the previous one is kept" if Path(path).exists() else ""
        reason = str(error).splitlines()[0]
        raise OSError(f"cannot save a checkpoint to {path}{kept}: {reason}") from None


def load_checkpoint(path):
    """A run folder or a checkpoint file -> (MultiTokenGPT on the CPU, dict of the other state).

    Never runs code from the file. Raises InputError if it is missing, damaged or foreign."""
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    require(path.is_file(), f"no checkpoint at {path}; make one: python train.py --out RUN")
    state = load_tensors(path, "a checkpoint of train.py")
    try:
        gpt = GPT(GPTConfig(**state["gpt_config"]))
        model = MultiTokenGPT(gpt, HeadsConfig(**state["heads_config"]))
        model.load_state_dict(state.pop("model"))
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is not a checkpoint of this train.py; train it again "
                         f"({reason})") from None
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
    require(name, f"{path} does not say which tokenizer it was trained with")
    return get_tokenizer(name)


def corpus_of(path, model, state, data=None):
    """The corpus `data`, or else the one that the model from load_model(path) was trained on.
    Raises InputError and CorpusError, also if it has another tokenizer."""
    data = data or state.get("args", {}).get("data")
    require(data, f"{path} does not say what it was trained on; name a corpus with --data")
    corpus, size = Corpus(data), model.gpt.config.vocab_size
    found, wanted = corpus.meta["tokenizer"], state.get("tokenizer", "")
    require(wanted in ("", found) and corpus.vocab_size == size,
            f"{corpus.folder} has {corpus.vocab_size} {found} tokens, {path} knows {size} "
            f"{wanted} tokens; prepare the corpus with another --tokenizer")
    return corpus
