"""Draw the prompts of a file into a folder; after a stop, go on with those that are missing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from matryoshka_diffusion.cascade import Cascade, Model
from matryoshka_diffusion.config import ConfigError, UsageError
from matryoshka_diffusion.draw import gallery
from matryoshka_diffusion.files import digest, write_atomically
from matryoshka_diffusion.models.find import Progress
from matryoshka_diffusion.training.run_folder import owned

SETTINGS = "settings.json"
"""File beside the images that says what they were drawn with."""
KEYS: dict[str, Any] = {
    "prompt": str,
    "class": (str, int),
    "seed": int,
    "guidance": (int, float, list),
    "negative": str,
}
"""Keys of a JSON line and the types of their values."""
DIGITS = 6
"""Digits of an image's number in its file name."""


class Request(NamedTuple):
    """One image or clip to draw."""

    subject: str | int
    seed: int
    kind: Literal["prompts", "classes"] | None = None  # None: what the model takes
    own: tuple[tuple[str, Any], ...] = ()  # guidance and negative prompt, where a line has them
    line: int = 0  # of the file, for messages


def read_requests(path: Path, n: int = 1, seed: int = 0) -> list[Request]:
    """Read a file of prompts or classes: a line each, or JSON lines for a name in `.jsonl`.

    A JSON line has `prompt` or `class`, and may have `seed`, `guidance` and `negative`.

    Args:
        n: images of each line.
        seed: the first image's; image i has the seed `seed + i`. The images of a line with a seed
            of its own count from that.

    Raises:
        UsageError: the file cannot be read, holds no line, or a line is wrong; names the line.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path}: it cannot be read as UTF-8 text ({error})") from error
    requests: list[Request] = []
    plain = path.suffix.lower() != ".jsonl"
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"--prompts {path}, line {number}"
        entry: dict[str, Any] = {"prompt": line.strip()} if plain else _entry(line, where)
        own = tuple((key, entry[key]) for key in ("guidance", "negative") if key in entry)
        first = int(entry.get("seed", seed + len(requests)))
        kind = None if plain else "classes" if "class" in entry else "prompts"
        subject = entry["class"] if kind == "classes" else entry["prompt"]
        requests += [Request(subject, first + place, kind, own, number) for place in range(n)]
    if not requests:
        raise UsageError(f"--prompts {path}: it holds no line")
    return requests


def _entry(line: str, where: str) -> dict[str, Any]:
    """Parse one JSON line. Raises UsageError, naming `where`."""
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{where}: no valid JSON ({error})") from error
    if not isinstance(entry, dict) or len({"prompt", "class"} & entry.keys()) != 1:
        raise UsageError(f'{where}: give an object with "prompt" or "class"')
    for key, value in entry.items():
        if key not in KEYS:
            raise UsageError(f"{where}: unknown key {key!r}; there are: {', '.join(KEYS)}")
        if isinstance(value, bool) or not isinstance(value, KEYS[key]):
            raise UsageError(f"{where}: {key} is {value!r}; give another")
    return entry


def draw_requests(
    model: Model,
    requests: Sequence[Request],
    out: Path,
    *,
    form: gallery.ClipForm | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> int:
    """Write each image of `requests` that `out` does not hold yet; return how many were drawn.

    An image is the same whenever it is drawn, because it depends on its own seed alone (in bf16
    slightly on its batch, too). `progress` counts images.

    Raises:
        ConfigError: `out` holds something else, or was begun with other requests or settings.
        RunInUse: another process draws there.
        UsageError: a prompt or class that the model does not take.
    """
    _check(model, requests, settings)
    moves = model.resolutions[-1].frames is not None
    with owned(out, SETTINGS):
        _note(model, requests, out / SETTINGS, settings)
        for stale in out.glob(".[0-9]*.tmp"):  # of a process that was killed while writing
            stale.unlink()
        paths = [
            out / gallery.file_name(place, str(request.subject), form, moves=moves, digits=DIGITS)
            for place, request in enumerate(requests)
        ]
        missing = [place for place, path in enumerate(paths) if not path.exists()]
        done = len(requests) - len(missing)
        size = batch_size or model.batch_size
        for places in _batches(missing, requests, size):
            drawn = _sample(model, [requests[place] for place in places], settings)
            for own, place in enumerate(places):
                gallery.save_file(drawn.part(slice(own, own + 1)), paths[place])
            done += len(places)
            if progress is not None:
                progress(done, len(requests))
    return len(missing)


def _kind(model: Model) -> Literal["prompts", "classes"]:
    """Condition of a model that the lines of a plain file name."""
    return "classes" if model.config.model.classes else "prompts"


def _check(model: Model, requests: Sequence[Request], settings: Mapping[str, Any]) -> None:
    """Raise UsageError, with the line, for a request that the model cannot draw.

    It comes before the first image, not hours later.
    """
    first, checked = model.base if isinstance(model, Cascade) else model, set()
    for request in requests:
        own, kind = dict(request.own), request.kind or _kind(model)
        try:
            if kind == "classes":
                first.condition(None, [request.subject], 1)
            elif model.config.model.text is None:  # else features would be made
                first.condition([str(request.subject)], None, 1)
            if (key := repr(request.own)) not in checked:
                checked.add(key)
                negative = own.pop("negative", None)
                weights = model.sampling({**settings, **own}).guidance
                if negative is not None and all(weight == 1.0 for weight in weights):
                    raise UsageError("a negative prompt needs guidance")
        except UsageError as error:
            raise UsageError(f"--prompts, line {request.line}: {error}") from error


def _note(
    model: Model, requests: Sequence[Request], path: Path, settings: Mapping[str, Any]
) -> None:
    """Write down what the folder is drawn with, after comparing with what is written there.

    Lines that have no image yet may change, and lines may be added.
    """
    description = json.loads(json.dumps(model.describe(dict(settings))))  # tuples become lists
    lines = [digest(repr(request[:4]))[:12] for request in requests]
    if path.exists():
        try:
            written = json.loads(path.read_text("utf-8"))
            others = [key for key in description if written[key] != description[key]]
            before = [*map(str, written["requests"])]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}: damaged ({error}); give another -o") from error
        drawn = {name.name[:DIGITS] for name in path.parent.glob("[0-9]*")}
        after = [*lines, *[""] * len(before)]
        for place, line in enumerate(before):
            if line != after[place] and f"{place:0{DIGITS}}" in drawn:
                others.append(f"requests (image {place} is drawn)")
                break
        if others:
            raise ConfigError(
                f"{path.parent} was begun with other {', '.join(others)}: give another -o, or the "
                "file, model and options of then"
            )
    text = json.dumps({**description, "requests": lines}, indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))


def _batches(
    places: Sequence[int], requests: Sequence[Request], size: int
) -> Iterator[tuple[int, ...]]:
    """Split `places`, in order, into batches that the model can draw together."""
    for _, group in itertools.groupby(places, key=lambda place: requests[place][2:4]):
        alike = tuple(group)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _sample(
    model: Model, requests: Sequence[Request], settings: Mapping[str, Any]
) -> gallery.Gallery:
    samples = model.sample(
        **{requests[0].kind or _kind(model): [request.subject for request in requests]},
        seed=[request.seed for request in requests],
        batch_size=len(requests),
        **{**settings, **dict(requests[0].own)},
    )
    return gallery.Gallery(samples.levels, samples.captions, samples.settings)
