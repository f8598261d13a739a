"""Requests that leave sampling open get the model's own settings; what they ask for wins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

import trimode
from tests.serving.conftest import TEMPLATE, Served, serving
from trimode.cli.main import BAD_INPUT, main
from trimode.errors import CheckpointError
from trimode.runtime import TriModeLM
from trimode.serving.settings import Settings

OWN = {
    "do_sample": True,
    "temperature": 0.8,
    "top_p": 0.7,
    "top_k": 9,
    "repetition_penalty": 1.3,
    "max_new_tokens": 23,
    "eos_token_id": [257, 101],
}
SPELLED = {
    "temperature": 0.8,
    "top_p": 0.7,
    "top_k": 9,
    "repetition_penalty": 1.3,
    "stop_token_ids": [101],
}
ASK = {"messages": [{"role": "user", "content": "hi"}], "seed": 7}
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    """A tiny chat model with settings of its own."""
    made = tiny_checkpoint()
    (made / "chat_template.jinja").write_text(TEMPLATE)
    (made / "generation_config.json").write_text(json.dumps(OWN))
    return made


@pytest.fixture
def lm(folder: Path) -> TriModeLM:
    return trimode.load(folder, device="cpu")


def text(served: Served, path: str = "chat/completions", **body: Any) -> str:
    answer = served.post(path, body)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    found = choice["message"]["content"] if "message" in choice else choice["text"]
    assert isinstance(found, str)
    return found


def test_over_http(lm: TriModeLM, folder: Path) -> None:
    """Prevents: OpenAI's defaults for a model whose makers sample otherwise."""
    with serving(lm) as own, serving(lm, generation_config="none") as plain:
        expected = text(plain, **ASK, **SPELLED, max_tokens=23)
        assert text(own, **ASK) == expected
        assert expected != text(plain, **ASK, max_tokens=23)
        greedy = text(plain, **ASK, **SPELLED | {"temperature": 0}, max_tokens=5)
        assert text(own, **ASK, temperature=0, max_tokens=5) == greedy
        prompt = {"prompt": "def", "seed": 3}
        expected = text(plain, "completions", **prompt, **SPELLED, max_tokens=23)
        assert text(own, "completions", **prompt) == expected
        endless = {**ASK, "ignore_eos": True, "max_tokens": 60, "temperature": 0}
        usage = own.post("chat/completions", endless).json()["usage"]
        assert usage["completion_tokens"] == 60
        (model,) = httpx.get(f"{own.url}/v1/models").json()["data"]
        shown = model["trimode"]["generation_defaults"]
        assert (shown["temperature"], shown["stop_token_ids"]) == (0.8, [101])
    other = folder.parent / "other.json"
    other.write_text('{"do_sample": false}')
    with serving(lm, generation_config=str(other)) as greedy_one:
        expected = lm.chat(ASK["messages"], **NOTHING, max_new_tokens=9).text  # type: ignore[arg-type]
        assert text(greedy_one, **ASK, max_tokens=9) == expected


NOTHING = {"temperature": 0.0, "top_p": None, "top_k": None, "repetition_penalty": 1.0}


def test_a_number_of_tokens_that_does_not_fit(lm: TriModeLM) -> None:
    """Prevents: a request refused for a length that it never asked for."""
    settings = Settings(max_output_tokens=4)
    with serving(lm, settings) as limited, serving(lm, context_len=40) as small:
        body = {**ASK, "ignore_eos": True}
        usage = limited.post("chat/completions", body).json()["usage"]
        assert usage["completion_tokens"] == 4
        long = {"prompt": "x" * 30, "ignore_eos": True}
        usage = small.post("completions", long).json()["usage"]
        assert usage["prompt_tokens"] + usage["completion_tokens"] == 40


def test_in_python_and_at_the_terminal(lm: TriModeLM, folder: Path, capsys: Capture) -> None:
    """Prevents: `chat` that answers greedily, or `generate` that does not."""
    messages = [{"role": "user", "content": "hi"}]
    own = lm.chat(messages, seed=7)
    spelled = lm.answering(messages, {})
    assert {name: spelled[name] for name in ("temperature", "top_p", "top_k")} == {
        name: SPELLED[name] for name in ("temperature", "top_p", "top_k")
    }
    assert spelled["max_new_tokens"] == 23
    assert spelled["stop_token_ids"] == [101, 257]
    assert own.token_ids != lm.chat(messages, seed=7, temperature=0.0).token_ids
    capsys.readouterr()
    words = ["--model", str(folder), "--device", "cpu", "--seed", "7"]
    assert main(["chat", "hi", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == own.token_ids
    assert main(["chat", "hi", *words]) == 0
    assert capsys.readouterr().out.strip() == own.text.strip()
    assert main(["generate", "hi", *words, "--json"]) == 0
    plain = lm.generate("hi", temperature=0.0, max_new_tokens=128)
    assert json.loads(capsys.readouterr().out)["token_ids"] == plain.token_ids  # type: ignore[union-attr]


def test_the_terminal_shows_them(folder: Path, capsys: Capture) -> None:
    """Prevents: settings at work that no one can see."""
    assert main(["info", str(folder)]) == 0
    lines = {line[:16].strip(): line[16:] for line in capsys.readouterr().out.splitlines()}
    assert lines["chat, serve"] == (
        "temperature 0.8, top p 0.7, top k 9, repetition penalty 1.3, max new tokens 23,"
        " stop token ids [101]"
    )
    (folder / "generation_config.json").unlink()
    assert main(["info", str(folder)]) == 0
    assert "chat, serve     no generation_config.json" in capsys.readouterr().out


def test_what_cannot_be_is_said_at_once(lm: TriModeLM, folder: Path, capsys: Capture) -> None:
    """Prevents: a server that starts and then refuses every request."""
    assert main(["serve", str(folder), "--generation-config", "no/where"]) == BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith("--generation-config is 'no/where'; allowed: auto, none, or a path")
    for content, message in (
        ('{"top_p": 7}', "top_p is 7; allowed: a number of 1e-09 to 1.0"),
        ('{"top_k": 1.5}', "top_k is 1.5; allowed: an integer of 1 to 2147483648"),
        (None, "has no generation_config.json"),
    ):
        (folder / "generation_config.json").unlink(missing_ok=True)
        if content is not None:
            (folder / "generation_config.json").write_text(content)
        with (
            pytest.raises(CheckpointError, match=message),
            serving(lm, generation_config=str(folder)),
        ):
            pass
