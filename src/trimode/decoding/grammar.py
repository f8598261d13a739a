"""Grammars that a text must be of: JSON schemas, regular expressions, Lark, by llguidance.

A matcher answers one question: what may follow this text? It goes back as easily as forward, so a
round that rejects drafts needs nothing of it.

llguidance is an optional dependency: `pip install 'trimode[grammar]'`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from collections.abc import Sequence as Ids
from typing import TYPE_CHECKING, Any

import numpy as np

from trimode.decoding.bits import Bits, no_tokens
from trimode.errors import RequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)


class Matcher:
    """Follows one text through a grammar.

    Args:
        matcher: llguidance's, at the start of the text.
        num_tokens: Size of the model's vocabulary V.
        eos_token_ids: Tokens that end a text of the grammar.
    """

    def __init__(
        self, matcher: LLMatcher, *, num_tokens: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._matcher = matcher
        self._num_tokens = num_tokens
        self._eos_token_ids = eos_token_ids
        self._consumed: list[int] = []

    def allowed_after(self, token_ids: Ids[int]) -> Bits | None:
        """What may follow a text.

        Args:
            token_ids: All of the new text, from its first token.

        Returns:
            A set of tokens: EOS wherever the text may end, and nothing else where it must. None if
            the text is not of the grammar or has ended: nothing of it can follow.
        """
        if not self._go_to(list(token_ids)):
            return None
        octets = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            logger.error("grammar: %s", _one_line(self._matcher.get_error()))
            return no_tokens(self._num_tokens)
        return np.frombuffer(octets, dtype=np.uint32)

    def _go_to(self, token_ids: list[int]) -> bool:
        """Whether the text is one that others of the grammar begin with."""
        num_common = len(self._consumed)
        if token_ids[:num_common] != self._consumed:
            pairs = enumerate(zip(self._consumed, token_ids, strict=False))
            shorter = min(num_common, len(token_ids))
            num_common = next((i for i, (old, new) in pairs if old != new), shorter)
            self._matcher.rollback(len(self._consumed) - num_common)
            del self._consumed[num_common:]
        rest = token_ids[num_common:]
        if not self._eos_token_ids.isdisjoint(rest):
            return False
        num_taken = self._matcher.try_consume_tokens(rest)
        self._consumed += rest[:num_taken]
        return num_taken == len(rest)


class Grammars:
    """Makes matchers for one model; holds the vocabulary as llguidance wants it, made once.

    Args:
        tokenizer: Of the model, or None.
        num_tokens: Size of the model's vocabulary V.
    """

    def __init__(self, tokenizer: Any, *, num_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._num_tokens = num_tokens
        self._vocabularies: dict[frozenset[int], LLTokenizer] = {}

    def matcher(
        self,
        source: tuple[str, str],
        *,
        eos_token_ids: Iterable[int],
        stop_token_ids: Iterable[int] = (),
        owed: str = "",
    ) -> Matcher:
        """A matcher of its own for one sequence.

        Args:
            source: `Control.source`.
            eos_token_ids: The model's.
            stop_token_ids: The request's; the special tokens among them end texts as EOS does, such
                as the end of an assistant's turn.
            owed: What the text says before the grammar begins.

        Raises:
            RequestError: no tokenizer or none that fits, no EOS, or a grammar that is wrong.
        """
        name, text = source
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise RequestError(
                f"{name} needs llguidance, which is not installed; pip install 'trimode[grammar]'"
            ) from None
        if self._tokenizer is None:
            raise RequestError(f"{name} needs a tokenizer, and this checkpoint has none")
        special = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        ends = frozenset(eos_token_ids) | (special & frozenset(stop_token_ids))
        if not ends:
            raise RequestError(f"{name} needs an EOS token to end the text, and the model has none")
        if ends not in self._vocabularies:
            self._vocabularies[ends] = self._vocabulary(name, ends)
        compiled = LLMatcher(self._vocabularies[ends], _compiled(name, text, owed))
        if compiled.is_error():
            wanted = "; allowed: Lark, as in start: /[a-z]+/" if name == "grammar" else ""
            gbnf = ", and this looks like GBNF" if wanted and "::=" in text else ""
            said = _one_line(compiled.get_error())
            raise RequestError(f"{name} is not valid: {said}{wanted}{gbnf}")
        for warning in compiled.get_grammar_warnings():
            logger.warning("%s: %s", name, _one_line(warning))
        return Matcher(compiled, num_tokens=self._num_tokens, eos_token_ids=ends)

    def _vocabulary(self, name: str, ends: frozenset[int]) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        num_tokens = max(self._num_tokens, len(self._tokenizer))
        try:
            return from_tokenizer(self._tokenizer, n_vocab=num_tokens, eos_token=sorted(ends))
        except ValueError as error:
            raise RequestError(
                f"{name} cannot be used with this tokenizer: {_one_line(str(error))}"
            ) from error


def _compiled(name: str, text: str, owed: str) -> str:
    """As llguidance takes it; it is not checked yet."""
    from llguidance import LLMatcher

    if name == "grammar":
        parts = [{"lark_grammar": text}]
    elif name == "regex":
        parts = json.loads(LLMatcher.grammar_from_regex(text))["grammars"]
    else:
        try:
            schema = json.loads(text)
        except ValueError as error:
            raise RequestError(f"json_schema is not JSON: {error}") from None
        if not isinstance(schema, (dict, bool)):
            raise RequestError(f"json_schema is {text[:60]!r}; allowed: an object, true or false")
        written = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": "[ ]?"})
        parts = json.loads(written)["grammars"]
    if owed:
        whole = {"lark_grammar": f"start: {json.dumps(owed, ensure_ascii=False)} @asked"}
        parts = [whole, {**parts[0], "name": "asked"}, *parts[1:]]
    return json.dumps({"grammars": parts})


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."
