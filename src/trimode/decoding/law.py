"""What an answer is subject to beyond temperature and filters: healing, grammar, bias, penalties,
budget, and ends of text that come too early.

A law is made from a sequence and the step it asks for, never by a mode: what a trunk token answers
is subject to the true text up to it, the drafts fed before it included; so the verifier's law of a
drafted position is the one that AR has there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trimode.decoding.bits import Bits, add_tokens, has_others, no_tokens, token_set, unpacked
from trimode.decoding.control import Control
from trimode.decoding.step import Step
from trimode.model.masks import TRUNK

if TYPE_CHECKING:
    from trimode.decoding.grammar import Matcher
    from trimode.decoding.sequence import Sequence as Text


Counts = NDArray[np.int32]
"""[V]. How often each token occurs."""


@dataclass(frozen=True, slots=True, eq=False)
class RowLaw:
    """Of one answer.

    Attributes:
        allowed: What healing, grammar or thinking budget leave; None for all.
        bias: Token id -> what is added; -inf for what may not end the text yet.
        seen: Committed tokens that the penalty is for; None for no penalty.
            All laws of a sequence share them, so they hold until its text goes on.
        fed: Further tokens that the penalty is for.
        penalty: See `Control.repetition_penalty`.
        counts: Occurrences of tokens in the committed new text; None for no penalty by number.
            Shared as `seen` is.
        counted: Further new tokens, one for each occurrence.
        frequency: See `Control.frequency_penalty`.
        presence: See `Control.presence_penalty`.
    """

    allowed: Bits | None = None
    bias: Mapping[int, float] = field(default_factory=dict)
    seen: Bits | None = None
    fed: Sequence[int] = ()
    penalty: float = 1.0
    counts: Counts | None = None
    counted: Sequence[int] = ()
    frequency: float = 0.0
    presence: float = 0.0


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an answer stands.

    Attributes:
        index: In the new text: 0 is the first token after the prompt.
        is_trunk: Whether the AR view answers.
        before: Fed tokens that stand before it, from position `seq.length` on; may hold masks.
        is_known: Whether they are all tokens of the text up to there, none masked or left out.
        beside: Fed tokens of its own group that do not stand before it.
        last_index: Of the last token of its group; its own in the trunk.
    """

    index: int
    is_trunk: bool
    before: list[int]
    is_known: bool
    beside: list[int]
    last_index: int


class Rules:
    """The laws of one sequence; follows its text, so what was rejected leaves no trace.

    Args:
        control: What was asked for, its end of thought settled.
        matcher: Follows the grammar; None without one.
        min_tokens: New tokens before which the text does not end.
        stop_token_ids: Tokens that end it.
    """

    def __init__(
        self,
        control: Control,
        *,
        matcher: Matcher | None = None,
        min_tokens: int = 0,
        stop_token_ids: Collection[int] = (),
    ) -> None:
        if (matcher is None) != (control.source is None):
            raise AssertionError("a grammar needs a matcher, and a matcher a grammar")
        self._control = control
        self._matcher = matcher
        self._bias = dict(control.logit_bias or {})
        self._min_tokens = min_tokens
        self._stop_token_ids = stop_token_ids
        self._early_bias = self._bias | dict.fromkeys(stop_token_ids, -torch.inf)
        self._seen: Bits | None = None  # of the committed text
        self._num_seen = 0
        self._counts: Counts | None = None  # of the committed new text
        self._num_counted = 0

    def rows(self, seq: Text, step: Step, *, num_tokens: int) -> list[RowLaw]:
        """A law for each of the step's wanted answers.

        Args:
            seq: Whose step it is.
            step: What it feeds.
            num_tokens: Size of the vocabulary V.
        """
        control = self._control
        is_penalised = control.repetition_penalty != 1
        seen = self._committed(seq, num_tokens) if is_penalised else None
        is_counted = bool(control.frequency_penalty or control.presence_penalty)
        counts = self._committed_counts(seq, num_tokens) if is_counted else None
        num_old = max(seq.new_start - seq.length, 0)  # fed tokens of the prompt
        laws = []
        for place in _places(seq, step):
            allowed = self._allowed(seq, place, num_tokens)
            bias = self._bias_at(seq, place, allowed, num_tokens)
            if self._is_end_to_come(seq, step, place):
                assert control.end_think_token_id is not None
                bias = {**bias, control.end_think_token_id: -torch.inf}
            fed = [*place.before, *place.beside] if is_penalised else ()
            counted = [*place.before[num_old:], *place.beside] if is_counted else ()
            law = RowLaw(
                *(allowed, bias, seen, fed, control.repetition_penalty),
                *(counts, counted, control.frequency_penalty, control.presence_penalty),
            )
            laws.append(law)
        return laws

    def write_fixed(self, seq: Text, canvas: list[int]) -> None:
        """Put the end of thought into the block in which the budget runs out, in place.

        Args:
            seq: Whose block it is.
            canvas: The block, from `seq.last` on.
        """
        budget, end = self._control.max_thinking_tokens, self._control.end_think_token_id
        if budget is None or end is None or end in seq.new_ids[seq.num_inside :]:
            return
        offset = seq.new_start + budget - seq.length
        if 0 < offset < len(canvas):
            canvas[offset] = end

    def _committed(self, seq: Text, num_tokens: int) -> Bits:
        """Tokens of the committed text."""
        if self._seen is None:
            self._seen = no_tokens(num_tokens)
        num_prompt, first, stop = len(seq.prompt_ids), self._num_seen, seq.length
        add_tokens(self._seen, seq.prompt_ids[first:stop])
        add_tokens(self._seen, seq.new_ids[max(first - num_prompt, 0) : max(stop - num_prompt, 0)])
        self._num_seen = stop
        return self._seen

    def _committed_counts(self, seq: Text, num_tokens: int) -> Counts:
        """Occurrences of tokens in the committed text, the prompt left out."""
        start, num_prompt = seq.new_start, len(seq.prompt_ids)
        stop = max(seq.length, start)
        if self._counts is None or stop < self._num_counted:  # its row was taken
            self._counts, self._num_counted = np.zeros(num_tokens, dtype=np.int32), start
        first = max(self._num_counted, start)
        np.add.at(self._counts, seq.new_ids[first - num_prompt : stop - num_prompt], 1)
        self._num_counted = stop
        return self._counts

    def _bias_at(
        self, seq: Text, place: _Place, allowed: Bits | None, num_tokens: int
    ) -> Mapping[int, float]:
        """What is added; it bans ends of text that come too early, unless nothing else is left."""
        is_free = not (self._min_tokens and self._stop_token_ids)
        if is_free or place.index >= self._min_tokens:
            return self._bias
        if seq.is_healing:
            assert seq.healing is not None  # what says only what the prompt said ends nothing
            beyond = seq.healing.going_beyond(seq.new_ids, self._stop_token_ids)
            return self._bias | dict.fromkeys(beyond, -torch.inf)
        if allowed is not None and not has_others(allowed, self._stop_token_ids, num_tokens):
            return self._bias
        return self._early_bias

    def _allowed(self, seq: Text, place: _Place, num_tokens: int) -> Bits | None:
        """What healing, and grammar or budget, leave, as far as the text before the place is
        known."""
        if seq.is_healing:
            assert seq.healing is not None
            allowed = seq.healing.allowed_after(seq.new_ids)
            if self._matcher is None or allowed is None:
                return allowed
            of_grammar = self._matcher.allowed_after(seq.new_ids)
            return None if of_grammar is None else allowed & of_grammar[: len(allowed)]
        if self._matcher is not None:
            if not place.is_known:
                return None
            num_kept = max(seq.length - len(seq.prompt_ids), 0)
            text = [*seq.new_ids[:num_kept], *_new(seq, place)]
            return self._matcher.allowed_after(text)
        budget, end = self._control.max_thinking_tokens, self._control.end_think_token_id
        if budget is None or self._is_thought_over(seq, place):
            return None
        if place.index == budget or (place.is_trunk and place.index > budget):
            assert end is not None
            return token_set([end], num_tokens)
        return None

    def _is_end_to_come(self, seq: Text, step: Step, place: _Place) -> bool:
        """Whether the end of thought is banned, for it stands behind, in the same block of text."""
        budget = self._control.max_thinking_tokens
        if budget is None or step.kind != "denoise" or self._is_thought_over(seq, place):
            return False
        return not place.is_trunk and place.index < budget <= place.last_index

    def _is_thought_over(self, seq: Text, place: _Place) -> bool:
        end = self._control.end_think_token_id
        return end in seq.new_ids[seq.num_inside :] or end in _beyond(seq, place)


def _new(seq: Text, place: _Place) -> list[int]:
    """Of the fed tokens before a place, those that are not the prompt's."""
    return place.before[max(len(seq.prompt_ids) - seq.length, 0) :]


def _beyond(seq: Text, place: _Place) -> list[int]:
    """Of these, those that go beyond the prompt's end."""
    return place.before[max(seq.new_start - seq.length, 0) :]


def _places(seq: Text, step: Step) -> Iterator[_Place]:
    """Of all wanted answers, in order."""
    trunk: list[tuple[int, int]] = []  # position, id
    groups: dict[int, list[tuple[int, int, bool]]] = {}  # position, id, whether masked
    for token_id, position, group, mask_place in zip(
        step.token_ids, step.positions, step.groups, step.mask_places, strict=True
    ):
        if group == TRUNK:
            trunk.append((position, token_id))
        else:
            groups.setdefault(group, []).append((position, token_id, mask_place > 0))
    num_prompt = seq.new_start
    for i in step.wanted:
        position = step.positions[i]
        if step.groups[i] == TRUNK:
            before = [token_id for p, token_id in trunk if p <= position]
            index = position + 1 - num_prompt
            yield _Place(index, True, before, True, [], index)
            continue
        own, anchor = groups[step.groups[i]], step.anchors[i]
        before = [token_id for p, token_id in trunk if p <= anchor]
        before += [token_id for p, token_id, _ in own if p < position]
        num_clean = sum(not is_masked for p, _, is_masked in own if p < position)
        is_known = num_clean == position - anchor - 1
        beside = [token_id for p, token_id, _ in own if p >= position]
        last_index = max(own)[0] - num_prompt
        yield _Place(position - num_prompt, False, before, is_known, beside, last_index)


def under(logits: Tensor, laws: Sequence[RowLaw | None]) -> Tensor:
    """The logits under their laws: grammar and budget, then bias, then penalties.

    Args:
        logits: [W, V], the ban applied.
        laws: [W], None where there is none.

    Returns:
        [W, V], a tensor of its own; not allowed is -inf.
    """
    device, found = logits.device, logits.clone()
    num_tokens = logits.shape[-1]
    some = [(w, law) for w, law in enumerate(laws) if law is not None]
    limited = [(w, unpacked(law.allowed, num_tokens)) for w, law in some if law.allowed is not None]
    if limited:
        rows = torch.tensor([w for w, _ in limited], device=device)
        allowed = torch.stack([mask for _, mask in limited]).to(device)
        found[rows] = found[rows].masked_fill(~allowed, -torch.inf)
    added = [(w, token_id, value) for w, law in some for token_id, value in law.bias.items()]
    if added:
        rows, ids = torch.tensor([(w, i) for w, i, _ in added], device=device).T
        found[rows, ids] += torch.tensor([x for _, _, x in added], device=device, dtype=found.dtype)
    penalised = [(w, law, law.seen) for w, law in some if law.seen is not None]
    if penalised:
        rows = torch.tensor([w for w, _, _ in penalised], device=device)
        seen = torch.stack([unpacked(bits, num_tokens) for _, _, bits in penalised])
        for mask, (_, law, _) in zip(seen, penalised, strict=True):
            mask[list(law.fed)] = True
        penalties = [[law.penalty] for _, law, _ in penalised]
        penalty = torch.tensor(penalties, device=device, dtype=found.dtype)
        scores = found[rows]
        less = torch.where(scores > 0, scores / penalty, scores * penalty)
        found[rows] = torch.where(seen.to(device), less, scores)
    counted = [(w, law, law.counts) for w, law in some if law.counts is not None]
    if counted:
        rows = torch.tensor([w for w, _, _ in counted], device=device)
        counts = torch.from_numpy(np.stack([counts for _, _, counts in counted]))
        for row, (_, law, _) in zip(counts, counted, strict=True):
            new_ids = torch.tensor(law.counted, dtype=torch.int64)
            row.index_add_(0, new_ids, torch.ones(len(new_ids), dtype=row.dtype))
        rates = [[law.frequency, law.presence] for _, law, _ in counted]
        frequency, presence = torch.tensor(rates, device=device, dtype=found.dtype).T[..., None]
        numbers = counts.to(device, found.dtype)
        found[rows] -= numbers * frequency + (numbers > 0) * presence
    return found
