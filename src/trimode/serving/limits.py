"""Who may ask, under which name, how often, how much at once, and how long a body may be."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

from trimode.serving.jobs import Failed
from trimode.serving.refusals import Refusal, bad_request
from trimode.serving.settings import Settings

MAX_BUCKETS = 10_000
"""Clients that are remembered at a time; those who may ask as much as ever are forgotten first."""

_HOST_PORT = re.compile(r":\d*$")

DRAINED = 8
"""A body that is too large is read on to so many times the limit, so that its sender, who reads
nothing before, gets to see why it is refused."""


class ApiKeys:
    """Keys, of which one must come with a request.

    Args:
        keys: None: nobody needs one.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    def client(self, request: Request) -> str:
        """Whose request it is: a name for the key, which does not give it away, or the address.

        Raises:
            Refusal: 401.
        """
        if not self._hashes:
            return request.client.host if request.client is not None else ""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # All are compared, each in constant time, so that the time says nothing about any.
        found = [hmac.compare_digest(given, known) for known in self._hashes]
        if scheme.lower() != "bearer" or not any(found):
            message = "no valid API key; send it as `Authorization: Bearer KEY`"
            failed = Failed(status=401, code="invalid_api_key", message=message)
            raise Refusal(failed, headers={"WWW-Authenticate": "Bearer"})
        return f"key-{given.hex()[:8]}"


class Hosts:
    """Names under which a server that asks for no key may be asked.

    A page elsewhere can point its own name at this machine and is then, to a browser, the same
    origin; it cannot change the name that the browser sends along. So a request comes by an IP
    address, as `localhost`, or by a name that was allowed.

    Args:
        allowed: Further names; `*` for any.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = {name.lower() for name in allowed} | {"localhost"}

    def check(self, host: str | None) -> None:
        """Look at a Host header; browsers always send one.

        Raises:
            Refusal: 403.
        """
        if host is None or "*" in self._allowed:
            return
        name = _HOST_PORT.sub("", host).lower()
        if name in self._allowed or _is_address(name):
            return
        message = (
            f"host is {host[:60]!r}; allowed: an IP address, {', '.join(sorted(self._allowed))}"
        )
        message += "; others by --allow-host, any with API keys"
        raise Refusal(Failed(status=403, code="host_not_allowed", message=message))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


@dataclass(slots=True)
class _Bucket:
    """What a client may still ask for, as of a time."""

    tokens: float
    at_s: float


class RateLimit:
    """So many requests a minute for each client: all at once, or evenly, or in between.

    Args:
        per_minute: None for no limit.
        clock: Seconds.
    """

    def __init__(
        self, per_minute: float | None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, client: str) -> None:
        """Count a request.

        Raises:
            Refusal: 429, with when to come back.
        """
        if self._per_minute is None:
            return
        per_second, most = self._per_minute / 60, max(self._per_minute, 1.0)
        now = self._clock()
        bucket = self._buckets.setdefault(client, _Bucket(most, now))
        bucket.tokens = min(most, bucket.tokens + (now - bucket.at_s) * per_second)
        bucket.at_s = now
        if bucket.tokens < 1:
            raise Refusal(
                Failed(
                    status=429,
                    code="rate_limit_exceeded",
                    message=f"more than {self._per_minute:g} requests a minute of one client",
                    retry_after_s=(1 - bucket.tokens) / per_second,
                )
            )
        bucket.tokens -= 1
        if len(self._buckets) > MAX_BUCKETS:
            self._forget(now, most / per_second)

    def _forget(self, now: float, refill_s: float) -> None:
        old = {name: one for name, one in self._buckets.items() if now - one.at_s < refill_s}
        by_age = sorted(old, key=lambda name: old[name].at_s)
        self._buckets = {name: old[name] for name in by_age[-MAX_BUCKETS // 2 :]}


class Concurrency:
    """Requests at a time, in all and of each client.

    Args:
        most: In all.
        most_per_client: Of one; None for no limit of its own.
    """

    def __init__(self, most: int, most_per_client: int | None) -> None:
        self._most = most
        self._most_per_client = most_per_client
        self._active: Counter[str] = Counter()

    @property
    def num_active(self) -> int:
        return self._active.total()

    def enter(self, client: str) -> None:
        """Count a request in; `leave` counts it out.

        Raises:
            Refusal: 429.
        """
        per_client = self._most_per_client
        for number, most, whose in (
            (self.num_active, self._most, "this server"),
            (self._active[client], per_client, "this client"),
        ):
            if most is not None and number >= most:
                message = f"{number} requests run already, the most that {whose} may have"
                raise Refusal(
                    Failed(status=429, code="overloaded", message=message, retry_after_s=1)
                )
        self._active[client] += 1

    def leave(self, client: str) -> None:
        """Count a request out."""
        self._active[client] -= 1
        if not self._active[client]:
            del self._active[client]


async def read_body(request: Request, *, settings: Settings) -> bytes:
    """A JSON body within its limits.

    A body of another type is refused: a web page elsewhere can send it without asking first.

    Raises:
        Refusal: 400, 408, 413 or 415.
        ClientDisconnect: the client left.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"content-type is {kind!r}; allowed: application/json"
        raise Refusal(Failed(status=415, code="unsupported_media_type", message=message))
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise bad_request("content-encoding is given; allowed: none")
    most = settings.max_body_bytes
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for part in _parts(request):
                num_bytes += len(part)
                if num_bytes <= most:
                    parts.append(part)
                else:
                    parts.clear()
                if num_bytes > DRAINED * most:
                    break
    except TimeoutError:
        message = f"the body did not arrive within {settings.body_timeout_s:g} s"
        raise Refusal(
            Failed(status=408, code="too_slow", message=message), headers={"Connection": "close"}
        ) from None
    if num_bytes > most:
        message = f"the body has more than {most} bytes, the most that is allowed here"
        raise Refusal(
            Failed(status=413, code="too_large", message=message), headers={"Connection": "close"}
        )
    return b"".join(parts)


async def _parts(request: Request) -> AsyncIterator[bytes]:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        yield message.get("body", b"")
        if not message.get("more_body", False):
            return
