"""Limits by a clock of the test's own, keys and settings without a server."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from trimode.errors import ConfigError
from trimode.serving import limits
from trimode.serving.limits import Concurrency, RateLimit
from trimode.serving.logs import JsonFormatter, request_id
from trimode.serving.refusals import Refusal
from trimode.serving.settings import Settings, read_api_keys


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_rate_is_kept_to_over_time() -> None:
    """Prevents: a bucket that never fills again, overflows, or tells a wrong time to come back."""
    clock = Clock()
    rate = RateLimit(6, clock=clock)
    for _ in range(6):
        rate.take("a")
    with pytest.raises(Refusal) as caught:
        rate.take("a")
    assert caught.value.failed.retry_after_s == pytest.approx(10)
    rate.take("b")
    clock.now_s += 10
    rate.take("a")
    with pytest.raises(Refusal):
        rate.take("a")
    clock.now_s += 1e6
    for _ in range(6):
        rate.take("a")
    with pytest.raises(Refusal):
        rate.take("a")


def test_a_rate_below_one_a_minute_lets_one_through() -> None:
    """Prevents: a bucket too small for a single request."""
    clock = Clock()
    rate = RateLimit(0.5, clock=clock)
    rate.take("a")
    clock.now_s += 119
    with pytest.raises(Refusal):
        rate.take("a")
    clock.now_s += 1.1
    rate.take("a")


def test_clients_are_not_remembered_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: memory filled by addresses that asked once."""
    monkeypatch.setattr(limits, "MAX_BUCKETS", 10)
    rate = RateLimit(6, clock=Clock())
    for number in range(100):
        rate.take(str(number))
    assert len(rate._buckets) <= 10


def test_places_are_given_back() -> None:
    """Prevents: a client locked out by requests that ended long ago."""
    places = Concurrency(3, 2)
    places.enter("a")
    places.enter("a")
    with pytest.raises(Refusal, match="this client may have"):
        places.enter("a")
    places.enter("b")
    with pytest.raises(Refusal, match="this server may have"):
        places.enter("c")
    places.leave("a")
    places.enter("c")
    assert places.num_active == 3


def test_keys_from_a_file_and_the_environment(tmp_path: Path) -> None:
    """Prevents: a comment or an empty line that opens the door."""
    file = tmp_path / "keys"
    file.write_text("# ours\n\nfirst-key-1\nsecond-key-2 \n")
    found = read_api_keys(file, environment={"TRIMODE_API_KEYS": "third-key-3,,first-key-1"})
    assert found == ("third-key-3", "first-key-1", "second-key-2")
    assert read_api_keys(None, environment={}) == ()
    file.write_text("# ours\n\n  # more\nfirst-key-1\ntiny-1\n")
    with pytest.raises(ConfigError, match="keys', line 5: not a valid key; allowed: 8") as caught:
        read_api_keys(file, environment={})
    assert "tiny-1" not in str(caught.value)
    with pytest.raises(ConfigError, match="TRIMODE_API_KEYS, key 2: not a valid key"):
        read_api_keys(None, environment={"TRIMODE_API_KEYS": "first-key-1,tiny-1"})
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="holds none"):
        read_api_keys(file, environment={})
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_api_keys(tmp_path / "missing", environment={})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_body_bytes": 0}, "max_body_bytes is 0; allowed: more than 0"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"requests_per_minute": -1}, "requests_per_minute is -1"),
        ({"cors_origins": ("*",)}, "cors_origins has '\\*'; allowed: origins"),
        ({"cors_origins": ("https://a.example/",)}, "cors_origins has 'https://a.example/'"),
        ({"api_keys": ("short",)}, "API key 1: not a valid key"),
    ],
)
def test_settings_are_checked(values: dict[str, Any], message: str) -> None:
    """Prevents: a limit that lets all or nothing through by mistake."""
    with pytest.raises(ConfigError, match=message) as caught:
        Settings(**values)
    assert "short" not in str(caught.value)


def test_a_log_line_is_one_object() -> None:
    """Prevents: a message that breaks a line in two and forges another entry."""
    record = logging.makeLogRecord(
        {"msg": "a\n%s", "args": ("b",), "levelname": "INFO", "extra": 1}
    )
    token = request_id.set("req-1")
    try:
        line = JsonFormatter().format(record)
    finally:
        request_id.reset(token)
    assert "\n" not in line
    entry = json.loads(line)
    assert (entry["message"], entry["request_id"], entry["extra"]) == ("a\nb", "req-1", 1)
