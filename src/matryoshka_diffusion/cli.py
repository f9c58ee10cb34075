"""The command `mdm`: parse, build, call. What happens is in the functions that it calls.

Everything heavy is imported by the command that needs it, so that `mdm --help` answers at once.
Exit status: 0 done, 1 failed, 2 asked for something that cannot be, 130 / 143 / 138 stopped
by Ctrl-C / SIGTERM / SIGUSR1 and saved.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

SAMPLERS = ("dpmpp-2m", "ddim", "ddpm")
GRIDS = ("trailing", "log-snr", "released")
THRESHOLDS = ("none", "clip", "dynamic")
PROTOCOLS = ("coco30k", "imagenet50k")
FORMATS = ("mdm", "diffusers")
DTYPES = ("fp32", "bf16")
CLIPS = ("webp", "mp4", "gif", "png")
PARALLEL = ("ddp", "fsdp")
RANK_TIMEOUT = 60
LOGS = ("tensorboard", "wandb")
PLAIN_SECONDS = 30.0
_MATCHED = 0.05
_MODEL = "run folder, model folder, released .pth or shipped model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = build_parser().parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = _show_warning
    try:
        options.run(options)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if options.debug:
            raise
        return _say(_one_line(error), _status(error))
    except Exception as error:
        code = getattr(error, "code", None)  # train.signals.Stopped, without importing torch
        if not isinstance(code, int):
            raise
        return _say(_one_line(error), code) if _leads() else code
    return 0


# --- the commands ------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> None:
    from matryoshka_diffusion import job
    from matryoshka_diffusion.baselines.codec_training import find_codec_run

    if (codec := find_codec_run(options.preset, options.data, options.set)) is not None:
        return _train_codec(codec, options)
    config = job.find_config(
        options.preset,
        options.data,
        options.set,
        options.init,
        options.lora,
        base=options.base,
        codec=options.codec,
    )
    if options.dry_run:
        return _plan(config, options.gpus, options.parallel)
    out = options.out or _own_folder(options.preset)
    if out is None:
        raise SystemExit(_say("mdm train: give the run's folder with --out", 2))
    if options.gpus > 1 and "RANK" not in os.environ:
        from matryoshka_diffusion.train.launch import launch

        raise SystemExit(launch(options.gpus, options.arguments))
    _train(config, out, options.device, options.log, options.parallel, options.rank_timeout)
    return None


def _train_codec(config: Any, options: argparse.Namespace) -> None:
    """Train an autoencoder, and say how well it does and what it is for."""
    from matryoshka_diffusion.baselines.codec_training import train_codec
    from matryoshka_diffusion.codec.folder import TRAINING
    from matryoshka_diffusion.config import UsageError

    plain = build_parser().parse_args(["train", options.preset])
    others = ("--init", "--base", "--lora", "--codec", "--dry-run", "--log", "--gpus", "--parallel")
    for name in (*others, "--rank-timeout"):
        key = name[2:].replace("-", "_")
        if getattr(options, key) != getattr(plain, key):
            raise UsageError(f"{name} is not for training a codec")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("WORLD_SIZE: a codec is trained by one process, without torchrun")
    begun = Path(options.preset)
    out = options.out or (begun if (begun / TRAINING).is_file() else None)
    if out is None:
        raise SystemExit(_say("mdm train: give the codec's folder with --out", 2))
    with _Bar("training a codec", " images", tell=True) as bar:
        codec = train_codec(config, out, _device(options.device), progress=bar)
    print(f"PSNR {codec.psnr:.2f} dB on {codec.measured_on}: {out / 'reconstructions.png'}")
    print(f"trained: {codec.folder}; mdm train {_on_codes(config)} --codec {out} --out RUN")


def _on_codes(config: Any) -> str:
    """The preset that is meant for a codec's codes, with its data."""
    from matryoshka_diffusion.presets import PRESETS

    name = f"{config.name.removesuffix('-codec')}-latent"
    return name if name in PRESETS else f"folder-64-latent --data {config.data.path}"


def _plan(config: Any, gpus: int, parallel: str) -> None:
    """Say what a run would be, and what its data looks like if it was named."""
    from matryoshka_diffusion import job
    from matryoshka_diffusion.data.check import summary
    from matryoshka_diffusion.info import describe_plan

    source = None
    if config.data.source != "folder" or config.data.path is not None:
        source = job.open_source(config.data, config.data_side)
        config = job.complete(config, source)
    pictures = None if source is None else len(source)
    gpus = gpus if gpus > 1 else 8  # of which most machines for this have so many
    print(describe_plan(config, pictures, gpus=gpus, shards=parallel == "fsdp"))
    if source is not None:
        print(summary(source))


def embed(options: argparse.Namespace) -> None:
    from matryoshka_diffusion import job
    from matryoshka_diffusion.text.plan import duration, size

    config = job.find_config(options.preset, options.data, options.set)
    texts, cache = job.captions_to_embed(
        config,
        _device(options.device),
        text_encoder=options.text_encoder,
        precision=options.precision,
    )
    plan = cache.plan(texts)
    print(plan.describe())
    plan.refuse_full_disk()
    if plan.missing:
        print(f"about {duration(cache.seconds(plan))}", flush=True)
    with _Bar("encoding", " captions", tell=True) as bar:
        cache.add(plan.missing, bar)
    stored = f"{len(cache.chunks):,} captions, {size(cache.chunks.bytes)}"
    print(f"{cache.folder}: features of {stored}; training with this encoder reads them")


def sample(options: argparse.Namespace) -> None:
    from matryoshka_diffusion import gallery
    from matryoshka_diffusion.baselines.load import open_model
    from matryoshka_diffusion.pipeline import Matryoshka

    enlarging = options.coarse is not None  # pictures of the user's own, so no base draws any
    once = f"converting {options.model}, once"
    with _Bar(once, "B", unit_scale=True, announce=True) as bar:
        model = (Matryoshka.load if enlarging else partial(open_model, base=options.base))(
            options.model,
            device=_device(options.device),
            precision=options.precision,
            text_encoder=options.text_encoder,
            progress=bar,
        )
    settings = _sampling(options)
    gallery.check(model, options.out, options.clips, settings)
    own = _own_pictures(options, model.config) if enlarging else {"n": options.n}
    with _Bar("sampling", " steps") as bar:
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
    out = options.out or gallery.default_folder(options.model, samples)
    print(gallery.told(samples, out, gallery.save(samples, out, options.clips)))


def _own_pictures(options: argparse.Namespace, config: Any) -> dict[str, Any]:
    """The small picture of --coarse for each sample, and how many samples a prompt has."""
    from matryoshka_diffusion.baselines.pictures import for_each, read_coarse
    from matryoshka_diffusion.config import UsageError

    if config.model.coarse is None:
        raise UsageError(f"--coarse: {config.name} is no upsampler")
    pictures = read_coarse(options.coarse, config.model.coarse.side, config.model.channels)
    named = options.prompt or options.classes
    asked = len(named) if named else max(config.model.classes, 1)  # none named: every class
    coarse, n = for_each(pictures, asked, options.n)
    return {"coarse": coarse, "n": n}


def grow(options: argparse.Namespace) -> None:
    from matryoshka_diffusion import job

    config = job.grow_run(
        options.model,
        partial(job.next_level, side=options.to)
        if options.frames is None
        else partial(job.next_frames, frames=options.frames),
        options.out,
        options.set,
        freeze_coarse=options.freeze_coarse,
        ramp=options.ramp,
    )
    sizes = ", ".join(level.size for level in config.model.levels)
    print(f"{options.out}: levels {sizes}; mdm train {options.out} trains them")


def info(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.info import describe, describe_released
    from matryoshka_diffusion.pipeline import read_config
    from matryoshka_diffusion.presets import preset

    path = Path(options.name)
    if path.is_file():
        print(describe_released(path))
    else:
        print(describe((read_config if path.exists() else preset)(options.name)))


def convert(options: argparse.Namespace) -> None:
    from matryoshka_diffusion import job

    with _Bar("converting", "B", unit_scale=True) as bar:
        config = job.convert_released(
            options.file, options.out, text_encoder=options.text_encoder, progress=bar
        )
    print(f"{options.out}: {config.name}; mdm sample {options.out} -p TEXT draws with it")


def export(options: argparse.Namespace) -> None:
    from matryoshka_diffusion import job

    if options.format == "diffusers":
        from matryoshka_diffusion.export import write_diffusers
        from matryoshka_diffusion.files import refuse_full
        from matryoshka_diffusion.pipeline import Matryoshka

        refuse_full(options.out)
        model = Matryoshka.load(options.model, text_encoder=options.text_encoder)
        write_diffusers(model, options.out)
        print(f"{options.out}: matryoshka_diffusion.MDMPipeline.from_pretrained loads it")
    else:
        config = job.export_model(options.model, options.out, options.dtype, options.text_encoder)
        print(f"{options.out}: {_drawing(options.out, config)} draws with it")


def ema(options: argparse.Namespace) -> None:
    from matryoshka_diffusion import job

    error = job.average_model(options.run_folder, options.length, options.out)
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
    from matryoshka_diffusion.plot import plot

    plot(options.runs, options.out)
    print(f"{options.out}: the curves of {', '.join(run.name for run in options.runs)}")


def evaluate(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.evaluation import results

    measured = _measure_model if options.other is None else _measure_pictures
    with _ranks(options) as (world, device), _Bars() as bars:
        found, folder = measured(options, world, device, bars)
        if not world.leads:
            return
    path = folder / results.FILE
    results.append(found, path)
    print(f"{results.report(found)}\n  in {path}")


def _measure_model(options: argparse.Namespace, world: Any, device: str, bars: _Bars) -> Any:
    """The numbers of a model, and the folder that they belong into."""
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.evaluation.run import evaluate as run

    if options.side is not None:
        raise UsageError("--side is of two sets of pictures: a model draws one side, leave it away")
    model = _model(options, device)
    how = _measuring(options, model, world, device, bars)
    return run(model, **how, **_sampling(options)), how["folder"]


def _measure_pictures(options: argparse.Namespace, world: Any, device: str, bars: _Bars) -> Any:
    """The numbers of two sets of pictures, and the folder that they belong into."""
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.evaluation.measures import parse_metrics
    from matryoshka_diffusion.evaluation.requests import compare
    from matryoshka_diffusion.evaluation.run import find_networks
    from matryoshka_diffusion.files import cache_folder

    of_models = ("n", "ref", "protocol", "captions", "seed", "base")
    given = [name for name in of_models if getattr(options, name) is not None]
    given += [*(["precision"] if options.precision != "fp32" else []), *_sampling(options)]
    if given:
        raise UsageError(
            f"{options.model} and {options.other} are pictures, compared as they are: leave "
            f"{', '.join(given)} away"
        )
    found = compare(
        options.model,
        options.other,
        parse_metrics(options.metrics or "fd").metrics,
        find_networks(device, options.inception, options.clip),
        side=options.side,
        world=world,
        progress=bars,
    )
    return found, cache_folder("eval")


def sweep(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.evaluation import sweep as sweeping
    from matryoshka_diffusion.evaluation.requests import sweep_folder
    from matryoshka_diffusion.evaluation.run import evaluate as run
    from matryoshka_diffusion.evaluation.sweep_plot import draw
    from matryoshka_diffusion.files import require

    axes = _axes(options)
    if not axes:
        raise UsageError("name what to try: --cfg, --steps, --sampler, --ema or --coarse-noise")
    require("matplotlib", "plots", "the picture of mdm sweep")  # now, not after hours
    with _ranks(options) as (world, device), _Bars() as bars:
        usual = _model(options, device)
        how = _measuring(options, usual, world, device, bars)

        def open_model(length: float | None) -> Any:
            run_folder, precision = Path(options.model), options.precision
            if length is None:
                return usual
            return sweeping.averaged(run_folder, length, usual, device=device, precision=precision)

        points = sweeping.sweep(
            open_model,
            axes,
            lambda model, settings: run(model, **how, **(_sampling(options) | settings)),
            progress=_say_points,
        )
        if not world.leads:
            return
    out = options.out or sweep_folder(options.model)
    sweeping.write(points, out / "sweep.json")
    draw(points, out / "sweep.png")
    print(sweeping.table(points))
    print(f"{out / 'sweep.json'}, {out / 'sweep.png'}")
    fixed = _sampling(options) | {"precision": options.precision, "base": options.base}
    given = {name: value for name, value in fixed.items() if value not in (None, "fp32")}
    print(f"best:\n{sweeping.command(options.model, sweeping.best(points), given)}")


def _say_points(done: int, total: int) -> None:
    if _leads():
        _say(f"{done} of {total} combinations", 0)


def _axes(options: argparse.Namespace) -> dict[str, Sequence[Any]]:
    """The values to try, by the names of the settings; those that were named only."""
    numbers = {
        "ema": options.ema,
        "guidance": options.cfgs,
        "steps": options.step_counts,
        "coarse_noise": options.coarse_noises,
    }
    axes = {"sampler": options.samplers, **numbers}
    return {name: values for name, values in axes.items() if values}


def _model(options: argparse.Namespace, device: str) -> Any:
    from matryoshka_diffusion.baselines.load import open_model

    return open_model(options.model, device=device, precision=options.precision, base=options.base)


def _measuring(
    options: argparse.Namespace, model: Any, world: Any, device: str, bars: _Bars
) -> dict[str, Any]:
    """The arguments of `evaluate` but for the sampler's settings."""
    from matryoshka_diffusion.eval.retrieval import SEED
    from matryoshka_diffusion.evaluation.requests import request, results_folder
    from matryoshka_diffusion.evaluation.run import find_networks

    with world.first_here("data"):  # what one rank of a machine decodes, the others find
        asked = request(
            model.config,
            model.picture_side,
            metrics=options.metrics,
            n=options.n,
            protocol=options.protocol,
            captions=options.captions,
            reference=options.ref,
        )
    return {
        **asked._asdict(),
        "networks": find_networks(device, options.inception, options.clip),
        "folder": results_folder(options.model),
        "seed": SEED if options.seed is None else options.seed,
        "batch_size": options.batch_size,
        "world": world,
        "progress": bars,
    }


@contextmanager
def _ranks(options: argparse.Namespace) -> Iterator[tuple[Any, str]]:
    """The ranks that this process is one of, and its device."""
    import torch

    from matryoshka_diffusion.train.world import joined, rank_device

    device = rank_device(_device(options.device))
    with joined(torch.device(device), "ddp", RANK_TIMEOUT) as world:
        yield world, device


def data_check(options: argparse.Namespace) -> None:
    from matryoshka_diffusion import job
    from matryoshka_diffusion.data.bad import NoneUsable
    from matryoshka_diffusion.data.check import contact_sheet, describe, describe_bad
    from matryoshka_diffusion.sheet import save_png

    allowed = job.find_config(options.preset, options.data, options.set).data.max_bad_fraction
    everything = [*options.set, "data.max_bad_fraction=1.0"]
    config = job.find_config(options.preset, options.data, everything)
    try:
        source = job.open_source(config.data, config.data_side)
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
    from matryoshka_diffusion import gallery, job, measure
    from matryoshka_diffusion.pipeline import Matryoshka

    device = _device(options.device)
    config = job.find_config("openmoji", None, options.set)
    finished = _train(config, options.out, device)
    model = Matryoshka.load(finished, device=device)
    source = job.open_source(model.config.data, model.picture_side)
    with _Bar("24 prompts", " steps") as bar:
        page = measure.sheet(model, source, progress=bar)
    path = gallery.save_page(page, options.out / "sheet.png", model.config.name)
    with _Bar("prompt retrieval", " steps") as bar:
        print(measure.retrieval(model, source, progress=bar))
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

    from matryoshka_diffusion import job
    from matryoshka_diffusion.baselines.load import keep_base
    from matryoshka_diffusion.data.check import summary
    from matryoshka_diffusion.hooks import Preview, preview_of
    from matryoshka_diffusion.train.ranks import compare_data
    from matryoshka_diffusion.train.run_folder import refuse_foreign
    from matryoshka_diffusion.train.sinks import find_sink
    from matryoshka_diffusion.train.trainer import train as run
    from matryoshka_diffusion.train.world import joined, rank_device
    from matryoshka_diffusion.watch import HeldOutLoss

    sinks = [find_sink(name) for name in dict.fromkeys(logs)]
    device = rank_device(_device(device))
    with joined(torch.device(device), parallel, rank_timeout) as world:
        world.once(lambda: refuse_foreign(out))
        # What rank 0 downloads, decodes and encodes, the others find in the cache.
        with (
            world.first_here("data"),
            _Bar("encoding", " captions", tell=True) as bar,
            _Bar("encoding", " pictures", tell=True) as coding,
        ):
            config = keep_base(config, out)
            ready = job.prepare(config, device, progress=bar, coding=coding)
        compare_data(world, ready.source.keys)
        world.once(lambda: job.warm_start(ready.config, out))
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
            if ready.text:
                print(ready.text)
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
        raise SystemExit(_say(f"{self.prog}: {message} (see {self.prog} --help)", 2))


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = _Parser(prog="mdm", description="Matryoshka Diffusion Models: train, sample, grow.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = _add(commands, "train", train, "train a preset, or continue a run")
    command.add_argument(
        "preset", metavar="PRESET", help="preset, YAML file, run folder, or model to tune"
    )
    command.add_argument("--data", metavar="DATA", help="folder, tar shards, parquet or hf:NAME")
    command.add_argument("--out", type=Path, metavar="RUN", help="the run's folder")
    command.add_argument("--init", metavar="MODEL", help="start from the weights of this model")
    _add_base(command)
    command.add_argument(
        "--lora", type=_positive, metavar="RANK", help="train only adapters of this rank around it"
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
        "--gpus", type=_positive, default=1, metavar="N", help="train on N GPUs of this machine (1)"
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
        type=_positive,
        default=RANK_TIMEOUT,
        metavar="SECONDS",
        help=f"a rank that is silent for so long is dead ({RANK_TIMEOUT})",
    )
    command.add_argument(
        "--log", choices=LOGS, action="append", default=[], help="tell these, too (extras)"
    )
    _add_device(command)
    _add_set(command)

    command = _add(commands, "embed", embed, "store the text features of a data set's captions")
    command.add_argument("preset", metavar="PRESET", help="preset, YAML file or run folder")
    command.add_argument("--data", metavar="DATA", help="folder, tar shards, parquet or hf:NAME")
    _add_text_encoder(command)
    command.add_argument(
        "--precision", choices=("auto", *DTYPES), help="of the encoder, if not that of the run"
    )
    _add_device(command)
    _add_set(command)

    command = _add(commands, "sample", sample, "make pictures with a trained model")
    command.add_argument("model", metavar="RUN", help=_MODEL)
    command.add_argument("-p", "--prompt", action="append", metavar="TEXT", help="may be repeated")
    command.add_argument("--negative", metavar="TEXT", help="what guidance leads away from")
    command.add_argument(
        "--class",
        dest="classes",
        action="append",
        metavar="NAME",
        help="name or number",
    )
    command.add_argument("-n", type=_positive, default=1, help="pictures for each prompt or class")
    command.add_argument("--seed", type=int, default=0, help="picture i has seed SEED + i")
    origin = command.add_mutually_exclusive_group()
    _add_base(origin)
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
        "--clips", choices=CLIPS, help="how videos are written into a folder (webp, losslessly)"
    )
    command.add_argument("--fps", type=float, help="of videos: frames per second, if not the run's")
    _add_text_encoder(command)
    _add_sampling(command)

    command = _add(commands, "convert", convert, "turn a released checkpoint into a model folder")
    command.add_argument("file", type=Path, metavar="FILE", help="vis_model_64x64.pth, ...")
    _add_model_folder(command)
    _add_text_encoder(command)

    command = _add(commands, "export", export, "write a model for sharing, or for diffusers")
    command.add_argument("model", metavar="RUN", help=_MODEL)
    _add_model_folder(command)
    command.add_argument(
        "--format", choices=FORMATS, default="mdm", help="for mdm (the default) or diffusers"
    )
    command.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (fp32)")
    _add_text_encoder(command)

    command = _add(commands, "ema", ema, "make a model of averages of another length")
    command.add_argument("run_folder", type=Path, metavar="RUN", help="trained with ema_power")
    command.add_argument(
        "--length",
        type=float,
        required=True,
        metavar="SHARE",
        help="of the training that the average is over, such as 0.08",
    )
    _add_model_folder(command)

    command = _add(commands, "grow", grow, "put a finer level around a trained model")
    command.add_argument("model", metavar="RUN", help=_MODEL)
    finer = command.add_mutually_exclusive_group(required=True)
    finer.add_argument("--to", type=_positive, metavar="SIDE", help="in pixels, or codes")
    finer.add_argument("--frames", type=_positive, metavar="N", help="of clips, at the same side")
    command.add_argument("--out", type=Path, required=True, metavar="RUN", help="the new run")
    command.add_argument(
        "--freeze-coarse",
        type=_natural,
        default=0,
        metavar="N",
        help="leave what is there alone for the first N images",
    )
    command.add_argument(
        "--ramp",
        type=_natural,
        default=0,
        metavar="N",
        help="raise the new level's loss weight from 0 over the first N images",
    )
    _add_set(command)

    command = _add(commands, "info", info, "show a preset or a model, level by level")
    command.add_argument("name", metavar="PRESET|RUN|FILE", help=f"preset, {_MODEL}")

    command = _add(commands, "eval", evaluate, "measure a model, or one set of pictures by another")
    command.add_argument("model", metavar="RUN|DATA", help=f"{_MODEL}, or pictures")
    command.add_argument("other", metavar="DATA", nargs="?", help="the pictures to compare with")
    command.add_argument("--side", type=_positive, metavar="N", help="of pictures, in pixels")
    _add_measuring(command)
    _add_sampling(command)

    command = _add(commands, "sweep", sweep, "try sampling settings and say which are best")
    command.add_argument("model", metavar="RUN", help=_MODEL)
    lists = "a list, or FIRST:LAST:STEP"
    command.add_argument(
        "--cfg", dest="cfgs", type=_numbers, metavar="LIST", help=f"guidance weights: {lists}"
    )
    command.add_argument(
        "--steps", dest="step_counts", type=_counts, metavar="LIST", help=f"of the sampler: {lists}"
    )
    command.add_argument(
        "--sampler", dest="samplers", type=_samplers, metavar="LIST", help=", ".join(SAMPLERS)
    )
    command.add_argument(
        "--ema", type=_numbers, metavar="LIST", help=f"lengths of averages, as in mdm ema: {lists}"
    )
    command.add_argument(
        "--coarse-noise",
        dest="coarse_noises",
        type=_numbers,
        metavar="LIST",
        help=f"on the coarse picture of a cascade: {lists}",
    )
    command.add_argument(
        *("-o", "--out"), type=Path, metavar="DIR", help="for sweep.json and sweep.png (RUN/sweep)"
    )
    _add_measuring(command)
    _add_sampling(command, swept=True)

    command = _add(commands, "plot", plot, "draw the curves of runs")
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
    command = _add(checks, "check", data_check, "say what was understood of a data set")
    command.add_argument(
        "data", metavar="DATA", nargs="?", help="folder, tar shards, parquet files or hf:NAME"
    )
    command.add_argument("--preset", default="folder-64", help="whose data and side (folder-64)")
    command.add_argument("--sheet", type=Path, metavar="FILE.png", help="show 64 of the pictures")
    _add_set(command)

    command = _add(commands, "demo", demo, "train openmoji and show what it learnt")
    command.add_argument(
        "--out", type=Path, default=Path("runs/demo"), metavar="RUN", help="its folder (runs/demo)"
    )
    _add_device(command)
    _add_set(command)
    return parser


def _add(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def _add_model_folder(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        *("-o", "--out"), type=Path, required=True, metavar="DIR", help="the new model's folder"
    )


def _add_text_encoder(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--text-encoder", metavar="PATH", help="folder or hub id to take the text encoder from"
    )


def _add_base(command: Any) -> None:
    command.add_argument(
        "--base", metavar="RUN", help="of an upsampler: the model that draws what it enlarges"
    )


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change path.to.key=value"
    )


def _add_measuring(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--metrics",
        metavar="LIST",
        help="fd, fid, fid50k, kid, is, prdc, clip, cmmd, retrieval, agreement, kd, prdc-fd",
    )
    command.add_argument("-n", type=_positive, help="how many samples")
    command.add_argument(
        "--ref",
        metavar="DATA",
        help="pictures to compare with, or an .npz of ADM, or held-out (the training pictures)",
    )
    command.add_argument("--protocol", choices=PROTOCOLS, help="a published way of measuring")
    command.add_argument("--captions", type=Path, metavar="FILE", help=".json of COCO, or a list")
    _add_base(command)
    command.add_argument("--inception", type=Path, metavar="FILE", help="weights for FID, KID, IS")
    command.add_argument("--clip", type=Path, metavar="PATH", help="folder of transformers")
    command.add_argument("--seed", type=int, help="of sample 0 (1000000)")


def _add_sampling(command: argparse.ArgumentParser, *, swept: bool = False) -> None:
    """Everything that samples depend on; what is swept has options of its own."""
    _add_device(command)
    if not swept:
        _add_sampler(command)
    command.add_argument(
        "--interval",
        dest="guidance_interval",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="guide only between these log-SNRs",
    )
    command.add_argument("--rescale", type=float, metavar="SHARE", help="of guidance, 0 to 1")
    command.add_argument("--eta", type=float, help="of ddim: 0 deterministic, 1 as noisy as ddpm")
    command.add_argument("--grid", choices=GRIDS, help="times that the sampler visits")
    command.add_argument(
        "--threshold", choices=THRESHOLDS, help="what keeps estimates in the range of pixels"
    )
    command.add_argument(
        "--batch-size", type=_positive, default=64, metavar="N", help="pictures at a time (64)"
    )
    command.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the network (fp32)"
    )


def _add_sampler(command: argparse.ArgumentParser) -> None:
    command.add_argument("--sampler", choices=SAMPLERS, help="if not that of the model's config")
    command.add_argument(
        "--steps", type=_positive, metavar="N", help="of the sampler, if not those of the config"
    )
    command.add_argument("--cfg", type=float, dest="guidance", metavar="W", help="guidance weight")
    command.add_argument(
        "--coarse-noise",
        type=float,
        metavar="T",
        help="of an upsampler: time, 0 to 1, of the noise on the picture that it enlarges",
    )


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that were given."""
    names = (
        *("sampler", "steps", "grid", "threshold", "eta"),
        *("guidance", "guidance_interval", "rescale", "coarse_noise", "fps"),
    )
    return {n: value for n in names if (value := getattr(options, n, None)) is not None}


def _positive(text: str) -> int:
    return _whole(text, 1, "above 0")


def _natural(text: str) -> int:
    return _whole(text, 0, "from 0 on")


def _numbers(text: str) -> tuple[float, ...]:
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.evaluation.grid import parse_numbers

    try:
        return parse_numbers(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_positive(f"{number:g}") for number in _numbers(text))


def _samplers(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in SAMPLERS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(SAMPLERS)}")
    return names


def _whole(text: str, least: int, which: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {which}")
    return value


# --- small things ------------------------------------------------------------------------------


class _Bar:
    """A progress bar as a callable for (done, total).

    Where there is no terminal to draw it on: with `announce` one line at first, with `tell` one
    line now and then.
    """

    def __init__(
        self, what: str, unit: str, *, announce: bool = False, tell: bool = False, **options: Any
    ) -> None:
        self._announce, self._tell = announce, tell
        self._began = self._told = time.monotonic()
        self._options = {"desc": what, "unit": unit, "leave": False, **options}
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:  # it appears with the first step, if there is one
            from tqdm import tqdm

            shown = sys.stderr.isatty()
            if self._announce and not shown:
                _say(self._options["desc"], 0)
            self._bar = tqdm(total=total, disable=not shown, **self._options)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if self._tell and self._bar.disable:
            self._say_now_and_then(done, total)

    def _say_now_and_then(self, done: int, total: int) -> None:
        from matryoshka_diffusion.text.plan import duration

        now = time.monotonic()
        if now - self._told >= PLAIN_SECONDS:
            self._told, rate = now, done / (now - self._began)
            what, unit = self._options["desc"], self._options["unit"].strip()
            left = duration((total - done) / rate)
            _say(f"{what}: {done:,} of {total:,}, {rate:.3g} {unit}/s, {left} left", 0)


class _Bars:
    """Bars one after the other, as a callable for (what is being done, done, total)."""

    def __init__(self) -> None:
        self._what, self._done, self._bar = "", 0, _Bar("", "")

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what or done < self._done:
            self._bar.__exit__()
            self._what, self._bar = what, _Bar(what, " pictures", tell=True)
        self._done = done
        if _leads():
            self._bar(done, total)


def _device(name: str) -> str:
    import torch

    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise SystemExit(_say(f"--device {name}: {_one_line(error)}", 2)) from error
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _leads() -> bool:
    """Whether this process speaks for all: it is alone, or rank 0 of several."""
    return os.environ.get("RANK", "0") == "0"


def _own_folder(name: str) -> Path | None:
    """A run folder that is trained further needs no --out."""
    return Path(name) if (Path(name) / "config.yaml").is_file() else None


def _status(error: Exception) -> int:
    from matryoshka_diffusion.config import UsageError

    return 2 if isinstance(error, UsageError) else 1


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _say(f"warning: {_one_line(message)}", 0)


def _one_line(error: object) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        error = error.strerror  # our own, without the number before it
    return " ".join(str(error).split()) or type(error).__name__


def _say(text: str, status: int) -> int:
    """One line on stderr; returns the status."""
    text = text if text.startswith("mdm") else f"mdm: {text}"
    if not _leads():
        text = text.replace("mdm: ", f"mdm: rank {os.environ['RANK']}: ", 1)
    if "tqdm" in sys.modules:  # a bar may be on the screen
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
