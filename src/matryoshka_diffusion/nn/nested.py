"""NestedUNet (Section 3.2): a flat chain of dolls, walked inwards and back out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import ModelConfig
from matryoshka_diffusion.nn.conditioner import Conditioner
from matryoshka_diffusion.nn.level import Level
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.rng import stream
from matryoshka_diffusion.schedule import build_schedules


class NestedUNet(nn.Module):
    """One network that denoises all levels of a pyramid together.

    `levels` runs from coarse to fine; one level alone is an ordinary UNet. Initial weights depend
    on `seed` and on the place in the nest only, so a level starts the same way whether it was
    there from the start or grown later.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            _seed(seed, "conditioner")
            self.conditioner = Conditioner(config)
            levels, coarse_width = [], None
            for place, (level, schedule) in enumerate(
                zip(config.levels, build_schedules(config), strict=True)
            ):
                _seed(seed, "level", place)
                levels.append(Level(config, level, schedule, coarse_width))
                coarse_width = level.widths[0]
        # A ModuleList does not say what it is a list of.
        self.levels = cast("Sequence[Level]", nn.ModuleList(levels))

    def forward(self, z: Pyramid, t: Float[Tensor, " b"], cond: Conditioning) -> Pyramid:
        """One prediction a level.

        Args:
            z: noisy pyramid, coarse to fine; a finer level may hold only the first rows.
            t: times in [0, 1], one for each row of the coarsest level.
            cond: conditions of the same rows.
        """
        context = self.conditioner(cond)
        finer, trails = None, []
        for level, z_r in zip(reversed(self.levels), reversed(z), strict=True):  # finest first
            finer, trail = level.encode(z_r, finer, t, context)
            trails.append(trail)
        coarser, predictions = None, []
        for level, trail in zip(self.levels, reversed(trails), strict=True):  # and back out
            coarser, prediction = level.decode(trail, coarser)
            predictions.append(prediction)
        return tuple(predictions)

    def recompute(self, levels: Collection[int]) -> None:
        """From now on keep little of `levels` for the backward pass, which computes it again.

        What is kept are the features between blocks. Loss and gradients stay the same bits, for
        one more forward pass through these levels.
        """
        for place, level in enumerate(self.levels):
            level.recomputed = place in levels


def grow(net: NestedUNet, config: ModelConfig, seed: int = 0) -> NestedUNet:
    """A deeper nest that computes the same: every weight is kept, new levels are put around.

    The adapters between levels start at zero, so the coarse predictions are bit-equal to before;
    the new parameters are exactly those of the new levels (Section 3.3, progressive training).

    Raises:
        ValueError: `config` is no extension of the network's own.
    """
    check_extends(net.config, config)
    grown = NestedUNet(config, seed).to(next(net.parameters()))  # its device and its precision
    missing, unexpected = grown.load_state_dict(net.state_dict(), strict=False)
    kept = len(net.levels)
    new = tuple(f"levels.{place}." for place in range(kept, len(config.levels)))
    assert not unexpected
    assert all(key.startswith(new) for key in missing)
    return grown.train(net.training)


def level_of(name: str) -> int:
    """The level that a parameter belongs to by its name; what all share came with the coarsest."""
    part, _, rest = name.partition(".")
    assert part in ("levels", "conditioner"), f"{name} is of a wrapped network"
    return int(rest.partition(".")[0]) if part == "levels" else 0


def check_extends(small: ModelConfig, large: ModelConfig) -> None:
    """Raise ValueError naming the first difference that keeps `large` from extending `small`."""
    for name in type(small).model_fields:
        if name != "levels" and getattr(small, name) != getattr(large, name):
            raise ValueError(
                f"cannot grow: model.{name} is {getattr(small, name)} in the network and "
                f"{getattr(large, name)} in the new config"
            )
    if len(large.levels) < len(small.levels):
        raise ValueError(
            f"cannot grow: the network has {len(small.levels)} levels, the new config only "
            f"{len(large.levels)}"
        )
    for place, (old, new) in enumerate(zip(small.levels, large.levels, strict=False)):
        if old != new:
            raise ValueError(f"cannot grow: model.levels[{place}] differs from the network's")


def _seed(seed: int, *place: object) -> None:
    """Seed torch's generator (inside fork_rng) for one part of the nest."""
    purpose = "initial weights " + " ".join(str(part) for part in place)
    torch.manual_seed(int(stream(seed, purpose).integers(2**63)))
