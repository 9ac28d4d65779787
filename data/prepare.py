"""Turn text into a corpus folder that training can memory-map, and say what a token is.

A corpus is `train.bin` and `val.bin` (token ids, uint16, little endian, nothing else) and `meta.json`
(tokenizer, source, sizes, hashes). A flat array is all that a training loop needs: a batch is a few slices
of it. The default source is the standard library of the Python that runs this file, some ten megabytes of
structured text that every reader has. The default tokens are bytes: with so few of them, marginalising over
the next tokens exactly is possible. Neither needs a download.

Each document ends with the end-of-text token, 256 for `bytes` and 50256 for `gpt2`. A document is one file,
or a whole split where a single text is split by position. "<|endoftext|>" inside a text is ordinary text.

`multi30k` is translation. Each pair is exactly one line, `English<TAB>German<NEWLINE>`, with no other tab or
newline in it. So the German half is the bytes after the tab up to and including the newline, and an analysis
can restrict itself to it. Lines follow each other directly; one end-of-text token ends each split.

From the top: tokenizers, raw files, sources (each gives {"train": documents, "val": documents}), writing, the
command line.
"""
import argparse
import gzip
import hashlib
import http.client
import json
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RAW_FOLDER = ROOT / "data" / "raw"
CORPUS_FILES = {"train.bin", "val.bin", "meta.json"}

# Raw file: (address, size in bytes, SHA-256). Also its place under data/raw.
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
MULTI30K = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/"
RAW_FILES = {
    "tinyshakespeare.txt": (
        SHAKESPEARE, 1115394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"),
    "multi30k/train.en.gz": (
        MULTI30K + "train.en.gz", 568929, "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"),
    "multi30k/train.de.gz": (
        MULTI30K + "train.de.gz", 637044, "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6"),
    "multi30k/val.en.gz": (
        MULTI30K + "val.en.gz", 21650, "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28"),
    "multi30k/val.de.gz": (
        MULTI30K + "val.de.gz", 24681, "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a"),
}


class CorpusError(ValueError):
    """A corpus cannot be made or read. The message says in one line what is wrong and what to do."""


# Tokenizers

def get_tokenizer(name):
    """The tiktoken.Encoding called `name`: "bytes" (257 tokens, no download) or "gpt2" (50257 tokens).

    `.n_vocab` is its size, `.eot_token` its end-of-text id. Tokens may end inside a character: `.decode` puts
    a replacement sign there, `.decode_bytes` is exact.
    Raises CorpusError for another name, or when gpt2 can be neither found nor downloaded.
    """
    if name == "bytes":
        return tiktoken.Encoding(
            name="bytes", pat_str=r"(?s).", mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={"<|endoftext|>": 256})
    if name != "gpt2":
        raise CorpusError(f"unknown tokenizer {name!r}: use bytes or gpt2")
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:
        raise CorpusError(f"cannot get the gpt2 tokenizer ({type(error).__name__}): go online once, or set "
                          "TIKTOKEN_CACHE_DIR to a folder with its files, or use bytes") from error


def encode(tokenizer, text):
    """The ids of `text`, without end-of-text, as uint16 (number of tokens,)."""
    if tokenizer.name == "bytes":  # the same ids as encode_ordinary, without a Python list of ints
        return np.frombuffer(text.encode(), dtype=np.uint8).astype("<u2")
    return np.array(tokenizer.encode_ordinary(text), dtype="<u2")


# Raw files

def download(url, target, size=None, sha256=None):
    """Download `url` to the path `target`, which appears only when it has that size and SHA-256 (where they are
    known; the size that the server announces is always checked).

    Raises CorpusError when the transfer fails or brings something else; nothing is left behind then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    digest, received = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file, tqdm(
                total=size or response.length, unit="B", unit_scale=True, desc=target.name, disable=None) as bar:
            size = response.length if size is None else size  # None still, when the server does not say
            while chunk := response.read(1 << 16):
                file.write(chunk)
                digest.update(chunk)
                received += len(chunk)
                bar.update(len(chunk))
        if size not in (None, received) or sha256 not in (None, digest.hexdigest()):
            raise CorpusError(f"{url} gave {received} bytes with SHA-256 {digest.hexdigest()[:8]}, expected "
                              f"{size} with {(sha256 or 'any')[:8]}: try again")
        os.replace(part, target)
    except (OSError, http.client.HTTPException) as error:
        raise CorpusError(f"cannot download {url}: {error}; try again") from error
    finally:
        part.unlink(missing_ok=True)


def raw_bytes(name, local=None):
    """The bytes of one of RAW_FILES, from data/raw (downloaded if need be) or from `local`, a file or folder.

    Raises CorpusError when there is none. A file in `local` that differs from the published one only gets a
    warning: it may be another version.
    """
    url, size, sha256 = RAW_FILES[name]
    path = RAW_FOLDER / name
    if local is not None:
        path = local / path.name if local.is_dir() else local
        if not path.is_file():
            raise CorpusError(f"no file {path}: --from takes the folder that holds {Path(name).name}")
    elif not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        try:
            download(url, path, size, sha256)
        except CorpusError as error:
            raise CorpusError(f"{error}, or use --from PATH") from error
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        print(f"prepare.py: warning: {path} differs from the published {Path(name).name}", file=sys.stderr)
    return content


# Sources

def decode_text(content, path):
    """`content` as a str, line ends untouched. Raises CorpusError when it is not UTF-8 text."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise CorpusError(f"{path} is not UTF-8 text: convert it first, e.g. with iconv") from None


def read_folder(folder, suffix="", skip=()):
    """{path relative to `folder`: text}, sorted by path: its files that end in `suffix` and are UTF-8 text.

    Hidden files and folders, folders named in `skip`, blank files and prepared corpora are left out.
    """
    texts = {}
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        if CORPUS_FILES <= set(files):
            continue
        for name in files:
            path = Path(parent, name)
            if name.startswith(".") or not name.endswith(suffix) or not path.is_file():
                continue
            content = path.read_bytes()
            try:
                text = content.decode()
            except UnicodeDecodeError:
                continue
            if text.strip() and "\0" not in text:  # a NUL is valid UTF-8, but no text holds one
                texts[path.relative_to(folder).as_posix()] = text
    return dict(sorted(texts.items()))


def split_files(texts, val_fraction, seed):
    """Split {path: text} by file: val gets the paths whose hash with the seed is lowest, on any machine."""
    order = sorted(texts, key=lambda path: hashlib.sha256(os.fsencode(f"{seed} {path}")).digest())
    count = min(max(1, round(len(order) * val_fraction)), len(order) - 1)
    val = set(order[:count])
    return {"train": [texts[path] for path in texts if path not in val],
            "val": [texts[path] for path in texts if path in val]}


def split_text(text, val_fraction):
    """Split one text by position: the last `val_fraction` of its characters are val."""
    cut = int(len(text) * (1 - val_fraction))
    return {"train": [text[:cut]], "val": [text[cut:]]}


def load_python(local, val_fraction, seed):
    """The standard library of this interpreter (or the folder `local`), without its tests, split by file."""
    folder = local or Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    texts = read_folder(folder, ".py", skip)
    if len(texts) < 2:
        raise CorpusError(f"{folder} holds {len(texts)} Python files but a split by file needs 2: use --from")
    return split_files(texts, val_fraction, seed)


def load_multi30k(local):
    """English-German pairs, one line each, in the dataset's own splits."""
    if local and not local.is_dir():
        raise CorpusError(f"{local} is not a folder: --from takes the folder that holds train.en.gz")
    splits = {}
    for split in ("train", "val"):
        halves = []
        for language in ("en", "de"):
            name = f"multi30k/{split}.{language}.gz"
            try:
                content = gzip.decompress(raw_bytes(name, local))
            except (gzip.BadGzipFile, EOFError, zlib.error):
                raise CorpusError(f"{split}.{language}.gz is not a whole gzip file: fetch it again") from None
            # split("\n"), not splitlines(): a rare line separator inside a sentence must not shift the pairs
            lines = decode_text(content, name).removesuffix("\n").split("\n")
            halves.append([" ".join(line.replace("\t", " ").splitlines()).strip() for line in lines])
        if len(halves[0]) != len(halves[1]):
            raise CorpusError(f"multi30k {split} has {len(halves[0])} English but {len(halves[1])} German "
                              "lines: fetch the files again")
        splits[split] = ["".join(f"{en}\t{de}\n" for en, de in zip(*halves) if en and de)]
    return splits


def load_path(path, val_fraction, seed):
    """A text file, split by position, or a folder, split by file when it holds more than one text."""
    if path.is_file():
        return split_text(decode_text(path.read_bytes(), path), val_fraction)
    if not path.is_dir():
        raise CorpusError(f"no file or folder {path}: SOURCE is python, shakespeare, multi30k or a path")
    texts = read_folder(path)
    if not texts:
        raise CorpusError(f"no UTF-8 text files in {path}: name a folder that holds some")
    if len(texts) == 1:
        return split_text(*texts.values(), val_fraction)
    return split_files(texts, val_fraction, seed)


# Writing

def is_whole(folder, wanted):
    """Whether `folder` is an undamaged corpus whose meta.json says everything that `wanted` says."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return all(meta[key] == value for key, value in wanted.items()) and all(
            hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest() == meta[f"{split}_sha256"]
            for split in ("train", "val"))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def write_corpus(folder, splits, tokenizer, meta):
    """Encode `splits` into `folder`, replacing the corpus there, and return all of meta.json. A document is a str, or
    an array of token ids, which may be text that no str can hold.

    All is written beside `folder` and renamed at the end: an interruption leaves the old corpus or the new
    one, and a training run that has mapped the old one keeps it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    end_of_text = np.array([tokenizer.eot_token], dtype="<u2")
    meta = {**meta, "vocab_size": tokenizer.n_vocab}
    try:
        new.mkdir()
        for split, documents in splits.items():
            digest, tokens, size = hashlib.sha256(), 0, 0
            with open(new / f"{split}.bin", "wb") as file, tqdm(
                    total=sum(map(len, documents)), unit="char", unit_scale=True, desc=split,
                    disable=None) as bar:
                for text in documents:
                    ids = encode(tokenizer, text) if isinstance(text, str) else text
                    ids = np.concatenate([ids, end_of_text]).astype("<u2")
                    file.write(ids.tobytes())
                    digest.update(ids.tobytes())
                    tokens += len(ids)
                    size += len(text.encode() if isinstance(text, str) else tokenizer.decode_bytes(text.tolist()))
                    bar.update(len(text))
            meta.update({f"{split}_documents": len(documents), f"{split}_tokens": tokens,
                         f"{split}_bytes": size, f"{split}_sha256": digest.hexdigest()})
        (new / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():  # stopped between the two renames
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)
    return meta


def prepare(source="python", tokenizer="bytes", out=None, local=None, val_fraction=0.1, seed=0, force=False):
    """Make the corpus `source` and return its folder; only say so when the same one is already there.

    `out`: the folder, data/NAME or data/NAME-gpt2 in the project by default. `local`: what --from gives.
    Raises CorpusError when that cannot be done, OSError when the disk objects.
    """
    if not 0 < val_fraction < 1:
        raise CorpusError(f"--val-fraction is {val_fraction}: it must lie between 0 and 1")
    local = Path(local) if local else None
    if local and not local.exists():
        raise CorpusError(f"no file or folder {local}: --from takes the place of the raw files")
    if not source or out == "":
        raise CorpusError("SOURCE and --out must not be empty")
    known = source in ("python", "shakespeare", "multi30k")
    if local and not known:
        raise CorpusError("--from goes with python, shakespeare and multi30k: a path is its own source")
    path = Path(source).resolve()
    name = source if known else (path.name if path.is_dir() else path.stem) or "root"
    folder = Path(out or ROOT / "data" / (name if tokenizer == "bytes" else f"{name}-{tokenizer}")).resolve()
    # The folder will be replaced as a whole, so it must hold nothing that is not ours.
    if folder.exists() and not (folder.is_dir() and set(os.listdir(folder)) <= CORPUS_FILES):
        raise CorpusError(f"{folder} exists and is not a corpus: choose another folder with --out")
    encoding = get_tokenizer(tokenizer)

    if source == "python":
        splits = load_python(local, val_fraction, seed)
    elif source == "shakespeare":
        text = decode_text(raw_bytes("tinyshakespeare.txt", local), local or "tinyshakespeare.txt")
        splits = split_text(text, val_fraction)
    elif source == "multi30k":
        splits = load_multi30k(local)
    else:
        splits = load_path(path, val_fraction, seed)
    text_hash = hashlib.sha256()  # tells whether the text has changed since the corpus was made
    for split, documents in splits.items():
        if not any(documents):
            raise CorpusError(f"the {split} split of {source} would be empty: give more text")
        for text in documents:
            text_hash.update(f"{split} {len(text)} ".encode() + text.encode())

    meta = {"source": source if known else str(path), "tokenizer": tokenizer, "seed": seed,
            "val_fraction": val_fraction, "text_sha256": text_hash.hexdigest()}
    if source == "python" and not local:
        meta["python"] = platform.python_version()
    shown = shlex.quote(str(folder.relative_to(Path.cwd()) if Path.cwd() in folder.parents else folder))
    if not force and is_whole(folder, meta):
        print(f"{shown} is already there (--force rebuilds it); next: python train.py --data {shown}")
        return folder
    meta = write_corpus(folder, splits, encoding, meta)
    print(f"{meta['train_tokens']:,} train and {meta['val_tokens']:,} val tokens ({tokenizer}) in {shown}; "
          f"next: python train.py --data {shown}")
    return folder


# Command line

def stop(message):
    """Say what is wrong in one line and exit with status 2."""
    print("prepare.py: error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def main(argv=None):
    """Prepare what the command line asks for; bad input is one line and status 2."""
    parser = argparse.ArgumentParser(
        prog="prepare.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Turn text into a corpus folder (train.bin, val.bin, meta.json) for train.py.",
        epilog="""examples:
  python data/prepare.py                           this Python's standard library, as bytes: data/python
  python data/prepare.py shakespeare               1 MB of plays, downloaded: data/shakespeare
  python data/prepare.py multi30k                  English<TAB>German captions, downloaded: data/multi30k
  python data/prepare.py notes/ --tokenizer gpt2   your own text files, GPT-2 tokens: data/notes-gpt2
  python data/prepare.py shakespeare --from input.txt    no download: you have the file""")
    parser.add_argument("source", nargs="?", default="python", metavar="SOURCE",
                        help="python (default), shakespeare, multi30k, or the path of a text file or folder "
                             "(write ./python for a folder with such a name)")
    parser.add_argument("--tokenizer", choices=["bytes", "gpt2"], default="bytes",
                        help="what a token is: a byte (default, 257 ids) or a GPT-2 word piece (50257 ids)")
    parser.add_argument("--out", metavar="FOLDER",
                        help="corpus folder (default: data/NAME or data/NAME-gpt2 in the project)")
    parser.add_argument("--from", dest="local", metavar="PATH",
                        help="take the raw files from this file or folder, do not download")
    parser.add_argument("--val-fraction", type=float, default=0.1, metavar="X",
                        help="share of the files, or of a single text, for validation (default 0.1); "
                             "multi30k brings its own split")
    parser.add_argument("--seed", type=int, default=0, help="chooses the validation files (default 0)")
    parser.add_argument("--force", action="store_true", help="rebuild a corpus that is already there")
    parser.error = stop  # one line, without the usage
    try:
        prepare(**vars(parser.parse_args(argv)))
    except (CorpusError, OSError) as error:
        stop(error)
    except KeyboardInterrupt:
        print("prepare.py: interrupted, nothing half-written is left", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
