"""The worked example of extending the decoder: trees of drafts."""
import random

import pytest
import torch
from conftest import assert_one_line_error, command, tiny_model
from test_decode import FEW, PROMPTS, needs_compiler, plain_text

from data.prepare import InputError
from experiments.trees import Node, TreeDecoder, draft_ranks, grow, simulate, tree_tables
from heads import accepted_drafts, draft_sources, step_begins

CHAIN = [Node(i, o, b) for i, (o, b) in enumerate(draft_sources((1, 3, 5, 7)).values())]


def random_tree(seed, size=9, offsets=(2, 3, 4, 5, 7)):
    """A tree whose nodes have any parents, heads that reach so far, and ranks."""
    rng = random.Random(seed)
    depth = [0]
    tree = []
    while len(tree) < size:
        parent = rng.randrange(len(depth))
        reach = [o for o in offsets if o >= depth[parent] + 2]
        if reach:
            o = rng.choice(reach)
            tree.append(Node(parent, o, o - depth[parent] - 2, rng.choice([0, 0, 1, 2])))
            depth.append(depth[parent] + 1)
    return tree


def test_the_tables_of_a_tree_hold_depths_paths_and_ancestors():
    tree = [Node(0, 2, 0), Node(0, 3, 1, rank=1), Node(1, 3, 0), Node(2, 5, 2)]
    depth, path, ancestors = tree_tables(tree)
    assert depth.tolist() == [0, 1, 1, 2, 2]
    assert path.tolist() == [[0, 0, 0], [0, 1, 1], [0, 2, 2], [0, 1, 3], [0, 2, 4]]
    assert ancestors[4].tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("node, message", [
    (Node(1, 2, 0), "must come before"), (Node(0, 3, 0), "distance 2"),
    (Node(0, 2, -1), "distance"), (Node(0, 1, -1), "distance"), (Node(0, 2, 0, rank=-1), "node 1")])
def test_an_impossible_tree_is_an_error(node, message):
    with pytest.raises(InputError, match=message):
        tree_tables([node])


@pytest.mark.parametrize("seed, kind, options", [
    *((seed, dict(sequential=seed % 2 == 0), {}) for seed in range(6)),
    (6, dict(kind="block"), {}), (7, dict(kind="block", sequential=True), dict(temperature=1.0)),
    (8, dict(whs=True), dict(temperature=1.0)), (9, dict(sequential=True), dict(temperature=1.0)),
    (10, {}, dict(draft_vocab=FEW)), (11, dict(sequential=True), dict(draft_vocab=FEW))])
def test_a_random_tree_emits_the_text_of_plain_decoding(seed, kind, options):
    for batch_size in (1, 3):
        decoder = TreeDecoder(tiny_model(**kind), random_tree(seed), seed=5,
                              batch_size=batch_size, **options)
        g = decoder.generate(PROMPTS, 30)
        assert g.tokens == plain_text(options.get("temperature", 0.0))
        assert g.tokens_per_step > 1


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("kind", [{}, dict(sequential=True)])
def test_a_compiled_tree_emits_the_same_text(kind):
    decoder = TreeDecoder(tiny_model(**kind), random_tree(1), compile=True, batch_size=2)
    assert decoder.generate(PROMPTS, 30).tokens == plain_text(0.0)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_the_steps_on_real_text_are_those_of_a_decoder(seed, sequential):
    model = tiny_model(sequential=sequential)
    tree = random_tree(seed)
    g = TreeDecoder(model, tree).generate([PROMPTS[2]], 50)
    text = torch.tensor([PROMPTS[2] + g.tokens[0]])  # of which the decoder wrote each token
    accepted = simulate(tree, draft_ranks(model, text))[1]
    first = len(PROMPTS[2]) - 1
    begins = step_begins(accepted, first)[0].nonzero()[:, 0].tolist()
    ends = [first + i + 1 for i, distance in enumerate(g.distances[0]) if distance == 1]
    assert begins == [first, *ends][:len(begins)] and len(begins) == g.steps
    chain = simulate(CHAIN, draft_ranks(model, text))[1]
    assert chain[0, 7:-7].tolist() == accepted_drafts(model, (1, 3, 5, 7), text)[0, 7:-7].tolist()


def test_a_tree_grows_by_what_is_right_most_often_where_its_steps_begin():
    ranks = {(2, 0): torch.tensor([[0, 1, 0, 1, 0, 1, 0, 9]]),
             (3, 0): torch.tensor([[0, 9, 9, 9, 0, 9, 9, 9]])}
    tree, tokens_per_step = grow(ranks, 3, first=0)
    # Second best is right at 1, 3 and 5, but with the first node, steps begin at 0, 2, 4 and 6.
    assert tree == [Node(0, 2, 0), Node(1, 3, 0), Node(0, 2, 0, rank=1)]
    assert tokens_per_step == [1, 7 / 4, 7 / 3, 7 / 3]


def test_the_command_finds_a_tree_and_decodes_with_it_until_the_model_changes(run_folder):
    options = ("experiments/trees.py", run_folder, "--eager", "--device", "cpu")
    result = command(*options, "--nodes", 3)
    assert result.returncode == 0 and "speedup" in result.stdout, result.stderr
    result = command(*options, "--decode")
    assert "tree" in result.stdout and "DIFFERS" not in result.stdout, result.stderr
    checkpoint = run_folder / "checkpoint.pt"
    before = checkpoint.read_bytes()
    checkpoint.write_bytes(before + b" ")
    assert_one_line_error(command(*options, "--decode"), "of this model")
    (run_folder / "tree.json").unlink()
    checkpoint.write_bytes(before)
    assert_one_line_error(command(*options, "--decode"), "find a tree first")
