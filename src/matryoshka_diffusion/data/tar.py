"""Members of a tar file from its headers alone: where their bytes lie, or why not to use them.

An own reader, because `tarfile` ends at the first damaged header, reads name headers of any length
into memory, and takes the times in a GNU header for a part of the name. Nothing is extracted, so a
member cannot reach outside. One that could (absolute names, `..`, links, devices) is refused all
the same: a data set has no use for it. A damaged header costs the members up to the next good one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

BLOCK = 512
MAX_EXTENSION = 65_536  # bytes of a GNU long name or a PAX header, which hold a path and numbers

_SCANNED = 2**20  # bytes at a time, a whole number of blocks
_MAGIC, _MAGIC_AT = b"ustar", 257
_GNU_NAME, _PAX, _FOLDER = b"L", b"x", b"5"
_EXTENSIONS = frozenset({_GNU_NAME, _PAX, b"K", b"g"})  # K: target of a link; g: for the whole file
_REFUSED = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class Member(NamedTuple):
    """One file inside."""

    name: str  # empty where damage has taken it
    start: int  # offset of its bytes, or of its header if there is a flaw
    size: int  # in bytes
    flaw: str = ""  # the reason why it cannot be used


def members(file: Any, size: int) -> Iterator[Member]:
    """Regular files of a tar file of `size` bytes, in the order of their headers.

    Reads headers only, and seeks over what lies between them. Folders are ignored.
    """
    offset, flaw = 0, ""
    extension: dict[str, Any] = {}  # facts about the next member from headers of its own
    while offset + BLOCK <= size:
        block = read_at(file, offset, BLOCK)
        if not any(block):
            return
        start, at = offset + BLOCK, offset
        name, length, kind = _parse(block) or ("", 0, b"")
        if kind and kind not in _EXTENSIONS:
            name, length = extension.get("name", name), extension.get("size", length)
        if kind in _REFUSED or kind == _FOLDER:  # a hard link may state its target's size
            length = 0
        end = start + -(-length // BLOCK) * BLOCK
        flaw = _flaw(name, kind, length, size - start, extension.get("sparse", False))
        if flaw:
            offset = end if kind and end <= size else _next_header(file, start, size)
            extension = {}
            yield Member(name, at, length, flaw)
            continue
        offset = end
        if kind == _GNU_NAME:
            extension["name"] = _text(read_at(file, start, length))
        elif kind == _PAX:
            extension |= _pax(read_at(file, start, length))
        elif kind not in _EXTENSIONS:
            extension = {}
            if kind != _FOLDER and not name.endswith("/"):  # the latter in the oldest tar files
                yield Member(name.removeprefix("./"), start, length)
    if not flaw:  # else that flaw has led to the end
        yield Member("", min(offset, size), 0, "cut off: the end marker of a tar file is missing")


def _flaw(name: str, kind: bytes, length: int, left: int, sparse: bool) -> str:
    """Reason why a member cannot be used, with `left` bytes of the file after its header."""
    if not kind:
        return "damaged: no tar header where one should be"
    if kind in _EXTENSIONS and length > MAX_EXTENSION:
        return f"its name or PAX header claims {length:,} bytes"
    if length > left:
        return f"cut off: it claims {length:,} bytes and {max(left, 0):,} are left"
    if kind in _EXTENSIONS or kind == _FOLDER:
        return ""
    if kind in _REFUSED or kind == b"S" or sparse:
        return f"it is {_REFUSED.get(kind, 'a sparse file')}, not a plain file"
    if kind not in (b"0", b"\0", b"7"):
        return f"it is of the unknown tar type {kind!r}"
    parts = name.replace("\\", "/").split("/")
    outside = parts[0] == "" or parts[0].endswith(":") or ".." in parts
    return "its name leads outside of the archive" if outside else ""


def read_at(file: Any, start: int, length: int) -> bytes:
    """Read `length` bytes from `start` on; fewer where the file ends."""
    file.seek(start)
    return file.read(length)


def _parse(block: bytes) -> tuple[str, int, bytes] | None:
    """Name, size and type in a header; None unless its checksum and its size are in order."""
    checksum, size = _number(block[148:156]), _number(block[124:136])
    actual = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if len(block) < BLOCK or size is None or checksum != actual:
        return None
    name = _text(block[:100])
    is_posix = block[_MAGIC_AT : _MAGIC_AT + 6] == _MAGIC + b"\0"  # GNU has times there instead
    prefix = _text(block[345:500]) if is_posix else ""
    return f"{prefix}/{name}" if prefix else name, size, block[156:157]


def _number(field: bytes) -> int | None:
    """Octal digits, or base 256 where the first bit is set; None for anything else."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    return int(digits, 8) if set(digits) <= set(b"01234567") else None


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _pax(data: bytes) -> dict[str, Any]:
    """Facts in `length key=value` records; those after a damaged one are ignored."""
    facts: dict[str, Any] = {}
    start = 0
    while start < len(data):
        length, _, _ = data[start : start + 20].partition(b" ")
        end = start + int(length) if length.isdigit() else start
        key, separator, value = data[start + len(length) + 1 : end - 1].partition(b"=")
        if end <= start + len(length) or not separator:
            break
        if key == b"path":
            facts["name"] = _text(value)
        elif key == b"size" and value.isdigit() and len(value) < 20:
            facts["size"] = int(value)
        elif key.startswith(b"GNU.sparse."):
            facts["sparse"] = True
        start = end
    return facts


def _next_header(file: Any, offset: int, size: int) -> int:
    """First block from `offset` on that is a header, or the end of the file."""
    while offset + BLOCK <= size:
        chunk = read_at(file, offset, _SCANNED)
        at = chunk.find(_MAGIC)
        while at >= 0:
            block = at - _MAGIC_AT
            if block >= 0 and block % BLOCK == 0 and _parse(chunk[block : block + BLOCK]):
                return offset + block
            at = chunk.find(_MAGIC, at + 1)
        offset += _SCANNED
    return size
