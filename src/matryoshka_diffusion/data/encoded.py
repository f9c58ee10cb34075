"""From a catalogue of encoded pictures or videos to a source: decoded once, or on demand.

What is small goes into an array on disk, which makes later epochs cheap. A larger set would fill
the disk: its pictures are decoded when they are asked for, a batch at a time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from matryoshka_diffusion.config import Crop
from matryoshka_diffusion.data.bad import BadFile, NoneUsable, Quarantine, refuse_too_many
from matryoshka_diffusion.data.batch import Example, Pictures, Source, with_cuts
from matryoshka_diffusion.data.crop import Cut, cut_square
from matryoshka_diffusion.data.decoded import decode_once, workers
from matryoshka_diffusion.data.images import Picture, PictureError, decode_picture, read_picture
from matryoshka_diffusion.data.samples import Catalogue, Decoder, class_names, judged
from matryoshka_diffusion.data.store import look_ahead
from matryoshka_diffusion.files import cache_folder, digest

DECODED_ONCE = 20_000
"""Pictures; at 256 pixels a side they take 4 GB."""


@dataclass(frozen=True)
class PictureDecoder:
    """Makes a picture of a file. A `Decoder`."""

    side: int
    crop: Crop = "centre"
    frames: None = None

    @property
    def options(self) -> str:
        return f"{self.side}, {self.crop}"

    def decodes_once(self, count: int) -> bool:
        return count <= DECODED_ONCE

    def __call__(self, file: bytes | Path, key: str, start: float | None = None) -> Picture:
        if isinstance(file, bytes):
            return decode_picture(file, self.side, self.crop)
        return read_picture(file, self.side, self.crop)


def open_catalogue(catalogue: Catalogue, decoder: Decoder, max_bad_fraction: float) -> Source:
    """The good samples of a catalogue in its order, as what the decoder makes of them.

    Raises:
        NoneUsable: there are no samples, or all of them are bad.
        ValueError: more than `max_bad_fraction` of them are bad. Of a set that is decoded on
            demand, the same error comes when that many have turned out bad.
        OSError: the cache cannot be written.
    """
    if not catalogue.samples:
        said = f"{catalogue.name} holds no sample: name other data (--data, data.path)"
        raise NoneUsable(said, ())
    samples = judged(catalogue.samples, catalogue.classes)
    bad = [BadFile(x.key, x.flaw, x.offset) for x in samples if x.flaw]
    refuse_too_many(catalogue.name, bad, len(samples), max_bad_fraction)
    rows = [n for n, sample in enumerate(samples) if not sample.flaw]
    kept = [samples[row] for row in rows]
    good = replace(
        catalogue,
        samples=kept,
        load=lambda n: catalogue.load(rows[n]),
        classes=class_names(kept, catalogue.classes),
    )
    if decoder.decodes_once(len(kept)):
        return _decoded(good, decoder, bad, max_bad_fraction)
    return PicturesOnDemand(good, decoder, bad, max_bad_fraction)


def _decoded(
    good: Catalogue, decoder: Decoder, bad: Sequence[BadFile], max_bad_fraction: float
) -> Pictures:
    samples = good.samples
    decoded = decode_once(
        cache_folder("decoded", digest(f"{good.name} at {decoder.options}")),
        "\n".join([good.state, *(sample.key for sample in samples)]),
        len(samples),
        lambda n: decoder(good.load(n), samples[n].key),
        decoder.side,
        f"decoding at {decoder.side} px",
        decoder.frames,
    )
    found = (
        BadFile(samples[n].key, reason, samples[n].offset) for n, reason in decoded.bad.items()
    )
    all_bad = sorted([*bad, *found])
    refuse_too_many(good.name, all_bad, len(samples) + len(bad), max_bad_fraction)
    rows = [row for row in range(len(samples)) if row not in decoded.bad]
    sides = [samples[row].original_side or decoded.original_sides[row] for row in rows]
    captions = [samples[row].captions for row in rows]
    labels = [label for row in rows if (label := samples[row].label) is not None]
    return Pictures(
        name=good.name,
        array=decoded.pictures,
        rows=rows,
        keys=[samples[row].key for row in rows],
        original_sides=sides,
        captions=captions if captions[0] else None,
        labels=labels or None,
        classes=good.classes,
        bad=tuple(all_bad),
    )


class PicturesOnDemand:
    """A `Source` that decodes a picture or a clip whenever it is asked for.

    A picture that turns out bad is replaced by the next good one (of those it is asked for among),
    so what is at an index depends on the data alone: not on what was read before, nor on the number
    of threads.
    """

    channels = 3

    def __init__(
        self,
        good: Catalogue,
        decoder: Decoder,
        bad: Sequence[BadFile],
        max_bad_fraction: float,
    ) -> None:
        captions = [sample.captions for sample in good.samples]
        self.name, self.classes = good.name, good.classes
        self.side, self.frames = decoder.side, decoder.frames
        self.captions = captions if captions[0] else None
        self.keys = [sample.key for sample in good.samples]
        self._samples, self._load, self._decode = good.samples, good.load, decoder
        self.total = len(good.samples) + len(bad)
        self.quarantine = Quarantine(good.name, bad, self.total, max_bad_fraction)

    @property
    def bad(self) -> tuple[BadFile, ...]:
        """What was refused at the start, and what has turned out bad since."""
        return self.quarantine.bad

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Example:
        return self.many([range(len(self))[index]])[0]

    def many(
        self,
        indices: Sequence[int],
        cuts: Sequence[Cut] | None = None,
        among: Sequence[int] | None = None,
    ) -> list[Example]:
        """The examples at `indices`, decoded in several threads."""
        pairs = with_cuts(indices, cuts)
        allowed = range(len(self)) if among is None else among
        read = partial(self._example, among=allowed)
        return list(look_ahead(read, pairs, workers=workers(), depth=len(pairs)))

    def _example(self, at: tuple[int, Cut], among: Sequence[int]) -> Example:
        index, cut = at
        for n in self._from(index, among):
            sample = self._samples[n]
            try:
                picture = self._decode(self._load(n), sample.key, cut.start)
            except PictureError as error:
                self.quarantine.add(BadFile(sample.key, str(error), sample.offset))
                continue
            return Example(
                picture=cut_square(picture.pixels, cut.place),
                captions=sample.captions,
                label=sample.label,
                key=sample.key,
                original_side=sample.original_side or picture.original_side,
            )
        raise ValueError(f"{self.name}: not one of {len(among):,} samples can be read")

    def _from(self, index: int, among: Sequence[int]) -> Iterator[int]:
        """The index, which is one of `among`, and after it those that stand in for it."""
        first = bisect_left(among, index)
        for step in range(len(among)):
            n = among[(first + step) % len(among)]
            if self.keys[n] not in self.quarantine:
                yield n
