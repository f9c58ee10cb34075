"""Training an autoencoder: it learns, goes on to the bit, and leaves codes of unit variance."""

from __future__ import annotations

import errno
import math
import shutil
import signal

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.codec import WEIGHTS, fingerprint, load_autoencoder
from matryoshka_diffusion.codecconfig import CodecRunConfig
from matryoshka_diffusion.config import ConfigError, DataConfig
from matryoshka_diffusion.configfile import changed, from_yaml, load_config, override, to_yaml
from matryoshka_diffusion.data.source import open_source
from matryoshka_diffusion.draw.grid import save_png
from matryoshka_diffusion.presets import CODECS, preset
from matryoshka_diffusion.pyramid import to_float
from matryoshka_diffusion.runs import prepare as job
from matryoshka_diffusion.runs import train_autoencoder as codec_training
from matryoshka_diffusion.runs.prepare import find_codec_run
from matryoshka_diffusion.runs.train_autoencoder import build, codec_loss, psnr, train_codec
from matryoshka_diffusion.training.signals import Stopped
from matryoshka_diffusion.training.trainer import Trainer
from test_codec import on_codes
from tiny_run import metrics, there

SMALL = ["side=16", "widths=[8, 8]", "channels=2", "images=160", "batch_size=8", "lr=0.01"]
OFTEN = ["log_every_images=8", "checkpoint_every_images=8", "warmup_images=8"]


@pytest.fixture(scope="module")
def smooth(tmp_path_factory):
    """Pictures of four patches of colour."""
    folder = tmp_path_factory.mktemp("smooth")
    for number, patches in enumerate(np.random.default_rng(0).integers(0, 256, (16, 2, 2, 3))):
        picture = patches.astype(np.uint8).repeat(8, 0).repeat(8, 1)
        save_png(picture, folder / f"{number}.png", None)
    return folder


def small(folder, *changes) -> CodecRunConfig:
    return there(find_codec_run("codec", str(folder), [*SMALL, *OFTEN, *changes]))


@pytest.fixture(scope="module")
def trained(smooth, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "codec"
    return out, train_codec(small(smooth), out)


def lines(out):
    """The metrics without what differs between equal trainings."""
    keys = ("images_seen", "loss", "lr_per_level", "grad_norm", "step")
    return [{name: line[name] for name in keys} for line in metrics(out)]


# --- learning ------------------------------------------------------------------------------------


def test_the_loss_is_the_errors_of_a_pixel_and_the_divergence_beside_it():
    config = override(CODECS["codec"], [*SMALL, "kl_weight=0.1", "square_weight=0.5"])
    model = build(config, 3)
    x, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 2, 8, 8)
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
        mean, log_variance = posterior.mean.double(), posterior.logvar.double()
        decoded = model.decode(posterior.mean + (posterior.logvar / 2).exp() * noise).sample
        divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / (2 * 3 * 16**2)
        error = (decoded - x).double()
        expected = error.abs().mean() + 0.5 * (error**2).mean() + 0.1 * divergence
        loss = codec_loss(model, x, noise, config)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_it_learns_and_its_codes_have_unit_variance(trained, smooth):
    out, result = trained
    losses = [line["loss"] for line in lines(out)]
    assert [line["images_seen"] for line in lines(out)] == list(range(8, 161, 8))
    assert losses[-1] < 0.8 * losses[0]
    assert result.folder == out / "codec"
    assert result.measured_on == "16 training pictures"

    codec = load_autoencoder(on_codes(out, factor=2, channels=2))
    source = open_source(DataConfig(source="folder", path=str(smooth)), 16)
    images = np.stack([example.picture for example in source.many(range(16))])
    x = to_float(images).permute(0, 3, 1, 2)
    codes = codec.encode(x)
    assert codes.shape == (16, 2, 8, 8)
    assert codes.std().item() == pytest.approx(1.0, abs=1e-3)
    assert codes.mean().item() == pytest.approx(0.0, abs=1e-3)
    error = (codec.decode(codes).clamp(-1, 1) - x).square().mean().item()
    assert result.psnr == pytest.approx(10 * math.log10(4 / error), abs=0.05)
    assert (out / "reconstructions.png").is_file()


def test_the_error_of_bytes_in_decibels():
    dark = np.zeros((2, 4, 4, 3), np.uint8)
    decibels = [psnr(dark, dark + offset) for offset in (0, 1, 255)]
    assert decibels == pytest.approx([math.inf, 48.1308, 0.0], abs=1e-4)


def test_weights_depend_on_the_seed_alone():
    config = override(CODECS["codec"], SMALL)
    one, same = build(config, 3).state_dict(), build(config, 3).state_dict()
    other = build(override(config, ["seed=1"]), 3).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["encoder.conv_in.weight"], other["encoder.conv_in.weight"])


def test_the_error_is_that_of_held_out_pictures_where_there_are_any(smooth, tmp_path):
    result = train_codec(small(smooth, "data.held_out=0.25", "images=8"), tmp_path)
    assert result.measured_on.endswith("held-out pictures")


# --- going on ------------------------------------------------------------------------------------


def test_a_stopped_training_goes_on_to_the_bit(trained, smooth, tmp_path, monkeypatch):
    config, take = small(smooth), Trainer.step

    def stopping(trainer, parts):
        if parts[0].step.first == 16:
            signal.raise_signal(signal.SIGTERM)
        return take(trainer, parts)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(Stopped, match="stopped at 24 of 160 images and saved") as stopped:
        train_codec(config, tmp_path)
    assert stopped.value.code == 143
    assert not (tmp_path / "codec").exists()
    again = there(find_codec_run(str(tmp_path), None, []))
    assert again.data.identity is not None
    assert again.model_copy(update={"data": config.data}) == config
    monkeypatch.undo()
    result = train_codec(again, tmp_path)
    out, whole = trained
    assert result.psnr == whole.psnr
    assert lines(tmp_path) == lines(out)
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "codec" / name).read_bytes() == (out / "codec" / name).read_bytes()


def finished_again(trained, tmp_path):
    """A copy of a finished training, and what finishes it once more."""
    shutil.copytree(trained[0], tmp_path / "copy")
    again = there(find_codec_run(str(tmp_path / "copy"), None, []))
    return tmp_path / "copy", lambda: train_codec(again, tmp_path / "copy")


def test_a_finished_training_is_left_as_it_is(trained, tmp_path):
    """Models know a codec by its hash, and another device would round scale and shift."""
    copy, finish = finished_again(trained, tmp_path)
    path = copy / "codec" / "config.json"
    path.write_text(path.read_text().replace('"scaling_factor": ', '"scaling_factor": 1'))
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    assert finish() == trained[1]._replace(folder=copy / "codec")
    changed = [file.name for file, data in before.items() if file.read_bytes() != data]
    assert changed == []


def test_a_training_that_goes_on_after_its_end_replaces_its_codec(trained, tmp_path):
    copy, _ = finished_again(trained, tmp_path)
    longer = override(there(find_codec_run(str(copy), None, [])), ["images=176"])
    (copy / "codec.yaml").write_text(to_yaml(longer))
    result = train_codec(longer, copy)
    (checkpoint,) = (copy / "checkpoints").glob("*176")
    learnt = load_file(checkpoint / "weights.safetensors")
    written = load_file(result.folder / WEIGHTS)
    assert learnt.keys() == written.keys()
    assert all(torch.equal(written[name], value) for name, value in learnt.items())
    assert fingerprint(result.folder) != fingerprint(trained[0] / "codec")
    assert [path.name for path in copy.glob(".codec*")] == []


def test_a_codec_is_what_diffusers_would_write(trained, tmp_path):
    own = trained[0] / "codec"
    AutoencoderKL.from_pretrained(own, use_safetensors=True).save_pretrained(tmp_path)
    assert (own / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    assert fingerprint(own) == fingerprint(tmp_path)
    modes = {(trained[0] / name).stat().st_mode for name in ("codec.yaml", f"codec/{WEIGHTS}")}
    assert len(modes) == 1


def test_a_full_disk_is_said_and_leaves_no_codec(trained, tmp_path, monkeypatch):
    copy, finish = finished_again(trained, tmp_path)
    shutil.rmtree(copy / "codec")

    def full(path, write):
        raise OSError(errno.ENOSPC, f"cannot write {path}")

    monkeypatch.setattr(codec_training, "write_atomically", full)
    with pytest.raises(OSError, match=r"cannot write .*safetensors"):
        finish()
    assert not (copy / "codec").exists()


def test_another_training_is_not_gone_on_with(trained, smooth, tmp_path):
    out, _ = trained
    with pytest.raises(ConfigError, match=r"of another codec: lr is 0\.01 there, 0\.02 now; give"):
        train_codec(small(smooth, "lr=0.02"), out)
    with pytest.raises(ConfigError, match=r"another codec: data\.flip is True there, False now; "):
        train_codec(small(smooth, "data.flip=false"), out)
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(ConfigError, match=r"no codec\.yaml"):
        train_codec(small(smooth), tmp_path)


def test_what_cannot_begin_leaves_the_folder_to_what_can(smooth, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train_codec(small(tmp_path / "nowhere"), tmp_path / "out")
    train_codec(small(smooth, "images=8"), tmp_path / "out")


@pytest.mark.filterwarnings("ignore:step skipped")
def test_a_loss_that_is_not_finite_ends_the_training(smooth, tmp_path):
    config = small(smooth, "lr=1.0e+30", "warmup_images=0", "images=240")
    message = r"not finite after .* images: .*--set lr=2\.5e\+29"
    with (
        pytest.warns(UserWarning, match="step skipped"),
        pytest.raises(RuntimeError, match=message),
    ):
        train_codec(config, tmp_path)


# --- its config and its command ------------------------------------------------------------------


@pytest.mark.parametrize("name", CODECS)
def test_the_codecs_that_presets_ask_for_are_those_that_are_trained(name):
    config = CODECS[name]
    assert config.name == name
    assert override(config, []) == config
    base = "folder-64" if name == "codec" else str(name).removesuffix("-codec")
    user = preset(base, "latent")
    assert there(user.codec).factor == config.factor
    assert user.model.channels == config.channels
    assert user.data_side == config.side
    assert user.data.source == config.data.source


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lrs=1", r"--set: lrs: unknown key .* lr\?"),
        ("data={sauce: folder}", r"data\.sauce: unknown key \(did you mean data\.source\?\)"),
        ("side=18", "side 18 .* halved"),
        ("widths=[]", "widths: .* at least 1"),
        ("widths=[13, 16]", "widths: 13 .* norm_groups 2"),
        ("data.classes=[a]", r"data\.classes: .* omit"),
    ],
)
def test_a_wrong_setting_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        find_codec_run("openmoji-codec", None, [change])


def test_a_config_that_says_less_means_what_it_always_meant(tmp_path):
    text = to_yaml(CODECS["codec"])
    older = text.replace("norm_groups: 2\n", "").replace("square_weight: 1.0\n", "")
    assert len(older.splitlines()) == len(text.splitlines()) - 2
    (tmp_path / "codec.yaml").write_text(older)
    assert load_config(tmp_path / "codec.yaml", CodecRunConfig) == CODECS["codec"]
    groups = {n: build(override(CODECS["codec"], [f"norm_groups={n}"]), 3) for n in (2, 4)}
    assert [m.config["norm_num_groups"] for m in groups.values()] == [2, 4]


def test_named_data_replaces_a_mix(tmp_path):
    parts = [{"path": str(tmp_path / name), "share": 1} for name in "ab"]
    mixed = changed(CODECS["codec"], [("data.path", None), ("data.mix", parts)])
    (tmp_path / "codec.yaml").write_text(to_yaml(mixed))
    (tmp_path / "c").mkdir()
    again = there(find_codec_run(str(tmp_path), str(tmp_path / "c"), []))
    assert (again.data.path, again.data.mix) == (str(tmp_path / "c"), ())
    kept = there(find_codec_run(str(tmp_path), None, ["lr=0.1"]))
    assert kept.data.mix == mixed.data.mix


def test_only_codecs_are_trained_as_such(tmp_path):
    assert find_codec_run("openmoji", None, []) is None
    assert find_codec_run(str(tmp_path), None, []) is None
    factor_8 = find_codec_run("codec", str(tmp_path), ["widths=[16, 32, 64, 64]"])
    assert there(factor_8).factor == 8
    with pytest.raises(ConfigError, match="autoencoder; only mdm train"):
        preset("openmoji-codec")
    with pytest.raises(ConfigError, match="unknown key"):
        from_yaml(to_yaml(CODECS["codec"]))


def test_several_processes_do_not_train_one_codec(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "codec", "--data", "photos", "--out", str(tmp_path / "x")]) == 2
    assert "WORLD_SIZE: a codec trains in one process" in capsys.readouterr().err


def test_what_lies_in_a_folder_goes_before_a_preset_of_its_name(smooth, tmp_path, monkeypatch):
    config = small(smooth, "lr=0.5")
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "codec.yaml").write_text(to_yaml(config))
    monkeypatch.chdir(tmp_path)
    for name in ("codec", "codec/codec.yaml"):
        assert find_codec_run(name, None, []) == config
    assert find_codec_run("openmoji-codec", None, []) == CODECS["openmoji-codec"]


@pytest.mark.parametrize("command", ["sample", "info"])
def test_a_codec_is_no_model_and_says_what_it_is_for(command, trained, capsys):
    out, _ = trained
    assert cli.main([command, str(out)]) == 2
    printed = capsys.readouterr().err
    assert "is the training of an autoencoder" in printed
    assert f"mdm train PRESET --codec {out} trains a model on its codes" in printed
    assert cli.main([command, str(out / "codec")]) == 2
    assert "codec is an autoencoder, which draws nothing" in capsys.readouterr().err


def test_the_command_trains_a_codec_that_the_next_command_takes(smooth, tmp_path, capsys):
    settings = [word for change in [*SMALL, *OFTEN] for word in ("--set", change)]
    out = str(tmp_path / "codec")
    assert cli.main(["train", "codec", "--data", str(smooth), "--out", out, *settings]) == 0
    printed = capsys.readouterr().out
    assert "dB on 16 training pictures" in printed
    assert f"mdm train folder-64 --data {smooth} --as latent --codec {out} --out RUN" in printed
    assert cli.main(["train", out]) == 0
    changes = ["codec.factor=2", "model.channels=2", "model.levels[0].side=8"]
    config = job.find_config("folder-64", str(smooth), changes, as_="latent", codec=out)
    assert job.prepare(config).loader.batch(range(3)).picture.shape == (3, 2, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out"),
        (["--out", "x", "--lora", "4"], "--lora"),
        (["--out", "x", "--gpus", "2"], "--gpus"),
        (["--out", "x"], "--data"),
    ],
)
def test_what_cannot_be_asked_for_is_said(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["train", "codec", *arguments])
    except SystemExit as leaving:
        status = leaving.code
    assert status == 2
    assert message in capsys.readouterr().err
