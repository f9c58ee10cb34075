"""What a GPU may be promised without one: no mixed devices, and one wait of the host a step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.families import FAMILIES

HERE = Path(__file__).parent


@pytest.mark.skipif(
    torch.cuda.is_available() or shutil.which("g++") is None or sys.platform != "linux",
    reason="needs a C++ compiler, and torch's build for CPUs",
)
def test_a_step_of_every_family_mixes_no_devices_and_waits_for_the_gpu_once(tmp_path):
    place, library = Path(torch.__file__).parent, tmp_path / "fake_gpu.so"
    include = [f"-I{place}/include", f"-I{place}/include/torch/csrc/api/include"]
    link = [f"-L{place}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{place}/lib"]
    source = str(HERE / "fake_gpu.cpp")
    build = ["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", str(library), *include, *link]
    subprocess.run(build, check=True)
    paths = os.pathsep.join(map(str, (HERE.parent / "src", HERE.parent)))
    done = subprocess.run(
        [sys.executable, str(HERE / "fake_gpu.py"), str(library)],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    waits = json.loads(done.stdout.splitlines()[-1])
    once = ["trainer.py: norms, total, *per_level = sums.tolist()"]
    assert waits == dict.fromkeys(FAMILIES, once)
