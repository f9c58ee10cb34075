"""Every notebook of examples/ runs from its first cell to its last, and shows pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("nbclient")
ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.pages
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs_and_shows_pictures(path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "site" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    notebooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebooks)
    cells = [cell for cell in notebooks.execute(path).cells if cell.cell_type == "code"]
    shown = [out for cell in cells for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(cells) >= 4
    assert shown
    assert all(cell.execution_count for cell in cells)
