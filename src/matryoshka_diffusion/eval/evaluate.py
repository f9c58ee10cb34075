"""Evaluation: draw and measure what is missing, then compute numbers from what is stored.

Everything that is impossible is refused before the first image is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from matryoshka_diffusion.cascade import Model
from matryoshka_diffusion.config import RunConfig, UsageError
from matryoshka_diffusion.data.source import Source, joined, kind_of, open_source, split
from matryoshka_diffusion.eval import prompts
from matryoshka_diffusion.eval import reference as references
from matryoshka_diffusion.eval.classes import find_classifier
from matryoshka_diffusion.eval.comparison import CLASSIFIER, Comparison, Networks
from matryoshka_diffusion.eval.feature_store import PictureSet, Report, samples_of
from matryoshka_diffusion.eval.metric import METRICS, find_networks, parse_metrics
from matryoshka_diffusion.eval.prompts import Conditions
from matryoshka_diffusion.eval.reference import Reference, open_reference, reference_of
from matryoshka_diffusion.eval.result import Result
from matryoshka_diffusion.files import cache_folder
from matryoshka_diffusion.models.find import Progress
from matryoshka_diffusion.training.distributed import ALONE, World

SEED = 1_000_000
"""Seed of sample 0: far from the seeds that people try, so that nobody tunes on them."""

PROTOCOLS = {"coco30k": (("fid", "clip"), 30_000), "imagenet50k": (("fid",), 50_000)}
"""Published protocols: metrics and number of samples."""

HELD_OUT = "held-out"


def evaluate(
    model: Model,
    metrics: str | Sequence[str],
    *,
    source: Source | None = None,
    held_out: Source | None = None,
    n: int | None = None,
    reference: Reference | None = None,
    conditions: Conditions | None = None,
    own: Reference | None = None,
    networks: Networks | None = None,
    folder: Path | None = None,
    seed: int = SEED,
    batch_size: int | None = None,
    world: World = ALONE,
    progress: Report | None = None,
    **settings: Any,
) -> list[Result]:
    """Measure a model; a collective. The numbers are in the order of `metrics`.

    Args:
        metrics: names of `METRICS`, also with a number of samples as in "fid50k".
        source: images that the model was trained on.
        held_out: images of the same set that it was not trained on.
        n: number of samples; by default the one in the metrics' names.
        reference: real images for the comparison; by default `own`.
        conditions: captions or classes of the samples; by default those of `source`, in turn.
        own: `source` as a reference, opened once by callers that measure several models.
        networks: by default what `find_networks` finds without files.
        folder: where features are kept: for a run `RUN/eval`, by default the cache.
        batch_size: samples at a time; by default at most 64, and 4 million pixels.
        settings: sampling settings that replace the model's own, such as `guidance=3.0`.

    Raises:
        UsageError: a metric is unknown, or lacks what it needs.
        ValueError: a sample has NaN in it.
    """
    names, count = parse_metrics(metrics)
    networks = find_networks(names) if networks is None else networks
    how = {"seed": seed, "batch_size": batch_size or model.batch_size}
    if own is None and source is not None:
        own = reference_of(source, model.config.data)
    sets = []
    for fixed in dict.fromkeys(METRICS[name].fixed for name in names):
        some = [name for name in names if METRICS[name].fixed == fixed]
        if fixed is not None:
            rule, real = prompts.retrieval_captions(model.config, source, fixed.captions), own
            if fixed.held_out:
                rule, real = _held_out_captions(model.config, source, held_out, fixed.captions)
            number, used = rule.check(rule.limit), settings | fixed.settings
        else:
            rule, real = conditions or prompts.in_turn(model.config, source), reference or own
            number, used = rule.check(n or count), settings
        root = folder or cache_folder("eval")
        made = samples_of(model, rule, number, root, settings=used, **how)
        _refuse_unmet(some, made, real)
        sets.append((made, real, some, _about(model, used, rule, how)))
    if _classify(names):
        classifier = find_classifier(source, own, world, progress)
        networks = {**networks, CLASSIFIER: classifier}
    results = [
        one
        for made, real, some, about in sets
        for one in measure(made, real, some, networks, about, world=world, progress=progress)
    ]
    return sorted(results, key=lambda result: names.index(result.key))


def _held_out_captions(
    config: RunConfig, source: Source | None, held_out: Source | None, most: int
) -> tuple[Conditions, Reference]:
    """Captions of held-out images, and all images, those that were trained on first."""
    if source is None or held_out is None:
        raise UsageError(
            f"{config.name} holds nothing out (data.held_out is {config.data.held_out:g}): omit "
            "unseen, or train with --set data.held_out=0.1"
        )
    rule = prompts.retrieval_captions(config, held_out, most, first=len(source))
    return rule, reference_of(joined(source, held_out), config.data)


def _classify(names: Iterable[str]) -> bool:
    return any(METRICS[name].network == CLASSIFIER for name in names)


def _refuse_unmet(names: Iterable[str], made: PictureSet, reference: Reference | None) -> None:
    for name in names:
        for words in METRICS[name].unmet(made, reference):
            raise UsageError(f"{name} {words}; or omit {name}")


def _about(model: Model, settings: dict[str, Any], rule: Conditions, how: dict[str, Any]) -> Result:
    """The part of a result that all numbers of a model share."""
    described = model.describe(settings)
    # Of a cascade, the base's settings are among the upsampler's.
    base = {"base": described["base"]["sampling"]} if "base" in described else {}
    return Result(
        of=model.config.name,
        conditions=rule.name,
        sampling={**described["sampling"], **base},
        flags=() if described["averaged"] else ("no EMA",),
        **{name: described[name] for name in ("weights", "precision", "device")},
        **how,
    )


def measure(
    made: PictureSet,
    reference: Reference | None,
    metrics: Sequence[str],
    networks: Networks,
    about: Result,
    *,
    world: World = ALONE,
    progress: Report | None = None,
) -> list[Result]:
    """Measure a set of images; a collective. `about` says whose they are."""
    _refuse_unmet(metrics, made, reference)

    def fill(pictures: PictureSet, parts: Iterable[Comparison]) -> None:
        columns = {one.column.name: one.column for one in parts}
        pictures.fill(list(columns.values()), world=world, progress=bar(pictures.name))

    def bar(what: str) -> Progress | None:
        return None if progress is None else partial(progress, what)

    parts = [Comparison(name, METRICS[name], made, None, networks, about) for name in metrics]
    comparing = [place for place, one in enumerate(parts) if "reference" in one.metric.needs]
    if reference is not None and comparing:
        flag = reference.flag(made.side, "reference", world=world, progress=bar(reference.name))
        for place in comparing:
            parts[place] = replace(parts[place], reference=reference, flag=flag)
    unpublished = [one for one in parts if one.reference and one.published is None]
    if unpublished:
        fill(unpublished[0].real, unpublished)
    fill(made, parts)
    return world.once(lambda: [number for one in parts for number in one.metric.compute(one)])


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
        side: of the model's samples, in pixels.
        frames: of its clips, or None.
        metrics: by default those of the protocol, else retrieval from samples and in one step and,
            with `n`, fd and motion.
        n: replaces the number of a protocol or of the metrics' names.
        captions: a file to draw captions from.
        reference: "held-out", an .npz or any data; by default the training images.
        networks: loads the networks of the metrics, before any data is opened.

    Raises:
        UsageError: something is missing, or does not fit the model.
        OSError, ValueError: the data cannot be used.
    """
    text, classes = config.model.text is not None, config.model.classes
    distances = ["fd"] if frames is None else ["fd", "motion"]
    usual = ["retrieval", "retrieval-one-step"] * text + distances * bool(n)
    usual, usual_n = PROTOCOLS[protocol] if protocol else (usual, None)
    names, named = parse_metrics(metrics or usual)
    others = [name for name in names if METRICS[name].fixed is None]
    comparing = any("reference" in METRICS[name].needs for name in others)
    options = {"-n": n, "--protocol": protocol, "--captions": captions, "--ref": reference}
    _refuse_options(config, names, others, comparing, options)
    conditions = captions and prompts.captions_of_file(captions)
    if protocol == "imagenet50k":
        conditions = prompts.random_labels(classes)
    loaded = networks(names)
    source = held_out = real = None
    if (
        len(others) < len(names)
        or ((text or classes) and conditions is None)
        or (comparing and reference in (None, HELD_OUT))
        or _classify(names)
    ):
        # Training may take another clip of a video each time; evaluation always takes one.
        data = references.fixed_clips(config.data)
        whole = open_source(
            data, config.data_side, frames and config.data_frames, config.data_channels
        )
        if (whole.side, whole.frames) != (side, frames):
            whole = references.shrunk(whole, side, frames)
        source, held_out = split(whole, config.data.held_out)
    if reference not in (None, HELD_OUT):
        real = open_reference(
            reference, side, frames, **references.fields_like(config.data, reference)
        )
    elif reference == HELD_OUT:
        if held_out is None:
            raise UsageError(f"{config.name} holds nothing out (data.held_out is 0): omit --ref")
        prefix = f"the held-out {config.data.held_out:.3g} of "
        real = reference_of(held_out, config.data, prefix=prefix)
    return {
        "metrics": names,
        "n": n or named or usual_n,
        "source": source,
        "held_out": held_out,
        "own": None if source is None else reference_of(source, config.data),
        "reference": real,
        "conditions": conditions,
        "networks": loaded,
    }


def _refuse_options(
    config: RunConfig,
    names: Sequence[str],
    others: Sequence[str],
    comparing: bool,
    options: Mapping[str, Any],
) -> None:
    """Raise `UsageError` for what is missing or does not fit the model.

    `others` are the metrics that draw samples of their own; `comparing` tells if one of them takes
    a reference.
    """
    protocol, ref, captions = (options[f"--{name}"] for name in ("protocol", "ref", "captions"))
    coco = protocol == "coco30k"
    fixed = [f"{name} {value}" for name, value in options.items() if value and name != "--ref"]
    refusals = {
        f"{config.name} has no prompts to retrieve: give -n for the distance": not names,
        f"{', '.join(fixed)}: {', '.join(names)} has fixed captions; omit it, or add a "
        "metric of other samples (--metrics retrieval,fd -n 2000)": fixed and not others,
        f"--ref {ref}: none of {', '.join(names)} compares with it; omit it, or add a metric that "
        "does (--metrics fd)": ref and not comparing,
        f"{config.name} takes no captions: omit --captions": captions and not config.model.text,
        "--protocol coco30k: add --captions captions_val2014.json": coco and not captions,
        "--protocol coco30k compares with images of COCO: add --ref val2014": (
            coco and comparing and not ref
        ),
        f"--protocol imagenet50k draws classes; {config.name} takes none": (
            protocol == "imagenet50k" and not config.model.classes
        ),
    }
    for message, applies in refusals.items():
        if applies:
            raise UsageError(message)


def compare(
    first: str,
    second: str,
    metrics: Sequence[str],
    networks: Networks,
    *,
    side: int | None = None,
    frames: int | None = None,
    frame_stride: int | None = None,
    world: World = ALONE,
    progress: Report | None = None,
) -> list[Result]:
    """Measure the images of `first` as if they were samples, against those of `second`.

    By default `side` is that of the first image. With `frames`, both are sets of videos: samples
    begin at their start and have each frame; real ones are cut as training clips are, by
    `frame_stride`. Raises `UsageError` if a set cannot be compared.
    """
    npz = first.endswith(".npz")
    if side is not None and npz:
        raise UsageError(f"{first} has images of one side, which is compared: omit --side")
    if frames is None and frame_stride is not None:
        raise UsageError("--frame-stride is for videos: add --frames")
    for name in (second, first):
        shorter_side, moves = references.first_picture(name)
        if frames is None and (kind_of(name) == "clips" or moves):
            raise UsageError(f"{name} holds videos: give --frames, how many are compared")
    side = side or shorter_side
    if not (side or npz):  # the header of an .npz says it
        raise UsageError(f"{first} is no folder of images: give their side, --side N")
    samples = open_reference(first, side, frames, frame_stride=1, clip="start")
    if samples.pictures is None:
        raise UsageError(f"{first} holds no images, only moments: they can be the second set")
    flag = samples.flag(samples.pictures.side, "samples", world=world)
    about = Result(of=samples.name, flags=() if flag is None else (flag,))
    stride = {} if frame_stride is None else {"frame_stride": frame_stride}
    reference = open_reference(second, samples.pictures.side, frames, clip="fixed", **stride)
    sets = (samples.pictures, reference)
    return measure(*sets, metrics, networks, about, world=world, progress=progress)
