"""Pictures <-> what the pyramid is made of: themselves, or the codes of an autoencoder."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from matryoshka_diffusion.codec.folder import check_codec, check_weights, codec_folder, read_card
from matryoshka_diffusion.config import ConfigError, RunConfig
from matryoshka_diffusion.files import require

AutoencoderKL: TypeAlias = Any
"""That of diffusers, whose own annotations do not say what it returns."""


@runtime_checkable
class Codec(Protocol):
    """Pictures in [-1, 1] to codes of about unit variance, and back."""

    def encode(self, pictures: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b k *codes"]: ...
    def decode(self, codes: Float[Tensor, "b k *codes"]) -> Float[Tensor, "b c *grid"]: ...


class Identity:
    """The codec of a model of pixels, of pictures or clips."""

    def encode(self, pictures: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b c *grid"]:
        return pictures

    def decode(self, codes: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b c *grid"]:
        return codes


class Autoencoder:
    """A frozen `AutoencoderKL`, in float32 whatever the network around it runs in.

    A picture's codes are the mean of its posterior: they can be stored, resuming repeats them, and
    the posterior's noise would be small beside the noise of diffusion. Pictures are encoded and
    decoded one by one, so that neither result depends on the batch, to the last bit.

    Attributes:
        key: a hash of what codes depend on.
        channels: numbers of a code at each position.
        colours: channels of the pictures.
        factor: pixels along each side of a position.
    """

    def __init__(
        self, model: AutoencoderKL, key: str = "", device: torch.device | str = "cpu"
    ) -> None:
        settings = model.config
        self.key = key
        self.channels: int = settings.latent_channels
        self.colours: int = settings.in_channels
        self.factor: int = 2 ** (len(settings.block_out_channels) - 1)
        self.device = torch.device(device)
        self._model = model.float().eval().requires_grad_(False).to(self.device)
        # One number for all channels, or one for each.
        shift = settings.latents_mean or settings.shift_factor or 0.0
        self._shift = torch.tensor(shift, device=self.device).view(-1, 1, 1)
        spread = torch.tensor(settings.latents_std or 1.0, device=self.device).view(-1, 1, 1)
        self._scale = settings.scaling_factor / spread

    @torch.no_grad()
    def encode(self, pictures: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k y x"]:
        """Codes, where the pictures are.

        Raises:
            ValueError: a code is not finite.
        """
        codes = torch.cat([self._encode(picture) for picture in pictures.split(1)])
        if not codes.isfinite().all():
            raise ValueError(
                "codec.path: the codec makes codes that are not finite (NaN or infinite) of finite "
                "pictures; its weights are damaged"
            )
        return codes.to(pictures.device)

    @torch.no_grad()
    def decode(self, codes: Float[Tensor, "b k y x"]) -> Float[Tensor, "b c h w"]:
        """Pictures, where the codes are."""
        pictures = torch.cat([self._decode(one) for one in codes.split(1)])
        return pictures.to(codes.device)

    def _encode(self, picture: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 k y x"]:
        with torch.autocast(self.device.type, enabled=False):
            mean = self._model.encode(picture.to(self.device).float()).latent_dist.mean
        return (mean - self._shift) * self._scale

    def _decode(self, codes: Float[Tensor, "1 k y x"]) -> Float[Tensor, "1 c h w"]:
        with torch.autocast(self.device.type, enabled=False):
            plain = codes.to(self.device).float() / self._scale + self._shift
            return self._model.decode(plain).sample


def load_autoencoder(config: RunConfig, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder that `config.codec` names.

    Raises:
        ConfigError: there is none, or it does not fit the config; names the key and the remedy.
        MissingExtra: diffusers is not installed.
    """
    assert config.codec is not None, "asked of runs on codes"
    if config.codec.path is None:
        raise ConfigError(
            f"codec.path is not set: {config.name} needs an autoencoder, a folder with an "
            "AutoencoderKL of diffusers (--codec PATH); mdm train codec --data DIR --out RUN, or "
            "mdm train openmoji-codec --out RUN, makes one"
        )
    folder = codec_folder(config.codec.path)
    card = read_card(folder)
    if config.codec.factor != card.factor:
        raise ConfigError(
            f"codec.factor is {config.codec.factor}, but {folder} makes each side {card.factor} "
            f"times smaller: add --set codec.factor={card.factor}, and give model.levels the sides "
            "that codes then have"
        )
    if config.model.channels != card.channels:
        raise ConfigError(
            f"model.channels is {config.model.channels}, but codes of {folder} have "
            f"{card.channels}: add --set model.channels={card.channels}"
        )
    key = check_codec(config.codec, folder, config.name)
    diffusers = require("diffusers", "diffusers", "a codec")
    model, loading = diffusers.AutoencoderKL.from_pretrained(
        str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    check_weights(folder, loading)
    return Autoencoder(model, key, device)


def load_codec(config: RunConfig, device: torch.device | str = "cpu") -> Codec:
    """What stands between pictures and the pyramid of a run. Raises as `load_autoencoder`."""
    return Identity() if config.codec is None else load_autoencoder(config, device)
