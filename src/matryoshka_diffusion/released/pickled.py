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
STEPS = 300_000

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


@dataclass(eq=False)
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
        for step, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if step == STEPS:
                raise BrokenFile(f"its pickle has more than {STEPS:,} instructions")
            machine.run(opcode.name, argument)
    return machine.result()


class _Machine:
    """The stack, the memo, and one method for each kind of instruction."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def result(self) -> Any:
        """What is left when the program stops."""
        (value,) = self.stack
        return value

    def run(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
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
        self.stack.append(_Symbol(argument.replace(" ", ".")))

    def _stack_global(self, _: Any) -> None:
        module, name = self._last(2)
        self.stack.append(_Symbol(f"{_text(module)}.{_text(name)}"))

    def _reduce(self, _: Any) -> None:
        symbol, args = self._last(2)
        self.stack.append(_made(symbol, args))

    _newobj = _reduce

    def _newobj_ex(self, _: Any) -> None:
        symbol, args, named = self._last(3)
        self.stack.append(Record(symbol.name, tuple(args), dict(named)))

    def _build(self, _: Any) -> None:
        (state,) = self._last(1)
        target = self.stack[-1]
        if isinstance(target, Record):
            for part in state if isinstance(state, tuple) else (state,):
                if isinstance(part, dict):
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
        sizes = tuple(map(_count, shape))
        return TensorRecord(storage, _count(offset), sizes, tuple(map(_count, stride)))
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
    """A key of a mapping. Nested tuples are refused: hashing them can take for ever."""
    flat = isinstance(value, tuple) and all(isinstance(part, _SCALARS) for part in value)
    if not (flat or isinstance(value, (*_SCALARS, Record))):
        raise BrokenFile(f"its pickle has a {type(value).__name__} as a key")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise BrokenFile("its pickle has a name that is no text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise BrokenFile("its pickle has a size that is no number")
    return value


# --- showing what was read ---------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Records as mappings of their fields, tensors as `...`, for showing and for reading configs.

    A record that only holds one argument, such as a member of an enumeration, is that argument.

    Raises:
        BrokenFile: it is too large to be a configuration (a few bytes can describe billions).
    """
    return _Plain().convert(value, depth=12)


class _Plain:
    """A conversion that gives up after so many values."""

    def __init__(self, budget: int = 20_000) -> None:
        self.budget = budget

    def convert(self, value: Any, depth: int) -> Any:
        self.budget -= 1
        if self.budget < 0 or depth == 0:
            raise BrokenFile("its run configuration is too large or too deep to be one")
        if isinstance(value, Record):
            only_argument = len(value.args) == 1 and not value.fields
            return self.convert(value.args[0] if only_argument else value.fields, depth - 1)
        if isinstance(value, dict):
            return {str(key): self.convert(part, depth - 1) for key, part in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self.convert(part, depth - 1) for part in value]
        return value if isinstance(value, _SCALARS) else "..."


def tensors(value: Any) -> Iterator[tuple[str, TensorRecord]]:
    """The tensors of a mapping that holds nothing else.

    Raises:
        BrokenFile: it is no such mapping.
    """
    if not isinstance(value, dict) or not value:
        raise BrokenFile("it holds no state_dict: a mapping from names to tensors")
    for name, part in value.items():
        if not isinstance(name, str) or not isinstance(part, TensorRecord):
            raise BrokenFile(f"its state_dict has {name!r}, which is no tensor with a name")
        yield name, part
