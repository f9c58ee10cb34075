"""The command `mdm`: parse, build, call. What happens is in the functions that it calls.

Everything heavy is imported by the command that needs it, so that `mdm --help` answers at once.
Exit status: 0 done, 1 failed, 2 asked for something that cannot be, 130 / 143 / 138 stopped
by Ctrl-C / SIGTERM / SIGUSR1 and saved.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from matryoshka_diffusion.cli.eval import add_eval, add_sweep
from matryoshka_diffusion.cli.options import (
    MODEL,
    RANK_TIMEOUT,
    add_base,
    add_command,
    add_device,
    add_sampling,
    find_device,
    natural,
    positive,
    refuse_idle,
    sampling,
)
from matryoshka_diffusion.cli.terminal import (
    Bar,
    Bars,
    duration,
    leads,
    one_line,
    say,
    show_warning,
    size_text,
)

FORMATS = ("mdm", "diffusers")
DTYPES = ("fp32", "bf16")
CLIPS = ("webp", "mp4", "gif", "png")
PARALLEL = ("ddp", "fsdp")
LOGS = ("tensorboard", "wandb")
_MATCHED = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = build_parser().parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = show_warning
    try:
        options.run(options)
    except KeyboardInterrupt:
        return say("interrupted", 130)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if options.debug:
            raise
        return say(one_line(error), _status(error))
    except Exception as error:
        code = getattr(error, "code", None)  # train.signals.Stopped, without importing torch
        if not isinstance(code, int):
            raise
        return say(one_line(error), code) if leads() else code
    return 0


# --- the commands ------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.runs import prepare as job
    from matryoshka_diffusion.runs.train_autoencoder import find_codec_run

    if (codec := find_codec_run(options.preset, options.data, options.set)) is not None:
        return _train_codec(codec, options)
    config = job.find_config(
        options.preset,
        options.data,
        options.set,
        options.init,
        options.lora,
        as_=options.as_,
        base=options.base,
        codec=options.codec,
    )
    if options.dry_run:
        return _plan(config, options.gpus, options.parallel)
    out = options.out or _own_folder(options.preset)
    if out is None:
        raise SystemExit(say("mdm train: give the run's folder with --out", 2))
    if options.gpus > 1 and "RANK" not in os.environ:
        from matryoshka_diffusion.train.distributed import launch

        raise SystemExit(launch(options.gpus, options.arguments))
    _train(config, out, options.device, options.log, options.parallel, options.rank_timeout)
    return None


def _train_codec(config: Any, options: argparse.Namespace) -> None:
    """Train an autoencoder, and say how well it does and what it is for."""
    from matryoshka_diffusion.codec.autoencoder import TRAINING
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.runs.train_autoencoder import train_codec

    plain = build_parser().parse_args(["train", options.preset])
    others = (
        "--as",
        "--init",
        "--base",
        "--lora",
        "--codec",
        "--dry-run",
        "--log",
        "--gpus",
        "--parallel",
    )
    for name in (*others, "--rank-timeout"):
        key = "as_" if name == "--as" else name[2:].replace("-", "_")
        if getattr(options, key) != getattr(plain, key):
            raise UsageError(f"{name} is not for training a codec")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("WORLD_SIZE: a codec is trained by one process, without torchrun")
    begun = Path(options.preset)
    out = options.out or (begun if (begun / TRAINING).is_file() else None)
    if out is None:
        raise SystemExit(say("mdm train: give the codec's folder with --out", 2))
    codec = train_codec(config, out, find_device(options.device))
    print(f"PSNR {codec.psnr:.2f} dB on {codec.measured_on}: {out / 'reconstructions.png'}")
    print(f"trained: {codec.folder}; mdm train {_on_codes(config)} --codec {out} --out RUN")


def _on_codes(config: Any) -> str:
    """The preset that is meant for a codec's codes, with its data."""
    from matryoshka_diffusion.presets import PRESETS

    name = config.name.removesuffix("-codec")
    return f"{name if name in PRESETS else f'folder-64 --data {config.data.path}'} --as latent"


def _plan(config: Any, gpus: int, parallel: str) -> None:
    """Say what a run would be, and what its data looks like if it was named."""
    from matryoshka_diffusion.cli.info import describe_plan
    from matryoshka_diffusion.data.check import summary
    from matryoshka_diffusion.data.source import PACKAGED
    from matryoshka_diffusion.runs import prepare as job

    source = None
    if config.data.path is not None or config.data.source in PACKAGED:
        source = job.open_source(config.data, config.data_side, config.data_frames)
        config = job.complete(config, source)
    pictures = None if source is None else len(source)
    gpus = gpus if gpus > 1 else 8  # of which most machines for this have so many
    print(describe_plan(config, pictures, gpus=gpus, shards=parallel == "fsdp"))
    if source is not None:
        print(summary(source))


def embed(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.runs import prepare as job

    config = job.find_config(options.preset, options.data, options.set)
    texts, cache = job.captions_to_embed(
        config,
        find_device(options.device),
        text_encoder=options.text_encoder,
        precision=options.precision,
    )
    estimate, free = cache.estimate(texts), shutil.disk_usage(cache.folder).free
    stored = estimate.captions - len(estimate.missing)
    print(f"{estimate.captions:,} different captions, {stored:,} of them stored already")
    if estimate.missing:
        cut = f" ({estimate.cut:.1%} of them are cut)" if estimate.cut else ""
        print(
            f"about {estimate.tokens:.1f} tokens each{cut}: {size_text(estimate.needed)} to write"
        )
        print(f"to {cache.folder} ({size_text(free)} free)")
        if estimate.needed > free:
            raise OSError(
                errno.ENOSPC,
                f"the features do not fit into {cache.folder}: about {estimate.needed:,} bytes "
                f"needed, {free:,} bytes free; set MDM_CACHE to a folder on a larger disk",
            )
        print(f"about {duration(cache.seconds(estimate.missing))}", flush=True)
    with Bar("encoding", " captions", tell=True) as bar:
        cache.add(estimate.missing, bar)
    stored = f"{len(cache.store):,} captions, {size_text(cache.store.bytes)}"
    print(f"{cache.folder}: features of {stored}; training with this encoder reads them")


def sample(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.cascade import open_model
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.draw import gallery
    from matryoshka_diffusion.pipeline import Matryoshka

    enlarging = options.coarse is not None  # pictures of the user's own, so no base draws any
    once = f"converting {options.model}, once"
    with Bar(once, "B", unit_scale=True, announce=True) as bar:
        model = (Matryoshka.load if enlarging else partial(open_model, base=options.base))(
            options.model,
            device=find_device(options.device),
            precision=options.precision,
            text_encoder=options.text_encoder,
            progress=bar,
        )
    settings = sampling(options)
    refuse_idle(model, settings)
    subject = gallery.Subject(
        model.config.name,
        model.resolutions[-1].frames,
        model.resolutions[-1].width,
        model.config.model.text is not None or model.config.model.classes > 0,
        model.sampling(settings).fps,
    )
    if options.fps is not None and subject.frames is None:
        raise UsageError(f"--fps {options.fps:g}: {subject.name} draws images: omit it")
    count = _count_asked(options, model.config)
    gallery.check(options.out, options.clips, subject, count, options.n)
    own = _own_pictures(options, model.config) if enlarging else {"n": options.n}
    with Bar("sampling", " steps") as bar:
        samples = model.sample(
            options.prompt,
            classes=options.classes,
            negative=options.negative,
            seed=options.seed,
            batch_size=options.batch_size,
            progress=bar,
            **own,
            **settings,
        )
    drawn = gallery.Gallery(samples.levels, samples.captions, samples.settings)
    out = options.out or gallery.default_folder(options.model, samples.captions[0], options.seed)
    print(gallery.save(drawn, out, options.clips))


def _count_asked(options: argparse.Namespace, config: Any) -> int:
    """How many prompts or classes samples are drawn of; if none is named, every class."""
    named = options.prompt or options.classes
    return len(named) if named else max(config.model.classes, 1)


def _own_pictures(options: argparse.Namespace, config: Any) -> dict[str, Any]:
    """The small picture of --coarse for each sample, and how many samples a prompt has."""
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.data.folder import for_each, read_coarse

    if config.model.coarse is None:
        raise UsageError(f"--coarse: {config.name} is no upsampler")
    pictures = read_coarse(options.coarse, config.model.coarse.side, config.model.channels)
    coarse, n = for_each(pictures, _count_asked(options, config), options.n)
    return {"coarse": coarse, "n": n}


def grow(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.runs.grow import grow_run, next_frames, next_level

    config = grow_run(
        options.model,
        partial(next_level, side=options.to)
        if options.frames is None
        else partial(next_frames, frames=options.frames),
        options.out,
        options.set,
        data=options.data,
        freeze_coarse=options.freeze_coarse,
        ramp=options.ramp,
    )
    sizes = ", ".join(level.size for level in config.model.levels)
    print(f"{options.out}: levels {sizes}; mdm train {options.out} trains them")


def info(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.cli.info import describe, describe_released
    from matryoshka_diffusion.models.find import read_config
    from matryoshka_diffusion.presets import preset

    path = Path(options.name)
    if options.as_ is not None or not path.exists():
        print(describe(preset(options.name, options.as_)))
    else:
        print(describe_released(path) if path.is_file() else describe(read_config(options.name)))


def convert(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.models.save import convert_released

    with Bar("converting", "B", unit_scale=True) as bar:
        config = convert_released(
            options.file, options.out, text_encoder=options.text_encoder, progress=bar
        )
    print(f"{options.out}: {config.name}; mdm sample {options.out} -p TEXT draws with it")


def export(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.models.save import export_model

    if options.format == "diffusers":
        from matryoshka_diffusion.files import refuse_full
        from matryoshka_diffusion.models.diffusers import write_diffusers
        from matryoshka_diffusion.pipeline import Matryoshka

        refuse_full(options.out)
        model = Matryoshka.load(options.model, text_encoder=options.text_encoder)
        write_diffusers(model, options.out)
        print(f"{options.out}: matryoshka_diffusion.MDMPipeline.from_pretrained loads it")
    else:
        config = export_model(options.model, options.out, options.dtype, options.text_encoder)
        print(f"{options.out}: {_drawing(options.out, config)} draws with it")


def ema(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.models.save import average_model

    error = average_model(options.run_folder, options.length, options.out)
    if error > _MATCHED:
        warnings.warn(
            f"--length {options.length:g} is not matched, its profile is off by {error:.0%}: 32 "
            "snapshots of train.ema_power=[0.05, 0.1] match lengths from 0.02 to 0.25",
            stacklevel=1,
        )
    print(
        f"{options.out}: the average of length {options.length:g}, its profile off by {error:.2%}; "
        f"mdm sample {options.out} draws with it"
    )


def plot(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.draw.curves import plot

    plot(options.runs, options.out)
    print(f"{options.out}: the curves of {', '.join(run.name for run in options.runs)}")


def data_check(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.data.bad import NoneUsable
    from matryoshka_diffusion.data.check import contact_sheet, describe, describe_bad
    from matryoshka_diffusion.draw.grid import save_png
    from matryoshka_diffusion.runs import prepare as job

    allowed = job.find_config(options.preset, options.data, options.set).data.max_bad_fraction
    everything = [*options.set, "data.max_bad_fraction=1.0"]
    config = job.find_config(options.preset, options.data, everything)
    try:
        source = job.open_source(config.data, config.data_side, config.data_frames)
        print(describe(source))
    except NoneUsable as error:
        print(describe_bad(error.bad))
        raise
    if options.sheet is not None:
        save_png(contact_sheet(source), options.sheet, None)
    bad, total = len(source.bad), source.total
    if bad > allowed * total:
        raise ValueError(
            f"training would refuse this: {bad} of {total} files are bad, and "
            f"data.max_bad_fraction is {allowed:g}"
        )


def demo(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.draw.grid import save_png
    from matryoshka_diffusion.eval.evaluate import evaluate
    from matryoshka_diffusion.eval.prompts import demo_sheet
    from matryoshka_diffusion.pipeline import Matryoshka
    from matryoshka_diffusion.runs import prepare as job

    device = find_device(options.device)
    config = job.find_config("openmoji", None, options.set)
    finished = _train(config, options.out, device)
    model = Matryoshka.load(finished, device=device)
    source = job.open_source(model.config.data, model.picture_side)
    with Bar("24 prompts", " steps") as bar:
        page = demo_sheet(model, source, progress=bar)
    path = options.out / "sheet.png"
    save_png(page, path, {"model": model.config.name})
    with Bars() as bars:
        results = evaluate(
            model, "retrieval", source=source, folder=options.out / "eval", progress=bars
        )
    print(results[0].sentence())
    print(f"24 prompts at every level, beside the real pictures: {path}")


def _train(
    config: Any,
    out: Path,
    device: str,
    logs: Sequence[str] = (),
    parallel: Any = "ddp",
    rank_timeout: int = RANK_TIMEOUT,
) -> Path:
    """Train with previews, as one of the ranks; returns the finished model's folder."""
    import torch

    from matryoshka_diffusion.cascade import keep_base
    from matryoshka_diffusion.data.check import summary
    from matryoshka_diffusion.runs import prepare as job
    from matryoshka_diffusion.runs.grow import warm_start
    from matryoshka_diffusion.runs.held_out import HeldOutLoss
    from matryoshka_diffusion.runs.hooks import Preview, preview_of
    from matryoshka_diffusion.train.distributed import compare_data, joined, rank_device
    from matryoshka_diffusion.train.log import find_sink
    from matryoshka_diffusion.train.run_folder import refuse_foreign
    from matryoshka_diffusion.train.trainer import train as run

    sinks = [find_sink(name) for name in dict.fromkeys(logs)]
    device = rank_device(find_device(device))
    with joined(torch.device(device), parallel, rank_timeout) as world:
        world.once(lambda: refuse_foreign(out))
        # What rank 0 downloads, decodes and encodes, the others find in the cache.
        with (
            world.first("data", each_machine=True),
            Bar("encoding", " captions", tell=True) as bar,
            Bar("encoding", " pictures", tell=True) as coding,
        ):
            config = keep_base(config, out)
            ready = job.prepare(config, device, progress=bar, coding=coding)
        compare_data(world, ready.source.keys)
        world.once(lambda: warm_start(ready.config, out))
        every, asked = (
            ready.config.train.preview_every_images,
            preview_of(ready.source, ready.config),
        )
        hooks: list[Any] = [(every, Preview(asked, ready.encode, device, ready.codec))]
        if ready.held_out is not None:
            watch = HeldOutLoss(ready.source, ready.held_out, ready.encode, device, ready.codec)
            hooks.append((every, watch))
        if world.leads:
            print(summary(ready.source))
            if ready.notes:
                print(ready.notes)
        finished = run(
            ready.config,
            ready.loader,
            out,
            encode=ready.encode,
            base=ready.base,
            quarantine=ready.source.quarantine,
            hooks=hooks,
            sinks=sinks,
            device=device,
            world=world,
        )
        if world.leads:
            drawn = out / "previews"
            previews = f", with previews in {drawn}" if drawn.is_dir() else ""
            print(f"trained: {finished}{previews}; draw with {_drawing(out, ready.config)}")
    return finished


def _drawing(folder: Path, config: Any) -> str:
    """The command that draws with a model; an upsampler that names no base must be given one."""
    alone = config.model.coarse is None or config.sampling.base is not None
    return f"mdm sample {folder}" if alone else f"mdm sample {folder} --base RUN"


# --- the parser --------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(say(f"{self.prog}: {message} (see {self.prog} --help)", 2))


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = _Parser(prog="mdm", description="Matryoshka Diffusion Models: train, sample, grow.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = add_command(commands, "train", train, "train a preset, or continue a run")
    command.add_argument(
        "preset", metavar="PRESET", help="preset, YAML file, run folder, or model to tune"
    )
    _add_as(command)
    command.add_argument("--data", metavar="DATA", help="folder, tar shards, parquet or hf:NAME")
    command.add_argument("--out", type=Path, metavar="RUN", help="the run's folder")
    command.add_argument("--init", metavar="MODEL", help="start from the weights of this model")
    add_base(command)
    command.add_argument(
        "--lora", type=positive, metavar="RANK", help="train only adapters of this rank around it"
    )
    command.add_argument(
        "--codec",
        metavar="PATH",
        help="autoencoder (diffusers' AutoencoderKL) to train on codes of",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="say what training would take, and stop"
    )
    command.add_argument(
        "--gpus", type=positive, default=1, metavar="N", help="train on N GPUs of this machine (1)"
    )
    command.add_argument(
        "--parallel",
        choices=PARALLEL,
        default="ddp",
        help="on several GPUs: ddp, each has the whole network (the default), or fsdp, each has a "
        "share of it, which takes less memory",
    )
    command.add_argument(
        "--rank-timeout",
        type=positive,
        default=RANK_TIMEOUT,
        metavar="SECONDS",
        help=f"a rank that is silent for so long is dead ({RANK_TIMEOUT})",
    )
    command.add_argument(
        "--log", choices=LOGS, action="append", default=[], help="tell these, too (extras)"
    )
    add_device(command)
    _add_set(command)

    command = add_command(
        commands, "embed", embed, "store the text features of a data set's captions"
    )
    command.add_argument("preset", metavar="PRESET", help="preset, YAML file or run folder")
    command.add_argument("--data", metavar="DATA", help="folder, tar shards, parquet or hf:NAME")
    _add_text_encoder(command)
    command.add_argument(
        "--precision", choices=("auto", *DTYPES), help="of the encoder, if not that of the run"
    )
    add_device(command)
    _add_set(command)

    command = add_command(commands, "sample", sample, "make pictures with a trained model")
    command.add_argument("model", metavar="RUN", help=MODEL)
    command.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="may be repeated")
    command.add_argument("--negative", metavar="TEXT", help="what guidance leads away from")
    command.add_argument(
        "--class",
        dest="classes",
        action="append",
        metavar="NAME",
        help="name or number",
    )
    command.add_argument("-n", type=positive, default=1, help="pictures for each prompt or class")
    command.add_argument("--seed", type=int, default=0, help="picture i has seed SEED + i")
    origin = command.add_mutually_exclusive_group()
    add_base(origin)
    origin.add_argument(
        "--coarse",
        type=Path,
        metavar="PNG|DIR",
        help="enlarge these small pictures, of an upsampler",
    )
    command.add_argument(
        *("-o", "--out"),
        type=Path,
        metavar="PATH",
        help="a folder for all, or one file: .png, of videos also .mp4, .webp, .gif",
    )
    command.add_argument(
        "--clips",
        choices=CLIPS,
        help="how videos are written into a folder (webp, losslessly); png, a folder of frames for "
        "each, is for other programs: mdm reads no such videos",
    )
    command.add_argument("--fps", type=float, help="of videos: frames per second, if not the run's")
    _add_text_encoder(command)
    add_sampling(command)

    command = add_command(
        commands, "convert", convert, "turn a released checkpoint into a model folder"
    )
    command.add_argument("file", type=Path, metavar="FILE", help="vis_model_64x64.pth, ...")
    _add_model_folder(command)
    _add_text_encoder(command)

    command = add_command(commands, "export", export, "write a model for sharing, or for diffusers")
    command.add_argument("model", metavar="RUN", help=MODEL)
    _add_model_folder(command)
    command.add_argument(
        "--format", choices=FORMATS, default="mdm", help="for mdm (the default) or diffusers"
    )
    command.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (fp32)")
    _add_text_encoder(command)

    command = add_command(commands, "ema", ema, "make a model of averages of another length")
    command.add_argument("run_folder", type=Path, metavar="RUN", help="trained with ema_power")
    command.add_argument(
        "--length",
        type=float,
        required=True,
        metavar="SHARE",
        help="of the training that the average is over, such as 0.08",
    )
    _add_model_folder(command)

    command = add_command(commands, "grow", grow, "put a finer level around a trained model")
    command.add_argument("model", metavar="RUN", help=MODEL)
    finer = command.add_mutually_exclusive_group(required=True)
    finer.add_argument("--to", type=positive, metavar="SIDE", help="in pixels, or codes")
    finer.add_argument("--frames", type=positive, metavar="N", help="of clips, at the same side")
    command.add_argument("--data", metavar="DATA", help="to train on, if not what RUN was")
    command.add_argument("--out", type=Path, required=True, metavar="RUN", help="the new run")
    command.add_argument(
        "--freeze-coarse",
        type=natural,
        default=0,
        metavar="N",
        help="leave what is there alone for the first N images",
    )
    command.add_argument(
        "--ramp",
        type=natural,
        default=0,
        metavar="N",
        help="raise the new level's loss weight from 0 over the first N images",
    )
    _add_set(command)

    command = add_command(commands, "info", info, "show a preset or a model, level by level")
    command.add_argument("name", metavar="PRESET|RUN|FILE", help=f"preset, {MODEL}")
    _add_as(command)

    add_eval(commands)
    add_sweep(commands)

    command = add_command(commands, "plot", plot, "draw the curves of runs")
    command.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run folders")
    command.add_argument(
        *("-o", "--out"),
        type=Path,
        default=Path("plot.png"),
        metavar="FILE",
        help="the picture (plot.png)",
    )

    data = commands.add_parser("data", help="look at data before training")
    checks = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = add_command(checks, "check", data_check, "say what was understood of a data set")
    command.add_argument(
        "data", metavar="DATA", nargs="?", help="folder, tar shards, parquet files or hf:NAME"
    )
    command.add_argument("--preset", default="folder-64", help="whose data and side (folder-64)")
    command.add_argument("--sheet", type=Path, metavar="FILE.png", help="show 64 of the pictures")
    _add_set(command)

    command = add_command(commands, "demo", demo, "train openmoji and show what it learnt")
    command.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="RUN", help="its folder (runs/demo)"
    )
    add_device(command)
    _add_set(command)
    return parser


def _add_as(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--as",
        dest="as_",
        metavar="BASELINE",
        help="what the paper compares the preset with: simple, finest, base, upsampler, latent or "
        "codes",
    )


def _add_model_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        *("-o", "--out"), type=Path, required=True, metavar="DIR", help="the new model's folder"
    )


def _add_text_encoder(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--text-encoder", metavar="PATH", help="folder or hub id to take the text encoder from"
    )


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change path.to.key=value"
    )


# --- small things ------------------------------------------------------------------------------


def _own_folder(name: str) -> Path | None:
    """A run folder that is trained further needs no --out."""
    return Path(name) if (Path(name) / "config.yaml").is_file() else None


def _status(error: Exception) -> int:
    from matryoshka_diffusion.config import UsageError

    return 2 if isinstance(error, UsageError) else 1
