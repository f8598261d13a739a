"""Post-editing: the least likely tokens of a text, replaced where that makes the text likelier.

The AR view doubts (a token that it finds unlikely after what stands before it); the diffusion view
proposes (what it would put there, seeing what follows in a block as well), and so does the AR view;
the AR view decides (by how much likelier the token and what follows become together).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimode.decoding.step import Group, causal_step, group_step
from trimode.model import AdapterSwitch, DrafterAdapter, TriModeModel
from trimode.model.adapter import PUBLISHED_FORM
from trimode.model.masks import TRUNK

NUM_DOUBTFUL = 8
"""Tokens that are looked at in one round, the least likely first."""

NUM_FOLLOWING = 16
"""Tokens behind a replaced one that are judged with it."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """One token replaced.

    Attributes:
        index: Place in the text, in tokens.
        old_id, new_id: Before and after.
        log_prob: Of the old token under the AR view, in nats, when it was doubted.
        gain: Nats by which the text became likelier: the token and `NUM_FOLLOWING` after it.
    """

    index: int
    old_id: int
    new_id: int
    log_prob: float
    gain: float


@torch.inference_mode()
def revise(
    model: TriModeModel,
    token_ids: Sequence[int],
    *,
    editable: Collection[int],
    budget: int,
    block_length: int,
    min_gain: float,
    banned: Collection[int],
    adapter: DrafterAdapter | None = None,
    is_text: Callable[[int], bool] = lambda token_id: True,
) -> list[Replacement]:
    """Replace at most `budget` tokens, one a round, each the best of its round; each place once.

    Args:
        model: On its device, in evaluation mode.
        token_ids: The text, T tokens.
        editable: Places that may change. The first token of a text never does.
        budget: At most so many replacements.
        block_length: K of the blocks in which tokens are proposed.
        min_gain: Nats that a replacement must bring.
        banned: Ids never proposed.
        adapter: On where the diffusion view proposes, if it serves that.
        is_text: Whether an id that was proposed may be tried.

    Returns:
        In the order made.
    """
    ids, left = list(token_ids), set(editable) - {0}
    made: list[Replacement] = []
    while len(made) < budget and left:
        log_probs, likeliest = _ar_view(model, ids, banned)
        doubtful = sorted(left, key=lambda i: log_probs[i])[:NUM_DOUBTFUL]
        proposed = _proposals(
            *(model, ids, doubtful), block_length=block_length, banned=banned, adapter=adapter
        )
        tried = {(i, likeliest[i]) for i in doubtful} | set(zip(doubtful, proposed, strict=True))
        tried = {(i, new) for i, new in tried if new != ids[i] and is_text(new)}
        if not tried:
            break
        gains = {pair: _gain(model, ids, *pair, log_probs=log_probs) for pair in sorted(tried)}
        (index, new_id), gain = max(gains.items(), key=lambda item: item[1])
        if gain < min_gain:
            break
        made.append(Replacement(index, ids[index], new_id, log_probs[index], gain))
        ids[index] = new_id
        left.discard(index)
    return made


def _ar_view(
    model: TriModeModel, ids: list[int], banned: Collection[int]
) -> tuple[list[float], list[int]]:
    """Log probability of every token after those before it, and the likeliest one there.

    The first token has none: 0 and itself.
    """
    hidden = _causal_states(model, ids)
    log_probs, likeliest = [0.0], [ids[0]]
    for start in range(0, len(ids) - 1, 256):  # never all logits at once
        logits = model.diffusion_head(hidden[start : min(start + 256, len(ids) - 1)]).float()
        targets = torch.tensor(ids[start + 1 : start + 1 + len(logits)], device=logits.device)
        log_probs += _log_probs(logits, targets).tolist()
        likeliest += _without(logits, banned).argmax(-1).tolist()
    return log_probs, likeliest


def _proposals(
    model: TriModeModel,
    ids: list[int],
    doubtful: list[int],
    *,
    block_length: int,
    banned: Collection[int],
    adapter: DrafterAdapter | None,
) -> list[int]:
    """What the diffusion view would put in each doubtful place, in one forward.

    The text is fed as the trunk; behind it stands, for each place, a copy of the block around it as
    a group of its own, the place masked. A group sees the text before its block, and itself.
    """
    mask_token_id = model.config.mask_token_id
    groups = []
    for index in doubtful:
        start = max(1, min(index - block_length // 2, len(ids) - block_length))
        window = range(start, min(start + block_length, len(ids)))
        is_masked = [i == index for i in window]
        group_ids = [mask_token_id if i == index else ids[i] for i in window]
        groups.append(Group(group_ids, is_masked, start, start - 1, [index - start]))
    form = PUBLISHED_FORM if adapter is None else adapter.form
    trunk = causal_step("denoise", ids, start=0, wanted=())
    step = group_step("denoise", groups, form=form, trunk=trunk)
    device = model.device
    hidden = model.encode_text(
        torch.tensor(step.token_ids, device=device),
        torch.tensor(step.positions, device=device),
        groups=step.groups,
        anchors=step.anchors,
        adapter=AdapterSwitch.of(adapter, step.is_drafter_on, step.mask_places, device=device),
    )
    logits = model.diffusion_head(hidden[torch.tensor(step.wanted, device=device)]).float()
    found: list[int] = _without(logits, banned).argmax(-1).tolist()
    return found


def _gain(
    model: TriModeModel, ids: list[int], index: int, new_id: int, *, log_probs: list[float]
) -> float:
    """Nats by which a replacement makes the token and those after it likelier."""
    stop = min(index + 1 + NUM_FOLLOWING, len(ids))
    changed = [*ids[:index], new_id, *ids[index + 1 : stop]]
    hidden = _causal_states(model, changed)[index - 1 : stop - 1]
    targets = torch.tensor(changed[index:], device=hidden.device)
    scores = _log_probs(model.diffusion_head(hidden).float(), targets)
    return float(scores.sum()) - sum(log_probs[index:stop])


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """[T]: of one token each."""
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _causal_states(model: TriModeModel, ids: list[int]) -> Tensor:
    """[T, H]: the AR view of a text."""
    positions = torch.arange(len(ids), device=model.device)
    return model.encode_text(
        torch.tensor(ids, device=model.device),
        positions,
        groups=[TRUNK] * len(ids),
        anchors=range(len(ids)),
    )


def _without(logits: Tensor, banned: Collection[int]) -> Tensor:
    logits[:, torch.tensor(sorted(banned), device=logits.device, dtype=torch.int64)] = -torch.inf
    return logits
