"""Self-speculation: the diffusion view drafts, the AR view verifies, the text is the AR view's.

Linear and branching are one algorithm. A verify forward carries, behind the tokens it checks, one
group of masks for each of a few outcomes that the round may have: the draft of the next round, made
before it is known which it will be. Linear carries none and pays a draft forward every round; the
published quadratic carries one for every acceptance length (arXiv 2607.05722, section 3.3 and
appendix C). A group may begin with a guess of the bonus token: if that comes true, its draft is the
one that a draft forward would have given.

A group without a guess holds a mask in the bonus token's place, or skips that place (the setting's
`num_masks`). Where masks skip it, the forward that drafts gives that token too, exactly, since the
trunk does: a round opens with [last | masks], a verify forward with nothing to check and one
outcome.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, takewhile
from operator import mul

from trimode.decoding.lookup import expected_run
from trimode.decoding.reveal import denoise
from trimode.decoding.sequence import Draft, Sequence
from trimode.decoding.setting import Round
from trimode.decoding.step import Group, Readout, Step, causal_step, group_step

NUM_LATEST = 8
FIRST_LENGTH = 2.0
"""Rounds that tell how long the next will be, and its length before there were any."""

USUAL_CHANCE = 0.6
"""Of a drafted token to be right if those before it are, where the adapter does not say."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a round may end.

    Attributes:
        num_accepted: Drafts accepted, a.
        bonus: The token that the verifier puts after them; None for any.
        probability: As the draft's own confidences have it.
        num_drafted: Tokens that its group drafts.
    """

    num_accepted: int
    bonus: int | None
    probability: float
    num_drafted: int


@dataclass(frozen=True, slots=True)
class _Checked:
    """What a verify forward made of a draft: tokens checked, accepted, and emitted in all; whether
    less was checked than could be."""

    num_checked: int
    num_accepted: int
    num_emitted: int
    is_cut: bool


def speculate(seq: Sequence) -> Generator[Step, Readout, None]:
    """One round: draft unless the round before has or the text itself does, verify the draft in one
    causal forward, keep the run that agrees.

    Both views choose with the same noise (`trimode.decoding.choose`), so a draft token is right
    exactly when it equals the verifier's choice, and what is emitted is the verifier's at any
    temperature. The draft is always a whole group, as the drafter was trained on, and then cut to
    what may still be emitted; where nothing of it could be, nothing is drafted.
    """
    skips, lengths = seq.setting.num_masks is not None, seq.stats.acceptance_lengths
    draft = _ready_draft(seq)
    is_fresh, num_opened = draft is None, 0
    if draft is None and skips and seq.num_remaining > 2:
        opened = yield from _check(seq, Draft.nothing(seq.length), least_groups=1)
        draft, num_opened = seq.pending_draft, opened.num_emitted
        lengths.append(num_opened)
    elif draft is None and not skips and seq.num_remaining > 1:
        draft = yield from _draft(seq)
    if not seq.is_finished:
        draft = draft or Draft.nothing(seq.length)
        # Behind a guess from the text, masks that skip make the draft that otherwise would need a
        # forward of its own.
        checked = yield from _check(seq, draft, least_groups=int(skips and draft.is_looked_up))
        if num_opened:
            lengths[-1] += checked.num_emitted
        else:
            lengths.append(checked.num_emitted)
        seq.latest_round = Round(
            setting=seq.setting,
            num_checked=checked.num_checked,
            num_accepted=checked.num_accepted,
            has_next=seq.pending_draft is not None,
            is_fresh=is_fresh,
            num_opened=num_opened,
            is_looked_up=draft.is_looked_up,
            is_cut=checked.is_cut or 0 < len(draft.token_ids) < seq.setting.draft_len,
            unfed_confidence=draft.confidences[checked.num_checked] if checked.is_cut else None,
        )


def verify_lookup(seq: Sequence) -> Generator[Step, Readout, bool]:
    """A plain round of `auto`: whether the text itself promised what was worth checking beside the
    next token, which then is done."""
    draft = _looked_up(seq) if seq.mode == "auto" else None
    if draft is None or not _num_worth(seq, draft):
        return False
    checked = yield from _check(seq, _told(seq, draft), least_groups=0)
    seq.stats.acceptance_lengths.append(checked.num_emitted)
    return True


def _ready_draft(seq: Sequence) -> Draft | None:
    """Return the pending draft, or one from the text if that promises more; None if neither is
    there, or a drafted block promises more still."""
    draft, found = seq.pending_draft, _looked_up(seq)
    if found is None:
        return draft
    promised = expected_run(draft.confidences) if draft is not None else 0.0
    if draft is None and seq.setting.num_masks is None:
        # A drafted block takes two forwards for one that checks what was looked up.
        lengths = seq.stats.acceptance_lengths[-NUM_LATEST:]
        promised = (sum(lengths) / len(lengths) if lengths else FIRST_LENGTH) / 2 - 1
    return draft if expected_run(found.confidences) <= promised else _told(seq, found)


def _looked_up(seq: Sequence) -> Draft | None:
    """What followed in the text where its end stood before."""
    if seq.lookup is None or not seq.setting.has_lookup or seq.num_remaining < 2:
        return None
    guess = seq.lookup.guess(seq.prompt_ids, seq.new_ids, most=seq.setting.draft_len)
    if guess is None:
        return None
    return Draft(seq.length, guess.token_ids, guess.confidences, [], [], is_looked_up=True)


def _num_worth(seq: Sequence, draft: Draft) -> int:
    return draft.num_worth(cutoff=seq.params.draft_cutoff, min_gain=seq.setting.min_gain)


def _check(seq: Sequence, draft: Draft, *, least_groups: int) -> Generator[Step, Readout, _Checked]:
    """One verify forward: the draft checked, what agrees and the bonus token emitted, and the draft
    of the group whose outcome came true kept for the next round.

    Args:
        seq: Whose text goes on.
        draft: May have no tokens.
        least_groups: Groups to feed even where the setting has none.
    """
    num_worth = _num_worth(seq, draft)
    num_checked = min(num_worth, seq.num_remaining - 1)
    is_cut = num_checked == num_worth < len(draft.token_ids)
    fed = [seq.last, *draft.token_ids[:num_checked]]
    outcomes = likeliest_outcomes(seq, draft, num_checked, least=least_groups)
    readout = yield _verify_step(seq, fed, outcomes)
    chosen = readout.token_ids[: len(fed)]
    agreeing = takewhile(lambda pair: pair[0] == pair[1], zip(fed[1:], chosen, strict=False))
    num_accepted = sum(1 for _ in agreeing)
    seq.event("verify", position=seq.length + 1, token_ids=fed[1:], num_accepted=num_accepted)
    num_emitted = seq.emit(chosen[: num_accepted + 1], readout.logprobs)
    seq.commit(num_emitted)
    first = len(fed)
    for outcome in [] if seq.is_finished else outcomes:
        stop = first + outcome.num_drafted
        if outcome.num_accepted == num_accepted and outcome.bonus in (None, chosen[num_accepted]):
            seq.keep_draft(_draft_of_group(seq, readout, slice(first, stop)))
            break
        first = stop
    return _Checked(num_checked, num_accepted, num_emitted, is_cut)


def likeliest_outcomes(
    seq: Sequence, draft: Draft, num_checked: int, *, least: int = 0
) -> list[Outcome]:
    """The outcomes that get a group each, those with a guess before those without.

    Only such after which the text goes on. The draft's confidences are taken for chances of being
    accepted: c_1 ... c_a (1 - c_{a+1}) for a length of a; the guess is the drafter's second choice
    where acceptance stops, with its share of what the first leaves. Where all of a draft that was
    cut is accepted, the guess is its first token that was cut off. One that is too unlikely for
    what its group may bring gets none; the masks of a group that skips the bonus are as many as
    bring enough each.

    Args:
        seq: Whose setting says how many.
        draft: The whole one.
        num_checked: Tokens of it that are fed.
        least: Outcomes wanted even where the setting wants fewer.
    """
    has_guesses = seq.setting.has_guesses
    num_wanted = max(seq.setting.num_groups, least)
    num_wanted = min(num_wanted, seq.num_spare_groups(num_checked + 1))
    if not num_wanted:
        return []
    has_guesses = has_guesses and len(draft.runner_ups) == len(draft.token_ids)  # or made without
    found = list(_outcomes(draft, num_checked, has_guesses=has_guesses))
    found.sort(key=lambda one: -one.probability)
    going_on = [one for one in found if one.num_accepted + 1 < seq.num_remaining][:num_wanted]
    kept = [
        replace(one, num_drafted=number)
        for i, one in enumerate(going_on)
        if (number := max(_num_drafted(seq, one), int(i < least)))
    ]
    return sorted(kept, key=lambda one: one.bonus is None)


def _num_drafted(seq: Sequence, outcome: Outcome) -> int:
    """Tokens that a group for an outcome drafts, 0 if it is to have none.

    What it drafts is right with the chances that the adapter gives of itself. Only masks that skip
    the bonus may be fewer than the setting has: a block is drafted as it was trained, whole.
    """
    setting = seq.setting
    if setting.min_gain <= 0:
        return setting.draft_len
    form = "block" if setting.num_masks is None else "skip"
    chances = seq.form.acceptance_of(form) or (USUAL_CHANCE,)
    places = (chances[min(i, len(chances) - 1)] for i in range(setting.draft_len))
    reached = list(accumulate(places, mul, initial=outcome.probability))[1:]
    if setting.num_masks is None:
        return setting.draft_len if sum(reached) >= setting.min_gain * setting.group_len else 0
    return sum(chance >= setting.min_gain for chance in reached)


def _outcomes(draft: Draft, num_checked: int, *, has_guesses: bool) -> Iterator[Outcome]:
    reached = 1.0
    for num_accepted, confidence in enumerate(draft.confidences[:num_checked]):
        stops = reached * (1 - confidence)
        yield Outcome(num_accepted, None, stops, 0)
        if has_guesses:
            share = min(draft.runner_up_confidences[num_accepted] / max(1 - confidence, 1e-9), 1.0)
            yield Outcome(num_accepted, draft.runner_ups[num_accepted], stops * share, 0)
        reached *= confidence
    yield Outcome(num_checked, None, reached, 0)
    if has_guesses and num_checked < len(draft.token_ids):
        share = draft.confidences[num_checked]
        yield Outcome(num_checked, draft.token_ids[num_checked], reached * share, 0)


def _verify_step(seq: Sequence, fed: list[int], outcomes: list[Outcome]) -> Step:
    """The tokens to check in the AR view, then a group for each outcome, in the drafter's."""
    trunk = causal_step("verify", fed, start=seq.length, wanted=range(len(fed)))
    if not outcomes:
        return trunk
    return group_step(
        "verify",
        [_group(seq, outcome) for outcome in outcomes],
        form=seq.form,
        trunk=trunk,
        wants_runner_up=seq.setting.has_guesses,
    )


def _group(seq: Sequence, outcome: Outcome) -> Group:
    """What drafts behind one outcome: place 1, unless it is skipped, and the masks after it."""
    num_drafted, mask = outcome.num_drafted, seq.mask_token_id
    anchor = seq.length + outcome.num_accepted
    is_skipped = seq.setting.num_masks is not None and outcome.bonus is None
    first = [] if is_skipped else [mask if outcome.bonus is None else outcome.bonus]
    is_masked = [outcome.bonus is None] * len(first) + [True] * num_drafted
    return Group(
        token_ids=[*first, *[mask] * num_drafted],
        is_masked=is_masked,
        start=anchor + 2 - len(first),
        anchor=anchor,
        wanted=range(len(first), len(first) + num_drafted),
    )


def _draft(seq: Sequence) -> Generator[Step, Readout, Draft]:
    """A draft made now: the block denoised with the drafter on."""
    block = [seq.last] + [seq.mask_token_id] * (seq.setting.block_length - 1)
    filled = yield from denoise(
        seq,
        block,
        kind="draft",
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


def _draft_of_group(seq: Sequence, readout: Readout, answers: slice) -> Draft:
    """What a group answered; its first token, the bonus, is known by now."""
    draft = Draft(
        seq.length,
        readout.token_ids[answers],
        readout.confidences[answers],
        readout.runner_ups[answers],
        readout.runner_up_confidences[answers],
    )
    return _told(seq, draft)


def _told(seq: Sequence, draft: Draft) -> Draft:
    """Tell the watcher of a draft and return it."""
    block = [seq.last, *draft.token_ids]
    seq.event("draft", position=seq.length, token_ids=block, is_masked=[False] * len(block))
    return draft
