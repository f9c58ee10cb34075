"""Shapes of images: sizes of nearly equal area, of which a picture has the one that keeps most.

A batch costs about the same in any of them, and the noise schedules of square images, which are
shifted by resolution, hold for all.
"""

from __future__ import annotations

import math
from functools import lru_cache

from matryoshka_diffusion.config import RunConfig
from matryoshka_diffusion.pyramid import Resolution

MOST_LOST = 0.1
"""Share of a picture that a crop to the nearest shape takes away at most, up to `LONGEST`."""
LONGEST = 4  # times as long as high, or as high as long
FINEST_GRID = 16  # positions along the side of the square
_STEP = (1 - MOST_LOST) ** -2  # between neighbours: in their middle both lose `MOST_LOST`
MOST_AREA = math.log(1.25)
"""Most that the logarithms of the areas of a shape and of the square differ."""


def square(side: int) -> tuple[Resolution, ...]:
    """The one shape of data that is cut to squares."""
    return (Resolution(side, side),)


def shapes_of_data(config: RunConfig) -> tuple[Resolution, ...]:
    """Shapes in pixels that a run cuts its images to, the square first."""
    side, own = config.data_side, config.data.shapes == "own"
    return own_shapes(side, config.model.levels[0].stem_side) if own else square(side)


def own_shapes(side: int, grid: int) -> tuple[Resolution, ...]:
    """Shapes on a grid of so many positions along the side of the square, the square first.

    From the square on, each next shape is longer by a step at most, and among those of nearest
    area. Where the grid is too coarse for that, it is the next one on it.

    Examples:
        >>> [str(shape) for shape in own_shapes(64, 8)[:6]]
        ['64x64', '72x64', '72x56', '72x48', '88x48', '88x40']
    """
    while grid > FINEST_GRID and grid % 2 == 0:
        grid //= 2
    sizes = [(high, wide) for high in range(1, 2 * grid) for wide in range(high, 4 * high + 1)]
    area = {size: abs(math.log(math.prod(size) / grid**2)) for size in sizes}
    sizes = [size for size in sizes if area[size] < MOST_AREA]
    wide, last = [(grid, grid)], 1.0
    while further := [size for size in sizes if _length(size) > last / (1 - MOST_LOST)]:
        reach = last * _STEP
        wide.append(min(further, key=lambda size: (max(_length(size), reach), area[size])))
        last = _length(wide[-1])
    unit = side // grid
    tall = [(length, height) for height, length in wide[1:]]
    return tuple(Resolution(height * unit, width * unit) for height, width in (*wide, *tall))


def _length(size: tuple[int, int]) -> float:
    return size[1] / size[0]


@lru_cache(2**16)
def nearest(size: tuple[int, int], shapes: tuple[Resolution, ...]) -> int:
    """Index of the shape that keeps most of a picture of this width and height."""
    return max(range(len(shapes)), key=lambda n: kept(size, shapes[n]))


def kept(size: tuple[int, int], shape: Resolution) -> float:
    """Share of a picture of this width and height that a crop to the shape keeps."""
    ratio = size[0] * shape.height / (size[1] * shape.width)
    return min(ratio, 1 / ratio)
