"""Samplers and the loss against truth: Gaussian images, exact posterior means, no network."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import (
    Prediction,
    SamplerName,
    WeightingConfig,
    WeightingName,
)
from matryoshka_diffusion.diffusion import Process, diffuse, matryoshka_loss
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.samplers import (
    SAMPLERS,
    ddim,
    ddpm,
    dpmpp_2m,
    last,
    trailing_grid,
    waking,
)
from matryoshka_diffusion.schedule import (
    Cosine,
    NoiseSchedule,
    alpha_sigma,
    squared_cosine_table,
    time_of,
)
from oracle import (
    GaussianImages,
    UnitNoise,
    moments,
    no_noise,
    small_clips,
    small_features,
    small_world,
    stacked,
)

DOUBLINGS = (50, 100, 200)
every_world = pytest.mark.parametrize("make", [small_world, small_clips, small_features])


def covariance_error(
    sampler: Callable, grid: Callable, steps: int, make: Callable = small_world
) -> float:
    """Relative error of the covariance that a deterministic sampler gives the finest level."""
    world = make(Cosine())
    noise = UnitNoise(world.resolutions, steps=0)
    times = grid(steps, world.schedules[0])
    state = last(sampler(world, noise.start(), world.schedules, times, noise=no_noise))
    _, covariance = moments(state.z[-1])
    return relative(covariance, world.covariance)


def relative(result: Tensor, truth: Tensor) -> float:
    return float((result - truth).norm() / truth.norm())


# --- the oracle itself --------------------------------------------------------------------------


@every_world
def test_the_posterior_mean_is_the_regression_of_x_on_all_levels(make: Callable):
    """The textbook formula S A' (A S A' + Sigma)^-1, which the oracle states the other way."""
    world = make(squared_cosine_table())
    t = torch.tensor([0.02, 0.3, 0.99], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    z = tuple(
        torch.randn(3, *resolution.shape(1), generator=generator, dtype=torch.float64)
        for resolution in world.resolutions
    )
    pools = torch.cat(world.pools)
    sizes = [len(pool) for pool in world.pools]
    for row in range(3):
        # One entry for each of the 1 + 2 + 4 pixels.
        each = [s.log_snr(t[row].expand(n)) for s, n in zip(world.schedules, sizes, strict=True)]
        alpha, sigma = alpha_sigma(torch.cat(each))
        a = alpha[:, None] * pools
        total = a @ world.covariance @ a.T + sigma.square().diag()
        gain = world.covariance @ a.T @ total.inverse()
        x = world.mean + gain @ (stacked(z)[row] - a @ world.mean)
        torch.testing.assert_close(stacked(world.posterior_mean(z, t))[row], pools @ x)


# --- samplers -----------------------------------------------------------------------------------


@every_world
def test_ddim_covariance_error_halves_as_steps_double(make: Callable):
    errors = [covariance_error(ddim, trailing_grid, steps, make) for steps in DOUBLINGS]
    assert errors[-1] < 0.04
    for coarse, fine in pairwise(errors):
        assert fine / coarse == pytest.approx(0.5, abs=0.03)


def test_dpm_solver_error_quarters_as_steps_double():
    """Second order in log-SNR, the solver's own time, over nearly the whole schedule."""

    def grid(steps: int, schedule: NoiseSchedule) -> Tensor:
        nodes = time_of(schedule, torch.linspace(-14.0, 14.0, steps, dtype=torch.float64))
        return torch.cat([nodes, nodes.new_zeros(1)])

    errors = [covariance_error(dpmpp_2m, grid, steps) for steps in DOUBLINGS]
    for coarse, fine in pairwise(errors):
        assert fine / coarse == pytest.approx(0.25, abs=0.02)


@every_world
def test_ddpm_covariance_error_halves_and_its_mean_is_exact(make: Callable):
    """Ancestral sampling adds noise at every step. Unit vectors of that noise count, too."""
    world = make(Cosine())
    errors = []
    for steps in (50, 100):
        noise = UnitNoise(world.resolutions, steps)
        times = trailing_grid(steps, world.schedules[0])
        states = ddpm(world, noise.start(), world.schedules, times, noise=noise)
        mean, covariance = moments(last(states).z[-1])
        # The start ignores the share alpha_1 = 5.5e-4 of the image in the latent at t = 1.
        assert relative(mean, world.mean) < 1e-5
        errors.append(relative(covariance, world.covariance))
    assert errors[-1] < 0.11
    assert 0.5 < errors[1] / errors[0] < 0.63


@every_world
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddim-eta-0.5", "ddim-eta-1"])
def test_a_known_image_has_the_exact_marginals_at_every_step(sampler: str, make: Callable):
    """If x is known, z_s is N(alpha_s x, sigma_s^2) after every step of any length."""
    world = make(Cosine())
    units = UnitNoise(world.resolutions, steps=6)
    times = torch.tensor([0.9, 0.7, 0.65, 0.4, 0.1, 0.02, 0.0], dtype=torch.float64)
    images = world.pyramid(world.mean.expand(units.rows, 4))
    start = diffuse(images, units.start(), times[:1].expand(units.rows), world.schedules)

    run = ddpm if sampler == "ddpm" else ddim
    options = {} if "-" not in sampler else {"eta": float(sampler.rsplit("-", 1)[1])}
    states = run(lambda z, now: images, start, world.schedules, times, noise=units, **options)
    for state, s in zip(states, times[1:], strict=True):
        for z_r, x_r, schedule in zip(state.z, images, world.schedules, strict=True):
            alpha, sigma = alpha_sigma(schedule.log_snr(s[None]))
            mean, covariance = moments(z_r)
            torch.testing.assert_close(mean, alpha * x_r[0].flatten())
            torch.testing.assert_close(covariance, sigma**2 * torch.eye(len(mean)).double())


@every_world
@pytest.mark.parametrize("sampler", [ddpm, ddim, dpmpp_2m])
def test_levels_agree_in_the_end(sampler: Callable, make: Callable):
    """Each level takes its own steps, yet in the end each is D^r of the finest one."""
    world = make(Cosine())
    noise = UnitNoise(world.resolutions, steps=0)
    times = trailing_grid(10, world.schedules[0])
    z = last(sampler(world, noise.start(), world.schedules, times, noise=noise)).z
    for result, pooled in zip(z, world.pyramid(z[-1].flatten(1)), strict=True):
        torch.testing.assert_close(result, pooled)


LATE = {
    "pixels": (small_world, (0.05, 0.011, 0.0004)),
    "clips": (small_clips, (0.15, 0.032, 0.0011)),
}
"""Bounds of what floors of -1, -3 and -6 change in the covariance of samples."""


@pytest.mark.parametrize(("make", "bounds"), LATE.values(), ids=LATE.keys())
@pytest.mark.parametrize("name", SAMPLERS)
def test_what_waking_late_changes_vanishes_as_the_floor_falls(
    name: SamplerName, make: Callable, bounds: tuple[float, ...]
):
    world, steps = make(Cosine()), 30
    noise = UnitNoise(world.resolutions, steps if name == "ddpm" else 0)
    times = trailing_grid(steps, world.schedules[0])

    def covariance(sampler: Callable) -> Tensor:
        states = sampler(world, noise.start(), world.schedules, times, noise=noise)
        return moments(last(states).z[-1])[1]

    plain = covariance(SAMPLERS[name])
    late = [covariance(waking(SAMPLERS[name], (floor,) * 3)) for floor in (-1.0, -3.0, -6.0)]
    changes = [float((one - plain).norm() / world.covariance.norm()) for one in late]
    assert all(0.0 < change < bound for change, bound in zip(changes, bounds, strict=True))
    assert torch.equal(covariance(waking(SAMPLERS[name], (-math.inf,) * 3)), plain)


# --- the loss -----------------------------------------------------------------------------------
# The error of an affine network is affine in (x, eps). Its expected square is therefore the sum of
# its squares at the mean and at one standard deviation along each axis, exactly.

every_prediction = pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
WEIGHTS: dict[WeightingName, Callable[[Tensor, Tensor], Tensor]] = {
    # the weight on the squared x-error, from SNR and -d log-SNR / dt
    "eps": lambda snr, speed: snr,
    "v": lambda snr, speed: snr + 1,
    "v_clipped": lambda snr, speed: (snr + 1).clamp(max=10.0),
    "min_snr": lambda snr, speed: snr.clamp(max=5.0),
    "sigmoid": lambda snr, speed: speed * math.exp(-1.0) * snr / (snr + math.exp(-1.0)),
}
TIMES = (0.05, 0.4, 0.75, 0.97)


def joint_axes(world: GaussianImages) -> tuple[Pyramid, Pyramid]:
    """Images and noise one standard deviation from the mean along each axis of (x, eps)."""
    pixels = len(world.mean)
    shapes = [resolution.shape(1) for resolution in world.resolutions]
    sizes = [math.prod(shape) for shape in shapes]
    rows = pixels + sum(sizes)
    x = world.mean.repeat(rows, 1)
    x[:pixels] += torch.linalg.cholesky(world.covariance).T
    noise = torch.zeros(rows, sum(sizes), dtype=torch.float64)
    noise[pixels:].fill_diagonal_(1.0)
    levels = zip(noise.split(sizes, dim=1), shapes, strict=True)
    return world.pyramid(x), tuple(level.reshape(rows, *shape) for level, shape in levels)


def expected_loss(world: GaussianImages, net: Callable, process: Process, t: float) -> Tensor:
    """The exact expected loss of each level, for an affine net without error at the mean."""
    x, noise = joint_axes(world)
    times = torch.full((len(x[0]),), t, dtype=torch.float64)
    ones = [1] * len(x)  # sum over the rows instead of averaging
    loss = matryoshka_loss(net, x, Conditioning(), times, noise, process=process, counts=ones)
    return loss.per_level


def process_of(world: GaussianImages, prediction: Prediction, name: WeightingName) -> Process:
    weighting = WeightingConfig(name=name, clip=10.0, gamma=5.0, bias=-1.0)
    return Process(world.schedules, prediction, (weighting,) * 3, (1.0, 1.0, 1.0))


@every_world
@every_prediction
@pytest.mark.parametrize("name", WEIGHTS)
def test_the_loss_at_the_oracle_is_its_closed_form_minimum(
    prediction: Prediction, name: WeightingName, make: Callable
):
    """The minimum is the weight times the mean posterior variance of the level's pixels."""
    world = make(Cosine())
    process = process_of(world, prediction, name)
    for t in TIMES:
        time = torch.tensor([t], dtype=torch.float64)
        (spread,) = world.posterior_covariance(time)
        start, end = (math.atan(math.exp(sign * 7.5)) for sign in (-1, 1))
        speed = 4 * (end - start) / torch.sin(2 * (start + time * (end - start)))
        minimum = [
            WEIGHTS[name](schedule.log_snr(time).exp(), speed)
            * (pool @ spread @ pool.T).trace()
            / len(pool)
            for pool, schedule in zip(world.pools, world.schedules, strict=True)
        ]
        result = expected_loss(world, world.as_network(prediction), process, t)
        torch.testing.assert_close(result, torch.cat(minimum), rtol=1e-6, atol=1e-12)


@every_world
@every_prediction
def test_leaving_the_oracle_raises_the_loss(prediction: Prediction, make: Callable):
    """The loss rises by the square of the distance in either direction: a minimum."""
    world = make(Cosine())
    process = process_of(world, prediction, "v_clipped")
    oracle = world.as_network(prediction)
    generator = torch.Generator().manual_seed(0)
    bend = [torch.randn(7, pool.shape[0], generator=generator).double() for pool in world.pools]

    def bent(size: float) -> Callable:
        def net(z: Pyramid, t: Tensor, cond: Conditioning) -> Pyramid:
            # The bend is linear around E[z_t], where the error stays 0.
            mean = world.pyramid(world.mean.expand(len(t), -1))
            clean = tuple(torch.zeros_like(level) for level in z)
            offset = stacked(z) - stacked(diffuse(mean, clean, t, world.schedules))
            return tuple(
                y + size * (offset @ b).view_as(y)
                for y, b in zip(oracle(z, t, cond), bend, strict=True)
            )

        return net

    minimum = expected_loss(world, oracle, process, 0.4)
    for size in (0.05, -0.05):
        excess = expected_loss(world, bent(size), process, 0.4) - minimum
        double = expected_loss(world, bent(2 * size), process, 0.4) - minimum
        assert (excess > 0).all()
        torch.testing.assert_close(double, 4 * excess)
