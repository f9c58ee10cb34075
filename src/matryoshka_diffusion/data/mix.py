"""Several data sets in one run, each with a share: which one gives sample n, and one source of all.

They take turns by a fixed pattern, so that sample n of a run stays a function of n, and no part
drifts from its share as draws by chance do.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from matryoshka_diffusion.config import ConfigError, DataConfig
from matryoshka_diffusion.data.augment import Cut
from matryoshka_diffusion.data.bad import Quarantine
from matryoshka_diffusion.data.source import Picture, Source
from matryoshka_diffusion.data.spellings import sorted_classes

_LARGEST_DENOMINATOR = 10**6  # of shares: exact arithmetic, whatever n is


def turn(n: int, shares: Sequence[float]) -> tuple[int, int]:
    """Part that gives sample n, and the number of samples that this part has given before.

    Of the first n samples, each part has given its share to within the number of parts.
    """
    parts = [Fraction(share).limit_denominator(_LARGEST_DENOMINATOR) for share in shares]
    left = sum(parts, Fraction())
    for part, share in enumerate(parts[:-1]):
        before, after = (int(count * share / left) for count in (n, n + 1))
        if after > before:
            return part, before
        n, left = n - before, left - share
    return max(len(parts) - 1, 0), n


def key_of(part: int) -> str:
    """Key in the config of the part with this number."""
    return f"data.mix[{part}]"


def mixed(parts: Sequence[Source], data: DataConfig) -> Source:
    """One source of the samples of all parts. Keys begin with the number of the part.

    Classes are the same if their names are. Raises ConfigError if some parts have captions or
    classes and others do not.
    """
    for words, option in (("captions", "captions=none"), ("classes", "columns.label=''")):
        have = [bool(getattr(part, words)) for part in parts]
        if any(have) and not all(have):
            bare = have.index(False)
            ignored = (f'--set "{key_of(n)}.{option}"' for n, has in enumerate(have) if has)
            raise ConfigError(
                f"{key_of(bare)}: {parts[bare].name} has no {words}, and other parts have: give "
                f"every part some, or ignore them ({' '.join(ignored)})"
            )
    names = sorted_classes({name for part in parts for name in part.classes})
    names = data.classes if {*names} <= {*data.classes} else names
    samples = [
        sample._replace(
            key=f"{number}:{sample.key}",
            part=number,
            label=None if sample.label is None else names.index(part.classes[int(sample.label)]),
        )
        for number, part in enumerate(parts)
        for sample in part.samples
    ]
    shares = [part.share / sum(one.share for one in data.mix) for part in data.mix]
    name = " + ".join(f"{share:.0%} {part.name}" for share, part in zip(shares, parts, strict=True))
    bad = [
        file._replace(path=f"{number}:{file.path}")
        for number, part in enumerate(parts)
        for file in part.bad
    ]
    starts = [0, *accumulate(map(len, parts))]

    def read(n: int, cut: Cut) -> Picture:
        part = bisect_right(starts, n) - 1
        return parts[part].read(n - starts[part], cut)

    return Source(
        name,
        samples,
        read,
        Quarantine(name, bad, sum(part.total for part in parts), data.max_bad_fraction),
        parts[0].shapes,
        frames=parts[0].frames,
        channels=parts[0].channels,
        classes=names,
        threads=max(part.threads for part in parts),
        unused=tuple(
            one.below(key_of(number)) for number, part in enumerate(parts) for one in part.unused
        ),
        shares=tuple(shares),
    )
