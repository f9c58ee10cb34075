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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch

from matryoshka_diffusion.config import CodecRunConfig, RunConfig, TrainConfig
from matryoshka_diffusion.draw.clips import FASTEST, gif
from matryoshka_diffusion.files import require, write_atomically
from matryoshka_diffusion.train.stages import Step
from matryoshka_diffusion.train.step import Outcome, Recipe, Skipped, Stepped

PLAIN_SECONDS = 10.0
"""Least time between two lines where there is no terminal."""
PLAIN_LINE = "{n_fmt} of {total_fmt} images, {rate_fmt}, {remaining} left{postfix}\n"


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
        "lr": step.lr,
        "images_per_second": sum(entry.step.count for entry in entries) / seconds,
        "data_wait": wait / seconds,
        "skipped_ids": [sample.number for outcome in skipped for sample in outcome.culprits],
    }


def _mean(weighted: Sequence[tuple[float, int]]) -> float | None:
    weight = sum(count for _, count in weighted)
    return sum(value * count for value, count in weighted) / weight if weight else None


class Log:
    """Metrics, progress bar and sinks of a run; on other ranks than 0, `leads` false, nothing.

    A sink that fails is left out from then on, with a warning: a run needs none of them.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe[Any],
        images_seen: int,
        sinks: Sequence[OpenSink],
        leads: bool,
    ) -> None:
        self._leads, self._entries, self._failed = leads, list[Entry](), list[Sink]()
        if leads:
            self._metrics = Metrics(folder / "metrics.jsonl", images_seen)
            self._sinks = [open_sink(folder, recipe.config, images_seen) for open_sink in sinks]
            self._display = Display(recipe.train, recipe.level_names, images_seen)

    def add(self, entry: Entry) -> None:
        """Take in a step, show it, and warn if it was skipped."""
        if self._leads:
            self._entries.append(entry)
            self._display.show(entry)
            if isinstance(entry.outcome, Skipped):
                at = f"step skipped at {entry.step.first:,} images"
                warnings.warn(f"{at}: {entry.outcome}", stacklevel=2)

    def close_line(self, **counts: Any) -> None:
        """Write a line about the steps since the last line, together with `counts`."""
        if self._entries:
            self.write({**summary(self._entries), **counts})
            self._entries.clear()

    def write(self, line: dict[str, Any]) -> None:
        """Write a line of metrics."""
        self._metrics.write(line)
        self._each(lambda sink: sink.write(line))

    def picture(self, path: Path, images_seen: int) -> None:
        """Show a picture in the sinks, under the name of its folder."""
        self._each(lambda sink: sink.picture(path.parent.name, path, images_seen))

    def close(self) -> None:
        """Close the bar and all sinks, including the failed ones."""
        if self._leads:
            self._display.close()
            self._each(lambda sink: sink.close(), closing=True)

    def _each(self, call: Callable[[Sink], None], *, closing: bool = False) -> None:
        for sink in self._sinks:
            failed = sink in self._failed
            try:
                if not failed or closing:
                    call(sink)
            except Exception as error:  # noqa: BLE001, services raise anything
                if not failed:
                    self._failed.append(sink)
                    warnings.warn(
                        f"{type(sink).__name__} failed and gets no more lines; metrics.jsonl has "
                        f"all of them ({type(error).__name__}: {error})",
                        stacklevel=3,
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


class Metrics:
    """`metrics.jsonl`: one JSON object a line.

    Lines beyond `images_seen` are cut, because a resumed run writes them again.
    """

    def __init__(self, path: Path, images_seen: int) -> None:
        self.path = path

        def is_within(line: bytes) -> bool:
            try:
                return json.loads(line)["images_seen"] <= images_seen
            except ValueError:  # a kill cut the line short
                return False

        if path.exists():
            kept = b"".join(filter(is_within, path.read_bytes().splitlines(keepends=True)))
            write_atomically(path, lambda file: file.write(kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append a line. Raises OSError that names the file."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from error


class Display:
    """Progress on stderr: images/s, time left, loss of each level, waiting for data.

    It is a bar on a terminal, and elsewhere (a log file, CI) a line now and then.
    """

    def __init__(self, train: TrainConfig, level_names: Sequence[object], images_seen: int) -> None:
        from tqdm import tqdm  # here, because only training needs it

        self._stages, self._level_names = len(train.stages), level_names
        self._recent: deque[Entry] = deque(maxlen=50)
        plain = not sys.stderr.isatty()
        self._bar = tqdm(
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
        self.close = self._bar.close

    def show(self, entry: Entry) -> None:
        """Take in a step; show it if it is time."""
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


# --- TensorBoard and Weights & Biases ----------------------------------------------------------


@runtime_checkable
class Sink(Protocol):
    """Takes lines of metrics and paths of pictures. The x axis is `line["images_seen"]`."""

    def write(self, line: Mapping[str, Any]) -> None: ...
    def picture(self, name: str, path: Path, images_seen: int) -> None: ...
    def close(self) -> None: ...


OpenSink: TypeAlias = Callable[[Path, RunConfig | CodecRunConfig, int], Sink]
"""Opens a sink for (run folder, resolved config, images seen so far).

A resumed run repeats what it reported beyond `images_seen`. The sink must not show that twice.
"""


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


class TensorBoard:
    """Event files in `RUN/tensorboard`; `tensorboard --logdir RUN` shows them."""

    def __init__(self, folder: Path, config: RunConfig | CodecRunConfig, images_seen: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        module = "tensorboard.compat.proto.summary_pb2"
        self._proto: Any = require(module, "tensorboard", "--log tensorboard")
        # TensorBoard drops the points of earlier files from this step on.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=images_seen + 1)
        self.close = self._writer.close

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["images_seen"])
        self._writer.flush()

    def picture(self, name: str, path: Path, images_seen: int) -> None:
        from PIL import Image

        with Image.open(path) as image:
            (width, height), moves = image.size, getattr(image, "is_animated", False)
            data = _as_gif(image) if moves else path.read_bytes()
        kind: Any = self._proto.Summary
        shown = kind.Image(width=width, height=height, colorspace=3, encoded_image_string=data)
        summary = kind(value=[kind.Value(tag=name, image=shown)])
        self._writer._get_file_writer().add_summary(summary, images_seen)
        self._writer.flush()


def _as_gif(image: Any) -> bytes:
    """Convert an animation to a GIF, the one form that TensorBoard plays."""
    from PIL import ImageSequence

    frames, milliseconds = [], 0
    for frame in ImageSequence.Iterator(image):
        frames.append(frame.convert("RGB"))
        milliseconds += frame.info["duration"]
    return gif(frames, min(1000 * len(frames) / milliseconds, FASTEST[".gif"]), None)


class WeightsAndBiases:
    """One run of Weights & Biases for a run folder, however often it is resumed.

    Nothing leaves the machine unless WANDB_API_KEY or WANDB_MODE=online asks for it; else the run
    is kept in `RUN/wandb` for `wandb sync`. Neither code nor the terminal's text is taken.

    `RUN/wandb/run.json` holds the run's id, the last step that was sent and the names sent with
    it. A resumed run repeats the same numbers, since resuming is exact: they are not sent again.
    """

    def __init__(self, folder: Path, config: RunConfig | CodecRunConfig, images_seen: int) -> None:
        self._wandb: Any = require("wandb", "wandb", "--log wandb")
        self._path = folder / "wandb" / "run.json"
        note = {"id": secrets.token_hex(8), "images_seen": 0, "names": []}
        try:
            note = json.loads(self._path.read_bytes()) if self._path.exists() else note
            self._id, self._last = str(note["id"]), int(note["images_seen"])
            self._names = list(note["names"])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{self._path} is damaged ({type(error).__name__}: {error}): remove it, and a "
                "new run of Weights & Biases begins here"
            ) from error
        self._remember()
        online = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "matryoshka-diffusion"),
                name=folder.resolve().name,
                id=self._id,
                resume="allow",
                dir=str(folder),
                mode=os.environ.get("WANDB_MODE", online),
                config=config.model_dump(mode="json"),
                allow_val_change=True,
                save_code=False,
                settings=self._wandb.Settings(console="off", disable_git=True),
            )
        except self._wandb.Error as error:
            raise OSError(
                f"--log wandb: {error}; with WANDB_MODE=offline the run is kept in {folder}"
            ) from error
        self.close = self._run.finish

    def write(self, line: Mapping[str, Any]) -> None:
        self._send(scalars(line), line["images_seen"])

    def picture(self, name: str, path: Path, images_seen: int) -> None:
        self._send({name: self._wandb.Image(str(path))}, images_seen)

    def _send(self, values: dict[str, Any], images_seen: int) -> None:
        # A kill may have kept some of the last step's names from being sent.
        sent = self._names if images_seen == self._last else []
        values = {name: value for name, value in values.items() if name not in sent}
        if values and images_seen >= self._last:
            self._run.log(values, step=images_seen)
            self._last, self._names = images_seen, [*sent, *values]
            self._remember()

    def _remember(self) -> None:
        note = {"id": self._id, "images_seen": self._last, "names": self._names}
        write_atomically(self._path, lambda file: file.write(json.dumps(note).encode()))


SINKS: dict[str, OpenSink] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""By the names of the packages and of the extras that bring them."""


def find_sink(name: str) -> OpenSink:
    """Return the sink of that name. Raises `MissingExtra` at once if its package is missing."""
    require(name, name, f"--log {name}")
    return SINKS[name]
