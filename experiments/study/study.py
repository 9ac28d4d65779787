"""The study: both papers' claims, tried on models that are small enough to train on a laptop.

    python experiments/study/study.py --size quick      # 15 minutes on 2 CPU cores, no verdicts
    python experiments/study/study.py                   # all of it: 2 hours
    python experiments/study/report.py                  # then: the table and figures of the page

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
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import data  # before PyTorch: Ctrl-C is one line from here on
import torch

from common import (Parser, atomic_write, check_output, environment, one_line_errors,
                    progress_bar, write_results)
from data.prepare import InputError, prepare
from experiments.study import paper_a, paper_b
from experiments.study.runs import CORPORA, ROOT, SELECT, SIZES, Study

PARTS = {"leap": paper_b, "frozen": paper_a, "joint": paper_a, "knows": paper_a,
         "stages": paper_b, "scratch": paper_a}


def measure(study, part, seed):
    """Train and measure a part for a seed, unless it is done: PART-SEED.json in the folder. (Delete
    that to measure the same runs in another way.)"""
    module = PARTS[part]
    runs = getattr(module, f"{part}_runs")(study, seed)
    path = study.folder / f"{part}-{seed}.json"
    newest = max((run / "checkpoint.pt").stat().st_mtime for run in runs.values())
    if not path.exists() or path.stat().st_mtime < newest:
        write_results(path, getattr(module, part)(study, seed))


def collect(study):
    """What is measured: {part: {row: {what: {seed: sums by file}}}}"""
    found = {}
    for part, seed in itertools.product(PARTS, (SELECT, *study.size.seeds)):
        path = study.folder / f"{part}-{seed}.json"
        for row, measures in json.loads(path.read_text()).items() if path.exists() else ():
            for what, sums in measures.items():
                rows = found.setdefault(part, {})
                rows.setdefault(row, {}).setdefault(what, {})[str(seed)] = sums
    return found


def base(study, seed):
    """Train the next-token models that the parts start from."""
    for corpus in CORPORA if seed != SELECT else CORPORA[:1]:
        study.base(seed, corpus)


JOBS = {"base": base, "choose": paper_a.choose, "measure": measure, "time": paper_b.time_steps}


def enter():
    """Prepare a worker: one thread, and it ends when the first process does."""
    def end_with_the_first():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=end_with_the_first, daemon=True).start()
    torch.set_num_threads(1)


def work(job, study, *arguments):
    """Do a job in a worker; what it prints goes to a log."""
    with open(study.folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            JOBS[job](study, *arguments)
        except SystemExit:
            raise InputError(f"{job} {arguments} failed; see {study.folder}/log.txt") from None


def do_all(study, jobs, save):
    """Do all jobs, and save() after every measurement."""
    seeds = study.size.seeds
    stages = {"base": [(seed,) for seed in (SELECT, *seeds)],
              "choose": list(itertools.product(paper_a.HEADS, ("joint", "frozen"))),
              "measure": [("frozen", SELECT), *itertools.product(PARTS, seeds)],
              "time": [()]}
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), enter)
    total = sum(map(len, stages.values()))
    with progress_bar(total=total, desc="study", unit="job") as bar, pool:
        try:
            for job, todo in stages.items():
                futures = [pool.submit(work, job, study, *arguments) for arguments in todo]
                for future in as_completed(futures):
                    future.result()
                    bar.update()
                    if job in ("measure", "time"):
                        save()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()  # train.py saves before it ends
            raise


def main(argv=None):
    """Bad input is one line and status 2."""
    p = Parser(prog="study.py", description="Try both papers' claims on small models. It can be "
               "stopped at any time; the same command goes on.")
    p.option("size", "full", "quick: 15 minutes on 2 CPU cores; full: 2 hours", choices=[*SIZES])
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
        for corpus in CORPORA:
            prepare(corpus)

        def save():
            counts = {corpus: study.text(study.base(study.size.seeds[0], corpus)).counts()
                      for corpus in CORPORA}
            timed = study.folder / "step_ms.json"
            results = dict(environment=environment(torch.device("cpu")), counts=counts,
                           minutes=(time.time() - begin) / 60, seeds=study.size.seeds,
                           step_ms=json.loads(timed.read_text()) if timed.exists() else {},
                           rows=collect(study))
            with atomic_write(out) as file:
                file.write(json.dumps(results).encode() + b"\n")
        do_all(study, args.jobs, save)
        print(f"{out}; next: python experiments/study/report.py --size {args.size}")


if __name__ == "__main__":
    main()
