"""Decoding: write several tokens per forward pass, without changing the text.

    python decode.py runs/demo                          # compare NTP, MTP, leap and other methods
    python decode.py runs/demo --prompt "def main("     # continue a text, coloured by distance

A model that predicts several tokens can be its own draft model (blockwise parallel decoding, Stern
et al. 2018). Each step feeds a *block*: the last known token, the root, and a draft token for each
position after it. One forward pass gives, after each token, the *target*: what the model itself
emits there. Drafts are accepted while they equal their targets; the target after the last accepted
one is the *bonus token*, the next root. From the hidden states of the same pass, the heads draft
the next block.

The text cannot change, because every emitted token is the model's own target, given all tokens
before it. At temperature T the target is argmax(logits + T * noise), and the Gumbel noise is a
fixed function of (seed, row, position, token): an exact sample of softmax(logits / T), however
many tokens are verified at once. NTP is the same code with a block of one.
"""
import codecs
import copy
import math
import statistics
import sys
from dataclasses import dataclass, replace
from functools import partial

import data  # before PyTorch: Ctrl-C is one line from here on
import torch
import torch.nn.functional as F

from common import (Parser, can_compile, check_output, clock, corpus_of, environment, load_model,
                    one_line_errors, pick_device, progress_bar, tokenizer_name, write_results)
from data.prepare import get_tokenizer, require
from heads import (DraftHeads, MultiTokenGPT, accepted_drafts, draft_sources, look_up,
                   parse_offsets, step_begins)
from model import causal_mask, empty_cache

# On CUDA a block must be computed nearly as a single token is: sum 16-bit products in float32, and
# avoid cuDNN's attention, which fails under some masks (PyTorch issues 193893, 196678).
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.enable_cudnn_sdp(False)


# ---- The idea: one text, no cache, greedy. The rest is this, made fast -----------------------

@torch.no_grad()
def generate_reference(model, prompt, max_new_tokens, offsets=None):
    """Continue a prompt (a list of tokens) greedily by max_new_tokens. -> the new tokens"""
    sources = draft_sources(offsets or model.offsets)  # {distance: (offset, look-back)}
    text = list(prompt)
    end = len(prompt) + max_new_tokens
    draft = []
    while len(text) < end:
        # Verify: one pass over the text and the drafts gives the target after each of them.
        logits = model(torch.tensor([text + draft]))  # {offset: (1, T, V)}
        target = logits[1][0, len(text) - 1:].argmax(-1).tolist()
        # Accept the drafts that are targets. The target after them is the bonus token.
        n = 0
        while n < len(draft) and draft[n] == target[n]:
            n += 1
        text += draft[:n] + [target[n]]
        # Draft from the newest token read, the one before the bonus token: from distance 2 on. One
        # by one: a sequential head reads the draft before. Looking back ends at the first token.
        newest = len(text) - 2
        draft = []
        for o, b in sources.values():
            if len(text) + len(draft) < end - 1:  # a bonus token follows the last
                logits = model(torch.tensor([text + draft]))[o]
                draft.append(int(logits[0, max(0, newest - b)].argmax()))
    return text[len(prompt):]


# ---- Picking a token -------------------------------------------------------------------------

def gumbel_noise(seed, row, position, tokens):
    """Gumbel(0, 1) noise, a pure function of (seed, row, position, token).

    seed int, modulo 2^48; row and position int64 that broadcast to some (...); tokens (V,) int64
    -> (..., V) float32. The hash is two rounds of xor-shift and multiply on 32-bit words in int64,
    whose products cannot overflow."""
    def mix(x):
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
        return x ^ (x >> 15)
    key = mix(mix(mix(seed) ^ row) ^ position)[..., None]  # (..., 1)
    # tokens + 0x9E3779B9 in 32 bits, as a difference: Inductor's int32 arange would overflow.
    bits = mix(key ^ mix((tokens - 0x61C88647) & 0xFFFFFFFF))  # (..., V)
    uniform = ((bits >> 9).float() + 0.5) * 2.0 ** -23  # in (0, 1), both ends excluded
    return -torch.log(-torch.log(uniform))


def filter_logits(logits, temperature, top_k=None, top_p=1.0):
    """Set to -inf all logits (..., V) but the top_k largest, and then all beyond the smallest set
    of tokens whose probability reaches top_p. Ties of the last kept token are kept."""
    if top_k:
        best = logits.topk(min(top_k, logits.shape[-1])).values
        logits = logits.masked_fill(logits < best[..., -1:], -math.inf)
    if top_p < 1:
        best = logits.amax(-1, keepdim=True)
        probs = ((logits - best) / temperature).softmax(-1)
        step = probs.amax(-1, keepdim=True)  # (..., 1)
        least = torch.zeros_like(step)  # the least probability that is kept, found by bisection,
        for _ in range(24):             # which needs no sort and no cumulative sum
            step = step / 2
            kept = torch.where(probs >= least + step, probs, 0).sum(-1, keepdim=True)
            least = least + step * (kept >= top_p)
        logits = logits.masked_fill(probs < least, -math.inf)
    return logits


# ---- The decoder -----------------------------------------------------------------------------

@dataclass
class Generation:
    """What Decoder.generate returns; the lists have an entry per prompt."""
    tokens: list     # the new tokens (a stop token included)
    distances: list  # from how far ahead each of them was drafted; 1: it was a bonus token
    seconds: float   # wall-clock time, prefill included

    @property
    def steps(self):
        """Forward passes after the prefill, summed over the texts. A step ends with its bonus
        token, unless the text ends before it."""
        return sum(row.count(1) + (row[-1] != 1) for row in self.distances)

    @property
    def tokens_per_step(self):
        """New tokens per text and step."""
        return sum(map(len, self.distances)) / self.steps

    @property
    def accepted(self):
        """{distance: the fraction of steps that emitted a draft from there}"""
        drafted = [j for row in self.distances for j in row]
        return {j: drafted.count(j) / self.steps for j in range(2, max(drafted) + 1)}


@dataclass(eq=False)
class Decoder:
    """Generates text from a MultiTokenGPT. A decoder owns the memory of its texts, so it serves one
    thread. It uses the model's own weights where it can: make a new one after more training. Raises
    InputError for offsets, lengths, temperatures and a top_p that cannot be."""
    model: MultiTokenGPT
    offsets: tuple = None       # those of the model's that may draft; (1,) is NTP, None means all
    batch_size: int = 1         # texts written at once
    lookup: int = 0             # draft so many tokens by prompt lookup, instead of by heads
    temperature: float = 0.0    # 0 is greedy
    top_k: int = None           # sample among the k most probable tokens,
    top_p: float = 1.0          # or among the best tokens that together have this probability
    seed: int = 0               # of the noise
    dtype: torch.dtype = None   # decode with a copy of the model in, say, torch.bfloat16
    compile: bool = False       # torch.compile the step, on CUDA replayed as one graph
    max_length: int = None      # of a text; None: the context (a smaller cache is faster)
    rows: int = 1               # pad blocks to so many tokens: equally long ones round alike
    draft_vocab: list = None    # the only token ids that heads draft, such as the most frequent
    # ones: cheaper where the vocabulary is large, and still the same text (arXiv 2502.14856)

    def __post_init__(self):
        if self.model.training or self.dtype:
            self.model = copy.deepcopy(self.model).eval().to(self.dtype)
        weight = self.model.gpt.lm_head.weight
        config = self.model.gpt.config
        offsets = (1,) if self.lookup else self.offsets or self.model.offsets
        self.offsets = parse_offsets(offsets, self.model.offsets)
        self.max_length = self.max_length or config.block_size
        require(self.max_length <= config.block_size,
                f"max_length must be at most the context of {config.block_size}")
        require(0 <= self.temperature < math.inf and 0 < self.top_p <= 1,
                "temperature must not be negative, and top_p must be in (0, 1]")

        # Draft i of a block, at distance i + 2, comes from head head_index[i], look_back[i] tokens
        # before the newest token that has been read, which is the one before the root.
        sources = draft_sources(self.offsets).values()
        self.head_index = [self.offsets.index(o) - 1 for o, _ in sources]
        look_back = [b for _, b in sources]
        self.N = 1 + (self.lookup or len(sources))    # tokens of a block,
        self.rows = max(self.rows, self.N)            # and with its padding
        self.W = 1 + max(look_back, default=0)        # positions that draft
        # The memory of B texts, of S slots each. The last block may overshoot the end, and
        # attention likes multiples of 16.
        B = self.batch_size
        S = (self.max_length + self.rows + 15) // 16 * 16
        self.device = weight.device
        # On CPUs attention is several times slower in 16 bits.
        cache_dtype = torch.float32 if self.device.type == "cpu" else weight.dtype
        with self.device:
            self.vocab = torch.arange(config.vocab_size)
            self.head_ids = self.vocab  # sorted, so that ties fall as without draft_vocab
            if self.draft_vocab is not None:
                self.head_ids = torch.tensor(sorted(set(self.draft_vocab)))
            self.draft_heads = DraftHeads(self.model, self.offsets, self.head_ids)
            self.source = torch.tensor([self.head_index, look_back])  # (2, N - 1)
            self.slot = torch.arange(S)                       # (S,)
            self.text = torch.arange(B)[:, None]              # (B, 1) numbers the texts
            self.noise_row = self.text.clone()                # (B, 1) keys the sampling noise
            self.tokens = torch.zeros(B, S).long()            # the texts, and drafts after them
            self.distance = torch.zeros_like(self.tokens)     # as in Generation
            self.position = torch.zeros(B).long()             # of each last known token, the root
            self.limit = torch.zeros_like(self.position)      # of each last wanted token
            self.stops = torch.zeros(config.vocab_size) > 0   # which tokens end a text
            self.cache = empty_cache(config, config.n_layer, B, S, cache_dtype, self.device)
            self.head_caches = [
                empty_cache(config, len(head.blocks), B, S, cache_dtype, self.device)
                for head in self.draft_heads.heads if self.draft_heads.attending]
            # What each head computed at a position. Looking back reads it again.
            width = config.n_embd * (3 if self.draft_heads.sequential else 1)
            self.z = torch.zeros(B, S, len(self.offsets) - 1, width, dtype=weight.dtype)
        self.run_step = compile_step(self) if self.compile else self.step

    def step(self):
        """One step of all texts. Nothing in it waits for the host, and all shapes are fixed."""
        start = self.position.clone()  # (B,), because emit changes it
        position = start[:, None] + torch.arange(self.rows, device=self.device)  # (B, rows)
        block = self.tokens[self.text, position]  # the root, its drafts, and any padding
        # Verify: the target after each token of the block.
        h, for_heads = self.forward_block(block, position)  # (B, rows, C), (B, rows, ...)
        target = self.pick(self.model.gpt.lm_head(h), position + 1, self.vocab)
        # Accept the drafts before the first one that is not the target there.
        right = block[:, 1:self.N] == target[:, :self.N - 1]
        n = right.long().cumprod(1).sum(1)  # (B,)
        # Emit them and the bonus token. Draft what follows it.
        self.emit(target, position + 1, n)
        self.draft(for_heads, start, n)

    def forward_block(self, tokens, position):
        """Run tokens (B, T), at `position` (B or 1, T), through the GPT and through heads that
        attend. -> the GPT's hidden states (B, T, C), and (B, T, ...) for DraftHeads.per_position"""
        slots = (position + len(self.slot) * self.text).flatten()
        mask = causal_mask(position, self.slot, self.cache[0].dtype)
        position = position.clamp(max=self.model.gpt.config.block_size - 1)  # if it overshoots
        stream = self.model.gpt.residual_stream(tokens, position, self.cache, slots, mask)
        h = self.model.read(stream)
        return self.model.last_layer(h), self.draft_heads.attend(h, self.head_caches, slots, mask)

    def emit(self, target, position, n):
        """Append the first n (B,) + 1 targets (B, T) to the texts, at `position` (B, T). What lies
        beyond is overwritten by drafts and later steps."""
        i = torch.arange(target.shape[1], device=self.device)
        # Indices mean writing in place to torch.compile, and scatter_ a clone.
        self.tokens[self.text, position] = target
        self.distance[self.text, position] = torch.where(i < n[:, None], i + 2, 1)
        stopped = self.stops[target] & (i <= n[:, None])
        end = torch.where(stopped, position, self.tokens.shape[1]).amin(1)
        self.limit.clamp_(max=end)
        self.position.copy_(torch.minimum(position[:, 0] + n, self.limit))  # a finished one stays

    def draft(self, h, start, n):
        """Draft the next block from h (B, T, ...), from forward_block, of the tokens from `start`
        (B,) on. Those up to the n-th (B,) are of the text."""
        if self.N == 1:
            return
        after = self.position[:, None] + torch.arange(1, self.N, device=self.device)
        if self.lookup:
            drafts = look_up(self.tokens, self.position, self.lookup)
        else:
            z = self.remember(h, start, n)  # (B, N - 1, C or 3C)
            if self.draft_heads.sequential:  # one after another: each reads the draft before
                previous = [self.tokens.gather(1, self.position[:, None])]  # the root
                for j, i in enumerate(self.head_index):
                    logits = self.draft_heads.logits_after(z[:, j:j + 1], i, previous[-1])
                    previous.append(self.pick(logits, after[:, j:j + 1], self.head_ids))
                drafts = torch.cat(previous[1:], dim=1)
            else:
                drafts = self.pick(self.draft_heads.unembed(z), after, self.head_ids)
        self.tokens[self.text, after] = drafts

    def remember(self, h, start, n):
        """Run the heads on h (see draft), keep what they compute -> z (B, N - 1, C or 3C) of the
        heads and positions that draft"""
        # Only the last W positions draft. Where fewer tokens are new, i is 0 more than once.
        back = torch.arange(self.W, device=self.device)
        i = (n[:, None] - back).clamp(min=0)  # (B, W)
        new = self.draft_heads.per_position(h[self.text, i])  # (B, W, H, C or 3C)
        self.z[self.text, start[:, None] + i] = new
        heads, look_back = self.source
        newest = self.position[:, None] - 1  # looking back before the text finds zeros
        return self.z[self.text, newest - look_back, heads]

    def pick(self, logits, position, vocab):
        """logits (B, n, K) of the tokens in vocab (K,), for `position` (B, n) -> tokens (B, n)"""
        return vocab[self.scores(logits, position, vocab).argmax(-1)]

    def scores(self, logits, position, vocab):
        """What `pick` takes the argmax of (B, n, K): at temperature T, logits + T * noise (the
        Gumbel-max trick). The noise belongs to the position, so a head that drafts with it agrees
        more often with the model than one without (Gumbel coupling, Daliri et al. 2024)."""
        if self.temperature == 0:
            return logits
        logits = filter_logits(logits.float(), self.temperature, self.top_k, self.top_p)
        noise = gumbel_noise(self.seed, self.noise_row, position, vocab)
        return logits + self.temperature * noise

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, stop_token=None, first_row=0, on_step=None):
        """Continue each prompt (a list of token lists, of any lengths). -> Generation

        stop_token: an id, or several, after which a text ends. first_row: the first prompt's row
        in the sampling noise, so that texts do not depend on how they are put into batches.
        on_step(): called before each step, to look at the state. Raises InputError
        for prompts that cannot be continued so far."""
        self.check(prompts, max_new_tokens)
        begin = clock(self.device)
        tokens = []
        distances = []
        B = self.batch_size
        for first in range(0, len(prompts), B):
            batch = prompts[first:first + B]
            self.start(batch, max_new_tokens, stop_token, first_row + first)
            while (left := int((self.limit - self.position).max())) > 0:  # waits for the device
                if on_step:
                    on_step()
                steps = -(-left // self.N)  # at least so many, unless a stop token comes
                for _ in range(1 if on_step else min(steps, 16)):
                    self.run_step()
            for i, prompt in enumerate(batch):
                new = slice(len(prompt), int(self.limit[i]) + 1)
                tokens.append(self.tokens[i, new].tolist())
                distances.append(self.distance[i, new].tolist())
        return Generation(tokens, distances, clock(self.device) - begin)

    def start(self, prompts, max_new_tokens, stop_token, first_row):
        """Prefill: read up to batch_size prompts and draft their first blocks. What is cached
        behind a shorter one is overwritten before anything sees it. Spare rows end at once."""
        for state in (self.position, self.limit, self.stops, self.z):
            state.zero_()
        self.noise_row.copy_(self.text + first_row)
        if stop_token is not None:
            self.stops |= torch.isin(self.vocab, torch.tensor(stop_token, device=self.device))
        for i, prompt in enumerate(prompts):
            self.tokens[i, :len(prompt)] = torch.tensor(prompt)
            self.position[i] = len(prompt) - 1
            self.limit[i] = self.position[i] + max_new_tokens
        longest = max(1, max(map(len, prompts)) - 1)
        _, for_heads = self.forward_block(self.tokens[:, :longest], self.slot[None, :longest])
        self.draft(for_heads, torch.zeros_like(self.position), self.position - 1)

    def check(self, prompts, max_new_tokens):
        """Raise InputError unless all prompts can be continued by max_new_tokens."""
        require(prompts and all(prompts), "there is no prompt, or one is empty")
        ids = {token for prompt in prompts for token in prompt}
        require(0 <= min(ids) and max(ids) < len(self.stops), "a prompt has a token id outside 0.."
                f"{len(self.stops) - 1}; is it another tokenizer's?")
        longest = max(map(len, prompts))
        require(0 < max_new_tokens <= self.max_length - longest, f"{longest} prompt tokens and "
                f"{max_new_tokens} new ones do not fit into a length of {self.max_length}")


# ---- Compiling the step ----------------------------------------------------------------------

def compile_step(decoder):
    """decoder.step as one compiled program without arguments, on CUDA as one graph. Compiling runs
    a step: `start` resets what that does to the state.

    On a CPU, products of few rows become loops: of up to nine in a small model, of one in a large
    one in 16 bits. Other weights that are large or of 16 bits are frozen into the program: kernels
    read them packed, at the speed of the memory, Inductor's own for blocks of up to four tokens in
    float32, else oneDNN's (docs/performance.md)."""
    cuda = decoder.device.type == "cuda"
    weight = decoder.model.gpt.lm_head.weight
    float32 = weight.dtype == torch.float32
    large = weight.shape[1] >= 384
    few = 9  # rows of a product that are done in loops
    if large:
        few = 0 if float32 else 1
    if cuda:
        settings = dict(realize_reads_threshold=1)  # the mask once, not anew in each layer
    else:
        settings = dict(
            cpp_wrapper=True,    # C++ calls the kernels, not Python,
            size_asserts=False,  # and does not check every shape again
            freezing=large or not float32,
            max_autotune=large and float32 and decoder.batch_size * decoder.rows <= 4,
            max_autotune_gemm_backends="CPP")  # the only choice: Inductor's own kernels
    # Inductor would take MKL for large products in float32, which is slow on AMD's CPUs. "tf32" has
    # it choose oneDNN. It holds while compiling: the program multiplies in float32.
    onednn = torch.backends.mkldnn.flags(True, None, None, "tf32" if large else "none")
    programs = []

    def inductor(graph, inputs):
        for node in graph.graph.nodes:
            if node.target is F.linear and not cuda:
                node.target = linear
                node.args = (few, *node.args)
        graph.recompile()
        program = torch._inductor.compile(graph, inputs)
        programs.append(partial(program, *inputs))
        return program
    # A step reads and writes the same tensors each time. So the program is kept together with them,
    # and torch.compile, which would collect and check them before every call, runs only once. What
    # it keeps of other decoders' steps is forgotten: it allows eight for a function's code.
    torch._dynamo.reset_code(decoder.step.__code__)
    with torch._inductor.config.patch(settings), onednn, torch.no_grad():
        torch.compile(decoder.step, backend=inductor, fullgraph=True, dynamic=False)()
    return captured(programs[0], decoder.device) if cuda else programs[0]


def linear(few, x, weight, bias=None):
    """F.linear: x (..., C), weight (V, C) -> (..., V). Up to `few` rows are done in loops, because
    a library's call would take longer than its arithmetic. Loops read the weight for each row."""
    if x[..., 0].numel() > few:
        return F.linear(x, weight, bias)
    # Inductor would compute x anew for every output. as_strided has it store x first, but forgets
    # where in a larger tensor x begins, so x is copied.
    x = x.clone(memory_format=torch.contiguous_format)
    x = x.as_strided(x.shape, x.stride())
    y = (x[..., None, :] * weight).sum(-1)
    return y if bias is None else y + bias


def captured(step, device):
    """A step as a CUDA graph: all its kernels in one launch."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # first uses allocate: do them now
                step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            step()
    return lambda keep_alive=step: graph.replay()


# ---- Comparing methods -----------------------------------------------------------------------

METHODS = {"1": "NTP", "lookup": "lookup", "1,2": "MTP", "1,2,3,4": "MTP", "1,3,5,7": "leap",
           "1,2,3,4,5,7": "all"}


def default_methods(offsets):
    """Those of METHODS that these offsets allow, and all offsets, if they are none of METHODS."""
    possible = [method for method in METHODS
                if method == "lookup" or set(parse_offsets(method)) <= set(offsets)]
    own = ",".join(map(str, offsets))
    return possible if own in possible else [*possible, own]


def drafting(method, offsets):
    """The options of a Decoder that drafts by a method, "lookup" or offsets as in "1,2,3,4", of a
    model with these offsets. Raises InputError."""
    if method == "lookup":
        return dict(offsets=(1,), lookup=8)
    return dict(offsets=parse_offsets(method, offsets))


def compare(decoders, prompts, new_tokens, rounds=5):
    """Time decoders {method: Decoder}, the first of which is the baseline, NTP, in turns on the
    same prompts. -> a record per method, with medians over the rounds. "step_cost" has a share of
    the prefill. "identical" compares with the baseline's text; in 16 bits, where longer blocks
    round in another way, with what NTP writes in blocks as long as the method's."""
    expected = {}
    runs = {method: [] for method in decoders}
    for method, decoder in progress_bar(decoders.items(), desc="prepare"):
        decoder.generate(prompts[:1], 1)  # first uses are slow
        if decoder.rows > 1 and decoder.model.gpt.lm_head.weight.dtype != torch.float32:
            ntp = replace(decoder, offsets=(1,), lookup=0)
            expected[method] = ntp.generate(prompts, new_tokens).tokens
    for method in progress_bar([*decoders] * rounds, desc="measure"):
        runs[method].append(decoders[method].generate(prompts, new_tokens))
    records = []
    baseline, *_ = runs.values()
    for method, found in runs.items():
        g = found[0]
        speedup = statistics.median(a.seconds / b.seconds for a, b in zip(baseline, found))
        seconds = statistics.median(g.seconds for g in found)
        records.append(dict(
            method=method,
            tokens_per_step=g.tokens_per_step,
            step_cost=g.tokens_per_step / speedup,
            speedup=speedup,
            tokens_per_second=new_tokens * len(prompts) / seconds,
            identical=g.tokens == expected.get(method, baseline[0].tokens),
            accepted=g.accepted))
    return records


def print_table(records):
    """Print records of `compare`."""
    print(f"{'':8}{'drafts':14}{'tokens/step':>11}{'step cost':>11}{'speedup':>9}{'tokens/s':>10}"
          f"  {'text':11}accepted at distance 2, 3, ...")
    for r in records:
        accepted = " ".join(f"{fraction:4.0%}" for fraction in r["accepted"].values())
        print(f"{METHODS.get(r['method'], ''):8}{r['method']:14}{r['tokens_per_step']:11.2f}"
              f"{r['step_cost']:11.2f}{r['speedup']:8.2f}x{r['tokens_per_second']:10,.0f}  "
              f"{'identical' if r['identical'] else 'DIFFERS':11}{accepted}")


def report(model, state, options, args):
    """Compare methods on greedy, sampled and real text, and print it."""
    context = model.gpt.config.block_size
    corpus = corpus_of(args.run, model, state, args.data)
    length = min(64, context // 4)
    n = min(args.new_tokens, context - length)
    prompts = corpus.windows("val", args.prompts, length).tolist()
    device = model.gpt.lm_head.weight.device
    windows = corpus.windows("val", 32, context).to(device)
    methods = ["1", *(args.methods or default_methods(model.offsets))]
    draftings = {method: drafting(method, model.offsets) for method in methods}
    options |= dict(batch_size=args.batch_size, max_length=length + n)
    Decoder(model, **options)  # errors come before the work
    options["compile"] = not args.eager and can_compile(device)
    print(f"{args.run}: offsets {model.offsets}; {len(prompts)} prompts, {n} new tokens each, "
          f"{args.dtype} on {device}, {'compiled' if options['compile'] else 'eager'}")
    results = dict(environment=environment(device), args=vars(args))
    for temperature in sorted({0.0, args.temperature}):
        options["temperature"] = temperature
        bar = progress_bar(draftings.items(), desc="make decoders")
        decoders = {method: Decoder(model, **options, **own) for method, own in bar}
        records = compare(decoders, prompts, n)
        title = f"sampled text, temperature {temperature:g}" if temperature else "greedy text"
        print(f"\n{title}")
        print_table(records)
        results[title] = records
        write_results(args.out, results)
    print(f"\nreal text, held out of {corpus.folder.name}: tokens per step")
    results["real text"] = {}
    for method, own in draftings.items():
        accepted = accepted_drafts(model, windows=windows, **own)
        begins = step_begins(accepted, length - 1)
        tokens_per_step = windows[:, length:].numel() / begins.sum().item()
        results["real text"][method] = tokens_per_step
        print(f"{METHODS.get(method, ''):8}{method:14}{tokens_per_step:11.2f}")
    write_results(args.out, results)


# ---- Streaming one text ----------------------------------------------------------------------

SHADES = (157, 121, 86, 81, 75, 105, 141, 177)  # 256-colour codes of distances 2, 3, ...


def paint(text, distance):
    """A token's text for a terminal, coloured by the distance of its draft, if it was drafted and
    ends no line: the colour would go on in the next one."""
    if distance < 2 or "\n" in text:
        return text
    return f"\033[38;5;16;48;5;{SHADES[(distance - 2) % 8]}m{text}\033[0m"


def stream(model, state, options, args):
    """Print the continuation of --prompt as it is accepted, until the text ends."""
    tokenizer = get_tokenizer(tokenizer_name(model, state))
    prompt = tokenizer.encode_ordinary(args.prompt)
    n = max(1, min(args.new_tokens, model.gpt.config.block_size - len(prompt)))
    method = (args.methods or default_methods(model.offsets))[-1]
    decoder = Decoder(model, **options, **drafting(method, model.offsets))
    color = sys.stdout.isatty()
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
    shown = 0

    def show():  # what is new, at first the prompt
        nonlocal shown
        end = int(decoder.position[0]) + 1
        for i in range(shown, end):
            token = int(decoder.tokens[0, i])
            distance = int(decoder.distance[0, i])
            if token < tokenizer.eot_token:
                text = utf8.decode(tokenizer.decode_single_token_bytes(token))
                text = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1]
                               for c in text)
                print(paint(text, distance) if color else text, end="", flush=True)
        shown = end
    g = decoder.generate([prompt], n, tokenizer.eot_token, on_step=show)
    show()
    print(utf8.decode(b"", final=True))
    print(f"drafts {method}: {len(g.tokens[0])} tokens in {g.steps} steps, {g.tokens_per_step:.2f} "
          f"per step, {g.seconds:.1f} s", file=sys.stderr)


# ---- The command line ------------------------------------------------------------------------

def main(argv=None):
    """Compare methods, or continue a text. Bad input is one line and status 2."""
    p = Parser(prog="decode.py", description="Compare NTP, prompt lookup, MTP and leap decoding: "
               "tokens per step, what a step costs in NTP's steps, and speedup, which is their "
               "quotient. Or continue a --prompt.")
    p.add_argument("run", metavar="RUN", help="a run of train.py, or weights of a GPT-2: gpt2, a "
                   "folder, a file")
    p.option("prompt", None, "stream the continuation of this text; a token's colour is the "
             "distance of its draft", metavar="TEXT")
    p.option("methods", None, "as in: 1,2,3,4 1,3,5,7 lookup; default: all that the offsets allow, "
             "to stream: the last of them", nargs="+", metavar="OFFSETS")
    p.option("temperature", 1.0, "of sampled text")
    p.option("top-k", None, "sample among the k most probable tokens", type=int, least=1)
    p.option("top-p", 1.0, "sample among the best tokens of this probability")
    p.option("seed", 0, "of the sampling noise")
    p.option("new-tokens", 192, "how many to write, as far as the context goes", least=1)
    p.option("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    p.option("dtype", "float32", "in bfloat16 near-ties may fall another way: "
             "experiments/rounding.py", choices=["float32", "bfloat16"])
    p.group = p.add_argument_group("to compare")
    p.option("data", None, "corpus of the held-out prompts; default: the one trained on")
    p.option("prompts", 32, "how many", least=1)
    p.option("batch-size", 1, "prompts decoded at once", least=1)
    p.option("eager", False, "do not torch.compile the step")
    p.option("out", None, "also write the comparison as JSON", metavar="FILE")
    args = p.parse_args(argv)
    with one_line_errors("decode.py"):
        check_output(args.out)
        device = pick_device(args.device)
        model, state = load_model(args.run)
        model = model.to(device, getattr(torch, args.dtype))
        options = dict(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                       seed=args.seed)
        if args.prompt is None:
            return report(model, state, options, args)
        for name in ("data", "prompts", "batch_size", "eager", "out"):
            require(getattr(args, name) == p.get_default(name),
                    f"--{name.replace('_', '-')} does not go with --prompt")
        stream(model, state, options, args)


if __name__ == "__main__":
    main()
