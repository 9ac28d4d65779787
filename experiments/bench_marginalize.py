"""What sharing the prefix saves: one look-ahead against reading the whole text again per branch.

    python experiments/bench_marginalize.py --run runs/demo --out bench_marginalize.json

To sum over k tokens in between, the naive way makes k texts, each the context and one more token,
and reads this batch from its start: k * T tokens for one position. marginalize.look_ahead reads
the text once and then one token per branch: T + k. For P positions of one text, the naive way
reads k * t tokens for each position t, the shared prefix T + P * k in all. On busy hardware (a
CPU, or a GPU with large batches) the time follows the number of tokens. The rest is the cost of
the tree mask, and that a few tokens at a time are less efficient than a large batch.

Both ways are compared number by number and then timed in turns. The table shows medians; the last
line is the result as JSON.
"""
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (Parser, Progress, check_output, environment, load_checkpoint, one_line_errors,
                    pick_device, write_whole)
from data.loader import Corpus
from marginalize import MAX_NODES, check_options, marginalize
from model import GPT, GPTConfig, InputError


@torch.no_grad()
def naive(gpt, idx, branches, position):
    """p(x_{t+2} | x_<=t) with `branches` top-k children: one text idx (1, T), position (1, P)
    -> (1, P, V)."""
    found = []
    for t in position[0].tolist():
        text = idx[:, :t + 1]
        probs = gpt.lm_head(gpt.hidden_states(text)[0, -1]).softmax(-1)
        weight, token = probs.topk(branches)  # (k,)
        texts = torch.cat([text.expand(branches, -1), token[:, None]], dim=1)  # (k, t + 2)
        after = gpt.lm_head(gpt.hidden_states(texts)[:, -1]).softmax(-1)  # (k, V)
        found.append(weight @ after)
    return torch.stack(found)[None]


def load(args):
    """-> the GPT of --run, or one with random weights, and a text idx (1, --context - 1)."""
    T = args.context - 1
    torch.manual_seed(0)
    if not args.run:
        gpt = GPT(GPTConfig(block_size=args.context, n_layer=4, n_head=2, n_embd=96))
        return gpt, torch.randint(0, 257, (1, T))
    model, state = load_checkpoint(args.run)
    if "args" not in state:
        raise InputError(f"{args.run} holds a model but not what train.py saves beside it")
    if args.context > model.gpt.config.block_size:
        raise InputError(f"the run has a context of {model.gpt.config.block_size}, "
                         f"not {args.context}")
    return model.gpt, Corpus(state["args"]["data"]).windows("val", 1, T)


def bench(args):
    """Time both ways at each number of positions. -> results"""
    device = pick_device(args.device)
    gpt, idx = load(args)
    T, k = idx.shape[1], args.branches
    check_options(gpt.config, 2, k, "top-k", MAX_NODES)
    gpt, idx, rows = gpt.to(device).eval(), idx.to(device), []
    for P in Progress(args.positions, desc="positions"):
        position = torch.linspace(0 if P > 1 else T - 1, T - 1, P, device=device).long()[None]
        ways = dict(naive=lambda: naive(gpt, idx, k, position),
                    shared=lambda: marginalize(gpt, idx, 2, k, position=position)[0])
        a, b = (way() for way in ways.values())  # the first calls, which are not timed
        seconds = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way().sum().item()  # waits for the device
                seconds[name].append(time.perf_counter() - start)
        rows.append(dict(positions=P, largest_difference=(a - b).abs().max().item(),
                         naive_ms=1e3 * statistics.median(seconds["naive"]),
                         shared_ms=1e3 * statistics.median(seconds["shared"]),
                         speedup=statistics.median(n / s for n, s in zip(*seconds.values()))))
    return dict(environment=environment(device), weights="trained" if args.run else "random",
                parameters=sum(p.numel() for p in gpt.parameters()), context=args.context,
                branches=k, rows=rows)


def main(argv=None):
    """Bad input is one line and status 2."""
    p = Parser(prog="bench_marginalize.py", description="Time marginalisation at horizon 2 "
               "against reading the text again for each branch.")
    p.add_argument("--run", help="a trained run (default: the demo's shape, random weights)")
    p.add_argument("--context", type=int, default=256, help="tokens read, the branch included")
    p.add_argument("--branches", type=int, default=32, help="tokens to sum over")
    p.add_argument("--positions", type=int, nargs="+", default=[1, 32], help="of the text")
    p.add_argument("--rounds", type=int, default=5, help="timed repetitions")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--out", metavar="FILE", help="write the results as JSON")
    args = p.parse_args(argv)
    with one_line_errors("bench_marginalize.py", memory="--context, --branches or --positions"):
        if min(*args.positions, args.branches, args.rounds) < 1 or args.context < 2:
            raise InputError("numbers must be at least 1, and the context at least 2")
        if max(args.positions) >= args.context:
            raise InputError(f"{max(args.positions)} positions do not fit into a text of "
                             f"{args.context - 1} tokens")
        check_output("out", args.out)
        command = ["experiments/bench_marginalize.py", *(argv or sys.argv[1:])]
        results = dict(command=" ".join(command), **bench(args))
        print(f"{'positions':>9}{'naive, ms':>12}{'shared, ms':>12}{'speedup':>10}"
              f"{'largest difference':>21}")
        for r in results["rows"]:
            print(f"{r['positions']:9}{r['naive_ms']:12.1f}{r['shared_ms']:12.1f}"
                  f"{r['speedup']:9.1f}x{r['largest_difference']:21.1e}")
        if args.out:
            write_whole(args.out, json.dumps(results, indent=1) + "\n")
        print(json.dumps(results))


if __name__ == "__main__":
    main()
