"""The model on several machines, by Ray Serve.

    HTTP (`create_app`) -> `RayBackend` -> Ray Serve's router -> `Replica` -> `LocalBackend`

The HTTP side is one process: `trimode serve --replicas N` itself (`start_replicas`), or on a
cluster the deployment `Ingress` (`build`). It holds the keys and the limits. Starting, watching,
scaling and replacing replicas is Ray Serve's work, and set in its configuration.
"""

from __future__ import annotations

import asyncio
import atexit
import difflib
import inspect
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import fields, replace
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from trimode import loading, runtime
from trimode.checkpoint.model_cache import resolve
from trimode.errors import CapacityError, ConfigError, TriModeError
from trimode.serving.app import create_app
from trimode.serving.jobs import Job, Update
from trimode.serving.ray_backend import RayBackend, Report
from trimode.serving.settings import Settings, read_api_keys
from trimode.serving.worker import LocalBackend

logger = logging.getLogger(__name__)

APP_NAME = "trimode"
"""Of the application in Ray Serve."""

MAX_WAITING = 256
"""Texts that may wait in one replica where nothing is said."""

GRACE_S = 60.0
"""For the jobs of a replica that is to end, before it is killed."""

OBJECT_STORE_BYTES = 128 * 2**20
"""Of a Ray of our own: jobs and updates are small."""

_LOAD = ("device", "dtype", "lora", "drafter", "weights")
_ENGINE = tuple(
    name
    for name, parameter in inspect.signature(LocalBackend).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)
_SETTINGS = tuple(field.name for field in fields(Settings) if field.name != "api_keys")


class Replica:
    """A model with its engine, as an actor of Ray.

    Args:
        model: See `trimode.load`.
        load: Further arguments of it.
        engine: Arguments of `LocalBackend`.
    """

    def __init__(
        self, model: str | None, *, load: Mapping[str, Any], engine: Mapping[str, Any]
    ) -> None:
        self._id = serve.get_replica_context().replica_id.unique_id
        self._backend = LocalBackend(loading.load(model, **load), **engine)

    async def run(self, job: Job) -> AsyncGenerator[Update, None]:
        """Updates of one job; Ray cancels it when the caller lets go."""
        async with aclosing(self._backend.run(job)) as updates:
            async for update in updates:
                yield update

    async def report(self) -> Report:
        """How it is now."""
        return Report(
            replica=self._id,
            card=self._backend.card,
            is_ready=self._backend.is_ready,
            metrics=self._backend.metrics(),
        )

    async def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that raises."""
        if not self._backend.is_ready:
            raise RuntimeError("the engine's thread has ended")


class Ingress:
    """The HTTP side on a cluster.

    Args:
        replicas: Handle of the deployment of `Replica`.
        settings: What is allowed, but for the keys.
        api_keys: A file of keys where the ingress runs; see `read_api_keys`.
    """

    def __init__(self, replicas: Any, *, settings: Settings, api_keys: str | None) -> None:
        self._replicas = replicas
        self._settings = replace(settings, api_keys=read_api_keys(api_keys))

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Asked by Ray, before it sends requests here."""
        backend = await asyncio.to_thread(RayBackend, self._replicas)
        return create_app(backend, self._settings)


def build(args: dict[str, Any]) -> Any:
    """The application for Ray Serve's own configuration: deployments `Ingress` and `Replica`.

    Args:
        args: `model`; arguments of `trimode.load`, of `LocalBackend` and of `Settings` by their
            names; and `api_keys`, a file.

    Raises:
        ConfigError: naming what is not valid.
    """
    known = ("model", "api_keys", *_LOAD, *_ENGINE, *_SETTINGS)
    for name in args:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"
            raise ConfigError(f"args has {name!r}; {hint}")
    settings = Settings(**_only(_SETTINGS, args))
    replicas = _deployment(
        args.get("model"),
        load=_only(_LOAD, args),
        engine={"name": "trimode", **_only(_ENGINE, args)},
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=settings.max_concurrent + MAX_WAITING,  # beyond: refusals, /health
        graceful_shutdown_timeout_s=GRACE_S,
    )
    return ingress.bind(replicas, settings=settings, api_keys=args.get("api_keys"))


def start_replicas(
    model: str | None,
    *,
    load: Mapping[str, Any],
    engine: Mapping[str, Any],
    num_replicas: int,
) -> RayBackend:
    """Replicas on this machine or, with `RAY_ADDRESS` set, on that cluster, behind one backend.

    Closing the backend ends them, and the Ray that was started for them.

    Args:
        model: See `trimode.load`.
        load: Further arguments of it.
        engine: Arguments of `LocalBackend`.
        num_replicas: As many.

    Raises:
        CapacityError: there are too few GPUs.
        ConfigError: the application runs on that cluster already.
        TriModeError: a replica does not start.
    """
    is_own = "RAY_ADDRESS" not in os.environ
    if is_own and model is not None:
        resolve(model)  # what is not there is said at once, and what is loaded is loaded once
    _connect(is_own=is_own)

    def end() -> None:
        if not is_own:
            serve.delete(APP_NAME, _blocking=False)
        ray.shutdown()  # and with it all that a Ray of our own has started

    try:
        if APP_NAME in serve.status().applications:
            raise ConfigError(f"application {APP_NAME!r} runs on {os.environ['RAY_ADDRESS']}")
    except BaseException:
        ray.shutdown()
        raise
    try:
        deployment = _deployment(
            model,
            load=load,
            engine=engine,
            num_replicas=num_replicas,
            ray_actor_options=_resources(load.get("device"), num_replicas=num_replicas),
        )
        handle = serve.run(deployment, name=APP_NAME, route_prefix=None)
        backend = RayBackend(handle, on_close=end)
    except RuntimeError as error:
        cause = _cause()
        end()
        raise TriModeError(f"the replicas did not start: {cause}") from error
    except BaseException:
        end()
        raise
    atexit.register(backend.stop)  # where nobody closes it any more
    return backend


def _connect(*, is_own: bool) -> None:
    for name in ("ray.serve", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not is_own:
        ray.init(namespace="serve", **quiet)
        _end_quietly()
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would ask, or send
    ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
    _end_quietly()
    serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})


def _deployment(
    model: str | None, *, load: Mapping[str, Any], engine: Mapping[str, Any], **options: Any
) -> Any:
    """Ray's router fills a replica up to what it may run and let wait, and holds the rest back, so
    that none refuses a job that another could take."""
    engine = {"max_waiting": MAX_WAITING, **engine}
    most = engine.get("num_rows", runtime.MAX_BATCH) + engine["max_waiting"]
    deployment = serve.deployment(
        Replica,
        name="Replica",
        max_ongoing_requests=most,
        max_queued_requests=most,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=GRACE_S,
        graceful_shutdown_wait_loop_s=0.5,
        **options,
    )
    return deployment.bind(model, load=dict(load), engine=engine)


def _resources(device: str | None, *, num_replicas: int) -> dict[str, float]:
    """What each replica gets: a GPU if there are any, else its share of the cores."""
    have = ray.cluster_resources()
    num_gpus = int(have.get("GPU", 0))
    if (device or "").startswith("cuda") or (device is None and num_gpus):
        if num_gpus < num_replicas:
            raise CapacityError(
                f"{num_replicas} replicas need a GPU each and Ray has {num_gpus};"
                " --device cpu needs none"
            )
        return {"num_cpus": 1, "num_gpus": 1}
    share = have.get("CPU", 1.0) / num_replicas
    return {"num_cpus": float(int(share)) if share >= 1 else share}


def _end_quietly() -> None:
    """At SIGTERM, as long as no server handles it; Ray's handler aborts the process."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _only(names: tuple[str, ...], args: Mapping[str, Any]) -> dict[str, Any]:
    return {name: args[name] for name in names if name in args}


def _cause() -> str:
    """What Ray has of a replica that did not start: our own error, else the last line."""
    application = serve.status().applications.get(APP_NAME)
    deployments = application.deployments.values() if application is not None else ()
    lines = [line.strip() for one in deployments for line in one.message.splitlines()]
    ours = [line.partition(": ")[2] for line in lines if line.startswith("trimode.errors.")]
    return (ours or [line for line in lines if line] or ["see the logs of Ray"])[-1]
