"""uvicorn with our way to end (refuse at once, let what runs finish, stop; exit 0), and with an end
for connections on which nothing moves."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from trimode.errors import ConfigError
from trimode.serving.jobs import Backend

logger = logging.getLogger(__name__)

FLUSH_S = 5
"""For answers that are complete to reach their readers."""

MAX_HEAD_BYTES = 64 * 1024
"""Of a request's line and headers."""

HEAD_S = 30.0
"""For the head of a request to arrive."""

STALL_S = 60.0
"""For a reader to take what is sent."""


class _Connection(H11Protocol):
    """Cut where a request does not come, or an answer is not taken; uvicorn would wait for ever."""

    _cut_without_head: asyncio.TimerHandle | None = None
    _cut_unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The clock runs from now."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` whenever something is unsent
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """A head may be whole now, or another one begin."""
        super().data_received(data)
        self._await_head()

    def pause_writing(self) -> None:
        """The reader is slower than we are."""
        super().pause_writing()
        self._cut_unread = self.loop.call_later(STALL_S, self._cut, "its reader took nothing")

    def resume_writing(self) -> None:
        """It has taken all."""
        super().resume_writing()
        self._forget("_cut_unread")

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to cut."""
        super().connection_lost(exc)
        self._forget("_cut_unread")
        self._forget("_cut_without_head")

    def _await_head(self) -> None:
        if self.conn.our_state in (h11.SEND_RESPONSE, h11.SEND_BODY):  # one is being answered
            self._forget("_cut_without_head")
        elif self._cut_without_head is None:
            self._cut_without_head = self.loop.call_later(HEAD_S, self._cut, "no request came")

    def _forget(self, name: str) -> None:
        timer: asyncio.TimerHandle | None = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)

    def _cut(self, reason: str) -> None:
        logger.info("a connection was cut: %s", reason)
        self.transport.abort()


class Server(uvicorn.Server):
    """Serves an app until a signal; the second signal ends it at once.

    Args:
        app: Of `create_app`.
        backend: Its backend, closed in the end.
        shutdown_timeout_s: For running requests after the first signal.
        on_ready: Called once requests are taken.
    """

    def __init__(
        self,
        app: FastAPI,
        backend: Backend,
        *,
        shutdown_timeout_s: float,
        on_ready: Callable[[], None],
    ) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            http=_Connection,
            ws="none",
            timeout_graceful_shutdown=FLUSH_S,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        super().__init__(config)
        self._backend = backend
        self._shutdown_timeout_s = shutdown_timeout_s
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing: asyncio.Task[None] | None = None
        self._num_signals = 0

    @property
    def was_forced(self) -> bool:
        """Whether it was ended at once, with requests that ran."""
        return self.force_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take requests."""
        await super().startup(sockets=sockets)
        self._loop = asyncio.get_running_loop()
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first asks, the second insists."""
        self._num_signals += 1
        if self._num_signals > 1 or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_to_close)

    def _begin_to_close(self) -> None:
        self._closing = asyncio.create_task(self._close())

    async def _close(self) -> None:
        try:
            await self._backend.close(timeout_s=self._shutdown_timeout_s)
        except Exception:
            logger.exception("the backend did not close")
        finally:
            self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        ConfigError: there is no such address here.
        OSError: the port is in use, or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"--host is {host!r}: {error.strerror}") from None
    family, kind, proto, _, address = found[0]
    listening = socket.socket(family, kind, proto)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{reason}: {host} port {port}; choose another --port") from None
    return listening
