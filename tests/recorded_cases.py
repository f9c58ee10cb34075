"""Command lines that together use everything the command computes, as cases for `recordings.py`.

All of them run on small data and small models. A command names data as `../made/NAME`; the name is
one of `recorded_data.MAKERS`.
"""

from __future__ import annotations

import json
import shlex
import signal
from typing import Any, NamedTuple


class Command(NamedTuple):
    """A command line after `mdm`, and how the command must end.

    Attributes:
        words: the arguments.
        status: the expected exit status.
        keeps_output: record what the command prints.
        stop: a signal for the process, sent after it logged `stop_after` lines of metrics in `run`.
    """

    words: tuple[str, ...]
    status: int = 0
    keeps_output: bool = False
    stop: signal.Signals | None = None
    stop_after: int = 0


class Case(NamedTuple):
    """Commands that run one after the other in one folder, beside the folders of other cases.

    Attributes:
        commands: the commands.
        after: cases whose folders the commands use.
        cache: the case in `after` whose cache the commands share.
        same: another case that must leave the same files.
    """

    commands: tuple[Command, ...]
    after: tuple[str, ...] = ()
    cache: str | None = None
    same: str | None = None


def case(*commands: Command, **attributes: Any) -> Case:
    """The case of these commands."""
    return Case(commands, **attributes)


def mdm(line: str, *settings: str, **attributes: Any) -> Command:
    """The command `mdm LINE --set SETTING ...`."""
    sets = [word for setting in settings for word in ("--set", setting)]
    return Command((*shlex.split(line), *sets), **attributes)


def in_version_010(words: tuple[str, ...]) -> tuple[str, ...]:
    """A command line as version 0.1.0 takes it: baselines were presets, `compare` was `eval`."""
    if "--as" in words:
        place = words.index("--as")
        baseline = f"{words[1]}-{words[place + 1]}"
        words = (words[0], baseline, *words[2:place], *words[place + 2 :])
    return ("eval", *words[1:]) if words[0] == "compare" else words


# --- small settings ----------------------------------------------------------------------------

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
"""Settings of every run: small, logged at each step, in arithmetic that all machines have."""


def stages(*levels: int, mixed: bool = True, images: int = 120) -> str:
    """Thirty steps of four images, in one stage for each number of levels; the last is mixed."""
    each = images // len(levels) // 4 * 4
    table: list[dict[str, Any]] = [
        {"levels": count, "images": each, "batch_size": 4, "lr": 2e-3} for count in levels
    ]
    table[0]["images"] = images - each * (len(levels) - 1)
    if mixed and levels[-1] > 1:
        table[-1]["mix"] = [0.5 / (levels[-1] - 1)] * (levels[-1] - 1) + [0.5]
    return f"train.stages={json.dumps(table)}"


def level(index: int, side: int, widths: int = 2, **values: Any) -> tuple[str, ...]:
    """Settings of a level of `side` with the narrowest widths, else as in the preset."""
    settings = {"side": side, "widths": [32] * widths, **values}
    return tuple(f"model.levels[{index}].{key}={json.dumps(v)}" for key, v in settings.items())


def clip_level(index: int, side: int) -> tuple[str, ...]:
    """Settings that turn a level of sixteen frames into one of four."""
    halved = {"halve_frames": [True, True], "frame_attention": [1, 1, 0]}
    blocks = {"blocks": [1, 1, 0], "attention": [0, 0, 0]}
    return level(index, side, 3, frames=4, heads=1, **blocks, **halved)


NEST = (*TRAIN, *level(0, 8), *level(1, 16), *level(2, 32), stages(1, 2, 3))
"""Settings of `openmoji` and `folder-64`: levels of 8, 16 and 32 pixels, a stage for each."""
UNET = (*TRAIN, *level(0, 32, 4), stages(1))
"""Settings of presets with one level of the finest side."""
FASHION = (*TRAIN, *level(0, 16), *level(1, 32), stages(1, 2))
TEXT = ("model.text.width=32",)
FOLDER = ("data.source=folder",)
"""The source of small images in place of a preset's own, which take longer to read."""
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
CONDITIONS = {
    "captions": FEW,
    "classes": "--class 0 --class 2 -n 2 -o samples",
    "plain": "-n 4 -o samples",
}
FORMS = {"folder": "", "tars": "/{00000..00001}.tar", "parquet": "/*.parquet"}


# --- cases -------------------------------------------------------------------------------------


def _forms() -> dict[str, Case]:
    """`folder-64` with captions, with classes and with neither, each from every form of data.

    Runs on folders are sampled; the other runs leave previews.
    """
    cases = {}
    for kind, conditions in CONDITIONS.items():
        for form, files in FORMS.items():
            train = f"train folder-64 --data '../made/{kind}-{form}{files}' --out run"
            samples = [mdm(f"sample run {conditions}")] if form == "folder" else []
            cases[f"{kind}-{form}"] = case(mdm(train, *NEST), *samples)
    return cases


def _ranks() -> dict[str, Case]:
    """Two processes on a CPU that share batches, under DDP and under FSDP2."""
    train = "train folder-64 --data ../made/classes-folder --out run --gpus 2 --device cpu"
    return {
        "ranks-ddp": case(mdm(f"{train} --parallel ddp", *NEST)),
        "ranks-fsdp": case(mdm(f"{train} --parallel fsdp", *NEST)),
    }


def _stopped() -> dict[str, Case]:
    """Runs that are stopped, killed and resumed to the same bits."""
    run = mdm("train folder-64 --data ../made/classes-folder --out run", *NEST)
    codec = mdm("train codec --data ../made/plain-folder --out run", *CODEC)
    return {
        "stopped": case(
            run._replace(stop=signal.SIGTERM, stop_after=5, status=143),
            run._replace(stop=signal.SIGKILL, stop_after=16, status=-9),
            mdm("train run"),
            after=("classes-folder",),
            same="classes-folder",
        ),
        "stopped-codec": case(
            codec._replace(stop=signal.SIGTERM, stop_after=5, status=143),
            codec._replace(stop=signal.SIGKILL, stop_after=16, status=-9),
            mdm("train run"),
            after=("codec",),
            same="codec",
        ),
    }


def _processes() -> dict[str, Case]:
    """Predictions, weightings, schedules, and other values of a config."""
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
    """The paper's baselines, on pixels and on latents."""
    captions = "--data ../made/captions-folder"
    openmoji = (*TEXT, *FOLDER)
    base = (*TRAIN, *openmoji, *level(0, 8), "data.side=32", stages(1))
    coarse = (*UNET, "model.coarse.side=8")
    fashion = "train fashion-mnist"
    return {
        "simple": case(
            mdm(f"train openmoji --as simple {captions} --out run", *UNET, *openmoji),
            mdm(f"sample run {FEW}"),
        ),
        "finest": case(
            mdm(
                f"train openmoji --as finest {captions} --out run",
                *(*NEST[:-1], stages(3, mixed=False), *openmoji),
            ),
            mdm(f"sample run {FEW}"),
        ),
        "cascade": case(
            mdm(f"train openmoji --as base {captions} --out base", *base),
            mdm(
                f"train openmoji --as upsampler {captions} --base base --out upsampler",
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
            mdm(f"{fashion} --as simple --out run", *TRAIN, *level(0, 32, 3), stages(1)),
            after=("fashion-mnist",),
            cache="fashion-mnist",
        ),
        "fashion-mnist-finest": case(
            mdm(f"{fashion} --as finest --out run", *FASHION[:-1], stages(2, mixed=False)),
            after=("fashion-mnist",),
            cache="fashion-mnist",
        ),
        "fashion-mnist-cascade": case(
            mdm(f"{fashion} --as base --out base", *TRAIN, *level(0, 16), stages(1)),
            mdm(
                f"{fashion} --as upsampler --base base --out run",
                *(*TRAIN, *level(0, 32, 3), stages(1)),
            ),
            mdm("sample run --class Bag -n 4 -o samples"),
            after=("fashion-mnist",),
            cache="fashion-mnist",
        ),
        "codec": case(mdm("train codec --data ../made/plain-folder --out run", *CODEC)),
        "latent": case(
            mdm(
                "train folder-64 --as latent --data ../made/classes-folder --codec ../made/codec "
                "--out run",
                *(*TRAIN, *level(0, 8), stages(1)),
            ),
            mdm(f"sample run {CONDITIONS['classes']}"),
            mdm("export run -o shared"),
        ),
        "codes": case(
            mdm(
                f"train openmoji --as codes {captions} --codec ../codec/run --out run",
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
            mdm(f"sample run {CONDITIONS['classes']}"),
        ),
        "released": case(
            mdm(f"info {released}", keeps_output=True),
            mdm(f"convert {released} -o converted --text-encoder ../made/t5"),
            mdm(f"sample {released} {FEW} --steps 4 --text-encoder ../made/t5"),
            mdm(
                f"train {released} {captions} --out run",
                *(*TUNED[:-1], stages(2, mixed=False), "encoder.path=../made/t5"),
            ),
        ),
    }


def _on_models() -> dict[str, Case]:
    """Work on a trained model: tuning, adapters, growing, exporting."""
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
    """Models of clips: a preset, one that is grown from a model of images, and the paper's."""
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
    """OpenMoji itself, all metrics, and the shipped model with every sampler."""
    # A tenth of the images is measured, through the real network.
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
            mdm("demo --out run", *nest, keeps_output=True),
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


def _data_and_plans() -> dict[str, Case]:
    """Reports about data, presets and plans."""
    sets = [f"../made/{kind}-{form}{files}" for kind in CONDITIONS for form, files in FORMS.items()]
    return {
        "checked": case(
            *(mdm(f"data check '{data}'", keeps_output=True) for data in sets[::2]),
            mdm("data check ../made/metadata --sheet data.png", keeps_output=True),
            mdm("data check hf:../made/saved", keeps_output=True),
            mdm("data check ../made/damaged", keeps_output=True, status=1),
            mdm(
                "data check ../made/clips --preset emoji-video",
                *(*VIDEO, *level(0, 16), *clip_level(1, 16)),
                keeps_output=True,
            ),
        ),
        "compared": case(
            mdm("compare ../plain-folder/samples ../made/plain-folder --metrics fd"),
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
            mdm("info openmoji", keeps_output=True),
            mdm("info ../captions-folder/run", keeps_output=True),
            mdm("train cc12m-1024 --dry-run", keeps_output=True),
            mdm("train webvid-16x256 --dry-run --parallel fsdp", keeps_output=True),
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
    **_data_and_plans(),
}
