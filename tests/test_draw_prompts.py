"""Prompts from a file: what a line says, and going on after a stop."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import ConfigError, UsageError
from matryoshka_diffusion.draw import gallery
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.runs.draw_prompts import draw_requests, read_requests
from matryoshka_diffusion.training.weights import export_weights
from tiny_run import tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of two classes that was never trained."""
    config = tiny_config(dropout=0.0)
    nest = config.model.model_copy(update={"text": None, "classes": 2})
    data = config.data.model_copy(update={"classes": ("cat", "dog")})
    config = config.model_copy(update={"model": nest, "encoder": None, "data": data})
    folder = tmp_path_factory.mktemp("model")
    export_weights(folder, NestedUNet(nest).state_dict(), config)
    return folder


def images(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_each_line_is_drawn_with_its_own_seed_and_guidance(model, tmp_path, capsys):
    lines = [{"class": "dog", "seed": 7}, {"class": 0, "guidance": 3}, {"class": "cat"}]
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    words = ["sample", str(model), "--prompts", str(tmp_path / "lines.jsonl"), "--steps", "2"]
    assert cli.main([*words, "-n", "2", "-o", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("6 images in")
    loaded = Matryoshka.load(model)
    expected = [("dog", 7, 1.0), ("dog", 8, 1.0), (0, 2, 3.0), (0, 3, 3.0), ("cat", 4, 1.0)]
    drawn = list(images(tmp_path / "out").values())
    assert len(drawn) == 6
    for image, (label, seed, guidance) in zip(drawn, expected, strict=False):
        alone = loaded.sample(classes=label, seed=seed, guidance=guidance, steps=2).pictures[0]
        assert np.abs(image.astype(int) - alone).max() <= 1


def test_a_job_that_was_stopped_draws_what_is_missing(model, tmp_path, monkeypatch):
    (tmp_path / "names.txt").write_text("cat\n\ndog\n" * 4)
    requests, loaded = read_requests(tmp_path / "names.txt"), Matryoshka.load(model)
    options: dict[str, Any] = {"batch_size": 3, "steps": 2}
    assert draw_requests(loaded, requests, tmp_path / "whole", **options) == 8

    def stopping(samples: gallery.Gallery, out: Path) -> None:
        if out.name.startswith("000004"):
            raise KeyboardInterrupt
        save(samples, out)

    save = gallery.save_file
    monkeypatch.setattr(gallery, "save_file", stopping)
    with pytest.raises(KeyboardInterrupt):
        draw_requests(loaded, requests, tmp_path / "parts", **options)
    monkeypatch.undo()
    assert len(images(tmp_path / "parts")) == 4
    stale = tmp_path / "parts" / ".000004-cat.png.0123abcd.tmp"  # kill -9 leaves it
    stale.write_bytes(b"half an image")
    assert draw_requests(loaded, requests, tmp_path / "parts", **options) == 4
    assert not stale.exists()
    whole, parts = images(tmp_path / "whole"), images(tmp_path / "parts")
    assert list(whole) == list(parts)
    for name in whole:  # batches are other ones, so sums round otherwise
        assert np.abs(whole[name].astype(int) - parts[name]).max() <= 1
    with pytest.raises(ConfigError, match="other sampling: give another -o"):
        draw_requests(loaded, requests, tmp_path / "parts", batch_size=3, steps=3)
    with pytest.raises(ConfigError, match=r"other requests \(image 0 is drawn\): give another -o"):
        draw_requests(loaded, requests[1:] + requests[:1], tmp_path / "parts", **options)
    assert draw_requests(loaded, [*requests, requests[0]], tmp_path / "parts", **options) == 1
    (tmp_path / "parts" / "000001-dog.png").unlink()
    changed = [requests[0], requests[1]._replace(seed=99), *requests[2:], requests[0]]
    assert draw_requests(loaded, changed, tmp_path / "parts", **options) == 1
    assert "settings.json" in os.listdir(tmp_path / "parts")


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("a.txt", " \n", ["a.txt", "no line"]),
        ("a.txt", "cat\nowl", ["owl", "cat, dog"]),
        ("a.jsonl", '{"class": "cat"}\n{"class": 1', ["line 2", "JSON"]),
        ("a.jsonl", '["cat"]', ["line 1", "class"]),
        ("a.jsonl", '{"class": "cat", "sed": 1}', ["line 1", "'sed'", "seed"]),
        ("a.jsonl", '{"class": "cat", "seed": "1"}', ["line 1", "seed is '1'"]),
        ("a.jsonl", '{"class": "cat"}\n{"prompt": "cat"}', ["line 2", "takes no prompts"]),
        ("a.JSONL", '{"class": "cat", "guidance": [1, 2, 3]}', ["line 1", "guidance"]),
        ("a.jsonl", '{"class": "cat", "guidance": NaN}', ["line 1", "guidance"]),
        ("a.jsonl", '{"class": "cat", "negative": "dog"}', ["line 1", "needs guidance"]),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_drawn(model, tmp_path, name, text, parts):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as refused:
        draw_requests(Matryoshka.load(model), read_requests(tmp_path / name), tmp_path / "out")
    assert all(part in str(refused.value) for part in parts), refused.value
    assert not (tmp_path / "out").exists()


def test_options_that_the_lines_stand_for_are_refused(model, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("cat")
    words = ["sample", str(model), "--prompts", str(tmp_path / "a.txt")]
    assert cli.main(words) == 2
    assert "-o" in capsys.readouterr().err
    assert cli.main([*words, "--class", "dog", "-o", str(tmp_path / "out")]) == 2
    assert "--class" in capsys.readouterr().err
