"""Multi-token heads: what to add to a GPT so that one forward pass predicts several later tokens.

The one idea is *offsets*. From the hidden state after x_1..x_t, offset o predicts x_{t+o}:

    (1,)          next-token prediction (NTP), the GPT itself
    (1, 2, 3, 4)  multi-token prediction (MTP): adjacent tokens
    (1, 3, 5, 7)  leap MTP with stride 2: fewer heads per distance; looking back fills the holes

Offset 1 is always the GPT's own unembedding; each further offset gets a head. Adding heads to a
frozen GPT therefore never changes its next-token prediction.

Read on: offsets and draft sources, the heads, the model that holds them, the joint loss, and the
heads on a block of tokens, which is how a decoder runs them.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Block, InputError, KVCache, require


# ----------------------------------------------------------------------------------------------
# Offsets, and where a draft comes from

def mtp_offsets(n):
    """The first n adjacent tokens: mtp_offsets(4) == (1, 2, 3, 4)."""
    return leap_offsets(n, 1)


def leap_offsets(n, stride):
    """n tokens, `stride` apart: leap_offsets(4, 2) == (1, 3, 5, 7) (L-MTP, section 3.1)."""
    require(min(n, stride) > 0, f"n and stride must be at least 1, not {n} and {stride}")
    return tuple(1 + stride * i for i in range(n))


def parse_offsets(text):
    """"1,3,5,7" -> (1, 3, 5, 7). Raises InputError."""
    try:
        return check_offsets([int(o) for o in text.split(",")])
    except InputError:
        raise
    except ValueError:
        raise InputError(f"offsets are numbers with commas, as in 1,2,3,4; not {text!r}") from None


def check_offsets(offsets, available=None):
    """offsets as a tuple. Raises InputError unless they start with 1, increase and are
    `available`."""
    offsets = tuple(int(o) for o in offsets)
    increase = all(a < b for a, b in zip(offsets, offsets[1:]))
    require(offsets[:1] == (1,) and increase,
            f"offsets must start with 1 and increase, as in 1,3,5,7; not {offsets}")
    for o in offsets:
        require(o in (available or offsets), f"the model has no head for offset {o}: {available}")
    return offsets


def draft_sources(offsets):
    """Which head drafts which distance: {distance j: (offset o, look-back b)}, j =
    2..max(offsets).

    Offset o, read from the hidden state b tokens ago, predicts distance j = o - b. Of the offsets
    that reach j, the nearest is taken, because accuracy falls with the offset. MTP never looks
    back (b = 0); leap with stride k fills its holes with b = 1..k-1 (L-MTP, section 3.2):

    >>> draft_sources((1, 3, 5))
    {2: (3, 1), 3: (3, 0), 4: (5, 1), 5: (5, 0)}
    """
    offsets = check_offsets(offsets)
    nearest = {j: min(o for o in offsets if o >= j) for j in range(2, offsets[-1] + 1)}
    return {j: (o, o - j) for j, o in nearest.items()}


# ----------------------------------------------------------------------------------------------
# Heads. Both kinds start as the identity: an untrained head predicts the next token, as the GPT.

class ResBlockHead(nn.Module):
    """n_layer residual blocks z <- z + silu(W z + b), W and b zero at first (Medusa's and
    L-MTP's)."""

    def __init__(self, gpt_config, n_layer):
        super().__init__()
        C = gpt_config.n_embd
        self.blocks = nn.ModuleList([nn.Linear(C, C) for _ in range(n_layer)])
        for p in self.parameters():
            nn.init.zeros_(p)

    def forward(self, z, cache=None, slots=None, mask=None):
        """(..., C) -> (..., C). Each position on its own, so the cache is not needed."""
        for linear in self.blocks:
            z = z + F.silu(linear(z))
        return z


class BlockHead(nn.Module):
    """n_layer transformer layers of the GPT's own shape (Gloeckle's and Mehra's head). They
    attend to the past, so in decoding they have a KV cache of their own."""

    def __init__(self, gpt_config, n_layer):
        super().__init__()
        self.blocks = nn.ModuleList([Block(gpt_config) for _ in range(n_layer)])
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            if "c_proj" in name or name.endswith("bias"):  # c_proj = 0: adds nothing yet
                nn.init.zeros_(p)

    def forward(self, z, cache=None, slots=None, mask=None):
        """(B, T, C) -> (B, T, C); the rest is as in model.Block, with one cache layer per
        block."""
        for i, block in enumerate(self.blocks):
            z = block(z, cache.layers[i] if cache else None, slots, mask)
        return z


KINDS = {"resblock": ResBlockHead, "block": BlockHead}


def weighted_hidden_states(states, mix):
    """What a head reads instead of the final hidden states (WHS, Mehra et al. 2025): the sum of
    all layers' hidden states, weighted by softmax(mix). So it can use what later layers drop.

    states (..., L, C): each layer's output after the final norm; mix (L,) -> (..., C)."""
    return torch.einsum("...lc,l->...c", states, mix.softmax(0).to(states.dtype))


@dataclass
class HeadsConfig:
    """Which heads a model has."""
    offsets: tuple = (1, 2, 3, 4)
    kind: str = "resblock"            # "resblock" or "block"
    n_layer: int = 1                  # residual blocks or transformer layers per head
    own_unembedding: bool = False     # each head trains a copy of the unembedding
    whs: bool = False                 # weighted hidden states: each head reads all layers

    def __post_init__(self):
        self.offsets = check_offsets(self.offsets)
        require(self.kind in KINDS, f"unknown kind of head {self.kind!r}: {', '.join(KINDS)}")
        require(self.n_layer > 0, f"a head needs at least one layer, not {self.n_layer}")


class MultiTokenGPT(nn.Module):
    """A GPT and one head for each offset after the first. With offsets (1,) it is the GPT
    alone."""

    def __init__(self, gpt, heads_config):
        super().__init__()
        self.gpt, self.heads_config, self.offsets = gpt, heads_config, heads_config.offsets
        config, names = gpt.config, [str(o) for o in self.offsets[1:]]
        require(self.offsets[-1] <= config.block_size, f"offset {self.offsets[-1]} is beyond the "
                f"model's context of {config.block_size}")
        head = KINDS[heads_config.kind]
        self.heads = nn.ModuleDict({o: head(config, heads_config.n_layer) for o in names})
        self.unembeddings = nn.ModuleDict()  # empty: all heads use gpt.lm_head
        if heads_config.own_unembedding:
            for o in names:
                self.unembeddings[o] = nn.Linear(config.n_embd, config.vocab_size, bias=False)
                self.unembeddings[o].weight = nn.Parameter(gpt.lm_head.weight.detach().clone())
        self.mixes = nn.ParameterDict()  # empty: all read the last layer
        if heads_config.whs:
            start = torch.zeros(config.n_layer)  # half for the last layer
            start[-1] = math.log(max(1, config.n_layer - 1))
            for o in names:
                self.mixes[o] = nn.Parameter(start.clone())

    def hidden_states(self, idx):
        """What the heads read: (B, T) int64 -> (B, T, C), or with weighted hidden states
        (B, T, n_layer, C), of which the last layer's are those of the GPT."""
        if not self.mixes:
            return self.gpt.hidden_states(idx)
        stream = self.gpt.residual_stream(idx)[1:]
        return torch.stack([self.gpt.transformer.ln_f(x) for x in stream], dim=2)

    def offset_logits(self, h, offset):
        """h from hidden_states -> logits (B, T, V) of an offset; [:, t] predicts token t +
        offset."""
        if offset == 1:
            return self.gpt.lm_head(h[:, :, -1] if self.mixes else h)
        o = str(offset)
        if self.mixes:
            h = weighted_hidden_states(h, self.mixes[o])
        unembed = self.unembeddings[o] if self.unembeddings else self.gpt.lm_head
        return unembed(self.heads[o](h))

    def layer_weights(self):
        """{offset: the weight of each layer in what its head reads}; empty without WHS."""
        return {int(o): mix.detach().float().softmax(0).tolist() for o, mix in self.mixes.items()}

    def forward(self, idx):
        """(B, T) int64 -> {offset: logits (B, T, V)}."""
        h = self.hidden_states(idx)
        return {o: self.offset_logits(h, o) for o in self.offsets}


# ----------------------------------------------------------------------------------------------
# The joint loss

def predictions_and_targets(model, h, idx, offset):
    """One offset's logits (n, V) and the tokens (n,) that they predict; n = B * (T - offset).

    idx (B, T); h (B, T - 1, ...) = model.hidden_states(idx[:, :-1]). Position t of offset o
    predicts token t + o, so the last o - 1 positions have no target."""
    targets = idx[:, offset:]  # (B, T - o)
    logits = model.offset_logits(h[:, :targets.shape[1]], offset)
    return logits.flatten(0, 1), targets.flatten()


def joint_loss(model, idx, weights=None, backward=False, scale=1.0):
    """The loss of every offset: idx (B, T + 1) int64 -> {offset: mean nats, a detached scalar}.

    weights {offset: float} (1 where absent); an offset with weight 0 is left out. backward=True
    adds the gradients of scale * sum_o weights[o] * loss_o to .grad wherever parameters require
    them. It does so head by head (Gloeckle et al. 2024, section 2): a head's logits, by far the
    largest tensors here, are made, used and freed before the next head's, so the peak holds one
    head's however many there are. Each head leaves its gradient at the hidden states, and the
    trunk runs backward once with their sum. The result is the gradient of the plain sum."""
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
            (scale * weight * loss).backward()
        losses[o] = loss.detach()
    if h.requires_grad:
        hidden.backward(h.grad)
    return losses


# ----------------------------------------------------------------------------------------------
# All heads on a block of tokens

PADDING = {"cuda": 64}  # its kernels like a multiple of this many rows of an unembedding


class DraftHeads:
    """The GPT's unembedding and the heads of some offsets, run together on a block of tokens.

    This is all that a decoder sees of the heads: `hidden_states`, then `logits`. The weights are
    the model's own, with two exceptions. The first layers of residual heads that read the last
    layer are one product C -> H * C, and on CUDA an unembedding gets zero rows up to a multiple
    of 64."""

    def __init__(self, model, offsets):
        self.config, self.ln_f = model.gpt.config, model.gpt.transformer.ln_f
        names = [str(o) for o in offsets if o > 1]
        self.heads = [model.heads[o] for o in names]
        self.mixes = [model.mixes[o] for o in names] if model.mixes else []
        own = [model.unembeddings[o] for o in names] if model.unembeddings else []
        self.unembeddings = [with_padding(linear) for linear in (model.gpt.lm_head, *own)]
        self.first, self.deeper = None, []
        if self.heads and isinstance(self.heads[0], ResBlockHead) and not self.mixes:
            first, *self.deeper = zip(*(head.blocks for head in self.heads))  # layers of H Linears
            C = self.config.n_embd
            self.first = nn.Linear(C, len(first) * C, device="meta")
            self.first.weight = nn.Parameter(torch.cat([f.weight.detach() for f in first]))
            self.first.bias = nn.Parameter(torch.cat([f.bias.detach() for f in first]))

    def caches(self, **how):
        """A KVCache per head (how: as in KVCache), without layers for heads that do not attend."""
        layers = [len(head.blocks) if isinstance(head, BlockHead) else 0 for head in self.heads]
        return [KVCache(n, **how) for n in layers]

    def hidden_states(self, stream, caches, slots, mask):
        """stream: GPT.residual_stream of a block, n_layer + 1 tensors (B, N, C); slots and mask
        as in model.Block -> (B, N, 1 + H, C): the final hidden states, and what each head makes
        of them."""
        h = self.ln_f(stream[-1])  # (B, N, C)
        if self.first is not None:
            z = h[:, :, None] + F.silu(self.first(h).unflatten(-1, (len(self.heads), -1)))
            for linears in self.deeper:
                outputs = [linear(z[:, :, i]) for i, linear in enumerate(linears)]
                z = z + F.silu(torch.stack(outputs, dim=2))  # (B, N, H, C)
            return torch.cat([h[:, :, None], z], dim=2)
        layers = torch.stack([self.ln_f(x) for x in stream[1:]], dim=2) if self.mixes else None
        outputs = [h]
        for i, head in enumerate(self.heads):
            z = weighted_hidden_states(layers, self.mixes[i]) if self.mixes else h
            outputs.append(head(z, caches[i], slots, mask))
        return torch.stack(outputs, dim=2)

    def logits(self, x):
        """x (B, N, 1 + H, C) from hidden_states -> logits (B, N, 1 + H, V), offset 1 first. A
        shared unembedding, the largest matrix of all, is read once for all of them."""
        if len(self.unembeddings) == 1:
            logits = self.unembeddings[0](x)
        else:
            logits = torch.stack([f(x[:, :, i]) for i, f in enumerate(self.unembeddings)], dim=2)
        return logits[..., :self.config.vocab_size]


def with_padding(linear):
    """A Linear without bias, with zero rows where its device likes them (50,257 is odd); else
    itself."""
    missing = -linear.out_features % PADDING.get(linear.weight.device.type, 1)
    if not missing:
        return linear
    rows = linear.out_features + missing
    padded = nn.Linear(linear.in_features, rows, bias=False, device="meta")
    padded.weight = nn.Parameter(F.pad(linear.weight.detach(), (0, 0, 0, missing)))
    return padded
