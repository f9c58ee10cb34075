"""Read pickles as plain data: no class or function that a file names is imported or called.

This is the standard library's unpickler in pure Python. Its faster twin in C cannot be used: it
allocates as many memo entries as a file asks for (five bytes ask for 32 GiB), and it hashes every
key of a mapping (300 bytes of nested tuples take for ever).
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from matryoshka_diffusion.files import BrokenFile

LARGEST_PICKLE = 4 * 2**20
"""Bytes. The released checkpoints, with all their state, have less than one million."""
MOST_STEPS = 400_000
"""Instructions of a pickle, which bound its memory and time."""
LONGEST_NAME = 1_000
LARGEST_COUNT = 2**48
HIGHEST_RANK = 8
MOST_SHOWN = 100_000
"""Values and letters of what is converted for people or for a configuration."""


_NUMBERS = {"f4": "<f", "f8": "<d", "i4": "<i", "i8": "<q"}
"""Formats of numbers, by the names of numpy's types."""


class Symbol(NamedTuple):
    """The name of a class or function, which is never looked up."""

    name: str


@dataclass(eq=False, repr=False, slots=True)
class Record:
    """An object that a pickle asks for, as data; elements that are added to it are not kept.

    Attributes:
        name: of its class or of the function that returns it, such as `argparse.Namespace`.
        args: arguments of the call.
        state: attributes that were set afterwards: a mapping, or a tuple of mappings.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None

    def extend(self, *_: Any) -> None:
        """Take elements of a list, set or mapping."""

    append = add = __setitem__ = extend


class Storage(NamedTuple):
    """Numbers of one or more tensors, in a file of the archive named `key`."""

    type: str
    key: str
    numel: int


class TensorRecord(NamedTuple):
    """A tensor whose numbers are not read: a view of a storage, counted in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Table(dict[Any, Any]):
    """A mapping whose keys hash quickly: hashing nested tuples or chosen integers takes for ever.

    Any other key is replaced by its type in words.
    """

    def __setitem__(self, key: Any, value: Any) -> None:
        small = isinstance(key, int) and abs(key) < LARGEST_COUNT
        plain = small or isinstance(key, str | None)
        super().__setitem__(key if plain else f"<{type(key).__name__}>", value)


class _Reader(pickle._Unpickler):
    """An unpickler whose every class is a `Symbol` and every object a `Record`."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    steps = 0

    def find_class(self, module: str, name: str) -> Any:
        return Symbol(f"{_name(module)}.{_name(name)}")

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage, key, _, numel = pid
        if kind != "storage" or not isinstance(storage, Symbol):
            raise BrokenFile("its pickle refers to something that is no storage of a tensor")
        return Storage(storage.name, _name(key), _count(numel))

    def load_call(self) -> None:
        args, symbol = self.stack.pop(), self.stack.pop()
        if not isinstance(symbol, Symbol) or type(args) is not tuple:
            raise BrokenFile("its pickle is damaged (it calls what is no function)")
        self.append(_made(symbol.name, args))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):  # of others, such as state_dict's _metadata, nothing is kept
            target.state = state


def _counted(load: Callable[[Any], None]) -> Callable[[Any], None]:
    def step(self: Any) -> None:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise BrokenFile(f"its pickle takes more than {MOST_STEPS:,} steps")
        load(self)

    return step


# What torch.save writes, by the names of `pickletools`; every other instruction is refused.
_INSTRUCTIONS = """
PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE
BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES
EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM SETITEMS ADDITEMS
GLOBAL STACK_GLOBAL BINPERSID BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
"""
_LOADS: dict[bytes, Callable[[Any], None]] = {
    **{
        getattr(pickle, name): pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
        for name in _INSTRUCTIONS.split()
    },
    pickle.EMPTY_DICT: lambda self: self.append(_Table()),
    pickle.EMPTY_SET: lambda self: self.append(Record("builtins.set")),
    pickle.FROZENSET: lambda self: self.append(
        Record("builtins.frozenset", tuple(self.pop_mark()))
    ),
    pickle.REDUCE: _Reader.load_call,
    pickle.NEWOBJ: _Reader.load_call,
    pickle.BUILD: _Reader.load_build,
}
_Reader.dispatch = {code[0]: _counted(load) for code, load in _LOADS.items()}


def read_pickle(data: bytes) -> Any:
    """Data that a pickle describes: plain containers, numbers, texts, `Record`s, `TensorRecord`s.

    Raises:
        BrokenFile: the pickle is damaged, too large, or of a kind that PyTorch does not write.
    """
    if len(data) > LARGEST_PICKLE:
        raise BrokenFile(f"its pickle has {len(data):,} bytes, more than {LARGEST_PICKLE:,}")
    try:
        return _Reader(io.BytesIO(data)).load()
    except BrokenFile:
        raise
    except (
        *(pickle.UnpicklingError, EOFError, struct.error, OverflowError),
        *(LookupError, TypeError, ValueError, AttributeError),
    ) as error:
        reason = f"{type(error).__name__}: {short(str(error))}"
        raise BrokenFile(f"its pickle is damaged ({reason})") from error


def _made(name: str, args: tuple[Any, ...]) -> Any:
    """The result of a call: a mapping or a tensor for the calls that torch.save writes."""
    if name == "collections.OrderedDict" and not args:
        return _Table()
    if name == "torch._utils._rebuild_parameter" and args:
        return args[0]
    if name != "torch._utils._rebuild_tensor_v2":
        return Record(name, args)
    storage, offset, shape, stride, *_ = args
    if not isinstance(storage, Storage):
        raise BrokenFile("its pickle has a tensor without a storage")
    if len(shape) > HIGHEST_RANK or len(shape) != len(stride):
        raise BrokenFile("its pickle has a tensor whose shape and stride do not fit")
    sizes, steps = (tuple(map(_count, numbers)) for numbers in (shape, stride))
    return TensorRecord(storage, _count(offset), sizes, steps)


def _name(value: Any) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_NAME:
        raise BrokenFile("its pickle has a name that is no text or too long")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST_COUNT:
        raise BrokenFile("its pickle has a size that is no number, or too large")
    return value


def short(value: Any, length: int = 80) -> str:
    """A value out of a file for a message: printable, and no longer than a line."""
    text = ascii(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _number_of(record: Record) -> float | int | None:
    """The number in a scalar of numpy, as the losses of a training are; None of other records."""
    if not record.name.endswith("multiarray.scalar") or len(record.args) != 2:
        return None
    kind, content = (part.args[:1] if isinstance(part, Record) else part for part in record.args)
    if isinstance(content, tuple) and content and isinstance(content[0], str):
        content = content[0].encode("latin1", "replace")  # as bytes are written before protocol 3
    named = isinstance(kind, tuple) and bool(kind) and isinstance(kind[0], str)
    form = _NUMBERS.get(kind[0]) if named else None
    if form is None or not isinstance(content, bytes) or len(content) != struct.calcsize(form):
        return None
    return struct.unpack(form, content)[0]


def plain(value: Any, *, calls: bool = False) -> Any:
    """Convert what `read_pickle` returns to mappings, lists, numbers and texts.

    A record becomes the mapping of its attributes, or its argument if it only holds one, such as a
    member of an enumeration. With `calls`, for people, a record says by what call it is made.

    Raises:
        BrokenFile: the result is too large or too deep (a few bytes can describe billions).
    """
    budget = MOST_SHOWN

    def convert(value: Any, depth: int) -> Any:
        nonlocal budget
        budget -= 1 + (len(value) if isinstance(value, str | bytes) else 0)
        if budget < 0 or not depth:
            raise BrokenFile("its run configuration is too large or too deep to be one")
        inside = depth - 1
        if isinstance(value, Record) and (number := _number_of(value)) is not None:
            return number
        if isinstance(value, Record):
            states = value.state if isinstance(value.state, tuple) else (value.state,)
            fields: dict[Any, Any] = {}
            for state in states:
                fields |= convert(state, inside) if isinstance(state, dict) else {}
            if calls:
                arguments = ", ".join(short(convert(part, inside), 500) for part in value.args)
                call = f"{value.name}({arguments})"
                return {"<made by>": call, **fields} if fields else call
            only_argument = len(value.args) == 1 and not fields
            return convert(value.args[0], inside) if only_argument else fields
        if isinstance(value, dict):
            return {convert(key, 1): convert(part, inside) for key, part in value.items()}
        if isinstance(value, list) or type(value) is tuple:
            return [convert(part, inside) for part in value]
        if isinstance(value, int) and abs(value) > LARGEST_COUNT:
            return "<a huge number>"
        return value if isinstance(value, str | bytes | int | float | None) else "..."

    return convert(value, depth=12)
