"""Converting a released checkpoint once, a tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from matryoshka_diffusion.files import cache_folder, digest, write_atomically
from matryoshka_diffusion.models.released.load import Released, read_released

Progress = Callable[[int, int], None]
_ALIGNMENT = 8
_FORM = 1  # raised when what is converted changes, so that older conversions are made anew


def convert(released: Released, folder: Path, *, progress: Progress | None = None) -> None:
    """Write `config.json` and `model.safetensors` into `folder`, which `Matryoshka.load` reads.

    Memory holds one tensor at a time. `progress` is called with (bytes written, bytes in all).

    Raises:
        BrokenFile: a tensor is damaged. `folder` then holds no model.
        OSError: the files cannot be written; names the path and the reason.
    """
    text = json.dumps(released.config.model_dump(mode="json"), indent=1).encode()
    shapes = {name: released.weights.shape(key) for name, key in released.keys.items()}
    header, total = _header(shapes)

    def write(file: BinaryIO) -> None:
        file.write(header)
        done = 0
        for name in shapes:
            done += file.write(released.read(name).numpy().data)
            if progress is not None:
                progress(done, total)

    write_atomically(folder / "config.json", lambda file: file.write(text))
    try:  # the weights come last: a folder that has them is complete
        write_atomically(folder / "model.safetensors", write, needed=len(header) + total)
    except BaseException:
        (folder / "config.json").unlink()
        raise


def _header(shapes: dict[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """The beginning of a safetensors file of float32 tensors, and the bytes that follow it."""
    entries, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, offset


def converted(path: Path, *, progress: Progress | None = None) -> Path:
    """The folder of a released file's converted model, which is made once and kept in the cache.

    Raises:
        ValueError, OSError: as `read_released` and `convert`.
    """
    status = path.stat()
    made_of = f"{_FORM} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
    folder = cache_folder("released", digest(made_of))
    if not (folder / "model.safetensors").is_file():
        released = read_released(path)
        try:
            convert(released, folder, progress=progress)
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}; MDM_CACHE may name another folder for the cache"
            ) from error
    return folder
