"""FID, KID, the Inception score and the CLIP score as torchmetrics computes them.

Both sides look through the same network: a small one for the distances, a small CLIP for the score.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.multimodal.clip_score import CLIPScore

from matryoshka_diffusion.metrics.frechet import Moments, frechet_distance
from matryoshka_diffusion.metrics.inception_score import inception_score
from matryoshka_diffusion.metrics.mmd import kernel_distance
from matryoshka_diffusion.metrics.networks.clip import CLIP, clip_score

AGREES = 1e-4
WIDTH = 12


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convolution = nn.Conv2d(3, WIDTH, 3, stride=2)
    net = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    return Bytes(net.eval().requires_grad_(False))


class Bytes(nn.Module):
    """A network that takes bytes."""

    num_features = WIDTH

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pictures):
        return self.net(pictures.double() / 64.0)


def pictures(count, low, high, seed):
    """Each of its own contrast, so that features vary from picture to picture."""
    generator = np.random.default_rng(seed)
    tops = generator.integers(low, high, (count, 1, 1, 3))
    return torch.from_numpy((generator.random((count, 8, 8, 3)) * tops).astype(np.uint8)).permute(
        0, 3, 1, 2
    )


@pytest.fixture(scope="module")
def sides():
    return pictures(300, 60, 255, seed=0), pictures(200, 30, 220, seed=1)


def test_frechet_distance(network, sides):
    theirs = FrechetInceptionDistance(network, input_img_size=(3, 8, 8))
    for side, real in zip(sides, (True, False), strict=True):
        for batch in side.split(64):
            theirs.update(batch, real=real)
    ours = [Moments.stream(network(batch).numpy() for batch in side.split(37)) for side in sides]
    assert frechet_distance(*ours) == pytest.approx(float(theirs.compute()), rel=AGREES)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all")
def test_kernel_distance(network, sides):
    # Their subsets are drawn otherwise, so every subset is the whole set.
    real, made = (side[:200] for side in sides)
    theirs = KernelInceptionDistance(network, subsets=2, subset_size=200)
    theirs.update(real, real=True)
    theirs.update(made, real=False)
    ours = kernel_distance(network(real).numpy(), network(made).numpy(), subsets=2, size=200)
    assert ours.mean == pytest.approx(float(theirs.compute()[0]), rel=AGREES)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save all")
def test_inception_score(network, sides, monkeypatch):
    theirs = InceptionScore(network, splits=10)
    theirs.update(sides[0])
    monkeypatch.setattr(torch, "randperm", torch.arange)  # they shuffle; ours come as they come
    mean, std = map(float, theirs.compute())
    ours = inception_score(network(sides[0]).softmax(1).numpy(), splits=10)
    assert ours.mean == pytest.approx(mean, rel=AGREES)
    # Salimans et al. divide by the number of splits, they by one less.
    assert ours.std * np.sqrt(10 / 9) == pytest.approx(std, rel=AGREES)


class Processor:
    """What CLIP is given, by transformers' own preparation of pictures."""

    def __init__(self, folder):
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        side = {"height": 32, "width": 32}
        self.pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=side)

    def __call__(self, text=None, images=None, **options):
        if images is not None:
            return self.pictures(images=[image.numpy() for image in images], return_tensors="pt")
        return self.tokenizer(text, **options)


class Embeddings(nn.Module):
    """transformers 5 returns the embeddings within a record, which torchmetrics does not know."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.config = SimpleNamespace()

    def get_image_features(self, pixels):
        return self.model.get_image_features(pixels).pooler_output

    def get_text_features(self, tokens, mask):
        return self.model.get_text_features(tokens, mask).pooler_output


def test_clip_score(tiny_clip):
    model = transformers.CLIPModel.from_pretrained(tiny_clip).eval()
    theirs = CLIPScore(lambda: (Embeddings(model), Processor(tiny_clip)))
    made = pictures(40, 60, 255, seed=2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    words = ("a blue jay", "red apple", "the red jay on the apple", "a")
    captions = [words[n % 4] for n in range(40)]
    clip = CLIP(tiny_clip)
    scores = clip_score(clip(made.permute(0, 2, 3, 1).numpy()), clip.texts(captions))
    # They cut off the mean below zero, we each score (Hessel et al. 2021): use those above.
    positive = np.flatnonzero(scores > 0.0)
    assert len(positive) >= 10
    with torch.no_grad():
        theirs.update(made[positive], [captions[n] for n in positive])
    assert scores[positive].mean() == pytest.approx(float(theirs.compute()), rel=AGREES)
