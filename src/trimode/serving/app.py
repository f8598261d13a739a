"""The HTTP application: routes, doors and errors, over whatever backend runs the model."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from trimode._version import __version__
from trimode.serving.gate import Gate
from trimode.serving.http_metrics import HttpMetrics
from trimode.serving.jobs import Backend, Done, Failed, Happening, Job, Output, Tokenized
from trimode.serving.limits import ApiKeys, Concurrency, Hosts, RateLimit, read_body
from trimode.serving.openapi import describe, request_of, responses
from trimode.serving.refusals import Refusal, error_response
from trimode.serving.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    InfillRequest,
    TokenizeRequest,
)
from trimode.serving.settings import Settings
from trimode.serving.streaming import Answer, EventStream, chunks, run_all, until_gone, usage
from trimode.serving.tokenizing import tokens_job
from trimode.serving.translate import (
    Caller,
    chat_jobs,
    check_model,
    completion_jobs,
    infill_job,
    parse,
)

PAGE_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'; object-src 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

CLIENT_LEFT = 499
"""Noted for a request whose client left before there was an answer."""


def create_app(backend: Backend, settings: Settings) -> FastAPI:
    """The application. Nothing in it outlives it; the backend is the caller's to close."""
    server = _Server(backend, settings)
    app = FastAPI(
        title="trimode",
        version=__version__,
        description="OpenAI-compatible completions of a tri-mode language model.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    describe(app)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _no_such_route)
    _add_routes(app, server)
    _add_pages(app)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # OpenAI's client for pages sends eight of its own
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(
        Gate,
        metrics=server.metrics,
        backend=backend,
        hosts=None if settings.api_keys else Hosts(settings.allowed_hosts),
    )
    return app


class _Server:
    """What the routes share.

    Args:
        backend: Runs jobs.
        settings: What is allowed.
    """

    def __init__(self, backend: Backend, settings: Settings) -> None:
        self.backend = backend
        self.settings = settings
        self.keys = ApiKeys(settings.api_keys)
        self._rate = RateLimit(settings.requests_per_minute)
        self._concurrency = Concurrency(settings.max_concurrent, settings.max_concurrent_per_key)
        self.metrics = HttpMetrics(lambda: self._concurrency.num_active)
        self.started_s = int(time.time())

    async def completions(self, request: Request, chat: bool) -> Response:
        """`/v1/completions` and `/v1/chat/completions`."""
        caller = self._enter(request)
        is_over = True
        try:
            body = await read_body(request, settings=self.settings)
            asked: CompletionRequest | ChatRequest
            card = self.backend.card
            if chat:
                asked = parse(ChatRequest, body)
                check_model(asked.model, card)
                jobs = chat_jobs(asked, caller, settings=self.settings, card=card)
            else:
                asked = parse(CompletionRequest, body)
                check_model(asked.model, card)
                jobs = completion_jobs(asked, caller, settings=self.settings, card=card)
            request.scope["trimode"]["mode"] = jobs[0].options["mode"]
            options = asked.stream_options
            answer = Answer(
                "chat.completion" if chat else "text_completion",
                f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
                jobs,
                self.backend.card,
                n=asked.n or 1,
                has_usage=options is not None and options.include_usage,
            )
            updates = self.metrics.watched(run_all(self.backend, jobs), jobs)
            if not asked.stream:
                return await self._whole(request, updates, answer)
            first = await until_gone(request.receive, anext(updates))
            if first is None or isinstance(first[1], Failed):
                await updates.aclose()
                return _gone() if first is None else _failed(request, first[1])
            is_over = False
            return EventStream(
                chunks(_with_first(first, updates), answer),
                on_end=partial(self._end, request, caller, answer, updates),
            )
        finally:
            if is_over:
                self._concurrency.leave(caller.name)

    async def infill(self, request: Request) -> Response:
        """`/v1/infill`."""
        caller = self._enter(request)
        try:
            body = await read_body(request, settings=self.settings)
            asked = parse(InfillRequest, body)
            card = self.backend.card
            check_model(asked.model, card)
            job = infill_job(asked, caller, settings=self.settings)
            request.scope["trimode"]["mode"] = "infill"
            updates = run_all(self.backend, [job])
            last = await until_gone(request.receive, _last(updates))
            if not isinstance(last, Done):
                return _gone() if last is None else _failed(request, last)
            return JSONResponse(
                {
                    "id": f"infill-{secrets.token_hex(12)}",
                    "object": "infill",
                    "created": int(time.time()),
                    "model": card.name,
                    "text": last.text,
                    "gaps": list(last.gaps),
                    "usage": usage(
                        *([last], job, card),
                        prompt_tokens=last.prompt_tokens,
                        cached_tokens=last.stats.cached_tokens,
                    ),
                }
            )
        finally:
            self._concurrency.leave(caller.name)

    async def tokens(
        self, request: Request, kind: type[TokenizeRequest] | type[DetokenizeRequest]
    ) -> Response:
        """`/tokenize` and `/detokenize`."""
        caller = self._enter(request)
        try:
            body = await read_body(request, settings=self.settings)
            asked: TokenizeRequest | DetokenizeRequest
            if kind is TokenizeRequest:
                asked = parse(TokenizeRequest, body)
            else:
                asked = parse(DetokenizeRequest, body)
            card = self.backend.card
            check_model(asked.model, card)
            job = tokens_job(asked, caller)
            request.scope["trimode"]["mode"] = job.task
            found = await until_gone(request.receive, _tokenized(self.backend, job))
            if not isinstance(found, Tokenized):
                return _gone() if found is None else _failed(request, found)
            if isinstance(asked, DetokenizeRequest):
                return JSONResponse({"prompt": found.text, "content": found.text})
            names = list(found.names) if asked.return_token_strs else None
            return JSONResponse(
                {
                    "tokens": list(found.token_ids),
                    "count": len(found.token_ids),
                    "max_model_len": card.context_len,
                    "token_strs": names,
                }
            )
        finally:
            self._concurrency.leave(caller.name)

    def model_object(self) -> dict[str, Any]:
        """The model, as OpenAI lists one, and its card."""
        card = asdict(self.backend.card)
        name = card.pop("name")
        head = {"id": name, "object": "model", "created": self.started_s, "owned_by": "trimode"}
        # As vLLM has it: clients cut a conversation by it.
        return {**head, "max_model_len": card["context_len"], "trimode": card}

    def check_ready(self) -> None:
        """Requests are taken.

        Raises:
            Refusal: 503, and why not.
        """
        if (failed := self.backend.refusal) is not None:
            raise Refusal(failed)

    def _enter(self, request: Request) -> Caller:
        """Who asks, counted in; or a refusal."""
        client = self.keys.client(request)
        request.scope["trimode"]["client"] = client
        self.check_ready()
        self._rate.take(client)
        self._concurrency.enter(client)
        return Caller(request.scope["trimode"]["request_id"], client)

    async def _end(
        self,
        request: Request,
        caller: Caller,
        answer: Answer,
        updates: AsyncGenerator[tuple[int, Output], None],
    ) -> None:
        self._concurrency.leave(caller.name)
        _note_tokens(request, answer)
        await updates.aclose()  # what was never begun closes nothing that it was made of

    async def _whole(
        self,
        request: Request,
        updates: AsyncGenerator[tuple[int, Output], None],
        answer: Answer,
    ) -> Response:
        async def collect() -> Failed | Answer:
            async with aclosing(updates):
                async for index, update in updates:
                    if isinstance(update, Failed):
                        return update
                    if not isinstance(update, Happening):
                        answer.take(index, update)
            return answer

        result = await until_gone(request.receive, collect())
        if result is None:
            return _gone()
        if isinstance(result, Failed):
            return _failed(request, result)
        _note_tokens(request, answer)
        return JSONResponse(answer.whole())


def _add_routes(app: FastAPI, server: _Server) -> None:
    @app.get("/health", summary="Whether the process is alive", responses=responses())
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether requests are taken", responses=responses(503))
    async def ready() -> dict[str, str]:
        server.check_ready()
        return {"status": "ready"}

    @app.get(
        "/metrics",
        summary="Prometheus' text format",
        response_class=PlainTextResponse,
        responses=responses(401),
    )
    async def metrics(request: Request) -> Response:
        if not server.settings.has_open_metrics:
            server.keys.client(request)
        text = server.metrics.as_text() + server.backend.metrics()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", summary="The model that is served", responses=responses(401))
    async def models(request: Request) -> dict[str, Any]:
        server.keys.client(request)
        return {"object": "list", "data": [server.model_object()]}

    @app.get("/v1/models/{model:path}", summary="One model", responses=responses(401, 404))
    async def model(request: Request, model: str) -> dict[str, Any]:
        server.keys.client(request)
        check_model(model, server.backend.card)
        return server.model_object()

    @app.post("/v1/completions", **request_of(CompletionRequest, summary="Continue prompts"))
    async def completions(request: Request) -> Response:
        return await server.completions(request, chat=False)

    @app.post("/v1/chat/completions", **request_of(ChatRequest, summary="Answer a conversation"))
    async def chat(request: Request) -> Response:
        return await server.completions(request, chat=True)

    @app.post("/v1/infill", **request_of(InfillRequest, summary="Fill the gaps of a text"))
    async def infill(request: Request) -> Response:
        return await server.infill(request)

    @app.post("/tokenize", **request_of(TokenizeRequest, summary="Tokens of a text"))
    async def tokenize(request: Request) -> Response:
        return await server.tokens(request, TokenizeRequest)

    @app.post("/detokenize", **request_of(DetokenizeRequest, summary="Text of tokens"))
    async def detokenize(request: Request) -> Response:
        return await server.tokens(request, DetokenizeRequest)


def _add_pages(app: FastAPI) -> None:
    """The playground: a route for each of its files, so that no path is ever looked up."""
    folder = resources.files("trimode.serving") / "playground"
    if not folder.is_dir():
        return
    for file in folder.iterdir():
        kind = PAGE_TYPES.get("." + file.name.rpartition(".")[2])
        if kind is None:
            continue
        path = "/" if file.name == "index.html" else f"/{file.name}"

        app.add_api_route(path, partial(_page, str(file), kind), include_in_schema=False)


async def _page(file: str, kind: str) -> Response:
    return FileResponse(file, media_type=kind, headers=PAGE_HEADERS)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _failed(request, error.failed, headers=error.headers)


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = f"{request.method} {request.url.path}: {error.detail}"
    failed = Failed(status=error.status_code, code=code, message=message)
    return _failed(request, failed, headers=error.headers)


def _failed(
    request: Request, failed: Failed, *, headers: Mapping[str, str] | None = None
) -> Response:
    request.scope["trimode"]["code"] = failed.code  # for the log
    return error_response(failed, headers=headers)


async def _with_first(
    first: tuple[int, Output], rest: AsyncGenerator[tuple[int, Output], None]
) -> AsyncGenerator[tuple[int, Output], None]:
    async with aclosing(rest):
        yield first
        async for one in rest:
            yield one


async def _tokenized(backend: Backend, job: Job) -> Tokenized | Failed:
    last: object = None
    async for update in backend.run(job):
        last = update
    assert isinstance(last, Tokenized | Failed)
    return last


async def _last(updates: AsyncGenerator[tuple[int, Output], None]) -> Done | Failed:
    last: Output | None = None
    async with aclosing(updates):
        async for _, update in updates:
            last = update
    assert isinstance(last, Done | Failed)
    return last


def _gone() -> Response:
    return Response(status_code=CLIENT_LEFT)


def _note_tokens(request: Request, answer: Answer) -> None:
    """For the log, and what became of a stream, whose status says nothing of its end."""
    done = answer.done.values()
    if answer.failed is not None:
        request.scope["trimode"]["code"] = answer.failed.code
    elif len(done) < len(answer.jobs):
        request.scope["trimode"]["code"] = "client_left"
    request.scope["trimode"] |= {
        "prompt_tokens": sum(one.prompt_tokens for one in done),
        "new_tokens": sum(len(one.token_ids) for one in done),
    }
