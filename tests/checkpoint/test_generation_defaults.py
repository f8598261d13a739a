"""`generation_config.json` means here what it means to transformers and vLLM."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimode.checkpoint.generation_defaults import GenerationDefaults, read_generation_defaults
from trimode.errors import CheckpointError
from trimode.model import TriModeConfig

Read = Callable[..., GenerationDefaults]


@pytest.fixture
def read(tmp_path: Path, tiny_config: Callable[..., TriModeConfig]) -> Read:
    """`read(**content)`: what a file of this content says; EOS of the model is 257."""

    def made(**content: Any) -> GenerationDefaults:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        return read_generation_defaults(tmp_path, tiny_config())

    return made


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, {}),
        ({"_from_model_config": True, "eos_token_id": 257, "max_length": 20}, {}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
        ),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "min_p": 0.05}, {"temperature": 1.0, "min_p": 0.05}),
        ({"temperature": 1e-6, "min_p": 0.05}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.5}, {"temperature": 0.0}),
        (
            {"do_sample": False, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1},
            {"temperature": 0.0, "repetition_penalty": 1.1},
        ),
        ({"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "temperature": None}, {}),
        ({"top_k": -1, "max_new_tokens": 99}, {"max_new_tokens": 99}),
        ({"eos_token_id": [257, 10, 11]}, {"stop_token_ids": [10, 11]}),
        ({"stop_strings": "\n\n"}, {"stop": ["\n\n"]}),
        ({"min_p": 0.0, "num_beams": 1, "typical_p": 1.0, "suppress_tokens": None}, {}),
    ],
)
def test_what_a_file_says(read: Read, content: dict[str, Any], expected: dict[str, Any]) -> None:
    """Prevents: sampling where the file says greedy, or an "off" taken at its word."""
    assert read(**content).as_record() == expected


def test_no_file(tmp_path: Path, tiny_config: Callable[..., TriModeConfig]) -> None:
    """Prevents: a default out of nowhere."""
    assert read_generation_defaults(tmp_path, tiny_config()) == GenerationDefaults()
    assert GenerationDefaults().fill({"top_k": 3}) == {"top_k": 3}


def test_what_is_not_used_is_said(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    """Prevents: a setting that changes texts dropped without a word."""
    with caplog.at_level(logging.WARNING, logger="trimode"):
        found = read(typical_p=0.5, num_beams=4)
    assert found.unread == ("typical_p", "num_beams")
    assert "not used here: typical_p, num_beams" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'; allowed: a number of 0.0 to 100000"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 1.5}, "min_p is 1.5; allowed: a number of 0.0 to 1.0"),
        ({"min_p": True}, "min_p is True"),
        ({"top_k": 2.5}, "top_k is 2.5; allowed: an integer"),
        ({"top_k": True}, "top_k is True"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"eos_token_id": [1, 259]}, "eos_token_id has 259; allowed: 0 to 258"),
        ({"eos_token_id": "x"}, "eos_token_id has 'x'"),
        ({"stop_strings": [""]}, r"stop_strings is \[''\]"),
    ],
)
def test_values_that_cannot_be(read: Read, content: dict[str, Any], message: str) -> None:
    """Prevents: an error at every request, or a traceback, for a mistake in the file."""
    with pytest.raises(CheckpointError, match=f"generation_config.json: {message}"):
        read(**content)


def test_what_is_asked_for_wins() -> None:
    """Prevents: a user's value overruled, or an end of text lost to one that a user adds."""
    own = GenerationDefaults(
        temperature=0.6, top_p=0.9, top_k=20, stop_token_ids=(10,), stop=("##",)
    )
    found = own.fill({"temperature": 0, "top_k": None, "stop_token_ids": [5], "stop": "\n"})
    assert found == {
        "temperature": 0,
        "top_p": 0.9,
        "top_k": None,
        "stop_token_ids": [5, 10],
        "stop": ["\n", "##"],
    }
    assert "stop_token_ids" not in own.fill({"ignore_eos": True})
    assert own.fill({"stop": 5})["stop"] == 5
