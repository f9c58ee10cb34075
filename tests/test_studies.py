"""The study: equal compute, a queue that goes on, and trials that are what they are called."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from studies import measures
from studies.compute import images_at, spent, with_budget
from studies.drawings import Drawing, all_drawings
from studies.figures import FIGURES, draw_all
from studies.queue import claimed, result_path, work
from studies.run import run
from studies.table import Spread, distance, read_results, seeds_of, summary
from studies.trials import SETS, Trial, all_trials

from matryoshka_diffusion.config import DataConfig, RunConfig, override
from matryoshka_diffusion.eval.features import NAME
from matryoshka_diffusion.presets import preset
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


# --- the queue -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chore:
    name: str
    needs: tuple[str, ...] = ()


def test_a_task_is_done_once_and_after_what_it_needs(tmp_path):
    done: list[str] = []
    late, first = Chore("set/late/0", needs=("set/first/0",)), Chore("set/first/0")

    def go_through() -> list[str]:
        def do(task: Chore) -> dict[str, str]:
            done.append(task.name)
            return {"task": task.name}

        return list(work([late, first], do, tmp_path / "results", tmp_path / "locks"))

    assert go_through() == ["set/first/0"]
    assert go_through() == ["set/late/0"]
    assert go_through() == []
    assert done == ["set/first/0", "set/late/0"]
    stored = json.loads(result_path(tmp_path / "results", first.name).read_text("utf-8"))
    assert stored == {"task": "set/first/0"}


def test_what_another_worker_has_is_left_to_it(tmp_path):
    task = Chore("set/one/0")
    with claimed(tmp_path / "set-one-0.lock") as mine:
        assert mine
        assert list(work([task], lambda _: {}, tmp_path / "results", tmp_path)) == []
    assert list(work([task], lambda _: {}, tmp_path / "results", tmp_path)) == ["set/one/0"]


def test_a_task_that_fails_is_not_done(tmp_path):
    def fail(_: Chore) -> dict[str, str]:
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        list(work([Chore("set/one/0")], fail, tmp_path / "results", tmp_path))
    assert not (tmp_path / "results").exists()


# --- one trial, whole ----------------------------------------------------------------------------


@pytest.fixture
def small_trial(tmp_path: Path) -> Trial:
    """Two classes of noise, a nest of two levels, 8 steps."""
    for number in range(40):
        picture = np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8)
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    config = tiny_config()
    model = config.model.model_copy(update={"text": None, "classes": 2})
    model = model.model_copy(
        update={"levels": tuple(x.model_copy(update={"micro": ()}) for x in model.levels)}
    )
    data = DataConfig(source="folder", path=str(tmp_path / "pictures"), held_out=0.2)
    bare = config.model_dump() | {"model": model.model_dump(), "data": data.model_dump()}
    bare |= {"encoder": None}
    made = override(RunConfig.model_validate(bare), ["train.checkpoint_every_images=16"])
    return Trial("emoji/mdm/0", made, points=(0.1, 1.0))


def test_a_trial_is_trained_measured_drawn_from_and_plotted(small_trial, tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "BATCH", 4)
    drawing = Drawing("emoji/mdm/0/ddim-10", {"sampler": "ddim", "steps": 2, "guidance": [1.0]})
    results, locks = tmp_path / "results", tmp_path / "locks"
    tasks = [small_trial, drawing]
    done = list(work(tasks, lambda task: run(task, tmp_path / "work", 6), results, locks))
    assert done == ["emoji/mdm/0", "emoji/mdm/0/ddim-10"]

    told = read_results(results)
    trial, drawn = (told[name] for name in done)
    assert [point["share"] for point in trial["points"]] == [1.0], "at 0.1 it has one level"
    assert trial["points"][0]["images"] == sum(trial["images"]) == 48
    assert 0 < trial["points"][0]["seconds"] <= trial["seconds"]
    assert trial["points"][0][NAME] > 0
    assert len(trial["held_out_loss_per_level"]) == len(trial["seen_loss_per_level"]) == 2
    assert trial["retrieval"] is None
    assert drawn["settings"]["sampler"] == "ddim"
    assert {"commit", "date", "machine"} <= trial.keys() & drawn.keys()

    row = summary(told, "emoji").splitlines()[-1]
    assert row.startswith("| mdm | ")
    paths = draw_all(told, tmp_path / "plots")
    assert [path.stem for path in paths] == list(FIGURES)
    for path in paths:
        with Image.open(path) as picture:
            assert picture.width > 600


def test_a_repeated_trial_finds_the_same_numbers(small_trial, tmp_path):
    once, again = (run(small_trial, tmp_path / name, 4) for name in ("once", "again"))
    assert once["points"][0][NAME] == again["points"][0][NAME]
    assert once["held_out_loss_per_level"] == again["held_out_loss_per_level"]
    other = replace(small_trial, config=override(small_trial.config, ["train.seed=1"]))
    assert run(other, tmp_path / "other", 4)["points"][0][NAME] != once["points"][0][NAME]


def test_spread_and_seeds():
    results = {
        f"fashion/{name}": {"task": f"fashion/{name}", "points": [{NAME: value}]}
        for name, value in {"mdm/0": 1.0, "mdm/1": 3.0, "mdm-2/0": 9.0}.items()
    }
    results["fashion/mdm/0/ddim-10"] = {"task": "fashion/mdm/0/ddim-10", NAME: 7.0}
    assert distance(seeds_of(results, "fashion", "mdm")) == Spread(2.0, 1.0, 3.0, 2)
    assert distance(seeds_of(results, "fashion", "mdm/ddim-10")) == Spread(7.0, 7.0, 7.0, 1)
    assert distance(seeds_of(results, "emoji", "mdm")) is None
    assert str(Spread(2.0, 1.0, 3.0, 2)) == "2 (1 to 3, 2 seeds)"
    assert set(SETS) == {"fashion", "emoji"}
