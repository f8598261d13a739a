"""The one route from YAML and `key=value` to a dataclass: every wrong input is one clear line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from trimode.cli.config_file import read_config
from trimode.errors import ConfigError


@dataclass(frozen=True)
class Part:
    rate: float = 0.5
    lens: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class Config:
    name: str
    kind: Literal["a", "b"] = "a"
    count: int = 3
    is_on: bool = False
    limit: float | None = None
    part: Part = field(default_factory=Part)
    parts: tuple[Part, ...] = ()
    table: dict[str, float | str] = field(default_factory=dict)


def read(tmp_path: Path, text: str | bytes, *words: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_config(Config, path, words)


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["part.rate=1e-3"], "part", Part(rate=1e-3)),
        (["part.rate=2"], "part", Part(rate=2.0)),
        (["limit=null"], "limit", None),
        (["limit=5"], "limit", 5.0),
        (["count=1", "count=2"], "count", 2),
        (["part.lens=[4]", "part.lens.0=7"], "part", Part(lens=(7,))),
        (["parts=[{rate: 1}]", "parts.0.rate=3"], "parts", (Part(rate=3.0),)),
        (["table.x=y"], "table", {"x": "y"}),
        (["name=a=b"], "name", "a=b"),
    ],
)
def test_overrides(tmp_path: Path, words: list[str], name: str, expected: Any) -> None:
    """Overrides out of order, numbers read as strings, or a tuple left a list."""
    found = getattr(read(tmp_path, "name: x", *words), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("nam: x", [], "unknown key nam: did you mean name"),
        ("kind: a", [], "name is missing and has no default"),
        ("name: 5", [], "name is 5, but must be a string"),
        ("name: x\ncount: true", [], "count is True, but must be a whole number"),
        ("name: x\ncount: 1.0", [], "count is 1.0"),
        ("name: x\nis_on: 1", [], "is_on is 1, but must be true or false"),
        ("name: x\nkind: c", [], "kind is 'c', but must be one of a, b"),
        ("name: x\nname: y", [], "key 'name' is given twice"),
        ("name: x\npart: 3", [], "part is 3, but must be a mapping"),
        ("name: x\npart: {pair: [1]}", [], "part.pair is .*, but must be a list of 2 values"),
        ("- a", [], "must hold a mapping of keys to values, not a list"),
        ("name: [", [], "is not valid YAML"),
        ("", [], "name is missing"),
        (b"\xff\xfe\x00", [], "cannot be read"),
        ("name: x", ["count"], "must look like key=value"),
        ("name: x", ["part..rate=1"], "must look like key=value"),
        ("name: x", ["name.y=1"], "name is 'x', which has no parts"),
        ("name: x\nparts: []", ["parts.0.rate=1"], "'0' must be an index"),
        ("name: x\nparts: [{}]", ["parts.\u00b2.rate=1"], "'\u00b2' must be an index"),
        ("name: x\npart: {lens: [4]}", ["part.lens.0.x=1"], "part.lens.0 is 4, which has no parts"),
    ],
)
def test_refusals(tmp_path: Path, text: str | bytes, words: list[str], message: str) -> None:
    """A key ignored, a value bent into a type, or a traceback."""
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text, *words)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    """The operating system's words for a missing file or a folder."""
    with pytest.raises(ConfigError, match="does not exist"):
        read_config(Config, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_config(Config, tmp_path)
