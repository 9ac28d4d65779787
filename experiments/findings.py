"""What the study found: figures, tables and docs/findings.md, made from its result files alone.

    python experiments/findings.py --size quick

Each claim is compared seed by seed. It is *reproduced* if the difference that it speaks of is
there with every seed, *not reproduced* if the difference is the other way round with every seed,
and *inconclusive* otherwise. (With three seeds, each of the first two has one chance in eight.) A
number from three seeds is shown as "mean [lowest, highest]".

The script writes study_SIZE.md, with all tables, and study_SIZE_PART.png beside the results. It
also writes one line per claim into docs/findings.md, between two marks, the first of which names
the sizes.

From the top: numbers in words, the claims, the tables, the figures, the command line.
"""
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import Parser, one_line_errors, write_whole
from experiments.calibrate import expected_tokens_per_step
from experiments.plots import import_pyplot
from heads import draft_sources
from model import InputError

RESULTS, PAGE = ROOT / "experiments" / "results", ROOT / "docs" / "findings.md"


class Part:
    """The results of a part: part[label, name of a number] is an array with one entry per seed."""

    def __init__(self, results):
        self.results = results
        self.values = {row["label"]: row["values"] for row in results["rows"]}
        self.labels = list(self.values)
        if results["part"] == "adapt":                              # nats that NTP has lost
            base, *others = self.labels
            for label in others:
                lost = self[label, "nats"] - self[base, "nats"]
                self.values[label]["lost"] = lost.tolist()

    def __getitem__(self, key):
        return np.array(self.values[key[0]][key[1]], dtype=float)


# ----------------------------------------------------------------------------------------------
# Numbers in words

def spread(values, digits=2, factor=1.0):
    """Mean, lowest and highest: "1.72 [1.70, 1.75]"; a single value as it is."""
    mean, *ends = (f"{factor * v:.{digits}f}" for v in (values.mean(), values.min(), values.max()))
    return mean if len(values) == 1 else f"{mean} [{', '.join(ends)}]"


def percent(values):
    """`spread` of fractions, as percentages."""
    return spread(values, 1, 100)


def nats(values):
    """`spread` of losses."""
    return spread(values, 3)


REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not reproduced", "inconclusive"


def verdict(*differences):
    """The verdict on a claim that all these differences (one entry per seed each) are positive."""
    if all(d.min() > 0 for d in differences):
        return REPRODUCED
    if any(d.max() < 0 for d in differences):
        return NOT_REPRODUCED
    return INCONCLUSIVE


def verdict_by_kind(differences):
    """The verdict on a claim about several kinds of text, {kind: differences}, as one line."""
    found = {}
    for kind, d in differences.items():
        found.setdefault(verdict(d), []).append(kind)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{v} ({', '.join(kinds)})" for v, kinds in found.items())


# ----------------------------------------------------------------------------------------------
# The claims

class Finding(NamedTuple):
    """A claim, the verdict on it, the number that says most, and everything that was measured."""
    claim: str
    verdict: str
    number: str
    measured: str


def find_scale(part):
    """Paper A, claims 1 and 2."""
    later = "marginalisation t+2"
    ladder = [label for label in part.labels if label.startswith("python")]
    known = [part[label, later] for label in ladder]                # small to large
    steps = [b - a for a, b in zip(known, known[1:])]
    above = [part[label, later] - part[label, "unigram t+2"] for label in ladder]
    yield Finding(
        "A next-token model already knows about later tokens; the more, the larger it is (A1)",
        verdict(*steps, *above),
        f"t+2: {known[0].mean():.1%} (smallest model), {known[-1].mean():.1%} (largest)",
        f"marginalised accuracy at t+2, small to large: {', '.join(map(percent, known))}")

    translation, prose = (x for name in ("multi30k", "shakespeare")
                          for x in part.labels if x.startswith(name))
    texts = {"translation": translation, "code": prose.replace("shakespeare", "python"),
             "prose": prose}
    at_two = {name: part[x, later] for name, x in texts.items()}
    lost = {name: 1 - at_two[name] / part[x, "model t+1"] for name, x in texts.items()}
    yield Finding(
        "How much depends on the text: more in translation than in open-ended text (A2)",
        verdict(lost["prose"] - lost["translation"], at_two["translation"] - at_two["prose"]),
        f"t+2: {at_two['translation'].mean():.1%} (translation), "
        f"{at_two['prose'].mean():.1%} (prose)",
        "at t+2 " + ", ".join(f"{name} {percent(x)}" for name, x in at_two.items())
        + f"; lost from t+1 to t+2: {', '.join(f'{x.mean():.0%}' for x in lost.values())}")


def by_layer(part, label, distance, reader="probe"):
    """The accuracy of every layer: (layers, seeds)"""
    layers = sum(key.startswith(f"{reader} t+{distance} layer") for key in part.values[label])
    return np.stack([part[label, f"{reader} t+{distance} layer {i}"] for i in range(layers)])


def find_layers(part):
    """Paper A, claim 3."""
    one, two, heads = (by_layer(part, *which) for which in (("NTP", 1), ("NTP", 2), ("MTP", 2)))
    best = 1 + two[1:-1].mean(1).argmax()                           # the same layer for all seeds
    yield Finding(
        "What is useful for t+2 is discarded on the way up the layers (A3)",
        verdict(two[best] - two[-1]),
        f"probe for t+2: {two[best].mean():.1%} (best layer below the last), "
        f"{two[-1].mean():.1%} (last)",
        f"probe for t+2, layer by layer: {', '.join(f'{m:.1%}' for m in two.mean(1))}")

    gain_one, gain_two, gain_heads = (p[-1] - p[len(p) // 2] for p in (one, two, heads))
    yield Finding(
        "The upper layers serve t+1 more than t+2; trained with heads, they serve t+2 more (A3)",
        verdict(gain_one - gain_two, gain_heads - gain_two),
        f"gain in points: t+1 {100 * gain_one.mean():.1f}, t+2 {100 * gain_two.mean():.1f}, with "
        f"heads {100 * gain_heads.mean():.1f}",
        f"probes gain in the upper half of the layers: t+1 {percent(gain_one)}, t+2 "
        f"{percent(gain_two)}; with heads t+2 {percent(gain_heads)}")


def find_adapt(part):
    """Paper A, claims 3 to 6. Heads are compared with marginalisation at the positions that both
    were asked about, and with other heads at all positions."""
    base, trained_on, *labels = part.labels
    asked = {label: part[label, "own head t+2"] for label in labels}
    head = {label: part[label, "accuracy of offset 2"] for label in labels}
    lost = {label: part[label, "lost"] for label in labels}
    known, known_then = (part[x, "marginalisation t+2"] for x in (base, trained_on))
    frozen = [x for x in labels if x.startswith("frozen")]
    joint = [x for x in labels if x not in frozen and x != "from scratch"]

    def best(some, of):
        return max(some, key=lambda label: of[label].mean())

    def helps(claim, a, b):
        """The claim that recipe a is better than recipe b."""
        found, price = verdict(head[a] - head[b]), lost[a] - lost[b]
        if found == REPRODUCED and price.min() > 0:
            found += ", but NTP lost more"
        if found == NOT_REPRODUCED and price.max() < 0:
            found += ", but NTP lost less"
        return Finding(
            claim, found, f"t+2: {head[a].mean():.1%} against {head[b].mean():.1%}",
            f"t+2 {percent(head[a])} ({a}) against {percent(head[b])} ({b}); NTP lost "
            f"{nats(lost[a])} against {nats(lost[b])} nats")

    top = best(frozen, asked)
    yield Finding(
        "Heads on a frozen backbone stay below marginalisation (A3)",
        verdict(*(known - asked[x] for x in frozen)),
        f"t+2: {asked[top].mean():.1%} (best heads), {known.mean():.1%} (marginalised)",
        f"t+2: the best frozen heads ({top.removeprefix('frozen, ')}) {percent(asked[top])}, "
        f"marginalised {percent(known)}")
    yield helps("Training heads and backbone jointly helps (A4)",
                "joint, weight 1", "frozen, resblock heads")
    top = best(joint, asked)
    yield Finding(
        "... but does not close the gap to marginalisation (A4)",
        verdict(*(known_then - asked[x] for x in joint)),
        f"t+2: {asked[top].mean():.1%} (best heads), {known_then.mean():.1%} (marginalised)",
        f"t+2: the best joint recipe ({top}) {percent(asked[top])}; marginalised, the base "
        f"{percent(known)}, and the base trained on without heads at equal compute "
        f"{percent(known_then)}")
    yield helps("Differential learning rates help (A4)", "+ differential rates", "joint, weight 1")
    yield helps("Head warm-up helps (A4)", "+ head warm-up", "+ differential rates")
    yield helps("Weighted hidden states (WHS) help frozen heads (A5)",
                "frozen, WHS", "frozen, resblock heads")
    yield helps("WHS help jointly trained heads (A5)", "+ WHS", "+ head warm-up")
    top = best([x for x in (*frozen, *joint) if x != "+ WHS"], head)
    yield helps("WHS, joint training and differential rates together are best of all (A5)",
                "+ WHS", top)
    yield helps("Training from scratch beats adapting at equal compute (A6, an open question)",
                "from scratch", best([*frozen, *joint], head))


OFFSETS = {"MTP": (1, 2, 3, 4), "leap k=2": (1, 3, 5, 7), "leap k=3": (1, 4, 7, 10)}
KINDS, ON_A_BASE = ("real text", "greedy", "sampled"), "leap k=2 on a base, "


def attenuation(part, label):
    """g of accuracy(o) = exp(-g (o - 1)), by least squares on the logarithms, for every seed."""
    x = np.array(OFFSETS[label][1:]) - 1
    y = -np.log([part[label, f"accuracy of offset {o}"] for o in OFFSETS[label][1:]])
    return x @ y / (x @ x)


def expected(offsets, accuracy):
    """Tokens per step by the paper's formula, if drafts are right independently of each other,
    each as often as its offset is: accuracy(offset)."""
    sources = sorted(draft_sources(offsets).items())
    return expected_tokens_per_step([accuracy(o) for _, (o, _) in sources])


def break_even(a, b):
    """The attenuation below which offsets b write more tokens per step than offsets a, by the
    formula; by bisection."""
    low, high = 1e-6, 10.0
    for _ in range(60):
        g = (low + high) / 2
        of_a, of_b = (expected(x, lambda o: math.exp(-g * (o - 1))) for x in (a, b))
        low, high = (g, high) if of_b > of_a else (low, g)
    return low


def find_more(claim, part, a, b, kinds, shown, unit=""):
    """The claim that row a has more of a number than row b in several kinds of text, {kind: name
    of the number}."""
    first, key = next(iter(kinds.items()))
    measured = [f"{kind}: " + ", ".join(f"{label.removeprefix(ON_A_BASE)} {spread(part[label, k])}"
                                        for label in shown) for kind, k in kinds.items()]
    return Finding(
        claim, verdict_by_kind({kind: part[a, k] - part[b, k] for kind, k in kinds.items()}),
        f"{first}: {part[a, key].mean():.2f}{unit} against {part[b, key].mean():.2f}{unit}",
        "; ".join(measured))


def find_leap(part):
    """Paper B."""
    mtp, leap, _ = OFFSETS
    accuracy = {m: [part[m, f"accuracy of offset {o}"] for o in OFFSETS[m]] for m in OFFSETS}
    falls = [a - b for found in accuracy.values() for a, b in zip(found, found[1:])]
    yield Finding(
        "Accuracy falls with the offset (B5, attenuation)",
        verdict(*falls),
        f"MTP: {accuracy[mtp][0].mean():.0%} at offset 1, {accuracy[mtp][-1].mean():.0%} at 4",
        "; ".join(f"{m}: " + ", ".join(f"{a.mean():.0%}" for a in accuracy[m]) for m in OFFSETS))
    for way, claim in (
            ("chain", "Leaping heads write more tokens per step than as many adjacent ones (B3)"),
            ("tree", "... also in trees of 15 draft tokens (B3)")):
        names = {kind: f"{kind}, {way}" for kind in KINDS}
        yield find_more(claim, part, leap, mtp, names, OFFSETS)

    g = {m: attenuation(part, m) for m in (mtp, leap)}
    even = break_even(OFFSETS[mtp], OFFSETS[leap])
    wins = {kind: part[leap, f"{kind}, chain"] > part[mtp, f"{kind}, chain"] for kind in KINDS}
    right = {kind: sum(np.where((x < even) == w, 1, -1) for x in g.values())
             for kind, w in wins.items()}                           # 2: both fits say so, -2: none
    yield Finding(
        "The break-even of attenuation says whether leaping wins (B5)",
        verdict_by_kind(right),
        f"g: {g[mtp].mean():.2f} (MTP), {g[leap].mean():.2f} (leap); leap wins below {even:.2f}",
        "exp(-g (o - 1)) fits " + " and ".join(f"{m} with g = {spread(x)}" for m, x in g.items())
        + f"; leap k=2 should win below {even:.2f}")

    real = {m: part[m, "real text, chain"] for m in OFFSETS}
    given = {m: part[m, "formula, chain"] for m in OFFSETS}
    apart = {m: expected(o, dict(zip(o, accuracy[m])).get) for m, o in OFFSETS.items()}
    for claim, formula in (
            ("The formula, from each offset's accuracy, ranks MTP and leap as real text does (B5)",
             apart),
            ("... also from how often a draft is right after right ones (B5)", given)):
        yield Finding(
            claim,
            verdict(*((formula[m] - formula[mtp]) * (real[m] - real[mtp])
                      for m in OFFSETS if m != mtp)),
            f"formula: MTP {formula[mtp].mean():.2f}, leap {formula[leap].mean():.2f}; real: "
            f"{real[mtp].mean():.2f}, {real[leap].mean():.2f}",
            "formula against tokens per step on real text: " + "; ".join(
                f"{m} {formula[m].mean():.2f} against {real[m].mean():.2f}" for m in OFFSETS))

    two, gentle, hard = (ON_A_BASE + x for x in ("two stages", "one gentle stage", "one stage"))
    yield find_more(
        "L-MTP's two stages write more tokens per step than one stage as gentle (B2)",
        part, two, gentle, {kind: f"{kind}, chain" for kind in KINDS}, (two, gentle, hard))
    loss = {label: part[label, "nats"] for label in (two, gentle, hard)}
    yield Finding(
        "... and cost the next-token model less (B2)",
        verdict(loss[gentle] - loss[two]),
        f"next-token loss: {loss[two].mean():.3f} against {loss[gentle].mean():.3f} nats",
        "next-token loss in nats: " + ", ".join(
            f"{label.removeprefix(ON_A_BASE)} {nats(x)}" for label, x in loss.items()))
    if "compiled, greedy, chain, speedup" in part.values[mtp]:      # where torch.compile works
        yield find_more(
            "Leaping heads are faster than as many adjacent ones (speedup over compiled NTP)",
            part, leap, mtp, {k: f"compiled, {k}, chain, speedup" for k in ("greedy", "sampled")},
            OFFSETS, unit="x")


def find_planning(part):
    """The task that needs planning."""
    first, whole = ({x: part[x, key] for x in part.labels} for key in ("token 1", "whole answer"))
    bits = sum(key.startswith("token") for key in part.values["NTP"])
    yield Finding(
        "Where the first token needs the whole plan, heads for later tokens help to learn it",
        verdict(first["MTP"] - first["NTP"]),
        f"first token: {first['MTP'].mean():.1%} (MTP), {first['NTP'].mean():.1%} (NTP)",
        f"first token of reversed running parities of {bits} bits (chance: 50%): "
        + ", ".join(f"{label} {percent(x)}" for label, x in first.items()))
    yield Finding(
        "Leaping heads, which look further ahead, learn it better than adjacent ones",
        verdict(whole["leap k=2"] - whole["MTP"]),
        f"whole answers: {whole['leap k=2'].mean():.1%} against {whole['MTP'].mean():.1%}",
        "whole answers: " + ", ".join(f"{label} {percent(x)}" for label, x in whole.items()))


def find_backbone(part):
    """What heads do to the next-token model itself."""
    loss = {label: part[label, "nats"] for label in part.labels}
    mtp, text, compute = loss["MTP"], loss["NTP, same text"], loss["NTP, same compute"]
    yield Finding(
        "The multi-token loss improves the next-token model, at equal text and equal compute",
        verdict(text - mtp, compute - mtp),
        f"nats: MTP {mtp.mean():.3f}; NTP {text.mean():.3f} (equal text), {compute.mean():.3f} "
        "(compute)",
        "nats of the next token: " + ", ".join(f"{label} {nats(x)}" for label, x in loss.items()))


def find_headline(part):
    """The fastest decoder."""
    (label,) = part.labels

    def number(key):
        return part[label, f"compiled, {key}"][0]

    def shown(way):
        block, real = number(f"greedy, {way}, block"), number(f"real text, {way}")
        kinds = [f"{kind} {number(f'{kind}, {way}, speedup'):.2f}x "
                 f"({number(f'{kind}, {way}, tokens_per_step'):.2f} tokens per step)"
                 for kind in ("greedy", "sampled")]
        return f"block of {block:.0f}: {', '.join(kinds)}, {real:.2f} on real text"
    chain, tree = shown("chain"), shown("tree")
    if number("greedy, tree, block") == 1:
        tree = "NTP; no larger block pays"
    best = max(("chain", "tree"), key=lambda way: number(f"greedy, {way}, speedup"))
    speedup = number(f"greedy, {best}, speedup")
    yield Finding(
        "Our aim: 5x over our own compiled NTP decoder, continuing held-out code greedily",
        "reached" if speedup >= 5 else "missed",
        f"{speedup:.2f}x with {number(f'greedy, {best}, tokens_per_step'):.2f} tokens per step",
        f"chain, {chain}; calibrated: {'the same' if tree == chain else tree}")


FINDINGS = dict(scale=find_scale, layers=find_layers, adapt=find_adapt, leap=find_leap,
                planning=find_planning, backbone=find_backbone, headline=find_headline)


# ----------------------------------------------------------------------------------------------
# The tables

COLUMNS = dict(                                                     # (title, name, format)
    scale=[("parameters", "parameters", lambda v: f"{v[0]:,.0f}"), ("t+1", "model t+1", percent),
           *((f"t+{d}", f"marginalisation t+{d}", percent) for d in (2, 3, 4)),
           ("t+2, greedy rollout", "greedy rollout t+2", percent)],
    adapt=[("t+2, heads, everywhere", "accuracy of offset 2", percent),
           *((f"t+{d}, heads", f"own head t+{d}", percent) for d in (2, 3, 4)),
           *((f"t+{d}, marginalised", f"marginalisation t+{d}", percent) for d in (2, 3, 4)),
           ("NTP, nats", "nats", nats), ("lost", "lost", nats)],
    leap=[("real text, chain", "real text, chain", spread), ("formula", "formula, chain", spread),
          ("greedy", "greedy, chain", spread), ("sampled", "sampled, chain", spread),
          ("real text, tree", "real text, tree", spread),
          ("greedy, tree", "greedy, tree", spread), ("sampled, tree", "sampled, tree", spread),
          ("NTP, nats", "nats", nats),
          ("speedup, greedy", "compiled, greedy, chain, speedup", spread),
          ("speedup, sampled", "compiled, sampled, chain, speedup", spread)],
    planning=[("whole answer", "whole answer", percent), ("first token", "token 1", percent),
              ("second", "token 2", percent), ("third", "token 3", percent)],
    backbone=[("nats", "nats", nats), ("accuracy", "accuracy of offset 1", percent)],
    headline=[(f"{kind}, {way}: {title}", f"compiled, {kind}, {way}, {key}", spread)
              for kind in ("greedy", "sampled") for way in ("NTP", "chain", "tree")
              for title, key in (("tokens/s", "tokens_per_second"),
                                 ("tokens/step", "tokens_per_step"))])


def columns(name, part):
    """The columns of a part's table."""
    if name == "layers":
        return [(f"t+{d}, layer {i}", f"probe t+{d} layer {i}", percent) for d in (1, 2)
                for i in range(len(by_layer(part, "NTP", d)))]
    return COLUMNS[name]


def markdown_table(titles, rows):
    """Lists of cells -> lines of a Markdown table"""
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|",
            *(f"| {' | '.join(row)} |" for row in rows)]


def tables(parts, size):
    """Everything that was measured, as a page of Markdown."""
    claims = [[f.claim, f.measured, f"**{f.verdict}**", f"[{name}](#{name})"]
              for name, part in parts.items() for f in FINDINGS[name](part)]
    lines = [f"# The study, size {size}: all tables", "",
             "Made by `experiments/findings.py` from the result files beside this page. Numbers "
             "are means of three seeds, with the lowest and the highest in brackets; accuracies "
             "are in %. How each row was trained stands below its table. What to make of it: "
             "[docs/findings.md](../../docs/findings.md).", "", "## claims", "",
             *markdown_table(["claim", "measured (accuracies in %)", "verdict", "part"], claims),
             ""]
    for name, part in parts.items():
        shown, file = columns(name, part), f"study_{size}_{name}"
        r, where = part.results, part.results["environment"]
        rows = [[label] + [form(part[label, key]) if key in part.values[label] else ""
                           for _, key, form in shown] for label in part.labels]
        lines += [f"## {name}", "",
                  f"`{r['command']}` ([result]({file}.json)), {where['date']}, torch "
                  f"{where['torch']}, {where['device_name']}; its pieces took "
                  f"{r['seconds']['side by side']:,} s of a core side by side, and "
                  f"{r['seconds']['alone']:,} s alone", "",
                  *markdown_table(["", *(title for title, _, _ in shown)], rows), "",
                  f"![{name}]({file}.png)", ""]
        for label in part.labels:
            for key in (k for k in part.values[label] if k.startswith("layer weights")):
                weights = part[label, key].mean(0)
                lines.append(f"- {label}: the head of offset {key.split()[-1]} reads layers 1 to "
                             f"{len(weights)} with {' '.join(f'{w:.0%}' for w in weights)}")
        lines += [f"- {row['label']}: " + ", then ".join(f"`{o}`" for o in row["train"].values())
                  for row in r["rows"] if row["train"]]
        lines.append("")
    return "\n".join(lines)


def summary(sizes, folder):
    """{size: parts} -> one line per claim with the verdict and a number of the first size; how
    many verdicts the other sizes change. Links into `folder`."""
    found = {size: {(name, i): f for name, part in parts.items()
                    for i, f in enumerate(FINDINGS[name](part))} for size, parts in sizes.items()}
    size, *others = sizes
    lines = markdown_table(["part", "claim", f"verdict ({size})", "number"], (
        [f"[{name}]", f.claim, f.verdict, f.number] for (name, _), f in found[size].items()))
    for other in others:
        both = found[size].keys() & found[other].keys()
        differ = sum(found[size][key].verdict != found[other][key].verdict for key in both)
        lines += ["", f"At size {other}, {differ} of {len(both)} verdicts are different "
                      f"([all numbers]({folder}study_{other}.md))."]
    return "\n".join(lines + [""] + [
        f"[{name}]: {folder}study_{size}.md#{name}" for name in sizes[size]])


MARKED = re.compile(r"(<!-- findings: (.*?) -->\n).*?(\n<!-- end of findings -->)", re.DOTALL)


def with_findings(page, folder):
    """docs/findings.md with the findings of the sizes that its mark names, from `folder`."""
    def filled(found):
        sizes = {size: load(folder, size) for size in found[2].split(", ")}
        return found[1] + summary(sizes, "../experiments/results/") + found[3]
    return MARKED.sub(filled, page)


# ----------------------------------------------------------------------------------------------
# The figures: one per part. Each seed is a point; lines and bars are means. plt: matplotlib.pyplot

def dots(axis, part, key, factor=1.0, color="C0", labels=None):
    """A dot per seed and a line at their mean, for each of `labels` that has the number."""
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
    axis.fill_between(x, values.min(0), values.max(0), color=drawn.get_color(), alpha=0.2,
                      linewidth=0)


def draw_scale(part, plt):
    """Accuracy by distance: for each size, and for each text."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    ladder = [label for label in part.labels if label.startswith("python")]
    texts = [label for label in part.labels if label not in ladder]
    shape = texts[0].split(", ")[1]
    for axis, labels in zip(axes, (ladder, [f"python, {shape}", *texts])):
        for label in labels:
            keys = ["model t+1", *(f"marginalisation t+{d}" for d in (2, 3, 4))]
            values = 100 * np.stack([part[label, k] for k in keys], 1)  # (seeds, 4)
            line(axis, range(1, 5), values, label=label, color=f"C{part.labels.index(label)}")
        axis.set(xlabel="distance (tokens ahead)", xticks=range(1, 5))
        axis.legend(fontsize=8)
    axes[0].set(title="by size (layers x width)", ylabel="top-1 accuracy, marginalised, %",
                ylim=(0, None))
    axes[1].set(title="by text, at one size")
    return figure


def draw_layers(part, plt):
    """The probes' accuracy, layer by layer."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, label in zip(axes, part.labels):
        for d, color in ((1, "C0"), (2, "C3")):
            for reader, style in (("probe", "-"), ("lens", ":")):
                values = 100 * by_layer(part, label, d, reader).T   # (seeds, layers)
                line(axis, range(values.shape[1]), values, color=color, linestyle=style,
                     label=f"t+{d}, {reader}")
        axis.set(xlabel="layer (0: the embeddings)", title=f"trained as {label}", ylim=(0, None),
                 xticks=range(values.shape[1]))
        axis.legend(fontsize=8)
    axes[0].set_ylabel("top-1 accuracy, %")
    return figure


def draw_adapt(part, plt):
    """What each recipe's heads reach, and what next-token prediction pays."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 5), sharey=True, layout="constrained")
    known = "marginalisation t+2"
    dots(axes[0], part, "own head t+2", 100)
    dots(axes[0], part, known, 100, "C3", part.labels[:2])
    axes[0].axvline(100 * part[part.labels[0], known].mean(), color="C3", linestyle="--",
                    linewidth=1)
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
        values = [part[label, f"accuracy of offset {o}"] for o in offsets]
        line(axes[0], offsets, 100 * np.stack(values, 1), label=label)
    axes[0].set(xlabel="offset", ylabel="top-1 accuracy, %", title="attenuation", ylim=(0, None),
                xticks=sorted({o for offsets in OFFSETS.values() for o in offsets}))
    axes[0].legend()
    kinds = [f"{kind}, {way}" for way in ("chain", "tree") for kind in KINDS]
    for i, label in enumerate(part.labels):
        means = [part[label, k].mean() for k in kinds]
        at = np.arange(len(kinds)) + 0.16 * (i - 2)
        axes[1].bar(at, means, 0.15, label=label)
        for x, k in zip(at, kinds):
            ends = [part[label, k].min(), part[label, k].max()]
            axes[1].plot([x, x], ends, color="black", linewidth=1)
        for x, way in ((at[0], "chain"), (at[3], "tree")):          # of real text
            axes[1].plot(x, part[label, f"formula, {way}"].mean(), "kx", markersize=5,
                         label="formula, from a_j" if i == 0 and way == "chain" else None)
    axes[1].set(ylabel="tokens per step", title="tokens per step (lines: all seeds)",
                ylim=(1, 1.3 * axes[1].get_ylim()[1]))
    axes[1].set_xticks(range(len(kinds)), [k.replace(", ", "\n") for k in kinds])
    axes[1].legend(fontsize=8, ncols=2, loc="upper left")
    return figure


def draw_planning(part, plt):
    """The accuracy of every token of the answer."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, label in enumerate(part.labels):
        n = sum(key.startswith("token") for key in part.values[label])
        right = np.stack([part[label, f"token {j}"] for j in range(1, n + 1)])  # (n, seeds)
        at = np.arange(1, n + 1) + 0.2 * (i - 1)
        axis.plot(at, 100 * right, "o", color=f"C{i}", markersize=4, alpha=0.5)
        axis.bar(at, 100 * right.mean(1), 0.18, color=f"C{i}", alpha=0.5, label=label)
    axis.axhline(50, color="gray", linestyle="--", linewidth=1, label="chance")
    axis.set(xlabel="token of the answer, those before it given", xticks=range(1, n + 1),
             ylabel="accuracy, %", ylim=(0, 120), yticks=range(0, 101, 20))
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

    def number(kind, way, what):
        return part[label, f"compiled, {kind}, {way}, {what}"][0]
    for i, kind in enumerate(("greedy", "sampled")):
        for j, way in enumerate(("NTP", "chain", "tree")):
            y, rate = 3 * (1 - i) + (2 - j) * 0.8, number(kind, way, "tokens_per_second")
            same = rate == number(kind, "chain", "tokens_per_second")
            if way == "tree" and (same or number(kind, way, "block") == 1):
                continue                                            # it is the chain, or NTP
            axis.barh(y, rate, 0.7, color=f"C{j}", label=way if i == 0 else None)
            axis.text(rate, y, f" {number(kind, way, 'speedup'):.2f}x", va="center", fontsize=9)
    axis.set_yticks([3.8, 0.8], ["greedy", "temperature 1"])
    axis.set(xlabel="tokens per second, one text at a time", title=f"{label}, compiled")
    axis.margins(x=0.15)
    axis.legend(fontsize=8)
    return figure


FIGURES = dict(scale=draw_scale, layers=draw_layers, adapt=draw_adapt, leap=draw_leap,
               planning=draw_planning, backbone=draw_backbone, headline=draw_headline)


# ----------------------------------------------------------------------------------------------
# The command line

def load(folder, size):
    """{name: Part} of the parts that have results. Raises InputError if there are none, and if a
    decoder wrote another text than NTP."""
    paths = {name: folder / f"study_{size}_{name}.json" for name in FINDINGS}
    parts = {name: Part(json.loads(path.read_text()))
             for name, path in paths.items() if path.exists()}
    if not parts:
        raise InputError(f"{folder} has no results of size {size} yet; make them with: "
                         f"python experiments/study.py --size {size}")
    for name, part in parts.items():
        for label, values in part.values.items():
            if not all(all(v) for key, v in values.items() if key.endswith("identical")):
                raise InputError(f"{paths[name]}: '{label}' wrote another text than NTP, so its "
                                 "speed means nothing")
    return parts


def main(argv=None):
    """Write the tables, docs/findings.md and the figures."""
    p = Parser(prog="findings.py",
               description="Make figures, tables and docs/findings.md from the study's results.")
    p.add_argument("--size", choices=["quick", "patient", "full"], default="quick",
                   help="the study's size")
    p.add_argument("--results", default=str(RESULTS), metavar="FOLDER", help="where they are")
    args = p.parse_args(argv)
    with one_line_errors("findings.py", memory="nothing"):
        folder = Path(args.results)
        parts = load(folder, args.size)
        write_whole(folder / f"study_{args.size}.md", tables(parts, args.size))
        if folder.resolve() == RESULTS:
            write_whole(PAGE, with_findings(PAGE.read_text(), folder))
        for name, part in parts.items():
            for f in FINDINGS[name](part):
                print(f"{f.claim}: {f.verdict}\n    {f.measured}")
        plt = import_pyplot()
        for name, part in parts.items():
            figure = FIGURES[name](part, plt)
            figure.savefig(folder / f"study_{args.size}_{name}.png", dpi=100)
            plt.close(figure)


if __name__ == "__main__":
    main()
