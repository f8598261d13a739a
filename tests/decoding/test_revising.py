"""Revision of revealed tokens and the AR-weighted policy, against slow twins: dense, no K/V kept,
one block at a time, one question a forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from tests.reference import next_logits
from trimode.decoding import Event, GenerationParams
from trimode.decoding.noise import noise_key
from trimode.decoding.reveal import degenerate_reason, even_schedule
from trimode.decoding.revising import remask_chances
from trimode.model import TriModeModel
from trimode.runtime import Generation, TriModeLM

SMALL = {"vocab_size": 12, "mask_token_id": 11, "eos_token_id": 10, "bos_token_id": 9}
EOS, MASK = 10, 11
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 1, 2], [9, 2, 7]]
K = 8

Block = list[int]
Fill = Callable[[TriModeModel, list[int], Block, frozenset[int]], int]

SETTINGS: list[dict[str, Any]] = [
    {"policy": "ar_weighted", "threshold": 0.5},
    {"policy": "ar_weighted", "threshold": 0.6, "steps": 3},
    {"policy": "ar_weighted", "steps": 3},
    {"revision": "joint_threshold", "steps": 2, "edit_threshold": 0.3},
    {"revision": "joint_threshold", "steps": 1, "edit_threshold": 0.0, "edit_budget": 7},
    {"revision": "joint_threshold", "threshold": 0.4, "edit_threshold": 0.3, "edit_budget": 2},
    {"revision": "joint_threshold", "policy": "entropy_bound", "entropy_bound": 2},
    {"revision": "ar_doubt", "steps": 2},
    {"revision": "ar_doubt", "steps": 1, "doubt": 0.5, "edit_budget": 7},
    {"revision": "ar_doubt", "threshold": 0.4, "doubt": 1.0, "edit_budget": 2},
    {"revision": "ar_doubt", "policy": "ar_weighted", "threshold": 0.3, "doubt": 0.5},
    {"revision": "remdm", "steps": 4, "remask_schedule": "cap", "remask_rate": 0.8},
    {"revision": "remdm", "steps": 7, "remask_schedule": "rescale", "remask_rate": 1.0},
    {"revision": "remdm", "steps": 4, "remask_rate": 1.0},
    {"revision": "remdm", "steps": 3, "remask_schedule": "loop", "remask_rate": 0.6},
    {"revision": "remdm", "policy": "leftmost", "steps": 3},
    {"revision": "remdm", "policy": "random", "steps": 4},
]
REVISING = [options for options in SETTINGS if "revision" in options]


@pytest.fixture(scope="module")
def lm(tiny_model: Callable[..., Any]) -> TriModeLM:
    return TriModeLM(tiny_model(torch.float64, initializer_range=0.25, **SMALL), None)


def diffuse(lm: TriModeLM, prompt: list[int], **options: Any) -> Generation:
    defaults: dict[str, Any] = {"mode": "diffusion", "block_length": K, "seed": 0}
    found = lm.generate(prompt, **(defaults | {"max_new_tokens": 20, "ignore_eos": True} | options))
    assert isinstance(found, Generation)
    return found


def observed(lm: TriModeLM, prompt: list[int], **options: Any) -> tuple[Generation, list[Event]]:
    events: list[Event] = []
    return diffuse(lm, prompt, on_event=lambda _, event: events.append(event), **options), events


def params_of(**options: Any) -> GenerationParams:
    defaults = {"mode": "diffusion", "max_new_tokens": 1, "block_length": K, "seed": 0}
    return GenerationParams(**(defaults | options))


# The twins, greedy: each fills a block in place and says how many denoising forwards it took.


def masked_in(block: Block) -> list[int]:
    return [i for i, token_id in enumerate(block) if token_id == MASK]


def shown(block: Block, stops: frozenset[int]) -> Block:
    """Up to the first stop token, that included."""
    ends = [i for i, token_id in enumerate(block) if i and token_id in stops]
    return block[: ends[0] + 1] if ends else block


@cache
def law_of(model: TriModeModel, prefix: tuple[int, ...], block: tuple[int, ...]) -> torch.Tensor:
    """Kept only because the same question comes up in many tests."""
    return next_logits(model, prefix, block).softmax(-1)


def chance_at(model: TriModeModel, prefix: list[int], block: Block, i: int) -> torch.Tensor:
    return law_of(model, tuple(prefix), tuple(block))[len(prefix) + i]


def ar_chances(model: TriModeModel, text: list[int]) -> list[float]:
    """Of every token after those before it; the first has none."""
    law = law_of(model, tuple(text), ())
    return [math.nan, *(float(row[i]) for row, i in zip(law, text[1:], strict=False))]


def slow_denoise(
    model: TriModeModel,
    prefix: list[int],
    block: Block,
    *,
    stops: frozenset[int],
    threshold: float = 2.0,
    steps: int | None = None,
    is_weighted: bool = False,
) -> int:
    """Confidence or AR-weighted confidence with a threshold, the even schedule, or both."""
    floors = even_schedule(len(masked_in(block)), steps) if steps else []
    num_passes, old = 0, {}
    while MASK in shown(block, stops):
        laws = {i: chance_at(model, prefix, block, i) for i in masked_in(block)}
        new = {i: int(law.argmax()) for i, law in laws.items()}
        score = {i: float(law.max()) for i, law in laws.items()}
        if old:
            text = prefix + [old.get(i, token_id) for i, token_id in enumerate(block)]
            chances = ar_chances(model, text)[len(prefix) :]
            weight = 1.0
            for i in laws:
                weight *= chances[i] if new[i] == old[i] else 1 - chances[i]
                score[i] = (score[i] * weight) ** 0.5
        floor = floors.pop(0) if floors else 1
        for rank, i in enumerate(sorted(score, key=lambda i: -score[i])):
            if rank < floor or score[i] >= threshold:
                block[i] = new[i]
        old = new if is_weighted else {}
        num_passes += 1
    return num_passes


def slow_joint(
    model: TriModeModel,
    prefix: list[int],
    block: Block,
    *,
    stops: frozenset[int],
    edit_threshold: float,
    budget: int,
    threshold: float = 2.0,
    steps: int | None = None,
) -> int:
    """Every revealed token asked about in a forward of its own, alone masked."""
    floors = even_schedule(len(masked_in(block)), steps) if steps else []
    sure: dict[int, float] = {}
    num_passes, is_settled = 0, False
    while not is_settled:
        before = list(block)
        checked = sorted(sure, key=lambda i: sure[i])
        checked = [i for i in checked if i < len(shown(block, stops))][:budget]
        edits = []
        for i in checked:
            law = chance_at(model, prefix, [*before[:i], MASK, *before[i + 1 :]], i)
            if int(law.argmax()) != before[i] and float(law.max()) > edit_threshold:
                edits.append((float(law.max()), i, int(law.argmax())))
        is_open = MASK in shown(before, stops)
        if is_open:
            laws = {i: chance_at(model, prefix, before, i) for i in masked_in(before)}
            floor = floors.pop(0) if floors else 1
            for rank, i in enumerate(sorted(laws, key=lambda i: -float(laws[i].max()))):
                if rank < floor or float(laws[i].max()) >= threshold:
                    block[i], sure[i] = int(laws[i].argmax()), float(laws[i].max())
        if edits:
            confidence, i, token_id = max(edits)
            block[i], sure[i] = token_id, confidence
            budget -= 1
        num_passes += 1
        is_settled = MASK not in shown(block, stops) and (block == before or not budget)
    return num_passes


def slow_remdm(
    model: TriModeModel,
    prefix: list[int],
    block: Block,
    *,
    stops: frozenset[int],
    steps: int,
    schedule: str,
    rate: float,
    seed: int,
) -> int:
    """The paper's step by step; alpha as a count, masks drawn one position at a time."""
    num = len(block) - 1
    shares = [sum(even_schedule(num, steps)[:j]) for j in range(min(steps, num) + 1)]
    passes = list(zip(shares, shares[1:], strict=False))
    if schedule == "loop":
        held = [(shares[-2], shares[-2])] * len(passes)
        passes = [*passes[:-1], *held, passes[-1]]
    num_forwards = 0
    sure: dict[int, float] = {}
    for number, (had, has) in enumerate(passes, start=1):
        if MASK not in shown(block, stops):
            break
        most = min(1.0, (num - has) / had) if had else 0.0
        sigma = {"cap": min(rate, most), "rescale": rate * most, "conf": rate * most}
        sigma["loop"] = min(rate, most) if had == has else 0.0
        remasked = []
        for i in sure:
            weight = 1.0
            if schedule == "conf":
                weight = math.exp(-sure[i]) / sum(math.exp(-c) for c in sure.values())
            position_key = noise_key(seed, len(prefix) + i) % 2**64
            if noise_key(position_key, number) % 2**64 < sigma[schedule] * weight * 2**64:
                remasked.append(i)
        if has == len(sure) - len(remasked):
            continue
        laws = {i: chance_at(model, prefix, block, i) for i in masked_in(block)}
        num_forwards += 1
        order = sorted(laws, key=lambda i: -float(laws[i].max()))
        for i in order[: has - len(sure) + len(remasked)]:
            block[i], sure[i] = int(laws[i].argmax()), float(laws[i].max())
        for i in remasked:
            block[i] = MASK
            del sure[i]
    return num_forwards


def written(
    model: TriModeModel, prompt: list[int], fill: Fill, *, num_blocks: int, stops: frozenset[int]
) -> tuple[list[int], int]:
    """New tokens of whole blocks, and the denoising forwards they took."""
    ids, num_forwards = list(prompt), 0
    for _ in range(num_blocks):
        block = [int(law_of(model, tuple(ids), ())[-1].argmax()), *[MASK] * (K - 1)]
        if block[0] not in stops:
            num_forwards += fill(model, ids, block, stops)
        ids += shown(block, stops) if block[0] not in stops else block[:1]
        if ids[-1] in stops:
            break
    return ids[len(prompt) :], num_forwards


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize(
    "knobs", [{"threshold": 0.5}, {"steps": 3}, {"threshold": 0.6, "steps": 3}, {"threshold": 0.9}]
)
def test_ar_weighted_agrees_with_its_slow_twin(
    lm: TriModeLM, knobs: dict[str, Any], ignore_eos: bool
) -> None:
    """Prevents: an AR view that sees masks, or candidates of the wrong pass or position; a trunk
    that the block sees."""
    stops = frozenset(() if ignore_eos else (EOS,))

    def fill(model: TriModeModel, prefix: list[int], block: Block, stops: frozenset[int]) -> int:
        return slow_denoise(model, prefix, block, stops=stops, is_weighted=True, **knobs)

    for prompt in PROMPTS[:2]:
        expected, passes = written(lm.model, prompt, fill, num_blocks=2, stops=stops)
        options = knobs | {"policy": "ar_weighted", "ignore_eos": ignore_eos}
        found = diffuse(lm, prompt, max_new_tokens=2 * K, **options)
        assert found.token_ids == expected
        assert found.stats.forwards["denoise"] == passes


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize(
    ("knobs", "edit_threshold", "budget"),
    [
        ({"steps": 2}, 0.3, 4),
        ({"steps": 1}, 0.0, 7),
        ({"steps": 4}, 0.2, 1),
        ({"threshold": 0.3}, 0.3, 3),
        ({"threshold": 0.3, "steps": 2}, 0.0, 2),
    ],
)
def test_joint_threshold_agrees_with_its_slow_twin(
    lm: TriModeLM, knobs: dict[str, Any], edit_threshold: float, budget: int, ignore_eos: bool
) -> None:
    """Prevents: copies that see each other or the block; an edit of another position, of more than
    one token a pass, beyond the budget, or behind a stop token."""
    stops = frozenset(() if ignore_eos else (EOS,))

    def fill(model: TriModeModel, prefix: list[int], block: Block, stops: frozenset[int]) -> int:
        own = {"edit_threshold": edit_threshold, "budget": budget}
        return slow_joint(model, prefix, block, stops=stops, **own, **knobs)

    num_edits = 0
    for prompt in PROMPTS[:2]:
        expected, passes = written(lm.model, prompt, fill, num_blocks=2, stops=stops)
        found, events = observed(
            *(lm, prompt),
            max_new_tokens=2 * K,
            revision="joint_threshold",
            edit_threshold=edit_threshold,
            edit_budget=budget,
            ignore_eos=ignore_eos,
            **knobs,
        )
        assert found.token_ids == expected
        assert found.stats.forwards["denoise"] == passes
        edits = sum(event.kind == "revise" for event in events)
        assert edits <= 2 * budget
        num_edits += edits
    assert num_edits > 0


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize(
    ("knobs", "doubt", "budget"),
    [
        ({"steps": 2}, 0.1, 4),
        ({"steps": 1}, 0.5, 7),
        ({"threshold": 0.3}, 1.0, 3),
        ({"threshold": 0.3, "steps": 2}, 0.3, 1),
    ],
)
def test_ar_doubt_agrees_with_its_slow_twin(
    lm: TriModeLM, knobs: dict[str, Any], doubt: float, budget: int, ignore_eos: bool
) -> None:
    """Prevents: doubts read one position off or of an older text, a position reopened twice, and a
    block committed or continued from a forward made before its last change."""
    stops = frozenset(() if ignore_eos else (EOS,))
    commits = 0

    def fill(model: TriModeModel, prefix: list[int], block: Block, stops: frozenset[int]) -> int:
        nonlocal commits
        passes, tried, left = 0, {0}, budget
        while True:
            passes += slow_denoise(model, prefix, block, stops=stops, **knobs)
            commits += 1
            found = ar_chances(model, prefix + shown(block, stops))[len(prefix) :]
            chances = {i: chance for i, chance in enumerate(found) if i not in tried}
            reopened = sorted((i for i in chances if chances[i] < doubt), key=chances.__getitem__)
            reopened = reopened[:left]
            if not reopened:
                return passes
            left -= len(reopened)
            tried |= set(reopened)
            first = min(reopened)
            law = law_of(model, tuple(prefix + block[:first]), ())
            for i in reopened:
                block[i] = MASK
            block[first] = int(law[-1].argmax())

    num_rounds = 0
    for prompt in PROMPTS[:2]:
        commits = 0
        expected, passes = written(lm.model, prompt, fill, num_blocks=2, stops=stops)
        found = diffuse(
            *(lm, prompt),
            max_new_tokens=2 * K,
            revision="ar_doubt",
            doubt=doubt,
            edit_budget=budget,
            ignore_eos=ignore_eos,
            **knobs,
        )
        assert found.token_ids == expected
        assert found.stats.forwards["denoise"] == passes
        assert found.stats.forwards["commit"] == commits
        num_rounds += commits - -(-len(expected) // K)
    assert num_rounds > 0


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize("schedule", ["cap", "rescale", "conf", "loop"])
def test_remdm_agrees_with_its_slow_twin(lm: TriModeLM, schedule: str, ignore_eos: bool) -> None:
    """Prevents: draws of another position, pass or seed, masks beyond the schedule, a token masked
    and revealed in one pass, and a block left with masks."""
    stops = frozenset(() if ignore_eos else (EOS,))
    num_remasked = 0
    for number, prompt in enumerate(PROMPTS[:2]):
        for steps, rate in ((1, 1.0), (4, 0.7), (8, 1.0)):
            knobs: dict[str, Any] = {"steps": steps, "rate": rate, "seed": number}

            def fill(
                model: TriModeModel,
                prefix: list[int],
                block: Block,
                stops: frozenset[int],
                knobs: dict[str, Any] = knobs,
            ) -> int:
                return slow_remdm(model, prefix, block, stops=stops, schedule=schedule, **knobs)

            expected, passes = written(lm.model, prompt, fill, num_blocks=2, stops=stops)
            found, events = observed(
                *(lm, prompt),
                max_new_tokens=2 * K,
                revision="remdm",
                remask_schedule=schedule,
                steps=steps,
                remask_rate=rate,
                seed=number,
                ignore_eos=ignore_eos,
            )
            assert found.token_ids == expected
            assert found.stats.forwards["denoise"] == passes
            num_remasked += sum(event.kind == "denoise" for event in events) - passes
    assert num_remasked > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_revisions_mix_in_one_batch(lm: TriModeLM, temperature: float) -> None:
    """Prevents: one request's copies, trunk, doubts or draws reaching the rows beside it, and a
    row too short for them."""
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": temperature, "ignore_eos": True}
    params = [params_of(seed=n, **(one | options)) for n, one in enumerate(SETTINGS)]
    params.append(GenerationParams(mode="ar", block_length=K, seed=1, **options))
    params.append(GenerationParams(mode="branching", block_length=K, seed=2, **options))
    together = [lm.sequence(PROMPTS[i % 4], one) for i, one in enumerate(params)]
    engine = lm.engine(together)
    while not engine.is_idle:
        engine.step()
    for i, (seq, one) in enumerate(zip(together, params, strict=True)):
        alone = lm.sequence(PROMPTS[i % 4], one)
        engine = lm.engine([alone])
        while not engine.is_idle:
            engine.step()
        assert (seq.new_ids, seq.stats.forwards) == (alone.new_ids, alone.stats.forwards)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_shorter_limit_gives_a_prefix(lm: TriModeLM, options: dict[str, Any]) -> None:
    """Prevents: the last block, which alone is cut, revised otherwise than it would have been."""
    whole = diffuse(lm, PROMPTS[2], max_new_tokens=2 * K + 3, temperature=1.0, **options)
    for limit in (2, K, K + 1):
        cut = diffuse(lm, PROMPTS[2], max_new_tokens=limit, temperature=1.0, **options)
        assert cut.token_ids == whole.token_ids[:limit]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("options", REVISING, ids=str)
def test_events_tell_every_change(
    lm: TriModeLM, options: dict[str, Any], temperature: float
) -> None:
    """Prevents: a revision that no event tells, one told of a token that did not stand there, and
    one of what was emitted already."""
    for seed, prompt in enumerate(PROMPTS):
        found, events = observed(
            *(lm, prompt),
            seed=seed,
            temperature=temperature,
            max_new_tokens=2 * K,
            ignore_eos=seed % 2 == 0,
            **options,
        )
        text: list[int] = []
        last: dict[int, int] = {}  # the newest token that ever stood at a position
        for event in events:
            if event.kind == "denoise":
                standing = enumerate(zip(event.token_ids, event.is_masked, strict=True))
                for position, token_id in (
                    (event.position + i, token_id) for i, (token_id, out) in standing if not out
                ):
                    last.setdefault(position, token_id)
            elif event.kind == "revise":
                assert event.position >= len(prompt) + len(text)
                assert event.reason == options["revision"]
                assert event.old_ids == (last[event.position],)
                assert event.token_ids != event.old_ids
                last[event.position] = event.token_ids[0]
            elif event.kind == "emit":
                text += event.token_ids
        assert text == found.token_ids
        assert all(last.get(len(prompt) + i, t) == t for i, t in enumerate(text))


def test_without_doubts_only_the_last_commit_is_more(lm: TriModeLM) -> None:
    """Prevents: a text that changes, or forwards paid, where nothing is doubted."""
    for prompt in PROMPTS:
        plain = diffuse(lm, prompt, temperature=1.0)
        sure = diffuse(lm, prompt, temperature=1.0, revision="ar_doubt", doubt=0.0)
        assert sure.token_ids == plain.token_ids
        assert sure.stats.forwards["commit"] == plain.stats.forwards["commit"] + 1
        assert sure.stats.forwards["denoise"] == plain.stats.forwards["denoise"]


@pytest.mark.parametrize("options", REVISING, ids=str)
def test_what_stands_fixed_is_not_revised(lm: TriModeLM, options: dict[str, Any]) -> None:
    """Prevents: the end of thought, which stands in its block from the start, edited away."""
    for budget in (3, 9):
        control = {"max_thinking_tokens": budget, "end_think_token_id": 4}
        for prompt in PROMPTS[::2]:
            found = diffuse(lm, prompt, **control, **options).token_ids
            assert 4 in found[: budget + 1]
            assert found.index(4) == budget or found.index(4) < K * (budget // K)


@pytest.mark.parametrize(
    ("schedule", "had", "has", "is_looping", "expected"),
    [
        ("cap", 0.0, 0.5, False, 0.0),
        ("cap", 0.5, 0.75, False, 0.4),
        ("cap", 0.75, 0.9, False, 2 / 15),
        ("cap", 0.9, 1.0, False, 0.0),
        ("rescale", 0.5, 0.75, False, 0.2),
        ("rescale", 0.25, 0.5, False, 0.4),
        ("loop", 0.8, 0.8, True, 0.25),
        ("loop", 0.5, 0.5, True, 0.4),
        ("loop", 0.5, 0.75, False, 0.0),
    ],
)
def test_remask_chances(
    schedule: str, had: float, has: float, is_looping: bool, expected: float
) -> None:
    """Prevents: a sigma beyond what keeps the schedule, and masks made anew in the last pass."""
    params = params_of(revision="remdm", steps=4, remask_schedule=schedule, remask_rate=0.4)
    found = remask_chances(params, {1: 0.2, 3: 0.9}, had=had, has=has, is_looping=is_looping)
    assert found == pytest.approx({1: expected, 3: expected})


def test_remask_chances_by_confidence() -> None:
    """Prevents: the surest masked anew first, and more than one token a pass on average."""
    params = params_of(revision="remdm", steps=4, remask_schedule="conf", remask_rate=1.0)
    found = remask_chances(params, {1: 0.2, 3: 0.9, 4: 0.9}, had=0.5, has=0.75)
    assert sum(found.values()) == pytest.approx(0.5)
    assert found[1] / found[3] == pytest.approx(math.exp(0.7))


def test_draws_follow_their_chances(lm: TriModeLM) -> None:
    """Prevents: draws that are the same for every seed, pass or position, or of the wrong share."""
    options: dict[str, Any] = {"revision": "remdm", "steps": 2, "remask_schedule": "loop"}
    num_seeds, num_masked = 80, 0
    for seed in range(num_seeds):
        _, events = observed(lm, [1], seed=seed, max_new_tokens=K, remask_rate=0.1, **options)
        # 4 of 7 stand before and in two held passes, each masked anew with a chance of 0.1
        counts = [sum(event.is_masked) for event in events if event.kind == "denoise"]
        num_masked += sum(max(b - a, 0) for a, b in zip(counts, counts[1:], strict=False))
    expected = num_seeds * 2 * 4 * 0.1
    assert abs(num_masked - expected) < 4 * math.sqrt(expected * 0.9)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"revision": "joint_threshold"}, None),
        ({"revision": "joint_threshold", "edit_threshold": 1}, "edit_threshold is 1: no token"),
        ({"revision": "joint_threshold", "threshold": 0}, None),
        ({"revision": "joint_threshold", "steps": 7}, "policy 'steps' has steps 7"),
        ({"revision": "ar_doubt"}, None),
        ({"revision": "ar_doubt", "threshold": 0}, None),
        ({"revision": "ar_doubt", "doubt": 0}, "doubt is 0: no token is ever reopened"),
        ({"revision": "remdm", "steps": 3}, None),
        ({"revision": "remdm", "steps": 3, "remask_rate": 0}, "remask_rate is 0: no token"),
        ({"revision": "remdm", "steps": 2}, "steps is 2: no token is ever masked anew"),
        ({"revision": "remdm", "steps": 2, "remask_schedule": "loop"}, None),
        ({"revision": "remdm", "steps": 1, "remask_schedule": "loop"}, "steps is 1: no token"),
        ({"policy": "ar_weighted"}, None),
        ({"policy": "ar_weighted", "threshold": 1}, "threshold is 1, which a probability"),
        ({"policy": "ar_weighted", "steps": 7}, "policy 'ar_weighted' has steps 7 for the 7"),
    ],
)
def test_degenerate_settings_have_a_reason(options: dict[str, Any], reason: str | None) -> None:
    """Prevents: a revision that cannot change anything left without a word."""
    found = degenerate_reason(params_of(**options))
    assert (found is None) == (reason is None)
    assert found is None or (reason is not None and found.startswith(reason))
