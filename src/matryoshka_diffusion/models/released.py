"""The paper's released checkpoints: read as data, matched key by key, converted to a model folder.

A `.pth` is a zip of one pickle and the bytes of its tensors. `torch.load` is not used: it hands
what it takes for TorchScript to a reader that runs it, and compares no checksums of a mapped file.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from matryoshka_diffusion.config import ConfigError, ModelConfig, RunConfig
from matryoshka_diffusion.diffusion import Process
from matryoshka_diffusion.files import BrokenFile, cache_folder, digest, write_atomically
from matryoshka_diffusion.models.released_names import INNER, convert_state_dict, run_config
from matryoshka_diffusion.models.released_pickle import (
    Record,
    TensorRecord,
    plain,
    read_pickle,
    short,
)
from matryoshka_diffusion.nn.layers import shapes_only
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.presets import preset
from matryoshka_diffusion.tensorfile import FLOATS, LARGEST_HEADER, check_header, not_floats
from matryoshka_diffusion.training.weights import MODEL, check_same, load_network

MOST_ENTRIES = 20_000
FORM = 1
"""Version of the conversion: raise it when its result changes, so that caches are made anew."""
STORAGES = {
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
}
"""Types of weights in a `.pth`. All become float32, as the released networks compute."""
_WRAPPED = re.compile(r"(module\.|_orig_mod\.)+")
"""Prefixes that DistributedDataParallel and torch.compile put before names of weights."""


@dataclass(frozen=True)
class Weights:
    """Tensors of a file, as float32; their shapes are known before the numbers are read.

    Attributes:
        like: empty tensors on the meta device, by name.
        read: returns the numbers of a tensor by its name, in memory of its own.
        settings: the run configuration in the file, as plain values; None without one.
        others: what else is in the file, as `read_pickle` returns it.
    """

    like: Mapping[str, Tensor]
    read: Callable[[str], Tensor]
    settings: Mapping[str, Any] | None = None
    others: Any = None

    def described(self) -> Mapping[str, Any]:
        """Everything in the file but its tensors, for people. Raises `BrokenFile`."""
        return plain(self.others, calls=True) if self.others else {}


@dataclass(frozen=True)
class Released:
    """A checkpoint that fits its network. Its numbers are not read yet.

    Attributes:
        weights: the file.
        config: network, process, text encoder and sampling defaults.
        keys: the file's key of every parameter of `NestedUNet(config.model)`.
    """

    weights: Weights
    config: RunConfig
    keys: Mapping[str, str]


def load_released(
    weights: str | Path | Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    text_dim: int = 2048,
) -> tuple[NestedUNet, Process]:
    """Load the network and the process of a released checkpoint.

    The network is called as every other: `net(z, t, cond)` with the levels from coarse to fine,
    `t = (step + 1) / 1000` and `Conditioning(tokens=..., mask=..., micro={"scale": ...})`.

    Args:
        weights: a `.pth` or `.safetensors` file, or its tensors by name.
        config: the released run configuration (`unet_config` inside). By default it is that of
            the file, or else one of the three released models, recognised by keys and shapes.
        text_dim: width of the text features where the configuration does not say it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or is something else, the configuration cannot be used, or
            a key is missing, left over or of another shape, or numbers are no floats.
    """
    released = read_released(weights, config, text_dim=text_dim)
    model = released.config.model
    numbers = {name: released.weights.read(key) for name, key in released.keys.items()}
    net = load_network(model, numbers, where="the released weights")
    return net.eval(), Process.from_config(released.config.process, model)


def read_released(
    weights: str | Path | Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    text_dim: int = 2048,
) -> Released:
    """Check what `load_released` loads, without its numbers. Arguments and errors are the same."""
    opened = _open_weights(weights)
    where = "the weights" if isinstance(weights, Mapping) else str(weights)
    settings = opened.settings if config is None else config
    if isinstance(settings, Mapping) and "unet_config" in settings:
        try:
            run = run_config(settings, text_dim=text_dim)
        except ConfigError as error:
            raise ConfigError(f"{'config' if config else where}: {error}") from error
    elif config is not None:
        raise ConfigError("config: no run configuration of the released code (no unet_config)")
    else:
        sizes = {1: 64, 2: 256, 3: 1024}
        levels = 1 + max((key.count(INNER) for key in opened.like), default=0)
        if levels not in sizes:
            raise BrokenFile(f"{where}: {levels} levels, but the released models have 1, 2 or 3")
        run = preset(f"released-{sizes[levels]}")
        assert run.model.text is not None, "the released models are text-to-image"
        text = run.model.text.model_copy(update={"features": text_dim})
        run = run.model_copy(update={"model": run.model.model_copy(update={"text": text})})
    return Released(opened, run, _match(opened.like, run.model, where))


def _match(like: Mapping[str, Tensor], model: ModelConfig, where: str) -> dict[str, str]:
    """The file's key of every parameter of the network.

    Raises:
        BrokenFile: the file does not fit; names the first differences.
    """
    try:
        names = {_WRAPPED.sub("", key): key for key in like}
        if len(names) < len(like):
            raise ValueError("several keys are the same but for module. or _orig_mod. before them")
        keys = convert_state_dict(names, model)
        with shapes_only():
            expected = NestedUNet(model).state_dict()
        check_same(expected, {name: like[key] for name, key in keys.items()}, where=where)
    except (ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise BrokenFile(
            f"{where} is none of the released networks, or not that of its config: "
            f"{str(error).splitlines()[0][:300]}"
        ) from error
    return keys


# --- files -------------------------------------------------------------------------------------


def _open_weights(weights: str | Path | Mapping[str, Tensor]) -> Weights:
    """Open a `.pth`, a `.safetensors` or tensors in memory.

    Raises:
        FileNotFoundError: there is no such file.
        BrokenFile: the file is damaged or something else.
    """
    if isinstance(weights, Mapping):
        for name, value in weights.items():
            if value.dtype not in FLOATS.values():
                raise BrokenFile(f"{short(name)} is {not_floats(value.dtype)}")
        like = {name: value.to("meta", torch.float32) for name, value in weights.items()}
        return Weights(like, lambda name: weights[name].detach().to(torch.float32, copy=True))
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    is_plain = path.suffix == ".safetensors"
    if is_plain:
        check_header(path)
    with _clear_errors(path):
        return _open_safetensors(path) if is_plain else _open_pth(path)


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Raise one `BrokenFile` with the path for whatever is wrong with the bytes of a file."""
    try:
        yield
    except BrokenFile as error:
        raise BrokenFile(f"{path}: {error}") from error
    except (
        *(zipfile.BadZipFile, SafetensorError, struct.error, EOFError, KeyError, ValueError),
        *(RuntimeError, OverflowError, NotImplementedError, MemoryError),
    ) as error:
        raise BrokenFile(
            f"{path}: it is no checkpoint of the release, damaged, or its download was cut short "
            f"({short(str(error))})"
        ) from error


def _open_safetensors(path: Path) -> Weights:
    opened = safe_open(path, framework="pt")
    names = opened.keys()
    if not 0 < len(names) <= MOST_ENTRIES:
        raise BrokenFile(f"it holds {len(names):,} tensors")
    like = {}
    for name in names:
        tensor = opened.get_slice(name)
        if tensor.get_dtype() not in FLOATS:
            raise BrokenFile(f"{short(name)} is {not_floats(tensor.get_dtype())}")
        like[name] = torch.empty(tensor.get_shape(), device="meta")
    return Weights(like, lambda name: opened.get_tensor(name).float())


def _open_pth(path: Path) -> Weights:
    """Open a checkpoint of `torch.save`; the checksum of a tensor is compared when it is read."""
    archive, size = zipfile.ZipFile(path), path.stat().st_size
    names = archive.namelist()
    roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(names) > MOST_ENTRIES or len(roots) != 1:
        raise BrokenFile(
            f"it is a zip file of {len(names):,} entries, {len(roots)} data.pkl among them: no "
            "checkpoint of torch.save"
        )

    def entry(name: str) -> zipfile.ZipInfo:
        info = archive.getinfo(f"{roots[0]}/{name}")
        # torch.save stores, it does not compress: what is compressed could expand to anything.
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size > size:
            raise BrokenFile(f"{short(name)} is packed or larger than the file it lies in")
        return info

    def read(name: str) -> Tensor:
        record = records[name]
        with _clear_errors(path):
            data = bytearray(archive.read(entry(f"data/{record.storage.key}")))
        if not data:
            return torch.empty(record.shape)
        dtype = STORAGES[record.storage.type]
        flat = torch.frombuffer(data, dtype=dtype, count=len(data) // dtype.itemsize)
        return flat.as_strided(record.shape, record.stride, record.offset).float().contiguous()

    if entry("data.pkl").file_size > LARGEST_HEADER:
        raise BrokenFile("data.pkl is too large")
    tree = read_pickle(archive.read(entry("data.pkl")))
    order = f"{roots[0]}/byteorder"
    if order in archive.NameToInfo and archive.open(entry("byteorder")).read(9) != b"little":
        raise BrokenFile("it was written by a big-endian machine, which is not supported")
    records: Any = tree.get("state_dict", tree) if isinstance(tree, dict) else None
    if not isinstance(records, dict) or not records:
        raise BrokenFile("it holds no state_dict: a mapping from names to tensors")
    like, total = {}, 0
    for name, record in records.items():
        if not isinstance(name, str) or not isinstance(record, TensorRecord):
            raise BrokenFile(f"its state_dict has {short(name)}, which is no tensor with a name")
        dtype = STORAGES.get(record.storage.type)
        if dtype is None:
            kind = short(record.storage.type)
            raise BrokenFile(f"{short(name)} is of {kind}: weights are float16, bfloat16, float32")
        steps = zip(record.shape, record.stride, strict=True)
        numel = math.prod(record.shape)
        last = record.offset + (1 + sum((n - 1) * step for n, step in steps) if numel else 0)
        if max(last, numel) > entry(f"data/{record.storage.key}").file_size // dtype.itemsize:
            raise BrokenFile(f"{short(name)} needs more numbers than the file holds")
        like[name] = torch.empty(record.shape, device="meta")
        total += numel * dtype.itemsize
    if total > size:  # tensors that share storages: a small file could stand for any amount
        raise BrokenFile(f"its tensors have {total:,} bytes, more than the file")
    args = tree.get("args")
    settings = plain(args) if isinstance(args, Record | dict) else None
    others = {name: part for name, part in tree.items() if name != "state_dict"}
    return Weights(
        like,
        read,
        settings if isinstance(settings, dict) else None,
        others if "state_dict" in tree else None,
    )


# --- converting --------------------------------------------------------------------------------


def convert(
    released: Released, folder: Path, *, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write `config.json` and `model.safetensors` into `folder`, which `Matryoshka.load` reads.

    Memory holds one tensor at a time. `progress` is called with (bytes written, bytes in all).

    Raises:
        BrokenFile: a tensor is damaged. `folder` then holds no model.
        OSError: the files cannot be written; names the path and the reason.
    """
    text = json.dumps(released.config.model_dump(mode="json"), indent=1).encode()
    entries, total = {}, 0
    for name, key in released.keys.items():
        like = released.weights.like[key]
        offsets = [total, total + like.nbytes]
        entries[name] = {"dtype": "F32", "shape": list(like.shape), "data_offsets": offsets}
        total = offsets[1]
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(header)) + header)
        done = 0
        for key in released.keys.values():
            done += file.write(released.weights.read(key).numpy().data)
            if progress is not None:
                progress(done, total)

    write_atomically(folder / "config.json", lambda file: file.write(text))
    try:  # the weights come last: a folder that has them is complete
        write_atomically(folder / MODEL, write, needed=8 + len(header) + total)
    except BaseException:
        (folder / "config.json").unlink()
        raise


def convert_once(path: Path, *, progress: Callable[[int, int], None] | None = None) -> Path:
    """Convert a released file into the cache, once; return the folder of the model.

    Raises:
        ValueError, OSError: as `read_released` and `convert`.
    """
    status = path.stat()
    folder = cache_folder(
        "released", digest(f"{FORM} {path.resolve()} {status.st_size} {status.st_mtime_ns}")
    )
    if not (folder / MODEL).is_file():
        released = read_released(path)
        try:
            convert(released, folder, progress=progress)
        except OSError as error:
            raise OSError(
                error.errno, f"{error.strerror}; MDM_CACHE may name another folder for the cache"
            ) from error
    return folder
