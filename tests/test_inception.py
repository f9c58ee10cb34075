"""The Inception of FID: its layers, its resizing, and both kinds of weights files."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from matryoshka_diffusion.metrics.networks.features import Extractor, weights_hash
from matryoshka_diffusion.metrics.networks.inception import Inception
from matryoshka_diffusion.metrics.networks.inception_net import CLASSES, WIDTH, FIDInception
from matryoshka_diffusion.metrics.networks.resize import as_rgb, tf1_bilinear


class Scripted(nn.Module):
    """What the TorchScript file can be asked, as far as it is asked; without a resize."""

    def __init__(self, layers, output):
        super().__init__()
        self.layers = layers
        self.output = output

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        features = self.layers((img.to(torch.float32) - 128.0) / 128.0)
        return features if return_features else self.output(features)


@pytest.fixture(scope="module")
def net():
    """Random weights that keep the size of what passes through, and moments that matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = FIDInception().eval().requires_grad_(False)
        for name, value in net.state_dict().items():
            if name.endswith("conv.weight"):
                nn.init.kaiming_normal_(value, nonlinearity="relu")
            elif name.endswith(("running_var", "bn.weight")):
                value.uniform_(0.8, 1.25)
            elif name.endswith(("running_mean", "bn.bias")):
                value.normal_(0.0, 0.1)
        return net


@pytest.fixture(scope="module")
def ported(net, tmp_path_factory):
    """The state dict as old files are: not a zip archive, with the counters of training."""
    path = tmp_path_factory.mktemp("ported") / "weights.pth"
    state = {**net.state_dict(), "Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0)}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    def save(name, layers, output, example=(1, 3, 299, 299)):
        path = tmp_path_factory.mktemp("scripted") / name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced = torch.jit.trace(layers, torch.zeros(example), check_trace=False)
            torch.jit.script(Scripted(traced, output)).save(str(path))
        return path

    return save


@pytest.fixture(scope="module")
def inception(ported):
    return Inception(ported)


def noise(count=2, side=299, channels=3, seed=0):
    shape = (count, side, side, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_it_has_the_weights_of_the_published_port():
    # torchvision states 27,161,264 parameters for its Inception-v3. Its auxiliary head has
    # 768 * 128 + 2 * 128, then 128 * 768 * 25 + 2 * 768, then 769 * 1000; its classifier has
    # 2049 * 1000 where the port has 2049 * 1008.
    head = 768 * 128 + 2 * 128 + 128 * 768 * 25 + 2 * 768 + 769 * 1000
    with torch.device("meta"):
        net = FIDInception()
    assert sum(p.numel() for p in net.parameters()) == 27_161_264 - head + 2049 * 8
    state = net.state_dict()
    # 5 convolutions of the stem, and 7, 7, 7, 4, 10, 10, 10, 10, 6, 9, 9 in the blocks.
    assert len(state) == 94 * 5 + 2
    assert state["fc.weight"].shape == (1008, 2048)
    for key, shape in {
        "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
        "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5d.branch_pool.conv.weight": (64, 288, 1, 1),
        "Mixed_6a.branch3x3dbl_3.bn.running_var": (96,),
        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7_2.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch1x1.conv.weight": (320, 1280, 1, 1),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    }.items():
        assert state[key].shape == shape


def by_hand(state, x):
    """The same network once more, step by step."""

    def conv(x, name, stride=1, padding=(0, 0)):
        x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=padding)
        mean, var, weight, bias = (
            state[f"{name}.bn.{part}"].view(-1, 1, 1)
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 0.001).sqrt() * weight + bias).clamp(min=0)

    def average(x):
        total, count = (F.avg_pool2d(y, 3, 1, 1) for y in (x, torch.ones_like(x)))
        return total / count  # zeros outside are neither summed nor counted

    def row(x, name):
        return conv(x, name, padding=(0, state[f"{name}.conv.weight"].shape[3] // 2))

    def column(x, name):
        return conv(x, name, padding=(state[f"{name}.conv.weight"].shape[2] // 2, 0))

    def square(x, name):
        return conv(x, name, padding=(1, 1))

    x = conv(x, "Conv2d_1a_3x3", 2)
    x = conv(x, "Conv2d_2a_3x3")
    x = F.max_pool2d(square(x, "Conv2d_2b_3x3"), 3, 2)
    x = conv(x, "Conv2d_3b_1x1")
    x = F.max_pool2d(conv(x, "Conv2d_4a_3x3"), 3, 2)
    for n in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        one = conv(x, f"{n}.branch1x1")
        five = conv(conv(x, f"{n}.branch5x5_1"), f"{n}.branch5x5_2", padding=(2, 2))
        three = square(conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2")
        three = square(three, f"{n}.branch3x3dbl_3")
        x = torch.cat([one, five, three, conv(average(x), f"{n}.branch_pool")], 1)
    n = "Mixed_6a"
    three = square(conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2")
    three = conv(three, f"{n}.branch3x3dbl_3", 2)
    x = torch.cat([conv(x, f"{n}.branch3x3", 2), three, F.max_pool2d(x, 3, 2)], 1)
    for n in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        one = conv(x, f"{n}.branch1x1")
        seven = row(conv(x, f"{n}.branch7x7_1"), f"{n}.branch7x7_2")
        seven = column(seven, f"{n}.branch7x7_3")
        double = column(conv(x, f"{n}.branch7x7dbl_1"), f"{n}.branch7x7dbl_2")
        double = column(row(double, f"{n}.branch7x7dbl_3"), f"{n}.branch7x7dbl_4")
        double = row(double, f"{n}.branch7x7dbl_5")
        x = torch.cat([one, seven, double, conv(average(x), f"{n}.branch_pool")], 1)
    n = "Mixed_7a"
    three = conv(conv(x, f"{n}.branch3x3_1"), f"{n}.branch3x3_2", 2)
    seven = row(conv(x, f"{n}.branch7x7x3_1"), f"{n}.branch7x7x3_2")
    seven = conv(column(seven, f"{n}.branch7x7x3_3"), f"{n}.branch7x7x3_4", 2)
    x = torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)
    for n, pooled in (("Mixed_7b", average), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        one = conv(x, f"{n}.branch1x1")
        three = conv(x, f"{n}.branch3x3_1")
        three = torch.cat([row(three, f"{n}.branch3x3_2a"), column(three, f"{n}.branch3x3_2b")], 1)
        double = square(conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2")
        double = torch.cat(
            [row(double, f"{n}.branch3x3dbl_3a"), column(double, f"{n}.branch3x3dbl_3b")], 1
        )
        x = torch.cat([one, three, double, conv(pooled(x), f"{n}.branch_pool")], 1)
    return F.avg_pool2d(x, 8).flatten(1)


def test_features_are_those_of_the_network_written_step_by_step(net, inception):
    picture = noise(1)
    scaled = (torch.from_numpy(picture).permute(0, 3, 1, 2).float() - 128) / 128
    expected = by_hand(net.state_dict(), scaled)
    assert expected.std() > 0.1
    found = inception(picture)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)


class ByHand(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def forward(self, x):
        return by_hand(self.state, x)


def test_both_kinds_of_files_give_the_same_numbers(net, inception, script):
    scripted = Inception(script("inception.pt", ByHand(net.state_dict()), net.fc))
    pictures = noise(1)
    features = inception(pictures)
    np.testing.assert_allclose(scripted(pictures), features, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(
        scripted.probabilities(features), inception.probabilities(features)
    )
    assert scripted.resize == "inside the TorchScript file to 299x299"
    assert isinstance(scripted, Extractor)


def test_it_says_what_it_is(inception, ported):
    assert isinstance(inception, Extractor)
    assert (inception.name, inception.width) == ("Inception", 2048)
    assert inception.weights == weights_hash(ported)
    assert inception.resize == "TensorFlow 1 bilinear without antialiasing to 299x299"


def test_other_sides_and_grey_pictures_are_brought_to_the_networks(inception):
    grey = noise(1, side=32, channels=1)
    features = inception(grey)
    np.testing.assert_array_equal(features, inception(grey.repeat(3, axis=3)))
    with pytest.raises(ValueError, match="Inception looks at pictures with 1 or 3 channels, not 4"):
        inception(noise(1, side=8, channels=4))


def test_probabilities_leave_the_bias_out(net, inception):
    features = np.random.default_rng(1).gamma(1.0, 1.0, (5, WIDTH)).astype(np.float32)
    expected = F.linear(torch.from_numpy(features).double(), net.fc.weight.double()).softmax(1)
    found = inception.probabilities(features)
    assert found.shape == (5, CLASSES)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-9)


def tf1_pixel_by_pixel(picture, side):
    height, width = picture.shape
    result = np.empty((side, side))
    for i in range(side):
        for j in range(side):
            y, x = i * height / side, j * width / side
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dy, dx = y - top, x - left
            upper = picture[top, left] * (1 - dx) + picture[top, right] * dx
            lower = picture[bottom, left] * (1 - dx) + picture[bottom, right] * dx
            result[i, j] = upper * (1 - dy) + lower * dy
    return result


@pytest.mark.parametrize(("height", "width", "side"), [(5, 7, 13), (31, 17, 9), (26, 13, 13)])
def test_resizing_is_tensorflow_ones(height, width, side):
    picture = np.random.default_rng(2).integers(0, 256, (height, width)).astype(float)
    found = tf1_bilinear(torch.from_numpy(picture)[None, None], side)[0, 0]
    np.testing.assert_allclose(found.numpy(), tf1_pixel_by_pixel(picture, side), atol=1e-9)


def test_resizing_in_float32_is_exact_enough():
    x = torch.from_numpy(noise(1, side=256, channels=1)).permute(0, 3, 1, 2)
    single, double = tf1_bilinear(x.float(), 299), tf1_bilinear(x.double(), 299)
    assert (single.double() - double).abs().max() < 0.01  # of 255


def test_a_picture_of_the_networks_side_is_not_resized():
    x = as_rgb(noise(1, side=13), "it").float()
    assert torch.equal(tf1_bilinear(x, 13), x)


def test_safetensors_are_read_too(net, inception, tmp_path):
    path = tmp_path / "inception.safetensors"
    safetensors.torch.save_file(net.state_dict(), path)
    pictures = noise(1, side=40)
    np.testing.assert_array_equal(Inception(path)(pictures), inception(pictures))


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda path: path.write_bytes(b"no weights at all"), "cannot read"),
        (lambda path: path.write_bytes(b""), "cannot read"),
        (lambda path: torch.save({"epoch": 3}, path), "holds no state dict"),
        (lambda path: torch.save(torch.zeros(3), path), "holds no state dict"),
        (
            lambda path: torch.save({"fc.weight": torch.zeros(1000, 2048)}, path),
            r"471 keys missing \(Conv2d_1a_3x3.conv.weight, .*\); 1 keys of another shape "
            r"\(fc.weight \(1000, 2048\) instead of \(1008, 2048\)\)",
        ),
    ],
)
def test_a_file_that_is_something_else_is_named(write, problem, tmp_path):
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(ValueError, match=problem) as error:
        Inception(path)
    assert str(path) in str(error.value)
    assert "expected the TorchScript file inception-2015-12-05.pt or the state" in str(error.value)


def test_unexpected_keys_are_listed(net, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({**net.state_dict(), "AuxLogits.fc.bias": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 keys unexpected \(AuxLogits.fc.bias\)"):
        Inception(path)


def test_a_pickle_that_would_run_something_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"fc.weight": Trap()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="cannot read"):
        Inception(tmp_path / "weights.pth")
    assert not (tmp_path / "sprung").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'no.pt'}: no such file")):
        Inception(tmp_path / "no.pt")


class Mean(nn.Module):
    """Features without a classifier, of some width."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, width))

    def forward(self, x):
        return x.mean(dim=(2, 3)) @ self.weight


def test_torchscript_that_is_something_else_is_named(script, tmp_path):
    other = script("other.pt", Mean(5), nn.Identity())
    with pytest.raises(ValueError, match=r"features of shape \(1, 5\), not \(1, 2048\)"):
        Inception(other)
    path = tmp_path / "linear.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with pytest.raises(ValueError, match="is a TorchScript file, but no Inception"):
        Inception(path)


def test_without_a_classifier_there_are_features_and_no_score(script):
    path = script("features.pt", Mean(2048), nn.Identity())
    features = Inception(path)(noise(2, side=16))
    assert features.shape == (2, 2048)
    with pytest.raises(ValueError, match="no weight of 1008x2048"):
        Inception(path).probabilities(features)
