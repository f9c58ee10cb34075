"""The metrics by name: what each computes, what it needs, and what its number is called.

"FID", "KID", "IS", "CMMD" and "FVD" are published protocols and belong to their networks. The same
formula on another network gives another number, so it has another name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.eval.comparison import (
    CLASSIFIER,
    EFFNET,
    INCEPTION,
    VIDEO,
    Comparison,
    FixedSamples,
    Metric,
    Need,
    Networks,
    frechet,
)
from matryoshka_diffusion.eval.feature_store import Column, PictureSet, flat
from matryoshka_diffusion.eval.prompts import MOST_SAMPLES
from matryoshka_diffusion.eval.result import Result
from matryoshka_diffusion.eval.unseen import unseen
from matryoshka_diffusion.hints import did_you_mean
from matryoshka_diffusion.metrics import formulas
from matryoshka_diffusion.metrics.errors import (
    mean_error,
    mmd_influence,
    share_error,
    wasserstein_influence,
)
from matryoshka_diffusion.metrics.formulas import Moments
from matryoshka_diffusion.metrics.inception import (
    CLASSES,
    SPLITS,
    Inception,
    inception_score,
)
from matryoshka_diffusion.metrics.memorised import memorised
from matryoshka_diffusion.metrics.networks import (
    CLIP,
    FRAMES,
    EffNetLite0,
    Extractor,
    VideoNet,
    clip_score,
)
from matryoshka_diffusion.rng import stream

AVERAGES = Column("averages", lambda batch: formulas.averages(batch.pictures))
MOTION = Column("motion", lambda batch: formulas.motion(batch.pictures))
AGREEMENT = Column("agreement", lambda batch: formulas.level_agreement(batch.levels))


def _frechet(pair: Comparison) -> list[Result]:
    count = pair.metric.count(pair.made)
    name = pair.named(f"FID-{thousands(count)}", "FD")
    distance, terms = pair.frechet()
    return [pair.number(name, distance, pair.few(count), error=mean_error(terms))]


def _frechet_by_frame(pair: Comparison) -> list[Result]:
    """One distance for each frame: where they rise, samples drift away from real clips."""

    def rows_of(pictures: PictureSet, frame: int) -> Iterator[np.ndarray]:
        return (rows[:, frame] for rows in pictures.stream(pair.column))

    distances = {
        f"frame {frame}": frechet(
            Moments.stream(rows_of(pair.real, frame)), partial(rows_of, pair.made, frame)
        )
        for frame in range(pair.made.frames or 0)
    }
    others = {name: value for name, (value, _) in distances.items()}
    terms = {name: influence for name, (_, influence) in distances.items()}
    name, flag = f"{pair.named('FID', 'FD')}-by-frame", pair.few(pair.made.count)
    fields: dict[str, Any] = {
        "others": others,
        "errors": {name: mean_error(influence) for name, influence in terms.items()},
        "error": mean_error(np.mean([*terms.values()], axis=0)),
    }
    return [pair.number(name, float(np.mean([*others.values()])), flag, **fields)]


def _video_frechet(pair: Comparison) -> list[Result]:
    network, made, weights = pair.network, pair.made, pair.network.weights[:8]
    i3d = network.name == "I3D"  # by its shape; only the owner of the file knows its weights
    name = "FVD" if i3d else f"FD-{network.name}-{weights}"
    taken = ", taken for the I3D of Kinetics-400" if i3d else ""
    flags = (f"weights {weights}{taken}; resize {network.resize}", pair.few(made.count))
    distance, terms = pair.frechet()
    name += f"-{thousands(made.count)}-{made.frames}f"
    return [pair.number(name, distance, *flags, error=mean_error(terms))]


def _kernel(pair: Comparison) -> list[Result]:
    real, made = pair.both()
    distance = formulas.kernel_distance(real, made)
    over_subsets = distance.std / math.sqrt(formulas.SUBSETS)
    error = math.hypot(mean_error(mmd_influence(formulas.cubic, real, made)), over_subsets)
    fields: dict[str, Any] = {"error": error, "others": {"std": distance.std}}
    return [pair.number(pair.named("KID", "KD"), distance.mean, **fields)]


def _inception_score(pair: Comparison) -> list[Result]:
    features = pair.rows(pair.made)
    # A folder of classes is sorted by them: each split would hold a few classes.
    shuffled = features[stream(0, "evaluation splits").permutation(len(features))]
    score = inception_score(pair.network.probabilities(shuffled))
    size = len(features) // SPLITS
    flag = f"{size:,} samples a split < {CLASSES:,} classes: biased low" if size < CLASSES else None
    fields: dict[str, Any] = {"others": {"std": score.std}, "higher_is_better": True}
    fields["error"] = score.std / math.sqrt(SPLITS - 1)  # of the mean of independent splits
    return [pair.number("IS", score.mean, flag, **fields)]


def _overlap(pair: Comparison) -> list[Result]:
    real, made = pair.both()
    *shares, density_error = formulas.overlap(real, made)
    names, counts = formulas.Overlap._fields, (len(made), len(real), None, len(real))
    return [
        pair.number(
            f"{name}-{pair.network.name}",
            share,
            higher_is_better=True,
            error=density_error if count is None else share_error(share, count),
        )
        for name, share, count in zip(names, shares, counts, strict=False)
    ]


def _memorised(pair: Comparison) -> list[Result]:
    share = memorised(*pair.both())
    error = share_error(share, pair.made.count)
    return [pair.number(f"memorised-{pair.network.name}", share, error=error)]


def _class_accuracy(pair: Comparison) -> list[Result]:
    network, made, column = pair.network, pair.made, pair.rows(pair.made)
    assert made.label is not None
    asked = [made.label(row) for row in range(made.count)]
    share = float((network.classes(column) == asked).mean())
    real = f"of {network.tested:,} real images"
    fields: dict[str, Any] = {
        "error": share_error(share, made.count),
        "others": {real: network.accuracy},
        "errors": {real: share_error(network.accuracy, network.tested)},
        "higher_is_better": True,
    }
    return [pair.number("class accuracy", share, **fields)]


def _clip_score(pair: Comparison) -> list[Result]:
    clip, captions, scores = pair.network, list(pair.made.captions), []
    for images in pair.made.stream(pair.column):
        texts, rows = clip.texts(captions[: len(images)]), flat(images)
        del captions[: len(images)]
        # Each frame of a clip is scored by the clip's caption.
        of_rows = clip_score(rows, texts.repeat(len(rows) // len(images), axis=0))
        scores.append(of_rows.reshape(len(images), -1).mean(axis=1))
    terms = np.concatenate(scores)
    fields: dict[str, Any] = {"error": mean_error(terms), "higher_is_better": True}
    return [pair.number(f"CLIP-{clip.variant}", float(terms.mean()), **fields)]


def _cmmd(pair: Comparison) -> list[Result]:
    clip = pair.network
    # The CLIP of the publication. Others may have its shape: only the owner knows its weights.
    published = clip.variant == "ViT-L/14-336"
    flag = f"CLIP weights {clip.weights[:8]}, taken for those of OpenAI" if published else None
    name = "CMMD" if published else f"CMMD-{clip.variant}"
    real, made = pair.both()
    influence = 1000.0 * mmd_influence(formulas.gaussian, formulas.unit(real), formulas.unit(made))
    return [pair.number(name, formulas.cmmd(real, made), flag, error=mean_error(influence))]


def _retrieval(pair: Comparison) -> list[Result]:
    real, made = pair.both()
    retrieval = formulas.prompt_retrieval(made, np.array(pair.made.belong_to), real)
    fixed = pair.metric.fixed
    name = "one-step retrieval" if fixed is not None and fixed.one_step else "prompt retrieval"
    first, among = (share_error(share, len(made)) for share in retrieval)
    fields: dict[str, Any] = {
        "error": first,
        "others": {"among the five nearest": retrieval.among_five},
        "errors": {"among the five nearest": among},
        "higher_is_better": True,
    }
    return [pair.number(name, retrieval.first, **fields)]


def _agreement(pair: Comparison) -> list[Result]:
    gaps = pair.rows(pair.made)
    per_level = {f"level {level}": gap for level, gap in enumerate(gaps.T)}
    fields: dict[str, Any] = {
        "error": mean_error(gaps.mean(axis=1)),
        "others": {name: float(gap.mean()) for name, gap in per_level.items()},
        "errors": {name: mean_error(gap) for name, gap in per_level.items()},
    }
    return [pair.number("level disagreement", float(gaps.mean()), **fields)]


def _motion(pair: Comparison) -> list[Result]:
    real, made = pair.both()
    motions = formulas.compare_motion(real, made)
    fields: dict[str, Any] = {
        "error": mean_error(wasserstein_influence(real, made)),
        "others": {
            "ratio": motions.ratio,
            "slight": motions.slight,
            "slight real": motions.slight_real,
        },
        "errors": {
            "ratio": mean_error(made) / float(real.mean()),
            "slight": share_error(motions.slight, len(made)),
            "slight real": share_error(motions.slight_real, len(real)),
        },
    }
    return [pair.number(f"motion distance-{pair.made.frames}f", motions.distance, **fields)]


_CLIPS: tuple[Need, ...] = ("reference", "clips")
_TRAINED: tuple[Need, ...] = ("reference", "captions", "training captions")
_HELD_OUT = FixedSamples(MOST_SAMPLES, held_out=True)
_NEIGHBOURS = max(formulas.CLOSED_K, formulas.OPEN_K) + 1
METRICS: dict[str, Metric] = {
    "fd": Metric(_frechet, EFFNET),
    "fid": Metric(_frechet, INCEPTION, published=True),
    "kid": Metric(_kernel, INCEPTION, least=formulas.SUBSET_SIZE, one_frame=True),
    "is": Metric(_inception_score, INCEPTION, (), least=SPLITS),
    "prdc": Metric(_overlap, INCEPTION, least=_NEIGHBOURS, one_frame=True),
    "kd": Metric(_kernel, EFFNET, least=formulas.SUBSET_SIZE, one_frame=True),
    "prdc-fd": Metric(_overlap, EFFNET, least=_NEIGHBOURS, one_frame=True),
    "memorised": Metric(_memorised, EFFNET, one_frame=True),
    "fd-classes": Metric(_frechet, CLASSIFIER, ("reference", "classes")),
    "class-accuracy": Metric(_class_accuracy, CLASSIFIER, ("classes",), one_frame=True),
    "clip": Metric(_clip_score, CLIP.name, ("captions",)),
    "cmmd": Metric(_cmmd, CLIP.name, one_frame=True),
    **{
        name: Metric(_retrieval, AVERAGES, _TRAINED, fixed=fixed)
        for name, fixed in {
            "retrieval": FixedSamples(128),
            "retrieval-512": FixedSamples(512),
            "retrieval-one-step": FixedSamples(10_000, one_step=True),
        }.items()
    },
    **{
        name: Metric(unseen, looks_at, (*_TRAINED, "styles"), fixed=_HELD_OUT)
        for name, looks_at in {"unseen": AVERAGES, "unseen-fd": EFFNET}.items()
    },
    "agreement": Metric(_agreement, AGREEMENT, ("levels",)),
    "fvd": Metric(_video_frechet, VIDEO, _CLIPS),
    "fd-frames": Metric(_frechet_by_frame, EFFNET, _CLIPS),
    "fid-frames": Metric(_frechet_by_frame, INCEPTION, _CLIPS),
    "motion": Metric(_motion, MOTION, _CLIPS, least_frames=2),
}


def parse_metrics(names: str | Sequence[str]) -> tuple[tuple[str, ...], int | None]:
    """Split `fd,fid50k,...` into metrics, each once, and the number of samples in the names.

    Raises `UsageError` for an unknown name, or for numbers of samples that cannot be.

    Examples:
        >>> parse_metrics("fid50k,retrieval")
        (('fid', 'retrieval'), 50000)
    """
    metrics, counts = [], set()
    for word in names.split(",") if isinstance(names, str) else names:
        match = re.fullmatch(r"([a-z-]+(?:-\d+)?)(?:(\d+)k)?", word.strip().lower())
        if match is None or match[1] not in METRICS:
            hint = did_you_mean(word, METRICS)
            raise UsageError(f"no metric {word!r}{hint}: there are {', '.join(METRICS)}")
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
