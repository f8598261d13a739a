"""Records from JSONL files, Parquet files and Hugging Face `datasets`: one mapping each, or what
is wrong with it.

Nothing here knows what a record is for. Reading starts at any record, so that an interrupted run
goes on where it was.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from trimode.errors import ConfigError
from trimode.training.prepare_config import DatasetPart

_OPTIONAL = ("system", "prompt_ids", "answer_ids")
_PARQUET_BATCH = 256


@dataclass(frozen=True, slots=True)
class Record:
    """One place of a file.

    Attributes:
        number: From 1.
        fields: The record, or None.
        problem: What is wrong with it, if there is none; empty for a blank line.
    """

    number: int
    fields: dict[str, Any] | None
    problem: str = ""


def jsonl_records(file: Path, *, start: int) -> Iterator[Record]:
    """The lines of a file from line `start` (counted from 0) on.

    Raises:
        ConfigError: The file cannot be opened.
    """
    try:
        lines = file.open("rb")
    except OSError as error:
        raise ConfigError(f"jsonl: {file} cannot be read ({error.strerror})") from error
    with lines:
        for number, line in enumerate(islice(lines, start, None), start=start + 1):
            yield _jsonl_record(number, line)


def _jsonl_record(number: int, line: bytes) -> Record:
    if not line.strip():
        return Record(number, None)
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        where = f"{error.msg.removesuffix(' at')} at character {error.pos + 1}"
        return Record(number, None, f"not a line of JSON in UTF-8 ({where})")
    except (ValueError, RecursionError) as error:  # bytes, numbers or nesting it cannot take
        return Record(number, None, f"not a line of JSON in UTF-8 ({error})")
    if not isinstance(value, dict):
        return Record(number, None, f"{type(value).__name__}, expected an object")
    return Record(number, value)


def parquet_records(file: Path, *, columns: Sequence[str], start: int) -> Iterator[Record]:
    """The rows of a file from row `start` (counted from 0) on.

    Args:
        file: The file.
        columns: Needed columns; those of `_OPTIONAL` are read as well where the file has them.
        start: Rows to pass over. Whole row groups of them are not read.

    Raises:
        ConfigError: Not a Parquet file, damaged, or a column is missing.
    """
    parquet = _import("pyarrow.parquet", extra_for="Parquet files")
    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if missing := [name for name in columns if name not in names]:
            found = ", ".join(names[:8]) or "none"
            raise ConfigError(f"parquet: {file} has no column `{missing[0]}`; columns: {found}")
        first = passed = 0
        while first < table.num_row_groups:
            num_rows = table.metadata.row_group(first).num_rows
            if passed + num_rows > start:
                break
            first, passed = first + 1, passed + num_rows
        groups, wanted = range(first, table.num_row_groups), [*columns]
        wanted += [name for name in _OPTIONAL if name in names and name not in columns]
        number = passed
        for batch in table.iter_batches(_PARQUET_BATCH, row_groups=groups, columns=wanted):
            for row in range(batch.num_rows):
                number += 1
                if number > start:
                    yield _arrow_record(number, batch, row)
    except OSError as error:  # pyarrow's own errors are OSError or ValueError
        reason = error.strerror or " ".join(str(error).split())
        raise ConfigError(f"parquet: {file} cannot be read ({reason})") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"parquet: {file} cannot be read ({reason})") from error


def _arrow_record(number: int, batch: Any, row: int) -> Record:
    try:
        return Record(number, {n: batch.column(n)[row].as_py() for n in batch.schema.names})
    except UnicodeDecodeError as error:
        return Record(number, None, f"text that is not UTF-8 ({error.reason})")


class DatasetRecords:
    """The records of one data set.

    Attributes:
        part: What to read.
    """

    def __init__(self, part: DatasetPart) -> None:
        self.part = part
        self._loaded: Any = None

    def read(self, *, start: int, state: dict[str, Any] | None) -> Iterator[Record]:
        """The records from `start` (counted from 0) on.

        Args:
            start: Records to pass over.
            state: From `state`, taken after `start` records; a stream then goes straight there.

        Raises:
            ConfigError: The library is missing, or cannot load or read the data set.
        """
        self._loaded = load_dataset(self.part)
        if self.part.streaming and state is not None:
            self._loaded.load_state_dict(state)
            rows = iter(self._loaded)
        else:
            rows = iter(self._loaded.skip(start) if start else self._loaded)
        number = start
        while self.part.max_records is None or number < self.part.max_records:
            try:
                row = next(rows, None)
            except Exception as error:  # each builder and file system raises its own
                reason = " ".join(str(error).split())
                raise ConfigError(
                    f"datasets: {self.part.path}, after record {number}: {reason}"
                ) from error
            if row is None:
                return
            number += 1
            yield Record(number, dict(row))

    def state(self) -> dict[str, Any] | None:
        """Where reading is, as plain JSON; None where a number of records says it all."""
        if not self.part.streaming or self._loaded is None:
            return None
        state = dict(self._loaded.state_dict())
        try:
            json.dumps(state)
        except TypeError:  # of a kind of its own; a number of records does as well, more slowly
            return None
        return state

    def files(self) -> Iterator[Path]:
        """The local files behind the data set, as far as its configuration names them."""
        patterns = self.part.data_files or (self.part.path,)
        for pattern in patterns:
            for found in expanded(pattern) or [Path(pattern)]:
                if found.is_dir():
                    yield from sorted(path for path in found.rglob("*") if path.is_file())
                elif found.is_file():
                    yield found


def load_dataset(part: DatasetPart) -> Any:
    """The data set as the library gives it, which raises errors of many kinds.

    Raises:
        ConfigError: The library is missing, or cannot load the data set.
    """
    datasets = _import("datasets", extra_for="`datasets`")
    folder = Path(part.path)
    try:
        with _without_progress_bars(datasets):
            if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
                return _saved_dataset(datasets, part)
            return datasets.load_dataset(
                part.path,
                part.name,
                split=part.split,
                data_files=list(part.data_files) or None,
                revision=part.revision,
                streaming=part.streaming,
            )
    except ConfigError:
        raise
    except Exception as error:  # each builder and file system raises its own
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(f"datasets: {part.path} cannot be loaded ({reason})") from error


def _saved_dataset(datasets: ModuleType, part: DatasetPart) -> Any:
    loaded = datasets.load_from_disk(part.path)
    if isinstance(loaded, datasets.DatasetDict):
        if part.split not in loaded:
            raise ConfigError(
                f"datasets: {part.path} has no split {part.split!r}; splits: {', '.join(loaded)}"
            )
        loaded = loaded[part.split]
    return loaded.to_iterable_dataset() if part.streaming else loaded


@contextmanager
def _without_progress_bars(datasets: ModuleType) -> Iterator[None]:
    """Keeps the library's own bars, a setting of the whole process, off for a while."""
    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()


def expanded(pattern: str) -> list[Path]:
    """The files that a path with `*` or `?` stands for, sorted; a plain path stands for itself."""
    path = Path(pattern)
    if not any(sign in pattern for sign in "*?"):
        return [path]
    return sorted(Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))


def _import(name: str, *, extra_for: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name.partition('.')[0]} is not installed, which {extra_for} need: "
            "`pip install trimode[data]`"
        ) from error
