"""A server under mixed load, rude clients and kills, for as long as wanted; then: did it hold?

    python -m tests.serving.soak --seconds 600 --replicas 2

Clients of all kinds run side by side. Honest ones know what every text must be: the server decodes
in float64, where a batch cannot change a token, so any other text is a wrong answer. The others
leave in the middle, read slowly, send what is no request, or too much. Every request must be
answered, and when all are gone memory, rows and open files must be back where they were. With
replicas, they are killed one after the other as well; then a request may fail with 503, and nothing
else. Loopback only; every wait is bounded.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import trimode
from tests.serve_command import SERVE

REQUEST_TIMEOUT_S = 90.0
START_TIMEOUT_S = 120.0
SETTLE_TIMEOUT_S = 30.0
MAX_BODY_BYTES = 20_000
MEMORY_MARGIN_BYTES = 48 * 2**20
"""Beyond what the process had after its first requests: allocators keep some of what they got."""

PROMPTS = (
    "import os\n\n\ndef ",
    "class Stack:\n    def __init__(self",
    "def add(a, b):\n    return",
    "for i in range(",
    "# é 漢 😀\nname = ",
    "import sys\nimport json\n\n\ndef main():\n    parser = ",
)
SPECS: tuple[dict[str, Any], ...] = (
    {"mode": "ar"},
    {"mode": "linear"},
    {"mode": "linear", "block_length": 4, "temperature": 0.8, "top_p": 0.95},
    {"mode": "branching", "branches": 2, "temperature": 1.0},
    {"mode": "quadratic", "block_length": 4},
    {"mode": "auto"},
    {"mode": "auto", "temperature": 0.7, "top_k": 40},
    {"mode": "diffusion", "threshold": 0.6},
    {"mode": "diffusion", "steps": 3, "temperature": 0.6},
    {"mode": "linear", "stop": ["\n\n"]},
)

BAD_BODIES: tuple[tuple[bytes, int], ...] = (
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"null", 400),
    (b'{"prompt": "a", "prompt": }', 400),
    (b'{"prompt": "\xff\xfe"}', 400),
    (b"\x00" * 50, 400),
    (b'{"prompt": "a", "no_such_field": 1}', 400),
    (b'{"prompt": "a", "max_tokens": -1}', 400),
    (b'{"prompt": "a", "max_tokens": "many"}', 400),
    (b'{"prompt": "a", "temperature": 1e999}', 400),
    (b'{"prompt": [1, "a"]}', 400),
    (b'{"prompt": "a", "mode": "sideways"}', 400),
    (b'{"prompt": "a", "model": "/etc/passwd"}', 404),
    (b'{"prompt": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", 400),
    (b'{"prompt": "a", "max_tokens": 1000000}', 400),
    (b'{"prompt": "' + b"a" * (MAX_BODY_BYTES + 10) + b'"}', 413),
)


@dataclass
class Tally:
    """What happened.

    Attributes:
        counts: Requests by what became of them.
        wrong: What must not have; empty if all went well.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, kind: str) -> None:
        self.counts[kind] += 1

    def fail(self, what: str) -> None:
        self.counts["WRONG"] += 1
        if len(self.wrong) < 20:
            self.wrong.append(what)


class Soak:
    """One server under load.

    Args:
        url: Where it is.
        expected: Text of each (prompt, spec), by their numbers.
        may_be_lost: Whether a request may fail with 503, since replicas are killed.
        seed: Of the clients' choices.
    """

    def __init__(
        self, url: str, expected: dict[tuple[int, int], str], *, may_be_lost: bool, seed: int
    ) -> None:
        self.url = url
        self.tally = Tally()
        self._expected = expected
        self._may_be_lost = may_be_lost
        self._chance = random.Random(seed)
        self._until = 0.0

    async def run(self, seconds: float) -> None:
        """All clients side by side."""
        self._until = time.monotonic() + seconds
        actors = [self._honest] * 6 + [self._leaver] * 3 + [self._slow, self._vandal, self._breaker]
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, limits=limits) as client:
            await asyncio.gather(*(self._loop(actor, client) for actor in actors))

    async def _loop(
        self, actor: Callable[[httpx.AsyncClient], Awaitable[None]], client: httpx.AsyncClient
    ) -> None:
        while time.monotonic() < self._until:
            try:
                await asyncio.wait_for(actor(client), REQUEST_TIMEOUT_S)
            except TimeoutError:
                self.tally.fail(f"{actor.__name__}: no answer in {REQUEST_TIMEOUT_S:.0f} s")
            except (httpx.HTTPError, OSError, ValueError, asyncio.IncompleteReadError) as error:
                self.tally.fail(f"{actor.__name__}: {type(error).__name__}: {error}")
            await asyncio.sleep(self._chance.uniform(0, 0.2))

    def _request(self) -> tuple[dict[str, Any], str]:
        prompt, spec = self._chance.choice(list(self._expected))
        return body_of(prompt, spec), self._expected[prompt, spec]

    async def _honest(self, client: httpx.AsyncClient) -> None:
        """Asks, waits, and compares."""
        body, expected = self._request()
        if self._chance.random() < 0.5:
            answer = await client.post(self.url + "/v1/completions", json=body)
            if answer.status_code == 503 and self._may_be_lost:
                self.tally.note("lost")
                return
            if answer.status_code != 200:
                self.tally.fail(f"{body}: {answer.status_code} {answer.text[:200]}")
                return
            self._compare(body, answer.json()["choices"][0]["text"], expected)
            return
        text, is_lost = "", False
        async with aclosing_lines(client, self.url, body | {"stream": True}) as lines:
            async for chunk in lines:
                if "error" in chunk:
                    is_lost = True
                    break
                text += "".join(choice.get("text", "") for choice in chunk["choices"])
        if is_lost and self._may_be_lost and expected.startswith(text):
            self.tally.note("lost")
        elif is_lost:
            self.tally.fail(f"{body}: a stream that failed after {text!r}")
        else:
            self._compare(body, text, expected)

    def _compare(self, body: dict[str, Any], text: str, expected: str) -> None:
        if text == expected:
            self.tally.note("right")
        else:
            self.tally.fail(f"{body}: wrote {text!r}, not {expected!r}")

    async def _leaver(self, client: httpx.AsyncClient) -> None:
        """Goes away in the middle."""
        body, _ = self._request()
        body |= {"max_tokens": 400, "stop": None, "ignore_eos": True, "stream": True}
        body["events"] = self._chance.random() < 0.5
        num_chunks = self._chance.randrange(0, 12)
        async with aclosing_lines(client, self.url, body) as lines:
            for _ in range(num_chunks):
                await anext(lines, None)
        self.tally.note("left")

    async def _slow(self, client: httpx.AsyncClient) -> None:
        """Reads a few bytes at a time, and at last the rest."""
        body, expected = self._request()
        raw = json.dumps(body | {"stream": True}).encode()
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=256)
        try:
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: [::]\r\nContent-Type: application/json\r\n"
                b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw
            )
            await writer.drain()
            received = b""
            for _ in range(20):
                received += await reader.read(7)
                await asyncio.sleep(0.05)
            received += await reader.read()
        finally:
            writer.close()
        found = re.findall(rb"data: (\{.*\})\r?\n", received)
        chunks = [json.loads(one) for one in found]
        if self._may_be_lost and (b" 503 " in received[:40] or any("error" in c for c in chunks)):
            self.tally.note("lost")
            return
        text = "".join(choice.get("text", "") for c in chunks for choice in c.get("choices", []))
        self._compare(body, text, expected)

    async def _vandal(self, client: httpx.AsyncClient) -> None:
        """Sends what is no request, and wants a clear answer all the same."""
        body, status = self._chance.choice(BAD_BODIES)
        path = self._chance.choice(["/v1/completions", "/v1/completions", "/v1/nothing"])
        status = 404 if path.endswith("nothing") else status

        async def in_pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 4_000):
                yield body[start : start + 4_000]

        content: Any = in_pieces() if self._chance.random() < 0.3 else body
        headers = {"Content-Type": "application/json"}
        answer = await client.post(self.url + path, content=content, headers=headers)
        if answer.status_code == 503 and self._may_be_lost:
            self.tally.note("lost")
        elif answer.status_code != status or not answer.json()["error"]["message"]:
            self.tally.fail(f"{body[:60]!r}: {answer.status_code} {answer.text[:200]}")
        else:
            self.tally.note(f"refused {status}")

    async def _breaker(self, client: httpx.AsyncClient) -> None:
        """Speaks no HTTP, or only half a request, and goes."""
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(
                self._chance.choice(
                    [
                        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9,
                        b"POST /v1/infill HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 999\r\n\r\n{",
                        b"GET / HTTP/9.9\r\n\r\n",
                        b"\r\n\r\n\r\n",
                    ]
                )
            )
            await writer.drain()
            with contextlib.suppress(TimeoutError, ConnectionError):
                await asyncio.wait_for(reader.read(200), 0.3)
        finally:
            writer.close()
        self.tally.note("broke off")


@contextlib.asynccontextmanager
async def aclosing_lines(
    client: httpx.AsyncClient, url: str, body: dict[str, Any]
) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """The chunks of a stream; an answer that is none is a chunk with its error."""
    async with client.stream("POST", url + "/v1/completions", json=body) as answer:

        async def chunks() -> AsyncIterator[dict[str, Any]]:
            if answer.status_code != 200:
                yield json.loads(await answer.aread())
                return
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])

        yield chunks()


def body_of(prompt: int, spec: int) -> dict[str, Any]:
    values = {"max_tokens": 24, "temperature": 0, "seed": 100 + spec}
    return {"prompt": PROMPTS[prompt], **values, **SPECS[spec]}


def expected_texts() -> dict[tuple[int, int], str]:
    """What every request must give, decoded here and alone."""
    lm = trimode.load("pocket", dtype="float64", weights="plain")
    found = {}
    for prompt, text in enumerate(PROMPTS):
        for spec, options in enumerate(SPECS):
            mode = "ar" if options["mode"] == "auto" else options["mode"]
            body = body_of(prompt, spec) | {"mode": mode}
            body["max_new_tokens"] = body.pop("max_tokens")
            del body["prompt"]
            found[prompt, spec] = lm.generate(text, **body).text
    return found


@contextlib.contextmanager
def serving(*, replicas: int, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server of its own; yields its address and its process."""
    words = [*SERVE, "pocket", "--port", "0", "--dtype", "float64"]
    words += ["--weights", "plain", "--max-batch", "8", "--max-context", "512"]
    words += ["--token-budget", "64", "--time-slice", "16"]
    words += ["--max-body-bytes", str(MAX_BODY_BYTES), "--replicas", str(replicas)]
    with log.open("wb") as sink:
        process = subprocess.Popen(words, stderr=sink, stdout=sink)
        try:
            yield wait_for_address(process, log), process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def wait_for_address(process: subprocess.Popen[bytes], log: Path) -> str:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until and process.poll() is None:
        found = re.search(r"ready at (http://\S+)", log.read_text(errors="replace"))
        if found:
            return found[1]
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}")


def gauges(url: str) -> dict[str, float]:
    """Texts that run or wait, as the server has it."""
    text = httpx.get(url + "/metrics", timeout=10).text
    pattern = r"^(trimode_running|trimode_waiting) (\S+)$"
    return {name: float(value) for name, value in re.findall(pattern, text, flags=re.M)}


def memory_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def num_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def soak(seconds: float, *, seed: int = 0) -> tuple[Tally, dict[str, Any]]:
    """One process under load for so long; what happened, and what it held before and after."""
    expected = expected_texts()
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(replicas=1, log=Path(folder) / "log") as (url, process),
    ):
        warm = Soak(url, expected, may_be_lost=False, seed=seed + 1)
        asyncio.run(warm.run(min(seconds / 4, 30.0)))
        settle(url)
        before = {"bytes": memory_bytes(process.pid), "files": num_files(process.pid)}
        run = Soak(url, expected, may_be_lost=False, seed=seed)
        asyncio.run(run.run(seconds))
        run.tally.wrong += warm.tally.wrong
        left = settle(url)
        after = {"bytes": memory_bytes(process.pid), "files": num_files(process.pid)}
        if any(left.values()) or not left:
            run.tally.fail(f"not freed: {left}")
        if after["bytes"] > before["bytes"] + MEMORY_MARGIN_BYTES:
            run.tally.fail(f"memory grew from {before['bytes']} to {after['bytes']} bytes")
        if after["files"] > before["files"] + 2:
            run.tally.fail(f"open files grew from {before['files']} to {after['files']}")
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        if code:
            run.tally.fail(f"exit code {code} on SIGTERM")
        log = (Path(folder) / "log").read_text(errors="replace")
        if "Traceback" in log:
            run.tally.fail("a traceback in the log: " + log[log.index("Traceback") :][:1500])
    return run.tally, {"before": before, "after": after}


def soak_replicas(seconds: float, *, kill_every_s: float, seed: int = 0) -> tuple[Tally, int]:
    """Two replicas under load, one of them killed now and then; what happened, and the kills."""
    expected = expected_texts()
    num_kills = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(replicas=2, log=Path(folder) / "log") as (url, process),
    ):
        run = Soak(url, expected, may_be_lost=True, seed=seed)

        async def kill_now_and_then() -> None:
            nonlocal num_kills
            until = time.monotonic() + seconds - kill_every_s
            while time.monotonic() < until:
                await asyncio.sleep(kill_every_s)
                victims = replica_pids()
                if len(victims) >= 2:
                    os.kill(random.Random(num_kills).choice(victims), signal.SIGKILL)
                    num_kills += 1

        async def both() -> None:
            await asyncio.gather(run.run(seconds), kill_now_and_then())

        asyncio.run(both())
        last = Soak(url, expected, may_be_lost=False, seed=seed + 1)
        asyncio.run(wait_until_whole(url))
        asyncio.run(last.run(3.0))
        run.tally.wrong += last.tally.wrong
        if not run.tally.counts["right"] or not last.tally.counts["right"]:
            run.tally.fail("no right answer at all")
    return run.tally, num_kills


async def wait_until_whole(url: str) -> None:
    """Until two replicas run again."""
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        if len(replica_pids()) >= 2:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url + "/ready", timeout=5).status_code == 200:
                    return
        await asyncio.sleep(0.5)
    raise RuntimeError("the replicas did not come back")


def replica_pids() -> list[int]:
    """Processes that hold a model, by the title that Ray gives them."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                if title.startswith(b"ray::ServeReplica:") and b"Replica" in title[18:]:
                    found.append(int(folder.name))
    return found


def settle(url: str) -> dict[str, float]:
    """The gauges once all is quiet, or when the time for that is up."""
    until = time.monotonic() + SETTLE_TIMEOUT_S
    while time.monotonic() < until:
        found = gauges(url)
        if found and not any(found.values()):
            return found
        time.sleep(0.2)
    return gauges(url)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--replica-seconds", type=float, default=0.0, help="the same with kills")
    parser.add_argument("--output", type=Path, help="write what happened as JSON")
    arguments = parser.parse_args()
    tally, held = soak(arguments.seconds)
    record: dict[str, Any] = {"seconds": arguments.seconds, "requests": tally.counts, **held}
    wrong = list(tally.wrong)
    if arguments.replica_seconds:
        killed, num_kills = soak_replicas(arguments.replica_seconds, kill_every_s=20.0)
        record["replicas"] = {
            "seconds": arguments.replica_seconds,
            "kills": num_kills,
            "requests": killed.counts,
        }
        wrong += killed.wrong
    record["wrong"] = wrong
    text = json.dumps(record, indent=1)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
