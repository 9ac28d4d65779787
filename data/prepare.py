"""Turn text into a corpus folder that training can memory-map, and say what a token is.

A corpus is `train.bin` and `val.bin` (token ids, uint16, little endian, nothing else) and
`meta.json`. A training loop needs no more: a batch is a few slices of an array. The default source
is the standard library of the running Python: some ten megabytes of structured text that every
reader has. The default tokens are bytes, which are few enough to marginalise over the next token
exactly. Neither needs a download.

A document is a file, or the part of a file that belongs to a split. The end-of-text token follows
each document: 256 for `bytes` and 50256 for `gpt2`. "<|endoftext|>" in a text is ordinary text.
"""
import argparse
import hashlib
import json
import os
import random
import re
import sys
from pathlib import Path
from urllib.request import urlopen


def show_exception(kind, error, traceback, otherwise=sys.excepthook):
    """What Python calls when an exception ends a program, here or in one that imports this: a
    Ctrl-C that nothing else obeys is one line, also while packages are imported."""
    if kind is KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    else:
        otherwise(kind, error, traceback)


sys.excepthook = show_exception

import numpy as np
import tiktoken
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
CORPUS_FILES = {"meta.json", "train.bin", "val.bin"}
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"

# Which files of the library are read: no hidden ones, no tests, and none of `encodings`, where many
# files are nearly the same, so they would stand in both splits.
LIBRARY = r"(?!.*/(\..|((site|dist)-packages|tests?|idle_test|__pycache__|encodings)/)).*\.py$"

# tiktoken aborts on a million spaces, so it gets a text in pieces. GPT-2's own pattern never joins
# a space or newline before a word to what precedes it, so a cut there changes no token.
PIECE = re.compile(r"(?s).{1,100000}(?=[ \n]\S|\Z)|.{1,100000}")


class InputError(ValueError):
    """A mistake that the user can fix. The message is one line and says what to do."""


def require(condition, message):
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


def get_tokenizer(name):
    """The tiktoken.Encoding "bytes" (257 ids, no download) or "gpt2" (50257 ids).

    `.eot_token` is the end-of-text id. A token may end inside a character: `.decode` then writes
    a replacement character, and `.decode_bytes` is exact.
    Raises InputError for another name, or if the files of gpt2 are neither here nor online.
    """
    if name == "bytes":
        return tiktoken.Encoding(
            name,
            pat_str=r"(?s).",
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256})
    require(name == "gpt2", f"unknown tokenizer {name!r}: use bytes or gpt2")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # a network fails in many ways
        raise InputError(f"cannot get the gpt2 tokenizer ({type(error).__name__}): go online once, "
                         "or set TIKTOKEN_CACHE_DIR to a folder with its files, or use bytes")


def encode(tokenizer, text):
    """The ids of a text, without end-of-text -> uint16 (number of tokens,)."""
    if tokenizer.name == "bytes":  # equal to encode_ordinary, but without a list of Python ints
        return np.frombuffer(text.encode(), np.uint8).astype("<u2")
    ids = (i for piece in PIECE.findall(text) for i in tokenizer.encode_ordinary(piece))
    return np.fromiter(ids, "<u2")


# ---- Sources ---------------------------------------------------------------------------------

LOG_LINE = ('{{"time": "2026-01-01T{}Z", "level": "{}", "service": "{}", "host": '
            '"node-{:02}.example.org", "request": "{:024x}", "path": "/v1/{}/{}", "status": {}, '
            '"duration_ms": {}, "message": "request completed"}}\n')


def make_logs(seed, lines=20_000):
    """A text that is easy to predict: JSON lines of a service, in which about 75% of the bytes
    are the same in every line. The rest (time, level, path, ...) is random, from the seed."""
    rng = random.Random(seed)
    pick = lambda words: rng.choice(words.split())
    text = ""
    for i in range(lines):
        second = i * 86_400 // lines
        text += LOG_LINE.format(
            f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}",
            pick("INFO INFO INFO WARN DEBUG"), pick("checkout search catalog login"),
            rng.randrange(32), rng.randrange(16 ** 24),
            pick("orders items users"), rng.randrange(10_000),
            pick("200 200 200 201 404 500"), int(rng.expovariate(1 / 80)))
    return text


def read_texts(path, wanted=r"(?!.*/\..)"):
    """The texts of a file, or of the wanted files of a folder, with their line ends: [str, ...].

    wanted: a pattern of /PATH in the folder; by default, files that are not hidden.
    Says on stderr how many files it leaves out because they are not UTF-8 text.
    Raises InputError if no text remains.
    """
    texts = []
    left_out = 0
    for file in [path, *path.rglob("*")]:
        name = f"/{file.relative_to(path).as_posix()}"
        if not file.is_file() or not re.match(wanted, name):
            continue
        content = file.read_bytes()
        try:
            require(b"\0" not in content, "NUL is valid UTF-8, but no text has one")
            texts.append(content.decode())
        except ValueError:
            left_out += 1
    require(texts, f"no UTF-8 text in {path}: name a text file or a folder, or python, "
            "shakespeare or logs")
    if left_out:
        print(f"prepare.py: left out {left_out} files that are not UTF-8 text", file=sys.stderr)
    return texts


def load(source, seed):
    """Read a source -> [text, ...], one per file. Downloads shakespeare once.

    Raises InputError if that fails, or if the source is missing or holds no text.
    """
    if source == "logs":
        return [make_logs(seed)]
    if source == "python":
        return read_texts(Path(os.__file__).parent, LIBRARY)
    path = Path(source)
    if source == "shakespeare":
        path = ROOT / "data/raw/tinyshakespeare.txt"
        if not path.exists():
            try:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(urlopen(URL).read())
            except Exception as error:
                raise InputError(f"cannot download {URL} ({error}): try again, or put it in {path}")
    return read_texts(path)


def split(texts, val_fraction, seed):
    """[text, ...] -> {"train": [document, ...], "val": [document, ...]}.

    In the order of their hash with the seed, the texts fill train and then val. So a new file
    moves few others, and equal files stay together. The file at the border is cut in two. So val
    has `val_fraction` of the characters whatever the sizes are, and of one file it has the end.
    Raises InputError if a split would be empty.
    """
    total = sum(map(len, texts))
    left = (1 - val_fraction) * total  # of what train is to get
    require(1 <= left <= total - 1,
            f"--val-fraction {val_fraction} of {total} characters leaves a split empty")
    left = round(left)
    train = []
    val = []
    for text in sorted(texts, key=lambda text: hashlib.sha256(f"{seed} {text}".encode()).digest()):
        train.append(text[:left])
        val.append(text[left:])
        left = max(0, left - len(text))
    return {"train": list(filter(None, train)), "val": list(filter(None, val))}


# ---- The folder ------------------------------------------------------------------------------

def write_corpus(folder, splits, tokenizer, meta):
    """Write a corpus in place of one that is there. Returns what meta.json says.

    splits: {"train": [document, ...], "val": [...]}. A document is a str, or token ids, uint16
    (number of tokens,), which may be text that no str can hold.
    meta: what meta.json is to say besides the tokenizer and the numbers of tokens.
    Raises InputError if the folder, a Path, holds anything but a corpus.
    """
    folder.mkdir(parents=True, exist_ok=True)
    require(set(os.listdir(folder)) <= CORPUS_FILES,
            f"{folder} holds more than a corpus: choose another folder")
    # meta.json goes first and comes last, so half a corpus is never taken for a whole one.
    # Files are removed, not written over, so whoever has mapped the old ones keeps them.
    for path in sorted(folder.iterdir()):
        path.unlink()

    meta = dict(meta, tokenizer=tokenizer.name)
    for name, documents in splits.items():
        with open(folder / f"{name}.bin", "wb") as file:
            for document in tqdm(documents, f"encode {name}", disable=None):
                ids = encode(tokenizer, document) if isinstance(document, str) else document
                file.write(ids)
                file.write(tokenizer.eot_token.to_bytes(2, "little"))
            meta[f"{name}_tokens"] = file.tell() // 2
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def prepare(source="python", tokenizer="bytes", out=None, val_fraction=0.1, seed=0, force=False):
    """Make the corpus of a source, unless it is there, and say so. Returns its folder, a Path.

    source: "python", "shakespeare", "logs", or the path of a text file or folder.
    out: the folder, by default data/NAME or data/NAME-gpt2 in the project.
    force: replace the corpus that is there.
    Raises InputError, also if the folder holds another corpus and not `force`, and OSError.
    """
    path = Path(source).resolve()
    if source not in ("python", "shakespeare", "logs"):
        source = str(path)
    name = f"{path.stem}-{tokenizer}".removesuffix("-bytes")
    folder = Path(out or ROOT / f"data/{name}").resolve()
    meta = dict(source=source, tokenizer=tokenizer, seed=seed, val_fraction=val_fraction)
    old = folder / "meta.json"
    if old.exists() and not force:
        try:
            same = meta.items() <= json.loads(old.read_text()).items()
        except Exception:  # it is damaged
            same = False
        require(same, f"{folder} holds another corpus, one with other settings, or a damaged one: "
                "choose another folder with --out, or replace the corpus with --force")
        done = "already there (--force makes it again):"
    else:
        splits = split(load(source, seed), val_fraction, seed)
        meta = write_corpus(folder, splits, get_tokenizer(tokenizer), meta)
        done = "{train_tokens:,} train, {val_tokens:,} val tokens ({tokenizer}) in".format(**meta)
    print(f"{done} {folder}; next: python train.py --data {folder}", flush=True)
    return folder


def main(argv=None):
    """The command line. A mistake of the user is one line on stderr and status 2."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # argparse would print it before each error
        argument_default=argparse.SUPPRESS,  # the defaults are those of prepare
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""\
python data/prepare.py [SOURCE] [OPTIONS]

Turn text into a corpus folder (train.bin, val.bin, meta.json) for train.py. Whole files are held
out for validation, or the end of a single file. Nothing is overwritten without --force, and
nothing but a corpus even then.

examples:
  python data/prepare.py                       this Python's standard library, in data/python
  python data/prepare.py shakespeare           a download of 1 MB, in data/shakespeare
  python data/prepare.py docs                  all text files of a folder, in data/docs
  python data/prepare.py README.md --tokenizer gpt2 --val-fraction 0.2""")
    add = parser.add_argument
    add("source", nargs="?",
        help="python (default), shakespeare, logs (made up, from --seed), a text file or a folder")
    add("--tokenizer", help="what a token is: one of bytes (default, 257 ids) or of GPT-2's word "
        "pieces (gpt2, 50257 ids)")
    add("--out", help="the folder, by default data/NAME or data/NAME-gpt2 in the project")
    add("--val-fraction", type=float,
        help="fraction of the text that is held out for validation (default 0.1)")
    add("--seed", type=int, help="chooses the validation files (default 0)")
    add("--force", action="store_true", help="replace the corpus that is already there")
    try:
        prepare(**vars(parser.parse_args(argv)))
    except BrokenPipeError:  # whoever read the output has left
        sys.stdout = None
    except (InputError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a name may have characters that it cannot show
    main()
