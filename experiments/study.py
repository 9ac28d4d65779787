"""The study: both papers' claims, tried on models that are small enough to train here.

    python experiments/study.py --quick            # everything, in 25 minutes on 2 CPU cores
    python experiments/study.py --size patient     # longer, more seeds, larger: 3 hours
    python experiments/study.py --only leap        # some of the parts
    python experiments/findings.py                 # docs/findings.md and the figures

A part of the study is a function of (study, seed): it trains what it asks about with this seed,
and returns what it measured, {row: {what: number or list of them}}. Read them in study_scale.py,
study_layers.py, study_recipes.py, study_leap.py and study_tasks.py; study_runs.py has the sizes,
and verdicts.py the statistics. Seeds run side by side, one thread each. All that is trained or
measured is kept in --folder, so after Ctrl-C or kill -9 the same command goes on.
"""
import json
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from multiprocessing.connection import wait
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

PARTS = {f.__name__: f for f in (recipes, layers, frozen, leap, planning, stages, induction,
                                 translation, scale)}
CHOOSING = ("frozen", "recipes")  # their first seed chooses what the others train
SELECTING = (*CHOOSING, "layers", "leap")  # what seed SELECT measured is used
TASKS = ("planning", "induction")  # need no corpus and no base


def base(study, seed):
    """The model that most parts start from."""
    study.measured(study.base(seed), foresee)


def enter():
    """Prepare a worker: one thread, and an end when the first process ends."""
    def end_with_the_first():
        wait([multiprocessing.parent_process().sentinel])
        os._exit(1)
    threading.Thread(target=end_with_the_first, daemon=True).start()
    torch.set_num_threads(1)


def work(part, size, folder, seed):
    """Do a part for a seed in a worker; what train.py prints goes to a log. -> part, seed, rows"""
    study = Study(size, folder)
    with open(study.folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        return part, seed, (PARTS | dict(base=base))[part](study, seed)


def rounds(parts, seeds):
    """(part, seed) in three rounds: the bases, what needs no choice, and what a choice decides."""
    first = [("base", seed) for seed in (SELECT, *seeds) if not set(parts) <= set(TASKS)]
    second = [(part, SELECT) for part in parts if part in SELECTING]
    second += [(part, seed) for part in parts if part not in CHOOSING for seed in seeds]
    return first, second, [(part, seed) for part in parts if part in CHOOSING for seed in seeds]


def do_all(parts, size, folder, jobs):
    """-> {part: {row: {seed: what was measured}}}"""
    todo, results = rounds(parts, size.seeds), {part: {} for part in parts}
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), enter)
    with Progress(total=sum(map(len, todo)), desc="study", unit="job", leave=True) as bar, pool:
        try:
            for jobs_of_round in todo:
                futures = [pool.submit(work, part, size, folder, seed)
                           for part, seed in jobs_of_round]
                for future in as_completed(futures):
                    part, seed, rows = future.result()
                    for row, measured in (rows or {}).items():
                        results[part].setdefault(row, {})[seed] = measured
                    bar.update()
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()  # training saves before it ends
            raise
    return results


def main(argv=None):
    """The command line."""
    p = Parser(prog="study.py", description="Try both papers' claims on small models. It can be "
               "stopped at any time; the same command goes on.")
    p.add_argument("--size", choices=list(SIZES), default="quick", help="quick: 25 minutes on 2 "
                   "CPU cores; patient: 3 hours")
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
        start, folder = time.time(), Path(args.folder or ROOT / "runs" / f"study-{args.size}")
        folder, parts = folder.resolve(), list(args.only)
        folder.mkdir(parents=True, exist_ok=True)
        size = SIZES[args.size]
        small = dict(translation=size.pair_steps, planning=size.bits, induction=size.patience)
        parts = [part for part in parts if small.get(part, True)]  # too long for this size
        if not set(parts) <= set(TASKS):
            prepare("python")
        if "leap" in parts:
            prepare("logs")
        if "translation" in parts:
            try:
                prepare("multi30k")
                shuffled(Study(size, folder))
            except CorpusError as error:  # the only download
                parts.remove("translation")
                print(f"left out: translation ({error})", file=sys.stderr)
        results = do_all(parts, size, folder, args.jobs)
        for part, rows in results.items():
            write_whole(Path(args.results) / f"study_{args.size}_{part}.json", json.dumps(dict(
                command=f"python experiments/study.py --size {args.size} --only {part}",
                environment=environment(torch.device("cpu")), size=asdict(size), rows=rows)) + "\n")
        print(f"done in {(time.time() - start) / 60:.1f} minutes; next: "
              "python experiments/findings.py")


if __name__ == "__main__":
    main()
