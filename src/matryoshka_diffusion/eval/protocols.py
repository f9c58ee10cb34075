"""What sample i is asked to show: the same rule in every run and for any number of samples.

Sample i's caption or class depends on i alone, so the first 1,000 of 30,000 samples are those of an
evaluation with 1,000.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.data.folder import CaptionError, clean, lines, texts_of
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.files import digest
from matryoshka_diffusion.metrics.retrieval import choose_captions
from matryoshka_diffusion.rng import stream


@dataclass(frozen=True)
class Conditions:
    """The captions or classes of samples 0, 1, 2, ...; a model without either is given neither.

    Attributes:
        name: the rule, for people.
        identity: a hash of all that the rule depends on.
        caption: of sample i; None where there are none.
        label: the class of sample i; None where there are none.
        limit: how many samples the rule has conditions for; None if it never ends.
        pictures: the number of the picture that each of `limit` captions is of, where they are
            those of single pictures.
    """

    name: str
    identity: str
    caption: Callable[[int], str] | None = None
    label: Callable[[int], int] | None = None
    limit: int | None = None
    pictures: Sequence[int] = ()

    def of(self, rows: range) -> dict[str, Any]:
        """What `Matryoshka.sample` is given for these samples."""
        if self.caption is not None:
            return {"prompts": [self.caption(row) for row in rows]}
        if self.label is not None:
            return {"classes": [self.label(row) for row in rows]}
        return {"n": len(rows)}

    def captions(self, count: int) -> list[str]:
        """The captions of samples 0 .. count - 1; empty where there are none."""
        return [] if self.caption is None else [self.caption(row) for row in range(count)]


class Protocol(NamedTuple):
    """A published way of measuring: what is measured on how many samples."""

    metrics: tuple[str, ...]
    n: int


PROTOCOLS = {
    "coco30k": Protocol(("fid", "clip"), 30_000),
    "imagenet50k": Protocol(("fid",), 50_000),
}


def unconditional() -> Conditions:
    """Nothing is asked for."""
    return Conditions("without conditions", "")


def captions_in_turn(source: Source) -> Conditions:
    """The first caption of each picture in a shuffled order, over and over; see `_shuffled`.

    Raises:
        UsageError: the source has no captions.
    """
    texts = [captions[0] for captions in _captions_of(source)]
    name, order = f"the captions of {source.name}, shuffled", _shuffled(len(texts))
    return Conditions(name, _hash(texts), caption=lambda i: texts[order[i % len(order)]])


def labels_in_turn(source: Source) -> Conditions:
    """The class of each picture in a shuffled order, over and over; see `_shuffled`.

    Classes are known by decoding their pictures, so the identity has those of 4,096 pictures
    spread evenly (of all of a smaller set), and every key.

    Raises:
        UsageError: the source has no classes.
    """
    if not source.classes:
        raise UsageError(
            f"{source.name} has no classes to ask for: put its pictures into a folder for each, or "
            "ask for random ones (--protocol imagenet50k)"
        )

    def of_picture(index: int) -> int:
        found = source[index].label
        assert found is not None, "of a source with classes, each picture is of one"
        return found

    some = [str(of_picture(index)) for index in spread(len(source))]
    identity = _hash([source.name, *source.classes, *some, *source.keys])
    name, order = f"the classes of {source.name}, shuffled", _shuffled(len(source))
    return Conditions(name, identity, label=lambda i: of_picture(order[i % len(order)]))


def _shuffled(count: int) -> list[int]:
    """The pictures 0 .. count - 1 in an order drawn once and for all.

    Sources are often sorted by class: their first 1,000 pictures would be of one, and so would be
    each split of an Inception score.
    """
    return stream(0, "evaluation order").permutation(count).tolist()


def spread(count: int, most: int = 4096) -> range:
    """At most `most` of the numbers 0 .. count - 1, evenly apart."""
    return range(0, count, -(-count // most))


def random_labels(classes: int) -> Conditions:
    """Classes drawn uniformly, as in the paper's Appendix E ("randomly sampled class labels")."""

    def label(i: int) -> int:
        return int(stream(0, "evaluation classes", i).integers(classes))

    return Conditions(f"random classes of {classes}", _hash([str(classes)]), label=label)


def retrieval_captions(source: Source) -> Conditions:
    """128 captions (all, of a smaller source), the same ones for every model of this source.

    Raises:
        UsageError: the source has no captions.
    """
    indices, texts = choose_captions(_captions_of(source))
    return Conditions(
        f"{len(texts)} captions of {source.name}",
        _hash(texts),
        caption=texts.__getitem__,
        limit=len(texts),
        pictures=tuple(indices.tolist()),
    )


def _captions_of(source: Source) -> Sequence[tuple[str, ...]]:
    """Those of each picture. Raises UsageError if there are none."""
    if not source.captions:
        raise UsageError(
            f"{source.name} has no captions to ask for: add NAME.txt beside NAME.png or a "
            "metadata.jsonl, or, for all metrics but retrieval, name a file of them (--captions)"
        )
    return source.captions


def captions_of_file(path: Path) -> Conditions:
    """All captions of a file in an order drawn once and for all; n samples take its first n.

    Raises:
        UsageError: see `read_captions`.
    """
    texts = read_captions(path)
    order = stream(0, "evaluation captions").permutation(len(texts))
    return Conditions(
        f"captions of {path.name}",
        _hash(texts),
        caption=lambda i: texts[int(order[i])],
        limit=len(texts),
    )


def _hash(texts: Sequence[str]) -> str:
    return digest(json.dumps(list(texts)))


# --- files of captions -------------------------------------------------------------------------


def read_captions(path: Path) -> list[str]:
    """The captions of a file, in its order.

    It is the JSON of COCO's annotations (`annotations` with `id` and `caption`, taken in the order
    of their ids), a .jsonl or .csv with `text` or `caption`, or text with a caption in each line.

    Raises:
        UsageError: there is no such file, it is none of these, or it holds no caption.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file of captions")
    data = path.read_bytes()
    if path.suffix == ".json":
        texts = _of_coco(path, data)
    elif path.suffix in (".jsonl", ".csv"):
        texts = [text for row in _rows(path, data) for text in _first(texts_of(row))]
    else:
        texts = lines(data)
    try:
        captions = [clean([text])[0] for text in texts if text.strip()]
    except CaptionError as error:
        raise UsageError(f"{path}: {error}") from error
    if not captions:
        raise UsageError(f"{path} holds no captions")
    return captions


def _first(texts: Sequence[str]) -> Sequence[str]:
    """Of alternatives that say the same, one."""
    return texts[:1]


def _of_coco(path: Path, data: bytes) -> list[str]:
    try:
        annotations = json.loads(data)["annotations"]
        ordered = sorted(annotations, key=lambda annotation: int(annotation["id"]))
        return [str(annotation["caption"]) for annotation in ordered]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(
            f"{path} is no file of COCO annotations, such as captions_val2014.json: "
            f"'annotations' with 'id' and 'caption' ({type(error).__name__}: {error})"
        ) from error


def _rows(path: Path, data: bytes) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        try:
            return list(csv.DictReader(lines(data)))
        except csv.Error as error:
            raise UsageError(f"{path}: {error}") from error
    try:
        rows = [json.loads(line) for line in lines(data) if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no file of JSON lines ({error})") from error
    return [row for row in rows if isinstance(row, dict)]
