"""Is a text the model's own, but for rounding?

    python experiments/rounding.py runs/demo --dtype bfloat16

In exact arithmetic every method emits the same text. But a block is computed in another order than
a single token, so where two tokens are nearly equally probable, rounding may choose the other one
(often in bfloat16, hardly ever in float32). This script checks each emitted token by teacher
forcing, with the weights in float32, or in float64 if the decoder has float32. A token is the
argmax; or a near-tie, which rounding could have chosen; or neither, which is an error."""
import copy
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Parser, corpus_of, load_model, one_line_errors, pick_device
from decode import Decoder, can_compile, check_prompts, exact_kernels, find_methods, method_name
from model import InputError


@torch.no_grad()
def check_rounding(decoder, prompts, texts):
    """Count the tokens of `texts` that are the argmax, near-ties or neither. prompts, texts: lists
    of token lists; text i was sampled as row i.

    -> dict(argmax, near_tie, neither, margin, largest_gap). Rounding could choose a token whose
    score is at most `margin` below the best: twice the largest difference, on this text and among
    the eight best tokens, between the scores of a pass in the decoder's dtype and exact ones.
    largest_gap is the largest difference that a near-tie needed."""
    exact_dtype = torch.float64 if decoder.dtype == torch.float32 else torch.float32
    exact = copy.deepcopy(decoder.model.gpt).to(exact_dtype)
    counts = dict(argmax=0, near_tie=0, neither=0, margin=0.0, largest_gap=0.0)
    for i, (prompt, new) in enumerate(zip(prompts, texts)):
        text = torch.tensor([[*prompt, *new]], device=decoder.device)
        position = torch.arange(len(prompt), text.shape[1], device=decoder.device)[None]
        row = torch.full((1, 1), i, device=decoder.device)

        def scores_of(gpt):  # (n, V)
            logits = gpt(text[:, :-1])[0][:, len(prompt) - 1:].float()
            return decoder.scores(logits, row, position)[0]
        with exact_kernels(decoder.device):
            scores, rounded = scores_of(exact), scores_of(decoder.model.gpt)
        best = scores.topk(min(8, scores.shape[-1])).indices
        margin = 2 * (scores - rounded).gather(1, best).abs().max()
        gap = scores.amax(-1) - scores.gather(1, text[0, len(prompt):, None])[:, 0]
        near = gap[(gap > 0) & (gap <= margin)]
        counts["argmax"] += int((gap == 0).sum())
        counts["near_tie"] += len(near)
        counts["neither"] += int((gap > margin).sum())
        counts["margin"] = max(counts["margin"], margin.item())
        counts["largest_gap"] = max([counts["largest_gap"], *near.tolist()])
    return counts


def main(argv=None):
    """Check every method of a run. Bad input is one line and status 2, a wrong token status 1."""
    p = Parser(prog="rounding.py", description="Continue held-out prompts with every method, and "
               "count the tokens that are the model's argmax, near-ties, or neither.")
    p.add_argument("run", metavar="RUN", help="a run of train.py, or GPT-2 weights")
    p.add_argument("--methods", nargs="+", metavar="OFFSETS", help="as in decode.py")
    p.add_argument("--data", help="corpus of the prompts; default: the one trained on")
    p.add_argument("--prompts", type=int, default=8, help="how many")
    p.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0], help="of the texts")
    p.add_argument("--compile", default="auto", choices=["auto", "no"],
                   help="torch.compile the step")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    args = p.parse_args(argv)
    with one_line_errors("rounding.py", memory="--prompts"):
        if args.prompts < 1:
            raise InputError("--prompts must be at least 1")
        model, state = load_model(args.run)
        corpus, device = corpus_of(args.run, model, state, args.data), pick_device(args.device)
        how = dict(compile=args.compile == "auto" and can_compile(device),
                   dtype=getattr(torch, args.dtype))
        size = model.gpt.config.block_size
        length = min(64, max(1, size // 4))
        new_tokens = max(1, min(192, size - length))
        prompts = corpus.windows("val", args.prompts, length).tolist()
        check_prompts(prompts, new_tokens, model.gpt.config)
        methods = dict.fromkeys([(), *find_methods(args.run, model, args.methods)])
        model, wrong = model.to(device), 0
        print(f"{'method':10}{'temperature':>12}{'argmax':>8}{'near-tie':>10}{'neither':>9}"
              f"{'margin':>10}{'used':>10}")
        for temperature, tree in itertools.product(args.temperature, methods):
            decoder = Decoder(model, tree=tree, temperature=temperature, **how)
            texts = decoder.generate(prompts, new_tokens).tokens
            found = check_rounding(decoder, prompts, texts)
            wrong += found["neither"]
            print(f"{method_name(tree):10}{temperature:12g}{found['argmax']:8}"
                  f"{found['near_tie']:10}{found['neither']:9}{found['margin']:10.2g}"
                  f"{found['largest_gap']:10.2g}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
