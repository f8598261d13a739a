"""A server of the tiny model in a thread, and a brake on its engine."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from trimode.runtime import TriModeLM
from trimode.serving.app import create_app
from trimode.serving.engine_thread import EngineThread
from trimode.serving.server import Server, listen
from trimode.serving.settings import Settings
from trimode.serving.worker import LocalBackend

TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}<|eos|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
WAIT_S = 30.0
"""Nothing takes so long; a test that waits has failed."""


@dataclass(slots=True)
class Served:
    """A running server."""

    url: str
    backend: LocalBackend
    signal: Callable[[], None]

    @property
    def engine(self) -> Any:
        return self.backend._thread.engine

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        """POST JSON to /v1/`path`."""
        return httpx.post(f"{self.url}/v1/{path}", json=body, timeout=WAIT_S, **options)

    def samples(self, **options: Any) -> dict[tuple[str, ...], float]:
        """What /metrics says: (name, label values...) -> value."""
        text = httpx.get(f"{self.url}/metrics", **options).text
        families = text_string_to_metric_families(text)
        return {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in families
            for sample in family.samples
        }


class Brake:
    """Holds an engine before its steps; let through one by one, or all.

    Attributes:
        is_held: The engine waits here, so that its thread obeys no command.
    """

    def __init__(self, thread: EngineThread) -> None:
        self._step = thread.engine.step
        self._tickets = threading.Semaphore(0)
        self._is_off = False
        self.is_held = False
        thread.engine.step = self._held  # type: ignore[method-assign]

    def let(self, num_steps: int) -> None:
        """Let so many steps happen."""
        for _ in range(num_steps):
            self._tickets.release()

    def off(self) -> None:
        """Hold nothing any more."""
        self._is_off = True
        self._tickets.release()

    def _held(self) -> Any:
        if not self._is_off and not self._tickets.acquire(blocking=False):
            self.is_held = True
            assert self._tickets.acquire(timeout=WAIT_S)
            self.is_held = False
        return self._step()


def wait_until(is_so: Callable[[], bool]) -> None:
    """Until something another thread does has happened."""
    tick = threading.Event()
    for _ in range(int(WAIT_S / 0.01)):
        if is_so():
            return
        tick.wait(0.01)
    raise AssertionError("it did not happen")


@pytest.fixture(scope="session")
def tiny_lm(tiny_model: Any, random_adapter: Any, byte_tokenizer: Any) -> TriModeLM:
    """Float64, a byte a token, with a chat template and a drafter that disagrees."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = TEMPLATE
    model = tiny_model()
    return TriModeLM(model, tokenizer, adapter=random_adapter(model))


@pytest.fixture(scope="module")
def pieces(tiny_model: Any, piece_tokenizer: Any) -> Iterator[Served]:
    """Its tokenizer puts `<s>` and a space before a text, and single bytes where it has no
    piece."""
    size = len(piece_tokenizer)
    model = tiny_model(vocab_size=size, mask_token_id=size - 1, bos_token_id=1, eos_token_id=2)
    with serving(TriModeLM(model, piece_tokenizer)) as served:
        yield served


@contextmanager
def serving(
    lm: TriModeLM,
    settings: Settings | None = None,
    *,
    shutdown_timeout_s: float = WAIT_S,
    **options: Any,
) -> Iterator[Served]:
    """A server on a free port, stopped at the end."""
    backend = LocalBackend(lm, **{"name": "tiny", "num_rows": 8, "has_auto": False, **options})
    is_ready = threading.Event()
    server = Server(
        create_app(backend, settings or Settings()),
        backend,
        shutdown_timeout_s=shutdown_timeout_s,
        on_ready=is_ready.set,
    )
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        loop = asyncio.new_event_loop()

        def run() -> None:
            loop.run_until_complete(server.serve(sockets=[listening]))
            loop.close()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            assert is_ready.wait(WAIT_S)
            signal = partial(server.handle_exit, 15, None)
            yield Served(f"http://127.0.0.1:{port}", backend, signal)
        finally:
            server.handle_exit(15, None)
            thread.join(WAIT_S)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(tiny_lm: TriModeLM) -> Iterator[Served]:
    """One server for a module, without limits that matter."""
    with serving(tiny_lm) as running:
        yield running


@pytest.fixture(scope="module")
def serve_all(tiny_lm: TriModeLM) -> Iterator[Callable[..., Served]]:
    """The same for all tests of a module."""
    with ExitStack() as stack:
        yield lambda settings: stack.enter_context(serving(tiny_lm, settings))


@pytest.fixture
def serve(tiny_lm: TriModeLM) -> Iterator[Callable[..., Served]]:
    """`serve(settings, **options of LocalBackend)`: a server of the test's own."""
    with ExitStack() as stack:
        yield lambda settings=None, **options: stack.enter_context(
            serving(tiny_lm, settings, **options)
        )
