"""Self-speculation: the diffusion view drafts, the AR view verifies, the text is the AR view's.

Linear and branching are one algorithm. A verify forward carries, behind the tokens it checks, one
group of masks for each of a few outcomes that the round may have: the draft of the next round, made
before it is known which it will be. Linear carries none and pays a draft forward every round; the
published quadratic carries one for every acceptance length (facts 3.3 and 3.4). A group may begin
with a guess of the bonus token instead of a mask: if that comes true, its draft is the one that a
draft forward would have given.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import takewhile

from trimode.decoding.reveal import denoise
from trimode.decoding.sequence import Draft, Sequence
from trimode.decoding.setting import Round
from trimode.decoding.step import BLOCK, Readout, Step, causal_step
from trimode.model.masks import TRUNK


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a round may end.

    Attributes:
        num_accepted: Drafts accepted, a.
        bonus: The token that the verifier puts after them; None for any.
        probability: As the draft's own confidences have it.
    """

    num_accepted: int
    bonus: int | None
    probability: float


def speculate(seq: Sequence) -> Generator[Step, Readout, None]:
    """One round: draft K - 1 tokens unless the round before has, verify them in one causal forward,
    keep the run that agrees.

    Both views choose with the same noise (`trimode.decoding.choose`), so a draft token is right
    exactly when it equals the verifier's choice, and what is emitted is the verifier's at any
    temperature. The draft is always a whole block, as the drafter was trained on, and then cut to
    what may still be emitted; where that is one token there is nothing to draft.
    """
    draft = seq.pending_draft
    is_fresh = draft is None
    if draft is None and seq.num_remaining > 1:
        draft = yield from _draft(seq)
    draft = draft or Draft.nothing(seq.length)
    num_checked = min(draft.num_sure(seq.params.draft_cutoff), seq.num_remaining - 1)
    block = [seq.last, *draft.token_ids[:num_checked]]
    outcomes = likeliest_outcomes(seq, draft, num_checked)
    readout = yield _verify_step(seq, block, outcomes)
    chosen = readout.token_ids[: len(block)]
    agreeing = takewhile(lambda pair: pair[0] == pair[1], zip(block[1:], chosen, strict=False))
    num_accepted = sum(1 for _ in agreeing)
    seq.event("verify", position=seq.length + 1, token_ids=block[1:], num_accepted=num_accepted)
    num_emitted = seq.emit(chosen[: num_accepted + 1], readout.logprobs)
    seq.stats.acceptance_lengths.append(num_emitted)
    seq.commit(num_emitted)
    has_next = False
    for number, outcome in enumerate(outcomes):
        if outcome.num_accepted == num_accepted and outcome.bonus in (None, chosen[num_accepted]):
            seq.keep_draft(_draft_of_group(seq, readout, number, first=len(block)))
            has_next = True
            break
    seq.latest_round = Round(seq.setting, num_checked, num_accepted, has_next, is_fresh)


def likeliest_outcomes(seq: Sequence, draft: Draft, num_checked: int) -> list[Outcome]:
    """The outcomes that get a group each, those with a guess before those without.

    Only such after which the text goes on. The draft's confidences are taken for chances of being
    accepted: c_1 ... c_a (1 - c_{a+1}) for a length of a; the guess is the drafter's second choice
    where acceptance stops, with its share of what the first leaves. Where all of a draft that was
    cut is accepted, the guess is its first token that was cut off.
    """
    has_guesses = seq.setting.has_guesses
    num_wanted = min(seq.setting.num_groups, seq.num_spare_groups(num_checked + 1))
    if not num_wanted:
        return []
    has_guesses = has_guesses and len(draft.runner_ups) == len(draft.token_ids)  # or made without
    found = list(_outcomes(draft, num_checked, has_guesses=has_guesses))
    found.sort(key=lambda one: -one.probability)
    going_on = [one for one in found if one.num_accepted + 1 < seq.num_remaining]
    return sorted(going_on[:num_wanted], key=lambda one: one.bonus is None)


def _outcomes(draft: Draft, num_checked: int, *, has_guesses: bool) -> Iterator[Outcome]:
    reached = 1.0
    for num_accepted, confidence in enumerate(draft.confidences[:num_checked]):
        stops = reached * (1 - confidence)
        yield Outcome(num_accepted, None, stops)
        if has_guesses:
            share = min(draft.runner_up_confidences[num_accepted] / max(1 - confidence, 1e-9), 1.0)
            yield Outcome(num_accepted, draft.runner_ups[num_accepted], stops * share)
        reached *= confidence
    yield Outcome(num_checked, None, reached)
    if has_guesses and num_checked < len(draft.token_ids):
        share = draft.confidences[num_checked]
        yield Outcome(num_checked, draft.token_ids[num_checked], reached * share)


def _verify_step(seq: Sequence, block: list[int], outcomes: list[Outcome]) -> Step:
    """The block in the AR view, then a group for each outcome, in the drafter's."""
    step = causal_step("verify", block, start=seq.length, wanted=range(len(block)))
    if not outcomes:
        return step
    length, masks = seq.setting.block_length, [seq.mask_token_id]
    token_ids, positions, groups = [*step.token_ids], [*step.positions], [*step.groups]
    wanted = [*step.wanted]
    for number, outcome in enumerate(outcomes):
        start = seq.length + outcome.num_accepted + 1  # of the bonus token
        wanted += range(len(token_ids) + 1, len(token_ids) + length)
        token_ids += (masks if outcome.bonus is None else [outcome.bonus]) + masks * (length - 1)
        positions += range(start, start + length)
        groups += [BLOCK + number] * length
    return Step(
        kind="verify",
        token_ids=token_ids,
        positions=positions,
        groups=groups,
        is_drafter_on=[group != TRUNK for group in groups],
        wanted=wanted,
        wants_confidence=True,
        wants_runner_up=seq.setting.has_guesses,
    )


def _draft(seq: Sequence) -> Generator[Step, Readout, Draft]:
    """A draft made now: the block denoised with the drafter on."""
    block = [seq.last] + [seq.mask_token_id] * (seq.setting.block_length - 1)
    filled = yield from denoise(
        seq,
        block,
        kind="draft",
        is_drafter_on=True,
        threshold=seq.params.reveal_threshold("linear"),
        wants_runner_up=seq.setting.has_guesses,
    )
    return Draft(
        seq.length,
        block[1:],
        filled.confidences[1:],
        filled.runner_ups[1:],
        filled.runner_up_confidences[1:],
    )


def _draft_of_group(seq: Sequence, readout: Readout, number: int, *, first: int) -> Draft:
    """What a group answered; its first token, the bonus, is known by now."""
    share = seq.setting.block_length - 1
    answers = slice(first + number * share, first + (number + 1) * share)
    draft = Draft(
        seq.length,
        readout.token_ids[answers],
        readout.confidences[answers],
        readout.runner_ups[answers],
        readout.runner_up_confidences[answers],
    )
    block = [seq.last, *draft.token_ids]
    seq.event("draft", position=seq.length, token_ids=block, is_masked=[False] * len(block))
    return draft
