"""The API under requests made from its own OpenAPI schema, valid ones and others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from trimode.runtime import TriModeLM
from trimode.serving.app import create_app
from trimode.serving.settings import Settings
from trimode.serving.worker import LocalBackend

pytestmark = pytest.mark.process

ROUTES = (
    *("GET /health", "GET /ready", "GET /metrics", "GET /v1/models", "GET /v1/models/{model}"),
    *("POST /v1/completions", "POST /v1/chat/completions", "POST /v1/infill"),
    *("POST /tokenize", "POST /detokenize"),
)


@pytest.fixture(scope="module")
def api(tiny_model: Callable[..., Any], byte_tokenizer: Any) -> Iterator[Any]:
    """The schema of the whole application over a tiny model, without a socket between."""
    lm = TriModeLM(tiny_model(torch.float32), byte_tokenizer)
    backend = LocalBackend(lm, name="tiny", num_rows=4, context_len=128)
    doors = Settings(allowed_hosts=("*",))  # it asks as `testserver`
    yield schemathesis.openapi.from_asgi("/openapi.json", create_app(backend, doors))
    asyncio.run(backend.close(timeout_s=0))


def test_all_routes_are_fuzzed(api: Any) -> None:
    """Prevents: a new route that nobody fuzzes."""
    assert {operation.ok().label for operation in api.get_all_operations()} == set(ROUTES)


@pytest.mark.parametrize(
    ("route", "mode"),
    [(route, GenerationMode.POSITIVE) for route in ROUTES]
    + [(route, GenerationMode.NEGATIVE) for route in ROUTES if route.startswith("POST")],
)
def test_every_answer_is_one_that_the_schema_allows(
    api: Any, route: str, mode: GenerationMode
) -> None:
    """Prevents: a server error for some request; a status, a type or a body that the schema does
    not have; a request taken that the schema refuses."""
    method, path = route.split(" ")
    operation = api[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    def check(case: schemathesis.Case) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body.pop("timeout_s", None)  # how long this machine takes, no schema can say
        # What fields allow of each other, and what fits this model, no schema can say.
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()
