"""The studio's server: the page, the models, drawings as streams of states, and runs in training.

Nothing is stored: the history of drawings lives in the browser.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import h11
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.data.bad import PictureError
from matryoshka_diffusion.escape import printable
from matryoshka_diffusion.files import MissingExtra
from matryoshka_diffusion.studio.guard import Guard, Message, Receive, Scope, Send
from matryoshka_diffusion.studio.requests import (
    AtLevel,
    Draw,
    Dropped,
    Limits,
    Refused,
    Settings,
    check_picture,
    described,
    encoded,
    error_of,
    parsed,
    settings_in,
)
from matryoshka_diffusion.studio.served import Served, pixels_of_level
from matryoshka_diffusion.studio.worker import CLOSING_SECONDS, Job, Worker

Result = TypeVar("Result")

PAGE = Path(__file__).with_name("page")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".webp": "image/webp",
}
"""Kinds of files of the page and of previews."""
LONGEST_CLIENT = 64  # letters of the id that a page gives itself
MOST_CONNECTIONS = 256
HEAD_SECONDS = 20.0  # for the head of a request
NEXT_PORTS = 20  # that are tried if a port is busy


class Lines:
    """A response with the lines of a job, one chunk each, while its client is there."""

    def __init__(self, job: Job, worker: Worker, limits: Limits) -> None:
        self._job, self._worker, self._limits = job, worker, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_soon(message: Message) -> None:
            with anyio.fail_after(self._limits.read_seconds):
                await send(message)

        leaving = asyncio.ensure_future(self._leave_with_client(receive))
        headers = [(b"content-type", b"application/x-ndjson"), (b"x-accel-buffering", b"no")]
        try:
            await send_soon({"type": "http.response.start", "status": 200, "headers": headers})
            async for text in self._job.lines():
                await send_soon({"type": "http.response.body", "body": text, "more_body": True})
            await send_soon({"type": "http.response.body", "body": b""})
        except (TimeoutError, OSError):
            pass  # the client does not read, or has left
        finally:
            leaving.cancel()
            self._worker.leave(self._job)

    async def _leave_with_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._worker.leave(self._job)


class Studio:
    """The application: its models, the thread that draws, and one that decodes pictures.

    Neither the network nor a decoder runs in the event loop, so every other client is answered
    while one draws.
    """

    def __init__(self, served: Sequence[Served], limits: Limits, page: Path = PAGE) -> None:
        self.served, self.limits = {one.id: one for one in served}, limits
        self.worker = Worker(limits, sentence_for)
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._bytes_held = 0
        self._files = {path.name: path for path in page.glob("*") if path.suffix in TYPES}

    def application(self) -> Starlette:
        """The routes."""
        return Starlette(
            routes=[
                Route("/", self.file),
                Route("/page/{name}", self.file),
                Route("/api/models", self.models),
                Route("/api/draw", self.draw, methods=["POST"]),
                Route("/api/picture", self.picture, methods=["POST"]),
                Route("/api/level", self.level, methods=["POST"]),
                Route("/api/runs/{run}", self.run),
                Route("/api/runs/{run}/previews/{name}", self.preview),
            ],
            exception_handlers={
                Refused: _refused,
                UsageError: _unusable,
                PictureError: _unusable,
                HTTPException: _failed,
                ClientDisconnect: _left,
                Exception: _broken,
            },
            lifespan=self._life,
        )

    @contextlib.asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        def warm_up(_: Job) -> None:
            for one in self.served.values():
                one.warm_up()

        def open_encoders() -> None:
            for one in self.served.values():
                one.open_encoder()

        first = self.worker.submit("", warm_up)
        opening = threading.Thread(target=open_encoders, name="encoder", daemon=True)
        opening.start()
        yield
        self.worker.leave(first)
        self.worker.close()
        opening.join(CLOSING_SECONDS)
        self._decoder.shutdown(wait=False, cancel_futures=True)

    async def _aside(self, call: Callable[[], Result]) -> Result:
        """Call in the decoder's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._decoder, call)

    def _find(self, number: str) -> Served:
        if number not in self.served:
            known = ", ".join(self.served)
            raise Refused(404, f"there is no model {number}: name one of {known}", "model")
        return self.served[number]

    @contextlib.asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytearray]:
        """The body of a request, whose bytes count as held until the block ends."""
        body, limits = bytearray(), self.limits
        try:
            with anyio.fail_after(limits.read_seconds):
                async for chunk in request.stream():
                    body += chunk
                    self._bytes_held += len(chunk)
                    if len(body) > limits.body_bytes:
                        most = limits.body_bytes // 10**6
                        raise Refused(413, f"the request has more than {most} MB: send less")
                    if self._bytes_held > limits.bodies_bytes:
                        raise Refused(503, "too many pictures are on their way: try again soon")
            yield body
        except TimeoutError as error:
            raise Refused(408, f"the request took more than {limits.read_seconds:g} s") from error
        finally:
            self._bytes_held -= len(body)

    # --- routes ---

    async def file(self, request: Request) -> Response:
        """A file of the page, from a fixed list."""
        path = self._files.get(request.path_params.get("name", "index.html"))
        if path is None:
            raise Refused(404, "there is no such file")
        return Response(path.read_bytes(), headers={"content-type": TYPES[path.suffix]})

    async def models(self, request: Request) -> Response:
        """Everything that the page offers."""

        def offered() -> Settings:
            models = [one.described(self.limits) for one in self.served.values()]
            return {"models": models, "limits": asdict(self.limits)}

        return JSONResponse(await self._aside(offered))

    async def draw(self, request: Request) -> Lines:
        """Queue a drawing; its stream begins with its place."""
        client = request.headers.get("x-client") or (request.client.host if request.client else "")
        if len(client) > LONGEST_CLIENT:
            raise Refused(400, f"X-Client has more than {LONGEST_CLIENT} letters: shorten it")

        def prepared(body: bytearray) -> Callable[[Job], None]:
            wish = parsed(body, Draw)
            served = self._find(wish.model)
            served.check(wish, self.limits)
            pictures = served.prepared(wish, self.limits) if wish.edits else None
            # The files would be held for as long as the drawing waits.
            wish = wish.model_copy(update={"keep": {}, "image": None, "mask": None})
            return partial(served.draw, wish, pictures)

        async with self._body(request) as body:
            work = await self._aside(partial(prepared, body))
        return Lines(self.worker.submit(client, work), self.worker, self.limits)

    async def picture(self, request: Request) -> Response:
        """What a dropped picture says: its size, and the settings that draw it again."""

        def read(body: bytearray) -> Settings:
            content = parsed(body, Dropped).picture
            width, height = check_picture(content, "picture", self.limits)
            record = settings_in(content)
            settings = None if record is None else self._settings_of(record)
            return {"width": width, "height": height, "settings": settings}

        async with self._body(request) as body:
            return JSONResponse(await self._aside(partial(read, body)))

    def _settings_of(self, record: Settings) -> Settings | None:
        """Settings for the page from a picture's metadata; without a model if it is not here."""
        name = record.get("model")
        served = next((one for one in self.served.values() if one.config.name == name), None)
        with contextlib.suppress(ValueError):
            if served is not None:
                return served.settings_of(record)
            return {**described(record, "0", None, str(name)), "model": None}
        return None

    async def level(self, request: Request) -> Response:
        """A picture as training makes a level of it."""

        def made(body: bytearray) -> Settings:
            wish = parsed(body, AtLevel)
            check_picture(wish.picture, "picture", self.limits)
            served = self._find(wish.model)
            pixels = pixels_of_level(served, wish.picture, wish.side)
            return {"side": wish.side, "pixels": encoded(pixels.tobytes())}

        async with self._body(request) as body:
            return JSONResponse(await self._aside(partial(made, body)))

    async def run(self, request: Request) -> Response:
        """The curves of a run in training."""
        return JSONResponse(await self._aside(self._find(request.path_params["run"]).curves))

    async def preview(self, request: Request) -> Response:
        """A preview of a run in training."""
        served, name = self._find(request.path_params["run"]), request.path_params["name"]
        content = await self._aside(partial(served.preview, name))
        return Response(content, headers={"content-type": TYPES[Path(name).suffix]})


# --- errors --------------------------------------------------------------------------------------


def sentence_for(error: Exception) -> str:
    """The sentence about an error for a client. Other errors than a user's go to stderr whole."""
    if isinstance(error, UsageError | PictureError | MissingExtra):
        return str(error)
    print(printable("".join(traceback.format_exception(error))), file=sys.stderr, flush=True)
    return "the studio failed at this; its terminal says more"


def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error_of(str(error), error.field), error.status)


def _unusable(_: Request, error: Exception) -> Response:
    return JSONResponse(error_of(str(error)), 400)


def _failed(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = "there is nothing at this address, or not for this method: see docs/studio.md"
    return JSONResponse(error_of(message), error.status_code)


def _left(_: Request, error: Exception) -> Response:
    return JSONResponse(error_of("the request was cut off"), 400)


def _broken(_: Request, error: Exception) -> Response:
    return JSONResponse(error_of(sentence_for(error)), 500)


# --- the command ---------------------------------------------------------------------------------


def build(
    served: Sequence[Served], limits: Limits, token: str | None = None, page: Path = PAGE
) -> Guard:
    """The whole application. With a token only requests that carry it are served."""
    return Guard(Studio(served, limits, page).application(), token)


def listen(host: str, port: int) -> socket.socket:
    """Listen at a port or, if it is busy, at the next one that is free.

    Raises:
        UsageError: none of the next ports is free, or the host is no address of this machine.
    """
    error: Exception = UsageError(f"--port {port}: give a number up to {2**16 - 1}")
    for one in range(port, min(port + NEXT_PORTS, 2**16)):
        try:
            family = socket.getaddrinfo(host, one, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, one), family=family)
        except OSError as busy:  # noqa: PERF203, a few ports
            error = UsageError(f"--host {host} --port {one}: {busy.strerror}: give another")
    raise error


class PunctualProtocol(H11Protocol):
    """HTTP whose connections are closed if the head of a request takes too long.

    uvicorn waits for a head without end, and answers `MOST_CONNECTIONS` at one time.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._note_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._note_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def _note_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def server_config(served: Sequence[Served], limits: Limits, token: str | None) -> uvicorn.Config:
    """The settings of the server."""
    return uvicorn.Config(
        build(served, limits, token),
        http=PunctualProtocol,
        ws="none",
        loop="asyncio",
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )


def serve(
    served: Sequence[Served], listening: socket.socket, token: str | None, limits: Limits
) -> None:
    """Serve until Ctrl-C."""
    uvicorn.Server(server_config(served, limits, token)).run([listening])
