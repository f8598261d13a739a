"""Tool calls: the form that a template declares, and answers split by it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.chat_templates import (
    CHATML,
    FENCED,
    HERMES,
    LLAMA_3,
    MISTRAL,
    MISTRAL_11,
    THINKING,
)
from trimode.detokenize import GrowingText, StandingText
from trimode.errors import RequestError
from trimode.rendering import Renderer
from trimode.serving.held_calls import CallsHeldBack
from trimode.tool_calls import (
    ToolForm,
    find_form,
    read_calls,
    shows_calls,
    split_answer,
)
from trimode.vocabulary import Vocabulary

NESTED = HERMES.replace(
    '{"name": "\' + c.function.name + \'", "arguments": \' }}{{ c.function.arguments | tojson }}'
    "{{ '}",
    "' }}{{ {'type': 'function', 'function': {'name': c.function.name,"
    " 'arguments': c.function.arguments | tojson}} | tojson }}{{ '",
)
"""Arguments as a string of JSON inside of JSON."""

PLAIN = HERMES.replace('{"name": "\' + c.function.name + \'", "arguments": \' }}', "' }}")
"""Calls without a name."""

ONE = [("look", {"at": "sky", "n": [1, {"x": None}]})]
TWO = [*ONE, ("go", {})]
FORMS = {
    "hermes": HERMES,
    "thinking": THINKING,
    "nested": NESTED,
    "llama": LLAMA_3,
    "mistral": MISTRAL,
    "mistral 11": MISTRAL_11,
    "fenced": FENCED,
}


def written(vocabulary: Vocabulary, calls: Any, *, before: str = "") -> list[int]:
    """The tokens of an answer as the template itself writes it, up to the end of the turn."""
    asked = [{"role": "user", "content": "x"}]
    made = [
        {
            "id": f"abcdefgh{i}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        for i, (name, arguments) in enumerate(calls)
    ]
    renderer = Renderer(vocabulary)
    answer = {"role": "assistant", "content": before, "tool_calls": made}
    whole = renderer.text([*asked, answer])
    prompt = renderer.text(asked, add_generation_prompt=True)
    assert whole.startswith(prompt)
    return vocabulary.encode(whole[len(prompt) :].rstrip("\n"), parse_special=True)


def split(
    vocabulary: Vocabulary, form: ToolForm, ids: list[int], *, is_thinking: bool = False
) -> tuple[str, list[Any]]:
    text = str(vocabulary.tokenizer.decode(ids, skip_special_tokens=True))
    before = GrowingText(vocabulary.tokenizer)
    content, calls = read_calls(
        vocabulary,
        form,
        ["look", "go"],
        text=text,
        token_ids=ids,
        before=before,
        is_thinking=is_thinking,
    )
    assert all(len(call.id) == 9 and call.id.isalnum() for call in calls)
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


def streamed(
    vocabulary: Vocabulary,
    form: ToolForm,
    ids: list[int],
    content: str,
    *,
    is_thinking: bool = False,
) -> list[str]:
    """The pieces of an answer whose tokens come one by one, and the rest."""
    text = StandingText(GrowingText(vocabulary.tokenizer))
    held = CallsHeldBack(vocabulary.tokenizer, form, text, is_thinking=is_thinking)
    pieces = [held.push([token_id]) for token_id in ids]
    return [*pieces, held.finish(content)]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("calls", [ONE, TWO], ids=["one", "two"])
def test_what_a_template_writes_is_read(vocabulary_of: Any, name: str, calls: Any) -> None:
    """Prevents: a form known by its model's name alone; a second call lost; a call in the text."""
    vocabulary = vocabulary_of(FORMS[name])
    form = find_form(Renderer(vocabulary))
    assert form is not None
    if name == "llama":
        calls = calls[:1]  # its template writes no more
    ids = written(vocabulary, calls)
    content, found = split(vocabulary, form, ids)
    assert found == calls
    opening = content.replace("<think>\n\n</think>", "").strip()
    assert not opening
    assert "".join(streamed(vocabulary, form, ids, content)) == content


@pytest.mark.parametrize("name", ["hermes", "nested", "mistral", "mistral 11", "fenced"])
def test_text_before_a_call(vocabulary_of: Any, name: str) -> None:
    """Prevents: text before a call lost, or held back until the end."""
    vocabulary = vocabulary_of(FORMS[name])
    form = find_form(Renderer(vocabulary))
    assert form is not None
    ids = [*b"I look. ", *written(vocabulary, ONE)]
    content, found = split(vocabulary, form, ids)
    assert found == ONE
    assert content.strip() == "I look."
    pieces = streamed(vocabulary, form, ids, content)
    assert "".join(pieces) == content
    assert "".join(pieces[:8]).startswith("I look.")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "no call < <tool> at all"),
        ("hermes", "<tool_call>\nnot JSON\n</tool_call>"),
        ("hermes", '<tool_call>{"arguments": {}}'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}'),
        ("hermes", '<tool_call>{"name": "look", "argum'),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "look", "arguments": {"at": "\\ud800"}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "look", "arguments": {"\\udc00": 1}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "look\\ud800", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "look", "arguments": {"at": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "look", "arguments": {"at": [1e999]}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "look", "arguments": "' + "[" * 100_000 + '"}'),
        ("hermes", '<tool_call>{"name": "look", "parameters": [1]}</tool_call>'),
        ("llama", '{"name": "other", "parameters": {}}'),
        ("llama", '{"name": "look", "parameters": {}} and more'),
        ("llama", '{"title": 3}'),
        ("llama", "Sure: {}"),
        ("llama", ""),
        ("mistral", '[{"name": "look", "arguments": {}}]'),
        ("mistral", "[TOOL_CALLS] none"),
        ("mistral 11", "[TOOL_CALLS]look[ARGS]{"),
        ("fenced", "<|calls|><|call|>function<|sep|>look\n```json\n3"),
    ],
)
def test_what_is_no_call_stays_text(vocabulary_of: Any, name: str, text: str) -> None:
    """Prevents: JSON that was asked for taken for a call, or text that is lost."""
    vocabulary = vocabulary_of(FORMS[name])
    form = find_form(Renderer(vocabulary))
    assert form is not None
    ids = vocabulary.encode(text, parse_special=True)
    shown = str(vocabulary.tokenizer.decode(ids, skip_special_tokens=True))
    assert split(vocabulary, form, ids) == (shown, [])
    assert "".join(streamed(vocabulary, form, ids, shown)) == shown


def test_several_calls_without_a_mark(vocabulary_of: Any) -> None:
    """Prevents: two calls of Llama's taken for text."""
    vocabulary = vocabulary_of(LLAMA_3)
    form = find_form(Renderer(vocabulary))
    assert form is not None
    ids = vocabulary.encode('{"name": "look", "parameters": {}}; {"name": "go", "parameters": {}}')
    assert split(vocabulary, form, ids) == ("", [("look", {}), ("go", {})])


def test_a_call_without_arguments(vocabulary_of: Any) -> None:
    """Prevents: a call of a tool without parameters taken for text."""
    vocabulary = vocabulary_of(HERMES)
    form = find_form(Renderer(vocabulary))
    assert form is not None
    ids = vocabulary.encode('<tool_call>{"name": "go"}</tool_call>')
    assert split(vocabulary, form, ids) == ("", [("go", {})])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>{"name": "look", "parameters": {"at": "sky"}}</tool_call>'),
        ("llama", '{"name": "look", "arguments": {"at": "sky"}}'),
        (
            "nested",
            '<tool_call>{"type": "function", "function": {"name": "look", "parameters":'
            ' {"at": "sky"}}}</tool_call>',
        ),
    ],
)
def test_arguments_under_the_other_key(vocabulary_of: Any, name: str, text: str) -> None:
    """Prevents: a call whose arguments are lost in silence."""
    vocabulary = vocabulary_of(FORMS[name])
    form = find_form(Renderer(vocabulary))
    assert form is not None
    assert split(vocabulary, form, vocabulary.encode(text)) == ("", [("look", {"at": "sky"})])


@pytest.mark.parametrize("template", [CHATML, PLAIN, HERMES.replace("m.tool_calls or []", "[]")])
def test_templates_without_a_form(vocabulary_of: Any, template: str) -> None:
    """Prevents: a form that is guessed."""
    vocabulary = vocabulary_of(template)
    assert find_form(Renderer(vocabulary)) is None
    assert not shows_calls(Renderer(vocabulary))
    answer = {"text": "x", "token_ids": [1], "prompt_ids": [1]}
    with pytest.raises(RequestError, match="declares no form for tool calls"):
        split_answer(vocabulary, [], answer)


def test_a_template_whose_form_is_not_json(vocabulary_of: Any) -> None:
    """Prevents: earlier calls refused where only new ones cannot be read."""
    template = HERMES.replace(
        '{"name": "\' + c.function.name + \'", "arguments": \' }}{{ c.function.arguments | tojson'
        " }}{{ '}",
        "<function=' + c.function.name + '>' }}{% for k, v in c.function.arguments.items() %}"
        "{{ '<' + k + '>' + v }}{% endfor %}{{ '",
    )
    renderer = Renderer(vocabulary_of(template))
    assert shows_calls(renderer)
    assert find_form(renderer) is None


CALLS = {
    "thinking": '<tool_call>{"name": "look", "arguments": {"at": "</think>"}}</tool_call>',
    "llama": '{"name": "look", "parameters": {"at": "</think>"}}',
    "mistral 11": '[TOOL_CALLS]look[ARGS]{"at": "</think>"}',
}
DRAFTS = {
    "thinking": '<tool_call>{"name": "go", "arguments": {}}</tool_call>',
    "llama": '{"name": "go", "parameters": {}}',
    "mistral 11": "[TOOL_CALLS]go[ARGS]{}",
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("is_opened", [False, True])
def test_a_thought_holds_no_call(vocabulary_of: Any, name: str, is_opened: bool) -> None:
    """Prevents: a call executed that the model only thought of, and the answer behind it lost."""
    thinks = "{% if false %}<think>{% endif %}"
    vocabulary = vocabulary_of(FORMS[name] + thinks)
    form = find_form(Renderer(vocabulary))
    assert form is not None
    opening = "" if is_opened else "<think>"
    thought = f"{opening}\nI could {DRAFTS[name]}"
    for text, head in (
        (f"{thought}</think>\n\nNo.", None),
        (thought, None),
        (f"{thought}</think>{CALLS[name]}", f"{thought}</think>"),
    ):
        ids = vocabulary.encode(text, parse_special=True)
        shown = vocabulary.tokenizer.decode(
            vocabulary.encode(text if head is None else head, parse_special=True),
            skip_special_tokens=True,
        )
        content, calls = split(vocabulary, form, ids, is_thinking=is_opened)
        assert calls == ([] if head is None else [("look", {"at": "</think>"})])
        assert content == shown
        pieces = streamed(vocabulary, form, ids, content, is_thinking=is_opened)
        assert "".join(pieces) == content
        assert "I could" in "".join(pieces[:24])


def test_prompts_that_open_a_thought(vocabulary_of: Any) -> None:
    """Prevents: an answer taken for a thought because an earlier message spells one's beginning."""
    vocabulary = vocabulary_of(THINKING)
    form = find_form(Renderer(vocabulary))
    assert form is not None
    for text, is_thinking in (
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\nhm", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", False),
    ):
        ids = vocabulary.encode(text, parse_special=True)
        assert form.is_thinking(vocabulary, ids) is is_thinking
    draft = 'hm <tool_call>{"name": "go"}'
    answer = {
        "prompt_ids": vocabulary.encode("<think>"),
        "text": draft,
        "token_ids": [*draft.encode()],
    }
    assert split_answer(vocabulary, [], answer) == (draft, [])


def test_forms_that_cannot_be_read_are_none(vocabulary_of: Any) -> None:
    """Prevents: a form declared whose control tokens never stand in an answer's text."""
    template = HERMES.replace(
        '<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": ',
        "to=functions.' + c.function.name + '<|sep|>json<|call|>",
    ).replace("{{ '}\n</tool_call>' }}", "")
    assert template != HERMES
    renderer = Renderer(vocabulary_of(template))
    assert shows_calls(renderer)
    assert find_form(renderer) is None


@pytest.mark.parametrize(
    ("name", "text", "num_held"),
    [
        ("llama", "[1] says that it is so.", 1),
        ("llama", "[see] it is so.", 1),
        ("llama", "{x} is a set.", 1),
        ("llama", '{"title": "Sky", "name": "look"}', 4),
        ("llama", '{"name": wrong}', 9),
        ("llama", '{"name": "look"} and more', 17),
        ("hermes", "Write <tool_call> before a call, as in all of them.", 12),
        ("hermes", "Write <tool_call>{name} before a call.", 12),
        ("hermes", 'Write <tool_call>{"a": 1} before a call.', 19),
        ("hermes", "Write <tool_ not call>.", 12),
    ],
)
def test_what_cannot_be_a_call_is_sent(
    vocabulary_of: Any, name: str, text: str, num_held: int
) -> None:
    """Prevents: a stream that stalls to its end at a sign with which a call could begin."""
    vocabulary = vocabulary_of(FORMS[name])
    form = find_form(Renderer(vocabulary))
    assert form is not None
    ids = vocabulary.encode(text)
    assert split(vocabulary, form, ids) == (text, [])
    pieces = streamed(vocabulary, form, ids, text)
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    given = 0
    for number, piece in enumerate(pieces[:-1], start=1):
        given += len(piece)
        assert number - given <= num_held
