"""A released checkpoint as a network of ours; all of it fits, or nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka_diffusion.config import ConfigError, ModelConfig, RunConfig
from matryoshka_diffusion.diffusion import Process
from matryoshka_diffusion.models.released.archive import Weights, open_weights
from matryoshka_diffusion.models.released.keys import INNER, convert_state_dict
from matryoshka_diffusion.models.released.pickled import BrokenFile
from matryoshka_diffusion.models.released.settings import run_config
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.train.checkpoint import check_same, load_network

_BY_DEPTH = {1: "released-64", 2: "released-256", 3: "released-1024"}


@dataclass(frozen=True)
class Released:
    """A checkpoint that was found to fit; its numbers have not been read yet.

    Attributes:
        weights: the file.
        config: network, process, text encoder and sampling defaults.
        keys: the file's key of every parameter of `NestedUNet(config.model)`.
    """

    weights: Weights
    config: RunConfig
    keys: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """A parameter by our name."""
        return self.weights.read(self.keys[name])


def load_released(
    weights: str | Path | Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    text_dim: int = 2048,
) -> tuple[NestedUNet, Process]:
    """The network and the process of a released checkpoint.

    The network is called as every other: `net(z, t, cond)` with the levels from coarse to fine,
    `t = (step + 1) / 1000` and `Conditioning(tokens=..., mask=..., micro={"scale": ...})`.

    Args:
        weights: a `.pth` or `.safetensors` file, or its tensors by name.
        config: the released run configuration (`unet_config` inside). Without one, that of the
            file is taken, or else the three released models are told by their keys and shapes.
        text_dim: width of the text features where the configuration does not say it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or is something else, the configuration cannot be used, or
            a key is missing, left over, or of another shape or type than float32.
    """
    released = read_released(weights, config, text_dim=text_dim)
    model = released.config.model
    numbers = {name: released.read(name) for name in released.keys}
    net = load_network(model, numbers, where="the released weights")
    return net.eval(), Process.from_config(released.config.process, model)


def read_released(
    weights: str | Path | Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    text_dim: int = 2048,
) -> Released:
    """What `load_released` loads, checked, without its numbers. Arguments and errors are its."""
    opened = open_weights(weights)
    where = "the weights" if isinstance(weights, Mapping) else str(weights)
    settings = opened.settings if config is None else config
    if isinstance(settings, Mapping) and "unet_config" in settings:
        try:
            run = run_config(settings, text_dim=text_dim)
        except ConfigError as error:
            raise ConfigError(f"{'config' if config else where}: {error}") from error
    elif config is not None:
        raise ConfigError("config: no run configuration of the released code (no unet_config)")
    else:
        run = _recognise(opened, text_dim, where)
    return Released(opened, run, _match(opened, run.model, where))


def _recognise(weights: Weights, text_dim: int, where: str) -> RunConfig:
    """The released model of as many levels. `_match` then finds out whether it is that one."""
    depth = 1 + max((key.count(INNER) for key in weights), default=0)
    if depth not in _BY_DEPTH:
        raise BrokenFile(f"{where}: {depth} levels, but the released models have 1, 2 or 3")
    run = preset(_BY_DEPTH[depth])
    assert run.model.text is not None, "the released models are text-to-image"
    text = run.model.text.model_copy(update={"features": text_dim})
    return run.model_copy(update={"model": run.model.model_copy(update={"text": text})})


def _match(weights: Weights, model: ModelConfig, where: str) -> dict[str, str]:
    """The file's key of every parameter, once all of them are known to fit.

    Raises:
        BrokenFile: they do not; names the first differences.
    """
    keys = list(weights)
    if _layers(model) > max(2_000, len(keys)):  # a network that a hostile file made up
        raise BrokenFile(f"{where}: its configuration has {_layers(model):,} layers")
    try:
        names = convert_state_dict(dict(zip(keys, keys, strict=True)), model)
        with torch.device("meta"):
            expected = NestedUNet(model).state_dict()
            found = {name: torch.empty(weights.shape(key)) for name, key in names.items()}
        check_same(expected, found, where=where)
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise BrokenFile(
            f"{where} is none of the released networks, or not that of its config: "
            f"{str(error).splitlines()[0][:300]}"
        ) from error
    for key in keys:
        if weights.dtype(key) != "torch.float32":
            raise BrokenFile(f"{where}: {key} is {weights.dtype(key)}, not torch.float32")
    return names


def _layers(model: ModelConfig) -> int:
    text = 0 if model.text is None else model.text.layers
    return text + sum(
        len(level.widths) + sum(level.blocks) + sum(level.attention) for level in model.levels
    )
