"""Conversations: what a record must hold, and how it becomes tokens of which some are learned.

The markers of the template become special tokens; what the messages say never does, whatever it
looks like. The text is cut where the assistant begins and ends, as it is at decode time, where the
prompt has its tokens before the first one of the answer is chosen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from trimode.checkpoint.model_cache import named_folder
from trimode.conversation import end_of_answer
from trimode.errors import ConfigError
from trimode.training.byte_bpe import load_tokenizer, special_token_ids
from trimode.training.chat_markers import with_markers
from trimode.training.chat_template import (
    CHATML,
    CHATML_END,
    ChatTemplate,
    Messages,
    Rendering,
)
from trimode.training.corrupt_records import CorruptRecordError
from trimode.training.manifest import ChatRecord
from trimode.training.prepare_config import PrepareConfig
from trimode.training.shard_writer import SupervisedDocument
from trimode.training.written_ids import FIELDS, written_ids
from trimode.vocabulary import Vocabulary

_STAND_INS = 0x100000
"""First of the private-use characters that stand for special tokens written by a person."""


class ChatFormat:
    """The tokenizer and the template of conversations.

    Attributes:
        tokenizer: With the template, and with ChatML's markers where there was room.
        template: What conversations look like.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        template: str,
        template_source: str,
        markers: dict[str, str],
        messages_field: str,
        takes_ids: bool,
    ) -> None:
        """Use `load`."""
        self.tokenizer = tokenizer
        self._special_ids = special_token_ids(tokenizer)
        names = sorted(self._special_ids, key=len, reverse=True)
        self.template = ChatTemplate(
            template, _named_tokens(tokenizer), tuple({*names, CHATML_END})
        )
        self._template_source, self._markers = template_source, markers
        self._messages_field, self._takes_ids = messages_field, takes_ids
        # The string that ended an answer of `trimode selfgen`, if a string did.
        self._stop = end_of_answer(Vocabulary(tokenizer, mask_token_id=None))
        self._special = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._stand_ins = {name: chr(_STAND_INS + i) for i, name in enumerate(names)}
        self._spelled = {ord(sign): name for name, sign in self._stand_ins.items()}
        self._is_whole = _must_be_whole(tokenizer, template)

    @classmethod
    def load(cls, config: PrepareConfig) -> ChatFormat:
        """The format that a configuration asks for.

        Raises:
            ConfigError: No such tokenizer, or the template's file cannot be read.
        """
        assert config.tokenizer is not None, "PrepareConfig refuses chat without a tokenizer"
        tokenizer = load_tokenizer(config.tokenizer, mask_token=config.mask_token)
        template, source = _find_template(config.chat_template, tokenizer)
        tokenizer, markers = with_markers(
            tokenizer, template=template, folder=named_folder(config.tokenizer)
        )
        tokenizer.chat_template = template
        return cls(
            tokenizer,
            template=template,
            template_source=source,
            markers=markers,
            messages_field=config.messages_field,
            takes_ids=config.take_ids,
        )

    def record(self, num_supervised: dict[str, int]) -> ChatRecord:
        """What the manifest says about all this."""
        return ChatRecord(
            template=self.template.source,
            template_source=self._template_source,
            markers=self._markers,
            supervision="generation" if self.template.marks_generation else "increments",
            num_supervised=num_supervised,
        )

    def text_of(self, fields: dict[str, Any]) -> str:
        """A record's conversation as one line of JSON, which `encode` takes.

        Raises:
            CorruptRecordError: Not a conversation, or one that the template refuses.
            ConfigError: The template does not tell what the assistant writes.
        """
        messages = _messages(fields, self._messages_field)
        rendering = self._render(messages)
        written = None
        if self._takes_ids and any(fields.get(name) is not None for name in FIELDS):
            written = self._written(fields, messages, rendering)
        try:
            return json.dumps(messages if written is None else written, ensure_ascii=False)
        except TypeError as error:  # Parquet has more types
            raise CorruptRecordError(f"a message that JSON cannot hold ({error})") from error

    def encode_all(self, texts: Iterable[str]) -> Iterator[SupervisedDocument]:
        """Encodes conversations from `text_of`."""
        return (self.encode(text) for text in texts)

    def encode(self, text: str) -> SupervisedDocument:
        """Encodes a conversation from `text_of`, and closes it with EOS if it does not end so.

        Returns:
            The tokens; supervised are those of the assistant, the ends of its turns and, if it has
            the last word, the EOS. Of a record with tokens, only those of its last answer are, and
            the EOS only if the answer ends with it.
        """
        record = json.loads(text)
        if isinstance(record, dict):
            prompt_ids, answer_ids = (record[name] for name in FIELDS)
            return self._closed(
                [*prompt_ids, *answer_ids],
                [False] * len(prompt_ids) + [True] * len(answer_ids),
                is_end_learned=False,
            )
        rendering = self._render(record)
        length, (_, last_end) = len(rendering.text), rendering.spans[-1]
        is_last_word = not rendering.text[last_end:].strip()
        if is_last_word:
            length = last_end
        encode = self._encode_whole if self._is_whole else self._encode_pieces
        ids, flags = encode(Rendering(rendering.text[:length], rendering.spans))
        return self._closed(ids, flags, is_end_learned=is_last_word)

    def _closed(
        self, ids: list[int], flags: list[bool], *, is_end_learned: bool
    ) -> SupervisedDocument:
        """The document, with EOS at its end."""
        if not ids or ids[-1] != self.tokenizer.eos_token_id:
            ids.append(self.tokenizer.eos_token_id)
            flags.append(is_end_learned)
        return SupervisedDocument(np.array(ids, dtype=np.int64), np.array(flags, dtype=bool))

    def _written(
        self, fields: dict[str, Any], messages: Messages, rendering: Rendering
    ) -> dict[str, list[int]] | None:
        """The tokens of a record that has them, if they are those of its messages."""
        if messages[-1]["role"] != "assistant":
            raise CorruptRecordError("tokens of an answer, but the last message is no answer")
        prompt = rendering.text[: rendering.spans[-1][0]].translate(self._spelled)
        return written_ids(
            fields,
            prompt_text=prompt,
            answer_text=messages[-1]["content"],
            stop=self._stop,
            tokenizer=self.tokenizer,
        )

    def _render(self, messages: Messages) -> Rendering:
        """The text, in which special tokens that a message spells are stand-ins."""
        if not any(self._special.search(text) for text in _strings(messages)):
            return self.template.render(messages)
        if self._is_whole:
            raise CorruptRecordError(
                "a message spells a special token, which this tokenizer cannot take for text"
            )
        disguised = self.template.render(_mapped(messages, self._disguise))
        shown = disguised.text.translate(self._spelled)
        if shown != self.template.render(messages).text:
            raise CorruptRecordError("the chat template looks for special tokens in messages")
        return disguised

    def _disguise(self, text: str) -> str:
        if any(sign in text for sign in self._stand_ins.values()):
            raise CorruptRecordError("private-use characters beside the text of a special token")
        return self._special.sub(lambda match: self._stand_ins[match[0]], text)

    def _encode_pieces(self, rendering: Rendering) -> tuple[list[int], list[bool]]:
        """Cuts at special tokens and where the assistant begins and ends; each piece by itself."""
        text = rendering.text
        marks = {match.start(): match for match in self._special.finditer(text)}
        borders = {0, len(text), *(min(b, len(text)) for span in rendering.spans for b in span)}
        borders |= {place for match in marks.values() for place in match.span()}
        starts = sorted(borders)
        pieces = list(zip(starts, starts[1:], strict=False))
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True  # as text: the template's own are found here
        plain = [text[a:b].translate(self._spelled) for a, b in pieces if a not in marks]
        encoded = iter(backend.encode_batch_fast(plain, add_special_tokens=False))
        ids: list[int] = []
        flags: list[bool] = []
        for start, end in pieces:
            is_mark = start in marks
            some = [self._special_ids[text[start:end]]] if is_mark else next(encoded).ids
            ids += some
            flags += [any(a <= start < b for a, b in rendering.spans)] * len(some)
        return ids, flags

    def _encode_whole(self, rendering: Rendering) -> tuple[list[int], list[bool]]:
        """All at once, see `_must_be_whole`; tokens are assigned by their characters."""
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = False
        encoding = backend.encode(rendering.text, add_special_tokens=False)
        flags: list[bool] = []
        reached = 0
        for start, end in encoding.offsets:
            start = min(start, reached)  # white space may be left out of a token's characters
            reached = max(reached, end)
            flags.append(any(start < b and end > a for a, b in rendering.spans))
        return list(encoding.ids), flags


def _messages(fields: dict[str, Any], field: str) -> Messages:
    """The messages of a record, those of `system` first; keys without a value are left out.

    Raises:
        CorruptRecordError: Not a conversation.
    """
    found = fields.get(field)
    if not isinstance(found, list) or not found:
        names = ", ".join(sorted(map(str, fields))[:8]) or "none"
        raise CorruptRecordError(f"no messages in field `{field}`; fields there: {names}")
    messages: Messages = []
    for number, message in enumerate(found, start=1):
        if not isinstance(message, dict):
            kind = type(message).__name__
            raise CorruptRecordError(f"message {number} is {kind}, expected an object")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise CorruptRecordError(f"message {number} has no text in `{name}`")
        messages.append({key: value for key, value in message.items() if value is not None})
    system = fields.get("system")
    if system is not None:
        if not isinstance(system, str):
            kind = type(system).__name__
            raise CorruptRecordError(f"`system` is {kind}, expected text")
        if messages[0]["role"] == "system":
            raise CorruptRecordError("a system message is given twice, as `system` and in messages")
        messages.insert(0, {"role": "system", "content": system})
    if not any(message["role"] == "assistant" for message in messages):
        raise CorruptRecordError("no message of the assistant, so nothing to learn")
    return messages


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Plain JSON with every string in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return value


def _strings(value: Any) -> Iterator[str]:
    """Every string in plain JSON, keys aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _find_template(file: str | None, tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    if file is not None:
        try:
            return Path(file).read_text(encoding="utf-8"), "file"
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template: {file} cannot be read ({error})") from error
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several, by purpose
        own = own.get("default")
    return (own, "tokenizer") if own else (CHATML, "chatml")


def _named_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Special tokens by role, such as `bos_token`."""
    named = tokenizer.special_tokens_map.items()
    return {name: str(token) for name, token in named if not isinstance(token, list)}


def _must_be_whole(tokenizer: PreTrainedTokenizerFast, template: str) -> bool:
    """Whether pieces encoded one by one would not be the tokens of the whole.

    So it is where the tokenizer puts a sign before every text, as those made by SentencePiece may,
    and where a special token of the template takes white space beside it along.
    """
    tokens = tokenizer.backend_tokenizer.encode("x", add_special_tokens=False).tokens
    added = tokenizer.added_tokens_decoder.values()
    takes_space = any((t.lstrip or t.rstrip) and t.content in template for t in added)
    return "".join(tokens) != "x" or takes_space
