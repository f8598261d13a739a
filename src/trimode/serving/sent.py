"""What the reader of a text has, where another making of the same text has to go on behind it."""

from __future__ import annotations

from trimode.serving.jobs import Done, Happening, Piece, Update


class AnotherText(Exception):
    """The new making is not the text that the reader has the beginning of."""


class Sent:
    """What a reader has got of a text so far."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._text = ""
        self._num_ids_now = 0  # of the present making
        self._text_now = ""
        self._had_events = False
        self._had_prompt = False

    def begin_again(self) -> bool:
        """The text is made anew from its start; False if its watcher would see things twice."""
        self._num_ids_now, self._text_now = 0, ""
        return not self._had_events

    def beyond(self, update: Update) -> Update | None:
        """What of an update the reader does not have; None if nothing.

        Raises:
            AnotherText: it does not go on from what the reader has.
        """
        if isinstance(update, Piece):
            return self._rest(update)
        if isinstance(update, Happening):
            self._had_events = True
        num_known = len(self._token_ids)
        if isinstance(update, Done) and list(update.token_ids[:num_known]) != self._token_ids:
            raise AnotherText
        return update

    def _rest(self, piece: Piece) -> Piece | None:
        logprobs = piece.logprobs
        if logprobs and not piece.token_ids:  # the prompt's
            logprobs = () if self._had_prompt else logprobs
            self._had_prompt = True
        start = self._num_ids_now
        self._num_ids_now += len(piece.token_ids)
        self._text_now += piece.text
        known_ids = self._token_ids[start : self._num_ids_now]
        num_known, num_chars = len(known_ids), len(self._text)
        if list(piece.token_ids[:num_known]) != known_ids:
            raise AnotherText
        if not (self._text_now.startswith(self._text) or self._text.startswith(self._text_now)):
            raise AnotherText
        rest = Piece(self._text_now[num_chars:], piece.token_ids[num_known:], logprobs[num_known:])
        self._token_ids += rest.token_ids
        self._text += rest.text
        return rest if rest.text or rest.token_ids or rest.logprobs else None
