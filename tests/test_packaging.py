"""What a package index and a shell see: the long description, metadata and completion."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from matryoshka_diffusion import __version__
from matryoshka_diffusion.cli import doctor
from matryoshka_diffusion.cli import main as cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
LINKS = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def description():
    return runpy.run_path(str(ROOT / "setup.py"))["description"]


def test_links_of_the_long_description_lead_into_the_repository(description):
    text = description(README, "https://host/project/")
    relative = [link for link in LINKS.findall(README) if not link.startswith(("http", "#"))]
    assert len(relative) > 10
    assert not [link for link in LINKS.findall(text) if not link.startswith(("http", "#"))]
    assert "](https://host/project/blob/main/docs/training.md" in text
    assert "](https://host/project/raw/main/docs/pictures/hero.png)" in text
    assert LINKS.sub("", text) == LINKS.sub("", README), "nothing else changes"


def test_without_an_address_links_are_their_text(description):
    assert (
        description("[a](b.md) ![c](d.png)[e](https://f) `[g]`", None) == "a [e](https://f) `[g]`"
    )


def test_files_for_citing_and_reporting_are_whole():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == __version__
    assert citation["preferred-citation"]["url"] in README
    forms = list((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 3
    for form in forms:
        for part in yaml.safe_load(form.read_text("utf-8")).get("body", ()):
            assert part["attributes"]["label"]


# --- the container -------------------------------------------------------------------------------

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
INSTALL = re.compile(r"-c constraints\.txt (?:-e )?'\.\[([a-z,]+)\]'")


def instructions(word):
    return re.findall(rf"^{word} (.*)$", DOCKERFILE, re.M)


def test_the_container_copies_what_its_install_reads():
    copied = {name for line in instructions("COPY") for name in line.split()[:-1]}
    assert not [name for name in copied if not (ROOT / name).exists()]
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    (licences,) = re.findall(r"^license-files = (.*)$", project, re.M)
    read = {"pyproject.toml", "setup.py", "README.md", "constraints.txt", "src"}
    assert copied == read | {name.partition("/")[0] for name in json.loads(licences)}
    (program,) = json.loads(*instructions("ENTRYPOINT"))
    assert f"[project.scripts]\n{program} = " in project


def test_the_container_has_the_extras_of_the_first_install():
    first, container = (
        set(found[1].split(",")) for text in (README, DOCKERFILE) if (found := INSTALL.search(text))
    )
    assert container == first | {"studio"}


def test_a_container_without_an_index_for_the_cpu_names_its_argument(tmp_path):
    (guard,) = (line for line in instructions("RUN") if line.startswith(":"))
    (name,) = instructions("ARG")
    done = subprocess.run(["sh", "-c", guard], env={}, capture_output=True, text=True)
    assert done.returncode
    assert f"--build-arg {name}=" in done.stderr
    subprocess.run(["sh", "-c", guard], env={name: "https://host"}, check=True)
    page = (ROOT / "docs" / "start.md").read_text("utf-8")
    assert f"docker build --build-arg {name}=" in page


# --- completion --------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", doctor.SHELLS)
def test_a_completion_script_knows_commands_and_options(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("sample", "doctor", "--steps" if shell != "tcsh" else "steps"):
        assert word in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_bash_completes_a_command(tmp_path, capsys):
    cli.main(["completion", "bash"])
    (tmp_path / "mdm.bash").write_text(capsys.readouterr().out)
    ask = "source mdm.bash; COMP_WORDS=(mdm samp); COMP_CWORD=1; _shtab_mdm; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["sample"], done.stderr


def test_completion_names_its_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 1
    assert 'pip install "matryoshka-diffusion[completion]"' in capsys.readouterr().err
