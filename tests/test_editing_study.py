"""The study of edits measures what it says, on a model whose numbers mean nothing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from studies.editing import averaged, error_in, measure, quarter

from matryoshka_diffusion.draw.grid import save_png
from matryoshka_diffusion.pyramid import Resolution, down_sample, to_float
from test_pipeline import text_model


def test_averages_and_errors_are_those_of_the_numbers_between_minus_one_and_one():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    truth = down_sample(to_float(pictures).movedim(-1, 1), Resolution(4, 4)).movedim(1, -1)
    torch.testing.assert_close(torch.tensor(averaged(pictures, 4)).float(), truth)
    real, drawn = np.zeros((2, 16, 16, 3), np.uint8), np.zeros((2, 16, 16, 3), np.uint8)
    drawn[:, 8:, 8:] = 51
    drawn[:, :8] = 200
    assert error_in(quarter(16), drawn, real) == pytest.approx(51 / 127.5)


def test_the_study_measures_edits_and_draws_a_sheet(tmp_path: Path, capsys):
    model = text_model(steps=2)
    for number, picture in enumerate(np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3))):
        save_png(picture.astype(np.uint8), tmp_path / "data" / f"{number}.png", None)
        (tmp_path / "data" / f"{number}.txt").write_text(f"thing {number}")
    data = model.config.data.model_copy(update={"path": str(tmp_path / "data"), "side": 16})
    model.config = model.config.model_copy(update={"data": data})
    measure(model, 3, 8, tmp_path / "sheet.png", {})
    first, *others = capsys.readouterr().out.splitlines()
    agreement = re.search(r"\|D\(x\) - x8\| (\S+), at most (\S+); .* of 3", first)
    assert agreement is not None
    assert 0.0 < float(agreement[1]) <= float(agreement[2]) < 0.05
    assert len(others) == 8
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 10 * 128
