"""Levels with frames: growth, ragged rows, what attention and resampling over frames compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from matryoshka_diffusion.conditioning import Conditioning
from matryoshka_diffusion.config import LevelConfig, ModelConfig
from matryoshka_diffusion.nn import temporal
from matryoshka_diffusion.nn.nested import NestedUNet, grow
from matryoshka_diffusion.nn.temporal import DownFrames, FrameAttention, UpFrames
from matryoshka_diffusion.presets.paper import s64, t16, t16s256
from matryoshka_diffusion.pyramid import Pyramid
from matryoshka_diffusion.runs.grow import next_frames, next_level
from nests import MOVING, PICTURE, TEXT, TIMES, equal, inside, noisy, run, wake, words

ROWS, FRAMES = 3, 4

MASK = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
WORDS = Conditioning(tokens=words(ROWS), mask=MASK)
SHUFFLED = torch.tensor([2, 0, 3, 1])


def model(*levels: LevelConfig) -> ModelConfig:
    return ModelConfig(levels=levels, embedding=32, text=TEXT)


def awake(*levels: LevelConfig) -> NestedUNet:
    return wake(NestedUNet(model(*levels)))


def clips(net: NestedUNet) -> Pyramid:
    return noisy(net.config, ROWS)


# --- the paper's levels (Appendix A) -------------------------------------------------------------


def test_16_frames_and_256_pixels_around_s64_are_the_papers_s64t16s256():
    moving, fine = t16(), t16s256()
    assert next_frames(s64(text=True), 16) == moving
    assert next_level(moving, 256) == fine
    assert [moving.frames_at(index) for index in range(5)] == [16, 8, 4, 2, 1]
    assert (moving.widths, moving.blocks) == ((256,) * 5, (2, 2, 2, 2, 1))
    assert (moving.attention, moving.frame_attention) == ((0,) * 5, (1, 1, 1, 1, 0))
    assert (fine.widths, fine.blocks) == ((64, 128, 256), (2, 2, 1))
    shape = [(level.core_side, level.core_frames, level.shift_ratio) for level in (moving, fine)]
    assert shape == [(64, 1, 4.0), (64, 16, 16.0)]
    for power in (0.5, 2.0):  # 16 frames quarter the signal-to-noise whatever the power
        level = next_frames(PICTURE.model_copy(update={"shift_power": power}), 16)
        assert (level.shift_ratio / PICTURE.shift_ratio) ** power == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("level", "frames", "allowed"), [(PICTURE, 6, "2, 4, 8"), (MOVING, 4, "8")]
)
def test_frames_are_those_of_the_finest_level_times_a_power_of_two(level, frames, allowed):
    with pytest.raises(ValueError, match=rf"--frames {frames}: .*\({allowed}"):
        next_frames(level, frames)


# --- the nest ------------------------------------------------------------------------------------


def test_one_level_alone_denoises_clips():
    """Simple DM for video: no image level inside."""
    net = awake(
        LevelConfig(
            side=8, frames=4, widths=(32, 32, 64), blocks=(1, 1, 1), attention=(0, 0, 1),
            halve_frames=(False, True), frame_attention=(1, 1, 0), heads=4, middle=True,
            input_scaling="std",
        )
    )  # fmt: skip
    level = net.levels[0]
    assert (level.config.core_side, level.config.core_frames) == (4, 2)
    (clip,) = clips(net)
    assert run(net, WORDS, z=(clip,))[0].shape == clip.shape
    scaled = level.scale(clip, TIMES[:ROWS])
    torch.testing.assert_close(scaled.flatten(1).std(1), torch.ones(ROWS))


# --- equivariance --------------------------------------------------------------------------------


def test_a_level_without_temporal_layers_treats_each_frame_as_an_image():
    """Shuffling the frames of the input shuffles those of the output, and does nothing else."""
    fields: dict[str, Any] = {"widths": (32, 64), "blocks": (1, 1), "attention": (0, 1), "heads": 4}
    moving = awake(LevelConfig(side=8, frames=FRAMES, **fields))
    still = awake(LevelConfig(side=8, **fields))
    still.load_state_dict(moving.state_dict())
    (clip,) = clips(moving)
    (result,) = run(moving, WORDS, z=(clip,))
    (shuffled,) = run(moving, WORDS, z=(clip[:, :, SHUFFLED],))
    torch.testing.assert_close(shuffled, result[:, :, SHUFFLED])
    for frame in range(FRAMES):
        (alone,) = run(still, WORDS, z=(clip[:, :, frame],))
        torch.testing.assert_close(result[:, :, frame], alone)


def test_frames_see_each_other_in_order_and_clips_do_not():
    net = awake(PICTURE, MOVING)
    image, clip = clips(net)
    result = run(net, WORDS, z=(image, clip))
    alone = run(net, WORDS.rows(slice(1)), z=(image[:1], clip[:1]))
    for whole, one in zip(result, alone, strict=True):
        torch.testing.assert_close(whole[:1], one)
    still, shuffled = run(net, WORDS, z=(image, clip[:, :, SHUFFLED]))
    assert not torch.allclose(shuffled, result[1][:, :, SHUFFLED], atol=1e-3)
    assert not torch.equal(still, result[0])
    grown = grow(inside(net, 1), net.config)  # which has learnt nothing of the clip
    assert equal(run(grown, WORDS, z=(image, clip))[:1], run(grown, WORDS, z=(image, -clip))[:1])


# --- attention over frames -----------------------------------------------------------------------


def attention() -> FrameAttention:
    torch.manual_seed(0)
    layer = FrameAttention(32, heads=4, frames=FRAMES).double()
    with torch.no_grad():
        for parameter in layer.out.parameters():
            parameter.normal_()
    return layer


def features(clips: int = 2, side: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(clips * FRAMES, 32, side, side, generator=generator, dtype=torch.float64)


@torch.no_grad()
def test_attention_over_frames_is_softmax_over_the_times_of_one_position():
    layer, h = attention(), features()
    half = torch.exp(-torch.log(torch.tensor(1e4)) * torch.arange(16) / 16)
    angles = torch.arange(FRAMES)[:, None] * half
    numbers = torch.cat([angles.sin(), angles.cos()], dim=1).double()
    expected = h.clone()
    normal = layer.norm(h)
    for clip in range(2):
        rows = slice(clip * FRAMES, (clip + 1) * FRAMES)
        for y in range(3):
            for x in range(3):
                tokens = normal[rows, :, y, x] + numbers
                qkv = tokens @ layer.qkv.weight[:, :, 0, 0].T + layer.qkv.bias
                heads = [part.view(FRAMES, 4, 8).transpose(0, 1) for part in qkv.chunk(3, 1)]
                scores = (heads[0] @ heads[1].transpose(1, 2) / 8**0.5).softmax(-1)
                attended = (scores @ heads[2]).transpose(0, 1).reshape(FRAMES, 32, 1, 1)
                expected[rows, :, y, x] += layer.out(attended)[:, :, 0, 0]
    torch.testing.assert_close(layer(h), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_attention_over_frames_ignores_space_works_in_parts_and_starts_as_a_no_op(
    monkeypatch: pytest.MonkeyPatch,
):
    layer, h = attention(), features()
    whole = layer(h)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    moved = h.flatten(2)[:, :, order].view_as(h)
    torch.testing.assert_close(layer(moved), whole.flatten(2)[:, :, order].view_as(h))
    monkeypatch.setattr(temporal, "SEQUENCES", 4)
    torch.testing.assert_close(layer(h), whole)
    new = FrameAttention(32, heads=4, frames=FRAMES)
    assert torch.equal(new(h.float()), h.float())


# --- resampling of frames ------------------------------------------------------------------------


def by_hand(conv: nn.Conv2d, clip: Tensor, centre: int) -> Tensor:
    """The convolution's three taps around one frame of a clip (c, f, y, x)."""
    assert conv.bias is not None
    out = conv.bias.view(-1, 1, 1).expand(-1, *clip.shape[2:])
    for tap, frame in enumerate((centre - 1, centre, centre + 1)):
        if 0 <= frame < clip.shape[1]:
            out = out + torch.einsum("oi,iyx->oyx", conv.weight[:, :, tap, 0], clip[:, frame])
    return out


@torch.no_grad()
@pytest.mark.parametrize("kind", [DownFrames, UpFrames])
def test_resampled_frames_are_convolutions_around_every_other_one_or_each_one_twice(kind: type):
    torch.manual_seed(0)
    layer, h = kind(32, FRAMES).double(), features()
    clips = h.unflatten(0, (2, FRAMES)).transpose(1, 2)
    step = 2 if kind is DownFrames else 1
    clips = clips if kind is DownFrames else clips.repeat_interleave(2, dim=2)
    result = layer(h).unflatten(0, (2, -1))
    assert result.shape[1] == clips.shape[2] // step
    for clip in range(2):
        for frame in range(result.shape[1]):
            expected = by_hand(layer, clips[clip], step * frame)
            torch.testing.assert_close(result[clip, frame], expected)
