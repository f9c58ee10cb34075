"""An upsampler in training: its coarse images, previews, held-out loss and config."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from matryoshka_diffusion.config import ConfigError, RunConfig
from matryoshka_diffusion.configfile import from_dict
from matryoshka_diffusion.data.source import Source, array_source
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pyramid import Resolution, down_sample, up_sample
from matryoshka_diffusion.runs.hooks import HeldOutLoss, Preview, preview_arguments
from matryoshka_diffusion.schedule import alpha_sigma, build_schedules
from matryoshka_diffusion.training.distributed import World
from matryoshka_diffusion.training.inputs import Feed, Inputs
from matryoshka_diffusion.training.signals import Stopped
from matryoshka_diffusion.training.stages import Step
from matryoshka_diffusion.training.trainer import View, train
from test_pipeline import Words, randomised
from tiny_run import TinyPictures, encode, there, tiny_config


def upsampler_config(levels: int = 1, **coarse) -> RunConfig:
    """The tiny run's two levels, or the outer one alone, as an upsampler from 4 or 8 pixels."""
    data = tiny_config(dropout=0.0).model_dump()
    data["model"]["levels"] = data["model"]["levels"][-levels:]
    data["model"]["coarse"] = {"side": 8 if levels == 1 else 4, **coarse}
    data["sampling"] |= {"coarse_noise": 0.3, "steps": 3}
    data["train"]["stages"] = [{"levels": levels, "images": 16, "batch_size": 4, "lr": 1e-2}]
    return from_dict(data)


# --- training ------------------------------------------------------------------------------------


def inputs_of(first: int, count: int, config: RunConfig | None = None, **feed) -> Inputs:
    config = config or upsampler_config()
    rows = (count,) * len(config.model.levels)
    return Feed(config, TinyPictures(), encode, **feed)(Step(0, first, rows, (), False))[0]


def coarse_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    assert inputs.cond.image is not None
    assert inputs.cond.image_t is not None
    return inputs.cond.image, inputs.cond.image_t


def test_a_sample_has_the_same_coarse_image_in_any_batch_and_on_any_rank():
    ranks = [coarse_of(inputs_of(24, 5, world=World(rank=rank, size=2))) for rank in (0, 1)]
    for place, whole in enumerate(coarse_of(inputs_of(24, 5))):
        parts = [coarse_of(inputs_of(24, 2))[place], coarse_of(inputs_of(26, 3))[place]]
        assert torch.equal(whole, torch.cat(parts))
        assert all(torch.equal(whole[rank::2], ranks[rank][place]) for rank in (0, 1))


def test_the_coarse_image_is_the_small_image_under_noise_of_its_own():
    config = upsampler_config(max_noise=0.5)
    inputs = inputs_of(0, 400, config)
    image, t = coarse_of(inputs)
    assert t.max() <= 0.5
    assert t.mean().item() == pytest.approx(0.25, abs=0.02)
    alpha, sigma = alpha_sigma(build_schedules(config.model)[0].log_snr(t.double()))
    up = up_sample(down_sample(inputs.x[0], Resolution(8, 8)), Resolution(16, 16))
    noise = (image - alpha.float().view(-1, 1, 1, 1) * up) / sigma.float().view(-1, 1, 1, 1)
    clear = t > 0.05  # dividing by less would show how float32 rounds
    assert noise[clear].std().item() == pytest.approx(1.0, abs=0.02)
    both = torch.stack([noise[clear].flatten(), inputs.noise[0][clear].flatten()])
    assert abs(torch.corrcoef(both)[0, 1].item()) < 0.02, "not the noise that is to be predicted"
    assert abs(torch.corrcoef(torch.stack([t, inputs.t]))[0, 1].item()) < 0.1


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


def test_previews_enlarge_real_images_with_their_own_captions(tmp_path):
    source = photos(20, captions=[(f"red {n}",) for n in range(20)])
    config = upsampler_config()
    preview = preview_arguments(source, config)
    assert preview["coarse"].shape == (8, 8, 8, 3)
    for prompt, small in zip(preview["prompts"], preview["coarse"], strict=True):
        picture = source[int(prompt.split()[1])].picture.astype(float)
        pooled = picture.reshape(8, 2, 8, 2, 3).mean((1, 3))
        assert np.abs(small - pooled).max() <= 0.5
    net = randomised(config)
    path = Preview(preview, Words(), "cpu")(View(config, tmp_path, 4, lambda: net))
    assert there(path).is_file()


def test_the_held_out_loss_of_an_upsampler_is_the_same_at_every_call(tmp_path):
    config, source = upsampler_config(), photos(8, captions=[("red",)] * 8)
    watch = HeldOutLoss(source, photos(4, captions=[("blue",)] * 4), encode, "cpu")
    view = View(config, tmp_path, 0, lambda: NestedUNet(config.model).eval())
    assert watch(view) == watch(view)


# --- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"coarse": {"side": 16}}}, "coarse.side = 16"),
        ({"model": {"coarse": {"side": 6}}}, "coarse.side = 6"),
        ({"model": {"coarse": None}}, "sampling.coarse_noise .* omit"),
        ({"sampling": {"coarse_noise": None}}, "sampling.coarse_noise: set"),
        ({"sampling": {"coarse_noise": 1.5}}, "sampling.coarse_noise: "),
        ({"model": {"coarse": {"side": 8, "max_noise": 0.2}}}, "sampling.coarse_noise .* = 0.2"),
    ],
)
def test_a_config_that_no_upsampler_can_have_is_refused(change: dict, message: str):
    data = upsampler_config().model_dump(mode="json")
    for part, values in change.items():
        data[part].update(values)
    with pytest.raises(ConfigError, match=message):
        from_dict(data)
