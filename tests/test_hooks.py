"""Hooks of a training: previews, and the loss on held-out images, which training never sees."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from matryoshka_diffusion.config import ConfigError
from matryoshka_diffusion.configfile import changed
from matryoshka_diffusion.data.source import Source, array_source, split
from matryoshka_diffusion.draw.grid import SETTINGS_KEY
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.pyramid import Resolution, shrink
from matryoshka_diffusion.runs import hooks as watch
from matryoshka_diffusion.runs import prepare as job
from matryoshka_diffusion.runs.hooks import HeldOutLoss, Preview, Quality, preview_arguments
from matryoshka_diffusion.training.trainer import View
from picturing import save_noise
from test_pipeline import Words, class_model, plain_model, text_model
from tiny_run import encode, there, tiny_config, with_frames


def pictures(count: int, first: int = 0) -> Source:
    array = np.random.default_rng(first).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return array_source(
        name="toy",
        array=array,
        keys=[f"picture {n}" for n in range(first, first + count)],
        captions=[(f"red {n}",) for n in range(first, first + count)],
    )


def test_a_share_is_held_out_by_key_alone():
    seen, unseen = split(pictures(2_000), 0.1)
    assert unseen is not None
    assert 150 < len(unseen) < 250
    assert sorted([*seen.keys, *unseen.keys]) == sorted(pictures(2_000).keys)
    later, _ = split(pictures(3_000, first=1_000), 0.1)
    both = {f"picture {n}" for n in range(1_000, 2_000)}
    assert both & set(seen.keys) == both & set(later.keys)


def test_a_part_is_a_source_like_the_whole():
    whole = pictures(50)
    _, part = split(whole, 0.5)
    assert part is not None
    rows = [whole.keys.index(key) for key in part.keys]
    assert rows == sorted(rows)
    for place, index in enumerate(rows):
        assert part[place].key == whole[index].key
        assert (part[place].picture == whole[index].picture).all()
    assert [x.key for x in part.many([1, 0])] == [part[1].key, part[0].key]
    assert part.captions == [whole[index].captions for index in rows]
    assert (part.side, part.channels, part.classes, part.total) == (16, 3, (), 50)


def test_nothing_is_held_out_at_zero_and_an_empty_side_is_refused():
    whole = pictures(5)
    assert split(whole, 0.0) == (whole, None)
    for share in (1e-9, 0.999999):
        with pytest.raises(ConfigError, match="some on either side"):
            split(whole, share)


def view(net: NestedUNet, tmp_path) -> View:
    return View(tiny_config(), tmp_path, 0, lambda: net)


def test_the_loss_is_the_same_at_every_call_and_follows_the_weights(tmp_path):
    config = tiny_config(dropout=0.0)
    seen, unseen = pictures(40), pictures(40, first=100)
    loss = HeldOutLoss(seen, unseen, encode, "cpu")
    net = NestedUNet(config.model).eval()
    before = loss(view(net, tmp_path))
    torch.rand(3)
    assert loss(view(net, tmp_path)) == before
    assert [len(losses) for losses in before.values()] == [2, 2]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
    after = loss(view(net, tmp_path))
    assert after["seen_loss_per_level"] != before["seen_loss_per_level"]
    assert after["held_out_loss_per_level"] != before["held_out_loss_per_level"]


def test_the_loss_of_a_level_that_sleeps_is_the_mean_of_the_samples_that_have_it(
    tmp_path, monkeypatch
):
    config, source = tiny_config(dropout=0.0, wake=(0.0,)), pictures(40)
    net, losses = NestedUNet(config.model).eval(), []
    for batch in (64, 4):  # a batch of 4 may have no sample with the finer level
        monkeypatch.setattr(watch, "FRAMES_PER_BATCH", batch)
        loss = HeldOutLoss(source, source, encode, "cpu")
        losses.append(loss(View(config, tmp_path, 0, lambda: net))["seen_loss_per_level"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_loss_of_a_run_that_still_grows_is_that_of_its_coarse_images(tmp_path, monkeypatch):
    config, sizes = tiny_config(dropout=0.0), set()

    def no_loss(net, x, *_, **__) -> SimpleNamespace:
        sizes.add(tuple(tuple(level.shape[-2:]) for level in x))
        return SimpleNamespace(per_level=torch.zeros(len(x)))

    monkeypatch.setattr(watch, "matryoshka_loss", no_loss)
    loss = HeldOutLoss(pictures(4), pictures(4), encode, "cpu")
    for levels, expected in ((1, ((8, 8),)), (2, ((8, 8), (16, 16)))):
        loss(view(NestedUNet(config.model.first(levels)).eval(), tmp_path))
        assert sizes == {expected}
        sizes.clear()


def test_as_many_frames_are_watched_at_once_as_pictures(tmp_path, monkeypatch):
    batches = []

    def no_loss(net, x, *_, **__) -> SimpleNamespace:
        batches.append(len(x[-1]))
        return SimpleNamespace(per_level=torch.zeros(2))

    monkeypatch.setattr(watch, "FRAMES_PER_BATCH", 8)
    monkeypatch.setattr(watch, "matryoshka_loss", no_loss)
    for frames, expected in ((None, [8, 2]), (4, [2] * 5), (16, [1] * 10)):
        config = with_frames(tiny_config(dropout=0.0), frames)
        shape = (10, 16, 16, 3) if frames is None else (10, frames, 16, 16, 3)
        keys, captions = [str(n) for n in range(10)], [("red",)] * 10
        source = array_source("toy", np.zeros(shape, np.uint8), keys, captions=captions)
        HeldOutLoss(source, source, encode, "cpu")(view(NestedUNet(config.model).eval(), tmp_path))
        assert batches == 2 * expected
        batches.clear()


def test_a_run_never_sees_what_is_held_out(tmp_path):
    """`test_codec.py` has a run that logs both losses."""
    save_noise(tmp_path, 40)
    ready = job.prepare(job.find_config("folder-64", str(tmp_path), ["data.held_out=0.25"]))
    assert ready.held_out is not None
    keys = set(ready.loader.batch(range(4 * len(ready.source))).keys)
    assert keys == set(ready.source.keys)
    assert not keys & set(ready.held_out.keys)
    assert len(ready.source) + len(ready.held_out) == 40


def drawn(folder, averaged):
    """The pixels of a preview, and what it says about itself."""
    config = text_model(steps=2).config
    view = View(config, folder, 64, lambda: averaged)
    preview = Preview({"prompts": ["red", "blue thing"]}, Words(), "cpu")
    with Image.open(there(preview(view))) as page:
        return np.asarray(page), json.loads(page.info[SETTINGS_KEY])


def test_a_preview_shows_the_averaged_weights_and_nothing_else(tmp_path):
    trained = text_model().net
    fresh = NestedUNet(trained.config, seed=2)
    page, settings = drawn(tmp_path / "a", trained)
    again, _ = drawn(tmp_path / "b", trained)
    other, _ = drawn(tmp_path / "c", fresh)
    np.testing.assert_array_equal(page, again)
    assert (page != other).any()
    assert settings["images_seen"] == 64
    assert settings["captions"] == ["red", "blue thing"]


@pytest.mark.parametrize(("side", "shown"), [(16, 96), (128, 128), (512, 256)])
def test_a_preview_averages_no_pixel_of_up_to_256_pixels_away(side, shown, tmp_path, monkeypatch):
    red = np.full((1, side, side, 3), (200, 0, 0), np.uint8)
    samples = SimpleNamespace(levels=(red,), captions=None, settings={"fps": 8.0})
    model = SimpleNamespace(sample=lambda **_: samples)
    monkeypatch.setattr(watch, "Matryoshka", lambda *_, **__: model)
    config, net = tiny_config(), text_model().net
    with Image.open(
        there(Preview({}, None, "cpu")(View(config, tmp_path, 0, lambda: net)))
    ) as page:
        assert (np.asarray(page) == (200, 0, 0)).all(-1).sum() == shown**2


@pytest.mark.parametrize("count", [3, 100])
def test_the_prompts_of_previews_are_the_same_every_time(count):
    source = array_source(
        name="toy",
        array=np.zeros((count, 8, 8, 3), np.uint8),
        keys=[str(n) for n in range(count)],
        captions=[(f"caption {n}", "another") for n in range(count)],
    )
    config = text_model().config
    prompts = preview_arguments(source, config)["prompts"]
    assert prompts == preview_arguments(source, config)["prompts"]
    assert len(set(prompts)) == min(count, 8)
    assert all(prompt.startswith("caption") for prompt in prompts)


# --- quality of a few samples --------------------------------------------------------------------


def colours(images):
    """A network of three features."""
    return images.mean(axis=(1, 2))


def quality(model, source, folder, levels=2):
    net = NestedUNet(model.config.model.first(levels)).eval()
    hook = Quality(source, Words(), "cpu", colours)
    return hook(View(model.config, folder, 0, lambda: net))


@pytest.mark.parametrize(("shift", "found"), [(0, 1.0), (1, 0.0)])
def test_samples_are_compared_with_their_images(shift, found, tmp_path, monkeypatch):
    source = pictures(40)

    def sample(prompts, **_):
        places = [(int(prompt.split()[1]) + shift) % 40 for prompt in prompts]
        return SimpleNamespace(pictures=np.stack([source[place].picture for place in places]))

    monkeypatch.setattr(watch, "Matryoshka", lambda *_, **__: SimpleNamespace(sample=sample))
    numbers = quality(text_model(), source, tmp_path)
    assert numbers == {"fd_40": pytest.approx(0.0, abs=1e-6), "retrieval_40": found}


def test_coarse_samples_are_compared_with_images_as_small(tmp_path, monkeypatch):
    source = pictures(40)
    small = np.stack([shrink(source[n].picture, Resolution(8, 8)) for n in range(40)])
    model = SimpleNamespace(sample=lambda **_: SimpleNamespace(pictures=small))
    monkeypatch.setattr(watch, "Matryoshka", lambda *_, **__: model)
    numbers = quality(text_model(), source, tmp_path, levels=1)
    assert numbers == {"fd_40": pytest.approx(0.0, abs=1e-6)}, "8 pixels are too few for retrieval"


@pytest.mark.parametrize("model", [class_model(), plain_model()])
def test_a_few_are_drawn_with_the_same_seeds_of_any_model(model, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "MEASURED_SAMPLES", 6)
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8)
    names = model.config.data.classes
    labels = [n % 3 for n in range(9)] if names else None
    source = array_source("toy", images, [*map(str, range(9))], labels=labels, classes=names)
    first, again = (quality(model, source, tmp_path) for _ in range(2))
    assert first.keys() == {"fd_6"}
    assert first == again
    assert first["fd_6"] > 0


def test_what_the_network_cannot_look_at_is_refused():
    opaque = changed(plain_model().config, [("model.channels", 4)])
    for config in (opaque, preset("emoji-video")):
        with pytest.raises(ConfigError, match=r"train\.eval_every_images"):
            changed(config, [("train.eval_every_images", 8)])
