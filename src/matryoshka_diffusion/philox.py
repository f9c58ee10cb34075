"""Philox 4x64 with ten rounds, the counter-based generator of all random numbers.

A block of four 64-bit words is a function of a key and a counter (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", 2011). A CPU takes the words from numpy. Any other device computes the
same words with torch's operations, and nothing is copied there but keys and counters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product, starmap
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
LOW_HALF = 2**32 - 1
PAIRS = 8
"""Integers of 32 bits in a block."""
CHUNK = 2**17
"""Pairs of normal numbers that a CPU draws at a time: they stay in the cache of a core."""
SERIAL = 2**18
"""Fewer pairs are drawn by the calling thread alone: starting others would take longer."""


class Place(NamedTuple):
    """The key of a stream and the three words of its counter that stay: the first counts blocks."""

    key: Int[np.ndarray, " 2"]
    counters: Int[np.ndarray, " 3"]

    @classmethod
    def of(cls, seed: int, purpose: str, counters: Sequence[int]) -> Place:
        """The stream of a seed, a purpose and up to three counters, by default zeros."""
        assert len(counters) <= 3, "a Philox counter has four words and the first one counts blocks"
        digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=16).digest()
        padded = [*counters, *[0] * (3 - len(counters))]
        return cls(np.frombuffer(digest, np.uint64), np.array(padded, np.uint64))

    def state(self, block: int) -> dict[str, Any]:
        """State of numpy's Philox just before a block of the stream, the first being 0."""
        counter = np.array([block, *self.counters], np.uint64)
        words = {"counter": counter, "key": self.key}
        empty = {"buffer": np.zeros(4, np.uint64), "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
        return {"bit_generator": "Philox", "state": words, **empty}

    def generator(self) -> np.random.Generator:
        """numpy's generator at the beginning of the stream."""
        counter = np.array([0, *self.counters], np.uint64)
        return np.random.Generator(np.random.Philox(key=self.key, counter=counter))


def normal_rows(
    places: Sequence[Sequence[Place]], counts: Sequence[int], device: torch.device | str
) -> list[Float[Tensor, "b _"]]:
    """Draw `counts[k]` standard normal float32 numbers from the beginning of stream k of each row.

    The streams of a row have one key. A GPU draws from all of them with one series of kernels.

    A pair of numbers takes 32 bits for its radius, from the first half of the blocks, and 32 bits
    for its angle, from the second half. All devices use the same bits; their logarithms, sines and
    cosines may differ in the last digits.
    """
    assert all(len({place.key.tobytes() for place in row}) < 2 for row in places), "one key a row"
    halves = [-(-count // PAIRS // 2) * PAIRS for count in counts]
    parts = [torch.empty(len(places), 2, half, device=device) for half in halves]
    if torch.device(device).type == "cpu":
        for part, rows in enumerate(parts):
            _fill_on_cpu(rows, [row[part] for row in places])
    else:
        fill_on_device(parts, places)
    return [rows.flatten(1)[:, :count] for rows, count in zip(parts, counts, strict=True)]


def _fill_on_cpu(rows: Float[Tensor, "b 2 n"], places: Sequence[Place]) -> None:
    """Fill with normal numbers from numpy's words, on as many threads as torch computes with."""
    count, _, half = rows.shape
    width, height = min(half, CHUNK), max(1, CHUNK // max(half, 1))

    def fill(row: int, column: int) -> None:
        chunk = rows[row : row + height, :, column : column + width]
        words = np.empty((len(chunk), 2, chunk.shape[2] // 2), np.uint64)
        source = np.random.Generator(np.random.Philox(key=0))
        for place, parts in zip(places[row : row + height], words, strict=True):
            for first, part in zip((column, half + column), parts, strict=True):
                source.bit_generator.state = place.state(first // PAIRS)
                part[:] = source.integers(0, 2**64 - 1, len(part), np.uint64, endpoint=True)
        bits = torch.from_numpy(words.view(np.int32))
        _box_muller(bits[:, 0], bits[:, 1], chunk.transpose(0, 1))

    chunks = [*product(range(0, count, height), range(0, half, width or 1))]
    threads = torch.get_num_threads()
    if threads == 1 or count * half < SERIAL:
        list(starmap(fill, chunks))
        return
    torch.set_num_threads(1)  # also of each thread of the pool: its operations start no others
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill, *zip(*chunks, strict=True)))
    finally:
        torch.set_num_threads(threads)


def fill_on_device(
    parts: Sequence[Float[Tensor, "b 2 _"]], places: Sequence[Sequence[Place]]
) -> None:
    """Fill with normal numbers from words that the device computes."""
    counts = [2 * rows.shape[2] // PAIRS for rows in parts]
    words = blocks(places, counts, parts[0].device).split(counts, dim=1)
    for rows, own in zip(parts, words, strict=True):
        radii, angles = own.flatten(1).view(torch.int32).split(rows.shape[2], dim=1)
        _box_muller(radii, angles, rows.transpose(0, 1))


def _box_muller(
    radii: Int[Tensor, "*b n"], angles: Int[Tensor, "*b n"], pairs: Float[Tensor, "2 *b n"]
) -> None:
    """Fill pairs of independent normal numbers r cos a and r sin a (Box and Muller, 1958).

    The radius is r = sqrt(-2 log u) for u in (0, 1] from the low 31 bits of an int32, the angle a
    is proportional to another int32. No number exceeds 6.7.
    """
    u = (radii & (2**31 - 1)).float().add_(0.5).mul_(2.0**-31)
    radius = u.log_().mul_(-2.0).sqrt_()
    angle = angles.float().mul_(2.0 * math.pi * 2.0**-32)
    torch.mul(radius, angle.cos(), out=pairs[0])
    torch.mul(radius, angle.sin_(), out=pairs[1])


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device. The host waits for no copy to a GPU.

    It would wait for a copy of memory that can move, so the copy is one of pinned memory.
    """
    if torch.device(device).type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def blocks(
    places: Sequence[Sequence[Place]], counts: Sequence[int], device: torch.device | str
) -> Int[Tensor, "b n 4"]:
    """Compute the first blocks of each stream, with unsigned words in the bits of int64."""
    fixed = np.array(
        [[(*place.key, *place.counters) for place in row] for row in places], np.uint64
    )
    words = torch.from_numpy(fixed.view(np.int64)).reshape(-1, len(counts), 5)
    table = send(words, device).permute(2, 0, 1)
    key, counters = table[:2, :, :1], table[2:].split(1, dim=2)
    first, second, third = torch.cat(
        [each.expand(-1, -1, count) for each, count in zip(counters, counts, strict=True)], dim=2
    )
    # The first counter is the block's number, which begins with one, as numpy's does.
    numbers = [torch.arange(1, count + 1, device=device) for count in counts]
    number = torch.cat(numbers).expand_as(first)
    even, odd = torch.stack([number, second]), torch.stack([first, third])
    multiplier, step = (
        torch.stack([torch.full((1, 1), _signed(word), device=device) for word in pair])
        for pair in (MULTIPLIERS, KEY_STEPS)
    )
    halves = _halves(multiplier)
    for _ in range(ROUNDS):
        product = even * multiplier
        even, odd = _high_word(_halves(even), halves).flip(0) ^ odd ^ key, product.flip(0)
        key = key + step
    return torch.stack([even[0], odd[0], even[1], odd[1]], dim=2)


def _halves(words: Int[Tensor, "..."]) -> tuple[Int[Tensor, "..."], Int[Tensor, "..."]]:
    """The lower and the upper 32 bits of 64-bit words."""
    return words & LOW_HALF, (words >> 32) & LOW_HALF


def _high_word(a: Sequence[Int[Tensor, "..."]], b: Sequence[Int[Tensor, "..."]]) -> Tensor:
    """The upper 64 bits of the unsigned product of 64-bit words, from their halves."""
    (a_low, a_high), (b_low, b_high) = a, b
    carry = ((a_low * b_low) >> 32) & LOW_HALF
    middle = a_high * b_low + carry
    other = a_low * b_high + (middle & LOW_HALF)
    return a_high * b_high + ((middle >> 32) & LOW_HALF) + ((other >> 32) & LOW_HALF)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - 2**64 if word >= 2**63 else word
