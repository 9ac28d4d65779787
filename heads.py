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
    """offsets as a tuple; raises InputError unless they start with 1, increase, are available."""
    offsets = tuple(int(o) for o in offsets)
    increase = all(a < b for a, b in zip(offsets, offsets[1:]))
    require(offsets[:1] == (1,) and increase,
            f"offsets must start with 1 and increase, as in 1,3,5,7; not {offsets}")
    for o in offsets:
        known = available or offsets
        require(o in known, f"the model has no head for offset {o}, only for {known}")
    return offsets


def draft_sources(offsets):
    """Which head drafts which distance 2..max(offsets): {distance: (offset, look-back)}.

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
    """n_layer residual blocks z <- z + silu(W z + b), zero at first (Medusa's, L-MTP's head)."""

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
        """(B, T, C) -> (B, T, C). The rest is as in model.Block; one cache layer per block."""
        for i, block in enumerate(self.blocks):
            z = block(z, cache.layers[i] if cache else None, slots, mask)
        return z


KINDS = {"resblock": ResBlockHead, "block": BlockHead}


class NextToken(nn.Module):
    """z + MLP([z, norm(e)]): tells a head at position t the next token x_{t+1}, by its embedding
    e. A decoder knows that token when it drafts, it is the bonus token. Such heads predict from
    the conditional distribution, others from the marginal one (cf. Hydra, EAGLE, DeepSeek-V3;
    arXiv 2402.05109, 2401.15077, 2412.19437). The MLP adds nothing at first."""

    def __init__(self, gpt_config):
        super().__init__()
        C = gpt_config.n_embd
        self.fc, self.proj = nn.Linear(2 * C, 2 * C), nn.Linear(2 * C, C)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, z, e):
        """z, e (..., C) -> (..., C)."""
        e = F.layer_norm(e, e.shape[-1:])
        return z + self.proj(F.silu(self.fc(torch.cat([z, e], dim=-1))))


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
    conditional: bool = False         # each head also reads the token after its position

    def __post_init__(self):
        self.offsets = check_offsets(self.offsets)
        require(self.kind in KINDS, f"unknown kind of head {self.kind!r}: {', '.join(KINDS)}")
        require(self.n_layer > 0, f"a head needs at least one layer, not {self.n_layer}")


class MultiTokenGPT(nn.Module):
    """A GPT and one head for each offset after the first; with offsets (1,) the GPT alone."""

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
        self.next_token = nn.ModuleDict()  # empty: no head reads x_{t+1}
        if heads_config.conditional:
            self.next_token = nn.ModuleDict({o: NextToken(config) for o in names})
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

    def offset_logits(self, h, offset, next_tokens=None):
        """h from hidden_states -> logits (B, T, V) of an offset; [:, t] predicts token t +
        offset. next_tokens (B, T): [:, t] is token t + 1, which conditional heads read."""
        if offset == 1:
            return self.gpt.lm_head(h[:, :, -1] if self.mixes else h)
        o = str(offset)
        if self.mixes:
            h = weighted_hidden_states(h, self.mixes[o])
        if self.next_token:
            h = self.next_token[o](h, self.gpt.transformer.wte(next_tokens))
        unembed = self.unembeddings[o] if self.unembeddings else self.gpt.lm_head
        return unembed(self.heads[o](h))

    def layer_weights(self):
        """{offset: the weight of each layer in what its head reads}; empty without WHS."""
        return {int(o): mix.detach().float().softmax(0).tolist() for o, mix in self.mixes.items()}

    def forward(self, idx):
        """(B, T) int64 -> {offset: logits (B, T, V)}, of conditional heads (B, T - 1, V)."""
        h, logits = self.hidden_states(idx), {}
        for o in self.offsets:
            n = idx.shape[1] - (o > 1 and len(self.next_token) > 0)
            logits[o] = self.offset_logits(h[:, :n], o, idx[:, 1:])
        return logits


# ----------------------------------------------------------------------------------------------
# The joint loss

def predictions_and_targets(model, h, idx, offset):
    """One offset's logits (n, V) and the tokens (n,) that they predict; n = B * (T - offset).

    idx (B, T); h (B, T - 1, ...) = model.hidden_states(idx[:, :-1]). Position t of offset o
    predicts token t + o, so the last o - 1 positions have no target."""
    targets = idx[:, offset:]  # (B, T - o)
    n = targets.shape[1]
    logits = model.offset_logits(h[:, :n], offset, next_tokens=idx[:, 1:n + 1])
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
    """The heads of some offsets as a decoder runs them: together, and only where they draft.

    A decoder sees no more of the heads than this: what they read (`states`), what they make of
    it (`run`), and their `logits`. Linears of residual heads are stacked and run as one, and on
    CUDA an unembedding gets zero rows up to a multiple of 64: else the weights are the model's.
    """

    def __init__(self, model, offsets):
        self.gpt, self.ln_f = model.gpt, model.gpt.transformer.ln_f
        self.vocab_size = model.gpt.config.vocab_size
        names = [str(o) for o in offsets if o > 1]
        self.heads = [model.heads[o] for o in names]
        self.mixes = [model.mixes[o] for o in names] if model.mixes else []
        self.unembedding = with_padding(model.gpt.lm_head)
        own = [model.unembeddings[o] for o in names] if model.unembeddings else []
        self.own = [with_padding(linear) for linear in own]
        self.next_token = [model.next_token[o] for o in names] if model.next_token else []
        self.attend = bool(self.heads) and isinstance(self.heads[0], BlockHead)
        self.layers = []
        if self.heads and not (self.attend or self.mixes):
            layers = list(zip(*(head.blocks for head in self.heads)))  # each H Linears
            if self.next_token:
                layers = [*zip(*((f.fc, f.proj) for f in self.next_token)), *layers]
            self.layers = [stack(linears) for linears in layers]

    def caches(self, **how):
        """A KVCache per head that attends (how: as in KVCache)."""
        return [KVCache(len(head.blocks), **how) for head in self.heads if self.attend]

    def states(self, stream):
        """What the heads read: GPT.residual_stream, n_layer + 1 tensors (B, N, C) -> (B, N, C), or
        (B, N, n_layer, C) with weighted hidden states."""
        if not self.mixes:
            return self.ln_f(stream[-1])
        return torch.stack([self.ln_f(x) for x in stream[1:]], dim=2)

    def next_logits(self, h):
        """Offset 1: h from `states` -> logits (B, N, V)."""
        return self.unembedding(h[:, :, -1] if self.mixes else h)[..., :self.vocab_size]

    def run(self, h, next_tokens, caches=None, slots=None, mask=None):
        """h (B, n, ...) from `states`, next_tokens (B, n): those after them -> (B, n, H, C). The
        rest is as in model.Block."""
        if self.layers:
            z, layers = h[:, :, None], self.layers  # (B, n, 1, C): all heads start from the same
            if self.next_token:
                fc, proj, *layers = layers
                e = self.gpt.transformer.wte(next_tokens)
                x = torch.cat([h, F.layer_norm(e, e.shape[-1:])], dim=-1)[:, :, None]
                z = z + per_head(F.silu(per_head(x, *fc)), *proj)
            for layer in layers:
                z = z + F.silu(per_head(z, *layer))
            return z  # (B, n, H, C)
        e = self.gpt.transformer.wte(next_tokens) if self.next_token else None
        outputs = []
        for i, head in enumerate(self.heads):
            z = weighted_hidden_states(h, self.mixes[i]) if self.mixes else h
            z = self.next_token[i](z, e) if self.next_token else z
            outputs.append(head(z, caches[i] if caches else None, slots, mask))
        return torch.stack(outputs, dim=2)

    def logits(self, z):
        """z (B, n, H, C) from `run` -> logits (B, n, H, V)."""
        if not self.own:
            return self.unembedding(z)[..., :self.vocab_size]
        logits = torch.stack([f(z[:, :, i]) for i, f in enumerate(self.own)], dim=2)
        return logits[..., :self.vocab_size]


def stack(linears):
    """H Linears of one shape -> weights (H, out, in), biases (H, out)."""
    return (torch.stack([f.weight.detach() for f in linears]),
            torch.stack([f.bias.detach() for f in linears]))


def per_head(x, weight, bias):
    """A Linear per head: x (B, n, H, in), or (B, n, 1, in) if all heads read the same; weight
    (H, out, in), bias (H, out) -> (B, n, H, out)."""
    if x.shape[2] == 1:
        x = F.linear(x[:, :, 0], weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
    else:
        x = torch.einsum("bnhi,hoi->bnho", x, weight)
    return x + bias


def with_padding(linear):
    """A Linear without bias: itself, or with zero rows where its device likes them."""
    missing = -linear.out_features % PADDING.get(linear.weight.device.type, 1)
    if not missing:
        return linear
    rows = linear.out_features + missing
    padded = nn.Linear(linear.in_features, rows, bias=False, device="meta")
    padded.weight = nn.Parameter(F.pad(linear.weight.detach(), (0, 0, 0, missing)))
    return padded
