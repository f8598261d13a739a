"""Penalties by number, and min-p: drafts are counted as AR counts them, in both dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import trimode
from trimode.decoding.native_choice import is_native
from trimode.runtime import Generation, TriModeLM

SMALL = {"vocab_size": 40, "mask_token_id": 39, "eos_token_id": 38, "bos_token_id": 37}
NUM_SEEDS = 32
LAWS: list[dict[str, Any]] = [
    {"temperature": 0.0, "frequency_penalty": 0.9},
    {"temperature": 1.0, "frequency_penalty": -0.6, "min_p": 0.03},
    {"temperature": 1.0, "presence_penalty": 2.0, "frequency_penalty": 0.3, "top_p": 0.9},
    {
        "temperature": 0.8,
        "presence_penalty": -0.5,
        "frequency_penalty": 1.1,
        "repetition_penalty": 1.2,
        "logit_bias": {3: 4.0},
        "min_p": 0.1,
        "top_k": 12,
        "min_tokens": 5,
    },
]
SPECULATION: list[dict[str, Any]] = [
    {"mode": "linear", "block_length": 6},
    {"mode": "branching", "block_length": 4, "branches": 5},
    {"mode": "quadratic", "block_length": 4},
    {"mode": "branching", "skip_masks": 3, "branches": 5, "block_length": 5, "lookup": True},
]


@pytest.fixture(scope="module", params=["float64", "float32", "native"])
def lm(request: pytest.FixtureRequest, tiny_model: Callable[..., Any]) -> TriModeLM:
    """Drafts with the network itself, so that they run long."""
    dtype = torch.float64 if request.param == "float64" else torch.float32
    model = tiny_model(dtype, initializer_range=0.2, **SMALL)
    return TriModeLM(model.pack() if request.param == "native" else model, None)


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_speculation_writes_what_ar_writes(lm: TriModeLM, law: dict[str, Any]) -> None:
    """Prevents: drafts that are not counted, counted twice or by membership; in float32 scores
    whose last bits depend on what is committed already."""
    assert is_native(torch.zeros(1, 4))  # which chooses in float32
    prompts = [[1, 2, 3], [4, 4, 4, 4]] * (NUM_SEEDS // 2)
    options: dict[str, Any] = {"seed": list(range(NUM_SEEDS)), "max_new_tokens": 24, **law}
    expected = [one.token_ids for one in generate(lm, prompts, mode="ar", **options)]
    without = [name for name in law if name.endswith("_penalty")]
    plain = {name: value for name, value in options.items() if name not in without}
    assert expected != [one.token_ids for one in generate(lm, prompts, mode="ar", **plain)]
    for how in SPECULATION:
        found = generate(lm, prompts, **how, **options)
        assert [one.token_ids for one in found] == expected, how
        lengths = [n for one in found for n in one.stats.acceptance_lengths]
        assert max(lengths) > (2 if law["temperature"] else 1)


def generate(lm: TriModeLM, prompts: Any, **options: Any) -> list[Generation]:
    found = lm.generate(prompts, **options)
    assert isinstance(found, list)
    return found


def test_the_prompt_does_not_count(lm: TriModeLM) -> None:
    """Prevents: OpenAI's penalties taken for transformers' one."""
    law: dict[str, Any] = {"max_new_tokens": 1, "seed": 0, "mode": "ar"}
    plain = lm.generate([1, 2, 3, 3, 3], **law)
    [token_id] = plain.token_ids  # type: ignore[union-attr]
    for penalty in (2.0, -2.0):
        law |= {"frequency_penalty": penalty, "presence_penalty": penalty}
        again = lm.generate([1, 2, 3, 3, 3], **law)
        assert again.token_ids == [token_id]  # type: ignore[union-attr]
        longer = generate(lm, [[token_id] * 5] * 8, **(law | {"seed": list(range(8))}))
        bare = {"max_new_tokens": 1, "mode": "ar", "seed": list(range(8))}
        assert [one.token_ids for one in longer] == [
            one.token_ids for one in generate(lm, [[token_id] * 5] * 8, **bare)
        ]


@pytest.mark.parametrize("mode", ["ar", "linear", "branching"])
def test_tokens_that_say_what_the_prompt_said_do_not_count(mode: str) -> None:
    """Prevents: a penalty for the end of a prompt where healing chose it anew."""
    lm = trimode.load("pocket", dtype="float32")
    law: dict[str, Any] = {"mode": mode, "seed": 1, "temperature": 0.7, "frequency_penalty": 2.0}
    num_checked = 0
    for prompt in ("for i in range", "return self", "def add(a, b):\n    return a", "import"):
        seq = lm.prepare(prompt, max_new_tokens=12, ignore_eos=True, **law)
        lm.engine([seq]).run()
        if not seq.num_inside:
            continue
        start = [*seq.prompt_ids, *seq.new_ids[: seq.num_inside]]
        rest = lm.generate(start, max_new_tokens=12, ignore_eos=True, **law)
        assert rest.token_ids == seq.new_ids[seq.num_inside :]  # type: ignore[union-attr]
        num_checked += 1
    assert num_checked
