"""The memory that metrics tell of."""

from __future__ import annotations

import builtins
import json

import numpy as np
import torch

from matryoshka_diffusion.train.log import peak_memory_bytes
from test_trainer import run

CPU = torch.device("cpu")


def test_the_peak_is_that_of_this_process_in_bytes():
    before = peak_memory_bytes(CPU)
    assert before is not None
    assert before > 50e6, "an interpreter with torch"
    held = np.ones(int(before) + 200_000_000, np.uint8)  # larger than the process ever was
    after = peak_memory_bytes(CPU)
    assert after is not None
    assert held.nbytes < after < 3 * held.nbytes
    del held
    assert peak_memory_bytes(CPU) == after, "a peak does not fall"


def test_a_gpu_is_asked_for_what_its_tensors_held(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    assert peak_memory_bytes(torch.device("cuda")) == 7


def test_where_the_system_does_not_count_nothing_is_told(monkeypatch):
    real = builtins.__import__

    def without_resource(name, *rest):
        if name == "resource":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_resource)
    assert peak_memory_bytes(CPU) is None


def test_every_line_of_metrics_has_it(tmp_path):
    run(tmp_path)
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines())
    assert all(line["peak_memory_bytes"] > 50e6 for line in lines)
