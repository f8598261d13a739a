"""The threads that the native step works with."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from trimode.model.native.library import library


class Threads:
    """A few threads that sleep when nothing is to do; they start at the first work.

    Args:
        num_threads: How many, the calling one included.
    """

    def __init__(self, num_threads: int) -> None:
        self._library = library()
        self._handle = self._library.trimode_threads_new(num_threads)
        self._num_threads = num_threads
        self._lock = threading.Lock()

    @property
    def num_threads(self) -> int:
        """How many, the calling one included."""
        return self._num_threads

    @contextmanager
    def borrowed(self) -> Iterator[ctypes.c_void_p]:
        """Have them for one call. Whoever finds them busy gets none, and works alone."""
        is_free = self._lock.acquire(blocking=False)
        try:
            yield ctypes.c_void_p(self._handle if is_free else None)
        finally:
            if is_free:
                self._lock.release()

    def resize(self, num_threads: int) -> None:
        """Have as many from now on; no effect while they are at work."""
        if num_threads != self._num_threads and self._lock.acquire(blocking=False):
            self._library.trimode_threads_resize(ctypes.c_void_p(self._handle), num_threads)
            self._num_threads = num_threads
            self._lock.release()

    def __del__(self) -> None:
        if handle := getattr(self, "_handle", None):
            self._library.trimode_threads_free(ctypes.c_void_p(handle))


@cache
def _default() -> Threads:
    return Threads(torch.get_num_threads())


def threads() -> Threads:
    """The ones that all share who bring none of their own: as many as torch uses."""
    found = _default()
    found.resize(torch.get_num_threads())
    return found
