"""Averages of the weights from which one of any length can be made after training.

Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv
2312.02696), Section 3: an average whose memory is a fixed share of the training so far, by a decay
that changes with time. Snapshots of two of them, taken now and then, span the others; see
`posthoc.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from matryoshka_diffusion.config import UNIFORM
from matryoshka_diffusion.files import write_atomically
from matryoshka_diffusion.train.optim import learnt_parameters
from matryoshka_diffusion.train.world import fill, local


def exponent(length: float) -> float:
    """The gamma of the profile t^gamma whose standard deviation is `length` of the training.

    The one positive root of length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), Section 3.1.

    Raises:
        ValueError: the length is not between 0 and `UNIFORM`.
    """
    if not 0.0 < length < UNIFORM:
        raise ValueError(f"an average has a length between 0 and {UNIFORM:.4f}, not {length:g}")
    inverse = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


class PowerEma:
    """Averages of a network's parameters under power-function profiles, one for each length.

    A parameter's time is the number of images that it has learnt from. So one that came later has
    the profile over its own life, and a step that was skipped, or that left the parameter alone,
    does not count. After t images the average is the integral over s in [0, t] of
    (gamma + 1) s^gamma / t^(gamma + 1) times what the parameter was then, exactly and for any
    batch sizes. Averages are kept in float32.

    Attributes:
        averages: for each length, the averages by the parameters' names.
        ages: the images that each parameter has learnt from.
    """

    def __init__(self, net: nn.Module, lengths: Sequence[float]) -> None:
        self.averages: dict[float, dict[str, Tensor]] = {length: {} for length in lengths}
        self.ages: dict[str, int] = {}
        self.extend(net)

    def extend(self, net: nn.Module) -> None:
        """Take in parameters that are new; they are as old as they have learnt: not at all."""
        live = learnt_parameters(net)
        self.ages = {name: self.ages.get(name, 0) for name in live}
        for length, known in self.averages.items():
            self.averages[length] = {
                name: known[name] if name in known else value.detach().clone().float()
                for name, value in live.items()
            }

    @torch.no_grad()
    def update(self, net: nn.Module, images: int, frozen: Container[str] = ()) -> None:
        """Take in the weights after a step of so many images; `frozen` ones did not take part."""
        learnt = learnt_parameters(net)
        live = {name: local(p).float() for name, p in learnt.items() if name not in frozen}
        generations = defaultdict(list)  # parameters of one age share their decay
        for name in live:
            generations[self.ages[name]].append(name)
            self.ages[name] += images
        for age, names in generations.items():
            values = [live[name] for name in names]
            for length, average in self.averages.items():
                decay = (age / (age + images)) ** (exponent(length) + 1)  # Section 3.1's beta
                averages = [local(average[name]) for name in names]
                get_ema_multi_avg_fn(decay)(averages, values, None)

    def state(self) -> dict[str, Tensor]:
        """Averages and ages as tensors, `<length>/weights/<name>` and `<length>/ages/<name>`.

        Empty where no length was asked for.
        """
        weights, ages = {}, {}
        for length, average in self.averages.items():
            weights |= {f"{length}/weights/{name}": value for name, value in average.items()}
            ages |= {f"{length}/ages/{name}": torch.tensor(age) for name, age in self.ages.items()}
        return weights | ages

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a `state`, whose names must be those of this one."""
        assert state.keys() == self.state().keys()
        for length, average in self.averages.items():
            fill(average, {name: state[f"{length}/weights/{name}"] for name in average})
            for name in average:
                self.ages[name] = int(state[f"{length}/ages/{name}"])


def write_snapshot(folder: Path, state: Mapping[str, Tensor], images_seen: int) -> None:
    """Put a state into `<folder>/<images seen>.safetensors`; nothing if there is no track.

    In float32: `posthoc` may weigh snapshots by ten and more against each other, which would make
    the 5e-4 of float16 visible, and what starts at zero is small beyond its range for long.

    Raises:
        OSError: it cannot be written; names the path and the reason.
    """
    if state:
        data = safetensors.torch.save({n: v.cpu().contiguous() for n, v in state.items()})
        path = folder / f"{images_seen:010d}.safetensors"
        write_atomically(path, lambda file: file.write(data), needed=len(data))
