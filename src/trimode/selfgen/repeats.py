"""Repeats: prompts that came before, and answers that run in a loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from trimode.training.near_duplicates import SIGNATURE_WORDS, first_of_each, signature

LOOP_WINDOW = 64
MOST_LOOP_PERIOD = 16


class PromptsSeen:
    """The prompts so far, in the order of their index.

    Args:
        threshold: Similarity from which a prompt of at least five words is a near duplicate; 1
            finds equal ones only.

    Raises:
        ConfigError: The library that finds near duplicates is missing.
    """

    def __init__(self, *, threshold: float) -> None:
        self._folded: set[str] = set()
        self._signatures: deque[np.ndarray] | None = None
        if threshold < 1:
            signature("")  # refuses at once where the library is missing
            self._signatures = deque()
            self._is_new = first_of_each(_drained(self._signatures), threshold=threshold)

    def reason(self, prompt: str) -> str | None:
        """`duplicate`, `near_duplicate`, or None for a new prompt, which is remembered."""
        folded = " ".join(prompt.casefold().split())
        if folded in self._folded:
            return "duplicate"
        if self._signatures is not None and len(folded.split()) >= SIGNATURE_WORDS:
            self._signatures.append(signature(folded))
            if not next(self._is_new):
                return "near_duplicate"
        self._folded.add(folded)
        return None


def _drained(queue: deque[np.ndarray]) -> Iterator[np.ndarray]:
    while True:
        yield queue.popleft()


def is_loop(token_ids: Sequence[int]) -> bool:
    """Whether the last 64 tokens repeat a piece of at most 16 tokens."""
    if len(token_ids) < LOOP_WINDOW:
        return False
    window = list(token_ids[-LOOP_WINDOW:])
    periods = range(1, MOST_LOOP_PERIOD + 1)
    return any(window[period:] == window[:-period] for period in periods)
