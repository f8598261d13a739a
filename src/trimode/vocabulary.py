"""A tokenizer as this project needs it: strings to ids, the bytes of each token, control tokens."""

from __future__ import annotations

import copy
import itertools
import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from trimode.decoding.token_bytes import TokenBytes
from trimode.errors import RequestError

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
_WORD_BEGIN = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's space

_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFD))
"""Characters without a meaning of their own, which no template strips or changes. The last one is
left to `Vocabulary.encode_marked`."""


class Vocabulary:
    """Of one tokenizer.

    A control token is one that the tokenizer calls special, or the mask token where that is an
    added one: it means something to the model and is no text. A string may spell one all the same.

    Args:
        tokenizer: transformers'.
        mask_token_id: Of the model; no string that spells it becomes it.
        num_tokens: That the model has; the tokenizer may have more. None means as many.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mask_token_id: int | None,
        num_tokens: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        mask = {mask_token_id} & added.keys()
        self.control_ids = frozenset(i for i, token in added.items() if token.special) | mask
        self._mask_token_id = mask_token_id
        self._mask = {added[i].content for i in mask}
        self._num_tokens = num_tokens
        self._control = {added[i].content: i for i in self.control_ids}
        self._lengths = sorted({*map(len, self._control)}, reverse=True)
        firsts = {word[0] for word in self._control if word}
        self._first = re.compile(f"[{re.escape(''.join(firsts))}]") if firsts else None

    def spelled_control(self, text: str) -> list[str]:
        """Control tokens that a text spells, in its order."""
        return [word for _, word in self._spelled(text)]

    def _spelled(self, text: str) -> list[tuple[int, str]]:
        """The same, each with its place; where several begin, the longest."""
        found: list[tuple[int, str]] = []
        reached = 0
        for match in self._first.finditer(text) if self._first is not None else ():
            at = match.start()
            words = (text[at : at + length] for length in self._lengths)
            word = next((word for word in words if word in self._control), None)
            if at >= reached and word is not None:
                found.append((at, word))
                reached = at + len(word)
        return found

    def encode(
        self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False
    ) -> list[int]:
        """Token ids of a string.

        Args:
            text: Valid Unicode.
            add_special_tokens: Whether the tokenizer's own beginning and end are put around it.
            parse_special: Whether control tokens that the text spells become these tokens, the mask
                token excepted. Else they are text, as everything.

        Raises:
            RequestError: It uses all characters that could stand in for control tokens.
            ValueError: The tokenizer has no other tokens for such a text.
        """
        found = self._spelled(text)
        if parse_special:
            found = [(at, word) for at, word in found if word in self._mask]
        if not found:
            encoding = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
            return list(encoding["input_ids"])
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            return list(self._literal(text, add_special_tokens=add_special_tokens)["input_ids"])
        free = free_signs("the characters of the prompt", [text])
        sign_of = {word: next(free) for word in sorted({word for _, word in found})}
        parts, reached = [], 0
        for at, word in found:
            parts += [text[reached:at], sign_of[word]]
            reached = at + len(word)
        as_text = {sign: word for word, sign in sign_of.items()}
        ids = self.encode_marked("".join([*parts, text[reached:]]), as_text)
        if not add_special_tokens:
            return ids
        before, after = self._around
        return [*before, *ids, *after]

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts around a text."""
        inside = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        whole = list(self.tokenizer("a")["input_ids"])
        for start in range(len(whole) - len(inside) + 1):
            if whole[start : start + len(inside)] == inside:
                return whole[:start], whole[start + len(inside) :]
        return [], []

    def encode_marked(self, text: str, as_text: Mapping[str, str]) -> list[int]:
        """Token ids of a text whose added tokens are tokens, but those behind stand-ins are text.

        The ids are those of the whole text: no word begins or ends at a stand-in.

        Args:
            text: In which stand-ins occur.
            as_text: Stand-in, one character, to the added token that it stands for.

        Raises:
            ValueError: The tokenizer has no other tokens for such a text.
        """
        show = str.maketrans(dict(as_text))
        if not any(sign in text for sign in as_text):
            return self.encode(text, parse_special=True)
        if getattr(self.tokenizer, "backend_tokenizer", None) is None:
            return self._encode_pieces(text, show)
        tokenizer, signs, id_of = self._renamed
        marked = pattern_of(signs).sub(lambda match: signs[match[0]], text).translate(show)
        ids = tokenizer.encode(marked, add_special_tokens=False).ids
        foreign = (self.control_ids | {self._mask_token_id}) - {self.tokenizer.unk_token_id}
        wrong = [i for i in ids if i not in id_of and i in foreign]
        if wrong:
            name = self.tokenizer.convert_ids_to_tokens(wrong[0])
            raise ValueError(f"this tokenizer cannot take {name} for text")
        return [id_of.get(i, i) for i in ids]

    def _encode_pieces(self, text: str, show: dict[int, str]) -> list[int]:
        ids: list[int] = []
        for piece in re.split(f"({pattern_of(self._control).pattern})", text):
            is_control = piece in self._control
            ids += self.encode(piece.translate(show), parse_special=is_control) if piece else []
        return ids

    @cached_property
    def ordinary_words(self) -> list[str]:
        """Added tokens that are text and no white space, such as `<think>`."""
        added = self.tokenizer.added_tokens_decoder.items()
        ordinary = [token.content for i, token in added if i not in self.control_ids]
        return [word for word in ordinary if word.strip()]

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """Of all tokens that are text, as they are inside of a text; none where the tokenizer does
        not say them."""
        tokenizer, most = self.tokenizer, self._num_tokens
        added_tokens = tokenizer.added_tokens_decoder
        spell = _speller(tokenizer)
        found, single = dict[int, bytes](), set[int]()
        for token, token_id in tokenizer.get_vocab().items():
            if token_id == self._mask_token_id or (most is not None and token_id >= most):
                continue
            if (added := added_tokens.get(token_id)) is None:
                octets = spell(token)
                if _BYTE_TOKEN.fullmatch(token):
                    single.add(token_id)
            else:
                octets = b"" if token_id in self.control_ids else added.content.encode()
            if octets:
                found[token_id] = octets
        said = {octets for i, octets in found.items() if i not in single}
        # A byte by itself is decoded in another way than the token that says the same.
        return TokenBytes(found, hidden={i for i in single if found.get(i) in said})

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
    def _renamed(self) -> tuple[Tokenizer, dict[str, str], dict[int, int]]:
        """The tokenizer, its added tokens under names that no text can spell; these names; and the
        true ids. The mask token is not among them."""
        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        nonce, signs, id_of = secrets.token_hex(8), dict[str, str](), dict[int, int]()
        added = [one for one in content["added_tokens"] if one["id"] != self._mask_token_id]
        content |= {"added_tokens": [], "truncation": None, "padding": None}
        tokenizer = Tokenizer.from_str(json.dumps(content))
        for one in added:
            name = one["content"]
            if name.strip() and not one["single_word"]:
                signs[name] = f"\U0010fffd{nonce}-{one['id']}\U0010fffd"
                name = signs[name]
            flags = {flag: one[flag] for flag in ("single_word", "lstrip", "rstrip", "normalized")}
            tokenizer.add_tokens([AddedToken(name, **flags)])
            new_id = tokenizer.token_to_id(name)
            assert new_id is not None
            id_of[new_id] = one["id"]
        return tokenizer, signs, id_of

    @cached_property
    def _literal(self) -> PreTrainedTokenizerBase:
        """A tokenizer of its own, to which spelled control tokens are text: whether they are is a
        state of the tokenizer, and threads may share ours."""
        literal = copy.deepcopy(self.tokenizer)
        literal.split_special_tokens = True
        return literal


def free_signs(name: str, texts: Iterable[str]) -> Iterator[str]:
    """Yield characters that no text has.

    Raises:
        RequestError: There is none left in what has this name.
    """
    used = set().union(*texts)
    for code in itertools.chain(*_PRIVATE):
        if (sign := chr(code)) not in used:
            yield sign
    raise RequestError(f"{name} use every private character of Unicode; leave some out")


def pattern_of(words: Collection[str]) -> re.Pattern[str]:
    """Finds words, at least one, in a text; where several begin, the longest."""
    return re.compile("|".join(sorted(map(re.escape, words), key=len, reverse=True)))


def _speller(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], bytes]:
    """What gives a token's bytes by its name; of a tokenizer that does not say them, none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = (json.loads(backend.to_str())["decoder"] if backend is not None else None) or {}
    parts = decoder.get("decoders", [decoder])
    kinds = {part.get("type") for part in parts}
    if "ByteLevel" in kinds:
        byte_of = {ord(sign): chr(byte) for byte, sign in bytes_to_unicode().items()}
        return lambda token: _latin(token.translate(byte_of))
    has_bytes = "ByteFallback" in kinds
    if not (has_bytes or "Metaspace" in kinds):
        return lambda token: b""

    def spell(token: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(token) if has_bytes else None
        return token.replace(_WORD_BEGIN, " ").encode() if byte is None else bytes.fromhex(byte[1])

    return spell


def _latin(text: str) -> bytes:
    """Its characters as bytes; nothing where one is none."""
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return b""
