"""A conversation as one text, and which of its characters the assistant writes.

A template is Jinja as transformers runs it. It either marks what the assistant writes with
`{% generation %}`, or is rendered message by message: what an assistant's message adds is the
assistant's, as long as what came before stays as it was.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from trimode.errors import ConfigError
from trimode.training.corrupt_records import CorruptRecordError

CHATML_START, CHATML_END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation's text.

    Attributes:
        text: All of it.
        spans: Start and end (exclusive) of what the assistant writes, ascending, the end of turn
            included, the white space behind it not.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template and what it may refer to.

    Args:
        source: Jinja.
        special_tokens: Such as `bos_token`, by name: variables of the template.
        ends: Texts that can end a turn: all special tokens, and ChatML's marker.
    """

    source: str
    special_tokens: dict[str, str]
    ends: tuple[str, ...]

    @property
    def marks_generation(self) -> bool:
        """Whether the template itself marks what the assistant writes."""
        return _GENERATION.search(self.source) is not None

    def render(self, messages: Messages) -> Rendering:
        """Renders a conversation that has an assistant's message.

        Raises:
            CorruptRecordError: The template refuses the conversation.
            ConfigError: Not a template, or one that does not tell what the assistant writes.
        """
        if self.marks_generation:
            text, marked = self._run(messages, return_assistant_tokens_mask=True)
            spans = [self._with_end_of_turn(text, start, end) for start, end in marked]
        else:
            text, _ = self._run(messages)
            spans = self._increments(messages, text)
        spans = [(start, end) for start, end in spans if start < end]
        if not spans:
            raise CorruptRecordError("the chat template leaves nothing for the assistant to write")
        return Rendering(text, tuple(spans))

    def _increments(self, messages: Messages, text: str) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, _ = self._run(messages[:number], add_generation_prompt=True)
            through, _ = self._run(messages[: number + 1])
            earlier_end = spans[-1][1] if spans else 0
            is_growing = through.startswith(prompt) and text.startswith(through)
            if not is_growing or len(prompt) < earlier_end:
                raise ConfigError(
                    f"chat_template: the first {number + 1} of {len(messages)} messages are "
                    "rendered differently once more follow, so it cannot be told what the "
                    "assistant writes; give a template that marks it with `{% generation %}`"
                )
            spans.append((len(prompt), self._end_of_turn(through)))
        return spans

    def _end_of_turn(self, text: str) -> int:
        """Where the turn that a text ends with ends: without white space, if a marker is there."""
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(self.ends) else len(text)

    def _with_end_of_turn(self, text: str, start: int, end: int) -> tuple[int, int]:
        """A marked span with the end of turn, which some templates leave outside."""
        inside = text[start:end].rstrip()
        if inside.endswith(self.ends):
            return start, start + len(inside)
        behind = next((mark for mark in self.ends if text.startswith(mark, end)), "")
        return start, end + len(behind)

    def _run(self, messages: Messages, **options: bool) -> tuple[str, Sequence[tuple[int, int]]]:
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.source,
                **options,
                **self.special_tokens,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat_template: not Jinja ({error})") from error
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise CorruptRecordError(f"the chat template refuses it ({error})") from error
        return texts[0], spans[0] if spans else ()
