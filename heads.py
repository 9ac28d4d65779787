"""Multi-token heads: what to add to a GPT so that one forward pass predicts several later tokens.

The one idea is *offsets*. From the hidden state after x_1..x_t, offset o predicts x_{t+o}:

    (1,)          next-token prediction (NTP): the GPT itself
    (1, 2, 3, 4)  multi-token prediction (MTP): adjacent tokens
    (1, 3, 5, 7)  leap MTP with stride 2: as many heads reach farther; looking back fills the holes

Offset 1 is always the GPT's own unembedding; each further offset gets a head. Adding heads to a
frozen GPT therefore never changes its next-token prediction.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, stack_module_state

from data.prepare import require
from model import Block


# ---- Offsets, and where a draft comes from ---------------------------------------------------

def parse_offsets(offsets, available=None):
    """"1,3,5,7" or ints -> (1, 3, 5, 7). Raises InputError unless they increase from 1 on and are
    among the available ones."""
    try:
        parts = offsets.split(",") if isinstance(offsets, str) else offsets
        parsed = tuple(map(int, parts))
    except ValueError:
        parsed = ()
    require(parsed[:1] == (1,) and list(parsed) == sorted(set(parsed)),
            f"offsets start with 1 and increase, as in 1,2,3,4; not {offsets}")
    missing = set(parsed) - set(available or parsed)
    require(not missing, f"no head for offset {sorted(missing)}; the model has {available}")
    return parsed


def draft_sources(offsets):
    """Which head drafts which distance 2..max(offsets): {distance: (offset, look-back)}.

    Offset o, read from the hidden state b tokens ago, predicts distance j = o - b. Of the offsets
    that reach j, the nearest is taken, because accuracy falls with the offset. MTP never looks
    back (b = 0); leap with stride k fills its holes with b = 1..k-1 (L-MTP, section 3.2):

    >>> draft_sources((1, 3, 5))
    {2: (3, 1), 3: (3, 0), 4: (5, 1), 5: (5, 0)}
    """
    sources = {}
    for j in range(2, max(offsets) + 1):
        nearest = min(o for o in offsets if o >= j)
        sources[j] = (nearest, nearest - j)
    return sources


def look_up(tokens, position, n_drafts, longest=3):
    """Prompt lookup, drafts without heads: what followed a text's newest tokens the last time.

    tokens (B, S) int64, a text up to `position` (B,) -> drafts (B, n_drafts). A longer match, of up
    to `longest` tokens, is better than a later one. Where fewer than n_drafts tokens follow a
    match, they are repeated; without a match the newest token is."""
    S = tokens.shape[1]
    slot = torch.arange(S, device=tokens.device)
    root = position[:, None]
    match = slot < root  # (B, S): where a match may end
    score = torch.where(match, slot, -1)
    for i in range(longest):
        newest = tokens.gather(1, (root - i).clamp(min=0))  # (B, 1)
        match = match & (slot >= i) & (tokens.roll(i, 1) == newest)
        score = score + S * match  # a token more counts more than any slot
    period = (root - score.argmax(1, keepdim=True)).clamp(min=1)  # (B, 1)
    i = torch.arange(n_drafts, device=tokens.device)
    return tokens.gather(1, root + 1 - period + i % period)


# ---- Heads -----------------------------------------------------------------------------------

@dataclass
class HeadsConfig:
    """Which heads a model has."""
    offsets: tuple = (1, 2, 3, 4)
    kind: str = "resblock"    # "resblock" or "block": what a head's layers are
    n_layer: int = 1          # residual blocks or transformer layers per head
    whs: bool = False         # weighted hidden states: each head reads all layers
    sequential: bool = False  # each head also reads the token just before the one it predicts

    def __post_init__(self):
        self.offsets = parse_offsets(self.offsets)
        require(self.kind in LAYERS, f"unknown kind of head {self.kind!r}: {', '.join(LAYERS)}")
        require(self.n_layer > 0, f"a head needs at least one layer, not {self.n_layer}")


class ResBlock(nn.Linear):
    """z + silu(W z + b), which adds nothing at first (the head of Medusa and L-MTP)."""

    def __init__(self, gpt_config):
        super().__init__(gpt_config.n_embd, gpt_config.n_embd)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, z, cache=None, slots=None, mask=None):
        """(..., C) -> (..., C). Each position on its own, so the cache is not needed."""
        return z + F.silu(super().forward(z))


def transformer_block(gpt_config):
    """A layer of the GPT's own shape (the head of Gloeckle et al. and Mehra et al.) that adds
    nothing at first. It attends to the past, so a decoder keeps a KV cache for it."""
    block = Block(gpt_config)
    for name, p in block.named_parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.02)
        if "c_proj" in name or name.endswith("bias"):
            nn.init.zeros_(p)
    return block


LAYERS = {"resblock": ResBlock, "block": transformer_block}


class TokenReader(nn.Module):
    """z + proj(silu(fc(z) + fc_e(norm(e)))): tells a head the token just before the one that it
    predicts, by its embedding e. Adds nothing at first.

    Training knows that token, and so does a decoder: it is the bonus token, or the draft before
    (compare Hydra, arXiv 2402.05109). What it need not wait for, `prepare` does for all at once."""

    def __init__(self, gpt_config):
        super().__init__()
        C = gpt_config.n_embd
        self.fc = nn.Linear(C, 2 * C)
        self.fc_e = nn.Linear(C, 2 * C, bias=False)
        self.proj = nn.Linear(2 * C, C)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def prepare(self, z):
        """What does not depend on the token: z (..., C) -> z and fc(z), (..., 3C)."""
        return torch.cat([z, self.fc(z)], dim=-1)

    def embed(self, e):
        """What depends on the token alone: e (..., C) -> (..., 2C)."""
        return self.fc_e(F.layer_norm(e, e.shape[-1:]))

    def forward(self, prepared, embedded):
        """(..., 3C) and (..., 2C) -> (..., C)."""
        C = self.proj.out_features
        z, inner = prepared.split([C, 2 * C], dim=-1)
        return z + self.proj(F.silu(inner + embedded))


class Head(nn.Module):
    """From the hidden states after x_1..x_t to those whose unembedding predicts x_{t+o}. At first
    it adds nothing: an untrained head without WHS predicts the next token.

    With weighted hidden states (WHS, Mehra et al. 2025) it reads, instead of the last layer's, the
    sum of all layers' weighted by softmax(mix). So it can use what later layers drop."""

    def __init__(self, gpt_config, config):
        super().__init__()
        L = gpt_config.n_layer
        mix = torch.zeros(L)
        mix[-1] = math.log(max(1, L - 1))  # half of the weight for the last layer
        self.mix = nn.Parameter(mix) if config.whs else None
        self.blocks = nn.ModuleList([LAYERS[config.kind](gpt_config)
                                     for _ in range(config.n_layer)])
        self.reader = TokenReader(gpt_config) if config.sequential else None

    def forward(self, h, cache=None, slots=None, mask=None):
        """What the head computes from h alone: h (B, T, C), or with WHS (B, T, L, C), -> z (B, T,
        C), or if sequential (B, T, 3C), from TokenReader.prepare. The rest is as in model.Block."""
        z = h
        if self.mix is not None:
            z = torch.einsum("...lc,l->...c", h, self.mix.softmax(0).to(h.dtype))
        for i, block in enumerate(self.blocks):
            z = block(z, cache[i] if cache else None, slots, mask)
        return z if self.reader is None else self.reader.prepare(z)


class MultiTokenGPT(nn.Module):
    """A GPT and one head for each offset after the first; with offsets (1,) the GPT alone."""

    def __init__(self, gpt, heads_config):
        super().__init__()
        self.gpt = gpt
        self.heads_config = heads_config
        self.offsets = heads_config.offsets
        require(max(self.offsets) <= gpt.config.block_size, f"offset {max(self.offsets)} is beyond "
                f"the model's context of {gpt.config.block_size}")
        self.heads = nn.ModuleDict({str(o): Head(gpt.config, heads_config)
                                    for o in self.offsets[1:]})

    def read(self, stream):
        """What the heads read, after the final norm: GPT.residual_stream, n_layer + 1 tensors
        (B, T, C) -> the last layer's (B, T, C), or with WHS all layers' (B, T, n_layer, C)."""
        ln_f = self.gpt.transformer.ln_f
        if not self.heads_config.whs:
            return ln_f(stream[-1])
        return torch.stack([ln_f(x) for x in stream[1:]], dim=2)

    def hidden_states(self, idx):
        """What the heads read of a text (B, T) int64."""
        return self.read(self.gpt.residual_stream(idx))

    def last_layer(self, h):
        """h from `read` -> the GPT's hidden states (B, T, C), which offset 1 unembeds."""
        return h[:, :, -1] if self.heads_config.whs else h

    def offset_logits(self, h, offset, previous):
        """h from `read` -> logits (B, T, V) of an offset; [:, t] predicts token t + offset.
        previous (B, T): [:, t] is the token before that, which sequential heads read."""
        if offset == 1:
            return self.gpt.lm_head(self.last_layer(h))
        head = self.heads[str(offset)]
        z = head(h)
        if head.reader is not None:
            e = self.gpt.transformer.wte(previous)
            z = head.reader(z, head.reader.embed(e))
        return self.gpt.lm_head(z)

    def forward(self, idx):
        """(B, T) int64 -> {offset: logits (B, T, V)}. The last offset - 1 positions of a
        sequential head are meaningless: the text ends before the token that it reads."""
        h = self.hidden_states(idx)
        return {o: self.offset_logits(h, o, idx.roll(1 - o, dims=1)) for o in self.offsets}


# ---- The joint loss --------------------------------------------------------------------------

def predictions_and_targets(model, h, idx, offset):
    """One offset's logits (n, V) and the tokens (n,) that they predict; n = B * (T + 1 - offset).

    idx (B, T + 1); h (B, T, ...) = model.hidden_states(idx[:, :-1]). Position t of offset o
    predicts token t + o, so the last o - 1 positions have no target."""
    targets = idx[:, offset:]  # (B, T + 1 - o)
    previous = idx[:, offset - 1:-1]
    logits = model.offset_logits(h[:, :targets.shape[1]], offset, previous)
    return logits.flatten(0, 1), targets.flatten()


def joint_loss(model, idx, weights=None, backward=False):
    """The loss of every offset: idx (B, T + 1) int64 -> {offset: mean nats, a detached scalar}.

    weights {offset: float} (1 where absent); an offset with weight 0 is left out. backward=True
    adds the gradients of sum_o weights[o] * loss_o to .grad wherever parameters require them, head
    by head (Gloeckle et al. 2024, section 2): however many there are, only one head's logits, by
    far the largest tensors here, exist at a time. Each leaves its gradient at the hidden states,
    and the trunk runs backward once with their sum."""
    hidden = model.hidden_states(idx[:, :-1])  # (B, T, C) or (B, T, n_layer, C)
    h = hidden.detach()  # the heads' gradients meet in h.grad
    h.requires_grad_(backward and hidden.requires_grad)
    losses = {}
    for o in model.offsets:
        weight = (weights or {}).get(o, 1.0)
        if weight == 0:
            continue
        loss = F.cross_entropy(*predictions_and_targets(model, h, idx, o))
        if backward and loss.requires_grad:
            (weight * loss).backward()
        losses[o] = loss.detach()
    if h.requires_grad:
        hidden.backward(h.grad)
    return losses


# ---- Drafts on real text, by teacher forcing -------------------------------------------------

@torch.no_grad()
def accepted_drafts(model, offsets, windows, lookup=0):
    """How many drafts a step would have accepted whose root, the last known token, is at each
    position of real text: windows (n, T) int64 -> (n, T) int64, near the end perhaps too many. A
    draft counts only if all before it do, so a sequential head may read the text itself."""
    accepted = []
    for idx in windows:  # (T,), one by one, because logits are large
        if lookup:
            position = torch.arange(len(idx), device=idx.device)
            drafts = look_up(idx.expand(len(idx), -1), position, lookup).unbind(1)
        else:
            h = model.hidden_states(idx[None])
            best = {}
            for o in offsets[1:]:
                logits = model.offset_logits(h, o, idx.roll(1 - o)[None])  # (1, T, V)
                best[o] = logits[0].argmax(-1)
            drafts = []
            for o, b in draft_sources(offsets).values():
                drafts.append(F.pad(best[o], (1 + b, -1 - b)))  # position t - 1 - b, at root t
        n = torch.zeros_like(idx)
        for i, draft in enumerate(drafts):  # (T,) each: at root t, for token t + 1 + i
            n += (n == i) & (draft == idx.roll(-1 - i))
        accepted.append(n)
    return torch.stack(accepted)


def step_begins(accepted, first):
    """Where steps begin that write real text after position `first`: accepted (n, T) -> bool
    (n, T). Most begin where text is hard, because easy text is written by few."""
    begins = torch.zeros_like(accepted, dtype=torch.bool)
    last = accepted.shape[1] - 1
    t = torch.full_like(accepted[:, :1], first)
    while (t < last).any():
        begins.scatter_(1, t, True)
        t = (t + 1 + accepted.gather(1, t)).clamp(max=last)
    begins[:, last] = False
    return begins


# ---- The heads as a decoder runs them: all on the same tokens --------------------------------

class DraftHeads:
    """The heads of some offsets, which draft the tokens vocab (K,) int64: all V, or fewer. What is
    run together is copied: the weights of heads that do not attend, the unembedding's rows, and the
    tables of what sequential heads read of every token."""

    def __init__(self, model, offsets, vocab):
        self.heads = [model.heads[str(o)] for o in offsets[1:]]
        self.attending = bool(self.heads) and model.heads_config.kind == "block"
        self.sequential = model.heads_config.sequential
        weight = model.gpt.lm_head.weight.detach()  # also the embedding
        self.unembed = model.gpt.lm_head
        if len(vocab) != len(weight):
            self.unembed = nn.Linear(weight.shape[1], len(vocab), bias=False)
            self.unembed.weight = nn.Parameter(weight[vocab], requires_grad=False)
        if self.heads and not self.attending:
            self.stacked, _ = stack_module_state(self.heads)  # {name: (H, ...)}
        if self.sequential:
            with torch.no_grad():  # (V, 2C) each
                self.tables = [head.reader.embed(weight) for head in self.heads]

    def attend(self, h, caches, slots, mask):
        """What must be computed at every token: h (B, n, ...) from MultiTokenGPT.read -> (B, n,
        H, C or 3C) of heads that attend, h itself for others. The rest is as in model.Block."""
        if not self.attending:
            return h
        outputs = [head(h, cache, slots, mask) for head, cache in zip(self.heads, caches)]
        return torch.stack(outputs, dim=2)

    def per_position(self, h):
        """The rest, only where tokens are drafted: h (B, n, ...) from `attend` -> what Head.forward
        returns, of every head, (B, n, H, C or 3C)"""
        if self.attending:
            return h

        def run(parameters):
            return functional_call(self.heads[0], parameters, (h,))
        return torch.vmap(run, out_dims=2)(self.stacked)

    def logits_after(self, z, i, previous):
        """z (B, 1, 3C) from `per_position`, of the i-th head; previous (B, n): the token before the
        one that it drafts, or several in its place -> logits (B, n, K)"""
        return self.unembed(self.heads[i].reader(z, self.tables[i][previous]))
