"""Translate the keys of a released network into those of `NestedUNet`.

The released code nests from the outside in (`inner_unet.inner_unet...`); here levels are a flat
list from coarse to fine. Every key that a network may have is listed, any other is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from matryoshka_diffusion.config import LevelConfig, ModelConfig

T = TypeVar("T")
INNER = "inner_unet."

_TEXT = {"lm_proj": "text.project", "cond_emb": "text.pool"}
_TEXT_LAYER = {
    "attn.norm": "norm1",
    "attn.qkv": "qkv",
    "attn.proj_out": "out",
    "mlp.main.0": "norm2",
    "mlp.main.1": "up",
    "mlp.main.3": "down",
}
_LEVEL = {
    "conv_in": "stem",
    "norm_out": "norm",
    "conv_out": "head",
    "temb_layer1": "time.0",
    "temb_layer2": "time.2",
}
_RESIDUAL = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
    "time_layer": "modulation",
    "conv3": "skip",
}
_ATTENTION = {
    **{name: name for name in ("norm", "qkv")},
    "norm_cond": "text_norm",
    "kv_cond": "text_kv",
    "proj_out": "out",
    "ffn.0": "feed_forward.norm",
    "ffn.1": "feed_forward.up",
    "ffn.3": "feed_forward.down",
}


def convert_state_dict(state: Mapping[str, T], model: ModelConfig) -> dict[str, T]:
    """Rename the keys of a released network to those of `NestedUNet(model)`; values stay.

    Loading the result strictly then finds keys that are missing.

    Raises:
        ValueError: a key that the released network of this config does not have.
    """
    modules = dict(_modules(model))
    converted: dict[str, T] = {}
    for key, value in state.items():
        module, _, parameter = key.rpartition(".")
        if module not in modules:
            raise ValueError(
                f"{ascii(key)[1:-1][:300]}: not a key of the released network of its config"
            )
        converted[f"{modules[module]}.{parameter}"] = value
    return converted


def _modules(model: ModelConfig) -> Iterator[tuple[str, str]]:
    """Yield the released name and our name of every module that may have parameters."""
    for place, level in enumerate(model.levels):
        outer = INNER * (len(model.levels) - 1 - place)
        for theirs, ours in _TEXT.items():
            yield outer + theirs, f"conditioner.{ours}"
        for layer in range(model.text.layers if model.text else 0):
            for theirs, ours in _TEXT_LAYER.items():
                yield f"{outer}lm_head.{layer}.{theirs}", f"conditioner.text.layers.{layer}.{ours}"
        for theirs, ours in {"in_adapter": "inward", "out_adapter": "outward"}.items():
            yield outer + theirs, f"adapters.{place}.{ours}"
        for theirs, ours in _in_level(level):
            yield outer + theirs, f"levels.{place}.{ours}"


def _in_level(level: LevelConfig) -> Iterator[tuple[str, str]]:
    yield from _LEVEL.items()
    for micro in level.micro:
        for number in range(2):
            yield f"cond_layers.{micro.name}.{number}", f"micro.{micro.name}.{2 * number}"
    for stage in range(2):
        yield from _block(f"mid_blocks.{stage}", 0, f"middle.{stage}", 1)
    shapes = list(zip(level.blocks, level.attention, strict=True))
    place = 0
    for stage, (blocks, layers) in enumerate(shapes):
        for index in range(blocks):
            yield from _block(f"down_blocks.{stage}", index, f"encoder.{place + index}", layers)
        yield f"down_blocks.{stage}.resample", f"encoder.{place + blocks}"
        place += blocks + 1
    place = 0
    for stage, (blocks, layers) in enumerate(reversed(shapes)):
        for index in range(blocks + 1):
            yield from _block(f"up_blocks.{stage}", index, f"decoder.{place + index}", layers)
        yield f"up_blocks.{stage}.resample", f"decoder.{place + blocks}.up"
        place += blocks + 1


def _block(stage: str, index: int, ours: str, layers: int) -> Iterator[tuple[str, str]]:
    """Yield the modules of block `index` of a stage, which has `layers` layers of attention."""
    for theirs, mine in _RESIDUAL.items():
        yield f"{stage}.resnets.{index}.{theirs}", f"{ours}.residual.{mine}"
    for layer in range(layers):
        for theirs, mine in _ATTENTION.items():
            number = index * layers + layer
            yield f"{stage}.attn.{number}.{theirs}", f"{ours}.attention.{layer}.{mine}"
