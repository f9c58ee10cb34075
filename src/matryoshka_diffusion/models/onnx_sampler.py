"""Draw images with a folder that `mdm export --format onnx` wrote: numpy and onnxruntime alone.

The folder has this file as `sample.py`. It knows DPM-Solver++(2M), guidance, thresholds and levels
that wake late, and gives the images of `mdm sample` for the same seeds, within one grey value.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ABOUT, WEIGHTS, CAPTIONS = "model.json", "weights.bin", "captions.bin"
STORED = {"fp32": np.float32, "fp16": np.float16}
Arrays = list[np.ndarray]


def graph_name(levels: int) -> str:
    """The file of the network with its first so many levels."""
    return f"levels-{levels}.onnx"


class Model:
    """The network of a folder and its sampler."""

    def __init__(self, folder: str | Path) -> None:
        import onnxruntime

        self.folder = Path(folder)
        self.about: dict[str, Any] = json.loads((self.folder / ABOUT).read_text("utf-8"))
        self.graphs = {
            count: onnxruntime.InferenceSession(str(self.folder / graph_name(count)))
            for count in sorted(set(self.about["awake"]))
        }

    def sample(
        self,
        prompts: Sequence[str] = (),
        seeds: Sequence[int] = (0,),
        features: Sequence[np.ndarray] | None = None,
        watch: Callable[[int, Arrays], object] = lambda step, x: None,
    ) -> Arrays:
        """Images of every level, coarse to fine, each uint8 (n, height, width, channels).

        Args:
            prompts: a stored caption or the name of a class for each seed; none without conditions.
            seeds: of each image.
            features: those of the prompts, (tokens, d) each, for captions that are not stored.
            watch: called with each step and its estimates of x, (n, channels, height, width).
        """
        about, count = self.about, len(seeds)
        conditions = self._conditions(prompts, features, count)
        guided = any(weight != 1.0 for weight in about["guidance"])
        hidden = self._hidden(conditions, count) if guided else None
        sides = about["levels"]
        shapes = [(about["channels"], side, side) for side in sides]
        start = [
            np.stack([normal(seed, level, shape) for seed in seeds])
            for level, shape in enumerate(shapes)
        ]
        z, before = start, None
        for step, awake in enumerate(about["awake"]):
            now, then = about["instants"][step], about["instants"][step + 1]
            t = np.full(count, about["times"][step], np.float32)
            x = self._estimates(z[:awake], t, now, conditions)
            if hidden is not None:
                weak = self._estimates(z[:awake], t, now, hidden)
                weights = about["guidance"]
                x = [u + w * (c - u) for u, c, w in zip(weak, x, weights, strict=False)]
            x = [THRESHOLDS[name](x_r) for name, x_r in zip(about["thresholds"], x, strict=False)]
            for side in sides[awake:]:
                x.append(enlarged(x[-1], side))
            following = []
            for level, (z_r, x_r) in enumerate(zip(z, x, strict=True)):
                (_, sigma_t, snr_t), (alpha, sigma, snr) = now[level], then[level]
                if level >= awake:
                    following.append(np.float32(alpha) * x_r + np.float32(sigma) * start[level])
                    continue
                h, estimate = (snr - snr_t) / 2.0, x_r
                if before is not None and step + 1 < len(about["awake"]):
                    past = (snr_t - before[0][level][2]) / 2.0
                    lean = h / (2.0 * past)
                    estimate = np.float32(1.0 + lean) * x_r - np.float32(lean) * before[1][level]
                grown = np.float32(-alpha * math.expm1(-h)) * estimate
                following.append(np.float32(sigma / sigma_t) * z_r + grown)
            z, before = following, (now, x)
            watch(step + 1, x)
        return [self._bytes(x_r) for x_r in z]

    def _estimates(self, z: Arrays, t: np.ndarray, now: Any, conditions: dict[str, Any]) -> Arrays:
        """The estimate of x on every level that is awake."""
        inputs = {f"z{level + 1}": z_r for level, z_r in enumerate(z)}
        predicted: Any = self.graphs[len(z)].run(None, {**inputs, "t": t, **conditions})
        kind = self.about["prediction"]
        if kind == "x0":
            return predicted
        x = []
        for z_r, p, (alpha, sigma, _) in zip(z, predicted, now, strict=False):
            a, s = np.float32(alpha), np.float32(sigma)
            x.append(a * z_r - s * p if kind == "v" else (z_r - s * p) / a)
        return x

    def _conditions(
        self, prompts: Sequence[str], features: Sequence[np.ndarray] | None, count: int
    ) -> dict[str, np.ndarray]:
        """The inputs of a graph for the conditions of `count` images."""
        conditions: dict[str, np.ndarray] = {}
        if "tokens" in self.about["inputs"]:
            stored = features or [self.features(prompt) for prompt in prompts]
            longest = max(map(len, stored))
            rows = [np.pad(f, ((0, longest - len(f)), (0, 0))) for f in stored]
            lengths = np.array([len(f) for f in stored])
            conditions["tokens"] = np.stack(rows).astype(np.float32)
            conditions["mask"] = np.arange(longest) < lengths[:, None]
        if "labels" in self.about["inputs"]:
            names = self.about["classes"]
            conditions["labels"] = np.array([names.index(prompt) for prompt in prompts])
        if "dropped" in self.about["inputs"]:
            conditions["dropped"] = np.zeros(count, bool)
        return conditions

    def _hidden(self, conditions: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
        """The conditions that guidance leads away from: hidden ones, or the empty caption."""
        if "dropped" in conditions:
            return {**conditions, "dropped": np.ones(count, bool)}
        return self._conditions([""] * count, None, count)

    def features(self, caption: str) -> np.ndarray:
        """The stored features of a caption, (tokens, d).

        Raises:
            KeyError: they are not stored.
        """
        first, count = self.about["captions"][caption]
        tokens = sum(count for _, count in self.about["captions"].values())
        every = np.fromfile(self.folder / CAPTIONS, STORED[self.about["dtype"]])
        return every.reshape(tokens, -1)[first : first + count].astype(np.float32)

    def _bytes(self, x: np.ndarray) -> np.ndarray:
        scaled = (x.transpose(0, 2, 3, 1) + 1.0) * 127.5
        whole = np.floor(scaled) if self.about["pixels"] == "released" else np.round(scaled)
        return whole.clip(0, 255).astype(np.uint8)


def normal(seed: int, level: int, shape: tuple[int, ...]) -> np.ndarray:
    """The noise that a level of a sample starts with: that of the library, in float32.

    Words of numpy's Philox for (seed, purpose, level) become pairs of normal numbers (Box and
    Muller, 1958); the first half of the words gives radii, the second one angles.
    """
    key = hashlib.blake2b(f"{seed}/sample start".encode(), digest_size=16).digest()
    philox = np.random.Philox(
        key=np.frombuffer(key, np.uint64), counter=np.array([0, 0, level, 0], np.uint64)
    )
    count = math.prod(shape)
    half = -(-count // 16) * 8
    words = np.random.Generator(philox).integers(0, 2**64 - 1, half, np.uint64, endpoint=True)
    radii, angles = np.split(words.view(np.int32), 2)
    u = ((radii & (2**31 - 1)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-31)
    radius = np.sqrt(np.float32(-2.0) * np.log(u))
    angle = angles.astype(np.float32) * np.float32(2.0 * math.pi * 2.0**-32)
    pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return pairs[:count].reshape(shape)


def enlarged(x: np.ndarray, side: int) -> np.ndarray:
    """Images enlarged to another side by linear interpolation between the centres of pixels."""
    old = x.shape[-1]
    place = np.clip((np.arange(side) + 0.5) * old / side - 0.5, 0.0, None)
    first = np.minimum(place.astype(int), old - 1)
    second, share = np.minimum(first + 1, old - 1), (place - first).astype(np.float32)
    x = x[..., first] * (1.0 - share) + x[..., second] * share
    share = share[:, None]
    return x[..., first, :] * (1.0 - share) + x[..., second, :] * share


def dynamic(x: np.ndarray) -> np.ndarray:
    """Each image clipped to a quantile of its own |x|, at least 1, and divided by it."""
    extent = np.quantile(np.abs(x).reshape(len(x), -1), 0.995, axis=1).clip(1.0, 100.0)
    extent = extent.astype(np.float32)[:, None, None, None]
    return x.clip(-extent, extent) / extent


THRESHOLDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "clip": lambda x: x.clip(-1.0, 1.0),
    "dynamic": dynamic,
}


def main() -> None:
    """Draw one image from the command line."""
    parser = argparse.ArgumentParser(description="draw an image with the model in this folder")
    parser.add_argument("-p", "--prompt", help="a stored caption, or the name of a class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", default="sample.png")
    options = parser.parse_args()
    from PIL import Image

    model = Model(Path(__file__).parent)
    prompts = [] if options.prompt is None else [options.prompt]
    known = model.about.get("captions") or model.about["classes"]
    if known and options.prompt not in known:
        some = ", ".join([name for name in known if name][:20])
        parser.error(f"-p: {options.prompt!r} is not stored; there are: {some}")
    image = model.sample(prompts, [options.seed])[-1][0]
    Image.fromarray(image.squeeze()).save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
