"""Revision: tokens of a block that are already revealed may change, until the block is committed.

Three methods, each the passes over one block. None touches what was emitted: a block is emitted
when nothing of it is to change any more, and its K/V come from a causal forward over the tokens
that are emitted.

A revealed token is never judged by what the diffusion view answers at the token's own position:
that view is trained on masked positions alone, and there it nearly always names another token,
mostly a worse one. Either the token is masked anew, or the AR view judges.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from itertools import accumulate

from trimode.decoding.noise import noise_key
from trimode.decoding.params import GenerationParams
from trimode.decoding.reveal import chosen_by, denoise, even_schedule, first_stop
from trimode.decoding.sequence import Sequence
from trimode.decoding.step import Readout, Step, block, causal_step, group_step

DEFAULT_EDIT_THRESHOLD = 0.5
DEFAULT_DOUBT = 0.1
DEFAULT_REMASK_RATE = 0.5

_WORD = 2**64


def joint_threshold(seq: Sequence, canvas: list[int]) -> Generator[Step, Readout, None]:
    """Fill `canvas`, in place; while that goes on, and until it changes nothing, replace what the
    diffusion view would now put otherwise.

    Beside the block, a pass carries a copy of it for each of the least sure of the revealed tokens
    (as many as the edit budget has left), in which that token alone is masked anew. The most
    confident answer that names another token, above the edit threshold, replaces it: one a pass,
    since two that fit what stands need not fit each other. The budget ends what would go round in
    circles.

    Args:
        seq: Whose parameters decide.
        canvas: [K] token ids, the first clean, the others masks but for what stands fixed.
    """
    params = seq.params
    threshold = _given(params.edit_threshold, DEFAULT_EDIT_THRESHOLD)
    open_at_first = _masked(seq, canvas)
    floors = even_schedule(len(open_at_first), params.steps) if params.steps else []
    sure: dict[int, float] = {}  # of each revealed position, when it was
    left, has_changed = params.most_edits, False
    while (is_open := _is_open(seq, canvas)) or (has_changed and left):
        masked = _masked(seq, canvas) if is_open else []
        shown = [i for i in sure if i <= first_stop(seq, canvas)]
        checked = sorted(shown, key=lambda i: (sure[i], i))[:left]
        readout = yield _with_copies(seq, canvas, masked, checked)
        has_changed = False
        if masked:
            floor = floors.pop(0) if floors else 1
            for i in _revealed(seq, readout, masked, floor):
                canvas[masked[i]], sure[masked[i]] = readout.token_ids[i], readout.confidences[i]
            has_changed = True
        edit = _best_edit(readout, canvas, checked, first=len(masked), threshold=threshold)
        _tell_pass(seq, canvas)
        if edit is not None:
            place, new_id, confidence = edit
            before = {place: canvas[place]}
            canvas[place], sure[place] = new_id, confidence
            _tell_revised(seq, before, canvas, "joint_threshold")
            left, has_changed = left - 1, True


def ar_doubt(seq: Sequence, canvas: list[int]) -> Generator[Step, Readout, Readout]:
    """Fill `canvas`, in place; then reopen what the AR view doubts, and fill that anew.

    The causal forward that commits a block is paid anyway, and says how probable the AR view finds
    every token. Those below the doubt threshold, the least probable first while the edit budget
    lasts, become masks and are denoised again among those that stay; then comes another causal
    forward. The first of them needs no denoising: nothing before it changes, so what the AR view
    itself would put there is known from the same forward, and is put there. A position is reopened
    once, so the rounds end. Where nothing is doubted, the only cost is the causal forward of the
    last block, which otherwise is skipped.

    Args:
        seq: Whose parameters decide.
        canvas: [K] token ids, the first clean, the others masks but for what stands fixed.

    Returns:
        Answers of the causal forward over what now stands, up to a stop token, for the caller to
        commit; the last is the token after the block.
    """
    params = seq.params
    doubt, left = _given(params.doubt, DEFAULT_DOUBT), params.most_edits
    reopenable = set(_masked(seq, canvas))
    before: dict[int, int] = {}  # what stood at the reopened positions
    while True:
        yield from denoise(
            *(seq, canvas),
            kind="denoise",
            threshold=params.reveal_threshold("diffusion"),
            policy=params.reveal_policy,
        )
        _tell_revised(seq, before, canvas, "ar_doubt")
        text = canvas[: first_stop(seq, canvas) + 1]
        readout = yield causal_step(
            *("commit", text),
            start=seq.length,
            wanted=range(len(text)),
            targets=[*text[1:], text[0]],  # the last answer is for a token yet unknown
        )
        chances = {i: math.exp(readout.log_probs[i - 1]) for i in range(1, len(text))}
        doubted = [i for i in chances if i in reopenable and chances[i] < doubt]
        doubted = sorted(doubted, key=lambda i: (chances[i], i))[:left]
        if not doubted:
            return readout
        before = _still_masked(seq, before, canvas)
        for i in doubted:
            before[i], canvas[i] = canvas[i], seq.mask_token_id
        if seq.rules is None:  # the rules of a block are not those of the AR view
            canvas[min(doubted)] = readout.token_ids[min(doubted) - 1]
        reopenable -= set(doubted)
        left -= len(doubted)
        _tell_pass(seq, canvas)


def remdm(seq: Sequence, canvas: list[int]) -> Generator[Step, Readout, None]:
    """Fill `canvas`, in place, masking some of what is revealed anew after every pass.

    Of the n masks, the share alpha that is revealed after each pass follows the even schedule, as
    it does without revision; so a pass reveals, by the policy, what the schedule asks for and what
    it masks anew besides. A revealed token is masked anew with probability sigma
    (`remask_chances`), drawn from request seed, position and number of the pass. The last pass
    masks nothing, and a pass that would reveal nothing is not made.

    The paper reveals each position by a draw of its own, so that alpha holds on average; here it
    holds exactly, but where a draw masks more anew than the schedule leaves masked, and the policy
    says where.

    Args:
        seq: Whose parameters decide.
        canvas: [K] token ids, the first clean, the others masks but for what stands fixed.

    Source: ReMDM, arXiv 2503.00307: schedules max-capped, rescaled, confidence-based, and loop.
    """
    masked = _masked(seq, canvas)
    num, steps = len(masked), seq.params.steps
    assert steps is not None
    counts = [0, *accumulate(even_schedule(num, steps))]
    first_held = len(counts) - 1
    if seq.params.remask_schedule == "loop" and len(counts) > 2:
        counts[-1:-1] = [counts[-2]] * (len(counts) - 1)
    sure: dict[int, float] = {}  # of each revealed position, when it was
    before: dict[int, int] = {}  # what stood at those masked anew
    for num_passes, (had, has) in enumerate(zip(counts, counts[1:], strict=False), start=1):
        if not _is_open(seq, canvas):
            return
        chances = remask_chances(
            *(seq.params, sure),
            had=had / num,
            has=has / num,
            is_looping=first_held <= num_passes < len(counts) - 1,
        )
        reopened = [
            i for i in sure if _uniform(seq.params.seed, seq.length + i, num_passes) < chances[i]
        ]
        floor = has - (len(sure) - len(reopened))
        if not floor:
            continue
        masked = _masked(seq, canvas)
        whole = block(canvas, start=seq.length, mask_token_id=seq.mask_token_id, wanted=masked)
        readout = yield group_step("denoise", [whole], form=seq.form)
        for i in _revealed(seq, readout, masked, floor):
            canvas[masked[i]], sure[masked[i]] = readout.token_ids[i], readout.confidences[i]
        _tell_pass(seq, canvas)
        _tell_revised(seq, before, canvas, "remdm")
        before = _still_masked(seq, before, canvas)
        for i in reopened:
            before[i], canvas[i] = canvas[i], seq.mask_token_id
            del sure[i]
        if reopened:
            _tell_pass(seq, canvas)


def remask_chances(
    params: GenerationParams,
    sure: dict[int, float],
    *,
    had: float,
    has: float,
    is_looping: bool = False,
) -> dict[int, float]:
    """Sigma of a pass for every revealed position; sigma_max = min(1, (1 - alpha_s) / alpha_t).

    `cap`: min(eta, sigma_max). `rescale`: eta sigma_max. `conf`: that, shared out by the softmax
    of minus the confidences, so that the least sure are the likeliest and about one goes at most.
    `loop`: as `cap`, in as many passes again as there are steps, alpha held before the last of
    them; 0 in all others.

    Args:
        params: Whose schedule and rate eta apply.
        sure: Revealed position -> its confidence when it was.
        had, has: alpha_t and alpha_s, the shares revealed before and after the pass.
        is_looping: Whether it is one of the passes in which `loop` holds alpha.
    """
    rate = _given(params.remask_rate, DEFAULT_REMASK_RATE)
    schedule = params.remask_schedule or "conf"
    most = min(1.0, (1 - has) / had) if had else 0.0
    if schedule == "loop" and not is_looping:
        most = 0.0
    if schedule in ("cap", "loop"):
        return dict.fromkeys(sure, min(rate, most))
    if schedule == "rescale":
        return dict.fromkeys(sure, rate * most)
    weights = {i: math.exp(-confidence) for i, confidence in sure.items()}
    return {i: rate * most * weight / sum(weights.values()) for i, weight in weights.items()}


def _with_copies(seq: Sequence, canvas: list[int], masked: list[int], checked: list[int]) -> Step:
    """The block, if it has masks to fill, and a copy for each of `checked`, that one a mask."""
    versions = [(canvas, masked)] if masked else []
    versions += [([*canvas[:i], seq.mask_token_id, *canvas[i + 1 :]], [i]) for i in checked]
    return group_step(
        "denoise",
        [
            block(ids, start=seq.length, mask_token_id=seq.mask_token_id, wanted=wanted)
            for ids, wanted in versions
        ],
        form=seq.form,
        wants_entropy=seq.params.reveal_policy == "entropy_bound",
    )


def _best_edit(
    readout: Readout, canvas: list[int], checked: list[int], *, first: int, threshold: float
) -> tuple[int, int, float] | None:
    """Position, token and confidence of the surest answer that names another token; the answers
    for `checked` begin at `first`."""
    found = []
    for place, i in enumerate(checked, start=first):
        new_id, confidence = readout.token_ids[place], readout.confidences[place]
        if new_id != canvas[i] and confidence > threshold:
            found.append((i, new_id, confidence))
    return min(found, key=lambda edit: (-edit[2], edit[0]), default=None)


def _revealed(seq: Sequence, readout: Readout, masked: list[int], floor: int) -> list[int]:
    """Indexes into `masked` that the policy reveals; the answers for them come first."""
    num = len(masked)
    return chosen_by(
        seq.params.reveal_policy,
        Readout(
            readout.token_ids[:num], readout.confidences[:num], entropies=readout.entropies[:num]
        ),
        positions=[seq.length + i for i in masked],
        params=seq.params,
        threshold=seq.params.reveal_threshold("diffusion"),
        floor=floor,
    )


def _masked(seq: Sequence, canvas: list[int]) -> list[int]:
    return [i for i in range(1, len(canvas)) if canvas[i] == seq.mask_token_id]


def _is_open(seq: Sequence, canvas: list[int]) -> bool:
    """Whether anything that would be shown is masked."""
    return seq.mask_token_id in canvas[1 : first_stop(seq, canvas)]


def _tell_pass(seq: Sequence, canvas: list[int]) -> None:
    masked = set(_masked(seq, canvas))
    is_masked = [i in masked for i in range(len(canvas))]
    seq.event("denoise", position=seq.length, token_ids=canvas, is_masked=is_masked)


def _tell_revised(seq: Sequence, before: dict[int, int], canvas: list[int], reason: str) -> None:
    """An event for every position that now has another token than before; not for masks."""
    for i, old_id in sorted(before.items()):
        if canvas[i] not in (old_id, seq.mask_token_id):
            seq.event(
                *("revise",),
                position=seq.length + i,
                token_ids=[canvas[i]],
                old_ids=[old_id],
                reason=reason,
            )


def _still_masked(seq: Sequence, before: dict[int, int], canvas: list[int]) -> dict[int, int]:
    """Of what stood there before, that of positions which have no token again yet."""
    return {i: old_id for i, old_id in before.items() if canvas[i] == seq.mask_token_id}


def _uniform(seed: int, position: int, num_pass: int) -> float:
    """In [0, 1): a draw of its own for every pass and position, apart from the choices' noise."""
    return noise_key(noise_key(seed, position) % _WORD, num_pass) % _WORD / _WORD


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
