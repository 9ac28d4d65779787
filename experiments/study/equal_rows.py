"""Does leaping pay at equal cost? Chains and trees that verify equally many rows.

    python experiments/study/equal_rows.py --out experiments/results/equal_rows.json

A step that verifies more drafts costs more, so three adjacent heads (a chain of 4 rows) should not
be compared with three leaping ones (a chain of 7). Here trees of 4, 7, 10 and 16 rows are grown
from MTP's heads, from leap's and from all, on one half of the held-out text, and write the other
half: tokens per step on real text, by teacher forcing. Models are the demo's, trained from scratch
with independent and with sequential heads, on three corpora, with several seeds.
"""
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from common import (Parser, check_output, corpus_of, environment, load_checkpoint,
                    one_line_errors, pick_device, write_results)
from data.prepare import InputError, prepare
from experiments.sequential import (HEADS, METHODS, OFFSETS, SHAPE, mean_and_spread, train_once)
from experiments.trees import Node, draft_ranks, grow, simulate, step_begins
from heads import draft_sources

ROWS = (4, 7, 10, 16)
COLORS = {"MTP": "#b3541e", "leap": "#1f6f8b", "all": "#8a8a8a"}
MARKS = {"MTP": "s", "leap": "o", "all": "^"}
FIRST = 16  # tokens of a window that are its prompt


def tokens_per_step(tree, ranks):
    """Of a tree (a list of Nodes) on windows of real text, from draft_ranks."""
    begins = step_begins(simulate(tree, ranks)[1], FIRST - 1)
    return len(begins) * (begins.shape[1] - FIRST) / begins.sum().item()


def measure_run(run, args):
    """-> {method: {"chain": tokens per step, "rows": of the chain, "trees": {rows: tokens per
    step}}}"""
    device = pick_device(args.device)
    model, state = load_checkpoint(run)
    windows = corpus_of(run, model, state).windows("val", 2 * args.windows,
                                                   model.gpt.config.block_size).to(device)
    ranks = draft_ranks(model.to(device), windows)
    found = {}
    for method, offsets in METHODS.items():
        own = {source: r for source, r in ranks.items() if source[0] in offsets}
        grown_on = {source: r[:args.windows] for source, r in own.items()}
        held_out = {source: r[args.windows:] for source, r in own.items()}
        tree, _ = grow(grown_on, max(ROWS) - 1, FIRST - 1)
        chain = [Node(i, o, b) for i, (o, b) in enumerate(draft_sources(offsets).values())]
        found[method] = dict(
            rows=1 + len(chain), chain=tokens_per_step(chain, held_out),
            trees={rows: tokens_per_step(tree[:rows - 1], held_out) for rows in ROWS})
    return found


def draw(rows, plt, path):
    """Tokens per step by verified rows: a panel for each corpus and kind of heads."""
    corpora = list(dict.fromkeys(row["corpus"] for row in rows))
    figure, axes = plt.subplots(len(HEADS), len(corpora), figsize=(4 * len(corpora), 6.4),
                                sharex=True, squeeze=False, layout="constrained")
    for (i, heads), (j, corpus) in itertools.product(enumerate(HEADS), enumerate(corpora)):
        axis = axes[i, j]
        found = [r["methods"] for r in rows if (r["corpus"], r["heads"]) == (corpus, heads)]
        for method, color in COLORS.items():
            points = [mean_and_spread([f[method]["trees"][n] for f in found]) for n in ROWS]
            error = [[p[1][side][0] for p in points] for side in (0, 1)]
            axis.errorbar(ROWS, [p[0] for p in points], error, fmt=f"-{MARKS[method]}", capsize=3,
                          color=color, label=f"tree, {method} heads")
            mean, spread = mean_and_spread([f[method]["chain"] for f in found])
            axis.errorbar(found[0][method]["rows"], mean, spread, fmt=MARKS[method], color=color,
                          markerfacecolor="white", markersize=9, capsize=3,
                          label=f"chain, {method} heads")
        axis.set(title=f"{corpus}, {heads} heads", xticks=ROWS)
        if i == len(HEADS) - 1:
            axis.set_xlabel("verified rows")
    for axis in axes[:, 0]:
        axis.set_ylabel("tokens per step (higher is better)")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def run_all(args, plt):
    """Train and measure every model; write the results after each, and the figure."""
    results = dict(environment=environment(pick_device(args.device)), rows=[], args={**vars(args)})
    combinations = list(itertools.product(args.corpora, args.seeds, HEADS.items()))
    runs = []
    for corpus, seed, (heads, options) in combinations:
        args.data = str(prepare(corpus))
        out = Path(args.folder, f"{Path(corpus).stem}-{heads}-{seed}")
        train_once(out, args, "--offsets", OFFSETS, *SHAPE, *options, "--seed", str(seed))
        runs.append(out)
    for (corpus, seed, (heads, _)), out in zip(combinations, runs):
        methods = measure_run(out, args)
        name = Path(corpus).stem
        results["rows"].append(dict(corpus=name, seed=seed, heads=heads, methods=methods))
        shown = "  ".join(f"{method} {m['chain']:.2f} " + " ".join(
            f"{n}:{t:.2f}" for n, t in m["trees"].items()) for method, m in methods.items())
        print(f"{name}, {heads}, seed {seed}: {shown}", flush=True)
        write_results(args.out, results)
    if args.out:
        draw(results["rows"], plt, Path(args.out).with_suffix(".png"))


def main(argv=None):
    """Bad input is one line and status 2."""
    p = Parser(prog="equal_rows.py", description="Tokens per step of chains and trees that verify "
               "equally many rows, on real text.")
    p.option("folder", "runs/rows", "of the runs; those that are finished are kept")
    p.option("corpora", ["python", "shakespeare", "logs"], "as for data/prepare.py", nargs="+")
    p.option("seeds", [0, 1, 2], "of the models", nargs="+", type=int)
    p.option("steps", 1200, "of training", least=1)
    p.option("windows", 64, "of each half of the held-out text", least=1)
    p.option("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    p.option("out", None, "also write the results as JSON, and a figure", metavar="FILE")
    args = p.parse_args(argv)
    with one_line_errors("equal_rows.py"):
        check_output(args.out)
        plt = None
        if args.out:
            try:
                import matplotlib.pyplot as plt
            except ImportError:
                raise InputError("the figure needs a package: pip install matplotlib") from None
        run_all(args, plt)


if __name__ == "__main__":
    main()
