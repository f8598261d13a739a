"""Training on a device that is not the CPU: every objective, against the same on the CPU.

Torch's own backward of some operations makes numbers that the other device of the tests cannot
follow, so only the joint objective goes backward here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.other_device import DEVICE, Elsewhere, other_device
from tests.training.fake_stream import EOS, MASK, FakeChats, FakeStream
from trimode.model.adapter import new_adapter
from trimode.model.corrector import new_corrector
from trimode.training.adapter_config import DrafterPart
from trimode.training.anchor_config import AnchorPart
from trimode.training.anchor_groups import draw_groups, lay_out, moved
from trimode.training.anchor_loss import Heads, group_sums
from trimode.training.anchor_pass import encode_groups, read_text
from trimode.training.config import OptimizerPart
from trimode.training.conversation_packing import ConversationSampler
from trimode.training.corruption import corrupt, draft_pattern
from trimode.training.draft_accuracy import draft_accuracy
from trimode.training.draft_round import play_round
from trimode.training.drafter import make_draft_batch, round_sums, weights_checksum
from trimode.training.objective import TrainingBatch, count_targets, loss_sums
from trimode.training.optim import make_optimizer
from trimode.training.packing import RowSampler

STREAM = FakeStream([13, 4, 30, 21, 50, 9, 40], seed=1)
CHATS = FakeChats([30, 12, 41, 25, 9, 50], [6, 5, 11, 4, 7, 10], seed=3)
ANCHORS = AnchorPart(
    per_row=9,
    num_masks=3,
    forms=("skip", "block"),
    views=("draft", "denoise"),
    denoise_share=0.2,
    mask_places=2,
    corrector_rank=4,
    corrector_candidates=5,
    replay_share=0.5,
)
ROUNDS, PART = DrafterPart(top_k=5), DrafterPart(anchors=ANCHORS)

Models = Callable[..., Any]
Work = Callable[[Any, torch.device], tuple[Tensor, nn.Module]]


def joint(model: Any, device: torch.device, *, name: Any, row_averaged: bool) -> Any:
    """A step of the joint objective, and its update."""
    model.requires_grad_(True)
    rows = RowSampler(STREAM, 40, (4, 8), seed=0).rows(range(2))
    noise = corrupt(rows, range(2), seed=0, mask_token_id=MASK)
    batch = TrainingBatch(rows, noise, is_row_averaged=row_averaged)
    counts = count_targets(batch)
    loss = loss_sums(model, batch.to(device)).total(counts, diffusion_weight=0.3)
    loss.backward()
    part = OptimizerPart(name=name, learning_rate=1e-3)
    make_optimizer(model, part, has_fast_bf16=False).step(1.0)
    return loss, model


def rounds(model: Any, device: torch.device) -> Any:
    """The drafter's objective, forward."""
    adapter = an_adapter(model, device)
    sampler = RowSampler(STREAM, 40, (4, 8), seed=0)
    batch = make_draft_batch(sampler, range(3), seed=0, sampled_share=0.5, eos_token_id=EOS)
    batch = batch.to(device)
    sums = round_sums(
        model, batch, play_round(model, batch, adapter=adapter, eos_token_id=EOS), part=ROUNDS
    )
    return sums.lk + sums.ce + sums.overlap + sums.num_accepted, adapter


def groups(model: Any, device: torch.device) -> Any:
    """The anchors' objective, forward, half of the groups moved to where a round ends."""
    adapter = an_adapter(model, device)
    rows = ConversationSampler(CHATS, 64, (2,), seed=0).rows(range(3))
    drawn = draw_groups(rows, range(3), part=ANCHORS, block_length=5, seed=0, is_replaying=True)
    rows, drawn = rows.to(device), drawn.to(device)
    text, heads = read_text(model, rows), Heads(model)
    losses = []
    for _ in range(2):
        laid = lay_out(rows, drawn, mask_token_id=MASK, eos_token_id=EOS)
        hidden = encode_groups(model, text, laid, adapter=adapter, adapts_clean=False)
        sums = group_sums(
            *(model, text, laid, hidden),
            heads=heads,
            part=PART,
            kind="lk",
            corrector=adapter.corrector,
        )
        losses.append(sums.loss)
        drawn = moved(rows, drawn, sums.runs)
    return losses[0] + losses[1], adapter


def an_adapter(model: Any, device: torch.device) -> Any:
    """A fresh one that is no longer zero."""
    adapter = new_adapter(
        model.encoder.layers,
        rank=2,
        alpha=2,
        targets=("q_proj", "down_proj"),
        seed=0,
        mask_embeddings=torch.ones(2, 64),
        corrector=new_corrector(64, rank=4, num_candidates=5, seed=0),
    ).double()
    for index, weight in enumerate(adapter.parameters()):
        generator = torch.Generator().manual_seed(index)
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return adapter.to(device)


@pytest.fixture
def model(tiny_model: Models) -> Any:
    return tiny_model(mask_token_id=MASK, eos_token_id=EOS, num_valid_tokens=250)


WORK: dict[str, Work] = {
    "joint, adamw": lambda m, d: joint(m, d, name="adamw", row_averaged=False),
    "joint, muon": lambda m, d: joint(m, d, name="muon", row_averaged=True),
    "rounds": rounds,
    "groups": groups,
}


@pytest.mark.parametrize("name", WORK)
def test_steps(model: Any, name: str) -> None:
    """Prevents: a mask, a weight or a draw left on the CPU, which only a GPU would refuse."""
    expected, learned = WORK[name](copy.deepcopy(model), torch.device("cpu"))
    with other_device():
        away = copy.deepcopy(model).to(DEVICE)
        found, learned_away = WORK[name](away, DEVICE)
        assert isinstance(found, Elsewhere)
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
        for mine, theirs in zip(learned_away.parameters(), learned.parameters(), strict=True):
            torch.testing.assert_close(mine.detach().cpu(), theirs.detach(), rtol=1e-6, atol=1e-9)
            assert (mine.grad is None) == (theirs.grad is None)
            if mine.grad is not None and theirs.grad is not None:
                torch.testing.assert_close(mine.grad.cpu(), theirs.grad, rtol=1e-6, atol=1e-9)


def test_measures(model: Any) -> None:
    """Prevents: an evaluation that works on the CPU only."""
    rows = RowSampler(STREAM, 40, (4,), seed=0, is_shuffled=False).rows(range(3))
    batch = TrainingBatch(rows, draft_pattern(rows, mask_token_id=MASK))
    expected = draft_accuracy(model, batch, block_length=4), weights_checksum(model)
    with other_device():
        away = copy.deepcopy(model).to(DEVICE)
        found = draft_accuracy(away, batch.to(DEVICE), block_length=4), weights_checksum(away)
    assert found[0].by_offset() == expected[0].by_offset()
    assert found[0].accepted == expected[0].accepted
    assert found[1] == expected[1]
