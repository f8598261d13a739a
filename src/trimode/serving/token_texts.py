"""What single tokens say, for a reader: those of a new text, and those of a prompt sent back."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from trimode.decoding import Sequence
from trimode.detokenize import GrowingText, settled_text
from trimode.runtime import TriModeLM
from trimode.serving.jobs import Piece, TextLogprobs, TokenText


class TokenTexts:
    """Names the tokens of one model.

    Args:
        lm: With a tokenizer.
    """

    def __init__(self, lm: TriModeLM) -> None:
        assert lm.vocabulary is not None
        self._lm = lm
        self._vocabulary = lm.vocabulary
        self._inside = lru_cache(maxsize=65_536)(self._make)

    def new(self, seq: Sequence, index: int, token_id: int) -> TokenText:
        """A token at a place of the new text, whose first token may begin inside of the prompt."""
        shown = self._inside(token_id)
        if index or token_id in self._vocabulary.control_ids:
            return shown
        if seq.healing is not None:
            owed = seq.healing.rest(seq.new_ids[: seq.num_inside])
            is_cut = shown.octets.startswith(owed)
            return TokenText.of(shown.octets.removeprefix(owed)) if is_cut else shown
        return self._cut(self._lm.growing_text(seq), token_id)

    def prompt_text(self, seq: Sequence, prompt: Any) -> str:
        """A prompt as its caller wrote it; of token ids their text, without special tokens and
        without half a character at the end, which the new text has."""
        return prompt if isinstance(prompt, str) else settled_text(self._vocabulary, seq.prompt_ids)

    def prompt_piece(self, seq: Sequence, prompt: Any, *, has_logprobs: bool) -> Piece:
        """A prompt, with its tokens' log-probabilities where they are wanted."""
        text = self.prompt_text(seq, prompt)
        if not has_logprobs:
            return Piece(text, ())
        assert seq.scores is not None
        tokenizer, control_ids = self._vocabulary.tokenizer, self._vocabulary.control_ids
        growing, start, is_first, found = GrowingText(tokenizer), 0, True, list[TextLogprobs]()

        def shown(token_id: int) -> TokenText:
            is_cut = is_first and token_id not in control_ids
            return self._cut(GrowingText(tokenizer), token_id) if is_cut else self._inside(token_id)

        for token_id, one in zip(seq.prompt_ids, seq.scores.found, strict=True):
            token = shown(token_id)
            top = () if one is None else tuple((shown(other), p) for other, p in one.top)
            piece = growing.push([token_id])
            begin = start + _num_before(piece, token)
            found.append(TextLogprobs(token, begin, None if one is None else one.logprob, top))
            if token_id not in control_ids:
                is_first = False
            elif isinstance(prompt, str) and text.startswith(token.text, start):
                start += len(token.text)  # its caller spelled it
            start += len(piece)
        return Piece(text, (), tuple(found))

    def _cut(self, growing: GrowingText, token_id: int) -> TokenText:
        """A token that begins a text, where its space may be dropped."""
        shown, first = self._inside(token_id), growing.whole([token_id]).encode()
        return TokenText.of(first) if shown.octets.endswith(first) else shown

    def _make(self, token_id: int) -> TokenText:
        return TokenText(*self._vocabulary.shown(token_id))


class NewLogprobs:
    """A text's log-probabilities as they come, with where each token begins.

    Args:
        texts: Of the tokens.
        growing: The new text, of which nothing was pushed.
        num_chars: Characters that stand before it.
    """

    def __init__(self, texts: TokenTexts, growing: GrowingText, *, num_chars: int = 0) -> None:
        self._texts = texts
        self._growing = growing
        self._num_chars = num_chars

    def push(self, seq: Sequence, start: int, stop: int) -> tuple[TextLogprobs, ...]:
        """Those of new tokens `start` to `stop`, if any were asked for."""
        if seq.params.control.logprobs is None:
            return ()
        found = []
        for i in range(start, stop):
            token_id, one, index = seq.new_ids[i], seq.logprobs[i], i - seq.num_inside
            piece = self._growing.push([token_id])
            if index >= 0:
                top = tuple((self._texts.new(seq, index, other), p) for other, p in one.top)
                token = self._texts.new(seq, index, token_id)
                begin = self._num_chars + _num_before(piece, token)
                found.append(TextLogprobs(token, begin, one.logprob, top))
            self._num_chars += len(piece)
        return tuple(found)


def _num_before(piece: str, token: TokenText) -> int:
    """Characters that a token settles before its own: those of bytes that waited for it."""
    return len(piece) - len(token.text) if piece.endswith(token.text) else 0
