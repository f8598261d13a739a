"""A minute of the soak; `make soak` has the long one."""

from __future__ import annotations

import pytest

from tests.serving.soak import soak

pytestmark = pytest.mark.process


def test_a_minute_under_load() -> None:
    """Prevents: wrong texts, requests without an answer, memory, rows or files that are not given
    back, under clients of all kinds."""
    tally, _ = soak(48.0)  # and 12 to warm up
    assert tally.wrong == []
    assert tally.counts["right"] > 20
    assert tally.counts["left"] > 5
