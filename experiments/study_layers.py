"""Paper A: heads on a frozen backbone, and which layer they should read.

Trained: heads for t+2, of one or more transformer layers, on a frozen next-token model; on the
seed that selects also for half as long, which shows whether they still improve. And such heads of
one layer that read layer 1, 2, ... or the last: a weighted sum of the layers whose weights are
fixed at one.
Measured: accuracy at t+2 of the heads, and of the same backbone, marginalised. If hidden states
specialise for the next token, then a head for t+2 reads best below the last layer.

How deep the best heads are, and which layer, is chosen on one seed and judged on the others.
"""
import torch

from common import save_checkpoint
from experiments.study_runs import SELECT, foresee, newer
from heads import HeadsConfig, MultiTokenGPT

HEADS = dict(offsets="1,2", head_kind="block", backbone_lr=0)


def frozen(study, seed):
    """-> {"backbone": foresee of it, "DEPTH layers, STEPS steps": foresee of its heads}"""
    base = study.base(seed)
    rows, whole = {"backbone": study.measured(base, foresee)}, study.size.frozen_steps
    for depth in study.size.depths:
        for steps in (whole // 2, whole) if seed == SELECT else (whole,):
            run = study.run(f"frozen-{depth}-{steps}", seed, base, lr=study.size.rates[-1],
                            head_layers=depth, steps=steps, **HEADS)
            rows[f"{depth} layers, {steps} steps"] = study.measured(run, foresee, marginal=False)
    return rows


def layers(study, seed):
    """-> {"LxC, backbone": foresee of it, "LxC, layer l": ... of a head that reads layer l}, also
    for a deep model"""
    rows = {}
    for shape in filter(None, (study.size.base, study.size.deep)):
        if shape == study.size.deep and seed not in (SELECT, *study.size.seeds[:3]):
            continue
        name, L = f"{shape.n_layer}x{shape.n_embd}", shape.n_layer
        steps = study.size.steps if shape == study.size.base else study.size.deep_steps
        base = study.base(seed, shape=shape, steps=steps)
        rows[f"{name}, backbone"] = study.measured(base, foresee)
        for layer in range(1, L + 1) if L < 8 else (L // 3, 2 * L // 3, L - 1, L):
            start = reading(study, base, layer, seed)
            run = study.run(f"reads-{name}-{layer}", seed, start, shape=shape, whs=True,
                            lr=study.size.rates[-1], **HEADS)
            rows[f"{name}, layer {layer}"] = study.measured(run, foresee, marginal=False)
    return rows


def reading(study, base, layer, seed):
    """A model to start from: the backbone `base` and a new head for t+2 that reads `layer` alone.
    The logits of the mixture are so far apart that no gradient moves them. -> its folder"""
    folder = base.with_name(f"{base.name}-layer{layer}")
    if not newer(folder / "checkpoint.pt", [base / "checkpoint.pt"]):
        base_model, corpus = study.load(base)
        torch.manual_seed(seed)
        model = MultiTokenGPT(base_model.gpt, HeadsConfig((1, 2), "block", whs=True))
        with torch.no_grad():
            model.heads["2"].mix.fill_(-100.0)[layer - 1] = 100.0
        folder.mkdir(exist_ok=True)
        save_checkpoint(folder / "checkpoint.pt", model, tokenizer="bytes",
                        args=dict(data=str(corpus.folder)))
    return folder
