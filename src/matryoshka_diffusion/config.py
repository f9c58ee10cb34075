"""Every knob of a run, as frozen data.

A `RunConfig` says all that a training run depends on: the nest of levels, the diffusion process,
the data, the text encoder, the training stages and the sampling defaults. It is read from and
written to YAML, it refuses what it does not know (with the nearest path that exists), and it is
never written to after it was built. This file imports no torch.
"""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

UNIFORM = 12**-0.5
"""The length of the plain mean over all of the training: averages are shorter than this 0.2887."""

Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
SLOWEST_FPS, FASTEST_FPS = 0.01, 1000.0  # of the clips that are written
WrittenFps = Annotated[float, Field(ge=SLOWEST_FPS, le=FASTEST_FPS)]
AverageLength = Annotated[float, Field(gt=0.0, lt=UNIFORM)]

ScheduleName = Literal["cosine", "squared-cosine", "linear-beta", "truncated-cosine"]
Prediction = Literal["x0", "eps", "v"]
WeightingName = Literal["eps", "v", "v_clipped", "min_snr", "sigmoid"]
InputScaling = Literal["none", "std", "analytic"]
Threshold = Literal["none", "clip", "dynamic"]
SamplerName = Literal["ddpm", "ddim", "dpmpp-2m"]
GridName = Literal["trailing", "log-snr", "released"]
Pixels = Literal["symmetric", "released"]
Crop = Literal["centre", "random"]
ClipStart = Literal["start", "fixed", "random"]
SourceName = Literal[
    "openmoji",
    "fashion-mnist",
    "folder",
    "shards",
    "parquet",
    "datasets",
    "clips",
    "fluent-emoji",
]
VIDEO_SOURCES: tuple[SourceName, ...] = ("clips", "fluent-emoji")
EncoderName = Literal["minilm", "t5"]


class UsageError(ValueError):
    """Something was asked for that cannot be; the message says what can (exit status 2)."""


class ConfigError(UsageError):
    """A configuration that cannot be used; the message names the path and the remedy."""


class Strict(BaseModel):
    """Base of all configs: frozen, no unknown keys, no silent conversion between types."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_none(cls, data: Any) -> Any:
        """The text 'None' is a typing slip, not a value: refuse it instead of guessing."""
        if isinstance(data, Mapping):
            for key, value in data.items():
                _refuse_none_as_text(cls, str(key), value)
        return data


class MicroConfig(Strict):
    """A scalar the level is conditioned on, such as the original size of the picture (SDXL).

    With a `ceiling` the value is clamped to it (the released `scale:64`); without one it is
    multiplied by 1000.
    """

    name: Annotated[str, Field(pattern=r"^[a-z_]+$")]
    ceiling: PositiveFloat | None = None


class LevelConfig(Strict):
    """One doll of the nest: what a level of the pyramid looks like and which UNet denoises it.

    `widths`, `blocks` and `attention` run from the level's own resolution down, one entry after
    each halving: channels, residual blocks on the way down (the way up has one more), and
    attention layers after each block. `halve` says of each step from one width to the next
    whether it halves the side; empty means that all do.

    A level with `frames` denoises clips of so many. `halve_frames` says of each step whether it
    halves these, instead of the side, and `frame_attention` is the layers of attention over frames
    after each block; empty means none.
    """

    side: PositiveInt
    frames: PositiveInt | None = None
    widths: tuple[PositiveInt, ...]
    blocks: tuple[Natural, ...]
    attention: tuple[Natural, ...]
    halve: tuple[bool, ...] = ()
    halve_frames: tuple[bool, ...] = ()
    frame_attention: tuple[Natural, ...] = ()
    heads: PositiveInt = 8
    attention_mlp: bool = False
    middle: bool = False
    patch: PositiveInt = 1
    dropout: Share = 0.0
    input_scaling: InputScaling = "none"
    micro: tuple[MicroConfig, ...] = ()
    shift_ratio: PositiveFloat = 1.0
    shift_power: float = 1.0

    @property
    def size(self) -> str:
        """What the level is called: its side, after its frames where it has them ("16x64")."""
        return f"{self.side}" if self.frames is None else f"{self.frames}x{self.side}"

    @property
    def stem_side(self) -> int:
        """Side of the level's features after the pixel-unshuffle of its stem."""
        return self.side // self.patch

    @property
    def reduction(self) -> int:
        """What all halvings of the level together divide its side by."""
        return math.prod(self.stride(step) for step in range(len(self.widths) - 1))

    @property
    def core_side(self) -> int:
        """Side of the level's features after its last halving, where the coarser doll sits."""
        return self.stem_side // self.reduction

    @property
    def core_frames(self) -> int:
        """Frames of the level's features where the coarser doll sits; 1 in a level without."""
        return self.frames_at(len(self.widths) - 1)

    def stride(self, step: int) -> int:
        """What the step from the width of this index to the next one divides the side by."""
        halved = self.halve[step] if self.halve else self.frame_stride(step) == 1
        return 2 if halved else 1

    def frame_stride(self, step: int) -> int:
        """What the step from the width of this index to the next one divides the frames by."""
        return 2 if self.halve_frames and self.halve_frames[step] else 1

    def frames_at(self, index: int) -> int:
        """Frames of the features that have the width of this index; a picture is one."""
        return (self.frames or 1) // math.prod(self.frame_stride(step) for step in range(index))

    @model_validator(mode="after")
    def _shapes_agree(self) -> LevelConfig:
        if not self.widths:
            raise ValueError("widths needs at least one entry")
        for name in ("blocks", "attention"):
            if len(getattr(self, name)) != len(self.widths):
                raise ValueError(
                    f"{name} needs one entry for each of the {len(self.widths)} widths"
                )
        for name in ("halve", "halve_frames"):
            if getattr(self, name) and len(getattr(self, name)) != len(self.widths) - 1:
                raise ValueError(
                    f"{name} needs one entry for each of the {len(self.widths) - 1} steps between "
                    "widths, or none"
                )
        if self.frame_attention and len(self.frame_attention) != len(self.widths):
            raise ValueError(
                f"frame_attention needs one entry for each of the {len(self.widths)} widths, or "
                "none"
            )
        attentions = (self.attention, self.frame_attention or (0,) * len(self.widths))
        attending = [w for w, *counts in zip(self.widths, *attentions, strict=True) if any(counts)]
        attending += [self.widths[-1]] if self.middle else []
        for width in attending:
            if width % self.heads:
                raise ValueError(f"heads {self.heads} does not divide the attending width {width}")
        step = self.patch * self.reduction
        if self.side % step:
            raise ValueError(f"side {self.side} is not divisible by patch x halvings = {step}")
        return self

    @model_validator(mode="after")
    def _frames_agree(self) -> LevelConfig:
        if self.frames is None and (any(self.halve_frames) or any(self.frame_attention)):
            raise ValueError(
                "halve_frames and frame_attention: the level has no frames, set frames"
            )
        if any(map(all, zip(self.halve, self.halve_frames, strict=False))):
            raise ValueError(
                "halve and halve_frames: a step halves the side or the frames, not both; use two"
            )
        if (self.frames or 1) % 2 ** sum(self.halve_frames):
            raise ValueError(
                f"frames {self.frames} cannot be halved {sum(self.halve_frames)} times"
            )
        return self


class TextConfig(Strict):
    """How text features enter: projected to `width`, refined by `layers` of self-attention.

    `learned_null` is the embedding a dropped caption is replaced by; without one, the
    unconditional half of guidance is the empty caption (as the released models do it).
    """

    features: PositiveInt
    width: PositiveInt
    layers: Natural = 0
    heads: PositiveInt = 8
    masked: bool = True
    learned_null: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> TextConfig:
        if self.layers and self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class CoarseConfig(Strict):
    """What an upsampler starts from: a picture of `side`, which the coarsest level sees enlarged.

    In training it is D^r of the picture itself under noise of a time drawn evenly from 0 to
    `max_noise`, and the network is told that time (Appendix D.1; Saharia et al., 2022).
    """

    side: PositiveInt
    max_noise: Share = 1.0


class ModelConfig(Strict):
    """The nest: levels from coarse to fine, and what they share.

    `augment` tells the network how a picture was transformed (`data.augment`). With `coarse` it is
    an upsampler, the second half of a cascade.
    """

    levels: tuple[LevelConfig, ...]
    embedding: PositiveInt
    channels: PositiveInt = 3
    schedule: ScheduleName = "cosine"
    time_input: Literal["step", "log-snr"] = "step"
    data_std: PositiveFloat = 0.5
    text: TextConfig | None = None
    classes: Natural = 0
    augment: bool = False
    coarse: CoarseConfig | None = None

    @property
    def micro_names(self) -> frozenset[str]:
        """The micro-conditions that any level asks for."""
        return frozenset(micro.name for level in self.levels for micro in level.micro)

    def first(self, levels: int) -> ModelConfig:
        """The nest of the first `levels` levels."""
        return self.model_copy(update={"levels": self.levels[:levels]})

    @model_validator(mode="after")
    def _levels_nest(self) -> ModelConfig:
        if not self.levels:
            raise ValueError("levels needs at least one level")
        for index, level in enumerate(self.levels):
            for width in level.widths:
                if width % 32:
                    raise ValueError(f"levels[{index}].widths: {width} is not a multiple of 32")
        for index, (coarse, fine) in enumerate(zip(self.levels, self.levels[1:], strict=False), 1):
            if fine.side < coarse.side:
                raise ValueError(
                    f"levels[{index}].side is {fine.side}, smaller than levels[{index - 1}].side "
                    f"= {coarse.side}: list the levels from coarse to fine"
                )
            if fine.core_side != coarse.stem_side:
                raise ValueError(
                    f"levels[{index}] does not nest on levels[{index - 1}]: after its halvings it "
                    f"has side {fine.core_side}, but the coarser level starts at "
                    f"{coarse.stem_side}; change side, patch or the number of widths"
                )
            if fine.core_frames != (coarse.frames or 1) or (coarse.frames and not fine.frames):
                raise ValueError(
                    f"levels[{index}] does not nest on levels[{index - 1}]: after its halvings it "
                    f"has frames {fine.core_frames}, but the coarser level has "
                    f"{coarse.frames or 'none'}; change frames or halve_frames"
                )
            if fine.side % coarse.side:
                raise ValueError(
                    f"levels[{index}].side {fine.side} is no multiple of {coarse.side}"
                )
            if fine.middle:
                raise ValueError(
                    f"levels[{index}].middle: only the coarsest level has middle blocks; the "
                    "coarser dolls are the middle of a finer one"
                )
        if self.embedding % 8:
            raise ValueError("embedding must be a multiple of 8")
        return self

    @model_validator(mode="after")
    def _coarse_is_smaller(self) -> ModelConfig:
        side = self.levels[0].side
        if self.coarse and self.levels[-1].frames:
            raise ValueError("coarse: an upsampler draws pictures, but levels[-1] has frames")
        if self.coarse and (side <= self.coarse.side or side % self.coarse.side):
            raise ValueError(
                f"coarse.side is {self.coarse.side}, but levels[0].side = {side} must be a "
                "multiple of it and larger"
            )
        return self


class WeightingConfig(Strict):
    """The weight w(log-SNR) on the squared x-error of a level; see `diffusion.py`."""

    name: WeightingName = "v_clipped"
    clip: PositiveFloat = 10.0
    gamma: PositiveFloat = 5.0
    bias: float = 0.0


class ProcessConfig(Strict):
    """What the network predicts and how its errors are weighted.

    One entry of `weighting` or `level_weights` stands for every level; else one each. A level of
    weight 0 is not trained to predict: it is an input of the finer ones, and samplers take D^r of
    the finest estimate for its own (`denoiser.Pooled`). The finest level of a stage needs a weight.
    """

    prediction: Prediction = "x0"
    weighting: tuple[WeightingConfig, ...] = (WeightingConfig(),)
    level_weights: tuple[Weight, ...] = (1.0,)


class DataConfig(Strict):
    """Where the pictures come from.

    `path` is for what the user brings: a folder, a pattern of shards or parquet files, `hf:NAME`.
    `side` is that of the pictures before D^r makes the levels of them; by default the finest one's.

    `classes` are the names that the data was found to have; a run fills them in. `pixels` is how
    bytes become numbers: x / 127.5 - 1, or (x - 127) / 128 for weights of the paper's release.
    `crop` is where the square is cut along the longer side: in the middle, or somewhere else each
    time a picture is shown. `augment` is the share of pictures that each geometric transformation
    happens to; a network that is not told of it would draw such pictures. `held_out` is the share
    of pictures that are not trained on, whose loss is logged.

    Of a video, a clip is every `frame_stride`-th frame, after it was brought to `fps` frames per
    second (None: as it is). `clip` is where it begins: at the start of the video, at one random
    place for each video, or somewhere else each time it is shown. A model of pictures is shown the
    first frame of such a clip of `clip_frames` frames; for a model of clips, its finest level says
    how many there are.
    """

    source: SourceName
    path: str | None = None
    side: PositiveInt | None = None
    classes: tuple[str, ...] = ()
    crop: Crop = "centre"
    flip: bool = False
    augment: Share = 0.0
    pixels: Pixels = "symmetric"
    max_bad_fraction: Share = 0.01
    held_out: BelowOne = 0.0
    frame_stride: PositiveInt = 4
    fps: PositiveFloat | None = None
    clip: ClipStart = "random"
    clip_frames: PositiveInt = 16


class CodecConfig(Strict):
    """A frozen autoencoder between pictures and what the nest denoises: levels are those of codes.

    `path` is a folder with an `AutoencoderKL` of diffusers. `factor` is how many pixels, along each
    side, are one position of the codes. `weights` is a hash of the codec; a run fills it in.
    """

    path: str | None = None
    factor: PositiveInt = 4
    weights: str = ""


class EncoderConfig(Strict):
    """The frozen text encoder. `path` is a folder or hub id; MiniLM's package needs none."""

    name: EncoderName
    path: str | None = None
    max_tokens: PositiveInt = 32


GENTLE = ("freeze_coarse_images", "ramp_images")
"""What makes the start of a stage with new levels gentle."""


class StageConfig(Strict):
    """One stage of progressive training (Section 3.3): the first `levels` levels are active.

    `mix[r]` is the share of rows whose finest level is r (mixed-resolution training); empty
    means that every row has all active levels.

    A stage that adds levels may leave alone what was there before for its first
    `freeze_coarse_images`, and let the loss weights of the new levels rise evenly from 0 to
    `process.level_weights` over its first `ramp_images`.
    """

    levels: PositiveInt
    images: PositiveInt
    batch_size: PositiveInt
    lr: PositiveFloat
    mix: tuple[Share, ...] = ()
    freeze_coarse_images: Natural = 0
    ramp_images: Natural = 0

    @model_validator(mode="after")
    def _mix_sums_to_one(self) -> StageConfig:
        if self.mix and len(self.mix) != self.levels:
            raise ValueError(f"mix needs one share for each of the {self.levels} levels")
        if self.mix and abs(sum(self.mix) - 1.0) > 1e-6:
            raise ValueError(f"mix sums to {sum(self.mix):g}, not to 1")
        return self

    @model_validator(mode="after")
    def _gentle_start_fits(self) -> StageConfig:
        for name in GENTLE:
            if getattr(self, name) > self.images:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, more than the stage's {self.images} images"
                )
        return self


class LoraConfig(Strict):
    """Adapters of low rank on a model that stays as it is; see `nn/lora.py`.

    `alpha` over `rank` scales what they add; by default that is 1. `levels` are the indices of the
    levels that have them; empty means all. `maps` are the projections of attention layers, or all
    linear maps and 1 x 1 convolutions. `base` is a hash of the model's weights; a run fills it in.
    """

    rank: PositiveInt
    alpha: PositiveFloat | None = None
    levels: tuple[Natural, ...] = ()
    maps: Literal["attention", "all"] = "attention"
    base: str = ""


class TrainConfig(Strict):
    """How the weights are learnt. Lengths are counted in images seen, not in steps.

    `init` is a model to start from instead of random weights: a run or model folder, a released
    checkpoint or a shipped model, whose levels are the first ones of this run's. `init_levels` is
    how many levels have trained weights at the start, from there or from growing; further ones
    are new to the first stage. With `lora`, only adapters around `init` are trained.

    `recompute` are the levels (0 is the coarsest) whose features are computed again in the
    backward pass instead of kept: less memory, the same numbers, one more forward pass through
    them. `layout` is how features lie in memory. `compile` runs the network through torch.compile.

    `ema_power` are lengths of averages to keep beside the one that `ema_decay` is for, as shares
    of the training, below `UNIFORM`; 0.05 and 0.1 serve most. Snapshots of them, every
    `ema_snapshot_every_images` (by default 32 in a run), give an average of any length afterwards;
    docs/training.md says how well they match which. `averaged` is nothing to choose: `mdm ema`
    notes in a model's config which length the average has that its weights are.
    """

    stages: tuple[StageConfig, ...]
    seed: Natural = 0
    init: str | None = None
    init_levels: Natural = 0
    lora: LoraConfig | None = None
    optimizer: Literal["adam", "adamw"] = "adamw"
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    warmup_images: Natural = 0
    decay_share: Share = 0.0
    clip_norm: PositiveFloat = 1.0
    accumulate: PositiveInt = 1
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    layout: Literal["auto", "nchw", "channels_last"] = "auto"
    recompute: tuple[Natural, ...] = ()
    compile: bool = False
    ema_decay: Share = 0.9999
    ema_power: tuple[AverageLength, ...] = ()
    ema_snapshot_every_images: PositiveInt | None = None
    averaged: AverageLength | None = None
    condition_dropout: Share = 0.1
    log_every_images: PositiveInt = 2_000
    preview_every_images: Natural = 20_000
    checkpoint_every_images: PositiveInt = 10_000
    keep_checkpoints: PositiveInt = 2

    @property
    def images(self) -> int:
        """Images seen over all stages."""
        return sum(stage.images for stage in self.stages)

    @property
    def gives_averages(self) -> bool:
        """Whether a model's weights are averages over the training."""
        return self.ema_decay > 0.0 or self.averaged is not None

    @property
    def ema_snapshot_interval(self) -> int:
        """Images between two snapshots."""
        return self.ema_snapshot_every_images or -(-self.images // 32)

    def levels_before(self, stage: int) -> int:
        """How many levels have been trained when the stage of this index begins."""
        return self.stages[stage - 1].levels if stage else self.init_levels

    @model_validator(mode="after")
    def _stages_grow(self) -> TrainConfig:
        if not self.stages:
            raise ValueError("stages needs at least one stage")
        levels = [stage.levels for stage in self.stages]
        if levels != sorted(levels):
            raise ValueError(f"stages must not shrink the nest; their levels are {levels}")
        return self

    @model_validator(mode="after")
    def _adapters_have_a_model(self) -> TrainConfig:
        if self.lora is None:
            return self
        if self.init is None:
            raise ValueError("lora: adapters need a model to be put around; set init")
        levels = {stage.levels for stage in self.stages}
        if len(levels) > 1:
            raise ValueError("lora: stages that add levels would leave these untrained")
        if beyond := [level for level in self.lora.levels if level not in range(*levels)]:
            raise ValueError(f"lora.levels: there is no level {beyond[0]}; they count from 0")
        return self

    @model_validator(mode="after")
    def _gentle_stages_grow(self) -> TrainConfig:
        if self.init_levels > self.stages[0].levels:
            raise ValueError(f"init_levels is {self.init_levels}, more than stages[0].levels")
        for index, stage in enumerate(self.stages):
            asked = [name for name in GENTLE if getattr(stage, name)]
            if asked and not 0 < self.levels_before(index) < stage.levels:
                raise ValueError(
                    f"stages[{index}].{asked[0]}: the stage adds no levels to trained ones; "
                    "if the run starts from a smaller model, say of how many by init_levels"
                )
        return self


class BaseConfig(Strict):
    """The model whose pictures an upsampler starts from: a run or model folder, a shipped model.

    `hash` is that of its weights when the upsampler's training began; a run fills it in.
    """

    path: str
    hash: str = ""


class SamplingConfig(Strict):
    """Sampling defaults; tuples have one entry for every level or one each (coarse to fine).

    An upsampler has `coarse_noise`, the time of the noise that the coarse picture is given, and
    the `base` that draws that picture. Clips are written with `fps` frames per second, 0.01 to 1000
    (a sheet that moves has at most 90, which is what WebP holds).
    """

    sampler: SamplerName = "dpmpp-2m"
    steps: PositiveInt = 25
    grid: GridName = "trailing"
    guidance: tuple[float, ...] = (1.0,)
    guidance_interval: tuple[float, float] | None = None
    rescale: Share = 0.0
    threshold: tuple[Threshold, ...] = ("clip",)
    eta: Share = 0.0
    coarse_noise: Share | None = None
    base: BaseConfig | None = None
    fps: WrittenFps = 8.0

    @model_validator(mode="after")
    def _interval_is_one(self) -> SamplingConfig:
        if self.guidance_interval and self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError("guidance_interval needs a lower log-SNR before a higher one")
        return self

    @property
    def idle(self) -> frozenset[str]:
        """The settings that change no sample: those of another sampler, or of guidance unguided."""
        unguided = all(weight == 1.0 for weight in self.guidance)
        idle = {"eta": self.sampler != "ddim", "guidance_interval": unguided, "rescale": unguided}
        return frozenset(name for name, changes_nothing in idle.items() if changes_nothing)


class RunConfig(Strict):
    """Everything a run depends on. The resolved form lies in every run folder and checkpoint."""

    name: str
    model: ModelConfig
    process: ProcessConfig = ProcessConfig()
    data: DataConfig
    codec: CodecConfig | None = None
    encoder: EncoderConfig | None = None
    train: TrainConfig
    sampling: SamplingConfig = SamplingConfig()

    @property
    def pixels_per_side(self) -> int:
        """How many pixels, along each side, are one position of a level: 1 without a codec."""
        return 1 if self.codec is None else self.codec.factor

    @property
    def data_side(self) -> int:
        """Side in pixels of the pictures that the levels are made of."""
        return self.data.side or self.model.levels[-1].side * self.pixels_per_side

    @property
    def data_frames(self) -> int | None:
        """Frames of the clips that the levels are made of; None of pictures."""
        return self.model.levels[-1].frames

    @model_validator(mode="after")
    def _parts_agree(self) -> RunConfig:
        levels = len(self.model.levels)
        finest = self.model.levels[-1].side * self.pixels_per_side
        if self.data_side % finest:
            codes = "" if self.codec is None else f" in pixels ({self.codec.factor} for each code)"
            raise ValueError(
                f"data.side is {self.data_side}, no multiple of the finest level's side{codes}, "
                f"{finest}"
            )
        deepest = self.train.stages[-1].levels
        if deepest > levels:
            raise ValueError(
                f"train.stages[-1].levels is {deepest}, but model.levels has {levels} entries"
            )
        if unknown := [place for place in self.train.recompute if place >= levels]:
            raise ValueError(
                f"train.recompute names level {unknown[0]}, but model.levels has {levels} entries, "
                f"0 to {levels - 1}"
            )
        per_level = {
            "process.weighting": self.process.weighting,
            "process.level_weights": self.process.level_weights,
            "sampling.guidance": self.sampling.guidance,
            "sampling.threshold": self.sampling.threshold,
        }
        for path, values in per_level.items():
            if len(values) not in (1, levels):
                raise ValueError(f"{path} has {len(values)} entries; give 1 or {levels}")
        self._every_stage_learns()
        self._coarse_agrees()
        bounded = [name for name in self.sampling.threshold if name != "none"]
        if self.codec is not None and bounded:
            raise ValueError(
                f"sampling.threshold is {bounded[0]}, but codes are not in [-1, 1] as pixels are: "
                "with a codec give none for every level (--set sampling.threshold=[none])"
            )
        if self.model.text is not None and self.model.classes:
            raise ValueError(
                "model.text and model.classes: a run has captions or classes, not both"
            )
        if self.data.augment and not self.model.augment:
            raise ValueError(
                f"data.augment is {self.data.augment:g}, but the network is not told how pictures "
                "were transformed and would draw such ones: add --set model.augment=true (a model "
                "that was trained without it cannot have it: set data.augment=0)"
            )
        if self.data_frames and (self.codec is not None or self.data.augment):
            name = "data.augment" if self.codec is None else "codec"
            raise ValueError(
                f"{name} is for pictures, but model.levels[-1] has frames: leave it away"
            )
        if (self.model.text is None) != (self.encoder is None):
            raise ValueError("model.text and encoder go together: give both or neither")
        return self

    def _every_stage_learns(self) -> None:
        """What the finest level predicts is what is drawn, so no stage may leave it untrained."""
        weights = self.process.level_weights
        weights = weights * len(self.model.levels) if len(weights) == 1 else weights
        for index, stage in enumerate(self.train.stages):
            if weights[stage.levels - 1] == 0.0:
                raise ValueError(
                    f"process.level_weights is 0 for level {stage.levels - 1}, the finest of "
                    f"train.stages[{index}]: give it a weight, or the stage all levels up to one "
                    "that has a weight"
                )
            idle = [
                level
                for level, share in enumerate(stage.mix)
                if share and not any(weights[: level + 1])
            ]
            if idle:
                raise ValueError(
                    f"train.stages[{index}].mix gives rows to level {idle[0]} at most, whose "
                    "process.level_weights are 0: they would teach nothing"
                )

    def _coarse_agrees(self) -> None:
        coarse, noise = self.model.coarse, self.sampling.coarse_noise
        if coarse is not None and self.codec is not None:
            raise ValueError("model.coarse and codec: an upsampler is given pictures, not codes")
        if (coarse is None) != (noise is None):
            raise ValueError(
                "model.coarse and sampling.coarse_noise go together: "
                + ("this model takes no coarse picture" if coarse is None else "give a time")
            )
        if coarse is not None and noise is not None and noise > coarse.max_noise:
            raise ValueError(
                f"sampling.coarse_noise is {noise:g}, but the upsampler is trained up to "
                f"model.coarse.max_noise = {coarse.max_noise:g}"
            )
        if coarse is None and self.sampling.base is not None:
            raise ValueError("sampling.base: this model takes no coarse picture, it has no base")


class CodecRunConfig(Strict):
    """The training of a small autoencoder on pictures of `side`: an `AutoencoderKL` of diffusers.

    Codes have `channels` numbers a position. `widths` are the channels of the network from the
    pictures down; each step to the next halves the side. `blocks` are the encoder's residual
    blocks at each width, of which the decoder has one more. `norm_groups` is the groups of group
    norms: few, because the first widths are small. The error is the absolute one of a pixel plus
    `square_weight` times the squared one. `kl_weight` is on the divergence of a picture's codes
    from N(0, 1), summed over its codes, beside the error, summed over its pixels. Lengths are
    counted in images seen.
    """

    name: str
    data: DataConfig
    side: PositiveInt
    channels: PositiveInt = 4
    widths: tuple[PositiveInt, ...] = (16, 32, 64)
    blocks: PositiveInt = 1
    norm_groups: PositiveInt = 2
    square_weight: Weight = 1.0
    kl_weight: Weight = 1e-6
    images: PositiveInt
    batch_size: PositiveInt = 8
    lr: PositiveFloat = 2e-3
    seed: Natural = 0
    warmup_images: Natural = 1_000
    decay_share: Share = 0.5
    clip_norm: PositiveFloat = 1.0
    log_every_images: PositiveInt = 1_000
    checkpoint_every_images: PositiveInt = 5_000

    @property
    def factor(self) -> int:
        """How many pixels, along each side, are one position of the codes."""
        return 2 ** (len(self.widths) - 1)

    @model_validator(mode="after")
    def _sides_divide(self) -> CodecRunConfig:
        if not self.widths or self.side % self.factor:
            raise ValueError(
                f"side {self.side} cannot be halved once for each of the {len(self.widths)} widths "
                "but the first"
            )
        if odd := [width for width in self.widths if width % self.norm_groups]:
            raise ValueError(
                f"widths: {odd[0]} is not a multiple of norm_groups, {self.norm_groups}"
            )
        return self

    @model_validator(mode="after")
    def _data_is_pictures_alone(self) -> CodecRunConfig:
        if self.data.side is not None:
            raise ValueError(f"data.side is {self.data.side}: a codec has side, leave this away")
        if self.data.classes:
            raise ValueError("data.classes: a codec is trained on pictures alone, leave this away")
        return self


# --- reading and writing ---------------------------------------------------------------------

Config = TypeVar("Config", RunConfig, CodecRunConfig)
"""What is read from YAML and changed by `--set`."""


def to_yaml(config: RunConfig | CodecRunConfig) -> str:
    """The config as YAML text that `from_yaml` reads back to an equal value."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def from_yaml(text: str, *, where: str = "config") -> RunConfig:
    """Parse YAML text; `where` names its origin in errors.

    Raises:
        ConfigError: bad YAML, a duplicate or unknown key, a wrong type, inconsistent levels.
    """
    return _parse(RunConfig, text, where)


def from_dict(data: Mapping[Any, Any], *, where: str = "config") -> RunConfig:
    """Validate a plain mapping. Raises `ConfigError` as `from_yaml` does."""
    return _validate(RunConfig, data, where)


def _parse(kind: type[Config], text: str, where: str) -> Config:
    data = _load_yaml(text, where)
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected keys such as model and train, found no mapping")
    return _validate(kind, data, where)


def _validate(kind: type[Config], data: Mapping[Any, Any], where: str) -> Config:
    try:
        return kind.model_validate(_tuples(data))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error, kind)}") from error
    except RecursionError as error:  # a YAML anchor can hold itself
        raise ConfigError(f"{where}: a value contains itself") from error


def _load_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # `!!int x`, `[[[[...`
        raise ConfigError(f"{where}: {_one_line(error)}") from error


def _tuples(data: Any) -> Any:
    """Lists as tuples all the way down: strict types take nothing else."""
    if isinstance(data, Mapping):
        return {key: _tuples(value) for key, value in data.items()}
    return tuple(_tuples(value) for value in data) if isinstance(data, list | tuple) else data


def load_config(path: Path) -> RunConfig:
    """Read a config file. Raises `ConfigError`, also if the file is missing or no text."""
    return _parse(RunConfig, _read_text(path), str(path))


def load_codec_run(path: Path) -> CodecRunConfig:
    """Read the config file of a codec's training. Raises `ConfigError` as `load_config` does."""
    return _parse(CodecRunConfig, _read_text(path), str(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({_one_line(error)})") from error


def override(config: Config, assignments: list[str]) -> Config:
    """Apply `path.to.key=value` assignments, where a value is YAML and `levels.1` an index.

    Raises:
        ConfigError: no `=`, a path that does not exist (with the nearest that does), bad value.
    """
    data = config.model_dump(mode="json")
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"--set {assignment}: write path.to.key=value")
        _assign(data, path.strip(), _load_yaml(text, f"--set {assignment}"))
    return _validate(type(config), data, "--set")


def _assign(data: Any, path: str, value: Any) -> None:
    """Set `path` (dots and [indices]) inside nested dicts and lists; the path must exist."""
    keys = path.replace("[", ".").replace("]", "").split(".")
    node = data
    for depth, key in enumerate(keys):
        is_number = isinstance(node, list) and re.fullmatch("-?[0-9]{1,4}", key)
        index: Any = int(key) if is_number else key
        missing = not isinstance(node, dict | list) or (
            index not in node if isinstance(node, dict) else not _is_index(index, node)
        )
        if missing:
            raise ConfigError(f"--set {path}: unknown key{_nearest(path, _paths(data))}")
        if depth == len(keys) - 1:
            node[index] = value
        else:
            node = node[index]


def _is_index(index: Any, node: list[Any]) -> bool:
    return isinstance(index, int) and -len(node) <= index < len(node)


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that refuses a key given twice (plain YAML keeps the last in silence)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            if isinstance(key, Hashable):  # what is not, the base class refuses
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """A safe YAML writer that quotes what `_Loader` would take for a number."""


for _kind in (_Loader, _Dumper):  # YAML 1.1 reads 1e-3 (no dot) as text; everyone means a number
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


# --- errors people can act on ----------------------------------------------------------------


def _refuse_none_as_text(owner: type[BaseModel], key: str, value: Any) -> None:
    if value in ("None", "none", "null", "Null") and key in owner.model_fields:
        allowed = _literals(owner.model_fields[key].annotation)
        if value not in allowed:
            raise ValueError(f"{key} is the text {value!r}; write null (YAML) for no value")


def _literals(annotation: Any) -> tuple[Any, ...]:
    """All values of `Literal` types inside an annotation."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return tuple(value for part in typing.get_args(annotation) for value in _literals(part))


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first problems of a pydantic error, one clause each, with the nearest valid path."""
    clauses = []
    for problem in error.errors()[:3]:
        path = _render(problem["loc"])
        if problem["type"] == "extra_forbidden":
            clauses.append(f"{path}: unknown key{_nearest(path, _schema_paths(kind))}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            clauses.append(f"{path}: {message}" if path else message)
    return "; ".join(clauses)


def _render(location: tuple[int | str, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return text.removeprefix(".")


def _nearest(path: str, candidates: Iterator[str]) -> str:
    """' (did you mean X?)': the closest path, by the spelling of its last key and of the whole."""

    def closeness(candidate: str) -> float:
        leaves = (text.rsplit(".", 1)[-1] for text in (path, candidate))
        return _similarity(*leaves) + _similarity(path, candidate)

    best = max(candidates, key=closeness, default=None)
    return f" (did you mean {best}?)" if best else ""


def _similarity(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _paths(data: Any, prefix: str = "") -> Iterator[str]:
    """Every path of a nested mapping, such as model.levels[1].widths."""
    items: Any = ()
    if isinstance(data, dict):
        items = ((f"{prefix}.{key}".removeprefix("."), value) for key, value in data.items())
    elif isinstance(data, list):
        items = ((f"{prefix}[{index}]", value) for index, value in enumerate(data))
    for path, value in items:
        yield path
        yield from _paths(value, path)


def _schema_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every path a config may have; the levels and stages are written with index 0."""
    for name, field in model.model_fields.items():
        path = f"{prefix}.{name}".removeprefix(".")
        yield path
        for inner, is_sequence in _models_in(field.annotation):
            yield from _schema_paths(inner, f"{path}[0]" if is_sequence else path)


def _models_in(annotation: Any, sequence: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, sequence
    origin = typing.get_origin(annotation)
    if origin is tuple or origin is types.UnionType or origin is typing.Union:
        for part in typing.get_args(annotation):
            yield from _models_in(part, sequence or origin is tuple)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
