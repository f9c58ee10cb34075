"""What is measured of a trained network, in the same way for every trial."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.baselines.load import Model
from matryoshka_diffusion.config import ProcessConfig, WeightingConfig
from matryoshka_diffusion.data.batch import Source
from matryoshka_diffusion.eval.features import NAME, EffNetLite0
from matryoshka_diffusion.eval.metrics import Moments, frechet_distance
from matryoshka_diffusion.files import digest, write_atomically
from matryoshka_diffusion.job import Job
from matryoshka_diffusion.measure import retrieval
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.train.trainer import View
from matryoshka_diffusion.watch import HeldOutLoss

SAMPLES = 1024
"""Samples of a distance. It falls with their number, so all trials have the same."""

BATCH = 64
SEED = 2_000_000
COMMON_WEIGHT = (WeightingConfig(name="v_clipped"),)
"""The weighting that held-out losses are compared under, whatever was trained with."""


@lru_cache(maxsize=1)
def _network() -> EffNetLite0:
    return EffNetLite0()


def distance(model: Model, source: Source, cache: Path, samples: int, **settings: Any) -> float:
    """Fréchet distance to a whole set of so many samples with conditions out of it."""
    features = _network()
    made = Moments.stream(
        features(pictures) for pictures in _samples(model, source, samples, settings)
    )
    return frechet_distance(reference(source, cache), made)


def reference(source: Source, cache: Path) -> Moments:
    """The moments of a whole set, kept in a file beside the runs."""
    path = cache / f"{digest(f'{source.name} {source.side} {len(source)} {NAME}')}.npz"
    if not path.is_file():
        features = _network()
        moments = Moments.stream(
            features(np.stack([source[row].picture for row in rows]))
            for rows in _batches(len(source))
        )
        parts = {"count": moments.count, "mean": moments.mean, "scatter": moments.scatter}
        write_atomically(path, lambda file: np.savez(file, **parts))
    with np.load(path) as stored:
        return Moments(int(stored["count"]), stored["mean"], stored["scatter"])


def _samples(
    model: Model, source: Source, count: int, settings: dict[str, Any]
) -> Iterator[UInt8[np.ndarray, "b h w c"]]:
    """Samples whose conditions are those of the set's pictures, spread evenly over it."""
    chosen = np.linspace(0, len(source), count, endpoint=False).astype(int)
    for rows in _batches(count):
        examples = [source[int(chosen[row])] for row in rows]
        conditions: dict[str, Any] = (
            {"prompts": [example.captions[0] for example in examples]}
            if model.config.model.text is not None
            else {"classes": [example.label for example in examples]}
        )
        yield model.sample(**conditions, seed=SEED + rows.start, **settings).pictures


def _batches(total: int) -> Iterator[range]:
    return (range(first, min(first + BATCH, total)) for first in range(0, total, BATCH))


def prompts_found(model: Model, job: Job, **settings: Any) -> dict[str, float] | None:
    """Prompt retrieval over trained captions; by default with the guidance of the set's preset."""
    if model.config.model.text is None:
        return None
    found = retrieval(model, job.source, **settings)
    return {"first": found.first, "among_five": found.among_five, "count": found.count}


def losses(model: Path, job: Job) -> dict[str, list[float] | None]:
    """Loss per level on trained and on held-out pictures, under one weighting for all trials.

    None for what has not the set's pictures alone to denoise: upsamplers and models of codes.
    """
    assert job.held_out is not None, "every trial holds pictures out"
    if job.config.model.coarse is not None or job.config.codec is not None:
        return {"seen_loss_per_level": None, "held_out_loss_per_level": None}
    process = ProcessConfig(prediction=job.config.process.prediction, weighting=COMMON_WEIGHT)
    config = job.config.model_copy(update={"process": process})
    watch = HeldOutLoss(job.source, job.held_out, job.encode, "cpu")
    net = Matryoshka.load(model).net
    return dict(watch(View(config, Path(), job.config.train.images, lambda: net)))
