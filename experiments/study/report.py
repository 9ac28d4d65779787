"""The table and the figures of docs/findings.md, from the results of study.py.

    python experiments/study/report.py
    python experiments/study/report.py --size quick    # prints the table of a quick study

The page is written by hand around the table. A number in its prose is followed by a comment, which
a browser does not show, that says what it is: 54%<!--frozen/base/marginal-->. `fact` finds it.
"""
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import data  # before PyTorch: Ctrl-C is one line from here on
import numpy as np

from common import Parser, one_line_errors
from data.prepare import InputError, require
from experiments.study import paper_a, paper_b
from experiments.study.runs import ROOT
from experiments.study.verdicts import Results, draws, judge

PAGE = ROOT / "docs" / "findings.md"
FOLDER = ROOT / "experiments" / "results"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
CLAIMS = paper_a.CLAIMS + paper_b.CLAIMS
BLUE, ORANGE, GREY, DARK = "#1f6f8b", "#b3541e", "#8a8a8a", "#333333"


def load(size):
    """The results of a study. Raises InputError."""
    path = FOLDER / f"study_{size}.json"
    require(path.exists(), f"there is no {path}: python experiments/study/study.py --size {size}")
    return Results(json.loads(path.read_text()))


# ---- The table, and the numbers in prose -----------------------------------------------------

def table(results):
    """The verdicts as lines of Markdown."""
    lines = ["| | claim | verdict | effect [95% interval] |", "|---|---|---|---|"]
    for i, found in enumerate(judge(CLAIMS, results), 1):
        digits = 1 if found["unit"] == "points" else 3 if found["unit"] == "nats" else 2
        effect, low, high = [f"{found[k]:+.{digits}f}" for k in ("effect", "low", "high")]
        lines.append(f"| {i} | {found['heading']} | **{found['verdict']}** "
                     f"| {effect} [{low}, {high}] {found['unit']} |")
    return "\n".join(lines) + "\n"


def fact(results, key):
    """What a comment in the page names: a mean as in frozen/base/marginal; steps:PART/ROW/MEASURE:
    tokens per step; speed:ROW/METHOD: thousands of tokens per second, ms:METHOD, KIND: of a step;
    E:ROW/METHOD: what the theory expects; claim:N, low:N, high:N; formula, break-even:
    attenuations."""
    kind, _, rest = key.rpartition(":")
    m = results.of()
    if kind == "steps":
        part, row, measure = rest.split("/")
        return paper_b.tokens_per_step(m, row, measure, part)
    if kind == "ms":
        return results.step_ms[rest]
    if kind == "speed":
        row, method = rest.split("/")
        ms = results.step_ms[f"{method}, {row.split(', ')[1]}"]
        return paper_b.tokens_per_step(m, row, f"{method}, chain") / ms
    if kind == "E":
        row, method = rest.split("/")
        accuracy = {o: m("leap", row, f"offset {o}") for o in range(2, 8)}
        return paper_b.expected(accuracy, paper_b.METHODS[method])
    if kind in ("claim", "low", "high"):
        _, _, drawn = draws(CLAIMS[int(rest) - 1].effect, results)
        if kind == "claim":
            return CLAIMS[int(rest) - 1].effect(m)
        return np.quantile(drawn, 0.025 if kind == "low" else 0.975)
    if key == "formula":
        return paper_b.BREAK_EVEN
    if key == "break-even":
        return paper_b.break_even(m)
    if key.startswith("retention/"):
        return paper_a.retention(m, key.split("/")[1])
    return m(*key.split("/"))


def wrong_numbers(page, results):
    """The marked numbers of a page that differ from the results: a list of (text, key, value)"""
    found = []
    for text, percent, key in re.findall(r"([-+]?\d+(?:\.\d+)?)(%?)<!--(.+?)-->", page):
        value = float(fact(results, key)) * (100 if percent else 1)
        decimals = len(text.partition(".")[2])
        if f"{value:.{decimals}f}" != text.lstrip("+"):
            found.append((text + percent, key, value))
    return found


def unmarked_numbers(page):
    """Numbers with a decimal point in the page's prose that no comment explains."""
    prose = page.split(BEGIN)[0] + page.split(END)[1].split("## Log")[0]
    prose = re.sub(r"```.*?```|`[^`]*`|\d{4}\.\d{5}", "", prose, flags=re.S)  # code, arXiv's ids
    prose = re.sub("<!--.*?-->", "<!---->", prose)
    return re.findall(r"(?<![\w.])[-+]?\d+\.\d+%?(?!<!--)(?![\d.%])", prose)


# ---- Figures ---------------------------------------------------------------------------------

def dots(axis, results, entries, title, xlabel):
    """A row per (label, color, effect): its value and 95% interval."""
    for y, (label, color, effect) in enumerate(reversed(entries)):
        value, _, drawn = draws(effect, results)
        low, high = np.quantile(drawn, [0.025, 0.975])
        axis.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", color=color,
                      capsize=3)
    axis.set(yticks=range(len(entries)), ylim=(-0.6, len(entries) - 0.4), title=title,
             xlabel=xlabel, yticklabels=[label for label, *_ in reversed(entries)])
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def mean(*key, scale=100):
    """The effect that is a mean itself."""
    return lambda m: scale * m(*key)


def draw_knows(results, axes):
    """What a next-token model knows about the token after next, and how much of it is kept."""
    dots(axes[0], results, [
        ("marginalised", BLUE, mean("knows", "python", "marginal")),
        ("trained for it", ORANGE, mean("knows", "direct", "t+2, asked")),
        ("table of counts", GREY, mean("knows", "table", "t+2, asked"))],
        "the token after next, Python", "right, % (right is better)")
    rows = [("1x16", "Python, 1 layer"), ("2x32", "Python, 2 layers"), ("python", "Python, 4"),
            ("shakespeare", "Shakespeare, 4"), ("logs", "logs, 4")]
    dots(axes[1], results, [
        (label, BLUE, lambda m, row=row: 100 * paper_a.retention(m, row)) for row, label in rows],
        "retention", "t+2 marginalised, % of t+1 (right is better)")


def draw_heads(results, axes):
    """Heads on a frozen model, and what each layer holds."""
    rows = [("layer 4", "affine probe", "probe t+2"), ("residual", "residual block", "t+2"),
            ("residual, WHS", "residual, WHS", "t+2"), ("1 layer", "1 layer", "t+2"),
            ("2 layers", "2 layers", "t+2"), ("4 layers", "4 layers", "t+2"),
            ("from layer 0", "4 layers, embeddings only", "t+2"),
            ("sequential", "residual, reads the token before", "t+2")]
    dots(axes[0], results, [(label, BLUE, mean("frozen", row, what)) for row, label, what in rows],
         "heads on a frozen model", "token after next right, % (right is better)")
    hollow = dict(marker="o", mfc="none", color=GREY, ls="")
    axes[0].plot([], [], **hollow, label="half as many steps")
    for y, (row, _, what) in enumerate(reversed(rows)):
        if row + paper_a.HALF in results.rows["frozen"]:
            axes[0].plot(100 * results.mean("frozen", row + paper_a.HALF, what), y, **hollow)
    marginal = 100 * results.mean("frozen", "base", "marginal")
    axes[0].axvline(marginal, color=ORANGE, ls="--", label="marginalised")
    axes[0].legend(fontsize=8, frameon=False, loc="lower left")
    for what, color, mark in (("lens t+1", GREY, "s"), ("probe t+1", DARK, "^"),
                              ("probe t+2", BLUE, "o")):
        axes[1].plot(range(5), [100 * results.mean("frozen", f"layer {n}", what)
                                for n in range(5)], color=color, marker=mark, label=what)
    heads = ["from layer 1", "from layer 2", "from layer 3", "1 layer"]
    axes[1].plot(range(1, 5), [100 * results.mean("frozen", head, "t+2") for head in heads],
                 color=ORANGE, marker="D", label="t+2, by new layers up to five")
    axes[1].set(title="what each layer holds", xlabel="layer (0: embeddings)", xticks=range(5),
                ylabel="right, % (higher is better)")
    axes[1].legend(fontsize=8, frameon=False)


def draw_joint(results, axes):
    """What joint training gains for the head and costs the next-token model."""
    rows = ["residual", "residual, equal rates", "residual, weight 0.3", "residual, warm-up",
            "residual, WHS", "1 layer", "1 layer, WHS"]
    kinds = [row.split(",")[0] for row in rows]
    colors = [ORANGE if kind == "1 layer" else BLUE for kind in kinds]
    dots(axes[0], results, [
        (row, color, paper_a.narrower(row, kind)) for row, color, kind in zip(rows, colors, kinds)],
        "joint training: what the head gains",
        "points closer to marginalisation than a frozen head (right is better)")
    dots(axes[1], results, [
        ("", color, paper_a.more(("joint", row, "nats t+1"), ("joint", "no head", "nats t+1"), 1))
        for row, color in zip(rows, colors)], "what the next-token model pays",
        "nats over training on without a head (left is better)")


def draw_scratch(results, axes):
    """Models with heads from scratch."""
    rows = ["NTP, longer", "MTP", "MTP, sequential", "leap", "leap, sequential"]
    colors = [GREY, BLUE, BLUE, ORANGE, ORANGE]
    ntp = "scratch", "NTP", "nats t+1"
    dots(axes[0], results, [
        (row, color, paper_a.more(("scratch", row, "nats t+1"), ntp, 1))
        for row, color in zip(rows, colors)], "next-token loss, from scratch",
        "nats over NTP with as many steps (left is better)")
    dots(axes[1], results, [
        (row, color, lambda m, row=row: paper_b.tokens_per_step(m, row, "steps", "scratch"))
        for row, color in zip(rows[1:], colors[1:])], "real text",
        "tokens per step (right is better)")


def draw_leap(results, axes):
    """Leap against MTP, and both break-evens."""
    texts = {"chain": "real text", "T=0": "greedy", "T=0.5": "T = 0.5", "T=1": "T = 1",
             "tree": "real text, 15 rows each"}
    entries = [(f"{corpus}, {label}", ORANGE if kind == "sequential" else BLUE,
                paper_b.leap_gains(f"{corpus}, {kind}", text))
               for corpus in results.counts for text, label in texts.items()
               for kind in paper_b.KINDS]
    entries = [(label if i % 2 == 0 else "", *rest) for i, (label, *rest) in enumerate(entries)]
    dots(axes[0], results, entries, "leap - MTP (blue: independent, orange: sequential)",
         "tokens per step (right: leap is better)")
    axes[0].axvline(0, color=DARK, lw=0.8)
    for (corpus, (g, gain)), mark in zip(paper_b.by_file(results, "sequential").items(), "o^s"):
        axes[1].scatter(g, gain, 14, marker=mark, label=corpus, alpha=0.6)
    for x, label, color in ((paper_b.BREAK_EVEN, "break-even, formula", GREY),
                            (fact(results, "break-even"), "break-even, measured", ORANGE)):
        axes[1].axvline(x, color=color, ls="--", label=f"{label}: {x:.2f}")
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
    dots(axes[0], results, [
        (row, ORANGE, lambda m, row=row: paper_b.tokens_per_step(m, row, "steps", "stages"))
        for row in ("two stages", "one stage")], "real text, leap",
        "tokens per step (right is better)")
    none = "stages", "no heads", "nats t+1"
    dots(axes[1], results, [
        (row, ORANGE, paper_a.more(("stages", row, "nats t+1"), none, 1))
        for row in ("two stages", "one stage")], "what the next-token model pays",
        "nats over training on without heads (left is better)")


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
            for text, key, value in wrong_numbers(page, results):
                print(f"docs/findings.md says {text}, {key} is {value:.4f}", file=sys.stderr)


if __name__ == "__main__":
    main()
