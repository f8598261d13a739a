"""`trimode selfgen`: files that a killed run goes on with, refusals, and what it prints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimode.cli.main import main
from trimode.errors import ConfigError
from trimode.selfgen import Output

Capture = pytest.CaptureFixture[str]

NUM = 40


def words(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        *("selfgen", "--model", str(folder), "--output", str(out), "--dtype", "float64"),
        *("--num", str(NUM), "--max-prompt-tokens", "16", "--max-answer-tokens", "64"),
        *("--temperature", "0,1", "--held-out", "0.2", "--batch", "4", *more),
    ]


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.parent.iterdir())}


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert main(words(folder, out)) == 0
    return files(out)


def test_a_run_writes_conversations_and_counts(whole: dict[str, bytes]) -> None:
    """Prevents: counts that do not agree with the lines, or files left over from the run."""
    assert set(whole) == {"out.jsonl", "out.jsonl.counts.json", "out.jsonl.dropped.jsonl"}
    kept = [json.loads(line) for line in whole["out.jsonl"].splitlines()]
    dropped = [json.loads(line) for line in whole["out.jsonl.dropped.jsonl"].splitlines()]
    summary = json.loads(whole["out.jsonl.counts.json"])
    counts = summary["counts"]
    assert summary["is_finished"]
    assert counts["kept"] == len(kept) == NUM
    assert sum(counts["dropped"].values()) == len(dropped) > 0
    assert sorted(one["index"] for one in kept + dropped) == list(range(counts["indexes"]))
    assert counts["answer_tokens"] == sum(len(one["answer_ids"]) for one in kept)
    assert counts["held_out"] == sum(one["split"] == "held_out" for one in kept) > 0


def test_a_killed_run_goes_on(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Prevents: a run that loses, repeats or changes conversations when it is killed."""
    out = tmp_path / "run" / "out.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for stop, at_least in ((signal.SIGTERM, 4), (signal.SIGKILL, 12)):
        command = [sys.executable, "-m", "trimode", *words(folder, out)]
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started = time.monotonic()
        while not out.exists() or out.read_bytes().count(b"\n") < at_least:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < started + 120
            time.sleep(0.01)
        process.send_signal(stop)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (0 if stop == signal.SIGTERM else -stop)
        assert ("the same command goes on" in said) == (stop == signal.SIGTERM)
        assert out.read_bytes() != whole["out.jsonl"], "it was finished before it was stopped"
    with out.open("ab") as opened:
        opened.write(b'{"index": 17, "mess')
    assert main([*words(folder, out), "--batch", "7"]) == 0
    assert files(out) == whole


def test_a_gap_is_written_anew(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """Prevents: an index that is missing for ever after a crash of the machine."""
    out = tmp_path / "out.jsonl"
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    lines = whole["out.jsonl"].splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:9] + lines[10:]))
    assert main(words(folder, out)) == 0
    assert files(out) == whole


def test_a_larger_number_goes_on_with_a_finished_run(
    folder: Path, whole: dict[str, bytes], tmp_path: Path, capsys: Capture
) -> None:
    """Prevents: an afternoon's conversations that cannot be added to; or a run cut short."""
    out = tmp_path / "out.jsonl"
    assert main([*words(folder, out), "--num", "15"]) == 0
    assert main(words(folder, out)) == 0
    assert files(out) == whole
    capsys.readouterr()
    assert main([*words(folder, out), "--num", "15"]) == 2
    assert "num is 15; allowed: at least 40" in capsys.readouterr().err
    assert files(out) == whole


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--seed", "1"), "written with seed 0, not 1"),
        (("--temperature", "0"), "written with temperatures [0.0, 1.0], not [0.0]"),
        (("--batch", "0"), "batch is 0"),
        (("--temperature", "0,,1"), "--temperature: '0,,1'; allowed: numbers with commas"),
        (("--prompts", "none.txt"), "prompts: none.txt cannot be read"),
    ],
)
def test_other_arguments_are_refused(
    folder: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    capsys: Capture,
    more: tuple[str, ...],
    reason: str,
) -> None:
    """Prevents: a file that mixes two runs, or is destroyed by a wrong option."""
    out = tmp_path / "out.jsonl"
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    assert main([*words(folder, out), *more]) == 2
    message = capsys.readouterr().err
    assert reason in message
    assert message.count("\n") == 1
    assert files(out) == whole


def test_another_model_is_refused(
    talker: Callable[..., Path], whole: dict[str, bytes], tmp_path: Path, capsys: Capture
) -> None:
    """Prevents: conversations of two models in one file, under one name."""
    out = tmp_path / "out.jsonl"
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    assert main(words(talker(5.1), out)) == 2
    assert "written with model " in capsys.readouterr().err
    assert files(out) == whole


def test_the_built_in_model_has_a_name(tmp_path: Path, capsys: Capture) -> None:
    """Prevents: a model that is loaded by its name, and then not found as a folder."""
    (tmp_path / "prompts.txt").write_text("Hi\n")
    arguments = ["selfgen", "--output", str(tmp_path / "out.jsonl"), "--max-answer-tokens", "4"]
    arguments += [
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--model",
        "pocket",
        "--lora",
        "instruct_lora",
    ]
    assert main(arguments) == 0
    assert "kept 1 of 1" in capsys.readouterr().err


def test_overwriting_is_asked_for(
    folder: Path, whole: dict[str, bytes], tmp_path: Path, capsys: Capture
) -> None:
    """Prevents: somebody's file being taken for an output, and one that cannot be replaced."""
    out = tmp_path / "out.jsonl"
    out.write_text("notes\n")
    assert main(words(folder, out)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "notes\n"
    assert main([*words(folder, out), "--overwrite"]) == 0
    assert files(out) == whole


def test_two_runs_do_not_share_a_file(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """Prevents: lines of two processes in one file."""
    with Output(tmp_path / "out.jsonl", {}):
        assert main(words(folder, tmp_path / "out.jsonl")) == 2
    assert "another run is writing" in capsys.readouterr().err


def test_given_prompts_and_json(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """Prevents: prompts that are not answered, or a summary that is not one JSON object."""
    (tmp_path / "prompts.txt").write_text("one\ntwo\n\none\n")
    arguments = words(folder, tmp_path / "out.jsonl", "--json")
    arguments[arguments.index("--num") : arguments.index("--num") + 2] = []
    assert main([*arguments, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    captured = capsys.readouterr()
    summary: dict[str, Any] = json.loads(captured.out)
    assert summary["counts"]["indexes"] == 3
    assert summary["counts"]["dropped"]["duplicate"] == 1
    assert "-- kept " in captured.err
    assert "duplicate 1" in captured.err


def test_half_a_character_in_a_prompt(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """Prevents: one bad line of the caller's that ends the run, whenever it is started again."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "half \\ud83d"}\n{"prompt": "whole"}\n')
    out = tmp_path / "out.jsonl"
    arguments = [*words(folder, out), "--prompts", str(tmp_path / "prompts.jsonl")]
    assert main(arguments) == 0
    assert "prompt_refused 1" in capsys.readouterr().err
    (dropped,) = map(json.loads, out.with_name("out.jsonl.dropped.jsonl").read_text().splitlines())
    assert dropped["messages"] == [{"role": "user", "content": "half \ud83d"}]
    before = files(out)
    assert main(arguments) == 0
    assert files(out) == before


def test_a_damaged_output_lets_go_of_its_lock(
    folder: Path, whole: dict[str, bytes], tmp_path: Path, capsys: Capture
) -> None:
    """Prevents: an output that this process can never open again, since it is still locked."""
    out = tmp_path / "out.jsonl"
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    out.write_bytes(b"{}\n" + whole["out.jsonl"])
    kept = []  # an error that is kept keeps the frame that opened the files
    for _ in range(2):
        with pytest.raises(ConfigError, match="is damaged") as error:
            Output(out, json.loads(whole["out.jsonl.counts.json"])["arguments"])
        kept.append(error)
    assert main([*words(folder, out), "--overwrite"]) == 0
