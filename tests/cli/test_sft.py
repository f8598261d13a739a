"""Supervised fine-tuning from end to end on the command line: text, base, conversations, tuning of
all weights and of a LoRA, answers in every mode."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

import trimode
from trimode.cli.main import main
from trimode.conversation import answering
from trimode.errors import RequestError

Capture = pytest.CaptureFixture[str]

COLOURS = {
    "apple": "red",
    "grass": "green",
    "sea": "blue",
    "coal": "black",
}
SHAPE = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"max_position_embeddings": 256, "block_size": 4},
}
STAGE = {
    **{"sequence_length": 64, "batch_tokens": 512, "micro_batch_sequences": 8},
    "block_lengths": [4],
}


def write(path: Path, content: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(path)


def run_config(
    folder: Path, *, data: str, tokens: int, optimizer: str, **more: Any
) -> dict[str, Any]:
    return {
        "data": str(folder / data),
        "stages": [{"name": "joint", "tokens": tokens, **STAGE}],
        "optimizer": {"name": optimizer, "learning_rate": 1e-2, "weight_decay": 0.0},
        "evaluation": {"tokens": 256, "every_steps": 0},
        **{"precision": "fp32", "device": "cpu", "log_every_steps": 50},
        **more,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `full` (all weights tuned) and `lora` on its base, made by the commands."""
    folder = tmp_path_factory.mktemp("sft")
    lines = [f"{i}: {thing}? {colour}\n" for i in range(300) for thing, colour in COLOURS.items()]
    for number in range(30):
        text = "".join(lines[number::30])
        (folder / f"part_{number}.txt").write_text(text, encoding="utf-8")
    prepare = {
        "files": [str(path) for path in sorted(folder.glob("part_*.txt"))],
        **{"output_dir": str(folder / "text"), "vocab_size": 320, "held_out_share": 0.1},
        **{"near_duplicate_threshold": 1.0, "max_held_out_overlap": 1.0},
    }
    assert main(["prepare", write(folder / "text_data.yaml", prepare)]) == 0
    base = run_config(folder, data="text", tokens=60 * 512, optimizer="muon", model=SHAPE)
    base["output_dir"] = str(folder / "base")
    assert main(["train", write(folder / "base.yaml", base), "--no-report"]) == 0

    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for number in range(60):
            for thing, colour in COLOURS.items():
                messages = [
                    {"role": "user", "content": f"{number}: {thing}?"},
                    {"role": "assistant", "content": colour},
                ]
                file.write(json.dumps({"messages": messages}) + "\n")
    # Rows of ChatML's markers stay as they were drawn in a LoRA, so its turns end by EOS.
    template = folder / "eos.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ' ' + m.content }}"
        "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
        "{{ 'assistant ' if add_generation_prompt }}"
    )
    chats = {
        "kind": "chat",
        "jsonl": [str(folder / "chats.jsonl")],
        "tokenizer": str(folder / "base" / "final"),
        "held_out_share": 0.1,
    }
    for name, more in (("full", {}), ("lora", {"chat_template": str(template)})):
        chats["output_dir"] = str(folder / f"{name}_data")
        assert main(["prepare", write(folder / f"{name}_data.yaml", {**chats, **more})]) == 0
    init = {"init": str(folder / "base" / "final")}
    for name, steps, optimizer, more in (
        ("full", 40, "muon", {}),
        ("lora", 100, "adamw", {"lora": {"rank": 16, "alpha": 32}}),
    ):
        config = run_config(
            folder,
            data=f"{name}_data",
            tokens=steps * 512,
            optimizer=optimizer,
            model=init,
            **more,
        )
        config["output_dir"] = str(folder / name)
        assert main(["train", write(folder / f"{name}.yaml", config), "--no-report"]) == 0
    return folder


def options_of(folder: Path, name: str) -> dict[str, Any]:
    if name == "full":
        return {"path": folder / "full" / "final"}
    return {"path": folder / "base" / "final", "lora": folder / "lora" / "lora"}


@pytest.mark.parametrize("name", ["full", "lora"])
@pytest.mark.parametrize("mode", ["ar", "linear", "diffusion"])
def test_tuned_models_answer(folder: Path, name: str, mode: str) -> None:
    """Losses on the prompt, a template that differs between training and answering, ends of turns
    that were not learned, an adapter seen by one view only."""
    lm = trimode.load(**options_of(folder, name))
    right = 0
    for thing, colour in COLOURS.items():
        answer = lm.chat([{"role": "user", "content": f"71: {thing}?"}], mode=mode)
        right += answer.text == colour and answer.finish_reason == "stop"
    assert right >= len(COLOURS) - (mode == "diffusion")


def test_base_does_not_answer(folder: Path) -> None:
    """A test above that the untuned model would pass."""
    lm = trimode.load(folder / "base" / "final")
    with pytest.raises(RequestError, match="needs a tokenizer with a chat template"):
        lm.chat([{"role": "user", "content": "71: apple?"}])
    tuned = trimode.load(folder / "full" / "final")
    assert lm.tokenizer is not None
    assert tuned.tokenizer is not None
    lm.tokenizer.chat_template = tuned.tokenizer.chat_template
    assert lm.chat([{"role": "user", "content": "71: apple?"}]).text != "red"


def words(folder: Path, *more: str) -> list[str]:
    model, lora = folder / "base" / "final", folder / "lora" / "lora"
    return ["chat", *more, "--model", str(model), "--lora", str(lora)]


def test_chat_answers_a_message(folder: Path, capsys: Capture) -> None:
    """The answer alone on stdout; the counts on stderr; the same text in JSON."""
    assert main(words(folder, "71: sea?")) == 0
    shown = capsys.readouterr()
    assert shown.out == "blue\n"
    assert "tokens per forward" in shown.err
    assert main(words(folder, "71: sea?", "--json", "--mode", "ar")) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["text"], record["mode"]) == ("blue", "ar")
    assert record["finish_reason"] == "stop"


def test_chat_holds_a_conversation(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that breaks the context ends the talk; an empty line is sent; Ctrl-D is an
    error."""
    lines = iter(["71: coal?", "  ", "x " * 400, "71: sea?"])

    def type_line(prompt: str) -> str:
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert main(words(folder, "--max-new-tokens", "24")) == 0
    shown = capsys.readouterr()
    first, second = shown.out.splitlines()[:2]
    assert first == "black"
    assert second
    assert shown.err.count("beyond the context of 256") == 1


def test_message_from_stdin(folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that is taken for a terminal."""
    stdin = SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"71: grass?"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(words(folder)) == 0
    assert capsys.readouterr().out == "green\n"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "there is nothing to answer"),
        ([{"role": "function", "content": "x"}], "message 1 has role 'function'"),
        ([{"role": "user", "content": None}], "content of type NoneType"),
        (["hi"], "message 1 is a str; allowed: a mapping"),
        ("hi", "messages is a str; allowed: a list of mappings"),
        ([{"role": "user", "content": "\udcff"}], "message 1 is not valid Unicode"),
    ],
)
def test_bad_conversations(folder: Path, messages: Any, message: str) -> None:
    """A template that fails with a riddle."""
    lm = trimode.load(folder / "full" / "final")
    with pytest.raises(RequestError, match=message):
        lm.chat(messages)


def test_ends_of_turns(folder: Path) -> None:
    """A turn's end that is a token for one template and text for another; the caller's own stops
    forgotten."""
    lm = trimode.load(folder / "full" / "final")
    assert lm.tokenizer is not None
    ask = [{"role": "user", "content": "x"}]
    found = answering(lm.vocabulary, ask, {"stop_token_ids": [7], "stop": "a", "seed": 3})
    end = lm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (found["stop_token_ids"], found["stop"], found["seed"]) == ([7, end], "a", 3)
    lm.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end]\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    found = answering(lm.vocabulary, ask, {"stop": ["a"]})
    assert found["stop"] == ["a", "[end]"]
    assert "stop_token_ids" not in found
    assert lm.decode(found["prompt"].token_ids) == "[user] x [end]\n[assistant]"
    odd = [{"role": "user", "content": "\ufffc x \ufffc"}]
    assert answering(lm.vocabulary, odd, {})["stop"] == ["[end]"]


@pytest.mark.parametrize(
    ("close", "expected"),
    [
        ("<|im_end|>", "token"),
        (" <|im_end|>\n", "token"),
        ("\n\n<|im_end|>", "token"),
        ("", "Q:"),
        ("\n", "\nQ:"),
        (" over <|im_end|>", "token"),
    ],
)
def test_what_ends_a_turn(folder: Path, close: str, expected: str) -> None:
    """A marker behind white space taken for text that never matches; turns without a marker that
    run into the next one."""
    lm = trimode.load(folder / "full" / "final")
    assert lm.tokenizer is not None
    lm.tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}"
        + close.replace("\n", "{{ '\\n' }}")
        + "{% endfor %}{{ 'A: ' if add_generation_prompt }}"
    )
    found = answering(lm.vocabulary, [{"role": "user", "content": "x"}], {})
    if expected == "token":
        end = lm.tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert found["stop_token_ids"] == [end]
    else:
        assert found["stop"] == [expected]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "the chat template refuses the conversation: division by zero"),
        ("{{ raise_exception('no') }}", "refuses the conversation: no"),
        ("U: {{ messages[0].content }}", "leaves out what assistant or user say"),
    ],
)
def test_templates_that_misbehave(folder: Path, template: str, message: str) -> None:
    """A traceback from somebody's Jinja, or the whole conversation as a stop string."""
    lm = trimode.load(folder / "full" / "final")
    assert lm.tokenizer is not None
    lm.tokenizer.chat_template = template
    with pytest.raises(RequestError, match=message):
        lm.chat([{"role": "user", "content": "x"}])


def test_arguments_of_chat(folder: Path) -> None:
    """Stops given as arrays lost, and bad ones a riddle."""
    lm = trimode.load(folder / "full" / "final")
    ask = [{"role": "user", "content": "71: sea?"}]
    end = lm.tokenizer.convert_tokens_to_ids("<|im_end|>")  # type: ignore[union-attr]
    found = answering(lm.vocabulary, ask, {"stop_token_ids": np.array([0])})
    assert found["stop_token_ids"] == [0, end]
    with pytest.raises(RequestError, match="stop_token_ids is 3; allowed: a list"):
        lm.chat(ask, stop_token_ids=3)
    with pytest.raises(RequestError, match="prompt is given beside messages"):
        lm.chat(ask, prompt="x")
