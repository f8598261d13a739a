"""Grammars: the text is of the grammar, and speculation writes AR's; all tiny runs in float64."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import trimode
from tests.conftest import EOS, MASK, NUM_TOKENS
from trimode.decoding import GenerationParams
from trimode.decoding.bits import unpacked
from trimode.decoding.control import Control
from trimode.decoding.grammar import Grammars, Matcher
from trimode.errors import RequestError
from trimode.runtime import Generation, TriModeLM

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,6}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["ab", "ac", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
REGEX = r"(ab|a[cd]{0,3}|xyz){2,4}-[0-9]{1,3}"
LARK = 'start: "(" inner ")"\ninner: /[a-c]/ | start start?\n'
SOURCES: list[dict[str, Any]] = [{"json_schema": SCHEMA}, {"regex": REGEX}, {"grammar": LARK}]
SPECULATION: list[dict[str, Any]] = [
    {"mode": "linear", "block_length": 6},
    {"mode": "linear", "block_length": 4, "threshold": 0.3},
    {"mode": "branching", "block_length": 4, "branches": 5},
    {"mode": "quadratic", "block_length": 3},
    {"mode": "linear", "skip_masks": 3, "lookup": True},
    {"mode": "branching", "skip_masks": 2, "branches": 4, "block_length": 4},
]
PROMPTS = ["ab", "x = ", "{"]
SEEDS = [0, 1, 2**63]


@pytest.fixture(scope="module")
def lm(
    tiny_model: Callable[..., Any], byte_tokenizer: Any, random_adapter: Callable[..., Any]
) -> TriModeLM:
    model = tiny_model(torch.float64, initializer_range=0.2)
    return TriModeLM(model, byte_tokenizer, adapter=random_adapter(model, strength=2.0))


def generate(lm: TriModeLM, prompts: Any = PROMPTS, **options: Any) -> list[Generation]:
    found = lm.generate(prompts, **({"max_new_tokens": 48, "seed": SEEDS} | options))
    return found if isinstance(found, list) else [found]


def is_of(source: dict[str, Any], text: str) -> bool:
    """Checked by other code than the library's."""
    if "regex" in source:
        return re.fullmatch(source["regex"], text) is not None
    if "grammar" in source:
        inner = re.sub(r"\([a-c]\)", "o", text)
        while (shorter := re.sub(r"\(oo?\)", "o", inner)) != inner:
            inner = shorter
        return inner == "o"
    value = json.loads(text)
    return (
        set(value) == {"name", "age", "tags"}
        and re.fullmatch("[a-z]{1,6}", value["name"]) is not None
        and value["age"] in range(1000)
        and len(value["tags"]) <= 3
        and set(value["tags"]) <= {"ab", "ac", "b"}
    )


def test_a_draft_into_a_dead_end_ends_nothing(lm: TriModeLM) -> None:
    """Prevents: a draft after which no token can follow aborting a text that never goes there."""
    grammar = 'start: "a" "a" ("c" | "b" <|mask|>) ("d" | "e" <|mask|>)'
    law: dict[str, Any] = {"grammar": grammar, "temperature": 1.5, "max_new_tokens": 8}
    reasons = set()
    for seed in range(10):
        expected = generate(lm, "q", mode="ar", seed=seed, **law)[0]
        reasons.add(expected.finish_reason)
        for options in SPECULATION:
            found = generate(lm, "q", seed=seed, **law, **options)[0]
            assert found.token_ids == expected.token_ids
            assert found.finish_reason == expected.finish_reason
    assert reasons == {"stop", "abort"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: next(iter(source)))
@pytest.mark.parametrize("law", [{"temperature": 0.0}, {"temperature": 1.3, "top_k": 3}], ids=str)
def test_speculation_writes_what_ar_writes(
    lm: TriModeLM, source: dict[str, Any], law: dict[str, Any]
) -> None:
    """Prevents: a verifier masked for another prefix than AR's, a matcher that rejected drafts
    leave behind."""
    expected = generate(lm, mode="ar", **source, **law)
    for options in SPECULATION:
        found = generate(lm, **options, **source, **law)
        assert [g.token_ids for g in found] == [g.token_ids for g in expected], options
        assert [g.finish_reason for g in found] == [g.finish_reason for g in expected]
    finished = [g for g in expected if g.finish_reason == "stop"]
    assert all(is_of(source, g.text) and g.token_ids[-1] == EOS for g in finished)
    assert finished or "grammar" in source


def test_every_acceptance_length_happens(lm: TriModeLM) -> None:
    """Prevents: a rollback that only ever went back all the way, or not at all."""
    alone = TriModeLM(lm.model, lm.tokenizer)
    options: dict[str, Any] = {"temperature": 1.0, "seed": list(range(16)), "max_new_tokens": 20}
    source = {"regex": "[ab]{0,30}c?"}
    expected = generate(alone, ["ab"] * 16, mode="ar", **options, **source)
    found = generate(alone, ["ab"] * 16, mode="linear", block_length=4, **options, **source)
    assert [g.token_ids for g in found] == [g.token_ids for g in expected]
    lengths = {n for generation in found for n in generation.stats.acceptance_lengths}
    assert lengths >= {1, 2}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: next(iter(source)))
def test_a_matcher_goes_anywhere(lm: TriModeLM, source: dict[str, Any]) -> None:
    """Prevents: a way back that ends elsewhere than the way there. The slow twin starts anew."""
    control = Control.of(source)
    assert control.source is not None

    def fresh() -> Matcher:
        made = Grammars(lm.tokenizer, num_tokens=NUM_TOKENS)
        return made.matcher(control.source, eos_token_ids=[EOS])

    draw, matcher, text = random.Random(0), fresh(), list[int]()
    for _ in range(120):
        allowed = matcher.allowed_after(text)
        slow = fresh().allowed_after(text)
        assert allowed is not None
        assert slow is not None
        assert allowed.tolist() == slow.tolist()
        ids = unpacked(allowed, NUM_TOKENS).nonzero()[:, 0].tolist()
        assert ids
        wrong = [*text, draw.choice(ids), draw.randrange(256), draw.randrange(256), EOS]
        found, expected = matcher.allowed_after(wrong), fresh().allowed_after(wrong)
        assert found is None
        assert expected is None
        token_id = draw.choice(ids)
        text = text[: draw.randrange(len(text) + 1)] if token_id == EOS else [*text, token_id]
    assert matcher.allowed_after([]) is not None


def test_modes_switched_at_any_round_write_what_ar_writes(lm: TriModeLM) -> None:
    """Prevents: a matcher that only the mode it was made in keeps up to date."""
    params = GenerationParams(
        mode="ar",
        max_new_tokens=40,
        block_length=4,
        seed=3,
        temperature=1.0,
        control=Control.of({"json_schema": SCHEMA}),
    )

    def written(modes: tuple[str, ...], period: int) -> list[int]:
        seq = lm.sequence("ab", params)
        engine, step = lm.engine([seq]), 0
        while not engine.is_idle:
            seq.mode = modes[step // period % len(modes)]
            engine.step()
            step += 1
        return seq.new_ids

    expected = written(("ar",), 1)
    for period in (1, 2, 3):
        assert written(("ar", "linear", "branching", "quadratic"), period) == expected


def test_a_row_of_a_mixed_batch_has_its_own_matcher(lm: TriModeLM) -> None:
    """Prevents: one text's grammar applied to another, or its progress."""
    wanted: list[dict[str, Any]] = [*SOURCES, {}, SOURCES[1]]
    modes = ["linear", "ar", "branching", "diffusion", "quadratic"]

    def sequences() -> list[Any]:
        return [
            lm.sequence(
                PROMPTS[i % 3],
                GenerationParams(
                    mode=mode,
                    max_new_tokens=20,
                    block_length=4,
                    seed=i,
                    temperature=0.5 * (i % 2),
                    control=Control.of(source),
                ),
            )
            for i, (mode, source) in enumerate(zip(modes, wanted, strict=True))
        ]

    expected = sequences()
    for seq in expected:
        engine = lm.engine([seq])
        while not engine.is_idle:
            engine.step()
    together = sequences()
    engine = lm.engine(together)
    while not engine.is_idle:
        engine.step()
    assert [seq.new_ids for seq in together] == [seq.new_ids for seq in expected]


def test_a_finished_text_allows_only_eos(lm: TriModeLM) -> None:
    """Prevents: a text that goes on behind its end, or that ends too early."""
    for mode in ("ar", "linear"):
        [found] = generate(lm, "ab", regex="abc", mode=mode, seed=0)
        assert (found.text, found.finish_reason) == ("abc", "stop")
        assert found.token_ids == [*b"abc", EOS]
        [short] = generate(lm, "ab", regex="abc", mode=mode, seed=0, max_new_tokens=2)
        assert (short.text, short.finish_reason) == ("ab", "length")


def test_a_prompt_may_hold_the_mask_token(lm: TriModeLM) -> None:
    """Prevents: a first token that is free because the prompt looks unfinished."""
    for mode in ("ar", "linear"):
        [found] = generate(lm, [MASK, 97, MASK], regex="abc", mode=mode, seed=0)
        assert found.text == "abc"


def test_special_stop_tokens_end_a_text_too(tiny_model: Callable[..., Any], lm: TriModeLM) -> None:
    """Prevents: an assistant's turn whose end the grammar bans; a `}` that ends texts because it is
    a stop token."""
    assert lm.tokenizer is not None
    bos = lm.tokenizer.convert_tokens_to_ids("<|bos|>")
    bias = {EOS: -100.0}
    [found] = generate(lm, "a", regex="a}b", stop_token_ids=[bos], logit_bias=bias, seed=0)
    assert (found.token_ids, found.finish_reason) == ([*b"a}b", bos], "stop")
    [found] = generate(lm, "a", regex="a}b", stop_token_ids=[ord("}")], seed=0)
    assert (found.token_ids, found.finish_reason) == ([*b"a}"], "stop")


def test_bias_and_logprobs_go_with_a_grammar(lm: TriModeLM) -> None:
    """Prevents: log-probabilities of the masked law, and a bias that brings back what it bans."""
    options: dict[str, Any] = {"regex": "[ab]{6}", "logit_bias": {ord("z"): 100.0}, "logprobs": 2}
    expected = generate(lm, mode="ar", **options)
    found = generate(lm, mode="branching", block_length=4, **options)
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert set(one.text) <= {"a", "b"}
        assert one.logprobs is not None
        assert other.logprobs is not None
        for left, right in zip(one.logprobs, other.logprobs, strict=True):
            assert left.logprob == pytest.approx(right.logprob, abs=1e-9)
            assert [i for i, _ in left.top] == [i for i, _ in right.top]
    assert all(one.logprob < -0.5 for one in expected[0].logprobs or [])


def test_a_verifier_without_the_grammar_is_caught(
    lm: TriModeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: these tests passing whatever a matcher says behind the first draft."""
    options: dict[str, Any] = {"regex": REGEX, "temperature": 1.0}
    alone = TriModeLM(lm.model, lm.tokenizer)
    expected = [g.token_ids for g in generate(alone, mode="ar", **options)]
    real = Matcher._go_to
    monkeypatch.setattr(Matcher, "_go_to", lambda self, ids: real(self, ids) and len(ids) % 4 != 3)
    found = [g.token_ids for g in generate(alone, mode="linear", block_length=4, **options)]
    assert found != expected


@pytest.mark.parametrize("mode", ["ar", "linear", "branching"])
def test_the_default_model_writes_json(mode: str) -> None:
    """Prevents: a grammar that only works with one token a byte."""
    lm = trimode.load("pocket")
    for seed in (0, 1):
        options: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_new_tokens": 96}
        found = lm.generate("config = ", mode=mode, json_schema=SCHEMA, **options)
        assert isinstance(found, Generation)
        assert found.finish_reason == "stop"
        assert is_of({"json_schema": SCHEMA}, found.text)
        found = lm.generate("# key: ", mode=mode, regex=REGEX, **options)
        assert isinstance(found, Generation)
        assert is_of({"regex": REGEX}, found.text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "a("}, "regex is not valid: at 1(8): invalid regex "),
        ({"grammar": "start: foo"}, "grammar is not valid: at 1(8): unknown name"),
        ({"json_schema": "{"}, "json_schema is not JSON: Expecting property name"),
        ({"json_schema": "[1]"}, "json_schema is '[1]'; allowed: an object, true or false"),
        ({"json_schema": "[\n1\n]"}, r"json_schema is '[\n1\n]'; allowed: an object"),
        ({"json_schema": {"type": "objec"}}, "json_schema is not valid: Invalid type: objec"),
        ({"json_schema": {"not": {}}}, 'json_schema is not valid: Unimplemented keys: ["not"]'),
    ],
)
def test_a_wrong_grammar_is_one_clear_error(
    lm: TriModeLM, options: dict[str, Any], message: str
) -> None:
    """Prevents: an error on the way, or a constraint that is dropped."""
    with pytest.raises(RequestError) as caught:
        generate(lm, **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_without_the_extra(lm: TriModeLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a traceback where a package is not installed."""
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError) as caught:
        generate(lm, regex="a")
    assert str(caught.value).endswith("not installed; pip install 'trimode[grammar]'")


def test_a_model_without_eos(tiny_model: Callable[..., Any], byte_tokenizer: Any) -> None:
    """Prevents: a finished text that nothing may follow."""
    lm = TriModeLM(tiny_model(torch.float64, eos_token_id=None), byte_tokenizer)
    with pytest.raises(RequestError, match="regex needs an EOS token to end the text"):
        generate(lm, regex="a")


def test_a_grammar_that_the_vocabulary_cannot_write(
    tiny_model: Callable[..., Any], byte_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents: a banned token chosen because nothing else is left; others ended with it."""
    lm = TriModeLM(tiny_model(torch.float64), byte_tokenizer)
    options: dict[str, Any] = {"mode": "ar", "max_new_tokens": 6, "block_length": 4, "seed": 0}
    stuck = GenerationParams(**options, control=Control(grammar="start: <|mask|>"))
    fine = GenerationParams(**options, control=Control(regex="abcdefgh"))
    sequences = [lm.sequence("a", stuck), lm.sequence("a", fine)]
    engine = lm.engine(sequences)
    while not engine.is_idle:
        engine.step()
    assert [seq.finish_reason for seq in sequences] == ["abort", "length"]
    assert sequences[1].new_ids == [*b"abcdef"]
    assert "what was asked for leaves no token" in caplog.text


def test_a_grammar_of_another_kind_is_named(lm: TriModeLM) -> None:
    """Prevents: a GBNF grammar whose error does not say that Lark is wanted."""
    with pytest.raises(RequestError, match="allowed: Lark.*looks like GBNF"):
        lm.generate("x", grammar='root ::= "yes" | "no"')
