"""Read a prepared corpus: memory-mapped tokens, random batches for training, fixed windows for validation.

There is no Dataset, no DataLoader and no worker process: a batch is a few slices of one array, which costs
less than handing it between processes. Nor is there an iterator with a state: a batch is a function of (seed,
step, rank) and the split. So a run resumed at step 1000 sees what an uninterrupted one sees, and ranks need
not talk.
"""
import json
from pathlib import Path

import numpy as np
import torch

from data.prepare import ROOT, CorpusError, get_tokenizer

SPLITS = ("train", "val")


class Corpus:
    """A prepared corpus, memory-mapped: Corpus("data/python"), or Corpus("python") for one of the project's own.

    folder       Path of the corpus
    meta         what meta.json says
    tokenizer    tiktoken.Encoding; its .eot_token ends each document
    vocab_size   number of token ids, end-of-text included
    train, val   the tokens, np.memmap of uint16, (number of tokens,)

    Raises CorpusError when the folder is missing, damaged, or made with an unknown tokenizer.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.exists() and (ROOT / "data" / folder / "meta.json").exists():
            self.folder = ROOT / "data" / folder
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            name, self.vocab_size = self.meta["tokenizer"], self.meta["vocab_size"]
            counts = {split: self.meta[f"{split}_tokens"] for split in SPLITS}
            if not all(isinstance(count, int) and count > 0 for count in counts.values()):
                raise ValueError("token counts must be positive integers")
        except OSError:
            raise CorpusError(f"no corpus in {self.folder} (no readable meta.json): make one first, "
                              "e.g. python data/prepare.py python") from None
        except (ValueError, LookupError, TypeError) as error:
            raise CorpusError(f"{self.folder / 'meta.json'} is damaged ({type(error).__name__}: {error}): "
                              "make the corpus again with data/prepare.py --force") from None
        self.tokenizer = get_tokenizer(name)
        if self.vocab_size != self.tokenizer.n_vocab:
            raise CorpusError(f"{self.folder} says {self.vocab_size} token ids but {name} has "
                              f"{self.tokenizer.n_vocab}: make the corpus again with data/prepare.py --force")
        for split, count in counts.items():
            path = self.folder / f"{split}.bin"
            size = path.stat().st_size if path.is_file() else 0
            if size != 2 * count:
                raise CorpusError(f"{path} has {size} bytes, meta.json promises {count} tokens of 2 bytes: "
                                  "make the corpus again with data/prepare.py --force")
        # Mapped once and kept: the system's page cache does the rest.
        self.train = np.memmap(self.folder / "train.bin", dtype="<u2", mode="r")
        self.val = np.memmap(self.folder / "val.bin", dtype="<u2", mode="r")

    def batch(self, split, batch_size, length, step, seed=0, rank=0):
        """Random windows of `split` ("train" or "val"), int64 (batch_size, length), fixed by the arguments.

        A window holds inputs and targets: to predict up to d tokens ahead at T positions, ask for T + d.
        Windows start anywhere and may cross documents.
        Raises CorpusError for an unknown split or one shorter than `length`.
        """
        tokens = self._tokens(split, length)
        rng = np.random.default_rng([seed, step, rank, SPLITS.index(split)])
        return gather(tokens, rng.integers(0, len(tokens) - length + 1, size=batch_size), length)

    def windows(self, split, count, length):
        """The same `count` windows every time, evenly spaced over `split`, int64 (count, length).

        The first starts the split, the last ends it; they overlap when count * length exceeds the split.
        Raises CorpusError for an unknown split or one shorter than `length`.
        """
        tokens = self._tokens(split, length)
        return gather(tokens, np.linspace(0, len(tokens) - length, count).astype(np.int64), length)

    def _tokens(self, split, length):
        if split not in SPLITS:
            raise CorpusError(f"unknown split {split!r}: use train or val")
        tokens = self.train if split == "train" else self.val
        if not 1 <= length <= len(tokens):
            raise CorpusError(f"a window of {length} tokens does not fit into the {len(tokens)} of {split} "
                              f"in {self.folder}: use a shorter context or a larger corpus")
        return tokens


def gather(tokens, starts, length):
    """tokens[start : start + length] for each of `starts` (B,), as an int64 tensor (B, length)."""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))
