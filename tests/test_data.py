"""Lesson 2: what a corpus is, from the token up: bytes, documents, splits, the folder, batches.

Everything is real, on small texts. Nothing is downloaded: a file:// URL plays the server.
"""
import gzip
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import assert_one_line_error, command, process
from data import prepare
from data.loader import Corpus
from data.prepare import CorpusError, get_tokenizer

TEXT = "To be, or not to be: that is the question.\n" * 40
END = 256


def make(tmp_path, text=TEXT, **options):
    """Write `text` to a file and prepare it. -> the corpus"""
    source = tmp_path / "text.txt"
    source.write_text(text, encoding="utf-8", newline="")
    return Corpus(prepare.prepare(str(source), out=tmp_path / "text", **options))


def documents(tokens):
    """The texts between the end-of-text tokens."""
    text = get_tokenizer("bytes").decode(tokens.tolist())
    assert text.endswith("<|endoftext|>")
    return text.split("<|endoftext|>")[:-1]


def files_under(folder):
    """{relative path: content} of all files under a folder, hidden ones included."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------
# A token

def test_a_bytes_token_is_a_byte():
    tokenizer, text = get_tokenizer("bytes"), "naïve 日本 🙂\r\n\t\0"
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert tokenizer.decode_bytes(list(range(256))) == bytes(range(256))  # also what is not text


def test_the_257th_bytes_token_is_end_of_text():
    tokenizer = get_tokenizer("bytes")
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (257, END)
    assert tokenizer.decode([END]) == "<|endoftext|>"


def test_end_of_text_written_out_in_a_text_is_ordinary_text(tmp_path):
    corpus = make(tmp_path, "<|endoftext|>" * 20)
    assert corpus.train.tolist().count(END) == 1  # the one that ends the document


def test_the_fast_path_for_bytes_gives_the_ids_of_the_tokenizer():
    text = "".join(map(chr, range(1, 0x3000, 7))) + "🙂<|endoftext|>\r\n"
    ids = prepare.encode(get_tokenizer("bytes"), text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == get_tokenizer("bytes").encode_ordinary(text)


# ----------------------------------------------------------------------------------------------
# From text to splits

def test_a_text_is_split_by_position_and_each_split_ends_with_end_of_text(tmp_path):
    text = "".join(chr(0x100 + i) for i in range(100))  # two bytes each, and none is cut in two
    corpus = make(tmp_path, text, val_fraction=0.25)
    assert corpus.train.tolist() == list(text[:75].encode()) + [END]
    assert corpus.val.tolist() == list(text[75:].encode()) + [END]


def test_line_ends_are_kept_as_they_are(tmp_path):
    corpus = make(tmp_path, "one\r\ntwo\n" * 20)
    assert bytes(corpus.train[:9].astype(np.uint8)) == b"one\r\ntwo\n"


def write_files(folder, contents):
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.fixture
def library(tmp_path):
    """A small stand-in for the standard library: 20 modules, and files that are not of it."""
    unwanted = ["test/a.py", "package0/tests/b.py", "idlelib/idle_test/c.py", "site-packages/d.py",
                "__pycache__/e.py", ".hidden/f.py", "package1/.g.py", "notes.txt"]
    return write_files(tmp_path / "library", {
        **{f"package{i % 3}/module{i}.py": f"number = {i}\n" for i in range(20)},
        **dict.fromkeys(unwanted, "unwanted = True\n"),
        "latin1.py": b"name = '\xe9'\n", "blank.py": "\n"})


def test_logs_are_json_lines_with_fixed_keys_and_three_quarters_the_same_in_every_line():
    text = prepare.make_logs(seed=0, lines=500)
    lines = text.splitlines()
    assert len({tuple(json.loads(line)) for line in lines}) == 1  # the keys
    template = prepare.LOG_LINE.format(*[0] * 3, "", "", 0, 0, "", "", "", "")
    zeros = len("000000") + len("00") + len(f"{0:024x}")
    assert 0.7 < (len(template) - zeros) * len(lines) / len(text) < 0.8
    assert prepare.make_logs(0, 500) == text != prepare.make_logs(1, 500)


def test_python_is_split_by_file_without_overlap_or_loss(tmp_path, library):
    out = tmp_path / "corpus"
    corpus = Corpus(prepare.prepare("python", out=out, local=library, val_fraction=0.2))
    train, val = documents(corpus.train), documents(corpus.val)
    assert len(val) == 4
    assert sorted(train + val) == sorted(f"number = {i}\n" for i in range(20))


def test_the_split_is_fixed_by_the_seed(library):
    first, again, other = (prepare.load("python", library, 0.1, seed) for seed in (0, 0, 1))
    assert first == again and first["val"] != other["val"]


def test_a_new_file_does_not_reshuffle_the_split_of_the_others(library):
    before = prepare.load("python", library, 0.5, 0)
    (library / "new.py").write_text("new = True\n")
    moved = set(before["val"]) ^ set(prepare.load("python", library, 0.5, 0)["val"])
    assert len(moved - {"new = True\n"}) <= 1  # only the file at the border


def test_the_default_source_is_the_standard_library_without_its_tests():
    splits = prepare.load("python", None, 0.1, 0)
    everything = splits["train"] + splits["val"]
    assert sum(map(len, everything)) > 3_000_000
    assert Path(json.__file__).read_text() in everything
    assert not any("import test.support" in text for text in everything)


def test_a_folder_is_split_by_file_and_what_is_not_text_is_skipped(tmp_path):
    folder = write_files(tmp_path / "notes", {
        "a.md": "first\n", "deep/b.txt": "second\n", ".secret": "hidden\n",
        "picture.png": b"\x89PNG\xff", "zeros.dat": b"\0\0"})
    corpus = Corpus(prepare.prepare(str(folder), out=tmp_path / "corpus"))
    assert sorted(documents(corpus.train) + documents(corpus.val)) == ["first\n", "second\n"]


def test_a_folder_with_one_text_is_split_by_position(tmp_path):
    write_files(tmp_path / "notes", {"only.txt": "0123456789"})
    corpus = Corpus(prepare.prepare(str(tmp_path / "notes"), out=tmp_path / "corpus"))
    assert (documents(corpus.train), documents(corpus.val)) == (["012345678"], ["9"])


def test_a_corpus_in_the_folder_it_was_made_from_is_no_text_of_the_next_one(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    out = tmp_path / "corpus"
    first, again = (Corpus(prepare.prepare(str(tmp_path), out=out, force=True)).meta for _ in "ab")
    assert first == again


def write_multi30k(folder, english, german):
    packed = {f"{split}.{language}.gz": gzip.compress((start + text).encode())
              for split, start in (("train", ""), ("val", "val "))
              for language, text in (("en", english), ("de", german))}
    return write_files(folder, packed)


def test_a_multi30k_pair_is_one_line_with_one_tab(tmp_path):
    english, german = "A man. \nTwo\tbig\rdogs.\n", "Ein Mann. \nZwei\x85Hunde.\n"
    raw = write_multi30k(tmp_path / "raw", english, german)
    corpus = Corpus(prepare.prepare("multi30k", out=tmp_path / "corpus", local=raw))
    text = "A man.\tEin Mann.\nTwo big dogs.\tZwei Hunde.\n"
    assert documents(corpus.train) == [text]
    assert documents(corpus.val) == ["val " + text.replace("\tEin", "\tval Ein")]


# ----------------------------------------------------------------------------------------------
# The folder on disk

def test_meta_json_says_what_the_corpus_is_and_the_hashes_match(tmp_path):
    corpus = make(tmp_path, "é" * 10, val_fraction=0.2)
    meta = json.loads((corpus.folder / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["seed"]) == ("bytes", 257, 0)
    assert (meta["train_bytes"], meta["train_tokens"]) == (16, 17)  # 8 characters, end-of-text
    assert (meta["val_bytes"], meta["val_tokens"]) == (4, 5)
    for split in ("train", "val"):
        content = (corpus.folder / f"{split}.bin").read_bytes()
        assert hashlib.sha256(content).hexdigest() == meta[f"{split}_sha256"]
        assert np.frombuffer(content, "<u2").tolist() == getattr(corpus, split).tolist()


def test_a_document_may_be_token_ids_that_are_not_text(tmp_path):
    ids = np.array([0xFF, 0x00, 0xE9], dtype="<u2")
    meta = prepare.write_corpus(tmp_path / "own", dict(train=[ids, ids], val=[ids]),
                                get_tokenizer("bytes"), dict(tokenizer="bytes"))
    assert (meta["train_documents"], meta["train_tokens"], meta["train_bytes"]) == (2, 8, 6)
    assert Corpus(tmp_path / "own").train.tolist() == [*ids, END, *ids, END]


def test_a_corpus_that_is_already_there_is_not_built_again(tmp_path):
    file = make(tmp_path).folder / "train.bin"
    before = file.stat().st_mtime_ns
    make(tmp_path)
    assert file.stat().st_mtime_ns == before
    make(tmp_path, force=True)
    assert file.stat().st_mtime_ns != before


@pytest.mark.parametrize("change", ["text", "setting", "damage"])
def test_a_changed_text_or_setting_or_a_damaged_file_means_building_again(tmp_path, change):
    file = make(tmp_path).folder / "val.bin"
    if change == "damage":
        file.write_bytes(b"\0" * file.stat().st_size)
    text = TEXT[::-1] if change == "text" else TEXT
    fraction = 0.2 if change == "setting" else 0.1
    again = make(tmp_path, text, val_fraction=fraction)
    assert again.val.tolist() == list(text[int(len(text) * (1 - fraction)):].encode()) + [END]


def test_an_open_corpus_keeps_its_tokens_while_it_is_replaced_on_disk(tmp_path):
    old = make(tmp_path)
    before = old.train.tolist()
    make(tmp_path, TEXT[::-1])
    assert old.train.tolist() == before


# ----------------------------------------------------------------------------------------------
# Batches

def test_a_batch_is_int64_windows_of_the_split(tmp_path):
    corpus = make(tmp_path)
    batch = corpus.batch("train", 5, 16, step=0)
    assert (batch.shape, batch.dtype) == ((5, 16), torch.int64)
    tokens = corpus.train.tolist()
    windows = [tokens[i:i + 16] for i in range(len(tokens) - 15)]
    assert all(row in windows for row in batch.tolist())


def test_a_batch_depends_on_seed_and_step_and_on_nothing_else(tmp_path):
    corpus = make(tmp_path, "".join(chr(33 + i * i % 90) for i in range(4000)))
    now = dict(step=7, seed=1)
    batch = corpus.batch("train", 4, 64, **now)
    np.random.seed(0), torch.manual_seed(0)
    resumed = Corpus(corpus.folder)
    assert torch.equal(resumed.batch("train", 4, 64, **now), batch)
    for change in (dict(step=8), dict(seed=0)):
        assert not torch.equal(resumed.batch("train", 4, 64, **{**now, **change}), batch)


def test_train_and_val_batches_have_different_starts(tmp_path):
    text = "".join(map(chr, range(0x100, 0x100 + 400))) * 2
    corpus = make(tmp_path, text, val_fraction=0.5)
    assert corpus.train.tolist() == corpus.val.tolist()
    assert not torch.equal(corpus.batch("train", 8, 8, step=0), corpus.batch("val", 8, 8, step=0))


def test_a_window_can_start_at_the_first_token_and_end_at_the_last(tmp_path):
    corpus = make(tmp_path, "0123456789", val_fraction=0.5)
    starts = {chr(row[0]) for row in corpus.batch("train", 200, 3, step=0).tolist()}
    assert starts == {"0", "1", "2", "3"}  # of 0 1 2 3 4 and end-of-text
    assert corpus.batch("train", 2, 6, step=0).tolist() == [[48, 49, 50, 51, 52, END]] * 2


def test_validation_windows_are_evenly_spaced_and_the_same_every_time(tmp_path):
    corpus = make(tmp_path, "".join(map(chr, range(33, 33 + 85))), val_fraction=0.5)
    windows = corpus.windows("val", 4, 10)
    assert (windows.shape, windows.dtype) == ((4, 10), torch.int64)
    assert windows[0].tolist() == corpus.val[:10].tolist()
    assert windows[-1].tolist() == corpus.val[-10:].tolist()
    assert windows[:-1, 0].diff().unique().numel() <= 2  # even up to rounding
    assert torch.equal(Corpus(corpus.folder).windows("val", 4, 10), windows)


@pytest.mark.parametrize("split, length", [("val", 0), ("val", 10_000), ("test", 8)])
def test_a_window_that_does_not_fit_or_an_unknown_split_is_an_error(tmp_path, split, length):
    corpus = make(tmp_path)
    for windows in (corpus.windows, lambda *what: corpus.batch(*what, step=0)):
        with pytest.raises(CorpusError):
            windows(split, 2, length)


# ----------------------------------------------------------------------------------------------
# The command line

def test_the_script_writes_to_data_in_its_own_project_from_any_folder(tmp_path):
    write_files(tmp_path, {"project/data/prepare.py": Path(prepare.__file__).read_text(),
                           "elsewhere/notes.txt": TEXT})
    folder = tmp_path / "project" / "data" / "notes"
    result = process(folder.parent / "prepare.py", tmp_path / "elsewhere" / "notes.txt")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (f"1,549 train and 173 val tokens (bytes) in {folder}; "
                             f"next: python train.py --data {folder}\n")
    assert len(Corpus(folder).train) == 1549


def test_another_version_of_a_raw_file_is_only_a_warning(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text(TEXT)
    for path in (tmp_path, tmp_path / "tinyshakespeare.txt"):  # a folder or the file itself
        arguments = ["shakespeare", "--from", path, "--out", tmp_path / "corpus"]
        result = command("data/prepare.py", *arguments)
        assert (result.returncode, result.stderr.count("\n")) == (0, 1)
        assert "warning" in result.stderr
    corpus = Corpus(tmp_path / "corpus")
    assert documents(corpus.train) + documents(corpus.val) == [TEXT[:1548], TEXT[1548:]]
    assert corpus.meta["source"] == "shakespeare"


def test_help_shows_examples_that_can_be_typed():
    result = command("data/prepare.py", "--help")
    assert result.returncode == 0
    assert "python data/prepare.py multi30k" in result.stdout


@pytest.mark.parametrize("arguments, message", [
    (["nowhere.txt"], "no file or folder"), ([""], "empty"),
    (["latin1.txt"], "not UTF-8"), (["empty.txt"], "would be empty"), (["one.txt"], "train split"),
    (["empty"], "would be empty"), (["good.txt", "bad.txt"], "unrecognized arguments"),
    (["good.txt", "--tokenizer", "words"], "invalid choice"), (["good.txt", "--seed", "x"], "int"),
    (["good.txt", "--val-fraction", "1.5"], "between 0 and 1"),
    (["good.txt", "--from", "good.txt"], "--from"), (["good.txt", "--out", ""], "empty"),
    (["good.txt", "--out", "thesis"], "not a corpus"),
    (["good.txt", "--out", "good.txt"], "not a corpus"),
    (["good.txt", "--out", "good.txt/corpus"], "good.txt"),
    (["python", "--from", "empty"], "would be empty"), (["shakespeare", "--from", "no"], "no"),
    (["shakespeare", "--from", "empty"], "tinyshakespeare.txt"),
    (["multi30k", "--from", "empty"], "train.en.gz"),
    (["multi30k", "--from", "good.txt"], "train.en.gz"),
    (["multi30k", "--from", "broken"], "not a whole gzip file"),
    (["multi30k", "--from", "unequal"], "2 English but 1 German"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_one_line_and_changes_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(write_files(tmp_path, {
        "good.txt": TEXT, "latin1.txt": b"caf\xe9", "empty.txt": "", "one.txt": "1",
        "thesis/chapter1.tex": "years of work"}))
    (tmp_path / "empty").mkdir()
    write_multi30k(tmp_path / "unequal", "one\ntwo\n", "eins\n")
    cut_short = write_multi30k(tmp_path / "broken", "a\n", "b\n") / "train.en.gz"
    cut_short.write_bytes(gzip.compress(TEXT.encode())[:-20])
    before = files_under(tmp_path)
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "corpus"]
    result = command("data/prepare.py", *arguments)
    lines = result.stderr.splitlines(True)
    result.stderr = "".join(line for line in lines if "warning" not in line)
    assert_one_line_error(result, "prepare.py: error: ", message)
    assert files_under(tmp_path) == before


def test_gpt2_without_its_files_or_a_network_says_what_to_do(tmp_path, monkeypatch):
    import tiktoken.registry
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # nothing is loaded yet
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    (tmp_path / "text.txt").write_text(TEXT)
    result = command("data/prepare.py", tmp_path / "text.txt", "--tokenizer", "gpt2",
                     "--out", tmp_path / "corpus")
    assert_one_line_error(result, "TIKTOKEN_CACHE_DIR")
    assert not (tmp_path / "corpus").exists()


# ----------------------------------------------------------------------------------------------
# Guards: damaged folders

def test_a_missing_corpus_says_what_to_run(tmp_path):
    with pytest.raises(CorpusError, match="data/prepare.py"):
        Corpus(tmp_path / "nothing")


@pytest.mark.parametrize("damage, message", [
    (lambda meta: meta[:-9], "damaged"),
    (lambda meta: "[]", "damaged"),
    (lambda meta: meta.replace("tokenizer", "tokeniser"), "damaged"),
    (lambda meta: meta.replace('"train_tokens": ', '"train_tokens": -'), "damaged"),
    (lambda meta: meta.replace('"bytes"', '"words"'), "words"),
    (lambda meta: meta.replace('"vocab_size": 257', '"vocab_size": 300'), "300"),
], ids=["cut short", "not a table", "no tokenizer", "negative size", "unknown", "vocab_size"])
def test_a_damaged_meta_json_is_an_error(tmp_path, damage, message):
    path = make(tmp_path).folder / "meta.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(CorpusError, match=message):
        Corpus(path.parent)
    assert make(tmp_path, force=True).vocab_size == 257  # what the message advises


@pytest.mark.parametrize("content", [None, b"", b"\0\0\0"])
def test_a_bin_file_that_is_not_as_long_as_promised_is_an_error(tmp_path, content):
    path = make(tmp_path).folder / "val.bin"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CorpusError, match="val.bin"):
        Corpus(path.parent)


def test_a_preparation_that_fails_halfway_leaves_the_old_corpus_whole(tmp_path):
    folder = make(tmp_path).folder
    before = files_under(tmp_path)
    splits = {"train": ["new"], "val": ["\ud800"]}  # a lone surrogate has no UTF-8
    with pytest.raises(UnicodeEncodeError):
        prepare.write_corpus(folder, splits, get_tokenizer("bytes"), {})
    assert files_under(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["text", "text.txt"]


interrupt = {"countdown": None, "folder": None}


def interrupt_at_countdown(event, arguments):
    """An audit hook: Python calls it before each file operation. Plays Ctrl-C at the n-th."""
    if interrupt["countdown"] is None or event not in ("open", "os.mkdir", "os.rename"):
        return
    path = str(arguments[0])
    ours = event != "open" or path.endswith((".bin", ".json"))
    if ours and path.startswith(interrupt["folder"]):
        interrupt["countdown"] -= 1
        if interrupt["countdown"] < 0:
            interrupt["countdown"] = None
            raise KeyboardInterrupt


def test_an_interruption_at_any_file_operation_leaves_the_old_corpus_or_the_new_one(tmp_path):
    sys.addaudithook(interrupt_at_countdown)  # cannot be removed, but can be idle
    new = files_under(make(tmp_path, TEXT[::-1]).folder)
    for step in range(100):
        old = files_under(make(tmp_path, TEXT).folder)
        (tmp_path / "text.txt").write_text(TEXT[::-1])
        interrupt.update(countdown=step, folder=str(tmp_path))
        try:
            prepare.prepare(str(tmp_path / "text.txt"), out=tmp_path / "text")
        except KeyboardInterrupt:
            assert files_under(tmp_path / "text") in (old, new)
            assert sorted(os.listdir(tmp_path)) == ["text", "text.txt"]
        else:
            break
        finally:
            interrupt["countdown"] = None
    assert step >= 6  # at least: make a folder, open three files, rename twice
    assert files_under(tmp_path / "text") == new


# ----------------------------------------------------------------------------------------------
# Guards: downloads

@pytest.fixture
def server(tmp_path, monkeypatch):
    """Plays the web server of tinyshakespeare.txt. -> the file that it serves"""
    served = tmp_path / "served" / "input.txt"
    write_files(tmp_path, {"served/input.txt": TEXT})
    monkeypatch.setattr(prepare, "RAW_FOLDER", tmp_path / "raw")
    monkeypatch.setattr(prepare, "SHAKESPEARE", served.as_uri())
    monkeypatch.setattr(prepare, "RAW_FILES", {
        "tinyshakespeare.txt": hashlib.sha256(TEXT.encode()).hexdigest()})
    return served


def test_a_raw_file_is_downloaded_once_and_again_only_when_it_is_damaged(tmp_path, server):
    assert prepare.raw_bytes("tinyshakespeare.txt") == TEXT.encode()
    (tmp_path / "raw" / "tinyshakespeare.txt").write_bytes(b"damaged")
    assert prepare.raw_bytes("tinyshakespeare.txt") == TEXT.encode()
    server.unlink()
    assert prepare.raw_bytes("tinyshakespeare.txt") == TEXT.encode()
    assert files_under(tmp_path) == {"raw/tinyshakespeare.txt": TEXT.encode()}


@pytest.mark.parametrize("content", [None, b"", TEXT.encode()[:-1], TEXT.encode()[:-1] + b"!"])
def test_a_download_that_is_not_the_published_file_leaves_nothing(tmp_path, server, content):
    server.unlink() if content is None else server.write_bytes(content)
    result = command("data/prepare.py", "shakespeare", "--out", tmp_path / "corpus")
    assert_one_line_error(result, "cannot download", "try again")
    server.unlink(missing_ok=True)
    assert files_under(tmp_path) == {}


def test_ctrl_c_during_a_download_leaves_the_old_corpus(tmp_path, server, monkeypatch):
    class Interrupted(torch.hub.tqdm):
        def update(self, n=1):  # some of the file has been written by now
            raise KeyboardInterrupt

    (tmp_path / "input.txt").write_text(TEXT * 2)
    prepare.prepare("shakespeare", out=tmp_path / "corpus", local=tmp_path / "input.txt")
    before = files_under(tmp_path)
    monkeypatch.setattr(torch.hub, "tqdm", Interrupted)
    result = command("data/prepare.py", "shakespeare", "--out", tmp_path / "corpus")
    assert result.returncode == 130
    assert result.stderr == "prepare.py: interrupted, nothing half-written is left\n"
    assert files_under(tmp_path) == before
