"""Marginalisation: what a next-token model already knows about later tokens.

    python marginalize.py runs/small runs/large --data data/python    # accuracy at t+1 .. t+4

A GPT predicts the next token and, after each token v that may be next, what follows it. So

    p(x_{t+2} | x_<=t) = sum over v of  p(v | x_<=t) p(x_{t+2} | x_<=t, v)

needs no training (Mehra et al. 2025, section 3). At distance h the sum has V^(h-1) terms, the
branches of a tree. A beam of the k most probable branches truncates it, and k = V^(h-1) is exact.
Multi-token heads are measured against it.
"""
import itertools
import math

import data  # before PyTorch: Ctrl-C is one line from here on
import torch

from common import (Parser, check_output, corpus_of, environment, load_model,
                    one_line_errors, pick_device, progress_bar, write_results)
from data.prepare import require
from model import empty_cache


@torch.no_grad()
def marginalize_reference(gpt, idx, horizon, paths=None):
    """The sum as a loop: one text idx (T,) int64 -> p(x_{T+horizon} | x_1..x_T) (V,). Exact.

    Every path through the tokens in between (or each of `paths`) is appended to the text, which
    the model reads again from its start, without a cache."""
    T = len(idx)
    total = 0
    for path in paths or itertools.product(range(gpt.config.vocab_size), repeat=horizon - 1):
        path = idx.new_tensor(path)  # (horizon - 1,)
        probs = gpt(torch.cat([idx, path])[None])[0].softmax(-1)  # (T + horizon - 1, V)
        weight = probs[T - 1:-1].gather(1, path[:, None]).prod()  # p(path | idx)
        total += weight * probs[-1]
    return total


# ---- The look-ahead --------------------------------------------------------------------------
# Each text is prefilled once. A branch then sees the text up to its root's position, its ancestors
# and itself, so branches of many positions share a forward pass.

@torch.no_grad()
def look_ahead(gpt, idx, position, horizon, branches):
    """Follow the `branches` most probable paths after some positions of texts.

    idx (B, T) int64, position (B, P) int64. Yields for each distance 1 .. horizon the probabilities
    p(x_{t+distance} | x_<=t) (B, P, V), summed over the branches, and the captured mass (B, P),
    which is the branches' total probability. The exact ones are in [probs, probs + 1 - mass].
    Raises InputError if the context is too short."""
    config = gpt.config
    B, T = idx.shape
    P = position.shape[1]
    V = config.vocab_size
    require(horizon > 0 and branches > 0, "the horizon and the branches must be at least 1")
    require(max(T, int(position.max()) + horizon) <= config.block_size, f"{T} tokens and a horizon "
            f"of {horizon} do not fit into a context of {config.block_size}")
    width = [min(branches, V ** depth) for depth in range(1, horizon)]
    S = T + P * sum(width)
    slot = torch.arange(S, device=idx.device)
    text, *levels = slot.split([T, *(P * n for n in width)])  # of the text, of each depth
    cache = empty_cache(config, config.n_layer, B, S, gpt.lm_head.weight.dtype, idx.device)

    def forward(tokens, at, own, visible):
        """Tokens (B, N) that stand `at` (B, N), cached in the slots own (N,), each of which sees
        the slots in visible (B, N, S) bool -> hidden states (B, N, C)"""
        row = S * torch.arange(B, device=idx.device)[:, None]
        slots = (row + own).flatten()
        return gpt.hidden_states(tokens, at, cache, slots, visible[:, None])

    causal = slot <= text[:, None]  # (T, S)
    h = forward(idx, text.expand(B, T), text, causal.expand(B, T, S))
    h = h.take_along_dim(position[..., None], 1)[:, :, None]  # (B, P, 1, C): the roots
    seen = (slot <= position[..., None])[:, :, None]  # (B, P, 1, S)
    weight = torch.ones_like(h[..., 0])  # (B, P, 1): a branch's probability
    for distance in range(1, horizon + 1):
        probs = gpt.lm_head(h).softmax(-1)  # (B, P, n, V)
        total = weight[:, :, None] @ probs  # (B, P, 1, V)
        yield total[:, :, 0], weight.sum(-1)
        if distance == horizon:
            return
        n = width[distance - 1]
        joint = (weight[..., None] * probs).flatten(2)  # (B, P, parents * V)
        weight, i = joint.topk(n)  # (B, P, n)
        token = i % V
        parent = i // V
        own = levels[distance - 1].view(P, n, 1)
        seen = seen.take_along_dim(parent[..., None], 2)  # what its parent sees,
        seen = seen | (slot == own)  # and itself: (B, P, n, S)
        at = (position + distance).repeat_interleave(n, dim=1)
        h = forward(token.flatten(1), at, own.flatten(), seen.flatten(1, 2))
        h = h.unflatten(1, (P, n))  # (B, P, n, C)


def marginalize(gpt, idx, horizon, branches):
    """p(x_{T+horizon} | x_1..x_T): idx (B, T) int64 -> probs (B, V) and captured mass (B,). Exact
    if branches >= V^(horizon-1). Raises InputError as look_ahead does."""
    last = torch.full_like(idx[:, :1], idx.shape[1] - 1)
    *_, (probs, mass) = look_ahead(gpt, idx, last, horizon, branches)
    return probs[:, 0], mass[:, 0]


# ---- Measuring it on held-out text -----------------------------------------------------------

def evaluation_positions(corpus, block_size, horizon, n_windows, n_positions):
    """Held-out windows (W, block_size + 1) without overlap, W <= n_windows, and positions (W, P)
    spread over the second half of the context. Raises InputError if there is too little text."""
    half = block_size // 2
    require(horizon <= half, f"a context of {block_size} takes a horizon of 1 to {half}")
    n_windows = min(n_windows, len(corpus.val) // (block_size + 1))
    require(n_windows > 1, f"an interval needs two windows of {block_size + 1} tokens; raise "
            f"--windows, or give a corpus with more than {len(corpus.val)} held-out tokens")
    windows = corpus.windows("val", n_windows, block_size + 1)
    position = torch.linspace(half, block_size - horizon, n_positions).long()
    return windows, position.expand(n_windows, -1)


def score(probs, target):
    """probs (..., V), target (...) -> whether the target is the most probable token; and its -log
    p, where p is divided by what the beam captured"""
    p = probs.gather(-1, target[..., None])[..., 0]
    return p == probs.amax(-1), -(p / probs.sum(-1)).log()


def interval(values):
    """values (W, P) -> mean and half of its normal 95% interval, from independent windows"""
    by_window = values.double().mean(1)
    error = by_window.std().item() / math.sqrt(len(by_window))
    return by_window.mean().item(), 1.96 * error


@torch.no_grad()
def predictions(model, windows, position, horizon, branches):
    """What the model (t+1), its marginalisation (if branches is 1, a greedy rollout) and its own
    heads predict for x_{t+1} .. x_{t+horizon}, t in position (B, P) of windows (B, T + 1). Yields
    distance, predictor, probs (B, P, V), mass (B, P)"""
    idx = windows[:, :-1]
    for distance, found in enumerate(look_ahead(model.gpt, idx, position, horizon, branches), 1):
        yield distance, "marginalisation" if distance > 1 else "model", *found
    h = model.hidden_states(idx)
    for offset in model.offsets[1:]:
        if offset <= horizon:
            previous = windows.roll(1 - offset, dims=1)[:, :-1]  # what sequential heads read
            logits = model.offset_logits(h, offset, previous)
            probs = logits.take_along_dim(position[..., None], 1).softmax(-1)
            yield offset, "own head", probs, torch.ones_like(probs[..., 0])


def measure(model, windows, position, horizon, branches, progress=True):
    """How good the `predictions` are: windows and position from evaluation_positions -> a record
    for each distance and predictor, with the `interval` of top1, nats, mass (the captured mass)
    and top1_gain, over marginalisation position by position."""
    scores = {}  # {(distance, predictor): a tensor (3, 1, P) of each window}
    model.eval()
    one_by_one = list(zip(windows.split(1), position.split(1)))  # each has many branches
    for text, t in progress_bar(one_by_one, progress, desc="look ahead", unit="window"):
        for distance, name, probs, mass in predictions(model, text, t, horizon, branches):
            right, nats = score(probs, text.gather(1, t + distance))
            of_window = torch.stack([right, nats, mass]).cpu()
            scores.setdefault((distance, name), []).append(of_window)
    records = []
    baseline = {}  # {distance: what the model or its marginalisation got right}
    for (distance, name), found in sorted(scores.items()):  # by name, own heads come last
        right, nats, mass = torch.cat(found, dim=1)  # (W, P) each
        baseline.setdefault(distance, right)
        records.append(dict(
            distance=distance,
            predictor=name,
            top1=interval(right),
            top1_gain=interval(right - baseline[distance]),
            nats=interval(nats),
            mass=interval(mass)))
    return records


# ---- The command line ------------------------------------------------------------------------

def print_table(records):
    """Print what `measure` returned."""
    print("     predictor                 top-1      over marg.           nats        captured")
    row = ("t+{distance:<3}{predictor:16}{top1[0]:9.1%} ±{top1[1]:5.1%}{top1_gain[0]:9.1%} "
           "±{top1_gain[1]:5.1%}{nats[0]:9.3f} ±{nats[1]:.3f}{mass[0]:9.1%} ±{mass[1]:5.1%}")
    for r in records:
        print(row.format(**r))


def main(argv=None):
    """Measure every run. Bad input is one line and status 2."""
    p = Parser(prog="marginalize.py", description="Measure on held-out text what a next-token "
               "model knows about later tokens.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="a run of train.py, or GPT-2 weights")
    p.option("data", None, "corpus; default: the one trained on")
    p.option("horizon", 4, "tokens ahead", least=1)
    p.option("branches", 32, "of the beam; V^(horizon-1): exact; 1: greedy rollout", least=1)
    p.option("windows", 256, "held-out windows, dozens at least")
    p.option("positions", 16, "positions in each window", least=1)
    p.option("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    p.option("out", None, "write the results as JSON, after every run", metavar="FILE")
    args = p.parse_args(argv)
    with one_line_errors("marginalize.py"):
        check_output(args.out)
        device = pick_device(args.device)
        loaded = []
        for run in args.runs:  # all errors come before the work
            model, state = load_model(run)
            corpus = corpus_of(run, model, state, args.data)
            windows, position = evaluation_positions(
                corpus, model.gpt.config.block_size, args.horizon, args.windows, args.positions)
            loaded.append((run, model, corpus, windows, position))
        results = dict(environment=environment(device), args=vars(args), runs={})
        for run, model, corpus, windows, position in loaded:
            print(f"\n{run}: offsets {model.offsets}; {corpus.folder.name}, {len(windows)} windows "
                  f"x {args.positions} positions; a beam of {args.branches}")
            records = measure(
                model.to(device),
                windows.to(device),
                position.to(device),
                args.horizon,
                args.branches)
            print_table(records)
            results["runs"][run] = records
            write_results(args.out, results)


if __name__ == "__main__":
    main()
