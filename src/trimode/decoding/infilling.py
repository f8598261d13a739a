"""Infill: a gap filled with what lies behind it in view, at several lengths, the AR view ranking.

Every length has a canvas of its own: the token before the gap, masks, the text behind. All canvases
of a gap share its prefix and are denoised in the same forwards, each a group that sees no other.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace

from trimode.decoding.gap import NUM_JUDGED, Candidate, Edges, Gap
from trimode.decoding.prefill import prefill
from trimode.decoding.reveal import even_schedule, select
from trimode.decoding.sequence import Sequence
from trimode.decoding.step import Group, Readout, Step, causal_step, group_step


@dataclass(slots=True)
class _Canvas:
    """One length's tokens; masked are `is_masked`, the clean ones stay as they are."""

    length: int
    token_ids: list[int]
    is_masked: list[bool]
    floors: list[int]
    """What each pass reveals at least; 1 behind the end of it."""

    @property
    def fill(self) -> list[int]:
        return self.token_ids[1 : 1 + self.length]


def infill(seq: Sequence, gap: Gap) -> Generator[Step, Readout, None]:
    """The whole life of a sequence with a gap behind its prompt.

    1. Prefill all of the prompt but its last token, which heads every canvas and is fed with it.
    2. Until no canvas has masks: one bidirectional forward over all that have, each revealing what
       the threshold or the steps ask for, one token at least.
    3. For every candidate a causal forward over fill and suffix, nothing of which is kept.
    """
    *before, last = seq.prompt_ids
    yield from prefill(seq, before)
    canvases = _canvases(gap, last=last, mask=seq.mask_token_id, steps=seq.params.steps)
    threshold = seq.params.reveal_threshold("diffusion")
    while still_open := [canvas for canvas in canvases if any(canvas.is_masked)]:
        readout = yield _denoise_step(seq, still_open, gap.edges)
        first = 0
        for canvas in still_open:
            masked = [i for i, is_masked in enumerate(canvas.is_masked) if is_masked]
            answers = slice(first, first + len(masked))
            first += len(masked)
            floor = canvas.floors.pop(0) if canvas.floors else 1
            confidences = readout.confidences[answers]
            for i in select(confidences, threshold=threshold, floor=floor):
                canvas.token_ids[masked[i]] = readout.token_ids[answers][i]
                canvas.is_masked[masked[i]] = False
    found = []
    for fill in dict.fromkeys(tuple(canvas.fill) for canvas in canvases):
        judged = [*fill, *gap.suffix_ids[:NUM_JUDGED]]
        readout = yield causal_step(
            *("verify", [last, *judged[:-1]]),
            start=seq.length,
            wanted=range(len(judged)),
            targets=judged,
        )
        of_fill, of_suffix = readout.log_probs[: len(fill)], readout.log_probs[len(fill) :]
        counted = [  # the ban makes a mask of the text itself impossible, whatever the fill
            log_prob
            for token_id, log_prob in zip(judged[len(fill) :], of_suffix, strict=True)
            if token_id != seq.mask_token_id
        ]
        found.append(Candidate(fill, sum(of_fill), sum(counted)))
    gap.candidates = sorted(found, key=lambda candidate: -candidate.log_prob)
    seq.finish("stop")


def _canvases(gap: Gap, *, last: int, mask: int, steps: int | None = None) -> list[_Canvas]:
    canvases = []
    for length in gap.lengths:
        suffix = gap.suffix_in_view(length)
        canvases.append(
            _Canvas(
                length,
                [last, *[mask] * length, *suffix],
                [False, *[True] * length, *[False] * len(suffix)],
                even_schedule(length, steps) if steps else [],
            )
        )
    return canvases


def _denoise_step(seq: Sequence, canvases: list[_Canvas], edges: Edges) -> Step:
    """One group for each canvas, at the same positions."""
    groups, allowed = [], []
    for canvas in canvases:
        masked = [i for i, is_masked in enumerate(canvas.is_masked) if is_masked]
        groups.append(Group(canvas.token_ids, canvas.is_masked, seq.length, seq.length - 1, masked))
        allowed += [edges.at(i - 1, canvas.length) for i in masked]
    step = group_step("denoise", groups, form=seq.form)
    return replace(step, allowed=allowed)
