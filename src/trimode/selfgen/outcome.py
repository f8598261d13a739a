"""What became of one index: a conversation that is kept, or why there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimode.errors import ConfigError

Record = dict[str, Any]

ABOUT_PROMPTS = (
    *("prompt_empty", "prompt_not_ended", "prompt_too_long", "prompt_special_token"),
    *("prompt_failed", "prompt_refused", "duplicate", "near_duplicate"),
)
"""Reasons found before an answer is begun. Later prompts are not compared with these."""

ABOUT_ANSWERS = (
    *("answer_empty", "answer_cut", "answer_loop", "answer_special_token", "answer_failed"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The outcome of one index.

    Attributes:
        index: Which, from 0.
        reason: Why it is dropped, one of `ABOUT_PROMPTS` or `ABOUT_ANSWERS`; None if it is kept.
        record: Its line: a conversation with its tokens, or what is left of it.
        num_answer_tokens: Tokens of the answer, dropped ones included.
    """

    index: int
    reason: str | None
    record: Record
    num_answer_tokens: int = 0

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Outcome:
        """From a line that was written before.

        Raises:
            ConfigError: It is no such line.
        """
        index, reason = record.get("index"), record.get("reason")
        answer_ids = record.get("answer_ids", [])
        is_known = reason is None or reason in (*ABOUT_PROMPTS, *ABOUT_ANSWERS)
        has_messages = isinstance(record.get("messages"), list)
        if not isinstance(index, int) or not is_known or not has_messages:
            raise ConfigError("not a line that this command wrote")
        return cls(
            index=index, reason=reason, record=dict(record), num_answer_tokens=len(answer_ids)
        )


@dataclass(slots=True)
class Tally:
    """Counts of outcomes, a function of the outcomes alone.

    Attributes:
        num_indexes: Outcomes so far.
        num_kept: Of them kept.
        dropped: Reason -> how many.
        num_cut: Kept ones whose answer was cut at the limit.
        num_held_out: Kept ones of the held-out split.
        num_answer_tokens: Of the kept ones.
        by_temperature: Temperature of the answer -> what became of how many answers.
    """

    num_indexes: int = 0
    num_kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    num_cut: int = 0
    num_held_out: int = 0
    num_answer_tokens: int = 0
    by_temperature: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Count one more."""
        record, reason = outcome.record, outcome.reason
        self.num_indexes += 1
        if reason is None:
            self.num_kept += 1
            self.num_cut += record["finish"] == "length"
            self.num_held_out += record["split"] == "held_out"
            self.num_answer_tokens += outcome.num_answer_tokens
        else:
            self.dropped[reason] += 1
        if reason not in ABOUT_PROMPTS:
            what = record["finish"] if reason is None else reason
            self.by_temperature.setdefault(f"{record['temperature']:g}", Counter())[what] += 1

    def as_record(self) -> Record:
        """For JSON, in one order whatever came first."""
        return {
            "indexes": self.num_indexes,
            "kept": self.num_kept,
            "dropped": dict(sorted(self.dropped.items())),
            "kept_cut": self.num_cut,
            "held_out": self.num_held_out,
            "answer_tokens": self.num_answer_tokens,
            "by_temperature": {
                temperature: dict(sorted(counts.items()))
                for temperature, counts in sorted(self.by_temperature.items())
            },
        }

    def line(self) -> str:
        """For people: kept, dropped and why."""
        reasons = ", ".join(f"{name} {count}" for name, count in self.dropped.most_common())
        dropped = f"dropped {self.dropped.total()}" + (f" ({reasons})" if reasons else "")
        return (
            f"kept {self.num_kept} of {self.num_indexes} conversations ({self.num_cut} cut at the"
            f" limit, {self.num_held_out} held out), {self.num_answer_tokens} answer tokens;"
            f" {dropped}"
        )
