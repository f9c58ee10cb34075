"""Random numbers are functions of (seed, purpose, counters): same in, same out, never shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from matryoshka_diffusion import rng

keys = st.tuples(
    st.integers(0, 2**63), st.text("ab/0", max_size=4), st.lists(st.integers(0, 2**63), max_size=3)
)


def first(seed, purpose, counters, count=4):
    return tuple(rng.stream(seed, purpose, *counters).integers(0, 2**63, count).tolist())


@given(keys, keys)
def test_equal_keys_give_equal_streams_and_other_keys_others(one, other):
    def padded(key):  # counters that are left out count as zero
        return key[0], key[1], (*key[2], *[0] * (3 - len(key[2])))

    assert first(*one) == first(*one)
    assert (first(*one) == first(*other)) == (padded(one) == padded(other))


def test_neighbouring_counters_do_not_overlap():
    """A stream that ran into the next one's would repeat its words somewhere in a long draw."""
    assert not set(first(0, "x", (5,), 20_000)) & set(first(0, "x", (6,), 20_000))


def test_these_numbers_never_change_and_touch_no_global_generator():
    """Old runs must resume and old seeds must draw the same images in later versions."""
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    assert rng.stream(7, "purpose", 1, 2, 3).integers(0, 1000, 4).tolist() == [8, 177, 350, 359]
    draws = {
        (-1.658136, -1.114922): rng.normal("purpose", [(7, 1)], (2,))[0],
        (0.206396, 0.386266): rng.uniform(7, "purpose", [1, 2]),
        (0.342772, 0.724738): rng.stratified(7, "purpose", torch.tensor([0, 1])),
    }
    for expected, numbers in draws.items():
        assert numbers.tolist() == pytest.approx(expected, abs=1e-6)
    assert rng.choose(1904, 5, "sheet").tolist() == [165, 284, 1043, 1222, 1712]
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(map(np.array_equal, np.random.get_state(), numpy_state))  # noqa: NPY002


def test_normal_numbers_are_normal_and_uniform_ones_belong_to_their_id():
    x = rng.normal("x", [(0, 1)], (3, 100, 100))
    assert (float(x.mean()), float(x.std())) == pytest.approx((0.0, 1.0), abs=0.02)
    one = rng.uniform(3, "x", [5, 9, 7])
    assert rng.uniform(3, "x", [7, 5]).tolist() == [one[2], one[0]]
    assert ((one >= 0) & (one < 1)).all()


def test_choices_are_different_indices_in_order():
    chosen = rng.choose(1904, 128, "retrieval")
    assert 0 <= chosen[0] <= chosen[-1] < 1904
    assert (np.diff(chosen) > 0).all()
    assert rng.choose(5, 5, "all").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="6 of 5"):
        rng.choose(5, 6, "all")


@given(st.integers(0, 2**31), st.integers(0, 10**9), st.integers(1, 300), st.integers(0, 300))
def test_any_run_of_ids_covers_the_interval_evenly(seed, start, count, cut):
    ids = torch.arange(start, start + count)
    t = rng.stratified(seed, "t", ids)
    assert ((t > 0) & (t <= 1)).all()
    ends = torch.cat([t.sort().values, t.min()[None] + 1.0])  # gaps around the circle
    assert ends.diff().max() * count < 2.2  # 1 if perfectly even; random numbers reach ln(count)
    parts = [rng.stratified(seed, "t", part) for part in (ids[:cut], ids[cut:])]
    assert torch.equal(torch.cat(parts), t), "the batches do not matter"
    assert not torch.equal(t, rng.stratified(seed + 1, "t", ids))
    assert not torch.equal(t, rng.stratified(seed, "u", ids))
