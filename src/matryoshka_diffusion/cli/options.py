"""The options that several commands of `mdm` have, and what is made of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from matryoshka_diffusion.cli.terminal import one_line, say

if TYPE_CHECKING:
    from matryoshka_diffusion.cascade import Model
else:
    Model = Any

SAMPLERS = ("dpmpp-2m", "ddim", "ddpm")
GRIDS = ("trailing", "log-snr", "released")
THRESHOLDS = ("none", "clip", "dynamic")
RANK_TIMEOUT = 60  # seconds
PRECISION = "fp32"
MODEL = "run folder, model folder, released .pth or shipped model"
IDLE = {
    "eta": "--eta is of ddim: add --sampler ddim, or leave it away",
    "guidance_interval": "--interval is of guidance: give a weight (--cfg), or leave it away",
    "rescale": "--rescale is of guidance: give a weight (--cfg), or leave it away",
}
"""What is said of settings that change nothing."""


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    """Add a command, which calls `run` with its options; `text` says what it does."""
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def add_device(command: argparse.ArgumentParser) -> None:
    """The option --device, for `find_device`."""
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def add_base(command: Any) -> None:
    """The option --base."""
    command.add_argument(
        "--base", metavar="RUN", help="of an upsampler: the model that draws what it enlarges"
    )


def add_sampling(command: argparse.ArgumentParser, *, swept: bool = False) -> None:
    """Everything that samples depend on; what is swept has options of its own."""
    add_device(command)
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
        "--batch-size",
        type=positive,
        metavar="N",
        help="samples at a time (64 pictures, or clips of 64 frames in all)",
    )
    command.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default=PRECISION,
        help=f"of the network ({PRECISION})",
    )


def _add_sampler(command: argparse.ArgumentParser) -> None:
    command.add_argument("--sampler", choices=SAMPLERS, help="if not that of the model's config")
    command.add_argument(
        "--steps", type=positive, metavar="N", help="of the sampler, if not those of the config"
    )
    command.add_argument(
        "--cfg",
        type=_weights,
        dest="guidance",
        metavar="W[,W...]",
        help="guidance weight: one for all levels, or one each, coarse to fine",
    )
    command.add_argument(
        "--coarse-noise",
        type=float,
        metavar="T",
        help="of an upsampler: time, 0 to 1, of the noise on the picture that it enlarges",
    )


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that were given."""
    names = (
        *("sampler", "steps", "grid", "threshold", "eta"),
        *("guidance", "guidance_interval", "rescale", "coarse_noise", "fps"),
    )
    return {n: value for n in names if (value := getattr(options, n, None)) is not None}


def refuse_idle(model: Model, *cases: dict[str, Any]) -> None:
    """Raise `UsageError` for a setting that changes no sample in any of these cases of settings."""
    from matryoshka_diffusion.config import UsageError

    for name in sorted(set.intersection(*map(model.idle, cases))):
        raise UsageError(IDLE[name])


def positive(text: str) -> int:
    """A whole number above 0, or an error that says so."""
    return _whole(text, 1, "above 0")


def natural(text: str) -> int:
    """A whole number from 0 on, or an error that says so."""
    return _whole(text, 0, "from 0 on")


def _weights(text: str) -> float | tuple[float, ...]:
    try:
        first, *others = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number, nor one for each level such as 3,1"
        ) from error
    return (first, *others) if others else first


def _whole(text: str, least: int, which: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {which}")
    return value


def find_device(name: str) -> str:
    """The device of that name, if torch can use it; of `auto`, the best that is there."""
    import torch

    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise SystemExit(say(f"--device {name}: {one_line(error)}", 2)) from error
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
