"""Read a prepared corpus: memory-mapped tokens, random batches for training, fixed windows.

A batch is a few slices of one array, which costs less than handing it between worker processes,
so there is no Dataset and no DataLoader. It is a function of (seed, step) and the split, so a
run resumed at step 1000 sees the batches of an uninterrupted one.
"""
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.prepare import ROOT, CorpusError, get_tokenizer

SPLITS = ("train", "val")


class Corpus:
    """A prepared corpus: Corpus("data/python"), or Corpus("python") for a folder of data/.

    folder       Path of the corpus
    meta         the content of meta.json
    tokenizer    tiktoken.Encoding; its .eot_token ends each document
    vocab_size   number of token ids, including end-of-text
    train, val   the tokens, np.memmap of uint16, (number of tokens,)

    Raises CorpusError if the folder is missing or damaged, or if its tokenizer is unknown.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.exists() and (ROOT / "data" / folder / "meta.json").exists():
            self.folder = ROOT / "data" / folder
        again = "make the corpus again with data/prepare.py --force"
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            name, self.vocab_size = self.meta["tokenizer"], self.meta["vocab_size"]
            counts = {split: self.meta[f"{split}_tokens"] for split in SPLITS}
            if not all(isinstance(count, int) and count > 0 for count in counts.values()):
                raise ValueError("token counts must be positive integers")
        except OSError:
            raise CorpusError(f"no corpus in {self.folder} (no readable meta.json): make one "
                              "first, e.g. python data/prepare.py python") from None
        except (ValueError, LookupError, TypeError) as error:
            raise CorpusError(f"{self.folder / 'meta.json'} is damaged "
                              f"({type(error).__name__}: {error}): {again}") from None
        self.tokenizer = get_tokenizer(name)
        if self.vocab_size != self.tokenizer.n_vocab:
            raise CorpusError(f"{self.folder} has {self.vocab_size} token ids but {name} has "
                              f"{self.tokenizer.n_vocab}: {again}")
        for split, count in counts.items():
            path = self.folder / f"{split}.bin"
            size = path.stat().st_size if path.is_file() else 0
            if size != 2 * count:
                raise CorpusError(f"{path} has {size} bytes, but meta.json promises {count} "
                                  f"tokens of 2 bytes: {again}")
        self.train = np.memmap(self.folder / "train.bin", dtype="<u2", mode="r")
        self.val = np.memmap(self.folder / "val.bin", dtype="<u2", mode="r")

    def batch(self, split, batch_size, length, step, seed=0):
        """Random windows of "train" or "val", int64 (batch_size, length), fixed by the arguments.

        A window holds inputs and targets: T positions that predict up to d tokens ahead need T + d
        tokens. Windows start anywhere and may cross documents.
        Raises CorpusError for an unknown split, or one shorter than `length`.
        """
        tokens = self._tokens(split, length)
        # The 0 has no meaning, but without it old runs would resume with other batches.
        rng = np.random.default_rng([seed, step, 0, SPLITS.index(split)])
        starts = rng.integers(0, len(tokens) - length + 1, size=batch_size)
        return gather(tokens, starts, length)

    def windows(self, split, count, length):
        """The same `count` windows every time, evenly spaced over `split`, int64 (count, length).

        The first starts the split, the last ends it. They overlap if count * length exceeds it.
        Raises CorpusError for an unknown split, or one shorter than `length`.
        """
        tokens = self._tokens(split, length)
        starts = np.linspace(0, len(tokens) - length, count).astype(np.int64)
        return gather(tokens, starts, length)

    def predicted(self, tokens):
        """Which tokens (..., L) of this corpus are to be predicted -> bool (..., L).

        All of them, except in multi30k. There, lines are English<TAB>German<NEWLINE>, and only the
        German half and its newline count. What precedes the first separator counts as English.
        """
        if self.meta.get("source") != "multi30k":
            return torch.ones_like(tokens, dtype=torch.bool)
        tab, newline = (self.tokenizer.encode_ordinary(c)[0] for c in "\t\n")
        index = torch.arange(1, 1 + tokens.shape[-1])
        last_tab = torch.where(tokens == tab, index, 0).cummax(-1).values
        last_newline = torch.where(tokens == newline, index, 0).cummax(-1).values
        return F.pad(last_tab > last_newline, (1, 0))[..., :-1]  # as seen from the next token

    def _tokens(self, split, length):
        if split not in SPLITS:
            raise CorpusError(f"unknown split {split!r}: use train or val")
        tokens = self.train if split == "train" else self.val
        if not 1 <= length <= len(tokens):
            raise CorpusError(f"a window of {length} tokens does not fit into the {len(tokens)} "
                              f"of {split} in {self.folder}: use a shorter context or a larger "
                              "corpus")
        return tokens


def gather(tokens, starts, length):
    """tokens[start : start + length] for each of `starts` (B,) -> int64 (B, length)."""
    return torch.from_numpy(tokens[starts[:, None] + np.arange(length)].astype(np.int64))
