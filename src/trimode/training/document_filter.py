"""Why a file is not worth learning from: one function per reason, and the order they are asked in.

Only looks at the bytes and the name of one document; duplicates and licences are judged elsewhere.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

VENDORED_FOLDERS = frozenset(
    """
    _vendor vendor vendored _vendored extern externals external third_party thirdparty _distutils
    node_modules site-packages dist-packages
    """.split()
)
TEST_FOLDERS = frozenset({"test", "tests"})
PROSE_EXTENSIONS = frozenset({".txt", ".md", ".rst"})

MAX_LINE_CHARS = 1000
MAX_MEAN_LINE_CHARS = 120
MIN_TABLE_LINES = 40

_GENERATED = re.compile(
    r"@generated|auto-?generated|(?:automatically|machine)[ -]generated"
    r"|\b(?:code|content|file|module|is|was) generated\b"
    r"|^\W*generated (?:by|content|file|from|with)\b"
    r"|do not (?:edit|modify)(?! this line)",
    re.IGNORECASE,
)
_HEAD_LINES = 12
# A line that holds nothing but literals and brackets, perhaps with a comment behind it.
_LITERAL_LINE = re.compile(
    r"""\s*+(?>
        [-+]?(?:0[xX][0-9a-fA-F_]++|(?:\d[\d_]*+\.?|\.\d)[\d_]*+(?:[eE][-+]?\d++)?j?)
      | [rbuRBU]{0,2}'(?:[^'\\\n]|\\.)*+' | [rbuRBU]{0,2}"(?:[^"\\\n]|\\.)*+"
      | None\b | True\b | False\b | [\[\](){},:] | [ \t]
    )++(?:\#.*)?""",
    re.VERBOSE,
)


def folder_reason(path: PurePosixPath, *, include_tests: bool) -> str | None:
    """Returns why a path, relative to its source, is skipped for where it lies, or None."""
    folders = set(path.parts[:-1])
    if folders & VENDORED_FOLDERS:
        return "vendored"
    if not include_tests and (folders & TEST_FOLDERS or path.name == "conftest.py"):
        return "tests"
    return None


def decode(raw: bytes) -> tuple[str, str | None]:
    """Returns the text, without a BOM, and None; or an empty text and why there is none."""
    if b"\0" in raw:
        return "", "binary"
    try:
        return raw.decode("utf-8-sig"), None
    except UnicodeDecodeError:
        return "", "undecodable"


def length_reason(num_bytes: int, *, min_bytes: int, max_bytes: int) -> str | None:
    """Returns `too short`, `too long` or None."""
    if num_bytes < min_bytes:
        return "too short"
    return "too long" if num_bytes > max_bytes else None


def generated_reason(text: str) -> str | None:
    """Returns `generated` for source text that no one wrote by hand, else None.

    Three signs: it says so in its first lines; its lines are too long to have been typed; or most
    of its lines are nothing but literals (character maps, test vectors, word lists).
    """
    lines = text.splitlines()
    if any(_GENERATED.search(line) for line in lines[:_HEAD_LINES]):
        return "generated"
    if not lines:
        return None
    longest = max(map(len, lines))
    if longest > MAX_LINE_CHARS or len(text) / len(lines) > MAX_MEAN_LINE_CHARS:
        return "generated"
    return "generated" if _is_table(lines) else None


def _is_table(lines: list[str]) -> bool:
    written = [line for line in lines if line.strip()]
    if len(written) < MIN_TABLE_LINES:
        return False
    return 2 * sum(_LITERAL_LINE.fullmatch(line) is not None for line in written) > len(written)
