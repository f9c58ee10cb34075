"""Features of captions on disk: read where they are stored, encoded where they are not."""

from __future__ import annotations

import json
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from matryoshka_diffusion.files import cache_folder, digest, remove_stale, write_atomically
from matryoshka_diffusion.tensorfile import open_tensors
from matryoshka_diffusion.text.encoder import HiddenStates

Progress = Callable[[int, int], None]
"""Called with captions done and captions to do."""

CAPTION_OVERHEAD_BYTES = 52
"""Bytes beside the features of a caption: its digest in JSON, an offset and a checksum."""

_BATCH = 64
_LOOKUP = 65_536
_SAMPLE = 1_000

# A chunk is written when it has so many captions, bytes, or seconds of work in it.
_CHUNK = 4096
_BYTES = 2**28
_SECONDS = 60.0

_NAME = "S16"  # digests as bytes, which numpy sorts and searches


class RaggedStore:
    """Arrays of (n, width) numbers in `dtype`, n differing, found by text: a folder of safetensors.

    A file holds `values` (all rows of its entries, one after the other), `offsets` and `checksums`,
    and the digests of its texts as JSON in the header, behind a hash of all but the values. It is
    written whole, named by its content and changed by `mend` alone, so several processes may fill
    one folder. Values are mapped into memory; the index, made from the headers, takes 44 bytes an
    entry.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype) -> None:
        self.folder, self.width, self.dtype = folder, width, dtype
        self._paths: list[Path] = []
        self._values: dict[int, Any] = {}
        self._index = _Index(*(np.empty(0, kind) for kind in (_NAME, "i4", "i8", "i8", "i8")))
        self._new: list[_Index] = []
        for path in sorted(folder.glob("*.safetensors")):
            self._add_to_index(path)

    def __len__(self) -> int:
        """Number of entries."""
        return len(np.unique(self._sorted_index().names))

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self._paths)

    def find(self, texts: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Place of each text's entry, for `read`; -1 where there is none."""
        index = self._sorted_index()
        names = np.array([bytes.fromhex(digest(text)) for text in texts], _NAME)
        if not len(index.names):
            return np.full(len(texts), -1)
        places = np.searchsorted(index.names, names)
        places[places == len(index.names)] = 0
        return np.where(index.names[places] == names, places, -1)

    def read(self, place: int) -> Float[Tensor, "n d"] | None:
        """The entry at a place that `find` returned, in float32; None if a byte has changed."""
        index = self._sorted_index()
        file = int(index.files[place])
        if file not in self._values:
            self._values[file] = safe_open(self._paths[file], "pt").get_slice("values")
        rows = self._values[file][int(index.begins[place]) : int(index.ends[place])]
        return rows.float() if _checksum(rows) == index.checksums[place] else None

    def write(self, texts: Sequence[str], arrays: Sequence[Float[Tensor, "_ d"]]) -> None:
        """Add a file. Raises OSError with the path and, on a full disk, the bytes needed."""
        lengths = torch.tensor([0, *(len(array) for array in arrays)])
        entries = [array.to(self.dtype) for array in arrays]
        tensors = {"values": torch.cat(entries), "offsets": lengths.cumsum(0)}
        tensors["checksums"] = torch.tensor(list(map(_checksum, entries)))
        names = [digest(text) for text in texts]
        path = self.folder / f"{digest(' '.join(names))}.safetensors"
        self._write(path, tensors, json.dumps(names))
        self._add_to_index(path)

    def mend(self, place: int, array: Float[Tensor, "n d"]) -> None:
        """Make an entry anew that `read` refused."""
        index = self._sorted_index()
        file, begin, end = (int(column[place]) for column in index[1:4])
        path, entry = self._paths[file], array.to(self.dtype)
        warnings.warn(f"{path}: an entry is corrupt and is made again", stacklevel=4)
        with suppress(OSError, SafetensorError):  # of a read-only or vanished file
            with safe_open(path, "pt") as old:
                tensors = {name: old.get_tensor(name) for name in old.keys()}  # noqa: SIM118
                names = old.metadata()["captions"].partition("\n")[2]
            tensors["values"][begin:end] = entry
            number = int(torch.searchsorted(tensors["offsets"], begin, right=True)) - 1
            tensors["checksums"][number] = _checksum(entry)
            self._write(path, tensors, names)
            index.checksums[place] = _checksum(entry)
            self._values.pop(file, None)

    def _write(self, path: Path, tensors: dict[str, Tensor], names: str) -> None:
        data = save(tensors, {"captions": f"{_seal(names, tensors)}\n{names}"})
        write_atomically(path, lambda file: file.write(data), needed=len(data))

    def tidy(self) -> None:
        """Remove temporary files of processes that were killed long ago."""
        for path in self.folder.glob(".*.tmp"):
            remove_stale(path)

    def _add_to_index(self, path: Path) -> None:
        """Index a file; remove a corrupt one. Another process may remove it at any time."""
        try:
            self._new.append(self._index_of(path))
        except FileNotFoundError:
            return
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            warnings.warn(f"{path} is corrupt and is made again ({error})", stacklevel=4)
            path.unlink(missing_ok=True)
        else:
            self._paths.append(path)

    def _index_of(self, path: Path) -> _Index:
        with open_tensors(path) as file:
            seal, _, about = file.metadata()["captions"].partition("\n")
            names = json.loads(about)
            small = {name: file.get_tensor(name) for name in ("offsets", "checksums")}
            if _seal(about, small) != seal:
                raise ValueError("its seal is broken")
            offsets, checksums = (tensor.numpy() for tensor in small.values())
            values = file.get_slice("values")
            if values.get_shape() != [offsets[-1], self.width]:
                raise ValueError("its values have another shape")
            if values[:0].dtype != self.dtype:
                raise ValueError("its values have another type")
            if len(offsets) != len(names) + 1:
                raise ValueError("it has not as many entries as names")
        digests = np.frombuffer(bytes.fromhex("".join(names)), _NAME)
        number = np.full(len(names), len(self._paths), "i4")
        return _Index(digests, number, offsets[:-1], offsets[1:], checksums)

    def _sorted_index(self) -> _Index:
        """The index in the order of its names, sorted when it is used after a change."""
        if self._new:
            parts, self._new = [self._index, *self._new], []
            whole = _Index(*(np.concatenate(column) for column in zip(*parts, strict=True)))
            order = np.argsort(whole.names, kind="stable")
            self._index = _Index(*(column[order] for column in whole))
        return self._index


class _Index(NamedTuple):
    """One row for each entry: its digest, its file, and its rows `begin .. end - 1` there."""

    names: np.ndarray
    files: np.ndarray
    begins: np.ndarray
    ends: np.ndarray
    checksums: np.ndarray


def _checksum(rows: Tensor) -> int:
    """CRC-32 of an entry's numbers as they are stored."""
    return zlib.crc32(rows.contiguous().view(torch.uint8).numpy().data)


def _seal(names: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash of everything in a file but its values."""
    return digest(names + str([tensors[name].tolist() for name in ("offsets", "checksums")]))


class Estimate(NamedTuple):
    """Captions that are not stored yet, and the size of their features.

    Attributes:
        captions: number of different captions, stored ones included.
        missing: the captions without stored features.
        tokens: mean number of tokens of the missing captions, from a sample.
        cut: share of the missing captions that have more tokens than are used.
        needed: approximate size of their features in bytes.
    """

    captions: int
    missing: list[str]
    tokens: float
    cut: float
    needed: int


class FeatureCache:
    """A text encoder with a memory: stored features are read from disk, others are encoded.

    Only `add` stores. The folder belongs to the encoder: another model, tokenizer, length or
    precision has another key.
    """

    def __init__(self, encoder: HiddenStates, folder: Path | None = None) -> None:
        self.encoder = encoder
        self.key, self.width = encoder.key, encoder.width
        self.folder = cache_folder("text", encoder.key) if folder is None else folder
        self.store = RaggedStore(self.folder, encoder.width, encoder.dtype)

    def __call__(self, captions: Sequence[str]) -> list[Float[Tensor, "n d"]]:
        """Features of each caption in float32; each different one is read or encoded once."""
        unique = list(dict.fromkeys(captions))
        places = dict(zip(unique, self.store.find(unique).tolist(), strict=True))
        stored = {text: self.store.read(place) for text, place in places.items() if place >= 0}
        features = {text: entry for text, entry in stored.items() if entry is not None}
        missing = [text for text in unique if text not in features]
        features |= dict(zip(missing, self.encoder(missing), strict=True)) if missing else {}
        for text in stored.keys() & missing:
            self.store.mend(places[text], features[text])
        return [features[caption] for caption in captions]

    def varied(self, captions: Sequence[str]) -> Float[Tensor, "n d"] | None:
        """Mean features of captions, so many that their covariance is known; None if too few."""
        enough = 4 * self.width
        if len(captions) < enough:
            return None
        return torch.stack([x.mean(dim=0) for x in self(_spread(captions, max(enough, _CHUNK)))])

    def estimate(self, captions: Sequence[str]) -> Estimate:
        """Size of what `add` would store for these captions; nothing is encoded."""
        unique = list(dict.fromkeys(captions))
        missing = self._missing(unique)
        limit = self.encoder.max_tokens
        counts = self.encoder.token_counts(_spread(missing, _SAMPLE)) if missing else [0]
        tokens = sum(min(count, limit) for count in counts) / len(counts)
        size = tokens * self.width * self.encoder.dtype.itemsize + CAPTION_OVERHEAD_BYTES
        cut = sum(count > limit for count in counts) / len(counts)
        return Estimate(len(unique), missing, tokens, cut, round(len(missing) * size))

    def seconds(self, missing: Sequence[str]) -> float:
        """Estimated duration of storing, from one batch or a tenth of the captions."""
        sample = sorted(_spread(missing, _SAMPLE), key=len)
        count = min(_BATCH, max(1, len(missing) // 10))
        middle = max(0, (len(sample) - count) // 2)
        self.encoder(sample[:1])  # the first call is slower than all others
        began = time.perf_counter()
        self.encoder(sample[middle : middle + count])
        return (time.perf_counter() - began) / count * len(missing)

    def add(self, captions: Sequence[str], progress: Progress | None = None) -> None:
        """Encode and store the features of captions that are not stored yet.

        An interruption, kill -9 included, costs the chunk in the making: a minute of work at most.
        Captions of similar length are encoded together, so that little is padded.

        Raises:
            OSError: the features cannot be written.
        """
        missing = self._missing(list(dict.fromkeys(captions)))
        self.store.tidy()
        done = 0
        try:
            for window in _parts(missing, _CHUNK):
                texts: list[str] = []
                arrays: list[Tensor] = []
                began = time.monotonic()
                for batch in _parts(sorted(window, key=lambda text: (len(text), text)), _BATCH):
                    full = sum(array.nbytes for array in arrays) >= _BYTES
                    if texts and (full or time.monotonic() - began >= _SECONDS):
                        self.store.write(texts, arrays)
                        texts, arrays, began = [], [], time.monotonic()
                    texts += batch
                    arrays += [array.to(self.encoder.dtype) for array in self.encoder(batch)]
                    done += len(batch)
                    if progress is not None:
                        progress(done, len(missing))
                self.store.write(texts, arrays)
        finally:
            self.encoder.rest()

    def _missing(self, unique: Sequence[str]) -> list[str]:
        return [
            caption
            for part in _parts(unique, _LOOKUP)
            for caption, place in zip(part, self.store.find(part).tolist(), strict=True)
            if place < 0
        ]


def _parts(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _spread(items: Sequence[str], count: int) -> list[str]:
    """At most `count` items, evenly spread over all."""
    count = min(count, len(items))
    return [items[n * len(items) // count] for n in range(count)]
