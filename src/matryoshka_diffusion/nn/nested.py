"""NestedUNet (Section 3.2): a chain of UNets, each in the middle of the next finer one.

A Matryoshka doll is built like this, hence the name. Here a doll is a `Level`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.modelconfig import MicroConfig, ModelConfig
from matryoshka_diffusion.nn.conditioner import Conditioner, Context
from matryoshka_diffusion.nn.layers import conv3, zero
from matryoshka_diffusion.nn.level import Level
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.rng import stream
from matryoshka_diffusion.schedule import NoiseSchedule, build_schedules

COARSE_TIME = MicroConfig(name="coarse_time", ceiling=1000.0)
"""An upsampler's condition on the noise of its coarse image, on the scale of `time_steps`."""


class Adapter(nn.Module):
    """The convolutions between two levels: `inward` to the coarser one, `outward` to the finer one.

    Both start at zero, so a new level changes nothing in the levels inside of it.
    """

    def __init__(self, coarse: int, fine: int) -> None:
        super().__init__()
        self.inward = zero(conv3(fine, coarse))
        self.outward = zero(conv3(coarse, fine))


class NestedUNet(nn.Module):
    """One network that denoises all levels of a pyramid together.

    Initial weights depend only on `seed` and on the place in the nest. A level therefore starts
    the same, whether it was there from the start or was grown later.

    Attributes:
        levels: the UNets, coarse to fine. One level alone is an ordinary UNet.
        adapters: the convolutions between levels. The name is the index of the finer level.
        conditioner: text, labels and augmentation, shared by all levels.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        levels: list[Level] = []
        adapters: dict[str, Adapter] = {}
        with torch.random.fork_rng(devices=[]):
            _seed(seed, "conditioner")
            self.conditioner = Conditioner(config)
            for place, schedule in enumerate(build_schedules(config)):
                _seed(seed, "level", place)
                level = _encoding_level(config, place, schedule)
                if levels:
                    coarser = levels[-1].config.widths[0]
                    adapters[str(place)] = Adapter(coarser, level.core_width)
                level.add_decoder(config)  # after the adapter: weights are drawn in this order
                levels.append(level)
        # A ModuleList does not say what it is a list of, nor does a ModuleDict.
        self.levels = cast("Sequence[Level]", nn.ModuleList(levels))
        self.adapters = cast("Mapping[str, Adapter]", nn.ModuleDict(adapters))

    def forward(self, z: Pyramid, t: Float[Tensor, " b"], cond: Conditioning) -> Pyramid:
        """One prediction for each level.

        Args:
            z: noisy pyramid, coarse to fine; a finer level may hold only the first rows. It may
                end early: the first levels are then computed as by a nest of these alone.
            t: times in [0, 1], one for each row of the coarsest level.
            cond: conditions of the same rows.
        """
        x, context = self._inputs(z, t, cond)
        levels, adapters = self.levels[: len(z)], [*self.adapters.values()][: len(z) - 1]
        # Inwards: every level encodes, the finest one first.
        *coarser, finest = levels
        trails = [finest.encode(x[-1], t, context)]
        for level, adapter, x_r in reversed([*zip(coarser, adapters, x[:-1], strict=True)]):
            trails.append(level.encode(x_r, t, context, adapter.inward(trails[-1].core)))
        # And back out: every level decodes, the coarsest one first.
        coarsest, *finer = levels
        h, prediction = coarsest.decode(trails.pop())
        predictions = [prediction]
        for level, adapter in zip(finer, adapters, strict=True):
            trail = trails.pop()
            h, prediction = level.decode(trail, adapter.outward(h[: trail.core.shape[0]]))
            predictions.append(prediction)
        return tuple(predictions)

    def _inputs(
        self, z: Pyramid, t: Float[Tensor, " b"], cond: Conditioning
    ) -> tuple[list[Tensor], Context]:
        """The noisy images at unit scale, and the context that all levels share.

        The coarsest level of an upsampler also sees the coarse image, as further channels beside
        the noisy ones, and the time of its noise, as one more condition. Growing adds finer
        levels, so it changes nothing about that.

        Raises:
            ValueError: the network is an upsampler, and the coarse image or its time is missing.
        """
        x = [
            level.scale(z_r, t[: z_r.shape[0]]) for level, z_r in zip(self.levels, z, strict=False)
        ]
        if self.config.coarse is not None:
            if cond.image is None or cond.image_t is None:
                raise ValueError("this network is an upsampler, but image or image_t is None")
            x[0] = torch.cat([x[0], cond.image], dim=1)
            time = self.levels[0].time_steps(cond.image_t)
            cond = replace(cond, micro={**cond.micro, COARSE_TIME.name: time})
        return x, self.conditioner(cond)

    def recompute(self, levels: Collection[int]) -> None:
        """Trade time for memory in `levels`: their backward pass computes the blocks again.

        Only the features between blocks are kept. Loss and gradients stay the same bits.
        """
        for place, level in enumerate(self.levels):
            level.recomputed = place in levels


def grow(net: NestedUNet, config: ModelConfig, seed: int = 0) -> NestedUNet:
    """Put new levels around a nest, which keeps its weights (Section 3.3, progressive training).

    The adapters of new levels start at zero, so the coarse predictions stay the same bits.

    Raises:
        ValueError: `config` does not extend the network's own config.
    """
    check_extends(net.config, config)
    grown = NestedUNet(config, seed).to(next(net.parameters()))  # its device and its precision
    missing, unexpected = grown.load_state_dict(net.state_dict(), strict=False)
    assert not unexpected
    assert all(level_of(key) >= len(net.levels) for key in missing)
    return grown.train(net.training)


def check_extends(small: ModelConfig, large: ModelConfig) -> None:
    """Raise ValueError naming the first difference that keeps `large` from extending `small`."""
    for name in type(small).model_fields:
        if name != "levels" and getattr(small, name) != getattr(large, name):
            raise ValueError(
                f"cannot grow: model.{name} is {getattr(small, name)} in the network and "
                f"{getattr(large, name)} in the new config"
            )
    for place, old in enumerate(small.levels):
        if large.levels[place : place + 1] != (old,):
            raise ValueError(f"cannot grow: model.levels[{place}] is not as in the network")


def _encoding_level(model: ModelConfig, place: int, schedule: NoiseSchedule) -> Level:
    """A level without its decoder. The coarsest one of an upsampler sees the coarse image, too."""
    config = model.levels[place]
    if place > 0 or model.coarse is None:
        return Level(model, config, schedule, inputs=model.channels_of(config))
    config = config.model_copy(update={"micro": (*config.micro, COARSE_TIME)})
    return Level(model, config, schedule, inputs=2 * model.channels)


def _seed(seed: int, *place: object) -> None:
    """Seed torch's generator (inside fork_rng) for one part of the nest."""
    purpose = "initial weights " + " ".join(str(part) for part in place)
    torch.manual_seed(int(stream(seed, purpose).integers(2**63)))


# --- names of parameters -------------------------------------------------------------------------


def level_of(name: str) -> int:
    """The level that a parameter came with. Shared parameters came with level 0."""
    part, place, *_ = name.split(".")
    assert part in ("levels", "adapters", "conditioner"), f"{name} is of a wrapped network"
    return 0 if part == "conditioner" else int(place)


def present_name(name: str) -> str:
    """The present name of a tensor from a file that version 0.1.0 may have written.

    Examples:
        >>> present_name("levels.1.inward.weight.exp_avg")
        'adapters.1.inward.weight.exp_avg'
    """
    name = re.sub(r"\blevels\.(\d+)\.(inward|outward)\b", r"adapters.\1.\2", name)
    return re.sub(r"\blevels\.0\.image_time\b", "levels.0.micro.coarse_time", name)


def old_name(name: str) -> str:
    """The name that a tensor had in version 0.1.0, the reverse of `present_name`. Hashes use it."""
    name = re.sub(r"\badapters\.(\d+)\.(inward|outward)\b", r"levels.\1.\2", name)
    return re.sub(r"\blevels\.0\.micro\.coarse_time\b", "levels.0.image_time", name)


def in_walk_order(net: NestedUNet) -> list[nn.Parameter]:
    """The parameters in the order of the walk, level by level.

    The norm of all gradients is a sum in this order. Another order would change its last bit, and
    a run would no longer resume to the same numbers.
    """
    parts = ("conditioner", "time", "micro", "stem", "encoder", "inward", "outward")  # then others

    def place(name: str) -> tuple[int, int]:
        order = [parts.index(part) for part in name.split(".") if part in parts]
        return level_of(name), order[0] if order else len(parts)

    named = sorted(net.named_parameters(), key=lambda item: place(item[0]))
    return [parameter for _, parameter in named]


def learnt_parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that training may change, by name: those that ask for a gradient."""
    return {name: value for name, value in net.named_parameters() if value.requires_grad}
