"""The paper's maths: the forward process of a pyramid, what a network predicts, the joint loss.

Everything here works level by level on pyramids (coarse to fine), at one shared time t of shape
(b,). A finer level may hold fewer rows than a coarser one (mixed-resolution training); it then
belongs to the first rows of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

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
    NoiseSchedule,
    alpha_sigma,
    build_schedules,
    expand,
    log_snr_rate,
)

T = TypeVar("T")


@runtime_checkable
class Network(Protocol):
    """What is trained: noisy pyramid, time and conditions in; one prediction a level out."""

    def __call__(self, z: Pyramid, t: Float[Tensor, " b"], cond: Conditioning) -> Pyramid: ...


@dataclass(frozen=True)
class Process:
    """A diffusion process: how each level is noised, what is predicted, how errors count.

    All tuples have one entry for every level, coarse to fine.
    """

    schedules: tuple[NoiseSchedule, ...]
    prediction: Prediction
    weightings: tuple[WeightingConfig, ...]
    level_weights: tuple[float, ...]

    @classmethod
    def from_config(cls, process: ProcessConfig, model: ModelConfig) -> Process:
        """The process of a model's levels."""
        levels = len(model.levels)
        return cls(
            schedules=build_schedules(model),
            prediction=process.prediction,
            weightings=tuple(
                _follow_shift(weighting, level)
                for weighting, level in zip(
                    per_level(process.weighting, levels), model.levels, strict=True
                )
            ),
            level_weights=per_level(process.level_weights, levels),
        )

    def ramped(self, factors: Sequence[float]) -> Process:
        """The process with each level weight times its factor; without factors it is the same."""
        if not factors:
            return self
        weights = zip(self.level_weights, factors, strict=True)
        return replace(self, level_weights=tuple(weight * factor for weight, factor in weights))


def _follow_shift(weighting: WeightingConfig, level: LevelConfig) -> WeightingConfig:
    """The bias of `sigmoid` is a place on the schedule; where that is shifted, it moves along."""
    shift = level.shift_power * math.log(level.shift_ratio)
    return weighting.model_copy(update={"bias": weighting.bias - shift})


def per_level(values: tuple[T, ...], levels: int) -> tuple[T, ...]:
    """One value stands for every level; otherwise the first `levels` values are taken."""
    return values * levels if len(values) == 1 else values[:levels]


# --- Eq. 1 and 2: the forward process ----------------------------------------------------------


def diffuse(
    x: Pyramid, noise: Pyramid, t: Float[Tensor, " b"], schedules: Sequence[NoiseSchedule]
) -> Pyramid:
    """z^r_t = alpha^r_t x^r + sigma^r_t eps^r with x^r = D^r(x): a draw from q(z_t | x), Eq. 1, 2.

    `x` is the pyramid already; every level follows its own schedule at the shared t.
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
    """The coarse picture as an upsampler sees it: enlarged to the noise's side, then noised at t.

    Noise comes after enlarging and follows the schedule of the level that sees it (Appendix D.1).
    It hides how the pictures of a base differ from real ones; t = 0 hides nothing.
    """
    (seen,) = diffuse((up_sample(coarse, resolution_of(noise)),), (noise,), t, (schedule,))
    return seen


# --- x0, eps and v: three names for one prediction ---------------------------------------------


def prediction_target(kind: Prediction, x: Tensor, noise: Tensor, log_snr: Tensor) -> Tensor:
    """What a network of this kind should return, given the picture and the noise it carries."""
    if kind == "x0":
        return x
    if kind == "eps":
        return noise
    alpha, sigma = alpha_sigma(log_snr)
    return expand(alpha, x) * noise - expand(sigma, x) * x


def to_x0(kind: Prediction, prediction: Tensor, z: Tensor, log_snr: Tensor) -> Tensor:
    """The estimate of x in a prediction made from z = alpha x + sigma eps."""
    if kind == "x0":
        return prediction
    alpha, sigma = (expand(part, z) for part in alpha_sigma(log_snr))
    return alpha * z - sigma * prediction if kind == "v" else (z - sigma * prediction) / alpha


def to_noise(x: Tensor, z: Tensor, log_snr: Tensor) -> Tensor:
    """The noise that z = alpha x + sigma eps holds if x is the picture."""
    alpha, sigma = (expand(part, z) for part in alpha_sigma(log_snr))
    return (z - alpha * x) / sigma


# --- Eq. 3: the joint loss ---------------------------------------------------------------------


class Loss(NamedTuple):
    """The joint loss of a batch.

    Attributes:
        total: sum over levels of level weight times `per_level`; what is minimised.
        per_level: mean weighted error of the rows that have the level, one number each.
        per_example: each row's weighted sum over the levels it has.
    """

    total: Float[Tensor, ""]
    per_level: Float[Tensor, " r"]
    per_example: Float[Tensor, " b"]


def matryoshka_loss(
    net: Network,
    x: Pyramid,
    cond: Conditioning,
    t: Float[Tensor, " b"],
    noise: Pyramid,
    *,
    process: Process,
    counts: Sequence[int] | None = None,
) -> Loss:
    """Eq. 3: the errors of all levels at one shared time, weighted and summed.

    `t` and `noise` are given, not drawn, so the loss is a pure function. `counts` are the numbers
    of rows that `per_level` divides by; the default is the rows present. A micro-batch of a larger
    batch passes the counts of the whole, and the losses of the parts then add up to its loss.
    """
    predictions = net(diffuse(x, noise, t, process.schedules), t, cond)
    counts = [len(level) for level in x] if counts is None else counts
    per_level, per_example = [], torch.zeros_like(t, dtype=x[0].dtype)
    for level, (x_r, noise_r, predicted) in enumerate(zip(x, noise, predictions, strict=True)):
        rows = len(x_r)
        schedule, weighting = process.schedules[level], process.weightings[level]
        log_snr = schedule.log_snr(t[:rows])
        target = prediction_target(process.prediction, x_r, noise_r, log_snr)
        error = (predicted.to(x_r.dtype) - target).square().flatten(1).mean(1)
        log_weight = _log_weight(weighting, schedule, t[:rows])
        weight = torch.exp(log_weight + _log_x_error(process.prediction, log_snr))
        error = weight.to(error) * error
        per_level.append(error.sum() / max(counts[level], 1))
        per_example[:rows] = per_example[:rows] + process.level_weights[level] * error
    losses = torch.stack(per_level)
    return Loss(losses @ losses.new_tensor(process.level_weights), losses, per_example)


def _log_x_error(kind: Prediction, log_snr: Tensor) -> Tensor:
    """log of (squared x-error / squared error of the prediction): 1, sigma^2 or 1 / SNR.

    Taking the error where it is predicted and converting its weight, rather than converting the
    prediction to x, keeps eps-prediction finite where alpha vanishes.
    """
    if kind == "x0":
        return torch.zeros_like(log_snr)
    return -F.softplus(log_snr) if kind == "v" else -log_snr


WEIGHTINGS: dict[str, Callable[[WeightingConfig, Tensor], Tensor]] = {
    # log of the weight on the squared x-error, as a function of log-SNR
    "eps": lambda w, log_snr: log_snr,  # SNR: the released models' squared eps-error
    "v": lambda w, log_snr: F.softplus(log_snr),  # SNR + 1 = 1 / sigma^2: squared v-error
    "v_clipped": lambda w, log_snr: F.softplus(log_snr).clamp(max=math.log(w.clip)),
    "min_snr": lambda w, log_snr: log_snr.clamp(max=math.log(w.gamma)),  # arXiv 2303.09556
    "sigmoid": lambda w, log_snr: w.bias + F.logsigmoid(log_snr - w.bias),  # arXiv 2410.19324
}


def _log_weight(weighting: WeightingConfig, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """log w_r(t), the weight of level r on its squared x-error.

    `sigmoid` is defined under noise levels drawn evenly in log-SNR; drawing t evenly instead asks
    for the factor -d log_snr / d t.
    """
    log_weight = WEIGHTINGS[weighting.name](weighting, schedule.log_snr(t))
    if weighting.name == "sigmoid":
        log_weight = log_weight + torch.log(-log_snr_rate(schedule, t))
    return log_weight
