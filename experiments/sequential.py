"""What the token before is worth: independent heads against sequential ones.

    python experiments/sequential.py --out experiments/results/sequential.json

An independent head at position t sees x_1..x_t. The best that it can do is the marginal
distribution of x_{t+o}, in which the tokens in between are summed out: that is the first *mark*,
by marginalisation of the model itself. A sequential head also reads x_{t+o-1}. The second mark is
the marginal one token later, which knows x_{t+1} as well; a sequential head knows another token,
so it may pass that mark, too.

Both kinds of heads are trained on a frozen next-token model and from scratch, with the demo's
recipe and several seeds. Text is what counts: tokens per step on real, greedy and sampled text.
"""
import itertools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from common import (Parser, check_output, corpus_of, environment, load_checkpoint,
                    one_line_errors, pick_device, write_results)
from data.prepare import InputError
from decode import Decoder, accepted_drafts, real_text_steps
from marginalize import evaluation_positions, measure

METHODS = {"MTP": (1, 2, 3, 4), "leap": (1, 3, 5, 7), "all": (1, 2, 3, 4, 5, 7)}
OFFSETS = "1,2,3,4,5,7"
SHAPE = ["--n-layer", "4", "--n-head", "2", "--n-embd", "96", "--lr", "1e-2"]  # the demo's
HEADS = {"independent": [], "sequential": ["--sequential"]}
COLORS = {"independent": "#8a8a8a", "sequential": "#1f6f8b"}
HORIZON = 4


def train_once(out, args, *options):
    """Train a run in the folder `out`, unless it is finished. -> out"""
    if not (out / "checkpoint.pt").exists() or load_checkpoint(out)[1]["step"] < args.steps:
        train.main(["--data", args.data, "--out", str(out), "--overwrite", "--device", args.device,
                    "--steps", str(args.steps), "--eval-every", str(args.steps), *options])
    return out


def train_seed(seed, args):
    """Train all models of a seed. -> {(recipe, kind of heads): run folder}"""
    folder = Path(args.folder)
    seeded = ["--seed", str(seed)]
    base = train_once(folder / f"ntp-{seed}", args, "--offsets", "1", *SHAPE, *seeded)
    recipes = {"frozen": ["--init", str(base), "--backbone-lr", "0", "--lr", "1e-2"],
               "scratch": SHAPE}
    runs = {}
    for (recipe, start), (heads, options) in itertools.product(recipes.items(), HEADS.items()):
        out = folder / f"{recipe}-{heads}-{seed}"
        runs[recipe, heads] = train_once(out, args, "--offsets", OFFSETS, *start, *options, *seeded)
    return runs


def measure_run(run, args):
    """-> dict(nats: next-token loss; model, marginal, head: {distance: accuracy}; tokens_per_step:
    {text: {method: ...}})"""
    device = pick_device(args.device)
    model, state = load_checkpoint(run)
    model.to(device)
    corpus = corpus_of(run, model, state)
    context = model.gpt.config.block_size
    windows, position = evaluation_positions(corpus, context, HORIZON, args.windows, 16)
    table = measure(model, windows.to(device), position.to(device), HORIZON, branches=32)
    found = {name: {r["distance"]: r["top1"][0] for r in table if r["predictor"] == name}
             for name in ("model", "marginalisation", "own head")}
    windows = corpus.windows("val", 64, context).to(device)
    prompts = corpus.windows("val", 32, 64).tolist()
    per_step = {"real": {}, "greedy": {}, "sampled": {}}
    for name, offsets in METHODS.items():
        accepted = accepted_drafts(model, offsets, windows)
        per_step["real"][name] = real_text_steps(accepted).tokens_per_step
        for text, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            decoder = Decoder(model, offsets, 32, temperature=temperature)
            per_step[text][name] = decoder.generate(prompts, 192).tokens_per_step
    nats = train.evaluate(model, windows, 8)[0][1]
    return dict(nats=nats, head=found["own head"], tokens_per_step=per_step,
                marginal=found["model"] | found["marginalisation"])


def mean_and_spread(values):
    """-> mean, and how far the least and the greatest value are from it, [[below], [above]]"""
    mean = statistics.fmean(values)
    return mean, [[mean - min(values)], [max(values) - mean]]


def draw(rows, plt, path):
    """Accuracy by distance, heads against the two marks, and tokens per step by text."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    distances = range(2, HORIZON + 1)
    for axis, recipe in zip(axes, ("frozen", "scratch")):
        of = {heads: [r for r in rows if (r["recipe"], r["heads"]) == (recipe, heads)]
              for heads in HEADS}
        for shift, style, label in ((0, "--", "mark: marginalisation"),
                                    (1, ":", "mark: marginalisation, one token later")):
            marks = [statistics.fmean(r["marginal"][d - shift] for r in of["independent"])
                     for d in distances]
            axis.plot(distances, marks, style, color="#444444", label=label)
        for heads, found in of.items():
            points = [mean_and_spread([r["head"][d] for r in found]) for d in distances]
            error = [[p[1][side][0] for p in points] for side in (0, 1)]
            axis.errorbar(distances, [p[0] for p in points], error, fmt="o-", capsize=3,
                          color=COLORS[heads], label=f"{heads} heads")
        title = "heads on a frozen next-token model" if recipe == "frozen" else "from scratch"
        axis.set(title=title, xlabel="distance (tokens ahead)", ylim=(0.25, 0.75),
                 ylabel="top-1 accuracy, held-out (higher is better)", xticks=distances)
        axis.legend(fontsize=8, frameon=False)
    groups = [(recipe, method) for recipe in ("frozen", "scratch") for method in METHODS]
    for i, heads in enumerate(HEADS):
        for x, (recipe, method) in enumerate(groups):
            mean, error = mean_and_spread([
                r["tokens_per_step"]["real"][method] for r in rows
                if (r["recipe"], r["heads"]) == (recipe, heads)])
            bar = axes[2].bar(x + 0.38 * i - 0.19, mean, 0.36, yerr=error, capsize=3,
                              color=COLORS[heads], label=heads if x == 0 else None)
            axes[2].bar_label(bar, [f"{mean:.2f}"], fontsize=8, padding=2)
    axes[2].set(title="on real text", ylabel="tokens per step (higher is better)", ylim=(1, 2.6),
                xticks=range(len(groups)))
    axes[2].set_xticklabels([f"{method}\n{recipe}" for recipe, method in groups])
    axes[2].legend(fontsize=8, frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main(argv=None):
    """Train, measure, print and draw. Bad input is one line and status 2."""
    p = Parser(prog="sequential.py", description="Compare heads that read the token before the one "
               "that they predict with heads that do not.")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, batches")
    p.option("steps", 1200, "of each training run", least=1)
    p.option("windows", 128, "held-out, with 16 positions each", least=2)
    p.option("data", "data/python", "corpus folder made by data/prepare.py")
    p.option("folder", "runs/sequential", "for the runs; finished ones are kept")
    p.option("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    p.option("out", None, "write the results as JSON, the figure beside it", metavar="FILE")
    args = p.parse_args(argv)
    with one_line_errors("sequential.py"):
        check_output(args.out)
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            raise InputError("the figure needs a package: pip install matplotlib") from None
        rows = []
        print(f"{'recipe':9}{'heads':13}{'seed':>4}{'nats':>8}{'accuracy at t+2, t+3, t+4':>30}"
              f"{'real: MTP, leap, all':>24}{'greedy':>20}{'sampled':>20}")
        for seed in args.seeds:
            for (recipe, heads), run in train_seed(seed, args).items():
                r = dict(seed=seed, recipe=recipe, heads=heads, **measure_run(run, args))
                rows.append(r)
                texts = [", ".join(f"{v:.2f}" for v in methods.values())
                         for methods in r["tokens_per_step"].values()]
                accuracy = ", ".join(f"{v:.1%}" for v in r["head"].values())
                print(f"{recipe:9}{heads:13}{seed:4}{r['nats']:8.3f}{accuracy:>30}{texts[0]:>24}"
                      f"{texts[1]:>20}{texts[2]:>20}", flush=True)
                write_results(args.out, dict(environment=environment(pick_device(args.device)),
                                             args=vars(args), rows=rows))
        if args.out:
            draw(rows, plt, Path(args.out).with_suffix(".png"))


if __name__ == "__main__":
    main()
