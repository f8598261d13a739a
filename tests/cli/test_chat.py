"""`trimode chat`: how an answer begins, variables of the template, and a model without one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import trimode
from tests.chat_templates import THINKING
from trimode import loading
from trimode.checkpoint import model_cache
from trimode.cli.main import BAD_INPUT, main
from trimode.dialogue import Dialogue

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    made = tiny_checkpoint()
    (made / "chat_template.jinja").write_text(THINKING.replace("<|im_end|>", "<|eos|>"))
    return made


def answered(folder: Path, capsys: Capture, *words: str) -> dict[str, Any]:
    """What `--json` prints."""
    capsys.readouterr()
    fixed = ["--model", str(folder), "--device", "cpu", "--max-new-tokens", "8", "--json"]
    assert main(["chat", "hi", *fixed, *words]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_a_prefill_is_continued(folder: Path, capsys: Capture) -> None:
    """Prevents: a prefill that is a turn of its own, or printed as if it were new."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So "}]
    wanted = trimode.load(folder, device="cpu").chat(messages, max_new_tokens=8)
    found = answered(folder, capsys, "--prefill", "So ")
    assert found["text"] == wanted.text
    assert found["prompt_tokens"] == len(wanted.prompt_ids)
    assert found != answered(folder, capsys)


def test_variables_of_the_template(folder: Path, capsys: Capture) -> None:
    """Prevents: a switch that is taken and not used."""
    plain = answered(folder, capsys)["prompt_tokens"]
    off = answered(folder, capsys, "--no-enable-thinking")["prompt_tokens"]
    assert plain < off
    spelled = answered(folder, capsys, "--chat-template-kwargs", '{"enable_thinking": false}')
    assert spelled["prompt_tokens"] == off


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chat-template-kwargs", "{"], "--chat-template-kwargs is '{', which is not JSON"),
        (["--chat-template-kwargs", "[1]"], "chat_template_kwargs is [1]; allowed: a mapping"),
        (["--chat-template-kwargs", '{"padding": 1}'], "has 'padding', which is not a variable"),
        (["--chat-template-kwargs", '{"mood": 1}'], "'mood', which this model's chat template doe"),
        (
            ["--chat-template-kwargs", '{"enable_thinking": true, "enable_thinking": false}'],
            "--chat-template-kwargs has 'enable_thinking' twice; allowed: once",
        ),
        (["--prefill", "\udcff"], "message 2 is not valid Unicode"),
    ],
)
def test_what_cannot_be_is_one_line(
    folder: Path, capsys: Capture, words: list[str], message: str
) -> None:
    """Prevents: a word of the command line that is dropped, or a traceback."""
    assert main(["chat", "hi", "--model", str(folder), "--device", "cpu", *words]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("model", [[], ["--model", "pocket"]])
def test_the_small_model_names_its_lora(
    capsys: Capture, tmp_path: Path, model: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: a first try that fails without a word of how to have a chat."""
    monkeypatch.setattr(model_cache, "default_name", lambda: "pocket")
    monkeypatch.setattr(loading, "default_name", lambda: "pocket")
    selfgen = ["selfgen", "--output", str(tmp_path / "x.jsonl"), "--num", "1"]
    for command in (["chat", "hi"], selfgen):
        assert main([*command, *model, "--device", "cpu"]) == BAD_INPUT
        assert "--lora instruct_lora" in capsys.readouterr().err.splitlines()[-1]


def test_another_model_does_not(tiny_checkpoint: Any, capsys: Capture) -> None:
    """Prevents: a LoRA recommended for a model that it does not fit."""
    assert main(["chat", "hi", "--model", str(tiny_checkpoint()), "--device", "cpu"]) == BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert "needs a tokenizer with a chat template" in line
    assert "instruct_lora" not in line


def test_a_prefill_that_is_not_healed(capsys: Capture) -> None:
    """Prevents: a switch of the command line that does not reach the prompt."""
    found = {}
    for word in ("--heal", "--no-heal"):
        words = [
            "--model",
            "pocket",
            "--lora",
            "instruct_lora",
            "--device",
            "cpu",
            "--prefill",
            "import nu",
            "--json",
        ]
        assert main(["chat", "Sum a list.", *words, "--max-new-tokens", "6", word]) == 0
        found[word] = json.loads(capsys.readouterr().out)
    assert bytes(found["--heal"]["healed_bytes"]) == b" nu"
    assert "healed_bytes" not in found["--no-heal"]


def test_a_talk_and_its_commands(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: a command that is sent to the model, is lost, or ends the talk; a message that
    begins with a slash and cannot be said."""
    lines = iter(
        [
            "one",
            "/mode linear",
            "two",
            "/seed 7",
            "/seed",
            "/seed none",
            "/mode",
            "/help",
            "/nope x",
        ]
        + ["/mode sideways", "/seed -1", "/reset now", "/system Be brief.", "three", "/reset"]
        + ["//four", "/system", "/temperature hot", "/temperature 0.5", "five"]
    )
    said: list[list[str]] = []
    prepared = Dialogue._prepared

    def note(self: Dialogue, messages: list[dict[str, str]], options: dict[str, Any]) -> Any:
        said.append([self.options["mode"], *(one["content"] for one in messages)])
        return prepared(self, messages, options)

    def type_line(_: str) -> str:
        found = next(lines, None)
        if found is None:
            raise EOFError
        return found

    monkeypatch.setattr(Dialogue, "_prepared", note)
    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    words = ["--model", str(folder), "--device", "cpu", "--max-new-tokens", "4", "--mode", "ar"]
    assert main(["chat", *words]) == 0
    answers = [turns for turns in said if turns[-1]]
    assert [turns[-1] for turns in answers] == ["one", "two", "three", "/four", "five"]
    assert [turns[0] for turns in answers] == ["ar", *["linear"] * 4]
    assert [len(turns) for turns in answers] == [2, 4, 3, 3, 2]
    assert answers[2][1] == answers[3][1] == "Be brief."
    err = capsys.readouterr().err
    for line in (
        *("mode linear\n", "seed 7\n", "seed drawn for each answer\n", "/reset  "),
        *("'/nope' is no command; allowed: /mode", "mode is 'sideways'", "/seed takes '-1'"),
        *("/reset takes nothing, and got 'now'", "a new conversation; system: Be brief.\n"),
        *("-- linear: ", " tokens/s", " prompt tokens kept from before\n", "temperature 0.5\n"),
        *("-- linear, seed ", "/temperature takes 'hot'; allowed: a number"),
    ):
        assert line in err, line
    assert err.count("-- ar: ") == 1
