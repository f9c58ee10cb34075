"""What a run reports: lines, the bar, and other places for its curves and pictures."""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.cli import train as cli_train
from matryoshka_diffusion.draw.clips import save_clip
from matryoshka_diffusion.draw.grid import save_png
from matryoshka_diffusion.files import MissingExtra
from matryoshka_diffusion.training.checkpoint import newest
from matryoshka_diffusion.training.log import (
    SINKS,
    Entry,
    Log,
    _encoded,
    cut_metrics,
    find_sink,
    peak_memory_bytes,
    scalars,
    summary,
)
from matryoshka_diffusion.training.stages import Step
from matryoshka_diffusion.training.step import SampleLoss, Skipped, Stepped, diffusion
from tiny_run import OF_THE_MACHINE, run, there, tiny_config

# --- lines and the bar -------------------------------------------------------------------------


def test_metrics_beyond_the_checkpoint_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    within = '{"images_seen": 4}\n{"images_seen": 8}\n'
    path.write_text(within + '{"images_seen": 12}\n{"images_se')  # killed while writing
    cut_metrics(path, 8)
    assert path.read_text() == within
    damaged = ("[]", "1", '{"images_seen": "4"}', "{}", "[" * 10_000, "\0")
    path.write_text("\n".join([*damaged, within]))
    with pytest.warns(UserWarning, match=f"{path}: 6 damaged"):
        cut_metrics(path, 8)
    assert path.read_text() == within


def log(folder, images_seen=0):
    return Log(folder, diffusion(tiny_config()), images_seen, (), leads=True)


def test_metrics_on_a_full_disk_name_their_file(tmp_path):
    full = log(tmp_path)
    full.path = Path("/dev/full")
    with pytest.raises(OSError, match="cannot write /dev/full: No space left"):
        full.write({"images_seen": 4})


def entry(rows: tuple[int, ...], losses: tuple[float, ...], *, skipped: bool = False) -> Entry:
    values = (sum(losses), losses, 2.0)
    outcome = Skipped(*values, (SampleLoss(7, "key", losses[0]),)) if skipped else Stepped(*values)
    return Entry(Step(len(rows) - 1, 0, rows, (), False), outcome, 0.1, 0.3)


def test_a_summary_weighs_levels_by_their_rows():
    entries = [
        entry((4, 3), (1.0, 2.0)),
        entry((4, 1), (3.0, 6.0)),
        entry((4, 4), (float("nan"), float("nan")), skipped=True),
    ]
    line = summary(entries)
    assert line["loss_per_level"] == [2.0, 3.0]
    assert line["loss"] == 6.0
    assert line["skipped_ids"] == [7]
    assert line["images_per_second"] == pytest.approx(10.0)
    assert line["data_wait"] == pytest.approx(0.25)
    assert summary([entry((4, 0), (1.0, 0.0))])["loss_per_level"] == [1.0, None]
    assert summary([entry((4,), (1.0,)), entry((4, 4), (3.0, 5.0))])["loss_per_level"] == [2, 5]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("kind", "of"), [(Terminal, "28.0/48"), (io.StringIO, "28.0 of 48")])
def test_a_terminal_gets_a_bar_and_a_log_file_gets_lines(tmp_path, monkeypatch, kind, of):
    stderr = kind()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr("matryoshka_diffusion.training.log.PLAIN_SECONDS", 0.0)
    display = log(tmp_path, 24)
    display.add(entry((4, 3), (0.25, 0.5)))
    display.close()
    for part in (of, "images/s", "2/2 8:0.2500 16:0.5000", "wait 25%"):
        assert part in stderr.getvalue()
    assert ("left" in stderr.getvalue()) == (kind is io.StringIO)


def test_the_peak_of_memory_is_that_of_this_process_in_bytes(monkeypatch):
    cpu = torch.device("cpu")
    before = there(peak_memory_bytes(cpu))
    held = np.ones(int(before) + 200_000_000, np.uint8)  # larger than the process ever was
    assert held.nbytes < there(peak_memory_bytes(cpu)) < 3 * held.nbytes
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    assert peak_memory_bytes(torch.device("cuda")) == 7


# --- runs with sinks ---------------------------------------------------------------------------


def draw(view):
    """A hook that draws something else each time."""
    path = view.folder / "previews" / f"{view.images_seen}.png"
    save_png(np.full((4, 4, 3), view.images_seen, np.uint8), path, None)
    return path


def report(view):
    """A hook that measures something."""
    return {"seen_loss_per_level": [view.images_seen / 2, 1.0]}


def train_twice(folder, *names, at):
    """Train a run that dies before the hooks at so many images; go on from a checkpoint."""
    (stage,) = tiny_config().train.stages[1:]
    config = tiny_config(checkpoint_every_images=8, stages=(stage,))
    sinks = [find_sink(name) for name in names]

    def pull(view):
        if view.images_seen == at:
            raise RuntimeError("the plug was pulled")

    def start(*hooks):
        return run(folder, config, hooks=[*hooks, (8, draw), (8, report)], sinks=sinks)

    with pytest.raises(RuntimeError, match="plug"):
        start((1, pull))
    shutil.rmtree(there(newest(folder / "checkpoints")))  # as if there had been no time to save
    start()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curves_of(pairs):
    """The points of each curve, by its name."""
    points = {}
    for step, values in pairs:
        for name, value in values.items():
            points.setdefault(name, []).append((step, value))
    return points


def curves(lines):
    return curves_of((line["images_seen"], scalars(line)) for line in lines)


def test_a_line_is_split_into_curves():
    line = {
        "images_seen": 8,
        "stage": 1,
        "loss": 0.5,
        "grad_norm": None,
        "loss_per_level": [0.25, None, 1],
        "skipped_ids": [3, 4],
    }
    assert scalars(line) == {
        "stage": 1.0,
        "loss": 0.5,
        "loss_per_level/0": 0.25,
        "loss_per_level/2": 1.0,
    }


# --- TensorBoard and Weights & Biases -----------------------------------------------------------


class Service(ModuleType):
    """A stand-in for the package wandb that writes down its calls."""

    Error = type("Error", (Exception,), {})
    Settings, Image = staticmethod(dict), staticmethod(lambda path: Path(path).name)

    def __init__(self):
        super().__init__("wandb")
        self.starts, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.starts.append(options)
        log = lambda values, step: self.logged.append((step, values))  # noqa: E731
        return SimpleNamespace(log=log, finish=self.finish)

    def finish(self):
        self.finished += 1


@pytest.fixture
def service(monkeypatch):
    module = Service()
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.mark.parametrize("at", [20, 16])  # between hooks; after a line and before the hooks
def test_sinks_get_the_metrics_and_nothing_twice(tmp_path, service, at):
    lines = train_twice(tmp_path / "run", "wandb", "tensorboard", at=at)
    expected = curves(lines)
    assert {"loss", "grad_norm", "images_per_second", "data_wait"} <= expected.keys()
    assert {"loss_per_level/1", "lr_per_level/1", "seen_loss_per_level/0"} <= expected.keys()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = str(tmp_path / "run" / "tensorboard")
    events = EventAccumulator(path, size_guidance={"scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) == expected.keys()
    for name, points in expected.items():
        logged = events.Scalars(name)
        assert [event.step for event in logged] == [step for step, _ in points]
        values = np.array([value for _, value in points])
        np.testing.assert_array_equal([event.value for event in logged], values.astype(np.float32))
    drawn = events.Images("previews")
    assert [event.step for event in drawn] == [8, 16, 24]
    with Image.open(io.BytesIO(drawn[1].encoded_image_string)) as image:
        np.testing.assert_array_equal(np.asarray(image), np.full((4, 4, 3), 16))

    first, second = service.starts
    assert first["id"] == second["id"]
    assert (first["resume"], first["mode"], first["name"]) == ("allow", "offline", "run")
    assert first["config"]["train"]["stages"][0]["images"] == 24
    assert not first["save_code"]
    assert first["settings"] == {"console": "off", "disable_git": True}
    assert service.finished == 2, "after an error, too"
    steps = [step for step, _ in service.logged]
    assert steps == sorted(steps)
    drawn = curves_of(service.logged)
    assert [name for _, name in drawn.pop("previews")] == ["8.png", "16.png", "24.png"]
    assert drawn.keys() == expected.keys()
    for name in expected.keys() - OF_THE_MACHINE:  # these differ where a step was done again
        assert drawn[name] == expected[name]


def test_tensorboard_shows_previews_that_move(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    clip = np.stack([np.full((4, 6, 3), 50 * k, np.uint8) for k in range(5)])
    save_clip(clip, tmp_path / "a.webp", 4.0, None)
    with find_sink("tensorboard")(tmp_path, tiny_config(), 0) as report:
        report(16, {"previews": tmp_path / "a.webp"})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Images("previews")
    assert (event.step, event.width, event.height) == (16, 6, 4)
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        assert image.format == "GIF"
        for frame, expected in zip(ImageSequence.Iterator(image), clip, strict=True):
            np.testing.assert_array_equal(np.asarray(frame.convert("RGB")), expected)
            assert frame.info["duration"] == 250
    save_clip(clip, tmp_path / "fast.webp", 90.0, None)
    data = _encoded(tmp_path / "fast.webp")["encoded_image_string"]
    with Image.open(io.BytesIO(data)) as gif:
        assert gif.info["duration"] == 20, "no faster than a GIF can be"


def test_wandb_sends_only_where_the_environment_asks_for_it(tmp_path, service, monkeypatch):
    for name, value, mode in (
        ("WANDB_API_KEY", "x", "online"),
        ("WANDB_MODE", "offline", "offline"),  # the key is still there
        ("WANDB_MODE", "online", "online"),
    ):
        monkeypatch.setenv(name, value)
        with SINKS["wandb"](tmp_path, tiny_config(), 0):
            assert service.starts[-1]["mode"] == mode


def test_what_is_wrong_with_wandb_is_one_line_with_a_remedy(tmp_path, service, monkeypatch):
    def refuse(**_):
        raise service.Error("no such host")

    with monkeypatch.context() as patch:
        patch.setattr(service, "init", refuse)
        with pytest.raises(OSError, match=r"--log wandb: no such host.*WANDB_MODE=offline"):
            SINKS["wandb"](tmp_path, tiny_config(), 0).__enter__()
    for text in ("", '{"id": "a", "images', "[]", '{"id": "a"}'):
        (tmp_path / "wandb" / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"wandb/run\.json is damaged .*: remove it"):
            SINKS["wandb"](tmp_path, tiny_config(), 0).__enter__()


def test_a_real_offline_run_of_wandb_holds_curves_and_pictures(tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    picture, clip = tmp_path / "picture.png", tmp_path / "clip.webp"
    save_png(np.zeros((4, 4, 3), np.uint8), picture, None)
    save_clip(np.zeros((2, 4, 4, 3), np.uint8), clip, 4.0, None)
    with find_sink("wandb")(tmp_path, tiny_config(), 0) as report:
        report(16, {"loss": 0.5, "loss_per_level/0": 0.25})
        report(16, {"previews": picture, "moving": clip})
        report(32, {"loss": 0.0314159})
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    until = time.monotonic() + 30
    while b"0.0314159" not in (data := file.read_bytes()):  # written by a process of its own
        assert time.monotonic() < until
        time.sleep(0.1)
    assert b"loss_per_level/0" in data
    images = tmp_path.glob("wandb/offline-run-*/files/media/images/*")
    previews = sorted((path.name[:6], path.suffix, path.read_bytes()) for path in images)
    # The clip is as it was, and browsers show that it moves.
    assert previews == [
        ("moving", ".webp", clip.read_bytes()),
        ("previe", ".png", picture.read_bytes()),
    ]


# --- sinks that fail or are missing ------------------------------------------------------------


@pytest.mark.parametrize("cannot", ["curves", "pictures", "end"])
def test_a_run_goes_on_without_a_sink_that_fails(tmp_path, cannot):
    calls = {"failing": [], "sound": []}

    def sink_of(name):
        @contextmanager
        def sink(*_):
            def call(kind):
                calls[name].append(kind)
                if name == "failing" and kind == cannot:
                    raise RuntimeError("connection lost")

            yield lambda _, values: call("pictures" if "previews" in values else "curves")
            call("end")

        return sink

    config = tiny_config(stages=tiny_config().train.stages[:1])
    with pytest.warns(UserWarning, match=r"sink failed .*connection lost") as caught:
        run(tmp_path, config, hooks=[(8, draw)], sinks=[*map(sink_of, calls)])
    assert len(caught) == 1
    assert (tmp_path / "model" / "model.safetensors").is_file()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert calls["sound"].count("curves") == len(lines)
    assert calls["sound"].count("pictures") == 3
    assert calls["failing"].count(cannot) == 1
    assert calls["failing"][-1] == calls["sound"][-1] == "end"


@pytest.mark.parametrize("name", SINKS)
def test_a_missing_package_is_said_before_anything_begins(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    remedy = rf"--log {name} needs the package {name}: pip install .*\[{name}\]"
    with pytest.raises(MissingExtra, match=remedy):
        find_sink(name)
    out = tmp_path / "run"
    assert cli.main(["train", "openmoji", "--out", str(out), "--log", name]) == 1
    assert f'pip install "matryoshka-diffusion[{name}]"' in capsys.readouterr().err
    assert not out.exists()


def test_no_package_is_imported_unless_its_sink_is_chosen(tmp_path, monkeypatch):
    for name in SINKS:
        monkeypatch.setitem(sys.modules, name, None)  # importing it now is an error
    run(tmp_path, tiny_config(stages=tiny_config().train.stages[:1]))
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"checkpoints", "model"}


def test_the_command_line_offers_every_sink():
    assert set(cli_train.LOGS) == set(SINKS)
