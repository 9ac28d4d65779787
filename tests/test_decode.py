"""Lesson 4: drafts are verified in blocks, looking back fills the holes, and the text cannot
change."""
import itertools
import json
import math

import pytest
import torch

from common import load_checkpoint, save_checkpoint
from conftest import assert_one_line_error, command, process, tiny_model
from data.loader import Corpus
from decode import (PART, Decoder, Node, accept, argmax, can_compile, chain, compare,
                    cumulative_sum, default_methods, filter_logits, follow_text,
                    generate_reference, gumbel_noise, method_name, paint, print_table,
                    statistics_of, tree_tables)
from heads import draft_sources
from model import GPT, InputError

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12]]  # ragged on purpose
NTP, MTP, LEAP = (1,), (1, 2, 3, 4), (1, 3, 5, 7)
METHODS = [NTP, MTP, LEAP, (1, 4, 7), (1, 2, 3, 4, 5, 7)]
# Several children per node, from several sources and ranks, in no order of depth.
BUSHY = (Node(0, 2, 0, 0), Node(0, 3, 1, 0), Node(0, 4, 2, 0), Node(1, 3, 0, 0), Node(2, 3, 0, 1),
         Node(0, 2, 0, 1), Node(4, 7, 3, 0), Node(1, 5, 2, 1), Node(7, 7, 2, 0), Node(5, 4, 0, 2))
TREES = {"bushy": BUSHY, **{",".join(map(str, m)): chain(draft_sources(m)) for m in METHODS}}


# The idea, on a model whose drafts can be foreseen

def counting_model(offsets, wrong=()):
    """A model that knows the text 0 1 2 3 ... (mod 32): after token x, offset o predicts x + o, or
    something else for the offsets in `wrong`. The hidden state is the one-hot vector of x."""
    model = tiny_model(offsets, untrained=True, n_embd=32, vocab_size=32)

    def forward_by(n):  # a matrix that takes one-hot x to x + n
        return torch.eye(32).roll(n, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.gpt.transformer.ln_f.weight.fill_(1.0)
        model.gpt.lm_head.weight = torch.nn.Parameter(forward_by(1))
        model.gpt.transformer.wte.weight = torch.nn.Parameter(10 * torch.eye(32))
        for o in offsets[1:]:  # z + silu(W z): adds x + o - 1, and larger
            shift = o - 1 if o not in wrong else o + 5
            model.heads[str(o)].blocks[0].weight.copy_(20 * forward_by(shift))
    return model


@pytest.mark.parametrize("method, per_step", [(NTP, 1), (MTP, 4), (LEAP, 7)])
def test_a_model_that_is_always_right_fills_every_block(method, per_step):
    g = Decoder(counting_model(METHODS[-1]), method).generate([[3, 4, 5]], 3 * per_step)
    assert g.tokens == [[(6 + i) % 32 for i in range(3 * per_step)]]
    assert g.steps == 3 and g.tokens_per_step == per_step
    assert g.nodes == [[*range(1, per_step), 0] * 3]  # the drafts in order, then the bonus token
    assert g.accepted == {j: 1.0 for j in range(2, per_step + 1)}


def test_looking_back_needs_a_past():
    # After a prompt of one token there is no position t - 1, so leap's first draft is wrong.
    g = Decoder(counting_model(LEAP), LEAP).generate([[3]], 20)
    assert g.tokens == [[(4 + i) % 32 for i in range(20)]]
    assert g.nodes[0][:9] == [0, 0, 1, 2, 3, 4, 5, 6, 0]


def test_a_wrong_head_costs_speed_at_its_distances_and_nothing_else():
    # Offset 5 serves distances 4 and 5 of leap: a step emits two drafts and the bonus token.
    g = Decoder(counting_model(LEAP, wrong=(5,)), LEAP).generate([[3, 4, 5]], 30)
    assert g.tokens == [[(6 + i) % 32 for i in range(30)]] and g.tokens_per_step == 3
    assert g.accepted == {2: 1.0, 3: 1.0, 4: 0.0, 5: 0.0, 6: 0.0, 7: 0.0}


def test_a_tree_follows_the_branch_that_is_right():
    # The best draft of offset 2 is wrong, offset 4 looking back two is right; so is its child.
    tree = (Node(0, 2, 0), Node(0, 4, 2), Node(1, 3, 0), Node(2, 3, 0))
    g = Decoder(counting_model(MTP, wrong=(2,)), tree=tree).generate([[3, 4, 5, 6]], 24)
    assert g.tokens == [[(7 + i) % 32 for i in range(24)]] and g.nodes == [[2, 4, 0] * 8]


def test_the_tables_of_a_tree_of_four_nodes():
    t = tree_tables((Node(0, 2, 0), Node(0, 2, 0, 1), Node(1, 3, 0), Node(2, 3, 0)))
    assert (t.N, t.D, t.W, t.H, t.R) == (5, 2, 1, 2, 2) and t.offsets.tolist() == [2, 3]
    assert t.depth.tolist() == [0, 1, 1, 2, 2] and t.parent.tolist() == [0, 0, 0, 1, 2]
    assert t.path.tolist() == [[0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 1, 3], [0, 2, 4]]
    assert t.visible.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0],
                                        [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
    assert t.source.tolist() == [0, 1, 2, 2]


def test_accepting_takes_the_deepest_path_of_drafts_that_are_their_parents_targets():
    tree = tree_tables((Node(0, 2, 0), Node(0, 2, 0, 1), Node(1, 3, 0), Node(2, 3, 0)))
    block = torch.tensor([[9, 5, 6, 7, 8]])
    for target, expected in [([6, 0, 8, 0, 0], [0, 2, 4]), ([5, 0, 8, 0, 0], [0, 1, 0]),
                             ([1, 7, 8, 0, 0], [0, 0, 0])]:
        n, path = accept(block, torch.tensor([target]), tree)
        assert path[0].tolist() == expected and n.item() == sum(i > 0 for i in expected)


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


expected_texts = {}


def expected_text(temperature):
    """The text of tiny_model's GPT, which no head can change, computed once."""
    if temperature not in expected_texts:
        expected_texts[temperature] = recompute(tiny_model().gpt, PROMPTS, 30, temperature, seed=5)
    return expected_texts[temperature]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("conditional", [False, True])
def test_the_reference_emits_the_text_of_plain_decoding(method, conditional):
    model = tiny_model(conditional=conditional)
    for prompt, text in zip(PROMPTS, expected_text(0.0)):
        assert generate_reference(model, prompt, 30, method) == text
    counting = counting_model(METHODS[-1])
    calls = []
    counting.gpt.transformer.wte.register_forward_hook(lambda *_: calls.append(1))
    generate_reference(counting, [3, 4, 5], 1 + 2 * max(method), method)
    assert len(calls) == 2 * 3  # verify and draft three times: an empty block, two full ones


KINDS = [dict(), dict(own=True, n_layer=2), dict(kind="block"), dict(conditional=True),
         dict(kind="block", own=True, whs=True), dict(whs=True, n_layer=2), dict(untrained=True),
         dict(kind="block", n_layer=2, untrained=True), dict(kind="block", conditional=True),
         dict(conditional=True, whs=True, own=True, n_layer=2)]


@pytest.mark.parametrize("name, kind", [
    *((name, KINDS[i % len(KINDS)]) for i, name in enumerate(TREES)),
    *((name, kind) for name in ("1,3,5,7", "bushy") for kind in KINDS)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_method_emits_the_text_of_plain_decoding(name, kind, temperature):
    decoder = Decoder(tiny_model(**kind), tree=TREES[name], temperature=temperature, seed=5)
    assert decoder.generate(PROMPTS, 30).tokens == expected_text(temperature)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [MTP, LEAP])
def test_the_drafts_are_those_of_the_heads_when_they_read_the_whole_text(kind, method):
    model, prompt = tiny_model(**kind), [5, 6, 7, 8, 9, 10, 11, 12]
    g = Decoder(model, method).generate([prompt], 50)
    text, nodes, root = prompt + g.tokens[0], [], len(prompt) - 1
    logits = model(torch.tensor([text]))  # {offset: (1, T, V)}
    while len(nodes) < 50:
        n = 0  # of drafts that are right: at distance j from the token before the root
        for j, (o, b) in draft_sources(method).items():
            if text[root - 1 + j:] and logits[o][0, root - 1 - b].argmax() == text[root - 1 + j]:
                n += 1
            else:
                break
        nodes += [*range(1, n + 1), 0]
        root += n + 1
    assert nodes[:50] == g.nodes[0] and max(nodes) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["1,3,5,7", "bushy"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafting_among_a_few_tokens_does_not_change_the_text(kind, name, temperature):
    decoder = Decoder(tiny_model(**kind), tree=TREES[name], temperature=temperature, seed=5,
                      draft_vocab=[30, 3, 7, 11, 12])
    assert decoder.generate(PROMPTS, 30).tokens == expected_text(temperature)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_is_the_best_of_these_tokens_by_logit_and_noise(own, temperature):
    model, prompt, vocab, blocks = tiny_model(own=own), [5, 6, 7, 8], [30, 3, 7, 11, 12], []

    def keep(s):
        blocks.append((int(s.position), s.block[0, 1:].tolist()))
    decoder = Decoder(model, LEAP, temperature=temperature, seed=5, draft_vocab=vocab)
    text = prompt + decoder.generate([prompt], 30, on_step=keep).tokens[0]
    logits = model(torch.tensor([text]))  # {offset: (1, T, V)}
    for root, drafts in blocks[:-1]:  # after the last step the text ends
        for (o, b), draft in zip(draft_sources(LEAP).values(), drafts):
            t = root - 1 - b
            noise = [temperature * noise_by_hand(5, 0, t + o, v) for v in vocab]
            assert draft == vocab[(logits[o][0, t, vocab] + torch.tensor(noise)).argmax()]


def test_drafting_among_all_tokens_in_any_order_is_drafting_as_usual():
    plain, same = (Decoder(tiny_model(), tree=BUSHY, temperature=1.0, draft_vocab=vocab)
                   for vocab in (None, [*range(30, -1, -1), 4]))
    assert plain.generate(PROMPTS, 30).nodes == same.generate(PROMPTS, 30).nodes
    for bad in ([], [31], [-1, 2]):
        with pytest.raises(InputError, match="draft_vocab"):
            Decoder(tiny_model(), draft_vocab=bad)


@pytest.mark.parametrize("method", METHODS)
def test_greedy_text_is_that_of_transformers_generate(method, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=50, n_positions=64, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0)).eval()
    theirs.save_pretrained(tmp_path)
    model, prompt = tiny_model(gpt=GPT.from_pretrained(tmp_path)), [7, 3, 3, 9]
    text = theirs.generate(torch.tensor([prompt]), max_new_tokens=60, min_new_tokens=60,
                           do_sample=False, pad_token_id=0, eos_token_id=None)
    assert Decoder(model, method).generate([prompt], 60).tokens == [text[0, 4:].tolist()]


@pytest.mark.parametrize("options", [
    dict(temperature=0.7, top_k=5), dict(temperature=1.3, top_p=0.8),
    dict(temperature=1.0, top_k=9, top_p=0.9)])
def test_top_k_and_top_p_do_not_break_the_equality(options):
    decoders = [Decoder(tiny_model(), tree=tree, seed=2, **options)
                for tree in (TREES["1"], TREES["1,3,5,7"], BUSHY)]
    ntp, *others = [decoder.generate(PROMPTS, 40).tokens for decoder in decoders]
    assert all(tokens == ntp for tokens in others)


@pytest.mark.parametrize("method", [NTP, MTP, LEAP])
def test_generation_ends_with_the_stop_token_wherever_it_stands_in_a_block(method):
    full = Decoder(tiny_model(), NTP, temperature=1.0).generate(PROMPTS, 40).tokens
    decoder = Decoder(tiny_model(), method, temperature=1.0)
    for stop in range(0, 31, 2):
        for text, whole in zip(decoder.generate(PROMPTS, 40, stop_token=stop).tokens, full):
            assert text == whole[:whole.index(stop) + 1 if stop in whole else 40]


def test_a_row_does_not_depend_on_its_neighbours_and_may_use_the_whole_context():
    decoder = Decoder(tiny_model(), LEAP, temperature=1.0)
    together = decoder.generate([[1, 2, 3, 4], [4], [5] * 4], 60).tokens
    again = decoder.generate([[1, 2, 3, 4], [30] * 4, [5] * 4], 60).tokens
    assert together[0] == again[0] and together[2] == again[2]
    assert together[0] == recompute(tiny_model().gpt, [[1, 2, 3, 4]], 60, 1.0)[0]


def test_a_decoder_can_be_used_again_and_forgets_what_it_wrote():
    used, fresh, blocks = Decoder(tiny_model(), LEAP), Decoder(tiny_model(), LEAP), []
    used.generate([[9] * 20, [8] * 11, [7]], 40)
    for decoder in (used, fresh):
        blocks.append([])
        decoder.generate(PROMPTS, 30, on_step=lambda s: blocks[-1].append(s.block.tolist()))
    assert blocks[0] == blocks[1] and len(blocks[0]) > 5


def test_a_shorter_maximal_length_changes_nothing_but_the_room():
    short, full = Decoder(tiny_model(), LEAP, max_length=38), Decoder(tiny_model(), LEAP)
    assert short.generate(PROMPTS, 30).tokens == full.generate(PROMPTS, 30).tokens
    with pytest.raises(InputError, match="8 prompt tokens and 31 .* max_length of 38"):
        short.generate(PROMPTS, 31)


# Sampling

def test_the_noise_is_a_function_of_seed_row_position_and_token():
    tokens = torch.arange(9)
    got = gumbel_noise(7, torch.tensor([[0], [3]]), torch.tensor([[5, 6], [11, 12]]), tokens)
    positions = [[5, 6], [11, 12]]
    for (b, row), i, v in itertools.product(enumerate([0, 3]), (0, 1), range(9)):
        expected = noise_by_hand(7, row, positions[b][i], v)
        assert got[b, i, v].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def chi_square(counts, p):
    """Pearson's statistic as a z-score: about normal(0, 1) when counts were drawn from p."""
    expected, degrees = p * counts.sum(), len(p) - 1
    z = ((counts - expected).square() / expected).sum() - degrees
    return z.item() / math.sqrt(2 * degrees)


@pytest.mark.parametrize("method", [NTP, LEAP])
@pytest.mark.parametrize("options", [dict(temperature=1.0), dict(temperature=0.6, top_k=4)])
def test_sampled_tokens_follow_the_exact_distribution(method, options):
    # 4,000 rows with one prompt, three tokens each, against the product of exact probabilities.
    V, rows, prompt = 6, 4000, [1, 4]
    model = tiny_model(vocab_size=V, n_embd=16, n_layer=1, block_size=16)
    g = Decoder(model, method, seed=1, **options).generate([prompt] * rows, 3)
    ones, counts = torch.ones(rows), torch.zeros(V, V, V)
    counts.index_put_(tuple(torch.tensor(g.tokens).T), ones, accumulate=True)
    p = torch.zeros(V, V, V)
    for a, b in itertools.product(range(V), repeat=2):
        logits = model.gpt(torch.tensor([[*prompt, a, b]]))[0][0, 1:] / options["temperature"]
        q = filter_logits(logits, options.get("top_k")).softmax(-1)
        p[a, b] = q[0, a] * q[1, b] * q[2]
    counts, p = counts.flatten(), p.flatten().detach()
    assert counts[p == 0].sum() == 0
    common = p * rows >= 5  # Pearson needs some counts in every cell; the rest is one cell
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    p = torch.cat([p[common], p[~common].sum()[None]])
    assert abs(chi_square(counts[p > 0], p[p > 0])) < 4


def test_drafts_with_the_models_noise_are_accepted_more_often(run_folder, corpus):
    model, _ = load_checkpoint(run_folder)
    prompts = Corpus(corpus).windows("val", 32, 8).tolist()
    decoders = (Decoder(model, MTP, temperature=1.0, coupled=c) for c in (True, False))
    with_noise, without = (decoder.generate(prompts, 24) for decoder in decoders)
    assert with_noise.tokens == without.tokens
    assert with_noise.tokens_per_step > 1.1 * without.tokens_per_step


def test_seeds_and_rows_have_noise_of_their_own_however_prompts_are_cut_into_batches():
    def texts(seed, batch_size):
        decoder, found = Decoder(tiny_model(), MTP, temperature=1.0, seed=seed), []
        for i in range(0, 4, batch_size):
            found += decoder.generate([[1, 2]] * batch_size, 20, first_row=i).tokens
        return found
    assert texts(seed=0, batch_size=4) == texts(seed=0, batch_size=2) != texts(1, 4)
    assert len({tuple(text) for text in texts(0, 4)}) == 4


def test_top_k_and_top_p_hide_the_improbable():
    logits = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()

    def kept(logits, **how):
        return filter_logits(logits, **how).isfinite().int().tolist()
    assert kept(logits, top_k=2) == kept(logits, top_p=0.6) == [1, 1, 0, 0, 0]
    assert kept(logits, top_p=0.5) == [1, 0, 0, 0, 0]
    assert kept(logits.flip(0), top_k=3, top_p=0.99) == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("vocab_size", [3, PART, PART + 1, 5 * PART - 1])
def test_large_vocabularies_are_reduced_and_summed_in_parts(vocab_size):
    torch.manual_seed(0)
    scores, first = torch.randn(40, vocab_size), torch.randint(0, vocab_size, (40,)).tolist()
    for row, i in zip(scores, first):
        row[[i, (i + vocab_size) // 2, -1]] = 9.0  # of several maxima the first counts
    assert argmax(scores).tolist() == first
    assert argmax(scores - math.inf).tolist() == [0] * 40
    p = scores.softmax(-1)
    torch.testing.assert_close(cumulative_sum(p), p.double().cumsum(-1).float())


# Steps, and following a text

def test_statistics_are_those_of_the_nodes_and_rows_that_end_early_do_not_count():
    decoder = Decoder(tiny_model(), LEAP, temperature=1.0)
    stop = decoder.generate(PROMPTS, 50).tokens[0][9]
    g = decoder.generate(PROMPTS, 50, stop_token=stop)
    alone = [decoder.generate([p], 50, stop, first_row=i) for i, p in enumerate(PROMPTS)]
    assert len(g.tokens[0]) <= 10 and g.tokens == [a.tokens[0] for a in alone]
    assert g.steps == sum(a.steps for a in alone)
    for j in g.accepted:
        mean = sum(a.accepted[j] * a.steps for a in alone) / g.steps
        assert g.accepted[j] == pytest.approx(mean)
    # Steps: "1 2 0", "0" and a last one, "1", which the end of the text cut short.
    accepted = {2: 2 / 3, 3: 1 / 3, 4: 0.0}
    assert statistics_of([[1, 2, 0, 0, 1]], TREES["1,2,3,4"]) == (3, 5 / 3, accepted)


@pytest.mark.parametrize("kind", KINDS)
def test_following_its_own_text_takes_the_steps_that_wrote_it(kind):
    model = tiny_model(**kind)
    for tree in (TREES["1,3,5,7"], BUSHY):
        decoder = Decoder(model, tree=tree)
        written = decoder.generate(PROMPTS, 40)
        followed = decoder.generate(PROMPTS, 40, follow=written.tokens)
        assert (followed.tokens, followed.nodes) == (written.tokens, written.nodes)


def test_a_followed_text_is_kept_whatever_the_model_would_write():
    torch.manual_seed(0)
    texts, model = torch.randint(0, 31, (3, 40)).tolist(), tiny_model()
    g = Decoder(model, LEAP).generate(PROMPTS, 40, follow=texts)
    assert g.tokens == texts and 1 <= g.tokens_per_step < 2
    counting = counting_model(MTP)
    assert Decoder(counting, MTP).generate([[1]], 33, follow=[[*range(2, 32), 0, 1, 2]]).steps == 9


def test_a_decoder_that_followed_a_text_generates_its_own_again():
    decoder = Decoder(tiny_model(), LEAP)
    decoder.generate(PROMPTS, 30, follow=[[1] * 30] * 3)
    assert decoder.generate(PROMPTS, 30).tokens == expected_text(0.0)


# Comparing methods

def test_methods_are_named_after_their_offsets():
    names = [method_name(chain(draft_sources(m))) for m in METHODS]
    assert names == ["NTP", "MTP", "leap k=2", "leap k=3", "mixed"]
    assert method_name(BUSHY) == "tree" and method_name(chain({2: (3, 1)})) == "tree"


def test_the_default_comparison_takes_what_the_offsets_allow():
    assert default_methods((1, 2, 3, 4, 5, 7)) == [NTP, MTP, LEAP, (1, 2, 3, 4, 5, 7)]
    assert default_methods((1,)) == [NTP] and default_methods((1, 3, 5)) == [NTP, (1, 3, 5)]
    assert default_methods(MTP) == [NTP, (1, 3), MTP]  # the last is what --prompt decodes with


def test_a_comparison_has_a_record_per_method_and_finds_the_texts_identical():
    methods = [(), TREES["1,3,5,7"], BUSHY]
    for temperature in (0.0, 1.0):
        records = compare(tiny_model(), methods, PROMPTS, 20, temperature, rounds=2, batch_size=2,
                          progress=False)
        assert [r["method"] for r in records] == ["NTP", "leap k=2", "tree"]
        assert [r["block"] for r in records] == [1, 7, 11]
        assert all(r["identical"] and [len(t) for t in r["texts"]] == [20] * 3 for r in records)
        assert records[0]["speedup"] == records[0]["tokens_per_step"] == 1
        assert all(r["efficiency"] == r["speedup"] / r["tokens_per_step"] for r in records)


def test_a_comparison_notices_a_text_that_differs(monkeypatch, capsys):
    scores = Decoder.scores

    def wrong_if_it_drafts(self, *args):
        return scores(self, *args).roll(int(self.t.N > 1), -1)
    monkeypatch.setattr(Decoder, "scores", wrong_if_it_drafts)
    records = compare(tiny_model(), [(), TREES["1,3,5,7"]], PROMPTS, 20, rounds=1, progress=False)
    print_table("greedy", records)
    shown = capsys.readouterr().out
    assert [r["identical"] for r in records] == [True, False] and shown.count("DIFFERS") == 1


def test_following_windows_gives_a_record_per_method():
    windows = torch.arange(3)[:, None] + torch.arange(40)[None]
    records = follow_text(counting_model(METHODS[-1]), windows % 32, [(), TREES["1,2,3,4"]])
    assert [r["method"] for r in records] == ["NTP", "MTP"] and records[0]["tokens_per_step"] == 1
    assert records[1]["tokens_per_step"] > 3.7 and records[1]["accepted"][4] > 0.8


# Compiled

CAN_COMPILE = can_compile(torch.device("cpu"))
needs_compiler = pytest.mark.skipif(not CAN_COMPILE, reason="needs a compiler")


@needs_compiler
@pytest.mark.parametrize("options", [
    dict(tree=TREES["1,3,5,7"]),
    pytest.param(dict(tree=BUSHY, temperature=1.0), marks=pytest.mark.slow),
    pytest.param(dict(tree=BUSHY, temperature=1.0, draft_vocab=range(3, 14)),
                 marks=pytest.mark.slow),
    pytest.param(dict(tree=()), marks=pytest.mark.slow)])
@pytest.mark.parametrize("whs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_step_emits_the_same_text_and_is_never_compiled_again(options, whs):
    eager, compiled = (Decoder(tiny_model(whs=whs), **options, compile=c) for c in (False, True))
    assert compiled.generate(PROMPTS, 30).tokens == eager.generate(PROMPTS, 30).tokens
    with torch.compiler.set_stance("fail_on_recompile"):
        for prompts in ([[3] * 30, [1], [2, 2]], [[4], [5] * 7, [6] * 34]):
            g, h = eager.generate(prompts, 30), compiled.generate(prompts, 30)
            assert (g.tokens, g.nodes) == (h.tokens, h.nodes)
        rest = [[1] * 30] * 3
        assert compiled.generate(PROMPTS, 30, follow=rest).tokens == rest  # eagerly


@needs_compiler
@pytest.mark.slow
def test_a_new_decoder_uses_the_weights_that_the_model_has_now():
    model = tiny_model(MTP, n_embd=384)  # large enough to be frozen into programs
    for _ in range(2):
        g, h = (Decoder(model, MTP, compile=c).generate([[1, 2, 3]], 30) for c in (False, True))
        assert (g.tokens, g.steps) == (h.tokens, h.steps)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))


CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("compile", [pytest.param(c, marks=CUDA) for c in (False, True)])
@pytest.mark.parametrize("kind", [dict(), dict(kind="block"), dict(whs=True),
                                  dict(conditional=True), dict(kind="block", conditional=True)])
def test_on_a_gpu_every_method_emits_the_text_that_the_cpu_emits(kind, compile):
    model = tiny_model(**kind, block_size=192)
    prompts = [*PROMPTS, [3] * 69]
    for temperature in (0.0, 1.0):
        expected = Decoder(model, NTP, temperature=temperature).generate(prompts, 40).tokens
        trees = list(TREES.values())
        if compile:  # that takes long: each with one temperature
            trees = [TREES["1,3,5,7"], BUSHY] if temperature else [()]
        for tree in trees:
            decoder = Decoder(model.cuda(), tree=tree, temperature=temperature, compile=compile)
            for _ in range(2):  # a captured graph forgets the text before
                assert decoder.generate(prompts, 40).tokens == expected
        model.cpu()


@pytest.mark.parametrize("tree", [
    pytest.param(TREES[name], marks=CUDA) for name in ("1,3,5,7", "bushy")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_a_large_vocabulary_is_sampled_by_a_compiled_step(dtype, tree):
    from experiments.rounding import check_rounding
    model = tiny_model(vocab_size=50257, n_embd=64).cuda()
    options = dict(temperature=1.0, dtype=dtype, seed=3)
    decoder = Decoder(model, tree=tree, compile=True, **options)
    counts = check_rounding(decoder, PROMPTS, decoder.generate(PROMPTS, 40).tokens)
    assert counts["argmax"] > 0 and counts["neither"] == 0
    options.update(top_k=50, top_p=0.9)
    texts = [Decoder(model, tree=tree, compile=c, **options).generate(PROMPTS, 40).tokens
             for c in (False, True)]
    assert dtype != torch.float32 or texts[0] == texts[1]


# Limits raise an error before any work starts

@pytest.mark.parametrize("prompts, new, message", [
    ([], 5, "no prompt"), ([[1], []], 5, "empty"), ([[1, 31]], 5, "outside 0..30"),
    ([[-1]], 5, "outside"), ([[1]], 0, "at least 1"), ([[1] * 60], 5, "context of 64")])
def test_a_prompt_that_cannot_be_continued_raises_an_error(prompts, new, message):
    with pytest.raises(InputError, match=message):
        Decoder(tiny_model()).generate(prompts, new)


def test_a_stop_token_outside_the_vocabulary_raises_an_error():
    with pytest.raises(InputError, match="stop token"):
        Decoder(tiny_model()).generate([[1]], 5, stop_token=31)


@pytest.mark.parametrize("options, message", [
    (dict(offsets=(1, 6)), "no head for offset 6"), (dict(offsets=(2, 3)), "start with 1"),
    (dict(tree=chain({2: (2, 0), 4: (4, 0)})), "distance 3, which cannot come from offset 4"),
    (dict(tree=[(0, 3, 2)]), "cannot come"), (dict(offsets=(1, 3), tree=[(0, 5, 3)]), "offset 5"),
    (dict(tree=[(0, 1, -1)]), "cannot come"), (dict(tree=[(0, 2, 0, -1)]), "rank -1"),
    (dict(tree=[(1, 2, 0)]), "stand before"), (dict(tree=[(0, 2, 0, 31)]), "32 drafts"),
    (dict(tree=[(0, 2)]), "list of nodes"), (dict(tree=[5]), "list of nodes"),
    (dict(max_length=65), "max_length"), (dict(temperature=-1), "temperature"),
    (dict(top_k=0), "top_k"), (dict(top_p=1.5), "top_p")])
def test_an_impossible_decoder_raises_an_error(options, message):
    with pytest.raises(InputError, match=message):
        Decoder(tiny_model(), **options)


# The command line

FAST = ["--compile", "no", "--device", "cpu", "--prompts", 2, "--prompt-tokens", 8,
        "--new-tokens", 12, "--rounds", 1]


def test_the_command_compares_methods_on_greedy_sampled_and_real_text(run_folder, tmp_path):
    result = command("decode.py", run_folder, *FAST, "--out", tmp_path / "table.json")
    assert result.returncode == 0, result.stderr
    for title in ("greedy text", "sampled text, temperature 1", "held-out text"):
        assert title in result.stdout
    assert result.stdout.count("identical") == 2 * 4 and "DIFFERS" not in result.stdout
    results = json.loads((tmp_path / "table.json").read_text())
    assert [r["method"] for r in results["generated"]] == 2 * ["NTP", "MTP", "leap k=2", "mixed"]
    assert len(results["held_out"]) == 4 and results["environment"]["torch"] == torch.__version__


def test_the_command_streams_the_continuation_of_a_prompt(run_folder):
    result = process("decode.py", run_folder, "--prompt", "def f7(", "--temperature", 0)
    assert result.returncode == 0, result.stderr
    model, _ = load_checkpoint(run_folder)
    text = Decoder(model, NTP).generate([list(b"def f7(")], 25, stop_token=256).tokens[0]
    written = bytes(t for t in text if t < 256).decode()
    assert result.stdout == f"def f7({written}\n" and "mixed (1, 2, 3, 4, 5, 7)" in result.stderr


def test_a_stream_ends_at_end_of_text_and_uses_the_tree_of_the_run(run_folder, tmp_path):
    model, state = load_checkpoint(run_folder)
    with torch.no_grad():
        model.gpt.transformer.ln_f.weight.zero_()
        model.gpt.transformer.ln_f.bias[0], model.gpt.lm_head.weight[256, 0] = 1.0, 1000.0
    state = {k: v for k, v in state.items() if k not in ("gpt_config", "heads_config")}
    save_checkpoint(tmp_path / "checkpoint.pt", model, **state)
    for tree, name in (("[[0, 2, 0, 0], [0, 2, 0, 1]]", "tree (1, 2)"), ("[]", "NTP (1,)")):
        (tmp_path / "tree.json").write_text(f'{{"tree": {tree}}}')
        result = command("decode.py", tmp_path, "--prompt", "def ")
        assert result.stdout == "def \n" and f"{name}: 1 tokens in 1 steps" in result.stderr


def test_gpt2_weights_are_streamed_by_next_token_decoding(tmp_path):
    pytest.importorskip("safetensors")
    tiny_model(vocab_size=257, block_size=32).gpt.save_pretrained(tmp_path)
    result = command("decode.py", tmp_path, "--prompt", "x", "--new-tokens", 5)
    assert result.returncode == 0 and "NTP (1,): 5 tokens in 5 steps" in result.stderr


def test_a_painted_token_has_the_colour_of_its_distance_and_is_underlined_if_by_looking_back():
    tree = TREES["1,3,5,7"]
    assert paint("ab", 0, tree) == "ab"
    assert paint("ab", 1, tree) == "\033[38;5;16;48;5;157;4mab\033[0m"
    assert paint("a\n", 2, tree) == "\033[38;5;16;48;5;121ma\033[0m\n"  # the colour ends first


@pytest.mark.parametrize("options, words", [
    (["--prompt", "x", "--methods", "1", "1,2"], ["at most one"]),
    (["--prompt", ""], ["empty"]), (["--prompt", "x" * 40], ["exceed", "context of 32"]),
    (["--new-tokens", 30], ["exceed"]), (["--new-tokens", 0], ["at least 1"]),
    (["--methods", "1,6"], ["offset 6"]), (["--methods", "2,3"], ["start with 1"]),
    (["--methods", "one"], ["numbers"]), (["--data", "no/such"], ["no/such"]),
    (["--methods", "tree"], ["no tree", "calibrate.py"]), (["--temperature", -1], ["temperature"]),
    (["--top-p", 3], ["top_p"]), (["--device", "tpu"], ["not available"]),
    (["--prompts", 0], ["--prompts"]), (["--batch-size", 0], ["--batch-size"]),
    (["--rounds", 0], ["--rounds"]), (["--prompt-tokens", 0], ["--prompt-tokens"]),
    (["--out", "no/such/x.json"], ["no/such"]), (["--out", "tests"], ["is a folder"]),
    (["--new-tokens", "abc"], ["--new-tokens"]), (["--nonsense"], ["--nonsense"])])
def test_bad_options_are_one_line(options, words, run_folder):
    assert_one_line_error(command("decode.py", run_folder, *FAST, *options), *words)


def test_a_missing_foreign_or_unsuitable_run_is_one_line(run_folder, corpus, tmp_path):
    assert_one_line_error(command("decode.py", tmp_path / "nothing"), "no checkpoint", "train.py")
    assert_one_line_error(command("decode.py", corpus / "meta.json"), "not a checkpoint")
    model, state = load_checkpoint(run_folder)
    state = {k: v for k, v in state.items() if k not in ("gpt_config", "heads_config")}
    save_checkpoint(tmp_path / "checkpoint.pt", model, **{**state, "tokenizer": "gpt2"})
    result = command("decode.py", tmp_path, *FAST, "--data", corpus)
    assert_one_line_error(result, "bytes tokens", "gpt2 tokens", "--tokenizer")
    (tmp_path / "tree.json").write_text('{"tree": [[0, 9, 7, 0]]}')
    result = command("decode.py", tmp_path, *FAST)
    assert_one_line_error(result, "tree.json", "offset 9", "calibrate.py")
