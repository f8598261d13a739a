"""Reveal policies and the diffusion loop, against hand cases and the slow twin."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.reference import greedy_diffusion, next_logits
from trimode.decoding import Event, GenerationParams
from trimode.decoding.choose import choose
from trimode.decoding.noise import noise_key
from trimode.decoding.reveal import (
    degenerate_reason,
    drawn,
    even_schedule,
    leftmost,
    select,
    within_entropy_bound,
)
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


@pytest.mark.parametrize(
    ("entropies", "bound", "floor", "expected"),
    [
        ([0.5, 0.1, 0.3], 0.0, 1, [1]),
        ([0.5, 0.1, 0.3], 0.05, 1, [1]),
        ([0.5, 0.1, 0.3], 0.1, 1, [1, 2]),  # 0.1 + 0.3 less 0.3
        ([0.5, 0.125, 0.25], 0.374, 1, [1, 2]),
        ([0.5, 0.125, 0.25], 0.375, 1, [0, 1, 2]),  # 0.125 + 0.25 + 0.5 less 0.5
        ([9.0], 0.0, 1, [0]),
        ([0.0, 0.0, 4.0, 5.0], 0.0, 1, [0, 1, 2]),  # the certain cost nothing
        ([0.2, 0.2, 0.2], 0.0, 2, [0, 1]),
        ([0.2, 0.2], 0.0, 5, [0, 1]),
        ([0.5, 0.1, 0.3], 0.0, 2, [1, 2]),
        ([0.5, 0.1, 0.3], 9.0, 1, [0, 1, 2]),
    ],
)
def test_within_entropy_bound(
    entropies: list[float], bound: float, floor: int, expected: list[int]
) -> None:
    """Prevents: the largest counted in, positions taken in another order than of certainty, and a
    pass that reveals nothing."""
    assert within_entropy_bound(entropies, bound=bound, floor=floor) == expected


@pytest.mark.parametrize(("num", "floor", "expected"), [(3, 1, [0]), (3, 2, [0, 1]), (1, 4, [0])])
def test_leftmost(num: int, floor: int, expected: list[int]) -> None:
    """Prevents: positions that do not exist at the end of a block."""
    assert leftmost(num, floor=floor) == expected


def test_drawn_is_the_seed_s_and_positions_own() -> None:
    """Prevents: an order that depends on what else is masked, on where a block starts, or that is
    the same for every seed."""
    positions = [10, 11, 12, 13]
    order = sorted(positions, key=lambda p: noise_key(7, p))
    for floor in range(1, 5):
        found = drawn(positions, seed=7, floor=floor)
        assert sorted(order[:floor]) == [positions[i] for i in found]
    rest = [p for p in positions if p != order[0]]
    assert [rest[i] for i in drawn(rest, seed=7, floor=1)] == order[1:2]
    firsts = Counter(drawn(positions, seed=seed, floor=1)[0] for seed in range(2000))
    assert sum((firsts[i] - 500) ** 2 / 500 for i in range(4)) < 16.3  # chi-square, p 0.001


def params_of(**options: Any) -> GenerationParams:
    defaults = {"mode": "diffusion", "max_new_tokens": 1, "block_length": K, "seed": 0}
    return GenerationParams(**(defaults | options))


def test_entropies_are_of_the_unfiltered_law() -> None:
    """Prevents: an entropy with the banned or the filters in it, and NaN of a certain law."""
    logits = [[math.log(p) for p in (0.5, 0.25, 0.25, 0.9)], [0.0, 0.0, 0.0, 5.0]]
    logits.append([2000.0, 0.0, 0.0, 0.0])
    for params in (params_of(), params_of(temperature=0.5, top_k=1)):
        found = choose(
            torch.tensor(logits, dtype=torch.float64),
            params=[params] * 3,
            positions=[1, 2, 3],
            banned=torch.tensor([3]),
            wants_entropy=True,
        )
        assert found.entropies == pytest.approx([1.5 * math.log(2), math.log(3), 0.0])
        assert found.confidences == found.log_probs == found.runner_ups == []


def test_log_probs_are_of_the_targets_and_unfiltered() -> None:
    """Prevents: the log-probability of the choice, of a filtered law, or of another row."""
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25, 0.9]] * 3, dtype=torch.float64))
    found = choose(
        logits,
        params=[params_of(), params_of(temperature=2.0, top_k=1), params_of()],
        positions=[1, 2, 3],
        banned=torch.tensor([3]),
        targets=[1, 2, None],
    )
    assert found.log_probs[:2] == pytest.approx([math.log(0.25)] * 2)


POLICY_OPTIONS: list[dict[str, Any]] = [
    {"policy": "confidence_threshold", "threshold": 0.4},
    {"policy": "steps", "steps": 3},
    {"policy": "entropy_bound"},
    {"policy": "entropy_bound", "entropy_bound": 1.5},
    {"policy": "entropy_bound", "entropy_bound": 1.5, "steps": 3},
    {"policy": "leftmost"},
    {"policy": "leftmost", "steps": 3},
    {"policy": "random"},
    {"policy": "random", "steps": 3},
]


def slow_pass(
    law: torch.Tensor, masked: list[int], *, start: int, seed: int, options: dict[str, Any]
) -> tuple[list[int], int]:
    """The masked positions of a block in the order in which a policy would reveal them, and how
    many of them its knob alone allows."""
    chance = {i: law[i].softmax(-1) for i in masked}
    entropy = {i: -sum(float(p) * math.log(p) for p in chance[i] if p > 0) for i in masked}
    if options["policy"] == "entropy_bound":
        order = sorted(masked, key=lambda i: entropy[i])
        bound = options.get("entropy_bound", 0.1)
        sums = [
            sum(entropy[i] for i in order[: n + 1]) - entropy[order[n]] for n in range(len(order))
        ]
        return order, sum(error <= bound for error in sums)
    if options["policy"] == "leftmost":
        return masked, 0
    if options["policy"] == "random":
        return sorted(masked, key=lambda i: noise_key(seed, start + i)), 0
    order = sorted(masked, key=lambda i: -float(chance[i].max()))
    threshold = options.get("threshold", 2.0)
    return order, sum(float(chance[i].max()) >= threshold for i in order)


@pytest.mark.parametrize("options", POLICY_OPTIONS, ids=str)
def test_every_policy_agrees_with_a_slow_loop(lm: TriModeLM, options: dict[str, Any]) -> None:
    """Prevents: a policy that sees other positions, entropies or counts than its rule says."""
    for prompt in PROMPTS[:2]:
        ids, num_passes = list(prompt), 0
        for _ in range(2):
            ids.append(int(next_logits(lm.model, ids)[-1].argmax()))
            block: list[int | None] = [ids.pop(), *[None] * (K - 1)]
            floors = even_schedule(K - 1, options["steps"]) if "steps" in options else []
            while None in block:
                law = next_logits(lm.model, ids, [11 if i is None else i for i in block])[
                    len(ids) :
                ]
                masked = [i for i, token_id in enumerate(block) if token_id is None]
                order, many = slow_pass(law, masked, start=len(ids), seed=5, options=options)
                many = max(many, floors.pop(0) if floors else 1)
                for i in order[:many]:
                    block[i] = int(law[i].argmax())
                num_passes += 1
            ids += [i for i in block if i is not None]
        found = diffuse(lm, prompt, max_new_tokens=2 * K, seed=5, **options)
        assert found.prompt_ids + found.token_ids == ids
        assert found.stats.forwards["denoise"] == num_passes


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_policies_mix_in_one_batch(lm: TriModeLM, temperature: float) -> None:
    """Prevents: a policy, its entropies or its draws reaching the rows beside it."""
    engine_options: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True}
    params = [
        params_of(seed=seed, temperature=temperature, **(options | engine_options))
        for seed, options in enumerate(POLICY_OPTIONS)
    ]
    together = [lm.sequence(PROMPTS[i % 4], one) for i, one in enumerate(params)]
    engine = lm.engine(together)
    while not engine.is_idle:
        engine.step()
    for i, seq in enumerate(together):
        alone = diffuse(lm, PROMPTS[i % 4], seed=i, temperature=temperature, **POLICY_OPTIONS[i])
        assert (seq.new_ids, seq.stats.forwards) == (alone.token_ids, alone.stats.forwards)


def test_the_default_policy_by_name_changes_nothing(lm: TriModeLM) -> None:
    """Prevents: today's texts changing once a policy has a name."""
    for knobs in ({}, {"steps": 3}, {"threshold": 0.4}, {"threshold": 0.4, "steps": 4}):
        for prompt in PROMPTS:
            plain = diffuse(lm, prompt, temperature=1.0, **knobs)
            named = diffuse(lm, prompt, temperature=1.0, policy="confidence_threshold", **knobs)
            assert plain.token_ids == named.token_ids
            assert plain.stats.forwards == named.stats.forwards


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"steps": 6}, None),
        ({"steps": 7}, "policy 'steps' has steps 7 for the 7 masked"),
        ({"steps": 8}, "policy 'steps' has steps 8 for the 7 masked"),
        ({"steps": 8, "threshold": 0.5}, None),
        ({"threshold": 1.0}, "threshold is 1, which a probability hardly ever reaches"),
        ({"threshold": 1, "steps": 3}, None),
        ({"threshold": 1, "steps": 7}, "threshold is 1, which"),
        ({"threshold": 0}, "threshold is 0: a block is revealed in one pass"),
        ({"block_length": 1}, "block_length is 1: a block has 0 masked positions"),
        ({"block_length": 2, "threshold": 0.5}, "block_length is 2: a block has 1 masked"),
        ({"block_length": 3, "steps": 2}, "policy 'steps' has steps 2 for the 2 masked"),
        ({"policy": "leftmost"}, "policy 'leftmost' has no steps for the 7 masked"),
        ({"policy": "random", "steps": 7}, "policy 'random' has steps 7 for the 7 masked"),
        ({"policy": "random", "steps": 3}, None),
        ({"policy": "entropy_bound", "entropy_bound": 0}, "entropy_bound is 0, which only"),
        ({"policy": "entropy_bound", "entropy_bound": 0, "steps": 3}, None),
        ({"policy": "entropy_bound"}, None),
        ({"mode": "linear"}, None),
        ({"mode": "linear", "threshold": 0}, None),
        ({"mode": "linear", "block_length": 2}, None),
        ({"mode": "linear", "steps": 7}, "policy 'steps' has steps 7"),
        ({"mode": "linear", "threshold": 1}, "threshold is 1, which"),
        ({"mode": "ar", "block_length": 1}, None),
        ({"mode": "branching"}, None),
    ],
)
def test_degenerate_settings_have_a_reason(options: dict[str, Any], reason: str | None) -> None:
    """Prevents: a warning where there is nothing to warn of, and a slow setting without one."""
    found = degenerate_reason(params_of(**options))
    assert (found is None) == (reason is None)
    assert found is None or (reason is not None and found.startswith(reason))


def test_a_degenerate_setting_is_told_once_a_call(
    lm: TriModeLM, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents: one warning a prompt or a block, and an error where a warning is enough."""
    options: dict[str, Any] = {"mode": "diffusion", "max_new_tokens": 9, "block_length": 4}
    with caplog.at_level(logging.WARNING, logger="trimode"):
        lm.generate(PROMPTS, steps=4, **options)
        assert [record.name for record in caplog.records] == ["trimode.runtime"]
        assert caplog.messages[0].startswith("policy 'steps' has steps 4 for the 3 masked")
        lm.generate(PROMPTS, steps=2, **options)
    assert len(caplog.records) == 1


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
