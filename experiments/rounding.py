"""Is a text the model's own, up to rounding?

    python experiments/rounding.py runs/demo --dtype bfloat16

In exact arithmetic every method emits the same text. But a block of N tokens (rows) is computed in
another order than a single one, so where two tokens are nearly equally probable, rounding may
choose the other one (often in bfloat16, hardly ever in float32). Blocks of equally many rows round
alike. So there are two checks:

- Is the text the one that NTP writes in blocks padded to N rows? And how often does NTP choose
  another token in N rows than in one? The "flips" are counted up to the first of each text.
- Is each token the model's own? By teacher forcing, with the weights in float32, or in float64 if
  the decoder has float32, it is the argmax; or a near-tie, which rounding could have chosen; or
  neither, which is an error.
"""
import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (Parser, can_compile, check_output, corpus_of, environment, load_model,
                    one_line_errors, pick_device, progress_bar, write_results)
from decode import Decoder, default_methods, drafting


@torch.no_grad()
def gaps_and_margin(decoder, exact, prompt, new, row):
    """How far below the best score each new token of a text is (n,), and how far below rounding
    could choose a token: twice the largest difference, among the eight best tokens, between the
    scores of a pass in the decoder's dtype and exact ones."""
    idx = torch.tensor([[*prompt, *new]], device=decoder.device)  # (1, T)
    position = torch.arange(len(prompt), idx.shape[1], device=decoder.device)[None]
    row = torch.full_like(position, row)

    def scores_of(gpt):  # (n, V)
        logits = gpt(idx[:, :-1])[:, len(prompt) - 1:]
        return decoder.scores(logits, row, position, decoder.vocab)[0].double()
    scores = scores_of(exact)
    best = scores.topk(min(8, scores.shape[-1])).indices  # (n, 8)
    difference = (scores - scores_of(decoder.model.gpt)).gather(1, best)
    chosen = scores.gather(1, idx[0, len(prompt):, None])[:, 0]
    return scores.amax(-1) - chosen, 2 * difference.abs().max()


def check_rounding(decoder, prompts, texts):
    """Count the tokens of `texts` that are the argmax, near-ties or neither; text i was written
    after prompt i as row i, without top_k and top_p.
    -> dict(argmax, near_tie, neither, margin, largest_gap: of a near-tie)"""
    gpt = decoder.model.gpt
    single = gpt.lm_head.weight.dtype == torch.float32
    exact = copy.deepcopy(gpt).to(torch.float64 if single else torch.float32)
    counts = dict(argmax=0, near_tie=0, neither=0, margin=0.0, largest_gap=0.0)
    for i, prompt in enumerate(prompts):
        gap, margin = gaps_and_margin(decoder, exact, prompt, texts[i], i)
        near = gap[(gap > 0) & (gap <= margin)]
        counts["argmax"] += int((gap == 0).sum())
        counts["near_tie"] += len(near)
        counts["neither"] += int((gap > margin).sum())
        counts["margin"] = max(counts["margin"], margin.item())
        counts["largest_gap"] = max(counts["largest_gap"], *near.tolist(), 0.0)
    return counts


def flips(texts, others):
    """-> how many texts differ from the others, and the tokens compared: up to the first that
    differs"""
    firsts = [next((i for i, (x, y) in enumerate(zip(*pair)) if x != y), None)
              for pair in zip(texts, others)]
    compared = sum(len(text) if i is None else i + 1 for i, text in zip(firsts, texts))
    return len(firsts) - firsts.count(None), compared


def check_run(args):
    """Continue held-out prompts with every method, and print both checks. -> how many texts or
    tokens are wrong"""
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
    print(f"{'drafts':14}{'temperature':>11}{'rows':>6}{'as padded NTP':>15}{'flips of NTP':>16}"
          f"{'argmax':>9}{'near-tie':>10}{'neither':>9}")
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
                       differ_from_padded=differ, flipped=flipped, compared=compared,
                       **check_rounding(decoder, prompts, texts))
            results["rows"].append(row)
            same = f"{len(texts) - differ} of {len(texts)}"
            print(f"{method:14}{t:11g}{decoder.rows:6}{same:>15}{flipped:6} of {compared:<6}"
                  f"{row['argmax']:9}{row['near_tie']:10}{row['neither']:9}", flush=True)
            write_results(args.out, results)
    return sum(row["neither"] + row["differ_from_padded"] for row in results["rows"])


def main(argv=None):
    """Check every method of a run. Bad input is one line and status 2; a text or a token that
    rounding does not explain is status 1."""
    p = Parser(prog="rounding.py", description="Continue held-out prompts with every method: is "
               "the text that of NTP in equally long blocks, and each token the model's own?")
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
