"""Prompts that are an emoji, for models whose captions are the names of emoji."""

from __future__ import annotations

import sys

import pytest

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import DataConfig
from matryoshka_diffusion.data.emoji_names import named
from test_pipeline import text_model

EMOJI = DataConfig(source="openmoji")


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("\U0001f34e", "red apple"),
        (" \u2602\ufe0f", "umbrella"),
        ("\U0001f44b\U0001f3fd", "waving hand"),
        ("\U0001f1eb\U0001f1f7", "flag: France"),
        ("\U0001f469\u200d\U0001f680", "woman astronaut"),
    ],
)
def test_an_emoji_is_replaced_by_its_name(prompt, name):
    assert named(prompt, EMOJI) == name
    assert named(prompt, DataConfig(source="folder")) == prompt


@pytest.mark.parametrize(
    "prompt", ["red apple", "", " ", "\u3042", "\xae", "7", "an \U0001f34e", "\ud83c"]
)
def test_other_prompts_stay(prompt):
    assert named(prompt, EMOJI) == prompt


def test_without_the_package_one_character_has_the_name_of_unicode(monkeypatch):
    monkeypatch.setitem(sys.modules, "emoji", None)
    assert named("\U0001f34e\ufe0f", EMOJI) == "red apple"
    assert named("\U0001f44b\U0001f3fd", EMOJI) == "waving hand sign"
    flag = "\U0001f1eb\U0001f1f7"
    assert named(flag, EMOJI) == flag


def test_samples_have_the_name_as_their_caption():
    model = text_model(steps=1)
    assert model.sample("\U0001f34e").captions == ("\U0001f34e",)
    model.config = model.config.model_copy(update={"data": EMOJI})
    assert model.sample(["\U0001f34e", "a"], n=2).captions == ("red apple",) * 2 + ("a",) * 2


def test_the_command_says_what_it_draws(tmp_path, capsys):
    words = ["sample", "openmoji", "-p", "\U0001f34e", "--steps", "1", "--device", "cpu"]
    assert cli.main([*words, "-o", str(tmp_path / "x.png")]) == 0
    assert "\U0001f34e is drawn as 'red apple'" in capsys.readouterr().out
