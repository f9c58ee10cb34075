"""Metrics of arrays against closed forms, against their sums as loops, and against torchmetrics."""

from __future__ import annotations

import tracemalloc
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.multimodal.clip_score import CLIPScore

from matryoshka_diffusion.metrics import formulas
from matryoshka_diffusion.metrics.formulas import (
    SLIGHT,
    Moments,
    Retrieval,
    averages,
    cmmd,
    compare_motion,
    frechet_distance,
    kernel_distance,
    level_agreement,
    motion,
    overlap,
    prompt_retrieval,
    wasserstein,
)
from matryoshka_diffusion.metrics.inception import inception_score
from matryoshka_diffusion.metrics.networks import CLIP, clip_score


def random(seed):
    return np.random.default_rng(seed)


# --- Fréchet distance --------------------------------------------------------------------------


def gaussian(mean, covariance, count=1000):
    """Moments that are exactly those of a Gaussian."""
    return Moments(count, np.asarray(mean, float), np.asarray(covariance, float) * (count - 1))


def close(a, b):
    assert a.count == b.count
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-12)
    np.testing.assert_allclose(a.scatter, b.scatter, rtol=0.0, atol=1e-12 * np.trace(b.scatter))


def test_moments_are_mean_and_unbiased_covariance():
    x, other = random(0).normal(3.0, 2.0, (50, 6)), Moments.of(random(17).normal(size=(90, 6)))
    moments, published = Moments.of(x), Moments(2, x.mean(axis=0), np.cov(x, rowvar=False))
    np.testing.assert_allclose(moments.mean, x.mean(axis=0))
    np.testing.assert_allclose(moments.covariance, np.cov(x, rowvar=False))
    expected = frechet_distance(moments, other)
    assert frechet_distance(published, other) == pytest.approx(expected, rel=1e-10)


@given(cuts=st.lists(st.integers(0, 40), max_size=6).map(sorted), order=st.permutations(range(7)))
def test_moments_do_not_depend_on_how_rows_are_cut_and_ordered(cuts, order):
    x = random(1).normal(np.arange(40)[:, None], 1.0, (40, 5))
    parts = np.split(x, cuts)
    close(Moments.stream(parts[n] for n in order if n < len(parts)), Moments.of(x))


def test_float32_features_with_a_large_mean_keep_their_covariance():
    x = (1e4 + random(4).normal(0.0, 1.0, (20_000, 2))).astype(np.float32)
    exact = np.cov(x.astype(np.float64), rowvar=False)
    np.testing.assert_allclose(Moments.stream(np.split(x, 200)).covariance, exact, rtol=1e-8)


def test_distance_of_covariances_that_commute():
    rotation, _ = np.linalg.qr(random(5).normal(size=(6, 6)))
    a, b = random(6).uniform(0.1, 3.0, (2, 6))
    one, other = (rotation * values @ rotation.T for values in (a, b))
    mean = random(7).normal(size=(2, 6))
    expected = np.square(mean[0] - mean[1]).sum() + np.square(np.sqrt(a) - np.sqrt(b)).sum()
    distance = frechet_distance(gaussian(mean[0], one), gaussian(mean[1], other))
    assert distance == pytest.approx(expected, rel=1e-10)


def test_distance_to_a_linear_image_that_does_not_commute():
    # The optimal map of N(0, S) onto N(0, A S A) is x -> A x when A is symmetric and positive, so
    # the squared distance is E|x - A x|^2 = tr((I - A) S (I - A)).
    root, factor = random(8).normal(size=(2, 5, 5))
    covariance, a = root @ root.T, factor @ factor.T + 0.1 * np.eye(5)
    assert not np.allclose(covariance @ a, a @ covariance)
    rest = np.eye(5) - a
    sides = gaussian(np.zeros(5), covariance), gaussian(np.zeros(5), a @ covariance @ a)
    assert frechet_distance(*sides) == pytest.approx(np.trace(rest @ covariance @ rest), rel=1e-9)


def test_fewer_samples_than_features_cost_no_precision():
    # A singular covariance: the usual sqrtm of the product turns complex or loses half the digits.
    x = random(11).normal(size=(10, 200))
    a = Moments.of(x)
    assert frechet_distance(a, Moments.of(x + 0.5)) == pytest.approx(200 * 0.25, rel=1e-9)
    assert 0.0 <= frechet_distance(a, a) < 1e-10
    stretched = Moments.of(3.0 * (x - a.mean) + a.mean)
    expected = 4.0 * np.trace(a.covariance)
    assert frechet_distance(a, stretched) == pytest.approx(expected, rel=1e-9)


def test_moments_and_distances_of_unfit_features_are_refused():
    two = Moments.of(random(12).normal(size=(2, 3)))
    with pytest.raises(ValueError, match="at least 2 samples"):
        frechet_distance(two, Moments.of(np.zeros((1, 3))))
    with pytest.raises(ValueError, match=r"width 3 .* width 4"):
        frechet_distance(two, Moments.of(np.zeros((2, 4))))
    with pytest.raises(ValueError, match=r"width 3 .* width 4"):
        Moments.stream([np.zeros((2, 3)), np.zeros((2, 4))])
    with pytest.raises(ValueError, match=r"row 2 .* not finite"):
        Moments.of(np.array([[0.0], [0.0], [np.inf], [0.0]]))
    for empty in (lambda: Moments.of(np.zeros((0, 3))), lambda: Moments.stream([])):
        with pytest.raises(ValueError, match="no features"):
            empty()


# --- kernel distances --------------------------------------------------------------------------


def pairs(kernel, x, y, *, itself):
    """Mean of the kernel over all pairs, one at a time."""
    values = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(y) if itself or i != j]
    return sum(values) / len(values)


def cubic(a, b):
    return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1.0) ** 3


def normal(a, b):
    a, b = (v / np.sqrt(sum(p * p for p in v)) for v in (a, b))
    return np.exp(-sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / 200.0)


def test_kernel_distance_is_the_unbiased_sum_over_pairs():
    x, y = random(0).normal(size=(9, 4)), random(1).normal(0.5, 1.5, (9, 4))
    within = pairs(cubic, x, x, itself=False) + pairs(cubic, y, y, itself=False)
    result = kernel_distance(x, y, subsets=1, size=9)
    assert result.mean == pytest.approx(within - 2.0 * pairs(cubic, x, y, itself=True), rel=1e-10)
    assert result.std == 0.0


def test_cmmd_is_a_thousand_times_the_biased_sum_over_pairs():
    x, y = random(4).normal(size=(7, 5)), random(5).normal(1.0, 2.0, (4, 5))
    both = partial(pairs, normal, itself=True)
    expected = 1000.0 * (both(x, x) + both(y, y) - 2.0 * both(x, y))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-9)
    assert cmmd(3.0 * x, y / 7.0) == pytest.approx(expected, rel=1e-9)


# --- precision, recall, density, coverage ------------------------------------------------------


def distance(a, b):
    return float(np.sqrt(((a - b) ** 2).sum()))


def radii(points, k):
    return [sorted(distance(p, q) for q in points)[k] for p in points]


def clouds(seed=0, real=40, made=30):
    return random(seed).normal(size=(real, 3)), random(seed + 1).normal(1.3, 0.9, (made, 3))


@pytest.mark.parametrize(("k", "open_k"), [(1, 5), (3, 3), (5, 1)])
def test_overlap_is_counted_ball_by_ball(k, open_k):
    def balls(points, k):
        return list(zip(points, radii(points, k), strict=True))

    def share(points, queries):
        return np.mean([any(distance(q, p) <= r for p, r in balls(points, k)) for q in queries])

    real, made = clouds()
    inside = [[distance(y, x) < r for y in made] for x, r in balls(real, open_k)]
    density = sum(map(sum, inside)) / (open_k * len(made))
    coverage = sum(map(any, inside)) / len(real)
    result = overlap(real, made, closed_k=k, open_k=open_k)
    expected = (share(real, made), share(made, real), density, coverage)
    assert result[:4] == pytest.approx(expected)
    balls = np.sum(inside, axis=0) / open_k
    assert result.density_error == pytest.approx(balls.std(ddof=1) / np.sqrt(len(made)))
    assert min(result) > 0.0
    assert max(result.precision, result.recall, result.coverage) < 1.0


def test_equal_sets_overlap_wholly_and_distant_ones_not_at_all():
    grid = np.stack(np.meshgrid([0.0, 1.0, 3.0, 7.0], [0.0, 2.0, 5.0, 11.0]), -1).reshape(-1, 2)
    points = grid + np.arange(16)[:, None] / 64.0  # no ties, and exact in float64
    assert overlap(points, points)[:4] == (1.0, 1.0, 1.0, 1.0)
    assert overlap(points, points + 1000.0) == (0.0, 0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("metric", [overlap, cmmd])
def test_all_pairs_never_lie_in_memory_and_blocks_change_nothing(metric, monkeypatch):
    n = 1200
    real, made = random(9).normal(size=(2, n, 2))
    whole = metric(real, made)
    monkeypatch.setattr(formulas, "BLOCK_PAIRS", 10 * n)
    tracemalloc.start()
    result = metric(real, made)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * n * n / 10
    assert result == (pytest.approx(whole, rel=1e-11) if metric is cmmd else whole)


@pytest.mark.parametrize(
    ("metric", "least"),
    [
        (kernel_distance, 1000),
        (partial(kernel_distance, size=10), 10),
        (cmmd, 1),
        (overlap, 6),
    ],
)
def test_features_that_cannot_be_compared_are_refused(metric, least):
    rows = random(8).normal(size=(1000, 2))
    with pytest.raises(ValueError, match=f"at least {least:,} samples"):
        metric(rows, rows[: least - 1])
    with pytest.raises(ValueError, match=r"width 2 .* width 1"):
        metric(rows, rows[:, :1])
    with pytest.raises(ValueError, match=r"row 3 .* not finite"):
        metric(rows, np.where(np.arange(1000)[:, None] == 3, np.nan, rows))
    if metric is cmmd:
        with pytest.raises(ValueError, match=r"row 3 .* is zero"):
            metric(rows, np.where(np.arange(1000)[:, None] == 3, 0.0, rows))


# --- Inception score and CLIP score ------------------------------------------------------------


def one_hot(labels, classes):
    return np.eye(classes)[labels]


def test_inception_score_is_the_divergence_written_as_loops():
    rows = random(1).dirichlet(np.full(5, 0.3), size=23)
    scores = []
    for first, last in ((0, 7), (7, 15), (15, 23)):  # 23 * 1 // 3 and 23 * 2 // 3
        part = rows[first:last]
        mean = part.mean(axis=0)
        terms = [p * np.log(p / q) for row in part for p, q in zip(row, mean, strict=True)]
        scores.append(np.exp(sum(terms) / len(part)))
    expected = (np.mean(scores), np.std(scores))
    assert inception_score(rows, splits=3) == pytest.approx(expected, rel=1e-10)


def test_unfit_probabilities_are_refused():
    with pytest.raises(ValueError, match="at least 10 samples"):
        inception_score(one_hot(np.zeros(9, int), 3))
    with pytest.raises(ValueError, match=r"row 0 .*not finite"):
        inception_score(np.full((12, 3), np.nan))


def test_clip_score_is_a_hundred_times_the_cosine_where_that_is_positive():
    images = np.array([[3.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    texts = np.array([[5.0, 0.0], [0.0, 2.0], [-1.0, 0.1]])
    expected = [100.0, 100.0 / np.sqrt(2.0), 0.0]
    np.testing.assert_allclose(clip_score(images, texts), expected, rtol=1e-12)
    for bad_images, bad_texts, message in (
        (images[:0], texts[:0], "at least 1 samples"),
        (images * [[1.0], [0.0], [1.0]], texts, "row 1 .* zero"),
    ):
        with pytest.raises(ValueError, match=message):
            clip_score(bad_images, bad_texts)


# --- agreement of levels -----------------------------------------------------------------------


def pictures(side, count=3, seed=0):
    return random(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def averaged(fine, side):
    count, old, _, channels = fine.shape
    window = old // side
    return fine.reshape(count, side, window, side, window, channels).mean(axis=(2, 4))


def test_levels_of_one_picture_agree_up_to_the_rounding():
    fine = pictures(16)
    levels = [averaged(fine, side).round().astype(np.uint8) for side in (4, 8)]
    gaps = level_agreement([*levels, fine])
    assert gaps.shape == (3, 2)
    assert 0.0 < gaps.max() <= 0.5 / 255
    assert level_agreement([fine]).shape == (3, 0)


def test_the_levels_of_a_clip_agree_in_space_and_time():
    """D^r in time is the first frame of every so many; a picture is the first of all."""
    clips = pictures(16, count=12).reshape(3, 4, 16, 16, 3)
    halved = averaged(clips[:, ::2].reshape(6, 16, 16, 3), 8).reshape(3, 2, 8, 8, 3)
    levels = [level.round().astype(np.uint8) for level in (halved[:, 0], halved)]
    assert level_agreement([*levels, clips]).max() <= 0.5 / 255
    other = averaged(clips[:, 1], 8).round().astype(np.uint8)
    assert level_agreement([other, clips]).min() > 0.01


def test_each_picture_and_level_has_its_own_difference():
    coarse, middle, fine = (np.full((2, side, side, 1), 100, np.uint8) for side in (2, 4, 8))
    coarse[1] += 51
    middle[0, :2] -= 51
    gaps = level_agreement([coarse, middle, fine])
    np.testing.assert_allclose(gaps, [[0.0, 0.1], [0.2, 0.0]], atol=1e-12)
    coarse, fine = pictures(4, seed=1), pictures(12, seed=2)
    expected = np.abs(averaged(fine / 255, 4) - coarse / 255).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(level_agreement([coarse, fine])[:, 0], expected, rtol=1e-12)


def test_levels_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"8x8 .* 3x3"):
        level_agreement([pictures(3), pictures(8)])


# --- motion ------------------------------------------------------------------------------------

NUMBERS = st.lists(st.floats(0.0, 2.0), min_size=1, max_size=8).map(np.array)


def clip_of(frames):
    """One clip (f, h, w, 1) of the frames (f, h, w)."""
    return np.asarray(frames, np.uint8)[None, ..., None]


def test_still_clips_do_not_move_and_black_and_white_in_turn_moves_most():
    assert motion(clip_of([random(0).integers(0, 256, (8, 8))] * 5)) == [0.0]
    assert motion(clip_of([np.full((2, 2), 255 * (t % 2)) for t in range(4)])) == [2.0]
    eye = np.zeros((2, 64, 64), np.uint8)
    eye[1, :2, :2] = 255
    assert 0.0 < motion(clip_of(eye))[0] < SLIGHT, "an eye that blinks is not still"


def test_each_clip_has_its_own_motion_however_they_are_batched():
    many = random(1).integers(0, 256, (6, 4, 8, 8, 3), dtype=np.uint8)
    x = many / 127.5 - 1.0
    expected = np.abs(x[:, 1:] - x[:, :-1]).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(motion(many), expected, rtol=1e-12)
    alone = np.concatenate([motion(many[n : n + 1]) for n in range(6)])
    np.testing.assert_array_equal(motion(many), alone)


@given(a=NUMBERS, b=NUMBERS)
def test_wasserstein_is_the_cost_of_moving_sorted_numbers(a, b):
    """Each number as often as the other side is long: then the i-th smallest go to each other."""
    paired = np.sort(np.repeat(a, len(b))), np.sort(np.repeat(b, len(a)))
    assert wasserstein(a, b) == pytest.approx(np.abs(paired[0] - paired[1]).mean(), abs=1e-12)
    assert wasserstein(a, a + 0.3) == pytest.approx(0.3, rel=1e-12)


def test_motions_of_two_sets_are_compared():
    real = np.array([0.0, 0.2, SLIGHT / 2, 0.4])
    assert compare_motion(real, real / 2)[1:] == (pytest.approx(0.5), 0.5, 0.5)
    assert compare_motion(real, np.zeros(10)) == (pytest.approx(real.mean()), 0.0, 1.0, 0.5)
    with pytest.raises(ValueError, match=r"none .* moves"):
        compare_motion(np.zeros(3), real)


# --- prompt retrieval --------------------------------------------------------------------------


def flat(*values, side=16, channels=3):
    """Pictures of one grey value each."""
    return np.stack([np.full((side, side, channels), value, np.uint8) for value in values])


def retrieved(samples, prompted, training):
    return prompt_retrieval(averages(samples), np.array(prompted, np.int64), averages(training))


@pytest.mark.parametrize(
    ("samples", "prompted", "training", "expected"),
    [
        # The five nearest to 1 are 0, 20, 40, 60, 80 in this order.
        ((1, 1, 1, 1), (0, 1, 4, 5), (0, 20, 40, 60, 80, 100, 120), (0.25, 0.75)),
        ((20, 20), (0, 1), (10, 30), (0.5, 1.0)),  # of equal distances the lower index is nearer
        ((12, 12), (2, 0), (200, 10, 10), (0.5, 1.0)),  # a twin of the prompted picture is a hit
        ((10, 10), (6, 7), (*[10] * 7, 200), (0.5, 0.5)),  # six twins are as good as one
        ((0, 99), (1, 1), (0, 100), (0.5, 1.0)),  # fewer than five
    ],
)
def test_shares_of_first_places_and_of_places_among_five(samples, prompted, training, expected):
    result = retrieved(flat(*samples), prompted, flat(*training))
    assert tuple(result) == expected


def test_many_samples_are_retrieved_a_block_at_a_time(monkeypatch):
    training = random(3).normal(size=(2000, 4))
    prompted = random(4).integers(0, 2000, 1000)
    samples = training[prompted] + random(5).normal(0.0, 0.2, (1000, 4))
    order = np.argsort(formulas.squared_distances(samples, training), axis=1)
    hits = order[:, :5] == prompted[:, None]
    monkeypatch.setattr(formulas, "BLOCK_PAIRS", 20 * 2000)
    tracemalloc.start()
    result = prompt_retrieval(samples, prompted, training)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result == (hits[:, 0].mean(), hits.any(axis=1).mean())
    assert 0.1 < result.first < result.among_five < 0.99
    assert peak < 8 * 1000 * 2000 / 10


def test_perfect_samples_are_all_retrieved_and_compared_at_16_pixels():
    training = random(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    chosen = [3, 49, 0, 17]
    assert retrieved(training[chosen], chosen, training) == Retrieval(1.0, 1.0)
    fine = np.zeros((2, 64, 64, 1), np.uint8)
    fine[0, ::4] = 80  # the same area averages from another arrangement of pixels
    fine[1, 1::4] = 80
    training = np.concatenate([flat(25, side=64, channels=1), fine])
    assert retrieved(flat(20, channels=1), [2], training).first == 1.0
    assert retrieved(flat(24, channels=1), [0], training).first == 1.0


def test_sides_that_16_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="side 24"):
        averages(flat(0, side=24))


# --- torchmetrics, through the same small networks ---------------------------------------------

WIDTH, AGREES = 12, 1e-4


class Bytes(nn.Module):
    """A network that takes bytes."""

    num_features = WIDTH

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            convolution = nn.Conv2d(3, WIDTH, 3, stride=2)
        net = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
        self.net = net.eval().requires_grad_(False)

    def forward(self, images):
        return self.net(images.double() / 64.0)


def contrasts(count, low, high, seed):
    """Pictures of their own contrast each, so that features vary from picture to picture."""
    tops = random(seed).integers(low, high, (count, 1, 1, 3))
    images = (random(seed + 9).random((count, 8, 8, 3)) * tops).astype(np.uint8)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def network():
    return Bytes()


@pytest.fixture(scope="module")
def sides():
    return contrasts(300, 60, 255, seed=0), contrasts(200, 30, 220, seed=1)


def test_frechet_distance_is_that_of_torchmetrics(network, sides):
    theirs = FrechetInceptionDistance(network, input_img_size=(3, 8, 8))
    for side, real in zip(sides, (True, False), strict=True):
        for batch in side.split(64):
            theirs.update(batch, real=real)
    ours = [Moments.stream(network(batch).numpy() for batch in side.split(37)) for side in sides]
    assert frechet_distance(*ours) == pytest.approx(float(theirs.compute()), rel=AGREES)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all")
def test_kernel_distance_is_that_of_torchmetrics(network, sides):
    # Their subsets are drawn otherwise, so every subset is the whole set.
    real, made = (side[:200] for side in sides)
    theirs = KernelInceptionDistance(network, subsets=2, subset_size=200)
    theirs.update(real, real=True)
    theirs.update(made, real=False)
    ours = kernel_distance(network(real).numpy(), network(made).numpy(), subsets=2, size=200)
    assert ours.mean == pytest.approx(float(theirs.compute()[0]), rel=AGREES)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save all")
def test_inception_score_is_that_of_torchmetrics(network, sides, monkeypatch):
    theirs = InceptionScore(network, splits=10)
    theirs.update(sides[0])
    monkeypatch.setattr(torch, "randperm", torch.arange)  # they shuffle; ours come as they come
    mean, std = map(float, theirs.compute())
    ours = inception_score(network(sides[0]).softmax(1).numpy(), splits=10)
    assert ours.mean == pytest.approx(mean, rel=AGREES)
    # Salimans et al. divide by the number of splits, they by one less.
    assert ours.std * np.sqrt(10 / 9) == pytest.approx(std, rel=AGREES)


class Embeddings(nn.Module):
    """transformers 5 returns the embeddings within a record, which torchmetrics does not know."""

    def __init__(self, folder):
        super().__init__()
        self.model: Any = transformers.CLIPModel.from_pretrained(folder).eval()
        self.config = SimpleNamespace()

    def get_image_features(self, pixels):
        return self.model.get_image_features(pixels).pooler_output

    def get_text_features(self, tokens, mask):
        return self.model.get_text_features(tokens, mask).pooler_output


def test_clip_score_is_that_of_torchmetrics(tiny_clip):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_clip)
    prepare = transformers.CLIPImageProcessorPil(size=32, crop_size=32)

    def processor(text=None, images=None, **options):
        if images is None:
            return tokenizer(text, **options)
        return prepare(images=[image.numpy() for image in images], return_tensors="pt")

    theirs = CLIPScore(lambda: (Embeddings(tiny_clip), processor))
    made = contrasts(40, 60, 255, seed=2).repeat_interleave(4, 2).repeat_interleave(4, 3)
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
