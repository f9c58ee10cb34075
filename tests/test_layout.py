"""The layout of features in memory: chosen once, kept, and no business of the numbers."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from matryoshka_diffusion.configfile import load_config
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.train import layout as layout_module
from matryoshka_diffusion.train.checkpoint import newest
from matryoshka_diffusion.train.curriculum import step_at
from matryoshka_diffusion.train.feed import Feed
from matryoshka_diffusion.train.layout import (
    arranged,
    random_inputs,
    resolve_layout,
    seconds_per_pass,
)
from matryoshka_diffusion.train.learner import Learner
from matryoshka_diffusion.train.run_folder import open_run
from matryoshka_diffusion.train.signals import Stopped
from test_trainer import run, stop_at, there
from test_upsampler import upsampler_config
from tiny_run import TinyPictures, encode, tiny_config, tiny_video

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LAST = torch.channels_last


def is_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=LAST) and not x.is_contiguous()


def test_all_that_is_as_large_as_the_weights_lies_as_the_features_do():
    """Else each step would copy weights, or update averages one element at a time."""
    config = tiny_config(layout="channels_last")
    learner = Learner(config, CPU)
    seen: list[Pyramid] = []
    learner.grow(2)
    learner.net.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    learner.learn(Feed(config, TinyPictures(), encode)(step_at(config.train, 24)))
    assert all(map(is_last, seen[0]))
    name = "levels.1.stem.weight"
    weight = learner.net.get_parameter(name)
    moments = learner.optimizer.state[weight]
    for value in (weight, learner.ema.weights[name], weight.grad, moments["exp_avg"]):
        assert value is not None
        assert is_last(value)


def test_layouts_agree_up_to_rounding():
    outcomes = []
    for layout in ("nchw", "channels_last"):
        config = tiny_config(layout=layout, dropout=0.0)  # its masks follow memory's order
        learner, feed = Learner(config, CPU), Feed(config, TinyPictures(), encode)
        outcomes += [[learner.learn(feed(step_at(config.train, 4 * n))).loss for n in range(3)]]
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-4)


def test_weights_are_saved_alike_in_either_layout(tmp_path):
    """A file holds NCHW, so that any run may go on with any file."""
    for layout in ("nchw", "channels_last"):
        with pytest.raises(Stopped):
            run(tmp_path / layout, tiny_config(layout=layout, dropout=0.0), hooks=[stop_at(4)])
    one, other = (
        load_file(there(newest(tmp_path / layout / "checkpoints")) / "weights.safetensors")
        for layout in ("nchw", "channels_last")
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)


# --- the choice ----------------------------------------------------------------------------------


def test_both_layouts_are_timed_on_what_the_run_computes(monkeypatch):
    kinds = []

    def noted(pyramid, layout):
        kinds.append(layout)
        return arranged(pyramid, layout)

    monkeypatch.setattr(layout_module, "arranged", noted)
    seconds = seconds_per_pass(tiny_config(), CPU)
    assert kinds[:4] == ["nchw", "channels_last"] * 2, "they take turns"
    assert sorted(seconds) == ["channels_last", "nchw"]
    assert all(value > 0 for value in seconds.values())


@pytest.mark.parametrize("config", [tiny_video(), upsampler_config(levels=2)], ids=["clips", "up"])
def test_layouts_of_clips_and_of_upsamplers_are_timed_too(config):
    assert seconds_per_pass(config, CPU).keys() == {"nchw", "channels_last"}


@pytest.mark.parametrize(("ranks", "accumulate", "rows"), [(1, 1, 4), (2, 1, 2), (2, 2, 1)])
def test_they_are_timed_on_no_more_than_a_micro_batch_of_one_rank(
    monkeypatch, tmp_path, ranks, accumulate, rows
):
    class Seen(Exception):
        pass

    def noted(model, rows, device):
        raise Seen(rows)

    monkeypatch.setattr(layout_module, "random_inputs", noted)
    config = tiny_config(layout="auto", accumulate=accumulate)  # batches of 4
    with pytest.raises(Seen, match=f"^{rows}$"):
        open_run(tmp_path, config, torch.device("meta"), ranks)


@pytest.mark.parametrize(
    ("nchw", "last", "chosen"), [(2.0, 1.0, "channels_last"), (1.0, 2.0, "nchw"), (1.02, 1, "nchw")]
)
def test_the_faster_one_is_taken_and_a_tie_is_nchw(monkeypatch, nchw, last, chosen):
    monkeypatch.setattr(
        layout_module,
        "seconds_per_pass",
        lambda config, device, ranks: {"nchw": nchw, "channels_last": last},
    )
    assert resolve_layout(tiny_config(layout="auto"), GPU) == chosen


def test_what_does_not_fit_is_not_measured_but_nchw(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(layout_module, "seconds_per_pass", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    assert resolve_layout(tiny_config(layout="auto"), GPU) == "nchw"


def test_a_cpu_takes_nchw_and_what_was_asked_for_is_taken(monkeypatch):
    monkeypatch.setattr(layout_module, "seconds_per_pass", pytest.fail)
    assert resolve_layout(tiny_config(layout="auto"), CPU) == "nchw"
    assert resolve_layout(tiny_config(layout="channels_last"), CPU) == "channels_last"
    assert resolve_layout(tiny_config(layout="nchw"), GPU) == "nchw"


def test_the_choice_is_made_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "matryoshka_diffusion.train.run_folder.resolve_layout",
        lambda config, device, ranks: (
            "channels_last" if config.train.layout == "auto" else config.train.layout
        ),
    )
    asked = tiny_config(layout="auto")
    assert open_run(tmp_path, asked, CPU).train.layout == "channels_last"
    assert load_config(tmp_path / "config.yaml").train.layout == "channels_last"
    monkeypatch.undo()  # another machine, where it would be NCHW
    assert open_run(tmp_path, asked, CPU).train.layout == "channels_last"


def test_made_up_inputs_are_what_a_network_takes():
    model = tiny_config().model
    z, t, cond = random_inputs(model, 3, CPU)
    assert [tuple(level.shape) for level in z] == [(3, 3, 8, 8), (3, 3, 16, 16)]
    outputs = Learner(tiny_config(), CPU, images_seen=25).net(z, t, cond)
    assert [y.shape for y in outputs] == [level.shape for level in z]
