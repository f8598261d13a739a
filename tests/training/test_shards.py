"""Token shards: what a reader may rely on, and what damage looks like."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.training.made_documents import make_config
from trimode.errors import ConfigError
from trimode.training.prepare import prepare
from trimode.training.shard_writer import write_split
from trimode.training.shards import TokenShards, token_dtype


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(make_config(tmp_path, shard_tokens=700))
    return tmp_path / "out"


def test_reads_across_shard_borders(folder: Path) -> None:
    """A window over a border is the one place where the stream is not one file."""
    shards = TokenShards.open(folder, "train", verify=True)
    files = sorted(folder.glob("train-*.bin"))
    assert len(files) > 2
    stream = np.concatenate([np.fromfile(file, dtype="<u2") for file in files])
    assert shards.num_tokens == len(stream)
    draw = random.Random(0)
    for _ in range(200):
        start = draw.randrange(len(stream) + 1)
        stop = draw.randrange(start, len(stream) + 1)
        window = shards.tokens(start, stop)
        assert window.dtype == np.int64
        np.testing.assert_array_equal(window, stream[start:stop])
    np.testing.assert_array_equal(np.flatnonzero(stream == 1) + 1, shards.document_ends)
    assert shards.document_ends.dtype == np.int64
    assert shards.num_documents == 6
    with pytest.raises(IndexError):
        shards.tokens(0, len(stream) + 1)


def test_documents_are_not_cut(folder: Path) -> None:
    """A shard that fills up in the middle of a document would lose its beginning token."""
    for file in folder.glob("train-*.bin"):
        tokens = np.fromfile(file, dtype="<u2")
        assert tokens[0] == 0
        assert tokens[-1] == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(f / "train-00001.bin"), r"train-00001\.bin is \d+ bytes, expected \d+"),
        (lambda f: (f / "train-00001.bin").unlink(), r"train-00001\.bin is missing"),
        (lambda f: cut(f / "train-00000.ends.npy"), r"train-00000\.ends\.npy is missing or"),
        (lambda f: (f / "train-00000.ends.npy").unlink(), r"train-00000\.ends\.npy is missing"),
        (
            lambda f: np.save(f / "train-00000.ends.npy", np.array([3, 5])),
            r"has 2 documents up to token 5, expected",
        ),
        (lambda f: (f / "manifest.json").unlink(), r"manifest\.json is missing; .* prepare"),
        (lambda f: cut(f / "manifest.json"), r"manifest\.json cannot be read as JSON"),
        (lambda f: edit(f, "format_version", 9), "format_version is 9, expected 1 or 2"),
        (lambda f: edit(f, "dtype", "uint32"), "dtype is 'uint32', expected 'uint16'"),
        (lambda f: edit(f, "extra", 1), "not the fields of a manifest"),
    ],
)
def test_damage_is_one_clear_error(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    """Reading past a truncated memory map kills the process with a bus error."""
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        TokenShards.open(folder, "train")


def test_verify_compares_checksums(folder: Path) -> None:
    """A flipped bit has the right size."""
    file = folder / "train-00000.bin"
    raw = bytearray(file.read_bytes())
    raw[10] ^= 1
    file.write_bytes(bytes(raw))
    TokenShards.open(folder, "train")
    with pytest.raises(ConfigError, match="has sha256"):
        TokenShards.open(folder, "train", verify=True)


def test_unknown_and_empty_split(folder: Path) -> None:
    """`held_out` without documents is a stream of no tokens, not a missing file."""
    empty = TokenShards.open(folder, "held_out")
    assert (empty.num_tokens, empty.num_documents, len(empty.tokens(0, 0))) == (0, 0, 0)
    with pytest.raises(ConfigError, match="split is 'test', expected one of train, held_out"):
        TokenShards.open(folder, "test")


def test_large_ids_survive(tmp_path: Path) -> None:
    """Ids above 65535 wrap around in sixteen bits."""
    assert (token_dtype(65_536), token_dtype(65_537)) == ("uint16", "uint32")
    document = np.array([70_000, 1, 131_071])
    record = write_split(
        tmp_path, "train", [document], dtype="uint32", shard_tokens=10, num_bytes=1
    )
    stored = np.fromfile(tmp_path / record.shards[0].file, dtype="<u4")
    np.testing.assert_array_equal(stored, document)


def cut(path: Path) -> None:
    """Takes the second half of a file away."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(folder: Path, field: str, value: object) -> None:
    """Changes one field of the manifest."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, field: value}))
