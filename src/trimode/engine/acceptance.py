"""How well drafts do: learned of all requests together, and of each by one number of its own.

That a drafted position holds, if those before it do, has the log-odds b_j + s: b_j is shared by all
requests and takes s for 0, s is how much easier than others this one's text is to draft at present.
Both take a small step towards what was seen after every round. One number is learned within a few
rounds and tells of positions that were never drafted; what differs by position is the model's, and
shared. Estimates are optimistic about positions rarely seen, so that bad luck early on does not
exclude them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import mul
from typing import Any

from trimode.decoding.setting import Round, Setting
from trimode.model.adapter import PUBLISHED_FORM, AdapterForm

HOPE = 1.5
"""Added to shared log-odds, over the root of how often they were seen: 0.82 at first."""

FRESH_PRIOR, EARLY_PRIOR = 16, 4
"""Rounds that an adapter's own figures are worth, of drafts as they were measured and of others."""

LEAST_KNOWN = 4
"""Rounds before which no request leaves `ar`, but for probes."""

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
        drafting: Share of its forwards that draft.
    """

    tokens: float
    fed: float
    drafting: float = 0.0


AR_PACE = Pace(1.0, 1.0)


class _Shared:
    """Log-odds by position, learned together.

    Args:
        chances: Known before, by position; may be empty.
        num_seen: Rounds that these are worth.
    """

    def __init__(self, chances: Items[float] = (), *, num_seen: int = 0) -> None:
        self._odds = [*map(_odds, chances)] or [0.0]
        self._num_seen = [num_seen if chances else 0] * len(self._odds)

    @property
    def num_seen(self) -> int:
        """Rounds that the first position was seen in."""
        return self._num_seen[0]

    def at(self, index: int) -> float:
        """A position that never was reached is taken to be as the last that was."""
        return self._odds[min(index, len(self._odds) - 1)]

    def hoped(self, index: int) -> float:
        """The same, the higher the less is known."""
        return self.at(index) + HOPE / math.sqrt(
            1 + self._num_seen[min(index, len(self._odds) - 1)]
        )

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

    def fade(self, num_rounds: int) -> None:
        """So many rounds have passed."""
        self.value *= FADING**num_rounds

    def learn(self, error: float) -> None:
        self.num_rounds += 1
        rate = max(OWN_RATE, FIRST_OWN_RATE / (1 + self.num_rounds / 4))
        self.value = min(max(self.value + rate * error, -MOST_SHIFT), MOST_SHIFT)


@dataclass(slots=True)
class Acceptance:
    """What is known of drafts.

    One that had a forward of its own (fresh) is better than one made behind a verify forward
    (early), before the token that it follows was known; how much, depends on which outcomes have
    groups, so early ones are known by the setting that made them. Fresh ones are known by whether
    their masks skip the bonus. Both begin with what the adapter says of itself.

    Attributes:
        form: Of the adapter that drafts.
    """

    form: AdapterForm = PUBLISHED_FORM
    _fresh: dict[bool, _Shared] = field(default_factory=dict)
    _early: dict[Setting, _Shared] = field(default_factory=dict)
    _hits: defaultdict[Setting, _Shared] = field(default_factory=lambda: defaultdict(_Shared))

    def learn(self, shift: Shift, happened: Round) -> None:
        """Take in a round of speculation.

        Where a draft was cut and all that was checked is right, the next position counts as right
        by the draft's own confidence in it.

        Args:
            shift: Of the request, changed in place.
            happened: The round.
        """
        setting = happened.setting
        if happened.is_looked_up or not (happened.is_fresh or setting.num_groups):
            return  # not the drafter's, or a draft left over from another setting
        is_short = happened.num_checked < setting.draft_len
        seen = [1.0] * happened.num_accepted
        if happened.num_accepted < happened.num_checked:
            seen.append(0.0)
        elif happened.unfed_confidence is not None:
            seen.append(happened.unfed_confidence)
        shared = self._fresh_of(setting) if happened.is_fresh else self._early_of(setting)
        total = 0.0
        for j, holds in enumerate(seen):
            total += holds - _chance(shared.at(j) + shift.value)
            shared.learn(j, holds - _chance(shared.at(j)))
        if seen:
            shift.learn(total)
        if setting.num_groups and (happened.is_cut or not is_short):
            better = self._hits[setting]
            chance = _chance(self._ranked_hit(setting, shift.value) + better.at(0))
            better.learn(0, happened.has_next - chance)

    def fresh(self, setting: Setting, shift: float) -> list[float]:
        """Chances that 0, 1, ... positions in a row hold of a draft with a forward of its own."""
        shared = self._fresh_of(setting)
        return _reached(shared.hoped(j) + shift for j in range(setting.draft_len))

    def early(self, setting: Setting, shift: float) -> list[float]:
        """The same of a draft made behind a verify forward."""
        shared = self._early_of(setting)
        return _reached(shared.hoped(j) + shift for j in range(setting.draft_len))

    def _fresh_of(self, setting: Setting) -> _Shared:
        return self._of(self._fresh, _skips(setting), setting, FRESH_PRIOR)

    def _early_of(self, setting: Setting) -> _Shared:
        return self._of(self._early, setting, setting, EARLY_PRIOR)

    def _of(self, known: dict[Any, _Shared], key: Any, setting: Setting, worth: int) -> _Shared:
        if key not in known:
            chances = self.form.acceptance_of("skip" if _skips(setting) else "block")
            known[key] = _Shared(chances, num_seen=worth)
        return known[key]

    def is_known(self, setting: Setting) -> bool:
        """Whether anything is known of fresh drafts in the form of a setting, from rounds or from
        the adapter; else there is nothing but hope."""
        return self._fresh_of(setting).num_seen >= LEAST_KNOWN

    def hit(self, setting: Setting, shift: float) -> float:
        """Chance that a verify forward makes the next draft as well."""
        return _chance(self._ranked_hit(setting, shift) + self._hits[setting].at(0))

    def _ranked_hit(self, setting: Setting, shift: float) -> float:
        """Log-odds that a round ends in one of the lengths that are likeliest on average; a draft's
        own confidences know more, by how much is learned."""
        if setting.num_groups > setting.draft_len:
            return _odds(1.0)
        reached = [*self.early(setting, shift), 0.0]
        ends = sorted((a - b for a, b in pairwise(reached)), reverse=True)
        return _odds(sum(ends[: setting.num_groups]))


class Outlook:
    """What one request may expect of settings.

    Args:
        known: Of drafts.
        shift: The request's s.
        widest: A setting with the longest drafts it will be asked about, in the form of all.
    """

    def __init__(self, known: Acceptance, shift: float, widest: Setting) -> None:
        self._known = known
        self._shift = shift
        self._fresh_tokens = list(accumulate(known.fresh(widest, shift)))

    def pace(self, setting: Setting) -> Pace:
        """Of a request that goes on so.

        A round of linear is two forwards. A round of branching is one, and one more where no group
        foresaw how the round before it ended. Where masks skip the bonus, the forward that drafts
        gives a token too.
        """
        if setting.mode == "ar":
            return AR_PACE
        length = 1 + setting.draft_len
        fresh = self._fresh_tokens[setting.draft_len] + _skips(setting)
        if not setting.num_groups:
            return Pace(fresh / 2, length, 0.5)
        hit = self._known.hit(setting, self._shift)
        tokens = hit * sum(self._known.early(setting, self._shift)) + (1 - hit) * fresh
        fed = setting.num_fed + (1 - hit) * length
        return Pace(tokens / (2 - hit), fed / (2 - hit), 1.0)


def _skips(setting: Setting) -> bool:
    return setting.num_masks is not None


def _reached(odds: Iterable[float]) -> list[float]:
    """Chances that 0, 1, 2, ... drafted positions in a row hold."""
    return list(accumulate(map(_chance, odds), mul, initial=1.0))


def _chance(odds: float) -> float:
    return 1 / (1 + math.exp(-odds))


def _odds(chance: float) -> float:
    chance = min(max(chance, 0.02), 0.98)
    return math.log(chance / (1 - chance))
