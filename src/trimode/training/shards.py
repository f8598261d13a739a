"""Token shards on disk: the format and its reader.

A folder holds `tokenizer/`, shards `train-00000.bin`, ... and `held_out-00000.bin`, ... of whole
documents as little-endian unsigned integers, beside each `X.bin` an `X.ends.npy` with the exclusive
ends of the documents in that shard, for conversations an `X.supervised.npy` with a 1 for every
token that is learned, and `manifest.json`, written last. What the documents are and where they come
from is the business of `prepare`; writing is that of `shard_writer`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from trimode.errors import ConfigError
from trimode.training.manifest import (
    MANIFEST_NAME,
    SPLITS,
    Kind,
    Manifest,
    ShardRecord,
    SplitRecord,
    token_dtype,
)


def ends_path(path: Path) -> Path:
    """Where the documents' ends of a shard are."""
    return path.with_suffix(".ends.npy")


def supervised_path(path: Path) -> Path:
    """Where it is said which tokens of a shard are supervised."""
    return path.with_suffix(".supervised.npy")


class TokenShards:
    """One split of prepared data, read through memory maps as a single stream of tokens.

    Attributes:
        folder: Where it was opened.
        split: `train` or `held_out`.
        manifest: All that is known about the data.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        manifest: Manifest,
        *,
        maps: list[np.ndarray],
        supervised: list[np.ndarray],
        ends: np.ndarray,
    ) -> None:
        """Use `open`."""
        self.folder = folder
        self.split = split
        self.manifest = manifest
        self._maps = maps
        self._supervised = supervised
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
        supervised: list[np.ndarray] = []
        ends: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
        start = 0
        record: SplitRecord = getattr(manifest, split)
        for shard in record.shards:
            file = folder / shard.file
            maps.append(_open_tokens(file, shard, manifest.dtype, verify=verify))
            ends.append(_open_ends(ends_path(file), shard, verify=verify) + start)
            if manifest.kind == "chat":
                supervised.append(_open_supervised(supervised_path(file), shard, verify=verify))
            start += shard.num_tokens
        document_ends = np.concatenate(ends)
        document_ends.flags.writeable = False
        return cls(folder, split, manifest, maps=maps, supervised=supervised, ends=document_ends)

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
    def kind(self) -> Kind:
        """`text`, or `chat` for conversations."""
        return self.manifest.kind

    @property
    def bos_token_id(self) -> int | None:
        """First token of every text, if the tokenizer has one."""
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
        return self._read(self._maps, start, stop, dtype=np.int64)

    def supervised(self, start: int, stop: int) -> np.ndarray:
        """Returns which of the tokens `start` to `stop` (exclusive) are to be learned.

        Returns:
            [stop - start] bool, a fresh array. All True for text.
        """
        if self.kind == "text":
            self._check(start, stop)
            return np.ones(stop - start, dtype=bool)
        return self._read(self._supervised, start, stop, dtype=bool)

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start}:{stop} of a split with {self.num_tokens} tokens")

    def _read(self, maps: list[np.ndarray], start: int, stop: int, *, dtype: type) -> np.ndarray:
        self._check(start, stop)
        out: np.ndarray = np.empty(stop - start, dtype=dtype)
        shard = max(0, int(np.searchsorted(self._starts, start, side="right")) - 1)
        filled = 0
        while filled < len(out):
            offset = start + filled - int(self._starts[shard])
            piece = maps[shard][offset : offset + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1
        return out


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


def _open_supervised(path: Path, shard: ShardRecord, *, verify: bool) -> np.ndarray:
    try:
        supervised = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(
            f"{path} is missing or damaged ({error}), expected what is supervised of "
            f"{shard.num_tokens} tokens; prepare the data again"
        ) from error
    if supervised.shape != (shard.num_tokens,) or supervised.dtype != np.uint8:
        raise ConfigError(
            f"{path} has {supervised.dtype} of shape {supervised.shape}, expected uint8 of shape "
            f"({shard.num_tokens},); prepare the data again"
        )
    if verify:
        _verify(path, shard.supervised_sha256 or "")
    return supervised


def _verify(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ConfigError(f"{path} has sha256 {found}, expected {expected}; prepare the data again")
