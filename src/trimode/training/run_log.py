"""`log.jsonl` of a run: one record a line, and an interrupted run's reads as one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

Log = Callable[[dict[str, Any]], None]


class RunLog:
    """Appends records; rank 0's alone.

    Args:
        output_dir: Of the run.
        also: Called with every record as well.
    """

    def __init__(self, output_dir: Path, *, also: Log | None) -> None:
        self._path = output_dir / "log.jsonl"
        self._also = also

    def trim(self, step: int, *, is_last: bool) -> None:
        """Drop what was logged after the step that the run goes on from; it will be once more.

        Args:
            step: Where it goes on from.
            is_last: Whether that is the last one, whose evaluation is repeated.
        """
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a line that a kill cut short
                record = json.loads(line)
                is_repeated = is_last and record["kind"] == "held_out"
                if record["step"] < step + (not is_repeated):
                    kept.append(line + "\n")
        temporary = self._path.with_name(f".{self._path.name}")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self._path)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._also is not None:
            self._also(record)
