"""The curves of runs as one image."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageSequence

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.configfile import to_yaml
from matryoshka_diffusion.draw import timelapse
from matryoshka_diffusion.draw.curves import plot, read_curves
from matryoshka_diffusion.draw.grid import PAGE, save_png
from tiny_run import tiny_config


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(tiny_config()))
    others = {"grad_norm": 1.0, "lr_per_level": [0.01], "images_per_second": 100.0}
    lines: list[dict] = [
        {"images_seen": 8 * n, "loss_per_level": [1 / n, None if n < 2 else 2 / n], **others}
        for n in range(1, 5)
    ]
    lines.append(
        {"images_seen": 16, "held_out_loss_per_level": [0.9], "seen_loss_per_level": [0.5]}
    )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"images_seen": 40, "lo')
    return folder


def test_values_are_those_of_the_run(run):
    curves = read_curves(run)
    assert (curves.name, curves.sizes) == ("first", ("8", "16"))
    first = [(8, 1), (16, 1 / 2), (24, 1 / 3), (32, 1 / 4)]
    assert curves.points("loss_per_level", 0) == first
    assert curves.points("loss_per_level", 1) == [(16, 1), (24, 2 / 3), (32, 1 / 2)]
    assert curves.points("held_out_loss_per_level", 0) == [(16, 0.9)]
    assert curves.points("held_out_loss_per_level", 1) == []
    assert curves.points("lr_per_level", 0) == [(n, 0.01) for n, _ in first]


def test_runs_are_drawn_into_one_image(run, tmp_path, capsys):
    out = tmp_path / "plot.png"
    assert cli.main(["plot", str(run), str(run), "-o", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    pixels = np.asarray(Image.open(out).convert("RGB"))
    assert pixels.shape[0] > 800
    assert (pixels < 200).any(-1).mean() > 0.005, "there is something on it"
    plot([run], tmp_path / "plot.svg")
    assert b"<svg" in (tmp_path / "plot.svg").read_bytes()[:500]


def test_a_first_line_of_metrics_is_a_dot_and_later_levels_have_no_panel(run, tmp_path):
    whole, first = tmp_path / "whole.png", tmp_path / "first.png"
    plot([run], whole)
    line = {"images_seen": 8, "loss_per_level": [1.0], "grad_norm": None}
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    plot([run], first)
    with Image.open(whole) as both, Image.open(first) as alone:
        assert alone.height < both.height
        pixels = np.asarray(alone.convert("RGB")).astype(int)
    coloured = np.ptp(pixels[:, alone.width // 5 :], axis=2) > 80
    assert coloured.any()


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, "no run folder"),
        ("", "nothing"),
        ("{}\n", "line 1"),
        ("\0\n", "line 1"),
        ("[]\n", "line 1"),
        ('{"images_seen": "4"}\n', "line 1"),
    ],
)
def test_a_folder_without_curves_is_refused(run, metrics, message, tmp_path):
    path = run / "metrics.jsonl"
    path.unlink() if metrics is None else path.write_text(metrics)
    with pytest.raises(UsageError, match=message):
        plot([run], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_a_form_that_matplotlib_cannot_write_is_refused(run, tmp_path):
    with pytest.raises(UsageError, match=r"x\.doc.*\.png"):
        plot([run], tmp_path / "x.doc")


# --- time lapse ----------------------------------------------------------------------------------


@pytest.fixture
def previews(tmp_path):
    """Two previews, of which the second is larger."""
    folder = tmp_path / "run" / "previews"
    for number, (side, colour) in enumerate(((40, (200, 0, 0)), (60, (0, 200, 0)))):
        save_png(np.full((side, side, 3), colour, np.uint8), folder / f"{number:010d}.png", None)
    return folder


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_previews_follow_each_other_and_the_last_one_stays(previews, suffix, tmp_path, capsys):
    out = tmp_path / f"out{suffix}"
    assert cli.main(["timelapse", str(previews.parent), "-o", str(out), "--fps", "3"]) == 0
    assert "2 previews" in capsys.readouterr().out
    with Image.open(out) as clip:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(clip)]
    assert [frame.shape for frame in frames] == [(60, 60, 3)] * 4
    assert tuple(frames[0][0, 0]) == (200, 0, 0)
    assert tuple(frames[0][-1, -1]) == PAGE
    assert all((frame == (0, 200, 0)).all() for frame in frames[1:])


def test_of_many_previews_some_are_shown_and_the_last_one(previews, tmp_path, monkeypatch):
    monkeypatch.setattr(timelapse, "MOST_FRAMES", 2)
    for number in range(2, 5):
        save_png(np.zeros((40, 40, 3), np.uint8), previews / f"{number:010d}.png", None)
    assert timelapse.timelapse(previews.parent, tmp_path / "out.webp", 1.0) == 3


def test_without_previews_there_is_no_clip(previews, tmp_path, capsys):
    assert cli.main(["timelapse", str(tmp_path)]) == 2
    assert "no previews" in capsys.readouterr().err
    assert cli.main(["timelapse", str(previews.parent), "-o", "x.bmp"]) == 2
    assert ".webp" in capsys.readouterr().err
    (previews / "0000000001.png").write_bytes(b"no image")
    assert cli.main(["timelapse", str(previews.parent), "-o", str(tmp_path / "x.gif")]) == 1
    assert "0000000001.png" in capsys.readouterr().err
