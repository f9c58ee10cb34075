"""Models as ONNX graphs, for programs without torch: a folder that `onnx_sampler.py` draws from.

A graph is the network with its first so many levels awake, for any number of rows and of tokens.
All graphs of a model share the file of weights. `model.json` has what a sampler needs to know: the
noise of every level at each of its steps, guidance, and where the features of captions are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor, nn

from matryoshka_diffusion.conditioning import AUGMENT_NUMBERS, Conditioning
from matryoshka_diffusion.config import SamplingConfig, UsageError
from matryoshka_diffusion.diffusion import per_level
from matryoshka_diffusion.files import refuse_full, require
from matryoshka_diffusion.models import onnx_sampler
from matryoshka_diffusion.nn.nested import NestedUNet
from matryoshka_diffusion.pyramid import shapes_of
from matryoshka_diffusion.sampling import DiffusionModel
from matryoshka_diffusion.schedule import instants

SMALL = 1024
"""Bytes up to which a constant stays in its graph."""
Stored = Literal["fp32", "fp16"]


def export_onnx(
    model: DiffusionModel,
    out: Path,
    *,
    captions: Sequence[str] = (),
    dtype: Stored = "fp32",
    **settings: Any,
) -> None:
    """Write a model as graphs, weights, `model.json` and a sampler in numpy into a new folder.

    Args:
        captions: prompts whose features are stored, for programs without the text encoder. Those
            of the empty prompt always are.
        dtype: of stored weights and features. What is computed is float32.
        settings: replacements of the model's sampling settings, such as `steps`.

    Raises:
        UsageError: the model is not one of plain images, or a setting has no place in the folder.
        ConfigError: `out` is not empty, or a setting does not fit the model.
        MissingExtra: the packages of the extra `onnx` are not installed.
    """
    refuse_full(out)
    require("onnxscript", "onnx", "an export to ONNX")
    _refuse_others(model)
    sampling = model.sampling(settings)
    _refuse_settings(sampling)
    out.mkdir(parents=True, exist_ok=True)
    levels, awake = len(model.model.levels), [len(now.levels) for now in model.calls(sampling)]
    with (out / onnx_sampler.WEIGHTS).open("wb") as file:
        store = _Store(file, dtype)
        for count in sorted(set(awake)):
            graph = store.without_weights(_graph(model, count))
            (out / onnx_sampler.graph_name(count)).write_bytes(graph.SerializeToString())
    times = instants(model.times(sampling), model.process.schedules)
    about: dict[str, Any] = {
        "name": model.config.name,
        "levels": [shape[-1] for shape in shapes_of(model.model)],
        "channels": model.model.channels,
        "pixels": model.config.data.pixels,
        "prediction": model.process.prediction,
        "classes": list(model.config.data.classes) or [*map(str, range(model.model.classes))],
        "guidance": per_level(sampling.guidance, levels),
        "thresholds": per_level(sampling.threshold, levels),
        "awake": awake,
        # At t = 0 log-SNR is infinite, which JSON has no word for.
        "instants": [[[*noise[:2], min(noise.log_snr, 1e9)] for noise in t.levels] for t in times],
        "times": [now.t for now in times],
        "inputs": [*_conditions(model)],
        "dtype": dtype,
    }
    if model.model.text is not None:
        about["captions"] = _write_captions(model, ["", *captions], out, dtype)
    (out / onnx_sampler.ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    shutil.copyfile(onnx_sampler.__file__, out / "sample.py")


def _refuse_others(model: DiffusionModel) -> None:
    """Raise UsageError for a model that the folder's sampler does not know."""
    config, name = model.model, model.config.name
    kinds = {
        "draws clips": any(level.frames is not None for level in config.levels),
        "is an upsampler": config.coarse is not None,
        "draws latents of a codec": model.config.codec is not None,
        "plans in features": config.hidden > 0,
        "has untrained levels": not all(model.process.level_weights),
    }
    for kind, wrong in kinds.items():
        if wrong:
            raise UsageError(f"{name} {kind}, which an ONNX folder cannot: take another model")


def _refuse_settings(sampling: SamplingConfig) -> None:
    """Raise UsageError for a setting that the folder's sampler does not know."""
    plain = SamplingConfig()
    if sampling.sampler != "dpmpp-2m":
        raise UsageError(f"an ONNX folder draws with dpmpp-2m, not {sampling.sampler}: name it")
    for setting in ("guide", "guidance_interval", "rescale"):
        if getattr(sampling, setting) != getattr(plain, setting):
            raise UsageError(f"sampling.{setting} has no place in an ONNX folder: set it to none")


class _Flat(nn.Module):
    """The network with tensors as its arguments: latents, time, and the conditions by name."""

    def __init__(self, model: DiffusionModel) -> None:
        super().__init__()
        self.net, self.names = model.net, [*_conditions(model)]
        text = model.net.conditioner.text if isinstance(model.net, NestedUNet) else None
        self.null: Any = None if text is None else text.null
        side = float(model.picture_side)
        usual = model.model.usual_micro.items()
        self.micro = {name: side if value is None else value for name, value in usual}

    def forward(
        self, z: Sequence[Tensor], t: Tensor, conditions: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        named: dict[str, Any] = dict(zip(self.names, conditions, strict=True))
        if "tokens" in named and "dropped" in named:
            named["tokens"], named["mask"] = self._hidden(**named)
            del named["dropped"]
        micro = {name: torch.full_like(t, value) for name, value in self.micro.items()}
        augment = t.new_zeros(1, AUGMENT_NUMBERS).expand(t.shape[0], -1)
        return self.net(tuple(z), t, Conditioning(**named, micro=micro, augment=augment))

    def _hidden(self, tokens: Tensor, mask: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and mask with the null caption in dropped rows, as the conditioner puts it there.

        The conditioner chooses between bools, which onnxruntime cannot.
        """
        dropped = dropped[:, None]
        first = torch.arange(tokens.shape[1]) == 0
        tokens = torch.where(dropped[:, :, None], self.null, tokens)
        return tokens, (mask & ~dropped) | (first & dropped)


def _conditions(model: DiffusionModel) -> dict[str, Tensor]:
    """An example of every condition that the graphs take, of two rows."""
    config, examples = model.model, {}
    if config.text is not None:
        examples["tokens"] = torch.zeros(2, 3, config.text.features)
        examples["mask"] = torch.ones(2, 3, dtype=torch.bool)
    if config.classes:
        examples["labels"] = torch.zeros(2, dtype=torch.int64)
    if config.classes or (config.text is not None and config.text.learned_null):
        examples["dropped"] = torch.zeros(2, dtype=torch.bool)
    return examples


def _graph(model: DiffusionModel, levels: int) -> Any:
    """The network of the first `levels` levels as an ONNX model."""
    z = tuple(torch.zeros(2, *shape) for shape in shapes_of(model.model)[:levels])
    conditions = _conditions(model)
    rows, tokens = torch.export.Dim("rows", min=1, max=4096), torch.export.Dim("tokens", max=4096)
    free = {0: rows}
    lengths = [free | ({1: tokens} if x.ndim > 1 else {}) for x in conditions.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about itself
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            _Flat(model).eval(),
            (z, torch.full((2,), 0.5), *([tuple(conditions.values())] * bool(conditions))),
            dynamo=True,
            verbose=False,
            dynamic_shapes=((free,) * levels, free, *([tuple(lengths)] * bool(conditions))),
            input_names=[*(f"z{level + 1}" for level in range(levels)), "t", *conditions],
            output_names=[f"x{level + 1}" for level in range(levels)],
        )
    assert program is not None
    return program.model_proto


class _Store:
    """A file of weights that several graphs share. Equal ones are written once."""

    def __init__(self, file: BinaryIO, dtype: Stored) -> None:
        self._file, self._dtype = file, dtype
        self._places: dict[str, tuple[int, int]] = {}

    def without_weights(self, graph: Any) -> Any:
        """The graph with its weights in the file, from where a half is cast back to float32."""
        from onnx import TensorProto, external_data_helper, helper, numpy_helper

        casts = []
        for weight in graph.graph.initializer:
            x = numpy_helper.to_array(weight)
            if x.nbytes <= SMALL:
                continue
            if self._dtype == "fp16" and x.dtype == np.float32:
                name, half = weight.name, f"{weight.name}.fp16"
                weight.name, weight.data_type = half, TensorProto.FLOAT16
                casts.append(helper.make_node("Cast", [half], [name], to=TensorProto.FLOAT))
                x = x.astype(np.float16)
            offset, length = self._written(x)
            weight.ClearField("float_data")
            weight.raw_data = b""
            external_data_helper.set_external_data(
                weight, onnx_sampler.WEIGHTS, offset=offset, length=length
            )
            weight.ClearField("raw_data")
        for node in reversed(casts):
            graph.graph.node.insert(0, node)
        return graph

    def _written(self, x: np.ndarray) -> tuple[int, int]:
        data = np.ascontiguousarray(x).tobytes()
        key = hashlib.sha256(data).hexdigest()
        if key not in self._places:
            self._places[key] = self._file.tell(), len(data)
            self._file.write(data + bytes(-len(data) % 64))
        return self._places[key]


def _write_captions(
    model: DiffusionModel, captions: Sequence[str], out: Path, dtype: Stored
) -> dict[str, tuple[int, int]]:
    """Write the features of captions; return the first token and the number of tokens of each."""
    places, first = {}, 0
    with (out / onnx_sampler.CAPTIONS).open("wb") as file:
        for caption in dict.fromkeys(captions):
            _, cond = model.condition([caption], None, 1)
            assert cond.tokens is not None
            (tokens,) = cond.tokens.cpu()
            file.write(tokens.numpy().astype(onnx_sampler.STORED[dtype]).tobytes())
            places[caption] = first, len(tokens)
            first += len(tokens)
    return places
