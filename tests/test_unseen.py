"""The metric of pairs that were not seen: models that draw the right image, a copy, or another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluating import looks, model, recalling, source
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.data.source import Source, joined, split
from matryoshka_diffusion.eval import unseen
from matryoshka_diffusion.eval.evaluate import evaluate
from matryoshka_diffusion.metrics.errors import share_error
from matryoshka_diffusion.metrics.nearest import nearest_images

COUNT, SHARE = 40, 0.3


def styled() -> Source:
    """20 things, each in two styles: the classes of neighbours."""
    known = source(COUNT)
    samples = [one._replace(concept=str(n // 2)) for n, one in enumerate(known.samples)]
    return replace(known, samples=samples)


def pictures(known: Source, order) -> np.ndarray:
    return np.stack([known[n].picture for n in order])


@pytest.mark.parametrize(
    ("drawn", "found", "copied", "in_style"),
    [
        (lambda n: n, 1.0, 0.0, 1.0),  # the held-out image itself
        (lambda n: n ^ 1, 0.0, 1.0, 0.0),  # the same thing in the other style
        (lambda n: (n + 20) % COUNT, 0.0, 0.0, 1.0),  # another thing in the same style
        (lambda n: (n + 21) % COUNT, 0.0, 0.0, 0.0),
    ],
)
def test_shares_and_sheet(drawn, found, copied, in_style, tmp_path, monkeypatch):
    rows: list = []
    draw = unseen.grid
    monkeypatch.setattr(unseen, "grid", lambda new, **how: rows.extend(new) or draw(new, **how))
    monkeypatch.setattr(unseen, "SHEET", 4)
    known = styled()
    seen, held_out = split(known, SHARE)
    assert held_out is not None
    count = len(held_out)
    oracle = recalling(pictures(known, map(drawn, range(COUNT))))
    how = {"source": seen, "held_out": held_out, "folder": tmp_path, "networks": looks()}
    [number, again] = evaluate(oracle, "unseen,unseen-fd", **how)
    assert (number.value, number.n, number.error) == (found, count, share_error(found, count))
    shares = [number.others[name] for name in ("copies of another style", "in its style")]
    assert shares == [copied, in_style]
    assert number.errors["in its style"] == share_error(in_style, count)
    assert number.others["by chance"] == 1 / COUNT
    assert number.others["copies by chance"] == pytest.approx(1 / COUNT)  # one other style
    assert number.others["in its style by chance"] == pytest.approx(0.5)
    assert (again.value, again.metric) == (found, "unseen retrieval-EffNetLite0")
    # On the sheet: the sample, its held-out image and the other style.
    assert len(rows) == 2 * 4
    for row, (sample, own, other) in enumerate(rows[:4]):
        place = known.keys.index(held_out.keys[row * count // 4])
        assert (known[place].picture == own).all()
        assert (known[drawn(place)].picture == sample).all()
        assert (known[place ^ 1].picture == other).all()
    for one in (number, again):
        assert Path(one.sheet).is_file()
        assert one.sentence().endswith(f" ({one.sheet})")
    drawn_once = len(rows)
    evaluate(oracle, "unseen", **how)
    assert len(rows) == drawn_once


def test_an_image_with_a_twin_is_not_found():
    images = np.array([[0.0], [4.0], [4.0], [9.0]])
    nearest = nearest_images(np.array([[0.1], [4.2], [9.0]]), np.array([0, 2, 1]), images)
    assert nearest.image.tolist() == [0, 1, 3]
    assert nearest.nearer.tolist() == [0, 1, 2]


def test_both_parts_of_a_split_are_joined_again():
    known = styled()
    seen, held_out = split(known, SHARE)
    assert held_out is not None
    whole = joined(seen, held_out)
    assert sorted(whole.keys) == sorted(known.keys)
    for n, key in enumerate(whole.keys):
        assert (whole[n].picture == known[known.keys.index(key)].picture).all()


def test_what_lacks_styles_or_held_out_images_is_refused(tmp_path):
    seen, held_out = split(source(COUNT), SHARE)
    with pytest.raises(UsageError, match="unseen needs the same things in several styles"):
        evaluate(model("text"), "unseen", source=seen, held_out=held_out, folder=tmp_path)
    with pytest.raises(UsageError, match=r"data\.held_out is 0\): omit unseen"):
        evaluate(model("text"), "unseen", source=styled(), folder=tmp_path)
