"""An upsampler: what it sees of the coarse picture, in training and in sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from matryoshka_diffusion.cli.info import describe
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import (
    BaseConfig,
    CoarseConfig,
    ConfigError,
    RunConfig,
    StageConfig,
)
from matryoshka_diffusion.configfile import from_dict
from matryoshka_diffusion.data.source import Source, array_source
from matryoshka_diffusion.diffusion import augment_coarse
from matryoshka_diffusion.nn.nested import NestedUNet, grow
from matryoshka_diffusion.pyramid import Resolution, down_sample, up_sample
from matryoshka_diffusion.runs.held_out import HeldOutLoss
from matryoshka_diffusion.runs.hooks import Preview, preview_of
from matryoshka_diffusion.schedule import Cosine, Shifted, alpha_sigma, build_schedules
from matryoshka_diffusion.train.distributed import World
from matryoshka_diffusion.train.inputs import Feed, Inputs
from matryoshka_diffusion.train.signals import Stopped
from matryoshka_diffusion.train.stages import Step
from matryoshka_diffusion.train.trainer import View, train
from test_nested import TIMES, equal, nest, noisy, run, wake
from test_pipeline import Words, randomised
from tiny_run import TinyPictures, encode, tiny_config


def upsampler_config(levels: int = 1, **coarse) -> RunConfig:
    """The tiny run's two levels, or the outer one alone, as an upsampler from 4 or 8 pixels."""
    run = tiny_config(dropout=0.0)
    model = run.model.model_copy(
        update={
            "levels": run.model.levels[-levels:],
            "coarse": CoarseConfig(side=8 if levels == 1 else 4, **coarse),
        }
    )
    stage = StageConfig(levels=levels, images=16, batch_size=4, lr=1e-2)
    sampling = run.sampling.model_copy(update={"coarse_noise": 0.3, "steps": 3})
    return from_dict(
        run.model_copy(
            update={
                "model": model,
                "sampling": sampling,
                "train": run.train.model_copy(update={"stages": (stage,)}),
            }
        ).model_dump()
    )


# --- the coarse picture under noise --------------------------------------------------------------


def test_upsampling_keeps_planes_and_is_nothing_at_the_same_side():
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    fine = up_sample(ramp, Resolution(32, 32))
    expected = (torch.arange(32.0) + 0.5) / 4 - 0.5  # the centres of the finer pixels
    torch.testing.assert_close(fine[0, 0, 5, 2:-2], expected[2:-2])
    assert fine.aminmax() == (0.0, 7.0), "the border is repeated"
    assert up_sample(ramp, Resolution(8, 8)) is ramp


def test_without_noise_the_coarse_picture_is_untouched():
    coarse, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)
    t = torch.zeros(2, dtype=torch.float64)
    seen = augment_coarse(coarse, t, noise, Cosine())
    assert torch.equal(seen, up_sample(coarse, Resolution(8, 8)))


@pytest.mark.parametrize("t", [0.2, 0.7, 1.0])
def test_noise_follows_the_schedule_of_the_level_that_sees_it(t: float):
    schedule = Shifted(Cosine(), ratio=4.0, power=2.0)
    rows = 4000
    coarse = torch.full((rows, 1, 1, 1), 0.6)
    noise = torch.randn(rows, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    times = torch.full((rows,), t, dtype=torch.float64)
    seen = augment_coarse(coarse, times, noise, schedule)
    alpha, sigma = alpha_sigma(schedule.log_snr(times[:1]))
    assert seen.mean().item() == pytest.approx(0.6 * alpha.item(), abs=0.03)
    assert seen.std().item() == pytest.approx(sigma.item(), abs=0.03)


# --- training ------------------------------------------------------------------------------------


def given(first: int, count: int, config: RunConfig | None = None) -> Inputs:
    config = config or upsampler_config()
    rows = (count,) * len(config.model.levels)
    return Feed(config, TinyPictures(), encode)(Step(0, first, rows, 0.1, False))


def image(inputs: Inputs) -> tuple[Tensor, Tensor]:
    assert inputs.cond.image is not None
    assert inputs.cond.image_t is not None
    return inputs.cond.image, inputs.cond.image_t


def test_a_sample_sees_the_same_coarse_picture_in_any_batch():
    whole = image(given(24, 6))
    for place, all_rows in enumerate(whole):
        parts = [image(given(24, 2))[place], image(given(26, 4))[place]]
        assert torch.equal(all_rows, torch.cat(parts))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_sees_the_coarse_pictures_of_its_own_rows(rank: int):
    feed = Feed(upsampler_config(), TinyPictures(), encode, world=World(rank=rank, size=2))
    whole, mine = image(given(24, 5)), image(feed(Step(0, 24, (5,), 0.1, False)))
    assert all(torch.equal(a[rank::2], b) for a, b in zip(whole, mine, strict=True))


def test_training_shows_the_picture_itself_made_small_under_noise_of_its_own():
    config = upsampler_config(max_noise=0.5)
    inputs = given(0, 400, config)
    seen, t = image(inputs)
    assert t.max() <= 0.5
    assert t.mean().item() == pytest.approx(0.25, abs=0.02)
    alpha, sigma = alpha_sigma(build_schedules(config.model)[0].log_snr(t.double()))
    up = up_sample(down_sample(inputs.x[0], Resolution(8, 8)), Resolution(16, 16))
    noise = (seen - alpha.float().view(-1, 1, 1, 1) * up) / sigma.float().view(-1, 1, 1, 1)
    clear = t > 0.05  # dividing by less would show how float32 rounds
    assert noise[clear].std().item() == pytest.approx(1.0, abs=0.02)
    both = torch.stack([noise[clear].flatten(), inputs.noise[0][clear].flatten()])
    assert abs(torch.corrcoef(both)[0, 1].item()) < 0.02, "not the noise that is to be predicted"
    assert abs(torch.corrcoef(torch.stack([t, inputs.t]))[0, 1].item()) < 0.1


def test_other_models_are_given_no_coarse_picture():
    inputs = Feed(tiny_config(), TinyPictures(), encode)(Step(1, 0, (4, 2), 0.1, False))
    assert inputs.cond.image is inputs.cond.image_t is None


def test_an_upsampler_resumes_bit_for_bit(tmp_path):
    config = upsampler_config()
    whole = train(config, TinyPictures(), tmp_path / "whole", encode=encode)

    def stop(view: View) -> None:
        raise Stopped("enough", 2)

    with pytest.raises(Stopped):
        train(config, TinyPictures(), tmp_path / "cut", encode=encode, hooks=[(8, stop)])
    resumed = train(config, TinyPictures(), tmp_path / "cut", encode=encode)
    name = "model.safetensors"
    assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def photos(count: int, **columns) -> Source:
    array = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    keys = [str(n) for n in range(count)]
    return array_source("toy", array, keys, **columns)


def test_previews_enlarge_real_pictures_with_their_own_captions(tmp_path):
    source = photos(20, captions=[(f"red {n}",) for n in range(20)])
    config = upsampler_config()
    asked = preview_of(source, config)
    assert asked["coarse"].shape == (8, 8, 8, 3)
    for prompt, small in zip(asked["prompts"], asked["coarse"], strict=True):
        picture = source[int(prompt.split()[1])].picture.astype(float)
        pooled = picture.reshape(8, 2, 8, 2, 3).mean((1, 3))
        assert np.abs(small - pooled).max() <= 0.5
    net = randomised(config)
    path = Preview(asked, Words(), "cpu")(View(config, tmp_path, 4, lambda: net))
    assert path.is_file()
    classes = config.model_copy(
        update={"model": config.model.model_copy(update={"text": None, "classes": 3})}
    )
    labelled = photos(5, labels=[0, 1, 2, 2, 1], classes=("a", "b", "c"))
    assert preview_of(labelled, classes)["classes"] == [0, 1, 2, 2, 1]


def test_the_held_out_loss_of_an_upsampler_is_the_same_at_every_call(tmp_path):
    config, source = upsampler_config(), photos(8, captions=[("red",)] * 8)
    watch = HeldOutLoss(source, photos(4, captions=[("blue",)] * 4), encode, "cpu")
    view = View(config, tmp_path, 0, lambda: NestedUNet(config.model).eval())
    assert watch(view) == watch(view)


# --- the network ---------------------------------------------------------------------------------

COARSE = CoarseConfig(side=4)


def beside(seed: int = 3, t: float = 0.4) -> Conditioning:
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(
        image=torch.randn(4, 3, 8, 8, generator=generator), image_t=torch.full((4,), t)
    )


def test_picture_and_time_of_its_noise_reach_every_level():
    net = wake(NestedUNet(nest(3, coarse=COARSE)))
    plain = run(net, beside())
    for other in (beside(seed=4), beside(t=0.9)):
        assert all((a != b).any() for a, b in zip(plain, run(net, other), strict=True))


def test_growing_an_upsampler_keeps_its_predictions_bit_for_bit():
    small = wake(NestedUNet(nest(1, coarse=COARSE)))
    large = grow(small, nest(3, coarse=COARSE))
    coarse = run(small, beside(), z=noisy(small.config))
    assert equal(run(large, beside())[:1], coarse)
    with pytest.raises(ValueError, match=r"cannot grow: model\.coarse is side=4"):
        grow(small, nest(3))


def test_rows_without_the_finer_levels_are_computed_as_by_the_smaller_network():
    net = wake(NestedUNet(nest(2, coarse=COARSE)))
    z = noisy(net.config)
    ragged = run(net, beside(), z=(z[0], z[1][:1]))
    alone = run(wake(NestedUNet(nest(2, coarse=COARSE))), beside(), z=(z[0], z[1][:0]))
    torch.testing.assert_close(ragged[0][1:], alone[0][1:])


def test_a_missing_picture_is_said():
    net = NestedUNet(nest(1, coarse=COARSE))
    with pytest.raises(ValueError, match="this network is an upsampler, but image or image_t"):
        net(noisy(net.config), TIMES, Conditioning())


# --- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"coarse": {"side": 16}}}, "levels.0..side = 16 .* coarse.side = 16"),
        ({"model": {"coarse": {"side": 6}}}, "coarse.side = 6"),
        ({"model": {"coarse": None}}, "sampling.coarse_noise .* omit"),
        ({"sampling": {"coarse_noise": None}}, "sampling.coarse_noise: set"),
        ({"sampling": {"coarse_noise": 1.5}}, "sampling.coarse_noise: .*less than or equal to 1"),
        ({"sampling": {"coarse_noise": -0.1}}, "sampling.coarse_noise: .*greater than or equal"),
        ({"model": {"coarse": {"side": 8, "max_noise": 0.2}}}, "sampling.coarse_noise .* = 0.2"),
        ({"sampling": {"base": {"pth": "x"}}}, r"sampling.base.pth: unknown key \(did you mean"),
    ],
)
def test_an_upsampler_that_cannot_be_is_refused(change: dict, message: str):
    data = upsampler_config().model_dump(mode="json")
    for part, values in change.items():
        data[part].update(values)
    with pytest.raises(ConfigError, match=message):
        from_dict(data)


def test_info_says_what_is_enlarged_and_who_draws_it():
    config = upsampler_config()
    said = "upsamples pictures of 8 pixels under noise of times up to 1; draws with 0.3, after "
    assert f"{said}a base yet to be named (--base)" in describe(config)
    sampling = config.sampling.model_copy(update={"base": BaseConfig(path="runs/base")})
    named = config.model_copy(update={"sampling": sampling})
    assert f"{said}runs/base\n" in describe(named)
