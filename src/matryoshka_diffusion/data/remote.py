"""Parts of files, here or on a server, through fsspec.

A fault of a server, or of the way to it, says nothing about the data. So a read is tried again
for a minute, two if the server is silent, and is then an error of the system. fsspec itself
repeats nothing over HTTP, and takes a whole file for the wanted part.
"""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from matryoshka_diffusion.files import MissingExtra, UnreadableError, unreadable

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds before each new attempt; together they outlast a server that starts anew."""

SILENCE_SECONDS = 60.0
"""A server that sends nothing for so long has failed."""

LAST_ATTEMPT_SECONDS = 75.0
"""No attempt begins later after the first one, so a silent server costs about two minutes."""

_LONGEST_WAIT = 60.0  # of those that a server may ask for
_READ_AHEAD = 4 * 2**20
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)

Result = TypeVar("Result")


class _WrongPart(Exception):
    """An answer that is not the part of the file that was asked for."""


def read_range(path: str, start: int, length: int) -> bytes:
    """Read `length` bytes of a file from `start` on. A local file that ends earlier gives fewer.

    Raises UnreadableError with the path once a server has failed for a minute or two.
    """

    def read(system: Any, inside: str) -> bytes:
        data = system.cat_file(inside, start=start, end=start + length)
        if len(data) != length and not isinstance(system, LocalFileSystem):
            ranges = "" if len(data) < length else f": {_NO_RANGES}"
            raise _WrongPart(f"the answer has {len(data):,} instead of {length:,} bytes{ranges}")
        return data

    return attempt(path, read)


def state_of(path: str) -> str:
    """Size and time (or etag) of a file, which change when it is written again."""
    info = attempt(path, lambda system, inside: system.info(inside))
    if info.get("size") is None:
        raise UnreadableError(f"{path}: its server does not tell its size, so parts cannot be read")
    if urlsplit(path).scheme in ("http", "https") and info["size"] > 1:
        _check_ranges(path, info["size"])
    names = ("ETag", "etag", "LastModified", "Last-Modified", "mtime", "created")
    stamps = (info.get(name) for name in names)
    return f"{info['size']} {next((stamp for stamp in stamps if stamp is not None), '')}"


@contextmanager
def opened(path: str, size: int) -> Iterator[Any]:
    """Open a file of `size` bytes for reading from front to back with seeks."""

    def begin(system: Any, inside: str) -> io.BufferedReader:
        if isinstance(system, LocalFileSystem):
            return open(inside, "rb")
        return io.BufferedReader(_Parts(path, size), _READ_AHEAD)

    try:
        with attempt(path, begin) as file:
            yield file
    except OSError as error:
        if isinstance(error, UnreadableError) or error.errno is None:
            raise
        raise unreadable(path, error) from error


def attempt(path: str, call: Callable[[Any, str], Result]) -> Result:
    """Result of `call(file system, path there)`, called anew while a server or the way to it fails.

    Raises:
        MissingExtra: fsspec lacks the package for this kind of address.
        UnreadableError: the failure lasts, or is final. It names the path.
        ValueError: the address is of an unknown kind.
    """
    end = time.monotonic() + LAST_ATTEMPT_SECONDS
    for wait in (*WAITS, None):
        system = None
        try:
            system, inside = fsspec.core.url_to_fs(path, **_options(path))
            return call(system, inside)
        except ImportError as error:
            remedy = 'pip install "matryoshka-diffusion[remote]", or the package it names'
            raise MissingExtra(f"reading {path}: {error}: {remedy}") from error
        except ValueError:
            raise
        except Exception as error:  # noqa: BLE001  each service has errors of its own
            # fsspec calls every failure over HTTP "not found", and keeps what it was as its cause.
            cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
            reason = cause if isinstance(cause, Exception) else error
            here = system is None or isinstance(system, LocalFileSystem)
            left = end - time.monotonic()
            if here or wait is None or left <= 0 or not _may_pass(reason):
                _fail(path, reason)
            _wait(path, wait, left, reason)
    raise AssertionError("unreachable")


def _check_ranges(path: str, size: int) -> None:
    """Raise UnreadableError unless the server gives parts of files; each is asked once."""

    def read(system: Any, inside: str) -> bool:
        with system.open(inside, "rb", block_size=1, cache_type="none", size=size) as file:
            file.seek(1)
            try:
                return len(file.read(1)) == 1
            except ValueError:  # its answer begins at the file's first byte
                return False

    server = urlsplit(path).netloc
    if server not in _WITH_RANGES:
        if not attempt(path, read):
            raise UnreadableError(f"cannot read {path} in parts: {_NO_RANGES}")
        _WITH_RANGES.add(server)


_WITH_RANGES: set[str] = set()
_NO_RANGES = (
    "the server gives no byte ranges: use one that does (nginx, Apache, any object store), or copy "
    "the files to a disk"
)


class _Parts(io.RawIOBase):
    """A file on a server, read in parts."""

    def __init__(self, path: str, size: int) -> None:
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        length = max(0, min(len(buffer), self._size - self._at))
        if length:
            buffer[:length] = read_range(self._path, self._at, length)
        self._at += length
        return length


def _options(path: str) -> dict[str, Any]:
    """Options of the file system: over HTTP a limit on silence, not on a whole transfer."""
    if not path.startswith(("http://", "https://")):
        return {}
    import aiohttp

    limit = aiohttp.ClientTimeout(None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
    return {"client_kwargs": {"timeout": limit}}


def _status(error: Exception) -> int | None:
    """HTTP status in an error of aiohttp, gcsfs or adlfs."""
    values = (getattr(error, name, None) for name in ("status", "code", "status_code"))
    return next((value for value in values if isinstance(value, int)), None)


def _may_pass(error: Exception) -> bool:
    """Test if the next attempt may succeed: it may, unless a server has given a definite answer."""
    status = _status(error)
    if status is not None:
        return status >= 500 or status in (408, 425, 429)
    return not isinstance(error, _FINAL)


def _wait(path: str, seconds: float, most: float, error: Exception) -> None:
    """Wait as planned or as the server asks for, `most` at most; say so from the second time on."""
    delay = (getattr(error, "headers", None) or {}).get("Retry-After", "")
    if str(delay).isdigit():
        seconds = max(seconds, min(float(delay), _LONGEST_WAIT))
    seconds = min(seconds, most)
    if seconds > WAITS[0]:
        warnings.warn(
            f"{path}: {_reason(error)}; the next attempt is in {seconds:.3g} s", stacklevel=4
        )
    time.sleep(seconds)


def _reason(error: Exception) -> str:
    if (status := _status(error)) is not None:
        return f"HTTP {status} {getattr(error, 'message', '')}".rstrip()
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _fail(path: str, error: Exception) -> NoReturn:
    if isinstance(error, UnreadableError):
        raise error
    if isinstance(error, FileNotFoundError) or _status(error) in (404, 410):
        raise UnreadableError(f"{path}: not found") from error
    if isinstance(error, OSError) and error.strerror:
        raise unreadable(path, error) from error
    raise UnreadableError(f"cannot read {path}: {_reason(error)}") from error
