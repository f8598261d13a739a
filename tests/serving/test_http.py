"""Doors, limits and errors over real connections; every refusal names what is wrong."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.serving.conftest import WAIT_S, Brake, Served, wait_until
from trimode.runtime import TriModeLM
from trimode.serving.settings import Settings

KEY, OTHER_KEY = "secret-of-one", "secret-of-two"
ASSISTANT = {"role": "assistant", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOL_SAYS = {"role": "tool", "content": "x", "tool_call_id": "1"}
BAD_SCHEMA = {"name": "x", "schema": {"type": "objct"}}


def _message(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokns": 3}, '"max_tokns" is not a field of this request; did you mean max_tokens?'),
        ({"max_completion_tokens": 3}, "of this request; did you mean max_tokens?"),
        ({"response_format": {}}, "of this request; it is one of /v1/chat/completions"),
        ({"top_a": 3}, '"top_a" is not a field of this request'),
        ({"n_predict": 3}, "not a field of this request; did you mean max_tokens?"),
        ({"min_tokens": 2}, "min_tokens is 2; allowed: an integer of 0 to max_tokens=1"),
        ({"min_tokens": -1}, "min_tokens is -1; allowed: at least 0"),
        ({"min_p": 1.5}, "min_p is 1.5; allowed: at most 1"),
        ({"top_k": -2}, "top_k is -2; allowed: at least -1"),
        ({"presence_penalty": -2.5}, "presence_penalty is -2.5; allowed: at least -2"),
        (
            {"repeat_penalty": 1.1},
            "repeat_penalty is 1.1, which is not supported; allowed: null, 1",
        ),
        ({"skip_special_tokens": False}, "skip_special_tokens is false, which is not supported"),
        ({"mirostat": 2}, "mirostat is 2, which is not supported; allowed: null, 0"),
        ({"temperature": 1e6}, "temperature is 1000000.0; allowed: at most 100000"),
        ({"seed": 2**64}, "seed is 18446744073709551616; allowed: less than 18446744073709551616"),
        ({"top_p": "x"}, 'top_p is "x"; allowed: a number'),
        ({"stop": ["a"] * 17}, "allowed: a string, or up to 16 of them"),
        ({"json_schema": 3}, "json_schema is 3; allowed: a schema, as an object, true, false"),
        ({"mode": "auto"}, "allowed: ar, diffusion, linear, branching, quadratic; auto is off"),
        ({"echo": True, "logprobs": 1, "heal": True}, "heal is true; allowed with echo and"),
        ({"best_of": 2}, "best_of is 2, which is not supported; allowed: null, 1"),
        ({"frequency_penalty": False}, "frequency_penalty is false; allowed: a number"),
        ({"suffix": "x"}, 'suffix is "x", which is not supported; allowed: null, ""'),
        ({"max_tokens": 0}, "max_tokens is 0; allowed: at least 1, or 0 with echo true"),
        ({"max_tokens": "3"}, 'max_tokens is "3"; allowed: an integer'),
        ({"max_tokens": True}, "max_tokens is true; allowed: an integer"),
        ({"prompt": []}, 'prompt is []; allowed: "" for an empty prompt'),
        ({"prompt": [1, "x"]}, "allowed: a string, token ids, or a list of either"),
        ({"logit_bias": {"1": 1, "01": 2}}, 'logit_bias has "01"; allowed: token ids as keys'),
        ({"stream": True, "stream_options": {"a\nb": 1}}, 'stream_options."a\\nb" is not a field'),
        ({"prompt": [-1]}, "allowed: a string, token ids, or a list of either"),
        ({"prompt": [999]}, "prompt has token id 999; allowed: 0 to 258"),
        ({"stream_options": {}}, "stream_options is given; allowed: only with stream true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x is not a field"),
        ({"events": True}, "events is true; allowed: only with stream true"),
        ({"mode": "ar", "steps": 2}, "steps is 2; allowed: null, since mode 'ar' has no steps"),
        ({"mode": "warp"}, "mode is \"warp\"; allowed: 'ar', 'diffusion'"),
        ({"stop": ""}, 'stop is ""; allowed: a string, or up to 16 of them'),
        ({"logit_bias": {"a": 1}}, 'logit_bias has "a"; allowed: token ids as keys'),
        ({"logit_bias": {"258": 1}}, "a token of logit_bias is 258"),
        ({"n": 33}, "1 prompts with n=33 are 33 texts; allowed: 32 in one request"),
        ({"seed": -2}, "seed is -2; allowed: at least 0"),
        ({"seed": 2**64 - 1, "n": 2}, "allowed with n=2: at most 18446744073709551614"),
        ({"timeout_s": 601}, "timeout_s is 601; allowed here: at most 600"),
        ({"regex": "("}, "regex"),
        ({"prompt": "x" * 500, "max_tokens": 13}, "500 tokens + max_tokens=13 = 513, beyond"),
        ({"prompt": "x" * 600}, "600 tokens, beyond the context of 512; allowed: at most 511"),
    ],
)
def test_what_is_wrong_is_named(served: Served, fields: dict[str, Any], message: str) -> None:
    """Prevents: a field that is ignored, and an error that does not say which field it is about."""
    response = served.post("completions", {"prompt": "x", "max_tokens": 1, **fields})
    found = _message(response, 400)
    assert message in found
    assert not re.search(r"None|True|False|Input should|valid (string|integer|number)", found)


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        ("completions", {"prompt": "x" * 500, "max_tokens": 13}, "max_tokens", "of at most 12"),
        ("completions", {"prompt": "x" * 600}, "prompt", "at most 511"),
        ("completions", {"logit_bias": {"258": 1}}, "logit_bias", "logit_bias is 258"),
        ("completions", {"max_thinking_tokens": 1}, "end_think_token_id", "is null; give an id"),
        ("completions", {"mode": "auto"}, "mode", "auto is off here"),
        ("completions", {"json_schema": {"type": "x"}}, "json_schema", "json_schema is not valid"),
        ("chat", {"tools": [TOOL]}, "tools", "declares no form for tool calls"),
        (
            "chat",
            {"continue_final_message": True},
            "continue_final_message",
            "continue_final_message is true, but the last message is of role 'user'",
        ),
        (
            "chat",
            {
                "messages": [ASSISTANT],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
            "continue_final_message",
            "add_generation_prompt is true; allowed: one of them",
        ),
        ("chat", {"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "does not read"),
        ("chat", {"chat_template_kwargs": {"tokenize": 1}}, "chat_template_kwargs", "'tokenize'"),
        ("chat", {"enable_thinking": True}, "enable_thinking", "enable_thinking is true, but"),
        (
            "chat",
            {"chat_template_kwargs": {"enable_thinking": True}},
            "chat_template_kwargs",
            "chat_template_kwargs.enable_thinking is true, but",
        ),
        (
            "chat",
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options",
            "stream_options.include_obfuscation is true; allowed: false",
        ),
        ("chat", {"messages": [CALLING, TOOL_SAYS]}, "messages", "declares no form for tool"),
        ("chat", {"max_tokens": 508}, "max_tokens", "max_tokens=508"),
        (
            "chat",
            {"max_completion_tokens": 508},
            "max_completion_tokens",
            "max_completion_tokens=508",
        ),
        (
            "chat",
            {"response_format": {"type": "json_schema", "json_schema": BAD_SCHEMA}},
            "response_format",
            "response_format is not valid",
        ),
        ("infill", {"text": "x"}, "text", "the text has no gap"),
        ("infill", {"text": "<FILL>", "lengths": [99]}, "lengths", "lengths is [99]; allowed:"),
    ],
)
def test_the_field_that_was_sent_is_named(
    served: Served, path: str, fields: dict[str, Any], param: str, message: str
) -> None:
    """Prevents: errors that name an argument in Python, another field, or none."""
    base = {
        "completions": {"prompt": "x"},
        "chat": {"messages": [{"role": "user", "content": "x"}]},
        "infill": {},
    }
    route = "chat/completions" if path == "chat" else path
    response = served.post(route, {**base[path], **fields})
    assert message in _message(response, 400)
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages is []; allowed: at least 1 of them"),
        ({"messages": [{"role": "ipython", "content": "x"}]}, 'messages.0.role is "ipython"; a'),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id is missing"),
        ({"messages": [{"role": "user"}]}, "messages.0.content is null or missing"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content is null"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "allowed: a string, or a list of text parts",
        ),
        ({"messages": [{**ASSISTANT, "content": None, "tool_calls": []}]}, "0.content is null or"),
        ({"prompt": "x"}, "it is one of /v1/completions and /v1/infill"),
        ({"tools": [{"type": "function"}]}, "tools.0.function is missing"),
        ({"tools": [{**TOOL, "function": {"name": "f", "strict": True}}]}, "strict is true; allow"),
        ({"tool_choice": "required"}, 'tool_choice is "required" beside 0 tools'),
        ({"tool_choice": "some"}, 'tool_choice is "some"; allowed: "none", "auto", "required"'),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice.function.name is 'f'; allowed: none, for there are no tools",
        ),
        ({"top_logprobs": 2}, "top_logprobs is 2; allowed: only with logprobs true"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "allowed: one of them"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "x", "schema": {}}}},
            "response_format.json_schema is given; allowed: none with type 'text'",
        ),
        (
            {"response_format": {"type": "json_object"}, "json_schema": {}},
            "response_format is given beside json_schema; allowed: one of them",
        ),
        ({"moderation": {}}, "moderation is {}, which is not supported; allowed: null"),
        ({"response_format": {"type": "xml"}}, 'response_format.type is "xml"; allowed:'),
    ],
)
def test_what_is_wrong_with_a_chat(served: Served, fields: dict[str, Any], message: str) -> None:
    """Prevents: a message or a tool that is dropped in silence."""
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    assert message in _message(served.post("chat/completions", body), 400)


def test_neutral_fields_of_openai_are_taken(served: Served) -> None:
    """Prevents: clients refused that send OpenAI's defaults along."""
    body = {"prompt": "x", "max_tokens": 1, "best_of": 1, "echo": False, "suffix": None}
    fields = {"frequency_penalty": 0.0, "presence_penalty": 0, "user": "u", "stream": False}
    assert served.post("completions", body | fields).status_code == 200
    chat = {"tools": [], "tool_choice": "none", "n": 1, "logprobs": False, "store": False}
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert served.post("chat/completions", body | chat).status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt": "\xff"}', "the body is not valid UTF-8: byte 0xff at offset 12"),
        (b'{"prompt": "x"', "the body is not valid JSON"),
        (b'{"prompt": "x", "temperature": NaN}', "the body is not valid JSON"),
        (b'{"prompt": "x", "n": 1, "n": 2}', 'the body has "n" twice; allowed: once'),
        (b'{"prompt": "x", "logit_bias": {"1": 1, "1": 2}}', 'the body has "1" twice'),
        (b'{"prompt": "\\ud800"}', "the body is not valid JSON"),
        (b'["x"]', 'the body is ["x"]; allowed: a JSON object'),
        (b"", "the body is not valid JSON"),
        (b"{}", "prompt is missing"),
        (b"[" * 100_000, "the body is not valid JSON"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "the body is not valid JSON: number"),
    ],
)
def test_bodies_that_are_none(served: Served, body: bytes, message: str) -> None:
    """Prevents: a 500 or a hang on bytes that are no request."""
    response = httpx.post(
        f"{served.url}/v1/completions",
        content=body,
        headers={"content-type": "application/json"},
        timeout=WAIT_S,
    )
    assert message in _message(response, 400)


def test_routes_and_methods(served: Served) -> None:
    """Prevents: errors in another shape where no route of ours is reached."""
    assert "GET /nothing" in _message(httpx.get(f"{served.url}/nothing"), 404)
    wrong = httpx.get(f"{served.url}/v1/completions")
    assert "Method Not Allowed" in _message(wrong, 405)
    assert wrong.headers["allow"] == "POST"
    form = httpx.post(f"{served.url}/v1/completions", content=b'{"prompt": "x"}')
    assert "allowed: application/json" in _message(form, 415)
    assert httpx.get(f"{served.url}/docs").status_code == 404


def test_request_ids(served: Served) -> None:
    """Prevents: an id that cannot be followed, or one that forges a log line."""
    url = f"{served.url}/health"
    assert httpx.get(url, headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 200, '"}'):
        given = httpx.get(url, headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert given.startswith("req-")


def test_other_origins_are_not_let_in(serve: Callable[..., Served]) -> None:
    """Prevents: any web page that a user visits using the server on their machine."""
    server = serve(Settings(cors_origins=("https://good.example",)))
    ask = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    for origin, allowed in (("https://good.example", True), ("https://evil.example", False)):
        headers = {"Origin": origin, **ask}
        answer = httpx.options(f"{server.url}/v1/completions", headers=headers)
        assert ("access-control-allow-origin" in answer.headers) == allowed


def test_no_origin_is_let_in_by_default(served: Served) -> None:
    """Prevents: CORS open unless somebody closes it."""
    headers = {"Origin": "https://evil.example"}
    answer = httpx.get(f"{served.url}/health", headers=headers)
    assert "access-control-allow-origin" not in answer.headers


def test_keys(serve: Callable[..., Served]) -> None:
    """Prevents: a door without a lock, a key in an error, and probes that need one."""
    server = serve(Settings(api_keys=(KEY, OTHER_KEY)))
    body = {"prompt": "x", "max_tokens": 1}
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": b"Bearer \xff\xfe"},
        {"Authorization": f"Bearer {KEY}x"},
    ):
        refused = server.post("completions", body, headers=headers)
        assert "no valid API key" in _message(refused, 401)
        assert refused.headers["www-authenticate"] == "Bearer"
        assert KEY not in refused.text
    for path in ("/v1/models", "/metrics", "/v1/models/tiny"):
        assert httpx.get(server.url + path).status_code == 401
    for path in ("/health", "/ready"):
        assert httpx.get(server.url + path).status_code == 200
    for key in (KEY, OTHER_KEY):
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
            assert client.completions.create(model="tiny", **body).choices
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="nope", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(model="tiny", **body)


def test_rate(serve: Callable[..., Served]) -> None:
    """Prevents: one client asking without end, or another one paying for it."""
    server = serve(Settings(api_keys=(KEY, OTHER_KEY), requests_per_minute=2))
    body = {"prompt": "x", "max_tokens": 1}
    mine = {"Authorization": f"Bearer {KEY}"}
    statuses = [server.post("completions", body, headers=mine).status_code for _ in range(2)]
    assert statuses == [200, 200]
    refused = server.post("completions", body, headers=mine)
    assert _message(refused, 429) == "more than 2 requests a minute of one client"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="tiny", **body)
    others = {"Authorization": f"Bearer {OTHER_KEY}"}
    assert server.post("completions", body, headers=others).status_code == 200


def test_too_large_a_body(serve: Callable[..., Served]) -> None:
    """Prevents: memory filled by a body, with its length given or not."""
    server = serve(Settings(max_body_bytes=1000))
    for content in (b"x" * 5000, iter([b"x" * 500] * 10), b"x" * 200_000):
        response = httpx.post(
            f"{server.url}/v1/completions",
            content=content,
            headers={"content-type": "application/json"},
        )
        assert "more than 1000 bytes" in _message(response, 413)
        assert response.headers["connection"] == "close"


def test_a_body_that_does_not_come(serve: Callable[..., Served]) -> None:
    """Prevents: connections held for ever by clients that send slowly."""
    server = serve(Settings(body_timeout_s=0.1))
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n"
            b"content-length: 100\r\n\r\n{"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_output_and_prompt_limits(serve: Callable[..., Served]) -> None:
    """Prevents: a limit that is clamped to in silence."""
    server = serve(Settings(max_output_tokens=5), max_new_tokens=5, max_prompt_tokens=3)
    refused = server.post("completions", {"prompt": "x", "max_tokens": 6})
    assert _message(refused, 400) == "max_tokens is 6; allowed here: at most 5"
    refused = server.post("completions", {"prompt": "xxxx", "max_tokens": 5})
    assert _message(refused, 400) == "the prompt has 4 tokens; allowed here: 3"
    assert refused.json()["error"]["param"] == "prompt"
    within = server.post("completions", {"prompt": "x", "ignore_eos": True})
    assert within.json()["usage"]["completion_tokens"] == 5  # 16 were not asked for
    assert server.post("completions", {"prompt": "x", "max_tokens": 5}).status_code == 200


def test_too_many_at_once(serve: Callable[..., Served]) -> None:
    """Prevents: requests piling up without a number, and a place that is never given back."""
    server = serve(Settings(max_concurrent=1))
    brake = Brake(server.backend._thread)
    body = {"prompt": "x", "max_tokens": 9, "stream": True, "ignore_eos": True}
    with httpx.Client(timeout=WAIT_S) as client:
        brake.let(1)
        with client.stream("POST", f"{server.url}/v1/completions", json=body) as first:
            assert first.status_code == 200
            assert server.samples()["trimode_http_active",] == 1
            refused = server.post("completions", body)
            assert "the most that this server may have" in _message(refused, 429)
            assert refused.headers["retry-after"] == "1"
            brake.off()
            assert first.read().endswith(b"data: [DONE]\n\n")
    assert server.post("completions", {**body, "stream": False}).status_code == 200
    assert server.samples()["trimode_http_active",] == 0


def test_a_full_queue(serve: Callable[..., Served]) -> None:
    """Prevents: a refused text that looks like a broken server, or one that waits for ever."""
    server = serve(num_rows=1, max_waiting=0)
    brake = Brake(server.backend._thread)
    body = {"prompt": "x", "max_tokens": 9, "stream": True, "ignore_eos": True}
    with httpx.Client(timeout=WAIT_S) as client:
        brake.let(1)
        with client.stream("POST", f"{server.url}/v1/completions", json=body) as first:
            assert first.status_code == 200
            with ThreadPoolExecutor(1) as pool:
                wait_until(lambda: brake.is_held)
                second = pool.submit(server.post, "completions", {"prompt": "y"})
                wait_until(lambda: not server.backend._thread._commands.empty())
                brake.let(1)  # it is looked at between steps
                refused = second.result(WAIT_S)
            assert "and 0 wait, and there are" in _message(refused, 429)
            assert int(refused.headers["retry-after"]) >= 1
            brake.off()


def test_what_never_fits_a_row(served: Served) -> None:
    """Prevents: a text too large for any row told to come back later."""
    body = {"prompt": "x", "mode": "quadratic", "block_length": 200, "max_tokens": 2}
    assert "a row has" in _message(served.post("completions", body), 413)


def test_a_deadline(served: Served) -> None:
    """Prevents: a request that runs on after its time, alone or in a stream."""
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "timeout_s": 0.001}
    response = served.post("completions", body)
    assert _message(response, 504) == "the request's time was up"
    assert response.json()["error"]["code"] == "deadline"


def test_an_error_in_the_middle_of_a_stream(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents: a stream that breaks off and looks complete, to its reader or in the log."""
    caplog.set_level(logging.INFO, "trimode.serving.gate")
    server = serve()
    brake = Brake(server.backend._thread)
    body = {"prompt": "x", "max_tokens": 9, "regex": "a{9}", "mode": "ar", "stream": True}
    with httpx.Client(timeout=WAIT_S) as client:
        brake.let(1)
        with client.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            assert "text_completion" in next(lines)

            def broken() -> None:
                raise RuntimeError("planted")

            server.engine._admit = broken
            brake.off()
            rest = [line for line in lines if line]
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "[DONE]" not in rest[-1]
    wait_until(lambda: server.backend._jobs.num == 0 and _logged(caplog) != [])
    assert _logged(caplog) == [(200, "internal_error")]


def _logged(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str | None]]:
    """Status and code of requests that ended."""
    lines = [record.__dict__ for record in caplog.records if "status" in record.__dict__]
    return [(line["status"], line.get("code")) for line in lines if "/v1/" in line["args"][1]]


def test_without_a_chat_template(serve: Callable[..., Served], tiny_lm: TriModeLM) -> None:
    """Prevents: a chat refused without a word of how to have one."""
    server = serve()
    server.backend.card = dataclasses.replace(server.backend.card, has_chat=False)
    body = {"messages": [{"role": "user", "content": "x"}]}
    response = server.post("chat/completions", body)
    assert "`trimode serve smollm2`" in _message(response, 400)
    assert response.json()["error"]["param"] == "messages"


def test_why_no_requests_are_taken(serve: Callable[..., Served]) -> None:
    """Prevents: a server that broke down taken for one that shuts down."""
    server = serve()
    server.backend._thread._give_up(RuntimeError("planted"))
    for answer in (httpx.get(f"{server.url}/ready"), server.post("completions", {"prompt": "x"})):
        assert "the model broke down and takes no requests" in _message(answer, 503)


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_frees_its_row(serve: Callable[..., Served], is_stream: bool) -> None:
    """Prevents: rows held by texts that nobody reads."""
    server = serve()
    brake = Brake(server.backend._thread)
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": is_stream}
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n"
            b"content-length: " + str(len(content)).encode() + b"\r\n\r\n" + content
        )
        brake.let(2)
        wait_until(lambda: server.engine.num_running == 1)
    wait_until(lambda: server.backend._jobs.num == 0)
    assert server.samples()["trimode_aborted_total", "cancelled"] == 1
    num_forwards = server.engine.counts.forwards
    brake.let(1)  # the abort is obeyed behind the step that was held
    wait_until(lambda: server.engine.num_running == 0)
    assert server.engine.counts.forwards <= num_forwards + 2
    brake.off()


def test_the_metrics_tell_what_happened(serve: Callable[..., Served]) -> None:
    """Prevents: counters that nobody increments, and text that Prometheus cannot read."""
    server = serve()
    body = {"prompt": "abc", "max_tokens": 6, "ignore_eos": True, "mode": "linear"}
    used = server.post("completions", body).json()["usage"]["trimode"]
    server.post("completions", {"prompt": "x", "nothing": 1})
    found = server.samples()
    route = "/v1/completions"
    assert found["trimode_http_requests_total", route, "200"] == 1
    assert found["trimode_http_requests_total", route, "400"] == 1
    assert found["trimode_new_tokens_total", "linear"] == 6
    assert found["trimode_prompt_tokens_total", "linear"] == 3
    for kind in ("prefill", "verify"):
        assert found["trimode_forwards_total", "linear", kind] == used["forwards"][kind]
    assert found["trimode_engine_forwards_total",] == used["forwards"]["total"]
    assert found["trimode_tokens_per_forward_count", "linear"] == 1
    assert found["trimode_acceptance_length_count", "linear"] == used["forwards"]["verify"]
    assert found["trimode_time_to_first_token_seconds_count", "linear"] == 1
    assert (found["trimode_running",], found["trimode_waiting",]) == (0, 0)
    assert found["trimode_rows",] == 8
    assert found["trimode_aborted_total", "deadline"] == 0  # there before the first
    assert found["trimode_new_tokens_total", "ar"] == 0


def test_events_are_chunks_that_others_can_read(served: Served, tiny_lm: TriModeLM) -> None:
    """Prevents: events that break OpenAI's clients, or whose counts are not the usage's."""
    extra = {"mode": "linear", "events": True, "ignore_eos": True}
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        with client.completions.create(
            model="tiny",
            prompt="x",
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        ) as stream:
            chunks = list(stream)
    events = [c.model_extra["trimode_event"] for c in chunks if "trimode_event" in c.model_extra]
    assert {event["kind"] for event in events} == {"draft", "verify", "emit"}
    emitted = [event for event in events if event["kind"] == "emit"]
    assert emitted[0]["position"] == 0
    own = chunks[-1].usage.model_extra["trimode"]
    assert sum(len(event["token_ids"]) for event in emitted) == 8
    assert events[-1]["num_forwards"] == own["forwards"]["total"]
    wanted = tiny_lm.generate("x", max_new_tokens=8, mode="linear", ignore_eos=True)
    assert [i for event in emitted for i in event["token_ids"]] == wanted.token_ids
    drafts = [event for event in events if event["kind"] == "draft"]
    assert all(len(event["texts"]) == len(event["token_ids"]) for event in drafts)


def test_infill(served: Served, tiny_lm: TriModeLM) -> None:
    """Prevents: fills that are not `infill`'s, and gap markers in a given prompt taken for gaps."""
    body = {"text": "x = <FILL>\ny = <FILL>\n", "lengths": [1, 2], "seed": 3, "temperature": 0}
    answer = served.post("infill", body).json()
    wanted = tiny_lm.infill(body["text"], lengths=(1, 2), seed=3)
    assert answer["text"] == wanted.text
    assert [gap["start"] for gap in answer["gaps"]] == [gap.start for gap in wanted.gaps]
    best = wanted.gaps[0].candidates[0]
    assert answer["gaps"][0]["candidates"][0]["log_prob"] == pytest.approx(best.log_prob)
    assert answer["usage"]["trimode"]["forwards"]["total"] == wanted.stats.num_forwards
    around = {"prompt": "<FILL> = ", "suffix": "\n", "lengths": [1], "seed": 3}
    found = served.post("infill", around).json()
    assert len(found["gaps"]) == 1
    assert found["text"].startswith("<FILL> = ")
    assert "the text has no gap" in _message(served.post("infill", {"text": "x"}), 400)
    assert "allowed: text with <FILL>" in _message(served.post("infill", {}), 400)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served: Served) -> None:
    """Prevents: a stream that is not server-sent events to the byte."""
    body = '{"prompt": "x", "max_tokens": 3, "stream": true, "ignore_eos": true}'
    options = ["-sS", "-N", "--max-time", "30", "-H", "content-type: application/json", "-i"]
    done = subprocess.run(
        ["curl", *options, "-d", body, f"{served.url}/v1/completions"],
        capture_output=True,
        text=True,
        check=True,
    )
    head, _, events = done.stdout.partition("\r\n\r\n" if "\r\n\r\n" in done.stdout else "\n\n")
    assert "content-type: text/event-stream" in head.lower()
    lines = events.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-1])
    reasons = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in lines[:-1]]
    assert reasons[-1] == "length"
    assert not any(reasons[:-1])
