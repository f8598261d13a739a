"""Token healing: the text goes on where the prompt ended, in every mode alike; and strings are
text."""

from __future__ import annotations

import itertools
import logging
import random
import re
from pathlib import Path
from typing import Any

import pytest

import trimode
from trimode.decoding.bits import unpacked
from trimode.decoding.editing import revise
from trimode.decoding.healing import Healing
from trimode.decoding.token_bytes import TokenBytes
from trimode.engine import Engine
from trimode.engine.engine import cells_needed
from trimode.errors import RequestError
from trimode.heal import healed
from trimode.infill import _edge
from trimode.runtime import Generation, TriModeLM

METHOD = "class A:\n    def __init__(self):\n        self.x = 1\n"
PROMPTS = [
    METHOD,
    "import nu",
    "for i in range(10):\n    pr",
    "x = [\n    1,\n  ",
    "https:",
    "naïve caf",
    "def add(a, b):\n    ret",
    "s = 'é😀",
    "a",
    "",
]
LOSSLESS: list[dict[str, Any]] = [
    {"mode": "linear"},
    {"mode": "branching", "branches": 3},
    {"mode": "linear", "skip_masks": 3, "lookup": True},
    {"mode": "quadratic", "block_length": 4},
    {"mode": "auto"},
]


@pytest.fixture(scope="module")
def lm() -> TriModeLM:
    return trimode.load("pocket")


def one(lm: TriModeLM, prompt: Any, **options: Any) -> Generation:
    found = lm.generate(prompt, **({"max_new_tokens": 16, "seed": 0} | options))
    assert isinstance(found, Generation)
    return found


def joins(lm: TriModeLM, prompt: str, found: Generation) -> bool:
    """Whether kept and chosen tokens say prompt and text."""
    ids = [*found.prompt_ids, *found.token_ids]
    return lm.decode(ids) == prompt + found.text


class TestTable:
    def test_by_beginnings_and_ends(self) -> None:
        """Prevents: a bisection that is off by one at either end."""
        rng = random.Random(0)
        words = {i: bytes(rng.choices([0, 97, 98, 255], k=rng.randint(1, 4))) for i in range(60)}
        tokens = TokenBytes(words)
        for length in range(4):
            for key in map(bytes, itertools.product([0, 97, 98, 255], repeat=length)):
                begins = {i for i, octets in words.items() if octets.startswith(key)}
                assert {*tokens.beginning(key)} == begins
                assert {*tokens.spelling(key)} == {i for i in begins if words[i] == key}
                assert {*tokens.extending(key)} == {i for i in begins if words[i] != key}
                assert {*tokens.ending(key)} == {
                    i for i, octets in words.items() if octets.endswith(key)
                }

    @pytest.mark.parametrize("seed", range(20))
    def test_what_may_come_can_be_paid(self, seed: int) -> None:
        """Prevents: a choice behind which nothing can say the rest. Against all ways there are."""
        rng = random.Random(seed)
        words = {i: bytes(rng.choices(b"ab", k=rng.randint(1, 3))) for i in range(7)}
        taken = rng.choices(range(7), k=2)
        owed = b"".join(words[i] for i in taken)
        healing = Healing(taken, TokenBytes(words), num_tokens=7)

        def ways(paid: bytes) -> bool:
            """Whether some tokens go on from here to the end of what is owed or beyond it."""
            if len(paid) >= len(owed):
                return paid.startswith(owed)
            return owed.startswith(paid) and any(ways(paid + word) for word in words.values())

        for length in range(3):
            for before in itertools.product(range(7), repeat=length):
                said = [b"".join(words[i] for i in before[:n]) for n in range(length + 1)]
                if any(len(part) >= len(owed) or not ways(part) for part in said[:-1]):
                    continue
                if not ways(said[-1]):
                    continue
                bits = healing.allowed_after(before)
                if len(said[-1]) >= len(owed):
                    assert bits is None
                    assert healing.is_over(before)
                    inside = length if len(said[-1]) == len(owed) else length - 1
                    assert healing.num_inside(before) == inside
                    continue
                assert bits is not None
                found = {i for i, is_in in enumerate(unpacked(bits, 7).tolist()) if is_in}
                assert found == {i for i, word in words.items() if ways(said[-1] + word)}
                assert healing.rest(before) == owed[len(said[-1]) :]

    def test_to_the_earliest_boundary(self, lm: TriModeLM) -> None:
        """Prevents: less taken back than may be said otherwise, or more."""
        assert lm.vocabulary is not None
        tokens = lm.vocabulary.token_bytes
        for prompt in PROMPTS:
            ids = lm.encode(prompt)
            found = lm.encode_prompt(prompt)
            assert [*found.token_ids, *found.taken_ids] == ids
            assert found.num_tokens == len(ids)
            assert lm.vocabulary.bytes_of(found.taken_ids) == found.healed_bytes
            assert prompt.encode().endswith(found.healed_bytes)
            boundaries = [
                number
                for number in range(1, len(ids))
                if ids[number] in tokens
                and any(
                    octets != (tail := lm.vocabulary.bytes_of(ids[number:]))
                    and octets.startswith(tail)
                    for octets in tokens._table.values()
                )
            ]
            assert len(found.token_ids) == min(boundaries, default=len(ids))

    def test_whole_characters_only(self, lm: TriModeLM) -> None:
        """Prevents: a grammar that begins in the middle of a character."""
        assert lm.vocabulary is not None
        for prompt in ("x = '😀", "x = 'é", "naïve"):
            ids = lm.encode(prompt)
            found = healed(lm.vocabulary, ids, prompt, at_character=True)
            found.healed_bytes.decode()

    def test_a_tokenizer_of_other_bytes(self, lm: TriModeLM) -> None:
        """Prevents: healing by bytes that the prompt does not have."""
        assert lm.vocabulary is not None
        found = healed(lm.vocabulary, lm.encode("HELLO wor"), "hello wor")
        assert found.healed_bytes == b" wor"
        assert not healed(lm.vocabulary, lm.encode("HELLO"), "hello").taken_ids
        assert healed(lm.vocabulary, lm.encode("HELLO"), "hello").remarks


class TestText:
    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_goes_on_where_the_prompt_ended(self, lm: TriModeLM, prompt: str) -> None:
        """Prevents: text that says again what was typed, or leaves some out."""
        for mode in ("ar", "linear", "branching", "diffusion"):
            for temperature in (0.0, 1.0):
                found = one(lm, prompt, mode=mode, temperature=temperature)
                assert joins(lm, prompt, found)
                assert found.prompt_tokens == len(lm.encode(prompt))
                if found.finish_reason == "length":
                    assert found.stats.new_tokens == 16
                assert found.stats.new_tokens <= len(found.token_ids)
                stream = lm.stream(prompt, mode=mode, seed=0, temperature=temperature,
                                   max_new_tokens=16)  # fmt: skip
                assert "".join(stream) == found.text

    def test_indentation_follows_a_line_break(self, lm: TriModeLM) -> None:
        """Prevents: an empty text where a line break and its indentation are one token."""
        assert one(lm, METHOD).text.startswith("        self.")
        assert one(lm, METHOD, heal=False).text != one(lm, METHOD).text
        assert one(lm, "import nu").text.startswith("mpy")

    @pytest.mark.parametrize("options", LOSSLESS)
    @pytest.mark.parametrize("temperature", [0.0, 0.8])
    def test_modes_agree(self, lm: TriModeLM, options: dict[str, Any], temperature: float) -> None:
        """Prevents: a prelude that some mode knows of."""
        law: dict[str, Any] = {"temperature": temperature, "seed": 7, "max_new_tokens": 12}
        wanted = lm.generate(PROMPTS, mode="ar", **law)
        found = lm.generate(PROMPTS, **options, **law)
        assert [g.token_ids for g in found] == [g.token_ids for g in wanted]
        assert [g.text for g in found] == [g.text for g in wanted]
        alone = [one(lm, prompt, mode="ar", **law) for prompt in PROMPTS]
        assert [g.token_ids for g in alone] == [g.token_ids for g in wanted]

    def test_preempted_and_on_reused_prefixes(self, lm: TriModeLM) -> None:
        """Prevents: tokens chosen anew where rows change hands between rounds, or where a prefix
        is taken from another row. A row is never lost while something is owed."""
        several = ["naïve caf", "def add(a, b):\n    ret"]  # which are said in several tokens
        prompts = [
            METHOD,
            METHOD + "        self.y = 2\n",
            METHOD,
            "import nu",
            METHOD[:-1],
        ] + several
        prompts *= 2
        wanted = [one(lm, prompt, mode="ar", max_new_tokens=10).token_ids for prompt in prompts]
        sequences = [
            lm.prepare(prompt, mode="linear", max_new_tokens=10, seed=0) for prompt in prompts
        ]
        engine = Engine(
            *(lm.model,),
            num_rows=2,
            num_cells=max(map(cells_needed, sequences)),
            token_budget=24,
            time_slice=1,
        )
        for number, seq in enumerate(sequences):
            engine.submit(seq, client=str(number))
        lost = [0] * len(sequences)
        num_before_a_round = 0
        while not engine.is_idle:
            rounds = [seq.stats.num_forwards - seq.stats.forwards["prefill"] for seq in sequences]
            states = [(seq.is_healing, seq.num_inside) for seq in sequences]
            engine.step()
            for number, (seq, (is_healing, num_inside)) in enumerate(
                zip(sequences, states, strict=True)
            ):
                if seq.stats.num_preemptions > lost[number]:
                    lost[number] = seq.stats.num_preemptions
                    assert not is_healing
                    num_before_a_round += bool(num_inside) and not rounds[number]
        assert [seq.new_ids for seq in sequences] == wanted
        assert num_before_a_round  # right behind what was owed, that is fed again
        assert engine.counts.preemptions
        assert engine.counts.reused_tokens

    def test_ids_are_left_alone(self, lm: TriModeLM) -> None:
        """Prevents: ids that are fed other than they were given."""
        ids = lm.encode(METHOD)
        found = one(lm, ids)
        assert (found.prompt_ids, found.healed_bytes) == (ids, b"")
        assert found.token_ids == one(lm, METHOD, heal=False).token_ids

    def test_limits_count_from_the_prompts_end(self, lm: TriModeLM) -> None:
        """Prevents: new tokens spent on what was typed; tokens per forward of `ar` beyond 1."""
        for prompt, number in itertools.product(PROMPTS, (1, 2, 5)):
            found = one(lm, prompt, mode="ar", max_new_tokens=number)
            assert found.stats.new_tokens == number or found.finish_reason == "stop"
            assert found.stats.tpf_decode in (None, 1.0)
        budget = {"max_thinking_tokens": 2, "end_think_token_id": 80, "ignore_eos": True}
        for prompt in PROMPTS:
            for mode in ("ar", "linear", "diffusion"):
                found = one(lm, prompt, mode=mode, max_new_tokens=6, **budget)
                new = found.token_ids[len(found.token_ids) - found.stats.new_tokens :]
                assert 80 in new[:3]

    def test_stop_strings_are_of_the_new_text(self, lm: TriModeLM) -> None:
        """Prevents: a text that ends at once, for its prompt held the stop string's beginning."""
        free = one(lm, "import nu")
        assert one(lm, "import nu", stop="nump").text == free.text
        assert one(lm, "import nu", stop="mpy").text == ""
        stopped = one(lm, METHOD, stop="\n")
        assert stopped.text == one(lm, METHOD).text.partition("\n")[0]

    @pytest.mark.parametrize("mode", ["ar", "linear"])
    def test_a_grammar_begins_at_the_prompts_end(self, lm: TriModeLM, mode: str) -> None:
        """Prevents: a grammar that has to say what was typed, or that starts a token late."""
        pytest.importorskip("llguidance")
        regex = r"        self\.[a-z] = [0-9]{1,3}"
        for temperature in (0.0, 1.0):
            found = one(lm, METHOD, regex=regex, mode=mode, temperature=temperature)
            assert re.fullmatch(regex, found.text)
            assert found.healed_bytes
            assert joins(lm, METHOD, found)
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        found = one(lm, "value = ", json_schema=schema, mode=mode, max_new_tokens=64)
        assert re.match(r'\{ ?"a"', found.text)
        lark = 'start: "mpy as " NAME\nNAME: /[a-z]{1,4}/'
        found = one(lm, "import nu", grammar=lark, mode=mode)
        assert re.fullmatch("mpy as [a-z]{1,4}", found.text)
        assert re.fullmatch("mpy|lls", one(lm, "😀 nu", regex="mpy|lls", mode=mode).text)

    def test_at_the_contexts_end_nothing_is_taken_back(self, lm: TriModeLM) -> None:
        """Prevents: a prompt that fits refused, since it might become longer."""
        context = lm.model.config.max_position_embeddings
        prompt = "x = 1\n" * 40 + "import nu"
        num_tokens = len(lm.encode(prompt))
        room = context - num_tokens
        assert lm.prepare(prompt, max_new_tokens=room, seed=0).healing is None
        assert lm.prepare(prompt, max_new_tokens=room - 30, seed=0).healing is not None
        with pytest.raises(RequestError, match=f"prompt of {num_tokens} tokens"):
            lm.prepare(prompt, max_new_tokens=room + 1)

    @pytest.mark.parametrize("mode", ["ar", "linear"])
    def test_logprobs_are_of_all_chosen_tokens(self, lm: TriModeLM, mode: str) -> None:
        """Prevents: log-probabilities beside the wrong tokens, or after another text."""
        for prompt in (METHOD, "import nu", "for i in range(10):\n    pr"):
            found = one(lm, prompt, logprobs=2, mode=mode, temperature=0.8)
            assert found.healed_bytes
            assert found.logprobs is not None
            whole = [*found.prompt_ids, *found.token_ids]
            scores = one(lm, whole, prompt_logprobs=0, max_new_tokens=0).prompt_logprobs
            assert scores is not None
            wanted = [score.logprob for score in scores[len(found.prompt_ids) :] if score]
            assert [each.logprob for each in found.logprobs] == pytest.approx(wanted, abs=1e-4)
            for token_id, each in zip(found.token_ids, found.logprobs, strict=True):
                assert dict(each.top).get(token_id, each.logprob) == each.logprob


class TestControlTokens:
    def test_a_string_is_text(self, lm: TriModeLM, caplog: pytest.LogCaptureFixture) -> None:
        """Prevents: a file that ends where it only names the end; and a change without a word."""
        fresh = trimode.load("pocket")
        prompt = 'EOS = "<|eos|>"  # <|mask|>'
        with caplog.at_level(logging.WARNING):
            found = one(fresh, prompt, max_new_tokens=4)
            one(fresh, prompt, max_new_tokens=4)
        assert joins(fresh, prompt, found)
        assert not {1, 2} & {*found.prompt_ids}
        said = [record.message for record in caplog.records if "parse_special" in record.message]
        assert len(said) == 1
        assert "<|eos|>" in said[0]
        parsed = one(fresh, prompt, max_new_tokens=4, parse_special=True)
        assert 1 in parsed.prompt_ids
        assert fresh.model.config.mask_token_id not in parsed.prompt_ids

    def test_not_healed_past_a_control_token(self, lm: TriModeLM) -> None:
        """Prevents: a template's own token chosen anew."""
        found = lm.encode_prompt("<|im_start|>us", parse_special=True)
        assert found.token_ids[:2] == [0, 3]
        assert not lm.encode_prompt("a<|im_start|>", parse_special=True).taken_ids

    def test_files_are_text(self, lm: TriModeLM, monkeypatch: pytest.MonkeyPatch) -> None:
        """Prevents: `MASK = "<|mask|>"` revised or filled as if it were the token."""
        assert lm.vocabulary is not None
        control = lm.vocabulary.control_ids
        bos = {lm.model.config.bos_token_id}
        text = 'MASK = "<|mask|>"\nEOS = "<|eos|>"\n'
        edge = _edge(lm, text + "x = ", "\n" + text, (1,))
        assert {*edge.prompt.token_ids, *edge.prompt.taken_ids} & control == bos
        assert not {*edge.suffix_ids} & control
        before = lm.decode([*edge.prompt.token_ids, *edge.prompt.taken_ids])
        assert before == text + "x = "
        assert edge.head + lm.vocabulary.bytes_of(edge.suffix_ids) == ("\n" + text).encode()
        fed: list[list[int]] = []

        def spied(model: Any, token_ids: Any, **options: Any) -> Any:
            fed.append([*token_ids])
            return revise(model, token_ids, **options)

        monkeypatch.setattr("trimode.revision.revise", spied)
        assert lm.revise(text, min_gain=1e6).text == text
        odd = "for i in <|eos|>(10):\n    print(i)\n"  # where the model would have anything else
        made = lm.revise(odd, min_gain=0.0, budget=24)
        for ids, source in zip(fed, (text, odd), strict=True):
            assert {ids[0]} == bos
            assert not {*ids[1:]} & control
            assert lm.vocabulary.bytes_of(ids[1:]) == source.encode()
        assert any("<|eos|>".find(edit.old) > 0 for edit in made.edits)
        for edit in made.edits:
            assert edit.new
            assert edit.old not in ("<|mask|>", "<|eos|>")
        filled = lm.infill(text + "x = <FILL>\n", lengths=[1, 2], seed=0)
        assert filled.text.startswith(text + "x = ")

    @pytest.mark.parametrize("call", ["generate", "infill", "revise", "stream"])
    def test_half_a_surrogate_pair(self, lm: TriModeLM, call: str) -> None:
        """Prevents: an error of the tokenizer's in its own words."""
        with pytest.raises(RequestError, match=r"not valid Unicode: '\\ud800' at character 2"):
            getattr(lm, call)("x \ud800 <FILL>")
        for name in ("stop", "regex", "grammar", "json_schema"):
            with pytest.raises(RequestError, match=f"{name} is .* allowed: valid Unicode"):
                lm.generate("x", **{name: "\udfff"})

    def test_padded_rows_are_no_tokens(self, tiny_model: Any, byte_tokenizer: Any) -> None:
        """Prevents: ids that no text has, in a prompt or among those that end one."""
        padded = TriModeLM(tiny_model(num_valid_tokens=250), byte_tokenizer)
        with pytest.raises(RequestError, match=r"prompt has token id 250; allowed: 0 to 249"):
            padded.generate([1, 250])
        with pytest.raises(RequestError, match=r"stop_token_ids has 251; allowed: 0 to 249"):
            padded.generate([1], stop_token_ids=[251])


def test_a_file_of_our_own_is_gone_on_with(lm: TriModeLM) -> None:
    """Prevents: an end of a real text at which text and prompt do not join."""
    source = Path(trimode.__file__).read_text(encoding="utf-8")
    rng = random.Random(0)
    for _ in range(40):
        cut = rng.randrange(1, min(len(source), 600))
        prompt = source[:cut]
        assert joins(lm, prompt, one(lm, prompt, max_new_tokens=3))
