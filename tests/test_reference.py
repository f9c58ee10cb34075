"""The paper's released implementation, recorded: networks, schedules, losses and samplers agree.

Recordings are in tests/data/reference. Two more networks are checked if the whole collection is in
shared/reference beside the project.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import release
from safetensors.torch import load_file
from torch import Tensor

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import (
    ModelConfig,
    Prediction,
    ProcessConfig,
    Threshold,
    WeightingConfig,
    WeightingName,
)
from matryoshka_diffusion.denoiser import ConditionPair, Guided, NetworkDenoiser, Thresholded
from matryoshka_diffusion.diffusion import Process, diffuse, matryoshka_loss
from matryoshka_diffusion.models.released import load_released
from matryoshka_diffusion.models.released_names import convert_state_dict
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.samplers import ddim, ddpm, last, released_grid
from matryoshka_diffusion.schedule import SCHEDULES, Shifted

HERE = Path(__file__).parent
FOLDERS = (HERE / "data" / "reference", HERE.parent.parent / "shared" / "reference")
TOLERANCE = 1e-5
SCHEDULE_NAMES = {
    "cosine": "truncated-cosine",
    "deepfloyd": "squared-cosine",
    "ddpm": "linear-beta",
}


def recording(name: str) -> Path:
    for folder in FOLDERS:
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is too large to be kept in tests/data")


@cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(recording(f"{name}.safetensors"))


@cache
def network(name: str) -> NestedUNet:
    described: dict[str, Any] = json.loads(recording(f"{name}.json").read_text())
    pickled = name == "nested32"
    weights = recording("vis_model_nested32.pth") if pickled else tensors(f"{name}.weights")
    return load_released(weights, described)[0]


def check(found: Sequence[Tensor], recorded: Sequence[Tensor]) -> None:
    """Relative L2 errors."""
    for a, b in zip(found, recorded, strict=True):
        assert float((a - b).norm() / b.norm()) <= TOLERANCE


def coarse_first(part: dict[str, Tensor], prefix: str, levels: int) -> Pyramid:
    """`prefix0` is the finest level in the recordings."""
    return tuple(part[f"{prefix}{place}"] for place in reversed(range(levels)))


def conditions(part: dict[str, Tensor], scale: Tensor, rows: slice = slice(None)) -> Conditioning:
    mask = part["text_mask"][rows].bool()
    return Conditioning(tokens=part["text"][rows], mask=mask, micro={"scale": scale})


# --- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda net: net, release.PlainNest], ids=["nest", "plain"])
@pytest.mark.parametrize("name", ["nested32", "ragged32", "unet16", "nested64"])
def test_networks(name: str, form: Callable[[NestedUNet], Callable[..., Pyramid]]):
    net, io = network(name), tensors(f"{name}.io")
    levels = len(net.levels)
    t = (io["times"].float() + 1) / 1000  # a network given step k was given table entry k + 1
    with torch.no_grad():
        found = form(net)(coarse_first(io, "x_", levels), t, conditions(io, io["scale"]))
    check(found, coarse_first(io, "y_", levels))


RELEASED = [("64", 461_359_107), ("256", 476_613_958), ("1024", 480_970_057)]


@pytest.mark.parametrize(("side", "parameters"), RELEASED)
def test_every_key_of_the_released_models_has_its_place(side: str, parameters: int):
    shapes = json.loads(recording(f"cc12m_{side}x{side}.keys.json").read_text())
    config = preset(f"released-{side}").model
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
        ours = NestedUNet(config).state_dict()
    converted = convert_state_dict(state, config)
    assert len(converted) == len(state), "no two keys share a place"
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in ours.items()}
    assert sum(value.numel() for value in ours.values()) == parameters


@pytest.mark.parametrize(
    "key",
    [
        "inner_unet.inner_unet.conv_in.weight",  # three levels deep
        "conv_inn.weight",
        "down_blocks.0.attn.0.qkv.weight",  # this level has no attention
        "inner_unet.lm_head.0.attn.surprise.weight",
        "",
    ],
)
def test_an_unknown_key_is_an_error_that_names_it(key: str):
    with pytest.raises(ValueError, match=f"^{key}: "):
        convert_state_dict({key: torch.empty(0)}, network("ragged32").config)


def test_two_keys_for_one_place_are_an_error():
    """A block too many at one resolution would land on the first of the next."""
    keys = ("up_blocks.1.resnets.0.conv1.weight", "up_blocks.0.resnets.2.conv1.weight")
    state = {key: torch.empty(0) for key in keys}
    with pytest.raises(ValueError, match=keys[1]):
        convert_state_dict(state, network("ragged32").config)


# --- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize("ratio", [1, 4, 16])
@pytest.mark.parametrize("power", [1, 2])
def test_schedules(name: str, ratio: int, power: int):
    recorded = tensors("schedules")[f"{name}.power{power}.ratio{ratio}"]
    schedule = Shifted(SCHEDULES[SCHEDULE_NAMES[name]](), float(ratio), float(power))
    found = torch.sigmoid(schedule.log_snr(torch.arange(1001) / 1000))
    check([found], [recorded])
    torch.testing.assert_close(found, recorded, rtol=0, atol=TOLERANCE)


def test_time_grids():
    part = tensors("nested32.sampling")
    schedule = SCHEDULES["squared-cosine"]()
    for steps in (5, 10):
        grid = released_grid(steps, schedule)
        assert torch.equal((1000 * grid).round().long(), part[f"timesteps{steps}"])


# --- losses --------------------------------------------------------------------------------------

# "target" is the space the error was taken in. The finest level has weight 1.
LOSSES = [("nested32", (1.0, 1.0)), ("nested64", (1.0, 4.0, 16.0))]
TARGETS: list[tuple[str, WeightingName]] = [("ddpm", "eps"), ("v_prediction", "v")]


def process_of(config: ModelConfig, prediction: Prediction, **others: Any) -> Process:
    return Process.from_config(ProcessConfig(prediction=prediction, **others), config)


@pytest.mark.parametrize(("name", "weights"), LOSSES)
@pytest.mark.parametrize(("target", "weighting"), TARGETS)
def test_losses(name: str, weights: tuple[float, ...], target: str, weighting: WeightingName):
    net, part = network(name), tensors(f"{name}.loss")
    levels, side = len(net.levels), float(part["image"].shape[-1])
    x = coarse_first(part, f"target_{target}.images_", levels)
    noise = coarse_first(part, f"target_{target}.eps_", levels)
    t = (part["times"].float() + 1) / 1000
    process = process_of(
        net.config, "v", weighting=(WeightingConfig(name=weighting),), level_weights=weights
    )
    z = diffuse(x, noise, t, process.schedules)
    check(z, coarse_first(part, f"target_{target}.x_t_", levels))
    cond = conditions(part, torch.full((len(t),), side))
    with torch.no_grad():
        loss = matryoshka_loss(net, x, cond, t, noise, process=process)
    check([loss.per_example], [part[f"target_{target}.loss_per_example"]])


# --- samplers ------------------------------------------------------------------------------------


def replay(sampler: Callable, steps: int, guidance: float, threshold: Threshold, **noise: Any):
    """The recorded run again. Rows 0 and 1 of its text are unconditional, 2 and 3 conditional."""
    net, part = network("nested32"), tensors("nested32.sampling")
    process = process_of(net.config, "v")
    without, given = (
        conditions(part, torch.full((2,), 32.0), rows) for rows in (slice(0, 2), slice(2, 4))
    )
    alone, both = (
        NetworkDenoiser(net, process, cond) for cond in (given, given.followed_by(without))
    )
    guided = Guided(ConditionPair(alone, both), (guidance, guidance))
    denoise = Thresholded(guided, (threshold, threshold))
    times = released_grid(steps, process.schedules[0])
    start = coarse_first(part, "noise_", 2)
    return last(sampler(denoise, start, process.schedules, times, **noise)).z


def silent(purpose: str, step: int) -> Pyramid:
    raise AssertionError("eta is 0")


@pytest.mark.parametrize("threshold", ["none", "clip", "dynamic"])
@pytest.mark.parametrize("guidance", [1, 3])
def test_ddim(threshold: Threshold, guidance: int):
    z = replay(ddim, 10, float(guidance), threshold, noise=silent)
    part = tensors("nested32.sampling")
    check(z, coarse_first(part, f"ddim10.{threshold}.cfg{guidance}.x_", 2))


def test_ddpm():
    part = tensors("nested32.sampling")

    def noise(purpose: str, step: int) -> Pyramid:
        """In the order of the calls: a step's finest level first."""
        return tuple(part[f"ddpm5.noise_{2 * step - 1 - level:02d}"] for level in range(2))

    check(replay(ddpm, 5, 1.0, "clip", noise=noise), coarse_first(part, "ddpm5.x_", 2))


# --- the released arithmetic of the benchmarks ---------------------------------------------------


def test_plain_losses():
    net, part = network("nested32"), tensors("nested32.loss")
    x, noise = (coarse_first(part, f"target_ddpm.{key}_", 2) for key in ("images", "eps"))
    cond = conditions(part, torch.full((len(part["times"]),), 32.0))
    nest, alphas = release.PlainNest(net), release.tables(net.config)
    with torch.no_grad():
        found = release.losses(nest, x, noise, part["times"] + 1, cond, alphas)
    check([found], [part["target_ddpm.loss_per_example"]])


@pytest.mark.parametrize("joined", [True, False])
def test_plain_samples(joined: bool):
    net, part = network("nested32"), tensors("nested32.sampling")
    without, given = (
        conditions(part, torch.full((2,), 32.0), rows) for rows in (slice(0, 2), slice(2, 4))
    )
    start = coarse_first(part, "noise_", 2)
    z = release.sample(net, start, given, without, steps=10, guidance=3.0, joined=joined)
    check(z, coarse_first(part, "ddim10.clip.cfg3.x_", 2))
