"""A trained model for users: load it, name a prompt or class, get images of every level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from matryoshka_diffusion.changes import Kept, blended_seeds, edit_of
from matryoshka_diffusion.codec import Codec, load_autoencoder
from matryoshka_diffusion.config import RunConfig, SamplingConfig, UsageError
from matryoshka_diffusion.denoiser import active_weights
from matryoshka_diffusion.diffusion import per_level
from matryoshka_diffusion.edit import UNCHANGED, Edit
from matryoshka_diffusion.models.adapters import add_adapters
from matryoshka_diffusion.models.find import (
    caption_features,
    count_levels,
    find_model,
    with_encoder,
)
from matryoshka_diffusion.models.hub import download, push
from matryoshka_diffusion.nn.layers import without_autocast
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.progress import Progress, shown
from matryoshka_diffusion.pyramid import Pyramid, refuse_nan, to_uint8
from matryoshka_diffusion.samplers import Seed, State
from matryoshka_diffusion.samples import Samples
from matryoshka_diffusion.sampling import UNBOUNDED, DiffusionModel
from matryoshka_diffusion.text.encoder import TextEncoder, making_room
from matryoshka_diffusion.training.precision import PrecisionSetting, best_device, placed
from matryoshka_diffusion.training.weights import fingerprint, load_network

if TYPE_CHECKING:
    from matryoshka_diffusion.data.given import Given
else:
    Given = Any


class Matryoshka(DiffusionModel):
    """A trained network with its process, text encoder, codec and sampling defaults.

    A loaded model samples in bf16 where the hardware multiplies it; an image then depends slightly
    on its batch. In float32 (`precision="fp32"`) it is the same within one grey value.

    Examples:
        >>> model = Matryoshka.load("openmoji")  # doctest: +SKIP
        >>> model.sample("red apple", n=4).pictures.shape  # doctest: +SKIP
        (4, 256, 256, 3)
    """

    net: NestedUNet  # pyright: ignore[reportIncompatibleVariableOverride]
    adapters: tuple[str, ...] = ()  # what is merged into the network, each with its share

    def __init__(
        self,
        net: NestedUNet,
        config: RunConfig,
        *,
        codec: Codec | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> None:
        """Take a network of any device, and move it; `options` are those of `DiffusionModel`."""
        device = torch.device(device)
        # On a CPU a single image would take longer in channels last.
        layout = "channels_last" if device.type == "cuda" else "nchw"
        net = placed(net, device, layout).eval()
        options = {"device": device, "open_guide": open_guide, **options}
        super().__init__(net, net.config, config, **options)
        self._frozen["codec"] = codec

    def __repr__(self) -> str:
        sides = ", ".join(level.size for level in self.model.levels[self.model.hidden :])
        return f"Matryoshka({self.config.name!r}: {sides} on {self.device} in {self.precision})"

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        device: torch.device | str = "auto",
        precision: PrecisionSetting = "auto",
        text_encoder: str | None = None,
        encoder: TextEncoder | None = None,
        adapters: Mapping[str, float] | None = None,
        progress: Progress | bool | None = None,
    ) -> Matryoshka:
        """Load a run folder, a model folder, a released checkpoint, a shipped model, or a hub id.

        A path takes precedence over the name of a shipped model, and over one on the hub.

        Args:
            device: where the network computes; `auto` is a GPU if torch can use one.
            precision: arithmetic of the network, see `DiffusionModel`.
            text_encoder: folder or hub id of a text encoder that replaces the one in the config.
            encoder: a text encoder that is loaded already.
            adapters: adapters (LoRA) to merge into the weights, by their run or folder, and the
                share of each: 1 as trained, 0 none. Their form is ours or peft's.
            progress: called with (bytes done, bytes in all) while a released checkpoint is
                converted into the cache, once. `True` shows a bar.

        Raises:
            FileNotFoundError: there is no such model; lists the places that were searched.
            OSError: the hub does not have the model, or cannot be reached.
            ConfigError, ValueError: the weights do not fit the config.
        """
        device = best_device() if device == "auto" else device
        weights, config = find_model(run, progress=shown(progress, "bytes"))
        features = {} if text_encoder or encoder else caption_features(run)
        if text_encoder is not None:
            config = with_encoder(config, text_encoder)
        if adapters:
            weights = add_adapters(weights, adapters, where=str(run))
        model = config.model.first(count_levels(weights))
        net = load_network(model, weights, where=str(run))
        placing: dict[str, Any] = {"device": device, "precision": precision}
        loaded = cls(net, config, encoder=encoder, features=features, **placing)
        shares = (adapters or {}).items()
        loaded.adapters = tuple(f"{Path(path).name}={share:g}" for path, share in shares)
        return loaded

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, revision: str | None = None, **options: Any
    ) -> Matryoshka:
        """Load what `load` loads, with its `options`; `revision` is a branch or commit on the hub.

        Raises OSError if the hub does not have the model, or cannot be reached, and UsageError for
        a revision of what is not on the hub.
        """
        if revision is not None:
            source = download(str(source), revision)
        return cls.load(source, **options)

    def push_to_hub(self, repository: str, **options: Any) -> str:
        """Upload the model with a card that says how to use it; return its address.

        Paths of this computer are left out. `options` are those of `models.hub.push`: dtype,
        license, private, and a token instead of that of `hf auth login`.
        """
        return push(self.net.state_dict(), self.config, repository, **options)

    @property
    def codec(self) -> Codec | None:
        """The codec that decodes levels, if any; loaded at the first use. Raises `ConfigError`."""
        if self._frozen["codec"] is None and self.config.codec is not None:
            self._frozen["codec"] = load_autoencoder(self.config, self.device)
        return self._frozen["codec"]

    def sample(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        classes: str | int | Sequence[str | int] | None = None,
        negative: str | None = None,
        coarse: UInt8[np.ndarray, "n s s c"] | None = None,
        n: int = 1,
        seed: int | Sequence[Seed] = 0,
        batch_size: int | None = None,
        progress: Progress | bool | None = None,
        edit: Edit = UNCHANGED,
        watch: Callable[[State], object] | None = None,
        **settings: Any,
    ) -> Samples:
        """Draw `n` images for each prompt or class (`n` in all if there is neither).

        Image i of the result has the seed `seed + i`, or `seed[i]` if each has its own. `n` seeds
        are those of each prompt. Images are squares; `sized` gives the model for other shapes.

        Args:
            negative: a prompt to guide away from; by default the null or the empty prompt.
            coarse: for an upsampler, one coarse image for each image of the result
                (`cascade.Cascade` lets another model draw them).
            batch_size: images or clips at a time; by default at most 64, and 4 million pixels.
            progress: called with (steps done, steps in all). `True` shows a bar.
            edit: pixels that the images keep, or images to begin with (`edit` makes it of files).
            watch: called with the state of a batch after every step; what it raises ends the call.
            settings: sampling defaults to replace: `steps`, `guidance`, ... (`SamplingConfig`).

        Returns:
            Samples of the first prompt, then of the next, with `pictures`, `levels` and `save`.

        Raises:
            UsageError: a prompt for a model without text, an unknown class or setting, and so on.
            ValueError: a sample holds NaN; names its seed.
        """
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}: give a whole number from 1 on, or None")
        sampling = self.sampling(settings)
        captions, cond = self.condition(prompts, classes, n)
        count = len(captions)
        seeds = tuple(range(seed, seed + count) if isinstance(seed, int) else seed)
        seeds = seeds * (count // n) if len(seeds) == n else seeds
        if len(seeds) != count:
            raise UsageError(f"seed has {len(seeds)} numbers for {count} samples: give one each")
        edit.check(count)
        cond = self.with_coarse(cond, coarse, seeds, sampling)
        batches = self.batches(cond, len(seeds), batch_size or self.batch_size)
        report = shown(progress, "steps")
        parts: list[list[UInt8[Tensor, "b ... c"]]] = []
        # Autocast keeps the weights that it has cast until the end of the outermost context.
        with without_autocast(self.device):
            for number, rows in enumerate(batches):
                own_seeds = [seeds[row] for row in rows.tolist()]
                state = None
                part = edit.rows(rows)
                own = part.conditions(cond.rows(rows)).trimmed()
                for state in self.stream(own, own_seeds, sampling, negative, part):
                    if report is not None:
                        done = number * sampling.steps + state.step
                        report(done, len(batches) * sampling.steps)
                    if watch is not None:
                        watch(state)
                assert state is not None, "a config has at least one step"
                parts.append(self.pixels(state.z, own_seeds))
        order = torch.cat(batches).argsort()
        levels = tuple(torch.cat(level)[order].numpy() for level in zip(*parts, strict=True))
        record = {
            "model": self.config.name,
            **({"adapters": self.adapters} if self.adapters else {}),
            "captions": captions,
            "seeds": seeds,
            **({} if negative is None else {"negative": negative}),
            **({} if (whose := self.config.attribution) is None else {"attribution": whose}),
            "precision": self.precision,
            **self._drawn_with(sampling),
        }
        return Samples(levels, captions, seeds, record)

    def edit(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        keep: Kept | None = None,
        image: Given | None = None,
        mask: Given | None = None,
        strength: float | None = None,
        until: float = 0.0,
        levels: Collection[int | str] | None = None,
        between: tuple[int, int] | None = None,
        regions: Sequence[tuple[Given | float, str]] = (),
        correct: int = 0,
        resample: int = 1,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        **options: Any,
    ) -> Samples:
        """Sample as `sample` does, but keep a level or pixels of an image, or begin with one.

        Pictures are files or arrays of any size; their middle square is taken, as in training. A
        clip is a file, a folder of frames or an array of them.

        Args:
            keep: pictures that levels keep, by the level's side, or clips, by names such as
                "16x64": one for all samples, or a list with one for each.
            image: the picture or clip to change; it needs `mask`, `strength` or both.
            mask: white where `image` is drawn anew, black where it is kept; without an image, where
                kept levels are free. It is as large as the picture, or as a level.
            strength: how much noise `image` begins under: 0 returns it, 1 hides it.
            until: time, 1 to 0, at which kept levels and pixels are let go.
            levels: variations: only these levels have noise of each sample's own. All samples
                share that of the first seed on the others, and the first is the seed's plain one.
            between: two seeds; the `n` samples of each prompt go from one to the other, on
                `levels` or on all of them.
            regions: masks, each with a prompt (or class) that holds where the mask is white and not
                elsewhere. A number for a mask mixes the prompt in with this weight everywhere.
            correct: calls of the network, for each step, by which the other levels learn sooner
                of what is kept (`edit.Held`).
            resample: how often each stretch of steps is taken (`samplers.resampling`).
            options: those of `sample`.

        Raises:
            UsageError: a level, picture, mask or number does not fit; and as `sample`.
            OSError: a file cannot be read.
        """
        edit = edit_of(
            self,
            self.codec,
            keep=keep or {},
            image=image,
            mask=mask,
            strength=strength,
            until=until,
            regions=regions,
            correct=correct,
            resample=resample,
        )
        seeds = blended_seeds(self, n, seed, levels=levels, between=between)
        samples = self.sample(prompts, n=n, seed=seeds, edit=edit, **options)
        record = {"keep": list(keep or ()), "strength": strength, "until": until}
        record |= {"image": image is not None, "mask": mask is not None}
        record |= {"regions": [text for _, text in regions]}
        record |= {"correct": correct, "resample": resample}
        return replace(samples, settings={**samples.settings, "edit": record})

    def pixels(self, z: Pyramid, seeds: Sequence[Seed]) -> list[UInt8[Tensor, "b ... c"]]:
        """Bytes of every level, so that no floats of earlier batches are kept.

        Raises `ValueError` naming a seed whose sample has NaN; a search on a GPU would be a wait.
        """
        decode = self.codec.decode if self.codec is not None else lambda level: level
        pixels, encoder = z[self.model.hidden :], self._frozen["encoder"]
        images = tuple(making_room(encoder, partial(decode, level)).cpu() for level in pixels)
        refuse_nan(images, seeds)
        return [to_uint8(level, self.config.data.pixels).movedim(1, -1) for level in images]

    def describe(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All that samples depend on besides seeds and conditions, as JSON.

        Settings without effect have their defaults, so that they name the same samples. `averaged`
        tells averages over the training from other weights. A text encoder and a guide are loaded
        for the hash of their weights, which may change at the same path.
        """
        sampling = self.sampling(settings)
        plain = {name: SamplingConfig.model_fields[name].default for name in sampling.idle}
        sampling = sampling.model_copy(update=plain)
        drawn_with, stored = self._drawn_with(sampling), bool(self._features)
        del drawn_with["fps"]  # how fast clips are shown changes no sample
        return {
            "name": self.config.name,
            "weights": fingerprint(self.net.state_dict()),
            "averaged": self.config.train.gives_averages,
            "process": self.config.process.model_dump(mode="json"),
            "encoder": self.model.text and f"{self.text_encoder().key}{', stored' * stored}",
            "codec": self.config.codec and self.config.codec.weights,
            "model": self.model.model_dump(mode="json"),
            "pixels": self.config.data.pixels,
            "sampling": drawn_with,
            "precision": self.precision,
            "device": self.device.type,
        }

    @cached_property
    def weights_hash(self) -> str:
        """A hash that identifies the network wherever it is stored, as it was at the first call."""
        return fingerprint(self.net.state_dict())

    def _drawn_with(self, sampling: SamplingConfig) -> dict[str, Any]:
        """The settings as JSON. A guide in use is named with its weights' hash, not by its path."""
        record = sampling.model_dump(mode="json", exclude={"guide"})
        if self.picture != self._square:
            record |= {"height": self.picture.height, "width": self.picture.width}
        if sampling.guide is not None and "guide" not in sampling.idle:
            guide = self.guide(sampling.guide)
            assert isinstance(guide, Matryoshka), "open_guide loads one"
            record["guide"] = f"{guide.config.name} {guide.weights_hash[:16]}"
        return record

    def evaluations(self, settings: dict[str, Any]) -> int:
        """The number of network evaluations for one sample."""
        return passes(self, self.sampling(settings)).total()


def open_guide(path: str, good: DiffusionModel) -> Matryoshka:
    """Load the weaker model that guides a better one of the same images and conditions.

    It may have fewer levels, as an early average of a run that grows.

    Raises:
        UsageError: there is no such model, or it is one of other images or conditions.
    """
    try:
        guide = Matryoshka.load(path, device=good.device, precision=good.precision)
    except FileNotFoundError as error:
        raise UsageError(
            f"sampling.guide: {error}; name a model (--guide RUN) or omit it"
        ) from error

    def common(model: DiffusionModel) -> dict[str, Any]:
        config, nest = model.config, model.model
        return {
            "model.channels": nest.channels,
            "model.schedule": nest.schedule,
            "model.classes": nest.classes,
            "model.coarse": nest.coarse,
            "data.classes": config.data.classes,
            "data.pixels": config.data.pixels,
            # The same encoder may lie at two places; of t5 there are several, of other widths.
            "encoder": config.encoder and config.encoder.model_copy(update={"path": None}),
            "model.text.features": nest.text and nest.text.features,
            "codec.weights": config.codec and config.codec.weights,
            "features.weights": config.features and config.features.weights,
        } | {
            f"model.levels[{place}].{name}": getattr(level, name)
            for place, level in enumerate(nest.levels)
            for name in ("side", "frames", "shift_ratio", "shift_power", "micro")
        }

    own = common(good)
    for name, value in common(guide).items():
        if own.get(name, value) != value:
            raise UsageError(
                f"sampling.guide: {name} of {path} is {value!r}, that of {good.config.name} is "
                f"{own[name]!r}: name a weaker model of the same images and conditions, such as an "
                "early average of the same run (mdm ema RUN --until IMAGES)"
            )
    return guide


def passes(model: DiffusionModel, sampling: SamplingConfig) -> Counter[int]:
    """Network evaluations for one sample, counted by the number of levels that are awake.

    A step takes one, or two where a level is guided: it is awake, its weight is not 1, and its
    log-SNR is inside the guidance interval. A guide counts as if it were as large as the model.
    """
    weights = per_level(sampling.guidance, len(model.model.levels))
    interval, counts = sampling.guidance_interval or UNBOUNDED, Counter[int]()
    for now in model.calls(sampling):
        guided = any(weight != 1.0 for weight in active_weights(now, weights, interval))
        counts[len(now.levels)] += 2 if guided else 1
    return counts
