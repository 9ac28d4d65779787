"""Decoding: one decoder for NTP, MTP and leap, which differ only in their offsets.

    python decode.py runs/demo                          # compare the methods on held-out text
    python decode.py runs/demo --prompt "def main(" --trace

A model that predicts several tokens at once can be used as its own draft model (blockwise parallel decoding, Stern et
al. 2018). Each step feeds a *block* of N tokens: the last known one, the root, and the N - 1 guesses for the tokens
after it. One forward pass then says what the model itself would emit after each of them. Guesses are accepted as long
as they equal that; behind the last accepted one stands one more token, the model's own. Then the heads, read at the
new position and a few positions before it (looking back fills the holes between leaping offsets), guess the next block.

Why the text cannot change: a token is only ever emitted when the model itself, given the tokens before it, picks it.
At temperature > 0 "picks" means argmax(logits + temperature * noise), where the Gumbel noise is a fixed function of
(seed, row, position, token). That is an exact sample of softmax(logits / temperature), and it does not depend on how
many tokens were checked at once. NTP is the same code with a block of one token.

Read: picking a token, the decoder, what held-out text would accept, the command line.
"""
import argparse
import codecs
import copy
import datetime
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from dataclasses import dataclass
from types import FunctionType, MethodType, SimpleNamespace

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.loader import Corpus
from data.prepare import CorpusError, get_tokenizer
from heads import ResBlockHead, check_offsets, draft_sources, leap_offsets, parse_offsets
from model import InputError, KVCache, block_mask
from train import load_checkpoint, pick_device


# ---------------------------------------------------------------------------------------------------------------------
# Picking a token

def gumbel_noise(seed, row, position, vocab_size):
    """Gumbel(0, 1) noise that is a pure function of (seed, row, position, token).

    seed int, row (B, 1) int64, position (B, N) int64 -> (B, N, V) float32. The hash is two rounds of xor-shift and
    multiply on 32-bit words held in int64; its multipliers are below 2^31, so no product overflows.
    """
    def mix(x):
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
        return x ^ (x >> 15)
    key = mix(mix(mix(seed) ^ row) ^ position)[..., None]                   # (B, N, 1)
    bits = mix(key ^ mix(torch.arange(vocab_size, device=position.device) + 0x9E3779B9))    # (B, N, V)
    uniform = ((bits >> 9).float() + 0.5) * 2.0 ** -23                      # in (0, 1), both ends excluded
    return -torch.log(-torch.log(uniform))


def filter_logits(logits, top_k=None, top_p=None):
    """Hide (-inf) all but the top_k most probable tokens and all beyond the smallest set whose probability reaches
    top_p. logits (..., V), already divided by the temperature where top_p is used."""
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        hide = (p.cumsum(-1) - p >= top_p).scatter(-1, index, p.cumsum(-1) - p >= top_p)
        logits = logits.masked_fill(hide, -math.inf)
    return logits


# ---------------------------------------------------------------------------------------------------------------------
# The decoder

@dataclass
class Generation:
    """What Decoder.generate returns. All lists have one entry per prompt."""
    tokens: list            # the new tokens (without the prompt; a stop token is included)
    distances: list         # of each new token: 1 if the model itself emitted it, j if it was the draft at distance j
    steps: int              # forward passes after reading the prompts, summed over the rows
    tokens_per_step: float  # new tokens per row and step, not counting the first, which comes from reading the prompt
    accepted: dict          # {distance j: share of steps in which the draft at distance j was accepted}
    seconds: float          # wall-clock time, reading the prompts included


class Decoder:
    """Generates text from a MultiTokenGPT.

    offsets: those of the model's that may draft; (1,) is plain next-token decoding, None means all of them.
    sources: {distance: (offset, look-back)} for distances 2..N; None means heads.draft_sources(offsets).
    temperature 0 is greedy; top_k and top_p as usual; seed decides the noise. dtype: decode with a copy in, say,
    torch.bfloat16. compile: let torch.compile make one program of the step. After more training, make a new Decoder.
    Raises InputError for offsets the model lacks and for sources with a hole.
    """

    def __init__(self, model, offsets=None, *, sources=None, temperature=0.0, top_k=None, top_p=None, seed=0,
                 dtype=None, compile=False):
        offsets = check_offsets(offsets or model.offsets, model.offsets)
        self.sources = check_sources(sources or draft_sources(offsets), offsets)
        if not 0 <= temperature < math.inf:
            raise InputError(f"temperature must be 0 (greedy) or positive, not {temperature}")
        if top_k is not None and top_k < 1 or top_p is not None and not 0 < top_p <= 1:
            raise InputError(f"top_k must be at least 1 and top_p in (0, 1], not {top_k} and {top_p}")
        dtype = dtype or model.gpt.lm_head.weight.dtype
        if model.training or dtype != model.gpt.lm_head.weight.dtype:
            model = copy.deepcopy(model).eval().to(dtype)
        self.gpt, self.offsets, self.top_k, self.top_p = model.gpt, offsets, top_k, top_p
        self.config = self.gpt.config
        weight = self.gpt.lm_head.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.temperature, self.seed = float(temperature), int(seed) & 0xFFFFFFFF

        self.head_offsets = sorted({o for o, _ in self.sources.values()})   # the H heads that are used
        self.heads = [model.heads[str(o)] for o in self.head_offsets]
        own = model.unembeddings                                            # empty unless each head has its own
        self.unembeddings = [own[str(o)] for o, _ in self.sources.values()] if own else None
        # The residual blocks of all heads as one product: for each of their layers weight (H, C, C) and bias (H, C).
        self.stacked = None
        if self.heads and isinstance(self.heads[0], ResBlockHead):
            with torch.no_grad():
                self.stacked = [(torch.stack([l.weight for l in layer]), torch.stack([l.bias for l in layer]))
                                for layer in zip(*(head.blocks for head in self.heads))]
        self.N = 1 + len(self.sources)                                      # the block: the root and its drafts
        self.W = 1 + max((b for _, b in self.sources.values()), default=0)  # positions that drafts are read from
        H = len(self.heads)
        self.source_index = torch.tensor([(self.W - 1 - b) * H + self.head_offsets.index(o)   # into (W, H) flattened
                                          for o, b in self.sources.values()], device=self.device, dtype=torch.long)
        self.depth = torch.arange(self.N, device=self.device)
        self.slots = self.config.block_size + self.N                        # the last block may overshoot the context
        self.states, self.compile = {}, compile

    def _state(self, B):
        """The step and all the memory of a generation of B rows, made once and reused."""
        if B not in self.states:
            new = dict(device=self.device, dtype=torch.long)
            caches = [KVCache(self.config.n_layer, self.config.n_embd, B, self.slots, self.device, self.dtype)]
            caches += [KVCache(len(head.blocks), self.config.n_embd, B, self.slots, self.device, self.dtype)
                       for head in self.heads if self.stacked is None]
            self.states[B] = SimpleNamespace(
                tokens=torch.zeros(B, self.slots + 1, **new),               # the text
                distance=torch.zeros(B, self.slots + 1, **new),             # where each token of it came from
                position=torch.zeros(B, **new),                             # of each row's last known token, the root
                limit=torch.zeros(B, **new),                                # of each row's last wanted token
                stop=torch.full((), -1, **new),                             # stop token, -1 for none
                block=torch.zeros(B, self.N, **new),                        # root and drafts
                carry=torch.zeros(B, self.W - 1, len(self.heads), self.config.n_embd, device=self.device,
                                  dtype=self.dtype),                        # head outputs at the positions before t
                row=torch.arange(B, **new)[:, None],
                noise_row=torch.zeros(B, 1, **new),                         # the row that keys the sampling noise
                caches=caches, step=compile_step(self) if self.compile else self._step,
                steps=torch.zeros(B, **new), accepted=torch.zeros(self.N, **new))
        s = self.states[B]
        for t in (s.tokens, s.distance, s.carry, s.steps, s.accepted):
            t.zero_()
        return s

    def pick(self, logits, row, position):
        """The token that the model emits: logits (B, N, V), row (B, 1), position (B, N) of the token in its text ->
        (B, N). The Gumbel-max trick: argmax(logits / T + noise) is a sample of softmax(logits / T)."""
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = filter_logits(logits.float() / self.temperature, self.top_k, self.top_p)
        return (logits + gumbel_noise(self.seed, row, position, logits.shape[-1])).argmax(-1)

    def _forward(self, s, idx):
        """Read tokens idx (B, n) standing at s.position, s.position + 1, ... -> hidden states (B, n, C) and head
        outputs (B, n, H, C)."""
        B, n = idx.shape
        position = s.position[:, None] + torch.arange(n, device=self.device)
        slots = (s.row * self.slots + position).flatten()                   # a token's slot is its position
        chain = torch.ones(n, n, dtype=torch.bool, device=self.device).tril()
        mask = block_mask(s.position, chain, self.slots, self.dtype)
        h = self.gpt.hidden_states(idx, position.clamp(max=self.config.block_size - 1), s.caches[0], slots, mask)
        if self.stacked is None:
            z = [head(h, cache, slots, mask) for head, cache in zip(self.heads, s.caches[1:])]
            return h, torch.stack(z, dim=2) if z else None
        z = h[:, :, None]                                                   # (B, n, 1, C)
        for weight, bias in self.stacked:                                   # all heads in one product
            z = z + F.silu(torch.einsum("bnhc,hdc->bnhd", z.expand(-1, -1, len(bias), -1), weight) + bias)
        return h, z

    def _draft(self, s, z, last, root):
        """Guess the tokens after `root` (B,), which stands at s.position, and write the next block.

        z (B, n, H, C): head outputs at the n positions just read; last (B,): index among them of the newest valid
        one, t, where root is x_{t+1}. The draft for distance j stands at t + j and comes from (offset o, look-back b).
        """
        if self.N == 1:
            return s.block.copy_(root[:, None])
        z = torch.cat([s.carry, z], dim=1)                                  # (B, W - 1 + n, H, C)
        z = z[s.row, last[:, None] + torch.arange(self.W, device=self.device)]  # (B, W, H, C): t - W + 1 .. t
        s.carry.copy_(z[:, 1:])
        z = z.flatten(1, 2)[:, self.source_index]                           # (B, N - 1, C)
        if self.unembeddings:
            logits = torch.stack([unembed(z[:, i]) for i, unembed in enumerate(self.unembeddings)], dim=1)
        else:
            logits = self.gpt.lm_head(z)                                    # (B, N - 1, V)
        drafts = self.pick(logits, s.noise_row, s.position[:, None] + self.depth[1:])
        s.block.copy_(torch.cat([root[:, None], drafts], dim=1))

    def _step(self, s):
        """One step of all rows. Nothing in it waits for the host, and every shape is fixed."""
        h, z = self._forward(s, s.block)
        place = s.position[:, None] + 1 + self.depth                        # (B, N) where each target stands
        target = self.pick(self.gpt.lm_head(h), s.noise_row, place)               # what the model emits after each node
        guess = F.pad(s.block[:, 1:], (0, 1), value=-1)                     # what the block had there
        n = torch.where(guess != target, self.depth, self.N).amin(1)        # accepted drafts = place of the first miss

        active = s.position < s.limit
        s.steps.add_(active)
        s.accepted.add_(((self.depth <= n[:, None]) & active[:, None]).sum(0))
        s.tokens.scatter_(1, place, target)                                 # beyond the n + 1 good ones: overwritten
        s.distance.scatter_(1, place, torch.where(self.depth < n[:, None], self.depth + 2, 1))
        stopped = torch.where((target == s.stop) & (self.depth <= n[:, None]), place, self.slots).amin(1)
        s.limit.copy_(torch.minimum(s.limit, stopped))
        s.position.copy_(torch.minimum(s.position + n + 1, s.limit))        # a finished row stays where it is
        self._draft(s, z, n, target.gather(1, n[:, None])[:, 0])

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, stop_token=None, first_row=0):
        """Continue each prompt (a list of token lists, of any lengths) by up to max_new_tokens. -> Generation.

        first_row: number of the first prompt's row in the sampling noise, so that a large set of prompts gives the same
        texts however it is cut into batches.
        Raises InputError for an empty prompt, token ids out of range, or more tokens than the context holds.
        """
        prompts = [[int(t) for t in p] for p in prompts]
        check_prompts(prompts, max_new_tokens, self.config, stop_token)
        start = self._clock()
        B, lengths = len(prompts), torch.tensor([len(p) for p in prompts], device=self.device)
        s = self._state(B)
        text = torch.zeros(B, int(lengths.max()), dtype=torch.long)         # ragged prompts, padded on the right: what
        for i, p in enumerate(prompts):                                     # is cached beyond a prompt's end is
            text[i, :len(p)] = torch.tensor(p)                              # overwritten before anyone may see it
        s.noise_row.copy_(s.row + first_row)
        s.stop.fill_(-1 if stop_token is None else stop_token)
        s.limit.copy_(lengths + max_new_tokens - 1)
        s.position.zero_()
        h, z = self._forward(s, text.to(self.device))                       # the prompt is a block at position 0
        s.position.copy_(lengths)
        first = self.pick(self.gpt.lm_head(h[s.row[:, 0], lengths - 1])[:, None], s.noise_row, lengths[:, None])
        s.tokens.scatter_(1, lengths[:, None], first)
        s.distance.scatter_(1, lengths[:, None], 1)
        s.limit.copy_(torch.where(first[:, 0] == s.stop, s.position, s.limit))
        self._draft(s, z, lengths - 1, first[:, 0])
        while (left := int((s.limit - s.position).max())) > 0:              # the host looks here, and only here:
            sure = -(-left // self.N)                                       # at least so many steps are still needed,
            for _ in range(sure if stop_token is None else min(sure, 16)):  # unless a stop token comes
                s.step(s)
        seconds = self._clock() - start

        ends = (s.limit + 1).tolist()
        new = [(len(p), end) for p, end in zip(prompts, ends)]
        tokens, distances = s.tokens.tolist(), s.distance.tolist()
        steps, accepted = int(s.steps.sum()), s.accepted.tolist()
        return Generation(
            tokens=[t[a:b] for t, (a, b) in zip(tokens, new)], distances=[d[a:b] for d, (a, b) in zip(distances, new)],
            steps=steps, tokens_per_step=sum(b - a - 1 for a, b in new) / steps if steps else 1.0,
            accepted={j: accepted[j - 1] / max(1, steps) for j in self.sources}, seconds=seconds)

    def _clock(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def compile_step(decoder):
    """decoder._step as one compiled program. torch.compile keeps its programs with a function's code and searches
    them at every call; a copy of the code for each decoder keeps that search short, however many decoders there are."""
    f = Decoder._step
    copy_of_step = FunctionType(f.__code__.replace(), f.__globals__, f.__name__)
    return torch.compile(MethodType(copy_of_step, decoder), fullgraph=True, dynamic=False)


def check_sources(sources, offsets):
    """sources, ordered by distance. Raises InputError when one is impossible or a distance is missing."""
    for j, (o, b) in sources.items():
        if o not in offsets[1:] or b < 0 or o - b != j:
            raise InputError(f"distance {j} cannot come from offset {o} looking back {b} with offsets {offsets}")
    hole = next((j for j in range(2, 2 + len(sources)) if j not in sources), None)
    if hole:
        raise InputError(f"nothing drafts distance {hole}: the sources {sources} have a hole")
    return dict(sorted(sources.items()))


def check_prompts(prompts, max_new_tokens, config, stop_token=None):
    """Raise InputError unless all prompts can be continued by max_new_tokens."""
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
        if len(p) + max_new_tokens > config.block_size:
            raise InputError(f"{len(p)} prompt tokens and {max_new_tokens} new ones exceed the model's context of "
                             f"{config.block_size}; shorten the prompt or ask for at most "
                             f"{max(0, config.block_size - len(p))} new tokens")


# ---------------------------------------------------------------------------------------------------------------------
# What held-out text would accept

def expected_tokens_per_step(acceptance):
    """E = 1 + sum over m of a_2 * ... * a_(m+1), where a_j is the probability that the draft for distance j is right
    given that all nearer ones were; acceptance is the sequence a_2, a_3, ... (L-MTP, theorem on expected length)."""
    expected = reached = 1.0
    for a in acceptance:
        reached *= a
        expected += reached
    return expected


@torch.no_grad()
def held_out_acceptance(model, windows, sources):
    """How real text would be drafted, by teacher forcing: every guess is made from real text and compared with it.

    Greedy text of a small model falls into loops that any drafter predicts; this figure does not depend on them.
    windows (B, T + 1) int64, sources {distance: (offset, look-back)}. Returns three things: the tokens per step of a
    decoder that walks along the real text; {distance j: share of its steps in which draft j is accepted}; and {j: a_j}
    over all positions, as expected_tokens_per_step wants it. That formula says more than the walk finds: a decoder
    takes long steps through easy text, so most of its steps begin where text is hard.
    """
    N, first = 1 + len(sources), max((b for _, b in sources.values()), default=0)
    end = windows.shape[1] - N                                              # t runs over first..end - 1
    if end <= first:
        raise InputError(f"windows of {windows.shape[1]} tokens are too short for drafts of {N - 1}")
    windows = windows.to(model.gpt.lm_head.weight.device)
    guess = {o: [] for o, _ in sources.values()}                            # [:, t] is about token t + o
    for part in windows.split(4):                                           # logits are large: a few rows at a time
        h = model.gpt.hidden_states(part[:, :-1])                           # (4, T, C)
        for o in guess:
            guess[o].append(model.offset_logits(h, o).argmax(-1))
    guess = {o: torch.cat(parts) for o, parts in guess.items()}             # (B, T)
    accepted = torch.zeros(len(windows), end - first, dtype=torch.long, device=windows.device)
    alive, share = torch.ones_like(accepted), {}
    for j, (o, b) in sources.items():
        hit = guess[o][:, first - b:end - b] == windows[:, first + j:end + j]
        share[j] = (alive * hit).sum().item() / max(1, alive.sum().item())
        alive = alive * hit
        accepted += alive
    lengths = []                                                            # accepted drafts of each step of the walk
    for row in accepted.tolist():
        t = 0
        while t < len(row):
            lengths.append(row[t])
            t += row[t] + 1
    return (1 + statistics.fmean(lengths), {j: statistics.fmean(n >= j - 1 for n in lengths) for j in sources}, share)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing methods

def method_name(offsets):
    """NTP, MTP, leap with its stride, or mixed."""
    strides = {b - a for a, b in zip(offsets, offsets[1:])}
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


def compare(model, methods, prompts, new_tokens, temperatures=(0.0, 1.0), rounds=3, compile=False, dtype=None,
            top_k=None, top_p=None, seed=0, batch_size=1, progress=True):
    """Time every method on the same prompts, interleaved. methods: list of offsets, the first being the baseline.

    Returns (records, generations): a record per temperature and method, with medians over the rounds, and
    generations[temperature][offsets], the list of Generations of the last round.
    """
    batches = [prompts[i:i + batch_size] for i in range(0, len(prompts), batch_size)]
    bar = tqdm(total=len(methods) * len(temperatures) * (1 + rounds), unit="run", leave=False,
               disable=None if progress else True)
    records, generations = [], {}
    for temperature in temperatures:
        decoders = {}
        for m in methods:                                                   # not timed: compiles, touches all memory
            bar.set_description(f"{'compile' if compile else 'warm up'} {method_name(m)}, temperature {temperature:g}")
            decoders[m] = Decoder(model, m, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, dtype=dtype,
                                  compile=compile)
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
        base = [t for g in last[methods[0]] for t in g.tokens]
        for m, done in last.items():
            speedup = statistics.median(a / b for a, b in zip(speed[m], speed[methods[0]]))
            steps = max(1, sum(g.steps for g in done))
            per_step = sum(len(t) - 1 for g in done for t in g.tokens) / steps
            records.append(dict(
                temperature=temperature, method=method_name(m), offsets=m, tokens_per_step=per_step,
                tokens_per_second=statistics.median(speed[m]), speedup=speedup, efficiency=speedup / per_step,
                accepted={j: sum(g.accepted[j] * g.steps for g in done) / steps for j in decoders[m].sources},
                identical=[t for g in done for t in g.tokens] == base))
        generations[temperature] = last
    bar.close()
    return records, generations


def print_table(title, records):
    """Print records of `compare`, or of held_out_acceptance in the same form, as a table."""
    print(f"\n{title}")
    print(f"{'method':10}{'offsets':14}{'tokens/step':>12}{'tokens/s':>10}{'speedup':>9}{'efficiency':>12}  "
          f"{'text':11}accepted at distance 2, 3, ...")
    for r in records:
        timed, text = " " * 33, ""                                          # held-out text is not generated
        if "speedup" in r:
            timed = f"{r['tokens_per_second']:10,.0f}{r['speedup']:8.2f}x{r['efficiency']:12.2f}  "
            text = "identical" if r["identical"] else "DIFFERENT"
        print(f"{r['method']:10}{','.join(map(str, r['offsets'])):14}{r['tokens_per_step']:12.2f}{timed}{text:11}"
              + " ".join(f"{share:4.0%}" for share in r["accepted"].values()))


SHADES = (157, 121, 86, 81, 75, 105, 141, 177)                                # 256-colour codes, near to far


def trace(generation, sources, tokenizer, color=True):
    """The first row's new text, showing where each token came from: the model itself (plain), or a draft, shaded by
    its distance and underlined where it was made by looking back. Without colour each step stands in brackets."""
    style = {j: f"38;5;16;48;5;{SHADES[min(j - 2, len(SHADES) - 1)]}" + (";4" if b else "")
             for j, (_, b) in sources.items()}
    decoder, out, text = codecs.getincrementaldecoder("utf-8")("replace"), [], ""
    for token, distance in zip(generation.tokens[0], generation.distances[0]):
        text += decoder.decode(tokenizer.decode_single_token_bytes(token))  # a character may take several tokens
        if color:
            out += [f"\033[{style[distance]}m{part}\033[0m" if distance > 1 and part.strip("\n") else part
                    for part in re.split("(\n)", text)]
            text = ""
        elif distance == 1:                                                 # the last token of its step
            out.append(f"[{text}]")
            text = ""
    if text:                                                                # the last step was cut short
        out.append(f"[{text}]")
    legend = "  ".join(f"\033[{style[j]}m{j}\033[0m from offset {o}" + (f", {b} back" if b else "")
                       for j, (o, b) in sources.items())
    return "".join(out) + "\n" + (f"drafts by distance: {legend}" if color else "(one step per bracket)")


def environment(device):
    """What a measurement depends on, for result files."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return dict(torch=torch.__version__, python=platform.python_version(), device=str(device), device_name=name,
                threads=torch.get_num_threads(), date=datetime.date.today().isoformat())


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def parse_args():
    """The command line as a namespace."""
    p = argparse.ArgumentParser(
        prog="decode.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Generate the same text with NTP, MTP and leap decoding and compare: tokens per step, tokens per "
                    "second, speedup over NTP, and that speedup over tokens per step (1: drafting costs nothing).")
    p.add_argument("runs", nargs="+", metavar="RUN", help="run folder or checkpoint made by train.py")
    p.add_argument("--methods", nargs="+", metavar="OFFSETS", help="what to compare, as in: 1 1,2,3,4 1,3,5,7; "
                   "default: what the model's offsets allow")
    p.add_argument("--data", help="corpus whose held-out half gives the prompts; default: the one trained on")
    p.add_argument("--prompt", help="continue this text instead")
    p.add_argument("--trace", action="store_true", help="show the text, each token marked by where it came from")
    p.add_argument("--color", default="auto", choices=["auto", "always", "never"],
                   help="of the trace; auto: on a terminal")
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
    p.error = lambda message: p.exit(2, f"decode.py: error: {message}\n")   # one line, without the usage
    return p.parse_args()


def can_compile(device):
    """Whether torch.compile works here, found out by trying: it needs a working C++ compiler, Python's headers, ..."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2, device=device))
    except Exception:                                                       # whatever it is, eager mode will do
        return False
    return device.type != "mps"                                             # there it is still a prototype


def report(run, model, state, args):
    """Everything decode.py shows about one run. -> its results as a dict for --out."""
    device, config = pick_device(args.device), model.gpt.config
    model = model.to(device).eval()
    methods = default_methods(model.offsets)
    if args.methods:
        methods = [check_offsets(parse_offsets(m), model.offsets) for m in args.methods]
        methods = list(dict.fromkeys([(1,)] + methods))                     # the baseline comes first
    if args.prompt is None:
        corpus = Corpus(args.data or state["args"]["data"])
        if corpus.meta["tokenizer"] != state["tokenizer"]:
            raise InputError(f"{corpus.folder} is in {corpus.meta['tokenizer']} tokens, {run} was trained on "
                             f"{state['tokenizer']}; prepare it with --tokenizer {state['tokenizer']}")
        tokenizer = corpus.tokenizer
        length = getattr(args, "prompt_tokens", min(64, max(1, config.block_size // 4)))
        prompts = corpus.windows("val", args.prompts, length).tolist()
    else:
        tokenizer = get_tokenizer(state["tokenizer"])
        prompts = [tokenizer.encode_ordinary(args.prompt)]
    new_tokens = getattr(args, "new_tokens", max(1, min(192, config.block_size - len(prompts[0]))))
    check_prompts(prompts, new_tokens, config)
    compile = args.compile != "no" and can_compile(device)
    if args.compile == "yes" and not compile:
        raise InputError("torch.compile does not work here; it needs a C++ compiler and Python's headers")

    n = sum(p.numel() for p in model.parameters())
    how = "compiled" if compile else "eager" if args.compile == "no" else "eager (torch.compile does not work here)"
    print(f"{run}: {n / 1e6:.2f}M parameters, offsets {model.offsets}, {state['step']} steps; {len(prompts)} prompts, "
          f"{new_tokens} new tokens each, batch {args.batch_size}, {how}, {args.dtype} on {device}, "
          f"{torch.get_num_threads()} threads")
    titles = {args.temperature: f"sampled text, temperature {args.temperature:g}", 0.0: "greedy text"}
    records, generations = compare(
        model, methods, prompts, new_tokens, sorted(titles), args.rounds, compile, getattr(torch, args.dtype),
        args.top_k, args.top_p, args.seed, args.batch_size)
    for temperature, title in sorted(titles.items()):
        print_table(title, [r for r in records if r["temperature"] == temperature])
    held_out = []
    for m in methods if args.prompt is None else ():
        if 2 * m[-1] < config.block_size:                                   # else no window is long enough
            windows = corpus.windows("val", 64, config.block_size + 1)
            per_step, accepted, a = held_out_acceptance(model, windows, draft_sources(m))
            held_out.append(dict(method=method_name(m), offsets=m, tokens_per_step=per_step, accepted=accepted,
                                 acceptance=a, expected_tokens_per_step=expected_tokens_per_step(a.values())))
    if held_out:
        print_table("held-out text, teacher forcing", held_out)
    if args.trace or args.prompt is not None:
        color = args.color == "always" or args.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
        for m in methods[1:] or methods:
            g = generations[args.temperature][m][0]
            print(f"\n{method_name(m)} {','.join(map(str, m))}, temperature {args.temperature:g}, "
                  f"{g.tokens_per_step:.2f} tokens/step, after the prompt {tokenizer.decode(prompts[0])[-40:]!r}:")
            print(trace(g, draft_sources(m), tokenizer, color))
    return dict(run=str(run), parameters=n, steps=state["step"], args=vars(args), compiled=compile,
                environment=environment(device), generated=records, held_out=held_out)


def main():
    """Report on every run; bad input is one line and status 2."""
    args = parse_args()
    try:
        for name in ("prompts", "prompt_tokens", "batch_size", "rounds"):
            if getattr(args, name, 1) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1")
        loaded = [(run, *load_checkpoint(run)) for run in args.runs]        # what is wrong is said before work starts
        for run, _, state in loaded:
            if not {"args", "step", "tokenizer"} <= state.keys():
                raise InputError(f"{run} holds a model but not what train.py saves beside it")
        if args.out:
            if os.path.isdir(args.out):
                raise InputError(f"--out {args.out} is a folder; name a file")
            with open(args.out + ".part", "w"):                             # can it be written?
                pass
        results = [report(run, model, state, args) for run, model, state in loaded]
        if args.out:
            with open(args.out + ".part", "w") as f:
                json.dump(results, f, indent=1)
            os.replace(args.out + ".part", args.out)
    except (InputError, CorpusError, OSError) as error:
        print(f"decode.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        if args.out and os.path.exists(args.out + ".part"):
            os.remove(args.out + ".part")


if __name__ == "__main__":
    main()
