"""Decoding: write several tokens per forward pass, without changing the text.

    python decode.py runs/demo                          # compare NTP, MTP and leap decoding
    python decode.py runs/demo --prompt "def main("     # continue a text, coloured by source

A model that predicts several tokens can be its own draft model (blockwise parallel decoding, Stern
et al. 2018). Each step feeds a *block*: the last known token, the root, and draft tokens for the
positions after it. One forward pass gives, after each token, the *target*: what the model itself
emits there. Drafts are accepted while they equal their targets; the target after the last accepted
one is the *bonus token*. From the hidden states of the same pass, the heads draft the next block.

The text cannot change, because every emitted token is the model's own target, given all tokens
before it. At temperature T the target is argmax(logits / T + noise), and the Gumbel noise is a
fixed function of (seed, row, position, token): an exact sample of softmax(logits / T), however
many tokens are verified at once. NTP is the same code with a block of one.

From the top: the idea, picking tokens, trees, the decoder, compiling it, comparing methods.
"""
import codecs
import copy
import json
import math
import os
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import (Parser, Progress, check_output, corpus_of, environment, load_model,
                    one_line_errors, pick_device, tokenizer_of, write_whole)
from heads import DraftHeads, check_offsets, draft_sources, leap_offsets, parse_offsets
from model import InputError, KVCache, block_mask, require


# ----------------------------------------------------------------------------------------------
# The idea: one text, no cache, greedy. Everything below is this, made fast.

@torch.no_grad()
def generate_reference(model, prompt, max_new_tokens, offsets=None):
    """Continue a prompt (a list of tokens) greedily by max_new_tokens. -> the new tokens"""
    sources = draft_sources(offsets or model.offsets)  # {distance: (offset, look-back)}
    text, draft, end = list(prompt), [], len(prompt) + max_new_tokens
    while len(text) < end:
        # Verify: one pass over the text and the drafts gives the target after each of them.
        logits = model(torch.tensor([text + draft]))  # {offset: (1, T, V)}
        target = logits[1][0, len(text) - 1:].argmax(-1).tolist()
        # Accept the drafts that are targets. The target after them is the bonus token.
        n = 0
        while n < len(draft) and draft[n] == target[n]:
            n += 1
        text += draft[:n] + [target[n]]
        # Draft what follows the bonus token, from the tokens before it.
        logits, newest = model(torch.tensor([text])), len(text) - 2
        draft = [int(logits[o][0, max(0, newest - b)].argmax()) for o, b in sources.values()]
        draft = draft[:end - len(text) - 1]  # a bonus token follows the last
    return text[len(prompt):]


# ----------------------------------------------------------------------------------------------
# Picking a token

def gumbel_noise(seed, row, position, tokens):
    """Gumbel(0, 1) noise, a pure function of (seed, row, position, token).

    seed int; row and position int64 that broadcast to some (...); tokens (V,) int64 -> (..., V)
    float32. The hash is two rounds of xor-shift and multiply on 32-bit words in int64, whose
    products cannot overflow.
    """
    def mix(x):
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
        return x ^ (x >> 15)
    key = mix(mix(mix(seed) ^ row) ^ position)[..., None]  # (..., 1)
    # tokens + 0x9E3779B9 in 32 bits, as a difference: Inductor's int32 arange would overflow.
    bits = mix(key ^ mix((tokens - 0x61C88647) & 0xFFFFFFFF))  # (..., V)
    uniform = ((bits >> 9).float() + 0.5) * 2.0 ** -23  # in (0, 1), both ends excluded
    return -torch.log(-torch.log(uniform))


def filter_logits(logits, top_k=None, top_p=None):
    """Set to -inf all logits (..., V) but the top_k largest, and all beyond the smallest set of
    tokens whose probability reaches top_p. Ties of the last kept token are kept."""
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        ordered = logits.sort(dim=-1, descending=True).values
        p = ordered.softmax(-1)
        before = cumulative_sum(p) - p  # probability of better tokens
        least = ordered.masked_fill(before >= top_p, math.inf).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits


PART = 1024  # a GPU reduces a row of logits faster in parts of so many


def in_parts(x, fill):
    """(..., V) -> (..., n, PART), the last part padded with `fill`."""
    V = x.shape[-1]
    i = torch.arange(-(-V // PART) * PART, device=x.device).view(-1, PART)
    return x[..., i.clamp(max=V - 1)].masked_fill(i >= V, fill)  # F.pad may fail to compile here


def argmax(scores):
    """scores.argmax(-1), the first of several maxima: (..., V) -> (...) int64."""
    if scores.shape[-1] <= PART:
        return scores.argmax(-1)
    best, index = in_parts(scores, -math.inf).max(-1)  # (..., n)
    part = best.argmax(-1, keepdim=True)  # (..., 1)
    return (part * PART + index.gather(-1, part))[..., 0]


def cumulative_sum(p):
    """p.cumsum(-1), which Inductor cannot compile for a large V on CUDA (PyTorch issue 180221)."""
    if p.shape[-1] <= PART:
        return p.cumsum(-1)
    within = in_parts(p, 0.0).cumsum(-1)  # (..., n, PART)
    before = within[..., -1].cumsum(-1) - within[..., -1]  # (..., n)
    return (within + before[..., None]).flatten(-2)[..., :p.shape[-1]]


# ----------------------------------------------------------------------------------------------
# Trees of drafts

class Node(NamedTuple):
    """A draft: node i of a tree (the root is 0) follows its parent's token. It is the rank-th best
    token (0: the best) of an offset, read look_back positions before the newest token that has
    been read, which is the one before the root."""
    parent: int
    offset: int
    look_back: int
    rank: int = 0


def chain(sources):
    """The tree with one draft per distance: sources {distance: (offset, look-back)} -> Nodes."""
    return tuple(Node(i, *sources[j]) for i, j in enumerate(sorted(sources)))


def depths(tree):
    """The depth of the root and of every node, 1 + len(tree) ints; depth d is distance d + 1."""
    depth = [0]
    for node in tree:
        depth.append(depth[node.parent] + 1)
    return depth


def offsets_of(tree):
    """The offsets that a tree uses, 1 included."""
    return tuple(sorted({1, *(node.offset for node in tree)}))


def check_tree(tree, offsets):
    """A tree (any nested sequence) as a tuple of Nodes. Raises InputError if a node stands before
    its parent, or its source does not predict its distance, offset - look_back."""
    try:
        tree = tuple(Node(*map(int, node)) for node in tree)
    except (TypeError, ValueError):
        raise InputError("a tree is a list of nodes (parent, offset, look_back, rank)") from None
    check_offsets(offsets_of(tree), offsets)
    for i, (parent, offset, look_back, rank) in enumerate(tree, 1):
        require(0 <= parent < i, f"node {i} has parent {parent}, which does not stand before it")
        distance = depths(tree[:i])[i] + 1
        require(min(look_back, rank) >= 0 and offset - look_back == distance, f"node {i} has "
                f"distance {distance}, which cannot come from offset {offset}, look-back "
                f"{look_back}, rank {rank}")
    return tree


def tree_tables(tree, device=None):
    """A tree as tensors. For example, two drafts for the next token, with one more behind each:

        0 (root) --- 1: Node(0, 2, 0, 0) --- 3: Node(1, 3, 0, 0)
                 \\-- 2: Node(0, 2, 0, 1) --- 4: Node(2, 3, 0, 0)

        depth    0      1      1      2      2          (N,)
        parent   0      0      0      1      2          (N,)
        path     0 0 0  0 1 0  0 2 0  0 1 3  0 2 4      (N, D + 1) from the root, then zeros
        visible  10000  11000  10100  11010  10101      (N, N) bool: itself and its ancestors
        source          0      1      2      2          (N - 1,) into State.drafts, (W, H, R) flat

    -> a namespace of these, offsets (H,) and the ints N, D, W, H, R: tokens of the block, greatest
    depth, positions and heads that draft, and drafts of each.
    """
    depth, paths, offsets = depths(tree), [[0]], offsets_of(tree)[1:]
    for i, node in enumerate(tree, 1):
        paths.append(paths[node.parent] + [i])
    N, D, H = len(depth), max(depth), len(offsets)
    W = max((1 + node.look_back for node in tree), default=0)
    R = max((1 + node.rank for node in tree), default=0)
    source = [((W - 1 - look_back) * H + offsets.index(offset)) * R + rank
              for _, offset, look_back, rank in tree]
    tables = dict(
        depth=depth, parent=[0] + [node.parent for node in tree], source=source, offsets=offsets,
        path=[path + [0] * (D + 1 - len(path)) for path in paths])
    tables = {name: torch.tensor(t, dtype=torch.long, device=device) for name, t in tables.items()}
    visible = torch.tensor([[j in path for j in range(N)] for path in paths], device=device)
    return SimpleNamespace(N=N, D=D, W=W, H=H, R=R, visible=visible, **tables)


# ----------------------------------------------------------------------------------------------
# The decoder

@dataclass
class State:
    """The memory of B texts, allocated once. S slots hold a text and one more block."""
    tokens: Tensor      # (B, S) the text, prompt included
    node: Tensor        # (B, S) which node drafted each token; 0: it was a bonus token
    position: Tensor    # (B,) where the row's last known token stands, the root of its block
    limit: Tensor       # (B,) where its last wanted token stands
    stop: Tensor        # () the stop token; -1: none
    block: Tensor       # (B, N) the root and its drafts
    drafts: Tensor      # (B, W, H, R) each head's best R tokens at the W positions before the root
    row: Tensor         # (B, 1) 0 .. B-1
    noise_row: Tensor   # (B, 1) the row number that keys the sampling noise
    caches: list        # KVCache of the GPT, then of each head
    follow: Tensor = None   # (B, S) a text whose tokens are the targets


@dataclass
class Generation:
    """What Decoder.generate returns; the lists have one entry per prompt."""
    tokens: list            # the new tokens (a stop token included)
    nodes: list             # which node of the tree drafted each of them; 0: it was a bonus token
    steps: int              # forward passes after the prefill, summed over the rows
    tokens_per_step: float  # new tokens per row and step
    accepted: dict          # {distance j: fraction of steps that emitted a draft from distance j}
    seconds: float          # wall-clock time, prefill included


def accept(block, target, tree):
    """The longest path from the root on which each draft is the target after its parent. block,
    target (B, N); tree as from tree_tables. -> the number n (B,) of accepted drafts, and the path
    (B, D + 1): root, drafts, then zeros"""
    hit = (block == target[:, tree.parent]) | (tree.depth == 0)  # (B, N)
    alive = (hit[:, None] | ~tree.visible).all(-1)  # (B, N) it and all its ancestors
    best = torch.where(alive, tree.depth, -1).argmax(1)  # (B,)
    return tree.depth[best], tree.path[best]


class Decoder:
    """Generates text from a MultiTokenGPT.

    offsets      those of the model's that may draft; (1,) is NTP, None means all
    tree         the drafts, as found by experiments/calibrate.py; None: one per distance
    temperature  0 is greedy; top_k and top_p as usual; seed decides the noise
    coupled      False drafts by argmax, without the noise: same text, fewer accepted
    dtype        decode with a copy in, say, torch.bfloat16
    compile      torch.compile the step, on CUDA replayed as one graph
    max_length   the longest text, if shorter than the context (a smaller cache is faster)
    draft_vocab  the only token ids that heads draft, such as the most frequent ones: cheaper where
                 the vocabulary is large, and still the same text (FR-Spec, arXiv 2502.14856)

    The decoder uses the model's own weights where it can: make a new one after more training.
    Raises InputError for offsets that the model lacks and for an impossible tree.
    """

    def __init__(self, model, offsets=None, tree=None, *, temperature=0.0, top_k=None, top_p=None,
                 seed=0, coupled=True, dtype=None, compile=False, max_length=None,
                 draft_vocab=None):
        offsets = check_offsets(offsets or model.offsets, model.offsets)
        self.tree = check_tree(chain(draft_sources(offsets)) if tree is None else tree, offsets)
        self.config = config = model.gpt.config
        self.max_length = config.block_size if max_length is None else max_length
        require(0 <= temperature < math.inf, f"temperature must be 0 or more, not {temperature}")
        require(top_k is None or top_k > 0, f"top_k must be at least 1, not {top_k}")
        require(top_p is None or 0 < top_p <= 1, f"top_p must be in (0, 1], not {top_p}")
        require(1 <= self.max_length <= config.block_size,
                f"max_length must be in 1..{config.block_size}, not {max_length}")
        model = ready(model, dtype)
        weight, self.vocab = model.gpt.lm_head.weight, None
        self.model, self.device, self.dtype = model, weight.device, weight.dtype
        if draft_vocab is not None:
            vocab = sorted(set(draft_vocab))  # so that ties fall to the same token as without it
            require(vocab and 0 <= vocab[0] <= vocab[-1] < config.vocab_size,
                    f"draft_vocab must hold token ids in 0..{config.vocab_size - 1}")
            self.vocab = torch.tensor(vocab, device=self.device)
        self.heads = DraftHeads(model, offsets_of(self.tree), self.vocab)
        self.temperature, self.top_k, self.top_p = float(temperature), top_k, top_p
        self.seed, self.coupled, self.compile = int(seed) & 0xFFFFFFFF, coupled, compile
        self.t = t = tree_tables(self.tree, self.device)
        V = self.heads.draft_size
        require(t.R <= V, f"{t.R} drafts of a head, of {V} tokens")
        # The last block may overshoot the end. Attention kernels like multiples of 16.
        self.slots = -(-self.max_length // 16) * 16 + -(-t.N // 16) * 16
        self.states = {}  # {B: (State, step)}

    def state(self, B):
        """The memory for B rows and the step that works on it, made once. -> (State, step)"""
        if B not in self.states:
            def zeros(*shape):
                return torch.zeros(shape, dtype=torch.long, device=self.device)
            # In 16 bits, attention is several times slower on CPUs.
            dtype = torch.float32 if self.device.type == "cpu" else self.dtype
            how = dict(n_embd=self.config.n_embd, batch=B, slots=self.slots, device=self.device,
                       dtype=dtype)
            t, S = self.t, self.slots
            s = State(
                tokens=zeros(B, S), node=zeros(B, S), position=zeros(B), limit=zeros(B),
                stop=zeros(), block=zeros(B, t.N), drafts=zeros(B, t.W, t.H, t.R),
                noise_row=zeros(B, 1), row=torch.arange(B, device=self.device)[:, None],
                caches=[KVCache(self.config.n_layer, **how), *self.heads.caches(**how)])
            with exact_kernels(self.device):
                step = compile_step(self, s) if self.compile else partial(self.step, s)
            self.states[B] = s, step
        return self.states[B]

    def prefill(self, s, n):
        """Read the first n tokens of the prompts and draft the first block. Shorter prompts are
        padded on the right: what is cached there is overwritten before anything sees it."""
        start, i = torch.zeros_like(s.position), torch.arange(n, device=self.device)
        h = self.forward_block(s, s.tokens[:, :n], start, i, visible=i[:, None] >= i)
        self.draft(s, h, start, path=i.expand(len(h), n))

    def step(self, s):
        """One step of all rows. Nothing in it waits for the host, and all shapes are fixed."""
        t, start = self.t, s.position.clone()
        h = self.forward_block(s, s.block, start, t.depth, t.visible)
        target = self.verify(s, h)  # (B, N)
        n, path = accept(s.block, target, t)  # (B,), (B, D + 1)
        self.commit(s, target.gather(1, path), n, path)
        self.draft(s, h, start, path)

    def forward_block(self, s, tokens, start, depth, visible):
        """Run tokens (B, n) through the GPT. Token i stands at position start + depth[i] and sees
        all before `start` and visible[i] of the block. -> what the heads read (B, n, ...)"""
        slots, mask = self.slots_and_mask(s, start, visible)
        position = (start[:, None] + depth).clamp(max=self.config.block_size - 1)
        return self.model.read(
            self.model.gpt.residual_stream(tokens, position, s.caches[0], slots, mask))

    def slots_and_mask(self, s, start, visible):
        """Where n tokens from position `start` (B,) on are cached, slots (B * n,), and what they
        see there, a mask (B, 1, n, S); visible (n, n) as in block_mask."""
        slot = start[:, None] + torch.arange(len(visible), device=self.device)
        mask = block_mask(start, visible, self.slots, s.caches[0].layers[0].dtype)
        return (slot + self.slots * s.row).flatten(), mask

    def verify(self, s, h):
        """The target after each token of the block: h as from forward_block -> (B, N)."""
        position = s.position[:, None] + 1 + self.t.depth  # of the targets
        if s.follow is not None:
            return s.follow.gather(1, position)
        return argmax(self.scores(self.heads.next_logits(h), s.noise_row, position))

    def commit(self, s, emitted, n, path):
        """Put the first n + 1 tokens emitted (B, D + 1), their nodes, keys and values in place,
        and move the root to the last of them, or to the end of the text."""
        i = torch.arange(self.t.D + 1, device=self.device)
        position = s.position[:, None] + 1 + i  # (B, D + 1)
        s.tokens[s.row, position] = emitted  # beyond n: the root's target again, overwritten later
        s.node[s.row, position] = F.pad(path[:, 1:], (0, 1))  # the bonus token has node 0
        stopped = torch.where(emitted == s.stop, position, self.slots).amin(1)
        s.limit.copy_(torch.minimum(s.limit, stopped))
        if self.t.D + 1 < self.t.N:  # a chain lies in its slots already
            start = s.row * self.slots + s.position[:, None]
            for layer in s.caches[0].layers:  # the heads read the path only
                layer.index_copy_(0, (start + i).flatten(), layer[(start + path).flatten()])
        s.position.copy_(torch.minimum(s.position + n + 1, s.limit))  # a finished row stays

    def draft(self, s, h, start, path):
        """Draft the next block. h: as from forward_block; path (B, n): the tokens in it that
        count, from position `start` (B,) on."""
        t = self.t
        if t.H:
            # Only the W newest tokens draft, those before the root. They stand at i on the path.
            newest = s.position[:, None] + torch.arange(-t.W, 0, device=self.device)  # (B, W)
            i = newest - start[:, None]
            at = i.clamp(min=0)
            if self.heads.attend:  # to the whole path
                j = torch.arange(path.shape[1], device=self.device)
                slots, mask = self.slots_and_mask(s, start, visible=j[:, None] >= j)
                next_tokens = s.tokens.gather(1, start[:, None] + j + 1)  # (B, n)
                z = self.heads.run(h[s.row, path], next_tokens, s.caches[1:], slots, mask)
                z = z[s.row, at]  # (B, W, H, C)
            else:
                next_tokens = s.tokens.gather(1, start[:, None] + at + 1)  # (B, W)
                z = self.heads.run(h[s.row, path.gather(1, at)], next_tokens)
            logits = self.heads.logits(z)  # (B, W, H, K)
            if self.coupled:
                position = newest[:, :, None] + t.offsets  # (B, W, H) of the drafts
                logits = self.scores(logits, s.noise_row[:, :, None], position, self.vocab)
            new = argmax(logits)[..., None] if t.R == 1 else logits.topk(t.R).indices
            new = new if self.vocab is None else self.vocab[new]
            old = s.drafts[s.row, (i + t.W).clamp(max=t.W - 1)]  # tokens before the path keep them
            s.drafts.copy_(torch.where((i >= 0)[:, :, None, None], new, old))
        root = s.tokens.gather(1, s.position[:, None])
        s.block.copy_(torch.cat([root, s.drafts.flatten(1)[:, t.source]], dim=1))

    def scores(self, logits, row, position, tokens=None):
        """What the token at `position` of text `row` is the argmax of: logits (..., V) of tokens
        (V,), None: all -> (..., V).

        At temperature T, logits / T + noise (the Gumbel-max trick). The noise belongs to the
        position, so a head that drafts with it agrees more often with the model than one without
        (Gumbel coupling, Daliri et al. 2024)."""
        if self.temperature == 0:
            return logits
        logits = filter_logits(logits.float() / self.temperature, self.top_k, self.top_p)
        if tokens is None:
            tokens = torch.arange(logits.shape[-1], device=self.device)
        return logits + gumbel_noise(self.seed, row, position, tokens)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, stop_token=None, first_row=0, on_step=None,
                 follow=None):
        """Continue each prompt (a list of token lists, of any lengths). -> Generation

        first_row: the first prompt's row in the sampling noise, so that texts do not depend on
        batches. on_step(state): called before each step and at the end. follow: the tokens after
        each prompt, which become the targets: drafts are verified against this text instead of
        the model (eagerly). Raises InputError for prompts that cannot be continued so far."""
        prompts = [[int(t) for t in p] for p in prompts]
        check_prompts(prompts, max_new_tokens, self.config, stop_token, self.max_length)
        with exact_kernels(self.device):
            s, step = self.state(len(prompts))
            start = clock(self.device)

            def padded(rows):
                rows = [row + [0] * (self.slots - len(row)) for row in rows]
                return torch.tensor(rows, device=self.device)  # (B, S)
            s.tokens.copy_(padded(prompts))
            s.noise_row.copy_(s.row + first_row)
            s.stop.fill_(-1 if stop_token is None else stop_token)
            s.position.copy_(torch.tensor([len(p) - 1 for p in prompts], device=self.device))
            s.limit.copy_(s.position + max_new_tokens)
            s.follow = None
            s.drafts.zero_()
            if follow is not None:
                texts = [p + [int(t) for t in f] for p, f in zip(prompts, follow)]
                s.follow, step = padded(texts), partial(self.step, s)
            self.prefill(s, max(1, max(map(len, prompts)) - 1))
            while (left := int((s.limit - s.position).max())) > 0:  # the only wait for the device
                steps = -(-left // (self.t.D + 1))  # at least so many, unless a stop token comes
                steps = steps if stop_token is None else min(steps, 16)
                for _ in range(1 if on_step else steps):
                    if on_step:
                        on_step(s)
                    step()
        if on_step:
            on_step(s)
        seconds = clock(self.device) - start
        spans = [slice(len(p), end + 1) for p, end in zip(prompts, s.limit.tolist())]
        tokens, nodes = ([row[span] for row, span in zip(table.tolist(), spans)]
                         for table in (s.tokens, s.node))
        return Generation(tokens, nodes, *statistics_of(nodes, self.tree), seconds)


def statistics_of(nodes, tree):
    """nodes: per text, the node of each token -> steps, tokens per step, accepted."""
    depth = depths(tree)
    # A step ends with its bonus token, unless the text ends before it.
    steps = sum(row.count(0) + (row[-1] != 0) for row in nodes)
    drafted = [depth[i] + 1 for row in nodes for i in row]  # distances; 1: bonus tokens
    accepted = {j: drafted.count(j) / steps for j in range(2, max(depth) + 2)}
    return steps, len(drafted) / steps, accepted


def ready(model, dtype=None):
    """The model in eval mode and dtype (None: its own): itself, or a copy if it is not so."""
    weight = model.gpt.lm_head.weight
    if model.training or dtype not in (None, weight.dtype):
        model = copy.deepcopy(model).eval().to(dtype or weight.dtype)
    return model


def clock(device):
    """The time in seconds, once the device has done all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def check_prompts(prompts, max_new_tokens, config, stop_token=None, max_length=None):
    """Raise InputError unless all prompts can be continued by max_new_tokens within max_length."""
    V, room = config.vocab_size, max_length or config.block_size
    what = "the model's context" if room == config.block_size else "max_length"
    require(prompts and all(prompts), "there is no prompt, or one is empty")
    require(max_new_tokens > 0, f"new tokens must be at least 1, not {max_new_tokens}")
    require(0 <= min(map(min, prompts)) and max(map(max, prompts)) < V,
            f"a prompt has a token id outside 0..{V - 1}; is it another tokenizer's?")
    require(stop_token is None or 0 <= stop_token < V,
            f"the stop token must be in 0..{V - 1}, not {stop_token}")
    longest = max(map(len, prompts))
    require(longest + max_new_tokens <= room,
            f"{longest} prompt tokens and {max_new_tokens} new ones exceed {what} of {room}")


# ----------------------------------------------------------------------------------------------
# Compiling the step

def can_compile(device):
    """Whether torch.compile works here, found out by trying: it needs a compiler, headers, ..."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception:  # of whatever kind
        return False
    return device.type != "mps"  # there it is a prototype


def compile_step(decoder, s):
    """decoder.step(s) as one compiled program without arguments, on CUDA as one graph."""
    # torch.compile keeps programs with a function's code object, searches them at each call and
    # gives up after eight. A copy of the code has one program, which needs no guards.
    step = FunctionType(Decoder.step.__code__.replace(), globals(), "step")
    options = dict(guard_filter_fn=lambda guards: [False] * len(guards))
    if decoder.device.type == "cuda":
        options["realize_reads_threshold"] = 1  # compute the mask once, not anew in each layer
    program = torch.compile(step, fullgraph=True, dynamic=False, options=options)
    with packed_weights(decoder.model.gpt):
        program(decoder, s)  # `s` is reset before it is used
    step = partial(program, decoder, s)
    return step if decoder.device.type != "cuda" else captured(step, decoder.device)


@contextmanager
def packed_weights(gpt):
    """On a CPU, compile with the weights frozen into the program where that pays, in 16 bits and
    when they are large: oneDNN's kernels read such packed weights at the speed of the memory."""
    weight, matmul = gpt.lm_head.weight, torch.backends.mkldnn.matmul
    exact, precision = weight.dtype == torch.float32, matmul.fp32_precision
    if weight.device.type != "cpu" or exact and gpt.config.n_embd < 384:
        yield
        return
    # Inductor packs float32 weights for MKL, several times slower on AMD's CPUs, unless this flag
    # allows a lower precision. It is set only while Inductor chooses.
    matmul.fp32_precision = "tf32" if exact else precision
    try:
        with torch._inductor.config.patch(freezing=True):
            yield
    finally:
        matmul.fp32_precision = precision


def captured(f, device):
    """f as a CUDA graph: all its kernels in one launch."""
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # first uses allocate: do them now
                f()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            f()
    return lambda keep_alive=f: graph.replay()


ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # bench_decode.py tries cuDNN's


@contextmanager
def exact_kernels(device):
    """On CUDA, choose kernels that compute a block nearly as a single token: 16-bit products
    summed in float32, and not cuDNN's attention, which fails under some masks (PyTorch issues
    193893, 196678)."""
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


# ----------------------------------------------------------------------------------------------
# Comparing methods

def method_name(tree):
    """NTP, MTP, leap with its stride, mixed (a chain of any offsets), or tree."""
    offsets = offsets_of(tree)
    strides = {b - a for a, b in zip(offsets, offsets[1:])}
    if tree != chain(draft_sources(offsets)):
        return "tree"
    if len(strides) > 1:
        return "mixed"
    return {(): "NTP", (1,): "MTP"}.get(tuple(strides), f"leap k={max(strides, default=0)}")


def default_methods(offsets):
    """NTP, four-token MTP and stride-2 leap as far as the offsets allow, and last all offsets."""
    found = [(1,)]
    for stride in (1, 2):
        possible = [leap_offsets(n, stride) for n in (4, 3, 2)]
        found += [o for o in possible if set(o) <= set(offsets)][:1]
    return [o for o in found if o != tuple(offsets)] + [tuple(offsets)]


def record(tree, tokens_per_step, accepted, **more):
    """One line of a table."""
    return dict(method=method_name(tree), offsets=offsets_of(tree), block=1 + len(tree),
                tokens_per_step=tokens_per_step, accepted=accepted, **more)


def compare(model, methods, prompts, new_tokens, temperature=0.0, rounds=3, batch_size=1,
            dtype=None, progress=True, **options):
    """Time methods (trees; the first is the baseline) on the same prompts, in turns. options: as
    of Decoder. -> a record per method, with medians over the rounds and its texts"""
    model, speed = ready(model, dtype), {m: [] for m in methods}  # one copy for all decoders
    batches = [prompts[i:i + batch_size] for i in range(0, len(prompts), batch_size)]
    options |= dict(temperature=temperature, max_length=max(map(len, prompts)) + new_tokens)
    decoders = {m: Decoder(model, tree=m, **options) for m in methods}
    with Progress(None, progress, total=len(methods) * (1 + rounds), unit="run") as bar:
        for m, decoder in decoders.items():
            bar.set_description(f"temperature {temperature:g}, prepare {method_name(m)}")
            for size in {len(batch) for batch in batches}:  # compile, and touch all memory
                decoder.generate(prompts[:1] * size, min(new_tokens, 32))
            bar.update()
        bar.set_description(f"temperature {temperature:g}, measure")
        for _ in range(rounds):
            done = {m: [] for m in methods}
            for i, batch in enumerate(batches):
                for m, decoder in decoders.items():
                    done[m].append(decoder.generate(batch, new_tokens, first_row=i * batch_size))
            for m, parts in done.items():
                tokens = sum(len(text) for g in parts for text in g.tokens)
                speed[m].append(tokens / sum(g.seconds for g in parts))
            bar.update(len(methods))
    records = []
    for m, parts in done.items():
        texts = [text for g in parts for text in g.tokens]
        _, per_step, accepted = statistics_of([nodes for g in parts for nodes in g.nodes], m)
        speedup = statistics.median(a / b for a, b in zip(speed[m], speed[methods[0]]))
        records.append(record(
            m, per_step, accepted, temperature=temperature, texts=texts, speedup=speedup,
            tokens_per_second=statistics.median(speed[m]), efficiency=speedup / per_step,
            identical=not records or texts == records[0]["texts"]))
    return records


def follow_text(model, windows, methods, **options):
    """How the methods would write real text: windows (B, T), whose own tokens are the targets.
    Greedy text of a small model loops, which flatters every drafter; this text does not. options:
    as of Decoder. -> records"""
    n, records = max(1, min(16, windows.shape[1] // 4)), []  # tokens of a prompt
    prompts, rest = windows[:, :n].tolist(), windows[:, n:].tolist()
    for m in methods:
        g = Decoder(model, tree=m, **options).generate(prompts, len(rest[0]), follow=rest)
        records.append(record(m, g.tokens_per_step, g.accepted))
    return records


def print_table(title, records):
    """Print records of `compare` or `follow_text`."""
    print(f"\n{title}\n{'method':10}{'offsets':14}{'block':>5}{'tokens/step':>13}{'tokens/s':>10}"
          f"{'speedup':>9}{'efficiency':>12}  {'text':11}accepted at distance 2, 3, ...")
    for r in records:
        timed, text = " " * 33, ""  # followed text is not generated
        if "speedup" in r:
            timed = f"{r['tokens_per_second']:10,.0f}{r['speedup']:8.2f}x{r['efficiency']:12.2f}  "
            text = "identical" if r["identical"] else "DIFFERS"
        print(f"{r['method']:10}{','.join(map(str, r['offsets'])):14}{r['block']:5}"
              f"{r['tokens_per_step']:13.2f}{timed}{text:11}"
              + " ".join(f"{fraction:4.0%}" for fraction in r["accepted"].values()))


# ----------------------------------------------------------------------------------------------
# The command line

def parse_args(argv=None):
    """The command line as a namespace."""
    p = Parser(prog="decode.py", description="Compare NTP, MTP and leap decoding: tokens per "
               "step, tokens per second, speedup over NTP, and efficiency, which is speedup / "
               "tokens per step (1: drafts are free). Or, with --prompt, continue that text.")
    p.add_argument("run", metavar="RUN", help="a run of train.py, or GPT-2 weights")
    p.add_argument("--prompt", metavar="TEXT", help="stream the continuation of this text, with "
                   "the tree of experiments/calibrate.py or else all offsets; a token's colour is "
                   "the distance of its draft, underlined: by looking back")
    p.add_argument("--methods", nargs="+", metavar="OFFSETS", help="as in: 1,2,3,4 1,3,5,7 tree; "
                   "default: what the offsets allow, and the tree if there is one")
    p.add_argument("--data", help="corpus of the held-out prompts; default: the one trained on")
    p.add_argument("--prompts", type=int, default=32, help="how many")
    p.add_argument("--prompt-tokens", type=int, help="their length; default: at most 64")
    p.add_argument("--new-tokens", type=int, help="how many to write; default: at most 192")
    p.add_argument("--batch-size", type=int, default=1, help="prompts decoded at once")
    p.add_argument("--temperature", type=float, default=1.0, help="of sampled text")
    p.add_argument("--top-k", type=int, help="sample among the k most probable tokens")
    p.add_argument("--top-p", type=float, help="sample among the best tokens of this probability")
    p.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    p.add_argument("--rounds", type=int, default=3, help="timed repetitions; medians are shown")
    p.add_argument("--compile", default="auto", choices=["auto", "yes", "no"],
                   help="torch.compile the step; auto: to compare, if it works here")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"],
                   help="in bfloat16 near-ties may fall another way: experiments/rounding.py")
    p.add_argument("--out", metavar="FILE", help="also write the comparison as JSON")
    return p.parse_args(argv)


def load_tree(run, offsets):
    """What experiments/calibrate.py saved for a run -> its tree and draft_vocab, each None if
    there is none. Raises InputError."""
    path = (Path(run) if os.path.isdir(run) else Path(run).parent) / "tree.json"
    try:
        saved = json.loads(path.read_text())
        tree, vocab = check_tree(saved["tree"], offsets), saved.get("draft_vocab")
        return tree, vocab and [int(token) for token in vocab]
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} holds no tree for this model ({error}); "
                         f"make it again: python experiments/calibrate.py {run}") from None


def find_methods(run, model, wanted=None):
    """The trees of --methods: offsets or "tree"; None: all that the run has."""
    offsets, tree = default_methods(model.offsets), None
    if wanted:
        offsets = [parse_offsets(name) for name in wanted if name != "tree"]
    if not wanted or "tree" in wanted:
        tree, _ = load_tree(run, model.offsets)
        require(tree is not None or not wanted,
                f"{run} has no tree: python experiments/calibrate.py {run} finds one")
    chains = [chain(draft_sources(check_offsets(o, model.offsets))) for o in offsets]
    return chains if tree is None else [*chains, tree]  # the last: what calibration found


def report(model, state, args):
    """Compare the methods and print the tables. -> results for --out"""
    device, config = pick_device(args.device), model.gpt.config
    methods = list(dict.fromkeys([(), *find_methods(args.run, model, args.methods)]))
    corpus = corpus_of(args.run, model, state, args.data)
    length = args.prompt_tokens or min(64, max(1, config.block_size // 4))
    prompts = corpus.windows("val", args.prompts, length).tolist()
    n = min(192, config.block_size - length) if args.new_tokens is None else args.new_tokens
    check_prompts(prompts, n, config)
    compile = args.compile != "no" and can_compile(device)
    require(compile or args.compile != "yes",
            "torch.compile does not work here; it needs a C++ compiler and Python's headers")
    parameters, model = sum(p.numel() for p in model.parameters()), model.to(device)
    print(f"{args.run}: {parameters / 1e6:.2f}M parameters, offsets {model.offsets}; "
          f"{len(prompts)} prompts, {n} new tokens each, batch {args.batch_size}, {args.dtype} on "
          f"{device}, {'compiled' if compile else 'eager'}, {torch.get_num_threads()} threads")
    generated, (_, draft_vocab) = [], load_tree(args.run, model.offsets)
    how = dict(top_k=args.top_k, top_p=args.top_p, seed=args.seed, draft_vocab=draft_vocab)
    Decoder(model, temperature=args.temperature, **how)  # errors come before the work
    for temperature in sorted({0.0, args.temperature}):
        records = compare(model, methods, prompts, n, temperature, args.rounds, args.batch_size,
                          getattr(torch, args.dtype), compile=compile, **how)
        title = f"sampled text, temperature {temperature:g}" if temperature else "greedy text"
        print_table(title, records)
        if not all(r["identical"] for r in records):
            print("rounding may choose between near-ties: experiments/rounding.py checks that")
        generated += [{k: v for k, v in r.items() if k != "texts"} for r in records]
    rows = min(32, 2 ** 15 // config.block_size)
    windows = corpus.windows("val", 2 * rows, config.block_size)[::2]  # calibrate.py: the others
    held_out = follow_text(model, windows, methods, draft_vocab=draft_vocab,
                           dtype=getattr(torch, args.dtype))
    print_table(f"held-out text of {corpus.meta.get('source', corpus.folder)}, followed", held_out)
    return dict(run=args.run, parameters=parameters, steps=state.get("step"), args=vars(args),
                compiled=compile, environment=environment(device), generated=generated,
                held_out=held_out)


SHADES = (157, 121, 86, 81, 75, 105, 141, 177)  # 256-colour codes, near to far


def paint(text, node, tree):
    """A token's text for a terminal, coloured by the node that drafted it (0: bonus token)."""
    if not node:
        return text
    style = f"38;5;16;48;5;{SHADES[min(depths(tree)[node], len(SHADES)) - 1]}"
    style += ";4" * (tree[node - 1].look_back > 0)
    return "\n".join(f"\033[{style}m{line}\033[0m" if line else "" for line in text.split("\n"))


def stream(model, state, args):
    """Print the continuation of --prompt as it is accepted, until the text ends."""
    tokenizer, device = tokenizer_of(args.run, model, state), pick_device(args.device)
    tree = find_methods(args.run, model, args.methods)[-1]  # the tree, else all offsets
    prompt = tokenizer.encode_ordinary(args.prompt)
    room = max(1, model.gpt.config.block_size - len(prompt))
    n = min(192, room) if args.new_tokens is None else args.new_tokens
    check_prompts([prompt], n, model.gpt.config)
    decoder = Decoder(model.to(device), tree=tree, temperature=args.temperature, top_k=args.top_k,
                      top_p=args.top_p, seed=args.seed, dtype=getattr(torch, args.dtype),
                      draft_vocab=load_tree(args.run, model.offsets)[1],
                      compile=args.compile == "yes", max_length=len(prompt) + n)
    utf8, shown = codecs.getincrementaldecoder("utf-8")("replace"), len(prompt)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def show(s):
        nonlocal shown
        new = slice(shown, int(s.position[0]) + 1)
        for token, node in zip(s.tokens[0, new].tolist(), s.node[0, new].tolist()):
            if token != tokenizer.eot_token:  # may end inside a character
                text = utf8.decode(tokenizer.decode_single_token_bytes(token))
                print(paint(text, node, tree) if color else text, end="", flush=True)
        shown = new.stop
    print(args.prompt, end="", flush=True)
    g = decoder.generate([prompt], n, tokenizer.eot_token, on_step=show)
    print(flush=True)
    print(f"{method_name(tree)} {offsets_of(tree)}: {len(g.tokens[0])} tokens in {g.steps} "
          f"steps, {g.tokens_per_step:.2f} per step, {g.seconds:.1f} s", file=sys.stderr)


def main(argv=None):
    """Compare methods, or continue a text. Bad input is one line and status 2."""
    args = parse_args(argv)
    with one_line_errors("decode.py", memory="--batch-size, --prompts or --new-tokens"):
        for name in ("prompts", "prompt_tokens", "batch_size", "rounds"):
            value = getattr(args, name)
            require(value is None or value > 0, f"--{name.replace('_', '-')} must be at least 1")
        check_output("out", args.out)
        model, state = load_model(args.run)
        if args.prompt is not None:
            require(not args.out and len(args.methods or [0]) == 1,
                    "--prompt writes one text: without --out, with at most one of --methods")
            return stream(model, state, args)
        results = report(model, state, args)
        if args.out:
            write_whole(args.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
