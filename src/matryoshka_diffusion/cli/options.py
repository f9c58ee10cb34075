"""Options that several commands of `mdm` share, and their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matryoshka_diffusion.cli.terminal import one_line, show
from matryoshka_diffusion.hints import did_you_mean

if TYPE_CHECKING:
    from matryoshka_diffusion.cascade import Model
else:
    Model = Any

SAMPLERS = ("dpmpp-2m", "ddim", "ddpm")
GRIDS = ("trailing", "log-snr", "released")
THRESHOLDS = ("none", "clip", "dynamic")
DTYPES = ("fp32", "bf16")
RANK_TIMEOUT = 60  # seconds
PRECISION = "auto"
MODEL = "run folder, model folder, released .pth, shipped model or hub id (owner/name)"
DATA = "folder, tar shards, parquet or hf:NAME"
MODEL_FOLDER: dict[str, Any] = {
    "type": Path,
    "required": True,
    "metavar": "DIR",
    "help": "the new model's folder",
}
IDLE = {
    "eta": "--eta only applies to ddim: add --sampler ddim or omit --eta",
    "guidance_interval": "--interval only applies to guidance: add --cfg or omit --interval",
    "guide": "--guide only applies to guidance: add --cfg or omit --guide",
    "rescale": "--rescale only applies to guidance: add --cfg or omit --rescale",
    "wake": "--wake is for finer levels, and the model has one level: omit --wake",
}
"""Messages for settings that change no sample."""


# --- options -----------------------------------------------------------------------------------


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    """Add a command that calls `run` with its options; `text` is its help."""
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run, parser=command)
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def path_and_share(text: str) -> tuple[str, float]:
    """Parse PATH or PATH=SHARE. A folder of the whole name takes precedence, such as `lr=0.1`."""
    path, _, share = text.rpartition("=")
    try:
        return (path, float(share)) if path and not Path(text).exists() else (text, 1.0)
    except ValueError:  # a path with = in it
        return text, 1.0


SHARED: dict[str, dict[str, Any]] = {
    "--device": {"default": "auto", "help": "auto, cpu, cuda, cuda:1, mps"},
    "--base": {"metavar": "RUN", "help": "model that draws the small images for an upsampler"},
    "--as": {
        "dest": "as_",
        "metavar": "BASELINE",
        "help": "a baseline of the preset: simple, finest, base, upsampler, latent or codes",
    },
    "--data": {"metavar": "DATA", "help": DATA},
    "--set": {
        "action": "append",
        "default": [],
        "metavar": "KEY=VALUE",
        "help": "change path.to.key=value",
    },
    "--lora": {
        "action": "append",
        "type": path_and_share,
        "default": [],
        "metavar": "RUN[=SHARE]",
        "help": "add these adapters, of a run or by peft, by this share (1); repeated",
    },
    "--text-encoder": {"metavar": "PATH", "help": "folder or hub id of another text encoder"},
}


def add_shared(command: Any, *names: str) -> None:
    """Add options of `SHARED` to a command or to a group of options."""
    for name in names:
        command.add_argument(name, **SHARED[name])


def add_sampling(command: argparse.ArgumentParser, *, swept: bool = False) -> None:
    """Add the settings of samples; `swept` leaves out those that `mdm sweep` has as lists."""
    add_shared(command, "--device")
    add = command.add_argument
    if not swept:
        add("--sampler", choices=SAMPLERS, help="(the model's own)")
        add("--steps", type=positive, metavar="N", help="sampler steps (the model's own)")
        text = "guidance weight for all levels, or one for each level, coarse to fine"
        add("--cfg", type=guidance_weights, dest="guidance", metavar="W[,W...]", help=text)
        text = "time, 0 to 1, of the noise on an upsampler's small image"
        add("--coarse-noise", type=float, metavar="T", help=text)
    text = "weaker model that guidance leads away from, such as one of mdm ema --until"
    add("--guide", metavar="RUN", help=text)
    interval: Any = {"nargs": 2, "type": float, "metavar": ("LOW", "HIGH")}
    text = "guide only between these log-SNRs"
    add("--interval", dest="guidance_interval", **interval, help=text)
    add("--rescale", type=float, metavar="SHARE", help="guidance rescale, 0 to 1")
    add("--eta", type=float, help="ddim: 0 deterministic, 1 as noisy as ddpm")
    add("--grid", choices=GRIDS, help="times that the sampler visits")
    text = "how estimates stay in the range of pixels: for all levels, or one for each"
    add("--threshold", nargs="+", choices=THRESHOLDS, help=text)
    text = "log-SNR from which finer levels work: for all levels, or one for each, coarse to fine"
    add("--wake", nargs="+", type=float, metavar="FLOOR", help=text)
    text = "samples at a time (at most 64, and 4 million pixels of the finest level)"
    add("--batch-size", type=positive, metavar="N", help=text)
    text = "of the network (auto: bf16 where the hardware multiplies it, else fp32)"
    add("--precision", choices=(PRECISION, *DTYPES), default=PRECISION, help=text)


def add_size(command: argparse.ArgumentParser) -> None:
    """Add the size of images that are drawn."""
    for axis in ("height", "width"):
        text = f"{axis} of the images in pixels (that of the model's squares)"
        command.add_argument(f"--{axis}", type=positive, metavar="PIXELS", help=text)


# --- mistyped words ----------------------------------------------------------------------------


def describe_unknown(command: argparse.ArgumentParser, words: Sequence[str]) -> str:
    """Describe words that a command does not take, with the nearest option or setting."""
    word = next((word for word in words if word.startswith("-")), words[0])
    if not word.startswith("-"):
        quote = " (quote a pattern of files: 'shards/*.tar')" if Path(word).exists() else ""
        return f"unexpected {word!r}{quote}"
    option, known = word.partition("=")[0], command._option_string_actions
    if "--set" in known:
        from matryoshka_diffusion.config import RunConfig
        from matryoshka_diffusion.configfile import paths

        key = option.lstrip("-").replace("-", "_")
        if path := next((path for path in paths(RunConfig) if path.endswith(f".{key}")), None):
            return f"unknown option {option} (did you mean --set {path}=VALUE?)"
    return f"unknown option {option}{did_you_mean(option, known)}"


def refuse_unknown_names(options: argparse.Namespace) -> None:
    """Raise ConfigError for a mistyped preset or key of `--set` before torch is imported.

    What needs files, or other options to be valid, is left to `runs.prepare`.
    """
    from matryoshka_diffusion.configfile import override
    from matryoshka_diffusion.models.names import is_hub_id
    from matryoshka_diffusion.presets import CODECS, preset

    name = Path(options.preset)
    if name.exists() or name.suffix in (".yaml", ".yml") or options.preset in CODECS:
        return
    if is_hub_id(options.preset):
        return
    config = preset(options.preset, getattr(options, "as_", None))
    if not any(getattr(options, other, None) for other in ("lora", "codec", "init", "base")):
        override(config, options.set)


# --- values ------------------------------------------------------------------------------------


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings on the command line."""
    names = (
        *("sampler", "steps", "grid", "threshold", "eta", "wake"),
        *("guidance", "guide", "guidance_interval", "rescale", "coarse_noise", "fps"),
    )
    return {n: value for n in names if (value := getattr(options, n, None)) is not None}


def sized(model: Any, options: argparse.Namespace) -> Any:
    """The model for images of the size on the command line, or as it is without one."""
    size = options.height, options.width
    return model if size == (None, None) else model.sized(*size)


def refuse_idle(model: Model, *cases: dict[str, Any]) -> None:
    """Raise `UsageError` for a setting that changes no sample in any of these cases of settings."""
    from matryoshka_diffusion.config import UsageError

    for name in sorted(set.intersection(*map(model.idle, cases))):
        raise UsageError(IDLE[name])


def tell_names(prompts: Sequence[str], model: Model) -> None:
    """Say which prompts are emoji and are replaced by their names."""
    from matryoshka_diffusion.data.emoji_names import named

    for prompt in dict.fromkeys(prompts):
        if (name := named(prompt, model.config.data)) != prompt:
            show(f"{prompt} is drawn as {name!r}")


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    return _whole(text, 1, "above 0")


def natural(text: str) -> int:
    """Parse a whole number from 0 on."""
    return _whole(text, 0, "from 0 on")


def _whole(text: str, least: int, range_name: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {range_name}")
    return value


def adapters(options: argparse.Namespace) -> dict[str, float]:
    """The adapters of --lora, each with its share."""
    from matryoshka_diffusion.config import UsageError

    shares = dict(options.lora)
    if len(shares) < len(options.lora):
        names = [name for name, _ in options.lora]
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"--lora {twice}: named twice; add the shares up")
    return shares


def guidance_weights(text: str) -> float | tuple[float, ...]:
    try:
        first, *others = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number, nor one number for each level such as 3,1"
        ) from error
    return (first, *others) if others else first


def find_device(name: str) -> str:
    """Check that torch can use a device, or choose the best one for `auto`."""
    import torch

    from matryoshka_diffusion.config import UsageError
    from matryoshka_diffusion.training.precision import best_device

    if name == "auto":
        return best_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {one_line(error)}") from error
    return name
