"""From what a user calls a model to its folder; a named model is converted once, into the cache."""

from __future__ import annotations

import atexit
import fcntl
import functools
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from trimode.checkpoint import io
from trimode.checkpoint.convert import VERSION, convert
from trimode.checkpoint.names import KNOWN, NAMES, POCKET, find_source
from trimode.errors import CheckpointError
from trimode.user_cache import cache_folder

logger = logging.getLogger(__name__)


def resolve(path: str | Path | None) -> Path:
    """The local folder of a checkpoint.

    Args:
        path: A name, a folder, or an id on the hub; None is the default model.

    Raises:
        CheckpointError: There is none.
    """
    if isinstance(path, str) and path in NAMES:
        return named_folder(path)
    try:
        return io.resolve(path)
    except CheckpointError as error:
        if not isinstance(path, str) or "/" in path or Path(path).exists():
            raise
        raise CheckpointError(f"{error}; names of models are {', '.join(NAMES)}") from error


def named_folder(path: str | Path) -> Path:
    """The folder of a named model; any other path as it is."""
    if path == POCKET:
        return io.DEFAULT_MODEL
    return _converted(path) if isinstance(path, str) and path in KNOWN else Path(path)


def _converted(name: str) -> Path:
    """The folder in the user's cache, made if it is not there."""
    folder = cache_folder() / "models" / f"{name}_{VERSION}"
    if (folder / io.CONFIG_NAME).exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock").open("w")
    except OSError as error:
        reason = f"{folder.parent} cannot be written ({error.strerror})"
        return _converted_for_now(name, reason)
    with lock, _locked(lock, name):
        if not (folder / io.CONFIG_NAME).exists():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of one that was killed: we have the lock
            _convert(name, folder)
    return folder


@functools.cache
def _converted_for_now(name: str, reason: str) -> Path:
    """A folder for this process alone, where there is no cache."""
    root = Path(tempfile.mkdtemp(prefix="trimode_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    logger.warning("%s; %s goes into %s and is gone with this process", reason, name, root)
    _convert(name, root / name)
    return root / name


def _convert(name: str, folder: Path) -> None:
    source = find_source(name)
    logger.warning("converting %s from %s, once; it takes about a minute", name, source)
    convert(source, folder, block_length=KNOWN[name].block_length)
    logger.warning("%s is converted: %s", name, folder)


@contextmanager
def _locked(file: TextIO, name: str) -> Iterator[None]:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.warning("another process converts %s; waiting for it", name)
        fcntl.flock(file, fcntl.LOCK_EX)
    yield
