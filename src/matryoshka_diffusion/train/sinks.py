"""Curves and pictures for others to show: TensorBoard, Weights & Biases, whatever is a `Sink`.

Sinks are chosen for each start of a run, not in its config: they change nothing that is learnt.
`metrics.jsonl` is written in any case.
"""

from __future__ import annotations

import json
import os
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.draw.clips import FASTEST, gif
from matryoshka_diffusion.files import require, write_atomically
from matryoshka_diffusion.train.log import Metrics


@runtime_checkable
class Sink(Protocol):
    """Takes lines of metrics, as they are in `metrics.jsonl`, and pictures that lie in files.

    The x axis is images seen: `line["images_seen"]`.
    """

    def write(self, line: Mapping[str, Any]) -> None: ...
    def picture(self, name: str, path: Path, images_seen: int) -> None: ...
    def close(self) -> None: ...


OpenSink: TypeAlias = Callable[[Path, RunConfig, int], Sink]
"""Opens a sink for (run folder, resolved config, images seen so far).

A run that resumes goes back to its checkpoint: what was told beyond `images_seen` is told again,
and the sink sees to it that no curve has it twice.
"""


class Log:
    """The metrics of a run, and all other sinks, as one; of several ranks, rank 0 has them.

    A sink that fails is left out from then on, with a warning: a run needs none of them.
    """

    def __init__(self, metrics: Metrics | None = None, sinks: Sequence[Sink] = ()) -> None:
        self._metrics, self._sinks = metrics, [_Guarded(sink) for sink in sinks]

    def write(self, line: dict[str, Any]) -> None:
        """A line for everyone."""
        if self._metrics is not None:
            self._metrics.write(line)
        for sink in self._sinks:
            sink.tell(lambda sink: sink.write(line))

    def picture(self, name: str, path: Path, images_seen: int) -> None:
        """A picture, which lies in the run's folder, for those who show it elsewhere."""
        for sink in self._sinks:
            sink.tell(lambda sink: sink.picture(name, path, images_seen))

    def close(self) -> None:
        """Let every sink finish, those that have failed, too."""
        for sink in self._sinks:
            sink.close()


class _Guarded:
    """A sink that is told nothing more once it has failed."""

    def __init__(self, sink: Sink) -> None:
        self._sink, self._failed = sink, False

    def tell(self, what: Callable[[Sink], None]) -> None:
        if not self._failed:
            self._try(what)

    def close(self) -> None:
        self._try(lambda sink: sink.close())

    def _try(self, what: Callable[[Sink], None]) -> None:
        try:
            what(self._sink)
        except Exception as error:  # noqa: BLE001 - packages for services raise what they like
            if not self._failed:
                warnings.warn(
                    f"{type(self._sink).__name__} failed and is told nothing more; metrics.jsonl "
                    f"has it all ({type(error).__name__}: {error})",
                    stacklevel=4,
                )
            self._failed = True


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by the names of their curves: `loss`, `loss_per_level/0`, ...

    What is null (all steps were skipped) has no point, and lists of samples are no curve.
    """
    found = {}
    for name, value in line.items():
        values = {name: value}
        if isinstance(value, list):
            values = {f"{name}/{n}": x for n, x in enumerate(value) if name.endswith("_per_level")}
        found |= {key: float(x) for key, x in values.items() if isinstance(x, int | float)}
    found.pop("images_seen", None)  # the axis
    return found


class TensorBoard:
    """Event files in `RUN/tensorboard`; `tensorboard --logdir RUN` shows them."""

    def __init__(self, folder: Path, config: RunConfig, images_seen: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        module = "tensorboard.compat.proto.summary_pb2"
        self._proto: Any = require(module, "tensorboard", "--log tensorboard")
        # TensorBoard drops what earlier files say from this step on.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=images_seen + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["images_seen"])
        self._writer.flush()

    def picture(self, name: str, path: Path, images_seen: int) -> None:
        from PIL import Image

        Summary: Any = self._proto.Summary
        with Image.open(path) as image:
            width, height = image.size
            moves = getattr(image, "is_animated", False)
            encoded = _as_gif(image) if moves else path.read_bytes()
        shown = Summary.Image(
            width=width, height=height, colorspace=3, encoded_image_string=encoded
        )
        summary = Summary(value=[Summary.Value(tag=name, image=shown)])
        self._writer._get_file_writer().add_summary(summary, images_seen)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _as_gif(image: Any) -> bytes:
    """An animation in the one form of which TensorBoard knows that it moves, as fast as it can."""
    from PIL import ImageSequence

    frames, milliseconds = [], 0
    for frame in ImageSequence.Iterator(image):
        frames.append(frame.convert("RGB"))
        milliseconds += frame.info["duration"]
    return gif(frames, min(1000 * len(frames) / milliseconds, FASTEST[".gif"]), None)


class WeightsAndBiases:
    """One run of Weights & Biases for a run folder, however often it is resumed.

    Nothing leaves the machine unless the environment asks for it: with WANDB_API_KEY or
    WANDB_MODE=online the run is sent as it goes, else it is kept in `RUN/wandb`, from where
    `wandb sync` sends it. Neither code nor the terminal's text is taken.

    `RUN/wandb/run.json` remembers the run's id, how far it was told, and which names at the last
    step: what a resumed run tells again (the same numbers, since resuming is exact) is passed over,
    and what a kill kept from being told at that step is not.
    """

    def __init__(self, folder: Path, config: RunConfig, images_seen: int) -> None:
        self._wandb: Any = require("wandb", "wandb", "--log wandb")
        self._path = folder / "wandb" / "run.json"
        self._note = self._told = _read_note(self._path)
        self._remember(self._note)
        online = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "matryoshka-diffusion"),
                name=folder.resolve().name,
                id=self._note.id,
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

    def write(self, line: Mapping[str, Any]) -> None:
        self._tell(scalars(line), line["images_seen"])

    def picture(self, name: str, path: Path, images_seen: int) -> None:
        self._tell({name: self._wandb.Image(str(path))}, images_seen)

    def close(self) -> None:
        self._run.finish()

    def _tell(self, values: dict[str, Any], images_seen: int) -> None:
        told = self._told
        if images_seen < told.images_seen:
            return
        if images_seen == told.images_seen:
            values = {name: value for name, value in values.items() if name not in told.names}
        if values:
            self._run.log(values, step=images_seen)
            before = self._note.names if images_seen == self._note.images_seen else []
            self._remember(_Note(told.id, images_seen, [*before, *values]))

    def _remember(self, note: _Note) -> None:
        self._note = note
        text = json.dumps(note._asdict()).encode()
        write_atomically(self._path, lambda file: file.write(text))


class _Note(NamedTuple):
    """A run's id at Weights & Biases, the last step that it was told, and the names told there."""

    id: str
    images_seen: int
    names: list[str]


def _read_note(path: Path) -> _Note:
    """What the file remembers; a new run if there is none. Raises ValueError if it is damaged."""
    if not path.exists():
        return _Note(secrets.token_hex(8), 0, [])
    try:
        note = json.loads(path.read_bytes())
        return _Note(str(note["id"]), int(note["images_seen"]), list(note["names"]))
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}): remove it, and a new run of "
            "Weights & Biases is begun for what is still to come"
        ) from error


SINKS: dict[str, OpenSink] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""By the names of the packages and of the extras that bring them."""


def find_sink(name: str) -> OpenSink:
    """The sink of that name. Raises `MissingExtra` at once if its package is not installed."""
    require(name, name, f"--log {name}")
    return SINKS[name]
