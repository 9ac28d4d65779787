"""Find the tree of drafts that decodes fastest: for this model, on this machine.

    python experiments/calibrate.py runs/demo               # saves runs/demo/tree.json
    python experiments/calibrate.py runs/demo --nodes 15    # the best tree of 15 drafts

Several drafts for one position (the second best of a head, or the best of another head) make a
tree. Which drafts are worth their cost depends on the model and on the machine, so this script
measures both. Teacher forcing on held-out text shows at every position which drafts are right.
The tree then grows node by node, each time by the draft that is accepted most often where nothing
is accepted yet (Medusa, arXiv 2401.10774). Finally, blocks of growing size are timed. The tree
with the most tokens per step, relative to the cost of its step, is kept for decode.py. It may be
a chain, or the empty tree, which is NTP. With a large vocabulary it is also tried whether drafts
from the most frequent tokens alone pay: they are cheaper, and a little fewer are right."""
import json
import os
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (Parser, Progress, corpus_of, environment, load_model, one_line_errors,
                    pick_device, write_whole)
from decode import Decoder, Node, can_compile, clock, depths, exact_kernels, ready
from marginalize import unigram
from model import InputError

VOCABS = (32768, 16384, 8192, 4096)  # numbers of tokens to draft among that are timed
BLOCKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64)  # sizes that are timed


# ----------------------------------------------------------------------------------------------
# What held-out text would accept

def expected_tokens_per_step(acceptance):
    """E = 1 + sum over m of a_2 * ... * a_(m+1), where a_j is the probability that the draft at
    distance j is right given that all nearer ones are; acceptance: a_2, a_3, ... (L-MTP, expected
    length)."""
    expected = reached = 1.0
    for a in acceptance:
        reached *= a
        expected += reached
    return expected


@torch.no_grad()
def draft_hits(model, windows, sources, ranks=1):
    """Which drafts are right on real text, by teacher forcing.

    windows (B, T + 1) int64; sources: (offset o, look-back b) pairs. -> {(o, b, r): bool (B, n)}:
    at each of n positions t, whether the r-th best token that offset o drafts at t - b, for
    position t + o - b, is right. Raises InputError if the windows are too short."""
    # From `first` on all sources exist, and before `end` all targets: t is in first..end - 1.
    first = max((b for _, b in sources), default=0)
    end = windows.shape[1] - max((o - b for o, b in sources), default=1)
    if end <= first:
        raise InputError(f"windows of {windows.shape[1]} tokens are too short for the sources "
                         f"{sources}")
    windows = windows.to(model.gpt.lm_head.weight.device)
    best = {o: [] for o, _ in sources}
    for part in windows.split(4):  # logits are large: a few rows at a time
        h = model.hidden_states(part[:, :-1])
        for o in best:
            logits = model.offset_logits(h, o, next_tokens=part[:, 1:])
            best[o].append(logits.topk(ranks).indices)
    best = {o: torch.cat(parts) for o, parts in best.items()}  # (B, T, ranks); [:, t] is for t + o
    hits = {}
    for o, b in sources:
        target = windows[:, first + o - b:end + o - b, None]  # (B, n, 1)
        right = (best[o][:, first - b:end - b] == target).cpu()  # (B, n, ranks)
        hits |= {(o, b, r): right[:, :, r] for r in range(ranks)}
    return hits


def hits_within(vocab, windows, hits):
    """Which of draft_hits(...) are left to heads that draft among the tokens `vocab`: those whose
    token is one of them. (Where a better token is none of them a few more would be right.)"""
    inside, first = torch.isin(windows, torch.tensor(vocab)), max(b for _, b, _ in hits)
    return {(o, b, r): hit & inside[:, first + o - b:][:, :hit.shape[1]]
            for (o, b, r), hit in hits.items()}


def accepted_depths(tree, hits):
    """How many drafts of a tree each position would accept: hits as from draft_hits -> (B, n)
    int64."""
    alive, depth, accepted = [torch.tensor(True)], depths(tree), torch.tensor(0)
    for i, (parent, *source) in enumerate(tree, 1):
        alive.append(alive[parent] & hits[tuple(source)])  # (B, n)
        accepted = torch.maximum(accepted, alive[i] * depth[i])
    return accepted


def simulate_steps(accepted):
    """Simulate a decoder that follows the text: accepted (B, n), as from accepted_depths -> the
    number of accepted drafts in each of its steps."""
    steps = []
    for row in accepted.tolist():
        t = 0
        while t < len(row):
            steps.append(row[t])
            t += row[t] + 1
    return steps


# ----------------------------------------------------------------------------------------------
# The tree

def grow_tree(hits, size):
    """Grow a tree of up to `size` nodes, each time by the node that accepts most. Its first k
    nodes are therefore the tree of k. hits as from draft_hits.

    The gain of a node is counted, not multiplied from accuracies: drafts at different distances
    are not independent, and two sources often draft the same token."""
    by_distance = {}
    for source in hits:
        by_distance.setdefault(source[0] - source[1], []).append(source)
    matrix = {j: torch.stack([hits[source].flatten() for source in sources]).float()
              for j, sources in by_distance.items()}
    # Positions where node i is accepted and none of its children is:
    free = [torch.ones(next(iter(matrix.values())).shape[1])] if hits else []
    tree, depth, gains = [], [0], []
    while len(tree) < size:
        for i in range(len(gains), len(free)):  # what each child of node i would gain
            j = depth[i] + 2
            gains.append(matrix[j] @ free[i] if j in matrix else torch.zeros(1))
        parent = max(range(len(gains)), key=lambda i: gains[i].max().item(), default=None)
        if parent is None or gains[parent].max() == 0:
            break
        j, best = depth[parent] + 2, int(gains[parent].argmax())
        tree.append(Node(parent, *by_distance[j][best]))
        depth.append(depth[parent] + 1)
        free.append(free[parent] * matrix[j][best])
        free[parent] = free[parent] * (1 - matrix[j][best])
        gains[parent] = matrix[j] @ free[parent]
    return tuple(tree)


def timed(f, device, n=1):
    """Seconds per call of f(), the mean of n calls. On CUDA events measure it, without waits
    between the calls."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(n):
                f()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / n
    start = clock(device)
    for _ in range(n):
        f()
    return (clock(device) - start) / n


@torch.no_grad()
def step_latencies(decoders, batch_size=1, rounds=9, seconds=0.05):
    """Seconds per step of each decoder, half-way through its context: medians over the rounds, in
    which the decoders take turns."""
    steps, counts = [], []
    with exact_kernels(decoders[0].device):
        for decoder in decoders:
            s, step = decoder.state(batch_size)
            s.position.fill_(decoder.max_length // 2)
            s.limit.copy_(s.position)  # a finished row stays, and still works
            step()
            steps.append(step)
            counts.append(1 + int(seconds / timed(step, decoder.device, 8)))
        found = [[timed(step, d.device, n) for d, step, n in zip(decoders, steps, counts)]
                 for _ in range(rounds)]
    return [statistics.median(f) for f in zip(*found)]


def calibrate(model, windows, nodes=None, batch_size=1, dtype=None, compile=False, ranks=8,
              max_length=None, progress=True, frequent=()):
    """The best tree of drafts for this model on this machine, from held-out windows (B, T + 1)
    int64. frequent: all tokens, the most frequent first.

    With `nodes`, it is the tree of that many nodes that accepts most. Otherwise it is the one that
    is expected to emit most tokens per second: growing blocks are timed against NTP until even
    the tokens of the largest tree could not pay for the block. Costs are those of greedy steps;
    sampling adds a little per draft. -> dict(tree, draft_vocab, table: a list of dict(block,
    tokens_per_step, cost, seconds_per_step, speedup, vocab), accuracy: {"offset o, look-back b":
    [fraction right of rank 0, 1, ...]})"""
    distances = range(2, model.offsets[-1] + 1)
    sources = [(o, o - j) for j in distances for o in model.offsets if o >= j]
    hits = draft_hits(model, windows, sources, min(ranks, model.gpt.config.vocab_size))
    tree = grow_tree(hits, BLOCKS[-1] - 1 if nodes is None else nodes)
    accuracy = {}
    for (o, b, _), hit in hits.items():  # in order of rank
        accuracy.setdefault(f"offset {o}, look-back {b}", []).append(hit.float().mean().item())

    def tokens_per_step(tree, hits=hits):
        return 1 + statistics.fmean(simulate_steps(accepted_depths(tree, hits))) if tree else 1.0
    if nodes is not None:
        table = [dict(block=1 + len(tree), tokens_per_step=tokens_per_step(tree))]
        return dict(tree=tree, draft_vocab=None, table=table, accuracy=accuracy)
    model, table, how = ready(model, dtype), [], dict(compile=compile, max_length=max_length)
    ntp = Decoder(model, tree=(), **how)

    def measure(tree, per_step, vocab=None):
        decoder = Decoder(model, tree=tree, draft_vocab=vocab, **how) if tree else ntp
        base, seconds = step_latencies([ntp, decoder], batch_size)
        cost = seconds / base
        table.append(dict(block=1 + len(tree), tokens_per_step=per_step, cost=cost,
                          seconds_per_step=seconds, speedup=per_step / cost,
                          vocab=vocab and len(vocab)))
        return cost
    blocks = [b for b in BLOCKS if b <= 1 + len(tree)]
    for block in Progress(blocks, progress, desc="calibrate", unit="block"):
        cost = measure(tree[:block - 1], tokens_per_step(tree[:block - 1]))
        if tokens_per_step(tree) / cost < max(row["speedup"] for row in table):
            break
    tree = tree[:max(table, key=lambda row: row["speedup"])["block"] - 1]
    for vocab in [frequent[:K] for K in VOCABS if tree and K < len(frequent)]:
        measure(tree, tokens_per_step(tree, hits_within(vocab, windows, hits)), vocab)
    K = max(table, key=lambda row: row["speedup"])["vocab"]
    return dict(tree=tree, draft_vocab=K and frequent[:K], table=table, accuracy=accuracy)


def print_calibration(found):
    """Print what `calibrate` returned."""
    best = 1 + len(found["tree"]), found["draft_vocab"] and len(found["draft_vocab"])
    print("fraction of the drafts of rank 1, 2, ... that are right on held-out text")
    for source, ranks in found["accuracy"].items():
        print(f"{source:24}" + " ".join(f"{fraction:4.0%}" for fraction in ranks))
    print(f"{'block':>5}{'tokens/step':>13}{'cost':>7}{'ms/step':>9}{'speedup':>9}")
    for r in found["table"]:
        line = f"{r['block']:5}{r['tokens_per_step']:13.2f}"
        if "cost" in r:  # else nothing was timed
            line += f"{r['cost']:7.2f}{1e3 * r['seconds_per_step']:9.2f}{r['speedup']:8.2f}x"
        if r.get("vocab"):
            line += f"  drafting among {r['vocab']:,} tokens"
        print(line + "   <- chosen" * ((r["block"], r.get("vocab")) == best))
    for i, (node, d) in enumerate(zip(found["tree"], depths(found["tree"])[1:]), 1):
        print(f"node {i:2} after {node.parent:2}, distance {d + 1}: offset {node.offset}, "
              f"look-back {node.look_back}, rank {node.rank + 1}")


def main(argv=None):
    """Calibrate a run and save its tree. Bad input is one line and status 2."""
    p = Parser(prog="calibrate.py", description="Find the tree of drafts that decodes fastest on "
               "this machine, from held-out text and timed steps, and save it as tree.json in the "
               "run's folder.")
    p.add_argument("run", metavar="RUN", help="a run folder made by train.py")
    p.add_argument("--nodes", type=int, help="the best tree of this many drafts, whatever they "
                   "cost")
    p.add_argument("--data", help="corpus; default: the one trained on")
    p.add_argument("--batch-size", type=int, default=1, help="texts to be decoded at once")
    p.add_argument("--compile", default="auto", choices=["auto", "no"],
                   help="torch.compile the steps")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = p.parse_args(argv)
    with one_line_errors("calibrate.py", memory="--batch-size"):
        if args.batch_size < 1 or args.nodes is not None and args.nodes < 1:
            raise InputError("--nodes and --batch-size must be at least 1")
        model, state = load_model(args.run)
        corpus, device = corpus_of(args.run, model, state, args.data), pick_device(args.device)
        compile = args.compile == "auto" and can_compile(device)
        # The other windows are those that decode.py reports on.
        windows = corpus.windows("val", 64, model.gpt.config.block_size + 1)[1::2]
        found = calibrate(model.to(device), windows, args.nodes, args.batch_size,
                          getattr(torch, args.dtype), compile,
                          frequent=unigram(corpus).argsort(descending=True, stable=True).tolist())
        print_calibration(found)
        found.update(environment=environment(device), batch_size=args.batch_size, dtype=args.dtype,
                     compiled=compile)
        path = (Path(args.run) if os.path.isdir(args.run) else Path(args.run).parent) / "tree.json"
        write_whole(path, json.dumps(found, indent=1) + "\n")
        print(f"saved as {path}; next: python decode.py {args.run}")


if __name__ == "__main__":
    main()
