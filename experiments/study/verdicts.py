"""From measurements to verdicts.

A measurement is, for every training seed, a sum over the windows of each held-out file. A claim is
an effect, a function of means, with the smallest effect that would matter. Its 95% interval covers
both things that vary:

- files, the same for all seeds, are drawn anew 10,000 times (bootstrap);
- seeds are too few to be drawn: the mean of their effects errs by its standard error times a
  number from Student's t distribution.

supported: the interval lies beyond the smallest effect; opposite: beyond minus the smallest effect;
negligible: between the two; undecided: anything else, or (Holm) the correction for all claims
together leaves p above 0.05.
"""
from contextlib import suppress
from dataclasses import dataclass
from typing import Callable

import numpy as np

from data.prepare import require

DRAWS = 10_000


@dataclass
class Claim:
    """What is claimed; effect(m) where m(part, row, measure) is a mean."""
    heading: str
    unit: str
    effect: Callable


SMALLEST = {"points": 1.0, "tokens per step": 0.03, "nats": 0.01, "attenuation": 0.05}


class Results:
    """What a study measured: rows[part][row][measure][seed] is a list of sums by file, and
    counts[corpus] how many windows each file has."""

    def __init__(self, saved, select="0"):
        self.rows = saved["rows"]
        self.counts = {corpus: np.array(counts) for corpus, counts in saved["counts"].items()}
        self.select = select
        self.seeds = saved["seeds"]
        self.step_ms = saved.get("step_ms")  # {"METHOD, KIND": milliseconds of a step}
        rng = np.random.default_rng(0)
        self.drawn = {corpus: rng.multinomial(len(c), np.full(len(c), 1 / len(c)), DRAWS)
                      for corpus, c in self.counts.items()}  # {corpus: (DRAWS, files)}

    def corpus(self, row):
        """Rows are named after their corpus, if it is not the source code."""
        return next((corpus for corpus in self.counts if row.startswith(corpus)), "python")

    def sums(self, part, row, measure, seed=None):
        """Sums by file (files,) of a seed, or the mean over seeds."""
        by_seed = self.rows[part][row][measure]
        if seed is not None:
            return np.array(by_seed[str(seed)])
        return np.mean([by_seed[str(s)] for s in self.seeds if str(s) in by_seed], axis=0)

    def mean(self, part, row, measure, seed=None, weights=None):
        """The mean over windows, of a seed or of all; with weights {corpus: (..., files)}, how
        often each file counts, (...)"""
        sums = self.sums(part, row, measure, seed)
        corpus = self.corpus(row)
        w = np.ones(len(sums)) if weights is None else weights[corpus]
        return w @ sums / (w @ self.counts[corpus])

    def of(self, seed=None, drawn=False):
        """The function that an effect takes."""
        weights = self.drawn if drawn else None

        def m(part, row, measure):
            return self.mean(part, row, measure, seed, weights)
        m.results = self
        m.seed = seed
        m.weights = weights
        return m


def draws(effect, results):
    """An effect, its value for each seed, and 10,000 draws of it."""
    by_seed = []
    for seed in results.seeds:
        with suppress(KeyError):  # of a study that was stopped: not measured with this seed
            by_seed.append(float(effect(results.of(seed))))
    require(len(by_seed) > 1, "a claim needs two seeds or more: go on with the study")
    error = np.std(by_seed, ddof=1) / len(by_seed) ** 0.5
    t = np.random.default_rng(1).standard_t(len(by_seed) - 1, DRAWS)
    return float(effect(results.of())), by_seed, effect(results.of(drawn=True)) + error * t


def estimate(claim, results):
    """-> dict(effect, low, high: the 95% interval, by_seed, smallest, word, p)"""
    smallest = SMALLEST[claim.unit]
    effect, by_seed, drawn = draws(claim.effect, results)
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    tails = {"supported": (drawn <= smallest).mean(),  # how many draws say otherwise
             "opposite": (drawn >= -smallest).mean(),
             "negligible": max((drawn >= smallest).mean(), (drawn <= -smallest).mean())}
    word = min(tails, key=tails.get)
    return dict(effect=effect, low=low, high=high, by_seed=by_seed, smallest=smallest, word=word,
                p=min(1.0, 2 * float(tails[word]) + 1 / DRAWS))


def holm(p_values):
    """p-values adjusted for being a family (Holm 1979): the smallest of m counts m times, the next
    m - 1 times, and none is smaller than the one before."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = highest
    return adjusted


def judge(claims, results):
    """-> a dict per claim, as from `estimate`, with its verdict"""
    found = [estimate(claim, results) for claim in claims]
    for claim, f, p in zip(claims, found, holm([f["p"] for f in found])):
        undecided = "undecided (Holm)" if f["p"] <= 0.05 else "undecided"
        f.update(heading=claim.heading, unit=claim.unit, p=p,
                 verdict=f["word"] if p <= 0.05 else undecided)
    return found
