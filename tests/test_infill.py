"""Infilling text: only gaps change, candidates are ranked as said, files are safe."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trimode
from trimode.cli.main import main
from trimode.errors import RequestError
from trimode.infill import _edge, line_span

Capture = pytest.CaptureFixture[str]

SOURCE = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def __len__(self):
        return len(self.items)
"""
QUICK: dict[str, Any] = {"lengths": [2, 4, 6], "seed": 0}


@pytest.fixture(scope="module")
def lm() -> trimode.TriModeLM:
    return trimode.load("pocket", dtype="float32", device="cpu")


def test_what_is_no_gap_stays(lm: trimode.TriModeLM) -> None:
    """Prevents: text lost or doubled around a gap, offsets of the text before it was filled."""
    text = "# h\x0céllo ✓\r\nx = <FILL>\n\tif x:\n<FILL>  return <FILL>"
    filled = lm.infill(text, **QUICK)
    pieces, rest, reached = text.split("<FILL>"), filled.text, 0
    assert len(filled.gaps) == 3
    for piece, gap in zip(pieces, filled.gaps, strict=False):
        assert rest.startswith(piece)
        reached += len(piece)
        assert gap.start == reached
        assert filled.text[gap.start :].startswith(gap.text)
        rest, reached = rest[len(piece) + len(gap.text) :], reached + len(gap.text)
    assert rest == pieces[-1]


def test_spans_replace_what_stands_there(lm: trimode.TriModeLM) -> None:
    """Prevents: a marker in the text taken for a gap, and the old text left in."""
    start = SOURCE.index("self.items.append")
    stop = start + len("self.items.append(item)")
    filled = lm.infill("# <FILL>\n" + SOURCE, spans=[(start + 9, stop + 9)], **QUICK)
    [gap] = filled.gaps
    assert filled.text == f"# <FILL>\n{SOURCE[:start]}{gap.text}{SOURCE[stop:]}"


def test_candidates_come_best_first(lm: trimode.TriModeLM) -> None:
    """Prevents: ranking by something else than said, scores that are not the AR view's."""
    [gap] = lm.infill("def f(a, b):\n    c = <FILL>\n    return c\n", **QUICK).gaps
    shown = [one for one in gap.candidates if one.text.strip()]
    assert [one.log_prob for one in shown] == sorted((c.log_prob for c in shown), reverse=True)
    assert all(one.is_valid is None for one in gap.candidates)
    assert len({one.token_ids for one in gap.candidates}) == len(gap.candidates)


def test_what_parses_is_preferred(lm: trimode.TriModeLM) -> None:
    """Prevents: a broken text where a candidate would have kept it whole, and one later gap that
    makes every candidate look broken."""
    text = "def f(a, b):\n    c = <FILL>\n    return c\n\ndef g(x):\n    y = <FILL>\n"
    filled = lm.infill(text, language="python", lengths=[1, 2, 3, 4, 6, 8], seed=0)
    ast.parse(filled.text)
    for gap in filled.gaps:
        validity = [one.is_valid for one in gap.candidates if one.text.strip()]
        assert validity == sorted(validity, key=lambda is_valid: not is_valid)
        assert validity[0]
    assert False in [one.is_valid for gap in filled.gaps for one in gap.candidates]


def test_the_space_before_a_gap_is_kept_once(lm: trimode.TriModeLM) -> None:
    """Prevents: `x =  1`, or a space that the fill does not bring."""
    filled = lm.infill("for i in range(10):\n    print(<FILL>)\nx = <FILL>\n", **QUICK)
    assert "print( " not in filled.text
    assert "x =  " not in filled.text
    assert "\nx = " in filled.text


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((6, 6), "self.items.append(item)"),
        ((5, 6), "def push(self, item):\n        self.items.append(item)"),
        ((4, 4), ""),
        ((9, 9), "return len(self.items)"),
        ((1, 1), "class Stack:"),
    ],
)
def test_lines_as_gaps(lines: tuple[int, int], expected: str) -> None:
    """Prevents: a gap that takes the indentation, the line's end or a neighbour with it."""
    start, stop = line_span(SOURCE, *lines)
    assert SOURCE[start:stop] == expected


def test_a_line_s_carriage_return_stays() -> None:
    """Prevents: mixed line ends, and lines counted at form feeds."""
    text = "a\x0cb\r\n  c = 1\r\nd"
    start, stop = line_span(text, 2, 2)
    assert text[start:stop] == "c = 1"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("no gap", {}, "the text has no gap; mark each with <FILL>"),
        ("a<FILL>", {"lengths": []}, r"lengths is \[\]; allowed: integers from 1 to 48"),
        ("a<FILL>", {"lengths": [4, 49]}, r"lengths is \[4, 49\]; allowed"),
        ("a<FILL>", {"lengths": [True]}, r"lengths is \[True\]; allowed"),
        ("a<FILL>", {"language": "perl"}, "language is 'perl'; allowed: None, python"),
        ("a<FILL>", {"steps": 0}, "steps is 0; allowed: None, or 1 to 24, the longest fill"),
        ("a<FILL>", {"context": 0}, "context is 0; allowed: None, or an integer of at least 1"),
        ("a<FILL>", {"seed": -1}, "seed is -1; allowed"),
        ("a<FILL>", {"heal": 1}, "heal is 1; allowed: True or False"),
        ("a<FILL>", {"heal": None}, "heal is None; allowed: True or False"),
        ("abc", {"spans": []}, "spans is empty"),
        ("abc", {"spans": [(2, 1)]}, "spans has 2-1; allowed: in order, apart, within 0-3"),
        ("abc", {"spans": [(0, 2), (1, 3)]}, "spans has 1-3; allowed"),
        ("abc", {"spans": [(0, 4)]}, "spans has 0-4; allowed"),
        ("abc", {"spans": [(0.5, 2)]}, r"spans is \[\(0.5, 2\)\]; allowed: pairs of integers"),
        ("abc", {"spans": [(1,)]}, r"spans is \[\(1,\)\]; allowed: pairs of integers"),
        ("abc", {"spans": 3}, "spans is 3; allowed: pairs of integers"),
        ("a<FILL>", {"lengths": 4}, "lengths is 4; allowed: a list"),
        (3, {}, "text is a int; allowed: a string"),
    ],
)
def test_bad_arguments(
    lm: trimode.TriModeLM, text: Any, options: dict[str, Any], message: str
) -> None:
    """Prevents: arguments clamped, dropped or met by a traceback."""
    with pytest.raises(RequestError, match=message):
        lm.infill(text, **options)


def test_numbers_may_be_numpy_s(lm: trimode.TriModeLM) -> None:
    """Prevents: an integer refused because only integers are allowed."""
    text = "x = <FILL>\n"
    plain = lm.infill(text, lengths=[2, 4], threshold=0.5, temperature=1.0, top_k=9, seed=3)
    found = lm.infill(
        text,
        lengths=np.array([2, 4]),
        threshold=np.float32(0.5),
        temperature=np.float32(1.0),
        top_k=np.int64(9),
        seed=np.int64(3),
        spans=np.array([[4, 10]]),
    )
    assert found.gaps == plain.gaps


def test_what_is_no_text_comes_last(tiny_model: Any, byte_tokenizer: Any) -> None:
    """Prevents: half a character put into a text, or a fill judged by a token it does not show."""
    model = tiny_model(torch.float64, initializer_range=0.2)
    lm = trimode.TriModeLM(model, byte_tokenizer)
    kinds = set()
    for seed in range(8):
        options: dict[str, Any] = {"lengths": list(range(1, 6)), "temperature": 1.0, "seed": seed}
        [gap] = lm.infill("ab <FILL> cd", top_k=40, **options).gaps
        is_text = []
        for one in gap.candidates:
            ids = one.token_ids
            has_characters = bytes(i for i in ids if i < 256).decode("utf-8", "replace")
            is_text.append("\ufffd" not in has_characters and max(ids) < 256)
        assert is_text == sorted(is_text, reverse=True)
        kinds |= set(is_text)
    assert kinds == {True, False}


def test_a_long_text_keeps_the_nearest(lm: trimode.TriModeLM) -> None:
    """Prevents: a file beyond the context that cannot be filled."""
    filled = lm.infill("x = 1\n" * 1500 + "y = <FILL>\nz = 3\n" + "x = 1\n" * 1500, **QUICK)
    assert filled.text.startswith("x = 1\n" * 1500 + "y = ")
    assert filled.text.endswith("\nz = 3\n" + "x = 1\n" * 1500)


def test_ends_that_are_not_healed(lm: trimode.TriModeLM, capsys: Capture) -> None:
    """Prevents: a switch that is taken and not used, or used at one end of a gap only."""
    assert lm.vocabulary is not None
    before, behind = "import nu", "    return x\n"
    healed, plain = (_edge(lm, before, behind, (2,), heal=heal) for heal in (True, False))
    assert (healed.lengths, plain.lengths) == ((4,), (2,))
    assert healed.head
    assert healed.prompt.healed_bytes
    assert (plain.head, plain.prompt.healed_bytes) == (b"", b"")
    assert plain.edges.first is plain.edges.last is plain.edges.inner  # any text
    assert plain.prompt.token_ids == lm.encode(before)
    assert list(plain.suffix_ids) == lm.vocabulary.encode(behind)
    text = f"{before}<FILL>{behind}"
    found = {heal: lm.infill(text, heal=heal, **QUICK) for heal in (True, False)}
    assert found[False].text.startswith(before)
    assert found[False].text.endswith(behind)
    assert {len(one.token_ids) for one in found[False].gaps[0].candidates} == {2, 4, 6}
    assert {len(one.token_ids) for one in found[True].gaps[0].candidates} == {4, 6, 8}
    assert found[True].text == lm.infill(text, **QUICK).text != found[False].text
    words = ["infill", "--lengths", "2,4,6", "--seed", "0", "--json", text]
    for word, heal in (("--heal", True), ("--no-heal", False)):
        assert main([*words, word]) == 0
        assert json.loads(capsys.readouterr().out)["text"] == found[heal].text


def test_command_on_text(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: counts on stdout, an object that says another text than it holds."""
    words = ["infill", "--lengths", "2,4", "--seed", "3"]
    assert main([*words, "x = <FILL> + 1"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("x = ")
    assert shown.out.endswith(" + 1\n")
    assert "-- gap 1 of 1, line 1:" in shown.err
    stdin = io.TextIOWrapper(io.BytesIO(b"x = <FILL> + 1"))
    monkeypatch.setattr("sys.stdin", stdin)
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == shown.out.removesuffix("\n")
    assert record["seed"] == 3
    [gap] = record["gaps"]
    assert gap["text"] == gap["candidates"][0]["text"]
    assert gap["candidates"][0]["log_prob"] == pytest.approx(
        gap["candidates"][0]["fill_log_prob"] + gap["candidates"][0]["suffix_log_prob"]
    )


def test_command_on_lines_of_a_file(tmp_path: Path, capsys: Capture) -> None:
    """Prevents: a file changed without --write, or beyond its lines."""
    path = tmp_path / "a.py"
    path.write_text(SOURCE)
    words = ["infill", f"{path}:6", "--lengths", "4,6", "--seed", "0"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith(f"--- {path}\n+++ {path} (filled)\n@@")
    assert path.read_text() == SOURCE
    assert main([*words, "--write", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert path.read_text() == record["text"]
    assert record["gaps"][0]["candidates"][0]["is_valid"]
    changed = path.read_text().split("\n")
    assert changed[:5] == SOURCE.split("\n")[:5]
    assert changed[-4:] == SOURCE.split("\n")[-4:]
    ast.parse(path.read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["a.py"]


def test_what_was_not_written_is_not_called_so(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: `is_written` of a file that then could not be."""
    path = tmp_path / "a.py"
    path.write_text(SOURCE)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert main(["infill", f"{path}:6", "--lengths", "4", "--write", "--json"]) == 2
    assert capsys.readouterr().out == ""
    assert path.read_text() == SOURCE


def test_json_is_json_whatever_stands_in_the_text(capsys: Capture) -> None:
    """Prevents: -Infinity, for a mask token spelled out behind the gap."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert main(["infill", "x = <FILL> # <|mask|>\n", "--lengths", "2", "--json"]) == 0
    json.loads(capsys.readouterr().out, parse_constant=refuse)


def test_lines_that_cannot_be_gaps_together(tmp_path: Path, capsys: Capture) -> None:
    """Prevents: a complaint about places in characters, which nobody gave."""
    path = tmp_path / "a.py"
    path.write_text("a = 1\n\n\nb = 2\n")
    for lines in ("4,1", "1,1", "1-3,2"):
        assert main(["infill", f"{path}:{lines}"]) == 2
        error = capsys.readouterr().err
        assert "names lines twice or out of order" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x" * 5000], f"{'x' * 57}...' is no file and has no <FILL>; give either"),
        (["nothing"], "'nothing' is no file and has no <FILL>; give either"),
        (["missing.py:3"], "missing.py cannot be read"),
        (["a<FILL>", "--write"], "--write changes a file, and no file was named"),
        (["a<FILL>", "--lengths", "x"], "--lengths is 'x'; allowed: integers like 4,8,12"),
        (["a<FILL>", "--drafter", "x"], "adapter x: no such folder"),
        (["a<FILL>", "--draft-form", "skip"], "unrecognized arguments: --draft-form"),
    ],
)
def test_bad_words(capsys: Capture, words: list[str], message: str) -> None:
    """Prevents: more than one line, or one that does not help."""
    assert main(["infill", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_blank_line_is_filled_without_its_neighbours(lm: trimode.TriModeLM) -> None:
    """Prevents: `a = 1` made `a = 1000` where the line behind it was to be filled."""
    text = "def f(a):\n    b = 1\n\n    return b\n"
    filled = lm.infill(text, spans=[line_span(text, 3, 3)], **QUICK)
    lines = filled.text.split("\n")
    assert lines[:2] == ["def f(a):", "    b = 1"]
    assert lines[-2:] == ["    return b", ""]
    assert filled.gaps[0].text.strip()


def test_line_ends_stay_of_one_kind(lm: trimode.TriModeLM) -> None:
    """Prevents: a file with both kinds."""
    text = "def f(a):\r\n    b = <FILL>\r\n    return b\r\n"
    for gap in lm.infill(text, lengths=[4, 8, 16], seed=0).gaps:
        for one in gap.candidates:
            assert "\n" not in one.text.replace("\r\n", "")


def test_touching_gaps_see_the_text_behind_both(lm: trimode.TriModeLM) -> None:
    """Prevents: the end of the text put behind a gap that another one follows."""
    first, _ = lm.infill("x = <FILL><FILL> + 1\n", **QUICK).gaps
    [alone] = lm.infill("x = <FILL> + 1\n", **QUICK).gaps
    assert [c.token_ids for c in first.candidates] == [c.token_ids for c in alone.candidates]


def test_files_that_cannot_be_filled_as_asked(tmp_path: Path, capsys: Capture) -> None:
    """Prevents: a mark read as code, a gap nobody marked, a range that is none."""
    path = tmp_path / "a.py"
    path.write_text("a = 1\nb = <FILL>\n")
    plain = tmp_path / "b.py"
    plain.write_text("a = 1\n")
    for word, message in (
        (f"{path}:1", f"{path} has <FILL> on line 2"),
        (f"{plain}", f"{plain} has no <FILL>; mark a gap, or name lines: {plain}:12"),
        (f"{plain}:abc", "LINES is 'abc'; allowed: A, A-B or several like 3,10-12"),
    ):
        assert main(["infill", word]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_what_does_not_parse_is_not_written(tmp_path: Path, capsys: Capture) -> None:
    """Prevents: --write breaking a file that was whole."""
    path = tmp_path / "a.py"
    broken = "a = (\nb = <FILL>\n"
    path.write_text(broken)
    words = ["infill", str(path), "--lengths", "2", "--seed", "0", "--write"]
    assert main(words) == 2
    assert f"{path} would not parse with any candidate" in capsys.readouterr().err
    assert path.read_text() == broken
    assert main([*words, "--language", "none"]) == 0
    assert "-- written: " in capsys.readouterr().err
    assert path.read_text() != broken


def test_gaps_that_parse_together_only_are_written(tmp_path: Path, capsys: Capture) -> None:
    """Prevents: a refusal by a gap's candidates, none of which parses while the next is open."""
    path = tmp_path / "a.py"
    path.write_text("try:\n    a = <FILL>\n<FILL>\n    b = 1\n")
    words = ["infill", str(path), "--lengths", "1,2,3", "--seed", "0", "--write"]
    assert main(words) == 0
    capsys.readouterr()
    ast.parse(path.read_text())


def test_only_the_nearest_text_before_is_in_view(lm: trimode.TriModeLM) -> None:
    """Prevents: a gap deep in a file behind more text than the model ever saw."""
    near, far = "def f(a):\n    b = <FILL>\n    return b\n", "import os\nimport sys\n" * 400
    [deep] = lm.infill(far + near, **QUICK).gaps
    [deeper] = lm.infill(far + far + near, **QUICK).gaps
    [alone] = lm.infill(far + near, context=3, **QUICK).gaps
    assert deep.candidates == deeper.candidates
    assert deep.candidates != alone.candidates


def test_fills_are_text_and_each_is_offered_once(lm: trimode.TriModeLM) -> None:
    """Prevents: control tokens inside of a fill, and one text ranked several times."""
    assert lm.vocabulary is not None
    for text in ("fac<FILL>(n)\n", "def f(a):\n<FILL>    return a\n", "x = <FILL>\n"):
        [gap] = lm.infill(text, seed=0).gaps
        texts = [fill.text for fill in gap.candidates]
        assert len(set(texts)) == len(texts)
        ids = {i for fill in gap.candidates for i in fill.token_ids}
        assert not ids & lm.vocabulary.control_ids
