"""What ranks compare before they train: one run, one data set, and nothing random in common."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.configfile import to_yaml
from matryoshka_diffusion.train.feed import Inputs
from matryoshka_diffusion.train.world import World


class RanksDiffer(RuntimeError):
    """The ranks do not work on the same run, or two of them on the same samples."""


def compare_ranks(world: World, config: RunConfig, inputs: Inputs) -> None:
    """Look at every rank's first inputs; a collective.

    Raises:
        RanksDiffer: another config or place of the run than rank 0's, or two ranks hold the same
            sample or the same noise: they would count one gradient twice.
    """
    run = hashlib.sha256(f"{to_yaml(config)}{inputs.step}".encode()).hexdigest()
    noise = [hashlib.sha256(row.cpu().numpy().tobytes()).hexdigest() for row in inputs.noise[0]]
    found = world.gather((run, inputs.ids, noise))
    for rank, (other, _, _) in enumerate(found):
        if other != found[0][0]:
            raise RanksDiffer(
                f"rank {rank} was started with another config or checkpoint than rank 0: give "
                "every rank the same command and a run folder that all of them see"
            )
    owner: dict[object, int] = {}
    for rank, (_, ids, noises) in enumerate(found):
        for what in (*ids, *noises):
            if owner.setdefault(what, rank) != rank:
                raise RanksDiffer(
                    f"ranks {owner[what]} and {rank} were given the same sample or noise ({what}): "
                    "every rank needs a number of its own (RANK)"
                )


def compare_data(world: World, keys: Sequence[str]) -> None:
    """Look at what every rank's data is called; a collective.

    Raises:
        RanksDiffer: a rank has other pictures, or others come first.
    """
    if world.size == 1:
        return
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key.encode("utf-8", "surrogatepass") + b"\0")
    found = world.gather((len(keys), digest.hexdigest()))
    for rank, other in enumerate(found):
        if other != found[0]:
            raise RanksDiffer(
                f"rank {rank} was given other data than rank 0 ({other[0]:,} pictures and "
                f"{found[0][0]:,}): every machine needs the same files under --data"
            )
