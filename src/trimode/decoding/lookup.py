"""Drafts from the text itself: where its last few tokens stood before, what followed them then.

Costs no forward. Lossless like any draft, since a draft is only a guess. How far such a guess can
be trusted is learned from those that came true, used or not.

Source: prompt lookup decoding (Saxena 2023), n-gram speculation of vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass

LENGTHS = (4, 3, 2)
"""Tokens that must stand before, the longest match first."""

PRIOR_TRIES = 4.0
PRIOR_CHANCES = {2: 0.25, 3: 0.5, 4: 0.75}
"""Chance that the first token of a guess is right, by tokens matched, before any was seen."""

PRIOR_NEXT = 0.75
"""Chance that the next one is right as well."""

MOST_INDEXED = 8192
"""Tokens of a text that are looked at, from its end."""

LEAST_CHANCE = 0.1
"""A guess ends where all of it comes true less often."""


@dataclass(frozen=True, slots=True)
class Guess:
    """What may follow.

    Attributes:
        token_ids: At least one.
        confidences: Of each, if those before it are right.
    """

    token_ids: list[int]
    confidences: list[float]

    @property
    def expected(self) -> float:
        """Tokens of it that will be right, on average."""
        return expected_run(self.confidences)


def expected_run(confidences: Ids[float]) -> float:
    """Mean length of the right tokens that a draft begins with, by its confidences."""
    reached, total = 1.0, 0.0
    for confidence in confidences:
        reached *= confidence
        total += reached
    return total


class _Rate:
    """How often something came true."""

    def __init__(self, prior: float) -> None:
        self._hits, self._tries = prior * PRIOR_TRIES, PRIOR_TRIES

    @property
    def chance(self) -> float:
        return self._hits / self._tries

    def learn(self, is_hit: bool) -> None:
        self._hits += is_hit
        self._tries += 1


class Lookup:
    """Follows one text."""

    def __init__(self) -> None:
        self._text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # an n-gram -> place behind its latest one
        self._num_known = 0
        self._first = {length: _Rate(chance) for length, chance in PRIOR_CHANCES.items()}
        self._next = _Rate(PRIOR_NEXT)
        self._open: tuple[int, int, list[int]] | None = None  # place, tokens matched, guessed ids

    def guess(self, prompt_ids: Ids[int], new_ids: Ids[int], *, most: int) -> Guess | None:
        """What may follow a text, which has only grown since the last call.

        Args:
            prompt_ids, new_ids: All tokens so far.
            most: Tokens that a guess may have.

        Returns:
            None where its end stood nowhere before, or nothing is likely enough.
        """
        text = self._text
        if not text:
            text += prompt_ids
        text += new_ids[len(text) - len(prompt_ids) :]
        self._settle(text)
        self._index(text)
        found = self._find(text)
        if found is None or most < 1:
            return None
        place, matched = found
        ids: list[int] = []
        while len(ids) < most:  # a text that repeats itself is taken to go on doing so
            ids.append(text[place] if place < len(text) else ids[place - len(text)])
            place += 1
        self._open = len(text), matched, ids
        chances = [self._first[matched].chance] + [self._next.chance] * (most - 1)
        reached, num_kept = 1.0, 0
        for chance in chances:
            reached *= chance
            if reached < LEAST_CHANCE:
                break
            num_kept += 1
        return Guess(ids[:num_kept], chances[:num_kept]) if num_kept else None

    def _settle(self, text: Ids[int]) -> None:
        """Learn from the latest guess, as far as the text has gone on."""
        if self._open is None:
            return
        start, matched, ids = self._open
        self._open = None
        for i, (guessed, true) in enumerate(zip(ids, text[start:], strict=False)):
            rate = self._next if i else self._first[matched]
            rate.learn(guessed == true)
            if guessed != true:
                return

    def _index(self, text: Ids[int]) -> None:
        """Note every n-gram that another token follows by now."""
        for place in range(max(self._num_known, len(text) - MOST_INDEXED, 1), len(text)):
            for length in LENGTHS:
                if place >= length:
                    self._after[tuple(text[place - length : place])] = place
        self._num_known = len(text)

    def _find(self, text: Ids[int]) -> tuple[int, int] | None:
        """Place behind an earlier occurrence of the longest end of the text that has one, and how
        many tokens that end has."""
        for length in LENGTHS:
            place = self._after.get(tuple(text[len(text) - length :]))
            if len(text) >= length and place is not None:
                return place, length
        return None
