"""Files to read as documents: what one is, and how a folder is walked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trimode.training.documents import Omitted, Package


@dataclass(frozen=True, slots=True)
class Target:
    """A file to read.

    Attributes:
        file: Where it is.
        path: Its path relative to its source, which names the document.
        package: What it belongs to.
    """

    file: Path
    path: PurePosixPath
    package: Package


def folder_targets(folder: Path, *, extensions: Sequence[str]) -> Iterator[Target | Omitted]:
    """The files of a folder; those with other endings are left out."""
    package = Package("folder", folder.resolve().name)
    for file in walk(folder):
        if file.suffix in extensions:
            yield Target(file, PurePosixPath(file.relative_to(folder).as_posix()), package)
        else:
            yield Omitted("extension")


def file_target(file: Path) -> Target:
    """One file, which belongs to nothing but itself."""
    return Target(file, PurePosixPath(file.name), Package("file", file.resolve().parent.name))


def walk(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder in sorted order; hidden folders and caches are left out."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n != "__pycache__")
        yield from (Path(root, name) for name in sorted(files))
