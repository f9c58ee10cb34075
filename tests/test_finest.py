"""A nest whose low-resolution losses do not count: how it is trained, and drawn from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ConfigError, WeightingConfig
from matryoshka_diffusion.configfile import from_dict
from matryoshka_diffusion.denoiser import NetworkDenoiser, Pooled
from matryoshka_diffusion.diffusion import Process, matryoshka_loss
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.pyramid import Pyramid, Resolution, down_sample
from matryoshka_diffusion.samplers import ddim, dpmpp_2m, last, trailing_grid
from matryoshka_diffusion.schedule import Cosine, Instant
from oracle import UnitNoise, moments, no_noise, small_world
from test_pipeline import Words, randomised
from tiny_run import tiny_config

FINEST = (True, True, False)
"""Which levels of the oracle's three are not trained."""


def finest_config(**train):
    config = tiny_config(dropout=0.0, **train)
    stage = config.train.stages[-1].model_copy(update={"mix": ()})
    return config.model_copy(
        update={
            "process": config.process.model_copy(update={"level_weights": (0.0, 1.0)}),
            "train": config.train.model_copy(update={"stages": (stage,)}),
        }
    )


def there(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


@pytest.mark.parametrize("sampler", [ddim, dpmpp_2m])
def test_a_network_that_is_right_on_the_finest_level_only_samples_as_the_oracle(sampler):
    """Gaussian pictures: untrained levels may say anything, the same pictures are drawn."""
    world = small_world(Cosine())
    network = world.as_network("v")

    def finest_only(z: Pyramid, t: Tensor, cond: Conditioning) -> Pyramid:
        return (*[17.0 * torch.ones_like(z_r) for z_r in z[:-1]], network(z, t, cond)[-1])

    process = Process(world.schedules, "v", (WeightingConfig(),) * 3, (0.0, 0.0, 1.0))
    noise, times = UnitNoise(world.resolutions, steps=0), trailing_grid(20, world.schedules[0])
    alone = NetworkDenoiser(finest_only, process, Conditioning())

    def draws(denoise) -> Pyramid:
        return last(sampler(denoise, noise.start(), world.schedules, times, noise=no_noise)).z

    for result, truth in zip(draws(Pooled(alone, FINEST)), draws(world), strict=True):
        torch.testing.assert_close(result, truth, rtol=1e-9, atol=1e-9)
    _, covariance = moments(draws(alone)[-1])
    assert (covariance - world.covariance).norm() > 0.5 * world.covariance.norm(), (
        "without the wrapper they are not"
    )


def test_levels_with_a_loss_keep_their_estimates():
    x = tuple(torch.randn(2, 3, side, side) for side in (4, 8))
    now = Instant(1.0, ())
    assert Pooled(lambda z, now: x, (False, False))(x, now) == x
    coarse, fine = Pooled(lambda z, now: x, (True, False))(x, now)
    assert torch.equal(coarse, down_sample(x[1], Resolution(4, 4)))
    assert fine is x[1]


def test_a_finest_loss_model_draws_levels_that_agree():
    config = finest_config()
    sampling = config.sampling.model_copy(update={"steps": 3, "threshold": ("none",)})
    config = config.model_copy(update={"sampling": sampling})
    model = Matryoshka(randomised(config), config, encoder=Words())
    _, cond = model.condition("red", None, 2)
    z = last(model.stream(cond, [0, 1], sampling)).z
    torch.testing.assert_close(z[0], down_sample(z[1], Resolution(8, 8)), rtol=1e-4, atol=1e-4)


def test_only_the_finest_error_counts_and_the_coarse_level_still_learns():
    config = finest_config()
    net = randomised(config)
    process = Process.from_config(config.process, config.model)
    x, noise = (tuple(torch.randn(2, 3, side, side) for side in (8, 16)) for _ in range(2))
    cond = Conditioning(tokens=torch.randn(2, 3, 8), micro={"scale": torch.full((2,), 16.0)})
    loss = matryoshka_loss(net, x, cond, torch.tensor([0.3, 0.6]), noise, process=process)
    assert torch.equal(loss.total, loss.per_level[1])
    loss.total.backward()
    coarse = {name: there(value.grad) for name, value in net.levels[0].named_parameters()}
    assert not coarse["head.weight"].any()
    assert coarse["stem.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("weights", "stages", "message"),
    [
        ((0.0,), {}, r"level_weights is 0 for level 0, .*stages\[0\]"),
        ((1.0, 0.0), {}, r"level_weights is 0 for level 1, .*stages\[1\]"),
        ((0.0, 1.0), {}, r"level_weights is 0 for level 0, .*stages\[0\]"),
        ((-1.0, 1.0), {}, r"level_weights\[0\]: .*greater than or equal to 0"),
        ((0.0, 1.0), {"mix": [0.5, 0.5]}, r"stages\[0\]\.mix\[0\]"),
    ],
)
def test_what_would_not_be_trained_is_refused(weights, stages, message):
    config = tiny_config() if not stages else finest_config()
    data = config.model_dump(mode="json")
    data["process"]["level_weights"] = weights
    data["train"]["stages"][0] |= stages
    with pytest.raises(ConfigError, match=message):
        from_dict(data)
