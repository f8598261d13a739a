"""The model that people meet first: what it writes is its AR view's, in every way of drafting."""

from __future__ import annotations

from typing import Any

import pytest

import trimode
from trimode.checkpoint.model_cache import default_name
from trimode.runtime import TriModeLM

pytestmark = pytest.mark.skipif(
    default_name() != "smollm2", reason="the weights of smollm2 are not here"
)

QUESTIONS = ["What is a hash table?", "Write a Python function that reverses a string."]

WAYS: list[dict[str, Any]] = [
    {"mode": "linear"},
    {"mode": "linear", "draft_form": "block", "block_length": 6},
    {"mode": "branching", "branches": 1, "guesses": False, "skip_masks": 4, "lookup": True},
    {"mode": "branching", "min_gain": 0.08, "lookup": True},
    {"mode": "quadratic", "skip_masks": 2},
    {"mode": "auto"},
]


@pytest.fixture(scope="module")
def lm() -> TriModeLM:
    return trimode.load(device="cpu")


@pytest.mark.parametrize(
    "law", [{}, {"temperature": 0.7, "top_p": 0.95}], ids=["greedy", "sampled"]
)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_speculation_writes_what_ar_writes(
    lm: TriModeLM, way: dict[str, Any], law: dict[str, Any]
) -> None:
    """Prevents: an adapter or a kernel that changes what the model says."""
    for seed, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        options = {"max_new_tokens": 24, "seed": seed, **law}
        expected = lm.chat(messages, mode="ar", **options)
        found = lm.chat(messages, **way, **options)
        assert found.token_ids == expected.token_ids
        assert len(found.token_ids) == 24


def test_in_one_batch(lm: TriModeLM) -> None:
    """Prevents: a text that depends on what is decoded beside it."""
    prompts = [lm.answering([{"role": "user", "content": q}], {})["prompt"] for q in QUESTIONS]
    alone = [lm.generate(prompt, mode="ar", max_new_tokens=16).token_ids for prompt in prompts]
    for mode in ("ar", "linear", "branching", "auto"):
        together = lm.generate([*prompts, *prompts], mode=mode, max_new_tokens=16)
        assert [one.token_ids for one in together] == [*alone, *alone]


def test_the_drafter_drafts(lm: TriModeLM) -> None:
    """Prevents: an adapter that is shipped, loaded, and not the one that was trained."""
    assert lm.adapter is not None
    assert lm.form.draft_forms[0] == "skip"
    assert lm.form.acceptance_of("skip")[0] > 0.5
    messages = [{"role": "user", "content": QUESTIONS[1]}]
    stats = lm.chat(messages, mode="linear", max_new_tokens=48, temperature=0.0).stats
    assert sum(stats.acceptance_lengths) / len(stats.acceptance_lengths) > 2.5
    assert stats.tpf_decode is not None
    assert stats.tpf_decode > 1.3
