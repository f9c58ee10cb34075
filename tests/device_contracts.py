"""Training and sampling on a fake GPU (`benchmarks/fake_gpu.py`), in a process of its own.

    python tests/device_contracts.py FOLDER

prints, as JSON, what `test_devices.py` compares.
"""

from __future__ import annotations

import benchmarks.fake_gpu  # isort: skip  # noqa: F401  (its library loads before torch)

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from benchmarks import fake_gpu, trace
from benchmarks.families import CONFIGS, Codes, Words
from benchmarks.tracer import Tracer
from torch import nn
from torch.nn import functional as F

from matryoshka_diffusion.cascade import Cascade
from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.nn.costs import activation_bytes
from matryoshka_diffusion.nn.layers import shapes_only
from matryoshka_diffusion.nn.lora import attach
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.nn.norms import normalise
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.training import step as steps
from matryoshka_diffusion.training.inputs import Beside, Inputs, fetched
from matryoshka_diffusion.training.precision import algorithms
from matryoshka_diffusion.training.stages import Step

ROWS = (4, 3, 2)


def build(model: Any, train: Any, base: Any) -> nn.Module:
    """A network as a run has it, around no particular base."""
    net = NestedUNet(model, seed=train.seed)
    return net if train.lora is None else attach(net, train.lora, train.seed)


def combinations() -> list[tuple[str, dict[str, Any]]]:
    """Families in every precision, with settings so that each pair of values occurs."""
    cases = []
    for family, name in enumerate(CONFIGS):
        for place, precision in enumerate(("bf16", "fp32", "fp16")):
            settings = {
                "precision": precision,
                "layout": ("channels_last", "nchw")[(family + place) % 2],
                "recompute": ((), (0,))[(family // 2 + place) % 2],
                "accumulate": (1, 2)[(family // 4 + (place > 0)) % 2],
                "deterministic": (family // 2 + family // 4 + place) % 2 == 1,
                "grow": (family + family // 2 + (place > 1)) % 2 == 1,
            }
            cases.append((name, settings))
    return cases


def step(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Trace one training step, perhaps the first one after growing."""
    changes = {key: value for key, value in settings.items() if key != "grow"}
    config = CONFIGS[name]
    config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    trainer = trace.trainer(config, grow=settings["grow"])
    with Tracer() as feeding:
        inputs = trace.inputs(config, ROWS[: trainer.levels])
    kept = trace.kept(trainer.net, config.train.precision, inputs)
    with Tracer() as tracer, algorithms(config.train):
        trainer.step([inputs])
    return {
        "family": name,
        "settings": settings,
        "waits": tracer.waits,
        "waits of inputs": feeding.waits,
        "copies of inputs": dict(feeding.copies),
        "doubles of inputs": dict(feeding.doubles),
        "copies": dict(tracer.copies),
        "attention": sorted({kernel.split()[0] for kernel in tracer.attention}),
        "doubles": dict(tracer.doubles),
        "kept in float32": dict(kept.floats),
        "kernels": len(tracer.kernels),
    }


def training() -> list[dict[str, Any]]:
    """Steps of every family."""
    steps.build_network = build
    return [step(name, settings) for name, settings in combinations()]


def beside() -> dict[str, Any]:
    """How inputs come from another stream to that of the network."""
    config, streams = CONFIGS["text"], []

    def make(step: Step) -> tuple[Inputs]:
        streams.append(fake_gpu.STREAMS[-1])
        return (trace.inputs(config, step.rows),)

    made = Beside(make, trace.GPU)(Step(0, 0, (2, 1), (), False))
    recorded = list(fake_gpu.ORDER)
    (inputs,), _, _ = fetched(iter([made]))
    tensors = [*inputs.x, *inputs.noise, inputs.t]
    inputs.cond.map(lambda x: tensors.append(x) or x)
    order = fake_gpu.ORDER[len(recorded) :]
    return {
        "streams": streams,
        "recorded": recorded,
        "order": order,
        "tensors": [f"main uses {x.shape}" for x in tensors],
    }


def memory() -> dict[str, list[float]]:
    """GB that an image keeps, traced and as `--dry-run` counts it on shapes."""
    figures = {}
    for name, recompute in (("cc12m-64", ()), ("cc12m-256", (1,)), ("cc12m-1024", ())):
        config = preset(name)
        levels = len(config.model.levels)
        with shapes_only():
            net = NestedUNet(config.model)
        net.to_empty(device="cuda").recompute(recompute)
        traced = trace.kept(net, "bf16", trace.inputs(config, (1,) * levels)).rows
        counted = activation_bytes(config.model, levels, recompute, half=True)
        figures[name] = [traced / 1e9, counted / 1e9]
    return figures


# --- sampling ------------------------------------------------------------------------------------

STEPS, SEEDS = 3, (5, 9, 2)


def model_of(config: RunConfig, rows: list[int], precision: Any) -> Matryoshka:
    """A model on the GPU, which notes the rows of every call of its network in `rows`."""
    net, text = NestedUNet(config.model), config.model.text
    net.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0][0])))
    encoder = None if text is None else Words(text.features)
    codec = None if config.codec is None else Codes()
    options = {"device": "cuda", "precision": precision, "encoder": encoder, "codec": codec}
    return Matryoshka(net, config, **options)


def drawing() -> list[dict[str, Any]]:
    """Each sampler with and without guidance; families, thresholds and forms of batches in turn."""
    text = {"prompts": ["one", "two", "three"]}
    threshold = {"threshold": ["clip", "clip", "dynamic"]}
    interval = {"guidance": 2.0, "guidance_interval": [-30.0, 30.0]}
    return [
        draw("text", "ddpm", {"guidance": 3.0, "threshold": "dynamic", **text}),
        draw("text", "ddpm", {"guidance": 1.0, **threshold, **text}),
        draw("text", "ddim", {"guidance": [1.0, 3.0, 3.0], "eta": 0.5, "rescale": 0.7, **text}),
        draw("text", "ddim", {"guidance": 1.0, "threshold": "clip", **text}, precision="fp32"),
        draw("text", "dpmpp-2m", {"guidance": 3.0, "negative": "four", **threshold, **text}),
        draw("nest", "dpmpp-2m", {"threshold": "dynamic", "n": 3}),
        draw("classes", "ddim", {"classes": [0, 1, 2], "eta": 1.0, **interval}),
        draw("video", "ddpm", {"threshold": "dynamic", "guidance": [3.0, 1.0], **text}),
        draw("latents", "ddpm", {"guidance": 3.0, **text}),
        draw("nest of codes", "ddim", {"guidance": 1.0, **text}),
        draw("upsampler", "ddpm", {"guidance": 3.0, "threshold": "dynamic", **text}),
        draw("upsampler", "dpmpp-2m", {"guidance": 1.0, **text}, precision="fp32"),
    ]


def draw(
    name: str, sampler: str, settings: dict[str, Any], precision: str = "bf16"
) -> dict[str, Any]:
    """Trace a batch of three samples; an upsampler enlarges those of a base."""
    rows: list[int] = []
    model: Any = model_of(CONFIGS[name], rows, precision)
    if name == "upsampler":
        model = Cascade(model_of(preset("openmoji", "base"), rows, precision), model)
    marks: list[int] = []
    with Tracer() as tracer:
        samples = model.sample(
            **settings,
            seed=SEEDS,
            sampler=sampler,
            steps=STEPS,
            progress=lambda done, total: marks.append(len(tracer.waits)),
        )
    parts = [*enumerate(pairwise(marks), start=1)]
    return {
        "family": name,
        "sampler": sampler,
        "guided": any(weight != 1.0 for weight in samples.settings["guidance"]),
        "rows": rows,
        "waits in steps": [tracer.waits[a:b] for step, (a, b) in parts if step % STEPS],
        "waits": tracer.waits,
        "attention": sorted({kernel.split()[0] for kernel in tracer.attention}),
        "doubles": dict(tracer.doubles),
        "noise": sum(kernel.place.startswith("philox.py") for kernel in tracer.kernels),
    }


def copies_of_layout() -> list[int]:
    """Count features that two steps bring into another order: of a loaded model and of a new one.

    In the first step of the shipped model one level is awake, in the second one all three.
    """
    loaded = Matryoshka.load("openmoji", device="cuda", precision="bf16")
    net = NestedUNet(loaded.model)
    new = Matryoshka(net, loaded.config, device="cuda", precision="bf16")
    _, cond = loaded.condition(["red apple"], None, 2)

    def copies(model: Matryoshka) -> int:
        with Tracer() as tracer:
            list(model.stream(cond, (0, 1), model.sampling({"steps": 2})))
        return sum(kernel.kind == "layout copies" for kernel in tracer.kernels)

    return [copies(loaded), copies(new)]


def in_step() -> list[str]:
    """Waits of the second step of batches that are drawn together, for a callback."""
    model = model_of(CONFIGS["classes"], [], "bf16")
    _, cond = model.condition(None, None, 10)
    sampling = model.sampling({"sampler": "ddpm", "steps": STEPS})
    with Tracer() as tracer:
        states = model.lockstep(cond, range(100), sampling)
        next(states)
        before = len(tracer.waits)
        next(states)
    return tracer.waits[before:]


# --- what the tracer counts of operators that can be counted by hand ----------------------------


def count(run: Callable[[], object]) -> dict[str, Any]:
    with Tracer() as tracer:
        run()
    return {
        "kernels": [(kernel.operator, kernel.bytes, kernel.flops) for kernel in tracer.kernels],
        "places": [kernel.place for kernel in tracer.kernels],
        "waits": len(tracer.waits),
        "copies": dict(tracer.copies),
        "attention": [name.split()[0] for name in tracer.attention],
        "doubles": sum(tracer.doubles.values()),
    }


def mixed() -> str:
    try:
        torch.add(torch.zeros(2, device="cuda"), torch.zeros(2))
    except RuntimeError as error:
        return str(error)
    return "no error"


def tracing() -> dict[str, Any]:
    x = torch.zeros(2, 8, 4, 4, device="cuda")
    half = x.bfloat16()
    last = half.contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(8, 8, 3, 3, device="cuda", dtype=torch.bfloat16)
    weight_last = weight.contiguous(memory_format=torch.channels_last)
    bias = torch.zeros(8, device="cuda", dtype=torch.bfloat16)
    q = torch.zeros(1, 2, 4, 8, device="cuda", dtype=torch.bfloat16)
    crossed = q.transpose(2, 3).contiguous().transpose(2, 3)
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool, device="cuda")
    leaf = torch.zeros(4, device="cuda", requires_grad=True)
    norm = nn.GroupNorm(2, 8).to("cuda")
    cases: dict[str, Callable[[], object]] = {
        "add": lambda: x + x[:1],
        "broadcast": lambda: x[0, 0, 0] + torch.empty((), device="cuda").expand(4),
        "in place": lambda: x.add_(1),
        "views": lambda: x.view(2, -1)[0].expand(3, -1),
        "nothing": lambda: x[:0] + 1,
        "convolution": lambda: F.conv2d(last, weight_last, bias, padding=1),
        "mixed layouts": lambda: F.conv2d(half, weight_last, padding=1),
        "product": lambda: half[0, 0] @ half[0, 1],
        "backward": lambda: F.silu(leaf).sum().backward(),
        "norm": lambda: norm(x),
        "compiled norm": lambda: normalise(norm, last),
        "item": lambda: x.sum().item(),
        "list": lambda: x.tolist(),
        "to the GPU": lambda: torch.zeros(4).to("cuda", non_blocking=True),
        "pinned to the GPU": lambda: torch.zeros(4).pin_memory().to("cuda", non_blocking=True),
        "from the GPU": lambda: x.to("cpu", non_blocking=True),
        "double": lambda: x.double(),
        "attention": lambda: F.scaled_dot_product_attention(q, q, q, mask),
        "attention across": lambda: F.scaled_dot_product_attention(crossed, q, q),
    }
    return {name: count(run) for name, run in cases.items()} | {"mixed": mixed()}


def script(folder: Path) -> dict[str, Any]:
    """Read the file of results that the script `benchmarks.trace` writes."""
    words = ["fashion-mnist", "--batch", "4", "--top", "1", "--out", str(folder)]
    return json.loads(trace.main(words).read_text("utf-8"))


if __name__ == "__main__":
    results = {
        "beside": beside(),
        "training": training(),
        "memory": memory(),
        "drawing": drawing(),
        "in step": in_step(),
        "copies of layout": copies_of_layout(),
        "tracing": tracing(),
        "script": script(Path(sys.argv[1])),
    }
    print(json.dumps(results))
