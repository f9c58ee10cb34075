"""What a run tells: lines of metrics for programs, a bar or plain lines for people."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.files import write_atomically
from matryoshka_diffusion.train.curriculum import Step
from matryoshka_diffusion.train.learner import Outcome

PLAIN_SECONDS = 10.0
"""Where there is no terminal: at most one line in so many seconds."""


class Entry(NamedTuple):
    """One step, and the seconds that its data was waited for and that it then took."""

    step: Step
    outcome: Outcome
    wait_seconds: float
    work_seconds: float


def summary(entries: Sequence[Entry]) -> dict[str, Any]:
    """Means over some steps, skipped ones left out; null where nothing is left.

    A level's mean is over the rows that have it, so it means the same whatever the shares of a
    mixed-resolution batch. Time spent between steps (previews, saving) does not count.
    """
    step = entries[-1].step
    good = [entry for entry in entries if not entry.outcome.culprits]
    wait = sum(entry.wait_seconds for entry in entries)
    seconds = wait + sum(entry.work_seconds for entry in entries)
    return {
        "images_seen": step.end,
        "stage": step.stage,
        "loss": _mean([(entry.outcome.loss, 1) for entry in good]),
        "loss_per_level": [
            _mean(
                [
                    (entry.outcome.per_level[level], entry.step.rows[level])
                    for entry in good
                    if level < len(entry.step.rows)
                ]
            )
            for level in range(len(step.rows))
        ],
        "grad_norm": _mean([(entry.outcome.grad_norm, 1) for entry in good]),
        "lr": step.lr,
        "images_per_second": sum(entry.step.count for entry in entries) / seconds,
        "data_wait": wait / seconds,
        "skipped_ids": [n for entry in entries for n, _ in entry.outcome.culprits],
    }


def _mean(weighted: Sequence[tuple[float, int]]) -> float | None:
    weight = sum(count for _, count in weighted)
    return sum(value * count for value, count in weighted) / weight if weight else None


class Metrics:
    """`metrics.jsonl`: one JSON object a line, appended to while the run goes on.

    Lines beyond `images_seen` were written after the checkpoint that a run resumes from; they
    are cut, because those images are about to be seen again.
    """

    def __init__(self, path: Path, images_seen: int) -> None:
        self.path = path
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            kept = b"".join(line for line in lines if _is_within(line, images_seen))
            write_atomically(path, lambda file: file.write(kept))

    def write(self, line: dict[str, Any]) -> None:
        """Append a line. Raises OSError that names the file, where writing alone would not."""
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from error


def _is_within(line: bytes, images_seen: int) -> bool:
    """Whether a line of metrics is about images up to there; False if a kill cut it short."""
    try:
        return json.loads(line)["images_seen"] <= images_seen
    except ValueError:
        return False


class Display:
    """Progress for people on stderr: images/s, time left, loss of each level, waiting for data.

    A bar on a terminal; elsewhere (a log file, CI) a plain line now and then. Nothing unless
    `shown`: of several ranks one speaks.
    """

    def __init__(self, config: RunConfig, images_seen: int, *, shown: bool = True) -> None:
        from tqdm import tqdm  # with everything it imports, only where something is trained

        self._config = config
        self._recent: deque[Entry] = deque(maxlen=50)
        self._shown, self._plain = shown, not sys.stderr.isatty()
        self._told = time.monotonic()
        self._bar = tqdm(
            total=config.train.images,
            initial=images_seen,
            unit=" images",
            unit_scale=True,
            dynamic_ncols=True,
            smoothing=0.05,
            disable=self._plain or not shown,
        )

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def show(self, entry: Entry) -> None:
        """Take in a step; tell if it is time."""
        if not self._shown:
            return
        self._recent.append(entry)
        train, now = self._config.train, time.monotonic()
        if not self._plain:
            self._bar.set_postfix_str(self._text(), refresh=False)
            self._bar.update(entry.step.count)
        elif now - self._told >= PLAIN_SECONDS or entry.step.end == train.images:
            self._told = now
            rate = summary(self._recent)["images_per_second"]
            left = int((train.images - entry.step.end) / rate)
            print(
                f"{entry.step.end:,} of {train.images:,} images, {rate:.3g} images/s, "
                f"{left // 60}:{left % 60:02} left, {self._text()}",
                file=sys.stderr,
                flush=True,
            )

    def _text(self) -> str:
        recent = summary(self._recent)
        losses = " ".join(
            f"{level.size}:{'-' if loss is None else format(loss, '.4f')}"
            for level, loss in zip(
                self._config.model.levels, recent["loss_per_level"], strict=False
            )
        )
        stages = len(self._config.train.stages)
        wait = recent["data_wait"]
        waiting = f" wait {wait:.0%}" if wait >= 0.05 else ""
        return f"{recent['stage'] + 1}/{stages} {losses}{waiting}"
