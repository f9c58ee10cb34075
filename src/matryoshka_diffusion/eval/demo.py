"""A few samples of a model beside its training pictures; `evaluation` is for many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.cascade import Model
from matryoshka_diffusion.data.source import Source, read_all
from matryoshka_diffusion.eval.demo_sheet import UNSEEN_PROMPTS, demo_sheet
from matryoshka_diffusion.metrics.retrieval import (
    SEED,
    Retrieval,
    choose_captions,
    prompt_retrieval,
)
from matryoshka_diffusion.models.find import Progress

if TYPE_CHECKING:
    from PIL.Image import Image
else:
    Image = Any

SHEET_PROMPTS = (
    # Plain things that a stranger can name, chosen by hand before any sample was seen.
    "red apple", "banana", "cat face", "dog face", "sunflower", "umbrella", "airplane", "bicycle",
    "hamburger", "ice cream", "snowman", "guitar", "soccer ball", "key", "crown", "cactus",
    "fish", "butterfly", "alarm clock", "flag of Japan",
)  # fmt: skip


def retrieval(
    model: Model, source: Source, *, progress: Progress | None = None, **settings: Any
) -> Retrieval:
    """Prompt retrieval over 128 captions, the same ones for every model of this source."""
    indices, prompts = choose_captions(source.captions or ())
    samples = model.sample(prompts, seed=SEED, progress=progress, **settings)
    return prompt_retrieval(samples.levels[-1], indices, all_pictures(source))


def sheet(model: Model, source: Source, *, progress: Progress | None = None) -> Image:
    """The demo's sheet: 20 prompts beside their real pictures, and 4 unseen combinations.

    Raises:
        ValueError: the source does not have the captions (it is made for OpenMoji).
    """
    by_caption = {text: i for i in range(len(source)) for text in source[i].captions}
    missing = [prompt for prompt in SHEET_PROMPTS if prompt not in by_caption]
    if missing:
        raise ValueError(f"{source.name} has no caption {missing[0]!r}")
    prompts = [*SHEET_PROMPTS, *UNSEEN_PROMPTS]
    samples = model.sample(prompts, progress=progress)
    real = [source[by_caption[prompt]].picture for prompt in SHEET_PROMPTS]
    title = f"{model.config.name}: every level of a sample, and the picture of its caption"
    return demo_sheet(samples.levels, prompts, [*real, *[None] * len(UNSEEN_PROMPTS)], title=title)


def all_pictures(source: Source) -> UInt8[np.ndarray, "n *frames h w c"]:
    """Every picture or clip of a source."""
    return np.stack([example.picture for example in read_all(source, range(len(source)))])
