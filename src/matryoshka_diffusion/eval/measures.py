"""The metrics by the names that a command line knows, each from columns of pictures to numbers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.eval.pictures import PictureSet
from matryoshka_diffusion.eval.references import Reference
from matryoshka_diffusion.eval.store import Column, moments_of, rows_of
from matryoshka_diffusion.files import digest
from matryoshka_diffusion.metrics import naming
from matryoshka_diffusion.metrics.agreement import level_agreement
from matryoshka_diffusion.metrics.frechet import Moments, frechet_distance
from matryoshka_diffusion.metrics.frechet import Reference as Published
from matryoshka_diffusion.metrics.inception_score import SPLITS, inception_score
from matryoshka_diffusion.metrics.mmd import SUBSET_SIZE, cmmd, kernel_distance
from matryoshka_diffusion.metrics.motion import compare_motion, motion, refuse_still
from matryoshka_diffusion.metrics.neighbours import (
    DENSITY_COVERAGE_K,
    PRECISION_RECALL_K,
    density_coverage,
    precision_recall,
)
from matryoshka_diffusion.metrics.networks.clip import CLIP, clip_score
from matryoshka_diffusion.metrics.networks.features import NETWORK, Extractor
from matryoshka_diffusion.metrics.networks.inception import Inception
from matryoshka_diffusion.metrics.networks.inception_net import CLASSES
from matryoshka_diffusion.metrics.networks.video import VIDEO
from matryoshka_diffusion.metrics.retrieval import CAPTIONS, averages, retrieval_of_averages
from matryoshka_diffusion.rng import stream

_NEIGHBOURS = max(PRECISION_RECALL_K, DENSITY_COVERAGE_K)


class Number(NamedTuple):
    """A value, its name, flags and what goes with it; `words` if it has a sentence of its own."""

    name: str
    value: float
    others: Mapping[str, float] = {}
    flags: tuple[str | None, ...] = ()
    higher_is_better: bool = False
    words: str = ""


@dataclass(frozen=True)
class Compared:
    """What a metric is given: pictures whose `column` is there.

    `reference` is None for metrics that compare with nothing, `extractor` for those that look
    through no network. `published` takes the place of the reference's pictures.
    """

    made: PictureSet
    reference: Reference | None
    extractor: Extractor | None
    published: Published | None
    column: Column

    @property
    def network(self) -> Extractor:
        assert self.extractor is not None, "asked by metrics that name a network"
        return self.extractor

    @property
    def real(self) -> PictureSet:
        assert self.reference is not None, "asked by metrics that compare"
        assert self.reference.pictures is not None, "refused before"
        return self.reference.pictures

    def features(self, pictures: PictureSet) -> np.ndarray:
        """One row a picture, or a frame, or a clip: whatever it is that the network looks at."""
        return rows_of(pictures.all(self.column))

    def independent(self, pictures: PictureSet) -> np.ndarray:
        """One row a picture, and of each clip one frame, always the same.

        Frames of a clip are alike: among all frames the nearest neighbours of one are those of its
        own clip, and the pairs that an unbiased estimator averages over are no independent ones.
        """
        rows = pictures.all(self.column)
        if pictures.frames is None:
            return rows
        chosen = stream(0, "evaluation frames").integers(pictures.frames, size=len(rows))
        return rows[np.arange(len(rows)), chosen]

    def frechet(self) -> float:
        """The Fréchet distance of the features."""
        real = self.published or self.real.moments(self.column)
        return frechet_distance(real, moments_of(self.made.stream(self.column)))

    def moments_at(self, frame: int, pictures: PictureSet) -> Moments:
        """Those of one frame of every clip."""
        return Moments.stream(rows[:, frame] for rows in pictures.stream(self.column))


class Metric(NamedTuple):
    """A metric and what it needs.

    Attributes:
        compute: the numbers.
        network: whose features it takes; empty if it looks at pictures itself.
        column: what it takes of the pictures if not a network's features.
        compares: whether it needs a reference.
        moments: whether moments of the features, which may be published, are all that it needs.
        least: how many samples it needs on each side, as `count` counts them.
        independent: whether it is about independent samples: then it takes a frame of each clip.
        captions: whether each sample needs the caption that it was made for.
        levels: whether it looks at all levels of a sample, which pictures of a source do not have.
        retrieval: whether it is about samples of the captions of single training pictures.
        clips: whether it is about clips, which pictures are not.
        least_frames: how many frames these need.
        check: raises ValueError if the reference's pictures, whose column is there, are of no use.
    """

    compute: Callable[[Compared], list[Number]]
    network: str = ""
    column: Column | None = None
    compares: bool = True
    moments: bool = False
    least: int = 2
    independent: bool = False
    captions: bool = False
    levels: bool = False
    retrieval: bool = False
    clips: bool = False
    least_frames: int = 1
    check: Callable[[PictureSet], None] = lambda real: None

    @property
    def of_frames(self) -> bool:
        """Whether each frame of a clip is a picture to it."""
        return self.network not in ("", VIDEO)

    def count(self, pictures: PictureSet) -> int:
        """How many samples these are to it."""
        by_frame = self.of_frames and not self.independent and not self.clips
        return pictures.num_frames if by_frame else pictures.count

    def published(self, reference: Reference | None) -> Published | None:
        """What it takes in the place of the reference's pictures."""
        if reference is None or not self.moments or self.network != naming.INCEPTION:
            return None
        return reference.published

    def looks_at(self, extractor: Extractor | None) -> Column:
        """What has to be known of each picture; `extractor` is the metric's network."""
        if extractor is not None:
            return (features_of if self.of_frames else features_of_clips)(extractor)
        assert self.column is not None, "a metric looks through a network, or says at what"
        return self.column


def features_of(extractor: Extractor) -> Column:
    """The features of a network of pictures; of a clip a row for each frame."""
    return Column(_folder(extractor), lambda batch: _by_frame(extractor, batch.pictures))


def features_of_clips(extractor: Extractor) -> Column:
    """The features of a network of clips."""
    return Column(_folder(extractor), lambda batch: extractor(batch.pictures))


def _folder(extractor: Extractor) -> str:
    return f"{extractor.name}-{extractor.weights}-{digest(extractor.resize)[:8]}"


def _by_frame(extractor: Extractor, shown: np.ndarray) -> np.ndarray:
    """Features (b, d) of pictures, (b, f, d) of clips: their first frames are looked at first."""
    if shown.ndim == 4:
        return extractor(shown)
    return np.stack([extractor(frames) for frames in shown.swapaxes(0, 1)], axis=1)


AVERAGES: Column = Column("averages", lambda batch: averages(batch.pictures))
MOTION: Column = Column("motion", lambda batch: motion(batch.pictures))
AGREEMENT: Column = Column("agreement", lambda batch: level_agreement(batch.levels))


# --- the numbers -------------------------------------------------------------------------------


def _frechet(compared: Compared) -> list[Number]:
    network, made = compared.network, compared.made
    name = naming.frechet(network.name)
    if network.name == naming.INCEPTION:
        name = f"{name}-{thousands(made.num_frames)}"
    # Few pictures of the reference are part of what the reference is; few samples are a choice.
    flag = naming.rank_flag(made.num_frames, network.width)
    return [Number(name, compared.frechet(), flags=(flag,))]


def _frechet_by_frame(compared: Compared) -> list[Number]:
    """One distance for each frame: where they rise, samples drift away from real clips."""
    network, made = compared.network, compared.made
    assert made.frames is not None, "refused before"
    found = [
        frechet_distance(*(compared.moments_at(frame, side) for side in (compared.real, made)))
        for frame in range(made.frames)
    ]
    name, flag = (
        f"{naming.frechet(network.name)}-by-frame",
        naming.rank_flag(made.count, network.width),
    )
    others = {f"frame {frame}": distance for frame, distance in enumerate(found)}
    return [Number(name, float(np.mean(found)), others, (flag,))]


def _video_frechet(compared: Compared) -> list[Number]:
    network, made = compared.network, compared.made
    name = naming.video_frechet(network.name, network.weights)
    flags = (
        naming.video_flag(network.name, network.weights, network.resize),
        naming.rank_flag(made.count, network.width),
    )
    name = f"{name}-{thousands(made.count)}-{made.frames}f"
    return [Number(name, compared.frechet(), flags=flags)]


def _check_motion(real: PictureSet) -> None:
    refuse_still(real.all(MOTION))


def _motion(compared: Compared) -> list[Number]:
    found = compare_motion(*(side.all(MOTION) for side in (compared.real, compared.made)))
    others = {"ratio": found.ratio, "slight": found.slight, "slight real": found.slight_real}
    return [Number(f"motion distance-{compared.made.frames}f", found.distance, others)]


def _kernel(compared: Compared) -> list[Number]:
    real, made = (compared.independent(side) for side in (compared.real, compared.made))
    found = kernel_distance(real, made)
    return [Number(naming.kernel(compared.network.name), found.mean, {"std": found.std})]


def _inception_score(compared: Compared) -> list[Number]:
    inception = cast("Inception", compared.network)
    features = compared.features(compared.made)
    # A folder of classes is sorted by them, and its splits would each hold a few.
    shuffled = features[stream(0, "evaluation splits").permutation(len(features))]
    found = inception_score(inception.probabilities(shuffled))
    flag = naming.split_flag(len(features), SPLITS, CLASSES)
    return [Number("IS", found.mean, {"std": found.std}, (flag,), higher_is_better=True)]


def _overlap(compared: Compared) -> list[Number]:
    real, made = (compared.independent(side) for side in (compared.real, compared.made))
    found = {
        **precision_recall(real, made)._asdict(),
        **density_coverage(real, made)._asdict(),
    }
    name = compared.network.name
    return [Number(f"{kind}-{name}", value, higher_is_better=True) for kind, value in found.items()]


def _clip_score(compared: Compared) -> list[Number]:
    clip, captions = cast("CLIP", compared.network), compared.made.captions
    scores, first = [], 0
    for images in compared.made.stream(compared.column):
        texts, rows = clip.texts(captions[first : first + len(images)]), rows_of(images)
        # Each frame of a clip is scored by the clip's caption.
        scores.append(clip_score(rows, texts.repeat(len(rows) // len(images), axis=0)))
        first += len(images)
    score = float(np.concatenate(scores).mean())
    return [Number(naming.clip_score(clip.variant), score, higher_is_better=True)]


def _cmmd(compared: Compared) -> list[Number]:
    real, made = (compared.independent(side) for side in (compared.real, compared.made))
    clip = cast("CLIP", compared.network)
    flag = naming.cmmd_flag(clip.variant, clip.weights)
    return [Number(naming.cmmd(clip.variant), cmmd(real, made), flags=(flag,))]


def _retrieval(compared: Compared) -> list[Number]:
    known, drawn = (side.all(AVERAGES) for side in (compared.real, compared.made))
    found = retrieval_of_averages(drawn, np.array(compared.made.belong_to), known)
    others = {"among five": found.among_five}
    name, words = "prompt retrieval", str(found)
    return [Number(name, found.first, others, higher_is_better=True, words=words)]


def _agreement(compared: Compared) -> list[Number]:
    per_level = compared.made.all(AGREEMENT).mean(axis=0)
    others = {f"level {level}": float(gap) for level, gap in enumerate(per_level)}
    return [Number("level disagreement", float(per_level.mean()), others)]


METRICS: dict[str, Metric] = {
    "fd": Metric(_frechet, NETWORK, moments=True),
    "fid": Metric(_frechet, naming.INCEPTION, moments=True),
    "kid": Metric(_kernel, naming.INCEPTION, least=SUBSET_SIZE, independent=True),
    "is": Metric(_inception_score, naming.INCEPTION, compares=False, least=SPLITS),
    "prdc": Metric(_overlap, naming.INCEPTION, least=_NEIGHBOURS + 1, independent=True),
    "kd": Metric(_kernel, NETWORK, least=SUBSET_SIZE, independent=True),
    "prdc-fd": Metric(_overlap, NETWORK, least=_NEIGHBOURS + 1, independent=True),
    "clip": Metric(_clip_score, CLIP.name, compares=False, least=1, captions=True),
    "cmmd": Metric(_cmmd, CLIP.name, least=1, independent=True),
    "retrieval": Metric(_retrieval, column=AVERAGES, least=1, captions=True, retrieval=True),
    "agreement": Metric(_agreement, column=AGREEMENT, compares=False, least=1, levels=True),
    "fvd": Metric(_video_frechet, VIDEO, clips=True),
    "fd-frames": Metric(_frechet_by_frame, NETWORK, clips=True),
    "fid-frames": Metric(_frechet_by_frame, naming.INCEPTION, clips=True),
    "motion": Metric(
        _motion, column=MOTION, least=1, clips=True, least_frames=2, check=_check_motion
    ),
}


def load(metrics: Sequence[str], networks: Callable[[str], Extractor]) -> dict[str, Extractor]:
    """The networks of the metrics by name: first of all, since one that is missing is refused."""
    names = dict.fromkeys(METRICS[name].network for name in metrics)
    return {name: networks(name) for name in names if name}


# --- names -------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What a list of names asks for; `n` is the number of samples in a name such as fid50k."""

    metrics: tuple[str, ...]
    n: int | None


def parse_metrics(names: str | Sequence[str]) -> Asked:
    """The metrics of `fd,fid50k,...`, each once.

    Raises:
        UsageError: an unknown name, two numbers of samples, or one of a metric that has its own.

    Example:
        >>> parse_metrics("fid50k,retrieval")
        Asked(metrics=('fid', 'retrieval'), n=50000)
    """
    words = names.split(",") if isinstance(names, str) else list(names)
    found = [_parse(word.strip().lower()) for word in words]
    counts = sorted({n for _, n in found if n is not None})
    if len(counts) > 1:
        raise UsageError(f"--metrics asks for {counts[0]:,} samples and for {counts[1]:,}")
    return Asked(tuple(dict.fromkeys(name for name, _ in found)), *(counts or [None]))


def _parse(word: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"([a-z-]+)(?:(\d+)k)?", word)
    if match is None or match[1] not in METRICS:
        near = difflib.get_close_matches(word, METRICS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"no metric {word!r}: there are {', '.join(METRICS)}{hint}")
    if match[2] is not None and METRICS[match[1]].retrieval:
        raise UsageError(
            f"{word}: {match[1]} draws the same {CAPTIONS} captions for every model: leave the "
            "number away"
        )
    return match[1], None if match[2] is None else 1000 * int(match[2])


def thousands(count: int) -> str:
    """50,000 as 50K, and what is not a whole number of thousands as it is.

    Example:
        >>> thousands(50_000), thousands(2_048)
        ('50K', '2048')
    """
    return f"{count // 1000}K" if count % 1000 == 0 else str(count)
