"""Lesson 6: the experiments run, and a benchmark compares like with like."""
import json
import subprocess

import pytest

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


def test_the_gpu_script_is_valid_shell():
    assert subprocess.run(["bash", "-n", ROOT / "experiments" / "gpu.sh"]).returncode == 0
