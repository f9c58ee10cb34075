"""Models and a running server for the tests of the studio."""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from matryoshka_diffusion.draw.grid import png
from matryoshka_diffusion.studio.app import listen, server_config
from matryoshka_diffusion.studio.requests import Limits
from matryoshka_diffusion.studio.served import Served
from matryoshka_diffusion.training.weights import export_weights
from test_pipeline import Words, class_model, plain_model, text_model

JSON = {"Content-Type": "application/json"}


def exported(model: Any, folder: Path, **names: Any) -> Path:
    """A model of `test_pipeline` in a folder of its own."""
    config = model.config.model_copy(update=names)
    export_weights(folder / "model", model.net.state_dict(), config)
    return folder


def some_models(folder: Path) -> list[Served]:
    """A model of text, one of classes, one without conditions."""
    made = {"text": text_model(), "classes": class_model(), "plain": plain_model()}
    return [
        Served(
            str(exported(model, folder / name, name=name)),
            number,
            Words() if name == "text" else None,
            precision="fp32",
        )
        for number, (name, model) in enumerate(made.items())
    ]


@contextmanager
def running(
    served: list[Served], limits: Limits | None = None, token: str | None = None
) -> Iterator[int]:
    """Serve in a thread; yields the port."""
    listening = listen("127.0.0.1", 18_200)
    server = uvicorn.Server(server_config(served, limits or Limits(), token))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)


class Posted:
    """A request to a server that was sent, and the lines of its answer as they come."""

    def __init__(
        self,
        port: int,
        wish: dict[str, Any] | bytes,
        path: str = "/api/draw",
        client: str = "a",
    ) -> None:
        body = wish if isinstance(wish, bytes) else json.dumps(wish)
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._connection.request("POST", path, body, {**JSON, "X-Client": client})
        self._response = self._connection.getresponse()
        self.status = self._response.status

    def line(self) -> dict[str, Any]:
        """Wait for the next line."""
        return json.loads(self._response.readline())

    def rest(self) -> list[dict[str, Any]]:
        """Wait for all further lines."""
        text = self._response.read().decode()
        self.leave()
        return objects(text)

    def leave(self) -> None:
        """Close the connection."""
        self._response.close()
        self._connection.close()


def objects(text: str) -> list[dict[str, Any]]:
    """The lines of a stream."""
    return [json.loads(line) for line in text.splitlines()]


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def file(pixels: np.ndarray) -> str:
    """A PNG in base64."""
    return b64(png(pixels, None))


def pixels_of(text: str) -> np.ndarray:
    """The pixels of a picture in base64."""
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        return np.asarray(image)


def odd_request(rng: random.Random, wishes: Sequence[dict[str, Any]]) -> tuple[str, bytes]:
    """A path and a body made of a good wish: values are missing, wrong or odd, bytes damaged."""
    pixels = np.random.default_rng(rng.randrange(9)).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    picture = bytearray(png(pixels, {"model": "text", "captions": ["red"], "seeds": [1]}))
    for _ in range(rng.choice([0, 0, 1, 5])):
        picture[rng.randrange(len(picture))] = rng.randrange(256)
    path, whole = rng.choice(["draw", "draw", "draw", "picture", "level"]), b64(bytes(picture))
    odd: list[Any] = [None, -1, 0, 2, 10**30, 1e308, "", "red", "\0\x1b[31m<b>", "0", [], {}, True]
    odd += [whole, b64(bytes(picture[: rng.randrange(200)])), [1.0, 2.0], {"8": "x"}, ["none"]]
    odd += [{"8": whole}, {"16": whole}, [[]], "ddim"]
    wish: dict[str, Any] = {**rng.choice(wishes), "steps": rng.randint(1, 3)}
    if path != "draw":
        wish = {"picture": whole, **({"model": "0", "side": 8} if path == "level" else {})}
    names = [*wish, "label", "negative", "seed", "images", "sampler", "grid", "guidance", "keep"]
    names += ["image", "mask", "strength", "until", "wake", "eta", "threshold", "zzz", "side"]
    for _ in range(rng.choice([0, 0, 1, 2])):
        wish[rng.choice(names)] = rng.choice(odd)
    body = json.dumps(wish).encode()
    if rng.random() < 0.1:
        place = rng.randrange(len(body))
        body = body[:place] + rng.randbytes(rng.randrange(4)) + body[place + rng.randrange(3) :]
    return f"/api/{path}", body
