"""The curves of runs as a picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import UsageError, to_yaml
from matryoshka_diffusion.draw.curves import _points, plot, read_curves
from tiny_run import tiny_config


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(tiny_config()))
    lines: list[dict] = [
        {
            "images_seen": 8 * n,
            "loss_per_level": [1.0 / n, None if n < 2 else 2.0 / n],
            "grad_norm": 1.0,
            "lr": 0.01,
            "images_per_second": 100.0,
        }
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
    assert curves.name == "first"
    assert curves.sizes == ("8", "16")
    assert _points(curves.lines, "loss_per_level", 0) == [
        (8, 1),
        (16, 1 / 2),
        (24, 1 / 3),
        (32, 1 / 4),
    ]
    assert _points(curves.lines, "loss_per_level", 1) == [(16, 1), (24, 2 / 3), (32, 1 / 2)]
    assert _points(curves.lines, "held_out_loss_per_level", 0) == [(16, 0.9)]
    assert _points(curves.lines, "held_out_loss_per_level", 1) == []


def test_runs_are_drawn_into_one_picture(run, tmp_path, capsys):
    out = tmp_path / "plot.png"
    assert cli.main(["plot", str(run), str(run), "-o", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    one = np.asarray(Image.open(out).convert("RGB"))
    assert one.shape[0] > 800
    assert (one < 200).any(-1).mean() > 0.005, "there is something on it"
    plot([run], tmp_path / "plot.svg")
    assert b"<svg" in (tmp_path / "plot.svg").read_bytes()[:500]


def test_what_is_no_run_is_said(run, tmp_path):
    with pytest.raises(UsageError, match="no run folder with a metrics"):
        plot([tmp_path], tmp_path / "x.png")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UsageError, match="nothing has been logged yet"):
        plot([run], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
