"""Jobs counted in and out, so that a backend can take no more and wait for those it has."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from trimode.serving.jobs import Failed

logger = logging.getLogger(__name__)

SHUTTING_DOWN = Failed(
    status=503, code="unavailable", message="the server is shutting down", retry_after_s=5
)


class RunningJobs:
    """What runs in a backend.

    Attributes:
        num: Jobs at present.
        is_closing: Whether no more are to be taken.
    """

    def __init__(self) -> None:
        self.num = 0
        self.is_closing = False
        self._all_done = asyncio.Event()

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """Counts a job in, and out at its end."""
        self.num += 1
        try:
            yield
        finally:
            self.num -= 1
            if self.is_closing and not self.num:
                self._all_done.set()

    async def drain(self, timeout_s: float) -> bool:
        """Close, and wait so long; whether all came to their end."""
        self.is_closing = True
        if self.num:
            try:
                await asyncio.wait_for(self._all_done.wait(), timeout_s)
            except TimeoutError:
                logger.warning("%d jobs did not finish in time; aborted", self.num)
                return False
        return True
