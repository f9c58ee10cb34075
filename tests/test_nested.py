"""The network: growing keeps its function, ragged rows are exact, conditions do their part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.modelconfig import (
    CoarseConfig,
    LevelConfig,
    MicroConfig,
    ModelConfig,
    TextConfig,
)
from matryoshka_diffusion.nn import layers, temporal
from matryoshka_diffusion.nn.conditioner import SHRINKAGE, TextTower
from matryoshka_diffusion.nn.layers import shapes_only, shuffle, sinusoid, unshuffle
from matryoshka_diffusion.nn.level import Level
from matryoshka_diffusion.nn.nested import (
    NestedUNet,
    check_extends,
    grow,
    in_walk_order,
    level_of,
    old_name,
    present_name,
)
from matryoshka_diffusion.pyramid import ragged
from matryoshka_diffusion.schedule import alpha_sigma
from nests import ROWS, TEXT, TIMES, equal, inside, nest, noisy, run, wake, words
from tiny_run import there

COARSE = CoarseConfig(side=4)
LABELS = torch.tensor([0, 1, 2, 0])
LENGTHS = torch.arange(5) < torch.tensor([5, 2, 3, 4])[:, None]
UPSAMPLED = Conditioning(image=noisy(nest(1), seed=3)[0], image_t=TIMES - 0.1)
KINDS: dict[str, tuple[dict[str, Any], Conditioning]] = {
    "unconditional": ({}, Conditioning()),
    "text and classes": ({"text": TEXT, "classes": 3}, Conditioning(LABELS, words())),
    "upsampler": ({"coarse": COARSE}, UPSAMPLED),
    "clips": ({"clips": True, "text": TEXT}, Conditioning(tokens=words(), mask=LENGTHS)),
}
every_kind = pytest.mark.parametrize(("shared", "cond"), KINDS.values(), ids=KINDS.keys())


def awake(depth: int, **shared: Any) -> NestedUNet:
    return wake(NestedUNet(nest(depth, **shared)))


def differ(one: Tensor, other: Tensor) -> bool:
    return not torch.allclose(one, other)


# --- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "channels"), [(1, 3), (2, 1), (3, 3)])
def test_a_prediction_has_the_shape_of_its_level_and_starts_at_zero(depth: int, channels: int):
    net = NestedUNet(nest(depth, channels=channels))
    assert not any(y.any() for y in run(net))
    sides = (8, 16, 32)[:depth]
    assert [y.shape for y in run(wake(net))] == [(ROWS, channels, side, side) for side in sides]


class Changes(TorchDispatchMode):
    """The names of torch's operations that write into a tensor that was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += [func.__name__] * func._schema.is_mutable
        return func(*args, **(kwargs or {}))


@every_kind
def test_a_network_of_shapes_only_has_all_shapes_and_is_never_filled(
    shared: dict[str, Any], cond: Conditioning
):
    config = nest(2, **shared, augment=True)
    with Changes() as changes, shapes_only():
        net = NestedUNet(config)
    assert not changes.names
    assert all(parameter.is_meta for parameter in net.parameters())
    filled = NestedUNet(config).state_dict()
    shapes = {name: value.shape for name, value in net.state_dict().items()}
    assert shapes == {name: value.shape for name, value in filled.items()}


def test_patches_fold_pixels_into_channels_and_back():
    z = noisy(nest(1, core={"side": 16}))[0]
    assert torch.equal(unshuffle(z, 2), torch.nn.functional.pixel_unshuffle(z, 2))
    assert torch.equal(shuffle(unshuffle(z, 2), 2), z)
    net = awake(1, core={"side": 16, "patch": 2})
    (y,) = net((z.requires_grad_(),), TIMES, Conditioning())
    (influence,) = torch.autograd.grad(y[0, 0, 8, 8], z)
    assert influence[0, :, 8, 8].all(), "a pixel depends on its own place"


def test_a_level_that_halves_less_has_the_same_weights_at_other_sides_and_can_grow():
    """Appendix D.2's change to S64: its second width works at the side of its first."""
    wide = {"widths": (32, 64, 64), "blocks": (1, 1, 1), "attention": (0, 1, 1)}
    plain, explicit, changed = (
        awake(1, core={**wide, "halve": halve}) for halve in ((), (True, True), (False, True))
    )
    assert equal(run(plain), run(explicit))
    changed.load_state_dict(plain.state_dict())
    for net, expected in ((plain, [8, 4, 4, 2, 2]), (changed, [8, 8, 8, 4, 4])):
        sides: list[int] = []
        for layer in net.levels[0].encoder:
            layer.register_forward_hook(lambda *call, sides=sides: sides.append(call[2].shape[-1]))
        run(net)
        assert sides == expected
    outer = LevelConfig(
        side=16, widths=(32, 32, 32), blocks=(1, 0, 0), attention=(0, 0, 0), halve=(True, False)
    )
    large = ModelConfig(levels=(*changed.config.levels, outer), embedding=32)
    assert equal(run(grow(changed, large))[:1], run(changed, z=noisy(large)[:1]))


# --- growing -------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize(("small", "large"), [(1, 3), (2, 3)])
def test_growing_keeps_the_coarse_predictions_bit_for_bit(
    shared: dict, cond: Conditioning, small: int, large: int
):
    net = awake(small, **shared)
    grown = grow(net, nest(large, **shared), seed=9)
    assert not grown.training
    z = noisy(grown.config)
    result = run(grown, cond, z=z)
    assert [y.shape for y in result] == [level.shape for level in z]
    assert equal(result[:small], run(net, cond, z=z[:small]))
    before, after = net.state_dict(), grown.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    new = {".".join(key.split(".")[:2]) for key in after.keys() - before.keys()}
    places = range(small, large)
    assert new == {f"{part}.{place}" for part in ("levels", "adapters") for place in places}


@pytest.mark.parametrize("changes", [{}, {"core": {"blocks": (2, 2)}, "text": TEXT}])
def test_initial_weights_depend_on_the_seed_and_the_place_only(changes: dict[str, Any]):
    state = torch.get_rng_state()
    one, other = (NestedUNet(nest(3, **each), seed=5).state_dict() for each in ({}, changes))
    assert all(torch.equal(one[key], other[key]) for key in one if level_of(key) > 0)
    grown = grow(NestedUNet(nest(1, **changes), seed=5), nest(3, **changes), seed=5).state_dict()
    assert all(torch.equal(other[key], grown[key]) for key in other)
    again = NestedUNet(nest(3, **changes), seed=6).state_dict()
    differing = {key.split(".")[0] for key in other if not torch.equal(other[key], again[key])}
    assert differing == {"levels", "conditioner"} if "text" in changes else {"levels"}
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


def test_equal_levels_at_different_places_start_apart():
    level = LevelConfig(side=8, widths=(32, 32), blocks=(0, 0), attention=(0, 0))
    levels = tuple(level.model_copy(update={"side": side}) for side in (8, 16, 32))
    net = NestedUNet(ModelConfig(levels=levels, embedding=32))
    _, middle, finest = (level.stem.weight for level in net.levels)
    assert not torch.equal(middle, finest)


def test_growing_keeps_precision_and_mode():
    grown = grow(awake(1).double().train(), nest(2))
    assert grown.training
    assert {parameter.dtype for parameter in grown.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"embedding": 64}, "model.embedding"),
        ({"coarse": COARSE}, "model.coarse"),
        ({"levels": nest(1).levels}, r"model.levels\[1\]"),
        ({"levels": nest(3, core={"heads": 1}).levels}, r"model.levels\[0\]"),
    ],
)
def test_only_an_extension_can_be_grown_into(change: dict[str, Any], key: str):
    with pytest.raises(ValueError, match=key):
        check_extends(nest(2), nest(3).model_copy(update=change))


# --- ragged batches ------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("rows", [(4, 0, 0), (4, 3, 1)])
def test_rows_without_a_fine_level_equal_the_coarser_network(
    shared: dict, cond: Conditioning, rows: tuple[int, ...]
):
    """Bit for bit, although the adapters are not zero: such rows only meet padding."""
    net = awake(3, **shared)
    z = noisy(net.config)
    mixed = run(net, cond, z=ragged(z, rows))
    assert [len(y) for y in mixed] == list(rows)
    for depth in (1, 2):
        alone = run(inside(net, depth), cond, z=ragged(z[:depth], rows[:depth]))
        for level in range(depth):
            assert torch.equal(mixed[level][rows[depth] :], alone[level][rows[depth] :])


@every_kind
@pytest.mark.parametrize("depth", [1, 2])
def test_a_pyramid_that_ends_early_is_computed_by_the_coarser_network(
    shared: dict, cond: Conditioning, depth: int
):
    net = awake(3, **shared)
    z = noisy(net.config)[:depth]
    assert equal(run(net, cond, z=z), run(inside(net, depth), cond, z=z))


def test_rows_with_all_levels_equal_the_whole_network_and_do_not_see_each_other():
    net = awake(3, text=TEXT)
    z = noisy(net.config)
    cond = Conditioning(tokens=words(), mask=LENGTHS)
    changed = tuple(torch.cat([level[:1], level[1:] + 1.0]) for level in z)
    runs = (run(net, cond, z=each) for each in (z, ragged(z, (4, 3, 2)), changed))
    for whole, part, other in zip(*runs, strict=True):
        torch.testing.assert_close(part[:2], whole[:2], rtol=1e-5, atol=1e-5)
        assert torch.equal(whole[:1], other[:1])


@pytest.mark.parametrize(
    ("clips", "changes"),
    [
        (False, {"side": 64, "patch": 2, "input_scaling": "none", "attention": (1, 0)}),
        (False, {"input_scaling": "std"}),
        (False, {"input_scaling": "analytic"}),
        (True, {}),
    ],
)
def test_a_level_of_no_rows_runs_forwards_and_backwards(clips: bool, changes: dict[str, Any]):
    """So that processes with and without fine rows take part in the same gradients."""
    config = nest(3, clips=clips, text=TEXT, classes=3)
    top = config.levels[2].model_copy(update=changes)
    config = config.model_copy(update={"levels": (*config.levels[:2], top)})
    net = wake(NestedUNet(config)).train()
    out = net(ragged(noisy(config), (4, 2, 0)), TIMES, KINDS["text and classes"][1])
    torch.stack([y.square().sum() for y in out]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    outer = [gradient for name, gradient in gradients.items() if level_of(name) == 2]
    assert all(gradient is not None and not gradient.any() for gradient in outer)
    inner = gradients["levels.0.stem.weight"]
    assert inner is not None
    assert inner.any()


# --- conditions ----------------------------------------------------------------------------------

MASK = torch.arange(5).expand(ROWS, -1) < 3


def text_net(**changes: Any) -> NestedUNet:
    return awake(1, text=TEXT.model_copy(update=changes))


@pytest.mark.parametrize("clips", [False, True])
def test_fused_attention_of_gpus_may_take_all_queries_keys_and_values(clips, monkeypatch):
    """It needs the numbers of a head side by side. The meta device takes the path of GPUs."""
    strides: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        strides.extend(x.stride(-1) for x in (q, k, v))
        return torch.empty_like(q)

    for module in (layers, temporal):
        monkeypatch.setattr(module, "attend", attend)
    for form in (torch.contiguous_format, torch.channels_last):
        with torch.device("meta"):
            net = NestedUNet(nest(clips=clips, text=TEXT))
            net = net.to(memory_format=form)  # pyright: ignore[reportCallIssue]
            z = tuple(torch.empty_like(level) for level in noisy(net.config, 1))
            net(z, torch.empty(1), Conditioning(tokens=torch.empty(1, 5, 12)))
    assert strides
    assert {*strides} == {1}


@pytest.mark.parametrize("layers", [0, 2])
def test_padding_is_invisible_where_attention_is_masked(layers: int):
    net = text_net(layers=layers)
    padded = torch.where(MASK[:, :, None], words(), words(seed=2))
    result = run(net, Conditioning(tokens=words(), mask=MASK))
    torch.testing.assert_close(result, run(net, Conditioning(tokens=padded, mask=MASK)))
    torch.testing.assert_close(result, run(net, Conditioning(tokens=words()[:, :3])))


def test_padding_is_seen_where_attention_is_not_masked():
    """The released models attend to padding; their pooled embedding still leaves it out."""
    net = text_net(masked=False, layers=0)
    padded = torch.where(MASK[:, :, None], words(), words(seed=2))
    conds = [Conditioning(tokens=features, mask=MASK) for features in (words(), padded)]
    assert differ(run(net, conds[0])[0], run(net, conds[1])[0])
    torch.testing.assert_close(*[net.conditioner(cond).embedding for cond in conds])


def test_a_dropped_row_shows_neither_its_text_nor_its_label():
    net = awake(3, text=TEXT, classes=3)
    one = Conditioning(LABELS, words())
    two = Conditioning(torch.tensor([2, 1, 0, 1]), words(seed=2))
    dropped = torch.tensor([True, False, True, False])
    result = run(net, one.drop(dropped))
    for a, b, whole in zip(result, run(net, two.drop(dropped)), run(net, one), strict=True):
        assert torch.equal(a[dropped], b[dropped])
        assert not torch.isclose(a[~dropped], b[~dropped]).all(3).any()
        torch.testing.assert_close(a[~dropped], whole[~dropped])
    assert equal(run(net, one.null()), run(net, two.drop(dropped).drop(~dropped)))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("layers", [0, 1])
def test_the_null_caption_does_not_depend_on_how_long_the_caption_was(masked: bool, layers: int):
    net = text_net(masked=masked, layers=layers)
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 0])[:, None]  # one has no word at all
    long = Conditioning(tokens=words(tokens=5), mask=mask).null()
    torch.testing.assert_close(
        run(net, long), run(net, Conditioning(tokens=words(tokens=2)).null())
    )


MICRO = (MicroConfig(name="scale", ceiling=64.0), MicroConfig(name="aspect"))


def test_micro_conditions_are_clamped_or_multiplied():
    net = awake(1, core={"micro": MICRO})
    inputs: list[Tensor] = []
    net.levels[0].micro["aspect"].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))

    def with_micro(scale: float, aspect: float) -> Tensor:
        micro = {"scale": torch.full((ROWS,), scale), "aspect": torch.full((ROWS,), aspect)}
        return run(net, Conditioning(micro=micro))[0]

    plain = with_micro(64.0, 0.5)
    torch.testing.assert_close(inputs[0], sinusoid(torch.full((ROWS,), 500.0), 8))
    assert torch.equal(plain, with_micro(1000.0, 0.5))
    assert differ(plain, with_micro(32.0, 0.5))
    assert differ(plain, with_micro(64.0, 1.0))


def test_an_upsamplers_coarse_image_and_its_time_reach_every_level():
    shared, cond = KINDS["upsampler"]
    net = awake(3, **shared)
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
    ("model", "cond", "name"),
    [
        ({"text": TEXT}, Conditioning(), "tokens"),
        ({"classes": 3}, Conditioning(), "labels"),
        ({"core": {"micro": MICRO}}, Conditioning(), "aspect: add it"),
        ({"coarse": COARSE}, Conditioning(), "image_t"),
        (
            {"text": TEXT.model_copy(update={"learned_null": False})},
            Conditioning(tokens=words()).null(),
            "null caption: encode",
        ),
    ],
)
def test_a_missing_condition_is_named(model: dict, cond: Conditioning, name: str):
    with pytest.raises(ValueError, match=name):
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
    torch.testing.assert_close(own, torch.cat([torch.zeros(1), 500 - 25 * log_snr]))
    angles = 3.0 * 10_000 ** (-torch.arange(4) / 4)
    expected = torch.cat([angles.sin(), angles.cos()])[None]
    torch.testing.assert_close(sinusoid(torch.tensor([3.0]), 8), expected)


@pytest.mark.parametrize("time_input", ["step", "log-snr"])
def test_predictions_depend_on_time_and_dropout_acts_in_training_only(time_input: str):
    net = awake(1, time_input=time_input, core={"dropout": 0.5})
    assert equal(run(net), run(net))
    assert differ(run(net)[0], run(net, t=TIMES.flip(0))[0])
    assert not equal(run(net.train()), run(net))


# --- names of parameters -------------------------------------------------------------------------


def test_a_parameters_level_is_the_one_it_came_with():
    coarse, whole = NestedUNet(nest(1)), NestedUNet(nest(3))
    first = [name for name, _ in whole.named_parameters() if level_of(name) == 0]
    assert first == [name for name, _ in coarse.named_parameters()]
    assert level_of("adapters.2.inward.weight") == 2


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
        ("0.05/weights/levels.1.outward.bias", "0.05/weights/adapters.1.outward.bias"),
        ("levels.0.image_time.2.weight.exp_avg", "levels.0.micro.coarse_time.2.weight.exp_avg"),
        ("levels.0.stem.weight", "levels.0.stem.weight"),
    ],
)
def test_a_name_of_version_0_1_0_has_one_present_name(first: str, present: str):
    assert present_name(first) == present_name(present) == present
    assert old_name(present) == old_name(first) == first
    for shared, _ in KINDS.values():
        names = set(NestedUNet(nest(**shared)).state_dict())
        assert {present_name(old_name(name)) for name in names} == names
        assert {present_name(name) for name in names} == names


def test_whitened_captions_are_equally_far_apart_in_every_direction():
    """Captions that differ by a hundredth of what they share are as far apart as others."""
    torch.manual_seed(0)
    spread = torch.logspace(0, -1, 6)
    captions = 5.0 + torch.randn(4000, 6) * spread
    text = TextTower(TextConfig(features=6, width=6), embedding=32)
    null = there(text.null).detach().clone()
    torch.nn.init.eye_(text.project.weight)
    text.whiten(captions)
    white = text.project(captions)
    assert white.mean(0).abs().max() < 1e-4
    variance = captions.var(0, correction=0)
    expected = (variance / (variance + SHRINKAGE * variance.mean())).sqrt()
    torch.testing.assert_close(white.std(0, correction=0), expected, rtol=0.01, atol=0.0)
    off_diagonal = torch.corrcoef(white.T).fill_diagonal_(0.0)
    assert off_diagonal.abs().max() < 0.02
    torch.testing.assert_close(text.project(text.null), null, rtol=1e-3, atol=1e-3)
