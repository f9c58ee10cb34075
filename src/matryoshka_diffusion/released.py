"""The paper's released networks in this project's terms: their configuration and their keys.

The released code nests from the outside in (`inner_unet.inner_unet...`); here levels are a flat
list from coarse to fine. The mapping is explicit and total: a key that it does not know is an
error, so a checkpoint never half-loads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from matryoshka_diffusion.config import LevelConfig, MicroConfig, ModelConfig, TextConfig

INNER = "inner_unet."

_LEVEL_KEYS = {
    "conv_in": "stem",
    "norm_out": "norm",
    "conv_out": "head",
    "temb_layer1": "time.0",
    "temb_layer2": "time.2",
    "in_adapter": "inward",
    "out_adapter": "outward",
}
_CONDITIONER_KEYS = {
    "lm_proj": "text.project",
    "cond_emb": "text.pool",
    "attn.norm": "norm1",
    "attn.qkv": "qkv",
    "attn.proj_out": "out",
    "mlp.main.0": "norm2",
    "mlp.main.1": "up",
    "mlp.main.3": "down",
}
_RESIDUAL_KEYS = {"time_layer": "modulation", "conv3": "skip"}
_ATTENTION_KEYS = {
    "norm_cond": "text_norm",
    "kv_cond": "text_kv",
    "proj_out": "out",
    "ffn.0": "feed_forward.norm",
    "ffn.1": "feed_forward.up",
    "ffn.3": "feed_forward.down",
}


def model_config(
    unet: Mapping[str, Any], sides: Sequence[int], *, shift_power: float, schedule: Any
) -> ModelConfig:
    """The `ModelConfig` of a released `unet_config`.

    Args:
        unet: the mapping, with the coarser network in its `inner_config`.
        sides: side of every level in pixels, finest first as in the released files.
        shift_power: power of the shift by resolution: 1 in the 64 and 256 models, 2 at 1024.
        schedule: name of the schedule, as in `ModelConfig.schedule`.
    """
    nest = [unet]
    while "inner_config" in nest[-1]:
        nest.append(nest[-1]["inner_config"])
    core = nest[-1]
    levels = [
        _level_config(part, side, side / sides[-1], shift_power, innermost=part is core)
        for part, side in zip(nest, sides, strict=True)
    ]
    text = TextConfig(
        features=unet["conditioning_feature_dim"],
        width=core["conditioning_feature_proj_dim"],
        layers=core["num_lm_head_layers"],
        masked=bool(core["masked_cross_attention"]),
        learned_null=False,
    )
    return ModelConfig(
        levels=tuple(reversed(levels)),
        embedding=core["temporal_dim"] or 4 * core["resolution_channels"][0],
        schedule=schedule,
        text=text,
    )


def _level_config(
    unet: Mapping[str, Any], side: int, ratio: float, power: float, *, innermost: bool
) -> LevelConfig:
    name, ceiling = unet["micro_conditioning"].split(":")
    normalised = not innermost and not unet["skip_normalization"]
    return LevelConfig(
        side=side,
        widths=tuple(unet["resolution_channels"]),
        blocks=tuple(unet["num_resnets_per_resolution"]),
        attention=tuple(unet["num_attention_layers"]),
        attention_mlp=unet["resnet_config"]["use_attention_ffn"],
        middle=not unet["skip_mid_blocks"],
        input_scaling="std" if normalised else "none",
        micro=(MicroConfig(name=name, ceiling=float(ceiling)),),
        shift_ratio=ratio,
        shift_power=power,
    )


def convert_state_dict(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Rename the keys of a released network to those of `NestedUNet(model)`.

    Loading the result strictly then finds keys that are missing or too many.

    Raises:
        ValueError: a key that no released network has, or two keys for one place.
    """
    converted: dict[str, Tensor] = {}
    for key, value in state.items():
        place = _convert(key, model)
        if place in converted:
            raise ValueError(f"{key}: another key has its place {place} already")
        converted[place] = value
    return converted


def _convert(key: str, model: ModelConfig) -> str:
    try:
        return _parse(key, model)
    except (KeyError, IndexError, ZeroDivisionError):  # a stage or layer that the config lacks
        raise ValueError(f"{key}: not a key of the released network of this config") from None


def _parse(key: str, model: ModelConfig) -> str:
    depth = key.count(INNER)
    place = len(model.levels) - 1 - depth
    local, _, parameter = key.removeprefix(INNER * depth).rpartition(".")
    if place < 0:
        raise ValueError(f"{key}: nested deeper than the {len(model.levels)} levels of the config")
    if local in ("lm_proj", "cond_emb"):
        return f"conditioner.{_CONDITIONER_KEYS[local]}.{parameter}"
    if match := re.fullmatch(r"lm_head\.(\d+)\.(.+)", local):
        return f"conditioner.text.layers.{match[1]}.{_CONDITIONER_KEYS[match[2]]}.{parameter}"
    return f"levels.{place}.{_convert_in_level(local, key, model.levels[place])}.{parameter}"


def _convert_in_level(local: str, key: str, level: LevelConfig) -> str:
    if local in _LEVEL_KEYS:
        return _LEVEL_KEYS[local]
    if match := re.fullmatch(r"cond_layers\.(\w+)\.([01])", local):
        return f"micro.{match[1]}.{2 * int(match[2])}"
    match = re.fullmatch(
        r"(down|mid|up)_blocks\.(\d+)\.(?:(resnets|attn)\.(\d+)\.(.+)|resample)", local
    )
    if match is None:
        raise KeyError(key)
    part, stage, kind, number, rest = match[1], int(match[2]), match[3], match[4], match[5]
    if kind is None:
        return _resample(part, stage, level)
    index = int(number)
    if kind == "resnets":
        return f"{_block(part, stage, index, level)}.residual.{_RESIDUAL_KEYS.get(rest, rest)}"
    layers = 1 if part == "mid" else level.attention[_resolution(part, stage, level)]
    block = _block(part, stage, index // layers, level)
    return f"{block}.attention.{index % layers}.{_ATTENTION_KEYS.get(rest, rest)}"


def _resolution(part: str, stage: int, level: LevelConfig) -> int:
    """Index into widths, blocks and attention: stages of the way up count backwards."""
    return stage if part == "down" else len(level.widths) - 1 - stage


def _block(part: str, stage: int, index: int, level: LevelConfig) -> str:
    """Where block `index` of a stage stands in our flat lists."""
    if part == "mid":
        return f"middle.{stage}"
    if part == "down":
        return f"encoder.{sum(level.blocks[:stage]) + stage + index}"
    earlier = [level.blocks[_resolution("up", s, level)] + 1 for s in range(stage)]
    return f"decoder.{sum(earlier) + index}"


def _resample(part: str, stage: int, level: LevelConfig) -> str:
    if part == "down":
        return f"encoder.{sum(level.blocks[: stage + 1]) + stage}"
    return f"{_block('up', stage, level.blocks[_resolution('up', stage, level)], level)}.up"
