"""Self-distillation as a loss: do heads that learn from the model draft its text better?

    python experiments/distill.py --out experiments/results/distill.json

Heads on a frozen backbone should predict what that backbone will emit, and the token of the corpus
is only one sample of it. `train.py --distill 1` trains a head at t for x_{t+o} against the whole
distribution that the model has there once it has read x_1..x_{t+o-1}. For every seed this trains
a next-token model, and on it heads with the token's loss, the distribution's, and half of each,
independent and conditional. It measures tokens per step on text that the model samples
(temperature 1) and on real text. All losses are compared on the same prompts; the intervals are
those of experiments/verdicts.py. Runs are kept: the next call trains only what is missing.
"""
import json
import statistics
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from common import (Parser, check_output, corpus_of, environment, load_checkpoint, one_line_errors,
                    pick_device, write_whole)
from decode import Decoder, statistics_of
from experiments.conditional import HEADS, METHODS, OFFSETS, SHAPE
from experiments.verdicts import estimate
from model import require

PROMPT = 16  # tokens


def train_once(out, args, steps, *options):
    """Train a run in the folder `out` unless it is finished. -> out"""
    begun = (out / "checkpoint.pt").exists()
    if not begun or load_checkpoint(out)[1]["step"] < steps:
        train.main(["--data", args.data, "--out", str(out), "--overwrite", "--device", args.device,
                    "--steps", str(steps), "--eval-every", str(steps), *options])
    return out


def runs_of(seed, args):
    """Train all models of a seed. -> {(kind of heads, distill): run folder}"""
    folder, seed = Path(args.folder), str(seed)
    base = train_once(folder / f"ntp-{seed}", args, args.base_steps, "--offsets", "1", "--seed",
                      seed, *SHAPE)
    how = ["--offsets", ",".join(map(str, OFFSETS)), "--seed", seed, "--init", str(base),
           "--backbone-lr", "0"]
    return {(kind, distill): train_once(folder / f"frozen-{kind}-{distill:g}-{seed}", args,
                                        args.steps, *how, "--distill", str(distill), *HEADS[kind])
            for kind, distill in product(HEADS, args.distill)}


def measure_run(run, args):
    """-> dict(nats: next-token loss, accuracy: {offset: on real text}, steps: {text: {method:
    steps of each prompt}}), tokens: of each prompt"""
    model, state = load_checkpoint(run)
    model, corpus = model.to(pick_device(args.device)).eval(), corpus_of(run, model, state)
    length = model.gpt.config.block_size
    windows = corpus.windows("val", args.prompts, length + 1)
    loss, accuracy = train.evaluate(model, windows, 16)
    n, steps = length - PROMPT, {"sampled": {}, "real": {}}
    for method, offsets in METHODS.items():
        sampled = Decoder(model, offsets, temperature=1.0, seed=0)
        real, nodes = Decoder(model, offsets), {"sampled": [], "real": []}
        for i in range(0, len(windows), args.batch_size):
            rows = windows[i:i + args.batch_size, :length].tolist()
            prompts, rest = [r[:PROMPT] for r in rows], [r[PROMPT:] for r in rows]
            nodes["sampled"] += sampled.generate(prompts, n, first_row=i).nodes
            nodes["real"] += real.generate(prompts, n, follow=rest).nodes
        for text in nodes:
            steps[text][method] = [statistics_of([row], real.tree)[0] for row in nodes[text]]
    return dict(nats=loss[1], accuracy={o: accuracy[o] for o in OFFSETS}, steps=steps, tokens=n)


def comparisons(rows, seeds, distills):
    """Tokens per step relative to the first of `distills`: measure_run's rows -> list of dict"""
    found, first = [], distills[0]
    steps = {(r["heads"], r["distill"], r["seed"]): r["steps"] for r in rows}
    for kind, text, method, d in product(HEADS, ("sampled", "real"), METHODS, distills[1:]):
        old, new = ([steps[kind, x, seed][text][method] for seed in seeds] for x in (first, d))
        ratio = estimate(lambda a, b: a / b, 1.0, old, new)  # fewer steps for the same tokens
        found.append(dict(heads=kind, text=text, method=method, distill=d, ratio=ratio["effect"],
                          interval=[ratio["low"], ratio["high"]], by_seed=ratio["by_seed"]))
    return found


def main(argv=None):
    """Train, measure and print. Bad input is one line and status 2."""
    p = Parser(prog="distill.py", description="Compare heads that learn from text with heads "
               "that learn from the model's own distribution.")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights, batches")
    p.add_argument("--distill", type=float, nargs="+", default=[0.0, 0.5, 1.0],
                   help="fractions; the others are compared with the first")
    p.add_argument("--base-steps", type=int, default=1200, help="of the next-token models")
    p.add_argument("--steps", type=int, default=800, help="of the heads")
    p.add_argument("--prompts", type=int, default=128, help="held-out")
    p.add_argument("--batch-size", type=int, default=32, help="prompts decoded at once")
    p.add_argument("--data", default="data/python", help="corpus folder made by data/prepare.py")
    p.add_argument("--folder", default="runs/distill", help="for the runs")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--out", metavar="FILE", help="write the results as JSON")
    args = p.parse_args(argv)
    with one_line_errors("distill.py", memory="--batch-size"):
        require(min(args.steps, args.base_steps, args.prompts) > 0, "numbers must be at least 1")
        check_output("out", args.out)
        rows = [dict(seed=seed, heads=kind, distill=distill, **measure_run(run, args))
                for seed in args.seeds for (kind, distill), run in runs_of(seed, args).items()]
        print(f"\n{'heads':14}{'distill':>7}{'seed':>5}{'nats':>8}  tokens/step: sampled MTP, "
              "leap; real MTP, leap")
        for r in sorted(rows, key=lambda r: (r["heads"], r["distill"])):
            per_step = [r["tokens"] / statistics.fmean(steps) for by_method in r["steps"].values()
                        for steps in by_method.values()]
            print(f"{r['heads']:14}{r['distill']:7g}{r['seed']:5}{r['nats']:8.3f}  "
                  + "".join(f"{x:7.3f}" for x in per_step))
        compared = comparisons(rows, args.seeds, args.distill)
        for c in compared:
            print(f"{c['heads']:12} {c['text']:8} {c['method']:5} distill {c['distill']:g} over "
                  f"{args.distill[0]:g}: {c['ratio']:.3f} [{c['interval'][0]:.3f}, "
                  f"{c['interval'][1]:.3f}], by seed "
                  + ", ".join(f"{x:.3f}" for x in c["by_seed"]))
        if args.out:
            write_whole(args.out, json.dumps(dict(
                command="python experiments/distill.py " + " ".join(argv or sys.argv[1:]),
                environment=environment(pick_device(args.device)), tokens_per_step_ratio=compared,
                rows=rows)) + "\n")


if __name__ == "__main__":
    main()
