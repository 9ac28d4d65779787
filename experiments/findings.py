"""Verdicts, figures and docs/findings.md from the results of the study.

    python experiments/findings.py

A claim of the patient study counts where it exists, else that of the quick one. Each function
below takes the results of a part and yields its claims: the effect that the claim speaks of, as a
function of means over seeds and windows (see verdicts.py), and what else a reader should know.
"""
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import import_pyplot, one_line_errors, write_whole
from experiments.calibrate import expected_tokens_per_step
from experiments.study_layers import plateau
from experiments.study_recipes import RECIPES, chosen, control_of
from experiments.study_runs import ROOT, SELECT, Shape, flops
from experiments.study_tasks import EVERY
from experiments.verdicts import estimate, holm, verdict
from heads import draft_sources
from model import InputError

RESULTS, PAGE = ROOT / "experiments" / "results", ROOT / "docs" / "findings.md"
MARKS = "<!-- findings: begin -->\n", "<!-- findings: end -->\n"


class Claim(NamedTuple):
    """A claim, and what was found about it."""
    paper: str
    title: str
    found: dict         # of `estimate`
    unit: str           # of the effect
    text: str           # what was compared, with which control, and what else was seen
    figure: str = None


class Part:
    """The results of a part of the study."""

    def __init__(self, path, name):
        content = json.loads(path.read_text())
        self.rows, self.command, self.size = (content[k] for k in ("rows", "command", "size"))
        self.asked = self.size["windows"] * self.size["positions"]
        self.P, self.name = self.size["positions"], name

    def get(self, row, what):
        """What was measured of a row -> (judging seeds, windows)"""
        by_seed = self.rows[row]
        return np.array([by_seed[s][what] for s in sorted(by_seed) if s != str(SELECT)], float)

    def selected(self):
        """The rows of the seed that selects: {row: {what: ...}}"""
        return {row: found[str(SELECT)] for row, found in self.rows.items() if str(SELECT) in found}

    def percent(self, row, what):
        """Accuracy of a row, in percent, over all judging seeds."""
        return 100 * self.get(row, what).mean() / self.P


def scale(part):
    sizes = [row for row in part.rows if "x" in row]
    small, large = sizes[0], sizes[-1]
    found = estimate(lambda m, t: 100 * (m - t) / part.P, 1.0,
                     part.get(large, "t+2 marginalised"), part.get("table", "t+2"))
    yield Claim("A", "A next-token model already knows about later tokens", found, "points",
                f"Top-1 at t+2, marginalised: {part.percent(large, 't+2 marginalised'):.1f}%. "
                "Control: a table of what most often follows two bytes, "
                f"{part.percent('table', 't+2'):.1f}%.", "scale")
    found = estimate(lambda a, b, c, d: 100 * (a / b - c / d), 1.0, *(
        part.get(row, what) for row in (large, small) for what in ("t+2 marginalised", "t+1")))
    top5 = [100 * part.get(r, "top5 t+2 marginalised").mean() / part.get(r, "top5 t+1").mean()
            for r in (large, small)]
    yield Claim("A", "The larger the model, the more of what it knows reaches t+2", found, "points",
                f"Retention, accuracy at t+2 over t+1, of {large} against {small} (layers x width)."
                f" Among the first five: {top5[0]:.0f}% against {top5[1]:.0f}%. The papers' models "
                "have 0.1 to 7 billion parameters.", "scale")


def translation(part):
    its, other = "its English", "another English"
    found = estimate(lambda a, b, c, d: 100 * (a / b - c / d), 1.0, *(
        part.get(row, what) for row in (its, other) for what in ("t+2 marginalised", "t+1")))
    gain = (part.get(other, "nats").mean() - part.get(its, "nats").mean()) / part.P
    yield Claim("A", "A source sentence pins later tokens down", found, "points",
                "Retention on German after its English, against a model trained and asked with "
                f"another caption's English. The English is worth {gain:.3f} nats per byte at "
                "t+1: a model that gains little has not learnt to translate. The paper used models "
                "that can.")


def frozen(part):
    swept, depths = part.selected(), part.size["depths"]
    steps = {d: plateau(swept, d, part.size["plateau"]) for d in depths}
    names = {d: f"{d} layers, {steps[d]} steps" for d in depths}
    best = max(names.values(), key=lambda name: sum(swept[name]["t+2 head"]))
    found = estimate(lambda m, h: 100 * (m - h) / part.P, 1.0,
                     part.get("backbone", "t+2 marginalised"), part.get(best, "t+2 head"))
    each = ", ".join(f"{part.percent(name, 't+2 head'):.1f}% with {d} ({steps[d]} steps)"
                     for d, name in names.items())
    yield Claim("A", "Heads on a frozen backbone stay below marginalisation", found, "points",
                f"Top-1 at t+2: {part.percent('backbone', 't+2 marginalised'):.1f}% marginalised; "
                f"heads of transformer layers, trained to a plateau: {each}.", "layers")


def layers(part):
    for shape, title in ((part.size["base"], "Hidden states specialise for the next token"),
                         (part.size["deep"], "Large models specialise early")):
        if not shape:
            continue
        name, L = f"{shape[0]}x{shape[2]}", shape[0]
        swept = {int(row.split()[-1]): sum(found["t+2 head"])
                 for row, found in part.selected().items() if row.startswith(name)}
        best = max((l for l in swept if l < L), key=swept.get)
        rows = [f"{name}, layer {l}" for l in (best, L)]
        found = estimate(lambda b, t: 100 * (b - t) / part.P, 0.5,
                         *(part.get(row, "t+2 head") for row in rows))
        yield Claim("A", title, found, "points",
                    f"Heads for t+2 that read layer {best}, the best below the last on another "
                    f"seed, against layer {L}: {part.percent(rows[0], 't+2 head'):.1f}% and "
                    f"{part.percent(rows[1], 't+2 head'):.1f}% ({L} layers x {shape[2]}).", "layers")


def recipes(part):
    swept, names = part.selected(), {}
    for label in RECIPES:
        scale_, rate = chosen(swept, label)
        names[label] = f"{label}, {scale_:g} x {rate:g}", control_of(scale_, rate)

    def best_of(labels):
        return max(labels, key=lambda label: sum(swept[names[label][0]]["t+2 head"]))

    def nats_lost(label):
        a, b = (part.get(row, "nats") for row in names[label])
        return (a.mean() - b.mean()) / part.P
    joint = best_of([label for label in RECIPES if "joint" in label and "WHS" not in label])
    row, control = names[joint]
    found = estimate(lambda h, m, h0, m0: 100 * ((h - m) - (h0 - m0)) / part.P, 0.5,
                     part.get(row, "t+2 head"), part.get(control, "t+2 marginalised"),
                     part.get(names["frozen"][0], "t+2 head"),
                     part.get("base", "t+2 marginalised"))
    yield Claim("A", "Joint training narrows the gap to marginalisation", found, "points",
                f"The gap at t+2 of the best joint recipe ({joint}), to its control trained on "
                "without a head and marginalised, against the gap of frozen heads to the base. "
                f"Next-token loss against that control: {nats_lost(joint):+.3f} nats.", "recipes")
    whs = "WHS, joint, slower backbone"
    best = best_of(RECIPES)
    row, control = names[best]
    found = estimate(lambda m, h: 100 * (m - h) / part.P, 0.5,
                     part.get(control, "t+2 marginalised"), part.get(row, "t+2 head"))
    yield Claim("A", "... but does not close it", found, "points",
                f"Top-1 at t+2 of the best recipe ({best}) {part.percent(row, 't+2 head'):.1f}%, "
                f"of its control, marginalised, {part.percent(control, 't+2 marginalised'):.1f}%. "
                f"From scratch, with equal compute: {part.percent('from scratch', 't+2 head'):.1f}% "
                f"at {part.get('from scratch', 'nats').mean() / part.P:.3f} nats, against "
                f"{part.get(control, 'nats').mean() / part.P:.3f} of the control.", "recipes")
    other = best_of([label for label in RECIPES if label != whs])
    found = estimate(lambda a, b: 100 * (a - b) / part.P, 0.5,
                     *(part.get(names[label][0], "t+2 head") for label in (whs, other)))
    yield Claim("A", "WHS, joint training and differential rates are the best recipe", found,
                "points", f"Top-1 at t+2 against the best other recipe on another seed ({other}); "
                f"next-token loss against their controls {nats_lost(whs):+.3f} and "
                f"{nats_lost(other):+.3f} nats.", "recipes")


METHODS = {"MTP4": (1, 2, 3, 4), "leap": (1, 3, 5, 7)}


def tokens_at(g, offsets):
    """The papers' formula for tokens per step, if accuracy falls as exp(-g (offset - 1))."""
    return expected_tokens_per_step(np.exp(-g * (o - 1)) for o, _ in draft_sources(offsets).values())


def break_even():
    """The attenuation below which leap is expected to write more tokens per step than MTP4."""
    grid = np.linspace(0.001, 1, 1000)
    return max(g for g in grid if tokens_at(g, METHODS["leap"]) > tokens_at(g, METHODS["MTP4"]))


def attenuation(accuracy):
    """Mean accuracy over offsets 2..7 of each window (W,) -> the g that would give it."""
    grid = np.linspace(0, 5, 5001)
    return np.interp(-accuracy, -np.exp(-grid[:, None] * np.arange(1, 7)).mean(1), grid)


def per_window(part):
    """Of both corpora: attenuation (W,), measured with the seed that selects; and {what: (seeds,
    W)} of the steps and tokens of both methods."""
    swept = part.selected()
    accuracy = [np.mean([swept[data][f"offset {o}"] for o in range(2, 8)], axis=0)
                for data in ("python", "logs")]
    found = {f"{m}, {what}": np.concatenate([part.get(data, f"{m}, {what}")
                                             for data in ("python", "logs")], axis=1)
             for m in METHODS for what in ("tokens", "steps")}
    return attenuation(np.concatenate(accuracy)), found


def leap(part):
    def both(data, a, b):
        return [part.get(data, f"{m}, {what}") for m in (a, b) for what in ("tokens", "steps")]

    def mean(data, m):
        return part.get(data, f"{m}, tokens").mean() / part.get(data, f"{m}, steps").mean()
    found = estimate(lambda a, b, c, d: a / b - c / d, 0.02, *both("python", "leap", "MTP4"))
    sampled = estimate(lambda a, b: 112 * (1 / a - 1 / b), 0.02,
                       *(part.get("python", f"{m}, sampled") for m in ("leap", "MTP4")))
    yield Claim("B", "Leaping heads write more tokens per step than as many adjacent ones", found,
                "tokens per step", "Offsets 1,3,5,7 against 1,2,3,4, on held-out Python source: "
                f"{mean('python', 'leap'):.2f} against {mean('python', 'MTP4'):.2f}. On text "
                f"sampled from the model the difference is {sampled['effect']:+.2f} "
                f"[{sampled['low']:+.2f}, {sampled['high']:+.2f}]. Offsets 1..7, six heads, reach "
                f"{mean('python', 'MTP7'):.2f}: leap saves three heads, not verified rows.", "leap")
    g, found = per_window(part)
    below = g < break_even()
    arrays = [a * side for side in (below, ~below) for a in found.values()]
    where = f"{below.sum()} windows lie below it, {(~below).sum()} above"
    found = estimate(map_effect, 0.0, *arrays)
    yield Claim("B", "Leaping wins below the break-even of attenuation, and loses above", found,
                "tokens per step", f"The break-even is g = {break_even():.2f}; {where} (Python "
                "source and logs; g of a window is measured with another seed). The effect is the "
                "smaller of leap's gain below and its loss above.", "leap")
    found = estimate(lambda a, tokens, steps: 100 * ((1 + a) / (tokens / steps) - 1), 2.0,
                     *(part.get("python", f"leap, {what}")
                       for what in ("accepted", "tokens", "steps")))
    yield Claim("B", "Acceptance, averaged over positions, promises too many tokens per step",
                found, "%", "The theorem holds for the acceptance of the steps that are made. "
                "Averaged over all positions it overstates: a decoder takes long steps through "
                "easy text, so most of its steps begin where text is hard.", "leap")


def map_effect(mt, ms, lt, ls, MT, MS, LT, LS):
    """Tokens and steps of MTP4 and leap, below and above the break-even -> the smaller of leap's
    gain below and its loss above."""
    return np.minimum(lt / ls - mt / ms, MT / MS - LT / LS)


def stages(part):
    two, one = "two stages", "one stage"
    found = estimate(lambda a, b, c, d: a / b - c / d, 0.02, *(
        part.get(row, f"leap, {what}") for row in (two, one) for what in ("tokens", "steps")))
    nats = {row: part.get(row, "nats").mean() / part.P for row in part.rows}
    yield Claim("B", "Two stages write more tokens per step than one gentle stage", found,
                "tokens per step", "Heads first, on the model's own text, then all at a hundredth "
                "of the rate; against all at once at these rates, with equal compute. Next-token "
                f"loss {nats[two]:.3f} and {nats[one]:.3f} nats.")
    found = estimate(lambda c, l: (c - l) / part.P, 0.005, part.get("trained on", "nats"),
                     part.get(two, "nats"))
    yield Claim("B", "L-MTP's fine-tuning makes the next-token model better", found, "nats",
                f"Next-token loss {nats[two]:.3f}; control: the base trained on without heads, "
                f"with as many steps at the same rate, {nats['trained on']:.3f}; the untouched "
                f"base {nats['base']:.3f}. The paper saw it on models of 3 to 12 billion.")


def steps_of(part, row):
    """Steps to 90% of each judging seed (seeds, 1), and whether it got there."""
    found = part.rows[row]
    seeds = [s for s in sorted(found) if s != str(SELECT)]
    steps = np.array([[found[s]["steps"]] for s in seeds], float)
    return steps, np.array([found[s]["curve"][-1] >= 0.9 for s in seeds])


def faster(part, pairs, costs=(1, 1)):
    """How many doublings faster the second row of each pair learns than the first, the mean over
    pairs. Pairs of which neither learns with some seed say nothing and are left out."""
    said = []
    for pair in pairs:
        (a, a_there), (b, b_there) = (steps_of(part, row) for row in pair)
        if (a_there | b_there).all():
            said.append(np.log2(a * costs[0]) - np.log2(b * costs[1]))
    if not said:
        said = [np.full((2, 1), np.nan)]
    return estimate(lambda d: d, 0.14, np.mean(said, axis=0))


def planning(part):
    sizes = [n for n in part.size["bits"] if n >= 12]
    found = faster(part, [(f"{n} bits, MTP", f"{n} bits, leap") for n in sizes])
    short = ", ".join(f"{n} bits {m} {steps_of(part, f'{n} bits, {m}')[0].mean():.0f}"
                      for n in part.size["bits"] for m in ("NTP", "MTP", "leap"))
    yield Claim("B", "Leaping heads help to plan where adjacent ones see too little", found,
                "doublings", "Steps until the first answer is right 90% of the time, of leap "
                f"against MTP, for n >= 12 bits: {short} (at most {part.size['patience']}).",
                "tasks")


def induction(part):
    shape = Shape(2, 2, 64)
    costs = [flops(shape, residual=r, context=48, vocab_size=48) for r in (0, 1)]
    found = faster(part, [("NTP", "two tokens")], costs)
    steps = ", ".join(f"{row} {steps_of(part, row)[0].mean():.0f}" for row in part.rows)
    yield Claim("B", "The loss for two tokens makes a better next-token model", found, "doublings",
                "Compute until the second token of a returning name is right 90% of the time, of "
                f"offsets 1,2 against 1. Steps: {steps} (at most {part.size['patience']}). Gloeckle "
                "et al. saw it up to 30 million parameters.", "tasks")


PARTS = (scale, translation, frozen, layers, recipes, leap, stages, planning, induction)


def load(results, name):
    """The results of a part: patient, else quick, else None. -> Part"""
    for size in ("patient", "quick"):
        path = results / f"study_{size}_{name}.json"
        if path.exists():
            return Part(path, size)


# ----------------------------------------------------------------------------------------------
# Figures. Each draws the parts that it needs, on the axes that it is given.

def draw_scale(axes, parts):
    """Accuracy and retention by size."""
    part, x = parts["scale"], [row for row in parts["scale"].rows if "x" in row]
    for top, style in (("", "o-"), ("top5 ", "s--")):
        t1, t2 = (np.array([part.percent(row, f"{top}{what}") for row in x])
                  for what in ("t+1", "t+2 marginalised"))
        label = top.strip() or "top-1"
        axes[0].plot(x, t1, style, color="C0", label=f"t+1, {label}")
        axes[0].plot(x, t2, style, color="C3", label=f"t+2, {label}")
        axes[1].plot(x, 100 * t2 / t1, style, color="C2", label=label)
    axes[0].set(ylabel="accuracy, %", title="Next-token models, marginalised")
    axes[1].set(ylabel="accuracy at t+2 / at t+1, %", title="Retention")


def draw_layers(axes, parts):
    """Accuracy at t+2 by the layer that a head reads; accuracy by depth of the head."""
    part = parts["layers"]
    for i, name in enumerate(dict.fromkeys(row.split(",")[0] for row in part.rows)):
        rows = [row for row in part.rows if row.startswith(name)]
        read = [int(row.split()[-1]) for row in rows]
        right = np.array([part.get(row, "t+2 head").mean(1) for row in rows]) * 100 / part.P
        axes[0].plot(np.array(read) / max(read), right.mean(1), "o-", color=f"C{i}", label=name)
        axes[0].plot(np.array(read) / max(read), right, ".", color=f"C{i}", alpha=0.5)
    axes[0].set(xlabel="layer that the head reads, of all", ylabel="top-1 at t+2, %",
                title="Heads on a frozen backbone")
    part = parts["frozen"]
    for depth in part.size["depths"]:
        rows = [f"{depth} layers, {steps} steps" for steps in part.size["plateau"]]
        right = [100 * sum(part.selected()[row]["t+2 head"]) / part.asked for row in rows]
        axes[1].plot(part.size["plateau"], right, "o-", label=f"{depth} layers per head")
    marginalised = 100 * sum(part.selected()["backbone"]["t+2 marginalised"]) / part.asked
    axes[1].axhline(marginalised, color="black", linestyle="--", label="marginalised")
    axes[1].set(xlabel="steps", title="Deeper heads, the seed that selects")


def draw_recipes(axes, parts):
    """What recipes give at t+2 and take at t+1."""
    part = parts["recipes"]
    swept = part.selected()
    base = part.get("base", "nats").mean() / part.P
    for i, label in enumerate([*RECIPES, "from scratch"]):
        for prefix, marker in (("", "o"), ("residual, ", "x")):
            rows = [row for row in part.rows if row.startswith(f"{prefix}{label}") and
                    set(part.rows[row]) != {str(SELECT)} and
                    row.removeprefix(f"{prefix}{label}")[2:3].isdigit() | (label == row)]
            for row in rows:
                axes[0].plot(part.get(row, "nats").mean() / part.P - base,
                             part.percent(row, "t+2 head"), marker, color=f"C{i}",
                             label=label if not prefix else None)
    for row, found in swept.items():
        if "t+2 head" in found:
            axes[1].plot((sum(found["nats"]) - sum(swept["base"]["nats"])) / part.asked,
                         100 * sum(found["t+2 head"]) / part.asked, "o",
                         color=f"C{[row.startswith(r + ', ' + row.split(', ')[-1][0]) for r in RECIPES].index(True)}")
    marginalised = part.percent("base", "t+2 marginalised")
    axes[0].axhline(marginalised, color="black", linestyle="--", label="base, marginalised")
    axes[0].set(ylabel="top-1 at t+2, %", title="Chosen configurations (x: residual heads)")
    axes[1].set(title="All configurations, the seed that selects")
    for axis in axes:
        axis.set_xlabel("next-token nats against the untouched base")


def draw_leap(axes, parts):
    """Leap's gain in tokens per step against attenuation; acceptance by offset."""
    part = parts["leap"]
    g, found = per_window(part)
    data = np.repeat(["python", "logs"], len(g) // 2)
    for i, name in enumerate(("python", "logs")):
        inside = np.flatnonzero(data == name)
        bins = np.array_split(inside[np.argsort(g[inside])], 8)
        gain = [[found[f"{m}, tokens"][:, b].sum() / found[f"{m}, steps"][:, b].sum()
                 for m in ("leap", "MTP4")] for b in bins]
        axes[0].plot([g[b].mean() for b in bins], [a - b for a, b in gain], "o", color=f"C{i}",
                     label=name)
        offsets = range(2, 8)
        axes[1].plot(offsets, [100 * part.get(name, f"offset {o}").mean() for o in offsets], "o-",
                     color=f"C{i}", label=name)
    x = np.linspace(0.02, max(g), 200)
    axes[0].plot(x, [tokens_at(v, METHODS["leap"]) - tokens_at(v, METHODS["MTP4"]) for v in x],
                 color="gray", label="formula")
    axes[0].axvline(break_even(), color="black", linestyle=":", label="break-even")
    axes[0].axhline(0, color="black", linewidth=0.5)
    axes[0].set(xlabel="attenuation g", ylabel="tokens per step, leap - MTP4",
                title="When leaping wins (eighths of the windows)")
    axes[1].set(xlabel="offset", ylabel="accuracy, %", title="Attenuation")


def draw_tasks(axes, parts):
    """Learning curves of the seeds: planning with the most bits, and induction."""
    for axis, name in zip(axes, ("planning", "induction")):
        part = parts[name]
        rows = [row for row in part.rows
                if name == "induction" or row.startswith(f"{part.size['bits'][-1]} bits")]
        for i, row in enumerate(rows):
            for j, seed in enumerate(sorted(part.rows[row])):
                curve = part.rows[row][seed]["curve"]
                steps = EVERY * np.arange(1, len(curve) + 1)
                axis.plot(steps, [100 * a for a in curve], color=f"C{i}", alpha=0.7,
                          label=row if j == 0 else None)
        axis.set(xlabel="steps", ylabel="right, %", title=name)


FIGURES = dict(scale=(draw_scale, ["scale"]), layers=(draw_layers, ["layers", "frozen"]),
               recipes=(draw_recipes, ["recipes"]), leap=(draw_leap, ["leap"]),
               tasks=(draw_tasks, ["planning", "induction"]))


def draw(parts, folder, plt):
    """Draw what the results allow."""
    for name, (function, needs) in FIGURES.items():
        if not all(parts.get(n) for n in needs):
            continue
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        function(axes, parts)
        for axis in axes:
            axis.legend(fontsize=7)
        figure.savefig(folder / f"study_{name}.png", dpi=90)
        plt.close(figure)


# ----------------------------------------------------------------------------------------------
# The page

def judge(parts):
    """-> [(Claim, verdict, size, command)]; Holm's family is all claims of a size."""
    claims = [(claim, part) for f in PARTS if (part := parts.get(f.__name__)) for claim in f(part)]
    judged = []
    for size in ("patient", "quick"):
        family = [(claim, part) for claim, part in claims if part.name == size]
        adjusted = holm([claim.found["p"] for claim, _ in family])
        judged += [(claim, verdict(claim.found, p), part)
                   for (claim, part), p in zip(family, adjusted)]
    return sorted(judged, key=lambda j: [c.title for c, _ in claims].index(j[0].title))


def page(judged, drawn):
    """The generated half of docs/findings.md."""
    lines = ["| paper | claim | verdict | effect [95% interval] |", "|---|---|---|---|"]
    for claim, found, part in judged:
        lines.append(f"| {claim.paper} | {claim.title} | {found} | {numbers(claim)} |")
    for paper, title in (("A", "Paper A"), ("B", "Paper B")):
        lines += ["", f"## {title}"]
        shown = set()
        for claim, found, part in (j for j in judged if j[0].paper == paper):
            seeds = ", ".join(f"{e:+.2f}" for e in claim.found["by_seed"])
            lines += ["", f"### {claim.title}: {found}", "",
                      f"Effect: {numbers(claim)}, smallest effect of interest "
                      f"{claim.found['smallest']:g}; by seed {seeds}. {claim.text}", "",
                      f"`{part.command}`"]
            if claim.figure in drawn and claim.figure not in shown:
                lines += ["", f"![](../experiments/results/study_{claim.figure}.png)"]
                shown.add(claim.figure)
    return "\n".join(lines) + "\n"


def numbers(claim):
    """An effect and its interval in words."""
    low, high = claim.found["low"], claim.found["high"]
    if not np.isfinite(low):
        return "none was learnt"
    digits = 3 if claim.unit == "nats" else 2
    return f"{claim.found['effect']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] {claim.unit}"


def main(results=RESULTS, out=PAGE):
    """Write the figures and the page."""
    with one_line_errors("findings.py", memory="nothing"):
        parts = {f.__name__: part for f in PARTS if (part := load(Path(results), f.__name__))}
        try:
            draw(parts, Path(results), import_pyplot())
        except InputError as error:  # the figures that are there stay
            print(f"no new figures: {error}", file=sys.stderr)
        drawn = [name for name in FIGURES if (Path(results) / f"study_{name}.png").exists()]
        judged = judge(parts)
        before, rest = Path(out).read_text().split(MARKS[0])
        write_whole(out, before + MARKS[0] + page(judged, drawn) + MARKS[1]
                    + rest.split(MARKS[1])[1])
        for claim, found, part in judged:
            print(f"{claim.paper}  {found:10}  {numbers(claim):40}  {claim.title} ({part.name})")


if __name__ == "__main__":
    main()
