"""The study: equal compute, a queue that goes on, and trials that are what they are called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from studies.__main__ import FULL, PAGE, main, run_all
from studies.figures import draw_all
from studies.longer import LATE, LONG, SAVED, WAKING
from studies.queue import all_trials
from studies.results import GROUPS, HEAD, read_results, table, tables
from studies.run import (
    _distances,
    claimed,
    first_levels,
    is_done,
    measured_at,
    result_path,
    run,
    work,
)
from studies.trials import DECAY, SETS, Trial, changed, images_at, total_flops

from matryoshka_diffusion.codecconfig import CodecRunConfig
from matryoshka_diffusion.metrics.networks import NAME
from matryoshka_diffusion.models.find import find_model
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.training import checkpoint
from matryoshka_diffusion.training.run_folder import differences
from matryoshka_diffusion.training.stages import learning_rates
from tiny_run import tiny_config


@cache
def trials() -> dict[str, Trial]:
    """All trials by name. To count their FLOPs takes seconds."""
    return {trial.name: trial for trial in all_trials()}


def trainings() -> list[Trial]:
    return [trial for trial in trials().values() if trial.settings is None]


def test_trials_have_their_own_names_and_equal_compute():
    assert len(trials()) == 239
    for trial in trainings():
        pictures, _, seed = trial.name.split("/")
        if pictures in (*LONG, LATE):
            continue
        assert sum(map(total_flops, trial.parts)) == pytest.approx(SETS[pictures].flops, rel=0.01)
        assert {part.train.seed for part in trial.parts} == {int(seed)}


def test_a_variant_differs_from_the_base_in_what_its_name_says():
    configs = {name: trial.config for name, trial in trials().items()}
    base, other = configs["emoji/mdm/0"], configs["emoji/eps-eps/0"]
    assert (other.process.prediction, other.process.weighting[0].name) == ("eps", "eps")
    assert other.model_copy(update={"process": base.process, "name": base.name}) == base
    mixed = configs["emoji/mixed/0"].train.stages
    assert [stage.mix for stage in mixed] == [(), (0.25, 0.25, 0.5)]
    assert mixed[1].images > base.train.stages[1].images, "coarse rows cost less"
    levels = configs["emoji/levels-4/0"].model.levels
    assert [level.side for level in levels] == [8, 16, 32, 64]
    assert levels[1].shift_ratio == 2.0, "as in the base"


@pytest.mark.parametrize("name", ["mdm", "joint", "coarse-0.75", "cascade", "latent"])
def test_the_rate_decays_in_the_last_stage_alone(name):
    for part in trials()[f"fashion/{name}/0"].parts:
        train, last = part.train, part.train.stages[-1]
        start, rate, batch = train.images - round(DECAY * last.images), last.lr, last.batch_size
        assert learning_rates(train, start - batch, batch)[0] == pytest.approx(rate, rel=0.01)
        halfway = (start + train.images) // 2
        assert learning_rates(train, halfway, batch)[0] == pytest.approx(rate / 2, rel=0.02)


def test_the_recipes_of_longer_trials_are_what_they_are_called():
    for name, pictures in LONG.items():
        plus, paper = (trials()[f"{name}/{recipe}/1"].config for recipe in ("plus", "paper"))
        assert total_flops(paper) == pytest.approx(pictures.flops, rel=0.01)
        assert total_flops(plus) == pytest.approx(pictures.flops / 3, rel=0.01)
        assert (paper.process.prediction, paper.process.weighting[0].name) == ("v", "v")
        assert (paper.train.decay_share, paper.train.lr_per_level) == (0.0, False)
        assert not any(stage.mix for stage in paper.train.stages)
        assert plus.train.lr_per_level
        rates = {(x.lr, x.batch_size) for run in (plus, paper) for x in run.train.stages}
        assert rates == {(1e-3, 16)}, "both recipes have the same steps"
        assert plus.train.stages[-1].mix[-1] == 0.5
        last = paper.train.stages[-1]
        assert last.images / last.batch_size > 2_800
    plus = trials()["emoji-long/plus/1"].config
    assert (plus.model, plus.sampling) == (preset("openmoji").model, preset("openmoji").sampling)
    perceptual = trials()["emoji-long/perceptual/1"].config
    assert perceptual.train.perceptual is not None
    assert "perceptual" in differences(plus, perceptual)
    semantic = trials()["emoji-long/semantic/1"].config
    assert semantic.model.levels[0].features == 12
    assert total_flops(semantic) == pytest.approx(total_flops(plus), rel=0.01)


def test_levels_that_wake_late_have_the_share_of_compute_that_is_claimed_for_them():
    awake, *others = (trials()[f"{LATE}/{name}/2"].config for name in WAKING)
    for config in others:
        assert total_flops(config) / total_flops(awake) == pytest.approx(SAVED, rel=0.01)
        assert config.model == awake.model == preset("openmoji-256").model
    mixed, late, middle = others
    for config, floors in ((awake, None), (mixed, None), (late, (-3.0,)), (middle, (-3.0,))):
        assert config.train.wake == config.sampling.wake == floors
    assert (
        mixed.train.stages[1].mix
        == late.train.stages[1].mix
        == preset("openmoji-256").train.stages[2].mix
    )


def test_a_trial_around_the_first_levels_of_a_model_starts_from_their_weights(tmp_path):
    folder = first_levels("openmoji", 1, tmp_path / "first")
    (weights, config), (shipped, _) = find_model(folder), find_model("openmoji")
    assert len(config.model.levels) == 1
    assert len(weights) < len(shipped)
    assert all(torch.equal(value, shipped[name].float()) for name, value in weights.items())
    Matryoshka.load(folder).sample(["red apple"], n=1, steps=1)


def test_points_lie_at_their_compute_in_the_last_stage():
    for trial in trainings():
        points, config = measured_at(trial), trial.config
        *earlier, last = [stage.images for stage in config.train.stages]
        assert points[1.0] == config.train.images
        assert min(points.values()) - sum(earlier) >= 0.09 * last
        if not earlier and trial.base is None:
            assert points.keys() == set(trial.points), "nothing comes before"
    config = trials()["emoji/mdm/0"].config
    half = images_at(config, total_flops(config) / 2)
    assert half == pytest.approx(config.train.stages[0].images, rel=1e-3)


# --- the queue -----------------------------------------------------------------------------------


@pytest.fixture
def queue(tmp_path, monkeypatch) -> Callable[[list[Trial]], list[str]]:
    """Works through a queue whose trials do nothing; one named `bad` fails."""
    ran: list[str] = []

    def stub(trial: Trial, _: object) -> dict[str, str]:
        ran.append(trial.name)
        if "bad" in trial.name:
            raise OSError("no space")
        return {"task": trial.name}

    def go(trials: list[Trial]) -> list[str]:
        ran.clear()
        assert work(trials, tmp_path, tmp_path) is not any("bad" in name for name in ran)
        return list(ran)

    monkeypatch.setattr("studies.run.run", stub)
    return go


def test_each_trial_is_run_once_by_one_worker(queue, tmp_path, capsys):
    first, bad, last = (Trial(f"set/{name}/0", tiny_config()) for name in ("one", "bad", "two"))
    with claimed(tmp_path / "locks" / "set-one-0.lock") as mine:
        assert mine
        assert queue([first]) == [], "another worker has it"
    assert queue([first, bad, last]) == [first.name, bad.name, last.name]
    assert f"failed: {bad.name}: no space" in capsys.readouterr().out
    assert queue([first, bad, last]) == [bad.name], "only this has no result"


CHANGES: dict[str, Callable[[Trial], Trial]] = {
    "seed": lambda trial: replace(trial, config=changed(trial.config, train__seed=7)),
    "default": lambda trial: replace(trial, config=changed(trial.config, sampling__rescale=0.5)),
    "points": lambda trial: replace(trial, points=(1.0,)),
    "samples": lambda trial: replace(trial, samples=5),
    "base": lambda trial: replace(trial, base=trial.config),
    "codec": lambda trial: replace(trial, codec=trials()["emoji/latent/0"].codec),
    "settings": lambda trial: replace(trial, settings={"steps": 2}),
}


def test_a_result_depends_on_all_of_its_trial_and_outlives_new_fields(queue, tmp_path):
    trial = Trial("emoji/mdm/0", tiny_config(), points=(0.5, 1.0))
    queue([trial])
    path = result_path(tmp_path, trial)
    stored = json.loads(path.read_text("utf-8"))
    del stored["asked"]["trained"]["runs"][0]["train"]["compile"]
    path.write_text(json.dumps(stored), "utf-8")
    assert is_done(tmp_path, trial)
    for name, change in CHANGES.items():
        assert not is_done(tmp_path, change(trial)), name
    results, outdated = read_results(tmp_path, [trial])
    assert results.keys() == {("emoji", "mdm")}
    assert not outdated
    assert read_results(tmp_path, [CHANGES["seed"](trial)]) == ({}, [trial.name])


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["emoji/mdn/0", "emoji", "cats/"])
def test_an_unknown_name_is_refused(name, capsys):
    with pytest.raises(SystemExit) as left:
        main(["run", "emoji/mdm/0", name])
    assert left.value.code == 2
    assert f"{name}: no trial" in capsys.readouterr().err


def test_names_choose_trials_and_folders(capsys):
    assert main(["list", "emoji/joint/0", "emoji/mdm/", "--small"]) == 0
    names = [line[6:] for line in capsys.readouterr().out.splitlines()]
    assert {"emoji/joint/0", "emoji/mdm/2", "emoji/mdm/0/ddim-10"} < set(names)
    assert all(name.startswith(("emoji/joint/0", "emoji/mdm/")) for name in names)


def test_workers_are_processes_and_a_failure_is_their_status(tmp_path, capfd):
    config = changed(tiny_config(), data={"source": "folder", "path": str(tmp_path / "none")})
    study = FULL._replace(runs=tmp_path, results=tmp_path)
    assert run_all(study, [Trial("emoji/mdm/0", config)], workers=1) == 1
    assert "failed: emoji/mdm/0" in capfd.readouterr().out


def test_the_page_has_the_tables_of_the_kept_results(tmp_path, monkeypatch, capsys):
    results, outdated = read_results(FULL.results, [*trials().values()])
    assert not outdated
    assert PAGE.read_text("utf-8") == f"{HEAD}{tables(results)}\n"
    page = tmp_path / "results.md"
    monkeypatch.setattr("studies.__main__.PAGE", page)
    monkeypatch.setattr("studies.__main__.FULL", FULL._replace(results=tmp_path))
    (tmp_path / "emoji").mkdir()
    old = {"task": "emoji/mdm/0", "asked": {"trained": None}}
    (tmp_path / "emoji" / "mdm-0.json").write_text(json.dumps(old), "utf-8")
    assert main(["page"]) == 0
    assert page.read_text("utf-8") == f"{HEAD}\n", "there is nothing of today's form"
    assert "left out: emoji/mdm/0" in capsys.readouterr().err


# --- one trial, whole ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_trial(tmp_path_factory) -> Trial:
    """Two classes of noise, a nest of two levels, few steps."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(20):
        picture = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path)
    config = tiny_config()
    config = changed(
        config,
        model__text=None,
        model__classes=2,
        model__levels=[{**x.model_dump(), "micro": ()} for x in config.model.levels],
        encoder=None,
        data={"source": "folder", "path": str(folder), "held_out": 0.2},
        train__checkpoint_every_images=16,
    )
    return Trial("emoji/mdm/0", config, points=(0.1, 1.0), samples=4)


@pytest.mark.parametrize(("classes", "count"), [(0, 1), (2, 3)])
def test_samples_without_classes_are_measured_by_their_distance_alone(
    small_trial, monkeypatch, classes, count
):
    def evaluate(model: Any, names: tuple[str, ...], **_: Any) -> list[SimpleNamespace]:
        return [SimpleNamespace(key=name, metric=name, value=1.0) for name in names]

    monkeypatch.setattr("studies.run.evaluate", evaluate)
    config = changed(small_trial.config, model__classes=classes)
    model: Any = SimpleNamespace(config=config)
    job: Any = SimpleNamespace(config=config)
    found = _distances(model, small_trial, job)
    assert len(found) == 1 + count  # and the name of the metric
    assert ("class_accuracy" in found) == (classes > 0)


def test_a_trial_is_trained_once_measured_and_sampled(small_trial, tmp_path, monkeypatch):
    runs, results = tmp_path / "work", tmp_path / "results"
    how = {"sampler": "ddim", "steps": 2, "guidance": [1.0]}
    sampled = replace(small_trial, name="emoji/mdm/0/ddim-10", settings=how)
    assert work([sampled, small_trial], results, runs), "samples need no result of their run"
    assert len([*runs.glob("runs/emoji/mdm/*")]) == 1, "one training"
    result, _ = read_results(results, [small_trial, sampled])
    trial, drawn = result["emoji", "mdm"]["0"], result["emoji", "mdm/ddim-10"]["0"]
    (point,) = trial["points"]  # at a tenth of the compute it has one level
    assert (point["share"], point["images"]) == (1.0, small_trial.config.train.images)
    assert trial["seconds"] > 0
    assert point[NAME] > 0
    assert 0 <= point["class_accuracy"] <= 1
    assert drawn["fd_classes"] > 0
    assert trial["held_out_loss"].keys() == trial["seen_loss"].keys() == {"8", "16"}
    assert trial["prompts_found"] is trial["prompts_found_in_one_step"] is None
    assert (drawn["settings"]["sampler"], drawn["evaluations"]) == ("ddim", 2)
    assert trial["metric"].startswith(f"{NAME} [n = 4 <="), "the product's own name and its flag"
    assert {"commit", "date", "machine"} <= trial.keys() & drawn.keys()
    assert str(tmp_path) not in json.dumps(drawn), "its place is private"
    (path,) = draw_all(result, tmp_path / "plots")
    assert path.name == "e-solvers.png"
    assert tables(result).splitlines()[-1].startswith("| ddim-10 |")
    # A kill while a hook writes leaves weights without a config, before the step's checkpoint.
    (folder,) = runs.glob("runs/emoji/mdm/*/run")
    weights = (folder / "points" / "1" / "model.safetensors").read_bytes()
    (folder / "points" / "1" / "config.json").unlink()
    (folder / "points" / "1" / "model.safetensors").write_bytes(b"half")
    newest = checkpoint.newest(folder / "checkpoints")
    assert newest is not None
    shutil.rmtree(newest)
    _stub_evaluation(monkeypatch)
    assert run(small_trial, runs)["held_out_loss"] == trial["held_out_loss"]
    assert (folder / "points" / "1" / "model.safetensors").read_bytes() == weights


def _stub_evaluation(monkeypatch) -> list:
    """Collects the models that would be measured."""
    models: list = []

    def evaluate(model, metrics, **__):
        models.append(model)
        names = [metrics] if isinstance(metrics, str) else metrics
        return [SimpleNamespace(key=name, metric=NAME, value=1.0) for name in names]

    monkeypatch.setattr("studies.run.evaluate", evaluate)
    return models


def test_a_cascade_is_trained_and_sampled_with_both_networks(small_trial, tmp_path, monkeypatch):
    config, models = small_trial.config, _stub_evaluation(monkeypatch)
    inner, outer = (level.model_dump() for level in config.model.levels)
    one = changed(config, train__stages=[config.train.stages[0].model_dump()], data__side=16)
    large = {"model__levels": [outer], "model__coarse": {"side": 8}}
    upsampler = changed(one, **large, sampling__coarse_noise=0.3)
    base = changed(one, model__levels=[inner])
    trial = Trial("emoji/cascade/0", upsampler, points=(0.25, 1.0), base=base, samples=4)
    result = run(trial, tmp_path / "work")
    assert [point["share"] for point in result["points"]] == [1.0]
    assert len(result["parameters"]) == 2
    assert (result["held_out_loss"], result["codec_flops"]) == (None, 0.0)
    assert result["config"]["sampling"]["base"]["path"].startswith("runs/emoji/cascade/0-")
    noised = replace(trial, name="emoji/cascade/0/noise-1", settings={"coarse_noise": 1.0})
    assert run(noised, tmp_path / "work")["settings"]["coarse_noise"] == 1.0
    assert all(len(model.resolutions) == 2 for model in models), "the base's and its own"


def test_a_model_of_codes_gets_its_codec_first(small_trial, tmp_path, monkeypatch):
    config, _ = small_trial.config, _stub_evaluation(monkeypatch)
    widths = {"side": 16, "widths": (8, 8, 8), "images": 8, "batch_size": 4}
    codec = CodecRunConfig(name="tiny", data=config.data, **widths)
    on_codes = changed(
        config,
        model__levels=[{**config.model.levels[0].model_dump(), "side": 4}],
        model__channels=4,
        train__stages=[config.train.stages[0].model_dump()],
        sampling__threshold=["none"],
        codec={"factor": 4},
    )
    result = run(Trial("emoji/latent/0", on_codes, codec=codec, samples=4), tmp_path / "work")
    assert result["config"]["codec"]["path"] == "codecs/emoji/codec"
    assert result["codec_flops"] > 0


# --- tables and figures --------------------------------------------------------------------------


STAGE = {"levels": 1, "images": 640, "batch_size": 32}


def finished(*finals: float, losses: dict[str, float] | None = None) -> dict[str, dict]:
    """The results of a trial by seed, with these final distances."""
    return {
        str(seed): {
            "config": {"model": {"levels": [{}]}, "train": {"stages": [STAGE]}},
            "parameters": [7_200_000],
            "flops": 2e12,
            "codec_flops": 5e11,
            "seconds": 600.0 + seed,
            "metric": "FD, 4 samples",
            "points": [{"share": share, NAME: final / share} for share in (0.5, 1.0)],
            "prompts_found": 0.25 * seed,
            "held_out_loss": losses,
        }
        for seed, final in enumerate(finals)
    }


def test_a_table_compares_with_the_base_of_the_same_seed():
    results = {
        ("emoji", "mdm"): finished(100.0, 200.0, 600.0, losses={"16": 0.5, "64": 0.25}),
        ("emoji", "x0-v"): finished(110.0, 210.0, losses={"16": 0.25, "64": 0.125}),
        ("emoji", "shift-power-1"): finished(1500.0, losses={"16": 0.1, "64": 0.1}),
    }
    head, _, columns, _, *rows = table(results, GROUPS["f-choices"], "emoji").splitlines()
    assert head == "OpenMoji 64: FD, 4 samples"
    assert columns == (
        f"| choice | {NAME} | against the base | seeds | prompts found | held-out loss | "
        "parameters | wall seconds |"
    )
    assert rows == [
        "| x0-v_clipped | 300 (100 to 600) | the base | 3 | 0.25 (0 to 0.5) | 16: 0.5, 64: 0.25 | "
        "7.2 M | 601 |",
        "| x0-v | 160 (110 to 210) | +7.5% (+5.0 to +10.0) | 2 | 0.125 (0 to 0.25) | "
        "16: 0.25, 64: 0.125 | 7.2 M | 600 |",
        "| shift-power-1 | 1,500 | +1400.0% | 1 | 0 |  | 7.2 M | 600 |",
    ]


def test_tables_leave_out_groups_sets_and_columns_without_results():
    results = {("fashion", "mdm"): finished(3.0), ("emoji", "mdm"): finished(3.0)}
    assert tables(results) == "", "there is nothing to compare the base with"
    text = tables(results | {("fashion", "finest"): finished(4.0)})
    assert text.startswith("## (a) Families")
    assert "Fashion-MNIST" in text
    assert "OpenMoji" not in text
    assert "held-out loss" not in text


@pytest.fixture
def figures(tmp_path, monkeypatch) -> Callable[[dict], list[Figure]]:
    """Draws results, without writing."""

    def draw(results: dict) -> list[Figure]:
        drawn: list[Figure] = []
        monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
        draw_all(results, tmp_path)
        return drawn

    return draw


def everything(pictures: str) -> dict[tuple[str, str], dict]:
    """Results of all that a set's groups compare, of two seeds."""
    variants = {v for group in GROUPS.values() for v in group.variants(pictures).values()}
    return {(pictures, v): finished(100.0 + n, 120.0 + n) for n, v in enumerate(sorted(variants))}


def test_every_figure_has_a_panel_for_each_set_and_its_legend_below(figures):
    one, both = figures(everything("emoji")), figures(everything("emoji") | everything("fashion"))
    for drawn, wanted in ((one, ["OpenMoji 64"]), (both, ["Fashion-MNIST 32", "OpenMoji 64"])):
        assert len(drawn) == len(GROUPS)
        for figure in drawn:
            assert [x.get_title() for x in figure.axes if x.get_title()] == wanted
            figure.draw_without_rendering()  # lays it out
            panels = [axis.get_window_extent() for axis in figure.axes]
            for legend in figure.legends:
                box = legend.get_window_extent()
                assert all(box.y1 < panel.y0 for panel in panels)
                assert box.x0 >= 0
                assert box.x1 <= figure.bbox.width
    curve = one[0].axes[0].lines[0]
    assert list(curve.get_xdata()) == [1.5, 2.5], "TFLOPs, with the codec's before"


def test_steps_with_the_finest_level_are_counted_and_their_power_is_fitted(figures):
    def trial(images: int, distance: float) -> dict:
        result = finished(distance)["0"]
        coarse, fine = {**STAGE, "images": 3_200}, {**STAGE, "levels": 2, "images": images}
        config = {"model": {"levels": [{}, {}]}, "train": {"stages": [coarse, fine]}}
        return {"0": {**result, "config": config}}

    power = {
        ("fashion", name): trial(images, 500.0 * images**-0.5)
        for name, images in (("mdm", 320), ("joint", 640), ("mixed", 3_200))
    }
    *_, drawn = figures(power | {("fashion", "eps-eps"): trial(320, 1e4)})
    (axis,) = drawn.axes
    fit, *points = axis.lines
    assert "-0.50: 100 %" in fit.get_label()
    assert sorted(x for point in points for x in point.get_xdata()) == [10, 20, 100]


def test_a_panel_has_common_seeds_and_shows_no_small_difference_large(figures):
    results = {("emoji", "mdm"): finished(100.0, 400.0), ("emoji", "joint"): finished(101.0)}
    (axis,) = next(x for x in figures(results) if "Length" in x.get_suptitle()).axes
    assert sorted(axis.lines[0].get_ydata()) == [100.0, 101.0], "seed 0"
    low, high = axis.get_ylim()
    assert high - low == pytest.approx(0.2 * 100.5)
