"""Statistics of the study: effects with intervals, Holm's correction, verdicts.

A measurement is an array (seeds, windows): one number per training seed and held-out window. All
methods are measured on the same windows, so a comparison is made window by window. A verdict is
about an effect, its 95% interval, and the smallest effect that we would care about:

- supported: the interval lies beyond the smallest effect, in the claimed direction;
- refuted (opposite): it lies below zero;
- refuted (negligible): it lies below the smallest effect;
- undecided: it holds the smallest effect, or Holm's correction leaves p above 0.05.
"""
import numpy as np


def estimate(statistic, smallest, *arrays, n=10_000):
    """An effect with its uncertainty.

    statistic(*means) -> the effect, from the mean of each of `arrays`, all (seeds, windows); it
    works on numbers and on arrays of numbers alike. smallest: the smallest effect of interest.
    -> dict(effect, low, high: the 95% interval, p: two-sided, that the effect is `smallest`,
    by_seed: the effect of each seed alone).

    Two things vary. Windows, the same for all seeds, are drawn anew n times (bootstrap). Seeds
    are too few to be drawn: the mean of their effects errs by its standard error times a number
    from Student's t distribution."""
    arrays = [np.asarray(a, dtype=float) for a in arrays]
    (S, W), rng = arrays[0].shape, np.random.default_rng(0)
    drawn = rng.multinomial(W, np.full(W, 1 / W), n) / W  # (n, W)
    with np.errstate(divide="ignore", invalid="ignore"):
        by_seed = [float(statistic(*means)) for means in zip(*(a.mean(1) for a in arrays))]
        found = statistic(*(drawn @ a.mean(0) for a in arrays))  # (n,)
        if S > 1:
            found = found + np.std(by_seed, ddof=1) / S ** 0.5 * rng.standard_t(S - 1, n)
    if S == 1 or not np.isfinite(found).all():  # of one seed, of nothing, or over nothing
        return dict(effect=np.nan, low=-np.inf, high=np.inf, smallest=smallest, p=1.0, by_seed=[])
    low, high = np.quantile(found, [0.025, 0.975])
    tail = min((found <= smallest).sum(), (found >= smallest).sum())
    return dict(effect=float(statistic(*(a.mean() for a in arrays))),
                low=float(low), high=float(high), smallest=smallest,
                p=min(1.0, 2 * (int(tail) + 1) / (n + 1)), by_seed=by_seed)


def holm(p_values):
    """p-values, adjusted for being a family (Holm 1979): the smallest of m counts m times, the
    next m - 1 times, and none is smaller than the one before."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = highest
    return adjusted


def verdict(found, adjusted_p):
    """The verdict on what `estimate` found, with the p of its family."""
    if adjusted_p > 0.05 or found["low"] <= found["smallest"] <= found["high"]:
        return "undecided"
    if found["low"] > found["smallest"]:
        return "supported"
    return "refuted (opposite)" if found["high"] < 0 else "refuted (negligible)"
