"""Where the tokens of a forward lie and what they see: flat arrays for the native step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimode.model.attention import RowFeed


@dataclass(frozen=True, slots=True)
class Fed:
    """What one forward is fed, as flat arrays: P tokens in packed order.

    Attributes:
        rows: [P] int32. K/V row of each.
        cells: [P] int32. Cell that its K/V is written to.
        prefixes: [P] int32. Cells that it sees from 0 on: the committed ones and trunk tokens.
        starts, stops: [P] int32. Cells of its own group, which it sees as well; equal if none.
    """

    rows: np.ndarray
    cells: np.ndarray
    prefixes: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def of(cls, feeds: Sequence[RowFeed]) -> Fed:
        """Lay out what sequences feed. See `masks.fed_mask` for who sees what.

        Raises:
            AssertionError: trunk tokens are not first and by position, or a group's are no
                neighbours.
        """
        rows: list[int] = []
        cells: list[int] = []
        prefixes: list[int] = []
        starts: list[int] = []
        stops: list[int] = []
        for feed in feeds:
            length, num_tokens = feed.length, len(feed.groups)
            num_trunk = feed.num_trunk
            if num_trunk and feed.positions[num_trunk - 1] - feed.positions[0] != num_trunk - 1:
                raise AssertionError(f"trunk tokens at {list(feed.positions)[:num_trunk]}")
            rows += [feed.row] * num_tokens
            cells += range(length, length + num_tokens)
            prefixes += range(length + 1, length + num_trunk + 1)
            starts += [0] * num_trunk
            stops += [0] * num_trunk
            if num_trunk < num_tokens:
                first_position = feed.positions[0]
                runs = list(feed.group_runs())
                if len(runs) != len({feed.groups[first] for first, _ in runs}):
                    raise AssertionError(f"groups in pieces: {list(feed.groups)}")
                for first, stop in runs:
                    sees = min(max(feed.anchors[first] - first_position + 1, 0), num_trunk)
                    size = stop - first
                    prefixes += [length + sees] * size
                    starts += [length + first] * size
                    stops += [length + stop] * size
        return cls(*np.array([rows, cells, prefixes, starts, stops], dtype=np.int32))
