"""Paper B, L-MTP (Liu et al. 2025): leaping heads against adjacent ones, and training in stages."""
import numpy as np
import torch

from common import can_compile, write_results
from decode import Decoder
from experiments.bench_decode import step_seconds
from experiments.study.paper_a import chosen, head, known
from experiments.study.runs import CONTEXT, CORPORA, PROMPT, chain_steps, load
from experiments.study.verdicts import Claim
from experiments.trees import draft_ranks, grow, simulate
from heads import draft_sources, step_begins

METHODS = {"MTP": (1, 2, 3, 4), "leap": (1, 3, 5, 7), "all": (1, 2, 3, 4, 5, 6, 7)}
KINDS = {"independent": {}, "sequential": dict(sequential=True)}
NODES = 14       # of a tree
NEW = CONTEXT - PROMPT  # tokens of a window that are written
TEMPERATURES = (0.0, 0.5, 1.0)


# ---- 6: leap against MTP ---------------------------------------------------------------------

def leap_runs(study, seed):
    """Heads for offsets 1..7 on the frozen next-token model of every corpus."""
    lr = chosen(study, "residual", "frozen")
    return {f"{data}, {kind}": head(
        study, seed, f"heads7-{data}-{kind}", lr, study.base(seed, data), data=data,
        offsets="1,2,3,4,5,6,7", backbone_lr=0, steps=study.size.head_steps, **options)
        for data in CORPORA for kind, options in KINDS.items()}


def real_text(model, text, ranks):
    """-> {"METHOD, chain" and "METHOD, tree": steps, by file}. The tree that writes one half of the
    files is grown on the other half."""
    found = {}
    half = text.files % 2
    for method, offsets in METHODS.items():
        found[f"{method}, chain"] = text.by_file(chain_steps(model, text, offsets))
        own = {source: r for source, r in ranks.items() if source[0] in offsets}
        steps = torch.zeros(len(half))
        for side in (0, 1):
            there, here = [{s: r[half == h] for s, r in own.items()} for h in (1 - side, side)]
            tree, _ = grow(there, NODES, PROMPT - 1)
            _, accepted = simulate(tree, here)
            steps[half == side] = step_begins(accepted, PROMPT - 1).sum(1).float()
        found[f"{method}, tree"] = text.by_file(steps)
    return found


def written_text(model, text, n_prompts):
    """-> {"prompts": how many; "METHOD, T=...": steps to continue them, by the prompt's file}"""
    chosen = torch.zeros(len(text.windows))
    chosen[::max(1, len(text.windows) // n_prompts)] = 1
    prompts = text.windows[chosen > 0, :PROMPT].tolist()
    found = {"prompts": text.by_file(chosen)}
    for method, offsets in METHODS.items():
        for temperature in TEMPERATURES:
            decoder = Decoder(model, offsets, len(prompts), temperature=temperature)
            g = decoder.generate(prompts, NEW)
            steps = torch.zeros(len(chosen))  # a step ends with a bonus token, or with the text
            steps[chosen > 0] = torch.tensor(
                [float(row.count(1) + (row[-1] != 1)) for row in g.distances])
            found[f"{method}, T={temperature:g}"] = text.by_file(steps)
    return found


def accuracies(ranks):
    """How often offset o is right, (n,) each: {"offset o": ...}"""
    return {f"offset {o}": (r[:, PROMPT:-o] == 0).float().mean(1)
            for (o, b), r in ranks.items() if b == 0}


def drafting(model, text):
    """What the heads of a model draft on real text. -> what `real_text` and `accuracies` found"""
    ranks = draft_ranks(model, text.windows[:, :-1])
    found = real_text(model, text, ranks)
    return found | {o: text.by_file(a) for o, a in accuracies(ranks).items()}


def leap(study, seed):
    """-> {"CORPUS, KIND": {"METHOD, chain", "METHOD, tree", "METHOD, T=...": steps; "offset o":
    accuracy}}"""
    rows = {}
    for name, run in leap_runs(study, seed).items():
        model = load(run)
        text = study.text(run)
        rows[name] = drafting(model, text) | written_text(model, text, study.size.prompts)
    return rows


def time_steps(study):
    """Milliseconds of a step on one core, in turns, of heads on the model of Python: {"METHOD,
    KIND"}. Nothing may run beside. -> step_ms.json"""
    runs = leap_runs(study, study.size.seeds[0])
    decoders = {}
    for kind in KINDS:
        model = load(runs[f"python, {kind}"])
        for method, offsets in ({"NTP": (1,)} | METHODS).items():
            decoders[f"{method}, {kind}"] = Decoder(
                model, offsets, compile=can_compile(torch.device("cpu")))
    seconds = step_seconds(list(decoders.values()), rounds=15)
    write_results(study.folder / "step_ms.json",
                  {name: 1e3 * t for name, t in zip(decoders, seconds)})


# ---- 8: two stages ---------------------------------------------------------------------------

def stages_runs(study, seed):
    """L-MTP's two stages: heads alone, then everything at a hundredth of their rate with weight
    0.1 on the heads. Against one stage that is as gentle to the backbone, with as many steps of
    the heads; and the base, trained on without heads as the second stage does. Another seed: the
    second stage sees other batches."""
    lr = chosen(study, "residual", "frozen")
    n = study.size.joint_steps // 2
    gentle = dict(offsets="1,3,5,7", head_weight=0.1)
    first = head(study, seed, "stage-1", lr, backbone_lr=0, steps=n, offsets="1,3,5,7")
    return {"two stages": head(study, seed + 100, "stage-2", lr / 100, first, steps=n, **gentle),
            "one stage": head(study, seed, "one-stage", lr, steps=2 * n, backbone_lr=0.01,
                              **gentle),
            "no heads": head(study, seed, "no-stage", lr / 100, steps=n)}


def stages(study, seed):
    """-> {recipe: its next-token loss, and steps of leap on real text}"""
    rows = {}
    for name, run in stages_runs(study, seed).items():
        rows[name] = known(study, run)
        if name != "no heads":
            text = study.text(run)
            rows[name]["steps"] = text.by_file(chain_steps(load(run), text))
    return rows


# ---- 7: the theory, and what follows ---------------------------------------------------------

def tokens_per_step(m, row, measure, part="leap"):
    """Of real text, or of texts that were written (T=...)."""
    windows = m(part, row, "prompts") if "T=" in measure else 1
    return NEW * windows / m(part, row, measure)


def leap_gains(row, text):
    """The effect: tokens per step of leap over those of MTP, both with three heads."""
    return lambda m: tokens_per_step(m, row, f"leap, {text}") - tokens_per_step(
        m, row, f"MTP, {text}")


def expected(accuracy, offsets):
    """What the theory expects of accuracies {offset: number}: E = 1 + the sum over distances of the
    product of the accuracies up to there, as if drafts were right independently."""
    sources = draft_sources(offsets).values()
    total = run = 1
    for offset, _ in sources:
        run = run * accuracy[offset]
        total = total + run
    return total


def formula(g, method):
    """The same, if accuracy falls with the offset as exp(-g (o - 1)): g is the attenuation."""
    return expected({o: np.exp(-g * (o - 1)) for o in range(2, 8)}, METHODS[method])


GRID = np.linspace(0.01, 1.0, 991)
BREAK_EVEN = GRID[formula(GRID, "leap") > formula(GRID, "MTP")].max()  # of the formula


def attenuation(accuracies):
    """Accuracies (6, ...) of offsets 2..7 -> the g that gives their mean"""
    means = np.exp(-GRID[:, None] * np.arange(1, 7)).mean(1)
    return np.interp(-np.mean(accuracies, axis=0), -means, GRID)


def by_file(results, kind, seed=None):
    """-> {corpus: attenuation and leap's gain in tokens per step of each file with windows}"""
    found = {}
    for corpus, counts in results.counts.items():
        row = f"{corpus}, {kind}"
        some = counts > 0
        mean = {what: results.sums("leap", row, what, seed)[some] / counts[some]
                for what in ("leap, chain", "MTP, chain", *(f"offset {o}" for o in range(2, 8)))}
        g = attenuation([mean[f"offset {o}"] for o in range(2, 8)])
        found[corpus] = g, NEW / mean["leap, chain"] - NEW / mean["MTP, chain"]
    return found


def crossing(g, gain, weights):
    """Where a parabola in log g through the files (files,), with weights (..., files), crosses
    zero (...)."""
    powers = np.log(g) ** np.arange(3)[:, None]  # (3, files)
    square = np.einsum("...f,if,jf->...ij", weights, powers, powers)
    right = np.einsum("...f,if,f->...i", weights, powers, gain)
    a, b, c = np.moveaxis(np.linalg.solve(square, right[..., None])[..., 0], -1, 0)
    return np.exp((-b - np.sqrt(b * b - 4 * a * c)) / (2 * c))


def break_even(m):
    """The attenuation at which leap stops to win, with sequential heads, whose files lie on both
    sides. (The same fit to what the formula says of these files finds the formula's, 0.14.)"""
    found = by_file(m.results, "sequential", m.seed)
    g, gain = [np.concatenate(parts) for parts in zip(*found.values())]
    weights = []
    for corpus, counts in m.results.counts.items():
        drawn = np.ones_like(counts) if m.weights is None else m.weights[corpus]
        weights.append((drawn * counts)[..., counts > 0])
    return crossing(g, gain, np.concatenate(weights, axis=-1))


CLAIMS = [
    *[Claim(f"Leaping heads write more than as many adjacent ones: {row}", "tokens per step",
            leap_gains(row, "chain"))
      for row in ("python, independent", "python, sequential", "shakespeare, sequential",
                  "logs, independent", "logs, sequential")],
    Claim("... on text sampled at temperature 1: python, sequential", "tokens per step",
          leap_gains("python, sequential", "T=1")),
    *[Claim(f"... when trees of both verify 15 rows: {row}", "tokens per step",
            leap_gains(row, "tree")) for row in ("python, sequential", "logs, sequential")],
    Claim("Leap wins beyond the break-even of the formula", "attenuation",
          lambda m: break_even(m) - BREAK_EVEN),
    Claim("Two stages write more than one", "tokens per step",
          lambda m: tokens_per_step(m, "two stages", "steps", "stages")
          - tokens_per_step(m, "one stage", "steps", "stages")),
    Claim("L-MTP's fine-tuning makes the next-token model better", "nats",
          lambda m: m("stages", "no heads", "nats t+1") - m("stages", "two stages", "nats t+1")),
]
