"""Which masked positions of a block become tokens, and the passes over a block that do it.

Shared by the diffusion mode and by drafting: a draft is a block denoised with the drafter on.
"""

from __future__ import annotations

from collections.abc import Generator
from collections.abc import Sequence as Numbers
from dataclasses import dataclass

from trimode.decoding.sequence import Sequence
from trimode.decoding.step import Readout, Step, block_step


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
    is_drafter_on: bool,
    threshold: float | None,
    wants_runner_up: bool = False,
) -> Generator[Step, Readout, Filled]:
    """Fill all of `canvas` but its first token, which is clean, in place.

    Every pass feeds the whole block bidirectionally over the committed prefix (K/V not kept) and
    reveals what the parameters ask for; revealed tokens stay. Stops early once a stop token stands
    with nothing masked before it, leaving masks behind it that are never shown.

    Args:
        seq: Whose parameters decide.
        canvas: [K] token ids, the first clean, the others masks.
        kind: Of the forwards, for the counts.
        is_drafter_on: Whether the drafter adapter is on.
        threshold: In force for `select`.
        wants_runner_up: Whether the second choices are wanted.

    Source: arXiv 2607.05722 via facts 3.2.
    """
    params = seq.params
    is_masked = [False] + [True] * (len(canvas) - 1)
    floors = even_schedule(len(canvas) - 1, params.steps) if params.steps else []
    num_passes = 0
    num = len(canvas)
    filled = Filled([1.0] + [0.0] * (num - 1), [seq.mask_token_id] * num, [0.0] * num)
    while any(is_masked[: _first_stop(seq, canvas, is_masked)]):
        masked = [i for i, masked in enumerate(is_masked) if masked]
        readout = yield block_step(
            *(kind, canvas),
            start=seq.length,
            wanted=masked,
            is_drafter_on=is_drafter_on,
            wants_runner_up=wants_runner_up,
        )
        floor = floors[num_passes] if num_passes < len(floors) else 1
        num_passes += 1
        for i in select(readout.confidences, threshold=threshold, floor=floor):
            canvas[masked[i]] = readout.token_ids[i]
            is_masked[masked[i]] = False
            filled.confidences[masked[i]] = readout.confidences[i]
            if wants_runner_up:
                filled.runner_ups[masked[i]] = readout.runner_ups[i]
                filled.runner_up_confidences[masked[i]] = readout.runner_up_confidences[i]
        seq.event(kind, position=seq.length, token_ids=canvas, is_masked=is_masked)
    return filled


def _first_stop(seq: Sequence, canvas: list[int], is_masked: list[bool]) -> int:
    """Index of the first revealed stop token of the canvas; its length if there is none."""
    for i in range(1, len(canvas)):
        if not is_masked[i] and canvas[i] in seq.stop_token_ids:
            return i
    return len(canvas)
