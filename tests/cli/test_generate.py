"""`trimode generate`: prompts in, text or the object of the design out, counts on stderr."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trimode.checkpoint.io import save_checkpoint
from trimode.cli import generate
from trimode.cli.main import main
from trimode.decoding import GenerationParams
from trimode.decoding.control import CONTROL_NAMES
from trimode.decoding.params import DEFAULT_ENTROPY_BOUND, DEFAULT_THRESHOLDS, POLICIES
from trimode.loading import load
from trimode.model import TriModeModel
from trimode.runtime import Generation, TriModeLM

Capture = pytest.CaptureFixture[str]

PROMPT = "import os\n\ndef "


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., TriModeModel],
    byte_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A checkpoint that writes ASCII, control characters included."""
    path = tmp_path_factory.mktemp("cli") / "tiny"
    model = tiny_model(torch.float32, num_valid_tokens=128)
    save_checkpoint(model, path, tokenizer=byte_tokenizer)
    return path


@pytest.fixture(scope="module")
def lm(folder: Path) -> TriModeLM:
    return load(folder)


def words(folder: Path, *more: str) -> list[str]:
    return ["generate", "--model", str(folder), "--max-new-tokens", "12", "--seed", "3", *more]


def type_in(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


class TestJson:
    @pytest.mark.parametrize("mode", ["ar", "diffusion", "linear"])
    def test_the_object_of_the_design(
        self, folder: Path, lm: TriModeLM, capsys: Capture, mode: str
    ) -> None:
        """Prevents: a key more, less or renamed, which breaks every script that reads it."""
        assert main(words(folder, "--mode", mode, "--json", PROMPT)) == 0
        out, err = capsys.readouterr()
        assert out.count("\n") == 1
        assert err == ""
        record = json.loads(out)
        expected = lm.generate(PROMPT, mode=mode, max_new_tokens=12, seed=3)
        stats = expected.stats
        assert record.pop("seconds") > 0
        assert record.pop("tokens_per_second") > 0
        speculation = {"acceptance_lengths": stats.acceptance_lengths} if mode == "linear" else {}
        assert record == {
            "text": expected.text,
            "token_ids": expected.token_ids,
            "prompt_tokens": len(PROMPT),
            "new_tokens": len(expected.token_ids),
            "finish_reason": expected.finish_reason,
            "mode": mode,
            "block_length": None if mode == "ar" else 8,
            "forwards": {**stats.forwards, "total": sum(stats.forwards.values())},
            "tokens_per_forward": {"decode": stats.tpf_decode, "total": stats.tpf_total},
            **speculation,
            "seed": 3,
        }
        if mode == "ar":
            assert record["tokens_per_forward"]["decode"] == 1.0

    def test_in_force(self, folder: Path, capsys: Capture) -> None:
        """Prevents: reporting the model's block length instead of the one asked for."""
        assert main(words(folder, "--block-length", "4", "--json", "x")) == 0
        assert json.loads(capsys.readouterr().out)["block_length"] == 4

    def test_nothing_but_a_prefill(self, folder: Path, capsys: Capture) -> None:
        """Prevents: a division by zero, or NaN, which is not JSON."""
        assert main(words(folder, "--json", "x", "--max-new-tokens", "1")) == 0
        record = json.loads(capsys.readouterr().out)
        assert record["tokens_per_forward"] == {"decode": None, "total": 1.0}
        assert record["acceptance_lengths"] == []

    def test_a_drawn_seed_is_reported(self, folder: Path, capsys: Capture) -> None:
        """Prevents: a text that nobody can make again."""
        command = ["generate", "--model", str(folder), "--temperature", "1", "--json", "x"]
        assert main(command) == 0
        drawn = json.loads(capsys.readouterr().out)
        assert main([*command, "--seed", str(drawn["seed"])]) == 0
        assert json.loads(capsys.readouterr().out)["token_ids"] == drawn["token_ids"]

    @pytest.mark.process
    def test_as_a_process(self, folder: Path) -> None:
        """Prevents: anything else on stdout when it really runs, e.g. from a library."""
        done = subprocess.run(
            [sys.executable, "-m", "trimode", *words(folder, "--mode", "linear", "--json", PROMPT)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["mode"] == "linear"
        assert done.stdout.count("\n") == 1


class TestText:
    @pytest.mark.parametrize("flags", [[], ["--watch"]])
    def test_prompt_text_newline(
        self, folder: Path, lm: TriModeLM, capsys: Capture, flags: list[str]
    ) -> None:
        """Prevents: counts in a redirected file, and pictures where there is no terminal."""
        assert main(words(folder, PROMPT, "--mode", "linear", *flags)) == 0
        out, err = capsys.readouterr()
        expected = lm.generate(PROMPT, mode="linear", max_new_tokens=12)
        assert out == PROMPT + expected.text + "\n"
        assert "-- linear, block length 8, seed 3: 12 tokens in " in err
        assert " tokens/s, ended by length\n" in err
        kinds = ", ".join(f"{n} {kind}" for kind, n in expected.stats.forwards.items() if n)
        assert f"-- {expected.stats.num_forwards} forwards ({kinds}); tokens per forward: " in err
        assert "(a round's accepted drafts plus the AR view's own tokens)" in err

    def test_no_second_newline(self, folder: Path, lm: TriModeLM, capsys: Capture) -> None:
        """Prevents: an empty line at the end of a text that ends its last line itself."""
        text = lm.generate("x", max_new_tokens=12).text
        stop = text[4:6]
        assert main(words(folder, "--stop", stop, "--stop", "never", "x")) == 0
        assert capsys.readouterr().out == "x" + text[: text.index(stop)] + "\n"
        assert main(words(folder, "--stop", text[0], "x\n")) == 0
        assert main(words(folder, "--stop", text[0], "x")) == 0
        assert not capsys.readouterr().out.endswith("\n\n")

    def test_control_characters_on_a_terminal(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        """Prevents: a model's text clearing the screen or typing into the shell."""
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        assert main(words(folder, "a\x1b[2J\tb\r")) == 0
        out = capsys.readouterr().out
        assert out.startswith("a\u241b[2J\tb\u240d")
        assert "\x1b" not in out

    @pytest.mark.process
    def test_closed_pipe(self, folder: Path) -> None:
        """Prevents: a traceback from `trimode generate ... | head -1`."""
        command = words(folder, PROMPT, "--max-new-tokens", "400", "--ignore-eos")
        process = subprocess.Popen(
            [sys.executable, "-m", "trimode", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"i"
        process.stdout.close()
        err = process.stderr.read().decode()
        process.stderr.close()
        assert process.wait() == 141
        assert "Traceback" not in err
        assert "trimode: error" not in err

    @pytest.mark.parametrize("flags", [["--json"], []])
    def test_a_broken_network_is_a_failure(
        self,
        tmp_path: Path,
        tiny_model: Callable[..., TriModeModel],
        byte_tokenizer: PreTrainedTokenizerFast,
        capsys: Capture,
        flags: list[str],
    ) -> None:
        """Prevents: exit code 0 for a text that was given up."""
        model = tiny_model(torch.float32)
        model.diffusion_head.weight.fill_(math.nan)
        save_checkpoint(model, tmp_path / "nan", tokenizer=byte_tokenizer)
        assert main(words(tmp_path / "nan", "x", *flags)) == 1
        out, err = capsys.readouterr()
        assert err.startswith("trimode: error: sequence aborted: the network gave non-finite")
        assert json.loads(out)["finish_reason"] == "abort" if flags else out == "x\n"


class TestPrompt:
    @pytest.mark.parametrize("dash", [[], ["-"]])
    def test_stdin_as_it_is(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, dash: list[str]
    ) -> None:
        """Prevents: newlines of a piped prompt stripped or translated."""
        type_in(monkeypatch, "é\r\nx = 1\n".encode())
        assert main(words(folder, *dash)) == 0
        assert capsys.readouterr().out.startswith("é\r\nx = 1\n")

    def test_empty_stdin_is_an_empty_prompt(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        """Prevents: refusing what the Python interface takes."""
        type_in(monkeypatch, b"")
        assert main(words(folder, "--json")) == 0
        assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 1

    def test_argument_before_stdin(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        """Prevents: a loop's stdin eaten by a command that was given its prompt."""
        type_in(monkeypatch, b"from stdin")
        assert main(words(folder, "given")) == 0
        assert capsys.readouterr().out.startswith("given")
        assert sys.stdin.read() == "from stdin"

    def test_not_utf_8(self, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
        """Prevents: a UnicodeDecodeError, or replacement characters that nobody asked for."""
        type_in(monkeypatch, b"ab\xff")
        assert main(["generate"]) == 2
        says = "the prompt on stdin is not valid UTF-8: byte 0xff at offset 2; convert it first"
        assert capsys.readouterr().err == f"trimode: error: {says}\n"
        assert main(["generate", "a\udcff"]) == 2
        assert "the prompt is not valid UTF-8" in capsys.readouterr().err

    def test_none_at_a_terminal(self, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
        """Prevents: waiting in silence for a prompt that the user does not know to type."""
        type_in(monkeypatch, b"")
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        assert main(["generate"]) == 2
        assert "no prompt; give it as an argument or pipe it in" in capsys.readouterr().err
        monkeypatch.setattr(sys, "stdin", None)
        assert main(["generate", "-"]) == 2

    def test_refused_by_the_model(self, folder: Path, capsys: Capture) -> None:
        """Prevents: half a result, or a traceback, for a request that cannot be met."""
        for more, says in (
            (["--mode", "fast"], "mode is 'fast'; allowed: ar, diffusion, linear"),
            (["--max-new-tokens", "600"], "beyond the context of 512"),
            (["--mode", "ar", "--block-length", "4"], "mode 'ar' has no blocks"),
            (["--dtype", "int8"], "dtype is 'int8'; allowed: float32"),
            (["--device", "tpu9"], "device is 'tpu9'; allowed: cpu"),
            (["--drafter", "/no/such"], "adapter /no/such: no such folder"),
        ):
            assert main(words(folder, "x", *more)) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert err.count("\n") == 1
            assert says in err


class TestFlags:
    def test_flags_are_the_arguments_of_generate(self) -> None:
        """Prevents: a knob of the Python interface that the command line lacks or misspells."""
        takes = set(inspect.signature(TriModeLM.generate).parameters)
        checks = {field.name for field in dataclasses.fields(GenerationParams)}
        checks |= set(CONTROL_NAMES)
        assert set(generate.DECODING_FLAGS) == takes & checks - {"stop_token_ids"}

    def test_defaults_told_are_the_defaults(self) -> None:
        """Prevents: help that names yesterday's default."""
        parameters = inspect.signature(TriModeLM.generate).parameters
        for name in ("mode", "max_new_tokens", "temperature"):
            told = generate.DECODING_FLAGS[name]["help"]
            assert told.endswith(f"(default {parameters[name].default})")
        told = generate.DECODING_FLAGS["threshold"]["help"]
        assert f"default {DEFAULT_THRESHOLDS['diffusion']} in diffusion" in told
        told = generate.DECODING_FLAGS["entropy_bound"]["help"]
        assert told.endswith(f"(default {DEFAULT_ENTROPY_BOUND})")
        told = generate.DECODING_FLAGS["policy"]["help"]
        assert all(policy in told for policy in POLICIES)

    def test_a_degenerate_setting_is_one_line_on_stderr(
        self, folder: Path, capsys: Capture
    ) -> None:
        """Prevents: a warning in the JSON, several of them, or none."""
        more = ["--mode", "diffusion", "--policy", "leftmost", "--json", "x"]
        assert main(words(folder, *more)) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["mode"] == "diffusion"
        assert err.count("\n") == 1
        assert err.startswith("trimode: warning: policy 'leftmost' has no steps for the 7 masked")

    def test_only_what_is_given_is_passed_on(
        self, monkeypatch: pytest.MonkeyPatch, lm: TriModeLM, capsys: Capture
    ) -> None:
        """Prevents: a second set of defaults, and a flag that is read but not passed on."""
        seen: list[dict[str, Any]] = []
        result = lm.generate("x", max_new_tokens=1)

        def note(prompt: str, **options: Any) -> Generation:
            seen.append(options)
            return result

        note.__signature__ = inspect.signature(lm.generate)  # type: ignore[attr-defined]
        model = SimpleNamespace(model=lm.model, generate=note)
        monkeypatch.setattr("trimode.loading.load", lambda *args, **kwargs: model)
        assert main(["generate", "--json", "x"]) == 0
        flags = "--mode diffusion --max-new-tokens 5 --block-length 4 --threshold 0.5 --steps 2"
        flags += " --policy threshold --entropy-bound 0.5"
        flags += " --temperature 0.7 --top-p 0.9 --top-k 5 --seed 1 --stop a --stop b --ignore-eos"
        assert main(["generate", "--json", "x", *flags.split()]) == 0
        capsys.readouterr()
        assert seen[0] == {}
        assert seen[1] == {
            "mode": "diffusion",
            "max_new_tokens": 5,
            "block_length": 4,
            "threshold": 0.5,
            "steps": 2,
            "policy": "threshold",
            "entropy_bound": 0.5,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 5,
            "seed": 1,
            "stop": ["a", "b"],
            "ignore_eos": True,
        }

    def test_shorter_names_are_not_guessed(self, capsys: Capture) -> None:
        """Prevents: `--temp` meaning something today and something else tomorrow."""
        assert main(["generate", "x", "--temp", "1"]) == 2
        assert "unrecognized arguments: --temp" in capsys.readouterr().err
