"""Every named run, shrunk: it survives YAML, learns with every parameter, trains, grows, samples.

The baselines take as much arithmetic as the nest, and share its parts where they can.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from matryoshka_diffusion.cli import plan
from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import (
    CodecConfig,
    ConfigError,
    EncoderConfig,
    LevelConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
)
from matryoshka_diffusion.configfile import from_yaml, to_yaml
from matryoshka_diffusion.data.loader import Batch
from matryoshka_diffusion.diffusion import Process, matryoshka_loss
from matryoshka_diffusion.nn.costs import count_parameters, forward_flops
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import BASELINES, PRESETS, preset
from matryoshka_diffusion.pyramid import Pyramid, build_pyramid, resolutions_of, shapes_of
from matryoshka_diffusion.rng import normal, uniform
from matryoshka_diffusion.schedule import build_schedules
from matryoshka_diffusion.training.inputs import Batches
from matryoshka_diffusion.training.stages import learning_rates
from matryoshka_diffusion.training.trainer import train
from matryoshka_diffusion.training.weights import load_network
from nests import wake

COMPARED = {
    "openmoji": tuple(BASELINES),
    "openmoji-256": ("simple", "finest", "upsampler"),
    "fashion-mnist": ("simple", "finest", "base", "upsampler", "latent", "thumbnail", "semantic"),
    "folder-64": ("latent",),
    "cc12m-256": ("simple", "finest", "upsampler", "latent"),
    "imagenet-256": ("simple", "upsampler", "latent"),
}
RUNS = {
    **{name: (name, None) for name in PRESETS},
    **{f"{name}-{kind}": (name, kind) for name, kinds in COMPARED.items() for kind in kinds},
}
TRAINED = (
    *("openmoji", "openmoji-256", "folder-256", "fashion-mnist", "emoji-video", "cc12m-256"),
    *("imagenet-256-nest3", "released-1024", "openmoji-finest", "openmoji-upsampler"),
    *("openmoji-codes", "imagenet-256-latent", "cc12m-256-latent", "openmoji-semantic"),
)
"""Runs that differ in more than depth or length."""


def run_of(name: str) -> RunConfig:
    return preset(*RUNS[name])


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


def batch(model: ModelConfig, rows: int = 2) -> tuple[Pyramid, Pyramid, Conditioning]:
    """Images, noise and conditions, of which one row is dropped where rows may be."""
    generator = torch.Generator().manual_seed(1)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    shapes = shapes_of(model)
    features = numbers(*shapes[0]) if model.hidden else None
    x = build_pyramid(numbers(*shapes[-1]), resolutions_of(model), features)
    noise = tuple(numbers(*shape) for shape in shapes)
    cond = Conditioning(
        labels=torch.arange(rows) if model.classes else None,
        tokens=numbers(4, model.text.features) if model.text else None,
        mask=torch.arange(4) < torch.tensor([[4], [2]]) if model.text else None,
        micro={name: torch.tensor([10.0, 30.0]) for name in model.micro_names},
        image=numbers(*shapes[0]) if model.coarse else None,
        image_t=torch.tensor([0.2, 0.7]) if model.coarse else None,
    )
    if model.classes or (model.text and model.text.learned_null):
        cond = cond.drop(torch.tensor([False, True]))
    return x, noise, cond


@pytest.mark.parametrize("name", RUNS)
def test_every_preset_survives_yaml_and_every_parameter_learns(name: str):
    run = run_of(name)
    assert run.name == name
    assert from_yaml(to_yaml(run)) == run
    assert run.train.stages[-1].levels == len(run.model.levels)
    model = from_yaml(to_yaml(run.model_copy(update={"model": shrunk(run.model)}))).model
    net = wake(NestedUNet(model))
    x, noise, cond = batch(model)
    process = Process.from_config(run.process, model)
    times = torch.tensor([0.1, 0.5], dtype=torch.float64)
    loss = matryoshka_loss(net, x, cond, times, noise, process=process)
    assert loss.total.isfinite()
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


# --- a run of each -----------------------------------------------------------------------------

ROWS = 2


def short(run: RunConfig) -> RunConfig:
    """The run with its nest shrunk and one step in each stage; shares and precision stay."""
    stages = tuple(
        stage.model_copy(update={"images": ROWS, "batch_size": ROWS}) for stage in run.train.stages
    )
    often = {"log_every_images": 1, "checkpoint_every_images": ROWS, "warmup_images": ROWS}
    learning = run.train.model_copy(update={"stages": stages, "init_levels": 0, **often})
    run = run.model_copy(update={"model": shrunk(run.model), "train": learning})
    return from_yaml(to_yaml(run))


class Smooth(Batches):
    """Images of smooth colours, or such latents, with all conditions of any preset."""

    def __init__(self, config: RunConfig) -> None:
        self.model = config.model

    def batch(self, ids: Sequence[int]) -> Batch:
        side, channels = self.model.levels[-1].side, self.model.channels
        coarse = normal("picture", [(0, n) for n in ids], (channels, 2, 2)).clamp(-1, 1)
        picture = torch.nn.functional.interpolate(coarse, size=(side, side))
        frames = [picture.roll(n, dims=3) for n in range(self.model.levels[-1].frames or 0)]
        seen = normal("features", [(0, n) for n in ids], shapes_of(self.model)[0])
        classes = self.model.classes
        return Batch(
            picture=torch.stack(frames, dim=2) if frames else picture,
            captions=tuple(f"picture {n}" for n in ids),
            labels=torch.tensor([n % classes for n in ids]) if classes else None,
            original_side=200 * uniform(0, "side", ids).float() + side,
            ids=torch.tensor(ids),
            keys=tuple(f"picture-{n}" for n in ids),
            features=seen if self.model.hidden else None,
        )


class Words:
    """Features of the width that shrunk presets have: one fixed vector for each word."""

    key, width = "words", 24

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        words = [(*caption.split(), "</s>") for caption in captions]
        return [torch.stack([normal(word, [(0,)], (24,))[0] for word in some]) for some in words]


@pytest.mark.parametrize("name", TRAINED)
def test_a_shrunk_preset_trains_grows_and_samples(
    name: str, tmp_path: Path, tiny_codec: Callable[..., Path]
):
    config, words = short(run_of(name)), Words()
    if config.codec is not None:
        factor, channels = config.codec.factor, config.model.channels
        codec = CodecConfig(path=str(tiny_codec(factor=factor, channels=channels)), factor=factor)
        config = config.model_copy(update={"codec": codec})
    encode = words if config.model.text is not None else None
    finished = train(config, Smooth(config), tmp_path / "run", encode=encode)

    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    levels = [len(json.loads(line)["loss_per_level"]) for line in lines]
    assert levels == [stage.levels for stage in config.train.stages]
    assert all(json.loads(line)["loss"] > 0 for line in lines)

    weights = load_file(finished / "model.safetensors")
    net = load_network(config.model, weights, where=name)
    model = Matryoshka(net, config, encoder=words if encode else None)
    prompts, classes = "picture 1" if encode else None, 0 if config.model.classes else None
    image, coarse = None, config.model.coarse
    if coarse is not None:
        image = np.zeros((1, coarse.side, coarse.side, config.model.channels), np.uint8)
    samples = model.sample(prompts, classes=classes, coarse=image, steps=2)
    pixels = config.model.levels[config.model.hidden :]
    sides = [level.side * config.pixels_per_side for level in pixels]
    assert [tuple(level.shape[-3:-1]) for level in samples.levels] == [(s, s) for s in sides]


# --- sizes and schedules -----------------------------------------------------------------------


def parameters(model: ModelConfig) -> int:
    with torch.device("meta"):
        return count_parameters(NestedUNet(model))


@pytest.mark.parametrize(
    ("name", "count", "error"),
    [
        ("cc12m-64", 437.2e6, 0.1e6),  # which the paper rounds to 450 M
        ("released-64", 461_359_107, 0),
        ("released-256", 476_613_958, 0),
        ("released-1024", 480_970_057, 0),
    ],
)
def test_the_papers_models_have_their_size(name: str, count: float, error: float):
    assert parameters(run_of(name).model) == pytest.approx(count, abs=error, rel=0)


@pytest.mark.parametrize(
    ("name", "base", "levels"),
    [
        # -power * log(ratio), from the side of a level over the coarsest one's
        ("openmoji", 0.0, tuple(-2 * math.log(ratio) for ratio in (4, 8, 16))),
        ("openmoji-256", 0.0, tuple(-2 * math.log(ratio) for ratio in (4, 8, 32))),
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
    half_way = [float(schedule.log_snr(half)) for schedule in build_schedules(run_of(name).model)]
    assert half_way == pytest.approx([base + shift for shift in levels], abs=1e-3)


@pytest.mark.parametrize("name", ["folder-128", "folder-256"])
def test_a_run_for_one_gpu_has_the_papers_proportions_and_fits_its_memory(name: str):
    run, paper = run_of(name), run_of("imagenet-1024-nest5")
    for level, whole in zip(run.model.levels, paper.model.levels, strict=False):
        assert 2 * level.side == whole.side
        assert level.widths == tuple(max(width // 2, 32) for width in whole.widths)
        assert (level.blocks, level.attention) == (whole.blocks, whole.attention)
    text = TextConfig(features=384, width=run.model.embedding)
    model = run.model.model_copy(update={"text": text})
    captioned = run.model_copy(update={"model": model, "encoder": EncoderConfig(name="minilm")})
    assert 60e6 < parameters(model) < 150e6
    assert plan.memory(captioned) < 20e9  # of 24: the rest is for kernels and the text encoder
    assert plan.work_of(captioned) / plan.GPU_RATES[0] < 36 * 3600


def test_the_model_of_256_pixels_is_small_and_mostly_coarse():
    run = run_of("openmoji-256")
    assert 2 * parameters(run.model) < 20e6  # bytes in bf16
    assert run.train.wake == run.sampling.wake
    for stage in run.train.stages[1:]:
        assert stage.mix[0] == max(stage.mix)


@pytest.mark.parametrize("name", ["openmoji", "openmoji-codes", "openmoji-simple", "emoji-styles"])
def test_the_rate_of_each_level_of_openmoji_falls_over_its_own_life(name: str):
    train = run_of(name).train
    last = train.stages[-1]
    coarsest, *_, newest = 2 * learning_rates(train, train.images - last.images // 2, 1)
    assert newest == pytest.approx(last.lr / 2, rel=1e-3)
    assert coarsest == pytest.approx(last.lr / 2 * last.images / train.images, rel=1e-3)


@pytest.mark.parametrize("name", ["fashion-mnist", "fashion-mnist-simple", "emoji-still"])
def test_a_rate_that_decays_is_whole_until_thirty_per_cent_of_the_last_stage_are_left(name):
    train = run_of(name).train
    last = train.stages[-1]
    left = 0.3 * last.images
    before, *_ = learning_rates(train, int(train.images - 1.01 * left), last.batch_size)
    assert before == pytest.approx(last.lr)
    halfway, *_ = learning_rates(train, int(train.images - 0.5 * left), last.batch_size)
    assert halfway == pytest.approx(last.lr / 2, rel=1e-2)
    for constant in ("cc12m-256", "cc12m-256-simple"):
        assert run_of(constant).train.decay_share == 0


# --- baselines ---------------------------------------------------------------------------------


def arithmetic(name: str, kind: str | None = None) -> float:
    """FLOPs of all forward passes of a run: a row costs what the levels do that its mix gives."""
    run = preset(name, kind)
    assert run.train.wake is None or all(s.mix for s in run.train.stages if s.levels > 1)
    costs = [forward_flops(run.model, n + 1) for n in range(len(run.model.levels))]
    total = 0.0
    for stage in run.train.stages:
        mix = stage.mix or (*[0.0] * (stage.levels - 1), 1.0)
        total += stage.images * sum(map(operator.mul, mix, costs))
    return total


@pytest.mark.parametrize("name", ["openmoji", "openmoji-256", "emoji-styles", "fashion-mnist"])
def test_a_baseline_takes_as_much_arithmetic_as_the_nest(name: str):
    nest = arithmetic(name)
    assert arithmetic(name, "simple") == pytest.approx(nest, rel=0.01)
    assert arithmetic(name, "finest") == pytest.approx(nest, rel=0.01)
    cascade = arithmetic(name, "base") + arithmetic(name, "upsampler")
    assert cascade == pytest.approx(nest, rel=0.01)


@pytest.mark.parametrize("name", ["openmoji", "fashion-mnist"])
def test_a_nest_around_features_takes_as_much_arithmetic_as_the_nest(name: str):
    nest = arithmetic(name)
    assert arithmetic(name, "semantic") == pytest.approx(nest, rel=0.01)
    assert arithmetic(name, "thumbnail") == pytest.approx(nest, rel=0.01)


@pytest.mark.parametrize(
    ("name", "millions", "gigaflops"),
    [
        ("openmoji-simple", 6.2, 0.56),
        ("openmoji-upsampler", 6.5, 0.57),
        ("openmoji-256-upsampler", 7.9, 2.88),
        ("fashion-mnist-simple", 2.7, 0.29),
        ("fashion-mnist-base", 2.2, 0.11),
    ],
)
def test_baselines_have_the_sizes_that_are_stated(name: str, millions: float, gigaflops: float):
    model = run_of(name).model
    assert parameters(model) / 1e6 == pytest.approx(millions, rel=0.02)
    assert forward_flops(model, 1) / 1e9 == pytest.approx(gigaflops, rel=0.02)


@pytest.mark.parametrize(
    ("name", "t", "ratio"),
    [
        ("imagenet-256-upsampler", 0.5, 4.0),
        ("imagenet-256-upsampler", 0.7, 1.0),
        ("fashion-mnist-upsampler", 0.3, 4.0),
        ("openmoji-upsampler", 0.15, 1.0),
        ("openmoji-256-upsampler", 0.3, 1.0),
    ],
)
def test_times_of_augmentation_in_the_signal_that_is_left(name: str, t: float, ratio: float):
    """Signal over noise of a coarse pixel, which averages over many of the enlarged image."""
    run = run_of(name)
    model = run.model
    assert model.coarse is not None
    assert t in (run.sampling.coarse_noise, 0.7)  # 0.7: the other time of the paper
    times = torch.tensor([t], dtype=torch.float64)
    averaged = (model.levels[0].side / model.coarse.side) ** 2
    signal = averaged * build_schedules(model)[0].log_snr(times).exp().item()
    assert signal == pytest.approx(ratio, rel=0.1)


def test_the_parts_of_a_nest_are_not_changed_by_being_a_baseline():
    nest, base = run_of("imagenet-256"), run_of("imagenet-64")
    assert nest.model.levels[:1] == base.model.levels
    (simple,) = run_of("imagenet-256-simple").model.levels
    assert (simple.side, simple.widths) == (256, (64, 128, 256, 512, 768))
    assert (simple.blocks, simple.attention) == ((2, 2, 3, 2, 2), (0, 0, 0, 1, 5))
    assert simple.shift_ratio == nest.model.levels[1].shift_ratio
    upsampler = run_of("imagenet-256-upsampler")
    assert upsampler.model.levels == (simple,)
    assert upsampler.train.images == nest.train.stages[-1].images


def test_a_finest_baseline_is_its_nest_but_for_the_loss_and_the_stages():
    finest, nest = run_of("openmoji-finest"), run_of("openmoji")
    assert (finest.model, finest.sampling) == (nest.model, nest.sampling)
    assert finest.process.level_weights == (0.0, 0.0, 1.0)
    # The rate decays over a share of the last stage, which depends on the others.
    ours, theirs = (r.train.model_dump(exclude={"stages", "decay_share"}) for r in (finest, nest))
    assert ours == theirs


def test_the_changed_s64_has_the_weights_of_s64_and_about_its_arithmetic():
    """Appendix D.2: on latents of 32 x 32 it does not halve after its first width."""
    plain, changed = run_of("cc12m-64").model, run_of("cc12m-256-latent").model
    level = changed.levels[0]
    assert (level.side, level.core_side) == (32, plain.levels[0].core_side)
    more = 2 * 9 * 256 + 1  # one channel more in the stem and in the head
    assert parameters(changed) - parameters(plain) == more
    share = forward_flops(changed, 1) / forward_flops(plain, 1)
    assert share == pytest.approx(0.815, abs=0.005)


@pytest.mark.parametrize("name", ["openmoji", "fashion-mnist"])
def test_a_model_on_latents_has_the_trunk_of_the_one_on_pixels(name):
    pixels, latents = run_of(name), run_of(f"{name}-latent")
    trunk, other = (run.model.levels[0] for run in (pixels, latents))
    assert (trunk.widths, trunk.stem_side) == (other.widths, other.stem_side)
    assert pixels.data_side == latents.data_side
    assert pixels.train.images == latents.train.images


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("openmojis", None, "did you mean openmoji.*cc12m-64"),
        ("openmoji-simple", None, "did you mean openmoji --as simple"),
        ("openmoji-codec", None, "autoencoder"),
        ("openmoji", "sample", "sample: .* simple"),
        ("emoji-still", "base", "emoji-still .* omit --as"),
        ("emoji-video", "simple", "emoji-video .* omit --as"),
        ("fashion-mnist", "codes", "fashion-mnist .* openmoji"),
        ("cc12m-1024", "latent", "cc12m-1024 has latents of 256"),
    ],
)
def test_an_unknown_run_is_an_error_with_what_there_is(name, kind, message):
    with pytest.raises(ConfigError, match=message):
        preset(name, kind)
