"""CLIP as transformers has it: the same embeddings, pictures prepared as Pillow prepares them."""

from __future__ import annotations

import json
import re
import shutil
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from matryoshka_diffusion.files import MissingExtra
from matryoshka_diffusion.metrics.networks.clip import CLIP, clip_score
from matryoshka_diffusion.metrics.networks.features import Extractor, weights_hash
from matryoshka_diffusion.metrics.networks.resize import as_rgb, pil_bicubic

CAPTIONS = ["a blue jay", "the red apple", "a jay on the apple", ""]


@pytest.fixture(scope="module")
def clip(tiny_clip):
    return CLIP(tiny_clip)


@pytest.fixture(scope="module")
def theirs(tiny_clip):
    import transformers

    return transformers.CLIPModel.from_pretrained(tiny_clip).eval()


def noise(count=4, height=32, width=32, channels=3, seed=0):
    shape = (count, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height, width):
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / (3.0 + c)) * np.cos(columns / (5.0 - c)) for c in range(3)]
    return ((np.stack(waves, -1) + 1.0) * 127.0).astype(np.uint8)[None]


def test_pictures_have_the_embeddings_of_transformers(clip, theirs):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pictures = noise()
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = theirs.get_image_features(pixels).pooler_output
    np.testing.assert_allclose(clip(pictures), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_captions_have_the_embeddings_of_transformers_and_are_cut(clip, theirs):
    with torch.no_grad():
        tokens = torch.tensor([[0, 6, 7, 1]])  # <start> red apple <end>
        expected = theirs.get_text_features(tokens).pooler_output
    np.testing.assert_allclose(
        clip.texts(["a", "red apple", "a blue jay"])[1:2], expected.numpy(), rtol=1e-4, atol=1e-4
    )
    first, longer = clip.texts(["a a a a a a", "a a a a a a blue blue"])
    np.testing.assert_allclose(first, longer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (20, 20), (50, 80), (33, 90), (32, 32)])
def test_pictures_are_resized_as_pillow_does(height, width):
    for picture in (smooth(height, width), noise(1, height, width)):
        size = [max(32, int(32 * edge / min(height, width))) for edge in (height, width)]
        resized = Image.fromarray(picture[0]).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        top, left = ((edge - 32) // 2 for edge in size)
        expected = np.asarray(resized)[top : top + 32, left : left + 32].astype(int)
        found = pil_bicubic(as_rgb(picture, "it"), 32)[0].permute(1, 2, 0).numpy()
        difference = np.abs(found - expected)
        assert difference.max() <= 1.0
        assert difference.mean() < 0.01


def test_it_says_what_it_is(clip, tiny_clip):
    assert (clip.name, clip.width, clip.variant) == ("CLIP", 16, "ViT-24/8-32")
    assert clip.weights == weights_hash(tiny_clip / "model.safetensors")
    assert clip.resize == "Pillow's bicubic and the middle square, 32x32"
    assert clip.texts(CAPTIONS).shape == (4, 16)
    assert isinstance(clip, Extractor)


def copied(tiny_clip, folder, **said):
    """The CLIP with a file that says how its pictures are prepared."""
    shutil.copytree(tiny_clip, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5]}


def test_pictures_are_normalised_as_the_folder_says(clip, theirs, tiny_clip, tmp_path):
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    other = CLIP(copied(tiny_clip, tmp_path / "other", **HALF, **size))
    pictures = noise()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in HALF.values())
    pixels = (torch.tensor(pictures).permute(0, 3, 1, 2) / 255.0 - mean) / std
    with torch.no_grad():
        expected = theirs.get_image_features(pixels).pooler_output
    np.testing.assert_allclose(other(pictures), expected.numpy(), rtol=1e-4, atol=1e-4)
    assert other.variant == f"ViT-24/8-32-{other.weights[:8]}", "no CLIP of OpenAI"
    assert other.resize != clip.resize, "features are kept under this name"
    usual = CLIP(copied(tiny_clip, tmp_path / "usual", size=32, crop_size=32, resample=3))
    assert (usual.variant, usual.resize) == (clip.variant, clip.resize)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": 40}, "size is {'shortest_edge': 40}"),
        ({"size": {"height": 32, "width": 32}}, "size is {'height': 32, 'width': 32}"),
        ({"crop_size": 24}, "crop_size is {'height': 24"),
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"resample": 2}, "resample is 2"),
        ({"image_std": [0.5, 0.0, 0.5]}, "not of three colours"),
        ({"image_mean": [0.5]}, "not of three colours"),
        ({"image_mean": "grey"}, "no settings of a CLIP's pictures"),
    ],
)
def test_pictures_that_are_prepared_in_another_way_are_refused(said, message, tiny_clip, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        CLIP(copied(tiny_clip, tmp_path / "other", **said))


def test_a_clip_with_another_activation_is_not_called_that_of_openai(tiny_clip, tmp_path):
    folder = copied(tiny_clip, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(config))
    assert CLIP(folder).variant == f"ViT-24/8-32-{CLIP(folder).weights[:8]}"


def test_other_sides_and_grey_pictures_are_brought_to_the_models(clip):
    grey = noise(2, 48, 64, channels=1)
    np.testing.assert_array_equal(clip(grey), clip(grey.repeat(3, axis=3)))
    with pytest.raises(ValueError, match="CLIP looks at pictures with 1 or 3 channels, not 2"):
        clip(noise(1, channels=2))


def test_the_score_is_a_hundred_times_the_cosine_where_that_is_positive():
    images = np.array([[3.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    texts = np.array([[5.0, 0.0], [0.0, 2.0], [-1.0, 0.1]])
    np.testing.assert_allclose(
        clip_score(images, texts), [100.0, 100.0 / np.sqrt(2.0), 0.0], rtol=1e-12
    )


def test_what_cannot_be_scored_is_refused():
    rows = np.ones((3, 4))
    with pytest.raises(ValueError, match="3 pictures cannot be scored by 2 captions"):
        clip_score(rows, rows[:2])
    with pytest.raises(ValueError, match="CLIP score takes at least 1 samples"):
        clip_score(rows[:0], rows[:0])
    with pytest.raises(ValueError, match="width 4 cannot meet those of 2"):
        clip_score(rows, rows[:, :2])
    with pytest.raises(ValueError, match="row 1 of the features is zero"):
        clip_score(rows * [[1.0], [0.0], [1.0]], rows)


def test_a_folder_that_is_something_else_is_named(tiny_clip, tiny_t5, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no \*\.safetensors; expected a folder with a CLIP"
    ):
        CLIP(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"cannot load CLIP from {tiny_t5}|is no CLIP"):
        CLIP(tiny_t5)
    for file in tiny_clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing, first visual_projection\.weight"):
        CLIP(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"cannot load CLIP from {tmp_path}"):
        CLIP(tmp_path)


def test_a_missing_package_names_the_extra(monkeypatch, tiny_clip):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"CLIP needs .*matryoshka-diffusion\[eval\]"):
        CLIP(tiny_clip)
