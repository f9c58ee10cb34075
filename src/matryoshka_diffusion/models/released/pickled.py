"""Pickles as plain data: nothing that one names is ever imported, called or run.

A pickle is a program for a small stack machine. This is another machine for the same program: where
the real one imports a class and calls it, this one writes down the name and the arguments as a
`Record`. What it returns is made of plain containers, numbers, texts, `Record`s and `TensorRecord`s
and of nothing else, whatever the file holds.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

LARGEST = 16 * 2**20
"""Bytes of a pickle. The released checkpoints with all their state have less than one million."""
BUDGET = 400_000
"""Instructions, and elements that are copied: what a file may cost, however few bytes it has."""
LONGEST_NAME = 1_000
LARGEST_COUNT = 2**48
HIGHEST_RANK = 8

_CONSTANTS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
    )
)
_FIXED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_SCALARS = (str, bytes, int, float, bool, type(None))


class BrokenFile(ValueError):
    """A file that is not what its name says; the message says what is wrong."""


@dataclass(eq=False, repr=False)
class Record:
    """What a pickle asked to be made of a class or function: its name and what it was given.

    Attributes:
        name: for instance `argparse.Namespace`.
        args: the arguments of the call.
        fields: attributes that were set afterwards.
        items: what was added to it as if it were a list or a mapping.
    """

    name: str
    args: tuple[Any, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    items: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"<{self.name}>"  # never what it holds: that may hold itself


@dataclass(frozen=True)
class Storage:
    """The numbers of one or more tensors, in a file of the archive named `key`."""

    type: str
    key: str
    numel: int


@dataclass(frozen=True)
class TensorRecord:
    """A tensor whose numbers have not been read: a view of a storage, counted in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Symbol:
    """A class or function by name; nothing was looked up."""

    name: str


def read_pickle(data: bytes) -> Any:
    """What a pickle describes.

    Raises:
        BrokenFile: it is damaged, too large, or of a kind that PyTorch does not write.
    """
    if len(data) > LARGEST:
        raise BrokenFile(f"its pickle has {len(data):,} bytes, more than the {LARGEST:,} allowed")
    machine = _Machine()
    try:
        return _run(machine, data)
    except BrokenFile:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise BrokenFile(f"its pickle is damaged ({type(error).__name__}: {error})") from error


def _run(machine: _Machine, data: bytes) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in damaged texts
        for opcode, argument, _ in pickletools.genops(data):
            machine.run(opcode.name, argument)
    return machine.result()


class _Machine:
    """The stack, the memo, and one method for each kind of instruction."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.budget = BUDGET

    def charge(self, cost: int) -> None:
        """Count work: a value in the memo can be copied again and again by one instruction."""
        self.budget -= cost
        if self.budget < 0:
            raise BrokenFile(f"its pickle takes more than {BUDGET:,} steps")

    def result(self) -> Any:
        """What is left when the program stops."""
        (value,) = self.stack
        return value

    def run(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        self.charge(1)
        if name in _CONSTANTS:
            self.stack.append(argument)
        elif name in _FIXED:
            self.stack.append(_FIXED[name])
        elif name not in ("PROTO", "FRAME", "STOP"):
            instruction = getattr(self, f"_{name.lower()}", None)
            if instruction is None:
                raise BrokenFile(f"its pickle has the instruction {name}, which is not supported")
            instruction(argument)

    # --- containers ---

    def _empty_list(self, _: Any) -> None:
        self.stack.append([])

    def _empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def _empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def _empty_set(self, _: Any) -> None:
        self.stack.append(set())

    def _mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _list(self, _: Any) -> None:
        self.stack.append(self._since_mark())

    def _dict(self, _: Any) -> None:
        self.stack.append(_add_pairs({}, self._since_mark()))

    def _frozenset(self, _: Any) -> None:
        self.stack.append(frozenset(map(_key, self._since_mark())))

    def _tuple1(self, _: Any) -> None:
        self.stack.append(tuple(self._last(1)))

    def _tuple2(self, _: Any) -> None:
        self.stack.append(tuple(self._last(2)))

    def _tuple3(self, _: Any) -> None:
        self.stack.append(tuple(self._last(3)))

    def _append(self, _: Any) -> None:
        _extend(self._under(1), self._last(1))

    def _appends(self, _: Any) -> None:
        values = self._since_mark()
        _extend(self.stack[-1], values)

    _additems = _appends

    def _setitem(self, _: Any) -> None:
        _add_pairs(self._under(2), self._last(2))

    def _setitems(self, _: Any) -> None:
        values = self._since_mark()
        _add_pairs(self.stack[-1], values)

    # --- what the real machine would import and call ---

    def _global(self, argument: str) -> None:
        self.stack.append(_Symbol(_text(argument).replace(" ", ".")))

    def _stack_global(self, _: Any) -> None:
        module, name = self._last(2)
        self.stack.append(_Symbol(f"{_text(module)}.{_text(name)}"))

    def _reduce(self, _: Any) -> None:
        symbol, args = self._last(2)
        self.charge(len(args))
        for value in args:  # tuples of sizes, the items of a set
            self.charge(len(value) if isinstance(value, (list, tuple, set)) else 0)
        self.stack.append(_made(symbol, args))

    _newobj = _reduce

    def _newobj_ex(self, _: Any) -> None:
        symbol, args, named = self._last(3)
        self.charge(len(args) + len(named))
        self.stack.append(Record(symbol.name, tuple(args), dict(named)))

    def _build(self, _: Any) -> None:
        (state,) = self._last(1)
        target = self.stack[-1]
        if isinstance(target, Record):
            for part in state if isinstance(state, tuple) else (state,):
                if isinstance(part, dict):
                    self.charge(len(part))
                    target.fields.update(part)

    def _binpersid(self, _: Any) -> None:
        (described,) = self._last(1)
        kind, storage_type, key, _, numel = described
        if kind != "storage" or not isinstance(storage_type, _Symbol):
            raise BrokenFile("its pickle refers to something that is no storage of a tensor")
        self.stack.append(Storage(storage_type.name, _text(key), _count(numel)))

    # --- stack and memo ---

    def _pop(self, _: Any) -> None:
        self._last(1)

    def _pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _put(self, argument: int) -> None:
        self.memo[argument] = self.stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _get(self, argument: int) -> None:
        self.stack.append(self.memo[argument])

    _binget = _long_binget = _get

    def _last(self, count: int) -> list[Any]:
        """Take the last values off the stack."""
        first = len(self.stack) - count
        if first < (self.marks[-1] if self.marks else 0):
            raise BrokenFile("its pickle is damaged (the stack is too short)")
        values = self.stack[first:]
        del self.stack[first:]
        return values

    def _since_mark(self) -> list[Any]:
        if not self.marks:
            raise BrokenFile("its pickle is damaged (a mark is missing)")
        return self._last(len(self.stack) - self.marks.pop())

    def _under(self, count: int) -> Any:
        return self.stack[-1 - count]


def _made(symbol: Any, args: Any) -> Any:
    """A call, written down; the few that make plain containers and tensors become those."""
    name, args = symbol.name, tuple(args)
    if name == "collections.OrderedDict" and not args:
        return {}
    if name in ("builtins.set", "__builtin__.set") and len(args) == 1:
        return set(map(_key, args[0]))
    if name == "torch._utils._rebuild_tensor_v2":
        storage, offset, shape, stride, *_ = args
        if not isinstance(storage, Storage):
            raise BrokenFile("its pickle has a tensor without a storage")
        if len(shape) > HIGHEST_RANK or len(shape) != len(stride):
            raise BrokenFile("its pickle has a tensor whose shape and stride do not fit")
        sizes, steps = (tuple(map(_count, numbers)) for numbers in (shape, stride))
        return TensorRecord(storage, _count(offset), sizes, steps)
    if name == "torch._utils._rebuild_parameter":
        return args[0]
    return Record(name, args)


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target += values
    elif isinstance(target, set):
        target.update(map(_key, values))
    elif isinstance(target, Record):
        target.items += values
    else:
        raise BrokenFile("its pickle is damaged (items for what is no list)")


def _add_pairs(target: Any, values: list[Any]) -> Any:
    pairs = list(zip(values[::2], values[1::2], strict=True))
    if isinstance(target, dict):
        target.update((_key(key), value) for key, value in pairs)
    elif isinstance(target, Record):
        target.items += pairs
    else:
        raise BrokenFile("its pickle is damaged (keys for what is no mapping)")
    return target


def _key(value: Any) -> Any:
    """A key of a mapping.

    Only what hashes quickly whatever it holds is kept; anything else is written down as a text,
    because hashing a nested tuple, or many chosen integers, can take for ever.
    """
    small = isinstance(value, int) and abs(value) < LARGEST_COUNT
    return value if small or isinstance(value, (str, type(None))) else f"<{type(value).__name__}>"


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_NAME:
        raise BrokenFile("its pickle has a name that is no text or too long")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= LARGEST_COUNT:
        raise BrokenFile("its pickle has a size that is no number, or too large")
    return value


def short(value: Any, length: int = 80) -> str:
    """A name out of a file for a message: printable, and no longer than a line."""
    text = ascii(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


# --- showing what was read ---------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Values for reading a configuration: records as mappings of their fields.

    A record that only holds one argument, such as a member of an enumeration, is that argument.

    Raises:
        BrokenFile: it is too large to be a configuration (a few bytes can describe billions).
    """
    return _Plain(names=False).convert(value, depth=12)


def shown(value: Any) -> Any:
    """Values for people: as `plain`, but with the names of all classes and functions.

    Raises:
        BrokenFile: it is too large to be shown.
    """
    return _Plain(names=True).convert(value, depth=12)


class _Plain:
    """A conversion that gives up after so many values and letters."""

    def __init__(self, *, names: bool) -> None:
        self.names = names
        self.budget = 100_000

    def convert(self, value: Any, depth: int) -> Any:
        self._charge(1, depth)
        if isinstance(value, Record):
            return self._record(value, depth)
        if isinstance(value, dict):
            return {self._scalar(key): self.convert(part, depth - 1) for key, part in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.convert(part, depth - 1) for part in value]
        return self._scalar(value)

    def _record(self, value: Record, depth: int) -> Any:
        if not self.names:
            only_argument = len(value.args) == 1 and not value.fields
            return self.convert(value.args[0] if only_argument else value.fields, depth - 1)
        arguments = [self.convert(part, depth - 1) for part in value.args]
        call = f"{value.name}({', '.join(short(part, 500) for part in arguments)})"
        fields = self.convert(value.fields, depth - 1)
        return {"<made by>": call, **fields} if fields else call

    def _scalar(self, value: Any) -> Any:
        if isinstance(value, (str, bytes)):
            self._charge(len(value), 1)
        if isinstance(value, int) and abs(value) > LARGEST_COUNT:
            return "<a huge number>"
        return value if isinstance(value, _SCALARS) else "..."

    def _charge(self, cost: int, depth: int) -> None:
        self.budget -= cost
        if self.budget < 0 or depth == 0:
            raise BrokenFile("its run configuration is too large or too deep to be one")


def tensors(value: Any) -> Iterator[tuple[str, TensorRecord]]:
    """The tensors of a mapping that holds nothing else.

    Raises:
        BrokenFile: it is no such mapping.
    """
    if not isinstance(value, dict) or not value:
        raise BrokenFile("it holds no state_dict: a mapping from names to tensors")
    for name, part in value.items():
        if not isinstance(name, str) or not isinstance(part, TensorRecord):
            raise BrokenFile(f"its state_dict has {short(name)}, which is no tensor with a name")
        yield name, part
