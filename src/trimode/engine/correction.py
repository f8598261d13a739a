"""The corrector at work: the places of a draft chosen one after the other, within one forward.

A place waits for the token before it: a place of the same group, or, behind masks that skip the
bonus, what the trunk answers at the anchor. Places that wait equally long are chosen together.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from trimode.decoding.choice import Choice
from trimode.decoding.choose import widened
from trimode.decoding.sequence import Sequence
from trimode.decoding.step import Step
from trimode.model.corrector import Corrector
from trimode.model.masks import TRUNK
from trimode.model.native.choice import Correction, NativeCorrector, PlainEmbedding
from trimode.model.native.step import PackedRows


@dataclass(frozen=True, slots=True)
class Before:
    """What stands before a drafted place.

    Attributes:
        token_id: Known beforehand; None where another answer of the forward gives it.
        row: Number of that answer.
    """

    token_id: int | None
    row: int = -1


def tokens_before(seq: Sequence, step: Step, *, first_row: int) -> list[Before | None]:
    """Find what stands before each drafted place among a step's wanted answers.

    Args:
        seq: Whose step it is.
        step: What it feeds.
        first_row: Number of its first answer in the forward.

    Returns:
        None for what is not drafted with the adapter on, and where nothing tells the token before.
    """
    if step.kind == "denoise" or not any(step.is_drafter_on):
        return [None] * len(step.wanted)
    rows = {i: first_row + number for number, i in enumerate(step.wanted)}
    fed = {
        (group, position): i
        for i, (group, position) in enumerate(zip(step.groups, step.positions, strict=True))
    }
    text = [*seq.prompt_ids, *seq.new_ids]
    found: list[Before | None] = []
    for i in step.wanted:
        before, anchor = step.positions[i] - 1, step.anchors[i]
        own, trunk = fed.get((step.groups[i], before)), fed.get((TRUNK, anchor))
        if not step.mask_places[i]:
            found.append(None)
        elif own is not None and step.mask_places[own]:
            found.append(Before(None, rows[own]) if own in rows else None)
        elif own is not None:
            found.append(Before(step.token_ids[own]))
        elif before == anchor:
            known = text[anchor] if trunk is None else step.token_ids[trunk]
            found.append(Before(known))
        else:
            found.append(Before(None, rows[trunk]) if trunk in rows else None)
    return found


def waves(before: Items[Before | None]) -> list[list[int]]:
    """Numbers of the answers that can be chosen together, in the order in which they can."""
    depths: list[int] = []
    for one in before:  # an answer waits for an earlier one only
        depths.append(0 if one is None or one.token_id is not None else 1 + depths[one.row])
    found: list[list[int]] = [[] for _ in range(max(depths, default=-1) + 1)]
    for row, depth in enumerate(depths):
        found[depth].append(row)
    return found


def native_corrector(
    corrector: Corrector, embeddings: Tensor | PackedRows
) -> NativeCorrector | None:
    """A corrector for the compiled library, which corrects and chooses in one call.

    Args:
        corrector: Of the adapter.
        embeddings: See `choose_in_waves`; or the head's rows, where the embedding is packed.

    Returns:
        None where the library cannot read the embeddings.
    """
    if isinstance(embeddings, PackedRows):
        return NativeCorrector(corrector, embeddings)
    if PlainEmbedding.takes(embeddings):
        return NativeCorrector(corrector, PlainEmbedding(embeddings))
    return None


def native_correction(
    corrector: NativeCorrector, states: Tensor, before: Items[Before | None]
) -> Correction:
    """What such a corrector does to one forward; arguments as of `choose_in_waves`."""
    pairs = [
        (-1, -1) if one is None else (-1 if one.token_id is None else one.token_id, one.row)
        for one in before
    ]
    return Correction(corrector, states, pairs)


def choose_in_waves(
    logits: Tensor,
    states: Tensor,
    *,
    before: Items[Before | None],
    corrector: Corrector,
    embeddings: Tensor,
    banned: Tensor,
    choose_rows: Callable[[Tensor, Items[int]], Choice],
) -> Choice:
    """Choices for all answers of a forward, the drafted ones corrected.

    Args:
        logits: [W, V]. May be overwritten.
        states: [W, H]. Hidden states they were made from.
        before: [W].
        corrector: Of the adapter.
        embeddings: [V, H]. Of the base's input.
        banned: [any] int64. Tokens that are never chosen, so no candidates; as in training.
        choose_rows: Chooses for some rows of the logits, given with their numbers.
    """
    logits = widened(logits)  # as the choice does; here for the sum
    token_ids = [0] * len(before)
    parts: list[tuple[list[int], Choice]] = []
    for rows in waves(before):
        corrected = [row for row in rows if before[row] is not None]
        if corrected:
            known = [_known(before[row], token_ids) for row in corrected]
            at = torch.tensor(corrected, device=logits.device)
            ids = torch.tensor(known, device=logits.device)
            some = logits[at]
            num_candidates = min(corrector.num_candidates, some.shape[-1])
            choosable = some.index_fill(-1, banned, -torch.inf)
            candidates = choosable.topk(num_candidates, dim=-1).indices
            added = corrector(embeddings[ids], states[at], embeddings[candidates])
            logits[at] = some.scatter_add(-1, candidates, added.to(some.dtype))
        index = torch.tensor(rows, device=logits.device)
        choice = choose_rows(logits[index], rows)
        parts.append((rows, choice))
        for row, token_id in zip(rows, choice.token_ids, strict=True):
            token_ids[row] = token_id
    return _joined(parts, len(before))


def _known(before: Before | None, token_ids: Items[int]) -> int:
    assert before is not None
    return token_ids[before.row] if before.token_id is None else before.token_id


def _joined(parts: list[tuple[list[int], Choice]], num_rows: int) -> Choice:
    """One choice of all rows; a column that some part lacks is filled with zeros there."""
    columns = {}
    for column in fields(Choice):
        whole: list[object] = [None if column.name == "logprobs" else 0] * num_rows
        is_there = False
        for rows, choice in parts:
            for row, value in zip(rows, getattr(choice, column.name), strict=False):
                whole[row], is_there = value, True
        columns[column.name] = whole if is_there else []
    return Choice(**columns)  # type: ignore[arg-type]
