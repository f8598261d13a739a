"""Which documents make up the corpus: reading them in, and leaving copies and excess out.

Texts wait in a spool file on disk; what is handled here are entries, one small record a document.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trimode.training import near_duplicates
from trimode.training.sources import INSTALLED_KINDS, Package, Selection, Skipped, find_documents

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]
"""Called as `progress(step, done, total)`; the total is None where it is not known yet."""


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A document in the spool.

    Attributes:
        name: As in `sources.Document`.
        package: What the document belongs to.
        is_held_out: Whether it must never be trained on.
        offset: First byte in the spool.
        num_bytes: Length in the spool.
        sha256: Of the text.
        signature: From `near_duplicates.signature`, or None if not asked for.
    """

    name: str
    package: Package
    is_held_out: bool
    offset: int
    num_bytes: int
    sha256: str
    signature: np.ndarray | None


class Spool:
    """The texts of all documents in one temporary file, read again as often as needed."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")

    def add(self, raw: bytes) -> int:
        """Appends a text and returns its offset."""
        offset = self._file.tell()
        self._file.write(raw)
        return offset

    def texts(self, entries: Sequence[Entry], report: Callable[[int], None]) -> Iterator[str]:
        """Yields the texts of entries and reports how many were read so far."""
        for number, entry in enumerate(entries, start=1):
            self._file.seek(entry.offset)
            yield self._file.read(entry.num_bytes).decode()
            report(number)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_entries(
    spool: Spool,
    selection: Selection,
    *,
    skipped: Skipped,
    with_signatures: bool,
    report: Progress,
) -> list[Entry]:
    """Reads all sources into the spool."""
    entries: list[Entry] = []
    for document in find_documents(selection, skipped=skipped):
        raw = document.text.encode()
        signature = near_duplicates.signature(document.text) if with_signatures else None
        entries.append(
            Entry(
                name=document.name,
                package=document.package,
                is_held_out=document.is_held_out,
                offset=spool.add(raw),
                num_bytes=len(raw),
                sha256=hashlib.sha256(raw).hexdigest(),
                signature=signature,
            )
        )
        report("reading", len(entries), None)
    return entries


def without_copies(entries: list[Entry], *, skipped: Skipped) -> list[Entry]:
    """Returns one entry of each text, held-out ones first, otherwise by name."""
    entries = sorted(entries, key=lambda entry: (not entry.is_held_out, entry.name, entry.sha256))
    unique = list({entry.sha256: entry for entry in reversed(entries)}.values())[::-1]
    skipped.count("duplicate", len(entries) - len(unique))
    return unique


def without_near_duplicates(
    entries: list[Entry], *, threshold: float, skipped: Skipped, report: Progress
) -> list[Entry]:
    """Keeps an entry if no earlier kept one is at least `threshold` similar to it.

    Since held-out entries come first, a training document gives way to a held-out one like it.
    """
    signatures = [entry.signature for entry in entries if entry.signature is not None]
    is_kept = near_duplicates.first_of_each(signatures, threshold=threshold)
    kept = []
    for number, (entry, keep) in enumerate(zip(entries, is_kept, strict=True), start=1):
        if keep:
            kept.append(entry)
        report("comparing", number, len(entries))
    skipped.count("near-duplicate", len(entries) - len(kept))
    return kept


def without_held_out_text(
    entries: list[Entry], spool: Spool, *, max_overlap: float, skipped: Skipped, report: Progress
) -> list[Entry]:
    """Leaves out training documents of which more than `max_overlap` is held-out text.

    This finds what similarity cannot: a changed copy of a held-out package inside another package,
    cut up or surrounded by other code.
    """

    def runs_of(chosen: list[Entry], step: str) -> Iterator[np.ndarray]:
        for text in spool.texts(chosen, lambda done: report(step, done, len(chosen))):
            yield near_duplicates.word_runs(text, length=near_duplicates.OVERLAP_WORDS)

    held_out = [entry for entry in entries if entry.is_held_out]
    train = [entry for entry in entries if not entry.is_held_out]
    if not held_out:
        return entries
    known = np.unique(np.concatenate(list(runs_of(held_out, "reading held_out"))))
    overlaps = [near_duplicates.overlap(runs, known) for runs in runs_of(train, "checking overlap")]
    kept = [entry for entry, share in zip(train, overlaps, strict=True) if share <= max_overlap]
    skipped.count("held-out text", len(train) - len(kept))
    return held_out + kept


def capped(entries: list[Entry], *, max_share: float, seed: int, skipped: Skipped) -> list[Entry]:
    """Leaves training documents out of each installed package with too large a share of all bytes.

    With so few packages that they could not fill the corpus at `max_share` each, nothing is cut.
    """
    by_package: dict[Package, list[Entry]] = defaultdict(list)
    kept: list[Entry] = []
    for entry in entries:
        if entry.package.kind in INSTALLED_KINDS and not entry.is_held_out:
            by_package[entry.package].append(entry)
        else:
            kept.append(entry)
    if len(by_package) * max_share < 1.0:
        return entries
    allowed = max_share * sum(entry.num_bytes for entry in entries)
    for members in by_package.values():
        room = allowed
        for entry in shuffled(members, seed=seed):
            if entry.num_bytes <= room:
                kept.append(entry)
                room -= entry.num_bytes
    skipped.count("package share", len(entries) - len(kept))
    return kept


def shuffled(entries: list[Entry], *, seed: int) -> list[Entry]:
    """Returns entries in an order that depends on nothing but the seed, their names and texts."""

    def key(entry: Entry) -> tuple[str, str]:
        return hashlib.sha256(f"{seed}:{entry.name}".encode()).hexdigest(), entry.sha256

    return sorted(entries, key=key)
