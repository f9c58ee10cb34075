"""The folder of a run: what was asked, where it ran. The same command finds its run again."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from matryoshka_diffusion.config import ConfigError, RunConfig, Strict
from matryoshka_diffusion.configfile import load_config, to_yaml
from matryoshka_diffusion.files import write_atomically
from matryoshka_diffusion.train.layout import resolve_layout
from matryoshka_diffusion.train.precision import resolve_precision


def open_run(folder: Path, asked: RunConfig, device: torch.device, ranks: int = 1) -> RunConfig:
    """Begin a run in `folder`, or find the one that `asked` began there.

    Returns:
        The resolved config, in which what `auto` left open is decided. A resumed run keeps the
        decisions of its start, so moving it to other hardware does not change its numbers.

    Raises:
        ConfigError: the folder belongs to a run of another config, or holds files of no run.
        OSError: it cannot be written.
    """
    path = folder / "config.yaml"
    begun = written = load_config(path) if path.exists() else None
    if begun is not None:
        begun = _with_codec_of(begun, asked)
        _check_same_run(folder, begun, asked)
    refuse_foreign(folder)
    config = resolved(begun or asked, device, ranks)
    if config != written:  # new, prepared for a first start, or its codec has moved
        write_atomically(path, lambda file: file.write(to_yaml(config).encode()))
    _note_start(folder / "environment.json", device, ranks)
    return config


def refuse_foreign(folder: Path) -> None:
    """Raise `ConfigError` if the folder holds files that are no run, `OSError` if it is a file."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: give another --out")
    if (folder / "config.yaml").exists() or not folder.exists():
        return
    shown = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if any(path.is_file() for top in shown for path in (top, *top.rglob("*"))):
        raise ConfigError(
            f"{folder} holds files but no run (there is no config.yaml): give another --out"
        )


DECIDED_AT_START = ("precision", "layout")
"""The keys of `train` that may be `auto`."""


def resolved(config: RunConfig, device: torch.device, ranks: int = 1) -> RunConfig:
    """The config with what `auto` left open decided for so many of this device."""
    config = _with(config, precision=resolve_precision(config.train.precision, device))
    return _with(config, layout=resolve_layout(config, device, ranks))


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def _with_codec_of(begun: RunConfig, asked: RunConfig) -> RunConfig:
    """The run with its codec where that lies now: what it is says its hash, not its folder."""
    old, new = begun.codec, asked.codec
    if old is None or new is None or not old.weights or old.weights != new.weights:
        return begun
    return begun.model_copy(update={"codec": old.model_copy(update={"path": new.path})})


def _check_same_run(folder: Path, begun: RunConfig, asked: RunConfig) -> None:
    for key in DECIDED_AT_START:
        if getattr(asked.train, key) == "auto":
            asked = _with(asked, **{key: getattr(begun.train, key)})
    if told := differences(begun, asked):
        raise ConfigError(
            f"{folder} holds a run of another config: {told}; give another --out, or drop the "
            "override to continue that run"
        )


def differences(begun: Strict, asked: Strict) -> str:
    """The first values that differ, each with its path; empty if none do."""
    there, here = (dict(_leaves(config.model_dump(mode="json"))) for config in (begun, asked))
    different = [path for path in {**there, **here} if there.get(path) != here.get(path)]
    told = "; ".join(
        f"{path} is {there.get(path, 'absent')} there, {here.get(path, 'absent')} now"
        for path in different[:3]
    )
    return told + (f" and {len(different) - 3} more" if len(different) > 3 else "")


def _leaves(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings and lists with its path, such as train.stages[0].lr."""
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from _leaves(value, f"{path}.{key}".removeprefix("."))
    elif isinstance(data, list) and data:
        for index, value in enumerate(data):
            yield from _leaves(value, f"{path}[{index}]")
    else:
        yield path, data


def _note_start(path: Path, device: torch.device, ranks: int) -> None:
    """Add this start of the run to the list of where it was computed."""
    starts = json.loads(path.read_text("utf-8")) if path.exists() else []
    starts.append(
        {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "matryoshka-diffusion": _package_version(),
            "python": sys.version.split()[0],
            "torch": str(torch.__version__),
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "ranks": ranks,
            "threads": torch.get_num_threads(),
        }
    )
    text = json.dumps(starts, indent=1).encode()
    write_atomically(path, lambda file: file.write(text))


def _package_version() -> str:
    try:
        return version("matryoshka-diffusion")
    except PackageNotFoundError:  # run from its source
        return "unknown"
