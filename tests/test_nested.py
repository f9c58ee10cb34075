"""The network: growing keeps its function, ragged rows are exact, conditions do their part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import LevelConfig, MicroConfig, ModelConfig, TextConfig
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
from matryoshka_diffusion.pyramid import Pyramid, ragged
from matryoshka_diffusion.schedule import alpha_sigma

ROWS = 4
TEXT = TextConfig(features=12, width=16, layers=1, heads=2)


def nest(depth: int = 3, *, core: dict[str, Any] | None = None, **shared: Any) -> ModelConfig:
    """Levels of 8, 16 and 32 pixels; `core` changes the coarsest level, `shared` the model."""
    levels = [
        LevelConfig(side=8, widths=(32, 64), blocks=(1, 1), attention=(0, 1), middle=True),
        LevelConfig(
            side=16, widths=(32, 32), blocks=(1, 0), attention=(0, 0),
            shift_ratio=2.0, input_scaling="analytic",
        ),
        LevelConfig(
            side=32, widths=(32, 64), blocks=(1, 1), attention=(0, 0), patch=1,
            shift_ratio=4.0, input_scaling="std",
        ),
    ]  # fmt: skip
    levels[0] = levels[0].model_copy(update=core or {})
    return ModelConfig(levels=tuple(levels[:depth]), embedding=32, **shared)


def wake(net: NestedUNet, seed: int = 0) -> NestedUNet:
    """Give zero-initialised weights values: otherwise the network says nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1, generator=generator)
    return net.eval()


def noisy(config: ModelConfig, rows: int = ROWS, seed: int = 0) -> Pyramid:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(rows, config.channels, level.side, level.side, generator=generator)
        for level in config.levels
    )


TIMES = torch.tensor([0.1, 0.4, 0.7, 1.0])


def words(rows: int = ROWS, tokens: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(rows, tokens, 12, generator=torch.Generator().manual_seed(seed))


def equal(one: Pyramid, other: Pyramid) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def run(net: NestedUNet, cond: Conditioning | None = None, **changes: Any) -> Pyramid:
    z = changes.get("z", noisy(net.config))
    return net(z, changes.get("t", TIMES), cond or Conditioning())


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_prediction_has_the_shape_of_its_level(depth: int, channels: int):
    net = wake(NestedUNet(nest(depth, channels=channels)))
    assert [y.shape for y in run(net)] == [
        (ROWS, channels, side, side) for side in (8, 16, 32)[:depth]
    ]


def test_a_new_network_predicts_zero():
    """Heads start at zero; what a network has learnt is all that it says."""
    assert not any(y.any() for y in run(NestedUNet(nest())))


def test_patches_fold_pixels_into_channels_and_back():
    core = {"side": 16, "patch": 2}
    config = ModelConfig(levels=(nest(1).levels[0].model_copy(update=core),), embedding=32)
    net = wake(NestedUNet(config))
    assert net.levels[0].stem.in_channels == 12
    assert run(net)[0].shape == (ROWS, 3, 16, 16)
    z = noisy(config)[0].requires_grad_()
    (y,) = net((z,), TIMES, Conditioning())
    (influence,) = torch.autograd.grad(y[0, 0, 8, 8], z)
    assert influence[0, :, 8, 8].all(), "a pixel's own place is among what it depends on"


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
    plain = wake(NestedUNet(nest(1, core={"side": 8, **wide})))
    spelt = wake(NestedUNet(nest(1, core={"side": 8, **wide, "halve": (True, True)})))
    level = nest(1, core={"side": 8, **wide, "halve": (False, True)})
    net = wake(NestedUNet(level))
    shapes = [{key: x.shape for key, x in one.state_dict().items()} for one in (plain, net)]
    assert shapes[0] == shapes[1]
    assert equal(run(plain), run(spelt))
    assert sides_within(plain) == [8, 4, 4, 2, 2]
    assert sides_within(net) == [8, 8, 8, 4, 4]
    assert [y.shape for y in run(net)] == [(ROWS, 3, 8, 8)]
    assert not equal(run(net), run(plain))


def test_a_level_that_halves_less_is_grown_upon():
    core = {"widths": (32, 64), "halve": (False,)}
    outer = LevelConfig(
        side=16, widths=(32, 32, 32), blocks=(1, 0, 0), attention=(0, 0, 0), halve=(True, False)
    )
    small = nest(1, core=core)
    net = wake(NestedUNet(small))
    large = ModelConfig(levels=(*small.levels, outer), embedding=32)
    grown = grow(net, large)
    z = noisy(large)
    assert equal(run(grown, z=z)[:1], run(net, z=z[:1]))
    assert run(wake(grown), z=z)[1].shape == (ROWS, 3, 16, 16)


# --- growing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("small", "large"), [(1, 2), (1, 3), (2, 3)])
def test_growing_keeps_the_coarse_predictions_bit_for_bit(small: int, large: int):
    net = wake(NestedUNet(nest(small, text=TEXT, classes=3)))
    grown = grow(net, nest(large, text=TEXT, classes=3), seed=9)
    cond = Conditioning(labels=torch.tensor([0, 1, 2, 0]), tokens=words())
    assert not grown.training
    assert equal(run(grown, cond)[:small], run(net, cond, z=noisy(net.config)))


@pytest.mark.parametrize(("small", "large"), [(1, 2), (1, 3), (2, 3)])
def test_growing_keeps_every_weight_and_adds_only_the_new_levels(small: int, large: int):
    net = wake(NestedUNet(nest(small, text=TEXT)))
    before = net.state_dict()
    after = grow(net, nest(large, text=TEXT)).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    new = {".".join(key.split(".")[:2]) for key in after.keys() - before.keys()}
    places = range(small, large)
    assert new == {f"{part}.{place}" for part in ("levels", "adapters") for place in places}


def test_a_level_starts_the_same_whatever_it_is_nested_on():
    """Initial weights depend on the seed and the place only, not on what was drawn before."""
    one = NestedUNet(nest(2), seed=5).state_dict()
    other = NestedUNet(nest(3, core={"blocks": (2, 2)}, text=TEXT), seed=5).state_dict()
    own = [key for key in one if key.startswith("levels.1.")]
    assert all(torch.equal(one[key], other[key]) for key in own)


def test_a_grown_level_starts_as_if_it_had_always_been_there():
    together = NestedUNet(nest(3), seed=5).state_dict()
    grown = grow(NestedUNet(nest(1), seed=5), nest(3), seed=5).state_dict()
    assert all(torch.equal(together[key], grown[key]) for key in together)


def test_growing_keeps_precision_and_mode():
    grown = grow(wake(NestedUNet(nest(1))).double().train(), nest(2))
    assert grown.training
    assert {parameter.dtype for parameter in grown.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.model_copy(update={"embedding": 64}), "model.embedding is 32 .* 64"),
        (lambda m: m.model_copy(update={"classes": 3}), "model.classes is 0 .* 3"),
        (lambda m: m.model_copy(update={"levels": m.levels[:1]}), "has 2 levels.* only 1"),
        (
            lambda m: m.model_copy(
                update={"levels": (m.levels[0], nest(2, core={}).levels[0], m.levels[2])}
            ),
            r"model.levels\[1\] differs",
        ),
    ],
)
def test_only_an_extension_can_be_grown_into(change: Callable, message: str):
    with pytest.raises(ValueError, match=f"cannot grow: .*{message}"):
        check_extends(nest(2), change(nest(3)))


# --- ragged batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(4, 0, 0), (4, 2, 0), (4, 3, 1), (4, 4, 0)])
def test_rows_without_a_fine_level_equal_the_coarser_network(rows: tuple[int, ...]):
    """Bit for bit, although the adapters of the finer levels are awake: they only see padding."""
    net = wake(NestedUNet(nest()))
    z = noisy(net.config)
    mixed = run(net, z=ragged(z, rows))
    assert [len(y) for y in mixed] == list(rows)
    for depth in (1, 2):
        coarse = NestedUNet(nest(depth)).eval()
        coarse.load_state_dict({key: net.state_dict()[key] for key in coarse.state_dict()})
        alone = run(coarse, z=ragged(z[:depth], rows[:depth]))
        for level in range(depth):
            assert torch.equal(mixed[level][rows[depth] :], alone[level][rows[depth] :])


def test_rows_with_all_levels_equal_the_whole_network():
    net = wake(NestedUNet(nest(text=TEXT)))
    z = noisy(net.config)
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 4])[:, None]
    cond = Conditioning(tokens=words(), mask=mask)
    for mixed, whole in zip(run(net, cond, z=ragged(z, (4, 3, 2))), run(net, cond), strict=True):
        torch.testing.assert_close(mixed[:2], whole[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scaling", "patch"), [("none", 1), ("std", 1), ("analytic", 1), ("none", 2)]
)
def test_a_level_of_no_rows_runs_forwards_and_backwards(scaling: str, patch: int):
    """So that processes with and without fine rows take part in the same gradients."""
    config = nest(3, text=TEXT, classes=3)
    top = config.levels[2].model_copy(
        update={
            "side": 32 * patch,
            "patch": patch,
            "input_scaling": scaling,
            "attention": (1, 0),
        }
    )
    config = config.model_copy(update={"levels": (*config.levels[:2], top)})
    net = wake(NestedUNet(config)).train()
    micro_batch = Conditioning(labels=torch.tensor([0, 1, 2, 0]), tokens=words())
    out = net(ragged(noisy(config), (4, 2, 0)), TIMES, micro_batch)
    torch.stack([y.square().sum() for y in out]).sum().backward()
    for name, parameter in net.levels[2].named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    inner = net.levels[0].stem.weight.grad
    assert inner is not None
    assert inner.any()


# --- initialisation ------------------------------------------------------------------------------


def test_the_seed_decides_all_weights_and_nothing_else_is_drawn():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = NestedUNet(nest(text=TEXT, classes=3), seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    torch.manual_seed(2)
    same = NestedUNet(nest(text=TEXT, classes=3), seed=3).state_dict()
    other = NestedUNet(nest(text=TEXT, classes=3), seed=4).state_dict()
    assert all(torch.equal(one[key], same[key]) for key in one)
    differing = {key.split(".")[0] for key in one if not torch.equal(one[key], other[key])}
    assert differing == {"conditioner", "levels"}


# --- conditions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [0, 2])
def test_padding_is_invisible_where_attention_is_masked(layers: int):
    net = wake(NestedUNet(nest(1, text=TEXT.model_copy(update={"layers": layers}))))
    mask = torch.tensor([[True, True, True, False, False]]).expand(ROWS, -1)
    tokens, other = words(seed=1), words(seed=2)
    padded = torch.where(mask[:, :, None], tokens, other)
    torch.testing.assert_close(
        run(net, Conditioning(tokens=tokens, mask=mask)),
        run(net, Conditioning(tokens=padded, mask=mask)),
    )
    torch.testing.assert_close(
        run(net, Conditioning(tokens=tokens, mask=mask)),
        run(net, Conditioning(tokens=tokens[:, :3])),
    )


def test_padding_is_seen_where_attention_is_not_masked():
    """As in the released models, which attend to it; their pooled embedding still leaves it out."""
    text = TEXT.model_copy(update={"masked": False, "layers": 0})
    net = wake(NestedUNet(nest(1, text=text)))
    mask = torch.tensor([[True, True, True, False, False]]).expand(ROWS, -1)
    tokens = words(seed=1)
    padded = torch.where(mask[:, :, None], tokens, words(seed=2))
    conds = [Conditioning(tokens=features, mask=mask) for features in (tokens, padded)]
    assert not torch.allclose(run(net, conds[0])[0], run(net, conds[1])[0])
    pooled = [net.conditioner(cond).embedding for cond in conds]
    torch.testing.assert_close(*pooled)


def test_a_dropped_row_shows_neither_its_text_nor_its_label():
    net = wake(NestedUNet(nest(text=TEXT, classes=3)))
    one = Conditioning(labels=torch.tensor([0, 1, 2, 0]), tokens=words(seed=1))
    two = Conditioning(labels=torch.tensor([2, 1, 0, 1]), tokens=words(seed=2))
    dropped = torch.tensor([True, False, True, False])
    for a, b in zip(run(net, one.drop(dropped)), run(net, two.drop(dropped)), strict=True):
        assert torch.equal(a[dropped], b[dropped])
        assert not torch.isclose(a[~dropped], b[~dropped]).all(3).any()
    for a, b in zip(run(net, one.drop(dropped)), run(net, one), strict=True):
        torch.testing.assert_close(a[~dropped], b[~dropped])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("layers", [0, 1])
def test_the_null_caption_does_not_depend_on_how_long_the_caption_was(masked: bool, layers: int):
    text = TEXT.model_copy(update={"masked": masked, "layers": layers})
    net = wake(NestedUNet(nest(1, text=text)))
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 0])[:, None]  # one has no word at all
    long = Conditioning(tokens=words(tokens=5), mask=mask).null()
    short = Conditioning(tokens=words(tokens=2)).null()
    torch.testing.assert_close(run(net, long), run(net, short))


def test_null_drops_every_row():
    cond = Conditioning(labels=torch.tensor([0, 1, 2, 0]))
    every = cond.drop(torch.ones(ROWS, dtype=torch.bool))
    net = wake(NestedUNet(nest(classes=3)))
    assert equal(run(net, cond.null()), run(net, every))
    assert not equal(run(net, cond.null()), run(net, cond))


def test_the_order_of_words_reaches_attention_only_through_the_features():
    """Attention over text is a set operation: the encoder, not the network, knows about order."""
    net = wake(NestedUNet(nest(1, text=TEXT)))
    shuffled = words()[:, torch.tensor([3, 1, 4, 0, 2])]
    torch.testing.assert_close(
        run(net, Conditioning(tokens=words())), run(net, Conditioning(tokens=shuffled))
    )


MICRO = (MicroConfig(name="scale", ceiling=64.0), MicroConfig(name="aspect"))


def test_micro_conditions_are_clamped_or_multiplied():
    net = wake(NestedUNet(nest(1, core={"micro": MICRO})))

    def with_scale(scale: float, aspect: float) -> Tensor:
        values = {"scale": scale, "aspect": aspect}
        micro = {name: torch.full((ROWS,), value) for name, value in values.items()}
        return run(net, Conditioning(micro=micro))[0]

    assert torch.equal(with_scale(64.0, 1.0), with_scale(1000.0, 1.0))
    assert not torch.allclose(with_scale(64.0, 1.0), with_scale(32.0, 1.0))
    assert not torch.allclose(with_scale(64.0, 1.0), with_scale(64.0, 0.5))

    seen: list[Tensor] = []
    net.levels[0].micro["aspect"].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with_scale(64.0, 0.5)
    torch.testing.assert_close(seen[0], sinusoid(torch.full((ROWS,), 500.0), 8))


@pytest.mark.parametrize(
    ("model", "cond", "message"),
    [
        ({"text": TEXT}, Conditioning(), "conditioned on text, but tokens is None"),
        ({"classes": 3}, Conditioning(), "conditioned on classes, but labels is None"),
        ({"core": {"micro": MICRO}}, Conditioning(), "conditioned on aspect: add it to micro"),
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


def test_nothing_can_be_dropped_from_nothing():
    with pytest.raises(ValueError, match="nothing to guide by"):
        Conditioning().null()


# --- what a level does with its input and its time -----------------------------------------------


def level(**changes: Any) -> Level:
    model = changes.pop("model", {})
    return NestedUNet(nest(1, core=changes, **model)).levels[0]


def test_input_scaling_none_leaves_the_input():
    z = noisy(nest(1))[0]
    assert level(input_scaling="none").scale(z, TIMES) is z


def test_input_scaling_std_divides_each_example_by_its_own():
    z = noisy(nest(1))[0] * torch.tensor([0.5, 1.0, 2.0, 4.0]).view(-1, 1, 1, 1)
    scaled = level(input_scaling="std").scale(z, TIMES)
    torch.testing.assert_close(scaled.flatten(1).std(1), torch.ones(ROWS))


def test_input_scaling_analytic_brings_noisy_pictures_to_unit_variance():
    part = level(input_scaling="analytic", shift_ratio=2.0, model={"data_std": 0.3})
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(4, 3, 64, 64, generator=generator) for _ in range(2))
    alpha, sigma = (a.view(-1, 1, 1, 1) for a in alpha_sigma(part.schedule.log_snr(TIMES)))
    scaled = part.scale(alpha * 0.3 * x + sigma * noise, TIMES)
    torch.testing.assert_close(scaled.flatten(1).std(1), torch.ones(ROWS), rtol=0.03, atol=0)


def test_time_enters_as_the_step_or_as_the_levels_own_log_snr():
    t = torch.tensor([0.001, 0.5, 1.0])
    steps = level().time_steps(t)
    torch.testing.assert_close(steps, torch.tensor([0.0, 499.0, 999.0]))
    shifted = level(shift_ratio=4.0, model={"time_input": "log-snr"})
    own = shifted.time_steps(torch.tensor([0.0, 0.5, 1.0]))
    log_snr = shifted.schedule.log_snr(torch.tensor([0.5, 1.0]))
    assert own[0] == 0.0
    torch.testing.assert_close(own[1:], 500 - 25 * log_snr)
    assert (own >= 0).all()
    assert (own <= 1000).all()


def test_a_network_of_either_time_input_hears_the_time():
    for time_input in ("step", "log-snr"):
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


@pytest.mark.parametrize("heads", [1, 4])
def test_heads_split_the_same_weights(heads: int):
    """Their number changes what is computed, not what is learnt."""
    nets = [wake(NestedUNet(nest(1, core={"heads": h}))) for h in (heads, 8)]
    assert all(
        torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True)
    )
    assert not torch.allclose(run(nets[0])[0], run(nets[1])[0])


@pytest.mark.parametrize(
    ("core", "added"),
    [
        ({"attention_mlp": True}, "feed_forward"),
        ({"middle": True}, "middle"),
        ({"attention": (1, 1)}, "attention"),
    ],
)
def test_optional_parts_add_their_weights_and_nothing_else(core: dict, added: str):
    plain = NestedUNet(nest(1, core={"middle": False})).state_dict()
    rich = NestedUNet(nest(1, core={"middle": False, **core})).state_dict()
    assert plain.keys() < rich.keys()
    assert all(added in key for key in rich.keys() - plain.keys())


def test_rows_do_not_see_each_other():
    """Nothing in the network mixes a batch: no batch norm, no shared statistics."""
    net = wake(NestedUNet(nest(text=TEXT)))
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
    z = noisy(net.config)
    changed = tuple(torch.cat([level[:1], level[1:] + 1.0]) for level in z)
    cond = Conditioning(tokens=words())
    for a, b in zip(run(net, cond, z=z), run(net, cond, z=changed), strict=True):
        assert torch.equal(a[:1], b[:1])


def test_a_parameters_level_is_the_one_it_came_with():
    coarse, whole = NestedUNet(nest(1)), NestedUNet(nest(3))
    first = [name for name, _ in whole.named_parameters() if level_of(name) == 0]
    assert first == [name for name, _ in coarse.named_parameters()]
    assert {level_of(name) for name, _ in whole.named_parameters()} == {0, 1, 2}
    with pytest.raises(AssertionError, match="wrapped"):
        level_of("module.levels.1.head.weight")


# --- names of version 0.1.0 ----------------------------------------------------------------------


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
def test_a_first_name_has_one_present_name(first: str, present: str):
    assert renamed(first) == renamed(present) == present
    assert first_name(present) == first_name(first) == first


def test_the_walk_meets_an_adapter_between_the_halves_of_its_level():
    net = NestedUNet(nest())
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    order = [names[id(parameter)] for parameter in in_walk_order(net)]
    assert sorted(order) == sorted(names.values())
    assert [level_of(name) for name in order] == sorted(level_of(name) for name in order)
    place = order.index("adapters.1.inward.weight")
    assert order[place - 1].startswith("levels.1.encoder")
    assert order[place + 4].startswith("levels.1.decoder")
