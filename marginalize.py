"""Marginalisation: what a next-token model already knows about later tokens.

    python marginalize.py runs/small runs/large --data python    # accuracy at t+1 .. t+4

A GPT predicts the next token and, after each token v that may be next, what follows it. So

    p(x_{t+2} | x_<=t) = sum over v of  p(v | x_<=t) p(x_{t+2} | x_<=t, v)

needs no training (Mehra et al. 2025, section 3). At distance h the sum has V^(h-1) terms, the
branches of a tree. Multi-token heads are measured against it. experiments/layers.py shows what
truncating the sum costs and what each layer knows.
"""
import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from common import (Parser, Progress, check_output, corpus_of, environment, load_model,
                    one_line_errors, pick_device, write_whole)
from model import KVCache, require

MAX_NODES = 1024  # branches in one forward pass


@torch.no_grad()
def marginalize_reference(gpt, idx, horizon, paths=None):
    """The sum as a loop: one text idx (T,) int64 -> p(x_{T+horizon} | x_1..x_T) (V,). Exact.

    Every path through the tokens in between (or each of `paths`) is appended to the text,
    which the model reads again from its start, without a cache."""
    T, total = len(idx), 0
    for path in paths or itertools.product(range(gpt.config.vocab_size), repeat=horizon - 1):
        path = torch.tensor(path, dtype=torch.long, device=idx.device)  # (horizon - 1,)
        probs = gpt(torch.cat([idx, path])[None])[0][0].softmax(-1)  # (T + horizon - 1, V)
        steps = torch.arange(T - 1, T + horizon - 2, device=idx.device)
        total = total + probs[steps, path].prod() * probs[-1]
    return total


# ----------------------------------------------------------------------------------------------
# Choosing branches. The n nodes of one depth have next-token probs (B, P, n, V) and a weight
# (B, P, n) in the sum. A method returns token, parent and weight (B, P, m) of their children.

def top_k_children(probs, weight, k, generator):
    """The k best tokens after each node: k^d branches at depth d. k = V is exact."""
    best, token = probs.topk(k)  # (B, P, n, k)
    return children(token, weight[..., None] * best)


def beam(probs, weight, k, generator):
    """The k most probable paths at each depth."""
    weight, i = (weight[..., None] * probs).flatten(2).topk(k)  # (B, P, k), i < n * V
    return i % probs.shape[-1], i // probs.shape[-1], weight


def sampled_paths(probs, weight, k, generator):
    """k paths sampled from the model: k children of the root, then one of each node."""
    draws = round(weight.flatten()[0].item() * k)
    token = probs.flatten(0, 2).multinomial(draws, replacement=True, generator=generator)
    token = token.view(*probs.shape[:3], draws)  # (B, P, n, draws)
    return children(token, torch.full_like(token, 1 / k, dtype=weight.dtype))


def children(token, weight):
    """k children of each node, (B, P, n, k) -> their token, parent and weight (B, P, n * k)"""
    parent = torch.arange(token.shape[2], device=token.device)[:, None].expand_as(token)
    return token.flatten(2), parent.flatten(2), weight.flatten(2)


METHODS = {"beam": beam, "top-k": top_k_children, "exact": top_k_children,
           "sample": sampled_paths}


# ----------------------------------------------------------------------------------------------
# The look-ahead. Each text is prefilled once. A node then sees the text up to its root's
# position, its ancestors and itself, so branches of many positions share a forward pass.

@torch.no_grad()
def look_ahead(gpt, idx, position, horizon, branches=None, method="top-k", max_nodes=MAX_NODES,
               seed=0):
    """p(x_{t+1} | x_<=t), ..., p(x_{t+horizon} | x_<=t) at positions t (B, P) int64 of texts
    idx (B, T) int64, with k = branches. None, or the method "exact", follows all branches.

    max_nodes: branches in one forward pass, which bounds the memory. Yields slices of the
    positions: (rows, columns, what `expand` returns for them). Raises InputError."""
    T, config = idx.shape[1], gpt.config
    check_options(config, horizon, branches, method, max_nodes)
    check_questions(config, idx, position, horizon)
    gpt.eval()
    k = config.vocab_size if branches is None or method == "exact" else branches
    generator = torch.Generator(idx.device).manual_seed(seed)
    choose = partial(METHODS[method], k=k, generator=generator)
    # A pass holds R texts, p positions of each and `part` nodes of each position. A node attends
    # to the slots of all nodes of its text, so more texts cost less than more nodes.
    per_text = max(k if method == "beam" else 1, min(64, max_nodes))
    R, p = max(1, max_nodes // per_text), max(1, per_text // k)
    part = per_text // p
    slot = torch.arange(T + (horizon - 1) * p * part, device=idx.device)  # (S,)
    text, causal = slot[:T], (slot <= slot[:T, None])[None]  # (T,), (1, T, S)
    for r in range(0, len(idx), R):
        rows = slice(r, r + R)
        cache = KVCache(config.n_layer, config.n_embd, len(idx[rows]), len(slot), idx.device,
                        gpt.lm_head.weight.dtype)
        h = forward_block(gpt, cache, idx[rows], text, text, causal)  # (R, T, C)
        for c in range(0, position.shape[1], p):
            columns = slice(c, c + p)
            yield rows, columns, expand(gpt, cache, h, position[rows, columns], horizon, choose,
                                        part, squares=method == "sample")


def forward_block(gpt, cache, token, position, slots, visible):
    """Tokens (R, N) at `position`, cached in slots (N,) of each text -> hidden states (R, N, C).
    visible (R, N, S) bool: the slots that each token sees."""
    first = cache.slots * torch.arange(len(token), device=token.device)[:, None]
    slots = (first + slots).flatten()
    return gpt.hidden_states(token, position, cache, slots, visible[:, None])


def expand(gpt, cache, h, t, horizon, choose, part, squares):
    """Sum over the branches after positions t (R, P) of prefilled texts with hidden states h
    (R, T, C). -> for each distance 1 .. horizon the branches' sums of weight * p, p being what
    follows a branch, (R, P, V), of weight (R, P) and, with `squares`, of weight * p^2 (R, P, V)

    choose(probs, weight): a method's children; part: nodes of a position in one forward pass."""
    T, slot = h.shape[1], torch.arange(cache.slots, device=t.device)  # (S,)
    sums = [[0, 0, 0] if squares else [0, 0] for _ in range(horizon)]

    def visit(depth, h, weight, visible):
        """Add nodes h (R, P, n, C), weight (R, P, n), visible (R, P, n, S), then visit their
        children, part by part and depth first, which holds few at once."""
        probs = F.softmax(gpt.lm_head(h), -1, dtype=weight.dtype)  # (R, P, n, V)
        sums[depth][0] += (weight[:, :, None] @ probs)[:, :, 0]  # (R, P, V)
        sums[depth][1] += weight.sum(-1)
        if squares:
            sums[depth][2] += (weight[:, :, None] @ probs.square())[:, :, 0]
        if depth + 1 == horizon:
            return
        first = T + depth * (cache.slots - T) // (horizon - 1)  # slot of these children
        for token, parent, weight in zip(*(x.split(part, 2) for x in choose(probs, weight))):
            own = first + slot[:token[0].numel()]  # (P * n,)
            seen = visible.take_along_dim(parent[..., None], 2).flatten(1, 2)
            seen |= slot == own[:, None]  # what its parent sees, and itself: (R, P * n, S)
            position = (t + depth + 1)[..., None].expand_as(token)
            h = forward_block(gpt, cache, token.flatten(1), position.flatten(1), own, seen)
            nodes = token.shape[1:]  # (P, n)
            visit(depth + 1, h.unflatten(1, nodes), weight, seen.unflatten(1, nodes))

    root = h.take_along_dim(t[..., None], 1)[:, :, None]  # (R, P, 1, C)
    weight = torch.ones_like(t, dtype=torch.promote_types(h.dtype, torch.float32))[..., None]
    visit(0, root, weight, (slot <= t[..., None])[:, :, None])
    return sums


def check_options(config, horizon, branches, method, max_nodes):
    """Raise InputError unless a model of this GPTConfig can look ahead in this way."""
    require(horizon > 0, f"the horizon must be at least 1, not {horizon}")
    require(method in METHODS, f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    k, V = 1 if branches is None else branches, config.vocab_size
    require(k is branches or method in ("top-k", "exact"), f"{method} needs a number of branches")
    most = 10**6 if method == "sample" else V
    require(0 < k <= most, f"{k} branches with a vocabulary of {V}: {method} takes 1 to {most}")
    least = k if method == "beam" else 1  # a beam compares all its branches
    require(max_nodes >= least, f"max_nodes must be at least {least}, not {max_nodes}")


def check_questions(config, idx, position, horizon):
    """Raise InputError unless the model can look `horizon` tokens past `position` in idx."""
    require(idx.numel() and position.numel(), "there is no text, or no position in it")
    require(len(idx) == len(position), f"{len(idx)} texts, but positions for {len(position)}")
    V, T, last = config.vocab_size, idx.shape[1], int(position.max())
    require(0 <= idx.min() and idx.max() < V, f"token ids must be in 0..{V - 1}")
    require(0 <= position.min() and last < T, f"positions must be in 0..{T - 1}")
    require(max(T, last + horizon) <= config.block_size, f"{T} tokens and a horizon of {horizon} "
            f"do not fit into a context of {config.block_size}")


# ----------------------------------------------------------------------------------------------
# Its results: exact, truncated, estimated

def marginalize(gpt, idx, horizon, branches=None, method="top-k", position=None,
                max_nodes=MAX_NODES):
    """p(x_{T+horizon} | x_1..x_T): idx (B, T) int64 -> probs (B, V) and captured mass (B,), the
    branches' total probability. With position (B, P) int64, the same after these positions:
    (B, P, V) and (B, P).

    branches=None is exact. If "top-k" children or a "beam" truncate the sum, the exact
    probability is in [probs, probs + 1 - mass]. Raises InputError."""
    return sums_at(gpt, idx, horizon, position, branches, method, max_nodes)[:2]


def estimate(gpt, idx, horizon, samples, position=None, max_nodes=MAX_NODES, seed=0):
    """The same, as an unbiased Monte Carlo estimate: the mean over the ends of sampled paths.
    -> probs and standard error (NaN for one path), each (B, V) or (B, P, V)"""
    probs, _, squares = sums_at(gpt, idx, horizon, position, samples, "sample", max_nodes, seed)
    variance = (squares - probs.square()).clamp(min=0)
    return probs, (variance / (samples - 1)).sqrt()


def sums_at(gpt, idx, horizon, position, *how):
    """What `expand` returns for distance `horizon`, of all positions"""
    t = torch.full_like(idx[:, :1], idx.shape[1] - 1) if position is None else position
    whole = None
    for rows, columns, sums in look_ahead(gpt, idx, t, horizon, *how):
        whole = whole or [x.new_empty(*t.shape, *x.shape[2:]) for x in sums[-1]]
        for x, part in zip(whole, sums[-1]):
            x[rows, columns] = part
    return tuple(x[:, 0] if position is None else x for x in whole)


# ----------------------------------------------------------------------------------------------
# Measuring it on held-out text

READERS = ("model", "marginalisation", "own head", "greedy rollout", "unigram")


def questions(corpus, block_size, horizon, n_windows, n_positions):
    """Held-out windows (W, block_size + 1) without overlap, W <= n_windows, and positions (W, P)
    spread over those in the second half of the context whose next `horizon` tokens are to be
    predicted. Raises InputError if fewer than two windows have enough."""
    half, L = block_size // 2, block_size + 1
    require(n_windows > 1, "--windows must be at least 2")
    require(n_positions > 0, "--positions must be at least 1")
    require(horizon <= half, f"a horizon of {horizon} is too far for a context of {block_size}")
    n_windows = min(n_windows, max(1, len(corpus.val) // L))
    windows = corpus.windows("val", n_windows, L)
    fit = corpus.predicted(windows)[:, 1:].unfold(1, horizon, 1).all(-1)  # [w, t]
    fit[:, :half] = False
    kept = fit.sum(1) >= n_positions
    position = []
    for row in fit[kept]:
        t = row.nonzero()[:, 0]
        position.append(t[torch.linspace(0, len(t) - 1, n_positions).long()])
    require(len(position) > 1, f"only {len(position)} of {n_windows} windows of {L} tokens have "
            f"{n_positions} positions; lower --positions or raise --windows")
    return windows[kept], torch.stack(position)


def unigram(corpus):
    """The frequency of each predicted token in the training split, add-one smoothed -> (V,)"""
    tokens = torch.from_numpy(corpus.train.astype("int64"))
    counts = torch.bincount(tokens[corpus.predicted(tokens)], minlength=corpus.vocab_size) + 1
    return counts / counts.sum()


def score(probs, target):
    """probs (..., V), target (...) -> the target's rank (0: best) and -log p, p normalised"""
    right = probs.gather(-1, target[..., None])  # (..., 1)
    return (probs > right).sum(-1), -(right[..., 0] / probs.sum(-1)).log()


def interval(values):
    """values (W, P) -> mean and half of its normal 95% interval, from independent windows"""
    by_window = values.double().mean(1)
    return by_window.mean().item(), 1.96 * by_window.std().item() / math.sqrt(len(by_window))


def record(rank, nats, **names):
    """A row of a table: names, and the `interval` of top1, top5 and nats, from scores (W, P)"""
    return dict(names, top1=interval(rank < 1), top5=interval(rank < 5), nats=interval(nats))


@torch.no_grad()
def measure(model, windows, position, horizon, unigram, branches, method="beam",
            max_nodes=MAX_NODES, seed=0, progress=True):
    """How well READERS predict x_{t+1} .. x_{t+horizon}: the model (t+1) and its marginalisation,
    its own heads, the model after a greedy rollout, the unigram (V,).

    windows, position: from `questions`. Returns a `record` for each distance and reader, with the
    captured mass of a truncated sum and the others' top1_gain over marginalisation."""
    gpt, (W, P) = model.eval().gpt, position.shape
    idx = windows[:, :int(position.max()) + 1]
    scores = {}  # (distance, reader): rank, nats, mass (3, W, P)

    def keep(reader, d, rows, columns, probs, mass=torch.ones(())):
        target = windows[rows].gather(1, position[rows, columns] + d)
        found = scores.setdefault((d, reader), torch.zeros(3, W, P))
        for i, values in enumerate((*score(probs, target), mass)):
            found[i, rows, columns] = values.float().cpu()

    with Progress(None, progress, total=2 * W * P, desc="look ahead", unit="position") as bar:
        for reader, *how in (("marginalisation", branches, method), ("greedy rollout", 1, "beam")):
            found = look_ahead(gpt, idx, position, horizon, *how, max_nodes, seed)
            for rows, columns, sums in found:
                for d, (probs, mass, *_) in enumerate(sums, 1):
                    keep(reader if d > 1 else "model", d, rows, columns, probs, mass)
                bar.update(mass.numel())
    for w in range(W):  # logits of whole windows are large
        rows, columns = slice(w, w + 1), slice(None)
        h = model.hidden_states(idx[rows])  # (1, T, ...)
        for d in range(1, horizon + 1):
            keep("unigram", d, rows, columns, unigram.expand(1, P, -1))
            if d in model.offsets[1:]:
                after = windows[rows, 1:idx.shape[1] + 1]  # what conditional heads read
                logits = model.offset_logits(h, d, after)[:, position[w]]
                keep("own head", d, rows, columns, logits.softmax(-1))
    records = []
    for d, reader in itertools.product(range(1, horizon + 1), READERS):
        if (d, reader) in scores:
            rank, nats, mass = scores[d, reader]
            records.append(record(rank, nats, distance=d, reader=reader))
            if reader == "marginalisation" and method != "sample":
                records[-1]["mass"] = interval(mass)
            elif reader != "marginalisation" and d > 1:  # position by position: less noise
                best = scores[d, "marginalisation"][0] < 1
                records[-1]["top1_gain"] = interval((rank < 1).float() - best.float())
    return records


# ----------------------------------------------------------------------------------------------
# The command line

def load_run(run, args):
    """-> (model, corpus, training step or None, windows, position). Raises InputError and
    CorpusError if the run cannot be measured with these options."""
    model, state = load_model(run)
    finite = all(p.isfinite().all() for p in model.parameters())
    require(finite, f"{run} has weights that are not finite")
    require(0 <= args.seed < 2**63, "--seed must be at least 0 and below 2^63")
    corpus, config = corpus_of(run, model, state, args.data), model.gpt.config
    check_options(config, args.horizon, args.branches, args.method, args.max_nodes)
    windows, position = questions(corpus, config.block_size, args.horizon, args.windows,
                                  args.positions)
    k, depth = args.branches or config.vocab_size, args.horizon - 1
    nodes = position.numel() * (k * depth if args.method in ("beam", "sample") else k ** depth)
    require(nodes <= 10**10, f"{args.method} would follow {nodes:.0e} branches; lower --horizon, "
            "--branches, --windows or --positions, or use --method beam")
    return model, corpus, state.get("step"), windows, position


def report(args, run, model, corpus, step, windows, position):
    """Measure what load_run returned and print the table. -> the results of the run"""
    device, n = pick_device(args.device), sum(p.numel() for p in model.gpt.parameters())
    model, windows, position = model.to(device), windows.to(device), position.to(device)
    print(f"\n{run}: {n / 1e6:.2f}M parameters, offsets {model.offsets}; {corpus.folder.name}, "
          f"{len(windows)} windows x {position.shape[1]} positions; {args.method}, "
          f"{args.branches or 'all'} branches, on {device}")
    table = measure(model, windows, position, args.horizon, unigram(corpus).to(device),
                    args.branches, args.method, args.max_nodes, args.seed)
    print(f"\n{'':5}{'reader':17}{'top-1, %':>13}{'over marg.':>15}{'top-5, %':>15}{'nats':>15}"
          f"{'captured, %':>15}")
    for r in table:
        nats = f"{r['nats'][0]:8.3f} ±{r['nats'][1]:.3f}"
        print(f"t+{r['distance']:<3}{r['reader']:17}" + show(r["top1"])
              + show(r.get("top1_gain"), "+") + show(r["top5"]) + nats + show(r.get("mass")))
    name = Path(run).parent.name if Path(run).is_file() else Path(run).name
    return dict(run=run, name=name, parameters=n, steps=step, data=corpus.folder.name,
                data_sha256=corpus.meta.get("val_sha256"), offsets=model.offsets,
                windows=len(windows), positions=position.shape[1], table=table)


def show(value, sign=""):
    """(mean, half) -> "mean ±half" in percent"""
    return f"{100 * value[0]:{sign}9.1f} ±{100 * value[1]:4.1f}" if value else " " * 15


def main(argv=None):
    """Measure every run. Bad input is one line and status 2."""
    p = Parser(prog="marginalize.py", description="Measure on held-out text what a next-token "
               "model knows about later tokens.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run of train.py, or GPT-2 weights")
    p.add_argument("--data", metavar="NAME", help="corpus (default: the one trained on)")
    p.add_argument("--horizon", type=int, default=4, help="tokens ahead")
    p.add_argument("--method", default="beam", choices=METHODS, help="which branches to follow")
    p.add_argument("--branches", type=int, default=32, help="k of the method")
    p.add_argument("--windows", type=int, default=256, help="held-out windows, dozens at least")
    p.add_argument("--positions", type=int, default=16, help="positions in each window")
    p.add_argument("--max-nodes", type=int, default=MAX_NODES, help="branches in a forward pass")
    p.add_argument("--seed", type=int, default=0, help="of sampled paths")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--out", metavar="FILE", help="write the results as JSON")
    args = p.parse_args(argv)
    if args.method == "exact":
        args.branches = None
    with one_line_errors("marginalize.py", memory="--max-nodes"):
        check_output("out", args.out)
        results = dict(command=" ".join(["marginalize.py", *(argv or sys.argv[1:])]),
                       environment=environment(pick_device(args.device)), horizon=args.horizon,
                       method=args.method, branches=args.branches)
        loaded = [(run, *load_run(run, args)) for run in args.runs]  # all errors come first
        results["runs"] = [report(args, *found) for found in loaded]
        if args.out:
            write_whole(args.out, json.dumps(results, indent=1) + "\n")
            print(f"\nwritten to {args.out}")


if __name__ == "__main__":
    main()
