"""The `trimode` command: finds the command, runs it, turns errors into one line and an exit code.

Results go to stdout, everything else to stderr. Exit codes: 0 ok; 2 usage, config or bad input;
1 failure; 130 interrupted and 141 stdout closed early (`| head`), both without a word.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, Protocol, cast

from trimode._version import __version__
from trimode.errors import (
    CheckpointError,
    ConfigError,
    RequestError,
    TriModeError,
    UnsupportedError,
)

COMMANDS = (
    *("generate", "chat", "infill", "revise"),
    *("selfgen", "prepare", "train", "report", "convert", "serve", "info"),
)
"""Each is a module of this package. Their imports are light, so help is quick."""

OK, FAILURE, BAD_INPUT = 0, 1, 2
INTERRUPTED, BROKEN_PIPE = 128 + 2, 128 + 13  # as a shell reports a process ended by the signal

_USERS_ERRORS = (ConfigError, RequestError, CheckpointError, UnsupportedError)


class Command(Protocol):
    """What the module of a command offers."""

    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; returns the exit code."""


class _UsageError(Exception):
    """The command line itself is wrong; the message says how to do better."""


class _Parser(argparse.ArgumentParser):
    """argparse with its errors on one line, and no guessing from the start of an option's name."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (see `{self.prog} --help`)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: The words after `trimode`; None takes them from the process.

    Returns:
        The exit code. `--help` and `--version` raise `SystemExit(0)` instead, as argparse does.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in words  # known before parsing, which may fail
    try:
        args, command = _parse(words)
        is_debug = args.debug
        _set_up_streams()
        # Threads that spin long at barriers cost a busy machine most of its speed, threads that do
        # not spin at all an idle one half of it (docs/log.md); read when torch loads.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "3000")
        with _logs_on_stderr(args.verbose + args.debug):
            code = command.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _forget_broken_pipes()
        return BROKEN_PIPE
    except Exception as error:
        if is_debug:
            traceback.print_exc()
        print(f"trimode: error: {_one_line(error, is_debug=is_debug)}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, (_UsageError, *_USERS_ERRORS)) else FAILURE


def _parse(words: list[str]) -> tuple[argparse.Namespace, Command]:
    """Read the options before the command, find the command, read the rest with its own parser."""
    parser = _Parser(
        prog="trimode",
        description="Tri-mode language models: one checkpoint, three ways to decode it.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<12}{_command(name).HELP}" for name in COMMANDS)
        + "\n\n`trimode COMMAND --help` says more about one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trimode {__version__}")
    _add_common(parser)
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of those below")
    # No option before the command takes a value, so the command is the first word without a dash.
    place = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    first, rest = parser.parse_args(words[: place + 1]), words[place + 1 :]
    if first.command is None:
        parser.error(f"no command given; the commands are {', '.join(COMMANDS)}")
    if first.command not in COMMANDS:
        close = difflib.get_close_matches(first.command, COMMANDS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        names = ", ".join(COMMANDS)
        parser.error(f"{first.command!r} is not a command; {hint}the commands are {names}")
    command = _command(first.command)
    own = _Parser(
        prog=f"trimode {command.NAME}",
        description=f"{command.HELP[0].upper()}{command.HELP[1:]}.",
        allow_abbrev=False,
    )
    command.add_arguments(own)
    _add_common(own)
    # Intermixed, so that options may stand between `key=value` words; it cannot handle `--`.
    parse = own.parse_args if "--" in rest else own.parse_intermixed_args
    args = parse(rest)
    args.verbose += first.verbose
    args.debug |= first.debug
    return args, command


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Options that stand before or after the command."""
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="log more; twice for everything"
    )
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error, and log more"
    )


def _command(name: str) -> Command:
    return cast(Command, importlib.import_module(f"trimode.cli.{name}"))


def _set_up_streams() -> None:
    """Let a terminal of another encoding show what it cannot write as an escape, not fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"trimode: {record.levelname.lower()}: {super().format(record)}"


@contextmanager
def _logs_on_stderr(verbosity: int) -> Iterator[None]:
    """Show our logs: warnings, with `-v` also information, with `-vv` everything."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logger = logging.getLogger("trimode")
    level_before = logger.level
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)])
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level_before)


def _one_line(error: Exception, *, is_debug: bool) -> str:
    """What happened, on one line; an error we did not foresee also says how to see more."""
    message = " ".join(str(error).split())
    if isinstance(error, (_UsageError, TriModeError)):
        return message
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    hint = "" if is_debug else " (--debug shows where)"
    return f"{type(error).__name__}: {message}{hint}"


def _forget_broken_pipes() -> None:
    """Point closed streams at nothing, so that Python's own flush at exit does not fail as well."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
