"""The nest as data: the levels, what they share, and the frozen networks beside them.

`config.py` has the rest of a run. This file imports no torch.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

T = TypeVar("T")


def _not_none(text: str) -> str:
    if text in ("None", "none", "null", "Null"):
        raise ValueError(f"{text!r} is text; write null (YAML) for no value")
    return text


Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]
LARGEST = 2**16  # channels or features; a config of a few bytes could ask for any number
MOST_LAYERS = 2_000
Width = Annotated[int, Field(gt=0, le=LARGEST, multiple_of=32)]
Positive = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, AfterValidator(_not_none)]

ScheduleName = Literal["cosine", "squared-cosine", "linear-beta", "truncated-cosine"]
InputScaling = Literal["none", "std", "analytic"]


def _in_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | int | float | Mapping) else value


PerLevel = Annotated[tuple[T, ...], BeforeValidator(_in_tuple)]
"""One entry for all levels, or one for each; a value alone is one entry."""
Floors = PerLevel[float] | None  # log-SNRs from which levels work


class Strict(BaseModel):
    """Base of all configs: frozen, without unknown keys, without conversion between types."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    def problems(self) -> Iterator[str]:
        """Yield what does not fit together; the first one refuses the config."""
        yield from ()

    @model_validator(mode="after")
    def _fits_together(self) -> Strict:
        for problem in self.problems():
            raise ValueError(problem)
        return self


class MicroConfig(Strict):
    """A scalar condition of a level, such as the original size of the image (SDXL)."""

    name: Annotated[str, Field(pattern=r"^[a-z_]+$")]
    ceiling: Positive | None = None  # clamps the value (released `scale:64`); None: times 1000
    usual: float | None = None  # of samples (released `aesthetic_score:0.5`); None: their side


class LevelConfig(Strict):
    """One level of the pyramid, and the UNet that denoises it.

    Tuples have one entry for each resolution of the UNet, from the level's own down. Those of
    `halve` and `halve_frames` are for the steps between; a step halves the side or the frames.
    """

    side: Count
    frames: Count | None = None  # of clips; None for images
    widths: tuple[Width, ...] = Field(min_length=1)  # channels
    blocks: tuple[Natural, ...]  # residual blocks on the way down; the way up has one more
    attention: tuple[Natural, ...]  # layers after each block
    halve: tuple[bool, ...] = ()  # empty: all that do not halve the frames
    halve_frames: tuple[bool, ...] = ()  # empty: none
    frame_attention: tuple[Natural, ...] = ()  # layers over frames after each block; empty: none
    heads: Count = 8
    attention_mlp: bool = False
    middle: bool = False
    patch: Count = 1
    dropout: Share = 0.0
    input_scaling: InputScaling = "none"
    micro: tuple[MicroConfig, ...] = ()
    features: Count | None = None  # channels of features in place of pixels (`features.py`)
    shift_ratio: Positive = 1.0
    shift_power: float = 1.0

    @property
    def size(self) -> str:
        """The level's name: "64", or "16x64" for 16 frames."""
        return f"{self.side}" if self.frames is None else f"{self.frames}x{self.side}"

    @property
    def shift(self) -> float:
        """The log-SNR by which the schedule of the level is below that of the nest."""
        return self.shift_power * math.log(self.shift_ratio)

    @property
    def stem_side(self) -> int:
        """Side of the features after the pixel-unshuffle of the stem."""
        return self.side // self.patch

    @property
    def core_side(self) -> int:
        """Side of the features after the last step, where the coarser level sits."""
        return self.stem_side // math.prod(self.stride(n) for n in range(len(self.widths) - 1))

    @property
    def core_frames(self) -> int:
        """Frames of the features where the coarser level sits; 1 for images."""
        return self.frames_at(len(self.widths) - 1)

    @property
    def layers(self) -> int:
        """Number of residual blocks and layers of attention, on the way down and up."""
        frames = self.frame_attention or (0,) * len(self.widths)
        parts = zip(self.blocks, self.attention, frames, strict=False)
        return sum((2 * blocks + 1) * (1 + one + other) for blocks, one, other in parts)

    def stride(self, step: int) -> int:
        """The factor by which the step from this width to the next divides the side."""
        return 2 if (self.halve[step] if self.halve else self.frame_stride(step) == 1) else 1

    def frame_stride(self, step: int) -> int:
        """The factor by which the step from this width to the next divides the frames."""
        return 2 if self.halve_frames and self.halve_frames[step] else 1

    def frames_at(self, index: int) -> int:
        """Frames of the features at the width of this index; 1 for images."""
        return (self.frames or 1) // math.prod(self.frame_stride(step) for step in range(index))

    def problems(self) -> Iterator[str]:
        count = len(self.widths)
        for name in ("blocks", "attention", "frame_attention", "halve", "halve_frames"):
            entries, wanted = len(getattr(self, name)), count - name.startswith("halve")
            if entries != wanted and (entries or name in ("blocks", "attention")):
                yield f"{name} has {entries} entries; {count} widths need {wanted}"
        layers = zip(self.attention, self.frame_attention or self.attention, strict=True)
        attending = [width for width, n in zip(self.widths, layers, strict=True) if any(n)]
        for width in (*attending, *self.widths[-1:] * self.middle):
            if width % self.heads:
                yield f"heads {self.heads} does not divide the attending width {width}"
        factor = self.patch * math.prod(self.stride(step) for step in range(count - 1))
        if self.side % factor:
            yield f"side {self.side} is not divisible by patch x halvings = {factor}"
        if self.frames is None and (any(self.halve_frames) or any(self.frame_attention)):
            yield "halve_frames and frame_attention are for clips: set frames"
        if any(map(all, zip(self.halve, self.halve_frames, strict=False))):
            yield "halve and halve_frames: a step halves the side or the frames; use two steps"
        if (self.frames or 1) % 2 ** sum(self.halve_frames):
            yield f"frames {self.frames} cannot be halved {sum(self.halve_frames)} times"


class TextConfig(Strict):
    """The way of text features into the network: a projection, then layers of self-attention."""

    features: Annotated[int, Field(gt=0, le=LARGEST)]
    width: Annotated[int, Field(gt=0, le=LARGEST)]
    layers: Natural = 0
    heads: Count = 8
    masked: bool = True
    learned_null: bool = True  # the embedding of a dropped caption; False: the empty caption

    def problems(self) -> Iterator[str]:
        if self.layers and self.width % self.heads:
            yield f"heads {self.heads} does not divide width {self.width}"


class CoarseConfig(Strict):
    """The input of an upsampler: an image of `side`, which the coarsest level sees enlarged.

    In training it is D^r of the image, noised at a time drawn evenly from 0 to `max_noise`, which
    the network receives (Appendix D.1; Saharia et al., 2022).
    """

    side: Count
    max_noise: Share = 1.0


class ModelConfig(Strict):
    """The nest: the levels from coarse to fine, and what they share."""

    levels: tuple[LevelConfig, ...] = Field(min_length=1)
    embedding: Annotated[int, Field(gt=0, le=LARGEST, multiple_of=8)]
    channels: Count = 3
    schedule: ScheduleName = "cosine"
    time_input: Literal["step", "log-snr"] = "step"
    data_std: Positive = 0.5
    text: TextConfig | None = None
    classes: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    augment: bool = False  # the network receives how `data.augment` transformed an image
    coarse: CoarseConfig | None = None  # of an upsampler, the second half of a cascade

    @property
    def hidden(self) -> int:
        """The number of coarsest levels that hold features, which no image shows: 0 or 1."""
        return int(self.levels[0].features is not None)

    @property
    def micro_names(self) -> frozenset[str]:
        """The micro-conditions of all levels."""
        return frozenset(self.usual_micro)

    @property
    def usual_micro(self) -> dict[str, float | None]:
        """The values that samples have for the micro-conditions of all levels; None: their side."""
        return {micro.name: micro.usual for level in self.levels for micro in level.micro}

    def first(self, levels: int) -> ModelConfig:
        """The nest of the first `levels` levels."""
        return self.model_copy(update={"levels": self.levels[:levels]})

    def channels_of(self, level: LevelConfig) -> int:
        """The channels of what a level denoises: of its features, or of the model's images."""
        return level.features or self.channels

    def floors(self, wake: Floors) -> tuple[float, ...]:
        """The log-SNR from which each level works.

        The coarsest level of pixels always does: it has no coarser image to begin from.
        """
        floors = wake or (-math.inf,)
        each = floors * len(self.levels) if len(floors) == 1 else floors
        return (*[-math.inf] * (self.hidden + 1), *each[self.hidden + 1 : len(self.levels)])

    def wake_problems(self, sampling: Floors, train: Floors) -> Iterator[str]:
        """Yield what is wrong with floors of log-SNR from which levels work.

        A level works only inside of coarser ones, and samples come from what training has shown.
        """
        for part, floors in (("sampling", sampling), ("train", train)):
            for place, (coarse, fine) in enumerate(itertools.pairwise(self._wakes(floors)), 2):
                if fine < coarse:
                    yield (
                        f"{part}.wake leaves level {place - 1} asleep under level {place}: raise "
                        f"the floor of level {place} by {coarse - fine:.4g}, or lower the other"
                    )
        if any(map(operator.lt, self._wakes(sampling), self._wakes(train))):
            yield "sampling.wake is below train.wake, where levels learn nothing: set it as high"

    def _wakes(self, floors: Floors) -> list[float]:
        """The log-SNR of the nest's schedule at which each level wakes but the first."""
        each = zip(self.floors(floors), self.levels, strict=False)
        return [floor + level.shift for floor, level in each][1:]

    def problems(self) -> Iterator[str]:
        layers = sum(level.layers for level in self.levels) + (self.text.layers if self.text else 0)
        if layers > MOST_LAYERS:
            yield f"levels: {layers:,} layers, and at most {MOST_LAYERS:,} are built: take fewer"
        yield from self._feature_problems()
        for index, (inner, outer) in enumerate(zip(self.levels, self.levels[1:], strict=False), 1):
            here = f"levels[{index}]"
            if outer.side < inner.side:
                yield f"{here}.side is smaller than the one before: list them from coarse to fine"
            nests = f"{here} does not nest on levels[{index - 1}]: after its halvings it has"
            if (core := outer.core_side) != (stem := inner.stem_side):
                yield f"{nests} side {core}, not {stem}; change side, patch or widths"
            if (core := outer.core_frames) != (inner.frames or 1) or (
                inner.frames and not outer.frames
            ):
                yield f"{nests} frames {core}, not {inner.frames or 'none'}; change halve_frames"
            if outer.side % inner.side:
                yield f"{here}.side {outer.side} is no multiple of {inner.side}"
            if outer.middle:
                yield f"{here}.middle: only the coarsest level has middle blocks; omit it"
        if self.coarse is not None:
            small, side = self.coarse.side, self.levels[0].side
            if self.levels[-1].frames:
                yield "coarse: an upsampler draws images, but levels[-1] has frames; omit one"
            if side <= small or side % small:
                yield f"levels[0].side = {side} must be a larger multiple of coarse.side = {small}"

    def _feature_problems(self) -> Iterator[str]:
        """Yield what is wrong with levels of features."""
        for index, level in enumerate(self.levels):
            if level.features and index:
                yield f"levels[{index}].features: only the coarsest level holds features; omit it"
        if not self.hidden:
            return
        if len(self.levels) == 1:
            yield "levels[0].features: no image can be drawn from features: add a level of pixels"
        if self.coarse is not None or self.levels[-1].frames is not None:
            kind = "coarse" if self.coarse is not None else "levels[-1].frames"
            yield f"levels[0].features: only models of whole images hold features; omit {kind}"


class CodecConfig(Strict):
    """A frozen autoencoder, whose latents the nest denoises."""

    path: Name | None = None  # folder with an `AutoencoderKL` of diffusers
    factor: Count = 4  # pixels along a side for each latent
    weights: str = ""  # hash; a run fills it in


class FeaturesConfig(Strict):
    """A frozen network, whose features the coarsest level denoises in place of pixels."""

    network: Name = "effnet-lite0"  # or a folder with a vision transformer of transformers
    path: Name | None = None  # file with their projection; None: the run's own, which it makes
    weights: str = ""  # hash of network and projection; a run fills it in


class EncoderConfig(Strict):
    """The frozen text encoder."""

    name: Literal["minilm", "t5"]
    path: Name | None = None  # folder or hub id; MiniLM's package needs none
    max_tokens: Count = 32
