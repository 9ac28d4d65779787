"""Read a prepared corpus: memory-mapped tokens, random batches for training, fixed windows.

A batch is a few slices of one array, which costs less than handing it between worker processes,
so there is no Dataset and no DataLoader. It is a function of (seed, step) and the split, so a
run resumed at step 1000 sees the batches of an uninterrupted one.
"""
import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from data.prepare import InputError, get_tokenizer, require


class Corpus:
    """A prepared corpus, as in Corpus("data/python").

    folder       absolute Path of the corpus
    meta         the content of meta.json
    tokenizer    tiktoken.Encoding; its .eot_token ends each document
    vocab_size   number of token ids, including end-of-text
    train, val   the tokens, np.memmap of uint16, (number of tokens,)

    Raises InputError if the folder is missing or damaged, or if its tokenizer is unknown.
    """

    def __init__(self, folder):
        self.folder = Path(folder).resolve()
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            self.tokenizer = get_tokenizer(self.meta["tokenizer"])
            self.vocab_size = self.tokenizer.n_vocab
            self.train, self.val = map(self._open, ("train", "val"))
        except Exception as error:
            raise InputError(f"cannot read the corpus {self.folder} ({error!r}): make it with "
                             "data/prepare.py, and with --force if it is damaged")

    def _open(self, split):
        tokens = np.memmap(self.folder / f"{split}.bin", "<u2", "r")
        require(len(tokens) == self.meta[f"{split}_tokens"],
                f"{split}.bin has not the length that meta.json says")
        require(tokens.max() < self.vocab_size, f"{split}.bin has ids beyond the vocabulary")
        return tokens

    def batch(self, split, batch_size, length, step, seed=0):
        """Random windows of "train" or "val", int64 (batch_size, length), fixed by the arguments.

        A window holds inputs and targets: T positions that predict up to d tokens ahead need T + d
        tokens. Windows start anywhere and may cross documents.
        Raises InputError if the split is shorter than `length`.
        """
        tokens = self._tokens(split, length)
        rng = np.random.default_rng([seed, step, split == "val"])
        return gather(tokens, rng.integers(0, len(tokens) - length + 1, batch_size), length)

    def windows(self, split, count, length):
        """The same `count` windows every time, evenly spaced over a split, int64 (count, length).

        The first starts the split, the last ends it. They overlap if count * length exceeds it.
        Raises InputError if the split is shorter than `length`.
        """
        tokens = self._tokens(split, length)
        return gather(tokens, np.linspace(0, len(tokens) - length, count, dtype=int), length)

    def fingerprint(self):
        """The SHA-256 of the training tokens, which stays the same when the folder moves."""
        return hashlib.sha256(self.train).hexdigest()

    def _tokens(self, split, length):
        tokens = getattr(self, split)
        require(1 <= length <= len(tokens),
                f"a window of {length} tokens does not fit into the {len(tokens)} of {split} in "
                f"{self.folder}: use a shorter context or a larger corpus")
        return tokens


def gather(tokens, starts, length):
    """tokens[start : start + length] for each of `starts` (B,) -> int64 (B, length)."""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)]).long()
