"""Every setting of a run, as frozen data: the schema and its cross-checks, nothing else.

Lengths are in images seen. `configfile.py` reads and writes YAML. This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field

from matryoshka_diffusion.modelconfig import CoarseConfig as CoarseConfig
from matryoshka_diffusion.modelconfig import (
    CodecConfig,
    Count,
    EncoderConfig,
    FeaturesConfig,
    Floors,
    ModelConfig,
    Name,
    Natural,
    PerLevel,
    Positive,
    Share,
    Strict,
)
from matryoshka_diffusion.modelconfig import LevelConfig as LevelConfig
from matryoshka_diffusion.modelconfig import TextConfig as TextConfig

UNIFORM = 12**-0.5  # length (0.2887) of a plain mean over a training: the bound of EMA lengths
SLOWEST_FPS, FASTEST_FPS = 0.01, 1000.0  # frames per second of written clips
PER_LEVEL = (
    *(("process", "weighting"), ("process", "level_weights")),
    *(("sampling", "guidance"), ("sampling", "threshold"), ("sampling", "wake"), ("train", "wake")),
)  # settings with one entry for all levels, or one for each
GENTLE = ("freeze_coarse_images", "ramp_images")  # of a stage: a gentle start of its new levels


Weight = Annotated[float, Field(ge=0.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
AverageLength = Annotated[float, Field(gt=0.0, lt=UNIFORM)]
Fps = Annotated[float, Field(ge=SLOWEST_FPS, le=FASTEST_FPS)]
Suffix = Annotated[str, Field(pattern=r"^\.[^/]+$")]  # such as .txt

Prediction = Literal["x0", "eps", "v"]
WeightingName = Literal["eps", "v", "v_clipped", "min_snr", "sigmoid"]
Threshold = Literal["none", "clip", "dynamic"]
SamplerName = Literal["ddpm", "ddim", "dpmpp-2m"]
GridName = Literal["trailing", "log-snr", "released"]
Pixels = Literal["symmetric", "released"]
Captions = Literal["lines", "whole", "none"]
Crop = Literal["centre", "random"]
ClipStart = Literal["start", "fixed", "random"]
KnownImages = Literal["openmoji", "emoji-styles", "fashion-mnist"]
VideoSource = Literal["clips", "fluent-emoji"]
SourceName = Literal[KnownImages, VideoSource, "folder", "shards", "parquet", "datasets"]
VIDEO_SOURCES: tuple[SourceName, ...] = get_args(VideoSource)


class UsageError(ValueError):
    """A request that cannot be met; the message says what can (exit status 2)."""


class ConfigError(UsageError):
    """A config that cannot be used; the message names the path and the remedy."""


class WeightingConfig(Strict):
    """The weight w(log-SNR) on the squared x-error of a level (`diffusion.py`)."""

    name: WeightingName = "v_clipped"
    clip: Positive = 10.0
    gamma: Positive = 5.0
    bias: float = 0.0


class ProcessConfig(Strict):
    """The prediction of the network, and the weights of its errors.

    A level of weight 0 learns only to help the finer ones; samplers take D^r of the finest estimate
    in its place (`denoiser.Pooled`).
    """

    prediction: Prediction = "x0"
    weighting: PerLevel[WeightingConfig] = (WeightingConfig(),)
    level_weights: PerLevel[Weight] = (1.0,)


class DataIdentity(Strict):
    """Identity of a data set."""

    images: Count
    keys: str  # hash of the names of all images, in order
    conditions: str  # hash of their captions and labels
    shapes: str | None = None  # hash of their shapes; None: all are squares


class ColumnsConfig(Strict):
    """Columns of a table or keys of JSON, by name; None: the usual names, "": none."""

    image: str | None = None  # or the column of file names; in shards, the suffix of images
    caption: str | None = None
    label: str | None = None


class DataPlace(Strict):
    """The place of images or videos, and the names in it."""

    source: SourceName = "folder"
    path: Name | None = None  # folder, pattern of shards or parquet files, or hf:NAME
    split: Name | None = None  # part of the data that is read; "all": everything
    columns: ColumnsConfig = ColumnsConfig()
    captions: Captions = "lines"  # of a text file: one a line, or one in the whole file
    caption_suffixes: tuple[Suffix, ...] = ()  # beside images; empty: .txt, .caption or .json


class MixedData(DataPlace):
    """One of several data sets of a run; `share` is relative to those of the others."""

    share: Positive


class DataConfig(DataPlace):
    """The source of images or videos. A clip is every `frame_stride`-th frame of a video."""

    mix: tuple[MixedData, ...] = ()  # several data sets in place of the one at `path`
    side: Count | None = None  # of the images that D^r makes the levels of; None: the finest side
    classes: tuple[str, ...] = ()  # class names in order; empty: the data's, which a run fills in
    identity: DataIdentity | None = None  # of the data; a run fills it in
    shapes: Literal["square", "own"] = "square"  # own: images lose no more than the grid demands
    crop: Crop = "centre"  # what the shape leaves of an image; random: another place each time
    flip: bool = False
    augment: Share = 0.0  # probability of each geometric transformation
    pixels: Pixels = "symmetric"  # x / 127.5 - 1; released: (x - 127) / 128
    max_bad_fraction: Share = 0.01
    held_out: BelowOne = 0.0  # share of images without training, whose loss is logged
    frame_stride: Count = 4
    fps: Positive | None = None  # frames per second before the stride; None: the video's own
    clip: ClipStart = "random"  # its start: the video's, one for each video, another each time
    clip_frames: Count = 16  # for a model of images, which takes the clip's first frame

    def problems(self) -> Iterator[str]:
        if self.mix and self.path is not None:
            yield "path and mix both name data: omit one of them"
        for name in ("split", "columns", "captions", "caption_suffixes") if self.mix else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                yield f"{name} has no effect beside mix: set data.mix[N].{name} of each part"


class StageConfig(Strict):
    """One stage of progressive training (Section 3.3): the first `levels` levels are active."""

    levels: Count
    images: Count
    batch_size: Count
    lr: Positive
    mix: tuple[Share, ...] = ()  # share of rows whose finest level is r; empty: all have all
    freeze_coarse_images: Natural = 0  # at first, train only the new levels
    ramp_images: Natural = 0  # at first, raise the loss weights of the new levels from 0

    def problems(self) -> Iterator[str]:
        if self.mix and len(self.mix) != self.levels:
            yield f"mix needs one share for each of the {self.levels} levels"
        if self.mix and abs(sum(self.mix) - 1.0) > 1e-6:
            yield f"mix sums to {sum(self.mix):g}, not to 1"
        for name in GENTLE:
            if (length := getattr(self, name)) > self.images:
                yield f"{name} is {length}, more than the stage's {self.images} images; set less"


class LoraConfig(Strict):
    """Low-rank adapters around a frozen model (`nn/lora.py`)."""

    rank: Count
    alpha: Positive | None = None  # alpha / rank scales the adapters; None: 1
    levels: tuple[Natural, ...] = ()  # indices of adapted levels; empty: all
    maps: Literal["attention", "all"] = "attention"  # all: linear maps and 1 x 1 convolutions
    base: str = ""  # hash of the model's weights; a run fills it in


class PerceptualConfig(Strict):
    """A loss in the features of a frozen network (`runs/perceptual.py`)."""

    network: Literal["effnet-lite0"] = "effnet-lite0"
    weight: Positive = 0.1  # beside the finest level's weighted squared error
    log_snr_above: float = 0.0  # of the finest level: only rows with less noise count
    weights: str = ""  # hash of the network; a run fills it in


class TrainConfig(Strict):
    """The training of the weights."""

    stages: tuple[StageConfig, ...] = Field(min_length=1)
    seed: Natural = 0
    init: Name | None = None  # model to start from; its levels are the first ones of this run
    init_levels: Natural = 0  # levels that are trained at the start
    lora: LoraConfig | None = None  # train only adapters around `init`
    perceptual: PerceptualConfig | None = None  # a further loss of the finest level
    optimizer: Literal["adam", "adamw"] = "adamw"
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    eps: Positive = 1e-8
    weight_decay: Weight = 0.0
    warmup_images: Natural = 0
    decay_share: Share = 0.0
    lr_per_level: bool = False  # warm-up and decay_share are of each level's life, not the run's
    clip_norm: Positive = 1.0
    accumulate: Count = 1
    threads: Literal["auto"] | Count = "auto"  # on a CPU: parts of a step at a time
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    layout: Literal["auto", "nchw", "channels_last"] = "auto"  # of features in memory
    recompute: tuple[Natural, ...] = ()  # levels to recompute in the backward pass: less memory
    compile: bool = False
    deterministic: bool = False  # on a GPU: the same bits in every run
    ema_decay: Share = 0.9999
    ema_power: tuple[AverageLength, ...] = ()  # further averages (docs/training-settings.md)
    ema_snapshot_every_images: Count | None = None  # None: 32 snapshots in a run
    averaged: AverageLength | None = None  # length that a model's average has; of `mdm ema`
    condition_dropout: Share = 0.1
    whiten_captions: bool = False  # in the initial projection of text, where there is text
    wake: Floors = None  # log-SNR from which samples have a level; None: always
    log_every_images: Count = 2_000
    preview_every_images: Natural = 20_000
    eval_every_images: Natural = 0  # FD and prompt retrieval of 256 samples; 0: never
    checkpoint_every_images: Count = 10_000
    keep_checkpoints: Count = 2

    @property
    def images(self) -> int:
        """Images seen over all stages."""
        return sum(stage.images for stage in self.stages)

    @property
    def gives_averages(self) -> bool:
        """True if the model's weights are averages over the training."""
        return self.ema_decay > 0.0 or self.averaged is not None

    @property
    def ema_snapshot_interval(self) -> int:
        """Images between two snapshots."""
        return self.ema_snapshot_every_images or -(-self.images // 32)

    def levels_before(self, stage: int) -> int:
        """The number of trained levels at the start of the stage of this index."""
        return self.stages[stage - 1].levels if stage else self.init_levels

    def problems(self) -> Iterator[str]:
        levels = [stage.levels for stage in self.stages]
        if levels != sorted(levels):
            yield f"stages must not shrink the nest; their levels are {levels}"
        if self.init_levels > levels[0]:
            yield f"init_levels is {self.init_levels}, more than stages[0].levels"
        for index, stage in enumerate(self.stages):
            gentle = [name for name in GENTLE if getattr(stage, name)]
            if gentle and not 0 < self.levels_before(index) < stage.levels:
                place = f"stages[{index}].{gentle[0]}"
                yield f"{place}: no levels are new beside trained ones; omit it or set init_levels"
        if self.lora is not None:
            if self.init is None:
                yield "lora: adapters need a model; name it in place of the preset, or set init"
            if levels[-1] > levels[0]:
                yield "lora: stages that add levels would leave these untrained"
            if beyond := [level for level in self.lora.levels if level >= levels[0]]:
                yield f"lora.levels: there is no level {beyond[0]}; they count from 0"


class BaseConfig(Strict):
    """The model that draws the coarse images for an upsampler."""

    path: Name  # run or model folder, or shipped model
    hash: str = ""  # of its weights when the upsampler's training began; a run fills it in


class SamplingConfig(Strict):
    """Sampling defaults."""

    sampler: SamplerName = "dpmpp-2m"
    steps: Annotated[int, Field(gt=0, le=100_000)] = 25
    grid: GridName = "trailing"
    guidance: PerLevel[float] = (1.0,)
    guidance_interval: tuple[float, float] | None = None  # of the log-SNR
    guide: Name | None = None  # a weaker model that guidance leads away from; None: no condition
    rescale: Share = 0.0
    threshold: PerLevel[Threshold] = ("clip",)
    wake: Floors = None  # log-SNR from which a finer level works; None: always
    eta: Share = 0.0
    coarse_noise: Share | None = None  # time of the noise on an upsampler's coarse image
    base: BaseConfig | None = None
    fps: Fps = 8.0  # of written clips; a moving WebP sheet has at most 90

    @property
    def idle(self) -> frozenset[str]:
        """The settings without effect: eta without ddim, guidance's where nothing is guided."""
        unguided = all(weight == 1.0 for weight in self.guidance)
        idle = {"eta": self.sampler != "ddim", "guidance_interval": unguided, "rescale": unguided}
        idle["guide"] = unguided
        return frozenset(name for name, has_no_effect in idle.items() if has_no_effect)

    def problems(self) -> Iterator[str]:
        if self.guidance_interval and self.guidance_interval[0] >= self.guidance_interval[1]:
            yield "guidance_interval needs a lower log-SNR before a higher one"
        if self.grid == "released" and self.steps > 1_000:
            few = "the grid released has 1,000 times: take fewer steps, or the grid trailing"
            yield f"steps is {self.steps:,}, and {few}"


class RunConfig(Strict):
    """Everything that a run depends on; its resolved form lies in the run folder."""

    name: str
    model: ModelConfig
    process: ProcessConfig = ProcessConfig()
    data: DataConfig
    codec: CodecConfig | None = None
    features: FeaturesConfig | None = None
    encoder: EncoderConfig | None = None
    train: TrainConfig
    sampling: SamplingConfig = SamplingConfig()
    attribution: str | None = None  # to be named beside samples, as the data's licence demands

    @property
    def pixels_per_side(self) -> int:
        """Pixels along a side for each position of a level: 1 without a codec."""
        return 1 if self.codec is None else self.codec.factor

    @property
    def data_side(self) -> int:
        """Side in pixels of the images that the levels are made of."""
        return self.data.side or self.model.levels[-1].side * self.pixels_per_side

    @property
    def data_channels(self) -> int:
        """Channels of the images that the levels are made of; a codec takes colour."""
        return self.model.channels if self.codec is None else 3

    @property
    def data_frames(self) -> int | None:
        """Frames of the clips that the levels are made of; None for images."""
        return self.model.levels[-1].frames

    def problems(self) -> Iterator[str]:
        model, data, sampling = self.model, self.data, self.sampling
        levels, side = len(model.levels), model.levels[-1].side * self.pixels_per_side
        if self.data_side % side:
            yield f"data.side is {self.data_side}, no multiple of the finest side in pixels, {side}"
        if (deepest := self.train.stages[-1].levels) > levels:
            yield f"train.stages[-1].levels is {deepest}, but model.levels has {levels} entries"
        if unknown := [level for level in self.train.recompute if level >= levels]:
            yield f"train.recompute names level {unknown[0]}, but the last level is {levels - 1}"
        for part, name in PER_LEVEL:
            values = getattr(getattr(self, part), name)
            if values is not None and len(values) not in (1, levels):
                yield f"{part}.{name} has {len(values)} entries; give 1 or {levels}"
        if sampling.wake or self.train.wake:
            yield from model.wake_problems(sampling.wake, self.train.wake)
        yield from self._untrained_levels()
        if model.text is not None and model.classes:
            yield "model.text and model.classes: a run has captions or classes; omit one"
        if (model.text is None) != (self.encoder is None):
            yield "model.text and encoder go together: set both or neither"
        if data.augment and not model.augment:
            yield "data.augment would show in samples: set model.augment=true, or data.augment=0"
        if bool(model.hidden) != (self.features is not None):
            yield "model.levels[0].features and features go together: set both or neither"
        if self.codec is not None and self.features is not None:
            yield "codec and features: a network of features sees images, not latents; omit one"
        pictures = self.codec is None and not self.data_frames and model.channels in (1, 3)
        if self.train.perceptual is not None and not pictures:
            seen = "images with 1 or 3 channels, not latents, clips or opacity"
            yield f"train.perceptual: its network looks at {seen}; omit it"
        measured = not self.data_frames and self.data_channels in (1, 3)
        if self.train.eval_every_images and not measured:
            yield "train.eval_every_images: its network looks at images in grey or colour; omit it"
        if self.data_frames and (self.codec is not None or data.augment):
            name = "data.augment" if self.codec is None else "codec"
            yield f"{name} is for images, but model.levels[-1] has frames: omit it"
        yield from self._bound_to_squares()
        if self.codec is not None and {*sampling.threshold} != {"none"}:
            yield "sampling.threshold is for pixels: with a codec, --set sampling.threshold=[none]"
        if model.coarse is None:
            for name in ("coarse_noise", "base"):
                if getattr(sampling, name) is not None:
                    yield f"sampling.{name} is for upsamplers: set model.coarse, or omit it"
        elif self.codec is not None:
            yield "model.coarse and codec: an upsampler takes images, not latents; omit one"
        elif sampling.coarse_noise is None:
            yield "model.coarse needs sampling.coarse_noise: set a time"
        elif sampling.coarse_noise > (limit := model.coarse.max_noise):
            yield f"sampling.coarse_noise is above model.coarse.max_noise = {limit:g}; set it lower"

    def _bound_to_squares(self) -> Iterator[str]:
        """Yield what takes squares only."""
        others = {"codec": self.codec, "features": self.features, "model.coarse": self.model.coarse}
        others["clips"] = self.data.source in VIDEO_SOURCES or self.data_frames
        others["data.augment, which turns images"] = self.data.augment
        others |= {f"train.{x}": getattr(self.train, x) for x in ("compile", "eval_every_images")}
        for name in filter(others.get, others if self.data.shapes == "own" else ()):
            yield f"data.shapes=own is not for {name}: omit one of them"

    def _untrained_levels(self) -> Iterator[str]:
        """Samples are what the finest level predicts, so no stage may leave it untrained.

        With `train.wake` a share of a mix is also that of times that only its levels see.
        """
        weights = (self.process.level_weights * len(self.model.levels))[: len(self.model.levels)]
        if (self.sampling.wake or self.train.wake) and not all(weights):
            yield "wake needs a loss of every level: set process.level_weights, or omit it"
        if self.model.hidden and not weights[0]:
            yield "process.level_weights is 0 for level 0, which no other gives features: set one"
        for index, stage in enumerate(self.train.stages):
            if weights[stage.levels - 1] == 0.0:
                level = f"level {stage.levels - 1}, the finest of train.stages[{index}]"
                yield f"process.level_weights is 0 for {level}: set a weight or add finer levels"
            if self.train.wake and not all(stage.mix):
                place = f"train.stages[{index}].mix[{stage.mix.index(0.0)}]"
                yield f"{place} is 0, but with train.wake some times are its own: set a share"
            for level, share in enumerate(stage.mix):
                if share and not any(weights[: level + 1]):
                    place = f"train.stages[{index}].mix[{level}]"
                    yield f"{place}: set 0; by process.level_weights these rows teach nothing"
