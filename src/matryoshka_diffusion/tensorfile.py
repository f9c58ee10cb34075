"""Safetensors files, opened only after their header is judged by its length.

The reader of safetensors parses a header of any length: 73 MB of it take 1.3 GB of memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from matryoshka_diffusion.files import BrokenFile, read_json

LARGEST_HEADER = 8 * 2**20
"""Bytes of a file's description of its tensors: about 60,000 of them."""
_MOST = {"layers": 1_000, "channels": 8_192}
"""Largest numbers of settings with these words in their names."""
FLOATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Types of weights by their names in a file; a cast of any other type would change the network."""
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def check_header(path: Path) -> None:
    """Raise `BrokenFile` with the path unless a file begins as a safetensors file does."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if size < 8 or header > min(size - 8, LARGEST_HEADER):
        raise BrokenFile(
            f"{path}: damaged or no safetensors file (a header of {header:,} bytes; the file has "
            f"{size:,}, and {LARGEST_HEADER:,} are allowed): copy or download it again"
        )


def check_folder(folder: Path) -> None:
    """Judge a model of transformers or diffusers before it is built: its headers and its depth.

    Raises:
        BrokenFile: a header is too long, or `config.json` holds no settings, or asks for layers or
            channels without end.
    """
    for path in folder.glob("*.safetensors"):
        check_header(path)
    path = folder / "config.json"
    settings = read_json(path) if path.is_file() else {}
    if not isinstance(settings, dict):
        raise BrokenFile(f"{path}: no settings of a model: copy or download it again")
    for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        for name, value in part.items():
            numbers = value if isinstance(value, list) else [value]
            most = max((limit for word, limit in _MOST.items() if word in name), default=math.inf)
            if any(isinstance(number, int) and number > most for number in numbers):
                raise BrokenFile(f"{path}: {name} is more than {most:,}: it is no real model")


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a file as `safetensors.safe_open` does. Raises `BrokenFile` if it is damaged."""
    check_header(path)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise BrokenFile(f"{path}: damaged or no safetensors file ({error})") from error


class Place(NamedTuple):
    """Place of a tensor in a file: the bytes from `begin` to `end`, and what they mean."""

    path: Path
    dtype: str
    shape: torch.Size
    begin: int
    end: int

    def read(self) -> Tensor:
        """Read the tensor into memory of its own, and no other byte of the file.

        Raises `BrokenFile` if the file ends too early, or if the type is neither one of weights nor
        one of counts.
        """
        dtype = (FLOATS | _INTEGERS).get(self.dtype)
        if dtype is None:
            raise BrokenFile(f"{self.path}: holds {not_floats(self.dtype)}")
        value = torch.empty(self.shape, dtype=dtype)
        with open(self.path, "rb") as file:
            file.seek(self.begin)
            count = file.readinto(value.reshape(-1).view(torch.uint8).numpy().data)
        if count != self.end - self.begin:
            raise BrokenFile(f"{self.path}: ends too early: copy or download it again")
        return value


def places(path: Path) -> dict[str, Place]:
    """Find every tensor of a file by name, without reading any. Raises `BrokenFile`.

    `safe_open` would parse the whole description for each tensor that is read alone, or keep the
    pages of all of them in memory.
    """
    with open_tensors(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return {
        name: Place(
            path,
            entry["dtype"],
            torch.Size(entry["shape"]),
            *(8 + length + offset for offset in entry["data_offsets"]),
        )
        for name, entry in entries.items()
    }


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a file by name, and its metadata.

    Raises:
        BrokenFile: it is damaged, or a tensor is of a type that no weights have.
    """
    with open_tensors(path) as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        for name, value in weights.items():
            if value.dtype not in FLOATS.values():
                raise BrokenFile(f"{path}: {name} is {not_floats(value.dtype)}")
        return weights, file.metadata() or {}


def not_floats(dtype: object) -> str:
    """Describe a type that weights may not have, and the remedy."""
    return f"{str(dtype).removeprefix('torch.')}: weights are {', '.join(FLOATS)}; save it as one"
