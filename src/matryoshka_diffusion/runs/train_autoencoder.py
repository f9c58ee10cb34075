"""A small autoencoder of one's own, for `--codec` where there is none to be had.

It is an `AutoencoderKL` of diffusers, trained on the error of its pictures and a little of the
divergence of its codes from N(0, 1) (Rombach et al. 2022), without their perceptual and adversarial
losses: enough for small, plain pictures. The same command continues a stopped training bit for bit.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor

from matryoshka_diffusion.codec.autoencoder import (
    OWN,
    SETTINGS,
    TRAINING,
    WEIGHTS,
    Autoencoder,
    AutoencoderKL,
)
from matryoshka_diffusion.config import CodecRunConfig, ConfigError, StageConfig, TrainConfig
from matryoshka_diffusion.configfile import load_config, override, to_yaml
from matryoshka_diffusion.data.loader import Loader, look_ahead, to_float, to_uint8
from matryoshka_diffusion.data.source import Source, absolute, open_source, sourced, split
from matryoshka_diffusion.draw import grid
from matryoshka_diffusion.files import refuse_full, require, write_atomically
from matryoshka_diffusion.presets import CODECS
from matryoshka_diffusion.rng import normal, stream
from matryoshka_diffusion.train import checkpoint
from matryoshka_diffusion.train.log import Metrics
from matryoshka_diffusion.train.run_folder import differences
from matryoshka_diffusion.train.signals import Interrupts, Stopped, handled
from matryoshka_diffusion.train.stages import Step, steps
from matryoshka_diffusion.train.step import (
    build_optimizer,
    load_moments,
    moments,
    set_learning_rate,
)

MEASURED = 512
"""Pictures that codes' scale and the error are measured on, evenly spread."""
SHOWN = 24
MEASURES = ("scaling_factor", "shift_factor")
"""The settings of a codec that are measured."""


class Trained(NamedTuple):
    """A codec's folder, and the error of its pictures: PSNR in decibels, and on which ones."""

    folder: Path
    psnr: float
    measured_on: str


def find_codec_run(
    name: str, data: str | None, assignments: Sequence[str]
) -> CodecRunConfig | None:
    """The training of a codec that lies at `name` or is called so, with changes; None if none is.

    `name` is the folder of a training, its codec.yaml or one of `CODECS`.

    Raises:
        ConfigError: the changes do not fit.
    """
    path = Path(name)
    begun = path if path.name == TRAINING else path / TRAINING
    if not begun.is_file() and name not in CODECS:
        return None
    config = load_config(begun, CodecRunConfig) if begun.is_file() else CODECS[name]
    changes = [] if data is None else [f"data.path={json.dumps(absolute(data))}"]
    config = override(config, [*changes, *assignments])
    return config.model_copy(update={"data": sourced(config.data)})


def train_codec(
    config: CodecRunConfig,
    out: Path,
    device: torch.device | str = "cpu",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Trained:
    """Train in the folder `out`, or go on with the training that is there.

    It leaves the codec in `out/codec`, pictures beside their originals in `reconstructions.png` and
    losses in `metrics.jsonl`. `progress` is told of images seen, and in all.

    Raises:
        ConfigError: `out` holds something else, or the training of another codec.
        Stopped: SIGINT, SIGTERM or SIGUSR1; the training is saved.
        RuntimeError: the loss or its gradient is not finite.
        ValueError, OSError, MissingExtra: the data or diffusers cannot be used.
    """
    _refuse_others(config, out)
    source = open_source(config.data, config.side)
    seen, held_out = split(source, config.data.held_out)
    learner = Learner(config, seen.channels, torch.device(device))
    # It makes the folder this training's, so what can fail has been before.
    if not (out / TRAINING).is_file():
        write_atomically(out / TRAINING, lambda file: file.write(to_yaml(config).encode()))
    if (path := checkpoint.newest(out / "checkpoints")) is not None:
        learner.restore(checkpoint.read(path), str(path))
    _learn(learner, Loader.of(seen, config.seed, config.data), out, progress)
    return _finish(learner, held_out or seen, "held-out" if held_out else "training", out)


# --- learning ------------------------------------------------------------------------------------


def build(config: CodecRunConfig, colours: int) -> AutoencoderKL:
    """The autoencoder with initial weights that depend on the seed alone."""
    diffusers = require("diffusers", "diffusers", "training a codec")
    depth = len(config.widths)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream(config.seed, "initial weights codec").integers(2**63)))
        return diffusers.AutoencoderKL(
            in_channels=colours,
            out_channels=colours,
            latent_channels=config.channels,
            block_out_channels=config.widths,
            down_block_types=("DownEncoderBlock2D",) * depth,
            up_block_types=("UpDecoderBlock2D",) * depth,
            layers_per_block=config.blocks,
            norm_num_groups=config.norm_groups,
            mid_block_add_attention=False,
            sample_size=config.side,
            scaling_factor=1.0,
        )


def codec_loss(
    model: AutoencoderKL,
    pictures: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b k y x"],
    config: CodecRunConfig,
) -> Float[Tensor, ""]:
    """Absolute and squared error of a pixel, and the divergence of codes for each pixel, weighted.

    The squared error makes colours right sooner, the absolute one edges sharp. In the bound error
    and divergence are sums over a picture, so one number divides both. `noise` is the posterior's.
    """
    posterior = model.encode(pictures).latent_dist
    decoded = model.decode(posterior.mean + posterior.std * noise).sample
    divergence = posterior.kl().mean() / pictures[0].numel()
    error = decoded - pictures
    square = config.square_weight * error.square().mean()
    return error.abs().mean() + square + config.kl_weight * divergence


class Learner:
    """The autoencoder and the optimizer's memory: the part of a training that is saved."""

    def __init__(self, config: CodecRunConfig, colours: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.schedule = _schedule(config)
        self.model = build(config, colours).to(device).train()
        self.optimizer = build_optimizer(self.model, self.schedule)
        self.images_seen, self.seconds = 0, 0.0

    def learn(self, step: Step, pictures: Float[Tensor, "b c h w"]) -> float:
        """Take one step; returns its loss. Raises RuntimeError unless all of it is finite."""
        side = self.config.side // self.config.factor
        shape = (self.config.channels, side, side)
        noise = torch.stack(
            [normal(self.config.seed, "codec", n, shape=shape) for n in range(step.first, step.end)]
        )
        loss = codec_loss(self.model, pictures.to(self.device), noise.to(self.device), self.config)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        if not (loss.isfinite() and norm.isfinite()):
            what = "gradient" if loss.isfinite() else "loss"
            raise RuntimeError(
                f"the codec's {what} is not finite after {step.first:,} images: a lower rate may "
                f"help (--set lr={self.config.lr / 4:g}, with another --out)"
            )
        set_learning_rate(self.optimizer, step.lr)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.images_seen = step.end
        return loss.item()

    def snapshot(self) -> checkpoint.Snapshot:
        """All that the training needs to go on."""
        state = {"images_seen": self.images_seen, "seconds": self.seconds}
        memory = moments(self.optimizer, self.model)
        return checkpoint.Snapshot(state, self.model.state_dict(), ema={}, optimizer=memory)

    def restore(self, snapshot: checkpoint.Snapshot, where: str) -> None:
        """Go on from a snapshot. Raises CheckpointError if it is of another autoencoder."""
        checkpoint.load_weights(self.model, snapshot.weights, where=where)
        load_moments(self.optimizer, self.model, snapshot.optimizer)
        self.images_seen = snapshot.state["images_seen"]
        self.seconds = snapshot.state["seconds"]


def _learn(
    learner: Learner, loader: Loader, out: Path, progress: Callable[[int, int], None] | None
) -> None:
    """Take the steps that are left, logging and saving on the way."""
    config, metrics = learner.config, Metrics(out / "metrics.jsonl", learner.images_seen)
    losses: list[float] = []
    todo = steps(learner.schedule, learner.images_seen)
    batches = look_ahead(lambda step: (step, _pictures(loader, step)), todo, workers=1, depth=2)
    interrupts = Interrupts()
    with handled(interrupts.note), closing(batches):
        began = time.monotonic() - learner.seconds
        for step, pictures in batches:
            losses.append(learner.learn(step, pictures))
            learner.seconds = time.monotonic() - began
            saves = step.ends_stage or step.passes(config.checkpoint_every_images)
            saves = saves or interrupts.received > 0
            if saves or step.passes(config.log_every_images):
                metrics.write(
                    {
                        "images_seen": step.end,
                        "loss": sum(losses) / len(losses),
                        "lr": step.lr,
                        "seconds": learner.seconds,
                    }
                )
                losses.clear()
            if saves:  # a line of metrics ends with it, so resuming repeats the lines, too
                checkpoint.save(out / "checkpoints", learner.snapshot(), keep=2)
            if progress is not None:
                progress(step.end, config.images)
            if interrupts.received:
                raise Stopped(
                    f"stopped at {step.end:,} of {config.images:,} images and saved; the same "
                    "command continues from there",
                    interrupts.received,
                )


def _pictures(loader: Loader, step: Step) -> Float[Tensor, "b c h w"]:
    return loader.batch(range(step.first, step.end)).picture


def _schedule(config: CodecRunConfig) -> TrainConfig:
    """What steps, rates and the optimizer are made from: one stage of one level."""
    stage = StageConfig(levels=1, images=config.images, batch_size=config.batch_size, lr=config.lr)
    return TrainConfig(
        stages=(stage,),
        seed=config.seed,
        warmup_images=config.warmup_images,
        decay_share=config.decay_share,
    )


def _refuse_others(config: CodecRunConfig, out: Path) -> None:
    """Raise ConfigError if `out` holds anything but a training of this config."""
    if not (out / TRAINING).is_file():
        return refuse_full(out)
    if told := differences(load_config(out / TRAINING, CodecRunConfig), config):
        raise ConfigError(
            f"{out} holds the training of another codec: {told}; give another --out, or drop the "
            "override to continue that one"
        )
    return None


# --- what it has learnt --------------------------------------------------------------------------


def _finish(learner: Learner, source: Source, which: str, out: Path) -> Trained:
    """Write the codec, scaled to codes of unit variance, and see how well it does."""
    model = learner.model.eval()
    count = min(MEASURED, len(source))
    chosen = [n * len(source) // count for n in range(count)]
    shown = np.stack([example.picture for example in source.many(chosen)])
    pictures = to_float(shown, learner.config.data.pixels).permute(0, 3, 1, 2).contiguous()
    codes = torch.cat(list(_means(model, pictures)))
    model.register_to_config(
        scaling_factor=1.0 / codes.double().std().item(), shift_factor=codes.double().mean().item()
    )
    for unfinished in out.glob(f".{OWN}.*.tmp"):  # whole folders, of versions that wrote so
        shutil.rmtree(unfinished, ignore_errors=True)
    _save(model, out / OWN)
    codec = Autoencoder(model, device=learner.device)
    decoded = to_uint8(codec.decode(codec.encode(pictures)), learner.config.data.pixels)
    made = decoded.permute(0, 2, 3, 1).numpy()
    error = psnr(shown, made)
    told = f"{error:.2f} dB on {count} {which} pictures"
    _draw(shown, made, f"{learner.config.name}: {told}", out / "reconstructions.png")
    return Trained(out / OWN, error, f"{count} {which} pictures")


@torch.no_grad()
def _means(
    model: AutoencoderKL, pictures: Float[Tensor, "b c h w"]
) -> Iterator[Float[Tensor, "_ k y x"]]:
    for part in pictures.split(64):
        yield model.encode(part.to(model.device)).latent_dist.mean.cpu()


def psnr(original: UInt8[np.ndarray, "..."], made: UInt8[np.ndarray, "..."]) -> float:
    """Peak signal-to-noise ratio of bytes in decibels, from the mean error of all of them."""
    square = np.mean((original.astype(np.float64) - made.astype(np.float64)) ** 2)
    return float("inf") if square == 0.0 else float(10.0 * np.log10(255.0**2 / square))


def _save(model: AutoencoderKL, folder: Path) -> None:
    """Write the codec's folder as `save_pretrained` does, unless this codec is there already.

    The settings, without which a folder is no codec, go first and come last.

    Raises:
        OSError: it cannot be written; names the path and the reason.
    """
    if _holds(folder, model):
        return
    (folder / SETTINGS).unlink(missing_ok=True)
    weights = safetensors.torch.save(_weights(model), metadata={"format": "pt"})
    for name, data in ((WEIGHTS, weights), (SETTINGS, model.to_json_string().encode())):
        write_atomically(folder / name, partial(_put, data), needed=len(data))


def _put(data: bytes, file: BinaryIO) -> None:
    file.write(data)


def _weights(model: AutoencoderKL) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous() for name, value in model.state_dict().items()}


def _holds(folder: Path, model: AutoencoderKL) -> bool:
    """Whether the codec in a folder has these weights, and this scale and shift but for rounding.

    Those are measured anew at the end of each start, maybe on another device; models that were
    trained on this codec know it by the hash of the first.
    """
    try:
        there = safetensors.torch.load_file(folder / WEIGHTS)
        settings = json.loads((folder / SETTINGS).read_text("utf-8"))
        measured = [settings[name] for name in MEASURES]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
    here = _weights(model)
    return (
        there.keys() == here.keys()
        and all(torch.equal(there[name], here[name]) for name in here)
        and np.allclose(measured, [model.config[name] for name in MEASURES], rtol=1e-4, atol=1e-4)
    )


def _draw(
    original: UInt8[np.ndarray, "b h w c"],
    made: UInt8[np.ndarray, "b h w c"],
    title: str,
    path: Path,
) -> None:
    """Some pictures beside what became of them."""
    chosen = [
        n * len(original) // min(SHOWN, len(original)) for n in range(min(SHOWN, len(original)))
    ]
    image = grid.grid(
        [[original[n], made[n]] for n in chosen],
        columns_titles=("original", "decoded"),
        title=title,
        blocks=4,
    )
    grid.save_png(image, path, None)
