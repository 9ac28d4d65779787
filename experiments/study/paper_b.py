"""Paper B, L-MTP (Liu et al. 2025): leaping heads against adjacent ones, and training in stages."""
import torch

from decode import Decoder
from experiments.study.paper_a import chosen, head, known
from experiments.study.runs import CONTEXT, CORPORA, load
from experiments.trees import Node, draft_ranks, grow, simulate, step_begins
from heads import draft_sources

METHODS = {"MTP": (1, 2, 3, 4), "leap": (1, 3, 5, 7), "all": (1, 2, 3, 4, 5, 6, 7)}
KINDS = {"independent": {}, "sequential": dict(sequential=True)}
NODES = 14       # of a tree
PROMPT = 16      # tokens of a window that are given,
NEW = CONTEXT - PROMPT  # and that are written
TEMPERATURES = (0.0, 0.5, 1.0)


# ---- 6: leap against MTP ---------------------------------------------------------------------

def leap_runs(study, seed):
    """Heads for offsets 1..7 on the frozen next-token model of every corpus."""
    lr = chosen(study, "residual", "frozen")
    return {f"{data}, {kind}": head(
        study, seed, f"heads7-{data}-{kind}", lr, study.base(seed, data), data=data,
        offsets="1,2,3,4,5,6,7", backbone_lr=0, steps=study.size.head_steps, **options)
        for data in CORPORA for kind, options in KINDS.items()}


def chain(offsets):
    """The tree without branches that these offsets draft."""
    return [Node(i, o, b) for i, (o, b) in enumerate(draft_sources(offsets).values())]


def steps_of(tree, ranks):
    """In how many steps real text is written by a tree (n,)"""
    return step_begins(simulate(tree, ranks)[1], PROMPT - 1).sum(1)


def real_text(text, ranks):
    """-> {"METHOD, chain" and "METHOD, tree": steps, by file}. The tree that writes one half of the
    files is grown on the other half."""
    found = {}
    half = text.files % 2
    for method, offsets in METHODS.items():
        own = {source: r for source, r in ranks.items() if source[0] in offsets}
        found[f"{method}, chain"] = text.by_file(steps_of(chain(offsets), own))
        steps = torch.zeros(len(half))
        for side in (0, 1):
            there, here = [{s: r[half == h] for s, r in own.items()} for h in (1 - side, side)]
            tree, _ = grow(there, NODES, PROMPT - 1)
            steps[half == side] = steps_of(tree, here).float()
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
    found = real_text(text, ranks)
    return found | {o: text.by_file(a) for o, a in accuracies(ranks).items()}


def leap(study, seed):
    """-> {"CORPUS, KIND": {"METHOD, chain", "METHOD, tree", "METHOD, T=...": steps; "offset o":
    accuracy}}"""
    rows = {}
    for name, run in leap_runs(study, seed).items():
        model, text = load(run), study.text(run)
        rows[name] = drafting(model, text) | written_text(model, text, study.size.prompts)
    return rows


# ---- 8: two stages ---------------------------------------------------------------------------

def stages_runs(study, seed):
    """L-MTP's two stages: heads alone, then everything at a hundredth of their rate with weight
    0.1 on the heads. Against one stage that is as gentle to the backbone, with as many steps of
    the heads; and the base, trained on without heads as the second stage does."""
    lr = chosen(study, "residual", "frozen")
    n = study.size.joint_steps // 2
    gentle = dict(offsets="1,3,5,7", head_weight=0.1)
    first = head(study, seed, "stage-1", lr, backbone_lr=0, steps=n, offsets="1,3,5,7")
    return {"two stages": head(study, seed, "stage-2", lr / 100, first, steps=n, **gentle),
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
            ranks = draft_ranks(load(run), text.windows[:, :-1])
            steps = steps_of(chain(METHODS["leap"]), ranks)
            rows[name]["leap, chain"] = text.by_file(steps)
    return rows
