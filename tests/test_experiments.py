"""Lesson 6: the experiments run, and a benchmark compares like with like."""
import json
import subprocess

import pytest
import torch

from conftest import ROOT, assert_one_line_error, command

BENCH = "experiments/bench_decode.py"
FAST = ["--device", "cpu", "--compile", "no", "--sizes", "toy", "--blocks", "1", "4", "--batches", "1", "2",
        "--prompts", "1", "--rounds", "1"]


def test_the_benchmark_measures_every_method_on_the_same_text():
    result = command(BENCH, *FAST)
    assert result.returncode == 0, result.stderr
    toy = json.loads(result.stdout.splitlines()[-1])["sizes"]["toy"]        # it ends with one line of JSON
    assert [r["method"] for r in toy["generate"]] == ["transformers", "NTP, eager", "NTP", "MTP", "leap", "tree"]
    assert all(r["same_text"] for r in toy["generate"])                     # transformers' too, greedy in float32
    assert [r["block"] for r in toy["latency"]] == [1, 4] and toy["latency"][0]["relative"] == 1
    assert all(r["ms"] > 0 and 0 < r["mbu"] < 2 for r in toy["latency"])


def test_the_benchmark_writes_its_results_and_a_figure(tmp_path):
    pytest.importorskip("matplotlib")
    result = command(BENCH, *FAST, "--dtype", "bfloat16", "--out", tmp_path / "bench.json")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(result.stdout.splitlines()[-1])
    assert (tmp_path / "bench.png").stat().st_size > 10_000


@pytest.mark.parametrize("options, word", [
    (["--blocks", "2", "4"], "first block"), (["--rounds", "0"], "at least 1"), (["--out", "no/such/x.json"], "--out"),
    (["--run", "no/such"], "no checkpoint"), (["--sizes", "7B"], "--sizes"), (["--device", "tpu"], "not available")])
def test_bad_options_are_one_line(options, word):
    assert_one_line_error(command(BENCH, *FAST, *options), word)


def test_the_marginalisation_benchmark_compares_the_same_sums(run_folder, tmp_path):
    result = command("experiments/bench_marginalize.py", "--run", run_folder, "--context", 32, "--branches", 8,
                     "--positions", 1, 4, "--rounds", 1, "--device", "cpu", "--out", tmp_path / "bench.json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "bench.json").read_text()) == found
    assert [r["positions"] for r in found["rows"]] == [1, 4]
    assert all(r["largest_difference"] < 1e-5 for r in found["rows"])


@pytest.mark.parametrize("options, word", [
    (["--positions", "0"], "at least 1"), (["--positions", "256"], "do not fit"), (["--context", "1"], "at least 2"),
    (["--branches", "300"], "vocabulary"),
    (["--run", "RUN", "--context", "64"], "context of 32"),
    (["--out", "no/such/x.json"], "--out"), (["--run", "no/such"], "checkpoint")])
def test_bad_options_of_the_marginalisation_benchmark_are_one_line(options, word, run_folder):
    options = [run_folder if o == "RUN" else o for o in options]
    assert_one_line_error(command("experiments/bench_marginalize.py", "--device", "cpu", *options), word)


def test_the_training_benchmark_compares_time_and_memory(tmp_path):
    result = command("experiments/bench_train.py", "--device", "cpu", "--shapes", "toy", "--rounds", 1, "--steps", 1,
                     "--out", tmp_path / "bench.json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "bench.json").read_text()) == found
    (ntp, six), memory = found["speed"], found["memory"]
    assert (ntp["offsets"], six["offsets"]) == ([1], [1, 2, 3, 4, 5, 7])
    for row in (ntp, six):
        ours, adamw, muon = (row[way]["tokens_per_second"] for way in ("ours", "plain_adamw", "plain_muon"))
        assert row["over_adamw"] == ours / adamw and row["over_muon"] == ours / muon
        assert all(0 < row[way]["optimizer"] < 1 for way in ("ours", "plain_adamw", "plain_muon"))
    assert memory["ratio"] == memory["eight_heads"] / memory["ntp"]
    assert 0.9 < found["memory"]["ratio"] < 1.5 and found["memory"]["ntp"] > 8 * 256 * 50257 * 4    # logits, at least
    assert_one_line_error(command("experiments/bench_train.py", "--rounds", 0), "at least 1")


def test_the_benchmark_keeps_what_it_has_measured_and_measures_only_what_is_asked_for(tmp_path):
    result = command(BENCH, *FAST, "--parts", "latency", "batches", "--out", tmp_path / "bench.json")
    assert result.returncode == 0, result.stderr
    toy = json.loads((tmp_path / "bench.json").read_text())["sizes"]["toy"]
    assert toy["latency"] and toy["batches"] and "generate" not in toy


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
    assert found["launches"] == {"matrix products": 1, "GELU": 2, "attention": 1, "picking tokens": 1, "bookkeeping": 1}
    assert found["total"] == 6 and set(found["operators"]) == {
        "addmm", "topk", "_scaled_dot_product_efficient_attention"}


def test_compiling_for_an_imagined_gpu_says_what_it_needs():
    assert_one_line_error(command("experiments/cuda_lowering.py", "--only", "7B"), "no variant", "toy NTP")
    if torch.version.cuda is None:
        assert_one_line_error(command("experiments/cuda_lowering.py"), "CUDA build")


@pytest.mark.skipif(torch.version.cuda is None, reason="needs the CUDA build of PyTorch, though no GPU")
def test_the_step_compiles_for_an_h200_and_launches_no_more_than_it_did(tmp_path):
    result = command("experiments/cuda_lowering.py", "--only", "toy MTP", "--out", tmp_path / "found.json")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["total"] <= 51 and row["launches"]["attention"] == 4


@pytest.mark.parametrize("script", ["gpu.sh", "marginalize.sh"])
def test_a_script_is_valid_shell(script):
    assert subprocess.run(["bash", "-n", ROOT / "experiments" / script]).returncode == 0
