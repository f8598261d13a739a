"""Reading and changing a file of text that the user names."""

from __future__ import annotations

import difflib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trimode.errors import RequestError

_COLOURS = {"+": "32", "-": "31", "@": "36"}


def read_file(file: Path) -> str:
    """The text of a UTF-8 file, its line ends as they are.

    Raises:
        RequestError: it cannot be read, or is not UTF-8.
    """
    try:
        return file.read_bytes().decode("utf-8")
    except OSError as error:
        raise RequestError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{file} is not UTF-8 (byte {error.start}); convert it first") from error


def write_file(file: Path, text: str, *, was: str) -> None:
    """The file appears changed at once, with its permissions, or stays as it was.

    Args:
        file: What to change.
        text: What it is to say.
        was: What it said when it was read; if somebody has changed it since, that is kept.

    Raises:
        RequestError: it cannot be written, or has changed.
    """
    if read_file(file) != was:
        raise RequestError(f"{file} has changed since it was read, and stays so; start again")
    target = file.resolve()  # a link stays a link
    partial: Path | None = None
    try:
        target.open("r+b").close()  # a replacement would not ask whether the file may be written
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=target.parent)
        partial = Path(name)
        with open(descriptor, "wb") as opened:
            opened.write(text.encode("utf-8"))
        partial.chmod(target.stat().st_mode & 0o7777)
        os.replace(partial, target)
    except OSError as error:
        raise RequestError(
            f"{file} cannot be written: {error.strerror}; it is as it was"
        ) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def line_range(word: str, *, name: str) -> tuple[int, int]:
    """First and last line of `A-B` or `A`.

    Raises:
        RequestError: it is neither, naming `name`.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
    if match is None:
        raise RequestError(f"{name} is {word!r}; allowed: A-B or A, lines counted from 1")
    return int(match[1]), int(match[2] or match[1])


def diff(before: str, after: str, *, name: str, what: str) -> Iterator[str]:
    """Unified diff to `name (what)`, coloured on a terminal; control characters of the text are
    shown there, not sent."""
    from trimode.cli.watch import printable

    is_terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    for line in difflib.unified_diff(old, new, fromfile=name, tofile=f"{name} ({what})"):
        ends = line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"
        colour = _COLOURS.get(line[0])
        if is_terminal and colour is not None:
            yield f"\x1b[{colour}m{printable(ends[:-1])}\x1b[0m\n"
        else:
            yield printable(ends) if is_terminal else ends
