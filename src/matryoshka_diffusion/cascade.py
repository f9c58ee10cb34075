"""Cascaded diffusion (Ho et al., 2022; Section 4.1 of the paper): one model draws, one enlarges.

The paper's baseline for "one network for all resolutions". The upsampler sees the base's picture
under noise (`SamplingConfig.coarse_noise`), which hides how that picture differs from the real ones
that it was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from matryoshka_diffusion.config import ConfigError, RunConfig, SamplingConfig, UsageError
from matryoshka_diffusion.pipeline import Matryoshka, Progress, Samples
from matryoshka_diffusion.pyramid import Resolution
from matryoshka_diffusion.train.adapters import fingerprint

PER_LEVEL = ("guidance", "threshold")
"""Settings that may have an entry for each level, the base's first."""
OF_UPSAMPLERS = ("coarse_noise",)


class Cascade:
    """A base and an upsampler that sample as one model, with the levels of both, coarse to fine.

    Picture i has one seed, from which base and upsampler draw different noise: it is the same in
    any batch, and the upsampler alone makes it of the base's bytes.
    """

    def __init__(self, base: Matryoshka, upsampler: Matryoshka) -> None:
        """Raises ConfigError if the upsampler was not trained for pictures such as the base's."""
        check_pair(base.config, upsampler.config, levels=len(base.resolutions))
        self.base, self.upsampler = base, upsampler

    @property
    def config(self) -> RunConfig:
        """The upsampler's config."""
        return self.upsampler.config

    @property
    def resolutions(self) -> tuple[Resolution, ...]:
        """The grid of every level, the base's before the upsampler's."""
        return (*self.base.resolutions, *self.upsampler.resolutions)

    @property
    def picture_side(self) -> int:
        """Height and width in pixels of what is drawn."""
        return self.upsampler.picture_side

    def sampling(self, settings: dict[str, Any]) -> SamplingConfig:
        """The upsampler's sampling defaults with some of them replaced."""
        return self.upsampler.sampling(self._split(settings)[1])

    def idle(self, settings: dict[str, Any]) -> set[str]:
        """Those of the settings that change no sample of either model."""
        of_base, of_upsampler = self._split(settings)
        return self.base.idle(of_base) & self.upsampler.idle(of_upsampler)

    def describe(self, settings: dict[str, Any]) -> dict[str, Any]:
        """As `Matryoshka.describe`; what concerns the base is under `base`."""
        of_base, of_upsampler = self._split(settings)
        base, upsampler = self.base.describe(of_base), self.upsampler.describe(of_upsampler)
        weights = f"{upsampler['weights']} after {base['weights']}"
        averaged = base["averaged"] and upsampler["averaged"]
        return {**upsampler, "weights": weights, "averaged": averaged, "base": base}

    def evaluations(self, settings: dict[str, Any]) -> int:
        """Of either network for one sample, together."""
        of_base, of_upsampler = self._split(settings)
        return self.base.evaluations(of_base) + self.upsampler.evaluations(of_upsampler)

    def sample(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        classes: str | int | Sequence[str | int] | None = None,
        negative: str | None = None,
        n: int = 1,
        seed: int = 0,
        batch_size: int | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Samples:
        """As `Matryoshka.sample`; both models sample with these settings.

        Each runs its own number of steps unless `steps` says how many for both. The settings of
        the base's part are recorded under `base`, with its name and a hash of its weights.
        """
        of_base, of_upsampler = self._split(settings)
        counts = [self.base.sampling(of_base).steps, self.upsampler.sampling(of_upsampler).steps]
        asked: dict[str, Any] = {
            "classes": classes,
            "negative": negative,
            "n": n,
            "seed": seed,
            "batch_size": batch_size,
        }
        small = self.base.sample(prompts, **asked, progress=_half(progress, counts, 0), **of_base)
        large = self.upsampler.sample(
            prompts,
            **asked,
            coarse=small.pictures,
            progress=_half(progress, counts, 1),
            **of_upsampler,
        )
        recorded = {**large.settings, "base": {**small.settings, "weights": self._base_weights}}
        return Samples((*small.levels, *large.levels), large.captions, large.seeds, recorded)

    @cached_property
    def _base_weights(self) -> str:
        """A hash, by which the base of a picture is known wherever it lies."""
        return fingerprint(self.base.net.state_dict())

    def _split(self, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the base is told, and the upsampler: an entry for each level goes where it belongs.

        Raises:
            UsageError: a setting has neither one entry nor one for each level.
        """
        of_base = {name: value for name, value in settings.items() if name not in OF_UPSAMPLERS}
        of_upsampler = dict(settings)
        levels, border = len(self.resolutions), len(self.base.resolutions)
        for name in PER_LEVEL:
            values = settings.get(name)
            if not isinstance(values, list | tuple) or len(values) == 1:
                continue
            if len(values) != levels:
                raise UsageError(f"{name} has {len(values)} entries; give 1 or {levels}")
            of_base[name], of_upsampler[name] = values[:border], values[border:]
        return of_base, of_upsampler


def _half(progress: Progress | None, steps: Sequence[int], place: int) -> Progress | None:
    """The progress of one of the models as a part of both; they have the same batches."""
    if progress is None:
        return None

    def told(done: int, total: int) -> None:
        batches = total // steps[place]
        progress(batches * sum(steps[:place]) + done, batches * sum(steps))

    return told


def check_pair(base: RunConfig, upsampler: RunConfig, *, levels: int | None = None) -> None:
    """Raise ConfigError naming the first reason why `base` cannot draw what `upsampler` enlarges.

    Both are whole configs of trained models, or of the runs that will train them. `levels` is how
    many levels the base has, which are all that its training ends with only when it is finished.
    """
    coarse = upsampler.model.coarse
    if coarse is None:
        raise ConfigError(f"sampling.base: {upsampler.name} is no upsampler (no model.coarse)")
    if base.model.coarse is not None:
        raise ConfigError(f"sampling.base: {base.name} is an upsampler and draws nothing by itself")
    if base.codec is not None:
        raise ConfigError(
            f"sampling.base: {base.name} draws codes (codec), but {upsampler.name} enlarges pixels"
        )
    last = base.train.stages[-1].levels
    reached = last if levels is None else levels
    finest = base.model.levels[reached - 1]
    if finest.frames is not None:
        raise ConfigError(
            f"sampling.base: {base.name} draws clips, but {upsampler.name} enlarges pictures"
        )
    drawn = finest.side
    if drawn != coarse.side:
        unfinished = f" (it has {reached} of its {last} levels: finish it first)"
        raise ConfigError(
            f"sampling.base: {base.name} draws pictures of {drawn} pixels, but model.coarse.side "
            f"of {upsampler.name} is {coarse.side}{unfinished * (reached < last)}"
        )
    model, data = upsampler.model, upsampler.data
    shared = (
        ("model.channels", base.model.channels, model.channels, "one's colours are the other's"),
        ("model.classes", base.model.classes, model.classes, "one class is asked of both"),
        ("data.classes", base.data.classes, data.classes, "one class is asked of both, by name"),
        ("encoder", base.encoder, upsampler.encoder, "both read the features of one encoder"),
    )
    for path, there, here, reason in shared:
        if there != here:
            raise ConfigError(
                f"sampling.base: {path} of {base.name} is {there!r}, that of {upsampler.name} is "
                f"{here!r}; they must be equal, since {reason}"
            )
