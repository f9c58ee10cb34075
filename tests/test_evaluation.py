"""Evaluation as a job: resumed, shared and streamed as if done at once, and what it refuses."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
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
    source,
)
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.eval import demo as measure
from matryoshka_diffusion.eval import measures, results, run, store
from matryoshka_diffusion.eval.measures import METRICS, parse_metrics, thousands
from matryoshka_diffusion.eval.pictures import PictureSet, Shown, fingerprint
from matryoshka_diffusion.eval.protocols import captions_in_turn, labels_in_turn, unconditional
from matryoshka_diffusion.eval.references import of_source
from matryoshka_diffusion.eval.results import Result
from matryoshka_diffusion.eval.run import evaluate, find_networks
from matryoshka_diffusion.eval.store import Store
from matryoshka_diffusion.files import digest
from matryoshka_diffusion.metrics.agreement import level_agreement
from matryoshka_diffusion.metrics.frechet import Moments, frechet_distance
from matryoshka_diffusion.metrics.retrieval import SEED
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.train.averages import average_of
from ranks import ROOT, start_ranks

OVERLAP = ("precision", "recall", "density", "coverage")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of features made at once, and the results."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, measured(folder)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.safetensors"))
    }


# --- done in any way, the numbers are the same -------------------------------------------------


def test_streamed_numbers_are_those_of_all_samples_in_memory(whole):
    tiny, known = model(), source()
    asked = labels_in_turn(known).of(range(SAMPLES))
    samples = tiny.sample(**asked, seed=SEED, batch_size=BATCHED)
    look = Look("EffNetLite0")
    real = np.stack([known[i].picture for i in range(len(known))])
    expected = frechet_distance(Moments.of(look(real)), Moments.of(look(samples.pictures)))
    distance, agreement = whole[1]
    assert distance.value == pytest.approx(expected, rel=1e-9)
    assert agreement.value == pytest.approx(level_agreement(samples.levels).mean(), rel=1e-12)
    assert len(np.unique(look(samples.pictures), axis=0)) == SAMPLES


def test_features_are_kept_for_the_keys_and_the_bytes_of_pictures():
    known = source()
    hashes = [hashlib.sha256(known[i].picture.tobytes()).hexdigest() for i in range(len(known))]
    assert fingerprint(known) == digest("\n".join([*known.keys, *hashes]))


def test_killed_in_the_middle_and_repeated_gives_the_same_bits(whole, tmp_path):
    child = [sys.executable, evaluating.__file__, str(tmp_path), "10"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(child, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    kept = files(tmp_path)
    assert 0 < len(kept) < len(files(whole[0]))
    assert measured(tmp_path) == whole[1]
    assert files(tmp_path) == files(whole[0])
    assert kept.items() <= files(tmp_path).items()


def test_two_ranks_do_what_one_does(whole, tmp_path):
    ranks = start_ranks(2, str(tmp_path / "both"), script=evaluating.__file__)
    clips = measured_clips(tmp_path / "alone")
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    assert files(tmp_path / "both") == files(whole[0]) | files(tmp_path / "alone")
    assert measured(tmp_path / "both") == whole[1]
    assert measured_clips(tmp_path / "both") == clips


def test_what_is_known_is_not_made_again(tmp_path):
    networks = looks()
    measured(tmp_path, networks=networks, n=20)
    seen = networks("EffNetLite0").seen
    measured(tmp_path, networks=networks, n=20)
    assert networks("EffNetLite0").seen == seen
    measured(tmp_path, networks=networks, n=24)  # another batch, and nothing of the reference
    assert networks("EffNetLite0").seen == seen + BATCHED
    told = []
    measured(tmp_path, networks=networks, n=30, progress=lambda *now: told.append(now))
    assert told[-1] == ("tiny", 6, 6)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_the_moments_of_a_reference_are_taken_once(tmp_path, monkeypatch):
    """A set that much is compared with is large; what is compared with it is not."""
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    taken, take = [], store.moments_of
    monkeypatch.setattr(store, "moments_of", lambda rows: taken.append(1) or take(rows))
    first = measured(tmp_path / "results")
    assert measured(tmp_path / "results") == first
    measured(tmp_path / "results", seed=9)
    assert taken == [1]
    (kept,) = (tmp_path / "cache").rglob("moments-*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"moments-00000040.safetensors: damaged"):
        measured(tmp_path / "results")


@pytest.mark.parametrize(
    "changed", [{"seed": 3}, {"steps": 2}, {"sampler": "ddpm"}, {"batch_size": 8}]
)
def test_other_samples_have_a_folder_of_their_own(changed, tmp_path):
    measured(tmp_path, n=BATCHED)
    measured(tmp_path, n=BATCHED, **changed)
    about = [json.loads(path.read_text()) for path in tmp_path.glob("*/about.json")]
    assert len(about) == 2
    [name] = changed
    values = {str({**one, **one["sampling"]}[name]) for one in about}
    assert len(values) == 2


def test_other_weights_have_a_folder_of_their_own(tmp_path):
    trained: Any = model()
    options = {"source": source(), "n": 4, "networks": looks(), "folder": tmp_path}
    before = evaluate(trained, "fd", **options)
    with torch.no_grad():
        trained.net.levels[1].head.weight.mul_(2.0)
    after = evaluate(trained, "fd", **options)
    assert before[0].weights != after[0].weights
    assert before[0].value != after[0].value


def test_another_text_encoder_at_the_same_place_has_a_folder_of_its_own(tmp_path):
    tiny, other = model("text"), Words()
    other.key = "other weights"
    options = {"source": source(), "n": 4, "networks": looks(), "folder": tmp_path}
    for encoder in (Words(), other):
        evaluate(Matryoshka(tiny.net, tiny.config, encoder=encoder), "fd", **options)
    about = [json.loads(path.read_text()) for path in tmp_path.glob("*/about.json")]
    assert {one["encoder"] for one in about} == {"words", "other weights"}


def test_what_is_drawn_on_another_kind_of_device_is_not_mixed_with_the_rest():
    here, there = model(), model()
    there.device = torch.device("cuda", 1)
    assert (here.describe({})["device"], there.describe({})["device"]) == ("cpu", "cuda")


def test_samples_of_earlier_rules_are_drawn_anew_and_references_are_kept(tmp_path, monkeypatch):
    """Labels were once taken for names: what was drawn for them is known by `samples`."""
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    networks = looks()
    measured(tmp_path / "eval", networks=networks, n=BATCHED)
    [about] = (json.loads(path.read_text()) for path in tmp_path.glob("eval/*/about.json"))
    assert about["samples"] >= 2, "1 was before labels were indices"
    seen = networks("EffNetLite0").seen
    rules = "matryoshka_diffusion.eval.pictures.SAMPLES"
    monkeypatch.setattr(rules, about["samples"] + 1)
    measured(tmp_path / "eval", networks=networks, n=BATCHED)
    assert networks("EffNetLite0").seen == seen + BATCHED


def test_a_reference_whose_pictures_change_is_looked_at_again(tmp_path):
    known: Any = source()
    before = measured(tmp_path, source=known)
    known.array[5] = 0
    assert measured(tmp_path, source=known)[0].value != before[0].value


def test_a_damaged_file_is_named(whole, tmp_path):
    measured(tmp_path)
    path = next(tmp_path.rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"safetensors: damaged .* remove it and repeat"):
        measured(tmp_path)


# --- every metric ------------------------------------------------------------------------------


def test_every_metric_is_computed_with_its_protocol_in_its_name(tmp_path, monkeypatch):
    for name in ("kid", "kd"):  # whose subsets have 1,000 rows
        monkeypatch.setitem(METRICS, name, METRICS[name]._replace(least=2))
    few = functools.partial(measures.kernel_distance, subsets=2, size=10)
    monkeypatch.setattr(measures, "kernel_distance", few)
    of_pictures = [name for name, metric in METRICS.items() if not metric.clips]
    found = evaluate(
        model("text"),
        of_pictures,
        source=source(),
        n=30,
        networks=looks(),
        folder=tmp_path,
    )
    names = {result.metric.split(" [")[0] for result in found}
    assert names == {
        *("FD-EffNetLite0", "FID-30", "KID", "KD-EffNetLite0", "IS"),
        *(f"{kind}-{network}" for kind in OVERLAP for network in ("Inception", "EffNetLite0")),
        *("CLIP-tiny", "CMMD-tiny", "prompt retrieval", "level disagreement"),
    }
    assert {result.key for result in found} == set(of_pictures)
    assert all(np.isfinite(result.value) for result in found)
    better = {result.key for result in found if result.higher_is_better}
    assert better == {"is", "prdc", "prdc-fd", "clip", "retrieval"}
    biased = next(result for result in found if result.key == "is")
    assert biased.metric == "IS [3 samples a split < 1,008 classes: biased low]"


def test_retrieval_is_that_of_the_samples_in_memory(tmp_path):
    tiny, known = model("text"), source()
    [found] = evaluate(tiny, "retrieval", source=known, folder=tmp_path)
    expected = measure.retrieval(tiny, known)
    assert found.value == expected.first
    assert found.others == {"among five": expected.among_five}
    assert found.sentence() == str(expected)


def test_the_clip_score_is_of_each_sample_and_its_own_caption(tmp_path):
    tiny, known, look = model("text"), source(), Look("CLIP")
    options = {"source": known, "networks": lambda _: look, "folder": tmp_path, "batch_size": 4}
    [found] = evaluate(tiny, "clip", n=10, **options)
    captions = captions_in_turn(known).captions(10)
    pictures = tiny.sample(captions, seed=SEED).pictures
    images, texts = look(pictures).astype(np.float64), look.texts(captions).astype(np.float64)
    cosines = (
        (images * texts).sum(1) / np.linalg.norm(images, axis=1) / np.linalg.norm(texts, axis=1)
    )
    assert found.value == pytest.approx(100 * cosines.mean(), rel=1e-6)


def test_the_weights_that_were_not_averaged_are_named_in_the_number(tmp_path):
    options = {"source": source(), "n": 4, "networks": looks(), "folder": tmp_path}
    [found] = evaluate(model(ema_decay=0.0), "fd", **options)
    assert found.metric.startswith("FD-EffNetLite0 [no EMA; n = 4 <= 6 features")


class Certain(Look):
    """Tells four classes apart without doubt."""

    def __call__(self, pictures: Any) -> Any:
        return np.eye(4)[pictures[:, 0, 0, 0]]

    def probabilities(self, features: Any) -> Any:
        return features


def test_the_inception_score_of_pictures_that_are_sorted_by_class_knows_all_classes(tmp_path):
    def make(rows: range, progress: Any) -> Shown:
        shade = np.array([row // 100 for row in rows], np.uint8)
        return Shown(np.broadcast_to(shade[:, None, None, None], (len(rows), 2, 2, 3)), [])

    store = Store.at(tmp_path, {"sorted": True}, make, 100)
    [found] = run.measure(
        PictureSet("sorted", 400, 2, lambda: store),
        None,
        ["is"],
        lambda _: Certain("Inception"),
        Result(""),
    )
    assert found.value == pytest.approx(4.0, rel=0.05), "1 in splits of one class each"


def test_averages_are_known_as_such_whenever_they_were_made():
    plain, averages = model(ema_decay=0.0), model()
    afterwards = Matryoshka(plain.net, average_of(plain.config, 0.08))
    found = [one.describe({})["averaged"] for one in (plain, averages, afterwards)]
    assert found == [False, True, True]


# --- what cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "changes", "message"),
    [
        ("fdi", {}, "no metric 'fdi'.*did you mean fd"),
        ("fid50k,kid10k", {}, "asks for 10,000 samples and for 50,000"),
        ("fd", {"n": None}, "how many samples"),
        ("fd", {"n": 1}, "fd needs at least 2 samples, not 1"),
        ("kid", {}, "kid needs at least 1,000 samples, not 22"),
        ("kid", {"n": 1000}, "kid needs at least 1,000 pictures of reference, not 40"),
        ("is", {"n": 9}, "is needs at least 10 samples, not 9"),
        ("clip", {}, "clip needs captions, which tiny was not drawn for"),
        ("retrieval", {}, "tiny has no prompts to retrieve"),
        ("fd", {"source": None}, "its training pictures are needed"),
        ("fd", {"source": None, "conditions": unconditional()}, "name them with --ref"),
        ("fd", {"reference": of_source(source(side=32))}, "32 pixels a side, the samples have 16"),
        ("fid", {"networks": find_networks()}, "give its weights, --inception FILE"),
        ("clip", {"networks": find_networks(), "model": "text"}, "--clip PATH"),
        ("retrieval", {"source": None, "model": "text"}, "needs the pictures that"),
        ("retrieval,kid", {"model": "text"}, "kid needs at least 1,000 samples, not 22"),
        ("fd", {"source": None, "model": "text"}, "a file of captions"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(metrics, changes, message, tmp_path):
    tiny = model(changes.pop("model", "classes"))
    given = {"source": source(), "n": SAMPLES, "networks": looks(), "folder": tmp_path}
    with pytest.raises(UsageError, match=message):
        evaluate(tiny, metrics, **(given | changes))
    assert not list(tmp_path.iterdir())


def test_levels_of_one_level_cannot_disagree(tmp_path):
    tiny = model("nothing")
    tiny.net.levels = tiny.net.levels[:1]
    config = tiny.net.config
    tiny.net.config = tiny.model = config.model_copy(update={"levels": config.levels[:1]})
    with pytest.raises(UsageError, match="agreement needs pictures of several levels"):
        evaluate(tiny, "agreement", n=4, folder=tmp_path)


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
    assert parse_metrics("fid50k,prdc-fd") == (("fid", "prdc-fd"), 50_000)
    assert thousands(30_000) == "30K"
    assert thousands(1_500) == "1500"


def test_results_are_lines_of_json_also_after_a_torn_one(whole, tmp_path):
    path = tmp_path / "eval" / results.FILE
    results.append(whole[1], path)
    with open(path, "a") as file:
        file.write('{"torn": ')
    results.append(whole[1][:1], path)
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    record = json.loads(lines[-1])
    assert record == {**json.loads(lines[0]), "date": record["date"]}
    assert record["n"] == SAMPLES
    assert record["reference_count"] == 40
    assert record["sampling"]["steps"] == 1
    assert record["extractor_weights"] == Look.weights
    assert {"version", "commit", "date", "weights", "seed", "precision"} <= set(record)


def test_a_number_says_where_it_is_from(whole):
    distance, agreement = whole[1]
    line = distance.provenance()
    for part in (
        "tiny (weights ",
        "classes of pictures",
        "EffNetLite0",
        "not at all",
        "steps 1",
        "fp32 on cpu",
    ):
        assert part in line
    assert "reference" not in agreement.provenance()
    assert agreement.sentence().startswith("level disagreement of 22 samples: 0.")


def test_both_networks_of_a_cascade_are_in_the_line_that_says_where_a_number_is_from():
    both = Result(of="up", weights=f"{'ab' * 32} after {'cd' * 32}").provenance()
    assert both.startswith(f"up (weights {'ab' * 8} after {'cd' * 8}); ")


def test_the_commit_is_that_of_the_code_or_unknown(monkeypatch):
    results.commit.cache_clear()
    monkeypatch.setattr(results, "_git", lambda folder, *words: None)
    assert results.commit() is None
    results.commit.cache_clear()
    answers = {"ls-files": "results.py", "status": " M file", "rev-parse": "abc"}
    monkeypatch.setattr(results, "_git", lambda folder, *words: answers[words[0]])
    assert results.commit() == "abc+"
    results.commit.cache_clear()
