"""Models and a running server for the tests of the studio."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from matryoshka_diffusion.draw.grid import png
from matryoshka_diffusion.studio.app import build, listen
from matryoshka_diffusion.studio.requests import Limits
from matryoshka_diffusion.studio.served import Served
from matryoshka_diffusion.train.weights import export_weights
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
    config = uvicorn.Config(
        build(served, limits or Limits(), token),
        ws="none",
        loop="asyncio",
        log_level="critical",
        limit_concurrency=256,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)


class Posted:
    """A request to a server that was sent, and the lines of its answer as they come."""

    def __init__(self, port: int, wish: Any, path: str = "/api/draw", client: str = "a") -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._connection.request("POST", path, json.dumps(wish), {**JSON, "X-Client": client})
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
