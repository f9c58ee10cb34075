"""Checkpoints that are whole or absent, and refused unless they fit.

A checkpoint is a folder `<images seen>/` of safetensors and JSON. It is written under a temporary
name, the manifest with sizes and hashes last, and takes its name when every file is on the disk: a
power cut or kill -9 leaves older checkpoints as they were. A folder that does not match its
manifest is never loaded. `trainer.Trainer.resume` continues a run from the `newest` one.

Ranks that hold shards write one file each, side by side. A tensor is its pieces put together along
the first axis, in the order of the manifest, whoever reads it: the number of ranks may change.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from matryoshka_diffusion.codecconfig import CodecRunConfig
from matryoshka_diffusion.config import ConfigError, RunConfig
from matryoshka_diffusion.configfile import from_dict
from matryoshka_diffusion.files import BrokenFile, read_json, sync_folder, write_atomically
from matryoshka_diffusion.modelconfig import Natural, Strict
from matryoshka_diffusion.nn.nested import present_name
from matryoshka_diffusion.tensorfile import FLOATS, Place, places
from matryoshka_diffusion.training.distributed import ALONE, World, is_sharded, local

MANIFEST, STATE = "manifest.json", "state.json"
TENSORS = ("weights", "ema", "optimizer")
FILES = (*(f"{name}.safetensors" for name in TENSORS), STATE)
"""Files of rank 0. Ranks with shards add `weights.2.safetensors` and so on."""
PARTS = (*TENSORS, "tracks")
"""`tracks` is there if the run keeps any."""
_FLOATS = {*FLOATS, *FLOATS.values()}
_MOST = 2**53
"""The largest count that a float holds."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it, the reason and the remedy."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that a run needs to continue; tensors are named after the learnt parameters.

    `state` holds plain values for JSON, `ema` the average, `optimizer` moments and step counts,
    `tracks` further averages (`averages.PowerEma.state`).
    """

    state: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    tracks: Mapping[str, Tensor] = field(default_factory=dict)


# --- writing -----------------------------------------------------------------------------------


def save(folder: Path, snapshot: Snapshot, *, keep: int, world: World = ALONE) -> Path:
    """Add a checkpoint to `folder`, then remove the oldest until `keep` are left.

    All ranks of `world` call it: each writes its own shards, rank 0 all the rest. An OSError names
    the path, the reason and the bytes needed; nothing is left of that checkpoint.
    """
    target = folder / f"{snapshot.state['images_seen']:010d}"
    unique = world.once(lambda: secrets.token_hex(4))
    temporary = folder / f".{target.name}.{unique}.tmp"

    def begin() -> None:
        for stale in folder.glob(".*.tmp"):  # of a process that was killed while saving
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)

    def write() -> dict[str, dict[str, Any]]:
        entries = {}
        for name, data in _files(snapshot, world):  # one at a time, to spare memory
            write_atomically(temporary / name, lambda file, data=data: file.write(data))
            entries[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return entries

    def finish() -> None:
        manifest = {name: entry for files in entries for name, entry in files.items()}
        text = json.dumps(manifest, indent=1).encode()
        write_atomically(temporary / MANIFEST, lambda file: file.write(text))
        if target.exists():
            shutil.rmtree(target)  # it is torn
        os.rename(temporary, target)
        sync_folder(folder)

    if world.once(lambda: not target.exists() or _flaw(target) is not None):
        try:
            world.once(begin)
            entries = world.each(write)
            world.once(finish)
        except OSError as error:
            parts = [getattr(snapshot, name).values() for name in PARTS]
            size = sum(value.nbytes for values in parts for value in values)
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(
                error.errno,
                f"cannot save the checkpoint {target} of {size:,} bytes: {reason}; "
                "older checkpoints are untouched, and the same command continues from the newest",
            ) from error
        finally:
            if world.leads:
                shutil.rmtree(temporary, ignore_errors=True)
    if world.leads:
        for old in [path for path in _newest_first(folder) if path.name <= target.name][keep:]:
            shutil.rmtree(old)
    return target


def _files(snapshot: Snapshot, world: World) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of this rank's files: its shards, and on rank 0 all the rest."""
    for name in PARTS:
        pieces = {
            key: local(value)
            for key, value in getattr(snapshot, name).items()
            if (local(value).numel() > 0 if is_sharded(value) else world.leads)
        }
        if pieces or (world.leads and name in TENSORS):
            place = "" if world.leads else f".{world.rank + 1}"
            yield f"{name}{place}.safetensors", to_bytes(pieces)
    if world.leads:
        yield STATE, json.dumps(dict(snapshot.state), indent=1, allow_nan=False).encode()


def to_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Contents of a safetensors file."""
    return safetensors.torch.save(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, metadata
    )


# --- reading -----------------------------------------------------------------------------------


class ScaleState(Strict):
    """`precision.LossScale` in a file."""

    factor: Annotated[float, Field(ge=1.0)]
    growth: Annotated[float, Field(ge=1.0)]
    good_steps: Natural


class RunState(Strict):
    """The content of `state.json`. Checkpoints of earlier versions lack what has a default."""

    images_seen: Annotated[Natural, Field(le=_MOST)]
    steps: Annotated[Natural, Field(le=_MOST)]
    skipped: Natural = 0
    skipped_in_a_row: Natural = 0
    scale: ScaleState | None = None
    seconds: Annotated[float, Field(ge=0.0)]
    config: dict[str, Any]
    bad: list[Any] = Field(default_factory=list)

    def problems(self) -> Iterator[str]:
        for row in self.bad:  # a name that is no Unicode is no text for pydantic
            kinds = (str, str, int | None)
            if not isinstance(row, list) or not all(map(isinstance, row, kinds)) or len(row) != 3:
                yield "a row of bad is not [path, reason, offset]"


def _remedy(path: Path) -> str:
    return f"remove {path} to go on from an older checkpoint"


def _read_state(path: Path) -> dict[str, Any]:
    """Read `state.json` of the checkpoint in the folder `path`."""
    remedy = _remedy(path)
    try:
        state = read_json(path / STATE)
        images_seen = RunState.model_validate(state).images_seen
    except BrokenFile as error:
        raise CheckpointError(f"{error}; {remedy}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the state of a run"
        message = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(f"{path / STATE}: {key}: {message}; {remedy}") from error
    if path.name.isdigit() and images_seen != int(path.name):
        raise CheckpointError(
            f"{path / STATE}: images_seen is {images_seen:,}, and the folder's name says another "
            f"number; {remedy}"
        )
    return state


def newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint in `folder`; None if none was ever begun there.

    Torn ones are skipped with a warning. Raises CheckpointError if all are torn: starting over in
    silence would throw the run away.
    """
    paths = _newest_first(folder)
    for path in paths:
        if (flaw := _flaw(path)) is None:
            return path
        warnings.warn(f"{path} is ignored: {flaw}", stacklevel=2)
    if paths:
        raise CheckpointError(
            f"{folder} holds no complete checkpoint: remove it to start the run over"
        )
    return None


def read(path: Path, kind: type[RunConfig | CodecRunConfig] | None = None) -> Snapshot:
    """Read a complete checkpoint. Tensors are read on access, on the CPU.

    Raises:
        CheckpointError, BrokenFile: its state is not that of a run, its config is not of this
            `kind`, or its files are damaged.
    """
    manifest = read_json(path / MANIFEST)
    tensors = {
        name: Stored([path / file for file in manifest if file.split(".")[0] == name])
        for name in PARTS
    }
    state = _read_state(path)
    if kind is not None:
        parse_config(path, state, kind)
    return Snapshot(state=state, **tensors)


def parse_config(path: Path, state: Mapping[str, Any], kind: type[Any]) -> Any:
    """Return the config in the state of the checkpoint `path`. Raises CheckpointError."""
    try:
        return from_dict(state["config"], kind, where=f"{path / STATE}: config")
    except ConfigError as error:
        raise CheckpointError(f"{error}; {_remedy(path)}") from error


class Stored(Mapping[str, Tensor]):
    """Tensors in safetensors files, each read on access and put together of its pieces.

    So restoring a run takes the memory of the run and of one tensor, not that of the files too.
    Names that version 0.1.0 wrote become today's. `types` are the tensors' types in the files.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._pieces: dict[str, list[Place]] = {}
        for path in files:
            for name, piece in places(path).items():
                self._pieces.setdefault(present_name(name), []).append(piece)
        self.types = {name: pieces[-1].dtype for name, pieces in self._pieces.items()}

    def __getitem__(self, name: str) -> Tensor:
        pieces = [piece.read() for piece in self._pieces[name]]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def __contains__(self, name: object) -> bool:
        return name in self._pieces  # a Mapping would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor, without reading it."""
        first, *rest = (piece.shape for piece in self._pieces[name])
        return torch.Size([first[0] + sum(shape[0] for shape in rest), *first[1:]] if first else [])


def _newest_first(folder: Path) -> list[Path]:
    """Checkpoint folders by falling number, complete or not."""
    return sorted((path for path in folder.glob("[0-9]*") if path.name.isdigit()), reverse=True)


def _flaw(path: Path) -> str | None:
    """Say why the checkpoint is not complete; None if it is."""
    try:
        manifest = read_json(path / MANIFEST)
        for name in dict.fromkeys([*FILES, *manifest]):
            with open(path / name, "rb") as file:
                digest = hashlib.sha256()
                while piece := file.read(2**20):
                    digest.update(piece)
                entry = {"size": file.tell(), "sha256": digest.hexdigest()}
            if manifest[name] != entry:
                return f"{name} is not what {MANIFEST} says"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    return None
