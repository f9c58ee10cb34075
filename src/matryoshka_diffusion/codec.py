"""Codes in place of images: a frozen `AutoencoderKL` of diffusers, and what it made, on disk.

Whoever finds, checks or copies the folder of a codec needs no diffusers; only loading its weights
does.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from matryoshka_diffusion.config import (
    VIDEO_SOURCES,
    CodecConfig,
    ConfigError,
    DataConfig,
    RunConfig,
)
from matryoshka_diffusion.data.loader import Batch, LoaderWrapper, look_ahead
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.files import (
    FOREIGN_ERRORS,
    cache_folder,
    read_json,
    require,
    write_atomically,
)
from matryoshka_diffusion.pyramid import to_float
from matryoshka_diffusion.tensorfile import check_folder
from matryoshka_diffusion.text.feature_cache import RaggedStore

SETTINGS, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
FILES = (SETTINGS, WEIGHTS)
OWN = "codec"
"""Folder of a model's own codec beside its weights, and of a trained codec in its run."""
TRAINING = "codec.yaml"
"""Config of an autoencoder's training, in its run folder."""

IMAGES_PER_FILE = 1024
_CLASS = "AutoencoderKL"
_PLACES = ("", OWN, "vae")  # in the folder itself, in a run or model, in a pipeline

Frozen: TypeAlias = Literal["codec", "features"]
"""Sections of a config about what stays frozen and whose files lie beside a model's weights."""

AutoencoderKL: TypeAlias = Any
"""The class of diffusers, whose own annotations do not say what it returns."""


@runtime_checkable
class Codec(Protocol):
    """Map images in [-1, 1] to codes of about unit variance, and back."""

    def encode(self, pictures: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b k *codes"]: ...
    def decode(self, codes: Float[Tensor, "b k *codes"]) -> Float[Tensor, "b c *grid"]: ...


class Autoencoder:
    """Frozen `AutoencoderKL`, in float32 whatever the network around it runs in.

    The codes of an image are the mean of its posterior: they can be stored and resuming repeats
    them. Images are encoded and decoded one by one, so no bit of a result depends on the batch.

    Attributes:
        key: hash of weights and settings.
        channels: channels of the codes.
        colours: channels of the images.
        factor: side of an image over side of its codes.
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
        """Codes, on the device of the images. Raises ValueError if a code is not finite."""
        codes = torch.cat([self._encode(picture) for picture in pictures.split(1)])
        if not codes.isfinite().all():
            raise ValueError(
                "codec.path: the codec makes codes that are not finite (NaN or infinite) of finite "
                "pictures; its weights are damaged: replace them"
            )
        return codes.to(pictures.device)

    @torch.no_grad()
    def decode(self, codes: Float[Tensor, "b k y x"]) -> Float[Tensor, "b c h w"]:
        """Images, on the device of the codes."""
        return torch.cat([self._decode(one) for one in codes.split(1)]).to(codes.device)

    def _encode(self, picture: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 k y x"]:
        with torch.autocast(self.device.type, enabled=False):
            mean = self._model.encode(picture.to(self.device).float()).latent_dist.mean
        return (mean - self._shift) * self._scale

    def _decode(self, codes: Float[Tensor, "1 k y x"]) -> Float[Tensor, "1 c h w"]:
        with torch.autocast(self.device.type, enabled=False):
            plain = codes.to(self.device).float() / self._scale + self._shift
            return self._model.decode(plain).sample


def load_autoencoder(config: RunConfig, device: torch.device | str = "cpu") -> Autoencoder:
    """Load the autoencoder at `config.codec.path`.

    Raises:
        ConfigError: it is missing, or does not fit the config; names the key and the remedy.
        MissingExtra: diffusers is not installed.
    """
    assert config.codec is not None
    if config.codec.path is None:
        raise ConfigError(
            f"codec.path is not set: {config.name} needs an autoencoder, a folder with an "
            f"{_CLASS} of diffusers (--codec PATH); mdm train codec --data DIR --out RUN, or "
            "mdm train openmoji-codec --out RUN, makes one"
        )
    folder = codec_folder(config.codec.path)
    shape = read_code_shape(folder)
    if config.codec.factor != shape.factor:
        raise ConfigError(
            f"codec.factor is {config.codec.factor}, but {folder} makes each side {shape.factor} "
            f"times smaller: add --set codec.factor={shape.factor}, and set model.levels to the "
            "sides of the codes"
        )
    if config.model.channels != shape.channels:
        raise ConfigError(
            f"model.channels is {config.model.channels}, but codes of {folder} have "
            f"{shape.channels}: add --set model.channels={shape.channels}"
        )
    key = check_codec(config.codec, folder, config.name)
    diffusers = require("diffusers", "diffusers", "a codec")
    with _named(folder):
        check_folder(folder)
        model, report = diffusers.AutoencoderKL.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    # diffusers would only warn of missing or unused weights.
    if problems := {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}:
        raise ConfigError(f"codec.path: the weights in {folder} do not fit its config: {problems}")
    with _named(folder):
        return Autoencoder(model, key, device)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Raise ConfigError with the folder of a codec for whatever diffusers raises about it."""
    try:
        yield
    except (OSError, SafetensorError, *FOREIGN_ERRORS) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(
            f"codec.path: {folder} is no codec that can be loaded ({reason})"
        ) from error


# --- the folder of a codec -----------------------------------------------------------------------


class CodeShape(NamedTuple):
    """Side of an image over side of its codes, and channels of the codes."""

    factor: int
    channels: int


def codec_folder(path: str) -> Path:
    """Absolute folder of the `AutoencoderKL` at `path`.

    Raises:
        ConfigError: there is none, or its weights are no safetensors.
    """
    place = Path(path).expanduser().resolve()
    if not place.is_dir():
        raise ConfigError(
            f"codec.path: there is no folder {place}; if the codec has moved, correct codec.path "
            f"in the config, or put a copy into a folder {OWN} in the run's or model's folder"
        )
    folder = next((place / part for part in _PLACES if _is_codec(place / part)), None)
    if folder is None:
        raise ConfigError(
            f"codec.path: {place} holds no {_CLASS} of diffusers (a {SETTINGS} with the "
            f"_class_name {_CLASS}, beside {WEIGHTS})"
        )
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(
            f"codec.path: {folder} has no {WEIGHTS}; other forms of weights can run code when they "
            "are read: save it as safetensors with diffusers first"
        )
    return folder


def read_code_shape(folder: Path) -> CodeShape:
    """Shape of the codes, from the settings. Raises ConfigError if a setting is missing."""
    settings = _read_settings(folder)
    try:
        factor = 2 ** (len(settings["block_out_channels"]) - 1)
        return CodeShape(factor, settings["latent_channels"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"codec.path: {folder / SETTINGS} lacks {error}") from error


def fingerprint(folder: Path) -> str:
    """SHA-256 of settings and weights, in hexadecimal digits."""
    settings = {name: value for name, value in _read_settings(folder).items() if name[:1] != "_"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    with open(folder / WEIGHTS, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def check_codec(config: CodecConfig, folder: Path, name: str) -> str:
    """Hash of the codec in `folder`. Raises ConfigError unless model `name` was trained with it.

    A config without a hash agrees with every codec.
    """
    key = fingerprint(folder)
    if config.weights not in ("", key):
        raise ConfigError(
            f"codec.path: {folder} is not the codec that {name} was trained with: its hash is "
            f"{key[:12]}..., not {config.weights[:12]}...; give the folder of that one"
        )
    return key


def with_path(config: RunConfig, part: Frozen, path: str | None) -> RunConfig:
    """The config of a model with another `codec.path` or `features.path`, if it has that part."""
    section = getattr(config, part)
    changed = section and section.model_copy(update={"path": path})
    return config.model_copy(update={part: changed})


def refuse_codec(path: Path) -> None:
    """Raise ConfigError if `path`, named as a model, is an autoencoder or its training."""
    remedy = f"mdm train PRESET --codec {path} trains a model on its codes"
    if (path / TRAINING).is_file():
        raise ConfigError(
            f"{path} is the training of an autoencoder, which draws nothing by itself: {remedy}, "
            f"mdm train {path} goes on with it"
        )
    if _is_codec(path):
        raise ConfigError(f"{path} is an autoencoder, which draws nothing by itself: {remedy}")


def carry_codec(config: RunConfig, folder: Path) -> RunConfig:
    """Copy the codec of a run into the model folder `folder`, and return the config without a path.

    Raises:
        ConfigError: there is no codec at `codec.path`, or another one than the run's.
        OSError: it cannot be written.
    """
    if config.codec is None or config.codec.path is None:
        return config
    origin = codec_folder(config.codec.path)
    check_codec(config.codec, origin, config.name)
    for name in FILES:
        with open(origin / name, "rb") as source:
            size = (origin / name).stat().st_size
            write_atomically(folder / OWN / name, partial(shutil.copyfileobj, source), needed=size)
    return with_path(config, "codec", None)


def _is_codec(folder: Path) -> bool:
    return _read_settings(folder).get("_class_name") == _CLASS


def _read_settings(folder: Path) -> dict[str, Any]:
    """Settings in a folder; empty if there are none or they cannot be read."""
    try:
        settings = read_json(folder / SETTINGS)
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


# --- batches of codes, and the cache of codes ----------------------------------------------------


@dataclass(frozen=True)
class LatentLoader(LoaderWrapper):
    """The batches of a loader, with codes for images."""

    codec: Codec | CodeCache

    def batch(self, ids: Sequence[int]) -> Batch:
        """The samples with these global numbers n."""
        batch = self.loader.batch(ids)
        return replace(batch, picture=self.codec.encode(batch.numbers()))


@runtime_checkable
class Encoder(Protocol):
    """Map images in [-1, 1] to codes: `channels` at each square of `factor` pixels along a side.

    `key` is a hash of all that codes depend on besides the image and `device`.
    """

    key: str
    channels: int
    factor: int
    device: torch.device

    def encode(self, pictures: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k y x"]: ...


class CodeCache:
    """An encoder with a memory on disk; only `add` stores.

    Codes are found by the image's own numbers after cropping and mirroring, so those of another
    image cannot be returned. Each type of device has a folder, because it rounds in its own way.
    """

    def __init__(self, codec: Encoder, folder: Path | None = None) -> None:
        self.codec = codec
        own = f"{codec.key[:32]}-{codec.device.type}"
        self.folder = cache_folder("codes", own) if folder is None else folder
        self.store = RaggedStore(self.folder, codec.channels, torch.float32)

    def encode(self, pictures: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k y x"]:
        """Codes, with the same bits whether they are stored or computed."""
        places = self.store.find([content_digest(picture) for picture in pictures]).tolist()
        codes = [
            self.codec.encode(picture) if place < 0 else self._read(place, picture)
            for picture, place in zip(pictures.split(1), places, strict=True)
        ]
        return torch.cat(codes)

    def bytes_of(self, count: int, side: int) -> int:
        """Size of the codes of `count` images."""
        return count * self.codec.channels * (side // self.codec.factor) ** 2 * 4

    def add(self, pictures: Sequence[Float[Tensor, "c h w"]]) -> None:
        """Store the codes of images that are not stored yet, in one file.

        Raises:
            OSError: the file cannot be written.
        """
        unique = {content_digest(picture): picture for picture in pictures}
        places = self.store.find(list(unique)).tolist()
        missing = [name for name, place in zip(unique, places, strict=True) if place < 0]
        if missing:
            threads = os.cpu_count() or 1
            images = [unique[name] for name in missing]
            codes = look_ahead(self._encode_alone, images, workers=threads, depth=2 * threads)
            self.store.write(missing, list(codes))

    def _encode_alone(self, picture: Float[Tensor, "c h w"]) -> Float[Tensor, "n k"]:
        """Codes of one image as rows, computed by one thread as the training's inputs are.

        Sums of floats depend on how many threads share them.
        """
        torch.set_num_threads(1)
        return self.codec.encode(picture[None])[0].flatten(1).T.contiguous()

    def _read(self, place: int, picture: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 k y x"]:
        if (rows := self.store.read(place)) is None:
            rows = self._encode_alone(picture[0])
            self.store.mend(place, rows)
        return rows.T.contiguous().unflatten(1, (picture.shape[-2] // self.codec.factor, -1))[None]


def content_digest(picture: Float[Tensor, "..."]) -> str:
    """Digest of an image's shape and numbers."""
    digest = hashlib.blake2b(str(tuple(picture.shape)).encode(), digest_size=16)
    digest.update(picture.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def can_store(data: DataConfig) -> bool:
    """True if an image is seen in one or two forms only: no random crop, clip or augmentation."""
    same_frame = data.source not in VIDEO_SOURCES or data.clip != "random"
    return data.crop == "centre" and data.augment == 0.0 and same_frame


def store_codes(
    cache: CodeCache,
    source: Source,
    data: DataConfig,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Store the codes of all images of `source`, and of the mirrored ones with `data.flip`.

    An interruption costs the file in the making. Raises OSError if a file cannot be written.
    """
    cache.store.tidy()
    for first in range(0, len(source), IMAGES_PER_FILE):
        indices = range(first, min(first + IMAGES_PER_FILE, len(source)))
        images = [example.picture for example in source.many(indices)]
        if data.flip:
            images += [image[:, ::-1] for image in images]
        pictures = to_float(np.stack(images), data.pixels).permute(0, 3, 1, 2).contiguous()
        cache.add(list(pictures))
        if progress is not None:
            progress(indices.stop, len(source))
