"""Autoguidance: a weaker model in place of the missing condition, by formula and from files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluating import Words, model
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.cli.info import describe
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.configfile import override
from matryoshka_diffusion.data.source import array_source
from matryoshka_diffusion.denoiser import Guided, TwoModelPair
from matryoshka_diffusion.models.save import without_paths
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.runs.hooks import Preview
from matryoshka_diffusion.runs.prepare import complete, find_config
from matryoshka_diffusion.samplers import ddim, dpmpp_2m, last, trailing_grid, waking
from matryoshka_diffusion.schedule import Cosine, instants
from matryoshka_diffusion.training.trainer import View
from matryoshka_diffusion.training.weights import export_weights
from oracle import UnitNoise, no_noise, small_world, stacked
from tiny_run import there

GOOD = small_world(Cosine())
WEAK = replace(GOOD, covariance=3.0 * GOOD.covariance, mean=GOOD.mean - 0.2)
"""Two Gaussian models of the same images; the weak one takes them to be wider and darker."""


# --- the formula, in float64 ---------------------------------------------------------------------


@pytest.mark.parametrize("known", [1, 3])
@pytest.mark.parametrize("weights", [(2.0, 2.0, 2.0), (3.0, 1.0, 0.5)])
def test_the_estimate_is_led_away_from_that_of_the_weaker_model(known, weights):
    generator = torch.Generator().manual_seed(0)
    z = tuple(
        torch.randn(5, *level.shape(1), generator=generator, dtype=torch.float64)
        for level in GOOD.resolutions
    )
    [now] = instants(torch.tensor([0.4]), GOOD.schedules)
    t = torch.full((5,), 0.4, dtype=torch.float32).double()
    good, weak = GOOD.posterior_mean(z, t), WEAK.posterior_mean(z[:known], t)
    guided = Guided(TwoModelPair(GOOD, WEAK, known), weights)(z, now)
    for x, u, weight, led in zip(good, weak, weights, guided, strict=False):
        torch.testing.assert_close(led, weight * x + (1.0 - weight) * u)
    assert all(map(torch.equal, guided[known:], good[known:])), "levels that it lacks stay"


@pytest.mark.parametrize("sampler", [ddim, dpmpp_2m])
@pytest.mark.parametrize("floors", [(-100.0,) * 3, (-100.0, -2.0, 0.0)])
def test_weight_1_is_the_good_model_and_equal_models_guide_nowhere(sampler, floors):
    noise = UnitNoise(GOOD.resolutions, 0).start()
    times = trailing_grid(8, GOOD.schedules[0])

    def drawn(denoise: Any) -> torch.Tensor:
        steps = waking(sampler, floors)(denoise, noise, GOOD.schedules, times, noise=no_noise)
        return stacked(last(steps).z)

    plain = drawn(GOOD)
    assert torch.equal(drawn(Guided(TwoModelPair(GOOD, WEAK, 3), (1.0,) * 3)), plain)
    torch.testing.assert_close(drawn(Guided(TwoModelPair(GOOD, GOOD, 3), (4.0,) * 3)), plain)
    led = drawn(Guided(TwoModelPair(GOOD, WEAK, 3), (2.0,) * 3))
    assert (led - plain).abs().max() > 0.05


# --- models from files ---------------------------------------------------------------------------


def written(folder: Path, made: Matryoshka, levels: int = 2, factor: float = 1.0) -> str:
    """A model folder with the first levels of a model, its weights times a factor."""
    net = NestedUNet(made.model.first(levels))
    own = made.net.state_dict()
    weights = {name: factor * own[name] for name in net.state_dict()}
    export_weights(folder, weights, made.config)
    return str(folder)


SETTINGS: dict[str, Any] = {"steps": 3, "classes": [0, 1], "seed": [5, 6]}


def bytes_of(made: Matryoshka, **settings: Any) -> list[np.ndarray]:
    return [level.astype(int) for level in made.sample(**{**SETTINGS, **settings}).levels]


def test_a_model_from_a_path_guides_alone_and_in_any_batch(tmp_path):
    made = model()
    weak = written(tmp_path / "weak", made, factor=0.8)
    plain, itself = (
        bytes_of(made),
        bytes_of(made, guidance=3.0, guide=written(tmp_path / "a", made)),
    )
    assert all(map(np.array_equal, plain, itself)), "led away from itself"
    led = bytes_of(made, guidance=3.0, guide=weak)
    assert all((a != b).mean() > 0.1 for a, b in zip(led, plain, strict=True))
    alone = bytes_of(made, guidance=3.0, guide=weak, classes=1, seed=6)
    assert all(abs(a[1] - b[0]).max() <= 1 for a, b in zip(led, alone, strict=True))
    one = {"guidance": 3.0, "guide": weak, "guidance_interval": (-1e4, 1e4), "wake": -1e4}
    assert all(map(np.array_equal, bytes_of(made, **one), led))


def test_a_model_of_the_first_level_guides_that_level(tmp_path):
    made = model()
    first = written(tmp_path / "first", made, levels=1, factor=0.8)
    with pytest.raises(UsageError, match=r"sampling\.guide: .*first knows 1 .*--cfg.*--guide"):
        made.sample(**SETTINGS, guidance=(1.0, 3.0), guide=first)
    led = bytes_of(made, guidance=3.0, guide=first)
    assert all(map(np.array_equal, bytes_of(made, guidance=(3.0, 1.0), guide=first), led))
    assert (led[0] != bytes_of(made)[0]).mean() > 0.1
    assert made.evaluations({"steps": 3, "guidance": 3.0, "guide": first}) == 6


def test_an_unconditional_model_can_be_guided(tmp_path):
    made = model("none")
    weak = written(tmp_path / "weak", made, factor=0.8)
    drawn = {"classes": None, "n": 2}
    led = bytes_of(made, guidance=2.0, guide=weak, **drawn)
    assert (led[1] != bytes_of(made, **drawn)[1]).mean() > 0.1


def test_samples_depend_on_the_weights_of_a_guide_and_not_on_its_place(tmp_path):
    made = model()
    paths = [written(tmp_path / name, made, factor=f) for name, f in (("a", 0.8), ("b", 0.9))]
    shutil.copytree(paths[0], tmp_path / "c")
    a, b, c = (
        made.describe({"guidance": 2.0, "guide": str(path)}) for path in (*paths, tmp_path / "c")
    )
    assert a == c != b
    assert "guide" not in made.describe({"guidance": 2.0})["sampling"]
    cases: list[dict[str, Any]] = [{"guidance": 2.0, "guide": paths[0]}, {"guide": paths[0]}, {}]
    for settings in cases:
        recorded = made.sample(classes=0, **settings).settings.get("guide")
        assert recorded == made.describe(settings)["sampling"].get("guide"), "no path in a PNG"
    idle = {"guide": "nowhere", "guidance_interval": (-3.0, 2.0), "rescale": 0.5}
    assert made.describe(idle) == made.describe({})
    assert made.describe({**idle, "guide": None, "guidance": 2.0}) != made.describe(
        {"guidance": 2.0}
    )
    assert made.idle({"guide": paths[0]}) == {"guide"}
    assert not made.idle({"guide": paths[0], "guidance": 2.0})
    named = made.config.sampling.model_copy(update={"guide": paths[0]})
    assert without_paths(made.config.model_copy(update={"sampling": named})).sampling.guide is None


def test_a_guide_may_have_its_text_encoder_elsewhere_but_not_another_one(tmp_path):
    made = model("text")
    weak = written(tmp_path / "weak", made, factor=0.8)
    moved = override(made.config, ["encoder.path=/elsewhere"])
    drawn = [
        Matryoshka(made.net, config, encoder=Words()).sample("red", guidance=2.0, guide=weak)
        for config in (made.config, moved)
    ]
    assert all(map(np.array_equal, *(samples.levels for samples in drawn)))
    wider = override(made.config, ["model.text.features=9"])
    other = written(tmp_path / "wider", Matryoshka(NestedUNet(wider.model), wider))
    with pytest.raises(UsageError, match=r"model\.text\.features of .* is 9, .* is 8"):
        made.sample("red", guidance=2.0, guide=other)


def test_a_guide_in_a_config_is_absolute_and_needs_guidance(tmp_path, monkeypatch):
    written(tmp_path / "early", model())
    monkeypatch.chdir(tmp_path)
    chosen = ["sampling.guide=early", "sampling.guidance=[2]"]
    config = find_config("openmoji", assignments=chosen)
    assert config.sampling.guide == str(tmp_path / "early")
    assert find_config("openmoji", assignments=["sampling.guide=weak"]).sampling.guide == "weak"
    assert f"{tmp_path / 'early'} is counted" in describe(config)
    assert "is counted" not in describe(override(config, ["sampling.guidance=[1]"]))
    data = array_source(
        "rows", np.zeros((2, 64, 64, 3), np.uint8), ["a", "b"], captions=[("a",)] * 2
    )
    assert complete(config, data).sampling.guide
    with pytest.raises(UsageError, match=r"sampling\.guide .*sampling\.guidance"):
        complete(override(config, ["sampling.guidance=[1]"]), data)


def test_previews_of_a_training_need_no_guide(tmp_path):
    made = model()
    sampling = made.config.sampling.model_copy(update={"guide": "nowhere", "guidance": (3.0,)})
    config = made.config.model_copy(update={"sampling": sampling})
    view = View(config, tmp_path, 0, lambda: made.net)
    assert there(Preview({"classes": [0]}, None, "cpu")(view)).is_file()


def test_a_guide_that_cannot_be_is_refused_with_the_difference(tmp_path, capsys):
    made = model()
    guides = {
        str(tmp_path / "nowhere"): "nowhere.*--guide",
        written(tmp_path / "text", model("text")): r"model\.classes .* is 0, .* is 2: .*mdm ema",
        written(
            tmp_path / "clips", model(frames=2)
        ): r"model\.levels\[1\]\.frames .* is 2, .* None",
    }
    for path, message in guides.items():
        with pytest.raises(UsageError, match=rf"sampling\.guide: .*{message}"):
            made.sample(classes=0, guidance=2.0, guide=path)
    run = written(tmp_path / "run", made)
    assert cli.main(["sample", run, "--class", "0", "--guide", run, "-o", str(tmp_path / "o")]) == 2
    assert "--guide only applies to guidance: add --cfg" in capsys.readouterr().err
