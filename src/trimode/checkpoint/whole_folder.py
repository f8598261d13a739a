"""Folders that appear whole or not at all, and stay until their successor is whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimode.errors import CapacityError, TriModeError


def start(folder: Path) -> Path:
    """An empty hidden folder beside `folder` to write into.

    Args:
        folder: What is to appear. Its parent is made.
    """
    temporary = hidden(folder)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def hidden(folder: Path) -> Path:
    """Where `folder` is written."""
    return folder.parent / f".{folder.name}.new"


def publish(folder: Path) -> None:
    """Put what was written on the disk and then in the place of `folder`.

    An older one is renamed aside until the new one is there.
    """
    temporary, aside = hidden(folder), folder.parent / f".{folder.name}.old"
    settle(temporary)
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    temporary.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)
    flush(folder.parent)


def settle(folder: Path) -> None:
    """Return when all that is in a folder is on the disk, readable by whom the folder is."""
    readers = folder.stat().st_mode & 0o666
    for path in folder.iterdir():
        if path.is_file():  # safetensors writes for the owner alone, whatever the umask
            path.chmod(readers)
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Return when a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(folder: Path, *, what: str) -> Iterator[None]:
    """Says in one line which folder could not be written, and makes room again.

    Args:
        folder: As in `start`.
        what: E.g. "checkpoint".

    Raises:
        CapacityError: The disk is full.
        TriModeError: It could not be written for another reason.
    """
    try:
        yield
    except TriModeError:
        raise
    except Exception as error:
        shutil.rmtree(hidden(folder), ignore_errors=True)
        place = f"{what} {str(folder)!r} cannot be written"
        if is_disk_full(error):
            raise CapacityError(
                f"{place}: the disk is full; what was there is kept: make room and run again"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TriModeError(f"{place}: {reason}") from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that of a full disk or an exhausted quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "os error 28" in str(error):  # as libraries written in Rust put it
            return True
        error = error.__cause__ or error.__context__
    return False
