"""Self-generation: the same conversations however they are scheduled, and only good ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trimode.checkpoint.generation_defaults import GenerationDefaults
from trimode.conversation import asking
from trimode.errors import ConfigError, RequestError
from trimode.loading import load
from trimode.runtime import TriModeLM
from trimode.selfgen import SelfgenOptions, Writing
from trimode.selfgen.outcome import Outcome
from trimode.selfgen.prompt_file import read_prompts
from trimode.selfgen.repeats import PromptsSeen, is_loop
from trimode.training.chat import ChatFormat
from trimode.vocabulary import Vocabulary

OPTIONS = SelfgenOptions(
    num=24, temperatures=(0.0, 1.0, 1.0), max_prompt_tokens=16, max_answer_tokens=64, held_out=0.25
)


def write(lm: TriModeLM, options: SelfgenOptions = OPTIONS, **more: Any) -> list[Outcome]:
    writing = Writing(lm, options, **({"batch": 8} | more))
    return [outcome for settled, _ in writing.steps() for outcome in settled]


@pytest.fixture(scope="module")
def outcomes(lm: TriModeLM) -> list[Outcome]:
    return write(lm)


def kept(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [one.record for one in outcomes if one.reason is None]


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_the_batch_changes_nothing(lm: TriModeLM, outcomes: list[Outcome], batch: int) -> None:
    """Prevents: a conversation, or which ones are dropped, depending on what ran beside it."""
    assert write(lm, batch=batch) == outcomes


def test_all_is_there_in_order(outcomes: list[Outcome]) -> None:
    """Prevents: an index that is lost, or more conversations than were asked for."""
    assert [one.index for one in outcomes] == list(range(len(outcomes)))
    assert len(kept(outcomes)) == OPTIONS.num
    assert outcomes[-1].reason is None


def test_generate_and_chat_write_the_same(lm: TriModeLM, outcomes: list[Outcome]) -> None:
    """Prevents: prompts or answers that the public interface would not give for the same seed."""
    for record in kept(outcomes)[:6]:
        seed = OPTIONS.seed_of(record["index"], "prompt")
        settings = {"mode": "ar", "max_new_tokens": 16, "temperature": 1.0, "top_p": 0.97}
        prompt = lm.generate(**asking(lm.vocabulary, settings, system=None), seed=seed)
        assert [{"role": "user", "content": prompt.text.strip()}] == record["messages"][:-1]
        answer = lm.chat(
            record["messages"][:-1],
            mode="ar",
            max_new_tokens=64,
            temperature=record["temperature"],
            seed=record["seed"],
        )
        assert (answer.prompt_ids, answer.token_ids) == (record["prompt_ids"], record["answer_ids"])
        assert (answer.text, answer.finish_reason) == (
            record["messages"][-1]["content"],
            record["finish"],
        )


def test_answers_are_those_that_chat_gives_by_the_models_own_settings(lm: TriModeLM) -> None:
    """Prevents: training text of another law, or of other ends, than what is served."""
    defaults = GenerationDefaults(
        top_k=3, repetition_penalty=1.5, stop_token_ids=(ord("a"),), max_new_tokens=5
    )
    own = TriModeLM(lm.model, lm.tokenizer, generation_defaults=defaults)
    prompts = [[{"role": "user", "content": f"{i} apples"}] for i in range(6)]
    options = replace(OPTIONS, num=None, near_duplicates=1.0, keeps_loops=True)
    found = kept(write(own, options, prompts=prompts))
    assert found
    for record in found:
        how = {"temperature": record["temperature"], "seed": record["seed"], "mode": "ar"}
        answer = own.chat(record["messages"][:-1], max_new_tokens=64, **how)
        assert answer.token_ids == record["answer_ids"]
    plain = kept(write(lm, options, prompts=prompts))
    assert [one["answer_ids"] for one in plain] != [one["answer_ids"] for one in found]


def test_dropped_prompts_are_counted_by_reason(outcomes: list[Outcome]) -> None:
    """Prevents: duplicates among the conversations, or drops that nobody sees."""
    counts = Counter(one.reason for one in outcomes)
    for reason in ("duplicate", "prompt_not_ended", "prompt_special_token"):
        assert counts[reason], f"the model of this test never has {reason}"
    prompts = [record["messages"][0]["content"].casefold().split() for record in kept(outcomes)]
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize("num_known", [0, 1, 7, 20])
def test_a_run_goes_on_from_anywhere(
    lm: TriModeLM, outcomes: list[Outcome], num_known: int
) -> None:
    """Prevents: a resumed run that repeats an index, forgets earlier prompts, or writes others."""
    before, rest = outcomes[:num_known], outcomes[num_known:]
    assert before + write(lm, before=before) == outcomes
    writing = Writing(lm, OPTIONS, batch=5, before=before, early=rest[2::3])
    found = [outcome for settled, _ in writing.steps() for outcome in settled]
    assert before + found == outcomes
    assert writing.tally.num_indexes == len(outcomes)


def test_what_waits_for_earlier_ones_is_told(lm: TriModeLM, outcomes: list[Outcome]) -> None:
    """Prevents: finished answers that a killed run loses because an earlier one is not ready."""
    writing, told = Writing(lm, OPTIONS, batch=8), set()
    for settled, early in writing.steps():
        told |= {one.index for one in early}
        assert not {one.index for one in settled} & {one.index for one in early}
    assert told, "the answers of this test all end in order"
    assert told <= {one.index for one in outcomes} | set(range(len(outcomes), 99))


def test_temperatures_and_splits_are_dealt_out_by_index(outcomes: list[Outcome]) -> None:
    """Prevents: shares that depend on what was dropped, or a split that a longer run changes."""
    for record in kept(outcomes):
        assert record["temperature"] == (0.0, 1.0, 1.0)[record["index"] % 3]
    assert {record["split"] for record in kept(outcomes)} == {"train", "held_out"}
    splits = Counter(OPTIONS.split(index) for index in range(4000))
    assert splits["held_out"] / 4000 == pytest.approx(0.25, abs=0.03)


def test_seeds_differ(outcomes: list[Outcome]) -> None:
    """Prevents: prompt and answer, or two conversations, sharing their noise."""
    drawn = {(OPTIONS.seed_of(i, what)) for i in range(500) for what in ("prompt", "answer")}
    assert len(drawn) == 1000
    assert max(drawn) < 2**48
    assert replace(OPTIONS, seed=1).seed_of(0, "prompt") not in drawn


def test_training_reads_the_conversations(lm: TriModeLM, outcomes: list[Outcome]) -> None:
    """Prevents: lines that `trimode prepare` refuses, or tokens other than those written."""
    tokenizer = deepcopy(lm.tokenizer)
    chat = ChatFormat(
        tokenizer,
        template=tokenizer.chat_template,
        template_source="tokenizer",
        markers={},
        messages_field="messages",
        takes_ids=True,
    )
    records = kept(outcomes)  # half characters too, which their text would lose
    assert len(records) >= 5
    for record in records:
        document = chat.encode(chat.text_of(record))
        learned = document.ids[document.is_supervised].tolist()
        assert learned[: len(record["answer_ids"])] == record["answer_ids"]


def test_loops_are_given_up(talker: Callable[..., Path]) -> None:
    """Prevents: rows that are busy for hundreds of tokens with a greedy loop, or its text kept."""
    lm = load(talker(4.0, is_stuck=True), dtype="float64")
    prompts = [[{"role": "user", "content": letter}] for letter in "abcdef"]
    options = replace(OPTIONS, num=None, temperatures=(0.0,), max_answer_tokens=300)
    for one in write(lm, options, prompts=prompts):
        assert (one.reason, one.num_answer_tokens) == ("answer_loop", 64)
    found = write(lm, replace(options, keeps_loops=True), prompts=prompts)
    assert all(one.reason is None and one.record["finish"] == "length" for one in found)
    options = replace(options, keeps_loops=True, keeps_cut=False)
    assert {one.reason for one in write(lm, options, prompts=prompts)} == {"answer_cut"}


def test_a_loop_is_a_short_period_over_the_whole_window() -> None:
    """Prevents: ordinary repetition taken for a loop, or a loop missed for its phase."""
    piece = list(range(16))
    assert is_loop([99, *piece * 4])
    assert is_loop([5] * 64)
    assert not is_loop([5] * 63)
    assert not is_loop([*piece, 16] * 4)
    assert not is_loop([*piece * 3, *range(20, 36)])


def test_a_model_that_ends_no_prompt_is_refused(talker: Callable[..., Path]) -> None:
    """Prevents: a run that never ends and never says why."""
    lm = load(talker(-30.0), dtype="float64")
    options = replace(OPTIONS, max_prompt_tokens=4)
    with pytest.raises(RequestError, match="does not write conversations worth keeping: kept"):
        write(lm, options, batch=32)


def test_prompts_of_the_callers(lm: TriModeLM) -> None:
    """Prevents: given prompts that are lost, or answered without their system message."""
    prompts = [
        [{"role": "user", "content": "one"}],
        [{"role": "user", "content": "  "}],
        [{"role": "user", "content": "ONE "}],
        [{"role": "user", "content": "x" * 200}],
        [{"role": "ipython", "content": "t"}, {"role": "user", "content": "two"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "three"}],
    ]
    options = replace(OPTIONS, num=None, system="be brief", temperatures=(1.0,))
    found = write(lm, options, prompts=prompts)
    assert [one.reason for one in found[1:5]] == [
        "prompt_empty",
        "duplicate",
        "prompt_too_long",
        "prompt_refused",
    ]
    assert found[0].record["messages"][0] == {"role": "system", "content": "be brief"}
    assert found[5].record["messages"][:2] == prompts[5]


def test_the_likeliest_tokens_are_kept(lm: TriModeLM) -> None:
    """Prevents: soft targets of the wrong place or number."""
    options = replace(OPTIONS, num=3, temperatures=(0.0,), top_logprobs=4)
    for record in kept(write(lm, options)):
        num = len(record["answer_ids"])
        assert [len(record[name]) for name in ("logprobs", "top_ids", "top_logprobs")] == [num] * 3
        assert [ids[0] for ids in record["top_ids"]] == record["answer_ids"]
        assert all(len(ids) == 4 for ids in record["top_ids"])
        assert [xs[0] for xs in record["top_logprobs"]] == record["logprobs"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template|needs a tokenizer with a chat template"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "begins and ends"),
        ("<|bos|>{% for m in messages %}{{ m['content'] }} {% endfor %}", "begins and ends"),
        ("<|bos|>{{ messages[-1]['content'] }}<|eos|>", "begins and ends"),
        (
            "<|bos|>{% for m in messages %}{{ m['content'] }}<|eos|>{{ m['content'] }}{% endfor %}",
            "begins and ends",
        ),
    ],
)
def test_a_template_that_hides_the_users_turn_is_refused(
    lm: TriModeLM, template: str | None, reason: str
) -> None:
    """Prevents: prompts written from the wrong place, which never end."""
    tokenizer = deepcopy(lm.tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(RequestError, match=reason):
        write(TriModeLM(lm.model, tokenizer))


def test_a_turn_may_end_with_a_string(lm: TriModeLM) -> None:
    """Prevents: templates without special tokens being refused, or their marker kept as text."""
    tokenizer = deepcopy(lm.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n##\n' }}{% endfor %}"
    )
    found = asking(Vocabulary(tokenizer, mask_token_id=None), {}, system="s")
    assert found == {"prompt": list(b"system:s\n##\nuser:"), "stop": ["\n##"]}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num": None}, "num is None"),
        ({"max_answer_tokens": 5000}, "beyond the context of 512"),
    ],
)
def test_options_that_cannot_be_are_refused(
    lm: TriModeLM, options: dict[str, Any], reason: str
) -> None:
    """Prevents: a run that fails after hours, or goes on for ever."""
    with pytest.raises((ConfigError, RequestError), match=reason):
        write(lm, replace(OPTIONS, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"num": 0},
        {"prompt_temperature": 0.0},
        {"prompt_top_p": 0.0},
        {"temperatures": ()},
        {"temperatures": (0.0, -1.0)},
        {"seed": -1},
        {"held_out": 1.0},
        {"near_duplicates": 0.0},
        {"top_logprobs": -1},
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    """Prevents: a wrong number that shows only in the text."""
    with pytest.raises(ConfigError, match=f"{next(iter(options))} is .*; allowed: "):
        SelfgenOptions(**options)


def test_near_duplicates_are_found_where_wanted() -> None:
    """Prevents: prompts that differ by a word filling the data, or the threshold being ignored."""
    text = "write a short poem about the sea at night and the old lighthouse on the cliff please"
    loose, strict = PromptsSeen(threshold=0.6), PromptsSeen(threshold=1.0)
    for seen, expected in ((loose, "near_duplicate"), (strict, None)):
        assert seen.reason(text) is None
        assert seen.reason(f"  {text.upper()}\n") == "duplicate"
        assert seen.reason(f"{text} now") == expected
        assert seen.reason("what is the capital of France?") is None
        assert [seen.reason(word) for word in ("one", "two", "three")] == [None] * 3


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("p.csv", "a", "allowed: a file .jsonl or .txt"),
        ("p.jsonl", '{"prompt": "a"}\n[1]\n', "line 2 of .*`prompt`"),
        ("p.jsonl", '{"prompt": \n', "line 1"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', "no message of the"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', "`role` and `content`"),
        ("p.txt", "\n \n", "has no prompts"),
    ],
)
def test_a_bad_prompt_file_is_refused(tmp_path: Path, name: str, text: str, reason: str) -> None:
    """Prevents: prompts that are silently left out."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=reason):
        read_prompts(tmp_path / name)


def test_prompt_files_are_read(tmp_path: Path) -> None:
    """Prevents: answers of a data set taken for part of the question."""
    (tmp_path / "p.txt").write_text(" one \n\ntwo\n")
    assert [m[0]["content"] for m in read_prompts(tmp_path / "p.txt")] == ["one", "two"]
    turns = '[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]'
    (tmp_path / "p.jsonl").write_text(f'{{"prompt":"x"}}\n{{"messages":{turns}}}\n')
    assert read_prompts(tmp_path / "p.jsonl") == [
        [{"role": "user", "content": "x"}],
        [{"role": "user", "content": "q"}],
    ]
