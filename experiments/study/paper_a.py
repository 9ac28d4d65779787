"""Paper A, Mehra et al. 2025: what a next-token model knows about later tokens, and how heads get
at it. A part of the study is a function that trains its runs and says what to measure of them:
-> {row: (run, measures)}. A measure is a function of a model and a text, -> {name: sums by file}
"""
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from experiments.study.lens import probes
from experiments.study.runs import CONTEXT, CORPORA, SELECT, chain_steps
from marginalize import look_ahead

RATES = (3e-3, 1e-2, 3e-2)
RESIDUAL = dict(offsets="1,2")
LAYER = dict(offsets="1,2", head_kind="block")
HEADS = {"residual": RESIDUAL, "1 layer": LAYER}  # those whose rates are tuned
HALF = ", half"  # the name of a run that is half as long: what more steps would bring

# The positions where a model is marginalised: few, because it is expensive.
ASKED = torch.linspace(CONTEXT // 2, CONTEXT - 2, 8).long()


# ---- Measures --------------------------------------------------------------------------------

@torch.no_grad()
def predicted(model, text, offset):
    """What an offset predicts in the second half of every window: how often it is right, also at
    the positions ASKED alone, and its loss."""
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
                             (f"t+{offset}, asked", right[:, ASKED - first])):
            found.setdefault(name, []).append(values.mean(1))
    return {name: text.by_file(torch.cat(parts)) for name, parts in found.items()}


next_token = partial(predicted, offset=1)
token_after = partial(predicted, offset=2)


@torch.no_grad()
def marginal(model, text):
    """How often the token after next is right, marginalised with a beam of 32."""
    right = []
    for idx in text.windows.split(16):
        t = ASKED.expand(len(idx), -1)
        *_, (probs, _) = look_ahead(model.gpt, idx[:, :-1], t, 2, 32)
        right.append((probs.argmax(-1) == idx.gather(1, t + 2)).float().mean(1))
    return {"marginal": text.by_file(torch.cat(right))}


def back_off(model, text, at=ASKED.numpy(), longest=8):
    """The control, without the model: after the longest context, of up to 8 bytes, that stands in
    the training text, the token that most often stood one beyond the next."""
    train = np.asarray(text.corpus.train).astype(np.uint64)
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


def real_steps(model, text):
    """The steps in which the model's heads write real text."""
    return {"steps": text.by_file(chain_steps(model, text))}


# ---- 1: what a next-token model knows --------------------------------------------------------

def token_after_alone(args, offsets, step):
    """A recipe for train.py: everything trains, for offset 2 alone."""
    return {1: 0.0, 2: 1.0}, 1.0


def knows(study, seed):
    """Next-token models of three corpora and three sizes; one of Python that trained as long as
    those of the other corpora; one trained for the token after next; a table of counts."""
    models = {corpus: study.base(seed, corpus) for corpus in CORPORA}
    for n, width in ((1, 16), (2, 32)):
        name = f"{n}x{width}"
        models[name] = study.run(f"ntp-{name}", seed, n_layer=n, n_head=n, n_embd=width)
    models["shorter"] = study.run("ntp-shorter", seed, steps=study.size.steps * 6 // 10)
    rows = {name: (run, [next_token, marginal]) for name, run in models.items()}
    direct = study.run("direct", seed, offsets="1,2", recipe=token_after_alone)
    return rows | {"direct": (direct, [token_after]), "table": (models["python"], [back_off])}


# ---- 2, 4: what a frozen model lets a head read ----------------------------------------------

def head(study, seed, name, recipe, rate, options):
    """Heads on a frozen model, or trained with it, which is a tenth as fast. -> a run"""
    usual = dict(init=study.base(seed), lr=rate, backbone_lr=0)
    if recipe == "joint":
        usual |= dict(backbone_lr=0.1, steps=study.size.joint_steps)
    return study.run(f"{name}-{recipe}-{rate:g}", seed, **usual | options)


def chosen(study, kind, recipe):
    """The best learning rate of a kind of head, "frozen" or "joint", on the seed that selects."""
    runs = {rate: head(study, SELECT, kind, recipe, rate, HEADS[kind]) for rate in RATES}

    def best():
        return max(RATES, key=lambda rate: sum(study.measure(runs[rate], [token_after])["t+2"]))
    return study.keep(f"chosen-{kind}-{recipe}", best, *runs.values())


def heads(study, seed, recipe, kinds):
    """A run for each kind of head {name: options}."""
    runs = {}
    for name, options in kinds.items():
        kind = "1 layer" if "head_kind" in options else "residual"
        runs[name] = head(study, seed, name, recipe, chosen(study, kind, recipe), options)
    return runs


def and_half(kinds, steps):
    """These kinds of heads, and each of them trained half as long."""
    return kinds | {name + HALF: options | dict(steps=steps // 2)
                    for name, options in kinds.items()}


def frozen(study, seed):
    """Heads for t+2 on a frozen model. Those "from layer l" read that layer by as many new layers
    as make five with it; from layer 0, the embeddings, by four. And what can be read of a layer
    without new ones."""
    base = study.base(seed)
    n = study.size.head_steps
    kinds = and_half({
        "residual": RESIDUAL, "sequential": RESIDUAL | dict(sequential=True), "1 layer": LAYER,
        "2 layers": LAYER | dict(head_layers=2), "4 layers": LAYER | dict(head_layers=4)}, n)
    kinds["residual, WHS"] = RESIDUAL | dict(whs=True)
    for layer in range(4):
        kinds[f"from layer {layer}"] = LAYER | dict(
            init=study.first_layers(base, layer), head_layers=min(4, 5 - layer))
    rows = {"base": (base, [next_token, marginal])}
    for name, run in heads(study, seed, "frozen", kinds).items():
        rows[name] = (run, [token_after])
    rows["layers"] = (base, [partial(probes, steps=n, seed=seed),
                             partial(probes, steps=n // 2, seed=seed, suffix=HALF)])
    return rows


# ---- 3: joint training -----------------------------------------------------------------------

def joint(study, seed):
    """Heads and backbone trained together, in several ways, about as long as frozen ones."""
    n = study.size.joint_steps
    kinds = {"no head": dict(offsets="1"), "residual": RESIDUAL, "1 layer": LAYER}
    kinds = and_half(kinds, n) | {
        "residual, WHS": RESIDUAL | dict(whs=True),
        "1 layer, WHS": LAYER | dict(whs=True),
        "residual, equal rates": RESIDUAL | dict(backbone_lr=1),
        "residual, weight 0.3": RESIDUAL | dict(head_weight=0.3),
        "residual, warm-up": RESIDUAL | dict(head_warmup=n // 4)}
    rows = {}
    for name, run in heads(study, seed, "joint", kinds).items():
        of_head = [] if name.startswith("no head") else [token_after]
        rows[name] = (run, [next_token, *of_head, marginal])
    return rows


# ---- 5: from scratch -------------------------------------------------------------------------

def scratch(study, seed):
    """Models with three heads from scratch; next-token models of as many steps, and of as much
    time, because a step of MTP takes 1.2 times as long."""
    longer = study.run("ntp-longer", seed, steps=study.size.steps * 5 // 4)
    rows = {"NTP": (study.base(seed), [next_token, marginal]),
            "NTP, longer": (longer, [next_token, marginal])}
    for method, offsets in {"MTP": "1,2,3,4", "leap": "1,3,5,7"}.items():
        measures = [next_token, marginal, real_steps]
        if method == "MTP":
            measures.append(token_after)
        for name, sequential in {method: False, f"{method}, sequential": True}.items():
            run = study.run(f"scratch-{name}", seed, offsets=offsets, sequential=sequential)
            rows[name] = (run, measures)
    return rows
