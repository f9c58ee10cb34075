"""Translate a run configuration of the released code into a `RunConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from matryoshka_diffusion.config import (
    ConfigError,
    LevelConfig,
    MicroConfig,
    ModelConfig,
    RunConfig,
    TextConfig,
    WeightingConfig,
)
from matryoshka_diffusion.models.released_pickle import short
from matryoshka_diffusion.presets import preset

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
            that of the released models), `resolutions`, finest first, the sides (by default the
            ceilings of the `scale` micro-conditions).
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
    sides = settings.get("resolutions") or [_scale(unet)[1] for unet in nest]
    power = 2.0 if sides[0] == 1024 else 1.0  # of the released model of this side
    power = settings.get("schedule_shifted_power", power)
    power = sampler.get("schedule_shifted_power", power) * bool(
        sampler.get("schedule_shifted", True)
    )

    def member(name: str, default: str) -> Any:
        member = str(sampler.get(name, default)).upper()
        members = [line.split() for line in _MEMBERS[name]]
        return {word: ours for *words, ours in members for word in words}[member]

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
    name, ceiling = _scale(unet)
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
        micro=(MicroConfig(name=name, ceiling=float(ceiling)),),
        shift_ratio=ratio,
        shift_power=power,
    )


def _scale(unet: Mapping[str, Any]) -> tuple[str, int]:
    """Name and ceiling of the micro-condition, such as `scale:64`."""
    name, ceiling = unet["micro_conditioning"].split(":")
    if not 0 < int(ceiling[:6]) <= _LARGEST or len(ceiling) > 6:
        raise ConfigError(f"micro_conditioning is {short(unet['micro_conditioning'])}")
    return name, int(ceiling)


def _refuse_others(*parts: Mapping[str, Any]) -> None:
    """Refuse options that no released model uses."""
    for part in parts:
        unset = {name: part[name] for name in _UNSET if part.get(name)}
        others = {n: part[n] for n, value in _FIXED.items() if part.get(n) not in (None, value)}
        for name, value in (unset | others).items():
            raise ConfigError(f"{name} is {short(value)}, which no released model uses: remove it")
