"""What every command line here needs: devices, progress, result files, one-line errors, checkpoints and the corpus that
belongs to one.

Read what you need: nothing here is about multi-token prediction.
"""
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
from data.prepare import CorpusError
from heads import HeadsConfig, MultiTokenGPT
from model import GPT, GPT2_NAMES, GPTConfig, InputError


class Diverged(Exception):
    """The loss or the weights became NaN or infinite."""


def pick_device(name):
    """"auto", "cpu", "cuda", "cuda:1", "mps" -> torch.device. Raises InputError when it is not there."""
    if (name == "auto" or name.startswith("cuda")) and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"                           # torchrun: a device for each process
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(name).type in ("cpu", "cuda", "mps"):
            return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        pass
    raise InputError(f"device {name!r} is not available here; try --device cpu")


class Progress(tqdm):
    """tqdm's bar on a terminal; elsewhere, as in a log file, a line every `every` seconds. Both on stderr."""
    every = 10.0

    def __init__(self, iterable=None, show=True, **how):
        self.terminal, self.shown = sys.stderr.isatty(), time.monotonic()
        how["desc"] = f"{how['desc']}: " if "desc" in how else ""           # as set_description has it
        if not self.terminal:                                               # what tqdm itself writes goes nowhere
            how.update(file=io.StringIO(), bar_format="{desc}{n_fmt}/{total_fmt} {unit}s, {elapsed} gone, {remaining} "
                       "to go, {rate_fmt}{postfix}", miniters=1)
        super().__init__(iterable, **{"leave": False, "dynamic_ncols": True, "disable": not show, **how})

    def display(self, msg=None, pos=None):
        """Called by tqdm whenever there is something new to show."""
        if self.terminal:
            return super().display(msg, pos)
        if time.monotonic() - self.shown >= self.every:
            self.shown = time.monotonic()
            print(self, file=sys.stderr, flush=True)
        return True


def check_output(option, path):
    """Raise InputError when the file that an option names cannot be written."""
    if path and Path(path).is_dir():
        raise InputError(f"--{option} {path} is a folder; name a file")
    if path and not os.access(Path(path).parent, os.W_OK):
        raise InputError(f"--{option} {path} cannot be written: no such folder, or not a writable one")


def write_whole(path, text):
    """Write a text file so that it is whole or not there."""
    part = Path(f"{path}.part")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def environment(device):
    """What a measurement depends on, for result files."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return dict(torch=torch.__version__, python=platform.python_version(), device=str(device), device_name=name,
                threads=torch.get_num_threads(), date=datetime.date.today().isoformat())


@contextmanager
def one_line_errors(script, memory):
    """Run the body of a command line. What a user can mend is one line on stderr and status 2; `memory` says what to
    lower where memory is short. A run that diverged has status 1, one that was stopped 130; bugs keep their traceback.
    """
    try:
        yield
    except (InputError, CorpusError, OSError) as error:
        message, status, same = f"{script}: error: {error}", 2, True
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        message, status, same = f"{script}: error: not enough memory; lower {memory}", 2, False
    except Diverged as error:
        message, status, same = f"{script}: {error}", 1, True
    except KeyboardInterrupt as error:
        message, status, same = str(error) or "stopped", 130, True
    else:
        return
    (say_once if same else print)(message, file=sys.stderr)
    sys.exit(status)


def say_once(*what, **how):
    """print, but what all processes of torchrun find, only the first one says."""
    if os.environ.get("RANK", "0") == "0":
        print(*what, **how)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(path, model, **state):
    """Write model and state (step, optimizers, arguments, ...) to `path` so that it is always whole: into a file beside
    it, flushed to the disk, then renamed. Raises OSError when that fails; the previous checkpoint then still stands."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            torch.save(dict(state, model=model.state_dict(), gpt_config=asdict(model.gpt.config),
                            heads_config=asdict(model.heads_config)), f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:                                # torch's zip writer raises RuntimeError
        part.unlink(missing_ok=True)
        kept = "; the previous one is kept" if path.exists() else ""
        raise OSError(f"cannot save a checkpoint to {path}{kept}: {str(error).splitlines()[0]}") from None


def load_checkpoint(path):
    """A run folder or a checkpoint file -> (MultiTokenGPT on the CPU, dict with the rest of the state).

    Loads tensors and plain values only, never code. Raises InputError when it is missing, damaged or foreign.
    """
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}; train one with: python train.py --data data/python --out RUN")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                              # zip, pickle and torch errors of all kinds
        reason = type(error).__name__
        raise InputError(f"{path} is not a checkpoint of train.py, or it is damaged ({reason})") from None
    try:
        model = MultiTokenGPT(GPT(GPTConfig(**state["gpt_config"])), HeadsConfig(**state["heads_config"]))
        model.load_state_dict(state.pop("model"))
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is not a checkpoint of this train.py: {str(error).splitlines()[0]}") from None
    return model, state


def load_model(path):
    """A run or checkpoint of ours, or GPT-2's weights (a name, a folder or a file as in GPT.from_pretrained).
    -> (MultiTokenGPT on the CPU, dict with the rest of a checkpoint's state). Raises InputError when it is neither."""
    file = Path(path)
    if str(path) in GPT2_NAMES or file.suffix in (".safetensors", ".bin") or (file / "config.json").exists():
        return MultiTokenGPT(GPT.from_pretrained(path), HeadsConfig((1,))), {}
    return load_checkpoint(path)


def corpus_of(path, model, state, data=None):
    """The corpus `data`, or the one that the model of load_model(path) was trained on, if there is none. Raises
    InputError and CorpusError, also when it is of another tokenizer."""
    data = data or state.get("args", {}).get("data")
    if not data:
        raise InputError(f"{path} does not say what it was trained on; name a corpus with --data")
    corpus, size = Corpus(data), model.gpt.config.vocab_size
    found, name = corpus.meta["tokenizer"], state.get("tokenizer", "")
    if found != (name or found) or corpus.vocab_size != size:
        raise InputError(f"{corpus.folder} is in {found} tokens, {corpus.vocab_size} of them; {path} knows {size} "
                         f"{name} tokens; prepare it with another --tokenizer")
    return corpus
