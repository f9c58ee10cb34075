"""Reports of a run: lines of metrics, a progress bar, and the curves of TensorBoard and W&B.

`metrics.jsonl` is always written. Other sinks are chosen at each start of a run, not in its config:
they change nothing that is learnt.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from matryoshka_diffusion.codecconfig import CodecRunConfig
from matryoshka_diffusion.config import RunConfig, TrainConfig
from matryoshka_diffusion.draw.clips import FASTEST, gif
from matryoshka_diffusion.files import require, write_atomically
from matryoshka_diffusion.progress import Progress
from matryoshka_diffusion.training.stages import Step
from matryoshka_diffusion.training.step import Outcome, Recipe, Skipped, Stepped

PLAIN_SECONDS = 10.0
"""Least time between two lines where there is no terminal."""
PLAIN_LINE = "{n_fmt} of {total_fmt} images, {rate_fmt}, {remaining} left{postfix}\n"

ShownProgress: TypeAlias = Progress | bool
"""Called with (images seen, images in all); `True` stands for a bar, `False` for none."""
Report: TypeAlias = Callable[[int, Mapping[str, float | Path]], None]
"""Takes the images seen, and the points of curves and paths of pictures by their names."""
OpenSink: TypeAlias = Callable[
    [Path, RunConfig | CodecRunConfig, int], AbstractContextManager[Report]
]
"""Opens a sink for (run folder, resolved config, images seen so far).

A resumed run repeats what it reported beyond `images_seen`. The sink must not show that twice.
"""


class Entry(NamedTuple):
    """One step, the seconds spent waiting for its data, and the seconds that it then took."""

    step: Step
    outcome: Outcome
    wait_seconds: float
    work_seconds: float


def summary(entries: Sequence[Entry]) -> dict[str, Any]:
    """Means over some steps, without skipped ones; null where nothing is left.

    A level's mean is over the rows that have it. Time between steps (previews, saving) does not
    count.
    """
    step = entries[-1].step
    good = [(entry.step, entry.outcome) for entry in entries if isinstance(entry.outcome, Stepped)]
    skipped = [entry.outcome for entry in entries if isinstance(entry.outcome, Skipped)]
    wait = sum(entry.wait_seconds for entry in entries)
    seconds = wait + sum(entry.work_seconds for entry in entries)
    levels = [
        [(o.per_level[level], s.rows[level]) for s, o in good if level < len(s.rows)]
        for level in range(len(step.rows))
    ]
    return {
        "images_seen": step.end,
        "stage": step.stage,
        "loss": _mean([(outcome.loss, 1) for _, outcome in good]),
        "loss_per_level": [_mean(losses) for losses in levels],
        "grad_norm": _mean([(outcome.grad_norm, 1) for _, outcome in good]),
        "lr_per_level": list(step.lr),
        "images_per_second": sum(entry.step.count for entry in entries) / seconds,
        "data_wait": wait / seconds,
        "skipped_ids": [sample.number for outcome in skipped for sample in outcome.culprits],
    }


def _mean(weighted: Sequence[tuple[float, int]]) -> float | None:
    weight = sum(count for _, count in weighted)
    return sum(value * count for value, count in weighted) / weight if weight else None


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a line by the names of their curves: `loss`, `loss_per_level/0`, ..."""
    points = {}
    for name, value in line.items():
        values = {name: value}
        if isinstance(value, list):  # one of samples is no curve
            values = {f"{name}/{n}": x for n, x in enumerate(value) if name.endswith("_per_level")}
        points |= {key: float(x) for key, x in values.items() if isinstance(x, int | float)}
    points.pop("images_seen", None)  # the axis
    return points


class Log:
    """Metrics, progress and sinks of a run; on other ranks than 0, `leads` false, nothing.

    `progress` is called after every step; `True` shows a bar.

    Lines of `metrics.jsonl` beyond `images_seen` are cut, because a resumed run writes them again.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe[Any],
        images_seen: int,
        sinks: Sequence[OpenSink],
        leads: bool,
        progress: ShownProgress = True,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self._leads, self._entries, self._recent = leads, list[Entry](), deque[Entry](maxlen=50)
        self._stages, self._level_names = len(recipe.train.stages), recipe.level_names
        self._images = recipe.train.images
        self._open = ExitStack()
        if leads:
            cut_metrics(self.path, images_seen)
            arguments = folder, recipe.config, images_seen
            opened = [spared(open_sink, *arguments) for open_sink in sinks]
            self._reports = [self._open.enter_context(sink) for sink in opened]
            bar = progress_bar(recipe.train, images_seen, shown=progress is True)
            self._bar = self._open.enter_context(closing(bar))
        self._progress = None if isinstance(progress, bool) else progress
        self.close = self._open.close

    def add(self, entry: Entry) -> None:
        """Take in a step, show it if it is time, and warn if it was skipped."""
        if not self._leads:
            return
        self._entries.append(entry)
        self._recent.append(entry)
        recent = summary(self._recent)
        losses = " ".join(
            f"{name}:{'-' if loss is None else format(loss, '.4f')}"
            for name, loss in zip(self._level_names, recent["loss_per_level"], strict=False)
        )
        wait = recent["data_wait"]
        waiting = f" wait {wait:.0%}" if wait >= 0.05 else ""
        text = f"{recent['stage'] + 1}/{self._stages} {losses}{waiting}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(entry.step.count)
        if self._progress is not None:
            self._progress(entry.step.end, self._images)
        if isinstance(entry.outcome, Skipped):
            at = f"step skipped at {entry.step.first:,} images"
            warnings.warn(f"{at}: {entry.outcome}", stacklevel=2)

    def close_line(self, **counts: Any) -> None:
        """Write a line about the steps since the last line, together with `counts`."""
        if self._entries:
            self.write({**summary(self._entries), **counts})
            self._entries.clear()

    def write(self, line: dict[str, Any]) -> None:
        """Write a line of metrics. Raises OSError that names the file."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from error
        self._report(line["images_seen"], scalars(line))

    def picture(self, path: Path, images_seen: int) -> None:
        """Show a picture in the sinks, under the name of its folder."""
        self._report(images_seen, {path.parent.name: path})

    def _report(self, images_seen: int, values: Mapping[str, float | Path]) -> None:
        for report in self._reports:
            report(images_seen, values)


def cut_metrics(path: Path, images_seen: int) -> None:
    """Remove the lines beyond `images_seen`, one that a kill cut short, and damaged ones."""
    damaged = 0

    def is_within(line: bytes) -> bool:
        nonlocal damaged
        try:
            return json.loads(line)["images_seen"] <= images_seen
        except (ValueError, TypeError, LookupError, RecursionError):
            damaged += line.endswith(b"\n")
            return False

    if path.exists():
        kept = b"".join(filter(is_within, path.read_bytes().splitlines(keepends=True)))
        write_atomically(path, lambda file: file.write(kept))
    if damaged:
        warnings.warn(f"{path}: {damaged} damaged lines were removed", stacklevel=2)


def progress_bar(train: TrainConfig, images_seen: int, *, shown: bool = True) -> Any:
    """Open a bar on stderr; where that is no terminal (a log file, CI), a line now and then."""
    from tqdm import tqdm  # here, because only training needs it

    plain = not sys.stderr.isatty()
    return tqdm(
        disable=not shown,
        total=train.images,
        initial=images_seen,
        unit=" images",
        unit_scale=True,
        smoothing=0.05,
        dynamic_ncols=not plain,
        delay=1e-9 if plain else 0.0,  # no line before the first step
        mininterval=PLAIN_SECONDS if plain else 0.1,
        bar_format=PLAIN_LINE if plain else None,
    )


def peak_memory_bytes(device: torch.device) -> int | None:
    """Peak memory of tensors on a GPU, or of the process in RAM; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- TensorBoard and Weights & Biases ----------------------------------------------------------


@contextmanager
def spared(open_sink: OpenSink, *arguments: Any) -> Iterator[Report]:
    """Open a sink that gets nothing more after its first error: a run needs no sink."""
    errors = []

    def attempt(call: Callable[..., object], *values: Any) -> None:
        try:
            call(*values)
        except Exception as error:  # noqa: BLE001, services raise anything
            errors.append(error)
            if len(errors) == 1:
                warnings.warn(
                    f"{open_sink.__name__} failed and gets no more lines; metrics.jsonl has all of "
                    f"them ({type(error).__name__}: {error})",
                    stacklevel=3,
                )

    sink = open_sink(*arguments)
    report = sink.__enter__()
    yield lambda *values: None if errors else attempt(report, *values)
    attempt(sink.__exit__, None, None, None)


@contextmanager
def tensorboard(
    folder: Path, config: RunConfig | CodecRunConfig, images_seen: int
) -> Iterator[Report]:
    """Write event files to `RUN/tensorboard`; `tensorboard --logdir RUN` shows them."""
    from torch.utils.tensorboard.writer import SummaryWriter

    module = "tensorboard.compat.proto.summary_pb2"
    kind: Any = require(module, "tensorboard", "--log tensorboard").Summary  # pyright: ignore
    # TensorBoard drops the points of earlier files from this step on.
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=images_seen + 1)

    def report(images_seen: int, values: Mapping[str, float | Path]) -> None:
        for name, value in values.items():
            if isinstance(value, Path):
                image = kind.Image(colorspace=3, **_encoded(value))
                summary = kind(value=[kind.Value(tag=name, image=image)])
                writer._get_file_writer().add_summary(summary, images_seen)
            else:
                writer.add_scalar(name, value, images_seen)
        writer.flush()

    with closing(writer):
        yield report


def _encoded(path: Path) -> dict[str, Any]:
    """Size and content of a picture, an animation as a GIF, the one form that TensorBoard plays."""
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        (width, height), data = image.size, path.read_bytes()
        if getattr(image, "is_animated", False):
            frames, milliseconds = [], 0
            for frame in ImageSequence.Iterator(image):
                frames.append(frame.convert("RGB"))
                milliseconds += frame.info["duration"]
            data = gif(frames, min(1000 * len(frames) / milliseconds, FASTEST[".gif"]), None)
    return {"width": width, "height": height, "encoded_image_string": data}


@contextmanager
def wandb(folder: Path, config: RunConfig | CodecRunConfig, images_seen: int) -> Iterator[Report]:
    """Report to one run of Weights & Biases for a run folder, however often it is resumed.

    Nothing leaves the machine unless WANDB_API_KEY or WANDB_MODE=online asks for it; else the run
    is kept in `RUN/wandb` for `wandb sync`. Neither code nor the terminal's text is taken.

    `RUN/wandb/run.json` holds the run's id, the last step that was sent and the names sent with
    it. A resumed run repeats the same numbers, since resuming is exact: they are not sent again.
    """
    service: Any = require("wandb", "wandb", "--log wandb")
    path, last, names = folder / "wandb" / "run.json", 0, list[str]()
    try:
        note = json.loads(path.read_bytes()) if path.exists() else {"id": secrets.token_hex(8)}
        key = str(note["id"])
        if path.exists():
            last, names = int(note["images_seen"]), list(note["names"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): remove it, and a new run of "
            "Weights & Biases begins here"
        ) from error

    def remember() -> None:
        text = json.dumps({"id": key, "images_seen": last, "names": names})
        write_atomically(path, lambda file: file.write(text.encode()))

    def report(images_seen: int, values: Mapping[str, float | Path]) -> None:
        nonlocal last, names
        # A kill may have kept some of the last step's names from being sent.
        sent = names if images_seen == last else []
        new = {
            name: service.Image(str(value)) if isinstance(value, Path) else value
            for name, value in values.items()
            if name not in sent
        }
        if new and images_seen >= last:
            run.log(new, step=images_seen)
            last, names = images_seen, [*sent, *new]
            remember()

    remember()
    online = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    try:
        run = service.init(
            project=os.environ.get("WANDB_PROJECT", "matryoshka-diffusion"),
            name=folder.resolve().name,
            id=key,
            resume="allow",
            dir=str(folder),
            mode=os.environ.get("WANDB_MODE", online),
            config=config.model_dump(mode="json"),
            allow_val_change=True,
            save_code=False,
            settings=service.Settings(console="off", disable_git=True),
        )
    except service.Error as error:
        raise OSError(
            f"--log wandb: {error}; with WANDB_MODE=offline the run is kept in {folder}"
        ) from error
    try:
        yield report
    finally:
        run.finish()


SINKS: dict[str, OpenSink] = {"tensorboard": tensorboard, "wandb": wandb}
"""By the names of the packages and of the extras that bring them."""


def find_sink(name: str) -> OpenSink:
    """Return the sink of that name. Raises `MissingExtra` at once if its package is missing."""
    require(name, name, f"--log {name}")
    return SINKS[name]
