"""Commands on trained models: sample, edit, grow, convert, ema."""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from matryoshka_diffusion.cli.options import (
    MODEL,
    MODEL_FOLDER,
    adapters,
    add_command,
    add_sampling,
    add_shared,
    add_size,
    find_device,
    natural,
    positive,
    refuse_idle,
    sampling,
    sized,
    tell_names,
)
from matryoshka_diffusion.cli.terminal import Bar, show
from matryoshka_diffusion.models.names import refuse_unknown

CLIPS = ("webp", "mp4", "gif", "png")
_MATCHED = 0.05  # error of an average's profile, at most


def sample(options: argparse.Namespace) -> None:
    refuse_unknown(options.model)
    from matryoshka_diffusion.cascade import open_model
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.pipeline import Matryoshka

    # With --coarse the user has the small images, so no base has to draw them.
    load = partial(open_model, base=options.base) if options.coarse is None else Matryoshka.load
    with Bar(f"converting {options.model}, once", "B", unit_scale=True) as bar:
        model = load(
            options.model,
            device=find_device(options.device),
            precision=options.precision,
            text_encoder=options.text_encoder,
            adapters=adapters(options),
            progress=bar,
        )
    model = sized(model, options)
    settings, finest = sampling(options), model.resolutions[-1]
    refuse_idle(model, settings)
    tell_names(options.prompt or (), model)
    if options.fps is not None and finest.frames is None:
        raise UsageError(f"--fps {options.fps:g}: {model.config.name} draws images: omit --fps")
    # Without a prompt or class, every class is drawn.
    count = len(options.prompt or options.classes or ()) or max(model.config.model.classes, 1)
    _check_place(options, _subject(model, settings), count)
    if options.prompts is not None:
        _draw_prompts(model, options, settings)
        return
    coarse: dict[str, Any] = {}
    n = options.n
    if options.coarse is not None:
        coarse["coarse"], n = _coarse_images(options.coarse, model.config, count, n)
    with Bar("sampling", " steps") as bar:
        samples = model.sample(
            options.prompt,
            classes=options.classes,
            negative=options.negative,
            n=n,
            seed=options.seed,
            batch_size=options.batch_size,
            progress=bar,
            **coarse,
            **settings,
        )
    first, *others = dict.fromkeys(samples.captions)
    _save(samples, options, first + f" and {len(others)} more" * bool(others))


def _check_place(options: argparse.Namespace, subject: Any, count: int) -> None:
    """Refuse a place that samples cannot be written to, or that has files, before drawing them."""
    from matryoshka_diffusion.draw import gallery

    place = options.out or gallery.default_place(options.model, "", options.seed)
    goes_on = options.prompts is not None  # in the same folder, with what is missing
    overwrite = options.overwrite or goes_on
    gallery.check(place, options.clips, subject, count, options.n, overwrite=overwrite)


def _save(samples: Any, options: argparse.Namespace, name: str) -> None:
    """Write samples to `--out`; without it one sample is a file, and several are a folder."""
    from matryoshka_diffusion.draw import gallery

    drawn = gallery.Gallery(samples.levels, samples.captions, samples.settings)
    alone = len(drawn.captions) == 1
    suffix = gallery.suffix_of(options.clips, moves=drawn.moves) if alone else ""
    out = options.out or gallery.default_place(options.model, name, options.seed, suffix)
    hint = "; -o FOLDER writes all levels" if suffix and len(drawn.levels) > 1 else ""
    blank = not all(map(str.strip, options.prompt or ("-",)))
    note = "; an empty prompt asks for nothing in particular (add words to -p)" if blank else ""
    show(gallery.save(drawn, out, options.clips) + hint * (options.out is None) + note)


def _subject(model: Any, settings: dict[str, Any]) -> Any:
    """Properties of the model that decide how its samples can be written."""
    from matryoshka_diffusion.draw.gallery import Subject

    config, finest = model.config, model.resolutions[-1]
    captioned = config.model.text is not None or config.model.classes > 0
    fps = model.sampling(settings).fps
    return Subject(config.name, finest.frames, finest.width, captioned, fps)


def _draw_prompts(model: Any, options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Draw the prompts of a file into the folder --out, or go on there."""
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.runs.draw_prompts import draw_requests, read_requests

    for name in ("prompt", "classes", "negative", "coarse", "overwrite"):
        if getattr(options, name) not in (None, False):
            option = {"classes": "class"}.get(name, name)
            raise UsageError(f"--{option}: the lines of --prompts say what is drawn; omit one")
    if options.out is None:
        raise UsageError("--prompts: give the folder with -o; the same command goes on there")
    requests = read_requests(options.prompts, options.n, options.seed)
    with Bar("sampling") as bar:
        drawn = draw_requests(
            model,
            requests,
            options.out,
            form=options.clips,
            batch_size=options.batch_size,
            progress=bar,
            **settings,
        )
    there = len(requests) - drawn
    earlier = f", {there:,} of them drawn earlier" if there else ""
    show(f"{len(requests):,} images in {options.out}{earlier}")


def _coarse_images(path: Path, config: Any, count: int, n: int) -> tuple[Any, int]:
    """Read the images of --coarse, one for each sample; returns them and the samples a prompt."""
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.data.folder import for_each, read_coarse

    if config.model.coarse is None:
        raise UsageError(f"--coarse: {config.name} is no upsampler: omit --coarse")
    images = read_coarse(path, config.model.coarse.side, config.model.channels)
    return for_each(images, count, n)


def edit(options: argparse.Namespace) -> None:
    refuse_unknown(options.model)
    from matryoshka_diffusion.pipeline import Matryoshka

    model = Matryoshka.load(
        options.model,
        device=find_device(options.device),
        precision=options.precision,
        text_encoder=options.text_encoder,
        adapters=adapters(options),
    )
    model, settings = sized(model, options), sampling(options)
    refuse_idle(model, settings)
    tell_names(options.prompt or (), model)
    count = len(options.prompt or options.classes or ()) or max(model.config.model.classes, 1)
    _check_place(options, _subject(model, settings), count)
    with Bar("sampling", " steps") as bar:
        samples = model.edit(
            options.prompt,
            keep=dict(options.keep),
            image=options.image,
            mask=options.mask,
            strength=options.strength,
            until=options.until,
            levels=options.levels,
            between=options.between and tuple(options.between),
            regions=options.region,
            correct=options.correct,
            resample=options.resample,
            classes=options.classes,
            negative=options.negative,
            n=options.n,
            seed=options.seed,
            batch_size=options.batch_size,
            progress=bar,
            **settings,
        )
    _save(samples, options, "edited")


def _level_and_picture(text: str) -> tuple[str, Path]:
    """Parse SIDE=PICTURE or FRAMESxSIDE=CLIP."""
    level, _, file = text.partition("=")
    if not level.replace("x", "", 1).isdecimal() or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not a level and a picture: 16=sketch.png")
    return level, Path(file)


def _mask_and_text(text: str) -> tuple[Path | float, str]:
    """Parse MASK=TEXT or WEIGHT=TEXT."""
    mask, _, prompt = text.partition("=")
    if not mask or not prompt:
        raise argparse.ArgumentTypeError(f"{text!r} is not a mask and a prompt: sky.png=blue sky")
    try:
        return float(mask), prompt
    except ValueError:
        return Path(mask), prompt


def _names(text: str) -> list[str]:
    return text.split(",")


def grow(options: argparse.Namespace) -> None:
    refuse_unknown(options.model)
    from matryoshka_diffusion.runs.grow import grow_run, next_frames, next_level

    finer = partial(next_level, side=options.to)
    if options.frames is not None:
        finer = partial(next_frames, frames=options.frames)
    config = grow_run(
        options.model,
        finer,
        options.out,
        options.set,
        data=options.data,
        freeze_coarse=options.freeze_coarse,
        ramp=options.ramp,
    )
    sizes = ", ".join(level.size for level in config.model.levels)
    show(f"{options.out}: levels {sizes}; mdm train {options.out} trains them")


def convert(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.models.save import convert_released

    with Bar("converting", "B", unit_scale=True) as bar:
        config = convert_released(
            options.file, options.out, text_encoder=options.text_encoder, progress=bar
        )
    show(f"{options.out}: {config.name}; mdm sample {options.out} -p TEXT draws with it")


def ema(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.models.save import average_model

    error = average_model(options.run_folder, options.length, options.out, options.until)
    if error > _MATCHED:
        warnings.warn(
            f"--length {options.length:g} is not matched, its profile is off by {error:.0%}: 32 "
            "snapshots of train.ema_power=[0.05, 0.1] match lengths from 0.02 to 0.25",
            stacklevel=1,
        )
    show(
        f"{options.out}: the average of length {options.length:g}, its profile off by {error:.2%}; "
        f"mdm sample {options.out} draws with it"
    )


def sampling_command(folder: Path, config: Any) -> str:
    """The command that draws with a model; an upsampler whose config names no base needs one."""
    alone = config.model.coarse is None or config.sampling.base is not None
    return f"mdm sample {folder}" if alone else f"mdm sample {folder} --base RUN"


def add_commands(commands: Any) -> None:
    """Add the commands of this module to the parser."""
    command = add_command(commands, "sample", sample, "draw images or clips with a trained model")
    add = command.add_argument
    _add_drawing(command)
    text = "draw each line of a file (.jsonl: with its own seed, guidance, negative), into -o"
    add("--prompts", type=Path, metavar="FILE", help=text)
    origin = command.add_mutually_exclusive_group()
    add_shared(origin, "--base")
    text = "small images for an upsampler to enlarge"
    origin.add_argument("--coarse", type=Path, metavar="PNG|DIR", help=text)
    text = "form of clips in a folder (webp); png, a folder for each clip, is for other programs"
    add("--clips", choices=CLIPS, help=text)
    add("--fps", type=float, help="frames per second of clips (the model's own)")

    text = "change a picture, or draw with a level of the pyramid kept"
    command = add_command(commands, "edit", edit, text)
    add = command.add_argument
    _add_drawing(command, "--variations")
    kept: Any = {"type": _level_and_picture, "default": [], "metavar": "SIDE=PICTURE"}
    add("--keep", action="append", **kept, help="level that stays as this picture; repeated")
    part: Any = {"type": _mask_and_text, "default": [], "metavar": "MASK=TEXT"}
    text = "prompt or class where a mask is white, or by a weight for MASK everywhere; repeated"
    add("--region", action="append", **part, help=text)
    text = "network calls more a step, by which other levels learn of what is kept sooner (0)"
    add("--correct", type=natural, default=0, metavar="N", help=text)
    text = "take every 10 steps N times, with new noise between (1)"
    add("--resample", type=positive, default=1, metavar="N", help=text)
    add("--image", type=Path, metavar="PICTURE", help="picture to change")
    text = "white where the image or kept level is drawn anew; as large as it, or as a level"
    add("--mask", type=Path, metavar="PICTURE", help=text)
    text = "noise on the image at the start: 0 returns it, 1 hides it"
    add("--strength", type=float, metavar="S", help=text)
    text = "time, 1 to 0, at which kept levels and pixels are let go (0)"
    add("--until", type=float, default=0.0, metavar="T", help=text)
    text = "levels that differ between samples, such as 32,64; the others have the noise of SEED"
    add("--levels", type=_names, metavar="SIDE[,SIDE...]", help=text)
    between: Any = {"nargs": 2, "type": int, "metavar": ("SEED", "SEED")}
    add("--between", **between, help="samples go from one seed to another, on --levels or on all")
    command.set_defaults(clips=None, prompts=None)

    command = add_command(commands, "grow", grow, "put a finer level around a trained model")
    add = command.add_argument
    add("model", metavar="RUN", help=MODEL)
    finer = command.add_mutually_exclusive_group(required=True)
    finer.add_argument("--to", type=positive, metavar="SIDE", help="side in pixels, or latents")
    finer.add_argument("--frames", type=positive, metavar="N", help="frames, at the same side")
    add("--data", metavar="DATA", help="data to train on (RUN's own)")
    add("--out", type=Path, required=True, metavar="RUN", help="the new run")
    number = {"type": natural, "default": 0, "metavar": "N"}
    add("--freeze-coarse", **number, help="freeze the old levels for the first N images")
    add("--ramp", **number, help="raise the new level's loss weight from 0 over the first N images")
    add_shared(command, "--set")

    text = "turn a released checkpoint into a model folder"
    command = add_command(commands, "convert", convert, text)
    command.add_argument("file", type=Path, metavar="FILE", help="vis_model_64x64.pth, ...")
    command.add_argument("-o", "--out", **MODEL_FOLDER)
    add_shared(command, "--text-encoder")

    command = add_command(commands, "ema", ema, "average the weights of a run over another length")
    add = command.add_argument
    add("run_folder", type=Path, metavar="RUN", help="trained with ema_power")
    text = "share of the training that the average is over, such as 0.08"
    add("--length", type=float, required=True, metavar="SHARE", help=text)
    text = "average the training until so many images were seen: a weaker model for --guide"
    add("--until", type=positive, metavar="IMAGES", help=text)
    command.add_argument("-o", "--out", **MODEL_FOLDER)


def _add_drawing(command: argparse.ArgumentParser, *count: str) -> None:
    """Add what `sample` and `edit` share: the model, its conditions, seeds and sampler.

    `count` are other names of -n.
    """
    add = command.add_argument
    add("model", metavar="RUN", help=MODEL)
    add("-p", "--prompt", action="append", metavar="TEXT", help="may be repeated")
    add("--negative", metavar="TEXT", help="prompt that guidance leads away from")
    add("--class", dest="classes", action="append", metavar="NAME", help="name or number, repeated")
    number: Any = {"type": positive, "default": 1, "metavar": "N"}
    add("-n", *count, dest="n", **number, help="samples for each prompt or class")
    add("--seed", type=int, default=0, help="sample i has seed SEED + i")
    text = "a folder for all, or one file: .png, for clips also .mp4, .webp, .gif"
    add("-o", "--out", type=Path, metavar="PATH", help=text)
    add("--overwrite", action="store_true", help="replace files of the same names in -o")
    add_shared(command, "--lora", "--text-encoder")
    add_size(command)
    add_sampling(command)
