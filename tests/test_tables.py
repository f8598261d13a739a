"""The measured tables in the pages are those of the committed results."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "fill_tables.py"


@pytest.fixture(scope="module")
def fill_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fill_tables", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_show_what_was_measured(fill_tables: ModuleType) -> None:
    """A new result whose old figures stay in a page, or a figure mended by hand."""
    shown: set[str] = set()
    for page in fill_tables.PAGES:
        text = page.read_text(encoding="utf-8")
        assert fill_tables.filled(text) == text, f"{page.name}: run benchmarks/fill_tables.py"
        shown |= {name for name in fill_tables.TABLES if f"<!-- table: {name} -->" in text}
    assert shown == set(fill_tables.TABLES)


def test_filling_replaces_only_what_is_marked(
    fill_tables: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text around a table eaten, or a table that grows each time."""
    monkeypatch.setattr(fill_tables, "TABLES", {"one": lambda: "| 1 |", "two": lambda: "| 2 |"})
    before = (
        "a\n<!-- table: one -->\nold\n<!-- end of table -->\nb\n"
        "<!-- table: two -->\n<!-- end of table -->\nc\n"
    )
    after = fill_tables.filled(before)
    assert after == (
        "a\n<!-- table: one -->\n| 1 |\n<!-- end of table -->\nb\n"
        "<!-- table: two -->\n| 2 |\n<!-- end of table -->\nc\n"
    )
    assert fill_tables.filled(after) == after
