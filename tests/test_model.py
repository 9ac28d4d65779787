"""Lesson 1: the GPT is GPT-2, and its cache changes how the work is done, never the result.

The reference is transformers, which others wrote.
"""
import json
import pickle
import shutil

import pytest
import torch

import model
from conftest import tiny_gpt
from model import GPT, GPTConfig, InputError, KVCache, block_mask, load_tensors

SHAPES = [dict(n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=40),
          dict(n_layer=3, n_head=1, n_embd=48, vocab_size=101, n_positions=64),
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
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------
# What a GPT computes

@pytest.mark.parametrize("shape", SHAPES)
def test_the_logits_equal_those_of_transformers(shape, tmp_path):
    theirs = their_gpt2(shape)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


def test_a_token_sees_only_the_tokens_before_it():
    gpt, idx = tiny_gpt(), torch.randint(0, 31, (1, 20))
    changed = idx.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 31
    a, b = gpt(idx)[0], gpt(changed)[0]
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12:], b[:, 12:])


def test_the_loss_is_the_mean_cross_entropy_of_the_targets():
    gpt, idx = tiny_gpt(), torch.randint(0, 31, (2, 9))
    logits, loss = gpt(idx[:, :-1], idx[:, 1:])
    p = logits.softmax(-1).gather(-1, idx[:, 1:, None])
    torch.testing.assert_close(loss, -p.log().mean())


def test_the_unembedding_is_the_token_embedding():
    gpt = tiny_gpt()
    assert gpt.lm_head.weight is gpt.transformer.wte.weight


# ----------------------------------------------------------------------------------------------
# The cache: blocks of tokens, each row at its own position

def chain(n):
    return torch.ones(n, n, dtype=torch.bool).tril()


@torch.no_grad()
def feed(gpt, cache, idx, position, visible=None, depth=None):
    """Feed a block idx (B, N), a chain or a tree. The first token of row b has slot position[b].
    -> logits (B, N, V)"""
    B, N = idx.shape
    position = torch.as_tensor(position).expand(B)
    visible = chain(N) if visible is None else visible
    depth = torch.arange(N) if depth is None else depth
    rows = torch.arange(B)[:, None] * cache.slots
    slots = rows + position[:, None] + torch.arange(N)  # (B, N)
    mask = block_mask(position, visible, cache.slots, torch.float32)
    h = gpt.hidden_states(idx, position[:, None] + depth, cache, slots.flatten(), mask)
    return gpt.lm_head(h)


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("visible, seen", [
    (chain(2), [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
    (torch.eye(2).bool(), [[1, 1, 1, 0, 0], [1, 1, 0, 1, 0]])])
def test_a_mask_shows_the_past_and_what_is_visible_of_the_block(visible, seen):
    mask = block_mask(torch.tensor([2]), visible, 5, torch.float32)
    assert (mask == 0).int().tolist() == [[seen]]


def test_a_text_fed_block_by_block_gives_the_logits_of_the_whole_text():
    gpt, idx = tiny_gpt(), torch.randint(0, 31, (2, 24))
    cache, parts, position = KVCache(2, 32, batch=2, slots=40), [], 0
    for n in (7, 1, 4, 1, 11):
        parts.append(feed(gpt, cache, idx[:, position:position + n], position))
        position += n
    assert_close(torch.cat(parts, 1), gpt(idx)[0])


def test_the_rows_of_a_batch_may_be_at_different_positions():
    gpt, idx = tiny_gpt(), torch.randint(0, 31, (3, 20))
    cache, lengths = KVCache(2, 32, batch=3, slots=30), torch.tensor([3, 9, 14])
    feed(gpt, cache, idx[:, :14], 0)  # padded prompts
    block = torch.stack([idx[b, n:n + 4] for b, n in enumerate(lengths)])
    logits = feed(gpt, cache, block, lengths)
    for b, n in enumerate(lengths):
        assert_close(logits[b], gpt(idx[b:b + 1, :n + 4])[0][0, -4:])


def test_a_node_of_a_tree_sees_the_prefix_and_its_ancestors_only():
    #   prefix - 0 - 1 - 3
    #              \ 2 - 4
    gpt, prefix = tiny_gpt(), torch.randint(0, 31, (1, 8))
    parents, tokens = [None, 0, 0, 1, 2], torch.tensor([[5, 9, 17, 4, 4]])
    visible, depth = torch.eye(5, dtype=torch.bool), torch.tensor([0, 1, 1, 2, 2])
    for i, parent in enumerate(parents[1:], 1):
        visible[i] |= visible[parent]
    cache = KVCache(2, 32, batch=1, slots=20)
    feed(gpt, cache, prefix, 0)
    logits = feed(gpt, cache, tokens, 8, visible, depth)
    for i, path in enumerate([[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4]]):
        text = torch.cat([prefix, tokens[:, path]], 1)
        assert_close(logits[0, i], gpt(text)[0][0, -1])


def test_a_slot_is_never_seen_before_it_is_overwritten():
    gpt, idx = tiny_gpt(), torch.randint(0, 31, (1, 10))
    cache = KVCache(2, 32, batch=1, slots=20)
    for layer in cache.layers:
        layer.fill_(1e4)  # would drown everything
    assert_close(feed(gpt, cache, idx, 0), gpt(idx)[0])


# ----------------------------------------------------------------------------------------------
# GPT-2 weights in and out

@pytest.mark.parametrize("bias", [True, False])
def test_transformers_opens_what_save_pretrained_writes(bias, tmp_path):
    transformers, gpt = pytest.importorskip("transformers"), tiny_gpt(bias=bias)
    gpt.save_pretrained(tmp_path)
    assert_same_logits(gpt, transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval())


@pytest.mark.parametrize("bias", [True, False])
def test_a_saved_gpt_is_loaded_without_a_change(bias, tmp_path):
    pytest.importorskip("safetensors")
    gpt, idx = tiny_gpt(bias=bias), torch.randint(0, 31, (2, 64))
    gpt.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert (again.config.n_head, again.training) == (gpt.config.n_head, False)
    for name, p in gpt.state_dict().items():
        assert torch.equal(again.state_dict()[name], p), name
    torch.testing.assert_close(again(idx)[0], gpt(idx)[0])


def bin_file(folder, state):
    """`state` as pytorch_model.bin, beside the config.json of a GPT-2."""
    their_gpt2().config.save_pretrained(folder)
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def test_old_bin_files_load_too_and_names_without_the_prefix(tmp_path):
    theirs = their_gpt2()
    tensors = {k.removeprefix("transformer."): v for k, v in theirs.state_dict().items()}
    del tensors["lm_head.weight"]
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 40, 40).tril()  # a mask, as in OpenAI's files
    file = bin_file(tmp_path, tensors)
    for path in (tmp_path, file):
        assert_same_logits(GPT.from_pretrained(path), theirs)


@pytest.fixture
def hugging_face(tmp_path, monkeypatch):
    """Plays the server. -> its folder with the files of a GPT-2, and what was downloaded"""
    pytest.importorskip("safetensors")
    tiny_gpt().save_pretrained(tmp_path / "server")
    monkeypatch.setenv("MTP_CACHE", str(tmp_path / "cache"))
    asked = []

    def download(url, path, **how):
        asked.append(url.removeprefix("https://huggingface.co/openai-community/"))
        shutil.copy(tmp_path / "server" / url.split("/")[-1], path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    return tmp_path / "server", asked


def test_a_gpt2_is_downloaded_by_its_name_once(hugging_face):
    asked = hugging_face[1]
    for _ in range(2):
        assert GPT.from_pretrained("gpt2-medium").config == tiny_gpt().config
    files = ("config.json", "model.safetensors")
    assert asked == [f"gpt2-medium/resolve/main/{file}" for file in files]


def test_a_download_that_was_cut_short_is_an_error_and_not_kept(hugging_face):
    weights = hugging_face[0] / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    with pytest.raises(InputError, match="cannot download .*gpt2/resolve/main/model.safetensors"):
        GPT.from_pretrained("gpt2")
    weights.write_bytes(whole)
    assert GPT.from_pretrained("gpt2").config.n_embd == 32


def test_without_a_network_the_error_names_the_file(monkeypatch, tmp_path):
    pytest.importorskip("safetensors")
    monkeypatch.setenv("MTP_CACHE", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(InputError, match="cannot download https://.*/gpt2/.*config.json"):
        GPT.from_pretrained("gpt2")


# ----------------------------------------------------------------------------------------------
# Guards: what is no GPT-2

def test_a_text_longer_than_the_context_is_an_error():
    with pytest.raises(InputError, match="65 tokens .* context of 64"):
        tiny_gpt()(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize("bad", [dict(n_embd=30, n_head=4), dict(n_layer=0), dict(dropout=1.0),
                                 dict(vocab_size=0), dict(block_size=2.5)])
def test_a_shape_that_cannot_be_is_an_error(bad):
    with pytest.raises(InputError):
        GPTConfig(**bad)


@pytest.mark.parametrize("change, message", [
    (dict(n_layer=9), "asks for h.2"), (dict(n_embd=16), "shape"), (dict(n_head=3), "multiple"),
    (dict(model_type="llama"), "llama"), (dict(activation_function="relu"), "relu"),
    (dict(scale_attn_by_inverse_layer_idx=True), "inverse"), (dict(n_inner=7), "n_inner")])
def test_a_config_of_another_model_is_an_error(change, message, tmp_path):
    pytest.importorskip("safetensors")
    tiny_gpt().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"model_type": "gpt2"}'])
def test_a_missing_or_damaged_config_is_an_error(text, tmp_path):
    pytest.importorskip("safetensors")
    tiny_gpt().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(InputError, match="config.json"):
        GPT.from_pretrained(tmp_path)


def test_missing_or_truncated_weights_are_an_error(tmp_path):
    pytest.importorskip("safetensors")
    tiny_gpt().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(InputError, match="damaged"):
        GPT.from_pretrained(tmp_path)
    weights.unlink()
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match="is not a file of weights or a folder"):
            GPT.from_pretrained(path)


def test_saving_replaces_nothing_unless_both_files_are_complete(tmp_path):
    pytest.importorskip("safetensors")
    tiny_gpt().save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(before) == {"config.json", "model.safetensors"}
    with pytest.raises(OSError, match="cannot save the model to"):
        model.write_pretrained(tmp_path, {"x": torch.ones(2)}, {"not JSON": object()})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def damaged_files(folder):
    """Files that are no checkpoint, each in its own way."""
    torch.save({"x": torch.ones(100)}, folder / "half.pt")
    (folder / "half.pt").write_bytes((folder / "half.pt").read_bytes()[:500])
    (folder / "pickle.pt").write_bytes(pickle.dumps({"x": 1}, protocol=4))
    (folder / "text.pt").write_text("not a checkpoint\n")
    (folder / "empty.pt").touch()
    torch.save([1, 2], folder / "list.pt")
    return [*folder.iterdir(), folder / "missing.pt"]


def test_a_file_that_is_not_a_checkpoint_is_one_error_without_warnings(tmp_path, recwarn):
    for path in damaged_files(tmp_path):
        with pytest.raises(InputError, match=f"{path.name} is not a checkpoint, or it is damaged"):
            load_tensors(path, "a checkpoint")
    assert not recwarn.list


def test_loading_never_runs_code_from_a_file(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))
    with pytest.raises(InputError, match="damaged"):
        GPT.from_pretrained(bin_file(tmp_path, {"wte.weight": Attack()}))
    assert not (tmp_path / "owned").exists()
