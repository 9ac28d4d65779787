"""What every command line needs, to be looked up: devices, one-line errors, files, checkpoints."""
import argparse
import json
import os
import platform
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from data.loader import Corpus
from data.prepare import InputError, require
from heads import HeadsConfig, MultiTokenGPT
from model import GPT, GPT2_N_HEAD, GPTConfig, load_tensors


# ---- Devices, and what a measurement depends on ----------------------------------------------

def pick_device(name):
    """"auto", "cpu", "cuda", "cuda:1" or "mps" -> torch.device. Raises InputError."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # "meta" has no numbers
        return probe.device
    except (RuntimeError, AssertionError, ImportError):
        raise InputError(f"device {name!r} is not available here; try --device cpu") from None


def has_native_bfloat16(device):
    """Whether the hardware multiplies in bfloat16: GPUs since Ampere, CPUs with AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def can_compile(device):
    """Whether torch.compile works here, found out by trying: it needs a C++ compiler, ..."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
        return device.type != "mps"  # there it is a prototype
    except Exception:  # of whatever kind
        return False


def clock(device):
    """The time in seconds, once the device has done all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def environment(device):
    """What a measurement depends on, for result files."""
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")  # what Linux calls the CPU
    pattern = r"cpu family\s*: (.*)\nmodel\s*: (.*)\nmodel name\s*: (.*)"
    if cpuinfo.exists() and (found := re.search(pattern, cpuinfo.read_text())):
        name = "{2} (family {0}, model {1})".format(*found.groups())
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return dict(
        command=" ".join(sys.argv),
        torch=torch.__version__,
        device=str(device),
        device_name=name,
        threads=torch.get_num_threads(),
        date=time.strftime("%Y-%m-%d"))


# ---- Command lines ---------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse whose --help shows the defaults and whose errors are one line. A `group` that is set
    takes the options that follow."""

    def option(self, name, default, help, least=0, **options):
        """Add --name: a switch, or of its default's type; a number from `least` on."""
        kind = options.pop("type", type(default))

        def number(text):
            value = kind(text)
            if not least <= value < 2 ** 63:
                raise argparse.ArgumentTypeError(f"{text} is not a number from {least} on")
            return value
        if default is False:
            options["action"] = "store_true"
        elif default is not None:
            help += " (default: %(default)s)"
        if kind in (int, float):
            options["type"] = number
        group = getattr(self, "group", self)
        group.add_argument(f"--{name}", default=default, help=help, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


@contextmanager
def one_line_errors(script):
    """Run the body of a command line. An error that the user can fix is one line on stderr and
    status 2, numbers that are not finite status 1, Ctrl-C 130. A bug keeps its traceback. Output
    that the terminal cannot show is replaced; a closed pipe ends the program silently."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def end(status, message):
        print(f"{script}: {message}", file=sys.stderr)
        sys.exit(status)
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout once more at exit
        sys.exit(141)
    except (InputError, OSError) as error:
        end(2, f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        if "allocate" not in str(error) and not isinstance(error, MemoryError):
            raise
        end(2, f"error: not enough memory for this model, batch or length ({str(error)[:80]!r})")
    except FloatingPointError as error:
        end(1, error)
    except KeyboardInterrupt as error:
        end(130, str(error) or "stopped")


def progress_bar(iterable=None, show=True, **options):
    """tqdm's bar on a terminal; elsewhere, as in a log, a line every ten seconds."""
    terminal = sys.stderr.isatty()
    if not terminal:
        options |= dict(mininterval=10, bar_format="{l_bar}{n_fmt}/{total_fmt} {unit}s, {elapsed} "
                        "gone, {remaining} to go{postfix}\n")
    return tqdm(iterable, disable=not show, leave=not terminal, dynamic_ncols=True, **options)


# ---- Files: results, checkpoints, and the corpus that belongs to a checkpoint ----------------

def check_output(path):
    """Raise InputError, before the work, if the file of results cannot be written."""
    if path:
        path = Path(path)
        replaceable = path.is_file() or not path.exists()  # a device is not
        require(path.parent.is_dir() and os.access(path.parent, os.W_OK) and replaceable,
                f"{path} cannot be written: it is no file, or its folder is missing or read-only")


@contextmanager
def atomic_write(path):
    """A binary file to write, which at every moment is either the old one or the whole new one."""
    path = Path(path).resolve()  # a link stays
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_results(path, results):
    """Write results as JSON, if there is a path."""
    if path:
        with atomic_write(path) as f:
            f.write(json.dumps(results, indent=1).encode() + b"\n")


def save_checkpoint(path, model, **state):
    """Write the model and `state` (step, ...). Raises OSError; the old checkpoint then stays."""
    state |= dict(
        model=model.state_dict(),
        gpt_config=asdict(model.gpt.config),
        heads_config=asdict(model.heads_config))
    try:
        with atomic_write(path) as f:
            torch.save(state, f)
    except (OSError, RuntimeError) as error:  # PyTorch's zip writer: RuntimeError
        raise OSError(f"cannot save {path} (is there space on the disk?); what was there stays: "
                      f"{str(error).splitlines()[0]}") from None


def load_checkpoint(path):
    """A run folder or a checkpoint file -> (MultiTokenGPT on the CPU in eval mode, dict of the
    other state). Never runs code from the file. Raises InputError."""
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    require(path.is_file(), f"no checkpoint at {path}; make one: python train.py --out RUN")
    state = load_tensors(path)
    try:
        gpt = GPT(GPTConfig(**state["gpt_config"]))
        model = MultiTokenGPT(gpt, HeadsConfig(**state["heads_config"]))
        model.load_state_dict(state.pop("model"))
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is not a checkpoint of this train.py; train it again "
                         f"({reason})") from None
    return model.eval(), state


def load_model(path):
    """A run of train.py, or a GPT-2 (what GPT.from_pretrained takes) -> (MultiTokenGPT on the CPU
    in eval mode, dict of a checkpoint's other state). Raises InputError."""
    path = Path(path)
    weights = path.suffix in (".safetensors", ".bin") or (path / "config.json").exists()
    if weights or str(path) in GPT2_N_HEAD and not path.exists():
        gpt = GPT.from_pretrained(str(path))
        return MultiTokenGPT(gpt, HeadsConfig((1,))).eval(), {}
    model, state = load_checkpoint(path)
    state.pop("optimizers", None)  # large, and of no use but for training
    return model, state


def tokenizer_name(model, state):
    """Which tokenizer a model from load_model was trained with: "bytes" or "gpt2"."""
    return state.get("tokenizer", "bytes" if model.gpt.config.vocab_size == 257 else "gpt2")


def corpus_of(path, model, state, data=None):
    """The corpus `data`, or else the one that the model from load_model(path) was trained on.
    Raises InputError, also if it has another tokenizer."""
    data = data or state.get("args", {}).get("data")
    require(data, f"{path} does not say what it was trained on; name a corpus with --data")
    corpus = Corpus(data)
    found = corpus.tokenizer.name
    wanted = tokenizer_name(model, state)
    size = model.gpt.config.vocab_size
    require(wanted == found and corpus.vocab_size <= size, f"{corpus.folder} has {found} tokens, "
            f"{path} knows {size} {wanted} tokens; prepare the corpus with --tokenizer {wanted}")
    return corpus
