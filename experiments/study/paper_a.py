"""Paper A, Mehra et al. 2025: what a next-token model knows about later tokens, and how heads get
at it. A part of the study trains its runs (PART_runs) and then measures them (PART).
"""
import json

import numpy as np
import torch
import torch.nn.functional as F

from experiments.study.lens import probes
from experiments.study.runs import CONTEXT, CORPORA, SELECT, chain_steps, load
from experiments.study.verdicts import Claim
from marginalize import look_ahead

SIZES = {"1x16": (1, 16), "2x32": (2, 32)}  # layers x width of smaller models
RATES = (3e-3, 1e-2, 3e-2)
RESIDUAL = dict(offsets="1,2")
LAYER = dict(offsets="1,2", head_kind="block")
HEADS = {"residual": RESIDUAL, "1 layer": LAYER}  # those whose rates are tuned
HALF = ", half"  # the name of a run that is half as long: what more steps would bring


# ---- What is measured ------------------------------------------------------------------------

def asked(study):
    """The positions, few because it is expensive, where a model is marginalised (P,)"""
    return torch.linspace(CONTEXT // 2, CONTEXT - 2, study.size.positions).long()


@torch.no_grad()
def next_tokens(study, model, text, offset=1):
    """What an offset of a model predicts in the second half of every window. -> {"t+1": how often
    it is right; "t+1, asked": at the positions `asked`; "nats t+1": its loss}, summed by file"""
    found = {}
    first = CONTEXT // 2
    for idx in text.windows.split(64):
        h = model.hidden_states(idx[:, :-1])
        logits = model.offset_logits(h, offset, idx.roll(1 - offset, dims=1)[:, :-1])
        logits = logits[:, first:CONTEXT + 1 - offset]  # (W, P, V)
        target = idx[:, first + offset:]
        nats = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")
        right = (logits.argmax(-1) == target).float()
        for name, values in ((f"t+{offset}", right), (f"nats t+{offset}", nats),
                             (f"t+{offset}, asked", right[:, asked(study) - first])):
            found.setdefault(name, []).append(values.mean(1))
    return {name: text.by_file(torch.cat(parts)) for name, parts in found.items()}


@torch.no_grad()
def marginal(study, model, text):
    """How often the token after next is right, marginalised with a beam of 32. -> {"marginal":
    summed by file}"""
    right = []
    for idx in text.windows.split(16):
        t = asked(study).expand(len(idx), -1)
        *_, (probs, _) = look_ahead(model.gpt, idx[:, :-1], t, 2, 32)
        right.append((probs.argmax(-1) == idx.gather(1, t + 2)).float().mean(1))
    return {"marginal": text.by_file(torch.cat(right))}


def back_off(corpus, text, at, longest=8):
    """The control: after the longest context, of up to 8 bytes, that stands in the training text,
    the token that most often stood one beyond the next. -> {"t+2, asked": at the positions
    `at`, summed by file}"""
    train = np.asarray(corpus.train).astype(np.uint64)
    windows = text.windows.numpy().astype(np.uint64)
    T = windows.shape[1]
    guess = np.full((len(windows), len(at)), -1)
    hashed = np.zeros(len(train), np.uint64)   # of the n tokens that end here
    asked = np.zeros(windows.shape, np.uint64)
    for n in range(1, longest + 1):
        factor = np.uint64(pow(6364136223846793005, n, 2 ** 64))
        hashed[n - 1:] += train[:len(train) - n + 1] * factor
        asked[:, n - 1:] += windows[:, :T - n + 1] * factor
        # Count (context, later token) pairs; sorted by count, the last of a context is the best.
        pair = hashed[longest:-2] >> np.uint64(9) << np.uint64(9) | train[longest + 2:]
        pair, count = np.unique(pair, return_counts=True)
        order = np.lexsort((count, pair >> np.uint64(9)))
        context = pair[order] >> np.uint64(9)
        best = pair[order] & np.uint64(511)
        i = np.searchsorted(context, asked[:, at] >> np.uint64(9), side="right") - 1
        found = (i >= 0) & (context[i] == asked[:, at] >> np.uint64(9))
        guess = np.where(found, best[i], guess)
    right = guess == windows[:, at + 2]
    return {"t+2, asked": text.by_file(torch.from_numpy(right.mean(1)))}


def known(study, run, offsets=(1,), marginalised=False):
    """Everything that is measured of a run."""
    model = load(run)
    text = study.text(run)
    found = {}
    for offset in offsets:
        found |= next_tokens(study, model, text, offset)
    if marginalised:
        found |= marginal(study, model, text)
    return found


# ---- 1: what a next-token model knows --------------------------------------------------------

def knows_runs(study, seed):
    """Next-token models of three corpora and three sizes; one of Python that trained as long as
    those of the other corpora; one trained for the token after next."""
    runs = {data: study.base(seed, data) for data in CORPORA}
    for name, (n, width) in SIZES.items():
        runs[name] = study.run(f"ntp-{name}", seed, n_layer=n, n_head=n, n_embd=width)
    runs["shorter"] = study.run("ntp-shorter", seed, steps=study.size.steps * 6 // 10)
    runs["direct"] = study.run("direct", seed, offsets="1,2", only=2)
    return runs


def knows(study, seed):
    """-> {run, or "table": what it knows}"""
    rows = {}
    for name, run in knows_runs(study, seed).items():
        rows[name] = known(study, run, (2,)) if name == "direct" else known(study, run, (1,), True)
    base = study.base(seed)
    return rows | {"table": back_off(study.corpus(base), study.text(base), asked(study).numpy())}


# ---- 2, 4: what a frozen model lets a head read ----------------------------------------------

def choose(study, kind, recipe):
    """The best learning rate of a kind of head, "frozen" or "joint", on the seed that selects."""
    def accuracy(lr):
        options = dict(recipe_options(study, recipe), **HEADS[kind])
        run = head(study, SELECT, f"{kind}-{recipe}", lr, **options)
        return sum(known(study, run, (2,))["t+2"])
    best = max(RATES, key=accuracy)
    chosen_file(study, kind, recipe).write_text(json.dumps(best))


def chosen_file(study, kind, recipe):
    """Where that rate is kept."""
    return study.folder / f"chosen-{kind}-{recipe}.json".replace(" ", "-")


def chosen(study, kind, recipe):
    """What `choose` chose."""
    return json.loads(chosen_file(study, kind, recipe).read_text())


def recipe_options(study, recipe):
    """Heads on a frozen model, or trained with it, which is a tenth as fast."""
    if recipe == "frozen":
        return dict(backbone_lr=0, steps=study.size.head_steps)
    return dict(backbone_lr=0.1, steps=study.size.joint_steps)


def head(study, seed, name, lr, base=None, **options):
    """A run that adds heads to the base."""
    label = name.replace(", ", "-").replace(" ", "-")
    return study.run(f"{label}-{lr:g}", seed, base or study.base(seed), lr=lr, **options)


def heads(study, seed, recipe, kinds):
    """A run for each kind of head {name: options}."""
    runs = {}
    for name, options in kinds.items():
        rate = chosen(study, "1 layer" if "head_kind" in options else "residual", recipe)
        options = recipe_options(study, recipe) | options
        runs[name] = head(study, seed, f"{name}-{recipe}", rate, **options)
    return runs


def and_half(kinds, steps):
    """These kinds of heads, and each of them trained half as long."""
    return kinds | {name + HALF: options | dict(steps=steps // 2)
                    for name, options in kinds.items()}


def frozen_runs(study, seed):
    """Heads for t+2 on a frozen model. Those "from layer l" read that layer by as many new layers
    as make five with it; from layer 0, the embeddings, by four."""
    kinds = {"residual": RESIDUAL, "sequential": RESIDUAL | dict(sequential=True),
             "1 layer": LAYER, "2 layers": LAYER | dict(head_layers=2),
             "4 layers": LAYER | dict(head_layers=4)}
    runs = heads(study, seed, "frozen", and_half(kinds, study.size.head_steps)
                 | {"residual, WHS": RESIDUAL | dict(whs=True)})
    rate = chosen(study, "1 layer", "frozen")
    for layer in range(4):
        lower = study.first_layers(study.base(seed), layer)
        options = recipe_options(study, "frozen") | LAYER | dict(head_layers=min(4, 5 - layer))
        runs[f"from layer {layer}"] = head(study, seed, f"from-{layer}-frozen", rate, lower,
                                           **options)
    return runs


def frozen(study, seed):
    """-> {head, or "base": what it knows; "layer l": what can be read of it without new layers}"""
    base = study.base(seed)
    rows = {"base": known(study, base, (1,), True)}
    for name, run in frozen_runs(study, seed).items():
        rows[name] = known(study, run, (2,))
    n = study.size.head_steps
    return rows | probes(study, base, seed, n) | probes(study, base, seed, n // 2, HALF)


# ---- 3: joint training -----------------------------------------------------------------------

def joint_runs(study, seed):
    """Heads and backbone trained together, in several ways, about as long as frozen ones."""
    n = study.size.joint_steps
    kinds = {"no head": dict(offsets="1"), "residual": RESIDUAL, "1 layer": LAYER}
    return heads(study, seed, "joint", and_half(kinds, n) | {
        "residual, WHS": RESIDUAL | dict(whs=True), "1 layer, WHS": LAYER | dict(whs=True),
        "residual, equal rates": RESIDUAL | dict(backbone_lr=1),
        "residual, weight 0.3": RESIDUAL | dict(head_weight=0.3),
        "residual, warm-up": RESIDUAL | dict(head_warmup=n // 4)})


def joint(study, seed):
    """-> {recipe: what it knows}"""
    return {name: known(study, run, (1,) if name.startswith("no head") else (1, 2), True)
            for name, run in joint_runs(study, seed).items()}


# ---- 5: from scratch -------------------------------------------------------------------------

OFFSETS = {"MTP": "1,2,3,4", "leap": "1,3,5,7"}
LONGER = 1.25  # of NTP: a step of MTP takes 1.2 of its steps


def scratch_runs(study, seed):
    """Models with three heads from scratch; next-token models of as many steps, and of as much
    time."""
    runs = {"NTP": study.base(seed),
            "NTP, longer": study.run("ntp-longer", seed, steps=int(LONGER * study.size.steps))}
    for method, offsets in OFFSETS.items():
        runs[method] = study.run(f"scratch-{method}", seed, offsets=offsets)
        runs[f"{method}, sequential"] = study.run(f"scratch-{method}-sequential", seed,
                                                  offsets=offsets, sequential=True)
    return runs


def scratch(study, seed):
    """-> {method: what it knows, and its steps through real text}"""
    rows = {}
    for name, run in scratch_runs(study, seed).items():
        rows[name] = known(study, run, (1, 2) if name.startswith("MTP") else (1,), True)
        if not name.startswith("NTP"):
            text = study.text(run)
            rows[name]["steps"] = text.by_file(chain_steps(load(run), text))
    return rows


# ---- What follows ----------------------------------------------------------------------------

def more(a, b, scale=100):
    """The effect a - b, each (part, row, measure)."""
    return lambda m: scale * (m(*a) - m(*b))


def retention(m, row):
    """How much of what is known about the next token is known about the one after it."""
    return m("knows", row, "marginal") / m("knows", row, "t+1, asked")


def keeps(row, other):
    """The effect: points of retention more."""
    return lambda m: 100 * (retention(m, row) - retention(m, other))


def gap(part, row, model, what="t+2, asked"):
    """The effect: how far a head stays below a model's marginalisation."""
    return more((*model, "marginal"), (part, row, what))


def narrower(row, frozen):
    """The effect: how much closer to marginalisation, of the model trained on without a head, a
    head is that trained jointly, than one on the frozen model is to that model's."""
    before = gap("frozen", frozen, BASE)
    after = gap("joint", row, ("joint", "no head"))
    return lambda m: before(m) - after(m)


def lower_layer(m):
    """The best of the layers below the last, on the seed that selects."""
    results = m.results
    return max(("from layer 1", "from layer 2", "from layer 3"),
               key=lambda row: sum(results.sums("frozen", row, "t+2", results.select)))


BASE = "frozen", "base"
NATS = "nats t+1"
CLAIMS = [
    Claim("A next-token model knows the token after next better than a model trained for it",
          "points", gap("knows", "direct", ("knows", "python"))),
    Claim("... better than a table of counts", "points",
          gap("knows", "table", ("knows", "python"))),
    Claim("A larger model keeps a larger part of what it knows", "points",
          keeps("python", "1x16")),
    Claim("... a model of logs than one of Python", "points", keeps("logs", "shorter")),
    Claim("... a model of Python than one of Shakespeare", "points",
          keeps("shorter", "shakespeare")),
    Claim("A residual head on a frozen model reads less than marginalisation", "points",
          gap("frozen", "residual", BASE)),
    Claim("... a head of one layer", "points", gap("frozen", "1 layer", BASE)),
    Claim("... a head of four layers", "points", gap("frozen", "4 layers", BASE)),
    Claim("... and what that reads comes from the model, not from the text alone", "points",
          more(("frozen", "4 layers", "t+2"), ("frozen", "from layer 0", "t+2"))),
    Claim("A lower layer is better to read, by as many new layers as make five", "points",
          lambda m: 100 * (m("frozen", lower_layer(m), "t+2") - m("frozen", "1 layer", "t+2"))),
    Claim("... the third than the last, by two new layers", "points",
          more(("frozen", "from layer 3", "t+2"), ("frozen", "2 layers", "t+2"))),
    Claim("Weighted hidden states help a residual head on a frozen model of four layers", "points",
          more(("frozen", "residual, WHS", "t+2"), ("frozen", "residual", "t+2"))),
    Claim("Joint training narrows a residual head's gap to marginalisation", "points",
          narrower("residual", "residual")),
    Claim("... that of a head of one layer", "points", narrower("1 layer", "1 layer")),
    Claim("Weighted hidden states help a residual head in joint training", "points",
          more(("joint", "residual, WHS", "t+2"), ("joint", "residual", "t+2"))),
    Claim("Head warm-up helps joint training", "points",
          more(("joint", "residual, warm-up", "t+2"), ("joint", "residual", "t+2"))),
    Claim("A backbone ten times slower than the heads spares the next-token model", "nats",
          more(("joint", "residual, equal rates", NATS), ("joint", "residual", NATS), 1)),
    Claim("From scratch, three adjacent heads make the next-token model better", "nats",
          more(("scratch", "NTP", NATS), ("scratch", "MTP", NATS), 1)),
    Claim("... three leaping heads", "nats",
          more(("scratch", "NTP", NATS), ("scratch", "leap", NATS), 1)),
    Claim("... sequential heads rather than independent ones", "nats",
          more(("scratch", "MTP", NATS), ("scratch", "MTP, sequential", NATS), 1)),
    Claim("From scratch, a residual head reads less than its own model's marginalisation",
          "points", gap("scratch", "MTP", ("scratch", "MTP"))),
]
