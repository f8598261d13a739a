"""Who goes next: among those that wait for a row, and among those that want to be fed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass

from trimode.decoding import Sequence

PREFILL_SHARE = 4
"""While prompts are fed, they have at least this part (1/4) of the token budget."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A sequence without a row.

    Attributes:
        seq: Which.
        client: Whose it is.
        submitted_s: When it came.
        deadline_s: When it is to be aborted; None for never. Both by the engine's clock.
    """

    seq: Sequence
    client: str
    submitted_s: float
    deadline_s: float | None


class WaitingList:
    """Sequences without a row. Clients share the rows evenly; those of one client go in order."""

    def __init__(self) -> None:
        self._entries: list[Waiting] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._entries)

    def add(self, entry: Waiting) -> None:
        """At the end."""
        self._entries.append(entry)

    def next(self, running: Iterable[str]) -> Waiting:
        """The first of the client with the fewest rows; it stays in the list.

        Args:
            running: The client of each row that is taken.
        """
        num_rows = Counter(running)
        return min(self._entries, key=lambda entry: num_rows[entry.client])

    def has_one_for(self, client: str, running: Iterable[str]) -> bool:
        """Whether a row that `client` gives back goes to one that waits, rather than to a next one
        of its own client that comes after that."""
        num_rows = Counter(running)
        return any(num_rows[entry.client] <= num_rows[client] for entry in self._entries)

    def remove(self, seq: Sequence) -> Waiting | None:
        """Take one out; None if it is not there."""
        found = next((entry for entry in self._entries if entry.seq is seq), None)
        if found is not None:
            self._entries.remove(found)
        return found


@dataclass(frozen=True, slots=True)
class Demand:
    """What a sequence wants of the next forward.

    Attributes:
        num_tokens: It would feed.
        is_prefill: Whether fewer will do.
        fed_at: The forward in which it was fed last.
    """

    num_tokens: int
    is_prefill: bool
    fed_at: int


def share(demands: Items[Demand], budget: int | None) -> list[int]:
    """How many tokens of each demand go into the next forward.

    What is not a prefill goes whole or not at all, those that waited longest first; the first of
    them goes however large it is. Prefills have what is left, a quarter of the budget at least, the
    shortest ones whole and the others in equal parts. So nothing ever waits for good.

    Args:
        demands: At least one token each.
        budget: Tokens of a forward, at least 4 for each demand; None for no limit.

    Returns:
        One number for each demand; 0 leaves it for later.
    """
    if budget is None:
        return [demand.num_tokens for demand in demands]
    granted = [0] * len(demands)
    prefills = [i for i, demand in enumerate(demands) if demand.is_prefill]
    others = [i for i, demand in enumerate(demands) if not demand.is_prefill]
    reserved = min(budget // PREFILL_SHARE, sum(demands[i].num_tokens for i in prefills))
    left = budget - reserved
    others.sort(key=lambda i: demands[i].fed_at)
    for i in others:
        if demands[i].num_tokens > left and i != others[0]:
            break  # no smaller one overtakes it, or it might wait for good
        granted[i] = demands[i].num_tokens
        left -= granted[i]
    left = max(left, 0) + reserved
    num_left = len(prefills)
    for i in sorted(prefills, key=lambda i: (demands[i].num_tokens, demands[i].fed_at)):
        granted[i] = min(demands[i].num_tokens, left // num_left)
        left -= granted[i]
        num_left -= 1
    return granted
