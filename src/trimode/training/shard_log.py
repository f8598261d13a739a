"""Which shards of an unfinished preparation are on disk for good."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np

from trimode.training.manifest import ShardRecord, Split
from trimode.training.shards import supervised_path
from trimode.training.workspace import Workspace

_NAME = "shards.json"


class ShardLog:
    """The finished shards by split, kept in the workspace."""

    def __init__(self, work: Workspace) -> None:
        """Reads what an earlier run has finished."""
        self._work = work
        self._records: dict[str, list[ShardRecord]] = {
            split: [ShardRecord(**record) for record in records]
            for split, records in (work.read(_NAME) or {}).items()
        }

    def shards(self, split: Split) -> list[ShardRecord]:
        """The finished shards of a split, in order."""
        return list(self._records.get(split, ()))

    def add(self, split: Split, record: ShardRecord) -> None:
        """Takes a shard for finished; its files must be on disk."""
        self._records.setdefault(split, []).append(record)
        fields = {name: [asdict(r) for r in records] for name, records in self._records.items()}
        self._work.write(_NAME, fields)

    @property
    def num_supervised(self) -> dict[str, int]:
        """Supervised tokens by split, of shards that say which they are."""
        counts: Counter[str] = Counter()
        for split, records in self._records.items():
            for record in records:
                path: Path = supervised_path(self._work.output / record.file)
                counts[split] += int(np.load(path, mmap_mode="r").sum()) if path.is_file() else 0
        return dict(counts)
