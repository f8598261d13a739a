"""Losses and weights of groups, against the same written place by place."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.fake_stream import EOS, MASK, FakeChats
from trimode.model import TriModeModel
from trimode.model.corrector import Corrector
from trimode.training.adapter_config import DrafterPart
from trimode.training.anchor_config import AnchorPart
from trimode.training.anchor_groups import DENOISE, SKIP, Groups, draw_groups, lay_out
from trimode.training.anchor_loss import GroupSums, Heads, group_chunks, group_sums
from trimode.training.anchor_objective import loss_at
from trimode.training.anchor_pass import ReadText, read_text
from trimode.training.chunked_sum import chunked_sum
from trimode.training.conversation_packing import ConversationSampler
from trimode.training.drafter_loss import place_losses

CHATS = FakeChats([30, 12, 41, 25, 9, 50], [6, 5, 11, 4, 7, 10], seed=3)
ANCHORS = AnchorPart(
    per_row=30,
    num_masks=3,
    forms=("skip", "block"),
    views=("draft", "denoise"),
    keep=0.9,
    spacing=2,
)
PART = DrafterPart(anchors=ANCHORS)
CORRECTED = replace(ANCHORS, corrector_rank=4, corrector_candidates=5, uncorrected_weight=0.3)

Models = Callable[..., TriModeModel]


@pytest.fixture
def model(tiny_model: Models) -> TriModeModel:
    return tiny_model(mask_token_id=MASK, eos_token_id=EOS, num_valid_tokens=250)


@pytest.fixture
def read(model: TriModeModel) -> tuple[ReadText, Groups, Tensor]:
    """Text, groups, and what might come out of them: near the AR view's states, else random."""
    rows = ConversationSampler(CHATS, 64, (2,), seed=0).rows(range(3))
    drawn = draw_groups(rows, range(3), part=ANCHORS, block_length=5, seed=0)
    text = read_text(model, rows)
    groups = lay_out(rows, drawn, mask_token_id=MASK, eos_token_id=EOS)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(groups.token_ids), 64, generator=generator, dtype=torch.float64)
    near = text.hidden.flatten(0, 1)[groups.text_places - 1]
    strength = torch.rand(len(near), 1, generator=generator, dtype=torch.float64) * 1.5
    hidden[groups.targets] = near + strength * hidden[groups.targets]
    return text, groups, hidden.requires_grad_(True)


def some_corrector() -> Corrector:
    generator = torch.Generator().manual_seed(4)
    parts = (torch.randn(4, 64, generator=generator, dtype=torch.float64) * 0.1 for _ in range(3))
    return Corrector(*parts, num_candidates=5)


def sums_of(
    model: TriModeModel, read: tuple[ReadText, Groups, Tensor], anchors: AnchorPart, kind: Any
) -> tuple[GroupSums, Corrector | None]:
    corrector = some_corrector() if anchors.corrector_rank else None
    text, groups, hidden = read
    found = group_sums(
        model,
        text,
        groups,
        hidden,
        heads=Heads(model),
        part=replace(PART, anchors=anchors),
        kind=kind,
        corrector=corrector,
    )
    return found, corrector


def banned(model: TriModeModel, state: Tensor) -> Tensor:
    """[V] logits."""
    logits = model.diffusion_head(state)
    is_banned = torch.arange(len(logits)) >= 250
    is_banned[MASK] = True
    return logits.masked_fill(is_banned, -torch.inf)


def one_loss(logits: Tensor, verifier: Tensor, kind: str) -> Tensor:
    """The loss of one place, from definitions."""
    if kind == "ce":
        return -logits.log_softmax(0)[verifier.argmax()]
    if kind == "lk":
        found = place_losses(
            logits[None],
            verifier[None],
            verifier[None].argmax(1),
            temperature=3.0,
            top_k=200,
            eta=0.5,
        )
        return found.lk[0]
    p, log_p, log_q = verifier.softmax(0), verifier.log_softmax(0), logits.log_softmax(0)
    inside = p > 0
    return (p[inside] * (log_p[inside] - log_q[inside])).sum()


def twin(
    model: TriModeModel,
    read: tuple[ReadText, Groups, Tensor],
    anchors: AnchorPart,
    kind: str,
    corrector: Corrector | None,
) -> tuple[Tensor, Tensor, list[int]]:
    """Loss, overlap and runs, target by target."""
    text, groups, hidden = read
    ids, table = text.rows.clean_ids.flatten(), model.encoder.embed_tokens.weight
    total, overlap, runs = torch.zeros((), dtype=torch.float64), torch.zeros(()), []
    for g in range(groups.drawn.num_groups):
        mine = (groups.target_groups == g).nonzero()[:, 0].tolist()
        is_denoised = groups.drawn.kinds[g] == DENOISE
        reached, run, is_running, last = 1.0, 0, True, 1
        for t in mine:
            place, at = int(groups.places[t]), int(groups.text_places[t])
            state = hidden[groups.targets[t]]
            verifier = banned(model, text.hidden.flatten(0, 1)[at - 1])
            plain = banned(model, state)
            logits = plain
            if corrector is not None and not is_denoised:
                best = plain.topk(5).indices
                added = corrector(table[ids[at - 1]], state, table[best])
                logits = plain.index_add(0, best, added)
            weight = {
                "even": 1.0,
                "decay": anchors.decay_ratio ** (place - 2),
                "dpace": reached,
            }[anchors.weights]
            if is_denoised:
                weight = 1 / len(mine)
            total = total + weight * one_loss(logits, verifier, kind)
            if corrector is not None and not is_denoised:
                total = total + weight * 0.3 * one_loss(plain, verifier, kind)
            reached *= float(logits.detach().softmax(0)[ids[at]])
            if not is_denoised:
                if kind != "lk":
                    both = torch.minimum(logits.softmax(0), verifier.softmax(0))
                    overlap = overlap + both.sum().detach() / len(mine)
                is_running = is_running and place == last + 1
                is_running = is_running and bool(logits.argmax() == verifier.argmax())
                last, run = place, run + is_running
        runs.append(run)
    return total, overlap, runs


@pytest.mark.parametrize("weights", ["even", "decay", "dpace"])
@pytest.mark.parametrize("kind", ["kl", "ce", "lk"])
@pytest.mark.parametrize("is_corrected", [False, True])
def test_losses_are_their_definitions(
    model: TriModeModel,
    read: tuple[ReadText, Groups, Tensor],
    weights: Any,
    kind: str,
    is_corrected: bool,
) -> None:
    """Prevents a target, weight or law taken from a neighbouring place, a gradient that differs
    from its loss, and a corrector that sees the wrong token, is not trained, or is trained on
    diffusion blocks, which decoding does not correct."""
    anchors = replace(CORRECTED if is_corrected else ANCHORS, weights=weights)
    found, corrector = sums_of(model, read, anchors, kind)
    total, overlap, runs = twin(model, read, anchors, kind, corrector)
    torch.testing.assert_close(found.loss, total)
    inputs = [read[2], *(corrector.parameters() if corrector is not None else ())]
    for one, other in zip(
        torch.autograd.grad(found.loss, inputs), torch.autograd.grad(total, inputs), strict=True
    ):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)
    if kind != "lk":
        torch.testing.assert_close(found.overlap, overlap.double())
    drawn = read[1].drawn
    is_draft = (drawn.kinds != DENOISE).tolist()
    drafts = [run for run, is_one in zip(runs, is_draft, strict=True) if is_one]
    assert [r for r, d in zip(found.runs.tolist(), is_draft, strict=True) if d] == drafts
    assert len(set(drafts)) > 2
    assert found.reached.tolist() == [sum(run >= j for run in drafts) for j in (1, 2, 3)]
    extra = sum(is_draft) + int((drawn.kinds == SKIP).sum())
    assert int(found.num_emitted) == sum(drafts) + extra


def test_dpace_weighs_late_places_less(
    model: TriModeModel, read: tuple[ReadText, Groups, Tensor]
) -> None:
    """Prevents confidences that never reach the weights. (That no gradient flows through them is
    said by the twin above, whose weights are numbers.)"""
    even, _ = sums_of(model, read, replace(ANCHORS, weights="even"), "kl")
    dpace, _ = sums_of(model, read, replace(ANCHORS, weights="dpace"), "kl")
    assert dpace.loss.item() < 0.9 * even.loss.item()


def test_chunks_hold_whole_groups() -> None:
    """Prevents a place whose weight forgets the places before it, in the chunk before."""
    of_target = torch.tensor([0, 0, 0, 1, 3, 3, 4, 4, 4, 4, 6])
    chunks = group_chunks(of_target, 8, rows=3)
    assert chunks == [slice(0, 3), slice(3, 6), slice(6, 10), slice(10, 11)]
    assert group_chunks(of_target[:0], 3) == []


def test_chunked_sum_is_the_sum() -> None:
    """Prevents gradients of a chunk that overwrite those of another, or ignore what is upstream."""
    states = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def of_chunk(some: Tensor, chunk: slice) -> Tensor:
        return ((some @ weight).tanh() * torch.arange(7)[chunk, None]).sum()

    chunks = [slice(0, 2), slice(2, 7)]
    total = chunked_sum(of_chunk, states, parameters=[weight], chunks=chunks)
    plain = of_chunk(states, slice(0, 7))
    torch.testing.assert_close(total, plain)
    found = torch.autograd.grad(3 * total, (states, weight))
    for one, other in zip(found, torch.autograd.grad(3 * plain, (states, weight)), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        assert not chunked_sum(of_chunk, states, parameters=[weight], chunks=chunks).requires_grad


def test_exact_logits_survive_a_narrow_head(tiny_model: Models) -> None:
    """Prevents an AR view that chooses among logits rounded to eight bits."""
    plain = tiny_model(torch.float32)
    wide = plain.diffusion_head.weight.detach().clone()
    model = tiny_model(torch.float32).to(torch.bfloat16)
    states = torch.randn(50, 64).bfloat16()
    found = Heads(model, wide).exact(states)
    wanted = states.float() @ wide.T
    wanted[:, model.config.mask_token_id] = -1e4
    best = wanted.topk(8, dim=1)
    torch.testing.assert_close(found.gather(1, best.indices), best.values, atol=1e-4, rtol=1e-5)
    assert (found.argmax(1) == best.indices[:, 0]).all()
    assert (Heads(model).exact(states).gather(1, best.indices) - best.values).abs().max() > 1e-2


def test_the_loss_changes_on_time() -> None:
    """Prevents `kl_then_lk` that never changes, or begins with the second."""
    part = replace(ANCHORS, loss="kl_then_lk", lk_from=0.6)
    assert [loss_at(part, share) for share in (0.0, 0.59, 0.6, 0.99)] == ["kl", "kl", "lk", "lk"]
    assert loss_at(replace(ANCHORS, loss="ce"), 0.9) == "ce"
