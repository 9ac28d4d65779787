"""Multi-token heads: what to add to a GPT so that one forward pass predicts several later tokens.

The one idea is *offsets*. From the hidden state after x_1..x_t, offset o predicts x_{t+o}:

    (1,)          next-token prediction (NTP), the GPT itself
    (1, 2, 3, 4)  multi-token prediction (MTP): adjacent tokens
    (1, 3, 5, 7)  leap MTP with stride 2: fewer heads per distance; the holes are filled by looking back

Offset 1 is always the GPT's own unembedding; every further offset gets a head. Adding heads to a frozen GPT therefore
never changes what it says. Read on: offsets and draft sources, the heads, the model that holds them, the joint loss,
heads for a server.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Block, InputError, write_pretrained


# ---------------------------------------------------------------------------------------------------------------------
# Offsets, and where a draft comes from

def mtp_offsets(n):
    """The first n adjacent tokens: mtp_offsets(4) == (1, 2, 3, 4)."""
    return leap_offsets(n, 1)


def leap_offsets(n, stride):
    """n tokens, `stride` apart: leap_offsets(4, 2) == (1, 3, 5, 7) (L-MTP, section 3.1). Stride 1 is MTP."""
    if n < 1 or stride < 1:
        raise InputError(f"offsets need at least one token and a stride of at least 1, not {n} and {stride}")
    return tuple(1 + stride * i for i in range(n))


def parse_offsets(text):
    """"1,3,5,7" -> (1, 3, 5, 7). Raises InputError."""
    try:
        return check_offsets(text.split(","))
    except ValueError as error:                                             # InputError is a ValueError
        raise error if isinstance(error, InputError) else InputError(
            f"offsets are numbers with commas between, as in 1,2,3,4; not {text!r}") from None


def check_offsets(offsets, available=None):
    """offsets as a tuple. Raises InputError unless they start with 1 and increase (and are all `available`)."""
    offsets = tuple(int(o) for o in offsets)
    if not offsets or offsets[0] != 1 or any(a >= b for a, b in zip(offsets, offsets[1:])):
        raise InputError(f"offsets must start with 1 and increase, as in 1,2,3,4 or 1,3,5,7; not {offsets}")
    if available is not None and not set(offsets) <= set(available):
        missing = ", ".join(str(o) for o in sorted(set(offsets) - set(available)))
        raise InputError(f"the model has no head for offset {missing}; it was trained with {tuple(available)}")
    return offsets


def draft_sources(offsets):
    """Which prediction guesses which distance: {distance j: (offset o, look-back b)} for j = 2..max(offsets).

    Offset o read from the hidden state b tokens ago predicts distance j = o - b. Of the offsets that reach j, the
    nearest is taken, because accuracy falls with the offset. MTP never looks back (b = 0); leap with stride k fills
    its holes with b = 1..k-1 (L-MTP, section 3.2). This one function replaces "MTP decoding" and "leap decoding".
    """
    offsets = check_offsets(offsets)
    return {j: (o, o - j) for j in range(2, offsets[-1] + 1) for o in [min(o for o in offsets if o >= j)]}


# ---------------------------------------------------------------------------------------------------------------------
# Heads. Both kinds start as the identity: an untrained head says what the GPT says about the next token.

class ResBlockHead(nn.Module):
    """n_layer residual blocks z <- z + silu(W z + b), W and b zero at first (Medusa and L-MTP's head)."""

    def __init__(self, gpt_config, n_layer):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(gpt_config.n_embd, gpt_config.n_embd) for _ in range(n_layer)])
        for linear in self.blocks:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, z, cache=None, slots=None, mask=None):
        """(..., C) -> (..., C). Position by position: the cache is not needed."""
        for linear in self.blocks:
            z = z + F.silu(linear(z))
        return z


class BlockHead(nn.Module):
    """n_layer transformer layers of the GPT's own shape (Gloeckle's and Mehra's head). They attend to the past, so in
    decoding they have a cache of their own."""

    def __init__(self, gpt_config, n_layer):
        super().__init__()
        self.blocks = nn.ModuleList([Block(gpt_config) for _ in range(n_layer)])
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            if "c_proj" in name or name.endswith("bias"):                   # c_proj = 0: the layer adds nothing yet
                nn.init.zeros_(p)

    def forward(self, z, cache=None, slots=None, mask=None):
        """(B, T, C) -> (B, T, C); cache, slots and mask as in model.Block, with one cache layer per block."""
        for i, block in enumerate(self.blocks):
            z = block(z, cache.layers[i] if cache else None, slots, mask)
        return z


KINDS = {"resblock": ResBlockHead, "block": BlockHead}


def weighted_hidden_states(states, mix):
    """What a head reads instead of the final hidden states (WHS; Mehra et al. 2025): the softmax(mix)-weighted sum of
    all layers' hidden states, so that it finds what later layers no longer hold. states (..., L, C), each layer's
    output after the final norm; mix (L,) -> (..., C)."""
    return torch.einsum("...lc,l->...c", states, mix.softmax(0).to(states.dtype))


@dataclass
class HeadsConfig:
    """Which heads a model has. own_unembedding: each head trains a copy of the unembedding instead of sharing it. whs:
    weighted hidden states: each head reads all layers."""
    offsets: tuple = (1, 2, 3, 4)
    kind: str = "resblock"            # "resblock" or "block"
    n_layer: int = 1                  # residual blocks or transformer layers per head
    own_unembedding: bool = False
    whs: bool = False

    def __post_init__(self):
        self.offsets = check_offsets(self.offsets)
        if self.kind not in KINDS:
            raise InputError(f"unknown kind of head {self.kind!r}; there are {', '.join(KINDS)}")
        if self.n_layer < 1:
            raise InputError(f"a head needs at least one layer, not {self.n_layer}")


class MultiTokenGPT(nn.Module):
    """A GPT and one head for each offset after the first. With offsets (1,) it is the GPT and nothing else."""

    def __init__(self, gpt, heads_config):
        super().__init__()
        self.gpt, self.heads_config, self.offsets = gpt, heads_config, heads_config.offsets
        if self.offsets[-1] > gpt.config.block_size:
            raise InputError(f"offset {self.offsets[-1]} is beyond the model's context of {gpt.config.block_size}")
        head = KINDS[heads_config.kind]
        self.heads = nn.ModuleDict({str(o): head(gpt.config, heads_config.n_layer) for o in self.offsets[1:]})
        self.unembeddings = nn.ModuleDict()                                 # empty: every head uses gpt.lm_head
        if heads_config.own_unembedding:
            for o in self.offsets[1:]:
                self.unembeddings[str(o)] = nn.Linear(gpt.config.n_embd, gpt.config.vocab_size, bias=False)
                self.unembeddings[str(o)].weight = nn.Parameter(gpt.lm_head.weight.detach().clone())
        self.mixes = nn.ParameterDict()                                     # empty: every head reads the last layer
        if heads_config.whs:
            start = torch.zeros(gpt.config.n_layer)
            start[-1] = math.log(max(1, gpt.config.n_layer - 1))            # half for the last layer, half for the rest
            for o in self.offsets[1:]:
                self.mixes[str(o)] = nn.Parameter(start.clone())

    def hidden_states(self, idx):
        """What the offsets read: (B, T) int64 -> (B, T, C), or with weighted hidden states (B, T, n_layer, C), of which
        the last layer's are those of the GPT."""
        if not self.mixes:
            return self.gpt.hidden_states(idx)
        return torch.stack([self.gpt.transformer.ln_f(x) for x in self.gpt.residual_stream(idx)[1:]], dim=2)

    def offset_logits(self, h, offset):
        """What offset `offset` says: h as from hidden_states -> logits (B, T, V); [:, t] is about token t + offset."""
        if offset == 1:
            return self.gpt.lm_head(h[:, :, -1] if self.mixes else h)
        if self.mixes:
            h = weighted_hidden_states(h, self.mixes[str(offset)])
        unembed = self.unembeddings[str(offset)] if self.unembeddings else self.gpt.lm_head
        return unembed(self.heads[str(offset)](h))

    def layer_weights(self):
        """{offset: the share of each layer in what its head reads}, of a model with weighted hidden states."""
        return {int(o): mix.detach().float().softmax(0).tolist() for o, mix in self.mixes.items()}

    def forward(self, idx):
        """(B, T) int64 -> {offset: logits (B, T, V)}."""
        h = self.hidden_states(idx)
        return {o: self.offset_logits(h, o) for o in self.offsets}


# ---------------------------------------------------------------------------------------------------------------------
# The joint loss

def predictions_and_targets(model, h, idx, offset):
    """What one offset says beside what is right: logits (n, V) and tokens (n,), with n = B * (T - offset).

    h (B, T - 1, ...): model.hidden_states(idx[:, :-1]); idx (B, T). Offset o at position t is about token t + o, so the
    last o - 1 positions have no target.
    """
    targets = idx[:, offset:]                                               # (B, T - o)
    return model.offset_logits(h[:, :targets.shape[1]], offset).flatten(0, 1), targets.flatten()


def joint_loss(model, idx, weights=None, backward=False, scale=1.0):
    """The loss of every offset: idx (B, T + 1) int64 -> {offset: mean cross-entropy in nats, a detached scalar}.

    An offset whose weight is 0 is left out (weights: {offset: float}, 1 where absent). With backward=True it also adds
    the gradients of scale * sum_o weights[o] * loss_o to the parameters' .grad, as far as they require gradients: where
    the backbone is frozen, only to the heads'. It does so head by head (Gloeckle et al. 2024, section 2): a head's
    logits, by far the largest tensors here, are made, used and freed before the next head's, so the peak holds one
    head's however many there are. Each head leaves its gradient at the hidden states, and the trunk runs backward once
    with their sum. The result is the gradient of the plain sum.
    """
    hidden = model.hidden_states(idx[:, :-1])                               # (B, T, C) or (B, T, n_layer, C)
    h = hidden.detach().requires_grad_(backward and hidden.requires_grad)   # the heads' gradients meet in h.grad
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


# ---------------------------------------------------------------------------------------------------------------------
# Heads for a server

def export_medusa(model, folder):
    """Write the heads as a Medusa drafter, which vLLM loads beside the backbone (model.gpt.save_pretrained).

    An MTP model with residual-block heads is exactly one: Medusa's head i, blocks.i and lm_heads.i, predicts the token
    i + 2 places after the hidden state, our offset i + 2. The format is that of vLLM's models/medusa.py, our biases
    being its medusa_fc_bias, a shared unembedding its original_lm_head.
    Raises InputError for models that Medusa cannot be, OSError when the folder cannot be written.
    """
    config, gpt = model.heads_config, model.gpt
    n = len(model.offsets)
    if n < 2 or model.offsets != mtp_offsets(n):
        raise InputError(f"Medusa's heads are offsets 2, 3, ... without a gap, not {model.offsets}: servers do not "
                         "look back yet, so leap heads cannot be exported")
    if config.kind != "resblock" or config.whs:
        raise InputError("Medusa's heads are residual blocks that read the last layer; "
                         + ("these read all layers" if config.whs else f"these are of kind {config.kind!r}"))
    tensors = {}
    for i, o in enumerate(model.offsets[1:]):
        for j, linear in enumerate(model.heads[str(o)].blocks):
            tensors[f"blocks.{i}.layers.{j}.weight"] = linear.weight
            tensors[f"blocks.{i}.layers.{j}.bias"] = linear.bias
        if config.own_unembedding or i == 0:
            unembed = model.unembeddings[str(o)] if config.own_unembedding else gpt.lm_head
            tensors[f"lm_heads.{i}.weight"] = unembed.weight
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_pretrained(folder, tensors, dict(
        architectures=["MedusaModel"], model_type="medusa", hidden_size=gpt.config.n_embd,
        vocab_size=gpt.config.vocab_size, num_heads=n - 1, num_hidden_layers=config.n_layer, medusa_fc_bias=True,
        original_lm_head=not config.own_unembedding))
