"""Conditions move, are cut and are hidden together, and never change in place."""

from __future__ import annotations

import pytest
import torch

from matryoshka_diffusion.conditioning import Conditioning

ROWS = 4


def full() -> Conditioning:
    return Conditioning(
        labels=torch.arange(ROWS),
        tokens=torch.arange(ROWS * 6.0).reshape(ROWS, 3, 2),
        mask=torch.tensor([[True, True, False]] * ROWS),
        augment=torch.arange(ROWS * 7.0).reshape(ROWS, 7),
        micro={"scale": torch.arange(ROWS) * 10.0},
        dropped=torch.tensor([False, True, False, False]),
    )


def tensors(cond: Conditioning) -> dict[str, torch.Tensor]:
    named = {
        name: getattr(cond, name) for name in ("labels", "tokens", "mask", "augment", "dropped")
    }
    return {name: x for name, x in {**named, **cond.micro}.items() if x is not None}


def test_map_reaches_every_tensor_and_leaves_the_original():
    cond = full()
    before = {name: x.clone() for name, x in tensors(cond).items()}
    mapped = tensors(cond.map(lambda x: x[:0]))
    assert mapped.keys() == before.keys()
    assert all(len(x) == 0 for x in mapped.values())
    assert all(torch.equal(x, before[name]) for name, x in tensors(cond).items())


def test_an_empty_conditioning_stays_empty():
    for cond in (Conditioning().map(lambda x: x[:1]), Conditioning().to("cpu")):
        assert tensors(cond) == {}


def test_everything_moves_to_the_device():
    assert {x.device.type for x in tensors(full().to("meta")).values()} == {"meta"}


@pytest.mark.parametrize("selection", [slice(1, 3), torch.tensor([3, 0]), torch.arange(ROWS) > 1])
def test_rows_are_cut_from_every_tensor(selection):
    cut = tensors(full().rows(selection))
    assert all(torch.equal(cut[name], x[selection]) for name, x in tensors(full()).items())


def test_drops_add_up():
    cond = Conditioning(labels=torch.arange(ROWS))
    once = cond.drop(torch.tensor([True, False, False, False]))
    twice = once.drop(torch.tensor([False, False, True, False]))
    assert cond.dropped is None
    assert tensors(once)["dropped"].tolist() == [True, False, False, False]
    assert tensors(twice)["dropped"].tolist() == [True, False, True, False]


@pytest.mark.parametrize("kept", ["labels", "tokens"])
def test_null_hides_every_row(kept):
    cond = Conditioning(**{kept: getattr(full(), kept)})
    null = cond.null()
    assert tensors(null)["dropped"].tolist() == [True] * ROWS
    assert getattr(null, kept) is getattr(cond, kept)


def test_there_is_no_null_without_anything_to_hide():
    with pytest.raises(ValueError, match="nothing to guide by"):
        Conditioning().null()
    with pytest.raises(ValueError, match="nothing to guide by"):
        Conditioning(micro={"scale": torch.ones(2)}).null()


def test_a_conditioning_is_a_value():
    with pytest.raises(AttributeError):
        full().labels = None  # pyright: ignore[reportAttributeAccessIssue]
