"""`POST /tokenize` and `/detokenize`: the tokens that a completion or a chat would feed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.serving.conftest import WAIT_S, Served
from trimode.serving.settings import Settings


def post(served: Served, path: str, body: Any, **options: Any) -> httpx.Response:
    """To the root, as vLLM has these routes."""
    return httpx.post(f"{served.url}/{path}", json=body, timeout=WAIT_S, **options)


def test_a_prompt_is_what_a_completion_feeds(pieces: Served, piece_tokenizer: Any) -> None:
    """Prevents: a count that is not the one a prompt is charged with."""
    text = "the cat [é]"
    found = post(pieces, "tokenize", {"model": "tiny", "prompt": text, "return_token_strs": True})
    ids = piece_tokenizer(text)["input_ids"]
    assert found.json() == {
        "tokens": ids,
        "count": len(ids),
        "max_model_len": 512,
        "token_strs": piece_tokenizer.convert_ids_to_tokens(ids),
    }
    body = {"prompt": text, "max_tokens": 1}
    usage = pieces.post("completions", body).json()["usage"]
    assert usage["prompt_tokens"] == found.json()["count"]
    bare = post(pieces, "tokenize", {"prompt": text, "add_special_tokens": False}).json()
    assert bare["tokens"] == ids[1:]
    assert bare["token_strs"] is None
    as_llama_cpp = post(pieces, "tokenize", {"content": text}).json()
    assert as_llama_cpp["tokens"] == ids[1:]
    back = post(pieces, "detokenize", {"tokens": ids}).json()
    assert back["prompt"] == back["content"] == piece_tokenizer.decode(ids)


def test_control_tokens_are_text_unless_asked_for(served: Served) -> None:
    """Prevents: other tokens than the same prompt has in a completion."""
    for special in (False, True):
        body = {"prompt": "a<|eos|>", "parse_special": special}
        ids = post(served, "tokenize", body).json()["tokens"]
        assert ids == ([97, 257] if special else list(b"a<|eos|>"))
        assert post(served, "detokenize", {"tokens": ids}).json()["prompt"] == "a<|eos|>"
    assert post(served, "tokenize", {"prompt": ""}).json()["tokens"] == []


def test_messages_are_what_a_chat_feeds(served: Served) -> None:
    """Prevents: a template that is applied in another way than the chat does."""
    messages = [{"role": "user", "content": "hi<|eos|>"}, {"role": "assistant", "content": "yes a"}]
    for kept in (messages[:1], messages):
        found = post(served, "tokenize", {"messages": kept}).json()
        usage = served.post("chat/completions", {"messages": kept, "max_tokens": 1}).json()["usage"]
        assert found["count"] == usage["prompt_tokens"]
    shut = post(served, "tokenize", {"messages": messages[:1], "add_generation_prompt": False})
    text = post(served, "detokenize", {"tokens": shut.json()["tokens"]}).json()["prompt"]
    assert text == "u:hi<|eos|><|eos|>"


@pytest.mark.parametrize(
    ("path", "body", "line", "param"),
    [
        ("tokenize", {}, "nothing given; allowed: prompt, or messages", "prompt"),
        ("tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt", ""),
        ("tokenize", {"prompt": 3}, "prompt is 3; allowed: a string", "prompt"),
        ("tokenize", {"prompt": "x", "tools": []}, "", ""),
        ("tokenize", {"prompt": "x", "enable_thinking": True}, "only with messages", ""),
        ("tokenize", {"prompt": "x", "temperature": 1}, '"temperature" is not a field', ""),
        ("tokenize", {"prompt": "x", "model": "other"}, 'model "other" is not served', "model"),
        (
            "detokenize",
            {"tokens": [1, 259]},
            "tokens has token id 259; allowed: 0 to 258",
            "tokens",
        ),
        ("detokenize", {"tokens": [-1]}, "tokens.0 is -1; allowed: at least 0", "tokens"),
        ("detokenize", {"tokens": "x"}, 'tokens is "x"; allowed: a list', "tokens"),
        ("detokenize", {"prompt": "x"}, "it is one of /v1/completions", ""),
    ],
)
def test_refusals(served: Served, path: str, body: Any, line: str, param: str) -> None:
    """Prevents: a server error, or a field that is taken and does nothing."""
    response = post(served, path, body)
    if "tools" in body:
        assert response.status_code == 200  # an empty list asks for nothing
        return
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    assert line in error["message"]
    assert error["param"] == param or not param


def test_a_model_without_a_template_says_so(pieces: Served) -> None:
    """Prevents: a traceback where there is no template."""
    response = post(pieces, "tokenize", {"messages": [{"role": "user", "content": "x"}]})
    assert response.status_code == 400
    assert "messages need a chat template" in response.json()["error"]["message"]


def test_the_same_doors(serve: Callable[..., Served]) -> None:
    """Prevents: a route that needs no key, or that no limit counts."""
    limited = serve(Settings(api_keys=("secret-key",), requests_per_minute=2, max_body_bytes=64))
    key = {"Authorization": "Bearer secret-key"}
    for path, body in (("tokenize", {"prompt": "x"}), ("detokenize", {"tokens": [1]})):
        assert post(limited, path, body).status_code == 401
    long = {"prompt": "x" * 80}
    assert post(limited, "tokenize", long, headers=key).status_code == 413
    assert post(limited, "tokenize", {"prompt": "x"}, headers=key).status_code == 200
    assert post(limited, "detokenize", {"tokens": [1]}, headers=key).status_code == 429
