"""Translate a run configuration of the released code into a `RunConfig`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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

# Members of the released enumerations, by name in its YAML files and by number in its pickles.
_MEMBERS: dict[str, dict[str, Any]] = {
    "schedule_type": {
        "COSINE": "truncated-cosine",
        "0": "truncated-cosine",
        "DDPM": "linear-beta",
        "2": "linear-beta",
        "DEEPFLOYD": "squared-cosine",
        "3": "squared-cosine",
    },
    "prediction_type": {"DDPM": "eps", "3": "eps", "V_PREDICTION": "v", "5": "v"},
    "loss_target_type": {"DDPM": "eps", "3": "eps", "V_PREDICTION": "v", "5": "v"},
    "threshold_function": {
        "NONE": "none",
        "0": "none",
        "CLIP": "clip",
        "1": "clip",
        "DYNAMIC": "dynamic",
        "2": "dynamic",
    },
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
        nest = list(_nest(settings["unet_config"]))
        diffusion = settings.get("diffusion_config") or {}
        sampler = diffusion.get("sampler_config") or {}
        _refuse_others(diffusion, sampler)
        sides = settings.get("resolutions") or [_scale(unet)[1] for unet in nest]
        model = _model(nest, sides, _power(settings, sampler, sides), settings, sampler, text_dim)
        weighting = WeightingConfig(name=_member(sampler, "loss_target_type", "DDPM"))
        process = {
            "prediction": _member(sampler, "prediction_type", "V_PREDICTION"),
            "weighting": (weighting,),
            "level_weights": _level_weights(diffusion.get("multi_res_weights")),
        }
        threshold = _member(sampler, "threshold_function", "CLIP")
    except ConfigError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {short(first['msg'])}"
        raise ConfigError(f"its network cannot be built: {reason}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {short(str(error))}"
        raise ConfigError(f"no run configuration of the released code ({reason})") from error
    base = preset("released-64")
    stage = base.train.stages[-1].model_copy(update={"levels": len(nest), "mix": ()})
    update = {
        "name": f"released-{sides[0]}",
        "model": model,
        "process": base.process.model_copy(update=process),
        "sampling": base.sampling.model_copy(update={"threshold": (threshold,)}),
        "train": base.train.model_copy(update={"stages": (stage,)}),
    }
    return base.model_copy(update=update)


def _model(
    nest: Sequence[Mapping[str, Any]],
    sides: Sequence[int],
    power: float,
    settings: Mapping[str, Any],
    sampler: Mapping[str, Any],
    text_dim: int,
) -> ModelConfig:
    """The network of a nest, finest first, with these sides and power of the shift."""
    core = nest[-1]
    levels = [
        _level(unet, side, side / sides[-1], power, innermost=unet is core)
        for unet, side in zip(nest, sides, strict=True)
    ]
    features = nest[0]["conditioning_feature_dim"]
    text = TextConfig(
        features=features if features > 0 else settings.get("text_dim", text_dim),
        width=core["conditioning_feature_proj_dim"],
        layers=core["num_lm_head_layers"],
        masked=bool(core["masked_cross_attention"]),
        learned_null=False,
    )
    return ModelConfig(
        levels=tuple(reversed(levels)),
        embedding=core["temporal_dim"] or 4 * core["resolution_channels"][0],
        schedule=_member(sampler, "schedule_type", "DEEPFLOYD"),
        text=text,
    )


def _nest(unet: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the networks of a nest, finest first."""
    masked = None
    while True:
        _refuse_others(unet, unet["resnet_config"])
        _refuse_large(unet)
        if any(unet["num_attention_layers"]):
            if masked not in (None, unet["masked_cross_attention"]):
                raise ConfigError("masked_cross_attention differs between levels that attend")
            masked = unet["masked_cross_attention"]
        yield unet
        if "inner_config" not in unet:
            return
        unet = unet["inner_config"]


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


def _power(settings: Mapping[str, Any], sampler: Mapping[str, Any], sides: Sequence[int]) -> float:
    """Power of the shift by resolution; by default that of the released model of this side."""
    if not sampler.get("schedule_shifted", True):
        return 0.0
    for place in (sampler, settings):
        if "schedule_shifted_power" in place:
            return float(place["schedule_shifted_power"])
    return 2.0 if sides[0] == 1024 else 1.0


def _member(sampler: Mapping[str, Any], name: str, default: str) -> Any:
    return _MEMBERS[name][str(sampler.get(name, default)).upper()]


def _level_weights(weights: Any) -> tuple[float, ...]:
    """Weights from coarse to fine of a text like `16:4:1`, which is finest first."""
    return tuple(float(weight) for weight in reversed(weights.split(":"))) if weights else (1.0,)


def _refuse_others(*parts: Mapping[str, Any]) -> None:
    """Refuse options that no released model uses."""
    for part in parts:
        unset = {name: part[name] for name in _UNSET if part.get(name)}
        others = {n: part[n] for n, value in _FIXED.items() if part.get(n) not in (None, value)}
        for name, value in (unset | others).items():
            raise ConfigError(f"{name} is {short(value)}, which no released model uses: remove it")


def _refuse_large(unet: Mapping[str, Any]) -> None:
    """Refuse a network of any size that a hostile file asks for."""
    values = [value for name, value in unet.items() if name != "inner_config"]
    numbers = [n for value in values for n in (value if isinstance(value, list) else [value])]
    if any(isinstance(n, int | float) and abs(n) > _LARGEST for n in numbers):
        raise ConfigError("unet_config holds a number that no network of the released code has")
