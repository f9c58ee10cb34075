"""Noise is Philox's, the same on every device, and normal."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from matryoshka_diffusion import philox
from matryoshka_diffusion.philox import Place, blocks, fill_on_device, normal_rows

WORD = 2**64 - 1
PLACES = [Place.of(seed, "noise", (row, 3)) for seed in (0, 1) for row in range(4)]

counters = st.lists(st.integers(0, WORD), max_size=3)


def drawn(places: list[Place], count: int) -> torch.Tensor:
    return normal_rows([[place] for place in places], [count], "cpu")[0]


def numbers(places: list[Place], count: int) -> np.ndarray:
    return drawn(places, count).double().numpy()


@given(st.lists(st.tuples(st.integers(0, WORD), counters), min_size=1, max_size=3))
def test_a_device_computes_the_words_of_numpys_philox(rows):
    places = [Place.of(seed, "x", own) for seed, own in rows]
    pairs = [[place, place._replace(counters=place.counters[::-1].copy())] for place in places]
    words = blocks(pairs, [3, 2], "cpu").numpy().view(np.uint64)
    for row, pair in zip(words, pairs, strict=True):
        for own, place in zip((row[:3], row[3:]), pair, strict=True):
            expected = place.generator().integers(0, WORD, own.size, np.uint64, endpoint=True)
            assert np.array_equal(own.ravel(), expected)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 3 * philox.CHUNK + 5])
def test_both_ways_to_draw_give_the_same_numbers(count, monkeypatch):
    alone = drawn(PLACES, count)
    other = [Place.of(0, "noise", (5,))] * 4 + [Place.of(1, "noise", (5,))] * 4
    parts = [torch.empty(len(PLACES), 2, -(-size // 16) * 8) for size in (33, count)]
    fill_on_device(parts, [*map(list, zip(other, PLACES, strict=True))])
    assert alone.shape == (len(PLACES), count)
    torch.testing.assert_close(parts[1].flatten(1)[:, :count], alone, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts[0].flatten(1)[:, :33], drawn(other, 33), rtol=1e-6, atol=1e-6)
    monkeypatch.setattr(philox, "SERIAL", 0)
    with limited_to(3):
        assert torch.equal(drawn(PLACES, count), alone)
        assert torch.equal(drawn(PLACES[3:], count), alone[3:]), "rows are independent"


@contextmanager
def limited_to(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    yield
    assert torch.get_num_threads() == threads, "drawing leaves it as it was"
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_threads_compute_than_torch_may_use(threads, monkeypatch):
    transform, seen = philox._box_muller, set()

    def watched(*arguments) -> None:
        seen.add((threading.get_ident(), torch.get_num_threads()))
        transform(*arguments)

    monkeypatch.setattr(philox, "_box_muller", watched)
    with limited_to(threads):
        drawn(PLACES, 32 * philox.CHUNK)
    assert {limit for _, limit in seen} == {1}, "an operation starts threads of its own"
    assert len(seen) <= threads
    assert (threading.get_ident() in {thread for thread, _ in seen}) == (threads == 1)


def test_streams_of_several_keys_are_no_row():
    """A GPU would take the first key for all of them."""
    with pytest.raises(AssertionError, match="one key"):
        normal_rows([[Place.of(0, "x", ()), Place.of(1, "x", ())]], [8, 8], "cpu")


def test_no_rows_are_no_numbers():
    assert drawn([], 5).shape == (0, 5)
    fill_on_device([torch.empty(0, 2, 8)], [])


def test_numbers_are_normal_and_independent():
    """Moments within 4 standard errors; a Kolmogorov-Smirnov distance far below 1 % risk."""
    x = numbers(PLACES, 250_000)
    n = x.size
    for order, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**order).mean() - moment) < 4 * math.sqrt(variance / n), order
    ordered = np.sort(x.ravel())
    normal = special.ndtr(ordered)
    steps = np.arange(n + 1) / n
    distance = max((steps[1:] - normal).max(), (normal - steps[:-1]).max())
    assert distance * math.sqrt(n) < 1.63
    assert 4.7 < ordered[-1] < 6.7
    assert -6.7 < ordered[0] < -4.7


def test_numbers_have_no_correlation_with_their_neighbours_nor_with_other_streams():
    x = numbers(PLACES, 250_000)
    bound = 4 / math.sqrt(x.shape[1])
    half = x.shape[1] // 2
    for lag in (1, 2, 7, 8, 16, philox.CHUNK, half):
        assert (np.abs((x[:, lag:] * x[:, :-lag]).mean(1)) < 1.5 * bound).all(), lag
        squares = (x[:, lag:] ** 2 - 1) * (x[:, :-lag] ** 2 - 1) / 2
        assert (np.abs(squares.mean(1)) < 3 * bound).all(), lag
    between = x @ x.T / x.shape[1] - np.diag((x**2).mean(1))
    assert np.abs(between).max() < bound
