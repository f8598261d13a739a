"""Where documents come from, in a fixed order: files, installed packages, records.

A source gives one item for every place it looks at, a document or why there is none, and can start
at any of them. Duplicates are looked for later, when all documents are known.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from trimode.errors import ConfigError
from trimode.training import document_filter
from trimode.training.corrupt_records import CorruptRecordError
from trimode.training.documents import CORRUPT, Item, Omitted, Package, judged
from trimode.training.manifest import SPLITS
from trimode.training.package_sources import package_targets, stdlib_targets
from trimode.training.prepare_config import DatasetPart, PrepareConfig
from trimode.training.records import (
    DatasetRecords,
    Record,
    expanded,
    jsonl_records,
    parquet_records,
)
from trimode.training.source_files import Target, file_target, folder_targets

_OWN_FOLDER = Path(__file__).resolve().parents[1]

TextOf = Callable[[dict[str, Any]], str]
"""Gives a record's text, or raises `CorruptRecordError`."""


class Source(Protocol):
    """One place that documents come from.

    Attributes:
        name: Kind and path, for messages.
        has_records: Whether corrupt ones are counted.
    """

    name: str
    has_records: bool

    def items(self, start: int, state: dict[str, Any] | None) -> Iterator[Item]:
        """Items from `start` (counted from 0) on; `state` is from `state()`, taken there."""

    def state(self) -> dict[str, Any] | None:
        """What a number of items does not say about where reading is, as plain JSON."""

    def files(self) -> Iterator[Path]:
        """The local files behind it: if one of them changes, earlier work is worth nothing."""


def open_sources(config: PrepareConfig, *, text_of: TextOf) -> list[Source]:
    """All sources of a configuration, in the order of reading.

    Args:
        config: What is wanted.
        text_of: Of a record.

    Raises:
        ConfigError: A source does not exist.
    """
    sources: list[Source] = []
    if config.packages:
        sources.append(TextFiles("packages", config, lambda: package_targets(config.packages)))
    if config.stdlib:
        sources.append(TextFiles("stdlib", config, stdlib_targets))
    for folder in config.folders:
        if not Path(folder).is_dir():
            raise ConfigError(
                f"folders: {folder} is not a folder; give the path of an existing folder"
            )
        sources.append(TextFiles(f"folder {folder}", config, _folder(folder, config)))
    for file in config.files:
        if not Path(file).is_file():
            raise ConfigError(f"files: {file} is not a file; give the path of an existing file")
        sources.append(TextFiles(f"file {file}", config, _file(file)))
    for kind in ("jsonl", "parquet"):
        for pattern in getattr(config, kind):
            for found in _record_files(kind, pattern):
                sources.append(RecordFile(kind, found, config, text_of))
    sources += [RecordSet(part, config, text_of) for part in config.datasets]
    return sources


def _folder(folder: str, config: PrepareConfig) -> Callable[[], Iterator[Target | Omitted]]:
    return lambda: folder_targets(Path(folder), extensions=config.extensions)


def _file(file: str) -> Callable[[], Iterator[Target | Omitted]]:
    return lambda: iter([file_target(Path(file))])


def _record_files(kind: str, pattern: str) -> list[Path]:
    found = expanded(pattern)
    if not found:
        raise ConfigError(f"{kind}: no file is named like {pattern}")
    for file in found:
        try:
            file.open("rb").close()
        except OSError as error:
            raise ConfigError(f"{kind}: {file} cannot be read ({error.strerror})") from error
    return found


@dataclass(slots=True)
class TextFiles:
    """Files that are one document each.

    Args:
        name: For messages.
        config: Limits of a document.
        targets: The files, in order, and what is left out without opening it.
    """

    name: str
    config: PrepareConfig
    targets: Callable[[], Iterator[Target | Omitted]]
    has_records: bool = False

    def items(self, start: int, state: dict[str, Any] | None) -> Iterator[Item]:
        """See `Source`."""
        for target in islice(self.targets(), start, None):
            yield target if isinstance(target, Omitted) else self._item(target)

    def state(self) -> None:
        """See `Source`."""

    def files(self) -> Iterator[Path]:
        """See `Source`."""
        return (target.file for target in self.targets() if isinstance(target, Target))

    def _item(self, target: Target) -> Item:
        if target.file.resolve().is_relative_to(_OWN_FOLDER):
            return Omitted("own source")
        text, config = "", self.config
        reason = document_filter.folder_reason(target.path, include_tests=config.include_tests)
        if reason is None:
            text, reason = _file_text(target.file, max_bytes=config.max_document_bytes)
        if reason is None and target.path.suffix not in document_filter.PROSE_EXTENSIONS:
            reason = document_filter.generated_reason(text)
        if reason is not None:
            return Omitted(reason)
        return _judged(f"{target.package.name}/{target.path}", text, target.package, config)


def _file_text(file: Path, *, max_bytes: int) -> tuple[str, str | None]:
    try:
        if not file.is_file():  # a broken link, or a pipe that would never end
            return "", "unreadable"
        if file.stat().st_size > max_bytes + len(codecs.BOM_UTF8):
            return "", "too long"
        return document_filter.decode(file.read_bytes())
    except OSError:
        return "", "unreadable"


class RecordFile:
    """A JSONL or Parquet file; every record is a document.

    Args:
        kind: `jsonl` or `parquet`.
        file: The file.
        config: Limits of a document, and the columns that are needed.
        text_of: Of a record.
    """

    has_records = True

    def __init__(self, kind: str, file: Path, config: PrepareConfig, text_of: TextOf) -> None:
        self.name = f"{kind} {file}"
        self._kind, self._file, self._config, self._text_of = kind, file, config, text_of

    def items(self, start: int, state: dict[str, Any] | None) -> Iterator[Item]:
        """See `Source`."""
        package, unit = Package(self._kind, self._file.name), "line"
        if self._kind == "jsonl":
            records = jsonl_records(self._file, start=start)
        else:
            needed = (_needed_field(self._config), self._config.split_field)
            columns, unit = [name for name in needed if name is not None], "row"
            records = parquet_records(self._file, columns=columns, start=start)
        for record in records:
            place = f"{self._file}, {unit} {record.number}"
            yield _record_item(record, place, package, self._config, self._text_of)

    def state(self) -> None:
        """See `Source`."""

    def files(self) -> Iterator[Path]:
        """See `Source`."""
        yield self._file


class RecordSet:
    """What the library `datasets` reads; every record is a document.

    Args:
        part: What to read.
        config: Limits of a document.
        text_of: Of a record.
    """

    has_records = True

    def __init__(self, part: DatasetPart, config: PrepareConfig, text_of: TextOf) -> None:
        words = [part.path, part.name, *part.data_files, part.split]
        self._package = Package("dataset", " ".join(word for word in words if word))
        self.name = f"dataset {self._package.name}"
        self._records = DatasetRecords(part)
        self._config, self._text_of = config, text_of

    def items(self, start: int, state: dict[str, Any] | None) -> Iterator[Item]:
        """See `Source`."""
        for record in self._records.read(start=start, state=state):
            place = f"{self._package.name}, record {record.number}"
            yield _record_item(record, place, self._package, self._config, self._text_of)

    def state(self) -> dict[str, Any] | None:
        """See `Source`."""
        return self._records.state()

    def files(self) -> Iterator[Path]:
        """See `Source`."""
        return self._records.files()


def _record_item(
    record: Record, place: str, package: Package, config: PrepareConfig, text_of: TextOf
) -> Item:
    if record.fields is None:
        return Omitted(CORRUPT, f"{place}: {record.problem}") if record.problem else Omitted("")
    try:
        text = text_of(record.fields)
        is_held_out = _marked_held_out(record.fields, config.split_field)
        return _judged(
            f"{package.name}:{record.number}", text, package, config, is_held_out=is_held_out
        )
    except CorruptRecordError as error:
        return Omitted(CORRUPT, f"{place}: {error}")
    except UnicodeEncodeError:
        return Omitted(CORRUPT, f"{place}: half of a surrogate pair, which is not text")
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error


def plain_text_of(field: str) -> TextOf:
    """Gives the text in one field of a record."""

    def text_of(fields: dict[str, Any]) -> str:
        text = fields.get(field)
        if not isinstance(text, str):
            found = ", ".join(sorted(map(str, fields))[:8]) or "none"
            raise CorruptRecordError(f"no text in field `{field}`; fields there: {found}")
        return text

    return text_of


def _needed_field(config: PrepareConfig) -> str:
    return config.messages_field if config.kind == "chat" else config.text_field


def _marked_held_out(fields: dict[str, Any], name: str | None) -> bool | None:
    """What a record itself says about its split; None where it need not say anything."""
    if name is None:
        return None
    if fields.get(name) not in SPLITS:
        raise CorruptRecordError(f"`{name}` is {fields.get(name)!r}; allowed: {', '.join(SPLITS)}")
    return bool(fields[name] == "held_out")


def _judged(
    name: str,
    text: str,
    package: Package,
    config: PrepareConfig,
    *,
    is_held_out: bool | None = None,
) -> Item:
    return judged(
        name,
        text,
        package,
        min_bytes=config.filters.min_document_bytes,
        max_bytes=config.max_document_bytes,
        share=config.held_out_share,
        is_held_out=is_held_out,
    )
