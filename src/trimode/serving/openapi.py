"""The application's own description at /openapi.json: true to what the routes take and answer."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from trimode.serving.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    InfillRequest,
    TokenizeRequest,
)

_TEMPLATE = "#/components/schemas/{model}"
_WHY = {
    400: "The request is wrong; the message names the field, its value and what is allowed",
    401: "No valid API key",
    403: "Asked under a name that is not allowed here",
    404: "No such model",
    405: "No such method here",
    408: "The body came too slowly",
    413: "The body, or the text asked for, never fits",
    415: "The body is not application/json",
    429: "Not now; Retry-After says when",
    500: "The model or the server broke down",
    503: "Shutting down",
    504: "The request's time was up",
}
_OF_A_JOB = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)

_NULLABLE_TEXT = {"type": ["string", "null"]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": _NULLABLE_TEXT,
                "code": _NULLABLE_TEXT,
            },
        }
    },
}
_USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens", "trimode"],
    "properties": {
        "prompt_tokens": {"type": "integer"},
        "completion_tokens": {"type": "integer"},
        "total_tokens": {"type": "integer"},
        "prompt_tokens_details": {
            "type": "object",
            "required": ["cached_tokens"],
            "properties": {"cached_tokens": {"type": "integer"}},
        },
        "trimode": {"type": "object", "required": ["mode", "seed", "forwards"]},
    },
}


_TOKENS = {
    "type": "object",
    "required": ["tokens", "count", "max_model_len", "token_strs"],
    "properties": {
        "tokens": {"type": "array", "items": {"type": "integer"}},
        "count": {"type": "integer"},
        "max_model_len": {"type": "integer"},
        "token_strs": {"type": ["array", "null"], "items": {"type": "string"}},
    },
}
_TEXT = {
    "type": "object",
    "required": ["prompt", "content"],
    "properties": {"prompt": {"type": "string"}, "content": {"type": "string"}},
}


def _object(properties: dict[str, Any], *, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "required": required, "properties": properties}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_STRING, _INTEGER, _NUMBER, _NULL = ({"type": x} for x in ("string", "integer", "number", "null"))
_FUNCTION = {"name": _STRING, "arguments": {**_STRING, "description": "a JSON object"}}
_CALL = {"id": _STRING, "type": {"const": "function"}, "function": _object(_FUNCTION)}
_MESSAGE = {
    "role": {"const": "assistant"},
    "content": {**_NULLABLE_TEXT, "description": "null where there is nothing beside tool_calls"},
    "refusal": _NULL,
    "tool_calls": {**_list(_object(_CALL)), "minItems": 1},
}
_TOKEN = {"token": _STRING, "bytes": _list(_INTEGER), "logprob": _or_null(_NUMBER)}
_CHAT_CHOICE = _object(
    {
        "index": _INTEGER,
        "message": _object(_MESSAGE, optional=("tool_calls",)),
        "logprobs": _or_null(
            _object(
                {
                    "content": _list(_object({**_TOKEN, "top_logprobs": _list(_object(_TOKEN))})),
                    "refusal": _NULL,
                }
            )
        ),
        "finish_reason": {"enum": ["stop", "length", "tool_calls"]},
    }
)
_CHOICE = _object(
    {
        "index": _INTEGER,
        "text": _STRING,
        "logprobs": _or_null(
            _object(
                {
                    "tokens": _list(_STRING),
                    "token_logprobs": _list(_or_null(_NUMBER)),
                    "top_logprobs": _list(
                        _or_null({"type": "object", "additionalProperties": _NUMBER})
                    ),
                    "text_offset": _list(_INTEGER),
                }
            )
        ),
        "finish_reason": {"enum": ["stop", "length"]},
    }
)
_CHOICES = {ChatRequest: _CHAT_CHOICE, CompletionRequest: _CHOICE}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Errors that a route may answer with."""
    body = {"application/json": {"schema": {"$ref": _TEMPLATE.format(model="Error")}}}
    return {status: {"description": _WHY[status], "content": body} for status in statuses}


def request_of(kind: type[BaseModel], *, summary: str) -> dict[str, Any]:
    """Arguments of a route that takes `kind` and answers by jobs."""
    content: dict[str, Any] = {
        "application/json": {
            "schema": {"$ref": _TEMPLATE.format(model=_answer_name(kind))},
        }
    }
    if kind in (CompletionRequest, ChatRequest):
        content["text/event-stream"] = {"schema": {"type": "string"}}
    body = {"application/json": {"schema": {"$ref": _TEMPLATE.format(model=kind.__name__)}}}
    return {
        "summary": summary,
        "responses": {
            200: {"description": "The answer", "content": content},
            **responses(*_OF_A_JOB),
        },
        "openapi_extra": {"requestBody": {"required": True, "content": body}},
    }


def describe(app: FastAPI) -> None:
    """Have `app` describe itself with the schemas that its routes name."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _described(app: FastAPI) -> dict[str, Any]:
    schema = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    kinds: list[type[BaseModel]] = [
        *(CompletionRequest, ChatRequest, InfillRequest, TokenizeRequest, DetokenizeRequest)
    ]
    _, own = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_TEMPLATE)
    schemas = {**own["$defs"], "Error": _ERROR, "Usage": _USAGE}
    for kind in kinds:
        schemas[_answer_name(kind)] = _answer_schema(kind)
        for name, values in getattr(kind, "NEUTRAL", {}).items():
            schemas[kind.__name__]["properties"][name] = {"enum": [None, *values]}
        for name in getattr(kind, "IGNORED", ()):
            schemas[kind.__name__]["properties"][name] = {"description": "taken and not used"}
    schema["components"] = {
        "schemas": schemas,
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    schema["security"] = [{}, {"key": []}]
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # FastAPI's own, never sent
            operation["responses"] |= {"403": responses(403)[403]}
    return schema


def _answer_name(kind: type[BaseModel]) -> str:
    return kind.__name__.replace("Request", "Answer")


def _answer_schema(kind: type[BaseModel]) -> dict[str, Any]:
    if kind is TokenizeRequest:
        return _TOKENS
    if kind is DetokenizeRequest:
        return _TEXT
    body = "gaps" if kind is InfillRequest else "choices"
    return {
        "type": "object",
        "required": ["id", "object", "created", "model", body, "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"type": "string"},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            body: {"type": "array", "items": _CHOICES.get(kind, {"type": "object"})},
            "usage": {"$ref": _TEMPLATE.format(model="Usage")},
        },
    }
