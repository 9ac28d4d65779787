"""Look at a generated text token by token: which tokens were drafted, how far ahead, and what else
was drafted.

    python experiments/trace_page.py runs/demo page.html --prompt "def main("    # a page to open
"""
import codecs
import html
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # before PyTorch: Ctrl-C is one line from here on
from common import (Parser, atomic_write, check_output, load_model, one_line_errors, pick_device,
                    tokenizer_name)
from data.prepare import get_tokenizer
from decode import METHODS, Decoder, default_methods, drafting
from heads import draft_sources


def parts(tokens, tokenizer):
    """What each token adds to the text. A token may end inside a character."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    return [utf8.decode(tokenizer.decode_single_token_bytes(token)) for token in tokens]


def block_of(decoder):
    """The first text's next block: its root, and the drafts behind it."""
    root = int(decoder.position[0])
    return decoder.tokens[0, root:root + decoder.N].tolist()


def split_steps(tokens, distances):
    """[(token, distance), ...] for each step. A bonus token, distance 1, ends its step; the last
    step may be cut short."""
    steps = [[]]
    for token, distance in zip(tokens, distances):
        steps[-1].append((token, distance))
        if distance == 1:
            steps.append([])
    return steps if steps[-1] else steps[:-1]


def trace(generation, blocks, sources, tokenizer):
    """What the page shows of the first text. blocks: N tokens before each step; sources:
    {distance: (offset, look-back)}, empty if no head drafts"""
    distances = generation.distances[0]
    shown = parts(generation.tokens[0], tokenizer)
    tokens = []
    steps = []
    for step, block in zip(split_steps(shown, distances), blocks):
        tokens += [[part, len(steps), distance] for part, distance in step]
        accepted = sum(distance > 1 for _, distance in step)
        alone = tokenizer.decode_tokens_bytes(block)  # each may be a part of a character
        rejected = [[alone[i].decode("utf-8", "replace"), i + 1]
                    for i in range(1 + accepted, len(block))]
        rate = len(tokens) / (len(steps) + 1)
        steps.append(dict(accepted=accepted, rejected=rejected, rate=rate))
    N = len(blocks[0])
    origins = {j: f"distance {j}, by prompt lookup" for j in range(2, N + 1)}
    for j, (offset, look_back) in sources.items():
        origins[j] = f"distance {j}, offset {offset}, look-back {look_back}"
    about = (f"{len(tokens)} tokens in {len(steps)} steps, {rate:.2f} per step; each step is one "
             f"forward pass of {N} token{'s' * (N > 1)}. Hover over a token.")
    return dict(about=about, tokens=tokens, steps=steps, origins=origins,
                back=[j for j, (_, look_back) in sources.items() if look_back])


def html_page(title, prompt, traced):
    """A page that needs no other file."""
    data = json.dumps(dict(traced, prompt=prompt)).replace("<", "\\u003c")  # text ends no script
    return PAGE.replace("{{title}}", html.escape(title)).replace("{{data}}", data)


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{title}}</title>
<style>
:root { color-scheme: light; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 58rem; margin: 1.5rem auto; padding: 0 1.5rem; color: #222 }
h1 { font-size: 1.25rem; margin: 0 } p { margin: .2rem 0 .8rem }
pre { font: 15px/1.65 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
      margin: .8rem 0 1.2rem; border: 1px solid #ccc; border-radius: 6px; padding: .8rem 1rem }
.prompt { color: #888 } .draft { border-radius: 2px }
.back { text-decoration: underline; text-underline-offset: 3px }
.same { box-shadow: inset 0 -4px #d33 }
.key { padding: 0 .6em; margin-left: .4em; display: inline-block }
#tip { position: fixed; display: none; padding: .5rem .7rem; font-size: 13px; white-space: pre-wrap;
       border-radius: 6px; background: #222; color: #eee; pointer-events: none }
</style>
<h1>{{title}}</h1>
<p id="about"></p>
<div id="keys"></div>
<pre id="text"></pre>
<div id="tip"></div>
<script>
const data = {{data}};
const get = id => document.getElementById(id), tip = get("tip"), spans = [];
const colour = distance => `hsl(${95 + 38 * Math.min(distance - 2, 6)} 75% 80%)`;

function add(parent, text, className) {
  const e = document.createElement("span");
  parent.append(Object.assign(e, { textContent: text, className }));
  return e;
}

function showStep(step, event, origin) {
  for (const s of spans) s.classList.toggle("same", s.step === step);
  const { accepted, rate, rejected } = data.steps[step];
  const lines = [origin, `step ${step + 1}: ${accepted} of ${accepted + rejected.length} ` +
                 `drafts accepted, ${rate.toFixed(2)} tokens per step so far`];
  if (rejected.length) lines.push("not accepted in this step:");
  for (const [text, j] of rejected) lines.push(`   ${JSON.stringify(text)}  ${data.origins[j]}`);
  tip.textContent = lines.join("\\n");
  tip.style.display = "block";
  const below = event.clientY + 20 + tip.offsetHeight < innerHeight;
  tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = event.clientY + (below ? 20 : -10 - tip.offsetHeight) + "px";
}

get("about").textContent = data.about;
add(get("keys"), "drafted at distance", "");
for (const j of Object.keys(data.origins))
  add(get("keys"), j, "draft key").style.background = colour(j);
if (data.back.length) add(get("keys"), "underlined: by looking back", "key back");
add(get("keys"), "plain: a bonus token", "key");

add(get("text"), data.prompt, "prompt");
for (const [text, step, j] of data.tokens) {
  const back = data.back.includes(j) ? " back" : "";
  const e = add(get("text"), text, j > 1 ? "draft" + back : "");
  if (j > 1) e.style.background = colour(j);
  e.step = step;
  spans.push(e);
  const origin = `${JSON.stringify(text)}: ${j > 1 ? data.origins[j] : "the bonus token"}`;
  e.onmousemove = event => showStep(step, event, origin);
  e.onmouseleave = () => {
    tip.style.display = "none";
    for (const s of spans) s.classList.remove("same");
  };
}
</script>
</html>
"""


def main(argv=None):
    """Generate a text and write the page. Bad input is one line and status 2."""
    p = Parser(prog="trace_page.py", description="Generate a text, and write a page that shows "
               "which tokens were drafted, and from where.")
    p.add_argument("run", metavar="RUN", help="a run of train.py, or GPT-2 weights")
    p.add_argument("page", metavar="PAGE", help="the HTML file to write")
    p.option("prompt", "def ", "the text to continue", metavar="TEXT")
    p.option("method", None, "as in decode.py; default: all offsets, or lookup without heads")
    p.option("new-tokens", 192, "tokens to write, at most", least=1)
    p.option("temperature", 1.0, "0 is greedy")
    p.option("seed", 0, "of the sampling noise")
    p.option("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    args = p.parse_args(argv)
    with one_line_errors("trace_page.py"):
        check_output(args.page or ".")
        model, state = load_model(args.run)
        tokenizer = get_tokenizer(tokenizer_name(model, state))
        method = args.method or default_methods(model.offsets)[-1]
        options = drafting(method, model.offsets)
        prompt = tokenizer.encode_ordinary(args.prompt)
        n = min(args.new_tokens, max(1, model.gpt.config.block_size - len(prompt)))
        decoder = Decoder(model.to(pick_device(args.device)), temperature=args.temperature,
                          seed=args.seed, **options)
        blocks = []
        g = decoder.generate([prompt], n, tokenizer.eot_token,
                             on_step=lambda: blocks.append(block_of(decoder)))
        words = dict.fromkeys([METHODS.get(method, "all offsets"), method])  # "lookup" is both
        title = f"{' '.join(words)}, temperature {args.temperature:g}"
        traced = trace(g, blocks, draft_sources(options["offsets"]), tokenizer)
        with atomic_write(args.page) as f:
            f.write(html_page(title, args.prompt, traced).encode())
        print(f"{title}: {g.tokens_per_step:.2f} tokens per step; open {args.page}")


if __name__ == "__main__":
    main()
