"""A gap to fill and what was found for it. Data only; the algorithm is in `infilling`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimode.decoding.bits import Bits

VIEW_LEN = 64
"""Tokens of a canvas: the windows that the recipes in configs/ train with (`infill_window`)."""

NUM_JUDGED = 32
"""Tokens behind the gap that the AR view judges together with the fill."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to fill a gap.

    Attributes:
        token_ids: The fill.
        fill_log_prob: Of the fill after the prefix, under the AR view at temperature 1, in nats.
        suffix_log_prob: Of the next `NUM_JUDGED` tokens behind the gap after both, masks left out.
    """

    token_ids: tuple[int, ...]
    fill_log_prob: float
    suffix_log_prob: float

    @property
    def log_prob(self) -> float:
        """Of fill and text behind it together: what candidates of all lengths are ranked by."""
        return self.fill_log_prob + self.suffix_log_prob


@dataclass(frozen=True, slots=True, eq=False)
class Edges:
    """What a fill may be: its ends, where the text around it begins or ends inside of a token.

    Attributes:
        first: Tokens for the first place of a fill; None for all.
        last: For the last one, if that is another.
        inner: For those between.
    """

    first: Bits | None = None
    last: Bits | None = None
    inner: Bits | None = None

    def at(self, index: int, length: int) -> Bits | None:
        """For a place of a fill, counted from 0."""
        if index == 0:
            return self.first
        return self.last if index == length - 1 else self.inner


@dataclass(slots=True)
class Gap:
    """What a sequence is to fill instead of continuing its prompt.

    Attributes:
        suffix_ids: Text behind the gap, up to the next one; may be empty.
        lengths: Numbers of tokens to try.
        edges: What a fill's ends may be.
        candidates: Found in the end, the best first.
    """

    suffix_ids: tuple[int, ...]
    lengths: tuple[int, ...]
    edges: Edges = Edges()
    candidates: list[Candidate] = field(default_factory=list)

    def suffix_in_view(self, length: int) -> tuple[int, ...]:
        """The text behind the gap that a canvas of this length holds."""
        return self.suffix_ids[: max(VIEW_LEN - 1 - length, NUM_JUDGED)]

    @property
    def num_fed(self) -> int:
        """Tokens of the largest forward, in which every length has a canvas."""
        return sum(1 + length + len(self.suffix_in_view(length)) for length in self.lengths)
