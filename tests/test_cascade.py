"""A cascade: two networks that sample as one model, and what may be paired."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from matryoshka_diffusion.cascade import Cascade, check_pair, open_model
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import (
    BaseConfig,
    CoarseConfig,
    CodecConfig,
    ConfigError,
    UsageError,
)
from matryoshka_diffusion.configfile import to_yaml
from matryoshka_diffusion.data.folder import for_each, read_coarse
from matryoshka_diffusion.diffusion import augment_coarse
from matryoshka_diffusion.draw import gallery
from matryoshka_diffusion.draw.grid import SETTINGS_KEY, save_png
from matryoshka_diffusion.eval.evaluate import evaluate
from matryoshka_diffusion.eval.prompts import Conditions
from matryoshka_diffusion.models.diffusers import write_diffusers
from matryoshka_diffusion.models.find import find_model
from matryoshka_diffusion.models.save import without_paths
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.pyramid import Pyramid, Resolution
from matryoshka_diffusion.runs import prepare as job
from matryoshka_diffusion.samplers import ddim, last, trailing_grid
from matryoshka_diffusion.schedule import Cosine, Instant, Shifted, alpha_sigma
from matryoshka_diffusion.training.weights import export_weights, fingerprint
from oracle import moments, no_noise, small_world
from test_pipeline import Words, randomised
from test_upsampler import upsampler_config
from tiny_run import tiny_config, with_frames


def base_config():
    """The tiny run's inner level: pictures of 8 pixels."""
    run = tiny_config(dropout=0.0)
    train = run.train.model_copy(update={"stages": run.train.stages[:1]})
    model = run.model.first(1)
    sampling = run.sampling.model_copy(update={"steps": 2, "guidance": (2.0,)})
    return run.model_copy(
        update={"name": "base", "model": model, "train": train, "sampling": sampling}
    )


def changed(config, part, **update):
    """The config with some values of one part replaced."""
    return config.model_copy(update={part: getattr(config, part).model_copy(update=update)})


def model_of(config):
    return Matryoshka(randomised(config), config, encoder=Words())


@pytest.fixture(scope="module")
def cascade():
    return Cascade(model_of(base_config()), model_of(upsampler_config()))


# --- the truth -----------------------------------------------------------------------------------


@pytest.mark.parametrize("t_noise", [0.0, 0.3, 0.7])
def test_ideal_networks_draw_the_data_whatever_the_noise_between_them(t_noise: float):
    """p(x) = the mean of p(x | y) over y, the noised coarse picture: noise hides, it does not bias.

    Gaussian pictures of 4 pixels, a base that draws 2, both denoisers in closed form; the numbers
    that each sampler and the augmentation draw are pushed through as unit vectors.
    """
    world = small_world(Cosine())
    pool, schedule = world.pools[1], Shifted(Cosine(), 2.0, 2.0)
    sizes = (2, 4, 4)  # noise of the base, of the augmentation, of the upsampler
    rows = 1 + sum(sizes)
    units = torch.zeros(rows, sum(sizes), dtype=torch.float64)
    units[1:].fill_diagonal_(1.0)
    start, added, noise = (part[:, None, None] for part in units.split(sizes, dim=1))

    def sample_from(mean: Tensor, covariance: Tensor, z: Tensor) -> Tensor:
        """What a sampler makes of z where the posterior mean under N(mean, covariance) is known."""

        def denoise(z: Pyramid, now: Instant) -> Pyramid:
            alpha, sigma, _ = now.levels[0]
            spread = alpha**2 * covariance + sigma**2 * torch.eye(len(covariance)).double()
            offset = z[0].flatten(1) - alpha * mean
            x = mean + alpha * offset @ torch.linalg.solve(spread, covariance)
            return (x.view_as(z[0]),)

        times = trailing_grid(200, schedule)
        return last(ddim(denoise, (z,), (schedule,), times, noise=no_noise)).z[0]

    coarse = sample_from(pool @ world.mean, pool @ world.covariance @ pool.T, start)
    t = torch.full((rows,), t_noise, dtype=torch.float64)
    observed = augment_coarse(coarse, t, added, schedule).flatten(1)
    # y = B x + sigma eps, with B from the same function: of unit vectors, without noise.
    eye = torch.eye(2, dtype=torch.float64)[:, None, None]
    zeros = torch.zeros(2, 1, 1, 4, dtype=torch.float64)
    alpha, sigma = alpha_sigma(schedule.log_snr(t[:1]))
    enlarge = alpha * augment_coarse(eye, torch.zeros(2).double(), zeros, schedule).flatten(1).T
    b = enlarge @ pool
    spread = b @ world.covariance @ b.T + sigma**2 * torch.eye(4).double()
    gain = world.covariance @ b.T @ torch.linalg.pinv(spread, rtol=1e-9)
    posterior = world.covariance - gain @ b @ world.covariance
    mean = world.mean + (observed - b @ world.mean) @ gain.T
    mean_of_draws, covariance_of_draws = moments(sample_from(mean, posterior, noise))
    torch.testing.assert_close(mean_of_draws, world.mean, rtol=0, atol=2e-3)
    assert (covariance_of_draws - world.covariance).norm() < 0.04 * world.covariance.norm()


# --- sampling ------------------------------------------------------------------------------------


def test_a_cascade_has_the_levels_that_each_part_draws_alone(cascade):
    assert isinstance(cascade, Cascade)
    assert cascade.resolutions == (Resolution(8, 8), Resolution(16, 16))
    steps = []
    both = cascade.sample(
        ["red", "blue"], n=2, seed=4, batch_size=3, progress=lambda *numbers: steps.append(numbers)
    )
    assert steps == [(done, 10) for done in range(1, 11)], "2 batches of 2 + 3 steps"
    small = cascade.base.sample(["red", "blue"], n=2, seed=4, batch_size=3)
    settings = {"seed": 4, "batch_size": 3, "coarse": small.pictures}
    large = cascade.upsampler.sample(["red", "blue"], n=2, **settings)
    np.testing.assert_array_equal(both.levels[0], small.pictures)
    np.testing.assert_array_equal(both.levels[1], large.pictures)
    assert both.captions == ("red", "red", "blue", "blue")
    recorded = json.loads(json.dumps(both.settings))
    assert (recorded["coarse_noise"], recorded["base"]["steps"]) == (0.3, 2)


def test_a_picture_depends_on_its_seed_and_not_on_its_batch(cascade):
    together = cascade.sample("red", n=16, seed=3)
    alone = cascade.sample("red", n=1, seed=8)
    cut = cascade.sample("red", n=16, seed=3, batch_size=5)
    for many, one, parts in zip(together.levels, alone.levels, cut.levels, strict=True):
        assert np.abs(many[5].astype(int) - one[0]).max() <= 1
        assert np.abs(many.astype(int) - parts).max() <= 1
    assert len(np.unique(together.pictures, axis=0)) == 16


def test_both_models_have_the_batches_of_the_finer_one(cascade, monkeypatch):
    monkeypatch.setattr("matryoshka_diffusion.sizes.PIXELS", 2 * 16**2)
    finer = Cascade(cascade.base, cascade.upsampler)
    sizes = {}
    for name in ("base", "upsampler"):
        own = sizes[name] = []
        model, stream = getattr(finer, name), getattr(finer, name).stream

        def counted(cond, seeds, *rest, stream=stream, own=own):
            own.append(len(seeds))
            return stream(cond, seeds, *rest)

        monkeypatch.setattr(model, "stream", counted)
    finer.sample("red", n=5, steps=1)
    assert sizes == {"base": [2, 2, 1], "upsampler": [2, 2, 1]}
    finer.sample("red", n=5, steps=1, batch_size=5)
    assert sizes["base"][3:] == sizes["upsampler"][3:] == [5]


def test_settings_reach_the_part_that_they_are_for(cascade):
    plain = cascade.sample("red", steps=2)
    noisier = cascade.sample("red", steps=2, coarse_noise=0.9)
    assert (plain.levels[0] == noisier.levels[0]).all()
    assert (plain.levels[1] != noisier.levels[1]).any()
    fine = cascade.sample("red", steps=2, guidance=(2.0, 5.0))
    assert (plain.levels[0] == fine.levels[0]).all()
    assert (plain.levels[1] != fine.levels[1]).any()
    assert (plain.levels[0] != cascade.sample("red", steps=2, guidance=5.0).levels[0]).any()
    floors = {"steps": 2, "wake": (-3.0, -2.0)}
    assert cascade.sampling(floors).wake == (-2.0,)
    assert cascade.idle(floors) == {"wake"}, "each model has one level"
    assert cascade.sampling({"steps": 7, "coarse_noise": 0.1}).coarse_noise == 0.1
    with pytest.raises(UsageError, match="guidance has 3 entries"):
        cascade.sample("red", guidance=(1.0, 2.0, 3.0))
    with pytest.raises(UsageError, match="guide: runs/weak guides one model"):
        cascade.sample("red", guide="runs/weak")
    assert cascade.sampling({"guide": None}).guide is None
    assert cascade.idle({"rescale": 0.7, "eta": 0.5}) == {"eta"}, "the base is guided"
    for guidance, idle in (((1.0, 1.0), {"rescale"}), ((1.0, 3.0), set()), ((3.0, 1.0), set())):
        settings = {"guidance": guidance, "rescale": 0.7, "sampler": "ddim", "eta": 0.5}
        assert cascade.idle(settings) == idle


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("upsampler", {"coarse_noise": -0.1}, r"sampling\.coarse_noise"),
        ("upsampler", {"coarse_noise": 1.1}, r"sampling\.coarse_noise"),
        ("base", {"coarse_noise": 0.2}, r"sampling\.coarse_noise"),
        ("base", {"coarse": np.zeros((1, 8, 8, 3), np.uint8)}, "no upsampler"),
        ("upsampler", {"coarse": None}, r"\(1, 8, 8, 3\).*--coarse.*--base"),
        ("upsampler", {"coarse": np.zeros((1, 9, 9, 3), np.uint8)}, r"\(1, 8, 8, 3\)"),
        ("upsampler", {"coarse": np.zeros((2, 8, 8, 3), np.uint8)}, "one for each sample"),
    ],
)
def test_coarse_images_and_noise_that_do_not_fit_are_refused(cascade, part, settings, message):
    with pytest.raises(UsageError, match=message):
        getattr(cascade, part).sample("red", **settings)


def test_each_picture_remembers_its_own_part_of_what_the_base_was_asked(cascade, tmp_path):
    samples = cascade.sample(["red", "blue"], seed=10)
    gallery.save(gallery.Gallery(samples.levels, samples.captions, samples.settings), tmp_path)
    with Image.open(tmp_path / "001-blue.png") as picture:
        settings = json.loads(picture.info[SETTINGS_KEY])
    for of_one in (settings, settings["base"]):
        assert (of_one["captions"], of_one["seeds"]) == (["blue"], [11])
    assert settings["base"]["model"] == "base"
    assert settings["base"]["weights"] == fingerprint(cascade.base.net.state_dict())


def test_a_number_says_how_each_of_both_was_sampled(cascade, tmp_path):
    conditions = Conditions("of red", "red", "prompts", lambda i: "red")
    options = {"n": 2, "conditions": conditions, "folder": tmp_path, "steps": 1}
    weak, strong = (
        evaluate(cascade, "agreement", guidance=weights, **options)[0]
        for weights in ((1.0, 3.0), (5.0, 3.0))
    )
    settings = json.loads(json.dumps(strong.record()))["sampling"]
    assert (settings["guidance"], settings["base"]["guidance"]) == ([3.0], [5.0])
    assert "coarse_noise 0.3, base (sampler dpmpp-2m, steps 1, " in strong.provenance()
    assert ", guidance 5, rescale 0, " in strong.provenance()
    assert ", guidance 1, rescale 0, " in weak.provenance()
    assert "None" not in strong.provenance()


# --- what may be paired --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (tiny_config(), "16 pixels, but model.coarse.side of tiny is 8"),
        (changed(base_config(), "model", channels=1), "model.channels of base is 1, .* is 3"),
        (changed(base_config(), "model", classes=3), "model.classes of base is 3, .* is 0"),
        (changed(base_config(), "data", classes=("cat",)), "data.classes of base is .'cat',"),
        (
            changed(base_config(), "encoder", path="t5"),
            "encoder of base is .*'t5'",
        ),
        (
            base_config().model_copy(update={"codec": CodecConfig()}),
            r"base draws latents \(codec\)",
        ),
        (with_frames(base_config()), "base draws clips"),
        (upsampler_config(), "tiny is an upsampler"),
    ],
)
def test_a_base_that_does_not_fit_is_refused(base, message):
    with pytest.raises(ConfigError, match=message):
        check_pair(base, upsampler_config())


def test_a_base_is_judged_by_the_levels_that_it_has_reached():
    """The tiny run will draw 16 pixels, but until its second stage it draws 8."""
    config = changed(upsampler_config(), "model", coarse=CoarseConfig(side=16))
    check_pair(tiny_config(), config)
    unfinished = Matryoshka(randomised(base_config()), tiny_config())
    message = r"8 pixels, .* is 16 \(it has 1 of its 2 levels"
    with pytest.raises(ConfigError, match=message):
        Cascade(unfinished, Matryoshka(randomised(upsampler_config()), config))


@pytest.mark.parametrize(
    ("base", "upsampler"),
    [
        ("openmoji --as base", "openmoji"),
        ("imagenet-64", "imagenet-256"),
        ("cc12m-64", "cc12m-256"),
    ],
)
def test_the_presets_are_pairs(base, upsampler):
    check_pair(preset(*base.split(" --as ")), preset(upsampler, "upsampler"))


def test_tuning_goes_on_with_pictures_of_the_side_that_the_base_learnt_from(tmp_path):
    config = changed(plain(base_config()), "data", side=16)
    export_weights(tmp_path / "model", randomised(config).state_dict(), config)
    tuned = job.find_config(str(tmp_path / "model"), None, [])
    assert tuned.data_side == 16


# --- folders -------------------------------------------------------------------------------------


def plain(config):
    """Without text, so that a folder of pictures is all the data there needs to be."""
    return changed(config, "model", text=None).model_copy(update={"encoder": None})


@pytest.mark.parametrize("averaged", [(True, True), (False, True), (True, False)])
def test_weights_are_averages_if_those_of_both_networks_are(averaged):
    configs = zip((base_config(), upsampler_config()), averaged, strict=True)
    models = (model_of(changed(config, "train", ema_decay=0.9 * ema)) for config, ema in configs)
    assert Cascade(*models).describe({})["averaged"] == all(averaged)


def test_each_sample_enlarges_one_of_the_own_pictures():
    for pictures, prompts, n, numbers in ((1, 2, 2, [0] * 4), (3, 1, 2, [0, 0, 1, 1, 2, 2])):
        small = np.arange(pictures, dtype=np.uint8)[:, None, None, None]
        coarse, per_prompt = for_each(small, prompts, n)
        assert coarse.flatten().tolist() == numbers
        assert per_prompt * prompts == len(numbers), "as many as the model makes"
    with pytest.raises(UsageError, match="3 pictures for 2 prompts"):
        for_each(np.zeros((3, 8, 8, 3), np.uint8), 2, 1)


@pytest.fixture
def runs(tmp_path):
    """A base and an upsampler, never trained, in folders."""
    for name, config in (("base", base_config()), ("up", upsampler_config())):
        config = plain(config)
        config = changed(config, "sampling", guidance=(1.0,))
        export_weights(tmp_path / name / "model", randomised(config).state_dict(), config)
    return tmp_path


def test_a_base_is_named_in_the_config_or_when_it_is_opened(runs):
    with pytest.raises(ConfigError, match=r"names none .*--base"):
        open_model(runs / "up")
    opened = open_model(runs / "up", base=runs / "base")
    assert isinstance(opened, Cascade)
    assert opened.sample(n=2).pictures.shape == (2, 16, 16, 3)
    assert isinstance(open_model(runs / "base"), Matryoshka)
    with pytest.raises(ConfigError, match=r"base is no upsampler"):
        open_model(runs / "base", base=runs / "base")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_model(runs / "up", base="nowhere")


def test_training_notes_which_base_the_upsampler_is_for(runs, monkeypatch, capsys):
    for number in range(4):
        picture = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        save_png(picture, runs / "photos" / f"{number}.png", None)
    config = changed(plain(upsampler_config()), "data", path=str(runs / "photos"))
    (runs / "up.yaml").write_text(to_yaml(changed(config, "train", preview_every_images=8)))
    trained, out = str(runs / "trained"), str(runs / "out")
    again = ["train", str(runs / "up.yaml"), "--base", str(runs / "base"), "--out", trained]
    assert cli.main(again) == 0
    model = open_model(trained)
    assert isinstance(model, Cascade)
    base = model.config.sampling.base
    assert base == BaseConfig(
        path=str((runs / "base").resolve()), hash=fingerprint(model.base.net.state_dict())
    )
    assert sorted(path.name for path in (runs / "trained" / "previews").iterdir())
    assert cli.main(["train", trained]) == 0, "the base is not asked for again"
    sample = ["sample", trained, "-n", "2", "--coarse-noise", "0.5", "-o", out]
    assert cli.main(sample) == 0
    with Image.open(runs / "out" / "000.png") as picture:
        assert picture.size == (16, 16)
        assert json.loads(picture.info[SETTINGS_KEY])["coarse_noise"] == 0.5

    other = randomised(model.base.config)
    with torch.no_grad():
        other.levels[0].stem.weight.add_(1.0)
    export_weights(runs / "base" / "model", other.state_dict(), model.base.config)
    with pytest.raises(ConfigError, match=r"has other weights than .* name it again \(--base"):
        open_model(trained)
    assert isinstance(open_model(trained, base=runs / "base"), Cascade)
    assert cli.main(again) == 0, "training does not use the base, whatever has become of it"
    (runs / "base").rename(runs / "moved")
    monkeypatch.chdir(runs)
    assert cli.main(again) == 0
    assert cli.main([*again[:3], "base", *again[4:]]) == 0, "named as it was, by another path"
    assert Matryoshka.load(trained).config.sampling.base == base
    assert cli.main([*again[:3], "moved", *again[4:]]) == 2
    assert "holds a run of another config: sampling.base.path" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"sampling\.base\.path: .* is not there .*--base RUN"):
        open_model(trained)
    assert without_paths(model.config).sampling.base is None


def test_a_base_that_does_not_fit_is_refused_before_training(runs):
    config = job.find_config("fashion-mnist", as_="upsampler", base=str(runs / "base"))
    assert config.sampling.base is not None
    assert config.sampling.base.path == str((runs / "base").resolve())
    small = ["sampling.coarse_noise=0.3", "model.coarse={side: 4}"]
    wrong = changed(plain(upsampler_config()), "data", path=str(runs))
    (runs / "up.yaml").write_text(to_yaml(wrong))
    save_png(np.zeros((16, 16, 3), np.uint8), runs / "0.png", None)
    config = job.find_config(str(runs / "up.yaml"), None, small, base=str(runs / "base"))
    with pytest.raises(ConfigError, match=r"8 pixels, but model\.coarse"):
        job.prepare(changed(config, "data", max_bad_fraction=1.0))
    with pytest.raises(ConfigError, match=r"sampling\.base .* omit"):
        job.find_config("openmoji", None, [], base="openmoji")


def test_own_pictures_are_enlarged(runs, capsys):
    for name, side in (("b", 8), ("a", 8)):
        save_png(np.full((side, side, 3), ord(name), np.uint8), runs / "own" / f"{name}.png", None)
    pictures = read_coarse(runs / "own", 8, 3)
    assert pictures[:, 0, 0, 0].tolist() == [ord("a"), ord("b")]
    assert read_coarse(runs / "own" / "a.png", 8, 1).shape == (1, 8, 8, 1)
    command = ["sample", str(runs / "up"), "--steps", "2"]
    assert cli.main([*command, "--coarse", str(runs / "own"), "-o", str(runs / "out")]) == 0
    assert len(list((runs / "out").glob("00*.png"))) == 2
    one = ["--coarse", str(runs / "own" / "a.png"), "-n", "3", "-o", str(runs / "three")]
    assert cli.main([*command, *one]) == 0
    several = [file.read_bytes() for file in (runs / "three").glob("00*.png")]
    assert len(set(several)) == len(several) == 3, "of one picture, by seeds of their own"
    save_png(np.zeros((9, 8, 3), np.uint8), runs / "wide.png", None)
    (runs / "none").mkdir()
    (runs / "text.png").write_text("no picture")
    for wrong, status, message in (
        ("wide.png", 2, "wide.png: the upsampler takes pictures of exactly 8x8 pixels"),
        ("none", 1, "no picture here to enlarge"),
        ("nowhere", 1, "no picture here to enlarge"),
        ("text.png", 2, "text.png: not PNG"),
    ):
        assert cli.main([*command, "--coarse", str(runs / wrong)]) == status
        assert message in capsys.readouterr().err
    assert cli.main(["sample", str(runs / "base"), "--coarse", str(runs / "own")]) == 2
    assert "--coarse: base is no upsampler" in capsys.readouterr().err


def test_every_class_is_drawn_of_one_picture_if_none_is_named(tmp_path):
    config = changed(plain(upsampler_config()), "model", classes=2)
    config = changed(config, "sampling", guidance=(1.0,))
    export_weights(tmp_path / "up", randomised(config).state_dict(), config)
    save_png(np.zeros((8, 8, 3), np.uint8), tmp_path / "own.png", None)
    command = ["sample", str(tmp_path / "up"), "--coarse", str(tmp_path / "own.png"), "-n", "2"]
    for more, names in (
        ([], ["000-0.png", "001-0.png", "002-1.png", "003-1.png"]),
        (["--class", "1"], ["000-1.png", "001-1.png"]),
    ):
        out = tmp_path / str(len(more))
        assert cli.main([*command, *more, "-o", str(out)]) == 0
        assert sorted(file.name for file in out.glob("00*.png")) == names


def test_an_upsampler_is_exported_for_us_and_not_for_diffusers(runs, capsys):
    weights, config = find_model(runs / "up")
    base = BaseConfig(path=str(runs / "base"), hash="of its weights")
    export_weights(runs / "up" / "model", weights, changed(config, "sampling", base=base))
    assert cli.main(["export", str(runs / "up"), "-o", str(runs / "shared")]) == 0
    assert f"mdm sample {runs / 'shared'} --base RUN draws with it" in capsys.readouterr().out
    assert str(runs) not in (runs / "shared" / "config.json").read_text()
    again = open_model(runs / "shared", base=runs / "base")
    first = open_model(runs / "up", base=runs / "base")
    np.testing.assert_array_equal(again.sample(n=2).pictures, first.sample(n=2).pictures)
    with pytest.raises(UsageError, match="is an upsampler, for which diffusers has no form"):
        write_diffusers(Matryoshka.load(runs / "up"), runs / "diffusers")
