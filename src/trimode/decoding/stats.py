"""Counts of one request. A 32-token forward is not a 1-token forward, so tokens fed are kept
too."""

from __future__ import annotations

from dataclasses import dataclass, field

from trimode.decoding.step import FORWARD_KINDS


@dataclass(slots=True)
class Stats:
    """What one sequence cost.

    Attributes:
        forwards: Model calls by kind (`FORWARD_KINDS`).
        tokens_fed: Tokens this sequence fed, by the same kinds.
        new_tokens: Tokens emitted, from the prompt's end on.
        acceptance_lengths: Per round of speculation, accepted drafts plus the bonus token. A round
            that opens with masks that skip the bonus has two such tokens, one from each forward.
        reused_tokens: Tokens whose K/V lay in a row already, so that they were not fed.
        cached_tokens: Those of the prompt among them, when it was first fed.
        num_preemptions: Times it gave its row to another and went on later.
        seconds: Wall time from submission to the end, other sequences' work included.
    """

    forwards: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FORWARD_KINDS, 0))
    tokens_fed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FORWARD_KINDS, 0))
    new_tokens: int = 0
    acceptance_lengths: list[int] = field(default_factory=list)
    reused_tokens: int = 0
    cached_tokens: int = 0
    num_preemptions: int = 0
    seconds: float = 0.0

    def count(self, kind: str, num_tokens: int) -> None:
        """Note one forward of `kind` in which this sequence fed `num_tokens`."""
        self.forwards[kind] += 1
        self.tokens_fed[kind] += num_tokens

    @property
    def num_forwards(self) -> int:
        """All model calls, prefill included."""
        return sum(self.forwards.values())

    @property
    def tpf_decode(self) -> float | None:
        """(new tokens - the one the prefill gives) / forwards other than prefill; None without
        any."""
        num_decode = self.num_forwards - self.forwards["prefill"]
        return (self.new_tokens - 1) / num_decode if num_decode else None

    @property
    def tpf_total(self) -> float:
        """New tokens / all forwards."""
        return self.new_tokens / max(self.num_forwards, 1)

    @property
    def tokens_per_second(self) -> float:
        """New tokens / seconds."""
        return self.new_tokens / self.seconds if self.seconds else 0.0
