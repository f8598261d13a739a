"""What a request may ask for: each bad value is one clear error."""

from __future__ import annotations

import math
from typing import Any

import pytest

from trimode.decoding import MODES, GenerationParams
from trimode.decoding.params import MODE_NAMES
from trimode.errors import RequestError

GOOD: dict[str, Any] = {"mode": "linear", "max_new_tokens": 4, "block_length": 4, "seed": 0}


@pytest.mark.parametrize(
    ("name", "value", "allowed", "others"),
    [
        ("mode", "fast", "ar, diffusion, linear", {}),
        ("mode", None, "ar, diffusion, linear", {}),
        ("max_new_tokens", 0, "at least 1", {}),
        ("max_new_tokens", 2.0, "an integer", {}),
        ("max_new_tokens", True, "an integer", {}),
        ("block_length", 1, "at least 2", {}),
        ("block_length", 0, "at least 1", {"mode": "diffusion"}),
        ("block_length", "4", "an integer", {}),
        ("seed", -1, "0 to 18446744073709551615", {}),
        ("seed", 2**64, "0 to 18446744073709551615", {}),
        ("seed", None, "an integer", {}),
        ("temperature", -0.1, "1e-5 to 1e5", {}),
        ("temperature", math.nan, "1e-5 to 1e5", {}),
        ("temperature", math.inf, "1e-5 to 1e5", {}),
        ("temperature", "1", "1e-5 to 1e5", {}),
        ("temperature", None, "1e-5 to 1e5", {}),
        ("top_k", 0, "integer >= 1", {}),
        ("top_k", -1, "integer >= 1", {}),
        ("top_k", 1.5, "integer >= 1", {}),
        ("top_p", 0.0, "(0, 1]", {}),
        ("top_p", 1.01, "(0, 1]", {}),
        ("top_p", math.nan, "(0, 1]", {}),
        ("stop", ("",), "non-empty", {}),
        ("stop", (3,), "strings", {}),
        ("stop_token_ids", (-1,), "token ids", {}),
        ("stop_token_ids", ("a",), "token ids", {}),
        ("threshold", -0.1, "0 to 1", {}),
        ("threshold", 1.1, "0 to 1", {}),
        ("threshold", math.nan, "0 to 1", {}),
        ("threshold", 0.5, "no threshold", {"mode": "ar"}),
        ("steps", 0, "1 to block_length=4", {}),
        ("steps", 5, "1 to block_length=4", {}),
        ("steps", 1.0, "1 to block_length=4", {}),
        ("steps", 2, "no steps", {"mode": "ar"}),
    ],
)
def test_a_bad_value_is_one_clear_error(
    name: str, value: Any, allowed: str, others: dict[str, Any]
) -> None:
    """Prevents: a bad request failing deep inside a forward, or silently meaning another thing."""
    with pytest.raises(RequestError) as caught:
        GenerationParams(**(GOOD | others | {name: value}))
    message = str(caught.value)
    assert message.startswith(f"{name} is {value!r}; allowed: ")
    assert allowed in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 2**64 - 1},
        {"mode": "diffusion", "block_length": 1},
        {"top_p": 1, "top_k": 10**9, "temperature": 100},
        {"threshold": 0, "steps": 4},
        {"threshold": 1.0, "steps": 1},
        {"mode": "branching", "branches": 0, "guesses": True},
        {"mode": "branching", "branches": 7, "block_length": 4, "draft_cutoff": 1},
        {"mode": "branching", "block_length": 2},
    ],
)
def test_the_ends_of_every_range_are_allowed(options: dict[str, Any]) -> None:
    """Prevents: a check that is off by one."""
    GenerationParams(**(GOOD | options))


@pytest.mark.parametrize(
    ("mode", "threshold", "steps", "expected"),
    [
        ("diffusion", None, None, 0.9),
        ("diffusion", None, 2, None),
        ("diffusion", 0.0, None, 0.0),
        ("diffusion", 0.5, 2, 0.5),
        ("linear", None, None, 0.0),
        ("linear", None, 2, None),
        ("linear", 0.3, None, 0.3),
    ],
)
def test_the_threshold_in_force(
    mode: str, threshold: float | None, steps: int | None, expected: float | None
) -> None:
    """Prevents: `steps` ignored because a default threshold reveals everything first."""
    options = GOOD | {"mode": mode, "threshold": threshold, "steps": steps}
    assert GenerationParams(**options).reveal_threshold(mode) == expected


def test_mode_names_are_the_modes() -> None:
    """Prevents: a mode that is allowed and not built, or the reverse."""
    assert set(MODE_NAMES) == set(MODES)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mode": "ar"}, (0, False)),
        ({"mode": "linear"}, (0, False)),
        ({"mode": "branching"}, (4, True)),
        ({"mode": "branching", "block_length": 2}, (3, True)),
        ({"mode": "branching", "branches": 2, "guesses": False}, (2, False)),
        ({"mode": "quadratic"}, (8, False)),
    ],
)
def test_the_branches_in_force(options: dict[str, Any], expected: tuple[int, bool]) -> None:
    """Prevents: a default that a short block has no outcomes for; quadratic with guesses."""
    params = GenerationParams(**(GOOD | {"block_length": 8} | options))
    assert params.branching(params.mode) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "linear", "branches": 2}, "branches is 2; allowed: None, since mode 'linear'"),
        ({"mode": "quadratic", "guesses": True}, "guesses is True; allowed: None, since mode"),
        ({"mode": "branching", "branches": 8}, "branches is 8; allowed: None, or 0 to 2 *"),
        ({"mode": "branching", "steps": 2}, "steps is 2; allowed: None, since drafts behind"),
        ({"mode": "quadratic", "threshold": 0.5}, "threshold is 0.5; allowed: None, since"),
        ({"mode": "ar", "draft_cutoff": 0.5}, "draft_cutoff is 0.5; allowed: None, or 0 to 1 in"),
        ({"mode": "linear", "draft_cutoff": 1.5}, "draft_cutoff is 1.5; allowed: None, or 0 to 1"),
    ],
)
def test_knobs_of_speculation_are_refused_where_they_mean_nothing(
    options: dict[str, Any], message: str
) -> None:
    """Prevents: a knob ignored in silence."""
    with pytest.raises(RequestError) as caught:
        GenerationParams(**(GOOD | {"block_length": 4} | options))
    assert str(caught.value).startswith(message)
