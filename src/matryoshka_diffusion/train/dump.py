"""What a run leaves for whoever has to find out why its loss was no longer finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

from matryoshka_diffusion.files import write_atomically
from matryoshka_diffusion.train.curriculum import Step
from matryoshka_diffusion.train.learner import NotFinite


def write_dump(path: Path, error: NotFinite, step: Step) -> None:
    """Write what is known of the last step that was skipped, as JSON.

    JSON knows no NaN and no infinity: such numbers are the texts `nan`, `inf` and `-inf`.
    """
    outcome = error.outcome
    dump = {
        "error": str(error),
        "images_seen": step.end,
        "stage": step.stage,
        "lr": step.lr,
        "loss": _plain(outcome.loss),
        "loss_per_level": [_plain(loss) for loss in outcome.per_level],
        "grad_norm": _plain(outcome.grad_norm),
        "samples": [
            {"number": number, "key": key, "loss": _plain(loss)}
            for number, key, loss in error.samples
        ],
    }
    text = json.dumps(dump, indent=1, allow_nan=False).encode()
    write_atomically(path, lambda file: file.write(text))


def _plain(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
