"""A conversation as a prompt: the chat template up to the next turn, and what ends that turn."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from trimode.decoding.control import GRAMMAR_KINDS
from trimode.errors import RequestError
from trimode.heal import EncodedPrompt, healed
from trimode.messages import Messages, checked_messages, offered_tools, template_variables
from trimode.rendering import Renderer
from trimode.tool_calls import NO_TOOLS, find_form, shows_calls
from trimode.vocabulary import Vocabulary

CHAT_OPTIONS = (
    *("tools", "tool_choice", "chat_template_kwargs", "enable_thinking"),
    *("continue_final_message", "add_generation_prompt"),
)
"""Options of a conversation that `TriModeLM.generate` does not have.

    tools: Of OpenAI's shape; the template shows them to the model.
    tool_choice: `auto`, or `none` for no tools.
    chat_template_kwargs: Variables of the template, by name.
    enable_thinking: One of them.
    continue_final_message: Whether the answer goes on in the last message, which is the
        assistant's; by default it does in such a message.
    add_generation_prompt: Whether the assistant's turn is opened; by default it is, unless a
        message is continued.
"""

NO_END = (
    "the chat template writes nothing between the assistant's turn and the next one, so only the"
    " end-of-text token or max_new_tokens ends an answer"
)

_STAND_IN = "\N{OBJECT REPLACEMENT CHARACTER}"
_OTHER_STAND_IN = "\N{INTERLINEAR ANNOTATION ANCHOR}"


def answering(
    vocabulary: Vocabulary | None, messages: Messages, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of `TriModeLM.generate` and `.stream` that answer a conversation.

    Args:
        vocabulary: Of a tokenizer with a chat template.
        messages: `{"role": ..., "content": ...}`; see `TriModeLM.chat`.
        options: Of `TriModeLM.chat`.

    Returns:
        `options` without `CHAT_OPTIONS`, with the `prompt`, and with the end of the assistant's
        turn among `stop_token_ids`, or among `stop` where no token marks it.

    Raises:
        RequestError: No chat template, or one that refuses the conversation; options that
            contradict one another.
    """
    rest = {name: value for name, value in options.items() if name not in CHAT_OPTIONS}
    own = {name: options.get(name) for name in CHAT_OPTIONS}
    if "prompt" in rest:
        raise RequestError("prompt is given beside messages; allowed: one of them")
    if rest.get("parse_special"):
        raise RequestError(
            f"parse_special is {rest['parse_special']!r}; control tokens in messages are text;"
            " allowed: False"
        )
    tools = offered_tools(own["tools"], own["tool_choice"])
    variables = template_variables(own["chat_template_kwargs"], own["enable_thinking"])
    renderer = Renderer(vocabulary, tools=tools, variables=variables)
    plain = checked_messages(messages)
    is_open, opens = _how_it_goes_on(plain, own)
    if tools and find_form(renderer) is None:
        raise RequestError(f"tools is given, but {NO_TOOLS}; allowed: no tools")
    _check_shown(renderer, plain)
    earlier = plain[:-1] if plain[-1]["role"] == "assistant" else plain
    # The answer and one more message, so that it shows what comes between the two.
    turns = [{"role": "assistant", "content": _STAND_IN}, {"role": "user", "content": _STAND_IN}]
    parts = renderer.text([*earlier, *turns]).rsplit(_STAND_IN, 2)
    if len(parts) < 3:
        raise RequestError("the chat template leaves out what assistant or user say")
    if is_open:
        prompt = _continued(renderer, plain, rest)
    else:
        prompt = EncodedPrompt(renderer.prompt(plain, add_generation_prompt=opens).token_ids)
    ends = _ended_by(renderer.vocabulary, parts[1], rest)
    if not ends:
        prompt = replace(prompt, remarks=[*prompt.remarks, NO_END])
    return {**rest, "prompt": prompt} | ends


def asking(
    vocabulary: Vocabulary | None,
    options: Mapping[str, Any],
    *,
    system: str | None = None,
) -> dict[str, Any]:
    """Arguments of `TriModeLM.generate` that have the model write the user's first message.

    Args:
        vocabulary: Of a tokenizer with a chat template.
        options: Other arguments.
        system: The system message; None leaves it to the template.

    Returns:
        As `answering`: the prompt is the template up to where the message begins, and the end of
        the user's turn ends the text.

    Raises:
        RequestError: No chat template, or one that does not show where the message begins or ends.

    Source:
        Magpie (Xu et al. 2024, arXiv 2406.08464).
    """
    renderer = Renderer(vocabulary)
    before = [] if system is None else [{"role": "system", "content": system}]
    found = set()
    for user, assistant in ((_STAND_IN, _OTHER_STAND_IN), (_OTHER_STAND_IN, _STAND_IN)):
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        opening, _, rest = renderer.text([*before, *turns]).partition(user)
        ending = rest.partition(assistant)[0]
        found.add((opening, ending if rest and user not in rest else ""))
    opening, ending = found.pop()
    if found or not opening or not ending.strip():
        raise RequestError(
            "the chat template does not show where the user's message begins and ends, so the"
            " model cannot write one; give it prompts"
        )
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": _STAND_IN}]
    prompt = renderer.prompt([*before, *turns], open_at=-2)
    return {**options, "prompt": prompt.token_ids} | _ended_by(renderer.vocabulary, ending, options)


def end_of_answer(vocabulary: Vocabulary) -> str | None:
    """The string that ends an answer; None where a token does, or where there is no template."""
    try:
        options = answering(vocabulary, [{"role": "user", "content": "x"}], {})
    except RequestError:  # no template from which anything can be written
        return None
    return options["stop"][0] if "stop" in options else None


def _how_it_goes_on(messages: Messages, own: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the last message is continued; and, if not, whether a turn is opened."""
    goes_on, opens = own["continue_final_message"], own["add_generation_prompt"]
    for name in ("continue_final_message", "add_generation_prompt"):
        if not isinstance(own[name], bool | None):
            raise RequestError(f"{name} is {own[name]!r}; allowed: True or False")
    if goes_on and opens:
        raise RequestError(
            "continue_final_message is True and add_generation_prompt is True; allowed: one of them"
        )
    last = messages[-1]
    is_assistants = last["role"] == "assistant"
    if goes_on and not is_assistants:
        raise RequestError(
            f"continue_final_message is True, but the last message is of role {last['role']!r};"
            " allowed: with an assistant's"
        )
    if goes_on is None:
        goes_on = is_assistants and not opens
    if goes_on and "tool_calls" in last:
        raise RequestError(
            "the last message has tool_calls, so it cannot be continued; allowed: text alone, or"
            " add_generation_prompt, or the tools' answers behind it"
        )
    return goes_on, opens is not False


def _check_shown(renderer: Renderer, messages: Messages) -> None:
    """Refuse what the template would drop in silence."""
    if any("tool_calls" in message for message in messages) and not shows_calls(renderer):
        raise RequestError(f"messages have tool_calls, but {NO_TOOLS}")
    num = sum(message["role"] == "tool" for message in messages)
    if num:
        marked = [
            {**message, "content": _STAND_IN} if message["role"] == "tool" else message
            for message in messages
        ]
        plain = renderer.text(messages).count(_STAND_IN)
        if renderer.text(marked).count(_STAND_IN) <= plain:
            raise RequestError("the chat template leaves out messages of role 'tool'")


def _continued(renderer: Renderer, messages: Messages, options: Mapping[str, Any]) -> EncodedPrompt:
    """The conversation up to the end of its last message, which is healed there."""
    rendering, text = renderer.prompt(messages, open_at=-1), messages[-1]["content"]
    said = os.path.commonprefix([rendering.text[::-1], text[::-1]])[::-1]
    if not said.endswith(text.lstrip()):
        raise RequestError("the chat template changes the last message, so it cannot be continued")
    plain = EncodedPrompt(rendering.token_ids)
    if not said or options.get("heal") is False:
        return plain
    at_character = any(options.get(kind) is not None for kind in GRAMMAR_KINDS)
    found = healed(renderer.vocabulary, plain.token_ids, said, at_character=at_character)
    template = rendering.text[: len(rendering.text) - len(said)]
    is_beyond = len(found.healed_bytes) > len(said.encode())  # by a space before the message
    return plain if is_beyond and template.endswith(" ") else found


def _ended_by(vocabulary: Vocabulary, ending: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that end a text where the template ends the turn; none if nothing marks that.

    Args:
        vocabulary: Of the tokenizer.
        ending: What the template writes between two messages.
        options: Of the caller, to which the ends are added.
    """
    special = next(iter(vocabulary.spelled_control(ending)), None)
    head = ending if special is None else ending.partition(special)[0]
    ends: dict[str, Any] = {}
    breaks, line = _first_line(head)
    word = _added_word(vocabulary, breaks, line)
    if word is not None:
        ends["stop"] = _with(options.get("stop"), word)
    elif line and (breaks or special is None):
        ends["stop"] = _with(options.get("stop"), breaks + line)
    if special is not None and word is None:
        token_id = vocabulary.tokenizer.convert_tokens_to_ids(special)
        ends["stop_token_ids"] = _with(options.get("stop_token_ids"), token_id)
    return ends


def _first_line(text: str) -> tuple[str, str]:
    """The first line that is not blank, and the line breaks before it."""
    line = text.strip()
    before = text[: text.index(line)] if line else ""
    found = re.search(r"[\r\n].*", before, re.DOTALL)
    return ("" if found is None else found[0]), line.splitlines()[0].rstrip() if line else ""


def _added_word(vocabulary: Vocabulary, breaks: str, line: str) -> str | None:
    """The added token that ends a turn though it is not special; none where it begins a line of
    other text."""
    found = [word for word in vocabulary.ordinary_words if line.startswith(word)]
    word = max(found, key=len, default=None)
    return word if word == line or not breaks else None


def _with(values: Any, one: Any) -> Any:
    """A caller's list with one more; what is no list stays as it is, for `generate` to refuse."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if values is None or isinstance(values, str):
        return [one] if values is None else [values, one]
    return [*values, one] if isinstance(values, Sequence) else values
