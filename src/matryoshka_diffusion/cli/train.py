"""Commands around training: train, embed, data check, demo."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matryoshka_diffusion.cli.begin import lengthened, proposed
from matryoshka_diffusion.cli.models import sampling_command
from matryoshka_diffusion.cli.options import (
    DATA,
    DTYPES,
    RANK_TIMEOUT,
    add_command,
    add_shared,
    find_device,
    positive,
    refuse_unknown_names,
)
from matryoshka_diffusion.cli.terminal import Bar, leads, show

PARALLEL = ("ddp", "fsdp")
LOGS = ("tensorboard", "wandb")
_DIFFUSION_OPTIONS = (
    "as_",
    "init",
    "base",
    "lora",
    "codec",
    "dry_run",
    "log",
    "gpus",
    "parallel",
    "more",
)


def train(options: argparse.Namespace) -> None:
    if options.preset is None:
        if (preset := proposed(options)) is None:
            return None
        options.preset, options.arguments = preset, ["train", preset, *options.arguments[1:]]
    refuse_unknown_names(options)
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.runs import prepare

    if (codec := prepare.find_codec_run(options.preset, options.data, options.set)) is not None:
        return _train_codec(codec, options)
    _refuse_missing_gpus(options)
    config = prepare.find_config(
        options.preset,
        options.data,
        options.set,
        options.init,
        options.lora,
        as_=options.as_,
        base=options.base,
        codec=options.codec,
    )
    if options.more is not None:
        config = lengthened(config, options)
    if options.dry_run:
        return _plan(config, options.gpus, options.parallel)
    begun = Path(options.preset)
    out = options.out or (begun if (begun / "config.yaml").is_file() else None)
    if out is None:
        raise UsageError("mdm train: give the run's folder with --out")
    if (options.gpus or 1) > 1 and "RANK" not in os.environ:
        from matryoshka_diffusion.training.distributed import launch

        raise SystemExit(launch(options.gpus, options.arguments))
    timeout = options.rank_timeout or RANK_TIMEOUT
    _train(
        config,
        out,
        options.device,
        options.log,
        options.parallel or "ddp",
        timeout,
        data_changed=options.data_changed,
    )
    return None


def _refuse_missing_gpus(options: argparse.Namespace) -> None:
    """Raise UsageError if --gpus is more than torch finds on this machine, unless for a plan."""
    gpus = options.gpus or 1
    if gpus == 1 or options.dry_run or options.device == "cpu":
        return
    import torch

    from matryoshka_diffusion.config import UsageError

    if gpus > (there := torch.cuda.device_count()):
        raise UsageError(
            f"--gpus {gpus}: torch finds {there} on this machine: give --gpus {max(there, 1)}, or "
            "--device cpu for processes without a GPU"
        )


def _train_codec(config: Any, options: argparse.Namespace) -> None:
    """Train an autoencoder; print its error and the command that uses it."""
    from matryoshka_diffusion.codec import TRAINING
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.presets import PRESETS
    from matryoshka_diffusion.runs.train_autoencoder import train_codec

    for name in (*_DIFFUSION_OPTIONS, "rank_timeout"):
        if getattr(options, name):
            option = name.rstrip("_").replace("_", "-")
            raise UsageError(f"--{option} is not for a codec: omit it")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("WORLD_SIZE: a codec trains in one process, without torchrun")
    begun = Path(options.preset)
    out = options.out or (begun if (begun / TRAINING).is_file() else None)
    if out is None:
        raise UsageError("mdm train: give the codec's folder with --out")
    changed = options.data_changed
    codec = train_codec(config, out, find_device(options.device), data_changed=changed)
    preset = config.name.removesuffix("-codec")
    preset = preset if preset in PRESETS else f"folder-64 --data {config.data.path}"
    show(f"PSNR {codec.psnr:.2f} dB on {codec.measured_on}: {out / 'reconstructions.png'}")
    show(f"trained: {codec.folder}; mdm train {preset} --as latent --codec {out} --out RUN")


def _plan(config: Any, gpus: int | None, parallel: str | None) -> None:
    """Print what a run would take, and a summary of its data if the config names any."""
    from matryoshka_diffusion.cli.info import describe
    from matryoshka_diffusion.cli.plan import describe_plan
    from matryoshka_diffusion.data.check import summary
    from matryoshka_diffusion.data.source import PACKAGED
    from matryoshka_diffusion.runs import prepare

    source = None
    if config.data.path is not None or config.data.mix or config.data.source in PACKAGED:
        source = prepare.open_data(config)
        config = prepare.complete(config, source)
    gpus = gpus if gpus and gpus > 1 else 8  # as many as most machines for this have
    show(describe(config))
    show(describe_plan(config, source, gpus=gpus, shards=parallel == "fsdp"))
    if source is not None:
        show(summary(source))


def _train(
    config: Any,
    out: Path,
    device: str,
    logs: Sequence[str] = (),
    parallel: Any = "ddp",
    rank_timeout: int = RANK_TIMEOUT,
    *,
    data_changed: bool = False,
) -> Path:
    """Train with previews, as one of the ranks; returns the finished model's folder."""
    from matryoshka_diffusion.runs.run import run_training

    with Bar("encoding", " captions") as captions, Bar("encoding") as codes:
        finished = run_training(
            config,
            out,
            find_device(device),
            logs,
            parallel,
            rank_timeout,
            data_changed=data_changed,
            captions=captions,
            codes=codes,
            tell=show,
        )
    if leads():
        previews = out / "previews"
        with_previews = f", with previews in {previews}" if previews.is_dir() else ""
        command = sampling_command(out, config)
        show(f"trained: {finished}{with_previews}; draw with {command}")
    return finished


def embed(options: argparse.Namespace) -> None:
    refuse_unknown_names(options)
    from matryoshka_diffusion.runs import prepare

    config = prepare.find_config(options.preset, options.data, options.set)
    texts, cache = prepare.captions_to_embed(
        config,
        find_device(options.device),
        text_encoder=options.text_encoder,
        precision=options.precision,
    )
    estimate, free = cache.estimate(texts), shutil.disk_usage(cache.folder).free
    stored = estimate.captions - len(estimate.missing)
    show(f"{estimate.captions:,} different captions, {stored:,} of them stored already")
    if estimate.missing:
        cut = f" ({estimate.cut:.1%} of them are cut)" if estimate.cut else ""
        size, room = f"{estimate.needed / 1e6:,.1f} MB", f"{free / 1e6:,.0f} MB"
        show(f"about {estimate.tokens:.1f} tokens each{cut}: {size} to write to")
        show(f"{cache.folder} ({room} free)")
        if estimate.needed > free:
            raise OSError(
                errno.ENOSPC,
                f"the features do not fit into {cache.folder}: about {estimate.needed:,} bytes "
                f"needed, {free:,} bytes free; set MDM_CACHE to a folder on a larger disk",
            )
        show(f"about {cache.seconds(estimate.missing) / 60:,.1f} minutes")
    with Bar("encoding", " captions") as bar:
        cache.add(estimate.missing, bar)
    count, size = len(cache.store), cache.store.bytes / 1e6
    show(
        f"{cache.folder}: features of {count:,} captions, {size:,.1f} MB; training with this "
        "encoder reads them"
    )


def data_check(options: argparse.Namespace) -> None:
    refuse_unknown_names(options)
    from matryoshka_diffusion.data.bad import NoneUsable
    from matryoshka_diffusion.data.check import contact_sheet, describe, describe_bad, refuse_lost
    from matryoshka_diffusion.draw.grid import save_png
    from matryoshka_diffusion.runs import prepare

    allowed = prepare.find_config(options.preset, options.data, options.set).data.max_bad_fraction
    everything = [*options.set, "data.max_bad_fraction=1.0"]
    config = prepare.find_config(options.preset, options.data, everything)
    try:
        source = prepare.open_data(config)
        show(describe(source))
    except NoneUsable as error:
        if error.bad:
            show(describe_bad(error.bad))
        raise
    if options.sheet is not None:
        save_png(contact_sheet(source), options.sheet, None)
        show(f"contact sheet: {options.sheet}")
    refuse_lost(source, config.data)
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
    from matryoshka_diffusion.runs import prepare

    device = find_device(options.device)
    config = prepare.find_config("openmoji", None, options.set)
    finished = _train(config, options.out, device)
    model = Matryoshka.load(finished, device=device)
    source = prepare.open_data(model.config)
    with Bar("24 prompts", " steps") as bar:
        page = demo_sheet(model, source, progress=bar)
    path = options.out / "sheet.png"
    save_png(page, path, {"model": model.config.name})
    with Bar() as bar:
        folder = options.out / "eval"
        metrics = "retrieval-512,retrieval-one-step"
        results = evaluate(model, metrics, source=source, folder=folder, progress=bar)
    show("\n".join(result.sentence() for result in results))
    show(f"24 prompts at every level, beside the real images: {path}")


def add_commands(commands: Any) -> None:
    """Add the commands of this module to the parser."""
    command = add_command(commands, "train", train, "train a preset, or continue a run")
    add = command.add_argument
    text = "preset, YAML file, run folder, or model to tune (proposed for --data)"
    add("preset", metavar="PRESET", nargs="?", help=text)
    add_shared(command, "--as", "--data")
    text = "train the finished run PRESET on for so many images"
    add("--more", type=positive, metavar="IMAGES", help=text)
    add("--out", type=Path, metavar="RUN", help="the run's folder")
    add("--init", metavar="MODEL", help="start from the weights of this model")
    add_shared(command, "--base")
    text = "train only adapters of this rank around it"
    add("--lora", type=positive, metavar="RANK", help=text)
    text = "train on latents of this autoencoder (diffusers' AutoencoderKL)"
    add("--codec", metavar="PATH", help=text)
    text = "go on although the data of the run is not what it was"
    add("--data-changed", action="store_true", help=text)
    add("--dry-run", action="store_true", help="print what training would take, and stop")
    add("--gpus", type=positive, metavar="N", help="train on N GPUs of this machine (1)")
    text = "copies of the network on several GPUs (ddp), or shares of it, in less memory (fsdp)"
    add("--parallel", choices=PARALLEL, help=text)
    text = f"a rank that is silent for so long is dead ({RANK_TIMEOUT})"
    add("--rank-timeout", type=positive, metavar="SECONDS", help=text)
    add("--log", choices=LOGS, action="append", default=[], help="log there, too (extras)")
    add_shared(command, "--device", "--set")

    text = "store the text features of a data set's captions"
    command = add_command(commands, "embed", embed, text)
    add = command.add_argument
    add("preset", metavar="PRESET", help="preset, YAML file or run folder")
    add_shared(command, "--data", "--text-encoder")
    add("--precision", choices=("auto", *DTYPES), help="of the encoder (the run's)")
    add_shared(command, "--device", "--set")

    data = commands.add_parser("data", help="look at data before training")
    checks = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = add_command(checks, "check", data_check, "describe a data set as training reads it")
    add = command.add_argument
    add("data", metavar="DATA", nargs="?", help=DATA)
    add("--preset", default="folder-64", help="preset whose data and side are meant (folder-64)")
    add("--sheet", type=Path, metavar="FILE.png", help="draw 64 of the images or clips")
    add_shared(command, "--set")

    command = add_command(commands, "demo", demo, "train openmoji and show what it has learnt")
    folder = {"type": Path, "default": Path("runs/demo"), "metavar": "RUN"}
    command.add_argument("--out", **folder, help="its folder (runs/demo)")
    add_shared(command, "--device", "--set")
