"""Corrupt records: counted, named, skipped; and when there are too many of them to go on."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any

from trimode.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_CORRUPT_SHARE = 0.01
MIN_RECORDS = 100
"""Before so many records were seen, a share means nothing yet; at the end of a source it counts."""
_NUM_NAMED = 5


class CorruptRecordError(ValueError):
    """What is wrong with one record, without its place. It never leaves the sources."""


@dataclass(slots=True)
class RecordTally:
    """The records of one source so far.

    Attributes:
        source: Kind and path, as in `jsonl data/a.jsonl`.
        num_records: Records seen, corrupt ones included.
        num_corrupt: Corrupt ones.
        first: Place and problem of the first few.
    """

    source: str
    num_records: int = 0
    num_corrupt: int = 0
    first: list[str] = field(default_factory=list)

    def add_good(self) -> None:
        """Counts a record that can be read."""
        self.num_records += 1

    def add_corrupt(self, problem: str) -> None:
        """Counts a record that cannot, names it in the log if it is among the first.

        Raises:
            ConfigError: They have become too many.
        """
        self.num_records += 1
        self.num_corrupt += 1
        if self.num_corrupt <= _NUM_NAMED:
            self.first.append(problem)
            more = ", further ones are only counted" if self.num_corrupt == _NUM_NAMED else ""
            logger.warning("skipped a corrupt record: %s%s", problem, more)
        if self.num_records >= MIN_RECORDS:
            self.check()

    def check(self) -> None:
        """Raises ConfigError if more than `MAX_CORRUPT_SHARE` of the records are corrupt."""
        if self.num_corrupt > MAX_CORRUPT_SHARE * self.num_records:
            raise ConfigError(
                f"{self.source}: {self.num_corrupt} of {self.num_records} records are corrupt, "
                f"more than {MAX_CORRUPT_SHARE:.0%}; the first: {self.first[0]}"
            )

    def to_fields(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return asdict(self)
