"""What clients of other servers send along: taken where it asks for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import Served
from trimode.checkpoint.generation_defaults import GenerationDefaults
from trimode.runtime import Generation, TriModeLM
from trimode.serving.foreign_fields import IGNORED, NEUTRAL_OF_CHATS, NEUTRAL_OF_COMPLETIONS
from trimode.serving.jobs import ModelCard
from trimode.serving.schemas import ChatRequest, CompletionRequest
from trimode.serving.settings import Settings
from trimode.serving.translate import Caller, completion_jobs

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"

LLAMA_CPP = {
    **{"top_k": 0, "min_p": 0, "repeat_penalty": 1.0, "typical_p": 1.0, "tfs_z": 1, "mirostat": 0},
    **{"mirostat_tau": 5.0, "mirostat_eta": 0.1, "xtc_probability": 0, "xtc_threshold": 0.1},
    **{"dry_multiplier": 0.0, "dry_base": 1.75, "dynatemp_range": 0.0, "dynatemp_exponent": 1.0},
    **{"n_probs": 0, "min_keep": 0, "id_slot": -1, "cache_prompt": True, "logit_bias": []},
    **{"grammar": "", "seed": -1, "frequency_penalty": 0, "presence_penalty": 0.0},
    **{"stop": [], "top_n_sigma": -1, "penalize_nl": False, "timings_per_token": False},
}
VLLM = {
    **{"n": 1, "best_of": 1, "use_beam_search": False, "top_k": -1, "min_p": 0.0},
    **{"repetition_penalty": 1.0, "length_penalty": 1.0, "stop_token_ids": [], "min_tokens": 0},
    **{"include_stop_str_in_output": False, "ignore_eos": False, "skip_special_tokens": True},
    **{"spaces_between_special_tokens": True, "truncate_prompt_tokens": None, "bad_words": []},
    **{"prompt_logprobs": None, "allowed_token_ids": None, "guided_json": None, "priority": 0},
    **{"logit_bias": {}, "stop": None, "echo": False, "temperature": 1e-7, "cache_salt": None},
    **{"return_tokens_as_token_ids": False, "logits_processors": None, "user": ""},
}
OPENAI = {
    **{"metadata": {"a": "b"}, "prompt_cache_key": "k", "service_tier": "flex", "store": False},
    **{"frequency_penalty": 0.0, "presence_penalty": 0, "safety_identifier": "u"},
    **{"prompt_cache_retention": "24h", "cache_control": {"type": "ephemeral"}},
}
CHAT = {
    **{"tools": [], "tool_choice": "none", "parallel_tool_calls": True, "logprobs": False},
    **{"reasoning_effort": "none", "top_logprobs": 0, "add_generation_prompt": True},
    **{"chat_template_kwargs": {}, "continue_final_message": False, "include_reasoning": True},
    **{"separate_reasoning": True, "stream_reasoning": True, "add_special_tokens": False},
    **{"verbosity": "medium", "modalities": ["text"], "max_completion_tokens": -1},
}


@pytest.mark.parametrize("fields", [LLAMA_CPP, VLLM, OPENAI], ids=["llama.cpp", "vLLM", "OpenAI"])
def test_fields_of_other_servers_that_ask_for_nothing(
    served: Served, fields: dict[str, Any]
) -> None:
    """Prevents: clients refused that send all that they know, and a text changed by `nothing`."""
    base = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    body = {"prompt": "x", **base}
    plain = served.post("completions", body).json()["choices"][0]["text"]
    found = served.post("completions", {**body, "suffix": "", **fields})
    assert found.status_code == 200, found.text
    if not fields.get("ignore_eos", True):
        body |= {"ignore_eos": False}
        plain = served.post("completions", body).json()["choices"][0]["text"]
    assert found.json()["choices"][0]["text"] == plain
    content = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]
    chat = {"messages": [{"role": "user", "content": content, "cache_control": None}], **base}
    found = served.post("chat/completions", {**chat, **CHAT, **fields})
    assert found.status_code == 200, found.text


def test_an_off_of_a_request_wins_over_the_model_s_own() -> None:
    """Prevents: `top_k: 0` taken for a field that is left open, as null is."""
    body = CompletionRequest.model_validate({"prompt": "x", "top_k": 0, "min_p": 0})
    own = GenerationDefaults(top_k=3, min_p=0.1, temperature=0.5)
    caller = Caller(request_id="r", name="n")
    sizes = {"block_length": 8, "context_len": 64, "num_parameters": 1}
    flags = {"has_chat": False, "has_drafter": False}
    card = ModelCard(name="m", modes=("ar",), generation_defaults=own, **sizes, **flags)
    [job] = completion_jobs(body, caller, settings=Settings(), card=card)
    assert {name: job.options[name] for name in ("top_k", "min_p", "temperature")} == {
        "top_k": 0,
        "min_p": 0,
        "temperature": 0.5,
    }


@pytest.mark.parametrize("given", [{"cache_salt": "s"}, {"cache_prompt": False}], ids=str)
@pytest.mark.parametrize("route", ["completions", "chat/completions", "infill"])
def test_what_would_part_the_cache(served: Served, route: str, given: dict[str, Any]) -> None:
    """Prevents: a client that asks for a cache of its own, and shares its prompt unawares."""
    bodies: dict[str, dict[str, Any]] = {
        "completions": {"prompt": "x"},
        "chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "infill": {"text": "a<FILL>b"},
    }
    found = served.post(route, bodies[route] | given)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["param"] == next(iter(given))
    assert "which is not supported; allowed: null" in error["message"]


@pytest.mark.parametrize(
    "given",
    [
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"min_p": 0.9},
        {"min_tokens": 20},
        {"top_k": 2, "temperature": 1e-7},
    ],
    ids=str,
)
def test_new_fields_reach_the_text(
    served: Served, tiny_lm: TriModeLM, given: dict[str, Any]
) -> None:
    """Prevents: a field that is checked and dropped."""
    law: dict[str, Any] = {"seed": 3, "ignore_eos": True, "stop_token_ids": [99]}
    bias = {120: 9.0, 121: 8.0, 122: 7.0, 99: 6.0}  # of which the text has many
    spelled = {str(token_id): value for token_id, value in bias.items()}
    body = {"prompt": "q", "max_tokens": 24, "logit_bias": spelled, **law}
    found, plain = (
        served.post("completions", body | more).json()["choices"][0]["text"] for more in (given, {})
    )
    options = {"temperature": 1.0, **law, **given}
    expected = tiny_lm.generate("q", max_new_tokens=24, logit_bias=bias, **options)
    assert isinstance(expected, Generation)
    assert found == expected.text != plain
    chat = {"messages": [{"role": "user", "content": "q"}], **body}
    del chat["prompt"]
    assert served.post("chat/completions", chat | given).status_code == 200


def test_a_field_is_ours_or_another_s() -> None:
    """Prevents: a field that is supported by now and still refused, or used and called ignored."""
    for kind in (CompletionRequest, ChatRequest):
        names = [*kind.model_fields, *kind.NEUTRAL, *kind.IGNORED]
        assert len(names) == len(set(names))
        assert set(kind.AS_NULL) <= set(kind.model_fields)


def test_the_page_names_them_all() -> None:
    """Prevents: a field that is dropped without a word anywhere."""
    text = PAGE.read_text("utf-8")
    names = {*IGNORED, *NEUTRAL_OF_CHATS, *NEUTRAL_OF_COMPLETIONS}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []
