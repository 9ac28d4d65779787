"""How fast decoding is, and what is in its way.

    python experiments/bench_decode.py --run runs/demo --out experiments/results/bench_cpu.json

To write one token a model must read all its weights from memory once, and does so little arithmetic with each that the
reading decides: decoding is *memory-bound*. Feeding a block of N tokens instead of one reads the same weights once, so
as long as arithmetic is free the step costs the same, and every accepted guess is gain. That is the business of
multi-token decoding. It ends at the block size where the arithmetic is no longer free (*compute-bound*), which a
machine with much bandwidth and few arithmetic units reaches soon. For a toy model neither counts, but the fixed cost
of launching each operation.

So three things are measured, always in turns within one run, as medians:

- latency of a step by block size: a chain of up to 4, from 5 on also guesses of lower rank. MBU (model bandwidth
  utilisation) is the bytes that a step must read (weights, and keys and values) per second, over the bandwidth at which
  this machine reads a large array; 1 is the limit. Caches can bring it above 1.
- tokens per second: transformers' generate with its default cache and with its static cache compiled, and ours as NTP
  (eager, compiled), MTP, leap and tree. For models of random weights, whose guesses are hardly ever right, tokens/s
  says nothing about MTP; what holds is *efficiency*, speedup / tokens per step: what is left of every accepted token.
- what batches cost, and, for a trained model, how many more guesses are accepted with the model's sampling noise
  (Gumbel coupling) than without.
"""
import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Progress, check_output, environment, load_checkpoint, one_line_errors, pick_device, write_whole
import decode
from data.loader import Corpus
from decode import Decoder, Node, can_compile, chain, load_tree, ready, step_latencies, timed
from heads import HeadsConfig, MultiTokenGPT, draft_sources
from model import GPT, GPTConfig, InputError

SIZES = {                                                                   # GPT-2's real shapes; toy is the demo's
    "toy": dict(n_layer=4, n_head=2, n_embd=96, vocab_size=257, block_size=256),
    "124M": dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, block_size=1024),
    "1.5B": dict(n_layer=48, n_head=25, n_embd=1600, vocab_size=50257, block_size=1024),
}
OFFSETS = (1, 2, 3, 4, 5, 7)
METHODS = {"NTP": (1,), "MTP": (1, 2, 3, 4), "leap": (1, 3, 5, 7)}
PARTS = ("latency", "batches", "generate")
ATTENTION = {"efficient": decode.ATTENTION, "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]}
PROMPT, LENGTH = 64, 256                                                    # tokens of a prompt, and with its text


def flat_tree(nodes):
    """A tree of `nodes` candidates for a block of any size: a chain of 3, and other guesses for its first token."""
    chained = [Node(0, 2, 0), Node(1, 3, 0), Node(2, 4, 0)]
    return (*chained[:nodes], *(Node(0, 2, 0, rank) for rank in range(1, nodes - 2)))


def read_bandwidth(device):
    """Bytes per second at which this machine reads an array much larger than its caches: the best of two kernels."""
    n = 2 ** (32 if device.type == "cuda" else 29)                          # bytes
    x = torch.ones(n // 4, device=device)
    matrix, vector = x.view(-1, 4096), torch.ones(4096, device=device)
    found = 0.0
    for kernel in (lambda: x.sum(), lambda: matrix @ vector):
        for _ in range(7):
            seconds = timed(kernel, device)
            found = max(found, n / seconds)
    return found


def step_bytes(decoder, batch_size=1):
    """Bytes that one step must read: the weights it uses, each once, and the keys and values of half the context."""
    used = [decoder.gpt.transformer.h, *decoder.unembeddings, *decoder.heads]
    weights = sum(p.numel() for module in used for p in module.parameters()) * decoder.gpt.lm_head.weight.element_size()
    layer = decoder.states[batch_size].caches[0].layers[0]
    token = decoder.config.n_layer * layer.shape[-1] * layer.element_size()
    return weights + batch_size * decoder.max_length // 2 * token


def bench_latency(model, how, bandwidth, blocks, bar):
    """Step latency by block size. -> list of dict(block, ms, relative, mbu)"""
    decoders = []
    for block in blocks:
        bar.set_postfix_str(f"compile a block of {block}")
        decoders.append(Decoder(model, tree=flat_tree(block - 1), max_length=LENGTH, **how))
        with torch.no_grad():
            decoders[-1]._state(1)
        bar.update()
    found = step_latencies(decoders)
    return [dict(block=block, ms=1e3 * seconds, relative=seconds / found[0], mbu=step_bytes(d) / seconds / bandwidth)
            for block, d, seconds in zip(blocks, decoders, found)]


def bench_batches(model, how, sizes, bar):
    """Efficiency by batch size: the latency of an NTP step over that of a method's step. -> list of dict"""
    found = []
    decoders = {name: Decoder(model, offsets, max_length=LENGTH, **how) for name, offsets in METHODS.items()}
    for size in sizes:
        bar.set_postfix_str(f"compile for batch {size}")
        seconds = dict(zip(decoders, step_latencies(list(decoders.values()), size)))
        found += [dict(batch=size, method=name, ms=1e3 * t, efficiency=seconds["NTP"] / t)
                  for name, t in seconds.items()]
        bar.update()
    return found


def peers(gpt, device, compile):
    """transformers' generate with this GPT's weights, as {name: f(prompt, n) -> new tokens}."""
    try:
        import transformers
    except ImportError:
        raise InputError("the comparison needs transformers: pip install -e '.[experiments]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        gpt.save_pretrained(folder)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=gpt.lm_head.weight.dtype)
        theirs.to(device).eval()

    def generate(prompt, n, **options):
        idx = torch.tensor([prompt], device=device)
        out = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, min_new_tokens=n,
                              do_sample=False, pad_token_id=0, eos_token_id=None, **options)
        return out[0, len(prompt):].tolist()

    def static(prompt, n):
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        config = transformers.CompileConfig(fullgraph=True, dynamic=None, mode=mode)
        config._compile_all_devices = True                                  # else it does not compile on CPUs
        return generate(prompt, n, cache_implementation="static", compile_config=config)
    return {"transformers": generate, **({"transformers, static cache, compiled": static} if compile else {})}


def bench_generate(model, how, prompts, tree, rounds, bar):
    """Tokens per second of whole generations. -> list of dict"""
    device = model.gpt.lm_head.weight.device
    n = LENGTH - PROMPT
    trees = {name: chain(draft_sources(offsets)) for name, offsets in METHODS.items()}
    trees["tree"] = tree
    runners, decoders, notes = {}, {}, {}
    for name, run in peers(model.gpt, device, how["compile"]).items():
        bar.set_postfix_str(name)
        try:
            run(prompts[0], n)
            runners[name] = lambda p, run=run: (run(p, n), n)
        except Exception as error:                                          # another version of it, or no compiler
            notes[name] = f"does not work here: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
            if name == "transformers":                                      # the others are compared with it
                raise InputError(f"transformers' generate {notes[name]}") from None
        bar.update()
    ours = [("NTP, eager", trees["NTP"], False)] + [(name, tree, how["compile"]) for name, tree in trees.items()]
    for name, tree, compile in ours:
        bar.set_postfix_str(name)
        decoders[name] = Decoder(model, tree=tree, max_length=LENGTH, **{**how, "compile": compile})
        decoders[name].generate(prompts[:1], n)

        def run(p, decoder=decoders[name]):
            g = decoder.generate([p], n)
            return g.tokens[0], g.steps
        runners[name] = run
        bar.update()
    speed, steps, texts = ({name: [] for name in runners} for _ in range(3))
    for r in range(rounds):
        seconds = dict.fromkeys(runners, 0.0)
        for prompt in prompts:                                              # all take turns at each prompt
            for name, run in runners.items():
                result = []
                seconds[name] += timed(lambda: result.append(run(prompt)), device)
                if r == 0:
                    texts[name].append(result[0][0])
                    steps[name].append(result[0][1])
        for name in runners:
            speed[name].append(n * len(prompts) / seconds[name])
        bar.update()
    found = []
    for name in runners:
        per_step = n * len(prompts) / sum(steps[name])
        over_ntp, over_transformers = (statistics.median(a / b for a, b in zip(speed[name], speed[other]))
                                       for other in ("NTP", "transformers"))
        found.append(dict(method=name, tokens_per_second=statistics.median(speed[name]), tokens_per_step=per_step,
                          over_ntp=over_ntp, efficiency=over_ntp / per_step, over_transformers=over_transformers,
                          same_text=texts[name] == texts["NTP"]))
    return found, notes


def bench_coupling(model, prompts):
    """Tokens per step of sampled text, guesses with the model's noise and without. -> list of dict"""
    found = []
    for name, offsets in list(METHODS.items())[1:]:
        both = [Decoder(model, offsets, temperature=1.0, coupled=coupled).generate(prompts, LENGTH - PROMPT)
                for coupled in (True, False)]
        if both[0].tokens != both[1].tokens:
            raise RuntimeError("the text depends on how its tokens were guessed")
        found.append(dict(method=name, coupled=both[0].tokens_per_step, argmax=both[1].tokens_per_step))
    return found


def draw(results, path):
    """A figure: latency against block size, and tokens/s by method, a column for each size."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("the figure needs matplotlib: pip install -e '.[experiments]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    sizes = results["sizes"]
    fig, axes = plt.subplots(2, len(sizes), figsize=(5.5 * len(sizes), 7), squeeze=False, layout="constrained")
    for (name, size), (top, bottom) in zip(sizes.items(), axes.T):
        rows, blocks = size["latency"], [r["block"] for r in size["latency"]]
        top.plot(blocks, [r["ms"] for r in rows], "o-", color="#1f6f8b")
        top.axhline(rows[0]["ms"], color="#999", lw=1, ls=":")
        top.set_xscale("log", base=2)
        top.set_xticks(blocks, blocks)
        top.set(title=f"{name}, {results['dtype']}: one step (in NTP steps)", xlabel="tokens in the block", ylabel="ms",
                ylim=(0, 1.15 * max(r["ms"] for r in rows)))
        for r in rows:
            top.annotate(f"{r['relative']:.2f}", (r["block"], r["ms"]), textcoords="offset points", xytext=(0, 8),
                         ha="center", fontsize=8)
        # Guesses of random weights mean nothing, so of these only the methods without guesses are shown.
        bars = [r for r in size["generate"] if size["weights"] == "trained" or r["tokens_per_step"] == 1]
        bottom.barh([r["method"].replace("s, ", "s,\n", 1) for r in bars], [r["tokens_per_second"] for r in bars],
                    color=["#bbb" if "transformers" in r["method"] else "#1f6f8b" for r in bars])
        bottom.bar_label(bottom.containers[0], [f" {r['tokens_per_second']:,.0f}" for r in bars], fontsize=8)
        bottom.invert_yaxis()
        bottom.margins(x=0.15)
        bottom.set(title=f"{name}, {size['weights']} weights: whole texts", xlabel="tokens/s")
        for axis in (top, bottom):
            axis.spines[["top", "right"]].set_visible(False)
    fig.suptitle(f"{results['environment']['device_name']}, {results['environment']['threads']} threads, "
                 f"torch {results['environment']['torch']}", fontsize=9, color="#666")
    fig.savefig(path, dpi=110)


def parse_args():
    """The command line as a namespace."""
    p = argparse.ArgumentParser(prog="bench_decode.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                description="Benchmark decoding: step latency by block size, tokens/s beside "
                                            "transformers, batches, and what the sampling noise gains.")
    p.add_argument("--run", help="a trained run for the toy size (default: random weights)")
    p.add_argument("--sizes", nargs="+", choices=list(SIZES), help="default: toy 124M, and 1.5B on CUDA")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    p.add_argument("--blocks", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32], help="block sizes")
    p.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="batch sizes")
    p.add_argument("--prompts", type=int, default=2, help="prompts for each method")
    p.add_argument("--rounds", type=int, default=3, help="timed repetitions; medians are shown")
    p.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    p.add_argument("--compile", choices=["auto", "no"], default="auto")
    p.add_argument("--attention", choices=list(ATTENTION), default="efficient", help="which kernels, on CUDA")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    p.add_argument("--out", metavar="FILE", help="write the results as JSON, after every part, and at the end the "
                   "figure beside it as PNG")
    p.error = lambda message: p.exit(2, f"bench_decode.py: error: {message}\n")
    return p.parse_args()


def bench(args):
    """Everything, printed and kept as it is found. -> results"""
    device, dtype = pick_device(args.device), getattr(torch, args.dtype)
    bandwidth = read_bandwidth(device)
    results = dict(environment=environment(device), dtype=args.dtype, read_bandwidth=bandwidth, sizes={},
                   command=" ".join(sys.argv))
    decode.ATTENTION, results["attention"] = ATTENTION[args.attention], args.attention
    how = dict(compile=args.compile == "auto" and can_compile(device))
    print(f"{results['environment']['device_name']}, {args.dtype}, reads {bandwidth / 1e9:,.1f} GB/s, "
          f"{'compiled' if how['compile'] else 'eager'}")
    for name in args.sizes or list(SIZES)[:3 if device.type == "cuda" else 2]:
        size = results["sizes"][name] = dict(weights="random")
        torch.manual_seed(0)
        tree, prompts = flat_tree(7), torch.randint(0, 250, (args.prompts, PROMPT)).tolist()
        if name == "toy" and args.run:
            model, state = load_checkpoint(args.run)
            if not set(OFFSETS) <= set(model.offsets) or model.gpt.config.block_size < LENGTH:
                raise InputError(f"the benchmark needs a run with offsets {OFFSETS} and a context of {LENGTH}")
            folder = Path(args.run) if Path(args.run).is_dir() else Path(args.run).parent
            tree = load_tree(folder / "tree.json", model.offsets) or tree
            prompts = Corpus(state["args"]["data"]).windows("val", args.prompts, PROMPT).tolist()
            size["weights"] = "trained"
        else:
            with torch.device(device):                                      # there a large one is soon made
                model = MultiTokenGPT(GPT(GPTConfig(**SIZES[name])), HeadsConfig(OFFSETS))
        size["parameters"] = sum(p.numel() for p in model.gpt.parameters())
        model = ready(model.to(device), dtype)                              # once for all decoders
        print(f"\n{name}: {size['parameters'] / 1e6:.1f}M parameters, {size['weights']} weights")
        steps = dict(latency=len(args.blocks), batches=len(args.batches), generate=7 + args.rounds)
        with Progress(total=sum(steps[part] for part in args.parts), desc=name) as bar:
            for part in args.parts:
                if part == "latency":
                    size["latency"] = bench_latency(model, how, bandwidth, args.blocks, bar)
                elif part == "batches":
                    size["batches"] = bench_batches(model, how, args.batches, bar)
                else:
                    size["generate"], size["notes"] = bench_generate(model, how, prompts, tree, args.rounds, bar)
                    if size["weights"] == "trained":                        # in float32, where texts are equal
                        size["coupling"] = bench_coupling(ready(model, torch.float32), prompts)
                with bar.external_write_mode():
                    show(part, size)
                if args.out:                                                # what is measured is not lost
                    write_whole(args.out, json.dumps(results, indent=1) + "\n")
    return results


def show(part, size):
    """Print one part of the results of one size as a table."""
    if part == "latency":
        print(f"{'block':>5}{'ms/step':>10}{'relative':>10}{'MBU':>7}")
        for r in size["latency"]:
            print(f"{r['block']:5}{r['ms']:10.3f}{r['relative']:10.2f}{r['mbu']:7.2f}")
    elif part == "batches":
        print("batch  " + "  ".join(f"{r['batch']} {r['method']} {r['ms']:.2f} ms ({r['efficiency']:.2f})"
                                    for r in size["batches"]))
    else:
        print(f"{'whole texts':38}{'tokens/s':>10}{'tokens/step':>13}{'over NTP':>10}{'efficiency':>12}  "
              f"over transformers  text")
        for r in size["generate"]:
            print(f"{r['method']:38}{r['tokens_per_second']:10,.0f}{r['tokens_per_step']:13.2f}{r['over_ntp']:9.2f}x"
                  f"{r['efficiency']:12.2f}{r['over_transformers']:18.2f}x  {'same' if r['same_text'] else 'differs'}")
        for method, note in size["notes"].items():
            print(f"{method} {note}")
        for r in size.get("coupling", []):
            print(f"temperature 1, {r['method']}: {r['coupled']:.2f} tokens/step with the model's noise, "
                  f"{r['argmax']:.2f} without")


def main():
    """Bad input is one line and status 2."""
    args = parse_args()
    with one_line_errors("bench_decode.py", memory="--batches or --sizes"):
        if min(args.blocks + args.batches + [args.prompts, args.rounds]) < 1 or args.blocks[0] != 1:
            raise InputError("numbers must be at least 1, and the first block size 1: the others are compared with it")
        if max(args.blocks) > 256:
            raise InputError(f"blocks of up to 256 tokens can be measured, not {max(args.blocks)}")
        if args.out and Path(args.out).suffix == ".png":
            raise InputError("--out names the JSON file; the figure is written beside it")
        check_output("out", args.out)
        results = bench(args)
        if args.out and {"latency", "generate"} <= set(args.parts):
            draw(results, Path(args.out).with_suffix(".png"))
        print(json.dumps(results))


if __name__ == "__main__":
    main()
