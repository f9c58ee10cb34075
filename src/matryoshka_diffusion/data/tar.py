"""The members of a tar file, from its headers alone: where their bytes lie, or why not to use them.

Nothing is ever extracted, so a member cannot reach outside. What would if it were (absolute names,
`..`, links, devices) is refused all the same: a data set has no use for it. A damaged header costs
the members up to the next good one, not the rest of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from matryoshka_diffusion.data.blobs import Readable

BLOCK = 512
MAX_EXTENSION = 65_536
"""Bytes of a GNU long name or a PAX header; honest ones hold a path and some numbers."""

_SCANNED = 2**20  # bytes at a time, a whole number of blocks
_MAGIC, _MAGIC_AT = b"ustar", 257
_REGULAR, _FOLDER = frozenset({b"0", b"\0", b"7"}), b"5"
_GNU_NAME, _PAX = b"L", b"x"
_EXTENSIONS = frozenset({_GNU_NAME, _PAX, b"K", b"g"})  # K: target of a link; g: for the whole file
_WITHOUT_BYTES = frozenset({b"1", b"2", b"3", b"4", b"5", b"6"})
_REFUSED = {
    b"1": "a link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}


class Member(NamedTuple):
    """One file inside; `name` is empty where damage has taken it.

    Attributes:
        start: offset of its bytes, or of its header if there is a flaw.
        size: in bytes.
        flaw: why it cannot be used; empty for a good one.
    """

    name: str
    start: int
    size: int
    flaw: str = ""


class _Header(NamedTuple):
    name: str
    size: int
    kind: bytes


class _Extension(NamedTuple):
    """What a GNU long name or a PAX header says of the member that follows."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False


def members(file: Readable, size: int) -> Iterator[Member]:
    """The regular files in the order of their headers; `size` is that of the whole tar file.

    Folders are passed over. Reads headers only, and seeks over what lies between them.
    """
    member, offset, extension = None, 0, _Extension()
    while offset + BLOCK <= size:
        block = _read(file, offset, BLOCK)
        if not any(block):
            return
        member, offset, extension = _step(file, offset, size, block, extension)
        if member is not None:
            yield member
    if member is None or not member.flaw:  # else the end is where that flaw has led
        yield Member("", min(offset, size), 0, "cut off: the end marker of a tar file is missing")


def _step(
    file: Readable, offset: int, size: int, block: bytes, extension: _Extension
) -> tuple[Member | None, int, _Extension]:
    """What the header at `offset` leads to: a member, the next offset, and what is known of it."""
    start, header = offset + BLOCK, _parse(block)
    if header is None:
        damaged = Member("", offset, 0, "damaged: no tar header where one should be")
        return damaged, _next_header(file, start, size), _Extension()
    name, length = header.name, header.size
    if header.kind not in _EXTENSIONS:
        name = name if extension.name is None else extension.name
        length = length if extension.size is None else extension.size
    if header.kind in _WITHOUT_BYTES:  # such as a hard link, which may state its target's size
        length = 0
    end = start + -(-length // BLOCK) * BLOCK
    if flaw := _flaw(name, header.kind, length, size - start, extension.sparse):
        following = end if end <= size else _next_header(file, start, size)
        return Member(name, offset, length, flaw), following, _Extension()
    if header.kind in (_GNU_NAME, _PAX):
        return None, end, _extended(extension, header.kind, _read(file, start, length))
    if header.kind in _EXTENSIONS:
        return None, end, extension
    if header.kind == _FOLDER or name.endswith("/"):  # the latter in the oldest tar files
        return None, end, _Extension()
    return Member(name.removeprefix("./"), start, length), end, _Extension()


def _flaw(name: str, kind: bytes, length: int, left: int, sparse: bool) -> str:
    """Why the member cannot be used, with `left` bytes of the file after its header."""
    if kind in _EXTENSIONS and length > MAX_EXTENSION:
        return f"its name or PAX header claims {length:,} bytes"
    if length > left:
        return f"cut off: it claims {length:,} bytes and {max(left, 0):,} are left"
    if kind in _EXTENSIONS or kind == _FOLDER:
        return ""
    if kind in _REFUSED:
        return f"it is {_REFUSED[kind]}, not a file"
    if sparse:
        return f"it is {_REFUSED[b'S']}, not a plain one"
    if kind not in _REGULAR:
        return f"it is of the unknown tar type {kind!r}"
    return "its name leads outside of the archive" if _leads_outside(name) else ""


def _leads_outside(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return parts[0] == "" or parts[0].endswith(":") or ".." in parts


# --- headers ---------------------------------------------------------------------------------


def _read(file: Readable, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _parse(block: bytes) -> _Header | None:
    """The header in a block, or None unless its checksum and its size are in order."""
    checksum, size = _number(block[148:156]), _number(block[124:136])
    actual = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if len(block) < BLOCK or size is None or checksum != actual:
        return None
    name = _text(block[:100])
    is_posix = block[_MAGIC_AT : _MAGIC_AT + 6] == _MAGIC + b"\0"  # GNU has times there instead
    prefix = _text(block[345:500]) if is_posix else ""
    return _Header(f"{prefix}/{name}" if prefix else name, size, block[156:157])


def _number(field: bytes) -> int | None:
    """Octal digits, or base 256 where the first bit is set; None for anything else."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    return int(digits, 8) if set(digits) <= set(b"01234567") else None


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _extended(known: _Extension, kind: bytes, data: bytes) -> _Extension:
    if kind == _GNU_NAME:
        return known._replace(name=_text(data))
    records = _pax_records(data)
    size = records.get(b"size", b"")
    return _Extension(
        name=_text(records[b"path"]) if b"path" in records else known.name,
        size=int(size) if size.isdigit() and len(size) < 20 else known.size,
        sparse=any(key.startswith(b"GNU.sparse.") for key in records),
    )


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """`length key=value` lines; what comes after a damaged one is left out."""
    records, start = {}, 0
    while start < len(data):
        length, _, _ = data[start : start + 20].partition(b" ")
        end = start + int(length) if length.isdigit() else start
        key, separator, value = data[start + len(length) + 1 : end - 1].partition(b"=")
        if end <= start + len(length) or not separator:
            break
        records[key] = value
        start = end
    return records


def _next_header(file: Readable, offset: int, size: int) -> int:
    """The first block from `offset` on that is a header, or the end of the file."""
    while offset + BLOCK <= size:
        chunk = _read(file, offset, _SCANNED)
        at = chunk.find(_MAGIC)
        while at >= 0:
            block = at - _MAGIC_AT
            if block >= 0 and block % BLOCK == 0 and _parse(chunk[block : block + BLOCK]):
                return offset + block
            at = chunk.find(_MAGIC, at + 1)
        offset += _SCANNED
    return size
