"""Shared by the tests: small models, a corpus, a trained run, and how to call a command line."""
import importlib
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data.prepare import prepare
from heads import HeadsConfig, MultiTokenGPT
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)  # these tensors are too small to share

QUICK = ("--batch-size 4 --warmup 2 --eval-windows 4 --device cpu --dtype float32 "
         "--no-progress").split()
TINY = [*QUICK, *"--n-layer 2 --n-head 2 --n-embd 32 --block-size 32".split()]


@torch.no_grad()
def tiny_gpt(seed=0, **config):
    """A GPT with two layers and weights large enough that it has opinions."""
    torch.manual_seed(seed)
    shape = dict(block_size=64, vocab_size=31, n_layer=2, n_head=2, n_embd=32)
    gpt = GPT(GPTConfig(**{**shape, **config}))
    for p in gpt.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return gpt.eval()


@torch.no_grad()
def tiny_model(offsets=(1, 2, 3, 4, 5, 7), kind="resblock", untrained=False, seed=0, n_layer=1,
               whs=False, sequential=False, gpt=None, **config):
    """tiny_gpt (or `gpt`) with heads: as they start (untrained), or moved as if by training."""
    heads_config = HeadsConfig(offsets, kind, n_layer, whs, sequential)
    model = MultiTokenGPT(gpt or tiny_gpt(seed, **config), heads_config)
    for p in [] if untrained else model.heads.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def command(script, *arguments):
    """Call main(argv) of a script in this process. -> its returncode, stdout and stderr"""
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    out = io.StringIO()
    err = io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
    return SimpleNamespace(returncode=status or 0, stdout=out.getvalue(), stderr=err.getvalue())


def process(*arguments):
    """Run `python ARGUMENTS...` in the project's folder. -> CompletedProcess with text output"""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)


def assert_one_line_error(result, *words):
    """The contract for bad input: status 2, one line on stderr with `words`, no traceback."""
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert all(word in result.stderr for word in words), result.stderr


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small prepared corpus, as bytes."""
    folder = tmp_path_factory.mktemp("data")
    functions = [f"def f{i}(x):\n    return x * {i} + {i * i % 17}\n\n" for i in range(600)]
    (folder / "code.txt").write_text("".join(functions))
    return prepare(str(folder / "code.txt"), out=folder / "corpus")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, corpus):
    """A run of train.py: 120 steps, offsets 1,2,3,4,5,7."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    options = ["--data", corpus, "--out", out, "--offsets", "1,2,3,4,5,7", "--steps", 120]
    result = command("train.py", *options, *TINY)
    assert result.returncode == 0, result.stderr
    return out
