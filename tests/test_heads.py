"""Lesson 2: what an offset is, where a draft comes from, and how several losses take one backward
pass."""
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import heads
from conftest import tiny_gpt, tiny_model
from heads import (DraftHeads, HeadsConfig, MultiTokenGPT, draft_sources, joint_loss,
                   leap_offsets, mtp_offsets, parse_offsets, predictions_and_targets)
from model import InputError


# Offsets

def test_mtp_predicts_adjacent_tokens():
    assert mtp_offsets(4) == (1, 2, 3, 4)


def test_leap_predicts_tokens_a_stride_apart():
    assert leap_offsets(4, 2) == (1, 3, 5, 7)
    assert leap_offsets(3, 3) == (1, 4, 7)


def test_mtp_is_leap_with_stride_one():
    assert all(mtp_offsets(n) == leap_offsets(n, 1) for n in range(1, 9))


@pytest.mark.parametrize("bad", ["", "2,3", "1,1", "1,3,2", "1,x", "0,1", "1,-2"])
def test_offsets_start_with_one_and_increase(bad):
    with pytest.raises(InputError):
        parse_offsets(bad)


# Draft sources: looking back fills the holes

def test_mtp_drafts_every_distance_from_the_newest_position():
    assert draft_sources((1, 2, 3, 4)) == {2: (2, 0), 3: (3, 0), 4: (4, 0)}


def test_leap_fills_the_holes_by_looking_one_position_back():
    # Offset 3, one token back, predicts x_{t-1+3} = x_{t+2}: the hole between offsets 1 and 3.
    assert draft_sources((1, 3, 5, 7)) == {2: (3, 1), 3: (3, 0), 4: (5, 1), 5: (5, 0),
                                           6: (7, 1), 7: (7, 0)}


def test_a_wider_stride_looks_back_further():
    assert [b for _, b in draft_sources((1, 4, 7)).values()] == [2, 1, 0, 2, 1, 0]


@pytest.mark.parametrize("offsets", [
    (1,), (1, 2), (1, 9), (1, 2, 3, 4, 5, 7), (1, 3, 5, 7, 9), (1, 4, 6)])
def test_sources_cover_all_distances_with_the_nearest_offset_that_reaches(offsets):
    sources = draft_sources(offsets)
    assert list(sources) == list(range(2, offsets[-1] + 1))
    for j, (o, b) in sources.items():
        assert o in offsets and o - b == j
        assert not any(j <= other < o for other in offsets)


# Heads

@pytest.mark.parametrize("kind", ["resblock", "block"])
@pytest.mark.parametrize("own, conditional", [(False, False), (True, False), (True, True)])
def test_an_untrained_head_repeats_the_next_token_prediction(kind, own, conditional):
    model = tiny_model(kind=kind, own=own, conditional=conditional, untrained=True, n_layer=2)
    logits = model(torch.randint(0, 31, (2, 12)))
    assert list(logits) == [1, 2, 3, 4, 5, 7]
    for o in model.offsets:
        torch.testing.assert_close(logits[o], logits[1][:, :logits[o].shape[1]])


@pytest.mark.parametrize("kind", ["resblock", "block"])
def test_adding_heads_does_not_change_the_next_token_prediction(kind):
    gpt, idx = tiny_gpt(), torch.randint(0, 31, (2, 12))
    alone = gpt(idx)[0]
    model = MultiTokenGPT(gpt, HeadsConfig((1, 3, 5), kind))
    for p in model.heads.parameters():
        torch.nn.init.normal_(p)
    assert torch.equal(model(idx)[1], alone)


def test_heads_have_weights_of_their_own():
    model = tiny_model((1, 2, 3), n_layer=3)
    storages = {p.data_ptr() for p in model.heads.parameters()}
    # 2 heads of 3 layers, each with a weight and a bias
    assert len(storages) == len(list(model.heads.parameters())) == 2 * 3 * 2


def test_offsets_one_alone_is_the_plain_gpt():
    model = tiny_model((1,))
    assert len(list(model.parameters())) == len(list(model.gpt.parameters()))


def test_an_unembedding_of_a_heads_own_starts_as_a_copy():
    model = tiny_model((1, 2), own=True, untrained=True)
    copy = model.heads["2"].unembedding.weight
    assert torch.equal(copy, model.gpt.lm_head.weight) and copy is not model.gpt.lm_head.weight


@pytest.mark.parametrize("bad", [dict(kind="magic"), dict(n_layer=0), dict(offsets=(2, 3))])
def test_an_impossible_configuration_of_heads_raises_an_error(bad):
    with pytest.raises(InputError):
        HeadsConfig(**bad)


# Weighted hidden states

@pytest.mark.parametrize("kind", ["resblock", "block"])
def test_all_weight_on_the_last_layer_is_no_weighting_at_all(kind):
    plain, weighted = (tiny_model((1, 2, 4), kind, whs=whs, untrained=True, n_layer=2)
                       for whs in (False, True))
    weighted.heads.load_state_dict(plain.heads.state_dict(), strict=False)
    for head in weighted.heads.values():
        head.mix.data = torch.tensor([-1e4, 0.0])
    idx = torch.randint(0, 31, (2, 12))
    for o, logits in plain(idx).items():
        torch.testing.assert_close(weighted(idx)[o], logits)


def test_a_head_reads_the_weighted_sum_of_all_normalised_layers():
    model, idx = tiny_model((1, 3), whs=True, n_layer=1), torch.randint(0, 31, (2, 12))
    layers = [model.gpt.transformer.ln_f(x) for x in model.gpt.residual_stream(idx)[1:]]
    weights = model.layer_weights()[3]
    assert len(weights) == len(layers) == 2 and sum(weights) == pytest.approx(1)
    z = model.heads["3"].blocks[0](sum(weight * x for weight, x in zip(weights, layers)))
    torch.testing.assert_close(model(idx)[3], model.gpt.lm_head(z))
    torch.testing.assert_close(model(idx)[1], model.gpt(idx)[0])  # offset 1 is the GPT, as ever


def test_the_weighting_starts_with_half_on_the_last_layer_and_is_learned():
    model = MultiTokenGPT(tiny_gpt(n_layer=4), HeadsConfig((1, 3, 5), whs=True))
    start = pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert model.layer_weights() == {3: start, 5: start}
    joint_loss(model, torch.randint(0, 31, (2, 24)), backward=True)
    of_3, of_5 = (model.heads[o].mix.grad for o in ("3", "5"))
    assert of_3.abs().min() > 0 and not torch.equal(of_3, of_5)  # each head has its own


# Conditional heads: the token after the position is known when a decoder drafts

@pytest.mark.parametrize("kind", ["resblock", "block"])
def test_a_conditional_head_reads_its_position_and_the_next_token_and_nothing_later(kind):
    model, idx = tiny_model((1, 3), kind, conditional=True), torch.randint(0, 31, (1, 12))
    logits = model(idx)
    assert logits[1].shape == (1, 12, 31) and logits[3].shape == (1, 11, 31)
    torch.testing.assert_close(logits[1], model.gpt(idx)[0])
    changed = idx.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 31
    moved = (model(changed)[3] - logits[3])[0].abs().amax(-1) > 1e-6
    assert moved.tolist() == [t >= 6 for t in range(11)]  # position 6 reads token 7


def test_a_conditional_head_learns_what_no_other_head_can():
    # x_{t+2} = x_{t+1}, and x_{t+1} is random every second time: h_t says nothing about it.
    torch.manual_seed(0)
    losses = {}
    for conditional in (False, True):
        model = tiny_model((1, 2), untrained=True, conditional=conditional, vocab_size=8)
        heads_only = [p for name, p in model.named_parameters() if not name.startswith("gpt.")]
        optimizer = torch.optim.Adam(heads_only, lr=1e-2)
        for _ in range(60):
            idx = torch.randint(0, 8, (32, 9)).repeat_interleave(2, dim=1)[:, 1:]
            optimizer.zero_grad()
            h = model.hidden_states(idx[:, :-1]).detach()
            logits, targets = predictions_and_targets(model, h, idx, 2)
            even = logits.view(32, -1, 8)[:, ::2].flatten(0, 1)  # positions before a random token
            loss = F.cross_entropy(even, targets.view(32, -1)[:, ::2].flatten())
            loss.backward()
            optimizer.step()
        losses[conditional] = loss.item()
    assert losses[True] < 0.3 and losses[False] > 1.9  # log 8 is 2.08


# The joint loss

def plain_losses(model, idx):
    """The definition: offset o compares the logits at t with the token at t + o."""
    return {o: F.cross_entropy(logits[:, :idx.shape[1] - o].flatten(0, 1), idx[:, o:].flatten())
            for o, logits in model(idx).items()}


def test_the_loss_of_offset_o_compares_position_t_with_token_t_plus_o():
    model, idx = tiny_model(), torch.randint(0, 31, (3, 20))
    expected = plain_losses(model, idx)
    for o, loss in joint_loss(model, idx).items():
        torch.testing.assert_close(loss, expected[o])


def test_a_repeating_text_makes_the_shift_visible():
    # In 0 1 2 0 1 2 ..., predicting the same token again is always right at offset 3, and never at
    # offsets 1 and 2.
    model = tiny_model((1, 2, 3), untrained=True, vocab_size=3)
    model.offset_logits = lambda h, o, next_tokens: F.one_hot(seen[:, :h.shape[1]], 3) * 100.0
    idx = torch.arange(30).repeat(2, 1) % 3
    seen = idx[:, :-1]
    losses = joint_loss(model, idx)
    assert losses[3] < 1e-6 and losses[1] > 50 and losses[2] > 50


@pytest.mark.parametrize("kind", ["resblock", "block"])
@pytest.mark.parametrize("options", [dict(), dict(own=True), dict(whs=True),
                                     dict(conditional=True), dict(whs=True, conditional=True)])
def test_head_by_head_backward_gives_the_gradients_of_the_plain_weighted_sum(kind, options):
    model = tiny_model(kind=kind, **options).double()
    idx, weights = torch.randint(0, 31, (2, 24)), {2: 0.3, 5: 2.0}
    joint_loss(model, idx, weights, backward=True, scale=0.25)
    head_by_head = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    losses = plain_losses(model, idx)
    sum(0.25 * weights.get(o, 1.0) * loss for o, loss in losses.items()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(head_by_head[name], p.grad, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("conditional", [False, True])
def test_self_distillation_takes_the_models_own_distribution_beside_the_token(conditional):
    model = tiny_model(conditional=conditional).double()
    idx = torch.randint(0, 31, (2, 24))
    got = joint_loss(model, idx, backward=True, distill=0.7)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    logits, losses = model(idx), plain_losses(model, idx)
    for o in model.offsets[1:]:
        p = logits[1][:, o - 1:23].softmax(-1).detach()  # read up to t + o - 1, predicts t + o
        q = logits[o][:, :24 - o].log_softmax(-1)
        losses[o] = 0.3 * losses[o] - 0.7 * (p * q).sum(-1).mean()
    sum(losses.values()).backward()
    for o, loss in losses.items():
        torch.testing.assert_close(got[o], loss.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-10, atol=1e-12, msg=name)


class PeakOfLargeTensors(TorchDispatchMode):
    """The peak number of tensors of at least `size` elements that are alive at once."""

    def __init__(self, size):
        super().__init__()
        self.size, self.alive, self.peak = size, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.numel() >= self.size:
                key = t.untyped_storage()._cdata
                if key not in self.alive:
                    self.alive[key] = weakref.finalize(
                        t.untyped_storage(), self.alive.pop, key, None)
                self.peak = max(self.peak, len(self.alive))
        return out


def peak_logits(n_offsets, distill=0.0):
    model = tiny_model(mtp_offsets(n_offsets), vocab_size=5000)
    idx = torch.randint(0, 5000, (4, 33))
    gc.collect()
    with PeakOfLargeTensors(4 * 20 * 5000) as counter:
        joint_loss(model, idx, backward=True, distill=distill)
    return counter.peak


def test_peak_memory_holds_one_heads_logits_however_many_heads_there_are():
    assert peak_logits(8) == peak_logits(2) > 0
    assert peak_logits(8, distill=0.5) == peak_logits(2, distill=0.5)


# The heads as a decoder runs them

@pytest.mark.parametrize("options", [
    dict(), dict(n_layer=3, own=True), dict(kind="block", n_layer=2), dict(whs=True),
    dict(kind="block", own=True, whs=True), dict(conditional=True, n_layer=2),
    dict(kind="block", conditional=True), dict(whs=True, own=True, conditional=True)])
@pytest.mark.parametrize("offsets", [(1,), (1, 3), (1, 2, 3, 4, 5, 7)])
def test_the_heads_run_together_as_one_by_one(options, offsets):
    model, idx = tiny_model(**options), torch.randint(0, 31, (2, 13))
    run, expected = DraftHeads(model, offsets), model(idx)
    h = model.hidden_states(idx[:, :-1])
    torch.testing.assert_close(run.next_logits(h), expected[1][:, :12])
    if len(offsets) > 1:
        caches = [None] * len(offsets[1:])
        logits = run.logits(run.run(h, idx[:, 1:], caches))
        for i, o in enumerate(offsets[1:]):
            torch.testing.assert_close(logits[:, :, i], expected[o][:, :12])


def test_only_heads_that_attend_have_keys_and_values_to_keep():
    how = dict(n_embd=32, batch=2, slots=10)
    for kind, layers in (("resblock", []), ("block", [3, 3])):
        caches = DraftHeads(tiny_model(kind=kind, n_layer=3), (1, 2, 4)).caches(**how)
        assert [len(cache.layers) for cache in caches] == layers


@pytest.mark.parametrize("own", [False, True])
def test_a_padded_unembedding_has_no_tokens_that_do_not_exist(own, monkeypatch):
    model, h, z = tiny_model(own=own), torch.randn(2, 3, 32), torch.randn(2, 3, 2, 32)
    plain = DraftHeads(model, (1, 2, 4))
    monkeypatch.setitem(heads.PADDING, "cpu", 64)  # as on CUDA: 31 tokens, 64 rows
    padded = DraftHeads(model, (1, 2, 4))
    assert padded.unembed.out_features == 64 and padded.logits(z).shape[-1] == 31
    torch.testing.assert_close(padded.logits(z), plain.logits(z))
    torch.testing.assert_close(padded.next_logits(h), plain.next_logits(h))
