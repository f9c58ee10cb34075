"""What is measured of a trained network, in the same way for every trial: by the product itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matryoshka_diffusion.cascade import Model
from matryoshka_diffusion.config import ProcessConfig
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.eval.evaluate import evaluate
from matryoshka_diffusion.eval.result import Result
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.runs.held_out import HeldOutLoss
from matryoshka_diffusion.runs.prepare import Job
from matryoshka_diffusion.train.trainer import View
from studies.asked import COMMON_WEIGHT


def distance(model: Model, source: Source, samples: int, folder: Path, **settings: Any) -> Result:
    """Fréchet distance of so many samples, with conditions out of a whole set, to that set.

    It falls with the number of samples, so all trials have the same.
    """
    (found,) = evaluate(model, "fd", source=source, n=samples, folder=folder, **settings)
    return found


def prompts_found(model: Model, trained: Source, folder: Path, **settings: Any) -> float | None:
    """Prompt retrieval over captions that were trained on; None where there are none."""
    if model.config.model.text is None:
        return None
    (found,) = evaluate(model, "retrieval", source=trained, folder=folder, **settings)
    return found.value


def losses(model: Path, job: Job) -> dict[str, dict[str, float] | None]:
    """Loss at each side on trained and on held-out pictures, under one weighting for all trials.

    Times and noise are those of one seed for all. None for what has not the set's pictures alone
    to denoise: upsamplers and models of codes.
    """
    assert job.held_out is not None, "every trial holds pictures out"
    if job.config.model.coarse is not None or job.config.codec is not None:
        return {"seen_loss": None, "held_out_loss": None}
    config = job.config.model_copy(
        update={
            "process": ProcessConfig(
                prediction=job.config.process.prediction, weighting=COMMON_WEIGHT
            ),
            "train": job.config.train.model_copy(update={"seed": 0}),
        }
    )
    net = Matryoshka.load(model).net
    watch = HeldOutLoss(job.source, job.held_out, job.encode, "cpu")
    found = watch(View(config, Path(), config.train.images, lambda: net))
    sides = [str(level.side) for level in config.model.levels]
    return {
        name.removesuffix("_per_level"): dict(zip(sides, values, strict=True))
        for name, values in found.items()
    }
