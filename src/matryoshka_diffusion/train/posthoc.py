"""The averaged weights of any length, made from snapshots of a few lengths after training.

Appendix C of arXiv 2312.02696: an average is its profile, a density over training time. The wanted
profile is fitted by the profiles of the snapshots, and the weights are combined as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.nn.nested import renamed
from matryoshka_diffusion.train.ema_power import exponent


class Profile(NamedTuple):
    """The density (gamma + 1) s^gamma / age^(gamma + 1) on [0, age]."""

    gamma: float
    age: float


class Fit(NamedTuple):
    """Factors of some profiles, and how far their sum is from the wanted one.

    `error` is the root of the integral of the squared difference, as a share of the wanted one's.
    """

    factors: Float[np.ndarray, " n"]
    error: float


class Average(NamedTuple):
    """Averaged weights by name, and the largest `Fit.error` that went into them."""

    weights: dict[str, Tensor]
    error: float


def average_of(config: RunConfig, length: float) -> RunConfig:
    """The config of a model whose weights are a run's average of this length."""
    train = config.train.model_copy(update={"averaged": length})
    return config.model_copy(update={"train": train})


def inner(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles (Appendix C)."""
    young, old = (a, b) if a.age <= b.age else (b, a)
    scale = (young.gamma + 1) * (old.gamma + 1) / (young.gamma + old.gamma + 1)
    return scale * (young.age / old.age) ** old.gamma / old.age


def fit(profiles: Sequence[Profile], wanted: Profile) -> Fit:
    """The least-squares combination of `profiles` whose factors sum to 1.

    The paper leaves the sum to the fit. Fixing it keeps a weight that does not move as it is,
    which matters where snapshots are few: two of them would lose 3 % of it.
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
    return Fit(factors, float(np.sqrt(max(left_over, 0.0) / norm)))


def synthesise(folder: Path, length: float) -> Average:
    """The average of this length at the newest snapshot in `folder`.

    Each parameter's length is relative to its own life, as in `PowerEma`.

    Raises:
        FileNotFoundError: there are no snapshots.
        ValueError: a snapshot is damaged, or there is no average of this length.
    """
    gamma = exponent(length)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(
            f"{folder}: no snapshots of averages; train with --set train.ema_power=[0.05,0.1]"
        )
    with ExitStack() as stack:
        snapshots = [stack.enter_context(_Snapshot(path)) for path in paths]
        weights, error = {}, 0.0
        for history, names in _generations(snapshots).items():
            found = _sources(snapshots, history)
            wanted = Profile(gamma, max(age for _, age in history))
            if not found:  # it never learnt: what it was is what it is
                weights |= {name: snapshots[-1].any_average(name) for name in names}
                continue
            factors, missed = fit([Profile(exponent(track), age) for track, age in found], wanted)
            error = max(error, missed)
            for name in names:
                total = torch.zeros((), dtype=torch.float64)
                for factor, ((track, _), snapshot) in zip(factors, found.items(), strict=True):
                    total = total + float(factor) * snapshot.average(track, name).double()
                weights[name] = total.float()
    return Average(weights, error)


History = tuple[tuple[int, int], ...]
"""The snapshots, by place, that hold a parameter, and how old it is in each."""


def _generations(snapshots: Sequence[_Snapshot]) -> dict[History, list[str]]:
    """The parameters of the newest snapshot, those with one history together."""
    ages = [snapshot.ages() for snapshot in snapshots]
    generations = defaultdict(list)
    for name in ages[-1]:
        history = tuple((place, known[name]) for place, known in enumerate(ages) if name in known)
        generations[history].append(name)
    return generations


def _sources(
    snapshots: Sequence[_Snapshot], history: History
) -> dict[tuple[float, int], _Snapshot]:
    """By length and age, a snapshot that has this average; two of one age are the same one."""
    return {
        (track, age): snapshots[place]
        for place, age in history
        if age > 0
        for track in snapshots[place].tracks
    }


class _Snapshot:
    """A file of `ema_power.write_snapshot`, read a tensor at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _Snapshot:
        try:
            self._file: Any = safe_open(self.path, "pt").__enter__()
        except SafetensorError as error:
            raise ValueError(f"{self.path}: damaged or no safetensors file ({error})") from error
        self._stored = {renamed(key): key for key in self._file.keys()}  # noqa: SIM118
        self._keys = [key.split("/", 2) for key in self._stored]
        self.tracks = sorted({float(track) for track, _, _ in self._keys})
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def ages(self) -> dict[str, int]:
        """How many images each parameter had learnt from."""
        names = [name for track, kind, name in self._keys if kind == "ages"]
        return {n: int(self._read(f"{self.tracks[0]}/ages/{n}")) for n in names}

    def average(self, track: float, name: str) -> Tensor:
        return self._read(f"{track}/weights/{name}")

    def any_average(self, name: str) -> Tensor:
        return self.average(self.tracks[0], name)

    def _read(self, key: str) -> Tensor:
        return self._file.get_tensor(self._stored[key])
