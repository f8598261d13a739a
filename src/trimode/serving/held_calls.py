"""What of a growing answer may be sent already, where its end may be a tool call."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

from trimode.detokenize import StandingText, free_len
from trimode.tool_calls import BEGIN_THOUGHT, END_THOUGHT, ToolForm

_MOST_HEAD = 200
"""Characters between an opening and the JSON of the arguments, within which a name stands."""
_MOST_TOKENS = 32
"""That spell the end of a thought."""


class CallsHeldBack:
    """Hands out the text of a growing answer up to what may be a tool call.

    Args:
        tokenizer: Of the model.
        form: Of the template.
        text: The answer's.
        is_thinking: Whether the answer begins inside of a thought.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        form: ToolForm,
        text: StandingText,
        *,
        is_thinking: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._form = form
        self._text = text
        self._held = ""
        self._num_given = 0
        self._is_closed = False
        self._is_free = False
        self._is_thinking = (is_thinking or None) if form.thinks else False  # None: not known yet
        self._last_ids: list[int] = []
        self._scan: _JsonScan | None = None
        self._num_scanned = 0

    def push(self, token_ids: Sequence[int], *, num_deaf: int = 0) -> str:
        """Take the next tokens; returns the text that is no call, possibly none.

        Args:
            token_ids: The next.
            num_deaf: As `StandingText.push` has it.
        """
        if self._is_closed:
            return ""
        mark = self._form.opening_id
        if mark is not None:
            token_ids = self._before_mark(token_ids, mark)
        self._held += self._text.push(token_ids, num_deaf=num_deaf)
        length = len(self._held) if mark is not None else self._free_len()
        piece, self._held = self._held[:length], self._held[length:]
        self._num_given += length
        return piece

    def finish(self, content: str) -> str:
        """What of the answer, calls aside, was not given yet."""
        return content[self._num_given :]

    def _before_mark(self, token_ids: Sequence[int], mark: int) -> Sequence[int]:
        """The tokens up to the opening, thoughts aside, which closes the text."""
        for at, token_id in enumerate(token_ids):
            if self._is_thinking is not True and token_id == mark:
                self._is_closed = True
                return token_ids[:at]
            if self._is_thinking is not False:
                self._last_ids = [*self._last_ids, token_id][-_MOST_TOKENS:]
                self._think(str(self._tokenizer.decode(self._last_ids, skip_special_tokens=False)))
        return token_ids

    def _think(self, text: str) -> int:
        """Note whether an answer begins with a thought, and where this ends; returns where."""
        begun = text.lstrip()
        if self._is_thinking is None and not BEGIN_THOUGHT.startswith(begun):
            self._is_thinking = begun.startswith(BEGIN_THOUGHT)
        if self._is_thinking and (at := text.find(END_THOUGHT)) >= 0:
            self._is_thinking = False
            return at + len(END_THOUGHT)
        return 0

    def _free_len(self) -> int:
        start = 0
        if self._is_thinking is not False:
            start = self._think(self._held)
            if self._is_thinking is None:
                return 0
            if self._is_thinking:
                return free_len(self._held, [END_THOUGHT])
        if self._is_free:
            return len(self._held)
        return self._before_opening(start) if self._form.opening else self._before_whole(start)

    def _before_whole(self, start: int) -> int:
        """How much is free where the call is the whole answer, thoughts aside."""
        if self._scan is None:
            self._scan, self._num_scanned = _JsonScan(self._form.keys), 0
        if self._scan.takes(self._held[start + self._num_scanned :]):
            self._num_scanned = len(self._held) - start
            return start
        self._is_free = True
        return len(self._held)

    def _before_opening(self, start: int) -> int:
        mark = self._form.mark
        while True:
            start += free_len(self._held[start:], [mark])
            if start == len(self._held) or self._may_be_call(start):
                return start
            self._scan = None
            start += 1

    def _may_be_call(self, start: int) -> bool:
        """Whether what is held may be a call from here on."""
        held, form = self._held[start:], self._form
        if self._scan is None:
            words = "".join(form.opening.split())
            begun = "".join(held.split())
            if len(begun) < len(words):
                return words.startswith(begun)
            body = form.body(held)
            if body is None:
                opened = form.body(held, is_named=True)
                return opened is not None and len(held) - opened <= _MOST_HEAD
            self._scan, self._num_scanned = _JsonScan(None), body
        may_be = self._scan.takes(held[self._num_scanned :])
        self._num_scanned = len(held)
        if may_be and self._scan.num_whole:
            self._is_closed = may_be = bool(form.calls(held, ())[1])
        return may_be


class CallAlone:
    """The text of an answer that is the arguments of a call: nothing, unless it was cut."""

    def push(self, token_ids: Sequence[int], *, num_deaf: int = 0) -> str:
        """Take the next tokens; none of them is text."""
        return ""

    def finish(self, content: str) -> str:
        """The answer's text, which is no call."""
        return content


class _JsonScan:
    """Reads objects and lists of JSON character by character, so far as to tell other text.

    Args:
        keys: That an object may have, or one in a list; None for any, and one value.
    """

    def __init__(self, keys: Collection[str] | None) -> None:
        self.num_whole = 0
        self._keys = keys
        self._open: list[str] = []
        self._string: str | None = None  # what of a string was read
        self._is_key = False  # whether the string is a key of `keys`
        self._is_escaped = False
        self._wants_key = False

    def takes(self, text: str) -> bool:
        """Read on; False if this is no such JSON, whatever follows."""
        for sign in text:
            if self._keys is None and self.num_whole:
                return True
            if not (self._in_string(sign) if self._string is not None else self._outside(sign)):
                return False
        return True

    def _in_string(self, sign: str) -> bool:
        assert self._string is not None
        if self._is_escaped:
            self._is_escaped = False
        elif sign == "\\":
            self._is_escaped, self._is_key = True, False
        elif sign == '"':
            known = not self._is_key or self._string in (self._keys or ())
            self._string, self._is_key = None, False
            return known
        elif self._is_key:
            self._string += sign
            return any(key.startswith(self._string) for key in self._keys or ())
        return sign >= " "

    def _outside(self, sign: str) -> bool:
        if sign.isspace():
            return True
        top = self._open[-1] if self._open else ""
        if not top and sign not in "{[":
            return sign == ";" and self.num_whole > 0
        if self._keys is not None and self._open == ["["] and sign not in "{,]":
            return False
        if self._wants_key and sign not in '"}':
            return False
        if sign == '"':
            self._string = ""
            is_outer = self._open in (["{"], ["[", "{"])
            self._is_key = self._wants_key and is_outer and self._keys is not None
            self._wants_key = False
        elif sign in "{[":
            self._open.append(sign)
            self._wants_key = sign == "{"
        elif sign in "}]":
            if top + sign not in ("{}", "[]"):
                return False
            self._open.pop()
            self._wants_key = False
            self.num_whole += not self._open
        elif sign == ",":
            self._wants_key = top == "{"
        else:
            return sign in "-+.:0123456789eEtrufalsnNIity"
        return True
