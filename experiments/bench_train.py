"""What training costs: the loop against a plain one, and eight heads against none in memory.

    python experiments/bench_train.py --out experiments/results/bench_train_cpu.json

- speed: train.py's step in next-token mode (schedule, joint_loss, clipping, AdamW) against the
  loop that one would write first, as in nanoGPT: forward with targets, backward, clip, step. Same model, same batches
  and in turns, so the quotient says what the generality of our loop costs.
- memory: logits are by far the largest tensors of a small model with a large vocabulary, batch x time x 50,257, and a
  naive multi-token loss holds those of all heads at once. joint_loss holds one head's. So the peak of a step with
  offsets 1..8 should be near that of next-token training. Each is measured in a process of its own: the largest
  resident set on a CPU, the allocator's peak on CUDA, less what stood before the step.

It ends with one line of JSON.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from heads import HeadsConfig, MultiTokenGPT, joint_loss, mtp_offsets
from model import GPT, GPTConfig, InputError
from train import (check_args, check_output, compute_gradients, environment, make_optimizers, one_line_errors,
                   parse_args as train_args, pick_device, write_whole)

SHAPES = dict(toy=dict(n_layer=4, n_head=2, n_embd=96), small=dict(n_layer=6, n_head=6, n_embd=384))


def random_corpus(vocab_size):
    """Something with the batches of a data.loader.Corpus: random tokens, another batch for every step."""
    def batch(split, batch_size, length, step, seed=0):
        return torch.randint(0, vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(step))
    return SimpleNamespace(batch=batch)


def plain_step(gpt, optimizer, corpus, step, args):
    """One step as one would write it first."""
    idx = corpus.batch("train", args.batch_size, gpt.config.block_size + 1, step).to(args.device)
    _, loss = gpt(idx[:, :-1], idx[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(gpt.parameters(), args.clip)
    optimizer.step()


def bench_speed(device, shape, rounds, steps):
    """-> dict(ours, plain: tokens per second, medians; ratio: the median of the rounds' quotients)"""
    args = train_args(["--device", str(device), "--offsets", "1", "--optimizer", "adamw", "--dtype", "float32"])
    check_args(args)
    torch.manual_seed(0)
    models = [MultiTokenGPT(GPT(GPTConfig(**SHAPES[shape])), HeadsConfig((1,))).to(device) for _ in range(2)]
    corpus = random_corpus(257)
    ours, plain = (make_optimizers(m, "adamw", args.lr, args.weight_decay) for m in models)

    def our_step(step):
        compute_gradients(models[0], ours, corpus, step, args, nullcontext)
        ours[0].step()
    ways = dict(ours=our_step, plain=lambda step: plain_step(models[1].gpt, plain[0], corpus, step, args))
    speed = {name: [] for name in ways}
    for r in tqdm(range(rounds + 1), desc=f"speed, {shape}", leave=False, disable=None):
        for name, way in ways.items():
            start = time.perf_counter()
            for step in range(steps):
                way(r * steps + step)
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if r:                                                           # the first round warms up
                speed[name].append(steps * args.batch_size * 256 / (time.perf_counter() - start))
    return dict(shape=shape, **{name: statistics.median(s) for name, s in speed.items()},
                ratio=statistics.median(a / b for a, b in zip(speed["ours"], speed["plain"])))


def resident(key):
    """The bytes of memory that this process holds ("VmRSS") or at most held ("VmHWM"); Linux only. (getrusage would
    count what the process that started this one held.)"""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        raise InputError("memory can be measured on Linux or CUDA only") from None
    return 1024 * int(status.split(f"{key}:")[1].split()[0])


def step_memory(device, n):
    """Peak bytes of a training step with offsets 1..n at a vocabulary of 50,257, less what stood before it."""
    model = MultiTokenGPT(GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=50257)),
                          HeadsConfig(mtp_offsets(n))).to(device)
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
    """-> dict(ntp, eight_heads: peak bytes of a step; ratio)"""
    found = []
    for n in (1, 8):
        done = subprocess.run([sys.executable, __file__, "--device", str(device), "--memory", str(n)],
                              capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"the memory of a step could not be measured: {done.stderr.strip().splitlines()[-1]}")
        found.append(int(done.stdout))
    return dict(ntp=found[0], eight_heads=found[1], ratio=found[1] / found[0])


def parse_args():
    """The command line as a namespace."""
    p = argparse.ArgumentParser(prog="bench_train.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                description="Measure what the training loop costs, in time and in memory.")
    p.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="model shapes for the speed")
    p.add_argument("--rounds", type=int, default=9, help="timed repetitions; medians are shown")
    p.add_argument("--steps", type=int, default=5, help="training steps in each")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--memory", type=int, metavar="N", help="only print the peak bytes of a step with offsets 1..N")
    p.add_argument("--out", metavar="FILE", help="write the results as JSON")
    p.error = lambda message: p.exit(2, f"bench_train.py: error: {message}\n")
    return p.parse_args()


def main():
    """Bad input is one line and status 2."""
    args = parse_args()
    with one_line_errors("bench_train.py", memory="--shapes"):
        if min(args.rounds, args.steps) < 1 or args.memory is not None and args.memory < 1:
            raise InputError("numbers must be at least 1")
        check_output("out", args.out)
        device = pick_device(args.device)
        if args.memory:
            return print(step_memory(device, args.memory))
        results = dict(command=" ".join(sys.argv), environment=environment(device),
                       memory=bench_memory(device),
                       speed=[bench_speed(device, shape, args.rounds, args.steps) for shape in args.shapes])
        for r in results["speed"]:
            print(f"{r['shape']:6} ours {r['ours']:8,.0f} tokens/s, plain loop {r['plain']:8,.0f}: {r['ratio']:.3f}x")
        m = results["memory"]
        print(f"peak of a step: NTP {m['ntp'] / 2**20:,.0f} MiB, offsets 1..8 {m['eight_heads'] / 2**20:,.0f} MiB: "
              f"{m['ratio']:.3f}x")
        if args.out:
            write_whole(args.out, json.dumps(results, indent=1) + "\n")
        print(json.dumps(results))


if __name__ == "__main__":
    main()
