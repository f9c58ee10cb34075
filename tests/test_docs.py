"""What the README tells people to type works: its `mdm` commands run, in order, but smaller.

The commands of all ```sh blocks that start with `mdm` run one after the other in one folder, so
that a later one finds what an earlier one made. A command that trains is shrunk by `--set`
arguments from the table `SHRUNK`. A command that is not known here fails its test: teach `smaller`
to shrink it, do not skip it.
"""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from matryoshka_diffusion import cli
from matryoshka_diffusion.config import override
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.sheet import save_png

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RELEASED = (ROOT / "docs" / "released-checkpoints.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
TINY_CHECKPOINT = ROOT / "tests" / "data" / "reference" / "vis_model_nested32.pth"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
PHOTOS, CAPTIONED = "photos", "captioned"
"""The folders of the reader's own pictures in the examples, the second one with captions."""


def stages(count: int) -> str:
    """Training of two steps with one level, then with two, ... up to `count`."""
    one = "{{levels: {n}, images: 8, batch_size: 4, lr: 0.001}}"
    return f"train.stages=[{', '.join(one.format(n=n) for n in range(1, count + 1))}]"


SMALL = (
    "model.embedding=32",
    "model.levels[0].widths=[32, 32]",
    "model.levels[-1].widths=[32, 32]",
    "train.warmup_images=0",
    "sampling.steps=2",
)
SHRUNK: dict[str, tuple[str, ...]] = {
    "openmoji": (*SMALL, "model.text.width=32", stages(3)),
    "fashion-mnist": (*SMALL, stages(2)),
    "folder-64": (*SMALL, stages(3)),
}
GROWN = (
    "train.stages[-1].images=8",
    "train.stages[-1].batch_size=4",
    "train.stages[-1].freeze_coarse_images=4",
    "train.stages[-1].ramp_images=8",
)


def commands(text: str) -> list[list[str]]:
    """The arguments of every `mdm` command in the ```sh blocks of Markdown text."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in split if words and words[0] == "mdm"]


def smaller(arguments: Sequence[str]) -> list[str]:
    """`arguments` with what shrinks the command.

    Raises:
        LookupError: this file does not know the command.
    """
    match arguments:
        case _ if "--help" in arguments:
            extra = []
        case _ if "--dry-run" in arguments:
            extra = []
        case ["sample", model, *_] if model.startswith(("vis_model", "mdm-")):
            extra = ["--steps", "2", "--text-encoder", "t5"]
        case ["data" | "info" | "sample" | "convert" | "plot" | "embed" | "ema", *_]:
            extra = []
        case ["export", model, *_]:
            extra = ["--text-encoder", "t5"] if model.startswith("mdm-") else []
        case ["eval", *_]:
            extra = ["--steps", "2", *(["-n", "8"] if "-n" in arguments else [])]
        case ["grow", *_]:
            extra = settings(GROWN)
        case ["train", run, *_] if run.startswith("runs/"):
            extra = []  # an earlier command made it, smaller
        case ["train", "mine", *_]:
            extra = settings(("train.stages[0].images=4", "train.stages[0].batch_size=2"))
        case ["train", name, *_] if "--init" in arguments:
            extra = settings((*SMALL, "train.stages[0].images=8", "train.stages[0].batch_size=4"))
        case ["train", name, *_] if name in SHRUNK:
            extra = settings(SHRUNK[name])
        case ["demo", *_]:
            extra = settings(SHRUNK["openmoji"])
        case _:
            raise LookupError(f"tests/test_docs.py cannot shrink `mdm {shlex.join(arguments)}`")
    return [*arguments, *extra]


def settings(assignments: Sequence[str]) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working folder of the README's reader, with some pictures of their own."""
    return with_photos(tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The working folder of somebody who reads about training."""
    return with_photos(tmp_path_factory.mktemp("trainer"))


def with_photos(path):
    for number, picture in enumerate(np.random.default_rng(0).integers(0, 256, (8, 80, 72, 3))):
        for folder in (PHOTOS, CAPTIONED):
            save_png(picture.astype(np.uint8), path / folder / f"{number}.png", None)
        (path / CAPTIONED / f"{number}.txt").write_text(f"noise of number {number}")
    return path


@pytest.mark.parametrize("arguments", commands(README), ids=shlex.join)
def test_a_command_of_the_readme_runs(arguments, folder):
    if "fashion-mnist" in shlex.join(arguments) and not FASHION_MNIST.exists():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    run(arguments, folder)


@pytest.mark.parametrize("arguments", commands(RELEASED), ids=shlex.join)
def test_a_command_for_released_checkpoints_runs(arguments, folder, tiny_t5):
    """With a small file of the same make in the place of the large ones."""
    for side in (64, 256, 1024):
        path = folder / f"vis_model_{side}x{side}.pth"
        if not path.exists():
            shutil.copy(TINY_CHECKPOINT, path)
            shutil.copytree(tiny_t5, folder / "t5", dirs_exist_ok=True)
    run(arguments, folder)


@pytest.mark.parametrize("arguments", commands(TRAINING), ids=shlex.join)
def test_a_command_for_training_runs(arguments, photos):
    run(arguments, photos)


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The working folder of somebody who ran examples/data_forms.py, with fewer pictures."""
    path = tmp_path_factory.mktemp("forms")
    made = runpy.run_path(str(ROOT / "examples" / "data_forms.py"))
    items = list(made["openmoji_items"](64, 40))
    for form, write in made["FORMS"].items():
        write(items, path / "forms" / form)
    return path


@pytest.mark.parametrize("arguments", commands(DATA), ids=shlex.join)
def test_a_command_for_data_runs(arguments, forms):
    run(arguments, forms)


def run(arguments, folder):
    """The command in this process, which has loaded everything already."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a reader would see them, and go on
        patch.chdir(folder)
        try:
            status = cli.main(smaller(arguments))
        except SystemExit as leaving:  # --help
            status = leaving.code
    assert not status


def test_the_readme_shows_how_to_train_and_how_to_sample():
    assert {"train", "sample"} <= {arguments[0] for arguments in commands(README) if arguments}


def test_make_goals_in_the_documents_exist():
    goals = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        shown = set(re.findall(r"(?:^|`)make ([a-z]+)", text, flags=re.MULTILINE))
        assert shown
        assert shown <= goals, name


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/data.md",
        "docs/design.md",
        "docs/released-checkpoints.md",
        "docs/promises.md",
        "docs/training.md",
    ],
)
def test_links_between_the_files_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        assert "://" in target or (path.parent / target).exists(), target


# --- the mechanism itself ----------------------------------------------------------------------


def test_commands_are_found_in_sh_blocks_only():
    text = """
```sh
pip install .          # not ours
mdm train openmoji --out runs/a   # a comment
mdm sample runs/a \\
    -p "red apple"
```
```python
mdm = 3
```
mdm info openmoji
```sh
mdm info openmoji
```
"""
    assert commands(text) == [
        ["train", "openmoji", "--out", "runs/a"],
        ["sample", "runs/a", "-p", "red apple"],
        ["info", "openmoji"],
    ]


def test_what_takes_long_is_shrunk_and_the_rest_is_not():
    for arguments in (["sample", "runs/a"], ["train", "--help"], ["train", "runs/a"]):
        assert smaller(arguments) == arguments
    for arguments in (["train", "openmoji", "--out", "x"], ["demo", "--out", "x"]):
        assert smaller(arguments) == [*arguments, *settings(SHRUNK["openmoji"])]
    assert smaller(["grow", "runs/a"]) == ["grow", "runs/a", *settings(GROWN)]
    assert smaller(["eval", "x", "-n", "9"]) == ["eval", "x", "-n", "9", "--steps", "2", "-n", "8"]
    assert "-n" not in smaller(["eval", "x"])


@pytest.mark.parametrize(
    "arguments", [[], ["train"], ["train", "mystery"], ["conjure"], ["--out", "x"]], ids=shlex.join
)
def test_an_unknown_command_is_an_error(arguments):
    with pytest.raises(LookupError, match=r"cannot shrink `mdm"):
        smaller(arguments)


@pytest.mark.parametrize("name", SHRUNK)
def test_shrunk_presets_are_valid_and_small(name):
    config = override(preset(name), list(SHRUNK[name]))
    assert config.train.images <= 24
    assert config.train.stages[-1].levels == len(config.model.levels)
