"""Evaluating: what is missing is drawn and looked at, then numbers are computed from what is known.

Everything that cannot be is refused before the first picture is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from matryoshka_diffusion.cascade import Model
from matryoshka_diffusion.config import RunConfig, UsageError
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.eval.measures import (
    METRICS,
    Compared,
    Metric,
    Number,
    load,
    parse_metrics,
)
from matryoshka_diffusion.eval.pictures import PictureSet, drawn
from matryoshka_diffusion.eval.protocols import (
    Conditions,
    captions_in_turn,
    labels_in_turn,
    retrieval_captions,
    unconditional,
)
from matryoshka_diffusion.eval.references import Reference, name_of, of_source
from matryoshka_diffusion.eval.results import Result
from matryoshka_diffusion.eval.store import Column
from matryoshka_diffusion.files import cache_folder
from matryoshka_diffusion.metrics.naming import INCEPTION, flagged, frames_flag
from matryoshka_diffusion.metrics.networks.clip import CLIP
from matryoshka_diffusion.metrics.networks.features import EffNetLite0, Extractor
from matryoshka_diffusion.metrics.networks.inception import Inception
from matryoshka_diffusion.metrics.networks.video import FRAMES, VIDEO, VideoNet
from matryoshka_diffusion.metrics.retrieval import SEED
from matryoshka_diffusion.models.find import Progress
from matryoshka_diffusion.sampling import batch_of
from matryoshka_diffusion.train.distributed import World

Networks = Callable[[str], Extractor]
"""From the name of a network to the network."""
Told = Callable[[str, int, int], None]
"""Called with (what is being done, pictures done, pictures in all)."""
_ALONE = World()


def evaluate(
    model: Model,
    metrics: str | Sequence[str],
    *,
    source: Source | None = None,
    n: int | None = None,
    reference: Reference | None = None,
    conditions: Conditions | None = None,
    own: Reference | None = None,
    networks: Networks | None = None,
    folder: Path | None = None,
    seed: int = SEED,
    batch_size: int | None = None,
    world: World = _ALONE,
    progress: Told | None = None,
    **settings: Any,
) -> list[Result]:
    """Measure a model; a collective.

    Example:
        >>> evaluate(model, "fd,retrieval", source=source, n=2000, guidance=3.0)  # doctest: +SKIP

    Args:
        metrics: names of `METRICS`, also with a number of samples as in "fid50k".
        source: the pictures that the model was trained on.
        n: how many samples; without it, what the metrics' names say.
        reference: what samples are compared with, if not with `source`.
        conditions: what they are asked to show, if not what the pictures of `source` show, in turn.
        own: `source` as a reference, where several models are compared with it.
        networks: where networks come from; see `find_networks`.
        folder: where features are kept: for a run `RUN/eval`, else the cache.
        seed: of sample 0.
        batch_size: samples at a time; if not given 64 pictures, or clips of 64 frames in all.
        settings: of the sampler, in the place of the model's own.

    Returns:
        The numbers in the order of `metrics`, the same on all ranks.

    Raises:
        UsageError: a metric is not known, or lacks what it needs.
        ValueError: a sample has NaN in it.
    """
    asked = parse_metrics(metrics)
    folder = folder or cache_folder("eval")
    networks = networks or find_networks()
    batch_size = batch_size or batch_of(model.resolutions[-1].frames)
    if own is None and source is not None:
        own = of_source(source, name=name_of(source, model.config.data))
    load(asked.metrics, networks)

    def part(names: Sequence[str], shown: Conditions, count: int, to: Reference | None) -> Any:
        """Some of the metrics, ready to be measured."""
        samples = drawn(
            model, shown, count, folder, seed=seed, batch_size=batch_size, settings=settings
        )
        _refuse_any(names, samples, to)
        template = _template(model, shown, settings, seed, batch_size)
        return partial(
            measure, samples, to, names, networks, template, world=world, progress=progress
        )

    parts: list[Callable[[], list[Result]]] = []
    of_captions = [name for name in asked.metrics if METRICS[name].retrieval]
    if of_captions:
        shown = _retrieval_of(model.config, source)
        parts.append(part(of_captions, shown, shown.limit or 0, own))
    of_many = [name for name in asked.metrics if not METRICS[name].retrieval]
    if of_many:
        shown = conditions or in_turn(model.config, source)
        parts.append(part(of_many, shown, _count(n or asked.n, shown), reference or own))
    found = [result for measured in parts for result in measured()]
    return sorted(found, key=lambda result: asked.metrics.index(result.key))


def measure(
    made: PictureSet,
    reference: Reference | None,
    metrics: Sequence[str],
    networks: Networks,
    template: Result,
    *,
    world: World = _ALONE,
    progress: Told | None = None,
) -> list[Result]:
    """Measure a set of pictures; a collective. `template` says whose they are."""
    _refuse_any(metrics, made, reference)
    chosen = {name: METRICS[name] for name in metrics}
    extractors = load(metrics, networks)
    comparing = [metric for metric in chosen.values() if metric.compares]
    flag = None
    if reference is not None and comparing:
        told = _part(progress, reference.name)
        flag = reference.flag(made.side, "reference", world=world, progress=told)
        unknown = [metric for metric in comparing if metric.published(reference) is None]
        if reference.pictures is not None and unknown:
            real = reference.pictures
            real.fill(_columns(unknown, extractors), world=world, progress=told)
            world.once(lambda: [metric.check(real) for metric in unknown])
    columns = _columns(chosen.values(), extractors)
    made.fill(columns, world=world, progress=_part(progress, made.name))

    def numbers() -> list[Result]:
        return [
            _result(template, name, number, compared, flag)
            for name, metric in chosen.items()
            for compared in [_compared(made, reference, extractors, metric)]
            for number in metric.compute(compared)
        ]

    return world.once(numbers)


def _compared(
    made: PictureSet,
    reference: Reference | None,
    extractors: Mapping[str, Extractor],
    metric: Metric,
) -> Compared:
    to = reference if metric.compares else None
    extractor = extractors.get(metric.network)
    return Compared(made, to, extractor, metric.published(to), metric.looks_at(extractor))


def _columns(metrics: Iterable[Metric], extractors: Mapping[str, Extractor]) -> list[Column]:
    """What has to be known of each picture, each once."""
    columns = (metric.looks_at(extractors.get(metric.network)) for metric in metrics)
    return list({column.name: column for column in columns}.values())


def _part(progress: Told | None, what: str) -> Progress | None:
    return None if progress is None else lambda done, total: progress(what, done, total)


def _result(
    template: Result, key: str, number: Number, compared: Compared, flag: str | None
) -> Result:
    made, network, reference = compared.made, compared.extractor, compared.reference
    metric = METRICS[key]
    seen = frames_flag(made.count, made.frames, metric.independent) if metric.of_frames else None
    flags = (*template.flags, seen, *number.flags, flag if reference else None)
    update: dict[str, Any] = {}
    if network is not None:
        update |= {
            "extractor": network.name,
            "extractor_weights": network.weights,
            "resize": network.resize,
        }
    if reference is not None:
        count = reference.count if compared.published is None else None
        update |= {"reference": reference.name, "reference_count": count}
    return replace(
        template,
        key=key,
        metric=flagged(number.name, *flags),
        value=number.value,
        others=number.others,
        words=number.words,
        higher_is_better=number.higher_is_better,
        n=made.count,
        frames=made.frames,
        **update,
    )


def _template(
    model: Model, shown: Conditions, settings: dict[str, Any], seed: int, batch_size: int
) -> Result:
    """What all numbers of a model say of it."""
    described = model.describe(settings)
    sampling = described["sampling"]
    if "base" in described:  # of a cascade
        sampling = {**sampling, "base": described["base"]["sampling"]}
    return Result(
        of=model.config.name,
        weights=described["weights"],
        conditions=shown.name,
        sampling=sampling,
        seed=seed,
        precision=described["precision"],
        device=described["device"],
        batch_size=batch_size,
        flags=() if described["averaged"] else ("no EMA",),
    )


# --- what is asked of samples ------------------------------------------------------------------


def in_turn(config: RunConfig, source: Source | None) -> Conditions:
    """What a model is asked for if nothing else is said: what its training pictures show, in turn.

    Raises:
        UsageError: it takes captions or classes, and there are no pictures.
    """
    if config.model.text is None and not config.model.classes:
        return unconditional()
    if source is None:
        raise UsageError(
            f"{config.name} has to be asked for something: its training pictures are needed, or a "
            "file of captions (--captions), or random classes (--protocol imagenet50k)"
        )
    return (labels_in_turn if config.model.text is None else captions_in_turn)(source)


def _retrieval_of(config: RunConfig, source: Source | None) -> Conditions:
    if config.model.text is None:
        raise UsageError(
            f"{config.name} has no prompts to retrieve: leave the metric retrieval away"
        )
    if source is None:
        raise UsageError("retrieval needs the pictures that the model was trained on")
    return retrieval_captions(source)


def _count(n: int | None, shown: Conditions) -> int:
    if n is None:
        raise UsageError("how many samples? give -n, or a metric such as fid50k that says so")
    if shown.limit is not None and shown.limit < n:
        raise UsageError(
            f"{shown.name}: there are {shown.limit:,} for {n:,} samples; give -n {shown.limit}, "
            "which the number then says"
        )
    return n


# --- what cannot be ----------------------------------------------------------------------------


def _refuse_any(metrics: Iterable[str], made: PictureSet, reference: Reference | None) -> None:
    for name in metrics:
        _refuse(name, METRICS[name], made, reference)


def _refuse(name: str, metric: Metric, made: PictureSet, reference: Reference | None) -> None:
    """Raise `UsageError` if the metric lacks what it needs."""
    if metric.clips and made.frames is None:
        raise UsageError(f"{name} is about clips, and {made.name} has pictures: leave it away")
    if metric.clips and (made.frames or 0) < metric.least_frames:
        raise UsageError(
            f"{name} needs clips of at least {metric.least_frames} frames, {made.name} has "
            f"{made.kind}: leave it away"
        )
    if metric.count(made) < metric.least:
        raise UsageError(
            f"{name} needs at least {metric.least:,} samples, not {metric.count(made):,}"
        )
    if metric.retrieval and not made.belong_to:
        raise UsageError(
            f"{name} is about what a model draws for the captions of its training pictures, which "
            f"{made.name} was not drawn for: leave it away, or measure the model (mdm eval RUN)"
        )
    if metric.captions and not made.captions:
        raise UsageError(f"{name} needs captions, which {made.name} was not drawn for")
    if metric.levels and made.levels < 2:
        raise UsageError(f"{name} needs pictures of several levels, {made.name} has one")
    if not metric.compares:
        return
    if reference is None:
        raise UsageError(f"{name} compares with pictures: name them with --ref")
    real = reference.pictures
    if (None if real is None else real.frames) != made.frames:
        kind = "moments of pictures" if real is None else real.kind
        raise UsageError(
            f"{reference.name} has {kind}, {made.name} {made.kind}: only clips of as many frames "
            "can be compared"
        )
    if real is None:
        if metric.published(reference) is None:
            raise UsageError(
                f"{name} needs the pictures of its reference, but {reference.name} holds only mu "
                "and sigma of Inception's features"
            )
        return
    if metric.count(real) < metric.least:
        raise UsageError(
            f"{name} needs at least {metric.least:,} pictures of reference, not "
            f"{metric.count(real):,} ({reference.name})"
        )


# --- the networks ------------------------------------------------------------------------------


def find_networks(
    device: torch.device | str = "cpu",
    inception: str | Path | None = None,
    clip: str | Path | None = None,
    video: str | Path | None = None,
    frames: int | None = None,
) -> Networks:
    """The networks by name, each loaded when it is first asked for.

    `video` is FVD's network, which will be asked about clips of `frames` frames (16 if not given).
    """

    @cache
    def found(name: str) -> Extractor:
        if name == INCEPTION and inception is None:
            raise UsageError(
                "FID, KID, IS and prdc look through Inception: give its weights, --inception FILE "
                "(pt_inception-2015-12-05-6726825d.pth or inception-2015-12-05.pt); fd, kd and "
                "prdc-fd need none"
            )
        if name == CLIP.name and clip is None:
            raise UsageError(
                "the CLIP score and CMMD look through CLIP: give a folder of transformers with "
                "--clip PATH"
            )
        if name == VIDEO and video is None:
            raise UsageError(
                "FVD looks through a network of clips: give its TorchScript file, --fvd FILE "
                "(i3d_torchscript.pt); fd, fd-frames and motion need none"
            )
        if name == INCEPTION:
            return Inception(str(inception), device)
        if name == VIDEO:
            return VideoNet(str(video), frames or FRAMES, device)
        return CLIP(str(clip), device) if name == CLIP.name else EffNetLite0(device)

    return found
