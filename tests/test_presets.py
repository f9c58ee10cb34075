"""Every named run, shrunk: it builds, learns with every parameter, and survives YAML."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ConfigError, LevelConfig, ModelConfig, RunConfig
from matryoshka_diffusion.configfile import from_yaml, to_yaml
from matryoshka_diffusion.diffusion import Process, matryoshka_loss
from matryoshka_diffusion.nn.costs import forward_flops
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.presets import PRESETS, preset
from matryoshka_diffusion.pyramid import Pyramid, build_pyramid, resolutions_of
from matryoshka_diffusion.schedule import build_schedules
from matryoshka_diffusion.train.stages import learning_rate

every_preset = pytest.mark.parametrize("name", PRESETS)


def shrunk(model: ModelConfig) -> ModelConfig:
    """The same nest, smaller: proportions of sides, patches, attention and conditions stay.

    Two channels to a group of the group norms are the least: with one, the norm undoes the bias
    before it, which then has no gradient at all. Likewise a 1 x 1 core would be normalised away.
    """
    divisor = max(model.levels[0].core_side // 2, 1)
    levels = tuple(_shrunk_level(level, divisor) for level in model.levels)
    text = model.text and model.text.model_copy(update={"features": 24, "width": 32})
    coarse = model.coarse and model.coarse.model_copy(update={"side": model.coarse.side // divisor})
    update = {"levels": levels, "embedding": 32, "text": text, "coarse": coarse}
    return model.model_copy(update=update)


def _shrunk_level(level: LevelConfig, divisor: int) -> LevelConfig:
    return level.model_copy(
        update={
            "side": level.side // divisor,
            "widths": (64,) * len(level.widths),
            "blocks": tuple(min(count, 1) for count in level.blocks),
            "attention": tuple(min(count, 1) for count in level.attention),
            "frame_attention": tuple(min(count, 1) for count in level.frame_attention),
        }
    )


def revalidated(run: RunConfig) -> RunConfig:
    return from_yaml(to_yaml(run))


def woken(net: NestedUNet) -> NestedUNet:
    """Zero-initialised parameters get values, so that gradients reach what lies behind them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    return net


def batch(model: ModelConfig, rows: int = 2) -> tuple[Pyramid, Pyramid, Conditioning]:
    """Pictures, noise and conditions of which one row is dropped where rows may be."""
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    shapes = [resolution.shape(model.channels) for resolution in resolutions_of(model)]
    x = build_pyramid(numbers(*shapes[-1]), resolutions_of(model))
    noise = tuple(numbers(*shape) for shape in shapes)
    names = {micro.name for level in model.levels for micro in level.micro}
    cond = Conditioning(
        labels=torch.arange(rows) if model.classes else None,
        tokens=numbers(4, model.text.features) if model.text else None,
        mask=torch.arange(4) < torch.tensor([[4], [2]]) if model.text else None,
        micro={name: torch.tensor([10.0, 30.0]) for name in names},
        image=numbers(*shapes[0]) if model.coarse else None,
        image_t=torch.tensor([0.2, 0.7]) if model.coarse else None,
    )
    if model.classes or (model.text and model.text.learned_null):
        cond = cond.drop(torch.tensor([False, True]))
    return x, noise, cond


@every_preset
def test_every_parameter_of_every_preset_learns(name: str):
    run = preset(name)
    run = revalidated(run.model_copy(update={"model": shrunk(run.model)}))
    net = woken(NestedUNet(run.model))
    x, noise, cond = batch(run.model)
    process = Process.from_config(run.process, run.model)
    times = torch.tensor([0.1, 0.5], dtype=torch.float64)
    loss = matryoshka_loss(net, x, cond, times, noise, process=process)
    assert loss.total.isfinite()
    assert loss.per_level.shape == (len(run.model.levels),)
    loss.total.backward()
    still = {
        key
        for key, parameter in net.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 1e-6
    }
    unused = {
        f"levels.{level}.{part}.{kind}"  # what turns features into the prediction
        for level, weight in enumerate(process.level_weights)
        if weight == 0.0
        for part in ("norm", "head")
        for kind in ("weight", "bias")
    }
    assert still == unused


@every_preset
def test_every_preset_survives_yaml(name: str):
    run = preset(name)
    assert run.name == name
    assert revalidated(run) == run


@every_preset
def test_every_preset_trains_as_deep_as_its_nest(name: str):
    run = preset(name)
    assert run.train.stages[-1].levels == len(run.model.levels)


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in NestedUNet(preset(name).model).parameters())


def test_the_papers_base_model_has_437_million_parameters():
    assert parameters("cc12m-64") == pytest.approx(437.2e6, abs=0.1e6)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("released-64", 461_359_107),
        ("released-256", 476_613_958),
        ("released-1024", 480_970_057),
    ],
)
def test_the_released_models_have_their_exact_size(name: str, count: int):
    assert parameters(name) == count


def test_the_changed_s64_has_the_weights_of_s64_and_about_its_arithmetic():
    """Appendix D.2: on codes of 32 x 32 it does not halve after its first width."""
    plain, changed = preset("cc12m-64").model, preset("cc12m-256-latent").model
    level = changed.levels[0]
    assert (level.side, level.core_side) == (32, plain.levels[0].core_side)
    more = 2 * 9 * 256 + 1  # one channel more in the stem and in the head
    assert parameters("cc12m-256-latent") - parameters("cc12m-64") == more
    share = forward_flops(changed, 1) / forward_flops(plain, 1)
    assert share == pytest.approx(0.815, abs=0.005)


def test_a_model_on_codes_has_the_trunk_of_the_one_on_pixels():
    for name in ("openmoji", "fashion-mnist"):
        pixels, codes = preset(name), preset(f"{name}-latent")
        trunks = [run.model.levels[0] for run in (pixels, codes)]
        assert trunks[0].widths == trunks[1].widths
        assert trunks[0].stem_side == trunks[1].stem_side
        assert pixels.data_side == codes.data_side
        assert pixels.train.images == codes.train.images


@pytest.mark.parametrize(
    ("name", "base", "levels"),
    [
        # -power * log(ratio), from the side of a level over the coarsest one's
        ("openmoji", 0.0, tuple(-2 * math.log(ratio) for ratio in (2, 4, 8))),
        ("fashion-mnist", 0.0, (0.0, -2 * math.log(2))),
        ("cc12m-64", 0.0, (0.0,)),
        ("imagenet-256", 0.0, (0.0, -math.log(4))),
        ("cc12m-256-nest3", 0.0, (0.0, -math.log(2), -math.log(4))),
        ("cc12m-1024", 0.0, (0.0, -2 * math.log(4), -2 * math.log(16))),
        ("cc12m-1024-nest5", 0.0, tuple(-2 * math.log(2**r) for r in range(5))),
        ("released-1024", -0.0248, (0.0, -2 * math.log(4), -2 * math.log(16))),
    ],
)
def test_log_snr_half_way(name: str, base: float, levels: Sequence[float]):
    half = torch.tensor([0.5], dtype=torch.float64)
    found = [float(schedule.log_snr(half)) for schedule in build_schedules(preset(name).model)]
    assert found == pytest.approx([base + shift for shift in levels], abs=1e-3)


def test_an_unknown_preset_is_an_error_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"'openmojis' \(did you mean openmoji\?\).*cc12m-64"):
        preset("openmojis")


@pytest.mark.parametrize("name", ["openmoji", "fashion-mnist", "openmoji-codes", "openmoji-simple"])
def test_a_rate_that_decays_is_whole_until_thirty_per_cent_of_the_last_stage_are_left(name):
    train = preset(name).train
    last = train.stages[-1]
    left = 0.3 * last.images
    before = learning_rate(train, int(train.images - 1.01 * left), last.batch_size)
    assert before == pytest.approx(last.lr)
    halfway = learning_rate(train, int(train.images - 0.5 * left), last.batch_size)
    assert halfway == pytest.approx(last.lr / 2, rel=1e-2)
    assert (
        preset("cc12m-256").train.decay_share == preset("cc12m-256-simple").train.decay_share == 0
    )
