"""Several ranks of a tiny training: how tests start them, and what they do."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from matryoshka_diffusion.config import LoraConfig, StageConfig
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.train.distributed import World, local
from tiny_run import TinyClips, TinyPictures, encode, tiny_config, tiny_video

ROOT = Path(__file__).parent.parent
STAGES = (
    StageConfig(levels=1, images=24, batch_size=4, lr=1e-3),
    # One row of four has the finest level, so one rank of two has none; the last step has one row.
    # Its first two steps leave the coarse level alone.
    StageConfig(
        levels=2,
        images=21,
        batch_size=4,
        lr=1e-3,
        mix=(0.75, 0.25),
        freeze_coarse_images=8,
        ramp_images=12,
    ),
)
SETTINGS: dict[str, Any] = {"stages": STAGES, "ema_power": (0.1,)}


def start_ranks(size: int, *arguments: str, script: str = __file__) -> list[subprocess.Popen[str]]:
    """This file, or another, in `size` processes that are told of each other as by torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def run_ranks(size: int, jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Do `jobs` on `size` ranks, which must succeed; returns what each said on stderr."""
    processes = start_ranks(size, json.dumps(list(jobs)))
    said = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * size, "\n".join(said)
    return said


def main(jobs: str, rank_timeout: str = "20") -> None:
    from matryoshka_diffusion.train.distributed import joined
    from matryoshka_diffusion.train.signals import Stopped

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with joined(torch.device("cpu"), "ddp", int(rank_timeout)) as world:
        for job in json.loads(jobs):
            with suppress(Stopped):
                train_tiny(replace(world, parallel=job.pop("parallel", "ddp")), **job)


def learnt(trainer: Any) -> str:
    """A hash of this rank's weights, averages and moments."""
    snapshot, digest = trainer.snapshot(), hashlib.sha256()
    for part in (snapshot.weights, snapshot.ema, snapshot.optimizer, snapshot.tracks):
        for name, value in part.items():
            digest.update(name.encode() + local(value.detach()).numpy().tobytes())
    return digest.hexdigest()


class SameRows(World):
    def mine(self, numbers: range) -> range:
        return numbers[:: self.size]


def train_tiny(
    world: Any,
    folder: str,
    stop_at: int | None = None,
    stop_rank: int = 0,
    break_at: int | None = None,
    overflow_at: int | None = None,
    fail_at: int | None = None,
    same_rows: bool = False,
    pace: float = 0.0,
    adapters: bool = False,
    clips: bool = False,
    **settings: Any,
) -> None:
    """A training whose samples, times and noise are written down as they are learnt.

    Args:
        stop_at: images after which rank `stop_rank` gets a SIGTERM.
        break_at: number of a sample whose picture is NaN.
        overflow_at: images after which rank 1 alone has an infinite gradient.
        fail_at: number of a sample that raises an error.
        same_rows: whether every rank takes rank 0's samples.
        pace: seconds that a step takes at least.
        adapters: whether only adapters are trained, around a network of both levels.
        clips: whether the finer level is one of clips.
        settings: of `train` in the config.
    """
    from matryoshka_diffusion.train.checkpoint import fingerprint
    from matryoshka_diffusion.train.step import Skipped
    from matryoshka_diffusion.train.trainer import Trainer, train

    Path(folder).mkdir(parents=True, exist_ok=True)
    record = open(Path(folder) / f".seen-{world.rank}.jsonl", "a")  # noqa: SIM115
    learn, clip = Trainer.step, nn.utils.clip_grad_norm_

    def overflowing(parameters: Any, *args: Any) -> Any:
        listed = list(parameters)
        local(listed[0].grad).fill_(float("inf"))
        return clip(listed, *args)

    def recorded(self: Any, inputs: Any) -> Any:
        for row, n in enumerate(inputs.ids):
            noise = [level[row].numpy().tobytes() for level in inputs.noise if row < len(level)]
            digest = hashlib.sha256(b"".join(noise)).hexdigest()
            record.write(json.dumps([n, inputs.keys[row], inputs.t[row].item(), digest]) + "\n")
        if break_at in inputs.ids:
            inputs.x[0][inputs.ids.index(break_at)] = float("nan")
        record.flush()
        before = learnt(self) if break_at is not None else ""
        if fail_at in inputs.ids:
            raise ValueError(f"sample {fail_at} is bad")
        time.sleep(pace)
        if inputs.step.first == overflow_at and world.rank == 1:
            nn.utils.clip_grad_norm_ = overflowing
        outcome = learn(self, inputs)
        if break_at in range(inputs.step.first, inputs.step.end):
            assert isinstance(outcome, Skipped)
            assert learnt(self) == before, "a skipped step changes no bit"
        nn.utils.clip_grad_norm_ = clip
        if inputs.step.end == stop_at and world.rank == stop_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return outcome

    Trainer.step = recorded
    if same_rows:
        world = SameRows(**vars(world))
    base = None
    if adapters:
        base = NestedUNet(tiny_config(dropout=0.0).model, seed=1).state_dict()
        lora = LoraConfig(rank=4, base=fingerprint(base))
        whole = STAGES[1].model_copy(update={"freeze_coarse_images": 0, "ramp_images": 0})
        settings |= {"stages": (whole,), "init": "base", "lora": lora}
    given = {key: tuple(x) if isinstance(x, list) else x for key, x in settings.items()}
    make, pictures = (tiny_video, TinyClips()) if clips else (tiny_config, TinyPictures())
    config = make(dropout=0.0, **(SETTINGS | given))
    try:
        train(config, pictures, Path(folder), encode=encode, base=base, world=world)
    finally:
        Trainer.step = learn
        record.close()


def seen(folder: Path) -> list[list[Any]]:
    """What all ranks together have learnt from: number, key, time and noise, sorted."""
    lines = [
        json.loads(line)
        for path in folder.glob(".seen-*.jsonl")
        for line in path.read_text("utf-8").splitlines()
    ]
    return sorted(lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
