"""Packed groups over one read of the text, against each group alone behind its own text."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.training.fake_stream import EOS, MASK, FakeChats
from trimode.model import AdapterSwitch, DenseAttention, DrafterAdapter, TriModeModel
from trimode.training.adapter_config import DrafterPart
from trimode.training.anchor_config import AnchorPart
from trimode.training.anchor_groups import Groups, draw_groups, lay_out
from trimode.training.anchor_loss import Heads, group_sums
from trimode.training.anchor_pass import GroupAttention, ReadText, encode_groups, read_text
from trimode.training.conversation_packing import ConversationSampler

CHATS = FakeChats([30, 12, 41, 25, 9, 50], [6, 5, 11, 4, 7, 10], seed=3)
PART = AnchorPart(
    per_row=9, num_masks=3, forms=("skip", "block"), views=("draft", "denoise"), denoise_share=0.2
)

Models = Callable[..., TriModeModel]
Adapters = Callable[..., DrafterAdapter]


@pytest.fixture
def model(tiny_model: Models) -> TriModeModel:
    return tiny_model(mask_token_id=MASK, eos_token_id=EOS)


@pytest.fixture
def adapter(model: TriModeModel, random_adapter: Adapters) -> DrafterAdapter:
    """Disagrees with the base, has an embedding for each of two places, and learns."""
    found = random_adapter(model)
    generator = torch.Generator().manual_seed(2)
    own = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    return DrafterAdapter(
        {(index, target): pair for index, target, pair in found.items()}, mask_embeddings=own
    ).requires_grad_(True)


def read(model: TriModeModel, part: AnchorPart = PART) -> tuple[ReadText, Groups]:
    rows = ConversationSampler(CHATS, 64, (2,), seed=0).rows(range(3))
    drawn = draw_groups(rows, range(3), part=part, block_length=5, seed=0)
    return read_text(model, rows), lay_out(rows, drawn, mask_token_id=MASK, eos_token_id=EOS)


def alone(
    model: TriModeModel,
    text: ReadText,
    groups: Groups,
    number: int,
    adapter: DrafterAdapter | None,
    *,
    adapts_clean: bool,
) -> Tensor:
    """Hidden states of one group in a sequence of its own: its text, causal, then the group."""
    rows, drawn = text.rows, groups.drawn
    row, anchor = int(drawn.rows[number]), int(drawn.anchors[number])
    length = int(rows.position_ids[row, anchor]) + 1
    is_mine = groups.group_ids == number
    ids = torch.cat(
        (rows.clean_ids[row, anchor + 1 - length : anchor + 1], groups.token_ids[is_mine])
    )
    positions = torch.cat((torch.arange(length), groups.position_ids[is_mine]))
    places = torch.cat((torch.zeros(length, dtype=torch.int64), groups.mask_places[is_mine]))
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    mask[length:] = True
    is_on = places > 0
    is_on[length:] |= adapts_clean
    switch = None if adapter is None else AdapterSwitch(adapter, is_on[:, None], places)
    attend = DenseAttention(mask[None, None])
    return model.encode(ids[None], positions[None], attend=attend, adapter=switch)[0, length:]


@pytest.mark.parametrize("adapts_clean", [False, True])
def test_groups_are_as_if_alone(
    model: TriModeModel, adapter: DrafterAdapter, adapts_clean: bool
) -> None:
    """Prevents a group that sees other groups, text after its anchor or another document, and
    gradients that are lost or doubled in the attention of packed groups."""
    text, groups = read(model)
    assert set(groups.drawn.kinds.tolist()) == {0, 1, 2}
    hidden = encode_groups(model, text, groups, adapter=adapter, adapts_clean=adapts_clean)
    twin = torch.cat(
        [
            alone(model, text, groups, number, adapter, adapts_clean=adapts_clean)
            for number in range(groups.drawn.num_groups)
        ]
    )
    torch.testing.assert_close(hidden, twin)
    weights = torch.randn(hidden.shape, dtype=torch.float64)
    found = torch.autograd.grad((hidden * weights).sum(), list(adapter.parameters()))
    wanted = torch.autograd.grad((twin * weights).sum(), list(adapter.parameters()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert all(grad.abs().max() > 0 for grad in found)


def test_without_an_adapter(model: TriModeModel) -> None:
    """Prevents a baseline that still has the adapter's mask embeddings."""
    text, groups = read(model)
    hidden = encode_groups(model, text, groups, adapter=None, adapts_clean=False)
    twin = alone(model, text, groups, 4, None, adapts_clean=False)
    torch.testing.assert_close(hidden[groups.group_ids == 4], twin)


def test_chunks_change_nothing(model: TriModeModel) -> None:
    """Prevents results that depend on which groups share an attention call."""
    text, groups = read(model, replace(PART, spacing=2, per_row=30))
    outputs = []
    for size in (1, 7, 10_000):
        attend = GroupAttention(text, groups, chunk_tokens=size)
        outputs.append(model.encode(groups.token_ids, groups.position_ids, attend=attend))
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2])


def test_rows_without_an_anchor(model: TriModeModel, adapter: DrafterAdapter) -> None:
    """Prevents a crash on rows whose answers are one token long, whose gradients are zero."""
    chats = FakeChats([30, 30], [29, 29], seed=3)
    rows = ConversationSampler(chats, 64, (2,), seed=0).rows(range(1))
    drawn = draw_groups(rows, range(1), part=PART, block_length=5, seed=0)
    groups = lay_out(rows, drawn, mask_token_id=MASK, eos_token_id=EOS)
    text = read_text(model, rows)
    hidden = encode_groups(model, text, groups, adapter=adapter, adapts_clean=False)
    sums = group_sums(
        model,
        text,
        groups,
        hidden,
        heads=Heads(model),
        part=DrafterPart(anchors=PART),
        kind="kl",
        corrector=None,
    )
    assert (drawn.num_groups, hidden.shape) == (0, (0, 64))
    assert sums.loss.item() == 0
    grads = torch.autograd.grad(sums.loss, list(adapter.parameters()))
    assert not any(grad.any() for grad in grads)
