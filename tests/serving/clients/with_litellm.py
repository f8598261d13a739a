"""LiteLLM, by its providers for servers like this one; aider asks through it too."""

from __future__ import annotations

import litellm
from checks import ASK, CALL, LOOK, TOOLS_URL, URL, Checks

litellm.suppress_debug_info = True
checks = Checks("litellm")
common = {"api_base": f"{URL}/v1", "api_key": "none", "num_retries": 0}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

for provider in ("openai", "hosted_vllm", "litellm_proxy"):
    model = f"{provider}/pocket"
    with checks(f"{provider}: chat") as show:
        answer = litellm.completion(model=model, messages=ASK, max_tokens=24, **common)
        assert answer.usage.completion_tokens > 0
        show(answer.choices[0].message.content)

    with checks(f"{provider}: chat, streamed, with usage") as show:
        chunks = list(
            litellm.completion(
                model=model,
                messages=ASK,
                max_tokens=24,
                stream=True,
                stream_options={"include_usage": True},
                **common,
            )
        )
        whole = litellm.stream_chunk_builder(chunks, messages=ASK)
        assert whole.choices[0].finish_reason in ("stop", "length")
        assert whole.usage.prompt_tokens > 0
        show(whole.choices[0].message.content)

with checks("openai: as aider asks") as show:
    chunks = litellm.completion(
        model="openai/pocket", messages=ASK, stream=True, temperature=0, timeout=600, **common
    )
    show("".join(chunk.choices[0].delta.content or "" for chunk in chunks))

with checks("text-completion-openai: completion, streamed") as show:
    chunks = litellm.text_completion(
        model="text-completion-openai/pocket",
        prompt="def add(a, b):\n",
        max_tokens=12,
        stream=True,
        **common,
    )
    show("".join(chunk.choices[0].text or "" for chunk in chunks))

with checks("response_format") as show:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    answer = litellm.completion(
        model="openai/pocket", messages=ASK, max_tokens=40, response_format=form, **common
    )
    show(answer.choices[0].message.content)

with checks("tools") as show:
    answer = litellm.completion(
        model="openai/tools",
        messages=ASK,
        tools=[LOOK],
        tool_choice="auto",
        max_tokens=60,
        extra_body={"regex": CALL},
        **common | {"api_base": f"{TOOLS_URL}/v1"},
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    show(answer.choices[0].message.tool_calls[0].function)

with checks("a prompt beyond the context: ContextWindowExceededError") as show:
    long = [{"role": "user", "content": "x y " * 30_000}]
    try:
        litellm.completion(model="openai/pocket", messages=long, **common)
    except litellm.ContextWindowExceededError as error:
        show(error)
    else:
        raise AssertionError("it was taken")
