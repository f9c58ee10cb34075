"""Processes of a tiny training, several ranks of it or one: how tests start them, and what they do.

They are forked from a server that has imported torch already.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from matryoshka_diffusion.config import DataConfig, LoraConfig, MixedData, RunConfig, StageConfig
from matryoshka_diffusion.configfile import override
from matryoshka_diffusion.data.loader import Loader
from matryoshka_diffusion.data.mix import mixed
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.training.distributed import World, joined, local
from matryoshka_diffusion.training.signals import Stopped
from matryoshka_diffusion.training.step import Skipped
from matryoshka_diffusion.training.trainer import Trainer, train
from matryoshka_diffusion.training.weights import fingerprint
from picturing import toy
from tiny_run import CAPTIONS, TinyClips, TinyPictures, TinyShapes, encode, tiny_config, tiny_video

ROOT = Path(__file__).parent.parent
STAGES = (
    StageConfig(levels=1, images=8, batch_size=4, lr=1e-3),
    # One row of four has the finest level, so one rank of two has none; the last step has one row.
    # Its first step leaves the coarse level alone.
    StageConfig(
        levels=2,
        images=13,
        batch_size=4,
        lr=1e-3,
        mix=(0.75, 0.25),
        freeze_coarse_images=4,
        ramp_images=8,
    ),
)
SETTINGS: dict[str, Any] = {"stages": STAGES, "lr_per_level": True, "ema_power": (0.1,)}
SHARES = (0.7, 0.3)
"""Shares of the data sets of a mix."""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["matryoshka_diffusion.training.trainer"])


class Process(NamedTuple):
    """A process and the file that its stderr goes to."""

    process: Any
    log: Path

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self, within: float = 600.0) -> tuple[int, str]:
        """Wait for the end; return the exit status and stderr."""
        self.process.join(within)
        errors = self.log.read_text("utf-8")
        assert self.process.exitcode is not None, errors
        return self.process.exitcode, errors


def start(function: Callable[..., None], *arguments: Any, **environment: str) -> Process:
    """Call a function in a process of its own, with one thread."""
    number, log = tempfile.mkstemp(prefix="mdm-test-")
    os.close(number)
    process = FORKS.Process(target=_call, args=(log, environment, function, arguments), daemon=True)
    process.start()
    return Process(process, Path(log))


def _call(
    log: str, environment: Mapping[str, str], function: Callable[..., None], arguments: Any
) -> None:
    os.dup2(os.open(log, os.O_WRONLY), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    function(*arguments)


def fork(function: Callable[..., None], *arguments: Any) -> int:
    """Call a short function in a copy of this process; return its exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which hold no lock here
        child = os.fork()
    if child == 0:
        try:
            function(*arguments)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start_ranks(size: int, function: Callable[..., None], *arguments: Any) -> list[Process]:
    """Call a function in `size` processes that know of each other as torchrun would tell them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world = {**place, "WORLD_SIZE": str(size)}
    return [
        start(function, *arguments, **world, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(size)
    ]


def end_ranks(ranks: Sequence[Process], statuses: Sequence[int] = (0, 0)) -> list[str]:
    """Wait for ranks, which must end with these statuses; return the stderr of each."""
    ends = [rank.end() for rank in ranks]
    errors = [errors for _, errors in ends]
    assert [status for status, _ in ends] == list(statuses), "\n".join(errors)
    return errors


def train_jobs(jobs: Sequence[dict[str, Any]], rank_timeout: int = 20) -> None:
    """Do trainings one after the other on the ranks of which this process is one."""
    with joined(torch.device("cpu"), "ddp", rank_timeout) as world:
        for job in jobs:
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
    unreadable_at: int | None = None,
    same_rows: bool = False,
    pace: float = 0.0,
    kind: str = "pictures",
    **settings: Any,
) -> None:
    """Train and write down the samples, times and noise that each step learns from.

    Args:
        stop_at: images after which rank `stop_rank` gets a SIGTERM.
        break_at: number of a sample whose picture is NaN.
        overflow_at: images after which the last rank alone has an infinite gradient.
        fail_at: number of a sample that raises an error.
        unreadable_at: number of a sample that the system cannot read.
        same_rows: True if every rank takes rank 0's samples.
        pace: seconds that a step takes at least.
        kind: `adapters` trains only these, around a network of both levels; `clips` has clips in
            the finer level; `mix` has two data sets; `shapes` has images of three shapes.
        settings: of `train` in the config.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    record = open(Path(folder) / f".seen-{world.rank}.jsonl", "a")  # noqa: SIM115
    learn, clip = Trainer.step, nn.utils.clip_grad_norm_

    def overflowing(parameters: Any, *args: Any) -> Any:
        listed = list(parameters)
        local(listed[0].grad).fill_(float("inf"))
        return clip(listed, *args)

    def recorded(self: Any, inputs: Any) -> Any:
        step, ids = inputs[0].step, [n for part in inputs for n in part.ids]
        for part in inputs:
            for row, n in enumerate(part.ids):
                noise = [level[row].numpy().tobytes() for level in part.noise if row < len(level)]
                digest = hashlib.sha256(b"".join(noise)).hexdigest()
                record.write(json.dumps([n, part.keys[row], part.t[row].item(), digest]) + "\n")
            if break_at in part.ids:
                part.x[0][part.ids.index(break_at)] = float("nan")
        record.flush()
        time.sleep(pace)
        if fail_at in ids:
            raise ValueError(f"sample {fail_at} is bad")
        overflows = step.first == overflow_at
        skips = overflows or break_at in range(step.first, step.end)
        if overflows and world.rank == world.size - 1:
            nn.utils.clip_grad_norm_ = overflowing
        before = learnt(self) if skips else ""
        outcome = learn(self, inputs)
        nn.utils.clip_grad_norm_ = clip
        if skips:
            assert isinstance(outcome, Skipped)
            assert learnt(self) == before, "a skipped step changes no bit"
        if step.end == stop_at and world.rank == stop_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return outcome

    Trainer.step = recorded
    if same_rows:
        world = SameRows(**vars(world))
    base = None
    if kind == "adapters":
        base = NestedUNet(tiny_config(dropout=0.0).model, seed=1).state_dict()
        lora = LoraConfig(rank=4, base=fingerprint(base))
        plain = STAGES[1].model_copy(update={"freeze_coarse_images": 0, "ramp_images": 0})
        settings |= {"stages": (plain,), "init": "base", "lora": lora}
    loader = {"clips": TinyClips, "shapes": TinyShapes}.get(kind, TinyPictures)()
    loader.unreadable_at = unreadable_at
    make = tiny_video if kind == "clips" else tiny_config
    config = make(dropout=0.0, **(SETTINGS | settings))
    if kind == "shapes":
        config = override(config, ["data.shapes=own"])
    if kind == "mix":
        config, loader = with_mix(config)
    try:
        train(config, loader, Path(folder), encode=encode, base=base, world=world)
    finally:
        Trainer.step = learn
        record.close()


def with_mix(config: RunConfig) -> tuple[RunConfig, Loader]:
    """The config with two data sets, of five images and of three, and their loader."""
    mix = tuple(MixedData(path=str(n), share=share) for n, share in enumerate(SHARES))
    data = DataConfig(source="folder", mix=mix, flip=True)
    parts = [toy(count, 16, captions=[CAPTIONS[:3]] * count) for count in (5, 3)]
    config = config.model_copy(update={"data": data})
    return config, Loader.of(mixed(parts, data), config.train.seed, data)


def seen(folder: Path) -> list[list[Any]]:
    """Number, key, time and noise of all samples that the ranks have learnt from, sorted."""
    lines = [
        json.loads(line)
        for path in folder.glob(".seen-*.jsonl")
        for line in path.read_text("utf-8").splitlines()
    ]
    return sorted(lines)
