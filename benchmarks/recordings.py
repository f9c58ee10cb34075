"""What the command computes, recorded: whether a change of the code has changed any number.

    python benchmarks/recordings.py record --src src --out before.json [--only NAME ...] [--jobs 2]
    python benchmarks/recordings.py compare before.json after.json [--tolerance 1e-5]
    python benchmarks/recordings.py surface --src src --out surface.txt

`record` drives the command line alone, on small data that it makes, each command in a process of
its own, so nothing in it depends on what modules, classes and weights are called. Of each case of
`CASES` it notes what the files that were left behind hold: every line of metrics, hashes of
weights, averages and moments whatever their names, hashes of the pixels of samples, and numbers
that were measured. Two recordings of one machine are to be equal, bit for bit, whatever else it
does meanwhile. Between machines the last bits differ: record both on one, or let `compare` pass
over hashes (`--tolerance`), though sums of weights are then off by more than losses are, because
biases in front of a group norm have no gradient but rounding. `surface` writes down what a user can
ask for: options, presets with all that they resolve to, and names.

Where a command, an option, a key of the config or a file gets another name, `SPELLINGS` says so.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageSequence

Found = dict[str, Any]
"""What a case left behind, by the name of the file and of what is in it."""


# --- how things are called ---------------------------------------------------------------------


class Spelling(NamedTuple):
    """How a version calls things that `CASES` call as version 0.1.0 does.

    Attributes:
        module: what `python -m` runs.
        words: words of a command line that follow each other, and what stands in their place, such
            as `{"train openmoji-simple": "train openmoji --as simple"}`.
        keys: beginnings of keys in `--set KEY=VALUE`, and what stands in their place.
        files: patterns of names of files that are left behind, and what they are recorded as.
    """

    module: str = "matryoshka_diffusion.cli"
    words: Mapping[str, str] = {}
    keys: Mapping[str, str] = {}
    files: Mapping[str, str] = {}


SPELLINGS = {
    "0.1.0": Spelling(),
    "present": Spelling(
        words={
            "train openmoji-simple": "train openmoji --as simple",
            "train openmoji-finest": "train openmoji --as finest",
            "train openmoji-base": "train openmoji --as base",
            "train openmoji-upsampler": "train openmoji --as upsampler",
            "train fashion-mnist-simple": "train fashion-mnist --as simple",
            "train fashion-mnist-finest": "train fashion-mnist --as finest",
            "train fashion-mnist-base": "train fashion-mnist --as base",
            "train fashion-mnist-upsampler": "train fashion-mnist --as upsampler",
            "train folder-64-latent": "train folder-64 --as latent",
            "train openmoji-codes": "train openmoji --as codes",
            "eval ../plain-folder/samples": "compare ../plain-folder/samples",
        }
    ),
}
LATEST = "present"


def spelled(words: Sequence[str], spelling: Spelling) -> list[str]:
    """A command line of `CASES` as a version spells it."""
    rest, found = [*words], []
    olds = sorted(spelling.words, key=lambda old: -len(old.split()))
    while rest:
        old = next((old for old in olds if rest[: len(old.split())] == old.split()), None)
        taken = rest[: 1 if old is None else len(old.split())]
        found += taken if old is None else spelling.words[old].split()
        rest = rest[len(taken) :]
    for place, (option, value) in enumerate(itertools.pairwise(found), start=1):
        if option == "--set":
            key = next((key for key in spelling.keys if value.startswith(key)), None)
            found[place] = value if key is None else spelling.keys[key] + value[len(key) :]
    return found


class Command(NamedTuple):
    """A command line after `mdm`, and how it is to end.

    With `stop`, the process gets that signal once it has logged `after` lines of metrics in `run`.
    With `told`, what it prints is recorded.
    """

    words: tuple[str, ...]
    status: int = 0
    told: bool = False
    stop: signal.Signals | None = None
    after: int = 0


class Case(NamedTuple):
    """Commands in one folder, beside which the folders of other cases lie.

    Attributes:
        commands: one after the other.
        after: cases whose folders the commands use.
        cache: the case whose cache the commands go on with, which is one of `after`.
        same: the case that leaves the same files, by another way.
    """

    commands: tuple[Command, ...]
    after: tuple[str, ...] = ()
    cache: str | None = None
    same: str | None = None


def case(*commands: Command, **how: Any) -> Case:
    """The case of these commands; `how` are its other attributes."""
    return Case(commands, **how)


def mdm(line: str, *settings: str, **how: Any) -> Command:
    """The command `mdm LINE --set ...`."""
    sets = [word for setting in settings for word in ("--set", setting)]
    return Command((*shlex.split(line), *sets), **how)


# --- what is shrunk ----------------------------------------------------------------------------

TRAIN = (
    "model.embedding=32",
    "train.warmup_images=8",
    "train.ema_decay=0.9",
    "train.precision=fp32",
    "train.layout=nchw",
    "train.log_every_images=1",
    "train.checkpoint_every_images=40",
    "train.preview_every_images=80",
    "sampling.steps=4",
)
"""Of every run: small, logged at each step, in arithmetic that is the same everywhere."""


def stages(*levels: int, mixed: bool = True, images: int = 120) -> str:
    """Thirty steps of four pictures, in stages of so many levels; the last with mixed rows."""
    each = images // len(levels) // 4 * 4
    listed: list[dict[str, Any]] = [
        {"levels": count, "images": each, "batch_size": 4, "lr": 2e-3} for count in levels
    ]
    listed[0]["images"] = images - each * (len(levels) - 1)
    if mixed and levels[-1] > 1:
        listed[-1]["mix"] = [0.5 / (levels[-1] - 1)] * (levels[-1] - 1) + [0.5]
    return f"train.stages={json.dumps(listed)}"


def level(index: int, side: int, widths: int = 2, **values: Any) -> tuple[str, ...]:
    """A level of `side` with the narrowest widths; everything else is as in the preset."""
    given = {"side": side, "widths": [32] * widths, **values}
    return tuple(f"model.levels[{index}].{key}={json.dumps(v)}" for key, v in given.items())


def clip_level(index: int, side: int) -> tuple[str, ...]:
    """A level of four frames in the place of one of sixteen."""
    halved = {"halve_frames": [True, True], "frame_attention": [1, 1, 0]}
    blocks = {"blocks": [1, 1, 0], "attention": [0, 0, 0]}
    return level(index, side, 3, frames=4, heads=1, **blocks, **halved)


NEST = (*TRAIN, *level(0, 8), *level(1, 16), *level(2, 32), stages(1, 2, 3))
"""Of `openmoji` and `folder-64`: levels of 8, 16 and 32 pixels, a stage for each."""
UNET = (*TRAIN, *level(0, 32, 4), stages(1))
"""Of presets with one level of the finest side."""
FASHION = (*TRAIN, *level(0, 16), *level(1, 32), stages(1, 2))
TEXT = ("model.text.width=32",)
FOLDER = ("data.source=folder",)
"""Pictures of our own in the place of a preset's, which take longer to read."""
S64 = level(0, 8, 3, blocks=[1, 1, 1], attention=[0, 1, 1])
T5 = ("encoder.path=../made/t5", "model.text.features=24", "model.text.width=32", "data.held_out=0")
VIDEO = ("data.source=clips", "data.frame_stride=2", "data.clip_frames=4")
TUNED = (
    *(setting for setting in TRAIN if not setting.startswith("model.")),
    stages(3, mixed=False),
)
CODEC = (
    "side=32",
    "widths=[8, 8, 8]",
    "images=120",
    "batch_size=4",
    "warmup_images=8",
    "log_every_images=1",
    "checkpoint_every_images=40",
)
FEW = "-p 'a red disk' -p 'a blue square' -n 2 -o samples"
ASKED = {
    "captions": FEW,
    "classes": "--class 0 --class 2 -n 2 -o samples",
    "plain": "-n 4 -o samples",
}
FORMS = {"folder": "", "tars": "/{00000..00001}.tar", "parquet": "/*.parquet"}


# --- what is recorded --------------------------------------------------------------------------


def _forms() -> dict[str, Case]:
    """`folder-64` with captions, with classes and with neither, each from every form of data.

    Samples are drawn from folders; the others have their previews.
    """
    found = {}
    for kind, asked in ASKED.items():
        for form, files in FORMS.items():
            train = f"train folder-64 --data '../made/{kind}-{form}{files}' --out run"
            drawn = [mdm(f"sample run {asked}")] if form == "folder" else []
            found[f"{kind}-{form}"] = case(mdm(train, *NEST), *drawn)
    return found


def _ranks() -> dict[str, Case]:
    """Two processes of a CPU, which share the batches, and with FSDP2 the weights, too."""
    train = "train folder-64 --data ../made/classes-folder --out run --gpus 2 --device cpu"
    return {
        "ranks-ddp": case(mdm(f"{train} --parallel ddp", *NEST)),
        "ranks-fsdp": case(mdm(f"{train} --parallel fsdp", *NEST)),
    }


def _stopped() -> dict[str, Case]:
    """Runs that are stopped, and killed, and go on to the same bits."""
    run = mdm("train folder-64 --data ../made/classes-folder --out run", *NEST)
    codec = mdm("train codec --data ../made/plain-folder --out run", *CODEC)
    return {
        "stopped": case(
            run._replace(stop=signal.SIGTERM, after=5, status=143),
            run._replace(stop=signal.SIGKILL, after=16, status=-9),
            mdm("train run"),
            after=("classes-folder",),
            same="classes-folder",
        ),
        "stopped-codec": case(
            codec._replace(stop=signal.SIGTERM, after=5, status=143),
            codec._replace(stop=signal.SIGKILL, after=16, status=-9),
            mdm("train run"),
            after=("codec",),
            same="codec",
        ),
    }


def _processes() -> dict[str, Case]:
    """What is predicted, how it is weighted and scheduled, and what else a config can say."""
    train = "train folder-64 --data ../made/plain-folder --out run"
    scaled = [f"model.levels[{index}].input_scaling" for index in range(3)]
    return {
        "process-eps": case(
            mdm(
                train,
                *NEST,
                *(f"{key}=analytic" for key in scaled),
                *("process.prediction=eps", "process.weighting=[{name: min_snr}]"),
                *("model.schedule=linear-beta", "model.time_input=log-snr"),
                *("model.levels[0].dropout=0.1", "train.accumulate=2", "train.recompute=[1]"),
                *("train.optimizer=adam", "train.ema_power=[0.05, 0.1]"),
                *("data.crop=random", "data.held_out=0.25"),
                *("model.augment=true", "data.augment=0.3", "sampling.sampler=ddpm"),
            ),
            mdm("ema run --length 0.1 -o averaged"),
            mdm("sample averaged -n 4 -o samples"),
        ),
        "process-v": case(
            mdm(
                train,
                *NEST,
                *(f"{key}=std" for key in scaled),
                *("process.prediction=v", "process.weighting=[{name: sigmoid, bias: 1.0}]"),
                *("process.level_weights=[0.5, 1.0, 2.0]", "model.schedule=truncated-cosine"),
                *("model.levels[0].middle=true", "model.levels[0].attention_mlp=true"),
                *("train.layout=channels_last", "train.weight_decay=0.01", "train.seed=1"),
                *("data.pixels=released", "sampling.threshold=[dynamic]"),
                *("sampling.sampler=ddim", "sampling.eta=0.5"),
            ),
            mdm("sample run -n 4 -o samples"),
        ),
        "process-bf16": case(mdm(train, *NEST, "train.precision=bf16")),
        "process-fp16": case(mdm(train, *NEST, "train.precision=fp16")),
    }


def _baselines() -> dict[str, Case]:
    """What the paper compares with, on pixels and on codes."""
    captions = "--data ../made/captions-folder"
    openmoji = (*TEXT, *FOLDER)
    base = (*TRAIN, *openmoji, *level(0, 8), "data.side=32", stages(1))
    coarse = (*UNET, "model.coarse.side=8")
    fashion = "train fashion-mnist"
    return {
        "simple": case(
            mdm(f"train openmoji-simple {captions} --out run", *UNET, *openmoji),
            mdm(f"sample run {FEW}"),
        ),
        "finest": case(
            mdm(
                f"train openmoji-finest {captions} --out run",
                *(*NEST[:-1], stages(3, mixed=False), *openmoji),
            ),
            mdm(f"sample run {FEW}"),
        ),
        "cascade": case(
            mdm(f"train openmoji-base {captions} --out base", *base),
            mdm(
                f"train openmoji-upsampler {captions} --base base --out upsampler",
                *(*coarse, *openmoji),
            ),
            mdm(f"sample upsampler {FEW}"),
            mdm("sample base -p 'a red disk' -n 2 -o small"),
            mdm("sample upsampler -p 'a red disk' --coarse small --coarse-noise 0.5 -o large"),
            mdm("export upsampler -o shared"),
        ),
        "fashion-mnist": case(
            mdm(f"{fashion} --out run", *FASHION),
            mdm("sample run --class Sneaker --class Bag -n 2 -o samples"),
        ),
        "fashion-mnist-simple": case(
            mdm(f"{fashion}-simple --out run", *TRAIN, *level(0, 32, 3), stages(1)),
            after=("fashion-mnist",),
            cache="fashion-mnist",
        ),
        "fashion-mnist-finest": case(
            mdm(f"{fashion}-finest --out run", *FASHION[:-1], stages(2, mixed=False)),
            after=("fashion-mnist",),
            cache="fashion-mnist",
        ),
        "fashion-mnist-cascade": case(
            mdm(f"{fashion}-base --out base", *TRAIN, *level(0, 16), stages(1)),
            mdm(
                f"{fashion}-upsampler --base base --out run",
                *(*TRAIN, *level(0, 32, 3), stages(1)),
            ),
            mdm("sample run --class Bag -n 4 -o samples"),
            after=("fashion-mnist",),
            cache="fashion-mnist",
        ),
        "codec": case(mdm("train codec --data ../made/plain-folder --out run", *CODEC)),
        "latent": case(
            mdm(
                "train folder-64-latent --data ../made/classes-folder --codec ../made/codec "
                "--out run",
                *(*TRAIN, *level(0, 8), stages(1)),
            ),
            mdm(f"sample run {ASKED['classes']}"),
            mdm("export run -o shared"),
        ),
        "codes": case(
            mdm(
                f"train openmoji-codes {captions} --codec ../codec/run --out run",
                *(*TRAIN, *level(0, 4), *level(1, 8), *openmoji, stages(1, 2)),
            ),
            mdm(f"sample run {FEW}"),
            after=("codec",),
        ),
    }


def _papers() -> dict[str, Case]:
    """Presets of the paper, with a T5, and its released networks."""
    captions = f"--data '../made/captions-tars{FORMS['tars']}'"
    released = "../made/released.pth"
    return {
        "cc12m-256": case(
            mdm(
                f"train cc12m-256 {captions} --out run",
                *(*TRAIN, *S64, *level(1, 32, 3), *T5, stages(1, 2)),
            ),
            mdm(f"sample run {FEW}"),
        ),
        "imagenet-256-nest3": case(
            mdm(
                "train imagenet-256-nest3 --data ../made/classes-folder --out run",
                *(*TRAIN, *S64, *level(1, 16), *level(2, 32), "model.classes=3"),
                stages(1, 3),
            ),
            mdm(f"sample run {ASKED['classes']}"),
        ),
        "released": case(
            mdm(f"info {released}", told=True),
            mdm(f"convert {released} -o converted --text-encoder ../made/t5"),
            mdm(f"sample {released} {FEW} --steps 4 --text-encoder ../made/t5"),
            mdm(
                f"train {released} {captions} --out run",
                *(*TUNED[:-1], stages(2, mixed=False), "encoder.path=../made/t5"),
            ),
        ),
    }


def _on_models() -> dict[str, Case]:
    """What begins with a trained model: tuning, adapters, growing, other forms of it."""
    model, captions = "../captions-folder/run", "--data ../made/captions-tars/00001.tar"
    after = ("captions-folder",)
    grown = (*TUNED[:-1], "train.stages[0].images=60", "train.stages[0].batch_size=4")
    return {
        "tuned": case(
            mdm(f"train {model}/model {captions} --out run", *TUNED),
            mdm(f"sample run {FEW}"),
            after=after,
        ),
        "init": case(
            mdm(
                f"train folder-64 {captions} --init {model} --out run",
                *(*NEST[:-1], stages(3)),
            ),
            after=after,
        ),
        "lora": case(
            mdm(f"train {model}/model {captions} --lora 2 --out run", *TUNED),
            mdm(f"sample run {FEW}"),
            mdm("export run -o merged"),
            after=after,
        ),
        "lora-all": case(
            mdm(
                f"train {model}/model {captions} --lora 2 --out run",
                *(*TUNED, "train.lora.maps=all", "train.lora.levels=[0, 1]"),
                "train.lora.alpha=4.0",
            ),
            after=after,
        ),
        "grown": case(
            mdm(
                f"grow {model} --to 64 --out run --freeze-coarse 16 --ramp 32",
                *grown,
            ),
            mdm(f"sample run {FEW} -o before"),
            mdm("train run"),
            mdm(f"sample run {FEW}"),
            after=after,
        ),
        "written": case(
            mdm(f"train {model}/config.yaml --out run"), after=after, same="captions-folder"
        ),
        "exported": case(
            mdm(f"export {model} -o fp32"),
            mdm(f"export {model} --dtype bf16 -o bf16"),
            mdm(f"sample bf16 {FEW}"),
            mdm("export ../classes-folder/run --format diffusers -o diffusers"),
            mdm("export ../cc12m-256/run --format diffusers -o diffusers-text"),
            after=(*after, "classes-folder", "cc12m-256"),
        ),
    }


def _clips() -> dict[str, Case]:
    """Models of clips: from a preset, grown from one of pictures, and the paper's."""
    clips = "--data ../made/clips"
    still = (*TRAIN, *TEXT, *VIDEO, *level(0, 16), stages(1))
    moving = (*TRAIN, *TEXT, *VIDEO, *level(0, 16), *clip_level(1, 16))
    paper = (*TRAIN, *T5, *VIDEO, *S64, *clip_level(1, 8), *level(2, 16, frames=4))
    grown = (*TUNED[:-1], *VIDEO, "train.stages[0].images=60", "model.levels[1].heads=1")
    blocks = ("model.levels[2].blocks=[1, 1]", "model.levels[2].attention=[0, 0]")
    return {
        "stills": case(mdm(f"train emoji-still {clips} --out run", *still)),
        "video": case(
            mdm(
                f"train emoji-video {clips} --init ../stills/run --out run",
                *(*moving, stages(2, images=60)),
            ),
            mdm(f"sample run {FEW}"),
            mdm("sample run -p 'a red disk' --cfg 4,1 --clips png -o frames"),
            mdm("sample run -p 'a red disk' --fps 12 -o clip.gif"),
            mdm("sample run -p 'a red disk' -o clip.mp4"),
            mdm("eval run -n 16 --metrics motion,agreement,fd,fd-frames --steps 2"),
            after=("stills",),
        ),
        "video-grown": case(
            mdm(f"grow ../stills/run --frames 4 {clips} --out run", *grown),
            mdm("train run"),
            after=("stills",),
        ),
        "webvid-16x256": case(
            mdm(f"train webvid-16x256 {clips} --out run", *paper, *blocks, stages(1, 2, 3))
        ),
    }


def _drawn() -> dict[str, Case]:
    """OpenMoji itself, what is measured of it, and the shipped model with every sampler."""
    # Of the pictures a tenth are looked at; the network that does is the real one.
    nest, apple = (*NEST, *TEXT, "data.held_out=0.9"), "-p 'red apple' -n 4 --steps 4"
    clip = "--clip ../made/clip"
    return {
        "openmoji": case(
            mdm("embed openmoji", *nest),
            mdm("train openmoji --out run", *nest),
            mdm("sample run -p 'red apple' -p umbrella -n 2 -o samples"),
            mdm("eval run -n 48 --metrics retrieval,fd,agreement,prdc-fd --steps 2"),
            mdm(f"eval run -n 48 --metrics clip,cmmd --steps 2 {clip}"),
            mdm("sweep run --cfg 1:2:1 --steps 1,2 -n 16 --metrics fd"),
        ),
        "demo": case(
            mdm("demo --out run", *nest, told=True),
            after=("openmoji",),
            cache="openmoji",
        ),
        "shipped": case(
            mdm(f"sample openmoji {apple} --cfg 4 -o dpmpp"),
            mdm(f"sample openmoji {apple} --sampler ddim --eta 0.5 --rescale 0.5 -o ddim"),
            mdm(f"sample openmoji {apple} --sampler ddpm --grid trailing -o ddpm"),
            mdm(
                f"sample openmoji {apple} --threshold dynamic --interval -2 4 --negative face "
                "--cfg 3,2,1 --seed 7 --batch-size 3 -o guided"
            ),
            mdm(f"sample openmoji {apple} --precision bf16 --threshold none -o one.png"),
        ),
    }


def _told() -> dict[str, Case]:
    """What is said of data, presets and plans."""
    sets = [f"../made/{kind}-{form}{files}" for kind in ASKED for form, files in FORMS.items()]
    return {
        "checked": case(
            *(mdm(f"data check '{data}'", told=True) for data in sets[::2]),
            mdm("data check ../made/metadata --sheet data.png", told=True),
            mdm("data check hf:../made/saved", told=True),
            mdm("data check ../made/damaged", told=True, status=1),
            mdm(
                "data check ../made/clips --preset emoji-video",
                *(*VIDEO, *level(0, 16), *clip_level(1, 16)),
                told=True,
            ),
        ),
        "compared": case(
            mdm("eval ../plain-folder/samples ../made/plain-folder --metrics fd"),
            after=("plain-folder",),
        ),
        "damaged": case(
            mdm(
                "train folder-64 --data ../made/damaged --out run",
                *(*NEST, "data.max_bad_fraction=0.2"),
            )
        ),
        "metadata": case(mdm("train folder-64 --data ../made/metadata --out run", *NEST)),
        "saved": case(mdm("train folder-64 --data hf:../made/saved --out run", *NEST)),
        "planned": case(
            mdm("info openmoji", told=True),
            mdm("info ../captions-folder/run", told=True),
            mdm("train cc12m-1024 --dry-run", told=True),
            mdm("train webvid-16x256 --dry-run --parallel fsdp", told=True),
            mdm("plot ../captions-folder/run -o curves.png"),
            after=("captions-folder",),
        ),
    }


CASES: dict[str, Case] = {
    **_drawn(),
    **_forms(),
    **_baselines(),
    **_papers(),
    **_on_models(),
    **_clips(),
    **_processes(),
    **_ranks(),
    **_stopped(),
    **_told(),
}


# --- the data ----------------------------------------------------------------------------------

SHAPES = ("disk", "square", "stripes")
COLOURS = {"red": (200, 30, 40), "green": (40, 160, 70), "blue": (40, 70, 200), "grey": (90,) * 3}


class Item(NamedTuple):
    """One picture as a PNG file, and all that the forms of data say about it."""

    name: str
    png: bytes
    captions: tuple[str, ...]
    label: int


def items() -> list[Item]:
    """48 pictures of three shapes in four colours, at many places, of two formats."""
    found = []
    for number in range(48):
        draws = np.random.default_rng(number)
        shape = number % len(SHAPES)
        colour = list(COLOURS)[number // len(SHAPES) % len(COLOURS)]
        size = (48, 40) if number % 2 else (40, 52)
        x, y, half = (int(draws.integers(*ends)) for ends in ((14, 26), (14, 26), (6, 13)))
        file = io.BytesIO()
        picture_of(SHAPES[shape], COLOURS[colour], size, (x, y), half).save(file, "PNG")
        captions = (f"a {colour} {SHAPES[shape]}", f"{SHAPES[shape]} in {colour}")
        found.append(Item(f"{number:02}", file.getvalue(), captions[: 1 + number % 2], shape))
    return found


def picture_of(
    shape: str,
    colour: tuple[int, ...],
    size: tuple[int, int],
    place: tuple[int, int],
    half: int,
) -> Image.Image:
    """A shape on a background that is lighter on one side."""
    ramp = np.linspace(180, 250, size[0], dtype=np.uint8)
    picture = Image.fromarray(np.broadcast_to(ramp[None, :, None], (*size[::-1], 3)).copy())
    draw, (x, y) = ImageDraw.Draw(picture), place
    box = (x - half, y - half, x + half, y + half)
    if shape == "disk":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        for line in range(x - half, x + half, 4):
            draw.rectangle((line, box[1], line + 1, box[3]), fill=colour)
    return picture


def make_folder(kind: str, folder: Path) -> None:
    """Text files beside pictures, a folder for each class, or pictures alone."""
    for item in items():
        place = folder / SHAPES[item.label] if kind == "classes" else folder
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{item.name}.png").write_bytes(item.png)
        if kind == "captions":
            (place / f"{item.name}.txt").write_text("\n".join(item.captions))


def make_tars(kind: str, folder: Path) -> None:
    """Two shards; what belongs to a picture lies beside it."""
    folder.mkdir(parents=True)
    for number in range(2):
        with tarfile.open(folder / f"{number:05}.tar", "w") as shard:
            for item in items()[number::2]:
                members = {"png": item.png}
                if kind == "captions":
                    members["txt"] = "\n".join(item.captions).encode()
                    members["json"] = b'{"original_width": 96, "original_height": 80}'
                if kind == "classes":
                    members["cls"] = str(item.label).encode()
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{item.name}.{suffix}")
                    info.size = len(data)
                    shard.addfile(info, io.BytesIO(data))


def make_parquet(kind: str, folder: Path) -> None:
    """Two tables of a few row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for number in range(2):
        part = items()[number::2]
        columns: dict[str, list[Any]] = {"image": [item.png for item in part]}
        if kind == "captions":
            columns["caption"] = [list(item.captions) for item in part]
        if kind == "classes":
            columns["label"] = [item.label for item in part]
        pq.write_table(pa.table(columns), folder / f"{number}.parquet", row_group_size=8)


def make_metadata(folder: Path) -> None:
    """Captions of all pictures in one file."""
    make_folder("plain", folder)
    rows = [{"file_name": f"{item.name}.png", "text": list(item.captions)} for item in items()]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def make_saved(folder: Path) -> None:
    """A data set of Hugging Face with names of classes, as `save_to_disk` writes it."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(SHAPES))
    )
    columns = {
        "image": [{"bytes": item.png, "path": None} for item in items()],
        "label": [item.label for item in items()],
    }
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))


def make_damaged(folder: Path) -> None:
    """Pictures of which some are cut off, empty or tiny."""
    make_folder("plain", folder)
    whole = (folder / "03.png").read_bytes()
    (folder / "03.png").write_bytes(whole[: len(whole) // 2])
    (folder / "05.png").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(folder / "07.png")


def make_clips(folder: Path) -> None:
    """Twelve animations of twelve frames, in which a shape moves."""
    folder.mkdir(parents=True)
    for number, (colour, shape) in enumerate(itertools.product(COLOURS, SHAPES)):
        frames = [
            picture_of(shape, COLOURS[colour], (40, 32), (8 + 2 * n, 10 + number), 6)
            for n in range(12)
        ]
        path = folder / f"{number:02}.webp"
        shown = {"save_all": True, "duration": 40, "lossless": True, "exact": True}
        frames[0].save(path, append_images=frames[1:], **shown)
        path.with_suffix(".txt").write_text(f"a {colour} {shape}")


def make_codec(folder: Path) -> None:
    """An autoencoder of 1/4 with random weights."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    kind: Any = AutoencoderKL  # whose annotations ask for tuples of one
    torch.manual_seed(0)
    kind(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8,) * 3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=2.0,
    ).save_pretrained(folder)


WORDS = ("a", "in", *SHAPES, *COLOURS)


def make_t5(folder: Path) -> None:
    """A T5 with random weights, as wide as the features of the small released network (24)."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    transformers.utils.logging.disable_progress_bar()
    words = ("<pad>", "</s>", "<unk>", *WORDS)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=len(words), d_model=24, d_kv=4, d_ff=32, num_layers=2)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def make_clip(folder: Path) -> None:
    """A CLIP with random weights for pictures of 32 pixels and captions of 8 tokens."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    transformers.utils.logging.disable_progress_bar()
    words = ("<start>", "<end>", "<unk>", *WORDS)
    layers = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 8, "num_attention_heads": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"image_size": 32, "patch_size": 8, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**layers, **text, **tokens},
        vision_config={**layers, **vision},
        projection_dim=16,
        initializer_factor=10.0,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    core = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<start>", eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)


MADE: dict[str, Callable[[Path], None]] = {
    **{f"{kind}-folder": lambda path, kind=kind: make_folder(kind, path) for kind in ASKED},
    **{f"{kind}-tars": lambda path, kind=kind: make_tars(kind, path) for kind in ASKED},
    **{f"{kind}-parquet": lambda path, kind=kind: make_parquet(kind, path) for kind in ASKED},
    "metadata": make_metadata,
    "saved": make_saved,
    "damaged": make_damaged,
    "clips": make_clips,
    "codec": make_codec,
    "t5": make_t5,
    "clip": make_clip,
}
"""What commands name as `../made/NAME`, made when it is first named."""


# --- running the commands ----------------------------------------------------------------------


class Problem(Exception):
    """A command that did not end as it was to."""


class Place:
    """The folder of a recording: `made/`, a folder for each case, and one for its cache."""

    def __init__(self, root: Path, source: Path, released: Path, spelling: Spelling) -> None:
        self.root, self.source, self.released = root.resolve(), source, released
        self.spelling, self._making = spelling, threading.Lock()

    def run(self, name: str) -> Found:
        """Run the commands of a case; returns what they leave behind."""
        case, folder = CASES[name], self.root / name
        folder.mkdir()
        found: Found = {}
        cache = self.root / "caches" / (case.cache or name)
        for number, command in enumerate(case.commands):
            said = self._command(command, folder, cache)
            if command.told:
                found[f"told {number}"] = _plain(said.splitlines(), self.root)
        found |= look(folder, self.root, self.spelling)
        if case.cache is None:  # where what belongs to no run is measured
            measured = look(cache / "eval", self.root, self.spelling)
            found |= {f"cache/{name}": value for name, value in measured}
        return found

    def _command(self, command: Command, folder: Path, cache: Path) -> str:
        for word in re.findall(r"\.\./made/([\w-]+)", " ".join(command.words)):
            self._make(word)
        words = [sys.executable, "-m", self.spelling.module, *spelled(command.words, self.spelling)]
        settings = {
            "PYTHONPATH": str(self.source),
            "MDM_CACHE": str(cache),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
            "COLUMNS": "100",
        }
        process = subprocess.Popen(
            words,
            cwd=folder,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if command.stop is not None:
            _stop(process, folder / "run" / "metrics.jsonl", command)
        said, complained = process.communicate()
        if process.returncode != command.status:
            raise Problem(
                f"mdm {shlex.join(words[3:])} ended with {process.returncode}, not "
                f"{command.status}: {complained.strip()[-2000:]}"
            )
        return said

    def _make(self, name: str) -> None:
        with self._making:
            if name == "released":
                target = self.root / "made" / "released.pth"
                target.parent.mkdir(exist_ok=True)
                shutil.copy(self.released, target)
            elif not (self.root / "made" / name).exists():
                MADE[name](self.root / "made" / name)


def _stop(process: subprocess.Popen[str], metrics: Path, command: Command) -> None:
    """Signal a process as soon as it has logged so many lines."""
    assert command.stop is not None, "asked before"
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= command.after:
            process.send_signal(command.stop)
            return
        time.sleep(0.002)


# --- looking at what they leave ----------------------------------------------------------------

PASSED = {
    *("images_per_second", "data_wait", "peak_memory_bytes", "seconds"),
    *("version", "commit", "date"),
    "weights",
}
"""Keys of what is about the machine, about the moment, or a hash that depends on names."""
STORE = re.compile(r"[0-9a-f]{16}$")
LETTERED = {"curves.png", "data.png"}
"""Pictures in which places and times are written; that they are there is recorded."""
PICTURES = {".png", ".webp", ".gif", ".mp4"}


def look(folder: Path, root: Path, spelling: Spelling) -> Iterator[tuple[str, Any]]:
    """What the files below a folder hold, by their names.

    Left out are hidden files, and those of `STORE`: what is seen through networks while measuring,
    in folders that are called by hashes of names and paths.
    """
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        name = inside.as_posix()
        parts = inside.parts
        if path.is_dir() or any(part.startswith(".") or STORE.match(part) for part in parts):
            continue
        for pattern, old in spelling.files.items():
            name = re.sub(pattern, old, name)
        if path.suffix == ".jsonl":
            lines = [
                _plain(json.loads(line), root) for line in path.read_text("utf-8").splitlines()
            ]
            if name.endswith("metrics.jsonl"):
                for column in dict.fromkeys(key for line in lines for key in line):
                    yield f"{name} {column}", [line[column] for line in lines if column in line]
            else:
                yield name, lines
        elif path.name == "sweep.json":
            yield name, _plain(json.loads(path.read_text("utf-8")), root)
        elif path.suffix == ".safetensors":
            yield name, tensors_of(path)
        elif path.name in LETTERED:
            yield name, {"frames": 1}
        elif path.suffix in PICTURES:
            yield name, pixels_of(path)


def _plain(data: Any, root: Path) -> Any:
    """What was told, without what belongs to this moment, this place and these names."""
    if isinstance(data, dict):
        return {key: _plain(value, root) for key, value in data.items() if key not in PASSED}
    if isinstance(data, list):
        return [_plain(value, root) for value in data]
    if not isinstance(data, str):
        return data
    text = data.replace(str(root), "ROOT")
    text = re.sub(r"\(weights [0-9a-f ]+\)", "(weights W)", text)
    text = re.sub(r"commit [0-9a-f]+\+?", "commit C", text)
    return re.sub(r"matryoshka-diffusion \d\S*", "matryoshka-diffusion V", text)


def tensors_of(path: Path) -> dict[str, Any]:
    """A hash of the tensors in a file that does not depend on their names, and their size."""
    import torch
    from safetensors import safe_open

    hashes, numbers, sums = [], 0, []
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            value = file.get_tensor(name)
            raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            head = f"{value.dtype} {tuple(value.shape)} ".encode()
            hashes.append(hashlib.sha256(head + raw).hexdigest())
            numbers += value.numel()
            sums.append(value.double().abs().sum().item())
    digest = hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()
    return {"tensors": len(hashes), "numbers": numbers, "sum": math.fsum(sums), "sha256": digest}


def pixels_of(path: Path) -> dict[str, Any]:
    """A hash of the pixels in a picture, or of those of all frames."""
    frames = _film(path) if path.suffix == ".mp4" else _frames(path)
    digest, total, count = hashlib.sha256(), 0.0, 0
    for frame in frames:
        digest.update(f"{frame.shape} ".encode() + frame.tobytes())
        total, count = total + float(frame.mean()), count + 1
    return {"frames": count, "mean": total / max(count, 1), "sha256": digest.hexdigest()}


def _frames(path: Path) -> Iterator[np.ndarray]:
    with Image.open(path) as picture:
        for frame in ImageSequence.Iterator(picture):
            yield np.asarray(frame.convert("RGB"))


def _film(path: Path) -> Iterator[np.ndarray]:
    import av

    with av.open(str(path)) as film:
        for frame in film.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


# --- record ------------------------------------------------------------------------------------


def record(options: argparse.Namespace) -> int:
    """Run the cases and write what they left; returns the exit status."""
    asked = options.only or list(CASES)
    if unknown := [name for name in asked if name not in CASES]:
        raise SystemExit(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    source = options.src.resolve()
    released = options.released or (
        source.parent / "tests" / "data" / "reference" / "vis_model_nested32.pth"
    )
    found: dict[str, Found] = {}
    problems: dict[str, str] = {}
    taken: dict[str, float] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), source, released, SPELLINGS[options.spelling])
        for name, result, seconds in _run_all(place, _with_needed(asked), options.jobs):
            if isinstance(result, Exception):
                problems[name] = str(result)
                print(f"{name:24} {seconds:6.1f} s, PROBLEM: {result}", flush=True)
                continue
            found[name], taken[name] = result, round(seconds, 1)
            same = CASES[name].same
            told = ""
            if same is not None:
                told = f", as {same}"
                if different := _alike(name, found):
                    problems[name] = told = f", PROBLEM: {different}"
            print(f"{name:24} {seconds:6.1f} s, {len(result)} items{told}", flush=True)
    recorded = {
        "made with": {
            "spelling": options.spelling,
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{name: version(name) for name in ("torch", "numpy", "pillow", "transformers")},
        },
        "problems": problems,
        "seconds": taken,
        "cases": {name: found[name] for name in CASES if name in asked and name in found},
    }
    options.out.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    count, seconds = len(recorded["cases"]), time.monotonic() - began
    print(f"{options.out}: {count} cases in {seconds:.0f} s, {len(problems)} problems")
    return 1 if problems else 0


def _with_needed(names: Sequence[str]) -> list[str]:
    """The cases and those that they use, in the order of the table."""
    needed = set(names)
    while more := {after for name in needed for after in CASES[name].after} - needed:
        needed |= more
    return [name for name in CASES if name in needed]


def _run_all(
    place: Place, names: Sequence[str], jobs: int
) -> Iterator[tuple[str, Found | Exception, float]]:
    """Run cases as soon as those that they use are done, so many at a time."""
    waiting, done, broken = [*names], set[str](), set[str]()
    running: dict[Future[Found], tuple[str, float]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for name in [one for one in waiting if set(CASES[one].after) <= done]:
                if len(running) == jobs:
                    break
                waiting.remove(name)
                if broken & set(CASES[name].after):
                    broken.add(name)
                    done.add(name)
                    yield name, Problem("what it uses had a problem"), 0.0
                else:
                    running[pool.submit(place.run, name)] = (name, time.monotonic())
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, began = running.pop(future)
                done.add(name)
                error = future.exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                if error is not None:
                    broken.add(name)
                yield name, error or future.result(), time.monotonic() - began


def _alike(name: str, found: Mapping[str, Found]) -> str:
    """How a case differs from the one that is to leave the same; empty if it does not."""
    other = CASES[name].same
    assert other is not None, "asked of such cases"
    mine, theirs = (
        {key: value for key, value in found[one].items() if key.startswith("run/")}
        for one in (name, other)
    )
    different = [key for key in {**theirs, **mine} if mine.get(key) != theirs.get(key)]
    return f"not as {other}: {', '.join(different)}" if different else ""


# --- compare -----------------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> int:
    """Print a table of two recordings; returns 1 if they differ."""
    first, second = (
        json.loads(path.read_text("utf-8")) for path in (options.first, options.second)
    )
    if first["made with"] != second["made with"]:
        print(f"made with {first['made with']}\n      and {second['made with']}")
    lines, told = [], []
    for name in options.only or dict.fromkeys([*first["cases"], *second["cases"]]):
        here, there = first["cases"].get(name), second["cases"].get(name)
        if here is None or there is None:
            both = "neither" if here is there else f"only the {'first' if here else 'second'}"
            told.append(f"{name}: {both} has it")
            continue
        keys = list(dict.fromkeys([*here, *there]))
        different = [
            key for key in keys if not same(here.get(key), there.get(key), options.tolerance)
        ]
        lines.append((name, len(keys), len(keys) - len(different), len(different)))
        told += [f"{name}: {key}: {_first(here, there, key)}" for key in different]
    print(f"{'case':24} {'items':>6} {'equal':>6} {'other':>6}")
    for name, items_of, equal, other in lines:
        print(f"{name:24} {items_of:6} {equal:6} {other or '-':>6}")
    print("\n".join(told) or "no difference")
    for path, recorded in ((options.first, first), (options.second, second)):
        for name, problem in recorded["problems"].items():
            if not options.only or name in options.only:
                told.append(problem)
                print(f"{path}: {name} had a problem: {problem}")
    return 1 if told else 0


def same(here: Any, there: Any, tolerance: float) -> bool:
    """Whether two recorded values are equal; with a tolerance, hashes beside numbers are not."""
    if isinstance(here, dict) and isinstance(there, dict):
        if "sha256" in here and here["sha256"] == there.get("sha256"):
            return True  # sums beside it are added in the order of names
        passed = {"sha256"} if tolerance else set()
        keys = here.keys() - passed
        return keys == there.keys() - passed and all(
            same(here[key], there[key], tolerance) for key in keys
        )
    if isinstance(here, list) and isinstance(there, list):
        return len(here) == len(there) and all(
            same(*pair, tolerance) for pair in zip(here, there, strict=True)
        )
    if tolerance and isinstance(here, float) and isinstance(there, float):
        return math.isclose(here, there, rel_tol=tolerance, abs_tol=tolerance)
    return here == there


def _first(here: Found, there: Found, key: str) -> str:
    """The first difference of a value, for people."""
    if key not in here or key not in there:
        return f"only in the {'first' if key in here else 'second'}"
    mine, other = here[key], there[key]
    if isinstance(mine, list) and isinstance(other, list):
        pairs = enumerate(itertools.zip_longest(mine, other))
        place = next(place for place, pair in pairs if pair[0] != pair[1])
        mine, other = (value[place : place + 1] for value in (mine, other))
        return f"at {place} {mine} became {other}"
    return f"{mine} became {other}"


# --- the surface -------------------------------------------------------------------------------

COMMANDS = (
    *("train", "embed", "sample", "convert", "export", "ema", "grow", "info", "eval", "sweep"),
    *("plot", "data", "data check", "demo"),
)
CHOICES = (
    *("data.source", "data.crop", "data.pixels", "data.clip", "encoder.name"),
    *("model.schedule", "model.time_input", "model.levels[0].input_scaling"),
    *("process.prediction", "process.weighting[0].name"),
    *("train.optimizer", "train.precision", "train.layout"),
    *("sampling.sampler", "sampling.grid", "sampling.threshold[0]"),
)
"""Keys of the config whose values have names, which a wrong one is answered with."""
ASKING = """
import contextlib, importlib, inspect, io, json, shlex, sys
import matryoshka_diffusion as package
main, lines, presets = *map(importlib.import_module, sys.argv[1:2]), *json.load(sys.stdin)
for words in lines:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        with contextlib.suppress(SystemExit):
            main.main(words)
    print("$ mdm", shlex.join(words) + "\\n" + said.getvalue())
for name in presets:
    with contextlib.suppress(ValueError):
        print("preset", name, json.dumps(package.preset(name).model_dump(mode="json"), indent=1))
def told(value):
    known = inspect.isroutine(value) or inspect.isclass(value)
    return str(inspect.signature(value)) if known else ""
for name in package.__all__:
    value = getattr(package, name)
    print("name", name + told(value))
    for part in vars(value) if inspect.isclass(value) else ():
        if not part.startswith("_"):
            print("   ", part + told(getattr(value, part)))
"""
"""What is asked of the command and of the package's public names, in one process."""


def surface(options: argparse.Namespace) -> int:
    """Write down what a user can ask for; returns the exit status."""
    spelling = SPELLINGS[options.spelling]
    nowhere = ["train", "no-such-preset", "--dry-run"]
    listing = _said(options.src, spelling, [nowhere], [])
    presets = re.findall(r"[\w-]+", listing.split("there are:")[1].splitlines()[0])
    lines = [
        *([*command.split(), "--help"] for command in ("", *COMMANDS)),
        nowhere,
        *(["train", "openmoji", "--dry-run", "--set", f"{key}=none-such"] for key in CHOICES),
        ["eval", "openmoji", "--metrics", "none-such"],
        *(["info", name] for name in presets),
    ]
    found = _said(options.src, spelling, lines, presets)
    recipe = (options.src.parent / "pyproject.toml").read_text("utf-8")
    extras = re.findall(r"^\[project.optional-dependencies\]\n(.*?)^\[", recipe, re.M | re.S)
    options.out.write_text("\n".join([found, "extras", *extras]), encoding="utf-8")
    print(f"{options.out}: {len(lines)} command lines, {len(presets)} presets")
    return 0


def _said(
    source: Path, spelling: Spelling, lines: Sequence[Sequence[str]], presets: Sequence[str]
) -> str:
    settings = {"PYTHONPATH": str(source.resolve()), "COLUMNS": "100", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", ASKING, spelling.module],
        input=json.dumps([[spelled(line, spelling) for line in lines], [*presets]]),
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Problem(done.stderr)
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("record", help="run the cases and note what they leave")
    command.set_defaults(run=record)
    command.add_argument("--only", nargs="+", metavar="NAME", help="these cases (all)")
    command.add_argument("--jobs", type=int, default=1, help="cases at a time (1)")
    command.add_argument("--released", type=Path, help="a small checkpoint of the released kind")
    for one in (command, commands.add_parser("surface", help="note what a user can ask for")):
        one.add_argument(
            "--src", type=Path, required=True, help="the folder that holds the package"
        )
        one.add_argument("--out", type=Path, required=True, metavar="FILE")
        one.add_argument("--spelling", choices=SPELLINGS, default=LATEST)
    one.set_defaults(run=surface)

    command = commands.add_parser("compare", help="say what differs between two recordings")
    command.set_defaults(run=compare)
    command.add_argument("first", type=Path)
    command.add_argument("second", type=Path)
    command.add_argument("--only", nargs="+", metavar="NAME", help="these cases (all)")
    command.add_argument("--tolerance", type=float, default=0.0, help="of numbers; no hashes (0)")
    options = parser.parse_args()
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
