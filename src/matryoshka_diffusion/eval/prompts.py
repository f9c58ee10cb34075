"""Captions or classes for the samples of an evaluation: the same rule in every run.

Sample i's caption or class depends on i alone, so the first 1,000 of 30,000 samples are those of an
evaluation with 1,000.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL.Image import Image

from matryoshka_diffusion.cascade import Model
from matryoshka_diffusion.config import DataConfig, RunConfig, UsageError
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.data.spellings import Reader, Tally, clean, decoded, lines, read_table
from matryoshka_diffusion.draw import grid
from matryoshka_diffusion.files import digest
from matryoshka_diffusion.models.find import Progress
from matryoshka_diffusion.rng import choose, stream

MOST_SAMPLES = 10_000_000  # whose features lie in memory
MAX_HASHED = 4096  # images of a source: reading all takes as long as measuring


@dataclass(frozen=True)
class Conditions:
    """Captions or classes of samples 0, 1, 2, ...; neither for an unconditional model.

    `kind` is the argument of `Matryoshka.sample` that takes them, `at` gives that of sample i.
    """

    name: str
    identity: str = ""  # hash of everything that the rule depends on
    kind: Literal["prompts", "classes", "n"] = "n"
    at: Callable[[int], Any] = lambda i: None
    limit: int | None = None  # number of samples that the rule is for, if it ends
    pictures: Sequence[int] = ()  # images that the captions belong to, if they are of single ones

    def of(self, rows: range) -> dict[str, Any]:
        """Arguments of `Matryoshka.sample` for these samples."""
        return {self.kind: len(rows) if self.kind == "n" else [self.at(row) for row in rows]}

    def captions(self, count: int) -> list[str]:
        """Captions of samples 0 .. count - 1; empty if there are none."""
        return [self.at(row) for row in range(count)] if self.kind == "prompts" else []

    def check(self, n: int | None) -> int:
        """The number of samples. Raises `UsageError` if it is unknown or too large."""
        if n is None:
            raise UsageError("how many samples? give -n, or a metric such as fid50k that says so")
        if n > MOST_SAMPLES:
            raise UsageError(f"-n {n:,}: give at most {MOST_SAMPLES:,}")
        if self.limit is not None and self.limit < n:
            raise UsageError(
                f"{self.name}: there are {self.limit:,} for {n:,} samples; give -n {self.limit}, "
                "which the number then says"
            )
        return n


def in_turn(config: RunConfig, source: Source | None) -> Conditions:
    """The captions or classes of the training images, shuffled, over and over.

    Sources are often sorted by class: their first 1,000 images would be of one class, and so would
    each split of an Inception score. Raises `UsageError` if the source is missing or has none.
    """
    if config.model.text is None and not config.model.classes:
        return Conditions("without conditions")
    if source is None:
        raise UsageError(
            f"{config.name} needs captions or classes: give its training images, a file of "
            "captions (--captions), or random classes (--protocol imagenet50k)"
        )
    order = stream(0, "evaluation order").permutation(len(source)).tolist()
    if config.model.text is not None:
        texts = [captions[0] for captions in _captions_of(source)]
        name = f"the captions of {source.name}, shuffled"
        return Conditions(name, _hash(texts), "prompts", lambda i: texts[order[i % len(order)]])
    if not source.classes:
        raise UsageError(
            f"{source.name} has no classes to ask for: put its images into a folder for each, or "
            "ask for random ones (--protocol imagenet50k)"
        )
    # A class is known by decoding its image, so the hash has a part of the classes only.
    some = [str(source[index].label) for index in evenly_spread(len(source))]
    identity = _hash([source.name, *source.classes, *some, *source.keys])
    name = f"the classes of {source.name}, shuffled"
    return Conditions(name, identity, "classes", lambda i: source[order[i % len(order)]].label)


def evenly_spread(count: int) -> range:
    """At most `MAX_HASHED` of the numbers 0 .. count - 1, evenly apart."""
    return range(0, count, -(-count // MAX_HASHED))


def random_labels(classes: int) -> Conditions:
    """Classes drawn uniformly, as in the paper's Appendix E ("randomly sampled class labels")."""

    def label(i: int) -> int:
        return int(stream(0, "evaluation classes", i).integers(classes))

    return Conditions(f"random classes of {classes}", _hash([str(classes)]), "classes", label)


def retrieval_captions(
    config: RunConfig, source: Source | None, most: int, *, first: int = 0
) -> Conditions:
    """The first captions of `most` images (all, of a smaller source), the same for every model.

    A larger number adds images to those of a smaller one. `first` is the number of the source's
    first image in the reference.

    Raises `UsageError` if the model takes no captions, or the source is missing or has none.
    """
    if config.model.text is None:
        raise UsageError(f"{config.name} has no prompts to retrieve: omit the metric retrieval")
    if source is None:
        raise UsageError("retrieval needs the images that the model was trained on")
    captions = _captions_of(source)
    chosen = choose(len(captions), min(most, len(captions)), "retrieval").tolist()
    texts = [captions[index][0] for index in chosen]
    name, count = f"{len(texts)} captions of {source.name}", len(texts)
    pictures = tuple(first + index for index in chosen)
    return Conditions(name, _hash(texts), "prompts", texts.__getitem__, count, pictures)


def _captions_of(source: Source) -> Sequence[tuple[str, ...]]:
    if not source.captions:
        raise UsageError(
            f"{source.name} has no captions to ask for: add NAME.txt beside NAME.png or a "
            "metadata.jsonl, or, for all metrics but retrieval, name a file of them (--captions)"
        )
    return source.captions


def captions_of_file(path: Path) -> Conditions:
    """All captions of a file in a fixed random order; n samples take the first n of it."""
    texts = read_captions(path)
    order = stream(0, "evaluation captions").permutation(len(texts))
    name, count = f"captions of {path.name}", len(texts)
    return Conditions(name, _hash(texts), "prompts", lambda i: texts[int(order[i])], count)


def _hash(texts: Sequence[str]) -> str:
    return digest(json.dumps(list(texts)))


def read_captions(path: Path) -> list[str]:
    """Captions of a file, in its order.

    The file is COCO's annotations as .json (`annotations` with `id` and `caption`, taken in the
    order of their ids), a .jsonl or .csv with `text` or `caption`, or text with a caption a line.
    Raises `UsageError` if it is something else, or holds no caption.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".json":
            annotations = sorted(json.loads(data)["annotations"], key=lambda one: int(one["id"]))
            texts = [str(annotation["caption"]) for annotation in annotations]
        elif path.suffix in (".jsonl", ".csv"):
            if path.suffix == ".csv":
                table = read_table(str(path), decoded(data))[1]
                if flaws := [f"line {line}: {flaw}" for line, _, flaw in table if flaw]:
                    raise ValueError(flaws[0])
                rows = [row for _, row, _ in table]
            else:
                rows = [json.loads(line) for line in lines(data) if line.strip()]
            read = Reader(DataConfig(source="folder"), Tally()).read
            # Several texts in a row are alternatives, of which one is enough.
            texts = [text for row in rows if isinstance(row, dict) for text in read(row)[0][:1]]
        else:
            texts = lines(data)
        captions = [clean([text])[0] for text in texts if text.strip()]
        if not captions:
            raise ValueError("there are none")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(
            f"{path}: its captions cannot be read ({type(error).__name__}: {error}); give a .json "
            "of COCO annotations such as captions_val2014.json, a .jsonl or .csv with text or "
            "caption, or a text file with a caption in each line"
        ) from error
    return captions


# --- the sheet of the demo ---------------------------------------------------------------------

SHEET_PROMPTS = (
    # Plain things that a stranger can name, chosen by hand before any sample was seen.
    "red apple", "banana", "cat face", "dog face", "sunflower", "umbrella", "airplane", "bicycle",
    "hamburger", "ice cream", "snowman", "guitar", "soccer ball", "key", "crown", "cactus",
    "fish", "butterfly", "alarm clock", "flag of Japan",
)  # fmt: skip
UNSEEN_PROMPTS = ("purple apple", "blue banana", "green elephant", "pink airplane")
"""Things and colours that OpenMoji's captions have, but not together."""


def demo_sheet(model: Model, source: Source, *, progress: Progress | None = None) -> Image:
    """Draw 20 prompts at every level beside their real images of OpenMoji, and 4 unseen ones."""
    by_caption = {text: i for i in range(len(source)) for text in source[i].captions}
    prompts = [*SHEET_PROMPTS, *UNSEEN_PROMPTS]
    levels = model.sample(prompts, progress=progress).levels
    real = [source[by_caption[prompt]].picture for prompt in SHEET_PROMPTS]
    real += [None] * len(UNSEEN_PROMPTS)
    return grid.grid(
        [[*row, picture] for row, picture in zip(zip(*levels, strict=True), real, strict=True)],
        captions=prompts,
        marks=["unseen combination" if picture is None else None for picture in real],
        columns_titles=[*grid.titles_of_levels(levels), "real image"],
        title=f"{model.config.name}: every level of a sample, and the image of its caption",
        cell=grid.cell_of(levels),
        blocks=2,  # 24 rows in one column would be three times as high as wide
    )
