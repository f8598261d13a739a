"""One draft-and-verify round in every block of packed rows at once: where, what and how far.

The text is read once, causally and without the adapter. Both streams of the round then attend to
its keys and values, as decoding attends to committed cells: the *draft* stream (one clean token,
then masks; adapter on) and the *verify* stream (the same token, then the drafts; adapter off).
Gradients flow through the draft stream only. Losses are not made here: see `drafter_loss`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trimode.model import AdapterSwitch, Attend, DrafterAdapter, TriModeConfig, TriModeModel
from trimode.training.draft_noise import gumbel_noise
from trimode.training.drafter_loss import active_places
from trimode.training.dual_stream import causal_mask, dual_stream_mask, training_attention
from trimode.training.packing import PackedRows

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """Rows, and what the round needs to know beside them.

    Args:
        rows: B rows of S tokens.
        is_drafted: [B, S] bool. Places to draft, see `draftable`.
        is_sampled: [B, S] bool. Chosen at temperature 1 (else greedily), the same in a block.
        noise_keys: [B, S] int32. Of the noise that draft and verifier share at a place.
    """

    rows: PackedRows
    is_drafted: Tensor
    is_sampled: Tensor
    noise_keys: Tensor

    def to(self, device: torch.device) -> DraftBatch:
        """The same batch on `device`."""
        return DraftBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    @property
    def num_blocks(self) -> int:
        """Blocks that are drafted."""
        is_next_drafted = self.is_drafted[:, 1:] & self.rows.is_block_start[:, :-1]
        return int(is_next_drafted.sum())


@dataclass(frozen=True, slots=True)
class Round:
    """What became of the M drafts of a batch, in row order.

    Args:
        places: [M] int64. Of each draft in the flattened rows.
        draft_states: [M, H] with a graph. The drafter's hidden state for the place.
        verifier_states: [M, H]. The AR view's hidden state before the place, on the drafts.
        is_accepted: [M] bool. All drafts of the block up to this one equal the verifier's choices.
        is_active: [M] bool. Accepted, or the first that is not.
    """

    places: Tensor
    draft_states: Tensor
    verifier_states: Tensor
    is_accepted: Tensor
    is_active: Tensor


def draftable(rows: PackedRows, block_lengths: Tensor, *, eos_token_id: int) -> Tensor:
    """Where decoding could draft: all but the first place of whole blocks that begin with text.

    What follows the first token of a block may be fill, since neither stream reads it. No block is
    drafted after an EOS.

    Args:
        rows: B rows.
        block_lengths: [B] int64. K of each row.
        eos_token_id: Ends a text.

    Returns:
        [B, S] bool.
    """
    ones = torch.ones_like(rows.block_ids)
    lens = torch.zeros_like(ones).scatter_add_(1, rows.block_ids, ones).gather(1, rows.block_ids)
    begins = rows.is_block_start & rows.is_supervised & (rows.clean_ids != eos_token_id)
    has_text = torch.zeros_like(ones).scatter_add_(1, rows.block_ids, begins.long())
    is_good = (lens == block_lengths[:, None]) & (has_text.gather(1, rows.block_ids) > 0)
    return is_good & ~rows.is_block_start


def draft_mask(rows: PackedRows) -> Tensor:
    """[B, 1, S, 2S] bool over `[draft | text]`; row: who attends, column: to whom.

    * draft to draft: the same block, in both directions;
    * draft to text: strictly earlier blocks of the same document.
    """
    return dual_stream_mask(rows)[:, :, : rows.clean_ids.shape[1]]


def verify_mask(rows: PackedRows) -> Tensor:
    """[B, 1, S, 2S] bool over `[drafted | text]`: as `draft_mask`, but causal within the block."""
    mask, row_len = draft_mask(rows), rows.clean_ids.shape[1]
    return torch.cat((mask[..., :row_len].tril(), mask[..., row_len:]), dim=3)


def play_round(
    model: TriModeModel, batch: DraftBatch, *, adapter: DrafterAdapter | None, eos_token_id: int
) -> Round:
    """Draft and verify every block of a batch.

    1. Read the text, keeping its keys and values.
    2. Draft: encode `[first token, masks]` with the adapter; choose at every drafted place.
    3. Verify: encode `[first token, drafts]` without it; choose with the same noise.
    4. A draft that equals the verifier's choice is accepted, up to the first that does not. The
       round also ends at an accepted EOS, after which decoding asks for nothing.

    Args:
        model: Its own weights must not require gradients.
        batch: On the model's device.
        adapter: The drafter; None drafts with the bare diffusion view.
        eos_token_id: Ends a round.
    """
    rows, row_len = batch.rows, batch.rows.clean_ids.shape[1]
    places = batch.is_drafted.flatten().nonzero()[:, 0]
    is_sampled, keys = (x.flatten()[places] for x in (batch.is_sampled, batch.noise_keys))
    with torch.no_grad():
        attend = training_attention(causal_mask(rows), part_len=row_len, dtype=model.dtype)
        text = RememberingAttention(attend)
        model.encode(rows.clean_ids, rows.position_ids, attend=text)
    noisy_ids = torch.where(rows.is_block_start, rows.clean_ids, model.config.mask_token_id)
    attend = training_attention(draft_mask(rows), part_len=row_len, dtype=model.dtype)
    switch = None if adapter is None else AdapterSwitch(adapter, is_on=None)
    hidden = model.encode(
        noisy_ids, rows.position_ids, attend=_TextAttention(attend, text), adapter=switch
    )
    draft_states = hidden.flatten(0, 1)[places]
    with torch.no_grad():
        drafts = choose_tokens(model, draft_states, is_sampled=is_sampled, noise_keys=keys)
        drafted_ids = rows.clean_ids.flatten().index_copy(0, places, drafts).view_as(noisy_ids)
        attend = training_attention(verify_mask(rows), part_len=row_len, dtype=model.dtype)
        hidden = model.encode(drafted_ids, rows.position_ids, attend=_TextAttention(attend, text))
        verifier_states = hidden.flatten(0, 1)[places - 1]
        choices = choose_tokens(model, verifier_states, is_sampled=is_sampled, noise_keys=keys)
    is_hit = drafts == choices
    is_kept = torch.zeros_like(batch.is_drafted).flatten()
    is_kept[places] = is_hit & (drafts != eos_token_id)
    active = active_places(batch.is_drafted, is_kept.view_as(noisy_ids), rows.is_block_start)
    is_active = active.flatten()[places]
    return Round(places, draft_states, verifier_states, is_hit & is_active, is_active)


def choose_tokens(
    model: TriModeModel, states: Tensor, *, is_sampled: Tensor, noise_keys: Tensor
) -> Tensor:
    """The token of every place: argmax of the logits, plus Gumbel noise where sampled.

    Args:
        model: Its head and banned ids.
        states: [M, H].
        is_sampled: [M] bool.
        noise_keys: [M] int32.

    Returns:
        [M] int64.
    """
    chosen = [states.new_zeros(0, dtype=torch.int64)]
    for part in chunks(len(states), model.config.vocab_size):
        logits = banned_logits(model, states[part])
        noise = gumbel_noise(noise_keys[part], logits.shape[1]) * is_sampled[part, None]
        chosen.append((logits + noise).argmax(1))
    return torch.cat(chosen)


def banned_logits(model: TriModeModel, states: Tensor) -> Tensor:
    """[M, H] -> [M, V] float32 or wider; -inf for the mask token and for padded rows."""
    logits: Tensor = model.diffusion_head(states)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ids = torch.arange(logits.shape[1], device=logits.device)
    is_banned = (ids == model.config.mask_token_id) | (ids >= num_tokens(model.config))
    return logits.masked_fill(is_banned, -torch.inf)


def num_tokens(config: TriModeConfig) -> int:
    """Rows of the vocabulary that stand for a token, the mask token included."""
    return config.num_valid_tokens or config.vocab_size


def chunks(num_places: int, vocab_size: int) -> Iterator[slice]:
    """Slices of the places, so that the logits of all of them never exist at once."""
    chunk_len = max(1, _CHUNK_ELEMENTS // vocab_size)
    for start in range(0, num_places, chunk_len):
        yield slice(start, start + chunk_len)


class RememberingAttention:
    """Attends as `attend` does and keeps every layer's keys and values, [B, S, G, D] each."""

    def __init__(self, attend: Attend) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._attend = attend

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self.kept[layer_index] = key, value
        return self._attend(layer_index, query, key, value)


class _TextAttention:
    """Attention of a stream over its own keys and values, then those of the text."""

    def __init__(self, attend: Attend, text: RememberingAttention) -> None:
        self._attend = attend
        self._text = text

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        text_key, text_value = self._text.kept[layer_index]
        keys = torch.cat((key, text_key), dim=1)
        return self._attend(layer_index, query, keys, torch.cat((value, text_value), dim=1))
