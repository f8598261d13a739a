"""Which documents make up the corpus: reading them in, and leaving copies and excess out.

Texts wait in a spool file on disk; what is handled here are entries, one small record a document.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from trimode.training import near_duplicates
from trimode.training.corrupt_records import RecordTally
from trimode.training.documents import (
    CORRUPT,
    INSTALLED_KINDS,
    Document,
    Omitted,
    Package,
    Skipped,
    name_bytes,
)
from trimode.training.sources import Source
from trimode.training.spool import Entry, Position, Spool

Progress = Callable[[str, int, int | None], None]
"""Called as `progress(step, done, total)`; the total is None where it is not known yet."""

KEEP_EVERY = 4096
"""Items of a source after which the position is put on disk."""


def read_entries(
    spool: Spool,
    sources: Sequence[Source],
    *,
    with_signatures: bool,
    report: Progress,
) -> None:
    """Reads all sources into the spool, from where an earlier run got to.

    Args:
        spool: Where the documents go; what is left out is counted there.
        sources: In order.
        with_signatures: Whether near duplicates will be looked for.
        report: Called with the number of documents so far.

    Raises:
        ConfigError: A source cannot be read, or too many of its records are corrupt.
    """
    first = spool.position
    for number in range(first.source, len(sources)):
        source = sources[number]
        start, state = (first.num_items, first.state) if number == first.source else (0, None)
        tally = None
        if source.has_records:
            tally = spool.skipped.tallies.setdefault(source.name, RecordTally(source.name))
        for num_items, item in enumerate(source.items(start, state), start=start + 1):
            if isinstance(item, Omitted):
                _count(item, spool.skipped, tally)
            else:
                if tally is not None:
                    tally.add_good()
                _add(item, spool, with_signature=with_signatures)
                report("reading", len(spool.entries), None)
            if num_items % KEEP_EVERY == 0:
                spool.keep(Position(number, num_items, source.state()))
        if tally is not None:
            tally.check()
        spool.keep(Position(number + 1))


def _count(item: Omitted, skipped: Skipped, tally: RecordTally | None) -> None:
    if item.reason == CORRUPT:
        assert tally is not None, "only records are corrupt"
        tally.add_corrupt(item.note)
    elif tally is not None and item.reason:
        tally.add_good()
    if item.reason == "licence":
        skipped.packages.append(item.note)
    if item.reason:
        skipped.count(item.reason)


def _add(document: Document, spool: Spool, *, with_signature: bool) -> None:
    raw = document.text.encode()
    signature = None
    if with_signature:
        signature = near_duplicates.signature(document.text).astype(np.uint64)
    entry = Entry(
        name=document.name,
        package=document.package,
        is_held_out=document.is_held_out,
        offset=spool.end,
        num_bytes=len(raw),
        sha256=hashlib.sha256(raw).hexdigest(),
        signature=signature,
    )
    spool.add(entry, raw)


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
        return hashlib.sha256(name_bytes(f"{seed}:{entry.name}")).hexdigest(), entry.sha256

    return sorted(entries, key=key)
