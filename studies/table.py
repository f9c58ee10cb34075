"""The groups of results as Markdown, for docs/results.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

from matryoshka_diffusion.metrics.networks import NAME
from studies.groups import GROUPS, TITLES, Group
from studies.spread import (
    Result,
    Results,
    Spread,
    against,
    by_seed,
    distance,
    found_first,
    seeds_of,
)
from studies.trials import SETS, PictureSet

FAILED = "failed: not finite"
OTHER_LOSSES = ("levels-", "shift-power-", "finest", "eps-")
"""Variants whose losses are not those of the others: another number of levels, of other noise, of
predictions that nobody trained, or of an x that is the prediction divided by a signal near 0."""

PLACE = re.compile(r"(?s)(<!-- table (\S+) (\S+) -->\n).*?(<!-- /table -->)")
"""Where a page has a table, by the names of its group and of its set of pictures."""

Row = dict[str, str]


def filled(page: str, results: Results) -> str:
    """The page with each of its tables replaced by that of the results.

    Raises:
        KeyError: the page asks for a group or a set of pictures that there is not.
    """
    return PLACE.sub(
        lambda found: f"{found[1]}{table(results, GROUPS[found[2]], SETS[found[3]])}\n{found[4]}",
        page,
    )


def tables(results: Results) -> str:
    """A section for each group, in it a table for each set of pictures that has results of it."""
    sections = []
    for group in GROUPS.values():
        parts = [part for each in SETS.values() if (part := table(results, group, each))]
        if parts:
            sections.append("\n\n".join([f"### {group.title}", *parts]))
    return "\n\n".join(sections)


def table(results: Results, group: Group, pictures: PictureSet) -> str:
    """What was measured, and a row for each variant that has a result; empty if only the base has.

    Numbers are means over seeds, with the range of the distances. A column that no row fills is
    left out.
    """
    there = {
        value: variant
        for value, variant in group.variants(pictures).items()
        if by_seed(results, pictures.name, variant)
    }
    if not {*there.values()} - {group.base}:
        return ""
    rows = [_row(results, group, pictures, *each) for each in there.items()]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    head = ": ".join([TITLES[pictures.name], *_metrics(results, pictures, [*there.values()])])
    return "\n".join([head, "", *("| " + " | ".join(line) + " |" for line in lines)])


def _row(results: Results, group: Group, pictures: PictureSet, value: str, variant: str) -> Row:
    done = seeds_of(results, pictures.name, variant)
    failed = len(by_seed(results, pictures.name, variant)) - len(done)
    change = against(results, pictures.name, variant, group.base)
    final, found = distance(done), found_first(done)
    return {
        group.varied: value,
        NAME: FAILED if final is None else told(final),
        "against the base": "the base" if variant == group.base else _told_change(change),
        "seeds": f"{len(done)}, {failed} {FAILED}" if done and failed else str(len(done) + failed),
        "prompts found": "" if found is None else told(found),
        "held-out loss": "" if variant.startswith(OTHER_LOSSES) else _losses(done),
        "parameters": _parameters(done),
        "wall seconds": _mean(done, "seconds"),
        "evaluations a sample": _mean(done, "evaluations"),
    }


def _told_change(change: Spread | None) -> str:
    """A change in per cent, with the range where there are several seeds.

    >>> _told_change(Spread(0.05, -0.011, 0.1, 2)), _told_change(Spread(-0.2, -0.2, -0.2, 1))
    ('+5.0% (-1.1 to +10.0)', '-20.0%')
    """
    if change is None:
        return ""
    mean, low, high = (f"{100 * x:+.1f}" for x in change[:3])
    return f"{mean}%" if change.count == 1 else f"{mean}% ({low} to {high})"


def _losses(results: Sequence[Result]) -> str:
    """The held-out loss at each side, the mean over seeds."""
    losses = [each for x in results if (each := x.get("held_out_loss"))]
    sides = losses[0] if losses else ()
    return ", ".join(f"{side}: {fmean(loss[side] for loss in losses):.3g}" for side in sides)


def _mean(results: Sequence[Result], key: str) -> str:
    """The mean over seeds of what trainings have, or drawings."""
    found = [x[key] for x in results if key in x]
    return f"{fmean(found):,.0f}" if found else ""


def _parameters(results: Sequence[Result]) -> str:
    """Of each network that was trained; drawings train none."""
    counts = results[0].get("parameters", ()) if results else ()
    return " + ".join(f"{count / 1e6:.2g} M" for count in counts)


def _metrics(results: Results, pictures: PictureSet, variants: Sequence[str]) -> list[str]:
    """What the distances of the variants are."""
    found = [x["metric"] for each in variants for x in seeds_of(results, pictures.name, each)]
    return list(dict.fromkeys(found))


def told(spread: Spread) -> str:
    """The mean, and the range where there are several seeds.

    >>> told(Spread(2.0, 1.0, 3.5, 2)), told(Spread(1234.5, 1234.5, 1234.5, 1))
    ('2 (1 to 3.5)', '1,234')
    """
    mean, low, high = (f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}" for x in spread[:3])
    return mean if spread.count == 1 else f"{mean} ({low} to {high})"
