"""WebDataset shards: tar files of samples, read in place by their indices.

Since the place of every picture is known, any sample can be read at any time: length, order and
position are those of an ordinary source, and an epoch is shuffled as a whole, not by shards.
"""

from __future__ import annotations

from collections.abc import Sequence

from matryoshka_diffusion.data.batch import Source
from matryoshka_diffusion.data.blobs import Blob, expand, read_range, short_names, stat
from matryoshka_diffusion.data.decoded import workers
from matryoshka_diffusion.data.encoded import open_catalogue
from matryoshka_diffusion.data.images import Picture, PictureError, decode_picture
from matryoshka_diffusion.data.samples import Catalogue, Sample, judged
from matryoshka_diffusion.data.shard_index import Located, shard_index
from matryoshka_diffusion.data.store import look_ahead


def shards(pattern: str, side: int, max_bad_fraction: float) -> Source:
    """The samples of all shards that `pattern` stands for (see `blobs.expand`), in their order.

    Raises:
        OSError: a shard is not there or cannot be read.
        ValueError: a shard is compressed, no samples, or too many of them are bad.
        MissingExtra: the shards lie elsewhere, and fsspec is not installed.
    """
    paths = expand(pattern, ".tar")
    for path in paths:
        if not path.endswith(".tar"):
            raise ValueError(f"{path}: shards are plain .tar files, which can be read in any order")
    blobs, indices = _indexed(paths)
    located: list[Located] = []
    where: list[Blob] = []
    for blob, name, index in zip(blobs, short_names(paths), indices, strict=True):
        for sample, start, size in index:
            named = sample._replace(key=f"{name}:{sample.key}")
            located.append(Located(named, start, size))
            where.append(blob)

    def read(n: int, side: int) -> Picture:
        _, start, size = located[n]
        try:
            return decode_picture(read_range(where[n].path, start, size), side)
        except PictureError as error:
            raise PictureError(f"{error} (at byte {start:,})") from error

    # What a sample lacks shows only beside the others; it is told with its place, too.
    samples = [
        sample if known.flaw else _placed(sample, start)
        for sample, (known, start, _) in zip(
            judged([sample for sample, _, _ in located], ()), located, strict=True
        )
    ]
    catalogue = Catalogue(
        name=f"shards {pattern}",
        state="\n".join(f"{blob.path} {blob.size} {blob.stamp}" for blob in blobs),
        samples=samples,
        read=read,
    )
    return open_catalogue(catalogue, side, max_bad_fraction)


def _placed(sample: Sample, start: int) -> Sample:
    """With the offset in the shard behind the flaw, if it has one."""
    return sample._replace(flaw=f"{sample.flaw} (at byte {start:,})") if sample.flaw else sample


def _indexed(paths: Sequence[str]) -> tuple[list[Blob], list[list[Located]]]:
    from tqdm import tqdm

    def one(path: str) -> tuple[Blob, list[Located]]:
        blob = stat(path)
        return blob, shard_index(blob)

    found = look_ahead(one, paths, workers=workers(), depth=4 * workers())
    shown = tqdm(
        found, desc="indexing shards", total=len(paths), unit=" shards", leave=False, disable=None
    )
    pairs = list(shown)
    return [blob for blob, _ in pairs], [index for _, index in pairs]
