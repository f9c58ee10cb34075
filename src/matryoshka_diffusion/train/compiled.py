"""torch.compile as a switch: minutes at the start of every stage, then faster steps."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from matryoshka_diffusion.config import ConfigError

Backend = str | Callable[..., Any]
"""What torch.compile hands the traced network to."""


def compile_network(net: nn.Module, device: torch.device, backend: Backend = "inductor") -> None:
    """From now on run `net` as compiled code. Its parameters and their names stay what they are.

    Raises:
        ConfigError: the compiler that torch would call at the first step is not there.
    """
    if backend == "inductor":
        _check_compilers(device)
    net.compile(backend=backend)


def _check_compilers(device: torch.device) -> None:
    """Torch translates to C++ for a CPU; for a GPU to Triton, which calls a C compiler in turn."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"train.compile needs a C++ compiler, and there is no {compiler}: install it, name "
            "another in the environment variable CXX, or set train.compile=false"
        )
    if device.type == "cuda" and find_spec("triton") is None:
        raise ConfigError(
            "train.compile needs the package triton on a GPU: install it, or set "
            "train.compile=false"
        )
