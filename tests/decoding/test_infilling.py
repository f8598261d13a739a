"""Filling a gap: the candidates and their scores are a slow twin's, alone or in any batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tests.reference import next_logits
from trimode.decoding import GenerationParams
from trimode.decoding import Sequence as Decoded
from trimode.decoding.gap import NUM_JUDGED, VIEW_LEN, Gap
from trimode.engine import Engine
from trimode.engine.engine import cells_needed
from trimode.model import TriModeModel

SMALL = {"vocab_size": 24, "mask_token_id": 23, "bos_token_id": 0, "eos_token_id": 1}
PREFIX = [3, 4, 5, 9, 2, 11]
SUFFIX = [(7 * i + 3) % 22 for i in range(90)]
LENGTHS = (1, 3, 7, 12)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Any]) -> TriModeModel:
    made: TriModeModel = tiny_model(torch.float64, initializer_range=0.3, **SMALL)
    return made


def sequence(
    prefix: Sequence[int] = PREFIX,
    suffix: Sequence[int] = SUFFIX,
    lengths: tuple[int, ...] = LENGTHS,
    **law: Any,
) -> Decoded:
    params = GenerationParams(
        mode="diffusion",
        max_new_tokens=max(lengths),
        block_length=max(lengths) + 1,
        **({"seed": 5} | law),
    )
    return Decoded(prefix, params, mask_token_id=23, gap=Gap(tuple(suffix), lengths))


def run(model: TriModeModel, *sequences: Decoded, num_rows: int = 8) -> None:
    engine = Engine(model, num_rows=num_rows, num_cells=max(map(cells_needed, sequences)))
    for seq in sequences:
        engine.submit(seq)
    while not engine.is_idle:
        engine.step()


def slow_fill(
    model: TriModeModel, length: int, *, suffix: Sequence[int] = SUFFIX, threshold: float | None
) -> list[int]:
    """One canvas at a time, greedily: the token before, masks, the text behind."""
    *before, last = PREFIX
    behind = list(suffix[: max(VIEW_LEN - 1 - length, NUM_JUDGED)])
    fill: list[int | None] = [None] * length
    while None in fill:
        block = [last, *(23 if i is None else i for i in fill), *behind]
        law = next_logits(model, before, block)[len(before) + 1 :][:length].softmax(-1)
        confidence, choice = law.max(-1)
        masked = [i for i in range(length) if fill[i] is None]
        best = max(masked, key=lambda i: (float(confidence[i]), -i))
        for i in masked:
            if i == best or (threshold is not None and confidence[i] >= threshold):
                fill[i] = int(choice[i])
    return [i for i in fill if i is not None]


def slow_log_prob(model: TriModeModel, before: Sequence[int], tokens: Sequence[int]) -> float:
    law = next_logits(model, [*before, *tokens])[len(before) - 1 : -1].log_softmax(-1)
    return sum(float(law[i, token]) for i, token in enumerate(tokens))


@pytest.mark.parametrize("threshold", [0.15, 0.9])
def test_candidates_are_the_slow_twin_s(model: TriModeModel, threshold: float) -> None:
    """Prevents: canvases that see each other or the wrong positions, a score shifted by one, of the
    filtered law or of the diffusion view, and candidates out of order."""
    seq = sequence(threshold=threshold)
    run(model, seq)
    assert seq.gap is not None
    found = seq.gap.candidates
    expected = {tuple(slow_fill(model, n, threshold=threshold)) for n in LENGTHS}
    assert {one.token_ids for one in found} == expected
    for one in found:
        assert one.fill_log_prob == pytest.approx(slow_log_prob(model, PREFIX, one.token_ids))
        behind = SUFFIX[:NUM_JUDGED]
        expected_suffix = slow_log_prob(model, [*PREFIX, *one.token_ids], behind)
        assert one.suffix_log_prob == pytest.approx(expected_suffix)
    scores = [one.log_prob for one in found]
    assert scores == sorted(scores, reverse=True)
    assert seq.finish_reason == "stop"
    assert seq.new_ids == []


def test_a_mask_in_the_text_behind_is_not_judged(model: TriModeModel) -> None:
    """Prevents: every candidate at minus infinity, which ranks nothing and is not JSON."""
    suffix = [4, 23, 9, 23, 5]
    seq = sequence(suffix=suffix, lengths=(2, 3))
    run(model, seq)
    assert seq.gap is not None
    for one in seq.gap.candidates:
        text = [*PREFIX, *one.token_ids, *suffix]
        logits = next_logits(model, text).log_softmax(-1)
        behind = range(len(text) - len(suffix), len(text))
        expected = sum(float(logits[i - 1, text[i]]) for i in behind if text[i] != 23)
        assert one.suffix_log_prob == pytest.approx(expected, abs=1e-9)


def test_the_suffix_matters(model: TriModeModel) -> None:
    """Prevents: a canvas that is filled as if nothing stood behind it."""
    found = []
    for suffix in (SUFFIX, SUFFIX[::-1], []):
        seq = sequence(suffix=suffix)
        run(model, seq)
        assert seq.gap is not None
        found.append({one.token_ids for one in seq.gap.candidates})
    assert found[0] != found[1] != found[2] != found[0]


@pytest.mark.parametrize("law", [{}, {"temperature": 1.2}, {"temperature": 0.8, "top_k": 5}])
def test_a_batch_changes_nothing(model: TriModeModel, law: dict[str, Any]) -> None:
    """Prevents: gaps that meet other sequences' cells, and fills that depend on the schedule."""
    gaps = [
        sequence(**law),
        sequence(PREFIX[:1], SUFFIX[:3], (2, 5), **law),
        sequence(PREFIX[:3], (), (4,), **law),
    ]
    others = [
        Decoded(
            PREFIX,
            GenerationParams(mode=mode, max_new_tokens=9, block_length=4, seed=1, **law),
            mask_token_id=23,
        )
        for mode in ("linear", "ar", "diffusion")
    ]
    mixed = [gaps[0], others[0], gaps[1], others[1], gaps[2], others[2]]
    run(model, *mixed, num_rows=4)
    for seq in mixed:
        if seq.gap is None:
            alone = Decoded(seq.prompt_ids, seq.params, mask_token_id=23)
            run(model, alone)
            assert alone.new_ids == seq.new_ids
            continue
        alone = sequence(seq.prompt_ids, seq.gap.suffix_ids, seq.gap.lengths, **law)
        run(model, alone)
        assert alone.gap is not None
        assert [c.token_ids for c in alone.gap.candidates] == [
            c.token_ids for c in seq.gap.candidates
        ]


def test_the_seed_fixes_the_fill(model: TriModeModel) -> None:
    """Prevents: noise that is not keyed by the seed."""

    def fills(seed: int) -> set[tuple[int, ...]]:
        seq = sequence(seed=seed, temperature=1.5)
        run(model, seq)
        assert seq.gap is not None
        return {one.token_ids for one in seq.gap.candidates}

    assert fills(1) == fills(1)
    assert fills(1) != fills(2)


def test_steps_bound_the_passes(model: TriModeModel) -> None:
    """Prevents: a schedule that is not spread over every length of its own."""
    seq = sequence(steps=3)
    run(model, seq)
    assert seq.stats.forwards["denoise"] == 3
    assert seq.stats.forwards["prefill"] == 1
    assert seq.gap is not None
    assert seq.stats.forwards["verify"] == len(seq.gap.candidates)
