"""Token shards on disk: the format, its writer and its reader.

A folder holds `tokenizer/`, shards `train-00000.bin`, ... and `held_out-00000.bin`, ... of whole
documents as little-endian unsigned integers, beside each `X.bin` an `X.ends.npy` with the exclusive
ends of the documents in that shard, and `manifest.json`, written last. What the documents are and
where they come from is the business of `prepare`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from trimode.errors import ConfigError
from trimode.training.manifest import (
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    ShardRecord,
    Split,
    SplitRecord,
)


def token_dtype(vocab_size: int) -> str:
    """Returns the narrowest of `uint16` and `uint32` that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def write_split(
    folder: Path,
    split: Split,
    documents: Iterable[np.ndarray],
    *,
    dtype: str,
    shard_tokens: int,
    num_bytes: int,
) -> SplitRecord:
    """Writes the shards of one split; a shard is closed where the next document would overfill it.

    Args:
        folder: Existing folder to write into.
        split: Which split.
        documents: [T] integers each, end token included, in the order to be kept.
        dtype: From `token_dtype`.
        shard_tokens: Most tokens of a shard, unless one document alone has more.
        num_bytes: Size of the documents' text, for the record.
    """
    shards: list[ShardRecord] = []
    writer: _ShardWriter | None = None
    try:
        for document in documents:
            if writer is not None and writer.num_tokens + len(document) > shard_tokens:
                shards.append(writer.close())
                writer = None
            if writer is None:
                writer = _ShardWriter(folder, f"{split}-{len(shards):05d}", dtype)
            writer.add(document)
        if writer is not None:
            shards.append(writer.close())
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

    def add(self, document: np.ndarray) -> None:
        raw = document.astype(self.dtype).tobytes()
        self.bin.write(raw)
        self.digest.update(raw)
        self.num_tokens += len(document)
        self.ends.append(self.num_tokens)

    def close(self) -> ShardRecord:
        self.bin.close()
        ends_path = _ends_path(self.path)
        np.save(ends_path, np.array(self.ends, dtype="<i8"))
        return ShardRecord(
            file=self.path.name,
            num_tokens=self.num_tokens,
            num_documents=len(self.ends),
            sha256=self.digest.hexdigest(),
            ends_sha256=hashlib.sha256(ends_path.read_bytes()).hexdigest(),
        )


class TokenShards:
    """One split of prepared data, read through memory maps as a single stream of tokens.

    Attributes:
        folder: Where it was opened.
        split: `train` or `held_out`.
        manifest: All that is known about the data.
    """

    def __init__(
        self, folder: Path, split: str, manifest: Manifest, maps: list[np.ndarray], ends: np.ndarray
    ) -> None:
        """Use `open`."""
        self.folder = folder
        self.split = split
        self.manifest = manifest
        self._maps = maps
        self._starts = np.cumsum([0, *(len(tokens) for tokens in maps)])
        self._ends = ends

    @classmethod
    def open(cls, folder: str | Path, split: str, *, verify: bool = False) -> TokenShards:
        """Opens a split of a folder made by `trimode prepare`.

        Args:
            folder: The folder.
            split: `train` or `held_out`.
            verify: Also compare checksums, which reads every byte.

        Raises:
            ConfigError: A shard is missing, truncated or not what the manifest says.
        """
        if split not in SPLITS:
            raise ConfigError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest.dtype != token_dtype(manifest.vocab_size):
            raise ConfigError(
                f"{folder / MANIFEST_NAME}: dtype is {manifest.dtype!r}, expected "
                f"{token_dtype(manifest.vocab_size)!r} for {manifest.vocab_size} ids"
            )
        maps: list[np.ndarray] = []
        ends: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
        start = 0
        record: SplitRecord = getattr(manifest, split)
        for shard in record.shards:
            maps.append(_open_tokens(folder / shard.file, shard, manifest.dtype, verify=verify))
            ends.append(_open_ends(_ends_path(folder / shard.file), shard, verify=verify) + start)
            start += shard.num_tokens
        document_ends = np.concatenate(ends)
        document_ends.flags.writeable = False
        return cls(folder, split, manifest, maps, document_ends)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the split."""
        return int(self._starts[-1])

    @property
    def num_documents(self) -> int:
        """Number of documents of the split."""
        return len(self._ends)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return self.manifest.vocab_size

    @property
    def bos_token_id(self) -> int:
        """First token of every document."""
        return self.manifest.bos_token_id

    @property
    def eos_token_id(self) -> int:
        """Last token of every document."""
        return self.manifest.eos_token_id

    @property
    def mask_token_id(self) -> int:
        """The mask token."""
        return self.manifest.mask_token_id

    @property
    def document_ends(self) -> np.ndarray:
        """[num_documents] int64, read-only. Exclusive end of each document in the stream."""
        return self._ends

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start` to `stop` (exclusive) of the stream, across shards where needed.

        Returns:
            [stop - start] int64, a fresh array.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of a split with {self.num_tokens} tokens")
        out = np.empty(stop - start, dtype=np.int64)
        shard = max(0, int(np.searchsorted(self._starts, start, side="right")) - 1)
        filled = 0
        while filled < len(out):
            offset = start + filled - int(self._starts[shard])
            piece = self._maps[shard][offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1
        return out


def _ends_path(path: Path) -> Path:
    return path.with_suffix(".ends.npy")


def _open_tokens(path: Path, shard: ShardRecord, dtype: str, *, verify: bool) -> np.ndarray:
    kind = np.dtype(dtype).newbyteorder("<")
    expected = shard.num_tokens * kind.itemsize
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        size = "missing" if found is None else f"{found} bytes"
        raise ConfigError(f"{path} is {size}, expected {expected} bytes; prepare the data again")
    if verify:
        _verify(path, shard.sha256)
    return np.memmap(path, dtype=kind, mode="r")


def _open_ends(path: Path, shard: ShardRecord, *, verify: bool) -> np.ndarray:
    try:
        ends = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"{path} is missing or damaged ({error}), expected the ends of "
            f"{shard.num_documents} documents; prepare the data again"
        ) from error
    last = int(ends[-1]) if ends.ndim == 1 and len(ends) else 0
    if len(ends) != shard.num_documents or last != shard.num_tokens:
        raise ConfigError(
            f"{path} has {len(ends)} documents up to token {last}, expected "
            f"{shard.num_documents} up to {shard.num_tokens}; prepare the data again"
        )
    if verify:
        _verify(path, shard.ends_sha256)
    return ends.astype(np.int64)


def _verify(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ConfigError(f"{path} has sha256 {found}, expected {expected}; prepare the data again")
