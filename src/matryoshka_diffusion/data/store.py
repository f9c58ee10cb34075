"""Pictures made once: into one array on disk, ahead of whoever consumes them."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from jaxtyping import UInt8

from matryoshka_diffusion.files import write_atomically

Item = TypeVar("Item")
Result = TypeVar("Result")


def look_ahead(
    f: Callable[[Item], Result], items: Iterable[Item], *, workers: int, depth: int
) -> Generator[Result, None, None]:
    """`map(f, items)` in `workers` threads, in order, at most `depth` results ahead.

    An exception of `f` is raised at its place in the order. Closing the iterator early drops
    what is not yet begun and waits for the rest, so no thread outlives it.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="look-ahead")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(f, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def stored_pictures(
    path: Path,
    shape: tuple[int, int, int, int],
    make: Callable[[], Iterator[UInt8[np.ndarray, "h w c"]]],
    title: str,
) -> UInt8[np.ndarray, "n h w c"]:
    """The pictures in the file `path`, memory-mapped; made first if they are not there.

    They are written one by one as `make` yields them, with a progress bar called `title`, so
    a large set never has to fit into memory. A file that cannot be right is made again.

    Raises:
        OSError: the file cannot be written.
    """
    if (stored := open_array(path, shape)) is not None:
        return stored
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}

    def write(file: BinaryIO) -> None:
        from tqdm import tqdm

        np.lib.format.write_array_header_1_0(file, header)
        for picture in tqdm(make(), desc=title, total=shape[0], unit=" pictures", disable=None):
            file.write(picture.tobytes())

    write_atomically(path, write, needed=math.prod(shape))
    return np.load(path, mmap_mode="r")


def open_array(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The bytes in the file, memory-mapped; None, with a warning, if they have another shape."""
    try:
        stored = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        return None
    except (ValueError, EOFError) as error:
        stored, reason = None, str(error)
    else:
        reason = f"it holds {stored.dtype} {stored.shape}, not uint8 {shape}"
    if stored is None or stored.shape != shape or stored.dtype != np.uint8:
        warnings.warn(f"{path} is corrupt and is made again: {reason}", stacklevel=3)
        return None
    return stored
