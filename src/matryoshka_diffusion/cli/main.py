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

from matryoshka_diffusion import __version__
from matryoshka_diffusion.cli.options import describe_unknown
from matryoshka_diffusion.cli.terminal import (
    escape_unknown_letters,
    leads,
    one_line,
    say,
    show,
    show_traceback,
    show_warning,
)
from matryoshka_diffusion.hints import did_you_mean

GROUPS = {
    "train": ("train", "embed", "data", "demo"),
    "models": ("sample", "edit", "grow", "convert", "ema"),
    "export": ("export",),
    "info": ("presets", "info", "plot", "timelapse"),
    "doctor": ("doctor", "completion"),
    "eval": ("eval", "compare", "sweep"),
    "studio": ("studio",),
}
"""Commands by the module that adds and runs them."""
FIRST = (
    ('mdm sample openmoji -p "red apple"', "draw with the model in the package"),
    ("mdm data check photos", "see how a folder of your images is understood"),
    ("mdm train --data photos --out runs/mine", "train on it, or continue"),
    ("mdm presets", "list the trainings that have a name"),
    ("mdm doctor", "see what is installed, and what is missing"),
)
"""Commands for the first minute, and what they do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    escape_unknown_letters()
    if not arguments:
        show(first_minute())
        return 0
    if arguments[0] == "help":
        arguments = [*arguments[1:], "--help"]
    known = [name for names in GROUPS.values() for name in names]
    if not arguments[0].startswith("-") and arguments[0] not in known:
        near = did_you_mean(arguments[0], known)
        return say(f"mdm: no command {arguments[0]!r}{near}; mdm --help lists them", 2)
    options, unknown = build_parser(arguments[:1]).parse_known_args(arguments)
    if unknown:
        options.parser.error(describe_unknown(options.parser, unknown))
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


def first_minute() -> str:
    """The text of `mdm` without a command."""
    width = max(len(command) for command, _ in FIRST)
    lines = [f"  {command:{width}}  {text}" for command, text in FIRST]
    about = f"mdm {__version__}: diffusion models that draw an image at several resolutions at once"
    return "\n".join([about, "", *lines, "", "mdm --help lists all commands"])


def build_parser(first: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Build the parser of all commands, or only of the group that the word `first` is in."""
    parser = _Parser(prog="mdm", description="Matryoshka Diffusion Models: train, sample, grow.")
    parser.add_argument("--version", action="version", version=f"mdm {__version__}", help="show it")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    groups = [group for group, names in GROUPS.items() if set(first) & set(names)]
    for group in groups or GROUPS:
        import_module(f"matryoshka_diffusion.cli.{group}").add_commands(commands)
    return parser
