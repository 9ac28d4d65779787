"""What truncating a marginalisation costs, what each layer of the model knows, and the figures.

    python experiments/layers.py runs/demo --out result.json            # all tables of one model
    python experiments/layers.py runs/small runs/large --probe-steps 0 --out sizes.json

For each run this prints the table of marginalize.py and two more:

- truncation: how far top-k children, a beam and sampled paths are from the exact distribution;
- layers: what each layer's output says about t+1 and t+2, read by the model's own final norm and
  unembedding (the logit lens) and by trained probes.

--exact-nodes 0 and --probe-steps 0 leave one out. The results go to --out as JSON, and a figure
beside it shows the accuracy of all runs by distance and, where it was measured, by layer.
"""
import copy
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (Parser, Progress, check_output, environment, one_line_errors,
                    pick_device, write_whole)
from experiments.plots import import_pyplot
from marginalize import (MAX_NODES, estimate, interval, load_run, marginalize, record, report,
                         score, show)
from model import InputError

KS = (1, 4, 16, 64)  # branches whose truncation is compared


# ----------------------------------------------------------------------------------------------
# What truncation costs

def truncation(gpt, windows, position, horizon, nodes, max_nodes=MAX_NODES, seed=0,
               progress=True):
    """Compare truncated and estimated sums with the exact one, at the distances where `nodes`
    branches pay for at least two positions. windows (W, L), position (W, P): from `questions`.

    Returns records with distance, questions (their number), k, and for each method:
    tv              the total variation distance to the exact distribution, half the sum of
                    |difference|, as (mean, half of the 95% interval)
    mass            the captured mass of top-k and beam
    standard_error  half the sum of the samples' own standard errors, None for k = 1; their
                    E|difference| is about 0.8 of it
    """
    records, (W, P), V = [], position.shape, gpt.config.vocab_size
    distances = [d for d in range(2, horizon + 1) if 2 * V ** (d - 1) <= nodes]
    ks = [k for k in KS if k <= min(V, max_nodes)]
    total = len(distances) * (1 + len(ks))
    with Progress(None, progress, total=total, desc="truncation", unit="sum") as bar:
        for d in distances:
            n = min(W * P, nodes // V ** (d - 1))
            rows = torch.linspace(0, W - 1, min(n, W)).long()  # windows first, then positions
            columns = torch.linspace(0, P - 1, max(1, n // W)).long()
            t = position[rows.to(windows.device)][:, columns]
            idx = windows[rows, :int(t.max()) + 1]
            exact, _ = marginalize(gpt, idx, d, position=t, max_nodes=max_nodes)
            bar.update()
            for k in ks:
                r = dict(distance=d, questions=t.numel(), k=k, tv={}, mass={})
                for method in ("top-k", "beam"):
                    probs, mass = marginalize(gpt, idx, d, k, method, t, max_nodes)
                    r["tv"][method] = distance_to(exact, probs / mass[..., None])
                    r["mass"][method] = mass.mean().item()
                probs, error = estimate(gpt, idx, d, k, t, max_nodes, seed)
                r["tv"]["sample"] = distance_to(exact, probs)
                r["standard_error"] = error.sum(-1).mean().item() / 2 if k > 1 else None
                records.append(r)
                bar.update()
    return records


def distance_to(exact, probs):
    """Total variation distance of distributions (W, P, V) -> its `interval`"""
    return interval((probs - exact).abs().sum(-1) / 2)


def print_truncation(records):
    """Print the records of `truncation`."""
    if not records:
        return
    titles = ("top-k", "captured, %", "beam", "captured, %", "sample", "std. error")
    print("\ntotal variation distance to the exact distribution")
    print(f"{'':5}{'k':>4}" + "".join(f"{title:>14}" for title in titles))
    for r in records:
        tv = {method: f"{mean:.3f} ±{half:.3f}" for method, (mean, half) in r["tv"].items()}
        mass = {method: f"{100 * value:.1f}" for method, value in r["mass"].items()}
        error = "" if r["standard_error"] is None else f"{r['standard_error']:.3f}"
        cells = (tv["top-k"], mass["top-k"], tv["beam"], mass["beam"], tv["sample"], error)
        print(f"t+{r['distance']:<3}{r['k']:4}" + "".join(f"{cell:>14}" for cell in cells)
              + f"   {r['questions']} positions")


# ----------------------------------------------------------------------------------------------
# What each layer knows

class Probe(nn.Module):
    """A tuned lens (Belrose et al. 2023): an affine map x + A x + b of a layer's output, read by
    the model's own final norm and unembedding. A and b start at 0, which is the logit lens.
    Theirs learns what the last layer predicts. Ours learns the text, so it can predict t+2."""

    def __init__(self, n_embd):
        super().__init__()
        self.affine = nn.Linear(n_embd, n_embd)
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)

    def forward(self, gpt, x):
        """x (..., C), a layer's output -> logits (..., V)"""
        return gpt.lm_head(gpt.transformer.ln_f(x + self.affine(x)))


def train_probes(gpt, corpus, distances=(1, 2), steps=300, batch_size=8, lr=1e-2, seed=0,
                 progress=True):
    """Train a probe for each layer and distance on the corpus; the gpt stays as it is.
    -> {distance: [Probe for the embeddings, for layer 1, ...]}. Raises CorpusError if the corpus
    is too short."""
    gpt = copy.deepcopy(gpt).eval().requires_grad_(False)
    device, config = gpt.lm_head.weight.device, gpt.config
    probes = {d: [Probe(config.n_embd).to(device) for _ in range(config.n_layer + 1)]
              for d in distances}
    parameters = [p for layers in probes.values() for probe in layers for p in probe.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for step in Progress(range(steps), progress, desc="probes", unit="step"):
        idx = corpus.batch("train", batch_size, config.block_size + 1, step, seed)
        asked = corpus.predicted(idx).to(device)
        idx = idx.to(device)
        with torch.no_grad():
            stream = gpt.residual_stream(idx[:, :-1])  # n_layer + 1 of (B, T, C)
        for d, layers in probes.items():
            target, fit = idx[:, d:], asked[:, d:]  # (B, T - d + 1)
            for probe, x in zip(layers, stream):
                logits = probe(gpt, x[:, :fit.shape[1]][fit])
                F.cross_entropy(logits, target[fit]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return probes


@torch.no_grad()
def measure_layers(gpt, probes, windows, position):
    """Held-out accuracy of each layer, read by the logit lens and by `probes`, at positions
    (W, P) of windows (W, L) from `questions`. -> records with layer (0: the embeddings),
    distance, reader ("lens" or "probe"), top1, top5, nats"""
    gpt, records = gpt.eval(), []
    parts = []  # of 16 windows: layers (n_layer + 1, w, P, C)
    for part, t in zip(windows.split(16), position.split(16)):
        row = torch.arange(len(part), device=part.device)[:, None]
        parts.append(torch.stack([x[row, t] for x in gpt.residual_stream(part[:, :-1])]))
    stream = torch.cat(parts, dim=1)  # (n_layer + 1, W, P, C)
    lens = Probe(gpt.config.n_embd).to(windows.device)
    for d, layers in probes.items():
        target = windows.gather(1, position + d)  # (W, P)
        for i, x in enumerate(stream):
            for reader, probe in (("lens", lens), ("probe", layers[i])):
                scores = [score(probe(gpt, x[w]).softmax(-1), target[w]) for w in range(len(x))]
                rank, nats = (torch.stack(s).cpu() for s in zip(*scores))
                records.append(record(rank, nats, layer=i, distance=d, reader=reader))
    return records


def print_layers(records):
    """Print the records of `measure_layers`."""
    distances, layers = (sorted({r[key] for r in records}) for key in ("distance", "layer"))
    columns = [(d, reader) for d in distances for reader in ("lens", "probe")]
    print(f"\ntop-1, %, read from layer\n{'':5}"
          + "".join(f"{f't+{d} {reader}':>15}" for d, reader in columns))
    for layer in layers:
        found = {(r["distance"], r["reader"]): r["top1"] for r in records if r["layer"] == layer}
        print(f"{layer:5}" + "".join(show(found[column]) for column in columns))


# ----------------------------------------------------------------------------------------------
# The figure

STYLES = {"marginalisation": "o-", "own head": "s--", "greedy rollout": "^:", "unigram": "x:"}


def draw(results, plt):
    """Accuracy by distance of all runs and, of each run with layers, by layer. -> the figure"""
    runs = results["runs"]
    layered = [run for run in runs if run["layers"]]
    n = 1 + len(layered)
    width = 2 if n == 4 else min(3, n)
    height = math.ceil(n / width)
    figure, axes = plt.subplots(height, width, squeeze=False, layout="constrained",
                                figsize=(5.2 * width, 4.2 * height))
    axes = axes.flatten()
    draw_distances(axes[0], runs, results["horizon"])
    for axis, run in zip(axes[1:], layered):
        draw_layers(axis, run)
    for i, axis in enumerate(axes):
        axis.set_ylim(0, 1)
        axis.set_visible(i < n)
    return figure


def draw_distances(axis, runs, horizon):
    """Accuracy by distance. Several runs are compared by marginalisation and own heads only."""
    for i, run in enumerate(runs):
        for j, reader in enumerate(STYLES if len(runs) == 1 else ("marginalisation", "own head")):
            also = () if reader == "unigram" else ("model",)  # the model itself at t+1
            found = [r for r in run["table"] if r["reader"] in (reader, *also)]
            if any(r["reader"] == reader for r in found):
                label = reader if len(runs) == 1 else f"{run['name']}, {reader}"
                draw_curve(axis, [r["distance"] for r in found], found, fmt=STYLES[reader],
                           color=f"C{i if len(runs) > 1 else j}", label=label)
    axis.set(xlabel="distance (tokens ahead)", ylabel="top-1 accuracy, held-out",
             title="What is known about t+h", xticks=range(1, 1 + horizon))
    axis.legend(fontsize=8, loc="upper right")


def draw_layers(axis, run):
    """Accuracy by layer, with marginalisation as a line."""
    for d, color in zip(sorted({r["distance"] for r in run["layers"]}), ("C0", "C3")):
        for reader, style in (("probe", "o-"), ("lens", "x:")):
            found = [r for r in run["layers"] if (r["distance"], r["reader"]) == (d, reader)]
            draw_curve(axis, [r["layer"] for r in found], found, fmt=style, color=color,
                       label=f"t+{d}, {reader}")
        for r in run["table"]:
            if (r["distance"], r["reader"]) == (d, "marginalisation"):
                axis.axhline(r["top1"][0], color=color, linestyle="--", linewidth=1,
                             label=f"t+{d}, marginalisation")
    axis.set(xlabel="layer (0: the embeddings)", ylabel="top-1 accuracy, held-out",
             title=f"{run['name']}, layer by layer",
             xticks=sorted({r["layer"] for r in run["layers"]}))
    axis.legend(fontsize=8, loc="upper left")


def draw_curve(axis, x, records, **style):
    """The top1 of records, with intervals."""
    mean, half = zip(*(r["top1"] for r in records))
    axis.errorbar(x, mean, half, capsize=2, markersize=4, linewidth=1.5, **style)


# ----------------------------------------------------------------------------------------------
# The command line

def report_all(run, args, loaded):
    """Measure and print everything about a run from load_run. -> its results"""
    model, corpus, _, windows, position = loaded
    results = report(args, run, *loaded)
    device = pick_device(args.device)
    windows, position = windows.to(device), position.to(device)
    cost = truncation(model.gpt, windows, position, args.horizon, args.exact_nodes,
                      args.max_nodes, args.seed)
    print_truncation(cost)
    layers = []
    if args.probe_steps:
        distances = range(1, min(2, args.horizon) + 1)
        probes = train_probes(model.gpt, corpus, distances, args.probe_steps, seed=args.seed)
        layers = measure_layers(model.gpt, probes, windows, position)
        print_layers(layers)
    return dict(results, truncation=cost, layers=layers)


def main(argv=None):
    """Measure each run, write the results and the figure. Bad input is one line and status 2."""
    p = Parser(prog="layers.py", description="Measure on held-out text what a next-token model "
               "knows about later tokens: by distance, by truncation and by layer.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run of train.py, or GPT-2 weights")
    p.add_argument("--data", metavar="NAME", help="corpus (default: the one trained on)")
    p.add_argument("--horizon", type=int, default=4, help="tokens ahead")
    p.add_argument("--branches", type=int, default=32, help="of the beam")
    p.add_argument("--windows", type=int, default=256, help="held-out windows, dozens at least")
    p.add_argument("--positions", type=int, default=16, help="positions in each window")
    p.add_argument("--exact-nodes", type=int, default=300_000, help="branches to spend on the "
                   "exact answer at each distance; 0: no truncation table")
    p.add_argument("--probe-steps", type=int, default=300, help="training steps; 0: no probes")
    p.add_argument("--max-nodes", type=int, default=MAX_NODES, help="branches in a forward pass")
    p.add_argument("--seed", type=int, default=0, help="of sampled paths and the probes' batches")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--out", metavar="FILE", help="write the results as JSON, a figure beside it")
    p.set_defaults(method="beam")
    args = p.parse_args(argv)
    with one_line_errors("layers.py", memory="--max-nodes"):
        for name in ("exact_nodes", "probe_steps"):
            if getattr(args, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} must be at least 0")
        figure = args.out and Path(args.out).with_suffix(".png")
        if args.out and Path(args.out) == figure:
            raise InputError("--out names the JSON file; the figure is written beside it")
        check_output("out", args.out)
        check_output("out", figure)
        plt = import_pyplot() if args.out else None  # if it is missing, fail before the work
        results = dict(command=" ".join(["experiments/layers.py", *(argv or sys.argv[1:])]),
                       environment=environment(pick_device(args.device)), horizon=args.horizon,
                       method=args.method, branches=args.branches)
        loaded = [(run, args, load_run(run, args)) for run in args.runs]  # finds all errors
        results["runs"] = [report_all(*found) for found in loaded]
        if args.out:
            write_whole(args.out, json.dumps(results, indent=1) + "\n")
            print(f"\nwritten to {args.out}")
            draw(results, plt).savefig(figure, dpi=110)


if __name__ == "__main__":
    main()
