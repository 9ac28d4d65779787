"""Lesson 4: drafts are verified in blocks, looking back fills the holes, and the text cannot
change. From the top: a model whose drafts can be foreseen, the text, the drafts, sampling, steps,
the comparison, compiled steps, the command line."""
import itertools
import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from common import can_compile, corpus_of, load_checkpoint, save_checkpoint
from conftest import command, process, tiny_model
from decode import (Decoder, accepted_drafts, compare, default_methods, drafting, filter_logits,
                    generate_reference, linear, look_up, paint, print_table)
from heads import draft_sources, step_begins
from model import GPT
from test_model import save_gpt2, their_gpt2

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12]]  # ragged on purpose
NTP = "1"
MTP = "1,2,3,4"
LEAP = "1,3,5,7"
METHODS = [NTP, "lookup", MTP, LEAP, "1,4,7", "1,2,3,4,5,7"]


def decoder_of(model, method, batch_size=3, **options):
    return Decoder(model, batch_size=batch_size, **drafting(method, model.offsets), **options)


# The idea, on a model whose drafts can be foreseen
@torch.no_grad()
def counting_model(offsets, wrong=(), vocab_size=32, **config):
    """A model that knows the text 0 1 2 3 ... (mod vocab_size): after token x, offset o predicts
    x + o, or something else for the offsets in `wrong`. Token x is the one-hot vector of x."""
    V = vocab_size
    model = tiny_model(offsets, untrained=True, vocab_size=V, n_embd=V, n_head=1, **config)

    def forward_by(n):  # a matrix that takes one-hot x to x + n
        return torch.eye(V).roll(n, 0)
    for p in model.parameters():
        p.zero_()  # the layers add nothing
    trunk = model.gpt.transformer
    trunk.wte.weight.copy_(10 * torch.eye(V))
    trunk.h[0].ln_2.weight.fill_(1)
    trunk.h[0].mlp.c_fc.weight[:V] = 10 * forward_by(1)  # the first layer adds x + 1
    trunk.h[0].mlp.c_proj.weight[:, :V] = 10 * torch.eye(V)
    trunk.ln_f.weight.fill_(1)
    for o in offsets[1:]:
        n = o - 1 + 5 * (o in wrong)  # z + silu(W z): adds x + o, and larger
        model.heads[str(o)].blocks[0].weight.copy_(20 * forward_by(n))
    return model


def count(start, n, vocab_size=32):
    return [(start + i) % vocab_size for i in range(n)]


@pytest.mark.parametrize("offsets", [(1,), (1, 2, 3, 4), (1, 3, 5, 7)])
def test_a_model_that_is_always_right_fills_every_block(offsets):
    block = max(offsets)  # 1, 4 and 7 tokens per step
    g = Decoder(counting_model(offsets)).generate([[3, 4, 5]], 3 * block)
    assert g.tokens == [count(6, 3 * block)]
    assert g.tokens_per_step == block
    assert g.distances == [[*range(2, block + 1), 1] * 3]  # the drafts, then the bonus token
    assert g.accepted == {j: 1.0 for j in range(2, block + 1)}


def test_a_wrong_head_costs_speed_at_its_distances_and_nothing_else():
    # Offset 5 serves distances 4 and 5 of leap: a step emits two drafts and the bonus token.
    g = Decoder(counting_model((1, 3, 5, 7), wrong=(5,))).generate([[3, 4, 5]], 30)
    assert g.tokens == [count(6, 30)]
    assert g.distances == [[2, 3, 1] * 10]


def test_looking_back_needs_a_past():
    # Before a prompt of one token nothing stands from which to look back: the first draft is wrong.
    model = counting_model((1, 3, 5, 7))
    g = Decoder(model).generate([[3]], 20)
    assert g.tokens == [count(4, 20)]
    assert g.distances[0][:9] == [1, 1, 2, 3, 4, 5, 6, 7, 1]
    text = torch.tensor([count(3, 32)])  # before its first token nothing stands, not its last ones
    assert accepted_drafts(model, model.offsets, text)[0, :4].tolist() == [0, 0, 6, 6]


def test_the_reference_reads_once_to_verify_and_once_for_each_draft():
    model = counting_model((1, 3, 5, 7))
    passes = []
    model.gpt.transformer.wte.register_forward_hook(lambda *_: passes.append(1))
    assert generate_reference(model, [3, 4, 5], 15) == count(6, 15)
    assert len(passes) == 1 + 6 + 1 + 6 + 1  # the last two blocks are full


# The text cannot change
def noise_by_hand(seed, row, position, token):
    """gumbel_noise for one token, in Python's own integers."""
    def mix(x):
        x = ((x ^ x >> 16) * 0x21F0AAAD) % 2 ** 32
        x = ((x ^ x >> 15) * 0x735A2D97) % 2 ** 32
        return x ^ x >> 15
    bits = mix(mix(mix(mix(seed) ^ row) ^ position) ^ mix(token + 0x9E3779B9))
    return -math.log(-math.log((bits // 512 + 0.5) / 2 ** 23))


@torch.no_grad()
def recompute(gpt, prompts, new_tokens, temperature=0.0, seed=0):
    """Plain decoding, the slow way: a pass over the whole context for every token, row by row."""
    texts = []
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for _ in range(new_tokens):
            logits = gpt(torch.tensor([text]))[0, -1].double()
            noise = [noise_by_hand(seed, row, len(text), v) for v in range(len(logits))]
            text.append(int((logits + temperature * torch.tensor(noise)).argmax()))
        texts.append(text[len(prompt):])
    return texts


@cache
def plain_text(temperature):
    """The text of tiny_model's GPT, which no head can change."""
    return recompute(tiny_model().gpt, PROMPTS, 30, temperature, seed=5)


KINDS = [{}, dict(kind="block"), dict(sequential=True), dict(whs=True, n_layer=2),
         dict(untrained=True), dict(kind="block", sequential=True, whs=True)]
FEW = [30, 3, 7, 11, 12]


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_emits_the_text_of_plain_decoding(kind):
    texts = [generate_reference(tiny_model(**kind), p, 30, (1, 7)) for p in PROMPTS]
    assert texts == plain_text(0.0)


@pytest.mark.parametrize("method, kind", [*zip(METHODS, KINDS), *((LEAP, kind) for kind in KINDS)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft_vocab", [None, FEW])
def test_every_method_emits_the_text_of_plain_decoding(method, kind, temperature, draft_vocab):
    decoder = decoder_of(tiny_model(**kind), method, temperature=temperature, seed=5,
                         draft_vocab=draft_vocab)
    assert decoder.generate(PROMPTS, 30).tokens == plain_text(temperature)


@pytest.mark.parametrize("method", METHODS)
def test_greedy_text_is_that_of_transformers_generate(method, tmp_path):
    theirs = their_gpt2()
    theirs.save_pretrained(tmp_path)
    text = theirs.generate(torch.tensor([[7, 3, 3, 9]]), max_new_tokens=36, min_new_tokens=36,
                           do_sample=False, pad_token_id=0, eos_token_id=None)
    decoder = decoder_of(tiny_model(gpt=GPT.from_pretrained(tmp_path)), method)
    assert decoder.generate([[7, 3, 3, 9]], 36).tokens == [text[0, 4:].tolist()]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("method", [LEAP, "1,7", "lookup"])
def test_a_text_depends_on_its_row_and_not_on_its_batch_or_what_was_decoded_before(
        batch_size, method):
    options = dict(temperature=1.0, seed=5)
    decoder = decoder_of(tiny_model(), method, batch_size, max_length=57, **options)
    decoder.generate([[9] * 20, [8] * 20, [7]], 37, stop_token=range(9))
    decoder.generate([[9] * 20] * 5, 37)
    decoder.z.normal_(std=9)  # whatever was there
    g = decoder.generate(PROMPTS, 30)
    assert g.tokens == plain_text(1.0)
    fresh = decoder_of(tiny_model(), method, **options).generate(PROMPTS, 30)
    assert g.distances == fresh.distances
    assert decoder.generate(PROMPTS[1:], 30, first_row=1).tokens == plain_text(1.0)[1:]
    assert not decoder.limit[2:].any()  # spare rows end at once


def test_a_decoder_turns_dropout_off_in_a_copy_of_the_model():
    model = tiny_model(dropout=0.5).train()
    assert decoder_of(model, LEAP).generate(PROMPTS, 30).tokens == plain_text(0.0)
    assert model.training


# The drafts
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method, vocab", [(MTP, range(31)), (LEAP, FEW)])
def test_a_draft_is_the_best_token_of_its_head_by_logit_and_noise(kind, method, vocab):
    model = tiny_model(**kind)
    decoder = decoder_of(model, method, 1, temperature=1.0, seed=5, draft_vocab=vocab)
    blocks = []

    def look():
        end = int(decoder.position) + 1
        tokens = decoder.tokens[0, :end + decoder.N - 1].tolist()
        blocks.append((tokens[:end], tokens[end:]))
    decoder.generate(PROMPTS[2:], 12, on_step=look)
    sources = draft_sources(drafting(method, model.offsets)["offsets"]).values()
    for text, drafts in blocks:
        for i, (o, b) in enumerate(sources):
            logits = model(torch.tensor([text + drafts[:i]]))[o][0, len(text) - 2 - b]
            noise = [noise_by_hand(5, 0, len(text) + i, v) for v in vocab]
            assert drafts[i] == vocab[(logits[[*vocab]] + torch.tensor(noise)).argmax()]


def test_drafting_among_all_tokens_in_any_order_is_drafting_as_usual():
    model = tiny_model()
    model.gpt.lm_head.weight.data[15:30] = model.gpt.lm_head.weight.data[:15]  # so that twins tie
    usual, same = [decoder_of(model, MTP, draft_vocab=vocab).generate(PROMPTS, 30)
                   for vocab in (None, [*range(30, -1, -1), 4])]
    assert usual.distances == same.distances


def look_up_by_hand(text, n_drafts):
    """look_up for one text, token by token."""
    root = len(text) - 1
    if root == 0:
        return text * n_drafts

    def matches(i):  # how many of the newest three tokens stand before and at i
        n = 0
        while n < min(3, i + 1) and text[i - n] == text[root - n]:
            n += 1
        return n
    match = max(range(root), key=lambda i: (matches(i), i))  # the longest, then the latest
    longer = list(text)
    for _ in range(n_drafts):
        longer.append(longer[match - root])  # at the end, the text goes round in circles
    return longer[len(text):]


@pytest.mark.parametrize("alphabet", [2, 3, 9])
def test_lookup_finds_what_followed_the_longest_match_and_of_these_the_latest(alphabet):
    torch.manual_seed(alphabet)
    tokens = torch.randint(0, alphabet, (200, 24))
    position = torch.randint(0, 24, (200,))  # what stands after it is not of the text
    for row, root, drafts in zip(tokens.tolist(), position, look_up(tokens, position, 6).tolist()):
        assert drafts == look_up_by_hand(row[:root + 1], 6)


# Sampling
@torch.no_grad()
@pytest.mark.parametrize("method, sequential", [(NTP, False), (LEAP, False), (LEAP, True)])
@pytest.mark.parametrize("options", [{}, dict(top_k=3), dict(top_p=0.7)])
def test_sampled_tokens_follow_the_exact_distribution(method, sequential, options):
    # 8,000 rows with one prompt, three tokens each: all 64 continuations are frequent.
    model = tiny_model(sequential=sequential, vocab_size=4, n_embd=16, block_size=16)
    decoder = decoder_of(model, method, 8000, temperature=0.7, **options)
    tokens = torch.tensor(decoder.generate([[1, 3]] * 8000, 3).tokens)
    contexts = torch.tensor([*itertools.product([1], [3], *[range(4)] * 3)])  # (64, 5)
    texts = contexts[:, 2:]
    counts = (tokens[:, None] == texts).all(-1).sum(0)
    logits = filter_logits(model.gpt(contexts)[:, 1:-1], 0.7, **options)
    probs = (logits / 0.7).softmax(-1)  # (64, 3, 4)
    p = probs.gather(-1, texts[..., None]).prod(1)[:, 0]
    assert counts[p == 0].sum() == 0
    expected = 8000 * p[p > 0]
    degrees = len(expected) - 1
    chi_square = ((counts[p > 0] - expected).square() / expected).sum()
    assert abs(chi_square - degrees) < 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("top_k, top_p", [(1, 1), (3, 1), (99, 0.5), (None, 0.9), (5, 0.7)])
def test_top_k_and_top_p_keep_what_sorting_keeps_and_its_ties(top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(50, 12)
    logits[25:] = logits[25:].round()  # with many ties
    for row, kept in zip(logits, filter_logits(logits, 0.7, top_k, top_p)):
        best = row.sort(descending=True).values
        best = best[best >= best[:top_k][-1]]
        enough = (best / 0.7).softmax(0).cumsum(0) >= top_p - 1e-6
        expected = row.masked_fill(row < best[enough][0], -math.inf)
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("options", [{}, dict(top_k=3), dict(top_p=0.9)])
def test_the_smallest_temperatures_are_greedy(options):
    decoder = decoder_of(tiny_model(), LEAP, temperature=1e-40, **options)
    assert decoder.generate(PROMPTS, 30).tokens == plain_text(0.0)


# Steps
@pytest.mark.parametrize("method", [NTP, "lookup", LEAP])
def test_a_text_ends_with_the_first_stop_token_wherever_it_stands_in_a_block(method):
    decoder = decoder_of(tiny_model(), method, temperature=1.0, seed=5)
    for stop in ([3, 11, 20], [31], *([v] for v in range(0, 31, 3))):  # 31 is no token
        for new, whole in zip(decoder.generate(PROMPTS, 30, stop).tokens, plain_text(1.0)):
            end = next((i for i, token in enumerate(whole) if token in stop), 29)
            assert new == whole[:end + 1]


def test_statistics_count_the_steps_of_each_text():
    decoder = Decoder(counting_model((1, 2, 3, 4)))
    g = decoder.generate([[3, 4, 5], [7, 8]], 20, stop_token=11)
    assert g.tokens == [[6, 7, 8, 9, 10, 11], [9, 10, 11]]
    assert g.distances == [[2, 3, 4, 1, 2, 3], [2, 3, 4]]  # the stop token ends both last steps
    assert g.steps == g.tokens_per_step == 3
    assert g.accepted == {2: 1.0, 3: 1.0, 4: 2 / 3}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lookup", MTP, LEAP])
def test_teacher_forcing_on_its_own_text_takes_the_steps_that_wrote_it(kind, method):
    model = tiny_model(**kind)
    prompts = [PROMPTS[2], [9] * 8]
    g = decoder_of(model, method).generate(prompts, 50)
    windows = torch.tensor([p + new for p, new in zip(prompts, g.tokens)])
    accepted = accepted_drafts(model, windows=windows, **drafting(method, model.offsets))
    for begins, distances in zip(step_begins(accepted, first=7), g.distances):
        bonus_tokens = [8 + i for i, distance in enumerate(distances[:-1]) if distance == 1]
        assert begins.nonzero()[:, 0].tolist() == [7, *bonus_tokens]  # where the next step begins
    assert max(g.distances[0]) > 1


def test_a_comparison_has_a_record_per_method_and_finds_the_texts_identical():
    model = tiny_model((1, 3, 5))
    options = dict(temperature=1.0, seed=5)
    methods = default_methods(model.offsets)
    decoders = {method: decoder_of(model, method, **options) for method in methods}
    records = compare(decoders, PROMPTS, 30, rounds=1)
    assert [r["method"] for r in records] == methods == ["1", "lookup", "1,3,5"]
    for r in records:
        g = decoders[r["method"]].generate(PROMPTS, 30)
        assert r["identical"] and g.tokens == plain_text(1.0)
        assert (r["tokens_per_step"], r["accepted"]) == (g.tokens_per_step, g.accepted)
        speedup = r["tokens_per_second"] / records[0]["tokens_per_second"]
        assert r["speedup"] == pytest.approx(speedup)
        assert r["step_cost"] == pytest.approx(r["tokens_per_step"] / speedup)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_text_and_no_draft(kind):
    counting = counting_model((1, 2, 3, 4))  # 0 follows 31, and is what blocks are padded with
    for model, method in itertools.product((tiny_model(**kind), counting), (NTP, MTP)):
        g, padded = [decoder_of(model, method, rows=rows).generate(PROMPTS, 40) for rows in (1, 9)]
        assert (padded.tokens, padded.distances) == (g.tokens, g.distances)


@pytest.mark.parametrize("dtype, identical", [(torch.float32, False), (torch.bfloat16, True)])
def test_a_text_that_differs_is_noticed_and_in_16_bits_ntp_writes_equally_long_blocks(
        dtype, identical, capsys):
    model = tiny_model()
    model.gpt.transformer.ln_f.register_forward_hook(  # disturb what is computed in blocks
        lambda module, x, h: -h if h.shape[1] > 1 else h)
    decoders = {method: decoder_of(model, method, dtype=dtype) for method in (NTP, LEAP)}
    records = compare(decoders, [[1, 2]], 20, rounds=1)
    assert [r["identical"] for r in records] == [True, identical]
    print_table(records)
    assert capsys.readouterr().out.count("DIFFERS") == (not identical)


# Compiled
needs_compiler = pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="no compiler")


@needs_compiler
@pytest.mark.parametrize("method, kind, options", [
    ("1,3", dict(sequential=True), dict(temperature=1.0)),
    pytest.param(NTP, {}, {}, marks=pytest.mark.slow),
    pytest.param("lookup", {}, dict(temperature=1.0), marks=pytest.mark.slow),
    pytest.param(MTP, dict(kind="block"), {}, marks=pytest.mark.slow),
    pytest.param(MTP, dict(sequential=True), dict(draft_vocab=FEW), marks=pytest.mark.slow),
    pytest.param(LEAP, dict(whs=True), dict(top_k=9, top_p=0.9), marks=pytest.mark.slow)])
def test_a_compiled_step_emits_the_same_text(method, kind, options):
    eager, compiled = [decoder_of(tiny_model(**kind), method, compile=c, **options)
                       for c in (False, True)]
    for prompts in (PROMPTS, [[3] * 30, [1]], [[4], [5] * 7, [6] * 34, [7]]):
        expected = eager.generate(prompts, 30, stop_token=2)
        g = compiled.generate(prompts, 30, stop_token=2)
        assert (g.tokens, g.distances) == (expected.tokens, expected.distances)


@needs_compiler
def test_a_product_written_as_loops_is_the_product():
    weight = torch.randn(5, 16)
    x = torch.randn(2, 4, 16)
    f = torch.compile(lambda x: linear(9, (2 * x)[:, 1:], weight))  # a part of what is computed
    torch.testing.assert_close(f(x), 2 * x[:, 1:] @ weight.T)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, dict(batch_size=1)])
def test_a_new_decoder_uses_the_weights_that_the_model_has_now(options):
    model = tiny_model((1, 2, 3, 4), n_embd=384)  # large enough to be frozen into programs
    for _ in range(2):
        g, h = [decoder_of(model, MTP, compile=compile, **options).generate(PROMPTS, 30)
                for compile in (False, True)]
        assert (g.tokens, g.distances) == (h.tokens, h.distances)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_in_bfloat16_every_method_emits_the_text_of_ntp_in_equally_long_blocks(temperature):
    prompts = torch.randint(31, (200, 8), generator=torch.Generator().manual_seed(0)).tolist()
    options = dict(dtype=torch.bfloat16, compile=True, temperature=temperature, batch_size=8)
    expected = {}
    for kind, methods in ((dict(sequential=True), [MTP, LEAP]), ({}, [MTP, LEAP, "lookup"])):
        for method in methods:  # all on the same GPT
            decoder = decoder_of(tiny_model(**kind), method, **options)
            if decoder.rows not in expected:
                ntp = replace(decoder, offsets=(1,), lookup=0)
                expected[decoder.rows] = ntp.generate(prompts, 40).tokens
            assert decoder.generate(prompts, 40).tokens == expected[decoder.rows]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_every_method_emits_the_text_of_plain_decoding(kind, compile):
    headless = [] if compile and kind else [(NTP, 0.0), ("lookup", 1.0)]  # to compile takes 10 s
    for method, temperature in (*headless, (LEAP, 0.0), (LEAP, 1.0)):
        decoder = decoder_of(tiny_model(**kind).cuda(), method, temperature=temperature, seed=5,
                             compile=compile)
        for _ in range(2):  # a captured graph forgets the text before
            assert decoder.generate(PROMPTS, 30).tokens == plain_text(temperature)


# The command line
def test_the_command_compares_methods_on_greedy_sampled_and_real_text(run_folder, tmp_path):
    result = command("decode.py", run_folder, "--eager", "--device", "cpu", "--prompts", 2,
                     "--new-tokens", 12, "--out", tmp_path / "table.json")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "table.json").read_text())
    methods = [NTP, "lookup", "1,2", MTP, LEAP, "1,2,3,4,5,7"]  # all that the offsets allow
    for title in ("greedy text", "sampled text, temperature 1"):
        assert title in result.stdout
        assert [r["method"] for r in results[title] if r["identical"]] == methods
    model, state = load_checkpoint(run_folder)
    windows = corpus_of(run_folder, model, state).windows("val", 32, 32)
    for method, tokens_per_step in results["real text"].items():
        accepted = accepted_drafts(model, windows=windows, **drafting(method, model.offsets))
        steps = step_begins(accepted, first=7).sum().item()  # a quarter of the context is given
        assert tokens_per_step == 32 * 24 / steps


def test_the_command_streams_the_continuation_of_a_prompt(run_folder):
    result = process("decode.py", run_folder, "--prompt", "def f7(", "--temperature", 0)
    assert result.returncode == 0, result.stderr
    model, _ = load_checkpoint(run_folder)
    text = recompute(model.gpt, [list(b"def f7(")], 25)[0]  # a context of 32
    assert result.stdout == f"def f7({bytes(text).decode()}\n"
    assert "drafts 1,2,3,4,5,7: 25 tokens in" in result.stderr


@pytest.mark.parametrize("prompt, n, shown", [
    ("a", 3, "abcd"), ("~", 1, r"~\x7f"), ("\x08", 6, r"\x08" + "\t\n" + r"\x0b\x0c\r\x0e"),
    # 194 begins a character, which the end cuts; 256 is end-of-text.
    ("\x7f", 67, r"\x7f" + bytes(range(128, 195)).decode("utf-8", "replace")),
    ("\x7f", 140, r"\x7f" + bytes(range(128, 256)).decode("utf-8", "replace"))], ids=range(5))
def test_a_stream_shows_all_bytes_and_ends_at_end_of_text(prompt, n, shown, tmp_path):
    model = counting_model((1, 2, 3, 4), vocab_size=257, block_size=256)
    save_checkpoint(tmp_path / "checkpoint.pt", model)
    result = command("decode.py", tmp_path, "--prompt", prompt, "--new-tokens", n)
    assert result.stdout == f"{shown}\n"


def test_gpt2_weights_are_streamed_by_prompt_lookup(tmp_path):
    save_gpt2(counting_model((1,), vocab_size=257).gpt, tmp_path)
    result = command("decode.py", tmp_path, "--prompt", "x", "--new-tokens", 5)
    assert result.stdout == "xyz{|}\n"
    assert "drafts lookup: 5 tokens in" in result.stderr


def test_a_painted_token_has_the_colour_of_its_distance():
    assert paint("ab", distance=1) == "ab"
    assert paint("ab", distance=2) == "\033[38;5;16;48;5;157mab\033[0m"
    assert paint("a\n", distance=3) == "a\n"  # or the rest of the line would be coloured, too
