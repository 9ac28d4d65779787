"""Lesson 1: a GPT is GPT-2; its cache changes how the work is done, never the result.

transformers, written by others, is the reference.
"""
import json

import pytest
import torch
import transformers

from conftest import tiny_gpt
from model import GPT, GPTConfig, InputError, KVCache, block_mask

SHAPES = [dict(n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=40),
          dict(n_layer=3, n_head=1, n_embd=48, vocab_size=101, n_positions=64),
          dict(n_layer=1, n_head=8, n_embd=64, vocab_size=257, n_positions=33)]


def hugging_face_gpt2(shape, folder=None):
    """A randomly initialised GPT-2 of transformers, and ours with its weights (through `folder` if given)."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0, initializer_range=0.2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    if folder is None:
        return theirs
    theirs.save_pretrained(folder)
    return theirs, GPT.from_pretrained(folder).eval()


# What a GPT computes

@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_those_of_transformers(shape, tmp_path):
    theirs, ours = hugging_face_gpt2(shape, tmp_path)
    idx = torch.randint(0, shape["vocab_size"], (3, shape["n_positions"]))
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_mean_cross_entropy_of_the_targets():
    gpt, idx = tiny_gpt(), torch.randint(0, 31, (2, 9))
    logits, loss = gpt(idx[:, :-1], idx[:, 1:])
    p = logits.softmax(-1).gather(-1, idx[:, 1:, None])
    torch.testing.assert_close(loss, -p.log().mean())


def test_a_token_sees_only_what_stands_before_it():
    gpt, idx = tiny_gpt(), torch.randint(0, 31, (1, 20))
    changed = idx.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 31
    a, b = gpt(idx)[0], gpt(changed)[0]
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12:], b[:, 12:])


def test_the_unembedding_is_the_token_embedding():
    gpt = tiny_gpt()
    assert gpt.lm_head.weight is gpt.transformer.wte.weight


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(InputError, match="65 tokens .* context of 64"):
        tiny_gpt()(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize("bad", [dict(n_embd=30, n_head=4), dict(n_layer=0), dict(dropout=1.0), dict(vocab_size=0)])
def test_a_shape_that_cannot_be_is_refused(bad):
    with pytest.raises(InputError):
        GPTConfig(**bad)


# The cache: blocks of tokens, each row at its own position

def cached(gpt, cache, idx, position, visible, depth=None):
    """Feed a block idx (B, N) to the cache, row b's first token in slot position[b]. -> logits (B, N, V)."""
    B, N = idx.shape
    slots = position[:, None] + torch.arange(N)
    depth = torch.arange(N) if depth is None else depth
    rows = torch.arange(B)[:, None] * cache.slots
    mask = block_mask(position, visible, cache.slots, torch.float32)
    with torch.no_grad():
        return gpt.lm_head(gpt.hidden_states(idx, position[:, None] + depth, cache, (rows + slots).flatten(), mask))


def chain(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


def test_reading_a_text_block_by_block_gives_the_logits_of_reading_it_at_once():
    gpt, idx = tiny_gpt(), torch.randint(0, 31, (2, 24))
    cache, parts, at = KVCache(2, 32, batch=2, slots=40), [], 0
    for n in (7, 1, 4, 1, 11):
        parts.append(cached(gpt, cache, idx[:, at:at + n], torch.full((2,), at), chain(n)))
        at += n
    torch.testing.assert_close(torch.cat(parts, 1), gpt(idx)[0], rtol=1e-4, atol=1e-5)


def test_rows_of_a_batch_may_stand_at_different_positions():
    gpt, idx = tiny_gpt(), torch.randint(0, 31, (3, 20))
    cache, lengths = KVCache(2, 32, batch=3, slots=30), torch.tensor([3, 9, 14])
    cached(gpt, cache, idx[:, :14], torch.zeros(3, dtype=torch.long), chain(14))        # padded prompts
    block = torch.stack([idx[b, n:n + 4] for b, n in enumerate(lengths)])
    logits = cached(gpt, cache, block, lengths, chain(4))
    for b, n in enumerate(lengths):
        torch.testing.assert_close(logits[b], gpt(idx[b:b + 1, :n + 4])[0][0, -4:], rtol=1e-4, atol=1e-5)


def test_what_is_left_in_a_slot_is_never_seen_before_it_is_overwritten():
    gpt, idx = tiny_gpt(), torch.randint(0, 31, (1, 10))
    cache = KVCache(2, 32, batch=1, slots=20)
    for layer in cache.layers:
        layer.fill_(1e4)                                                    # would drown everything
    torch.testing.assert_close(cached(gpt, cache, idx, torch.zeros(1, dtype=torch.long), chain(10)), gpt(idx)[0],
                               rtol=1e-4, atol=1e-5)


def test_a_tree_mask_lets_each_branch_see_the_prefix_and_its_own_ancestors_only():
    #   prefix - 0 - 1 - 3
    #              \ 2 - 4
    gpt, prefix = tiny_gpt(), torch.randint(0, 31, (1, 8))
    parents, tokens = [None, 0, 0, 1, 2], [5, 9, 17, 4, 4]
    visible, depth = torch.eye(5, dtype=torch.bool), torch.tensor([0, 1, 1, 2, 2])
    for i, parent in enumerate(parents):
        if parent is not None:
            visible[i] |= visible[parent]
    cache = KVCache(2, 32, batch=1, slots=20)
    cached(gpt, cache, prefix, torch.zeros(1, dtype=torch.long), chain(8))
    logits = cached(gpt, cache, torch.tensor([tokens]), torch.tensor([8]), visible, depth)
    for i, path in enumerate([[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4]]):
        text = torch.cat([prefix, torch.tensor([[tokens[j] for j in path]])], 1)
        torch.testing.assert_close(logits[0, i], gpt(text)[0][0, -1], rtol=1e-4, atol=1e-5)


# GPT-2 weights in and out

@pytest.mark.parametrize("bias", [True, False])
def test_transformers_opens_what_save_pretrained_writes(bias, tmp_path):
    gpt = tiny_gpt(bias=bias)
    gpt.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    idx = torch.randint(0, 31, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx).logits, gpt(idx)[0], rtol=1e-4, atol=1e-4)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    gpt = tiny_gpt()
    gpt.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == gpt.config
    for (name, a), (_, b) in zip(gpt.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name


def test_old_bin_files_load_too_and_names_without_the_transformer_prefix(tmp_path):
    theirs = hugging_face_gpt2(SHAPES[0])
    theirs.config.save_pretrained(tmp_path)
    tensors = {k.removeprefix("transformer."): v for k, v in theirs.state_dict().items() if k != "lm_head.weight"}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 40, 40).tril()              # a mask, as OpenAI's files hold it
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    idx = torch.randint(0, 50, (1, 40))
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with torch.no_grad():
            torch.testing.assert_close(GPT.from_pretrained(path)(idx)[0], theirs(idx).logits, rtol=1e-4, atol=1e-4)


def test_loading_never_runs_code_hidden_in_a_file(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))
    hugging_face_gpt2(SHAPES[0]).config.save_pretrained(tmp_path)
    torch.save({"wte.weight": Attack()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read"):
        GPT.from_pretrained(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("change, message", [
    (dict(n_layer=9), "has no tensor h.2"), (dict(n_embd=16), "shape"), (dict(model_type="llama"), "model_type"),
    (dict(activation_function="relu"), "activation_function"), (dict(n_inner=7), "n_inner")])
def test_a_config_that_does_not_fit_is_refused(change, message, tmp_path):
    hugging_face_gpt2(SHAPES[0]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        GPT.from_pretrained(tmp_path)


def test_a_missing_or_truncated_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        GPT.from_pretrained(tmp_path / "nothing")
    with pytest.raises(InputError, match="neither"):
        GPT.from_pretrained(tmp_path)
    hugging_face_gpt2(SHAPES[0]).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        GPT.from_pretrained(tmp_path)
