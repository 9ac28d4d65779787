"""What each layer of a frozen model says by itself: the logit lens and affine probes.

The lens applies the model's own final norm and unembedding to a lower layer's hidden states, as if
the layers after it did nothing. A probe is an affine map from those hidden states to the logits,
trained for one offset: what it cannot read is not there in a form that a linear map finds.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from experiments.study.runs import CONTEXT

OFFSETS = (1, 2)  # of probes


@torch.no_grad()
def layers(model, idx):
    """(B, T) int64 -> (L + 1, B, T, C): embeddings and layers, after the final norm"""
    stream = model.gpt.residual_stream(idx)
    return torch.stack([model.gpt.transformer.ln_f(x) for x in stream])


@torch.enable_grad()
def train_probes(model, corpus, steps, seed):
    """-> {offset: (weight (L + 1, V, C), bias (L + 1, 1, V))} of probes of every layer"""
    config = model.gpt.config
    L = config.n_layer + 1
    probes = {o: (nn.Parameter(model.gpt.lm_head.weight.detach().repeat(L, 1, 1)),
                  nn.Parameter(torch.zeros(L, 1, config.vocab_size))) for o in OFFSETS}
    optimizer = torch.optim.AdamW([p for pair in probes.values() for p in pair], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        idx = corpus.batch("train", 8, CONTEXT + max(OFFSETS), step, seed)
        h = layers(model, idx[:, :CONTEXT]).flatten(1, 2)  # (L + 1, n, C)
        loss = 0
        for o, (weight, bias) in probes.items():
            logits = torch.baddbmm(bias, h, weight.mT)  # (L + 1, n, V)
            target = idx[:, o:o + CONTEXT].flatten().expand(L, -1)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), target.flatten()) * L
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return probes


@torch.no_grad()
def probes(model, text, steps, seed, suffix=""):
    """-> {"layer l" + suffix: {"lens t+1", "probe t+1", "probe t+2": how often right, by file}}"""
    trained = train_probes(model, text.corpus, steps, seed)
    half = CONTEXT // 2
    rows = {}
    for idx in text.windows.split(64):
        for layer, x in enumerate(layers(model, idx[:, :-1])):  # (B, T, C)
            said = [("lens t+1", 1, model.gpt.lm_head(x))]
            for o, (weight, bias) in trained.items():
                said.append((f"probe t+{o}", o, x @ weight[layer].T + bias[layer]))
            row = rows.setdefault(f"layer {layer}{suffix}", {})
            for name, o, logits in said:
                right = logits[:, half:CONTEXT + 1 - o].argmax(-1) == idx[:, half + o:]
                row.setdefault(name, []).append(right.float().mean(1))
    for row in rows.values():
        for name, parts in row.items():
            row[name] = text.by_file(torch.cat(parts))
    return rows
