"""What is built is what is in the tree: a wheel holds every module and the default model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "trimode"
POCKET_MODEL = PACKAGE / "assets" / "pocket"

IMPORT_ALL = """
import importlib, pathlib, sys
import trimode
target = pathlib.Path(sys.argv[1]).resolve()
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert target in pathlib.Path(module.__file__).resolve().parents, (name, module.__file__)
print(trimode.__file__)
"""


def _run(*command: str, cwd: Path, **env: str) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, timeout=240
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy so that the tree stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", tree / "src", ignore=unwanted)
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation")
    _run(*build, "--outdir", str(folder / "dist"), str(tree), cwd=folder)
    (path,) = (folder / "dist").glob("*.whl")
    return path


def test_wheel_holds_every_file(wheel: Path) -> None:
    """Prevents a package that lacks its modules, its types marker, its weights or its C++."""
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    expected = [*PACKAGE.rglob("*.py"), PACKAGE / "py.typed"]
    expected += [*PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")]
    if POCKET_MODEL.is_dir():
        expected += [path for path in POCKET_MODEL.rglob("*") if path.is_file()]
    names = {path.relative_to(PACKAGE.parent).as_posix() for path in expected}
    assert not sorted(names - inside)
    assert not [name for name in inside if name.endswith(".so")]  # of the machine that packed it


def test_every_module_imports_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """Prevents a module that works only because the tests run beside the sources."""
    target = tmp_path / "site"
    install = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    _run(*install, "--disable-pip-version-check", "--target", str(target), str(wheel), cwd=tmp_path)
    modules = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1] != "__main__":  # importing it runs the command
            modules.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    found = _run(
        *(sys.executable, "-c", IMPORT_ALL, str(target), *modules),
        cwd=tmp_path,
        PYTHONPATH=str(target),
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert Path(found.strip()).is_relative_to(target)
