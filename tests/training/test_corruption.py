"""Noise: its law, its weights, and that it depends on seed and sample alone."""

import torch
from fake_stream import MASK, FakeStream

from trimode.training.corruption import corrupt, draft_pattern
from trimode.training.packing import RowSampler

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
