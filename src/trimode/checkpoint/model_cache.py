"""From what a user calls a model to its folder.

A named model and a GGUF file are converted once, into the cache. The cache knows a file by its
content, wherever it lies and whatever it is called.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from trimode.checkpoint import io
from trimode.checkpoint.content_key import content_key
from trimode.checkpoint.convert import VERSION, convert
from trimode.checkpoint.gguf_file import checked_fields, find_gguf, is_gguf
from trimode.checkpoint.names import (
    DEFAULT,
    KNOWN,
    NAMES,
    POCKET,
    find_source,
    how_to_get,
    is_at_hand,
)
from trimode.errors import CheckpointError
from trimode.user_cache import cache_folder

logger = logging.getLogger(__name__)


BLOCK_LENGTH = 8
"""Default of a converted file: its drafts are poor until it is trained, so long ones cost more."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is to be in the cache.

    Attributes:
        name: For messages.
        key: The folder's name in the cache.
        block_length: Default diffusion block length.
        file: The GGUF file; None is the source behind the name.
    """

    name: str
    key: str
    block_length: int
    file: Path | None = None


def resolve(path: str | Path | None) -> Path:
    """The local folder of a checkpoint.

    Args:
        path: A name, a folder, an id on the hub, a GGUF file, or a folder with nothing but one;
            None is the default model.

    Raises:
        CheckpointError: There is none.
    """
    if path is None:
        path = default_name()
    if isinstance(path, str) and path in NAMES:
        return named_folder(path)
    file = find_gguf(path)
    if file is not None:
        return _converted(_of_file(file))
    try:
        folder = io.resolve(path)
    except CheckpointError as error:
        if not isinstance(path, str) or "/" in path or Path(path).exists():
            raise
        raise CheckpointError(f"{error}; names of models are {', '.join(NAMES)}") from error
    file = find_gguf(folder)  # of the hub
    return folder if file is None else _converted(_of_file(file))


@functools.cache
def default_name() -> str:
    """The model where none is named: one answer for the whole process, with a line that says so
    where it is the smaller one."""
    if (_folder(_of_name(DEFAULT)) / io.CONFIG_NAME).exists() or is_at_hand(DEFAULT):
        return DEFAULT
    logger.warning(
        "the model is %s, small and for Python code, since the weights of %s are not here; %s",
        *(POCKET, DEFAULT, how_to_get(DEFAULT)),
    )
    return POCKET


def named_folder(path: str | Path) -> Path:
    """The folder of a named model, or of a GGUF file; any other path as it is."""
    if path == POCKET:
        return io.POCKET_MODEL
    if isinstance(path, str) and path in KNOWN:
        return _converted(_of_name(path))
    file = find_gguf(path) if is_gguf(path) else None
    return Path(path) if file is None else _converted(_of_file(file))


def _of_name(name: str) -> _Wanted:
    return _Wanted(name, f"{name}_{VERSION}", KNOWN[name].block_length)


def _of_file(file: Path) -> _Wanted:
    return _Wanted(file.name, f"gguf_{content_key(file)}_{VERSION}", BLOCK_LENGTH, file)


def _folder(wanted: _Wanted) -> Path:
    return cache_folder() / "models" / wanted.key


def _converted(wanted: _Wanted) -> Path:
    """The folder in the user's cache, made if it is not there."""
    folder = _folder(wanted)
    if (folder / io.CONFIG_NAME).exists():
        return folder
    if wanted.file is not None:
        checked_fields(wanted.file)  # before a word of converting it, and a lock
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock").open("w")
    except OSError as error:
        reason = f"{folder.parent} cannot be written ({error.strerror})"
        return _converted_for_now(wanted, reason)
    with lock, _locked(lock, wanted.name):
        if not (folder / io.CONFIG_NAME).exists():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of one that was killed: we have the lock
            _convert(wanted, folder)
    return folder


@functools.cache
def _converted_for_now(wanted: _Wanted, reason: str) -> Path:
    """A folder for this process alone, where there is no cache."""
    root = Path(tempfile.mkdtemp(prefix="trimode_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    logger.warning("%s; %s goes into %s and is gone with this process", reason, wanted.name, root)
    _convert(wanted, root / wanted.key)
    return root / wanted.key


def _convert(wanted: _Wanted, folder: Path) -> None:
    name, file = wanted.name, wanted.file
    source = find_source(name) if file is None else file
    if file is None:
        logger.warning("converting %s from %s, once; it takes about a minute", name, source)
    else:
        logger.warning("converting %s into %s, once, in float32", file, folder)
    convert(source, folder, block_length=wanted.block_length)
    if file is None:
        logger.warning("%s is converted: %s", name, folder)


@contextmanager
def _locked(file: TextIO, name: str) -> Iterator[None]:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.warning("another process converts %s; waiting for it", name)
        fcntl.flock(file, fcntl.LOCK_EX)
    yield
