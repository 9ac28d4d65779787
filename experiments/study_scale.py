"""Paper A: what a next-token model already knows about later tokens, by its size and by its text.

Trained: next-token models of several sizes on Python source; and on translation, one on English
with its German, one on English with another caption's German.
Measured: accuracy at t+1 and, marginalised, at t+2, on the same held-out positions. Retention is
the quotient of the two: how much of what is known about the next token reaches one token farther.
"""
from collections import defaultdict

import numpy as np
import torch

from data.loader import Corpus
from data.prepare import write_corpus
from experiments.study_runs import asked_of, foresee, newer


def scale(study, seed):
    """-> {"SHAPE": foresee of it, "table": the control}"""
    rows = {}
    for shape in (*study.size.small, study.size.base):
        run = study.base(seed, shape=shape)
        rows[f"{shape.n_layer}x{shape.n_embd}"] = study.measured(run, foresee)
    return rows | {"table": study.measured(run, two_byte_table)}


def two_byte_table(study, run):
    """The control: what most often follows in the training text, one byte beyond the next, after
    the two bytes that end the context. -> {"t+2 marginalised": ...}"""
    model, corpus = study.load(run)
    V, text = corpus.vocab_size, np.asarray(corpus.train).astype(np.int64)
    seen = np.bincount((text[:-3] * V + text[1:-2]) * V + text[3:], minlength=V ** 3)
    guess = torch.from_numpy(seen.reshape(V * V, V).argmax(1))  # (V^2,)
    windows, position = asked_of(study, run, corpus, model.gpt.config.block_size)
    before, last, later = (windows.gather(1, position + i) for i in (-1, 0, 2))  # (W, P)
    return {"t+2 marginalised": (guess[before * V + last] == later).sum(1).tolist()}


def translation(study, seed):
    """-> {"its English", "another English": foresee of that model, on its own held-out pairs}"""
    rows = {}
    for name, data in (("its English", "multi30k"), ("another English", shuffled(study))):
        run = study.base(seed, data, block_size=256, batch_size=4,
                         steps=study.size.pair_steps)
        rows[name] = study.measured(run, foresee)
    return rows


def shuffled(study):
    """multi30k, with each German line after the English of another pair that has as many bytes, so
    every German byte stands where it stood. (An English line of a length of its own stays.)
    -> the corpus's folder"""
    folder, corpus = study.folder / "shuffled", Corpus("multi30k")
    if newer(folder / "meta.json", [corpus.folder / "meta.json"]):
        return folder
    splits = {}
    for split in ("train", "val"):
        text = corpus.tokenizer.decode(getattr(corpus, split)[:-1].tolist())
        pairs = [line.split("\t") for line in text.splitlines()]
        same_length = defaultdict(list)
        for i, (english, _) in enumerate(pairs):
            same_length[len(english.encode())].append(i)
        english = {}
        for group in same_length.values():
            english |= {i: pairs[j][0] for i, j in zip(group, group[1:] + group[:1])}
        lines = [f"{english[i]}\t{german}\n" for i, (_, german) in enumerate(pairs)]
        splits[split] = ["".join(lines)]
    write_corpus(folder, splits, corpus.tokenizer, dict(source="multi30k", tokenizer="bytes"))
    return folder
