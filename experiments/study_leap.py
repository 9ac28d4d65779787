"""Paper B: when does leaping win? And what do L-MTP's two stages do to the next-token model?

Trained: on each of two corpora, Python source and logs of fixed keys, a next-token model, and on
the frozen model residual heads for offsets 1..7. All methods use the same backbone and heads: MTP4
is offsets 1,2,3,4, leap 1,3,5,7, MTP7 all of them.
Measured, per held-out window: how often each offset is right, how many steps each method takes
through the text, and through text sampled from the model.
"""
import torch

from decode import Decoder, chain
from experiments.calibrate import accepted_depths, draft_hits, simulate_steps
from experiments.own_text import write_own_text
from experiments.study_runs import flops, foresee, newer
from heads import draft_sources

METHODS = {"MTP4": (1, 2, 3, 4), "leap": (1, 3, 5, 7), "MTP7": (1, 2, 3, 4, 5, 6, 7)}
LEAP = "1,3,5,7"


def leap(study, seed):
    """-> {"python", "logs": drafting of heads on a frozen backbone}"""
    rows = {}
    for data in ("python", "logs"):
        base = study.base(seed, data, steps=study.size.steps // (2 if data == "logs" else 1))
        heads = study.run(f"heads7-{data}", seed, base, data, offsets="1,2,3,4,5,6,7",
                          backbone_lr=0, lr=study.size.rates[-1])
        rows[data] = study.measured(heads, drafting, data=data)
    return rows


@torch.no_grad()
def drafting(study, run, data, methods="MTP4,leap,MTP7"):
    """What a run's heads draft on held-out windows of a corpus. -> {what: a number per window}

    "offset o": fraction of its drafts that are right. For each method, of a decoder that follows
    the window: "METHOD, steps" and "METHOD, tokens"; "METHOD, accepted": how many drafts would be
    at each position, the mean over all. "METHOD, sampled": steps to write each of 64 texts."""
    model, corpus = study.load(run, data)
    T = model.gpt.config.block_size
    trees = {name: chain(draft_sources(METHODS[name])) for name in methods.split(",")}
    own = [(o, 0) for o in model.offsets[1:]]
    sources = dict.fromkeys([*own, *(node[1:3] for tree in trees.values() for node in tree)])
    windows = corpus.windows("val", study.size.windows, T + 1)
    hits = draft_hits(model, windows, list(sources))  # {(o, b, 0): (W, n)}
    found = {f"offset {o}": hits[o, 0, 0].float().mean(1).tolist() for o, _ in own}
    prompts = corpus.windows("val", 64, 16).tolist()
    for name, tree in trees.items():
        accepted = accepted_depths(tree, hits)  # (W, n)
        steps = [simulate_steps(row[None]) for row in accepted]
        found[f"{name}, steps"] = [len(row) for row in steps]
        found[f"{name}, tokens"] = [len(row) + sum(row) for row in steps]
        found[f"{name}, accepted"] = accepted.float().mean(1).tolist()
        g = Decoder(model, tree=tree, temperature=1.0).generate(prompts, T - 16)
        found[f"{name}, sampled"] = [row.count(0) + (row[-1] != 0) for row in g.nodes]
    return {what: [round(x, 4) for x in values] for what, values in found.items()}


def stages(study, seed):
    """L-MTP's two stages: heads alone on text that the base wrote, about an epoch, then everything
    on the corpus at a hundredth of the rate, with weight 0.1 on the heads. Against the first stage
    on the corpus, too, against one stage as gentle to the backbone, with as much training, and the
    base trained on without heads. -> {row: drafting of leap, and foresee}"""
    size, shape = study.size, study.size.base
    rate, base, own = size.rates[-1], study.base(seed), study.folder / f"own-s{seed}"
    if not newer(own / "meta.json", [base / "checkpoint.pt"]):
        write_own_text(*study.load(base), own, 1000 * size.adapt, batch_size=128, seed=seed,
                       progress=False)
    joint, alone = flops(shape, residual=3), flops(shape, residual=3, frozen=True)
    one = study.run("one-stage", seed, base, offsets=LEAP, lr=rate, backbone_lr=0.01,
                    head_weight=0.1, steps=size.adapt + round(size.adapt * alone / joint))
    runs = {"one stage": one}
    for label, name, data in (("", "", own), (" on the corpus", "-corpus", "python")):
        first = study.run(f"stage1{name}", seed, base, data, offsets=LEAP, backbone_lr=0, lr=rate)
        second = study.run(f"stage2{name}", seed, first, offsets=LEAP, lr=rate / 100,
                           head_weight=0.1)
        runs |= {f"first stage{label}": first, f"two stages{label}": second}
    control = study.run("trained-on-gently", seed, base, lr=rate / 100)
    rows = {"base": study.measured(base, foresee), "trained on": study.measured(control, foresee)}
    for label, run in runs.items():
        rows[label] = (study.measured(run, drafting, data="python", methods="leap")
                       | study.measured(run, foresee, data="python"))
    return rows
