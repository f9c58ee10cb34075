"""Clips measured as pictures are: frames as pictures, clips as wholes, and how much they move."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from evaluating import Look, looks, make_inception, make_video_net
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.eval.metrics import Moments, frechet_distance
from matryoshka_diffusion.eval.motion import compare_motion, motion
from matryoshka_diffusion.eval.video import VIDEO, VideoNet
from matryoshka_diffusion.evaluation import measures
from matryoshka_diffusion.evaluation.measures import METRICS
from matryoshka_diffusion.evaluation.pictures import PictureSet, Shown
from matryoshka_diffusion.evaluation.references import Reference
from matryoshka_diffusion.evaluation.results import Result
from matryoshka_diffusion.evaluation.run import find_networks, measure
from matryoshka_diffusion.evaluation.store import Store

COUNT, FRAMES, SIDE, BATCHED = 10, 3, 16, 4


def clips(count=COUNT, frames=FRAMES, seed=0, top=256):
    shape = (count, frames, SIDE, SIDE, 3)
    return np.random.default_rng(seed).integers(0, top, shape, dtype=np.uint8)


def set_of(shown: Any, root: Any, name: str, **options: Any) -> PictureSet:
    """What is in memory as a set that is read a batch at a time."""

    def make(rows: range, progress: Any) -> Shown:
        return Shown(shown[rows.start : rows.stop], [SIDE] * len(rows))

    store = Store.at(root, {"name": name}, make, BATCHED)
    frames = shown.shape[1] if shown.ndim == 5 else None
    return PictureSet(name, len(shown), SIDE, store, frames=frames, **options)


@pytest.fixture
def measured(tmp_path):
    """Measures clips against other ones."""

    def measured(metrics: str, made: Any, real: Any, networks: Any = None, **options: Any) -> Any:
        reference = Reference("real", set_of(real, tmp_path, "real"))
        samples = set_of(made, tmp_path, "made", **options)
        asked = metrics.split(",")
        return measure(samples, reference, asked, networks or looks(), Result(of="made"))

    return measured


def pictures(shown):
    """All frames of all clips."""
    return shown.reshape(-1, *shown.shape[2:])


# --- what is measured --------------------------------------------------------------------------


def test_the_distance_per_frame_is_that_of_all_frames_as_pictures(measured):
    made, real, look = clips(), clips(14, seed=1, top=200), Look("EffNetLite0")
    [found] = measured("fd", made, real)
    expected = frechet_distance(*(Moments.of(look(pictures(side))) for side in (real, made)))
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.metric == "FD-EffNetLite0 [frames of clips, 10 x 3]"
    assert found.sentence().startswith(f"{found.metric} of 10 clips to 14 clips: ")
    assert (found.n, found.frames) == (10, 3)


def test_few_clips_of_many_frames_are_counted_by_frames(measured):
    [few] = measured("fid", clips(2), clips(5, seed=1))
    assert few.metric == ("FID-6 [frames of clips, 2 x 3; n = 6 <= 6 features: rank-deficient]")


def test_the_distance_of_each_frame_shows_where_clips_go_astray(measured):
    real = clips(14, seed=1)
    made = real.copy()
    made[:, 1] //= 2
    made[:, 2] //= 4
    look = Look("EffNetLite0")
    distance, by_frame = measured("fd,fd-frames", made, real)
    expected = [
        frechet_distance(*(Moments.of(look(side[:, t])) for side in (real, made)))
        for t in range(FRAMES)
    ]
    np.testing.assert_allclose(list(by_frame.others.values()), expected, rtol=1e-9, atol=1e-12)
    assert list(by_frame.others) == ["frame 0", "frame 1", "frame 2"]
    assert expected[0] < 1e-9 < expected[1] < expected[2]
    assert by_frame.value == pytest.approx(np.mean(expected))
    assert by_frame.metric.startswith("FD-EffNetLite0-by-frame [frames of clips, 14 x 3]")
    assert distance.value > 0.0


def test_the_distance_between_clips_is_that_of_their_features(measured, tmp_path):
    make_video_net(tmp_path / "i3d.pt")
    networks = find_networks(video=tmp_path / "i3d.pt", frames=FRAMES)
    made, real = clips(), clips(14, seed=1, top=200)
    [found] = measured("fvd", made, real, networks)
    net = VideoNet(tmp_path / "i3d.pt", FRAMES)
    parts = (np.split(side, [4, 8]) for side in (real, made))
    expected = frechet_distance(*(Moments.stream(map(net, part)) for part in parts))
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.metric == (
        f"FVD-10-3f [weights {net.weights[:8]}, taken for the I3D of Kinetics-400; inside the "
        "TorchScript file to 224x224; n = 10 <= 400 features: rank-deficient]"
    )
    assert (found.extractor, found.extractor_weights) == ("I3D", net.weights)


def test_motion_is_that_of_the_clips_in_memory(measured):
    made, real = clips(), clips(14, seed=1)
    made[:5] = made[:5, :1]
    [found] = measured("motion", made, real)
    expected = compare_motion(motion(real), motion(made))
    assert found.value == expected.distance
    assert found.others == {"ratio": expected.ratio, "still": 0.5, "still real": 0.0}
    assert found.sentence().startswith("motion distance-3f of 10 clips to 14 clips: ")
    assert found.extractor == ""


def test_each_frame_is_scored_by_the_caption_of_its_clip(tmp_path):
    made, captions = clips(), [f"clip {n}" for n in range(COUNT)]
    samples, look = set_of(made, tmp_path, "made", captions=captions), Look("CLIP")
    [found] = measure(samples, None, ["clip"], looks(), Result(of="made"))
    images = look(pictures(made)).reshape(COUNT, FRAMES, -1).astype(np.float64)
    texts = look.texts(captions).astype(np.float64)[:, None]
    lengths = np.linalg.norm(images, axis=2) * np.linalg.norm(texts, axis=2)
    cosines = (images * texts).sum(axis=2) / lengths
    assert found.value == pytest.approx(100 * cosines.mean(), rel=1e-6)
    assert found.metric == "CLIP-tiny [frames of clips, 10 x 3]"


def test_the_clip_whose_every_frame_is_nearest_is_retrieved(measured):
    """Clips of the same pictures in another order are other clips."""
    real = clips(4, seed=1)
    turned = np.concatenate([real, real[:, ::-1]])
    options = {"captions": ["a"] * 8, "belong_to": list(range(8))}
    [found] = measured("retrieval", turned, turned, **options)
    assert found.value == 1.0


def test_every_metric_of_pictures_takes_frames(measured, monkeypatch):
    for name in ("kid", "kd"):  # whose subsets have 1,000 rows
        monkeypatch.setitem(METRICS, name, METRICS[name]._replace(least=2))
    few = functools.partial(measures.kernel_distance, subsets=2, size=10)
    monkeypatch.setattr(measures, "kernel_distance", few)
    names = "fd,fid,kid,is,prdc,kd,prdc-fd,cmmd,fid-frames"
    found = measured(names, clips(), clips(14, seed=1))
    assert all(np.isfinite(result.value) for result in found)
    assert all("frames of clips, 10 x 3" in result.metric for result in found)


# --- how it is measured ------------------------------------------------------------------------


def test_another_metric_of_the_same_features_looks_at_nothing_again(measured):
    networks = looks()
    for names in ("fd,motion", "fd-frames,prdc-fd"):
        measured(names, clips(), clips(14, seed=1), networks)
        assert networks("EffNetLite0").seen == 24 * FRAMES


def test_a_network_is_shown_a_batch_of_frames_and_not_all_of_a_clip(measured):
    shapes = []

    class Watched(Look):
        def __call__(self, shown: Any) -> Any:
            shapes.append(shown.shape)
            return super().__call__(shown)

    measured("fd", clips(), clips(14, seed=1), lambda name: Watched(name))
    assert max(len(shape) for shape in shapes) == 4
    assert max(shape[0] for shape in shapes) == BATCHED


# --- what cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "made", "real", "message"),
    [
        ("fvd", clips()[:, 0], clips(), "fvd is about clips, and made has pictures"),
        ("motion", clips()[:, 0], clips()[:, 0], "motion is about clips, and made has pictures"),
        ("fd", clips(), clips(frames=4), r"real has clips of 4 frames, made clips of 3 frames"),
        ("fd", clips(), clips()[:, 0], "real has pictures, made clips of 3 frames: only clips"),
        ("fd", clips()[:, 0], clips(), "real has clips of 3 frames, made pictures"),
        ("kid", clips(), clips(), "kid needs at least 1,000 samples, not 30"),
        ("fvd", clips(1), clips(), "fvd needs at least 2 samples, not 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(metrics, made, real, message, measured):
    with pytest.raises(UsageError, match=message):
        measured(metrics, made, real)


def test_fvd_needs_a_network_of_clips(measured, tmp_path):
    with pytest.raises(UsageError, match="give its TorchScript file, --fvd FILE"):
        measured("fvd", clips(), clips(), find_networks())
    make_inception(tmp_path / "inception.pt")
    networks = find_networks(video=tmp_path / "inception.pt")
    with pytest.raises(ValueError, match="takes no clips of"):
        measured("fvd", clips(), clips(), networks)
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_networks(video=tmp_path / "none.pt")(VIDEO)
