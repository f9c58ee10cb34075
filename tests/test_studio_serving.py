"""The studio as a process: clients that leave, many at once, runs in training, the command."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from matryoshka_diffusion.cli import main as cli
from matryoshka_diffusion.cli.studio import is_loopback
from matryoshka_diffusion.config import UsageError
from matryoshka_diffusion.draw.grid import png
from matryoshka_diffusion.studio import app
from matryoshka_diffusion.studio.requests import Limits
from matryoshka_diffusion.studio.served import Served
from matryoshka_diffusion.training.signals import Stopped
from studio_server import JSON, Posted, file, objects, odd_request, running, some_models
from test_pipeline import Words
from tiny_run import run, stop_at

BASE = "http://127.0.0.1:8000"
TEXT, CLASSES, PLAIN = "0", "1", "2"
RED = {"model": TEXT, "prompt": "red"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return some_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def port(served):
    with running(served) as port:
        yield port


class Steps:
    """Counts calls of a network, and lets it go on only while the gate is open."""

    def __init__(self, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.gate, forward = 0, threading.Event(), net.forward
        self.gate.set()

        def counted(*arguments: Any) -> Any:
            self.count += 1
            assert self.gate.wait(30)
            return forward(*arguments)

        monkeypatch.setattr(net, "forward", counted)

    def rest(self) -> int:
        """The count when no call has come for a while."""
        before = -1
        while before != self.count:
            before = self.count
            time.sleep(0.3)
        return before


@pytest.fixture
def steps(served, monkeypatch):
    return Steps(served[0].model().net, monkeypatch)


# --- clients -----------------------------------------------------------------------------------


def test_a_drawing_stops_when_its_client_leaves(port, steps):
    response = Posted(port, {**RED, "steps": 250})
    for _ in range(4):
        response.line()
    response.leave()
    assert steps.rest() < 100
    assert "done" in Posted(port, {**RED, "steps": 2}).rest()[-1]


def test_a_client_that_leaves_the_queue_is_never_drawn(port, steps):
    steps.gate.clear()
    drawing = Posted(port, {**RED, "steps": 2}, client="a")
    waiting = [Posted(port, {**RED, "steps": 250}, client=name) for name in "bcd"]
    last = Posted(port, {**RED, "steps": 2}, client="e")
    assert [one.line()["queued"] for one in (*waiting, last)] == [1, 2, 3, 4]
    for one in waiting:
        one.leave()
    while last.line() != {"queued": 1}:
        pass
    steps.gate.set()
    assert "done" in drawing.rest()[-1]
    assert "done" in last.rest()[-1]
    assert steps.count == 4


def test_others_are_answered_while_the_network_computes(port, steps):
    steps.gate.clear()
    drawing = Posted(port, {**RED, "steps": 3})
    while drawing.line() != {"queued": 0}:
        pass
    wish = {"model": TEXT, "picture": file(np.zeros((16, 16, 3), np.uint8)), "side": 8}
    started = time.monotonic()
    for _ in range(5):
        assert Posted(port, wish, "/api/level").rest()[0]["side"] == 8
    assert time.monotonic() - started < 5
    assert steps.count == 1
    steps.gate.set()
    assert "done" in drawing.rest()[-1]


def test_two_clients_share_the_studio(port, steps):
    """One asks for four drawings, the other for one, a moment later."""
    steps.gate.clear()
    ended: list[str] = []

    def draw(client: str) -> None:
        Posted(port, {**RED, "steps": 2}, client=client).rest()
        ended.append(client)

    threads = []
    for client in ("a", "a", "a", "a", "b"):
        threads.append(threading.Thread(target=draw, args=(client,)))
        threads[-1].start()
        time.sleep(0.2)
    steps.gate.set()
    for thread in threads:
        thread.join(30)
    assert ended.index("b") <= 2
    assert sorted(ended) == ["a", "a", "a", "a", "b"]


def test_a_body_that_never_comes_is_given_up(served):
    with (
        running(served, Limits(read_seconds=0.5)) as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
    ):
        lines = ["POST /api/draw HTTP/1.1", f"Host: 127.0.0.1:{port}", "Content-Length: 100"]
        lines += ["Content-Type: application/json", "", "{"]
        connection.sendall("\r\n".join(lines).encode())
        assert b" 408 " in connection.recv(1_000)


def test_connections_without_a_request_make_room(served, monkeypatch):
    monkeypatch.setattr(app, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(app, "MOST_CONNECTIONS", 4)
    with running(served) as port, contextlib.ExitStack() as open_ones:
        for part in (b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\n", b"P"):
            connection = open_ones.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(part)
        time.sleep(1.0)
        assert "done" in Posted(port, {**RED, "steps": 3}).rest()[-1]


def test_bodies_on_their_way_are_bounded_together(served):
    limits = Limits(body_bytes=2_000_000, bodies_bytes=2_000_000, read_seconds=20.0)
    with running(served, limits) as port:
        head = f"POST /api/draw HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 1900000\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(head.encode() + b" " * 1_800_000)
            time.sleep(0.5)
            response = Posted(port, {**RED, "prompt": "a" * 300_000})
            assert response.status == 503
            assert "try again" in response.rest()[0]["error"]["message"]
        time.sleep(0.5)
        assert "done" in Posted(port, {**RED, "steps": 1}).rest()[-1]


# --- many at once --------------------------------------------------------------------------------


def test_odd_requests_and_clients_that_leave_cost_nothing(served, port, capfd):
    """Here a few; `make chaos` sends a thousand to a process of its own."""
    rng, answers = random.Random(0), Counter[int]()
    wishes = [RED, {"model": CLASSES, "label": 1}, {"model": PLAIN}]
    with TestClient(app.build(served, Limits()), base_url=BASE) as client:
        for _ in range(80):
            path, body = odd_request(rng, wishes)
            response = client.post(path, content=body, headers=JSON)
            answers[response.status_code] += 1
            assert "Traceback" not in response.text
            for line in objects(response.text):
                assert "error" not in line or set(line["error"]) == {"message", "field"}
    assert set(answers) <= {200, 400, 404, 413}, answers
    assert min(answers[200], answers[400]) > 10
    for _ in range(20):
        response = Posted(port, {**RED, "steps": 250}, client=str(rng.randrange(50)))
        for _ in range(rng.randrange(4) if response.status == 200 else 0):
            response.line()
        response.leave()
    assert "done" in Posted(port, {**RED, "steps": 2}, client="last").rest()[-1]
    assert "Traceback" not in capfd.readouterr().err


# --- runs in training ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was stopped on its way, with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.raises(Stopped):
        run(folder, hooks=[stop_at(32)])
    return folder


def served_run(folder: Path) -> TestClient:
    one = Served(str(folder), 0, Words(), precision="fp32")
    return TestClient(app.build([one], Limits()), base_url=BASE)


def test_a_run_in_training_shows_its_curves_and_previews(trained):
    previews = trained / "previews"
    previews.mkdir()
    content = png(np.zeros((8, 8, 3), np.uint8), None)
    for name in ("0000000016.png", "0000000032.png", "notes.txt"):
        (previews / name).write_bytes(content)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    with served_run(trained) as client:
        assert client.get("/api/models").json()["models"][0]["training"]
        told = client.get("/api/runs/0").json()
        assert (told["images"], told["of"], told["levels"]) == (32, 48, [8, 16])
        assert told["rate"] == lines[-1]["images_per_second"]
        first, *_, last = told["losses"]
        assert first == [4, lines[0]["loss_per_level"][0], None]
        assert last == [32, *lines[-1]["loss_per_level"]]
        assert told["previews"] == ["0000000016.png", "0000000032.png"]
        assert client.get("/api/runs/0/previews/0000000032.png").content == content
        for name in ("notes.txt", "..%2fconfig.yaml", "0000000048.png"):
            assert client.get(f"/api/runs/0/previews/{name}").status_code == 404
        assert client.get("/api/runs/1").status_code == 404


def test_long_curves_are_thinned_and_keep_their_end(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr("matryoshka_diffusion.studio.served.MOST_POINTS", 3)
    with served_run(tmp_path / "run") as client:
        losses = client.get("/api/runs/0").json()["losses"]
        assert 2 <= len(losses) <= 4
        assert losses[-1][0] == 32


def test_a_run_is_drawn_with_its_newest_weights_once_it_has_some(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    saved = folder.with_name("saved")
    (folder / "checkpoints").rename(saved)
    with served_run(folder) as client:
        wish = {"model": "0", "prompt": "red", "steps": 2}
        response = client.post("/api/draw", json=wish)
        assert response.status_code == 503
        assert "saved no weights yet" in response.json()["error"]["message"]
        saved.rename(folder / "checkpoints")

        def drawn() -> str:
            last = objects(client.post("/api/draw", json=wish).text)[-1]
            return last["done"]["images"][0]["png"]

        early = drawn()
        assert early == drawn()
        run(folder)
        assert early != drawn()


# --- the command -------------------------------------------------------------------------------


def status(*words: Any) -> Any:
    try:
        return cli.main([*map(str, words)])
    except SystemExit as leaving:
        return leaving.code


@pytest.fixture
def started(monkeypatch):
    """What the command would have served."""
    calls: list[Any] = []

    def serve(served: Any, listening: socket.socket, token: Any, limits: Limits) -> None:
        calls.append((served, listening.getsockname(), token))
        listening.close()

    monkeypatch.setattr(app, "serve", serve)
    return calls


def test_the_command_serves_this_machine_without_and_others_with_a_token(
    served, started, capsys, monkeypatch
):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert status("studio", served[1].run, served[2].run, "--open") == 0
    ((models, (host, port), token),) = started
    assert [one.config.name for one in models] == ["classes", "plain"]
    assert (host, token) == ("127.0.0.1", None)
    output = capsys.readouterr().out
    assert f"http://127.0.0.1:{port}/ shows classes, plain" in output
    assert opened == [f"http://127.0.0.1:{port}/"]
    assert status("studio", served[2].run, "--host", "0.0.0.0") == 0
    token = started[-1][2]
    assert len(token) >= 32
    assert f"/#token={token}" in capsys.readouterr().out
    assert status("studio", served[2].run, "--token", "a" * 16) == 0
    assert started[-1][2] == "a" * 16


def test_a_busy_port_is_followed_by_the_next(started, served):
    first = app.listen("127.0.0.1", 18_900)
    with first, app.listen("127.0.0.1", first.getsockname()[1]) as second:
        assert second.getsockname()[1] > first.getsockname()[1]
    for host, port in (("127.0.0.1", 70_000), ("no.such.host.invalid", 18_900)):
        with pytest.raises(UsageError, match="--"):
            app.listen(host, port)


@pytest.mark.parametrize(
    ("host", "loops"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "::", "192.168.0.1", "example.org")),
    ],
)
def test_addresses_of_this_machine_are_known(host, loops):
    assert is_loopback(host) == loops


def test_what_the_command_cannot_serve_is_said(served, started, capsys, monkeypatch):
    for words, said in (
        ((served[2].run, "--token", "short"), "16 letters"),
        ((served[2].run, "--token", "a" * 16 + "\n"), "16 letters"),
        (("nowhere",), "nowhere"),
    ):
        assert status("studio", *words) != 0
        assert said in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert status("studio") == 1
    assert "matryoshka-diffusion[studio]" in capsys.readouterr().err
    assert not started
