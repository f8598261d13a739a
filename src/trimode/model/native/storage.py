"""Where built libraries lie, and how one gets there whole, built once by whoever comes first.

A library is code that runs as the user. It is taken only from folders and files that nobody else
can write.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trimode.model.native.compilation import SOURCE, compile_library, source_hash
from trimode.model.native.compiler import BuildError, Compiler
from trimode.model.native.threads import num_cpus
from trimode.user_cache import cache_folder

logger = logging.getLogger(__name__)

BESIDE_SOURCE = SOURCE.parent / "build"
"""Of a library built at set-up, which needs no compiler later."""

_LOCK_NAME = "lock"
_SCRATCH = "building_"
_WAIT_S = 300.0
"""So long we wait for another process that builds: longer than any compiler takes."""

_STALE_S = 3600.0
"""A folder of objects so old belongs to a process that was killed."""


def find_prebuilt() -> Path | None:
    """The library built at set-up, if it is of these sources."""
    path = BESIDE_SOURCE / f"{source_hash()}.so"
    owners = {0, os.geteuid(), SOURCE.stat().st_uid}  # who may write the sources
    return path if _is_safe(path.parent, owners) and _is_safe(path, owners) else None


def find_cached(compiler: Compiler | None) -> Path | None:
    """The library that an earlier run has built from these sources.

    Args:
        compiler: That built it; None means any, for a machine that has no compiler now.
    """
    pattern = f"{source_hash()}_*.so" if compiler is None else _name(compiler)
    owners = {os.geteuid()}
    for folder in _folders():
        if _is_safe(folder, owners):
            for path in sorted(folder.glob(pattern)):
                if _is_safe(path, owners):
                    return path
    return None


def build(compiler: Compiler) -> Path:
    """Build the library into the user's cache, or into a temporary folder if that is read-only.

    Raises:
        BuildError: it does not compile, or no folder can be written.
    """
    return _build(compiler, _writable_folder(), _name(compiler))


def build_beside_source(compiler: Compiler) -> Path:
    """Build the library into the package, for all who use this installation.

    Raises:
        BuildError: it does not compile, or the folder cannot be written.
    """
    try:
        BESIDE_SOURCE.mkdir(exist_ok=True)
        BESIDE_SOURCE.chmod(0o755)
    except OSError as error:
        raise BuildError(f"{BESIDE_SOURCE} cannot be written ({error.strerror})") from error
    path = _build(compiler, BESIDE_SOURCE, f"{source_hash()}.so")
    for other in BESIDE_SOURCE.glob("*.so"):
        if other != path:
            other.unlink(missing_ok=True)
    return path


def _build(compiler: Compiler, folder: Path, name: str) -> Path:
    path = folder / name
    try:
        with _locked(folder):
            if path.exists():
                return path
            _sweep(folder)
            logger.warning(
                "compiling the native step with %s, once; it takes %s",
                *(compiler.identity, compiler.takes),
            )
            with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch:
                made = compile_library(compiler, Path(scratch), num_jobs=num_cpus())
                made.chmod(0o755)
                with made.open("rb") as file:
                    os.fsync(file.fileno())  # else a power cut may leave the name of an empty file
                os.replace(made, path)
    except OSError as error:
        raise BuildError(f"{folder} cannot be written ({error.strerror})") from error
    return path


def _name(compiler: Compiler) -> str:
    words = f"{compiler.identity}\0{compiler.compile_flags}"
    return f"{source_hash()}_{hashlib.sha256(words.encode()).hexdigest()[:8]}.so"


def _folders() -> tuple[Path, Path]:
    """The user's cache, and what stands in for it."""
    return (
        cache_folder() / "native",
        Path(tempfile.gettempdir()) / f"trimode_native_{os.geteuid()}",
    )


def _writable_folder() -> Path:
    reasons = []
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            reasons.append(f"{folder} cannot be made ({error.strerror})")
            continue
        if not _is_safe(folder, {os.geteuid()}):
            reasons.append(f"{folder} belongs to others, or others can write it")
        elif not os.access(folder, os.W_OK | os.X_OK):
            reasons.append(f"{folder} cannot be written")
        else:
            return folder
    raise BuildError("; ".join(reasons))


def _is_safe(path: Path, owners: set[int]) -> bool:
    """Whether it is there, and only these users can write it; links are not followed."""
    try:
        found = path.lstat()
    except OSError:
        return False
    is_kind = stat.S_ISDIR(found.st_mode) or stat.S_ISREG(found.st_mode)
    return is_kind and found.st_uid in owners and not found.st_mode & 0o022


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; without it where files cannot be locked or its holder hangs.

    Two builds at once waste time and harm nothing: each writes names of its own until it renames.
    """
    with (folder / _LOCK_NAME).open("w") as file:
        end_s = time.monotonic() + _WAIT_S
        is_told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end_s:
                    break
                if not is_told:
                    logger.warning("another process compiles the native step; waiting for it")
                is_told = True
                time.sleep(0.05)
            except OSError:
                break
        yield


def _sweep(folder: Path) -> None:
    """Remove what killed processes left behind."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        try:
            is_stale = time.time() - scratch.lstat().st_mtime > _STALE_S
        except OSError:
            continue
        if is_stale:
            shutil.rmtree(scratch, ignore_errors=True)
