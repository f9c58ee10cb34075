"""Commands about the command: doctor, what is installed and missing, and completion for shells."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from matryoshka_diffusion import __version__
from matryoshka_diffusion.cli.options import PRECISION, add_command, add_shared, find_device
from matryoshka_diffusion.cli.terminal import output, show

PACKAGE = "matryoshka-diffusion"
EXTRAS = {
    "text": "captions through T5, or MiniLM from a folder",
    "minilm": "captions of yours through MiniLM, and prompts of your own for the shipped model",
    "openmoji": "the openmoji data, with all of minilm",
    "eval": "mdm eval and mdm compare",
    "plots": "mdm plot, and the picture of mdm sweep",
    "parquet": "data in parquet files",
    "datasets": "data sets of the Hugging Face hub (hf:NAME)",
    "remote": "data on servers (https://...)",
    "studio": "mdm studio, the page in the browser",
    "video": "videos as data, and clips as MP4",
    "heic": "pictures in HEIC, as telephones make them",
    "tensorboard": "mdm train --log tensorboard",
    "wandb": "mdm train --log wandb",
    "completion": "mdm completion",
    "diffusers": "codecs, and mdm export --format diffusers",
    "onnx": "mdm export --format onnx, and drawing with it",
}
"""Extras for users and what needs them. `bench`, `site` and `dev` are for developers."""
SHELLS = ("bash", "zsh", "tcsh")


def doctor(options: argparse.Namespace) -> None:
    show("\n".join([*_system(options.device), *_extras()]))


def completion(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.cli.main import build_parser
    from matryoshka_diffusion.files import require

    shtab = require("shtab", "completion", "mdm completion")
    parser = build_parser()
    for action in actions_of(parser):
        if action.type is Path or action.metavar in ("RUN", "DATA"):
            action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    with output():
        print(shtab.complete(parser, options.shell))


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Options and arguments of a parser and of all commands in it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions_of(command)


def add_commands(commands: Any) -> None:
    """Add the commands of this module to the parser."""
    text = "say what is installed, what would be used, and what is missing"
    add_shared(add_command(commands, "doctor", doctor, text), "--device")
    text = "print the script with which a shell completes mdm"
    command = add_command(commands, "completion", completion, text)
    command.add_argument("shell", choices=SHELLS, help="bash: mdm completion bash >> ~/.bashrc")


def _system(device_name: str) -> list[str]:
    """Lines about what a command would run on."""
    import torch

    from matryoshka_diffusion.files import cache_folder, memory_bytes
    from matryoshka_diffusion.models.names import shipped_models
    from matryoshka_diffusion.training.precision import resolve_precision

    device = torch.device(find_device(device_name))
    name = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    cache = cache_folder()
    compiler = shutil.which(os.environ.get("CC", "cc"))
    without = "none: training on a CPU is slower without one"
    return [
        f"mdm {__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"{platform.system()} {platform.machine()}",
        f"device      {device} ({name})",
        f"precision   {resolve_precision(PRECISION, device)}",
        f"memory      {memory_bytes() / 1e9:.1f} GB",
        f"cache       {cache} ({shutil.disk_usage(cache).free / 1e9:.1f} GB free)",
        f"C compiler  {compiler or without}",
        f"models      {', '.join(shipped_models())}",
    ]


def _extras() -> list[str]:
    """A line for each extra: the packages that are there, or the command that brings the others."""
    lines = ["", "extras"]
    for extra, purpose in EXTRAS.items():
        try:
            lacking = _lacking(PACKAGE, extra)
        except metadata.PackageNotFoundError:
            return [*lines, f"  not known: {PACKAGE} runs from a folder and is not installed"]
        remedy = f'without {", ".join(lacking)}; pip install "{PACKAGE}[{extra}]"'
        lines.append(f"  {extra:11} {purpose}: {remedy if lacking else 'installed'}")
    return lines


def _lacking(package: str, extra: str) -> list[str]:
    """Packages of an extra that are not installed, also of extras that it names (`fsspec[http]`).

    Raises `PackageNotFoundError` if the package itself is not installed.
    """
    lacking = []
    for line in metadata.requires(package) or []:
        parts = re.match(r"([\w.-]+)(?:\[([\w,-]+)\])?.*extra == ['\"]([\w-]+)['\"]", line)
        if parts is not None and parts[3] == extra:
            inner = parts[2].split(",") if parts[2] else []
            try:
                metadata.version(parts[1])
                lacking += [name for other in inner for name in _lacking(parts[1], other)]
            except metadata.PackageNotFoundError:
                lacking.append(parts[1])
    return lacking
