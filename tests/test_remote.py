"""Data on a server that fails: what passes is tried again, what stays is no verdict on the data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from matryoshka_diffusion.config import SourceName
from matryoshka_diffusion.data import decoded, remote
from matryoshka_diffusion.data.source import Source
from matryoshka_diffusion.files import UnreadableError
from picturing import COLOURS, encode, opened, write_tar
from serving import KINDS, Server

COUNT = 12
FORMS: tuple[SourceName, ...] = ("shards", "parquet")


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    """Server of the same pictures as a shard and as a parquet file; nobody waits for it."""
    monkeypatch.setattr(remote, "WAITS", (0.0,) * 4)
    monkeypatch.setattr(remote, "SILENCE_SECONDS", 0.2)
    pictures = [encode(COLOURS[n % 6]) for n in range(COUNT)]
    write_tar(tmp_path / "set.shards", [(f"{n:02}.png", data) for n, data in enumerate(pictures)])
    (tmp_path / "set.shards").rename(tmp_path / "shards.tar")
    table = pa.table({"image": pictures, "label": [n % 6 for n in range(COUNT)]})
    pq.write_table(table, tmp_path / "parquet.parquet", row_group_size=4)
    server = Server(tmp_path)
    yield server
    server.close()


def read(server: Server, form: SourceName) -> Source:
    suffix = "tar" if form == "shards" else form
    return opened(f"{server.address}/{form}.{suffix}", 0.5, kind=form)


def is_whole(source: Source) -> bool:
    colours = [tuple(source[n].picture[0, 0]) for n in range(len(source))]
    return not source.bad and colours == [tuple(COLOURS[n % 6]) for n in range(COUNT)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", [503, 500, 429, 408, *KINDS])
def test_a_failure_that_passes_is_not_seen(server, form, fault):
    """Every third request for bytes fails, those of one read never twice."""
    server.fault = lambda number, method: fault if method == "GET" and number % 3 == 0 else ""
    assert is_whole(read(server, form))
    assert server.requests["GET"] > 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", [503, "cut", "short", "whole", 403])
@pytest.mark.parametrize("begin", [1, 4])
def test_a_failure_that_lasts_names_the_server_and_nothing_is_remembered(
    server, form, fault, begin
):
    def lasting(number: int, method: str) -> str | int:
        return fault if number >= begin and (method == "GET" or isinstance(fault, int)) else ""

    server.fault = lasting
    with pytest.raises(UnreadableError, match=server.address):
        read(server, form)
    server.fault = lambda number, method: ""
    assert is_whole(read(server, form))


@pytest.mark.parametrize("form", FORMS)
def test_a_server_without_byte_ranges_is_named_before_anything_is_read(server, form):
    server.fault = lambda number, method: "whole"
    with pytest.raises(UnreadableError, match=rf"{server.address}.*no byte ranges"):
        read(server, form)
    assert server.requests == {"HEAD": 1, "GET": 1}
    server.fault = lambda number, method: ""
    assert is_whole(read(server, form))


@pytest.mark.parametrize("fault", [404, 403, 401])
def test_a_definite_answer_is_final_at_once(server, fault):
    server.fault = lambda number, method: fault
    with pytest.raises(UnreadableError, match=server.address):
        read(server, "shards")
    assert server.requests == {"HEAD": 1, "GET": 1}


def test_a_picture_that_is_read_later_is_no_bad_one_either(server, monkeypatch):
    monkeypatch.setattr(decoded, "CACHED_PICTURES", 0)
    source = read(server, "shards")
    server.close()
    with pytest.raises(UnreadableError, match=server.address):
        source.many(range(4))
    assert not source.bad


def test_the_wait_grows_or_is_what_the_server_asks_for(monkeypatch):
    waits = []

    class Busy(Exception):
        status, message, headers = 429, "Too Many Requests", {"Retry-After": "5"}

    def busy(system: object, inside: str) -> None:
        raise Busy

    monkeypatch.setattr(time, "sleep", waits.append)
    with (
        pytest.warns(UserWarning, match="memory://a: HTTP 429 Too Many Requests"),
        pytest.raises(UnreadableError, match="memory://a: HTTP 429"),
    ):
        remote.attempt("memory://a", busy)
    assert waits == [max(5.0, wait) for wait in remote.WAITS]


@pytest.mark.filterwarnings("ignore:.*the next attempt is in")
@pytest.mark.parametrize(("silence", "asked"), [(60.0, None), (0.1, "60"), (0.1, None)])
def test_all_attempts_together_have_one_end(monkeypatch, silence, asked):
    clock, begun = [0.0], []

    class Failure(Exception):
        status, message, headers = 503, "", {"Retry-After": asked} if asked else {}

    def wait(seconds: float) -> None:
        clock[0] += seconds

    def fail(system: object, inside: str) -> None:
        begun.append(clock[0])
        wait(silence)
        raise Failure

    fake = SimpleNamespace(monotonic=lambda: clock[0], sleep=wait)
    monkeypatch.setattr(remote, "time", fake)
    with pytest.raises(UnreadableError, match="memory://a"):
        remote.attempt("memory://a", fail)
    assert len(begun) > 1
    assert 60 <= begun[-1] <= remote.LAST_ATTEMPT_SECONDS
    assert clock[0] <= 135
