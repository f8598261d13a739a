"""What a chat template writes, with its own control tokens told from those that a caller spells."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, TemplateSyntaxError
from jinja2.meta import find_undeclared_variables
from transformers import PreTrainedTokenizerBase

from trimode.errors import RequestError
from trimode.messages import strings_in
from trimode.vocabulary import Vocabulary, free_signs, pattern_of

_STAND_INS = ("\N{OBJECT REPLACEMENT CHARACTER}", "\N{INTERLINEAR ANNOTATION ANCHOR}")

_FREE_ARGUMENTS = ("documents",)
"""Arguments of `apply_chat_template` that are variables of the template."""

_NOT_VARIABLES = ("messages", "raise_exception", "strftime_now")
"""What `apply_chat_template` hands to every template."""

_GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""Tags that transformers adds to Jinja."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as a prompt.

    Attributes:
        token_ids: In which only the template's control tokens are control tokens. Of what a message
            holds there is none, unless the template itself writes both ends of it.
        text: As the caller's reader would see it.
    """

    token_ids: list[int]
    text: str


class Renderer:
    """The chat template of a tokenizer.

    Args:
        vocabulary: Of a tokenizer with a chat template.
        tools: Handed to the template.
        variables: Handed to the template, by name.

    Raises:
        RequestError: There is no template, or it cannot take a variable.
    """

    def __init__(
        self,
        vocabulary: Vocabulary | None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        if vocabulary is None or not vocabulary.tokenizer.chat_template:
            raise RequestError(
                "a conversation needs a tokenizer with a chat template, and this model has none;"
                " give a model that was tuned on conversations, or a LoRA that was"
            )
        self.vocabulary = vocabulary
        self._tools = tools
        self._variables = _checked_variables(vocabulary.tokenizer, tools, variables or {})

    def with_tools(self, tools: Sequence[Mapping[str, Any]]) -> Renderer:
        """Return the same template without variables, given other tools."""
        return Renderer(self.vocabulary, tools=tools)

    def text(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False
    ) -> str:
        """Render messages as they are.

        Raises:
            RequestError: The template refuses them.
        """
        return self._render([list(messages), self._tools, self._variables], add_generation_prompt)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        open_at: int | None = None,
    ) -> Rendering:
        """Render messages as tokens. Control tokens that they spell are text.

        Args:
            messages: Checked.
            add_generation_prompt: Whether the assistant's next turn begins at the end.
            open_at: Index of a message with whose text the rendering ends; the template neither
                closes it nor strips it at its end. None renders all.

        Raises:
            RequestError: The template refuses the messages, treats control tokens as more than
                text, or makes them of parts that messages hold.
        """
        given: list[Any] = [list(messages), self._tools, self._variables]
        template = str(self.vocabulary.tokenizer.chat_template)
        free = free_signs("messages", strings_in([*given, template]))
        begin, end = next(free), next(free)
        if open_at is not None:
            content = messages[open_at]["content"]
            # White space alone would be stripped from both sides.
            opened = f"{'' if content.strip() else begin}{content}{end}"
            given[0] = list(messages)
            given[0][open_at] = {**messages[open_at], "content": opened}
        spelled, of_others = self._spelled(given)
        sign_of = {name: next(free) for name in spelled}
        as_text = {sign: name for name, sign in sign_of.items()}
        show = str.maketrans(as_text)
        text = self._render(given, add_generation_prompt)
        if spelled:
            own = {name: sign for name, sign in sign_of.items() if name not in of_others}
            apart = [
                _hidden(message, own if message["role"] == "assistant" else sign_of)
                for message in given[0]
            ]
            signed = [apart, *_hidden(given[1:], sign_of)]
            hidden = self._render(signed, add_generation_prompt)
            if hidden.translate(show) != text:
                raise RequestError(
                    f"messages spell the control token {spelled[0]}, and the chat template does"
                    " not hand it on as it is; leave it out"
                )
            text, given = hidden, signed
        self._check_joined(given, text, next(free), add_generation_prompt)
        if open_at is not None:
            before, found, _ = text.rpartition(end)
            if not found:
                raise RequestError(
                    "the chat template leaves out the end of a message, so it cannot be continued"
                )
            text = before.replace(begin, "")
        try:
            ids = self.vocabulary.encode_marked(text, as_text)
        except ValueError as error:
            raise RequestError(f"messages spell a control token, and {error}") from error
        if not ids:
            raise RequestError("the chat template writes nothing for these messages")
        return Rendering(ids, text.translate(show))

    def _spelled(self, given: Sequence[Any]) -> tuple[list[str], set[str]]:
        """Control tokens that a caller spells, and other added tokens that mark turns; and those
        of the latter that an assistant may write, as it writes its thoughts."""
        vocabulary = self.vocabulary
        found = {name for text in strings_in(given) for name in vocabulary.spelled_control(text)}
        words = vocabulary.ordinary_words
        if not words or not any(map(pattern_of(words).search, strings_in(given))):
            return sorted(found), set()
        marks, of_heads = self._marks()
        others = [message for message in given[0] if message["role"] != "assistant"]
        for word in marks:
            held_by = [others, given[1:]] if word in of_heads else given
            if any(word in text for text in strings_in(held_by)):
                found.add(word)
        return sorted(found), of_heads

    def _check_joined(
        self, given: Sequence[Any], text: str, sign: str, add_generation_prompt: bool
    ) -> None:
        """Refuse a text in which the template joined parts of messages to control tokens: it has
        more of them than one whose messages hold no end of any, and no name."""
        vocabulary = self.vocabulary
        added = vocabulary.tokenizer.added_tokens_decoder
        names = [added[i].content for i in vocabulary.control_ids]
        ordinary = vocabulary.ordinary_words
        signs = {end for name in (*names, *ordinary) if name for end in (name[0], name[-1])}
        ends = {end for end in signs if not end.isalnum() and end != "_"}
        has_name = any(message.get("name") for message in given[0])
        if not has_name and not any(ends.intersection(some) for some in strings_in(given)):
            return
        unnamed = [
            {**message, "name": sign * len(message["name"])} if message.get("name") else message
            for message in given[0]
        ]
        harmless = _hidden([unnamed, *given[1:]], dict.fromkeys(ends, sign))
        if ordinary:
            marks, of_heads = self._marks()
            names += sorted(marks - of_heads)
        if not names:
            return
        count = Counter(pattern_of(names).findall(text))
        count.subtract(pattern_of(names).findall(self._render(harmless, add_generation_prompt)))
        joined = [name for name, number in count.items() if number > 0]
        if joined:
            raise RequestError(
                f"the chat template makes the control token {joined[0]} of parts that messages"
                " hold; leave them out"
            )

    def _marks(self) -> tuple[set[str], set[str]]:
        """Added tokens that are not special and mark turns; and those of them that stand nowhere
        but between a user's message and its answer."""
        find = pattern_of(self.vocabulary.ordinary_words).findall
        ask = {"role": "user", "content": ""}
        turns = [ask, {**ask, "role": "assistant"}, ask]
        marks = {*find(self._render([turns, None, {}], False))}
        asked, answered = _STAND_INS
        turns = [{**ask, "content": asked}, {"role": "assistant", "content": answered}, ask]
        before, _, rest = self._render([turns, None, {}], False).partition(asked)
        head, _, behind = rest.partition(answered)
        return marks | {*find(head)}, ({*find(head)} | marks) - {*find(before), *find(behind)}

    def _render(self, given: Sequence[Any], add_generation_prompt: bool) -> str:
        messages, tools, variables = given
        try:
            text = self.vocabulary.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Exception as error:  # a template is a program of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(f"the chat template refuses the conversation: {reason}") from error
        assert isinstance(text, str)
        return text


def _hidden(value: Any, sign_of: Mapping[str, str]) -> Any:
    """Plain JSON in which every token that a string spells is its sign."""
    if not sign_of:
        return value
    if isinstance(value, str):
        return pattern_of(sign_of).sub(lambda match: sign_of[match[0]], value)
    if isinstance(value, Mapping):
        return {_hidden(key, sign_of): _hidden(item, sign_of) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(item, sign_of) for item in value]
    return value


def _variables_of(source: str) -> set[str]:
    """Variables that a template reads and does not set itself before."""
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    return find_undeclared_variables(environment.parse(_GENERATION.sub("", source)))


def _checked_variables(
    tokenizer: PreTrainedTokenizerBase, tools: Any, variables: Mapping[str, Any]
) -> dict[str, Any]:
    arguments = inspect.signature(tokenizer.apply_chat_template).parameters
    taken = {*arguments, *tokenizer.special_tokens_map, *_NOT_VARIABLES} - {*_FREE_ARGUMENTS}
    named = set[str]()
    if variables:
        try:
            named = _variables_of(str(tokenizer.get_chat_template(tools=tools)))
        except (ValueError, TemplateSyntaxError) as error:
            raise RequestError(f"chat_template_kwargs is given, but {error}") from error
    read = {}
    for name, value in variables.items():
        if name in taken:
            raise RequestError(
                f"chat_template_kwargs has {name!r}, which is not a variable of the template's own"
            )
        if name in named:
            read[name] = value
        elif name != "enable_thinking" or value:  # who does not think need not be told not to
            raise RequestError(
                f"chat_template_kwargs has {name!r}, which this model's chat template does not read"
                if name != "enable_thinking"
                else f"enable_thinking is {value!r}, but this model's chat template does not read"
                " it; allowed: False"
            )
    return read
