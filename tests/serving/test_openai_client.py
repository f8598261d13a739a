"""The official client gets what it expects, and the same texts as from Python."""

from __future__ import annotations

import math
from collections.abc import Iterator

import openai
import pytest

from tests.serving.conftest import Served
from trimode.runtime import TriModeLM

REGEX = "abcSTOPdef"


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    """Of the module's server."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def test_models(client: openai.OpenAI) -> None:
    """Prevents: a list that the client cannot read, or that names another model."""
    (model,) = client.models.list()
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("../etc/passwd")


@pytest.mark.parametrize("mode", ["ar", "diffusion", "linear", "branching"])
def test_a_completion_is_that_of_python(
    client: openai.OpenAI, tiny_lm: TriModeLM, mode: str
) -> None:
    """Prevents: options lost or defaults changed between HTTP and `generate`."""
    options = {"mode": mode, "top_k": 20, "ignore_eos": True}
    answer = client.completions.create(
        model="tiny",
        prompt="def f(",
        max_tokens=12,
        temperature=0.8,
        seed=7,
        extra_body=options,
    )
    wanted = tiny_lm.generate("def f(", max_new_tokens=12, temperature=0.8, seed=7, **options)
    assert answer.choices[0].text == wanted.text
    assert answer.choices[0].finish_reason == wanted.finish_reason
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (6, 12, 18)
    own = usage.model_extra["trimode"]
    assert own["forwards"] == {**wanted.stats.forwards, "total": wanted.stats.num_forwards}
    assert own["tokens_per_forward"]["decode"] == pytest.approx(wanted.stats.tpf_decode)
    assert (own["mode"], own["seed"]) == (mode, 7)


def test_several_prompts_times_n(client: openai.OpenAI, tiny_lm: TriModeLM) -> None:
    """Prevents: choices in the order of finishing, or all with the same seed."""
    prompts = ["one", "two longer"]
    answer = client.completions.create(
        model="tiny", prompt=prompts, n=2, max_tokens=8, seed=5, temperature=1
    )
    wanted = [
        tiny_lm.generate(prompt, max_new_tokens=8, seed=seed, temperature=1.0).text
        for prompt in prompts
        for seed in (5, 6)
    ]
    assert [choice.text for choice in answer.choices] == wanted
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("one") + len("two longer")


def test_equal_prompts_count_each(client: openai.OpenAI) -> None:
    """Prevents: prompts that read the same taken for one; choices of one counted anew."""
    answer = client.completions.create(model="tiny", prompt=["ab", "ab"], n=2, max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 4


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    """Prevents: a conversation refused for the fields that our own answer brought along."""
    asked = {"role": "user", "content": "x"}
    answer = client.chat.completions.create(model="tiny", messages=[asked], max_tokens=3)
    messages = [asked, answer.choices[0].message, asked]
    assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=3).choices


def test_a_prompt_too_long_is_the_messages(client: openai.OpenAI) -> None:
    """Prevents: an error of a chat that names a field it does not have."""
    messages = [{"role": "user", "content": "x" * 600}]
    with pytest.raises(openai.BadRequestError, match="605 tokens") as caught:
        client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    assert caught.value.param == "messages"


@pytest.mark.parametrize("prompt", [[100, 101, 102], [[100, 101], [102]]])
def test_prompts_of_token_ids(client: openai.OpenAI, prompt: list[int]) -> None:
    """Prevents: a list of ids read as a list of prompts, or the other way round."""
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=2, temperature=0)
    assert len(answer.choices) == (2 if isinstance(prompt[0], list) else 1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3


def test_a_stream_joins_to_the_whole(client: openai.OpenAI) -> None:
    """Prevents: text lost or doubled between chunks, interleaved choices mixed up, no usage."""
    options = {"model": "tiny", "prompt": "x = ", "max_tokens": 20, "seed": 3, "n": 3}
    whole = client.completions.create(**options)
    texts = ["", "", ""]
    reasons = {}
    with client.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                if choice.finish_reason:
                    reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunk.usage is not None
    assert whole.usage is not None
    assert chunk.usage.total_tokens == whole.usage.total_tokens


def test_a_stop_string_over_chunk_borders(client: openai.OpenAI) -> None:
    """Prevents: the start of a stop string sent before it was known to be one."""
    with client.completions.create(
        model="tiny",
        prompt="x",
        max_tokens=30,
        temperature=0,
        stop="STOP",
        stream=True,
        extra_body={"regex": REGEX, "mode": "ar"},
    ) as stream:
        chunks = [choice for chunk in stream for choice in chunk.choices]
    assert "".join(chunk.text for chunk in chunks) == "abc"
    assert chunks[-1].finish_reason == "stop"


def test_a_character_over_tokens_comes_whole(client: openai.OpenAI) -> None:
    """Prevents: a character of four bytes, a token each, sent in parts. Pieces that wait for a slow
    reader are sent together, so only what they hold is sure, not how many there are."""
    with client.completions.create(
        model="tiny",
        prompt="x",
        max_tokens=30,
        temperature=0,
        stream=True,
        extra_body={"regex": "a😀é", "mode": "ar"},
    ) as stream:
        texts = [choice.text for chunk in stream for choice in chunk.choices if choice.text]
    assert "".join(texts) == "a😀é"
    assert not any("\ufffd" in text for text in texts)


def test_completion_logprobs(client: openai.OpenAI, tiny_lm: TriModeLM) -> None:
    """Prevents: log-probabilities beside the wrong token, or in another shape than OpenAI's."""
    options = {"model": "tiny", "prompt": "x", "max_tokens": 5, "temperature": 0, "logprobs": 2}
    answer = client.completions.create(**options, extra_body={"regex": "abé."})
    found = answer.choices[0].logprobs
    assert found is not None
    wanted = tiny_lm.generate("x", max_new_tokens=5, temperature=0.0, logprobs=2, regex="abé.")
    assert wanted.logprobs is not None
    assert found.token_logprobs == pytest.approx([one.logprob for one in wanted.logprobs])
    assert found.text_offset == [0, 1, 2, 2, 3]
    assert found.tokens is not None
    assert found.tokens[:4] == ["a", "b", "bytes:\\xc3", "bytes:\\xa9"]
    assert found.top_logprobs is not None
    assert all(1 <= len(top) <= 2 for top in found.top_logprobs)
    with client.completions.create(**options, stream=True, extra_body={"regex": "abé."}) as stream:
        parts = [
            logprob
            for chunk in stream
            for choice in chunk.choices
            if choice.logprobs is not None
            for logprob in choice.logprobs.token_logprobs or ()
        ]
    assert parts == found.token_logprobs


def test_chat(client: openai.OpenAI, tiny_lm: TriModeLM) -> None:
    """Prevents: an answer that is not `chat`'s, and parts of a message's content left out."""
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=9, temperature=0, seed=1
    )
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"}]
    wanted = tiny_lm.chat(plain, max_new_tokens=9, seed=1)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", wanted.text)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(wanted.prompt_ids)


def test_a_chat_without_a_limit_goes_on_to_the_context(client: openai.OpenAI) -> None:
    """Prevents: a default that is beyond the context of a long conversation, and so a refusal."""
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x" * 480}],
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens <= 512
    assert answer.usage.prompt_tokens > 480


def test_a_chat_stream(client: openai.OpenAI) -> None:
    """Prevents: deltas without a role first, or log-probabilities that the client cannot read."""
    with client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=1,
        stream=True,
        extra_body={"regex": "héllo"},
    ) as stream:
        chunks = [choice for chunk in stream for choice in chunk.choices]
    assert chunks[0].delta.role == "assistant"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "héllo"
    tokens = [one for chunk in chunks if chunk.logprobs for one in chunk.logprobs.content or ()]
    assert [one.token for one in tokens][:2] == ["h", "\ufffd"]
    assert tokens[0].bytes == [ord("h")]
    assert tokens[1].bytes == [0xC3]
    assert all(math.isfinite(one.logprob) and len(one.top_logprobs) == 1 for one in tokens)


def test_response_format(client: openai.OpenAI) -> None:
    """Prevents: a schema that is taken and not kept to."""
    schema = {"type": "object", "properties": {"n": {"enum": [12]}}, "required": ["n"]}
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=40,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {**schema, "additionalProperties": False}},
        },
    )
    assert (answer.choices[0].message.content or "").replace(" ", "") == '{"n":12}'


def test_errors_are_the_clients(client: openai.OpenAI) -> None:
    """Prevents: errors that the client shows as something else, or without their message."""
    with pytest.raises(openai.BadRequestError, match="top_p is 0") as caught:
        client.completions.create(model="tiny", prompt="x", top_p=0)
    assert caught.value.param == "top_p"
    with pytest.raises(
        openai.BadRequestError, match="frequency_penalty is 2.5; allowed: at most 2"
    ):
        client.completions.create(model="tiny", prompt="x", frequency_penalty=2.5)
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="/etc/passwd", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="logprobs is 1; allowed: null in mode 'diff"):
        client.completions.create(
            model="tiny", prompt="x", logprobs=1, extra_body={"mode": "diffusion"}
        )
    with pytest.raises(openai.BadRequestError, match="beyond the context of 512"):
        client.completions.create(model="tiny", prompt="x" * 300, max_tokens=300)
