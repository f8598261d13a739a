"""`trimode` itself: what it costs to start, one line per error, exit codes, streams."""

from __future__ import annotations

import argparse
import importlib
import logging
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points

import pytest

from trimode import CapacityError, CheckpointError, ConfigError, UnsupportedError, __version__
from trimode.cli import info
from trimode.cli.main import COMMANDS, main

Capture = pytest.CaptureFixture[str]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["train", "--help"], ["x"]])
def test_words_alone_do_not_load_torch(words: list[str]) -> None:
    """Prevents: seconds of waiting for a help text or for hearing of a typing error."""
    done = python(
        "import sys\n"
        "from trimode.cli.main import main\n"
        "try:\n"
        f"    main({words!r})\n"
        "except SystemExit as error:\n"
        "    assert error.code == 0\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'rich') if m in sys.modules])\n"
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_command(capsys: Capture) -> None:
    """Prevents: a command that exists but that nobody finds."""
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for name in COMMANDS:
        module = importlib.import_module(f"trimode.cli.{name}")
        assert name == module.NAME
        assert f"  {name:<12}{module.HELP}\n" in text
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert f"usage: trimode {name} " in capsys.readouterr().out


def test_both_ways_to_start_it() -> None:
    """Prevents: `python -m trimode` or the installed script leading somewhere else."""
    done = subprocess.run(
        [sys.executable, "-m", "trimode", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"trimode {__version__}\n"
    [script] = [e for e in entry_points(group="console_scripts") if e.name == "trimode"]
    assert script.load() is main
    done = subprocess.run([sys.executable, "-m", "trimode", "nothing"], capture_output=True)
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no command given; the commands are generate"),
        (["generat"], "'generat' is not a command; did you mean generate?"),
        (["zzz"], "'zzz' is not a command; the commands are generate"),
        (["--nonsense"], "unrecognized arguments: --nonsense (see `trimode --help`)"),
        (["info", "--nonsense"], "unrecognized arguments: --nonsense (see `trimode info --help`)"),
        (["info", "a", "b"], "unrecognized arguments: b"),
        (["info", "--js"], "unrecognized arguments: --js"),
        (["train"], "CONFIG.yaml"),
        (["generate", "x", "--steps", "few"], "argument --steps: invalid int value: 'few'"),
        (["generate", "x", "--json", "--watch"], "not allowed with argument --json"),
        (["generate", "x", "--watch-delay", "nan"], "--watch-delay is nan; allowed: 0 to 60000"),
        (["info", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["generate", "x", "--model", "/no/such/folder"], "/no/such/folder: no such folder"),
    ],
)
def test_a_users_error_is_one_line(words: list[str], says: str, capsys: Capture) -> None:
    """Prevents: tracebacks, usage walls and silent guesses for what a user can put right."""
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("trimode: error: ")
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ConfigError("a is 1;\n  allowed: 2"), 2, "a is 1; allowed: 2"),
        (CheckpointError("c"), 2, "c"),
        (UnsupportedError("u"), 2, "u"),
        (CapacityError("too big"), 1, "too big"),
        (FileNotFoundError(2, "No such file", "/x"), 1, "No such file: /x"),
        (ValueError("oh\nno"), 1, "ValueError: oh no (--debug shows where)"),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture, error: Exception, code: int, says: str
) -> None:
    """Prevents: scripts that cannot tell a wrong request from a failure of ours."""
    monkeypatch.setattr(info, "run", raising(error))
    assert main(["info"]) == code
    assert capsys.readouterr().err == f"trimode: error: {says}\n"
    for words in (["--debug", "info"], ["info", "--debug"]):
        assert main(words) == code
        err = capsys.readouterr().err
        assert "Traceback (most recent call last)" in err
        assert "--debug" not in err.splitlines()[-1]


def test_interrupted_and_cut_off_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Prevents: a traceback after Ctrl-C or `| head`."""
    monkeypatch.setattr(info, "run", raising(KeyboardInterrupt()))
    assert main(["info"]) == 130
    monkeypatch.setattr(info, "run", raising(BrokenPipeError()))
    assert main(["info"]) == 141
    assert capsys.readouterr() == ("", "")


def test_logs_go_to_stderr_while_it_runs(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Prevents: logs among the results, and handlers left behind on a library's logger."""
    logger = logging.getLogger("trimode.anything")
    before = logging.getLogger("trimode").handlers.copy()

    def run(args: argparse.Namespace) -> int:
        logger.debug("fine")
        logger.info("note")
        logger.warning("mind")
        print("result")
        return 0

    monkeypatch.setattr(info, "run", run)
    expected = ["trimode: warning: mind"]
    for flags in ([], ["-v"], ["-vv"]):
        assert main(["info", *flags]) == 0
        out, err = capsys.readouterr()
        assert out == "result\n"
        assert err.splitlines() == expected
        expected.insert(0, "trimode: info: note" if not flags else "trimode: debug: fine")
    assert logging.getLogger("trimode").handlers == before


def test_options_stand_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: `--json` before or between `key=value` words taking the words away."""
    train = importlib.import_module("trimode.cli.train")
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(train, "run", lambda args: seen.append(args) or 0)
    for words in (["--json", "c.yaml", "a=1", "b=2"], ["c.yaml", "a=1", "--json", "b=2"]):
        assert main(["-v", "train", *words]) == 0
        assert seen[-1].config == "c.yaml"
        assert seen[-1].overrides == ["a=1", "b=2"]
        assert seen[-1].json
        assert seen[-1].verbose == 1


def test_a_word_with_a_dash_after_two_dashes(capsys: Capture) -> None:
    """Prevents: prompts and paths that cannot be given; Python versions differ in this."""
    assert main(["info", "--", "--odd"]) == 2
    assert (
        capsys.readouterr().err
        == "trimode: error: --odd: no such folder; names of models are pocket, smollm2\n"
    )


def raising(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run
