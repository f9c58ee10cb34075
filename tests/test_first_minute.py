"""The first minute of the command: help, the presets, what is installed, and mistyped names."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from matryoshka_diffusion import __version__
from matryoshka_diffusion.cli import doctor, plan
from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.configfile import paths
from matryoshka_diffusion.presets import CODECS, PRESETS, WORK, preset

PYPROJECT = (Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8")


def run(words, capsys) -> tuple[object, str, str]:
    """The status, stdout and stderr of a command line."""
    try:
        status = cli.main(shlex.split(words))
    except SystemExit as leaving:
        status = leaving.code
    output, message = capsys.readouterr()
    return status, output, message


def test_the_command_alone_shows_five_commands_that_exist(capsys):
    status, output, _ = run("", capsys)
    shown = re.findall(r"^  mdm (.*?)  ", output, re.MULTILINE)
    assert (status, len(shown)) == (0, 5)
    for words in shown:
        options = cli.build_parser().parse_args(shlex.split(words))
        assert callable(options.run)


def test_version_and_help(capsys):
    assert run("--version", capsys)[:2] == (0, f"mdm {__version__}\n")
    assert f'version = "{__version__}"' in PYPROJECT
    assert run("help", capsys) == run("--help", capsys)
    assert run("help data check", capsys) == run("data check --help", capsys)


# --- mistyped names ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        ("sampel openmoji", "sample"),
        ("sample openmoij", "openmoji"),
        ("eval openmoij", "openmoji"),
        ("sample openmoji --negatve x", "--negative"),
        ("train openmoij --out x", "openmoji"),
        ("embed openmoij", "openmoji"),
        ("data check x --preset folder64", "folder-64"),
        ("train openmoji --out x --set train.sed=1", "train.seed"),
        ("train openmoji --out x --batch-size 8", "--set train.stages.0.batch_size=VALUE"),
        ("train openmoji --out x --otu y", "--out"),
    ],
)
def test_the_nearest_name_is_told(words, nearest, capsys):
    status, _, message = run(words, capsys)
    assert status in (1, 2)
    assert f"did you mean {nearest}?" in message
    assert message.count("\n") == 1


def test_a_pattern_that_the_shell_expanded_is_to_be_quoted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("0.tar", "1.tar"):
        Path(name).touch()
    assert "quote" in run("data check 0.tar 1.tar", capsys)[2]
    assert "quote" not in run("data check 0.tar photos", capsys)[2]


def test_keys_in_hints_can_be_set_and_need_no_quotes():
    known = set(paths(RunConfig))
    assert {"train.seed", "train.stages.0.lr", "model.levels.0.widths"} <= known
    assert not [path for path in known if re.search(r"[^a-z0-9_.]", path)]


def test_names_are_answered_before_torch_is_imported():
    lines = ["presets", "train openmoij --out x", "sample openmoij", "edit x", "sweep x"]
    lines += ["train openmoji --out x --set train.sed=1", "train openmoji --batch-size 8"]
    code = (
        "import json, sys; from matryoshka_diffusion.cli.main import main\n"
        f"for words in {json.dumps([line.split() for line in lines])}:\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("did you mean") == 4


# --- presets and doctor ------------------------------------------------------------------------


def test_every_preset_is_listed_with_its_levels(capsys):
    status, output, _ = run("presets", capsys)
    lines = {line.split()[0]: line for line in output.splitlines()}
    assert status == 0
    assert PRESETS.keys() <= lines.keys()
    assert all(name in output for name in CODECS)
    assert re.search(
        r"16 32 +10 classes +fashion-mnist +150,000 +\d+ minutes", lines["fashion-mnist"]
    )
    assert re.search(r"32 64 128 +what is there +yours .* hours on a GPU", lines["folder-128"])
    assert re.search(r"64 16x64 +text \(T5\) +yours .* days", lines["webvid-16x64"])


@pytest.mark.parametrize(
    "name", ["fashion-mnist", "emoji-video", "folder-256-cpu", "folder-256", "cc12m-64"]
)
def test_the_work_of_a_preset_is_what_its_network_takes(name):
    assert WORK.keys() == PRESETS.keys()
    config = preset(name)
    assert WORK[name] == pytest.approx(plan.work_of(config) / 1e15, rel=0.01)


def test_doctor_names_the_extra_that_has_what_is_missing(monkeypatch, capsys):
    there = metadata.version

    def version(package):
        if package in ("pyarrow", "aiohttp"):
            raise metadata.PackageNotFoundError(package)
        return there(package)

    monkeypatch.setattr(metadata, "version", version)
    status, output, _ = run("doctor --device cpu", capsys)
    assert status == 0
    assert re.search(r"^device +cpu ", output, re.MULTILINE)
    assert re.search(r"^precision +(bf16|fp32)$", output, re.MULTILINE)
    assert re.search(r"^  parquet .*without pyarrow; .*\[parquet\]", output, re.MULTILINE)
    assert re.search(r"^  remote .*without aiohttp; ", output, re.MULTILINE), "fsspec's own extra"
    assert re.search(r"^  plots .*: installed$", output, re.MULTILINE)


def test_doctor_knows_every_extra_of_users():
    block = PYPROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", block, re.MULTILINE))
    assert doctor.EXTRAS.keys() == extras - {"bench", "dev", "site"}
