"""Connections as sockets have them: who may ask, who is too slow, who comes in a crowd, and how all
end."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from tests.serving import conftest
from tests.serving.conftest import WAIT_S, Brake, Served, wait_until
from trimode.serving import server as server_module
from trimode.serving.settings import Settings

LONG = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "mode": "ar"}


@contextmanager
def _connected(url: str, *, receive_bytes: int | None = None) -> Iterator[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(WAIT_S)
        connection.connect((host, int(port)))
        yield connection


def _all_of(connection: socket.socket) -> bytes:
    """What comes until the other side ends it."""
    found = b""
    try:
        while part := connection.recv(65_536):
            found += part
    except ConnectionResetError:
        pass
    return found


def _request(url: str, body: dict[str, object]) -> bytes:
    content = json.dumps(body).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        b"content-length: " + str(len(content)).encode() + b"\r\n\r\n" + content
    )


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1234", 200),
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("[::1]:8000", 200),
        ("192.0.2.7", 200),
        ("mine.example:8000", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.example:127.0.0.1", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_names_that_are_not_ours(
    named: Served, keyed: Served, any_name: Served, host: str, status: int
) -> None:
    """Prevents: a page that has its own name point at this machine, and so may ask as it likes."""
    headers = {"Host": host}
    found = httpx.get(f"{named.url}/v1/models", headers=headers)
    assert found.status_code == status
    if status == 403:
        error = found.json()["error"]
        assert error["code"] == "host_not_allowed"
        assert f"host is {host!r}; allowed: an IP address, localhost, mine.example" in str(error)
    assert httpx.get(f"{any_name.url}/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{keyed.url}/health", headers=headers).status_code == 200


@pytest.fixture(scope="module")
def named(serve_all: Callable[..., Served]) -> Served:
    return serve_all(Settings(allowed_hosts=("mine.example",)))


@pytest.fixture(scope="module")
def keyed(serve_all: Callable[..., Served]) -> Served:
    return serve_all(Settings(api_keys=("a-page-has-none",)))


@pytest.fixture(scope="module")
def any_name(serve_all: Callable[..., Served]) -> Served:
    return serve_all(Settings(allowed_hosts=("*",)))


def test_no_name_at_all(served: Served) -> None:
    """Prevents: probes refused that speak HTTP/1.0, which no browser does."""
    with _connected(served.url) as connection:
        connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert _all_of(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nhost: x\r\n"])
def test_a_head_that_does_not_come(
    served: Served, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """Prevents: connections held for ever by those who ask nothing."""
    monkeypatch.setattr(server_module, "HEAD_S", 0.1)
    with _connected(served.url) as connection:
        connection.sendall(sent)
        assert _all_of(connection) == b""


def test_a_second_head_that_does_not_come(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: the same behind a first request, and a first one cut off while it is answered."""
    monkeypatch.setattr(server_module, "HEAD_S", 0.1)
    with _connected(served.url) as connection:
        connection.sendall(_request(served.url, LONG))
        answer = b""
        while b'"usage"' not in answer:
            answer += connection.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET ")
        _all_of(connection)


def test_a_head_that_does_not_end(served: Served) -> None:
    """Prevents: memory filled by headers; switching to a protocol that has no limits."""
    with _connected(served.url) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\nx: " + b"x" * 70_000)
        assert _all_of(connection).startswith(b"HTTP/1.1 400 ")
    upgrade = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    answer = httpx.get(f"{served.url}/health", headers=upgrade)
    assert answer.json() == {"status": "ok"}


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_reader_who_takes_nothing(
    serve: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    """Prevents: an answer kept in memory, and its connection, for one who never takes it."""
    monkeypatch.setattr(server_module, "STALL_S", 0.1)
    cut = []
    monkeypatch.setattr(server_module.logger, "info", lambda *words: cut.append(words))
    listen = server_module.listen

    def listen_with_little_room(host: str, port: int) -> socket.socket:
        listening = listen(host, port)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listening

    monkeypatch.setattr(conftest, "listen", listen_with_little_room)
    server = serve()
    body = {**LONG, "logprobs": 20, "n": 2, "stream": is_stream}
    with _connected(server.url, receive_bytes=2048) as connection:
        connection.sendall(_request(server.url, body))
        wait_until(lambda: bool(cut))
        wait_until(lambda: server.backend._jobs.num == 0)
    wait_until(lambda: server.samples()["trimode_http_active",] == 0)
    assert "its reader took nothing" in cut[0]


def test_two_hundred_at_once(serve: Callable[..., Served]) -> None:
    """Prevents: a crowd that leaves places taken, or somebody without an answer."""
    server = serve(Settings(max_concurrent=150), max_waiting=100)
    body = {"prompt": "x", "max_tokens": 2, "ignore_eos": True}
    limits = httpx.Limits(max_connections=200)
    with httpx.Client(timeout=WAIT_S, limits=limits) as client, ThreadPoolExecutor(200) as pool:

        def ask(number: int) -> int:
            fields = {**body, "seed": number, "stream": number % 2 == 0}
            return client.post(f"{server.url}/v1/completions", json=fields).status_code

        statuses = list(pool.map(ask, range(200)))
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 8
    assert server.samples()["trimode_http_active",] == 0
    assert server.engine.is_idle


def test_two_requests_in_one_go(served: Served) -> None:
    """Prevents: answers mixed up on a connection whose client does not wait for them."""
    with _connected(served.url) as connection:
        first = _request(served.url, {"prompt": "x", "max_tokens": 1, "seed": 1})
        connection.sendall(first + b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        answer = b""
        while not answer.endswith(b'{"status":"ok"}'):
            answer += connection.recv(65_536)
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    assert answer.index(b'"usage"') < answer.index(b'"status"')


def test_what_takes_too_long_is_told(serve: Callable[..., Served]) -> None:
    """Prevents: a shutdown that waits for ever, or a stream that ends without saying why."""
    server = serve(shutdown_timeout_s=0)
    brake = Brake(server.backend._thread)
    with httpx.Client(timeout=WAIT_S) as client:
        brake.let(3)
        body = {**LONG, "stream": True}
        with client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            wait_until(lambda: brake.is_held)
            server.signal()
            thread = server.backend._thread
            wait_until(lambda: not (thread._commands.empty() and thread.is_alive))
            brake.off()
            assert '"the server is shutting down"' in [line for line in lines if line][-1]


def test_uvicorns_own_words_are_no_traceback(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents: a log filled by whoever sends bytes that are no HTTP."""
    with caplog.at_level(logging.INFO), _connected(served.url) as connection:
        connection.sendall(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        assert _all_of(connection).startswith(b"HTTP/1.1 400 ")
    assert not [record for record in caplog.records if record.exc_info]
