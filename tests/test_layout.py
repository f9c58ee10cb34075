"""Layout of features in memory: a constant of the device, and no business of the numbers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.train.checkpoint import newest
from matryoshka_diffusion.train.inputs import Feed
from matryoshka_diffusion.train.precision import resolve_layout
from matryoshka_diffusion.train.signals import Stopped
from matryoshka_diffusion.train.stages import step_at
from matryoshka_diffusion.train.step import diffusion
from matryoshka_diffusion.train.trainer import Trainer
from test_trainer import run, stop_at, there
from tiny_run import TinyClips, TinyPictures, encode, tiny_config, tiny_video

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def is_last(x: torch.Tensor) -> bool:
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.is_contiguous(memory_format=last) and not x.is_contiguous()


def test_all_that_is_as_large_as_the_weights_lies_as_the_features_do():
    """Else each step would copy weights, or update averages one element at a time."""
    config = tiny_config(layout="channels_last")
    trainer = Trainer(diffusion(config))
    seen: list[Pyramid] = []
    trainer.grow(2)
    trainer.net.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    trainer.step(Feed(config, TinyPictures(), encode)(step_at(config.train, 24)))
    assert all(map(is_last, seen[0]))
    name = "levels.1.stem.weight"
    weight = trainer.net.get_parameter(name)
    moments = trainer.optimizer.state[weight]
    for value in (weight, trainer.ema.weights[name], weight.grad, moments["exp_avg"]):
        assert value is not None
        assert is_last(value)


@pytest.mark.parametrize(("make", "loader"), [(tiny_config, TinyPictures), (tiny_video, TinyClips)])
def test_layouts_agree_up_to_rounding(make, loader):
    losses = []
    for layout in ("nchw", "channels_last"):
        config = make(layout=layout, dropout=0.0)  # its masks follow memory's order
        trainer, feed = Trainer(diffusion(config)), Feed(config, loader(), encode)
        losses += [[trainer.step(feed(step_at(config.train, 4 * n))).loss for n in range(3)]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_weights_are_saved_alike_in_either_layout(tmp_path):
    """A file holds NCHW, so that any run may continue from any file."""
    for layout in ("nchw", "channels_last"):
        with pytest.raises(Stopped):
            run(tmp_path / layout, tiny_config(layout=layout, dropout=0.0), hooks=[stop_at(4)])
    one, other = (
        load_file(there(newest(tmp_path / layout / "checkpoints")) / "weights.safetensors")
        for layout in ("nchw", "channels_last")
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


def test_auto_is_a_constant_of_the_device_and_anything_else_is_taken():
    assert resolve_layout("auto", CPU) == "nchw"
    assert resolve_layout("auto", GPU) == "channels_last"
    assert resolve_layout("channels_last", CPU) == "channels_last"
    assert resolve_layout("nchw", GPU) == "nchw"
