"""How good is a model? Samples drawn and compared with its training pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, UInt8

from matryoshka_diffusion.baselines.load import Model
from matryoshka_diffusion.data.batch import Source
from matryoshka_diffusion.eval.metrics import Moments, frechet_distance
from matryoshka_diffusion.eval.report import UNSEEN_PROMPTS, choose, demo_sheet
from matryoshka_diffusion.eval.retrieval import Retrieval, prompt_retrieval
from matryoshka_diffusion.pipeline import Progress

if TYPE_CHECKING:
    from PIL.Image import Image
else:
    Image = Any

RETRIEVAL_CAPTIONS = 128
SEED = 1_000_000  # far from the seeds that people try, so that nobody tunes on these samples

Features = Callable[[UInt8[np.ndarray, "b h w c"]], np.ndarray]

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
    indices = choose(len(source), min(RETRIEVAL_CAPTIONS, len(source)), "retrieval")
    prompts = [source[int(index)].captions[0] for index in indices]
    samples = model.sample(prompts, seed=SEED, progress=progress, **settings)
    return prompt_retrieval(samples.pictures, indices, all_pictures(source))


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


def frechet(
    model: Model,
    source: Source,
    features: Features,
    *,
    count: int,
    progress: Progress | None = None,
    **settings: Any,
) -> float:
    """Fréchet distance of `count` samples to all training pictures, in the space of `features`.

    Captions and labels are those of the training pictures, in turn.
    """
    pictures = all_pictures(source)
    real = Moments.stream(features(pictures[rows]) for rows in _chunks(len(source)))
    made = Moments.stream(
        features(model_pictures)
        for model_pictures in _samples(model, source, count, progress, settings)
    )
    return frechet_distance(real, made)


def _samples(
    model: Model,
    source: Source,
    count: int,
    progress: Progress | None,
    settings: dict[str, Any],
) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
    """Samples 0 .. count - 1, a batch at a time."""
    chunks = list(_chunks(count))
    for done, rows in enumerate(chunks):
        indices = np.arange(rows.start, rows.stop) % len(source)

        def told(step: int, steps: int, done: int = done) -> None:
            if progress is not None:
                progress(done * steps + step, len(chunks) * steps)

        yield model.sample(
            **_conditions(source, indices, model), seed=SEED + rows.start, progress=told, **settings
        ).pictures


def _conditions(source: Source, indices: Int[np.ndarray, " b"], model: Model) -> dict[str, Any]:
    examples = [source[int(index)] for index in indices]
    if model.config.model.text is not None:
        return {"prompts": [example.captions[0] for example in examples]}
    if model.config.model.classes:
        return {"classes": [example.label for example in examples]}
    return {"n": len(examples)}


def all_pictures(source: Source) -> UInt8[np.ndarray, "n h w c"]:
    """Every picture of a source."""
    return np.stack([source[index].picture for index in range(len(source))])


def _chunks(total: int, size: int = 64) -> Iterator[slice]:
    return (slice(first, min(first + size, total)) for first in range(0, total, size))
