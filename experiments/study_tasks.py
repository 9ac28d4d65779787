"""Tasks made for a question: planning (paper B), and induction (MTP and small models).

Planning asks for running parities in reverse: x_1 .. x_n = y_n .. y_1, with y_i = x_1 + ... + x_i
modulo 2 (after arXiv 2403.06963). All answers but the first follow from a neighbour; y_n takes all
of x. At "=", offset o is asked for a parity of n - o + 1 bits, which is easier, and a step on the
way. Offset 7 of leap needs n - 6 bits and offset 4, the last of MTP, n - 3. So leap should
separate from MTP where n - 3 bits are hard.

Induction asks for names of two random tokens in stories: when a name returns, its first token
tells the second to whoever looks back (Gloeckle et al. 2024, section 4.1).

Trained: a small GPT on fresh samples, until it is right 90% of the time or patience ends.
Measured: the steps that it took.
"""
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import torch

import train
from experiments.study_runs import Shape, flops, kept
from heads import HeadsConfig, MultiTokenGPT
from model import GPT, GPTConfig

PLANNER, PLANNERS = Shape(3, 4, 64), {"NTP": "1", "MTP": "1,2,3,4", "leap": "1,3,5,7"}
READER = Shape(2, 4, 64)
READERS = {"NTP": ["1"], "two tokens": ["1,2"], "two tokens, forward": ["1,2", "forward"]}
NAMES, WORDS, CAST, SENTENCES = 32, 16, 4, 16
STORY = dict(context=3 * SENTENCES, vocab_size=NAMES + WORDS)
READER_COST = flops(READER, residual=1, **STORY) / flops(READER, **STORY)
EVERY = 25  # steps between questions
CURRICULUM = 400  # steps; from the half of them on, "forward" trains the second token


def parities(n, batch_size, generator):
    """The planning task -> tokens (B, 2n + 1), bits and 2 for "="; where y_n stands (bool)."""
    x = torch.randint(2, (batch_size, n), generator=generator)
    equals = torch.full((batch_size, 1), 2)
    tokens = torch.cat([x, equals, (x.cumsum(1) % 2).flip(1)], dim=1)
    return tokens, (torch.arange(2 * n + 1) == n + 1).expand_as(tokens)


def stories(batch_size, generator):
    """The induction task -> tokens (B, 3 * SENTENCES), and where (bool) the second token of a name
    stands that was there before. A sentence is the name of one of CAST persons, and a word."""
    B, S = batch_size, SENTENCES
    first = torch.rand(B, NAMES, generator=generator).argsort(1)[:, :CAST]  # no two the same
    second = torch.randint(NAMES, (B, CAST), generator=generator)
    who = torch.randint(CAST, (B, S), generator=generator)
    word = NAMES + torch.randint(WORDS, (B, S), generator=generator)
    tokens = torch.stack([first.gather(1, who), second.gather(1, who), word], dim=2)  # (B, S, 3)
    asked = torch.zeros(B, S, 3, dtype=torch.bool)
    asked[:, :, 1] = (who[:, :, None] == who[:, None]).tril(-1).any(2)
    return tokens.flatten(1), asked.flatten(1)


def planning(study, seed):
    """-> {"N bits, METHOD": what `learn` found}; NTP, which hardly learns, for the fewest. "N
    bits again": the most bits with another seed, to judge what the first seeds made us expect."""
    rows, bits = {}, study.size.bits
    asked = [(n, label, seed) for n in bits for label in PLANNERS
             if label != "NTP" or n == min(bits)]
    asked += [(max(bits), label, seed + len(study.size.seeds)) for label in ("MTP", "leap")]
    for n, label, s in asked:
        rows[f"{n} bits{' again' * (s != seed)}, {label}"] = kept(
            study.folder / f"planning-{n}-{label}-s{s}.json", (),
            lambda: learn(study, partial(parities, n), PLANNER, s, 3, 128, PLANNERS[label]))
    return rows


def induction(study, seed):
    """-> {METHOD: what `learn` found}"""
    vocab_size = STORY["vocab_size"]
    return {label: kept(study.folder / f"induction-{label.replace(' ', '-')}-s{seed}.json", (),
                        lambda: learn(study, stories, READER, seed, vocab_size, 64, *how))
            for label, how in READERS.items()}


def learn(study, samples, shape, seed, vocab_size, batch_size, offsets, curriculum="none"):
    """Train on samples(batch_size, generator) -> tokens (B, L), asked (B, L) bool: where they are
    to be right. -> dict(steps: until 90% are right, or patience; curve: accuracy on the way)"""
    tokens, asked = samples(512, torch.Generator().manual_seed(10**6))
    drawn = torch.Generator().manual_seed(seed)
    corpus = SimpleNamespace(batch=lambda *_: samples(batch_size, drawn)[0])
    args = train.parse_args([
        "--offsets", offsets, "--curriculum", curriculum, "--steps", str(CURRICULUM),
        "--lr", "2e-3", "--final-lr", "1",  # constant: patience must not change how a model learns
        "--dtype", "float32", "--device", "cpu", "--seed", str(seed)])
    train.check_args(args)
    torch.manual_seed(seed)
    config = GPTConfig(tokens.shape[1] - 1, vocab_size, *shape)
    model = MultiTokenGPT(GPT(config), HeadsConfig(args.offsets))
    optimizers = train.make_optimizers(model, args.optimizer, args.lr, args.weight_decay)
    curve = []
    for step in range(study.size.patience):
        train.compute_gradients(model, optimizers, corpus, step, args, nullcontext)
        for optimizer in optimizers:
            optimizer.step()
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                predicted = model.gpt(tokens[:, :-1])[0].argmax(-1)
            curve.append((predicted == tokens[:, 1:])[asked[:, 1:]].float().mean().item())
            if curve[-1] >= 0.9:
                break
    return dict(steps=EVERY * len(curve), curve=[round(a, 3) for a in curve])
