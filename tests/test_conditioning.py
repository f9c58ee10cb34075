"""Conditions move, are cut and are hidden together, and never change in place."""

from __future__ import annotations

from dataclasses import replace

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


@pytest.mark.parametrize("selection", [slice(1, 3), torch.tensor([3, 0]), torch.arange(ROWS) > 1])
def test_rows_are_cut_from_every_tensor_and_the_original_stays(selection):
    assert set(TENSORS) | {"micro"} == set(vars(full()))
    cond = full()
    cut = tensors(cond.rows(selection))
    assert all(torch.equal(cut[name], x[selection]) for name, x in tensors(full()).items())
    assert all(torch.equal(tensors(cond)[name], x) for name, x in tensors(full()).items())
    assert {x.device.type for x in tensors(cond.to("meta")).values()} == {"meta"}
    assert tensors(Conditioning().rows(selection)) == {}


def test_drops_add_up_until_null_hides_every_row():
    for name in ("labels", "tokens"):
        cond = Conditioning(**{name: getattr(full(), name)})
        once = cond.drop(torch.tensor([True, False, False, False]))
        twice = once.drop(torch.tensor([False, False, True, False]))
        assert cond.dropped is None
        assert tensors(twice)["dropped"].tolist() == [True, False, True, False]
        assert tensors(cond.null())["dropped"].tolist() == [True] * ROWS
        assert getattr(cond.null(), name) is getattr(cond, name)
    with pytest.raises(ValueError, match="nothing to guide by"):
        Conditioning(micro={"scale": torch.ones(2)}).null()


def test_conditions_that_follow_others_are_their_rows_in_turn():
    cond = full()
    hidden = tensors(cond.followed_by(cond.null()))
    assert hidden["dropped"].tolist() == [False, True, False, False, True, True, True, True]
    for name, x in tensors(cond).items():
        assert name == "dropped" or torch.equal(hidden[name], torch.cat([x, x]))
    assert Conditioning().followed_by(Conditioning()) == Conditioning()


def test_a_mask_that_only_one_of_two_has_hides_nothing_of_the_other():
    plain = replace(full(), mask=None, dropped=None)
    first, second = full().followed_by(plain), plain.followed_by(full().null())
    assert tensors(first)["mask"].tolist() == [[True, True, False]] * ROWS + [[True] * 3] * ROWS
    assert tensors(second)["mask"].tolist() == [[True] * 3] * ROWS + [[True, True, False]] * ROWS
    assert tensors(second)["dropped"].tolist() == [False] * ROWS + [True] * ROWS


def test_texts_become_equally_long_and_lose_what_is_padding_everywhere():
    long, short = full(), Conditioning(tokens=torch.ones(ROWS, 2, 2))
    same, padded = equally_long(long, short)
    assert same is long
    result = tensors(padded)
    assert result["tokens"].shape == (ROWS, 3, 2)
    assert not result["tokens"][:, 2].any()
    assert result["mask"].tolist() == [[True, True, False]] * ROWS
    trimmed = tensors(padded.trimmed())
    assert torch.equal(trimmed["tokens"], tensors(short)["tokens"])
    assert trimmed["mask"].all()
    assert equally_long(long, Conditioning())[1] == Conditioning()
