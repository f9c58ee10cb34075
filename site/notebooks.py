"""Run the notebooks of examples/ and keep what they show: `make notebooks`.

Each runs in an empty folder, so what it writes is not left beside it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parent.parent / "examples"
SECONDS = 900
"""Time for one cell, at most."""


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the output of every cell; progress and warnings are left out.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for mdm
    with TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=SECONDS, resources={"metadata": {"path": folder}}
        ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the time of day
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
            for out in cell.outputs:
                if out.get("name") == "stdout":
                    lines = out.text.replace(f"{folder}/", "").split("\n")
                    out.text = "\n".join(line.rsplit("\r", 1)[-1] for line in lines)
    return notebook


if __name__ == "__main__":
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        print(path.name, flush=True)
        nbformat.write(execute(path), path)
