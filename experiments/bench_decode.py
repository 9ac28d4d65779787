"""How fast decoding is, and what limits it.

    python experiments/bench_decode.py --out experiments/results/bench_cpu.json    # one step
    python experiments/bench_decode.py --run runs/demo                             # whole texts

To emit one token, a model reads all its weights from memory and does so little arithmetic with
each that the reading takes the time: decoding is *memory-bound*. A block of N tokens reads the
same weights once. As long as arithmetic is free, its step takes no longer than that of one token,
and every accepted draft is a gain. That is what multi-token decoding lives on. It ends where the
block, or the batch, is so large that arithmetic is no longer free (*compute-bound*), which comes
early on a machine with much bandwidth and few arithmetic units. A toy model is limited by neither,
but by the fixed cost of launching each operation.

- latency: the time of a step; its cost in steps of NTP is what a method must emit to pay. Where the
  vocabulary is large, sequential heads also draft among 8,192 tokens, because each of their drafts
  reads the unembedding once more.
- texts: whole greedy texts, beside transformers' generate, which has prompt lookup, too. Speedup /
  tokens per step would be 1 if drafting were free. In 16 bits a text may differ by rounding:
  decode.py compares it with that of NTP in equally long blocks.

The methods take turns within one run, and medians are shown.
"""
import itertools
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # before PyTorch: Ctrl-C is one line from here on
import torch

from common import (Parser, can_compile, check_output, clock, corpus_of, environment, load_model,
                    one_line_errors, pick_device, progress_bar, write_results)
from data.prepare import InputError, require
from decode import Decoder, drafting
from heads import HeadsConfig, MultiTokenGPT, parse_offsets
from model import GPT, TRANSPOSED, GPTConfig

SIZES = {  # GPT-2's real shapes; toy is the demo's
    "toy": dict(n_layer=4, n_head=2, n_embd=96, vocab_size=257, block_size=256),
    "124M": dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, block_size=1024),
    "1.5B": dict(n_layer=48, n_head=25, n_embd=1600, vocab_size=50257, block_size=1024),
}
OFFSETS = (1, 2, 3, 4, 5, 7)
METHODS = {"NTP": "1", "lookup": "lookup", "MTP-1": "1,2", "MTP": "1,2,3,4", "leap": "1,3,5,7",
           "all": "1,2,3,4,5,7"}
FEW = 8192    # tokens to draft among (FR-Spec, arXiv 2502.14856)
PROMPT = 64   # tokens
NEW = 184     # so that transformers' prompt lookup, whose drafts overshoot, stays in the context
LENGTH = PROMPT + NEW


def seconds_of(f, times, device):
    """How long one call of f takes, of several."""
    begin = clock(device)
    for _ in range(times):
        f()
    return (clock(device) - begin) / times


# ---- One step --------------------------------------------------------------------------------

@torch.inference_mode()
def step_seconds(decoders, rounds):
    """The median time of a step of each decoder, in turns of 50 ms or more, so that small weights
    stay in a CPU's caches as they do in a text. A finished text does the same work as one that is
    being written, and stays as it is."""
    for decoder in decoders:
        decoder.position.fill_(decoder.max_length // 2)
        decoder.limit.copy_(decoder.position)
    first = [seconds_of(d.run_step, 10, d.device) for d in decoders]  # also touches all memory
    times = [max(10, int(0.05 / t)) for t in first]
    found = [[seconds_of(d.run_step, n, d.device) for d, n in zip(decoders, times)]
             for _ in range(rounds)]
    return [statistics.median(seconds) for seconds in zip(*found)]


def latency_cases(args, vocab_size):
    """What bench_latency measures: a list of (heads, method, draft_vocab, rows), NTP first."""
    plain = ["NTP", *(["lookup"] if "lookup" in args.methods else [])]
    cases = [("", method, None, 1) for method in plain]
    cases += [("", "NTP", None, rows) for rows in args.rows]
    for kind, method in itertools.product(args.heads, args.methods):
        if method not in ("NTP", "lookup"):
            cases.append((kind, method, None, 1))
            if kind == "sequential" and vocab_size > 2 * FEW:
                cases.append((kind, method, FEW, 1))
    return cases


def bench_latency(gpt, args, compile):
    """-> a dict for each batch size and case; cost: in steps of NTP"""
    weight = gpt.lm_head.weight
    cases = latency_cases(args, len(weight))
    rows = []
    for batch in args.batches:
        decoders = []
        for kind, method, few, n in progress_bar(cases, desc=f"prepare batch {batch}"):
            model = MultiTokenGPT(gpt, HeadsConfig(OFFSETS, sequential=kind == "sequential"))
            decoders.append(Decoder(
                model.to(weight.device, weight.dtype).eval(), batch_size=batch, max_length=LENGTH,
                draft_vocab=few and range(few), rows=n, compile=compile,
                **drafting(METHODS[method], OFFSETS)))
        seconds = step_seconds(decoders, args.rounds)
        for decoder, (kind, method, few, _), t in zip(decoders, cases, seconds):
            rows.append(dict(batch=batch, heads=kind, method=method, draft_vocab=few or "all",
                             rows=decoder.rows, ms=1e3 * t, cost=t / seconds[0]))
    return rows


# ---- Whole texts -----------------------------------------------------------------------------

def transformers_model(gpt):
    """transformers' GPT-2 with this GPT's weights. Raises InputError if there is none."""
    try:
        import transformers
    except ImportError:
        raise InputError("the comparison needs a package: pip install transformers") from None
    transformers.logging.set_verbosity_error()
    shape = dict(vars(gpt.config), n_positions=gpt.config.block_size)
    del shape["dropout"], shape["block_size"]
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    theirs.load_state_dict({key: t.T if key.endswith(TRANSPOSED) else t
                            for key, t in gpt.state_dict().items()})
    weight = gpt.lm_head.weight
    return theirs.to(weight.device, weight.dtype).eval()


@torch.inference_mode()  # as ours
def theirs_writes(theirs, prompt, **options):
    """-> new tokens, how many forward passes they took"""
    passes = []
    idx = torch.tensor([prompt], device=theirs.device)
    hook = theirs.register_forward_hook(lambda *_: passes.append(1))
    out = theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=NEW,
                          min_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None,
                          **options)
    hook.remove()
    return out[0, len(prompt):].tolist(), len(passes)


def ours_writes(decoder, prompt):
    """-> new tokens, how many steps they took"""
    g = decoder.generate([prompt], NEW)
    return g.tokens[0], g.steps


def bench_texts(model, prompts, args, compile):
    """-> a dict for each method"""
    device = model.gpt.lm_head.weight.device
    theirs = transformers_model(model.gpt)
    writers = {"transformers": partial(theirs_writes, theirs),
               "transformers, lookup": partial(theirs_writes, theirs, prompt_lookup_num_tokens=8)}
    if compile:
        fast = transformers_model(model.gpt)
        fast.forward = torch.compile(fast.forward, dynamic=False)
        writers["transformers, compiled"] = partial(theirs_writes, fast,
                                                    cache_implementation="static")
    for name in progress_bar(dict.fromkeys(["NTP", *args.methods]), desc="prepare", unit="decoder"):
        method = METHODS[name]
        if method == "lookup" or set(parse_offsets(method)) <= set(model.offsets):
            writers[name] = partial(ours_writes, Decoder(
                model, max_length=LENGTH, compile=compile, **drafting(method, model.offsets)))
    seconds = {name: [] for name in writers}
    written = {name: [] for name in writers}
    for prompt in progress_bar(prompts[:1] + prompts * args.rounds, desc="write", unit="prompt"):
        for name, write in writers.items():
            begin = clock(device)
            written[name].append(write(prompt))
            seconds[name].append(clock(device) - begin)

    rows = []
    for name in writers:
        per_step = NEW * len(written[name]) / sum(steps for _, steps in written[name])
        pairs = zip(seconds["NTP"][1:], seconds[name][1:])  # the first touched all memory
        gain = statistics.median(ntp / own for ntp, own in pairs)
        same = all(a == b for (a, _), (b, _) in zip(written[name], written["NTP"]))
        rows.append({
            "method": name, "tokens/step": per_step,
            "tokens/s": NEW / statistics.median(seconds[name][1:]), "speedup": gain,
            "step cost": per_step / gain, "speedup / (tokens/step)": gain / per_step,
            "text": "identical" if same else "DIFFERS"})
    return rows


# ---- The command line ------------------------------------------------------------------------

def print_table(rows):
    """Print dicts with the same keys."""
    cells = [[f"{v:,.2f}" if isinstance(v, float) else str(v) for v in row.values()]
             for row in rows]
    widths = [2 + max(map(len, column)) for column in zip(rows[0], *cells)]
    for line in (rows[0], *cells):
        print("".join(cell.rjust(width) for cell, width in zip(line, widths)))


def load(name, args, device):
    """A model of a size, with random weights, or the trained run; and prompts."""
    torch.manual_seed(0)
    if name in SIZES:
        with device:  # on a GPU a large model is initialised much faster
            model = MultiTokenGPT(GPT(GPTConfig(**SIZES[name])), HeadsConfig(OFFSETS))
        prompts = torch.randint(0, 250, (args.prompts, PROMPT))
    else:
        model, state = load_model(name)
        require(model.gpt.config.block_size >= LENGTH + 8, f"{name} has too short a context")
        prompts = corpus_of(name, model, state, args.data).windows("val", args.prompts, PROMPT)
    return model.to(device, getattr(torch, args.dtype)).eval(), prompts.tolist()


def bench(args):
    """Measure, print and write every part."""
    device = pick_device(args.device)
    names = [args.run] if args.run else [*SIZES][:3 if device.type == "cuda" else 2]
    compile = not args.eager and can_compile(device)
    results = dict(environment=environment(device), args=vars(args), compile=compile)
    for name in args.sizes or names:
        model, prompts = load(name, args, device)
        results[name] = {}
        for part in args.parts or ["latency" if name in SIZES else "texts"]:
            print(f"\n{part} of {name}, {args.dtype}", flush=True)
            if part == "latency":
                rows = bench_latency(model.gpt, args, compile)
            else:
                rows = bench_texts(model, prompts, args, compile)
            print_table(rows)
            results[name][part] = rows
            write_results(args.out, results)


def main(argv=None):
    """Bad input is one line and status 2."""
    p = Parser(prog="bench_decode.py", description="Benchmark decoding: the latency of a step, "
               "and whole texts beside transformers.")
    kinds = ["independent", "sequential"]
    p.option("run", None, "a trained run, in place of the sizes, which have random weights")
    p.option("sizes", None, "default: toy 124M, and 1.5B on CUDA", nargs="+", choices=[*SIZES])
    p.option("parts", None, "what to measure; default: latency of sizes, texts of a run",
             nargs="+", choices=["latency", "texts"])
    p.option("methods", [*METHODS], "which", nargs="+", choices=[*METHODS])
    p.option("heads", kinds, "of latency", nargs="+", choices=kinds)
    p.option("rows", [], "also time NTP in blocks padded to so many rows", nargs="+", type=int)
    p.option("batches", [1, 8], "batch sizes of latency", nargs="+", type=int, least=1)
    p.option("data", None, "corpus of the run's prompts; default: the one trained on")
    p.option("prompts", 2, "texts", least=1)
    p.option("rounds", 7, "timed repetitions; medians are shown", least=1)
    p.option("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    p.option("dtype", "float32", "of the weights", choices=["float32", "bfloat16"])
    p.option("eager", False, "do not torch.compile the step")
    p.option("out", None, "write the results as JSON, after every part", metavar="FILE")
    args = p.parse_args(argv)
    with one_line_errors("bench_decode.py"):
        check_output(args.out)
        bench(args)


if __name__ == "__main__":
    main()
