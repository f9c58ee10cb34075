"""A sweep: lists of values, every combination measured, and which are best."""

from __future__ import annotations

import json
import operator
import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from evaluating import looks, make_run, model, source
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.draw.grid import save_png
from matryoshka_diffusion.eval import sweep as sweeping
from matryoshka_diffusion.eval.evaluate import evaluate
from matryoshka_diffusion.eval.result import Result, folder_of
from matryoshka_diffusion.eval.sweep import Point, best, front, pareto, parse_numbers, table
from matryoshka_diffusion.models.save import average_model
from matryoshka_diffusion.pipeline import Matryoshka


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1:3:0.5", (1.0, 1.5, 2.0, 2.5, 3.0)),
        ("0.1:0.3:0.1", (0.1, 0.2, 0.3)),
        ("1:2.2:0.5", (1.0, 1.5, 2.0)),
        ("2:2:1", (2.0,)),
        ("1:1000:1", tuple(map(float, range(1, 1001)))),
        ("5, -1:1:1, 1", (5.0, -1.0, 0.0, 1.0)),
    ],
)
def test_lists_and_ranges_are_parsed_with_both_ends(text, numbers):
    assert parse_numbers(text) == numbers


REFUSED = ("", "1,x", "1:3:nan", "0:1e1000001:0.1", "1e400", "1:2", "1:2:3:4", "3:1:1", "1:3:0")


@pytest.mark.parametrize("text", [*REFUSED, "0:1:0.0001", "1:1001:1", "0:1e30:0.1"])
def test_lists_that_are_none_are_refused(text):
    with pytest.raises(UsageError, match="FIRST:LAST:STEP"):
        parse_numbers(text)


# --- which are best ----------------------------------------------------------------------------


def point(cost, *values, higher=(False,), keys=("fd", "clip"), **axes):
    results = tuple(
        Result(of="m", key=key, metric=key.upper(), value=value, n=8, higher_is_better=up)
        for key, value, up in zip(keys, values, higher, strict=False)
    )
    return Point(axes, cost, results)


def test_the_front_is_what_nothing_beats():
    pairs = np.random.default_rng(0).integers(0, 8, (60, 2))
    kept = pareto([(float(a), float(b)) for a, b in pairs])
    for place, (a, b) in enumerate(pairs):
        beaten = any(c <= a and d <= b and (c < a or d < b) for c, d in pairs)
        assert (place in kept) == (not beaten)


def test_best_and_front_look_the_way_of_the_metric():
    lower = [point(10, 5.0), point(20, 3.0), point(40, 3.0), point(5, 9.0)]
    assert best(lower) is lower[1], "of equal ones the cheapest"
    assert front(lower) == [0, 1, 3]
    lines = [line.split() for line in table(lower).splitlines()]
    assert lines[0] == ["evaluations", "FD"]
    assert [line[2:] for line in lines[1:5]] == [["front"], ["best"], [], ["front"]]
    assert " ".join(lines[5]) == "FD of 8 samples; lower is better"
    higher = [replace(one, results=(replace(one.quality, higher_is_better=True),)) for one in lower]
    assert best(higher) is higher[3]
    assert front(higher) == [3]


@pytest.mark.parametrize(
    ("keys", "axes", "panels"),
    [
        (("fd",), [{"guidance": g, "steps": 9} for g in (3.0, (3.0, 1.0))], 1),
        (("fd", "clip"), [{"guidance": g, "steps": s} for s in (9, 25) for g in (2.0, 1.0)], 3),
        (("fd",), [{"sampler": "ddim"}, {"sampler": "ddpm"}], 1),
        (("fd",), [{"steps": 9}, {"steps": 25}], 2),
    ],
)
def test_panels_show_a_swept_number_the_cost_and_a_trade_off(keys, axes, panels, tmp_path):
    values = {"higher": (False, True), "keys": keys}
    points = [point(n, 9.0 - n, 30.0, **values, **one) for n, one in enumerate(axes, 1)]
    sweeping.draw(points, tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.size[0] == pytest.approx(panels * picture.size[1], abs=3)


def test_the_command_draws_with_the_point_by_options_of_mdm_sample():
    one = point(1, 1.0, ema=0.05, guidance=1.5, steps=25, sampler="ddim", coarse_noise=0.3)
    assert sweeping.command("runs/a b", one, one.settings).splitlines() == [
        "mdm ema 'runs/a b' --length 0.05 -o 'runs/a b-ema0.05'",
        "mdm sample 'runs/a b-ema0.05' --cfg 1.5 --steps 25 --sampler ddim --coarse-noise 0.3",
    ]
    fixed = {
        "guidance_interval": [-2.0, 5.5],
        "rescale": 0.7,
        "grid": "log-snr",
        "eta": 0.5,
        "threshold": ["clip", "dynamic"],
        "precision": "bf16",
        "base": "b",
        "wake": [-3.0, -1.5],
    }
    parser = cli.build_parser()
    assert all(hasattr(parser.parse_args(["sweep", "m", "--steps", "2"]), name) for name in fixed)
    one = point(1, 1.0, steps=9, guidance=(3.0, 1.5))
    everything = one.settings | fixed
    sampled = vars(parser.parse_args(shlex.split(sweeping.command("m", one, everything))[1:]))
    assert {name: sampled[name] for name in fixed} == fixed
    assert sampled["guidance"] == (3.0, 1.5)


def test_shipped_models_and_files_have_sweeps_of_their_own(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.pth").touch()
    named = [str(tmp_path / "a" / "model.pth"), str(tmp_path / "b" / "model.pth"), "openmoji"]
    assert len({folder_of(one, "sweep") for one in named}) == 3
    assert folder_of("openmoji", "sweep").parts[-2:] == ("sweep", "openmoji")
    assert folder_of(str(tmp_path / "a"), "sweep") == tmp_path / "a" / "sweep"


# --- a sweep of a tiny model -------------------------------------------------------------------


def test_every_combination_is_measured_and_shared_with_eval(tmp_path):
    tiny, networks = model(), looks()
    options = {"source": source(), "n": 4, "networks": networks, "folder": tmp_path}

    def measure(one, settings):
        return evaluate(one, "fd", **options, **settings)

    axes = {"sampler": ["ddim", "dpmpp-2m"], "guidance": [1.0, 2.0], "steps": [1, 2]}
    calls = []
    points = sweeping.sweep(lambda _: tiny, axes, measure, progress=lambda *now: calls.append(now))
    assert calls == [(done, 8) for done in range(1, 9)]
    assert [one.cost for one in points] == [1, 2, 2, 4] * 2
    assert len({one.quality.value for one in points[:4]}) == 4
    seen = networks["EffNetLite0"].seen
    [again] = measure(tiny, {"sampler": "ddim", "guidance": 2.0, "steps": 2})
    assert again == points[3].quality
    assert networks["EffNetLite0"].seen == seen


@pytest.mark.parametrize("grid", ["trailing", "log-snr"])
@pytest.mark.parametrize("interval", [None, (-3.0, 2.0), (50.0, 60.0)])
@pytest.mark.parametrize("wake", [None, -1.0])
def test_evaluations_are_counted_as_the_network_sees_them(grid, interval, wake, monkeypatch):
    tiny, seen = model(), []
    forward = tiny.net.forward
    monkeypatch.setattr(tiny.net, "forward", lambda z, *a: seen.append(len(z[0])) or forward(z, *a))
    options = {"steps": 7, "grid": grid, "guidance": [2.0, 1.0], "guidance_interval": interval}
    options["wake"] = wake
    tiny.sample(classes=0, **options)
    assert sum(seen) == tiny.evaluations(options)
    assert 7 <= sum(seen) <= 14
    assert (sum(seen) == 14) == (interval is None)


def test_a_sleeping_level_asks_for_no_guidance():
    options = {"steps": 8, "guidance": [1.0, 2.0]}
    assert model().evaluations(options) == 16
    assert 8 < model().evaluations({**options, "wake": -1.0}) < 16


def test_the_cost_of_a_point_is_that_of_what_is_fixed_as_well():
    fixed, guided, tiny = {"guidance_interval": [-3.0, 2.0], "steps": 8}, {"guidance": 2.0}, model()
    results = point(1, 1.0).results
    [one] = sweeping.sweep(lambda _: tiny, {"guidance": [2.0]}, lambda *_: results, fixed=fixed)
    assert one.cost == tiny.evaluations(fixed | guided) < tiny.evaluations({"steps": 8, **guided})
    assert one.values == guided


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a model, its data, and averages of two lengths."""
    folder, output = tmp_path_factory.mktemp("swept"), source(12)
    for number in range(12):
        name = folder / "data" / ("cat", "dog")[number % 2] / f"{number}.png"
        save_png(output[number].picture, name, None)
    make_run(folder / "run", "classes", folder / "data")
    return folder / "run"


def test_the_command_writes_a_table_a_file_and_a_picture(run, capsys, monkeypatch):
    find = "matryoshka_diffusion.eval.evaluate.find_networks"
    monkeypatch.setattr(find, lambda *_, **__: looks())
    swept = ["--cfg", "1:2:1", "--steps", "1,2", "-n", "4", "--metrics", "fd,agreement"]
    assert cli.main(["sweep", str(run), *swept]) == 0
    output = capsys.readouterr().out
    assert "guidance  steps  evaluations  FD-EffNetLite0  level disagreement" in output
    assert output.splitlines()[-1].startswith(f"mdm sample {run} --cfg ")
    points = json.loads((run / "sweep" / "sweep.json").read_text())
    values = [{"guidance": g, "steps": s} for g in (1.0, 2.0) for s in (1, 2)]
    assert [one["values"] for one in points] == values
    assert sum(one["best"] for one in points) == 1
    assert {len(one["results"]) for one in points} == {2}
    assert (run / "sweep" / "sweep.png").is_file()


def test_every_sampling_setting_can_be_swept(run, capsys):
    swept = ["--try", "guidance=[2, [2, 1]]", "--try", "sampling.guidance_interval=[null, [-3, 2]]"]
    command = ["sweep", str(run), "--steps", "2", "-n", "2", "--metrics", "agreement"]
    assert cli.main([*command, *swept]) == 0
    points = json.loads((run / "sweep" / "sweep.json").read_text())
    both = [(point["values"]["guidance"], point["values"]["guidance_interval"]) for point in points]
    assert both == [(2, None), (2, [-3, 2]), ([2, 1], None), ([2, 1], [-3, 2])]
    assert all(point["results"][0]["error"] > 0.0 for point in points)
    assert len({point["results"][0]["value"] for point in points}) == 4
    assert "2/1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["--try", "guidance"], "--try guidance: write path.to.key=value"),
        (["--try", "rescale=0.5"], "rescale=[A, B]"),
        (["--try", "guidance=[1]", "--cfg", "2"], "--try guidance=[1]"),
        (["--try", "eta=[1]", "--eta", "0"], "--try eta=[1]"),
        (["--try", "guidence=[1]"], "did you mean sampling.guidance?"),
        ([], "--try guidance=[1,3]"),
    ],
)
def test_axes_that_are_none_are_refused(words, refusal, run, capsys):
    command = ["sweep", str(run), "-n", "2", "--metrics", "agreement"]
    assert cli.main([*command, *words]) == 2
    assert refusal in capsys.readouterr().err


def test_a_fixed_setting_may_be_idle_at_some_points_and_is_not_drawn_with_there(
    run, capsys, monkeypatch
):
    swept = ["sweep", str(run), "--cfg", "1,2", "--interval", "-3", "2", "-n", "2"]
    for place, drawn in ((0, "--cfg 1"), (1, "--cfg 2 --interval -3 2")):
        monkeypatch.setattr(sweeping, "best", operator.itemgetter(place))
        assert cli.main([*swept, "--metrics", "agreement"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"mdm sample {run} {drawn}"


def test_a_swept_setting_is_not_drawn_with_where_it_is_idle_or_has_no_option(
    run, tmp_path, capsys, monkeypatch
):
    own = shutil.copytree(run, tmp_path / "run")
    config = json.loads((own / "model" / "config.json").read_text())
    config["sampling"]["guidance_interval"] = [-1.0, 1.0]
    (own / "model" / "config.json").write_text(json.dumps(config))
    swept = ["--try", "guidance=[1, 2]", "--try", "guidance_interval=[[-3, 2], null]"]
    commands = ["--cfg 1", "--cfg 1", "--cfg 2 --interval -3 2", "--cfg 2"]
    for place, drawn in enumerate(commands):
        monkeypatch.setattr(sweeping, "best", operator.itemgetter(place))
        assert cli.main(["sweep", str(own), *swept, "-n", "2", "--metrics", "agreement"]) == 0
        output = capsys.readouterr().out
        assert output.splitlines()[-1] == f"mdm sample {own} {drawn}"
        assert ("sampling.guidance_interval=null" in output) == (place == 3), "none unsets it"


def test_averages_are_those_of_mdm_ema(run, tmp_path):
    swept = sweeping.averaged(run, 0.05, model())
    assert average_model(run, 0.05, tmp_path / "average") < 1e-6
    assert swept.describe({}) == Matryoshka.load(tmp_path / "average").describe({})
    options = {"source": source(), "n": 4, "networks": looks(), "folder": tmp_path / "eval"}
    points = sweeping.sweep(
        lambda length: model() if length is None else sweeping.averaged(run, length, model()),
        {"steps": [1], "ema": [0.05, 0.1]},
        lambda one, settings: evaluate(one, "fd", **options, **settings),
    )
    assert [one.values for one in points] == [{"ema": x, "steps": 1} for x in (0.05, 0.1)]
    assert len({one.quality.weights for one in points}) == 2
    with pytest.warns(UserWarning, match=r"at length 0\.2: its profile is off by"):
        sweeping.averaged(run, 0.2, model())
