"""The classifier of a data set: what it learns, what it judges, and that it is trained once."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from evaluating import Look, model, source
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.eval import classes
from matryoshka_diffusion.eval.evaluate import compare, evaluate
from matryoshka_diffusion.eval.prompts import random_labels
from matryoshka_diffusion.eval.reference import reference_of
from matryoshka_diffusion.metrics import classifier
from matryoshka_diffusion.metrics.classifier import Classifier
from matryoshka_diffusion.metrics.errors import share_error
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.pyramid import down_sample, resolution_of
from matryoshka_diffusion.training.distributed import ALONE

COUNT, SIDE = 120, 16


def bars(labels: Any, seed: int = 0) -> Any:
    """Stripes in any colour and place: across in class 0, upright in class 1."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 40, (len(labels), SIDE, SIDE, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        lines = image if label == 0 else image.swapaxes(0, 1)
        lines[random.integers(4) :: 4] += random.integers(90, 200, 3, dtype=np.uint8)
    return images


def shapes(seed: int = 0, **changes: Any) -> Any:
    """A source of both classes in turn."""
    return source(COUNT, array=bars([i % 2 for i in range(COUNT)], seed), **changes)


def find(known: Any, progress: Any = None) -> Any:
    return classes.find_classifier(known, reference_of(known, model().config.data), ALONE, progress)


class Painter(torch.nn.Module):
    """A network whose estimate of x has the shape that `draws` makes of the class."""

    def __init__(self, draws: Any) -> None:
        super().__init__()
        self.draws = draws

    def forward(self, z: Any, t: Any, cond: Any) -> Any:
        images = bars(self.draws(cond.labels.numpy()), seed=1)
        x = torch.from_numpy(images).movedim(-1, 1) / 127.5 - 1.0
        return tuple(down_sample(x, resolution_of(z_r)) for z_r in z)


def painted(draws: Any, metrics: str, folder: Any) -> Any:
    tiny = model()
    process = tiny.config.process.model_copy(update={"prediction": "x0"})
    painter: Any = Matryoshka(tiny.net, tiny.config.model_copy(update={"process": process}))
    painter.net = Painter(draws)
    options: Any = {"source": shapes(), "n": 30, "folder": folder}
    return evaluate(painter, metrics, networks={"EffNetLite0": Look("EffNetLite0")}, **options)


@pytest.mark.parametrize(("draws", "expected"), [(np.array, 1.0), (lambda label: 1 - label, 0.0)])
def test_samples_are_counted_by_the_class_that_they_were_asked_for(draws, expected, tmp_path):
    number, other = painted(draws, "class-accuracy,fd", tmp_path)
    assert number.value == pytest.approx(expected, abs=0.1)
    assert number.error == pytest.approx(share_error(number.value, 30))
    known = find(shapes())
    assert number.others == {f"of {known.tested} real images": known.accuracy}
    assert (number.extractor, number.extractor_weights) == ("Classifier", known.weights)
    assert other.extractor == "EffNetLite0", "the other networks are still there"


def test_samples_of_one_shape_alone_are_farther_away(tmp_path):
    [both] = painted(np.array, "fd-classes", tmp_path / "both")
    [alone] = painted(np.zeros_like, "fd-classes", tmp_path / "alone")
    assert both.metric == "FD-Classifier [n = 30 <= 128 features: rank-deficient]"
    assert 0.0 < both.value < 0.3 * alone.value


def test_it_knows_new_images_and_is_trained_once(monkeypatch):
    calls = []
    known = find(shapes(5), lambda *now: calls.append(now))
    assert calls[-1][0] == "classifier of pictures"
    assert calls[-1][1] == calls[-1][2] >= 40 * 0.8 * COUNT
    labels = np.array([0, 1, 1, 0] * 25)
    assert (known.classes(known(bars(labels, seed=3))) == labels).mean() > 0.95
    assert known.accuracy > 0.9
    assert 0 < known.tested < 0.3 * COUNT
    monkeypatch.setattr(classifier, "train", None)
    assert find(shapes(5)).weights == known.weights
    with pytest.raises(TypeError):
        find(shapes(5, labels=[0] * COUNT))


def test_a_damaged_classifier_is_made_again_and_is_the_same():
    known = find(shapes())
    paths = classes.cache_folder("classifiers").iterdir()
    (path,) = (path for path in paths if Classifier(path).weights == known.weights)
    whole = path.read_bytes()
    for place in (3, len(whole) // 2):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        with pytest.warns(UserWarning, match=f"{path} is corrupt and is made again"):
            assert find(shapes()).weights == known.weights
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find(shapes())


def test_the_images_that_it_is_tested_with_teach_it_nothing(tmp_path):
    labels = np.array([0, 1] * 20)
    x, tested = classifier.prepare(bars(labels)), np.arange(5)
    replaced = x.clone()
    replaced[:5] = 0
    for name, images in (("a", x), ("b", replaced)):
        classifier.train(tmp_path / name, images, labels, 2, tested)
    first, second = (Classifier(tmp_path / name) for name in "ab")
    images = bars([0, 1], seed=4)
    np.testing.assert_array_equal(first(images), second(images))


def test_a_frame_of_each_clip_trains_it():
    clips = np.stack([bars([i % 2 for i in range(COUNT)], seed=seed) for seed in (0, 1)], axis=1)
    known = find(source(COUNT, array=clips))
    assert known.accuracy > 0.8


@pytest.mark.parametrize(
    ("kind", "known", "message"),
    [
        ("classes", source(classes=(), labels=None), "pictures does not have: omit"),
        ("nothing", source(), "class-accuracy needs samples of classes, .*tiny"),
        ("classes", source(1), "1 images are too few"),
    ],
)
def test_what_has_no_classes_is_refused(kind, known, message, tmp_path):
    rule = random_labels(2) if kind == "classes" else None
    options: Any = {"n": 8, "conditions": rule, "folder": tmp_path}
    with pytest.raises(UsageError, match=message):
        evaluate(model(kind), "class-accuracy", source=known, **options)
    assert not list(tmp_path.iterdir())


def test_two_sets_of_images_have_no_classifier(tmp_path):
    path = str(tmp_path / "a.npz")
    np.savez(path, bars([0, 1] * 4))
    with pytest.raises(UsageError, match="fd-classes needs samples of classes"):
        compare(path, path, ["fd-classes"], {})
