"""`python -m studies list | run [NAME...] [--workers N] | plot | table | page`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

import torch

from matryoshka_diffusion.files import write_atomically
from studies.figures import draw_all
from studies.queue import is_done, missing, work
from studies.results import Results, filled, of_today, read_results, tables
from studies.run import run
from studies.trials import SAMPLES, Drawing, Trial, all_drawings, all_trials

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "studies" / "results"
PICTURES = ROOT / "docs" / "pictures" / "study"
PAGE = ROOT / "docs" / "results.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and call."""
    options = parse(arguments)
    return COMMANDS[options.command](options)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, in any order; leaves with status 2 if they make no sense."""
    parser = argparse.ArgumentParser(prog="python -m studies", description=__doc__)
    parser.add_argument("command", choices=tuple(COMMANDS))
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="a trial, or a folder such as emoji/ (all)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each (1)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "studies", help="runs go here")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the compute (1)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"of a distance ({SAMPLES})")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON files go here")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="plots go here")
    options = parser.parse_intermixed_args(arguments)
    if (options.scale, options.samples) != (1.0, SAMPLES) and options.results.resolve() == RESULTS:
        parser.error("--scale and --samples make another study: set its own --work and --results")
    for name in options.names:
        if not any(chosen(task.name, [name]) for task in _tasks()):
            parser.error(
                f"{name}: no trial, drawing or folder/ of them (see python -m studies list)"
            )
    if options.command == "run":
        tasks = _chosen(options)
        for task in tasks:
            for name in missing(options.results, task):
                if name not in [each.name for each in tasks]:
                    parser.error(f"{task.name} draws with what {name} trains: name that, too")
    return options


@cache
def _tasks(scale: float = 1.0, samples: int = SAMPLES) -> tuple[Trial | Drawing, ...]:
    return (*all_trials(scale, samples), *all_drawings(scale, samples))


def _chosen(options: argparse.Namespace) -> list[Trial | Drawing]:
    tasks = _tasks(options.scale, options.samples)
    return [task for task in tasks if chosen(task.name, options.names)]


def chosen(name: str, wanted: Sequence[str]) -> bool:
    """True if a task is wanted: by its name, by a folder (`emoji/`) above it, or as all are.

    >>> chosen("emoji/mdm/0/ddim-10", ["emoji/mdm/0"]), chosen("emoji/mdm/0/ddim-10", ["emoji/"])
    (False, True)
    """
    return not wanted or any(
        name.startswith(each) if each.endswith("/") else name == each for each in wanted
    )


def _list(options: argparse.Namespace) -> int:
    for task in _chosen(options):
        print(f"{'done' if is_done(options.results, task) else '    '}  {task.name}")
    return 0


def _run(options: argparse.Namespace) -> int:
    """Work through the queue, in this process or in several of one worker that share it."""
    if options.workers > 1:
        alone = {**vars(options), "workers": 1}
        words = [alone.pop("command"), *alone.pop("names")]
        given = [f"--{name}={value}" for name, value in alone.items()]
        command = [sys.executable, "-m", "studies", *words, *given]
        workers = [subprocess.Popen(command) for _ in range(options.workers)]
        codes = [worker.wait() for worker in workers]
        return int(any(codes))
    torch.set_num_threads(1)
    do, failed = partial(run, work=options.work), 0
    for name, error in work(_chosen(options), do, options.results, options.work / "locks"):
        failed += error is not None
        print(f"done: {name}" if error is None else f"failed: {name}: {error}", flush=True)
    return int(failed > 0)


def _results(options: argparse.Namespace) -> Results:
    """The results that answer what is asked today; the names of the others are printed."""
    found = read_results(options.results)
    current = of_today(found, _tasks(options.scale, options.samples))
    for name in found.keys() - current.keys():
        print(f"left out: {name} is of another form of the study", file=sys.stderr)
    return current


def _plot(options: argparse.Namespace) -> int:
    for path in draw_all(_results(options), options.pictures):
        print(path)
    return 0


def _table(options: argparse.Namespace) -> int:
    print(tables(_results(options)))
    return 0


def _page(options: argparse.Namespace) -> int:
    """Put the tables of today into the page of the study."""
    page = filled(PAGE.read_text("utf-8"), _results(options))
    write_atomically(PAGE, lambda file: file.write(page.encode()))
    print(PAGE)
    return 0


COMMANDS = {"list": _list, "run": _run, "plot": _plot, "table": _table, "page": _page}


if __name__ == "__main__":
    sys.exit(main())
