"""What a request may ask for: each bad value is one clear error."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from trimode.decoding import MODES, GenerationParams
from trimode.decoding.control import Control
from trimode.decoding.params import MODE_NAMES, POLICIES, POLICY_ALIASES
from trimode.errors import RequestError

GOOD: dict[str, Any] = {"mode": "linear", "max_new_tokens": 4, "block_length": 4, "seed": 0}


@pytest.mark.parametrize(
    ("name", "value", "allowed", "others"),
    [
        ("mode", "fast", "ar, diffusion, linear", {}),
        ("mode", None, "ar, diffusion, linear", {}),
        ("max_new_tokens", 0, "at least 1", {}),
        ("max_new_tokens", 2.0, "an integer", {}),
        ("max_new_tokens", True, "an integer", {}),
        ("block_length", 1, "at least 2", {}),
        ("block_length", 0, "at least 1", {"mode": "diffusion"}),
        ("block_length", "4", "an integer", {}),
        ("seed", -1, "0 to 18446744073709551615", {}),
        ("seed", 2**64, "0 to 18446744073709551615", {}),
        ("seed", None, "an integer", {}),
        ("temperature", -0.1, "0 to 1e5; less than 1e-05 is greedy", {}),
        ("temperature", math.nan, "0 to 1e5; less than 1e-05 is greedy", {}),
        ("temperature", math.inf, "0 to 1e5; less than 1e-05 is greedy", {}),
        ("temperature", "1", "0 to 1e5; less than 1e-05 is greedy", {}),
        ("temperature", None, "0 to 1e5; less than 1e-05 is greedy", {}),
        ("top_k", -2, "integer >= -1", {}),
        ("top_k", 1.5, "integer >= -1", {}),
        ("top_k", False, "integer >= -1", {}),
        ("min_p", -0.1, "0 to 1", {}),
        ("min_p", 1.1, "0 to 1", {}),
        ("min_p", math.nan, "0 to 1", {}),
        ("min_p", "0", "0 to 1", {}),
        ("min_tokens", -1, "an integer of 0 to max_new_tokens=4", {}),
        ("min_tokens", 5, "an integer of 0 to max_new_tokens=4", {}),
        ("min_tokens", True, "an integer of 0", {}),
        ("min_tokens", None, "an integer of 0", {}),
        ("top_p", 0.0, "(0, 1]", {}),
        ("top_p", 1.01, "(0, 1]", {}),
        ("top_p", math.nan, "(0, 1]", {}),
        ("stop", ("",), "non-empty", {}),
        ("stop", (3,), "strings", {}),
        ("stop_token_ids", (-1,), "token ids", {}),
        ("stop_token_ids", ("a",), "token ids", {}),
        ("threshold", -0.1, "0 to 1", {}),
        ("threshold", 1.1, "0 to 1", {}),
        ("threshold", math.nan, "0 to 1", {}),
        ("threshold", 0.5, "no threshold", {"mode": "ar"}),
        ("steps", 0, "1 to block_length=4", {}),
        ("steps", 5, "1 to block_length=4", {}),
        ("steps", 1.0, "1 to block_length=4", {}),
        ("steps", 2, "no steps", {"mode": "ar"}),
    ],
)
def test_a_bad_value_is_one_clear_error(
    name: str, value: Any, allowed: str, others: dict[str, Any]
) -> None:
    """Prevents: a bad request failing deep inside a forward, or silently meaning another thing."""
    with pytest.raises(RequestError) as caught:
        GenerationParams(**(GOOD | others | {name: value}))
    message = str(caught.value)
    assert message.startswith(f"{name} is {value!r}; allowed: ")
    assert allowed in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 2**64 - 1},
        {"mode": "diffusion", "block_length": 1},
        {"top_p": 1, "top_k": 10**9, "temperature": 100, "min_p": 1},
        {"min_tokens": 4, "temperature": 1e5},
        {"threshold": 0, "steps": 4},
        {"threshold": 1.0, "steps": 1},
        {"mode": "branching", "branches": 0, "guesses": True},
        {"mode": "branching", "branches": 7, "block_length": 4, "draft_cutoff": 1},
        {"mode": "branching", "block_length": 2},
        {"mode": "diffusion", "revision": "joint_threshold", "edit_threshold": 0, "edit_budget": 3},
        {"mode": "diffusion", "revision": "ar_doubt", "doubt": 1, "edit_budget": 1},
        {"mode": "diffusion", "revision": "ar_doubt", "block_length": 1, "edit_budget": 1},
        {"mode": "diffusion", "revision": "remdm", "steps": 4, "remask_rate": 1},
    ],
)
def test_the_ends_of_every_range_are_allowed(options: dict[str, Any]) -> None:
    """Prevents: a check that is off by one."""
    GenerationParams(**(GOOD | options))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"top_k": 0}, {"top_k": None}),
        ({"top_k": -1}, {"top_k": None}),
        ({"min_p": 0}, {"min_p": None}),
        ({"min_p": 0.0}, {"min_p": None}),
        ({"temperature": 9e-6}, {"temperature": 0.0}),
        ({"temperature": 5e-324}, {"temperature": 0.0}),
        ({"temperature": 1e-5}, {"temperature": 1e-5}),
        ({"min_tokens": 0}, {}),
        ({"control": Control(frequency_penalty=0, presence_penalty=-0.0)}, {}),
    ],
)
def test_what_asks_for_nothing_is_off(written: dict[str, Any], meant: dict[str, Any]) -> None:
    """Prevents: a client refused whose way to say `off` is another, or a division by next to 0."""
    found = GenerationParams(**(GOOD | written))
    assert found == GenerationParams(**(GOOD | meant))
    assert not found.control.changes_laws


@pytest.mark.parametrize(
    ("mode", "threshold", "steps", "expected"),
    [
        ("diffusion", None, None, 0.9),
        ("diffusion", None, 2, None),
        ("diffusion", 0.0, None, 0.0),
        ("diffusion", 0.5, 2, 0.5),
        ("linear", None, None, 0.0),
        ("linear", None, 2, None),
        ("linear", 0.3, None, 0.3),
    ],
)
def test_the_threshold_in_force(
    mode: str, threshold: float | None, steps: int | None, expected: float | None
) -> None:
    """Prevents: `steps` ignored because a default threshold reveals everything first."""
    options = GOOD | {"mode": mode, "threshold": threshold, "steps": steps}
    assert GenerationParams(**options).reveal_threshold(mode) == expected


D: dict[str, Any] = {"mode": "diffusion"}


@pytest.mark.parametrize(
    ("options", "policy", "threshold", "bound"),
    [
        ({}, "confidence_threshold", 0.9, None),
        ({"steps": 2}, "steps", None, None),
        ({"steps": 2, "threshold": 0.5}, "confidence_threshold", 0.5, None),
        ({"policy": "confidence_threshold"}, "confidence_threshold", 0.9, None),
        ({"policy": "confidence_threshold", "steps": 2}, "steps", None, None),
        ({"policy": "threshold", "threshold": 0}, "confidence_threshold", 0, None),
        ({"policy": "steps", "steps": 4}, "steps", None, None),
        ({"policy": "low_confidence", "steps": 1}, "steps", None, None),
        ({"policy": "entropy_bound"}, "entropy_bound", None, 0.1),
        ({"policy": "eb_sampler", "entropy_bound": 0}, "entropy_bound", None, 0),
        ({"policy": "entropy_bound", "entropy_bound": 2, "steps": 2}, "entropy_bound", None, 2),
        ({"policy": "sequential"}, "leftmost", None, None),
        ({"policy": "random", "steps": 3}, "random", None, None),
        ({"policy": "ar_weighted"}, "ar_weighted", 0.9, None),
        ({"policy": "ar_weighted", "steps": 3}, "ar_weighted", None, None),
        ({"policy": "ar_weighted", "steps": 3, "threshold": 0.5}, "ar_weighted", 0.5, None),
    ],
)
def test_the_policy_in_force(
    options: dict[str, Any], policy: str, threshold: float | None, bound: float | None
) -> None:
    """Prevents: an alias that leads nowhere, and a default knob that outlives its policy."""
    params = GenerationParams(**(GOOD | D | options))
    found = (params.reveal_policy, params.reveal_threshold("diffusion"))
    assert found == (policy, threshold)
    assert params.reveal_entropy_bound == bound


def test_every_alias_is_of_a_policy() -> None:
    """Prevents: an alias of an alias, or one that hides a policy of ours."""
    assert set(POLICY_ALIASES.values()) <= set(POLICIES)
    assert not set(POLICY_ALIASES) & set(POLICIES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (D | {"policy": "entropy"}, "policy is 'entropy'; allowed: None, confidence_threshold, "),
        (D | {"policy": ["steps"]}, "policy is ['steps']; allowed: None, confidence_threshold, "),
        (D | {"policy": ""}, "policy is ''; allowed: None, confidence_threshold, "),
        ({"policy": "steps", "steps": 2}, "policy is 'steps'; allowed: None, since mode 'linear'"),
        ({"mode": "ar", "policy": "leftmost"}, "policy is 'leftmost'; allowed: None, since mode"),
        ({"entropy_bound": 0.1}, "entropy_bound is 0.1; allowed: None but with policy"),
        (D | {"entropy_bound": 0.1}, "entropy_bound is 0.1; allowed: None but with policy"),
        (
            D | {"policy": "entropy_bound", "entropy_bound": -1},
            "entropy_bound is -1; allowed: None, or a finite number of at least 0",
        ),
        (D | {"policy": "entropy_bound", "entropy_bound": math.inf}, "entropy_bound is inf; allow"),
        (D | {"policy": "entropy_bound", "entropy_bound": math.nan}, "entropy_bound is nan; allow"),
        (D | {"policy": "entropy_bound", "entropy_bound": "1"}, "entropy_bound is '1'; allowed: "),
        (
            D | {"policy": "entropy_bound", "threshold": 0.5},
            "threshold is 0.5; allowed: None, since policy 'entropy_bound' has no threshold",
        ),
        (
            D | {"policy": "steps", "threshold": 0.5, "steps": 2},
            "threshold is 0.5; allowed: None, since policy 'steps' has no threshold",
        ),
        (D | {"policy": "sequential", "threshold": 0.5}, "threshold is 0.5; allowed: None, since"),
        (D | {"policy": "random", "threshold": 0.5}, "threshold is 0.5; allowed: None, since"),
        (D | {"policy": "steps"}, "steps is None; allowed: 1 to block_length=4"),
        (D | {"policy": "low_confidence"}, "steps is None; allowed: 1 to block_length=4"),
    ],
)
def test_knobs_of_another_policy_are_refused(options: dict[str, Any], message: str) -> None:
    """Prevents: a knob that means nothing under the policy ignored in silence."""
    with pytest.raises(RequestError) as caught:
        GenerationParams(**(GOOD | options))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revision": "ar_doubt"}, "revision is 'ar_doubt'; allowed: None, since mode 'linear'"),
        ({"mode": "ar", "revision": "remdm"}, "revision is 'remdm'; allowed: None, since mode"),
        (D | {"revision": "redo"}, "revision is 'redo'; allowed: None, joint_threshold, ar_doubt"),
        (D | {"revision": ["remdm"]}, "revision is ['remdm']; allowed: None, joint_threshold"),
        (D | {"doubt": 0.1}, "doubt is 0.1; allowed: None but with revision 'ar_doubt'"),
        (
            D | {"revision": "remdm", "steps": 2, "edit_budget": 2},
            "edit_budget is 2; allowed: None but with revision 'joint_threshold' or 'ar_doubt'",
        ),
        (D | {"revision": "ar_doubt", "edit_threshold": 0.5}, "edit_threshold is 0.5; allowed: "),
        (D | {"revision": "ar_doubt", "remask_rate": 0.5}, "remask_rate is 0.5; allowed: None but"),
        ({"remask_schedule": "cap"}, "remask_schedule is 'cap'; allowed: None but with revision"),
        (D | {"revision": "ar_doubt", "doubt": 1.1}, "doubt is 1.1; allowed: None, or 0 to 1"),
        (D | {"revision": "ar_doubt", "doubt": math.nan}, "doubt is nan; allowed: None, or 0 to"),
        (D | {"revision": "ar_doubt", "doubt": "a"}, "doubt is 'a'; allowed: None, or 0 to 1"),
        (
            D | {"revision": "ar_doubt", "edit_budget": 4},
            "edit_budget is 4; allowed: None, or 1 to block_length - 1 = 3",
        ),
        (D | {"revision": "ar_doubt", "edit_budget": 0}, "edit_budget is 0; allowed: None, or 1"),
        (D | {"revision": "ar_doubt", "edit_budget": 1.0}, "edit_budget is 1.0; allowed: None, or"),
        (
            D | {"revision": "remdm", "steps": 2, "remask_schedule": "cosine"},
            "remask_schedule is 'cosine'; allowed: None, cap, rescale, conf, loop",
        ),
        (D | {"revision": "remdm"}, "steps is None; allowed: an integer, which revision 'remdm'"),
        (
            D | {"revision": "remdm", "steps": 2, "threshold": 0.5},
            "policy is None; allowed: with revision 'remdm' steps, leftmost, random, and no",
        ),
        (
            D | {"revision": "remdm", "steps": 2, "policy": "entropy_bound"},
            "policy is 'entropy_bound'; allowed: with revision 'remdm' steps, leftmost, random",
        ),
        (
            D | {"revision": "joint_threshold", "policy": "ar_weighted"},
            "policy is 'ar_weighted'; allowed: with revision 'joint_threshold' all but ar_weighted",
        ),
    ],
)
def test_knobs_of_another_revision_are_refused(options: dict[str, Any], message: str) -> None:
    """Prevents: a revision, or a knob of one, ignored in silence."""
    with pytest.raises(RequestError) as caught:
        GenerationParams(**(GOOD | options))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_mode_names_are_the_modes() -> None:
    """Prevents: a mode that is allowed and not built, or the reverse."""
    assert set(MODE_NAMES) == {*MODES, "auto"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mode": "ar"}, (0, False)),
        ({"mode": "linear"}, (0, False)),
        ({"mode": "branching"}, (4, True)),
        ({"mode": "branching", "block_length": 2}, (3, True)),
        ({"mode": "branching", "branches": 2, "guesses": False}, (2, False)),
        ({"mode": "quadratic"}, (8, False)),
        (D, (0, False)),
        (D | {"policy": "ar_weighted"}, (1, False)),
        (D | {"revision": "ar_doubt"}, (0, False)),
        (D | {"revision": "joint_threshold"}, (4, False)),
        (D | {"revision": "joint_threshold", "edit_budget": 7}, (7, False)),
    ],
)
def test_the_branches_in_force(options: dict[str, Any], expected: tuple[int, bool]) -> None:
    """Prevents: a default that a short block has no outcomes for; quadratic with guesses."""
    params = GenerationParams(**(GOOD | {"block_length": 8} | options))
    setting = params.setting(params.mode)
    assert (setting.num_groups, setting.has_guesses) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "linear", "branches": 2}, "branches is 2; allowed: None, since mode 'linear'"),
        ({"mode": "quadratic", "guesses": True}, "guesses is True; allowed: None, since mode"),
        ({"mode": "branching", "branches": 8}, "branches is 8; allowed: None, or 0 to 2 *"),
        ({"mode": "branching", "steps": 2}, "steps is 2; allowed: None, since drafts behind"),
        ({"mode": "quadratic", "threshold": 0.5}, "threshold is 0.5; allowed: None, since"),
        ({"mode": "ar", "draft_cutoff": 0.5}, "draft_cutoff is 0.5; allowed: None, or 0 to 1 in"),
        ({"mode": "linear", "draft_cutoff": 1.5}, "draft_cutoff is 1.5; allowed: None, or 0 to 1"),
        ({"mode": "ar", "min_gain": 0.1}, "min_gain is 0.1; allowed: None, or 0 to 1 in linear"),
        ({"mode": "linear", "min_gain": -0.1}, "min_gain is -0.1; allowed: None, or 0 to 1"),
    ],
)
def test_knobs_of_speculation_are_refused_where_they_mean_nothing(
    options: dict[str, Any], message: str
) -> None:
    """Prevents: a knob ignored in silence."""
    with pytest.raises(RequestError) as caught:
        GenerationParams(**(GOOD | {"block_length": 4} | options))
    assert str(caught.value).startswith(message)


AUTO_REFUSES: list[tuple[str, Any, str]] = [
    (
        "threshold",
        0.5,
        "None, since mode 'auto' picks for itself; modes 'diffusion' and 'linear' take them",
    ),
    (
        "threshold",
        2,
        "None, since mode 'auto' picks for itself; modes 'diffusion' and 'linear' take them",
    ),
    (
        "steps",
        2,
        "None, since mode 'auto' picks for itself; modes 'diffusion' and 'linear' take them",
    ),
    (
        "branches",
        2,
        "None, since mode 'auto' picks for itself",
    ),
    (
        "guesses",
        False,
        "None, since mode 'auto' picks for itself",
    ),
    ("policy", "leftmost", "None, since mode 'auto' has no policies"),
    ("entropy_bound", 0.1, "None but with policy 'entropy_bound'"),
    ("revision", "remdm", "None, since mode 'auto' revises nothing"),
    ("edit_threshold", 0.5, "None but with revision 'joint_threshold'"),
    ("edit_budget", 1, "None but with revision 'joint_threshold' or 'ar_doubt'"),
    ("doubt", 0.1, "None but with revision 'ar_doubt'"),
    ("remask_schedule", "cap", "None but with revision 'remdm'"),
    ("remask_rate", 0.5, "None but with revision 'remdm'"),
]


@pytest.mark.parametrize(("name", "value", "message"), AUTO_REFUSES)
def test_auto_refuses_what_it_picks_or_has_not(name: str, value: Any, message: str) -> None:
    """Prevents: a knob that means nothing in `auto` ignored in silence, or refused for a reason
    that is another mode's."""
    with pytest.raises(RequestError) as caught:
        GenerationParams(**(GOOD | {"mode": "auto", name: value}))
    assert str(caught.value) == f"{name} is {value!r}; allowed: {message}"


def test_auto_takes_what_all_it_picks_from_take() -> None:
    """Prevents: a knob added later that is neither taken nor refused on purpose."""
    taken = {
        "draft_cutoff": 0.3,
        "min_gain": 0.1,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "stop": ("x",),
    }
    more = {"stop_token_ids": (3,), "ignore_eos": True, "control": Control()}
    more |= {"min_p": 0.1, "min_tokens": 2, "draft_form": "skip", "skip_masks": 3, "lookup": True}
    more |= {"prompt_logprobs": 2}
    refused = {case[0] for case in AUTO_REFUSES}
    GenerationParams(**(GOOD | {"mode": "auto"} | taken | more))
    names = {field.name for field in dataclasses.fields(GenerationParams)}
    assert names == {*GOOD, *taken, *more, *refused}
