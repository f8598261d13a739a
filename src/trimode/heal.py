"""A prompt as token ids, its end taken back where a token may go on from it (token healing)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trimode.vocabulary import Vocabulary

NOT_SPELLED = "a prompt is not healed, since the tokenizer's tokens do not say what it ends in"


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as it is fed, and what of it is chosen anew.

    Attributes:
        token_ids: Fed, at least one.
        taken_ids: That stood behind them and are not fed.
        healed_bytes: What those say; the new text begins behind it.
        remarks: What its writer should know.
    """

    token_ids: list[int]
    taken_ids: list[int] = field(default_factory=list)
    healed_bytes: bytes = b""
    remarks: list[str] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Of the prompt, before anything was taken back."""
        return len(self.token_ids) + len(self.taken_ids)

    @property
    def most_tokens(self) -> int:
        """Of the prompt, if every byte that was taken back becomes a token."""
        return len(self.token_ids) + len(self.healed_bytes)

    def fitting(self, room: int) -> EncodedPrompt:
        """The same where it may become `room` tokens; else with nothing taken back."""
        return self if self.most_tokens <= room else self.whole()

    def at_character(self) -> EncodedPrompt:
        """The same where whole characters were taken back; else with nothing taken back."""
        is_inside = bool(self.healed_bytes) and self.healed_bytes[0] & 0xC0 == 0x80
        return self.whole() if is_inside else self

    def whole(self) -> EncodedPrompt:
        """The same with nothing taken back."""
        return EncodedPrompt([*self.token_ids, *self.taken_ids], remarks=self.remarks)


def healed(
    vocabulary: Vocabulary, token_ids: Sequence[int], text: str, *, at_character: bool = False
) -> EncodedPrompt:
    """Take back tokens to the earliest boundary from which some token goes on beyond the text.

    Args:
        vocabulary: Of the tokenizer.
        token_ids: Of a prompt; the first stays.
        text: That it ends in; what stands before is not healed.
        at_character: Whether only whole characters are taken back.

    Returns:
        The prompt; whole, where its tokens do not say the text's end.
    """
    octets, tokens = text.encode(), vocabulary.token_bytes
    best, tail = 0, b""
    for number in range(1, len(token_ids)):
        token_id = token_ids[-number]
        tail = tokens[token_id] + tail if token_id in tokens else b""
        is_all = tail == b" " + octets  # sentencepiece puts a space before a text
        is_said = bool(tail) and (octets.endswith(tail) or is_all)
        if number == 1 and not is_said and not _is_known(vocabulary, token_id, text):
            return EncodedPrompt(list(token_ids), remarks=[NOT_SPELLED])
        if not is_said or len(tail) > tokens.longest:
            break
        if at_character and tail[0] & 0xC0 == 0x80:
            continue
        if tokens.extending(tail):
            best = number
    if not best:
        return EncodedPrompt(list(token_ids))
    kept, taken = list(token_ids[:-best]), list(token_ids[-best:])
    return EncodedPrompt(kept, taken, vocabulary.bytes_of(taken))


def _is_known(vocabulary: Vocabulary, token_id: int, text: str) -> bool:
    """Whether there is nothing odd about a text that its last token does not say: it is empty, ends
    in a control token, or begins inside of the token."""
    if token_id in vocabulary.control_ids:
        return not text or text.endswith(str(vocabulary.shown(token_id)[0]))
    octets = vocabulary.bytes_of([token_id])
    return not text or (bool(octets) and octets.endswith(text.encode()))
