"""`trimode serve` as a process: it says where it is, refuses in one line, and ends as it should."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.serve_command import SERVE
from trimode.cli.main import BAD_INPUT, FAILURE, main

WAIT_S = 60.0


@contextmanager
def _serving(*words: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The process, where it listens, and the words of its first lines."""
    command = [*SERVE, "pocket", "--port", "0", "--no-auto", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRIMODE_API_KEYS", None)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        seen = []
        try:
            for line in process.stderr:
                seen.append(line)
                found = re.search(r"is ready at (http://\S+)", line)
                if found:
                    yield process, found[1], seen
                    break
            else:
                raise AssertionError("".join(seen))
        finally:
            process.kill()
            process.stderr.close()


def _stream(client: httpx.Client, url: str, max_tokens: int) -> Iterator[str]:
    body = {"prompt": "def ", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        assert response.status_code == 200
        yield from (line for line in response.iter_lines() if line)


def _ready_until_it_is_not(client: httpx.Client, url: str) -> httpx.Response:
    for _ in range(3000):
        ready = client.get(f"{url}/ready")
        if ready.status_code == 503:
            return ready
    raise AssertionError("it takes requests after the signal")


@pytest.mark.process
def test_flags_reach_the_server_and_a_running_stream_finishes(tmp_path: Path) -> None:
    """Prevents: a flag that is taken and not passed on; a rolling update that cuts answers off, or
    hands requests to who is leaving; a log that is not one JSON object a line."""
    keys = tmp_path / "keys"
    keys.write_text("secret-key-1\n")
    flags = ["--api-keys", str(keys), "--max-output-tokens", "200", "--max-body-bytes", "500"]
    flags += ["--max-context", "256", "--max-batch", "2", "--cors", "https://a.example"]
    headers = {"Origin": "https://a.example", "Authorization": "Bearer secret-key-1"}
    with _serving("--name", "small", *flags) as (process, url, seen):
        assert seen[0] == "trimode: loading pocket\n"
        assert "trimode: small is ready at" in seen[-1]
        with httpx.Client(timeout=WAIT_S) as client, httpx.Client(timeout=WAIT_S) as other:
            assert client.get(f"{url}/v1/models").status_code == 401
            client.headers = other.headers = httpx.Headers(headers)
            listed = client.get(f"{url}/v1/models")
            assert listed.headers["access-control-allow-origin"] == "https://a.example"
            (model,) = listed.json()["data"]
            assert (model["id"], model["trimode"]["context_len"]) == ("small", 256)
            for body, status in (
                ({"prompt": "x", "max_tokens": 3}, 200),
                ({"prompt": "x", "max_tokens": 201}, 400),
                ({"prompt": "x" * 600}, 413),
            ):
                assert client.post(f"{url}/v1/completions", json=body).status_code == status
            assert "trimode_rows 2.0" in client.get(f"{url}/metrics").text
            lines = _stream(client, url, 200)
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert _ready_until_it_is_not(other, url).headers["connection"] == "close"
            refused = other.post(f"{url}/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert list(lines)[-1] == "data: [DONE]"
        assert process.stderr is not None
        log = [json.loads(line) for line in process.stderr]
        assert process.wait(WAIT_S) == 0
    assert all(entry["request_id"] for entry in log if "status" in entry)
    assert [entry["status"] for entry in log if "status" in entry][:6] == [
        401,
        200,
        200,
        400,
        413,
        503,
    ]
    assert "secret" not in str(log)


@pytest.mark.process
def test_the_second_signal_ends_it_at_once() -> None:
    """Prevents: a server that only SIGKILL ends while something runs; a log that takes what it cut
    off for a good end."""
    with _serving() as (process, url, _):
        with httpx.Client(timeout=WAIT_S) as client, httpx.Client(timeout=WAIT_S) as other:
            assert other.get(f"{url}/ready").status_code == 200
            lines = _stream(client, url, 2000)
            next(lines)
            process.send_signal(signal.SIGTERM)
            _ready_until_it_is_not(other, url)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.TransportError):
                list(lines)
        assert process.stderr is not None
        log = [json.loads(line) for line in process.stderr]
        assert process.wait(WAIT_S) == FAILURE
    (cut,) = (entry for entry in log if entry.get("message") == "POST /v1/completions")
    assert (cut["status"], cut["code"]) == (200, "cut_off")
    assert cut["request_id"]


def test_a_port_in_use_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents: a traceback, or a model loaded for minutes before the port is looked at."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "pocket", "--port", str(port)]) == FAILURE
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"trimode: error: Address already in use: 127.0.0.1 port {port}; choose another --port"
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "--port is 70000; allowed: 0 to 65535"),
        (["--max-batch", "0"], "--max-batch is 0; allowed: at least 1"),
        (["--rate", "0"], "--rate is 0; allowed: a number above 0"),
        (["--timeout", "nan"], "--timeout is nan; allowed: a number above 0"),
        (["--max-prompt-tokens", "-1"], "--max-prompt-tokens is -1; allowed: a number above 0"),
        (["--allow-host", "a.example:80"], "--allow-host has 'a.example:80'; allowed: names"),
        (["--cors", "*"], "--cors has '*'; allowed: origins such as"),
        (["--api-keys", "/nonexistent"], "API keys '/nonexistent' cannot be read"),
        (["pocket", "--host", "no.such.host.invalid"], "--host is 'no.such.host.invalid'"),
        (["pocket", "--port", "0", "--max-context", "1"], "--max-context is 1; allowed: 2 to"),
        (["--token-budget", "9"], "--token-budget is 9; allowed: at least 128, 4 times --max-b"),
        (["--port", "0", "/nonexistent"], "/nonexistent"),
    ],
)
def test_flags_that_are_wrong(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents: a server that starts with a limit other than the one that was meant."""
    assert main(["serve", *words]) == BAD_INPUT
    *loading, line = capsys.readouterr().err.splitlines()
    assert [said.startswith("trimode: loading ") for said in loading] in ([], [True])
    assert message in line


def test_help_loads_nothing_heavy() -> None:
    """Prevents: `trimode --help` waiting for torch or the web packages."""
    code = (
        "import sys, trimode.cli.serve; print({'torch', 'fastapi', 'uvicorn'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
