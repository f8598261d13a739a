"""`trimode revise`: show, and on request make, replacements of a file's least likely tokens."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from trimode.cli.generate import add_model_arguments, load_model
from trimode.errors import RequestError

NAME = "revise"
HELP = "replace a file's least likely tokens; shows a diff, writes on request"

_COLOURS = {"+": "32", "-": "31", "@": "36"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = (
        "On stdout: a unified diff, nothing if nothing is to be replaced; on stderr: each token and"
        " what replacing it brings. The file stays as it is without --write."
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="UTF-8 text")
    parser.add_argument("--lines", metavar="A-B", help="only these lines may change, from 1")
    parser.add_argument(
        "--budget", type=int, metavar="N", help="at most so many tokens (default 4)"
    )
    parser.add_argument(
        "--min-gain",
        type=float,
        metavar="X",
        help="nats that a replacement must bring (default 16); low values rewrite what is merely"
        " unusual",
    )
    parser.add_argument("--write", action="store_true", help="change the file, all or nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object, not a diff")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Revise; 0 whether or not anything was found."""
    lines = _lines(args.lines)
    text = _read(args.file)

    lm = load_model(args)
    names = ("budget", "min_gain")
    options = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    revision = lm.revise(text, lines=lines, **options)
    if args.json:
        record = {"file": str(args.file), "is_written": args.write, **asdict(revision)}
        print(json.dumps(record))
    else:
        for line in _diff(text, revision.text, name=str(args.file)):
            print(line, end="")
        for edit in revision.edits:
            print(
                f"-- line {edit.line}: {edit.old!r} -> {edit.new!r}, probability"
                f" {math.exp(edit.log_prob):.1e}, gain {edit.gain:.1f} nats",
                file=sys.stderr,
            )
    if args.write and revision.edits:
        _write(args.file, revision.text)
    return 0


def _lines(word: str | None) -> tuple[int, int] | None:
    if word is None:
        return None
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
    if match is None:
        raise RequestError(f"--lines is {word!r}; allowed: A-B or A, lines counted from 1")
    return int(match[1]), int(match[2] or match[1])


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not UTF-8 (byte {error.start}); convert it first") from error


def _write(file: Path, text: str) -> None:
    """The file appears changed at once, with its permissions, or stays as it was."""
    target = file.resolve()  # a link stays a link
    partial = target.with_name(f".{target.name}.revised")
    try:
        partial.write_bytes(text.encode("utf-8"))
        partial.chmod(target.stat().st_mode & 0o7777)
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RequestError(
            f"{file} cannot be written: {error.strerror}; it is as it was"
        ) from error


def _diff(before: str, after: str, *, name: str) -> Iterator[str]:
    """Unified, coloured on a terminal; control characters of the text are shown, not sent."""
    from trimode.cli.watch import printable

    is_terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    for line in difflib.unified_diff(old, new, fromfile=name, tofile=f"{name} (revised)"):
        ends = line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"
        colour = _COLOURS.get(line[0])
        if is_terminal and colour is not None:
            yield f"\x1b[{colour}m{printable(ends[:-1])}\x1b[0m\n"
        else:
            yield printable(ends) if is_terminal else ends
