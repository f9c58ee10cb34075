"""From a config to a run that can start: the data is opened and the config completed with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka_diffusion.cascade import note_base
from matryoshka_diffusion.codec.autoencoder import (
    Codec,
    Identity,
    codec_folder,
    load_autoencoder,
    read_code_shape,
    with_own_codec,
)
from matryoshka_diffusion.codec.latent_loader import CodeCache, LatentLoader, can_store, store_codes
from matryoshka_diffusion.config import (
    GENTLE,
    VIDEO_SOURCES,
    BaseConfig,
    CodecConfig,
    ConfigError,
    DataConfig,
    EncoderConfig,
    LevelConfig,
    LoraConfig,
    MicroConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TextConfig,
    TrainConfig,
    UsageError,
)
from matryoshka_diffusion.configfile import from_dict, load_config, override, to_yaml
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import Source, absolute, open_source, split, with_source
from matryoshka_diffusion.files import refuse_full, write_atomically
from matryoshka_diffusion.models.find import (
    Progress,
    count_levels,
    find_model,
    read_config,
    with_encoder,
)
from matryoshka_diffusion.nn.lora import attach
from matryoshka_diffusion.nn.nested import NestedUNet, grow
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.text.encoder import load_encoder
from matryoshka_diffusion.text.feature_cache import FeatureCache
from matryoshka_diffusion.train import checkpoint
from matryoshka_diffusion.train.averages import PowerEma
from matryoshka_diffusion.train.checkpoint import fingerprint
from matryoshka_diffusion.train.precision import PrecisionSetting, resolve_precision
from matryoshka_diffusion.train.stages import active_model

MINILM_WIDTH = 384
SMALL_BYTES = 2**30
"""Features and codes that take no more than this are stored without being asked."""


class Job(NamedTuple):
    """What `train.trainer.train` is given; `encode` is None where there is no text.

    `source` is what is trained on, `held_out` what is not (None if all of it is). `base` are the
    weights that adapters are put around, None without them. `codec` makes codes of pictures, which
    `loader` does already. `text` says, for people, where features of captions and codes come from.
    """

    config: RunConfig
    source: Source
    held_out: Source | None
    loader: LatentLoader
    encode: FeatureCache | None
    base: dict[str, Tensor] | None
    codec: Codec
    text: str


def find_config(
    name: str,
    data: str | None,
    assignments: Sequence[str],
    init: str | None = None,
    lora: int | None = None,
    *,
    base: str | None = None,
    codec: str | None = None,
) -> RunConfig:
    """The config of a preset, a YAML file, a run folder or a model to tune, with changes.

    `init` is the model to start from, `lora` the rank of adapters to train in its place; `base` is
    the model that draws what an upsampler enlarges, `codec` the folder of an autoencoder on whose
    codes the model is trained.

    Raises:
        ConfigError: there is none of that name, or the changes do not fit.
        UsageError: `lora` without a model, or `train.averaged` given.
    """
    path = Path(name)
    if (path / "config.yaml").is_file():
        config = with_own_codec(load_config(path / "config.yaml"), path)
    elif path.suffix in (".yaml", ".yml"):
        config = load_config(path)
    elif path.is_file() or (path / "config.json").is_file():
        config = _tuning(path, lr=2e-5 if lora is None else 2e-4)
    else:
        config = preset(name)
    changes = list(assignments)
    if lora is not None:
        if init is None and config.train.init is None and not _names_init(assignments):
            raise UsageError(
                "--lora: name the model in the place of the preset, or give --init MODEL"
            )
        changes.insert(0, f"train.lora={LoraConfig(rank=lora).model_dump_json()}")
    if data is not None:
        # Absolute, so that the run is found to be the same from any folder.
        changes.insert(0, f"data.path={json.dumps(absolute(data))}")
    if codec is not None:
        changes.insert(0, _with_codec(config.codec, codec_folder(codec)))
    if init is not None:
        where = Path(init).expanduser()
        changes.append(f"train.init={json.dumps(str(where.resolve()) if where.exists() else init)}")
    if base is not None:
        where = Path(base).expanduser()
        path = str(where.resolve()) if where.exists() else base
        changes.append(f"sampling.base={BaseConfig(path=path).model_dump_json()}")
    asked = override(config, changes)
    if asked.train.averaged is not None:
        raise UsageError(
            "train.averaged: mdm ema notes it of a model, a run has none; leave it away"
        )
    return with_source(asked)


def _with_codec(old: CodecConfig | None, folder: Path) -> str:
    """The change that puts a codec into a config; the factor of one that has it stays."""
    factor = read_code_shape(folder).factor if old is None else old.factor
    return f"codec={CodecConfig(path=str(folder), factor=factor).model_dump_json()}"


def _names_init(assignments: Sequence[str]) -> bool:
    return any(change.startswith("train.init=") for change in assignments)


def _tuning(model: Path, lr: float) -> RunConfig:
    """A model's config with a short training of all its levels that starts from its weights.

    Batch, rate and length are conventions for a few thousand pictures; nothing was measured.
    Adapters, which start at zero, are commonly given ten times the rate.
    """
    config = read_config(model)
    stage = StageConfig(levels=len(config.model.levels), images=64_000, batch_size=16, lr=lr)
    train = TrainConfig(
        stages=(stage,),
        init=str(model.expanduser().resolve()),
        warmup_images=2_000,
        ema_decay=0.999,
        condition_dropout=config.train.condition_dropout,
    )
    # What the model depends on stays; what it was trained on is to be named.
    kept = ("side", "pixels", "frame_stride", "fps", "clip", "clip_frames")
    data = DataConfig(source="folder", **{name: getattr(config.data, name) for name in kept})
    update = {"name": f"{config.name}-tuned", "train": train, "data": data}
    return config.model_copy(update=update)


def prepare(
    config: RunConfig,
    device: torch.device | str = "cpu",
    *,
    progress: Progress | None = None,
    coding: Progress | None = None,
) -> Job:
    """Open the data, complete the config with what it holds, make loader, encoder and codec.

    The captions' features are stored before training begins if that is a small matter; else those
    that `mdm embed` has not stored are made for each batch, on `device`. So are the codes of
    pictures. `progress` is told of captions, `coding` of pictures.

    Raises:
        ConfigError: the data does not have what the model is conditioned on, the base of an
            upsampler is missing or does not fit, or the codec is not for this model.
        ValueError, OSError, MissingExtra: the data, the encoder or the codec cannot be used.
    """
    source = open_source(config.data, config.data_side, config.data_frames)
    config = note_base(complete(config, source))
    data = config.data
    encode, text = None, ""
    if config.encoder is not None:
        encode = _open_cache(config, device)
        text = _store_if_small(encode, [*all_captions(source), ""], progress)
    codec, told = _open_codec(config, source, device, coding)
    source, held_out = split(source, data.held_out)
    loader = Loader.of(source, config.train.seed, data)
    config, base = _with_base(_naming(config, codec))
    text = "\n".join(line for line in (text, told) if line)
    return Job(config, source, held_out, LatentLoader(loader, codec), encode, base, codec, text)


def _open_codec(
    config: RunConfig, source: Source, device: torch.device | str, progress: Progress | None
) -> tuple[Codec, str]:
    """The codec of a run, and where the codes of its pictures come from, in words.

    Raises:
        ConfigError: there is none at its path, or it is not for such a model or such pictures.
    """
    if config.codec is None:
        return Identity(), ""
    codec = load_autoencoder(config, device)
    if codec.colours != source.channels:
        raise ConfigError(
            f"codec.path: {config.codec.path} is for pictures of {codec.colours} channels, but "
            f"{source.name} has {source.channels}: give a codec that was trained on such pictures"
        )
    cache, data = CodeCache(codec), config.data
    needed = cache.bytes_of((1 + data.flip) * len(source), source.side)
    if can_store(data) and needed <= SMALL_BYTES:
        store_codes(cache, source, data, progress)
        return cache, f"codes of {len(source):,} pictures from {cache.folder}"
    return cache, (
        "codes are made while training, batch by batch: "
        + (
            f"they would take {needed:,} bytes"
            if can_store(data)
            else "no picture recurs as it was"
        )
    )


def _naming(config: RunConfig, codec: Codec) -> RunConfig:
    """The config with the hash of its codec."""
    if config.codec is None or not isinstance(codec, CodeCache):
        return config
    named = config.codec.model_copy(update={"weights": codec.codec.key})
    return config.model_copy(update={"codec": named})


class Captions(NamedTuple):
    """The captions of a data set (and the empty one), and the cache of their encoder."""

    texts: list[str]
    cache: FeatureCache


def captions_to_embed(
    config: RunConfig,
    device: torch.device | str = "cpu",
    *,
    text_encoder: str | None = None,
    precision: PrecisionSetting | None = None,
) -> Captions:
    """What training on `config` would encode, and where it would look for the features.

    Args:
        text_encoder: where else to take the encoder from.
        precision: that of the run, if not the config's.

    Raises:
        UsageError: there is no text.
        ValueError, OSError, MissingExtra: as `prepare`.
    """
    source = open_source(config.data, config.data_side, config.data_frames)
    config = complete(config, source)
    if config.encoder is None:
        raise UsageError(f"{config.name} on {source.name} has no text: there is nothing to embed")
    if text_encoder is not None:
        config = with_encoder(config, text_encoder)
    texts = [*all_captions(source), ""]
    return Captions(texts, _open_cache(config, device, precision))


def _open_cache(
    config: RunConfig, device: torch.device | str, precision: PrecisionSetting | None = None
) -> FeatureCache:
    """The features for a run: a T5 is bf16 where the run is."""
    assert config.encoder is not None, "asked of runs with text"
    half = resolve_precision(precision or config.train.precision, torch.device(device)) == "bf16"
    cache = FeatureCache(load_encoder(config.encoder, device, half=half, stay=True))
    _check_width(config, cache.width)
    return cache


def _store_if_small(cache: FeatureCache, captions: list[str], progress: Progress | None) -> str:
    size = cache.estimate(captions)
    if size.needed <= SMALL_BYTES:
        cache.add(size.missing, progress)
        return f"features of {size.captions:,} captions from {cache.folder}"
    return (
        f"{len(size.missing):,} of {size.captions:,} captions are encoded while training, batch by "
        f"batch: their features would take {size.needed:,} bytes (mdm embed stores them)"
    )


def _with_base(config: RunConfig) -> tuple[RunConfig, dict[str, Tensor] | None]:
    """The weights that adapters are put around, and the config with their hash.

    Raises:
        ConfigError: the model is another one than this run's, or has nothing to adapt.
    """
    train = config.train
    if train.lora is None or train.init is None:
        return config, None
    base, old = find_model(train.init)
    theirs, ours = old.model.first(count_levels(base)), active_model(config, 0)
    for name in ModelConfig.model_fields:
        if getattr(theirs, name) != getattr(ours, name):
            raise ConfigError(f"train.init: model.{name} of {train.init} is not that of this run")
    with torch.device("meta"):  # so that what cannot be adapted is refused before a run begins
        attach(NestedUNet(ours), train.lora)
    lora = train.lora.model_copy(update={"base": train.lora.base or fingerprint(base)})
    train = train.model_copy(update={"lora": lora})
    return config.model_copy(update={"train": train}), base


def _check_width(config: RunConfig, width: int) -> None:
    if config.model.text is not None and config.model.text.features != width:
        raise ConfigError(
            f"model.text.features is {config.model.text.features}, but the encoder gives {width}: "
            f"add --set model.text.features={width}"
        )


def all_captions(source: Source) -> list[str]:
    """Every caption of a source once, in order."""
    texts = (text for captions in source.captions or () for text in captions)
    return list(dict.fromkeys(texts))


def complete(config: RunConfig, source: Source) -> RunConfig:
    """Fill in what only the data knows: the names of its classes, captions for a bare model.

    Raises:
        ConfigError: model and data disagree on channels, frames, classes or captions.
    """
    model = config.model
    has_captions = bool(source.captions)
    if config.codec is None and model.channels != source.channels:
        raise ConfigError(
            f"model.channels is {model.channels}, but {source.name} has {source.channels}"
        )
    if source.frames != config.data_frames:
        raise ConfigError(_other_frames(config, source))
    if model.text is not None and not has_captions:
        raise ConfigError(
            f"model.text is set, but {source.name} has no captions: add NAME.txt beside each "
            "file NAME.* or a metadata.jsonl"
        )
    if model.classes and model.classes != len(source.classes):
        raise ConfigError(
            f"model.classes is {model.classes}, but {source.name} has {len(source.classes)}; "
            f"add --set model.classes={len(source.classes)}"
        )
    data = config.data.model_copy(update={"classes": source.classes})
    config = config.model_copy(update={"data": data})
    if model.text is None and not model.classes:
        config = _conditioned(config, has_captions, len(source.classes))
    return from_dict(config.model_dump(mode="json"), where="completed config")


def _other_frames(config: RunConfig, source: Source) -> str:
    """Why a model of clips cannot be trained on pictures, or the other way round."""
    drawn, held = (
        "pictures" if frames is None else f"clips of {frames} frames"
        for frames in (config.data_frames, source.frames)
    )
    remedy = ": name videos with --set data.source=clips" if source.frames is None else ""
    return f"the model draws {drawn}, but {source.name} has {held}{remedy}"


def _conditioned(config: RunConfig, has_captions: bool, classes: int) -> RunConfig:
    """A model that no condition was chosen for takes those that its data has."""
    model, guided = config.model, config.sampling
    if guided.guidance == SamplingConfig().guidance:  # else somebody chose it
        guided = guided.model_copy(update={"guidance": (2.0,)})
    if has_captions:
        text = TextConfig(features=MINILM_WIDTH, width=model.embedding)
        update = {"encoder": EncoderConfig(name="minilm"), "sampling": guided}
        return config.model_copy(
            update={"model": model.model_copy(update={"text": text}), **update}
        )
    if classes:
        model = model.model_copy(update={"classes": classes})
        return config.model_copy(update={"model": model, "sampling": guided})
    return config


# --- growing a trained run ---------------------------------------------------------------------


def grow_run(
    run: str,
    finer: Callable[[LevelConfig], LevelConfig],
    out: Path,
    assignments: Sequence[str] = (),
    *,
    data: str | None = None,
    freeze_coarse: int = 0,
    ramp: int = 0,
) -> RunConfig:
    """Start a run in `out` whose network is that of `run` with one finer level around it.

    `finer` makes that level out of the finest one (`next_level` or `next_frames`). The coarse
    predictions of the new network are bit-equal to the old ones. `freeze_coarse` and `ramp` are
    the new stage's `freeze_coarse_images` and `ramp_images`; `data` is what the new run is trained
    on, if not what `run` was; `assignments` change the config of the new run, for instance the
    widths of the new level.

    Raises:
        UsageError: the new level does not nest on the finest one, or needs videos where `run` had
            pictures; `out` is not empty, or the new stage is shorter than `freeze_coarse` or
            `ramp`.
        FileNotFoundError, ValueError: `run` is no trained model.
    """
    refuse_full(out)
    weights, config = find_model(run)
    reached, levels = count_levels(weights), len(config.model.levels)
    if reached < levels:
        raise ConfigError(f"{run} has reached {reached} of its {levels} levels: finish it first")
    larger = _with_level(config, finer(config.model.levels[-1]))
    changes = [*_new_data(larger, data), *assignments]
    images = override(larger, changes).train.stages[0].images
    lengths = zip(GENTLE, (freeze_coarse, ramp), strict=True)
    gentle = [f"train.stages[0].{name}={length}" for name, length in lengths]
    try:
        grown = override(larger, [*gentle, *changes])
    except ConfigError as error:  # of the lengths, since the changes alone are sound
        raise UsageError(
            f"--freeze-coarse and --ramp: {max(freeze_coarse, ramp)} is more than the new stage's "
            f"{images} images; give less, or make it longer with --set train.stages[0].images="
        ) from error
    grown = _sourced(grown, data)
    small = checkpoint.load_network(config.model, weights, where=run)
    _begin(grown, grow(small, grown.model, seed=grown.train.seed), out)
    return grown


def warm_start(config: RunConfig, out: Path) -> None:
    """Put the weights of `train.init` into a run that has no checkpoint yet.

    All of them are used, and the levels they belong to compute what they did, bit for bit; levels
    that the first stage has beyond them are new.

    Raises:
        ConfigError: the model is another one than this run's first levels.
        FileNotFoundError, ValueError: there is no such model.
    """
    init = config.train.init
    adapted = config.train.lora is not None  # it stays what it is, beside the run
    if init is None or adapted or checkpoint.newest(out / "checkpoints") is not None:
        return
    weights, old = find_model(init)
    levels = count_levels(weights)
    if config.train.init_levels not in (0, levels):
        raise ConfigError(
            f"train.init_levels is {config.train.init_levels}, but {init} has {levels}"
        )
    small = checkpoint.load_network(old.model.first(levels), weights, where=init)
    try:
        net = grow(small, active_model(config, 0), seed=config.train.seed)
    except ValueError as error:
        raise ConfigError(
            f"train.init: {init} is not the beginning of this run's first stage ({error})"
        ) from error
    _begin(config, net, out)


def _begin(config: RunConfig, net: NestedUNet, out: Path) -> None:
    """A run in `out` that starts from `net` and has seen no image."""
    state = {
        "images_seen": 0,
        "steps": 0,
        "skipped": 0,
        "skipped_in_a_row": 0,
        "seconds": 0.0,
        "config": config.model_dump(mode="json"),
    }
    snapshot = checkpoint.Snapshot(
        state,
        weights=net.state_dict(),
        ema=dict(net.named_parameters()),
        optimizer={},
        tracks=PowerEma(net, config.train.ema_power).state(),
    )
    # The config makes the folder a run, so it comes last: no run without its weights.
    checkpoint.save(out / "checkpoints", snapshot, keep=1)
    write_atomically(out / "config.yaml", lambda file: file.write(to_yaml(config).encode()))


def _new_data(config: RunConfig, data: str | None) -> list[str]:
    """The changes that put a run on other data: a copy of its set, or what `_sourced` finds."""
    if data is None:
        return []
    path = f"data.path={json.dumps(absolute(data))}"
    return [path] if config.data.source == "fluent-emoji" else ["data.source=folder", path]


def _sourced(config: RunConfig, data: str | None) -> RunConfig:
    """The config of a grown run, with what its data was found to be; frames need videos."""
    if config.data_frames and config.data.source not in VIDEO_SOURCES and data is None:
        raise ConfigError(
            f"the new level has {config.data_frames} frames, but the run was trained on pictures "
            f"(data.source={config.data.source}): give videos with --data"
        )
    return with_source(config)


def _with_level(config: RunConfig, level: LevelConfig) -> RunConfig:
    """The config with a level on top and one stage of training that has all levels."""
    last = config.train.stages[-1]
    levels = (*config.model.levels, level)
    stage = StageConfig(
        levels=len(levels), images=last.images, batch_size=last.batch_size, lr=last.lr
    )
    data = config.model_dump(mode="json")
    data["name"] = f"{config.name}-{level.size}"
    data["model"]["levels"] = [level.model_dump(mode="json") for level in levels]
    if (data["data"]["side"] or 0) % (level.side * config.pixels_per_side):
        data["data"]["side"] = None  # pictures of the finest level's side, as ever
    if level.frames is not None:
        data["data"]["augment"] = 0.0  # what it does to pictures, it does not do to clips
    data["train"]["stages"] = [stage.model_dump(mode="json")]
    data["train"].update(init=None, init_levels=len(config.model.levels), averaged=None)
    for values in (
        data["process"]["weighting"],
        data["process"]["level_weights"],
        data["sampling"]["guidance"],
        data["sampling"]["threshold"],
    ):
        if len(values) > 1:  # one for each level: the new one takes the finest one's
            values.append(values[-1])
    return from_dict(data, where=f"a level of {level.size}")


def next_level(finest: LevelConfig, side: int) -> LevelConfig:
    """The paper's pattern for a finer level: widths double inwards, the last block is saved.

    Around S64 this gives exactly the levels of Appendix A. Where half of a width is no multiple of
    32, the next larger one is taken.

    Raises:
        ConfigError: `side` is not the finest side times a power of two.
    """
    halvings = _halvings("--to", side, finest.side)
    inner, blocks = finest.widths[0], finest.blocks[0]
    return LevelConfig(
        side=side,
        frames=finest.frames,
        widths=tuple(32 * -(-inner // (32 * 2 ** (halvings - i))) for i in range(halvings + 1)),
        blocks=(*[blocks] * halvings, max(blocks - 1, 0)),
        attention=(0,) * (halvings + 1),
        heads=finest.heads,
        patch=finest.patch,
        micro=tuple(_rescaled(micro, side) for micro in finest.micro),
        shift_ratio=finest.shift_ratio * side / finest.side,
        shift_power=finest.shift_power,
    )


def next_frames(finest: LevelConfig, frames: int) -> LevelConfig:
    """The paper's pattern for a level with more frames: one width, attention over frames at each.

    Around S64, for 16 frames, it is MDM-S64T16 (Appendix A). The schedule's shift there is 4 at
    the same side: the root of the factor in numbers, as that of a level finer in space is. So 16
    frames have a quarter of the signal to noise, whatever the power of the finest level's shift.

    Raises:
        ConfigError: `frames` is no power of two times those of the finest level (1 of a picture).
    """
    halvings = _halvings("--frames", frames, finest.frames or 1)
    blocks, power = finest.blocks[0], finest.shift_power
    root = 2 ** (halvings / 2 / power) if power else 1.0  # a power of 0 shifts nothing
    return LevelConfig(
        side=finest.side,
        frames=frames,
        widths=(finest.widths[0],) * (halvings + 1),
        blocks=(*[blocks] * halvings, max(blocks - 1, 0)),
        attention=(0,) * (halvings + 1),
        halve_frames=(True,) * halvings,
        frame_attention=(*[1] * halvings, 0),
        heads=finest.heads,
        patch=finest.patch,
        micro=finest.micro,
        shift_ratio=finest.shift_ratio * root,
        shift_power=power,
    )


def _halvings(option: str, asked: int, finest: int) -> int:
    """How often `asked` is to be halved to be `finest`."""
    count = (asked // finest).bit_length() - 1
    if asked <= finest or finest * 2**count != asked:
        wanted = ", ".join(str(finest * 2**n) for n in (1, 2, 3))
        raise ConfigError(f"{option} {asked}: give {finest} times a power of two ({wanted}, ...)")
    return count


def _rescaled(micro: MicroConfig, side: int) -> MicroConfig:
    """The same condition on a level of another side, as the released models have it."""
    return micro if micro.ceiling is None else MicroConfig(name=micro.name, ceiling=float(side))
