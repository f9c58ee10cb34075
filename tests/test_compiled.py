"""torch.compile as a switch. The tests trace and do not generate code, which takes minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from matryoshka_diffusion.config import ConfigError, RunConfig, StageConfig
from matryoshka_diffusion.train import trainer as trainer_module
from matryoshka_diffusion.train.inputs import Feed
from matryoshka_diffusion.train.precision import compile_network
from matryoshka_diffusion.train.stages import steps
from matryoshka_diffusion.train.step import diffusion
from matryoshka_diffusion.train.trainer import Trainer
from tiny_run import TinyPictures, encode, tiny_config

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def test_a_compiled_run_has_the_losses_of_a_plain_one():
    """In a process of its own: the tests' checks of shapes cannot be traced."""
    paths = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for told in map(json.loads, done.stdout.splitlines()):
        assert max(told["traced"]) > 100, "nodes of the network"
        assert told["compiled"] == pytest.approx(told["plain"], rel=1e-6)
        assert told["same_keys"]


def main() -> None:
    """Train with and without, recomputing nothing and a level; a JSON line for each."""
    stages = (
        StageConfig(levels=1, images=8, batch_size=4, lr=1e-2),
        StageConfig(levels=2, images=8, batch_size=4, lr=1e-2, mix=(0.5, 0.5)),  # ragged
    )
    for recompute in ((), (1,)):
        traced = []

        def backend(graph: torch.fx.GraphModule, example: object, traced: list[int] = traced):
            traced.append(len(graph.graph.nodes))
            return graph.forward

        trainer_module.compile_network = lambda net, device, backend=backend: compile_network(
            net, device, backend
        )
        settings = {"dropout": 0.0, "stages": stages, "recompute": recompute}
        trainer, compiled = train(tiny_config(**settings, compile=True))
        other, plain = train(tiny_config(**settings))
        told = {
            "traced": traced,
            "compiled": compiled,
            "plain": plain,
            "same_keys": trainer.net.state_dict().keys() == other.net.state_dict().keys(),
        }
        print(json.dumps(told))


def train(config: RunConfig) -> tuple[Trainer, list[float]]:
    trainer, feed = Trainer(diffusion(config), CPU), Feed(config, TinyPictures(), encode)
    losses = []
    for step in steps(config.train):
        trainer.grow(len(step.rows))
        losses.append(trainer.step(feed(step)).loss)
    return trainer, losses


def test_without_a_compiler_the_error_comes_at_the_start(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no no-such-compiler: install it.*train\.compile=false"):
        Trainer(diffusion(tiny_config(compile=True)), CPU)


def test_on_a_gpu_triton_is_needed_too(monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr("matryoshka_diffusion.train.precision.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package triton"):
        compile_network(torch.nn.Linear(1, 1), torch.device("cuda"))


if __name__ == "__main__":
    main()
