"""Averages of the weights: the one that samples are drawn from, and one of any length afterwards.

The second is that of Karras et al. 2023 (arXiv 2312.02696), Section 3: its memory is a fixed share
of the training so far. Snapshots of two of them, taken now and then, span all others (Appendix C):
an average is its profile, a density over training time, and those of the snapshots are fitted to
the wanted one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from matryoshka_diffusion.config import UNIFORM, RunConfig
from matryoshka_diffusion.files import BrokenFile, write_atomically
from matryoshka_diffusion.nn.nested import learnt_parameters
from matryoshka_diffusion.training.checkpoint import Stored
from matryoshka_diffusion.training.distributed import fill, local


def _extended(known: Mapping[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Averages of all learnt parameters: new ones start at their live values, in float32."""
    live = learnt_parameters(net)
    assert known.keys() <= live.keys(), "networks only grow"
    return {
        name: known[name] if name in known else value.detach().clone().float()
        for name, value in live.items()
    }


@torch.no_grad()
def _move(averages: Mapping[str, Tensor], net: nn.Module, decays: Mapping[str, float]) -> None:
    """Move averages towards this rank's part of the weights; those of one decay in one call."""
    live, groups = learnt_parameters(net), defaultdict(list)
    for name, decay in decays.items():
        groups[decay].append(name)
    for decay, names in groups.items():
        values = [local(live[name]).float() for name in names]
        get_ema_multi_avg_fn(decay)([local(averages[name]) for name in names], values, None)


class Ema:
    """Average of the learnt parameters over the last 1 / (1 - decay) steps, as `weights` by name.

    After s steps of a parameter's own life the decay is min(decay, (1 + s) / (10 + s)), so that
    initial weights are soon forgotten, also in a level that comes late.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = _extended({}, net)

    def extend(self, net: nn.Module) -> None:
        """Take in new parameters at their live values; the others keep their average."""
        self.weights = _extended(self.weights, net)

    def update(
        self,
        net: nn.Module,
        steps: int,
        frozen: Container[str] = (),
        joined: Callable[[str], int] = lambda name: 0,
    ) -> None:
        """Move towards the live weights, except for `frozen` names.

        `steps` counts the optimizer steps before this one, `joined` those before a parameter came.
        """
        ages = {name: max(steps - joined(name), 0) for name in self.weights if name not in frozen}
        decays = {name: min(self.decay, (1 + s) / (10 + s)) for name, s in ages.items()}
        _move(self.weights, net, decays)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the averages; the names must be those of the parameters."""
        assert weights.keys() == self.weights.keys()
        fill(self.weights, weights)


# --- tracks: power-function averages -----------------------------------------------------------


def exponent(length: float) -> float:
    """Gamma of the profile t^gamma whose standard deviation is `length` of the training.

    The one positive root of length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), Section 3.1.
    Raises ValueError if the length is not between 0 and `UNIFORM`.
    """
    if not 0.0 < length < UNIFORM:
        raise ValueError(f"an average has a length between 0 and {UNIFORM:.4f}, not {length:g}")
    inverse = length**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


class PowerEma:
    """Averages of the learnt parameters under power-function profiles, one for each length.

    A parameter's time is the number of images that it has learnt from (`ages`). So a later
    parameter has the profile over its own life, and steps that skipped it or left it alone do not
    count. After t images the average is the integral over s in [0, t] of
    (gamma + 1) s^gamma / t^(gamma + 1) times the parameter at s, for any batch sizes.
    """

    def __init__(self, net: nn.Module, lengths: Sequence[float]) -> None:
        self.averages: dict[float, dict[str, Tensor]] = {length: {} for length in lengths}
        self.ages: dict[str, int] = {}
        self.extend(net)

    def extend(self, net: nn.Module) -> None:
        """Take in new parameters, whose age is 0."""
        self.ages = {name: self.ages.get(name, 0) for name in learnt_parameters(net)}
        self.averages = {length: _extended(x, net) for length, x in self.averages.items()}

    def update(self, net: nn.Module, images: int, frozen: Container[str] = ()) -> None:
        """Take in the weights after a step of so many images, which left `frozen` names alone."""
        moved = {name: age for name, age in self.ages.items() if name not in frozen}
        for length, averages in self.averages.items():
            power = exponent(length) + 1  # Section 3.1's beta
            _move(averages, net, {n: (age / (age + images)) ** power for n, age in moved.items()})
        self.ages |= {name: age + images for name, age in moved.items()}

    def state(self) -> dict[str, Tensor]:
        """Averages and ages as tensors `<length>/weights/<name>`, `<length>/ages/<name>`."""
        weights, ages = {}, {}
        for length, averages in self.averages.items():
            weights |= {f"{length}/weights/{name}": value for name, value in averages.items()}
            ages |= {f"{length}/ages/{name}": torch.tensor(age) for name, age in self.ages.items()}
        return weights | ages

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a `state`, whose names must be those of this one."""
        assert state.keys() == self.state().keys()
        for length, averages in self.averages.items():
            fill(averages, {name: state[f"{length}/weights/{name}"] for name in averages})
            self.ages = {name: int(state[f"{length}/ages/{name}"]) for name in averages}


def write_snapshot(folder: Path, state: Mapping[str, Tensor], images_seen: int) -> None:
    """Write a state of `PowerEma` to `<folder>/<images seen>.safetensors`; nothing if it is empty.

    Float32, because synthesis may weigh snapshots by ten and more against each other.
    """
    if state:
        data = safetensors.torch.save({n: v.cpu().contiguous() for n, v in state.items()})
        path = folder / f"{images_seen:010d}.safetensors"
        write_atomically(path, lambda file: file.write(data), needed=len(data))


# --- an average of any length, after training --------------------------------------------------


class Profile(NamedTuple):
    """The density (gamma + 1) s^gamma / age^(gamma + 1) on [0, age]."""

    gamma: float
    age: float


class Average(NamedTuple):
    """Averaged weights by name, and the largest error of a `fit` that went into them."""

    weights: dict[str, Tensor]
    error: float


def average_of(config: RunConfig, length: float) -> RunConfig:
    """Config of a model whose weights are a run's average of this length."""
    train = config.train.model_copy(update={"averaged": length})
    return config.model_copy(update={"train": train})


def inner(a: Profile, b: Profile) -> float:
    """Integral of the product of two profiles (Appendix C)."""
    young, old = (a, b) if a.age <= b.age else (b, a)
    scale = (young.gamma + 1) * (old.gamma + 1) / (young.gamma + old.gamma + 1)
    return scale * (young.age / old.age) ** old.gamma / old.age


def fit(profiles: Sequence[Profile], wanted: Profile) -> tuple[Float[np.ndarray, " n"], float]:
    """Least-squares combination of `profiles`: factors that sum to 1, and what is missed.

    The error is the root of the integral of the squared difference, as a share of the wanted
    profile's. The paper leaves the sum to the fit. Fixing it keeps a weight that does not move as
    it is, which matters where snapshots are few: two of them would lose 3 % of it.
    """
    gram = np.array([[inner(a, b) for b in profiles] for a in profiles])
    towards = np.array([inner(profile, wanted) for profile in profiles])
    # A Lagrange multiplier for the sum; by the wanted age, all entries are of the order of 1.
    ones = np.ones((len(profiles), 1))
    system = np.block([[gram * wanted.age, ones], [ones.T, np.zeros((1, 1))]])
    right = np.append(towards * wanted.age, 1.0)
    factors = np.linalg.lstsq(system, right, rcond=None)[0][:-1]
    norm = inner(wanted, wanted)
    left_over = norm - 2 * factors @ towards + factors @ gram @ factors
    return factors, float(np.sqrt(max(left_over, 0.0) / norm))


def synthesise(folder: Path, length: float, until: int | None = None) -> Average:
    """Make the average of this length at the newest snapshot in `folder`.

    Each parameter's length is relative to its own life, as in `PowerEma`. With `until` it is the
    average at the newest snapshot of at most so many images seen.

    Raises:
        FileNotFoundError: there are no snapshots, or none so early.
        ValueError: a snapshot is damaged, or there is no average of this length.
    """
    gamma, paths = exponent(length), sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(
            f"{folder}: no snapshots of averages; train with --set train.ema_power=[0.05,0.1]"
        )
    early = [path for path in paths if until is None or int(path.stem) <= until]
    if not early:
        raise FileNotFoundError(
            f"{folder}: the first snapshot is of {int(paths[0].stem)} images: set --until to that, "
            "or higher"
        )
    snapshots = [_opened(path) for path in early]
    last = snapshots[-1]
    generations = defaultdict(list)  # parameters with the same ages share their fit
    for name in last.ages:
        generations[tuple(snapshot.ages.get(name, 0) for snapshot in snapshots)].append(name)
    weights, error = {}, 0.0
    for ages, names in generations.items():
        # By length and age: two snapshots of one age hold the same average.
        sources = {
            (track, age): snapshot
            for snapshot, age in zip(snapshots, ages, strict=True)
            for track in snapshot.tracks
            if age > 0
        }
        factors, missed = np.ones(1), 0.0
        if sources:
            profiles = [Profile(exponent(track), age) for track, age in sources]
            factors, missed = fit(profiles, Profile(gamma, max(ages)))
        else:  # it never learnt, so it is its own average
            sources = {(last.tracks[0], 0): last}
        error = max(error, missed)
        for name in names:
            total = torch.zeros((), dtype=torch.float64)
            for factor, ((track, _), snapshot) in zip(factors, sources.items(), strict=True):
                total = total + float(factor) * snapshot.tensors[f"{track}/weights/{name}"].double()
            weights[name] = total.float()
    return Average(weights, error)


class _Snapshot(NamedTuple):
    """A file of `write_snapshot`: its tensors, its lengths, and the ages of parameters."""

    tensors: Stored
    tracks: list[float]
    ages: dict[str, int]


def _opened(path: Path) -> _Snapshot:
    tensors = Stored([path])
    try:
        tracks = sorted({float(key.split("/", 2)[0]) for key in tensors})
        names = sorted({key.split("/", 2)[2] for key in tensors})
    except (ValueError, LookupError) as error:
        raise BrokenFile(f"{path}: no snapshot of averages ({error})") from error
    for kind in ("ages", "weights"):
        for key in (f"{track}/{kind}/{name}" for track in tracks for name in names):
            if key not in tensors:
                raise BrokenFile(f"{path}: {key} is missing: remove the file to do without it")
    ages = {name: int(tensors[f"{tracks[0]}/ages/{name}"]) for name in names}
    return _Snapshot(tensors, tracks, ages)
