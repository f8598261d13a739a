"""How well drafts do: learned of all requests together, and of each by one number of its own.

That a drafted position holds, if those before it do, has the log-odds b_j + s: b_j is shared by all
requests and takes s for 0, s is how much easier than others this one's text is to draft at present.
Both take a small step towards what was seen after every round. One number is learned within a few rounds and tells of
positions that were never drafted; what differs by position is the model's, and shared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

from trimode.decoding.setting import Round, Setting

HOPEFUL = 1.5
"""Log-odds of a position of which nothing is known: 0.82, so that it is tried."""

SHARED_RATE = 0.02
OWN_RATE = 0.06
FIRST_OWN_RATE = 0.3
MOST_SHIFT = 5.0
FADING = 0.995
"""What is left of s after a round, so that it does not outlive what it was learned from."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What a sequence does in a forward, on average.

    Attributes:
        tokens: It emits.
        fed: Tokens it feeds.
    """

    tokens: float
    fed: float


AR_PACE = Pace(1.0, 1.0)


class _Shared:
    """Log-odds learned together: by position, or of one kind of event."""

    def __init__(self, start: float) -> None:
        self._odds = [start]
        self._num_seen = [0]

    def at(self, index: int) -> float:
        """A position that never was reached is taken to be as the last that was."""
        return self._odds[min(index, len(self._odds) - 1)]

    def learn(self, index: int, error: float) -> None:
        while index >= len(self._odds):
            self._odds.append(self._odds[-1])
            self._num_seen.append(0)
        self._num_seen[index] += 1
        self._odds[index] += max(SHARED_RATE, 4 / (4 + self._num_seen[index])) * error


@dataclass(slots=True)
class Shift:
    """How much easier than others a request's text is to draft at present.

    Attributes:
        value: s, in log-odds.
        num_rounds: It was learned from.
    """

    value: float = 0.0
    num_rounds: int = 0

    def fade(self) -> None:
        """A round has passed."""
        self.value *= FADING

    def learn(self, error: float) -> None:
        self.num_rounds += 1
        rate = max(OWN_RATE, FIRST_OWN_RATE / (1 + self.num_rounds / 4))
        self.value = min(max(self.value + rate * error, -MOST_SHIFT), MOST_SHIFT)


@dataclass(slots=True)
class Acceptance:
    """What is known of drafts.

    A draft that had a forward of its own is better than one made behind a verify forward, before
    the token that it follows was known; so they are kept apart.
    """

    _fresh: _Shared = field(default_factory=lambda: _Shared(HOPEFUL))
    _early: _Shared = field(default_factory=lambda: _Shared(HOPEFUL))
    _hits: dict[tuple[int, int], _Shared] = field(default_factory=dict)

    def learn(self, shift: Shift, happened: Round, *, is_cut: bool) -> None:
        """Take in a round of speculation.

        Args:
            shift: Of the request, changed in place.
            happened: The round.
            is_cut: Whether drafts end before their first unsure token: where all of one was
                accepted, the next position counts as wrong.
        """
        setting = happened.setting
        if happened.num_checked or is_cut:
            num_seen = happened.num_accepted + (
                happened.num_accepted < happened.num_checked
                or (is_cut and happened.num_checked < setting.block_length - 1)
            )
            shared = self._fresh if happened.is_fresh else self._early
            total = 0.0
            for j in range(num_seen):
                holds = j < happened.num_accepted
                total += holds - _chance(shared.at(j) + shift.value)
                shared.learn(j, holds - _chance(shared.at(j)))
            shift.learn(total)
        if setting.num_groups and happened.num_checked == setting.block_length - 1:
            kind = setting.block_length, setting.num_groups
            ranked = Outlook(self, shift.value, setting.block_length).ranked_hit(setting)
            better = self._hits.setdefault(kind, _Shared(0.0))
            better.learn(0, happened.has_next - _chance(ranked + better.at(0)))

    def early(self, j: int) -> float:
        return self._early.at(j)

    def fresh(self, j: int) -> float:
        return self._fresh.at(j)

    def hit(self, setting: Setting) -> float:
        """By how much groups hit more often than the averages alone would have it, in log-odds."""
        known = self._hits.get((setting.block_length, setting.num_groups))
        return 0.0 if known is None else known.at(0)


class Outlook:
    """What one request may expect of settings.

    Args:
        known: Of drafts.
        shift: The request's s.
        most: The longest block length it will be asked about.
    """

    def __init__(self, known: Acceptance, shift: float, most: int) -> None:
        self._known = known
        self._fresh = _reached(known.fresh(j) + shift for j in range(most - 1))
        self._early = _reached(known.early(j) + shift for j in range(most - 1))
        self._fresh_tokens = list(accumulate(self._fresh))
        self._early_tokens = list(accumulate(self._early))

    def pace(self, setting: Setting) -> Pace:
        """Of a request that goes on so.

        A round of linear is two forwards. A round of branching is one, and one more where no group
        foresaw how the round before it ended.
        """
        if setting.mode == "ar":
            return AR_PACE
        length = setting.block_length
        if not setting.num_groups:
            return Pace(self._fresh_tokens[length - 1] / 2, length)
        hit = _chance(self.ranked_hit(setting) + self._known.hit(setting))
        tokens = hit * self._early_tokens[length - 1] + (1 - hit) * self._fresh_tokens[length - 1]
        fed = length * (1 + setting.num_groups + 1 - hit)
        return Pace(tokens / (2 - hit), fed / (2 - hit))

    def ranked_hit(self, setting: Setting) -> float:
        """Log-odds that a round ends in one of the lengths that are likeliest on average."""
        length = setting.block_length
        if setting.num_groups >= length:
            return _odds(1.0)
        reached = [*self._early[:length], 0.0]
        ends = sorted((a - b for a, b in zip(reached, reached[1:], strict=False)), reverse=True)
        return _odds(sum(ends[: setting.num_groups]))


def _reached(odds: Iterable[float]) -> list[float]:
    """Chances that 0, 1, 2, ... drafted positions in a row hold."""
    return list(accumulate(map(_chance, odds), mul, initial=1.0))


def _chance(odds: float) -> float:
    return 1 / (1 + math.exp(-odds))


def _odds(chance: float) -> float:
    chance = min(max(chance, 0.02), 0.98)
    return math.log(chance / (1 - chance))
