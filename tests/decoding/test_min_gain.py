"""What is not worth its forward is not fed, and the text is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trimode.decoding import GenerationParams, Sequence
from trimode.decoding.params import DEFAULT_MIN_GAIN
from trimode.decoding.sequence import Draft
from trimode.decoding.speculation import likeliest_outcomes
from trimode.model.adapter import AdapterForm

FORM = AdapterForm(
    adapts_clean=False, draft_forms=("skip",), num_masks=4, acceptance=((0.8, 0.5, 0.5, 0.5),)
)

Make = Callable[..., Sequence]


@pytest.fixture
def make() -> Make:
    """`make(**options)`: a sequence with room and cells enough, whose drafts skip the bonus."""

    def sequence(form: AdapterForm = FORM, **options: Any) -> Sequence:
        given = {"mode": "branching", "block_length": 8, "branches": 4, "guesses": False}
        given["min_gain"] = 0.0
        params = GenerationParams(seed=0, max_new_tokens=100, **(given | options))
        seq = Sequence([1], params, mask_token_id=9, form=form)
        seq.setting = params.setting(params.mode, form)
        seq.num_cells = 200
        return seq

    return sequence


def draft(*confidences: float) -> Draft:
    return Draft(0, list(range(len(confidences))), list(confidences), [], [])


@pytest.mark.parametrize(
    ("confidences", "min_gain", "expected"),
    [
        ((0.9, 0.9, 0.9), 0.0, 3),
        ((0.9, 0.9, 0.9), 0.73, 2),  # 0.9, 0.81, 0.729
        ((0.9, 0.9, 0.9), 0.72, 3),
        ((0.2, 1.0), 0.3, 0),
        ((), 0.5, 0),
    ],
)
def test_a_draft_ends_where_it_is_hardly_ever_right(
    confidences: tuple[float, ...], min_gain: float, expected: int
) -> None:
    """Prevents: one token's own confidence taken for the chance that all up to it are right."""
    assert draft(*confidences).num_worth(cutoff=None, min_gain=min_gain) == expected


def test_both_ends_of_a_draft_hold() -> None:
    """Prevents: one of the two knobs that turns off the other."""
    one = draft(0.9, 0.4, 0.9)
    assert one.num_worth(cutoff=0.5, min_gain=0.3) == 1
    assert one.num_worth(cutoff=0.1, min_gain=0.35) == 2


def drafted(seq: Sequence, one: Draft, num_checked: int, **more: Any) -> dict[int, int]:
    """Tokens accepted -> masks of its group."""
    found = likeliest_outcomes(seq, one, num_checked, **more)
    return {outcome.num_accepted: outcome.num_drafted for outcome in found}


def test_groups_are_as_long_as_they_are_worth(make: Make) -> None:
    """Prevents: as many masks behind an unlikely outcome as behind a likely one."""
    one = draft(0.5, 0.8)  # accepted 0, 1, 2 with 0.5, 0.1, 0.4
    assert drafted(make(), one, 2) == {0: 4, 1: 4, 2: 4}
    # Of 0.5 the places hold with 0.4, 0.2, 0.1, 0.05; of 0.4 with 0.32, 0.16, 0.08; of 0.1, 0.08.
    assert drafted(make(min_gain=0.09), one, 2) == {0: 3, 2: 2}
    assert drafted(make(min_gain=0.07), one, 2) == {0: 3, 1: 1, 2: 3}
    assert drafted(make(min_gain=0.5), one, 2) == {}
    assert drafted(make(min_gain=0.5), one, 2, least=1) == {0: 1}


def test_blocks_are_drafted_whole_or_not_at_all(make: Make) -> None:
    """Prevents: a block cut to a length that the drafter was not trained on."""
    form = AdapterForm(draft_forms=("block",), acceptance=((0.5, 0.5, 0.5),))
    one = draft(0.5, 0.8)  # a group for 0.5 brings 0.4375 in 4 tokens, for 0.4 it brings 0.35
    options = {"form": form, "block_length": 4}
    assert drafted(make(**options), one, 2) == {0: 3, 1: 3, 2: 3}
    assert drafted(make(**options, min_gain=0.1), one, 2) == {0: 3}
    assert drafted(make(**options, min_gain=0.08), one, 2) == {0: 3, 2: 3}


def test_an_adapter_that_says_nothing(make: Make) -> None:
    """Prevents: a division or an index for what an older adapter does not say."""
    form = AdapterForm(adapts_clean=False, draft_forms=("skip",), num_masks=4)
    assert drafted(make(form, min_gain=0.2), draft(), 0, least=1) == {0: 3}  # 0.6, 0.36, 0.22, 0.13


@pytest.mark.parametrize("mode", ["linear", "branching", "quadratic"])
def test_the_default_is_for_drafters_that_say_how_well_they_draft(mode: str) -> None:
    """Prevents: groups that nobody needs, where it is known that they bring little."""
    params = GenerationParams(mode=mode, block_length=8, seed=0, max_new_tokens=9)
    assert params.setting(mode, FORM).min_gain == DEFAULT_MIN_GAIN
    unknown = AdapterForm(adapts_clean=False, draft_forms=("skip",), num_masks=4)
    assert params.setting(mode, unknown).min_gain == 0
    given = GenerationParams(mode=mode, block_length=8, seed=0, max_new_tokens=9, min_gain=0.0)
    assert given.setting(mode, FORM).min_gain == 0
    auto = GenerationParams(mode="auto", block_length=8, seed=0, max_new_tokens=9)
    assert auto.setting("auto", FORM).min_gain == 0
