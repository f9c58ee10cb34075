"""The metrics by name: what each computes, what it needs, and what its number is called.

"FID", "KID", "IS", "CMMD" and "FVD" are published protocols and belong to their networks. The same
formula on another network gives another number, so it has another name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.eval.feature_store import Column, PictureSet, flat, moments_of
from matryoshka_diffusion.eval.reference import Reference
from matryoshka_diffusion.eval.result import Result, flagged
from matryoshka_diffusion.files import digest
from matryoshka_diffusion.metrics import formulas
from matryoshka_diffusion.metrics.formulas import Moments, frechet_distance
from matryoshka_diffusion.metrics.inception import (
    CLASSES,
    SPLITS,
    Inception,
    inception_score,
)
from matryoshka_diffusion.metrics.networks import (
    CLIP,
    FRAMES,
    EffNetLite0,
    Extractor,
    VideoNet,
    clip_score,
)
from matryoshka_diffusion.rng import stream

EFFNET, INCEPTION, VIDEO = EffNetLite0.name, Inception.name, "Video"
Networks: TypeAlias = Mapping[str, Extractor]
"""Networks by name; the network of FVD is `VIDEO`, whatever its file holds."""

AVERAGES = Column("averages", lambda batch: formulas.averages(batch.pictures))
MOTION = Column("motion", lambda batch: formulas.motion(batch.pictures))
AGREEMENT = Column("agreement", lambda batch: formulas.level_agreement(batch.levels))

Need = Literal["reference", "captions", "training captions", "levels", "clips"]

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
        if "levels" in self.needs and made.levels < 2:
            yield f"needs several levels, and {made.name} has one"
        if "reference" in self.needs and reference is None:
            yield "compares with images: name them with --ref"
        elif "reference" in self.needs and reference is not None:
            if real is None and not (self.published and made.frames is None):
                yield f"needs {made.kind}, and {reference.name} holds only mu and sigma"
            if real is not None and real.frames != made.frames:
                yield f"compares equals: {reference.name} has {real.kind}, {made.name} {made.kind}"
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

    def frechet(self) -> float:
        """Fréchet distance of the features."""
        real = self.published or self.real.moments(self.column)
        return frechet_distance(real, moments_of(self.made.stream(self.column)))

    def named(self, published: str, short: str) -> str:
        """The published name on Inception, such as FID; else such as FD-EffNetLite0."""
        name = self.network.name
        return published if name == INCEPTION else f"{short}-{name}"

    def few(self, count: int) -> str | None:
        """The remark on a covariance of too few rows, with which the distance is far too large."""
        width = self.network.width
        text = f"n = {count:,} <= {width:,} features: rank-deficient"
        return text if count <= width else None

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


def _frechet(pair: Comparison) -> list[Result]:
    count = pair.metric.count(pair.made)
    name = pair.named(f"FID-{thousands(count)}", "FD")
    return [pair.number(name, pair.frechet(), pair.few(count))]


def _frechet_by_frame(pair: Comparison) -> list[Result]:
    """One distance for each frame: where they rise, samples drift away from real clips."""
    others = {}
    for frame in range(pair.made.frames or 0):
        sides = (
            Moments.stream(rows[:, frame] for rows in pictures.stream(pair.column))
            for pictures in (pair.real, pair.made)
        )
        others[f"frame {frame}"] = frechet_distance(*sides)
    name, flag = f"{pair.named('FID', 'FD')}-by-frame", pair.few(pair.made.count)
    return [pair.number(name, float(np.mean([*others.values()])), flag, others=others)]


def _video_frechet(pair: Comparison) -> list[Result]:
    network, made, weights = pair.network, pair.made, pair.network.weights[:8]
    i3d = network.name == "I3D"  # by its shape; only the owner of the file knows its weights
    name = "FVD" if i3d else f"FD-{network.name}-{weights}"
    taken = ", taken for the I3D of Kinetics-400" if i3d else ""
    flags = (f"weights {weights}{taken}; resize {network.resize}", pair.few(made.count))
    return [pair.number(f"{name}-{thousands(made.count)}-{made.frames}f", pair.frechet(), *flags)]


def _kernel(pair: Comparison) -> list[Result]:
    distance = formulas.kernel_distance(*pair.both())
    return [pair.number(pair.named("KID", "KD"), distance.mean, others={"std": distance.std})]


def _inception_score(pair: Comparison) -> list[Result]:
    features = pair.rows(pair.made)
    # A folder of classes is sorted by them: each split would hold a few classes.
    shuffled = features[stream(0, "evaluation splits").permutation(len(features))]
    score = inception_score(pair.network.probabilities(shuffled))
    size = len(features) // SPLITS
    flag = f"{size:,} samples a split < {CLASSES:,} classes: biased low" if size < CLASSES else None
    fields = {"others": {"std": score.std}, "higher_is_better": True}
    return [pair.number("IS", score.mean, flag, **fields)]


def _overlap(pair: Comparison) -> list[Result]:
    shares = formulas.overlap(*pair.both())._asdict()
    name = pair.network.name
    return [pair.number(f"{k}-{name}", v, higher_is_better=True) for k, v in shares.items()]


def _clip_score(pair: Comparison) -> list[Result]:
    clip, captions, scores = pair.network, list(pair.made.captions), []
    for images in pair.made.stream(pair.column):
        texts, rows = clip.texts(captions[: len(images)]), flat(images)
        del captions[: len(images)]
        # Each frame of a clip is scored by the clip's caption.
        scores.append(clip_score(rows, texts.repeat(len(rows) // len(images), axis=0)))
    value = float(np.concatenate(scores).mean())
    return [pair.number(f"CLIP-{clip.variant}", value, higher_is_better=True)]


def _cmmd(pair: Comparison) -> list[Result]:
    clip = pair.network
    # The CLIP of the publication. Others may have its shape: only the owner knows its weights.
    published = clip.variant == "ViT-L/14-336"
    flag = f"CLIP weights {clip.weights[:8]}, taken for those of OpenAI" if published else None
    name = "CMMD" if published else f"CMMD-{clip.variant}"
    return [pair.number(name, formulas.cmmd(*pair.both()), flag)]


def _retrieval(pair: Comparison) -> list[Result]:
    real, made = pair.both()
    retrieval = formulas.prompt_retrieval(made, np.array(pair.made.belong_to), real)
    others = {"among the five nearest": retrieval.among_five}
    fixed = pair.metric.fixed
    name = "one-step retrieval" if fixed is not None and fixed.one_step else "prompt retrieval"
    return [pair.number(name, retrieval.first, higher_is_better=True, others=others)]


def _agreement(pair: Comparison) -> list[Result]:
    per_level = pair.rows(pair.made).mean(axis=0)
    others = {f"level {level}": float(gap) for level, gap in enumerate(per_level)}
    return [pair.number("level disagreement", float(per_level.mean()), others=others)]


def _motion(pair: Comparison) -> list[Result]:
    motions = formulas.compare_motion(*pair.both())
    others = {"ratio": motions.ratio, "slight": motions.slight, "slight real": motions.slight_real}
    name = f"motion distance-{pair.made.frames}f"
    return [pair.number(name, motions.distance, others=others)]


_CLIPS: tuple[Need, ...] = ("reference", "clips")
_TRAINED: tuple[Need, ...] = ("reference", "captions", "training captions")
_NEIGHBOURS = max(formulas.CLOSED_K, formulas.OPEN_K) + 1
METRICS: dict[str, Metric] = {
    "fd": Metric(_frechet, EFFNET),
    "fid": Metric(_frechet, INCEPTION, published=True),
    "kid": Metric(_kernel, INCEPTION, least=formulas.SUBSET_SIZE, one_frame=True),
    "is": Metric(_inception_score, INCEPTION, (), least=SPLITS),
    "prdc": Metric(_overlap, INCEPTION, least=_NEIGHBOURS, one_frame=True),
    "kd": Metric(_kernel, EFFNET, least=formulas.SUBSET_SIZE, one_frame=True),
    "prdc-fd": Metric(_overlap, EFFNET, least=_NEIGHBOURS, one_frame=True),
    "clip": Metric(_clip_score, CLIP.name, ("captions",), least=1),
    "cmmd": Metric(_cmmd, CLIP.name, least=1, one_frame=True),
    **{
        name: Metric(_retrieval, AVERAGES, _TRAINED, least=1, fixed=fixed)
        for name, fixed in {
            "retrieval": FixedSamples(128),
            "retrieval-512": FixedSamples(512),
            "retrieval-one-step": FixedSamples(10_000, one_step=True),
        }.items()
    },
    "agreement": Metric(_agreement, AGREEMENT, ("levels",), least=1),
    "fvd": Metric(_video_frechet, VIDEO, _CLIPS),
    "fd-frames": Metric(_frechet_by_frame, EFFNET, _CLIPS),
    "fid-frames": Metric(_frechet_by_frame, INCEPTION, _CLIPS),
    "motion": Metric(_motion, MOTION, _CLIPS, least=1, least_frames=2),
}


def parse_metrics(names: str | Sequence[str]) -> tuple[tuple[str, ...], int | None]:
    """Split `fd,fid50k,...` into metrics, each once, and the number of samples in the names.

    Raises `UsageError` for an unknown name, or for numbers of samples that cannot be.

    Example:
        >>> parse_metrics("fid50k,retrieval")
        (('fid', 'retrieval'), 50000)
    """
    metrics, counts = [], set()
    for word in names.split(",") if isinstance(names, str) else names:
        match = re.fullmatch(r"([a-z-]+(?:-\d+)?)(?:(\d+)k)?", word.strip().lower())
        if match is None or match[1] not in METRICS:
            near = difflib.get_close_matches(word, METRICS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"no metric {word!r}: there are {', '.join(METRICS)}{hint}")
        if match[2] and METRICS[match[1]].fixed:
            raise UsageError(f"{word}: {match[1]} has fixed captions: omit the number")
        metrics.append(match[1])
        counts |= {1000 * int(match[2])} if match[2] else set()
    if len(counts) > 1:
        raise UsageError(f"--metrics asks for {min(counts):,} samples and for {max(counts):,}")
    return tuple(dict.fromkeys(metrics)), next(iter(counts), None)


def thousands(count: int) -> str:
    """50,000 as 50K; other numbers than whole thousands as they are."""
    return f"{count // 1000}K" if count % 1000 == 0 else str(count)


def find_networks(
    metrics: Iterable[str],
    device: torch.device | str = "cpu",
    *,
    inception: str | Path | None = None,
    clip: str | Path | None = None,
    fvd: str | Path | None = None,
    frames: int | None = None,
    trust_torchscript: bool = False,
) -> Networks:
    """Load the networks that the metrics look through, from files; FVD's for clips of `frames`.

    Raises `UsageError` if a file is missing, if none of the metrics looks through it, or if it is
    a TorchScript program and `trust_torchscript` does not let it run.
    """
    trust = {"trust_torchscript": trust_torchscript}
    files = {
        INCEPTION: ("inception", inception, lambda path: Inception(path, device, **trust)),
        CLIP.name: ("clip", clip, lambda path: CLIP(path, device)),
        VIDEO: ("fvd", fvd, lambda path: VideoNet(path, frames or FRAMES, device, **trust)),
    }
    metrics = list(metrics)
    needed = {METRICS[name].network for name in metrics}
    networks: dict[str, Extractor] = {EFFNET: EffNetLite0(device)} if EFFNET in needed else {}
    for network, (option, path, load) in files.items():
        users = ",".join(name for name, one in METRICS.items() if one.network == network)
        if (network in needed) != (path is not None):
            remedy = "add it, or take fd, kd, prdc-fd or motion" if path is None else "omit it"
            raise UsageError(
                f"{users} need --{option} PATH, a network that is not shipped, and "
                f"{','.join(metrics)} {'does' if path is None else 'does not'}: {remedy}"
            )
        if path is not None:
            networks[network] = load(str(path))
    return networks
