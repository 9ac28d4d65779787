"""Trees of drafts: the worked example of extending the decoder.

    python experiments/trees.py runs/demo             # finds this machine's best tree for a run
    python experiments/trees.py runs/demo --decode    # compares it with the chains

In a chain, all that follows a wrong draft is lost. A tree (Medusa, Cai et al. 2024) holds
alternatives: the second-best token, or what another head says, each with drafts of its own after
it. One forward pass verifies all, because a node sees its ancestors only. The longest right path is
accepted, and its keys and values are kept.
"""
import json
import sys
from dataclasses import astuple, dataclass
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # before PyTorch: Ctrl-C is one line from here on
import torch
import torch.nn.functional as F

from common import (Parser, can_compile, corpus_of, environment, load_model, one_line_errors,
                    pick_device, progress_bar, write_results)
from data.prepare import require
from decode import Decoder, compare, compile_step, default_methods, drafting, print_table
from experiments import bench_decode
from heads import step_begins


@dataclass(frozen=True)
class Node:
    """A draft: what the head of `offset` says, from the hidden state `look_back` tokens before the
    newest. Nodes are numbered from 1; 0 is the root, the last known token."""
    parent: int
    offset: int
    look_back: int
    rank: int = 0  # 0: its best token, 1: the second best, ...


def tree_tables(tree):
    """A list of Nodes -> depth (N,), path (N, D + 1) and ancestors (N, N) bool; N = 1 + nodes.

    Node i is at distance depth[i] + 1, path[i] leads to it from the root (and then repeats it),
    and ancestors[i] are the nodes on it, itself included. Raises InputError. For

        0 ─┬─ 1 ─── 3     [Node(0, 2, 0, rank=0), Node(0, 2, 0, rank=1),
           └─ 2 ─── 4      Node(1, 3, 0), Node(2, 3, 0)]

    depth is [0, 1, 1, 2, 2], and path[4] is [0, 2, 4]."""
    paths = [[0]]
    for i, node in enumerate(tree, 1):
        require(0 <= node.parent < i, f"the parent of node {i} must come before it: {node}")
        distance = len(paths[node.parent]) + 1
        require(node.offset - node.look_back == distance and node.look_back >= 0 <= node.rank,
                f"node {i} is at distance {distance}, where offset - look-back must lead: {node}")
        paths.append([*paths[node.parent], i])
    D = max(map(len, paths)) - 1
    depth = torch.tensor([len(path) - 1 for path in paths])
    path = torch.tensor([path + path[-1:] * (D + 1 - len(path)) for path in paths])
    ancestors = torch.zeros(len(paths), len(paths)).scatter(1, path, 1) > 0
    return depth, path, ancestors


class TreeDecoder(Decoder):
    """A Decoder that drafts a tree, a list of Nodes: its block is the root and the nodes."""

    def __init__(self, model, tree, compile=False, **options):
        tables = tree_tables(tree)
        offsets = sorted({1, *(node.offset for node in tree)})
        super().__init__(model, offsets, rows=1 + len(tree), **options)
        self.rows = 1 + len(tree)
        self.N = tables[1].shape[1]  # tokens of the longest path
        # Nodes are drafted in groups: those of sequential heads by their source, which has one
        # distance, and those of independent heads all at once.
        sources = sorted({(node.offset - node.look_back, node.offset) for node in tree})
        self.head_index = [offsets.index(offset) - 1 for _, offset in sources]
        look_back = [offset - distance for distance, offset in sources]
        self.W = 1 + max(look_back)
        self.source = torch.tensor([self.head_index, look_back], device=self.device)
        self.block = torch.zeros_like(self.tokens[:, :self.rows])  # nodes are no stretch of a text
        self.depth, self.path, self.ancestors = [t.to(self.device) for t in tables]
        self.parent = torch.tensor([node.parent for node in tree], device=self.device)
        self.groups = [[] for _ in sources]
        for i, node in enumerate(tree, 1):
            source = sources.index((node.offset - node.look_back, node.offset))
            group = self.groups[source if self.draft_heads.sequential else 0]
            group.append((i, node.parent, source, node.rank))
        if compile:
            self.run_step = compile_step(self)

    def step(self):
        """Verify all paths, keep the longest right one, emit it, and draft the next tree."""
        start = self.position.clone()  # (B,)
        h, for_heads = self.forward_tree(start)
        target = self.pick(self.model.gpt.lm_head(h), start[:, None] + 1 + self.depth,
                           self.vocab)
        right = F.pad(self.block[:, 1:] == target[:, self.parent], (1, 0), value=True)
        right = (right[:, None] | ~self.ancestors).all(2)  # and so are all its ancestors
        best = (right * (self.depth + 1)).argmax(1)  # (B,): the deepest
        path = self.path[best]  # (B, D + 1)
        self.keep(start, path)
        after = start[:, None] + 1 + torch.arange(self.N, device=self.device)
        self.emit(target.gather(1, path), after, self.depth[best])
        self.draft(for_heads[self.text, path], start, self.depth[best])

    def forward_tree(self, start):
        """Run the blocks as forward_block does: node i is cached in slot start + i, stands at
        start + its depth, and sees the text and its ancestors."""
        root = start[:, None] + len(self.slot) * self.text
        slots = (root + torch.arange(self.rows, device=self.device)).flatten()
        position = (start[:, None] + self.depth).clamp(max=self.model.gpt.config.block_size - 1)
        behind = self.slot - start[:, None]  # (B, S), the root's slot is 0
        visible = self.ancestors[:, behind.clamp(0, self.rows - 1)]  # (N, B, S)
        visible = visible & (behind < self.rows) | (behind < 0)
        mask = torch.where(visible.transpose(0, 1)[:, None], 0, -torch.inf).to(self.cache[0].dtype)
        stream = self.model.gpt.residual_stream(self.block, position, self.cache, slots, mask)
        h = self.model.read(stream)
        return self.model.last_layer(h), self.draft_heads.attend(h, self.head_caches, slots, mask)

    def keep(self, start, path):
        """Move the keys and values of the accepted path (B, D + 1) to where a text has them."""
        root = start[:, None] + len(self.slot) * self.text
        slots = (root + torch.arange(self.N, device=self.device)).flatten()
        for cache in sum(self.head_caches, self.cache):
            cache.index_copy_(0, slots, cache[(root + path).flatten()])

    def draft(self, h, start, n):
        """As in Decoder, each node from what its parent is."""
        self.block[:, 0] = self.tokens.gather(1, self.position[:, None])[:, 0]
        z = self.remember(h, start, n)  # (B, sources, C or 3C)
        for group in filter(None, self.groups):
            nodes, parents, sources, ranks = map(list, zip(*group))
            if self.draft_heads.sequential:
                i = sources[0]
                previous = self.block[:, parents]
                logits = self.draft_heads.logits_after(z[:, i:i + 1], self.head_index[i], previous)
            else:
                logits = self.draft_heads.unembed(z)[:, sources]
            after = self.position[:, None] + self.depth[nodes]
            scores = self.scores(logits, after, self.head_ids)  # (B, nodes, K)
            tokens = scores.topk(max(ranks) + 1).indices[:, range(len(nodes)), ranks]
            self.block[:, nodes] = self.head_ids[tokens]


@torch.no_grad()
def draft_ranks(model, windows):
    """Windows (n, T) int64 of real text -> {(offset, look_back): (n, T)}: the rank of the right
    token, where a step's root is at a position. Teacher forcing, as in heads.accepted_drafts."""
    ranks = {}
    for o in model.offsets[1:]:
        rows = []
        for idx in windows:  # one by one, because logits are large
            logits = model.offset_logits(model.hidden_states(idx[None]), o, idx.roll(1 - o)[None])
            right = logits[0].gather(1, idx.roll(-o)[:, None])  # (T, 1)
            rows.append((logits[0] > right).sum(1))
        for b in range(o - 1):
            ranks[o, b] = torch.stack(rows).roll(1 + b, dims=1)
    return ranks


def simulate(tree, ranks):
    """-> right: for the root and every node (n, T) bool; accepted: drafts of a step (n, T)"""
    depth, *_ = tree_tables(tree)
    right = [torch.ones_like(next(iter(ranks.values())), dtype=torch.bool)]
    for node in tree:
        right.append(right[node.parent] & (ranks[node.offset, node.look_back] == node.rank))
    accepted = torch.stack([r * d for r, d in zip(right, depth.tolist())]).amax(0)
    return right, accepted


def grow(ranks, size, first):
    """Node by node, the tree whose new node is right most often where the steps of the tree so far
    begin. -> tree, the tokens per step of its first 0, 1, 2, ... nodes"""
    tree = []
    tokens_per_step = []
    for _ in range(size + 1):
        right, accepted = simulate(tree, ranks)
        begins = step_begins(accepted, first)
        tokens_per_step.append(len(begins) * (begins.shape[1] - 1 - first) / begins.sum().item())
        gains = {}  # of each possible node
        for parent, depth in enumerate(tree_tables(tree)[0].tolist()):
            useful = begins & right[parent] & (accepted == depth)
            for o, b in ranks:
                if o - b == depth + 2:  # its distance
                    rank = sum((x.parent, x.offset, x.look_back) == (parent, o, b) for x in tree)
                    gain = (useful & (ranks[o, b] == rank)).sum().item()
                    gains[Node(parent, o, b, rank)] = gain
        tree = [*tree, max(gains, key=gains.get)]
    return tree[:size], tokens_per_step


def find(args, model, corpus):
    """Grow a tree on the first half of the held-out text, time it, and write its best part."""
    windows = corpus.windows("val", 128, model.gpt.config.block_size)[:64].to(args.device)
    tree, tokens_per_step = grow(draft_ranks(model, windows), args.nodes, max(model.offsets))
    sizes = [n for n in range(1, args.nodes + 1) if n < 5 or n % 3 == 0 or n == args.nodes]
    trees = [TreeDecoder(model, tree[:n], compile=args.compile)
             for n in progress_bar(sizes, desc="compile", unit="tree")]
    decoders = [Decoder(model, (1,), compile=args.compile), *trees]
    ntp, *seconds = bench_decode.step_seconds(decoders, rounds=9)
    rows = [{"nodes": n, "tokens/step": tokens_per_step[n], "step cost": t / ntp,
             "speedup": tokens_per_step[n] * ntp / t} for n, t in zip(sizes, seconds)]
    bench_decode.print_table(rows)
    best = max(rows, key=lambda row: row["speedup"])["nodes"]
    write_results(args.path, dict(checkpoint=args.checkpoint, nodes=[*map(astuple, tree[:best])],
                                  rows=rows, environment=environment(args.device)))
    print(f"{args.path}: the first {best} nodes; next: trees.py {args.run} --decode")


def decode(args, model, corpus):
    """Compare the tree of a run with its chains, on the second half of the held-out text."""
    saved = json.loads(args.path.read_text()) if args.path.exists() else {}
    require(saved.get("checkpoint") == args.checkpoint,
            f"there is no {args.path} of this model; find a tree first, without --decode")
    length = min(64, model.gpt.config.block_size // 4)
    n = min(192, model.gpt.config.block_size - length)
    prompts = corpus.windows("val", 16, length)[8:].tolist()
    options = dict(compile=args.compile, temperature=args.temperature, max_length=length + n)
    decoders = {method: Decoder(model, **options, **drafting(method, model.offsets))
                for method in progress_bar(default_methods(model.offsets), desc="compile")}
    decoders["tree"] = TreeDecoder(model, [Node(*x) for x in saved["nodes"]], **options)
    print_table(compare(decoders, prompts, n))


def main(argv=None):
    """Bad input is one line and status 2."""
    p = Parser(prog="trees.py", description="Find the tree of drafts that writes most tokens per "
               "second on this machine, or --decode with it.")
    p.add_argument("run", metavar="RUN", help="a run folder of train.py, with heads")
    p.option("decode", False, "compare the tree in RUN/tree.json with the chains")
    p.option("nodes", 15, "of the largest tree", least=1)
    p.option("temperature", 0.0, "of the text to decode")
    p.option("data", None, "corpus; default: the one trained on")
    p.option("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    p.option("eager", False, "do not torch.compile the step")
    args = p.parse_args(argv)
    with one_line_errors("trees.py"):
        model, state = load_model(args.run)
        require(Path(args.run).is_dir() and model.heads, f"{args.run} is no run folder with heads")
        corpus = corpus_of(args.run, model, state, args.data)
        args.device = pick_device(args.device)
        args.compile = not args.eager and can_compile(args.device)
        args.path = Path(args.run, "tree.json")
        args.checkpoint = sha256(Path(args.run, "checkpoint.pt").read_bytes()).hexdigest()
        (decode if args.decode else find)(args, model.to(args.device), corpus)


if __name__ == "__main__":
    main()
