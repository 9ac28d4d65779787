"""Paper B, L-MTP (Liu et al. 2025): leaping heads against adjacent ones, and training in stages.
Parts and measures are as in paper_a.py."""
import itertools
from functools import partial

import numpy as np
import torch

from common import can_compile, write_results
from decode import Decoder
from experiments.bench_decode import step_seconds
from experiments.study.paper_a import chosen, next_token, real_steps
from experiments.study.runs import CONTEXT, CORPORA, PROMPT, chain_steps
from experiments.trees import draft_ranks, grow, simulate
from heads import HeadsConfig, MultiTokenGPT, draft_sources, step_begins
from model import GPT, GPTConfig

METHODS = {"MTP": (1, 2, 3, 4), "leap": (1, 3, 5, 7), "all": (1, 2, 3, 4, 5, 6, 7)}
KINDS = ("independent", "sequential")
NODES = 14       # of a tree
NEW = CONTEXT - PROMPT  # tokens of a window that are written


# ---- 6: leap against MTP ---------------------------------------------------------------------

def tree_steps(ranks, offsets, files):
    """In how many steps trees of some offsets write real text (W,). The tree that writes one half
    of the files is grown on the other half. ranks {(offset, look-back): (W, T)}, files (W,)"""
    own = {source: r for source, r in ranks.items() if source[0] in offsets}
    steps = torch.zeros(len(files))
    for side in (0, 1):
        here = files % 2 == side
        tree, _ = grow({source: r[~here] for source, r in own.items()}, NODES, PROMPT - 1)
        _, accepted = simulate(tree, {source: r[here] for source, r in own.items()})
        steps[here] = step_begins(accepted, PROMPT - 1).sum(1).float()
    return steps


def drafts(model, text):
    """What heads draft on real text: the steps of chains and of trees, {"METHOD, chain" and
    "METHOD, tree"}; how often an offset is right, {"offset o"}."""
    ranks = draft_ranks(model, text.windows[:, :-1])
    found = {}
    for method, offsets in METHODS.items():
        found[f"{method}, chain"] = chain_steps(model, text, offsets)
        found[f"{method}, tree"] = tree_steps(ranks, offsets, text.files)
    for o in model.offsets[1:]:
        found[f"offset {o}"] = (ranks[o, 0][:, PROMPT:-o] == 0).float().mean(1)
    return {name: text.by_file(values) for name, values in found.items()}


def written_text(model, text, n_prompts):
    """The steps in which prompts are continued, by the prompt's file, {"METHOD, T=..."}; and how
    many there are, {"prompts"}."""
    asked = torch.zeros(len(text.windows))
    asked[::max(1, len(text.windows) // n_prompts)] = 1
    prompts = text.windows[asked > 0, :PROMPT].tolist()
    found = {"prompts": text.by_file(asked)}
    for method, temperature in itertools.product(METHODS, (0.0, 0.5, 1.0)):
        decoder = Decoder(model, METHODS[method], len(prompts), temperature=temperature)
        g = decoder.generate(prompts, NEW)
        steps = torch.zeros(len(asked))  # a step ends with a bonus token, or with the text
        steps[asked > 0] = torch.tensor(
            [float(row.count(1) + (row[-1] != 1)) for row in g.distances])
        found[f"{method}, T={temperature:g}"] = text.by_file(steps)
    return found


def leap(study, seed):
    """Heads for offsets 1..7 on the frozen next-token model of every corpus."""
    rate = chosen(study, "residual", "frozen")
    written = partial(written_text, n_prompts=study.size.prompts)
    rows = {}
    for data, kind in itertools.product(CORPORA, KINDS):
        run = study.run(f"heads7-{data}-{kind}", seed, study.base(seed, data), data, lr=rate,
                        offsets="1,2,3,4,5,6,7", sequential=kind == "sequential", backbone_lr=0)
        rows[f"{data}, {kind}"] = (run, [drafts, written])
    return rows


def time_steps(study):
    """Milliseconds of a step on one core, in turns: {"METHOD, KIND"}. Random weights take as long
    as others. Nothing may run beside. -> step_ms.json"""
    config = GPTConfig(block_size=CONTEXT, **study.size.shape)
    decoders = {}
    for kind in KINDS:
        heads = HeadsConfig(METHODS["all"], sequential=kind == "sequential")
        model = MultiTokenGPT(GPT(config), heads).eval()
        for method, offsets in ({"NTP": (1,)} | METHODS).items():
            decoders[f"{method}, {kind}"] = Decoder(
                model, offsets, compile=can_compile(torch.device("cpu")))
    seconds = step_seconds(list(decoders.values()), rounds=15)
    write_results(study.folder / "step_ms.json",
                  {name: 1e3 * t for name, t in zip(decoders, seconds)})


# ---- 8: two stages ---------------------------------------------------------------------------

def stages(study, seed):
    """L-MTP's two stages: heads alone, then everything at a hundredth of their rate with weight
    0.1 on the heads. Against one stage that is as gentle to the backbone, with as many steps of
    the heads; and the base, trained on without heads as the second stage does. Another seed: the
    second stage sees other batches."""
    base = study.base(seed)
    rate = chosen(study, "residual", "frozen")
    n = study.size.joint_steps // 2
    leaping = dict(offsets="1,3,5,7")
    gentle = leaping | dict(head_weight=0.1)
    first = study.run("stage-1", seed, base, lr=rate, backbone_lr=0, steps=n, **leaping)
    second = study.run("stage-2", seed + 100, first, lr=rate / 100, steps=n, **gentle)
    one = study.run("one-stage", seed, base, lr=rate, steps=2 * n, backbone_lr=0.01, **gentle)
    none = study.run("no-stage", seed, base, lr=rate / 100, steps=n)
    return {"two stages": (second, [next_token, real_steps]),
            "one stage": (one, [next_token, real_steps]),
            "no heads": (none, [next_token])}


# ---- 7: the theory ---------------------------------------------------------------------------

def expected(accuracy, offsets):
    """What the theory expects of accuracies {offset: number}: E = 1 + the sum over distances of the
    product of the accuracies up to there, as if drafts were right independently."""
    total = run = 1
    for offset, _ in draft_sources(offsets).values():
        run = run * accuracy[offset]
        total = total + run
    return total


def formula(g, method):
    """The same, if accuracy falls with the offset as exp(-g (o - 1)): g is the attenuation."""
    return expected({o: np.exp(-g * (o - 1)) for o in range(2, 8)}, METHODS[method])


GRID = np.linspace(0.01, 1.0, 991)  # attenuations, and the mean accuracy of offsets 2..7
ACCURACY = np.exp(-GRID[:, None] * np.arange(1, 7)).mean(1)
BREAK_EVEN = GRID[formula(GRID, "leap") > formula(GRID, "MTP")].max()


def by_file(results):
    """With sequential heads, {corpus: (attenuation, leap's gain in tokens per step, weights)} of
    each file that has windows: (files,), (files,) and (..., files)"""
    found = {}
    for corpus, counts in results.counts.items():
        some = counts > 0

        def mean(measure):
            return results.sums("leap", f"{corpus}, sequential", measure)[some] / counts[some]
        accuracy = np.mean([mean(f"offset {o}") for o in range(2, 8)], axis=0)
        g = np.interp(-accuracy, -ACCURACY, GRID)
        gain = NEW / mean("leap, chain") - NEW / mean("MTP, chain")
        found[corpus] = g, gain, (results.weights[corpus] * counts)[..., some]
    return found


def break_even(results):
    """The attenuation at which leap stops to win, with sequential heads, whose files lie on both
    sides: where a parabola in log g through the files crosses zero (...). (The same fit to what
    the formula says of these files finds the formula's, 0.14.)"""
    parts = zip(*by_file(results).values())
    g, gain, weights = [np.concatenate(part, axis=-1) for part in parts]
    powers = np.log(g) ** np.arange(3)[:, None]  # (3, files)
    square = np.einsum("...f,if,jf->...ij", weights, powers, powers)
    right = np.einsum("...f,if,f->...i", weights, powers, gain)
    a, b, c = np.moveaxis(np.linalg.solve(square, right[..., None])[..., 0], -1, 0)
    return np.exp((-b - np.sqrt(b * b - 4 * a * c)) / (2 * c))
