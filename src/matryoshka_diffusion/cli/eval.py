"""The commands `mdm eval`, `mdm compare` and `mdm sweep`: quality of models and of images."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matryoshka_diffusion.cli.options import (
    MODEL,
    PRECISION,
    RANK_TIMEOUT,
    SAMPLERS,
    add_command,
    add_sampling,
    add_shared,
    find_device,
    positive,
    refuse_idle,
    sampling,
)
from matryoshka_diffusion.cli.terminal import Bar, leads, say, show
from matryoshka_diffusion.models.names import refuse_unknown

PROTOCOLS = ("coco30k", "imagenet50k")


@contextmanager
def _ranks(options: argparse.Namespace) -> Iterator[None]:
    """Join the ranks; `options` then has `world`, `bars`, and the device of this rank."""
    import torch

    from matryoshka_diffusion.training.distributed import joined, rank_device

    options.device = rank_device(find_device(options.device))
    device = torch.device(options.device)
    with joined(device, "ddp", RANK_TIMEOUT) as options.world, Bar() as options.bars:
        yield


def evaluate(options: argparse.Namespace) -> None:
    refuse_unknown(options.model)
    from matryoshka_diffusion.eval import evaluate as evaluation

    with _ranks(options):
        settings = sampling(options)
        model, plan = _plan(options, settings)
        _report(options, evaluation.evaluate(model, **plan, **settings), plan["folder"])


def compare(options: argparse.Namespace) -> None:
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.eval import evaluate as evaluation
    from matryoshka_diffusion.files import cache_folder

    metrics, n = evaluation.parse_metrics(options.metrics)
    if n is not None:
        raise UsageError(
            f"--metrics {options.metrics}: two sets are compared whole, so omit the number of "
            f"samples (--metrics {','.join(metrics)})"
        )
    with _ranks(options):
        results = evaluation.compare(
            *(options.first, options.second, metrics),
            _networks(options, options.frames)(metrics),
            **{name: getattr(options, name) for name in ("side", "frames", "frame_stride")},
            world=options.world,
            progress=options.bars,
        )
        _report(options, results, cache_folder("eval"))


def sweep(options: argparse.Namespace) -> None:
    refuse_unknown(options.model)
    from matryoshka_diffusion.eval import evaluate as evaluation
    from matryoshka_diffusion.eval import result
    from matryoshka_diffusion.eval import sweep as sweeping
    from matryoshka_diffusion.files import require

    fixed = sampling(options)
    axes = _axes(options, fixed)
    require("matplotlib", "plots", "the picture of mdm sweep")  # now, not after hours
    with _ranks(options):
        cases = [fixed | one for one in sweeping.combinations(axes)]
        usual, plan = _plan(options, *cases)

        def open_model(length: float | None) -> Any:
            how: dict[str, Any] = {"device": options.device, "precision": options.precision}
            run = Path(options.model)
            return usual if length is None else sweeping.averaged(run, length, usual, **how)

        points = sweeping.sweep(
            open_model,
            axes,
            lambda model, settings: evaluation.evaluate(model, **plan, **settings),
            fixed=fixed,
            progress=_say_points,
        )
        if not options.world.leads:
            return
    out = options.out or result.folder_of(options.model, "sweep")
    sweeping.write(points, out / "sweep.json")
    sweeping.draw(points, out / "sweep.png")
    show(f"{sweeping.table(points)}\n{out / 'sweep.json'}, {out / 'sweep.png'}")
    best = sweeping.best(points)
    settings, own = best.settings | fixed, usual.config.sampling
    idle = usual.idle(settings)  # which mdm sample would refuse
    settings |= {"precision": options.precision, "base": options.base}
    given = {
        name: value
        for name, value in settings.items()
        if value not in (None, PRECISION) and name not in idle
    }
    for name, value in best.settings.items():
        if value is None and name not in idle and getattr(own, name) is not None:
            show(f"best needs sampling.{name}=null in the model's config, which no option sets")
    show(f"best:\n{sweeping.command(options.model, best, given)}")


def _axes(options: argparse.Namespace, fixed: Collection[str]) -> dict[str, Sequence[Any]]:
    """The values on each axis of a sweep, by the name of a sampling setting or `EMA`."""
    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.configfile import assignment

    axes = {name: swept for name in SWEPT if (swept := getattr(options, f"swept_{name}"))}
    for text in options.tried:
        path, values = assignment(text, "--try")
        name = path.removeprefix("sampling.")
        if not isinstance(values, list) or not values:
            raise UsageError(f"--try {text}: write a list of values, {name}=[A, B]")
        if name in {*axes, *fixed}:
            raise UsageError(f"--try {text}: another option sets {name}, too; omit one of them")
        axes[name] = [tuple(value) if isinstance(value, list) else value for value in values]
    if not axes:
        raise UsageError("name what to try: --cfg, --steps, --sampler, --ema, --try guidance=[1,3]")
    return axes


def _say_points(done: int, total: int) -> None:
    if leads():
        say(f"{done} of {total} combinations", 0)


def _plan(options: argparse.Namespace, *cases: dict[str, Any]) -> tuple[Any, Any]:
    """The model, and the arguments of `evaluate` except the sampler's settings (`cases`)."""
    from matryoshka_diffusion.cascade import open_model
    from matryoshka_diffusion.eval import evaluate as evaluation
    from matryoshka_diffusion.eval import result

    how = {"precision": options.precision, "base": options.base}
    model = open_model(options.model, device=options.device, **how)
    refuse_idle(model, *cases)
    frames = model.resolutions[-1].frames
    # One rank of a machine decodes, the others read its cache.
    with options.world.first("data", each_machine=True):
        plan = evaluation.plan(
            *(model.config, model.picture_side, frames),
            **{name: getattr(options, name) for name in ("metrics", "n", "protocol", "captions")},
            reference=options.ref,
            networks=_networks(options, frames),
        )
    plan |= {} if options.seed is None else {"seed": options.seed}
    plan |= {"batch_size": options.batch_size, "world": options.world, "progress": options.bars}
    return model, {**plan, "folder": result.folder_of(options.model, "eval")}


def _networks(options: argparse.Namespace, frames: int | None) -> Any:
    from matryoshka_diffusion.eval.evaluate import find_networks

    files = {name: getattr(options, name) for name in ("inception", "clip", "fvd")}
    files["trust_torchscript"] = options.trust_torchscript
    return lambda metrics: find_networks(metrics, options.device, frames=frames, **files)


def _report(options: argparse.Namespace, results: Sequence[Any], folder: Path) -> None:
    from matryoshka_diffusion.eval import result

    if options.world.leads:
        result.append(results, folder / result.FILE)
        show(f"{result.report(results)}\n  in {folder / result.FILE}")


def add_commands(commands: Any) -> None:
    """Add the commands of this module to the parser."""
    command = add_command(commands, "eval", evaluate, "measure the samples of a model")
    command.add_argument("model", metavar="RUN", help=MODEL)
    _add_evaluation(command)
    add_sampling(command)
    command = add_command(commands, "compare", compare, "measure one set of images by another")
    command.add_argument("first", metavar="DATA", help="images or clips to measure")
    command.add_argument("second", metavar="DATA", help="images or clips to compare them with")
    stride = "take every K-th frame of the real clips (4); of samples every one"
    command.add_argument("--side", type=positive, metavar="N", help="side of the images in pixels")
    command.add_argument("--frames", type=positive, metavar="N", help="compare clips of N frames")
    command.add_argument("--frame-stride", type=positive, metavar="K", help=stride)
    _add_metrics(command, "fd")
    add_shared(command, "--device")
    command = add_command(commands, "sweep", sweep, "try sampling settings and say which are best")
    command.add_argument("model", metavar="RUN", help=MODEL)
    for name, (option, kind, text) in SWEPT.items():
        command.add_argument(option, dest=f"swept_{name}", type=kind, metavar="LIST", help=text)
    text = "values of any sampling setting, such as guidance=[3,[3,1]]; may be repeated"
    tried: dict[str, Any] = {"action": "append", "default": [], "metavar": "KEY=LIST"}
    command.add_argument("--try", dest="tried", **tried, help=text)
    out = "folder for sweep.json and sweep.png (RUN/sweep)"
    command.add_argument("-o", "--out", type=Path, metavar="DIR", help=out)
    _add_evaluation(command)
    add_sampling(command, swept=True)


def _add_evaluation(command: argparse.ArgumentParser) -> None:
    _add_metrics(command, None)
    command.add_argument("-n", type=positive, help="number of samples")
    ref = "images to compare with, an .npz of ADM, or held-out (the training images)"
    command.add_argument("--ref", metavar="DATA", help=ref)
    command.add_argument("--protocol", choices=PROTOCOLS, help="a published way of measuring")
    command.add_argument("--captions", type=Path, metavar="FILE", help=".json of COCO, or a list")
    add_shared(command, "--base")
    command.add_argument("--seed", type=int, help="seed of sample 0 (1000000)")


def _add_metrics(command: argparse.ArgumentParser, default: str | None) -> None:
    metrics = "fd, fid, fid50k, kid, is, prdc, clip, cmmd, retrieval, retrieval-512, "
    metrics += "retrieval-one-step, unseen, unseen-fd, class-accuracy, fd-classes, memorised, "
    metrics += "agreement, kd, prdc-fd; of clips also fvd, motion, fd-frames, fid-frames"
    command.add_argument("--metrics", metavar="LIST", default=default, help=metrics)
    command.add_argument("--inception", type=Path, metavar="FILE", help="weights for FID, KID, IS")
    command.add_argument("--clip", type=Path, metavar="PATH", help="folder of transformers")
    command.add_argument("--fvd", type=Path, metavar="FILE", help="TorchScript network of clips")
    text = "run the program in a TorchScript file of --inception or --fvd"
    command.add_argument("--trust-torchscript", action="store_true", help=text)


def _numbers(text: str) -> tuple[float, ...]:
    from matryoshka_diffusion.eval.sweep import parse_numbers

    try:
        return parse_numbers(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _counts(text: str) -> tuple[int, ...]:
    return tuple(positive(f"{number:g}") for number in _numbers(text))


def _samplers(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in SAMPLERS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(SAMPLERS)}")
    return names


_LIST = "a list, or FIRST:LAST:STEP"
SWEPT: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "sampler": ("--sampler", _samplers, ", ".join(SAMPLERS)),
    "ema": ("--ema", _numbers, f"lengths of averages, as in mdm ema: {_LIST}"),
    "guidance": ("--cfg", _numbers, f"guidance weights: {_LIST}"),
    "steps": ("--steps", _counts, f"sampler steps: {_LIST}"),
    "coarse_noise": ("--coarse-noise", _numbers, f"on the coarse image of a cascade: {_LIST}"),
}
"""Axes of a sweep in their order: setting, option, type and help."""
