"""Shared by the tests: small models, and how to run a command line."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heads import HeadsConfig, MultiTokenGPT
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)                                                    # tensors here are too small to share


def tiny_gpt(seed=0, **config):
    """A GPT with two layers and weights large enough that it has opinions."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(**{**dict(block_size=64, vocab_size=31, n_layer=2, n_head=2, n_embd=32), **config}))
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return gpt.eval()


def tiny_model(offsets=(1, 2, 3, 4, 5, 7), kind="resblock", untrained=False, seed=0, n_layer=1, own=False, gpt=None,
               whs=False, **config):
    """tiny_gpt (or `gpt`) with heads: as they start (untrained), or moved at random, as training would move them."""
    model = MultiTokenGPT(gpt or tiny_gpt(seed, **config), HeadsConfig(offsets, kind, n_layer, own, whs))
    if not untrained:
        with torch.no_grad():
            for p in [*model.heads.parameters(), *model.unembeddings.parameters(), *model.mixes.parameters()]:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def command(*arguments, **options):
    """Run `python ARGUMENTS...` in the project's folder. -> CompletedProcess with text output."""
    env = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, text=True, capture_output=True, env=env,
                          timeout=300, **options)


def assert_one_line_error(result, *words):
    """The contract for bad input: status 2, one line on stderr that holds `words`, no traceback."""
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small prepared corpus, as bytes."""
    from data.prepare import prepare
    folder = tmp_path_factory.mktemp("data")
    text = "".join(f"def f{i}(x):\n    return x * {i} + {i * i % 17}\n\n" for i in range(600))
    (folder / "code.txt").write_text(text)
    return prepare(str(folder / "code.txt"), out=folder / "corpus")


TINY = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "32", "--batch-size", "4", "--warmup", "2",
        "--eval-windows", "4", "--device", "cpu", "--dtype", "float32", "--no-progress"]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, corpus):
    """A run of train.py: 120 steps, offsets 1,2,3,4,5,7."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    result = command("train.py", "--data", corpus, "--out", out, "--offsets", "1,2,3,4,5,7", "--steps", 120, *TINY)
    assert result.returncode == 0, result.stderr
    return out
