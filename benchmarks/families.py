"""Every family of models on one device: a training step, samples, and a run with `mdm train`.

    python -m benchmarks.first_gpu --only smoke runs

calls what is here. The networks are those of presets that two CPU cores train.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.steps import WORDS, trainer
from matryoshka_diffusion.cli.main import main as mdm
from matryoshka_diffusion.config import LoraConfig, RunConfig
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.rng import normal
from matryoshka_diffusion.samplers import SAMPLERS
from matryoshka_diffusion.training.precision import Precision, resolve_layout
from matryoshka_diffusion.training.step import Stepped
from matryoshka_diffusion.training.weights import fingerprint

ROWS = 3


class Words:
    """A text encoder without a network: noise by caption, or fixed features for all but ""."""

    key = "words"

    def __init__(self, width: int, features: Float[Tensor, "n d"] | None = None) -> None:
        self.width, self.features = width, features

    def __call__(self, captions: Sequence[str]) -> list[Float[Tensor, "n d"]]:
        return [
            self.features
            if self.features is not None and caption
            else normal(caption, [(0,)], (WORDS, self.width))[0]
            for caption in captions
        ]


class Codes:
    """A codec without a network: an image is the first channels of its codes."""

    def encode(self, pictures: Float[Tensor, "b c *grid"]) -> Float[Tensor, "b k *codes"]:
        raise NotImplementedError("nothing here has images to encode")

    def decode(self, codes: Float[Tensor, "b k *codes"]) -> Float[Tensor, "b c *grid"]:
        return codes[:, :3]


def try_family(config: RunConfig, device: torch.device, precision: Precision) -> None:
    """Take steps until one changes the weights, then draw samples with every sampler.

    The first steps in fp16 may be skipped. Raises if that goes on, or if a sample is not finite.
    """
    base = None
    if config.train.lora is not None:
        base = NestedUNet(config.model).state_dict()
        lora = config.train.lora.model_copy(update={"base": fingerprint(base)})
        config = config.model_copy(update={"train": config.train.model_copy(update={"lora": lora})})
    layout = resolve_layout("auto", device, precision)
    repeated = trainer(config, ROWS, device, base, precision=precision, layout=layout)
    while not isinstance(repeated.trainer.step([repeated.inputs]), Stepped):
        pass
    text = config.model.text
    model = Matryoshka(
        repeated.trainer.net,
        config,
        codec=Codes(),
        encoder=None if text is None else Words(text.features),
        device=device,
        precision=precision,
    )
    conditions: dict[str, Any] = {"prompts": "one"} if text else {}
    conditions |= {"classes": [0]} if config.model.classes else {}
    if config.model.coarse is not None:
        side = config.model.coarse.side
        conditions["coarse"] = np.zeros((2, side, side, config.model.channels), np.uint8)
    for name in SAMPLERS:
        model.sample(**conditions, n=2, sampler=name, steps=2)


def adapters(name: str) -> RunConfig:
    """The run of a preset that trains adapters."""
    run = preset(name)
    stages, lora = run.train.stages[-1:], LoraConfig(rank=4)
    train = run.train.model_copy(update={"stages": stages, "lora": lora, "init": name})
    return run.model_copy(update={"train": train})


def tiny(name: str) -> RunConfig:
    """A run of labels with two levels of 8 and 16 pixels, which any machine trains at once."""
    run = preset("fashion-mnist")
    shape = {"widths": (32, 32), "blocks": (1, 1), "patch": 1}
    coarse, fine = run.model.levels
    levels = (
        coarse.model_copy(update={**shape, "side": 8}),
        fine.model_copy(update={**shape, "side": 16}),
    )
    model = run.model.model_copy(update={"levels": levels, "embedding": 32})
    return run.model_copy(update={"name": name, "model": model})


CONFIGS: dict[str, RunConfig] = {
    "nest": preset("folder-64"),
    "text": preset("openmoji"),
    "classes": preset("fashion-mnist"),
    "video": preset("emoji-video"),
    "latents": preset("openmoji", "latent"),
    "nest of codes": preset("openmoji", "codes"),
    "upsampler": preset("openmoji", "upsampler"),
    "adapters": adapters("openmoji"),
}
FAMILIES: dict[str, Callable[[torch.device, Precision], None]] = {
    name: partial(try_family, config) for name, config in CONFIGS.items()
}


# --- a run, end to end ---------------------------------------------------------------------------


def write_shapes(folder: Path, count: int) -> None:
    """Discs and squares of random colours in folders of two classes."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] - 32.0
    for n in range(count):
        kind, radius = ("disc", "square")[n % 2], draw.uniform(8, 28)
        inside = np.hypot(x, y) < radius if n % 2 == 0 else np.maximum(abs(x), abs(y)) < radius
        colours = draw.integers(0, 256, (2, 3), np.uint8)
        pixels = np.where(inside[:, :, None], colours[0], colours[1])
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / kind / f"{n:04}.png")


def resume(
    device: torch.device, pictures: int, images: int, precisions: Sequence[Precision]
) -> dict[str, Any]:
    """Train `folder-64`, the same again, and once more from the middle; compare the weights."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shapes(folder / "data", pictures)
        for precision in precisions:
            whole, again, resumed = (folder / f"{precision}-{part}" for part in "abc")
            for run in (whole, again):
                _train(folder / "data", run, device, precision, images)
            shutil.copytree(whole, resumed)
            shutil.rmtree(resumed / "model")
            newest = max((resumed / "checkpoints").iterdir())
            shutil.rmtree(newest) if newest.is_dir() else newest.unlink()
            _mdm("train", str(resumed), "--device", str(device))
            first, *others = (
                load_file(run / "model" / "model.safetensors") for run in (whole, again, resumed)
            )
            for what, other in zip(("again", "resumed"), others, strict=True):
                apart = max(float((first[key] - other[key]).abs().max()) for key in first)
                results[f"{precision}, {what}: largest difference of a weight"] = apart
            sheet = folder / f"{precision}.png"
            _mdm("sample", str(whole), "--steps", "5", "-o", str(sheet), "--device", str(device))
            with Image.open(sheet) as image:
                results[f"{precision}, sheet"] = image.size
            lines = (whole / "metrics.jsonl").read_text("utf-8").splitlines()
            results[f"{precision}, metrics"] = lines[-3:]
    return results


def _train(data: Path, run: Path, device: torch.device, precision: Precision, images: int) -> None:
    half = images // 2
    rows = min(half, 16)
    stage = f"{{levels: 3, images: {images}, batch_size: {rows}, lr: 1e-3, mix: [0.4, 0.1, 0.5]}}"
    settings = {
        "stages": f"[{stage}]",
        "precision": precision,
        "checkpoint_every_images": half,
        "log_every_images": half,
        "preview_every_images": 0,
    }
    words = [word for key, value in settings.items() for word in ("--set", f"train.{key}={value}")]
    where = ("--data", str(data), "--out", str(run), "--device", str(device))
    _mdm("train", "folder-64", *where, *words)


def _mdm(*words: str) -> None:
    """Run the command in this process. Raises RuntimeError with what it printed if it fails."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = mdm(words)
    if status:
        raise RuntimeError(f"mdm {' '.join(words)}: {printed.getvalue()[-2000:]}")
