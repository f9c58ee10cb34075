"""Samplers: equal to diffusers' for one level; seeds, grids and states for any number."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import GridName, Prediction, ProcessConfig, SamplerName
from matryoshka_diffusion.denoiser import NetworkDenoiser, Thresholded
from matryoshka_diffusion.diffusion import Process
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pyramid import Pyramid, Resolution, shapes_of, up_sample
from matryoshka_diffusion.samplers import (
    GRIDS,
    SAMPLERS,
    SeededNoise,
    ddim,
    ddpm,
    dpmpp_2m,
    last,
    log_snr_grid,
    released_grid,
    trailing_grid,
    waking,
)
from matryoshka_diffusion.schedule import (
    SCHEDULES,
    Cosine,
    Instant,
    Shifted,
    instants,
    squared_cosine_table,
)
from nests import nest, wake

SHAPES = ((3, 2, 2), (3, 4, 4))
LEVELS = (Cosine(), Shifted(Cosine(), 2.0, 2.0))

every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def shrink(z: Pyramid, now: Instant) -> Pyramid:
    """A denoiser that is not linear and depends on time."""
    return tuple(torch.tanh(z_r * (1.0 - now.t)) for z_r in z)


# --- diffusers -----------------------------------------------------------------------------------

START = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MIXING = 0.5 * torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
THEIR_NAME = {"x0": "sample", "eps": "epsilon", "v": "v_prediction"}


def network(z: Pyramid, t: Tensor, cond: Conditioning) -> Pyramid:
    """A stand-in for a trained network: it mixes channels and the time, bounded."""
    mixed = torch.einsum("ij,bjhw->bihw", MIXING, z[0])
    return (torch.tanh(mixed + t.to(z[0]).view(-1, 1, 1, 1)),)


def their_trajectory(sampler: str, steps: int, prediction: Prediction) -> list[Tensor]:
    """Their integer step k is our time (k + 1) / 1000."""
    import diffusers

    classes = {"ddpm": "DDPM", "ddim": "DDIM", "dpmpp-2m": "DPMSolverMultistep"}
    own = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
    scheduler = getattr(diffusers, f"{classes[sampler]}Scheduler")(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=THEIR_NAME[prediction],
        timestep_spacing="trailing",
        **(own if sampler == "dpmpp-2m" else {"clip_sample": False}),
    )
    options = {"generator": torch.Generator().manual_seed(2)} if sampler == "ddpm" else {}
    scheduler.set_timesteps(steps)
    z, trajectory = START, []
    for step in scheduler.timesteps:
        (predicted,) = network((z,), ((step + 1) / 1000).expand(2), Conditioning())
        z = scheduler.step(predicted, step, z, **options).prev_sample
        trajectory.append(z)
    return trajectory


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_level_follows_diffusers_step_by_step(
    sampler: SamplerName, steps: int, prediction: Prediction
):
    """Step k adds what diffusers draws at step k from a generator of seed 2."""
    generator = torch.Generator().manual_seed(2)
    draws = [torch.randn(START.shape, generator=generator) for _ in range(steps)]
    model = nest(1, schedule="squared-cosine")
    process = Process.from_config(ProcessConfig(prediction=prediction), model)
    denoise = NetworkDenoiser(network, process, Conditioning())
    times = trailing_grid(steps, process.schedules[0])
    states = SAMPLERS[sampler](
        denoise, (START,), process.schedules, times, noise=lambda _, step: (draws[step - 1],)
    )
    theirs = their_trajectory(sampler, steps, prediction)
    for state, expected in zip(states, theirs, strict=True):
        assert (state.z[0] - expected).norm() <= 1e-5 * expected.norm()


# --- samplers ------------------------------------------------------------------------------------


def test_ddim_with_eta_one_is_ancestral_sampling_and_eta_between_lies_between():
    """The same variance and the same mean: on the same noise the same trajectory."""
    noise = SeededNoise([1, 2], SHAPES)
    z = tuple(level.double() for level in noise.start())
    times = trailing_grid(12, LEVELS[0])
    none, half, whole = (
        list(ddim(shrink, z, LEVELS, times, noise=noise, eta=eta)) for eta in (0.0, 0.5, 1.0)
    )
    for one, other in zip(whole, ddpm(shrink, z, LEVELS, times, noise=noise), strict=True):
        torch.testing.assert_close(one.z, other.z, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(none[-1].z[1], half[-1].z[1])
    assert not torch.allclose(half[-1].z[1], whole[-1].z[1])


@every_sampler
def test_states_have_step_time_latents_and_estimate_and_cost_a_call_each(sampler: Callable):
    noise = SeededNoise([3], SHAPES)
    times: list[float] = []

    def denoise(z: Pyramid, now: Instant) -> Pyramid:
        times.append(now.t)
        return shrink(z, now)

    states = sampler(denoise, noise.start(), LEVELS, trailing_grid(5, LEVELS[0]), noise=noise)
    assert times == [], "a sampler works only for the next state"
    result = [next(states), next(states)]
    assert times == pytest.approx([1.0, 0.8])
    result += states
    assert times == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert [state.step for state in result] == [1, 2, 3, 4, 5]
    assert [state.t for state in result] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    assert [level.shape for level in result[0].z] == [(1, 3, 2, 2), (1, 3, 4, 4)]
    torch.testing.assert_close(result[-1].z, result[-1].x)  # at t = 0 the latent is the estimate


@every_sampler
@pytest.mark.parametrize("steps", [1, 2])
@every_grid
def test_very_few_steps_are_enough_for_a_finite_image(
    sampler: Callable, steps: int, grid: Callable
):
    noise = SeededNoise([3], SHAPES)
    state = last(sampler(shrink, noise.start(), LEVELS, grid(steps, LEVELS[0]), noise=noise))
    assert state.step == steps
    assert all(level.isfinite().all() for level in state.z)


@pytest.mark.parametrize("sampler", [ddim, dpmpp_2m])
def test_levels_step_by_their_own_log_snr_at_the_shared_time(sampler: Callable):
    """A level whose estimate does not depend on others is sampled the same alone."""
    noise = SeededNoise([3], SHAPES)
    times = trailing_grid(7, LEVELS[0])
    z = noise.start()
    together = last(sampler(shrink, z, LEVELS, times, noise=noise)).z
    for level in range(2):
        own = slice(level, level + 1)
        alone = last(sampler(shrink, z[own], LEVELS[own], times, noise=noise)).z
        assert torch.equal(alone[0], together[level])


@every_sampler
def test_a_sleeping_level_waits_at_the_enlarged_estimate_under_its_own_noise(sampler: Callable):
    noise = SeededNoise([3], SHAPES)
    times = trailing_grid(7, LEVELS[0])
    z, calls = noise.start(), []

    def denoise(z: Pyramid, now: Instant) -> Pyramid:
        calls.append([len(z), len(now.levels)])
        return shrink(z, now)

    states = list(waking(sampler, (9.0, -2.0))(denoise, z, LEVELS, times, noise=noise))
    # The finer level is at log-SNR -1.97 at t = 4/7, the fourth time.
    assert calls == [[1, 1]] * 3 + [[2, 2]] * 4
    for state, then in zip(states[:3], instants(times, LEVELS)[1:4], strict=True):
        assert torch.equal(state.x[1], up_sample(state.x[0], Resolution(4, 4)))
        alpha, sigma, _ = then.levels[1]
        torch.testing.assert_close(state.z[1], alpha * state.x[1] + sigma * z[1])
    assert torch.equal(z[1], noise.start()[1])
    following = next(sampler(shrink, states[2].z, LEVELS, times[3:], noise=noise))
    torch.testing.assert_close(states[3].x, following.x)


@every_sampler
def test_levels_that_are_always_awake_change_no_bit(sampler: Callable):
    noise = SeededNoise([3, 4], SHAPES)
    plain, woken = (
        list(each(shrink, noise.start(), LEVELS, trailing_grid(9, LEVELS[0]), noise=noise))
        for each in (sampler, waking(sampler, (-float("inf"),) * 2))
    )
    for one, other in zip(plain, woken, strict=True):
        assert all(map(torch.equal, (*one.z, *one.x), (*other.z, *other.x)))


# --- noise ---------------------------------------------------------------------------------------


def test_a_samples_noise_depends_on_its_seed_only():
    alone, crowd = SeededNoise([7], SHAPES), SeededNoise(range(16), SHAPES)
    for place in (("start", 0), ("step", 1), ("step", 9)):
        for one, among in zip(alone(*place), crowd(*place), strict=True):
            assert torch.equal(one, among[7:8])


def test_noise_differs_by_seed_purpose_step_level_and_family():
    draws = [
        level[row].flatten()
        for family in ("sample", "upsample")
        for noise in [SeededNoise([1, 2], ((3, 8, 8),) * 2, family=family)]
        for purpose, step in (("start", 0), ("coarse", 0), ("step", 0), ("step", 1))
        for level in noise(purpose, step)
        for row in range(2)
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 0.3


def test_noise_is_standard_normal_on_the_grid_of_each_level():
    noise = SeededNoise(range(8), ((1, 4, 8), (1, 2, 32, 64)))
    coarse, fine = noise.start()
    assert coarse.shape == (8, 1, 4, 8)
    assert fine.shape == (8, 1, 2, 32, 64)
    assert (float(fine.mean()), float(fine.std())) == pytest.approx((0.0, 1.0), abs=0.03)


@every_sampler
def test_the_same_picture_alone_and_in_a_batch_of_sixteen(sampler: Callable):
    """The noise is bit-equal; images are within one grey value of 256."""
    net = wake(NestedUNet(nest(2)))
    process = Process.from_config(ProcessConfig(prediction="v"), net.config)
    denoise = Thresholded(NetworkDenoiser(net, process, Conditioning()), ("clip", "clip"))
    times = trailing_grid(4, process.schedules[0])

    def images(seeds: range) -> Pyramid:
        noise = SeededNoise(seeds, shapes_of(net.config))
        return last(sampler(denoise, noise.start(), process.schedules, times, noise=noise)).z

    crowd = images(range(16))
    for seed in (0, 11):
        for one, among in zip(images(range(seed, seed + 1)), crowd, strict=True):
            assert (one[0] - among[seed]).abs().max() <= 2 / 255
            assert not torch.allclose(one[0], among[seed - 1], atol=0.1)


# --- time grids ----------------------------------------------------------------------------------


@every_schedule
@every_grid
def test_grids_fall_from_noise_to_clean(name: str, grid: Callable):
    for steps in (1, 2, 10, 250, 1000):
        times = grid(steps, SCHEDULES[name]())
        assert times.dtype == torch.float64
        assert times.shape == (steps + 1,)
        assert times[-1] == 0
        assert times[0] <= 1
        assert (times.diff() < 0).all()


def test_trailing_times_are_even_and_released_times_start_below_pure_noise():
    expected = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]).double()
    torch.testing.assert_close(trailing_grid(4, Cosine()), expected)
    times = released_grid(10, squared_cosine_table())
    assert (1000 * times).round().tolist() == [910, 819, 728, 637, 546, 455, 364, 273, 182, 91, 0]


@every_schedule
@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_log_snr_times_are_even_in_log_snr(name: str, ratio: float):
    schedule = Shifted(SCHEDULES[name](), ratio, 2.0)
    times = log_snr_grid(20, schedule)
    assert times[0] == 1
    gaps = schedule.log_snr(times[1:-1]).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(18), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "extent"), [("cosine", 12.0), ("truncated-cosine", 5.0)])
def test_log_snr_times_span_what_the_schedule_resolves(name: str, extent: float):
    """From t = 1, or -12, to the first of 1000 steps, or 12."""
    schedule = SCHEDULES[name]()
    log_snr = schedule.log_snr(log_snr_grid(20, schedule)[1:-1])
    assert float(log_snr[0]) == pytest.approx(-extent + float(log_snr.diff()[0]), abs=1e-6)
    assert float(log_snr[-1]) == pytest.approx(extent, abs=1e-6)


def test_every_name_of_the_config_has_its_function():
    assert set(SAMPLERS) == set(get_args(SamplerName))
    assert set(GRIDS) == set(get_args(GridName))
