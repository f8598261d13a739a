"""A tokenizer as this project needs it: strings to ids, the bytes of each token, control tokens."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trimode.decoding.token_bytes import TokenBytes

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_WORD_BEGIN = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's space


class Vocabulary:
    """Of one tokenizer.

    A control token is one that the tokenizer calls special: it means something to the model and is
    no text. A string may spell one all the same.

    Args:
        tokenizer: transformers'.
        mask_token_id: Of the model; no string becomes it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, mask_token_id: int | None) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.control_ids = frozenset(i for i, token in added.items() if token.special)
        self._mask_token_id = mask_token_id
        self._control = {added[i].content: i for i in self.control_ids}
        longest_first = sorted(map(re.escape, self._control), key=len, reverse=True)
        self._spelled = re.compile("|".join(longest_first)) if longest_first else None

    def spelled_control(self, text: str) -> list[str]:
        """Control tokens that a text spells, in its order."""
        return [] if self._spelled is None else self._spelled.findall(text)

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False
    ) -> list[int]:
        """Token ids of a string.

        Args:
            text: Valid Unicode.
            add_special_tokens: Whether the tokenizer's own beginning and end are put around it.
            parse_special: Whether control tokens that the text spells become these tokens, the mask
                token excepted. Else they are text, as everything.
        """
        spelled = self.spelled_control(text)
        tokenizer = self.tokenizer if parse_special or not spelled else self._literal
        ids = list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
        if self._mask_token_id not in ids:
            return ids
        as_text: list[int] = []
        for token_id in ids:
            if token_id != self._mask_token_id:
                as_text.append(token_id)
            else:
                content = self.tokenizer.added_tokens_decoder[token_id].content
                as_text += self._literal(content, add_special_tokens=False)["input_ids"]
        return as_text

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """Of all tokens that are text, as they are inside of a text; none where the tokenizer does
        not say them."""
        tokenizer = self.tokenizer
        added = tokenizer.added_tokens_decoder
        ordinary = {i: token.content.encode() for i, token in added.items() if not token.special}
        spell = _speller(tokenizer)
        for token, token_id in tokenizer.get_vocab().items():
            if token_id not in added and (octets := spell(token)):
                ordinary[token_id] = octets
        return TokenBytes({i: octets for i, octets in ordinary.items() if octets})

    @cached_property
    def letter(self) -> int | None:
        """A token that is a letter, which decodes by itself; None if there is none."""
        letters = (self.token_bytes.spelling(letter.encode()) for letter in "abcdefghij")
        return next((ids[0] for ids in letters if ids), None)

    def shown(self, token_id: int) -> tuple[str, bytes]:
        """Text and bytes of one token as it is inside of a text, or a control token's name; in the
        text U+FFFD stands for parts of characters."""
        if token_id in self.token_bytes:
            octets = self.token_bytes[token_id]
            return octets.decode(errors="replace"), octets
        name = self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return name, name.encode()

    def bytes_of(self, token_ids: Sequence[int]) -> bytes:
        """Of some tokens together; control tokens have none."""
        return b"".join(self.token_bytes[i] for i in token_ids if i in self.token_bytes)

    @cached_property
    def _literal(self) -> PreTrainedTokenizerBase:
        """A tokenizer of its own, to which spelled control tokens are text: whether they are is a
        state of the tokenizer, and threads may share ours."""
        literal = copy.deepcopy(self.tokenizer)
        literal.split_special_tokens = True
        return literal


def _speller(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    """What gives a token's bytes by its name; of a tokenizer that does not say them, none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = (json.loads(backend.to_str())["decoder"] if backend is not None else None) or {}
    parts = decoder.get("decoders", [decoder])
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        byte_of = {sign: byte for byte, sign in bytes_to_unicode().items()}
        return lambda token: bytes(byte_of[s] for s in token) if byte_of.keys() >= {*token} else b""
    has_bytes = "ByteFallback" in kinds
    if not (has_bytes or "Metaspace" in kinds):
        return lambda token: b""

    def spell(token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token) if has_bytes else None
        return token.replace(_WORD_BEGIN, " ").encode() if byte is None else bytes.fromhex(byte[1])

    return spell
