"""The `.py` files of installed packages and of Python's standard library."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path, PurePosixPath

from trimode.errors import ConfigError
from trimode.training.documents import Omitted, Package
from trimode.training.licences import declared_licence, is_permissive
from trimode.training.source_files import Target, walk

ALL_INSTALLED = "installed"
STDLIB_LICENCE = "PSF-2.0"

_OWN_NAME = "trimode"
_NOT_STDLIB = frozenset(
    """
    site-packages dist-packages lib-dynload __pycache__ test tests idlelib lib2to3 pydoc_data
    turtledemo
    """.split()
)


def package_targets(names: Sequence[str]) -> Iterator[Target | Omitted]:
    """The files of packages in the order of their names, those with a permissive licence.

    Raises:
        ConfigError: A package is not installed.
    """
    for distribution in _distributions(names):
        package = Package(
            "package",
            normalised(distribution.metadata["Name"]),
            distribution.version,
            declared_licence(distribution.metadata),
        )
        if not is_permissive(package.licence):
            yield Omitted("licence", f"{package.name}: {package.licence}")
            continue
        for file in sorted(distribution.files or [], key=str):
            path = PurePosixPath(file)
            if path.suffix == ".py" and ".." not in path.parts:
                yield Target(Path(str(distribution.locate_file(file))), path, package)


def stdlib_targets() -> Iterator[Target | Omitted]:
    """The files of the standard library; every top-level module is a package of its own."""
    paths = sysconfig.get_paths()
    root, version = Path(paths["stdlib"]), sysconfig.get_python_version()
    for top in sorted(root.iterdir()):
        if top.name in _NOT_STDLIB or top.name.startswith(("config-", "_sysconfigdata")):
            continue
        package = Package("stdlib", top.stem, version, STDLIB_LICENCE)
        for file in [top] if top.is_file() else walk(top):
            if file.suffix == ".py":
                yield Target(file, PurePosixPath(file.relative_to(root).as_posix()), package)


def normalised(name: str) -> str:
    """Returns a distribution name as package indexes compare it: `Typing_Extensions` and
    `typing-extensions` are one."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _distributions(names: Sequence[str]) -> list[metadata.Distribution]:
    installed: dict[str, metadata.Distribution] = {}
    for found in metadata.distributions():  # the first on the path is the one that is imported
        installed.setdefault(normalised(found.metadata["Name"] or ""), found)
    installed.pop(_OWN_NAME, None)
    installed.pop("", None)
    wanted = {normalised(name) for name in names}
    if ALL_INSTALLED in wanted:
        wanted |= set(installed)
        wanted.remove(ALL_INSTALLED)
    if missing := sorted(wanted - set(installed)):
        raise ConfigError(
            f"packages: {', '.join(missing)} not installed; name installed packages other than "
            f"{_OWN_NAME}, or `{ALL_INSTALLED}` for all of them"
        )
    return [installed[name] for name in sorted(wanted)]
