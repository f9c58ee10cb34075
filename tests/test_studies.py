"""The study: equal compute, a queue that goes on, and trials that are what they are called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from studies.__main__ import PAGE, RESULTS, main, parse
from studies.compute import images_at, spent, with_budget
from studies.figures import FIGURES, draw_all
from studies.queue import claimed, is_done, result_path, work
from studies.results import (
    GROUPS,
    PLACE,
    Spread,
    against,
    curve,
    distance,
    filled,
    of_today,
    read_results,
    seeds_of,
    shared,
    table,
    tables,
)
from studies.run import _seconds, measured_at, run
from studies.trials import DECAY, SETS, Drawing, Trial, all_drawings, all_trials, changed

from matryoshka_diffusion.config import CodecRunConfig
from matryoshka_diffusion.metrics.networks import NAME
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.train import checkpoint
from matryoshka_diffusion.train.stages import learning_rate
from tiny_run import tiny_config

TRIALS = all_trials()


def test_every_trial_has_its_own_name_and_the_compute_of_its_set():
    names = [task.name for task in [*TRIALS, *all_drawings()]]
    assert len(set(names)) == len(names)
    for trial in TRIALS:
        runs = [(part.model, part.train) for part in trial.parts]
        flops = sum(spent(model, train.stages, train.images) for model, train in runs)
        assert flops == pytest.approx(trial.set.flops, rel=0.01)
        assert {train.seed for _, train in runs} == {int(trial.name.split("/")[2])}


@pytest.mark.parametrize("name", ["mdm", "joint", "coarse-0.75", "cascade", "latent"])
def test_the_rate_decays_in_the_last_stage_alone_over_the_same_share_of_it(name):
    [trial] = [trial for trial in TRIALS if trial.name == f"fashion/{name}/0"]
    for part in trial.parts:
        train, last = part.train, part.train.stages[-1]
        start, rate, batch = train.images - round(DECAY * last.images), last.lr, last.batch_size
        assert learning_rate(train, start - batch, batch) == pytest.approx(rate, rel=0.01)
        halfway = (start + train.images) // 2
        assert learning_rate(train, halfway, batch) == pytest.approx(rate / 2, rel=0.02)


def test_a_variant_differs_from_the_base_in_what_its_name_says():
    trials = {trial.name: trial.config for trial in TRIALS}
    base, other = trials["emoji/mdm/0"], trials["emoji/eps-eps/0"]
    assert other.process.prediction == "eps"
    assert other.process.weighting[0].name == "eps"
    assert other.model_copy(update={"process": base.process, "name": base.name}) == base
    mixed = trials["emoji/mixed/0"].train.stages
    assert [stage.mix for stage in mixed] == [(), (0.25, 0.25, 0.5)]
    assert mixed[1].images > base.train.stages[1].images, "coarse rows cost less"
    sides = [level.side for level in trials["emoji/levels-4/0"].model.levels]
    assert sides == [8, 16, 32, 64]
    assert trials["emoji/levels-4/0"].model.levels[1:][0].shift_ratio == 2.0, "as in the base"


def test_compute_is_counted_back_to_where_it_was_spent():
    config = preset("openmoji")
    stages = with_budget(config.model, config.train.stages, (0.3, 0.0, 0.7), 1e13)
    assert [stage.levels for stage in stages] == [1, 3], "an empty stage goes"
    total = spent(config.model, stages, sum(stage.images for stage in stages))
    for share in (0.1, 0.3, 0.6, 1.0):
        images = images_at(config.model, stages, share)
        assert spent(config.model, stages, images) == pytest.approx(share * total, rel=1e-3)


@pytest.mark.parametrize("trial", [x for x in TRIALS if x.name.endswith("/0")], ids=str)
def test_points_lie_in_the_last_stage_and_not_at_its_beginning(trial):
    points = measured_at(trial)
    stages = trial.config.train.stages
    begun = sum(stage.images for stage in stages[:-1])
    assert points[1.0] == trial.config.train.images
    assert min(points.values()) - begun >= 0.09 * stages[-1].images
    if len(stages) == 1 and trial.base is None:
        assert points.keys() == set(trial.points), "nothing comes before"


# --- the queue -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chore:
    name: str
    needs: Mapping[str, dict[str, str]] = field(default_factory=dict)
    form: str = "first"

    @property
    def asked(self) -> dict[str, str]:
        return {"form": self.form}


def test_a_task_is_done_once_and_after_what_it_needs(tmp_path):
    done: list[str] = []
    late, first = (
        Chore("set/late/0", needs={"set/first/0": {"form": "first"}}),
        Chore("set/first/0"),
    )

    def go_through() -> list[str]:
        def do(task: Chore) -> dict[str, str]:
            done.append(task.name)
            return {"task": task.name}

        results, locks = tmp_path / "results", tmp_path / "locks"
        return [name for name, _ in work([late, first], do, results, locks)]

    assert go_through() == ["set/first/0", "set/late/0"]
    assert go_through() == []
    assert done == ["set/first/0", "set/late/0"]
    stored = json.loads(result_path(tmp_path / "results", first.name).read_text("utf-8"))
    assert stored == {"task": "set/first/0", "asked": {"form": "first"}}
    first = Chore("set/first/0", form="second")
    assert go_through() == ["set/first/0"], "it asks something else now"
    late = Chore("set/late/0", needs={"set/first/0": {"form": "first"}}, form="second")
    assert go_through() == [], "what it needs is of another form"


def test_what_another_worker_has_is_left_to_it(tmp_path):
    task = Chore("set/one/0")
    with claimed(tmp_path / "set-one-0.lock") as mine:
        assert mine
        assert list(work([task], lambda _: {}, tmp_path / "results", tmp_path)) == []
    (outcome,) = work([task], lambda _: {}, tmp_path / "results", tmp_path)
    assert outcome == ("set/one/0", None)


def test_a_task_that_fails_is_told_of_and_the_others_go_on(tmp_path):
    def do(task: Chore) -> dict[str, str]:
        if task.name == "set/bad/0":
            raise OSError("no space")
        return {"task": task.name}

    tasks = [
        Chore("set/bad/0"),
        Chore("set/after/0", needs={"set/bad/0": {"form": "first"}}),
        Chore("set/good/0"),
    ]
    outcomes = dict(work(tasks, do, tmp_path / "results", tmp_path))
    assert str(outcomes.pop("set/bad/0")) == "no space"
    assert outcomes == {"set/good/0": None}
    assert [path.name for path in (tmp_path / "results" / "set").iterdir()] == ["good-0.json"]


# --- what a result is of -------------------------------------------------------------------------


def _set(path: str, value: object) -> Callable[[Trial], Trial]:
    return lambda trial: replace(trial, config=changed(trial.config, {path: value}))


CHANGES: dict[str, Callable[[Trial], Trial]] = {
    "seed": _set("train.seed", 7),
    "stage": _set("train.stages", [{"levels": 1, "images": 32, "batch_size": 8, "lr": 0.1}]),
    "default": _set("sampling.rescale", 0.5),
    "points": lambda trial: replace(trial, points=(1.0,)),
    "samples": lambda trial: replace(trial, samples=5),
    "base": lambda trial: replace(trial, base=trial.config),
    "codec": lambda trial: replace(trial, codec=SETS["emoji"].codec),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_result_is_of_all_that_its_trial_depends_on(change, tmp_path):
    trial = Trial("emoji/mdm/0", tiny_config(), points=(0.5, 1.0))
    list(work([trial], lambda _: {}, tmp_path, tmp_path))
    assert is_done(tmp_path, trial)
    assert not is_done(tmp_path, CHANGES[change](trial))


def test_a_result_stays_when_a_field_is_new(tmp_path):
    trial = Trial("emoji/mdm/0", tiny_config())
    list(work([trial], lambda _: {}, tmp_path, tmp_path))
    path = result_path(tmp_path, trial.name)
    stored = json.loads(path.read_text("utf-8"))
    del stored["asked"]["trained"]["runs"][0]["train"]["compile"]
    path.write_text(json.dumps(stored), "utf-8")
    assert is_done(tmp_path, trial)


def test_a_drawing_is_of_the_trial_whose_network_draws():
    for drawing in all_drawings():
        assert drawing.name.startswith(f"{drawing.trial.name}/")
        assert drawing.needs == {drawing.trial.name: drawing.trial.asked}
        assert drawing.asked["trial"] == drawing.trial.asked


def test_results_of_another_form_are_left_out_of_what_is_told():
    kept, old = Chore("emoji/joint/0"), Chore("emoji/finest/0")
    results = {each.name: {"task": each.name, "asked": each.asked} for each in (kept, old)} | named(
        {"emoji/gone": finished(1.0)}
    )
    today = [kept, replace(old, form="second")]
    assert of_today(results, today).keys() == {kept.name}


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        "run emoji/mdm/0 fashion/ --workers 2 --work w",
        "--work w run --workers=2 emoji/mdm/0 fashion/",
        "run --workers 2 --work w -- emoji/mdm/0 fashion/",
    ],
)
def test_workers_are_given_what_was_asked_for_in_any_order(arguments, monkeypatch):
    started = []

    class Worker:
        status = 0

        def __init__(self, command: list[str]) -> None:
            assert command[1:3] == ["-m", "studies"]
            started.append(parse(command[3:]))

        def wait(self) -> int:
            return self.status

    monkeypatch.setattr("subprocess.Popen", Worker)
    assert main(arguments.split()) == 0
    workers, Worker.status = list(started), -9  # killed
    assert main(arguments.split()) == 1
    alone = parse(["run", "emoji/mdm/0", "fashion/", "--work", "w"])
    assert alone.workers == 1
    assert workers == [alone, alone]


def test_a_drawing_wants_its_network_trained_before_or_with_it(tmp_path, capsys):
    drawing, results = "emoji/mdm/0/ddim-10", f"--results={tmp_path}"
    with pytest.raises(SystemExit):
        parse(["run", drawing, results])
    assert f"{drawing} draws with what emoji/mdm/0 trains" in capsys.readouterr().err
    assert parse(["run", drawing, "emoji/mdm/0", results]).names == [drawing, "emoji/mdm/0"]


@pytest.mark.parametrize("name", ["emoji/mdn/0", "emoji", "cats/"])
def test_a_name_that_nothing_has_is_refused(name, capsys):
    with pytest.raises(SystemExit) as left:
        main(["run", "emoji/mdm/0", name])
    assert left.value.code == 2
    assert f"{name}: no trial" in capsys.readouterr().err


# --- one trial, whole ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_trial(tmp_path_factory) -> Trial:
    """Two classes of noise, a nest of two levels, 8 steps."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(40):
        picture = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(picture).save(path)
    config = tiny_config()
    levels = [x.model_copy(update={"micro": ()}).model_dump() for x in config.model.levels]
    update = {
        "model.text": None,
        "model.classes": 2,
        "model.levels": levels,
        "encoder": None,
        "data": {"source": "folder", "path": str(folder), "held_out": 0.2},
        "train.checkpoint_every_images": 16,
    }
    return Trial("emoji/mdm/0", changed(config, update), points=(0.1, 1.0), samples=4)


@pytest.fixture(scope="module")
def whole(small_trial, tmp_path_factory):
    """A folder with the trial and a drawing of it done, and their results."""
    folder = tmp_path_factory.mktemp("study")
    how = {"sampler": "ddim", "steps": 2, "guidance": [1.0]}
    drawing = Drawing("emoji/mdm/0/ddim-10", how, small_trial, samples=4)
    tasks, results = [drawing, small_trial], folder / "results"
    outcomes = dict(work(tasks, lambda task: run(task, folder / "work"), results, folder / "locks"))
    assert outcomes == {small_trial.name: None, drawing.name: None}
    return folder / "work", read_results(results)


def test_a_trial_is_trained_measured_and_drawn_from(whole, tmp_path):
    results = whole[1]
    trial, drawn = (results[name] for name in ("emoji/mdm/0", "emoji/mdm/0/ddim-10"))
    assert [point["share"] for point in trial["points"]] == [1.0], "at 0.1 it has one level"
    assert trial["points"][0]["images"] == sum(trial["images"]) == 48
    assert 0 < trial["points"][0]["seconds"] <= trial["seconds"]
    assert trial["points"][0][NAME] > 0
    assert trial["held_out_loss"].keys() == trial["seen_loss"].keys() == {"8", "16"}
    assert trial["prompts_found"] is None
    assert drawn["settings"]["sampler"] == "ddim"
    assert drawn["evaluations"] == 2
    assert trial["metric"].startswith(f"{NAME} [n = 4 <="), "the product's own name and its flag"
    assert {"commit", "date", "machine"} <= trial.keys() & drawn.keys()
    (path,) = draw_all(results, tmp_path / "plots")
    assert path.name == "e-solvers.png"
    assert [line.split(" | ")[0] for line in tables(results).splitlines()[-1:]] == ["| ddim-10"]


def test_a_folder_of_another_form_of_the_trial_is_refused(small_trial, whole, tmp_path):
    other = replace(small_trial, points=(0.5, 1.0))
    drawing = Drawing("emoji/mdm/0/ddim-10", {"steps": 2}, other, samples=4)
    elsewhere = replace(drawing, trial=small_trial)
    for task, folder in ((other, whole[0]), (drawing, whole[0]), (elsewhere, tmp_path / "none")):
        with pytest.raises(ValueError, match=r"runs/emoji/mdm/0 .*: remove it"):
            run(task, folder)


def test_a_point_whose_writing_was_cut_off_is_written_again(small_trial, whole, tmp_path):
    """A kill while a hook writes leaves weights without a config, before the step's checkpoint.

    The repeated step finds the same numbers; another seed finds others.
    """
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "runs" / small_trial.name
    (folder / "points" / "1" / "config.json").unlink()
    (folder / "points" / "1" / "model.safetensors").write_bytes(b"half")
    newest = checkpoint.newest(folder / "checkpoints")
    assert newest is not None
    shutil.rmtree(newest)
    once, again = whole[1][small_trial.name], run(small_trial, tmp_path)
    assert again["points"][0][NAME] == once["points"][0][NAME]
    assert again["held_out_loss"] == once["held_out_loss"]
    other = replace(small_trial, config=changed(small_trial.config, {"train.seed": 1}))
    assert run(other, tmp_path / "other")["points"][0][NAME] != once["points"][0][NAME]


def test_seconds_are_those_of_a_training_that_never_paused(tmp_path):
    rates = [(100, 0, 10.0), (200, 0, 1.0), (300, 0, 10.0), (400, 1, 4.0), (500, 1, 5.0)]
    keys = ("images_seen", "stage", "images_per_second")
    lines = [json.dumps(dict(zip(keys, line, strict=True))) for line in rates]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "{}"]))
    assert _seconds(tmp_path, 300) == pytest.approx(30)
    assert _seconds(tmp_path, 500) == pytest.approx(30 + 200 / 4.5)


# --- what came out -------------------------------------------------------------------------------


def test_spread_and_seeds():
    results = {
        f"fashion/{name}": {"task": f"fashion/{name}", "points": [{NAME: value}]}
        for name, value in {"mdm/0": 1.0, "mdm/1": 3.0, "mdm-2/0": 9.0}.items()
    }
    results["fashion/mdm/0/ddim-10"] = {"task": "fashion/mdm/0/ddim-10", NAME: 7.0}
    assert distance(seeds_of(results, "fashion", "mdm")) == Spread(2.0, 1.0, 3.0, 2)
    assert distance(seeds_of(results, "fashion", "mdm/ddim-10")) == Spread(7.0, 7.0, 7.0, 1)
    assert distance(seeds_of(results, "emoji", "mdm")) is None
    assert set(SETS) == {"fashion", "emoji"}


def finished(*finals: float | None, losses: dict[str, float] | None = None) -> list[dict]:
    """The results of a trial's seeds by their final distances; None: it failed."""
    return [
        {"failed": "step 9: the loss is not finite"}
        if final is None
        else {
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
    ]


def named(trials: dict[str, list[dict]]) -> dict[str, dict]:
    """Results by task, of a set's variants."""
    return {
        f"{name}/{seed}": {"task": f"{name}/{seed}", **found}
        for name, results in trials.items()
        for seed, found in enumerate(results)
    }


def test_a_table_compares_with_the_base_of_the_same_seed_and_says_what_failed():
    results = named(
        {
            "emoji/mdm": finished(100.0, 200.0, 600.0, losses={"16": 0.5, "64": 0.25}),
            "emoji/x0-v": finished(110.0, 210.0, losses={"16": 0.25, "64": 0.125}),
            "emoji/v-v": finished(50.0, None),
            "emoji/eps-eps": finished(None),
            "emoji/shift-power-1": finished(1500.0, losses={"16": 0.1, "64": 0.1}),
        }
    )
    assert against(results, "emoji", "x0-v", "mdm") == pytest.approx((0.075, 0.05, 0.1, 2))
    head, _, columns, _, *rows = table(results, GROUPS["f-choices"], SETS["emoji"]).splitlines()
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
        "| v-v | 50 | -50.0% | 1, 1 failed: not finite | 0 |  | 7.2 M | 600 |",
        "| eps-eps | failed: not finite |  | 1 |  |  |  |  |",
        "| shift-power-1 | 1,500 | +1400.0% | 1 | 0 |  | 7.2 M | 600 |",
    ]


def test_tables_leave_out_what_nothing_is_known_of():
    results = named({"fashion/mdm": finished(3.0), "emoji/mdm": finished(3.0)})
    assert tables(results) == "", "there is nothing to compare the base with"
    for result in results.values():
        result["prompts_found"] = None
    told = tables(results | named({"fashion/finest": finished(4.0)}))
    assert told.startswith("### (a) Families")
    assert "Fashion-MNIST" in told
    assert "OpenMoji" not in told
    told = tables(results | named({"fashion/eps-eps": finished(None)}))
    assert "prompts found" not in told


def test_the_page_has_the_tables_of_the_results_that_are_kept():
    page = PAGE.read_text("utf-8")
    results = of_today(read_results(RESULTS), [*all_trials(), *all_drawings()])
    assert filled(page, results) == page
    places = {(name, pictures) for _, name, pictures, _ in PLACE.findall(page)}
    for pictures in SETS.values():
        for name, group in GROUPS.items():
            assert (name, pictures.name) in places or not table(results, group, pictures)


def test_a_table_of_a_page_is_replaced_and_the_rest_stays():
    page = "# Title\n<!-- table a-families emoji -->\nold\n<!-- /table -->\nrest\n"
    without = filled(page, {})
    assert without == page.replace("old\n", "\n")
    with pytest.raises(KeyError, match="nowhere"):
        filled(page.replace("emoji", "nowhere"), {})


def test_the_command_page_fills_the_page_and_names_what_it_leaves_out(
    tmp_path, monkeypatch, capsys
):
    page, old = tmp_path / "results.md", tmp_path / "emoji" / "mdm-0.json"
    page.write_text("<!-- table a-families emoji -->\nold\n<!-- /table -->\n", "utf-8")
    old.parent.mkdir()
    old.write_text(json.dumps({"task": "emoji/mdm/0", "asked": {"trained": None}}), "utf-8")
    monkeypatch.setattr("studies.__main__.PAGE", page)
    assert main(["page", "--results", str(tmp_path)]) == 0
    assert page.read_text("utf-8") == filled(page.read_text("utf-8"), {})
    assert "old" not in page.read_text("utf-8")
    assert "left out: emoji/mdm/0" in capsys.readouterr().err


def test_a_curve_is_along_the_compute():
    line = curve(finished(10.0, 30.0))
    assert line == [(1.5e12, Spread(40.0, 20.0, 60.0, 2)), (2.5e12, Spread(20.0, 10.0, 30.0, 2))]


def everything(pictures: str) -> dict[str, dict]:
    """Results of all that a set's groups compare, of two seeds."""
    variants = {v for group in GROUPS.values() for v in group.variants(SETS[pictures]).values()}
    found = {}
    for n, variant in enumerate(sorted(variants)):
        name, *setting = variant.split("/")
        for seed, result in enumerate(finished(100.0 + n, 120.0 + n)):
            if setting:
                result = {NAME: result.pop("points")[-1][NAME], **result}
            task = "/".join([pictures, name, str(seed), *setting])
            found[task] = {"task": task, **result}
    return found


def test_every_figure_has_a_panel_for_each_set_with_results_and_its_legend_below(
    tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_all(everything("emoji"), tmp_path)
    draw_all(everything("emoji") | everything("fashion"), tmp_path)
    titles = [[x.get_title() for x in figure.axes if x.get_title()] for figure in drawn]
    assert titles[: len(FIGURES)] == [["OpenMoji 64"]] * len(FIGURES)
    assert titles[len(FIGURES) :] == [["Fashion-MNIST 32", "OpenMoji 64"]] * len(FIGURES)
    for figure in drawn:
        figure.draw_without_rendering()  # lays it out
        assert figure.bbox.width >= 560, "wide enough to read"
        panels = [axis.get_window_extent() for axis in figure.axes]
        assert all(axis.get_xlabel() or axis.get_ylabel() for axis in figure.axes)
        assert not any(axis.get_legend() for axis in figure.axes)
        for legend in figure.legends:
            box = legend.get_window_extent()
            assert all(box.y1 < panel.y0 for panel in panels)
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.width
    assert [len(figure.legends) for figure in drawn[: len(FIGURES)]] == [1, 0, 1, 1, 1, 1, 1]


def test_a_panel_is_of_the_seeds_that_all_of_it_have():
    """The base often has more: its mean over them is no mark for what has one."""
    results = named({"fashion/mdm": finished(3.0, 4.0, 5.0), "fashion/mixed": finished(2.0, None)})
    compared = shared(results, "fashion", ["mdm", "mixed", "x0-v"])
    assert sorted(compared) == [f"fashion/{name}/{n}" for name in ("mdm", "mixed") for n in (0, 1)]
    assert shared(results, "fashion", ["x0-v"]) == {}


def test_a_small_difference_does_not_fill_a_panel(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw_all(named({"emoji/mdm": finished(100.0), "emoji/joint": finished(101.0)}), tmp_path)
    (axis,) = next(figure for figure in drawn if "Length" in figure.get_suptitle()).axes
    low, high = axis.get_ylim()
    assert high - low == pytest.approx(0.2 * 100.5)


# --- other families ------------------------------------------------------------------------------


def test_a_cascade_is_trained_and_drawn_with_both_networks(small_trial, tmp_path):
    config = small_trial.config
    inner, outer = config.model.levels
    stage = config.train.stages[0].model_dump()
    alone = {"train.stages": [stage], "data.side": 16}
    base = changed(config, {**alone, "model.levels": [inner.model_dump()]})
    large = {"model.levels": [outer.model_dump()], "model.coarse": {"side": 8}}
    upsampler = changed(config, {**alone, **large, "sampling.coarse_noise": 0.3})
    trial = Trial("emoji/cascade/0", upsampler, points=(0.25, 1.0), base=base, samples=4)
    found = run(trial, tmp_path / "work")
    assert [point["share"] for point in found["points"]] == [1.0]
    assert len(found["parameters"]) == 2
    assert found["held_out_loss"] is None
    assert found["codec_flops"] == 0.0
    how = {"coarse_noise": 1.0, "guidance": [1.0]}
    noised = Drawing("emoji/cascade/0/noise-1", how, trial, samples=4)
    assert run(noised, tmp_path / "work")[NAME] != found["points"][0][NAME]


def test_a_model_of_codes_gets_its_codec_first(small_trial, tmp_path):
    codec = CodecRunConfig(
        name="tiny", data=small_trial.config.data, side=16, widths=(8, 8, 8), images=8, batch_size=4
    )
    inner = small_trial.config.model.levels[0]
    on_codes = {
        "model.levels": [inner.model_dump() | {"side": 4}],
        "model.channels": 4,
        "train.stages": [small_trial.config.train.stages[0].model_dump()],
        "sampling.threshold": ["none"],
        "codec": {"factor": 4},
    }
    trial = Trial("emoji/latent/0", changed(small_trial.config, on_codes), codec=codec, samples=4)
    found = run(trial, tmp_path / "work")
    assert found["config"]["codec"]["path"] == "codecs/emoji/codec"
    assert found["points"][0][NAME] > 0
    assert found["codec_flops"] > 0
