"""A corpus that a model writes itself (self-distillation; L-MTP, stage 1).

    python experiments/own_text.py runs/ntp data/own
    python train.py --data data/own --init runs/ntp --offsets 1,3,5 --backbone-lr 0 --out runs/own

Heads on a frozen backbone are to predict what that backbone will emit, and this text shows it.
Each document is the beginning of a window of the training split, which the model continues to the
end of its context. Every twentieth document is for validation.
"""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # before PyTorch: Ctrl-C is one line from here on
import numpy as np

from common import (Parser, can_compile, corpus_of, load_model, one_line_errors, pick_device,
                    progress_bar)
from data.loader import Corpus
from data.prepare import CORPUS_FILES, OWN_TEXT, require, write_corpus
from decode import Decoder


def write_own_text(decoder, corpus, folder, tokens, prompt_tokens=16, source="", progress=True):
    """Generate about `tokens` tokens after prompts from `corpus`, and write them as a corpus into
    `folder` once all are there. Raises InputError."""
    new = decoder.max_length - prompt_tokens
    count = max(20, -(-tokens // new))  # at least one document for validation
    prompts = corpus.windows("train", count, prompt_tokens).tolist()
    decoder.check(prompts, new)
    batch_size = decoder.batch_size
    documents = []
    with progress_bar(None, progress, desc="generate", total=count * new, unit="token",
                  unit_scale=True) as bar:
        for i in range(0, count, batch_size):
            batch = prompts[i:i + batch_size]
            texts = decoder.generate(batch, new, first_row=i).tokens
            documents += [np.array(p + t, dtype="<u2") for p, t in zip(batch, texts)]
            bar.update(len(batch) * new)
    splits = dict(train=[d for i, d in enumerate(documents) if i % 20], val=documents[::20])
    meta = dict(source=f"{OWN_TEXT}{source}", temperature=decoder.temperature, seed=decoder.seed)
    write_corpus(Path(folder), splits, corpus.tokenizer, meta)


def check_folder(folder):
    """Raise InputError or OSError, before the work, unless a corpus can be written there and
    replaces nothing but one that a model wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    require(os.access(folder, os.W_OK), f"{folder} cannot be written to")
    files = set(os.listdir(folder))
    require(files <= CORPUS_FILES, f"{folder} holds more than a corpus; choose another folder")
    ours = not files or str(Corpus(folder).meta.get("source")).startswith(OWN_TEXT)
    require(ours, f"no model wrote the corpus in {folder}; choose another folder")


def main(argv=None):
    """Write the corpus. Bad input is one line and status 2."""
    p = Parser(prog="own_text.py", description="Generate text with a model, which continues the "
               "training split of its corpus, and write it as a corpus to train heads on.")
    p.add_argument("run", metavar="RUN", help="a run of train.py, or GPT-2 weights")
    p.add_argument("folder", metavar="FOLDER", help="the corpus to write")
    p.option("data", None, "corpus that gives the prompts; default: the one trained on")
    p.option("tokens", 1_000_000, "how much text, about", least=1)
    p.option("prompt-tokens", 16, "length of a prompt", least=1)
    p.option("batch-size", 32, "texts written at once", least=1)
    p.option("temperature", 1.0, "0 is greedy")
    p.option("seed", 0, "of the sampling noise")
    p.option("device", "auto", "auto, cpu, cuda, cuda:1, mps")
    p.option("eager", False, "do not torch.compile the step")
    args = p.parse_args(argv)
    with one_line_errors("own_text.py"):
        require(args.folder, "FOLDER must not be empty")
        device = pick_device(args.device)
        model, state = load_model(args.run)
        corpus = corpus_of(args.run, model, state, args.data)
        context = model.gpt.config.block_size
        require(args.prompt_tokens < context, f"--prompt-tokens must be less than {context}")
        check_folder(Path(args.folder))
        decoder = Decoder(model.to(device), batch_size=args.batch_size, seed=args.seed,
                          temperature=args.temperature,
                          compile=not args.eager and can_compile(device))
        write_own_text(decoder, corpus, args.folder, args.tokens, args.prompt_tokens, args.run)
        print(f"next: python train.py --data {args.folder} --init {args.run} --backbone-lr 0 "
              "--out runs/heads")


if __name__ == "__main__":
    main()
