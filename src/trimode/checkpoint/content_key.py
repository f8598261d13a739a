"""A key of a file's content, remembered while the file's path, size, inode and times stay.

Reading gigabytes at every start would cost seconds. The memory lies in the user's cache; where the
cache cannot be written, the file is read each time.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

from trimode.user_cache import cache_folder

_LENGTH = 16
"""Hexadecimal digits of a key: 64 bits, for the few files of one user."""


def content_key(file: Path) -> str:
    """The start of the SHA-256 of a file, in hexadecimal digits."""
    place, status = str(file.resolve()), file.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns]
    memory = cache_folder() / "models" / "content_keys.json"
    known = _read(memory)
    found = known.get(place)
    if isinstance(found, list) and found[:-1] == stamp and isinstance(found[-1], str):
        return str(found[-1])
    with file.open("rb") as content:
        key = hashlib.file_digest(content, "sha256").hexdigest()[:_LENGTH]
    with suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        partial = memory.with_suffix(f".{os.getpid()}")
        try:
            partial.write_text(json.dumps(known | {place: [*stamp, key]}), encoding="utf-8")
            partial.replace(memory)
        finally:
            partial.unlink(missing_ok=True)
    return key


def _read(memory: Path) -> dict[str, object]:
    try:
        content = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or cut off: it is made again
        return {}
    return content if isinstance(content, dict) else {}
