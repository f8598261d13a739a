"""Rows of whole conversations, read as their specification: K = 4 unless said otherwise."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from tests.training.fake_stream import EOS, MASK, FakeChats, FakeStream
from trimode.errors import ConfigError
from trimode.training.conversation_packing import (
    ConversationSampler,
    first_fit,
    make_sampler,
    pack_conversations,
)
from trimode.training.corruption import corrupt
from trimode.training.objective import (
    TrainingBatch,
    count_targets,
    is_ar_target,
    is_diffusion_target,
)
from trimode.training.packing import RowSampler, Windows

T, F = True, False


def _pack(
    pieces: list[tuple[list[int], list[bool]]], row_len: int, block_length: int = 4
) -> dict[str, list]:
    row = pack_conversations(
        [(np.array(ids), np.array(flags)) for ids, flags in pieces],
        row_len=row_len,
        block_length=block_length,
        eos_token_id=EOS,
    )
    return {name: array.tolist() for name, array in row.items()}


TWO = [([0, 11, 12, 13, 14, 1], [F, F, F, T, T, T]), ([0, 21, 1], [F, T, T])]


def test_two_conversations_and_padding() -> None:
    """The layout by hand: fill after each conversation, and padding as a document of its own."""
    row = _pack(TWO, row_len=15)
    assert row["clean_ids"] == [0, 11, 12, 13, 14, 1, EOS, EOS, 0, 21, 1, EOS, EOS, EOS, EOS]
    assert row["document_ids"] == [0] * 8 + [1] * 4 + [2] * 3
    assert row["position_ids"] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 0, 1, 2]
    assert row["block_ids"] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 3
    assert row["is_block_start"] == [p % 4 == 0 for p in row["position_ids"]]
    assert row["is_supervised"] == [F, F, F, T, T, T, F, F, F, T, T, F, F, F, F]
    assert row["is_maskable"] == [F, F, F, T, T, T, T, T, F, T, T, T, F, F, F]


def test_full_row_has_no_padding() -> None:
    """A document of no tokens at the end of a row that is just full."""
    row = _pack(TWO, row_len=12)
    assert row["document_ids"] == [0] * 8 + [1] * 4
    assert row["block_ids"] == [0] * 4 + [1] * 4 + [2] * 4


def test_longer_than_the_row_is_cut_at_its_end() -> None:
    """A row growing beyond S, or fill put where the text only seems to end."""
    row = _pack([(list(range(3, 13)), [F] * 3 + [T] * 7)], row_len=6)
    assert row["clean_ids"] == [3, 4, 5, 6, 7, 8]
    assert row["is_supervised"] == row["is_maskable"] == [F, F, F, T, T, T]
    assert row["block_ids"] == [0, 0, 0, 0, 1, 1]


def test_fill_that_reaches_the_end_is_cut() -> None:
    """Six tokens are two blocks, of which a row of seven holds less."""
    row = _pack(TWO[:1], row_len=7)
    assert row["clean_ids"] == [0, 11, 12, 13, 14, 1, EOS]
    assert row["document_ids"] == [0] * 7


def test_first_fit_by_hand() -> None:
    """Items that overflow a row, or rows opened although an earlier one had room."""
    assert first_fit(np.array([5, 4, 3, 2, 6, 4, 2]), capacity=8) == [[0, 2], [1, 3, 6], [4], [5]]
    assert first_fit(np.array([8, 8]), capacity=8) == [[0], [1]]
    assert first_fit(np.array([], dtype=int), capacity=8) == []


LENS = [int(n) for n in np.random.default_rng(0).integers(3, 30, 80)]
PROMPTS = [max(1, n // 3) for n in LENS]


def _sampler(**changes: object) -> ConversationSampler:
    options = {"sequence_length": 40, "block_lengths": (4,), "seed": 3, **changes}
    return ConversationSampler(FakeChats(LENS, PROMPTS, seed=2), **options)  # type: ignore[arg-type]


def test_every_conversation_once_per_epoch_and_whole() -> None:
    """Conversations cut, lost or shown twice; all epochs in one order."""
    sampler = _sampler(block_lengths=(4, 6))
    first = [sampler.conversations(i) for i in range(sampler.num_rows)]
    assert sorted(n for row in first for n in row) == list(range(80))
    second = [sampler.conversations(i) for i in range(sampler.num_rows, sampler.num_rows + 5)]
    assert second != first[:5]
    assert any(len(row) > 2 for row in first)
    ends = sampler.stream.document_ends
    for sample, numbers in enumerate(first):
        rows = sampler.rows([sample])
        for place, number in enumerate(numbers):
            ids = sampler.stream.tokens(int(ends[number]) - LENS[number], int(ends[number]))
            here = rows.clean_ids[0][rows.document_ids[0] == place]
            assert here[: len(ids)].tolist() == ids.tolist()
            assert set(here[len(ids) :].tolist()) <= {EOS}


def test_rows_depend_on_their_index_alone() -> None:
    """A resumed run, or another rank, seeing other rows: also far on, and in any order."""
    samples = [0, 3, 59, 60, 61, 200, 7]
    together = _sampler(block_lengths=(2, 4, 5)).rows(samples)
    for place, sample in reversed(list(enumerate(samples))):
        alone = _sampler(block_lengths=(2, 4, 5)).rows([sample])
        assert torch.equal(alone.clean_ids[0], together.clean_ids[place])
        assert torch.equal(alone.block_ids[0], together.block_ids[place])
    assert _sampler(seed=4).conversations(0) != _sampler().conversations(0)


def test_every_epoch_is_whole_although_they_differ_in_length() -> None:
    """Conversations at the border of two epochs, left out or shown twice."""
    sampler = _sampler()
    seen: list[int] = []
    for sample in range(5 * sampler.num_rows):
        seen += sampler.conversations(sample)
    for epoch in range(4):
        assert sorted(seen[80 * epoch : 80 * (epoch + 1)]) == list(range(80))


def test_copies_share_their_row() -> None:
    """Complementary masks over two different rows hide nothing from anyone."""
    sampler = _sampler(num_copies=2, block_lengths=(2, 4))
    for sample in range(0, 20, 2):
        assert sampler.conversations(sample) == sampler.conversations(sample + 1)
        assert sampler.block_length(sample) == sampler.block_length(sample + 1)


def test_in_order_for_evaluation() -> None:
    """Held-out numbers over other rows in every run."""
    rows = [_sampler(is_shuffled=False, seed=s).conversations(0) for s in (1, 2)]
    assert rows[0] == rows[1]
    assert rows[0][0] == 0


def test_no_target_crosses_a_boundary_and_prompts_are_in_neither_loss() -> None:
    """A first word learned from another conversation; a prompt learned, or hidden by noise."""
    sampler = _sampler(block_lengths=(4, 6))
    samples = range(sampler.num_rows)
    rows = sampler.rows(samples)
    noise = corrupt(rows, samples, seed=0, mask_token_id=MASK, draft_share=0.3)
    batch = TrainingBatch(rows, noise)
    num_learned = sum(n - p for n, p in zip(LENS, PROMPTS, strict=True))
    counts = count_targets(batch)
    assert counts.num_ar_targets == num_learned
    is_target = is_ar_target(rows)
    assert (rows.document_ids[:, 1:] == rows.document_ids[:, :-1])[is_target].all()
    assert (rows.position_ids[:, 1:][is_target] > 0).all()
    is_prompt = torch.zeros_like(rows.is_supervised)
    is_padding = torch.zeros_like(rows.is_supervised)
    for sample in samples:
        numbers = sampler.conversations(sample)
        for place, number in enumerate(numbers):
            is_here = rows.document_ids[sample] == place
            is_prompt[sample] |= is_here & (rows.position_ids[sample] < PROMPTS[number])
        is_padding[sample] = rows.document_ids[sample] >= len(numbers)
    for is_out in (is_prompt, is_padding):
        assert is_out.any()
        assert not (rows.is_supervised & is_out).any()
        assert not (noise.is_masked & is_out).any()
        assert not (is_diffusion_target(rows, noise) & is_out).any()
    assert (noise.is_masked & ~rows.is_supervised).any()  # the fill is noised like text


def test_too_long_conversations_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Ends that are lost without a word, and rows in which there is nothing to learn."""
    stream = FakeChats([10, 30, 30, 8], [2, 5, 25, 2])
    sampler = ConversationSampler(stream, 20, (4,), 0)
    with caplog.at_level(logging.WARNING, logger="trimode"):
        seen = [n for sample in range(sampler.num_rows) for n in sampler.conversations(sample)]
    assert sorted(seen) == [0, 1, 3]
    assert sampler.num_truncated == 1
    assert "of 4 conversations, 1 are longer than sequence_length (20 tokens)" in caplog.text
    assert "1 have nothing to learn" in caplog.text
    nothing = ConversationSampler(FakeChats([30], [25]), 20, (4,), 0)
    with pytest.raises(ConfigError, match="no conversation of the split has anything to learn"):
        nothing.rows([0])


def test_the_kind_of_the_data_decides() -> None:
    """Conversations cut into rows like text."""
    chats = make_sampler(FakeChats([9, 9], [2, 2]), 12, (4,), 5, is_shuffled=False, num_copies=2)
    assert isinstance(chats, ConversationSampler)
    assert (chats.seed, chats.is_shuffled, chats.num_copies) == (5, False, 2)
    texts = make_sampler(FakeStream([9, 9]), 12, (4,), 5)
    assert texts == RowSampler(texts.stream, 12, (4,), 5)
    with pytest.raises(ConfigError, match="the split has 18 tokens, but one row"):
        make_sampler(FakeStream([9, 9]), 40, (4,), 5).rows([0])


def test_conversations_have_no_windows() -> None:
    """Prevents: a setting that does nothing, on data that cannot follow it."""
    with pytest.raises(ConfigError, match="infill_share is 0.5, but the data are conversations"):
        make_sampler(_sampler().stream, 40, (4,), 0, windows=Windows(0.5, 16))
