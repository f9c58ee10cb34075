"""Cascaded diffusion (Ho et al., 2022; Section 4.1 of the paper): one model draws, one enlarges.

The paper's baseline for "one network for all resolutions". The upsampler sees the base's image
under noise (`SamplingConfig.coarse_noise`), which hides how that image differs from the real ones
in its training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from matryoshka_diffusion.config import (
    PER_LEVEL,
    BaseConfig,
    ConfigError,
    RunConfig,
    SamplingConfig,
    UsageError,
)
from matryoshka_diffusion.configfile import load_config
from matryoshka_diffusion.models.find import (
    count_levels,
    find_model,
    read_config,
    with_encoder,
)
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.progress import Progress, shown
from matryoshka_diffusion.pyramid import Resolution
from matryoshka_diffusion.samples import Samples
from matryoshka_diffusion.training.weights import fingerprint


class Cascade:
    """A base and an upsampler that sample as one model, with the levels of both, coarse to fine.

    Base and upsampler draw different noise from the one seed of an image. The image is the same in
    any batch, and the upsampler alone makes it from the base's bytes.
    """

    def __init__(self, base: Matryoshka, upsampler: Matryoshka) -> None:
        """Raises `ConfigError` unless the upsampler was trained for images such as the base's."""
        check_pair(base.config, upsampler.config, levels=len(base.model.levels))
        self.base, self.upsampler = base, upsampler
        self.config: RunConfig = upsampler.config
        self.resolutions: tuple[Resolution, ...] = (*base.resolutions, *upsampler.resolutions)
        self.picture_side: int = upsampler.picture_side
        self.batch_size: int = upsampler.batch_size

    def __repr__(self) -> str:
        return f"Cascade({self.base!r}, {self.upsampler!r})"

    def sized(self, height: int | None = None, width: int | None = None) -> Cascade:
        """Raises `UsageError`: an upsampler enlarges squares."""
        return Cascade(self.base, self.upsampler.sized(height, width))

    def sampling(self, settings: dict[str, Any]) -> SamplingConfig:
        """The upsampler's sampling defaults with some of them replaced."""
        return self.upsampler.sampling(self._split(settings)[1])

    def idle(self, settings: dict[str, Any]) -> set[str]:
        """The names of settings that change no sample of either model."""
        base, upsampler = self._split(settings)
        return self.base.idle(base) & self.upsampler.idle(upsampler)

    def describe(self, settings: dict[str, Any]) -> dict[str, Any]:
        """All that samples depend on, as `Matryoshka.describe`; the base's part under `base`."""
        for_base, for_upsampler = self._split(settings)
        base, upsampler = self.base.describe(for_base), self.upsampler.describe(for_upsampler)
        weights = f"{upsampler['weights']} after {base['weights']}"
        averaged = base["averaged"] and upsampler["averaged"]
        return {**upsampler, "weights": weights, "averaged": averaged, "base": base}

    def evaluations(self, settings: dict[str, Any]) -> int:
        """The number of evaluations of both networks for one sample."""
        base, upsampler = self._split(settings)
        return self.base.evaluations(base) + self.upsampler.evaluations(upsampler)

    def sample(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        classes: str | int | Sequence[str | int] | None = None,
        negative: str | None = None,
        n: int = 1,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        progress: Progress | bool | None = None,
        **settings: Any,
    ) -> Samples:
        """Draw images as `Matryoshka.sample` does; both models sample with these settings.

        Each model takes its own number of steps unless `steps` sets one for both. The result
        records the base's settings under `base`, with its name and a hash of its weights.
        """
        for_base, for_upsampler = self._split(settings)
        first, second = self.base.sampling(for_base).steps, self.sampling(settings).steps
        options: dict[str, Any] = {"classes": classes, "negative": negative, "n": n, "seed": seed}
        options["batch_size"] = self.batch_size if batch_size is None else batch_size

        whole = shown(progress, "steps")

        def part(own: int, before: int) -> Progress | None:
            """The progress of one model as a part of both; they have the same batches."""
            if (report := whole) is None:
                return None
            both = first + second
            return lambda done, total: report(total // own * before + done, total // own * both)

        small = self.base.sample(prompts, **options, progress=part(first, 0), **for_base)
        options |= {"coarse": small.pictures, "progress": part(second, first)}
        large = self.upsampler.sample(prompts, **options, **for_upsampler)
        base = {**small.settings, "weights": self.base.weights_hash}
        record = {**large.settings, "base": base}
        return Samples((*small.levels, *large.levels), large.captions, large.seeds, record)

    def _split(self, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings for the base and for the upsampler: entries for each level are divided.

        Raises:
            UsageError: a setting has neither one entry nor one for each level, or names a guide.
        """
        if settings.get("guide") is not None:
            raise UsageError(
                f"guide: {settings['guide']} guides one model, and a cascade has two: draw images "
                "with the base and its guide, and enlarge them with the upsampler's (--coarse)"
            )
        base = {name: value for name, value in settings.items() if name != "coarse_noise"}
        upsampler = dict(settings)
        border = len(self.base.model.levels)
        levels = border + len(self.upsampler.model.levels)
        for part, name in PER_LEVEL:
            values = settings.get(name) if part == "sampling" else None
            if not isinstance(values, list | tuple) or len(values) == 1:
                continue
            if len(values) != levels:
                raise UsageError(f"{name} has {len(values)} entries; give 1 or {levels}")
            base[name], upsampler[name] = values[:border], values[border:]
        return base, upsampler


Model: TypeAlias = Matryoshka | Cascade
"""A model that samples: one nest, or a base and an upsampler."""


def open_model(
    run: str | Path,
    *,
    text_encoder: str | None = None,
    base: str | Path | None = None,
    adapters: Mapping[str, float] | None = None,
    **options: Any,
) -> Model:
    """Load what `Matryoshka.load` loads and, for an upsampler, its base.

    `base` replaces the base that the upsampler's config names; `adapters` belong to the model, not
    to its base; `options` are those of `load`.

    Raises:
        ConfigError: the base is missing, has changed since the training, or does not fit; or a
            base is given for a model that is no upsampler.
        FileNotFoundError, ValueError: as `Matryoshka.load`.
    """
    options["text_encoder"] = text_encoder
    model = Matryoshka.load(run, adapters=adapters, **options)
    named = model.config.sampling.base
    if model.config.model.coarse is None and base is None:
        return model
    if base is not None:
        config = read_config(base)
    elif named is None:
        raise ConfigError(
            f"{model.config.name} enlarges images that another model draws, and its config names "
            "none (sampling.base): add that model (--base RUN), or images of your own (--coarse)"
        )
    else:
        base = named.path
        weights, config = _read(model.config, named)
        if fingerprint(weights) != named.hash:
            raise ConfigError(
                f"sampling.base.path: {base} has other weights than when the training of "
                f"{model.config.name} began; if that is meant, name it again (--base {base})"
            )
    check_pair(config if text_encoder is None else with_encoder(config, text_encoder), model.config)
    encoder = None if model.config.encoder is None else model.text_encoder()
    return Cascade(Matryoshka.load(base, encoder=encoder, **options), model)


# --- which base belongs to an upsampler --------------------------------------------------------


def keep_base(config: RunConfig, run: Path) -> RunConfig:
    """The config with the base's hash as the run in the folder `run` noted it at its start.

    Training does not use the base, so a run continues whatever has become of the base.
    """
    named, written = config.sampling.base, run / "config.yaml"
    if named is None or not written.is_file():
        return config
    noted = load_config(written).sampling.base
    # A path that leads nowhere any more is still as it was typed, not absolute.
    same = (named.path, str(Path(named.path).expanduser().resolve()))
    return config if noted is None or noted.path not in same else _with_base(config, noted)


def note_base(config: RunConfig) -> RunConfig:
    """The config of an upsampler that is about to be trained, with the hash of its base's weights.

    Raises:
        ConfigError: the base is missing or does not fit.
    """
    named = config.sampling.base
    if named is None or named.hash:
        return config
    weights, base = _read(config, named)
    check_pair(base, config, levels=count_levels(weights))
    return _with_base(config, named.model_copy(update={"hash": fingerprint(weights)}))


def _with_base(config: RunConfig, base: BaseConfig) -> RunConfig:
    sampling = config.sampling.model_copy(update={"base": base})
    return config.model_copy(update={"sampling": sampling})


def _read(config: RunConfig, named: BaseConfig) -> tuple[dict[str, Tensor], RunConfig]:
    try:
        return find_model(named.path)
    except FileNotFoundError as error:
        raise ConfigError(
            f"sampling.base.path: the model that {config.name} goes with is not there ({error}); "
            "name it (--base RUN)"
        ) from error


def check_pair(base: RunConfig, upsampler: RunConfig, *, levels: int | None = None) -> None:
    """Check that `base` draws what `upsampler` enlarges.

    Both are whole configs of trained models, or of the runs that will train them. `levels` is the
    number of levels that the base has reached; by default, those of its last stage.

    Raises:
        ConfigError: names the first difference.
    """
    here, there, coarse = upsampler.name, base.name, upsampler.model.coarse
    if coarse is None:
        raise ConfigError(f"sampling.base: {here} is no upsampler (no model.coarse)")
    last = base.train.stages[-1].levels
    reached = last if levels is None else levels
    finest = base.model.levels[reached - 1]
    reason = None
    if base.model.coarse is not None:
        reason = f"{there} is an upsampler and draws nothing by itself"
    elif base.codec is not None:
        reason = f"{there} draws latents (codec), but {here} enlarges pixels"
    elif finest.frames is not None:
        reason = f"{there} draws clips, but {here} enlarges images"
    elif finest.side != coarse.side:
        unfinished = f" (it has {reached} of its {last} levels: finish it first)"
        reason = (
            f"{there} draws images of {finest.side} pixels, but model.coarse.side of "
            f"{here} is {coarse.side}{unfinished * (reached < last)}"
        )
    for path in ("model.channels", "model.classes", "data.classes", "encoder"):
        base_value, value = (attrgetter(path)(config) for config in (base, upsampler))
        if reason is None and base_value != value:
            reason = (
                f"{path} of {there} is {base_value!r}, that of {here} is {value!r}; they must be "
                "equal, since both sample under the same conditions"
            )
    if reason is not None:
        raise ConfigError(f"sampling.base: {reason}")
