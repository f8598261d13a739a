"""What a server allows. Data only, checked once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from trimode.errors import ConfigError

KEYS_VARIABLE = "TRIMODE_API_KEYS"

_HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
_ORIGIN = re.compile(r"https?://[^/\s*]+")
_KEY = re.compile(r"[\x21-\x7e]{8,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Limits and doors of a server.

    Attributes:
        api_keys: One of them must come with every request; none: no key is asked for.
        allowed_hosts: Names under which it may be asked without keys, beside `localhost` and IP
            addresses; `*` for any.
        cors_origins: Web pages that may use the server from a browser, beside its own.
        has_open_metrics: Whether /metrics is open without a key.
        max_body_bytes: Of a request.
        max_output_tokens: Of one text; None for what the context leaves.
        max_choices: Texts of one request, prompts times `n`.
        max_concurrent: Requests at a time, in all.
        max_concurrent_per_key: Of one client; None for no limit of its own.
        requests_per_minute: Of one client: so many at once, then evenly; None for no limit.
        timeout_s: Of a request that gives none, and the most that it may give.
        body_timeout_s: For a request's body to arrive.

    Raises:
        ConfigError: naming what is not valid.
    """

    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    has_open_metrics: bool = False
    max_body_bytes: int = 2**20
    max_output_tokens: int | None = None
    max_choices: int = 32
    max_concurrent: int = 256
    max_concurrent_per_key: int | None = None
    requests_per_minute: float | None = None
    timeout_s: float = 600.0
    body_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith(("max_", "requests_")) or field.name.endswith("_s"):
                if field.name != "cors_origins" and value is not None and not value > 0:
                    raise ConfigError(f"{field.name} is {value}; allowed: more than 0")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"cors_origins has {origin!r}; allowed: origins such as https://example.org"
                )
        for name in self.allowed_hosts:
            if name != "*" and not _HOST.fullmatch(name):
                raise ConfigError(
                    f"allowed_hosts has {name!r}; allowed: names without a port, or *"
                )
        for number, key in enumerate(self.api_keys, start=1):
            _check_key(key, f"API key {number}")


def read_api_keys(
    path: str | Path | None, *, environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """Keys from a file, one a line, `#` for comments; and from the environment, by commas.

    Raises:
        ConfigError: the file cannot be read or holds none, or a key is not valid.
    """
    given = environment.get(KEYS_VARIABLE, "").split(",")
    keys = {key.strip(): f"{KEYS_VARIABLE}, key {n}" for n, key in enumerate(given, start=1)}
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ConfigError(f"API keys {str(path)!r} cannot be read: {reason}") from None
        found = {
            line.strip(): f"API keys {str(path)!r}, line {n}"
            for n, line in enumerate(lines, start=1)
            if line.strip() and not line.strip().startswith("#")
        }
        if not found:
            raise ConfigError(f"API keys {str(path)!r} holds none; give one a line")
        keys |= found
    keys.pop("", None)
    for key, place in keys.items():
        _check_key(key, place)
    return tuple(keys)


def _check_key(key: str, place: str) -> None:
    if not _KEY.fullmatch(key):  # the key itself stays out of messages
        raise ConfigError(
            f"{place}: not a valid key; allowed: 8 or more ASCII characters, no space"
        )
