"""Bounds of the studio: requests, origins, turns, clients that leave, and runs in training."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
import time
from typing import Any

import numpy as np
import pytest
from starlette.requests import Request
from starlette.testclient import TestClient

from matryoshka_diffusion.studio import worker as worker_module
from matryoshka_diffusion.studio.app import Lines, Studio, build
from matryoshka_diffusion.studio.requests import Limits, Refused
from matryoshka_diffusion.studio.served import Served
from matryoshka_diffusion.studio.streams import interval
from matryoshka_diffusion.studio.worker import Job, Worker
from studio_server import JSON, b64, file, objects, some_models

BASE = "http://127.0.0.1:8000"
TEXT, CLASSES, PLAIN = "0", "1", "2"
SMALL = Limits(
    steps=20, picture_bytes=20_000, picture_pixels=1_000_000, body_bytes=60_000, prompt_bytes=100
)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return some_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def client(served):
    with TestClient(build(served, SMALL), base_url=BASE) as client:
        yield client


def noise(side: int, *shape: int) -> str:
    """A picture of noise, whose file is as large as its pixels."""
    return file(np.random.default_rng(0).integers(0, 255, (side, side, *shape), dtype=np.uint8))


FLAT = file(np.full((16, 16, 3), 100, np.uint8))
MASK = file(np.full((8, 8), 255, np.uint8))
ASKED: dict[str, tuple[int, dict[str, Any], str | None, str]] = {
    "model": (404, {"model": "7"}, "model", "0, 1, 2"),
    "name of a model": (400, {"model": "../0"}, "model", "model"),
    "prompt": (413, {"prompt": "ä" * 51}, "prompt", "102 bytes: shorten it to 100"),
    "negative": (413, {"negative": "a" * 101}, "negative", "101 bytes"),
    "no prompt": (400, {"prompt": None}, "prompt", "needs a prompt"),
    "prompt for none": (400, {"model": PLAIN, "prompt": "a"}, "prompt", "takes no prompts"),
    "label": (400, {"model": CLASSES, "prompt": None, "label": 3}, "label", "0 to 2"),
    "no label": (400, {"model": CLASSES, "prompt": None}, "label", "3 classes"),
    "label for none": (400, {"label": 0}, "label", "0 classes"),
    "steps": (400, {"steps": 21}, "steps", "at most 20"),
    "no steps": (400, {"steps": 0}, "steps", "greater than 0"),
    "images": (400, {"images": 17}, "images", "at most 16"),
    "seed": (400, {"seed": 2**53}, "seed", "seed"),
    "guidance": (400, {"guidance": [1.0, 2.0, 3.0]}, "guidance", "give 1 or 2"),
    "strong guidance": (400, {"guidance": [1e9]}, "guidance", "100"),
    "no number": (400, {"guidance": [float("nan")]}, "guidance", "guidance"),
    "unguided": (400, {"guidance": [1.0], "negative": "a"}, "guidance", "another weight"),
    "sampler": (400, {"sampler": "heun"}, "sampler", "dpmpp-2m"),
    "grid": (400, {"grid": "cosine"}, "grid", "trailing"),
    "asleep": (400, {"wake": [50.0]}, "wake", "its floor or take more steps"),
    "unknown": (400, {"stepz": 3}, "stepz", "did you mean steps"),
    "guide": (400, {"guide": "/etc"}, "guide", "unknown key"),
    "type": (400, {"steps": "4"}, "steps", "integer"),
    "many corrections": (400, {"keep": {"8": FLAT}, "correct": 9}, "correct", "8"),
    "many passes": (400, {"keep": {"8": FLAT}, "resample": 9}, "resample", "8"),
    "nothing to correct": (400, {"correct": 1}, "correct", "something to keep"),
    "nothing to fit": (
        400,
        {"image": FLAT, "strength": 0.5, "resample": 2},
        "resample",
        "something to keep",
    ),
    "no base64": (400, {"keep": {"8": "???"}}, "keep", "base64"),
    "no picture": (400, {"keep": {"8": b64(b"GIF89a")}}, None, "PNG, JPEG, WEBP"),
    "torn": (400, {"image": FLAT[:80], "strength": 0.5}, None, "corrupt"),
    "level": (400, {"keep": {"9": FLAT}}, "keep", "(8, 16)"),
    "level's name": (400, {"keep": {"16x16": FLAT}}, "keep", "integer"),
    "bytes": (413, {"keep": {"8": noise(100, 3)}}, "keep", "MB"),
    "pixels": (400, {"keep": {"8": file(np.zeros((1001, 1000), np.uint8))}}, None, "too large"),
    "body": (413, {"image": "a" * 60_000}, None, "send less"),
    "alone": (400, {"image": FLAT}, "strength", "a mask or a strength"),
    "mask alone": (400, {"mask": FLAT}, "image", "add one"),
    "strength": (400, {"image": FLAT, "strength": 1.5}, "strength", "1"),
    "until": (400, {"keep": {"8": FLAT}, "until": -0.1}, "until", "0"),
    "mask": (400, {"image": FLAT, "mask": noise(12)}, None, "12x12"),
}


@pytest.mark.parametrize(("status", "wish", "field", "said"), ASKED.values(), ids=ASKED.keys())
def test_what_is_too_much_or_wrong_is_said_before_anything_is_drawn(
    client, status, wish, field, said
):
    wish = {"model": TEXT, "prompt": "red", **wish}
    response = client.post("/api/draw", content=json.dumps(wish), headers=JSON)
    error = response.json()["error"]
    assert (response.status_code, error["field"]) == (status, field), error
    assert said in error["message"]
    assert "Traceback" not in response.text


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"[" * 50_000, b'{"model": "0", "prompt": "\\ud800"}', b"\xff"],
)
def test_what_is_no_request_is_refused(client, body):
    for path in ("draw", "picture", "level"):
        response = client.post(f"/api/{path}", content=body, headers=JSON)
        assert response.status_code == 400
        assert response.json()["error"]["message"]


def test_pictures_are_bounded_wherever_they_are_sent(client):
    for content, status in ((noise(100, 3), 413), (file(np.zeros((1001, 1000), np.uint8)), 400)):
        for path, more in (("picture", {}), ("level", {"model": TEXT, "side": 8})):
            response = client.post(f"/api/{path}", json={"picture": content, **more})
            assert response.status_code == status
    wish = {"model": TEXT, "side": 9, "picture": FLAT}
    assert "(8, 16)" in client.post("/api/level", json=wish).json()["error"]["message"]


def test_without_a_text_encoder_only_known_prompts_are_drawn(served, monkeypatch):
    one = Served("openmoji")
    monkeypatch.setattr(one, "takes_any_text", False)
    with TestClient(build([one], Limits()), base_url=BASE) as client:
        wish = {"model": "0", "prompt": "red apple", "steps": 1}
        assert "cat face" in client.get("/api/models").json()["models"][0]["prompts"]
        assert "done" in objects(client.post("/api/draw", json=wish).text)[-1]
        error = client.post("/api/draw", json={**wish, "prompt": "red appel"}).json()["error"]
        assert error["field"] == "prompt"
        assert "red apple" in error["message"]


def test_large_pictures_show_every_second_step_and_never_fewer_than_five():
    assert [interval(steps, 64) for steps in (1, 50)] == [1, 1]
    assert [interval(steps, 256) for steps in (9, 10, 50)] == [1, 2, 2]


# --- who may ask -------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:9000", "[::1]:8000", "LOCALHOST"])
def test_names_of_this_machine_are_answered(client, host):
    assert client.get("/api/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:8000", "", "localhost."])
def test_a_name_that_leads_here_from_elsewhere_is_refused(client, host):
    for path in ("/", "/api/models"):
        assert client.get(path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": BASE}, 400),
        ({"Origin": BASE, "Sec-Fetch-Site": "same-origin"}, 400),
        ({}, 400),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:9000"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": "application/json; charset=utf-8"}, 400),
    ],
)
def test_only_the_studios_own_page_is_served(client, headers, status):
    response = client.post("/api/draw", content=b"{}", headers={**JSON, **headers})
    assert response.status_code == status, response.text


def test_with_a_token_any_name_is_answered_but_nobody_without_it(served):
    token = "0123456789abcdef"
    with TestClient(build(served, SMALL, token), base_url="http://studio.example") as client:
        for given in (None, "", "Bearer", "Bearer 0123456789abcdee", f"Basic {token}", "Bearer ä"):
            headers = {} if given is None else {"Authorization": given.encode()}
            for path in ("/api/models", "/api/runs/0", "/api/runs/0/previews/1.png"):
                assert client.get(path, headers=headers).status_code == 401
        headers = {"Authorization": f"Bearer {token}"}
        assert client.get("/api/models", headers=headers).status_code == 200


def test_every_response_has_a_strict_policy_and_no_cookie(client):
    wish = {"model": TEXT, "prompt": "<script>alert(1)</script>", "steps": 1}
    responses = [
        client.get("/"),
        client.get("/nothing"),
        client.get("/page/../app.py"),
        client.get("/api/models"),
        client.put("/api/draw"),
        client.post("/api/draw", json=wish),
        client.post("/api/draw", json={}),
        client.get("/api/models", headers={"Host": "evil.example"}),
    ]
    for response in responses:
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in response.headers
        assert "access-control-allow-origin" not in response.headers
        assert "text/html" not in response.headers["content-type"] or response.url.path == "/"


@pytest.mark.parametrize(
    "name", ["..%2fapp.py", "%2e%2e/app.py", "app.py", "index.html%00", "....//app.py", ""]
)
def test_only_files_of_the_page_are_given_out(client, name):
    assert client.get(f"/page/{name}").status_code in (403, 404)


def test_files_of_the_page_have_their_types(served, tmp_path):
    (tmp_path / "index.html").write_text("<p>")
    (tmp_path / "studio.js").write_text("1")
    (tmp_path / "notes.txt").write_text("no")
    with TestClient(build(served, SMALL, page=tmp_path), base_url=BASE) as client:
        assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
        assert client.get("/page/studio.js").headers["content-type"].startswith("text/javascript")
        assert client.get("/page/notes.txt").status_code == 404


# --- turns -------------------------------------------------------------------------------------


class Gate:
    """Work that notes its name, and waits until the gate is open."""

    def __init__(self) -> None:
        self.open, self.done = threading.Event(), list[str]()

    def work(self, name: str):
        def work(job: Job) -> None:
            while not self.open.wait(0.005):
                job.check()
            self.done.append(name)

        return work


def places(job: Job) -> list[int]:
    return [line["queued"] for line in objects(b"".join(job._lines).decode()) if "queued" in line]


def in_loop(limits: Limits, scene: Any) -> Gate:
    """Play a scene with a worker and a gate in an event loop."""
    gate = Gate()

    async def play() -> None:
        worker = Worker(limits, repr)
        try:
            await scene(worker, gate)
        finally:
            gate.open.set()
            worker.close()
            worker._thread.join(10)

    asyncio.run(play())
    return gate


async def until(true: Any) -> None:
    for _ in range(2_000):
        if true():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError


def test_clients_take_turns_and_see_their_places():
    async def scene(worker: Worker, gate: Gate) -> None:
        first = worker.submit("a", gate.work("a0"))
        await until(lambda: places(first)[-1:] == [0])
        many = [worker.submit("a", gate.work(f"a{n}")) for n in (1, 2, 3)]
        other = worker.submit("b", gate.work("b0"))
        assert [places(job)[-1] for job in (*many, other)] == [1, 3, 4, 2]
        worker.leave(many[0])
        assert [places(job)[-1] for job in (*many[1:], other)] == [1, 3, 2]
        gate.open.set()
        await until(lambda: len(gate.done) == 4)

    assert in_loop(Limits(), scene).done == ["a0", "a2", "b0", "a3"]


def test_the_queue_is_bounded_for_one_client_and_for_all():
    async def scene(worker: Worker, gate: Gate) -> None:
        first = worker.submit("a", gate.work("a"))
        await until(lambda: places(first)[-1:] == [0])
        for name in ("a", "a", "b"):
            worker.submit(name, gate.work(name))
        with pytest.raises(Refused, match="2 of your requests") as one:
            worker.submit("a", gate.work("a"))
        worker.submit("b", gate.work("b"))
        with pytest.raises(Refused, match="4 requests are waiting") as other:
            worker.submit("c", gate.work("c"))
        assert (one.value.status, other.value.status) == (429, 503)

    in_loop(Limits(queue=4, queue_of_client=2), scene)


def test_waiting_and_drawing_have_a_time():
    async def scene(worker: Worker, gate: Gate) -> None:
        slow = worker.submit("a", gate.work("a"))
        waiting = worker.submit("b", gate.work("b"))
        lines = [json.loads(line) async for line in waiting.lines()]
        assert "it waited for 0.05 s" in lines[-1]["error"]["message"]
        lines = [json.loads(line) async for line in slow.lines()]
        assert "longer than 0.2 s" in lines[-1]["error"]["message"]
        assert gate.done == []

    in_loop(Limits(queue_seconds=0.05, seconds=0.2), scene)


def test_an_error_ends_its_stream_only():
    async def scene(worker: Worker, gate: Gate) -> None:
        def fail(job: Job) -> None:
            raise RuntimeError("in the network")

        gate.open.set()
        lines = [json.loads(line) async for line in worker.submit("a", fail).lines()]
        assert lines[-1] == {"error": {"message": "RuntimeError('in the network')", "field": None}}
        [_ async for _ in worker.submit("a", gate.work("next")).lines()]

    assert in_loop(Limits(), scene).done == ["next"]


def test_the_end_stops_the_drawing_in_work_and_its_thread():
    async def scene(worker: Worker, gate: Gate) -> None:
        first = worker.submit("a", gate.work("a"))
        await until(lambda: places(first)[-1:] == [0])
        worker.submit("a", gate.work("b"))
        worker.close()
        assert not worker._thread.is_alive()

    assert in_loop(Limits(), scene).done == []


def test_pictures_that_are_sent_are_not_held_while_a_drawing_waits(served, monkeypatch):
    works: list[Any] = []

    def submit(self: Worker, client: str, work: Any) -> Job:
        works.append(work)
        raise Refused(503, "later")

    monkeypatch.setattr(Worker, "submit", submit)
    studio = Studio(served, Limits())
    large = noise(1_000)
    request = {"model": TEXT, "prompt": "red", "keep": {"8": large}, "image": large, "strength": 1}
    body = json.dumps(request).encode()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    head = {"type": "http", "method": "POST", "headers": [], "client": ("127.0.0.1", 1)}
    with pytest.raises(Refused, match="later"):
        asyncio.run(studio.draw(Request(head, receive)))
    assert len(pickle.dumps(works[0].args)) < len(large) / 10


def test_a_client_that_reads_slowly_misses_states_and_gets_the_result(monkeypatch):
    monkeypatch.setattr(worker_module, "MOST_PENDING", 1_000)

    async def scene(worker: Worker, gate: Gate) -> None:
        def talk(job: Job) -> None:
            for n in range(100):
                job.offer(b"%098d\n" % n)
            job.put(b'{"done": 1}\n')

        job = worker.submit("a", talk)
        await until(lambda: job._ended)
        lines = [line async for line in job.lines()]
        assert 5 <= len(lines) <= 13
        assert lines[-1] == b'{"done": 1}\n'

    in_loop(Limits(), scene)


def test_a_client_that_does_not_read_at_all_is_given_up():
    async def scene(worker: Worker, gate: Gate) -> None:
        job = worker.submit("a", gate.work("a"))

        async def send(message: Any) -> None:
            await asyncio.sleep(60)

        async def receive() -> Any:
            await asyncio.sleep(60)

        started = time.monotonic()
        await Lines(job, worker, Limits(read_seconds=0.05))({}, receive, send)
        assert time.monotonic() - started < 10
        with pytest.raises(worker_module.Stopped):
            job.check()

    in_loop(Limits(), scene)
