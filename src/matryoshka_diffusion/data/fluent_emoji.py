"""Microsoft's Fluent Emoji in motion: 256-pixel WEBP animations with an English name each.

They come as the npm package `@lobehub/fluent-emoji-anim-1` (MIT), which the user has unpacked.
"""

from __future__ import annotations

from pathlib import Path

from matryoshka_diffusion.data.batch import Source
from matryoshka_diffusion.data.clips import ClipDecoder, open_video
from matryoshka_diffusion.data.emoji_files import find_emoji
from matryoshka_diffusion.data.encoded import open_catalogue
from matryoshka_diffusion.data.folder import state_of
from matryoshka_diffusion.data.frames import TooShortError
from matryoshka_diffusion.data.images import PictureError
from matryoshka_diffusion.data.samples import Catalogue, Sample

PACKAGE = "@lobehub/fluent-emoji-anim-1"
_REMEDY = (
    f"give the folder of the unpacked npm package {PACKAGE}, or name videos of your own with --set "
    "data.source=clips"
)
_INSIDE = ("package/assets", "assets", ".")


def fluent_emoji(path: Path, decoder: ClipDecoder, max_bad_fraction: float) -> Source:
    """Clips of the emoji that move for long enough, on white, in the order of their code points.

    Left out, besides what `emoji_files` leaves out, are stills (half of the package, such as flags)
    and animations that are shorter than a clip: of 16 frames at a stride of 4, 166 emoji remain.

    Raises:
        OSError: no such folder.
        ValueError: no such animations in it, or too many are damaged.
        MissingExtra: the package with the names of emoji is not installed.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: {_REMEDY}")
    folder = next(path / name for name in _INSIDE if (path / name).is_dir())
    found = find_emoji(folder, "*.webp", "fluent-emoji")
    emoji = [one for one in found if _lasts(one.path, decoder)]
    if not emoji:
        raise ValueError(
            f"{path} holds no animation NAME.webp of an emoji that is long enough for a clip: "
            f"{_REMEDY}"
        )
    catalogue = Catalogue(
        name=f"fluent-emoji {path}",
        state=state_of(folder, [one.path.name for one in emoji]),
        samples=[Sample(one.path.stem, one.captions) for one in emoji],
        load=lambda n: emoji[n].path,
    )
    return open_catalogue(catalogue, decoder, max_bad_fraction)


def _lasts(path: Path, decoder: ClipDecoder) -> bool:
    """Whether a clip fits, by the headers; damage is for later, when it is attributed."""
    try:
        with open_video(path) as video:
            decoder.pick(video, 0.0)
    except TooShortError:
        return False
    except PictureError:
        return True
    return True
