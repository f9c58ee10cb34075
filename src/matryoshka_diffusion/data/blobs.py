"""Files that are read by byte ranges, on this machine or, through fsspec, on another."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from matryoshka_diffusion.files import UnreadableError, require, unreadable

MAX_NAMES = 1_000_000
"""Of one pattern: more is a slip such as {0..99999999}."""

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_READ_AHEAD = 4 * 2**20


@runtime_checkable
class Readable(Protocol):
    """What is needed of an open file; those of fsspec have no other common type."""

    def seek(self, offset: int, /) -> int: ...
    def read(self, size: int = -1, /) -> bytes: ...


class Blob(NamedTuple):
    """A file and its state: the stamp (time or etag) changes when it is written again."""

    path: str
    size: int
    stamp: str


def is_remote(path: str) -> bool:
    """Whether it is an address such as s3://bucket/a.tar."""
    return "://" in path


def expand(pattern: str, suffix: str) -> list[str]:
    """The paths that a pattern stands for, or those of a folder that end in `suffix`, in order.

    `{00..12}` counts, with the zeros of its first number, and may occur several times; `*`, `?`
    and `[...]` stand for what exists.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a range runs backwards or gives too many names.
        MissingExtra: an address, and fsspec is not installed.
    """
    found = [path for name in _counted(pattern) for path in _existing(name, suffix)]
    if not found:
        raise FileNotFoundError(f"{pattern}: no {suffix} file is there")
    return found


def _counted(pattern: str) -> list[str]:
    names = [pattern]
    while (match := _RANGE.search(names[0])) is not None:
        first, last = int(match[1]), int(match[2])
        count = last - first + 1
        if count < 1 or count * len(names) > MAX_NAMES:
            raise ValueError(f"{pattern}: {match[0]} is no range, or gives too many names")
        numbers = [f"{n:0{len(match[1])}}" for n in range(first, last + 1)]
        names = [name.replace(match[0], n, 1) for name in names for n in numbers]
    return names


def _existing(path: str, suffix: str) -> list[str]:
    if is_remote(path):
        if not glob.has_magic(path):
            return [path]
        with _reported(path):
            system, inside = _system(path)
            return [system.unstrip_protocol(name) for name in sorted(system.glob(inside))]
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), f"*{suffix}")))
    return sorted(glob.glob(path)) if glob.has_magic(path) else [path]


def short_names(paths: Sequence[str]) -> list[str]:
    """File names without their folders, or whole paths if those would not tell files apart."""
    names = [os.path.basename(path) for path in paths]
    return names if len(set(names)) == len(paths) else list(paths)


def stat(path: str) -> Blob:
    """Size and stamp of a file.

    Raises:
        OSError: it is not there or cannot be reached.
    """
    if not is_remote(path):
        try:
            found = Path(path).stat()
        except OSError as error:
            raise OSError(error.errno, f"{path}: {error.strerror}") from error
        return Blob(path, found.st_size, str(found.st_mtime_ns))
    with _reported(path):
        system, inside = _system(path)
        about = system.info(inside)
    if about.get("size") is None:
        raise OSError(f"{path}: its server does not tell its size, so parts cannot be read")
    stamps = (about.get(key) for key in ("ETag", "etag", "LastModified", "mtime", "created"))
    return Blob(path, about["size"], str(next((s for s in stamps if s is not None), "")))


@contextlib.contextmanager
def opened(path: str) -> Iterator[Readable]:
    """The file for reading from front to back with seeks; far ones are read some MB ahead.

    Raises:
        OSError: it cannot be read.
    """
    if not is_remote(path):
        with open(path, "rb") as file:
            yield file
        return
    with _reported(path):
        system, inside = _system(path)
        with system.open(inside, "rb", block_size=_READ_AHEAD, cache_type="readahead") as file:
            yield file


def read_range(path: str, start: int, size: int) -> bytes:
    """`size` bytes from `start` on; fewer where the file ends. Safe to call from many threads.

    Raises:
        UnreadableError: the file cannot be read.
    """
    if not is_remote(path):
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                return _all_of(file, size)
        except OSError as error:
            raise unreadable(path, error) from error
    with _reported(path):
        system, inside = _system(path)
        return system.cat_file(inside, start=start, end=start + size)


def _all_of(file: Any, size: int) -> bytes:
    """One read may bring less than was asked for."""
    parts = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _system(path: str) -> tuple[Any, str]:
    fsspec = require("fsspec", "remote", f"reading {path}")
    return fsspec.core.url_to_fs(path)


@contextlib.contextmanager
def _reported(path: str) -> Iterator[None]:
    """What goes wrong far away as an OSError with the address; each service has its own errors."""
    try:
        yield
    except (ImportError, ValueError):
        raise  # a package that the service needs, or an address of no known service
    except Exception as error:
        reason = "not found" if isinstance(error, FileNotFoundError) else str(error)
        raise UnreadableError(f"{path}: {reason or type(error).__name__}") from error
