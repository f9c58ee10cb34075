"""Files that are whole or absent, the cache folder, and packages that are optional."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import importlib.util
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from matryoshka_diffusion.config import ConfigError

_STALE_SECONDS = 3600.0
_DIGITS = 13  # hexadecimal ones that a float holds exactly


class MissingExtra(ImportError):
    """An optional package is not there; the message says which extra to install."""


class UnreadableError(OSError):
    """A file cannot be read because of the system: its disk, its permissions, its network."""


def unreadable(path: Path | str, error: OSError) -> UnreadableError:
    """The error that names the file, whatever was to be done with what is in it."""
    return UnreadableError(error.errno, f"cannot read {path}: {error.strerror}")


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], *, needed: int | None = None
) -> None:
    """Let `write` fill a file that appears at `path` complete or not at all.

    The bytes go to a temporary file in the same folder, reach the disk, and only then take the
    name; the folder reaches the disk last. Whatever interrupts this, an older file at `path`
    stays as it was and nothing is left beside it (except after kill -9: a hidden `.tmp` file).

    Args:
        needed: the size of the file in bytes where the caller knows it, for the error.

    Raises:
        OSError: with the path, the reason and, on a full disk, the bytes needed and free.
        UnreadableError: of `write`, which reads something else.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except UnreadableError:
        raise
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write {path}: {_reason(error, path, needed)}"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # mostly: it has its name by now
            temporary.unlink()


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to be filled, which takes the name `path` when it is complete; else it is removed.

    Raises:
        OSError: with the path, if there is something already (an empty folder is replaced), or if
            it cannot be written.
    """
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        if path.is_dir():
            path.rmdir()  # only if it is empty; not every system renames onto a folder
        temporary.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {_reason(error, path, None)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # mostly: it has its name by now


def remove_stale(path: Path) -> None:
    """Remove a file unless a process wrote it within the last hour, which may still want it."""
    with contextlib.suppress(OSError):  # another process may be faster
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            path.unlink()


def _reason(error: OSError, path: Path, needed: int | None) -> str:
    reason = error.strerror or str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return reason
    size = "" if needed is None else f"{needed:,} bytes needed, "
    return f"{reason} ({size}{shutil.disk_usage(path.parent).free:,} bytes free)"


def sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows cannot open folders and needs no such step."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_folder(*parts: str) -> Path:
    """The folder `parts` inside $MDM_CACHE (default ~/.cache/matryoshka-diffusion), created.

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


def package_folder(module: str, extra: str, purpose: str) -> Path:
    """Where an optional package lies, without running its code. Raises `MissingExtra`."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(module, extra, purpose, "")
    return Path(spec.submodule_search_locations[0])


def _missing(module: str, extra: str, purpose: str, reason: str) -> MissingExtra:
    package = module.split(".")[0].replace("_", "-")
    remedy = f'pip install "matryoshka-diffusion[{extra}]"'
    return MissingExtra(f"{purpose} needs the package {package}{reason}: {remedy}")


def digest(text: str) -> str:
    """32 hexadecimal digits that stand for `text` in the names of cached files."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def fraction(text: str) -> float:
    """A number in [0, 1) that belongs to `text`."""
    return int(digest(text)[:_DIGITS], 16) / 16**_DIGITS


def refuse_full(out: Path) -> None:
    """Raise ConfigError unless `out` is absent or empty: nothing of the user's is overwritten."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: give another --out")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: give another --out")
