"""Captions, classes and images as people spell them, and what a data set holds without use.

One list of names for each role serves the columns of tables, the keys of JSON and the members of
shards. What has no role is counted, so that no caption is lost in silence.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

from matryoshka_diffusion.config import DataConfig
from matryoshka_diffusion.data.bad import PictureError

CAPTION_SUFFIXES = (".txt", ".caption", ".json")
"""Suffixes of files with captions beside an image; the first one that is there counts."""
MAX_BYTES = {".json": 2**20, ".cls": 64}  # of a file that describes an image
MAX_TEXT_BYTES = 65_536  # of any other one
METADATA = ("metadata.jsonl", "metadata.csv")
"""Files with captions or classes of many images, in any case of letters."""
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing")

_CONVERT = {
    "folder": f'write them into {METADATA[0]}, lines of {{{{"file_name": ..., "{{}}": ...}}}}',
    "shards": "write them into members of the shard beside NAME.png: captions into NAME.txt, "
    "classes as whole numbers into NAME.cls",
    "table": "write them into a column {} of the table",
}
"""Remedies for captions or classes (text or label) in a file about many images, by `Tally.form`."""
_METADATA_LIKE = re.compile(
    r"(metadata|captions?|prompts?)([_.-].*)?\.(jsonl?|csv|tsv|txt|parquet)$"
)
_LABELS_LIKE = re.compile(r"(labels?|classes)([_.-].*)?\.(jsonl?|csv|tsv|txt|parquet)$")
_ABOUT = re.compile(r"(readme|licen[cs]e|copying|notice|citation|credits|requirements)\b.*\.txt$")
_NUMBER = re.compile(r"[_.-]?(\d+)$")
_QUOTED = re.compile(r'"((?:[^"]|"")*)"')
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks
_NAMED = 5  # columns that a report names


class Role(NamedTuple):
    """Names of a column by what it holds."""

    option: str  # in `data.columns`
    usual: tuple[str, ...]  # in order of preference, exactly so
    others: frozenset[str]  # used if all that are there differ in a number at their end alone


PICTURE = Role(
    "image",
    ("image", "picture", "photo", "img", "jpg", "jpeg", "png", "webp"),
    frozenset({"images", "pixels"}),
)
CAPTION = Role(
    "caption",
    ("caption", "text"),
    frozenset({"captions", "texts", "prompt", "prompts", "description"}),
)
TEXT = CAPTION._replace(usual=("text", "caption"))  # in JSON and metadata
LABEL = Role("label", ("label", "cls"), frozenset({"labels", "class", "category", "fine_label"}))
FILE = Role("image", ("file_name",), frozenset({"file", "filename", "image", "path"}))


def find_columns(role: Role, names: Iterable[str], data: DataConfig) -> tuple[str, ...]:
    """Find the names with a role: none, one, or several such as caption_0 and caption_1."""
    names = [*names]
    if (chosen := getattr(data.columns, role.option)) is not None:
        return (chosen,) if chosen in names else ()
    if role.option == CAPTION.option and data.captions == "none":
        return ()
    if usual := [name for name in role.usual if name in names]:
        return tuple(usual[:1])
    similar = [name for name in names if _has(role, name)]
    several = len(similar) > 1 and role.option != CAPTION.option
    if several or len({_stem(name) for name in similar}) > 1:
        return ()
    return tuple(sorted(similar, key=lambda name: int((_NUMBER.search(name) or "00")[1])))


def _stem(name: str) -> str:
    return _NUMBER.sub("", name.strip().casefold())


def _has(role: Role, name: str) -> bool:
    return _stem(name) in role.others.union(role.usual)


# --- values ----------------------------------------------------------------------------------


class Words(NamedTuple):
    """Captions and class of one sample."""

    captions: tuple[str, ...] = ()  # alternatives
    label: int | str | None = None  # a number or a name


@dataclass
class Reader:
    """Captions and classes in JSON objects and rows of metadata; `tally` gets the other keys."""

    data: DataConfig
    tally: Tally
    _known: set[tuple[str, ...]] = field(default_factory=set)  # keys of records before

    def read(self, record: Mapping[str, Any], passed: Sequence[str] = ()) -> Words:
        """Words of a record; its keys `passed` have another use. Other types give none."""
        captions = find_columns(TEXT, record, self.data)
        labels = find_columns(LABEL, record, self.data)
        words, label = (), None
        try:
            words = tuple(text for name in captions for text in texts(record[name]))
        except PictureError:
            captions = ()
        try:
            label = next((label_of(record[name]) for name in labels), None)
        except LabelError:
            labels = ()
        used = {*captions, *labels, *passed}
        if (keys := (*record, *captions, *labels)) not in self._known:
            self._known.add(keys)
            self.tally.names |= {name: "" for name in record if name not in used}
        return Words(words, label)


def json_object(data: bytes) -> Mapping[str, Any]:
    """Read a JSON object. Raises PictureError for anything else."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PictureError("its .json is damaged or not UTF-8") from error
    if not isinstance(record, dict):
        raise PictureError("its .json is no object with names")
    return record


def texts(value: object) -> list[str]:
    """List the captions in a cell: one, several or none. Raises PictureError for anything else."""
    values: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in values):
        raise PictureError("its caption is no text")
    return values


def sorted_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in order; if all are numbers, as numbers."""
    names = {*names}
    are_numbers = all(map(str.isdecimal, names))
    return tuple(sorted(names, key=lambda name: (int(name) if are_numbers else 0, name)))


class LabelError(ValueError):
    """A value that is no class."""


def label_of(value: object) -> int | str | None:
    """Class in a cell: a whole number (0, 1.0, yes), a word, or nothing (null, NaN)."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, float) and (value != value or value.is_integer()):
        return None if value != value else int(value)
    if isinstance(value, int):
        return int(value)
    raise LabelError(str(value))


def clean(texts: Sequence[str]) -> tuple[str, ...]:
    """Captions in `texts` with single blanks between words. Raises PictureError without any."""
    captions = tuple(" ".join(text.split()) for text in texts if text.strip())
    if not captions:
        raise PictureError("its caption is empty")
    if any("\ud800" <= character <= "\udfff" for text in captions for character in text):
        raise PictureError("its caption is not UTF-8")
    return captions


def decoded(data: bytes) -> str:
    """Text of a file in UTF-8, or in UTF-16 with its mark; other bytes become surrogates.

    `clean` refuses these.
    """
    try:
        return data.decode("utf-16" if data[:2] in _UTF_16 else "utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("utf-8-sig", "surrogateescape")


def lines(data: bytes) -> list[str]:
    """Lines of a text file. Only line feeds and carriage returns end one."""
    return re.split("\r\n|\n|\r", decoded(data))


def suffixes_of(data: DataConfig) -> tuple[str, ...]:
    """Suffixes of the files that describe an image, the most important one first."""
    if data.caption_suffixes:
        return data.caption_suffixes
    only_json = data.captions == "none" or data.columns.caption is not None
    return (".json",) if only_json else CAPTION_SUFFIXES


def read_table(path: str, text: str) -> tuple[list[str], list[tuple[int, dict[str, str], str]]]:
    """Column names in the text of a CSV file, and its rows with their lines and flaws.

    Its first line decides between commas, semicolons and tabs. In a `.tsv`, a line is a row, and
    quotes are letters unless they enclose a whole field. Raises ValueError.
    """
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    is_tsv = path.lower().endswith(".tsv")
    quoting = csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL
    file = io.StringIO(text, newline="")
    table = csv.reader(
        file, delimiter=delimiter, skipinitialspace=True, quoting=quoting, strict=True
    )
    lines, start = [], 1
    try:
        for row in table:
            if row:
                lines.append((table.line_num, [*map(_unquoted, row)] if is_tsv else row))
            start = table.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: {error}: check its quotes") from error
    names = [name.strip() for name in lines[0][1]] if lines else []
    remedy = "remove tabs from its text" if is_tsv else "put quotes around its text"
    flaw = f"it has {{}} fields and the first line has {len(names)}: {remedy}"
    return names, [
        (
            line,
            dict(zip(names, row, strict=False)),
            "" if len(row) == len(names) else flaw.format(len(row)),
        )
        for line, row in lines[1:]
    ]


def _unquoted(field: str) -> str:
    match = _QUOTED.fullmatch(field)
    return field if match is None else match[1].replace('""', '"')


def captions_in(data: bytes, config: DataConfig) -> tuple[str, ...]:
    """Captions in a text file: its lines, or the whole of it."""
    texts = lines(data)
    return (" ".join(texts),) if config.captions == "whole" else tuple(texts)


# --- what is not used ------------------------------------------------------------------------


class Unused(NamedTuple):
    """Something in a data set that is not used."""

    kind: str  # such as ".npy files"
    count: int
    example: str
    role: str = ""  # "caption" or "label" if it may be one
    remedy: str = ""
    is_each: bool = False  # of files that describe an image each, not many
    place: str = "data"  # key of its data set in the config

    def below(self, place: str) -> Unused:
        """The same in the data set of another key, which its remedy names."""
        return self._replace(place=place, remedy=re.sub(r"\bdata\.", f"{place}.", self.remedy))

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.kind}: {self.count:,}, such as {self.example}{remedy}"


@dataclass
class Tally:
    """Files without use, and columns or keys without use, of one data set or of a part of it."""

    files: dict[str, list[Any]] = field(default_factory=dict)  # by kind: count, example, ...
    names: dict[str, str] = field(default_factory=dict)  # column or key: its type, or ""
    form: Literal["folder", "shards", "table"] = "folder"

    def add(
        self,
        kind: str,
        example: str,
        role: str = "",
        remedy: str = "",
        is_each: bool = False,
        *,
        count: int = 1,
    ) -> None:
        """Count files of a kind. The first one is its example."""
        self.files.setdefault(kind, [0, example, role, remedy, is_each])[0] += count

    def add_file(self, name: str, noun: str = "files") -> None:
        """Count a file or member by the end of its name; one that is about many images by itself.

        Other data sets, metadata of many images, and texts without an image may have captions.
        """
        convert = _CONVERT[self.form]
        base = PurePosixPath(name).name.lower()
        suffix = PurePosixPath(base).suffix
        if _METADATA_LIKE.match(base):
            is_read = base in METADATA and self.form == "folder"
            remedy = "no line of it is used" if is_read else convert.format("text")
            self.add(base, name, CAPTION.option, remedy)
        elif _LABELS_LIKE.match(base):
            self.add(base, name, LABEL.option, convert.format("label"))
        elif _ABOUT.match(base):
            self.add(base, name)
        elif suffix in (".tar", ".parquet") and noun == "files":
            remedy = f"--data 'FOLDER/*{suffix}' reads them"
            self.add(f"{suffix} files", name, CAPTION.option, remedy)
        else:
            self._add_suffix(suffix, noun, name)

    def _add_suffix(self, suffix: str, noun: str, example: str) -> None:
        """Count a file or member by its suffix, which may be that of captions or classes."""
        kind = f"{suffix} {noun}" if suffix else f"{noun} without a suffix"
        if suffix == ".json":
            self.add(kind, example)  # most hold something else
        elif suffix in CAPTION_SUFFIXES:
            remedy = f"NAME{suffix} is read beside the image NAME.png"
            self.add(kind, example, CAPTION.option, remedy, is_each=True)
        elif (role := _role_of(suffix)) is not None:
            reads = f'--set "data.caption_suffixes=[{suffix}]" reads NAME{suffix} beside NAME.png'
            remedy = reads if role is CAPTION else _CONVERT[self.form].format("label")
            self.add(kind, example, role.option, remedy, is_each=True)
        else:
            self.add(kind, example)

    def merge(self, other: Tally) -> None:
        """Add the counts of another part."""
        for kind, (count, *rest) in other.files.items():
            self.add(kind, *rest, count=count)
        self.names |= other.names

    def unused(self, noun: str = "columns") -> tuple[Unused, ...]:
        """Lines of a report, with `noun` for the names."""
        entries = []
        for role, means in ((CAPTION, "captions"), (LABEL, "classes"), (None, "")):
            names = [name for name in self.names if _role_of(name) == role]
            typed = [f"{name} ({self.names[name]})" if self.names[name] else name for name in names]
            kind, count, example = noun, len(names), ", ".join(typed[:_NAMED])
            if names and role is None:
                entries.append(Unused(kind, count, example))
            elif names and role is not None:
                remedy = f"--set data.columns.{role.option}={names[0]} reads it"
                kind = f"{noun} that may be {means}"
                entries.append(Unused(kind, count, example, role.option, remedy))
        files = (Unused(kind, *values) for kind, values in sorted(self.files.items()))
        return (*entries, *files)


def is_about_many(name: str) -> bool:
    """Test if a file is named as one that describes many images, or none."""
    base = PurePosixPath(name).name.lower()
    return any(pattern.match(base) for pattern in (_METADATA_LIKE, _LABELS_LIKE, _ABOUT))


def _role_of(name: str) -> Role | None:
    """Role that a name may have, by any word in it: `caption_en`, `coarse_label`.

    The record of an image, `json`, may have its caption.
    """
    words = {*re.split(r"[\W_]+", _stem(name)), _stem(name)}
    roles = (CAPTION, LABEL)
    if "json" in words:
        return CAPTION
    return next((role for role in roles if words & role.others.union(role.usual)), None)
