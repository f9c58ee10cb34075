"""Atomic writes, the cache folder, and optional packages."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import importlib.util
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from matryoshka_diffusion.config import ConfigError

_STALE_SECONDS = 3600.0
_DIGITS = 13  # a float holds 13 hexadecimal digits exactly


class BrokenFile(ValueError):
    """A file that is not what its name says; the message says what is wrong."""


FOREIGN_ERRORS = (
    *(ValueError, LookupError, RuntimeError, TypeError, AttributeError),
    *(ArithmeticError, AssertionError, ImportError, MemoryError),
)
"""Errors of other packages, besides OSError, for damaged or edited files of their formats."""


class MissingExtra(ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class UnreadableError(OSError):
    """The system cannot read a file: the disk, permissions or the network fail."""


def unreadable(path: Path | str, error: OSError) -> UnreadableError:
    """Make the error that names an unreadable file, whatever its content is for."""
    return UnreadableError(error.errno, f"cannot read {path}: {error.strerror}")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        BrokenFile: it is no JSON, or nested too deeply; names the path.
        OSError: it cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BrokenFile(f"{path}: no valid JSON ({error})") from error


# --- writing -----------------------------------------------------------------------------------


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], *, needed: int | None = None
) -> None:
    """Let `write` fill a file that appears at `path` complete or not at all.

    The bytes go to a temporary file in the same folder and reach the disk before the file takes
    its name; the folder reaches the disk last. After any interruption an older file at `path` is
    unchanged, and nothing is left beside it (except a hidden `.tmp` file after kill -9).

    Args:
        needed: size of the file in bytes if known, for the error.

    Raises:
        OSError: with the path, the reason and, on a full disk, the bytes needed and free.
        UnreadableError: `write` cannot read its own source.
    """
    with _temporary(path, needed) as temporary:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill, which takes the name `path` when it is complete.

    Raises:
        OSError: with the path, if a file or a filled folder has that name, or writing fails.
    """
    with _temporary(path, None) as temporary:
        temporary.mkdir()
        yield temporary
        if path.is_dir():
            path.rmdir()  # only if it is empty; not every system renames onto a folder
        temporary.rename(path)


@contextlib.contextmanager
def _temporary(path: Path, needed: int | None) -> Iterator[Path]:
    """Yield a hidden path beside `path` and remove what is left of it; errors name `path`."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync_folder(path.parent)
    except UnreadableError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            size = "" if needed is None else f"{needed:,} bytes needed, "
            reason = f"{reason} ({size}{shutil.disk_usage(path.parent).free:,} bytes free)"
        raise OSError(error.errno, f"cannot write {path}: {reason}") from error
    finally:  # mostly, it has taken its name
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system can.

    Windows cannot open folders, and some network and FUSE file systems cannot sync them.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)


def remove_stale(path: Path) -> None:
    """Remove a file unless a process wrote it within the last hour and may still need it."""
    with contextlib.suppress(OSError):  # another process may have removed it
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            path.unlink()


def refuse_full(out: Path) -> None:
    """Raise ConfigError unless `out` is absent or empty, so that nothing is overwritten."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: give another --out")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: give another --out")


# --- cache, packages, hashes -------------------------------------------------------------------


def cache_folder(*parts: str) -> Path:
    """Create the folder `parts` inside $MDM_CACHE (default ~/.cache/matryoshka-diffusion).

    Raises:
        OSError: it cannot be created.
    """
    root = os.environ.get("MDM_CACHE") or Path.home() / ".cache" / "matryoshka-diffusion"
    folder = Path(root).expanduser().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot create the cache folder {folder}: {error.strerror}; "
            "set MDM_CACHE to a folder that can be written",
        ) from error
    return folder


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional module.

    Raises:
        MissingExtra: it is not installed; names the package and the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]
        raise _missing(module, extra, purpose, "" if absent else f" ({error})") from error


def memory_bytes() -> int:
    """Memory of this machine in bytes; 64 GiB where the system does not say it (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**36


def package_folder(module: str, extra: str, purpose: str) -> Path:
    """Find the folder of an optional package without running its code. Raises `MissingExtra`."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(module, extra, purpose, "")
    return Path(spec.submodule_search_locations[0])


def _missing(module: str, extra: str, purpose: str, reason: str) -> MissingExtra:
    package = module.split(".")[0].replace("_", "-")
    remedy = f'pip install "matryoshka-diffusion[{extra}]"'
    return MissingExtra(f"{purpose} needs the package {package}{reason}: {remedy}")


def digest(text: str) -> str:
    """Hash text to 32 hexadecimal digits, for names of cached files."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def sealed(text: str) -> bytes:
    """Text behind its hash, for a file of a cache."""
    return f"{digest(text)}\n{text}".encode()


def unsealed(data: bytes) -> str:
    """Text that `sealed` wrote. Raises ValueError if any byte has changed."""
    seal, _, text = data.decode().partition("\n")
    if digest(text) != seal:
        raise ValueError("its hash is another one")
    return text


def fraction(text: str) -> float:
    """Hash text to a number in [0, 1)."""
    return int(digest(text)[:_DIGITS], 16) / 16**_DIGITS
