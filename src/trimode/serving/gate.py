"""What every request passes on its way in and out: an id, a log line, a count, a last resort."""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimode.serving.http_metrics import HttpMetrics
from trimode.serving.jobs import Backend, Failed
from trimode.serving.limits import Hosts
from trimode.serving.logs import request_id, sane_request_id
from trimode.serving.refusals import Refusal, error_response

logger = logging.getLogger(__name__)

BROKE_DOWN = Failed(status=500, code="internal_error", message="the server broke down; see its log")


class Gate:
    """Pure ASGI, outermost.

    Args:
        app: What is behind it.
        metrics: Counted in.
        backend: Once it takes no more jobs, connections are closed after each answer.
        hosts: Under which names it may be asked; None for any.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: HttpMetrics, backend: Backend, hosts: Hosts | None
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._backend = backend
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass it on, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _as_routed(scope)
        own_id = sane_request_id(Headers(scope=scope).get("x-request-id"))
        token = request_id.set(own_id)
        scope["trimode"] = {"request_id": own_id}
        started_s, status = time.perf_counter(), 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message["headers"] if "headers" in message else [])
                headers["X-Request-Id"] = own_id
                headers["X-Content-Type-Options"] = "nosniff"
                if not self._backend.is_ready:
                    headers["Connection"] = "close"
                message = {**message, "headers": headers.raw}
            await send(message)

        try:
            if self._hosts is not None:
                self._hosts.check(Headers(scope=scope).get("host"))
            await self._app(scope, receive, send_on)
        except Refusal as refusal:
            scope["trimode"]["code"] = refusal.failed.code
            await error_response(refusal.failed)(scope, receive, send_on)
        except ClientDisconnect:
            status = status or 499
        except asyncio.CancelledError:  # by a second signal
            scope["trimode"]["code"] = "cut_off"
            raise
        except Exception:
            logger.exception("request failed")
            scope["trimode"]["code"] = BROKE_DOWN.code
            if status:  # half an answer cannot be taken back; the connection ends without its end
                return
            await error_response(BROKE_DOWN)(scope, receive, send_on)
        finally:
            self._note(scope, status, time.perf_counter() - started_s)
            request_id.reset(token)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.note(route, status, seconds)
        level = logging.DEBUG if route in ("/health", "/ready", "/metrics") else logging.INFO
        facts = {name: fact for name, fact in scope["trimode"].items() if name != "request_id"}
        logger.log(
            level,
            "%s %s",
            scope["method"],
            route,
            extra={"status": status, "seconds": round(seconds, 6), **facts},
        )


def _as_routed(scope: Scope) -> Scope:
    """A request as the routes have it: HEAD is GET (the server sends no body to it), and a path of
    the API may end with a slash."""
    method = "GET" if scope["method"] == "HEAD" else scope["method"]
    path = scope["path"].rstrip("/") if scope["path"].startswith("/v1/") else scope["path"]
    return {**scope, "method": method, "path": path}
