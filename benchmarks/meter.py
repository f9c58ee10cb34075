"""Measurements of one device: time, kernels, memory, and waits of the host for a GPU."""

from __future__ import annotations

import statistics
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness
from matryoshka_diffusion.nn import layers, temporal
from matryoshka_diffusion.training.precision import resolve_layout

Numbers = dict[str, Any]


def attempt(run: Callable[[], Any]) -> Any:
    """The result of a call, or its traceback: one failure must not cost what comes after."""
    try:
        return run()
    except Exception:  # noqa: BLE001, it is reported
        return {"error": traceback.format_exc()[-3000:]}


class Meter(NamedTuple):
    """Measurements on a device: time, waits, kernels and memory."""

    device: torch.device

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def layout(self) -> str:
        """The layout that a run has on this device."""
        return resolve_layout("auto", self.device, "bf16")

    def seconds(self, run: Callable[[], object], repeats: int = 5) -> float:
        """Median seconds of a call; without a GPU one call is enough."""
        repeats = repeats if self.gpu else 1
        return statistics.median(harness.take_turns({"": run}, repeats, self.device)[""])

    def kernels(self, run: Callable[[], object], top: int = 8) -> Numbers:
        """Seconds, the share of them without a kernel, and the kernels that take most."""
        wall = self.seconds(run, 3)
        kind = ProfilerActivity.CUDA if self.gpu else ProfilerActivity.CPU
        with profile(activities=[kind]) as found:
            run()
            harness.synchronize(self.device)
        spent = [
            (self.time_of(event), event.count, event.key[:100])
            for event in found.key_averages()
            if not getattr(event, "is_user_annotation", False)  # spans of kernels that are listed
        ]
        spent.sort(reverse=True)
        busy, launched = (sum(row[n] for row in spent if row[0] > 0) for n in (0, 1))
        return {
            "ms": 1e3 * wall,
            "idle share": max(0.0, 1 - busy / 1e6 / wall),
            "kernels": launched,
            "most": [[round(time / 1e3, 3), count, name] for time, count, name in spent[:top]],
        }

    def time_of(self, event: Any) -> float:
        """Microseconds of a kernel, or on a CPU those of an operator."""
        return event.self_device_time_total if self.gpu else event.self_cpu_time_total

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most memory in use during a call; 0 without a GPU."""
        if not self.gpu:
            run()
            return 0
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()

    def host_waits(self, run: Callable[[], object]) -> Numbers:
        """Number of waits of the host for the GPU in a call, by the package's file and line."""
        if not self.gpu:
            return {}
        places: Counter[str] = Counter()

        def note(*_: object, **__: object) -> None:
            stack = [f for f in traceback.extract_stack() if "matryoshka_diffusion" in f.filename]
            place = stack[-1] if stack else traceback.extract_stack()[-3]
            places[f"{Path(place.filename).name}:{place.lineno} {place.line}"] += 1

        with warnings.catch_warnings(), mock.patch("warnings.showwarning", note):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return dict(places.most_common())


@contextmanager
def contiguous_heads() -> Iterator[None]:
    """Attention whose queries, keys and values are copied into the order of fused kernels."""
    plain = layers.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return plain(q.contiguous(), k.contiguous(), v.contiguous(), mask)

    with mock.patch.object(layers, "attend", attend), mock.patch.object(temporal, "attend", attend):
        yield


@contextmanager
def flag(backend: Any, name: str, value: Any) -> Iterator[None]:
    """A setting of torch's, put back after."""
    before = getattr(backend, name)
    setattr(backend, name, value)
    try:
        yield
    finally:
        setattr(backend, name, before)
