"""Stopping a run from outside without losing what it did."""

from __future__ import annotations

import logging
import signal
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class StopSignals(AbstractContextManager["StopSignals"]):
    """Turns the first SIGINT or SIGTERM into a flag: the step in hand is finished and saved.

    A second one acts as usual. Only the main thread can catch signals; elsewhere nothing is caught.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:
                break
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        logger.warning("%s: stopping after this step", signal.Signals(number).name)
        self.is_set = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
