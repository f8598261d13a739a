"""The files of a run: conversations, what was dropped, and counts with the run's arguments.

    out.jsonl               the conversations, in the order of their index
    out.jsonl.dropped.jsonl what was dropped and why, likewise
    out.jsonl.early.jsonl   while a run goes on: what waits for an earlier index
    out.jsonl.counts.json   the arguments, the counts, and whether the run is finished

Every index is a line of one of the first two, so a run that was killed goes on behind the last one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
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
        early: Outcomes behind an index that is missing.

    Raises:
        ConfigError: Another run is writing there, or files are there that this run did not write.
    """

    def __init__(
        self, path: Path, arguments: Mapping[str, Any], *, is_overwritten: bool = False
    ) -> None:
        self.path = path
        self.dropped_path = path.with_name(f"{path.name}.dropped.jsonl")
        self.early_path = path.with_name(f"{path.name}.early.jsonl")
        self.counts_path = path.with_name(f"{path.name}.counts.json")
        self._arguments = json.loads(json.dumps(arguments))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files: dict[str, IO[bytes]] = {}
            is_new = not path.exists()
            self._files["kept"] = path.open("a+b")
            self._lock()
            if is_overwritten:
                self.counts_path.unlink(missing_ok=True)
            elif not is_new or self.counts_path.exists():
                self._check_arguments()
            self._files["dropped"] = self.dropped_path.open("a+b")
            self._files["early"] = self.early_path.open("a+b")
            if is_overwritten or is_new:
                self._cut({})
            self.before, self.early = self._read()
        except OSError as error:
            self.close()
            raise ConfigError(f"output: {path} cannot be written ({error.strerror})") from error
        except ConfigError:
            self.close()
            raise

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
        """Let go of the files; remove the early one if it is empty."""
        if "early" in self._files and not self.early_path.stat().st_size:
            self.early_path.unlink()
        for file in self._files.values():
            file.close()

    def write(self, outcomes: Iterable[Outcome]) -> None:
        """Add lines; they survive the process, whatever happens to it."""
        for outcome in outcomes:
            self._add("kept" if outcome.reason is None else "dropped", outcome)

    def write_early(self, outcomes: Iterable[Outcome]) -> None:
        """Keep outcomes that wait for an earlier index, for a run that goes on with this one."""
        for outcome in outcomes:
            self._add("early", outcome)

    def write_counts(self, tally: Tally, *, is_finished: bool) -> None:
        """Put the arguments and the counts beside the conversations; at the end nothing waits."""
        record = {
            "arguments": self._arguments,
            "is_finished": is_finished,
            "counts": tally.as_record(),
        }
        partial = self.counts_path.with_name(f".{self.counts_path.name}.partial")
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(partial, self.counts_path)
        if is_finished:
            self._files["early"].truncate(0)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._files["kept"], fcntl.LOCK_EX | fcntl.LOCK_NB)
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

    def _read(self) -> tuple[list[Outcome], list[Outcome]]:
        """Outcomes up to the first index that is missing, and those behind it; what a killed writer
        left is cut off."""
        found: dict[int, tuple[Outcome, str, int]] = {}
        for name in ("kept", "dropped"):
            for outcome, end in self._lines(name):
                found[outcome.index] = outcome, name, end
        ends: dict[str, int] = {}
        before: list[Outcome] = []
        while len(before) in found:
            outcome, name, ends[name] = found[len(before)]
            before.append(outcome)
        early = {one.index: one for one, _ in self._lines("early") if one.index >= len(before)}
        self._cut(ends)
        self.write_early(early.values())
        return before, list(early.values())

    def _lines(self, name: str) -> Iterator[tuple[Outcome, int]]:
        """Outcomes of one file, and where their line ends."""
        file, end = self._files[name], 0
        file.seek(0)
        for line in file:
            end += len(line)
            if not line.endswith(b"\n"):  # its writer was killed
                break
            try:
                yield Outcome.read(json.loads(line)), end
            except (ValueError, AttributeError) as error:
                raise ConfigError(
                    f"output: {file.name} is damaged ({error}); --overwrite it"
                ) from error

    def _add(self, name: str, outcome: Outcome) -> None:
        line = json.dumps(outcome.record, ensure_ascii=False, separators=(",", ":"))
        if any("\ud800" <= sign <= "\udfff" for sign in line):  # UTF-8 has no half a pair
            line = json.dumps(outcome.record, separators=(",", ":"))
        self._files[name].write(line.encode() + b"\n")
        self._files[name].flush()

    def _cut(self, ends: Mapping[str, int]) -> None:
        """Shorten the files; those not named lose everything."""
        for name, file in self._files.items():
            file.truncate(ends.get(name, 0))
            file.seek(0, os.SEEK_END)
