"""The documents read so far, on disk: their texts, one small entry each, and how far reading got.

All three files only ever grow, and `reading.json` says up to where they count. So a run that was
killed is gone on from by cutting them to that length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from trimode.training.documents import Package, Skipped
from trimode.training.near_duplicates import NUM_HASHES
from trimode.training.workspace import Workspace, flush

_PROGRESS = "reading.json"


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A document in the spool.

    Attributes:
        name: As in `documents.Document`.
        package: What the document belongs to.
        is_held_out: Whether it must never be trained on.
        offset: First byte in the spool.
        num_bytes: Length in the spool.
        sha256: Of the text.
        signature: [NUM_HASHES] uint64 from `near_duplicates.signature`, or None if not asked for.
    """

    name: str
    package: Package
    is_held_out: bool
    offset: int
    num_bytes: int
    sha256: str
    signature: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Position:
    """How far reading got.

    Attributes:
        source: Index of the source that is being read; beyond the last one if all are.
        num_items: Items of that source that were read.
        state: Of that source, see `sources.Source`.
    """

    source: int = 0
    num_items: int = 0
    state: dict[str, Any] | None = None


class Spool:
    """The texts of all documents in one file, read again as often as needed.

    Attributes:
        entries: Of all documents so far.
        position: Where reading goes on.
        skipped: What was left out so far.
    """

    def __init__(self, work: Workspace, *, with_signatures: bool) -> None:
        """Opens the spool, with what an earlier run has put on disk."""
        self._work = work
        self.entries: list[Entry] = []
        self.position = Position()
        self.skipped = Skipped()
        self._files: dict[str, IO[bytes]] = {}
        names = ["spool", "entries"] + (["signatures"] if with_signatures else [])
        progress = work.read(_PROGRESS) or {"lens": dict.fromkeys(names, 0)}
        try:
            for name in names:
                self._files[name] = _opened(work.folder / name, progress["lens"][name])
            if "position" in progress:
                self.position = Position(**progress["position"])
                self.skipped = Skipped.from_fields(progress["skipped"])
                self.entries = self._read_entries()
        except BaseException:
            self.close()
            raise

    def add(self, entry: Entry, raw: bytes) -> None:
        """Appends a document, whose `offset` must be `end`."""
        self.entries.append(entry)
        self._files["spool"].write(raw)
        record = [
            entry.name,
            list(asdict(entry.package).values()),
            entry.is_held_out,
            entry.num_bytes,
            entry.sha256,
        ]
        self._files["entries"].write(json.dumps(record).encode() + b"\n")
        if entry.signature is not None:
            self._files["signatures"].write(entry.signature.astype("<u8").tobytes())

    @property
    def end(self) -> int:
        """Offset of the next text."""
        return self.entries[-1].offset + self.entries[-1].num_bytes if self.entries else 0

    def keep(self, position: Position) -> None:
        """Puts all that was added on disk for good, and where reading goes on."""
        self.position = position
        for file in self._files.values():
            flush(file)
        self._work.write(
            _PROGRESS,
            {
                "lens": {name: file.tell() for name, file in self._files.items()},
                "position": asdict(position),
                "skipped": self.skipped.to_fields(),
            },
        )

    def texts(self, entries: Sequence[Entry], report: Callable[[int], None]) -> Iterator[str]:
        """Yields the texts of entries and reports how many were read so far."""
        file = self._files["spool"]
        for number, entry in enumerate(entries, start=1):
            file.seek(entry.offset)
            yield file.read(entry.num_bytes).decode()
            report(number)

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()

    def _read_entries(self) -> list[Entry]:
        """The entries on disk; leaves every file at its end."""
        entries: list[Entry] = []
        offset = 0
        self._files["entries"].seek(0)
        signatures: list[np.ndarray] | None = None
        if "signatures" in self._files:
            self._files["signatures"].seek(0)
            hashes = np.frombuffer(self._files["signatures"].read(), dtype="<u8")
            signatures = list(hashes.reshape(-1, NUM_HASHES).astype(np.uint64))
        for line in self._files["entries"]:
            name, package, is_held_out, num_bytes, sha256 = json.loads(line)
            signature = None if signatures is None else signatures[len(entries)]
            entries.append(
                Entry(name, Package(*package), is_held_out, offset, num_bytes, sha256, signature)
            )
            offset += num_bytes
        return entries


def _opened(path: Path, length: int) -> IO[bytes]:
    """The file, cut to a length, at its end."""
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(length)
    file.seek(length)
    return file
