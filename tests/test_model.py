"""Lesson 1: the GPT is GPT-2, and its cache changes how the work is done, never the result.

The reference is transformers, which others wrote.
"""
import json

import pytest
import torch

from conftest import tiny_gpt
from model import GPT, GPT2_N_HEAD, GPTConfig, InputError, causal_mask, empty_cache

SHAPES = [dict(n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=40),
          dict(n_layer=1, n_head=8, n_embd=64, vocab_size=257, n_positions=33)]


def their_gpt2(shape=SHAPES[0]):
    """A GPT-2 of transformers with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = dict(bos_token_id=0, eos_token_id=0, initializer_range=0.2, **shape)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()


@torch.no_grad()
def assert_same_logits(ours, theirs):
    idx = torch.randint(0, ours.config.vocab_size, (3, ours.config.block_size))
    torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=1e-4, atol=1e-4)


# ---- What a GPT computes ---------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
def test_the_logits_equal_those_of_transformers(shape, tmp_path):
    theirs = their_gpt2(shape)
    theirs.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert_same_logits(GPT.from_pretrained(path), theirs)


def test_the_weights_start_as_gpt2s_do():
    gpt = GPT(GPTConfig(n_layer=8))
    block = gpt.transformer.h[0]
    for matrix in (gpt.transformer.wte, gpt.transformer.wpe, block.attn.c_attn, block.mlp.c_fc):
        assert matrix.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for matrix in (block.attn.c_proj, block.mlp.c_proj):  # 16 of them add to the residual stream
        assert matrix.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
        assert not matrix.bias.any()


def test_dropout_acts_in_training_alone():
    gpt = tiny_gpt(dropout=0.5)
    idx = torch.randint(0, 31, (1, 20))
    assert torch.equal(gpt(idx), gpt(idx))
    assert not torch.equal(gpt.train()(idx), gpt(idx))


# ---- The cache: blocks of tokens, each row at its own position -------------------------------

@torch.no_grad()
def feed(gpt, cache, idx, start):
    """Feed the block idx (B, N); row b continues a text of start[b] tokens -> logits (B, N, V)"""
    B, N = idx.shape
    slots = len(cache[0]) // B
    position = torch.as_tensor(start).expand(B)[:, None] + torch.arange(N)  # (B, N)
    rows = slots * torch.arange(B)[:, None] + position  # a token's slot is its position
    mask = causal_mask(position, torch.arange(slots), torch.float32)
    return gpt.lm_head(gpt.hidden_states(idx, position, cache, rows.flatten(), mask))


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_mask_shows_a_token_the_slots_up_to_its_own():
    mask = causal_mask(torch.tensor([[2, 3], [0, 1]]), torch.arange(5), torch.float32)
    assert mask[:, 0].exp().int().tolist() == [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
                                               [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]]


def test_a_text_fed_block_by_block_gives_the_logits_of_the_whole_text():
    gpt = tiny_gpt()
    idx = torch.randint(0, 31, (2, 24))
    cache = empty_cache(gpt.config, 2, 2, 40, torch.float32, "cpu")
    logits = []
    start = 0
    for block in idx.split((7, 1, 4, 1, 11), dim=1):
        logits.append(feed(gpt, cache, block, start))
        start += block.shape[1]
    assert_close(torch.cat(logits, dim=1), gpt(idx))


def test_the_rows_of_a_batch_may_be_at_different_positions():
    gpt = tiny_gpt()
    idx = torch.randint(0, 31, (3, 20))
    lengths = [3, 9, 14]
    cache = empty_cache(gpt.config, 2, 3, 40, torch.float32, "cpu")
    feed(gpt, cache, idx[:, :14], 0)  # for two of the rows, too many tokens
    block = torch.stack([idx[b, n:n + 4] for b, n in enumerate(lengths)])
    logits = feed(gpt, cache, block, lengths)
    for b, n in enumerate(lengths):
        assert_close(logits[b], gpt(idx[b:b + 1, :n + 4])[0, n:])


def test_a_slot_is_never_seen_before_it_is_written():
    gpt = tiny_gpt()
    idx = torch.randint(0, 31, (1, 10))
    cache = empty_cache(gpt.config, 2, 1, 40, torch.float32, "cpu")
    for layer in cache:
        layer.fill_(1e4)  # would drown everything
    assert_close(feed(gpt, cache, idx, 0), gpt(idx))


# ---- GPT-2's weights -------------------------------------------------------------------------

def save_gpt2(gpt, folder, prefix=""):
    """Write a GPT as OpenAI's files hold GPT-2. -> the file of its tensors"""
    tensors = gpt.transformer.state_dict()
    for key in tensors:
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensors[key] = tensors[key].T
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()  # a mask, which is of no use here
    config = dict(model_type="gpt2", activation_function="gelu_new", n_head=gpt.config.n_head)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({prefix + key: t for key, t in tensors.items()}, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_bin_files_load_with_and_without_the_prefix(prefix, tmp_path):
    gpt = tiny_gpt()
    file = save_gpt2(gpt, tmp_path, prefix)
    idx = torch.randint(0, 31, (2, 64))
    for path in (file, tmp_path):
        assert torch.equal(GPT.from_pretrained(path)(idx), gpt(idx))


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A GPT, and a file that holds it behind the URL of gpt2, which is not downloaded yet."""
    gpt = tiny_gpt()
    folder = tmp_path / "server" / "gpt2"
    folder.mkdir(parents=True)
    monkeypatch.setattr("model.GPT2_URL", tmp_path.as_uri() + "/server/{}/pytorch_model.bin")
    monkeypatch.setitem(GPT2_N_HEAD, "gpt2", 2)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return gpt, save_gpt2(gpt, folder)


def test_gpt2_is_downloaded_by_its_name_once(server):
    gpt, file = server
    idx = torch.randint(0, 31, (2, 64))
    first = GPT.from_pretrained("gpt2")
    file.unlink()
    for again in (first, GPT.from_pretrained("gpt2")):
        assert torch.equal(again(idx), gpt(idx))


def test_a_folder_of_that_name_comes_first(server, tmp_path):
    theirs = their_gpt2()
    theirs.save_pretrained(tmp_path / "gpt2")
    assert_same_logits(GPT.from_pretrained("gpt2"), theirs)


def test_a_download_that_was_cut_short_is_an_error_and_is_not_kept(server):
    gpt, file = server
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(InputError, match="cannot download gpt2"):
        GPT.from_pretrained("gpt2")
    file.write_bytes(whole)
    assert GPT.from_pretrained("gpt2").config == gpt.config
