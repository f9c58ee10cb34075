"""Metrics, and what they compute from: samples, reference and networks as one value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np

from matryoshka_diffusion.eval.feature_store import Column, PictureSet, flat, moments_of
from matryoshka_diffusion.eval.reference import Reference
from matryoshka_diffusion.eval.result import Result, flagged
from matryoshka_diffusion.files import digest
from matryoshka_diffusion.metrics.classifier import Classifier
from matryoshka_diffusion.metrics.errors import frechet_influence
from matryoshka_diffusion.metrics.formulas import Moments, frechet_distance
from matryoshka_diffusion.metrics.inception import Inception
from matryoshka_diffusion.metrics.networks import EffNetLite0, Extractor
from matryoshka_diffusion.rng import stream

EFFNET, INCEPTION, VIDEO = EffNetLite0.name, Inception.name, "Video"
CLASSIFIER = Classifier.name
Networks: TypeAlias = Mapping[str, Extractor]
"""Networks by name; the network of FVD is `VIDEO`, whatever its file holds."""

ENOUGH = 4096
"""Samples above which a Fréchet distance is not marked as biased by their number."""

Need = Literal["reference", "captions", "training captions", "classes", "levels", "clips", "styles"]

ONE_STEP = {
    "sampler": "ddim",
    "steps": 1,
    "grid": "trailing",
    "eta": 0.0,
    "guidance": 1.0,
    "threshold": "none",
}
"""Settings with which a sample is the estimate of x from pure noise, at t = 1.

One step of DDIM to t = 0 keeps nothing of the noise.
"""


@dataclass(frozen=True)
class FixedSamples:
    """Samples that a metric fixes: for captions of training images, each caption once."""

    captions: int  # all, of a smaller source
    one_step: bool = False
    held_out: bool = False  # the captions are of held-out images

    @property
    def settings(self) -> dict[str, Any]:
        """Sampling settings that replace all others."""
        return ONE_STEP if self.one_step else {}


@dataclass(frozen=True)
class Metric:
    """A metric and what it needs."""

    compute: Callable[[Comparison], list[Result]]
    looks_at: str | Column  # name of the network whose features it takes, or a column of pixels
    needs: tuple[Need, ...] = ("reference",)
    least: int = 2  # samples on each side
    one_frame: bool = False  # takes one frame of each clip: it assumes independent samples
    published: bool = False  # can do with published moments of Inception's features
    least_frames: int = 1  # frames of each clip
    fixed: FixedSamples | None = None  # by default any samples do

    @property
    def network(self) -> str:
        """Name of the network that it looks through; empty if it looks at pixels."""
        return self.looks_at if isinstance(self.looks_at, str) else ""

    @property
    def by_frame(self) -> bool:
        """True if each frame of a clip is an image to it."""
        return self.network not in ("", VIDEO)

    def count(self, pictures: PictureSet) -> int:
        """Number of samples, as the metric counts them."""
        frames = self.by_frame and not self.one_frame and "clips" not in self.needs
        return pictures.count * (pictures.frames or 1) if frames else pictures.count

    def unmet(self, made: PictureSet, reference: Reference | None) -> Iterator[str]:
        """The needs that are not met, in words that follow the metric's name."""
        real = reference.pictures if reference and "reference" in self.needs else None
        if "clips" in self.needs and (made.frames or 0) < self.least_frames:
            least = f"clips of {self.least_frames} frames or more"
            yield f"needs {least}, and {made.name} has {made.kind}"
        if "training captions" in self.needs and not made.belong_to:
            yield "needs samples of the captions of training images (mdm eval RUN draws them)"
        if "captions" in self.needs and not made.captions:
            yield f"needs captions, which {made.name} was not drawn for"
        if "classes" in self.needs and made.label is None:
            yield f"needs samples of classes, which {made.name} was not drawn for"
        if "levels" in self.needs and made.levels < 2:
            yield f"needs several levels, and {made.name} has one"
        if "reference" in self.needs and reference is None:
            yield "compares with images: name them with --ref"
        elif "reference" in self.needs and reference is not None:
            if real is None and not (self.published and made.frames is None):
                yield f"needs {made.kind}, and {reference.name} holds only mu and sigma"
            if real is not None and real.frames != made.frames:
                yield f"compares equals: {reference.name} has {real.kind}, {made.name} {made.kind}"
        if "styles" in self.needs and real is not None and not any(x.concept for x in real.samples):
            yield f"needs the same things in several styles, and {real.name} has each thing once"
        for one in (made, real):
            if one and self.count(one) < self.least:
                count = f"not the {self.count(one):,} of {one.name}"
                yield f"needs at least {self.least:,} samples, {count}"


@dataclass(frozen=True)
class Comparison:
    """Samples and, for most metrics, a reference, whose columns are filled."""

    key: str
    metric: Metric
    made: PictureSet
    reference: Reference | None
    networks: Networks
    about: Result  # what all numbers of these samples share
    flag: str | None = None  # remark on the reference

    @property
    def network(self) -> Any:
        """The `Extractor` of the metric."""
        return self.networks[self.metric.network]

    @property
    def real(self) -> PictureSet:
        """Images of the reference, without which the metric was refused."""
        assert self.reference is not None
        assert self.reference.pictures is not None
        return self.reference.pictures

    @property
    def published(self) -> Any:
        """Moments that take the place of the reference's images, or None."""
        return self.reference.published if self.metric.published and self.reference else None

    @property
    def column(self) -> Column:
        """The column that the metric takes of each image."""
        if isinstance(self.metric.looks_at, Column):
            return self.metric.looks_at
        network = self.network
        name = f"{network.name}-{network.weights}-{digest(network.resize)[:8]}"
        see = partial(_by_frame, network) if self.metric.by_frame else network
        return Column(name, lambda batch: see(batch.pictures))

    def rows(self, pictures: PictureSet) -> np.ndarray:
        """One row an image; of a clip one row a frame, or one frame only, always the same.

        Frames of a clip are alike: among all frames, the nearest neighbours of a frame are those
        of its own clip, and the pairs that an unbiased estimator averages over are not independent.
        """
        rows = pictures.all(self.column)
        if pictures.frames is None or not self.metric.by_frame:
            return rows
        if not self.metric.one_frame:
            return flat(rows)
        chosen = stream(0, "evaluation frames").integers(pictures.frames, size=len(rows))
        return rows[np.arange(len(rows)), chosen]

    def both(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the reference and of the samples."""
        return self.rows(self.real), self.rows(self.made)

    def frechet(self) -> tuple[float, np.ndarray]:
        """Fréchet distance of the features, and the influence of each sample on it."""
        real = self.published or self.real.moments(self.column)
        return frechet(real, lambda: self.made.stream(self.column))

    def named(self, published: str, short: str) -> str:
        """The published name on Inception, such as FID; else such as FD-EffNetLite0."""
        name = self.network.name
        return published if name == INCEPTION else f"{short}-{name}"

    def few(self, count: int) -> str | None:
        """The remark on too few rows, with which a Fréchet distance is too large."""
        width = self.network.width
        if count <= width:
            return f"n = {count:,} <= {width:,} features: rank-deficient"
        return f"n = {count:,} < {ENOUGH:,}: biased high" if count < ENOUGH else None

    def number(self, name: str, value: float, *flags: str | None, **fields: Any) -> Result:
        """The result of a value with its name and remarks."""
        made, reference, frames = self.made, self.reference, None
        if self.metric.by_frame and made.frames is not None:
            counts = f"frames of clips, {made.count:,} x {made.frames}"
            frames = "one frame of each clip" if self.metric.one_frame else counts
        if self.metric.network:
            fields |= {"extractor": self.network.name, "resize": self.network.resize}
            fields["extractor_weights"] = self.network.weights
        if reference is not None:
            fields["reference"] = reference.name
            if reference.pictures is not None and self.published is None:
                fields["reference_count"] = reference.pictures.count
        metric = flagged(name, (*self.about.flags, frames, *flags, self.flag))
        known = {"key": self.key, "n": made.count, "frames": made.frames}
        return replace(self.about, **known, metric=metric, value=value, **fields)


def _by_frame(network: Extractor, clips: np.ndarray) -> np.ndarray:
    """Features (b, d) of images, (b, f, d) of clips: one frame of every clip at a time."""
    if clips.ndim == 4:
        return network(clips)
    return np.stack([network(frames) for frames in clips.swapaxes(0, 1)], axis=1)


def frechet(real: Moments, made: Callable[[], Iterator[np.ndarray]]) -> tuple[float, np.ndarray]:
    """Fréchet distance, and the influence of each sample on it; a clip has that of its frames.

    `made` gives the batches of features, which are read twice.
    """
    moments = moments_of(made())
    influence = frechet_influence(real, moments)
    terms = [influence(flat(rows)).reshape(len(rows), -1).mean(axis=1) for rows in made()]
    return frechet_distance(real, moments), np.concatenate(terms)
