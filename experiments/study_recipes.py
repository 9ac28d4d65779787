"""Paper A: how to add a head to a next-token model, and what it costs that model.

Trained: from one base per seed, a head for t+2 (one transformer layer) by every recipe, with the
same compute: a step with a frozen backbone costs half as much, so there are twice as many. The
heads' learning rate is swept, and the backbone's is that rate times the recipe's scale. Warm-up is
a run of its own, with its own schedule, before the joint one. From scratch, backbone and head get
the compute of a base and its adaptation together.
Controls: the untouched base, and the base trained on without a head, at the backbone's rate.
Measured: accuracy at t+2, and the next-token loss, which recipes trade for it.

Each recipe's configuration is chosen on one seed: the most accurate of those whose next-token loss
is at most 0.02 nats above the base's, or else that which lost least. The other seeds train and
judge the chosen ones.
"""
from experiments.study_runs import SELECT, flops, foresee

RECIPES = {  # label: options of train.py, scales of the backbone's rate
    "frozen": (dict(), (0,)),
    "frozen, WHS": (dict(whs=True), (0,)),
    "joint": (dict(), (1,)),
    "joint, slower backbone": (dict(), (0.1, 0.02)),
    "warm-up, then joint": (dict(), (0.1,)),
    "WHS, joint, slower backbone": (dict(whs=True), (0.1, 0.02)),
}
SECOND_COLUMN = ("frozen", "joint")  # with residual heads as well
MOST_LOST = 0.02  # nats, against the base: about equal next-token loss


def recipes(study, seed):
    """-> {row: foresee, with scale and rate}; "trained on, RATE" are the controls"""
    base = study.base(seed)
    rows = {"base": study.measured(base, foresee)}
    swept = None if seed == SELECT else recipes(study, SELECT)
    for label, (options, scales) in RECIPES.items():
        configs = [(scale, rate) for scale in scales for rate in study.size.rates]
        if swept:
            configs = [chosen(swept, label, study.size.positions)]
        for scale, rate in configs:
            name = f"{label}, {scale:g} x {rate:g}"
            rows[name] = adapted(study, seed, base, name, scale, rate, head_kind="block",
                                 **options)
            rows[control_of(scale, rate)] = trained_on(study, seed, base, scale, rate)
            if swept and label in SECOND_COLUMN:
                name = f"residual, {name}"
                rows[name] = adapted(study, seed, base, name, scale, rate, **options)
    if swept:
        rows["from scratch"] = study.measured(scratch(study, seed), foresee)
    return rows


def adapted(study, seed, base, name, scale, rate, **options):
    """A head added to a base. -> foresee"""
    steps, name = study.size.adapt, name.replace(", ", "-").replace(" ", "-")
    options |= dict(offsets="1,2", lr=rate)
    joint, alone = (flops(study.size.base, heads=1, frozen=frozen) for frozen in (False, True))
    if "warm-up" in name:
        first, steps = round(steps / 3 * joint / alone), steps - steps // 3
        base = study.run(f"{name}-first", seed, base, backbone_lr=0, steps=first, **options)
    steps = steps if scale else round(steps * joint / alone)
    run = study.run(name, seed, base, backbone_lr=scale, steps=steps, **options)
    return study.measured(run, foresee, marginal=False) | dict(scale=scale, rate=rate)


def control_of(scale, rate):
    """The row of the control for a backbone's rate."""
    return f"trained on, {scale * rate:g}" if scale else "base"


def trained_on(study, seed, base, scale, rate):
    """The base after as many steps without a head. -> foresee"""
    if scale:
        base = study.run(f"trained-on-{scale * rate:g}", seed, base, lr=scale * rate)
    return study.measured(base, foresee)


def scratch(study, seed):
    """A backbone and its head from scratch, with the compute of a base and of joint training."""
    shape, size = study.size.base, study.size
    alone, both = flops(shape), flops(shape, heads=1)
    steps = size.adapt + round(size.steps * alone / both)
    return study.run("scratch", seed, offsets="1,2", head_kind="block", steps=steps)


def lost(rows, name, positions):
    """Nats per token that a row lost against the base."""
    nats, before = rows[name]["nats"], rows["base"]["nats"]
    return (sum(nats) - sum(before)) / len(nats) / positions


def chosen(rows, label, positions):
    """The configuration of a recipe, on the seed that selects. -> scale, rate"""
    names = [name for name in rows if name.startswith(f"{label}, ") and "rate" in rows[name]
             and name.removeprefix(f"{label}, ")[0].isdigit()]
    fine = [name for name in names if lost(rows, name, positions) <= MOST_LOST]
    best = max(fine, key=lambda name: sum(rows[name]["t+2 head"])) if fine else \
        min(names, key=lambda name: lost(rows, name, positions))
    return rows[best]["scale"], rows[best]["rate"]
