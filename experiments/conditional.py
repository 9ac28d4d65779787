"""What knowing one token more is worth: independent and conditional heads, and their ceilings.

    python experiments/conditional.py --out experiments/results/conditional.json

A head that reads only the hidden state after x_1..x_t has the marginal p(x_{t+d} | x_<=t) for a
ceiling, which the model knows already (marginalize.py). But when a decoder drafts, it knows
x_{t+1} as well, the bonus token. For a head that also reads this token, the ceiling is the
conditional p(x_{t+d} | x_<=t+1): the marginal at distance d - 1 from one position later. So one
token more moves the ceiling by one distance. (It is the ceiling of what the model knows: where the
model has not learned all there is, heads of their own weights may pass it.)

For every seed this trains a next-token model, both kinds of heads on it (frozen), and both kinds
from scratch, all for as many steps. The control are heads as large as conditional ones that read
zeros for the token ("blank"). It measures the accuracy of the heads and of the ceilings on the
same held-out positions, and the tokens per step of a decoder that follows real text. Runs are
kept: the next call trains only what is missing.
"""
import json
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from common import (Parser, check_output, corpus_of, environment, load_checkpoint,
                    one_line_errors, pick_device, write_whole)
from decode import chain, follow_text
from experiments.plots import import_pyplot
from heads import NextToken, draft_sources
from marginalize import measure, questions, unigram
from model import require

OFFSETS = (1, 2, 3, 4, 5, 7)
METHODS = {"MTP": (1, 2, 3, 4), "leap": (1, 3, 5, 7)}
HORIZON = 4
SHAPE = ["--n-layer", "4", "--n-head", "2", "--n-embd", "96", "--lr", "1e-2"]  # the demo's
HEADS = {"independent": [], "conditional": ["--conditional"]}
COLORS = {"independent": "#999999", "blank": "#c98b2e", "conditional": "#1f6f8b"}


@contextmanager
def blank(heads):
    """Conditional heads read zeros for the next token, if `heads` is "blank"."""
    forward = NextToken.forward
    if heads == "blank":
        NextToken.forward = lambda self, z, e: forward(self, z, torch.zeros_like(e))
    try:
        yield
    finally:
        NextToken.forward = forward


def train_once(out, args, *options):
    """Train a run in the folder `out`, or what is missing of it. -> out"""
    begun = (out / "checkpoint.pt").exists()
    if begun and load_checkpoint(out)[1]["args"]["steps"] == args.steps:
        train.main(["--resume", str(out), "--device", args.device])
    else:
        steps = str(args.steps)
        train.main(["--data", args.data, "--out", str(out), "--overwrite", "--device", args.device,
                    "--steps", steps, "--eval-every", steps, *options])
    return out


def runs_of(seed, args):
    """Train all models of a seed. -> {(recipe, kind of heads): run folder}"""
    folder, found = Path(args.folder), {}
    offsets = ["--offsets", ",".join(map(str, OFFSETS)), "--seed", str(seed)]
    base = train_once(folder / f"ntp-{seed}", args, "--offsets", "1", "--seed", str(seed), *SHAPE)
    for kind, options in (HEADS | {"blank": ["--conditional"]}).items():
        for recipe, start in (("frozen", ["--init", str(base), "--backbone-lr", "0"]),
                              ("scratch", SHAPE)):
            if (recipe, kind) != ("scratch", "blank"):
                with blank(kind):
                    found[recipe, kind] = train_once(folder / f"{recipe}-{kind}-{seed}", args,
                                                     *offsets, *start, *options)
    return found


def measure_run(run, kind, args):
    """-> dict(nats: next-token loss, head and ceiling: {distance: accuracy}, tokens_per_step:
    {method: on real text})"""
    device = pick_device(args.device)
    model, state = load_checkpoint(run)
    model, corpus = model.to(device).eval(), corpus_of(run, model, state)
    length = model.gpt.config.block_size
    asked = questions(corpus, length, HORIZON, args.windows, 16)
    windows, position = (t.to(device) for t in asked)
    table = measure(model, windows, position, HORIZON, unigram(corpus).to(device), branches=32)
    top1 = {(r["reader"], r["distance"]): r["top1"][0] for r in table}
    marginal = {d: top1["marginalisation" if d > 1 else "model", d] for d in range(1, HORIZON + 1)}
    conditional = int(kind == "conditional")
    drafted = range(2, HORIZON + 1)
    chains = {name: chain(draft_sources(offsets)) for name, offsets in METHODS.items()}
    followed = follow_text(model, corpus.windows("val", 64, length), list(chains.values()))
    return dict(
        nats=train.evaluate(model, windows, 8)[0][1],
        head={d: top1["own head", d] for d in drafted},
        ceiling={d: marginal[d - conditional] for d in drafted},
        tokens_per_step={name: r["tokens_per_step"] for name, r in zip(chains, followed)})


def draw(rows, plt, path):
    """Accuracy by distance, heads against their ceilings, and tokens per step on real text."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for axis, recipe in zip(axes, ("frozen", "scratch")):
        for kind, color in COLORS.items():
            found = [r for r in rows if (r["recipe"], r["heads"]) == (recipe, kind)]
            ceiling = [("ceiling", "--")] * (kind != "blank")  # has the one of independent heads
            for what, style in (*ceiling, ("head", "o-")) if found else ():
                by_distance = {d: [r[what][d] for r in found] for d in found[0][what]}
                mean = [statistics.fmean(v) for v in by_distance.values()]
                spread = [[m - min(v) for m, v in zip(mean, by_distance.values())],
                          [max(v) - m for m, v in zip(mean, by_distance.values())]]
                label = f"{kind} heads" if what == "head" else f"ceiling: {kind}"
                axis.errorbar(list(by_distance), mean, spread, fmt=style, color=color, capsize=2,
                              markersize=4, label=label)
        title = "heads on a frozen next-token model" if recipe == "frozen" else "from scratch"
        axis.set(title=title, xlabel="distance (tokens ahead)", ylabel="top-1 accuracy, held-out",
                 xticks=range(2, HORIZON + 1), ylim=(0.25, 0.7))
        axis.legend(fontsize=8, frameon=False)
    groups = [(recipe, method) for recipe in ("frozen", "scratch") for method in METHODS]
    for i, (kind, color) in enumerate(COLORS.items()):
        by_group = {g: v for g, (recipe, method) in enumerate(groups) if (v := [
            r["tokens_per_step"][method] for r in rows
            if (r["recipe"], r["heads"]) == (recipe, kind)])}
        mean = [statistics.fmean(v) for v in by_group.values()]
        error = [[m - min(v) for m, v in zip(mean, by_group.values())],
                 [max(v) - m for m, v in zip(mean, by_group.values())]]
        bars = axes[2].bar([g + 0.3 * i - 0.3 for g in by_group], mean, 0.28, yerr=error,
                           color=color, capsize=2, label=kind)
        axes[2].bar_label(bars, [f"{m:.2f}" for m in mean], fontsize=8, padding=2)
    axes[2].set(title="following real text", ylabel="tokens per step", ylim=(1, 2.4),
                xticks=range(len(groups)))
    axes[2].set_xticklabels([f"{method},\n{recipe}" for recipe, method in groups])
    axes[2].legend(fontsize=8, frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main(argv=None):
    """Train, measure, print and draw. Bad input is one line and status 2."""
    p = Parser(prog="conditional.py", description="Compare heads that read the next token with "
               "heads that do not, and both with what they could reach at best.")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, batches")
    p.add_argument("--steps", type=int, default=800, help="of each training run")
    p.add_argument("--windows", type=int, default=128, help="held-out, with 16 positions each")
    p.add_argument("--data", default="data/python", help="corpus folder made by data/prepare.py")
    p.add_argument("--folder", default="runs/conditional", help="for the runs")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--out", metavar="FILE", help="write the results as JSON, the figure beside it")
    args = p.parse_args(argv)
    with one_line_errors("conditional.py", memory="--windows"):
        require(args.steps > 0 and args.windows > 1, "--steps must be at least 1, --windows 2")
        check_output("out", args.out)
        plt = import_pyplot() if args.out else None  # if it is missing, fail before the work
        trained = {seed: runs_of(seed, args) for seed in args.seeds}
        rows = []
        for seed, runs in trained.items():
            for (recipe, kind), run in runs.items():
                with blank(kind):
                    rows.append(dict(seed=seed, recipe=recipe, heads=kind,
                                     **measure_run(run, kind, args)))
        print(f"\n{'recipe':10}{'heads':14}{'seed':>4}{'nats':>8}   t+2, t+3, t+4: heads (ceiling)"
              f"{'MTP':>12}{'leap':>7} tokens per step")
        for r in sorted(rows, key=lambda r: (r["recipe"], r["heads"])):
            accuracy = "  ".join(f"{r['head'][d]:.1%} ({r['ceiling'][d]:.1%})" for d in r["head"])
            per_step = "".join(f"{x:7.2f}" for x in r["tokens_per_step"].values())
            print(f"{r['recipe']:10}{r['heads']:14}{r['seed']:4}{r['nats']:8.3f}   "
                  + accuracy + per_step)
        ratios = {}
        for recipe, over in (("frozen", "independent"), ("frozen", "blank"),
                             ("scratch", "independent")):
            for method in METHODS:
                per_step = {(r["seed"], r["heads"]): r["tokens_per_step"][method] for r in rows
                            if r["recipe"] == recipe}
                ratio = [per_step[seed, "conditional"] / per_step[seed, over]
                         for seed in args.seeds]
                name = f"{recipe}, {method}: conditional over {over}"
                ratios[name] = ratio
                print(f"{name}, by seed: " + ", ".join(f"{x:.3f}" for x in ratio))
        if args.out:
            command = f"python experiments/conditional.py --steps {args.steps}"
            write_whole(args.out, json.dumps(dict(
                command=command, environment=environment(pick_device(args.device)), rows=rows,
                tokens_per_step_ratio=ratios), indent=1) + "\n")
            draw(rows, plt, Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    main()
