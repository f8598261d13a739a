"""One round in every block of packed rows, against truth tables and decoding done one block at a
time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.training.fake_stream import EOS, MASK, FakeStream
from trimode.model import AdapterSwitch, DenseAttention, DrafterAdapter, TriModeConfig, TriModeModel
from trimode.training.config import DrafterPart
from trimode.training.draft_noise import draw_slots, gumbel_noise
from trimode.training.draft_round import (
    DraftBatch,
    Round,
    draft_mask,
    draftable,
    play_round,
    verify_mask,
)
from trimode.training.drafter import make_draft_batch, round_sums
from trimode.training.drafter_loss import place_losses
from trimode.training.packing import RowSampler

STREAM = FakeStream([13, 4, 30, 21, 50, 9, 40], seed=1)
PART = DrafterPart(top_k=5)

Adapters = Callable[..., DrafterAdapter]


@pytest.fixture(scope="module")
def model() -> TriModeModel:
    torch.manual_seed(0)
    config = TriModeConfig(
        vocab_size=64,
        num_valid_tokens=60,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        mask_token_id=MASK,
        initializer_range=0.1,
    )
    return TriModeModel(config).double().requires_grad_(False)


def make_batch(samples: range, *, sampled_share: float = 0.7) -> DraftBatch:
    sampler = RowSampler(STREAM, 40, (4, 8), seed=0)
    return make_draft_batch(sampler, samples, seed=0, sampled_share=sampled_share, eos_token_id=EOS)


def table(text: str) -> list[list[bool]]:
    return [[c == "1" for c in line.replace(" ", "")] for line in text.split("\n") if line.strip()]


DRAFT_TABLE = """
    11.... ......
    11.... ......
    ..11.. 11....
    ..11.. 11....
    ....11 ......
    ....11 ......
"""
VERIFY_TABLE = """
    1..... ......
    11.... ......
    ..1... 11....
    ..11.. 11....
    ....1. ......
    ....11 ......
"""


def test_masks_truth_table() -> None:
    """A draft that sees the answer or another document; a verifier that sees later drafts.

    S = 6, K = 2: a document of two blocks, then one of one block.
    """
    rows = RowSampler(FakeStream([4, 2]), 6, (2,), seed=0).rows([0])
    assert draft_mask(rows)[0, 0].tolist() == table(DRAFT_TABLE)
    assert verify_mask(rows)[0, 0].tolist() == table(VERIFY_TABLE)


def test_draftable_blocks() -> None:
    """A block begun by fill or EOS, or cut at the row's end, which decoding never drafts.

    K = 4: text; text and fill; text; EOS and fill; a block cut after two tokens.
    """
    rows = RowSampler(FakeStream([6, 5, 7]), 18, (4,), seed=0).rows([0])
    got = draftable(rows, torch.tensor([4]), eos_token_id=EOS)[0]
    assert got.int().tolist() == [0, 1, 1, 1] + [0, 1, 1, 1] + [0, 1, 1, 1] + [0] * 4 + [0, 0]


def test_noise_is_gumbel_and_samples_the_law() -> None:
    """Noise of another law, or the same noise at different places."""
    keys = torch.randint(-(2**31), 2**31, (4000,), generator=torch.Generator().manual_seed(0))
    noise = gumbel_noise(keys.int(), 50)
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(1.6449, abs=0.03)
    law = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = (noise[:, :4] + law.log()).argmax(1).bincount(minlength=4) / 4000
    torch.testing.assert_close(counts, law, rtol=0, atol=0.03)
    both = torch.corrcoef(torch.stack((noise[:-1].flatten(), noise[1:].flatten())))[0, 1]
    assert abs(float(both)) < 0.01
    assert gumbel_noise(keys.int()[7:8], 50).equal(noise[7:8])


def test_slots_are_whole_blocks_of_the_stated_share() -> None:
    """A block half greedy and half sampled; a share that is not the one asked for."""
    rows = RowSampler(STREAM, 40, (4,), seed=0).rows(range(64))
    is_sampled, _ = draw_slots(rows, range(64), seed=0, sampled_share=0.9)
    first = is_sampled & rows.is_block_start
    share = int(first.sum()) / int(rows.is_block_start.sum())
    assert share == pytest.approx(0.9, abs=0.04)
    for row, block_ids in zip(is_sampled, rows.block_ids, strict=True):
        for block in block_ids.unique():
            assert len(row[block_ids == block].unique()) == 1


@pytest.mark.parametrize("sampled_share", [0.0, 1.0])
def test_slow_twin(model: TriModeModel, random_adapter: Adapters, sampled_share: float) -> None:
    """Packing, masks, the shared text or the gathers changing a round: each block is redone alone,
    with the adapter switched per token and the drafts verified one by one."""
    adapter = random_adapter(model, strength=0.3)
    batch = make_batch(range(4), sampled_share=sampled_share)
    played = play_round(model, batch, adapter=adapter, eos_token_id=EOS)
    sums = round_sums(model, batch, played, part=PART)
    slow = _slow_rounds(model, adapter, batch)
    accepted = {place for place, is_accepted, _ in slow.places if is_accepted}
    assert set(played.places[played.is_active].tolist()) == {place for place, _, _ in slow.places}
    assert set(played.places[played.is_accepted].tolist()) == accepted
    assert len(slow.lens) == batch.num_blocks
    assert len(set(slow.lens)) > 2, "too few acceptance lengths to prove anything"
    torch.testing.assert_close(sums.lk, slow.lk)
    torch.testing.assert_close(sums.ce, slow.ce)
    assert int(sums.num_accepted) == len(accepted)


def test_accepted_eos_ends_the_round(model: TriModeModel, random_adapter: Adapters) -> None:
    """Places after the end of a text in the loss, where the AR view means nothing."""
    adapter, batch = random_adapter(model, strength=0.3), make_batch(range(4))
    slow = _slow_rounds(model, adapter, batch)
    followed = [
        draft
        for (place, is_accepted, draft), (next_place, *_) in zip(
            slow.places[:-1], slow.places[1:], strict=True
        )
        if is_accepted and next_place == place + 1
    ]
    eos_token_id = max(set(followed), key=followed.count)
    played = play_round(model, batch, adapter=adapter, eos_token_id=eos_token_id)
    shorter = _slow_rounds(model, adapter, batch, eos_token_id=eos_token_id)
    assert len(shorter.places) < len(slow.places)
    active = set(played.places[played.is_active].tolist())
    assert active == {place for place, _, _ in shorter.places}


class _Slow:
    """Active places (place, whether accepted, draft), acceptance lengths and sums of losses."""

    def __init__(self) -> None:
        self.places: list[tuple[int, bool, int]] = []
        self.lens: list[int] = []
        self.lk = self.ce = torch.zeros((), dtype=torch.float64)


def _slow_rounds(
    model: TriModeModel, adapter: DrafterAdapter, batch: DraftBatch, *, eos_token_id: int = EOS
) -> _Slow:
    rows, slow = batch.rows, _Slow()
    for r in range(len(rows.clean_ids)):
        for b in rows.block_ids[r].unique():
            block = (rows.block_ids[r] == b).nonzero()[:, 0].tolist()
            if not batch.is_drafted[r, block[-1]]:
                continue
            first = block[0]
            start = first - int(rows.position_ids[r, first])
            prefix = rows.clean_ids[r, start : first + 1].tolist()
            draft_laws = _draft_logits(model, adapter, prefix, len(block))
            ids, losses, num_accepted = list(prefix), [], 0
            for offset, place in enumerate(block[1:], start=1):
                law = _ban(model(torch.tensor([ids])).logits[0, -1])
                noise = gumbel_noise(batch.noise_keys[r, place : place + 1], 64)[0]
                noise = noise * batch.is_sampled[r, place]
                draft = int((draft_laws[offset] + noise).argmax())
                is_accepted = draft == int((law + noise).argmax())
                losses.append(_losses(draft_laws[offset], law))
                slow.places.append((r * len(rows.clean_ids[r]) + place, is_accepted, draft))
                num_accepted += is_accepted
                if not is_accepted or draft == eos_token_id:
                    break
                ids.append(draft)
            slow.lens.append(num_accepted)
            slow.lk = slow.lk + torch.stack([lk for lk, _ in losses]).mean()
            slow.ce = slow.ce + torch.stack([ce for _, ce in losses]).mean()
    return slow


def _draft_logits(
    model: TriModeModel, adapter: DrafterAdapter, prefix: list[int], block_length: int
) -> Tensor:
    """[K, V]. The drafter on `[prefix, masks]`, whose last prefix token begins the block."""
    ids = torch.tensor([prefix + [MASK] * (block_length - 1)])
    num_text, num_all = len(prefix) - 1, ids.shape[1]
    attn_mask = torch.ones(num_all, num_all, dtype=torch.bool).tril()
    attn_mask[num_text:, num_text:] = True
    is_on = torch.arange(num_all)[:, None] >= num_text
    hidden = model.encode(
        ids,
        torch.arange(num_all)[None],
        attend=DenseAttention(attn_mask[None, None]),
        adapter=AdapterSwitch(adapter, is_on),
    )
    return _ban(model.diffusion_head(hidden)[0, num_text:])


def _ban(logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[..., MASK] = -torch.inf
    logits[..., 60:] = -torch.inf
    return logits


def _losses(draft: Tensor, verifier: Tensor) -> tuple[Tensor, Tensor]:
    best = verifier.argmax()[None]
    found = place_losses(draft[None], verifier[None], best, temperature=3.0, top_k=5, eta=0.5)
    return found.lk[0], found.ce[0]


def _gradients(
    model: TriModeModel, adapter: DrafterAdapter, samples: list[range]
) -> tuple[float, list[Tensor]]:
    adapter.requires_grad_(True).zero_grad()
    total = 0.0
    for some in samples:
        batch = make_batch(some)
        played: Round = play_round(model, batch, adapter=adapter, eos_token_id=EOS)
        sums = round_sums(model, batch, played, part=PART)
        (sums.lk + sums.ce).backward()
        total += float((sums.lk + sums.ce).detach())
    return total, [p.grad.clone() for p in adapter.parameters() if p.grad is not None]


def test_any_split_into_micro_batches_gives_the_same_step(
    model: TriModeModel, random_adapter: Adapters
) -> None:
    """Noise or slots that depend on where in a batch a row is."""
    adapter = random_adapter(model, strength=0.3)
    loss, gradients = _gradients(model, adapter, [range(4)])
    split_loss, split = _gradients(model, adapter, [range(1), range(1, 4)])
    assert split_loss == pytest.approx(loss, rel=1e-12)
    assert len(gradients) == len(list(adapter.parameters()))
    for one, other in zip(gradients, split, strict=True):
        assert float(one.abs().max()) > 0
        torch.testing.assert_close(one, other)


def test_nothing_to_draft(model: TriModeModel, random_adapter: Adapters) -> None:
    """A micro-batch of cut documents that stops the run."""
    adapter = random_adapter(model).requires_grad_(True)
    batch = make_batch(range(1))
    none = DraftBatch(
        batch.rows, torch.zeros_like(batch.is_drafted), batch.is_sampled, batch.noise_keys
    )
    played = play_round(model, none, adapter=adapter, eos_token_id=EOS)
    sums = round_sums(model, none, played, part=PART)
    (sums.lk + sums.ce).backward()
    assert none.num_blocks == 0
    assert float(sums.lk.detach()) == 0
