"""What a command line names, opened: protocols, references, captions, two sets of pictures.

A set of videos is one of clips where frames are asked for. Those of a reference are cut as the
clips that the model was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from matryoshka_diffusion.config import DataConfig, RunConfig, SourceName, UsageError
from matryoshka_diffusion.data.image import SUFFIXES
from matryoshka_diffusion.data.source import Source, absolute, kind_of, open_source, sourced, split
from matryoshka_diffusion.draw.grid import SHEETS
from matryoshka_diffusion.eval.measures import METRICS, Asked, load, parse_metrics
from matryoshka_diffusion.eval.protocols import (
    PROTOCOLS,
    Conditions,
    captions_of_file,
    random_labels,
)
from matryoshka_diffusion.eval.references import Reference, name_of, of_npz, of_source
from matryoshka_diffusion.eval.results import Result
from matryoshka_diffusion.eval.run import Networks, Told, measure
from matryoshka_diffusion.eval.shrunk import shrunk
from matryoshka_diffusion.files import cache_folder, digest
from matryoshka_diffusion.metrics.retrieval import CAPTIONS
from matryoshka_diffusion.models.find import WEIGHTS
from matryoshka_diffusion.train.distributed import World

HELD_OUT = "held-out"
_ALONE = World()


class Request(NamedTuple):
    """The arguments of `evaluate` that the words of a command stand for."""

    metrics: tuple[str, ...]
    n: int | None
    source: Source | None
    reference: Reference | None
    conditions: Conditions | None
    own: Reference | None


def request(
    config: RunConfig,
    side: int,
    frames: int | None = None,
    *,
    metrics: str | None = None,
    n: int | None = None,
    protocol: str | None = None,
    captions: Path | None = None,
    reference: str | None = None,
    networks: Networks | None = None,
) -> Request:
    """Open what is named, and the model's own training pictures where they are needed.

    Args:
        side: of what the model draws.
        frames: of each clip; None if it draws pictures.
        metrics: those of the protocol if not given; without one prompt retrieval, and with `n` the
            Fréchet distance on the packaged network and, of clips, how much they move.
        n: in the place of what a protocol or the name of a metric says.
        protocol: one of `PROTOCOLS`.
        captions: a file to draw captions from.
        reference: "held-out", an .npz or any data; the training pictures if not given.
        networks: where those that the metrics look through are loaded from, before any data is.

    Raises:
        UsageError: something is missing, or does not fit the model.
        OSError, ValueError: the data cannot be used.
    """
    asked = _metrics(config, frames, metrics, n, protocol)
    if all(METRICS[name].retrieval for name in asked.metrics):
        _refuse_beside_retrieval({"-n": n, "--protocol": protocol, "--captions": captions})
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
    if reference is not None and not compares:
        raise UsageError(
            f"--ref {reference}: none of {', '.join(asked.metrics)} compares with it; leave it "
            "away, or name a metric that does (--metrics fd)"
        )
    if networks is not None:
        load(asked.metrics, networks)
    conditional = config.model.text is not None or bool(config.model.classes)
    own = (
        retrieves
        or (conditional and conditions is None)
        or (compares and reference in (None, HELD_OUT))
    )
    whole = _own_pictures(config, side, frames) if own else None
    source, held_out = (None, None) if whole is None else split(whole, config.data.held_out)
    compared = None if reference is None else _reference(config, reference, held_out, side, frames)
    trained_on = None if source is None else of_source(source, name=name_of(source, config.data))
    return Request(asked.metrics, n, source, compared, conditions, trained_on)


def _own_pictures(config: RunConfig, side: int, frames: int | None) -> Source:
    """What a model of this `side` and these `frames` learnt from: perhaps D^r of something larger.

    Pictures are the first frames of clips, which need not be decoded for them.
    """
    source = open_source(_fixed(config.data), config.data_side, frames and config.data_frames)
    return (
        source if (source.side, source.frames) == (side, frames) else shrunk(source, side, frames)
    )


def _fixed(data: DataConfig) -> DataConfig:
    """The same data with clips that are always the same, which are decoded once.

    Where training shows another place of a video each time, measuring has always looked at one.
    """
    return data.model_copy(update={"clip": "fixed"}) if data.clip == "random" else data


def _metrics(
    config: RunConfig, frames: int | None, metrics: str | None, n: int | None, protocol: str | None
) -> Asked:
    if metrics is not None:
        return parse_metrics(metrics)
    if protocol is not None:
        return parse_metrics(PROTOCOLS[protocol].metrics)
    distances = ["fd"] if frames is None else ["fd", "motion"]
    usual = [*(["retrieval"] if config.model.text is not None else []), *(distances if n else [])]
    if not usual:
        raise UsageError(f"{config.name} has no prompts to retrieve: give -n for the distance")
    return parse_metrics(usual)


def _refuse_beside_retrieval(options: Mapping[str, Any]) -> None:
    """Raise `UsageError` for what says how many samples are drawn, or of what, if it is given."""
    given = [f"{option} {value}" for option, value in options.items() if value is not None]
    if given:
        raise UsageError(
            f"{', '.join(given)}: retrieval draws the same {CAPTIONS} captions of the training "
            "pictures for every model; leave it away, or name a metric of other samples, too "
            "(--metrics retrieval,fd -n 2000)"
        )


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
    config: RunConfig, name: str, held_out: Source | None, side: int, frames: int | None
) -> Reference:
    if name != HELD_OUT:
        return open_pictures(name, side, frames, **_as_own(config.data, name))
    if held_out is None:
        raise UsageError(f"{config.name} holds nothing out (data.held_out is 0): leave --ref away")
    share = config.data.held_out
    whole = name_of(held_out, config.data)
    return of_source(held_out, name=f"the held-out {share:.3g} of {whole}")


def _as_own(data: DataConfig, name: str) -> dict[str, Any]:
    """How `name` is read by a model of this `data`: cut alike, and what it learnt from likewise."""
    cut = ("frame_stride", "fps", "clip", "clip_frames")
    found = _fixed(data).model_dump(include=set(cut))
    if data.path is not None and absolute(name) == absolute(data.path):
        found["source"] = sourced(data).source
    return found


def open_pictures(name: str, side: int, frames: int | None = None, **given: Any) -> Reference:
    """An .npz, or any data as squares of `side` pixels; with `frames`, clips of a set of videos.

    Of a folder that samples were saved to, the sheets (`grid.png`, ...) are left out. `given` are
    fields of the data's config: how clips are cut out of videos, and the source if it is known.
    """
    if name.endswith(".npz"):
        return of_npz(Path(name).expanduser())
    _refuse_model(name)
    data = DataConfig(path=absolute(name), **{"source": _kind(name, frames), **given})
    source = _without_sheets(open_source(data, side, frames))
    return of_source(source, name=name_of(source, data), foreign=True)


def _kind(name: str, frames: int | None) -> SourceName:
    kind = kind_of(name)
    if frames is not None and kind in ("datasets", "parquet"):
        raise UsageError(
            f"{name} has pictures, which clips are not compared with: name a folder of videos, or "
            "tar shards of them"
        )
    return kind if frames is None else "clips"


def _without_sheets(source: Source) -> Source:
    rows = [row for row, key in enumerate(source.keys) if key not in SHEETS]
    return source if len(rows) == len(source) else source.part(rows)


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
    frames: int | None = None,
    frame_stride: int | None = None,
    world: World = _ALONE,
    progress: Told | None = None,
) -> list[Result]:
    """Measure the pictures of `first` as if they were samples, against those of `second`.

    `side` is that of the first picture if not given. With `frames`, both are sets of videos:
    samples begin where they begin and have each frame; real ones are cut as training clips are, by
    `frame_stride`.

    Raises:
        UsageError: a set cannot be compared; see `measure`.
    """
    if side is not None and first.endswith(".npz"):
        raise UsageError(f"{first} has pictures of one side, which is compared: leave --side away")
    if frames is None:
        _refuse_videos(first, second, frame_stride=frame_stride)
    load(metrics, networks)
    samples = open_pictures(first, side or _side_of(first), frames, frame_stride=1, clip="start")
    if samples.pictures is None:
        raise UsageError(f"{first} holds no pictures, only moments: they can be the second set")
    flag = samples.flag(samples.pictures.side, "samples", world=world)
    template = Result(of=samples.name, flags=() if flag is None else (flag,))
    stride = {} if frame_stride is None else {"frame_stride": frame_stride}
    reference = open_pictures(second, samples.pictures.side, frames, clip="fixed", **stride)
    return measure(
        samples.pictures, reference, metrics, networks, template, world=world, progress=progress
    )


def _refuse_videos(*names: str, frame_stride: int | None) -> None:
    """Raise `UsageError` for what has frames, of which the first ones alone would be compared."""
    if frame_stride is not None:
        raise UsageError("--frame-stride is of videos: give --frames, too")
    for name in names:
        if kind_of(name) == "clips" or _moves(_first_picture(name)):
            raise UsageError(f"{name} holds videos: give --frames, how many of each are compared")


def _moves(path: Path | None) -> bool:
    if path is None:
        return False
    try:
        with Image.open(path) as picture:
            return getattr(picture, "n_frames", 1) > 1
    except OSError:  # which is counted when all of them are read
        return False


def _first_picture(name: str) -> Path | None:
    folder = Path(name).expanduser()
    pictures = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return min((path for path in pictures if path.name not in SHEETS), default=None)


def _side_of(name: str) -> int:
    """The shorter side of the first picture; an .npz has one side that `open_pictures` finds."""
    if name.endswith(".npz"):
        return 0
    found = _first_picture(name)
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
