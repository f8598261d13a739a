"""Tool calls in an answer, read in the form in which the model's chat template writes them.

The form is learned from the template itself: it renders a call with names that no tool has. Two
kinds are known, JSON that holds name and arguments, and a name followed by JSON of the arguments.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimode.detokenize import GrowingText, text_before
from trimode.errors import RequestError
from trimode.messages import ToolCall, offered_tools, strings_in
from trimode.rendering import Renderer
from trimode.vocabulary import Vocabulary, pattern_of

NO_TOOLS = "this model's chat template declares no form for tool calls"

_NAME = "zqx_tool"
_ARGUMENTS = {"zqx_key": "zqx_value"}
_ID = "zqxcall01"  # nine signs, as some templates demand
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "x",
        "parameters": {"type": "object", "properties": {"zqx_key": {"type": "string"}}},
    },
}
_USER = {"role": "user", "content": "x"}
_TEXT = "\N{OBJECT REPLACEMENT CHARACTER}"

_NAME_PATTERN = r"\s*([\w.-]+?)\s*"
_ARGUMENT_KEYS = ("arguments", "parameters")
"""Models take the one for the other."""

BEGIN_THOUGHT, END_THOUGHT = "<think>", "</think>"

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How a template writes tool calls.

    Attributes:
        opening: Text before the first call; "" if the call is the whole answer.
        between: Text between two calls, as far as it is known.
        middle: Pattern between name and arguments; None for JSON that holds both.
        name_path, arguments_path: Keys to both in this JSON.
        control: Control tokens of the tokenizer; where `opening` has one, calls are looked for
            among the tokens rather than in the text.
        thinks: Whether the model may think aloud; what it thinks is no call.
    """

    opening: str
    between: str | None
    middle: str | None
    name_path: Path
    arguments_path: Path
    control: Mapping[str, int]
    thinks: bool = False

    @property
    def opening_id(self) -> int | None:
        """The first control token of the opening; None where it is plain text."""
        places = [(self.opening.find(name), i) for name, i in self.control.items()]
        return min(((at, i) for at, i in places if at >= 0), default=(0, None))[1]

    @property
    def mark(self) -> str:
        """The first word of the opening."""
        return (self.opening.split() or [""])[0]

    @property
    def keys(self) -> frozenset[str]:
        """That a call without an opening may have; with others it is JSON that was asked for."""
        paths = (self.name_path[:1], self.arguments_path[:1])
        return frozenset({*(key for path in paths for key in path), *_ARGUMENT_KEYS, "type", "id"})

    def body(self, text: str, *, is_named: bool = False) -> int | None:
        """Where the JSON of a call begins, in a text that begins with its opening; or, where that
        is asked for, the name before it. None if it does not begin."""
        head = "" if self.middle is None or is_named else rf"{_NAME_PATTERN}{self.middle}\s*"
        found = re.compile(_loosely(self.opening) + head).match(text)
        return None if found is None else found.end()

    def is_thinking(self, vocabulary: Vocabulary, prompt_ids: Sequence[int]) -> bool:
        """Whether the turn that a prompt opens begins with a thought, and does not end it."""
        if not self.thinks:
            return False
        thoughts = {self.control.get(sign) for sign in (BEGIN_THOUGHT, END_THOUGHT)}
        control = vocabulary.control_ids - thoughts
        turns = [i for i, token_id in enumerate(prompt_ids) if token_id in control]
        turn = list(prompt_ids[turns[-1] + 1 if turns else 0 :])
        text = str(vocabulary.tokenizer.decode(turn, skip_special_tokens=False))
        return text.rfind(BEGIN_THOUGHT) > text.rfind(END_THOUGHT)

    def end_of_thought(self, text: str, is_thinking: bool) -> int | None:
        """Where an answer's thought ends; 0 without one, None if it goes on behind the text."""
        if not self.thinks or not (is_thinking or text.lstrip().startswith(BEGIN_THOUGHT)):
            return 0
        found = text.find(END_THOUGHT)
        return None if found < 0 else found + len(END_THOUGHT)

    def calls(
        self, text: str, names: Collection[str], *, is_thinking: bool = False
    ) -> tuple[int, list[ToolCall]]:
        """Find calls in an answer.

        Args:
            text: Of the answer, control tokens included if the opening has one.
            names: Of the tools that were offered; a call without an opening must be of one.
            is_thinking: Whether the answer begins inside of a thought.

        Returns:
            Where the first call begins, and all calls; the length of the text, and none.
        """
        at = self.end_of_thought(text, is_thinking)
        if at is None:
            return len(text), []
        if not self.opening:
            return (at, calls) if (calls := self._whole(text[at:], names)) else (len(text), [])
        found: list[ToolCall] = []
        first = len(text)
        opening = _loosely(self.opening)
        following = opening if self.between is None else f"{_loosely(self.between)}|{opening}"
        while match := re.compile(following if found else opening).search(text, at):
            call = self._call(text, match.end())
            at = match.end()
            if call is not None:
                first = min(first, match.start())
                found += call[0]
                at = call[1]
        return first, found

    def _whole(self, text: str, names: Collection[str]) -> list[ToolCall]:
        """The calls that a text consists of; none if it has anything else."""
        found: list[ToolCall] = []
        while text.strip():
            call = self._call(text, 0)
            if call is None or not {one.name for one in call[0]} <= {*names}:
                return []
            found += call[0]
            text = text[call[1] :].lstrip().removeprefix(";")
        return found

    def _call(self, text: str, start: int) -> tuple[list[ToolCall], int] | None:
        """The calls at a place, and where they end."""
        if self.middle is not None:
            head = re.compile(rf"{_NAME_PATTERN}{self.middle}\s*").match(text, start)
            if head is None or (body := _json_at(text, head.end())) is None:
                return None
            calls = [_made(head[1], body[0])]
            end = body[1]
        else:
            body = _json_at(text, start)
            if body is None:
                return None
            items, end = body
            items = items if isinstance(items, list) else [items]
            if not self.opening and any(not {*_keys_of(item)} <= self.keys for item in items):
                return None
            calls = [_made(_at(item, self.name_path), self._arguments(item)) for item in items]
        whole = [call for call in calls if call is not None]
        return (whole, end) if whole and len(whole) == len(calls) else None

    def _arguments(self, item: Any) -> Any:
        """Of a call, under the template's key or the other usual one; {} where it has neither."""
        *inner, key = self.arguments_path
        holder = _at(item, tuple(inner))
        for name in (key, *_ARGUMENT_KEYS):
            if isinstance(holder, dict) and name in holder:
                return holder[name]
        return {}


def find_form(renderer: Renderer) -> ToolForm | None:
    """Return the form in which a template writes tool calls; None if it declares none."""
    renderer = renderer.with_tools([_TOOL])
    one = _rendered(renderer, 1)
    if one is None:
        return None
    whole, start = one
    found = _json_call(whole, start)
    middle = None
    if found is not None:
        begin, end, name_path, arguments_path = found
    else:
        begin = whole.index(_NAME, start)
        after = begin + len(_NAME)
        body = next(
            (b for i in _places(whole, "{", after) if (b := _json_at(whole, i)) is not None), None
        )
        if body is None or body[0] != _ARGUMENTS:
            return None
        end = body[1]
        middle = _loosely(whole[after : whole.index("{", after)]).replace(_ID, r"\S+?")
        name_path = arguments_path = ()
    opening = whole[start:begin].strip()
    if middle is not None and not opening:
        return None
    between = None
    two = _rendered(renderer, 2)
    if two is not None and opening and two[0].startswith(whole[:end]):
        # A list of calls ends behind its second call, and nothing is between.
        second = two[0].rindex(_NAME) - (whole.index(_NAME, begin) - begin)
        between = two[0][end:second].strip() or None
    vocabulary = renderer.vocabulary
    added = vocabulary.tokenizer.added_tokens_decoder
    names = {added[i].content: i for i in vocabulary.control_ids}
    template = str(vocabulary.tokenizer.chat_template)
    thinks = BEGIN_THOUGHT in template or BEGIN_THOUGHT in (one.content for one in added.values())
    form = ToolForm(opening, between, middle, name_path, arguments_path, names, thinks)
    if form.opening_id is None and END_THOUGHT in names:  # which no text shows
        form = replace(form, thinks=False)
    return form if _reads(form, renderer, whole[start:]) else None


def _reads(form: ToolForm, renderer: Renderer, answer: str) -> bool:
    """Whether a form reads an answer with one call, as the template wrote it and as it comes."""
    plain = renderer.text([_USER, {"role": "assistant", "content": _TEXT}])
    answer = answer.removesuffix(plain.rpartition(_TEXT)[2])
    if form.opening_id is None and form.control:
        answer = pattern_of(form.control).sub("", answer)
    calls = form.calls(answer, [_NAME])[1]
    return [(call.name, json.loads(call.arguments)) for call in calls] == [(_NAME, _ARGUMENTS)]


def shows_calls(renderer: Renderer) -> bool:
    """Return whether a template writes tool calls of earlier messages at all."""
    return _rendered(renderer.with_tools([_TOOL]), 1) is not None


def names_of(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of tools."""
    return [tool["function"]["name"] for tool in tools]


def read_calls(
    vocabulary: Vocabulary,
    form: ToolForm,
    names: Collection[str],
    *,
    text: str,
    token_ids: Sequence[int],
    before: GrowingText,
    is_thinking: bool = False,
) -> tuple[str, list[ToolCall]]:
    """Split an answer.

    Args:
        vocabulary: Of the tokenizer.
        form: Of its template.
        names: Of the tools that were offered.
        text: The answer.
        token_ids: Its tokens.
        before: The same text, of which nothing was pushed.
        is_thinking: Whether it begins inside of a thought.

    Returns:
        What stands before the first call, all of it without one; and the calls.
    """
    mark = form.opening_id
    if mark is None:
        start, calls = form.calls(text, names, is_thinking=is_thinking)
        return text[:start], calls
    if mark not in token_ids:
        return text, []
    raw = vocabulary.tokenizer.decode(
        list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(raw, str)
    start, calls = form.calls(raw, names, is_thinking=is_thinking)
    if not calls:
        return text, []
    # Marks inside of a thought stand before the call's.
    sign = next(name for name, i in form.control.items() if i == mark)
    marks = [i for i, token_id in enumerate(token_ids) if token_id == mark]
    return text[: len(before.whole(token_ids[: marks[raw[:start].count(sign)]]))], calls


def split_answer(
    vocabulary: Vocabulary | None, tools: Sequence[Mapping[str, Any]], answer: Mapping[str, Any]
) -> tuple[str, list[ToolCall]]:
    """Split an answer that is whole, as `read_calls` does.

    Args:
        vocabulary: Of the tokenizer.
        tools: That were offered.
        answer: Its `text`, `token_ids` and `prompt_ids`.

    Raises:
        RequestError: The template declares no form for tool calls.
    """
    renderer = Renderer(vocabulary)
    form = find_form(renderer)
    if form is None:
        raise RequestError(NO_TOOLS)
    before = text_before(renderer.vocabulary, answer["prompt_ids"])
    return read_calls(
        renderer.vocabulary,
        form,
        names_of(offered_tools(tools, None) or ()),
        text=answer["text"],
        token_ids=answer["token_ids"],
        before=GrowingText(renderer.vocabulary.tokenizer, before),
        is_thinking=form.is_thinking(renderer.vocabulary, answer["prompt_ids"]),
    )


def forced_call(name: str, text: str) -> tuple[str, list[ToolCall]]:
    """Read an answer as the arguments of a call; returns the text beside it, and the call."""
    call = _made(name, text)
    return (text, []) if call is None else ("", [call])


def _rendered(renderer: Renderer, number: int) -> tuple[str, int] | None:
    """An answer of so many calls, and where in it the answer begins."""
    calls = [
        {"id": _ID, "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    ] * number
    for content in ("", None):
        message = {"role": "assistant", "content": content, "tool_calls": calls}
        try:
            whole = renderer.text([_USER, message])
            plain = renderer.text([_USER, {"role": "assistant", "content": _TEXT}])
            prompt = renderer.text([_USER], add_generation_prompt=True)
        except RequestError:
            continue
        heads = (prompt, plain.rpartition(_TEXT)[0])
        start = max(len(head) for head in (*heads, "") if whole.startswith(head))
        if not start:
            start = os.path.commonprefix([prompt, whole]).rfind("\n") + 1
        if whole.count(_NAME, start) >= number:
            return whole, start
    return None


def _json_call(whole: str, start: int) -> tuple[int, int, Path, Path] | None:
    """Where JSON begins and ends that holds name and arguments, and the keys to both."""
    stop = whole.index(_NAME, start)
    for at in _places(whole, "{[", start):
        if at > stop:
            return None
        body = _json_at(whole, at)
        if body is None or _NAME not in strings_in(body[0]):
            continue
        item = body[0][0] if isinstance(body[0], list) else body[0]
        name_path = _path_to(item, _NAME)
        arguments_path = _path_to(item, _ARGUMENTS)
        if name_path and arguments_path:
            return at, body[1], name_path, arguments_path
    return None


def _path_to(value: Any, target: Any) -> Path | None:
    if value == target or (isinstance(value, str) and _loaded(value) == target):
        return ()
    if isinstance(value, dict):
        for key, item in value.items():
            if (rest := _path_to(item, target)) is not None:
                return (key, *rest)
    return None


def _keys_of(value: Any) -> Collection[str]:
    return value.keys() if isinstance(value, dict) else ()


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _made(name: Any, arguments: Any) -> ToolCall | None:
    arguments = _loaded(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (name + text).encode()
    except (ValueError, RecursionError):  # NaN is no JSON, and half a surrogate pair no text
        return None
    return ToolCall(secrets.token_hex(5)[:9], name, text)


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _places(text: str, signs: str, start: int) -> list[int]:
    return [i for i in range(start, len(text)) if text[i] in signs]


def _json_at(text: str, start: int) -> tuple[Any, int] | None:
    """The JSON at a place, white space aside, and where it ends."""
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None


def _loosely(text: str) -> str:
    """A pattern of a text with any white space between its words."""
    return r"\s*".join(map(re.escape, text.split()))
