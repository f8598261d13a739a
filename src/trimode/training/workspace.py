"""The folder in which data is prepared, beside the output: hidden, resumable, moved out at the end.

`.NAME.preparing/` holds the plan (what is prepared from what), the progress of every step, and
`output/`, which becomes the output folder by a rename. Whatever is in a file that others trust was
written under another name, flushed to disk and renamed; so a run may be killed at any moment.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trimode.checkpoint.whole_folder import is_disk_full
from trimode.errors import CapacityError, ConfigError
from trimode.training.manifest import MANIFEST_NAME

logger = logging.getLogger(__name__)

_PLAN, _FINISHED, _LOCK = "plan.json", "finished.json", "lock"
_ASIDE = "old"  # where the old output is while the new one is moved into place


class Workspace:
    """Where one output is prepared.

    Attributes:
        target: The output folder to be.
        folder: The hidden folder beside it.
        output: What becomes `target`.
    """

    def __init__(self, target: Path) -> None:
        """Use `opened`."""
        self.target = target
        self.folder = target.parent / f".{target.name}.preparing"
        self.output = self.folder / "output"
        self._aside = self.folder / _ASIDE
        self._is_ours = False

    @classmethod
    @contextmanager
    def opened(cls, target: Path) -> Iterator[Workspace]:
        """The workspace of an output, for this process alone.

        Raises:
            ConfigError: The folder cannot be made, or another process prepares the same output.
            CapacityError: The disk is full. What was done so far is kept.
        """
        work = cls(target)
        try:
            try:
                lock = work._lock()
            except OSError as error:
                if is_disk_full(error):
                    raise
                raise ConfigError(
                    f"output_dir: nothing can be written beside {target} ({error.strerror})"
                ) from error
            with lock:
                work._is_ours = True
                work._put_back()
                try:
                    yield work
                finally:
                    if work._is_ours and not (work.folder / _PLAN).exists():
                        work.discard()
        except Exception as error:
            if not is_disk_full(error):
                raise
            raise CapacityError(
                f"no space left on the disk of {target.parent}: free some and run the same command "
                f"again, which goes on from what is in {work.folder.name}"
            ) from error

    def _lock(self) -> Any:
        """Locks the folder, made if need be, until the file returned is closed, or we end."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.iterdir()) and not (self.folder / _LOCK).exists():
                raise ConfigError(
                    f"output_dir: {self.folder} is needed for the work and holds something else; "
                    "move it away"
                )
            file = (self.folder / _LOCK).open("wb")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.stat(self.folder / _LOCK).st_ino == os.fstat(file.fileno()).st_ino:
                    return file
            except BlockingIOError as error:
                file.close()
                raise ConfigError(
                    f"output_dir: {self.target} is being prepared by another process; wait for it "
                    "or give another folder"
                ) from error
            except FileNotFoundError:
                pass  # the process that had it has just finished and removed the folder
            file.close()

    def _put_back(self) -> None:
        """Ends a move that was cut off: the old output is back in its place, or is gone."""
        if not self._aside.exists():
            return
        if self.target.exists():
            shutil.rmtree(self._aside)
        else:
            os.replace(self._aside, self.target)

    def begin(self, fingerprint: str) -> None:
        """Keeps earlier work with this fingerprint; any other is thrown away."""
        plan = self.read(_PLAN)
        if plan == {"fingerprint": fingerprint}:
            logger.warning("going on from the interrupted run in %s", self.folder)
        else:
            if plan is not None:
                logger.warning(
                    "the interrupted run in %s had other sources, another config or other versions:"
                    " starting afresh",
                    self.folder,
                )
            self._clear()
            self.write(_PLAN, {"fingerprint": fingerprint})
        self.output.mkdir(exist_ok=True)

    def is_finished(self, fingerprint: str) -> bool:
        """Whether a run with this fingerprint was cut off after its output was in place."""
        finished = self.read(_FINISHED)
        if finished is None or self.output.exists() or self.read(_PLAN) is None:
            return False
        manifest = self.target / MANIFEST_NAME
        return finished == {
            "fingerprint": fingerprint,
            "manifest": _sha256(manifest) if manifest.is_file() else "",
        }

    def publish(self) -> None:
        """Renames the finished output into place; an old one is moved aside first, removed last."""
        plan = self.read(_PLAN) or {}
        self.write(_FINISHED, {**plan, "manifest": _sha256(self.output / MANIFEST_NAME)})
        if self.target.exists():
            os.replace(self.target, self._aside)
        try:
            os.replace(self.output, self.target)
        except OSError:
            self._put_back()
            raise
        self.discard()

    def discard(self) -> None:
        """Removes all work and the folder."""
        self._clear()
        (self.folder / _LOCK).unlink()
        with suppress(OSError):  # the next process may be in it by now
            self.folder.rmdir()
        self._is_ours = False

    def _clear(self) -> None:
        """Removes all but the lock. The plan goes first: nothing half removed is gone on from."""
        (self.folder / _PLAN).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()

    def read(self, name: str) -> Any:
        """The content of a JSON file of the work; None if it is not there."""
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def write(self, name: str, value: Any) -> None:
        """Writes a JSON file of the work, whole or not at all."""
        write_whole(self.folder / name, json.dumps(value).encode())


def write_whole(path: Path, raw: bytes) -> None:
    """Writes a file that exists complete, on disk, or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(raw)
        flush(file)
    os.replace(partial, path)


def flush(file: Any) -> None:
    """Puts what was written to an open file on disk."""
    file.flush()
    os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
