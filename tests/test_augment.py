"""Augmentation: transformations of images, the network's input, and samples that show none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import picturing
from matryoshka_diffusion.conditioning import AUGMENT_NUMBERS, Conditioning
from matryoshka_diffusion.config import ConfigError, ModelConfig
from matryoshka_diffusion.configfile import from_dict, override
from matryoshka_diffusion.data.augment import (
    MOVE,
    STRETCH,
    ZOOM,
    Augmentation,
    augmented,
    draw_augmentation,
)
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.nn.nested import NestedUNet, grow
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.rng import normal
from matryoshka_diffusion.runs import prepare as job
from matryoshka_diffusion.runs.grow import warm_start
from matryoshka_diffusion.training.inputs import Feed
from matryoshka_diffusion.training.stages import steps
from matryoshka_diffusion.training.trainer import train
from test_pipeline import Words
from tiny_run import TinyPictures, encode, tiny_config

SIDE = 16


def toy() -> Source:
    return picturing.toy(5, SIDE)


def tiny_model(**changes) -> ModelConfig:
    return tiny_config(dropout=0.0).model.model_copy(update={"augment": True, **changes})


# --- what is drawn ---------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.12, 0.5])
def test_each_transformation_happens_to_the_share_independently(share):
    drawn = [draw_augmentation(0, n, share) for n in range(4_000)]
    happened = np.array(
        [[x.mirrored, x.quarter_turns, x.zoom, x.stretch, x.right] for x in drawn], bool
    )
    error = 4 * np.sqrt(share * (1 - share) / len(drawn))
    assert np.abs(happened.mean(0) - share).max() < error
    together = (happened.T.astype(float) @ happened / len(drawn))[np.triu_indices(5, 1)]
    assert np.abs(together - share**2).max() < error


def test_how_much_is_drawn_as_stated():
    drawn = [draw_augmentation(1, n, 1.0) for n in range(4_000)]
    turns = np.bincount([x.quarter_turns for x in drawn], minlength=4) / len(drawn)
    assert turns[0] == 0
    assert np.abs(turns[1:] - 1 / 3).max() < 0.03
    amounts = np.array([x[2:] for x in drawn])
    assert np.abs(amounts.std(0) / (ZOOM, STRETCH, MOVE, MOVE) - 1).max() < 0.05
    assert np.abs(np.corrcoef(amounts.T) - np.eye(4)).max() < 0.06


def test_no_share_does_nothing():
    assert all(draw_augmentation(3, n, 0.0) == Augmentation() for n in range(50))
    assert not Augmentation().numbers().any()
    assert (augmented(toy()[0].picture, Augmentation()) == toy()[0].picture).all()


# --- what is done ------------------------------------------------------------------------------


@given(mirrored=st.booleans(), turns=st.integers(0, 3))
def test_mirrors_and_turns_are_told_exactly_and_can_be_undone(mirrored, turns):
    picture = toy()[0].picture
    done = Augmentation(mirrored, turns)
    changed = augmented(picture, done)
    mirror, cosine, sine, *rest = done.numbers().tolist()
    assert rest == [0.0] * 4
    told = round(np.degrees(np.arctan2(sine, cosine + 1)) / 90) % 4
    back = np.rot90(changed, -told)
    assert ((back[:, ::-1] if mirror else back) == picture).all()


def wave(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A smooth picture without symmetries; x to the right and y down, from -1 to 1."""
    shades = (
        np.sin(2.1 * x + 0.4) * np.cos(1.7 * y),
        np.cos(1.3 * x - 2 * y),
        np.sin(x + 0.5 * y * y),
    )
    return np.stack(shades, -1) * 100 + 128


@given(
    zoom=st.floats(-0.5, 0.5),
    stretch=st.floats(-0.4, 0.4),
    right=st.floats(-0.3, 0.3),
    down=st.floats(-0.3, 0.3),
)
def test_the_rest_is_where_the_numbers_say(zoom, stretch, right, down):
    centres = (np.arange(64) + 0.5) / 32 - 1
    x, y = np.meshgrid(centres, centres)
    picture = wave(x, y).round().astype(np.uint8)
    done = Augmentation(zoom=zoom, stretch=stretch, right=right, down=down)
    changed = augmented(picture, done).astype(float)
    _, _, _, z, s, r, d = done.numbers().astype(float)
    wide, high = 2 ** (ZOOM * z + STRETCH * s), 2 ** (ZOOM * z - STRETCH * s)
    from_x, from_y = (x - 2 * MOVE * r) / wide, (y - 2 * MOVE * d) / high
    inside = (np.abs(from_x) < 0.95) & (np.abs(from_y) < 0.95)
    assert np.abs(changed - wave(from_x, from_y))[inside].max(initial=0) < 2


def test_beyond_the_edge_the_picture_is_reflected():
    picture = picturing.toy(1, 8)[0].picture
    moved = augmented(picture, Augmentation(right=0.25))
    assert np.abs(moved[:, 2:].astype(int) - picture[:, :-2]).max() <= 1
    assert np.abs(moved[:, :2].astype(int) - picture[:, 1::-1]).max() <= 1


# --- the loader --------------------------------------------------------------------------------


def test_a_batch_tells_what_was_done_to_each_of_its_pictures():
    source = toy()
    plain = Loader(source, 0, flip=True).batch(range(300))
    batch = Loader(source, 0, flip=True, augment=0.2).batch(range(300))
    assert plain.augment is None
    assert batch.augment is not None
    assert batch.augment.shape == (300, AUGMENT_NUMBERS)
    untouched = (batch.augment == 0).all(1)
    assert 60 < int(untouched.sum()) < 140  # 0.8 ** 5 of 300 is 98
    changed = (batch.picture != plain.picture).flatten(1).any(1)
    assert torch.equal(changed, ~untouched)
    for row in (~untouched).nonzero()[:20, 0].tolist():
        done = draw_augmentation(0, row, 0.2)
        assert batch.augment[row].tolist() == done.numbers().tolist()
        before, after = (one.picture[row].permute(1, 2, 0).numpy() for one in (plain, batch))
        assert (augmented(np.ascontiguousarray(before), done) == after).all()


# --- the network -------------------------------------------------------------------------------


def inputs(model: ModelConfig, augment: torch.Tensor | None):
    generator = torch.Generator().manual_seed(0)
    z = tuple(
        torch.randn(2, 3, level.side, level.side, generator=generator) for level in model.levels
    )
    tokens = torch.randn(2, 3, 8, generator=generator)
    cond = Conditioning(tokens=tokens, micro={"scale": torch.full((2,), 9.0)}, augment=augment)
    return z, torch.tensor([0.3, 0.8]), cond


def opened(net: NestedUNet) -> NestedUNet:
    """Network without zero layers, as after training; equal names have equal weights."""
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.add_(normal(name, [(0,)], tuple(weight.shape))[0], alpha=0.05)
    return net.eval()


def weight(net: NestedUNet) -> torch.Tensor:
    """Weight of the layer that receives the augmentation."""
    return dict(net.named_parameters())["conditioner.augment.weight"]


def test_a_network_that_is_told_nothing_is_told_zeros_and_starts_as_one_without():
    told, untold = (opened(NestedUNet(tiny_model(augment=on))) for on in (True, False))
    extra = told.state_dict().keys() - untold.state_dict().keys()
    assert extra == {"conditioner.augment.weight"}
    with torch.no_grad():
        nothing, zeros, turned, without = (
            net(*inputs(net.config, augment))
            for net, augment in (
                (told, None),
                (told, torch.zeros(2, 7)),
                (told, torch.tensor([[0.0] * 7, [1.0] * 7])),
                (untold, None),
            )
        )
    for level in range(2):
        assert torch.equal(nothing[level], zeros[level])
        assert torch.equal(nothing[level], without[level])
        assert torch.allclose(turned[level][0], nothing[level][0], atol=1e-6)
        assert not torch.allclose(turned[level][1], nothing[level][1], atol=1e-3)


def test_a_grown_network_draws_the_same_and_learns_from_every_level():
    config = tiny_model()
    small = opened(NestedUNet(config.first(1)))
    large = grow(small, config).eval()
    assert torch.equal(weight(large), weight(small))
    z, t, cond = inputs(config, torch.ones(2, 7))
    with torch.no_grad():
        assert torch.equal(large(z, t, cond)[0], small(z[:1], t, cond)[0])
    net = opened(NestedUNet(config))
    for level in range(2):
        net.zero_grad()
        net(z, t, cond)[level].square().sum().backward()
        gradient = weight(net).grad
        assert gradient is not None
        assert gradient.abs().min() > 0


class Augmented(TinyPictures):
    def batch(self, ids):
        batch = super().batch(ids)
        rows = [draw_augmentation(0, n, 0.5).numbers() for n in batch.ids.tolist()]
        return replace(batch, augment=torch.tensor(np.stack(rows)))


def test_the_feed_passes_the_augmentation_on_and_zeros_without_any():
    config = tiny_config().model_copy(update={"model": tiny_model()})
    step = next(iter(steps(config.train, 0)))
    expected = Augmented().batch(range(4)).augment
    for settings, loader, numbers in (
        (config, Augmented(), expected),
        (config, TinyPictures(), torch.zeros(4, 7)),
        (tiny_config(), Augmented(), None),
    ):
        condition = Feed(settings, loader, encode)(step)[0].cond.augment
        if numbers is None:
            assert condition is None
        else:
            assert condition is not None
            assert torch.equal(condition, numbers)


def test_a_run_with_augmentation_trains_and_its_samples_show_none(tmp_path, monkeypatch):
    data = tiny_config().model_dump(mode="json")
    data["model"]["augment"], data["data"]["augment"] = True, 0.5
    finished = train(from_dict(data), Augmented(), tmp_path / "run", encode=encode)
    model = Matryoshka.load(finished, encoder=Words())
    assert weight(model.net).abs().min() > 0
    conditions, forward = [], model.net.conditioner.forward
    monkeypatch.setattr(
        model.net.conditioner, "forward", lambda cond: conditions.append(cond) or forward(cond)
    )
    assert model.sample("red", steps=2).pictures.shape == (1, 16, 16, 3)
    assert conditions
    assert all(cond.augment is None for cond in conditions)


# --- the config --------------------------------------------------------------------------------


def test_augmentation_that_the_network_does_not_receive_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.augment .* set model\.augment=true"):
        override(preset("folder-64"), ["data.augment=0.12"])
    config = override(preset("folder-64"), ["data.augment=0.12", "model.augment=true"])
    assert (config.data.augment, config.model.augment) == (0.12, True)
    with pytest.raises(ConfigError, match=r"data\.augment"):
        override(config, ["data.augment=1.2"])
    model = str(train(tiny_config(), TinyPictures(), tmp_path / "run", encode=encode))
    with pytest.raises(ConfigError, match=r"data\.augment .* or data\.augment=0"):
        job.find_config(model, None, ["data.augment=0.1"])
    config = job.find_config(model, None, ["data.augment=0.1", "model.augment=true"])
    with pytest.raises(ConfigError, match=r"train\.init: .* is not the beginning"):
        warm_start(config, tmp_path / "tuned")
