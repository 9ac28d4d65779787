"""Marginalisation: what a next-token model already knows about the tokens after next.

    python marginalize.py runs/demo                               # how well it foresees t+1 .. t+4 of held-out text
    python marginalize.py runs/demo --layers --out result.json    # and what each layer knows; with a figure beside it
    python marginalize.py runs/small runs/large --data python     # a ladder of models on one corpus
    python marginalize.py gpt2 --data python-gpt2                 # GPT-2's weights

A GPT is only ever asked for p(x_{t+1} | x_<=t). But whatever the next token will be, it also has an opinion on what
follows it. Summing over the tokens in between therefore gives, without any training (Mehra et al. 2025, section 3),

    p(x_{t+2} | x_<=t) = sum over v of  p(v | x_<=t) p(x_{t+2} | x_<=t, v)

and so on: at distance h the sum runs over the V^(h-1) ways through h - 1 unknown tokens, the branches of a tree. This
is what multi-token heads have to be measured against: it is already in the model, only expensive to get out. Exactly,
it takes V^(h-1) branches, which bytes allow at distance 2. Truncated, one follows the k most probable branches and
says how much probability they capture. Estimated, one follows k random ones and says how large the error is.

All of it is one function, look_ahead. It reads a text once; every branch, a node of a tree, then sees the cached text
up to its own position and its ancestors in the tree, and nothing else. So many branches of many positions share one
forward pass, and no text is read twice.

Read: choosing branches, the look ahead, what it gives (exact, truncated, estimated), measuring it on held-out text,
layer by layer, the figure, the command line.
"""
import argparse
import copy
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (Progress, check_output, corpus_of, environment, load_model, one_line_errors, pick_device,
                    write_whole)
from model import GPT2_NAMES, InputError, KVCache

MAX_NODES = 1024                                                            # branches in one forward pass


# ---------------------------------------------------------------------------------------------------------------------
# Which branches to follow. Each takes the nodes of one depth, with what the model says after each of them, probs
# (B, P, n, V), and the share of the whole that each stands for, weight (B, P, n). It returns their children: token,
# parent (the index of a node) and weight, each (B, P, m).

def every_best(probs, weight, k, generator):
    """Top-k per level: the k best tokens after every node, so k^d branches at depth d. With k = V: all of them."""
    best, token = probs.topk(k, dim=-1)                                     # (B, P, n, k)
    parent = torch.arange(probs.shape[2], device=probs.device)[:, None].expand_as(token)
    return token.flatten(2), parent.flatten(2), (weight[..., None] * best).flatten(2)


def best_paths(probs, weight, k, generator):
    """A beam: of all children together the k with the highest joint probability, so k branches at each depth."""
    weight, i = (weight[..., None] * probs).flatten(2).topk(k, dim=-1)      # (B, P, k), i into n * V
    return i % probs.shape[-1], i // probs.shape[-1], weight


def random_paths(probs, weight, k, generator):
    """Monte Carlo: k paths drawn from the model. A node that stands for a share w of them draws w * k children."""
    draws = round(weight.flatten()[0].item() * k)                           # k at the root, 1 below
    token = probs.flatten(0, 2).multinomial(draws, replacement=True, generator=generator)
    token = token.view(*probs.shape[:3], draws)                             # (B, P, n, draws)
    parent = torch.arange(probs.shape[2], device=probs.device)[:, None].expand_as(token)
    return token.flatten(2), parent.flatten(2), torch.full_like(token, 1 / k, dtype=weight.dtype).flatten(2)


METHODS = {"top-k": every_best, "beam": best_paths, "sample": random_paths}


# ---------------------------------------------------------------------------------------------------------------------
# The look ahead

class Marginal(NamedTuple):
    """The distribution of the token at one distance from each of B x P positions."""
    probs: torch.Tensor         # (B, P, V) summed over the branches followed; they sum to mass
    mass: torch.Tensor          # (B, P) captured mass: the total probability of those branches; 1 when exact or sampled
    error: torch.Tensor = None  # (B, P, V) standard error of probs; of Monte Carlo only, NaN for a single path


def check_options(config, horizon, branches, method, max_nodes):
    """Raise InputError unless a model of this GPTConfig can be looked ahead of in this way."""
    if horizon < 1:
        raise InputError(f"the horizon must be at least 1, not {horizon}")
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
    if branches is None and method != "top-k":
        raise InputError(f"the method {method!r} needs a number of branches")
    if branches is not None and branches < 1:
        raise InputError(f"branches must be at least 1, not {branches}")
    if branches is not None and branches > config.vocab_size and method != "sample":
        raise InputError(f"{branches} branches are more than the vocabulary of {config.vocab_size}")
    if branches is not None and branches > 1_000_000:
        raise InputError(f"{branches} random paths are too many: at most a million")
    least = branches if method == "beam" else 1                             # a beam's are compared with each other
    if max_nodes < least:
        raise InputError(f"max_nodes must be at least {least}{', the branches of the beam' * (least > 1)}, "
                         f"not {max_nodes}")


def check_questions(config, idx, position, horizon):
    """Raise InputError unless the tokens after `position` in the texts idx can be asked about."""
    if not idx.numel() or not position.numel():
        raise InputError("there is no text, or no position to look ahead from")
    if len(position) != len(idx):
        raise InputError(f"there are {len(idx)} texts but positions for {len(position)}")
    if idx.min() < 0 or idx.max() >= config.vocab_size:
        raise InputError(f"a text has a token id outside 0..{config.vocab_size - 1}; is it another tokenizer's?")
    if position.min() < 0 or position.max() >= idx.shape[1]:
        raise InputError(f"positions must be in 0..{idx.shape[1] - 1}")
    needed = max(idx.shape[1], int(position.max()) + horizon)               # the last branches stand there
    if needed > config.block_size:
        raise InputError(f"{idx.shape[1]} tokens and a horizon of {horizon} need a context of {needed}; the model has "
                         f"{config.block_size}")


class Context:
    """Texts idx (R, T) that are read once, into a cache with further slots for branches: `room` at each of `depths`.

    So there are S = T + depths * room slots for each text. h (R, T, C): the hidden states after each of its tokens.
    """

    def __init__(self, gpt, idx, depths, room):
        config, weight, (R, T), S = gpt.config, gpt.lm_head.weight, idx.shape, idx.shape[1] + depths * room
        self.gpt, self.room, self.slot = gpt, room, torch.arange(S, device=idx.device)  # (S,)
        self.cache = KVCache(config.n_layer, config.n_embd, R, S, idx.device, weight.dtype)
        self.row = S * torch.arange(R, device=idx.device)[:, None]          # where each text's slots begin
        text = self.slot[:T]
        self.h = self.read(idx, text, text, (self.slot <= text[:, None])[None])

    def read(self, token, place, slots, seen):
        """Tokens (R, N) that stand at `place` in their text, into their slots (N,); seen (R, N, S) bool: which slots
        each of them sees. -> hidden states (R, N, C)"""
        return self.gpt.hidden_states(token, place, self.cache, (self.row + slots).flatten(), seen[:, None])

    def probs(self, h):
        """Hidden states (..., C) -> the probabilities of the next token, (..., V), in float32 at least."""
        logits = self.gpt.lm_head(h)
        return F.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))


def foretell(context, t, horizon, choose, part, samples=None):
    """What follows each of the positions t (R, P) of the context's texts. choose(probs, weight): which children; part:
    how many nodes of a position are read at once; samples: how many random paths `choose` draws, if it does.
    -> [Marginal for distance 1, 2, ..., horizon]"""
    (_, T, C), S = context.h.shape, len(context.slot)
    root = context.probs(context.h.gather(1, t[..., None].expand(-1, -1, C)))   # (R, P, V)
    total, mass = root.new_zeros(horizon, *root.shape), root.new_zeros(horizon, *t.shape)
    squares = torch.zeros_like(total) if samples else None

    def follow(depth, probs, weight, seen):
        """Add what the nodes with these probs (R, P, n, V) and weight (R, P, n) say, and follow their children, part
        by part and each part to its end before the next, so that little is held at once. seen (R, P, n, S)."""
        total[depth] += (weight[:, :, None] @ probs)[:, :, 0]               # (R, P, V)
        mass[depth] += weight.sum(-1)
        if squares is not None:
            squares[depth] += (weight[:, :, None] @ probs.square())[:, :, 0]
        if depth + 1 == horizon:
            return
        children = choose(probs, weight)                                    # token, parent, weight, each (R, P, m)
        for token, parent, share in zip(*(c.split(part, dim=2) for c in children)):
            R, P, n = token.shape
            own = T + depth * context.room + context.slot[:P * n]           # the slots of these nodes
            # A node sees what its parent sees, and itself.
            below = seen.gather(2, parent[..., None].expand(-1, -1, -1, S)).flatten(1, 2)   # (R, P * n, S)
            below = below | (context.slot == own[:, None])
            place = (t[:, :, None] + depth + 1).expand(-1, -1, n)
            h = context.read(token.flatten(1), place.flatten(1), own, below)    # (R, P * n, C)
            follow(depth + 1, context.probs(h).view(R, P, n, -1), share, below.view(R, P, n, S))

    follow(0, root[:, :, None], torch.ones_like(root[:, :, :1]), (context.slot <= t[..., None])[:, :, None])
    if squares is None:
        return [Marginal(*m) for m in zip(total, mass)]
    error = ((squares - total.square()).clamp(min=0) / (samples - 1)).sqrt()    # of a mean of independent paths
    return [Marginal(*m) for m in zip(total, mass, error)]


@torch.no_grad()
def look_ahead(gpt, idx, position, horizon, branches=None, method="top-k", max_nodes=MAX_NODES, seed=0):
    """p(x_{t+1} | x_<=t), ..., p(x_{t+horizon} | x_<=t) at many positions t of many texts.

    idx (B, T) int64: the texts. position (B, P) int64: the questions, t counted from 0.
    branches: k as in METHODS[method]; None, with "top-k": all V, which is exact.
    max_nodes bounds the memory: a forward pass holds at most so many branches, and for each distance the probabilities
        of one pass, (max_nodes, V), are kept at once. It does not change the result (but which paths `sample` draws).
    Yields (rows, columns, [Marginal for distance 1, 2, ...]), one part of the B x P questions after another; rows and
    columns are slices. Puts the gpt into eval mode. Raises InputError as the checks above say.
    """
    (B, T), P, k = idx.shape, position.shape[1], branches or gpt.config.vocab_size
    check_options(gpt.config, horizon, branches, method, max_nodes)
    check_questions(gpt.config, idx, position, horizon)
    gpt.eval()
    choose = partial(METHODS[method], k=k, generator=torch.Generator(idx.device).manual_seed(seed))

    # One pass reads, of R texts, p positions and `part` nodes of each. Few for each text, because attention is computed
    # over the slots of all of these before most of them are masked; rather more texts.
    per_row = max(k if method == "beam" else 1, min(64, max_nodes))
    R = min(B, max(1, max_nodes // per_row))
    p = max(1, per_row // k)
    part = per_row // p
    for r in range(0, B, R):
        rows = slice(r, min(r + R, B))
        context = Context(gpt, idx[rows], horizon - 1, p * part)
        for c in range(0, P, p):
            columns = slice(c, min(c + p, P))
            yield rows, columns, foretell(context, position[rows, columns], horizon, choose, part,
                                          k if method == "sample" else None)


# ---------------------------------------------------------------------------------------------------------------------
# What it gives: exact, truncated, estimated

def last_marginal(gpt, idx, horizon, position, **how):
    """The Marginal of look_ahead at distance `horizon`, all its parts together."""
    whole = None
    for rows, columns, (*_, part) in look_ahead(gpt, idx, position, horizon, **how):
        if whole is None:
            whole = Marginal(*(None if m is None else m.new_empty(*position.shape, *m.shape[2:]) for m in part))
        for m, there in zip(part, whole):
            if m is not None:
                there[rows, columns] = m
    return whole


def last_position(idx):
    """(B, 1): the end of each text (B, T)."""
    return torch.full((len(idx), 1), idx.shape[1] - 1, device=idx.device)


def marginalize(gpt, idx, horizon, branches=None, method="top-k", position=None, max_nodes=MAX_NODES):
    """p(x_{T+horizon} | x_1..x_T) by summing over the tokens in between (Mehra et al. 2025).

    idx (B, T) int64. branches=None is exact and follows V^(horizon-1) branches. Otherwise the k = branches most
    probable tokens after each node ("top-k", k^(horizon-1) branches), or the k most probable paths ("beam").
    -> probs (B, V) and captured mass (B,), their sum. Truncated probabilities are lower bounds: the exact one lies in
    [probs, probs + 1 - mass]; probs / mass is the truncated distribution.
    With position (B, P) int64, the same at these positions of the texts: (B, P, V) and (B, P).
    max_nodes: the memory bound of look_ahead. Raises InputError for a horizon below 1 or beyond the context, or more
    branches than the vocabulary.
    """
    asked = last_position(idx) if position is None else position
    probs, mass, _ = last_marginal(gpt, idx, horizon, asked, branches=branches, method=method, max_nodes=max_nodes)
    return (probs[:, 0], mass[:, 0]) if position is None else (probs, mass)


def estimate(gpt, idx, horizon, samples, position=None, max_nodes=MAX_NODES, seed=0):
    """An unbiased Monte Carlo estimate of the same, from `samples` random continuations.

    -> probs (B, V) and their standard error (B, V), with position (B, P, V). Not the last tokens of the paths are
    counted, but the model's whole distributions there averaged, which is far less noisy.
    """
    asked = last_position(idx) if position is None else position
    probs, _, error = last_marginal(gpt, idx, horizon, asked, branches=samples, method="sample", max_nodes=max_nodes,
                                    seed=seed)
    return (probs[:, 0], error[:, 0]) if position is None else (probs, error)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring it on held-out text

def german_half(tokens, tokenizer):
    """Of multi30k's lines, English<TAB>German<NEWLINE>: which of the tokens (..., L) are German, up to and including
    the newline. What comes before the first separator is unknown and counts as English. -> bool (..., L)"""
    tab, newline = (tokenizer.encode_ordinary(c)[0] for c in "\t\n")
    place = torch.arange(1, 1 + tokens.shape[-1])
    latest = [torch.where(tokens == c, place, 0).cummax(-1).values for c in (tab, newline)]
    after_tab = F.pad(latest[0] > latest[1], (1, 0))[..., :-1]              # seen from the next token
    return after_tab


def counted(tokens, corpus):
    """Which tokens (..., L) of a corpus are to be predicted: all, or multi30k's German half, given the English."""
    if corpus.meta.get("source") == "multi30k":
        return german_half(tokens, corpus.tokenizer)
    return torch.ones_like(tokens, dtype=torch.bool)


def questions(corpus, block_size, horizon, n_windows, n_positions):
    """Held-out windows (W, block_size + 1) and positions (W, P) in them, evenly spaced over those in the second half
    of the context after which `horizon` tokens are to be predicted. Windows do not overlap, so there may be fewer than
    n_windows in a corpus, and those with too few positions are left out. Raises InputError when less than 2 remain."""
    if block_size < 2 * horizon:
        raise InputError(f"a horizon of {horizon} is too far for a context of {block_size}: at most {block_size // 2}")
    n_windows = min(n_windows, max(1, len(corpus.val) // (block_size + 1)))
    windows = corpus.windows("val", n_windows, block_size + 1)
    asked = counted(windows, corpus)[:, 1:].unfold(1, horizon, 1).all(-1)   # [w, t]: tokens t + 1 .. t + horizon
    asked[:, :block_size // 2] = False
    kept, position = [], []
    for window, may in zip(windows, asked):
        found = may.nonzero()[:, 0]
        if len(found) >= n_positions:
            kept.append(window)
            position.append(found[torch.linspace(0, len(found) - 1, n_positions).long()])
    if len(kept) < 2:                                                       # one alone has no confidence interval
        raise InputError(f"{len(kept)} of {n_windows} windows of {block_size + 1} tokens have {n_positions} positions "
                         "to ask at, and two are needed: lower --positions or raise --windows")
    return torch.stack(kept), torch.stack(position)


def unigram(corpus):
    """How often each token occurs among those to be predicted in the training split, add-one smoothed. -> (V,)"""
    tokens = torch.from_numpy(np.asarray(corpus.train).astype(np.int64))
    counts = torch.bincount(tokens[counted(tokens, corpus)], minlength=corpus.vocab_size) + 1
    return counts / counts.sum()


def score(probs, target):
    """How good a prediction was: probs (..., V), target (...) -> rank of the right token (0: the best guess), and its
    negative log-probability in nats, probs normalised to 1."""
    right = probs.gather(-1, target[..., None])                             # (..., 1)
    return (probs > right).sum(-1), -(right[..., 0] / probs.sum(-1)).log()


def interval(values):
    """values (W, P) -> mean and half of its 95% confidence interval, windows being what varies independently. It is the
    normal one, too narrow for less than some dozens of windows."""
    by_window = values.double().mean(1)
    return by_window.mean().item(), 1.96 * by_window.std().item() / math.sqrt(len(by_window))


def record(rank, nats, **names):
    """A line of a table: names, and top-1, top-5 and nats (W, P), each as [mean, half of the 95% interval]."""
    return dict(names, top1=interval(rank < 1), top5=interval(rank < 5), nats=interval(nats))


@torch.no_grad()
def measure(model, windows, position, horizon, unigram, branches, method="beam", max_nodes=MAX_NODES, seed=0,
            progress=True):
    """How well x_{t+1} .. x_{t+horizon} are foretold from position t, by each of

        marginalisation    the model's own distribution, of k branches
        own head           the model's head for that offset, where it has one
        greedy rollout     what it says after writing greedily for a while: the argmax of argmaxes, a beam of one
        unigram            how often tokens occur: the same everywhere

    windows (W, L), position (W, P) as from `questions`; unigram (V,). -> list of records: distance, reader, top1, top5
    and nats; of marginalisation also its captured mass, if truncated; of the others top1_gain: top1 minus that of
    marginalisation.
    """
    gpt, (W, P) = model.eval().gpt, position.shape
    idx = windows[:, :int(position.max()) + 1]
    target = [windows.gather(1, position + d) for d in range(1, horizon + 1)]   # (W, P) each
    scores, mass = {}, torch.zeros(horizon, W, P)

    def keep(reader, distance, rows, columns, probs):
        kept = scores.setdefault((distance, reader), (torch.zeros(W, P), torch.zeros(W, P)))
        for values, found in zip(kept, score(probs, target[distance - 1][rows, columns])):
            values[rows, columns] = found.float().cpu()

    with Progress(None, progress, total=2 * W * P, desc="look ahead", unit="position") as bar:
        for reader, way in (("marginalisation", (branches, method)), ("greedy rollout", (1, "beam"))):
            for rows, columns, found in look_ahead(gpt, idx, position, horizon, *way, max_nodes, seed):
                for d, m in enumerate(found, 1):
                    keep("model" if d == 1 else reader, d, rows, columns, m.probs)
                    if reader == "marginalisation":
                        mass[d - 1, rows, columns] = m.mass.cpu()
                bar.update(m.mass.numel())
    for w in range(W):                                                      # logits of whole windows are large
        rows = slice(w, w + 1)
        h = model.hidden_states(idx[rows])                                  # (1, T, ...)
        for d in range(1, horizon + 1):
            if d > 1 and d in model.offsets:
                keep("own head", d, rows, slice(None), model.offset_logits(h, d)[:, position[w]].softmax(-1))
            keep("unigram", d, rows, slice(None), unigram.expand(1, P, -1))
    records = []
    for d in range(1, horizon + 1):
        for reader in ("model", "marginalisation", "own head", "greedy rollout", "unigram"):
            if (d, reader) in scores:
                rank, nats = scores[d, reader]
                records.append(record(rank, nats, distance=d, reader=reader))
                if reader == "marginalisation":
                    if method != "sample":
                        records[-1]["mass"] = interval(mass[d - 1])
                elif d > 1:                                                 # question by question: much less noisy
                    base = scores[d, "marginalisation"][0]
                    records[-1]["top1_gain"] = interval((rank < 1).float() - (base < 1).float())
    return records


def truncation(gpt, windows, position, horizon, nodes, max_nodes=MAX_NODES, seed=0, progress=True):
    """What truncation costs, against the exact answer, at the distances where `nodes` branches pay for it.

    -> list of records: distance, questions (how many), k, and for top-k, beam and sample tv, the total variation
    distance to the exact distribution (half the sum of |difference|), as [mean, half of the 95% interval]; mass: what
    the first two capture; standard_error: half the sum of what the samples say of themselves, of which their
    E|difference| is about 0.8.
    """
    records, (W, P), V = [], position.shape, gpt.config.vocab_size
    affordable = [d for d in range(2, horizon + 1) if 2 * V ** (d - 1) <= nodes]    # two questions at least
    ks = [k for k in (1, 4, 16, 64) if k <= min(V, max_nodes)]
    bar = Progress(None, progress, total=len(affordable) * (1 + len(ks)), desc="truncation", unit="sum")
    for d in affordable:
        n = min(W * P, nodes // V ** (d - 1))
        some = torch.linspace(0, W - 1, min(n, W)).long()                   # spread over windows, then positions
        t = position[some.to(windows.device)][:, torch.linspace(0, P - 1, max(1, n // W)).long()]
        idx = windows[some, :int(t.max()) + 1]
        exact, _ = marginalize(gpt, idx, d, position=t, max_nodes=max_nodes)
        bar.update()
        for k in ks:
            r = dict(distance=d, questions=t.numel(), k=k, tv={}, mass={})
            for method in ("top-k", "beam"):
                probs, mass = marginalize(gpt, idx, d, k, method, t, max_nodes)
                r["tv"][method] = interval((probs / mass[..., None] - exact).abs().sum(-1) / 2)
                r["mass"][method] = mass.mean().item()
            probs, error = estimate(gpt, idx, d, k, t, max_nodes, seed)
            r["tv"]["sample"] = interval((probs - exact).abs().sum(-1) / 2)
            r["standard_error"] = error.sum(-1).mean().item() / 2 if k > 1 else None
            records.append(r)
            bar.update()
    bar.close()
    return records


# ---------------------------------------------------------------------------------------------------------------------
# Layer by layer: where in the model is what it knows about t+1, and about t+2?

class Probe(nn.Module):
    """A tuned lens (Belrose et al. 2023): an affine map x + A x + b of a layer's output, read by the model's own final
    norm and unembedding. A and b are 0 at first: then it is the logit lens, whatever it is to predict. Theirs learns to
    say what the last layer says; ours learns what the text says, so that it can be asked about t+2 as well."""

    def __init__(self, n_embd):
        super().__init__()
        self.affine = nn.Linear(n_embd, n_embd)
        nn.init.zeros_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)

    def forward(self, gpt, x):
        """x (..., C), a layer's output -> logits (..., V)."""
        return gpt.lm_head(gpt.transformer.ln_f(x + self.affine(x)))


def train_probes(gpt, corpus, distances=(1, 2), steps=300, batch_size=8, lr=1e-2, seed=0, progress=True):
    """A probe for each layer and distance, trained on the corpus with the backbone frozen.
    -> {distance: [Probe for the embeddings, for layer 1, ...]}. Raises CorpusError when the corpus is too short."""
    gpt = copy.deepcopy(gpt).eval().requires_grad_(False)                   # the caller's stays as it is
    device, config = gpt.lm_head.weight.device, gpt.config
    probes = {d: [Probe(config.n_embd).to(device) for _ in range(config.n_layer + 1)] for d in distances}
    parameters = [p for layers in probes.values() for probe in layers for p in probe.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for step in Progress(range(steps), progress, desc="probes", unit="step"):
        idx = corpus.batch("train", batch_size, config.block_size + 1, step, seed)
        asked = counted(idx, corpus)
        idx, asked = idx.to(device), asked.to(device)
        with torch.no_grad():
            stream = gpt.residual_stream(idx[:, :-1])                       # n_layer + 1 of (B, T, C)
        for d, layers in probes.items():
            for probe, x in zip(layers, stream):
                x, may = x[:, :x.shape[1] - d + 1], asked[:, d:]            # (B, T - d + 1, C), (B, T - d + 1)
                F.cross_entropy(probe(gpt, x[may]), idx[:, d:][may]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return probes


@torch.no_grad()
def measure_layers(gpt, probes, windows, position):
    """Held-out accuracy of each layer, read by the logit lens (the model's final norm and unembedding) and by `probes`.
    -> list of records: layer (0: the embeddings), distance, reader ("lens" or "probe"), top1, top5, nats."""
    gpt, records = gpt.eval(), []
    row = torch.arange(len(windows), device=windows.device)[:, None]
    stream = [torch.cat(x) for x in zip(*(                                  # n_layer + 1 of (W, P, C)
        [x[row[:len(part)], at] for x in gpt.residual_stream(part[:, :-1])]
        for part, at in zip(windows.split(16), position.split(16))))]
    untrained = Probe(gpt.config.n_embd).to(windows.device)
    for d, layers in probes.items():
        target = windows.gather(1, position + d)                            # (W, P)
        for i, x in enumerate(stream):
            for reader, probe in (("lens", untrained), ("probe", layers[i])):
                rank, nats = (torch.stack(s) for s in zip(*(                # a window at a time: logits are large
                    score(probe(gpt, x[w]).softmax(-1), target[w]) for w in range(len(windows)))))
                records.append(record(rank.cpu(), nats.cpu(), layer=i, distance=d, reader=reader))
    return records


# ---------------------------------------------------------------------------------------------------------------------
# The figure

def draw(results, plt):
    """Accuracy by distance and, where layers were measured, by depth. plt: matplotlib.pyplot. -> its figure"""
    runs, layered = results["runs"], [run for run in results["runs"] if run["layers"]]
    width = 2 if len(layered) == 3 else min(3, 1 + len(layered))
    figure, axes = plt.subplots(-(-(1 + len(layered)) // width), width, squeeze=False, layout="constrained",
                                figsize=(5.2 * width, 4.2 * -(-(1 + len(layered)) // width)))
    axes = axes.flatten()

    def curve(axis, x, records, **style):
        mean, half = zip(*(r["top1"] for r in records))
        axis.errorbar(x, mean, half, capsize=2, markersize=4, linewidth=1.5, **style)

    styles = {"marginalisation": "o-", "own head": "s--", "greedy rollout": "^:", "unigram": "x:"}
    shown = styles if len(runs) == 1 else ["marginalisation", "own head"]   # of several, only what they differ in
    for i, run in enumerate(runs):
        for j, reader in enumerate(shown):
            found = [r for r in run["table"] if r["reader"] == reader or r["reader"] == "model" and reader != "unigram"]
            if any(r["reader"] == reader for r in found):
                curve(axes[0], [r["distance"] for r in found], found, fmt=styles[reader],
                      color=f"C{i if len(runs) > 1 else j}", label=f"{run['name']}, " * (len(runs) > 1) + reader)
    axes[0].set(xlabel="distance (tokens ahead)", ylabel="top-1 accuracy, held-out", title="What is known about t+h",
                xticks=range(1, 1 + results["horizon"]))
    for axis, run in zip(axes[1:], layered):
        for d, color in zip(sorted({r["distance"] for r in run["layers"]}), ("C0", "C3")):
            for reader, style in (("probe", "o-"), ("lens", "x:")):
                found = [r for r in run["layers"] if r["distance"] == d and r["reader"] == reader]
                curve(axis, [r["layer"] for r in found], found, fmt=style, color=color, label=f"t+{d}, {reader}")
            for r in run["table"]:
                if r["distance"] == d and r["reader"] == "marginalisation":
                    axis.axhline(r["top1"][0], color=color, linestyle="--", linewidth=1,
                                 label=f"t+{d}, marginalisation")
        axis.set(xlabel="layer (0: the embeddings)", ylabel="top-1 accuracy, held-out",
                 title=f"{run['name']}, layer by layer", xticks=sorted({r["layer"] for r in run["layers"]}))
    for axis in axes[:1 + len(layered)]:
        axis.set_ylim(0, 1)
        axis.legend(fontsize=8, loc="upper right" if axis is axes[0] else "upper left")
    for axis in axes[1 + len(layered):]:
        axis.set_visible(False)
    return figure


def import_matplotlib():
    """matplotlib.pyplot, or None: it is an optional package, only needed for figures."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def parse_args():
    """The command line as a namespace."""
    p = argparse.ArgumentParser(
        prog="marginalize.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Measure on held-out text what a model that predicts the next token knows about the tokens after "
                    "it, by summing over the tokens in between; beside its own heads, if it has some, and baselines.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folder or checkpoint made by train.py, or GPT-2 "
                   f"weights: a folder, a .safetensors file, or {', '.join(GPT2_NAMES)}")
    p.add_argument("--data", metavar="NAME", help="corpus folder, or its name under data/; of multi30k only the German "
                   "half is asked for; default: the one trained on")
    p.add_argument("--horizon", type=int, default=4, help="how many tokens ahead")
    p.add_argument("--branches", type=int, default=32, help="how many to follow; exact needs none")
    p.add_argument("--method", default="beam", choices=["beam", "top-k", "exact", "sample"],
                   help="beam: the most probable paths; top-k: the most probable tokens after every node, so "
                   "branches^(horizon - 1); exact: all; sample: random ones")
    p.add_argument("--windows", type=int, default=256, help="held-out windows, as far as there are so many without "
                   "overlap; some dozens at least, for the intervals")
    p.add_argument("--positions", type=int, default=16, help="positions in each, in the second half of the context")
    p.add_argument("--exact-nodes", type=int, default=300_000, help="how many branches to spend, at each distance, on "
                   "comparing truncation with the exact answer; 0 to skip it")
    p.add_argument("--layers", action="store_true", help="also read every layer, by the model's own unembedding and by "
                   "trained probes, about t+1 and t+2")
    p.add_argument("--probe-steps", type=int, default=300, help="training steps of the probes")
    p.add_argument("--max-nodes", type=int, default=MAX_NODES, help="memory bound: branches in one forward pass")
    p.add_argument("--seed", type=int, default=0, help="of random paths and of the probes' batches")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--out", metavar="FILE", help="where to write the results as JSON and, if matplotlib is there, a "
                   "figure beside it; default: marginalize.json in the first RUN, if that is a run folder")
    p.error = lambda message: p.exit(2, f"marginalize.py: error: {message}\n")  # one line, without the usage
    return p.parse_args()


def load(run, data):
    """A run of train.py or GPT-2's weights, and the corpus to measure it on. -> MultiTokenGPT, Corpus, steps or None.
    Raises InputError and CorpusError, also when the corpus is of another tokenizer."""
    model, state = load_model(run)
    if not all(p.isfinite().all() for p in model.parameters()):
        raise InputError(f"{run} has weights that are not finite")
    return model.eval(), corpus_of(run, model, state, data), state.get("step")


def how(args):
    """The method and its number of branches as look_ahead wants them."""
    return (args.method, args.branches) if args.method != "exact" else ("top-k", None)


def print_table(records):
    """Print the records of `measure`."""
    def percent(value):
        return f"{100 * value[0]:8.1f} ±{100 * value[1]:4.1f}"
    print(f"\n{'':5}{'reader':17}{'top-1, %':>14}{'over marg.':>14}{'top-5, %':>14}{'nats':>15}{'captured, %':>14}")
    for r in records:
        gain = f"{100 * r['top1_gain'][0]:+8.1f} ±{100 * r['top1_gain'][1]:4.1f}" if "top1_gain" in r else ""
        nats = f"{r['nats'][0]:.3f} ±{r['nats'][1]:.3f}"
        print(f"t+{r['distance']:<3}{r['reader']:17}{percent(r['top1'])}{gain:14}{percent(r['top5'])}{nats:>15}"
              + (percent(r["mass"]) if "mass" in r else ""))


def print_truncation(records):
    """Print the records of `truncation`."""
    if records:
        print(f"\ntotal variation distance to the exact distribution\n{'':5}{'k':>9}{'top-k':>15}{'captured':>10}"
              f"{'beam':>15}{'captured':>10}{'sample':>15}{'std. error':>12}")
    for r in records:
        tv = {method: f"{mean:8.3f} ±{half:.3f}" for method, (mean, half) in r["tv"].items()}
        error = "" if r["standard_error"] is None else f"{r['standard_error']:.3f}"
        print(f"t+{r['distance']:<3}{r['k']:9}" + "".join(f"{tv[m]:>15}{r['mass'][m]:10.1%}" for m in ("top-k", "beam"))
              + f"{tv['sample']:>15}{error:>12}   {r['questions']} positions")


def print_layers(records):
    """Print the records of `measure_layers`."""
    readers = [(d, reader) for d in sorted({r["distance"] for r in records}) for reader in ("lens", "probe")]
    print(f"\ntop-1, %, read from layer\n{'':9}" + "".join(f"{f't+{d} {reader}':>15}" for d, reader in readers))
    for layer in sorted({r["layer"] for r in records}):
        found = {(r["distance"], r["reader"]): r["top1"] for r in records if r["layer"] == layer}
        print(f"{layer:5}    " + "".join(f"{100 * found[key][0]:9.1f} ±{100 * found[key][1]:4.1f}" for key in readers))


def report(run, model, corpus, steps, args):
    """Measure and print everything about one model. -> its results as a dict for --out."""
    device, gpt = pick_device(args.device), model.gpt
    model = model.to(device)
    windows, position = questions(corpus, gpt.config.block_size, args.horizon, args.windows, args.positions)
    windows, position = windows.to(device), position.to(device)
    n = sum(p.numel() for p in gpt.parameters())
    method, branches = how(args)
    print(f"\n{run}: {n / 1e6:.2f}M parameters in the backbone, offsets {model.offsets}; {corpus.folder.name}"
          f"{', the German half' * (corpus.meta.get('source') == 'multi30k')}: {len(windows)} windows x "
          f"{position.shape[1]} positions, {args.method}{f', {branches} branches' if branches else ''}, on {device}")
    table = measure(model, windows, position, args.horizon, unigram(corpus).to(device), branches, method,
                    args.max_nodes, args.seed)
    print_table(table)
    cost = truncation(gpt, windows, position, args.horizon, args.exact_nodes, args.max_nodes, args.seed)
    print_truncation(cost)
    layers = []
    if args.layers:
        distances = range(1, min(2, args.horizon) + 1)
        layers = measure_layers(gpt, train_probes(gpt, corpus, distances, args.probe_steps, seed=args.seed), windows,
                                position)
        print_layers(layers)
    path = Path(run)
    return dict(run=str(run), name=path.parent.name if path.is_file() else path.name, parameters=n, steps=steps,
                data=corpus.folder.name, data_sha256=corpus.meta.get("val_sha256"), offsets=model.offsets,
                windows=len(windows), positions=position.shape[1], table=table, truncation=cost, layers=layers)


def main():
    """Report on every model; bad input is one line and status 2."""
    args = parse_args()
    with one_line_errors("marginalize.py", memory="--max-nodes"):
        for name, least in dict(windows=2, positions=1, probe_steps=1, max_nodes=1, exact_nodes=0, seed=0).items():
            if not least <= getattr(args, name) < 2**63:
                raise InputError(f"--{name.replace('_', '-')} must be at least {least} and below 2^63")
        if args.out is None and (Path(args.runs[0]) / "checkpoint.pt").is_file():
            args.out = str(Path(args.runs[0]) / "marginalize.json")
        if args.out and Path(args.out).suffix == ".png":
            raise InputError("--out names the JSON file; the figure is written beside it")
        check_output("out", args.out)
        check_output("out", args.out and Path(args.out).with_suffix(".png"))
        plt = import_matplotlib() if args.out else None
        (method, branches), distances = how(args), args.horizon - 1
        loaded = [(run, *load(run, args.data)) for run in args.runs]        # what is wrong is said before work starts
        for run, model, corpus, _ in loaded:
            check_options(model.gpt.config, args.horizon, branches, method, args.max_nodes)
            _, position = questions(corpus, model.gpt.config.block_size, args.horizon, args.windows, args.positions)
            k = branches or model.gpt.config.vocab_size
            nodes = position.numel() * (k ** distances if method == "top-k" else k * distances)
            if nodes > 10**10:
                raise InputError(f"{args.method} at a horizon of {args.horizon} would follow {nodes:.0e} branches; "
                                 "lower --horizon, --branches, --windows or --positions, or use --method beam")
        results = dict(command=" ".join(sys.argv), environment=environment(pick_device(args.device)),
                       horizon=args.horizon, method=args.method, branches=branches, runs=[])
        results["runs"] = [report(run, *rest, args) for run, *rest in loaded]
        if args.out:
            write_whole(args.out, json.dumps(results, indent=1) + "\n")
            print(f"\nwritten to {args.out}")
            if plt:
                draw(results, plt).savefig(Path(args.out).with_suffix(".png"), dpi=110)
            else:
                print("no figure: it needs matplotlib, pip install -e '.[experiments]'")


if __name__ == "__main__":
    main()
