"""A corpus that a model writes itself (self-distillation; L-MTP, stage 1).

    python experiments/own_text.py runs/ntp data/own
    python train.py --data data/own --init runs/ntp --offsets 1,3,5 --backbone-lr 0 --out runs/own

Heads on a frozen backbone are to predict what that backbone will emit, and that is what this text
shows. Each document is the beginning of a window
of the training split, which the model continues to the end of its context. Every twentieth
document is for validation."""
import os
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Parser, Progress, corpus_of, load_model, one_line_errors, pick_device
from data.loader import Corpus
from data.prepare import CORPUS_FILES, OWN_TEXT, write_corpus
from decode import Decoder, can_compile, check_prompts
from model import InputError


def write_own_text(model, corpus, folder, tokens, temperature=1.0, top_k=None, top_p=None, seed=0,
                   batch_size=32, prompt_tokens=16, dtype=None, compile=False, source="",
                   progress=True):
    """Generate about `tokens` tokens after prompts from `corpus` and write them as a corpus.
    Returns its folder. Raises InputError and CorpusError."""
    length = model.gpt.config.block_size - prompt_tokens
    check_prompts([[0] * prompt_tokens], max(1, length), model.gpt.config)
    sampling = dict(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p)
    decoder = Decoder(model, dtype=dtype, compile=compile, **sampling)
    rows, texts = max(20, -(-tokens // length)), []  # at least one for validation
    prompts = corpus.windows("train", rows, prompt_tokens).tolist()
    with Progress(None, progress, total=rows * length, desc="generate", unit="token",
                  unit_scale=True) as bar:
        for i in range(0, rows, batch_size):
            part = prompts[i:i + batch_size]
            filled = part + part[:1] * (batch_size - len(part))  # one shape, one program
            texts += decoder.generate(filled, length, first_row=i).tokens[:len(part)]
            bar.update(len(part) * length)
    documents = [np.array(p + t, dtype="<u2") for p, t in zip(prompts, texts)]
    splits = dict(train=[d for i, d in enumerate(documents) if i % 20], val=documents[::20])
    write_corpus(Path(folder), splits, corpus.tokenizer, dict(
        source=f"{OWN_TEXT}{source}", tokenizer=corpus.meta["tokenizer"], **sampling))
    return Path(folder)


def check_folder(folder):
    """Raise InputError if the folder holds anything but a corpus that a model wrote."""
    if folder.exists():
        if not folder.is_dir() or not set(os.listdir(folder)) <= CORPUS_FILES:
            raise InputError(f"{folder} exists and is not a corpus; choose another folder")
        if os.listdir(folder) and not Corpus(folder).meta.get("source", "").startswith(OWN_TEXT):
            raise InputError(f"{folder} is a corpus that no model wrote; choose another folder")


def main(argv=None):
    """Write the corpus. Bad input is one line and status 2."""
    p = Parser(prog="own_text.py", description="Generate text with a model, which continues the "
               "training split of its corpus, and write it as a corpus to train heads on.")
    p.add_argument("run", metavar="RUN", help="a run of train.py, or GPT-2 weights")
    p.add_argument("folder", metavar="FOLDER", help="the corpus to write")
    p.add_argument("--data", help="corpus that gives the prompts; default: the one trained on")
    p.add_argument("--tokens", type=int, default=1_000_000, help="how much text, about")
    p.add_argument("--prompt-tokens", type=int, help="length of a prompt; default: at most 16")
    p.add_argument("--batch-size", type=int, default=32, help="texts written at once")
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--top-k", type=int, help="sample among the k most probable tokens")
    p.add_argument("--top-p", type=float, help="sample among the best tokens of this probability")
    p.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    p.add_argument("--compile", default="auto", choices=["auto", "no"],
                   help="torch.compile the step")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = p.parse_args(argv)
    with one_line_errors("own_text.py", memory="--tokens or --batch-size"):
        if args.tokens < 1 or args.batch_size < 1 or not args.folder:
            raise InputError("--tokens and --batch-size must be at least 1, FOLDER not empty")
        model, state = load_model(args.run)
        corpus, device = corpus_of(args.run, model, state, args.data), pick_device(args.device)
        folder, size = Path(args.folder), model.gpt.config.block_size
        prompt_tokens = min(16, size // 2) if args.prompt_tokens is None else args.prompt_tokens
        check_prompts([[0] * prompt_tokens], max(1, size - prompt_tokens), model.gpt.config)
        check_folder(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)  # if it cannot be written, fail now
        write_own_text(model.to(device), corpus, folder, args.tokens, args.temperature, args.top_k,
                       args.top_p, args.seed, args.batch_size, prompt_tokens,
                       getattr(torch, args.dtype), args.compile == "auto" and can_compile(device),
                       args.run)
        print(f"next: python train.py --data {folder} --init {args.run} --backbone-lr 0 "
              "--out runs/heads")


if __name__ == "__main__":
    main()
