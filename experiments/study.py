"""The study: both papers' claims, tried on models that are small enough to train here.

    python experiments/study.py --quick            # 21 minutes on 2 CPU cores
    python experiments/study.py --size patient     # more seeds, more questions: about 5 hours
    python experiments/study.py --only leap        # some of the parts
    python experiments/findings.py                 # then: docs/findings.md and the figures

A part of the study is a function of (study, seed). It trains what it asks about with this seed and
returns what it measured, {row: {what: number, or a list of them}}. The parts stand in
study_scale.py, study_layers.py, study_recipes.py, study_leap.py and study_tasks.py; the sizes in
study_runs.py, the statistics in verdicts.py. Parts and seeds run side by side, with one thread
each. Whatever is trained or measured is kept: after Ctrl-C or kill -9 the same command goes on.
"""
import json
import multiprocessing.connection
import os
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import Parser, Progress, environment, one_line_errors, write_whole
from data.prepare import CorpusError, prepare
from experiments.study_layers import frozen, layers
from experiments.study_leap import leap, stages
from experiments.study_recipes import recipes
from experiments.study_runs import ROOT, SELECT, SIZES, Study, foresee
from experiments.study_scale import scale, shuffled, translation
from experiments.study_tasks import induction, planning
from model import require

PARTS = {f.__name__: f for f in (recipes, planning, layers, frozen, translation, stages, leap,
                                 induction, scale)}  # the longest first
CHOOSING = ("recipes",)  # what seed SELECT finds best, the others train
SELECTING = (*CHOOSING, "frozen", "layers", "leap")  # what seed SELECT measures is used
TASKS = ("planning", "induction")  # need no corpus


def base(study, seed):
    """The model that most parts start from."""
    study.measured(study.base(seed), foresee)
    return {}


def enter():
    """Prepare a worker: one thread, and it ends when the first process does."""
    def end_with_the_first():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=end_with_the_first, daemon=True).start()
    torch.set_num_threads(1)


def work(part, seed, study):
    """Do a part for a seed in a worker; what it prints goes to a log. -> its rows"""
    path = study.folder / "log.txt"
    with open(path, "a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            return (PARTS | dict(base=base))[part](study, seed)
        except SystemExit:
            raise RuntimeError(f"{part} of seed {seed} failed: see {path}") from None


def needs(part, seed):
    """The jobs, {(part, seed)}, that must be done before this one: two never make the same run."""
    if part == "base" or part in TASKS:
        return set()
    if part in CHOOSING and seed != SELECT:
        return {("base", seed), (part, SELECT)}
    return {("base", seed)}


def do_all(parts, study, jobs):
    """-> {part: {row: {seed: what was measured}}}"""
    seeds, results = study.size.seeds, {part: {} for part in ("base", *parts)}
    todo = [("base", seed) for seed in (SELECT, *seeds) if not set(parts) <= set(TASKS)]
    todo += [(part, seed) for part in parts for seed in (SELECT, *seeds)
             if seed != SELECT or part in SELECTING]
    done, running = set(), {}
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), enter)
    with Progress(total=len(todo), desc="study", unit="job", leave=True) as bar, pool:
        try:
            while todo or running:
                for job in [job for job in todo if needs(*job) <= done][:jobs - len(running)]:
                    todo.remove(job)
                    running[pool.submit(work, *job, study)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    part, seed = job = running.pop(future)
                    for row, measured in future.result().items():
                        results[part].setdefault(row, {})[seed] = measured
                    done.add(job)
                    bar.update()
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()  # training saves before it ends
            raise
    return {part: results[part] for part in parts}


def corpora(parts, study):
    """Prepare what the parts need. -> the parts for which that worked"""
    if not set(parts) <= set(TASKS):
        prepare("python")
    if "leap" in parts:
        prepare("logs")
    try:
        if "translation" in parts:
            prepare("multi30k")  # the only download
            shuffled(study)
    except CorpusError as error:
        print(f"left out: translation ({error})", file=sys.stderr)
        return [part for part in parts if part != "translation"]
    return parts


def main(argv=None):
    """The command line."""
    p = Parser(prog="study.py", description="Try both papers' claims on small models. It can be "
               "stopped at any time; the same command goes on.")
    p.add_argument("--size", choices=list(SIZES), default="quick", help="quick: 21 minutes on 2 "
                   "CPU cores; patient: about 5 hours")
    p.add_argument("--quick", dest="size", action="store_const", const="quick",
                   help="the same as --size quick")
    p.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                   help="only these parts: %(choices)s")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side")
    p.add_argument("--folder", help="for runs and measurements (default: runs/study-SIZE)")
    p.add_argument("--results", default=str(ROOT / "experiments" / "results"), metavar="FOLDER",
                   help="for study_SIZE_PART.json")
    args = p.parse_args(argv)
    with one_line_errors("study.py", memory="--jobs"):
        require(args.jobs > 0, "--jobs must be at least 1")
        start, size = time.time(), SIZES[args.size]
        study = Study(size, Path(args.folder or ROOT / "runs" / f"study-{args.size}").resolve())
        study.folder.mkdir(parents=True, exist_ok=True)
        possible = dict(translation=size.pair_steps, planning=size.bits)
        parts = [part for part in args.only if possible.get(part, True)]
        require(parts, f"{' and '.join(args.only)}: not in this size; try --size patient")
        parts = corpora(parts, study)
        results = do_all(parts, study, args.jobs)
        for part, rows in results.items():
            write_whole(Path(args.results) / f"study_{args.size}_{part}.json", json.dumps(dict(
                command=f"python experiments/study.py --size {args.size} --only {part}",
                environment=environment(torch.device("cpu")), size=asdict(size),
                rows=rows)) + "\n")
        print(f"done in {(time.time() - start) / 60:.1f} minutes; next: "
              "python experiments/findings.py")


if __name__ == "__main__":
    main()
