"""The command `mdm`: parse the options and call the function of a command.

Each command imports heavy modules itself, so `mdm --help` and mistyped commands answer at once.
Exit status: 0 done, 1 failed, 2 impossible request, 130 / 143 / 138 stopped by Ctrl-C / SIGTERM /
SIGUSR1 and saved.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from matryoshka_diffusion.cli.terminal import (
    escape_unknown_letters,
    leads,
    one_line,
    say,
    show_traceback,
    show_warning,
)

GROUPS = {
    "train": ("train", "embed", "data", "demo"),
    "models": ("sample", "edit", "grow", "convert", "export", "ema"),
    "info": ("info", "plot"),
    "eval": ("eval", "compare", "sweep"),
}
"""Commands by the module that adds and runs them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    escape_unknown_letters()
    options = build_parser(arguments[:1]).parse_args(arguments)
    options.arguments = arguments
    warnings.showwarning, sys.excepthook = show_warning, show_traceback
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # whose reports have names from files
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        options.run(options)
    except KeyboardInterrupt:
        return say("interrupted", 130)
    except Exception as error:
        if options.debug:
            raise
        return _report(error)
    return 0


def _report(error: Exception) -> int:
    """Print an error as one line; returns the exit status.

    Packages that read files (safetensors, PIL, pyarrow, av, zipfile, pickle, ...) raise errors of
    their own for damaged ones. Those that no reader has given a path to are named by their type.
    """
    from matryoshka_diffusion.config import UsageError

    if isinstance(error, ValueError | OSError | ImportError | RuntimeError):
        return say(one_line(error), 2 if isinstance(error, UsageError) else 1)
    code = getattr(error, "code", None)  # train.signals.Stopped, without importing torch
    if isinstance(code, int):
        return say(one_line(error), code) if leads() else code
    kind = type(error).__name__
    return say(f"{kind}: {one_line(error)} (add --debug to see which file or line it is about)", 1)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(say(f"{self.prog}: {message} (see {self.prog} --help)", 2))


def build_parser(first: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Build the parser of all commands, or only of the group that the word `first` is in."""
    parser = _Parser(prog="mdm", description="Matryoshka Diffusion Models: train, sample, grow.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    groups = [group for group, names in GROUPS.items() if set(first) & set(names)]
    for group in groups or GROUPS:
        import_module(f"matryoshka_diffusion.cli.{group}").add_commands(commands)
    return parser
