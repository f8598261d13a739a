"""Revising text: only what may change changes, gains are what a slow twin finds, files are safe."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trimode
from tests.reference import next_logits
from trimode.checkpoint.io import POCKET_MODEL
from trimode.cli.main import main
from trimode.cli.text_file import write_file
from trimode.decoding import editing
from trimode.errors import RequestError

SMALL = {"vocab_size": 24, "mask_token_id": 23, "bos_token_id": 0, "eos_token_id": 1}
Capture = pytest.CaptureFixture[str]

SOURCE = """import os
import sys


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    args = parser.parse_args(argv)
    for name im args.names:
        print(name)
    return 0
"""


@pytest.fixture(scope="module")
def lm() -> trimode.TriModeLM:
    return trimode.load("pocket", dtype="float32", device="cpu")


def test_gains_are_those_of_the_slow_twin(tiny_model: Any) -> None:
    """A shifted target, a window that begins at the wrong token."""
    model = tiny_model(torch.float64, initializer_range=0.3, **SMALL)
    ids = random.Random(0).choices(range(3, 20), k=40)
    made = editing.revise(
        model, ids, editable=range(40), budget=3, block_length=4, min_gain=0.0, banned={0, 1, 23}
    )
    assert made
    following = editing.NUM_FOLLOWING
    for one in made:
        assert ids[one.index] == one.old_id != one.new_id
        changed = [*ids[: one.index], one.new_id, *ids[one.index + 1 :]]
        stop = min(one.index + 1 + following, 40)
        before = _plain(model, ids, one.index, stop)
        after = _plain(model, changed, one.index, stop)
        assert one.gain == pytest.approx(after - before, abs=1e-4)
        assert one.log_prob == pytest.approx(_plain(model, ids, one.index, one.index + 1), abs=1e-4)
        ids = changed


def _plain(model: Any, ids: list[int], start: int, stop: int) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(start, stop))


def test_proposals_see_what_follows_and_not_each_other(tiny_model: Any) -> None:
    """Groups that see one another, the text behind their block, or the token they replace."""
    model = tiny_model(torch.float64, initializer_range=0.3, **SMALL)
    ids = random.Random(1).choices(range(3, 20), k=30)
    places = [5, 6, 17, 29, 1]
    found = editing._proposals(model, ids, places, block_length=4, banned={23}, adapter=None)
    for index, token_id in zip(places, found, strict=True):
        start = max(1, min(index - 2, 26))
        block = [23 if i == index else ids[i] for i in range(start, start + 4)]
        logits = next_logits(model, ids[:start], block)[index]
        assert token_id == int(logits.argmax())


def test_a_typing_error_is_found(lm: trimode.TriModeLM) -> None:
    """An edit of something else than what is wrong."""
    revision = lm.revise(SOURCE, budget=1)
    [edit] = revision.edits
    assert (edit.line, edit.old) == (8, "m")
    assert "name im args" not in revision.text
    assert edit.gain > 8


def test_corrupted_tokens_of_real_code_are_put_right(lm: trimode.TriModeLM) -> None:
    """A revision that is no better than chance."""
    lines = (POCKET_MODEL / "heldout_prompts.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    rng, right = random.Random(0), 0
    for line in lines:
        ids = lm.encode(json.loads(line)["prompt"])
        index = rng.randrange(len(ids) // 3, len(ids) - 4)
        damaged = [*ids[:index], rng.randrange(20, 4096), *ids[index + 1 :]]
        made = editing.revise(
            lm.model,
            damaged,
            editable=range(len(ids)),
            budget=1,
            block_length=8,
            min_gain=1.0,
            banned={0, 1, 2},
        )
        right += [(one.index, one.new_id) for one in made] == [(index, ids[index])]
    assert right >= 8


@pytest.mark.parametrize("lines", [(1, 2), (5, 7), (9, 9), (1, 10)])
def test_only_the_lines_asked_for_change(lm: trimode.TriModeLM, lines: tuple[int, int]) -> None:
    """A token that reaches out of the range, or an offset of one line."""
    text = "# h\x0céllo ✓\r\n" + SOURCE.split("\n", 1)[1]
    revision = lm.revise(text, lines=lines, budget=6, min_gain=0.0)
    before, first, last = text.split("\n"), *lines
    head, tail = "\n".join(before[: first - 1]), "\n".join(before[last:])
    assert revision.text.startswith(head)
    assert revision.text.endswith(tail)
    assert revision.edits or lines == (9, 9)
    for edit in revision.edits:
        assert first <= edit.line <= last
        assert text[edit.start : edit.start + len(edit.old)] == edit.old


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lines": (0, 2)}, "lines is 0-2; allowed: a range within 1-10"),
        ({"lines": (4, 3)}, "lines is 4-3; allowed"),
        ({"lines": (1, 11)}, "lines is 1-11; allowed"),
        ({"budget": 0}, "budget is 0; allowed"),
        ({"min_gain": -1}, "min_gain is -1; allowed"),
        ({"min_gain": float("nan")}, "min_gain is nan; allowed"),
        ({"min_gain": True}, "min_gain is True; allowed"),
        ({"lines": 5}, "lines is 5; allowed: None, or first and last line"),
        ({"lines": (1.0, 2)}, r"lines is \(1.0, 2\); allowed"),
    ],
)
def test_bad_arguments(lm: trimode.TriModeLM, options: dict[str, Any], message: str) -> None:
    """A range taken for another one."""
    with pytest.raises(RequestError, match=message):
        lm.revise(SOURCE, **options)


def test_what_is_no_text_of_its_own_is_not_tried(tiny_model: Any) -> None:
    """Prevents: an edit to half a character, dropped in the end while later ones were judged
    beside it."""
    model = tiny_model(torch.float64, initializer_range=0.3, **SMALL)
    ids = random.Random(0).choices(range(3, 20), k=40)
    options: dict[str, Any] = {"editable": range(40), "budget": 3, "block_length": 4}
    options |= {"min_gain": 0.0, "banned": {0, 1, 23}}
    halves = {one.new_id for one in editing.revise(model, ids, **options)}
    made = editing.revise(model, ids, is_text=lambda token_id: token_id not in halves, **options)
    assert made
    assert halves.isdisjoint(one.new_id for one in made)


def test_numbers_may_be_numpy_s(lm: trimode.TriModeLM) -> None:
    """Prevents: an integer refused because only integers are allowed."""
    found = lm.revise(SOURCE, budget=np.int64(1), min_gain=np.float32(16), lines=np.array([1, 9]))
    assert found == lm.revise(SOURCE, budget=1, lines=(1, 9))


def test_too_long_a_text_is_refused(lm: trimode.TriModeLM) -> None:
    """A text cut in silence."""
    with pytest.raises(RequestError, match="beyond the context of 2048"):
        lm.revise("x = 1\n" * 3000)


def test_the_file_changes_only_on_request(tmp_path: Path, capsys: Capture) -> None:
    """A diff that writes; a file without its permissions; a left-over beside it."""
    path = tmp_path / "a.py"
    path.write_text(SOURCE)
    path.chmod(0o640)
    words = ["revise", str(path), "--budget", "1"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"--- {path}\n+++ {path} (revised)\n@@")
    assert "-    for name im args.names:\n" in shown.out
    assert "line 8: 'm' -> " in shown.err
    assert path.read_text() == SOURCE
    assert main([*words, "--write", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["is_written"]
    assert path.read_text() == record["text"] != SOURCE
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["a.py"]


def test_nothing_to_do_prints_nothing(tmp_path: Path, capsys: Capture) -> None:
    """A file touched without a change."""
    path = tmp_path / "a.py"
    path.write_text(SOURCE)
    assert main(["revise", str(path), "--min-gain", "500", "--write"]) == 0
    assert capsys.readouterr().out == ""
    assert path.read_text() == SOURCE


def test_a_file_that_is_not_changed_is_not_called_written(tmp_path: Path, capsys: Capture) -> None:
    """Prevents: `is_written` of a file that stayed as it was."""
    path = tmp_path / "a.py"
    path.write_text(SOURCE)
    assert main(["revise", str(path), "--min-gain", "500", "--write", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_written"] is False


def test_a_change_made_meanwhile_is_kept(tmp_path: Path, capsys: Capture) -> None:
    """Prevents: what somebody saved while the model was at work, lost."""
    path = tmp_path / "a.py"
    path.write_text("saved meanwhile")
    with pytest.raises(RequestError, match="has changed since it was read"):
        write_file(path, "revised", was="as it was read")
    assert path.read_text() == "saved meanwhile"


def test_files_beside_it_are_left_alone(tmp_path: Path) -> None:
    """Prevents: somebody's own `.a.py.partial` overwritten, a name too long once it is longer."""
    other = tmp_path / ".a.py.partial"
    other.write_text("mine")
    for path in (tmp_path / "a.py", tmp_path / ("n" * 255)):
        path.write_text("old")
        write_file(path, "new", was="old")
        assert path.read_text() == "new"
    assert other.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_that_may_not_be_written_stays(tmp_path: Path) -> None:
    """Prevents: a replacement that asks the folder for leave, and not the file."""
    path = tmp_path / "a.py"
    path.write_text("old")
    path.chmod(0o444)
    with pytest.raises(RequestError, match="cannot be written: Permission denied"):
        write_file(path, "new", was="old")
    assert path.read_text() == "old"


def test_a_full_disk_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file."""
    path = tmp_path / "a.py"
    path.write_text(SOURCE)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert main(["revise", str(path), "--budget", "1", "--write"]) == 2
    assert path.read_text() == SOURCE
    assert [p.name for p in tmp_path.iterdir()] == ["a.py"]


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (b"\xff\xfe", [], "is not UTF-8 (byte 0)"),
        (b"x", ["--lines", "b-3"], "--lines is 'b-3'; allowed: A-B or A"),
        (b"x", ["--lines", "2"], "lines is 2-2; allowed: a range within 1-1"),
        (None, [], "cannot be read: No such file"),
    ],
)
def test_bad_files(
    tmp_path: Path, capsys: Capture, content: bytes | None, more: list[str], message: str
) -> None:
    """A traceback for somebody's binary."""
    path = tmp_path / "a.py"
    if content is not None:
        path.write_bytes(content)
    assert main(["revise", str(path), *more]) == 2
    assert message in capsys.readouterr().err


def test_the_last_line_break_stays(lm: trimode.TriModeLM) -> None:
    """Prevents: a file that no longer ends in a line break."""
    for text in (
        "def f():\n    return 1\n",
        "import os\n\n\ndef g(a, b):\n    x = a + b\n    return x\n",
    ):
        assert lm.revise(text, budget=5, min_gain=0.0).text.endswith("\n")
