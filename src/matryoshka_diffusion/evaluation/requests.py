"""What a command line names, opened: protocols, references, captions, two sets of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from matryoshka_diffusion.config import DataConfig, RunConfig, UsageError
from matryoshka_diffusion.data.batch import Source
from matryoshka_diffusion.data.images import SUFFIXES
from matryoshka_diffusion.data.sources import absolute, kind_of, open_source
from matryoshka_diffusion.data.split import split
from matryoshka_diffusion.evaluation.measures import METRICS, Asked, parse_metrics
from matryoshka_diffusion.evaluation.protocols import (
    PROTOCOLS,
    Conditions,
    captions_of_file,
    random_labels,
)
from matryoshka_diffusion.evaluation.references import Reference, of_npz, of_source
from matryoshka_diffusion.evaluation.results import Result
from matryoshka_diffusion.evaluation.run import Networks, Told, measure
from matryoshka_diffusion.evaluation.shrunk import Shrunk
from matryoshka_diffusion.files import cache_folder, digest
from matryoshka_diffusion.pipeline import WEIGHTS
from matryoshka_diffusion.train.world import World

HELD_OUT = "held-out"
_ALONE = World()


class Request(NamedTuple):
    """The arguments of `evaluate` that the words of a command stand for."""

    metrics: tuple[str, ...]
    n: int | None
    source: Source | None
    reference: Reference | None
    conditions: Conditions | None


def request(
    config: RunConfig,
    side: int,
    *,
    metrics: str | None = None,
    n: int | None = None,
    protocol: str | None = None,
    captions: Path | None = None,
    reference: str | None = None,
) -> Request:
    """Open what is named, and the model's own training pictures where they are needed.

    Args:
        metrics: those of the protocol if not given; without one prompt retrieval, and with `n` the
            Fréchet distance on the packaged network.
        n: in the place of what a protocol or the name of a metric says.
        protocol: one of `PROTOCOLS`.
        captions: a file to draw captions from.
        reference: "held-out", an .npz or any data; the training pictures if not given.

    Raises:
        UsageError: something is missing, or does not fit the model.
        OSError, ValueError: the data cannot be used.
    """
    asked = _metrics(config, metrics, n, protocol)
    if n is None:
        n = asked.n if protocol is None else asked.n or PROTOCOLS[protocol].n
    conditions = _conditions(config, protocol, captions)
    retrieves = any(METRICS[name].retrieval for name in asked.metrics)
    compares = any(METRICS[name].compares and not METRICS[name].retrieval for name in asked.metrics)
    if protocol == "coco30k" and compares and reference is None:
        raise UsageError(
            f"--protocol coco30k compares with pictures of COCO, not with those that {config.name} "
            "was trained on: name them, --ref val2014"
        )
    conditional = config.model.text is not None or bool(config.model.classes)
    own = (
        retrieves
        or (conditional and conditions is None)
        or (compares and reference in (None, HELD_OUT))
    )
    whole = _own_pictures(config, side) if own else None
    source, held_out = (None, None) if whole is None else split(whole, config.data.held_out)
    return Request(
        asked.metrics, n, source, _reference(config, reference, held_out, side), conditions
    )


def _own_pictures(config: RunConfig, side: int) -> Source:
    """The pictures that a model of this `side` learnt from, which may be D^r of larger ones."""
    source = open_source(config.data, config.data_side)
    return source if source.side == side else Shrunk(source, side)


def _metrics(config: RunConfig, metrics: str | None, n: int | None, protocol: str | None) -> Asked:
    if metrics is not None:
        return parse_metrics(metrics)
    if protocol is not None:
        return parse_metrics(PROTOCOLS[protocol].metrics)
    usual = [*(["retrieval"] if config.model.text is not None else []), *(["fd"] if n else [])]
    if not usual:
        raise UsageError(f"{config.name} has no prompts to retrieve: give -n for the distance")
    return parse_metrics(usual)


def _conditions(
    config: RunConfig, protocol: str | None, captions: Path | None
) -> Conditions | None:
    if captions is not None and config.model.text is None:
        raise UsageError(f"{config.name} takes no captions: leave --captions away")
    if protocol == "coco30k" and captions is None:
        raise UsageError(
            "--protocol coco30k draws captions from a file: give --captions captions_val2014.json"
        )
    if protocol == "imagenet50k":
        if not config.model.classes:
            raise UsageError(f"--protocol imagenet50k asks for classes; {config.name} takes none")
        return random_labels(config.model.classes)
    return None if captions is None else captions_of_file(captions)


def _reference(
    config: RunConfig, name: str | None, held_out: Source | None, side: int
) -> Reference | None:
    if name is None:
        return None
    if name != HELD_OUT:
        return open_pictures(name, side)
    if held_out is None:
        raise UsageError(f"{config.name} holds nothing out (data.held_out is 0): leave --ref away")
    share = config.data.held_out
    return of_source(held_out, name=f"the held-out {share:.3g} of {held_out.name}")


def open_pictures(name: str, side: int) -> Reference:
    """An .npz, or any data as squares of `side` pixels."""
    if name.endswith(".npz"):
        return of_npz(Path(name).expanduser())
    _refuse_model(name)
    data = DataConfig(source=kind_of(name), path=absolute(name))
    return of_source(open_source(data, side), foreign=True)


def _refuse_model(name: str) -> None:
    """Raise `UsageError` for a folder whose pictures are a run's previews, not samples of it."""
    folder = Path(name).expanduser()
    found = [file for file in ("config.yaml", *WEIGHTS) if (folder / file).is_file()]
    if found:
        raise UsageError(
            f"{name} is a run or a model (it holds {found[0]}), not pictures: mdm eval {name} "
            "--ref DATA measures its samples"
        )


# --- two sets of pictures ----------------------------------------------------------------------


def compare(
    first: str,
    second: str,
    metrics: Sequence[str],
    networks: Networks,
    *,
    side: int | None = None,
    world: World = _ALONE,
    progress: Told | None = None,
) -> list[Result]:
    """Measure the pictures of `first` as if they were samples, against those of `second`.

    `side` is that of the first picture if not given.

    Raises:
        UsageError: a set cannot be compared; see `measure`.
    """
    if side is not None and first.endswith(".npz"):
        raise UsageError(f"{first} has pictures of one side, which is compared: leave --side away")
    samples = open_pictures(first, side or _side_of(first))
    if samples.pictures is None:
        raise UsageError(f"{first} holds no pictures, only moments: they can be the second set")
    flag = samples.flag(samples.pictures.side, "samples", world=world)
    template = Result(of=samples.name, flags=() if flag is None else (flag,))
    reference = open_pictures(second, samples.pictures.side)
    return measure(
        samples.pictures, reference, metrics, networks, template, world=world, progress=progress
    )


def _side_of(name: str) -> int:
    """The shorter side of the first picture; an .npz has one side that `open_pictures` finds."""
    if name.endswith(".npz"):
        return 0
    folder = Path(name).expanduser()
    pictures = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    found = min(pictures, default=None)
    if found is None:
        raise UsageError(f"{name}: of which side? --side N says it, except for folders of pictures")
    with Image.open(found) as picture:
        return min(picture.size)


def results_folder(run: str) -> Path:
    """Where features and results go: `RUN/eval` for a folder, else the cache."""
    path = Path(run)
    return path / "eval" if path.is_dir() else cache_folder("eval")


def sweep_folder(run: str) -> Path:
    """Where a sweep goes: `RUN/sweep` for a folder, else the model's own place in the cache."""
    path = Path(run)
    if path.is_dir():
        return path / "sweep"
    name = f"{path.stem}-{digest(str(path.resolve()))[:8]}" if path.is_file() else run
    return cache_folder("sweep") / name
