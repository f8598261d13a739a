"""Writing token shards: one split at a time, one shard after the other, each of them for good."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from trimode.training.manifest import ShardRecord, Split, SplitRecord
from trimode.training.shards import ends_path, supervised_path
from trimode.training.workspace import flush, write_whole


@dataclass(frozen=True, slots=True, eq=False)
class SupervisedDocument:
    """A document of which only some tokens are learned.

    Attributes:
        ids: [T] int64. End token included.
        is_supervised: [T] bool. What is learned.
    """

    ids: np.ndarray
    is_supervised: np.ndarray


def write_split(
    folder: Path,
    split: Split,
    documents: Iterable[np.ndarray] | Iterable[SupervisedDocument],
    *,
    dtype: str,
    shard_tokens: int,
    num_bytes: int,
    done: Sequence[ShardRecord] = (),
    on_shard: Callable[[ShardRecord], None] = lambda _: None,
) -> SplitRecord:
    """Writes the shards of one split; a shard is closed where the next document would overfill it.

    Args:
        folder: Existing folder to write into.
        split: Which split.
        documents: [T] integers each, end token included, in the order to be kept; or supervised
            documents, all of them. Those in `done` shards are not among them any more.
        dtype: From `token_dtype`.
        shard_tokens: Most tokens of a shard, unless one document alone has more.
        num_bytes: Size of the documents' text, for the record.
        done: Shards that an earlier run has written.
        on_shard: Called with every new shard once it is on disk.
    """
    shards = list(done)
    writer: _ShardWriter | None = None

    def close(writer: _ShardWriter) -> None:
        shards.append(writer.close())
        on_shard(shards[-1])

    try:
        for document in documents:
            ids = document.ids if isinstance(document, SupervisedDocument) else document
            if writer is not None and writer.num_tokens + len(ids) > shard_tokens:
                close(writer)
                writer = None
            if writer is None:
                writer = _ShardWriter(folder, f"{split}-{len(shards):05d}", dtype)
            writer.add(ids)
            if isinstance(document, SupervisedDocument):
                writer.supervised.append(document.is_supervised)
        if writer is not None:
            close(writer)
    finally:
        if writer is not None:
            writer.bin.close()
    return SplitRecord(
        num_tokens=sum(shard.num_tokens for shard in shards),
        num_documents=sum(shard.num_documents for shard in shards),
        num_bytes=num_bytes,
        shards=tuple(shards),
    )


class _ShardWriter:
    """One open shard."""

    def __init__(self, folder: Path, stem: str, dtype: str) -> None:
        self.path = folder / f"{stem}.bin"
        self.bin: IO[bytes] = self.path.open("wb")
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.digest = hashlib.sha256()
        self.num_tokens = 0
        self.ends: list[int] = []
        self.supervised: list[np.ndarray] = []

    def add(self, ids: np.ndarray) -> None:
        raw = ids.astype(self.dtype).tobytes()
        self.bin.write(raw)
        self.digest.update(raw)
        self.num_tokens += len(ids)
        self.ends.append(self.num_tokens)

    def close(self) -> ShardRecord:
        flush(self.bin)
        self.bin.close()
        supervised_sha256 = None
        if self.supervised:
            is_supervised = np.concatenate(self.supervised).astype(np.uint8)
            supervised_sha256 = _write_array(supervised_path(self.path), is_supervised)
        return ShardRecord(
            file=self.path.name,
            num_tokens=self.num_tokens,
            num_documents=len(self.ends),
            sha256=self.digest.hexdigest(),
            ends_sha256=_write_array(ends_path(self.path), np.array(self.ends, dtype="<i8")),
            supervised_sha256=supervised_sha256,
        )


def _write_array(path: Path, array: np.ndarray) -> str:
    """Writes an `.npy` file and returns its checksum.

    It is laid out in memory first: numpy's own writer does not say so when the disk is full.
    """
    raw = io.BytesIO()
    np.save(raw, array)
    write_whole(path, raw.getvalue())
    return hashlib.sha256(raw.getvalue()).hexdigest()
