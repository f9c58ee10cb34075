"""Evaluating: what is missing is drawn and looked at, then numbers are computed from what is known.

Everything that cannot be is refused before the first picture is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from matryoshka_diffusion.config import RunConfig, UsageError
from matryoshka_diffusion.data.batch import Source
from matryoshka_diffusion.eval import naming
from matryoshka_diffusion.eval.clip import CLIP
from matryoshka_diffusion.eval.features import NETWORK, EffNetLite0, Extractor
from matryoshka_diffusion.eval.inception import Inception
from matryoshka_diffusion.evaluation.measures import METRICS, Compared, Metric, Number, parse_metrics
from matryoshka_diffusion.evaluation.pictures import BATCH, SEED, Model, PictureSet, drawn
from matryoshka_diffusion.evaluation.protocols import (
    Conditions,
    captions_in_turn,
    labels_in_turn,
    retrieval_captions,
    unconditional,
)
from matryoshka_diffusion.evaluation.references import Reference, of_source
from matryoshka_diffusion.evaluation.results import Result
from matryoshka_diffusion.files import cache_folder
from matryoshka_diffusion.train.world import World

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
    networks: Networks | None = None,
    folder: Path | None = None,
    seed: int = SEED,
    batch_size: int = BATCH,
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
        networks: where networks come from; see `find_networks`.
        folder: where features are kept: for a run `RUN/eval`, else the cache.
        seed: of sample 0.
        settings: of the sampler, in the place of the model's own.

    Returns:
        The numbers in the order of `metrics`, the same on all ranks.

    Raises:
        UsageError: a metric is not known, or lacks what it needs.
        ValueError: a sample is not finite.
    """
    asked = parse_metrics(metrics)
    n = n or asked.n
    folder = folder or cache_folder("eval")
    networks = networks or find_networks()
    many = [name for name in asked.metrics if not METRICS[name].retrieval]
    found: list[Result] = []
    options: dict[str, Any] = {
        **{"seed": seed, "batch_size": batch_size, "settings": settings},
    }
    told: dict[str, Any] = {"world": world, "progress": progress}
    template = _template(model, settings, seed, batch_size)
    own = None if source is None else of_source(source, own=True)
    for name in asked.metrics:
        if METRICS[name].retrieval:
            asked_for = _retrieval_of(model.config, source)
            samples = drawn(model, asked_for, asked_for.limit or 0, folder, **options)
            found += measure(samples, own, [name], networks, template, **told)
    if many:
        asked_for = conditions or in_turn(model.config, source)
        count = _count(n, asked_for)
        samples = drawn(model, asked_for, count, folder, **options)
        found += measure(samples, reference or own, many, networks, template, **told)
    return sorted(found, key=lambda result: asked.metrics.index(result.key))


def measure(
    made: PictureSet[Any],
    reference: Reference | None,
    metrics: Sequence[str],
    networks: Networks,
    template: Result,
    *,
    world: World = _ALONE,
    progress: Told | None = None,
) -> list[Result]:
    """Measure a set of pictures; a collective. `template` says whose they are."""
    chosen = {name: METRICS[name] for name in metrics}
    for name, metric in chosen.items():
        _refuse(name, metric, made, reference)
    extractors = {
        metric.network: networks(metric.network) for metric in chosen.values() if metric.network
    }
    flag = None
    if reference is not None and any(metric.compares for metric in chosen.values()):
        flag = reference.flag(made.side, world=world, progress=_part(progress, reference.name))
        _fill(reference.pictures, chosen, extractors, world, _part(progress, reference.name))
    _fill(made, chosen, extractors, world, _part(progress, made.name), made=True)

    def numbers() -> list[Result]:
        return [
            _result(template, name, metric, number, compared, flag)
            for name, metric in chosen.items()
            for compared in [Compared(made, reference, extractors.get(metric.network))]
            for number in metric.compute(compared)
        ]

    return world.once(numbers)
