"""The table and the figures of docs/findings.md, from the results of study.py.

    python experiments/study/report.py
    python experiments/study/report.py --size quick    # prints the table of a quick study

The page is written by hand around the table. A number in its prose is followed by a comment, which
a browser does not show, that names it as claims.py does: 54%<!--frozen/base/marginal-->; or one end
of its 95% interval: <!--low: frozen/base/marginal-->. tests/test_study.py finds wrong ones.
"""
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import data  # before PyTorch: Ctrl-C is one line from here on
import numpy as np

from common import Parser, one_line_errors
from data.prepare import InputError, require
from experiments.study import paper_a, paper_b
from experiments.study.claims import CLAIMS, Results, unit, value
from experiments.study.runs import ROOT
from experiments.study.verdicts import estimate, judge

PAGE = ROOT / "docs" / "findings.md"
FOLDER = ROOT / "experiments" / "results"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
BLUE, ORANGE, GREY, DARK = "#1f6f8b", "#b3541e", "#8a8a8a", "#333333"


def load(size):
    """The results of a study. Raises InputError."""
    path = FOLDER / f"study_{size}.json"
    require(path.exists(), f"there is no {path}: python experiments/study/study.py --size {size}")
    return Results(json.loads(path.read_text()))


def table(results):
    """The verdicts as lines of Markdown."""
    lines = ["| | claim | verdict | effect [95% interval] |", "|---|---|---|---|"]
    verdicts = judge(results, CLAIMS.values())
    for i, (claim, found) in enumerate(zip(CLAIMS, verdicts), 1):
        counted = unit(CLAIMS[claim])
        digits = {"points": 1, "nats": 3}.get(counted, 2)
        effect, low, high = [f"{found[key]:+.{digits}f}" for key in ("effect", "low", "high")]
        lines.append(f"| {i} | {claim} | **{found['verdict']}** "
                     f"| {effect} [{low}, {high}] {counted} |")
    return "\n".join(lines) + "\n"


# ---- Figures ---------------------------------------------------------------------------------

def dots(axis, results, title, xlabel, rows):
    """A row per (label, color, effect): its value and 95% interval."""
    for y, (_, color, effect) in enumerate(reversed(rows)):
        found = estimate(results, effect)
        x = found["effect"]
        axis.errorbar(x, y, xerr=[[x - found["low"]], [found["high"] - x]], fmt="o", color=color,
                      capsize=3)
    axis.set(yticks=range(len(rows)), ylim=(-0.6, len(rows) - 0.4), title=title, xlabel=xlabel,
             yticklabels=[label for label, *_ in reversed(rows)])
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def draw_knows(results, axes):
    """What a next-token model knows about the token after next, and how much of it is kept."""
    dots(axes[0], results, "the token after next, Python", "right, % (right is better)", [
        ("marginalised", BLUE, "knows/python/marginal"),
        ("trained for it", ORANGE, "knows/direct/t+2, asked"),
        ("table of counts", GREY, "knows/table/t+2, asked")])
    dots(axes[1], results, "retention", "t+2 marginalised, % of t+1 (right is better)", [
        ("Python, 1 layer", BLUE, "knows/1x16/retention"),
        ("Python, 2 layers", BLUE, "knows/2x32/retention"),
        ("Python, 4", BLUE, "knows/python/retention"),
        ("Shakespeare, 4", BLUE, "knows/shakespeare/retention"),
        ("logs, 4", BLUE, "knows/logs/retention")])


def draw_heads(results, axes):
    """Heads on a frozen model, and what each layer holds."""
    rows = {"affine probe": "frozen/layer 4/probe t+2",
            "residual block": "frozen/residual/t+2",
            "residual, WHS": "frozen/residual, WHS/t+2",
            "1 layer": "frozen/1 layer/t+2",
            "2 layers": "frozen/2 layers/t+2",
            "4 layers": "frozen/4 layers/t+2",
            "4 layers, embeddings only": "frozen/from layer 0/t+2",
            "residual, reads the token before": "frozen/sequential/t+2"}
    dots(axes[0], results, "heads on a frozen model",
         "token after next right, % (right is better)",
         [(label, BLUE, name) for label, name in rows.items()])
    hollow = dict(marker="o", mfc="none", color=GREY, ls="")
    axes[0].plot([], [], **hollow, label="half as many steps")
    for y, name in enumerate(reversed(rows.values())):
        part, row, measure = name.split("/")
        if row + paper_a.HALF in results.saved["rows"][part]:
            axes[0].plot(value(results, f"{part}/{row}{paper_a.HALF}/{measure}"), y, **hollow)
    axes[0].axvline(value(results, "frozen/base/marginal"), color=ORANGE, ls="--",
                    label="marginalised")
    axes[0].legend(fontsize=8, frameon=False, loc="lower left")
    for measure, color, mark in (("lens t+1", GREY, "s"), ("probe t+1", DARK, "^"),
                                 ("probe t+2", BLUE, "o")):
        found = [value(results, f"frozen/layer {n}/{measure}") for n in range(5)]
        axes[1].plot(range(5), found, color=color, marker=mark, label=measure)
    heads = ["from layer 1", "from layer 2", "from layer 3", "1 layer"]
    axes[1].plot(range(1, 5), [value(results, f"frozen/{head}/t+2") for head in heads],
                 color=ORANGE, marker="D", label="t+2, by new layers up to five")
    axes[1].set(title="what each layer holds", xlabel="layer (0: embeddings)", xticks=range(5),
                ylabel="right, % (higher is better)")
    axes[1].legend(fontsize=8, frameon=False)


def draw_joint(results, axes):
    """What joint training gains for the head and costs the next-token model."""
    gains = []
    costs = []
    for row in ("residual", "residual, equal rates", "residual, weight 0.3", "residual, warm-up",
                "residual, WHS", "1 layer", "1 layer, WHS"):
        kind = row.split(",")[0]
        color = ORANGE if kind == "1 layer" else BLUE
        gains.append((row, color, f"joint/{row}/t+2, asked - joint/no head/marginal"
                      f" - frozen/{kind}/t+2, asked + frozen/base/marginal"))
        costs.append(("", color, f"joint/{row}/nats t+1 - joint/no head/nats t+1"))
    dots(axes[0], results, "joint training: what the head gains",
         "points closer to marginalisation than a frozen head (right is better)", gains)
    dots(axes[1], results, "what the next-token model pays",
         "nats over training on without a head (left is better)", costs)


def draw_scratch(results, axes):
    """Models with heads from scratch."""
    colors = {"NTP, longer": GREY, "MTP": BLUE, "MTP, sequential": BLUE, "leap": ORANGE,
              "leap, sequential": ORANGE}
    loss = [(row, color, f"scratch/{row}/nats t+1 - scratch/NTP/nats t+1")
            for row, color in colors.items()]
    steps = [(row, color, f"scratch/{row}/steps") for row, color in colors.items()]
    dots(axes[0], results, "next-token loss, from scratch",
         "nats over NTP with as many steps (left is better)", loss)
    dots(axes[1], results, "real text", "tokens per step (right is better)", steps[1:])


def draw_leap(results, axes):
    """Leap against MTP, and both break-evens."""
    texts = {"chain": "real text", "T=0": "greedy", "T=0.5": "T = 0.5", "T=1": "T = 1",
             "tree": "real text, 15 rows each"}
    rows = []
    for corpus, text in itertools.product(results.counts, texts):
        for kind, color, label in (("independent", BLUE, f"{corpus}, {texts[text]}"),
                                   ("sequential", ORANGE, "")):
            row = f"leap/{corpus}, {kind}"
            rows.append((label, color, f"{row}/leap, {text} - {row}/MTP, {text}"))
    dots(axes[0], results, "leap - MTP (blue: independent, orange: sequential)",
         "tokens per step (right: leap is better)", rows)
    axes[0].axvline(0, color=DARK, lw=0.8)
    for (corpus, (g, gain, _)), mark in zip(paper_b.by_file(results).items(), "o^s"):
        axes[1].scatter(g, gain, 14, marker=mark, label=corpus, alpha=0.6)
    for row, color in (("formula", GREY), ("measured", ORANGE)):
        x = value(results, f"leap/{row}/attenuation")
        axes[1].axvline(x, color=color, ls="--", label=f"break-even, {row}: {x:.2f}")
    x = np.linspace(0.03, 0.6, 100)
    axes[1].plot(x, paper_b.formula(x, "leap") - paper_b.formula(x, "MTP"), color=GREY,
                 label="formula")
    axes[1].axhline(0, color=DARK, lw=0.8)
    axes[1].set(title="files of held-out text, sequential heads", ylim=(-0.5, 1.2),
                xlabel="attenuation g (text is harder to the right)",
                ylabel="leap - MTP, tokens per step (higher: leap is better)")
    axes[1].legend(fontsize=8, frameon=False)


def draw_stages(results, axes):
    """L-MTP's two stages against one, and against no heads."""
    rows = ("two stages", "one stage")
    dots(axes[0], results, "real text, leap", "tokens per step (right is better)",
         [(row, ORANGE, f"stages/{row}/steps") for row in rows])
    dots(axes[1], results, "what the next-token model pays",
         "nats over training on without heads (left is better)",
         [(row, ORANGE, f"stages/{row}/nats t+1 - stages/no heads/nats t+1") for row in rows])


def draw_all(results):
    """experiments/results/study_NAME.png for each figure."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("the figures need a package: pip install matplotlib") from None
    plt.switch_backend("Agg")
    for draw, height in ((draw_knows, 2.6), (draw_heads, 3.8), (draw_joint, 3.4),
                         (draw_scratch, 3), (draw_leap, 7), (draw_stages, 1.8)):
        figure, axes = plt.subplots(1, 2, figsize=(11, height), layout="constrained")
        draw(results, axes)
        figure.savefig(FOLDER / f"study_{draw.__name__.removeprefix('draw_')}.png", dpi=100)
        plt.close(figure)


def main(argv=None):
    """Bad input is one line and status 2."""
    p = Parser(prog="report.py", description="Write the table and the figures of docs/findings.md, "
               "or print the table of a quick study.")
    p.option("size", "full", "which study", choices=["quick", "full"])
    args = p.parse_args(argv)
    with one_line_errors("report.py"):
        results = load(args.size)
        lines = table(results)
        print(lines)
        if args.size == "full":
            page = PAGE.read_text()
            before = page.split(BEGIN)[0]
            after = page.split(END)[1]
            PAGE.write_text(before + BEGIN + lines + END + after)
            draw_all(results)


if __name__ == "__main__":
    main()
