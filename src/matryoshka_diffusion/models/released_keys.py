"""Translate the keys of a released network into those of `NestedUNet`.

The released code nests from the outside in (`inner_unet.inner_unet...`); here levels are a flat
list from coarse to fine. The mapping is explicit and total: a key that it does not know is an
error, so a checkpoint never half-loads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from matryoshka_diffusion.config import LevelConfig, ModelConfig

T = TypeVar("T")
INNER = "inner_unet."
LONGEST = 500

_LEVEL_KEYS = {
    "conv_in": "stem",
    "norm_out": "norm",
    "conv_out": "head",
    "temb_layer1": "time.0",
    "temb_layer2": "time.2",
}
_ADAPTER_KEYS = {"in_adapter": "inward", "out_adapter": "outward"}
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


def convert_state_dict(state: Mapping[str, T], model: ModelConfig) -> dict[str, T]:
    """Rename the keys of a released network to those of `NestedUNet(model)`; values stay.

    Loading the result strictly then finds keys that are missing or too many.

    Raises:
        ValueError: a key that no released network has, or two keys for one place.
    """
    converted: dict[str, T] = {}
    for key, value in state.items():
        if not isinstance(key, str) or len(key) > LONGEST:
            raise ValueError(f"{ascii(key)[:60]}: not a key of a network")
        place = _convert(key, model)
        if place in converted:
            raise ValueError(f"{key}: another key has its place {place} already")
        converted[place] = value
    return converted


def _convert(key: str, model: ModelConfig) -> str:
    try:
        return _parse(key, model)
    except (KeyError, IndexError, ZeroDivisionError):  # a stage or layer that the config lacks
        raise ValueError(
            f"{ascii(key)[1:-1]}: not a key of the released network of this config"
        ) from None


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
    if local in _ADAPTER_KEYS:
        return f"adapters.{place}.{_ADAPTER_KEYS[local]}.{parameter}"
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
