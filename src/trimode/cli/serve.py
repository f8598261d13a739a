"""`trimode serve`: the model over HTTP, OpenAI-compatible, with a page to play with."""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimode.cli.threads_flag import add_threads_argument, use_threads
from trimode.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from trimode.serving.jobs import Backend
    from trimode.serving.settings import Settings

logger = logging.getLogger(__name__)

NAME = "serve"
HELP = "answer requests over HTTP, OpenAI-compatible"

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
FLAGS = {
    "context_len": "--max-context",
    "num_rows": "--max-batch",
    "requests_per_minute": "--rate",
    "timeout_s": "--timeout",
    "cors_origins": "--cors",
    "allowed_hosts": "--allow-host",
}
"""What the command calls the arguments that errors name."""

POSITIVE = (
    *("max_body_bytes", "max_prompt_tokens", "max_output_tokens", "max_concurrent"),
    *("max_concurrent_per_key", "rate", "timeout"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = (
        "A line on stderr says when it is ready and where; logs follow, one JSON object a line."
        " SIGTERM or Ctrl-C ends it when what runs has finished, a second one at once. API keys may"
        " also come by TRIMODE_API_KEYS, separated by commas."
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="smollm2, pocket (built in), a folder, a GGUF file or a hub id (default: smollm2, or"
        " pocket where it is not at hand)",
    )
    model.add_argument("--name", metavar="NAME", help="what requests call it (default: its own)")
    model.add_argument("--lora", metavar="PATH", help="PEFT LoRA folder to merge into the weights")
    model.add_argument(
        "--drafter",
        metavar="PATH",
        help="the same, on for drafts, or for what its files say; none turns off that of smollm2",
    )
    model.add_argument("--device", metavar="D", help="cpu, cuda, ...")
    model.add_argument("--dtype", metavar="D", help="float32, bfloat16, ...")
    model.add_argument("--weights", metavar="FORM", help="plain, native or int8")
    add_threads_argument(model)
    model.add_argument(
        "--generation-config",
        default="auto",
        metavar="WHICH",
        help="defaults of what a request leaves open: auto (the model's generation_config.json),"
        " none, or PATH of such a file or of a folder with it (default auto)",
    )
    model.add_argument(
        "--tensor-parallel",
        action="store_true",
        help="share the model out over the ranks that torchrun has started; rank 0 listens",
    )
    _add_engine(parser)
    _add_http(parser)
    parser.add_argument(
        "--replicas",
        type=int,
        default=1,
        metavar="N",
        help="models side by side, by Ray Serve (default 1: none of it)",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--max-batch",
        type=int,
        default=32,
        metavar="N",
        help="texts that are made together; more wait (default 32)",
    )
    engine.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="prompt and new tokens of a text at most (default: the model's own)",
    )
    engine.add_argument(
        "--token-budget",
        type=int,
        metavar="N",
        help="tokens of one forward, so that long prompts hold nobody up (default 1024, or 4 times"
        " --max-batch)",
    )
    engine.add_argument(
        "--time-slice",
        type=int,
        default=256,
        metavar="N",
        help="tokens after which a text makes way for one that waits (default 256)",
    )
    engine.add_argument(
        "--no-auto",
        action="store_true",
        help="without mode auto, for which forwards are measured at the first start",
    )
    engine.add_argument(
        "--max-waiting",
        type=int,
        default=256,
        metavar="N",
        help="texts that may wait; more are refused with 429 (default 256)",
    )


def _add_http(parser: argparse.ArgumentParser) -> None:
    http = parser.add_argument_group("http")
    http.add_argument("--host", default="127.0.0.1", help="where to listen (default 127.0.0.1)")
    http.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0 takes a free one (default 8000)"
    )
    http.add_argument("--api-keys", metavar="FILE", help="a key a line; requests need one of them")
    http.add_argument(
        "--cors",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="web pages elsewhere that may ask, such as https://example.org",
    )
    http.add_argument(
        "--allow-host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="names under which it may be asked without keys, beside localhost, --host and IP"
        " addresses; * for any",
    )
    http.add_argument("--open-metrics", action="store_true", help="/metrics needs no key")
    http.add_argument(
        "--max-body-bytes", type=int, default=2**20, metavar="N", help="(default 1048576)"
    )
    http.add_argument("--max-prompt-tokens", type=int, metavar="N", help="(default: the context)")
    http.add_argument(
        "--max-output-tokens", type=int, metavar="N", help="of one text (default: the context)"
    )
    http.add_argument(
        "--max-concurrent",
        type=int,
        default=256,
        metavar="N",
        help="requests at a time, in all (default 256)",
    )
    http.add_argument(
        "--max-concurrent-per-key", type=int, metavar="N", help="the same for one client"
    )
    http.add_argument(
        "--rate", type=float, metavar="N", help="requests a minute of one client (default: any)"
    )
    http.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds for a request, the most that one may ask for (default 600)",
    )
    http.add_argument(
        "--shutdown-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds for what runs when it is told to end (default 30)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until told to end; 0, or 1 if a second signal cut it off."""
    try:
        return _run(args)
    except ConfigError as error:
        names = re.compile(rf"\b({'|'.join(FLAGS)})\b")
        raise ConfigError(names.sub(lambda found: FLAGS[found[0]], str(error))) from error


def _run(args: argparse.Namespace) -> int:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{missing[0]} is not installed; pip install 'trimode[serve]'")
    from trimode.checkpoint.model_cache import default_name
    from trimode.checkpoint.names import POCKET

    _check(args)
    use_threads(args.threads)
    if args.replicas > 1 and find_spec("ray") is None:
        raise ConfigError("--replicas needs ray, not installed here; pip install 'trimode[ray]'")
    settings = _settings(args)
    if args.model is None:
        args.model = POCKET if args.tensor_parallel else default_name()  # as the other ranks
    names = ("lora", "drafter", "device", "dtype", "weights", "tensor_parallel")
    load = {name: getattr(args, name) for name in names}
    if args.tensor_parallel and os.environ.get("RANK", "0") != "0":
        return _follow(args.model, load=load)
    engine = {
        "name": args.name or _name(args.model),
        "num_rows": args.max_batch,
        "context_len": args.max_context,
        "token_budget": _token_budget(args),
        "max_step_tokens": _token_budget(args),  # or a block would hold up all others
        "time_slice": args.time_slice,
        "max_waiting": args.max_waiting,
        "max_prompt_tokens": args.max_prompt_tokens,
        "generation_config": args.generation_config,
        "has_auto": not args.no_auto,
    }
    if args.max_output_tokens is not None:
        engine["max_new_tokens"] = args.max_output_tokens
    return _serve(args, settings, load=load, engine=engine)


def _serve(
    args: argparse.Namespace, settings: Settings, *, load: dict[str, Any], engine: dict[str, Any]
) -> int:
    from trimode.serving.app import create_app
    from trimode.serving.server import Server, listen

    with listen(args.host, args.port) as listening:  # before the model, whose loading takes a while
        if args.host not in LOOPBACK and not settings.api_keys:
            logger.warning("listening on %s without API keys: all may use it", args.host)
        once = "" if args.no_auto else "; measuring forwards for mode auto, about 3 s, once"
        _say(f"loading {args.model}{once}")
        backend = _backend(args, load=load, engine=engine)
        _log_as_json()
        port = listening.getsockname()[1]
        host = f"[{args.host}]" if ":" in args.host else args.host
        server = Server(
            create_app(backend, settings),
            backend,
            shutdown_timeout_s=args.shutdown_timeout,
            on_ready=lambda: _say(f"{backend.card.name} is ready at http://{host}:{port}"),
        )
        server.run(sockets=[listening])
        if server.was_forced:  # a thread amid a forward would abort the process as Python ends
            asyncio.run(backend.close(timeout_s=0))
    return 1 if server.was_forced else 0


def _say(what: str) -> None:
    print(f"trimode: {what}", file=sys.stderr, flush=True)


def _follow(model: str, *, load: dict[str, Any]) -> int:
    """Run rank 0's forwards until it has ended."""
    from trimode import loading

    ranks = loading.load(model, **load).ranks
    assert ranks is not None
    ranks.follow()
    return 0


def _backend(args: argparse.Namespace, *, load: dict[str, Any], engine: dict[str, Any]) -> Backend:
    """The model in this process, or replicas of it in others."""
    if args.replicas > 1:
        from trimode.serving.ray_app import start_replicas

        return start_replicas(args.model, load=load, engine=engine, num_replicas=args.replicas)
    from trimode import loading
    from trimode.serving.worker import LocalBackend

    return LocalBackend(loading.load(args.model, **load), **engine)


def _check(args: argparse.Namespace) -> None:
    for name, least in (("max_batch", 1), ("max_waiting", 0), ("time_slice", 1), ("replicas", 1)):
        if getattr(args, name) < least:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is {getattr(args, name)}; allowed: at least {least}")
    for name in POSITIVE:
        number = getattr(args, name)
        if number is not None and not 0 < number < math.inf:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is {number:g}; allowed: a number above 0")
    if args.token_budget is not None and args.token_budget < 4 * args.max_batch:
        raise ConfigError(
            f"--token-budget is {args.token_budget}; allowed: at least {4 * args.max_batch},"
            " 4 times --max-batch"
        )
    if args.tensor_parallel and args.replicas > 1:
        raise ConfigError(
            f"--tensor-parallel with --replicas {args.replicas}; allowed: one of the two"
        )
    which = args.generation_config
    if which not in ("auto", "none") and not Path(which).exists():
        raise ConfigError(f"--generation-config is {which!r}; allowed: auto, none, or a path")
    if not 0 <= args.port <= 65_535:
        raise ConfigError(f"--port is {args.port}; allowed: 0 to 65535")
    if not 0 <= args.shutdown_timeout <= 86_400:
        raise ConfigError(f"--shutdown-timeout is {args.shutdown_timeout:g}; allowed: 0 to 86400")


def _token_budget(args: argparse.Namespace) -> int:
    given: int | None = args.token_budget
    return max(1024, 4 * args.max_batch) if given is None else given


def _settings(args: argparse.Namespace) -> Settings:
    from trimode.serving.settings import Settings, read_api_keys

    return Settings(
        api_keys=read_api_keys(args.api_keys),
        allowed_hosts=(args.host, *args.allow_host),
        cors_origins=tuple(args.cors),
        has_open_metrics=args.open_metrics,
        max_body_bytes=args.max_body_bytes,
        max_output_tokens=args.max_output_tokens,
        max_concurrent=args.max_concurrent,
        max_concurrent_per_key=args.max_concurrent_per_key,
        requests_per_minute=args.rate,
        timeout_s=args.timeout,
    )


def _name(model: str) -> str:
    """What a model is called where nothing is said: its folder's or repository's name."""
    name = Path(model).resolve().name if Path(model).exists() else model.rstrip("/").split("/")[-1]
    if not name:
        raise CheckpointError(f"model {model!r} has no name; give one by --name")
    return name


def _log_as_json() -> None:
    """Our log, uvicorn's and asyncio's, one JSON object a line, requests included."""
    from trimode.serving.logs import JsonFormatter

    ours = logging.getLogger("trimode")
    ours.setLevel(min(ours.level, logging.INFO))
    for handler in ours.handlers:
        handler.setFormatter(JsonFormatter())
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).addHandler(handler)
            logging.getLogger(name).setLevel(logging.WARNING)
