"""Reports on a source before anything is trained on it, for `mdm data check` and `--dry-run`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL.Image import Image

from matryoshka_diffusion.config import ConfigError, DataConfig, RunConfig
from matryoshka_diffusion.data.bad import BadFile, listed
from matryoshka_diffusion.data.mix import key_of
from matryoshka_diffusion.data.source import PACKAGED, Source, read_all
from matryoshka_diffusion.draw.grid import grid
from matryoshka_diffusion.escape import on_one_line

_WITHOUT_COLUMNS = (*PACKAGED, "emoji-styles", "fluent-emoji")  # whose captions have no names
_COLUMNS, _CELL, _STILLS = 8, 96, 4
_STRAY = 0.5  # texts for an image: with fewer, they are not the captions of a set of classes


def summary(source: Source) -> str:
    """Number, size and conditions of the samples, and what the data set holds besides."""
    conditions = f"{len(source.classes)} classes" if source.classes else "no captions, no classes"
    if source.captions:
        conditions = "captions"
    bad = f"; {len(source.bad)} bad files, which mdm data check lists" if source.bad else ""
    side = f"{source.side} px{_colours(source)}"
    line = f"{source.name}: {len(source):,} {_noun(source)} of {side}, {conditions}{bad}"
    return "\n".join([line, *describe_shapes(source), *describe_unused(source)])


def describe(source: Source) -> str:
    """Report of counts, sizes, classes or captions, and bad files; reads every sample."""
    sides, labels = [], Counter()
    captions: list[str] = []
    for example in read_all(source, range(len(source))):
        sides.append(example.original_side)
        labels[example.label] += 1
        captions += example.captions
    smaller = sum(side < source.side for side in sides)
    remark = f", {smaller:,} of them below {source.side} px" if smaller else ""
    lines = [
        f"{source.name}: {len(source):,} {_noun(source)}",
        f"  side      {source.side} px, {source.channels} channel{'s' * (source.channels > 1)}"
        f"{_colours(source)}",
        f"  originals {min(sides):,} to {max(sides):,} px on the shorter side{remark}",
        *describe_shapes(source),
    ]
    if source.classes:
        counts = [f"{name} ({labels[label]:,})" for label, name in enumerate(source.classes)]
        lines.append(f"  classes   {len(source.classes)}: {', '.join(listed(counts))}")
        names, places = source.classes, tuple(map(str, range(len(source.classes))))
        if names != places and all(map(str.isdecimal, names)):
            lines.append(f"            names, not indices: the class with index 0 is {names[0]}")
    distinct = list(dict.fromkeys(captions))
    first = ", ".join(f'"{on_one_line(text[:60])}"' for text in distinct[:3])
    some = f"{len(captions):,} ({len(distinct):,} distinct), such as {first}"
    lines.append(f"  captions  {some if captions else 'none'}")
    return "\n".join([*lines, *describe_unused(source), describe_bad(source.bad)])


def describe_shapes(source: Source) -> list[str]:
    """Report of the shapes of images and of what they cut off; no line for images of one shape."""
    if len(source.shapes) == 1:
        return []
    found = Counter(sample.shape for sample in source.samples).most_common()
    counts = [f"{source.shapes[shape]} ({count:,})" for shape, count in found]
    lost = [1.0 - sample.kept for sample in source.samples]
    return [
        f"  shapes    {len(found)}: {', '.join(listed(counts, 8))}",
        f"  cut off   {max(lost):.1%} of an image at most, {sum(lost) / len(lost):.1%} on average",
    ]


def describe_unused(source: Source) -> list[str]:
    """Report of what is in the data set and not used; no line if there is nothing."""
    return [] if not source.unused else ["\n    ".join(["  not used", *listed(source.unused)])]


def refuse_lost(source: Source, data: DataConfig) -> None:
    """Raise ConfigError if captions or classes are lost: if a column that is named gives none.

    Without such a name it is an error if what is not used looks like captions or classes, and there
    are none. One class for all images tells nothing about any of them. Beside several classes, a
    few texts without an image are no captions: they are only reported.
    """
    classes = len(source.classes) > 1
    lost = {
        "caption": not source.captions,
        "label": not source.captions and not classes,
    }
    for role, option in (("caption", "captions"), ("label", "classes")):
        unused = [
            one
            for one in source.unused
            if one.role == role
            and not (classes and one.is_each and one.count < _STRAY * len(source))
        ]
        items = "; ".join(listed(unused, 5))
        places = {key_of(n): part for n, part in enumerate(data.mix)} or {"data": data}
        places = {key: one for key, one in places.items() if getattr(one.columns, role)}
        for key, place in places.items():
            if not getattr(source, option) or place.source in _WITHOUT_COLUMNS:
                raise ConfigError(
                    f"{key}.columns.{role} is {getattr(place.columns, role)}, and "
                    f"gives no {option} of {source.name}{items and f' ({items})'}: correct it, or "
                    "omit it"
                )
        if lost[role] and unused and not places:
            without = "captions=none" if role == "caption" else "columns.label=''"
            options = sorted({f'--set "{one.place}.{without}"' for one in unused})
            raise ConfigError(
                f"{source.name} may have {option} that are not used, and nothing else gives them: "
                f"{items}; {' '.join(options)} goes on without"
            )


def refuse_unfit(source: Source, config: RunConfig) -> None:
    """Raise ConfigError if model and data disagree on channels, frames, captions or classes."""
    model, classes = config.model, len(source.classes)
    counts = {"channels": (model.channels, source.channels), "classes": (model.classes, classes)}
    for key, (wanted, there) in counts.items():
        if wanted != there and (model.classes if key == "classes" else config.codec is None):
            remedy = _remedy_of_tuning(source, config) if config.train.init else ""
            anew = " --set data.classes=[]" if key == "classes" and config.data.classes else ""
            remedy = remedy or f"add --set model.{key}={there}{anew}"
            seen = _seen(source) if key == "classes" else ""
            raise ConfigError(
                f"model.{key} is {wanted}, but {source.name} has {there}: {remedy}{seen}"
            )
    if source.frames != config.data_frames:
        frames = (config.data_frames, source.frames)
        kinds = ["images" if n is None else f"clips of {n} frames" for n in frames]
        remedy = ": name videos with --set data.source=clips" if source.frames is None else ""
        raise ConfigError(f"the model draws {kinds[0]}, but {source.name} has {kinds[1]}{remedy}")
    if model.text is not None and not source.captions:
        raise ConfigError(
            f"model.text is set, but {source.name} has no captions: add NAME.txt beside each "
            f"file NAME.* or a metadata.jsonl{_seen(source)}"
        )
    if config.data.classes and config.data.classes != source.classes:
        names = (", ".join(listed(names, 5)) for names in (config.data.classes, source.classes))
        raise ConfigError(
            f"data.classes is {next(names)}, and the classes of {source.name} are "
            f"{next(names) or 'none'}: name the same ones, or set data.classes=[] for a new run"
        )


def _remedy_of_tuning(source: Source, config: RunConfig) -> str:
    """Advice on data that a model cannot be tuned on, as it keeps channels and classes."""
    known, new = config.data.classes, "train a new model (mdm train PRESET --data ... --out RUN)"
    unknown = [name for name in source.classes if name not in known]
    if not unknown or not known:
        return f"{config.train.init} keeps its own: name other data, or {new}"
    knows, others = (", ".join(listed(names, 5)) for names in (known, unknown))
    return (
        f"{config.train.init} knows {knows} and learns no more classes: leave out or rename "
        f"{others}, or {new}"
    )


def _seen(source: Source) -> str:
    """Text such as ' (not used: ...)' for errors about captions or classes that are missing."""
    return f" (not used: {'; '.join(map(str, source.unused))})" if source.unused else ""


def describe_bad(bad: Sequence[BadFile]) -> str:
    """Report of the number of bad files, and of the first of them with their reasons."""
    return "\n    ".join([f"  bad files {len(bad)}", *listed(bad)])


def contact_sheet(source: Source, count: int = 64) -> Image:
    """Draw at most `count` images, spread evenly over the source, with captions or classes.

    A clip is drawn as up to four of its frames.
    """
    count = min(count, len(source))
    examples = source.many([place * len(source) // count for place in range(count)])
    pictures = []
    for example in examples:
        frames = example.picture if source.frames else example.picture[None]
        stills = np.linspace(0, len(frames) - 1, min(_STILLS, len(frames))).astype(int)
        pictures.append(list(frames[stills]))
    labels = ("" if x.label is None else source.classes[x.label] for x in examples)
    words = [next(iter(x.captions), label) for x, label in zip(examples, labels, strict=True)]
    title = f"{source.name}: {count} of {len(source):,} {_noun(source)}"
    if any(words):
        blocks = _COLUMNS // len(pictures[0])
        return grid(pictures, captions=words, title=title, cell=_CELL, blocks=blocks)
    stills = [still for frames in pictures for still in frames]
    rows = [stills[start : start + _COLUMNS] for start in range(0, len(stills), _COLUMNS)]
    return grid(rows, title=title, cell=_CELL)


def _colours(source: Source) -> str:
    """Words for images that are not read in colour."""
    return {1: ", grey", 2: ", grey with opacity", 4: ", colour with opacity"}.get(
        source.channels, ""
    )


def _noun(source: Source) -> str:
    return "pictures" if source.frames is None else f"clips of {source.frames} frames"
