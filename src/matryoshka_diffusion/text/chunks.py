"""Features on disk: safetensors chunks, each written whole, and an index of their captions."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from matryoshka_diffusion.files import digest, remove_stale, write_atomically

OVERHEAD = 44
"""Bytes beside the features of a caption: its digest in JSON, and an offset."""

_NAME = "S16"  # a digest as bytes: numpy sorts and searches them


class _Index(NamedTuple):
    """One row for each caption: its digest, its chunk, and its tokens `begin .. end - 1` there."""

    names: np.ndarray
    chunks: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


class Chunks:
    """A folder of features, ragged, all of `width` numbers a token in `dtype`.

    A chunk holds `values` (all tokens of its captions, one after the other) and `offsets`, and
    the digests of its captions as JSON in the header. It is written whole, named by what it holds
    and never changed, so that several processes may fill one folder. Chunks are mapped into
    memory, not read; the index, made from their headers, takes 36 bytes a caption.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype) -> None:
        self.folder, self.width, self.dtype = folder, width, dtype
        self._paths: list[Path] = []
        self._values: dict[int, Any] = {}
        self._index = _Index(*(np.empty(0, kind) for kind in (_NAME, "i4", "i8", "i8")))
        self._unsorted: list[_Index] = []
        for path in sorted(folder.glob("*.safetensors")):
            self._note(path)

    def __len__(self) -> int:
        """How many captions there are."""
        return len(np.unique(self._sorted().names))

    @property
    def bytes(self) -> int:
        """The size of all chunks."""
        return sum(path.stat().st_size for path in self._paths)

    def find(self, captions: Sequence[str]) -> Int[np.ndarray, " n"]:
        """Where each caption's features are, for `read`; -1 where they are not."""
        names, index = np.array([_name(caption) for caption in captions], _NAME), self._sorted()
        if not len(index.names):
            return np.full(len(captions), -1)
        rows = np.searchsorted(index.names, names)
        rows[rows == len(index.names)] = 0
        return np.where(index.names[rows] == names, rows, -1)

    def read(self, row: int) -> Float[Tensor, "n d"]:
        """The features at a place that `find` gave, in float32."""
        index = self._sorted()
        chunk = int(index.chunks[row])
        if chunk not in self._values:
            self._values[chunk] = safe_open(self._paths[chunk], "pt").get_slice("values")
        return self._values[chunk][int(index.begins[row]) : int(index.ends[row])].float()

    def write(self, captions: Sequence[str], features: Sequence[Float[Tensor, "_ d"]]) -> None:
        """Add a chunk. Raises OSError with the path and, on a full disk, the bytes needed."""
        lengths = torch.tensor([0, *(len(feature) for feature in features)])
        tensors = {"values": torch.cat(list(features)).to(self.dtype), "offsets": lengths.cumsum(0)}
        names = [digest(caption) for caption in captions]
        data = save(tensors, {"captions": json.dumps(names)})
        path = self.folder / f"{digest(' '.join(names))}.safetensors"
        write_atomically(path, lambda file: file.write(data), needed=len(data))
        self._note(path)

    def tidy(self) -> None:
        """Remove what a process that was killed while writing has left, when it is surely dead."""
        for path in self.folder.glob(".*.tmp"):
            remove_stale(path)

    def _note(self, path: Path) -> None:
        """Take a chunk into the index; one that makes no sense is removed.

        Another process may have removed it since it was seen.
        """
        try:
            with safe_open(path, "pt") as chunk:
                names = json.loads(chunk.metadata()["captions"])
                offsets = chunk.get_tensor("offsets").numpy()
                values = chunk.get_slice("values")
                if values.get_shape() != [offsets[-1], self.width]:
                    raise ValueError("its features have another shape")
                if values[:0].dtype != self.dtype:
                    raise ValueError("its features have another type")
                if len(offsets) != len(names) + 1:
                    raise ValueError("it has not as many features as captions")
            found = np.frombuffer(bytes.fromhex("".join(names)), _NAME)
            number = np.full(len(names), len(self._paths), "i4")
            part = _Index(found, number, offsets[:-1], offsets[1:])
        except FileNotFoundError:
            return
        except (SafetensorError, ValueError, LookupError, TypeError) as error:
            warnings.warn(f"{path} is corrupt and is made again ({error})", stacklevel=4)
            path.unlink(missing_ok=True)
        else:
            self._paths.append(path)
            self._unsorted.append(part)

    def _sorted(self) -> _Index:
        """The index in the order of its names, made when it is asked for after a change."""
        if self._unsorted:
            parts, self._unsorted = [self._index, *self._unsorted], []
            whole = _Index(*(np.concatenate(column) for column in zip(*parts, strict=True)))
            order = np.argsort(whole.names, kind="stable")
            self._index = _Index(*(column[order] for column in whole))
        return self._index


def _name(caption: str) -> bytes:
    return bytes.fromhex(digest(caption))
