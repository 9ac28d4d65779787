"""What the study found: figures, tables and the README's findings, made from its result files and from nothing else.

    python experiments/findings.py --size quick

A claim is compared seed by seed. It counts as reproduced when the difference that it speaks of is there with every
seed, as not reproduced when it is the other way round with every seed, and otherwise it cannot be seen at this size.
(With three seeds, chance alone would give each of the first two one time in eight.) What is shown of three seeds is
their mean, and the lowest and the highest in brackets.

It writes study_SIZE.md with all tables and study_SIZE_PART.png beside the results, and what stands in the README
between the marks `<!-- findings: SIZE, OTHER SIZE -->` and `<!-- end of findings -->`.

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
from common import one_line_errors, write_whole


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


def verdicts(differences):
    """Of a claim about several kinds of text, {kind: differences}, as one line."""
    said = {}
    for kind, d in differences.items():
        said.setdefault(verdict(d), []).append(kind)
    return "; ".join(v + f" ({', '.join(kinds)})" * (len(said) > 1) for v, kinds in said.items())


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
    data = {"translation": translation, "code": prose.replace("shakespeare", "python"), "prose": prose}
    lost = {name: 1 - part[x, later] / part[x, "model t+1"] for name, x in data.items()}
    yield Finding("scale", "It depends on the text: more in translation than in open-ended text (A2)",
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
    best = 1 + two[1:-1].mean(1).argmax()                                   # layer, not for each seed another
    yield Finding("layers", "What is useful for t+2 is discarded on the way up (A3)",
                  f"probe for t+2, layer by layer: {', '.join(f'{m:.1%}' for m in two.mean(1))}",
                  verdict(two[best] - two[-1]))
    yield Finding("layers", "Layers specialise for the next token: the upper half does more for t+1 than for t+2, and "
                  "for t+2 more where heads were trained along (A3)",
                  f"probes gain in the upper half of the layers: t+1 {percent(upper(one))}, t+2 {percent(upper(two))}; "
                  f"with heads t+2 {percent(upper(heads))}",
                  verdict(upper(one) - upper(two), upper(heads) - upper(two)))


def of_adapt(part):
    """Paper A, claims 3 to 6. Heads against marginalisation: where both are asked; heads against heads: everywhere."""
    base, trained_on, *labels = part.labels
    asked, head = ({label: part[label, key] for label in labels} for key in ("own head t+2", "accuracy of offset 2"))
    known, known_then = (part[label, "marginalisation t+2"] for label in (base, trained_on))
    lost = {label: part[label, "lost"] for label in labels}
    frozen, joint = ([x for x in labels if x != "from scratch" and x.startswith("frozen") == f] for f in (True, False))

    def best(some, of):
        return max(some, key=lambda label: of[label].mean())

    def helps(claim, a, b):
        """The claim that recipe a is better than recipe b."""
        price = lost[a] - lost[b]
        said = verdict(head[a] - head[b])
        if said == "reproduced" and price.min() > 0:
            said += ", but NTP lost more"
        if said == "not reproduced" and price.max() < 0:
            said += ", but NTP lost less"
        return Finding("adapt", claim, f"t+2 {percent(head[a])} against {percent(head[b])}; NTP lost "
                       f"{spread(lost[a], 3)} against {spread(lost[b], 3)} nats", said)
    top = best(frozen, asked)
    yield Finding("adapt", "Heads on a frozen backbone stay below marginalisation (A3)",
                  f"t+2: the best frozen heads ({top.removeprefix('frozen, ')}) {percent(asked[top])}, marginalised "
                  f"{percent(known)}", verdict(*(known - asked[x] for x in frozen)))
    yield helps("Training heads and backbone jointly helps (A4)", "joint, weight 1", "frozen, resblock heads")
    top = best(joint, asked)
    yield Finding("adapt", "... but does not close the gap to marginalisation (A4)",
                  f"t+2: the best joint recipe ({top}) {percent(asked[top])}; marginalised, the base {percent(known)}, "
                  f"and trained on without heads for the same compute {percent(known_then)}",
                  verdict(*(known_then - asked[x] for x in joint)))
    yield helps("Differential learning rates help (A4)", "+ differential rates", "joint, weight 1")
    yield helps("Head warm-up helps (A4)", "+ head warm-up", "+ differential rates")
    yield helps("Weighted hidden states help frozen heads (A5)", "frozen, WHS", "frozen, resblock heads")
    yield helps("Weighted hidden states help jointly trained heads (A5)", "+ WHS", "+ head warm-up")
    top = best([x for x in (*frozen, *joint) if x != "+ WHS"], head)
    yield helps("WHS with joint training and differential rates is best of all (A5; against the best other)", "+ WHS",
                top)
    yield helps("From scratch beats adapting, at the same compute in all (A6, an open question there)", "from scratch",
                best([*frozen, *joint], head))


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


KINDS, ON_A_BASE = ("real text", "greedy", "sampled"), "leap k=2 on a base, "


def more_than(claim, part, a, b, kinds, shown):
    """The claim that row a has more of a number than row b in several kinds of text, {kind: name of the number}."""
    return Finding("leap", claim, "; ".join(
        f"{kind}: " + ", ".join(f"{label.removeprefix(ON_A_BASE)} {spread(part[label, k])}" for label in shown)
        for kind, k in kinds.items()),
        verdicts({kind: part[a, k] - part[b, k] for kind, k in kinds.items()}))


def of_leap(part):
    """Paper B."""
    mtp, leap, _ = OFFSETS
    falls = [part[m, f"accuracy of offset {a}"] - part[m, f"accuracy of offset {b}"]
             for m, offsets in OFFSETS.items() for a, b in zip(offsets, offsets[1:])]
    yield Finding("leap", "Accuracy falls with the offset (B5, attenuation)", "; ".join(
        f"{m}: " + ", ".join(f"{part[m, f'accuracy of offset {o}'].mean():.0%}" for o in offsets)
        for m, offsets in OFFSETS.items()), verdict(*falls))
    for way, name in (("chain", ""), ("tree", ", in a tree of 15 candidates each")):
        yield more_than(f"Leaping writes more tokens per step than as many adjacent heads{name} (B3)", part, leap, mtp,
                        {kind: f"{kind}, {way}" for kind in KINDS}, OFFSETS)

    g, even = {m: attenuation(part, m) for m in (mtp, leap)}, break_even(OFFSETS[mtp], OFFSETS[leap])
    wins = {kind: part[leap, f"{kind}, chain"] > part[mtp, f"{kind}, chain"] for kind in KINDS}
    right = {kind: np.where((g[mtp] < even) == w, 1, -1) + np.where((g[leap] < even) == w, 1, -1)   # both, or none
             for kind, w in wins.items()}
    yield Finding("leap", "The break-even of attenuation says whether leaping wins (B5)",
                  "exp(-g (o - 1)) fits " + " and ".join(f"{m} with g = {spread(x)}" for m, x in g.items())
                  + f"; leap k=2 should win below {even:.2f}", verdicts(right))

    real = {m: part[m, "real text, chain"] for m in OFFSETS}

    def beside_measured(formula):
        return "; ".join(f"{m} {formula[m].mean():.2f} against {real[m].mean():.2f}" for m in OFFSETS)

    def same_order(formula):
        return verdict(*((formula[m] - formula[mtp]) * (real[m] - real[mtp]) for m in OFFSETS if m != mtp))
    apart = {m: expected(o, lambda x, m=m: part[m, f"accuracy of offset {x}"]) for m, o in OFFSETS.items()}
    given = {m: part[m, "formula, chain"] for m in OFFSETS}
    yield Finding("leap", "The formula, from how often each offset is right, ranks MTP and leap as real text does (B5)",
                  "formula against tokens per step: " + beside_measured(apart), same_order(apart))
    yield Finding("leap", "The same, from how often a guess is right given that all nearer ones are (B5)",
                  "formula against tokens per step: " + beside_measured(given), same_order(given))

    two, gentle, hard = (ON_A_BASE + x for x in ("two stages", "one gentle stage", "one stage"))
    yield more_than("L-MTP's two stages write more tokens per step than one, gentle as the second (B2)",
                    part, two, gentle, {kind: f"{kind}, chain" for kind in KINDS}, (two, gentle, hard))
    nats = {label: part[label, "nats"] for label in (two, gentle, hard)}
    yield Finding("leap", "... and cost the next-token model less (B2)", "next-token loss in nats: " + ", ".join(
        f"{label.removeprefix(ON_A_BASE)} {spread(n, 3)}" for label, n in nats.items()),
        verdict(nats[gentle] - nats[two]))
    if "compiled, greedy, chain, speedup" in part.values[mtp]:              # where torch.compile works
        yield more_than("Leaping is faster than as many adjacent heads (wall-clock speedup over compiled NTP)", part,
                        leap, mtp, {k: f"compiled, {k}, chain, speedup" for k in ("greedy", "sampled")}, OFFSETS)


def of_planning(part):
    """The task in which looking ahead matters."""
    first = {label: part[label, "token 1"] for label in part.labels}
    shown = ", ".join(f"{label} {percent(f)}" for label, f in first.items())
    n = sum(k.startswith("token") for k in part.values["NTP"])
    yield Finding("planning", "Where the first token needs the whole plan, heads for later tokens help to learn it",
                  f"first token of reversed running parities of {n} bits (chance: 50%): {shown}",
                  verdict(first["MTP"] - first["NTP"]))
    whole = {label: part[label, "whole answer"] for label in part.labels}
    yield Finding("planning", "Leaping heads, which look further, learn it better than adjacent ones",
                  "whole answers: " + ", ".join(f"{label} {percent(w)}" for label, w in whole.items()),
                  verdict(whole["leap k=2"] - whole["MTP"]))


def of_backbone(part):
    """What heads do to the model itself."""
    nats = {label: part[label, "nats"] for label in part.labels}
    yield Finding("backbone", "The multi-token loss makes the next-token model itself better, with as much text and "
                  "with as much compute",
                  "nats of the next token: " + ", ".join(f"{label} {spread(n, 3)}" for label, n in nats.items()),
                  verdict(*(nats[f"NTP, same {what}"] - nats["MTP"] for what in ("text", "compute"))))


def of_headline(part):
    """The fastest decoder."""
    (label,) = part.labels

    def shown(way):
        block, *v = (part[label, f"compiled, {k}"][0] for k in (
            f"greedy, {way}, block", *(f"{kind}, {way}, {what}" for kind in ("greedy", "sampled")
                                       for what in ("speedup", "tokens_per_step")), f"real text, {way}"))
        return (f"block of {block:.0f}: greedy {v[0]:.2f}x ({v[1]:.2f} tokens per step), sampled {v[2]:.2f}x "
                f"({v[3]:.2f}), {v[4]:.2f} on real text")
    chain, tree = shown("chain"), shown("tree")
    if part[label, "compiled, greedy, tree, block"][0] == 1:
        tree = "NTP, no other pays"
    best = max(part[label, f"compiled, greedy, {way}, speedup"][0] for way in ("chain", "tree"))
    yield Finding("headline", "Our aim: 5x over our own compiled NTP decoder, byte by byte, continuing held-out code "
                  "greedily", f"chain, {chain}; calibrated: {'the same' if tree == chain else tree}",
                  "reached" if best >= 5 else "missed")


FINDINGS = dict(scale=of_scale, layers=of_layers, adapt=of_adapt, leap=of_leap, planning=of_planning,
                backbone=of_backbone, headline=of_headline)


# ---------------------------------------------------------------------------------------------------------------------
# The tables

COLUMNS = dict(                                                             # part: (title, name of a number, format)
    scale=[("parameters", "parameters", lambda v: f"{v[0]:,.0f}"), ("t+1", "model t+1", percent),
           *((f"t+{d}", f"marginalisation t+{d}", percent) for d in (2, 3, 4)),
           ("t+2, greedy rollout", "greedy rollout t+2", percent)],
    adapt=[("t+2, heads, everywhere", "accuracy of offset 2", percent),
           *((f"t+{d}, heads", f"own head t+{d}", percent) for d in (2, 3, 4)),
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
             "lowest and the highest; accuracies in %. How each row was trained stands below its table.", "",
             "## claims", "", findings_table({size: parts}), ""]
    for name, part in parts.items():
        shown, r = columns(name, part), part.results
        where = r["environment"]
        lines += [f"## {name}", "", f"`{r['command']}`, {where['date']}, torch {where['torch']}, "
                  f"{where['device_name']}; its pieces took {r['seconds']['side by side']:,} s of a core side by side, "
                  f"and {r['seconds']['alone']:,} s alone", "",
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


def findings_table(sizes, folder=""):
    """The claims, from {size: parts}: what the first size measured and its verdict, and the verdicts of the others;
    with links into `folder`. In the README it stands between marks."""
    (size, parts), *others = sizes.items()
    titles = ["claim", f"measured, size {size} (accuracies in %)", "verdict",
              *(f"verdict, size {other}" for other, _ in others), f"`study.py --size {size}`"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, part in parts.items():
        said = [list(FINDINGS[name](p[name])) if name in p else None for _, p in others]
        file = f"{folder}study_{size}_{name}"
        for i, f in enumerate(FINDINGS[name](part)):
            verdicts = [f"**{f.verdict}**", *(s[i].verdict if s else "" for s in said)]
            lines.append(f"| {f.claim} | {f.measured} | {' | '.join(verdicts)} | `--only {name}` "
                         f"([figure]({file}.png), [result]({file}.json)) |")
    return "\n".join(lines)


MARKED = re.compile(r"(<!-- findings: (.*?) -->\n).*?(\n<!-- end of findings -->)", re.DOTALL)


def with_findings(readme, folder):
    """The README with the findings of the sizes that its mark names, from the results in `folder`."""
    def filled(found):
        sizes = {size: load(folder, size) for size in found[2].split(", ")}
        return found[1] + findings_table(sizes, "experiments/results/") + found[3]
    return MARKED.sub(filled, readme)


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
    texts = [label for label in part.labels if label not in ladder]
    shape = texts[0].split(", ")[1]
    for axis, labels in zip(axes, (ladder, [f"python, {shape}", *texts])):
        for label in labels:
            keys = ["model t+1", *(f"marginalisation t+{d}" for d in (2, 3, 4))]
            line(axis, range(1, 5), 100 * np.stack([part[label, k] for k in keys], 1), label=label,
                 color=f"C{part.labels.index(label)}")
        axis.set(xlabel="distance (tokens ahead)", xticks=range(1, 5))
        axis.legend(fontsize=8)
    axes[0].set(title="by size (layers x width)", ylabel="top-1 accuracy, marginalised, %", ylim=(0, None))
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
    dots(axes[0], part, "marginalisation t+2", 100, "C3", part.labels[:2])
    axes[0].axvline(100 * part[part.labels[0], "marginalisation t+2"].mean(), color="C3", linestyle="--", linewidth=1)
    dots(axes[1], part, "lost", 1, "C1")
    axes[1].axvline(0, color="gray", linewidth=1)
    axes[0].set(xlabel="accuracy of the heads at t+2, %", title="heads; red: marginalised")
    axes[1].set(xlabel="nats", title="what next-token prediction lost")
    axes[1].locator_params(axis="x", nbins=6)
    return figure


def draw_leap(part, plt):
    """Attenuation, and tokens per step."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(2, 3))
    for label, offsets in OFFSETS.items():
        keys = [f"accuracy of offset {o}" for o in offsets]
        line(axes[0], offsets, 100 * np.stack([part[label, k] for k in keys], 1), label=label)
    axes[0].set(xlabel="offset", ylabel="top-1 accuracy, %", title="attenuation", ylim=(0, None),
                xticks=sorted({o for offsets in OFFSETS.values() for o in offsets}))
    axes[0].legend()
    kinds = [f"{kind}, {way}" for way in ("chain", "tree") for kind in ("real text", "greedy", "sampled")]
    for i, label in enumerate(part.labels):
        means = [part[label, k].mean() for k in kinds]
        at = np.arange(len(kinds)) + 0.16 * (i - 2)
        axes[1].bar(at, means, 0.15, label=label)
        for x, k in zip(at, kinds):
            axes[1].plot([x, x], [part[label, k].min(), part[label, k].max()], color="black", linewidth=1)
        for x, way in ((at[0], "chain"), (at[3], "tree")):                  # of real text
            axes[1].plot(x, part[label, f"formula, {way}"].mean(), "kx", markersize=5,
                         label="formula, from a_j" if i == 0 and way == "chain" else None)
    axes[1].set(ylabel="tokens per step", title="tokens per step (lines: all seeds)",
                ylim=(1, 1.3 * axes[1].get_ylim()[1]))
    axes[1].set_xticks(range(len(kinds)), [k.replace(", ", "\n") for k in kinds])
    axes[1].legend(fontsize=8, ncols=2, loc="upper left")
    return figure


def draw_planning(part, plt):
    """Accuracy of every token of the answer."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, label in enumerate(part.labels):                                 # beside each other
        n = sum(k.startswith("token") for k in part.values[label])
        right = np.stack([part[label, f"token {i}"] for i in range(1, n + 1)])  # (n, seeds)
        at = np.arange(1, n + 1) + 0.2 * (i - 1)
        axis.plot(at, 100 * right, "o", color=f"C{i}", markersize=4, alpha=0.5)
        axis.bar(at, 100 * right.mean(1), 0.18, color=f"C{i}", alpha=0.5, label=label)
    axis.axhline(50, color="gray", linestyle="--", linewidth=1, label="chance")
    axis.set(xlabel="token of the answer, those before it given", xticks=range(1, n + 1), ylabel="accuracy, %",
             ylim=(0, 120), yticks=range(0, 101, 20))
    axis.legend(ncols=4, loc="upper center", fontsize=8)
    return figure


def draw_backbone(part, plt):
    """The next-token loss of models trained with heads and without."""
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    dots(axis, part, "nats")
    axis.set(xlabel="nats", title="held-out loss of the next token (less is better)")
    return figure


def draw_headline(part, plt):
    """Tokens per second."""
    figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
    (label,) = part.labels
    for i, kind in enumerate(("greedy", "sampled")):
        for j, way in enumerate(("NTP", "chain", "tree")):
            rate, gain, block = (part[label, f"compiled, {kind}, {way}, {what}"][0]
                                 for what in ("tokens_per_second", "speedup", "block"))
            if way != "tree" or (block > 1 and rate != part[label, f"compiled, {kind}, chain, tokens_per_second"][0]):
                axis.barh(3 * (1 - i) + (2 - j) * 0.8, rate, 0.7, color=f"C{j}", label=way if i == 0 else None)
                axis.text(rate, 3 * (1 - i) + (2 - j) * 0.8, f" {gain:.2f}x", va="center", fontsize=9)
    axis.set_yticks([3.8, 0.8], ["greedy", "temperature 1"])
    axis.set(xlabel="tokens per second, one text at a time", title=f"{label}, compiled")
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
    for name, part in parts.items():
        for label, values in part.values.items():
            if not all(all(v) for key, v in values.items() if key.endswith("identical")):
                raise InputError(f"{paths[name]}: '{label}' has written another text than NTP; its speed means nothing")
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
                print(f"{f.claim}: {f.verdict}\n    {f.measured}")
        if not plt:
            print("no figures: they need matplotlib, pip install -e '.[experiments]'")
        if folder.resolve() == ROOT / "experiments" / "results":
            readme = ROOT / "README.md"
            write_whole(readme, with_findings(readme.read_text(), folder))


if __name__ == "__main__":
    main()
