"""FVD's network as the files have it: how it is asked, what of it is refused, and the distance."""

from __future__ import annotations

import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from evaluating import Clips, make_inception, make_video_net, save_scripted, seeded
from matryoshka_diffusion.metrics.frechet import Moments, frechet_distance
from matryoshka_diffusion.metrics.networks.features import Extractor, weights_hash
from matryoshka_diffusion.metrics.networks.resize import tf1_bilinear
from matryoshka_diffusion.metrics.networks.video import SIDE, VideoNet

FRAMES = 3


def clips(count=3, frames=FRAMES, side=8, channels=3, seed=0):
    shape = (count, frames, side, side, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def i3d(tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "i3d.pt"
    make_video_net(path)
    return path


# --- how a file is asked -----------------------------------------------------------------------


class Asked(nn.Module):
    """Answers with how it was asked, and with what."""

    def forward(
        self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        options = torch.tensor([float(rescale), float(resize), float(return_features)])
        corner = torch.stack([x[:, :, 0, 0, 0], x[:, :, -1, -1, -1]], dim=1).flatten(1)
        return torch.cat([options.expand(len(x), 3), corner], dim=1)


class Corner(nn.Module):
    """Answers with the first and the last pixel, and with the shape."""

    def forward(self, x: Tensor) -> Tensor:
        shape = torch.tensor([float(x.shape[2]), float(x.shape[3]), float(x.shape[4])])
        corner = torch.stack([x[:, :, 0, 0, 0], x[:, :, -1, -1, -1]], dim=1).flatten(1)
        return torch.cat([shape.expand(len(x), 3), corner], dim=1)


def test_i3d_is_given_bytes_and_told_to_scale_and_to_resize(tmp_path):
    save_scripted(Asked(), tmp_path / "asked.pt")
    net, shown = VideoNet(tmp_path / "asked.pt", FRAMES), clips()
    corners = np.concatenate([shown[:, 0, 0, 0], shown[:, -1, -1, -1]], axis=1)
    np.testing.assert_array_equal(net(shown), np.concatenate([np.ones((3, 3)), corners], axis=1))
    assert net.resize == "inside the TorchScript file to 224x224"


def test_any_other_network_is_given_224_pixels_in_minus_one_to_one(tmp_path):
    save_scripted(Corner(), tmp_path / "corner.pt")
    net, shown = VideoNet(tmp_path / "corner.pt", FRAMES), clips()
    large = tf1_bilinear(torch.from_numpy(shown[:, -1]).permute(0, 3, 1, 2).float(), SIDE)
    first = shown[:, 0, 0, 0] / 127.5 - 1.0
    last = large[:, :, -1, -1].numpy() / 127.5 - 1.0
    sizes = np.broadcast_to([FRAMES, SIDE, SIDE], (3, 3))
    np.testing.assert_allclose(net(shown), np.concatenate([sizes, first, last], 1), atol=1e-6)
    assert net.resize == "TensorFlow 1 bilinear to 224x224"
    assert (net.name, net.width, net.frames) == ("Video", 9, FRAMES)


def test_it_says_what_it_is(i3d):
    net = VideoNet(i3d, FRAMES)
    assert isinstance(net, Extractor)
    assert (net.name, net.width, net.weights) == ("I3D", 400, weights_hash(i3d))


def test_a_clips_features_do_not_depend_on_its_batch(i3d):
    net, shown = VideoNet(i3d, FRAMES), clips(6)
    alone = np.concatenate([net(shown[n : n + 1]) for n in range(6)])
    np.testing.assert_allclose(net(shown), alone, rtol=1e-6, atol=1e-7)
    assert len(np.unique(alone, axis=0)) == 6


def test_grey_clips_count_as_three_equal_channels(i3d):
    net, grey = VideoNet(i3d, FRAMES), clips(channels=1)
    np.testing.assert_array_equal(net(grey), net(grey.repeat(3, axis=4)))
    with pytest.raises(ValueError, match="1 or 3 channels, not 4"):
        net(clips(channels=4))


# --- the distance ------------------------------------------------------------------------------


class Counted(nn.Module):
    """The same clips for torchmetrics, which asks how many features there are."""

    def __init__(self, net: VideoNet) -> None:
        super().__init__()
        self.net, self.num_features = net, net.width

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.net(x.numpy())).double()


def test_the_distance_is_that_of_torchmetrics(tmp_path):
    save_scripted(seeded(lambda: Clips(8)), tmp_path / "net.pt")
    net, real = VideoNet(tmp_path / "net.pt", FRAMES), clips(40)
    made = (clips(30, seed=1) // 2).astype(np.uint8)
    metric = FrechetInceptionDistance(feature=Counted(net)).set_dtype(torch.float64)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(made), real=False)
    parts = (Moments.stream(map(net, np.array_split(side, 4))) for side in (real, made))
    found = frechet_distance(*parts)
    assert found > 1e-3
    assert found == pytest.approx(metric.compute().item(), rel=1e-4)


class Means(nn.Module):
    """The mean of each channel over space and time."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3, 4))


def test_brighter_clips_are_as_far_as_they_are_brighter(tmp_path):
    """Equal covariances: the distance is |m_a - m_b|^2, of 3 channels that rise by 2 * 51 / 255."""
    save_scripted(Means(), tmp_path / "means.pt")
    net = VideoNet(tmp_path / "means.pt", FRAMES)
    shades = np.random.default_rng(0).integers(0, 150, (20, 1, 1, 1, 3))
    dark = np.broadcast_to(shades, (20, FRAMES, 8, 8, 3)).astype(np.uint8)
    distance = frechet_distance(Moments.of(net(dark)), Moments.of(net(dark + 51)))
    assert distance == pytest.approx(3 * 0.4**2, rel=1e-4)


# --- what is refused ---------------------------------------------------------------------------


def test_what_is_no_torchscript_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file; expected a TorchScript network"):
        VideoNet(tmp_path / "none.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "state.pth")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    for name in ("state.pth", "picture.png"):
        with pytest.raises(ValueError, match=f"{name} is no TorchScript file; expected"):
            VideoNet(tmp_path / name)


def test_a_damaged_file_is_refused(i3d, tmp_path):
    with zipfile.ZipFile(tmp_path / "cut.pt", "w") as archive:
        archive.writestr("cut/code/nothing.py", "")
    with pytest.raises(ValueError, match=r"cannot load .*cut\.pt"):
        VideoNet(tmp_path / "cut.pt")


def test_a_network_of_pictures_is_refused(tmp_path):
    make_inception(tmp_path / "inception.pt")
    with pytest.raises(ValueError, match=r"inception\.pt takes no clips of \(3, 16, 224, 224\)"):
        VideoNet(tmp_path / "inception.pt")


class Map(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(3, 4))


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(0, 2, 3, 4)).expand(5, 3)


class Both(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3, 4)) / 0.0


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Map, r"features of shape \(1, 3, 3\), not \(1, d\)"),
        (One, r"features of shape \(5, 3\), not \(1, d\)"),
        (Both, r"features of shape tuple, not \(1, d\)"),
        (Nothing, "features of a clip are not finite"),
    ],
)
def test_answers_of_another_kind_are_refused(network, message, tmp_path):
    save_scripted(network(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=message):
        VideoNet(tmp_path / "net.pt", FRAMES)


def test_clips_of_another_length_are_refused(i3d):
    with pytest.raises(ValueError, match="opened for 3 frames, not 4"):
        VideoNet(i3d, FRAMES)(clips(frames=4))


def test_a_network_that_fails_on_short_clips_says_so(tmp_path):
    class Long(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.avg_pool3d(x, [8, 7, 7]).flatten(1)

    save_scripted(Long(), tmp_path / "long.pt")
    with pytest.raises(ValueError, match=r"takes no clips of \(3, 3, 224, 224\) .*RuntimeError"):
        VideoNet(tmp_path / "long.pt", FRAMES)


def test_the_deprecation_of_torchscript_is_not_shown_to_users(i3d):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VideoNet(i3d, FRAMES)
