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

from matryoshka_diffusion.baselines.codec_training import train_codec
from matryoshka_diffusion.baselines.load import open_model
from matryoshka_diffusion.codec.folder import codec_folder
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.costs import count_parameters
from matryoshka_diffusion.data.batch import Source
from matryoshka_diffusion.eval.features import NAME
from matryoshka_diffusion.job import Job, open_source, prepare
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import count_levels
from matryoshka_diffusion.presets import CODECS
from matryoshka_diffusion.train import checkpoint
from matryoshka_diffusion.train.trainer import Hook, View, train
from studies import measures
from studies.compute import images_at, spent
from studies.drawings import Drawing
from studies.queue import claimed
from studies.trials import Trial, changed

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


def run(task: Trial | Drawing, work: Path, samples: int = measures.SAMPLES) -> dict[str, Any]:
    """The result of a task; `work` is where its runs are, `samples` are those of a distance."""
    trained = isinstance(task, Trial)
    found = run_trial(task, work, samples) if trained else draw(task, work, samples)
    return {"task": task.name, **_provenance(), **found}


def _provenance() -> dict[str, Any]:
    return {
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(torch.device("cpu")),
    }


def run_trial(trial: Trial, work: Path, samples: int) -> dict[str, Any]:
    """Train, or go on with the training, and return what was measured."""
    folder, base = work / "runs" / trial.name, None
    config, before = _with_codec(trial, work), 0.0
    if trial.base is not None:
        base = work / "bases" / trial.name
        before = _train(prepare(trial.base), base)
        config = changed(config, {"sampling.base": {"path": str(base.resolve())}})
    job = prepare(config)
    points = _points(trial)
    seconds = before + _train(job, folder, points)
    final = open_model(folder / "model", precision=PRECISION, base=base)
    measured = [
        _measure(job, folder / "points" / f"{share:g}", base, work, samples) for share in points
    ]
    return {
        "config": job.config.model_dump(mode="json"),
        "parameters": [_parameters(part) for part in trial.parts],
        "images": [part.train.images for part in trial.parts],
        "flops": sum(_compute(part) for part in trial.parts),
        "seconds": seconds,
        "metric": f"{NAME}, {samples} samples, no guidance",
        "points": [
            {
                "share": share,
                "images": points[share],
                "seconds": before + _seconds(folder, points[share]),
                NAME: fd,
            }
            for share, fd in zip(points, measured, strict=True)
            if fd is not None
        ],
        "retrieval": measures.prompts_found(final, job),
        **measures.losses(folder / "model", job),
    }


def _train(job: Job, folder: Path, points: dict[float, int] | None = None) -> float:
    """Train in a run folder; returns the wall time of the training over all its starts."""
    hook: Hook = (_interval(job.config), Keep(folder / "points", points or {}))
    train(job.config, job.loader, folder, encode=job.encode, hooks=[hook])
    return _seconds(folder, job.config.train.images)


def _with_codec(trial: Trial, work: Path) -> RunConfig:
    """The trial's config with the path of its set's codec, which is trained first if it is not."""
    if trial.config.codec is None:
        return trial.config
    folder = work / "codecs" / trial.set.name
    with claimed(work / "locks" / f"{trial.set.name}-codec.lock", wait=True):
        train_codec(CODECS[f"{trial.set.preset}-codec"], folder)
    return changed(trial.config, {"codec.path": str(codec_folder(str(folder)))})


def _points(trial: Trial) -> dict[float, int]:
    """The images that the trial's last run has seen at each point; none before it begins."""
    costs = [_compute(part) for part in trial.parts]
    before, train = sum(costs[:-1]), trial.config.train
    shares = {point: (point * sum(costs) - before) / costs[-1] for point in trial.points}
    return {
        point: images_at(trial.config.model, train.stages, share)
        for point, share in shares.items()
        if share > 0.0
    }


def _compute(config: RunConfig) -> float:
    return spent(config.model, config.train.stages, config.train.images)


def _parameters(config: RunConfig) -> int:
    with torch.device("meta"):
        return count_parameters(NestedUNet(config.model))


def draw(drawing: Drawing, work: Path, samples: int) -> dict[str, Any]:
    """Measure a trained network under other sampling settings."""
    base = work / "bases" / drawing.trial
    model = open_model(
        work / "runs" / drawing.trial / "model",
        precision=PRECISION,
        base=base if base.is_dir() else None,
    )
    job = prepare(model.config)
    began = time.monotonic()
    fd = measures.distance(model, _pictures(job), work / "references", samples, **drawing.settings)
    return {
        "settings": model.sampling(drawing.settings).model_dump(mode="json"),
        "metric": f"{NAME}, {samples} samples",
        NAME: fd,
        "seconds": time.monotonic() - began,
        "retrieval": measures.prompts_found(model, job, **drawing.settings),
    }


def _measure(job: Job, path: Path, base: Path | None, work: Path, samples: int) -> float | None:
    """The distance at a point; None where the network has not all of its levels yet."""
    if count_levels(load_file(path / checkpoint.MODEL)) < len(job.config.model.levels):
        return None
    model = open_model(path, precision=PRECISION, base=base)
    return measures.distance(model, _pictures(job), work / "references", samples, guidance=[1.0])


def _pictures(job: Job) -> Source:
    """The whole set, with what is held out."""
    return open_source(job.config.data, job.config.data_side)


def _interval(config: RunConfig) -> int:
    """Images between two looks of a hook: four batches."""
    return 4 * config.train.stages[0].batch_size


def _seconds(folder: Path, images: int) -> float:
    """Wall time of the training, over all its starts, until so many images were seen."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return next(x["seconds"] for x in lines if "seconds" in x and x["images_seen"] >= images)
