"""What a corpus is, from the token up: bytes, documents and splits, the folder on disk, batches, bad input.

Everything runs for real on small texts. Downloads come from a web server inside the test, never from outside.
"""
import gzip
import hashlib
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from data import prepare
from data.loader import Corpus
from data.prepare import CorpusError, get_tokenizer

ROOT = Path(prepare.__file__).resolve().parent.parent
PREPARE = ROOT / "data" / "prepare.py"
TEXT = "To be, or not to be: that is the question.\n" * 40
END = 256


def make(tmp_path, text=TEXT, name="text", **options):
    """Write `text` to a file, prepare it, and return the corpus."""
    source = tmp_path / f"{name}.txt"
    source.write_text(text, encoding="utf-8", newline="")
    return Corpus(prepare.prepare(str(source), out=tmp_path / name, **options))


def run(*arguments, cwd=None, **environment):
    """Run the real command line."""
    return subprocess.run([sys.executable, str(PREPARE), *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, env={**os.environ, **environment}, timeout=60)


def files_under(folder):
    """{relative path: content} of all that lies under a folder, hidden files included."""
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in Path(folder).rglob("*") if path.is_file()}


# A token

def test_a_bytes_token_is_a_byte():
    tokenizer = get_tokenizer("bytes")
    text = "naïve 日本 🙂\r\n\t\0"
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_every_byte_survives_the_round_trip_even_where_it_is_not_text():
    assert get_tokenizer("bytes").decode_bytes(list(range(256))) == bytes(range(256))


def test_the_257th_bytes_token_is_end_of_text():
    tokenizer = get_tokenizer("bytes")
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (257, END)
    assert tokenizer.decode([END]) == "<|endoftext|>"


def test_end_of_text_written_out_in_a_text_is_ordinary_text(tmp_path):
    corpus = make(tmp_path, "<|endoftext|>" * 20)
    assert corpus.train.tolist().count(END) == 1  # the one that ends the document


def test_the_fast_path_for_bytes_gives_the_ids_of_the_tokenizer():
    tokenizer = get_tokenizer("bytes")
    text = "".join(map(chr, range(1, 0x3000, 7))) + "🙂<|endoftext|>\r\n"
    ids = prepare.encode(tokenizer, text)
    assert ids.dtype == np.uint16
    assert ids.tolist() == tokenizer.encode_ordinary(text)


# From text to splits

def test_a_text_file_is_split_by_position_and_each_split_ends_with_end_of_text(tmp_path):
    text = "".join(chr(0x100 + i) for i in range(100))  # two bytes each: no character may be cut in two
    corpus = make(tmp_path, text, val_fraction=0.25)
    assert corpus.train.tolist() == list(text[:75].encode()) + [END]
    assert corpus.val.tolist() == list(text[75:].encode()) + [END]


def test_line_ends_are_kept_as_they_are(tmp_path):
    corpus = make(tmp_path, "one\r\ntwo\n" * 20)
    assert bytes(corpus.train[:9].astype(np.uint8)) == b"one\r\ntwo\n"


def write_library(folder):
    """A small stand-in for the standard library: 20 modules, and files that do not belong in a corpus."""
    for i in range(20):
        path = folder / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"number = {i}\n")
    for name in ("test/a.py", "package0/tests/b.py", "idlelib/idle_test/c.py", "site-packages/d.py",
                 "__pycache__/e.py", ".hidden/f.py", "package1/.g.py", "notes.txt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("unwanted = True\n")
    (folder / "latin1.py").write_bytes(b"name = '\xe9'\n")
    (folder / "blank.py").write_text("\n")
    return folder


def documents(tokens):
    """The texts between the end-of-text tokens."""
    text = get_tokenizer("bytes").decode(tokens.tolist())
    assert text.endswith("<|endoftext|>")
    return text.split("<|endoftext|>")[:-1]


def test_python_files_are_split_by_file_without_overlap_or_loss(tmp_path):
    library = write_library(tmp_path / "library")
    corpus = Corpus(prepare.prepare("python", out=tmp_path / "corpus", local=library, val_fraction=0.2))
    train, val = documents(corpus.train), documents(corpus.val)
    assert len(val) == 4
    assert sorted(train + val) == sorted(f"number = {i}\n" for i in range(20))


def test_the_split_is_the_same_every_time_and_another_seed_gives_another(tmp_path):
    library = write_library(tmp_path / "library")
    val = [documents(Corpus(prepare.prepare("python", out=tmp_path / name, local=library, seed=seed)).val)
           for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert val[0] == val[1] != val[2]


def test_a_new_file_does_not_reshuffle_the_split_of_the_others(tmp_path):
    library = write_library(tmp_path / "library")
    before = prepare.load_python(library, 0.5, 0)
    (library / "new.py").write_text("new = True\n")
    after = prepare.load_python(library, 0.5, 0)
    moved = set(before["val"]) ^ set(after["val"])
    assert len(moved - {"new = True\n"}) <= 1  # only the file at the border may change sides


def test_the_real_standard_library_is_there_and_holds_no_tests(tmp_path):
    splits = prepare.load_python(None, 0.1, 0)
    everything = splits["train"] + splits["val"]
    assert sum(map(len, everything)) > 3_000_000
    assert Path(json.__file__).read_text() in everything
    assert not any("import test.support" in text for text in everything)


def test_a_folder_of_texts_is_split_by_file_and_skips_what_is_not_text(tmp_path):
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.md").write_text("first\n")
    (folder / "deep" / "b.txt").write_text("second\n")
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    (folder / "zeros.dat").write_bytes(b"\0\0")
    (folder / ".secret").write_text("hidden\n")
    corpus = Corpus(prepare.prepare(str(folder), out=tmp_path / "corpus"))
    assert sorted(documents(corpus.train) + documents(corpus.val)) == ["first\n", "second\n"]


def test_a_folder_with_one_text_is_split_by_position(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "only.txt").write_text("0123456789")
    corpus = Corpus(prepare.prepare(str(tmp_path / "notes"), out=tmp_path / "corpus"))
    assert (documents(corpus.train), documents(corpus.val)) == (["012345678"], ["9"])


def test_a_corpus_inside_the_folder_it_was_made_from_does_not_feed_the_next_one(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    first = Corpus(prepare.prepare(str(tmp_path), out=tmp_path / "corpus")).meta
    assert Corpus(prepare.prepare(str(tmp_path), out=tmp_path / "corpus", force=True)).meta == first


def write_multi30k(folder, english, german):
    folder.mkdir()
    for language, text in (("en", english), ("de", german)):
        (folder / f"train.{language}.gz").write_bytes(gzip.compress(text.encode()))
        (folder / f"val.{language}.gz").write_bytes(gzip.compress(b"val " + text.encode()))
    return folder


def test_a_multi30k_pair_is_one_line_with_one_tab(tmp_path):
    english, german = "A man. \nTwo\tbig\rdogs.\n", "Ein Mann. \nZwei\x85große Hunde.\n"
    raw = write_multi30k(tmp_path / "raw", english, german)
    corpus = Corpus(prepare.prepare("multi30k", out=tmp_path / "corpus", local=raw))
    text = "A man.\tEin Mann.\nTwo big dogs.\tZwei große Hunde.\n"
    assert documents(corpus.train) == [text]
    assert documents(corpus.val) == ["val " + text.replace("\tEin", "\tval Ein")]


def test_the_german_half_can_be_cut_out_of_the_tokens(tmp_path):
    raw = write_multi30k(tmp_path / "raw", "A man.\nDogs.\n", "Ein Mann.\nHunde.\n")
    corpus = Corpus(prepare.prepare("multi30k", out=tmp_path / "corpus", local=raw))
    german, inside = [], False
    for token in corpus.train.tolist():
        if inside:
            german.append(token)
        inside = token == ord("\t") or (inside and token != ord("\n"))
    assert bytes(german).decode() == "Ein Mann.\nHunde.\n"


def test_multi30k_lines_without_a_partner_are_an_error(tmp_path):
    raw = write_multi30k(tmp_path / "raw", "one\ntwo\n", "eins\n")
    with pytest.raises(CorpusError, match="2 English but 1 German"):
        prepare.prepare("multi30k", out=tmp_path / "corpus", local=raw)


# The folder on disk

def test_meta_json_says_what_the_corpus_is_and_the_hashes_match(tmp_path):
    corpus = make(tmp_path, "é" * 10, val_fraction=0.2)
    meta = json.loads((corpus.folder / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["seed"]) == ("bytes", 257, 0)
    assert (meta["train_bytes"], meta["train_tokens"]) == (16, 17)  # 8 characters of 2 bytes, end-of-text
    assert (meta["val_bytes"], meta["val_tokens"]) == (4, 5)
    for split in ("train", "val"):
        content = (corpus.folder / f"{split}.bin").read_bytes()
        assert hashlib.sha256(content).hexdigest() == meta[f"{split}_sha256"]
        assert np.frombuffer(content, "<u2").tolist() == getattr(corpus, split).tolist()


def test_a_corpus_that_is_already_there_is_not_built_again(tmp_path):
    corpus = make(tmp_path)
    before = (corpus.folder / "train.bin").stat().st_mtime_ns
    make(tmp_path)
    assert (corpus.folder / "train.bin").stat().st_mtime_ns == before
    make(tmp_path, force=True)
    assert (corpus.folder / "train.bin").stat().st_mtime_ns != before


@pytest.mark.parametrize("change", ["text", "setting", "damage"])
def test_a_changed_text_or_setting_or_a_damaged_file_means_building_again(tmp_path, change):
    corpus = make(tmp_path)
    if change == "damage":
        (corpus.folder / "val.bin").write_bytes(b"\0" * (corpus.folder / "val.bin").stat().st_size)
    text = TEXT[::-1] if change == "text" else TEXT
    fraction = 0.2 if change == "setting" else 0.1
    again = make(tmp_path, text, val_fraction=fraction)
    assert again.val.tolist() == list(text[int(len(text) * (1 - fraction)):].encode()) + [END]


def test_a_preparation_that_fails_halfway_leaves_the_old_corpus_whole(tmp_path):
    folder = make(tmp_path).folder
    before = files_under(tmp_path)
    unencodable = "\ud800"  # a lone surrogate: train is written by the time val fails
    with pytest.raises(UnicodeEncodeError):
        prepare.write_corpus(folder, {"train": ["new"], "val": [unencodable]}, get_tokenizer("bytes"), {})
    assert files_under(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["text", "text.txt"]


interrupt = {"countdown": None, "folder": None}


def interrupt_at_countdown(event, arguments):
    """An audit hook, called by Python before each file operation: plays Ctrl-C at the n-th in the folder."""
    if interrupt["countdown"] is None or event not in ("open", "os.mkdir", "os.rename"):
        return
    path = str(arguments[0])
    if path.startswith(interrupt["folder"]) and (event != "open" or path.endswith((".bin", ".json"))):
        interrupt["countdown"] -= 1
        if interrupt["countdown"] < 0:
            interrupt["countdown"] = None
            raise KeyboardInterrupt


def test_an_interruption_at_any_file_operation_leaves_the_old_corpus_or_the_new_one(tmp_path):
    sys.addaudithook(interrupt_at_countdown)  # cannot be removed, but does nothing while countdown is None
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


def test_an_open_corpus_keeps_its_tokens_while_it_is_replaced_on_disk(tmp_path):
    old = make(tmp_path)
    before = old.train.tolist()
    make(tmp_path, TEXT[::-1])
    assert old.train.tolist() == before


def test_a_folder_with_other_files_in_it_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(CorpusError, match="not a corpus"):
        make(tmp_path, name="thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


# Batches

def test_a_batch_is_int64_windows_of_the_split(tmp_path):
    corpus = make(tmp_path)
    batch = corpus.batch("train", 5, 16, step=0)
    assert (batch.shape, batch.dtype) == ((5, 16), torch.int64)
    tokens = corpus.train.tolist()
    places = [tokens[i:i + 16] for i in range(len(tokens) - 15)]
    assert all(row in places for row in batch.tolist())


def test_a_batch_depends_on_seed_step_and_rank_and_on_nothing_else(tmp_path):
    corpus = make(tmp_path)
    batch = corpus.batch("train", 4, 64, step=7, seed=1, rank=2)
    np.random.seed(0), torch.manual_seed(0)
    corpus.batch("train", 4, 64, step=8)
    resumed = Corpus(corpus.folder)
    assert torch.equal(resumed.batch("train", 4, 64, step=7, seed=1, rank=2), batch)


@pytest.mark.parametrize("change", [{"step": 1}, {"seed": 1}, {"rank": 1}])
def test_another_step_or_seed_or_rank_gives_another_batch(tmp_path, change):
    corpus = make(tmp_path, "".join(chr(33 + i * i % 90) for i in range(4000)))
    base = {"step": 0, "seed": 0, "rank": 0}
    batch, other = (corpus.batch("train", 8, 32, **arguments) for arguments in (base, {**base, **change}))
    assert not torch.equal(batch, other)


def test_train_and_val_batches_start_at_different_places(tmp_path):
    corpus = make(tmp_path, "".join(map(chr, range(0x100, 0x100 + 400))) * 2, val_fraction=0.5)
    assert corpus.train.tolist() == corpus.val.tolist()
    assert not torch.equal(corpus.batch("train", 8, 8, step=0), corpus.batch("val", 8, 8, step=0))


def test_a_window_can_start_at_the_first_token_and_end_at_the_last(tmp_path):
    corpus = make(tmp_path, "0123456789", val_fraction=0.5)
    starts = {chr(row[0]) for row in corpus.batch("train", 200, 3, step=0).tolist()}
    assert starts == {"0", "1", "2", "3"}  # 0 1 2 3 4 and end-of-text: the last window starts at 3
    assert corpus.batch("train", 2, 6, step=0).tolist() == [[48, 49, 50, 51, 52, END]] * 2


def test_validation_windows_are_evenly_spaced_and_the_same_every_time(tmp_path):
    corpus = make(tmp_path, "".join(map(chr, range(33, 33 + 85))), val_fraction=0.5)
    windows = corpus.windows("val", 4, 10)
    assert (windows.shape, windows.dtype) == ((4, 10), torch.int64)
    assert windows[0].tolist() == corpus.val[:10].tolist()
    assert windows[-1].tolist() == corpus.val[-10:].tolist()
    assert windows[:-1, 0].diff().unique().numel() <= 2  # spacing is even up to rounding
    assert torch.equal(Corpus(corpus.folder).windows("val", 4, 10), windows)


@pytest.mark.parametrize("length", [0, 10_000])
def test_a_window_that_does_not_fit_is_an_error(tmp_path, length):
    corpus = make(tmp_path)
    for windows in (lambda: corpus.batch("val", 2, length, step=0), lambda: corpus.windows("val", 2, length)):
        with pytest.raises(CorpusError, match="does not fit"):
            windows()


def test_an_unknown_split_is_an_error(tmp_path):
    with pytest.raises(CorpusError, match="use train or val"):
        make(tmp_path).batch("test", 2, 8, step=0)


# A folder that is not a corpus

def test_a_missing_corpus_says_what_to_run(tmp_path):
    with pytest.raises(CorpusError, match="python data/prepare.py python"):
        Corpus(tmp_path / "nothing")


@pytest.mark.parametrize("damage, message", [
    (lambda meta: meta[:-9], "meta.json is damaged"),
    (lambda meta: "[]", "meta.json is damaged"),
    (lambda meta: meta.replace("tokenizer", "tokeniser"), "meta.json is damaged"),
    (lambda meta: meta.replace('"train_tokens": ', '"train_tokens": -'), "meta.json is damaged"),
    (lambda meta: meta.replace('"bytes"', '"words"'), "unknown tokenizer 'words'"),
    (lambda meta: meta.replace('"vocab_size": 257', '"vocab_size": 300'), "300 token ids but bytes has 257"),
], ids=["cut short", "not a table", "no tokenizer", "negative size", "unknown tokenizer", "wrong vocab_size"])
def test_a_damaged_meta_json_is_an_error(tmp_path, damage, message):
    corpus = make(tmp_path)
    path = corpus.folder / "meta.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(CorpusError, match=message):
        Corpus(corpus.folder)


@pytest.mark.parametrize("content", [None, b"", b"\0\0\0"])
def test_a_bin_file_that_is_not_as_long_as_promised_is_an_error(tmp_path, content):
    corpus = make(tmp_path)
    path = corpus.folder / "val.bin"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CorpusError, match="meta.json promises"):
        Corpus(corpus.folder)


# Downloads

FILE = TEXT.encode() * 100
SIZE, SHA256 = len(FILE), hashlib.sha256(FILE).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """A web server with /whole, /damaged (one byte differs) and /half (promises all, then hangs up)."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in ("/whole", "/damaged", "/half", "/interrupt") else 404)
            self.send_header("Content-Length", str(SIZE))
            self.end_headers()
            if self.path == "/whole":
                self.wfile.write(FILE)
            elif self.path == "/damaged":
                self.wfile.write(FILE[:-1] + b"!")
            else:
                self.wfile.write(FILE[:SIZE // 2])
            if self.path == "/interrupt":  # Ctrl-C halfway, on the user's side
                self.wfile.flush()
                self.server.client.send_signal(signal.SIGINT)
                self.server.client.wait(30)

        def log_message(self, *arguments):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_download_appears_when_it_is_complete(tmp_path, server):
    prepare.download(f"{server.url}/whole", tmp_path / "raw" / "file.txt", SIZE, SHA256)
    assert files_under(tmp_path) == {"raw/file.txt": FILE}


@pytest.mark.parametrize("path", ["damaged", "half", "missing"])
def test_a_download_that_is_not_the_expected_file_leaves_nothing(tmp_path, server, path):
    with pytest.raises(CorpusError, match="try again"):
        prepare.download(f"{server.url}/{path}", tmp_path / "file.txt", SIZE, SHA256)
    assert files_under(tmp_path) == {}


def test_a_server_that_does_not_answer_is_an_error_that_names_the_way_out(tmp_path, server):
    server.shutdown()
    server.server_close()
    with pytest.raises(CorpusError, match="cannot download .* try again"):
        prepare.download(f"{server.url}/whole", tmp_path / "file.txt", SIZE, SHA256)


def test_a_raw_file_is_downloaded_once_and_again_only_when_it_is_damaged(tmp_path, server, monkeypatch):
    monkeypatch.setattr(prepare, "RAW_FOLDER", tmp_path)
    monkeypatch.setitem(prepare.RAW_FILES, "tinyshakespeare.txt", (f"{server.url}/whole", SIZE, SHA256))
    assert prepare.raw_bytes("tinyshakespeare.txt") == FILE
    (tmp_path / "tinyshakespeare.txt").write_bytes(FILE[:-1])
    assert prepare.raw_bytes("tinyshakespeare.txt") == FILE
    server.shutdown()
    server.server_close()
    assert prepare.raw_bytes("tinyshakespeare.txt") == FILE


def test_ctrl_c_during_a_download_ends_in_one_line_and_leaves_the_old_corpus(tmp_path, server):
    (tmp_path / "input.txt").write_text(TEXT)
    prepare.prepare("shakespeare", out=tmp_path / "corpus", local=tmp_path / "input.txt")
    before = files_under(tmp_path)
    # The real command, with the address of the raw file and the place to keep it changed
    code = f"""import signal
from data import prepare
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with Ctrl-C ignored
prepare.RAW_FOLDER = prepare.Path({str(tmp_path / "raw")!r})
prepare.RAW_FILES["tinyshakespeare.txt"] = ("{server.url}/interrupt", {SIZE}, "{SHA256}")
prepare.main(["shakespeare", "--out", {str(tmp_path / "corpus")!r}])"""
    server.client = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT,
                                     stderr=subprocess.PIPE, text=True)
    error = server.client.communicate(timeout=60)[1]
    assert server.client.returncode == 130
    assert error == "prepare.py: interrupted, nothing half-written is left\n"
    assert files_under(tmp_path) == before


# The command line

def test_the_command_writes_to_data_in_its_own_project_wherever_it_is_called_from(tmp_path):
    (tmp_path / "project" / "data").mkdir(parents=True)
    shutil.copy(PREPARE, tmp_path / "project" / "data")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.txt").write_text(TEXT)
    result = subprocess.run([sys.executable, "../project/data/prepare.py", "notes.txt"], text=True,
                            cwd=tmp_path / "elsewhere", capture_output=True, timeout=60)
    folder = tmp_path / "project" / "data" / "notes"
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == (f"1,549 train and 173 val tokens (bytes) in {folder}; "
                             f"next: python train.py --data {folder}\n")
    assert len(Corpus(folder).train) == 1549


def test_shakespeare_is_prepared_from_a_local_copy_with_a_warning_when_it_is_another_version(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text(TEXT)
    for path in (tmp_path, tmp_path / "tinyshakespeare.txt"):  # a folder or the file itself
        result = run("shakespeare", "--from", path, "--out", tmp_path / "corpus")
        assert (result.returncode, result.stderr.count("\n")) == (0, 1)
        assert "warning" in result.stderr and "differs" in result.stderr
    corpus = Corpus(tmp_path / "corpus")
    assert documents(corpus.train) + documents(corpus.val) == [TEXT[:1548], TEXT[1548:]]
    assert corpus.meta["source"] == "shakespeare"


def test_help_shows_examples_that_can_be_typed():
    result = run("--help")
    assert result.returncode == 0
    assert "python data/prepare.py multi30k" in result.stdout


def test_gpt2_without_its_files_or_a_network_says_what_to_do(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    nowhere = "http://127.0.0.1:9"  # a proxy that is not there: no packet leaves this machine
    result = run(tmp_path / "text.txt", "--tokenizer", "gpt2", "--out", tmp_path / "corpus",
                 HTTPS_PROXY=nowhere, https_proxy=nowhere, NO_PROXY="", no_proxy="",
                 TIKTOKEN_CACHE_DIR=str(tmp_path / "empty"))
    assert result.returncode == 2
    assert "TIKTOKEN_CACHE_DIR" in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("arguments, message", [
    (["nowhere.txt"], "no file or folder"),
    (["latin1.txt"], "not UTF-8"),
    (["empty.txt"], "would be empty"),
    (["one.txt"], "split of one.txt would be empty"),
    (["empty"], "no UTF-8 text files"),
    (["good.txt", "--tokenizer", "words"], "invalid choice"),
    (["good.txt", "--val-fraction", "1.5"], "between 0 and 1"),
    (["good.txt", "--seed", "x"], "invalid int"),
    (["good.txt", "--from", "good.txt"], "--from goes with"),
    (["good.txt", "--out", "thesis"], "not a corpus"),
    (["good.txt", "--out", "good.txt"], "not a corpus"),
    (["good.txt", "--out", "good.txt/corpus"], "good.txt"),
    (["shakespeare", "--from", "nowhere"], "no file or folder"),
    (["shakespeare", "--from", "empty"], "holds tinyshakespeare.txt"),
    (["python", "--from", "empty"], "0 Python files"),
    (["multi30k", "--from", "empty"], "holds train.en.gz"),
    (["multi30k", "--from", "good.txt"], "not a folder"),
    (["multi30k", "--from", "broken"], "not a whole gzip file"),
    (["good.txt", "bad.txt"], "unrecognized arguments"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_one_line_on_stderr_and_status_2(tmp_path, arguments, message):
    (tmp_path / "good.txt").write_text(TEXT)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    (write_multi30k(tmp_path / "broken", "a\n", "b\n") / "train.en.gz").write_bytes(gzip.compress(FILE)[:-20])
    before = files_under(tmp_path)
    if "--out" not in arguments:
        arguments = [*arguments, "--out", "corpus"]
    result = run(*arguments, cwd=tmp_path)
    errors = [line for line in result.stderr.splitlines() if "warning" not in line]
    assert result.returncode == 2
    assert len(errors) == 1 and errors[0].startswith("prepare.py: error: ") and message in errors[0]
    assert files_under(tmp_path) == before
