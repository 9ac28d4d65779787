"""What the papers claim, in terms of what the study measured.

A measured number has a name, PART/ROW/MEASURE, as in frozen/1 layer/t+2. An effect is a number, or
a sum of several: "frozen/base/marginal - frozen/1 layer/t+2, asked". The claims, the figures and
the comments in docs/findings.md all name their numbers so.
"""
import re

import numpy as np

from experiments.study.paper_b import BREAK_EVEN, METHODS, NEW, break_even, expected
from experiments.study.runs import SELECT

CLAIMS = {  # {what is claimed: the effect, which is then large}
    "A next-token model knows the token after next better than a model trained for it":
        "knows/python/marginal - knows/direct/t+2, asked",
    "... better than a table of counts": "knows/python/marginal - knows/table/t+2, asked",
    "A larger model keeps a larger part of what it knows":
        "knows/python/retention - knows/1x16/retention",
    "... a model of logs than one of Python": "knows/logs/retention - knows/shorter/retention",
    "... a model of Python than one of Shakespeare":
        "knows/shorter/retention - knows/shakespeare/retention",
    "A residual head on a frozen model reads less than marginalisation":
        "frozen/base/marginal - frozen/residual/t+2, asked",
    "... a head of one layer": "frozen/base/marginal - frozen/1 layer/t+2, asked",
    "... a head of four layers": "frozen/base/marginal - frozen/4 layers/t+2, asked",
    "... and what that reads comes from the model, not from the text alone":
        "frozen/4 layers/t+2 - frozen/from layer 0/t+2",
    "A lower layer is better to read, by as many new layers as make five":
        "frozen/best lower layer/t+2 - frozen/1 layer/t+2",
    "... the third than the last, by two new layers":
        "frozen/from layer 3/t+2 - frozen/2 layers/t+2",
    "Weighted hidden states help a residual head on a frozen model of four layers":
        "frozen/residual, WHS/t+2 - frozen/residual/t+2",
    "Joint training narrows a residual head's gap to marginalisation":
        "joint/residual/t+2, asked - joint/no head/marginal"
        " - frozen/residual/t+2, asked + frozen/base/marginal",
    "... that of a head of one layer":
        "joint/1 layer/t+2, asked - joint/no head/marginal"
        " - frozen/1 layer/t+2, asked + frozen/base/marginal",
    "Weighted hidden states help a residual head in joint training":
        "joint/residual, WHS/t+2 - joint/residual/t+2",
    "Head warm-up helps joint training": "joint/residual, warm-up/t+2 - joint/residual/t+2",
    "A backbone ten times slower than the heads spares the next-token model":
        "joint/residual, equal rates/nats t+1 - joint/residual/nats t+1",
    "From scratch, three adjacent heads make the next-token model better":
        "scratch/NTP/nats t+1 - scratch/MTP/nats t+1",
    "... three leaping heads": "scratch/NTP/nats t+1 - scratch/leap/nats t+1",
    "... sequential heads rather than independent ones":
        "scratch/MTP/nats t+1 - scratch/MTP, sequential/nats t+1",
    "From scratch, a residual head reads less than its own model's marginalisation":
        "scratch/MTP/marginal - scratch/MTP/t+2, asked",
    **{f"Leaping heads write more than as many adjacent ones: {row}":
       f"leap/{row}/leap, chain - leap/{row}/MTP, chain"
       for row in ("python, independent", "python, sequential", "shakespeare, sequential",
                   "logs, independent", "logs, sequential")},
    "... on text sampled at temperature 1: python, sequential":
        "leap/python, sequential/leap, T=1 - leap/python, sequential/MTP, T=1",
    "... when trees of both verify 15 rows: python, sequential":
        "leap/python, sequential/leap, tree - leap/python, sequential/MTP, tree",
    "... when trees of both verify 15 rows: logs, sequential":
        "leap/logs, sequential/leap, tree - leap/logs, sequential/MTP, tree",
    "Leap wins beyond the break-even of the formula":
        "leap/measured/attenuation - leap/formula/attenuation",
    "Two stages write more than one": "stages/two stages/steps - stages/one stage/steps",
    "L-MTP's fine-tuning makes the next-token model better":
        "stages/no heads/nats t+1 - stages/two stages/nats t+1",
}


class Results:
    """What a study measured. A mean is over some seeds, all if none are named, and over the windows
    of all files, each of which counts as often as weights {corpus: (..., files)} say, or once."""

    def __init__(self, saved, seeds=None, weights=None):
        self.saved = saved  # what study.py wrote
        self.seeds = seeds or saved["seeds"]
        self.counts = {corpus: np.array(n) for corpus, n in saved["counts"].items()}
        self.weights = weights or {corpus: np.ones(len(n)) for corpus, n in self.counts.items()}

    def sums(self, part, row, measure):
        """The sums over the windows of each file (files,), as a mean over seeds"""
        by_seed = self.saved["rows"][part][row][measure]
        return np.mean([by_seed[str(seed)] for seed in self.seeds], axis=0)

    def mean(self, part, row, measure):
        """The mean over windows (...). Rows begin with their corpus, if it is not Python."""
        corpus = next((corpus for corpus in self.counts if row.startswith(corpus)), "python")
        weights = self.weights[corpus]
        return weights @ self.sums(part, row, measure) / (weights @ self.counts[corpus])


def unit(effect):
    """What an effect counts."""
    measure = effect.rpartition("/")[2]
    if measure.startswith("nats"):
        return "nats"
    if measure.split(",")[0] in ("steps", *METHODS):
        return "tokens per step"
    return "attenuation" if measure == "attenuation" else "points"


def number(results, name):
    """A number (...) by its name. Measures that follow from others:

    attenuation     at which leap stops to win, "measured" or as the "formula" has it
    retention       how much of what is known about the next token is known about the one after it
    METHOD, ms      milliseconds of a step
    METHOD, speed   thousands of tokens per second
    METHOD, theory  what the theory expects of the accuracies
    """
    part, row, measure = name.split("/")
    method, _, what = measure.partition(", ")
    if measure == "attenuation":
        return break_even(results) if row == "measured" else BREAK_EVEN
    if measure == "retention":
        return 100 * results.mean(part, row, "marginal") / results.mean(part, row, "t+1, asked")
    if what == "ms":
        return results.saved["step_ms"][f"{method}, {row.split(', ')[1]}"]
    if what == "speed":
        return number(results, f"{part}/{row}/{method}, chain") / number(
            results, f"{part}/{row}/{method}, ms")
    if what == "theory":
        accuracy = {o: results.mean(part, row, f"offset {o}") for o in range(2, 8)}
        return expected(accuracy, METHODS[method])
    if row == "best lower layer":  # on the seed that selects
        select = Results(results.saved, [SELECT])
        row = max(("from layer 1", "from layer 2", "from layer 3"),
                  key=lambda row: select.mean(part, row, measure))
    mean = results.mean(part, row, measure)
    if unit(name) == "tokens per step":
        windows = results.mean(part, row, "prompts") if what.startswith("T=") else 1
        return NEW * windows / mean
    return mean if unit(name) == "nats" else 100 * mean


def value(results, effect):
    """An effect (...): the sum of its numbers."""
    total = 0
    for term in re.split(" (?=[-+] )", effect):
        x = number(results, term.lstrip("-+ "))
        total = total - x if term.startswith("-") else total + x
    return total
