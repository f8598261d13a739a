"""The rules of the repository that a reader cannot check at a glance."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from trimode.cli.config_file import read_config
from trimode.cli.main import _parse
from trimode.training.config import TrainConfig
from trimode.training.prepare import PrepareConfig

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "trimode"

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "_version": set(),
    "user_cache": set(),
    "model": {"errors", "user_cache"},
    "checkpoint": {"model", "errors", "user_cache"},
    "decoding": {"model", "errors"},
    "engine": {"decoding", "model", "errors", "user_cache"},
    "messages": {"errors"},
    "rendering": {"messages", "vocabulary", "errors"},
    "tool_calls": {"messages", "rendering", "detokenize", "vocabulary", "errors"},
    "conversation": {
        *("messages", "rendering", "tool_calls", "heal", "vocabulary"),
        *("decoding", "errors"),
    },
    "vocabulary": {"decoding", "errors"},
    "heal": {"vocabulary"},
    "detokenize": {"vocabulary"},
    "arguments": {"heal", "errors"},
    "generation": {"decoding"},
    "prompts": {"arguments", "heal", "vocabulary", "model", "errors"},
    "revision": {"arguments", "vocabulary", "decoding", "model", "errors"},
    "infill": {
        *("arguments", "detokenize", "heal", "prompts", "revision", "vocabulary"),
        *("engine", "decoding", "model", "errors"),
    },
    "stream": {"detokenize", "generation", "engine", "decoding"},
    "dialogue": {
        *("stream", "generation", "messages", "prompts"),
        *("engine", "decoding", "model", "errors"),
    },
    "runtime": {
        *(
            "arguments",
            "conversation",
            "detokenize",
            "dialogue",
            "generation",
            "heal",
            "infill",
            "prompts",
            "revision",
            "stream",
        ),
        *("vocabulary", "messages", "rendering", "tool_calls"),
        *("engine", "decoding", "checkpoint", "model", "errors"),
    },
    "loading": {"runtime", "arguments", "engine", "checkpoint", "model", "errors"},
    "training": {"conversation", "vocabulary", "checkpoint", "model", "errors", "_version"},
    "evaluation": {
        "training",
        "loading",
        "runtime",
        "engine",
        "decoding",
        "checkpoint",
        "model",
        "errors",
    },
    "serving": {
        *("loading", "runtime", "infill"),  # it runs what runtime runs, in steps
        *("conversation", "detokenize", "messages", "rendering", "tool_calls"),
        *("engine", "decoding", "checkpoint", "model", "errors", "_version"),
    },
    "selfgen": {
        *("runtime", "conversation", "training"),  # of training: near duplicates
        *("engine", "decoding", "checkpoint", "model", "errors"),
    },
    "hf": {"runtime", "engine", "decoding", "checkpoint", "model", "errors"},
    "cli": {
        *("serving", "evaluation", "selfgen", "training", "loading", "runtime", "infill", "engine"),
        *("conversation", "detokenize", "decoding", "checkpoint", "model", "errors", "_version"),
    },
    "__main__": {"cli"},
    "__init__": {"loading", "runtime", "errors", "_version"},
}
"""Part of the package -> the other parts it may import. A new part is added here, on purpose."""

MAX_LINES = 500
LONG_FILES: dict[str, str] = {}
"""File under src -> the reason why it is longer than `MAX_LINES`."""

MAX_FILE_BYTES = 15_000_000
MAX_TREE_BYTES = 56 * 2**20
MAX_EXAMPLE_LINES = 40

SOURCES = sorted(PACKAGE.rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_NAMED_PATH = re.compile(r"(?<![\w/.-])(?:src|configs|docs|tests)/[\w./*-]*\w")


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _part(path: Path) -> str:
    """`src/trimode/model/cache.py` -> `model`; `src/trimode/hf.py` -> `hf`."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _imported_parts(source: str, *, package: tuple[str, ...]) -> set[str]:
    """Parts of trimode that a source imports, at any depth of its code.

    Args:
        source: Python source.
        package: Package the source lives in, for relative imports: ("trimode", "model").
    """
    names: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names |= {(*base, alias.name) for alias in node.names}
    parts = {name[1] if len(name) > 1 else "__init__" for name in names if name[0] == "trimode"}
    return {part if part in MAY_IMPORT else "__init__" for part in parts}


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("import trimode.engine.engine", {"engine"}),
        ("from trimode import hf, load", {"hf", "__init__"}),
        ("from ..decoding.step import Step", {"decoding"}),
        ("from .. import runtime", {"runtime"}),
        ("from . import masks", {"model"}),
        ("def f():\n    from trimode.cli.main import main", {"cli"}),
        ("import torch", set()),
    ],
)
def test_imports_are_seen_in_every_spelling(source: str, parts: set[str]) -> None:
    """A checker blind to one form of import would let arrows point up unnoticed."""
    assert _imported_parts(source, package=("trimode", "model")) == parts


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_arrows_point_down(path: Path) -> None:
    """Prevents a lower layer from learning about a higher one, and so cycles."""
    part = _part(path)
    assert part in MAY_IMPORT, f"{_name(path)}: add {part!r} to MAY_IMPORT"
    package = ("trimode", *path.relative_to(PACKAGE).parent.parts)
    imported = _imported_parts(path.read_text(encoding="utf-8"), package=package) - {part}
    wrong = imported - MAY_IMPORT[part]
    assert not wrong, f"{_name(path)}: {part} must not import {sorted(wrong)}"


def test_the_allowed_arrows_hold_no_cycle() -> None:
    """A table that allowed a cycle would make the test above worthless."""
    left = {part: set(below) for part, below in MAY_IMPORT.items()}
    while left:
        free = {part for part, below in left.items() if not below & left.keys()}
        assert free, f"cycle among {sorted(left)}"
        for part in free:
            del left[part]


def test_training_stays_clear_of_decoding() -> None:
    """Training must not need the engine: what it wants of it is passed in."""
    assert not MAY_IMPORT["training"] & {"decoding", "engine", "runtime", "hf"}
    assert MAY_IMPORT["model"] == {"errors", "user_cache"}


def test_no_file_is_a_drawer_for_everything() -> None:
    """A utils.py has no noun, so everything ends up in it."""
    assert not [_name(path) for path in SOURCES if path.stem in ("utils", "util", "helpers")]


def test_long_files_have_a_reason() -> None:
    """Prevents god files."""
    lengths = {_name(path): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    too_long = {name for name, length in lengths.items() if length > MAX_LINES}
    assert too_long == LONG_FILES.keys()


def test_lines_of_cpp_are_short() -> None:
    """Prevents: lines over 100 columns where no linter looks."""
    paths = [path for path in _tracked() if path.suffix in (".h", ".cpp", ".cu")]
    assert paths
    long = [
        f"{_name(path)}:{number}"
        for path in paths
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if len(line) > 100
    ]
    assert not long


def _tracked() -> list[Path]:
    try:
        listing = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listing.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_tracked_files_are_small() -> None:
    """Prevents weights or data from being committed by accident."""
    sizes = {_name(path): path.stat().st_size for path in _tracked()}
    too_big = {name: size for name, size in sizes.items() if size >= MAX_FILE_BYTES}
    assert not too_big
    assert sum(sizes.values()) < MAX_TREE_BYTES


def test_no_folder_of_one_machine_is_named() -> None:
    """Prevents commands in results and docs that nobody else can run."""
    folder = re.compile(rb"(?:^|[\s\"'`=(,:])/(?:work|home|root|Users)/", re.M)
    texts = (".py", ".md", ".json", ".yaml", ".toml", ".js", ".html", "Makefile")
    named = [path for path in _tracked() if path.name.endswith(texts)]
    assert not [_name(path) for path in named if folder.search(path.read_bytes())]


@pytest.mark.parametrize("module", ["trimode", "trimode.cli.main"])
def test_importing_is_light(module: str) -> None:
    """`trimode --help` must not take seconds because something imports torch at the top."""
    code = (
        f"import sys, {module}\n"
        "print(*({'torch', 'transformers', 'numpy'} & set(sys.modules)), end='')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=_name)
def test_examples_are_short(path: Path) -> None:
    """An example longer than a screen shows that the API is missing something."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_EXAMPLE_LINES


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=_name)
def test_written_commands_are_understood(page: Path) -> None:
    """Prevents a page or a config that shows an option which its command does not have."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    if page.suffix == ".yaml":
        blocks = [re.sub(r"^#\s*(?:Command:)?\s*", "", text, flags=re.MULTILINE)]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in filter(lambda line: line.strip().startswith("trimode "), lines):
        _, *words = shlex.split(line.partition(" | ")[0], comments=True)
        with suppress(SystemExit):  # of --help
            _parse(words)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_named_paths_exist(page: Path) -> None:
    """Prose that names a file which was moved or never written misleads."""
    named = set(_NAMED_PATH.findall(page.read_text(encoding="utf-8")))
    missing = sorted(path for path in named if not list(ROOT.glob(path)))
    assert not missing, f"{_name(page)} names {missing}"


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_configs_parse(path: Path) -> None:
    """A config that its own dataclass refuses was never run."""
    cls = PrepareConfig if path.stem.endswith("_data") else TrainConfig
    assert isinstance(read_config(cls, path), cls)
