"""A trained model for people: load it, say what you want, get pictures of every level."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from matryoshka_diffusion.codec.autoencoder import Codec, load_codec
from matryoshka_diffusion.codec.folder import moved_codec, refuse_codec, with_own_codec
from matryoshka_diffusion.conditioning import Conditioning, equally_long
from matryoshka_diffusion.config import (
    ConfigError,
    RunConfig,
    SamplingConfig,
    UsageError,
    from_dict,
    load_config,
)
from matryoshka_diffusion.data.batch import to_float, to_uint8
from matryoshka_diffusion.denoiser import (
    Denoiser,
    Guided,
    NetworkDenoiser,
    Pooled,
    Thresholded,
    active_weights,
)
from matryoshka_diffusion.diffusion import Process, augment_coarse, per_level
from matryoshka_diffusion.models import hub
from matryoshka_diffusion.models.released import converted, read_released
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pyramid import Pyramid, Resolution, resolutions_of
from matryoshka_diffusion.samplers import GRIDS, SAMPLERS, SeededNoise, State
from matryoshka_diffusion.text.cache import pad
from matryoshka_diffusion.text.encoder import TextEncoder, load_encoder
from matryoshka_diffusion.train import checkpoint
from matryoshka_diffusion.train.adapters import fingerprint, merge
from matryoshka_diffusion.train.curriculum import active_model
from matryoshka_diffusion.train.precision import Precision, autocast

Progress = Callable[[int, int], None]
WEIGHTS = (checkpoint.MODEL, checkpoint.LORA)
UNBOUNDED = (-float("inf"), float("inf"))


BATCH = 64
"""Pictures in memory at a time; of clips, frames."""


def batch_of(frames: int | None) -> int:
    """How many pictures, or clips of so many frames, are in memory at a time if nobody says."""
    return max(1, BATCH // (frames or 1))


@dataclass(frozen=True)
class Samples:
    """Pictures, or clips, that belong together.

    Attributes:
        levels: bytes of every level, coarse to fine; the last is the full resolution. A level with
            frames holds clips. Where levels are codes, each is decoded.
        captions: what each picture was asked to show.
        seeds: each picture's own seed; alone or in any batch it gives the same picture.
        settings: all that is needed to make them again.
    """

    levels: tuple[UInt8[np.ndarray, "n ... c"], ...]
    captions: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]

    @property
    def pictures(self) -> UInt8[np.ndarray, "n h w c"]:
        """The finest level of pictures: what was drawn or, of clips, the picture they begin with.

        Raises:
            UsageError: all levels are clips.
        """
        return self._finest(4, "there are clips only: take `videos`")

    @property
    def videos(self) -> UInt8[np.ndarray, "n f h w c"]:
        """The clips of the finest level.

        Raises:
            UsageError: the model draws pictures.
        """
        return self._finest(5, "the model draws pictures, no clips: take `pictures`")

    def _finest(self, axes: int, otherwise: str) -> UInt8[np.ndarray, "n ... c"]:
        for level in reversed(self.levels):
            if level.ndim == axes:
                return level
        raise UsageError(otherwise)


class Matryoshka:
    """A network with its process, its text encoder, its codec and its sampling defaults.

    It samples in float32 unless told otherwise: in bf16, which is faster on hardware that has it,
    a picture depends a little on the batch it is made in.

    Example:
        >>> model = Matryoshka.load("openmoji")  # doctest: +SKIP
        >>> model.sample("red apple", n=4).pictures.shape  # doctest: +SKIP
        (4, 64, 64, 3)
    """

    def __init__(
        self,
        net: NestedUNet,
        config: RunConfig,
        *,
        encoder: TextEncoder | None = None,
        codec: Codec | None = None,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
    ) -> None:
        self.precision: Precision = precision
        self.device = torch.device(device)
        self.net = net.to(self.device).eval()
        self.config = config
        self.process = Process.from_config(config.process, net.config)
        self._encoder = encoder
        self._codec = codec
        self._alone: dict[str, Tensor] = {}

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        device: torch.device | str = "cpu",
        precision: Precision = "fp32",
        text_encoder: str | None = None,
        encoder: TextEncoder | None = None,
        progress: Progress | None = None,
    ) -> Matryoshka:
        """Load a run folder, a folder with a model, or a shipped model by name; paths win.

        A checkpoint of the paper's release is loaded, too; it is converted once into the cache,
        with `progress` called with (bytes done, bytes in all). `text_encoder` is a folder or hub
        id to take the encoder from instead of the config's, `encoder` one that is loaded already.

        Raises:
            FileNotFoundError: there is none of these; the message says what was looked for.
            ConfigError, ValueError: the folder does not hold what its config says.
        """
        weights, config = find_model(run, progress=progress)
        if text_encoder is not None:
            config = with_encoder(config, text_encoder)
        model = config.model.first(count_levels(weights))
        net = checkpoint.load_network(model, weights, where=str(run))
        return cls(net, config, encoder=encoder, device=device, precision=precision)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, **options: Any
    ) -> Matryoshka:
        """What `load` loads, or else a model of the Hugging Face hub by its id.

        `revision` is a branch, tag or commit on the hub; `options` are those of `load`.

        Raises:
            OSError: the hub does not give it.
        """
        name = str(source)
        if Path(source).exists() or name in shipped_models() or name.count("/") != 1:
            return cls.load(source, **options)
        return cls.load(hub.download(name, revision), **options)

    def push_to_hub(
        self,
        repository: str,
        *,
        dtype: torch.dtype = torch.float32,
        license: str | None = None,
        private: bool = False,
        token: str | None = None,
    ) -> str:
        """Upload the model with a card that says how to use it; returns its address.

        Paths of this computer are not shared. The token is that of `hf auth login` if none is
        given.
        """
        return hub.push(
            self.net.state_dict(),
            self.config,
            repository,
            dtype=dtype,
            license=license,
            private=private,
            token=token,
        )

    @property
    def resolutions(self) -> tuple[Resolution, ...]:
        """The grid of every level, coarse to fine."""
        return resolutions_of(self.net.config)

    @property
    def picture_side(self) -> int:
        """Side in pixels of the finest pictures."""
        return self.resolutions[-1].height * self.config.pixels_per_side

    @property
    def codec(self) -> Codec:
        """What levels are decoded by, loaded when it is first asked for. Raises `ConfigError`."""
        if self._codec is None:
            self._codec = load_codec(self.config, self.device)
        return self._codec

    def sample(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        classes: str | int | Sequence[str | int] | None = None,
        negative: str | None = None,
        coarse: UInt8[np.ndarray, "n s s c"] | None = None,
        n: int = 1,
        seed: int = 0,
        batch_size: int | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Samples:
        """Make `n` pictures for each prompt or class (or `n` in all if there is neither).

        Picture i of the result uses the seed `seed + i`. Guidance leads away from the prompt
        `negative` (by default: from a hidden prompt). `settings` replace the run's sampling
        defaults: `sampler`, `steps`, `guidance`, `grid`, ... (see `SamplingConfig`). So many as
        `batch_size` are drawn together, if not given 64 pictures or clips of 64 frames in all.
        `progress` is called with (steps done, steps in all). An upsampler needs the `coarse` bytes
        of each picture of the result (`baselines.cascade.Cascade` has them drawn by another model).

        Raises:
            UsageError: a prompt for a model without text, an unknown class, and so on.
            ValueError: a sample has NaN in it; names its seed.
        """
        sampling = self.sampling(settings)
        captions, cond = self.condition(prompts, classes, n)
        seeds = tuple(range(seed, seed + len(captions)))
        cond = self.beside_coarse(cond, coarse, seeds, sampling)
        parts: list[list[UInt8[Tensor, "b ... c"]]] = []
        together = batch_size or batch_of(self.resolutions[-1].frames)
        batches = self.batches(cond, len(seeds), together)
        for number, rows in enumerate(batches):
            chosen = [seeds[row] for row in rows.tolist()]
            state = None
            for state in self.stream(cond.rows(rows).trimmed(), chosen, sampling, negative):
                if progress is not None:
                    progress(number * sampling.steps + state.step, len(batches) * sampling.steps)
            assert state is not None, "a config has at least one step"
            refuse_nan(state.z, chosen)
            parts.append([self._bytes(level) for level in state.z])
        order = torch.cat(batches).argsort()
        levels = tuple(torch.cat(level)[order].numpy() for level in zip(*parts, strict=True))
        recorded = {
            "model": self.config.name,
            "captions": captions,
            "seeds": seeds,
            **({} if negative is None else {"negative": negative}),
            "precision": self.precision,
            **sampling.model_dump(mode="json"),
        }
        return Samples(levels, captions, seeds, recorded)

    def _bytes(self, level: Float[Tensor, "b ..."]) -> UInt8[Tensor, "b ... c"]:
        """What is kept of a batch: its pictures or clips, decoded."""
        decoded = self.codec.decode(level).cpu()
        return to_uint8(decoded, self.config.data.pixels).movedim(1, -1)

    def batches(
        self, cond: Conditioning, count: int, batch_size: int
    ) -> list[Int[Tensor, " rows"]]:
        """Numbers of the rows that are sampled together.

        A network that attends to padding gives a picture that depends on how much of it there is:
        there, only texts of equal length share a batch.
        """
        text = self.net.config.text
        if text is None or text.masked or cond.mask is None:
            return list(torch.arange(count).split(batch_size))
        lengths = cond.mask.sum(1).cpu()
        return [
            rows
            for length in lengths.unique()
            for rows in (lengths == length).nonzero()[:, 0].split(batch_size)
        ]

    def stream(
        self,
        cond: Conditioning,
        seeds: Sequence[int],
        sampling: SamplingConfig,
        negative: str | Sequence[str] | None = None,
    ) -> Iterator[State]:
        """The states of a sampler on its way from noise to pictures."""
        noise = self._noise(seeds, self.device)
        denoise = self.denoiser(cond.to(self.device), sampling, negative)
        times = self.times(sampling)
        options = {"eta": sampling.eta} if sampling.sampler == "ddim" else {}
        sampler = SAMPLERS[sampling.sampler]
        yield from sampler(
            denoise, noise.start(), self.process.schedules, times, noise=noise, **options
        )

    def times(self, sampling: SamplingConfig) -> Float[Tensor, " n"]:
        """The times that a sampler visits, from noise to pictures: one more than its steps."""
        return GRIDS[sampling.grid](sampling.steps, self.process.schedules[0])

    def _noise(self, seeds: Sequence[int], device: torch.device | str) -> SeededNoise:
        """The noise of these seeds; an upsampler's is another than that of the base it follows."""
        model = self.net.config
        family = "sample" if model.coarse is None else "upsample"
        return SeededNoise(seeds, self.resolutions, model.channels, device, family=family)

    def denoiser(
        self,
        cond: Conditioning,
        sampling: SamplingConfig,
        negative: str | Sequence[str] | None = None,
    ) -> Denoiser:
        """The network under these conditions, guided and thresholded as the settings say."""
        levels = len(self.net.levels)
        weights = per_level(sampling.guidance, levels)
        if all(weight == 1.0 for weight in weights):
            if negative is not None:
                raise UsageError("a negative prompt needs guidance: give a weight (--cfg)")
            denoise: Denoiser = NetworkDenoiser(self._predict, self.process, cond)
        else:
            if cond.labels is None and cond.tokens is None:
                raise UsageError(f"{self.config.name} is unconditional: nothing guides it (--cfg)")
            cond, without = equally_long(cond, self.unconditional(cond, negative))
            denoise = Guided(
                NetworkDenoiser(self._predict, self.process, cond),
                NetworkDenoiser(self._predict, self.process, without),
                self.process.schedules,
                weights,
                sampling.guidance_interval or UNBOUNDED,
                sampling.rescale,
            )
        bounded = Thresholded(denoise, per_level(sampling.threshold, levels))
        return Pooled(bounded, [weight == 0.0 for weight in self.process.level_weights])

    def _predict(self, z: Pyramid, t: Tensor, cond: Conditioning) -> Pyramid:
        with autocast(self.precision, self.device):
            return self.net(z, t, cond)

    def sampling(self, settings: dict[str, Any]) -> SamplingConfig:
        """The run's sampling defaults with some of them replaced."""
        data = self.config.model_dump(mode="json")
        for name, value in settings.items():
            one_value = name in ("guidance", "threshold") and not isinstance(value, list | tuple)
            data["sampling"][name] = [value] if one_value else value
        return from_dict(data, where="sampling settings").sampling

    def idle(self, settings: dict[str, Any]) -> set[str]:
        """Those of the settings that change no sample."""
        return settings.keys() & self.sampling(settings).idle

    def describe(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All that samples depend on besides seeds and conditions, as JSON.

        And, as `averaged`, whether the weights are averages over the training. The text encoder is
        loaded: its weights, which its key is a hash of, may be others at the same path.
        """
        config = self.config.model_dump(mode="json")
        return {
            "name": self.config.name,
            "weights": fingerprint(self.net.state_dict()),
            "averaged": self.config.train.gives_averages,
            "process": config["process"],
            "encoder": None if self.net.config.text is None else self.text_encoder().key,
            "codec": self.config.codec and self.config.codec.weights,
            "model": self.net.config.model_dump(mode="json"),
            "pixels": self.config.data.pixels,
            # How fast clips are shown changes no sample.
            "sampling": self.sampling(settings).model_dump(mode="json", exclude={"fps"}),
            "precision": self.precision,
            "device": self.device.type,
        }

    def evaluations(self, settings: dict[str, Any]) -> int:
        """How often the network is evaluated for one sample.

        Once a step, and twice where a level is guided: where its weight is not 1 and its log-SNR
        inside of the interval of guidance.
        """
        sampling = self.sampling(settings)
        weights = per_level(sampling.guidance, len(self.net.levels))
        interval = sampling.guidance_interval or UNBOUNDED
        schedules = self.process.schedules
        active = [
            active_weights(t[None], schedules, weights, interval) for t in self.times(sampling)[:-1]
        ]
        return sum(1 if all(weight == 1.0 for weight in step) else 2 for step in active)

    # --- conditions ---

    def condition(
        self,
        prompts: str | Sequence[str] | None,
        classes: str | int | Sequence[str | int] | None,
        n: int,
    ) -> tuple[tuple[str, ...], Conditioning]:
        """One caption and the conditions of each picture: `n` for every prompt or class."""
        model = self.net.config
        if prompts is not None and model.text is None:
            raise UsageError(f"{self.config.name} takes no prompts: {self._takes()}")
        if classes is not None and not model.classes:
            raise UsageError(f"{self.config.name} has no classes: {self._takes()}")
        if model.text is not None:
            if prompts is None:
                raise UsageError(f"{self.config.name} needs a prompt (-p on the command line)")
            wanted = [prompts] if isinstance(prompts, str) else list(prompts)
            if any("\ud800" <= letter <= "\udfff" for prompt in wanted for letter in prompt):
                raise UsageError("a prompt is not UTF-8")
            captions = tuple(prompt for prompt in wanted for _ in range(n))
            tokens, mask = self._features(captions)
            return captions, Conditioning(tokens=tokens, mask=mask, micro=self._micro(captions))
        if model.classes:
            labels = [label for label in self._labels(classes) for _ in range(n)]
            captions = tuple(self._class_name(label) for label in labels)
            return captions, Conditioning(labels=torch.tensor(labels), micro=self._micro(captions))
        captions = ("",) * n
        return captions, Conditioning(micro=self._micro(captions))

    def beside_coarse(
        self,
        cond: Conditioning,
        coarse: UInt8[np.ndarray, "n s s c"] | None,
        seeds: Sequence[int],
        sampling: SamplingConfig,
    ) -> Conditioning:
        """The conditions with the coarse picture of each row, under `sampling.coarse_noise`.

        Raises:
            UsageError: an upsampler without coarse pictures, or with some of another number or
                size; another model with any.
        """
        config = self.net.config
        if config.coarse is None and coarse is None:
            return cond
        if config.coarse is None:
            raise UsageError(f"{self.config.name} is no upsampler: it takes no coarse pictures")
        side, name = config.coarse.side, self.config.name
        if coarse is None:
            raise UsageError(
                f"{name} enlarges pictures of {side} pixels: give some (--coarse, coarse=), or the "
                "model that draws them (--base)"
            )
        wanted = (len(seeds), side, side, config.channels)
        if coarse.shape != wanted:
            raise UsageError(
                f"{name} takes coarse pictures of shape {wanted}, one for each sample (pictures, "
                f"height, width, channels); these are {coarse.shape}"
            )
        assert sampling.coarse_noise is not None, "a config of an upsampler has it"
        small = to_float(coarse, self.config.data.pixels).permute(0, 3, 1, 2)
        t = torch.full((len(seeds),), sampling.coarse_noise, dtype=torch.float64)
        noise = self._noise(seeds, "cpu")("coarse", 0, 0)
        image = augment_coarse(small, t, noise, self.process.schedules[0])
        return replace(cond, image=image, image_t=t.float())

    def unconditional(
        self, cond: Conditioning, negative: str | Sequence[str] | None = None
    ) -> Conditioning:
        """The conditions of guidance's other half: hidden, the empty caption, or `negative`.

        `negative` is one text for all rows or one for each.
        """
        text = self.net.config.text
        if negative is not None and text is None:
            raise UsageError(f"{self.config.name} takes no negative prompt: {self._takes()}")
        if negative is None and (text is None or text.learned_null):
            return cond.null()
        rows = 0 if cond.tokens is None else len(cond.tokens)
        texts = [negative or ""] * rows if isinstance(negative, str | None) else negative
        tokens, mask = pad([self._feature(text) for text in texts])
        return replace(cond, tokens=tokens, mask=mask, dropped=None).to(self.device)

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Text features of captions; the encoder is loaded at the first call."""
        return self.text_encoder()(captions)

    def text_encoder(self) -> TextEncoder:
        """The encoder of captions, loaded when it is first asked for."""
        if self._encoder is None:
            assert self.config.encoder is not None, "a model of text has an encoder"
            self._encoder = load_encoder(
                self.config.encoder, self.device, half=self.precision == "bf16"
            )
        return self._encoder

    def _feature(self, text: str) -> Float[Tensor, "n d"]:
        """Features of one text, kept: the empty caption is asked for in every batch."""
        if text not in self._alone:
            (self._alone[text],) = self.encode([text])
        return self._alone[text]

    def _features(self, texts: Sequence[str]) -> tuple[Float[Tensor, "b n d"], Bool[Tensor, "b n"]]:
        """Features of texts, each different one encoded once, padded to the longest."""
        different = list(dict.fromkeys(texts))
        features = dict(zip(different, self.encode(different), strict=True))
        return pad([features[text] for text in texts])

    def _micro(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Ask for pictures that were at least as large as the finest level before resizing."""
        side = float(self.picture_side)
        return {name: torch.full((len(captions),), side) for name in self.net.config.micro_names}

    def _labels(self, classes: str | int | Sequence[str | int] | None) -> list[int]:
        """Indices of classes given by name or number; all of them if none is given.

        A string is a name before it is a number, an `int` never: classes may be called "1" to "10".
        """
        if classes is None:
            return list(range(self.net.config.classes))
        wanted = [classes] if isinstance(classes, str | int) else list(classes)
        return [self._label(one) for one in wanted]

    def _label(self, one: str | int) -> int:
        names = self.config.data.classes
        folded = [name.casefold() for name in names]
        if isinstance(one, str) and one.casefold() in folded:
            return folded.index(one.casefold())
        if str(one).isdigit() and int(one) < self.net.config.classes:
            return int(one)
        known = ", ".join(names) if names else f"0 to {self.net.config.classes - 1}"
        raise UsageError(f"unknown class {one!r}; there are: {known}")

    def _class_name(self, label: int) -> str:
        names = self.config.data.classes
        return names[label] if names else str(label)

    def _takes(self) -> str:
        model = self.net.config
        if model.text is not None:
            return "it takes prompts (-p)"
        return "it takes classes (--class)" if model.classes else "it is unconditional"


def refuse_nan(pictures: Pyramid, seeds: Sequence[int]) -> None:
    """Raise `ValueError` naming the first picture with NaN in it, which bytes would not show."""
    for level, batch in enumerate(pictures):
        bad = batch.isnan().flatten(1).any(dim=1)
        if bad.any():
            seed = seeds[int(bad.nonzero()[0])]
            raise ValueError(
                f"the sample of seed {seed} has NaN in it at level {level}, and so have in all "
                f"{int(bad.sum())} of the {len(seeds)} drawn together: the weights are broken, or "
                "the arithmetic (--precision fp32)"
            )


# --- finding and reading models ----------------------------------------------------------------


def find_model(
    run: str | Path, *, progress: Progress | None = None
) -> tuple[dict[str, Tensor], RunConfig]:
    """Weights and config of a run or model folder, a released file or a shipped model.

    Adapters are merged into their model: the weights are whole ones, and the config says so.
    """
    path = _folder_of(Path(run))
    if path.is_file():
        return _read_model(converted(path, progress=progress))
    for folder in (path / "model", path):
        if any((folder / name).is_file() for name in WEIGHTS):
            weights, config = _read_model(folder)
            return weights, with_own_codec(moved_codec(config, path), folder)
    refuse_codec(path)
    if path.is_dir():
        newest = checkpoint.newest(path / "checkpoints")
        if newest is None:
            raise FileNotFoundError(
                f"{path}: neither a model nor a checkpoint here; mdm train PRESET --out {path} "
                "makes one"
            )
        snapshot = checkpoint.read(newest)
        config = from_dict(snapshot.state["config"], where=str(newest))
        config = moved_codec(config, path)
        return whole(snapshot.ema, config, where=str(newest))
    shipped = shipped_models()
    if str(run) in shipped:
        return _read_model(shipped[str(run)])
    raise FileNotFoundError(
        f"{run}: no such folder, and no shipped model of that name "
        f"({', '.join(shipped) or 'none are shipped'})"
    )


def read_config(run: str | Path) -> RunConfig:
    """The config of what `find_model` finds, also of a run that has no checkpoint yet."""
    path = _folder_of(Path(run))
    if path.is_file():
        return read_released(path).config
    written = path / "config.yaml"
    return load_config(written) if written.is_file() else find_model(run)[1]


def _folder_of(path: Path) -> Path:
    """The folder of a model that is named by its weights file; else the path itself."""
    ours = path.name in WEIGHTS and path.with_name("config.json").is_file()
    return path.parent if ours else path


def with_encoder(config: RunConfig, path: str) -> RunConfig:
    """The config with its text encoder taken from a folder or hub id.

    Raises:
        UsageError: the model has no text.
    """
    if config.encoder is None:
        raise UsageError(f"{config.name} has no text encoder that --text-encoder could replace")
    folder = Path(path).expanduser()
    # Absolute, so that it means the same from everywhere; else it is an id of the hub.
    where = str(folder.resolve()) if folder.is_dir() else path
    encoder = config.encoder.model_copy(update={"path": where})
    return config.model_copy(update={"encoder": encoder})


def shipped_models() -> dict[str, Path]:
    """Folders of the models inside the package, by name."""
    root = Path(str(resources.files("matryoshka_diffusion"))) / "models" / "shipped"
    folders = sorted(root.iterdir()) if root.is_dir() else []
    return {folder.name: folder for folder in folders if (folder / "model.safetensors").is_file()}


def _read_model(folder: Path) -> tuple[dict[str, Tensor], RunConfig]:
    path = folder / "config.json"
    try:
        config = from_dict(json.loads(path.read_text(encoding="utf-8")), where=str(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing beside the weights") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: no valid JSON ({error})") from error
    file = folder / checkpoint.weights_file(config)
    try:
        weights = load_file(file)
        _check_metadata(file, config)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: damaged or no safetensors file ({error})") from error
    return whole(weights, with_own_codec(config, folder), where=str(file))


def _check_metadata(file: Path, config: RunConfig) -> None:
    """Refuse a file of adapters that another config belongs to."""
    expected = _settings_of_adapters(checkpoint.lora_metadata(config))
    with safe_open(file, "pt") as opened:
        found = _settings_of_adapters(opened.metadata())
    for name, value in expected.items():
        if found.get(name) != value and name != "base_model":  # which may have moved
            raise ConfigError(f"{file}: {name} is {found.get(name)} in it, {value} in config.json")


def _settings_of_adapters(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What `checkpoint.lora_metadata` wrote; nothing where somebody else did."""
    settings = json.loads((metadata or {}).get("lora", "{}"))
    return settings if isinstance(settings, dict) else {}


def whole(
    weights: Mapping[str, Tensor], config: RunConfig, *, where: str
) -> tuple[dict[str, Tensor], RunConfig]:
    """Weights as they are, or if they are adapters, merged into the model they are for."""
    if config.train.lora is None or config.train.init is None:
        return dict(weights), config
    try:
        base, _ = find_model(config.train.init)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{where} holds adapters for a model that is not there: {error}; if it has moved, "
            "correct train.init in the config beside the adapters"
        ) from error
    model = active_model(config, config.train.images)
    merged = merge(model, config.train, base, weights, where=where)
    train = config.train.model_copy(update={"lora": None})
    return merged, config.model_copy(update={"train": train})


def count_levels(weights: Mapping[str, Tensor]) -> int:
    """How many levels weights are for. A run that is still growing has not reached them all.

    Raises:
        ValueError: they hold no level at all.
    """
    places = [key.split(".")[1] for key in weights if key.startswith("levels.")]
    numbers = [int(place) for place in places if place.isdigit()]
    if not numbers:
        raise ValueError("these weights hold no level of a nest")
    return 1 + max(numbers)
