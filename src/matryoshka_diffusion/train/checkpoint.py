"""Checkpoints that are whole or absent, and refused unless they fit.

A checkpoint is a folder `<images seen>/` of safetensors and JSON. It is written under a temporary
name, every file reaches the disk, the manifest with sizes and hashes comes last, and then the
folder takes its name: a power cut or kill -9 at any moment leaves older checkpoints as they were.
What does not match its manifest is never loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from matryoshka_diffusion.config import ModelConfig, RunConfig
from matryoshka_diffusion.files import sync_folder, write_atomically
from matryoshka_diffusion.nn.nested import NestedUNet

MANIFEST, STATE = "manifest.json", "state.json"
TENSORS = ("weights", "ema", "optimizer")
FILES = (*(f"{name}.safetensors" for name in TENSORS), STATE)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it, the reason and the remedy."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that a run needs to go on.

    Attributes:
        state: plain values for JSON; `images_seen` names the checkpoint.
        weights: the network's state, by name.
        ema: the averaged parameters, by name.
        optimizer: moments and step counts, as `optim.moments` names them.
    """

    state: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]


# --- writing -----------------------------------------------------------------------------------


def save(folder: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Add a checkpoint to `folder`, then remove the oldest until `keep` are left.

    Raises:
        OSError: it could not be written; names the path, the reason and the bytes needed. Nothing
            is left of it and older checkpoints are untouched.
    """
    target = folder / f"{snapshot.state['images_seen']:010d}"
    if not target.exists() or _flaw(target):
        _write(target, snapshot)
    for old in _newest_first(folder, up_to=target)[keep:]:
        shutil.rmtree(old)
    return target


def _write(target: Path, snapshot: Snapshot) -> None:
    temporary = target.parent / f".{target.name}.tmp"
    try:
        for stale in target.parent.glob(".*.tmp"):  # of a process that was killed while saving
            shutil.rmtree(stale)
        temporary.mkdir(parents=True)
        manifest = {}
        for name, data in zip(FILES, _contents(snapshot), strict=True):
            write_atomically(temporary / name, lambda file, data=data: file.write(data))
            manifest[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        text = json.dumps(manifest, indent=1).encode()
        write_atomically(temporary / MANIFEST, lambda file: file.write(text))
        if target.exists():
            shutil.rmtree(target)  # `save` found it to be torn
        os.rename(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(
            error.errno,
            f"cannot save the checkpoint {target} of {_bytes(snapshot):,} bytes: {reason}; "
            "older checkpoints are untouched, and the same command continues from the newest",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _contents(snapshot: Snapshot) -> Iterator[bytes]:
    """What belongs into `FILES`, one at a time to spare memory."""
    for name in TENSORS:
        yield _to_bytes(getattr(snapshot, name))
    yield json.dumps(dict(snapshot.state), indent=1, allow_nan=False).encode()


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    )


def _bytes(snapshot: Snapshot) -> int:
    return sum(x.nbytes for name in TENSORS for x in getattr(snapshot, name).values())


def export_weights(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: RunConfig,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write what sampling needs: `model.safetensors` and the resolved `config.json`.

    The weights hold the levels of `curriculum.active_model(config, config.train.images)`.
    """
    data = _to_bytes({name: value.to(dtype) for name, value in weights.items()})
    text = json.dumps(config.model_dump(mode="json"), indent=1).encode()
    write_atomically(folder / "model.safetensors", lambda file: file.write(data), needed=len(data))
    write_atomically(folder / "config.json", lambda file: file.write(text))


# --- reading -----------------------------------------------------------------------------------


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; None if none was ever begun there.

    Torn ones are skipped with a warning.

    Raises:
        CheckpointError: there are checkpoints, but none is complete. Starting over in silence
            would throw the run away.
    """
    found = _newest_first(folder)
    for path in found:
        if (flaw := _flaw(path)) is None:
            return path
        warnings.warn(f"{path} is ignored: {flaw}", stacklevel=2)
    if found:
        raise CheckpointError(
            f"{folder} holds no complete checkpoint: remove it to start the run over"
        )
    return None


def read(path: Path) -> Snapshot:
    """The checkpoint at `path`, which `newest` has found complete; tensors are on the CPU.

    They are read when they are asked for, so whoever copies them one by one holds them once.
    """
    tensors = {name: Stored(path / f"{name}.safetensors") for name in TENSORS}
    return Snapshot(state=json.loads((path / STATE).read_text("utf-8")), **tensors)


class Stored(Mapping[str, Tensor]):
    """The tensors of a safetensors file, read anew whenever one is asked for.

    A file that is opened as a whole stays mapped until the last of its tensors is gone, and all its
    pages that were touched count as memory of the process. This opens it for one tensor.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, framework="pt") as file:
            self._names = dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_weights(net: nn.Module, weights: Mapping[str, Tensor], *, where: str) -> None:
    """Load a network's weights, all or none.

    Raises:
        CheckpointError: keys or shapes differ; lists the first differences. `net` is unchanged.
    """
    check_same(net.state_dict(), weights, where=where)
    net.load_state_dict(weights)


def load_network(model: ModelConfig, weights: Mapping[str, Tensor], *, where: str) -> NestedUNet:
    """A network that holds `weights`, in float32 and without a second copy of them.

    Raises:
        CheckpointError: keys or shapes differ; lists the first differences.
    """
    with torch.device("meta"):
        net = NestedUNet(model)
    check_same(net.state_dict(), weights, where=where)
    net.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    return net


def check_same(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, where: str) -> None:
    """Refuse tensors whose names or shapes are not the expected ones.

    Raises:
        CheckpointError: the first differences, and how many there are.
    """
    missing = [f"{name} is missing" for name in expected if name not in found]
    surplus = [f"{name} is not in the network" for name in found if name not in expected]
    shapes = [
        f"{name} is {tuple(found[name].shape)}, the network's {tuple(value.shape)}"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    if problems := missing + surplus + shapes:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{where} does not fit the network: {'; '.join(problems[:3])}{more}; "
            "it belongs to another config or version"
        )


def _newest_first(folder: Path, up_to: Path | None = None) -> list[Path]:
    """Checkpoint folders by falling number, complete or not."""
    names = sorted((p.name for p in folder.glob("[0-9]*") if p.name.isdigit()), reverse=True)
    return [folder / name for name in names if up_to is None or name <= up_to.name]


def _flaw(path: Path) -> str | None:
    """Why the checkpoint is not complete; None if it is."""
    try:
        manifest = json.loads((path / MANIFEST).read_text("utf-8"))
        for name in FILES:
            if manifest[name] != _fingerprint(path / name):
                return f"{name} is not what {MANIFEST} says"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    return None


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}
