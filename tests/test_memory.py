"""Memory of a training process: what is freed stays at hand."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from matryoshka_diffusion.training import memory

# In a process of its own, because the setting holds for the whole process.
FREED = """
import resource
import torch
from matryoshka_diffusion.training.step import diffusion
from matryoshka_diffusion.training.trainer import Trainer
from tiny_run import tiny_config

def touch():
    return [torch.ones(2**22) for _ in range(8)]  # 16 MB each, 4,096 pages of 4 KB

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    touch()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

Trainer(diffusion(tiny_config()))
touch()
# Now and then a small block comes to lie among the large ones, and one of these has to move once.
print(min(faults() for _ in range(4)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries stay as they are")
def test_a_training_process_asks_the_system_for_memory_once():
    faults = subprocess.run(
        [sys.executable, "-c", FREED],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(faults.stdout) < 1_000  # of 32,768 pages


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_a_system_without_mallopt_is_left_alone(system, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    memory.keep_freed_memory()
