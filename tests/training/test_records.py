"""Records: JSONL, Parquet and `datasets`; what is corrupt, and when there is too much of it."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.made_documents import make_code, make_config
from trimode.errors import ConfigError
from trimode.training import corpus
from trimode.training.manifest import Manifest
from trimode.training.prepare import prepare
from trimode.training.prepare_config import DatasetPart
from trimode.training.records import jsonl_records, parquet_records

TEXTS = [make_code(seed, num_lines=12) for seed in range(12)]


def write_jsonl(file: Path, *, num_good: int, bad: dict[int, bytes]) -> Path:
    """A file of good lines with bad ones put in at some line numbers."""
    lines = [json.dumps({"text": make_code(i, num_lines=12)}).encode() for i in range(num_good)]
    for number, line in sorted(bad.items()):
        lines.insert(number - 1, line)
    file.write_bytes(b"\n".join(lines) + b"\n\n")
    return file


def plain(tmp_path: Path, **changes: Any) -> Any:
    """A config without folders."""
    return make_config(tmp_path, **{"folders": (), "near_duplicate_threshold": 1.0, **changes})


def train_texts(manifest: Manifest) -> int:
    """Documents of the training half."""
    return manifest.train.num_documents


BAD_LINES = [
    (b'{"text": "cut', "not a line of JSON"),
    (b'{"text": "\xff"}', "not a line of JSON in UTF-8"),
    (b"[" * 100_000, "not a line of JSON"),
    (b"[1]", "list, expected an object"),
    (b'{"body": "x", "id": 3}', "no text in field `text`; fields there: body, id"),
    (b'{"text": null}', "no text in field `text`"),
    (b'{"text": "' + b"\\ud800" * 300 + b'"}', "half of a surrogate pair"),
]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES)
def test_a_corrupt_line_is_named_and_skipped(
    tmp_path: Path, line: bytes, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A corrupt line that ends hours of reading in a traceback, or that nobody hears of."""
    file = write_jsonl(tmp_path / "a.jsonl", num_good=99, bad={37: line})
    with caplog.at_level(logging.WARNING, logger="trimode"):
        manifest = prepare(plain(tmp_path, jsonl=(str(file),)))
    assert train_texts(manifest) == 99
    (corrupt,) = manifest.corrupt
    assert (corrupt.source, corrupt.num_records, corrupt.num_corrupt) == (f"jsonl {file}", 100, 1)
    assert corrupt.first[0].startswith(f"{file}, line 37: {problem}")
    assert manifest.skipped["corrupt"] == 1
    assert corrupt.first[0] in caplog.text
    assert Manifest.read(tmp_path / "out").corrupt == manifest.corrupt


@pytest.mark.parametrize(
    ("num_good", "bad", "message"),
    [
        (19, [3], "1 of 20 records are corrupt, more than 1%; the first: .*a.jsonl, line 3: "),
        (300, [5, 90, 100], "3 of 100 records are corrupt"),
        (300, [150, 151, 152, 153], "2 of 151 records are corrupt"),
    ],
)
def test_too_many_corrupt_lines_stop_the_run(
    tmp_path: Path, num_good: int, bad: list[int], message: str
) -> None:
    """A file of another format read to its end as a corpus of nothing.

    A share counts from 100 lines on, and at the end of a source.
    """
    file = write_jsonl(tmp_path / "a.jsonl", num_good=num_good, bad=dict.fromkeys(bad, b"{"))
    with pytest.raises(ConfigError, match=message):
        prepare(plain(tmp_path, jsonl=(str(file),)))
    assert not (tmp_path / ".out.preparing").exists()


def test_the_share_counts_for_every_source_by_itself(tmp_path: Path) -> None:
    """A rotten file hidden by a large good one."""
    good = write_jsonl(tmp_path / "a.jsonl", num_good=400, bad={})
    rotten = write_jsonl(tmp_path / "b.jsonl", num_good=20, bad={1: b"{"})
    with pytest.raises(ConfigError, match=r"jsonl .*b\.jsonl: 1 of 21 records"):
        prepare(plain(tmp_path, jsonl=(str(good), str(rotten))))


def test_reading_starts_anywhere(tmp_path: Path) -> None:
    """Line numbers that are off after a resume."""
    file = write_jsonl(tmp_path / "a.jsonl", num_good=5, bad={2: b"", 4: b"{"})
    whole = list(jsonl_records(file, start=0))
    assert [record.number for record in whole] == list(range(1, 9))
    for start in range(8):
        assert list(jsonl_records(file, start=start)) == whole[start:]


def write_parquet(file: Path, columns: dict[str, Any]) -> Path:
    """A Parquet file with row groups of four."""
    pa = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(pa.table(columns), file, row_group_size=4)
    return file


def test_parquet_equals_jsonl(tmp_path: Path) -> None:
    """Rows lost at the border of a row group or of a batch."""
    texts = [make_code(i, num_lines=12) for i in range(30)]
    write_parquet(tmp_path / "a.parquet", {"id": list(range(30)), "body": texts})
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"body": text}) for text in texts))
    one = prepare(
        plain(tmp_path, jsonl=(str(file),), text_field="body", output_dir=str(tmp_path / "1"))
    )
    pattern = str(tmp_path / "*.parquet")
    two = prepare(plain(tmp_path, parquet=(pattern,), text_field="body"))
    assert two.train.num_tokens == one.train.num_tokens
    assert two.packages[0].kind == "parquet"
    whole = list(parquet_records(tmp_path / "a.parquet", columns=["body"], start=0))
    for start in (1, 4, 7, 29, 30):
        rest = list(parquet_records(tmp_path / "a.parquet", columns=["body"], start=start))
        assert rest == whole[start:]


def test_corrupt_parquet(tmp_path: Path) -> None:
    """Empty and undecodable rows are corrupt records; a wrong file is a wrong config."""
    pa = pytest.importorskip("pyarrow")
    texts = [text.encode() for text in TEXTS] * 17
    texts[10], rotten = None, b"\xff\xfe" * 200  # type: ignore[call-overload]
    texts[20] = rotten
    raw = pa.array(texts, type=pa.binary())
    text = pa.StringArray.from_buffers(len(raw), *raw.buffers()[1:], raw.buffers()[0])
    file = write_parquet(tmp_path / "a.parquet", {"text": text})
    manifest = prepare(plain(tmp_path, parquet=(str(file),)))
    assert manifest.corrupt[0].num_corrupt == 2
    assert f"{file}, row 11: no text" in manifest.corrupt[0].first[0]
    assert f"{file}, row 21: text that is not UTF-8" in manifest.corrupt[0].first[1]
    with pytest.raises(ConfigError, match="has no column `code`; columns: text"):
        prepare(plain(tmp_path, parquet=(str(file),), text_field="code", overwrite=True))
    file.write_bytes(b"PAR1 no more")
    with pytest.raises(ConfigError, match=r"parquet: .*a\.parquet cannot be read"):
        prepare(plain(tmp_path, parquet=(str(file),), overwrite=True))
    with pytest.raises(ConfigError, match=r"parquet: no file is named like .*\*\.pq"):
        prepare(plain(tmp_path, parquet=(str(tmp_path / "*.pq"),), overwrite=True))


@pytest.mark.parametrize(
    ("missing", "changes"),
    [
        ("pyarrow", {"parquet": ("a.parquet",)}),
        ("datasets", {"datasets": (DatasetPart("json", data_files=("a.jsonl",)),)}),
    ],
)
def test_missing_extra_is_one_line(
    tmp_path: Path, missing: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback of an import in place of what to install."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.parquet", "a.jsonl"):
        (tmp_path / name).touch()
    load = importlib.import_module

    def without(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ImportError(name)
        return load(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=rf"{missing} is not installed, .*trimode\[data\]"):
        prepare(plain(tmp_path, **changes))


def test_text_files_by_name(tmp_path: Path) -> None:
    """A file without a usual ending that no folder source would take."""
    file = tmp_path / "notes"
    file.write_text(make_code(50))
    manifest = prepare(plain(tmp_path, files=(str(file),)))
    assert manifest.packages[0].kind == "file"
    with pytest.raises(ConfigError, match="files: .*nowhere is not a file"):
        prepare(plain(tmp_path, files=(str(tmp_path / "nowhere"),), overwrite=True))


@pytest.fixture
def hf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library `datasets`, with its cache in the test's folder and without the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    """Twelve documents."""
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in TEXTS))
    return str(file)


def _builder(hf: Any, file: str, folder: Path) -> DatasetPart:
    return DatasetPart("json", data_files=(file,))


def _streaming(hf: Any, file: str, folder: Path) -> DatasetPart:
    return DatasetPart("json", data_files=(file,), streaming=True)


def _saved(hf: Any, file: str, folder: Path) -> DatasetPart:
    train = hf.Dataset.from_dict({"text": TEXTS})
    hf.DatasetDict({"train": train, "other": train.select([0])}).save_to_disk(str(folder / "saved"))
    return DatasetPart(str(folder / "saved"))


@pytest.mark.parametrize("make", [_builder, _streaming, _saved])
def test_datasets(
    tmp_path: Path, hf: Any, jsonl: str, make: Callable[[Any, str, Path], DatasetPart]
) -> None:
    """Every way into the library must give the same documents as reading the file itself."""
    part = make(hf, jsonl, tmp_path)
    manifest = prepare(plain(tmp_path, datasets=(part,)))
    assert train_texts(manifest) == 12
    assert manifest.packages[0].kind == "dataset"
    assert manifest.packages[0].name.startswith(part.path)
    assert not hf.are_progress_bars_disabled()


def test_streaming_goes_on_where_it_was(
    tmp_path: Path, hf: Any, jsonl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream of days that starts at its first record again, or that skips some."""
    monkeypatch.setattr(corpus, "KEEP_EVERY", 4)
    part = DatasetPart("json", data_files=(jsonl,), streaming=True, max_records=11)
    config = plain(tmp_path, datasets=(part,))
    whole = prepare(plain(tmp_path, datasets=(part,), output_dir=str(tmp_path / "whole")))

    def interrupt(name: str, done: int, total: int | None) -> None:
        if (name, done) == ("reading", 10):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, progress=interrupt)
    loaded: list[Any] = []
    load = hf.IterableDataset.load_state_dict
    monkeypatch.setattr(
        hf.IterableDataset, "load_state_dict", lambda ds, s: (loaded.append(s), load(ds, s))[1]
    )
    steps: list[tuple[str, int]] = []
    manifest = prepare(config, progress=lambda name, done, total: steps.append((name, done)))
    assert len(loaded) == 1
    assert [done for name, done in steps if name == "reading"] == [9, 10, 11]
    assert manifest.train == whole.train


def test_datasets_that_cannot_be_loaded(tmp_path: Path, hf: Any, jsonl: str) -> None:
    """The library's own errors run over many lines and name no key of the config."""
    wrong = [
        (DatasetPart("json", data_files=(jsonl,), split="test"), 'Unknown split "test"'),
        (_saved(hf, jsonl, tmp_path), "has no split 'none'; splits: train, other"),
    ]
    for part, message in wrong:
        if part.path != "json":
            part = DatasetPart(part.path, split="none")
        with pytest.raises(ConfigError, match=f"datasets: .*{message}"):
            prepare(plain(tmp_path, datasets=(part,)))
    with pytest.raises(ConfigError, match="max_records is 0"):
        DatasetPart("json", max_records=0)
