"""The joint objective against truth tables and a slow twin that packs nothing."""

import copy
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from tests.reference import next_logits
from tests.training.fake_stream import EOS, MASK, FakeStream
from trimode.model import DenseAttention, TriModeConfig, TriModeModel
from trimode.training.corruption import Corruption, corrupt, draft_pattern
from trimode.training.draft_accuracy import draft_accuracy
from trimode.training.dual_stream import ChunkedAttention, causal_mask, dual_stream_mask
from trimode.training.objective import (
    TargetCounts,
    TrainingBatch,
    count_targets,
    is_ar_target,
    loss_sums,
)
from trimode.training.packing import PackedRows, RowSampler

STREAM = FakeStream([13, 4, 30, 21, 50, 9, 40], seed=1)


@pytest.fixture(scope="module")
def model() -> TriModeModel:
    torch.manual_seed(0)
    config = TriModeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        mask_token_id=MASK,
        initializer_range=0.2,
    )
    return TriModeModel(config).double()


def _batch(samples: range = range(3), *, draft_share: float = 0.3) -> TrainingBatch:
    rows = RowSampler(STREAM, 40, (4, 8), seed=0).rows(samples)
    noise = corrupt(rows, samples, seed=0, mask_token_id=MASK, draft_share=draft_share)
    return TrainingBatch(rows, noise)


def _two_documents() -> PackedRows:
    """S = 4, K = 2: documents `a b` and `c d`, one block each... and a longer one below."""
    document = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])
    position = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
    return PackedRows(
        clean_ids=torch.tensor([[3, 4, 5, 6], [3, EOS, 5, 6]]),
        document_ids=document,
        position_ids=position,
        block_ids=torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]),
        is_block_start=position % 2 == 0,
        is_supervised=torch.ones(2, 4, dtype=torch.bool),
        is_maskable=torch.ones(2, 4, dtype=torch.bool),
    )


ONE_DOCUMENT_TABLE = """
    11.. ....
    11.. ....
    ..11 11..
    ..11 11..
    .... 1...
    .... 11..
    .... 111.
    .... 1111
"""
TWO_DOCUMENTS_TABLE = """
    11.. ....
    11.. ....
    ..11 ....
    ..11 ....
    .... 1...
    .... 11..
    .... ..1.
    .... ..11
"""


def _table(text: str) -> list[list[bool]]:
    return [[c == "1" for c in line.replace(" ", "")] for line in text.split("\n") if line.strip()]


def test_mask_truth_table() -> None:
    """Noisy tokens seeing their own clean block (the answer), later blocks, or another document."""
    attn_mask = dual_stream_mask(_two_documents())
    assert attn_mask.shape == (2, 1, 8, 8)
    assert attn_mask[0, 0].tolist() == _table(ONE_DOCUMENT_TABLE)
    assert attn_mask[1, 0].tolist() == _table(TWO_DOCUMENTS_TABLE)
    causal = causal_mask(_two_documents())
    assert causal[1, 0].tolist() == [line[4:] for line in _table(TWO_DOCUMENTS_TABLE)[4:]]


@pytest.mark.parametrize("chunk_len", [7, 16, 80])
def test_chunked_attention_equals_dense(chunk_len: int) -> None:
    """The CPU path dropping a key that some query of a chunk may see."""
    torch.manual_seed(0)
    attn_mask = dual_stream_mask(_batch().rows)
    query, key, value = (torch.randn(3, 80, n, 16, dtype=torch.float64) for n in (4, 2, 2))
    chunked = ChunkedAttention(attn_mask, chunk_len=chunk_len, part_len=40, dtype=torch.float64)
    dense = DenseAttention(attn_mask)
    torch.testing.assert_close(chunked(0, query, key, value), dense(0, query, key, value))


def test_ar_targets_stay_in_the_document_and_off_the_fill() -> None:
    """The first token of a document being predicted from the one before, or the fill learned."""
    rows = RowSampler(FakeStream([6, 6]), 12, (4,), seed=0).rows([0])
    assert rows.clean_ids[0].tolist()[5:9] == [EOS, EOS, EOS, 0]
    expected = [True] * 5 + [False] * 3 + [True] * 3
    assert is_ar_target(rows)[0].tolist() == expected


def test_slow_twin(model: TriModeModel) -> None:
    """Packing, the dual stream or the gathers changing a loss: each document is redone alone."""
    batch = _batch()
    sums, counts = loss_sums(model, batch), count_targets(batch)
    ar_sum, diffusion_sum, num_ar, num_maskable = _slow_losses(model, batch)
    assert counts == TargetCounts(num_ar, num_maskable)
    torch.testing.assert_close(sums.ar, ar_sum)
    torch.testing.assert_close(sums.diffusion, diffusion_sum)
    only_ar = loss_sums(model, TrainingBatch(batch.rows, None))
    torch.testing.assert_close(only_ar.ar, ar_sum)
    assert float(only_ar.diffusion) == 0


def _slow_losses(
    model: TriModeModel, batch: TrainingBatch
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """One document at a time, one block at a time, one token at a time; plain masks, no packing."""
    rows, noise = batch.rows, batch.noise
    assert noise is not None
    ar_sum = torch.zeros((), dtype=torch.float64)
    diffusion_sum = torch.zeros((), dtype=torch.float64)
    num_ar = num_maskable = 0
    for r in range(len(rows.clean_ids)):
        for d in rows.document_ids[r].unique():
            where = rows.document_ids[r] == d
            clean, noisy = rows.clean_ids[r][where], noise.noisy_ids[r][where]
            is_text = rows.is_supervised[r][where]
            logits = model(clean[None], pattern="causal").logits[0]
            for i in range(1, len(clean)):
                if is_text[i]:
                    ar_sum = ar_sum + F.cross_entropy(logits[i - 1], clean[i])
                    num_ar += 1
            for b in rows.block_ids[r][where].unique():
                block = (rows.block_ids[r][where] == b).nonzero()[:, 0].tolist()
                logits = _denoise(model, clean[: block[0]], noisy[block])
                for offset, i in enumerate(block):
                    num_maskable += int(is_text[i] and noise.is_maskable[r][where][i])
                    if noise.is_masked[r][where][i] and is_text[i]:
                        loss = F.cross_entropy(logits[offset], clean[i])
                        diffusion_sum = diffusion_sum + loss * noise.weight[r][where][i]
    return ar_sum, diffusion_sum, num_ar, num_maskable


def _denoise(model: TriModeModel, prefix: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """[K, V]. Logits of a noisy block after a clean, causal prefix: what decoding computes."""
    ids = torch.cat((prefix, block))[None]
    num_prefix, num_all = len(prefix), ids.shape[1]
    attn_mask = torch.ones(num_all, num_all, dtype=torch.bool).tril()
    attn_mask[num_prefix:, num_prefix:] = True
    hidden = model.encode(
        ids, torch.arange(num_all)[None], attend=DenseAttention(attn_mask[None, None])
    )
    return model.diffusion_head(hidden)[0, num_prefix:]


def _gradients(
    model: TriModeModel, batches: list[TrainingBatch], counts: TargetCounts
) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = loss_sums(model, batch).total(counts, diffusion_weight=0.3)
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1), (2, 2)])
def test_any_split_into_micro_batches_gives_the_same_step(
    model: TriModeModel, sizes: tuple[int, ...]
) -> None:
    """Averaging per micro-batch, which overweights those with few masked tokens."""
    whole = _batch(range(4))
    counts = count_targets(whole)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [_batch(range(s, s + n)) for s, n in zip(starts, sizes, strict=True)]
    assert sum((count_targets(part) for part in parts), start=TargetCounts(0, 0)) == counts
    loss, gradients = _gradients(model, [whole], counts)
    split_loss, split_gradients = _gradients(model, parts, counts)
    assert split_loss == pytest.approx(loss, rel=1e-12)
    for one, other in zip(gradients, split_gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_answer_does_not_leak(model: TriModeModel) -> None:
    """A masked position whose prediction changes with its own clean token or a later one."""
    batch = _batch(range(1), draft_share=0.0)
    rows, noise = batch.rows, batch.noise
    assert noise is not None
    place = int(noise.is_masked[0].nonzero()[5, 0])
    changed = rows.clean_ids.clone()
    block = rows.block_ids[0] == rows.block_ids[0, place]
    changed[0, block.nonzero()[0, 0] :] = 63
    only = Corruption(
        noisy_ids=noise.noisy_ids,
        is_masked=noise.is_masked & (torch.arange(40) == place),
        is_maskable=noise.is_maskable,
        weight=noise.weight,
    )
    hidden = []
    for ids in (rows.clean_ids, changed):
        kept = PackedRows(
            clean_ids=ids,
            document_ids=rows.document_ids,
            position_ids=rows.position_ids,
            block_ids=rows.block_ids,
            is_block_start=rows.is_block_start,
            is_supervised=rows.is_supervised,
            is_maskable=rows.is_maskable,
        )
        from trimode.training.objective import encode_dual_stream

        hidden.append(encode_dual_stream(model, TrainingBatch(kept, only))[0][0, place])
    torch.testing.assert_close(hidden[0], hidden[1])


def test_draft_accuracy_equals_decoding_block_by_block(model: TriModeModel) -> None:
    """Drafts at the wrong offsets, a verifier shifted by one, an unbanned mask, every hit counted
    instead of the run before the first miss, blocks with fill or cut blocks."""
    model = copy.deepcopy(model)
    model.diffusion_head.weight.data[5:] = 0  # few tokens to choose from: choices often agree
    rows = RowSampler(FakeStream([26, 6, 22], seed=2), 52, (4,), seed=0).rows([0])
    batch = TrainingBatch(rows, draft_pattern(rows, mask_token_id=MASK))
    found = draft_accuracy(model, batch, block_length=4)
    ids, documents = rows.clean_ids[0].tolist(), rows.document_ids[0].tolist()
    correct, agreed, accepted, text_accepted, num_blocks = [0] * 3, [0] * 3, 0, 0, 0
    for start in rows.is_block_start[0].nonzero()[:, 0].tolist():
        stop = start + 4
        if stop > 52 or not rows.is_supervised[0, start:stop].all():
            continue
        if documents[start] != documents[stop - 1]:
            continue
        num_blocks += 1
        prefix = ids[documents.index(documents[start]) : start]
        block = [ids[start], MASK, MASK, MASK]
        drafts = next_logits(model, prefix, block)[-3:].argmax(-1).tolist()
        verified = next_logits(model, [*prefix, *ids[start : stop - 1]])[-3:].argmax(-1).tolist()
        hits = [d == t for d, t in zip(drafts, ids[start + 1 : stop], strict=True)]
        agreements = [d == v for d, v in zip(drafts, verified, strict=True)]
        correct = [c + h for c, h in zip(correct, hits, strict=True)]
        agreed = [c + a for c, a in zip(agreed, agreements, strict=True)]
        text_accepted += [*hits, False].index(False)
        accepted += [*agreements, False].index(False)
    assert found.num_blocks == num_blocks == 6 + 1 + 4
    assert found.correct.tolist() == correct
    assert found.verifier_correct.tolist() == agreed
    assert (found.accepted, found.verifier_accepted) == (text_accepted, accepted)
    assert sum(agreed) > accepted > 0  # so that a run cut short tells them apart


def test_row_averages_by_hand(model: TriModeModel) -> None:
    """Sequence-wise averaging: long rows weighing more, or rows without targets being counted."""
    batch = _batch()
    supervised = batch.rows.is_supervised.clone()
    supervised[1, 5:] = False
    supervised[2] = False
    batch = replace(batch, rows=replace(batch.rows, is_supervised=supervised))
    averaged = replace(batch, is_row_averaged=True)
    assert count_targets(averaged) == TargetCounts(2, 2)
    found = loss_sums(model, averaged)
    ar = diffusion = 0.0
    for i in range(2):
        rows = PackedRows(
            **{f.name: getattr(batch.rows, f.name)[i : i + 1] for f in fields(PackedRows)}
        )
        assert batch.noise is not None
        noise = Corruption(
            **{f.name: getattr(batch.noise, f.name)[i : i + 1] for f in fields(Corruption)}
        )
        alone = TrainingBatch(rows, noise)
        sums, counts = loss_sums(model, alone), count_targets(alone)
        ar += float(sums.ar.detach()) / counts.num_ar_targets
        diffusion += float(sums.diffusion.detach()) / counts.num_maskable
    assert float(found.ar.detach()) == pytest.approx(ar, rel=1e-6)
    assert float(found.diffusion.detach()) == pytest.approx(diffusion, rel=1e-6)
