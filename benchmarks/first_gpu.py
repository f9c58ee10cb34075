"""Measure this code on a GPU: one command of nine minutes, its sections in order of worth.

    python -m benchmarks.first_gpu --out DIR --seconds 520

The JSON is written anew after every section. A section that fails leaves its traceback there, and
the next one begins; one whose usual time is not left is skipped. Without a GPU the same sections
run on networks so small that their numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks import blocks, families, harness
from benchmarks.meter import Meter, Numbers, attempt, flag
from benchmarks.steps import Noise, Repeated, features, trainer
from matryoshka_diffusion.config import RunConfig, TrainConfig
from matryoshka_diffusion.nn.costs import activation_bytes, forward_flops
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.training.inputs import Feed
from matryoshka_diffusion.training.precision import Precision, algorithms, compile_network
from matryoshka_diffusion.training.stages import Step


class Sizes(NamedTuple):
    """Presets with the batches to measure, and sizes of arrays."""

    training: Mapping[str, int]
    sampling: Mapping[str, Sequence[int]]
    compiled: tuple[str, int]
    product: int
    copied: int
    features: Sequence[blocks.Shape]
    """Shapes of the features in attention and in norms."""
    pictures: int
    images: int
    """Pictures in the data of a run, and images of its training."""
    precisions: Sequence[Precision] = ("bf16", "fp32", "fp16")
    steps: int = 5
    """Sampler steps."""
    config: Callable[[str], RunConfig] = preset


ON_GPU = Sizes(
    training={"cc12m-64": 64, "cc12m-256": 32, "cc12m-1024": 16, "webvid-16x256": 4},
    sampling={"imagenet-64": (1, 16, 64), "imagenet-1024": (8,)},
    compiled=("cc12m-64", 32),
    product=8192,
    copied=2**30,
    features=((64, 512, 32), (64, 768, 16)),
    pictures=256,
    images=640,
)
WITHOUT_GPU = Sizes(
    training={"tiny": 2},
    sampling={"tiny": (1, 2)},
    compiled=("tiny", 2),
    product=64,
    copied=2**10,
    features=((2, 64, 4),),
    pictures=4,
    images=8,
    precisions=("bf16",),
    steps=1,
    config=families.tiny,
)


class Bench(NamedTuple):
    """The device with its meter, what to measure on it, and what earlier sections found."""

    meter: Meter
    sizes: Sizes
    results: Numbers
    features: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.meter.device

    def trainer(self, name: str, batch: int, precision: Precision = "bf16") -> Repeated:
        """A preset's trainer in the layout that a run has on this device."""
        layout = self.meter.layout
        return trainer(
            self.sizes.config(name), batch, self.device, precision=precision, layout=layout
        )


# --- sections ------------------------------------------------------------------------------------


def machine(bench: Bench) -> Numbers:
    """Measure the best rates of the hardware, the ceilings of the shares in later sections."""
    side, count, device = bench.sizes.product, bench.sizes.copied, bench.device
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    source, target = (torch.randn(count, device=device) for _ in range(2))
    host = torch.randn(count // 4)
    product, copy = (
        bench.meter.seconds(lambda: a @ a),
        bench.meter.seconds(lambda: target.copy_(source)),
    )
    found = {"bf16 TFLOP/s": 2e-12 * side**3 / product, "copy TB/s": 8e-12 * count / copy}
    for name in ("pageable", "pinned")[: 1 + bench.meter.gpu]:
        memory = host.pin_memory() if name == "pinned" else host
        spent = bench.meter.seconds(lambda memory=memory: target[: len(memory)].copy_(memory))
        found[f"{name} GB/s"] = count / spent / 1e9
    tf32 = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    return found | {"TF32 of convolutions and products": tf32}


def smoke(bench: Bench) -> Numbers:
    """Every family trains and samples in every precision: "ok", or the error."""
    found: Numbers = {}
    for name, family in families.FAMILIES.items():
        for precision in bench.sizes.precisions:
            failed = attempt(partial(family, bench.device, precision))
            found[f"{name} {precision}"] = failed or "ok"
    return found


def steps(bench: Bench) -> Numbers:
    """A training step of each preset: time, share of the bf16 product, memory, waits, kernels."""
    found: Numbers = {}
    for name, batch in bench.sizes.training.items():
        found[name] = attempt(partial(_steps_of, bench, name, batch))
        gc.collect()
        print(name, json.dumps(found[name]), flush=True)
    return found


def _steps_of(bench: Bench, name: str, batch: int) -> Numbers:
    model = bench.sizes.config(name).model
    count = len(model.levels)
    flops = 3 * forward_flops(model, count)
    repeated, row = _fitting(bench, name, batch)
    batch = len(repeated.inputs.ids)
    row |= {"batch": batch, "TFLOP": flops * batch / 1e12}
    row["--dry-run's GB an image"] = activation_bytes(model, count, half=True) / 1e9
    row["kept GB an image"] = repeated.activation_bytes() / batch / 1e9
    row["waits"] = bench.meter.host_waits(repeated.step)
    row["kernels"] = bench.meter.kernels(repeated.step, top=14)
    for variant, context in _variants(repeated.trainer.train).items():
        with context:
            try:
                seconds = bench.meter.seconds(repeated.step, 3)
            except torch.OutOfMemoryError as error:
                row[variant] = str(error)[:200]
                continue
        peak = flops * batch / seconds / 1e12 / bench.results["machine"]["bf16 TFLOP/s"]
        row[variant] = {"ms": 1e3 * seconds, "images/s": batch / seconds, "of the peak": peak}
    return row


def _fitting(bench: Bench, name: str, batch: int) -> tuple[Repeated, Numbers]:
    """The trainer of the largest batch that the memory holds, at most `batch`, and its memory.

    Raises OutOfMemoryError if not even 2 images fit, the fewest that have a half to compare with.
    """
    while True:
        try:
            repeated = bench.trainer(name, batch)
            return repeated, _memory(bench, repeated, batch)
        except torch.OutOfMemoryError:
            if batch < 4:
                raise
            repeated = None
        batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


def _memory(bench: Bench, repeated: Repeated, batch: int) -> Numbers:
    """Peak memory, and how it grows with an image, from a step of the batch and one of half."""
    half = Repeated(repeated.trainer, repeated.inputs.rows(slice(batch // 2)))
    half.step()
    some, all_ = bench.meter.peak_bytes(half.step), bench.meter.peak_bytes(repeated.step)
    return {"peak GB": all_ / 1e9, "GB an image": (all_ - some) / (batch - batch // 2) / 1e9}


def _variants(train: TrainConfig) -> dict[str, AbstractContextManager[None]]:
    """How a run computes, and the other choices that it has."""
    return {
        "as it is": algorithms(train),
        "cudnn.benchmark off": flag(torch.backends.cudnn, "benchmark", False),
        "deterministic": algorithms(train.model_copy(update={"deterministic": True})),
    }


def agreement(bench: Bench) -> Numbers:
    """Grey values between CPU and GPU, alone and in a batch; gradients that repeat bit for bit."""
    encoder = families.Words(384, bench.features)

    def grey(device: torch.device, n: int, precision: Precision = "fp32") -> np.ndarray:
        model = Matryoshka.load("openmoji", device=device, encoder=encoder, precision=precision)
        return model.sample("red apple", n=n, steps=bench.sizes.steps).pictures.astype(int)

    found: Numbers = {"text features": "noise" if bench.features is None else "MiniLM"}
    on_cpu = grey(torch.device("cpu"), 4)
    cases: tuple[tuple[str, Precision, bool], ...] = (
        ("fp32", "fp32", False),
        ("TF32", "fp32", True),
        ("bf16", "bf16", False),
    )
    for case, precision, tf32 in cases:
        with flag(torch.backends.cudnn, "allow_tf32", tf32):
            several, alone = (grey(bench.device, n, precision) for n in (4, 1))
        apart = abs(several - on_cpu)
        found[f"CPU and GPU, {case}"] = {"most": int(apart.max()), "mean": float(apart.mean())}
        found[f"alone and in four, {case}"] = int(abs(several[:1] - alone).max())
    name, batch = bench.sizes.compiled
    for precision in ("bf16", "fp32"):
        repeated = bench.trainer(name, min(batch, 8), precision)
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic, warn_only=True)
            with warnings.catch_warnings(record=True) as notes:
                warnings.simplefilter("always")
                one, other = _gradients(repeated), _gradients(repeated)
                row: Numbers = {"equal": all(map(torch.equal, one, other))}
            row["ms"] = 1e3 * bench.meter.seconds(repeated.step, 3)
            row["refused"] = sorted({str(note.message)[:120] for note in notes})
            found[f"gradients again, {precision}, deterministic {deterministic}"] = row
        torch.use_deterministic_algorithms(False)
    return found


def _gradients(repeated: Repeated) -> list[Tensor]:
    repeated.trainer.gradient([repeated.inputs], 1.0)
    return [p.grad.clone() for p in repeated.trainer.net.parameters() if p.grad is not None]


def feed(bench: Bench) -> Numbers:
    """Images/s of the one thread that makes a run's inputs, without reading and decoding."""
    found: Numbers = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, batch in bench.sizes.training.items():
        config = bench.sizes.config(name)
        ready = Noise(config).batch(range(batch))
        loader = mock.Mock(batch=lambda ids, ready=ready: ready)
        stage = len(config.train.stages) - 1
        step = Step(stage, 0, (batch,) * len(config.model.levels), (), False)
        make = Feed(config, loader, features(config), bench.device)
        found[name] = batch / bench.meter.seconds(lambda make=make, step=step: make(step), 2)
    torch.set_num_threads(threads)
    return found


def sampling(bench: Bench) -> Numbers:
    """Seconds a sampler step in bf16, and the share of them in which no kernel runs."""
    found: Numbers = {}
    for name, counts in bench.sizes.sampling.items():
        config = bench.sizes.config(name)
        net = NestedUNet(config.model)
        model = Matryoshka(net, config, device=bench.device, precision="bf16")
        run = partial(model.sample, classes=[0], steps=bench.sizes.steps)
        for count in counts:
            for sampler in ("ddpm", "dpmpp-2m"):
                draw = partial(run, n=count, batch_size=count, sampler=sampler)
                row = bench.meter.kernels(draw, top=5)
                row["ms a step"] = row.pop("ms") / bench.sizes.steps
                found[f"{name} {count} {sampler}"] = row
        found[f"{name} waits"] = bench.meter.host_waits(partial(run, n=1))
    return found


def runs(bench: Bench) -> Numbers:
    """`mdm train` end to end, the same run again, and one resumed from its middle."""
    sizes = bench.sizes
    return families.resume(bench.device, sizes.pictures, sizes.images, sizes.precisions[:2])


def compiled(bench: Bench) -> Numbers:
    """A step whose blocks are compiled against the plain one."""
    name, batch = bench.sizes.compiled
    repeated = bench.trainer(name, batch)
    found = {"plain ms": 1e3 * bench.meter.seconds(repeated.step, 3)}
    began = time.perf_counter()
    if bench.meter.gpu:
        compile_network(repeated.trainer.net, bench.device)
    repeated.step()
    harness.synchronize(bench.device)
    found["seconds to compile"] = time.perf_counter() - began
    return found | {"blocks ms": 1e3 * bench.meter.seconds(repeated.step, 3)}


SECTIONS: dict[str, tuple[Callable[[Bench], Numbers], float]] = {
    "machine": (machine, 10),
    "smoke": (smoke, 60),
    "steps": (steps, 120),
    "agreement": (agreement, 40),
    "attention": (lambda bench: blocks.attention(bench.meter, bench.sizes.features), 15),
    "norms": (lambda bench: blocks.norms(bench.meter, bench.sizes.features), 25),
    "runs": (runs, 40),
    "sampling": (sampling, 50),
    "feed": (feed, 20),
    "compiled": (compiled, 90),
}
"""Sections in order of worth, with their usual seconds on a GPU."""


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the sections; returns the file of results."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--out", type=Path, default=harness.ROOT / "benchmarks" / "results", help="its folder")
    add("--seconds", type=float, default=520, help="no section begins that would end later")
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--commit", default=harness.commit(), help="what is measured, where git cannot say it")
    add("--features", type=Path, help="MiniLM's features of 'red apple', as .npy (noise)")
    words = sys.argv[1:] if arguments is None else list(arguments)
    values = options.parse_args(words)
    device, began = torch.device(values.device), time.monotonic()
    about = harness.machine(device)
    content: Numbers = {
        "benchmark": "first_gpu",
        "command": shlex.join(["python", "-m", "benchmarks.first_gpu", *words]),
        "commit": values.commit,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": about | _driver(device),
        "sections": {},
    }
    text = None if values.features is None else torch.from_numpy(np.load(values.features))
    sizes = ON_GPU if device.type == "cuda" else WITHOUT_GPU
    bench = Bench(Meter(device), sizes, content["sections"], text)
    values.out.mkdir(parents=True, exist_ok=True)
    path = values.out / f"first_gpu-{harness.kind_of(about['processor'])}.json"
    for name in values.only:
        section, usual = SECTIONS[name]
        start = time.monotonic()
        if start - began + usual > values.seconds:
            bench.results[name] = {"skipped": "no time left"}
        else:
            bench.results[name] = attempt(partial(section, bench))
            bench.results[name]["seconds"] = time.monotonic() - start
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(bench.results[name])[:1500], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return path


def _driver(device: torch.device) -> Numbers:
    if device.type != "cuda":
        return {}
    about = torch.cuda.get_device_properties(device)
    return {
        "driver": harness.output_of(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        ),
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "memory GB": about.total_memory / 1e9,
    }


if __name__ == "__main__":
    main()
