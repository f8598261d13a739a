"""Which masked positions of a block become tokens, and the passes over a block that do it.

Shared by the diffusion mode and by drafting: a draft is a block denoised with the drafter on.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from collections.abc import Sequence as Numbers
from dataclasses import dataclass

from trimode.decoding.noise import noise_key
from trimode.decoding.params import GenerationParams
from trimode.decoding.sequence import Sequence
from trimode.decoding.step import Readout, Step, block, causal_step, group_step


def even_schedule(num_masked: int, steps: int) -> list[int]:
    """How many positions each pass reveals when `num_masked` are spread over at most `steps`.

    Facts 3.2, step 3: `num_masked // steps` each, the remainder first. Passes that would reveal
    nothing are dropped.
    """
    share, remainder = divmod(num_masked, steps)
    counts = [share + (i < remainder) for i in range(steps)]
    return [count for count in counts if count]


def select(confidences: Numbers[float], *, threshold: float | None, floor: int) -> list[int]:
    """Indexes to reveal: the `floor` most confident, and all that reach `threshold`.

    Ties go to the earlier position, so that the choice does not depend on a sort's whim.
    """
    ranked = sorted(range(len(confidences)), key=lambda i: (-confidences[i], i))
    chosen = set(ranked[:floor])
    if threshold is not None:
        chosen.update(i for i in ranked if confidences[i] >= threshold)
    return sorted(chosen)


def within_entropy_bound(entropies: Numbers[float], *, bound: float, floor: int) -> list[int]:
    """Indexes to reveal: the most certain, while their entropies less the largest sum to at most
    `bound`; `floor` of them at least. Ties go to the earlier position.

    What several tokens chosen at once miss of each other is at most that sum, so it bounds the
    error of the pass whatever its number of tokens. The first alone always fits.

    Source: EB-Sampler, arXiv 2505.24857.
    """
    ranked = sorted(range(len(entropies)), key=lambda i: (entropies[i], i))
    num_chosen, error = 1, 0.0
    for i in ranked[:-1]:
        error += entropies[i]  # the next one has the largest so far
        if error > bound:
            break
        num_chosen += 1
    return sorted(ranked[: max(num_chosen, floor)])


def leftmost(num_masked: int, *, floor: int) -> list[int]:
    """Indexes to reveal: the first `floor`."""
    return list(range(min(floor, num_masked)))


def drawn(positions: Numbers[int], *, seed: int, floor: int) -> list[int]:
    """Indexes to reveal: the first `floor` in an order that seed and absolute positions fix.

    The order is that of the noise generators' states, integers made on the host: the same on every
    device and in any batch.
    """
    ranked = sorted(range(len(positions)), key=lambda i: noise_key(seed, positions[i]))
    return sorted(ranked[:floor])


def ar_weighted(readout: Readout, proposed: Numbers[int]) -> Readout:
    """The block's answers with AR-weighted confidences: of W masked positions, the geometric mean
    of how sure the diffusion view is and of how probable the AR view finds the candidates up to
    there.

    The pass (`two_view_step`) carries the candidates of the pass before as text, so the AR view is
    asked about each of them after all that stands or was proposed before it; their product is the
    chance that it would have written the same. A candidate that is new by now counts with what the
    old one leaves, the most that it can have. Weighted by its own probability alone, a candidate
    would also count where it only follows from a wrong one before it (measured: no gain).

    Args:
        readout: W answers of the AR view, then W of the block.
        proposed: [W] candidates of the pass before, the targets of the first W answers.
    """
    num = len(proposed)
    token_ids, weighted, weight = readout.token_ids[num:], [], 1.0
    for i, old_id in enumerate(proposed):
        chance = min(math.exp(readout.log_probs[i]), 1.0)
        weight *= chance if token_ids[i] == old_id else 1 - chance
        weighted.append(math.sqrt(readout.confidences[num + i] * weight))
    return Readout(token_ids, weighted)


def two_view_step(
    seq: Sequence, canvas: list[int], *, kind: str, masked: list[int], proposed: list[int]
) -> Step:
    """A block in the diffusion view, and before it the same block in the AR view with candidates in
    place of its masks. What the trunk writes is not committed: the candidates are not text yet."""
    trunk = list(canvas)
    for i, token_id in zip(masked, proposed, strict=True):
        trunk[i] = token_id
    del trunk[-1]  # nobody asks what follows it
    return group_step(
        kind,
        [block(canvas, start=seq.length, mask_token_id=seq.mask_token_id, wanted=masked)],
        form=seq.form,
        trunk=causal_step(kind, trunk, start=seq.length, wanted=[i - 1 for i in masked]),
        targets=[*proposed, *proposed],
    )


def chosen_by(
    policy: str,
    readout: Readout,
    *,
    positions: Numbers[int],
    params: GenerationParams,
    threshold: float | None,
    floor: int,
) -> list[int]:
    """Indexes to reveal of the masked positions that `readout` answers for.

    Args:
        policy: One of `trimode.decoding.params.POLICIES`.
        readout: With confidences, and with entropies for `entropy_bound`.
        positions: Absolute, of each answer.
        params: Whose seed and entropy bound apply.
        threshold: In force; None for policies without one.
        floor: Reveal at least so many.
    """
    if policy == "entropy_bound":
        assert params.reveal_entropy_bound is not None
        bound = params.reveal_entropy_bound
        return within_entropy_bound(readout.entropies, bound=bound, floor=floor)
    if policy == "leftmost":
        return leftmost(len(positions), floor=floor)
    if policy == "random":
        return drawn(positions, seed=params.seed, floor=floor)
    return select(readout.confidences, threshold=threshold, floor=floor)


@dataclass(slots=True)
class Filled:
    """What stands in a canvas and with which probability when it was revealed.

    Attributes:
        confidences: [K], 1 for what was clean and 0 for what is still masked.
        runner_ups, runner_up_confidences: [K], the second choices, if they were wanted.
    """

    confidences: list[float]
    runner_ups: list[int]
    runner_up_confidences: list[float]


def denoise(
    seq: Sequence,
    canvas: list[int],
    *,
    kind: str,
    threshold: float | None,
    policy: str = "confidence_threshold",
    wants_runner_up: bool = False,
) -> Generator[Step, Readout, Filled]:
    """Fill the masks of `canvas`, in place; its first token is clean whatever it is.

    Every pass feeds the whole block bidirectionally over the committed prefix (K/V not kept) and
    reveals what the parameters ask for; revealed tokens stay. Stops early once a stop token stands
    with nothing masked before it, leaving masks behind it that are never shown.

    Args:
        seq: Whose parameters decide.
        canvas: [K] token ids, the first clean, the others masks but for what stands fixed.
        kind: Of the forwards: `denoise`, or `draft`, for which the adapter is on if it serves it.
        threshold: In force for `select`.
        policy: Which positions a pass reveals (`chosen_by`).
        wants_runner_up: Whether the second choices are wanted.

    Source: arXiv 2607.05722 via facts 3.2.
    """
    params = seq.params
    is_masked = [False] + [token_id == seq.mask_token_id for token_id in canvas[1:]]
    floors = even_schedule(sum(is_masked), params.steps) if params.steps else []
    num_passes = 0
    proposed: dict[int, int] = {}
    num = len(canvas)
    sure = [float(not masked) for masked in is_masked]
    filled = Filled(sure, [seq.mask_token_id] * num, [0.0] * num)
    while any(is_masked[: first_stop(seq, canvas)]):
        masked = [i for i, masked in enumerate(is_masked) if masked]
        if proposed:
            asked = [proposed[i] for i in masked]
            both = yield two_view_step(seq, canvas, kind=kind, masked=masked, proposed=asked)
            readout = ar_weighted(both, asked)
        else:
            readout = yield group_step(
                kind,
                [block(canvas, start=seq.length, mask_token_id=seq.mask_token_id, wanted=masked)],
                form=seq.form,
                wants_runner_up=wants_runner_up,
                wants_entropy=policy == "entropy_bound",
            )
        if policy == "ar_weighted":
            proposed = dict(zip(masked, readout.token_ids, strict=True))
        floor = floors[num_passes] if num_passes < len(floors) else 1
        num_passes += 1
        revealed = chosen_by(
            policy,
            readout,
            positions=[seq.length + i for i in masked],
            params=params,
            threshold=threshold,
            floor=floor,
        )
        for i in revealed:
            canvas[masked[i]] = readout.token_ids[i]
            is_masked[masked[i]] = False
            filled.confidences[masked[i]] = readout.confidences[i]
            if wants_runner_up:
                filled.runner_ups[masked[i]] = readout.runner_ups[i]
                filled.runner_up_confidences[masked[i]] = readout.runner_up_confidences[i]
        seq.event(kind, position=seq.length, token_ids=canvas, is_masked=is_masked)
    return filled


def first_stop(seq: Sequence, canvas: list[int]) -> int:
    """Index of the first revealed stop token of the canvas; its length if there is none."""
    for i in range(1, len(canvas)):
        if canvas[i] in seq.stop_token_ids and canvas[i] != seq.mask_token_id:
            return i
    return len(canvas)


def degenerate_reason(params: GenerationParams) -> str | None:
    """Why these settings defeat the purpose of their mode, for a warning; None if they do not."""
    num_masked = params.block_length - 1
    if params.mode == "diffusion" and num_masked <= 1:
        return (
            f"block_length is {params.block_length}: a block has {num_masked} masked positions, so"
            " diffusion writes one token a forward whatever the policy, as mode 'ar' does"
        )
    if params.mode == "diffusion" and params.threshold == 0 and params.revision is None:
        return "threshold is 0: a block is revealed in one pass, its tokens blind to each other"
    futile = _why_no_revision(params)
    if futile is not None:
        return futile
    slowest = _why_one_a_pass(params)
    if params.mode not in ("diffusion", "linear") or num_masked <= 1 or slowest is None:
        return None
    if params.mode == "linear":
        return f"{slowest}: a draft takes as many forwards as it has tokens, so it cannot pay"
    return f"{slowest}: a forward reveals one token, so mode 'ar' takes no more forwards"


def _why_no_revision(params: GenerationParams) -> str | None:
    """Why the revision asked for never changes a token, by construction; None if it may."""
    if params.revision == "joint_threshold" and params.edit_threshold == 1:
        return "edit_threshold is 1: no token is ever replaced, and every block pays a pass more"
    if params.revision == "ar_doubt" and params.doubt == 0:
        return "doubt is 0: no token is ever reopened, as without revision"
    if params.revision == "remdm" and params.remask_rate == 0:
        return "remask_rate is 0: no token is ever masked anew, as without revision"
    is_looping = params.remask_schedule == "loop"
    if params.revision == "remdm" and params.steps is not None:
        num_passes = min(params.steps, params.block_length - 1)
        least = 2 if is_looping else 3
        if num_passes < least:
            return (
                f"steps is {params.steps}: no token is ever masked anew, since the first pass of a"
                " block finds none to mask and the last leaves none masked"
            )
    return None


def _why_one_a_pass(params: GenerationParams) -> str | None:
    """What lets a pass reveal one position only, by construction; None if nothing does."""
    steps, num_masked = params.steps, params.block_length - 1
    if steps is not None and steps < num_masked:
        return None
    policy = params.reveal_policy
    if policy in ("confidence_threshold", "ar_weighted") and (params.threshold or 0) >= 1:
        return f"threshold is {params.threshold:g}, which a probability hardly ever reaches"
    if policy == "entropy_bound" and params.reveal_entropy_bound == 0:
        return "entropy_bound is 0, which only tokens without any doubt meet"
    is_by_number = policy == "ar_weighted" and params.reveal_threshold("diffusion") is None
    if is_by_number or policy in ("steps", "leftmost", "random"):
        many = "no steps" if steps is None else f"steps {steps}"
        return f"policy {policy!r} has {many} for the {num_masked} masked positions of a block"
    return None
