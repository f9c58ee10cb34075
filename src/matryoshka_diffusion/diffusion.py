"""The paper's maths: the forward process of a pyramid, kinds of prediction, the joint loss.

Everything here works level by level on pyramids (coarse to fine), at one shared time t of shape
(b,). In mixed-resolution training a finer level may have fewer rows. They are then the first rows
of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import (
    LevelConfig,
    ModelConfig,
    Prediction,
    ProcessConfig,
    WeightingConfig,
)
from matryoshka_diffusion.pyramid import Pyramid, resolution_of, up_sample
from matryoshka_diffusion.schedule import (
    NoiseLevel,
    NoiseSchedule,
    alpha_sigma,
    build_schedules,
    expand,
    log_snr_rate,
)

T = TypeVar("T")
Distance: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(estimates, images) -> how far apart they are, one number for each row."""


@runtime_checkable
class Network(Protocol):
    """A network: noisy pyramid, time and conditions in, one prediction for each level out."""

    def __call__(self, z: Pyramid, t: Float[Tensor, " b"], cond: Conditioning) -> Pyramid: ...


@dataclass(frozen=True)
class Process:
    """A diffusion process: schedules, the kind of prediction, and the weights of errors.

    All tuples have one entry for each level, coarse to fine.
    """

    schedules: tuple[NoiseSchedule, ...]
    prediction: Prediction
    weightings: tuple[WeightingConfig, ...]
    level_weights: tuple[float, ...]

    @classmethod
    def from_config(cls, process: ProcessConfig, model: ModelConfig) -> Process:
        """The process of a model's levels."""
        levels = len(model.levels)
        weightings = map(_follow_shift, per_level(process.weighting, levels), model.levels)
        level_weights = per_level(process.level_weights, levels)
        return cls(build_schedules(model), process.prediction, tuple(weightings), level_weights)

    def ramped(self, factors: Sequence[float]) -> Process:
        """The process with each level weight multiplied by its factor, if there are factors."""
        if not factors:
            return self
        weights = zip(self.level_weights, factors, strict=True)
        return replace(self, level_weights=tuple(weight * factor for weight, factor in weights))


def _follow_shift(weighting: WeightingConfig, level: LevelConfig) -> WeightingConfig:
    """The weighting of a level. The bias of `sigmoid` is a log-SNR, so it shifts with them."""
    return weighting.model_copy(update={"bias": weighting.bias - level.shift})


def per_level(values: tuple[T, ...], levels: int) -> tuple[T, ...]:
    """The values of the first `levels` levels. A single value stands for every level."""
    return values * levels if len(values) == 1 else values[:levels]


# --- Eq. 1 and 2: the forward process ----------------------------------------------------------


def diffuse(
    x: Pyramid, noise: Pyramid, t: Float[Tensor, " b"], schedules: Sequence[NoiseSchedule]
) -> Pyramid:
    """A draw from q(z_t | x): z^r_t = alpha^r_t D^r(x) + sigma^r_t eps^r (Eq. 1 and 2).

    `x` is the pyramid already. Each level follows its own schedule at the shared time.
    """
    z = []
    for x_r, noise_r, schedule in zip(x, noise, schedules, strict=True):
        alpha, sigma = alpha_sigma(schedule.log_snr(t[: len(x_r)]))
        z.append(expand(alpha, x_r) * x_r + expand(sigma, x_r) * noise_r)
    return tuple(z)


def augment_coarse(
    coarse: Float[Tensor, "b c h w"],
    t: Float[Tensor, " b"],
    noise: Float[Tensor, "b c H W"],
    schedule: NoiseSchedule,
) -> Float[Tensor, "b c H W"]:
    """The coarse image for an upsampler: enlarged to the side of the noise, then noised at t.

    The noise follows the schedule of the level that takes the image (Appendix D.1). It hides how
    the images of a base model differ from real ones; t = 0 hides nothing.
    """
    enlarged = up_sample(coarse, resolution_of(noise))
    (noised,) = diffuse((enlarged,), (noise,), t, (schedule,))
    return noised


# --- x0, eps and v: three names for one prediction ---------------------------------------------


def prediction_target(kind: Prediction, x: Tensor, noise: Tensor, log_snr: Tensor) -> Tensor:
    """The right prediction of this kind, for an image x and its noise."""
    if kind == "x0":
        return x
    if kind == "eps":
        return noise
    alpha, sigma = alpha_sigma(log_snr)
    return expand(alpha, x) * noise - expand(sigma, x) * x


def to_x0(
    kind: Prediction, prediction: Tensor, z: Tensor, alpha: float | Tensor, sigma: float | Tensor
) -> Tensor:
    """The estimate of x that a prediction from z = alpha x + sigma eps implies."""
    if kind == "x0":
        return prediction
    if kind == "v":
        return alpha * z - sigma * prediction
    return (z - sigma * prediction) / alpha


def to_noise(x: Tensor, z: Tensor, level: NoiseLevel) -> Tensor:
    """The noise in z = alpha x + sigma eps, if x is the image."""
    return (z - level.alpha * x) / level.sigma


# --- Eq. 3: the joint loss ---------------------------------------------------------------------


class Loss(NamedTuple):
    """The joint loss of a batch.

    Attributes:
        total: the sum over levels of level weight times `per_level`. Training minimises it.
        per_level: for each level, the mean weighted error of the rows that have the level.
        per_example: for each row, the weighted sum over the levels that the row has.
    """

    total: Float[Tensor, ""]
    per_level: Float[Tensor, " r"]
    per_example: Float[Tensor, " b"]


@dataclass(frozen=True)
class FinestLoss:
    """A loss of the finest level's estimate of x, in addition to its weighted squared error.

    It counts where noise is low enough for an estimate that looks like an image.

    Attributes:
        distance: of the estimates and the images.
        weight: factor of that distance.
        log_snr_above: rows whose log-SNR at that level is above it count.
        first: the coarsest level that holds images and not features.
    """

    distance: Distance
    weight: float
    log_snr_above: float
    first: int = 0

    def __call__(
        self, kind: Prediction, prediction: Tensor, z: Tensor, x: Tensor, log_snr: Tensor
    ) -> Float[Tensor, " b"]:
        """The loss of each row, which is 0 under more noise."""
        rows, losses = log_snr > self.log_snr_above, x.new_zeros(len(x))
        if rows.any():
            alpha, sigma = (expand(number[rows], x) for number in alpha_sigma(log_snr))
            estimate = to_x0(kind, prediction[rows], z[rows], alpha, sigma)
            losses[rows] = self.weight * self.distance(estimate, x[rows])
        return losses


def matryoshka_loss(
    net: Network,
    x: Pyramid,
    cond: Conditioning,
    t: Float[Tensor, " b"],
    noise: Pyramid,
    *,
    process: Process,
    counts: Sequence[int] | None = None,
    finest: FinestLoss | None = None,
) -> Loss:
    """Eq. 3: the errors of all levels at one shared time, weighted and summed.

    `t` and `noise` are arguments, so the loss is a pure function. `per_level` divides by `counts`,
    by default the numbers of rows. With the counts of a whole batch, the losses of its
    micro-batches add up to the loss of the batch. `finest` adds to the error of the last level.
    """
    z = diffuse(x, noise, t, process.schedules)
    predictions = net(z, t, cond)
    counts = [len(level) for level in x] if counts is None else counts
    per_level, per_example = [], torch.zeros_like(t, dtype=x[0].dtype)
    for level, (x_r, noise_r, predicted) in enumerate(zip(x, noise, predictions, strict=True)):
        rows = len(x_r)
        schedule, weighting = process.schedules[level], process.weightings[level]
        log_snr = schedule.log_snr(t[:rows])
        target = prediction_target(process.prediction, x_r, noise_r, log_snr)
        predicted = predicted.to(x_r.dtype)
        error = (predicted - target).square().flatten(1).mean(1)
        log_weight = _log_weight(weighting, schedule, t[:rows])
        weight = torch.exp(log_weight + _log_x_error(process.prediction, log_snr))
        error = weight.to(error) * error
        if finest is not None and finest.first <= level == len(x) - 1:
            error = error + finest(process.prediction, predicted, z[level], x_r, log_snr)
        per_level.append(error.sum() / max(counts[level], 1))
        per_example[:rows] = per_example[:rows] + process.level_weights[level] * error
    losses = torch.stack(per_level)
    # Filled on the device: to copy a list there, the host would wait for all that runs on it.
    weights = torch.stack([losses.new_full((), weight) for weight in process.level_weights])
    return Loss(losses @ weights, losses, per_example)


def _log_x_error(kind: Prediction, log_snr: Tensor) -> Tensor:
    """log of (squared x-error / squared error of the prediction), a ratio of 1, sigma^2 or 1 / SNR.

    The loss measures the error of the prediction itself and converts its weight. If it converted
    the prediction to x instead, eps-prediction would be infinite where alpha vanishes.
    """
    if kind == "x0":
        return torch.zeros_like(log_snr)
    return -F.softplus(log_snr) if kind == "v" else -log_snr


WEIGHTINGS: dict[str, Callable[[WeightingConfig, Tensor], Tensor]] = {
    # The log of the weight on the squared x-error, as a function of log-SNR.
    "eps": lambda w, log_snr: log_snr,  # SNR: the released models' squared eps-error
    "v": lambda w, log_snr: F.softplus(log_snr),  # SNR + 1 = 1 / sigma^2: squared v-error
    "v_clipped": lambda w, log_snr: F.softplus(log_snr).clamp(max=math.log(w.clip)),
    "min_snr": lambda w, log_snr: log_snr.clamp(max=math.log(w.gamma)),  # arXiv 2303.09556
    "sigmoid": lambda w, log_snr: w.bias + F.logsigmoid(log_snr - w.bias),  # arXiv 2410.19324
}


def _log_weight(weighting: WeightingConfig, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """log w_r(t), the weight of a level on its squared x-error.

    `sigmoid` is defined for noise levels drawn evenly in log-SNR. Here t is drawn evenly, hence
    the factor -d log_snr / d t.
    """
    log_weight = WEIGHTINGS[weighting.name](weighting, schedule.log_snr(t))
    if weighting.name == "sigmoid":
        log_weight = log_weight + torch.log(-log_snr_rate(schedule, t))
    return log_weight
