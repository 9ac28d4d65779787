"""What training costs: the loop and its optimizer against plain ones, eight offsets against one.

    python experiments/bench_train.py --out experiments/results/bench_train_cpu.json

- speed: train.py's step (schedule, joint_loss, clipping, its Muon) against the loop that one would
  write first (forward, sum of the losses, backward, clip, step), with AdamW and with
  torch.optim.Muon, for next-token prediction and for six offsets. The model and the batches are
  the same, the ways take turns, and the optimizer's fraction of each step is measured too.
- memory: with a large vocabulary the logits, batch x time x 50,257, are by far the largest tensors
  of a small model. A naive multi-token loss holds those of all heads at once, joint_loss those of
  one head, so the peak of a step with offsets 1..8 should be near that of next-token training.
  Each is measured in a process of its own: the largest resident set on a CPU, the allocator's peak
  on CUDA, less what was there before the step.

It ends with one line of JSON.
"""
import json
import statistics
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (Parser, Progress, check_output, environment, one_line_errors, pick_device,
                    write_whole)
from decode import clock
from heads import HeadsConfig, MultiTokenGPT, joint_loss, mtp_offsets, predictions_and_targets
from model import GPT, GPTConfig, InputError
from train import bfloat16, check_args, compute_gradients, make_optimizers
from train import parse_args as train_args

WAYS = dict(ours="ours", plain_adamw="plain loop with AdamW",
            plain_muon="plain loop with torch.optim.Muon")
SHAPES = dict(toy=dict(n_layer=4, n_head=2, n_embd=96),
              small=dict(n_layer=6, n_head=6, n_embd=384))


def random_corpus(vocab_size):
    """Like a data.loader.Corpus, with random tokens: another batch for every step."""
    def batch(split, batch_size, length, step, seed=0):
        generator = torch.Generator().manual_seed(step)
        return torch.randint(0, vocab_size, (batch_size, length), generator=generator)
    return SimpleNamespace(batch=batch)


def plain_step(model, optimizers, corpus, step, args, autocast):
    """The gradients as one would compute them first: of the sum of all losses, in one pass."""
    idx = corpus.batch("train", args.batch_size, model.gpt.config.block_size + 1, step)
    idx = idx.to(args.device)
    with autocast():
        h = model.hidden_states(idx[:, :-1])
        predictions = [predictions_and_targets(model, h, idx, o) for o in model.offsets]
        loss = sum(F.cross_entropy(logits, targets) for logits, targets in predictions)
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)


def pytorchs_muon(model, args):
    """The optimizers of train.py, but with torch.optim.Muon."""
    adamw, muon = make_optimizers(model, "muon", args.lr, args.weight_decay)
    groups = [dict(params=g["params"], weight_decay=g["weight_decay"]) for g in muon.param_groups]
    return [adamw, torch.optim.Muon(groups, lr=args.lr, adjust_lr_fn="match_rms_adamw")]


def bench_speed(device, shape, offsets, dtype, rounds, steps):
    """-> dict(shape, offsets, dtype; for each way its tokens_per_second and optimizer, the
    optimizer's fraction of the time, both medians over rounds; mfu: of ours; over_adamw and
    over_muon: medians of our speed over theirs)"""
    options = ["--offsets", ",".join(map(str, offsets)), "--dtype", dtype]
    args = train_args(["--device", str(device), *options])
    check_args(args)
    autocast = (lambda: bfloat16(device)) if args.dtype == "bfloat16" else nullcontext
    torch.manual_seed(0)
    models = [MultiTokenGPT(GPT(GPTConfig(**SHAPES[shape])), HeadsConfig(offsets)).to(device)
              for _ in range(3)]
    optimizers = dict(ours=make_optimizers(models[0], "muon", args.lr, args.weight_decay),
                      plain_adamw=make_optimizers(models[1], "adamw", args.lr, args.weight_decay),
                      plain_muon=pytorchs_muon(models[2], args))
    corpus = random_corpus(257)
    speed, fraction = {way: [] for way in WAYS}, {way: [] for way in WAYS}
    for r in Progress(range(rounds + 1), desc=f"speed, {shape}, offsets {args.offsets}"):
        for model, way in zip(models, optimizers):
            make_gradients = compute_gradients if way == "ours" else plain_step
            gradients = update = 0.0
            for step in range(r * steps, (r + 1) * steps):
                start = clock(device)
                make_gradients(model, optimizers[way], corpus, step, args, autocast)
                middle = clock(device)
                for optimizer in optimizers[way]:
                    optimizer.step()
                gradients, update = gradients + middle - start, update + clock(device) - middle
            if r:  # the first round warms up
                tokens = steps * args.batch_size * args.block_size
                speed[way].append(tokens / (gradients + update))
                fraction[way].append(update / (gradients + update))

    def over(way):
        return statistics.median(a / b for a, b in zip(speed["ours"], speed[way]))
    found = {way: dict(tokens_per_second=statistics.median(speed[way]),
                       optimizer=statistics.median(fraction[way])) for way in WAYS}
    return dict(shape=shape, offsets=offsets, dtype=args.dtype, **found,
                mfu=mfu(models[0], found["ours"]["tokens_per_second"], device),
                over_adamw=over("plain_adamw"), over_muon=over("plain_muon"))


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12}  # dense bfloat16


def mfu(model, tokens_per_second, device):
    """Model FLOPs utilization: 6N + 12LCT FLOPs per token (PaLM, appendix B) over the GPU's peak.
    None on other devices."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((PEAK_FLOPS[gpu] for gpu in PEAK_FLOPS if gpu in name), None)
    if not peak:
        return None
    c, n = model.gpt.config, sum(p.numel() for p in model.parameters())
    n += len(model.heads) * c.vocab_size * c.n_embd  # each head multiplies by the unembedding
    return tokens_per_second * (6 * n + 12 * c.n_layer * c.n_embd * c.block_size) / peak


def resident(key):
    """The bytes of memory that this process holds ("VmRSS") or at most held ("VmHWM"). Linux only;
    getrusage would count what the process that started this one held."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        raise InputError("memory can be measured on Linux or CUDA only") from None
    return 1024 * int(status.split(f"{key}:")[1].split()[0])


def step_memory(device, n):
    """Peak bytes of a training step with offsets 1..n at a vocabulary of 50,257, less what was
    there before it."""
    gpt = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=50257))
    model = MultiTokenGPT(gpt, HeadsConfig(mtp_offsets(n))).to(device)
    optimizers = make_optimizers(model, "adamw", 1e-3, 0.1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = resident("VmRSS")
    for step in range(2):
        joint_loss(model, torch.randint(0, 50257, (8, 257), device=device), backward=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    return resident("VmHWM") - before


def bench_memory(device):
    """-> dict(ntp, eight_offsets: peak bytes of a step; ratio)"""
    found = []
    for n in (1, 8):
        command = [sys.executable, __file__, "--device", str(device), "--memory", str(n)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1]
            raise InputError(f"the memory of a step could not be measured: {reason}")
        found.append(int(done.stdout))
    return dict(ntp=found[0], eight_offsets=found[1], ratio=found[1] / found[0])


def main(argv=None):
    """The command line. Bad input is one line and status 2."""
    p = Parser(prog="bench_train.py",
               description="Measure what the training loop costs, in time and in memory.")
    p.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES),
                   help="model shapes for the speed")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                   help="for the speed; auto: bfloat16 where the hardware has it")
    p.add_argument("--rounds", type=int, default=9, help="timed repetitions; medians are shown")
    p.add_argument("--steps", type=int, default=5, help="training steps in each")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--memory", type=int, metavar="N",
                   help="only print the peak bytes of a step with offsets 1..N")
    p.add_argument("--out", metavar="FILE", help="write the results as JSON")
    args = p.parse_args(argv)
    with one_line_errors("bench_train.py", memory="--shapes"):
        if min(args.rounds, args.steps) < 1 or args.memory is not None and args.memory < 1:
            raise InputError("numbers must be at least 1")
        check_output("out", args.out)
        device = pick_device(args.device)
        if args.memory:
            return print(step_memory(device, args.memory))
        results = dict(
            command=" ".join(sys.argv), environment=environment(device),
            memory=bench_memory(device),
            speed=[bench_speed(device, shape, offsets, args.dtype, args.rounds, args.steps)
                   for shape in args.shapes for offsets in ((1,), (1, 2, 3, 4, 5, 7))])
        for r in results["speed"]:
            shown = (f"{name} {r[way]['tokens_per_second']:,.0f} tokens/s "
                     f"({r[way]['optimizer']:.0%} optimizer)" for way, name in WAYS.items())
            if r["mfu"]:
                shown = (*shown, f"ours at {r['mfu']:.0%} of the GPU's peak")
            print(f"{r['shape']}, offsets {','.join(map(str, r['offsets']))}, {r['dtype']}: "
                  f"{'; '.join(shown)}: {r['over_adamw']:.2f}x and {r['over_muon']:.2f}x")
        m = results["memory"]
        print(f"peak of a step: NTP {m['ntp'] / 2**20:,.0f} MiB, offsets 1..8 "
              f"{m['eight_offsets'] / 2**20:,.0f} MiB: {m['ratio']:.3f}x")
        if args.out:
            write_whole(args.out, json.dumps(results, indent=1) + "\n")
        print(json.dumps(results))


if __name__ == "__main__":
    main()
