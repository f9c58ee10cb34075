"""Do a task of the queue: train a trial and measure it, or draw with one that was trained."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.harness import commit, machine

from matryoshka_diffusion.cascade import open_model
from matryoshka_diffusion.codec.autoencoder import codec_folder
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.files import write_atomically
from matryoshka_diffusion.metrics.networks import NAME
from matryoshka_diffusion.nn.costs import count_parameters
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.runs.prepare import Job, open_source, prepare
from matryoshka_diffusion.runs.train_autoencoder import train_codec
from matryoshka_diffusion.train import checkpoint
from matryoshka_diffusion.train.step import NotFinite
from matryoshka_diffusion.train.trainer import Hook, View, train
from studies import measures
from studies.asked import NEW, PRECISION, agrees
from studies.compute import codec_flops, images_at, spent
from studies.drawings import Drawing
from studies.queue import claimed
from studies.trials import Trial, changed

DONE = "config.json"  # what a folder of weights gets last


def run(task: Trial | Drawing, work: Path) -> dict[str, Any]:
    """The result of a task; `work` is where its runs are.

    That a training does not stay finite is a result, too.
    """
    try:
        found = run_trial(task, work) if isinstance(task, Trial) else draw(task, work)
    except NotFinite as error:
        found = {"failed": str(error)}
    return {
        "task": task.name,
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(torch.device("cpu")),
        **_within(work, found),
    }


def _within(work: Path, found: dict[str, Any]) -> dict[str, Any]:
    """What was found, with paths as `work` has them: where that lies is nobody's business."""
    return json.loads(json.dumps(found).replace(f"{work.resolve()}/", ""))


# --- a trial -------------------------------------------------------------------------------------


def run_trial(trial: Trial, work: Path) -> dict[str, Any]:
    """Train, or go on with the training, and return what was measured.

    Raises:
        ValueError: what has been trained so far is of another form of the trial.
    """
    folder, before = work / "runs" / trial.name, 0.0
    _own(work, trial)
    base = None if trial.base is None else work / "bases" / trial.name
    config = _with_codec(trial, work)
    if trial.base is not None and base is not None:
        before = _train(prepare(trial.base), base)
        config = changed(config, {"sampling.base": {"path": str(base.resolve())}})
    job = prepare(config)
    points = measured_at(trial)
    seconds = before + _train(job, folder, points)
    final = open_model(folder / "model", precision=PRECISION, base=base)
    features = work / "eval"
    distances = {
        share: measures.distance(
            open_model(_point(folder, share), precision=PRECISION, base=base),
            _pictures(job),
            trial.samples,
            features,
            guidance=[1.0],
        )
        for share in points
    }
    return {
        "config": job.config.model_dump(mode="json"),
        "parameters": [_parameters(part) for part in trial.parts],
        "images": [part.train.images for part in trial.parts],
        "flops": sum(map(_compute, trial.parts)),
        "seconds": seconds,
        "codec_flops": 0.0 if trial.codec is None else codec_flops(trial.codec),
        "metric": distances[1.0].metric,
        "points": [
            {
                "share": share,
                "images": images,
                "seconds": before + _seconds(folder, images),
                NAME: distances[share].value,
            }
            for share, images in points.items()
        ],
        "prompts_found": measures.prompts_found(final, job.source, features),
        **measures.losses(folder / "model", job),
    }


def _own(work: Path, trial: Trial) -> None:
    """Write down of what the trial's run is, unless one of something else is there."""
    folder = work / "runs" / trial.name
    if folder.is_dir() and not agrees(_trained(work, trial.name), trial.trained):
        raise ValueError(f"{folder} is of an earlier form of {trial.name}: remove it, and repeat")
    text = json.dumps(trial.trained, indent=1)
    write_atomically(_note(work, trial.name), lambda file: file.write(text.encode()))


def _trained(work: Path, trial: str) -> Any:
    """What was asked when the trial's run began; None if nothing was written."""
    path = _note(work, trial)
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def _note(work: Path, trial: str) -> Path:
    return work / "asked" / f"{trial}.json"


def measured_at(trial: Trial) -> dict[float, int]:
    """The images that the trial's last run has seen at each of its points.

    Points before that run has its last level, or has had it for a while, are left out.
    """
    config = trial.config
    stages = config.train.stages
    others = sum(map(_compute, trial.parts[:-1]))
    total, last = others + _compute(config), spent(config.model, stages[-1:], stages[-1].images)
    own = {point: point * total - others for point in trial.points}
    return {
        point: images_at(config.model, stages, cost / _compute(config))
        for point, cost in own.items()
        if cost - (_compute(config) - last) >= NEW * last
    }


def _train(job: Job, folder: Path, points: dict[float, int] | None = None) -> float:
    """Train in a run folder; returns the wall time of the training over all its starts."""
    keep: Hook = (1, Keep(folder, points or {}))
    train(job.config, job.loader, folder, encode=job.encode, hooks=[keep])
    return _seconds(folder, job.config.train.images)


class Keep:
    """A hook that writes the averaged weights as models, at the first step past each point."""

    def __init__(self, folder: Path, points: dict[float, int]) -> None:
        self.folder, self.points = folder, points

    def __call__(self, view: View) -> None:
        for share, images in self.points.items():
            path = _point(self.folder, share)
            if view.images_seen >= images and not (path / DONE).exists():
                net = view.averaged()
                assert len(net.levels) == len(view.config.model.levels)
                checkpoint.export_weights(path, net.state_dict(), view.config)


def _point(folder: Path, share: float) -> Path:
    return folder / "points" / f"{share:g}"


def _with_codec(trial: Trial, work: Path) -> RunConfig:
    """The trial's config with the path of its set's codec, which is trained first if it is not."""
    if trial.codec is None:
        return trial.config
    folder = work / "codecs" / trial.set.name
    with claimed(work / "locks" / f"{trial.set.name}-codec.lock", wait=True):
        train_codec(trial.codec, folder)
    return changed(trial.config, {"codec.path": str(codec_folder(str(folder)))})


def _compute(config: RunConfig) -> float:
    return spent(config.model, config.train.stages, config.train.images)


def _parameters(config: RunConfig) -> int:
    with torch.device("meta"):
        return count_parameters(NestedUNet(config.model))


def _pictures(job: Job) -> Source:
    """The whole set, with what is held out."""
    return open_source(job.config.data, job.config.data_side)


def _seconds(folder: Path, images: int) -> float:
    """Wall time of the training until so many images were seen, as if it had never paused.

    Each stage's images at the median of the rates that it was logged with.
    """
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    rates: dict[int, list[float]] = {}
    ends: dict[int, int] = {}
    for line in lines:
        if "images_per_second" in line and ends.get(line["stage"], 0) < images:
            rates.setdefault(line["stage"], []).append(line["images_per_second"])
            ends[line["stage"]] = min(line["images_seen"], images)
    begins = [0, *ends.values()]
    return sum(
        (end - begin) / median(rates[stage])
        for begin, (stage, end) in zip(begins, ends.items(), strict=False)
    )


# --- a drawing -----------------------------------------------------------------------------------


def draw(drawing: Drawing, work: Path) -> dict[str, Any]:
    """Measure a trained network under other sampling settings.

    Raises:
        ValueError: the network is not here, or of another form of its trial.
    """
    folder, base = work / "runs" / drawing.trial, work / "bases" / drawing.trial
    if not agrees(_trained(work, drawing.trial), drawing.network["trained"]):
        raise ValueError(
            f"{folder} is not the network that {drawing.trial} asks for: remove it and the trial's "
            "result, and run the trial again"
        )
    model = open_model(
        folder / "model",
        precision=PRECISION,
        base=base if base.is_dir() else None,
    )
    job, features = prepare(model.config), work / "eval"
    fd = measures.distance(model, _pictures(job), drawing.samples, features, **drawing.settings)
    return {
        "settings": model.sampling(drawing.settings).model_dump(mode="json"),
        "metric": fd.metric,
        NAME: fd.value,
        "evaluations": model.evaluations(drawing.settings),
        "prompts_found": measures.prompts_found(model, job.source, features, **drawing.settings),
    }
