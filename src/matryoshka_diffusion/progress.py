"""Progress of work in Python: a callable of the user's, or a bar."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with (amount done, amount in all)."""


def shown(progress: Progress | bool | None, unit: str) -> Progress | None:
    """The callable to report to: `True` stands for a bar on stderr, `False` for none."""
    if not isinstance(progress, bool):
        return progress
    if not progress:
        return None
    from tqdm import tqdm

    bar = tqdm(unit=f" {unit}", leave=False)

    def report(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done >= total:
            bar.refresh()  # a quick one too is seen at its end
            bar.close()

    return report
