"""Verdicts, figures and docs/findings.md from the results of the study.

    python experiments/findings.py

The patient study counts where there is one, else the quick one. Each function below takes the
results of a part and yields its claims: an effect (see verdicts.py), its control, what else was
seen. Below them: the figures, the page.
"""
import json
import sys
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Parser, one_line_errors, write_whole
from experiments.calibrate import expected_tokens_per_step
from experiments.plots import import_pyplot
from experiments.study_leap import METHODS
from experiments.study_recipes import MOST_LOST, RECIPES, chosen, control_of, lost
from experiments.study_runs import ROOT, SELECT
from experiments.study_tasks import CURRICULUM, READER_COST
from experiments.verdicts import estimate, holm, verdict
from heads import draft_sources
from model import InputError, require

RESULTS, PAGE = ROOT / "experiments" / "results", ROOT / "docs" / "findings.md"
MARKS = "<!-- findings: begin -->\n", "<!-- findings: end -->\n"
NOW, LATER, HEAD = "t+1", "t+2 marginalised", "t+2 head"
SAMPLED = 112  # tokens of a sampled text


class Claim(NamedTuple):
    """A claim, and what was found about it."""
    title: str
    unit: str           # of the effect
    found: dict         # from `estimate`
    text: str           # what was compared, with which control, and what else was seen


class Part:
    """The results of a part: part[row, what] is an array (judging seeds, windows)."""

    def __init__(self, path, size_name):
        self.__dict__.update(json.loads(path.read_text()))  # command, environment, size, rows
        self.size_name, self.asked = size_name, self.size["positions"]

    def __getitem__(self, key):
        row, what = key
        seeds = sorted(seed for seed in self.rows[row] if seed != str(SELECT))
        return np.array([self.rows[row][seed][what] for seed in seeds], float)

    def selecting(self):
        """{row: {what: ...}} of the seed that selects."""
        first = str(SELECT)
        return {row: found[first] for row, found in self.rows.items() if first in found}

    def percent(self, row, what):
        """Accuracy over all judging seeds and windows."""
        return f"{100 * self[row, what].mean() / self.asked:.1f}%"

    def nats(self, row):
        """The mean loss of a row at t+1."""
        return self[row, "nats"].mean() / self.asked

    def points(self, a, b, smallest=0.5):
        """The accuracy of a, (row, what), minus that of b, in points."""
        return estimate(lambda a, b: 100 * (a - b) / self.asked, smallest, self[a], self[b])

    def retention(self, row, other):
        """Accuracy at t+2 over that at t+1, of a row minus another's, in points."""
        return estimate(lambda a, b, c, d: 100 * (a / b - c / d), 1.0, *(
            self[r, what] for r in (row, other) for what in (LATER, NOW)))

    def per_step(self, row, method, other_row, other_method):
        """Tokens per step on held-out text of one method minus another's."""
        return estimate(lambda a, b, c, d: a / b - c / d, 0.02, *(
            self[r, f"{m}, {what}"] for r, m in ((row, method), (other_row, other_method))
            for what in ("tokens", "steps")))

    def sampled(self, a, b):
        """Tokens per step on text sampled from the model of a, (row, method), minus b's."""
        return estimate(lambda a, b: SAMPLED / a - SAMPLED / b, 0.02,
                        *(self[row, f"{method}, sampled"] for row, method in (a, b)))

    def tokens_per_step(self, row, method):
        return self[row, f"{method}, tokens"].mean() / self[row, f"{method}, steps"].mean()


# ----------------------------------------------------------------------------------------------
# Paper A

def scale(part):
    """What next-token models know, by size."""
    *sizes, table = part.rows
    small, large = sizes[0], sizes[-1]
    yield Claim("A next-token model already knows about later tokens", "points",
                part.points((large, LATER), (table, LATER), 1.0),
                f"Top-1 at t+2, marginalised: {part.percent(large, LATER)}. Control, what in the "
                "whole training text most often stands one byte beyond the next, after the same "
                f"two bytes (longer contexts say more): {part.percent(table, LATER)}.")
    yield Claim("The larger the model, the more it knows about t+2", "points",
                part.points((large, LATER), (small, LATER), 1.0), "Top-1 at t+2, marginalised: "
                + ", ".join(f"{part.percent(row, LATER)} with {row}" for row in sizes)
                + ", layers x width.")
    five = [part[row, f"top5 {LATER}"].mean() / part[row, f"top5 {NOW}"].mean()
            for row in (large, small)]
    yield Claim("... and the larger the part of what it knows that reaches t+2", "points",
                part.retention(large, small),
                f"Retention (accuracy at t+2 over that at t+1) of {large} against {small}. Among "
                f"the first five it is {five[0]:.0%} against {five[1]:.0%}.")


def translation(part):
    """What a source sentence adds."""
    its, other = part.rows
    gain = part.points((its, LATER), (other, LATER), 1.0)
    yield Claim("A source sentence pins later tokens down", "points", part.retention(its, other),
                "Retention on German after its English, against a model trained and asked with "
                f"another caption's. Its English is worth {numbers(gain, 'points')} at t+2, and "
                f"{part.nats(other) - part.nats(its):.3f} nats per byte at t+1; a model that "
                "gains little has not learnt to translate, as the paper's models had.")


def frozen(part):
    """Heads on a frozen backbone against marginalisation."""
    swept, steps, said, gains = part.selecting(), part.size["frozen_steps"], [], {}
    for depth in part.size["depths"]:
        half, name = (f"{depth} layers, {n} steps" for n in (steps // 2, steps))
        gains[name] = 100 * (np.mean(swept[name][HEAD]) - np.mean(swept[half][HEAD])) / part.asked
        below = part.points(("backbone", LATER), (name, HEAD), 1.0)
        said.append(f"{part.percent(name, HEAD)} with {depth}, {numbers(below)} below "
                    f"({gains[name]:+.1f} since half of the training)")
    best = max(gains, key=lambda name: sum(swept[name][HEAD]))
    found = part.points(("backbone", LATER), (best, HEAD), 1.0)
    if gains[best] >= 0.5 and found["effect"] > found["smallest"]:
        found |= dict(p=1.0)  # it might reach more if it trained on
    yield Claim("Heads on a frozen backbone stay below marginalisation", "points", found,
                f"Top-1 at t+2: {part.percent('backbone', LATER)} marginalised, with "
                f"{part.size['base'][0]} layers. Heads after {steps} steps, by their transformer "
                f"layers (the effect is that of the best): {'; '.join(said)}.")


def layers(part):
    """Which layer a head for t+2 should read."""
    titles = ("A head for t+2 reads best below the last layer",
              "A head for t+2 of a deep model reads best below the last layer")
    for title, shape in zip(titles, (part.size["base"], part.size["deep"])):
        if shape is None:
            continue
        L, name = shape[0], f"{shape[0]}x{shape[2]}"
        last = f"{name}, layer {L}"
        right = {row: sum(found[HEAD]) for row, found in part.selecting().items()
                 if row.startswith(f"{name}, layer")}
        best = max(right.keys() - {last}, key=right.get)
        yield Claim(title, "points", part.points((best, HEAD), (last, HEAD)),
                    f"Heads for t+2 that read {best}, the best below the last on another seed, "
                    f"against the last: {part.percent(best, HEAD)} and "
                    f"{part.percent(last, HEAD)}. This can show that hidden states specialise "
                    "for the next token, but not exclude it: a head on a lower layer has fewer "
                    "layers below it.")


def recipes(part):
    """The recipes, chosen on one seed and judged on the others."""
    swept, row, control = part.selecting(), {}, {}
    for label in RECIPES:
        how = chosen(swept, label, part.asked)
        row[label], control[label] = "{}, {:g} x {:g}".format(label, *how), control_of(*how)

    def best_of(labels):  # at about equal next-token loss
        def merit(label):
            little = lost(swept, row[label], part.asked) <= MOST_LOST
            return little, sum(swept[row[label]][HEAD])
        return max(labels, key=merit)

    def cost(label):
        return f"{part.nats(row[label]) - part.nats(control[label]):+.3f} nats"
    joint = best_of(label for label in RECIPES if "joint" in label and "WHS" not in label)
    best, whs = best_of(RECIPES), "WHS, joint, slower backbone"
    other = best_of(label for label in RECIPES if label != whs)
    narrower = estimate(
        lambda h, m, frozen_h, base: 100 * ((h - m) - (frozen_h - base)) / part.asked, 0.5,
        part[row[joint], HEAD], part[control[joint], LATER],
        part[row["frozen"], HEAD], part["base", LATER])
    yield Claim("Joint training narrows the gap to marginalisation", "points", narrower,
                f"The gap at t+2 of {row[joint]}, to the base trained on without a head and "
                "marginalised, against the gap of a frozen head to the base: heads of one layer, "
                f"and the compute of {part.size['adapt']} joint steps. Next-token loss against "
                f"that control: {cost(joint)}.")
    yield Claim(f"... but does not close it in {part.size['adapt']} steps", "points",
                part.points((control[best], LATER), (row[best], HEAD)),
                f"Top-1 at t+2 of the best recipe, {row[best]}: {part.percent(row[best], HEAD)}, "
                f"at {cost(best)}; its control, marginalised: "
                f"{part.percent(control[best], LATER)}. From scratch, with the compute of base "
                f"and joint training: {part.percent('from scratch', HEAD)}, itself marginalised "
                f"{part.percent('from scratch', LATER)}, at {part.nats('from scratch'):.3f} "
                f"next-token nats; the control has {part.nats(control[best]):.3f}.")
    yield Claim("WHS, joint training and differential rates are the best recipe", "points",
                part.points((row[whs], HEAD), (row[other], HEAD)),
                f"Top-1 at t+2 of {row[whs]} against {row[other]}, the best other recipe on "
                f"another seed. Next-token nats: {part.nats(row[whs]):.3f} and "
                f"{part.nats(row[other]):.3f}.")


# ----------------------------------------------------------------------------------------------
# Paper B

def tokens_at(g, method):
    """The formula for tokens per step, if accuracy falls with the offset o as exp(-g (o - 1))."""
    sources = draft_sources(METHODS[method]).values()
    return expected_tokens_per_step(np.exp(-g * (o - 1)) for o, _ in sources)


def break_even():
    """The attenuation g below which leap is expected to write more tokens per step than MTP4."""
    grid = np.linspace(0.001, 1, 1000)
    return max(g for g in grid if tokens_at(g, "leap") > tokens_at(g, "MTP4"))


def attenuation(accuracy):
    """Mean accuracy (W,) over offsets 2..7 of windows -> the g that would give it (W,)"""
    grid = np.linspace(0, 5, 5001)
    return np.interp(-accuracy, -np.exp(-grid[:, None] * np.arange(1, 7)).mean(1), grid)


def by_attenuation(part):
    """Of all windows: g (W,), as the seed that selects sees it; the tokens and steps of leap and
    of MTP4, four arrays (seeds, W) in a list"""
    swept = part.selecting()
    accuracy = [np.mean([swept[data][f"offset {o}"] for o in range(2, 8)], 0) for data in swept]
    arrays = [np.concatenate([part[data, f"{m}, {what}"] for data in swept], axis=1)
              for m in ("leap", "MTP4") for what in ("tokens", "steps")]
    return attenuation(np.concatenate(accuracy)), arrays


def eighths(part):
    """Yields the corpus, the mean attenuation and leap's gain over MTP4 of each eighth of a
    corpus's windows, ordered by attenuation."""
    g, arrays = by_attenuation(part)
    half = len(g) // 2
    for name, windows in zip(part.rows, (range(half), range(half, 2 * half))):
        for one in np.array_split(sorted(windows, key=lambda w: g[w]), 8):
            a, b, c, d = (array[:, one].sum() for array in arrays)
            yield name, g[one].mean(), a / b - c / d


def leap(part):
    """Leaping against adjacent heads, and the theory."""
    text, (g, arrays) = "python", by_attenuation(part)
    four, seven, own = (part.tokens_per_step(text, m) for m in ("MTP4", "MTP7", "leap"))
    yield Claim("Leaping heads write more tokens per step than as many adjacent ones",
                "tokens per step", part.per_step(text, "leap", text, "MTP4"),
                f"Offsets 1,3,5,7 against 1,2,3,4 on held-out Python source: {own:.2f} against "
                f"{four:.2f} (on text sampled from the model the difference is "
                f"{numbers(part.sampled((text, 'leap'), (text, 'MTP4')))}). Offsets 1..7, with "
                f"six heads, reach {seven:.2f}: what leaping saves is three heads, not verified "
                "rows.")
    other, half, zero = "logs", len(g) // 2, break_even()
    yield Claim("... and they do on text that can be foreseen far ahead", "tokens per step",
                part.per_step(other, "leap", other, "MTP4"),
                f"The same on logs of fixed keys: {part.tokens_per_step(other, 'leap'):.2f} "
                f"against {part.tokens_per_step(other, 'MTP4'):.2f}. The formula has leap win "
                f"where attenuation g is below {zero:.2f}: as another seed sees them, "
                f"{(g[half:] < zero).sum()} of {half} windows of logs and "
                f"{(g[:half] < zero).sum()} of Python.")
    near = (g > zero) & (g < 1.5 * zero)
    loses = estimate(lambda a, b, c, d: c / d - a / b, 0.02, *(array * near for array in arrays))
    yield Claim("Just above the break-even of attenuation, leaping loses", "tokens per step",
                loses, f"MTP4 minus leap in the {near.sum()} windows with g from {zero:.2f} to "
                f"{1.5 * zero:.2f}: this asks for the place of the break-even. The formula "
                "takes accuracy to fall as exp(-g(o - 1)).")
    measured = part.tokens_per_step(text, "leap")
    averaged = estimate(lambda a, b, c: 100 * ((1 + a) / (b / c) - 1), 2.0, *(
        part[text, f"leap, {what}"] for what in ("accepted", "tokens", "steps")))
    plain = expected_tokens_per_step(part[text, f"offset {o}"].mean()
                                     for o, _ in draft_sources(METHODS["leap"]).values())
    yield Claim("Averaged over positions, acceptance promises too many tokens per step", "%",
                averaged, f"Leap on Python: {1 + part[text, 'leap, accepted'].mean():.2f} tokens "
                "from the probability, over all positions, that a draft is right if those before "
                f"it are; {plain:.2f} from plain accuracies, as if drafts were independent; "
                f"{measured:.2f} measured. A decoder takes long steps through easy text, so most "
                "of its steps begin where text is hard.")


def stages(part):
    """L-MTP's two stages, and what they do to the next-token model."""
    two, one, control = "two stages", "one stage", "trained on"
    yield Claim("Two stages write more tokens per step than one gentle stage", "tokens per step",
                part.per_step(two, "leap", one, "leap"),
                "Heads alone on the model's own text, then everything at a hundredth of their "
                f"rate ({part.tokens_per_step(two, 'leap'):.2f} tokens per step; "
                f"{part.tokens_per_step('first stage', 'leap'):.2f} after the first stage), "
                "against everything at once at these rates, with as much training "
                f"({part.tokens_per_step(one, 'leap'):.2f}). The difference is "
                f"{numbers(part.sampled((two, 'leap'), (one, 'leap')))} on sampled text and, with "
                "both stages on the corpus, "
                f"{numbers(part.per_step(f'{two} on the corpus', 'leap', one, 'leap'))} on real "
                f"text; next-token loss {part.nats(two):.3f} and {part.nats(one):.3f} nats.")
    better = estimate(lambda c, l: (c - l) / part.asked, 0.005, part[control, "nats"],
                      part[two, "nats"])
    yield Claim("L-MTP's fine-tuning makes the next-token model better", "nats", better,
                f"Next-token loss: {part.nats(two):.3f} nats ({part.percent(two, NOW)} right); "
                "control, the base trained on without heads, as long and at the same rate: "
                f"{part.nats(control):.3f} ({part.percent(control, NOW)}); untouched base: "
                f"{part.nats('base'):.3f}. The paper's models have 3 to 12 billion parameters.")


def learnt(part, row):
    """Which judging seeds learnt a task within patience."""
    return np.array([part.rows[row][seed]["curve"][-1] >= 0.9 for seed in sorted(part.rows[row])])


def sooner(part, pairs, cost=1.0):
    """How many doublings sooner the second row of a pair is right than the first, whose steps
    count `cost` times. Of each seed: the mean over the pairs of which a row learnt the task; the
    other one's steps then count as patience. A pair that learnt nothing says nothing."""
    found = np.array([np.log2(part[a, "steps"] / part[b, "steps"] / cost) for a, b in pairs])
    says = np.array([learnt(part, a) | learnt(part, b) for a, b in pairs])  # (pairs, seeds)
    some = says.any(0)
    if some.sum() < 2:
        return estimate(lambda d: d, 0.14, np.full((2, 1), np.nan))
    return estimate(lambda d: d, 0.14, np.average(
        found[:, some], axis=0, weights=says[:, some])[:, None])


def steps_of(part, rows):
    """The mean steps of each row, in words, and of how many seeds it did not learn."""
    said = []
    for row in rows:
        failed = (~learnt(part, row)).tolist()
        never = f" ({sum(failed)} of {len(failed)} not)" if any(failed) else ""
        said.append(f"{row} {part[row, 'steps'].mean():.0f}{never}")
    return "; ".join(said)


def planning(part):
    """The planning task."""
    bits, said = part.size["bits"], f"90% of the time, {part.size['patience']} at most"
    yield Claim("Leaping heads help to plan where adjacent ones see too little", "doublings",
                sooner(part, [(f"{n} bits, MTP", f"{n} bits, leap") for n in bits if n >= 12]),
                "How much sooner leap gives the first answer, with equal compute, at 12 bits and "
                f"more. Steps until it is right {said}: "
                f"{steps_of(part, [row for row in part.rows if 'again' not in row])}.")
    again = [f"{max(bits)} bits again, {method}" for method in ("MTP", "leap")]
    yield Claim(f"... and they do at {max(bits)} bits, on new seeds", "doublings",
                sooner(part, [again]), "The same with as many new seeds, because the first ones "
                f"suggest it. Steps until it is right {said}: {steps_of(part, again)}.")


def induction(part):
    """The induction task."""
    yield Claim("With the loss for two tokens a small model learns induction sooner", "doublings",
                sooner(part, [("NTP", "two tokens")], READER_COST),
                "With how much less compute offsets 1,2 learn the second token of a name that "
                "returns; Gloeckle et al. (2404.19737) saw it below 100 million parameters. Steps "
                f"until 90% are right, {part.size['patience']} at most (forward: the second loss "
                f"counts from step {CURRICULUM // 2} on): {steps_of(part, part.rows)}.")


PAPERS = {"Paper A": (scale, translation, frozen, layers, recipes),
          "Paper B": (leap, stages, planning), "Beyond the papers": (induction,)}


# ----------------------------------------------------------------------------------------------
# Figures. Each draws a part.

def draw_layers(part, axis):
    """Accuracy at t+2 by the layer that the head reads."""
    ticks = []
    for i, name in enumerate(dict.fromkeys(row.split(",")[0] for row in part.rows)):
        rows = [row for row in part.rows if row.startswith(f"{name}, layer")]
        axis.axhline(100 * part[f"{name}, backbone", LATER].mean() / part.asked, color=f"C{i}",
                     linestyle="--", label=f"{name}, marginalised")
        right = [100 * part[row, HEAD].mean(1) / part.asked for row in rows]  # (layers, seeds)
        read = [int(row.split()[-1]) for row in rows]
        axis.plot(read, np.mean(right, 1), "o-", color=f"C{i}", label=f"{name}, heads")
        axis.plot(read, right, ".", color=f"C{i}", alpha=0.4)
        ticks += read
    axis.set(xlabel="layer that the head reads", ylabel="top-1 at t+2, %",
             xticks=sorted(set(ticks)))


def draw_recipes(part, axis):
    """Accuracy at t+2 against next-token loss, a point per recipe."""
    for row, by_seed in part.rows.items():
        kind = row.removeprefix("residual, ").rsplit(", ", 1)[0]
        if by_seed.keys() != {str(SELECT)} and HEAD in next(iter(by_seed.values())):
            axis.plot(part.nats(row) - part.nats("base"),
                      100 * part[row, HEAD].mean() / part.asked,
                      "x" if "residual" in row else "o",
                      color=f"C{[*RECIPES, 'from scratch'].index(kind)}",
                      label=row.rsplit(", ", 1)[0])
    axis.axhline(100 * part["base", LATER].mean() / part.asked, color="black", linestyle="--",
                 label="base, marginalised")
    axis.margins(y=0.1)
    axis.set(xlabel="next-token nats, against the base", ylabel="top-1 at t+2, %")


def draw_leap(part, axis):
    """Leap's gain over MTP4 by attenuation, and the formula."""
    points = list(eighths(part))
    for name, g, gain in points:
        axis.plot(g, gain, "o", color=f"C{[*part.rows].index(name)}", label=name)
    x = np.linspace(0.02, max(g for _, g, _ in points), 200)
    axis.plot(x, [tokens_at(v, "leap") - tokens_at(v, "MTP4") for v in x], "gray", label="formula")
    axis.axvline(break_even(), color="black", linestyle=":", label="break-even")
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set(xlabel="attenuation g, eighths of the windows", ylabel="tokens per step, leap - MTP4")


def draw_planning(part, axis):
    """Steps until a task is learnt by its bits: a line per method, a point per seed; crosses are
    the new seeds."""
    bits, most = part.size["bits"], max(part.size["bits"])
    for i, method in enumerate(("MTP", "leap")):
        steps = [part[f"{n} bits, {method}", "steps"] for n in bits]  # (bits, seeds)
        axis.plot(bits, np.mean(steps, 1), "o-", color=f"C{i}", label=method)
        axis.plot(bits, steps, ".", color=f"C{i}", alpha=0.4)
        again = part[f"{most} bits again, {method}", "steps"]
        axis.plot([most + 0.3] * len(again), again, "x", color=f"C{i}", label=f"{method}, again")
    axis.axhline(part.size["patience"], color="black", linestyle=":", label="given up")
    axis.set(xlabel="bits", ylabel="steps until 90% are right", xticks=bits)


def draw_verdicts(claims, axis):
    """The effect and interval of each (Claim, verdict), a point per seed, in units of the smallest
    effect of interest."""
    colors = dict(supported="C2", refuted="C3", undecided="gray")
    for y, (claim, found) in enumerate(claims):
        low, effect, high, *seeds = np.array([claim.found[k] for k in ("low", "effect", "high")]
                                             + claim.found["by_seed"]) / claim.found["smallest"]
        if np.isfinite(low):
            name = found.split()[0]
            axis.plot([low, high], [y, y], color=colors[name], linewidth=2, label=name)
            axis.plot(seeds, [y] * len(seeds), ".", color="black", markersize=3)
            axis.plot(effect, y, "o", color=colors[name])
    axis.axvline(0, color="black", linewidth=0.5)
    axis.axvline(1, color="black", linestyle=":", linewidth=0.8)
    axis.set_xscale("symlog", linthresh=2)
    ticks = [-10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 40]
    axis.set(xlabel="effect / smallest effect of interest", xlim=(-20, 60),
             ylim=(len(claims) - 0.5, -0.5), xticks=ticks, xticklabels=ticks,
             yticks=range(len(claims)),
             yticklabels=["\n".join(wrap(claim.title, 42)) for claim, _ in claims])
    axis.tick_params(labelsize=8)


FIGURES = dict(layers=draw_layers, recipes=draw_recipes, leap=draw_leap, planning=draw_planning)


def draw(parts, judged, folder, plt):
    """Draw the verdicts, and the figures of the parts that are there, into a folder."""
    claims = sum(judged.values(), [])
    figures = {name: (function, parts[name], 3.6) for name, function in FIGURES.items()
               if name in parts} | dict(verdicts=(draw_verdicts, claims, 1 + 0.3 * len(claims)))
    for name, (function, what, height) in figures.items():
        figure, axis = plt.subplots(figsize=(6, height), layout="constrained")
        function(what, axis)
        lines, labels = axis.get_legend_handles_labels()
        once = dict(zip(labels, lines))
        axis.legend(once.values(), once.keys(), fontsize=7)
        figure.savefig(folder / f"study_{name}.png", dpi=90)
        plt.close(figure)


# ----------------------------------------------------------------------------------------------
# The page

def load(folder, sizes=("quick", "patient")):
    """{name: Part} of the results in a folder, of the last size that has them"""
    parts = {}
    for size in sizes:
        for f in sum(PAPERS.values(), ()):
            path = folder / f"study_{size}_{f.__name__}.json"
            if path.exists():
                parts[f.__name__] = Part(path, size)
    return parts


def judge(parts):
    """-> {name of a part: [(Claim, verdict)]}; the family is all claims of a size."""
    claims = [(name, claim) for f in sum(PAPERS.values(), ()) if (name := f.__name__) in parts
              for claim in f(parts[name])]
    judged = {name: [] for name, _ in claims}
    for size in ("quick", "patient"):
        family = [(name, claim) for name, claim in claims if parts[name].size_name == size]
        for (name, claim), p in zip(family, holm([claim.found["p"] for _, claim in family])):
            judged[name].append((claim, verdict(claim.found, p)))
    return judged


def numbers(found, unit=""):
    """An effect and its interval in words."""
    if not np.isfinite(found["low"]):
        return "nothing to compare"
    digits = 3 if unit == "nats" else 2
    effect, low, high = (f"{found[k]:+.{digits}f}" for k in ("effect", "low", "high"))
    return f"{effect} [{low}, {high}] {unit}".strip()


def picture(name, folder):
    """The lines that show a figure, if it is there."""
    there = (folder / f"study_{name}.png").exists()
    return ["", f"![{name}](../experiments/results/study_{name}.png)"] if there else []


def page(parts, judged, folder):
    """The generated part of docs/findings.md."""
    lines = ["| claim | verdict | effect [95% interval] |", "|---|---|---|"]
    for claim, found in sum(judged.values(), []):
        lines.append(f"| {claim.title} | {found} | {numbers(claim.found, claim.unit)} |")
    lines += picture("verdicts", folder)
    for title, functions in PAPERS.items():
        lines += ["", f"## {title}"]
        for name in (f.__name__ for f in functions if f.__name__ in parts):
            for claim, found in judged[name]:
                lines += ["", f"### {claim.title}: {found}", "", claim.text, "",
                          f"Effect: {numbers(claim.found, claim.unit)}; smallest of interest "
                          f"{claim.found['smallest']:g}."]
            lines += ["", f"`{parts[name].command}`"]
            lines += picture(name, folder)
    return "\n".join(lines) + "\n"


def main(argv=None):
    """Write the figures and the page."""
    p = Parser(prog="findings.py", description="Verdicts, figures and the marked part of the page "
               "from the results of study.py.")
    p.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER",
                   help="with study_SIZE_PART.json; for the figures")
    p.add_argument("--size", choices=["quick", "patient"], help="only these results; default: "
                   "patient where it was run, else quick")
    p.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="the page to rewrite")
    args = p.parse_args(argv)
    folder, out = args.results, args.page
    with one_line_errors("findings.py", memory="nothing"):
        text = out.read_text()
        require(all(text.count(mark) == 1 for mark in MARKS), f"{out} lacks the two marks between "
                "which the findings stand")
        try:
            parts = load(folder, [args.size] if args.size else ("quick", "patient"))
            judged = judge(parts)
        except (KeyError, json.JSONDecodeError) as error:
            raise InputError(f"the results in {folder} are broken or of an older study; run "
                             f"study.py again ({error!r})") from None
        require(parts, f"no results in {folder}: python experiments/study.py writes them")
        try:
            draw(parts, judged, folder, import_pyplot())
        except InputError as error:  # the figures that are there stay
            print(f"no new figures: {error}", file=sys.stderr)
        before, rest = text.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        write_whole(out, before + MARKS[0] + page(parts, judged, folder) + MARKS[1] + after)
        for claim, found in sum(judged.values(), []):
            print(f"{found:20}  {numbers(claim.found, claim.unit):40}  {claim.title}")


if __name__ == "__main__":
    main()
