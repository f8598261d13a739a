"""One document on its way into the corpus: what it is, what it belongs to, or why it is left out.

Also decides which half of the corpus a document belongs to: by package, from a list of names that
is the same on every machine, or by the document's own name.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from trimode.training import document_filter
from trimode.training.corrupt_records import RecordTally

# Never trained on, whichever of them a machine has. A name stands for the standard library's module
# and for an installed package alike; relatives are listed together (httpx and httpx2).
HELD_OUT_PACKAGES = frozenset(
    """
    argparse calendar configparser csv difflib email fractions graphlib heapq http ipaddress json
    sched shlex statistics string tarfile textwrap
    click filelock flask h11 httpcore httpcore2 httpx httpx2 iniconfig itsdangerous jinja2 packaging
    requests rich starlette tqdm werkzeug
    """.split()
)

INSTALLED_KINDS = frozenset({"package", "stdlib"})
"""Kinds that are split by name and capped; all others are the user's own choice."""

CORRUPT = "corrupt"
"""Reason of a record that cannot be read."""


@dataclass(frozen=True, slots=True, order=True)
class Package:
    """What a document belongs to: the unit that is split, capped and listed in the manifest.

    Attributes:
        kind: `package`, `stdlib`, `folder`, `file`, `jsonl`, `parquet` or `dataset`.
        name: Normalised distribution name, top-level module, folder, file or data set.
        version: Version of the package or of Python; empty for all others.
        licence: SPDX expression as declared; `unstated` for what is not installed.
    """

    kind: str
    name: str
    version: str = ""
    licence: str = "unstated"


@dataclass(frozen=True, slots=True)
class Document:
    """One document that passed the filters.

    Attributes:
        name: `<package>/<path>` or `<file>:<record>`, the same wherever the source lies on disk.
        package: What it belongs to.
        is_held_out: Whether it must never be trained on.
        text: The decoded text; a conversation is its messages as JSON.
    """

    name: str
    package: Package
    is_held_out: bool
    text: str


@dataclass(frozen=True, slots=True)
class Omitted:
    """A place of a source that gives no document.

    Attributes:
        reason: What it is counted under; empty for what counts nowhere, as a blank line.
        note: `name: licence` of a package left out for its licence; what is wrong with a corrupt
            record, and where.
    """

    reason: str
    note: str = ""


Item = Document | Omitted


@dataclass(slots=True)
class Skipped:
    """What was left out so far; sources and later steps add to it.

    Attributes:
        reasons: Number of documents by reason; `licence` counts packages.
        packages: `name: licence` of the packages left out for their licence.
        tallies: Records seen and corrupt, by source.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    packages: list[str] = field(default_factory=list)
    tallies: dict[str, RecordTally] = field(default_factory=dict)

    def count(self, reason: str, number: int = 1) -> None:
        """Adds documents to a reason."""
        self.reasons[reason] += number

    def to_fields(self) -> dict[str, Any]:
        """The same as plain JSON."""
        tallies = [tally.to_fields() for tally in self.tallies.values()]
        return {"reasons": dict(self.reasons), "packages": self.packages, "tallies": tallies}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Skipped:
        """The inverse of `to_fields`."""
        tallies = [RecordTally(**tally) for tally in fields["tallies"]]
        return cls(
            Counter(fields["reasons"]), list(fields["packages"]), {t.source: t for t in tallies}
        )


def judged(
    name: str,
    text: str,
    package: Package,
    *,
    min_bytes: int,
    max_bytes: int,
    share: float,
    is_held_out: bool | None = None,
) -> Item:
    """The document with this text, or that it is too short or too long.

    Args:
        name: As in `Document`.
        text: Its text.
        package: What it belongs to.
        min_bytes: Shorter ones are left out.
        max_bytes: Longer ones are left out.
        share: Share of the documents to hold out, where packages do not decide.
        is_held_out: Whether to hold this one out, where its source says so.

    Raises:
        UnicodeEncodeError: Half of a surrogate pair in the text, which JSON can spell.
    """
    reason = document_filter.length_reason(
        len(text.encode()), min_bytes=min_bytes, max_bytes=max_bytes
    )
    if reason is not None:
        return Omitted(reason)
    if is_held_out is None:
        is_held_out = _is_held_out(name, package, share)
    return Document(name, package, is_held_out, text)


def name_bytes(name: str) -> bytes:
    """A document's name as bytes, file names that are not UTF-8 included."""
    return name.encode("utf-8", "surrogateescape")


def _is_held_out(name: str, package: Package, share: float) -> bool:
    if package.kind in INSTALLED_KINDS:
        return package.name in HELD_OUT_PACKAGES
    digest = hashlib.sha256(name_bytes(name)).digest()
    return int.from_bytes(digest[:8], "big") < share * 2.0**64
