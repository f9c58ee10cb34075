"""Files that a pattern or a folder stands for, here and elsewhere, and their names in keys."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from matryoshka_diffusion.config import ConfigError, DataConfig
from matryoshka_diffusion.data.remote import attempt
from matryoshka_diffusion.data.spellings import SPLITS, Tally
from matryoshka_diffusion.files import unreadable

MAX_NAMES = 1_000_000  # from one pattern: more is a slip such as {0..99999999}

OF_THE_DISK = ("lost+found", "System Volume Information", "$RECYCLE.BIN")  # often unreadable

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_SPLIT = re.compile(rf"(?:^|[-_./])({'|'.join(SPLITS)})(?=[-_./]|$)")


def expand(pattern: str, suffix: str) -> list[str]:
    """Paths that a pattern stands for, or the files of a folder that end in `suffix`, in order.

    `{00..12}` counts, with the zeros of its first number, and may occur several times; `*`, `?`
    and `[...]` match what exists. In the path of a file or folder that exists, they are letters.
    Raises FileNotFoundError or, for senseless ranges, ValueError.
    """
    if os.path.isdir(pattern):
        inside = (_files(f"{pattern}/", f"{deeper}*{suffix}") for deeper in ("", "*/"))
        paths = next(filter(None, inside), [])
    elif os.path.exists(pattern):
        paths = [pattern]
    else:
        there = next((f"{x}/" for x in Path(pattern).parents if x.is_dir()), "")
        there = "" if "://" in pattern or not pattern.startswith(there) else there
        paths = [path for name in _counted(pattern, there) for path in _existing(name, there)]
    if not paths:
        raise FileNotFoundError(f"{pattern}: no {suffix} file is there")
    return paths


def _counted(pattern: str, there: str) -> list[str]:
    """Names for all the numbers in a pattern, whose start `there` is the path of a folder."""
    names = [pattern.removeprefix(there)]
    while (match := _RANGE.search(names[0])) is not None:
        first, last = int(match[1]), int(match[2])
        count = last - first + 1
        if count < 1 or count * len(names) > MAX_NAMES:
            raise ValueError(f"{pattern}: {match[0]} is no range, or gives too many names")
        numbers = [f"{n:0{len(match[1])}}" for n in range(first, last + 1)]
        names = [name.replace(match[0], n, 1) for name in names for n in numbers]
    return [f"{there}{name}" for name in names]


def _existing(path: str, there: str) -> list[str]:
    rest = path.removeprefix(there)
    if not glob.has_magic(rest):
        return [path]
    if "://" not in path:
        return _files(there, rest)
    return attempt(path, _matches)


def _files(there: str, pattern: str) -> list[str]:
    """Sorted paths that match a pattern below the folder `there`.

    Raises UnreadableError for a folder on the way that cannot be read: `glob` passes it over.
    """
    paths = [there.rstrip("/") or there or "."]
    for part in pattern.split("/"):
        folders = [x for x in paths if os.path.isdir(x) and os.path.basename(x) not in OF_THE_DISK]
        paths = [path for folder in folders for path in _matching(folder, part)]
    return sorted(paths)


def _matching(folder: str, part: str) -> list[str]:
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise unreadable(folder, error) from error
    return glob.glob(os.path.join(glob.escape(folder), part))


def _matches(system: Any, pattern: str) -> list[str]:
    return [system.unstrip_protocol(name) for name in sorted(system.glob(pattern))]


def of_split(pattern: str, paths: Sequence[str], data: DataConfig) -> list[str]:
    """Files of the split `data.split`, or all where they belong to one split or to none.

    A split is a word in the name of a file, or of a folder below the one that `pattern` names.
    Raises ConfigError.
    """
    start = pattern if os.path.isdir(pattern) else ""
    names = [path.removeprefix(start) if start else os.path.basename(path) for path in paths]
    matches = [_SPLIT.search(name.lower()) for name in names]
    splits = [None if match is None else match[1] for match in matches]
    there = sorted({*filter(None, splits)})
    if data.split == "all" or (data.split is None and len(there) < 2):
        return [*paths]
    if data.split not in there:
        raise ConfigError(
            f"data.split is {data.split or 'not set'}, and the files of {pattern} are of the "
            f"splits {', '.join(there) or '(none)'}: --set data.split=NAME reads one of them, "
            "data.split=all reads everything"
        )
    return [path for path, split in zip(paths, splits, strict=True) if split == data.split]


def count_others(pattern: str, used: Collection[str], tally: Tally) -> None:
    """Count the files beside those `used` of the folder that `pattern` names, if it does.

    Of its other sub-folders, shards and parquet files are counted: they may be meant, too.
    """
    if not os.path.isdir(pattern):
        return
    folders = {pattern, *map(os.path.dirname, used)}
    paths = [os.path.join(folder, name) for folder in folders for name in os.listdir(folder)]
    for folder, _, names in os.walk(pattern):
        if folder not in folders:
            data = (name for name in names if name.endswith((".tar", ".parquet")))
            paths += [os.path.join(folder, name) for name in data]
    for path in sorted({*paths} - {*used}):
        name = os.path.relpath(path, pattern)
        if "/." not in f"/{name}" and os.path.isfile(path):
            tally.add_file(name)


def short_names(paths: Sequence[str]) -> list[str]:
    """File names; if these would not tell files apart, paths below the folder of all of them.

    Keys of samples begin with them, so these stay the same when the folder moves.
    """
    parts = [path.split("/") for path in paths]
    names = [part[-1] for part in parts]
    if len(set(names)) == len(paths):
        return names
    levels = zip(*(part[:-1] for part in parts), strict=False)
    common = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    return ["/".join(part[common:]) for part in parts]
