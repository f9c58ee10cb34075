"""An evaluation so small that tests take seconds, as a function and as a process of its own."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from matryoshka_diffusion.config import EncoderConfig, SamplingConfig
from matryoshka_diffusion.configfile import to_yaml
from matryoshka_diffusion.data.source import Source, array_source
from matryoshka_diffusion.eval.evaluate import evaluate
from matryoshka_diffusion.metrics.inception import CLASSES
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pipeline import Matryoshka
from matryoshka_diffusion.pyramid import down_sample, resolution_of
from matryoshka_diffusion.rng import stream
from matryoshka_diffusion.sizes import BATCH
from matryoshka_diffusion.training.averages import PowerEma, write_snapshot
from matryoshka_diffusion.training.weights import export_weights
from tiny_run import encode, tiny_config

SAMPLES, BATCHED, FRAMES = 22, 4, 2


class Look:
    """A network's stand-in: the first bytes of a picture, and their squares."""

    weights, resize, width, variant = "0123456789abcdef", "not at all", 6, "tiny"

    def __init__(self, name: str, width: int = 6) -> None:
        self.name, self.width, self.seen, self.most = name, width, 0, 0

    def __call__(self, pictures: Any) -> Any:
        self.seen, self.most = self.seen + len(pictures), max(self.most, len(pictures))
        values = pictures.reshape(len(pictures), -1).astype(np.float32) / 255.0
        some = values[:, np.arange(self.width) % values.shape[1]]
        return some + some**2

    def probabilities(self, features: Any) -> Any:
        odds = np.exp(features.astype(np.float64))
        return odds / odds.sum(axis=1, keepdims=True)

    def texts(self, captions: Any) -> Any:
        return np.stack(
            [stream(0, f"text {text}").random(self.width, dtype=np.float32) for text in captions]
        )


class Words:
    """A `TextEncoder`."""

    key, width = "words", 8

    def __call__(self, captions: Any) -> Any:
        return encode(captions)


class Looks(dict):
    """Stand-ins by name, each made when it is first needed."""

    def __init__(self, width: int = 6) -> None:
        self.width = width

    def __missing__(self, name: str) -> Look:
        return self.setdefault(name, Look(name, self.width))

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name else default


looks = Looks


def source(count: int = 40, side: int = 16, **changes: Any) -> Source:
    """Images of two classes with captions, or what `changes` say."""
    pictures = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    texts = [f"picture {i}" for i in range(count)]
    columns: dict[str, Any] = {
        "captions": [(text,) for text in texts],
        "labels": [i % 2 for i in range(count)],
        "classes": ("cat", "dog"),
    }
    return array_source("pictures", changes.pop("array", pictures), texts, **(columns | changes))


def clips(count: int = 12, frames: int = FRAMES, side: int = 16) -> Source:
    """Clips with captions, in the place of a source of videos."""
    shape = (count, frames, side, side, 3)
    pixels = np.random.default_rng(0).integers(0, 200, shape, dtype=np.uint8)
    texts = [f"picture {i}" for i in range(count)]
    return array_source("clips", pixels, texts, captions=[(text,) for text in texts])


def model(kind: str = "classes", frames: int | None = None, **train: Any) -> Matryoshka:
    """A model of classes, of text or of neither, with random weights; with frames, one of clips."""
    config = tiny_config(dropout=0.0, **train)
    nest = config.model
    if frames is not None:
        coarse, fine = nest.levels
        halves = {"halve": (True, False), "halve_frames": (False, True)}
        changes = {"widths": (32,) * 3, "blocks": (1,) * 3, "attention": (0,) * 3, **halves}
        nest = nest.model_copy(
            update={"levels": (coarse, fine.model_copy(update={"frames": frames, **changes}))}
        )
    if kind != "text":
        nest = nest.model_copy(update={"text": None, "classes": 2 if kind == "classes" else 0})
    data = config.data.model_copy(update={"classes": ("cat", "dog")})
    update = {"model": nest, "data": data, "sampling": SamplingConfig(steps=1, sampler="ddim")}
    config = config.model_copy(update={**update, **({} if kind == "text" else {"encoder": None})})
    net, generator = NestedUNet(nest), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return Matryoshka(net, config, encoder=Words() if kind == "text" else None)


class Recall(torch.nn.Module):
    """A network that knows images by their captions, and estimates x as one of them."""

    def __init__(self, images: Any) -> None:
        super().__init__()
        self.fine = torch.from_numpy(images).movedim(-1, 1) / 127.5 - 1.0
        self.texts = torch.stack([text[1] for text in Words()([f"picture {i}" for i in range(40)])])
        self.times: list[float] = []

    def forward(self, z: Any, t: Any, cond: Any) -> Any:
        self.times += t.tolist()
        places = torch.cdist(cond.tokens[:, 1], self.texts).argmin(1)
        return tuple(down_sample(self.fine[places], resolution_of(z_r)) for z_r in z)


def recalling(images: Any) -> Any:
    """A model that draws image i for the caption "picture i"."""
    tiny = model("text")
    process = tiny.config.process.model_copy(update={"prediction": "x0"})
    config = tiny.config.model_copy(update={"process": process})
    oracle: Any = Matryoshka(tiny.net, config, encoder=Words())
    oracle.net = Recall(images)
    return oracle


# --- files -------------------------------------------------------------------------------------


def make_run(
    folder: Path, kind: str, data: Path, t5: Path | None = None, frames: int | None = None
) -> None:
    """A run folder: the model, its config, and snapshots of averages of two lengths."""
    trained = model(kind, frames)
    config = trained.config
    source = {"path": str(data), **({} if frames is None else {"source": "clips"})}
    update: dict[str, Any] = {"data": config.data.model_copy(update=source)}
    if t5 is not None:
        assert config.model.text is not None
        text = config.model.text.model_copy(update={"features": 24})
        update["model"] = config.model.model_copy(update={"text": text})
        update["encoder"] = EncoderConfig(name="t5", path=str(t5))
        trained = Matryoshka(NestedUNet(update["model"]), config.model_copy(update=update))
    config = config.model_copy(update=update)
    export_weights(folder / "model", trained.net.state_dict(), config)
    (folder / "config.yaml").write_text(to_yaml(config))
    tracks = PowerEma(trained.net, (0.05, 0.1))
    for images_seen in (4, 8):
        with torch.no_grad():
            for parameter in trained.net.parameters():
                parameter.mul_(1.1)
        tracks.update(trained.net, 4)
        write_snapshot(folder / "ema", tracks.state(), images_seen)


def make_videos(folder: Path, images: Any) -> str:
    """Clips (n, f, h, w, c) as files that lose nothing; their folder."""
    folder.mkdir()
    for number, clip in enumerate(images):
        first, *others = map(Image.fromarray, clip)
        path = folder / f"{number:03d}.webp"
        first.save(path, save_all=True, append_images=others, lossless=True, duration=100)
    return str(folder)


class _Scripted(torch.nn.Module):
    """A network with the signature of Inception's TorchScript file."""

    def __init__(self) -> None:
        super().__init__()
        self.output = torch.nn.Linear(2048, CLASSES, bias=False)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(img.to(torch.float32) / 255.0, (32, 64))
        features = small[:, 0].flatten(1)
        return features if return_features else self.output(features)


class Clips(torch.nn.Module):
    """A network of clips without options: the mean of each frame's channels, mixed."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(9, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(torch.nn.functional.adaptive_avg_pool3d(x, (3, 1, 1)).flatten(1))


class _I3D(torch.nn.Module):
    """A network with the signature of StyleGAN-V's TorchScript file."""

    def __init__(self) -> None:
        super().__init__()
        self.clips = Clips(400)

    def forward(
        self,
        x: torch.Tensor,
        rescale: bool = False,
        resize: bool = False,
        return_features: bool = False,
    ) -> torch.Tensor:
        assert resize
        features = self.clips(x / 127.5 - 1.0 if rescale else x)
        return features if return_features else features.softmax(dim=1)


def make_inception(path: Path) -> None:
    """A TorchScript file that `Inception` loads."""
    save_scripted(seeded(_Scripted), path)


def make_video_net(path: Path) -> None:
    """A TorchScript file that `VideoNet` takes for I3D."""
    save_scripted(seeded(_I3D), path)


def seeded(network: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Make a network with weights that are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network()


def save_scripted(network: torch.nn.Module, path: Path) -> None:
    """A network as a TorchScript file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(network), str(path))


WIDTH = 24


def narrow(patch: pytest.MonkeyPatch) -> None:
    """Let Inception be one of few features: a distance of 2,048 takes half a minute on one core."""
    patch.setattr("matryoshka_diffusion.eval.reference.WIDTH", WIDTH)

    def stand_in(path: str, device: Any, *, trust_torchscript: bool) -> Look:
        assert Path(path).is_file()
        return Look("Inception", WIDTH)

    patch.setattr("matryoshka_diffusion.eval.metric.Inception", stand_in)


# --- an evaluation -----------------------------------------------------------------------------


def measured(folder: Path, **options: Any) -> Any:
    """Measure a few samples of a model."""
    defaults = {"source": source(), "n": SAMPLES, "networks": looks(), "batch_size": BATCHED}
    return evaluate(model(), ("fd", "agreement"), folder=folder, **(defaults | options))


CLIPS = ("fd", "fd-frames", "motion", "agreement", "retrieval")


def measured_clips(folder: Path, **options: Any) -> Any:
    """Measure a few clips of a model."""
    defaults = {"source": clips(), "n": 10, "networks": looks(), "batch_size": BATCHED}
    return evaluate(model("text", FRAMES), CLIPS, folder=folder, **(defaults | options))


def main(folder: str, kill_at: str = "") -> None:
    """Measure as one of the ranks; with `kill_at`, die in the middle of that many samples."""
    from matryoshka_diffusion.training.distributed import joined

    def report(what: str, done: int, total: int) -> None:
        if what == "tiny" and kill_at and done >= int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    with joined(torch.device("cpu"), "ddp", 30) as world:
        for measure in (measured, measured_clips):
            measure(Path(folder), world=world, progress=report)


assert BATCH != BATCHED, "references and samples are cut into different batches"
