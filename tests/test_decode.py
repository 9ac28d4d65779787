"""Lesson 4: how blocks of guesses are checked, how looking back fills the holes, and why the output cannot change."""
import itertools
import json
import math
import shutil

import pytest
import torch
import transformers

from conftest import assert_one_line_error, command, tiny_model
import decode
from decode import (BLOCKS, CHUNK, PART, Decoder, Generation, Node, accepted_depths, argmax, calibrate, can_compile,
                    chain, check_rounding, compare, cumulative_sum, default_methods, depths, expected_tokens_per_step,
                    filter_logits, grow_tree, guess_hits, gumbel_noise, held_out_acceptance, html_page, method_name,
                    print_table, trace, walk, write_corpus_of_its_own)
from data.loader import Corpus
from data.prepare import get_tokenizer
from heads import draft_sources
from model import GPT, InputError
from common import load_checkpoint, save_checkpoint

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12]]                     # ragged on purpose
METHODS = [(1,), (1, 2, 3, 4), (1, 3, 5, 7), (1, 4, 7), (1, 2, 3, 4, 5, 7)]
NTP, MTP, LEAP = (1,), (1, 2, 3, 4), (1, 3, 5, 7)
# A tree with several children per node, from several sources and ranks, in no order of depth.
BUSHY = (Node(0, 2, 0, 0), Node(0, 3, 1, 0), Node(0, 4, 2, 0), Node(1, 3, 0, 0), Node(2, 3, 0, 1), Node(0, 2, 0, 1),
         Node(4, 7, 3, 0), Node(1, 5, 2, 1), Node(7, 7, 2, 0), Node(5, 4, 0, 2))


def noise_by_hand(seed, row, position, token):
    """decode.gumbel_noise for one token, in Python's own integers."""
    def mix(x):
        x = ((x ^ x >> 16) * 0x21F0AAAD) % 2 ** 32
        x = ((x ^ x >> 15) * 0x735A2D97) % 2 ** 32
        return x ^ x >> 15
    bits = mix(mix(mix(mix(seed) ^ row) ^ position) ^ mix(token + 0x9E3779B9))
    return -math.log(-math.log((bits // 512 + 0.5) / 2 ** 23))


def reference(gpt, prompts, new_tokens, temperature=0.0, seed=0):
    """What plain decoding says, the slow way: the whole context is computed anew for every token, row by row."""
    out = []
    for row, prompt in enumerate(prompts):
        text = list(prompt)
        for _ in range(new_tokens):
            logits = gpt(torch.tensor([text]))[0][0, -1].double()
            if temperature:
                noise = [noise_by_hand(seed, row, len(text), v) for v in range(len(logits))]
                logits = logits / temperature + torch.tensor(noise)
            text.append(int(logits.argmax()))
        out.append(text[len(prompt):])
    return out


# The output cannot change

@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", [*METHODS, BUSHY])
@pytest.mark.parametrize("untrained", [False, True])
@pytest.mark.parametrize("kind, own, n_layer, whs", [
    ("resblock", False, 1, False), ("resblock", True, 2, False), ("block", False, 1, False), ("block", True, 2, False),
    ("resblock", False, 2, True), ("block", True, 1, True)])
def test_every_method_emits_the_text_of_recomputing_everything(kind, own, n_layer, whs, untrained, method,
                                                               temperature):
    model = tiny_model(kind=kind, own=own, n_layer=n_layer, untrained=untrained, whs=whs)
    expected = reference_text(model, temperature)
    how = dict(tree=BUSHY) if method == BUSHY else dict(offsets=method)
    got = Decoder(model, **how, temperature=temperature, seed=5).generate(PROMPTS, 30)
    assert got.tokens == expected


references = {}


def reference_text(model, temperature):
    """`reference`, computed once per GPT: heads never change it, so all heads share it."""
    key = (temperature, sum(p.detach().sum().item() for p in model.gpt.parameters()))
    if key not in references:
        references[key] = reference(model.gpt, PROMPTS, 30, temperature, seed=5)
    return references[key]


@pytest.mark.parametrize("kind", ["resblock", "block"])
@pytest.mark.parametrize("untrained", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_greedy_text_is_that_of_transformers_generate(method, untrained, kind, tmp_path):
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=64,
                                     initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path)
    model = tiny_model(kind=kind, untrained=untrained, gpt=GPT.from_pretrained(tmp_path))
    prompt = [7, 3, 3, 9]
    text = theirs.generate(torch.tensor([prompt]), max_new_tokens=60, min_new_tokens=60, do_sample=False,
                           pad_token_id=0, eos_token_id=None)
    assert Decoder(model, method).generate([prompt], 60).tokens == [text[0, 4:].tolist()]


@pytest.mark.parametrize("options", [dict(temperature=0.7, top_k=5), dict(temperature=1.3, top_p=0.8),
                                     dict(temperature=1.0, top_k=9, top_p=0.9), dict(top_k=2, top_p=0.5)])
def test_top_k_and_top_p_do_not_break_the_equality(options):
    model = tiny_model()
    ntp, *others = [Decoder(model, m, seed=2, **options).generate(PROMPTS, 40).tokens for m in METHODS]
    assert all(tokens == ntp for tokens in others)


def test_a_row_does_not_depend_on_its_neighbours():
    model = tiny_model()
    together = Decoder(model, LEAP, temperature=1.0).generate(PROMPTS, 40).tokens
    other_neighbours = [PROMPTS[0], [30] * 20, PROMPTS[2]]
    again = Decoder(model, LEAP, temperature=1.0).generate(other_neighbours, 40).tokens
    assert together[0] == again[0] and together[2] == again[2]


def test_a_decoder_can_be_used_again_and_forgets_what_it_wrote():
    model = tiny_model()
    used = Decoder(model, LEAP)
    used.generate([[9] * 20, [8] * 11, [7]], 40)
    again, fresh = (decoder.generate(PROMPTS, 30, record=True) for decoder in (used, Decoder(model, LEAP)))
    assert (again.tokens, again.history) == (fresh.tokens, fresh.history)


def test_the_whole_context_can_be_used():
    model = tiny_model()
    for method in METHODS:
        tokens = Decoder(model, method).generate([[1, 2, 3, 4]], 60).tokens[0]
        assert tokens == reference(model.gpt, [[1, 2, 3, 4]], 60)[0] and len(tokens) == 60


@pytest.mark.parametrize("method", METHODS)
def test_generation_ends_with_the_stop_token_wherever_it_stands_in_a_block(method):
    model = tiny_model()
    full = Decoder(model, NTP, temperature=1.0).generate(PROMPTS, 40).tokens
    for stop in range(31):
        got = Decoder(model, method, temperature=1.0).generate(PROMPTS, 40, stop_token=stop).tokens
        for text, whole in zip(got, full):
            end = whole.index(stop) + 1 if stop in whole else 40
            assert text == whole[:end]


def test_prompts_are_read_in_chunks_that_leave_no_seam():
    model = tiny_model(block_size=3 * CHUNK)
    prompts = [list(torch.randint(0, 31, (n,))) for n in (1, 2, CHUNK, CHUNK + 1, CHUNK + 2, 2 * CHUNK + 1)]
    for tree in (chain(draft_sources(LEAP)), BUSHY):
        decoder = Decoder(model, tree=tree)
        expected = reference(model.gpt, prompts, 12)
        together = decoder.generate(prompts, 12)
        alone = [decoder.generate([p], 12) for p in prompts]
        assert together.tokens == expected == [a.tokens[0] for a in alone]
        assert together.steps == sum(a.steps for a in alone)                # and the first guesses are as good


def test_a_shorter_maximal_length_changes_nothing_but_the_room():
    model = tiny_model()
    short = Decoder(model, LEAP, max_length=38)
    assert short.generate(PROMPTS, 30).tokens == Decoder(model, LEAP).generate(PROMPTS, 30).tokens
    with pytest.raises(InputError, match="max_length of 38.*at most 30 new"):
        short.generate(PROMPTS, 31)


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("temperature, whs", [(0.0, False), (1.0, False), (0.0, True)])
def test_compiled_programs_emit_the_same_text_and_are_never_compiled_again(temperature, whs):
    model = tiny_model(n_layer=1, whs=whs)
    decoders = [[Decoder(model, tree=tree, temperature=temperature, compile=c) for c in (False, True)]
                for tree in ((), chain(draft_sources(LEAP)), BUSHY)]
    for eager, compiled in decoders:                                        # each compiles its step, all share a reader
        assert compiled.generate(PROMPTS, 30).tokens == eager.generate(PROMPTS, 30).tokens
    with torch.compiler.set_stance("fail_on_recompile"):
        for prompts in ([[3] * 30, [1], [2, 2]], [[4], [5] * 7, [6] * 34]):
            for eager, compiled in decoders:
                assert compiled.generate(prompts, 30).tokens == eager.generate(prompts, 30).tokens


@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="torch.compile needs a C++ compiler")
def test_a_new_decoder_knows_what_the_model_learned_meanwhile():
    model = tiny_model(MTP, n_embd=384)                                     # large enough to be frozen into programs
    prompt = [[1, 2, 3, 4, 5, 6]]
    for _ in range(2):
        eager, compiled = (Decoder(model, MTP, compile=c).generate(prompt, 30) for c in (False, True))
        assert [compiled.tokens, compiled.steps] == [eager.tokens, eager.steps]
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))


def test_a_padded_unembedding_never_emits_or_drafts_a_token_that_does_not_exist(monkeypatch):
    models = [tiny_model(own=own) for own in (False, True)]
    plain = [Decoder(model, tree=BUSHY, temperature=t).generate(PROMPTS, 30) for model in models for t in (0.0, 1.0)]
    monkeypatch.setitem(decode.PADDING, "cpu", 64)                          # as on CUDA: 31 tokens, 64 rows of logits
    wide = [Decoder(model, tree=BUSHY, temperature=t).generate(PROMPTS, 30) for model in models for t in (0.0, 1.0)]
    assert Decoder(models[0]).unembeddings[0].out_features == 64
    assert [(g.tokens, g.steps) for g in wide] == [(g.tokens, g.steps) for g in plain]


CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("compile", [pytest.param(c, marks=CUDA) for c in (False, True)])
@pytest.mark.parametrize("kind, whs", [("resblock", False), ("block", False), ("resblock", True)])
def test_on_a_gpu_every_method_emits_the_text_that_the_cpu_emits(kind, whs, compile):
    model = tiny_model(kind=kind, whs=whs, block_size=3 * CHUNK)
    prompts = [*PROMPTS, [3] * (CHUNK + 5)]                                 # prompts of one chunk and of two
    for temperature in (0.0, 1.0):
        expected = Decoder(model, NTP, temperature=temperature).generate(prompts, 40).tokens
        trees = [*(chain(draft_sources(m)) for m in METHODS), BUSHY]
        if compile:                                                         # that takes long: each with one temperature
            trees = [chain(draft_sources(LEAP)), BUSHY] if temperature else [()]
        for tree in trees:
            decoder = Decoder(model.cuda(), tree=tree, temperature=temperature, compile=compile)
            for _ in range(2):                                              # a captured graph forgets the text before
                assert decoder.generate(prompts, 40).tokens == expected
        model.cpu()


@pytest.mark.parametrize("tree", [pytest.param(tree, marks=CUDA) for tree in (chain(draft_sources(LEAP)), BUSHY)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_large_vocabulary_is_sampled_by_a_compiled_step(dtype, tree):
    model = tiny_model(vocab_size=50257, n_embd=64).cuda()
    options = dict(temperature=1.0, dtype=dtype, seed=3)
    decoder = Decoder(model, tree=tree, compile=True, **options)
    counts = check_rounding(decoder, PROMPTS, decoder.generate(PROMPTS, 40).tokens)
    assert counts["argmax"] > 0 and counts["neither"] == 0
    filtered = dict(options, top_k=50, top_p=0.9)
    texts = [Decoder(model, tree=tree, compile=c, **filtered).generate(PROMPTS, 40).tokens for c in (False, True)]
    assert dtype != torch.float32 or texts[0] == texts[1]


# Steps, drafts and where tokens come from

def counting_model(offsets, wrong=()):
    """A model that knows the text 0 1 2 3 ... (mod 32): after token x, offset o says x + o, or something else for the
    offsets in `wrong`. The hidden state is the one-hot vector of x; the unembedding reads x and says x + 1."""
    model = tiny_model(offsets, untrained=True, n_embd=32, vocab_size=32, n_layer=1)

    def forward_by(n):                                                      # a matrix that takes one-hot x to x + n
        return torch.eye(32).roll(n, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.gpt.transformer.ln_f.weight.fill_(1.0)
        model.gpt.lm_head.weight = torch.nn.Parameter(forward_by(1))
        model.gpt.transformer.wte.weight = torch.nn.Parameter(10 * torch.eye(32))
        for o in offsets[1:]:                                               # z + silu(W z): adds x + o - 1, and larger
            model.heads[str(o)].blocks[0].weight.copy_(20 * forward_by(o - 1 if o not in wrong else o + 5))
    return model


@pytest.mark.parametrize("method, per_step", [(NTP, 1), (MTP, 4), (LEAP, 7)])
def test_a_model_that_is_always_right_fills_every_block(method, per_step):
    model = counting_model(METHODS[-1])
    g = Decoder(model, method).generate([[3, 4, 5]], 3 * per_step, record=True)
    assert g.tokens == [[(6 + i) % 32 for i in range(3 * per_step)]]
    assert g.tokens_per_step == per_step and len(g.history) == 3            # and no step too many
    assert all(share == 1.0 for share in g.accepted.values())
    if method == LEAP:                                                      # drafts at distance 2..7, then the model
        assert g.distances == [[2, 3, 4, 5, 6, 7, 1] * 3]


def test_looking_back_needs_a_past():
    # With a prompt of one token there is no position t - 1 yet: leap's first block cannot be full, its second is.
    g = Decoder(counting_model(LEAP), LEAP).generate([[3]], 20)
    assert g.tokens == [[(4 + i) % 32 for i in range(20)]]
    assert g.distances[0][:2] == [1, 1] and g.distances[0][2:9] == [2, 3, 4, 5, 6, 7, 1]


def test_a_wrong_head_costs_speed_at_its_distances_and_nothing_else():
    # Offset 5 serves distances 4 and 5 of leap; wrong there, a step emits drafts 2 and 3 and the model's own token.
    g = Decoder(counting_model(LEAP, wrong=(5,)), LEAP).generate([[3, 4, 5]], 30)
    assert g.tokens == [[(6 + i) % 32 for i in range(30)]]
    assert g.tokens_per_step == 3.0
    assert g.accepted == {2: 1.0, 3: 1.0, 4: 0.0, 5: 0.0, 6: 0.0, 7: 0.0}


def test_better_sources_can_be_chosen_by_hand():
    # Offset 5 read two positions back serves distance 3 where offset 3 is wrong.
    model = counting_model((1, 2, 3, 5), wrong=(3,))
    assert Decoder(model, (1, 2, 3)).generate([[3, 4, 5]], 25).tokens_per_step < 3
    by_hand = Decoder(model, tree=chain({2: (2, 0), 3: (5, 2)}))
    assert by_hand.generate([[3, 4, 5, 6]], 24).tokens_per_step == 3


def test_steps_and_accepted_shares_are_those_of_the_recorded_distances():
    # One row stops long before the others; steps that it sits out must not count.
    full = Decoder(tiny_model(), LEAP, temperature=1.0).generate(PROMPTS, 50)
    stop = full.tokens[0][9]
    g = Decoder(tiny_model(), LEAP, temperature=1.0).generate(PROMPTS, 50, stop_token=stop)
    assert len(g.tokens[0]) <= 10
    alone = [Decoder(tiny_model(), LEAP, temperature=1.0).generate([p], 50, stop, first_row=i)
             for i, p in enumerate(PROMPTS)]
    assert g.tokens == [a.tokens[0] for a in alone] and g.steps == sum(a.steps for a in alone)
    for a in alone:                                                         # a step ends with the model's own token,
        ends = a.distances[0].count(1)                                      # unless the text ends first
        assert ends <= a.steps <= ends + 1
        assert a.tokens_per_step == len(a.tokens[0]) / a.steps
    for j in g.accepted:
        assert g.accepted[j] == pytest.approx(sum(a.accepted[j] * a.steps for a in alone) / g.steps)


def test_a_tree_follows_the_branch_that_is_right():
    # Rank 0 of offset 2 is wrong and looking back two with offset 4 is right; so is what hangs below it.
    model = counting_model((1, 2, 3, 4), wrong=(2,))
    tree = (Node(0, 2, 0), Node(0, 4, 2), Node(1, 3, 0), Node(2, 3, 0))
    g = Decoder(model, tree=tree).generate([[3, 4, 5, 6]], 24)
    assert g.tokens == [[(7 + i) % 32 for i in range(24)]]
    assert g.nodes == [[2, 4, 0] * 8] and g.tokens_per_step == 3


def test_ntp_takes_one_step_per_token():
    g = Decoder(tiny_model(), NTP).generate(PROMPTS, 20)
    assert g.tokens_per_step == 1.0 and g.accepted == {} and set(sum(g.distances, [])) == {1}


# Sampling

def test_the_noise_is_a_function_of_seed_row_position_and_token():
    got = gumbel_noise(7, torch.tensor([[0], [3]]), torch.tensor([[5, 6], [11, 12]]), 9)
    for (b, row), (i, _), v in itertools.product(enumerate([0, 3]), enumerate([0, 1]), range(9)):
        position = [[5, 6], [11, 12]][b][i]
        assert got[b, i, v].item() == pytest.approx(noise_by_hand(7, row, position, v), rel=1e-4, abs=1e-4)


def chi_square(counts, p):
    """Pearson's statistic as a z-score: about normal(0, 1) when counts were drawn from p."""
    expected = p * counts.sum()
    degrees = len(p) - 1
    return ((counts - expected).square() / expected).sum().sub(degrees).item() / math.sqrt(2 * degrees)


@pytest.mark.parametrize("method", [NTP, LEAP])
@pytest.mark.parametrize("options", [dict(temperature=1.0), dict(temperature=0.6, top_k=4)])
def test_sampled_tokens_follow_the_exact_distribution(method, options):
    # 4,000 rows with the same prompt, three tokens each: joint counts against the product of exact probabilities.
    V, rows, prompt = 6, 4000, [1, 4]
    model = tiny_model(vocab_size=V, n_embd=16, n_layer=1, block_size=16)
    tokens = torch.tensor(Decoder(model, method, seed=1, **options).generate([prompt] * rows, 3).tokens)
    counts = torch.zeros(V, V, V).index_put_(tuple(tokens.T), torch.ones(rows), accumulate=True).flatten()
    p = torch.zeros(V, V, V)
    for a, b, c in itertools.product(range(V), repeat=3):
        logits = model.gpt(torch.tensor([[*prompt, a, b]]))[0][0, 1:] / options["temperature"]
        q = filter_logits(logits, options.get("top_k")).softmax(-1)
        p[a, b, c] = q[0, a] * q[1, b] * q[2, c]
    p = p.flatten()
    assert counts[p == 0].sum() == 0
    common = p * rows >= 5                                                  # Pearson needs some counts in every cell
    rest = ~common
    counts = torch.cat([counts[common], counts[rest].sum()[None]])
    p = torch.cat([p[common], p[rest].sum()[None]])
    keep = p > 0
    assert abs(chi_square(counts[keep], p[keep])) < 4


def test_guesses_with_the_models_noise_are_accepted_more_often(run_folder, corpus):
    model, _ = load_checkpoint(run_folder)
    prompts = Corpus(corpus).windows("val", 32, 8).tolist()
    with_noise, without = (Decoder(model, MTP, temperature=1.0, coupled=c).generate(prompts, 24) for c in (True, False))
    assert with_noise.tokens == without.tokens
    assert with_noise.tokens_per_step > 1.1 * without.tokens_per_step


def test_another_seed_gives_another_text_and_the_same_seed_the_same():
    model = tiny_model()
    a, b, c = (Decoder(model, MTP, temperature=1.0, seed=s).generate(PROMPTS, 30).tokens for s in (0, 1, 0))
    assert a == c != b


def test_rows_with_the_same_prompt_get_different_samples():
    tokens = Decoder(tiny_model(), NTP, temperature=1.0).generate([[1, 2]] * 4, 20).tokens
    assert len({tuple(t) for t in tokens}) == 4


def test_top_k_and_top_p_hide_the_improbable():
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()
    assert filter_logits(logits, top_k=2).isfinite().tolist() == [True, True, False, False, False]
    assert filter_logits(logits, top_p=0.6).isfinite().tolist() == [True, True, False, False, False]
    assert filter_logits(logits, top_p=0.5).isfinite().tolist() == [True, False, False, False, False]
    assert filter_logits(logits.flip(0), top_k=3, top_p=0.99).isfinite().tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("vocab_size", [3, PART, PART + 1, 5 * PART - 1])
def test_large_vocabularies_are_reduced_and_summed_in_parts(vocab_size):
    torch.manual_seed(0)
    scores = torch.randn(40, vocab_size)
    first = torch.randint(0, vocab_size, (40,)).tolist()
    for row, i in zip(scores, first):
        row[[i, (i + vocab_size) // 2, -1]] = 9.0                           # of several largest ones the first counts
    assert argmax(scores).tolist() == first
    assert argmax(scores - math.inf).tolist() == [0] * 40
    p = scores.softmax(-1)
    torch.testing.assert_close(cumulative_sum(p), p.double().cumsum(-1).float())


# Predicting the speed

def test_expected_tokens_per_step_by_enumeration():
    a = [0.8, 0.5, 0.9]
    expected = 0.0
    for hits in itertools.product([0, 1], repeat=3):                        # a draft counts while all before it hit
        p = math.prod(x if h else 1 - x for x, h in zip(a, hits))
        expected += p * (1 + next((i for i, h in enumerate(hits) if not h), 3))
    assert expected_tokens_per_step(a) == pytest.approx(expected)
    assert expected_tokens_per_step([]) == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_held_out_acceptance_by_brute_force(method):
    model = tiny_model()
    windows = torch.randint(0, 31, (3, 30))
    windows[:, 15:] = windows[:, 14:15]                                     # something that can be guessed
    sources = draft_sources(method)
    got, accepted, share = held_out_acceptance(model, windows, chain(sources))
    logits = model(windows[:, :-1])
    first, walked, reached, hits = max([b for _, b in sources.values()], default=0), [], {}, {}
    for row in range(3):
        length = []
        for t in range(first, 30 - 1 - len(sources)):
            n = 0
            for j, (o, b) in sources.items():
                reached[j] = reached.get(j, 0) + 1
                if logits[o][row, t - b].argmax() != windows[row, t + j]:
                    break
                hits[j] = hits.get(j, 0) + 1
                n += 1
            length.append(n + 1)
        t = 0
        while t < len(length):
            walked.append(length[t])
            t += length[t]
    assert got == pytest.approx(sum(walked) / len(walked))
    for j in sources:
        assert accepted[j] == pytest.approx(sum(n >= j for n in walked) / len(walked))
        assert share[j] == pytest.approx(hits.get(j, 0) / max(1, reached.get(j, 0)))


@pytest.mark.parametrize("tree", [chain(draft_sources(LEAP)), BUSHY])
@pytest.mark.parametrize("kind, own, n_layer, whs", [
    ("resblock", False, 1, False), ("resblock", True, 3, False), ("block", True, 2, False),
    ("resblock", False, 2, True), ("block", False, 1, True)])
def test_walking_along_a_text_foretells_the_steps_of_decoding_it(tree, kind, own, n_layer, whs):
    model = tiny_model(kind=kind, own=own, n_layer=n_layer, whs=whs)
    prompt = [1, 2, 3, 4, 5]
    first = max(node.look_back for node in tree)                            # the walk's first position, then the root
    g = Decoder(model, tree=tree).generate([prompt[:first + 2]], 40)
    text = torch.tensor([prompt[:first + 2] + g.tokens[0]])
    steps = walk(accepted_depths(tree, guess_hits(model, text, [node[1:3] for node in tree], 3)))
    taken = "".join("1" if node else "0" for node in g.nodes[0]).split("0") # "110" is a step that accepted two
    assert max(steps) > 0 and len(steps) > 8
    assert steps[:-1] == [len(accepted) for accepted in taken][:len(steps) - 1]


def test_a_tree_grows_by_the_node_that_accepts_most():
    torch.manual_seed(0)
    sources = [(o, o - j) for j in (2, 3, 4) for o in (2, 3, 4) if o >= j]
    hits = {(o, b, r): torch.rand(3, 40) < 0.5 / (1 + o / 2 + r) for o, b in sources for r in range(3)}
    tree = grow_tree(hits, 12)
    for k in range(12):
        possible = [Node(parent, *source) for parent in range(k + 1) for source in hits
                    if source[0] - source[1] == depths(tree[:k])[parent] + 2]
        most = max(accepted_depths((*tree[:k], node), hits).sum() for node in possible)
        assert accepted_depths(tree[:k + 1], hits).sum() == most


def test_calibrate_fills_a_budget_and_stops_where_nothing_is_left_to_gain():
    windows = torch.randint(0, 31, (4, 40))
    found = calibrate(tiny_model(), windows, nodes=9)
    assert len(found["tree"]) == 9 and found["table"][0]["tokens_per_step"] > 1
    nothing = calibrate(tiny_model(NTP), windows)
    assert nothing["tree"] == () and [row["block"] for row in nothing["table"]] == [1]


def test_calibrate_measures_every_source_and_takes_the_better_one():
    model = counting_model((1, 2, 3, 4), wrong=(2,))                        # for distance 2 there are 3 and 4, back
    windows = (torch.arange(24)[None] + torch.arange(8)[:, None]) % 32
    found = calibrate(model, windows, nodes=3)
    assert [node.offset - node.look_back for node in found["tree"]] == [2, 3, 4]
    assert found["tree"][0].offset in (3, 4) and found["table"][0]["tokens_per_step"] == 4
    assert found["accuracy"]["offset 2, look-back 0"][0] == 0 and found["accuracy"]["offset 3, look-back 1"][0] == 1


@pytest.mark.parametrize("cost, smallest, largest", [(0.0, 48, 64), (0.02, 2, 48), (5.0, 1, 1)])
def test_calibrate_takes_a_smaller_tree_where_wider_blocks_cost_more(cost, smallest, largest, monkeypatch):
    monkeypatch.setattr(decode, "step_latencies", lambda decoders, _: [1 + cost * (d.N - 1) for d in decoders])
    windows = torch.arange(30 * 40).view(30, 40) // 3 % 31                  # each machine a price list
    found = calibrate(tiny_model(), windows, progress=False)
    assert smallest <= 1 + len(found["tree"]) <= largest
    assert cost < 1 or len(found["table"]) == 2                             # where nothing can pay it does not go on
    best = max(found["table"], key=lambda row: row["tokens_per_step"] / (1 + cost * (row["block"] - 1)))
    assert 1 + len(found["tree"]) == best["block"]


# Rounding

def test_a_text_in_float32_is_held_against_float64():
    decoder = Decoder(tiny_model(), LEAP)
    tokens = decoder.generate(PROMPTS, 50).tokens
    counts = check_rounding(decoder, PROMPTS, tokens)
    assert counts["argmax"] == 150 and counts["neither"] == 0 and 0 < counts["margin"] < 1e-4
    tokens[1][-1] = (tokens[1][-1] + 1) % 31
    assert check_rounding(decoder, PROMPTS, tokens)["neither"] == 1


@pytest.mark.parametrize("options", [dict(), dict(temperature=1.0)])
def test_a_text_in_bfloat16_is_the_models_but_for_near_ties(options):
    decoder = Decoder(tiny_model(), LEAP, dtype=torch.bfloat16, **options)
    g = decoder.generate(PROMPTS, 50)
    counts = check_rounding(decoder, PROMPTS, g.tokens)
    assert counts["argmax"] + counts["near_tie"] == 150 and counts["neither"] == 0
    assert counts["largest_gap"] <= counts["margin"]
    worst = decoder.gpt(torch.tensor([PROMPTS[0] + g.tokens[0][:9]]))[0][0, -1].argmin()
    g.tokens[0][9:] = [int(worst)]
    assert check_rounding(decoder, PROMPTS, g.tokens)["neither"] == 1


# What is shown

def test_methods_are_named_after_their_offsets():
    assert [method_name(chain(draft_sources(m))) for m in METHODS] == ["NTP", "MTP", "leap k=2", "leap k=3", "mixed"]
    assert method_name(BUSHY) == "tree" and method_name(chain({2: (3, 1)})) == "tree"


def test_the_default_comparison_takes_what_the_offsets_allow():
    assert default_methods((1, 2, 3, 4, 5, 7)) == [NTP, MTP, LEAP, (1, 2, 3, 4, 5, 7)]
    assert default_methods((1,)) == [NTP]
    assert default_methods((1, 3, 5)) == [NTP, (1, 3, 5)]


def test_compare_reports_every_method_and_finds_the_texts_identical():
    ntp, leap, tree = chain(draft_sources(NTP)), chain(draft_sources(LEAP)), BUSHY
    records, generations = compare(tiny_model(), [ntp, leap, tree], PROMPTS, 20, rounds=2, batch_size=2, progress=False)
    assert [r["temperature"] for r in records] == [0, 0, 0, 1, 1, 1]
    assert [r["method"] for r in records] == ["NTP", "leap k=2", "tree"] * 2
    assert [r["block"] for r in records] == [1, 7, 1 + len(tree)] * 2
    assert all(r["identical"] for r in records)
    assert records[0]["speedup"] == 1.0 and records[0]["tokens_per_step"] == 1.0
    assert all(r["efficiency"] == pytest.approx(r["speedup"] / r["tokens_per_step"]) for r in records)
    assert [len(t) for g in generations[1.0][leap] for t in g.tokens] == [20, 20, 20]


def test_compare_notices_a_text_that_differs(monkeypatch, capsys):
    scores = Decoder.scores                                                 # a decoder that is wrong when it drafts
    monkeypatch.setattr(Decoder, "scores", lambda self, *a: scores(self, *a).roll(int(self.N > 1), -1))
    methods = [(), chain(draft_sources(LEAP))]
    records, _ = compare(tiny_model(), methods, PROMPTS, 20, temperatures=[0.0], rounds=1, progress=False)
    assert [r["identical"] for r in records] == [True, False]
    print_table("greedy", records)
    assert "DIFFERENT" in capsys.readouterr().out
    records[0]["rounding"]["near_tie"] = 2                                  # the first text may have taken another way
    print_table("greedy", records)
    shown = capsys.readouterr().out
    assert "DIFFERENT" not in shown and "2 near-ties" in shown and "0 near-ties" in shown
    records[1]["rounding"]["neither"] = 1
    print_table("greedy", records)
    assert "1 WRONG" in capsys.readouterr().out


def test_however_prompts_are_cut_into_batches_the_sampled_texts_are_the_same():
    texts = []
    for size in (1, 2, 3):
        _, generations = compare(tiny_model(), [BUSHY], PROMPTS, 20, [1.0], rounds=1, batch_size=size, progress=False)
        texts.append([t for g in generations[1.0][BUSHY] for t in g.tokens])
    assert texts[0] == texts[1] == texts[2]


def test_a_trace_shows_the_text_with_one_bracket_per_step():
    g = Generation(tokens=[list("x = 'naïve'".encode())], nodes=[[0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 0, 1]], distances=[],
                   steps=5, tokens_per_step=2.4, accepted={}, seconds=1.0, history=[])
    plain = trace(g, chain(draft_sources(LEAP)), get_tokenizer("bytes"), color=False).splitlines()[0]
    assert plain == "[x][ = ]['][naïv][e][']"


def test_the_page_holds_the_text_and_where_each_token_came_from():
    model, prompt = tiny_model(vocab_size=257), list(b"a </script>")
    tokenizer = get_tokenizer("bytes")
    stop = Decoder(model).generate([prompt], 40).tokens[0][21]              # the text ends early: steps without effect
    g = Decoder(model, tree=BUSHY).generate([prompt], 40, stop, record=True)
    assert len(g.history) > g.steps
    page = html_page("a < b", g, BUSHY, tokenizer, prompt)
    assert "a &lt; b" in page and "{{" not in page and "http" not in page
    assert page.count("const data") == 1 and page.count("</script>") == 1
    data = json.loads(page[page.index("const data = ") + 13:page.index(";\nconst get")])
    assert "".join(t[0] for t in data["tokens"]) == tokenizer.decode(g.tokens[0])
    assert [t[2][0] if t[2] else 1 for t in data["tokens"]] == g.distances[0]
    assert len(data["steps"]) == g.steps and sum(s["accepted"] for s in data["steps"]) == sum(n > 0 for n in g.nodes[0])
    assert all(s["accepted"] + len(s["rejected"]) == len(BUSHY) for s in data["steps"][:-1])
    assert data["steps"][-1]["rate"] == g.tokens_per_step


# Limits are errors, said before work starts

@pytest.mark.parametrize("prompts, new, message", [
    ([], 5, "no prompt"), ([[1], []], 5, "empty"), ([[1, 31]], 5, "outside 0..30"), ([[-1]], 5, "outside"),
    ([[1]], 0, "at least 1"), ([[1] * 60], 5, "at most 4 new tokens"), ([[1] * 70], 5, "exceed")])
def test_prompts_that_cannot_be_continued_are_refused(prompts, new, message):
    with pytest.raises(InputError, match=message):
        Decoder(tiny_model()).generate(prompts, new)


def test_a_stop_token_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="stop token"):
        Decoder(tiny_model()).generate([[1]], 5, stop_token=31)


def test_offsets_as_wide_as_the_context_are_refused_where_no_window_is_long_enough():
    with pytest.raises(InputError, match="too short"):
        held_out_acceptance(tiny_model((1, 32)), torch.zeros(2, 33, dtype=torch.long), chain(draft_sources((1, 32))))


@pytest.mark.parametrize("options, message", [
    (dict(offsets=(1, 6)), "no head for offset 6"), (dict(offsets=(2, 3)), "start with 1"),
    (dict(tree=chain({2: (2, 0), 4: (4, 0)})), "distance 3, which cannot come from offset 4"),  # a hole
    (dict(tree=[(0, 3, 2)]), "cannot come"), (dict(offsets=(1, 3), tree=[(0, 5, 3)]), "no head for offset 5"),
    (dict(tree=[(0, 1, -1)]), "cannot come"), (dict(tree=[(0, 2, 0, -1)]), "rank -1"),
    (dict(tree=[(1, 2, 0)]), "stand before"), (dict(tree=[(0, 2, 0, 31)]), "32 guesses of a vocabulary of 31"),
    (dict(tree=[(0, 2)]), "list of nodes"), (dict(tree=[5]), "list of nodes"), (dict(max_length=65), "max_length"),
    (dict(temperature=-1), "temperature"), (dict(top_k=0), "top_k"), (dict(top_p=1.5), "top_p")])
def test_decoders_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Decoder(tiny_model(), **options)


# Text that the model writes itself

@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_corpus_of_its_own_is_what_plain_sampling_from_the_backbone_writes(temperature, corpus, tmp_path):
    corpus, model = Corpus(corpus), tiny_model((1, 2, 3), vocab_size=257, block_size=24)
    folder = write_corpus_of_its_own(model, corpus, tmp_path / "own", tokens=400, temperature=temperature, seed=3,
                                     batch_size=8, prompt_tokens=4)         # 20 rows: three batches, the last not full
    prompts = corpus.windows("train", 20, 4).tolist()
    texts = [p + t for p, t in zip(prompts, reference(model.gpt, prompts, 20, temperature, seed=3))]
    own = Corpus(folder)
    assert own.meta["temperature"] == temperature and own.meta["seed"] == 3
    assert own.val.tolist() == texts[0] + [256]
    assert own.train.tolist() == [t for text in texts[1:] for t in text + [256]]


def test_a_corpus_of_its_own_is_as_long_as_wanted_and_sampled_as_wanted(corpus, tmp_path):
    model = tiny_model((1, 2), vocab_size=257, block_size=24)
    best = write_corpus_of_its_own(model, Corpus(corpus), tmp_path / "best", tokens=1000, prompt_tokens=4, top_k=1)
    greedy = write_corpus_of_its_own(model, Corpus(corpus), tmp_path / "greedy", tokens=1000, prompt_tokens=4,
                                     temperature=0.0)
    assert Corpus(best).train.tolist() == Corpus(greedy).train.tolist()     # the best of one is the best
    assert len(Corpus(best).train) + len(Corpus(best).val) == 50 * (24 + 1)     # 50 rows of 20 tokens after a prompt


def test_heads_can_be_trained_on_what_the_frozen_backbone_wrote(run_folder, corpus, tmp_path):
    result = command("decode.py", run_folder, "--write-corpus", tmp_path / "own", "--tokens", 1500, "--compile", "no",
                     "--temperature", 0.7, "--seed", 5, "--prompt-tokens", 8)
    assert result.returncode == 0 and "next: python train.py" in result.stdout, result.stderr
    again = write_corpus_of_its_own(load_checkpoint(run_folder)[0], Corpus(corpus), tmp_path / "again", tokens=1500,
                                    temperature=0.7, seed=5, prompt_tokens=8)
    assert Corpus(tmp_path / "own").train.tolist() == Corpus(again).train.tolist()
    assert Corpus(tmp_path / "own").meta["source"] == f"generated by {run_folder}"
    result = command("train.py", "--data", tmp_path / "own", "--init", run_folder, "--backbone-lr", 0, "--steps", 2,
                     "--out", tmp_path / "heads", "--no-progress", "--eval-windows", 2)
    assert result.returncode == 0 and f"held-out text is generated by {run_folder} here" in result.stdout, result.stderr


def test_weights_of_gpt2s_format_can_write_a_corpus_too(corpus, tmp_path):
    tiny_model(vocab_size=257, block_size=32).gpt.save_pretrained(tmp_path / "gpt2")
    options = ["decode.py", tmp_path / "gpt2", "--write-corpus", tmp_path / "own", "--tokens", 100, "--compile", "no"]
    assert_one_line_error(command(*options), "--data")                      # they do not say what they were trained on
    result = command(*options, "--data", corpus)
    assert result.returncode == 0 and len(Corpus(tmp_path / "own").train), result.stderr


@pytest.mark.parametrize("options, words", [
    (["--tokens", "0"], "--tokens"), (["--prompt", "x"], "--write-corpus"), (["--prompt-tokens", "32"], "exceed"),
    (["--write-corpus", ""], "--write-corpus"), (["--tokens", str(10**18)], "memory"), (["--html", "x"], "--html")])
def test_a_corpus_that_cannot_be_written_is_one_line(options, words, run_folder, tmp_path):
    options = options if "--write-corpus" in options else ["--write-corpus", tmp_path / "own", *options]
    assert_one_line_error(command("decode.py", run_folder, "--compile", "no", *options), words)
    assert not (tmp_path / "own").exists()


def test_a_corpus_of_its_own_never_replaces_what_no_model_wrote(run_folder, corpus, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    shutil.copytree(corpus, tmp_path / "corpus")
    for name, words in (("notes", "not a corpus"), ("corpus", "no model wrote")):
        before = {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}
        assert_one_line_error(command("decode.py", run_folder, "--compile", "no", "--tokens", 100, "--write-corpus",
                                      tmp_path / name), words)
        assert before == {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}


# The command line

FAST = ["--compile", "no", "--device", "cpu", "--prompts", "2", "--prompt-tokens", "8", "--new-tokens", "12",
        "--rounds", "1"]


def test_the_command_prints_a_table_for_greedy_sampled_and_real_text_and_writes_it_as_json(run_folder, tmp_path):
    result = command("decode.py", run_folder, *FAST, "--trace", "--out", tmp_path / "table.json")
    assert result.returncode == 0, result.stderr
    for title in ("greedy text", "sampled text, temperature 1", "held-out text"):
        assert title in result.stdout
    assert result.stdout.count("identical") == 2 * 4 and "DIFFERENT" not in result.stdout
    results = json.loads((tmp_path / "table.json").read_text())
    assert [r["method"] for r in results[0]["generated"]] == 2 * ["NTP", "MTP", "leap k=2", "mixed"]
    assert results[0]["environment"]["torch"] == torch.__version__


def test_the_command_continues_a_prompt_of_ones_own(run_folder):
    result = command("decode.py", run_folder, *FAST, "--prompt", "def f7(")
    assert result.returncode == 0, result.stderr
    assert "def f7(" in result.stdout and "held-out" not in result.stdout


def test_the_command_calibrates_a_tree_and_uses_it_from_then_on(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    assert_one_line_error(command("decode.py", run, *FAST, "--methods", "tree"), "no tree yet", "--calibrate")
    first = command("decode.py", run, *FAST, "--calibrate", "--tree-nodes", "6", "--html", tmp_path / "page.html")
    assert first.returncode == 0, first.stderr
    assert "distance 2: offset" in first.stdout and "offset 3, look-back 1" in first.stdout
    assert len(json.loads((run / "tree.json").read_text())["tree"]) == 6
    assert "<pre" in (tmp_path / "page.html").read_text()
    second = command("decode.py", run, *FAST, "--methods", "tree", "--out", tmp_path / "table.json")
    results = json.loads((tmp_path / "table.json").read_text())[0]["generated"]
    assert [(r["method"], r["block"], r["identical"]) for r in results] == 2 * [("NTP", 1, True), ("tree", 7, True)]
    assert "tree" in second.stdout
    (run / "tree.json").write_text('{"tree": [[0, 9, 7, 0]]}')
    assert_one_line_error(command("decode.py", run, *FAST), "tree.json", "offset 9", "--calibrate")


def test_the_command_measures_when_it_calibrates(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    result = command("decode.py", run, *FAST, "--calibrate", "--methods", "1")
    assert result.returncode == 0, result.stderr
    found = json.loads((run / "tree.json").read_text())
    assert found["table"][0]["block"] == 1 and found["table"][0]["cost"] > 0 and "<- chosen" in result.stdout
    assert [r["block"] for r in found["table"]] == list(BLOCKS)[:len(found["table"])]


@pytest.mark.parametrize("options, words", [
    (["--prompt", ""], ["prompt is empty"]), (["--prompt", "x" * 40], ["exceed", "context of 32"]),
    (["--new-tokens", "30"], ["exceed"]), (["--new-tokens", "0"], ["at least 1"]), (["--methods", "1,6"], ["offset 6"]),
    (["--methods", "2,3"], ["start with 1"]), (["--methods", "one"], ["numbers"]), (["--data", "no/such"], ["no/such"]),
    (["--temperature", "-1"], ["temperature"]), (["--top-p", "3"], ["top_p"]), (["--device", "tpu"], ["not available"]),
    (["--prompts", "0"], ["--prompts"]), (["--batch-size", "0"], ["--batch-size"]), (["--rounds", "0"], ["--rounds"]),
    (["--prompt-tokens", "0"], ["--prompt-tokens"]), (["--out", "no/such/folder/x.json"], ["no/such/folder"]),
    (["--out", "tests"], ["is a folder"]), (["--html", "no/such/x.html"], ["--html", "no/such"]),
    (["--tree-nodes", "4"], ["--calibrate"]), (["--calibrate", "--tree-nodes", "0"], ["--tree-nodes", "at least 1"]),
    (["--new-tokens", "abc"], ["--new-tokens"]),
    (["--nonsense"], ["--nonsense"])])
def test_bad_options_are_one_line(options, words, run_folder):
    assert_one_line_error(command("decode.py", run_folder, *FAST, *options), *words)


def test_a_missing_or_foreign_run_is_one_line(tmp_path, corpus):
    assert_one_line_error(command("decode.py", tmp_path / "nothing"), "no checkpoint", "train.py")
    assert_one_line_error(command("decode.py", corpus / "train.bin"), "not a checkpoint")


def test_a_corpus_with_another_tokenizer_is_refused(run_folder, corpus, tmp_path):
    model, state = load_checkpoint(run_folder)
    state = {k: v for k, v in state.items() if k not in ("gpt_config", "heads_config")}
    save_checkpoint(tmp_path / "checkpoint.pt", model, **{**state, "tokenizer": "gpt2"})

    result = command("decode.py", tmp_path, *FAST, "--data", corpus)
    assert_one_line_error(result, "is in bytes tokens", "gpt2 tokens", "--tokenizer")
