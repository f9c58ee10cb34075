"""Do a task of the queue: train a trial and measure it, or draw with one that was trained."""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from benchmarks.harness import commit, machine
from safetensors.torch import load_file

from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.eval.features import NAME
from matryoshka_diffusion.job import Job, open_source, prepare
from matryoshka_diffusion.pipeline import Matryoshka, count_levels
from matryoshka_diffusion.train import checkpoint
from matryoshka_diffusion.train.trainer import Hook, View, train
from studies import measures
from studies.compute import images_at, spent
from studies.drawings import Drawing
from studies.trials import Trial

PRECISION = "bf16"


class Keep:
    """A hook that writes the averaged weights as models, at the first step past each point."""

    def __init__(self, folder: Path, points: dict[float, int]) -> None:
        self.folder, self.points = folder, points

    def __call__(self, view: View) -> None:
        for share, images in self.points.items():
            path = self.folder / f"{share:g}"
            if view.images_seen >= images and not path.exists():
                net = view.averaged()
                checkpoint.export_weights(path, net.state_dict(), view.config)


def run(task: Trial | Drawing, work: Path) -> dict[str, Any]:
    """The result of a task; `work` is where its runs are."""
    found = run_trial(task, work) if isinstance(task, Trial) else draw(task, work)
    return {"task": task.name, **_provenance(), **found}


def _provenance() -> dict[str, Any]:
    return {
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(torch.device("cpu")),
    }


def run_trial(trial: Trial, work: Path) -> dict[str, Any]:
    """Train, or go on with the training, and return what was measured."""
    folder = work / "runs" / trial.name
    job = prepare(trial.config)
    model, stages = job.config.model, job.config.train.stages
    points = {share: images_at(model, stages, share) for share in trial.points}
    hook: Hook = (_interval(job.config), Keep(folder / "points", points))
    final = train(job.config, job.loader, folder, encode=job.encode, hooks=[hook])
    measured = [
        _measure_point(job, folder, share, images, work) for share, images in points.items()
    ]
    done = Matryoshka.load(final, precision=PRECISION)
    return {
        "config": job.config.model_dump(mode="json"),
        "parameters": sum(parameter.numel() for parameter in done.net.parameters()),
        "images": job.config.train.images,
        "flops": spent(model, stages, job.config.train.images),
        "seconds": _seconds(folder, job.config.train.images),
        "metric": f"{NAME}, {measures.SAMPLES} samples, no guidance",
        "points": [point for point in measured if point is not None],
        "retrieval": measures.prompts_found(done, job),
        **measures.losses(done.net, job),
    }


def draw(drawing: Drawing, work: Path) -> dict[str, Any]:
    """Measure a trained network under other sampling settings."""
    model = Matryoshka.load(work / "runs" / drawing.trial, precision=PRECISION)
    job = prepare(model.config)
    source = open_source(job.config.data, job.config.model.levels[-1].side)
    began = time.monotonic()
    fd = measures.distance(model, source, work / "references", **drawing.settings)
    return {
        "settings": model.sampling(drawing.settings).model_dump(mode="json"),
        "metric": f"{NAME}, {measures.SAMPLES} samples",
        NAME: fd,
        "seconds": time.monotonic() - began,
        "retrieval": measures.prompts_found(model, job, **drawing.settings),
    }


def _measure_point(
    job: Job, folder: Path, share: float, images: int, work: Path
) -> dict[str, Any] | None:
    """The distance at a point; None where the network has not all of its levels yet."""
    path = folder / "points" / f"{share:g}"
    if count_levels(load_file(path / checkpoint.MODEL)) < len(job.config.model.levels):
        return None
    model = Matryoshka.load(path, precision=PRECISION)
    source = open_source(job.config.data, job.config.model.levels[-1].side)
    fd = measures.distance(model, source, work / "references", guidance=[1.0])
    return {"share": share, "images": images, "seconds": _seconds(folder, images), NAME: fd}


def _interval(config: RunConfig) -> int:
    """Images between two looks of a hook: four batches."""
    return 4 * config.train.stages[0].batch_size


def _seconds(folder: Path, images: int) -> float:
    """Wall time of the training, over all its starts, until so many images were seen."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return next(x["seconds"] for x in lines if "seconds" in x and x["images_seen"] >= images)
