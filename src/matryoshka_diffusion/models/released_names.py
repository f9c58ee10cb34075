"""Translate what the released code names: its run configuration, and the keys of its networks.

The released code nests from the outside in (`inner_unet.inner_unet...`); here levels are a flat
list from coarse to fine. Every option and key that a released model may have is listed. Any other
is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from matryoshka_diffusion.config import (
    ConfigError,
    LevelConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
    WeightingConfig,
)
from matryoshka_diffusion.modelconfig import MicroConfig
from matryoshka_diffusion.models.released_pickle import short
from matryoshka_diffusion.presets import preset

T = TypeVar("T")

# --- run configurations ------------------------------------------------------------------------

# Members of the released enumerations: name in its YAML files, number in its pickles, ours.
_PREDICTIONS = ("DDPM 3 eps", "V_PREDICTION 5 v")
_SCHEDULES = ("COSINE 0 truncated-cosine", "DDPM 2 linear-beta", "DEEPFLOYD 3 squared-cosine")
_MEMBERS = {
    "schedule_type": _SCHEDULES,
    "prediction_type": _PREDICTIONS,
    "loss_target_type": _PREDICTIONS,
    "threshold_function": ("NONE 0 none", "CLIP 1 clip", "DYNAMIC 2 dynamic"),
}
# Options that no released model uses: unset, or with the only value that is supported.
_UNSET = (
    *("num_temporal_attention_layers", "temporal_mode", "temporal_spatial_ds"),
    *("temporal_positional_encoding", "skip_inner_unet_input", "interp_conditioning"),
    *("model_output_scale", "use_vdm_loss_weights", "use_random_interp", "random_downsample"),
    *("mid_downsample", "reproject_signal"),
)
_FIXED = {
    "num_groups_norm": 32,
    "num_diffusion_steps": 1000,
    "rescale_schedule": 1.0,
    "rescale_signal": 1,
    "beta_start": 0.0001,
    "beta_end": 0.02,
}
_LARGEST = 2**16
"""The largest number in a network's configuration."""


def run_config(settings: Mapping[str, Any], *, text_dim: int) -> RunConfig:
    """Translate network, process and sampling of a released run configuration.

    Args:
        settings: a mapping with `unet_config`. `diffusion_config` decides the process (by default
            that of the released models), `resolutions`, finest first, the sides (by default those
            that the `scale` micro-conditions name).
        text_dim: width of the text features where `unet_config` does not say it.

    Raises:
        ConfigError: an option is missing, or has a value that no released model has.
    """
    try:
        return _translate(settings, text_dim)
    except ConfigError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {short(first['msg'])}"
        raise ConfigError(f"its network cannot be built: {reason}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {short(str(error))}"
        raise ConfigError(f"no run configuration of the released code ({reason})") from error


def _translate(settings: Mapping[str, Any], text_dim: int) -> RunConfig:
    nest = _nest(settings["unet_config"])
    diffusion = settings.get("diffusion_config") or {}
    sampler = diffusion.get("sampler_config") or {}
    _refuse_others(diffusion, sampler)
    sides = settings.get("resolutions") or _sides(nest)
    power = 2.0 if sides[0] == 1024 else 1.0  # of the released model of this side
    power = settings.get("schedule_shifted_power", power)
    power = sampler.get("schedule_shifted_power", power) * bool(
        sampler.get("schedule_shifted", True)
    )

    def member(name: str, default: str) -> Any:
        member = str(sampler.get(name, default)).upper()
        members = [line.split() for line in _MEMBERS[name]]
        return {word: name for *words, name in members for word in words}[member]

    core, base = nest[-1], preset("released-64")
    features = nest[0]["conditioning_feature_dim"]
    levels = [
        _level(unet, side, side / sides[-1], float(power), innermost=unet is core)
        for unet, side in zip(nest, sides, strict=True)
    ]
    model = ModelConfig(
        levels=tuple(reversed(levels)),
        embedding=core["temporal_dim"] or 4 * core["resolution_channels"][0],
        schedule=member("schedule_type", "DEEPFLOYD"),
        text=TextConfig(
            features=features if features > 0 else settings.get("text_dim", text_dim),
            width=core["conditioning_feature_proj_dim"],
            layers=core["num_lm_head_layers"],
            masked=bool(core["masked_cross_attention"]),
            learned_null=False,
        ),
    )
    weights = diffusion.get("multi_res_weights") or "1"  # such as 16:4:1, finest first
    process = {
        "prediction": member("prediction_type", "V_PREDICTION"),
        "weighting": (WeightingConfig(name=member("loss_target_type", "DDPM")),),
        "level_weights": tuple(float(weight) for weight in reversed(weights.split(":"))),
    }
    threshold = (member("threshold_function", "CLIP"),)
    stage = base.train.stages[-1].model_copy(update={"levels": len(nest), "mix": ()})
    update = {
        "name": f"released-{sides[0]}",
        "model": model,
        "process": base.process.model_copy(update=process),
        "sampling": base.sampling.model_copy(update={"threshold": threshold}),
        "train": base.train.model_copy(update={"stages": (stage,)}),
    }
    return base.model_copy(update=update)


def _nest(unet: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The networks of a nest, finest first."""
    nest = [unet]
    while "inner_config" in nest[-1]:
        nest.append(nest[-1]["inner_config"])
    for unet in nest:
        _refuse_others(unet, unet["resnet_config"])
        values = [value for name, value in unet.items() if name != "inner_config"]
        numbers = [n for value in values for n in (value if isinstance(value, list) else [value])]
        if any(isinstance(n, int | float) and abs(n) > _LARGEST for n in numbers):
            raise ConfigError("unet_config holds a number that no network of the released code has")
    if len({u["masked_cross_attention"] for u in nest if any(u["num_attention_layers"])}) > 1:
        raise ConfigError("masked_cross_attention differs between levels that attend")
    return nest


def _level(
    unet: Mapping[str, Any], side: int, ratio: float, power: float, *, innermost: bool
) -> LevelConfig:
    normalised = not innermost and not unet["skip_normalization"]
    return LevelConfig(
        side=side,
        widths=tuple(unet["resolution_channels"]),
        blocks=tuple(unet["num_resnets_per_resolution"]),
        attention=tuple(unet["num_attention_layers"]),
        attention_mlp=unet["resnet_config"]["use_attention_ffn"],
        dropout=float(unet["resnet_config"].get("dropout") or 0.0),
        middle=not unet["skip_mid_blocks"],
        input_scaling="std" if normalised else "none",
        micro=_micro(unet),
        shift_ratio=ratio,
        shift_power=power,
    )


def _micro(unet: Mapping[str, Any]) -> tuple[MicroConfig, ...]:
    """Micro-conditions of a network: `scale:64,aesthetic_score:0.5`, or null for none.

    The number of `scale` is its ceiling, that of any other is the value that samples have.
    """
    text = unet["micro_conditioning"] or ""
    conditions: dict[str, MicroConfig] = {}
    for entry in text.split(",") if text else ():
        name, number = entry.split(":")
        value = float(number)
        if name in conditions or not abs(value) <= _LARGEST:
            raise ConfigError(f"micro_conditioning is {short(text)}")
        ceiling, usual = (value, None) if name == "scale" else (None, value)
        conditions[name] = MicroConfig(name=name, ceiling=ceiling, usual=usual)
    return tuple(conditions.values())


def _sides(nest: Sequence[Mapping[str, Any]]) -> list[int]:
    """Sides of the levels, finest first: that of `scale`, or what fits around the coarser level."""
    sides: list[int] = []
    for unet in reversed(nest):
        scale = [micro.ceiling for micro in _micro(unet) if micro.ceiling is not None]
        if not scale and not sides:
            raise ConfigError("resolutions is missing: add the sides of the levels, finest first")
        around = sides[0] * 2 ** (len(unet["resolution_channels"]) - 1) if sides else 0
        sides.insert(0, int(scale[0]) if scale else around)
    return sides


def _refuse_others(*parts: Mapping[str, Any]) -> None:
    """Refuse options that no released model uses."""
    for part in parts:
        unset = {name: part[name] for name in _UNSET if part.get(name)}
        others = {n: part[n] for n, value in _FIXED.items() if part.get(n) not in (None, value)}
        for name, value in (unset | others).items():
            raise ConfigError(f"{name} is {short(value)}, which no released model uses: remove it")


# --- keys of networks --------------------------------------------------------------------------

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
        for released, name in _TEXT.items():
            yield outer + released, f"conditioner.{name}"
        for layer in range(model.text.layers if model.text else 0):
            tower = f"conditioner.text.layers.{layer}"
            for released, name in _TEXT_LAYER.items():
                yield f"{outer}lm_head.{layer}.{released}", f"{tower}.{name}"
        for released, name in {"in_adapter": "inward", "out_adapter": "outward"}.items():
            yield outer + released, f"adapters.{place}.{name}"
        for released, name in _in_level(level):
            yield outer + released, f"levels.{place}.{name}"


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


def _block(stage: str, index: int, block: str, layers: int) -> Iterator[tuple[str, str]]:
    """Yield the modules of block `index` of a stage, which has `layers` layers of attention."""
    for released, name in _RESIDUAL.items():
        yield f"{stage}.resnets.{index}.{released}", f"{block}.residual.{name}"
    for layer in range(layers):
        for released, name in _ATTENTION.items():
            number = index * layers + layer
            yield f"{stage}.attn.{number}.{released}", f"{block}.attention.{layer}.{name}"
