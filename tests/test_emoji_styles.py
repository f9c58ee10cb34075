"""Emoji in three styles, from a small package and a small font, and the pairs that are held out."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fonts import write_font
from matryoshka_diffusion.config import ConfigError, DataConfig
from matryoshka_diffusion.data import emoji_styles as styles
from matryoshka_diffusion.data.decoded import Catalogue
from matryoshka_diffusion.data.source import Sample, Source, array_source, open_source, split
from matryoshka_diffusion.runs.prepare import find_config

RED, BLUE = (200, 30, 40, 255), (20, 40, 200, 255)
JAPAN = (0x1F1EF, 0x1F1F5)


def square(colour) -> bytes:
    """A PNG with clear margins, higher than wide as Noto's are wider than high."""
    pixels = np.zeros((18, 16, 4), np.uint8)
    pixels[4:14, 4:12] = colour
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """An unpacked package with a font beside its assets; OpenMoji has three emoji."""
    pytest.importorskip("emoji")
    folder = tmp_path / "package"
    for name in ("1f34e", "26a7-fe0f", "26a7", "1f44b-1f3fb"):
        (folder / "assets").mkdir(parents=True, exist_ok=True)
        Image.open(io.BytesIO(square(RED))).save(folder / "assets" / f"{name}.webp", lossless=True)
    write_font(folder / styles.NOTO.name, {0x1F34E: square(BLUE)}, {JAPAN: square(RED)})
    texts = {"1F34E": ("red apple",), "1F400": ("rat",), "26A7-FE0F": ("transgender symbol",)}
    samples = [Sample(key, words, original_side=16) for key, words in texts.items()]
    drawn = Catalogue("openmoji", "1", samples, lambda n: square(BLUE))
    monkeypatch.setattr(styles, "openmoji", lambda side: drawn)
    return folder


def test_every_emoji_has_a_sample_in_each_style_that_draws_it(package):
    source = open_source(DataConfig(source="emoji-styles", path=str(package)), 16)
    assert source.keys == [
        *("1F34E outline", "1F400 outline", "26A7 outline"),
        *("1F1EF-1F1F5 flat", "1F34E flat"),
        *("26A7 3d", "1F34E 3d"),
    ]
    assert source.samples[3].captions == ("flag: Japan, flat style", "flag of Japan, flat style")
    assert [one.captions[0] for one in source.samples if one.concept == "1F34E"] == [
        f"red apple, {style} style" for style in ("outline", "flat", "3d")
    ]
    names = [source.classes[int(one.label or 0)] for one in source.samples]
    assert names == [key.split()[1] for key in source.keys]
    centres = [source[n].picture[8, 8].argmax() for n in range(len(source))]
    assert centres == [2, 2, 2, 0, 2, 0, 0]
    assert (source[4].picture[0, 0] == 255).all()  # white behind the clear margins


def test_what_is_missing_is_named_with_its_package(package, monkeypatch):
    def opened(path=package):
        return open_source(DataConfig(source="emoji-styles", path=path and str(path)), 16)

    with pytest.raises(ConfigError, match="npm package @lobehub/fluent-emoji-3d"):
        opened(None)
    with pytest.raises(FileNotFoundError, match=r"gone: .*fluent-emoji-3d with --data"):
        opened(package / "gone")
    font = package / styles.NOTO.name
    font.write_bytes(font.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"NotoColorEmoji.ttf is no font of .*apt-get install"):
        opened()
    font.unlink()
    monkeypatch.setattr(styles, "NOTO", package / "none" / font.name)
    with pytest.raises(FileNotFoundError, match=r"none.* is missing: apt-get install fonts-noto"):
        opened()
    for file in (package / "assets").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"holds no emoji such as 1f34e\.webp"):
        opened()


def pairs(concepts: int, kinds: int) -> Source:
    """A source of every concept in every style."""
    keys = [f"{concept} {kind}" for kind in range(kinds) for concept in range(concepts)]
    source = array_source("pairs", np.zeros((len(keys), 8, 8, 3), np.uint8), keys)
    samples = [sample._replace(concept=sample.key.split()[0]) for sample in source.samples]
    return replace(source, samples=samples)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_a_pair_is_held_out_only_if_its_concept_is_trained_on_in_another_style(share):
    source = pairs(400, 3)
    seen, held_out = split(source, share)
    assert held_out is not None
    concepts = {sample.concept for sample in seen.samples}
    assert concepts == {str(concept) for concept in range(400)}
    # All three of a concept would be held out with the probability share ** 3; then one is kept.
    expected = share - share**3 / 3
    assert len(held_out) / len(source) == pytest.approx(expected, abs=0.03)
    # The first half of the concepts is split in the same way without the others.
    half = [n for n, sample in enumerate(source.samples) if int(sample.concept) < 200]
    _, fewer = split(source.part(half), share)
    assert fewer is not None
    assert fewer.keys == [key for key in held_out.keys if int(key.split()[0]) < 200]


def test_a_concept_in_one_style_is_always_trained_on():
    with pytest.raises(ConfigError, match="takes 0 of the 50"):
        split(pairs(50, 1), 0.5)


def test_the_preset_holds_out_pairs():
    data = find_config("emoji-styles", "here", []).data
    assert (data.source, data.held_out, Path(data.path or "").name) == ("emoji-styles", 0.1, "here")
