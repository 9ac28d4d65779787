"""How fast decoding is, and what limits it.

    python experiments/bench_decode.py --run runs/demo --out experiments/results/bench_cpu.json

To emit one token, a model reads all its weights from memory and does so little arithmetic with
each that the reading takes the time: decoding is *memory-bound*. A block of N tokens reads the
same weights once. As long as arithmetic is free, its step takes no longer than that of one token,
and every accepted draft is a gain. That is what multi-token decoding lives on. It ends at the
block size where arithmetic is no longer free (*compute-bound*), which comes early on a machine
with much bandwidth and few arithmetic units. A toy model is limited by neither, but by the fixed
cost of launching each operation.

The methods take turns within one run, and medians are shown. There are three parts:

- latency: the time of a step by block size. Blocks of up to 4 are a chain; larger ones have drafts
  of lower rank as well. MBU (model bandwidth utilisation) is the bytes that a step must read
  (weights, and keys and values) per second, over the bandwidth at which this machine reads a large
  array. The limit is 1; caches can lift it above.
- batches: what a step costs by batch size.
- generate: tokens per second of whole texts. transformers' generate, with its default cache and
  with its static cache compiled, beside our decoder as NTP (eager, compiled), MTP, leap and tree.
  With random weights hardly any draft is right, so tokens/s means nothing for methods that draft.
  *Efficiency* still does: speedup / tokens per step, the speedup per accepted token. For a trained
  model, this part also compares drafting with the model's sampling noise (Gumbel coupling) and
  without.
"""
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import decode
from common import (Parser, Progress, check_output, environment, load_checkpoint,
                    one_line_errors, pick_device, write_whole)
from data.loader import Corpus
from decode import Decoder, Node, can_compile, chain, load_tree, ready
from experiments.calibrate import step_latencies, timed
from experiments.plots import import_pyplot
from heads import HeadsConfig, MultiTokenGPT, draft_sources
from model import GPT, GPTConfig, InputError

SIZES = {  # GPT-2's real shapes; toy is the demo's
    "toy": dict(n_layer=4, n_head=2, n_embd=96, vocab_size=257, block_size=256),
    "124M": dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, block_size=1024),
    "1.5B": dict(n_layer=48, n_head=25, n_embd=1600, vocab_size=50257, block_size=1024),
}
OFFSETS = (1, 2, 3, 4, 5, 7)
METHODS = {"NTP": (1,), "MTP": (1, 2, 3, 4), "leap": (1, 3, 5, 7)}
PARTS = ("latency", "batches", "generate")
ATTENTION = {"efficient": decode.ATTENTION, "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]}
FEW = 8192  # tokens to draft among (FR-Spec)
PROMPT, NEW = 64, 192  # tokens of a prompt, and of its continuation
LENGTH = PROMPT + NEW


# ----------------------------------------------------------------------------------------------
# Measuring

def flat_tree(nodes):
    """A tree of `nodes` drafts, for a block of any size: a chain of 3, and drafts of lower rank
    for the first token."""
    chained = chain(draft_sources(METHODS["MTP"]))
    return (*chained[:nodes], *(Node(0, 2, 0, rank) for rank in range(1, nodes - 2)))


def read_bandwidth(device):
    """Bytes per second at which this machine reads an array much larger than its caches: the best
    of two kernels."""
    n = 2 ** (32 if device.type == "cuda" else 29)  # bytes
    x = torch.ones(n // 4, device=device)
    matrix, vector = x.view(-1, 4096), torch.ones(4096, device=device)
    kernels = [lambda: x.sum(), lambda: matrix @ vector]
    return max(n / timed(kernel, device) for kernel in kernels for _ in range(7))


def step_bytes(decoder, batch_size=1):
    """Bytes that one step must read: the weights it uses, each once, and the keys and values of
    half the context."""
    heads, unembed = decoder.heads, decoder.model.gpt.lm_head
    used = [decoder.model.gpt.transformer.h, unembed, *heads.heads]
    used += [unembed] * bool(heads.heads and not heads.own)  # once more, for the drafts
    weights = sum(p.numel() for module in used for p in module.parameters())
    weights *= unembed.weight.element_size()
    layer = decoder.state(batch_size)[0].caches[0].layers[0]
    token = decoder.config.n_layer * layer.shape[-1] * layer.element_size()
    return weights + batch_size * decoder.max_length // 2 * token


def bench_latency(model, compile, bandwidth, blocks, bar):
    """Step latency by block size. -> list of dict(block, ms, relative, mbu)"""
    decoders = []
    for block in blocks:
        bar.set_postfix_str(f"prepare a block of {block}")
        decoder = Decoder(model, tree=flat_tree(block - 1), max_length=LENGTH, compile=compile)
        with torch.no_grad():
            decoder.state(1)
        decoders.append(decoder)
        bar.update()
    found = step_latencies(decoders)
    return [dict(block=block, ms=1e3 * seconds, relative=seconds / found[0],
                 mbu=step_bytes(decoder) / seconds / bandwidth)
            for block, decoder, seconds in zip(blocks, decoders, found)]


def bench_batches(model, compile, sizes, bar):
    """Efficiency by batch size: the latency of an NTP step over that of a method's step. With a
    large vocabulary also of heads that draft among FEW tokens. -> list of dict(batch, method, ms,
    efficiency)"""
    how = dict(max_length=LENGTH, compile=compile)
    decoders = {name: Decoder(model, offsets, **how) for name, offsets in METHODS.items()}
    if model.gpt.config.vocab_size > 2 * FEW:
        decoders |= {f"{name}, {FEW:,} tokens": Decoder(model, METHODS[name], **how,
                                                        draft_vocab=range(FEW))
                     for name in ("MTP", "leap")}
    found = []
    for size in sizes:
        bar.set_postfix_str(f"batch {size}")
        seconds = dict(zip(decoders, step_latencies(list(decoders.values()), size)))
        found += [dict(batch=size, method=name, ms=1e3 * t, efficiency=seconds["NTP"] / t)
                  for name, t in seconds.items()]
        bar.update()
    return found


def peers(gpt, device, compile):
    """transformers' generate with this GPT's weights: {name: f(prompt) -> (new tokens, steps)}.
    Raises InputError if transformers is missing."""
    try:
        import transformers
    except ImportError:
        raise InputError("the comparison needs transformers: "
                         "pip install -e '.[experiments]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = gpt.lm_head.weight.dtype
    with tempfile.TemporaryDirectory() as folder:
        gpt.save_pretrained(folder)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype)
        theirs.to(device).eval()

    def generate(prompt, **options):
        idx = torch.tensor([prompt], device=device)
        out = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=NEW,
                              min_new_tokens=NEW, do_sample=False, pad_token_id=0,
                              eos_token_id=None, **options)
        return out[0, len(prompt):].tolist(), NEW

    def static(prompt):
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        config = transformers.CompileConfig(fullgraph=True, dynamic=None, mode=mode)
        config._compile_all_devices = True  # else it does not compile on CPUs
        return generate(prompt, cache_implementation="static", compile_config=config)
    found = {"transformers": generate}
    if compile:
        found["transformers, static cache, compiled"] = static
    return found


def ours(decoder, prompt):
    """Our decoder in the form of `peers`: -> (new tokens, steps)."""
    g = decoder.generate([prompt], NEW)
    return g.tokens[0], g.steps


def median_ratio(a, b):
    """The median of the ratios of two lists, item by item."""
    return statistics.median(x / y for x, y in zip(a, b))


def bench_generate(model, compile, prompts, tree, rounds, bar):
    """Tokens per second of whole greedy texts. -> list of dict, {method: why it is missing}"""
    device = model.gpt.lm_head.weight.device
    runners, notes = {}, {}  # {method: f(prompt) -> (new tokens, steps)}
    for name, run in peers(model.gpt, device, compile).items():
        bar.set_postfix_str(name)
        try:
            run(prompts[0])
            runners[name] = run
        except Exception as error:  # another version of it, or no compiler
            reason = " ".join(str(error).split())[:120]
            notes[name] = f"does not work here: {type(error).__name__}: {reason}"
            if name == "transformers":  # the other methods are compared with it
                raise InputError(f"transformers' generate {notes[name]}") from None
        bar.update()
    how = dict(max_length=LENGTH, compile=compile)
    decoders = {"NTP, eager": Decoder(model, METHODS["NTP"], max_length=LENGTH)}
    decoders |= {name: Decoder(model, offsets, **how) for name, offsets in METHODS.items()}
    decoders["tree"] = Decoder(model, tree=tree, **how)
    for name, decoder in decoders.items():
        bar.set_postfix_str(name)
        runners[name] = partial(ours, decoder)
        runners[name](prompts[0])  # compile, and touch all memory
        bar.update()
    speed, done = ({name: [] for name in runners} for _ in range(2))
    for _ in range(rounds):
        seconds = dict.fromkeys(runners, 0.0)
        for prompt in prompts:  # at each prompt all methods take turns
            for name, run in runners.items():
                seconds[name] += timed(lambda: done[name].append(run(prompt)), device)
        for name in runners:
            speed[name].append(NEW * len(prompts) / seconds[name])
        bar.update()
    found = []
    for name in runners:
        texts, steps = zip(*done[name])
        per_step = NEW * len(texts) / sum(steps)
        over_ntp = median_ratio(speed[name], speed["NTP"])
        found.append(dict(
            method=name, tokens_per_second=statistics.median(speed[name]),
            tokens_per_step=per_step, over_ntp=over_ntp, efficiency=over_ntp / per_step,
            over_transformers=median_ratio(speed[name], speed["transformers"]),
            same_text=texts == tuple(text for text, _ in done["NTP"])))
    return found, notes


def bench_coupling(model, prompts):
    """Tokens per step of sampled text, drafted with the model's noise and without. -> list of
    dict(method, coupled, argmax)"""
    found = []
    for name in ("MTP", "leap"):
        how = dict(offsets=METHODS[name], temperature=1.0)
        coupled, argmax = (Decoder(model, coupled=coupled, **how).generate(prompts, NEW)
                           for coupled in (True, False))
        if coupled.tokens != argmax.tokens:
            raise RuntimeError("the text depends on how its tokens were drafted")
        found.append(dict(method=name, coupled=coupled.tokens_per_step,
                          argmax=argmax.tokens_per_step))
    return found


# ----------------------------------------------------------------------------------------------
# Tables and figure

def show(part, size):
    """Print one part of the results of one size as a table."""
    if part == "latency":
        print(f"{'block':>5}{'ms/step':>10}{'relative':>10}{'MBU':>7}")
        for r in size["latency"]:
            print(f"{r['block']:5}{r['ms']:10.3f}{r['relative']:10.2f}{r['mbu']:7.2f}")
    elif part == "batches":
        print("batch  " + "  ".join(
            f"{r['batch']} {r['method']} {r['ms']:.2f} ms ({r['efficiency']:.2f})"
            for r in size["batches"]))
    else:
        print(f"{'whole texts':38}{'tokens/s':>10}{'tokens/step':>13}{'over NTP':>10}"
              f"{'efficiency':>12}  over transformers  text")
        for r in size["generate"]:
            print(f"{r['method']:38}{r['tokens_per_second']:10,.0f}{r['tokens_per_step']:13.2f}"
                  f"{r['over_ntp']:9.2f}x{r['efficiency']:12.2f}{r['over_transformers']:18.2f}x  "
                  f"{'same' if r['same_text'] else 'differs'}")
        for method, note in size["notes"].items():
            print(f"{method} {note}")
        for r in size.get("coupling", []):
            print(f"temperature 1, {r['method']}: {r['coupled']:.2f} tokens/step with the model's "
                  f"noise, {r['argmax']:.2f} without")


def draw(results, path):
    """A figure: latency by block size, and tokens/s by method, a column for each size."""
    plt = import_pyplot()
    sizes, here = results["sizes"], results["environment"]
    fig, axes = plt.subplots(2, len(sizes), figsize=(5.5 * len(sizes), 7), squeeze=False,
                             layout="constrained")
    for (name, size), (top, bottom) in zip(sizes.items(), axes.T):
        blocks, ms = ([r[key] for r in size["latency"]] for key in ("block", "ms"))
        top.plot(blocks, ms, "o-", color="#1f6f8b")
        top.axhline(ms[0], color="#999", lw=1, ls=":")
        top.set_xscale("log", base=2)
        top.set_xticks(blocks, blocks)
        top.set(title=f"{name}, {results['dtype']}: one step (in NTP steps)",
                xlabel="tokens in the block", ylabel="ms", ylim=(0, 1.15 * max(ms)))
        for r in size["latency"]:
            top.annotate(f"{r['relative']:.2f}", (r["block"], r["ms"]), xytext=(0, 8),
                         textcoords="offset points", ha="center", fontsize=8)
        # Drafts of random weights mean nothing, so show only the methods that do not draft.
        trained = size["weights"] == "trained"
        rows = [r for r in size["generate"] if trained or r["tokens_per_step"] == 1]
        methods = [r["method"].replace("s, ", "s,\n", 1) for r in rows]
        speeds = [r["tokens_per_second"] for r in rows]
        colors = ["#bbb" if "transformers" in method else "#1f6f8b" for method in methods]
        bars = bottom.barh(methods, speeds, color=colors)
        bottom.bar_label(bars, [f" {speed:,.0f}" for speed in speeds], fontsize=8)
        bottom.invert_yaxis()
        bottom.margins(x=0.15)
        bottom.set(title=f"{name}, {size['weights']} weights: whole texts", xlabel="tokens/s")
        for axis in (top, bottom):
            axis.spines[["top", "right"]].set_visible(False)
    fig.suptitle(f"{here['device_name']}, {here['threads']} threads, torch {here['torch']}",
                 fontsize=9, color="#666")
    fig.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------
# The command line

def parse_args(argv=None):
    """The command line as a namespace."""
    p = Parser(prog="bench_decode.py", description="Benchmark decoding: step latency by block "
               "size, batches, tokens/s beside transformers, and what the sampling noise gains.")
    p.add_argument("--run", help="a trained run for the toy size (default: random weights)")
    p.add_argument("--sizes", nargs="+", choices=list(SIZES),
                   help="default: toy 124M, and 1.5B on CUDA")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS),
                   help="what to measure")
    p.add_argument("--blocks", nargs="+", type=int, help="block sizes",
                   default=[1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32])
    p.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="batch sizes")
    p.add_argument("--prompts", type=int, default=2, help="prompts for each method")
    p.add_argument("--rounds", type=int, default=3, help="timed repetitions; medians are shown")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--compile", choices=["auto", "no"], default="auto",
                   help="torch.compile the step")
    p.add_argument("--attention", choices=list(ATTENTION), default="efficient",
                   help="which kernels, on CUDA")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--out", metavar="FILE", help="write the results as JSON, after every part, "
                   "and at the end the figure beside it as PNG")
    return p.parse_args(argv)


def load_size(name, args, device):
    """The model of a size, a tree for it, prompts, and whether its weights are trained or
    random."""
    torch.manual_seed(0)
    n = max(args.prompts, 32)  # bench_coupling takes all, the timed texts the first
    tree, prompts = flat_tree(7), torch.randint(0, 250, (n, PROMPT)).tolist()
    if name != "toy" or not args.run:
        with torch.device(device):  # on a GPU a large model is initialised much faster
            model = MultiTokenGPT(GPT(GPTConfig(**SIZES[name])), HeadsConfig(OFFSETS))
        return model, tree, prompts, "random"
    model, state = load_checkpoint(args.run)
    if not set(OFFSETS) <= set(model.offsets) or model.gpt.config.block_size < LENGTH:
        raise InputError(f"the benchmark needs a run with offsets {OFFSETS} and a context of "
                         f"{LENGTH}")
    tree = load_tree(args.run, model.offsets)[0] or tree
    prompts = Corpus(state["args"]["data"]).windows("val", n, PROMPT).tolist()
    return model.to(device), tree, prompts, "trained"


def bench(args):
    """Measure what the command line asks for, print it and write it after every part. ->
    results"""
    device = pick_device(args.device)
    here, compile = environment(device), args.compile == "auto" and can_compile(device)
    bandwidth = read_bandwidth(device)
    results = dict(environment=here, dtype=args.dtype, read_bandwidth=bandwidth, sizes={},
                   command=" ".join(sys.argv), attention=args.attention)
    decode.ATTENTION = ATTENTION[args.attention]
    print(f"{here['device_name']}, {args.dtype}, reads {bandwidth / 1e9:,.1f} GB/s, "
          f"{'compiled' if compile else 'eager'}")
    steps = dict(latency=len(args.blocks), batches=len(args.batches), generate=7 + args.rounds)
    for name in args.sizes or list(SIZES)[:3 if device.type == "cuda" else 2]:
        model, tree, prompts, weights = load_size(name, args, device)
        parameters = sum(p.numel() for p in model.gpt.parameters())
        results["sizes"][name] = size = dict(weights=weights, parameters=parameters)
        model = ready(model, getattr(torch, args.dtype))  # once for all decoders
        print(f"\n{name}: {parameters / 1e6:.1f}M parameters, {weights} weights")
        with Progress(total=sum(steps[part] for part in args.parts), desc=name) as bar:
            for part in args.parts:
                if part == "latency":
                    size["latency"] = bench_latency(model, compile, bandwidth, args.blocks, bar)
                elif part == "batches":
                    size["batches"] = bench_batches(model, compile, args.batches, bar)
                else:
                    size["generate"], size["notes"] = bench_generate(
                        model, compile, prompts[:args.prompts], tree, args.rounds, bar)
                    if weights == "trained":  # in float32, where texts are equal
                        size["coupling"] = bench_coupling(ready(model, torch.float32), prompts)
                with bar.external_write_mode():
                    show(part, size)
                if args.out:  # a later failure loses nothing
                    write_whole(args.out, json.dumps(results, indent=1) + "\n")
    return results


def main(argv=None):
    """Bad input is one line and status 2."""
    args = parse_args(argv)
    with one_line_errors("bench_decode.py", memory="--batches or --sizes"):
        numbers = args.blocks + args.batches + [args.prompts, args.rounds]
        if min(numbers) < 1 or args.blocks[0] != 1:
            raise InputError("numbers must be at least 1, and the first block size 1: the others "
                             "are compared with it")
        if max(args.blocks) > 256:
            raise InputError(f"the largest block has 256 tokens, not {max(args.blocks)}")
        if args.out and Path(args.out).suffix == ".png":
            raise InputError("--out names the JSON file; the figure is written beside it")
        check_output("out", args.out)
        results = bench(args)
        if args.out and {"latency", "generate"} <= set(args.parts):
            draw(results, Path(args.out).with_suffix(".png"))
        print(json.dumps(results))


if __name__ == "__main__":
    main()
