"""What single tokens are subject to: the same law in AR, in the verifier and in the slow twin.

All in float64, where rounding cannot move a choice.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from tests.reference import next_logits
from trimode.decoding import GenerationParams, Sequence
from trimode.decoding import law as law_module
from trimode.decoding.bits import packed
from trimode.decoding.control import CONTROL_NAMES, Control
from trimode.decoding.noise import gumbel, noise_key
from trimode.errors import RequestError
from trimode.model import TriModeModel
from trimode.runtime import Generation, TriModeLM

SMALL = {"vocab_size": 12, "mask_token_id": 11, "eos_token_id": 10, "bos_token_id": 9}
END = 8
PROMPTS = [[1, 2, 3], [4], [5, END, 7, 8, 1, 2, 0, 3, 3], [9, 2, 2, 7, 1]]
SEEDS = [0, 1, 2**63, 77]
CONTROLS: list[dict[str, Any]] = [
    {"logit_bias": {2: 1.5, 5: -3.0, 7: -100}},
    {"repetition_penalty": 1.6},
    {"repetition_penalty": 0.6},
    {"frequency_penalty": 1.3},
    {"presence_penalty": 1.7},
    {"frequency_penalty": -0.8, "presence_penalty": 2.0, "repetition_penalty": 1.2},
    {"max_thinking_tokens": 5, "end_think_token_id": END},
    {
        "logit_bias": {1: 1.0, END: -2.0},
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.4,
        "max_thinking_tokens": 9,
        "end_think_token_id": END,
    },
]
LAWS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 7, "top_p": 0.95},
]
SPECULATION: list[dict[str, Any]] = [
    {"mode": "linear", "block_length": 8},
    {"mode": "linear", "block_length": 5, "threshold": 0.3},
    {"mode": "branching", "block_length": 4, "branches": 5},
    {"mode": "quadratic", "block_length": 4},
    {"mode": "linear", "skip_masks": 4},
    {"mode": "branching", "skip_masks": 3, "branches": 5, "block_length": 5, "lookup": True},
]


@pytest.fixture(scope="module")
def alone(tiny_model: Callable[..., Any]) -> TriModeLM:
    """Drafts with the network itself; its flat law lets the noise decide, so drafts run long."""
    return TriModeLM(tiny_model(torch.float64, initializer_range=0.2, **SMALL), None)


@pytest.fixture(scope="module")
def adapted(alone: TriModeLM, random_adapter: Callable[..., Any]) -> TriModeLM:
    """Drafts with an adapter that disagrees."""
    adapter = random_adapter(alone.model, strength=3.0)
    return TriModeLM(alone.model, None, adapter=adapter)


def generate(lm: TriModeLM, prompts: Any = PROMPTS, **options: Any) -> list[Generation]:
    defaults: dict[str, Any] = {"max_new_tokens": 16, "seed": SEEDS, "ignore_eos": True}
    found = lm.generate(prompts, **(defaults | options))
    return found if isinstance(found, list) else [found]


def texts(generations: list[Generation]) -> list[list[int]]:
    return [generation.token_ids for generation in generations]


def slow_scores(
    logits: list[float], text: list[int], control: dict[str, Any], *, num_prompt: int
) -> list[float]:
    """Bias, then penalties, one token at a time."""
    scores = list(logits)
    for token_id, value in control.get("logit_bias", {}).items():
        scores[token_id] += value
    penalty = control.get("repetition_penalty", 1)
    for token_id in set(text):
        if scores[token_id] > 0:
            scores[token_id] /= penalty
        else:
            scores[token_id] *= penalty
    for token_id in text[num_prompt:]:
        scores[token_id] -= control.get("frequency_penalty", 0)
    for token_id in set(text[num_prompt:]):
        scores[token_id] -= control.get("presence_penalty", 0)
    return scores


def slow_next(
    model: TriModeModel,
    prompt: list[int],
    new: list[int],
    control: dict[str, Any],
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> int:
    """The AR token after a text."""
    budget = control.get("max_thinking_tokens", math.inf)
    if len(new) >= budget and END not in new:
        return END
    text = [*prompt, *new]
    logits = next_logits(model, text)[-1].tolist()
    scores = slow_scores(logits, text, control, num_prompt=len(prompt))
    if temperature:
        noise = gumbel(torch.tensor([noise_key(seed, len(text))]), len(scores))[0].tolist()
        scores = [score / temperature + noise[i] for i, score in enumerate(scores)]
    return max(range(len(scores)), key=lambda i: scores[i])


def slow_ar(
    model: TriModeModel, prompt: list[int], control: dict[str, Any], **law: Any
) -> list[int]:
    new: list[int] = []
    for _ in range(16):
        new.append(slow_next(model, prompt, new, control, **law))
    return new


def slow_diffusion(
    model: TriModeModel, prompt: list[int], control: dict[str, Any], *, block_length: int
) -> list[int]:
    """Greedy, threshold 0.5. Tokens that count as repeated: before the block, or revealed in it."""
    new: list[int] = []
    budget = control.get("max_thinking_tokens", math.inf)
    while len(new) < 16:
        canvas: list[int | None] = [slow_next(model, prompt, new, control)]
        canvas += [None] * (block_length - 1)
        is_ending = END not in [*new, canvas[0]] and budget - len(new) in range(1, block_length)
        if is_ending:
            canvas[int(budget) - len(new)] = END
        while None in canvas:
            block = [SMALL["mask_token_id"] if i is None else i for i in canvas]
            found = {}
            rows = next_logits(model, [*prompt, *new], block)[-block_length:].tolist()
            for place in (place for place, token_id in enumerate(canvas) if token_id is None):
                text = [*prompt, *new, *(i for i in canvas if i is not None)]
                scores = slow_scores(rows[place], text, control, num_prompt=len(prompt))
                if is_ending and place < budget - len(new):
                    scores[END] = -math.inf
                token_id = max(range(len(scores)), key=lambda i: scores[i])
                total = sum(math.exp(x) for x in rows[place])
                found[place] = (math.exp(rows[place][token_id]) / total, token_id)
            surest = max(found, key=lambda place: found[place][0])
            for place, (confidence, token_id) in found.items():
                if place == surest or confidence >= 0.5:
                    canvas[place] = token_id
        new += [i for i in canvas if i is not None]
    return new[:16]


@pytest.mark.parametrize("control", CONTROLS, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_ar_is_its_slow_twin(alone: TriModeLM, control: dict[str, Any], temperature: float) -> None:
    """Prevents: bias after the penalty, a penalty of the wrong tokens, a budget off by one."""
    found = texts(generate(alone, mode="ar", temperature=temperature, **control))
    for prompt, seed, new_ids in zip(PROMPTS, SEEDS, found, strict=True):
        law = {"temperature": temperature, "seed": seed}
        assert new_ids == slow_ar(alone.model, prompt, control, **law)
    assert found != texts(generate(alone, mode="ar", temperature=temperature))


@pytest.mark.parametrize("control", CONTROLS, ids=str)
@pytest.mark.parametrize("block_length", [3, 8])
def test_diffusion_is_its_slow_twin(
    alone: TriModeLM, control: dict[str, Any], block_length: int
) -> None:
    """Prevents: laws that forget what is revealed, and an end of thought a block late."""
    options = {"mode": "diffusion", "block_length": block_length, "threshold": 0.5}
    for prompt in PROMPTS[1:3]:
        [found] = generate(alone, prompt, seed=0, **options, **control)
        expected = slow_diffusion(alone.model, prompt, control, block_length=block_length)
        assert found.token_ids == expected


@pytest.mark.parametrize("control", CONTROLS, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_speculation_writes_what_ar_writes(
    alone: TriModeLM, adapted: TriModeLM, control: dict[str, Any], law: dict[str, Any]
) -> None:
    """Prevents: a verifier whose law is of another prefix than the one that AR has there."""
    expected = texts(generate(alone, mode="ar", **law, **control))
    for options in SPECULATION:
        for lm in (alone, adapted) if options is SPECULATION[0] else (adapted,):
            assert texts(generate(lm, **options, **law, **control)) == expected, options


@pytest.mark.parametrize("control", [CONTROLS[i] for i in (1, 3, 5, 6)], ids=str)
def test_every_acceptance_length_happens(alone: TriModeLM, control: dict[str, Any]) -> None:
    """Prevents: an exactness that only ever saw drafts wholly wrong or wholly right."""
    prompts, seeds = PROMPTS * 6, list(range(24))
    options = {"temperature": 1.0, "seed": seeds, "max_new_tokens": 24, **control}
    found = generate(alone, prompts, mode="linear", block_length=4, **options)
    assert texts(found) == texts(generate(alone, prompts, mode="ar", **options))
    lengths = {n for generation in found for n in generation.stats.acceptance_lengths}
    assert lengths == {1, 2, 3, 4}


def _mixed(lm: TriModeLM) -> list[Sequence]:
    modes = ["ar", "linear", "diffusion", "branching", "quadratic", "linear"]
    controls = [CONTROLS[0], CONTROLS[5], CONTROLS[-1], {}, CONTROLS[-2], {"logprobs": 2}]
    return [
        lm.sequence(
            PROMPTS[i % 4],
            GenerationParams(
                mode=mode,
                max_new_tokens=9 + i,
                block_length=3 + i % 3,
                seed=i,
                temperature=0.4 * (i % 3),
                ignore_eos=True,
                control=Control(**control),
            ),
        )
        for i, (mode, control) in enumerate(zip(modes, controls, strict=True))
    ]


def run(lm: TriModeLM, sequences: list[Sequence]) -> None:
    engine = lm.engine(sequences)
    while not engine.is_idle:
        engine.step()


def test_a_row_of_a_mixed_batch_has_its_own_law(adapted: TriModeLM) -> None:
    """Prevents: one request's bias, penalty or budget reaching another, or none."""
    expected = _mixed(adapted)
    for seq in expected:
        run(adapted, [seq])
    together = _mixed(adapted)
    run(adapted, together)
    assert [seq.new_ids for seq in together] == [seq.new_ids for seq in expected]
    assert [len(seq.logprobs) for seq in together] == [0, 0, 0, 0, 0, len(together[5].new_ids)]


@pytest.mark.parametrize("control", [*CONTROLS, {"logprobs": 1}], ids=str)
def test_modes_switched_at_any_round_write_what_ar_writes(
    adapted: TriModeLM, control: dict[str, Any]
) -> None:
    """Prevents: a law that remembers drafts which another mode rejected."""
    options: dict[str, Any] = {"max_new_tokens": 40, "block_length": 4, "ignore_eos": True}
    params = GenerationParams(
        mode="ar", seed=3, temperature=1.0, control=Control(**control), **options
    )
    expected = adapted.sequence(PROMPTS[0], params)
    run(adapted, [expected])
    for period in (1, 2, 3, 5):
        seq = adapted.sequence(PROMPTS[0], params)
        engine = adapted.engine([seq])
        step = 0
        while not engine.is_idle:
            seq.mode = ("ar", "linear", "branching", "quadratic")[step // period % 4]
            engine.step()
            step += 1
        assert seq.new_ids == expected.new_ids
        for found, one in zip(seq.logprobs, expected.logprobs, strict=True):
            assert found.logprob == pytest.approx(one.logprob, abs=1e-9)


def test_a_mode_that_cannot_is_not_switched_to(alone: TriModeLM) -> None:
    """Prevents: a request for log-probabilities that ends in a mode which has none."""
    params = GenerationParams(
        mode="ar", max_new_tokens=4, block_length=4, seed=0, control=Control(logprobs=0)
    )
    seq = alone.sequence(PROMPTS[0], params)
    with pytest.raises(RequestError, match="logprobs is 0; allowed: None in mode 'diffusion'"):
        seq.mode = "diffusion"
    assert seq.mode == "ar"


@pytest.mark.parametrize(
    ("name", "replacement"),
    [
        # What a drafted position would see if its law were made before the round.
        ("_beyond", lambda real: lambda seq, place: real(seq, place)[:1]),
        ("_places", lambda real: lambda seq, step: [_blind(place) for place in real(seq, step)]),
        # Membership in place of numbers, and numbers of what stands before the round alone.
        ("RowLaw", lambda real: lambda *law: real(*law[:6], [*{*law[6]}], *law[7:])),
        ("RowLaw", lambda real: lambda *law: real(*law[:6], (), *law[7:])),
    ],
    ids=[
        *("budget blind to drafts", "penalty blind to drafts"),
        *("drafts counted once", "drafts not counted"),
    ],
)
def test_a_law_blind_to_the_drafts_is_caught(
    alone: TriModeLM, monkeypatch: pytest.MonkeyPatch, name: str, replacement: Any
) -> None:
    """Prevents: these tests passing whatever the verifier's law is."""
    control = {"repetition_penalty": 1.6, "max_thinking_tokens": 12, "end_think_token_id": END}
    if name == "RowLaw":
        control = {"frequency_penalty": -0.7}  # so that tokens come often
    # The token at the budget is forced, so a law that misses an end among the drafts shows.
    options = {"temperature": 1.0, "seed": list(range(24)), "max_new_tokens": 20, **control}
    prompts = PROMPTS * 6
    expected = texts(generate(alone, prompts, mode="ar", **options))
    monkeypatch.setattr(law_module, name, replacement(getattr(law_module, name)))
    assert texts(generate(alone, prompts, mode="linear", block_length=8, **options)) != expected


def _blind(place: Any) -> Any:
    kept = place.before[:1] if place.index > 0 else place.before
    return law_module._Place(place.index, place.is_trunk, kept, True, [], place.last_index)


@pytest.mark.parametrize("mode", ["ar", "linear", "branching", "quadratic"])
@pytest.mark.parametrize("control", [{}, CONTROLS[-1]], ids=str)
def test_logprobs_are_of_the_plain_ar_view(
    adapted: TriModeLM, mode: str, control: dict[str, Any]
) -> None:
    """Prevents: the drafter's numbers, numbers after filters or bias, or of a neighbour."""
    law = {"temperature": 0.9, "top_k": 3, "logprobs": 4, "max_new_tokens": 11}
    for generation in generate(adapted, PROMPTS[:2], seed=5, mode=mode, **law, **control):
        assert generation.logprobs is not None
        for i, (token_id, found) in enumerate(
            zip(generation.token_ids, generation.logprobs, strict=True)
        ):
            text = [*generation.prompt_ids, *generation.token_ids[:i]]
            logits = next_logits(adapted.model, text)[-1]
            total = math.log(sum(math.exp(x) for x in logits.tolist()))
            assert found.logprob == pytest.approx(float(logits[token_id]) - total, abs=1e-9)
            ranked = sorted(range(12), key=lambda one: -float(logits[one]))[:4]
            assert [one for one, _ in found.top] == ranked
            expected = [float(logits[one]) - total for one in ranked]
            assert [logprob for _, logprob in found.top] == pytest.approx(expected, abs=1e-9)


def test_logprobs_of_no_alternatives_and_none(adapted: TriModeLM) -> None:
    """Prevents: 0 taken for not asked, and lists of another request's length in one batch."""
    [found] = generate(adapted, PROMPTS[0], seed=0, logprobs=0, temperature=0.0)
    assert found.logprobs is not None
    assert len(found.logprobs) == len(found.token_ids)
    assert all(one.top == () for one in found.logprobs)
    [plain] = generate(adapted, PROMPTS[0], seed=0, temperature=0.0)
    assert (plain.logprobs, plain.token_ids) == (None, found.token_ids)


@pytest.mark.parametrize("mode", ["ar", "linear", "branching", "quadratic", "diffusion"])
@pytest.mark.parametrize("budget", [0, 3, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_thought_ends_at_its_budget(
    adapted: TriModeLM, mode: str, budget: int, temperature: float
) -> None:
    """Prevents: an end of thought that is late, forced again, or missing from the text."""
    lengths = {} if mode == "ar" else {"block_length": 4}
    control = {"max_thinking_tokens": budget, "end_think_token_id": END}
    bias = {"logit_bias": {END: -50.0}}  # so that it comes by force, and once
    options: dict[str, Any] = {"mode": mode, "temperature": temperature, **lengths}
    for generation in generate(adapted, **options, **control, **bias):
        assert [i for i, token_id in enumerate(generation.token_ids) if token_id == END] == [budget]
        assert len(generation.token_ids) == 16
    for generation in generate(adapted, **options, **control):
        assert END in generation.token_ids[: budget + 1]
    early = {"logit_bias": {END: 50.0}}
    ends = {generation.token_ids.index(END) for generation in generate(adapted, **options, **early)}
    found = generate(adapted, **options, **control, **early)
    if mode != "diffusion":  # whose last block before the budget holds the end at its place
        assert {generation.token_ids.index(END) for generation in found} == ends == {0}


@pytest.mark.parametrize(
    "revision",
    [
        {"revision": "joint_threshold", "edit_threshold": 0.1},
        {"revision": "ar_doubt", "doubt": 0.5},
        {"revision": "remdm", "steps": 5},
        {"policy": "ar_weighted"},
    ],
    ids=str,
)
def test_no_revision_moves_the_end_of_a_thought(
    adapted: TriModeLM, revision: dict[str, Any]
) -> None:
    """Prevents: a forced token replaced or masked anew, or a second one before it."""
    control = {"max_thinking_tokens": 5, "end_think_token_id": END, "logit_bias": {END: -50.0}}
    options: dict[str, Any] = {"mode": "diffusion", "block_length": 8, "temperature": 1.0}
    for generation in generate(adapted, **options, **control, **revision):
        assert [i for i, token_id in enumerate(generation.token_ids) if token_id == END] == [5]


@pytest.mark.parametrize("mode", ["linear", "diffusion"])
def test_the_forced_end_is_in_the_cache(adapted: TriModeLM, mode: str) -> None:
    """Prevents: a token that is shown but not fed, so that what follows does not know of it."""
    control = {"max_thinking_tokens": 4, "end_think_token_id": END, "logit_bias": {END: -50.0}}
    options: dict[str, Any] = {"mode": mode, "block_length": 4, "seed": 0, "temperature": 0.0}
    [whole] = generate(adapted, PROMPTS[0], max_new_tokens=20, **options, **control)
    start = PROMPTS[0] + whole.token_ids[:8]
    bias = {"logit_bias": {END: -50.0}}
    [rest] = generate(adapted, start, max_new_tokens=12, **options, **bias)
    assert whole.token_ids[8:] == rest.token_ids


def test_without_control_nothing_is_made(
    adapted: TriModeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: a cost for requests that ask for none of it."""
    params = GenerationParams(mode="ar", max_new_tokens=4, block_length=4, seed=0)
    assert adapted.sequence([1], params).rules is None

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(law_module.Rules, "rows", fail)
    monkeypatch.setattr("trimode.decoding.choose.under", fail)
    generate(adapted, mode="linear", logprobs=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_bias": [1]}, "logit_bias is [1]; allowed: None, or token ids"),
        ({"logit_bias": {"1": 1}}, "logit_bias is {'1': 1}; allowed: token ids"),
        ({"logit_bias": {-1: 1}}, "logit_bias is {-1: 1}; allowed: token ids"),
        ({"logit_bias": {1: math.inf}}, "logit_bias is {1: inf}; allowed: -100000 to 100000"),
        ({"logit_bias": {1: math.nan}}, "logit_bias is {1: nan}; allowed: -100000 to 100000"),
        ({"logit_bias": {1: True}}, "logit_bias is {1: True}; allowed: "),
        (
            {"logit_bias": {12: 1}},
            "a token of logit_bias is 12; allowed: 0 to 11 without the mask token",
        ),
        (
            {"logit_bias": {11: 1}},
            "a token of logit_bias is 11; allowed: 0 to 11 without the mask token",
        ),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; allowed: 0.01 to 100"),
        ({"repetition_penalty": math.nan}, "repetition_penalty is nan; allowed: 0.01 to 100"),
        ({"repetition_penalty": None}, "repetition_penalty is None; allowed: 0.01 to 100"),
        ({"frequency_penalty": 2.1}, "frequency_penalty is 2.1; allowed: -2 to 2"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan; allowed: -2 to 2"),
        ({"presence_penalty": -3}, "presence_penalty is -3; allowed: -2 to 2"),
        ({"presence_penalty": True}, "presence_penalty is True; allowed: -2 to 2"),
        ({"presence_penalty": None}, "presence_penalty is None; allowed: -2 to 2"),
        ({"logprobs": -1}, "logprobs is -1; allowed: None, or an integer of at least 0"),
        ({"logprobs": True}, "logprobs is True; allowed: None, or an integer of at least 0"),
        ({"logprobs": 12}, "logprobs is 12; allowed: 0 to 11, the tokens that can be chosen"),
        ({"logprobs": 1, "mode": "diffusion"}, "logprobs is 1; allowed: None in mode 'diffusion'"),
        ({"max_thinking_tokens": -1}, "max_thinking_tokens is -1; allowed: None, or an integer"),
        ({"max_thinking_tokens": 3}, "end_think_token_id is None; give an id, since no single"),
        ({"end_think_token_id": 3}, "end_think_token_id is 3; allowed: None without a budget"),
        (
            {"max_thinking_tokens": 3, "end_think_token_id": 11},
            "end_think_token_id is 11; allowed: 0 to 11 without the mask token",
        ),
        ({"regex": ""}, "regex is ''; allowed: None, or a non-empty string"),
        ({"grammar": 3}, "grammar is 3; allowed: None, or a non-empty string"),
        ({"json_schema": [1]}, "json_schema is [1]; allowed: None, a JSON schema as text"),
        ({"json_schema": {"a": {1}}}, "json_schema cannot be written as JSON: "),
        ({"regex": "a", "json_schema": {}}, "json_schema and regex are given; allowed: at most"),
        ({"regex": "a", "mode": "diffusion"}, "regex is 'a'; allowed: None in mode 'diffusion'"),
        ({"regex": "a"}, "regex is 'a'; allowed: None with ignore_eos"),
        ({"regex": "a", "ignore_eos": False}, "regex needs a tokenizer, and this checkpoint has"),
        (
            {"regex": "a", "max_thinking_tokens": 2, "end_think_token_id": 3},
            "max_thinking_tokens is 2; allowed: None with regex",
        ),
    ],
)
def test_what_cannot_be_is_one_clear_error(
    alone: TriModeLM, options: dict[str, Any], message: str
) -> None:
    """Prevents: a request that fails deep inside a forward, or is ignored."""
    with pytest.raises(RequestError) as caught:
        generate(alone, **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_padded_rows_cannot_be_asked_for(tiny_model: Callable[..., Any]) -> None:
    """Prevents: a forced token that is banned, which leaves nothing to choose."""
    lm = TriModeLM(tiny_model(torch.float64, num_valid_tokens=8, **SMALL), None)
    with pytest.raises(RequestError, match="end_think_token_id is 8; allowed: "):
        generate(lm, max_thinking_tokens=1, end_think_token_id=8)
    with pytest.raises(RequestError, match="logprobs is 9; allowed: 0 to 8, the tokens"):
        generate(lm, logprobs=9)


def test_the_end_of_thought_is_the_tokenizers(
    tiny_model: Callable[..., Any], byte_tokenizer: Any
) -> None:
    """Prevents: the last byte of `</think>` taken for the whole, as models without thoughts have
    it."""
    model = tiny_model(torch.float64, vocab_size=264)
    with pytest.raises(RequestError, match="no single token of this model is </think>"):
        TriModeLM(model, byte_tokenizer).generate("ab", max_thinking_tokens=2)
    tokenizer = type(byte_tokenizer)(tokenizer_object=byte_tokenizer.backend_tokenizer)
    tokenizer.add_tokens(["</think>"])
    found = TriModeLM(model, tokenizer).generate("ab", max_thinking_tokens=2, max_new_tokens=4)
    assert isinstance(found, Generation)
    assert found.token_ids[2] == tokenizer.convert_tokens_to_ids("</think>")


@pytest.mark.parametrize("method", ["ar_generate", "generate", "linear_spec_generate"])
def test_the_published_methods_have_budgets(hf_model: Callable[..., Any], method: str) -> None:
    """Prevents: the published flaw, a forced token that is fed and not returned, so forced
    again."""
    model = hf_model(torch.float64, **SMALL)
    lengths = {} if method == "ar_generate" else {"block_length": 4}
    prompt = torch.tensor([[1, 2, 3]])
    thinking = {"max_thinking_tokens": 5, "end_think_token_id": END}
    ids, _ = getattr(model, method)(
        prompt, max_new_tokens=12, eos_token_id=(), **lengths, **thinking
    )
    new_ids = ids[0, 3:].tolist()
    assert len(new_ids) == 12
    assert END in new_ids[:6]
    with pytest.raises(RequestError, match="end_think_token_id is None; give an id"):
        getattr(model, method)(prompt, max_thinking_tokens=5)


def test_the_penalty_is_transformers() -> None:
    """Prevents: a penalty that rewards tokens of negative scores."""
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    texts_before = torch.tensor([[1, 2, 2], [0, 0, 0], [11, 3, 4], [5, 6, 7], [8, 9, 10]])
    for penalty in (1.7, 0.4):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(texts_before, logits.clone())
        laws = []
        for ids in texts_before:
            seen = torch.zeros(12, dtype=torch.bool)
            seen[ids] = True
            laws.append(law_module.RowLaw(seen=packed(seen), penalty=penalty))
        assert torch.equal(law_module.under(logits, laws), expected)


def test_names_are_the_arguments_of_generate() -> None:
    """Prevents: an option of `Control` that no caller can give."""
    assert set(CONTROL_NAMES) <= set(inspect.signature(TriModeLM.generate).parameters)


def test_numpy_s_numbers_are_taken_in_a_bias(alone: TriModeLM) -> None:
    """Prevents: ids from an array refused as no integers."""
    plain = generate(alone, mode="linear", logit_bias={3: 4.0})
    found = generate(alone, mode="linear", logit_bias={np.int64(3): np.float32(4.0)})
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
