"""WebDataset shards: tar files of samples, read in place by their indices.

Since the place of every picture is known, any sample can be read at any time: length, order and
position are those of an ordinary source, and an epoch is shuffled as a whole, not by shards.
"""

from __future__ import annotations

from collections.abc import Sequence

from matryoshka_diffusion.config import Crop
from matryoshka_diffusion.data.batch import Source
from matryoshka_diffusion.data.blobs import Blob, expand, read_range, short_names, stat
from matryoshka_diffusion.data.decoded import workers
from matryoshka_diffusion.data.encoded import PictureDecoder, open_catalogue
from matryoshka_diffusion.data.images import PICTURES, Kind
from matryoshka_diffusion.data.samples import Catalogue
from matryoshka_diffusion.data.shard_index import Located, shard_index
from matryoshka_diffusion.data.store import look_ahead


def shards(pattern: str, side: int, max_bad_fraction: float, crop: Crop = "centre") -> Source:
    """The pictures of all shards that `pattern` stands for (see `blobs.expand`), in their order.

    Raises:
        OSError: a shard is not there or cannot be read.
        ValueError: a shard is compressed, no samples, or too many of them are bad.
        MissingExtra: the shards lie elsewhere, and fsspec is not installed.
    """
    return open_catalogue(sharded(pattern), PictureDecoder(side, crop), max_bad_fraction)


def sharded(pattern: str, kind: Kind = PICTURES) -> Catalogue:
    """The samples of the shards whose files are of that kind. Raises as `shards`."""
    paths = expand(pattern, ".tar")
    for path in paths:
        if not path.endswith(".tar"):
            raise ValueError(f"{path}: shards are plain .tar files, which can be read in any order")
    blobs, indices = _indexed(paths, kind)
    located: list[Located] = []
    where: list[Blob] = []
    for blob, name, index in zip(blobs, short_names(paths), indices, strict=True):
        for sample, size in index:
            named = sample._replace(key=f"{name}:{sample.key}")
            located.append(Located(named, size))
            where.append(blob)

    def load(n: int) -> bytes:
        sample, size = located[n]
        assert sample.offset is not None, "the index says where a sample lies"
        return read_range(where[n].path, sample.offset, size)

    return Catalogue(
        name=f"shards {pattern}",
        state="\n".join(f"{blob.path} {blob.size} {blob.stamp}" for blob in blobs),
        samples=[sample for sample, _ in located],
        load=load,
    )


def _indexed(paths: Sequence[str], kind: Kind) -> tuple[list[Blob], list[list[Located]]]:
    from tqdm import tqdm

    def one(path: str) -> tuple[Blob, list[Located]]:
        blob = stat(path)
        return blob, shard_index(blob, kind)

    found = look_ahead(one, paths, workers=workers(), depth=4 * workers())
    shown = tqdm(
        found, desc="indexing shards", total=len(paths), unit=" shards", leave=False, disable=None
    )
    pairs = list(shown)
    return [blob for blob, _ in pairs], [index for _, index in pairs]
