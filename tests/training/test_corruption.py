"""Noise: its law, its weights, and that it depends on seed and sample alone."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.training.fake_stream import MASK, FakeStream
from trimode.training.corruption import (
    MASK_RATIO_EPS,
    Corruption,
    block_offsets,
    corrupt,
    draft_pattern,
    late_heavy,
    mask_chance,
)
from trimode.training.packing import PackedRows, RowSampler, Windows

SAMPLER = RowSampler(FakeStream([50, 3, 77, 130, 9, 400]), 64, (4, 8), seed=3)


def test_noise_depends_on_seed_and_sample_alone() -> None:
    """Noise that changes with the micro-batch split or after a resume."""
    rows = SAMPLER.rows(range(8))
    together = corrupt(rows, range(8), seed=1, mask_token_id=MASK, draft_share=0.5)
    for i in range(8):
        alone = corrupt(SAMPLER.rows([i]), [i], seed=1, mask_token_id=MASK, draft_share=0.5)
        assert torch.equal(alone.noisy_ids[0], together.noisy_ids[i])
        assert torch.equal(alone.weight[0], together.weight[i])
    other = corrupt(rows, range(8), seed=2, mask_token_id=MASK, draft_share=0.5)
    assert not torch.equal(other.is_masked, together.is_masked)


def test_torch_random_state_is_left_alone() -> None:
    """Noise drawn from the global generator, which ties it to everything else that draws."""
    before = torch.get_rng_state()
    corrupt(SAMPLER.rows([0]), [0], seed=1, mask_token_id=MASK)
    assert torch.equal(before, torch.get_rng_state())


def test_masked_positions_show_the_mask_and_others_the_text() -> None:
    """noisy_ids and is_masked disagreeing."""
    rows = SAMPLER.rows(range(8))
    noise = corrupt(rows, range(8), seed=0, mask_token_id=MASK, draft_share=0.3)
    assert (noise.noisy_ids[noise.is_masked] == MASK).all()
    assert torch.equal(noise.noisy_ids[~noise.is_masked], rows.clean_ids[~noise.is_masked])
    assert not (noise.is_masked & ~noise.is_maskable).any()


def test_ratio_is_uniform_per_row_and_weight_is_its_inverse() -> None:
    """t drawn per token or per batch, or weights that do not make the masked sum unbiased."""
    samples = range(3000)
    rows = SAMPLER.rows([i % SAMPLER.num_rows for i in samples])
    noise = corrupt(rows, samples, seed=0, mask_token_id=MASK)
    assert (noise.weight == noise.weight[:, :1]).all()
    ratio = 1 / noise.weight[:, 0]
    counts = torch.histc(ratio, bins=10, min=0, max=1)
    assert ((counts - 300).abs() < 5 * 300**0.5).all()
    share = noise.is_masked.float().mean(1)
    assert ((share - ratio).abs() < 6 * 0.5 / 64**0.5).all()
    assert abs(float((noise.is_masked * noise.weight).mean()) - 1) < 0.1


def test_draft_share_shows_blocks_as_decoding_does() -> None:
    """Drafted blocks with other positions clean, a weight not 1, or a maskable first token."""
    rows = SAMPLER.rows(range(8))
    noise = corrupt(rows, range(8), seed=0, mask_token_id=MASK, draft_share=1.0)
    pattern = draft_pattern(rows, mask_token_id=MASK)
    assert torch.equal(noise.is_masked, ~rows.is_block_start)
    assert torch.equal(noise.is_maskable, ~rows.is_block_start)
    assert (noise.weight == 1).all()
    assert torch.equal(pattern.noisy_ids, noise.noisy_ids)


def test_draft_share_is_drawn_per_block() -> None:
    """Whole rows, or single tokens, drawn in the pattern of decoding."""
    samples = range(400)
    rows = SAMPLER.rows([i % SAMPLER.num_rows for i in samples])
    noise = corrupt(rows, samples, seed=0, mask_token_id=MASK, draft_share=0.25)
    is_drafted = ~noise.is_maskable
    assert not (is_drafted & ~rows.is_block_start).any()
    share = is_drafted.sum() / rows.is_block_start.sum()
    assert abs(float(share) - 0.25) < 0.03
    mixed = is_drafted.any(1) & (rows.is_block_start & ~is_drafted).any(1)
    assert mixed.float().mean() > 0.9


def test_mask_chance_by_hand() -> None:
    """A chance of 0, whose weight is infinite, or of 1 where the complement's would be."""
    ratio = torch.tensor([0.0, 0.5, 1.0])
    plain = torch.tensor([MASK_RATIO_EPS, 0.5 + MASK_RATIO_EPS / 2, 1.0])
    both = torch.tensor([MASK_RATIO_EPS, 0.5, 1 - MASK_RATIO_EPS])
    torch.testing.assert_close(mask_chance(ratio), plain)
    torch.testing.assert_close(mask_chance(ratio, is_complementary=True), both)


def test_late_heavy_by_hand() -> None:
    """Exponents that fall with the wrong offset or half-life: sixteenth, its root, its 4th root."""
    chance = torch.full((1, 6), 1 / 16)
    offsets = torch.tensor([[0, 2, 4, 0, 1, 4]])
    found = late_heavy(chance, offsets, half_life=2.0)
    by_hand = [1 / 16, 1 / 4, 1 / 2, 1 / 16, (1 / 16) ** 0.5**0.5, 1 / 2]
    torch.testing.assert_close(found, torch.tensor([by_hand]))


def test_block_offsets_restart_at_every_block() -> None:
    """Offsets counted through a document, or through the row."""
    rows = SAMPLER.rows(range(8))
    for starts, offsets in zip(rows.is_block_start, block_offsets(rows), strict=True):
        count = -1
        for is_start, offset in zip(starts.tolist(), offsets.tolist(), strict=True):
            count = 0 if is_start else count + 1
            assert offset == count


def test_late_heavy_weights_keep_the_loss_unbiased() -> None:
    """Masks drawn at one chance and weighed by another."""
    samples = range(4000)
    rows = SAMPLER.rows([i % SAMPLER.num_rows for i in samples])
    noise = corrupt(rows, samples, seed=0, mask_token_id=MASK, late_half_life=2.0)
    offsets = block_offsets(rows)
    for offset in (0, 3):
        at = offsets == offset
        assert abs(float((noise.is_masked * noise.weight)[at].mean()) - 1) < 0.1
    assert noise.is_masked[offsets == 3].float().mean() > 0.6  # 1 / (1 + 2^-1.5) = 0.74


def test_ratio_per_block() -> None:
    """One ratio for all blocks of a row, or another for each token."""
    rows = SAMPLER.rows(range(8))
    noise = corrupt(rows, range(8), seed=0, mask_token_id=MASK, ratio_per="block")
    for block_ids, weight in zip(rows.block_ids, noise.weight, strict=True):
        by_block = {int(b): weight[block_ids == b].unique().numel() for b in block_ids.unique()}
        assert set(by_block.values()) == {1}
        assert weight.unique().numel() == len(by_block)


@pytest.mark.parametrize("late_half_life", [None, 3.0])
@pytest.mark.parametrize("ratio_per", ["sequence", "block"])
def test_complementary_masks_hide_every_token_once(
    late_half_life: float | None, ratio_per: str
) -> None:
    """Pairs of different rows, tokens hidden twice or never, weights of the wrong half."""
    sampler = replace(SAMPLER, num_copies=2)
    samples = range(8)
    rows = sampler.rows(samples)
    noise = corrupt(
        rows,
        samples,
        seed=0,
        mask_token_id=MASK,
        is_complementary=True,
        late_half_life=late_half_life,
        ratio_per=ratio_per,  # type: ignore[arg-type]
    )
    assert torch.equal(rows.clean_ids[0::2], rows.clean_ids[1::2])
    assert not torch.equal(rows.clean_ids[0], rows.clean_ids[2])
    assert torch.equal(noise.is_masked[0::2], ~noise.is_masked[1::2])
    chance = 1 / noise.weight
    torch.testing.assert_close(chance[0::2] + chance[1::2], torch.ones_like(chance[0::2]))


def test_prompts_are_never_masked() -> None:
    """Noise on prompt tokens or padding, in uniform noise and in the pattern of decoding."""
    rows = SAMPLER.rows(range(8))
    is_prompt = torch.rand(rows.clean_ids.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    rows = replace(rows, is_maskable=~is_prompt, is_supervised=rows.is_supervised & ~is_prompt)
    for draft_share in (0.0, 0.5, 1.0):
        noise = corrupt(rows, range(8), seed=0, mask_token_id=MASK, draft_share=draft_share)
        assert not (noise.is_masked & is_prompt).any()
        assert not (noise.is_maskable & is_prompt).any()
    assert not (draft_pattern(rows, mask_token_id=MASK).is_masked & is_prompt).any()


def windowed() -> tuple[PackedRows, Corruption]:
    sampler = RowSampler(
        FakeStream([500, 37, 300, 2000]), 64, (4,), seed=3, windows=Windows(1.0, 16)
    )
    samples = range(400)
    rows = sampler.rows([i % sampler.num_rows for i in samples])
    flags = [sampler.is_windowed(i) for i in samples]
    return rows, corrupt(rows, samples, seed=0, mask_token_id=MASK, is_windowed=flags)


def test_a_window_has_one_gap_of_at_most_half_of_it() -> None:
    """Prevents: several gaps, a gap across windows, text around a gap that may be masked."""
    rows, noise = windowed()
    lens, starts = Counter[int](), Counter[int]()
    for row in range(len(rows.clean_ids)):
        for block in rows.block_ids[row].unique():
            places = (rows.block_ids[row] == block).nonzero()[:, 0]
            gap = noise.is_maskable[row, places].nonzero()[:, 0].tolist()
            assert gap == list(range(gap[0], gap[0] + len(gap)))
            assert len(gap) <= max(len(places) // 2, 1)
            if len(places) == 16:
                lens[len(gap)] += 1
                starts[gap[0]] += len(gap) == 1
    assert set(lens) == set(range(1, 9))
    assert min(lens.values()) > 0.8 * sum(lens.values()) / 8
    assert set(starts) == set(range(16))


def test_gaps_are_masked_whole_or_at_a_ratio_of_their_own() -> None:
    """Prevents: weights that are not the inverse of the chance, and gaps never masked whole."""
    _, noise = windowed()
    in_gap = noise.is_maskable
    assert not (noise.is_masked & ~in_gap).any()
    is_whole = noise.weight == 1
    assert (noise.is_masked | ~(is_whole & in_gap)).all()
    assert abs(float(is_whole[in_gap].float().mean()) - 0.5) < 0.05
    assert abs(float((noise.is_masked * noise.weight)[in_gap].mean()) - 1) < 0.1


def test_a_share_of_rows_is_windowed_and_the_rest_as_before() -> None:
    """Prevents: windows that change the noise or the blocks of other rows."""
    stream = FakeStream([500, 37, 300, 2000])
    plain = RowSampler(stream, 64, (4,), seed=3)
    mixed = RowSampler(stream, 64, (4,), seed=3, windows=Windows(0.5, 32))
    samples = range(200)
    flags = [mixed.is_windowed(sample) for sample in samples]
    assert 70 < sum(flags) < 130
    assert flags == [mixed.is_windowed(sample) for sample in samples]
    options = {"seed": 0, "mask_token_id": MASK, "draft_share": 0.5}
    before = corrupt(plain.rows(samples), samples, **options)
    after = corrupt(mixed.rows(samples), samples, is_windowed=flags, **options)
    others = [sample for sample in samples if not flags[sample]]
    assert torch.equal(before.is_masked[others], after.is_masked[others])
    assert torch.equal(before.weight[others], after.weight[others])
    rows = mixed.rows(samples)
    assert all(int(rows.block_ids[i].max()) < 5 for i in samples if flags[i])
