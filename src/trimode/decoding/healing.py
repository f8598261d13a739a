"""Token healing: the end of a prompt chosen anew, in tokens that begin with what was typed.

A prompt that ends inside of what would be one token (`import nu`, a line break before indentation)
leaves the model where no text of its training ever stood. So the prompt's last tokens are taken
back, and the first new ones may only be such whose bytes begin with the bytes still owed, or are a
beginning of them. All other laws and modes begin behind that.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Ids

from trimode.decoding.bits import Bits, token_set
from trimode.decoding.token_bytes import TokenBytes


class Healing:
    """The bytes that a text owes before it goes on.

    Args:
        taken_ids: Tokens that were taken back of the prompt, at least one.
        tokens: Of the vocabulary, those among them.
        num_tokens: Size of the vocabulary V.

    Attributes:
        owed: What they say.
    """

    def __init__(self, taken_ids: Ids[int], tokens: TokenBytes, *, num_tokens: int) -> None:
        self.taken_ids = list(taken_ids)
        self.owed = owed = b"".join(tokens[token_id] for token_id in taken_ids)
        self._tokens = tokens
        self._num_tokens = num_tokens
        self._choices = [list[int]() for _ in owed]
        """By the number of bytes paid: what may come next, such that the rest can be paid too."""
        for paid in reversed(range(len(owed))):
            found = self._choices[paid]
            for stop in range(paid + 1, len(owed) + 1):
                if stop == len(owed) or self._choices[stop]:
                    found += tokens.spelling(owed[paid:stop])
            found += tokens.extending(owed[paid:])

    def is_over(self, token_ids: Ids[int]) -> bool:
        """Whether these new tokens have paid all."""
        return self._paid(token_ids) >= len(self.owed)

    def num_inside(self, token_ids: Ids[int]) -> int:
        """How many of the first new tokens say only what the prompt said. The one that goes beyond
        it is not among them."""
        paid = 0
        for number, token_id in enumerate(token_ids):
            if paid == len(self.owed):
                return number
            paid += len(self._tokens[token_id])
            if paid > len(self.owed):
                return number
        return len(token_ids)

    def rest(self, token_ids: Ids[int]) -> bytes:
        """What is still owed after these new tokens."""
        return self.owed[self._paid(token_ids) :]

    def going_beyond(self, token_ids: Ids[int], candidates: Iterable[int]) -> list[int]:
        """Those of the candidates that say more than is still owed after these new tokens."""
        num_left = len(self.rest(token_ids))
        return [i for i in candidates if i in self._tokens and len(self._tokens[i]) > num_left]

    def allowed_after(self, token_ids: Ids[int]) -> Bits | None:
        """What may follow these new tokens; None for anything, since all is paid."""
        paid = self._paid(token_ids)
        if paid >= len(self.owed):
            return None
        return token_set(self._choices[paid], self._num_tokens)

    def _paid(self, token_ids: Ids[int]) -> int:
        paid = 0
        for token_id in token_ids:
            if paid >= len(self.owed):
                break
            paid += len(self._tokens[token_id])
        return paid
