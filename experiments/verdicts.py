"""Statistics of the study: intervals by a paired bootstrap, Holm's correction, verdicts.

A measurement is an array (seeds, windows): one number per training seed and held-out window. All
methods are measured on the same windows, so a comparison is made window by window. A verdict is
about an effect, its 95% interval, and the smallest effect that we would care about:

- supported: the interval lies beyond the smallest effect, in the claimed direction;
- refuted: it lies below the smallest effect, so the effect is negligible or the other way round;
- undecided: it holds the smallest effect, or Holm's correction leaves p above 0.05.
"""
import numpy as np


def resample(seeds, windows, n=10_000, seed=0):
    """How often each of n resamples draws each seed and each window: (n, seeds), (n, windows),
    fractions that sum to 1.

    All seeds are measured on the same windows, so a resample draws windows once for all of them.
    Of S seeds it draws S - 1: with S, the variance of so few would come out too small by the
    factor (S - 1) / S (the "n - 1 bootstrap", McCarthy and Snowden 1985)."""
    rng = np.random.default_rng(seed)
    draws = max(1, seeds - 1)
    by_seed = rng.multinomial(draws, np.full(seeds, 1 / seeds), n) / draws
    by_window = rng.multinomial(windows, np.full(windows, 1 / windows), n) / windows
    return by_seed, by_window


def estimate(statistic, smallest, *arrays, n=10_000):
    """An effect with its uncertainty.

    statistic(*means) -> the effect, from the mean of each of `arrays`, all (seeds, windows); it
    works on numbers and on arrays of numbers alike. smallest: the smallest effect of interest.
    -> dict(effect, low, high: the 95% interval, p: two-sided, that the effect is `smallest`,
    by_seed: the effect of each seed alone)."""
    arrays = [np.asarray(a, dtype=float) for a in arrays]
    by_seed, by_window = resample(*arrays[0].shape, n)
    means = [((by_seed @ a) * by_window).sum(1) for a in arrays]  # (n,) each
    with np.errstate(divide="ignore", invalid="ignore"):
        found = statistic(*means)
    if not np.isfinite(found).all():  # of nothing, or over nothing
        return dict(effect=np.nan, low=-np.inf, high=np.inf, smallest=smallest, p=1.0, by_seed=[])
    low, high = np.quantile(found, [0.025, 0.975])
    tail = min((found <= smallest).sum(), (found >= smallest).sum())
    return dict(effect=float(statistic(*(a.mean() for a in arrays))),
                low=float(low), high=float(high), smallest=smallest,
                p=min(1.0, 2 * (int(tail) + 1) / (n + 1)),
                by_seed=[float(statistic(*means)) for means in zip(*(a.mean(1) for a in arrays))])


def holm(p_values):
    """p-values, adjusted for being a family (Holm 1979): the smallest of m counts m times, the
    next m - 1 times, and none is smaller than the one before."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = highest
    return adjusted


def verdict(found, adjusted_p):
    """"supported", "refuted" or "undecided": what `estimate` found, with the p of its family."""
    if adjusted_p > 0.05 or found["low"] <= found["smallest"] <= found["high"]:
        return "undecided"
    return "supported" if found["low"] > found["smallest"] else "refuted"
