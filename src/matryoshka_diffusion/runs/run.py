"""Training as one call: from what the user named to a finished model, previews on the way.

`train` is `matryoshka_diffusion.train`, and `run_training` is what the command does with a config.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from matryoshka_diffusion.config import RunConfig, UsageError
from matryoshka_diffusion.data.check import summary
from matryoshka_diffusion.metrics.networks import EffNetLite0
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.progress import Progress, shown
from matryoshka_diffusion.runs import prepare
from matryoshka_diffusion.runs.hooks import HeldOutLoss, Preview, Quality, preview_arguments
from matryoshka_diffusion.training import trainer
from matryoshka_diffusion.training.distributed import Parallel, compare_data, joined, rank_device
from matryoshka_diffusion.training.log import find_sink
from matryoshka_diffusion.training.precision import best_device
from matryoshka_diffusion.training.run_folder import owned


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        folder: the run's folder (docs/training.md, What a run leaves behind).
        device: where `model` computes.
    """

    folder: Path
    device: str = "auto"

    @cached_property
    def model(self) -> Matryoshka:
        """The trained model, loaded when it is first asked for."""
        return Matryoshka.load(self.folder, device=self.device)


def train(
    preset: str | Path | RunConfig,
    data: str | Path | None = None,
    out: str | Path | None = None,
    *,
    device: str = "auto",
    progress: Progress | bool = True,
    as_: str | None = None,
    init: str | Path | None = None,
    lora: int | None = None,
    base: str | Path | None = None,
    codec: str | Path | None = None,
    data_changed: bool = False,
    log: Sequence[str] = (),
    **settings: Any,
) -> Run:
    """Train a model on images of yours, or go on with a run, as the command `mdm train` does.

    Args:
        preset: name of a preset, a config, its YAML file, the folder of a run to go on with, or of
            a model to tune.
        data: folder, tar shards, parquet files or hf:NAME.
        out: the run's folder; the same call goes on where it stopped. A run to go on with needs
            none.
        device: `auto` is a GPU if torch can use one.
        progress: called with (images seen, images in all). `True` shows a bar and what the data
            is, `False` nothing.
        as_: a baseline in place of the preset's nest, one of `presets.BASELINES`.
        init: model to start from.
        lora: rank of adapters to train around the model that `preset` names.
        base: model that draws the images which an upsampler enlarges.
        codec: folder of an autoencoder on whose latents the model is trained.
        data_changed: go on although the data of the run is not what it was.
        log: `tensorboard` or `wandb`, to log there, too.
        settings: values of the config by their paths, with two underscores for each dot:
            `train__seed=7`, `train__stages__0__images=8000`.

    Raises:
        ConfigError: there is no such preset or setting, or the config does not fit the data.
        UsageError: `out` is missing.
        Stopped: SIGINT (also of a notebook), SIGTERM or SIGUSR1; the run is saved.
        ValueError, OSError, MissingExtra: the data, the text encoder or a network cannot be used.
    """
    if isinstance(preset, RunConfig) and as_ is not None:
        raise UsageError(f"train: as_={as_!r} changes presets; name one in place of a config")
    models = {"init": init, "base": base, "codec": codec}
    paths = {name: value and str(value) for name, value in models.items()}
    config = prepare.find_config(
        preset if isinstance(preset, RunConfig) else str(preset),
        data and str(data),
        [(name.replace("__", "."), value) for name, value in settings.items()],
        lora=lora,
        as_=as_,
        **paths,
    )
    begun = None if isinstance(preset, RunConfig) else Path(preset)
    if out is None and (begun is None or not (begun / "config.yaml").is_file()):
        raise UsageError("train: give the run's folder as out=...")
    device = best_device() if device == "auto" else device
    folder = Path(out) if out is not None else begun
    assert folder is not None
    notes = print if progress is True else lambda text: None
    run_training(
        config, folder, device, log, data_changed=data_changed, progress=progress, tell=notes
    )
    return Run(folder, device)


def run_training(
    config: RunConfig,
    folder: Path,
    device: str,
    logs: Sequence[str] = (),
    parallel: Parallel = "ddp",
    rank_timeout: int = 60,
    *,
    data_changed: bool = False,
    progress: Progress | bool = True,
    captions: Progress | None = None,
    codes: Progress | None = None,
    tell: Callable[[str], object],
) -> Path:
    """Train in `folder` with previews, as one of the ranks; return the finished model's folder.

    Args:
        rank_timeout: seconds after which a silent rank counts as dead.
        progress: as that of `train`.
        captions: called with the number of captions that are encoded before the first step.
        codes: the same for images.
        tell: called with a text about the data, on rank 0.

    Raises:
        ConfigError, ValueError, OSError, MissingExtra: as `prepare.prepare`.
        Stopped, RuntimeError: as `trainer.train`.
    """
    sinks = [find_sink(name) for name in dict.fromkeys(logs)]
    device = rank_device(device)
    captions = captions or shown(progress is True, "captions")
    codes = codes or shown(progress is True, "images")
    with ExitStack() as ownership, joined(torch.device(device), parallel, rank_timeout) as world:
        world.once(lambda: ownership.enter_context(owned(folder)))
        # Other ranks find in the cache what rank 0 downloads, decodes and encodes.
        with world.first("data", each_machine=True):
            if config.sampling.base is not None:
                from matryoshka_diffusion.cascade import keep_base

                config = keep_base(config, folder)
            ready = prepare.prepare(config, device, folder, progress=captions, coding=codes)
        compare_data(world, ready.source.keys, [one.shape for one in ready.source.samples])
        if ready.config.train.init is not None:
            from matryoshka_diffusion.runs.grow import warm_start

            world.once(lambda: warm_start(ready.config, folder))
        if world.leads:
            tell("\n".join(filter(None, (summary(ready.source), ready.notes))))
        return trainer.train(
            ready.config,
            ready.loader,
            folder,
            encode=ready.encode,
            base=ready.base,
            captions=ready.captions,
            distance=ready.distance,
            quarantine=ready.source.quarantine,
            hooks=_hooks(ready, device),
            sinks=sinks,
            device=device,
            world=world,
            data_changed=data_changed,
            progress=progress,
        )


def _hooks(ready: prepare.Job, device: str) -> list[trainer.Hook]:
    """The hooks of a run: previews, the loss on held-out images, and the quality of samples.

    Raises MissingExtra, before a step is taken, if the network that measures it is not installed.
    """
    every = ready.config.train.preview_every_images
    prompts = preview_arguments(ready.source, ready.config)
    usual = ready.source.usual_shape
    preview = Preview(prompts, ready.encode, device, ready.codec, usual)
    hooks: list[trainer.Hook] = [(every, preview)]
    if ready.held_out is not None:
        watch = HeldOutLoss(ready.source, ready.held_out, ready.encode, device, ready.frozen)
        hooks.append((every, watch))
    if measured := ready.config.train.eval_every_images:
        network = EffNetLite0(device, "train.eval_every_images")
        watch = Quality(ready.source, ready.encode, device, network, ready.codec)
        hooks.append((measured, watch))
    return hooks
