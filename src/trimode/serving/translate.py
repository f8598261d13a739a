"""A request's bytes as checked fields, and its fields as jobs. Every refusal is one line that names
the field."""

from __future__ import annotations

import difflib
import json
import re
import secrets
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import pydantic_core
from pydantic import BaseModel, ValidationError

from trimode.checkpoint.generation_defaults import GenerationDefaults
from trimode.serving.chat_fields import chat_options, messages_of
from trimode.serving.echo_fields import add_echo
from trimode.serving.foreign_fields import WINDOWS
from trimode.serving.jobs import Failed, Job, ModelCard
from trimode.serving.refusals import Refusal, bad_request
from trimode.serving.schemas import (
    OURS,
    OURS_OF_INFILL,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    InfillRequest,
    TokenizeRequest,
)
from trimode.serving.settings import Settings

DEFAULT_COMPLETION_TOKENS = 16
DEFAULT_TEMPERATURE = 1.0
ROUTES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/infill": InfillRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
CLOSE = 0.85
"""How alike names must be for one to be taken for a slip of the other: not top_a."""

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_MEANT = {
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "min_new_tokens": "min_tokens",
}
_PLAIN = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "string_too_short": "a string that is not empty",
    "list_type": "a list",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "none_required": "null",
}
"""Kinds of pydantic's errors -> what is allowed."""
R = TypeVar("R", CompletionRequest, ChatRequest, InfillRequest, TokenizeRequest, DetokenizeRequest)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        request_id: Of the request.
        name: The client, by its key or its address.
    """

    request_id: str
    name: str


def parse(kind: type[R], body: bytes) -> R:
    """A body as a request.

    Raises:
        Refusal: 400, naming the field.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise bad_request(
            f"the body is not valid UTF-8: byte 0x{body[error.start]:02x} at offset {error.start}"
        ) from None
    fields = _from_json(text)
    if not isinstance(fields, dict):
        raise bad_request(f"the body is {_shown(fields)}; allowed: a JSON object")
    fields = _without_neutral(kind, fields)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _refusal(kind, error) from None


def completion_jobs(
    request: CompletionRequest,
    caller: Caller,
    *,
    settings: Settings,
    card: ModelCard,
) -> list[Job]:
    """A job for each choice: all of the first prompt, then of the second, and so on.

    Args:
        request: Checked.
        caller: Who asks.
        settings: Of the server.
        card: Of the model, for what the request leaves open.

    Raises:
        Refusal: 400, naming the field.
    """
    prompts: list[Any] = [request.prompt]
    if isinstance(request.prompt, list) and request.prompt:
        is_many = not isinstance(request.prompt[0], int)
        prompts = request.prompt if is_many else [request.prompt]
    if not request.prompt and not isinstance(request.prompt, str):
        raise bad_request('prompt is []; allowed: "" for an empty prompt', param="prompt")
    options = _options(request, card)
    number, usual = request.max_tokens, _usual(card.generation_defaults, settings)
    if number is None and usual is None:
        number = min(DEFAULT_COMPLETION_TOKENS, settings.max_output_tokens or sys.maxsize)
    if number is not None:
        options["max_new_tokens"] = _max_tokens("max_tokens", number, settings=settings)
    for name in ("heal", "parse_special", "logprobs"):
        if (value := getattr(request, name)) is not None:
            options[name] = value
    add_echo(request, options)
    names = {"inputs": "prompt", "max_new_tokens": "max_tokens", "prompt_logprobs": "logprobs"}
    return _jobs(
        "generate",
        prompts,
        request,
        options=options,
        usual=usual,
        names=names,
        caller=caller,
        settings=settings,
    )


def chat_jobs(
    request: ChatRequest, caller: Caller, *, settings: Settings, card: ModelCard
) -> list[Job]:
    """A job for each choice; arguments as of `completion_jobs`.

    Raises:
        Refusal: 400, naming the field.
    """
    options = _options(request, card)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise bad_request(
            "max_tokens and max_completion_tokens are given; allowed: one of them",
            param="max_tokens",
        )
    names = {"inputs": "messages"}
    for name in ("max_tokens", "max_completion_tokens"):
        if (number := getattr(request, name)) is not None:
            options["max_new_tokens"] = _max_tokens(name, number, settings=settings)
            names["max_new_tokens"] = name
    if request.top_logprobs and not request.logprobs:
        raise bad_request(
            f"top_logprobs is {request.top_logprobs}; allowed: only with logprobs true",
            param="top_logprobs",
        )
    if request.logprobs:
        options["logprobs"] = request.top_logprobs or 0
        names["logprobs"] = "logprobs" if request.top_logprobs is None else "top_logprobs"
    if form := _format(request):
        options |= form
        names["json_schema"] = "response_format"
    options |= chat_options(request)
    if request.enable_thinking is None:
        names["enable_thinking"] = "chat_template_kwargs.enable_thinking"
    if "forced_call" in options:
        names["json_schema"] = "tools"
    return _jobs(
        "chat",
        [messages_of(request)],
        request,
        options=options,
        usual=_usual(card.generation_defaults, settings),
        names=names,
        caller=caller,
        settings=settings,
    )


def infill_job(request: InfillRequest, caller: Caller, *, settings: Settings) -> Job:
    """The one job.

    Raises:
        Refusal: 400, naming the field.
    """
    options = {
        name: value for name in OURS_OF_INFILL if (value := getattr(request, name)) is not None
    }
    if request.temperature is not None:
        options["temperature"] = request.temperature
    text = request.text
    if (text is None) == (request.prompt is None):
        raise bad_request(
            "allowed: text with <FILL> for every gap, or prompt and suffix", param="text"
        )
    if text is None:
        assert request.prompt is not None
        text = request.prompt + (request.suffix or "")
        options["spans"] = [(len(request.prompt), len(request.prompt))]
    elif request.suffix is not None:
        raise bad_request("suffix is given beside text; allowed: with prompt", param="suffix")
    return Job(
        request_id=caller.request_id,
        task="infill",
        inputs=text,
        options=options,
        client=caller.name,
        timeout_s=_timeout(request.timeout_s, settings),
        names={"inputs": "text" if request.prompt is None else "prompt"},
    )


def check_model(name: str | None, card: ModelCard) -> None:
    """A request's `model` is the one that is served; it is a name and never opened.

    Raises:
        Refusal: 404.
    """
    if name is not None and name != card.name:
        message = f"model {_shown(name)} is not served; there is {card.name!r}"
        raise Refusal(Failed(status=404, code="model_not_found", message=message, param="model"))


def _usual(defaults: GenerationDefaults, settings: Settings) -> int | None:
    """New tokens of a request that says nothing, if the model says something."""
    own = defaults.max_new_tokens
    return None if own is None else min(own, settings.max_output_tokens or sys.maxsize)


def _options(request: CompletionRequest | ChatRequest, card: ModelCard) -> dict[str, Any]:
    """Arguments of `TriModeLM.generate` that a request gives, and those that the model does."""
    names = (*OURS, "temperature")
    options = {name: value for name in names if (value := getattr(request, name)) is not None}
    laws = card.generation_defaults.fill(options)
    options = {"mode": card.default_mode, "temperature": DEFAULT_TEMPERATURE, **laws}
    if request.logit_bias is not None:
        options["logit_bias"] = {
            _token_id(token_id): value for token_id, value in request.logit_bias.items()
        }
    if request.stream_options is not None and not request.stream:
        raise bad_request(
            "stream_options is given; allowed: only with stream true", param="stream_options"
        )
    if request.events and not request.stream:
        raise bad_request("events is true; allowed: only with stream true", param="events")
    return options


def _jobs(
    task: str,
    inputs: list[Any],
    request: CompletionRequest | ChatRequest,
    *,
    options: dict[str, Any],
    usual: int | None,
    names: Mapping[str, str],
    caller: Caller,
    settings: Settings,
) -> list[Job]:
    n = request.n or 1
    if n * len(inputs) > settings.max_choices:
        raise bad_request(
            f"{len(inputs)} prompts with n={n} are {n * len(inputs)} texts; allowed:"
            f" {settings.max_choices} in one request",
            param="n",
        )
    seed = secrets.randbits(32) if request.seed is None else request.seed
    if seed + n > 2**64:
        raise bad_request(f"seed is {seed}; allowed with n={n}: at most {2**64 - n}", param="seed")
    return [
        Job(
            request_id=caller.request_id,
            task=task,
            inputs=one,
            options={**options, "seed": seed + choice},
            usual_new_tokens=usual,
            client=caller.name,
            timeout_s=_timeout(request.timeout_s, settings),
            wants_events=bool(request.events),
            wants_word=n * len(inputs) > 1,
            wants_prompt=bool(getattr(request, "echo", None)),
            wants_logprobs=request.logprobs is not None and request.logprobs is not False,
            names=names,
        )
        for one in inputs
        for choice in range(n)
    ]


def _format(request: ChatRequest) -> dict[str, Any]:
    """`response_format` as an argument."""
    wanted = request.response_format
    if wanted is None:
        return {}
    if wanted.json_schema is not None and wanted.type != "json_schema":
        raise bad_request(
            f"response_format.json_schema is given; allowed: none with type {wanted.type!r}",
            param="response_format",
        )
    if wanted.type == "text":
        return {}
    names = ("json_schema", "regex", "grammar")
    given = [name for name in names if getattr(request, name) is not None]
    if given:
        raise bad_request(
            f"response_format is given beside {given[0]}; allowed: one of them",
            param="response_format",
        )
    if wanted.type == "json_object":
        return {"json_schema": {"type": "object"}}
    if wanted.json_schema is None:
        raise bad_request(
            "response_format.json_schema is missing; type 'json_schema' needs it",
            param="response_format",
        )
    return {"json_schema": wanted.json_schema.schema_}


def _max_tokens(name: str, number: int, *, settings: Settings) -> int:
    most = settings.max_output_tokens
    if most is not None and number > most:
        raise bad_request(f"{name} is {number}; allowed here: at most {most}", param=name)
    return number


def _timeout(given: float | None, settings: Settings) -> float:
    if given is not None and given > settings.timeout_s:
        raise bad_request(
            f"timeout_s is {given:g}; allowed here: at most {settings.timeout_s:g}",
            param="timeout_s",
        )
    return settings.timeout_s if given is None else given


def _token_id(word: str) -> int:
    if not _TOKEN_ID.fullmatch(word):  # one way to write each, or one of two would be lost
        raise bad_request(
            f"logit_bias has {_shown(word)}; allowed: token ids as keys", param="logit_bias"
        )
    return int(word)


def _without_neutral(kind: type[R], fields: dict[str, Any]) -> dict[str, Any]:
    """Without what asks for nothing here, in the words of other servers."""
    known = dict.fromkeys(kind.model_fields)
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if name in known:
            if not any(_is_same(value, one) for one in kind.AS_NULL.get(name, ())):
                kept[name] = value
        elif name in WINDOWS and not any(fields.get(one) for one in WINDOWS[name]):
            continue
        elif name in kind.NEUTRAL:
            values: tuple[Any, ...] = kind.NEUTRAL[name]
            if value is not None and not any(_is_same(value, one) for one in values):
                allowed = ", ".join(["null", *map(_shown, values)])
                raise bad_request(
                    f"{name} is {_shown(value)}, which is not supported; allowed: {allowed}",
                    param=name,
                )
        elif name not in kind.IGNORED:
            raise bad_request(
                f"{_shown(name)} is not a field of this request{_hint(name, known)}",
                param=name[:60],
            )
    return kept


def _hint(name: str, known: Mapping[str, Any]) -> str:
    """What may have been meant by a field that a request does not have."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=CLOSE)
    if _MEANT.get(name) in known:
        close = [_MEANT[name]]
    if close:
        return f"; did you mean {close[0]}?"
    routes = [route for route, kind in ROUTES.items() if name in kind.model_fields]
    return f"; it is one of {' and '.join(routes)}" if routes else ""


def _from_json(text: str) -> Any:
    try:
        value = pydantic_core.from_json(text, allow_inf_nan=False)
        json.loads(text, object_pairs_hook=_each_key_once)
    except ValueError as error:
        raise bad_request(f"the body is not valid JSON: {error}") from None
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> None:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name, number in Counter(names).items() if number > 1)
        raise bad_request(f"the body has {_shown(twice)} twice; allowed: once", param=twice[:60])


def _is_same(value: Any, neutral: Any) -> bool:
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


def _refusal(kind: type[BaseModel], error: ValidationError) -> Refusal:
    """The first thing that is wrong. Where a field may be of several kinds, its description says
    which."""
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0])
    if first["type"] in ("missing", "extra_forbidden"):
        path = ".".join(map(_word, first["loc"]))
        wrong = "missing" if first["type"] == "missing" else "not a field of this request"
        return bad_request(f"{path} is {wrong}", param=field)
    places = [part for part in first["loc"] if not _is_branch(part)]
    path = ".".join(map(_word, places))
    allowed = first["msg"].removeprefix("Input should be ")
    if first["type"] in _PLAIN:
        context = first.get("ctx", {}).items()
        bounds = {name: f"{x:g}" if isinstance(x, float) else x for name, x in context}
        allowed = _PLAIN[first["type"]].format(**bounds)
    allowed = {"True": "true", "False": "false", "None": "null"}.get(allowed, allowed)
    description = _description(kind, places)
    if len(places) < len(first["loc"]) and description is not None:
        allowed = description
    return bad_request(f"{path} is {_shown(first['input'])}; allowed: {allowed}", param=field)


def _description(kind: type[BaseModel], places: list[int | str]) -> str | None:
    """Of the innermost field on the way to a place."""
    found: str | None = None
    inner: type[BaseModel] | None = kind
    for part in places:
        fields = {} if inner is None else inner.model_fields
        field = next((one for name, one in fields.items() if part in (name, one.alias)), None)
        if field is not None:
            found, inner = field.description, _model_in(field.annotation)
    return found


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field's type is made with, if it is."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _word(part: int | str) -> str:
    """A part of a path; where it is a user's own word, it is shown as one."""
    text = str(part)
    return text if text.isidentifier() or text.isdecimal() else _shown(text)


def _is_branch(part: int | str) -> bool:
    """Whether a part of an error's place names a branch of a union rather than a field."""
    return isinstance(part, str) and (
        part in ("str", "bool", "int", "constrained-str") or "[" in part
    )


def _shown(value: Any) -> str:
    text = pydantic_core.to_json(value).decode()
    return text if len(text) <= 60 else f"{text[:57]}..."
