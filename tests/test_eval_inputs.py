"""The words of `mdm eval` and `mdm compare`: captions, references, protocols, two sets."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evaluating
from evaluating import (
    WIDTH,
    Look,
    looks,
    make_inception,
    make_run,
    make_videos,
    model,
    source,
)
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.data.source import open_source
from matryoshka_diffusion.draw.grid import save_png
from matryoshka_diffusion.eval import result
from matryoshka_diffusion.eval.evaluate import compare, evaluate, find_networks, plan
from matryoshka_diffusion.eval.metric import MOTION
from matryoshka_diffusion.eval.prompts import (
    captions_of_file,
    in_turn,
    random_labels,
    read_captions,
    retrieval_captions,
)
from matryoshka_diffusion.eval.reference import open_npz
from matryoshka_diffusion.metrics.formulas import Moments, compare_motion, frechet_distance, motion
from matryoshka_diffusion.metrics.networks import weights_hash
from picturing import encode, write_tar

SIDE, FRAMES = 16, 3


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setattr("matryoshka_diffusion.eval.reference.WIDTH", WIDTH)


def pictures(count=8, side=SIDE, seed=0):
    shape = (count, side, side, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def clips(count=10, frames=FRAMES, seed=0, top=256):
    shape = (count, frames, SIDE, SIDE, 3)
    return np.random.default_rng(seed).integers(0, top, shape, dtype=np.uint8)


def folder_of(path, images):
    for number, picture in enumerate(images):
        save_png(picture, path / f"{number:03d}.png", None)
    return str(path)


def moments(seed=0):
    rows = np.random.default_rng(seed).normal(size=(40, WIDTH))
    return {"mu": rows.mean(axis=0), "sigma": np.cov(rows, rowvar=False)}


def distance(*sides):
    look = Look("EffNetLite0")
    rows = (look(side.reshape(-1, *side.shape[-3:])) for side in sides)
    return pytest.approx(frechet_distance(*map(Moments.of, rows)), rel=1e-9)


# --- captions and classes ----------------------------------------------------------------------

COCO = {
    "images": [{"id": 7}],
    "annotations": [
        {"image_id": 7, "id": 3, "caption": "the third"},
        {"image_id": 7, "id": 1, "caption": " the \n first "},
        {"image_id": 8, "id": 2, "caption": "the second"},
    ],
}
LINES = '{"text": "the first"}\n{"caption": ["the second", "2"]}\n{"text": "the third"}'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions_val2014.json", json.dumps(COCO)),
        ("a.txt", "the first\n\nthe second\nthe third\n"),
        ("a.jsonl", LINES),
        ("a.csv", "id,caption\n1,the first\n2,the second\n3,the third\n"),
    ],
)
def test_captions_of_a_file_are_read_in_its_order(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert read_captions(tmp_path / name) == ["the first", "the second", "the third"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none.txt", None, "FileNotFoundError"),
        ("a.json", b"{}", "KeyError"),
        ("a.json", b"[1", "COCO annotations"),
        ("a.jsonl", b'{"text": ', "jsonl"),
        ("a.csv", b"id,name\n1,x\n", "none"),
        ("a.csv", b"id,caption\n1,red, or green\n", "line 2: it has 3 fields"),
        ("a.txt", b"\n \n", "none"),
        ("a.txt", b"caf\xe9\n", "not UTF-8"),
    ],
)
def test_files_without_captions_are_refused(name, data, message, tmp_path):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=f"{name}.*{message}"):
        read_captions(tmp_path / name)


def test_the_rules_of_captions_never_change(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"caption {i}" for i in range(50)))
    rule = captions_of_file(tmp_path / "a.txt")
    captions = rule.captions(50)
    assert rule.captions(20) == captions[:20], "fewer samples have the first of more"
    assert sorted(captions) == sorted(f"caption {i}" for i in range(50))
    assert captions[:3] == ["caption 5", "caption 0", "caption 36"]
    config, known = model("text").config, source()
    captions = in_turn(config, known).captions(80)
    assert captions[40:] == captions[:40]
    assert sorted(captions[:40]) == sorted(f"picture {i}" for i in range(40))
    assert captions[:3] == ["picture 26", "picture 3", "picture 27"]
    retrieved, fewer = (retrieval_captions(config, known, most) for most in (128, 9))
    assert (retrieved.limit, fewer.limit) == (40, 9)
    assert retrieved.captions(3) == [f"picture {i}" for i in retrieved.pictures[:3]]
    assert set(fewer.pictures) < set(retrieved.pictures)


def test_random_classes_are_uniform_and_belong_to_the_sample():
    rule = random_labels(4)
    labels = [rule.of(range(i, i + 1))["classes"][0] for i in range(4000)]
    assert rule.of(range(10, 13)) == {"classes": labels[10:13]}
    assert np.bincount(labels).min() > 900
    assert random_labels(5).identity != rule.identity


def test_few_samples_of_a_source_that_is_sorted_by_class_have_every_class():
    def rule(*labels):
        return in_turn(model().config, source(100, labels=np.repeat(labels, 50).tolist()))

    labels = rule(0, 1).of(range(200))["classes"]
    assert 3 <= sum(labels[:20]) <= 17
    assert sum(labels[:100]) == 50
    assert labels[100:] == labels[:100]
    assert rule(0, 1).of(range(7, 12)) == {"classes": labels[7:12]}
    assert rule(0, 1).identity == rule(0, 1).identity != rule(1, 0).identity


@pytest.mark.parametrize(
    ("kind", "metric", "message"),
    [
        ("text", "fd", r"pictures has no captions.*--captions"),
        ("text", "retrieval", r"pictures has no captions.*NAME\.txt"),
        ("classes", "fd", "pictures has no classes.*imagenet50k"),
    ],
)
def test_a_source_without_captions_or_classes_is_refused_with_its_name(kind, metric, message):
    bare = source(captions=None, labels=None, classes=())
    with pytest.raises(UsageError, match=message):
        evaluate(model(kind), metric, source=bare, n=8, networks=looks())


# --- references --------------------------------------------------------------------------------


def test_published_moments_are_used_as_they_are(tmp_path):
    np.savez(tmp_path / "adm.npz", **moments())
    reference = open_npz(tmp_path / "adm.npz")
    options = {"source": source(), "n": 8, "networks": looks(WIDTH), "folder": tmp_path / "eval"}
    [number] = evaluate(model(), "fid", reference=reference, **options)
    tiny, look = model(), Look("Inception", WIDTH)
    samples = tiny.sample(**in_turn(tiny.config, source()).of(range(8)), seed=1_000_000)
    real = Moments.of(np.random.default_rng(0).normal(size=(40, WIDTH)))
    expected = frechet_distance(real, Moments.of(look(samples.pictures)))
    assert number.value == pytest.approx(expected, rel=1e-6)
    assert number.metric.startswith("FID-8 [n = 8 <= 24 features: rank-deficient; reference of")
    assert number.sentence().startswith(f"{number.metric} of 8 samples to adm.npz: ")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pictures_of_an_npz_are_read_a_batch_at_a_time(save, tmp_path):
    real, made = pictures(100), pictures(90, seed=1)
    save(tmp_path / "real.npz", arr_0=real, arr_1=np.zeros(100, np.int64))
    save(tmp_path / "made.npz", made)
    first, second = (str(tmp_path / name) for name in ("made.npz", "real.npz"))
    [number] = compare(first, second, ["fd"], looks())
    assert number.value == distance(real, made)
    assert (number.n, number.reference_count, number.weights) == (90, 100, "")
    assert number.metric == "FD-EffNetLite0 [n = 90 < 4,096: biased high]"
    again = open_npz(tmp_path / "real.npz").pictures
    assert again is not None
    for rows in (range(64, 100), range(5)):
        images = again.make(rows, lambda done, total: None).pictures
        np.testing.assert_array_equal(images, real[rows.start : rows.stop])
    data = bytearray((tmp_path / "real.npz").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(64)
    (tmp_path / "real.npz").write_bytes(data)
    damaged = open_npz(tmp_path / "real.npz").pictures
    assert damaged is not None
    with pytest.raises(UsageError, match=r"real\.npz: arr_0 is damaged"):
        damaged.make(range(100), lambda done, total: None)


def test_moments_win_over_the_pictures_beside_them(tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=pictures(20), **moments())
    np.savez(tmp_path / "made.npz", pictures(20, seed=1))
    first, second = (str(tmp_path / name) for name in ("made.npz", "real.npz"))
    number = compare(first, second, ["fid", "prdc"], looks(WIDTH))
    assert number[0].reference_count is None
    assert {one.reference_count for one in number[1:]} == {20}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "No such file"),
        (b"PK no zip", "zip"),
        (pictures(), "zip"),  # an .npy by another name
        ({}, "holds nothing"),
        ({"mean": np.zeros(3)}, "holds mean"),
        ({"mu": np.zeros(WIDTH)}, "sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "24 features"),
        ({"mu": np.full(WIDTH, np.nan), "sigma": np.eye(WIDTH)}, "finite"),
        ({"mu": np.zeros(WIDTH), "sigma": np.triu(np.ones((WIDTH, WIDTH)))}, "not symmetric"),
        ({"arr_0": pictures().astype(np.float32)}, "arr_0 is float32"),
        ({"arr_0": pictures()[:, :8]}, "square images"),
        ({"arr_0": np.array([{}], dtype=object)}, "arr_0 is object"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.eye(2)}, "mu is object"),
        ({"mu": np.zeros(0), "sigma": np.zeros(10**7)}, "mu is float64"),
        ({"mu": np.zeros(WIDTH), "sigma": np.zeros(10**7)}, "sigma is float64"),
    ],
)
def test_an_npz_that_is_something_else_is_refused(arrays, message, tmp_path):
    path = tmp_path / "a.npz"
    if isinstance(arrays, dict):
        np.savez_compressed(path, **arrays)
    elif isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif arrays is not None:
        with open(path, "wb") as file:
            np.save(file, arrays)
    del arrays
    tracemalloc.start()
    with pytest.raises(UsageError, match=f"a.npz.*{message}"):
        open_npz(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22, "nothing of another shape is unpacked"


def test_pictures_of_another_size_are_flagged_or_refused(tmp_path):
    def made(name, *images):
        return folder_of(tmp_path / name, [one for part in images for one in part])

    def flags(first, second, **options):
        [number] = compare(first, second, ["cmmd"], looks(), **options)
        return number.metric.partition("[")[2].rstrip("]")

    equal, large = made("equal", pictures()), made("large", pictures(side=32))
    few = made("few", pictures(23), pictures(1, side=12))
    mixed = made("mixed", pictures(39, side=32), pictures(1, side=12))
    wide, tall = made("wide", pictures(side=32)[:, :16]), made("tall", pictures(40, 20)[:, :, 4:])
    some = made("some", pictures(3), pictures(2, side=24)[:, :16])
    assert flags(equal, equal) == ""
    assert flags(equal, large) == "reference shrunk to 16"
    assert flags(equal, few) == "reference 1 of 24 enlarged to 16"
    assert flags(equal, mixed) == "reference 39 of 40 shrunk to 16, 1 of 40 enlarged to 16"
    assert flags(equal, wide) == flags(equal, wide) == "reference cut to squares"
    assert flags(equal, some) == "reference 2 of 5 cut to squares"
    assert flags(large, tall, side=16) == "samples shrunk to 16; reference cut to squares"
    assert flags(tall, equal) == "samples cut to squares"
    assert flags(tall, wide, side=8) == (
        "samples cut to squares, shrunk to 8; reference cut to squares, shrunk to 8"
    )
    with pytest.raises(UsageError, match=r"8 of 8 images .*first one has 8"):
        compare(equal, made("small", pictures(side=8)), ["fd"], looks())
    np.savez(tmp_path / "large.npz", pictures(8, side=32))
    with pytest.raises(UsageError, match="32 pixels a side, the samples have 16"):
        compare(equal, str(tmp_path / "large.npz"), ["fd"], looks())


def test_the_size_of_a_file_counts_and_not_the_one_that_a_set_records(tmp_path):
    """Samples of 12 x 20 pixels, which were squares of 700 pixels before their set was made."""
    equal = folder_of(tmp_path / "equal", pictures())
    record = b'{"original_width": 700, "original_height": 700}'
    for name, size, count in (("small", (20, 12), 1), ("wide", (32, 16), 8)):
        parts = [(f"{n}.png", encode(size=size)) for n in range(count)]
        parts += [(f"{n}.json", record) for n in range(count)]
        parts += [(f"{n}.png", encode(size=(16, 16))) for n in range(count, 24)]
        write_tar(tmp_path / f"{name}.tar", sorted(parts))
    flags = [
        compare(equal, str(tmp_path / f"{name}.tar"), ["fd"], looks())[0].metric
        for name in ("small", "wide")
    ]
    assert "reference 1 of 24 cut to squares, 1 of 24 enlarged to 16]" in flags[0]
    assert "reference 8 of 24 cut to squares]" in flags[1]


def test_two_sets_need_what_their_metrics_need(captioned, tmp_path):
    np.savez(tmp_path / "adm.npz", **moments())
    equal, own = folder_of(tmp_path / "equal", pictures(8)), captioned.data.path
    for first, second, metric, message in (
        (str(tmp_path / "adm.npz"), str(tmp_path), "fid", "no images, only moments"),
        (str(tmp_path / "nowhere"), str(tmp_path), "fd", "--side N"),
        (equal, equal, "clip", "clip needs captions"),
        (equal, equal, "agreement", "agreement needs several levels"),
        (own, own, "retrieval", "retrieval needs samples of the captions"),
    ):
        with pytest.raises(UsageError, match=message):
            compare(first, second, [metric], looks(WIDTH))


# --- what a command asks of a model ------------------------------------------------------------


@pytest.fixture
def trained_on(tmp_path):
    """A config of classes whose data is there: 12 pictures, some of them held out."""
    for number, picture in enumerate(pictures(12)):
        save_png(picture, tmp_path / "data" / ("cat", "dog")[number % 2] / f"{number}.png", None)
    return with_data(model().config, path=str(tmp_path / "data"), held_out=0.3)


@pytest.fixture
def captioned(tmp_path):
    """A config of text whose data is there: 12 pictures with captions."""
    folder = folder_of(tmp_path / "captioned", pictures(12))
    for number in range(12):
        (tmp_path / "captioned" / f"{number:03d}.txt").write_text(f"picture {number}")
    return with_data(model("text").config, path=folder, classes=())


@pytest.fixture
def trained_on_clips(tmp_path):
    """A config whose training clips are there: videos of 5 frames, every second one taken."""
    folder = make_videos(tmp_path / "data", clips(frames=5))
    for number in range(10):
        (tmp_path / "data" / f"{number:03d}.txt").write_text(f"clip {number}")
    cut = {"source": "clips", "frame_stride": 2, "clip_frames": 2}
    return with_data(model("text", 2).config, path=folder, **cut)


def with_data(config: Any, **changes: Any) -> Any:
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def test_the_training_pictures_are_the_reference_unless_others_are_named(trained_on, tmp_path):
    arguments = plan(trained_on, SIDE, n=10)
    assert (arguments["metrics"], arguments["n"]) == (("fd",), 10)
    assert arguments["reference"] is arguments["conditions"] is None
    assert arguments["own"].pictures.count == len(arguments["source"])
    held = plan(trained_on, SIDE, metrics="fd", n=10, reference="held-out")
    assert held["reference"].name.startswith("the held-out 0.3 of folder")
    assert len(held["source"]) + held["reference"].pictures.count == 12
    equal = folder_of(tmp_path / "equal", pictures(8))
    assert plan(trained_on, SIDE, n=10, reference=equal)["reference"].foreign
    with pytest.raises(UsageError, match="holds nothing out"):
        plan(with_data(trained_on, held_out=0.0), SIDE, n=4, reference="held-out")


def test_nothing_is_opened_that_is_not_needed(trained_on, tmp_path):
    shutil.rmtree(tmp_path / "data")
    np.savez(tmp_path / "adm.npz", **moments())
    arguments = plan(trained_on, SIDE, protocol="imagenet50k", reference=str(tmp_path / "adm.npz"))
    assert (arguments["metrics"], arguments["n"], arguments["source"]) == (("fid",), 50_000, None)
    assert arguments["conditions"].name == "random classes of 2"
    with pytest.raises(FileNotFoundError):
        plan(trained_on, SIDE, protocol="imagenet50k")
    with pytest.raises(UsageError, match="--inception"):
        plan(trained_on, SIDE, metrics="fid", n=10, networks=find_networks)


def test_a_reference_that_nothing_is_compared_with_is_refused_unopened(trained_on):
    for metrics in ("is", "is,agreement"):
        with pytest.raises(UsageError, match=r"--ref nowhere: none of is.* omit it"):
            plan(trained_on, SIDE, metrics=metrics, n=8, reference="nowhere")
    with pytest.raises(UsageError, match="--ref nowhere: none of retrieval"):
        plan(model("text").config, SIDE, reference="nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        plan(trained_on, SIDE, metrics="is,fd", n=8, reference="nowhere")


def test_samples_for_other_metrics_may_be_asked_for_beside_retrieval(captioned, tmp_path):
    (tmp_path / "mine.txt").write_text("one")
    both = ("retrieval", "retrieval-one-step", "fd")
    assert plan(captioned, SIDE)["metrics"] == both[:2]
    for metrics, expected in ((None, both), ("retrieval,fd", both[::2])):
        arguments = plan(captioned, SIDE, metrics=metrics, captions=tmp_path / "mine.txt", n=1)
        assert (arguments["metrics"], arguments["n"]) == (expected, 1)
        assert arguments["conditions"].name == "captions of mine.txt"
    assert plan(captioned, SIDE, metrics="retrieval")["n"] is None


def test_protocols_say_how_many_unless_the_reader_does(tmp_path):
    config = model("text").config
    (tmp_path / "a.txt").write_text("one\ntwo\nthree")
    folder = folder_of(tmp_path / "equal", pictures(8))
    options: Any = {"protocol": "coco30k", "captions": tmp_path / "a.txt", "reference": folder}
    cases: Any = (
        ({}, ("fid", "clip"), 30_000),
        ({"metrics": "fid10k,cmmd"}, ("fid", "cmmd"), 10_000),
        ({"n": 3}, ("fid", "clip"), 3),
    )
    for changes, metrics, n in cases:
        arguments = plan(config, SIDE, **options, **changes)
        assert (arguments["metrics"], arguments["n"]) == (metrics, n)
    arguments = {**plan(config, SIDE, **options), "metrics": "fid", "networks": looks()}
    with pytest.raises(UsageError, match="3 for 30,000 samples; give -n 3"):
        evaluate(model("text"), **arguments, folder=tmp_path)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("classes", {}, "no prompts.* -n"),
        ("classes", {"captions": "a.txt", "n": 1}, "omit --captions"),
        ("text", {"captions": "a.txt"}, "--captions .*a.txt: retrieval, .* has fixed"),
        ("text", {"metrics": "retrieval", "n": 500}, "-n 500: retrieval .*omit"),
        ("text", {"metrics": "retrieval", "protocol": "coco30k"}, "--protocol coco30k: retrieval"),
        ("text", {"protocol": "coco30k"}, "--captions captions_val2014.json"),
        ("text", {"protocol": "coco30k", "captions": "a.txt"}, "--ref val2014"),
        ("text", {"protocol": "imagenet50k"}, "classes; tiny takes none"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(kind, options, message, tmp_path):
    (tmp_path / "a.txt").write_text("one")
    if "captions" in options:
        options = {**options, "captions": tmp_path / options["captions"]}
    with pytest.raises(UsageError, match=message):
        plan(model(kind).config, SIDE, **options)


def test_a_model_of_smaller_pictures_is_compared_with_averages_of_its_data(trained_on):
    """As the base of a cascade, whose levels are D^r of pictures of `data.side`."""
    nest = trained_on.model.model_copy(update={"levels": trained_on.model.levels[:1]})
    base = with_data(trained_on, side=SIDE).model_copy(update={"model": nest})
    small, whole = (plan(config, side, n=10) for config, side in ((base, 8), (trained_on, SIDE)))
    assert (small["own"].pictures.side, small["own"].name) == (8, whole["own"].name)
    images = [one["own"].pictures.make(range(3, 4), print).pictures[0] for one in (small, whole)]
    expected = images[1].reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(images[0], expected, atol=0.5)


# --- clips of a model --------------------------------------------------------------------------


def test_other_clips_are_cut_as_the_runs_own(trained_on_clips, tmp_path):
    arguments = plan(trained_on_clips, SIDE, 2, n=10)
    assert arguments["metrics"] == ("retrieval", "retrieval-one-step", "fd", "motion")
    assert (arguments["own"].pictures.frames, arguments["own"].pictures.side) == (2, SIDE)
    images = clips(6, frames=5, seed=1)
    other = make_videos(tmp_path / "other", images)
    for clip, begin in (("random", "a fixed place"), ("start", "the start")):
        config = with_data(trained_on_clips, clip=clip)
        named = plan(config, SIDE, 2, n=10, reference=other)["reference"]
        assert named.pictures.kind == "clips of 2 frames"
        assert named.name.endswith(f"other, frame stride 2, from {begin}")
        assert named.foreign
    named.pictures.fill([MOTION])
    np.testing.assert_array_equal(named.pictures.all(MOTION), motion(images[:, [0, 2]]))


def test_the_runs_own_data_is_read_as_the_run_reads_it(trained_on_clips, tmp_path, monkeypatch):
    opened = []

    def open_source(data: Any, side: int, frames: int | None) -> Any:
        opened.append(data.source)
        return evaluating.clips()

    monkeypatch.setattr("matryoshka_diffusion.eval.reference.open_source", open_source)
    (tmp_path / "captions.txt").write_text("a clip")
    options = {"n": 10, "metrics": "fd", "captions": tmp_path / "captions.txt"}
    config = with_data(trained_on_clips, source="fluent-emoji")
    for name in (config.data.path, str(tmp_path)):
        plan(config, SIDE, 2, reference=name, **options)
    assert opened == ["fluent-emoji", "clips"]


@pytest.mark.parametrize("name", ["hf:pictures", "pictures.parquet"])
def test_sets_of_pictures_alone_are_no_reference_of_clips(name, trained_on_clips):
    with pytest.raises(UsageError, match=f"{name} has images.* videos"):
        plan(trained_on_clips, SIDE, 2, n=10, reference=name)


def test_a_model_of_fewer_frames_or_pictures_is_compared_with_d_of_its_clips(trained_on_clips):
    """Not with clips of neighbouring frames, which would move less."""
    levels = trained_on_clips.model.levels
    finest = levels[1].model_copy(update={"frames": 3})
    nest = trained_on_clips.model.model_copy(update={"levels": (levels[0], finest)})
    config = trained_on_clips.model_copy(update={"model": nest})
    small = plan(config, 8, 1, n=10)["own"].pictures
    whole = open_source(config.data, SIDE, 3)
    images = small.make(range(4), print).pictures
    assert (small.side, small.frames, images.shape) == (8, 1, (4, 1, 8, 8, 3))
    expected = whole[3].picture[:1].reshape(1, 8, 2, 8, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(images[3], expected, atol=0.5)
    still = plan(trained_on_clips, SIDE, None, n=10)["own"].pictures
    assert still.make(range(2), print).pictures.shape == (2, SIDE, SIDE, 3)


# --- two sets of videos ------------------------------------------------------------------------


def test_two_sets_of_videos_are_compared_samples_frame_by_frame(tmp_path):
    made, real = clips(frames=4), clips(14, frames=5, seed=1, top=200)
    names = make_videos(tmp_path / "made", made), make_videos(tmp_path / "real", real)
    shutil.copy(tmp_path / "made" / "000.webp", tmp_path / "made" / "grid.webp")  # no sample
    cut: Any = {"side": SIDE, "frames": FRAMES, "frame_stride": 2}
    fd, moves = compare(*names, ["fd", "motion"], looks(), **cut)
    images = real[:, ::2], made[:, :FRAMES]
    assert fd.value == distance(*images)
    assert moves.value == compare_motion(*map(motion, images)).distance
    assert fd.reference.endswith("real, frame stride 2, from a fixed place")
    assert (fd.n, fd.frames, fd.reference_count) == (10, FRAMES, 14)
    wide = make_videos(tmp_path / "wide", made.repeat(2, axis=3))
    [small] = compare(names[0], wide, ["motion"], looks(), side=8, frames=2, frame_stride=1)
    assert small.metric == (
        "motion distance-2f [samples shrunk to 8; reference cut to squares, shrunk to 8]"
    )


def test_videos_are_not_silently_compared_by_their_first_frames(tmp_path):
    videos = make_videos(tmp_path / "videos", clips(2))
    still = folder_of(tmp_path / "pictures", pictures(8))
    for names in ((videos, still), (still, videos)):
        with pytest.raises(UsageError, match=f"{videos} holds videos: give --frames"):
            compare(*names, ["fd"], looks(), side=SIDE)
    with pytest.raises(UsageError, match="--frame-stride"):
        compare(still, still, ["fd"], looks(), side=SIDE, frame_stride=2)


# --- the commands ------------------------------------------------------------------------------


@pytest.fixture
def run(trained_on, tmp_path):
    make_run(tmp_path / "run", "classes", tmp_path / "data")
    return tmp_path / "run"


@pytest.fixture
def _stand_ins(monkeypatch):
    monkeypatch.setattr(
        "matryoshka_diffusion.eval.evaluate.find_networks", lambda *_, **__: looks()
    )


def kept(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "eval" / result.FILE).read_text().splitlines()]


def test_networks_are_read_from_the_files_that_are_named(run, tmp_path, tiny_clip, capsys):
    make_inception(tmp_path / "inception.pt")
    files = ["--inception", str(tmp_path / "inception.pt"), "--trust-torchscript"]
    files += ["--clip", str(tiny_clip)]
    arguments = ["eval", str(run), "-n", "12", "--steps", "1", "--metrics"]
    assert cli.main([*arguments, "is,cmmd", *files]) == 0
    assert capsys.readouterr().out.startswith("IS [1 samples a split < 1,008 classes: biased low]")
    score, other = kept(run)
    assert (score["extractor"], other["extractor"]) == ("Inception", "CLIP")
    assert score["extractor_weights"] == weights_hash(tmp_path / "inception.pt")
    assert score["resize"] == "inside the TorchScript file to 299x299"
    (tmp_path / "inception.pt").write_bytes(b"something else")
    assert cli.main([*arguments, "fid", *files[:2]]) == 1
    assert "inception.pt" in capsys.readouterr().err


@pytest.mark.usefixtures("_stand_ins")
def test_eval_prints_numbers_and_their_origin_and_keeps_them(run, capsys):
    arguments = ["eval", str(run), "-n", "9", "--steps", "1", "--batch-size", "4"]
    assert cli.main([*arguments, "--metrics", "fd,agreement"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FD-EffNetLite0 [n = 9 < 4,096: biased high] of 9 ")
    assert lines[1].startswith("  tiny (weights ")
    second = next(n for n, line in enumerate(lines) if line.startswith("level disagreement of 9 "))
    assert all(line.startswith("  ") for line in lines[1:second]), "one part of its origin a line"
    assert second > 4
    assert [record["key"] for record in kept(run)] == ["fd", "agreement"]
    assert kept(run)[0]["batch_size"] == 4
    assert cli.main([*arguments, "--seed", "3"]) == 0
    assert [record["seed"] for record in kept(run)] == [1_000_000, 1_000_000, 3]


@pytest.mark.usefixtures("_stand_ins")
def test_compare_measures_two_folders(tmp_path, capsys):
    names = [folder_of(tmp_path / name, pictures(8, seed=n)) for n, name in enumerate("ab")]
    assert cli.main(["compare", *names]) == 0
    assert "of 8 samples to 8 images: " in capsys.readouterr().out
    assert not (tmp_path / "a" / "eval").exists(), "the reader's pictures are left alone"
