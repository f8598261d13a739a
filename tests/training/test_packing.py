"""Packing, read as its specification: S = 12, K = 4 unless said otherwise."""

import numpy as np
import pytest

from tests.training.fake_stream import BOS, EOS, FakeStream
from trimode.training.packing import RowSampler, pack_row


def _pack(ids: list[int], ends: list[int], block_length: int = 4) -> dict[str, list[int]]:
    row = pack_row(
        np.array(ids), np.array(ends, dtype=np.int64), block_length=block_length, eos_token_id=EOS
    )
    return {name: array.tolist() for name, array in row.items()}


def test_last_block_is_filled_with_eos_and_fill_is_not_supervised() -> None:
    """The end of a document showing through a short last block, or EOS fill being learned."""
    row = _pack([0, 11, 12, 13, 14, 1, 0, 21, 22, 23, 24, 25], ends=[6])
    assert row["clean_ids"] == [0, 11, 12, 13, 14, 1, EOS, EOS, 0, 21, 22, 23]
    assert row["is_supervised"] == [True] * 6 + [False] * 2 + [True] * 4
    assert row["document_ids"] == [0] * 8 + [1] * 4
    assert row["position_ids"] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert row["block_ids"] == [0] * 4 + [1] * 4 + [2] * 4
    assert row["is_block_start"] == [p % 4 == 0 for p in row["position_ids"]]


def test_document_cut_by_the_row_end_gets_no_fill() -> None:
    """Fill put after a cut piece would teach the model to end a text in the middle."""
    row = _pack([0, 11, 12, 13, 1, 0, 21, 22, 23, 24, 25, 26], ends=[5], block_length=3)
    assert row["clean_ids"] == [0, 11, 12, 13, 1, EOS, 0, 21, 22, 23, 24, 25]
    assert row["block_ids"] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_row_that_is_one_piece() -> None:
    """An empty list of ends, or an end exactly at the row's end, breaking the layout."""
    ids = list(range(3, 15))
    for ends in ([], [12]):
        row = _pack(ids, ends)
        assert row["clean_ids"] == ids
        assert row["position_ids"] == list(range(12))
        assert all(row["is_supervised"])


def test_ended_document_at_row_end_has_its_fill_cut() -> None:
    """A row growing beyond S."""
    row = _pack(list(range(3, 13)), ends=[10])
    assert len(row["clean_ids"]) == 10
    assert row["block_ids"] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("block_length", [2, 3, 8, 16])
def test_slow_twin(block_length: int) -> None:
    """The vectorised layout differing from the rule, token by token."""
    rng = np.random.default_rng(block_length)
    for _ in range(50):
        stream = FakeStream([int(n) for n in rng.integers(2, 40, 30)])
        start = int(rng.integers(0, stream.num_tokens - 64))
        ids = stream.tokens(start, start + 64)
        ends = [int(e) - start for e in stream.document_ends if start < e <= start + 64]
        row = _pack(ids.tolist(), ends, block_length)
        expected = _slow_pack(ids.tolist(), ends, block_length)
        for name, values in expected.items():
            assert row[name] == values, name


def _slow_pack(ids: list[int], ends: list[int], block_length: int) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {
        "clean_ids": [],
        "document_ids": [],
        "position_ids": [],
        "block_ids": [],
        "is_supervised": [],
    }
    document = position = 0
    block = -1

    def put(token: int, is_text: bool) -> None:
        nonlocal position, block
        if position % block_length == 0:
            block += 1
        for name, value in zip(out, (token, document, position, block, is_text), strict=True):
            out[name].append(value)
        position += 1

    for place, token in enumerate(ids):
        put(token, True)
        if place + 1 in ends:
            while position % block_length:
                put(EOS, False)
            document, position = document + 1, 0
    return {name: values[: len(ids)] for name, values in out.items()}


def test_every_row_once_per_epoch_in_an_order_of_its_own() -> None:
    """Rows repeated or left out within an epoch, or all epochs in the same order."""
    sampler = RowSampler(FakeStream([100] * 10), 20, (4,), seed=5)
    first = [sampler.row_index(i) for i in range(50)]
    second = [sampler.row_index(i) for i in range(50, 100)]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != [RowSampler(sampler.stream, 20, (4,), seed=6).row_index(i) for i in range(50)]


def test_rows_depend_on_their_index_alone() -> None:
    """A resumed run or another micro-batch split reading other rows or block lengths."""
    sampler = RowSampler(FakeStream([37, 5, 90, 64, 200]), 20, (2, 4, 5), seed=1)
    together = sampler.rows(range(30))
    for index in (0, 7, 29):
        alone = sampler.rows([index])
        assert alone.clean_ids[0].tolist() == together.clean_ids[index].tolist()
        assert alone.block_ids[0].tolist() == together.block_ids[index].tolist()
    assert len({sampler.block_length(i) for i in range(30)}) == 3


def test_positions_restart_at_every_document() -> None:
    """Positions running on into the next document, unlike in decoding."""
    sampler = RowSampler(FakeStream([7, 9, 30, 14]), 60, (4,), seed=0, is_shuffled=False)
    rows = sampler.rows([0])
    is_start = rows.clean_ids[0] == BOS
    assert rows.position_ids[0][is_start].tolist() == [0] * int(is_start.sum())
