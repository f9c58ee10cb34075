"""Do a task of the queue: train a trial and measure it, or sample one that was trained."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.harness import commit, machine

from matryoshka_diffusion.cascade import Model, open_model
from matryoshka_diffusion.codec.autoencoder import codec_folder
from matryoshka_diffusion.config import ProcessConfig, RunConfig
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.eval.evaluate import evaluate
from matryoshka_diffusion.eval.result import Result
from matryoshka_diffusion.files import write_atomically
from matryoshka_diffusion.metrics.networks import NAME
from matryoshka_diffusion.nn.costs import count_parameters
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.runs.hooks import HeldOutLoss
from matryoshka_diffusion.runs.prepare import Job, open_source, prepare
from matryoshka_diffusion.runs.train_autoencoder import train_codec
from matryoshka_diffusion.train import checkpoint
from matryoshka_diffusion.train.step import NotFinite
from matryoshka_diffusion.train.trainer import View, train
from studies.compute import codec_flops, images_at, spent
from studies.queue import claimed
from studies.trials import COMMON_WEIGHT, NEW, PRECISION, Drawing, Trial, agrees, changed


def run(task: Trial | Drawing, work: Path) -> dict[str, Any]:
    """The result of a task, with runs in `work`; a training that is not finite is a result, too."""
    try:
        found = run_trial(task, work) if isinstance(task, Trial) else draw(task, work)
    except NotFinite as error:
        found = {"failed": str(error)}
    return {
        "task": task.name,
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(torch.device("cpu")),
        # Paths are relative to `work`: its place is private.
        **json.loads(json.dumps(found).replace(f"{work.resolve()}/", "")),
    }


# --- a trial -------------------------------------------------------------------------------------


def run_trial(trial: Trial, work: Path) -> dict[str, Any]:
    """Train, or continue the training, and return the measurements.

    Raises:
        ValueError: the training in `work` is of another form of the trial.
    """
    folder, features, before = work / "runs" / trial.name, work / "eval", 0.0
    _refuse_other(trial, work)
    note = json.dumps(trial.trained, indent=1)
    write_atomically(_note(work, trial), lambda file: file.write(note.encode()))
    base = None if trial.base is None else work / "bases" / trial.name
    config = trial.config
    if trial.codec is not None:
        codec = work / "codecs" / trial.set.name
        with claimed(work / "locks" / f"{trial.set.name}-codec.lock", wait=True):
            train_codec(trial.codec, codec)
        config = changed(config, {"codec.path": str(codec_folder(str(codec)))})
    if trial.base is not None and base is not None:
        before = _train(prepare(trial.base), base, {})
        config = changed(config, {"sampling.base": {"path": str(base.resolve())}})
    job, points = prepare(config), measured_at(trial)
    seconds = before + _train(job, folder, points)
    distances = {
        share: _distance(
            open_model(_point(folder, share), precision=PRECISION, base=base),
            job,
            trial.samples,
            features,
            guidance=[1.0],
        )
        for share in points
    }
    final = open_model(folder / "model", precision=PRECISION, base=base)
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
        "prompts_found": _prompts_found(final, job.source, features),
        **_losses(folder / "model", job),
    }


def _note(work: Path, trial: Trial) -> Path:
    """The file that says of which form the trial's training is."""
    return work / "asked" / f"{trial.name}.json"


def _refuse_other(trial: Trial, work: Path, *, needed: bool = False) -> None:
    """Raise `ValueError` if the training in `work` is of another form, or needed and missing."""
    folder, note = work / "runs" / trial.name, _note(work, trial)
    trained = json.loads(note.read_text("utf-8")) if note.is_file() else None
    if (needed or folder.is_dir()) and not agrees(trained, trial.trained):
        raise ValueError(
            f"{folder} is not the network that {trial.name} asks for: remove it and the trial's "
            "result, and run the trial again"
        )


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


def _train(job: Job, folder: Path, points: dict[float, int]) -> float:
    """Train in a run folder; returns the seconds of the training over all its starts.

    The averaged weights at the first step past each point become models.
    """

    def keep(view: View) -> None:
        for share, images in points.items():
            path = _point(folder, share)
            # The config is written last, so a folder without it is not whole.
            if view.images_seen >= images and not (path / "config.json").exists():
                net = view.averaged()
                assert len(net.levels) == len(view.config.model.levels)
                checkpoint.export_weights(path, net.state_dict(), view.config)

    train(job.config, job.loader, folder, encode=job.encode, hooks=[(1, keep)])
    return _seconds(folder, job.config.train.images)


def _point(folder: Path, share: float) -> Path:
    return folder / "points" / f"{share:g}"


def _compute(config: RunConfig) -> float:
    return spent(config.model, config.train.stages, config.train.images)


def _parameters(config: RunConfig) -> int:
    with torch.device("meta"):
        return count_parameters(NestedUNet(config.model))


def _seconds(folder: Path, images: int) -> float:
    """Seconds of the training until so many images were seen, as if it had never paused.

    Each stage's images count at the median of the rates that were logged in it.
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
        ValueError: the network is missing, or of another form of its trial.
    """
    _refuse_other(drawing.trial, work, needed=True)
    base = work / "bases" / drawing.trial.name
    model = open_model(
        work / "runs" / drawing.trial.name / "model",
        precision=PRECISION,
        base=base if base.is_dir() else None,
    )
    job, features = prepare(model.config), work / "eval"
    distance = _distance(model, job, drawing.samples, features, **drawing.settings)
    return {
        "settings": model.sampling(drawing.settings).model_dump(mode="json"),
        "metric": distance.metric,
        NAME: distance.value,
        "evaluations": model.evaluations(drawing.settings),
        "prompts_found": _prompts_found(model, job.source, features, **drawing.settings),
    }


# --- measurements, the same for every trial, by the product itself -------------------------------


def _distance(model: Model, job: Job, samples: int, folder: Path, **settings: Any) -> Result:
    """Fréchet distance of so many samples, with conditions out of the whole set, to that set.

    It falls with the number of samples, so all trials have the same.
    """
    whole = open_source(job.config.data, job.config.data_side)  # with the held-out images
    (found,) = evaluate(model, "fd", source=whole, n=samples, folder=folder, **settings)
    return found


def _prompts_found(model: Model, source: Source, folder: Path, **settings: Any) -> float | None:
    """Prompt retrieval over captions that were trained on; None where there are none."""
    if model.config.model.text is None:
        return None
    (found,) = evaluate(model, "retrieval", source=source, folder=folder, **settings)
    return found.value


def _losses(model: Path, job: Job) -> dict[str, dict[str, float] | None]:
    """Loss at each side on trained and on held-out images, under one weighting, time and noise.

    None for upsamplers and models of latents, which denoise something else.
    """
    assert job.held_out is not None, "every trial holds images out"
    config = job.config
    if config.model.coarse is not None or config.codec is not None:
        return {"seen_loss": None, "held_out_loss": None}
    common = ProcessConfig(prediction=config.process.prediction, weighting=COMMON_WEIGHT)
    seeded = config.train.model_copy(update={"seed": 0})
    config = config.model_copy(update={"process": common, "train": seeded})
    net = Matryoshka.load(model).net
    watch = HeldOutLoss(job.source, job.held_out, job.encode, "cpu")
    found = watch(View(config, Path(), config.train.images, lambda: net))
    sides = [str(level.side) for level in config.model.levels]
    return {
        name.removesuffix("_per_level"): dict(zip(sides, values, strict=True))
        for name, values in found.items()
    }
