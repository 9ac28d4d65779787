"""What sharing the prefix saves when marginalising: one look ahead against reading the whole text again per branch.

    python experiments/bench_marginalize.py --run runs/demo --out experiments/results/bench_marginalize_cpu.json

To sum over k tokens in between, the naive way makes k texts, each the context and one more token, and reads them all,
as a batch, from their starts: k * T tokens to forward for one position. marginalize.look_ahead reads the text once and
then one token for each branch: T + k. If P positions of one text are asked about, the naive way reads k * t for each
position t, and the shared prefix T + P * k altogether. On hardware that is busy (a CPU, or a GPU with large batches),
time follows the number of tokens; what the mask of a tree costs, and that a few tokens at a time are less efficient
than a large batch, is the rest.

Both ways are compared number by number, then take turns; medians and the ratio are shown, and one line of JSON at the
end.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Progress, check_output, environment, load_checkpoint, one_line_errors, pick_device, write_whole
from data.loader import Corpus
from marginalize import MAX_NODES, check_options, marginalize
from model import GPT, GPTConfig, InputError


@torch.no_grad()
def naive(gpt, idx, branches, position):
    """p(x_{t+2} | x_<=t), truncated to `branches`, of one text idx (1, T) at position (1, P) -> (1, P, V)."""
    found = []
    for t in position[0].tolist():
        text = idx[:, :t + 1]
        weight, token = gpt.lm_head(gpt.hidden_states(text)[0, -1]).softmax(-1).topk(branches)    # (k,)
        texts = torch.cat([text.expand(branches, -1), token[:, None]], dim=1)   # (k, t + 2)
        after = gpt.lm_head(gpt.hidden_states(texts)[:, -1]).softmax(-1)    # (k, V): logits of the last tokens only
        found.append(weight @ after)
    return torch.stack(found)[None]


def parse_args():
    """The command line as a namespace."""
    p = argparse.ArgumentParser(prog="bench_marginalize.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                description="Time marginalisation at horizon 2 against re-reading the text per branch.")
    p.add_argument("--run", help="a trained run (default: the demo's shape with random weights)")
    p.add_argument("--context", type=int, default=256, help="tokens that are read, the branch included")
    p.add_argument("--branches", type=int, default=32, help="tokens to sum over")
    p.add_argument("--positions", type=int, nargs="+", default=[1, 32], help="how many positions of the text to ask at")
    p.add_argument("--rounds", type=int, default=5, help="timed repetitions; medians are shown")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--out", metavar="FILE", help="write the results as JSON")
    p.error = lambda message: p.exit(2, f"bench_marginalize.py: error: {message}\n")
    return p.parse_args()


def bench(args):
    """-> results"""
    device, T = pick_device(args.device), args.context - 1
    torch.manual_seed(0)
    if args.run:
        model, state = load_checkpoint(args.run)
        if "args" not in state:
            raise InputError(f"{args.run} holds a model but not what train.py saves beside it")
        gpt, idx = model.gpt, Corpus(state["args"]["data"]).windows("val", 1, T)
    else:
        gpt = GPT(GPTConfig(block_size=args.context, n_layer=4, n_head=2, n_embd=96))
        idx = torch.randint(0, 257, (1, T))
    if args.context > gpt.config.block_size:
        raise InputError(f"the run has a context of {gpt.config.block_size}, not {args.context}")
    check_options(gpt.config, 2, args.branches, "top-k", MAX_NODES)
    gpt, idx, rows = gpt.to(device).eval(), idx.to(device), []
    for P in Progress(args.positions, desc="positions"):
        position = torch.linspace(0 if P > 1 else T - 1, T - 1, P, device=device).long()[None]
        ways = dict(naive=lambda: naive(gpt, idx, args.branches, position),
                    shared=lambda: marginalize(gpt, idx, 2, args.branches, position=position)[0])
        a, b = (way() for way in ways.values())                             # not timed: first use of everything
        seconds = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way().sum().item()                                          # waits for the device
                seconds[name].append(time.perf_counter() - start)
        rows.append(dict(positions=P, largest_difference=(a - b).abs().max().item(),
                         **{f"{name}_ms": 1e3 * statistics.median(s) for name, s in seconds.items()},
                         speedup=statistics.median(n / s for n, s in zip(*seconds.values()))))
    return dict(command=" ".join(sys.argv), environment=environment(device),
                weights="trained" if args.run else "random", parameters=sum(p.numel() for p in gpt.parameters()),
                context=args.context, branches=args.branches, rows=rows)


def main():
    """Bad input is one line and status 2."""
    args = parse_args()
    with one_line_errors("bench_marginalize.py", memory="--context, --branches or --positions"):
        if min(*args.positions, args.branches, args.rounds) < 1 or args.context < 2:
            raise InputError("numbers must be at least 1, and the context at least 2")
        if max(args.positions) >= args.context:
            raise InputError(f"{max(args.positions)} positions do not fit into a text of {args.context - 1} tokens")
        check_output("out", args.out)
        results = bench(args)
        print(f"{'positions':>9}{'naive, ms':>12}{'shared, ms':>12}{'speedup':>10}{'largest difference':>21}")
        for r in results["rows"]:
            print(f"{r['positions']:9}{r['naive_ms']:12.1f}{r['shared_ms']:12.1f}{r['speedup']:9.1f}x"
                  f"{r['largest_difference']:21.1e}")
        if args.out:
            write_whole(args.out, json.dumps(results, indent=1) + "\n")
        print(json.dumps(results))


if __name__ == "__main__":
    main()
