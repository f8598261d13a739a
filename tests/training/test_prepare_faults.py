"""Data preparation that is cut off: by a kill, by a full disk, by a second process."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training import killed_prepare
from tests.training.killed_prepare import DISK_FULL, DONE, KILLED, read_tree
from tests.training.made_documents import make_code, make_config
from trimode.checkpoint.whole_folder import is_disk_full
from trimode.cli.main import main
from trimode.errors import ConfigError
from trimode.training import byte_bpe, corpus
from trimode.training.prepare import prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of many runs that were cut off, see `killed_prepare`."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", killed_prepare.__name__, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.process
def test_killed_at_any_moment(runs: dict[str, Any]) -> None:
    """Half an output, an old output lost in the middle of the move, or other bytes after a resume.

    The moments are spread over reading, choosing, learning, encoding and moving into place.
    """
    assert len(runs["killed"]) == 18
    for moment, code, is_whole, again, is_same, left in runs["killed"]:
        assert (code, is_whole) == (KILLED, True), moment
        assert (again, is_same, left) == (DONE, True, []), moment


@pytest.mark.process
def test_killed_again_and_again(runs: dict[str, Any]) -> None:
    """A run that only goes on from a first kill, or that spoils what an earlier one has left."""
    codes, is_same, left = runs["chain"]
    assert codes == [KILLED] * (len(codes) - 1) + [DONE]
    assert len(codes) > 3
    assert (is_same, left) == (True, [])


@pytest.mark.process
def test_full_disk_keeps_the_old_output(runs: dict[str, Any]) -> None:
    """A full disk taken for success, the old output gone, or work that cannot be gone on from."""
    assert len(runs["full"]) >= 4
    for number, code, is_old, again, is_same, left in runs["full"]:
        assert (code, is_old) == (DISK_FULL, True), number
        assert (again, is_same, left) == (DONE, True, []), number


def test_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback, or the exit code of a typing mistake."""
    config = make_config(tmp_path)
    file = tmp_path / "data.yaml"
    file.write_text(
        f"output_dir: {config.output_dir}\nfolders: [{config.folders[0]}]\nvocab_size: 400\n"
    )

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(["prepare", str(file)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"trimode: error: no space left on the disk of {tmp_path}: free some")
    assert main(["prepare", str(file)]) == 0


def test_full_disk_in_every_spelling() -> None:
    """Libraries written in Rust raise a bare Exception, and others wrap the first error."""
    assert is_disk_full(OSError(errno.ENOSPC, "x"))
    assert is_disk_full(Exception("No space left on device (os error 28)"))
    wrapped = ConfigError("datasets: cannot be loaded")
    wrapped.__cause__ = OSError(errno.EDQUOT, "x")
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(errno.EACCES, "x"))
    assert not is_disk_full(ConfigError("no"))


def interrupted(config: Any, *, step: str, at: int) -> None:
    """Prepares up to a moment."""

    def interrupt(name: str, done: int, total: int | None) -> None:
        if (name, done) == (step, at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config, progress=interrupt)


def steps_of(config: Any) -> list[tuple[str, int]]:
    """Prepares; gives every report of progress."""
    steps: list[tuple[str, int]] = []
    prepare(config, progress=lambda name, done, total: steps.append((name, done)))
    return steps


def test_finished_work_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A resume that is right only because it starts from the beginning."""
    monkeypatch.setattr(corpus, "KEEP_EVERY", 2)
    monkeypatch.setattr(byte_bpe, "_ENCODE_BATCH", 2)
    config = make_config(tmp_path, shard_tokens=700)
    interrupted(config, step="reading", at=5)
    interrupted(config, step="encoding train", at=6)
    steps = steps_of(config)
    assert {name for name, _ in steps} == {"encoding train"}  # neither read, compared nor learned
    assert steps[0][1] > 1
    prepare(replace(config, output_dir=str(tmp_path / "whole")))
    assert read_files(tmp_path / "out") == read_files(tmp_path / "whole")
    assert "going on from the interrupted run" in caplog.text


def test_reading_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents twice or never, where reading is taken up again."""
    monkeypatch.setattr(corpus, "KEEP_EVERY", 2)
    config = make_config(tmp_path)
    interrupted(config, step="reading", at=5)
    reads = [done for name, done in steps_of(config) if name == "reading"]
    assert reads == [5, 6]


@pytest.mark.parametrize("change", ["source", "config", "tokenizer"])
def test_changed_inputs_start_afresh(
    tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Half of the old corpus and half of the new one in one folder."""
    prepare(make_config(tmp_path, output_dir=str(tmp_path / "first")))
    config = make_config(tmp_path, tokenizer=str(tmp_path / "first" / "tokenizer"))
    interrupted(config, step="encoding train", at=3)
    if change == "source":
        (tmp_path / "docs" / "m1.py").write_text(make_code(77))
    elif change == "config":
        config = replace(config, seed=3)
    else:
        tokenizer = tmp_path / "first" / "tokenizer" / "tokenizer_config.json"
        tokenizer.write_text(tokenizer.read_text() + "\n")
    with caplog.at_level(logging.WARNING, logger="trimode"):
        assert ("reading", 1) in steps_of(config)
    assert "starting afresh" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docs", "first", "out"]


def test_two_processes_at_once(tmp_path: Path) -> None:
    """Two commands that write into one another's work."""
    config = make_config(tmp_path)
    (tmp_path / ".out.preparing").mkdir()
    with (tmp_path / ".out.preparing" / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="is being prepared by another process"):
            prepare(config)
    prepare(config)


def test_a_folder_of_somebody_else(tmp_path: Path) -> None:
    """Work that begins by clearing a folder which happens to have the name."""
    (tmp_path / ".out.preparing").mkdir()
    (tmp_path / ".out.preparing" / "thesis.txt").write_text("x")
    with pytest.raises(ConfigError, match="holds something else; move it away"):
        prepare(make_config(tmp_path))
    assert (tmp_path / ".out.preparing" / "thesis.txt").exists()


def test_output_behind_a_link(tmp_path: Path) -> None:
    """A link to a larger disk that is replaced by a folder on the small one."""
    (tmp_path / "large").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large")
    for seed in (0, 1):
        prepare(make_config(tmp_path, overwrite=True, seed=seed))
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "large" / "manifest.json").is_file()


def read_files(folder: Path) -> dict[str, bytes]:
    """All files below a folder but the manifest, which names the folder."""
    tree = read_tree(folder) or {}
    tree.pop("manifest.json")
    return tree
