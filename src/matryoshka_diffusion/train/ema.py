"""The moving average of the weights, which is what samples are drawn from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from matryoshka_diffusion.train.optim import learnt_parameters
from matryoshka_diffusion.train.world import fill, local


class Ema:
    """An average of a network's learnt parameters over the last 1 / (1 - decay) steps, by name.

    Early on the decay is smaller, min(decay, (1 + s) / (10 + s)) after s steps of a parameter's own
    life; otherwise the average would consist of initial weights for thousands of steps, in a level
    that comes late most of all. It is kept in float32, and sharded where the network is: each rank
    averages its own part.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {}
        self.extend(net)

    def extend(self, net: nn.Module) -> None:
        """Take in parameters that are new, at their live values; the others keep their average."""
        known, live = self.weights, learnt_parameters(net)
        assert known.keys() <= live.keys(), "networks only grow"
        self.weights = {
            name: known[name] if name in known else value.detach().clone().float()
            for name, value in live.items()
        }

    @torch.no_grad()
    def update(
        self,
        net: nn.Module,
        steps: int,
        frozen: Container[str] = (),
        joined: Callable[[str], int] = lambda _: 0,
    ) -> None:
        """Move towards the live weights; `steps` is the number of optimizer steps before.

        Averages of parameters named in `frozen` stay where they are. `joined` says after how many
        steps a parameter came.
        """
        generations = defaultdict(list)  # parameters of one age share their decay
        for name, value in learnt_parameters(net).items():
            if name not in frozen:
                generations[joined(name)].append((self.weights[name], value))
        for came, pairs in generations.items():
            age = max(steps - came, 0)
            averages = [local(average) for average, _ in pairs]
            live = [local(value).float() for _, value in pairs]
            decay = min(self.decay, (1 + age) / (10 + age))
            get_ema_multi_avg_fn(decay)(averages, live, None)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the averages; the names must be those of the parameters."""
        assert weights.keys() == self.weights.keys()
        fill(self.weights, weights)
