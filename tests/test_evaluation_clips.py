"""Clips measured as pictures are: frames as pictures, clips as wholes, and how much they move."""

from __future__ import annotations

import functools
import json
import shutil
from typing import Any

import numpy as np
import pytest
from PIL import Image

import evaluating
from evaluating import Look, looks, make_inception, make_run, make_video_net, make_videos
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.data.source import open_source
from matryoshka_diffusion.eval import measures, requests, results
from matryoshka_diffusion.eval import pictures as measured_pictures
from matryoshka_diffusion.eval.measures import METRICS
from matryoshka_diffusion.eval.pictures import PictureSet, Shown, shown
from matryoshka_diffusion.eval.protocols import captions_in_turn
from matryoshka_diffusion.eval.references import Reference
from matryoshka_diffusion.eval.requests import compare, request
from matryoshka_diffusion.eval.results import Result
from matryoshka_diffusion.eval.run import evaluate, find_networks, measure
from matryoshka_diffusion.eval.store import Store
from matryoshka_diffusion.metrics.agreement import level_agreement
from matryoshka_diffusion.metrics.frechet import Moments, frechet_distance
from matryoshka_diffusion.metrics.frechet import Reference as Published
from matryoshka_diffusion.metrics.motion import compare_motion, motion
from matryoshka_diffusion.metrics.networks.video import VIDEO, VideoNet
from matryoshka_diffusion.metrics.retrieval import SEED
from matryoshka_diffusion.sampling import batch_of

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
    return PictureSet(name, len(shown), SIDE, lambda: store, frames=frames, **options)


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
        f"FVD-10-3f [weights {net.weights[:8]}, taken for the I3D of Kinetics-400; resize inside "
        "the TorchScript file to 224x224; n = 10 <= 400 features: rank-deficient]"
    )
    assert (found.extractor, found.extractor_weights) == ("I3D", net.weights)


def test_motion_is_that_of_the_clips_in_memory(measured):
    made, real = clips(), clips(14, seed=1)
    made[:5] = made[:5, :1]
    [found] = measured("motion", made, real)
    expected = compare_motion(motion(real), motion(made))
    assert found.value == expected.distance
    assert found.others == {"ratio": expected.ratio, "slight": 0.5, "slight real": 0.0}
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


INDEPENDENT = "kid,kd,cmmd,prdc,prdc-fd"


def test_clips_that_stand_still_are_as_many_samples_as_pictures(tmp_path, monkeypatch):
    for name in ("kid", "kd"):  # whose subsets have 1,000 rows
        monkeypatch.setitem(METRICS, name, METRICS[name]._replace(least=2))
    few = functools.partial(measures.kernel_distance, subsets=2, size=8)
    monkeypatch.setattr(measures, "kernel_distance", few)
    made, real = clips(10, 1), clips(14, 1, seed=1)

    def found(folder: Any, *shown: Any) -> Any:
        made, real = (set_of(one, folder, f"set {n}") for n, one in enumerate(shown))
        return measure(made, Reference("real", real), INDEPENDENT.split(","), looks(), Result(""))

    pictures = found(tmp_path / "pictures", made[:, 0], real[:, 0])
    still = found(tmp_path / "clips", made.repeat(FRAMES, 1), real.repeat(FRAMES, 1))
    assert [one.value for one in still] == [one.value for one in pictures]
    assert all("one frame of each clip" in one.metric for one in still)


def nearly_still(seed):
    """60 clips of 8 frames that differ by a few bytes."""
    return clips(60, 1, seed=seed + 10, top=252) + clips(60, 8, seed=seed, top=4)


def test_sets_of_one_distribution_overlap_however_alike_frames_are(measured):
    found = measured("prdc-fd", nearly_still(0), nearly_still(1))
    precision, recall, density, coverage = (result.value for result in found)
    assert min(precision, recall, coverage) > 0.7
    assert density == pytest.approx(1.0, abs=0.2)


def test_the_frame_of_a_clip_is_always_the_same(measured):
    real = nearly_still(0)
    same = {result.metric.split("-")[0]: result.value for result in measured("prdc", real, real)}
    assert (same["precision"], same["recall"], same["coverage"]) == (1.0, 1.0, 1.0)


def test_every_metric_of_moments_takes_all_frames(measured):
    found = measured("fd,fid,is,fid-frames", clips(), clips(14, seed=1))
    assert all(np.isfinite(result.value) for result in found)
    assert all("frames of clips, 10 x 3" in result.metric for result in found)


def test_the_splits_of_the_inception_score_are_of_frames(measured):
    made = np.broadcast_to(clips(1, 20)[:, :, :1, :1], (504, 20, 1, 1, 3))  # 10,080 frames
    [found] = measured("is", made, made)
    assert found.metric == "IS [frames of clips, 504 x 20]"


# --- samples of a model ------------------------------------------------------------------------


def test_a_models_clips_are_measured_as_those_in_memory(tmp_path):
    tiny, known, look = evaluating.model("text", 2), evaluating.clips(), Look("EffNetLite0")
    samples = tiny.sample(captions_in_turn(known).captions(10), seed=SEED, batch_size=BATCHED)
    made, real = samples.levels[-1], np.stack([known[n].picture for n in range(len(known))])
    distance, by_frame, moves, agreement, retrieved = evaluating.measured_clips(tmp_path)
    expected = frechet_distance(*(Moments.of(look(pictures(side))) for side in (real, made)))
    assert made.shape == (10, 2, SIDE, SIDE, 3)
    assert distance.value == pytest.approx(expected, rel=1e-9)
    assert distance.metric.startswith("FD-EffNetLite0 [frames of clips, 10 x 2]")
    assert list(by_frame.others) == ["frame 0", "frame 1"]
    assert moves.value == pytest.approx(compare_motion(motion(real), motion(made)).distance)
    assert agreement.value == pytest.approx(level_agreement(samples.levels).mean(), rel=1e-12)
    assert (retrieved.n, retrieved.frames) == (12, 2)
    assert distance.reference == "clips, frame stride 4, from a fixed place"


def test_a_model_of_other_clips_than_its_reference_is_refused(tmp_path):
    options = {"n": 4, "networks": looks(), "folder": tmp_path}
    still: Any = evaluating.clips()
    still.array[:] = still.array[:, :1]
    with pytest.raises(ValueError, match="none of the real clips moves"):
        evaluate(evaluating.model("text", 2), "motion", source=still, **options)
    with pytest.raises(
        UsageError,
        match=r"clips, frame stride 4, from a fixed place has clips of 4 frames, tiny clips",
    ):
        evaluate(evaluating.model("text", 2), "fd", source=evaluating.clips(frames=4), **options)
    with pytest.raises(UsageError, match="fvd is about clips, and tiny has pictures"):
        evaluate(evaluating.model("text"), "fvd", source=evaluating.source(), **options)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def trained_on(tmp_path):
    """A config whose training clips are there: videos of 5 frames, every second one taken."""
    make_videos(tmp_path / "data", clips(frames=5))
    for number in range(COUNT):
        (tmp_path / "data" / f"{number:03d}.txt").write_text(f"clip {number}")
    config = evaluating.model("text", 2).config
    changes = {
        "source": "clips",
        "path": str(tmp_path / "data"),
        "frame_stride": 2,
        "clip_frames": 2,
    }
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def test_the_training_clips_are_the_reference_unless_others_are_named(trained_on, tmp_path):
    asked = request(trained_on, SIDE, 2, n=10)
    assert asked.metrics == ("retrieval", "fd", "motion")
    assert asked.source is not None
    assert (asked.source.frames, asked.source.side) == (2, SIDE)
    other = make_videos(tmp_path / "other", clips(6, frames=5, seed=1))
    named = request(trained_on, SIDE, 2, n=10, reference=other).reference
    assert named is not None
    assert named.pictures is not None
    assert named.pictures.kind == "clips of 2 frames"
    assert named.name.endswith("other, frame stride 2, from a fixed place")
    assert named.foreign


def test_other_clips_begin_where_the_runs_own_do(trained_on, tmp_path):
    shown = clips(6, frames=5, seed=1)
    other = make_videos(tmp_path / "other", shown)
    data = trained_on.data.model_copy(update={"clip": "start"})
    config = trained_on.model_copy(update={"data": data})
    named = request(config, SIDE, 2, n=10, reference=other).reference
    assert named is not None
    assert named.pictures is not None
    assert named.name.endswith("other, frame stride 2, from the start")
    named.pictures.fill([measures.MOTION])
    np.testing.assert_array_equal(named.pictures.all(measures.MOTION), motion(shown[:, [0, 2]]))


def test_the_runs_own_data_is_read_as_the_run_reads_it(trained_on, tmp_path, monkeypatch):
    opened = []

    def open_source(data: Any, side: int, frames: int | None) -> Any:
        opened.append(data.source)
        return evaluating.clips()

    monkeypatch.setattr(requests, "open_source", open_source)
    captions = tmp_path / "captions.txt"
    captions.write_text("a clip")
    data = trained_on.data.model_copy(update={"source": "fluent-emoji"})
    config = trained_on.model_copy(update={"data": data})
    for name in (data.path, str(tmp_path)):
        request(config, SIDE, 2, n=10, metrics="fd", captions=captions, reference=name)
    assert opened == ["fluent-emoji", "clips"]


@pytest.mark.parametrize("name", ["hf:pictures", "pictures.parquet"])
def test_sets_of_pictures_alone_are_no_reference_of_clips(name, trained_on):
    with pytest.raises(UsageError, match=f"{name} has pictures.* name a folder of videos"):
        request(trained_on, SIDE, 2, n=10, reference=name)


def test_clips_at_random_places_are_decoded_and_looked_through_once(trained_on, monkeypatch):
    """However many models are compared with them."""
    assert trained_on.data.clip == "random"
    looked, fingerprint = [], measured_pictures.fingerprint
    monkeypatch.setattr(
        measured_pictures, "fingerprint", lambda source: looked.append(1) or fingerprint(source)
    )
    asked = request(trained_on, SIDE, 2, n=2, metrics="motion")
    assert asked.source is not None
    assert asked.source.threads == 1, "in a file of the cache"
    assert not looked, "what cannot be measured is refused before"
    for steps in (1, 2):
        evaluate(evaluating.model("text", 2), **asked._asdict(), networks=looks(), steps=steps)
    assert looked == [1]


def test_what_is_missing_is_said_before_any_data_is_opened(trained_on, tmp_path):
    nowhere = trained_on.data.model_copy(update={"path": str(tmp_path / "nowhere")})
    config = trained_on.model_copy(update={"data": nowhere})
    with pytest.raises(UsageError, match="--fvd FILE"):
        request(config, SIDE, 2, n=10, metrics="fvd", networks=find_networks())
    with pytest.raises(UsageError, match="--fvd FILE"):
        compare("nowhere", "nowhere", ["fvd"], find_networks(), side=SIDE, frames=2)


def test_a_model_whose_level_has_fewer_frames_is_compared_with_the_first_of_each(trained_on):
    """Not with clips of neighbouring frames, which would move less."""
    levels = trained_on.model.levels
    finest = levels[1].model_copy(update={"frames": 3})
    nest = trained_on.model.model_copy(update={"levels": (levels[0], finest)})
    config = trained_on.model_copy(update={"model": nest})
    source = request(config, 8, 1, n=10).source
    assert source is not None
    assert (source.side, source.frames) == (8, 1)
    whole = open_source(config.data, SIDE, 3)
    for number in (0, 3):
        expected = whole[number].picture[:1].reshape(1, 8, 2, 8, 2, 3).mean(axis=(2, 4))
        np.testing.assert_allclose(source[number].picture, expected, atol=0.5)


def test_a_model_of_pictures_that_learns_from_videos_is_compared_with_first_frames(trained_on):
    source = request(trained_on, SIDE, None, n=10).source
    assert source is not None
    assert (source.side, source.frames) == (SIDE, None)
    assert source[0].picture.shape == (SIDE, SIDE, 3)


# --- sets of videos ----------------------------------------------------------------------------


def test_two_sets_of_videos_are_compared_samples_frame_by_frame(tmp_path):
    made, real, look = clips(frames=4), clips(14, frames=5, seed=1, top=200), Look("EffNetLite0")
    names = make_videos(tmp_path / "made", made), make_videos(tmp_path / "real", real)
    distance, moves = compare(
        *names, ["fd", "motion"], looks(), side=SIDE, frames=FRAMES, frame_stride=2
    )
    shown = real[:, ::2], made[:, :FRAMES]
    expected = frechet_distance(*(Moments.of(look(pictures(side))) for side in shown))
    assert distance.value == pytest.approx(expected, rel=1e-9)
    assert moves.value == compare_motion(*map(motion, shown)).distance
    assert distance.reference.endswith("real, frame stride 2, from a fixed place")
    assert (distance.n, distance.frames, distance.reference_count) == (10, FRAMES, 14)


def test_larger_videos_are_shrunk_and_the_number_says_so(tmp_path):
    made = make_videos(tmp_path / "made", clips())
    [found] = compare(made, made, ["motion"], looks(), side=8, frames=2, frame_stride=1)
    assert found.metric == (
        "motion distance-2f [samples cut and shrunk to 8; reference cut and shrunk to 8]"
    )


def test_sheets_that_move_are_no_samples(tmp_path):
    made = make_videos(tmp_path / "made", clips(4))
    shutil.copy(tmp_path / "made" / "000.webp", tmp_path / "made" / "grid.webp")
    [found] = compare(made, made, ["motion"], looks(), frames=FRAMES, frame_stride=1)
    assert (found.n, found.reference_count, found.value) == (4, 4, 0.0)


def test_videos_are_not_silently_compared_by_their_first_frames(tmp_path):
    videos = make_videos(tmp_path / "videos", clips(2))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, picture in enumerate(clips(8)[:, 0]):
        Image.fromarray(picture).save(pictures / f"{number}.png")
    for names in ((videos, str(pictures)), (str(pictures), videos)):
        with pytest.raises(UsageError, match=f"{videos} holds videos: give --frames"):
            compare(*names, ["fd"], looks(), side=SIDE)


def test_a_stride_without_frames_is_refused(tmp_path):
    made = make_videos(tmp_path / "made", clips(2))
    with pytest.raises(UsageError, match="is of videos: give --frames"):
        compare(made, made, ["fd"], looks(), side=SIDE, frame_stride=2)


# --- the commands ------------------------------------------------------------------------------


def test_eval_measures_a_run_of_clips(tmp_path, capsys):
    make_videos(tmp_path / "data", clips(frames=5))
    make_run(tmp_path / "run", "nothing", tmp_path / "data", frames=2)
    make_video_net(tmp_path / "i3d.pt")
    arguments = ["eval", str(tmp_path / "run"), "-n", "6", "--steps", "1", "--batch-size", "4"]
    asked = ["--metrics", "fvd,motion,agreement", "--fvd", str(tmp_path / "i3d.pt")]
    assert cli.main([*arguments, *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FVD-6-2f [weights ")
    assert "] of 6 clips to 10 clips: " in lines[0]
    assert lines[2].startswith("motion distance-2f of 6 clips to 10 clips: ")
    kept = (tmp_path / "run" / "eval" / results.FILE).read_text().splitlines()
    assert [json.loads(line)["frames"] for line in kept] == [2, 2, 2]
    for option in ("--frames", "--frame-stride"):
        assert cli.main([*arguments, option, "2"]) == 2
        assert f"{option} is of two sets: " in capsys.readouterr().err


def test_eval_of_two_sets_of_videos(tmp_path, capsys):
    made, real = (make_videos(tmp_path / name, clips(4, 5, seed=n)) for n, name in enumerate("ab"))
    options = ["--side", str(SIDE), "--frames", "3", "--frame-stride", "2", "--metrics", "motion"]
    assert cli.main(["eval", made, real, *options]) == 0
    said = capsys.readouterr().out
    assert said.startswith("motion distance-3f of 4 clips to 4 clips: ")
    assert "frame stride 2" in said


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


def test_as_many_frames_as_pictures_are_in_memory_at_a_time(tmp_path):
    [found] = evaluate(
        evaluating.model("text", 2),
        "fd",
        source=evaluating.clips(),
        n=2,
        networks=looks(),
        folder=tmp_path,
    )
    assert found.batch_size == 32
    sizes = [
        shown(one, tmp_path).open_store().batch_size
        for one in (evaluating.source(), evaluating.clips())
    ]
    assert sizes == [64, 32]
    assert batch_of(100) == 1


# --- what cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "made", "real", "message"),
    [
        ("fvd", clips()[:, 0], clips(), "fvd is about clips, and made has pictures"),
        ("motion", clips()[:, 0], clips()[:, 0], "motion is about clips, and made has pictures"),
        ("fd", clips(), clips(frames=4), r"real has clips of 4 frames, made clips of 3 frames"),
        ("fd", clips(), clips()[:, 0], "real has pictures, made clips of 3 frames: only clips"),
        ("fd", clips()[:, 0], clips(), "real has clips of 3 frames, made pictures"),
        ("kid", clips(), clips(), "kid needs at least 1,000 samples, not 10"),
        ("fvd", clips(1), clips(), "fvd needs at least 2 samples, not 1"),
        ("motion", clips(frames=1), clips(frames=1), "motion needs clips of at least 2 frames"),
        ("fd-frames", clips(1), clips(), "fd-frames needs at least 2 samples, not 1"),
        ("prdc-fd", clips(5), clips(), "prdc-fd needs at least 6 samples, not 5"),
    ],
)
def test_what_cannot_be_compared_is_refused(metrics, made, real, message, measured):
    with pytest.raises(UsageError, match=message):
        measured(metrics, made, real)


def test_moments_of_pictures_are_refused_as_their_pictures_are(tmp_path):
    moments = Published(np.zeros(6), np.eye(6))
    samples = set_of(clips(), tmp_path, "made")
    with pytest.raises(UsageError, match=r"adm\.npz has moments of pictures, made clips of 3"):
        measure(samples, Reference("adm.npz", None, moments), ["fid"], looks(), Result("made"))


def test_fvd_needs_a_network_of_clips(measured, tmp_path):
    with pytest.raises(UsageError, match="give its TorchScript file, --fvd FILE"):
        measured("fvd", clips(), clips(), find_networks())
    make_inception(tmp_path / "inception.pt")
    networks = find_networks(video=tmp_path / "inception.pt")
    with pytest.raises(ValueError, match="takes no clips of"):
        measured("fvd", clips(), clips(), networks)
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_networks(video=tmp_path / "none.pt")(VIDEO)
