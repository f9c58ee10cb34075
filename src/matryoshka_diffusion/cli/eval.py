"""The commands `mdm eval` and `mdm sweep`: models and pictures measured, settings tried."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matryoshka_diffusion.cli.options import (
    MODEL,
    PRECISION,
    RANK_TIMEOUT,
    SAMPLERS,
    add_base,
    add_command,
    add_sampling,
    find_device,
    positive,
    refuse_idle,
    sampling,
)
from matryoshka_diffusion.cli.terminal import Bars, leads, say

PROTOCOLS = ("coco30k", "imagenet50k")


def evaluate(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.eval import results

    measured = _measure_model if options.other is None else _measure_pictures
    with _ranks(options) as (world, device), Bars() as bars:
        found, folder = measured(options, world, device, bars)
        if not world.leads:
            return
    path = folder / results.FILE
    results.append(found, path)
    print(f"{results.report(found)}\n  in {path}")


def _measure_model(options: argparse.Namespace, world: Any, device: str, bars: Bars) -> Any:
    """The numbers of a model, and the folder that they belong into."""
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.eval.run import evaluate as run

    of_sets = {"--side": options.side, "--frames": options.frames, "--frame-stride": options.stride}
    for name, value in of_sets.items():
        if value is not None:
            raise UsageError(f"{name} is of two sets: what a model draws is known, leave it away")
    model, settings = _model(options, device), sampling(options)
    refuse_idle(model, settings)
    how = _measuring(options, model, world, device, bars)
    return run(model, **how, **settings), how["folder"]


def _measure_pictures(options: argparse.Namespace, world: Any, device: str, bars: Bars) -> Any:
    """The numbers of two sets of pictures, and the folder that they belong into."""
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.eval.measures import parse_metrics
    from matryoshka_diffusion.eval.requests import compare
    from matryoshka_diffusion.eval.run import find_networks
    from matryoshka_diffusion.eval.sweep import OPTIONS
    from matryoshka_diffusion.files import cache_folder

    unnamed = dict.fromkeys(("n", "ref", "protocol", "captions", "seed", "base"))
    of_models = {**unnamed, "precision": PRECISION, "batch_size": None}
    given = [name for name, usual in of_models.items() if getattr(options, name) != usual]
    given += sampling(options)
    if given:
        names = {"n": "-n", **OPTIONS}
        typed = [names.get(name, f"--{name.replace('_', '-')}") for name in given]
        raise UsageError(
            f"{options.model} and {options.other} are pictures, compared as they are: leave "
            f"{', '.join(typed)} away"
        )
    metrics, n = parse_metrics(options.metrics or "fd")
    if n is not None:
        raise UsageError(
            f"--metrics {options.metrics}: two sets are compared whole, so leave the number of "
            f"samples away (--metrics {','.join(metrics)})"
        )
    _refuse_unlooked(options, metrics)
    found = compare(
        options.model,
        options.other,
        metrics,
        find_networks(device, options.inception, options.clip, options.fvd, options.frames),
        side=options.side,
        frames=options.frames,
        frame_stride=options.stride,
        world=world,
        progress=bars,
    )
    return found, cache_folder("eval")


def sweep(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.eval import sweep as sweeping
    from matryoshka_diffusion.eval.requests import sweep_folder
    from matryoshka_diffusion.eval.run import evaluate as run
    from matryoshka_diffusion.eval.sweep_plot import draw
    from matryoshka_diffusion.files import require

    axes = _axes(options)
    if not axes:
        raise UsageError("name what to try: --cfg, --steps, --sampler, --ema or --coarse-noise")
    require("matplotlib", "plots", "the picture of mdm sweep")  # now, not after hours
    with _ranks(options) as (world, device), Bars() as bars:
        usual, fixed = _model(options, device), sampling(options)
        refuse_idle(usual, *(fixed | one for one in sweeping.combinations(axes)))
        how = _measuring(options, usual, world, device, bars)

        def open_model(length: float | None) -> Any:
            run_folder, precision = Path(options.model), options.precision
            if length is None:
                return usual
            return sweeping.averaged(run_folder, length, usual, device=device, precision=precision)

        points = sweeping.sweep(
            open_model,
            axes,
            lambda model, settings: run(model, **how, **settings),
            fixed=fixed,
            progress=_say_points,
        )
        if not world.leads:
            return
    out = options.out or sweep_folder(options.model)
    sweeping.write(points, out / "sweep.json")
    draw(points, out / "sweep.png")
    print(sweeping.table(points))
    print(f"{out / 'sweep.json'}, {out / 'sweep.png'}")
    best = sweeping.best(points)
    idle = usual.idle(fixed | best.settings)  # which mdm sample would refuse
    opened = {"precision": options.precision, "base": options.base}
    given = {
        name: value
        for name, value in (fixed | opened).items()
        if value not in (None, PRECISION) and name not in idle
    }
    print(f"best:\n{sweeping.command(options.model, best, given)}")


def _say_points(done: int, total: int) -> None:
    if leads():
        say(f"{done} of {total} combinations", 0)


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
    from matryoshka_diffusion.cascade import open_model

    return open_model(options.model, device=device, precision=options.precision, base=options.base)


def _measuring(
    options: argparse.Namespace, model: Any, world: Any, device: str, bars: Bars
) -> dict[str, Any]:
    """The arguments of `evaluate` but for the sampler's settings."""
    from matryoshka_diffusion.eval.requests import request, results_folder
    from matryoshka_diffusion.eval.run import find_networks
    from matryoshka_diffusion.metrics.retrieval import SEED

    frames = model.resolutions[-1].frames
    networks = find_networks(device, options.inception, options.clip, options.fvd, frames)
    with world.first(
        "data", each_machine=True
    ):  # what one rank of a machine decodes, the others find
        asked = request(
            model.config,
            model.picture_side,
            frames,
            metrics=options.metrics,
            n=options.n,
            protocol=options.protocol,
            captions=options.captions,
            reference=options.ref,
            networks=networks,
        )
    _refuse_unlooked(options, asked.metrics)
    return {
        **asked._asdict(),
        "networks": networks,
        "folder": results_folder(options.model),
        "seed": SEED if options.seed is None else options.seed,
        "batch_size": options.batch_size,
        "world": world,
        "progress": bars,
    }


def _refuse_unlooked(options: argparse.Namespace, metrics: Sequence[str]) -> None:
    """Raise `UsageError` for the file of a network that none of the metrics looks through."""
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.eval.measures import METRICS
    from matryoshka_diffusion.metrics.naming import INCEPTION
    from matryoshka_diffusion.metrics.networks.clip import CLIP
    from matryoshka_diffusion.metrics.networks.video import VIDEO

    looked_through = {METRICS[name].network for name in metrics}
    files = {INCEPTION: "inception", CLIP.name: "clip", VIDEO: "fvd"}
    for network, option in files.items():
        if getattr(options, option) is not None and network not in looked_through:
            those = ",".join(name for name, metric in METRICS.items() if metric.network == network)
            raise UsageError(
                f"--{option}: none of {', '.join(metrics)} looks through it; leave it away, or "
                f"name a metric that does (--metrics, one of {those})"
            )


@contextmanager
def _ranks(options: argparse.Namespace) -> Iterator[tuple[Any, str]]:
    """The ranks that this process is one of, and its device."""
    import torch

    from matryoshka_diffusion.train.distributed import joined, rank_device

    device = rank_device(find_device(options.device))
    with joined(torch.device(device), "ddp", RANK_TIMEOUT) as world:
        yield world, device


# --- the parsers -------------------------------------------------------------------------------


def add_eval(commands: Any) -> None:
    """Add `eval` to the commands."""
    command = add_command(
        commands, "eval", evaluate, "measure a model, or one set of pictures by another"
    )
    command.add_argument("model", metavar="RUN|DATA", help=f"{MODEL}, or pictures")
    command.add_argument("other", metavar="DATA", nargs="?", help="the pictures to compare with")
    command.add_argument("--side", type=positive, metavar="N", help="of pictures, in pixels")
    command.add_argument(
        "--frames", type=positive, metavar="N", help="of clips, of two sets of them"
    )
    command.add_argument(
        "--frame-stride",
        dest="stride",
        type=positive,
        metavar="K",
        help="take every K-th frame of the real clips (4); of samples every one",
    )
    _add_measuring(command)
    add_sampling(command)


def add_sweep(commands: Any) -> None:
    """Add `sweep` to the commands."""
    command = add_command(commands, "sweep", sweep, "try sampling settings and say which are best")
    command.add_argument("model", metavar="RUN", help=MODEL)
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
    add_sampling(command, swept=True)


def _add_measuring(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--metrics",
        metavar="LIST",
        help="fd, fid, fid50k, kid, is, prdc, clip, cmmd, retrieval, agreement, kd, prdc-fd; of "
        "clips fvd, motion, fd-frames, fid-frames, too",
    )
    command.add_argument("-n", type=positive, help="how many samples")
    command.add_argument(
        "--ref",
        metavar="DATA",
        help="pictures to compare with, or an .npz of ADM, or held-out (the training pictures)",
    )
    command.add_argument("--protocol", choices=PROTOCOLS, help="a published way of measuring")
    command.add_argument("--captions", type=Path, metavar="FILE", help=".json of COCO, or a list")
    add_base(command)
    command.add_argument("--inception", type=Path, metavar="FILE", help="weights for FID, KID, IS")
    command.add_argument("--clip", type=Path, metavar="PATH", help="folder of transformers")
    command.add_argument("--fvd", type=Path, metavar="FILE", help="TorchScript network of clips")
    command.add_argument("--seed", type=int, help="of sample 0 (1000000)")


def _numbers(text: str) -> tuple[float, ...]:
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.eval.grid import parse_numbers

    try:
        return parse_numbers(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _counts(text: str) -> tuple[int, ...]:
    return tuple(positive(f"{number:g}") for number in _numbers(text))


def _samplers(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in SAMPLERS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(SAMPLERS)}")
    return names
