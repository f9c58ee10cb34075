"""Evaluation: resumed, shared and streamed as if done at once; every metric; what is refused."""

from __future__ import annotations

import functools
import hashlib
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluating
from evaluating import (
    BATCHED,
    SAMPLES,
    Look,
    Words,
    looks,
    measured,
    measured_clips,
    model,
    recalling,
    source,
)
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.eval import feature_store, result
from matryoshka_diffusion.eval.evaluate import SEED, evaluate, find_networks, measure
from matryoshka_diffusion.eval.feature_store import PictureBatch, PictureSet
from matryoshka_diffusion.eval.metric import METRICS, VIDEO, parse_metrics, thousands
from matryoshka_diffusion.eval.prompts import (
    SHEET_PROMPTS,
    UNSEEN_PROMPTS,
    Conditions,
    demo_sheet,
    in_turn,
    retrieval_captions,
)
from matryoshka_diffusion.eval.reference import Reference
from matryoshka_diffusion.eval.result import Result
from matryoshka_diffusion.metrics import formulas
from matryoshka_diffusion.metrics.errors import frechet_influence, share_error
from matryoshka_diffusion.metrics.formulas import (
    Moments,
    averages,
    compare_motion,
    frechet_distance,
    level_agreement,
    motion,
    prompt_retrieval,
)
from matryoshka_diffusion.metrics.networks import VideoNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.training.averages import average_of
from ranks import end_ranks, start, start_ranks

COUNT, FRAMES, SIDE = 10, 3, 16


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of features made at once, and the results."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, measured(folder)


def files(folder: Path) -> dict[str, bytes]:
    paths = sorted(folder.rglob("*.safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def all_pictures(known: Any) -> Any:
    return np.stack([known[index].picture for index in range(len(known))])


def distance(look: Any, *sides: Any) -> float:
    return frechet_distance(*(Moments.of(look(frames(side))) for side in sides))


def frames(images: Any) -> Any:
    """All frames of all clips as pictures."""
    return images.reshape(-1, *images.shape[-3:])


# --- done in any way, the numbers are the same -------------------------------------------------


def test_streamed_numbers_are_those_of_all_samples_in_memory(whole):
    tiny, known, look = model(), source(), Look("EffNetLite0")
    conditions = in_turn(tiny.config, known).of(range(SAMPLES))
    samples = tiny.sample(**conditions, seed=SEED, batch_size=BATCHED)
    fd, agreement = whole[1]
    expected = distance(look, all_pictures(known), samples.pictures)
    assert fd.value == pytest.approx(expected, rel=1e-9)
    gaps = level_agreement(samples.levels)
    assert agreement.value == pytest.approx(gaps.mean(), rel=1e-12)
    assert agreement.error == pytest.approx(gaps.mean(axis=1).std(ddof=1) / SAMPLES**0.5)
    sides = Moments.of(look(all_pictures(known))), Moments.of(look(samples.pictures))
    influence = frechet_influence(*sides)(look(samples.pictures))
    assert fd.error == pytest.approx(influence.std(ddof=1) / SAMPLES**0.5, rel=1e-6)
    assert len(np.unique(look(samples.pictures), axis=0)) == SAMPLES


def test_a_models_clips_are_measured_as_those_in_memory(tmp_path):
    tiny, known, look = model("text", 2), evaluating.clips(), Look("EffNetLite0")
    captions = in_turn(tiny.config, known).captions(10)
    samples = tiny.sample(captions, seed=SEED, batch_size=BATCHED)
    made, real = samples.levels[-1], all_pictures(known)
    fd, by_frame, moves, agreement, retrieved = measured_clips(tmp_path)
    assert fd.value == pytest.approx(distance(look, real, made), rel=1e-9)
    assert fd.metric.startswith("FD-EffNetLite0 [frames of clips, 10 x 2; n = 20 < 4,096: ")
    assert list(by_frame.others) == ["frame 0", "frame 1"]
    assert moves.value == pytest.approx(compare_motion(motion(real), motion(made)).distance)
    assert agreement.value == pytest.approx(level_agreement(samples.levels).mean(), rel=1e-12)
    assert (retrieved.n, retrieved.frames, fd.batch_size) == (12, 2, BATCHED)
    assert fd.reference == "clips, frame stride 4, from a fixed place"


def test_killed_in_the_middle_and_repeated_gives_the_same_bits(whole, tmp_path):
    status, _ = start(evaluating.main, str(tmp_path), "10").end()
    assert status == -signal.SIGKILL
    kept = files(tmp_path)
    assert 0 < len(kept) < len(files(whole[0]))
    assert measured(tmp_path) == whole[1]
    assert files(tmp_path) == files(whole[0])
    assert kept.items() <= files(tmp_path).items()


def test_two_ranks_do_what_one_does(whole, tmp_path):
    ranks = start_ranks(2, evaluating.main, str(tmp_path / "both"))
    clips = measured_clips(tmp_path / "alone")
    end_ranks(ranks)
    assert files(tmp_path / "both") == files(whole[0]) | files(tmp_path / "alone")
    assert measured(tmp_path / "both") == whole[1]
    assert measured_clips(tmp_path / "both") == clips


# --- what is kept, and under which name --------------------------------------------------------


def test_what_is_known_is_not_made_again(tmp_path):
    networks = looks()
    measured(tmp_path, networks=networks, n=20)
    seen = networks["EffNetLite0"].seen
    measured(tmp_path, networks=networks, n=20)
    assert networks["EffNetLite0"].seen == seen
    measured(tmp_path, networks=networks, n=24)  # another batch, and nothing of the reference
    assert networks["EffNetLite0"].seen == seen + BATCHED
    calls = []
    measured(tmp_path, networks=networks, n=30, progress=lambda *now: calls.append(now))
    assert calls[-1] == ("tiny", 6, 6)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


def test_moments_of_a_reference_are_taken_once(tmp_path, monkeypatch):
    """A set that much is compared with is large; what is compared with it is not."""
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    taken, take = [], feature_store.moments_of
    monkeypatch.setattr(feature_store, "moments_of", lambda rows: taken.append(1) or take(rows))
    first = measured(tmp_path / "results")
    assert measured(tmp_path / "results") == first
    measured(tmp_path / "results", seed=9)
    assert taken == [1]


def test_a_flipped_byte_of_a_feature_is_noticed_and_mended(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    first, networks = measured(tmp_path / "results"), looks()
    for kept in ("cache/**/moments-00000040", "cache/**/00000000-*", "results/*/EffNet*/*"):
        path = min(tmp_path.glob(f"{kept}.safetensors"))
        whole = path.read_bytes()
        for place in range(0, len(whole), len(whole) // 6):
            data = bytearray(whole)
            data[place] ^= 1 << place % 8
            path.write_bytes(data)
            with pytest.warns(UserWarning, match=f"{path} is corrupt and is made again"):
                assert measured(tmp_path / "results", networks=networks) == first
            assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "changed", [{"seed": 3}, {"steps": 2}, {"sampler": "ddpm"}, {"batch_size": 8}]
)
def test_other_samples_have_a_folder_of_their_own(changed, tmp_path):
    measured(tmp_path, n=BATCHED)
    measured(tmp_path, n=BATCHED, **changed)
    about = [json.loads(path.read_text()) for path in tmp_path.glob("*/about.json")]
    assert len(about) == 2
    [name] = changed
    assert len({str({**one, **one["sampling"]}[name]) for one in about}) == 2


def test_other_weights_and_text_encoders_have_a_folder_of_their_own(tmp_path):
    trained: Any = model()
    options = {"source": source(), "n": 4, "networks": looks(), "folder": tmp_path}
    before = evaluate(trained, "fd", **options)
    with torch.no_grad():
        trained.net.levels[1].head.weight.mul_(2.0)
    after = evaluate(trained, "fd", **options)
    trained.device = torch.device("cuda", 1)
    assert trained.describe({})["device"] == "cuda"
    assert before[0].weights != after[0].weights
    assert before[0].value != after[0].value
    tiny, other = model("text"), Words()
    other.key = "other weights"
    for encoder in (Words(), other):
        evaluate(Matryoshka(tiny.net, tiny.config, encoder=encoder), "fd", **options)
    about = [json.loads(path.read_text()) for path in tmp_path.glob("*/about.json")]
    assert {one.get("encoder") for one in about} >= {"words", "other weights"}


def test_a_reference_whose_pictures_change_is_looked_at_again(tmp_path):
    array = np.full((40, 16, 16, 3), 9, np.uint8)
    before = measured(tmp_path, source=source(array=array))
    array[5] = 0
    assert measured(tmp_path, source=source(array=array))[0].value != before[0].value


# --- every metric ------------------------------------------------------------------------------

OVERLAP = ("precision", "recall", "density", "coverage")


@pytest.fixture
def few(monkeypatch):
    """Kernel distances of few samples: usually their subsets have 1,000 rows."""
    for name in ("kid", "kd"):
        monkeypatch.setitem(METRICS, name, replace(METRICS[name], least=2))
        kernel = functools.partial(formulas.kernel_distance, subsets=2, size=8)
    monkeypatch.setattr(formulas, "kernel_distance", kernel)


@pytest.mark.usefixtures("few")
def test_every_metric_is_computed_with_its_protocol_in_its_name(tmp_path):
    others = {"clips", "styles", "classes"}
    conditions = [name for name, one in METRICS.items() if not others & {*one.needs}]
    options = {"source": source(), "n": 30, "networks": looks(), "folder": tmp_path}
    number = evaluate(model("text"), conditions, **options)
    assert {one.metric.split(" [")[0] for one in number} == {
        *("FD-EffNetLite0", "FID-30", "KID", "KD-EffNetLite0", "IS"),
        *(f"{kind}-{network}" for kind in OVERLAP for network in ("Inception", "EffNetLite0")),
        *(
            "CLIP-tiny",
            "CMMD-tiny",
            "memorised-EffNetLite0",
            "prompt retrieval",
            "level disagreement",
            "one-step retrieval",
        ),
    }
    assert {one.key for one in number} == set(conditions)
    assert all(np.isfinite(one.value) for one in number)
    assert all(one.error is not None and np.isfinite(one.error) for one in number)
    assert all(one.others.keys() <= {"std", *one.errors} for one in number)
    better = {one.key for one in number if one.higher_is_better}
    retrievals = {"retrieval", "retrieval-512", "retrieval-one-step"}
    assert better == {"is", "prdc", "prdc-fd", "clip", *retrievals}
    biased = next(one for one in number if one.key == "is")
    assert biased.metric == "IS [3 samples a split < 1,008 classes: biased low]"


def test_retrieval_is_that_of_the_samples_in_memory(tmp_path):
    tiny, known = model("text"), source()
    [number] = evaluate(tiny, "retrieval", source=known, folder=tmp_path)
    conditions = retrieval_captions(tiny.config, known, 128)
    samples = tiny.sample(conditions.captions(40), seed=SEED).pictures
    known_averages, prompted = averages(all_pictures(known)), np.array(conditions.pictures)
    expected = prompt_retrieval(averages(samples), prompted, known_averages)
    assert number.value == expected.first
    assert number.others == {"among the five nearest": expected.among_five}
    error, among = (share_error(share, 40) for share in expected)
    assert (number.error, number.errors) == (error, {"among the five nearest": among})
    sentence = number.sentence()
    assert sentence.startswith("prompt retrieval of 40 samples to 40 images: 0.")
    assert f" ± {error:.2g}, among the five nearest {expected.among_five:.4g} ± " in sentence


@pytest.mark.parametrize(("shift", "expected"), [(0, 1.0), (1, 0.0)])
def test_one_step_retrieval_is_that_of_the_estimate_at_t_1(shift, expected, tmp_path):
    known = source()
    oracle = recalling(np.roll(all_pictures(known), shift, axis=0))
    options = {"source": known, "folder": tmp_path, "steps": 7, "guidance": 3.0}
    [number] = evaluate(oracle, "retrieval-one-step", **options)
    assert (number.value, number.n) == (expected, 40)
    assert oracle.net.times == [1.0] * 40, "one evaluation a caption, without guidance"
    assert number.sentence().startswith("one-step retrieval of 40 samples to 40 images: ")


def test_retrieval_over_more_captions_is_a_metric_of_its_own(tmp_path):
    many = source(600)
    numbers = evaluate(model("text"), "retrieval,retrieval-512", source=many, folder=tmp_path)
    assert [(one.key, one.n) for one in numbers] == [("retrieval", 128), ("retrieval-512", 512)]


def cosines(look: Any, array: Any, captions: Any) -> Any:
    images, texts = look(array).astype(np.float64), look.texts(captions).astype(np.float64)
    lengths = np.linalg.norm(images, axis=1) * np.linalg.norm(texts, axis=1)
    return (images * texts).sum(1) / lengths


def test_the_clip_score_is_of_each_sample_and_its_own_caption(tmp_path):
    tiny, known = model("text"), source()
    options = {"source": known, "networks": looks(), "folder": tmp_path, "batch_size": 4}
    [number] = evaluate(tiny, "clip", n=10, **options)
    captions = in_turn(tiny.config, known).captions(10)
    expected = cosines(Look("CLIP"), tiny.sample(captions, seed=SEED).pictures, captions)
    assert number.value == pytest.approx(100 * expected.mean(), rel=1e-6)


def test_weights_without_averaging_are_named_in_the_number(tmp_path):
    options = {"source": source(), "n": 4, "networks": looks(), "folder": tmp_path}
    [number] = evaluate(model(ema_decay=0.0), "fd", **options)
    assert number.metric.startswith("FD-EffNetLite0 [no EMA; n = 4 <= 6 features")
    plain = model(ema_decay=0.0)
    afterwards = Matryoshka(plain.net, average_of(plain.config, 0.08))
    averaged = [one.describe({})["averaged"] for one in (plain, model(), afterwards)]
    assert averaged == [False, True, True]


class Certain(Look):
    """Tells four classes apart without doubt."""

    def __call__(self, pictures: Any) -> Any:
        return np.eye(4)[pictures[:, 0, 0, 0]]

    def probabilities(self, features: Any) -> Any:
        return features


def set_of(images: Any, root: Path, name: str, **options: Any) -> PictureSet:
    """Images in memory as a set that is read a batch at a time."""

    def make(rows: range, progress: Any) -> PictureBatch:
        return PictureBatch([images[rows.start : rows.stop]], [(SIDE, SIDE)] * len(rows))

    length = images.shape[1] if images.ndim == 5 else None
    about = functools.partial(dict, pictures=hashlib.sha256(images.tobytes()).hexdigest())
    return PictureSet(name, len(images), SIDE, length, root, about, make, BATCHED, **options)


def test_the_inception_score_of_pictures_that_are_sorted_by_class_knows_all_classes(tmp_path):
    shades = np.arange(4, dtype=np.uint8).repeat(100)[:, None, None, None]
    images = np.broadcast_to(shades, (400, 2, 2, 3))
    networks = {"Inception": Certain("Inception")}
    [number] = measure(set_of(images, tmp_path, "sorted"), None, ["is"], networks, Result(""))
    assert number.value == pytest.approx(4.0, rel=0.05), "1 in splits of one class each"


# --- clips -------------------------------------------------------------------------------------


def clips(count=COUNT, length=FRAMES, seed=0, top=256):
    shape = (count, length, SIDE, SIDE, 3)
    return np.random.default_rng(seed).integers(0, top, shape, dtype=np.uint8)


@pytest.fixture
def compared(tmp_path):
    """Measures clips or pictures against other ones."""

    def compared(metrics: str, made: Any, real: Any, networks: Any = None, **options: Any) -> Any:
        reference = Reference("real", set_of(real, tmp_path, "real"))
        samples = set_of(made, tmp_path, "made", **options)
        networks = looks() if networks is None else networks
        return measure(samples, reference, metrics.split(","), networks, Result(of="made"))

    return compared


def test_the_distance_per_frame_is_that_of_all_frames_as_pictures(compared):
    made, real, networks = clips(), clips(14, seed=1, top=200), looks()
    [number] = compared("fd", made, real, networks)
    assert number.value == pytest.approx(distance(Look(""), real, made), rel=1e-9)
    assert number.metric == "FD-EffNetLite0 [frames of clips, 10 x 3; n = 30 < 4,096: biased high]"
    assert number.sentence().startswith(f"{number.metric} of 10 clips to 14 clips: ")
    seen = networks["EffNetLite0"].seen
    compared("fd-frames,prdc-fd", made, real, networks)
    assert networks["EffNetLite0"].seen == seen == 24 * FRAMES, "the same features"
    assert networks["EffNetLite0"].most == BATCHED, "frames in a batch, not all of a clip"
    [few] = compared("fid", clips(2), clips(5, seed=1))
    assert few.metric == "FID-6 [frames of clips, 2 x 3; n = 6 <= 6 features: rank-deficient]"


def test_the_distance_of_each_frame_shows_where_clips_go_astray(compared):
    real, look = clips(14, seed=1), Look("EffNetLite0")
    made = real.copy()
    made[:, 1] //= 2
    made[:, 2] //= 4
    [number] = compared("fd-frames", made, real)
    expected = [distance(look, real[:, t], made[:, t]) for t in range(FRAMES)]
    assert list(number.others) == ["frame 0", "frame 1", "frame 2"]
    np.testing.assert_allclose(list(number.others.values()), expected, rtol=1e-9, atol=1e-12)
    assert expected[0] < 1e-9 < expected[1] < expected[2]
    assert number.value == pytest.approx(np.mean(expected))
    assert number.metric.startswith("FD-EffNetLite0-by-frame [frames of clips, 14 x 3; n = 14 ")
    terms = [
        frechet_influence(Moments.of(look(real[:, t])), Moments.of(look(made[:, t])))(
            look(made[:, t])
        )
        for t in range(FRAMES)
    ]
    together = np.mean(terms, axis=0).std(ddof=1) / 14**0.5
    assert number.error == pytest.approx(together, rel=1e-6), "frames of a clip are not independent"


def test_the_distance_between_clips_is_that_of_their_features(compared, tmp_path):
    evaluating.make_video_net(tmp_path / "i3d.pt")
    networks = find_networks(
        ["fvd"], fvd=tmp_path / "i3d.pt", frames=FRAMES, trust_torchscript=True
    )
    made, real = clips(), clips(14, seed=1, top=200)
    [number] = compared("fvd", made, real, networks)
    net = VideoNet(tmp_path / "i3d.pt", FRAMES, trust_torchscript=True)
    expected = frechet_distance(*(Moments.of(net(side)) for side in (real, made)))
    assert number.value == pytest.approx(expected, rel=1e-6)
    assert number.metric == (
        f"FVD-10-3f [weights {net.weights[:8]}, taken for the I3D of Kinetics-400; resize inside "
        "the TorchScript file to 224x224; n = 10 <= 400 features: rank-deficient]"
    )
    assert (number.extractor, number.extractor_weights) == ("I3D", net.weights)
    other = {VIDEO: Look("Video")}
    assert compared("fvd", made, real, other)[0].metric.startswith("FD-Video-01234567-10-3f [")


def test_motion_is_that_of_the_clips_in_memory(compared):
    made, real = clips(), clips(14, seed=1)
    made[:5] = made[:5, :1]
    [number] = compared("motion", made, real)
    expected = compare_motion(motion(real), motion(made))
    assert number.value == expected.distance
    assert number.others == {"ratio": expected.ratio, "slight": 0.5, "slight real": 0.0}
    assert number.sentence().startswith("motion distance-3f of 10 clips to 14 clips: ")
    with pytest.raises(ValueError, match="none of the real clips moves"):
        compared("motion", made, real[:, :1].repeat(FRAMES, 1)[:9])


def test_each_frame_is_scored_by_the_caption_of_its_clip(tmp_path):
    made, captions = clips(), [f"clip {n}" for n in range(COUNT)]
    samples = set_of(made, tmp_path, "made", captions=captions)
    [number] = measure(samples, None, ["clip"], looks(), Result(of="made"))
    expected = cosines(Look("CLIP"), frames(made), np.repeat(captions, FRAMES).tolist())
    assert number.value == pytest.approx(100 * expected.mean(), rel=1e-6)
    assert number.metric == "CLIP-tiny [frames of clips, 10 x 3]"


def test_clips_of_the_same_pictures_in_another_order_are_other_clips(compared):
    real = clips(4, seed=1)
    turned = np.concatenate([real, real[:, ::-1]])
    options = {"captions": ["a"] * 8, "belong_to": list(range(8))}
    assert compared("retrieval", turned, turned, **options)[0].value == 1.0


@pytest.mark.usefixtures("few")
def test_clips_that_stand_still_are_as_many_samples_as_pictures(tmp_path):
    def number(folder: Path, *images: Any) -> Any:
        made, real = (set_of(one, folder, f"set {n}") for n, one in enumerate(images))
        names = ["kid", "kd", "cmmd", "prdc", "prdc-fd"]
        return measure(made, Reference("real", real), names, looks(), Result(""))

    made, real = clips(10, 1), clips(14, 1, seed=1)
    pictures = number(tmp_path / "pictures", made[:, 0], real[:, 0])
    still = number(tmp_path / "clips", made.repeat(FRAMES, 1), real.repeat(FRAMES, 1))
    assert [one.value for one in still] == [one.value for one in pictures]
    assert all("one frame of each clip" in one.metric for one in still)


def test_sets_of_one_distribution_overlap_however_alike_frames_are(compared, tmp_path):
    first, second = (  # 60 clips of 8 frames that differ by a few bytes
        clips(60, 1, seed=seed + 10, top=252) + clips(60, 8, seed=seed, top=4) for seed in (0, 1)
    )
    precision, recall, density, coverage = (one.value for one in compared("prdc-fd", first, second))
    assert min(precision, recall, coverage) > 0.7
    assert density == pytest.approx(1.0, abs=0.2)
    same = [one.value for one in compared("prdc", second, second)]
    assert same[0] == same[1] == same[3] == 1.0, "the frame of a clip is always the same"


# --- what cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "changes", "message"),
    [
        ("fdi", {}, "no metric 'fdi'.*fd"),
        ("fid50k,kid10k", {}, "10,000 samples .* 50,000"),
        ("retrieval5k", {"model": "text"}, "retrieval5k: .*omit the number"),
        ("fd", {"n": None}, "-n"),
        ("fd", {"n": 1}, "fd .*2 samples, not the 1 "),
        ("kid", {"n": 1000}, "kid .*1,000 samples, not the 40 of pictures"),
        ("clip", {}, "clip needs captions, .*tiny"),
        ("retrieval", {}, "tiny has no prompts"),
        ("retrieval", {"source": None, "model": "text"}, "retrieval needs the images"),
        ("retrieval,kid", {"model": "text"}, "kid .*1,000 samples, not the 22"),
        ("fd", {"source": None}, "imagenet50k"),
        ("fd", {"source": None, "model": "text"}, "--captions"),
        ("fd", {"source": None, "conditions": Conditions("none")}, "fd .*--ref"),
        ("fvd", {"networks": None}, "fvd.*--fvd"),
        ("fvd", {"model": "text"}, "fvd needs clips .*tiny has images"),
        ("agreement", {"model": "one level", "source": None}, "agreement needs several levels"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(metrics, changes, message, tmp_path):
    kind = changes.pop("model", "classes")
    tiny = model("nothing" if kind == "one level" else kind)
    if kind == "one level":
        tiny.net.levels, config = tiny.net.levels[:1], tiny.net.config
        tiny.net.config = tiny.model = config.model_copy(update={"levels": config.levels[:1]})
    defaults = {"source": source(), "n": SAMPLES, "networks": looks(), "folder": tmp_path}
    with pytest.raises(UsageError, match=message):
        evaluate(tiny, metrics, **(defaults | changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metrics", "made", "real", "message"),
    [
        ("motion", clips()[:, 0], clips()[:, 0], "motion needs clips .*made has images"),
        ("fd", clips(), clips(length=4), "real has clips of 4 frames, made clips of 3 frames"),
        ("fd", clips(), clips()[:, 0], "real has images, made clips of 3 frames"),
        ("fd", clips()[:, 0], clips(), "real has clips of 3 frames, made images"),
        ("motion", clips(length=1), clips(length=1), "motion .*2 frames"),
        ("prdc-fd", clips(5), clips(), "prdc-fd .*6 samples, not the 5"),
        ("fid", clips(), None, "clips of 3 frames, .*real holds only mu"),
        ("prdc", clips()[:, 0], None, "prdc needs images, .*real holds only"),
        ("fd", clips()[:, 0], None, "fd needs images, .*mu and sigma"),
    ],
)
def test_what_cannot_be_compared_is_refused(metrics, made, real, message, tmp_path):
    moments = Reference("real", None, Moments(2, np.zeros(6), np.eye(6)))
    reference = moments if real is None else Reference("real", set_of(real, tmp_path, "real"))
    with pytest.raises(UsageError, match=message):
        measure(set_of(made, tmp_path, "made"), reference, [metrics], looks(), Result(""))


def test_a_sample_with_nan_is_named_by_its_seed(tmp_path):
    broken: Any = model("nothing")
    with torch.no_grad():
        broken.net.levels[1].head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"seed 70 has NaN at level 1, .* 4 of the 4"):
        evaluate(broken, "agreement", n=8, batch_size=4, seed=70, folder=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


# --- names and lines ---------------------------------------------------------------------------


def test_names_of_metrics_are_parsed():
    assert parse_metrics("fd, FID,fd") == (("fd", "fid"), None)
    assert [thousands(count) for count in (50_000, 2_048)] == ["50K", "2048"]


def test_the_published_cmmd_says_whose_weights_it_takes(compared):
    clip = Look("CLIP")
    clip.variant = "ViT-L/14-336"
    [number] = compared("cmmd", clips()[:, 0], clips()[:, 0], {"CLIP": clip})
    assert number.metric == "CMMD [CLIP weights 01234567, taken for those of OpenAI]"


def test_results_are_lines_of_json_also_after_a_torn_one(whole, tmp_path):
    path = tmp_path / "eval" / result.FILE
    result.append(whole[1], path)
    with open(path, "a") as file:
        file.write('{"torn": ')
    result.append(whole[1][:1], path)
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    record = json.loads(lines[-1])
    assert record == {**json.loads(lines[0]), "date": record["date"]}
    assert (record["n"], record["reference_count"]) == (SAMPLES, 40)
    assert record["sampling"]["steps"] == 1
    assert record["extractor_weights"] == Look.weights
    assert {"version", "commit", "date", "weights", "seed", "precision"} <= set(record)


def test_a_number_says_where_it_is_from(whole):
    fd, agreement = whole[1]
    words = ("tiny (weights ", "classes of pictures", "EffNetLite0", "not at all", "steps 1")
    assert all(word in fd.provenance() for word in (*words, "fp32 on cpu"))
    assert "reference" not in agreement.provenance()
    assert agreement.sentence().startswith("level disagreement of 22 samples: 0.")
    both = Result(of="up", weights=f"{'ab' * 32} after {'cd' * 32}").provenance()
    assert both.startswith(f"up (weights {'ab' * 8} after {'cd' * 8})\n")


def test_the_commit_is_that_of_the_code_or_unknown(monkeypatch):
    answers = {"ls-files": "result.py", "status": " M file", "rev-parse": "abc\n"}

    def without(*_: object, **__: object) -> str:
        raise FileNotFoundError("git")

    for git, expected in ((without, None), (lambda words, **_: answers[words[1]], "abc+")):
        result.commit.cache_clear()
        monkeypatch.setattr(result.subprocess, "check_output", git)
        assert result.commit() == expected
    result.commit.cache_clear()


# --- the sheet of the demo ---------------------------------------------------------------------


def test_the_demo_sheet_has_every_level_beside_the_real_picture():
    texts = [*SHEET_PROMPTS, "a", "b", "c", "d"]
    known = source(24, captions=[(text,) for text in texts])
    page = demo_sheet(model("text"), known)
    assert page.width < 1.5 * page.height < 2.5 * page.width


def test_unseen_prompts_are_no_names_of_pictures_but_their_words_are():
    emoji = pytest.importorskip("emoji")
    names = {entry["en"].strip(":").replace("_", " ") for entry in emoji.EMOJI_DATA.values()}
    words = {word for name in names for word in name.split()}
    assert len(UNSEEN_PROMPTS) == 4
    for prompt in UNSEEN_PROMPTS:
        assert prompt not in names
        assert set(prompt.split()) <= words
