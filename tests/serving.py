"""A server of files that fails as it is told to."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[[int, str], "str | int"]
KINDS = ("cut", "short", "whole", "silent")
"""Half of the answer; less than was asked for; the whole file for a part; nothing for a second."""


class Server:
    """Files of a folder over HTTP, on a port of its own.

    `fault(number, method)` says how a request goes wrong: by a status, or as one of `KINDS`.
    """

    def __init__(self, folder: Path) -> None:
        self.fault: Fault = lambda number, method: ""
        self.requests: Counter[str] = Counter()
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(b"")

            def do_GET(self) -> None:
                self.answer(None)

            def answer(self, body: bytes | None) -> None:
                with lock:
                    server.requests[self.command] += 1
                    fault = server.fault(server.requests.total(), self.command)
                path = folder / self.path[1:]
                if fault == "silent":
                    time.sleep(1.0)
                    self.close_connection = True
                    return
                if isinstance(fault, int) or not path.exists():
                    self.send_response(fault if isinstance(fault, int) else 404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data, part = path.read_bytes(), self.headers.get("Range")
                self.send_response(206 if part and fault != "whole" else 200)
                if part and fault != "whole":
                    first, last = part.removeprefix("bytes=").split("-")
                    data = data[int(first) : int(last) + 1]
                if fault == "short":
                    data = data[: len(data) // 2]
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Last-Modified", "Sun, 29 Nov 2026 12:00:00 GMT")
                self.end_headers()
                if body is None:
                    self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
                self.close_connection = fault == "cut"

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
