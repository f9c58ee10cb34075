"""What a command line names: references, captions, protocols, two sets of pictures."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluating import WIDTH, Look, looks, make_inception, make_run, model, source
from matryoshka_diffusion.cli import eval as cli_eval
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.draw.grid import save_png
from matryoshka_diffusion.eval import references, requests, results
from matryoshka_diffusion.eval.protocols import (
    captions_in_turn,
    captions_of_file,
    labels_in_turn,
    random_labels,
    read_captions,
    retrieval_captions,
)
from matryoshka_diffusion.eval.references import of_npz
from matryoshka_diffusion.eval.requests import compare, open_pictures, request
from matryoshka_diffusion.eval.run import evaluate
from matryoshka_diffusion.metrics.frechet import Moments, frechet_distance
from matryoshka_diffusion.metrics.networks.features import weights_hash


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setattr("matryoshka_diffusion.eval.references.WIDTH", WIDTH)


def pictures(count=8, side=16, seed=0):
    shape = (count, side, side, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def folder_of(path, shown):
    for number, picture in enumerate(shown):
        save_png(picture, path / f"{number:03d}.png", None)
    return str(path)


def moments(seed=0):
    rows = np.random.default_rng(seed).normal(size=(40, WIDTH))
    return {"mu": rows.mean(axis=0), "sigma": np.cov(rows, rowvar=False)}


# --- captions ----------------------------------------------------------------------------------

COCO = {
    "images": [{"id": 7}],
    "annotations": [
        {"image_id": 7, "id": 3, "caption": "the third"},
        {"image_id": 7, "id": 1, "caption": " the \n first "},
        {"image_id": 8, "id": 2, "caption": "the second"},
    ],
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions_val2014.json", json.dumps(COCO)),
        ("a.txt", "the first\n\nthe second\nthe third\n"),
        (
            "a.jsonl",
            '{"text": "the first"}\n{"caption": ["the second", "2"]}\n{"text": "the third"}',
        ),
        ("a.csv", "id,caption\n1,the first\n2,the second\n3,the third\n"),
    ],
)
def test_captions_of_a_file_are_read_in_its_order(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert read_captions(tmp_path / name) == ["the first", "the second", "the third"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none.txt", None, "no such file of captions"),
        ("a.json", b"{}", "no file of COCO annotations.*KeyError"),
        ("a.json", b"[1", "no file of COCO annotations"),
        ("a.jsonl", b'{"text": ', "no file of JSON lines"),
        ("a.csv", b"id,name\n1,x\n", "holds no captions"),
        ("a.txt", b"\n \n", "holds no captions"),
        ("a.txt", b"caf\xe9\n", "not UTF-8"),
    ],
)
def test_what_holds_no_captions_is_refused(name, data, message, tmp_path):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_captions(tmp_path / name)


def test_fewer_samples_have_the_first_captions_of_more(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"caption {i}" for i in range(50)))
    shown = captions_of_file(tmp_path / "a.txt")
    all_of_them = shown.captions(50)
    assert shown.captions(20) == all_of_them[:20]
    assert sorted(all_of_them) == sorted(f"caption {i}" for i in range(50))
    assert all_of_them != sorted(all_of_them)
    assert all_of_them[:3] == ["caption 5", "caption 0", "caption 36"]  # the rule never changes


def test_random_classes_are_uniform_and_belong_to_the_sample():
    shown = random_labels(4)
    labels = [shown.of(range(i, i + 1))["classes"][0] for i in range(4000)]
    assert shown.of(range(10, 13)) == {"classes": labels[10:13]}
    assert np.bincount(labels).min() > 900
    assert random_labels(5).identity != shown.identity


def test_captions_in_turn_start_again_and_those_of_retrieval_know_their_pictures():
    known = source()
    shown_in_turn = captions_in_turn(known).captions(80)
    assert shown_in_turn[40:] == shown_in_turn[:40]
    assert sorted(shown_in_turn[:40]) == sorted(f"picture {i}" for i in range(40))
    assert shown_in_turn[:3] == ["picture 26", "picture 3", "picture 27"]  # the rule never changes
    shown = retrieval_captions(known)
    assert shown.limit == 40
    assert shown.captions(3) == [f"picture {i}" for i in shown.pictures[:3]]


def sorted_by_class(labels=(0,) * 50 + (1,) * 50):
    """A source as folders are read: one class after the other."""
    return replace(source(100), labels=list(labels))


def test_few_samples_of_a_source_that_is_sorted_by_class_have_every_class():
    shown = labels_in_turn(sorted_by_class())
    labels = shown.of(range(200))["classes"]
    assert 3 <= sum(labels[:20]) <= 17
    assert sum(labels[:100]) == 50
    assert labels[100:] == labels[:100]
    assert shown.of(range(7, 12)) == {"classes": labels[7:12]}


def test_other_labels_of_the_same_pictures_are_other_conditions():
    there, here = sorted_by_class(), sorted_by_class((1,) * 50 + (0,) * 50)
    assert labels_in_turn(there).identity != labels_in_turn(here).identity
    assert labels_in_turn(there).identity == labels_in_turn(sorted_by_class()).identity


@pytest.mark.parametrize(
    ("kind", "metric", "message"),
    [
        ("text", "fd", r"pictures has no captions to ask for: add NAME\.txt .*--captions"),
        ("text", "retrieval", r"pictures has no captions to ask for: add NAME\.txt"),
        ("classes", "fd", "pictures has no classes to ask for: .*imagenet50k"),
    ],
)
def test_a_source_without_what_is_asked_for_is_refused_with_its_name(kind, metric, message):
    bare = replace(source(), captions=None, labels=None, classes=())
    with pytest.raises(UsageError, match=message):
        evaluate(model(kind), metric, source=bare, n=8)


# --- references --------------------------------------------------------------------------------


def test_published_moments_are_used_as_they_are(tmp_path):
    np.savez(tmp_path / "adm.npz", **moments())
    reference = of_npz(tmp_path / "adm.npz")
    networks = looks(WIDTH)
    options = {"source": source(), "n": 8, "networks": networks, "folder": tmp_path / "eval"}
    [found] = evaluate(model(), "fid", reference=reference, **options)
    look, tiny = Look("Inception", WIDTH), model()
    samples = tiny.sample(**labels_in_turn(source()).of(range(8)), seed=1_000_000)
    real = Moments.of(np.random.default_rng(0).normal(size=(40, WIDTH)))
    expected = frechet_distance(real, Moments.of(look(samples.pictures)))
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.metric.startswith("FID-8 [n = 8 <= 24 features: rank-deficient; reference of")
    assert found.sentence().startswith(f"{found.metric} of 8 samples to adm.npz: ")
    with pytest.raises(UsageError, match=r"prdc needs the pictures.*only mu and sigma"):
        evaluate(model(), "prdc", reference=reference, **options)
    with pytest.raises(UsageError, match="fd needs the pictures"):
        evaluate(model(), "fd", reference=reference, **options)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pictures_of_an_npz_are_read_a_batch_at_a_time(save, tmp_path, monkeypatch):
    real, made = pictures(100), pictures(90, seed=1)
    save(tmp_path / "real.npz", arr_0=real, arr_1=np.zeros(100, np.int64))
    save(tmp_path / "made.npz", made)
    first, second = (str(tmp_path / name) for name in ("made.npz", "real.npz"))
    [found] = compare(first, second, ["fd"], looks())
    look = Look("EffNetLite0")
    expected = frechet_distance(Moments.of(look(real)), Moments.of(look(made)))
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert (found.n, found.reference_count, found.weights) == (90, 100, "")
    assert found.metric == "FD-EffNetLite0"


def test_moments_win_over_the_pictures_beside_them(tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=pictures(20), **moments())
    np.savez(tmp_path / "made.npz", pictures(20, seed=1))
    first, second = (str(tmp_path / name) for name in ("made.npz", "real.npz"))
    found = compare(first, second, ["fid", "prdc"], looks(WIDTH))
    assert found[0].reference_count is None
    assert {result.reference_count for result in found[1:]} == {20}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "holds nothing: a reference batch has mu"),
        ({"mean": np.zeros(3)}, "holds mean: a reference batch has mu"),
        ({"mu": np.zeros(WIDTH)}, "sigma is not a file"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "not those of 24 features"),
        ({"mu": np.full(WIDTH, np.nan), "sigma": np.eye(WIDTH)}, "not finite"),
        ({"arr_0": pictures().astype(np.float32)}, "arr_0 is float32"),
        ({"arr_0": pictures()[:, :8]}, "no squares"),
        ({"arr_0": np.array([{}], dtype=object)}, "arr_0 is object"),
        ({"mu": np.array([{}], dtype=object), "sigma": np.eye(2)}, "allow_pickle"),
    ],
)
def test_an_npz_that_is_something_else_is_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UsageError, match=message):
        of_npz(tmp_path / "a.npz")


def test_no_npz_at_all_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        of_npz(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes(b"PK no zip")
    with pytest.raises(UsageError, match="no reference batch that can be read"):
        of_npz(tmp_path / "a.npz")
    np.save(tmp_path / "a.npy", pictures())
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(UsageError, match=r"no \.npz, which is a zip"):
        of_npz(tmp_path / "a.npz")


def test_no_byte_of_an_npz_is_read_twice(tmp_path, monkeypatch):
    """Batches of stored pictures are a seek in the file; compressed ones are read on."""
    shown = pictures(256)
    np.savez(tmp_path / "stored.npz", mu=np.zeros(9), arr_0=shown)
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=shown)
    opened = []
    extended = zipfile.ZipFile.open

    def counted(self, *arguments, **options):
        opened.append(arguments)
        return extended(self, *arguments, **options)

    for name, times in (("stored", 0), ("compressed", 1)):
        member = references._Member(tmp_path / f"{name}.npz")
        opened.clear()
        monkeypatch.setattr(zipfile.ZipFile, "open", counted)
        for first in (0, 64, 192):
            rows = range(first, first + 64)
            np.testing.assert_array_equal(member.read(rows), shown[first : first + 64])
        assert len(opened) == times, name
        np.testing.assert_array_equal(member.read(range(5)), shown[:5])


def test_pictures_of_another_resolution_are_flagged_or_refused(tmp_path):
    large = folder_of(tmp_path / "large", pictures(8, side=32))
    equal = folder_of(tmp_path / "equal", pictures(8))
    small = folder_of(tmp_path / "small", pictures(8, side=8))
    [shrunk] = compare(equal, large, ["fd"], looks())
    assert "reference cut and shrunk to 16" in shrunk.metric
    with pytest.raises(UsageError, match=r"8 of 8 pictures .*the first one has 8"):
        compare(equal, small, ["fd"], looks())
    few = folder_of(tmp_path / "few", [*pictures(23), *pictures(1, side=12)])
    [number] = compare(equal, few, ["fd"], looks())
    assert "reference 1 of 24 enlarged to 16" in number.metric
    mixed = folder_of(tmp_path / "mixed", [*pictures(39, side=32), *pictures(1, side=12)])
    [number] = compare(equal, mixed, ["fd"], looks())
    assert "reference cut and shrunk to 16, 1 of 40 enlarged to 16" in number.metric
    [both] = compare(large, large, ["fd"], looks(), side=16)
    assert "samples cut and shrunk to 16; " in both.metric
    np.savez(tmp_path / "large.npz", pictures(8, side=32))
    with pytest.raises(UsageError, match="32 pixels a side, the samples have 16"):
        compare(equal, str(tmp_path / "large.npz"), ["fd"], looks())


def test_sheets_beside_samples_are_no_samples(tmp_path):
    made = folder_of(tmp_path / "made", pictures(8))
    for name in ("grid.png", "levels.png"):
        save_png(pictures(1, side=64)[0], tmp_path / "made" / name, None)
    [found] = compare(made, made, ["fd"], looks())
    assert (found.n, found.reference_count) == (8, 8)
    assert found.metric == "FD-EffNetLite0"


def test_the_captions_beside_pictures_are_not_what_a_model_was_asked_for(captioned):
    with pytest.raises(UsageError, match="retrieval is about what a model draws for the captions"):
        compare(captioned.data.path, captioned.data.path, ["retrieval"], looks())


def test_two_sets_need_pictures_to_begin_with(tmp_path):
    np.savez(tmp_path / "adm.npz", **moments())
    with pytest.raises(UsageError, match="no pictures, only moments"):
        compare(str(tmp_path / "adm.npz"), str(tmp_path), ["fid"], looks(WIDTH))
    with pytest.raises(UsageError, match="--side N"):
        compare(str(tmp_path), str(tmp_path), ["fd"], looks())
    equal = folder_of(tmp_path / "equal", pictures(8))
    with pytest.raises(UsageError, match="clip needs captions"):
        compare(equal, equal, ["clip"], looks())
    with pytest.raises(UsageError, match="agreement needs pictures of several levels"):
        compare(equal, equal, ["agreement"], looks())


# --- requests ----------------------------------------------------------------------------------


@pytest.fixture
def trained_on(tmp_path):
    """A config of classes whose data is there: 12 pictures, some of them held out."""
    for number, picture in enumerate(pictures(12)):
        save_png(picture, tmp_path / "data" / ("cat", "dog")[number % 2] / f"{number}.png", None)
    config = model().config
    data = config.data.model_copy(update={"path": str(tmp_path / "data"), "held_out": 0.3})
    return config.model_copy(update={"data": data})


@pytest.fixture
def captioned(tmp_path):
    """A config of text whose data is there: 12 pictures with captions."""
    for number, picture in enumerate(pictures(12)):
        save_png(picture, tmp_path / "captioned" / f"{number}.png", None)
        (tmp_path / "captioned" / f"{number}.txt").write_text(f"picture {number}")
    config = model("text").config
    data = config.data.model_copy(update={"path": str(tmp_path / "captioned"), "classes": ()})
    return config.model_copy(update={"data": data})


def test_the_training_pictures_are_the_reference_unless_others_are_named(trained_on, tmp_path):
    asked = request(trained_on, 16, n=10)
    assert (asked.metrics, asked.n, asked.reference, asked.conditions) == (("fd",), 10, None, None)
    held = request(trained_on, 16, metrics="fd", n=10, reference="held-out")
    assert held.reference
    assert held.source
    assert held.reference.count
    assert held.reference.name.startswith("the held-out 0.3 of folder")
    assert len(held.source) + held.reference.count == 12
    equal = folder_of(tmp_path / "equal", pictures(8))
    named = request(trained_on, 16, n=10, reference=equal).reference
    assert named
    assert named.foreign


def test_a_reference_that_nothing_is_compared_with_is_refused_unopened(trained_on):
    options = {"reference": "nowhere", "n": 8}
    for metrics in ("is", "is,agreement"):
        with pytest.raises(UsageError, match=f"--ref nowhere: none of {metrics[:2]}.* compares"):
            request(trained_on, 16, metrics=metrics, **options)
    with pytest.raises(UsageError, match="--ref nowhere: none of retrieval"):
        request(model("text").config, 16, reference="nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        request(trained_on, 16, metrics="is,fd", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": Path("mine.txt")}, "--captions mine.txt: retrieval draws the same 128"),
        ({"metrics": "retrieval", "n": 500}, "-n 500: retrieval draws .* or name a metric"),
        ({"metrics": "retrieval", "protocol": "coco30k"}, "--protocol coco30k: retrieval draws"),
        ({"metrics": "retrieval5k"}, "retrieval5k: .* leave the number away"),
        ({"metrics": "fd,retrieval5k"}, "retrieval5k: .* leave the number away"),
    ],
)
def test_what_retrieval_has_no_use_for_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        request(model("text").config, 16, **options)


def test_what_says_how_samples_are_drawn_is_taken_where_not_only_retrieval_is_asked_for(
    captioned, tmp_path
):
    (tmp_path / "mine.txt").write_text("one")
    given = {"captions": tmp_path / "mine.txt", "n": 1}
    for metrics in (None, "retrieval,fd"):
        asked = request(captioned, 16, metrics=metrics, **given)
        assert (asked.metrics, asked.n) == (("retrieval", "fd"), 1)
        assert asked.conditions
        assert asked.conditions.name == "captions of mine.txt"
    assert request(captioned, 16, metrics="retrieval").n is None


def test_nothing_is_opened_that_is_not_needed(trained_on, tmp_path):
    shutil.rmtree(tmp_path / "data")
    np.savez(tmp_path / "adm.npz", **moments())
    asked = request(trained_on, 16, protocol="imagenet50k", reference=str(tmp_path / "adm.npz"))
    assert (asked.metrics, asked.n, asked.source) == (("fid",), 50_000, None)
    assert asked.conditions
    assert asked.conditions.name == "random classes of 2"
    with pytest.raises(FileNotFoundError):
        request(trained_on, 16, protocol="imagenet50k")


def test_protocols_say_how_many_unless_the_reader_does(tmp_path):
    config = model("text").config
    (tmp_path / "a.txt").write_text("one\ntwo\nthree")
    options = {"protocol": "coco30k", "captions": tmp_path / "a.txt"}
    folder = folder_of(tmp_path / "equal", pictures(8))
    asked = request(config, 16, reference=folder, **options)
    assert (asked.metrics, asked.n) == (("fid", "clip"), 30_000)
    asked = request(config, 16, reference=folder, metrics="fid10k,cmmd", **options)
    assert (asked.metrics, asked.n) == (("fid", "cmmd"), 10_000)
    assert request(config, 16, reference=folder, n=3, **options).n == 3
    with pytest.raises(UsageError, match="there are 3 for 30,000 samples; give -n 3"):
        evaluate(
            model("text"),
            "fid",
            n=30_000,
            conditions=asked.conditions,
            networks=looks(),
            reference=open_pictures(folder, 16),
            folder=tmp_path,
        )


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("classes", {}, "tiny has no prompts to retrieve: give -n"),
        ("classes", {"captions": "a.txt", "n": 1}, "tiny takes no captions"),
        ("text", {"protocol": "coco30k"}, "give --captions captions_val2014.json"),
        ("text", {"protocol": "imagenet50k"}, "asks for classes; tiny takes none"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(kind, options, message, tmp_path):
    if "captions" in options:
        options = {**options, "captions": tmp_path / options["captions"]}
    with pytest.raises(UsageError, match=message):
        request(model(kind).config, 16, **options)


def test_coco_is_not_compared_with_the_training_pictures(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    asked = {"protocol": "coco30k", "captions": tmp_path / "a.txt"}
    with pytest.raises(UsageError, match="name them, --ref val2014"):
        request(model("text").config, 16, **asked)
    assert request(model("text").config, 16, metrics="clip", **asked).reference is None


def test_a_model_of_smaller_pictures_is_compared_with_averages_of_its_data(trained_on):
    """As the base of a cascade, whose levels are D^r of pictures of `data.side`."""
    data = trained_on.data.model_copy(update={"side": 16})
    level = trained_on.model.levels[0]
    nest = trained_on.model.model_copy(update={"levels": (level,)})
    base = trained_on.model_copy(update={"model": nest, "data": data})
    small = request(base, 8, n=10).source
    large = request(trained_on, 16, n=10).source
    assert small
    assert large
    assert (small.side, small.channels, len(small)) == (8, 3, len(large))
    expected = large[3].picture.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(small[3].picture, expected, atol=0.5)
    for name in ("name", "keys", "captions", "classes", "bad", "total"):
        assert getattr(small, name) == getattr(large, name), name


def test_nothing_is_held_out_of_a_run_that_holds_nothing_out(trained_on):
    config = trained_on.model_copy(
        update={"data": trained_on.data.model_copy(update={"held_out": 0.0})}
    )
    with pytest.raises(UsageError, match="holds nothing out"):
        request(config, 16, n=4, reference="held-out")


# --- the commands ------------------------------------------------------------------------------


@pytest.fixture
def run(trained_on, tmp_path):
    make_run(tmp_path / "run", "classes", tmp_path / "data")
    return tmp_path / "run"


@pytest.fixture
def _stand_ins(monkeypatch):
    monkeypatch.setattr("matryoshka_diffusion.eval.run.find_networks", lambda *_: looks())


def test_networks_are_read_from_the_files_that_are_named(run, tmp_path, tiny_clip, capsys):
    make_inception(tmp_path / "inception.pt")
    files = ["--inception", str(tmp_path / "inception.pt"), "--clip", str(tiny_clip)]
    assert (
        cli.main(["eval", str(run), "-n", "12", "--steps", "1", "--metrics", "is,cmmd", *files])
        == 0
    )
    assert capsys.readouterr().out.startswith("IS [1 samples a split < 1,008 classes: biased low]")
    kept = [json.loads(line) for line in (run / "eval" / results.FILE).read_text().splitlines()]
    assert [record["extractor"] for record in kept] == ["Inception", "CLIP"]
    assert kept[0]["extractor_weights"] == weights_hash(tmp_path / "inception.pt")
    assert kept[0]["resize"] == "inside the TorchScript file to 299x299"
    (tmp_path / "inception.pt").write_bytes(b"something else")
    assert cli.main(["eval", str(run), "-n", "12", "--metrics", "fid", *files[:2]]) == 1
    assert "inception.pt" in capsys.readouterr().err


@pytest.mark.usefixtures("_stand_ins")
def test_eval_prints_numbers_and_their_origin_and_keeps_them(run, capsys):
    arguments = ["eval", str(run), "-n", "9", "--steps", "1", "--batch-size", "4"]
    assert cli.main([*arguments, "--metrics", "fd,agreement"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FD-EffNetLite0 of 9 samples to ")
    assert lines[1].startswith("  tiny (weights ")
    assert lines[2].startswith("level disagreement of 9 samples: ")
    kept = [json.loads(line) for line in (run / "eval" / results.FILE).read_text().splitlines()]
    assert [record["key"] for record in kept] == ["fd", "agreement"]
    assert kept[0]["batch_size"] == 4
    assert cli.main([*arguments, "--seed", "3"]) == 0
    assert len((run / "eval" / results.FILE).read_text().splitlines()) == 3


@pytest.mark.usefixtures("_stand_ins")
def test_eval_of_two_folders(tmp_path, capsys):
    names = [folder_of(tmp_path / name, pictures(8, seed=n)) for n, name in enumerate("ab")]
    assert cli.main(["eval", *names]) == 0
    assert "of 8 samples to 8 pictures: " in capsys.readouterr().out
    assert not (tmp_path / "a" / "eval").exists(), "the reader's pictures are left alone"


@pytest.mark.parametrize("words", [("{run}", "{data}"), ("{data}", "{run}/model")])
def test_a_run_is_no_set_of_pictures(words, run, tmp_path, capsys):
    names = [word.format(run=run, data=tmp_path / "data") for word in words]
    assert cli.main(["eval", *names, "--side", "16"]) == 2
    assert "not pictures: mdm eval" in capsys.readouterr().err


def test_two_folders_are_compared_as_they_are(tmp_path, capsys):
    names = [folder_of(tmp_path / name, pictures(8)) for name in "ab"]
    assert cli.main(["eval", *names, "-n", "4", "--cfg", "2"]) == 2
    assert "leave -n, --cfg away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--base", "runs/base", "--precision", "bf16"], "leave --base, --precision away"),
        (["--batch-size", "8", "--cfg", "2"], "leave --batch-size, --cfg away"),
        (["--interval", "-1", "2", "--seed", "3"], "leave --seed, --interval away"),
        (["--metrics", "fd,is50k"], "leave the number of samples away (--metrics fd,is)"),
        (["--fvd", "i3d.pt"], "--fvd: none of fd looks through it"),
        (["--side", "32"], "pictures of one side, which is compared: leave --side away"),
    ],
)
def test_what_two_sets_have_no_use_for_is_refused(options, message, tmp_path, capsys):
    np.savez(tmp_path / "a.npz", pictures())
    assert cli.main(["eval", *[str(tmp_path / "a.npz")] * 2, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-n", "4", "--side", "16"], "--side is of two sets"),
        (["--metrics", "fdi"], "no metric 'fdi'"),
        (["--protocol", "coco"], "invalid choice: 'coco'"),
        ([], "give -n"),
        (["-n", "4", "--clip", "c"], "--clip: none of fd looks through it; leave it away"),
        (["-n", "4", "--inception", "i.pt"], "(--metrics, one of fid,kid,is,prdc,fid-frames)"),
    ],
)
def test_eval_refuses_in_one_line(run, options, message, capsys):
    try:
        status = cli.main(["eval", str(run), *options])
    except SystemExit as leaving:
        status = leaving.code
    assert status == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_the_protocols_of_the_command_are_those_of_the_library():
    assert set(cli_eval.PROTOCOLS) == set(requests.PROTOCOLS)
