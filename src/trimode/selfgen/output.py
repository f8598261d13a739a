"""The files of a run: conversations, what was dropped, and counts with the run's arguments.

    out.jsonl               the conversations, in the order of their index
    out.jsonl.dropped.jsonl what was dropped and why, likewise
    out.jsonl.counts.json   the arguments, the counts, and whether the run is finished

Every index is a line of one of the first two, so a run that was killed goes on behind the last one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from trimode.errors import ConfigError
from trimode.selfgen.outcome import Outcome, Tally


class Output:
    """The files of one run, locked while they are open.

    Args:
        path: Of the conversations. Its folder is made.
        arguments: What the text depends on, as JSON has it; a run goes on only with the same.
        is_overwritten: Whether files of a run with other arguments give way.

    Attributes:
        path: As given.
        before: Outcomes that are there, index 0 first.

    Raises:
        ConfigError: Another run is writing there, or files are there that this run did not write.
    """

    def __init__(
        self, path: Path, arguments: Mapping[str, Any], *, is_overwritten: bool = False
    ) -> None:
        self.path = path
        self.dropped_path = path.with_name(f"{path.name}.dropped.jsonl")
        self.counts_path = path.with_name(f"{path.name}.counts.json")
        self._arguments = json.loads(json.dumps(arguments))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files: dict[bool, IO[bytes]] = {}
            is_new = not path.exists()
            self._files[True] = path.open("a+b")
            self._lock()
            if is_overwritten:
                self.counts_path.unlink(missing_ok=True)
            elif not is_new or self.counts_path.exists():
                self._check_arguments()
            self._files[False] = self.dropped_path.open("a+b")
            if is_overwritten or is_new:
                self._cut({True: 0, False: 0})
        except OSError as error:
            self.close()
            raise ConfigError(f"output: {path} cannot be written ({error.strerror})") from error
        except ConfigError:
            self.close()
            raise
        self.before = self._read()

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            file.close()

    def write(self, outcomes: Iterable[Outcome]) -> None:
        """Add lines; they survive the process, whatever happens to it."""
        for outcome in outcomes:
            line = json.dumps(outcome.record, ensure_ascii=False, separators=(",", ":"))
            file = self._files[outcome.reason is None]
            file.write(line.encode() + b"\n")
            file.flush()

    def write_counts(self, tally: Tally, *, is_finished: bool) -> None:
        """Put the arguments and the counts beside the conversations."""
        record = {
            "arguments": self._arguments,
            "is_finished": is_finished,
            "counts": tally.as_record(),
        }
        partial = self.counts_path.with_name(f".{self.counts_path.name}.partial")
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(partial, self.counts_path)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._files[True], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"output: another run is writing {self.path}") from None

    def _check_arguments(self) -> None:
        advice = "; give another --output, or --overwrite"
        try:
            there = json.loads(self.counts_path.read_text("utf-8"))["arguments"]
        except FileNotFoundError:
            if not self.path.stat().st_size:
                return
            raise ConfigError(
                f"output: {self.path} is there and no counts beside it{advice}"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"output: {self.counts_path} is not a file of this command{advice}"
            ) from None
        wanted = self._arguments
        changed = sorted(n for n in {*there, *wanted} if there.get(n) != wanted.get(n))
        if changed:
            what = ", ".join(f"{n} {there.get(n)!r}, not {wanted.get(n)!r}" for n in changed)
            raise ConfigError(f"output: {self.path} was written with {what}{advice}")

    def _read(self) -> list[Outcome]:
        """The outcomes of both files up to the first index that is missing; the rest is cut off."""
        found: dict[int, tuple[Outcome, bool, int]] = {}
        for is_kept, file in self._files.items():
            file.seek(0)
            end = 0
            for line in file:
                end += len(line)
                if line.endswith(b"\n"):  # else its writer was killed
                    outcome = self._outcome(line, is_kept=is_kept)
                    found[outcome.index] = outcome, is_kept, end
        ends = {True: 0, False: 0}
        outcomes: list[Outcome] = []
        while len(outcomes) in found:
            outcome, is_kept, ends[is_kept] = found[len(outcomes)]
            outcomes.append(outcome)
        self._cut(ends)
        return outcomes

    def _outcome(self, line: bytes, *, is_kept: bool) -> Outcome:
        path = self.path if is_kept else self.dropped_path
        try:
            return Outcome.read(json.loads(line), is_kept=is_kept)
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"output: {path} is damaged ({error}); --overwrite it") from error

    def _cut(self, ends: Mapping[bool, int]) -> None:
        for is_kept, file in self._files.items():
            file.truncate(ends[is_kept])
            file.seek(0, os.SEEK_END)
