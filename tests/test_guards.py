"""Bad input is one line that says what to do, and nothing is lost."""
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from common import load_checkpoint, load_model, save_checkpoint, tokenizer_name
from conftest import ROOT, TINY, assert_one_line_error, command, process, tiny_gpt, tiny_model
from data import prepare
from data.loader import Corpus
from data.prepare import InputError
from decode import Decoder, drafting
from heads import HeadsConfig, parse_offsets
from marginalize import look_ahead
from model import GPT
from test_model import save_gpt2
from test_train import records

# ---- Data ------------------------------------------------------------------------------------

@pytest.fixture
def notes(tmp_path, monkeypatch):
    """The current folder, which has texts and a corpus of an earlier version."""
    monkeypatch.chdir(tmp_path)
    for text in (b"good\n", b"other\n", b"latin1\xe9"):
        (tmp_path / f"{text[:-1].decode()}.txt").write_bytes(text * 99)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "one.txt").write_text("1")
    meta = prepare.prepare("good.txt", out="corpus") / "meta.json"
    meta.write_text(meta.read_text().replace("}", ', "text_sha256": "00"}'))
    return tmp_path


@pytest.mark.parametrize("arguments, message", [
    ("nowhere.txt", "no UTF-8 text in "), ("latin1.txt", "no UTF-8 text in "), ("data", "empty"),
    ("good.txt other.txt", "unrecognized arguments"), ("good.txt --val-fraction 1.5", "1.5"),
    ("good.txt --val-fraction nan", "nan"),
    ("good.txt --tokenizer words", "use bytes or gpt2"), ("good.txt --seed x", "int"),
    ("other.txt --out corpus", "--out, or replace the corpus with --force"),
    ("good.txt --out corpus --seed 1", "--force"), ("good.txt --out good.txt", "good.txt"),
    ("good.txt --out data --force", "more than a corpus"), ("shakespeare", "try again")])
def test_bad_arguments_of_prepare_change_nothing(notes, monkeypatch, arguments, message):
    monkeypatch.setattr(prepare, "ROOT", notes)
    monkeypatch.setattr(prepare, "URL", (notes / "nowhere").as_uri())
    before = {path: path.stat().st_mtime_ns for path in notes.rglob("*.*")}
    assert_one_line_error(command("data/prepare.py", *arguments.split()), "error: ", message)
    assert {path: path.stat().st_mtime_ns for path in notes.rglob("*.*")} == before


def test_gpt2_without_its_files_and_a_network_says_what_to_do(notes, monkeypatch):
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: open("nothing"))
    result = command("data/prepare.py", "good.txt", "--out", "n", "--tokenizer", "gpt2")
    assert_one_line_error(result, "TIKTOKEN_CACHE_DIR", "or use bytes")


def test_a_corpus_is_replaced_only_when_that_is_asked_for(notes, monkeypatch):
    make = ["data/prepare.py", "good.txt", "--out", "corpus"]
    (notes / "good.txt").write_text("new\n" * 99)
    mapped = Corpus("corpus").train
    assert Corpus("corpus").folder == notes / "corpus"  # absolute: a run remembers it
    assert Corpus("corpus").meta["source"] == str(notes / "good.txt")  # from wherever it is called
    assert "already there" in command(*make).stdout and len(Corpus("corpus").train) == 447
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "encode", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            command(*make, "--force")
    assert "357 train" in command(*make).stdout  # half a corpus is none
    assert bytes(mapped[:4].tolist()) == b"good"  # a training that reads the old one goes on


def test_a_full_disk_is_one_line(notes):
    result = subprocess.run(
        [sys.executable, "data/prepare.py", notes / "good.txt", "--out", notes / "n"], cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
        capture_output=True, text=True)
    assert_one_line_error(result, "prepare.py: error: ", "File too large")


def test_output_that_cannot_be_shown_or_that_nobody_reads_is_no_error(notes, monkeypatch):
    arguments = ["data/prepare.py", notes / "good.txt", "--out", notes / "naïve"]
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = process(*arguments)
    assert (result.stdout.count("na?ve"), result.stderr) == (2, "")
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=writer, stderr=-1)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize("name, old, new", [
    ("meta.json", b"}", b""), ("meta.json", b"tokenizer", b"tokeniser"),
    ("meta.json", b'"bytes"', b'"words"'), ("meta.json", b"val_tokens", b"tokens"),
    ("train.bin", b"g\0", b""), ("val.bin", b"g\0", b"g"), ("val.bin", b"g\0", b"\1\1")])
def test_a_damaged_corpus_is_an_error(notes, name, old, new):
    path = notes / "corpus" / name
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(prepare.InputError, match="--force"):
        Corpus("corpus")


# ---- Models, heads, training -----------------------------------------------------------------

def look_ahead_from(T, horizon, branches, position=torch.tensor([[5]])):
    idx = torch.zeros(1, T, dtype=torch.long)
    list(look_ahead(tiny_gpt(block_size=16), idx, position, horizon, branches))


@pytest.mark.parametrize("make, message", [
    (lambda: tiny_gpt()(torch.zeros(1, 65, dtype=torch.long)), "65 tokens .* context of 64"),
    (lambda: tiny_gpt(n_embd=31), "multiple of n_head 2"),
    (lambda: tiny_gpt(n_layer=0), "positive"), (lambda: tiny_gpt(dropout=1.0), "dropout"),
    *[(lambda o=o: parse_offsets(o), "start with 1") for o in ("", "2,3", "1,1", "1,3,2", "1,x")],
    (lambda: HeadsConfig(kind="magic"), "resblock"), (lambda: HeadsConfig(n_layer=0), "layer"),
    (lambda: tiny_model((1, 65)), "beyond the model's context of 64"),
    (lambda: GPT.from_pretrained("no/such"), "there is no file no/such"),
    (lambda: load_checkpoint("no/such"), "no checkpoint at no/such"),
    *[(lambda m=m: drafting(m, (1, 2, 3)), "offset") for m in ("one", "1,", "2,3", "1,6")],
    *[(lambda o=o: Decoder(tiny_model(), **o), m) for o, m in [
        (dict(offsets=(1, 6)), "no head for offset .6"), (dict(max_length=65), "max_length"),
        (dict(temperature=-1), "temperature"), (dict(temperature=float("inf")), "temperature"),
        (dict(top_p=0), "top_p"), (dict(top_p=1.5), "top_p")]],
    *[(lambda n=n: look_ahead_from(6, *n), "at least 1") for n in ((0, 1), (2, 0))],
    (lambda: look_ahead_from(6, 12, 1), "horizon of 12 .* context of 16"),
    (lambda: look_ahead_from(17, 2, 1, torch.tensor([[3]])), "17 tokens")])
def test_what_cannot_be_is_an_error(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("config, message", [
    ("{", "config.json"), ("[]", "config.json"), ('{"model_type": "llama"}', "model_type"),
    ('{"model_type": "gpt2", "activation_function": "relu"}', "activation_function"),
    ('{"model_type": "gpt2", "activation_function": "gelu_new"}', "n_head"),
    ('{"model_type": "gpt2", "activation_function": "gelu_new", "n_head": 3}', "n_head 3")])
def test_a_damaged_or_foreign_config_is_an_error(config, message, tmp_path):
    save_gpt2(tiny_gpt(), tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [
    {"wte.weight": torch.zeros(3)}, {"wte.weight": 1}, {3: torch.zeros(1)}])
def test_foreign_tensors_are_an_error(change, tmp_path):
    file = save_gpt2(tiny_gpt(), tmp_path)
    torch.save(torch.load(file) | change, file)
    with pytest.raises(InputError, match="holds no GPT-2"):
        GPT.from_pretrained(tmp_path)


def test_a_damaged_or_foreign_checkpoint_is_an_error(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny_model((1, 2, 3)))
    state = torch.load(path)
    for change in (dict(gpt_config=None), dict(model={}), dict(heads_config=dict(offsets=(1, 9)))):
        torch.save(state | change, path)
        with pytest.raises(InputError, match=f"{path} is not a checkpoint of this train.py"):
            load_checkpoint(path)
    os.truncate(path, 5000)
    with pytest.raises(InputError, match=f"{path} is damaged"):
        load_checkpoint(path)


def test_loading_never_runs_code_from_a_file(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))
    files = {"checkpoint.pt": load_checkpoint, "pytorch_model.bin": GPT.from_pretrained}
    for name, load in files.items():
        torch.save(dict(model=Attack()), tmp_path / name)
        with pytest.raises(InputError, match="is damaged"):
            load(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
def test_nobody_ever_sees_a_half_written_checkpoint(tmp_path):
    model = tiny_model(n_embd=256)
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, model)
    whole = path.stat().st_size
    child = os.fork()
    if child == 0:
        for _ in range(20):
            save_checkpoint(path, model)
        os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):  # what a kill at this moment would leave
        assert path.stat().st_size == whole


@pytest.mark.slow
def test_a_disk_that_is_full_leaves_the_previous_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, tiny_model())
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # of any file
    try:
        with pytest.raises(OSError, match="cannot save .*; what was there stays"):
            save_checkpoint(path, tiny_model(seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("options, words", [
    ("--data no/such/corpus", "no/such/corpus prepare.py"), ("--offsets 2,3", "start with 1"),
    ("--n-embd 31", "n_head"), ("--n-embd 1000000000 --n-head 1", "memory"),
    ("--block-size 90000", "90001"), ("--device tpu", "not available"), ("--steps 0", "--steps"),
    ("--lr nan", "--lr"), ("--init no/such", "--init has its own"), ("--dropout 1", "dropout"),
    ("--out README.md", "README.md"), ("--out=", "--out must name a folder"),
    ("--backbone-lr 0", "untrained"), ("--backbone-lr 0 --offsets 1", "heads must train"),
    ("--head-warmup 5 --offsets 1", "heads must train"),
    ("--head-warmup 5 --head-weight 0", "heads must train --head-weight")])
def test_bad_options_are_one_line(options, words, corpus, tmp_path):
    result = command("train.py", "--data", corpus, "--out", tmp_path, *TINY, *options.split())
    assert_one_line_error(result, *words.split())
    assert not os.listdir(tmp_path)


def test_a_run_is_overwritten_only_on_demand_and_then_leaves_nothing_behind(corpus, tmp_path):
    options = ["--data", corpus, "--out", tmp_path, *TINY, "--log-every", 1, "--steps"]
    assert command("train.py", *options, 3).returncode == 0
    assert_one_line_error(command("train.py", *options, 2), "already holds a run", "--resume")
    assert command("train.py", *options, 2, "--overwrite").returncode == 0
    assert [record["step"] for record in records(tmp_path, "loss")] == [1, 2]


def test_what_would_be_another_run_is_not_resumed(run_folder, corpus, tmp_path):
    other = prepare.prepare(str(ROOT / "README.md"), out=tmp_path / "other")
    run = shutil.copytree(run_folder, tmp_path / "run")
    for options, words in ((["--seed", 1], "--seed --init"), (["--data", other], "the corpus")):
        result = command("train.py", "--resume", run, "--steps", 121, *options)
        assert_one_line_error(result, *words.split())
        assert not records(run, "changed")
    save_checkpoint(run / "checkpoint.pt", tiny_model())
    assert_one_line_error(command("train.py", "--resume", run), "no run to resume")
    result = command("train.py", "--init", run, "--data", other, "--out", tmp_path / "new")
    assert_one_line_error(result, "gpt2")  # 31 token ids cannot be bytes
    result = command("train.py", "--init", run_folder, "--data", corpus, "--n-layer", 2,
                     "--dropout", 0)
    assert_one_line_error(result, "the model of --init has its own n_layer, dropout")


# ---- Decoding, marginalisation ---------------------------------------------------------------

@pytest.mark.parametrize("prompts, new_tokens, message", [
    ([], 5, "no prompt"), ([[1], []], 5, "empty"), ([[1, 31]], 5, "outside 0..30"),
    ([[-1]], 5, "outside"), ([[1]], 0, "1 prompt tokens and 0 new"),
    ([[1], [1] * 60], 5, "60 prompt tokens and 5 new ones do not fit into a length of 64")])
def test_a_prompt_that_cannot_be_continued_raises_an_error(prompts, new_tokens, message):
    with pytest.raises(InputError, match=message):
        Decoder(tiny_model()).generate(prompts, new_tokens)


@pytest.mark.parametrize("script, options, words", [
    *(("decode.py", options, words) for options, words in [
        ("--methods 1,6", "no head"), ("--methods one", "offsets"), ("--data no/such", "no/such"),
        ("--temperature -1", "temperature"), ("--top-p 3", "top_p"), ("--device hpu", "hpu"),
        ("--prompts 0", "--prompts"), ("--new-tokens abc", "--new-tokens"), ("--prompt=", "empty"),
        ("--out no/such/x.json", "no/such"), ("--out tests", "folder"), ("--out /dev/full", "file"),
        ("--nonsense", "--nonsense"), ("--prompt " + 32 * "x", "32 prompt tokens")]),
    *(("decode.py", f"--prompt x --{option}", f"--{option.split()[0]} does not go with --prompt")
      for option in ("data x", "prompts 2", "batch-size 2", "eager", "out x.json")),
    *(("marginalize.py", options, words) for options, words in [
        ("--horizon 0", "horizon"), ("--horizon 17", "horizon"), ("--branches 0", "branches"),
        ("--windows 0", "--windows"), ("--windows 1", "--windows"), ("--positions 0", "position"),
        ("--data nowhere", "nowhere"), ("--device tpu", "tpu"), ("--horizon x", "--horizon"),
        ("--out no/such/x.json", "no/such"), ("--out tests", "folder")])])
def test_bad_options_are_one_line_before_any_work(script, options, words, run_folder):
    result = command(script, run_folder, *options.split())
    assert_one_line_error(result, words)
    assert result.stdout == ""


def test_help_shows_the_defaults_that_there_are():
    shown = command("train.py", "--help").stdout
    assert "(default: 0)" in shown and "None" not in shown and "True" not in shown


@pytest.mark.parametrize("script", ["decode.py", "marginalize.py"])
def test_a_missing_or_foreign_run_is_one_line(script, run_folder, corpus, tmp_path):
    assert_one_line_error(command(script, tmp_path / "nothing"), "no checkpoint", "train.py")
    assert_one_line_error(command(script, corpus / "meta.json"), "damaged")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "foreign.pt")
    assert_one_line_error(command(script, tmp_path / "foreign.pt"), "not a checkpoint")
    model, state = load_checkpoint(run_folder)
    for key in ("gpt_config", "heads_config"):
        state.pop(key)
    save_checkpoint(tmp_path / "checkpoint.pt", model, **{**state, "tokenizer": "gpt2"})
    assert_one_line_error(command(script, tmp_path, "--data", corpus), "gpt2 token")


# ---- The world around: terminals, pipes, compilers, launchers --------------------------------

def test_a_measurement_is_shown_on_a_terminal_without_its_signs(run_folder, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = process("marginalize.py", run_folder, "--windows", 2, "--positions", 1, "--horizon", 2,
                     "--branches", 2)
    assert result.returncode == 0, result.stderr
    assert "t+2" in result.stdout and "?" in result.stdout  # for the plus-minus sign


def test_a_closed_pipe_ends_a_stream_silently(run_folder):
    child = subprocess.Popen([sys.executable, "decode.py", run_folder, "--prompt", "def "],
                             cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.close()
    assert child.stderr.read() == "" and child.wait(60) != 0


SCRIPTS = [(path, "torch") for path in [*ROOT.glob("*.py"), *ROOT.glob("experiments/**/*.py")]
           if "def main(" in path.read_text()]


@pytest.mark.parametrize("script, package", [*SCRIPTS, (ROOT / "data" / "prepare.py", "numpy")])
def test_ctrl_c_while_a_package_is_imported_is_one_line(script, package, tmp_path, monkeypatch):
    interrupt = "import signal; signal.raise_signal(signal.SIGINT)"
    (tmp_path / f"{package}.py").write_text(interrupt)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = process(script, "--help")
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "stopped\n")


def test_without_a_compiler_decoders_are_compared_eagerly(run_folder, tmp_path, monkeypatch):
    for name, value in dict(CC="false", CXX="false", TORCHINDUCTOR_CACHE_DIR=tmp_path).items():
        monkeypatch.setenv(name, str(value))
    result = process("decode.py", run_folder, "--prompts", 1, "--new-tokens", 4)
    assert result.returncode == 0 and "cpu, eager" in result.stdout, result.stderr


def test_the_variables_of_a_launcher_change_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = process("train.py", "--data", corpus, "--out", tmp_path, *TINY, "--steps", 1,
                     "--offsets", 1)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"done: python decode.py {tmp_path}\n")


def test_a_padded_vocabulary_is_still_that_of_its_tokenizer():
    assert tokenizer_name(tiny_model(vocab_size=50304), {}) == "gpt2"
    assert tokenizer_name(tiny_model(vocab_size=257), {}) == "bytes"


def test_a_model_to_decode_leaves_the_optimizers_on_the_disk(run_folder):
    assert "optimizers" in load_checkpoint(run_folder)[1]
    assert "optimizers" not in load_model(run_folder)[1]
