"""What `mdm data check` says about a source before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL.Image import Image

from matryoshka_diffusion.data.bad import BadFile
from matryoshka_diffusion.data.source import Example, Source, read_all
from matryoshka_diffusion.draw.grid import grid

_SHOWN = 20
_COLUMNS, _CELL, _STILLS = 8, 96, 4


def summary(source: Source) -> str:
    """One line: what training is about to see."""
    conditions = f"{len(source.classes)} classes" if source.classes else "no captions, no classes"
    if source.captions:
        conditions = "captions"
    bad = f"; {len(source.bad)} bad files, which mdm data check lists" if source.bad else ""
    return f"{source.name}: {len(source):,} {_noun(source)} of {source.side} px, {conditions}{bad}"


def describe(source: Source) -> str:
    """Lines for people: counts, sizes, classes or captions, and the files left out with reasons."""
    sides, labels, captions = [], Counter(), []
    for example in read_all(source, range(len(source))):
        sides.append(example.original_side)
        labels[example.label] += 1
        captions.append(example.captions)
    lines = [
        f"{source.name}: {len(source):,} {_noun(source)}",
        f"  side      {source.side} px, {source.channels} channel{'s' * (source.channels > 1)}",
        f"  originals {_original_sides(sides, source.side)}",
    ]
    if source.classes:
        counts = [f"{name} ({labels[label]:,})" for label, name in enumerate(source.classes)]
        lines.append(f"  classes   {len(source.classes)}: {_listed(counts)}")
    lines.append(f"  captions  {_captions(captions)}")
    return "\n".join([*lines, describe_bad(source.bad)])


def describe_bad(bad: Sequence[BadFile]) -> str:
    """Lines for people: how many files are left out, and the first of them with reasons."""
    return "\n".join([f"  bad files {len(bad)}", *_bad_files(bad)])


def contact_sheet(source: Source, count: int = 64) -> Image:
    """At most `count` pictures, spread evenly over the source, beside their captions or classes.

    Of a clip, up to four frames are shown.
    """
    shown = min(count, len(source))
    examples = source.many([place * len(source) // shown for place in range(shown)])
    pictures = [_stills(example.picture) for example in examples]
    words = [_words(example, source.classes) for example in examples]
    title = f"{source.name}: {shown} of {len(source):,} {_noun(source)}"
    if any(words):
        blocks = _COLUMNS // len(pictures[0])
        return grid(pictures, captions=words, title=title, cell=_CELL, blocks=blocks)
    stills = [still for frames in pictures for still in frames]
    rows = [stills[start : start + _COLUMNS] for start in range(0, len(stills), _COLUMNS)]
    return grid(rows, title=title, cell=_CELL)


def _noun(source: Source) -> str:
    return "pictures" if source.frames is None else f"clips of {source.frames} frames"


def _stills(picture: UInt8[np.ndarray, "*frames side side c"]) -> list[np.ndarray]:
    """A picture itself; of a clip, up to four frames spread evenly over it."""
    if picture.ndim == 3:
        return [picture]
    count = min(_STILLS, len(picture))
    return [picture[place * (len(picture) - 1) // max(count - 1, 1)] for place in range(count)]


def _words(example: Example, classes: Sequence[str]) -> str:
    if example.captions:
        return example.captions[0]
    return "" if example.label is None else classes[example.label]


def _original_sides(sides: Sequence[int], side: int) -> str:
    smaller = sum(original < side for original in sides)
    remark = f", {smaller:,} of them below {side} px" if smaller else ""
    return f"{min(sides):,} to {max(sides):,} px on the shorter side{remark}"


def _captions(captions: Sequence[tuple[str, ...]]) -> str:
    distinct = dict.fromkeys(text for texts in captions for text in texts)
    if not distinct:
        return "none"
    first = ", ".join(f'"{text[:60]}"' for text in list(distinct)[:3])
    return f"{sum(map(len, captions)):,} ({len(distinct):,} distinct), such as {first}"


def _listed(items: Sequence[str]) -> str:
    more = [f"and {len(items) - _SHOWN:,} more"] if len(items) > _SHOWN else []
    return ", ".join([*items[:_SHOWN], *more])


def _bad_files(bad: Sequence[BadFile]) -> list[str]:
    lines = [f"    {file}" for file in bad[:_SHOWN]]
    return [*lines, f"    and {len(bad) - _SHOWN:,} more"] if len(bad) > _SHOWN else lines
