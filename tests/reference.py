"""Slow, obvious twins of the fast paths: dense masks, no K/V kept, one sequence at a time.

Nothing here may call what it is the twin of. The network's layers themselves are shared (they are
checked against transformers in `tests/model/test_parity.py`); masks, attention over cells, the loop
and the counts are done again from the facts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimode.model import AdapterSwitch, DrafterAdapter, TriModeModel


@dataclass
class Written:
    """What a reference loop emitted, and the forwards the published code would have counted."""

    new_ids: list[int]
    nfe: int


def fed_mask(
    groups: Sequence[int], positions: Sequence[int], anchors: Sequence[int]
) -> list[list[bool]]:
    """[T][T]: what fed token t may see of the fed tokens, one pair at a time, rule by rule."""

    def sees(t: int, s: int) -> bool:
        if groups[t] == 0:
            return groups[s] == 0 and s <= t
        if groups[s] == groups[t]:
            return True
        return groups[s] == 0 and positions[s] <= anchors[t]

    return [[sees(t, s) for s in range(len(groups))] for t in range(len(groups))]


def cell_mask(fed: list[list[bool]], length: int, num_cells: int) -> list[list[bool]]:
    """[T][num_cells]: the committed cells, then the fed ones, then nothing."""
    num_tokens = len(fed)
    return [
        [
            cell < length or (cell < length + num_tokens and fed[t][cell - length])
            for cell in range(num_cells)
        ]
        for t in range(num_tokens)
    ]


def attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention one head and one token at a time.

    Args:
        query: [T, N, D].
        key, value: [S, G, D].
        allowed: [T, S] bool.

    Returns:
        [T, N, D].
    """
    num_tokens, num_heads, head_dim = query.shape
    shared_by = num_heads // key.shape[1]
    output = torch.empty_like(query)
    for t in range(num_tokens):
        visible = allowed[t].nonzero()[:, 0]
        for n in range(num_heads):
            scores = key[visible, n // shared_by] @ query[t, n] / head_dim**0.5
            output[t, n] = scores.softmax(dim=0) @ value[visible, n // shared_by]
    return output


class MaskedAttention:
    """An `Attend` over one whole sequence with any mask at all.

    Args:
        allowed: [T, T] bool.
    """

    def __init__(self, allowed: Tensor) -> None:
        self.allowed = allowed

    def __call__(self, layer_index: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query: [1, T, N, D]; key, value: [1, T, G, D] -> [1, T, N, D]."""
        return attention(query[0], key[0], value[0], self.allowed)[None]


def next_logits(
    model: TriModeModel,
    prefix: Sequence[int],
    block: Sequence[int] = (),
    *,
    adapter: DrafterAdapter | None = None,
) -> Tensor:
    """Logits of a causal prefix followed by a bidirectional block that sees all of it.

    The adapter is on for the block only, as in drafting.

    Returns:
        [len(prefix) + len(block), V], the mask token banned.
    """
    ids = torch.tensor([[*prefix, *block]])
    num_tokens, start = ids.shape[1], len(prefix)
    allowed = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    allowed[start:] = True
    switch = None
    if adapter is not None:
        is_on = (torch.arange(num_tokens) >= start)[None, :, None]
        switch = AdapterSwitch(adapter, is_on)
    with torch.no_grad():
        hidden = model.encode(
            ids,
            torch.arange(num_tokens)[None],
            attend=MaskedAttention(allowed),
            adapter=switch,
        )
        logits = model.diffusion_head(hidden)[0]
    logits[:, model.config.mask_token_id] = -torch.inf
    return logits


def greedy_ar(
    model: TriModeModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    stops: Collection[int] = (),
) -> Written:
    """Facts 3.1, greedy: nfe is the number of generated tokens."""
    new_ids: list[int] = []
    while len(new_ids) < max_new_tokens and not set(new_ids) & set(stops):
        new_ids.append(int(next_logits(model, [*prompt, *new_ids])[-1].argmax()))
    return Written(new_ids, nfe=len(new_ids))


def greedy_diffusion(
    model: TriModeModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    block_length: int,
    threshold: float | None,
    steps: int | None = None,
    stops: Collection[int] = (),
) -> Written:
    """Facts 3.2, greedy: denoising forwards, plus a commit for every block."""
    new_ids: list[int] = []
    nfe = 0
    while len(new_ids) < max_new_tokens and not set(new_ids) & set(stops):
        seed = int(next_logits(model, [*prompt, *new_ids])[-1].argmax())
        canvas: list[int | None] = [seed, *[None] * (block_length - 1)]
        schedule = _even(block_length - 1, steps) if steps else []
        while None in canvas and not _is_stopped(canvas, stops):
            least = schedule.pop(0) if schedule else 1
            _reveal(model, [*prompt, *new_ids], canvas, threshold=threshold, least=least)
            nfe += 1
        nfe += 1
        new_ids += [i for i in canvas[: _end(canvas, stops)] if i is not None]
    return Written(new_ids[:max_new_tokens], nfe=nfe)


def greedy_linear(
    model: TriModeModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    block_length: int,
    adapter: DrafterAdapter | None = None,
    stops: Collection[int] = (),
) -> Written:
    """Facts 3.3, greedy, one pass a draft: the prefill, and a draft and a verify each round."""
    new_ids = [int(next_logits(model, prompt)[-1].argmax())]
    nfe = 1
    while len(new_ids) < max_new_tokens and not set(new_ids) & set(stops):
        prefix, last = [*prompt, *new_ids[:-1]], new_ids[-1]
        canvas: list[int | None] = [last, *[None] * (block_length - 1)]
        _reveal(model, prefix, canvas, threshold=0.0, least=1, adapter=adapter)
        block = [i for i in canvas if i is not None]
        chosen = next_logits(model, [*prefix, *block])[len(prefix) :].argmax(-1).tolist()
        nfe += 2
        for i in range(min(block_length, max_new_tokens - len(new_ids))):
            new_ids.append(chosen[i])
            if chosen[i] in stops or i + 1 == block_length or chosen[i] != block[i + 1]:
                break
    return Written(new_ids, nfe=nfe)


def likeliest(
    proposals: Sequence[tuple[int, float, int, float]],
    *,
    left: int,
    branches: int,
    has_guesses: bool,
) -> list[tuple[float, int, int | None]]:
    """Chance, accepted length and guess of the outcomes of a round that get a group, best first.

    Args:
        proposals: First and second choice of each drafted place, each with its probability.
        left: Tokens that may still be emitted when the round begins.
        branches: Groups at most.
        has_guesses: Whether an outcome may name its bonus token.
    """
    groups: list[tuple[float, int, int | None]] = []
    reached = 1.0
    for place, (_, sure, second, second_sure) in enumerate(proposals):
        groups.append((reached * (1 - sure), place, None))
        if has_guesses:
            groups.append((reached * second_sure, place, second))
        reached *= sure
    groups.append((reached, len(proposals), None))
    going_on = [group for group in groups if group[1] + 1 < left]
    return sorted(going_on, key=lambda group: -group[0])[:branches]


def greedy_branching(
    model: TriModeModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    block_length: int,
    branches: int,
    has_guesses: bool,
    adapter: DrafterAdapter | None = None,
    stops: Collection[int] = (),
) -> Written:
    """Facts 3.4 and its family, greedy: the prefill, a verify each round, and a draft each round
    whose outcome had no group.

    A group's draft is made here when the outcome is known, in a forward of its own that sees what
    the group would have seen: the accepted tokens, then its guess or a mask.
    """
    mask = model.config.mask_token_id
    new_ids = [int(next_logits(model, prompt)[-1].argmax())]
    nfe, draft = 1, None
    while len(new_ids) < max_new_tokens and not set(new_ids) & set(stops):
        prefix, left = [*prompt, *new_ids[:-1]], max_new_tokens - len(new_ids)
        if draft is None and left > 1:
            masks = [mask] * (block_length - 1)
            draft = _proposals(model, prefix, [new_ids[-1], *masks], adapter)
            nfe += 1
        proposals = (draft or [])[: left - 1]
        block = [new_ids[-1], *(first for first, _, _, _ in proposals)]
        chosen = next_logits(model, [*prefix, *block])[len(prefix) :].argmax(-1).tolist()
        nfe += 1
        accepted = 0
        while accepted < len(proposals) and block[accepted + 1] == chosen[accepted]:
            accepted += 1
        groups = likeliest(proposals, left=left, branches=branches, has_guesses=has_guesses)
        for token_id in chosen[: accepted + 1]:
            new_ids.append(token_id)
            if token_id in stops:
                break
        begins = {bonus for _, place, bonus in groups if place == accepted}
        begin = chosen[accepted] if chosen[accepted] in begins else None
        draft = None
        if begin in begins:
            masks = [mask] * (block_length - 1)
            first = mask if begin is None else begin
            draft = _proposals(model, [*prefix, *block[: accepted + 1]], [first, *masks], adapter)
    return Written(new_ids, nfe=nfe)


def group_logits(
    model: TriModeModel,
    prefix: Sequence[int],
    group: Sequence[int | None],
    *,
    place: int,
    adapter: DrafterAdapter | None,
) -> Tensor:
    """Logits of a group behind a causal prefix, None standing for a masked token.

    Args:
        model: The network.
        prefix: Up to the anchor, which is its last token.
        group: Token ids, or None.
        place: Of the group's first token: 1 follows the anchor, 2 skips the bonus.
        adapter: On for masks, and for clean tokens if it says so.

    Returns:
        [len(group), V], the mask token banned.
    """
    num_prefix, num_tokens = len(prefix), len(prefix) + len(group)
    mask = model.config.mask_token_id
    ids = [*prefix, *(mask if token_id is None else token_id for token_id in group)]
    positions = [*range(num_prefix), *(num_prefix - 1 + place + i for i in range(len(group)))]
    allowed = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    allowed[num_prefix:] = True
    switch = None
    if adapter is not None:
        on, places = [False] * num_prefix, [0] * num_prefix
        for i, token_id in enumerate(group):
            on.append(token_id is None or adapter.form.adapts_clean)
            places.append(place + i if token_id is None else 0)
        switch = AdapterSwitch(adapter, torch.tensor(on)[None, :, None], torch.tensor([places]))
    with torch.no_grad():
        hidden = model.encode(
            torch.tensor([ids]),
            torch.tensor([positions]),
            attend=MaskedAttention(allowed),
            adapter=switch,
        )
        logits = model.diffusion_head(hidden)[0, num_prefix:]
    logits[:, mask] = -torch.inf
    return logits


@dataclass
class Skipped:
    """What a reference loop with masks that skip the bonus emitted, and its forwards."""

    new_ids: list[int]
    num_forwards: int
    lengths: list[int]


def greedy_skip(
    model: TriModeModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    num_masks: int,
    branches: int = 0,
    has_guesses: bool = False,
    adapter: DrafterAdapter | None = None,
    stops: Collection[int] = (),
) -> Skipped:
    """Speculation whose masks skip the bonus, greedy; linear without branches.

    A round without a draft opens: one forward gives the next token exactly and drafts the places
    after it. Every round then verifies. Drafts of groups are made here when the outcome is known.
    """

    def follow(prefix: Sequence[int]) -> int:
        return int(next_logits(model, prefix)[-1].argmax())

    def proposed(prefix: Sequence[int], guess: int | None) -> list[tuple[int, float, int, float]]:
        group: list[int | None] = [None] * num_masks
        if guess is None:
            logits = group_logits(model, prefix, group, place=2, adapter=adapter)
        else:
            logits = group_logits(model, prefix, [guess, *group], place=1, adapter=adapter)[1:]
        sure, token = logits.softmax(-1).topk(2)
        pairs = zip(token, sure, strict=True)
        return [(int(t[0]), float(s[0]), int(t[1]), float(s[1])) for t, s in pairs]

    new_ids, lengths, draft, num_forwards = [follow(prompt)], [], None, 1

    def is_over() -> bool:
        return len(new_ids) >= max_new_tokens or bool(set(new_ids) & set(stops))

    while not is_over():
        num_before = len(new_ids)
        if draft is None and max_new_tokens - len(new_ids) > 2:
            draft = proposed([*prompt, *new_ids], None)
            new_ids.append(follow([*prompt, *new_ids]))
            num_forwards += 1
        if not is_over():
            left, text = max_new_tokens - len(new_ids), [*prompt, *new_ids]
            proposals = (draft or [])[: left - 1]
            fed = [first for first, _, _, _ in proposals]
            chosen = [follow([*text, *fed[:i]]) for i in range(len(fed) + 1)]
            num_forwards += 1
            accepted = 0
            while accepted < len(fed) and fed[accepted] == chosen[accepted]:
                accepted += 1
            groups = likeliest(proposals, left=left, branches=branches, has_guesses=has_guesses)
            for token_id in chosen[: accepted + 1]:
                new_ids.append(token_id)
                if token_id in stops:
                    break
            begins = {guess for _, place, guess in groups if place == accepted}
            guess = chosen[accepted] if chosen[accepted] in begins else None
            anchored = [*text, *fed[:accepted]]
            draft = proposed(anchored, guess) if guess in begins else None
        lengths.append(len(new_ids) - num_before)
    return Skipped(new_ids, num_forwards, lengths)


def _proposals(
    model: TriModeModel,
    prefix: Sequence[int],
    block: Sequence[int],
    adapter: DrafterAdapter | None,
) -> list[tuple[int, float, int, float]]:
    """First and second choice, each with its probability, at every token of a block but one."""
    logits = next_logits(model, prefix, block, adapter=adapter)[len(prefix) + 1 :]
    best, token = logits.softmax(-1).topk(2)
    return [
        (int(t[0]), float(p[0]), int(t[1]), float(p[1])) for t, p in zip(token, best, strict=True)
    ]


def _reveal(
    model: TriModeModel,
    prefix: Sequence[int],
    canvas: list[int | None],
    *,
    threshold: float | None,
    least: int,
    adapter: DrafterAdapter | None = None,
) -> None:
    """One denoising pass: fills, in place, the masked positions that it is sure enough of."""
    mask = model.config.mask_token_id
    block = [mask if i is None else i for i in canvas]
    logits = next_logits(model, prefix, block, adapter=adapter)[len(prefix) :]
    confidence, token = logits.softmax(-1).max(-1)
    masked = [i for i, token_id in enumerate(canvas) if token_id is None]
    masked.sort(key=lambda i: -float(confidence[i]))
    for rank, i in enumerate(masked):
        if rank < least or (threshold is not None and float(confidence[i]) >= threshold):
            canvas[i] = int(token[i])


def _even(num_masked: int, steps: int) -> list[int]:
    return [num_masked // steps + (i < num_masked % steps) for i in range(steps)]


def _end(canvas: Sequence[int | None], stops: Collection[int]) -> int:
    """How much of a block is text: up to its first stop token, that included."""
    for i, token_id in enumerate(canvas):
        if token_id in stops:
            return i + 1
    return len(canvas)


def _is_stopped(canvas: Sequence[int | None], stops: Collection[int]) -> bool:
    """Whether a stop token stands with no mask before it."""
    end = _end(canvas, stops)
    return canvas[end - 1] in stops and None not in canvas[:end]
