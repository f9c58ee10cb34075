"""Training of a small autoencoder, for runs on codes where no autoencoder is at hand.

It is an `AutoencoderKL` of diffusers, trained on the error of its images and on a little of the
divergence of its codes from N(0, 1) (Rombach et al. 2022), without their perceptual and adversarial
losses: enough for small, plain images. The loop is the one of every training (`training.trainer`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from matryoshka_diffusion.codec import (
    OWN,
    SETTINGS,
    TRAINING,
    WEIGHTS,
    Autoencoder,
    AutoencoderKL,
)
from matryoshka_diffusion.codecconfig import CodecRunConfig
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ConfigError, StageConfig, TrainConfig
from matryoshka_diffusion.configfile import load_config, to_yaml
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import Source, identity, open_source, split
from matryoshka_diffusion.diffusion import Loss
from matryoshka_diffusion.draw import grid
from matryoshka_diffusion.files import require, whole_folder, write_atomically
from matryoshka_diffusion.pyramid import to_float, to_uint8
from matryoshka_diffusion.rng import normal, stream
from matryoshka_diffusion.training.inputs import Inputs, MakeInputs
from matryoshka_diffusion.training.run_folder import continued_data, differences, owned
from matryoshka_diffusion.training.stages import Step
from matryoshka_diffusion.training.step import NotFinite, Recipe
from matryoshka_diffusion.training.trainer import Trainer

MEASURED_IMAGES = 512
"""Images, evenly spread, that the scale of the codes and the error are measured on."""
DRAWN_IMAGES = 24


class TrainedCodec(NamedTuple):
    """Folder of a codec, and the error of its images: PSNR in decibels, and on which images."""

    folder: Path
    psnr: float
    measured_on: str


def train_codec(
    config: CodecRunConfig,
    out: Path,
    device: torch.device | str = "cpu",
    *,
    data_changed: bool = False,
) -> TrainedCodec:
    """Train in the folder `out`, or continue the training that is there.

    It leaves the codec in `out/codec`, images beside their originals in `reconstructions.png` and
    losses in `metrics.jsonl`. With `data_changed` the training goes on with other data.

    Raises:
        ConfigError: `out` holds something else, or the training of another codec or on other data.
        RunInUse: another process trains there.
        Stopped: SIGINT, SIGTERM or SIGUSR1; the training is saved.
        RuntimeError: the loss or its gradient was not finite for many steps.
        ValueError, OSError, MissingExtra: the data or diffusers cannot be used.
    """
    with owned(out, TRAINING):
        source = open_source(config.data, config.side)
        known = config.data.model_copy(update={"identity": identity(source)})
        config = config.model_copy(update={"data": known})
        written = None
        if (out / TRAINING).is_file():
            written = load_config(out / TRAINING, CodecRunConfig)
            _refuse_other(config, written, out, data_changed)
        seen, held_out = split(source, config.data.held_out)
        trainer = Trainer.resume(reconstruction(config, seen.channels), out, device)
        # Writing the config makes the folder this training's, so it comes after what can fail.
        if config != written:
            write_atomically(out / TRAINING, lambda file: file.write(to_yaml(config).encode()))
        try:
            loader = Loader.of(seen, config.seed, config.data)
            trainer.fit(inputs_from(loader, config, device), out)
        except NotFinite as error:
            raise RuntimeError(
                f"the codec's loss or gradient is not finite after {error.step.end:,} images: try "
                f"a lower rate (--set lr={config.lr / 4:g}, with another --out)"
            ) from error
        return _finish(trainer, held_out or seen, "held-out" if held_out else "training", out)


# --- the recipe ----------------------------------------------------------------------------------


def reconstruction(config: CodecRunConfig, colours: int) -> Recipe[AutoencoderKL]:
    """Recipe of an autoencoder of images with `colours` channels: one stage of one level."""
    stage = StageConfig(levels=1, images=config.images, batch_size=config.batch_size, lr=config.lr)
    same = config.model_dump(include=CodecRunConfig.model_fields.keys() & TrainConfig.model_fields)
    train = TrainConfig(stages=(stage,), precision="fp32", layout="nchw", threads=1, **same)

    def loss(net: AutoencoderKL, inputs: Inputs) -> Loss:
        total = codec_loss(net, inputs.x[0], inputs.noise[0], config)
        # The loss of each image is not worth a second pass: a report names the step's images.
        return Loss(total, total[None], total.detach().expand(len(inputs.ids)))

    return Recipe(config, train, lambda _: build(config, colours), loss)


def inputs_from(loader: Loader, config: CodecRunConfig, device: torch.device | str) -> MakeInputs:
    """Map a step to its images and the noise of their posteriors."""
    side = config.side // config.factor
    shape = (config.channels, side, side)

    def inputs_of(step: Step) -> tuple[Inputs]:
        ids = range(step.first, step.end)
        batch = loader.batch(ids)
        noise = normal("codec", [(config.seed, n) for n in ids], shape, device)
        inputs = Inputs(
            step=step,
            x=(batch.numbers(device),),
            noise=(noise,),
            t=torch.zeros(len(ids), device=device),
            cond=Conditioning(),
            ids=tuple(ids),
            keys=batch.keys,
            count=len(ids),
        )
        return (inputs,)

    return inputs_of


def build(config: CodecRunConfig, colours: int) -> AutoencoderKL:
    """Make the autoencoder, with initial weights that depend on the seed alone."""
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
    """Absolute and weighted squared error of a pixel, and weighted divergence of the codes.

    The squared error makes colours right sooner, the absolute one edges sharp. In the bound, error
    and divergence are sums over an image, so one number divides both. `noise` is the posterior's.
    """
    posterior = model.encode(pictures).latent_dist
    decoded = model.decode(posterior.mean + posterior.std * noise).sample
    divergence = posterior.kl().mean() / pictures[0].numel()
    error = decoded - pictures
    square = config.square_weight * error.square().mean()
    return error.abs().mean() + square + config.kl_weight * divergence


def _refuse_other(
    config: CodecRunConfig, written: CodecRunConfig, out: Path, data_changed: bool
) -> None:
    """Raise ConfigError unless `config` and its data are those of the training in `out`."""
    data = continued_data(out, written, config, changed=data_changed)
    if changes := differences(written.model_copy(update={"data": data}), config):
        raise ConfigError(
            f"{out} holds the training of another codec: {changes}; give another --out, or drop "
            "the override to continue that one"
        )


# --- the result ----------------------------------------------------------------------------------


@torch.no_grad()
def _finish(trainer: Trainer[Any], source: Source, which: str, out: Path) -> TrainedCodec:
    """Write the codec, scaled to codes of unit variance, and measure its error."""
    config, model = trainer.recipe.config, trainer.net.eval()
    count = min(MEASURED_IMAGES, len(source))
    chosen = [n * len(source) // count for n in range(count)]
    originals = np.stack([example.picture for example in source.many(chosen)])
    pictures = to_float(originals, config.data.pixels).permute(0, 3, 1, 2).contiguous()
    means = (model.encode(part.to(model.device)).latent_dist.mean for part in pictures.split(64))
    codes = torch.cat([mean.cpu() for mean in means]).double()
    model.register_to_config(
        scaling_factor=1.0 / codes.std().item(), shift_factor=codes.mean().item()
    )
    _save(model, out / OWN)
    codec = Autoencoder(model, device=trainer.device)
    decoded = to_uint8(codec.decode(codec.encode(pictures)), config.data.pixels)
    copies = decoded.permute(0, 2, 3, 1).numpy()
    error, measured_on = psnr(originals, copies), f"{count} {which} pictures"
    drawn = [n * count // min(DRAWN_IMAGES, count) for n in range(min(DRAWN_IMAGES, count))]
    image = grid.grid(
        [[originals[n], copies[n]] for n in drawn],
        columns_titles=("original", "decoded"),
        title=f"{config.name}: {error:.2f} dB on {measured_on}",
        blocks=4,
    )
    grid.save_png(image, out / "reconstructions.png", None)
    return TrainedCodec(out / OWN, error, measured_on)


def psnr(original: UInt8[np.ndarray, "..."], copy: UInt8[np.ndarray, "..."]) -> float:
    """Peak signal-to-noise ratio in decibels, from the mean squared error of all bytes."""
    square = np.mean((original.astype(np.float64) - copy.astype(np.float64)) ** 2)
    return float("inf") if square == 0.0 else float(10.0 * np.log10(255.0**2 / square))


def _save(model: AutoencoderKL, folder: Path) -> None:
    """Write the codec's folder as `save_pretrained` does, unless it holds these weights already.

    Scale and shift are measured anew by each start, maybe on another device, and models trained on
    the codec know it by the hash of the first measurement. A codec of other weights is replaced:
    its training has gone on. Raises OSError with the path.
    """
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    weights, settings = safetensors.torch.save(state, {"format": "pt"}), model.to_json_string()
    files = {WEIGHTS: weights, SETTINGS: settings.encode()}
    whole_already = all((folder / name).is_file() for name in files)
    if whole_already and (folder / WEIGHTS).read_bytes() == weights:
        return
    with whole_folder(folder) as whole:
        for name, data in files.items():
            write_atomically(whole / name, lambda file, data=data: file.write(data))
        if folder.exists():
            shutil.rmtree(folder)
