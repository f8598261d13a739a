"""Where documents come from: folders, JSONL files, installed packages and the standard library.

A source yields documents that passed the filters and counts what it skipped, by reason. Which half
of the corpus a document belongs to is decided here as well, by package, from a list of names that
is the same on every machine. Duplicates are looked for later, when all documents are known.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path, PurePosixPath

from trimode.errors import ConfigError
from trimode.training import document_filter
from trimode.training.licences import declared_licence, is_permissive

ALL_INSTALLED = "installed"
STDLIB_LICENCE = "PSF-2.0"

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
"""Kinds that are split by name and capped; folders and files are the user's own choice."""

_OWN_NAME = "trimode"
_OWN_FOLDER = Path(__file__).resolve().parents[1]
_NOT_STDLIB = frozenset(
    """
    site-packages dist-packages lib-dynload __pycache__ test tests idlelib lib2to3 pydoc_data
    turtledemo
    """.split()
)


@dataclass(frozen=True, slots=True, order=True)
class Package:
    """What a document belongs to: the unit that is split, capped and listed in the manifest.

    Attributes:
        kind: `package`, `stdlib`, `folder` or `jsonl`.
        name: Normalised distribution name, top-level module, folder name or file name.
        version: Version of the package or of Python; empty for folders and files.
        licence: SPDX expression as declared; `unstated` for folders and files.
    """

    kind: str
    name: str
    version: str = ""
    licence: str = "unstated"


@dataclass(frozen=True, slots=True)
class Document:
    """One document that passed the filters.

    Attributes:
        name: `<package>/<path>`, the same wherever the source lies on disk.
        package: What it belongs to.
        is_held_out: Whether it must never be trained on.
        text: The decoded text.
    """

    name: str
    package: Package
    is_held_out: bool
    text: str


@dataclass(slots=True)
class Skipped:
    """What was left out so far; sources and later steps add to it.

    Attributes:
        reasons: Number of documents by reason; `licence` counts packages.
        packages: `name: licence` of the packages left out for their licence.
    """

    reasons: Counter[str] = field(default_factory=Counter)
    packages: list[str] = field(default_factory=list)

    def count(self, reason: str, number: int = 1) -> None:
        """Adds documents to a reason."""
        self.reasons[reason] += number


@dataclass(frozen=True, slots=True)
class Selection:
    """Which documents are wanted. Field meanings are those of `PrepareConfig`."""

    folders: Sequence[str]
    jsonl: Sequence[str]
    jsonl_field: str
    packages: Sequence[str]
    stdlib: bool
    extensions: Sequence[str]
    include_tests: bool
    min_document_bytes: int
    max_document_bytes: int
    held_out_share: float


def find_documents(selection: Selection, *, skipped: Skipped) -> Iterator[Document]:
    """Yields the documents of all sources, source by source.

    Args:
        selection: What to look for.
        skipped: What is left out is added here.

    Raises:
        ConfigError: A source does not exist, or a JSONL line cannot be read.
    """
    for distribution in _distributions(selection.packages):
        yield from _package_documents(distribution, selection, skipped)
    if selection.stdlib:
        yield from _stdlib_documents(selection, skipped)
    for folder in selection.folders:
        yield from _folder_documents(Path(folder), selection, skipped)
    for file in selection.jsonl:
        yield from _jsonl_documents(Path(file), selection, skipped)


def normalised(name: str) -> str:
    """Returns a distribution name as package indexes compare it: `Typing_Extensions` and
    `typing-extensions` are one."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _distributions(names: Sequence[str]) -> list[metadata.Distribution]:
    if not names:
        return []
    installed: dict[str, metadata.Distribution] = {}
    for found in metadata.distributions():  # the first on the path is the one that is imported
        installed.setdefault(normalised(found.metadata["Name"] or ""), found)
    installed.pop(_OWN_NAME, None)
    installed.pop("", None)
    wanted = {normalised(name) for name in names}
    if ALL_INSTALLED in wanted:
        wanted |= set(installed)
        wanted.remove(ALL_INSTALLED)
    if missing := sorted(wanted - set(installed)):
        raise ConfigError(
            f"packages: {', '.join(missing)} not installed; name installed packages other than "
            f"{_OWN_NAME}, or `{ALL_INSTALLED}` for all of them"
        )
    return [installed[name] for name in sorted(wanted)]


def _package_documents(
    distribution: metadata.Distribution, selection: Selection, skipped: Skipped
) -> Iterator[Document]:
    package = Package(
        "package",
        normalised(distribution.metadata["Name"]),
        distribution.version,
        declared_licence(distribution.metadata),
    )
    if not is_permissive(package.licence):
        skipped.count("licence")
        skipped.packages.append(f"{package.name}: {package.licence}")
        return
    for file in sorted(distribution.files or [], key=str):
        path = PurePosixPath(file)
        if path.suffix == ".py" and ".." not in path.parts:
            located = Path(str(distribution.locate_file(file)))
            yield from _read(located, path, package, selection, skipped)


def _stdlib_documents(selection: Selection, skipped: Skipped) -> Iterator[Document]:
    paths = sysconfig.get_paths()
    root, version = Path(paths["stdlib"]), sysconfig.get_python_version()
    for top in sorted(root.iterdir()):
        if top.name in _NOT_STDLIB or top.name.startswith(("config-", "_sysconfigdata")):
            continue
        package = Package("stdlib", top.stem, version, STDLIB_LICENCE)
        for file in [top] if top.is_file() else _walk(top):
            if file.suffix == ".py":
                path = PurePosixPath(file.relative_to(root).as_posix())
                yield from _read(file, path, package, selection, skipped)


def _folder_documents(folder: Path, selection: Selection, skipped: Skipped) -> Iterator[Document]:
    if not folder.is_dir():
        raise ConfigError(f"folders: {folder} is not a folder; give the path of an existing folder")
    package = Package("folder", folder.resolve().name)
    for file in _walk(folder):
        if file.suffix not in selection.extensions:
            skipped.count("extension")
            continue
        path = PurePosixPath(file.relative_to(folder).as_posix())
        yield from _read(file, path, package, selection, skipped)


def _walk(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder in sorted order; hidden folders and caches are left out."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n != "__pycache__")
        yield from (Path(root, name) for name in sorted(files))


def _read(
    file: Path,
    path: PurePosixPath,
    package: Package,
    selection: Selection,
    skipped: Skipped,
) -> Iterator[Document]:
    """Yields the document in a file, or nothing and counts why."""
    if file.resolve().is_relative_to(_OWN_FOLDER):
        skipped.count("own source")
        return
    text = ""
    reason = document_filter.folder_reason(path, include_tests=selection.include_tests)
    if reason is None:
        text, reason = _file_text(file, max_bytes=selection.max_document_bytes)
    if reason is None and path.suffix not in document_filter.PROSE_EXTENSIONS:
        reason = document_filter.generated_reason(text)
    if reason is not None:
        skipped.count(reason)
        return
    yield from _sized(f"{package.name}/{path}", text, package, selection, skipped)


def _file_text(file: Path, *, max_bytes: int) -> tuple[str, str | None]:
    try:
        if not file.is_file():  # a broken link, or a pipe that would never end
            return "", "unreadable"
        if file.stat().st_size > max_bytes + len(codecs.BOM_UTF8):
            return "", "too long"
        return document_filter.decode(file.read_bytes())
    except OSError:
        return "", "unreadable"


def _sized(
    name: str, text: str, package: Package, selection: Selection, skipped: Skipped
) -> Iterator[Document]:
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        skipped.count("undecodable")
        return
    reason = document_filter.length_reason(
        num_bytes, min_bytes=selection.min_document_bytes, max_bytes=selection.max_document_bytes
    )
    if reason is not None:
        skipped.count(reason)
        return
    yield Document(name, package, _is_held_out(name, package, selection.held_out_share), text)


def _is_held_out(name: str, package: Package, share: float) -> bool:
    if package.kind in INSTALLED_KINDS:
        return package.name in HELD_OUT_PACKAGES
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < share * 2.0**64


def _jsonl_documents(file: Path, selection: Selection, skipped: Skipped) -> Iterator[Document]:
    package = Package("jsonl", file.name)
    try:
        lines = file.open("rb")
    except OSError as error:
        raise ConfigError(f"jsonl: {file} cannot be read ({error.strerror})") from error
    with lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                text = _jsonl_text(line, f"{file}, line {number}", selection.jsonl_field)
                yield from _sized(f"{package.name}:{number}", text, package, selection, skipped)


def _jsonl_text(line: bytes, place: str, field: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"jsonl: {place}: not a line of JSON in UTF-8 ({error})") from error
    if not isinstance(record, dict):
        raise ConfigError(f"jsonl: {place}: {type(record).__name__}, expected an object")
    text = record.get(field)
    if not isinstance(text, str):
        found = ", ".join(sorted(record)[:8]) or "none"
        raise ConfigError(f"jsonl: {place}: no text in field `{field}`; fields there: {found}")
    return text
