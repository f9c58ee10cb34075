"""Features in place of pixels: a frozen network makes the coarsest level of a nest.

D^1(x) is what the network sees in an image, standardised and projected to a few channels. Samplers
draw it ahead of the pixels and nothing decodes it. After the network all is linear.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from matryoshka_diffusion.codec import CodeCache, with_path
from matryoshka_diffusion.config import ConfigError, RunConfig
from matryoshka_diffusion.configfile import to_yaml
from matryoshka_diffusion.data.loader import Batch, LoaderWrapper, look_ahead
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.files import (
    FOREIGN_ERRORS,
    BrokenFile,
    digest,
    read_json,
    require,
    write_atomically,
)
from matryoshka_diffusion.metrics.networks import EffNetLite0, reason_of, weights_hash
from matryoshka_diffusion.pyramid import to_float
from matryoshka_diffusion.rng import choose
from matryoshka_diffusion.tensorfile import check_folder, read_weights
from matryoshka_diffusion.training.weights import fingerprint

FILE = "features.safetensors"
"""Name of the projection's file in the folder of a run or model."""
PACKAGED = "effnet-lite0"
FIT_IMAGES = 1024
"""Images that a projection is fitted to: tens of thousands of positions."""
_FIT_BATCH = 16
_ROUNDING = 1e-6  # of the largest deviation or variance: less is none


# --- frozen networks -----------------------------------------------------------------------------


@runtime_checkable
class Network(Protocol):
    """A frozen network: images with sides of n * `stride` to n x n features. `key`: its hash."""

    key: str
    stride: int

    def __call__(self, pictures: Float[Tensor, "b 3 h w"], /) -> Float[Tensor, "b d y x"]: ...


class EffNet:
    """EfficientNet-Lite0: the 320 features of its last block."""

    stride = 32

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Raises `MissingExtra` if a package is missing."""
        self._net = EffNetLite0(device, purpose=f"features.network={PACKAGED}")
        self.key = self._net.weights

    def __call__(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 320 y x"]:
        return self._net.maps((pictures + 1.0) / 2.0)[-1]


class VisionTransformer:
    """A vision transformer of transformers, such as DINOv2, DINOv3 or SigLIP: its last patches."""

    def __init__(self, path: str, device: torch.device | str = "cpu") -> None:
        """Load a folder. Only safetensors are read and no code of the folder is run.

        Raises:
            ConfigError: there is no such folder, or it holds something else.
            MissingExtra: transformers is not installed.
        """
        transformers = require("transformers", "text", "features.network")
        folder = Path(path).expanduser()
        files = sorted(folder.glob("*.safetensors"))
        wanted = f"name a folder with a vision transformer of transformers, or {PACKAGED}"
        if not files:
            raise ConfigError(f"features.network: {path} has no *.safetensors: {wanted}")
        try:
            check_folder(folder)
            model, loading = transformers.AutoModel.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
            self._mean, self._std = (
                numbers.view(-1, 1, 1).to(device) for numbers in _scaling(folder)
            )
        except (OSError, SafetensorError, *FOREIGN_ERRORS) as error:
            reason = f"{folder} cannot be loaded ({reason_of(error)})"
            raise ConfigError(f"features.network: {reason}: {wanted}") from error
        sees = hasattr(model, "vision_model") or model.main_input_name == "pixel_values"
        model = getattr(model, "vision_model", model)  # of a model of images and texts
        patch = getattr(model.config, "patch_size", None)
        if not (sees and isinstance(patch, int)):
            kind = type(model).__name__
            raise ConfigError(f"features.network: {folder} holds a {kind}, no such model: {wanted}")
        self.stride = patch
        # What pools the patches is not used, and some checkpoints leave it out.
        if missing := [name for name in loading["missing_keys"] if "pooler" not in name]:
            raise ConfigError(f"features.network: {folder} lacks weights, first {min(missing)}")
        self._model = model.eval().requires_grad_(False).float().to(device)
        takes = inspect.signature(model.forward).parameters
        self._options = {name: True for name in ("interpolate_pos_encoding",) if name in takes}
        self.key = weights_hash(*files)

    def __call__(self, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d y x"]:
        """Features of each patch. Raises ConfigError if the network has not one for each."""
        x = ((pictures + 1.0) / 2.0 - self._mean) / self._std
        tokens = self._model(pixel_values=x, **self._options).last_hidden_state
        side = pictures.shape[-1] // self.stride
        if tokens.ndim != 3 or tokens.shape[1] < side**2:
            raise ConfigError(
                f"features.network: the last features of a {type(self._model).__name__} are of "
                f"shape {tuple(tokens.shape)}, not one for each of {side**2} patches: name a plain "
                f"vision transformer, or {PACKAGED}"
            )
        # Tokens for the class and registers come before those of the patches.
        return tokens[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))


def _scaling(folder: Path) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the images that a network was trained on; 1/2 if unknown."""
    settings = folder / "preprocessor_config.json"
    known = read_json(settings) if settings.is_file() else {}
    mean, std = (known.get(name, [0.5] * 3) for name in ("image_mean", "image_std"))
    return torch.tensor(mean), torch.tensor(std)


def load_network(name: str, device: torch.device | str = "cpu") -> Network:
    """The frozen network of a name or folder. Raises ConfigError or MissingExtra."""
    return EffNet(device) if name == PACKAGED else VisionTransformer(name, device)


def feature_map(
    network: Network, pictures: Float[Tensor, "b c h w"], side: int
) -> Float[Tensor, "b d side side"]:
    """Features of images in [-1, 1] with 1 or 3 channels, resized to `side` strides."""
    pixels = side * network.stride
    x = F.interpolate(pictures.float(), (pixels, pixels), mode="bilinear", antialias=True)
    return network(x.expand(-1, 3, -1, -1))


# --- their projection ----------------------------------------------------------------------------


class Projection(NamedTuple):
    """A linear map of the features at each position to a few channels."""

    mean: Float[Tensor, " d"]
    components: Float[Tensor, "k d"]

    def __call__(self, features: Float[Tensor, "b d y x"]) -> Float[Tensor, "b k y x"]:
        centred = features - self.mean.to(features)[:, None, None]
        return torch.einsum("kd,bdyx->bkyx", self.components.to(features), centred)


def fit(maps: Iterable[Float[Tensor, "b d y x"]], channels: int, std: float) -> Projection:
    """Principal components of standardised features, each with mean 0 and deviation `std`.

    Raises ConfigError if these features have fewer directions.
    """
    count, total, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    for features in maps:
        columns = features.cpu().double().transpose(0, 1).flatten(1)
        count, total = count + columns.shape[1], total + columns.sum(1)
        squares = squares + columns @ columns.T
    mean = total / count
    covariance = squares / count - torch.outer(mean, mean)
    scale = covariance.diagonal().clamp(min=0.0).sqrt()
    scale = torch.where(scale > _ROUNDING * scale.max(), scale, torch.inf)  # constant features
    variances, directions = torch.linalg.eigh(covariance / torch.outer(scale, scale))
    known = int((variances > _ROUNDING * variances[-1]).sum())
    if channels > known:
        raise ConfigError(
            f"model.levels[0].features is {channels}, but the features of these images have "
            f"{known} directions: set it to at most that, or name more images"
        )
    components = directions.flip(1)[:, :channels] / variances.flip(0)[:channels].sqrt()
    return Projection(mean.float(), (std * components.T / scale).float())


def write_projection(file: Path, projection: Projection, network: str) -> None:
    """Write a projection with the hash of its network. Raises OSError."""
    data = save(projection._asdict(), {"network": network})
    write_atomically(file, lambda place: place.write(data), needed=len(data))


def read_projection(file: Path) -> tuple[Projection, str]:
    """A projection, and the hash of its network.

    Raises:
        ConfigError: the file is missing, damaged, or something else.
    """
    remedy = f"put the {FILE} of the run back, or name a copy (--set features.path=FILE)"
    try:
        stored, about = read_weights(file)
        return Projection(stored["mean"], stored["components"]), about["network"]
    except FileNotFoundError:
        raise ConfigError(f"features.path: there is no file {file}: {remedy}") from None
    except (BrokenFile, KeyError) as error:
        raise ConfigError(f"features.path: {file} is no projection ({error}): {remedy}") from error


def hash_of(projection: Projection, network: str, side: int) -> str:
    """Hash of all that a level of features depends on besides the images."""
    return digest(f"{network} {side} {fingerprint(projection._asdict())}")


# --- a level of them -----------------------------------------------------------------------------


class FeatureEncoder:
    """Projected features of images, on `side` x `side` positions: an `Encoder` of `codec.py`.

    Images are encoded one by one, so no bit of a result depends on the batch.
    """

    def __init__(
        self, network: Network, projection: Projection, side: int, factor: int, device: torch.device
    ) -> None:
        self.key = hash_of(projection, network.key, side)
        self.channels, self.factor, self.device = len(projection.components), factor, device
        self._network, self._projection, self._side = network, projection, side

    def write(self, file: Path) -> None:
        """Write the projection. Raises OSError."""
        write_projection(file, self._projection, self._network.key)

    @torch.no_grad()
    def encode(self, pictures: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k y x"]:
        with torch.autocast(self.device.type, enabled=False):
            rows = [
                self._projection(feature_map(self._network, one.to(self.device), self._side))
                for one in pictures.split(1)
            ]
        return torch.cat(rows).to(pictures.device)


@dataclass(frozen=True)
class FeatureLoader(LoaderWrapper):
    """The batches of a loader, with features beside the images."""

    features: CodeCache

    def batch(self, ids: Sequence[int]) -> Batch:
        """The samples with these global numbers n."""
        batch = self.loader.batch(ids)
        return replace(batch, features=self.features.encode(batch.numbers()))


def open_features(
    config: RunConfig,
    source: Source,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[RunConfig, FeatureEncoder]:
    """The config of a run with the hash and place of its features, and their encoder.

    The projection is the one at `features.path`, or the run's own in `folder`. For a new run one is
    fitted to images of `source`; `keep_features` then writes it.

    Raises:
        ConfigError: the network or the projection is missing, or not the one that the run began
            with.
    """
    section, level = config.features, config.model.levels[0]
    assert section is not None, "the run has features"
    assert level.features is not None, "so its coarsest level has them"
    if source.channels not in (1, 3):
        raise ConfigError(
            f"features.network looks at images with 1 or 3 channels, and {source.name} has "
            f"{source.channels}: set model.channels=3"
        )
    network = load_network(section.network, device)
    own = folder and folder / FILE
    place = Path(section.path).expanduser() if section.path else own
    place = place / FILE if place and place.is_dir() else place
    if place and (section.path or section.weights or place.is_file()):
        projection, of = read_projection(place)
        if of != network.key:
            raise ConfigError(
                f"features.network: {section.network} is not the network that {place} projects: "
                f"its hash is {network.key}, not {of}; name that one"
            )
    else:
        maps = _maps(network, source, config, torch.device(device), progress)
        projection = fit(maps, level.features, config.model.data_std)
    if len(projection.components) != level.features:
        raise ConfigError(
            f"model.levels[0].features is {level.features}, but {place} projects to "
            f"{len(projection.components)} channels: set it to that, or omit features.path"
        )
    factor, device = config.data_side // level.side, torch.device(device)
    encoder = FeatureEncoder(network, projection, level.side, factor, device)
    _check_hash(config, encoder.key, place)
    named = {"weights": encoder.key, "path": str(own.resolve()) if own else section.path}
    config = config.model_copy(update={"features": section.model_copy(update=named)})
    return config, encoder


def keep_features(config: RunConfig, encoder: FeatureEncoder, folder: Path) -> None:
    """Keep the projection of a run in its folder. Its config then makes the folder that of a run.

    Raises OSError if they cannot be written.
    """
    if not (folder / FILE).is_file():
        encoder.write(folder / FILE)
    if not (folder / "config.yaml").is_file():
        text = to_yaml(config).encode()
        write_atomically(folder / "config.yaml", lambda file: file.write(text))


def carry_features(config: RunConfig, folder: Path) -> RunConfig:
    """Copy the projection of a run into a model folder; return the config without a path.

    Raises:
        ConfigError: it is missing, or another one than the run's.
        OSError: it cannot be written.
    """
    if config.features is None or config.features.path is None:
        return config
    place = Path(config.features.path)
    projection, network = read_projection(place)
    _check_hash(config, hash_of(projection, network, config.model.levels[0].side), place)
    write_projection(folder / FILE, projection, network)
    return with_path(config, "features", None)


def _check_hash(config: RunConfig, key: str, place: Path | None) -> None:
    assert config.features is not None
    if config.features.weights not in ("", key):
        raise ConfigError(
            f"features.path: {place} is not the projection of {config.name}: its hash is "
            f"{key[:12]}..., not {config.features.weights[:12]}...; name that one"
        )


def _maps(
    network: Network,
    source: Source,
    config: RunConfig,
    device: torch.device,
    progress: Callable[[int, int], None] | None,
) -> Iterable[Float[Tensor, "b d side side"]]:
    """Features of a fixed choice of images, computed on all cores, each batch by one of them."""
    chosen = choose(len(source), min(FIT_IMAGES, len(source)), "features").tolist()
    batches = [chosen[first : first + _FIT_BATCH] for first in range(0, len(chosen), _FIT_BATCH)]

    @torch.no_grad()
    def compute(rows: Sequence[int]) -> Float[Tensor, "b d side side"]:
        torch.set_num_threads(1)  # sums of floats depend on how many threads share them
        images = np.stack([example.picture for example in source.many(rows)])
        x = to_float(images, config.data.pixels).permute(0, 3, 1, 2)
        return feature_map(network, x.to(device), config.model.levels[0].side).cpu()

    workers = os.cpu_count() or 1
    for done, maps in enumerate(look_ahead(compute, batches, workers=workers, depth=workers), 1):
        if progress is not None:
            progress(min(done * _FIT_BATCH, len(chosen)), len(chosen))
        yield maps
