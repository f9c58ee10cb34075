"""Images that are no squares: their shapes, the order of training, and sizes of samples."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from matryoshka_diffusion.cli import plan
from matryoshka_diffusion.cli.main import main
from matryoshka_diffusion.cli.plan import describe_plan
from matryoshka_diffusion.codecconfig import CodecRunConfig
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ConfigError, DataConfig, RunConfig, UsageError
from matryoshka_diffusion.configfile import override
from matryoshka_diffusion.data import decoded, loader, shards
from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.data.check import describe, summary
from matryoshka_diffusion.data.image import HEAD, read_picture, read_size
from matryoshka_diffusion.data.loader import Loader, gathered
from matryoshka_diffusion.data.shapes import MOST_AREA, MOST_LOST, kept, nearest, own_shapes, square
from matryoshka_diffusion.data.source import identity, open_data, open_source, split
from matryoshka_diffusion.eval.reference import reference_of
from matryoshka_diffusion.nn.costs import activation_bytes
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.pyramid import Resolution, resolution_of, resolutions_of
from matryoshka_diffusion.runs.hooks import HeldOutLoss, Preview
from matryoshka_diffusion.training.distributed import World
from matryoshka_diffusion.training.inputs import Feed
from matryoshka_diffusion.training.signals import Stopped
from matryoshka_diffusion.training.stages import Step
from matryoshka_diffusion.training.step import Skipped, Stepped, diffusion
from matryoshka_diffusion.training.trainer import Trainer, View
from picturing import encode, noise, save, write_tar
from test_pipeline import Words, moving, text_model
from test_upsampler import upsampler_config
from tiny_run import digests, metrics, run, stop_at, tiny_config

SIZES = ((64, 64), (64, 96), (96, 64), (60, 82), (40, 120), (200, 60))  # height and width


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty smooth images of several shapes, one of them turned by its camera."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(40):
        pixels = noise(3, 3, number)
        height, width = SIZES[number % len(SIZES)]
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:02}.png")
    turned = Image.fromarray(noise(64, 96)).transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[274] = 6
    turned.save(folder / "turned.jpg", exif=turned.getexif())
    return folder


def own_config(folder: Path, *changes: str, **train: Any) -> RunConfig:
    """The tiny run with halvings at its coarsest level, unconditional, on images as they are."""
    sets = ("model.text=null", "encoder=null", "data.shapes=own", "model.levels[0].micro=[]")
    coarse = ("widths=[32,32]", "blocks=[1,1]", "attention=[0,1]")
    sets = (f"data.path={folder}", *sets, f"model.levels[0].{coarse[0]}")
    sets = (*sets, *(f"model.levels[0].{one}" for one in coarse[1:]), *changes)
    return override(tiny_config(**train), sets)


def loader_of(config: RunConfig) -> Loader:
    return Loader.of(open_data(config), config.train.seed, config.data)


# --- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [8, 10, 12, 14, 16, 24, 32, 64])
def test_shapes_of_nearly_equal_area_keep_nine_tenths_of_any_picture(grid):
    shapes = own_shapes(128 * grid, grid)
    assert shapes[0] == Resolution(128 * grid, 128 * grid)
    assert len(set(shapes)) == len(shapes) <= 21
    assert {(width, height) for height, width, _ in shapes} == {shape[:2] for shape in shapes}
    for height, width, _ in shapes:
        assert height % 128 == width % 128 == 0
        assert abs(math.log(height * width / (128 * grid) ** 2)) < MOST_AREA
    for ratio in np.exp(np.linspace(-math.log(4), math.log(4), 500)):
        size = (round(10_000 * ratio), 10_000)
        assert kept(size, shapes[nearest(size, shapes)]) > 1 - MOST_LOST - 0.005


def test_a_coarse_grid_has_the_shapes_that_lie_on_it():
    assert own_shapes(8, 1) == square(8)
    assert [str(shape) for shape in own_shapes(16, 2)] == ["16x16", "32x8", "8x32"]


# --- a source of images of several shapes ------------------------------------------------------


def test_every_picture_has_its_shape_and_loses_at_most_a_tenth(photos):
    source = open_data(own_config(photos))
    assert len(source) == 41
    for n, sample in enumerate(source.samples):
        example, shape = source[n], source.shapes[sample.shape]
        assert example.picture.shape == (*shape[:2], 3)
        assert sample.kept == kept(example.size, shape) >= 1 - MOST_LOST
    turned = source[source.keys.index("turned.jpg")]
    assert turned.size == (96, 64)
    assert turned.picture.shape[1] > turned.picture.shape[0]


def test_the_middle_of_a_picture_is_kept(tmp_path):
    pixels = noise(16, 20)
    path = save(tmp_path / "a.png", pixels)
    (wide,) = shapes = (Resolution(16, 18),)
    assert (read_picture(path, shapes).pixels == pixels[:, 1:-1]).all()
    everything = read_picture(path, shapes, "random").pixels
    assert (everything == pixels).all()
    assert kept((20, 16), wide) == pytest.approx(0.9)


def test_a_large_set_is_measured_and_gives_the_same_pictures(photos, monkeypatch):
    config = own_config(photos)
    stored = open_data(config)
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 10)
    source = open_data(config)
    assert source.samples == stored.samples
    for one, other in zip(source.many(range(41)), stored.many(range(41)), strict=True):
        assert one.size == other.size
        assert (one.picture == other.picture).all()
    monkeypatch.setattr(decoded, "read_size", lambda file: pytest.fail("it was measured already"))
    assert open_data(config).samples == source.samples


def test_a_bad_picture_is_replaced_by_one_of_its_shape_or_one_that_is_cut_to_it(photos):
    source = open_data(own_config(photos, "data.max_bad_fraction=0.9"))
    bad = {"01.png", *(f"{n:02}.png" for n in range(0, 40, 6))}

    def read(n: int, cut: Any) -> Any:
        if source.keys[n] in bad:
            raise PictureError("damaged")
        return source.read(n, cut)

    spoilt = replace(source, read=read)
    with pytest.warns(UserWarning, match="damaged"):
        other = spoilt[1]
    assert other.picture.shape == source[1].picture.shape
    assert other.key == "07.png"
    with pytest.warns(UserWarning, match="damaged"):
        other = spoilt[0]
    assert other.key == "02.png"
    middle = read_picture(photos / other.key, (Resolution(16, 16),))
    assert (other.picture == middle.pixels).all()
    bad |= {*source.keys}
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match="cannot be used"),
    ):
        spoilt[0]


def test_the_identity_of_data_has_the_shapes_of_its_images(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    squares = override(own_config(folder), ["data.shapes=square"])
    known, plain = identity(open_data(own_config(folder))), identity(open_data(squares))
    save(folder / "00.png", noise(30, 60))
    changed = identity(open_data(own_config(folder)))
    assert changed.model_copy(update={"shapes": known.shapes}) == known != changed
    assert identity(open_data(squares)) == plain
    assert plain.shapes is None


def test_images_in_shards_are_measured_by_their_heads(tmp_path, monkeypatch):
    """Sizes are those of a folder, also where the head does not tell: a long one, or a PNG."""
    images = {"a.jpg": encode(size=(300, 200), form="JPEG")}
    turned = Image.Exif()
    turned[274] = 6
    large = Image.fromarray(noise(400, 500))
    for name, options in {
        "b.jpg": {"exif": turned, "quality": 95},
        "c.jpg": {"icc_profile": bytes(HEAD)},
        "d.png": {"exif": turned},
    }.items():
        with io.BytesIO() as file:
            large.save(file, "PNG" if name.endswith("png") else "JPEG", **options)
            images[name] = file.getvalue()
    (tmp_path / "files").mkdir()
    for name, data in images.items():
        (tmp_path / "files" / name).write_bytes(data)
    path, lengths, read = write_tar(tmp_path / "s.tar", [*images.items()]), [], shards.read_range
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    monkeypatch.setattr(shards, "read_range", lambda *a: lengths.append(a[2]) or read(*a))
    measured = open_data(own_config(path, "data.source=shards"))
    wholes = [len(images[name]) for name in ("c.jpg", "d.png")]
    assert sorted(lengths) == sorted([len(images["a.jpg"]), *[HEAD] * 3, *wholes])
    monkeypatch.undo()
    folder = open_data(own_config(tmp_path / "files"))
    assert [one.shape for one in measured.samples] == [one.shape for one in folder.samples]
    assert len({one.shape for one in measured.samples}) == 3


def test_the_size_of_a_file_is_that_of_the_upright_image(tmp_path):
    image = Image.new("RGB", (30, 20))
    image.getexif()[274] = 8
    image.save(tmp_path / "a.jpg", exif=image.getexif())
    assert read_size(tmp_path / "a.jpg") == read_picture(tmp_path / "a.jpg", 16).size == (20, 30)
    (tmp_path / "b.jpg").write_bytes(b"nothing")
    with pytest.raises(PictureError):
        read_size(tmp_path / "b.jpg")


def test_reports_name_shapes_and_the_largest_loss(photos):
    source = open_data(own_config(photos))
    counts = Counter(str(source.shapes[sample.shape]) for sample in source.samples)
    lost = max(1 - sample.kept for sample in source.samples)
    for text in (summary(source), describe(source)):
        assert f"shapes    {len(counts)}: " in text
        assert f"16x16 ({counts['16x16']})" in text
        assert f"{lost:.1%} of an image at most" in text
    assert "shapes" not in describe(open_data(override(own_config(photos), ["data.shapes=square"])))


# --- the order of training ---------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), max_size=300))
def test_shapes_are_gathered_in_runs_and_nothing_is_lost(shapes):
    order = gathered(np.array(shapes, dtype=int))
    assert sorted(order) == list(range(len(shapes)))
    sorted_shapes = np.array(shapes, dtype=int)[order]
    changes = int((np.diff(sorted_shapes) != 0).sum())
    runs = sum(-(-count // loader._RUN) for count in Counter(shapes).values())
    assert changes < max(runs, 1)
    if len(set(shapes)) < 2:
        assert order.tolist() == list(range(len(shapes)))


def test_every_epoch_shows_each_picture_once_in_batches_of_few_shapes(photos, monkeypatch):
    monkeypatch.setattr(loader, "_RUN", 4)
    batches = loader_of(own_config(photos))
    for epoch in range(2):
        ids = range(41 * epoch, 41 * (epoch + 1))
        keys = [batches.batch([n]).keys[0] for n in ids]
        assert sorted(keys) == sorted(batches.source.keys)
        shapes = [batches.shape_of(n) for n in ids]
        assert sum(a != b for a, b in itertools.pairwise(shapes)) < 16
    assert keys != [batches.batch([n]).keys[0] for n in range(41)]


# --- steps of several shapes -------------------------------------------------------------------


def test_a_step_has_a_part_for_each_shape_with_the_rows_of_every_sample(photos):
    config = own_config(photos, "train.stages[1].mix=[0.5, 0.5]")
    batches = loader_of(config)
    step = Step(1, 24, (16, 8), (1e-2, 1e-2), False)
    feed = Feed(config, batches)
    parts = feed(step)
    assert sorted(n for part in parts for n in part.ids) == list(range(24, 40))
    assert len(parts) == len({batches.shape_of(n) for n in range(24, 40)}) > 1
    assert [sum(len(part.x[r]) for part in parts) for r in (0, 1)] == [16, 8]
    for part in parts:
        assert {batches.shape_of(n) for n in part.ids} == {batches.shape_of(part.ids[0])}
        assert part.count == len(part.ids)
        for coarse, fine in zip(part.x[0], part.x[1], strict=False):
            assert [2 * side for side in coarse.shape[1:]] == [*fine.shape[1:]]
            assert torch.allclose(torch.nn.functional.avg_pool2d(fine, 2), coarse, atol=1e-6)
        for row, n in enumerate(part.ids):
            (alone,) = feed(Step(1, n, (1, 1), (1e-2, 1e-2), False))
            assert torch.equal(part.noise[0][row], alone.noise[0][0])
            assert torch.equal(part.x[0][row], alone.x[0][0])


def test_ranks_share_the_samples_of_each_shape_and_have_the_same_parts(photos):
    config = own_config(photos)
    batches, step = loader_of(config), Step(1, 0, (10, 5), (1e-2, 1e-2), False)
    whole = Feed(config, batches)(step)
    ranks = [Feed(config, batches, world=World(rank, 3))(step) for rank in range(3)]
    for number, part in enumerate(whole):
        mine = [rank[number] for rank in ranks]
        assert sorted(n for one in mine for n in one.ids) == sorted(part.ids)
        assert {one.count for one in mine} == {part.count}
        assert {one.x[0].shape[1:] for one in mine} == {part.x[0].shape[1:]}
    assert {n for part in ranks[1] for n in part.ids} == set(range(1, 10, 3))


def test_losses_of_all_shapes_add_up_in_any_number_of_parts(photos):
    found = []
    for accumulate, threads in ((1, 1), (3, 1), (2, 2)):
        settings: dict[str, Any] = {"accumulate": accumulate, "threads": threads}
        config = own_config(photos, dropout=0.0, **settings)
        trainer = Trainer(diffusion(config), images_seen=48)
        step = Step(1, 24, (12, 6), (1e-2, 1e-2), False)
        parts = Feed(config, loader_of(config))(step)
        loss = trainer.gradient(parts, 1.0)
        gradient = [p.grad.clone() for p in trainer.net.parameters() if p.grad is not None]
        found.append((loss, gradient))
        outcome = trainer.step(parts)
        assert isinstance(outcome, Stepped)
        assert outcome.loss == pytest.approx(loss.total.item(), rel=1e-6)
    (first, gradient), *others = found
    for loss, other in others:
        torch.testing.assert_close(loss.per_example, first.per_example)
        torch.testing.assert_close(loss.per_level, first.per_level)
        for one, two in zip(gradient, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_sample_that_is_not_finite_is_named_whatever_its_shape(photos):
    config = own_config(photos, dropout=0.0)
    trainer = Trainer(diffusion(config), images_seen=48)
    parts = Feed(config, loader_of(config))(Step(1, 24, (12, 6), (1e-2, 1e-2), False))
    parts[-1].x[0][0] = float("nan")
    outcome = trainer.step(parts)
    assert isinstance(outcome, Skipped)
    assert [one[:2] for one in outcome.culprits] == [(parts[-1].ids[0], parts[-1].keys[0])]


def test_a_run_on_several_shapes_resumes_bit_for_bit(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "_RUN", 3)  # so that steps have one shape or several
    config = own_config(photos, "data.crop=random", "data.flip=true")

    def go(name: str, **options: Any) -> None:
        run(tmp_path / name, config, loader=loader_of(config), encode=None, **options)

    go("whole")
    for place in (8, 28, 36):
        with pytest.raises(Stopped):
            go("parts", hooks=[stop_at(place)])
    go("parts")
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


# --- the network and its samples ---------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (12, 18), (4, 14), (2, 2)])
def test_the_network_takes_any_size_of_its_grid(photos, size):
    model = own_config(photos).model
    levels = resolutions_of(model, Resolution(*size), 16)
    assert [level[:2] for level in levels] == [(size[0] // 2, size[1] // 2), size]
    net = NestedUNet(model)
    z = tuple(torch.randn(2, 3, *level[:2]) for level in levels)
    predictions = net(z, torch.full((2,), 0.5), Conditioning())
    assert [resolution_of(x) for x in predictions] == [resolution_of(x) for x in z]


def test_samples_have_the_size_that_is_asked_for_and_their_own_seed():
    model = text_model()
    wide = model.sized(height=8, width=20)
    samples = wide.sample("red", n=3, seed=5)
    assert [level.shape[1:3] for level in samples.levels] == [(4, 10), (8, 20)]
    assert (samples.settings["height"], samples.settings["width"]) == (8, 20)
    alone = wide.sample("red", seed=7).pictures[0]
    assert np.abs(samples.pictures[2].astype(int) - alone).max() <= 1
    assert model.picture == Resolution(16, 16)
    plain = model.sample("red", seed=7)
    assert "height" not in plain.settings
    assert (model.sized(16).sample("red", seed=7).pictures == plain.pictures).all()
    assert (wide.sized().sample("red", seed=7).pictures == plain.pictures).all()
    assert "10 x 4, 20 x 8" in repr(samples)
    assert wide.describe({}) != model.describe({})


def test_an_encoder_is_loaded_once_for_all_sizes(monkeypatch):
    model, loads = text_model(), []
    model._frozen["encoder"] = None
    monkeypatch.setattr(
        "matryoshka_diffusion.sampling.load_encoder", lambda *_, **__: loads.append(1) or Words()
    )
    for size in (8, 24, 32):
        model.sized(size).sample("red", steps=1)
    model.sample("blue", steps=1)
    assert loads == [1]


@pytest.mark.parametrize(
    ("size", "message"),
    [((7, 16), "height is 7.* 6 or 8"), ((16, 0), "width is 0.* 2 or 4"), ((-2, 16), "height")],
)
def test_a_size_off_the_grid_is_refused_with_its_neighbours(size, message):
    with pytest.raises(UsageError, match=message):
        text_model().sized(*size)


def test_what_draws_squares_alone_says_so():
    with pytest.raises(UsageError, match="draws clips"):
        moving(text_model()).sized(8, 16)
    upsampler = Matryoshka(NestedUNet(upsampler_config().model), upsampler_config())
    with pytest.raises(UsageError, match="enlarges squares"):
        upsampler.sized(8, 16)
    assert upsampler.sized(16, 16).picture == upsampler.picture


def test_an_edit_has_the_shape_of_the_model_it_is_asked_of(tmp_path):
    wide = text_model().sized(16, 40)
    picture = noise(16, 44)
    same = wide.edit("red", image=picture, strength=0.0)
    assert (same.pictures[0] == picture[:, 2:-2]).all()
    sketch = noise(8, 20)
    kept_level = wide.edit("red", keep={8: sketch}, steps=2).levels[0][0]
    assert np.abs(kept_level.astype(int) - sketch).max() <= 1
    mask = np.zeros((8, 20), np.uint8)
    mask[:, 10:] = 255
    half = wide.edit("red", image=picture, mask=mask, steps=2).pictures[0]
    assert (half[:, :20] == picture[:, 2:22]).all()
    with pytest.raises(UsageError, match="20x8, 40x16"):
        wide.edit("red", image=picture, mask=mask[:, :12])


# --- a run from end to end ---------------------------------------------------------------------


def test_previews_have_the_shape_of_most_images_at_every_stage(photos, tmp_path):
    config = own_config(photos)
    shape = Resolution(12, 22)
    for levels, widths in ((1, ["11 x 6"]), (2, ["11 x 6", "22 x 12"])):
        net = NestedUNet(config.model.first(levels))
        folder = tmp_path / str(levels)
        view = View(config, folder, 4, lambda net=net: net)
        path = Preview({"n": 2}, None, "cpu", shape=shape)(view)
        assert path is not None
        with Image.open(path) as page:
            settings = json.loads(page.info["matryoshka-diffusion"])
        assert f"{settings['width']} x {settings['height']}" == widths[-1]


def test_the_held_out_loss_is_that_of_all_shapes(photos):
    config = own_config(photos)
    seen, held_out = split(open_data(config), 0.3)
    assert held_out is not None
    net = NestedUNet(config.model)
    view = View(config, Path(), 4, lambda: net)
    losses = HeldOutLoss(seen, held_out, None, "cpu")(view)
    assert all(math.isfinite(loss) for both in losses.values() for loss in both)
    assert len(losses["held_out_loss_per_level"]) == 2


def test_a_reference_of_squares_is_named_so(photos):
    config = own_config(photos)
    squares = open_source(config.data, config.data_side)
    assert {squares[n].picture.shape for n in range(5)} == {(16, 16, 3)}
    assert reference_of(squares, config.data).name.endswith("cut to squares")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.augment=0.1", "model.augment=true"], "quarter|augment"),
        (["data.source=clips"], "clips"),
        (["train.compile=true"], r"train\.compile"),
        (["train.eval_every_images=8"], r"train\.eval_every_images"),
        (["codec={path: x, factor: 2}", "sampling.threshold=[none]"], "codec"),
        (["model.coarse={side: 4}", "sampling.coarse_noise=0.1"], r"model\.coarse"),
    ],
)
def test_what_takes_squares_only_refuses_other_shapes(changes, message):
    with pytest.raises(ConfigError, match=rf"data\.shapes=own.*({message})"):
        own_config(Path(), *changes)
    override(own_config(Path(), "data.shapes=square"), changes)


def test_an_autoencoder_is_trained_on_squares():
    with pytest.raises(ValueError, match=r"data\.shapes"):
        CodecRunConfig(name="x", data=DataConfig(shapes="own"), side=16, images=8)


def test_a_plan_says_that_images_keep_their_shapes(photos):
    assert "shape of its own" in describe_plan(own_config(photos))
    assert "shape of its own" not in describe_plan(own_config(photos, "data.shapes=square"))


def test_a_plan_counts_memory_for_the_largest_shape_and_arithmetic_for_all(photos):
    config = own_config(photos, "train.stages[1].mix=[]")
    square, source = override(config, ["data.shapes=square"]), open_data(config)

    def work(*arguments: Any) -> tuple[float, ...]:
        """TFLOP of a step of the last stage at most, and on average if that is less."""
        text = describe_plan(*arguments).partition("stage 2: ")[2]
        most, *mean = map(float, re.findall(r"([\d.e-]+) TFLOP a step", text))
        return most, *mean

    areas = [math.prod(source.shapes[one.shape][:2]) / 16**2 for one in source.samples]
    (flops,), (most, mean) = work(square), work(config, source)
    assert most / flops == pytest.approx(max(areas), rel=0.01)
    assert mean / flops == pytest.approx(sum(areas) / len(areas), rel=0.01)
    assert plan.memory(config, source.part([0])) == plan.memory(square)
    assert plan.memory(config, source) == plan.memory(config)
    shape = max(source.shapes, key=lambda shape: math.prod(shape[:2]))
    sizes = resolutions_of(config.model, shape, 16)
    more = [activation_bytes(config.model, 2, sizes=each) for each in (sizes, None)]
    assert plan.memory(config) - plan.memory(square) == 4 * (more[0] - more[1])


def test_the_command_trains_on_several_shapes_and_draws_two(photos, tmp_path, capsys):
    sets = ["data.shapes=own", "model.embedding=32", "model.levels[0].widths=[32,32]"]
    sets += ["model.levels[-1].widths=[32,32]", "sampling.steps=2", "train.warmup_images=0"]
    sets += ["train.stages=[{levels: 3, images: 16, batch_size: 8, lr: 0.001}]"]
    data = ["--data", str(photos), *(word for one in sets for word in ("--set", one))]
    run_folder = tmp_path / "run"
    assert main(["data", "check", str(photos), "--set", "data.shapes=own"]) == 0
    assert "of an image at most" in capsys.readouterr().out
    assert main(["train", "folder-64", *data, "--dry-run"]) == 0
    assert "of an image at most" in capsys.readouterr().out
    assert main(["train", "folder-64", *data, "--out", str(run_folder)]) == 0
    for height, width in ((48, 72), (72, 48)):
        size = ["--height", str(height), "--width", str(width)]
        out = tmp_path / f"{width}.png"
        assert main(["sample", str(run_folder), *size, "-o", str(out)]) == 0
        with Image.open(out) as image:
            assert image.size == (width, height)
    assert main(["sample", str(run_folder), "--height", "50"]) == 2
    assert "multiples of 8 pixels, such as 48 or 56" in capsys.readouterr().err
