"""Features of captions, computed once: a folder of safetensors shards for each encoder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from matryoshka_diffusion.files import cache_folder, digest, write_atomically
from matryoshka_diffusion.text.encoder import TextEncoder

_BATCH = 64
_SHARD = 4096


class _Place(NamedTuple):
    """The tokens `begin .. end - 1` of a shard."""

    shard: Path
    begin: int
    end: int


class FeatureCache:
    """A `TextEncoder` with a memory: what was encoded once is read from disk.

    A shard holds `values` (all tokens of its captions, one after the other) and `offsets`, and
    the digests of its captions as JSON in the header; it is written whole and never changed.
    Shards are mapped into memory, not read.
    """

    def __init__(self, encoder: TextEncoder, folder: Path | None = None) -> None:
        self.encoder = encoder
        self.key = encoder.key
        self.width = encoder.width
        self.folder = cache_folder("text", encoder.key) if folder is None else folder
        self._places: dict[str, _Place] = {}
        self._values: dict[Path, Any] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def __call__(self, captions: Sequence[str]) -> list[Float[Tensor, "n d"]]:
        """Features of each caption; those never seen are encoded first, with a progress bar.

        Raises:
            OSError: the cache cannot be written.
        """
        names = {caption: digest(caption) for caption in captions}
        missing = [caption for caption, name in names.items() if name not in self._places]
        if missing:
            self._add(missing)
        return [self._read(self._places[names[caption]]) for caption in captions]

    def _read(self, place: _Place) -> Tensor:
        if place.shard not in self._values:
            self._values[place.shard] = safe_open(place.shard, "pt").get_slice("values")
        return self._values[place.shard][place.begin : place.end]

    def _index(self, path: Path) -> None:
        """Note where the captions of a shard lie; a shard that makes no sense is removed."""
        try:
            with safe_open(path, "pt") as shard:
                names = json.loads(shard.metadata()["captions"])
                offsets = shard.get_tensor("offsets").tolist()
                if shard.get_slice("values").get_shape() != [offsets[-1], self.width]:
                    raise ValueError("its features have another shape")
            spans = zip(names, offsets[:-1], offsets[1:], strict=True)
            places = {name: _Place(path, begin, end) for name, begin, end in spans}
        except (SafetensorError, ValueError, LookupError, TypeError) as error:
            warnings.warn(f"{path} is corrupt and is made again ({error})", stacklevel=3)
            path.unlink()
        else:
            self._places |= places

    def _add(self, captions: list[str]) -> None:
        """Encode, those of like length together so that little is padded, and write the shards."""
        from tqdm import tqdm

        captions = sorted(captions, key=lambda caption: (len(caption), caption))
        with tqdm(total=len(captions), desc="encoding captions", disable=None, delay=1) as bar:
            for shard in _chunks(captions, _SHARD):
                features = []
                for batch in _chunks(shard, _BATCH):
                    features += self.encoder(batch)
                    bar.update(len(batch))
                self._write([digest(caption) for caption in shard], features)

    def _write(self, names: list[str], features: list[Tensor]) -> None:
        lengths = torch.tensor([0, *(len(feature) for feature in features)])
        tensors = {"values": torch.cat(features), "offsets": lengths.cumsum(0)}
        data = save(tensors, {"captions": json.dumps(names)})
        path = self.folder / f"{digest(' '.join(names))}.safetensors"
        write_atomically(path, lambda file: file.write(data), needed=len(data))
        self._index(path)


def _chunks(items: list[str], size: int) -> Iterator[list[str]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def pad(
    features: Sequence[Float[Tensor, "_ d"]],
) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
    """Stack features, with zeros after the shorter ones, and mark the tokens that are real."""
    lengths = torch.tensor([len(feature) for feature in features])
    stacked = pad_sequence(list(features), batch_first=True)
    return stacked, torch.arange(stacked.shape[1]) < lengths[:, None]
