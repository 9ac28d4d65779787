"""From measurements to verdicts.

A measurement is, for every training seed, a sum over the windows of each held-out file. A claim is
an effect, with the smallest that would matter. Its 95% interval covers both things that vary:

- files, the same for all seeds, are drawn anew 10,000 times (bootstrap);
- seeds are too few to be drawn: the mean of their effects errs by its standard error times a
  number from Student's t distribution.

supported: the interval lies beyond the smallest effect; opposite: beyond minus the smallest effect;
negligible: between the two; undecided: anything else, or (Holm) the correction for all claims
together leaves p above 0.05.
"""
import functools

import numpy as np

from experiments.study.claims import Results, unit, value

DRAWS = 10_000
SMALLEST = {"points": 1.0, "tokens per step": 0.03, "nats": 0.01, "attenuation": 0.05}


@functools.cache
def draw_files(*sizes):
    """How often each of so many files is drawn: an array (DRAWS, n) for every n in sizes"""
    rng = np.random.default_rng(0)
    return [rng.multinomial(n, np.full(n, 1 / n), DRAWS) for n in sizes]


def estimate(results, effect):
    """-> dict(effect; low, high: its 95% interval; word: the verdict that fits best, and its p)"""
    smallest = SMALLEST[unit(effect)]
    by_seed = [float(value(Results(results.saved, [seed]), effect)) for seed in results.seeds]
    error = np.std(by_seed, ddof=1) / len(by_seed) ** 0.5
    t = np.random.default_rng(1).standard_t(len(by_seed) - 1, DRAWS)
    drawn_files = draw_files(*map(len, results.counts.values()))
    weights = dict(zip(results.counts, drawn_files))
    drawn = value(Results(results.saved, weights=weights), effect) + error * t
    low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
    tails = {"supported": (drawn <= smallest).mean(),  # how many draws say otherwise
             "opposite": (drawn >= -smallest).mean(),
             "negligible": max((drawn >= smallest).mean(), (drawn <= -smallest).mean())}
    word = min(tails, key=tails.get)
    return dict(effect=float(value(results, effect)), low=low, high=high, word=word,
                p=min(1.0, 2 * float(tails[word]) + 1 / DRAWS))


def holm(p_values):
    """p-values adjusted for being a family (Holm 1979): the smallest of m counts m times, the next
    m - 1 times, and none is smaller than the one before."""
    times = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[np.argsort(p_values)] = np.maximum.accumulate(np.sort(p_values) * times)
    return adjusted.clip(max=1)


def judge(results, effects):
    """-> a dict per effect, as from `estimate`, with its verdict"""
    found = [estimate(results, effect) for effect in effects]
    for f, p in zip(found, holm([f["p"] for f in found])):
        undecided = "undecided (Holm)" if f["p"] <= 0.05 else "undecided"
        f["verdict"] = f["word"] if p <= 0.05 else undecided
    return found
