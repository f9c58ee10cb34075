"""`python -m studies list | run [NAME...] [--workers N] | plot | table | page`."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matryoshka_diffusion.cli.terminal import output
from matryoshka_diffusion.files import write_atomically
from studies.figures import draw_all
from studies.queue import all_trials
from studies.results import HEAD, read_results, tables
from studies.run import is_done, work
from studies.trials import SAMPLES, Trial

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results-tables.md"


class Study(NamedTuple):
    """The size of a study, and its folders."""

    runs: Path
    results: Path
    pictures: Path
    scale: float = 1.0  # share of the compute
    samples: int = SAMPLES  # of a distance


FULL = Study(ROOT / "runs/studies", ROOT / "studies/results", ROOT / "docs/pictures/study")
SMALL = Study(ROOT / "runs/study", ROOT / "runs/study/results", ROOT / "runs/study", 0.2, 256)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run its command and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument("command", choices=("list", "run", "plot", "table", "page"))
    names = "a trial, or a folder of trials such as emoji/ (all)"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names)
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each (1)")
    small = "a fifth of the compute and a quarter of the samples, in runs/study"
    parser.add_argument("--small", action="store_true", help=small)
    options = parser.parse_intermixed_args(arguments)
    study = SMALL if options.small else FULL
    trials = all_trials(study.scale, study.samples)
    for name in options.names:
        if not any(_matches(trial, name) for trial in trials):
            parser.error(f"{name}: no trial or folder/ of trials (see python -m studies list)")
    names = options.names or [trial.name for trial in trials]
    chosen = [trial for trial in trials if any(_matches(trial, name) for name in names)]
    if options.command == "list":
        for trial in chosen:
            print(f"{'done' if is_done(study.results, trial) else '    '}  {trial.name}")
    elif options.command == "run":
        return run_all(study, chosen, options.workers)
    else:
        _show(options.command, study, trials)
    return 0


def _matches(trial: Trial, name: str) -> bool:
    return trial.name.startswith(name) if name.endswith("/") else trial.name == name


def run_all(study: Study, trials: Sequence[Trial], workers: int) -> int:
    """Work through the queue in processes that share it; 1 if a trial failed, else 0."""
    do = partial(work, trials, study.results, study.runs)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        processes = [pool.submit(do) for _ in range(workers)]
    return int(not all(process.result() for process in processes))


def _show(command: str, study: Study, trials: Sequence[Trial]) -> None:
    """Draw or print what is there, or write its tables to their page."""
    results, outdated = read_results(study.results, trials)
    for name in outdated:
        print(f"left out: {name} is of another form of the study", file=sys.stderr)
    if command == "plot":
        print(*draw_all(results, study.pictures), sep="\n")
    elif command == "table":
        print(tables(results))
    else:
        page = f"{HEAD}{tables(results)}\n"
        write_atomically(PAGE, lambda file: file.write(page.encode()))
        print(PAGE)


if __name__ == "__main__":
    with output():
        status = main()
    sys.exit(status)
