"""Is a text the model's own, up to rounding?

    python experiments/rounding.py runs/demo --dtype bfloat16

In exact arithmetic every method emits the same text. But a block is computed in another order than
a single token, so where two tokens are nearly equally probable, rounding may choose the other one
(often in bfloat16, hardly ever in float32). This script checks each emitted token by teacher
forcing, with the weights in float32, or in float64 if the decoder has float32. A token is the
argmax; or a near-tie, which rounding could have chosen; or neither, which is an error.
"""
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (Parser, can_compile, corpus_of, load_model, one_line_errors, pick_device,
                    progress_bar)
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
        return decoder.scores(logits, row, position)[0].double()
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


def check_run(args):
    """Continue held-out prompts with every method, and print what check_rounding counts. -> how
    many tokens are wrong"""
    device = pick_device(args.device)
    model, state = load_model(args.run)
    context = model.gpt.config.block_size
    length = max(1, min(64, context // 4))
    n = min(192, context - length)
    corpus = corpus_of(args.run, model, state, args.data)
    prompts = corpus.windows("val", args.prompts, length).tolist()
    methods = dict.fromkeys(["1", *(args.methods or default_methods(model.offsets))])
    draftings = {method: drafting(method, model.offsets) for method in methods}
    options = dict(dtype=getattr(torch, args.dtype), batch_size=args.batch_size,
                   compile=not args.eager and can_compile(device))
    cases = [(t, method) for t in args.temperatures for method in draftings]
    model = model.to(device)
    wrong = 0
    print("drafts        temperature    argmax  near_tie   neither    margin  largest_gap")
    for t, method in (bar := progress_bar(cases, unit="case")):
        decoder = Decoder(model, temperature=t, **draftings[method], **options)
        texts = decoder.generate(prompts, n).tokens
        counts = check_rounding(decoder, prompts, texts)
        wrong += counts["neither"]
        numbers = "".join(f"{value:10.3g}" for value in counts.values())
        with bar.external_write_mode():
            print(f"{method:14}{t:11g}{numbers}", flush=True)
    return wrong


def main(argv=None):
    """Check every method of a run. Bad input is one line and status 2, a wrong token status 1."""
    p = Parser(prog="rounding.py", description="Continue held-out prompts with every method, and "
               "count the tokens that are the model's argmax, near-ties, or neither.")
    p.add_argument("run", metavar="RUN", help="a run of train.py, or GPT-2 weights")
    p.option("methods", None, "as in decode.py", nargs="+", metavar="OFFSETS")
    p.option("data", None, "corpus of the prompts; default: the one trained on")
    p.option("prompts", 8, "how many", least=1)
    p.option("batch-size", 1, "prompts decoded at once", least=1)
    p.option("temperatures", [0.0, 1.0], "of the texts", nargs="+", type=float, metavar="T")
    p.option("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    p.option("dtype", "bfloat16", "of the decoder", choices=["float32", "bfloat16"])
    p.option("eager", False, "do not torch.compile the step")
    args = p.parse_args(argv)
    with one_line_errors("rounding.py"):
        return int(check_run(args) > 0)


if __name__ == "__main__":
    sys.exit(main())
