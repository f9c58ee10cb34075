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
from studies.asked import SAMPLES
from studies.drawings import Drawing, all_drawings
from studies.figures import draw_all
from studies.queue import is_done, missing, of_today, work
from studies.run import run
from studies.spread import Results, read_results
from studies.table import filled, tables
from studies.trials import Trial, all_trials

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "studies" / "results"
PICTURES = ROOT / "docs" / "pictures" / "study"
PAGE = ROOT / "docs" / "results.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and call."""
    options = parse(arguments)
    if options.command == "run" and options.workers > 1:
        return _several(options)
    return COMMANDS[options.command](options)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line, in any order; leaves with status 2 if they make no sense."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    if (options.scale, options.samples) != (1.0, SAMPLES) and options.results.resolve() == RESULTS:
        parser.error(
            "--scale and --samples make another study: give it its own --work and --results"
        )
    tasks = [task.name for task in _tasks()] if options.names else []
    for name in options.names:
        if not any(chosen(task, [name]) for task in tasks):
            parser.error(
                f"{name}: no trial, drawing or folder/ of them (see python -m studies list)"
            )
    if options.command == "run":
        asked = {task.name: task for task in _chosen(options)}
        for task in asked.values():
            for name in missing(options.results, task):
                if name not in asked:
                    parser.error(f"{task.name} draws with what {name} trains: name that, too")
    return options


def _parser() -> argparse.ArgumentParser:
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
    return parser


def _chosen(options: argparse.Namespace) -> list[Trial | Drawing]:
    return [task for task in _asked_today(options) if chosen(task.name, options.names)]


def _asked_today(options: argparse.Namespace) -> Sequence[Trial | Drawing]:
    return _tasks(options.scale, options.samples)


@cache
def _tasks(scale: float = 1.0, samples: int = SAMPLES) -> tuple[Trial | Drawing, ...]:
    return (*all_trials(scale, samples), *all_drawings(scale, samples))


def chosen(name: str, wanted: Sequence[str]) -> bool:
    """Whether a task is wanted: by its name, by a folder (`emoji/`) that it is in, or as all are.

    >>> chosen("emoji/mdm/0/ddim-10", ["emoji/mdm/0"]), chosen("emoji/mdm/0/ddim-10", ["emoji/"])
    (False, True)
    """
    return not wanted or any(
        name.startswith(each) if each.endswith("/") else name == each for each in wanted
    )


def _list(options: argparse.Namespace) -> int:
    for task in _chosen(options):
        done = "done" if is_done(options.results, task) else "    "
        print(f"{done}  {task.name}")
    return 0


def _run(options: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    do, failed = partial(run, work=options.work), 0
    for name, error in work(_chosen(options), do, options.results, options.work / "locks"):
        failed += error is not None
        print(f"done: {name}" if error is None else f"failed: {name}: {error}", flush=True)
    return int(failed > 0)


def _results(options: argparse.Namespace) -> Results:
    """The results that answer what is asked today; of the others it is said that they do not."""
    found = read_results(options.results)
    current = of_today(found, _asked_today(options))
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
    """Put today's tables into the page of the study."""
    page = filled(PAGE.read_text("utf-8"), _results(options))
    write_atomically(PAGE, lambda file: file.write(page.encode()))
    print(PAGE)
    return 0


COMMANDS = {"list": _list, "run": _run, "plot": _plot, "table": _table, "page": _page}


def _several(options: argparse.Namespace) -> int:
    """The same run in several processes of one worker, which share the queue."""
    alone = {**vars(options), "workers": 1}
    words = [alone.pop("command"), *alone.pop("names")]
    given = [f"--{name}={value}" for name, value in alone.items()]
    command = [sys.executable, "-m", "studies", *words, *given]
    running = [subprocess.Popen(command) for _ in range(options.workers)]
    codes = [process.wait() for process in running]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
