"""What the study found: figures, tables and the README's findings, made from its result files and from nothing else.

    python experiments/findings.py --size quick

A claim is compared seed by seed. It counts as reproduced when the difference that it speaks of is there with every
seed, as not reproduced when it is the other way round with every seed, and otherwise it cannot be seen at this size.
(With three seeds, chance alone would give each of the first two one time in eight.) What is shown of three seeds is
their mean, and the lowest and the highest in brackets.

It writes study_SIZE.md with all tables and study_SIZE_PART.png beside the results, and replaces the README's lines
between the marks `<!-- findings: SIZE -->` and `<!-- end of findings -->`, if they are about this size.

Read: numbers in words, the claims, the tables, the figures, the command line.
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from decode import expected_tokens_per_step
from heads import draft_sources
from marginalize import import_matplotlib
from model import InputError
from train import one_line_errors, write_whole


class Part:
    """The results of a part: part[label, name of a number] is an array with one entry per seed."""

    def __init__(self, path):
        self.results = json.loads(path.read_text())
        self.values = {row["label"]: row["values"] for row in self.results["rows"]}
        self.labels = list(self.values)

    def __getitem__(self, key):
        return np.array(self.values[key[0]][key[1]], dtype=float)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers in words

def spread(values, digits=2, factor=1.0):
    """Mean, lowest and highest: "1.72 [1.70, 1.75]"; of a single one, itself."""
    shown = [f"{factor * v:.{digits}f}" for v in (values.mean(), values.min(), values.max())]
    return shown[0] if len(values) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def percent(values):
    """Shares as percentages."""
    return spread(values, 1, 100)


def verdict(*differences):
    """Of a claim that all these differences (one per seed each) are positive."""
    if all(d.min() > 0 for d in differences):
        return "reproduced"
    if any(d.max() < 0 for d in differences):
        return "not reproduced"
    return "cannot be seen at this size"


# ---------------------------------------------------------------------------------------------------------------------
# The claims

class Finding(NamedTuple):
    """A row of the table."""
    part: str
    claim: str
    measured: str
    verdict: str


def of_scale(part):
    """Paper A, claims 1 and 2."""
    later = "marginalisation t+2"
    ladder = [label for label in part.labels if label.startswith("python")]
    steps = [part[b, later] - part[a, later] for a, b in zip(ladder, ladder[1:])]
    above = [part[label, later] - part[label, "unigram t+2"] for label in ladder]
    yield Finding("scale", "A next-token model already knows about later tokens, the more the larger it is (A1)",
                  "marginalised accuracy at t+2, small to large: " + ", ".join(percent(part[x, later]) for x in ladder),
                  verdict(*steps, *above))
    translation, prose = (x for name in ("multi30k", "shakespeare") for x in part.labels if x.startswith(name))
    data = {"translation": translation, "code": ladder[-2], "prose": prose}
    lost = {name: 1 - part[x, later] / part[x, "model t+1"] for name, x in data.items()}
    yield Finding("scale", "It depends on the text: far more in translation than in open-ended text (A2)",
                  "at t+2 " + ", ".join(f"{name} {percent(part[x, later])}" for name, x in data.items())
                  + "; of its accuracy at t+1 it loses " + ", ".join(f"{lost[n].mean():.0%}" for n in data),
                  verdict(lost["prose"] - lost["translation"], part[translation, later] - part[prose, later]))


def by_layer(part, label, distance, reader="probe"):
    """(layers, seeds)"""
    keys = [k for k in part.values[label] if k.startswith(f"{reader} t+{distance} layer")]
    return np.stack([part[label, k] for k in sorted(keys, key=lambda k: int(k.split()[-1]))])


def of_layers(part):
    """Paper A, claim 3."""
    one, two, heads = by_layer(part, "NTP", 1), by_layer(part, "NTP", 2), by_layer(part, "MTP", 2)

    def upper(probes):                                                      # what the upper half of the layers adds
        return probes[-1] - probes[len(probes) // 2]
    yield Finding("layers", "What is useful for t+2 is discarded on the way up (A3)",
                  f"probe for t+2, layer by layer: {', '.join(f'{m:.1%}' for m in two.mean(1))}",
                  verdict(two[1:-1].max(0) - two[-1]))
    yield Finding("layers", "Layers specialise for the next token: the upper half does more for t+1 than for t+2, and "
                  "for t+2 more where heads were trained along (A3)",
                  f"probes gain in the upper half of the layers: t+1 {percent(upper(one))}, t+2 {percent(upper(two))}; "
                  f"with heads t+2 {percent(upper(heads))}",
                  verdict(upper(one) - upper(two), upper(heads) - upper(two)))


def of_adapt(part):
    """Paper A, claims 3 to 6."""
    head = {label: part[label, "own head t+2"] for label in part.labels[1:]}
    known, base = part[part.labels[0], "marginalisation t+2"], part[part.labels[0], "nats"]
    lost = {label: part[label, "nats"] - base for label in head}
    frozen = {label: h for label, h in head.items() if label.startswith("frozen")}
    adapted = {label: h for label, h in head.items() if label != "from scratch"}
    joint = {label: h for label, h in adapted.items() if label not in frozen}

    def best(some):
        return max(some, key=lambda label: some[label].mean())

    def against(a, b):
        return (f"t+2 {percent(head[a])} against {percent(head[b])}; NTP lost {spread(lost[a], 3)} against "
                f"{spread(lost[b], 3)} nats")
    yield Finding("adapt", "Heads on a frozen backbone stay below marginalisation (A3)",
                  f"t+2: the best frozen heads ({best(frozen).removeprefix('frozen, ')}) "
                  f"{percent(frozen[best(frozen)])}, marginalised {percent(known)}",
                  verdict(*(known - h for h in frozen.values())))
    yield Finding("adapt", "Training heads and backbone jointly helps (A4)",
                  against("joint, weight 1", "frozen, resblock heads"),
                  verdict(head["joint, weight 1"] - head["frozen, resblock heads"]))
    yield Finding("adapt", "... but does not close the gap to marginalisation (A4)",
                  f"t+2: the best joint recipe ({best(joint)}) {percent(joint[best(joint)])}, the unchanged model "
                  f"marginalised {percent(known)}", verdict(*(known - h for h in joint.values())))
    for claim, a, b in (("Differential learning rates help (A4)", "+ differential rates", "joint, weight 1"),
                        ("Head warm-up helps (A4)", "+ head warm-up", "+ differential rates"),
                        ("Weighted hidden states help frozen heads (A5)", "frozen, WHS", "frozen, resblock heads"),
                        ("Weighted hidden states help jointly trained heads (A5)", "+ WHS", "+ head warm-up")):
        yield Finding("adapt", claim, against(a, b), verdict(head[a] - head[b]))
    others = [h for label, h in adapted.items() if label != "+ WHS"]
    yield Finding("adapt", "WHS with joint training and differential rates is best of all (A5)",
                  f"t+2 {percent(head['+ WHS'])}; the best of all is '{best(adapted)}', "
                  f"{percent(adapted[best(adapted)])}",
                  verdict(head["+ WHS"] - np.max(others, axis=0)))
    yield Finding("adapt", "From scratch beats adapting, at the same compute in all (A6, an open question there)",
                  against("from scratch", best(adapted)), verdict(head["from scratch"] - head[best(adapted)]))


OFFSETS = {"MTP": (1, 2, 3, 4), "leap k=2": (1, 3, 5, 7), "leap k=3": (1, 4, 7, 10)}


def attenuation(part, label):
    """g of accuracy(o) = exp(-g (o - 1)), by least squares on the logarithms, for every seed."""
    x = np.array(OFFSETS[label][1:]) - 1
    y = -np.log([part[label, f"accuracy of offset {o}"] for o in OFFSETS[label][1:]])
    return x @ y / (x @ x)


def expected(offsets, accuracy):
    """Tokens per step by the paper's formula, guesses being right independently, each as often as its offset is."""
    return expected_tokens_per_step([accuracy(o) for _, (o, _) in sorted(draft_sources(offsets).items())])


def break_even(a, b):
    """The attenuation below which offsets b write more tokens per step than offsets a, by the formula; by bisection."""
    low, high = 1e-6, 10.0
    for _ in range(60):
        g = (low + high) / 2
        more = expected(b, lambda o: math.exp(-g * (o - 1))) > expected(a, lambda o: math.exp(-g * (o - 1)))
        low, high = (g, high) if more else (low, g)
    return low


def of_leap(part):
    """Paper B."""
    falls = [part[m, f"accuracy of offset {a}"] - part[m, f"accuracy of offset {b}"]
             for m, offsets in OFFSETS.items() for a, b in zip(offsets, offsets[1:])]
    yield Finding("leap", "Accuracy falls with the offset (B5, attenuation)", "; ".join(
        f"{m}: " + ", ".join(f"{part[m, f'accuracy of offset {o}'].mean():.0%}" for o in offsets)
        for m, offsets in OFFSETS.items()), verdict(*falls))
    for way, name in (("chain", ""), ("tree", ", in a tree of 15 candidates each")):
        kinds = [f"{kind}, {way}" for kind in ("real text", "greedy", "sampled")]
        said = {}                                                           # {verdict: kinds of text}
        for k in kinds:
            said.setdefault(verdict(part["leap k=2", k] - part["MTP", k]), []).append(k.split(",")[0])
        yield Finding("leap", f"Leaping writes more tokens per step than as many adjacent heads{name} (B3)", "; ".join(
            f"{k.split(',')[0]}: " + ", ".join(f"{m} {part[m, k].mean():.2f}" for m in OFFSETS) for k in kinds),
            "; ".join(v + f" ({', '.join(some)})" * (len(said) > 1) for v, some in said.items()))
    measured = part["leap k=2", "real text, chain"] - part["MTP", "real text, chain"]
    g, even = attenuation(part, "MTP"), break_even(OFFSETS["MTP"], OFFSETS["leap k=2"])
    right = np.where((g < even) == (measured > 0), 1.0, -1.0)
    yield Finding("leap", "The break-even of attenuation says whether leaping wins (B5)",
                  f"g = {spread(g)}, break-even {even:.2f}: {'leap' if g.mean() < even else 'MTP'} should win; on real "
                  f"text leap k=2 writes {spread(measured)} tokens per step more", verdict(right))
    formula, real = ({m: part[m, f"{kind}, chain"] for m in OFFSETS} for kind in ("formula", "real text"))
    yield Finding("leap", "The formula foretells tokens per step, to 0.05 (B5)",
                  "formula, with acceptances measured on the same text, against a decoder that walks along it: "
                  + "; ".join(f"{m} {formula[m].mean():.2f} against {real[m].mean():.2f}" for m in OFFSETS),
                  verdict(*(0.05 - abs(formula[m] - real[m]) for m in OFFSETS)))
    one, two = "leap k=2 on a base, one stage", "leap k=2 on a base, two stages"
    yield Finding("leap", "L-MTP's two stages cost the model less than one, for as many tokens per step (to 0.05; B2)",
                  f"tokens per step on real text {spread(part[two, 'real text, chain'])} against "
                  f"{spread(part[one, 'real text, chain'])}; next-token loss {spread(part[two, 'nats'], 3)} against "
                  f"{spread(part[one, 'nats'], 3)} nats",
                  verdict(part[one, "nats"] - part[two, "nats"],
                          part[two, "real text, chain"] - part[one, "real text, chain"] + 0.05))
    speeds = {m: {k: part[m, f"compiled, {k}, chain, speedup"] for k in ("greedy", "sampled")} for m in OFFSETS}
    yield Finding("leap", "Leaping is faster than as many adjacent heads in wall-clock", "; ".join(
        f"{m}: greedy {s['greedy'][0]:.2f}x, sampled {s['sampled'][0]:.2f}x" for m, s in speeds.items()),
        "one seed: no ranking")


def of_planning(part):
    """The task in which looking ahead matters."""
    first = {label: part[label, "token 1"] for label in part.labels}
    shown = ", ".join(f"{label} {percent(f)}" for label, f in first.items())
    n = sum(k.startswith("token") for k in part.values["NTP"])
    yield Finding("planning", "Next-token training fails where the first token needs the whole plan (under 60%); "
                  "multi-token training does not (over 90%)",
                  f"first token of reversed running parities of {n} bits (chance: 50%): {shown}",
                  verdict(0.6 - first["NTP"], first["MTP"] - 0.9))
    whole = {label: part[label, "whole answer"] for label in part.labels}
    yield Finding("planning", "Leaping heads, which look further, learn it as well (to half a percent) or better",
                  "whole answers: " + ", ".join(f"{label} {percent(w)}" for label, w in whole.items()),
                  verdict(whole["leap k=2"] - whole["MTP"] + 0.005))


def of_backbone(part):
    """What heads do to the model itself."""
    nats = {label: part[label, "nats"] for label in part.labels}
    yield Finding("backbone", "The multi-token loss makes the next-token model itself better",
                  "nats of the next token: " + ", ".join(f"{label} {spread(n, 3)}" for label, n in nats.items()),
                  verdict(nats["NTP, same text"] - nats["MTP"]))


def of_headline(part):
    """The fastest decoder."""
    (label,) = part.labels

    def shown(way):
        if part[label, f"compiled, greedy, {way}, block"][0] == 1:
            return f"{way} of 1, that is NTP"
        v = {k: part[label, f"compiled, {k}"][0] for k in (
            *(f"{kind}, {way}, {what}" for kind in ("greedy", "sampled") for what in ("speedup", "tokens_per_step")),
            f"greedy, {way}, block", f"real text, {way}")}
        return (f"{way} of {v[f'greedy, {way}, block']:.0f}: " + ", ".join(
            f"{kind} {v[f'{kind}, {way}, speedup']:.2f}x ({v[f'{kind}, {way}, tokens_per_step']:.2f} tokens per step)"
            for kind in ("greedy", "sampled")) + f", {v[f'real text, {way}']:.2f} on real text")
    best = max(part[label, f"compiled, greedy, {way}, speedup"][0] for way in ("chain", "tree"))
    yield Finding("headline", "Our aim: 5x over our own compiled NTP decoder, greedy, on held-out code, byte by byte",
                  f"{shown('chain')}; calibrated {shown('tree')}", "reached" if best >= 5 else "missed")


FINDINGS = dict(scale=of_scale, layers=of_layers, adapt=of_adapt, leap=of_leap, planning=of_planning,
                backbone=of_backbone, headline=of_headline)


# ---------------------------------------------------------------------------------------------------------------------
# The tables

COLUMNS = dict(                                                             # part: (title, name of a number, format)
    scale=[("parameters", "parameters", lambda v: f"{v[0]:,.0f}"), ("t+1", "model t+1", percent),
           *((f"t+{d}", f"marginalisation t+{d}", percent) for d in (2, 3, 4)),
           ("t+2, greedy rollout", "greedy rollout t+2", percent)],
    adapt=[*((f"t+{d}, heads", f"own head t+{d}", percent) for d in (2, 3, 4)),
           *((f"t+{d}, marginalised", f"marginalisation t+{d}", percent) for d in (2, 3, 4)),
           ("NTP, nats", "nats", lambda v: spread(v, 3)), ("lost", "lost", lambda v: spread(v, 3))],
    leap=[("real text, chain", "real text, chain", spread), ("formula", "formula, chain", spread),
          ("greedy", "greedy, chain", spread), ("sampled", "sampled, chain", spread),
          ("real text, tree", "real text, tree", spread), ("greedy, tree", "greedy, tree", spread),
          ("sampled, tree", "sampled, tree", spread), ("NTP, nats", "nats", lambda v: spread(v, 3)),
          ("speedup, greedy", "compiled, greedy, chain, speedup", spread),
          ("speedup, sampled", "compiled, sampled, chain, speedup", spread)],
    planning=[("whole answer", "whole answer", percent), ("first token", "token 1", percent),
              ("second", "token 2", percent), ("third", "token 3", percent)],
    backbone=[("nats", "nats", lambda v: spread(v, 3)), ("accuracy", "accuracy of offset 1", percent)],
    headline=[(f"{kind}, {way}: {title}", f"compiled, {kind}, {way}, {key}", spread)
              for kind in ("greedy", "sampled") for way in ("NTP", "chain", "tree")
              for title, key in (("tokens/s", "tokens_per_second"), ("tokens/step", "tokens_per_step"))])


def columns(name, part):
    """Of a part's table."""
    if name == "layers":
        return [(f"t+{d}, layer {i}", f"probe t+{d} layer {i}", percent) for d in (1, 2)
                for i in range(len(by_layer(part, "NTP", d)))]
    return COLUMNS[name]


def tables(parts, size):
    """All numbers that the claims rest on, as a page of Markdown."""
    lines = [f"# The study, size {size}: all tables", "",
             "Made by `experiments/findings.py` from the result files beside it. Means of three seeds, in brackets the "
             "lowest and the highest; accuracies in %. How each row was trained stands below its table.", ""]
    for name, part in parts.items():
        shown, r = columns(name, part), part.results
        where = r["environment"]
        lines += [f"## {name}", "", f"`{r['command']}`, {where['date']}, torch {where['torch']}, "
                  f"{where['device_name']}, {where['threads']} threads", "",
                  "| | " + " | ".join(title for title, _, _ in shown) + " |", "|---" * (1 + len(shown)) + "|"]
        for label in part.labels:
            cells = [form(part[label, key]) if key in part.values[label] else "" for _, key, form in shown]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines += ["", f"![{name}](study_{size}_{name}.png)", ""]
        for label in part.labels:
            for key in (k for k in part.values[label] if k.startswith("layer weights")):
                shares = " ".join(f"{share:.0%}" for share in part[label, key].mean(0))
                lines.append(f"- {label}: the head of offset {key.split()[-1]} reads layers 1 to "
                             f"{part[label, key].shape[1]} with {shares}")
        lines += [f"- {row['label']}: " + ", then ".join(f"`{options}`" for options in row["train"].values())
                  for row in r["rows"] if row["train"]]
        lines.append("")
    return "\n".join(lines)


def findings_table(parts, size):
    """The README's table, between its marks."""
    lines = [f"<!-- findings: {size} -->",
             f"| claim | measured (accuracies in %) | verdict | | `study.py --size {size}` |", "|---|---|---|---|---|"]
    for name, part in parts.items():
        for f in FINDINGS[name](part):
            figure = f"experiments/results/study_{size}_{name}"
            lines.append(f"| {f.claim} | {f.measured} | **{f.verdict}** | [figure]({figure}.png), "
                         f"[result]({figure}.json) | `--only {name}` |")
    return "\n".join([*lines, "<!-- end of findings -->"])


MARKED = re.compile(r"<!-- findings: (\w+) -->.*?<!-- end of findings -->", re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------------
# The figures: one per part, plt being matplotlib.pyplot. Every seed is a point, lines and bars are means.

def dots(axis, part, key, factor=1.0, color="C0", labels=None):
    """A row for each label of the part; in those that have the number (or in `labels`), a dot for each seed and a line
    at their mean."""
    for y, label in enumerate(reversed(part.labels)):
        if key in part.values[label] and label in (labels or part.labels):
            values = factor * part[label, key]
            axis.plot(values, [y] * len(values), "o", color=color, alpha=0.5, markersize=5)
            axis.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color=color, linewidth=2)
    axis.set_yticks(range(len(part.labels)), list(reversed(part.labels)))
    axis.set_ylim(-0.6, len(part.labels) - 0.4)
    axis.grid(axis="y", alpha=0.3)


def line(axis, x, values, **style):
    """values (seeds, n): their mean, and a band from the lowest to the highest."""
    (drawn,) = axis.plot(x, values.mean(0), **{"marker": "o", "markersize": 4, **style})
    axis.fill_between(x, values.min(0), values.max(0), color=drawn.get_color(), alpha=0.2, linewidth=0)


def draw_scale(part, plt):
    """Accuracy by distance: of the sizes, of the texts."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    ladder = [label for label in part.labels if label.startswith("python")]
    for axis, labels in zip(axes, (ladder, [ladder[-2], *(label for label in part.labels if label not in ladder)])):
        for label in labels:
            keys = ["model t+1", *(f"marginalisation t+{d}" for d in (2, 3, 4))]
            line(axis, range(1, 5), 100 * np.stack([part[label, k] for k in keys], 1), label=label)
        axis.set(xlabel="distance (tokens ahead)", xticks=range(1, 5))
        axis.legend(fontsize=8)
    axes[0].set(title="by size", ylabel="top-1 accuracy, marginalised, %", ylim=(0, None))
    axes[1].set(title="by text, at one size")
    return figure


def draw_layers(part, plt):
    """Probes, layer by layer."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, label in zip(axes, part.labels):
        for d, color in ((1, "C0"), (2, "C3")):
            for reader, style in (("probe", "-"), ("lens", ":")):
                values = 100 * by_layer(part, label, d, reader).T           # (seeds, layers)
                line(axis, range(values.shape[1]), values, color=color, linestyle=style, label=f"t+{d}, {reader}")
        axis.set(xlabel="layer (0: the embeddings)", title=f"trained as {label}", ylim=(0, None),
                 xticks=range(values.shape[1]))
        axis.legend(fontsize=8)
    axes[0].set_ylabel("top-1 accuracy, %")
    return figure


def draw_adapt(part, plt):
    """What each recipe's heads reach, and what it costs."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharey=True, layout="constrained")
    dots(axes[0], part, "own head t+2", 100)
    dots(axes[0], part, "marginalisation t+2", 100, "C3", part.labels[:1])
    axes[0].axvline(100 * part[part.labels[0], "marginalisation t+2"].mean(), color="C3", linestyle="--", linewidth=1)
    dots(axes[1], part, "lost", 1, "C1")
    axes[1].axvline(0, color="gray", linewidth=1)
    axes[0].set(xlabel="accuracy of the heads at t+2, %", title="what the heads reach (dashed: marginalisation)")
    axes[1].set(xlabel="nats", title="what next-token prediction lost")
    axes[1].locator_params(axis="x", nbins=6)
    return figure


def draw_leap(part, plt):
    """Attenuation, and tokens per step."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(2, 3))
    for label, offsets in OFFSETS.items():
        keys = [f"accuracy of offset {o}" for o in offsets]
        line(axes[0], offsets, 100 * np.stack([part[label, k] for k in keys], 1), label=label)
    axes[0].set(xlabel="offset", ylabel="top-1 accuracy, %", title="attenuation", ylim=(0, None))
    axes[0].legend()
    kinds = [f"{kind}, {way}" for way in ("chain", "tree") for kind in ("real text", "greedy", "sampled")]
    for i, label in enumerate(part.labels):
        means = [part[label, k].mean() for k in kinds]
        at = np.arange(len(kinds)) + 0.16 * (i - 2)
        axes[1].bar(at, means, 0.15, label=label)
        for x, k in zip(at, kinds):
            axes[1].plot([x, x], [part[label, k].min(), part[label, k].max()], color="black", linewidth=1)
    axes[1].set(ylabel="tokens per step", title="what is written per step", ylim=(1, None))
    axes[1].set_xticks(range(len(kinds)), [k.replace(", ", "\n") for k in kinds])
    axes[1].legend(fontsize=8)
    return figure


def draw_planning(part, plt):
    """Accuracy of every token of the answer."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, style in zip(part.labels, ("-", "-", "--")):                 # one may lie upon the other
        n = sum(k.startswith("token") for k in part.values[label])
        right = np.stack([part[label, f"token {i}"] for i in range(1, n + 1)], 1)
        line(axis, range(1, n + 1), 100 * right, label=label, linestyle=style)
    axis.axhline(50, color="gray", linestyle="--", linewidth=1, label="chance")
    axis.set(xlabel="token of the answer, those before it given", xticks=range(1, n + 1), ylabel="accuracy, %",
             ylim=(0, 105))
    axis.legend()
    return figure


def draw_backbone(part, plt):
    """The next-token loss of models trained with heads and without."""
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    dots(axis, part, "nats")
    axis.set(xlabel="held-out nats of the next token (less is better)")
    return figure


def draw_headline(part, plt):
    """Tokens per second."""
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    (label,) = part.labels
    for i, kind in enumerate(("greedy", "sampled")):
        for j, way in enumerate(("NTP", "chain", "tree")):
            speed = part[label, f"compiled, {kind}, {way}, tokens_per_second"][0]
            gain = part[label, f"compiled, {kind}, {way}, speedup"][0]
            axis.barh(3 * (1 - i) + (2 - j) * 0.8, speed, 0.7, color=f"C{j}", label=way if i == 0 else None)
            axis.text(speed, 3 * (1 - i) + (2 - j) * 0.8, f" {gain:.2f}x", va="center", fontsize=9)
    axis.set_yticks([3.8, 0.8], ["greedy", "temperature 1"])
    axis.set(xlabel="tokens per second, one text at a time")
    axis.margins(x=0.15)
    axis.legend(fontsize=8)
    return figure


FIGURES = dict(scale=draw_scale, layers=draw_layers, adapt=draw_adapt, leap=draw_leap, planning=draw_planning,
               backbone=draw_backbone, headline=draw_headline)


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def load(folder, size):
    """{name: Part} of the parts that have results. Raises InputError when none has."""
    paths = {name: folder / f"study_{size}_{name}.json" for name in FINDINGS}
    parts = {name: Part(path) for name, path in paths.items() if path.exists()}
    if not parts:
        raise InputError(f"{folder} has no results of size {size} yet; make them with: python experiments/study.py "
                         f"--size {size}")
    if "adapt" in parts:
        adapt = parts["adapt"]
        for label in adapt.labels[1:]:                                      # against the model that it started from
            adapt.values[label]["lost"] = (adapt[label, "nats"] - adapt[adapt.labels[0], "nats"]).tolist()
    return parts


def main():
    """Write everything; bad input is one line and status 2."""
    p = argparse.ArgumentParser(prog="findings.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                description="Figures, tables and the README's findings from the study's results.")
    p.add_argument("--size", choices=["quick", "patient", "full"], default="quick", help="of the study")
    p.add_argument("--results", default=str(ROOT / "experiments" / "results"), metavar="FOLDER", help="where they are")
    p.error = lambda message: p.exit(2, f"findings.py: error: {message}\n")
    args = p.parse_args()
    with one_line_errors("findings.py", memory="nothing"):
        folder, plt = Path(args.results), import_matplotlib()
        parts = load(folder, args.size)
        write_whole(folder / f"study_{args.size}.md", tables(parts, args.size))
        for name, part in parts.items():
            if plt:
                FIGURES[name](part, plt).savefig(folder / f"study_{args.size}_{name}.png", dpi=100)
            for f in FINDINGS[name](part):
                print(f"{f.verdict:32}{f.claim}\n{'':32}{f.measured}")
        if not plt:
            print("no figures: they need matplotlib, pip install -e '.[experiments]'")
        readme = (ROOT / "README.md").read_text()
        found = MARKED.search(readme)
        if found and found[1] == args.size and folder.resolve() == ROOT / "experiments" / "results":
            write_whole(ROOT / "README.md", MARKED.sub(lambda _: findings_table(parts, args.size), readme))


if __name__ == "__main__":
    main()
