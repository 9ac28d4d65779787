"""Lesson 2: what an offset is, where a draft comes from, what a head reads, and how several losses
take one backward pass.
"""
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import tiny_gpt, tiny_model
from heads import (DraftHeads, HeadsConfig, MultiTokenGPT, draft_sources, joint_loss,
                   predictions_and_targets)
from model import causal_mask, empty_cache

KINDS = pytest.mark.parametrize("kind", ["resblock", "block"])
WHS = pytest.mark.parametrize("whs", [False, True])
SEQUENTIAL = pytest.mark.parametrize("sequential", [False, True])


# ---- Draft sources: looking back fills the holes ---------------------------------------------

def test_leap_fills_the_holes_by_looking_one_position_back():
    # Offset 3, one token back, predicts x_{t-1+3} = x_{t+2}: the hole between offsets 1 and 3.
    assert draft_sources((1, 3, 5, 7)) == {2: (3, 1), 3: (3, 0), 4: (5, 1), 5: (5, 0),
                                           6: (7, 1), 7: (7, 0)}


@pytest.mark.parametrize("offsets", [(1,), (1, 2, 3, 4), (1, 9), (1, 2, 3, 4, 5, 7), (1, 4, 6)])
def test_sources_cover_all_distances_with_the_nearest_offset_that_reaches(offsets):
    sources = draft_sources(offsets)
    assert list(sources) == list(range(2, offsets[-1] + 1))
    for j, (o, b) in sources.items():
        assert o in offsets and o - b == j
        assert not any(j <= other < o for other in offsets)


# ---- Heads -----------------------------------------------------------------------------------

@KINDS
@WHS
@SEQUENTIAL
def test_heads_do_not_change_the_next_token_prediction(kind, whs, sequential):
    gpt = tiny_gpt()
    model = tiny_model((1, 3, 5), kind, gpt=gpt, whs=whs, sequential=sequential)
    idx = torch.randint(0, 31, (2, 12))
    logits = model(idx)
    assert list(logits) == [1, 3, 5]
    torch.testing.assert_close(logits[1], gpt(idx))


@KINDS
@SEQUENTIAL
def test_an_untrained_head_repeats_the_next_token_prediction(kind, sequential):
    model = tiny_model(kind=kind, sequential=sequential, untrained=True, n_layer=2)
    logits = model(torch.randint(0, 31, (2, 12)))
    for o in model.offsets:
        torch.testing.assert_close(logits[o], logits[1])


def test_heads_share_no_weights():
    model = tiny_model((1, 2, 3), n_layer=3)
    storages = {p.data_ptr() for p in model.heads.parameters()}
    assert len(storages) == 2 * 3 * 2  # 2 heads of 3 layers, each with a weight and a bias


# ---- Weighted hidden states: a head may read all layers --------------------------------------

def test_a_head_reads_the_weighted_sum_of_all_normalised_layers():
    model = tiny_model((1, 3), whs=True)
    idx = torch.randint(0, 31, (2, 12))
    layers = [model.gpt.transformer.ln_f(x) for x in model.gpt.residual_stream(idx)[1:]]
    a, b = model.heads["3"].mix.softmax(0)
    z = model.heads["3"].blocks[0](a * layers[0] + b * layers[1])
    torch.testing.assert_close(model(idx)[3], model.gpt.lm_head(z))


def test_the_weighting_starts_with_half_on_the_last_layer_and_each_head_learns_its_own():
    model = MultiTokenGPT(tiny_gpt(n_layer=4), HeadsConfig((1, 3, 5), whs=True))
    for head in model.heads.values():
        assert head.mix.softmax(0).tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    joint_loss(model, torch.randint(0, 31, (2, 24)), backward=True)
    gradients = [model.heads[o].mix.grad for o in ("3", "5")]
    assert gradients[0].abs().min() > 0
    assert not torch.equal(*gradients)


# ---- Sequential heads: the token before is known, because a decoder drafts one after another -

@KINDS
@WHS
def test_a_sequential_head_reads_the_token_just_before_and_nothing_later(kind, whs):
    model = tiny_model((1, 4), kind, sequential=True, whs=whs)
    idx = torch.randint(0, 31, (1, 16))
    changed = idx.clone()
    changed[0, 9] = (idx[0, 9] + 1) % 31
    moved = (model(changed)[4] - model(idx)[4])[0].abs().amax(dim=-1) > 1e-6
    # Position 6 predicts token 10 and reads token 9. Positions 7 and 8 predict 11 and 12.
    assert moved[:13].tolist() == [t == 6 or t >= 9 for t in range(13)]


# ---- The joint loss --------------------------------------------------------------------------

@KINDS
@SEQUENTIAL
def test_training_sees_exactly_what_a_decoder_knows(kind, sequential):
    # The prediction of token t + o from position t is the one made before that token is known.
    model = tiny_model(kind=kind, sequential=sequential)
    idx = torch.randint(0, 31, (1, 10))
    h = model.hidden_states(idx[:, :-1])
    for o in model.offsets:
        logits, targets = predictions_and_targets(model, h, idx, o)
        assert targets.tolist() == idx[0, o:].tolist()
        for t in range(10 - o):
            torch.testing.assert_close(logits[t], model(idx[:, :t + o])[o][0, t])


@KINDS
@WHS
@SEQUENTIAL
def test_head_by_head_backward_gives_the_losses_and_gradients_of_the_plain_weighted_sum(
        kind, whs, sequential):
    model = tiny_model(kind=kind, whs=whs, sequential=sequential).double()
    idx = torch.randint(0, 31, (2, 24))
    weights = {2: 0.3, 5: 2.0}
    losses = joint_loss(model, idx, weights)  # without gradients
    joint_loss(model, idx, weights, backward=True)
    head_by_head = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    total = 0
    for o, logits in model(idx).items():  # offset o compares position t with token t + o
        loss = F.cross_entropy(logits[:, :-o].flatten(0, 1), idx[:, o:].flatten())
        torch.testing.assert_close(losses[o], loss.detach())
        total = total + weights.get(o, 1.0) * loss
    total.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(head_by_head[name], p.grad, rtol=1e-10, atol=1e-12, msg=name)


def test_an_offset_of_weight_zero_costs_nothing():
    model = tiny_model((1, 2, 4))
    calls = []
    model.heads["2"].register_forward_hook(lambda *_: calls.append(2))
    losses = joint_loss(model, torch.randint(0, 31, (2, 24)), {2: 0.0}, backward=True)
    assert losses.keys() == {1, 4} and not calls


class PeakOfLargeTensors(TorchDispatchMode):
    """The peak number of tensors of at least `size` elements that are alive at once."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.alive = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.numel() >= self.size:
                storage = t.untyped_storage()
                key = storage._cdata
                if key not in self.alive:
                    self.alive[key] = weakref.finalize(storage, self.alive.pop, key, None)
                self.peak = max(self.peak, len(self.alive))
        return out


@SEQUENTIAL
def test_peak_memory_holds_one_heads_logits_however_many_heads_there_are(sequential):
    peaks = []
    for offsets in ((1, 2), (1, 2, 3, 4, 5, 6, 7, 8)):
        model = tiny_model(offsets, sequential=sequential, vocab_size=5000)
        idx = torch.randint(0, 5000, (4, 33))
        gc.collect()
        with PeakOfLargeTensors(4 * 20 * 5000) as counter:
            joint_loss(model, idx, backward=True)
        peaks.append(counter.peak)
    assert peaks[0] == peaks[1] > 0


# ---- The heads as a decoder runs them --------------------------------------------------------

@KINDS
@WHS
@SEQUENTIAL
@pytest.mark.parametrize("offsets", [(1,), (1, 3), (1, 2, 3, 4, 5, 7)])
@torch.no_grad()
def test_the_heads_run_together_and_block_by_block_as_one_by_one(kind, whs, sequential, offsets):
    model = tiny_model(kind=kind, n_layer=2, whs=whs, sequential=sequential)
    idx = torch.randint(0, 31, (2, 12))
    vocab = torch.tensor([3, 1, 20])
    run = DraftHeads(model, offsets, vocab)
    caches = [empty_cache(model.gpt.config, 2, 2, 16, torch.float32, "cpu") for _ in run.heads]
    h = model.hidden_states(idx)
    parts = []
    for position in torch.arange(12).expand(2, 12).split((7, 5), dim=1):
        slots = position + torch.tensor([[0], [16]])
        mask = causal_mask(position, torch.arange(16), torch.float32)
        parts.append(run.attend(h[:, position[0]], caches, slots.flatten(), mask))
    expected = model(idx)
    z = run.per_position(torch.cat(parts, dim=1)) if run.heads else None
    for i, o in enumerate(offsets[1:]):
        for t in range(12 - o):
            if sequential:
                logits = run.logits_after(z[:, t:t + 1, i], i, idx[:, t + o - 1:t + o])
            else:
                logits = run.unembed(z[:, t:t + 1, i])
            torch.testing.assert_close(logits[:, 0], expected[o][:, t, vocab])
