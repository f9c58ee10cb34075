"""The files that checkpoints come in, read a tensor at a time: PyTorch's `.pth` and safetensors.

Both are a `Weights`: shapes are known at once, numbers are read when they are asked for, so that
a large checkpoint is converted without ever being in memory as a whole.
"""

from __future__ import annotations

import contextlib
import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from matryoshka_diffusion.models.released.pickled import (
    BrokenFile,
    Record,
    TensorRecord,
    plain,
    read_pickle,
    short,
    shown,
    tensors,
)

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_PIECE = 2**24
_HEADER_LIMIT = 4 * 2**20
_MOST_ENTRIES = 20_000
# Whatever the libraries make of damaged bytes.
_DAMAGE = (
    *(zipfile.BadZipFile, SafetensorError, struct.error, EOFError),
    *(ValueError, RuntimeError, OverflowError, NotImplementedError, MemoryError, KeyError),
)


@runtime_checkable
class Weights(Protocol):
    """Tensors by name whose shapes are known before their numbers are read.

    `settings` is the run configuration that lies beside them, as plain values; None without one.
    `described` is whatever lies beside them, for people.
    """

    @property
    def settings(self) -> Mapping[str, Any] | None: ...
    def __iter__(self) -> Iterator[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def read(self, name: str) -> Tensor: ...
    def described(self) -> Mapping[str, Any]: ...


class _Bare:
    """Weights with nothing beside them."""

    settings = None

    def described(self) -> Mapping[str, Any]:
        return {}


class Loaded(_Bare):
    """Tensors that are in memory already; reading one copies it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return str(self._tensors[name].dtype)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach().clone()


def open_weights(weights: str | Path | Mapping[str, Tensor]) -> Weights:
    """A `.pth`, a `.safetensors` or tensors in memory as `Weights`.

    Raises:
        FileNotFoundError: there is no such file.
        BrokenFile: it is damaged or something else.
    """
    if isinstance(weights, Mapping):
        return Loaded(weights)
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with clear_errors(path):
        return SafetensorsFile(path) if path.suffix == ".safetensors" else PthFile(path)


@contextlib.contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Whatever is wrong with the bytes of a file becomes one `BrokenFile` that names it."""
    try:
        yield
    except BrokenFile as error:
        raise BrokenFile(f"{path}: {error}") from error
    except _DAMAGE as error:
        raise BrokenFile(f"{path}: it is damaged ({short(str(error))})") from error


class PthFile:
    """A checkpoint of `torch.save`: a zip of one pickle and the storages that it names.

    The pickle is read as data (see `pickled.py`); the sum of every storage is checked as it is
    read.

    Attributes:
        tree: the whole pickle with its tensors as `TensorRecord`s.
        settings: the run configuration that the released trainer saves as `args`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = _open_zip(path)
        self._root = _root(self._zip)
        self.tree = read_pickle(self._bytes("data.pkl"))
        if self._has("byteorder") and self._bytes("byteorder") != b"little":
            raise BrokenFile("it was written by a big-endian machine, which is not supported")
        if not isinstance(self.tree, dict):
            raise BrokenFile("it holds no state_dict: a mapping from names to tensors")
        self._state = self.tree.get("state_dict", self.tree)
        self._tensors = dict(tensors(self._state))
        for name, record in self._tensors.items():
            self._check(name, record)
        self._check_total()
        self.settings = _settings(self.tree)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        return str(_dtype(self._tensors[name]))

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            BrokenFile: its bytes are not those that were written.
        """
        record = self._tensors[name]
        dtype = _dtype(record)
        with clear_errors(self.path):
            data = bytearray(self._storage(record).file_size)
            with self._zip.open(self._storage(record)) as file:
                _fill(file, data)
        if not data:
            return torch.empty(record.shape, dtype=dtype)
        flat = torch.frombuffer(data, dtype=dtype, count=len(data) // dtype.itemsize)
        return flat.as_strided(record.shape, record.stride, record.offset).contiguous()

    def described(self) -> Mapping[str, Any]:
        """Everything in the file but its tensors, for people."""
        others = {} if self._state is self.tree else self.tree
        return shown({key: part for key, part in others.items() if part is not self._state})

    def _check_total(self) -> None:
        """Refuse tensors that share storages: a small file could stand for any amount."""
        total = sum(math.prod(r.shape) * _dtype(r).itemsize for r in self._tensors.values())
        if total > self.path.stat().st_size:
            raise BrokenFile(f"its tensors have {total:,} bytes, more than the file")

    def _check(self, name: str, record: TensorRecord) -> None:
        """Refuse a tensor that reaches beyond its storage, or a storage beyond its file."""
        extents = [
            (size - 1) * step for size, step in zip(record.shape, record.stride, strict=True)
        ]
        numel = math.prod(record.shape)
        last = record.offset + sum(extents) + 1 if numel else record.offset
        held = self._storage(record).file_size // _dtype(record).itemsize
        if max(last, numel) > held:
            raise BrokenFile(f"{short(name)} needs more numbers than the file holds")

    def _storage(self, record: TensorRecord) -> zipfile.ZipInfo:
        key = f"{self._root}/data/{record.storage.key}"
        try:
            return _stored(self._zip.getinfo(key), self.path)
        except KeyError:
            raise BrokenFile(f"the storage {short(key)} is missing") from None

    def _has(self, name: str) -> bool:
        return f"{self._root}/{name}" in self._zip.NameToInfo

    def _bytes(self, name: str) -> bytes:
        info = _stored(self._zip.getinfo(f"{self._root}/{name}"), self.path)
        if info.file_size > _HEADER_LIMIT:
            raise BrokenFile(f"{name} has {info.file_size:,} bytes, which is too large")
        return self._zip.read(info)


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except _DAMAGE as error:
        raise BrokenFile(
            "it is no checkpoint of torch.save, or the download was cut short; the released ones "
            "are zip files"
        ) from error
    if len(archive.namelist()) > _MOST_ENTRIES:
        raise BrokenFile(f"it has more than {_MOST_ENTRIES:,} entries")
    return archive


def _root(archive: zipfile.ZipFile) -> str:
    found = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(found) != 1:
        raise BrokenFile(
            f"it is a zip file, but no checkpoint of torch.save ({len(found)} data.pkl in it)"
        )
    return found[0].removesuffix("/data.pkl")


def _stored(info: zipfile.ZipInfo, path: Path) -> zipfile.ZipInfo:
    """torch.save stores, it does not pack: what is packed could unpack to anything."""
    packed = info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1
    if packed or info.file_size > path.stat().st_size:
        raise BrokenFile(f"{info.filename} is packed or larger than the file it lies in")
    return info


def _fill(file: Any, data: bytearray) -> None:
    view = memoryview(data)
    while len(view):
        piece = file.read(min(_PIECE, len(view)))
        if not piece:
            raise EOFError("the file ends too early")
        view[: len(piece)] = piece
        view = view[len(piece) :]
    file.read(1)  # reading past the end makes zipfile compare the sum


def _dtype(record: TensorRecord) -> torch.dtype:
    kind = record.storage.type.removeprefix("torch.")
    if kind not in _DTYPES:
        raise BrokenFile(f"it has a tensor of the unknown kind {kind}")
    return _DTYPES[kind]


def _settings(tree: Any) -> Mapping[str, Any] | None:
    args = tree.get("args") if isinstance(tree, dict) else None
    settings = plain(args) if isinstance(args, Record | dict) else None
    return settings if isinstance(settings, dict) else None


class SafetensorsFile(_Bare):
    """A `.safetensors` file. It holds no run configuration."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            (header,) = struct.unpack("<Q", file.read(8))
        if header > _HEADER_LIMIT:
            raise BrokenFile(f"it is no safetensors file, or its header of {header:,} is too large")
        self._file = safe_open(path, framework="pt")
        names = self._file.keys()
        if not 0 < len(names) <= _MOST_ENTRIES:
            raise BrokenFile(f"it holds {len(names):,} tensors")
        self._slices = {name: self._file.get_slice(name) for name in names}

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> str:
        kind = self._slices[name].get_dtype()
        return "torch.float32" if kind == "F32" else kind

    def read(self, name: str) -> Tensor:
        return self._file.get_tensor(name)
