"""Lesson 6: the laboratory. Which drafts pay, whether rounding changed a text, text that a model
writes itself, what a step drafted, and benchmarks that compare like with like."""
import itertools
import json
import math
import shutil
import subprocess

import pytest
import torch
import torch.nn as nn

from conftest import ROOT, assert_one_line_error, command, process, tiny_model
from data.loader import Corpus
from data.prepare import get_tokenizer
from decode import Decoder, Node, chain, depths
from experiments import calibrate as calibration
from experiments import conditional
from experiments.bench_train import mfu
from experiments.calibrate import (BLOCKS, accepted_depths, calibrate, draft_hits,
                                   expected_tokens_per_step, grow_tree, hits_within,
                                   simulate_steps)
from experiments.export_medusa import export_medusa
from experiments.own_text import write_own_text
from experiments.rounding import check_rounding
from experiments.trace_page import brackets, html_page
from heads import draft_sources
from model import InputError
from test_decode import BUSHY, LEAP, METHODS, MTP, NTP, PROMPTS, counting_model, recompute


# Calibration: which drafts pay

def test_expected_tokens_per_step_by_enumeration():
    a, expected = [0.8, 0.5, 0.9], 0.0
    for hits in itertools.product([0, 1], repeat=3):  # a draft counts while all before it hit
        p = math.prod(x if h else 1 - x for x, h in zip(a, hits))
        expected += p * (1 + next((i for i, h in enumerate(hits) if not h), 3))
    assert expected_tokens_per_step(a) == pytest.approx(expected)
    assert expected_tokens_per_step([]) == 1.0


def accepted_by_brute_force(model, windows, sources):
    """How many drafts each position t of windows (B, T + 1) would accept, B lists."""
    best = {o: logits.argmax(-1).tolist() for o, logits in model(windows[:, :-1]).items()}
    first, accepted = max([b for _, b in sources.values()], default=0), []
    for i, text in enumerate(windows.tolist()):
        hits = [[best[o][i][t - b] == text[t + j] for j, (o, b) in sources.items()]
                for t in range(first, len(text) - 1 - len(sources))]
        accepted.append([(row + [False]).index(False) for row in hits])
    return accepted


@pytest.mark.parametrize("method", METHODS)
def test_accepted_drafts_and_simulated_steps_by_brute_force(method):
    model, windows, sources = tiny_model(), torch.randint(0, 31, (3, 30)), draft_sources(method)
    windows[:, 15:] = windows[:, 14:15]  # something that can be predicted
    expected, steps = accepted_by_brute_force(model, windows, sources), []
    accepted = accepted_depths(chain(sources), draft_hits(model, windows, list(sources.values())))
    assert not sources or accepted.tolist() == expected
    for row in expected:
        while row:
            steps.append(row[0])
            row = row[row[0] + 1:]
    assert simulate_steps(torch.tensor(expected)) == steps


@pytest.mark.parametrize("tree", [chain(draft_sources(LEAP)), BUSHY])
@pytest.mark.parametrize("kind", [dict(), dict(kind="block", own=True, n_layer=2), dict(whs=True),
                                  dict(conditional=True)])
def test_simulated_steps_are_those_of_decoding(tree, kind):
    model, first = tiny_model(**kind), max(node.look_back for node in tree)
    prompt = [1, 2, 3, 4, 5][:first + 2]  # the simulation starts at its root
    g = Decoder(model, tree=tree).generate([prompt], 55)
    sources = [(node.offset, node.look_back) for node in tree]
    hits = draft_hits(model, torch.tensor([prompt + g.tokens[0]]), sources, ranks=3)
    steps = simulate_steps(accepted_depths(tree, hits))
    taken = "".join("1" if node else "0" for node in g.nodes[0]).split("0")  # "110": two accepted
    assert max(steps) > 0 and len(steps) > 8
    assert steps[:-1] == [len(drafts) for drafts in taken][:len(steps) - 1]


def test_a_tree_grows_by_the_node_that_accepts_most():
    torch.manual_seed(0)
    sources = [(o, o - j) for j in (2, 3, 4) for o in (2, 3, 4) if o >= j]
    hits = {(o, b, r): torch.rand(3, 40) < 0.5 / (1 + o / 2 + r)
            for o, b in sources for r in range(3)}
    tree = grow_tree(hits, 12)
    for k in range(12):
        possible = [Node(parent, *source) for parent in range(k + 1) for source in hits
                    if source[0] - source[1] == depths(tree[:k])[parent] + 2]
        most = max(accepted_depths((*tree[:k], node), hits).sum() for node in possible)
        assert accepted_depths(tree[:k + 1], hits).sum() == most


def test_calibration_measures_every_source_and_takes_the_better_one():
    # Offset 2 is wrong, so the drafts for distance 2 come from offsets 3 and 4, looking back.
    model = counting_model((1, 2, 3, 4), wrong=(2,))
    windows = (torch.arange(24)[None] + torch.arange(8)[:, None]) % 32
    found = calibrate(model, windows, nodes=3)
    assert [node.offset - node.look_back for node in found["tree"]] == [2, 3, 4]
    assert found["tree"][0].offset in (3, 4) and found["table"][0]["tokens_per_step"] == 4
    assert found["accuracy"]["offset 2, look-back 0"][0] == 0
    assert found["accuracy"]["offset 3, look-back 1"][0] == 1
    assert calibrate(tiny_model(NTP), windows)["tree"] == ()


@pytest.mark.parametrize("cost, smallest, largest", [(0.0, 48, 64), (0.02, 2, 48), (5.0, 1, 1)])
def test_calibration_takes_a_smaller_tree_where_wider_blocks_cost_more(cost, smallest, largest,
                                                                       monkeypatch):
    def latencies_of_a_machine(decoders, batch_size):
        return [1 + cost * (decoder.t.N - 1) for decoder in decoders]
    monkeypatch.setattr(calibration, "step_latencies", latencies_of_a_machine)
    windows = torch.arange(30 * 40).view(30, 40) // 3 % 31
    found = calibrate(tiny_model(), windows, progress=False)
    assert smallest <= 1 + len(found["tree"]) <= largest
    assert cost < 1 or len(found["table"]) == 2  # it stops where nothing can pay
    best = max(found["table"], key=lambda r: r["tokens_per_step"] / (1 + cost * (r["block"] - 1)))
    assert 1 + len(found["tree"]) == best["block"]


def test_calibration_knows_what_drafting_among_a_few_tokens_loses():
    # After x comes x + 1, so every draft is right unless its token is not among them.
    windows, sources = torch.arange(40)[None] % 32, draft_sources(LEAP)
    hits = draft_hits(counting_model(LEAP), windows, list(sources.values()))
    for vocab in (list(range(8, 32)), [1, 2, 3, 20]):
        left = accepted_depths(chain(sources), hits_within(vocab, windows, hits))[0].tolist()
        for t, accepted in enumerate(left, 1):  # leap looks back from position 1 on
            inside = [int(windows[0, t + j]) in vocab for j in sources]
            assert accepted == [*inside, False].index(False)


@pytest.mark.parametrize("cost, chosen", [(0.0, None), (1.0, 24)])
def test_calibration_drafts_among_few_tokens_where_the_others_cost_more(cost, chosen,
                                                                        monkeypatch):
    def latencies_of_a_machine(decoders, batch_size):
        return [1 + (d.t.N > 1) * cost * d.heads.draft_size / 32 for d in decoders]
    monkeypatch.setattr(calibration, "step_latencies", latencies_of_a_machine)
    monkeypatch.setattr(calibration, "VOCABS", (24, 8))
    windows, order = torch.arange(24)[None], [*range(32)]
    found = calibrate(counting_model(MTP), windows, progress=False, frequent=order)
    assert [r["vocab"] for r in found["table"]] == [None, None, None, None, 24, 8]
    assert found["draft_vocab"] == (chosen and order[:chosen])


def test_a_calibrated_tree_is_saved_and_compared_from_then_on(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    result = command("experiments/calibrate.py", run, "--nodes", 6, "--device", "cpu",
                     "--compile", "no")
    assert result.returncode == 0 and "offset 3, look-back 1" in result.stdout, result.stderr
    saved = json.loads((run / "tree.json").read_text())
    assert len(saved["tree"]) == 6
    saved["draft_vocab"] = list(range(32, 127))  # the decoder then drafts these only
    (run / "tree.json").write_text(json.dumps(saved))
    result = command("decode.py", run, "--methods", "tree", "--prompts", 2, "--rounds", 1,
                     "--compile", "no", "--out", tmp_path / "table.json")
    found = json.loads((tmp_path / "table.json").read_text())["generated"]
    assert [(r["method"], r["block"], r["identical"]) for r in found] == 2 * [
        ("NTP", 1, True), ("tree", 7, True)]


@pytest.mark.slow
def test_calibration_times_steps(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    result = process("experiments/calibrate.py", run, "--compile", "no", "--device", "cpu")
    assert result.returncode == 0 and "<- chosen" in result.stdout, result.stderr
    found = json.loads((run / "tree.json").read_text())
    assert [r["block"] for r in found["table"]] == list(BLOCKS)[:len(found["table"])]
    assert found["table"][0]["cost"] > 0


# Rounding

def test_a_text_in_float32_is_compared_with_float64():
    decoder = Decoder(tiny_model(), LEAP)
    tokens = decoder.generate(PROMPTS, 50).tokens
    counts = check_rounding(decoder, PROMPTS, tokens)
    assert counts["argmax"] == 150 and counts["neither"] == 0 and 0 < counts["margin"] < 1e-4
    tokens[1][-1] = (tokens[1][-1] + 1) % 31
    assert check_rounding(decoder, PROMPTS, tokens)["neither"] == 1


@pytest.mark.parametrize("options", [dict(), dict(temperature=1.0)])
def test_a_text_in_bfloat16_is_the_models_but_for_near_ties(options):
    decoder = Decoder(tiny_model(), LEAP, dtype=torch.bfloat16, **options)
    g = decoder.generate(PROMPTS, 50)
    counts = check_rounding(decoder, PROMPTS, g.tokens)
    assert counts["argmax"] + counts["near_tie"] == 150 and counts["neither"] == 0
    assert counts["largest_gap"] <= counts["margin"]
    text = torch.tensor([PROMPTS[0] + g.tokens[0][:9]])
    g.tokens[0][9:] = [int(decoder.model.gpt(text)[0][0, -1].argmin())]
    assert check_rounding(decoder, PROMPTS, g.tokens)["neither"] == 1


def test_the_rounding_check_counts_every_token_of_every_method(run_folder):
    result = command("experiments/rounding.py", run_folder, "--prompts", 2, "--compile", "no",
                     "--methods", "1,2,3", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [(r[0], r[1]) for r in rows] == [("NTP", "0"), ("MTP", "0"), ("NTP", "1"), ("MTP", "1")]
    assert all(int(r[2]) + int(r[3]) == 48 and r[4] == "0" for r in rows)


# Text that the model writes itself

@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_own_text_is_what_plain_sampling_from_the_backbone_writes(temperature, corpus, tmp_path):
    corpus, model = Corpus(corpus), tiny_model((1, 2, 3), vocab_size=257, block_size=24)
    # 400 tokens are 20 rows of 20, so the last batch of 8 is not full.
    folder = write_own_text(model, corpus, tmp_path / "own", tokens=400, temperature=temperature,
                            seed=3, batch_size=8, prompt_tokens=4)
    prompts, own = corpus.windows("train", 20, 4).tolist(), Corpus(folder)
    continuations = recompute(model.gpt, prompts, 20, temperature, seed=3)
    texts = [p + t for p, t in zip(prompts, continuations)]
    assert own.meta["temperature"] == temperature and own.meta["seed"] == 3
    assert own.val.tolist() == texts[0] + [256]
    assert own.train.tolist() == [t for text in texts[1:] for t in text + [256]]


def test_heads_can_be_trained_on_what_the_frozen_backbone_wrote(run_folder, tmp_path):
    result = process("experiments/own_text.py", run_folder, tmp_path / "own", "--tokens", 1500,
                     "--compile", "no", "--temperature", 0.7)
    assert result.returncode == 0 and "next: python train.py" in result.stdout, result.stderr
    assert Corpus(tmp_path / "own").meta["source"] == f"generated by {run_folder}"
    result = command("train.py", "--data", tmp_path / "own", "--init", run_folder,
                     "--backbone-lr", 0, "--steps", 2, "--out", tmp_path / "heads",
                     "--no-progress", "--eval-windows", 2)
    assert result.returncode == 0 and f"generated by {run_folder}" in result.stdout, result.stderr


def test_own_text_never_replaces_what_no_model_wrote(run_folder, corpus, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    shutil.copytree(corpus, tmp_path / "corpus")
    for name, words in (("notes", "not a corpus"), ("corpus", "no model wrote")):
        before = {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}
        result = command("experiments/own_text.py", run_folder, tmp_path / name, "--tokens", 100)
        assert_one_line_error(result, words)
        assert before == {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}


# What a step drafted

def test_brackets_show_the_tokens_of_each_step():
    tokens, nodes = list("x = 'naïve'".encode()), [0, 1, 2, 0, 0, 1, 2, 3, 4, 0, 0, 1]
    assert brackets(tokens, nodes, get_tokenizer("bytes")) == "[x][ = ]['][naïv][e][']"


def test_the_page_holds_the_text_and_where_each_token_came_from():
    model, prompt, history = tiny_model(vocab_size=257), list(b"a </script>"), []
    decoder, tokenizer = Decoder(model, tree=BUSHY), get_tokenizer("bytes")
    stop = decoder.generate([prompt], 40).tokens[0][21]
    g = decoder.generate([prompt], 40, stop, on_step=lambda s: history.append(
        (int(s.position[0]), s.block[0].tolist())))
    page = html_page("a < b", g, history[:-1], BUSHY, tokenizer, prompt)
    assert "a &lt; b" in page and "{{" not in page and "http" not in page
    assert page.count("const data") == 1 and page.count("</script>") == 1
    data = json.loads(page[page.index("const data = ") + 13:page.index(";\nconst get")])
    depth, steps = depths(BUSHY), data["steps"]
    assert "".join(t[0] for t in data["tokens"]) == tokenizer.decode(g.tokens[0])
    assert [t[2][0] if t[2] else 1 for t in data["tokens"]] == [depth[i] + 1 for i in g.nodes[0]]
    assert len(steps) == g.steps
    assert sum(s["accepted"] for s in steps) == sum(node > 0 for node in g.nodes[0])
    assert all(s["accepted"] + len(s["rejected"]) == len(BUSHY) for s in steps[:-1])
    assert steps[-1]["rate"] == g.tokens_per_step


def test_the_trace_prints_brackets_and_writes_the_page(run_folder, tmp_path):
    result = process("experiments/trace_page.py", run_folder, "--prompt", "def f7(",
                     "--html", tmp_path / "a.html")
    assert result.returncode == 0 and "def f7([" in result.stdout, result.stderr
    assert "<pre" in (tmp_path / "a.html").read_text()


# Heads for a server

class MedusaAsVllmReadsIt(nn.Module):
    """The parameters that vLLM's Medusa model has for a config.json, and what it computes."""

    def __init__(self, config):
        super().__init__()
        C, V, n = config["hidden_size"], config["vocab_size"], config["num_heads"]
        assert config["model_type"] == "medusa" and config["architectures"] == ["MedusaModel"]

        def block():
            layers, bias = config["num_hidden_layers"], config["medusa_fc_bias"]
            linears = [nn.Linear(C, C, bias=bias) for _ in range(layers)]
            return nn.ModuleDict({"layers": nn.ModuleList(linears)})
        self.blocks = nn.ModuleList([block() for _ in range(n)])
        self.shared = config["original_lm_head"]  # if so, only the first is in the file
        unembeddings = 1 if self.shared else n
        self.lm_heads = nn.ModuleList([nn.Linear(C, V, bias=False) for _ in range(unembeddings)])

    def forward(self, h):
        for i, block in enumerate(self.blocks):
            x = h
            for layer in block["layers"]:
                x = x + nn.functional.silu(layer(x))
            yield self.lm_heads[0 if self.shared else i](x)


@pytest.mark.parametrize("own, n_layer", [(False, 1), (True, 1), (False, 2)])
def test_exported_heads_are_the_medusa_drafter_of_the_backbone(own, n_layer, tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    model, idx = tiny_model((1, 2, 3, 4), own=own, n_layer=n_layer), torch.randint(0, 31, (2, 12))
    export_medusa(model, tmp_path / "medusa")
    config = json.loads((tmp_path / "medusa" / "config.json").read_text())
    medusa = MedusaAsVllmReadsIt(config)
    # This raises an error unless all names and shapes agree.
    medusa.load_state_dict(load_file(tmp_path / "medusa" / "model.safetensors"))
    # vLLM renames all keys that look like a number of heads or layers, so there is one of each.
    assert [k for k in config if "num" in k] == ["num_heads", "num_hidden_layers"]
    for offset, logits in zip((2, 3, 4), medusa(model.gpt.hidden_states(idx))):
        torch.testing.assert_close(logits, model(idx)[offset])


@pytest.mark.parametrize("options, words", [
    (dict(offsets=(1, 3, 5)), "look back"), (dict(offsets=(1,)), "without a gap"),
    (dict(offsets=(1, 2), kind="block"), "residual blocks"),
    (dict(offsets=(1, 2), whs=True), "all layers"),
    (dict(offsets=(1, 2), conditional=True), "next token")])
def test_exporting_heads_that_no_medusa_server_can_run_raises_an_error(options, words, tmp_path):
    with pytest.raises(InputError, match=words):
        export_medusa(tiny_model(**options), tmp_path / "medusa")
    assert not (tmp_path / "medusa").exists()


def test_the_export_command_writes_backbone_and_heads_or_one_line(run_folder, corpus, tmp_path):
    pytest.importorskip("safetensors")
    result = command("train.py", "--data", corpus, "--init", run_folder, "--offsets", "1,2,3",
                     "--backbone-lr", 0, "--steps", 1, "--out", tmp_path / "run", "--no-progress",
                     "--eval-windows", 2)
    assert result.returncode == 0, result.stderr
    result = process("experiments/export_medusa.py", tmp_path / "run", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "heads" / "config.json").exists()
    assert (tmp_path / "out" / "backbone" / "model.safetensors").exists()
    result = command("experiments/export_medusa.py", run_folder, tmp_path / "other")
    assert_one_line_error(result, "look back")


# What one token more is worth

@pytest.mark.slow
def test_both_kinds_of_heads_are_compared_with_their_ceilings(corpus, tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--seeds", 0, "--steps", 3, "--windows", 4, "--data", corpus, "--device", "cpu",
               "--folder", tmp_path / "runs", "--out", tmp_path / "found.json"]
    result = process("experiments/conditional.py", *options)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    frozen, blank, reading = ({r["heads"]: r for r in rows if r["recipe"] == "frozen"}[kind]
                              for kind in ("independent", "blank", "conditional"))
    assert len(rows) == 5 and frozen["nats"] == reading["nats"]  # the same backbone
    assert blank["ceiling"] == frozen["ceiling"]
    for d in ("3", "4"):  # one token more moves the ceiling by one distance
        assert reading["ceiling"][d] == frozen["ceiling"][str(int(d) - 1)]
    assert (tmp_path / "found.png").stat().st_size > 10_000
    again = process("experiments/conditional.py", *options)
    assert again.returncode == 0 and again.stdout.count("is finished: 3 steps") == 6


def test_blank_heads_do_not_see_the_next_token():
    model, idx = tiny_model((1, 2), conditional=True), torch.arange(8)[None]
    h = model.hidden_states(idx)
    for heads, same in (("blank", True), ("conditional", False)):
        with conditional.blank(heads), torch.no_grad():
            one, other = (model.offset_logits(h, 2, next_tokens=idx + n) for n in (1, 2))
        assert torch.equal(one, other) == same


# Benchmarks

BENCH = ["experiments/bench_decode.py", "--device", "cpu", "--compile", "no", "--sizes", "toy",
         "--blocks", 1, 4, "--batches", 1, 2, "--prompts", 1, "--rounds", 1]


@pytest.mark.slow
def test_the_decoding_benchmark_measures_every_method_on_the_same_text(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    result = process(*BENCH, "--out", tmp_path / "bench.json")
    assert result.returncode == 0, result.stderr
    results = json.loads(result.stdout.splitlines()[-1])  # it ends with one line of JSON
    assert results == json.loads((tmp_path / "bench.json").read_text())
    toy = results["sizes"]["toy"]
    assert [r["method"] for r in toy["generate"]] == [
        "transformers", "NTP, eager", "NTP", "MTP", "leap", "tree"]
    assert all(r["same_text"] for r in toy["generate"])  # transformers' too, greedy in float32
    assert [r["block"] for r in toy["latency"]] == [1, 4] and toy["latency"][0]["relative"] == 1
    assert all(r["ms"] > 0 and 0 < r["mbu"] < 2 for r in toy["latency"])
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_the_decoding_benchmark_measures_only_what_is_asked_for(tmp_path):
    result = command(*BENCH, "--parts", "latency", "--dtype", "bfloat16",
                     "--out", tmp_path / "b.json")
    assert result.returncode == 0, result.stderr
    toy = json.loads((tmp_path / "b.json").read_text())["sizes"]["toy"]
    assert [r["block"] for r in toy["latency"]] == [1, 4]
    assert not toy.keys() & {"batches", "generate"}


def test_the_marginalisation_benchmark_compares_the_same_sums(run_folder, tmp_path):
    result = command("experiments/bench_marginalize.py", "--run", run_folder, "--context", 32,
                     "--branches", 8, "--positions", 1, 4, "--rounds", 1, "--device", "cpu",
                     "--out", tmp_path / "b.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "b.json").read_text())
    assert [r["positions"] for r in found["rows"]] == [1, 4]
    assert all(r["largest_difference"] < 1e-5 for r in found["rows"])


def test_mfu_counts_six_flops_per_parameter_and_token_and_attention(monkeypatch):
    model = tiny_model((1,))  # 2 layers of width 32, 64 positions
    flops = 6 * sum(p.numel() for p in model.parameters()) + 12 * 2 * 32 * 64
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert mfu(model, 1e6, torch.device("cuda")) == pytest.approx(1e6 * flops / 989e12)
    assert mfu(model, 1e6, torch.device("cpu")) is None


@pytest.mark.slow
def test_the_training_benchmark_compares_time_and_memory(tmp_path):
    result = process("experiments/bench_train.py", "--device", "cpu", "--shapes", "toy",
                     "--rounds", 1, "--steps", 1, "--out", tmp_path / "bench.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    (ntp, six), memory = found["speed"], found["memory"]
    assert (ntp["offsets"], six["offsets"]) == ([1], [1, 2, 3, 4, 5, 7])
    for row in (ntp, six):
        ways = ("ours", "plain_adamw", "plain_muon")
        ours, adamw, muon = (row[way]["tokens_per_second"] for way in ways)
        assert row["over_adamw"] == ours / adamw and row["over_muon"] == ours / muon
        assert all(0 < row[way]["optimizer"] < 1 for way in ways)
    assert memory["ratio"] == memory["eight_offsets"] / memory["ntp"]
    assert 0.9 < memory["ratio"] < 1.5 and memory["ntp"] > 8 * 256 * 50257 * 4  # logits, at least


PROGRAM = """
def triton_poi_fused_gelu_0(in_ptr0):
    pass
def call(args):
    extern_kernels.addmm(arg0, arg1, out=buf0)
    triton_poi_fused_gelu_0.run(buf0, 3072, stream=stream0)
    triton_poi_fused_gelu_0.run(buf1, 3072, stream=stream0)
    buf2 = torch.ops.aten._scaled_dot_product_efficient_attention.default(buf0, buf1, 1.0)
    buf3 = torch.ops.aten.topk.default(buf2, 4)
    triton_poi_fused_add_index_put_12.run(buf3, 7, stream=stream0)
"""


def test_launches_are_counted_by_what_they_are_for():
    from experiments.cuda_lowering import count
    found = count(PROGRAM)
    assert found["total"] == 6 and found["launches"] == {
        "matrix products": 1, "GELU": 2, "attention": 1, "picking tokens": 1, "bookkeeping": 1}
    assert set(found["operators"]) == {"addmm", "topk", "_scaled_dot_product_efficient_attention"}


@pytest.mark.skipif(torch.version.cuda is None, reason="needs PyTorch's CUDA build, though no GPU")
def test_the_step_compiles_for_an_h200_and_launches_no_more_than_it_did(tmp_path):
    result = process("experiments/cuda_lowering.py", "--only", "toy MTP",
                     "--out", tmp_path / "found.json")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["total"] <= 53 and row["launches"]["attention"] == 4


# Bad input

@pytest.mark.parametrize("script, options, words", [
    ("calibrate", ["RUN", "--nodes", 0], "at least 1"),
    ("calibrate", ["no/such"], "no checkpoint"),
    ("rounding", ["RUN", "--prompts", 0], "--prompts"),
    ("rounding", ["RUN", "--methods", "2"], "start with 1"),
    ("trace_page", ["RUN", "--prompt", ""], "empty"),
    ("trace_page", ["RUN", "--html", "no/such/x.html"], "--html"),
    ("own_text", ["RUN", "OUT", "--tokens", 0], "--tokens"), ("own_text", ["RUN", ""], "FOLDER"),
    ("own_text", ["RUN", "OUT", "--prompt-tokens", 32], "exceed"),
    ("own_text", ["RUN", "OUT", "--tokens", 10**18], "memory"),
    ("bench_decode", ["--blocks", 2, 4], "first block"),
    ("bench_decode", ["--rounds", 0], "at least 1"),
    ("bench_decode", ["--out", "no/such/x.json"], "--out"),
    ("bench_decode", ["--sizes", "7B"], "--sizes"),
    ("bench_decode", ["--run", "no/such"], "no checkpoint"),
    ("bench_decode", ["--device", "tpu"], "tpu"),
    ("bench_marginalize", ["--positions", 0], "at least 1"),
    ("bench_marginalize", ["--positions", 256], "do not fit"),
    ("bench_marginalize", ["--branches", 300], "vocabulary"),
    ("bench_marginalize", ["--run", "no/such"], "checkpoint"),
    ("bench_marginalize", ["--run", "RUN", "--context", 64], "context of 32"),
    ("bench_train", ["--rounds", 0], "at least 1"), ("study", ["--jobs", 0], "at least 1"),
    ("study", ["--only", "planning"], "--size patient"),
    ("findings", ["--page", "README.md"], "marks"),
    ("cuda_lowering", ["--only", "7B"], "no variant")])
def test_bad_options_are_one_line(script, options, words, run_folder, tmp_path):
    named = {"RUN": run_folder, "OUT": tmp_path / "own"}
    options = [named.get(o, o) for o in options]
    assert_one_line_error(command(f"experiments/{script}.py", *options), words)
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("script", ["gpu.sh", "marginalize.sh"])
def test_a_script_is_valid_shell(script):
    assert subprocess.run(["bash", "-n", ROOT / "experiments" / script]).returncode == 0
