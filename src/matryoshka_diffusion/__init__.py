"""Matryoshka Diffusion Models: one nested UNet denoises every resolution of a picture at once.

`import matryoshka_diffusion as mdm` costs nothing: a name loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Conditioning": "conditioning",
    "RunConfig": "config",
    "NetworkDenoiser": "denoiser",
    "Guided": "denoiser",
    "Thresholded": "denoiser",
    "Loss": "diffusion",
    "Process": "diffusion",
    "diffuse": "diffusion",
    "matryoshka_loss": "diffusion",
    "NestedUNet": "nn.nested",
    "grow": "nn.nested",
    "Matryoshka": "pipeline",
    "preset": "presets",
    "Pyramid": "pyramid",
    "Resolution": "pyramid",
    "build_pyramid": "pyramid",
    "ddim": "samplers",
    "ddpm": "samplers",
    "dpmpp_2m": "samplers",
    "build_schedules": "schedule",
    "train": "runs.run",
}
# Needs an extra, so `from matryoshka_diffusion import *` leaves it alone.
_OF_EXTRAS = {"MDMPipeline": "models.diffusers"}
__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from matryoshka_diffusion.conditioning import Conditioning as Conditioning
    from matryoshka_diffusion.config import RunConfig as RunConfig
    from matryoshka_diffusion.denoiser import Guided as Guided
    from matryoshka_diffusion.denoiser import NetworkDenoiser as NetworkDenoiser
    from matryoshka_diffusion.denoiser import Thresholded as Thresholded
    from matryoshka_diffusion.diffusion import Loss as Loss
    from matryoshka_diffusion.diffusion import Process as Process
    from matryoshka_diffusion.diffusion import diffuse as diffuse
    from matryoshka_diffusion.diffusion import matryoshka_loss as matryoshka_loss
    from matryoshka_diffusion.models.diffusers import MDMPipeline as MDMPipeline
    from matryoshka_diffusion.nn.nested import NestedUNet as NestedUNet
    from matryoshka_diffusion.nn.nested import grow as grow
    from matryoshka_diffusion.pipeline import Matryoshka as Matryoshka
    from matryoshka_diffusion.presets import preset as preset
    from matryoshka_diffusion.pyramid import Pyramid as Pyramid
    from matryoshka_diffusion.pyramid import Resolution as Resolution
    from matryoshka_diffusion.pyramid import build_pyramid as build_pyramid
    from matryoshka_diffusion.runs.run import train as train
    from matryoshka_diffusion.samplers import ddim as ddim
    from matryoshka_diffusion.samplers import ddpm as ddpm
    from matryoshka_diffusion.samplers import dpmpp_2m as dpmpp_2m
    from matryoshka_diffusion.schedule import build_schedules as build_schedules


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name) or _OF_EXTRAS.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
