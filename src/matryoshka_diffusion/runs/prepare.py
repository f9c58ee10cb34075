"""From what the user named to a run that can start: find its config, open its data, complete it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matryoshka_diffusion.codec import (
    TRAINING,
    Codec,
    CodeCache,
    LatentLoader,
    can_store,
    codec_folder,
    load_autoencoder,
    read_code_shape,
    store_codes,
)
from matryoshka_diffusion.codecconfig import CodecRunConfig
from matryoshka_diffusion.config import (
    ConfigError,
    DataConfig,
    EncoderConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TextConfig,
    TrainConfig,
    UsageError,
)
from matryoshka_diffusion.configfile import assignment, changed, load_config
from matryoshka_diffusion.data.check import refuse_lost, refuse_unfit
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import (
    Source,
    absolute,
    identity,
    open_data,
    sourced,
    split,
    with_source,
)
from matryoshka_diffusion.diffusion import Distance
from matryoshka_diffusion.features import FeatureLoader, keep_features, open_features
from matryoshka_diffusion.models.find import (
    Progress,
    absolute_if_here,
    count_levels,
    find_model,
    read_config,
    with_encoder,
    with_own_frozen,
)
from matryoshka_diffusion.models.names import is_hub_id
from matryoshka_diffusion.nn.layers import shapes_only
from matryoshka_diffusion.nn.lora import attach
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.presets import CODECS, preset
from matryoshka_diffusion.runs.perceptual import open_perceptual
from matryoshka_diffusion.text.encoder import load_encoder
from matryoshka_diffusion.text.feature_cache import FeatureCache
from matryoshka_diffusion.training.inputs import Batches
from matryoshka_diffusion.training.precision import PrecisionSetting, resolve_precision
from matryoshka_diffusion.training.stages import active_model
from matryoshka_diffusion.training.weights import fingerprint

MINILM_WIDTH = 384
SMALL_BYTES = 2**30
"""Text features and latents up to this size are stored before training, without a request."""


# --- the config --------------------------------------------------------------------------------


def find_config(
    name: str | RunConfig,
    data: str | None = None,
    assignments: Sequence[str | tuple[str, Any]] = (),
    init: str | None = None,
    lora: int | None = None,
    *,
    as_: str | None = None,
    base: str | None = None,
    codec: str | None = None,
) -> RunConfig:
    """The config of a preset, a YAML file, a run folder, a model to tune or a config, with changes.

    Args:
        data: replaces `data.path`.
        assignments: `path.to.key=value` of `--set`, or pairs of path and value.
        init: model to start from.
        lora: rank of adapters to train around that model.
        as_: a baseline in place of the preset's nest, one of `presets.BASELINES`.
        base: model that draws the images which an upsampler enlarges.
        codec: folder of an autoencoder on whose latents the model is trained.

    Raises:
        ConfigError: there is no such config, or the changes do not fit it.
        UsageError: `as_` without a preset, or `train.averaged` is set.
    """
    before, after, where = {}, {}, name if isinstance(name, str) else name.name
    config = _named_config(name, as_, lora) if isinstance(name, str) else name
    if codec is not None:
        folder = codec_folder(codec)
        factor = read_code_shape(folder).factor if config.codec is None else config.codec.factor
        before["codec"] = {"path": str(folder), "factor": factor}
    before |= _named_data(data) | ({} if lora is None else {"train.lora": {"rank": lora}})
    if init is not None:
        after["train.init"] = absolute_if_here(init)
    if base is not None:
        after["sampling.base"] = {"path": absolute_if_here(base)}
    assigned = [assignment(each) if isinstance(each, str) else each for each in assignments]
    changes = [*before.items(), *assigned, *after.items()]
    text = assignments and isinstance(assignments[0], str)
    config = changed(config, changes, where="--set" if text else where)
    if guide := config.sampling.guide:
        config = changed(config, [("sampling.guide", absolute_if_here(guide))], where=where)
    if config.train.init and not config.data.classes and "data.classes" not in dict(assigned):
        names = _classes_of(config.train.init)
        config = changed(config, [("data.classes", names)], where="train.init")
    if config.train.averaged is not None:
        raise UsageError("train.averaged: only mdm ema sets it, for a model; omit it")
    return with_source(config)


def _named_data(data: str | None) -> dict[str, Any]:
    """The changes of a config by `--data`, which replaces a mix, too."""
    return {} if data is None else {"data.path": absolute(data), "data.mix": []}


def _named_config(name: str, as_: str | None, lora: int | None) -> RunConfig:
    path = Path(name)
    if (path / "config.yaml").is_file():
        config = with_own_frozen(load_config(path / "config.yaml"), path)
    elif path.suffix in (".yaml", ".yml"):
        config = load_config(path)
    elif path.is_file() or (path / "config.json").is_file() or is_hub_id(name):
        config = _tuning(name, lr=2e-5 if lora is None else 2e-4)
    else:
        return preset(name, as_)
    if as_ is not None:
        raise UsageError(f"--as {as_}: it changes presets, but {name} is none; omit --as")
    return config


def _tuning(model: str, lr: float) -> RunConfig:
    """A model's config with a short training of all its levels that starts from its weights.

    Batch size, rate and length are conventions for a few thousand images; nothing was measured.
    Adapters, which start at zero, are commonly given ten times the rate.
    """
    config = read_config(model)
    stage = StageConfig(levels=len(config.model.levels), images=64_000, batch_size=16, lr=lr)
    train = TrainConfig(
        stages=(stage,),
        init=absolute_if_here(model),
        warmup_images=2_000,
        ema_decay=0.999,
        condition_dropout=config.train.condition_dropout,
    )
    # Kept is what the model depends on; the user names the new data.
    kept = {"side", "shapes", "pixels", "frame_stride", "fps", "clip", "clip_frames"}
    kept |= {"classes"} if config.model.classes else set()
    data = DataConfig(source="folder", **config.data.model_dump(include=kept))
    return config.model_copy(update={"name": f"{config.name}-tuned", "train": train, "data": data})


def _classes_of(model: str) -> tuple[str, ...]:
    """Names of a model's classes; a run that starts from it keeps their order."""
    try:
        config = read_config(model)
    except FileNotFoundError:  # a run that has begun does without its model
        return ()
    return config.data.classes if config.model.classes else ()


def find_codec_run(
    name: str, data: str | None, assignments: Sequence[str]
) -> CodecRunConfig | None:
    """Config of the codec training called `name`, with changes; None if there is none.

    `name` is a folder of a training, its codec.yaml, or one of `presets.CODECS`. Raises
    ConfigError if the changes do not fit.
    """
    path = Path(name)
    written = path if path.name == TRAINING else path / TRAINING
    if not written.is_file() and name not in CODECS:
        return None
    config = load_config(written, CodecRunConfig) if written.is_file() else CODECS[name]
    changes = [*_named_data(data).items(), *map(assignment, assignments)]
    config = changed(config, changes, where="--set" if assignments else name)
    return config.model_copy(update={"data": sourced(config.data)})


def complete(config: RunConfig, source: Source) -> RunConfig:
    """Add to the config what only the data knows: its identity, and conditions for a bare model.

    Raises:
        ConfigError: model and data disagree on channels, frames, classes or captions.
        UsageError: `sampling.guide` is set, and no level is guided.
    """
    refuse_lost(source, config.data)
    refuse_unfit(source, config)
    model, classes = config.model, len(source.classes)
    changes: dict[str, Any] = {"data.classes": source.classes, "data.identity": identity(source)}
    if model.text is None and not model.classes and (source.captions or classes):
        if config.sampling.guidance == SamplingConfig().guidance:  # else the user chose it
            changes["sampling.guidance"] = (2.0,)
        if source.captions:
            changes["model.text"] = TextConfig(features=MINILM_WIDTH, width=model.embedding)
            changes["encoder"] = EncoderConfig(name="minilm")
        else:
            changes["model.classes"] = classes
    config = changed(config, changes.items(), where="completed config")
    if config.sampling.guide is not None and "guide" in config.sampling.idle:
        raise UsageError("sampling.guide needs guidance: set sampling.guidance or omit the guide")
    return config


# --- the run -----------------------------------------------------------------------------------


class Job(NamedTuple):
    """A run that can start, as `training.trainer.train` takes it."""

    config: RunConfig
    source: Source  # to train on
    held_out: Source | None  # without training, if any
    loader: Batches  # `frozen` batches of `source`
    encode: FeatureCache | None  # text features of captions, if any
    captions: Tensor | None  # their mean features, for `train.whiten_captions`
    base: dict[str, Tensor] | None  # weights that adapters are put around, if any
    distance: Distance | None  # between images, for `train.perceptual`
    codec: Codec | None
    frozen: Callable[[Loader], Batches]  # makes batches of latents, or with features, of a loader's
    notes: str  # origin of text features and latents, in words


def prepare(
    config: RunConfig,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    *,
    progress: Progress | None = None,
    coding: Progress | None = None,
) -> Job:
    """Open the data, complete the config with it, make loader, text encoder, codec and features.

    Text features and latents up to `SMALL_BYTES` are stored before training begins, others are made
    for each batch on `device`. `progress` counts captions, `coding` images. `folder` is the run's,
    which keeps the projection of features.

    Raises:
        ConfigError: the data lacks a condition of the model, the base of an upsampler is missing or
            does not fit, or the codec is not for this model.
        ValueError, OSError, MissingExtra: data, encoder, codec or a network cannot be used.
    """
    config, distance = open_perceptual(config, device)
    source = open_data(config)
    config = complete(config, source)
    if config.sampling.base is not None:
        from matryoshka_diffusion.cascade import note_base

        config = note_base(config)
    encode, captions, codec, codes, features, notes = None, None, None, None, None, []
    if config.encoder is not None:
        encode = _open_features(config, device)
        notes.append(_store_features(encode, [*all_captions(source), ""], progress))
    if config.codec is not None:
        codec = load_autoencoder(config, device)
        if (colours := codec.colours) != source.channels:
            raise ConfigError(
                f"codec.path: {config.codec.path} is for images of {colours} channels, but "
                f"{source.name} has {source.channels}: give a codec that was trained on such images"
            )
        codes = CodeCache(codec)
        notes.append(_store_latents(codes, source, config.data, coding))
        named = config.codec.model_copy(update={"weights": codec.key})
        config = config.model_copy(update={"codec": named})
    config, base = _with_adapted(config)
    seen, held_out = split(source, config.data.held_out)
    if encode is not None and config.train.whiten_captions and config.train.init is None:
        captions = encode.varied(all_captions(seen))
        notes += ["captions are not whitened: they are too few"] * (captions is None)
    if config.features is not None:
        config, encoder = open_features(config, seen, folder, device, coding)
        features = CodeCache(encoder)
        notes.append(_store_latents(features, source, config.data, coding))
        if folder is not None:
            keep_features(config, encoder, folder)

    def frozen(loader: Loader) -> Batches:
        coded = loader if codes is None else LatentLoader(loader, codes)
        return coded if features is None else FeatureLoader(loader, features)

    loader = frozen(Loader.of(seen, config.train.seed, config.data))
    parts = (encode, captions, base, distance, codec, frozen, "\n".join(notes))
    return Job(config, seen, held_out, loader, *parts)


def captions_to_embed(
    config: RunConfig,
    device: torch.device | str = "cpu",
    *,
    text_encoder: str | None = None,
    precision: PrecisionSetting | None = None,
) -> tuple[list[str], FeatureCache]:
    """The captions that a training on `config` encodes, and the cache of their features.

    Args:
        text_encoder: another place of the encoder.
        precision: of the encoder, in place of the config's.

    Raises:
        UsageError: there is no text.
        ValueError, OSError, MissingExtra: as `prepare`.
    """
    source = open_data(config)
    config = complete(config, source)
    if config.encoder is None:
        raise UsageError(f"{config.name} on {source.name} has no text: there is nothing to embed")
    if text_encoder is not None:
        config = with_encoder(config, text_encoder)
    return [*all_captions(source), ""], _open_features(config, device, precision)


def all_captions(source: Source) -> list[str]:
    """Every caption of a source once, in order."""
    return list(dict.fromkeys(text for captions in source.captions or () for text in captions))


def _open_features(
    config: RunConfig, device: torch.device | str, precision: PrecisionSetting | None = None
) -> FeatureCache:
    """The cache of text features; a T5 encodes in bf16 where the run does."""
    assert config.encoder is not None, "the run has text"
    half = resolve_precision(precision or config.train.precision, torch.device(device)) == "bf16"
    cache = FeatureCache(load_encoder(config.encoder, device, half=half))
    if config.model.text is not None and (width := config.model.text.features) != cache.width:
        raise ConfigError(
            f"model.text.features is {width}, but the encoder has {cache.width}: add --set "
            f"model.text.features={cache.width}"
        )
    return cache


def _store_features(cache: FeatureCache, captions: list[str], progress: Progress | None) -> str:
    size = cache.estimate(captions)
    if size.needed <= SMALL_BYTES:
        cache.add(size.missing, progress)
        return f"features of {size.captions:,} captions from {cache.folder}"
    return (
        f"{len(size.missing):,} of {size.captions:,} captions are encoded while training, batch by "
        f"batch: their features would take {size.needed:,} bytes (mdm embed stores them)"
    )


def _store_latents(
    cache: CodeCache, source: Source, data: DataConfig, progress: Progress | None
) -> str:
    needed = cache.bytes_of((1 + data.flip) * len(source), source.side)
    if can_store(data) and needed <= SMALL_BYTES:
        store_codes(cache, source, data, progress)
        return f"codes of {len(source):,} pictures from {cache.folder}"
    reason = (
        f"they would take {needed:,} bytes" if can_store(data) else "no picture recurs as it was"
    )
    return f"codes are made while training, batch by batch: {reason}"


def _with_adapted(config: RunConfig) -> tuple[RunConfig, dict[str, Tensor] | None]:
    """The config with a hash of the weights that adapters are put around, and these weights.

    Raises:
        ConfigError: the model is another one than this run's, or has nothing to adapt.
    """
    train = config.train
    if train.lora is None or train.init is None:
        return config, None
    weights, old = find_model(train.init)
    theirs, ours = old.model.first(count_levels(weights)), active_model(config, 0)
    for name in ModelConfig.model_fields:
        if getattr(theirs, name) != getattr(ours, name):
            raise ConfigError(f"train.init: model.{name} of {train.init} is not that of this run")
    with shapes_only():  # refuses a model that cannot be adapted before a run begins
        attach(NestedUNet(ours), train.lora)
    lora = train.lora.model_copy(update={"base": train.lora.base or fingerprint(weights)})
    return config.model_copy(update={"train": train.model_copy(update={"lora": lora})}), weights
