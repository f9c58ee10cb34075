"""Features of captions: read where they were stored, made on the fly where they were not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from matryoshka_diffusion.files import cache_folder
from matryoshka_diffusion.text.chunks import OVERHEAD, Chunks
from matryoshka_diffusion.text.encoder import Storable
from matryoshka_diffusion.text.plan import Plan

Progress = Callable[[int, int], None]
"""Called with captions done and captions to do."""

_BATCH = 64
_LOOKUP = 65_536
_SAMPLE = 1_000

# A chunk is written when it has so many captions, so many bytes, or so many seconds in it.
_CHUNK = 4096
_BYTES = 2**28
_SECONDS = 60.0


class FeatureCache:
    """A `TextEncoder` with a memory: what was stored is read from disk, the rest is encoded.

    Nothing is stored unless `add` is called. The folder is the encoder's own: another model,
    tokenizer, length or precision has another key.
    """

    def __init__(self, encoder: Storable, folder: Path | None = None) -> None:
        self.encoder = encoder
        self.key = encoder.key
        self.width = encoder.width
        self.folder = cache_folder("text", encoder.key) if folder is None else folder
        self.chunks = Chunks(self.folder, encoder.width, encoder.dtype)

    def __call__(self, captions: Sequence[str]) -> list[Float[Tensor, "n d"]]:
        """Features of each caption in float32; every different one is read or encoded once."""
        different = list(dict.fromkeys(captions))
        rows = self.chunks.find(different).tolist()
        missing = [caption for caption, row in zip(different, rows, strict=True) if row < 0]
        features = dict(zip(missing, self.encoder(missing), strict=True)) if missing else {}
        for caption, row in zip(different, rows, strict=True):
            if row >= 0:
                features[caption] = self.chunks.read(row)
        return [features[caption] for caption in captions]

    def plan(self, captions: Sequence[str]) -> Plan:
        """What `add` of these captions would take; nothing is encoded."""
        different = list(dict.fromkeys(captions))
        missing = self._missing(different)
        longest = self.encoder.max_tokens
        counts = self.encoder.token_counts(_spread(missing, _SAMPLE)) if missing else [0]
        tokens = sum(min(count, longest) for count in counts) / len(counts)
        size = tokens * self.width * self.encoder.dtype.itemsize + OVERHEAD
        return Plan(
            captions=len(different),
            missing=missing,
            tokens=tokens,
            cut=sum(count > longest for count in counts) / len(counts),
            needed=round(len(missing) * size),
            folder=self.folder,
        )

    def seconds(self, plan: Plan) -> float:
        """How long storing would take, from at most a tenth of the captions, at most one batch."""
        sample = sorted(_spread(plan.missing, _SAMPLE), key=len)
        count = min(_BATCH, max(1, len(plan.missing) // 10))
        middle = max(0, (len(sample) - count) // 2)
        self.encoder(sample[:1])  # what is only slow once
        began = time.perf_counter()
        self.encoder(sample[middle : middle + count])
        return (time.perf_counter() - began) / count * len(plan.missing)

    def add(self, captions: Sequence[str], progress: Progress | None = None) -> None:
        """Store the features of captions; those that are stored already cost a look.

        What interrupts this, kill -9 included, costs the chunk it was at: a minute's work at most.
        Captions of like length are encoded together, so that little is padded.

        Raises:
            OSError: the features cannot be written.
        """
        missing = self._missing(list(dict.fromkeys(captions)))
        self.chunks.tidy()
        done = 0
        try:
            for window in _parts(missing, _CHUNK):
                growing = _Chunk()
                for batch in _parts(sorted(window, key=lambda x: (len(x), x)), _BATCH):
                    if growing.is_full:
                        self.chunks.write(growing.captions, growing.features)
                        growing = _Chunk()
                    growing.take(batch, [x.to(self.encoder.dtype) for x in self.encoder(batch)])
                    done += len(batch)
                    if progress is not None:
                        progress(done, len(missing))
                self.chunks.write(growing.captions, growing.features)
        finally:
            self.encoder.rest()

    def _missing(self, different: Sequence[str]) -> list[str]:
        return [
            caption
            for part in _parts(different, _LOOKUP)
            for caption, row in zip(part, self.chunks.find(part).tolist(), strict=True)
            if row < 0
        ]


class _Chunk:
    """A chunk that is being filled."""

    def __init__(self) -> None:
        self.captions: list[str] = []
        self.features: list[Tensor] = []
        self._bytes = 0
        self._began = time.monotonic()

    def take(self, captions: Sequence[str], features: Sequence[Tensor]) -> None:
        self.captions += captions
        self.features += features
        self._bytes += sum(x.nbytes for x in features)

    @property
    def is_full(self) -> bool:
        old = time.monotonic() - self._began >= _SECONDS
        return bool(self.captions) and (old or self._bytes >= _BYTES)


def _parts(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _spread(items: Sequence[str], count: int) -> list[str]:
    """At most `count` items, evenly spread over all."""
    return (
        [items[n * len(items) // count] for n in range(count)] if len(items) > count else [*items]
    )


def pad(
    features: Sequence[Float[Tensor, "_ d"]],
) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
    """Stack features, with zeros after the shorter ones, and mark the tokens that are real."""
    lengths = torch.tensor([len(feature) for feature in features])
    stacked = pad_sequence(list(features), batch_first=True)
    return stacked, torch.arange(stacked.shape[1]) < lengths[:, None]
