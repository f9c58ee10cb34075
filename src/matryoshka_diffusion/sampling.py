"""From prompts or classes to the states of a sampler: conditions, guidance, and batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from matryoshka_diffusion.conditioning import Conditioning, entries_of, equally_long, labels_of, pad
from matryoshka_diffusion.config import ModelConfig, RunConfig, SamplingConfig, UsageError
from matryoshka_diffusion.configfile import from_dict
from matryoshka_diffusion.data.emoji_names import named
from matryoshka_diffusion.denoiser import (
    ConditionPair,
    Denoiser,
    Guided,
    NetworkDenoiser,
    Pair,
    Pooled,
    Thresholded,
    TwoModelPair,
)
from matryoshka_diffusion.diffusion import Network, Process, augment_coarse, per_level
from matryoshka_diffusion.files import MissingExtra
from matryoshka_diffusion.hints import did_you_mean
from matryoshka_diffusion.nn.layers import without_autocast
from matryoshka_diffusion.pyramid import Pyramid, Resolution, resolutions_of, shapes_of, to_float
from matryoshka_diffusion.samplers import GRIDS, SAMPLERS, Sampler, Seed, SeededNoise, State, waking
from matryoshka_diffusion.schedule import Instant, instants
from matryoshka_diffusion.sizes import batch_of, on_grid, refuse_more_than_fit
from matryoshka_diffusion.text.encoder import TextEncoder, load_encoder, making_room
from matryoshka_diffusion.training.precision import (
    Precision,
    PrecisionSetting,
    autocast,
    resolve_precision,
)

Sized = TypeVar("Sized", bound="DiffusionModel")

UNBOUNDED = (-float("inf"), float("inf"))
_CLASS = (str, Integral)


class DiffusionModel:
    """A network with its process and its text encoder, ready to sample.

    Args:
        model: the config of `net`; a run that still grows has fewer levels than `config.model`.
        config: the config of the run, with the sampling defaults.
        encoder: the text encoder; without one, `config.encoder` is loaded when it is needed.
        features: features of captions by that encoder, which is not asked for these.
        precision: arithmetic of the network; `auto` is bf16 where the hardware multiplies it. Under
            bf16 an image depends slightly on its batch.
        open_guide: opens the weaker model at a path (`SamplingConfig.guide`) that guides this one.
    """

    def __init__(
        self,
        net: Network,
        model: ModelConfig,
        config: RunConfig,
        *,
        encoder: TextEncoder | None = None,
        features: Mapping[str, Float[Tensor, "_ d"]] | None = None,
        device: torch.device | str = "cpu",
        precision: PrecisionSetting = "fp32",
        open_guide: Callable[[str, DiffusionModel], DiffusionModel] | None = None,
    ) -> None:
        self.net, self.model, self.config = net, model, config
        self.device = torch.device(device)
        self.precision: Precision = resolve_precision(precision, self.device)
        self.process = Process.from_config(config.process, model)
        self.picture_side = side = model.levels[-1].side * config.pixels_per_side
        self._square = self.picture = Resolution(side, side, model.levels[-1].frames)
        self._frozen: dict[str, Any] = {"encoder": encoder}  # loaded once, for all sizes
        self._features = features or {}
        self._features_alone: dict[str, Tensor] = {}
        self._open_guide = open_guide
        self._guides: dict[str, DiffusionModel] = {}

    @property
    def resolutions(self) -> tuple[Resolution, ...]:
        """The grid of every level of pixels, coarse to fine. UsageError: there is none yet."""
        self._refuse_features_alone()
        return self._resolutions[self.model.hidden :]

    def _refuse_features_alone(self) -> None:
        if len(self.model.levels) == self.model.hidden:
            raise UsageError(f"{self.config.name} has only a level of features yet: train it on")

    @property
    def _resolutions(self) -> tuple[Resolution, ...]:
        return resolutions_of(self.model, self.picture, self.picture_side)

    @property
    def batch_size(self) -> int:
        """Samples in a batch unless one is set. UsageError: there is no level of pixels yet."""
        self._refuse_features_alone()
        return batch_of(self.picture)

    def sized(self: Sized, height: int | None = None, width: int | None = None) -> Sized:
        """The same model for images of this size in pixels; None is that of its squares.

        Each level has the shape of the finest one. Weights, encoder and codec are shared.

        Raises UsageError: it is not on the grid, or the model draws clips, features, upsampled.
        """
        other = copy.copy(self)
        other.picture = on_grid(self.config, self._square, height, width)
        return other

    def text_encoder(self) -> TextEncoder:
        """The text encoder, loaded at the first call."""
        if self._frozen["encoder"] is None:
            assert self.config.encoder is not None, "a model of text has an encoder"
            half = self.precision == "bf16"
            self._frozen["encoder"] = load_encoder(self.config.encoder, self.device, half=half)
        return self._frozen["encoder"]

    def _encode(self, captions: Sequence[str]) -> list[Float[Tensor, "_ d"]]:
        """Features of each caption: the stored ones, and the encoder's of all others."""
        others = [caption for caption in captions if caption not in self._features]
        try:
            encoded = dict(zip(others, self.text_encoder()(others) if others else [], strict=True))
        except MissingExtra as error:
            near = did_you_mean(others[0][:200], self._features)
            raise MissingExtra(f"{others[0][:200]!r}{near}: {error}") from error
        return [encoded[one] if one in encoded else self._features[one] for one in captions]

    def sampling(self, settings: Mapping[str, Any]) -> SamplingConfig:
        """The sampling defaults of the run with some of them replaced.

        Raises:
            ConfigError: a setting is unknown, or its value does not fit the model.
        """
        data = {**dict(self.config), "sampling": {**dict(self.config.sampling), **settings}}
        return from_dict(data, where="sampling settings").sampling

    def idle(self, settings: Mapping[str, Any]) -> set[str]:
        """The names of settings that change no sample, such as `eta` without `ddim`."""
        alone = {"wake"} if len(self.model.levels) == 1 + self.model.hidden else set()
        return settings.keys() & (self.sampling(settings).idle | alone)

    def times(self, sampling: SamplingConfig) -> Float[Tensor, " n"]:
        """Times that the sampler visits, from noise (1) to images (0): `steps` + 1 of them."""
        return GRIDS[sampling.grid](sampling.steps, self.process.schedules[self.model.hidden])

    def calls(self, sampling: SamplingConfig) -> list[Instant]:
        """The instants of the sampler's steps, each with the levels that are awake then.

        A single step is the estimate of x at its time, also where finer levels are asleep.

        Raises:
            UsageError: the finest level is asleep in all of several steps.
        """
        floors = self.model.floors(sampling.wake)
        steps = instants(self.times(sampling)[:-1], self.process.schedules)
        calls = [now.awake(floors) for now in steps]
        if len(calls[-1].levels) < len(floors) and len(calls) > 1:
            raise UsageError(
                f"sampling.wake leaves level {len(calls[-1].levels)} asleep in all {len(calls)} "
                "steps: lower its floor (--wake) or take more steps (--steps)"
            )
        return calls

    def stream(
        self,
        cond: Conditioning,
        seeds: Sequence[Seed],
        sampling: SamplingConfig,
        negative: str | Sequence[str] | None = None,
        edit: Callable[[Sampler], Sampler] = lambda sampler: sampler,
    ) -> Iterator[State]:
        """Sample one image for each seed and row of `cond`; yield the state after every step."""
        noise = self.noise(seeds, self.device)
        denoise = self.denoiser(cond.to(self.device), sampling, negative)
        options = {"eta": sampling.eta} if sampling.sampler == "ddim" else {}
        sampler = edit(SAMPLERS[sampling.sampler])
        if sampling.wake:
            self.calls(sampling)  # refuses floors that are never reached
            sampler = waking(sampler, self.model.floors(sampling.wake))
        start, times = noise.start(), self.times(sampling)
        yield from sampler(denoise, start, self.process.schedules, times, noise=noise, **options)

    def noise(self, seeds: Sequence[Seed], device: torch.device | str) -> SeededNoise:
        """Noise for each seed. An upsampler has its own stream, so it never repeats its base's."""
        family = "sample" if self.model.coarse is None else "upsample"
        shapes = shapes_of(self.model, self._resolutions)
        return SeededNoise(seeds, shapes, device, family=family)

    def guide(self, path: str) -> DiffusionModel:
        """The weaker model at a path, opened at the first call.

        Raises:
            UsageError: there is none, or it cannot guide this model.
        """
        if path not in self._guides:
            if self._open_guide is None:
                raise UsageError(f"sampling.guide: {self.config.name} opens no files: omit {path}")
            self._guides[path] = self._open_guide(path, self)
        return self._guides[path]

    def denoiser(
        self,
        cond: Conditioning,
        sampling: SamplingConfig,
        negative: str | Sequence[str] | None = None,
    ) -> Denoiser:
        """The estimate of x under `cond`, guided and thresholded as `sampling` says."""
        levels = len(self.model.levels)
        weights = per_level(sampling.guidance, levels)
        denoise: Denoiser = self._estimates(cond)
        if any(weight != 1.0 for weight in weights):
            pair, interval = self._pair(cond, negative, sampling), sampling.guidance_interval
            denoise = Guided(pair, weights, interval or UNBOUNDED, sampling.rescale)
        elif negative is not None:
            raise UsageError("a negative prompt needs guidance: add a weight (--cfg)")
        bounded = Thresholded(denoise, per_level(sampling.threshold, levels), self.model.hidden)
        return self._pooled(bounded)

    def _pair(
        self, cond: Conditioning, negative: str | Sequence[str] | None, sampling: SamplingConfig
    ) -> Pair:
        """The estimates that guidance leads to and away from."""
        if sampling.guide is None:
            if cond.labels is None and cond.tokens is None:
                raise UsageError(
                    f"{self.config.name} is unconditional: omit --cfg or add a weak model (--guide)"
                )
            cond, without = equally_long(cond, self.unconditional(cond, negative))
            return ConditionPair(self._estimates(cond), self._estimates(cond.followed_by(without)))
        weaker = self.guide(sampling.guide)
        known = len(weaker.model.levels)
        if all(weight == 1.0 for weight in per_level(sampling.guidance, known)):
            raise UsageError(
                f"sampling.guide: {sampling.guide} knows {known} of the levels, and guidance is 1 "
                "there: give one of these another weight (--cfg) or omit the guide (--guide)"
            )
        same = cond if negative is None else self.unconditional(cond, negative)
        weak = weaker._pooled(weaker._estimates(same))
        return TwoModelPair(self._estimates(cond), weak, known)

    def _estimates(self, cond: Conditioning) -> Denoiser:
        return NetworkDenoiser(self._predict, self.process, cond)

    def _pooled(self, denoise: Denoiser) -> Denoiser:
        return Pooled(denoise, [weight == 0.0 for weight in self.process.level_weights])

    def _predict(self, z: Pyramid, t: Tensor, cond: Conditioning) -> Pyramid:
        with autocast(self.precision, self.device):
            return making_room(self._frozen["encoder"], lambda: self.net(z, t, cond))

    def batches(
        self, cond: Conditioning, count: int, batch_size: int
    ) -> list[Int[Tensor, " rows"]]:
        """Split `count` samples into batches; return the row indices of each batch.

        A network that attends to padding would draw another image after longer padding. Its
        batches hold texts of one length only.
        """
        text = self.model.text
        if text is None or text.masked or cond.mask is None:
            return list(torch.arange(count).split(batch_size))
        lengths = cond.mask.sum(1).cpu()
        return [
            rows
            for length in lengths.unique()
            for rows in (lengths == length).nonzero()[:, 0].split(batch_size)
        ]

    def lockstep(
        self,
        cond: Conditioning,
        seeds: Sequence[Seed],
        sampling: SamplingConfig,
        negative: str | list[str] | None = None,
        edit: Callable[[Tensor], Callable[[Sampler], Sampler]] | None = None,
    ) -> Iterator[State]:
        """Sample all batches in step, for a callback that sees all images at every step.

        Sampling continues from what is written into `z` of a state. `edit` gives the edit of rows.
        """
        several = negative if isinstance(negative, list) else None
        batches = self.batches(cond, len(seeds), self.batch_size)
        order = torch.cat(batches).argsort().to(self.device)
        placed = [rows.to(self.device) for rows in batches]

        def stream(rows: Tensor) -> Iterator[State]:
            places = rows.tolist()
            own = [several[row] for row in places] if several is not None else negative
            own_seeds = [seeds[row] for row in places]
            edited = {} if edit is None else {"edit": edit(rows)}
            return self.stream(cond.rows(rows).trimmed(), own_seeds, sampling, own, **edited)

        def together(parts: Sequence[Pyramid]) -> Pyramid:
            return tuple(torch.cat(level)[order] for level in zip(*parts, strict=True))

        with without_autocast(self.device):  # outermost, so weights that autocast has cast are kept
            for states in zip(*map(stream, batches), strict=True):
                z = together([state.z for state in states])
                yield State(states[0].step, states[0].t, z, together([state.x for state in states]))
                for rows, state in zip(placed, states, strict=True):
                    for own, whole in zip(state.z, z, strict=True):
                        own.copy_(whole[rows])

    # --- conditions ---

    def condition(
        self,
        prompts: str | Sequence[str] | None,
        classes: str | int | Sequence[str | int] | None,
        n: int,
    ) -> tuple[tuple[str, ...], Conditioning]:
        """Captions and conditions of `n` samples for every prompt or class.

        Raises:
            UsageError: a prompt for a model without text, an unknown class, no prompt at all, or
                more samples than the memory of this machine can hold.
        """
        if not isinstance(n, Integral) or n < 1:
            raise UsageError(f"n is {n!r}: give a whole number from 1 on (-n)")
        prompts = entries_of("prompts", prompts, str)
        classes = entries_of("classes", classes, _CLASS)
        number = n * len(prompts or classes or range(self.model.classes or 1))
        refuse_more_than_fit(self.config, self._resolutions, number)
        if prompts is not None and self.model.text is None:
            raise self._takes("no prompts")
        if classes is not None and not self.model.classes:
            raise self._takes("no classes")
        conditions, captions = dict[str, Any](), ("",) * n
        if self.model.text is not None:
            if prompts is None:
                raise UsageError(f"{self.config.name} needs a prompt: add one (-p)")
            if any("\ud800" <= letter <= "\udfff" for prompt in prompts for letter in prompt):
                raise UsageError("a prompt is not UTF-8")
            captions = tuple(name for p in prompts for name in (named(p, self.config.data),) * n)
            different = list(dict.fromkeys(captions))
            features = dict(zip(different, self._encode(different), strict=True))
            tokens, mask = pad([features[caption] for caption in captions])
            conditions = {"tokens": tokens, "mask": mask}
        elif self.model.classes:
            names = self.config.data.classes
            numbers = labels_of(classes, names, self.model.classes)
            labels = torch.tensor(numbers).repeat_interleave(n)
            captions = tuple(names[label] if names else str(label) for label in labels.tolist())
            conditions = {"labels": labels}
        # Ask for images that were at least as large as the finest level before resizing.
        micro = {
            name: torch.full((len(captions),), float(self.picture_side if usual is None else usual))
            for name, usual in self.model.usual_micro.items()
        }
        return captions, Conditioning(**conditions, micro=micro)

    def with_coarse(
        self,
        cond: Conditioning,
        coarse: UInt8[np.ndarray, "n s s c"] | None,
        seeds: Sequence[Seed],
        sampling: SamplingConfig,
    ) -> Conditioning:
        """Add the coarse image of each row to `cond`, under noise of time `coarse_noise`.

        Raises:
            UsageError: an upsampler without coarse images or with images of another number or
                size, or coarse images for a model that is no upsampler.
        """
        config, name = self.model.coarse, self.config.name
        if config is None and coarse is None:
            return cond
        if config is None:
            raise UsageError(f"{name} is no upsampler: omit the coarse images")
        shape = (len(seeds), config.side, config.side, self.model.channels)
        if coarse is None or coarse.shape != shape:
            there = "there are none" if coarse is None else f"these are {coarse.shape}"
            raise UsageError(
                f"{name} enlarges images of shape {shape}, one for each sample (images, height, "
                f"width, channels), but {there}: add them (--coarse, coarse=), or the model that "
                "draws them (--base)"
            )
        assert sampling.coarse_noise is not None, "a config of an upsampler has it"
        small = to_float(coarse, self.config.data.pixels).permute(0, 3, 1, 2)
        t = torch.full((len(seeds),), sampling.coarse_noise, dtype=torch.float64)
        noise = self.noise(seeds, "cpu")("coarse", 0)[0]
        image = augment_coarse(small, t, noise, self.process.schedules[0])
        return replace(cond, image=image, image_t=t.float())

    def unconditional(
        self, cond: Conditioning, negative: str | Sequence[str] | None = None
    ) -> Conditioning:
        """Conditions that guidance leads away from: hidden, the empty caption, or `negative`.

        `negative` is one text for all rows, or one for each row.
        """
        text = self.model.text
        if negative is not None and text is None:
            raise self._takes("no negative prompt")
        if negative is None and (text is None or text.learned_null):
            return cond.null()
        rows = 0 if cond.tokens is None else len(cond.tokens)
        texts = [negative or ""] * rows if isinstance(negative, str | None) else negative
        # Features are kept, because every batch needs those of the empty caption.
        for one in set(texts) - self._features_alone.keys():
            (self._features_alone[one],) = self._encode([one])
        tokens, mask = pad([self._features_alone[one] for one in texts])
        return replace(cond, tokens=tokens, mask=mask, dropped=None).to(self.device)

    def _takes(self, refused: str) -> UsageError:
        takes = "takes prompts (-p)" if self.model.text is not None else "is unconditional"
        takes = "takes classes (--class)" if self.model.classes else takes
        return UsageError(f"{self.config.name} takes {refused}: it {takes}")
