"""What clients send that is in no schema of OpenAI's: bodies, methods, paths, headers, codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.serving.conftest import WAIT_S, Served
from trimode.serving.settings import Settings

BODIES = json.loads((Path(__file__).parent / "clients" / "bodies.json").read_text("utf-8"))
STAINLESS = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-retry-count"


@pytest.mark.parametrize("sent", BODIES, ids=lambda sent: sent["client"])
def test_bodies_of_clients(served: Served, sent: dict[str, Any]) -> None:
    """Prevents: a program that cannot be pointed here for a field that asks for nothing."""
    body = {**sent["body"], "ignore_eos": True}
    if "model" in body:
        body["model"] = "tiny"
    url = f"{served.url}/{sent['path']}"
    answer = httpx.post(url, json=body, headers=sent["headers"], timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    if not body["stream"]:
        assert answer.json()["choices"][0]["message"]["content"]
        return
    *events, end = [one.removeprefix("data: ") for one in answer.text.split("\n\n") if one]
    assert end == "[DONE]"
    chunks = [json.loads(event) for event in events]
    reasons = [one["finish_reason"] for chunk in chunks for one in chunk["choices"]]
    assert reasons[-1] in ("stop", "length")
    assert not any(reasons[:-1])
    has_usage = bool(body.get("stream_options"))
    assert bool(chunks[-1].get("usage")) == has_usage
    assert [bool(chunk["choices"]) for chunk in chunks] == [
        *[True] * (len(chunks) - has_usage),
        *[False] * has_usage,
    ]


def test_a_window_counts_where_something_looks_through_it(served: Served) -> None:
    """Prevents: a penalty over the last 64 tokens that is one over the whole text."""
    body = {"prompt": "x", "max_tokens": 2, "repeat_last_n": 64}
    for more in ({}, {"frequency_penalty": 0.0, "presence_penalty": None}):
        assert served.post("completions", {**body, **more}).status_code == 200
    refused = served.post("completions", {**body, "frequency_penalty": 0.5})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "repeat_last_n"


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/tiny", "/metrics"])
def test_head_is_get_without_a_body(served: Served, path: str) -> None:
    """Prevents: a probe that takes a server for broken; a body that shifts the next answer."""
    with httpx.Client(base_url=served.url) as client:
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) > 0
        assert client.get("/health").json() == {"status": "ok"}
        assert client.head("/v1/completions").status_code == 405
        assert client.head("/nothing").status_code == 404


def test_a_slash_at_the_end(served: Served) -> None:
    """Prevents: a base URL that is joined in another way, and a model without a name."""
    body = {"prompt": "x", "max_tokens": 1}
    assert served.post("completions/", body).json()["object"] == "text_completion"
    assert httpx.get(f"{served.url}/v1/models/").json()["object"] == "list"
    assert httpx.get(f"{served.url}/v1/models/tiny/").json()["id"] == "tiny"
    assert httpx.get(f"{served.url}/health/").status_code == 404


def test_a_page_with_openai_s_own_client(serve: Callable[..., Served]) -> None:
    """Prevents: a page that is let in and whose client is not, for the headers that it adds."""
    server = serve(Settings(cors_origins=("https://good.example",)))
    for origin, status in (("https://good.example", 200), ("https://evil.example", 400)):
        headers = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": STAINLESS,
        }
        answer = httpx.options(f"{server.url}/v1/chat/completions", headers=headers)
        assert answer.status_code == status
        assert ("access-control-allow-origin" in answer.headers) == (status == 200)
    assert "access-control-allow-credentials" not in answer.headers


def test_too_long_has_a_code_and_words_that_clients_know(served: Served) -> None:
    """Prevents: a conversation that its client would cut, given up as a wrong request."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        for asked in ({"prompt": "x" * 600}, {"prompt": "x" * 300, "max_tokens": 300}):
            with pytest.raises(openai.BadRequestError, match="beyond the context of 512") as caught:
                client.completions.create(model="tiny", **asked)
            assert caught.value.code == "context_length_exceeded"
            assert "this model's maximum context length is 512 tokens" in caught.value.message
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt="x", extra_body={"block_length": 600})
        assert caught.value.code == "invalid_request"


def test_the_context_is_where_clients_look_for_it(served: Served) -> None:
    """Prevents: a client of vLLM that takes the context for not a number."""
    (model,) = httpx.get(f"{served.url}/v1/models").json()["data"]
    assert model["max_model_len"] == model["trimode"]["context_len"] == 512
