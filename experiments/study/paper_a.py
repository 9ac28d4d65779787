"""Paper A, Mehra et al. 2025: what a next-token model knows about later tokens, and how heads get
at it. A part trains its runs and measures them; what follows from it are claims.
"""
from experiments.study.lens import lens, probes
from experiments.study.runs import CORPORA, SELECT

RATES = (3e-3, 1e-2, 3e-2)
HEADS = {"residual": dict(offsets="1,2"), "1 layer": dict(offsets="1,2", head_kind="block")}
FROZEN = dict(backbone_lr=0)


# ---- 1: what a next-token model knows --------------------------------------------------------

def knows_runs(study, seed):
    runs = {data: study.base(seed, data) for data in CORPORA}
    for n, width in ((1, 16), (2, 32)):
        runs[f"{n}x{width}"] = study.run(f"ntp-{n}x{width}", seed, n_layer=n, n_head=n,
                                         n_embd=width)
    runs["direct"] = study.run("direct", seed, offsets="1,2", only=2)
    return runs


# ---- 2, 4: heads on a frozen model -----------------------------------------------------------

def rate(study, heads, **options):
    """The learning rate with which such heads are best on the seed that selects."""
    def accuracy(lr):
        run = tuned(study, SELECT, heads, lr, **options)
        return last_accuracy(run)
    return max(RATES, key=accuracy)


def tuned(study, seed, heads, lr, **options):
    name = "-".join([heads.replace(" ", "-"), *(f"{v:g}" for v in options.values()), f"{lr:g}"])
    return study.run(f"heads-{name}", seed, study.base(seed), lr=lr, **HEADS[heads], **options)
