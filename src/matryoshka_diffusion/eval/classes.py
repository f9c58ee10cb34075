"""The classifier of a model's own training images: trained once for a set, and kept."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.data.source import Source, identity, read_all
from matryoshka_diffusion.eval.feature_store import Report
from matryoshka_diffusion.eval.reference import Reference
from matryoshka_diffusion.files import BrokenFile, cache_folder, digest, fraction
from matryoshka_diffusion.metrics import classifier
from matryoshka_diffusion.metrics.classifier import Classifier
from matryoshka_diffusion.models.find import Progress
from matryoshka_diffusion.rng import choose
from matryoshka_diffusion.training.distributed import World

MOST_IMAGES = 60_000  # of a larger set, the same in every run
TESTED = 0.1
"""Share of the images that the classifier is not trained on: they give its own accuracy."""


def find_classifier(
    source: Source | None, own: Reference | None, world: World, progress: Report | None
) -> Classifier:
    """The classifier of the training images; trained if the cache has none. A collective.

    Raises `UsageError` if the images are unknown, have no classes, or are too few.
    """
    if source is None or own is None or own.pictures is None or not source.classes:
        name = "the model's training data" if source is None else source.name
        raise UsageError(
            "class-accuracy and fd-classes train a classifier on images with classes, which "
            f"{name} does not have: omit them"
        )
    key = [classifier.RECIPE, own.pictures.about, identity(source).conditions]
    path = cache_folder("classifiers") / f"{digest(json.dumps(key, sort_keys=True))}.safetensors"

    def make() -> None:
        try:
            Classifier(path)
        except (FileNotFoundError, BrokenFile) as error:
            if isinstance(error, BrokenFile):
                warnings.warn(f"{path} is corrupt and is made again", stacklevel=2)
            bar = partial(progress, f"classifier of {source.name}") if progress else None
            _train(path, source, bar)

    world.once(make)
    return Classifier(path)


def _train(path: Path, source: Source, progress: Progress | None) -> None:
    """Train on at most `MOST_IMAGES` images; of a clip one frame counts."""
    rows = choose(len(source), min(len(source), MOST_IMAGES), "classifier").tolist()
    examples = zip(rows, read_all(source, rows), strict=True)
    prepared, labels, keys = [], [], []
    for row, example in examples:
        frame = row % (source.frames or 1)
        picture = example.picture.reshape(-1, *example.picture.shape[-3:])[frame]
        prepared.append(classifier.prepare(picture[None]))
        labels.append(example.label)
        keys.append(example.key)
    tested = np.flatnonzero([fraction(f"classifier {key}") < TESTED for key in keys])
    if not 0 < len(tested) < len(keys):
        raise UsageError(
            f"{source.name}: {len(keys)} images are too few for the classifier of class-accuracy "
            "and fd-classes: omit them"
        )
    classes = len(source.classes)
    classifier.train(path, torch.cat(prepared), np.array(labels), classes, tested, progress)
