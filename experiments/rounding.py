"""Does rounding change a text?

    python experiments/rounding.py runs/demo --dtype bfloat16

In exact arithmetic every method emits the same text. But a block of N tokens (rows) is computed in
another order than a single one, so where two tokens are nearly equally probable, rounding may
choose the other one (often in bfloat16, hardly ever in float32). Blocks of equally many rows round
alike: the text of a method should be the one that NTP writes in blocks padded to as many rows. And
how often does NTP choose another token in N rows than in one? These flips are counted up to the
first of each text.
"""
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # before PyTorch: Ctrl-C is one line from here on
import torch

from common import (Parser, can_compile, check_output, corpus_of, environment, load_model,
                    one_line_errors, pick_device, progress_bar, write_results)
from decode import Decoder, default_methods, drafting


def flips(texts, others):
    """-> how many texts differ from the others, and the tokens compared: up to the first that
    differs"""
    firsts = [next((i for i, (x, y) in enumerate(zip(*pair)) if x != y), None)
              for pair in zip(texts, others)]
    compared = sum(len(text) if i is None else i + 1 for i, text in zip(firsts, texts))
    return len(firsts) - firsts.count(None), compared


def check_run(args):
    """Continue held-out prompts with every method, and print what differs. -> how many texts differ
    from those of padded NTP"""
    device = pick_device(args.device)
    model, state = load_model(args.run)
    context = model.gpt.config.block_size
    length = max(1, min(64, context // 4))
    n = min(192, context - length)
    corpus = corpus_of(args.run, model, state, args.data)
    prompts = corpus.windows("val", args.prompts, length).tolist()
    methods = args.methods or default_methods(model.offsets)
    draftings = {method: drafting(method, model.offsets) for method in methods}
    model = model.to(device)
    results = dict(environment=environment(device), args=vars(args), rows=[])
    print(f"{'drafts':14}{'temperature':>11}{'rows':>6}{'as padded NTP':>15}{'flips of NTP':>16}")
    for t in args.temperatures:
        alone = Decoder(model, (1,), dtype=getattr(torch, args.dtype), batch_size=args.batch_size,
                        temperature=t, compile=not args.eager and can_compile(device))
        one_row = alone.generate(prompts, n).tokens
        for method in progress_bar(draftings, desc=f"temperature {t:g}", unit="method"):
            decoder = replace(alone, **draftings[method])
            texts = decoder.generate(prompts, n).tokens
            padded = replace(alone, rows=decoder.rows).generate(prompts, n).tokens
            differ, _ = flips(texts, padded)
            flipped, compared = flips(padded, one_row)
            row = dict(method=method, temperature=t, rows=decoder.rows, texts=len(texts),
                       differ_from_padded=differ, flipped=flipped, compared=compared)
            results["rows"].append(row)
            same = f"{len(texts) - differ} of {len(texts)}"
            print(f"{method:14}{t:11g}{decoder.rows:6}{same:>15}{flipped:6} of {compared}",
                  flush=True)
            write_results(args.out, results)
    return sum(row["differ_from_padded"] for row in results["rows"])


def main(argv=None):
    """Check every method of a run. Bad input is one line and status 2; a text that rounding does
    not explain is status 1."""
    p = Parser(prog="rounding.py", description="Continue held-out prompts with every method: is "
               "the text that of NTP in equally long blocks?")
    p.add_argument("run", metavar="RUN", help="a run of train.py, or GPT-2 weights")
    p.option("methods", None, "as in decode.py", nargs="+", metavar="OFFSETS")
    p.option("data", None, "corpus of the prompts; default: the one trained on")
    p.option("prompts", 8, "how many", least=1)
    p.option("batch-size", 1, "prompts decoded at once", least=1)
    p.option("temperatures", [0.0, 1.0], "of the texts", nargs="+", type=float, metavar="T")
    p.option("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    p.option("dtype", "bfloat16", "of the decoder", choices=["float32", "bfloat16"])
    p.option("eager", False, "do not torch.compile the step")
    p.option("out", None, "also write the counts as JSON", metavar="FILE")
    args = p.parse_args(argv)
    with one_line_errors("rounding.py"):
        check_output(args.out)
        return int(check_run(args) > 0)


if __name__ == "__main__":
    sys.exit(main())
