"""Multi-token heads: what to add to a GPT so that one forward pass predicts several later tokens.

The one idea is *offsets*. From the hidden state after x_1..x_t, offset o predicts x_{t+o}:

    (1,)          next-token prediction (NTP), the GPT itself
    (1, 2, 3, 4)  multi-token prediction (MTP): adjacent tokens
    (1, 3, 5, 7)  leap MTP with stride 2: fewer heads per distance; looking back fills the holes

Offset 1 is always the GPT's own unembedding; each further offset gets a head. Adding heads to a
frozen GPT therefore never changes its next-token prediction.

From the top: offsets and draft sources, the heads, the model that holds them, the joint loss, the
heads as a decoder runs them.
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

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
        offsets = [int(o) for o in text.split(",")]
    except ValueError:
        raise InputError(f"offsets are numbers with commas, as in 1,2,3,4; not {text!r}") from None
    return check_offsets(offsets)


def check_offsets(offsets, available=None):
    """offsets as a tuple; raises InputError unless they start with 1, increase, are available."""
    offsets = tuple(int(o) for o in offsets)
    require(offsets[:1] == (1,) and offsets == tuple(sorted(set(offsets))),
            f"offsets must start with 1 and increase, as in 1,3,5,7; not {offsets}")
    for o in offsets if available else ():
        require(o in available, f"the model has no head for offset {o}, only for {available}")
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
# Heads

@dataclass
class HeadsConfig:
    """Which heads a model has."""
    offsets: tuple = (1, 2, 3, 4)
    kind: str = "resblock"         # "resblock" or "block": what a head's layers are
    n_layer: int = 1               # residual blocks or transformer layers per head
    own_unembedding: bool = False  # each head trains a copy of the unembedding
    whs: bool = False              # weighted hidden states: each head reads all layers
    conditional: bool = False      # each head also reads the token after its position

    def __post_init__(self):
        self.offsets = check_offsets(self.offsets)
        require(self.kind in LAYERS, f"unknown kind of head {self.kind!r}: {', '.join(LAYERS)}")
        require(self.n_layer > 0, f"a head needs at least one layer, not {self.n_layer}")


class ResBlock(nn.Linear):
    """z + silu(W z + b), zero at first (the head of Medusa and L-MTP)."""

    def __init__(self, gpt_config):
        super().__init__(gpt_config.n_embd, gpt_config.n_embd)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, z, cache=None, slots=None, mask=None):
        """(..., C) -> (..., C). Each position on its own, so the cache is not needed."""
        return z + F.silu(super().forward(z))


def transformer_block(gpt_config):
    """A layer of the GPT's own shape (the head of Gloeckle et al. and Mehra et al.) that adds
    nothing at first. It attends to the past, so in decoding it has a KV cache of its own."""
    block = Block(gpt_config)
    for name, p in block.named_parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.02)
        if "c_proj" in name or name.endswith("bias"):
            nn.init.zeros_(p)
    return block


LAYERS = {"resblock": ResBlock, "block": transformer_block}


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


class Head(nn.Module):
    """From the hidden states after x_1..x_t to those whose unembedding predicts x_{t+o}. At first
    it adds nothing: an untrained head predicts the next token, with WHS from all layers."""

    def __init__(self, gpt, config):
        super().__init__()
        self.mix = self.next_token = self.unembedding = None
        if config.whs:
            L = gpt.config.n_layer
            start = torch.zeros(L)  # half of the weight for the last layer
            start[-1] = math.log(max(1, L - 1))
            self.mix = nn.Parameter(start)
        if config.conditional:
            self.next_token = NextToken(gpt.config)
        self.blocks = nn.ModuleList([LAYERS[config.kind](gpt.config)
                                     for _ in range(config.n_layer)])
        if config.own_unembedding:
            self.unembedding = copy.deepcopy(gpt.lm_head)

    def forward(self, h, e=None, cache=None, slots=None, mask=None):
        """h (B, T, C), or with weighted hidden states (B, T, L, C) -> (B, T, C). e (B, T, C): the
        embeddings of the next tokens, if conditional. The rest is as in model.Block."""
        z = h if self.mix is None else weighted_hidden_states(h, self.mix)
        if self.next_token is not None:
            z = self.next_token(z, e)
        for i, block in enumerate(self.blocks):
            z = block(z, cache.layers[i] if cache else None, slots, mask)
        return z


class MultiTokenGPT(nn.Module):
    """A GPT and one head for each offset after the first; with offsets (1,) the GPT alone."""

    def __init__(self, gpt, heads_config):
        super().__init__()
        self.gpt, self.heads_config, self.offsets = gpt, heads_config, heads_config.offsets
        require(self.offsets[-1] <= gpt.config.block_size, f"offset {self.offsets[-1]} is beyond "
                f"the model's context of {gpt.config.block_size}")
        self.heads = nn.ModuleDict({str(o): Head(gpt, heads_config) for o in self.offsets[1:]})

    def read(self, stream):
        """What the heads read: GPT.residual_stream, n_layer + 1 tensors (B, T, C) -> (B, T, C), or
        (B, T, n_layer, C) with weighted hidden states, of which the last layer's are the GPT's."""
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

    def embed_next(self, next_tokens):
        """What conditional heads read of the next tokens (B, T); None for other heads."""
        return self.gpt.transformer.wte(next_tokens) if self.heads_config.conditional else None

    def offset_logits(self, h, offset, next_tokens=None):
        """h from `read` -> logits (B, T, V) of an offset; [:, t] predicts token t + offset.
        next_tokens (B, T): [:, t] is token t + 1, which conditional heads read."""
        if offset == 1:
            return self.gpt.lm_head(self.last_layer(h))
        head = self.heads[str(offset)]
        z = head(h, self.embed_next(next_tokens))
        return (head.unembedding or self.gpt.lm_head)(z)

    def layer_weights(self):
        """{offset: the weight of each layer in what its head reads}; empty without WHS."""
        return {int(o): head.mix.detach().float().softmax(0).tolist()
                for o, head in self.heads.items() if head.mix is not None}

    def forward(self, idx):
        """(B, T) int64 -> {offset: logits (B, T, V)}, of conditional heads (B, T - 1, V)."""
        h, logits = self.hidden_states(idx), {}
        for o in self.offsets:
            n = idx.shape[1] - (o > 1 and self.heads_config.conditional)
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


def joint_loss(model, idx, weights=None, backward=False, scale=1.0, distill=0.0):
    """The loss of every offset: idx (B, T + 1) int64 -> {offset: mean nats, a detached scalar}.

    weights {offset: float} (1 where absent); an offset with weight 0 is left out. backward=True
    adds the gradients of scale * sum_o weights[o] * loss_o to .grad wherever parameters require
    them. It does so head by head (Gloeckle et al. 2024, section 2): a head's logits, by far the
    largest tensors here, are made, used and freed before the next head's, so the peak holds one
    head's however many there are. Each head leaves its gradient at the hidden states, and the
    trunk runs backward once with their sum. The result is the gradient of the plain sum.

    distill: the fraction of a head's loss that is the cross-entropy against the distribution which
    the model itself has of that token once it has read the text up to there (self-distillation):
    offset 1's at t + o - 1, without gradient."""
    hidden = model.hidden_states(idx[:, :-1])  # (B, T, C) or (B, T, n_layer, C)
    h = hidden.detach()  # the heads' gradients meet in h.grad
    h.requires_grad_(backward and hidden.requires_grad)
    own = model.offset_logits(h, 1).detach() if distill else None  # (B, T, V)
    losses = {}
    for o in model.offsets:
        weight = (weights or {}).get(o, 1.0)
        if weight == 0:
            continue
        logits, targets = predictions_and_targets(model, h, idx, o)
        loss = F.cross_entropy(logits, targets)
        if distill and o > 1:
            p = own[:, o - 1:].flatten(0, 1).softmax(-1)  # of the same tokens
            loss = (1 - distill) * loss + distill * F.cross_entropy(logits, p)
        if backward and loss.requires_grad:
            (scale * weight * loss).backward()
        losses[o] = loss.detach()
    if h.requires_grad:
        hidden.backward(h.grad)
    return losses


# ----------------------------------------------------------------------------------------------
# The heads as a decoder runs them: all on the same tokens

PADDING = {"cuda": 64}  # its kernels like a multiple of this many rows of an unembedding


class DraftHeads:
    """The heads of some offsets, and offset 1, for decoding. What is run together is copied: the
    weights of heads that do not attend, the rows of `vocab`, and, on CUDA, what is padded.

    vocab (K,) int64: the only tokens that heads draft; None: all V."""

    def __init__(self, model, offsets, vocab=None):
        self.model, self.vocab_size = model, model.gpt.config.vocab_size
        self.draft_size = self.vocab_size if vocab is None else len(vocab)
        self.heads = [model.heads[str(o)] for o in offsets if o > 1]
        self.unembed = unembed = with_padding(model.gpt.lm_head)
        self.unembed_drafts = unembed if vocab is None else with_padding(model.gpt.lm_head, vocab)
        self.own = [with_padding(head.unembedding, vocab)
                    for head in self.heads if head.unembedding is not None]
        self.attend = model.heads_config.kind == "block"
        if self.heads and not self.attend:  # all parameters but unembeddings, (H, ...) each
            named = [dict(head.named_parameters()) for head in self.heads]
            self.stacked = {name: torch.stack([p[name].detach() for p in named])
                            for name in named[0] if "unembedding" not in name}

    def caches(self, **how):
        """A KVCache for each head that attends (how: as in KVCache)."""
        return [KVCache(len(head.blocks), **how) for head in self.heads if self.attend]

    def run(self, h, next_tokens, caches=(), slots=None, mask=None):
        """h (B, n, ...) as from MultiTokenGPT.read, next_tokens (B, n): those after them -> (B, n,
        H, C). The rest is as in model.Block."""
        e = self.model.embed_next(next_tokens)
        if self.attend:
            outputs = [head(h, e, cache, slots, mask) for head, cache in zip(self.heads, caches)]
            return torch.stack(outputs, dim=2)

        def run_one(parameters):
            return functional_call(self.heads[0], parameters, (h, e))
        return torch.vmap(run_one, out_dims=2)(self.stacked)

    def next_logits(self, h):
        """Offset 1: h as from MultiTokenGPT.read -> logits (B, n, V)."""
        return self.unembed(self.model.last_layer(h))[..., :self.vocab_size]

    def logits(self, z):
        """z (B, n, H, C) from `run` -> logits (B, n, H, K)."""
        if not self.own:
            return self.unembed_drafts(z)[..., :self.draft_size]
        logits = torch.stack([f(z[:, :, i]) for i, f in enumerate(self.own)], dim=2)
        return logits[..., :self.draft_size]


def with_padding(linear, rows=None):
    """A Linear without bias, or some of its rows, and zero rows where its device likes them."""
    weight = linear.weight.detach() if rows is None else linear.weight.detach()[rows]
    missing = -len(weight) % PADDING.get(weight.device.type, 1)
    if rows is None and not missing:
        return linear
    padded = nn.Linear(linear.in_features, len(weight) + missing, bias=False, device="meta")
    padded.weight = nn.Parameter(F.pad(weight, (0, 0, 0, missing)))
    return padded
