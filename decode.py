"""Decoding: one decoder for NTP, MTP, leap and trees of candidates, which differ only in where their guesses come from.

    python decode.py runs/demo                          # compare the methods on held-out text
    python decode.py runs/demo --calibrate              # first find the fastest tree of candidates on this machine
    python decode.py runs/demo --prompt "def main(" --trace --html page.html

A model that predicts several tokens at once can be used as its own draft model (blockwise parallel decoding, Stern et
al. 2018). Each step feeds a *block* of N tokens: the last known one, the root, and N - 1 candidates for the tokens
after it, a chain or a tree. One forward pass then says what the model itself would emit after each of them, and a
candidate is accepted when its parent is and it equals what the model emits there. Behind the last accepted one stands
one more token, the model's own. The same pass lets the heads guess further tokens from every node; the guesses made
at the accepted nodes, and at a few positions before them (looking back fills the holes between leaping offsets),
become the next block.

Why the text cannot change: a token is only ever emitted when the model itself, given the tokens before it, picks it.
At temperature > 0 "picks" means argmax(logits / temperature + noise), where the Gumbel noise is a fixed function of
(seed, row, position, token). That is an exact sample of softmax(logits / temperature), and it does not depend on how
many tokens were checked at once. NTP is the same code with a block of one token.

Read: picking a token, trees, the decoder, calibration, comparing methods, a corpus of its own, showing a text, the
command line.
"""
import argparse
import codecs
import copy
import html
import json
import math
import os
import re
import statistics
import sys
import time
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import (Progress, check_output, corpus_of, environment, load_checkpoint, load_model, one_line_errors,
                    pick_device, write_whole)
from data.loader import Corpus
from data.prepare import CORPUS_FILES, OWN_TEXT, get_tokenizer, write_corpus
from heads import (BlockHead, ResBlockHead, check_offsets, draft_sources, leap_offsets, parse_offsets,
                   weighted_hidden_states)
from model import InputError, KVCache, block_mask


# ---------------------------------------------------------------------------------------------------------------------
# Picking a token

def gumbel_noise(seed, row, position, vocab_size):
    """Gumbel(0, 1) noise that is a pure function of (seed, row, position, token).

    seed int; row and position int64 of shapes that broadcast to some (...) -> (..., V) float32. The hash is two rounds
    of xor-shift and multiply on 32-bit words held in int64; its multipliers are below 2^31, so no product overflows.
    """
    def mix(x):
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
        return x ^ (x >> 15)
    key = mix(mix(mix(seed) ^ row) ^ position)[..., None]                   # (..., 1)
    # token + 0x9E3779B9 in 32 bits, written as a difference: Inductor counts arange in int32, where the sum overflows.
    token = (torch.arange(vocab_size, device=position.device) - 0x61C88647) & 0xFFFFFFFF
    bits = mix(key ^ mix(token))                                            # (..., V)
    uniform = ((bits >> 9).float() + 0.5) * 2.0 ** -23                      # in (0, 1), both ends excluded
    return -torch.log(-torch.log(uniform))


def filter_logits(logits, top_k=None, top_p=None):
    """Hide (-inf) all but the top_k most probable tokens and all beyond the smallest set whose probability reaches
    top_p; tokens as probable as the last one kept are kept too. logits (..., V), already divided by the temperature
    where top_p is used."""
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        ordered = logits.sort(dim=-1, descending=True).values
        p = ordered.softmax(-1)
        better = cumulative_sum(p) - p                                      # the probability of all better tokens
        least = ordered.masked_fill(better >= top_p, math.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


PART = 1024                                                                 # of a row of logits


def in_parts(x, fill):
    """(..., V) -> (..., n, PART), the last part filled up. A row of a large vocabulary is then reduced or scanned by n
    of a GPU's multiprocessors and not by one."""
    V = x.shape[-1]
    at = torch.arange(-(-V // PART) * PART, device=x.device).view(-1, PART) # F.pad with -inf may fail to compile
    return x[..., at.clamp(max=V - 1)].masked_fill(at >= V, fill)


def argmax(scores):
    """scores.argmax(-1), the first where several are largest. (..., V) -> (...) int64"""
    if scores.shape[-1] <= PART:
        return scores.argmax(-1)
    best, index = in_parts(scores, -math.inf).max(-1)                       # (..., n)
    part = best.argmax(-1, keepdim=True)                                    # (..., 1)
    return (part * PART + index.gather(-1, part))[..., 0]


def cumulative_sum(p):
    """p.cumsum(-1). Inductor fails to compile that for a large vocabulary on CUDA (pytorch issue 180221)."""
    if p.shape[-1] <= PART:
        return p.cumsum(-1)
    within = in_parts(p, 0.0).cumsum(-1)                                    # (..., n, PART)
    before = within[..., -1].cumsum(-1) - within[..., -1]                   # (..., n)
    return (within + before[..., None]).flatten(-2)[..., :p.shape[-1]]


# ---------------------------------------------------------------------------------------------------------------------
# Trees of candidates

class Node(NamedTuple):
    """A candidate. Node i of a tree (counted from 1, the root being 0) is a guess for the token behind its parent's:
    the rank-th best (0: the best) that offset `offset` made `look_back` tokens before the newest token read, which is
    the one before the root. A tree is a tuple of Nodes, parents first; the empty one is NTP."""
    parent: int
    offset: int
    look_back: int
    rank: int = 0


def chain(sources):
    """The tree with one candidate per distance: sources {distance: (offset, look-back)} as in heads.draft_sources."""
    return tuple(Node(i, o, b) for i, (_, (o, b)) in enumerate(sorted(sources.items())))


def depths(tree):
    """Depth of the root and of every node: a list of N = 1 + len(tree) ints. Depth d is distance d + 1."""
    depth = [0]
    for node in tree:
        depth.append(depth[node.parent] + 1)
    return depth


def offsets_of(tree):
    """The offsets that a tree uses, 1 included."""
    return tuple(sorted({1, *(node.offset for node in tree)}))


def check_tree(tree, offsets):
    """tree as a tuple of Nodes. Raises InputError when a node stands before its parent or cannot come from where it
    says: offset o seen from b tokens back is about distance o - b and about no other."""
    try:
        tree = tuple(Node(*map(int, node)) for node in tree)
    except (TypeError, ValueError):
        raise InputError("a tree is a list of nodes (parent, offset, look_back, rank)") from None
    check_offsets(offsets_of(tree), offsets)
    for i, (parent, offset, look_back, rank) in enumerate(tree, 1):
        if not 0 <= parent < i:
            raise InputError(f"node {i} of the tree has parent {parent}, which does not stand before it")
        distance = depths(tree[:i])[i] + 1
        if look_back < 0 or rank < 0 or offset - look_back != distance:
            raise InputError(f"node {i} of the tree guesses distance {distance}, which cannot come from offset "
                             f"{offset} looking back {look_back}, rank {rank}")
    return tree


# ---------------------------------------------------------------------------------------------------------------------
# The decoder

@dataclass
class Generation:
    """What Decoder.generate returns. All lists have one entry per prompt."""
    tokens: list            # the new tokens (without the prompt; a stop token is included)
    nodes: list             # of each new token: the number of the tree's node that guessed it, 0: the model's own
    distances: list         # of each new token: how far ahead it was guessed, 1: the model's own
    steps: int              # forward passes after reading the prompts, summed over the rows
    tokens_per_step: float  # new tokens per row and step
    accepted: dict          # {distance j: share of steps in which a candidate at distance j was accepted}, also of the
                            # last step, where the text may end before them
    seconds: float          # wall-clock time, reading the prompts included
    history: list           # with record=True, before each step: (position (B,), block (B, N)) of every row


CHUNK = 64                                                                  # tokens of a prompt read at once


class Decoder:
    """Generates text from a MultiTokenGPT.

    offsets: those of the model's that may draft; (1,) is plain next-token decoding, None means all of them.
    tree: the candidates, as `calibrate` finds them; None means one per distance, chain(draft_sources(offsets)).
    temperature 0 is greedy; top_k and top_p as usual; seed decides the noise. coupled=False makes the guesses without
    the noise, as argmax: same text, fewer accepted. dtype: decode with a copy in, say, torch.bfloat16. compile: let
    torch.compile make one program of the step, on CUDA replayed as one graph. max_length: the longest text, prompt
    included, if shorter than the context (a smaller cache is faster). The decoder uses the model's own weights unless
    it has to copy them: do not move, cast or train the model meanwhile; after more training, make a new Decoder.
    Raises InputError for offsets the model lacks and for a tree that cannot be.
    """

    def __init__(self, model, offsets=None, tree=None, *, temperature=0.0, top_k=None, top_p=None, seed=0,
                 coupled=True, dtype=None, compile=False, max_length=None):
        offsets = check_offsets(offsets or model.offsets, model.offsets)
        self.tree = check_tree(chain(draft_sources(offsets)) if tree is None else tree, offsets)
        if not 0 <= temperature < math.inf:
            raise InputError(f"temperature must be 0 (greedy) or positive, not {temperature}")
        if top_k is not None and top_k < 1 or top_p is not None and not 0 < top_p <= 1:
            raise InputError(f"top_k must be at least 1 and top_p in (0, 1], not {top_k} and {top_p}")
        self.config = config = model.gpt.config
        self.max_length = config.block_size if max_length is None else max_length
        if not 1 <= self.max_length <= config.block_size:
            raise InputError(f"max_length must be in 1..{config.block_size}, the model's context, not {max_length}")
        model = ready(model, dtype)
        self.gpt, self.top_k, self.top_p, self.coupled = model.gpt, top_k, top_p, coupled
        self.device, self.dtype = self.gpt.lm_head.weight.device, self.gpt.lm_head.weight.dtype
        self.temperature, self.seed = float(temperature), int(seed) & 0xFFFFFFFF
        self.states, self.compile = {}, compile

        # The heads that are used. Those that attend, or that read all layers, take part in reading. Other heads start
        # from the same hidden state, so their first layers are one product, C -> H * C; `deeper` holds the other ones,
        # layer by layer.
        head_offsets = offsets_of(self.tree)[1:]
        self.heads = [model.heads[str(o)] for o in head_offsets]
        own = [model.unembeddings[str(o)] for o in head_offsets] if model.unembeddings else []
        self.unembeddings = [padded(linear) for linear in [self.gpt.lm_head, *own]]     # one for all, or 1 + H
        mixes = [model.mixes[str(o)] if model.mixes else None for o in head_offsets]
        self.first, self.deeper, self.reading = None, [], list(zip(self.heads, mixes))
        if self.heads and isinstance(self.heads[0], ResBlockHead) and not model.mixes:
            layers = list(zip(*(head.blocks for head in self.heads)))
            self.first = torch.nn.Linear(config.n_embd, config.n_embd * len(self.heads), device=self.device,
                                         dtype=self.dtype)
            with torch.no_grad():
                self.first.weight.copy_(torch.cat([linear.weight for linear in layers[0]]))
                self.first.bias.copy_(torch.cat([linear.bias for linear in layers[0]]))
            self.deeper, self.reading = layers[1:], []
        self.offsets = torch.tensor(head_offsets, device=self.device)       # (H,)

        # The tree as tables: N nodes, D the deepest, R ranks and W positions that its candidates are taken from.
        depth = depths(self.tree)
        self.N, self.D, self.H = len(depth), max(depth), len(self.heads)
        self.W = max((1 + node.look_back for node in self.tree), default=0)
        self.R = max((1 + node.rank for node in self.tree), default=0)
        if self.R > config.vocab_size:
            raise InputError(f"the tree asks for {self.R} guesses of a vocabulary of {config.vocab_size}")
        paths = [[0]]                                                       # of each node: the way to it from the root
        for i, node in enumerate(self.tree, 1):
            paths.append(paths[node.parent] + [i])
        table = dict(device=self.device, dtype=torch.long)
        self.depth = torch.tensor(depth, **table)                           # (N,)
        self.parent = torch.tensor([0] + [node.parent for node in self.tree], **table)  # (N,)
        self.path = torch.tensor([p + [0] * (self.D + 1 - len(p)) for p in paths], **table)  # (N, D + 1), 0 beyond
        self.visible = torch.tensor([[j in p for j in range(self.N)] for p in paths], device=self.device)   # (N, N)
        self.source = torch.tensor([((self.W - 1 - node.look_back) * self.H + head_offsets.index(node.offset)) * self.R
                                    + node.rank for node in self.tree], **table)        # into (W, H, R) flattened
        self.branching = depth != list(range(self.N))
        # The last block may overshoot the end. Multiples of 16 suit the attention kernels, and decoders with blocks of
        # up to 16 share one shape, so one program reads their prompts.
        self.slots = -(-self.max_length // 16) * 16 + -(-self.N // 16) * 16

    def _state(self, B):
        """The step and all the memory of a generation of B rows, made once and reused."""
        if B not in self.states:
            new = dict(device=self.device, dtype=torch.long)

            # Torch's attention in 16 bits is slow on CPUs, for one query several times slower than in 32.
            dtype = torch.float32 if self.device.type == "cpu" else self.dtype

            def cache(n_layer):
                return KVCache(n_layer, self.config.n_embd, B, self.slots, self.device, dtype)
            s = SimpleNamespace(
                tokens=torch.zeros(B, self.slots, **new),                   # the text, prompt included
                node=torch.zeros(B, self.slots, **new),                     # which node guessed each token of it
                position=torch.zeros(B, **new),                             # of each row's last known token, the root
                limit=torch.zeros(B, **new),                                # of each row's last wanted token
                stop=torch.full((), -1, **new),                             # stop token, -1 for none
                chunk=torch.zeros(B, **new),                                # where the next CHUNK of a prompt begins
                hidden=torch.zeros(B, self.W, 1 + len(self.reading), self.config.n_embd, device=self.device,
                                   dtype=self.dtype),                       # of a prompt's W tokens before the root
                block=torch.zeros(B, self.N, **new),                        # root and candidates
                guesses=torch.zeros(B, self.W, self.H, self.R, **new),      # made at the W positions before the root
                row=torch.arange(B, **new)[:, None],
                noise_row=torch.zeros(B, 1, **new),                         # the row that keys the sampling noise
                steps=torch.zeros(B, **new), accepted=torch.zeros(self.D + 1, **new),
                caches=[cache(self.config.n_layer)]
                + [cache(len(head.blocks) if isinstance(head, BlockHead) else 0) for head, _ in self.reading])
            with exact_kernels(self.device):
                s.read = compile_read(self, s) if self.compile else read
                step = compile_step(self, s) if self.compile else partial(self._step, s)
                s.prefill, s.first_block, s.step = (
                    launcher(f, self.device, self.compile)
                    for f in (partial(self._prefill, s), partial(self._first_block, s), step))
            self.states[B] = s                                              # not before it is whole
        s = self.states[B]
        for t in (s.node, s.chunk, s.hidden, s.steps, s.accepted):
            t.zero_()
        return s

    def scores(self, logits, row, place):
        """What the token at `place` of text `row` is the argmax of. logits (..., V); row, place broadcast to (...).

        At temperature T it is argmax(logits / T + noise), a sample of softmax(logits / T) (the Gumbel-max trick). The
        noise belongs to the place, not to who speaks of it: a head that guesses with it agrees more often with the
        model than one that guesses without (Gumbel coupling, Daliri et al. 2024).
        """
        if self.temperature == 0:
            return logits
        logits = filter_logits(logits.float() / self.temperature, self.top_k, self.top_p)
        return logits + gumbel_noise(self.seed, row, place, logits.shape[-1])

    def _logits(self, x):
        """What all offsets say: x (B, m, K, C) from `read` -> (B, m, 1 + H, V); the unembedding is read only once."""
        if self.first:
            z = x + F.silu(self.first(x[:, :, 0]).unflatten(-1, (self.H, -1)))  # (B, m, H, C)
            for layer in self.deeper:
                z = z + F.silu(torch.stack([linear(z[:, :, i]) for i, linear in enumerate(layer)], dim=2))
            x = torch.cat([x, z], dim=2)                                    # (B, m, 1 + H, C)
        if len(self.unembeddings) == 1:
            logits = self.unembeddings[0](x)
        else:
            logits = torch.stack([unembed(x[:, :, i]) for i, unembed in enumerate(self.unembeddings)], dim=2)
        return logits[..., :self.config.vocab_size]

    def _draft(self, s, logits, position):
        """What the heads guess at W tokens: logits (B, W, H, V), position (B, W) of them -> the best R (B, W, H, R)."""
        if self.coupled:
            logits = self.scores(logits, s.noise_row[:, :, None], position[:, :, None] + self.offsets)
        return argmax(logits)[..., None] if self.R == 1 else logits.topk(self.R).indices

    def _write_block(self, s):
        """The next block: the root, which is the last known token, and the tree's candidates behind it."""
        root = s.tokens.gather(1, s.position[:, None])
        candidates = s.guesses.flatten(1)[:, self.source]                   # (B, N - 1)
        s.block.copy_(torch.cat([root, candidates], dim=1))

    def _prefill(self, s):
        """Read the next CHUNK tokens of all prompts; always so many, so that no new length needs a new program."""
        along = torch.arange(CHUNK, device=self.device)
        idx = s.tokens.gather(1, (s.chunk[:, None] + along).clamp(max=self.slots - 1))
        x = s.read(self.gpt, self.reading, s.caches, idx, s.chunk, along, along[:, None] >= along)
        last = s.position[:, None] - s.chunk[:, None] + torch.arange(-self.W, 0, device=self.device)    # (B, W)
        here = ((last >= 0) & (last < CHUNK))[:, :, None, None]             # a prompt's last W may be in two chunks
        s.hidden.copy_(torch.where(here, x[s.row, last.clamp(0, CHUNK - 1)], s.hidden))
        s.chunk.add_(CHUNK)

    def _first_block(self, s):
        """The first block of a text, from the hidden states that _prefill kept; where there is no token, from zeros."""
        if self.H:
            position = s.position[:, None] + torch.arange(-self.W, 0, device=self.device)   # (B, W)
            s.guesses.copy_(self._draft(s, self._logits(s.hidden)[:, :, 1:], position))
        self._write_block(s)

    def _step(self, s):
        """One step of all rows. Nothing in it waits for the host, and every shape is fixed."""
        x = read(self.gpt, self.reading, s.caches, s.block, s.position, self.depth, self.visible)
        logits = self._logits(x)                                            # (B, N, 1 + H, V)
        place = s.position[:, None] + 1 + self.depth                        # of the tokens after the block's
        target = argmax(self.scores(logits[:, :, 0], s.noise_row, place))   # (B, N)

        hit = (s.block == target[:, self.parent]) | (self.depth == 0)       # (B, N): the model would say so here
        alive = (hit[:, None] | ~self.visible).all(-1)                      # (B, N): and so would all before it
        best = torch.where(alive, self.depth, -1).argmax(1)                 # (B,) the deepest such node
        n, path = self.depth[best], self.path[best]                         # (B,) accepted candidates, (B, D + 1) nodes
        emitted = target.gather(1, path)                                    # (B, D + 1), the first n + 1 of them good

        active = s.position < s.limit
        along = torch.arange(self.D + 1, device=self.device)
        good = along <= n[:, None]                                          # (B, D + 1)
        place = s.position[:, None] + 1 + along
        s.steps.add_(active)
        s.accepted.add_((good & active[:, None]).sum(0))
        s.tokens[s.row, place] = emitted                                    # beyond the good ones: overwritten later
        s.node[s.row, place] = F.pad(path[:, 1:], (0, 1))                   # 0 at the end: the model's own
        stopped = torch.where((emitted == s.stop) & good, place, self.slots).amin(1)
        s.limit.copy_(torch.minimum(s.limit, stopped))

        if self.branching:                                                  # in a chain they lie there already
            start = s.row * self.slots + s.position[:, None]                # the path's keys and values, to their slots
            for layer in (layer for cache in s.caches for layer in cache.layers):
                layer.index_copy_(0, (start + along).flatten(), layer[(start + path).flatten()])
        if self.H:                                                          # the W newest tokens that were read lie
            back = n[:, None] + 1 + torch.arange(-self.W, 0, device=self.device)    # so far along the path, (B, W), or
            newest = logits[:, :, 1:][s.row, path.gather(1, back.clamp(min=0))]     # before it, where back < 0
            new = self._draft(s, newest, s.position[:, None] + back)        # (B, W, H, R)
            old = s.guesses[s.row, (back + self.W).clamp(max=self.W - 1)]
            s.guesses.copy_(torch.where((back >= 0)[:, :, None, None], new, old))
        s.position.copy_(torch.minimum(s.position + n + 1, s.limit))        # a finished row stays where it is
        self._write_block(s)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, stop_token=None, first_row=0, record=False):
        """Continue each prompt (a list of token lists, of any lengths) by up to max_new_tokens. -> Generation.

        first_row: number of the first prompt's row in the sampling noise, so that a large set of prompts gives the same
        texts however it is cut into batches. record: also keep every block (slower).
        Raises InputError for an empty prompt, token ids out of range, or more tokens than the context holds.
        """
        prompts = [[int(t) for t in p] for p in prompts]
        check_prompts(prompts, max_new_tokens, self.config, stop_token, self.max_length)
        B, lengths = len(prompts), torch.tensor([len(p) for p in prompts], device=self.device)
        s, history = self._state(B), []
        start = clock(self.device)
        # All but the last token of each prompt is read; the last one is the root of the first block. Ragged prompts are
        # padded on the right: what is cached beyond a prompt's end is overwritten before anyone may see it.
        text = torch.zeros(B, self.slots, dtype=torch.long)
        for i, p in enumerate(prompts):
            text[i, :len(p)] = torch.tensor(p)
        s.tokens.copy_(text)
        s.noise_row.copy_(s.row + first_row)
        s.stop.fill_(-1 if stop_token is None else stop_token)
        s.limit.copy_(lengths + max_new_tokens - 1)
        s.position.copy_(lengths - 1)
        for _ in range(0, max(map(len, prompts)) - 1, CHUNK):
            s.prefill()
        s.first_block()
        while (left := int((s.limit - s.position).max())) > 0:              # while writing the host looks only here:
            sure = -(-left // (self.D + 1))                                 # at least so many steps are still needed,
            for _ in range(sure if stop_token is None else min(sure, 16)):  # unless a stop token comes
                if record:
                    history.append((s.position.tolist(), s.block.tolist()))
                s.step()
        seconds = clock(self.device) - start

        new = [(len(p), end + 1) for p, end in zip(prompts, s.limit.tolist())]
        depth = self.depth.tolist()
        nodes = [t[a:b] for t, (a, b) in zip(s.node.tolist(), new)]
        steps, accepted = int(s.steps.sum()), s.accepted.tolist()
        return Generation(
            tokens=[t[a:b] for t, (a, b) in zip(s.tokens.tolist(), new)], nodes=nodes,
            distances=[[depth[i] + 1 for i in row] for row in nodes], steps=steps,
            tokens_per_step=sum(b - a for a, b in new) / steps,
            accepted={d + 1: accepted[d] / steps for d in range(1, self.D + 1)}, seconds=seconds, history=history)


def clock(device):
    """The time in seconds, when all that was asked of the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def ready(model, dtype=None):
    """The model in eval mode and dtype (None: its own), ready for decoding: itself, or else a copy."""
    weight = model.gpt.lm_head.weight
    if model.training or dtype not in (None, weight.dtype):
        model = copy.deepcopy(model).eval().to(dtype or weight.dtype)
    return model


def read(gpt, heads, caches, idx, start, depth, visible):
    """Read a block into the caches. Token i of idx (B, n) stands at start + depth[i] of its text, its keys and values
    go to slot start + i, and it sees all before `start` and its ancestors, visible (n, n).
    heads: (head, mix) pairs, mix as in weighted_hidden_states or None. -> (B, n, 1 + H, C): final hidden states, and
    what the heads made of them."""
    B, n = idx.shape
    S, device = caches[0].slots, idx.device
    # What lies beyond the end (padding, or a block that overshoots) goes to the last slot, which nobody ever sees.
    slots = (start[:, None] + torch.arange(n, device=device)).clamp(max=S - 1)
    slots = (slots + S * torch.arange(B, device=device)[:, None]).flatten()
    mask = block_mask(start, visible, S, caches[0].layers[0].dtype)
    position = (start[:, None] + depth).clamp(max=gpt.config.block_size - 1)
    stream = gpt.residual_stream(idx, position, caches[0], slots, mask)
    h = gpt.transformer.ln_f(stream[-1])                              # (B, n, C)
    out = [h]
    for (head, mix), cache in zip(heads, caches[1:]):
        z = h if mix is None else weighted_hidden_states(
            torch.stack([gpt.transformer.ln_f(x) for x in stream[1:]], dim=2), mix)
        out.append(head(z, cache, slots, mask))
    return torch.stack(out, dim=2)


# torch.compile keeps its programs with a function's code, searches them at every call and gives up after eight. A copy
# of the code for each use keeps that search short and each use its own programs.

def own_program(f, device, **options):
    """f compiled, as a function with code of its own."""
    f = FunctionType(f.__code__.replace(), f.__globals__, f.__name__)
    if device.type == "cuda":                                               # what several kernels read is made once,
        options["realize_reads_threshold"] = 1                              # not anew in every layer, as the mask was
    return torch.compile(f, fullgraph=True, dynamic=False, options=options)


@contextmanager
def packed_weights(gpt):
    """On a CPU, compile with the weights frozen into the program where that pays: in 16 bits and for large weights.
    They are then packed for oneDNN's kernels, which read them nearly as fast as the memory delivers them."""
    weight, precision = gpt.lm_head.weight, torch.backends.mkldnn.matmul.fp32_precision
    exact = weight.dtype == torch.float32
    if weight.device.type != "cpu" or exact and gpt.config.n_embd < 384:
        yield
        return
    # Inductor packs float32 weights for MKL instead, which on AMD's CPUs is several times slower, unless this global
    # flag allows a lower precision. It is set while Inductor chooses, and reset before anything of use is computed.
    try:
        if exact:
            torch.backends.mkldnn.matmul.fp32_precision = "tf32"
        with torch._inductor.config.patch(freezing=True):
            yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = precision


readers = weakref.WeakKeyDictionary()                                       # {GPT: {weights and shapes: its `read`}}


def compile_read(decoder, s):
    """`read` for chunks of prompts, one program for all decoders of a GPT whose memory has the same shapes."""
    gpt, depth = decoder.gpt, torch.arange(CHUNK, device=decoder.device)
    weights = sum(p._version for p in gpt.parameters())                     # counts changes: they may be frozen into it
    key = weights, len(s.tokens), decoder.slots, *decoder.reading
    program = readers.setdefault(gpt, {}).setdefault(key, own_program(read, decoder.device))
    with packed_weights(gpt):
        program(gpt, decoder.reading, s.caches, s.tokens.new_zeros(len(s.tokens), CHUNK), s.position, depth,
                depth[:, None] >= depth)
    return program


def compile_step(decoder, s):
    """decoder._step(s) as a function without arguments, one compiled program."""
    # It is always called with these two, so whether it still fits is not checked at each call.
    program = own_program(Decoder._step, decoder.device, guard_filter_fn=lambda guards: [False] * len(guards))
    with packed_weights(decoder.gpt):
        program(decoder, s)                                                 # on a state that is reset before it is used
    return partial(program, decoder, s)


# What only CUDA needs. Everywhere else these do nothing.

ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]               # to compare: add SDPBackend.CUDNN_ATTENTION
PADDING = {"cuda": 64}                                                      # rows of logits that its kernels like


@contextmanager
def exact_kernels(device):
    """Choose CUDA's kernels so that a block's numbers differ little from a single token's: products that are summed in
    float32, also those of 16 bits, and no attention by cuDNN, which has had faults under masks (pytorch issues 193893,
    196678)."""
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        with sdpa_kernel(ATTENTION):
            yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = allowed


def launcher(f, device, capture):
    """f as it is called for one step after another; on CUDA, with `capture`, a graph that is replayed: one launch."""
    if device.type != "cuda":
        return f

    def run():
        with exact_kernels(device):
            f()
    if not capture:
        return run
    with torch.cuda.device(device):
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                                       # what allocates at first use does it here
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, stream=side):
            run()

    def replay(owner_of_the_kernels=f):
        graph.replay()
    return replay


def padded(linear):
    """A linear layer without bias, on CUDA with zero rows until their number suits its kernels (50,257 is odd): itself,
    or else a copy."""
    missing = -linear.out_features % PADDING.get(linear.weight.device.type, 1)
    if missing == 0:
        return linear
    wider = torch.nn.Linear(linear.in_features, linear.out_features + missing, bias=False, device=linear.weight.device,
                           dtype=linear.weight.dtype)
    with torch.no_grad():
        wider.weight.copy_(F.pad(linear.weight, (0, 0, 0, missing)))
    return wider


def check_prompts(prompts, max_new_tokens, config, stop_token=None, max_length=None):
    """Raise InputError unless all prompts can be continued by max_new_tokens, within max_length if that is given."""
    room, what = (config.block_size, "the model's context") if max_length in (None, config.block_size) else (
        max_length, "the decoder's max_length")
    if stop_token is not None and not 0 <= stop_token < config.vocab_size:
        raise InputError(f"the stop token must be one of 0..{config.vocab_size - 1}, not {stop_token}")
    if not prompts:
        raise InputError("there is no prompt")
    if max_new_tokens < 1:
        raise InputError(f"the number of new tokens must be at least 1, not {max_new_tokens}")
    for p in prompts:
        if not p:
            raise InputError("a prompt is empty; give at least one token")
        if min(p) < 0 or max(p) >= config.vocab_size:
            raise InputError(f"a prompt has a token id outside 0..{config.vocab_size - 1}; is it another tokenizer's?")
        if len(p) + max_new_tokens > room:
            raise InputError(f"{len(p)} prompt tokens and {max_new_tokens} new ones exceed {what} of {room}; shorten "
                             f"the prompt or ask for at most {max(0, room - len(p))} new tokens")


# ---------------------------------------------------------------------------------------------------------------------
# What held-out text would accept, and the tree that makes the most of it

def expected_tokens_per_step(acceptance):
    """E = 1 + sum over m of a_2 * ... * a_(m+1), where a_j is the probability that the draft for distance j is right
    given that all nearer ones were; acceptance is the sequence a_2, a_3, ... (L-MTP, theorem on expected length)."""
    expected = reached = 1.0
    for a in acceptance:
        reached *= a
        expected += reached
    return expected


@torch.no_grad()
def guess_hits(model, windows, sources, ranks=1):
    """Which guesses real text bears out, by teacher forcing: every guess is made from real text and compared with it.

    windows (B, T + 1) int64; sources: (offset o, look-back b) pairs. -> {(o, b, r): bool (B, n)}: at each of n
    positions t, whether the r-th best guess that offset o made at t - b, about token t + o - b, is right. Raises
    InputError when the windows are too short.
    """
    first = max((b for _, b in sources), default=0)
    end = windows.shape[1] - max((o - b for o, b in sources), default=1)    # t runs over first..end - 1
    if end <= first:
        raise InputError(f"windows of {windows.shape[1]} tokens are too short for the sources {sources}")
    windows = windows.to(model.gpt.lm_head.weight.device)
    guess = {o: [] for o, _ in sources}
    for part in windows.split(4):                                           # logits are large: a few rows at a time
        h = model.hidden_states(part[:, :-1])                               # (4, T, ...)
        for o in guess:
            guess[o].append(model.offset_logits(h, o).topk(ranks).indices)
    guess = {o: torch.cat(parts) for o, parts in guess.items()}             # (B, T, ranks): [:, t] is about t + o
    return {(o, b, r): (guess[o][:, first - b:end - b, r] == windows[:, first + o - b:end + o - b]).cpu()
            for o, b in sources for r in range(ranks)}


def accepted_depths(tree, hits):
    """How many candidates of a tree each position would accept: hits as from guess_hits -> (B, n) int64."""
    alive, depth = [torch.tensor(True)], depths(tree)
    accepted = torch.tensor(0)
    for i, (parent, *source) in enumerate(tree, 1):
        alive.append(alive[parent] & hits[tuple(source)])                   # (B, n)
        accepted = torch.maximum(accepted, alive[i] * depth[i])
    return accepted


def walk(accepted):
    """The steps of a decoder that walks along the text: accepted (B, n) -> how many candidates each step accepts."""
    steps = []
    for row in accepted.tolist():
        t = 0
        while t < len(row):
            steps.append(row[t])
            t += row[t] + 1
    return steps


def held_out_acceptance(model, windows, tree):
    """How real text would be drafted. Greedy text of a small model falls into loops that any drafter predicts; this
    does not depend on them.

    windows (B, T + 1) int64. Returns three things: the tokens per step of a decoder that walks along the real text;
    {distance j: share of its steps in which a candidate at distance j is accepted}; and {j: a_j} over all positions,
    as expected_tokens_per_step wants it. That formula says more than the walk finds: a decoder takes long steps
    through easy text, so most of its steps begin where text is hard.
    """
    if not tree:
        return 1.0, {}, {}
    sources = list(dict.fromkeys((node.offset, node.look_back) for node in tree))
    accepted = accepted_depths(tree, guess_hits(model, windows, sources, 1 + max(node.rank for node in tree)))
    steps, reached = walk(accepted), range(1, 1 + max(depths(tree)))
    return (1 + statistics.fmean(steps), {d + 1: statistics.fmean(n >= d for n in steps) for d in reached},
            {d + 1: (accepted >= d).sum().item() / max(1, (accepted >= d - 1).sum().item()) for d in reached})


def grow_tree(hits, size):
    """The tree of up to `size` nodes that accepts most, node by node: each time the candidate that is accepted most
    often where nothing at its place is yet (Medusa, arXiv 2401.10774). The first k nodes are the tree for k.

    The gain of a node is counted, not multiplied from accuracies: guesses at different distances are not independent,
    and two sources often guess the same. hits as from guess_hits.
    """
    by_distance = {}
    for source in hits:
        by_distance.setdefault(source[0] - source[1], []).append(source)
    matrix = {j: torch.stack([hits[c].flatten() for c in found]).float() for j, found in by_distance.items()}
    free = [torch.ones(next(iter(matrix.values())).shape[1])] if hits else []   # positions where node i is accepted and
    tree, depth, gains = [], [0], []                                            # none of its children is
    while len(tree) < size:
        for i in range(len(gains), len(free)):                              # what each child of node i would gain
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
    """Seconds that f() takes, the mean of n calls in a row; on CUDA by events, so that nothing waits between them."""
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
    """Seconds per step of each decoder half-way through its context, medians of rounds in which they take turns."""
    states, counts = [decoder._state(batch_size) for decoder in decoders], []
    for decoder, s in zip(decoders, states):
        s.position.fill_(decoder.max_length // 2)
        s.limit.copy_(s.position)                                           # a finished row stays, and works as ever
        s.step()
        counts.append(1 + int(seconds / timed(s.step, decoder.device, 8)))
    found = [[timed(s.step, decoder.device, n) for decoder, s, n in zip(decoders, states, counts)]
             for _ in range(rounds)]
    return [statistics.median(f) for f in zip(*found)]


BLOCKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 48, 64)             # sizes that calibrate tries


def calibrate(model, windows, nodes=None, batch_size=1, dtype=None, compile=False, ranks=8, max_length=None,
              progress=True):
    """Find the best tree of candidates for this model on this machine, from held-out text: windows (B, T + 1) int64.

    With `nodes`, the tree of so many nodes that accepts most. Without, the one that is expected to write most tokens
    per second: for growing blocks the step is measured against NTP's, and the tree with the best quotient of tokens per
    step and relative cost is kept, down to a chain or to NTP, the empty tree. It stops where even the tokens of the
    largest tree could not pay for the block. Costs are those of greedy steps; sampling adds a little for each guess.
    -> dict(tree, table: a list of dict(block, tokens_per_step, cost, seconds_per_step, speedup), accuracy: how often
    the guesses of each rank are right, {"offset o, look-back b": [of rank 0, 1, ...]})
    """
    sources = [(o, o - j) for j in range(2, model.offsets[-1] + 1) for o in model.offsets if o >= j]
    hits = guess_hits(model, windows, sources, min(ranks, model.gpt.config.vocab_size))
    tree = grow_tree(hits, BLOCKS[-1] - 1 if nodes is None else nodes)
    accuracy = {}
    for (o, b, _), hit in hits.items():                                     # in order of rank
        accuracy.setdefault(f"offset {o}, look-back {b}", []).append(hit.float().mean().item())

    def tokens_per_step(tree):
        return 1 + statistics.fmean(walk(accepted_depths(tree, hits))) if tree else 1.0
    if nodes is not None:
        table = [dict(block=1 + len(tree), tokens_per_step=tokens_per_step(tree))]
        return dict(tree=tree, table=table, accuracy=accuracy)
    ntp, table, best, model = None, [], 0.0, ready(model, dtype)
    for block in Progress([b for b in BLOCKS if b <= 1 + len(tree)], progress, desc="calibrate", unit="block"):
        decoder = Decoder(model, tree=tree[:block - 1], compile=compile, max_length=max_length)
        ntp = ntp or decoder
        base, seconds = step_latencies([ntp, decoder], batch_size)
        per_step, cost = tokens_per_step(tree[:block - 1]), seconds / base
        table.append(dict(block=block, tokens_per_step=per_step, cost=cost, seconds_per_step=seconds,
                          speedup=per_step / cost))
        best = max(best, table[-1]["speedup"])
        if tokens_per_step(tree) / cost < best:
            break
    block = max(table, key=lambda row: row["speedup"])["block"]
    return dict(tree=tree[:block - 1], table=table, accuracy=accuracy)


def load_tree(path, offsets):
    """The tree that `decode.py --calibrate` saved, None where there is none. Raises InputError when it is damaged."""
    try:
        return check_tree(json.loads(path.read_text())["tree"], offsets)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a tree for this model ({error}); make it again with --calibrate") from None


# ---------------------------------------------------------------------------------------------------------------------
# Comparing methods

def method_name(tree):
    """NTP, MTP, leap with its stride, mixed (any offsets), or tree, also for a chain from other sources."""
    offsets = offsets_of(tree)
    strides = {b - a for a, b in zip(offsets, offsets[1:])}
    if tree != chain(draft_sources(offsets)):
        return "tree"
    if len(strides) > 1:
        return "mixed"
    return {0: "NTP", 1: "MTP"}.get(stride := max(strides, default=0), f"leap k={stride}")


def default_methods(offsets):
    """NTP, the papers' four-token MTP and stride-2 leap as far as the offsets have them, and all offsets at once."""
    found = [(1,)]
    for stride in (1, 2):
        known = [leap_offsets(n, stride) for n in (4, 3, 2) if set(leap_offsets(n, stride)) <= set(offsets)]
        found += known[:1]
    return list(dict.fromkeys(found + [tuple(offsets)]))


def held_out_records(model, corpus, methods):
    """A record for each method, as `compare` makes, of how it would draft a corpus's held-out text."""
    records = []
    for m in methods:
        if 2 * offsets_of(m)[-1] < model.gpt.config.block_size:             # else no window is long enough
            windows = corpus.windows("val", 64, model.gpt.config.block_size + 1)[::2]   # --calibrate uses the others
            per_step, accepted, a = held_out_acceptance(model, windows, m)
            records.append(dict(method=method_name(m), offsets=offsets_of(m), block=1 + len(m),
                                tokens_per_step=per_step, accepted=accepted, acceptance=a,
                                expected_tokens_per_step=expected_tokens_per_step(a.values())))
    return records


@torch.no_grad()
def check_rounding(decoder, prompts, texts):
    """Whether a text is what the model says, but for rounding: each emitted token is teacher-forced, given the text
    before it, with the decoder's weights in float32, or in float64 where the decoder has float32. prompts, texts: lists
    of tokens; text i was sampled as row i. -> dict of counts over all tokens:

    argmax: the model's choice; near_tie: rounding could have chosen it; neither: probably an error. It could choose a
    token whose score is at most `margin` below the best: twice the largest distance, on this text and among the eight
    best tokens, between the scores of a pass in the decoder's dtype and exact ones. largest_gap: the largest needed.
    """
    exact = copy.deepcopy(decoder.gpt).to(torch.float64 if decoder.dtype == torch.float32 else torch.float32)
    counts = dict(argmax=0, near_tie=0, neither=0, margin=0.0, largest_gap=0.0)
    for i, (prompt, new) in enumerate(zip(prompts, texts)):
        text = torch.tensor([[*prompt, *new]], device=decoder.device)
        place = torch.arange(len(prompt), text.shape[1], device=decoder.device)[None]
        row = torch.full((1, 1), i, device=decoder.device)
        with exact_kernels(decoder.device):
            scores, rounded = (decoder.scores(gpt(text[:, :-1])[0][:, len(prompt) - 1:].float(), row, place)[0]
                               for gpt in (exact, decoder.gpt))             # (n, V)
        best = scores.topk(min(8, scores.shape[-1])).indices
        margin = 2 * (scores - rounded).gather(1, best).abs().max()
        gap = scores.amax(-1) - scores.gather(1, text[0, len(prompt):, None])[:, 0]
        near = gap[(gap > 0) & (gap <= margin)]
        counts["argmax"] += int((gap == 0).sum())
        counts["near_tie"] += len(near)
        counts["neither"] += int((gap > margin).sum())
        counts["margin"] = max(counts["margin"], margin.item())
        counts["largest_gap"] = max([counts["largest_gap"], *near.tolist()])
    return counts


def compare(model, methods, prompts, new_tokens, temperatures=(0.0, 1.0), rounds=3, compile=False, dtype=None,
            top_k=None, top_p=None, seed=0, batch_size=1, progress=True):
    """Time every method on the same prompts, interleaved. methods: list of trees, the first being the baseline.

    Returns (records, generations): a record per temperature and method, with medians over the rounds, and
    generations[temperature][tree], the list of Generations of the last round.
    """
    model = ready(model, dtype)                                             # once for all decoders
    batches = [prompts[i:i + batch_size] for i in range(0, len(prompts), batch_size)]
    max_length = max(map(len, prompts)) + new_tokens
    bar = Progress(None, progress, total=len(methods) * len(temperatures) * (1 + rounds), unit="run")
    records, generations = [], {}
    for temperature in temperatures:
        decoders = {}
        for m in methods:                                                   # not timed: compiles, touches all memory
            bar.set_description(f"{'compile' if compile else 'warm up'} {method_name(m)}, temperature {temperature:g}")
            decoders[m] = Decoder(model, tree=m, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                                  compile=compile, max_length=max_length)
            for size in {len(b) for b in batches}:
                decoders[m].generate(prompts[:1] * size, min(new_tokens, 4 * decoders[m].N))
            bar.update()
        speed = {m: [] for m in methods}
        for r in range(rounds):
            last = {m: [] for m in methods}
            bar.set_description(f"temperature {temperature:g}, round {r + 1}")
            for i, batch in enumerate(batches):                             # all methods take turns at each batch
                for m, decoder in decoders.items():
                    last[m].append(decoder.generate(batch, new_tokens, first_row=i * batch_size))
            bar.update(len(methods))
            for m, done in last.items():
                speed[m].append(sum(len(t) for g in done for t in g.tokens) / sum(g.seconds for g in done))
        texts = {m: [t for g in done for t in g.tokens] for m, done in last.items()}
        identical = {m: text == texts[methods[0]] for m, text in texts.items()}
        for m, done in last.items():
            speedup = statistics.median(a / b for a, b in zip(speed[m], speed[methods[0]]))
            steps = sum(g.steps for g in done)
            per_step = sum(map(len, texts[m])) / steps
            records.append(dict(
                temperature=temperature, method=method_name(m), offsets=offsets_of(m), block=1 + len(m),
                tokens_per_step=per_step, tokens_per_second=statistics.median(speed[m]), speedup=speedup,
                efficiency=speedup / per_step,
                accepted={j: sum(g.accepted[j] * g.steps for g in done) / steps for j in done[0].accepted},
                identical=identical[m]))
            # In float32 texts differ where a near-tie falls another way for a block than for a token, as on some GPUs.
            rounded = decoders[m].dtype != torch.float32 or not all(identical.values())
            if rounded and top_k is None and top_p is None:                 # these have edges that move
                records[-1]["rounding"] = check_rounding(decoders[m], prompts, texts[m])
        generations[temperature] = last
    bar.close()
    return records, generations


def print_table(title, records):
    """Print records of `compare`, or of held_out_acceptance in the same form, as a table."""
    print(f"\n{title}")
    print(f"{'method':10}{'offsets':14}{'block':>5}{'tokens/step':>13}{'tokens/s':>10}{'speedup':>9}"
          f"{'efficiency':>12}  {'text':11}accepted at distance 2, 3, ...")
    for r in records:
        timed, text = " " * 33, ""                                          # held-out text is not generated
        if "speedup" in r:
            timed = f"{r['tokens_per_second']:10,.0f}{r['speedup']:8.2f}x{r['efficiency']:12.2f}  "
            text = "identical" if r["identical"] else "DIFFERENT"
        if "rounding" in r:                                                 # then what counts is who said so
            ties = r["rounding"]["near_tie"]
            if r["rounding"]["neither"]:
                text = f"{r['rounding']['neither']} WRONG"
            elif r["identical"] or ties or records[0]["rounding"]["near_tie"]:  # of which there must be one, to differ
                text = f"{ties} near-ties"
        print(f"{r['method']:10}{','.join(map(str, r['offsets'])):14}{r['block']:5}{r['tokens_per_step']:13.2f}{timed}"
              f"{text:11}" + " ".join(f"{share:4.0%}" for share in r["accepted"].values()))
    rounding = [r["rounding"] for r in records if "rounding" in r]
    if rounding:
        gap, margin = (max(r[key] for r in rounding) for key in ("largest_gap", "margin"))
        print(f"near-ties: tokens that are not the argmax, computed more precisely and given the text before them, but "
              f"within\nthe rounding of it (at most {gap:.2g} below; rounding moves a difference by up to {margin:.2g}); "
              "all others are,\nexcept those called WRONG")


# ---------------------------------------------------------------------------------------------------------------------
# Text that the model writes itself

def write_corpus_of_its_own(model, corpus, folder, tokens, temperature=1.0, top_k=None, top_p=None, seed=0,
                            batch_size=32, prompt_tokens=16, dtype=None, compile=False, source="", progress=True):
    """Generate about `tokens` tokens and write them as a corpus: what heads on a frozen backbone should be trained on,
    which then learn to foretell this model and not the people who wrote `corpus` (self-distillation; L-MTP, stage 1).

    Every document is a window of prompt_tokens of the training split, which the model continues to the end of its
    context; each twentieth is for validation. -> the corpus's folder. Raises InputError and CorpusError.
    """
    length = model.gpt.config.block_size - prompt_tokens
    check_prompts([[0] * prompt_tokens], max(1, length), model.gpt.config)
    decoder = Decoder(model, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, dtype=dtype, compile=compile)
    rows = max(20, -(-tokens // length))                                    # at least one for validation
    prompts = corpus.windows("train", rows, prompt_tokens).tolist()
    texts = []
    with Progress(None, progress, total=rows * length, desc="generate", unit="token", unit_scale=True) as bar:
        for i in range(0, rows, batch_size):                                # row i's noise is its own in any batch
            part = prompts[i:i + batch_size]
            filled = part + part[:1] * (batch_size - len(part))             # one shape, one program
            texts += decoder.generate(filled, length, first_row=i).tokens[:len(part)]
            bar.update(len(part) * length)
    documents = [np.array(p + t, dtype="<u2") for p, t in zip(prompts, texts)]
    write_corpus(Path(folder), dict(train=[d for i, d in enumerate(documents) if i % 20], val=documents[::20]),
                 corpus.tokenizer, dict(source=f"{OWN_TEXT}{source}", tokenizer=corpus.meta["tokenizer"], seed=seed,
                                        temperature=temperature, top_k=top_k, top_p=top_p))
    return Path(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Showing where a text came from

SHADES = (157, 121, 86, 81, 75, 105, 141, 177)                              # 256-colour codes, near to far


def trace(generation, tree, tokenizer, color=True):
    """The first row's new text, showing where each token came from: the model itself (plain), or a candidate, shaded by
    its distance and underlined where it was made by looking back. Without colour each step stands in brackets."""
    style = {i: f"38;5;16;48;5;{SHADES[min(d - 1, len(SHADES) - 1)]}" + (";4" if node.look_back else "")
             for i, (node, d) in enumerate(zip(tree, depths(tree)[1:]), 1)}
    decoder, out, text = codecs.getincrementaldecoder("utf-8")("replace"), [], ""
    for token, node in zip(generation.tokens[0], generation.nodes[0]):
        text += decoder.decode(tokenizer.decode_single_token_bytes(token))  # a character may take several tokens
        if color:
            out += [f"\033[{style[node]}m{part}\033[0m" if node and part.strip("\n") else part
                    for part in re.split("(\n)", text)]
            text = ""
        elif node == 0:                                                     # the last token of its step
            out.append(f"[{text}]")
            text = ""
    if text:                                                                # the last step was cut short
        out.append(f"[{text}]")
    legend = "  ".join(f"\033[38;5;16;48;5;{SHADES[min(j - 2, len(SHADES) - 1)]}m{j}\033[0m"
                       for j in sorted({d + 1 for d in depths(tree)[1:]}))
    return "".join(out) + "\n" + (f"guessed at distance {legend}, underlined: by looking back" if color
                                  else "(one step per bracket)")


def html_page(title, generation, tree, tokenizer, prompt):
    """A self-contained page of the first row: tokens coloured by distance, and on hover where each came from, what else
    the step had guessed, and the tokens per step so far. `generation` needs record=True."""
    depth = depths(tree)
    text = codecs.getincrementaldecoder("utf-8")("replace")

    def origin(i):                                                          # distance, offset, look-back, rank
        return [depth[i] + 1, *tree[i - 1][1:]]
    tokens, steps, done = [], [], 0
    roots = [position[0] for position, _ in generation.history] + [len(prompt) + len(generation.tokens[0]) - 1]
    for (_, block), here, there in zip(generation.history, roots, roots[1:]):
        if there == here:                                                   # the row had ended
            continue
        nodes = generation.nodes[0][done:done + there - here]
        for token, i in zip(generation.tokens[0][done:], nodes):
            part = text.decode(tokenizer.decode_single_token_bytes(token))  # a character may take several tokens
            tokens.append([part, len(steps), origin(i) if i else None])
        done += there - here
        rejected = [[tokenizer.decode_single_token_bytes(block[0][i]).decode("utf-8", "replace"), *origin(i)]
                    for i in range(1, len(block[0])) if i not in nodes]
        steps.append(dict(accepted=sum(i > 0 for i in nodes), rejected=rejected, rate=done / (len(steps) + 1)))
    about = (f"{done} tokens in {len(steps)} steps, {done / len(steps):.2f} per step; each step is one forward pass of "
             f"{len(depth)} tokens. Hover over a token.")
    data = dict(tokens=tokens, steps=steps, about=about, prompt=tokenizer.decode(prompt),
                distances=sorted({d + 1 for d in depth[1:]}), back=any(node.look_back for node in tree))
    safe = json.dumps(data).replace("<", "\\u003c")                         # nothing in the text can end the script
    page = (Path(__file__).parent / "docs" / "generation.html").read_text()
    return page.replace("{{title}}", html.escape(title)).replace("{{data}}", safe)


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def parse_args():
    """The command line as a namespace."""
    p = argparse.ArgumentParser(
        prog="decode.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Generate the same text with NTP, MTP and leap decoding and compare: tokens per step, tokens per "
                    "second, speedup over NTP, and that speedup over tokens per step (1: drafting costs nothing). A "
                    "tree of candidates that --calibrate has found takes part from then on.")
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folder or checkpoint made by train.py")
    p.add_argument("--methods", nargs="+", metavar="OFFSETS", help="what to compare, as in: 1 1,2,3,4 1,3,5,7 "
                   "tree; default: what the model's offsets allow, and the tree if there is one")
    p.add_argument("--data", help="corpus whose held-out half gives the prompts; default: the one trained on")
    p.add_argument("--prompt", help="continue this text instead")
    p.add_argument("--calibrate", action="store_true", help="first find the tree of candidates that writes fastest on "
                   "this machine, from held-out text and measured steps, and save it as tree.json in the run's folder")
    p.add_argument("--tree-nodes", type=int, metavar="N", help="with --calibrate: the best tree of N candidates, "
                   "whatever they cost")
    p.add_argument("--trace", action="store_true", help="show the text, each token marked by where it came from")
    p.add_argument("--color", default="auto", choices=["auto", "always", "never"],
                   help="of the trace; auto: on a terminal")
    p.add_argument("--html", metavar="FILE", help="write a page to look at the last method's text token by token")
    p.add_argument("--prompts", type=int, default=32, help="how many held-out prompts")
    p.add_argument("--prompt-tokens", type=int, default=argparse.SUPPRESS,
                   help="their length (default: 64, or a quarter of the context if that is less)")
    p.add_argument("--new-tokens", type=int, default=argparse.SUPPRESS,
                   help="tokens to generate after each (default: what the context has room for, at most 192)")
    p.add_argument("--batch-size", type=int, default=1, help="prompts decoded at once")
    p.add_argument("--temperature", type=float, default=1.0, help="of the sampled text; greedy text is always there")
    p.add_argument("--top-k", type=int, help="sample among the k most probable tokens only")
    p.add_argument("--top-p", type=float, help="sample among the most probable tokens with this total probability only")
    p.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    p.add_argument("--rounds", type=int, default=3, help="timed repetitions; the table shows medians")
    p.add_argument("--compile", default="auto", choices=["auto", "yes", "no"],
                   help="torch.compile the step; auto: if that works here (it needs a C++ compiler)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"],
                   help="in bfloat16 a near-tie may flip a token")
    p.add_argument("--out", metavar="FILE", help="also write the table as JSON")
    p.add_argument("--write-corpus", metavar="FOLDER", help="compare nothing, but write text that the model generates "
                   "itself (at --temperature, continuing the corpus's training split) as a corpus to train heads on")
    p.add_argument("--tokens", type=int, default=1_000_000, help="how much of it, about; in batches of 32 or more")
    p.error = lambda message: p.exit(2, f"decode.py: error: {message}\n")   # one line, without the usage
    return p.parse_args()


def can_compile(device):
    """Whether torch.compile works here, found out by trying: it needs a working C++ compiler, Python's headers, ..."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception:                                                       # whatever it is, eager mode will do
        return False
    return device.type != "mps"                                             # there it is still a prototype


def title_of(tree, temperature):
    """A method and its temperature in words."""
    return f"{method_name(tree)} {','.join(map(str, offsets_of(tree)))}, temperature {temperature:g}"


def print_calibration(found):
    """Print what `calibrate` returned."""
    best = 1 + len(found["tree"])
    print("\ncalibration on held-out text: how often guesses of rank 1, 2, ... are right")
    for source, ranks in found["accuracy"].items():
        print(f"{source:24}" + " ".join(f"{share:4.0%}" for share in ranks))
    print(f"{'block':>5}{'tokens/step':>13}{'cost':>7}{'ms/step':>9}{'speedup':>9}")
    for r in found["table"]:
        timed = f"{r['cost']:7.2f}{1e3 * r['seconds_per_step']:9.2f}{r['speedup']:8.2f}x" if "cost" in r else ""
        print(f"{r['block']:5}{r['tokens_per_step']:13.2f}{timed}{'   <- chosen' * (r['block'] == best)}")
    for i, (node, d) in enumerate(zip(found["tree"], depths(found["tree"])[1:]), 1):
        print(f"node {i:2} after {node.parent:2}, distance {d + 1}: offset {node.offset}, look-back {node.look_back}, "
              f"rank {node.rank + 1}")


def can_compile_as(wanted, device):
    """Whether to compile, as --compile says. Raises InputError when it should but cannot."""
    compile = wanted != "no" and can_compile(device)
    if wanted == "yes" and not compile:
        raise InputError("torch.compile does not work here; it needs a C++ compiler and Python's headers")
    return compile


def write_own(args):
    """Do what --write-corpus says. Raises InputError before work starts, also where another corpus would be lost."""
    (run,), folder = args.runs, Path(args.write_corpus)
    model, state = load_model(run)
    corpus, device = corpus_of(run, model, state, args.data), pick_device(args.device)
    if folder.exists():
        if not folder.is_dir() or not set(os.listdir(folder)) <= CORPUS_FILES:
            raise InputError(f"--write-corpus {folder} exists and is not a corpus; choose another folder")
        if os.listdir(folder) and not Corpus(folder).meta.get("source", "").startswith(OWN_TEXT):
            raise InputError(f"--write-corpus {folder} is a corpus that no model wrote; choose another folder")
    prompt_tokens = getattr(args, "prompt_tokens", min(16, model.gpt.config.block_size // 2))
    check_prompts([[0] * prompt_tokens], max(1, model.gpt.config.block_size - prompt_tokens), model.gpt.config)
    folder.parent.mkdir(parents=True, exist_ok=True)                        # what cannot be written fails now
    start = time.perf_counter()
    write_corpus_of_its_own(
        model.to(device).eval(), corpus, folder, args.tokens, args.temperature, args.top_k, args.top_p, args.seed,
        max(args.batch_size, 32), prompt_tokens, getattr(torch, args.dtype), can_compile_as(args.compile, device), run)
    print(f"{folder}: written by {run} in {time.perf_counter() - start:.0f} s; next: python train.py --data {folder} "
          f"--init {run} --backbone-lr 0 --out runs/heads")


def report(run, model, state, args):
    """Everything decode.py shows about one run. -> its results as a dict for --out."""
    device, config = pick_device(args.device), model.gpt.config
    model = model.to(device).eval()
    methods = default_methods(model.offsets)
    if args.methods:
        methods = [check_offsets(parse_offsets(m), model.offsets) for m in args.methods if m != "tree"]
        methods = list(dict.fromkeys([(1,)] + methods))                     # the baseline comes first
    methods = [chain(draft_sources(m)) for m in methods]
    tree_file = (Path(run) if os.path.isdir(run) else Path(run).parent) / "tree.json"
    with_tree = args.calibrate or "tree" in (args.methods or ["tree"])
    tree = load_tree(tree_file, model.offsets) if with_tree and not args.calibrate else None
    if args.methods and with_tree and not args.calibrate and tree is None:
        raise InputError(f"{run} has no tree yet; find one with --calibrate")
    corpus = None
    if args.prompt is None or args.calibrate:
        corpus = corpus_of(run, model, state, args.data)
    tokenizer = corpus.tokenizer if corpus else get_tokenizer(state["tokenizer"])
    length = getattr(args, "prompt_tokens", min(64, max(1, config.block_size // 4)))
    prompts = corpus.windows("val", args.prompts, length).tolist() if args.prompt is None else [
        tokenizer.encode_ordinary(args.prompt)]
    new_tokens = getattr(args, "new_tokens", max(1, min(192, config.block_size - len(prompts[0]))))
    check_prompts(prompts, new_tokens, config)
    compile = can_compile_as(args.compile, device)

    n = sum(p.numel() for p in model.parameters())
    way = "compiled" if compile else "eager" if args.compile == "no" else "eager (torch.compile does not work here)"
    print(f"{run}: {n / 1e6:.2f}M parameters, offsets {model.offsets}, {state['step']} steps; {len(prompts)} prompts, "
          f"{new_tokens} new tokens each, batch {args.batch_size}, {way}, {args.dtype} on {device}, "
          f"{torch.get_num_threads()} threads")
    how = dict(batch_size=args.batch_size, dtype=getattr(torch, args.dtype), compile=compile)
    found = None
    if args.calibrate:
        windows = corpus.windows("val", 64, config.block_size + 1)[1::2]    # the table below shows the others
        found = calibrate(model, windows, args.tree_nodes, **how)
        print_calibration(found)
        found.update(environment=environment(device), batch_size=args.batch_size, dtype=args.dtype, compiled=compile)
        write_whole(tree_file, json.dumps(found, indent=1))
        tree = found["tree"]
    if tree is not None:
        methods = list(dict.fromkeys(methods + [tree]))
    titles = {args.temperature: f"sampled text, temperature {args.temperature:g}", 0.0: "greedy text"}
    records, generations = compare(
        model, methods, prompts, new_tokens, sorted(titles), args.rounds, top_k=args.top_k, top_p=args.top_p,
        seed=args.seed, **how)
    for temperature, title in sorted(titles.items()):
        print_table(title, [r for r in records if r["temperature"] == temperature])
    held_out = held_out_records(model, corpus, methods) if args.prompt is None else []
    if held_out:
        source = corpus.meta.get("source", "")
        source = f" {source}" if source.startswith(OWN_TEXT) else ""        # then it is not what people wrote
        print_table(f"held-out text{source}, teacher forcing", held_out)
    if args.trace or args.prompt is not None:
        color = args.color == "always" or args.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        for m in methods[1:] or methods:
            g = generations[args.temperature][m][0]
            print(f"\n{title_of(m, args.temperature)}, {g.tokens_per_step:.2f} tokens/step, after the prompt "
                  f"{tokenizer.decode(prompts[0])[-40:]!r}:")
            print(trace(g, m, tokenizer, color))
    if args.html:
        decoder = Decoder(model, tree=methods[-1], temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                          seed=args.seed, dtype=getattr(torch, args.dtype))
        g = decoder.generate(prompts[:1], new_tokens, record=True)
        title = title_of(methods[-1], args.temperature)
        write_whole(args.html, html_page(title, g, methods[-1], tokenizer, prompts[0]))
    return dict(run=str(run), parameters=n, steps=state["step"], args=vars(args), compiled=compile,
                environment=environment(device), generated=records, held_out=held_out, calibration=found)


def main():
    """Report on every run; bad input is one line and status 2."""
    args = parse_args()
    with one_line_errors("decode.py", memory="--batch-size, --prompts, --new-tokens or --tokens"):
        if args.tree_nodes is not None and not args.calibrate:
            raise InputError("--tree-nodes says how --calibrate is to choose; give both")
        if args.write_corpus is not None and (len(args.runs) > 1 or not args.write_corpus or args.prompt is not None
                                              or args.calibrate or args.out or args.html or args.trace):
            raise InputError("--write-corpus takes one RUN and a FOLDER, and neither --prompt nor --calibrate nor "
                             "--trace nor --html nor --out")
        for name in ("tokens", "prompts", "prompt_tokens", "batch_size", "rounds", "tree_nodes"):
            if getattr(args, name, None) is not None and getattr(args, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1")
        if args.write_corpus:
            return write_own(args)
        loaded = [(run, *load_checkpoint(run)) for run in args.runs]        # what is wrong is said before work starts
        for run, _, state in loaded:
            if not {"args", "step", "tokenizer"} <= state.keys():
                raise InputError(f"{run} holds a model but not what train.py saves beside it")
        for option in ("out", "html"):
            check_output(option, getattr(args, option))
        results = [report(run, model, state, args) for run, model, state in loaded]
        if args.out:
            write_whole(args.out, json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
