"""TorchScript files: networks that come with their program.

Loading one runs what it says. Load one only from where you trust.
"""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch


def is_torchscript(path: Path) -> bool:
    """State dicts may be zip archives, too; only TorchScript's has code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def load_torchscript(path: Path, device: torch.device) -> Any:
    """The network of a file, for evaluation. Raises `RuntimeError` if the file is damaged."""
    with warnings.catch_warnings():
        # torch calls TorchScript deprecated; the file is what it is.
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(str(path), map_location=device).eval()


def reason(error: RuntimeError) -> str:
    """What TorchScript says went wrong, in one line.

    A failure inside the network's program is told at the end of its traceback, any other one first.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if lines[0].startswith("The following operation failed") else lines[0]
