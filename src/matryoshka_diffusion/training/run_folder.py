"""The folder of a run: its config, and where it was computed. The same command finds it again."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from matryoshka_diffusion.config import (
    ConfigError,
    DataConfig,
    DataIdentity,
    RunConfig,
    Strict,
    TrainConfig,
    UsageError,
)
from matryoshka_diffusion.configfile import Config, load_config, to_yaml
from matryoshka_diffusion.files import BrokenFile, read_json, write_atomically
from matryoshka_diffusion.training import checkpoint
from matryoshka_diffusion.training.checkpoint import CheckpointError
from matryoshka_diffusion.training.gradient import resolve_threads
from matryoshka_diffusion.training.precision import resolve_layout, resolve_precision

LOCK, OWNER = ".lock", ".owner.json"
SETTLED = ("init", "init_levels", "lora", "ema_power")
"""Settings of a training that its first checkpoint depends on."""


class RunInUse(UsageError):
    """Another process works in the run folder; the message names the process."""


@contextmanager
def owned(folder: Path, config: str = "config.yaml") -> Iterator[None]:
    """Keep other processes from training in `folder` until the block ends.

    The system releases the lock when this process dies, however it dies. A process may own a
    folder twice. The file `config` marks the folder as that of a run.

    Raises:
        RunInUse: another process owns it, which is left as it is.
        ConfigError: it holds files of no run.
        OSError: it cannot be written.
    """
    _refuse_foreign(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise RunInUse(_in_use(folder)) from None
    try:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}
        write_atomically(folder / OWNER, lambda file: file.write(json.dumps(owner).encode()))
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):
                (folder / OWNER).unlink(missing_ok=True)
                if os.listdir(folder) == [LOCK]:  # nothing was begun, so nothing is left
                    (folder / LOCK).unlink()
                    folder.rmdir()
        lock.release()


def _in_use(folder: Path) -> str:
    """Describe the process that owns `folder`."""
    process = "another process"
    with suppress(OSError, ValueError, KeyError, TypeError):  # it may just be writing it
        owner = json.loads((folder / OWNER).read_text("utf-8"))
        process = "process {pid} on {host}, started {started}".format(**owner)
    return (
        f"{folder} is in use by {process}: wait until it ends, or stop it; if its machine is gone, "
        f"the file server may hold the lock for some minutes, then remove {folder / LOCK}"
    )


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def open_run(
    folder: Path,
    config: RunConfig,
    device: torch.device,
    ranks: int = 1,
    *,
    data_changed: bool = False,
) -> RunConfig:
    """Begin a run in `folder`, or find the run that `config` began there; return its config.

    The config is resolved: a resumed run keeps what replaced `auto` at its start, so moving it to
    other hardware does not change its numbers. Its data may have moved. With `data_changed` it may
    also be other data; a warning says what differs.

    Raises:
        ConfigError: the folder belongs to a run of another config, or of other data.
    """
    path = folder / "config.yaml"
    written = load_config(path) if path.exists() else None
    if written is not None:
        data = continued_data(folder, written, config, changed=data_changed)
        config = _continued(folder, written.model_copy(update={"data": data}), config)
    precision = resolve_precision(config.train.precision, device)
    config = _with(
        config,
        precision=precision,
        layout=resolve_layout(config.train.layout, device, precision),
        threads=resolve_threads(config.train.threads, config.train, config.model, device),
    )
    if config != written:  # new, prepared for a first start, or its codec or features have moved
        write_atomically(path, lambda file: file.write(to_yaml(config).encode()))
    _note_start(folder / "environment.json", device, ranks, config.data.identity)
    return config


def _refuse_foreign(folder: Path, config: str) -> None:
    """Raise `ConfigError` if the folder holds files that are no run, `OSError` if it is a file.

    A run is known by its file `config`; hidden files are no obstacle.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: give another --out")
    if (folder / config).exists() or not folder.exists():
        return
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if any(path.is_file() for top in visible for path in (top, *top.rglob("*"))):
        raise ConfigError(
            f"{folder} holds files of something else (there is no {config}): give another folder"
        )


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def _continued(folder: Path, written: RunConfig, config: RunConfig) -> RunConfig:
    """Return the config of the run in `folder`. Raises ConfigError if `config` is another."""
    for part in ("codec", "features"):
        old, new = getattr(written, part), getattr(config, part)
        if old and new and old.weights and old.weights == new.weights:  # it may have moved
            written = written.model_copy(update={part: new})
    adapters, theirs = written.train.lora, config.train.lora
    if adapters and theirs and adapters.base and adapters.base == theirs.base:  # it may have moved
        written = _with(written, init=config.train.init)
    auto = [
        key for key in ("precision", "layout", "threads") if getattr(config.train, key) == "auto"
    ]
    config = _with(config, **{key: getattr(written.train, key) for key in auto})
    if _is_unseen(folder):
        written = _planned_anew(written, config)
    if changes := differences(written, config):
        raise ConfigError(
            f"{folder} holds a run of another config: {changes}; give another --out, or go on "
            f"with that run (mdm train {folder}; --more IMAGES lengthens it)"
        )
    return written


def _is_unseen(folder: Path) -> bool:
    """True for a run that has weights, and has seen no image: that of `mdm grow`."""
    path = checkpoint.newest(folder / "checkpoints")
    return path is not None and not checkpoint.read(path).state["images_seen"]


def _planned_anew(written: RunConfig, config: RunConfig) -> RunConfig:
    """The run `written` with the training and sampling of `config`, as far as its weights go."""
    if written.train.stages[0].levels != config.train.stages[0].levels:
        return written
    train = {name: getattr(written.train, name) for name in SETTLED}
    return _with(config, **train).model_copy(
        update={
            part: getattr(written, part)
            for part in RunConfig.model_fields
            if part not in ("train", "sampling")
        }
    )


def continued_data(folder: Path, run: Config, config: Config, *, changed: bool) -> DataConfig:
    """Return the data section of the config of `run`, with the place and identity of its data now.

    Data with the same identity may have moved. Other data is accepted with a warning if `changed`.

    Raises:
        ConfigError: the data is another one.
        CheckpointError: `run` has no identity of its data, and no checkpoint can be read.
    """
    written, data = run.data, config.data
    if data.identity is None:  # a loader of the caller's own
        return written
    known = written.identity or _trained_on(folder, type(run))
    if known is None:  # the run was prepared, and has not begun, or it is of an earlier version
        return written.model_copy(update={"identity": data.identity})
    if other := differences(known, data.identity):
        if not changed:
            raise ConfigError(
                f"{folder} was trained on other data: {other}; name the data of the run, or go on "
                "with this one (mdm train --data-changed)"
            )
        warnings.warn(f"{folder} goes on with other data: {other}", stacklevel=2)
    place: dict[str, Any] = {"path": data.path, "source": data.source, "identity": data.identity}
    if [part.share for part in written.mix] == [part.share for part in data.mix]:
        place["mix"] = data.mix
    return written.model_copy(update=place)


def _trained_on(folder: Path, kind: type[Config]) -> DataIdentity | None:
    """Return the identity of the data in the newest checkpoint; None before the first image.

    Checkpoints of earlier versions have none either: a warning says so.
    """
    path = checkpoint.newest(folder / "checkpoints")
    if path is None or not (state := checkpoint.read(path).state)["images_seen"]:
        return None
    known: DataIdentity | None = checkpoint.parse_config(path, state, kind).data.identity
    if known is None:
        warnings.warn(
            f"{path} does not say which data it was trained on, so today's cannot be compared: "
            "make sure that it is the same",
            stacklevel=3,
        )
    return known


def differences(written: Strict, config: Strict) -> str:
    """Describe the first values that differ, each with its path; empty if none do."""
    there, here = (dict(_leaves(c.model_dump(mode="json"))) for c in (written, config))
    paths = [path for path in {**there, **here} if there.get(path) != here.get(path)]
    first = "; ".join(
        f"{path} is {there.get(path, 'absent')} there, {here.get(path, 'absent')} now"
        for path in paths[:3]
    )
    return first + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _leaves(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested mappings and lists with its path, such as train.stages[0].lr."""
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from _leaves(value, f"{path}.{key}".removeprefix("."))
    elif isinstance(data, list) and data:
        for index, value in enumerate(data):
            yield from _leaves(value, f"{path}[{index}]")
    else:
        yield path, data


def refuse_lost_weights(train: TrainConfig, folder: Path) -> None:
    """Raise CheckpointError if a run without a checkpoint must have had one."""
    path = folder / "metrics.jsonl"
    if train.lora is None and (train.init or train.init_levels):
        raise CheckpointError(
            f"{folder} begins from trained weights, but its first checkpoint is missing: remove it "
            "and begin it again (mdm grow, or mdm train with --init)"
        )
    text = path.read_bytes() if path.exists() else b""
    logged = max(map(int, re.findall(rb'"images_seen": (\d{1,18})', text)), default=0)
    if logged >= 2 * train.checkpoint_every_images:  # one may have been in the making
        raise CheckpointError(
            f"{folder} has metrics of a run, but its checkpoints are gone: remove it to start over"
        )


def _note_start(path: Path, device: torch.device, ranks: int, data: DataIdentity | None) -> None:
    """Add this start of the run to the list of where it was computed, and on which data."""
    starts: Any = []
    if path.exists():
        try:
            starts = read_json(path)
        except BrokenFile:
            starts = None
        if not isinstance(starts, list):
            warnings.warn(f"{path} is damaged: it is written anew", stacklevel=2)
            starts = []
    try:
        package = version("matryoshka-diffusion")
    except PackageNotFoundError:  # run from its source
        package = "unknown"
    start = {
        "started": _now(),
        "matryoshka-diffusion": package,
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "data": data and data.model_dump(),
    }
    text = json.dumps([*starts, start], indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))
