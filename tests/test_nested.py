"""The network: growing keeps its function, ragged rows are exact, conditions do their part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import CoarseConfig, LevelConfig, MicroConfig, ModelConfig
from matryoshka_diffusion.nn.layers import sinusoid
from matryoshka_diffusion.nn.level import Level
from matryoshka_diffusion.nn.nested import (
    NestedUNet,
    check_extends,
    first_name,
    grow,
    in_walk_order,
    level_of,
    renamed,
)
from matryoshka_diffusion.pyramid import ragged
from matryoshka_diffusion.schedule import alpha_sigma
from nests import ROWS, TEXT, TIMES, equal, inside, nest, noisy, run, wake, words

COARSE = CoarseConfig(side=4)
LABELS = torch.tensor([0, 1, 2, 0])
KINDS = {
    "unconditional": ({}, Conditioning()),
    "text and classes": (
        {"text": TEXT, "classes": 3},
        Conditioning(labels=LABELS, tokens=words()),
    ),
    "upsampler": (
        {"coarse": COARSE},
        Conditioning(image=noisy(nest(1), seed=3)[0], image_t=torch.tensor([0.0, 0.3, 0.6, 1.0])),
    ),
}
every_kind = pytest.mark.parametrize(("shared", "cond"), KINDS.values(), ids=KINDS.keys())


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_prediction_has_the_shape_of_its_level_and_starts_at_zero(depth: int, channels: int):
    net = NestedUNet(nest(depth, channels=channels))
    assert not any(y.any() for y in run(net))
    sides = (8, 16, 32)[:depth]
    assert [y.shape for y in run(wake(net))] == [(ROWS, channels, side, side) for side in sides]


def test_patches_fold_pixels_into_channels_and_back():
    net = wake(NestedUNet(nest(1, core={"side": 16, "patch": 2})))
    assert net.levels[0].stem.in_channels == 12
    z = noisy(net.config)[0].requires_grad_()
    (y,) = net((z,), TIMES, Conditioning())
    assert y.shape == (ROWS, 3, 16, 16)
    (influence,) = torch.autograd.grad(y[0, 0, 8, 8], z)
    assert influence[0, :, 8, 8].all(), "a pixel depends on its own place"


def sides_within(net: NestedUNet) -> list[int]:
    """The side of the features after each layer of the coarsest level's encoder."""
    sides: list[int] = []
    for layer in net.levels[0].encoder:
        layer.register_forward_hook(lambda _, __, h: sides.append(h.shape[-1]))
    run(net)
    return sides


def test_a_level_that_halves_less_has_the_same_weights_at_other_sides():
    """Appendix D.2's change to S64: its second width works at the side of its first."""
    wide = {"widths": (32, 64, 64), "blocks": (1, 1, 1), "attention": (0, 1, 1)}
    plain, explicit, changed = (
        wake(NestedUNet(nest(1, core={**wide, "halve": halve})))
        for halve in ((), (True, True), (False, True))
    )
    assert equal(run(plain), run(explicit))
    changed.load_state_dict(plain.state_dict())
    assert sides_within(plain) == [8, 4, 4, 2, 2]
    assert sides_within(changed) == [8, 8, 8, 4, 4]
    assert not equal(run(changed), run(plain))


# --- growing -------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize(("small", "large"), [(1, 2), (1, 3), (2, 3)])
def test_growing_keeps_the_coarse_predictions_bit_for_bit(
    shared: dict, cond: Conditioning, small: int, large: int
):
    net = wake(NestedUNet(nest(small, **shared)))
    grown = grow(net, nest(large, **shared), seed=9)
    assert not grown.training
    assert equal(run(grown, cond)[:small], run(net, cond))
    before, after = net.state_dict(), grown.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    new = {".".join(key.split(".")[:2]) for key in after.keys() - before.keys()}
    places = range(small, large)
    assert new == {f"{part}.{place}" for part in ("levels", "adapters") for place in places}


def test_a_level_that_halves_less_is_grown_upon():
    outer = LevelConfig(
        side=16, widths=(32, 32, 32), blocks=(1, 0, 0), attention=(0, 0, 0), halve=(True, False)
    )
    small = nest(1, core={"halve": (False,)})
    net = wake(NestedUNet(small))
    large = ModelConfig(levels=(*small.levels, outer), embedding=32)
    grown = grow(net, large)
    assert equal(run(grown)[:1], run(net, z=noisy(large)[:1]))
    assert run(wake(grown))[1].shape == (ROWS, 3, 16, 16)


@pytest.mark.parametrize("changes", [{}, {"core": {"blocks": (2, 2)}, "text": TEXT}])
def test_a_level_starts_the_same_whatever_it_is_put_around(changes: dict[str, Any]):
    """Initial weights depend on the seed and the place only."""
    one, other = (NestedUNet(nest(3, **each), seed=5).state_dict() for each in ({}, changes))
    own = [key for key in one if level_of(key) > 0]
    assert all(torch.equal(one[key], other[key]) for key in own)
    grown = grow(NestedUNet(nest(1, **changes), seed=5), nest(3, **changes), seed=5).state_dict()
    assert all(torch.equal(other[key], grown[key]) for key in other)


def test_growing_keeps_precision_and_mode():
    grown = grow(wake(NestedUNet(nest(1))).double().train(), nest(2))
    assert grown.training
    assert {parameter.dtype for parameter in grown.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": 64}, "model.embedding is 32 .* 64"),
        ({"classes": 3}, "model.classes is 0 .* 3"),
        ({"coarse": COARSE}, "model.coarse is None .* side=4"),
        ({"levels": nest(1).levels}, "has 2 levels.* only 1"),
        ({"levels": nest(3, core={"heads": 1}).levels}, r"model.levels\[0\] differs"),
    ],
)
def test_only_an_extension_can_be_grown_into(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"cannot grow: .*{message}"):
        check_extends(nest(2), nest(3).model_copy(update=change))


# --- ragged batches ------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("rows", [(4, 0, 0), (4, 3, 1), (4, 4, 0)])
def test_rows_without_a_fine_level_equal_the_coarser_network(
    shared: dict, cond: Conditioning, rows: tuple[int, ...]
):
    """Bit for bit, although the adapters are not zero: such rows only meet padding."""
    net = wake(NestedUNet(nest(**shared)))
    z = noisy(net.config)
    mixed = run(net, cond, z=ragged(z, rows))
    assert [len(y) for y in mixed] == list(rows)
    for depth in (1, 2):
        alone = run(inside(net, depth), cond, z=ragged(z[:depth], rows[:depth]))
        for level in range(depth):
            assert torch.equal(mixed[level][rows[depth] :], alone[level][rows[depth] :])


def test_rows_with_all_levels_equal_the_whole_network_and_do_not_see_each_other():
    """No batch norm, no shared statistics: nothing in the network mixes the rows of a batch."""
    net = wake(NestedUNet(nest(text=TEXT)))
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
    z = noisy(net.config)
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 4])[:, None]
    cond = Conditioning(tokens=words(), mask=mask)
    changed = tuple(torch.cat([level[:1], level[1:] + 1.0]) for level in z)
    found = run(net, cond, z=z)
    for whole, part, other in zip(
        found, run(net, cond, z=ragged(z, (4, 3, 2))), run(net, cond, z=changed), strict=True
    ):
        torch.testing.assert_close(part[:2], whole[:2], rtol=1e-5, atol=1e-5)
        assert torch.equal(whole[:1], other[:1])


@pytest.mark.parametrize(
    ("scaling", "patch"), [("none", 1), ("std", 1), ("analytic", 1), ("none", 2)]
)
def test_a_level_of_no_rows_runs_forwards_and_backwards(scaling: str, patch: int):
    """So that processes with and without fine rows take part in the same gradients."""
    config = nest(3, text=TEXT, classes=3)
    changes = {"side": 32 * patch, "patch": patch, "input_scaling": scaling, "attention": (1, 0)}
    top = config.levels[2].model_copy(update=changes)
    config = config.model_copy(update={"levels": (*config.levels[:2], top)})
    net = wake(NestedUNet(config)).train()
    cond = Conditioning(labels=LABELS, tokens=words())
    out = net(ragged(noisy(config), (4, 2, 0)), TIMES, cond)
    torch.stack([y.square().sum() for y in out]).sum().backward()
    for name, parameter in net.named_parameters():
        if level_of(name) == 2:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
    inner = net.levels[0].stem.weight.grad
    assert inner is not None
    assert inner.any()


# --- conditions ----------------------------------------------------------------------------------


def test_the_seed_decides_all_weights_and_nothing_else_is_drawn():
    state = torch.get_rng_state()
    one, same, other = (
        NestedUNet(nest(text=TEXT, classes=3), seed=seed).state_dict() for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert all(torch.equal(one[key], same[key]) for key in one)
    differing = {key.split(".")[0] for key in one if not torch.equal(one[key], other[key])}
    assert differing == {"conditioner", "levels"}


@pytest.mark.parametrize("layers", [0, 2])
def test_padding_is_invisible_where_attention_is_masked(layers: int):
    net = wake(NestedUNet(nest(1, text=TEXT.model_copy(update={"layers": layers}))))
    mask = torch.tensor([[True, True, True, False, False]]).expand(ROWS, -1)
    tokens = words()
    padded = torch.where(mask[:, :, None], tokens, words(seed=2))
    found = run(net, Conditioning(tokens=tokens, mask=mask))
    torch.testing.assert_close(found, run(net, Conditioning(tokens=padded, mask=mask)))
    torch.testing.assert_close(found, run(net, Conditioning(tokens=tokens[:, :3])))


def test_padding_is_seen_where_attention_is_not_masked():
    """The released models attend to padding; their pooled embedding still leaves it out."""
    text = TEXT.model_copy(update={"masked": False, "layers": 0})
    net = wake(NestedUNet(nest(1, text=text)))
    mask = torch.tensor([[True, True, True, False, False]]).expand(ROWS, -1)
    padded = torch.where(mask[:, :, None], words(), words(seed=2))
    conds = [Conditioning(tokens=features, mask=mask) for features in (words(), padded)]
    assert not torch.allclose(run(net, conds[0])[0], run(net, conds[1])[0])
    pooled = [net.conditioner(cond).embedding for cond in conds]
    torch.testing.assert_close(*pooled)


def test_a_dropped_row_shows_neither_its_text_nor_its_label():
    net = wake(NestedUNet(nest(text=TEXT, classes=3)))
    one = Conditioning(labels=LABELS, tokens=words())
    two = Conditioning(labels=torch.tensor([2, 1, 0, 1]), tokens=words(seed=2))
    dropped = torch.tensor([True, False, True, False])
    found = run(net, one.drop(dropped))
    for a, b, whole in zip(found, run(net, two.drop(dropped)), run(net, one), strict=True):
        assert torch.equal(a[dropped], b[dropped])
        assert not torch.isclose(a[~dropped], b[~dropped]).all(3).any()
        torch.testing.assert_close(a[~dropped], whole[~dropped])
    every = torch.ones(ROWS, dtype=torch.bool)
    assert equal(run(net, one.null()), run(net, two.drop(every)))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("layers", [0, 1])
def test_the_null_caption_does_not_depend_on_how_long_the_caption_was(masked: bool, layers: int):
    text = TEXT.model_copy(update={"masked": masked, "layers": layers})
    net = wake(NestedUNet(nest(1, text=text)))
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 0])[:, None]  # one has no word at all
    long = Conditioning(tokens=words(tokens=5), mask=mask).null()
    short = Conditioning(tokens=words(tokens=2)).null()
    torch.testing.assert_close(run(net, long), run(net, short))


MICRO = (MicroConfig(name="scale", ceiling=64.0), MicroConfig(name="aspect"))


def test_micro_conditions_are_clamped_or_multiplied():
    net = wake(NestedUNet(nest(1, core={"micro": MICRO})))
    inputs: list[Tensor] = []
    net.levels[0].micro["aspect"].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))

    def with_micro(**values: float) -> Tensor:
        micro = {name: torch.full((ROWS,), value) for name, value in values.items()}
        return run(net, Conditioning(micro=micro))[0]

    plain = with_micro(scale=64.0, aspect=0.5)
    torch.testing.assert_close(inputs[0], sinusoid(torch.full((ROWS,), 500.0), 8))
    assert torch.equal(plain, with_micro(scale=1000.0, aspect=0.5))
    assert not torch.allclose(plain, with_micro(scale=32.0, aspect=0.5))
    assert not torch.allclose(plain, with_micro(scale=64.0, aspect=1.0))


def test_an_upsamplers_coarse_image_and_its_time_reach_every_level():
    shared, cond = KINDS["upsampler"]
    net = wake(NestedUNet(nest(3, **shared)))
    assert [level.stem.in_channels for level in net.levels] == [6, 3, 3]
    assert cond.image is not None
    others = (
        Conditioning(image=cond.image + 0.1, image_t=cond.image_t),
        Conditioning(image=cond.image, image_t=torch.full((ROWS,), 0.4)),
    )
    for other in others:
        for a, b in zip(run(net, cond), run(net, other), strict=True):
            assert (a != b).any()


@pytest.mark.parametrize(
    ("model", "cond", "message"),
    [
        ({"text": TEXT}, Conditioning(), "tokens is None"),
        ({"classes": 3}, Conditioning(), "labels is None"),
        ({"core": {"micro": MICRO}}, Conditioning(), "conditioned on aspect: add it to micro"),
        ({"coarse": COARSE}, Conditioning(), "upsampler, but image or image_t is None"),
        (
            {"text": TEXT.model_copy(update={"learned_null": False})},
            Conditioning(tokens=words()).null(),
            "no learned null caption: encode the empty caption",
        ),
    ],
)
def test_a_missing_condition_is_named(model: dict, cond: Conditioning, message: str):
    with pytest.raises(ValueError, match=message):
        run(NestedUNet(nest(1, **model)), cond)


# --- parts of a level ----------------------------------------------------------------------------


def level(model: dict[str, Any] | None = None, **changes: Any) -> Level:
    return NestedUNet(nest(1, core=changes, **(model or {}))).levels[0]


def test_input_scaling_brings_images_to_unit_variance():
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(ROWS, 3, 64, 64, generator=generator) for _ in range(2))
    assert level(input_scaling="none").scale(x, TIMES) is x
    loud = x * torch.tensor([0.5, 1.0, 2.0, 4.0]).view(-1, 1, 1, 1)
    each = level(input_scaling="std").scale(loud, TIMES)
    torch.testing.assert_close(each.flatten(1).std(1), torch.ones(ROWS))
    part = level({"data_std": 0.3}, input_scaling="analytic", shift_ratio=2.0)
    alpha, sigma = (a.view(-1, 1, 1, 1) for a in alpha_sigma(part.schedule.log_snr(TIMES)))
    scaled = part.scale(alpha * 0.3 * x + sigma * noise, TIMES)
    torch.testing.assert_close(scaled.flatten(1).std(1), torch.ones(ROWS), rtol=0.03, atol=0)


def test_time_enters_as_the_step_or_as_the_levels_own_log_snr():
    steps = level().time_steps(torch.tensor([0.001, 0.5, 1.0]))
    torch.testing.assert_close(steps, torch.tensor([0.0, 499.0, 999.0]))
    shifted = level({"time_input": "log-snr"}, shift_ratio=4.0)
    own = shifted.time_steps(torch.tensor([0.0, 0.5, 1.0]))
    log_snr = shifted.schedule.log_snr(torch.tensor([0.5, 1.0]))
    assert own[0] == 0.0
    torch.testing.assert_close(own[1:], 500 - 25 * log_snr)
    assert ((own >= 0) & (own <= 1000)).all()


@pytest.mark.parametrize("time_input", ["step", "log-snr"])
def test_predictions_depend_on_time(time_input: str):
    net = wake(NestedUNet(nest(1, time_input=time_input)))
    assert not torch.allclose(run(net)[0], run(net, t=TIMES.flip(0))[0])


def test_the_sinusoid_runs_from_frequency_one_to_one_ten_thousandth():
    found = sinusoid(torch.tensor([3.0]), 8)[0]
    angles = [3.0 * 10_000 ** (-k / 4) for k in range(4)]
    expected = [*torch.tensor(angles).sin(), *torch.tensor(angles).cos()]
    torch.testing.assert_close(found, torch.stack(expected))


def test_dropout_acts_in_training_only():
    net = wake(NestedUNet(nest(1, core={"dropout": 0.5})))
    assert equal(run(net), run(net))
    assert not equal(run(net.train()), run(net))


# --- names of parameters -------------------------------------------------------------------------


def test_a_parameters_level_is_the_one_it_came_with():
    coarse, whole = NestedUNet(nest(1)), NestedUNet(nest(3))
    first = [name for name, _ in whole.named_parameters() if level_of(name) == 0]
    assert first == [name for name, _ in coarse.named_parameters()]
    assert level_of("adapters.2.inward.weight") == 2
    with pytest.raises(AssertionError, match="wrapped"):
        level_of("module.levels.1.head.weight")


def test_the_walk_meets_an_adapter_between_the_halves_of_its_level():
    net = NestedUNet(nest())
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    order = [names[id(parameter)] for parameter in in_walk_order(net)]
    assert sorted(order) == sorted(names.values())
    assert [level_of(name) for name in order] == sorted(map(level_of, order))
    place = order.index("adapters.1.inward.weight")
    assert order[place - 1].startswith("levels.1.encoder")
    assert order[place + 4].startswith("levels.1.decoder")


@pytest.mark.parametrize(
    ("first", "present"),
    [
        ("levels.2.inward.weight", "adapters.2.inward.weight"),
        ("net.levels.1.outward.bias", "net.adapters.1.outward.bias"),
        ("0.05/weights/levels.1.inward.bias", "0.05/weights/adapters.1.inward.bias"),
        ("levels.0.image_time.2.weight.exp_avg", "levels.0.micro.coarse_time.2.weight.exp_avg"),
        ("levels.0.stem.weight", "levels.0.stem.weight"),
    ],
)
def test_a_name_of_version_0_1_0_has_one_present_name(first: str, present: str):
    assert renamed(first) == renamed(present) == present
    assert first_name(present) == first_name(first) == first


@every_kind
def test_present_names_are_those_of_the_network(shared: dict, cond: Conditioning):
    names = NestedUNet(nest(**shared)).state_dict().keys()
    assert {renamed(first_name(name)) for name in names} == set(names)
    assert {renamed(name) for name in names} == set(names)
