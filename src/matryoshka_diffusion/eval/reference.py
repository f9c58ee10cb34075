"""References of samples: real images, or the moments that ADM's .npz files hold.

FID is defined between sets of one resolution. Images of a source are cropped to squares and resized
to the side of the samples as training images are, and the name of the number says how many of them,
unless they are the model's own data. A small share of them may be enlarged: published numbers on
COCO resize every image of val2014, the few below 256 pixels as well. More than that is refused, and
so is an .npz of another resolution.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from matryoshka_diffusion.config import DataConfig, UsageError
from matryoshka_diffusion.data.augment import Cut
from matryoshka_diffusion.data.image import SUFFIXES
from matryoshka_diffusion.data.shapes import square
from matryoshka_diffusion.data.source import (
    Picture,
    Source,
    absolute,
    kind_of,
    open_source,
    sourced,
)
from matryoshka_diffusion.draw.grid import SHEETS
from matryoshka_diffusion.eval.feature_store import (
    FORMAT,
    SIZES,
    PictureBatch,
    PictureSet,
    pictures_of,
)
from matryoshka_diffusion.files import cache_folder
from matryoshka_diffusion.metrics.formulas import Moments
from matryoshka_diffusion.metrics.inception import WIDTH
from matryoshka_diffusion.models.find import WEIGHTS, Progress
from matryoshka_diffusion.pyramid import Resolution, shrink
from matryoshka_diffusion.sizes import batch_of
from matryoshka_diffusion.training.distributed import ALONE, World

MAX_ENLARGED = 0.05
"""Largest share of images below the compared side in a reference."""

_NO_ARCHIVE = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError)
"""Errors of zipfile for damage, unknown compression and passwords."""


@dataclass(frozen=True)
class Reference:
    """A set of real images, or published moments of Inception's features, or both."""

    name: str
    pictures: PictureSet | None
    published: Moments | None = None
    foreign: bool = False  # images that may have been resized, not the model's own data

    def flag(
        self, side: int, what: str, *, world: World = ALONE, progress: Progress | None = None
    ) -> str | None:
        """The remark on how these images, called `what`, came to `side` pixels; a collective.

        Raises `UsageError` if they have another resolution, or if too many were enlarged.
        """
        if self.pictures is None:
            return f"{what} of unstated resolution"
        if self.pictures.side != side:
            raise UsageError(
                f"{self.name} has images of {self.pictures.side} pixels a side, the samples have "
                f"{side}: no distance is defined between resolutions"
            )
        if not self.foreign:
            return None
        self.pictures.fill([SIZES], world=world, progress=progress)
        sizes = self.pictures.all(SIZES)
        sides = sizes.min(axis=1)
        small = sides[sides < side]
        if len(small) > MAX_ENLARGED * len(sides):
            raise UsageError(
                f"{self.name}: {len(small):,} of {len(sides):,} images have fewer than the "
                f"{side} pixels a side that are compared (the first one has {small[0]}): remove "
                f"them, or compare at a smaller side; at most {MAX_ENLARGED:.0%} may be enlarged"
            )
        changes = {
            "cut to squares": sizes.max(axis=1) > sides,
            f"shrunk to {side}": sides > side,
            f"enlarged to {side}": sides < side,
        }
        words = [
            change if rows.all() else f"{rows.sum():,} of {len(rows):,} {change}"
            for change, rows in changes.items()
            if rows.any()
        ]
        return f"{what} {', '.join(words)}" if words else None


def reference_of(source: Source, data: DataConfig, *, prefix: str = "") -> Reference:
    """All images of a model's own source as a reference.

    The name says how clips are cut from videos, and that images are squares where training keeps
    their shapes. `prefix` precedes it.
    """
    name = prefix + source.name + ", cut to squares" * (data.shapes == "own")
    if source.frames is not None:
        rate = "" if data.fps is None else f" at {data.fps:g} fps"
        begin = "the start" if data.clip == "start" else "a fixed place"
        name += f", frame stride {data.frame_stride}{rate}, from {begin}"
    return Reference(name, pictures_of(source, cache_folder("references")))


def shrunk(source: Source, side: int, frames: int | None) -> Source:
    """D^r of a source: the images or clips that a model of smaller ones learns from."""
    grid = Resolution(side, side, frames)

    def read(index: int, cut: Cut) -> Picture:
        picture = source.read(index, cut)
        return picture._replace(pixels=shrink(picture.pixels, grid))

    return replace(source, read=read, shapes=square(side), frames=frames)


def open_reference(name: str, side: int, frames: int | None = None, **fields: Any) -> Reference:
    """Open an .npz, or any data as squares of `side` pixels; with `frames`, clips of videos.

    `fields` are those of `DataConfig`: how clips are cut from videos, and the source if it is
    known. The sheets in a folder of samples (`grid.png`, ...) are left out. Raises `UsageError`,
    `OSError` or `ValueError` if the data cannot be compared with.
    """
    folder = Path(name).expanduser()
    if name.endswith(".npz"):
        return open_npz(folder)
    files = [file for file in ("config.yaml", *WEIGHTS) if (folder / file).is_file()]
    if files:  # the images in there are previews
        raise UsageError(
            f"{name} is a run or a model (it holds {files[0]}), not images: mdm eval {name} "
            "--ref DATA measures its samples"
        )
    kind = kind_of(name)
    if frames is not None and kind in ("datasets", "parquet"):
        raise UsageError(f"{name} has images, no clips: name a folder or tar shards of videos")
    kind = kind if frames is None else "clips"
    data = DataConfig(path=absolute(name), **{"source": kind, **fields})
    source = open_source(data, side, frames)
    rows = [row for row, key in enumerate(source.keys) if key not in SHEETS]
    source = source if len(rows) == len(source) else source.part(rows)
    return replace(reference_of(source, data), foreign=True)


def fixed_clips(data: DataConfig) -> DataConfig:
    """The same data with one clip of each video: training may take another one each time."""
    return data.model_copy(update={"clip": "fixed"}) if data.clip == "random" else data


def fields_like(data: DataConfig, name: str) -> dict[str, Any]:
    """Fields for `open_reference`: clips are cut as those of a model with this `data`.

    The model's own data is read as the model reads it.
    """
    cut = {"frame_stride", "fps", "clip", "clip_frames"}
    fields = fixed_clips(data).model_dump(include=cut)
    if data.path is not None and absolute(name) == absolute(data.path):
        read = {"split", "columns", "captions", "caption_suffixes"}
        fields |= {"source": sourced(data).source, **data.model_dump(include=read)}
    return fields


def first_picture(name: str) -> tuple[int, bool]:
    """Shorter side of the first image in a folder, and whether it moves; 0 without images."""
    files = Path(name).expanduser().rglob("*")
    pictures = [one for one in files if one.suffix.lower() in SUFFIXES and one.name not in SHEETS]
    try:
        with Image.open(min(pictures)) as picture:
            return min(picture.size), getattr(picture, "n_frames", 1) > 1
    except (ValueError, OSError):  # no image, or a bad one, which is counted when all are read
        return 0, False


def open_npz(path: Path) -> Reference:
    """A reference batch as ADM publishes them: `mu` and `sigma`, images as `arr_0`, or both.

    Nothing in the file is unpickled, and its images are read a batch at a time. Raises `UsageError`
    if it is something else.
    """
    try:
        archive = zipfile.ZipFile(path)  # open as long as its images are read
        names = sorted(name.removesuffix(".npy") for name in archive.namelist())
        published = None
        if "mu" in names:
            mean, covariance = ((WIDTH,), (WIDTH, WIDTH))
            published = _published(
                _statistic(archive, "mu", mean), _statistic(archive, "sigma", covariance)
            )
        pictures = _pictures(path, archive) if "arr_0" in names else None
        if published is None and pictures is None:
            raise ValueError(
                f"it holds {', '.join(names) or 'nothing'}: a reference batch has mu and sigma, "
                "images as arr_0, or both"
            )
    except (ValueError, LookupError, OSError, EOFError, *_NO_ARCHIVE) as error:
        raise UsageError(f"{path} is no reference batch that can be read: {error}") from error
    return Reference(path.name, pictures, published)


def _statistic(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Array of that shape. Its header is judged first: a small file may unpack to any size."""
    with archive.open(f"{name}.npy") as file:
        own, in_columns, dtype = _header(file)
        if own != shape or dtype.kind != "f":
            raise ValueError(
                f"{name} is {dtype} of {own}, not {WIDTH:,} features' floats of {shape}"
            )
        data = file.read(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape, order="F" if in_columns else "C")


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape of an array in the NPY format, True if it lies in columns, and type."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # later ones are for headers above 64 KB
        raise ValueError(f"its arrays are of NPY version {version}, not (1, 0)")
    return np.lib.format.read_array_header_1_0(file)


def _published(mean: np.ndarray, covariance: np.ndarray) -> Moments:
    tolerance = 1e-6 * float(np.abs(covariance).max())
    symmetric = np.allclose(covariance, covariance.T, rtol=0.0, atol=tolerance)
    if not (symmetric and np.isfinite([*mean, tolerance]).all()):  # NaN is not close
        raise ValueError("mu or sigma is not finite, or sigma is not symmetric")
    return Moments(2, mean.astype(np.float64), covariance.astype(np.float64))


def _pictures(path: Path, archive: zipfile.ZipFile) -> PictureSet:
    file = archive.open("arr_0.npy")
    shape, in_columns, dtype = _header(file)
    begin = file.tell()
    squares = len(shape) == 4 and shape[1] == shape[2] > 0 and shape[3] in (1, 3)
    if dtype != np.uint8 or in_columns or not squares:
        raise ValueError(f"arr_0 is {dtype} of {shape}, not bytes of square images (n, s, s, c)")
    count, side, _, channels = shape
    batch_size = batch_of(Resolution(side, side))
    about = {
        "format": FORMAT,
        "file": path.name,
        "shape": list(shape),
        "crc32": archive.getinfo("arr_0.npy").CRC,
        "batch_size": batch_size,
    }

    def make(rows: range, progress: Progress) -> PictureBatch:
        size = side * side * channels
        try:
            file.seek(begin + rows.start * size)  # decompresses only what is skipped
            data = np.frombuffer(file.read(len(rows) * size), np.uint8)
        except (EOFError, *_NO_ARCHIVE) as error:
            raise UsageError(f"{path}: arr_0 is damaged ({error}): fetch it again") from error
        return PictureBatch([data.reshape(len(rows), *shape[1:])], [(side, side)] * len(rows))

    root = cache_folder("references")
    return PictureSet(path.name, count, side, None, root, lambda: about, make, batch_size)
