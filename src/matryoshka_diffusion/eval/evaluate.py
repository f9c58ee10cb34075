"""Evaluation: draw and measure what is missing, then compute numbers from what is stored.

Everything that is impossible is refused before the first image is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matryoshka_diffusion.cascade import Model
from matryoshka_diffusion.config import RunConfig, UsageError
from matryoshka_diffusion.data.source import Source, kind_of, open_source, split
from matryoshka_diffusion.eval.feature_store import Column, PictureSet, samples_of
from matryoshka_diffusion.eval.metric import (
    METRICS,
    Comparison,
    Networks,
    Number,
    find_networks,
    parse_metrics,
)
from matryoshka_diffusion.eval.prompts import (
    RETRIEVED,
    Conditions,
    captions_of_file,
    in_turn,
    random_labels,
    retrieval_captions,
)
from matryoshka_diffusion.eval.reference import (
    Reference,
    fields_like,
    first_picture,
    fixed_clips,
    open_reference,
    reference_of,
    shrunk,
)
from matryoshka_diffusion.eval.result import Result, flagged
from matryoshka_diffusion.files import cache_folder
from matryoshka_diffusion.models.find import Progress
from matryoshka_diffusion.sampling import batch_of
from matryoshka_diffusion.train.distributed import World

SEED = 1_000_000
"""Seed of sample 0: far from the seeds that people try, so that nobody tunes on them."""

PROTOCOLS = {"coco30k": (("fid", "clip"), 30_000), "imagenet50k": (("fid",), 50_000)}
"""Published protocols: metrics and number of samples."""

HELD_OUT = "held-out"
Report = Callable[[str, int, int], None]
"""Called with (what is measured, images done, images in all)."""
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
    progress: Report | None = None,
    **settings: Any,
) -> list[Result]:
    """Measure a model; a collective. The numbers are in the order of `metrics`.

    Args:
        metrics: names of `METRICS`, also with a number of samples as in "fid50k".
        source: images that the model was trained on.
        n: number of samples; by default the one in the metrics' names.
        reference: real images for the comparison; by default `own`.
        conditions: captions or classes of the samples; by default those of `source`, in turn.
        own: `source` as a reference, opened once by callers that measure several models.
        networks: by default what `find_networks` finds without files.
        folder: where features are kept: for a run `RUN/eval`, by default the cache.
        batch_size: samples at a time; by default 64 images, or clips of 64 frames in all.
        settings: sampling settings that replace the model's own, such as `guidance=3.0`.

    Raises:
        UsageError: a metric is unknown, or lacks what it needs.
        ValueError: a sample has NaN in it.
    """
    names, count = parse_metrics(metrics)
    networks = find_networks(names) if networks is None else networks
    batch_size = batch_size or batch_of(model.resolutions[-1].frames)
    if own is None and source is not None:
        own = reference_of(source, model.config.data)

    def samples(some: Sequence[str], of: Conditions, number: int, to: Reference | None) -> Any:
        """Samples that some of the metrics take, with what all of their numbers say."""
        root = folder or cache_folder("eval")
        how: dict[str, Any] = {"seed": seed, "batch_size": batch_size}
        made = samples_of(model, of, number, root, **how, settings=settings)
        _refuse_unmet(some, made, to)
        return made, to, some, networks, _about(model, settings, conditions=of.name, **how)

    parts = []
    if retrieving := [name for name in names if _retrieves(name)]:
        fixed = retrieval_captions(model.config, source)
        parts.append(samples(retrieving, fixed, fixed.limit or 0, own))
    if others := [name for name in names if not _retrieves(name)]:
        rule = conditions or in_turn(model.config, source)
        parts.append(samples(others, rule, rule.check(n or count), reference or own))
    results = [one for part in parts for one in measure(*part, world=world, progress=progress)]
    return sorted(results, key=lambda result: names.index(result.key))


def _retrieves(name: str) -> bool:
    """Tell metrics with fixed captions from those that draw any number of samples."""
    return "training captions" in METRICS[name].needs


def _refuse_unmet(names: Iterable[str], made: PictureSet, reference: Reference | None) -> None:
    for name in names:
        for words in METRICS[name].unmet(made, reference):
            raise UsageError(f"{name} {words}; or omit {name}")


def _about(model: Model, settings: dict[str, Any], **how: Any) -> Result:
    """The part of a result that all numbers of a model share."""
    described = model.describe(settings)
    # Of a cascade, the base's settings are among the upsampler's.
    base = {"base": described["base"]["sampling"]} if "base" in described else {}
    return Result(
        of=model.config.name,
        weights=described["weights"],
        sampling={**described["sampling"], **base},
        precision=described["precision"],
        device=described["device"],
        flags=() if described["averaged"] else ("no EMA",),
        **how,
    )


def measure(
    made: PictureSet,
    reference: Reference | None,
    metrics: Sequence[str],
    networks: Networks,
    about: Result,
    *,
    world: World = _ALONE,
    progress: Report | None = None,
) -> list[Result]:
    """Measure a set of images; a collective. `about` says whose they are."""
    _refuse_unmet(metrics, made, reference)
    parts = {
        name: Comparison(metric, made, reference if "reference" in metric.needs else None, networks)
        for name, metric in ((name, METRICS[name]) for name in metrics)
    }
    flag = None
    if reference is not None and (compared := [one for one in parts.values() if one.reference]):
        bar = _bar(progress, reference.name)
        flag = reference.flag(made.side, "reference", world=world, progress=bar)
        unpublished = [one for one in compared if one.published is None]
        if reference.pictures is not None and unpublished:
            real = reference.pictures
            real.fill(_columns(unpublished), world=world, progress=bar)
            world.once(lambda: [one.metric.check(real) for one in unpublished])
    made.fill(_columns(parts.values()), world=world, progress=_bar(progress, made.name))
    return world.once(
        lambda: [
            _result(about, name, number, part, flag)
            for name, part in parts.items()
            for number in part.metric.compute(part)
        ]
    )


def _bar(progress: Report | None, what: str) -> Progress | None:
    return None if progress is None else lambda done, total: progress(what, done, total)


def _columns(comparisons: Iterable[Comparison]) -> list[Column]:
    """The columns that metrics take, each once."""
    return list({one.column.name: one.column for one in comparisons}.values())


def _result(about: Result, key: str, number: Number, part: Comparison, flag: str | None) -> Result:
    made, metric, reference, update = part.made, part.metric, part.reference, {}
    frames = None
    if metric.by_frame and made.frames is not None:
        counts = f"frames of clips, {made.count:,} x {made.frames}"
        frames = "one frame of each clip" if metric.one_frame else counts
    if metric.network:
        update["extractor"], update["resize"] = part.network.name, part.network.resize
        update["extractor_weights"] = part.network.weights
    if reference is not None:
        update["reference"] = reference.name
        if reference.pictures is not None and part.published is None:
            update["reference_count"] = reference.pictures.count
    flags = (*about.flags, frames, *number.flags, flag if reference else None)
    return replace(
        about,
        key=key,
        metric=flagged(number.name, flags),
        value=number.value,
        others=number.others,
        words=number.words,
        higher_is_better=number.higher_is_better,
        n=made.count,
        frames=made.frames,
        **update,
    )


def plan(
    config: RunConfig,
    side: int,
    frames: int | None = None,
    *,
    metrics: str | None = None,
    n: int | None = None,
    protocol: str | None = None,
    captions: Path | None = None,
    reference: str | None = None,
    networks: Callable[[Sequence[str]], Networks] = lambda metrics: {},
) -> dict[str, Any]:
    """Arguments of `evaluate` for the words of a command.

    Args:
        side, frames: of the model's samples.
        metrics: by default those of the protocol; without one prompt retrieval and, with `n`, the
            Fréchet distance on the packaged network and, of clips, their motion.
        n: replaces the number of a protocol or of the metrics' names.
        captions: a file to draw captions from.
        reference: "held-out", an .npz or any data; by default the training images.
        networks: loads the networks of the metrics, before any data is opened.

    Raises:
        UsageError: something is missing, or does not fit the model.
        OSError, ValueError: the data cannot be used.
    """
    words = metrics or (PROTOCOLS[protocol][0] if protocol else _usual(config, frames, n))
    names, named = parse_metrics(words)
    others = [name for name in names if not _retrieves(name)]
    comparing = any("reference" in METRICS[name].needs for name in others)
    sampling = {"-n": n, "--protocol": protocol, "--captions": captions}
    for option, value in ({} if others else sampling).items():
        if value is not None:
            raise UsageError(
                f"{option} {value}: retrieval has {RETRIEVED} fixed captions; omit it, or add a "
                "metric of other samples (--metrics retrieval,fd -n 2000)"
            )
    if reference is not None and not comparing:
        raise UsageError(
            f"--ref {reference}: none of {', '.join(names)} compares with it; omit it, or add a "
            "metric that does (--metrics fd)"
        )
    conditions = _conditions(config, protocol, captions)
    if protocol == "coco30k" and comparing and reference is None:
        raise UsageError("--protocol coco30k compares with pictures of COCO: add --ref val2014")
    loaded = networks(names)
    conditional = config.model.text is not None or bool(config.model.classes)
    source = held_out = None
    if (
        len(others) < len(names)
        or (conditional and conditions is None)
        or (comparing and reference in (None, HELD_OUT))
    ):
        # Training may take another clip of a video each time; evaluation always takes one.
        data = fixed_clips(config.data)
        whole = open_source(data, config.data_side, frames and config.data_frames)
        if (whole.side, whole.frames) != (side, frames):
            whole = shrunk(whole, side, frames)
        source, held_out = split(whole, config.data.held_out)
    real = None
    if reference not in (None, HELD_OUT):
        real = open_reference(reference, side, frames, **fields_like(config.data, reference))
    elif reference == HELD_OUT:
        if held_out is None:
            raise UsageError(f"{config.name} holds nothing out (data.held_out is 0): omit --ref")
        prefix = f"the held-out {config.data.held_out:.3g} of "
        real = reference_of(held_out, config.data, name=prefix)
    return {
        "metrics": names,
        "n": n or named or (PROTOCOLS[protocol][1] if protocol else None),
        "source": source,
        "own": None if source is None else reference_of(source, config.data),
        "reference": real,
        "conditions": conditions,
        "networks": loaded,
    }


def _usual(config: RunConfig, frames: int | None, n: int | None) -> list[str]:
    usual = [] if config.model.text is None else ["retrieval"]
    if n is not None:
        usual += ["fd"] if frames is None else ["fd", "motion"]
    if not usual:
        raise UsageError(f"{config.name} has no prompts to retrieve: give -n for the distance")
    return usual


def _conditions(
    config: RunConfig, protocol: str | None, captions: Path | None
) -> Conditions | None:
    if captions is not None and config.model.text is None:
        raise UsageError(f"{config.name} takes no captions: omit --captions")
    if protocol == "coco30k" and captions is None:
        raise UsageError(
            "--protocol coco30k draws captions from a file: give --captions captions_val2014.json"
        )
    if protocol == "imagenet50k":
        if not config.model.classes:
            raise UsageError(f"--protocol imagenet50k asks for classes; {config.name} takes none")
        return random_labels(config.model.classes)
    return None if captions is None else captions_of_file(captions)


def compare(
    first: str,
    second: str,
    metrics: Sequence[str],
    networks: Networks,
    *,
    side: int | None = None,
    frames: int | None = None,
    frame_stride: int | None = None,
    world: World = _ALONE,
    progress: Report | None = None,
) -> list[Result]:
    """Measure the images of `first` as if they were samples, against those of `second`.

    By default `side` is that of the first image. With `frames`, both are sets of videos: samples
    begin at their start and have each frame; real ones are cut as training clips are, by
    `frame_stride`. Raises `UsageError` if a set cannot be compared.
    """
    npz = first.endswith(".npz")
    if side is not None and npz:
        raise UsageError(f"{first} has pictures of one side, which is compared: omit --side")
    if frames is None and frame_stride is not None:
        raise UsageError("--frame-stride is for videos: add --frames")
    for name in (second, first):
        shorter_side, moves = first_picture(name)
        if frames is None and (kind_of(name) == "clips" or moves):
            raise UsageError(f"{name} holds videos: give --frames, how many are compared")
    side = side or shorter_side
    if not (side or npz):  # the header of an .npz says it
        raise UsageError(f"{first} is no folder of pictures: give their side, --side N")
    samples = open_reference(first, side, frames, frame_stride=1, clip="start")
    if samples.pictures is None:
        raise UsageError(f"{first} holds no pictures, only moments: they can be the second set")
    flag = samples.flag(samples.pictures.side, "samples", world=world)
    about = Result(of=samples.name, flags=() if flag is None else (flag,))
    stride = {} if frame_stride is None else {"frame_stride": frame_stride}
    reference = open_reference(second, samples.pictures.side, frames, clip="fixed", **stride)
    return measure(
        samples.pictures, reference, metrics, networks, about, world=world, progress=progress
    )
