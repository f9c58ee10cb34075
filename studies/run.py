"""A queue of trials that any number of workers go through, and the running of one trial.

A trial is done when its result file is whole and of the form that the trial has today. A worker
claims it by a lock on a file, which the system releases when the worker ends, however it ends.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from benchmarks.harness import commit, machine

from matryoshka_diffusion.cascade import Model, open_model
from matryoshka_diffusion.codec import codec_folder
from matryoshka_diffusion.config import ProcessConfig, RunConfig
from matryoshka_diffusion.eval.evaluate import evaluate
from matryoshka_diffusion.files import write_atomically
from matryoshka_diffusion.metrics.networks import NAME
from matryoshka_diffusion.models.find import find_model
from matryoshka_diffusion.nn.costs import count_parameters
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.runs.grow import warm_start
from matryoshka_diffusion.runs.hooks import HeldOutLoss
from matryoshka_diffusion.runs.prepare import Job, open_data, prepare
from matryoshka_diffusion.runs.train_autoencoder import train_codec
from matryoshka_diffusion.training.trainer import View, train
from matryoshka_diffusion.training.weights import export_weights
from studies.trials import (
    COMMON_WEIGHT,
    NEW,
    Trial,
    agrees,
    changed,
    codec_flops,
    image_flops,
    images_at,
    total_flops,
)


def result_path(results: Path, trial: Trial) -> Path:
    """The file of a result: `emoji/mdm-0.json` for `emoji/mdm/0`."""
    pictures, rest = trial.name.split("/", 1)
    return results / pictures / f"{rest.replace('/', '-')}.json"


def is_done(results: Path, trial: Trial) -> bool:
    """True if the result of the trial is there."""
    path = result_path(results, trial)
    return path.is_file() and agrees(json.loads(path.read_text("utf-8")).get("asked"), trial.form)


def work(trials: Sequence[Trial], results: Path, runs: Path) -> bool:
    """Run every trial that is neither done nor in the hands of another worker; tell if all went.

    One that fails is printed and left, and the others go on.
    """
    torch.set_num_threads(1)
    failed = False
    for trial in trials:
        with claimed(runs / "locks" / f"{trial.name.replace('/', '-')}.lock") as mine:
            if not mine or is_done(results, trial):
                continue
            try:
                text = json.dumps({**run(trial, runs), "asked": trial.form}, indent=1) + "\n"
                path = result_path(results, trial)
                write_atomically(path, lambda file, text=text: file.write(text.encode()))
                print(f"done: {trial.name}", flush=True)
            except (ValueError, OSError, RuntimeError) as error:
                failed = True
                print(f"failed: {trial.name}: {error}", flush=True)
    return not failed


@contextmanager
def claimed(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """True if the lock was free; the block holds it until its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def run(trial: Trial, work: Path) -> dict[str, Any]:
    """The result of a trial, with its networks in `work`, which are trained where missing."""
    trained = _train(trial, work)
    result = _measured(trial, trained) if trial.settings is None else _sampled(trial, trained)
    return {
        "task": trial.name,
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(torch.device("cpu")),
        # Paths are relative to `work`: its place is private.
        **json.loads(json.dumps(result).replace(f"{work.resolve()}/", "")),
    }


class Trained(NamedTuple):
    """A trial's networks: its run, and that of a cascade's base."""

    folder: Path
    base: Path | None
    job: Job
    seconds: float

    def open(self, name: str) -> Model:
        """The model in this folder of the run, together with the base."""
        precision = self.job.config.train.precision
        return open_model(self.folder / name, precision=precision, base=self.base)


def _train(trial: Trial, work: Path) -> Trained:
    """Train a trial's networks, or continue their training; return at once if it is finished.

    The folder is named by the trial's form, so a trial of another form gets another one.
    """
    name = "/".join(trial.name.split("/")[:3])  # of the run that is sampled
    form = sha256(json.dumps(trial.trained, sort_keys=True).encode()).hexdigest()[:8]
    work, config, points = work.resolve(), trial.config, measured_at(trial)
    place, base, seconds = work / "runs" / f"{name}-{form}", None, 0.0
    if config.train.init is not None:
        first = first_levels(config.train.init, config.train.init_levels, place / "init")
        config = changed(config, train__init=str(first))
    if trial.codec is not None:
        codec = work / "codecs" / trial.name.split("/")[0]
        with claimed(work / "locks" / f"{codec.name}-codec.lock", wait=True):
            train_codec(trial.codec, codec)
        config = changed(config, codec__path=str(codec_folder(str(codec))))

    def keep(view: View) -> None:
        """Make the averaged weights at the first step past each point a model."""
        for share, images in points.items():
            path = place / "run" / f"points/{share:g}"
            # The config is written last, so a folder without it is not whole.
            if view.images_seen >= images and not (path / "config.json").exists():
                net = view.averaged()
                assert len(net.levels) == len(view.config.model.levels)
                export_weights(path, net.state_dict(), view.config)

    with claimed(place / ".lock", wait=True):
        if trial.base is not None:
            job, base = prepare(trial.base), place / "base"
            train(job.config, job.loader, base, encode=job.encode, captions=job.captions)
            config = changed(config, sampling__base={"path": str(base)})
            seconds = _seconds(base, job.config)
        job = prepare(config)
        if config.train.init is not None:
            warm_start(job.config, place / "run")
        learnt = {"encode": job.encode, "captions": job.captions, "distance": job.distance}
        learnt |= {"hooks": [(1, keep)]}
        train(job.config, job.loader, place / "run", **learnt)
    seconds += _seconds(place / "run", job.config)
    return Trained(place / "run", base, job, seconds)


def first_levels(model: str, levels: int, folder: Path) -> Path:
    """A model of the first levels of another one, in this folder."""
    weights, config = find_model(model)
    inner = config.model.first(levels)
    with torch.device("meta"):
        names = NestedUNet(inner).state_dict()
    stage = config.train.stages[0].model_copy(update={"levels": levels, "mix": ()})
    kept = {"model": inner.model_dump(), "train__stages": [stage.model_dump()]}
    kept |= {"train__wake": None, "sampling__wake": None}
    export_weights(folder, {name: weights[name] for name in names}, changed(config, **kept))
    return folder


def measured_at(trial: Trial) -> dict[float, int]:
    """The images that the trial's last run has seen at each of its points.

    Points before that run has its last level, or has had it for a while, are left out.
    """
    config, last = trial.config, trial.config.train.stages[-1]
    before, own = sum(map(total_flops, trial.parts[:-1])), total_flops(trial.config)
    first = own - (1.0 - NEW) * last.images * image_flops(config, last)
    spent = {point: point * (before + own) - before for point in trial.points}
    return {point: images_at(config, flops) for point, flops in spent.items() if flops >= first}


def _seconds(folder: Path, config: RunConfig) -> float:
    """Seconds of a training as if it had never paused, at the median of each stage's rates."""
    lines = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    logged = [line for line in lines if "images_per_second" in line]
    rates = [(line["stage"], line["images_per_second"]) for line in logged]
    return sum(
        stage.images / median([rate for n, rate in rates if n == index] or [x for _, x in rates])
        for index, stage in enumerate(config.train.stages)
    )


def _measured(trial: Trial, trained: Trained) -> dict[str, Any]:
    """Measurements of a trial at its points and at its end."""
    job, points = trained.job, measured_at(trial)
    measured = [
        {
            "share": share,
            "images": images,
            **_distances(trained.open(f"points/{share:g}"), trial, job, guidance=[1.0]),
        }
        for share, images in points.items()
    ]
    with torch.device("meta"):
        parameters = [count_parameters(NestedUNet(part.model)) for part in trial.parts]
    return {
        "config": job.config.model_dump(mode="json"),
        "parameters": parameters,
        "images": [part.train.images for part in trial.parts],
        "flops": sum(map(total_flops, trial.parts)),
        "seconds": trained.seconds,
        "codec_flops": 0.0 if trial.codec is None else codec_flops(trial.codec),
        "metric": measured[-1]["metric"],
        "points": measured,
        "prompts_found": _prompts_found(trained.open("model"), job),
        "prompts_found_in_one_step": None  # of an upsampler, whose base decides
        if trial.base is not None
        else _prompts_found(trained.open("model"), job, "retrieval-one-step"),
        **_losses(trained.folder / "model", job),
    }


def _sampled(trial: Trial, trained: Trained) -> dict[str, Any]:
    """Measurements of a trained network under the trial's settings."""
    model, settings = trained.open("model"), trial.settings or {}
    return {
        "settings": model.sampling(settings).model_dump(mode="json"),
        **_distances(model, trial, trained.job, **settings),
        "evaluations": model.evaluations(settings),
        "prompts_found": _prompts_found(model, trained.job, **settings),
    }


def _distances(model: Model, trial: Trial, job: Job, **settings: Any) -> dict[str, Any]:
    """Fréchet distance of samples to the whole set, with its held-out images, and its name.

    It falls with the number of samples. With classes, also the share of samples that a classifier
    finds in theirs, and the distance of its features.
    """
    whole, has_classes = open_data(job.config), model.config.model.classes > 0
    names = ("fd", "class-accuracy", "fd-classes") if has_classes else ("fd",)
    results = evaluate(model, names, source=whole, n=trial.samples, **settings)
    others = {x.key.replace("-", "_"): x.value for x in results[1:]}
    return {"metric": results[0].metric, NAME: results[0].value, **others}


def _prompts_found(
    model: Model, job: Job, metric: str = "retrieval", **settings: Any
) -> float | None:
    """Prompt retrieval over captions that were trained on; None where there are none."""
    if model.config.model.text is None:
        return None
    return evaluate(model, metric, source=job.source, **settings)[0].value


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
    losses = watch(View(config, Path(), config.train.images, lambda: net))
    sides = [str(level.side) for level in config.model.levels]
    return {
        name.removesuffix("_per_level"): dict(zip(sides, values, strict=True))
        for name, values in losses.items()
    }
