"""Look at a generated text token by token: which tokens were drafted, how far ahead, and what else
was drafted.

    python experiments/trace_page.py runs/demo --prompt "def main("     # one bracket per step
    python experiments/trace_page.py runs/demo --html page.html         # hover over a token

(`python decode.py RUN --prompt TEXT` only prints the text, coloured on a terminal.)
"""
import codecs
import html
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import (Parser, check_output, load_model, one_line_errors, pick_device, tokenizer_of,
                    write_whole)
from decode import Decoder, check_prompts, depths, find_methods, method_name, offsets_of


def brackets(tokens, nodes, tokenizer):
    """The text with one pair of brackets around the tokens of each step: "[a][b c d]"."""
    utf8, out, text = codecs.getincrementaldecoder("utf-8")("replace"), [], ""
    for token, node in zip(tokens, nodes):
        # A token may end inside a character.
        text += utf8.decode(tokenizer.decode_single_token_bytes(token))
        if node == 0:  # the bonus token ends its step
            out.append(f"[{text}]")
            text = ""
    return "".join(out) + (f"[{text}]" if text else "")  # the last step may be cut short


def html_page(title, generation, history, tree, tokenizer, prompt):
    """A self-contained page of the first text. Tokens are coloured by distance; hovering over one
    shows where it came from, what else the step drafted, and the tokens per step so far.

    history: the root's position and the block before each step, (int, list of N tokens)."""
    depth, utf8 = depths(tree), codecs.getincrementaldecoder("utf-8")("replace")

    def origin(i):  # distance, offset, look-back, rank
        return [depth[i] + 1, *tree[i - 1][1:]]

    def alone(token):  # it may be a part of a character
        return tokenizer.decode_single_token_bytes(token).decode("utf-8", "replace")
    tokens, steps, done = [], [], 0
    roots = [position for position, _ in history] + [len(prompt) + len(generation.tokens[0]) - 1]
    for (_, block), here, there in zip(history, roots, roots[1:]):
        nodes = generation.nodes[0][done:done + there - here]
        for token, i in zip(generation.tokens[0][done:], nodes):
            part = utf8.decode(tokenizer.decode_single_token_bytes(token))
            tokens.append([part, len(steps), origin(i) if i else None])
        done += there - here
        rejected = [[alone(block[i]), *origin(i)] for i in range(1, len(block)) if i not in nodes]
        steps.append(dict(accepted=sum(i > 0 for i in nodes), rejected=rejected,
                          rate=done / (len(steps) + 1)))
    about = (f"{done} tokens in {len(steps)} steps, {done / len(steps):.2f} per step; each step "
             f"is one forward pass of {len(depth)} tokens. Hover over a token.")
    data = dict(tokens=tokens, steps=steps, about=about, prompt=tokenizer.decode(prompt),
                distances=sorted({d + 1 for d in depth[1:]}),
                back=any(node.look_back for node in tree))
    safe = json.dumps(data).replace("<", "\\u003c")  # no text can end the script
    page = (ROOT / "docs" / "generation.html").read_text()
    return page.replace("{{title}}", html.escape(title)).replace("{{data}}", safe)


def main(argv=None):
    """Generate a text and show it. Bad input is one line and status 2."""
    p = Parser(prog="trace_page.py", description="Generate a text and show which tokens were "
               "drafted, and from where.")
    p.add_argument("run", metavar="RUN", help="a run of train.py, or GPT-2 weights")
    p.add_argument("--prompt", default="def ", metavar="TEXT", help="the text to continue")
    p.add_argument("--method", metavar="OFFSETS", help="offsets or \"tree\"; default: the tree if "
                   "there is one, else all offsets")
    p.add_argument("--new-tokens", type=int, default=192, help="tokens to write, at most")
    p.add_argument("--temperature", type=float, default=1.0, help="0: greedy")
    p.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--html", metavar="FILE", help="also write a page to look at")
    args = p.parse_args(argv)
    with one_line_errors("trace_page.py", memory="--new-tokens"):
        check_output("html", args.html)
        model, state = load_model(args.run)
        tokenizer, history = tokenizer_of(args.run, model, state), []
        tree = find_methods(args.run, model, args.method and [args.method])[-1]
        prompt = tokenizer.encode_ordinary(args.prompt)
        n = min(args.new_tokens, max(1, model.gpt.config.block_size - len(prompt)))
        check_prompts([prompt], n, model.gpt.config)
        decoder = Decoder(model.to(pick_device(args.device)), tree=tree,
                          temperature=args.temperature, seed=args.seed)
        g = decoder.generate([prompt], n, tokenizer.eot_token, on_step=lambda s: history.append(
            (int(s.position[0]), s.block[0].tolist())))
        offsets = ",".join(map(str, offsets_of(tree)))
        title = f"{method_name(tree)} {offsets}, temperature {args.temperature:g}"
        print(f"{title}: {g.tokens_per_step:.2f} tokens per step, one step per bracket\n")
        print(args.prompt + brackets(g.tokens[0], g.nodes[0], tokenizer))
        if args.html:
            write_whole(args.html, html_page(title, g, history[:-1], tree, tokenizer, prompt))
            print(f"\nwritten to {args.html}")


if __name__ == "__main__":
    main()
