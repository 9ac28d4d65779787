"""What a token, a document, a split and a batch are. The texts are small, the files are real."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import process
from data import prepare
from data.loader import Corpus, gather

TEXT = "To be, or not to be: that is the question.\n" * 40
END = 256
PIECE = prepare.PIECE.pattern
BYTES = prepare.get_tokenizer("bytes")


def make(tmp_path, text=TEXT, **options):
    """Prepare a text as bytes. -> its Corpus"""
    (tmp_path / "text.txt").write_bytes(text.encode())
    return Corpus(prepare.prepare(str(tmp_path / "text.txt"), out=tmp_path / "corpus", **options))


# ---- A token ---------------------------------------------------------------------------------

def test_a_token_is_a_byte_and_the_257th_ends_a_text():
    text = "naïve 日本 🙂\r\n\t\0<|endoftext|>"  # the last are 13 bytes
    assert prepare.encode(BYTES, text).tolist() == BYTES.encode_ordinary(text) == [*text.encode()]
    assert BYTES.decode([*text.encode(), END]) == text + "<|endoftext|>"
    assert (BYTES.n_vocab, BYTES.eot_token) == (257, END)


def test_gpt2_tokens_do_not_depend_on_the_pieces_in_which_a_text_is_encoded(monkeypatch):
    try:
        gpt2 = prepare.get_tokenizer("gpt2")
    except prepare.InputError:
        pytest.skip("the files of the gpt2 tokenizer are not here")
    text = "word <|endoftext|> \n\n  word\n\tword {} \r\n \nit's 12 x\u3000\u00a0y\x1c z\n" * 50
    for length in (20, 30, 40):  # many cuts, in all kinds of places
        monkeypatch.setattr(prepare, "PIECE", re.compile(PIECE.replace("100000", str(length))))
        assert len(prepare.PIECE.findall(text)) > 50
        assert prepare.encode(gpt2, text).tolist() == gpt2.encode_ordinary(text)
    monkeypatch.undo()
    blank = " \n" * 500_000 + "x"  # tiktoken alone would abort
    assert gpt2.decode(prepare.encode(gpt2, blank).tolist()) == blank


# ---- Documents and splits --------------------------------------------------------------------

def test_of_one_text_the_end_is_held_out_and_each_split_ends_with_end_of_text(tmp_path):
    text = "".join(chr(0x100 + i) for i in range(100))  # two bytes each, and none is cut in two
    corpus = make(tmp_path, text, val_fraction=0.25)
    assert corpus.train.tolist() == list(text[:75].encode()) + [END]
    assert corpus.val.tolist() == list(text[75:].encode()) + [END]


def test_in_a_folder_each_text_file_is_a_document_as_it_is(tmp_path, capsys):
    (tmp_path / ".git").mkdir()
    for name, content in {"a.md": b"first\r\n", "b.txt": b"second\n", ".git/c": b"hidden\n",
                          "picture.png": b"\x89PNG\xff", "zeros.dat": b"\0\0"}.items():
        (tmp_path / name).write_bytes(content)
    assert sorted(prepare.load(str(tmp_path), 0)) == ["first\r\n", "second\n"]
    assert capsys.readouterr().err == "prepare.py: left out 2 files that are not UTF-8 text\n"


def test_the_default_source_is_the_standard_library_without_tests_and_encodings():
    texts = prepare.load("python", 0)
    assert sum(map(len, texts)) > 3_000_000
    assert Path(json.__file__).read_text() in texts
    assert not re.search("import test.support|codecs.charmap_build", "".join(texts))


def test_logs_are_json_lines_from_the_seed():
    text = prepare.make_logs(seed=0, lines=500)
    assert len({tuple(json.loads(line)) for line in text.splitlines()}) == 1  # the keys
    assert prepare.make_logs(0, 500) == text != prepare.make_logs(1, 500)


def test_shakespeare_is_downloaded_once(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "served.txt").write_text(TEXT)
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    monkeypatch.setattr(prepare, "URL", (tmp_path / "served.txt").as_uri())
    assert prepare.load("shakespeare", 0) == [TEXT]
    (tmp_path / "served.txt").unlink()
    assert prepare.load("shakespeare", 0) == [TEXT]


@pytest.mark.parametrize("sizes", [[97] * 33, [2_000_000, 2_000], [1] * 99 + [900]])
def test_a_split_has_the_size_that_was_asked_for_whatever_the_sizes_of_the_files(sizes):
    texts = [chr(0x4E00 + i) * size for i, size in enumerate(sizes)]
    for seed in range(4):
        splits = prepare.split(texts, 0.1, seed)
        assert sum(map(len, splits["val"])) == pytest.approx(0.1 * sum(sizes), abs=1)
        parts = splits["train"] + splits["val"]
        assert len(parts) <= len(texts) + 1  # at most one file is cut
        assert sorted("".join(parts)) == sorted("".join(texts))


def test_the_seed_chooses_the_validation_files_and_a_new_file_moves_few_others():
    texts = [f"file {i}" for i in range(10, 60)]
    val = set(prepare.split(texts, 0.5, seed=0)["val"])
    assert val == set(prepare.split(texts[::-1], 0.5, seed=0)["val"])
    assert len(val - set(prepare.split(texts, 0.5, seed=1)["val"])) > 5
    assert len(val - set(prepare.split([*texts, "new one"], 0.5, seed=0)["val"])) <= 2


# ---- The folder ------------------------------------------------------------------------------

def test_the_script_says_what_it_made_and_what_comes_next(tmp_path):
    script = tmp_path / "data" / "prepare.py"  # it writes to the data/ of its own project
    script.parent.mkdir()
    script.write_text(Path(prepare.__file__).read_text())
    (tmp_path / "notes.txt").write_text(TEXT)
    result = process(script, tmp_path / "notes.txt")
    folder = script.with_name("notes")
    assert result.stdout == (f"1,549 train, 173 val tokens (bytes) in {folder}; "
                             f"next: python train.py --data {folder}\n")
    assert (result.returncode, result.stderr) == (0, "")


# ---- A batch ---------------------------------------------------------------------------------

def test_a_batch_is_int64_windows_that_start_anywhere_in_a_split(tmp_path):
    corpus = make(tmp_path, "0123456789", val_fraction=0.5)  # 5 tokens and end-of-text
    batch = corpus.batch("train", 200, 3, step=0)
    assert (batch.shape, batch.dtype) == ((200, 3), torch.int64)
    assert batch.unique(dim=0).tolist() == gather(corpus.train, np.arange(4), 3).tolist()


def test_a_batch_depends_on_split_step_and_seed_and_on_nothing_else(tmp_path):
    corpus = make(tmp_path, "".join(map(chr, range(0x100, 0x500))) * 2, val_fraction=0.5)
    np.random.seed(0)
    first = Corpus(corpus.folder).batch("train", 4, 64, step=7, seed=1)
    assert corpus.train.tolist() == corpus.val.tolist()
    assert torch.equal(corpus.batch("train", 4, 64, step=7, seed=1), first)
    for split, step, seed in [("val", 7, 1), ("train", 8, 1), ("train", 7, 0)]:
        assert not torch.equal(corpus.batch(split, 4, 64, step, seed), first)


def test_evaluation_windows_are_evenly_spaced_from_the_first_token_to_the_last(tmp_path):
    corpus = make(tmp_path, "0123456789abcdef", val_fraction=0.5)  # 8 tokens and end-of-text
    windows = corpus.windows("val", 4, 3)
    assert [bytes(row[:2].tolist()) for row in windows] == [b"89", b"ab", b"cd", b"ef"]
    assert windows[-1, -1] == END
