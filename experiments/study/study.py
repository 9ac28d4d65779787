"""The study: both papers' claims, tried on models that are small enough to train on a laptop.

    python experiments/study/study.py --size quick   # 15 to 20 minutes on 2 CPU cores, no verdicts
    python experiments/study/study.py                # all of it: 1 h 45
    python experiments/study/report.py               # then: the table and figures of the page

Parts and seeds run side by side, with one thread each. A part trains what it asks about and then
measures it on held-out text. Whatever is there is kept: after Ctrl-C the same command goes on.
"""
import itertools
import json
import multiprocessing.connection
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import data  # before PyTorch: Ctrl-C is one line from here on
import torch
from tqdm import tqdm

from common import (Parser, atomic_write, check_output, environment, one_line_errors,
                    progress_bar)
from data.prepare import prepare
from experiments.study import paper_a, paper_b
from experiments.study.runs import CORPORA, ROOT, SELECT, SIZES, Study, held_out

PARTS = {"leap": paper_b.leap, "frozen": paper_a.frozen, "joint": paper_a.joint,
         "knows": paper_a.knows, "stages": paper_b.stages, "scratch": paper_a.scratch}


def measure(study, part, seed):
    """Train and measure a part for a seed. -> {row: {measure: sums by file}}"""
    rows = PARTS[part](study, seed)

    def find():
        found = {row: study.measure(run, measures) for row, (run, measures) in rows.items()}
        layers = found.pop("layers", {})  # whose measures are rows themselves
        return found | layers
    return study.keep(f"{part}-{seed}", find, *[run for run, _ in rows.values()])


def enter(folder):
    """Prepare a worker: it prints to a log, computes with one thread, and ends when the first
    process does."""
    def end_with_the_first():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=end_with_the_first, daemon=True).start()
    sys.stdout = sys.stderr = open(folder / "log.txt", "a", buffering=1)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is one of processes, which would be left behind


def do_all(study, jobs, parts):
    """Do all jobs, stage by stage; parts are pairs of a part and a seed."""
    seeds = study.size.seeds
    stages = {Study.base: [(SELECT,), *itertools.product(seeds, CORPORA)],
              paper_a.chosen: list(itertools.product(paper_a.HEADS, ("joint", "frozen"))),
              measure: parts,
              paper_b.time_steps: [()]}
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(jobs, spawn, enter, (study.folder,))
    total = sum(map(len, stages.values()))
    with progress_bar(total=total, desc="study", unit="job") as bar, pool:
        try:
            for job, todo in stages.items():
                futures = [pool.submit(job, study, *arguments) for arguments in todo]
                for future in as_completed(futures):
                    future.result()
                    bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while children := multiprocessing.active_children():
                for child in children:
                    child.terminate()  # train.py saves first, and another job may have begun
                time.sleep(0.1)
            raise


def collect(study, parts):
    """What is measured: {part: {row: {measure: {seed: sums by file}}}}"""
    rows = {}
    for part, seed in parts:
        for row, measures in study.read(f"{part}-{seed}").items():
            for name, sums in measures.items():
                of_row = rows.setdefault(part, {}).setdefault(row, {})
                of_row.setdefault(name, {})[str(seed)] = sums
    return rows


def main(argv=None):
    """Bad input is one line and status 2."""
    p = Parser(prog="study.py", description="Try both papers' claims on small models. It can be "
               "stopped at any time; the same command goes on.")
    p.option("size", "full", "quick: 15 to 20 minutes on 2 cores; full: 1 h 45", choices=[*SIZES])
    p.option("jobs", os.cpu_count(), "processes side by side", least=1)
    p.option("folder", None, "for the runs; default: runs/study-SIZE")
    p.option("out", None, "default: experiments/results/study_SIZE.json", metavar="FILE")
    args = p.parse_args(argv)
    out = args.out or ROOT / "experiments" / "results" / f"study_{args.size}.json"
    with one_line_errors("study.py"):
        begin = time.time()
        check_output(out)
        study = Study(SIZES[args.size], args.folder or ROOT / "runs" / f"study-{args.size}")
        study.folder.mkdir(parents=True, exist_ok=True)
        folders = [prepare(corpus) for corpus in CORPORA]
        parts = [("frozen", SELECT), *itertools.product(PARTS, study.size.seeds)]
        do_all(study, args.jobs, parts)
        texts = [held_out(str(folder), study.size.windows) for folder in folders]
        counts = [text.files.bincount().tolist() for text in texts]
        results = dict(
            environment=environment(torch.device("cpu")),
            counts=dict(zip(CORPORA, counts)),
            minutes=(time.time() - begin) / 60,
            seeds=study.size.seeds,
            step_ms=study.read("step_ms"),
            rows=collect(study, parts))
        with atomic_write(out) as file:
            file.write(json.dumps(results).encode() + b"\n")
        print(f"{out}; next: python experiments/study/report.py --size {args.size}")


if __name__ == "__main__":
    main()
