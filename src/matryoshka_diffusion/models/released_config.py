"""Translate a run configuration of the released code into a `RunConfig`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import ValidationError

from matryoshka_diffusion.config import (
    ConfigError,
    LevelConfig,
    MicroConfig,
    ModelConfig,
    RunConfig,
    ScheduleName,
    TextConfig,
    Threshold,
    WeightingConfig,
)
from matryoshka_diffusion.models.released_pickle import short
from matryoshka_diffusion.presets import preset

# Members of the released enumerations: by name in its YAML files, by number in its pickles.
_SCHEDULES: dict[str, ScheduleName] = {
    "COSINE": "truncated-cosine",
    "0": "truncated-cosine",
    "DDPM": "linear-beta",
    "2": "linear-beta",
    "DEEPFLOYD": "squared-cosine",
    "3": "squared-cosine",
}
# Both of what is predicted and of the target of the loss.
_TARGETS: dict[str, Literal["eps", "v"]] = {
    "DDPM": "eps",
    "3": "eps",
    "V_PREDICTION": "v",
    "5": "v",
}
_THRESHOLDS: dict[str, Threshold] = {
    "NONE": "none",
    "0": "none",
    "CLIP": "clip",
    "1": "clip",
    "DYNAMIC": "dynamic",
    "2": "dynamic",
}
# Options that no released model uses, each with its value where it is not used.
_UNUSED_IN_NETWORKS = {
    "num_temporal_attention_layers": None,
    "temporal_mode": False,
    "temporal_spatial_ds": False,
    "temporal_positional_encoding": False,
    "skip_inner_unet_input": False,
    "interp_conditioning": False,
}
_UNUSED_IN_BLOCKS = {"num_groups_norm": 32}
_UNUSED_IN_PROCESSES = {
    "model_output_scale": 0,
    "use_vdm_loss_weights": False,
    "use_random_interp": False,
    "random_downsample": False,
    "mid_downsample": False,
}
_UNUSED_IN_SAMPLERS = {
    "num_diffusion_steps": 1000,
    "reproject_signal": False,
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
        _refuse_others(sampler, _UNUSED_IN_SAMPLERS)
        _refuse_others(diffusion, _UNUSED_IN_PROCESSES)
        weights = _level_weights(diffusion.get("multi_res_weights"))
        sides = settings.get("resolutions") or [_scale(unet)[1] for unet in nest]
        shifted = sampler.get("schedule_shifted", True)
        model = model_config(
            settings["unet_config"],
            sides,
            shift_power=_power(settings, sampler, sides) if shifted else 0.0,
            schedule=_SCHEDULES[_member(sampler, "schedule_type", "DEEPFLOYD")],
            text_dim=settings.get("text_dim", text_dim),
        )
        target = _TARGETS[_member(sampler, "loss_target_type", "DDPM")]
        prediction = _TARGETS[_member(sampler, "prediction_type", "V_PREDICTION")]
        threshold = _THRESHOLDS[_member(sampler, "threshold_function", "CLIP")]
    except ConfigError:
        raise
    except ValidationError as error:
        raise ConfigError(f"its network cannot be built: {_first(error)}") from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {short(str(error))}"
        raise ConfigError(f"no run configuration of the released code ({reason})") from error
    base = preset("released-64")
    stage = base.train.stages[-1].model_copy(update={"levels": len(nest), "mix": ()})
    return base.model_copy(
        update={
            "name": f"released-{sides[0]}",
            "model": model,
            "process": base.process.model_copy(
                update={
                    "prediction": prediction,
                    "weighting": (WeightingConfig(name=target),),
                    "level_weights": weights,
                }
            ),
            "sampling": base.sampling.model_copy(update={"threshold": (threshold,)}),
            "train": base.train.model_copy(update={"stages": (stage,)}),
        }
    )


def model_config(
    unet: Mapping[str, Any],
    sides: Sequence[int],
    *,
    shift_power: float,
    schedule: ScheduleName,
    text_dim: int = 2048,
) -> ModelConfig:
    """Translate a released `unet_config`.

    Args:
        unet: the mapping, with the coarser network in its `inner_config`.
        sides: side of every level in pixels, finest first as in the released files.
        shift_power: power of the shift by resolution: 1 in the 64 and 256 models, 2 at 1024.
        schedule: name of the schedule, as in `ModelConfig.schedule`.
        text_dim: width of the text features where `unet` does not say it.
    """
    nest = list(_nest(unet))
    core = nest[-1]
    levels = [
        _level_config(part, side, side / sides[-1], shift_power, innermost=part is core)
        for part, side in zip(nest, sides, strict=True)
    ]
    features = unet["conditioning_feature_dim"]
    text = TextConfig(
        features=features if features > 0 else text_dim,
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


def _nest(unet: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the networks of a nest, finest first."""
    masked = None
    while True:
        _refuse_others(unet, _UNUSED_IN_NETWORKS)
        _refuse_others(unet["resnet_config"], _UNUSED_IN_BLOCKS)
        _refuse_large(unet)
        if any(unet["num_attention_layers"]):
            if masked not in (None, unet["masked_cross_attention"]):
                raise ConfigError("masked_cross_attention differs between levels that attend")
            masked = unet["masked_cross_attention"]
        yield unet
        if "inner_config" not in unet:
            return
        unet = unet["inner_config"]


def _level_config(
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
    for place in (sampler, settings):
        if "schedule_shifted_power" in place:
            return float(place["schedule_shifted_power"])
    return 2.0 if sides[0] == 1024 else 1.0


def _member(sampler: Mapping[str, Any], name: str, default: str) -> str:
    return str(sampler.get(name, default)).upper()


def _level_weights(weights: Any) -> tuple[float, ...]:
    """Weights from coarse to fine of a text like `16:4:1`, which is finest first."""
    return tuple(float(weight) for weight in reversed(weights.split(":"))) if weights else (1.0,)


def _refuse_others(part: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        found = part.get(name)
        unused = not found if value in (None, False) else found in (None, value)
        if not unused:
            raise ConfigError(
                f"{name} is {short(found)}: no released model uses this, and it is not supported"
            )


def _refuse_large(unet: Mapping[str, Any]) -> None:
    """Refuse a network of any size that a hostile file asks for."""
    values = [value for name, value in unet.items() if name != "inner_config"]
    numbers = [n for value in values for n in (value if isinstance(value, list) else [value])]
    if any(isinstance(n, int | float) and abs(n) > _LARGEST for n in numbers):
        raise ConfigError("unet_config holds a number that no network of the released code has")


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {short(first['msg'])}"
