"""Conditions move, are cut and are hidden together, and never change in place."""

from __future__ import annotations

import pytest
import torch

from matryoshka_diffusion.conditioning import TENSORS, Conditioning, equally_long

ROWS = 4


def full() -> Conditioning:
    return Conditioning(
        labels=torch.arange(ROWS),
        tokens=torch.arange(ROWS * 6.0).reshape(ROWS, 3, 2),
        mask=torch.tensor([[True, True, False]] * ROWS),
        augment=torch.arange(ROWS * 7.0).reshape(ROWS, 7),
        image=torch.arange(ROWS * 12.0).reshape(ROWS, 3, 2, 2),
        image_t=torch.arange(ROWS) / ROWS,
        micro={"scale": torch.arange(ROWS) * 10.0},
        dropped=torch.tensor([False, True, False, False]),
    )


def tensors(cond: Conditioning) -> dict[str, torch.Tensor]:
    named = {name: getattr(cond, name) for name in TENSORS}
    return {name: x for name, x in {**named, **cond.micro}.items() if x is not None}


def test_every_field_is_mapped_and_the_original_stays():
    assert set(TENSORS) | {"micro"} == set(vars(full()))
    cond = full()
    before = {name: x.clone() for name, x in tensors(cond).items()}
    assert all(len(x) == 0 for x in tensors(cond.map(lambda x: x[:0])).values())
    assert all(torch.equal(x, before[name]) for name, x in tensors(cond).items())
    assert {x.device.type for x in tensors(cond.to("meta")).values()} == {"meta"}
    assert tensors(Conditioning().map(lambda x: x[:1])) == {}
    with pytest.raises(AttributeError):
        cond.labels = None  # pyright: ignore[reportAttributeAccessIssue]


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


@pytest.mark.parametrize("cond", [Conditioning(), Conditioning(micro={"scale": torch.ones(2)})])
def test_there_is_no_null_without_anything_to_hide(cond):
    with pytest.raises(ValueError, match="nothing to guide by"):
        cond.null()


def test_texts_become_equally_long_and_lose_what_is_padding_everywhere():
    long, short = full(), Conditioning(tokens=torch.ones(ROWS, 2, 2))
    same, padded = equally_long(long, short)
    assert same is long
    found = tensors(padded)
    assert found["tokens"].shape == (ROWS, 3, 2)
    assert not found["tokens"][:, 2].any()
    assert found["mask"].tolist() == [[True, True, False]] * ROWS
    trimmed = tensors(padded.trimmed())
    assert torch.equal(trimmed["tokens"], tensors(short)["tokens"])
    assert trimmed["mask"].all()
    assert equally_long(long, Conditioning())[1] == Conditioning()
