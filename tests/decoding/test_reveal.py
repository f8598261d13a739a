"""Reveal policies and the diffusion loop, against hand cases and the slow twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.reference import greedy_diffusion
from trimode.decoding import Event
from trimode.decoding.reveal import even_schedule, select
from trimode.runtime import Generation, TriModeLM

SMALL = {"vocab_size": 12, "mask_token_id": 11, "eos_token_id": 10, "bos_token_id": 9}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 1, 2], [9, 2, 7]]
K = 8


@pytest.fixture(scope="module")
def lm(tiny_model: Callable[..., Any]) -> TriModeLM:
    return TriModeLM(tiny_model(torch.float64, initializer_range=0.25, **SMALL), None)


def diffuse(lm: TriModeLM, prompt: list[int], **options: Any) -> Generation:
    defaults: dict[str, Any] = {"mode": "diffusion", "block_length": K, "seed": 0}
    found = lm.generate(prompt, **(defaults | {"max_new_tokens": 20, "ignore_eos": True} | options))
    assert isinstance(found, Generation)
    return found


@pytest.mark.parametrize(
    ("num_masked", "steps", "expected"),
    [
        (7, 1, [7]),
        (7, 2, [4, 3]),
        (7, 3, [3, 2, 2]),
        (7, 7, [1] * 7),
        (7, 8, [1] * 7),
        (0, 1, []),
        (6, 3, [2, 2, 2]),
    ],
)
def test_even_schedule(num_masked: int, steps: int, expected: list[int]) -> None:
    """Prevents: a remainder put last or lost, and passes that reveal nothing."""
    assert even_schedule(num_masked, steps) == expected


@pytest.mark.parametrize(
    ("confidences", "threshold", "floor", "expected"),
    [
        ([0.1, 0.5, 0.3], None, 1, [1]),
        ([0.1, 0.5, 0.3], None, 2, [1, 2]),
        ([0.1, 0.5, 0.3], 0.3, 1, [1, 2]),
        ([0.1, 0.5, 0.3], 0.9, 1, [1]),
        ([0.1, 0.5, 0.3], 0.0, 1, [0, 1, 2]),
        ([0.4, 0.4, 0.4], None, 2, [0, 1]),
        ([0.1, 0.5], None, 5, [0, 1]),
        ([0.2, 0.9, 0.8], 0.8, 2, [1, 2]),
    ],
)
def test_select(
    confidences: list[float], threshold: float | None, floor: int, expected: list[int]
) -> None:
    """Prevents: `>` for `>=`, a pass that reveals nothing, and ties decided by a sort's whim."""
    assert select(confidences, threshold=threshold, floor=floor) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_set_the_number_of_passes(lm: TriModeLM, temperature: float) -> None:
    """Prevents: `steps` of a block counted wrong; from one pass a block to one token a pass."""
    passes = []
    for steps in range(1, K + 1):
        events: list[Event] = []
        found = diffuse(
            lm,
            PROMPTS[0],
            steps=steps,
            max_new_tokens=1 + 2 * K - 1,
            temperature=temperature,
            on_event=lambda _, event, events=events: events.append(event),
        )
        assert len(found.token_ids) == 2 * K
        passes.append(found.stats.forwards["denoise"])
        left = [sum(event.is_masked) for event in events if event.kind == "denoise"]
        if steps == 1:
            assert left == [0, 0]
        if steps == K:
            assert left == [*range(K - 2, -1, -1)] * 2
    assert passes == [2 * min(steps, K - 1) for steps in range(1, K + 1)]
    assert passes == sorted(passes)


def test_threshold_zero_is_one_pass_and_one_the_slowest(lm: TriModeLM) -> None:
    """Prevents: a threshold that is ignored, or compared the wrong way round."""
    forwards = [
        diffuse(lm, PROMPTS[0], threshold=t, max_new_tokens=K).stats.forwards["denoise"]
        for t in (0.0, 0.3, 1.0)
    ]
    assert forwards[0] == 1
    assert forwards[0] <= forwards[1] <= forwards[2] == K - 1


def test_a_shorter_limit_gives_a_prefix(lm: TriModeLM) -> None:
    """Prevents: the last block denoised at another length than it would have had."""
    for prompt in PROMPTS[:2]:
        whole = diffuse(lm, prompt, max_new_tokens=20, temperature=1.0).token_ids
        for limit in range(1, 20):
            cut = diffuse(lm, prompt, max_new_tokens=limit, temperature=1.0)
            assert cut.token_ids == whole[:limit]
            assert cut.finish_reason == "length"


def test_a_block_stops_early_at_eos(lm: TriModeLM) -> None:
    """Prevents: passes spent behind a stop token, masks shown, or text going on after it."""
    num_saved = 0
    for prompt in PROMPTS:
        for seed in range(8):
            options: dict[str, Any] = {"steps": K, "temperature": 1.5, "seed": seed}
            endless = diffuse(lm, prompt, **options)
            stopped = diffuse(lm, prompt, ignore_eos=False, **options)
            assert 11 not in stopped.token_ids
            if 10 not in endless.token_ids:
                assert stopped.token_ids == endless.token_ids
                continue
            assert stopped.finish_reason == "stop"
            assert stopped.token_ids == endless.token_ids[: endless.token_ids.index(10) + 1]
            denoise = stopped.stats.forwards["denoise"]
            num_blocks = stopped.stats.forwards["commit"] + 1
            num_saved += denoise < num_blocks * (K - 1) and len(stopped.token_ids) > 1
    assert num_saved > 0


@pytest.mark.parametrize(
    ("threshold", "steps"), [(0.9, None), (0.4, None), (0.0, None), (None, 3), (None, 8), (0.4, 4)]
)
@pytest.mark.parametrize("ignore_eos", [True, False])
def test_diffusion_agrees_with_its_slow_twin(
    lm: TriModeLM, threshold: float | None, steps: int | None, ignore_eos: bool
) -> None:
    """Prevents: a K/V cache, mask or position of the block loop that is not the published one."""
    for prompt in PROMPTS:
        for block_length in (1, 4, 8):
            capped = None if steps is None else min(steps, block_length)
            twin = greedy_diffusion(
                lm.model,
                prompt,
                max_new_tokens=10,
                block_length=block_length,
                threshold=threshold,
                steps=capped,
                stops=() if ignore_eos else (10,),
            )
            found = diffuse(
                lm,
                prompt,
                max_new_tokens=10,
                block_length=block_length,
                threshold=threshold,
                steps=capped,
                ignore_eos=ignore_eos,
            )
            assert found.token_ids == twin.new_ids
