"""What a request may ask of single tokens: bias, penalties, log-probabilities, a thinking budget, a
grammar. Checked once; `trimode.decoding.law` applies it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from trimode.errors import RequestError

MAX_BIAS = 1e5
PENALTY_RANGE = (0.01, 100.0)
MAX_COUNT_PENALTY = 2.0

END_OF_THOUGHT = "</think>"

GRAMMAR_KINDS = ("json_schema", "regex", "grammar")


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """What single tokens are subject to.

    Attributes:
        logit_bias: Token id -> what is added to its logit, before the temperature. All modes.
        repetition_penalty: Scores of tokens that the prompt or the text already has are divided by
            it where positive, else multiplied, after the bias; 1 changes nothing. In `diffusion`
            such tokens are those before the block, and those of the block that are already
            revealed, on either side.
        frequency_penalty: Times the number of occurrences of a token in the new text, it is taken
            from the token's logit, after the repetition penalty, -2 to 2; 0 changes nothing. The
            prompt does not count. In `diffusion` the new text is that before the block, and what of
            the block is already revealed, on either side.
        presence_penalty: It is taken from the logits of all tokens that the new text has, -2 to 2;
            0 changes nothing.
        logprobs: For every emitted token, its log-probability and those of so many of the likeliest
            tokens, under the AR view at temperature 1 after the ban, before all else; None for
            none. Not in `diffusion`.
        max_thinking_tokens: Once so many tokens were emitted without `end_think_token_id` among
            them, the next is that one; None for no such budget. What the prompt holds does not
            count. In `diffusion` the token stands in its block from the start, and nowhere before
            it in that block.
        end_think_token_id: See there; None means the tokenizer's `</think>`.
        json_schema: The text is JSON of this schema, then EOS. Between its parts stands at most one
            space, or else a model may write white space for ever; the schema's own `x-guidance`
            (llguidance's) can say otherwise.
        regex: The text matches all of this regular expression (Rust's syntax), then EOS.
        grammar: The text is of this Lark grammar (llguidance's dialect), then EOS. At most one of
            the three; not in `diffusion`.

    Raises:
        RequestError: naming the argument, its value and what is allowed.
    """

    logit_bias: Mapping[int, float] | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None
    max_thinking_tokens: int | None = None
    end_think_token_id: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping):
            _refuse("logit_bias", bias, "None, or token ids with the number to add to each")
        for token_id, value in bias.items():
            if not _is_count(token_id):
                _refuse("logit_bias", {token_id: value}, "token ids with the number to add to each")
            if not _is_number(value) or not abs(value) <= MAX_BIAS:
                allowed = f"{-MAX_BIAS:g} to {MAX_BIAS:g} for each token"
                _refuse("logit_bias", {token_id: value}, allowed)
        low, high = PENALTY_RANGE
        if not _is_number(self.repetition_penalty) or not low <= self.repetition_penalty <= high:
            _refuse("repetition_penalty", self.repetition_penalty, f"{low:g} to {high:g}")
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            if not _is_number(value) or not abs(value) <= MAX_COUNT_PENALTY:
                _refuse(name, value, f"{-MAX_COUNT_PENALTY:g} to {MAX_COUNT_PENALTY:g}")
        for name in ("logprobs", "max_thinking_tokens", "end_think_token_id"):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                _refuse(name, value, "None, or an integer of at least 0")
        if self.end_think_token_id is not None and self.max_thinking_tokens is None:
            _refuse("end_think_token_id", self.end_think_token_id, "None without a budget")
        self._check_grammar()

    def _check_grammar(self) -> None:
        given = [name for name in GRAMMAR_KINDS if getattr(self, name) is not None]
        for name in given:
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                _refuse(name, value, "None, or a non-empty string")
            if not is_unicode(value):
                _refuse(name, value, "valid Unicode, without half characters")
        if len(given) > 1:
            raise RequestError(f"{' and '.join(given)} are given; allowed: at most one of them")
        if given and self.max_thinking_tokens is not None:
            allowed = f"None with {given[0]}, which is for all of the text"
            _refuse("max_thinking_tokens", self.max_thinking_tokens, allowed)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Control:
        """From arguments of `generate`; a schema may be given as what its JSON stands for."""
        given = dict(options)
        schema = given.get("json_schema")
        if schema is not None and not isinstance(schema, str):
            if not isinstance(schema, (Mapping, bool)):
                _refuse("json_schema", schema, "None, a JSON schema as text, or as a mapping")
            try:
                given["json_schema"] = json.dumps(schema)
            except (TypeError, ValueError) as error:
                raise RequestError(f"json_schema cannot be written as JSON: {error}") from None
        return cls(**given)

    @property
    def source(self) -> tuple[str, str] | None:
        """Which of `GRAMMAR_KINDS` is given, and its text; None without a grammar."""
        for name in GRAMMAR_KINDS:
            if (value := getattr(self, name)) is not None:
                return name, value
        return None

    @property
    def changes_laws(self) -> bool:
        """Whether any answer may differ from what it would be without."""
        return bool(
            self.logit_bias
            or self.repetition_penalty != 1
            or self.frequency_penalty
            or self.presence_penalty
            or self.max_thinking_tokens is not None
            or self.source
        )

    def check_mode(self, mode: str, *, ignore_eos: bool) -> None:
        """Refuse what `mode` does not do.

        Raises:
            RequestError: naming it.
        """
        source = self.source
        if mode == "diffusion":
            if self.logprobs is not None:
                allowed = "None in mode 'diffusion', whose tokens are not chosen by the AR view"
                _refuse("logprobs", self.logprobs, allowed)
            if source:
                allowed = "None in mode 'diffusion', which does not write from left to right"
                _refuse(*source, allowed)
        if source and ignore_eos:
            _refuse(*source, "None with ignore_eos, since EOS ends such a text")

    def settled(self, *, tokenizer: Any, num_tokens: int, banned: Collection[int]) -> Control:
        """With the tokenizer's end of thought filled in, and all ids checked.

        Args:
            tokenizer: Of the model, or None.
            num_tokens: Size of the vocabulary, padded rows included.
            banned: Ids that are never chosen.

        Raises:
            RequestError: an id cannot be chosen, or no token ends thoughts.
        """
        for token_id in self.logit_bias or ():
            if token_id >= num_tokens or token_id in banned:
                _refuse("a token of logit_bias", token_id, _choosable(num_tokens))
        if self.logprobs is not None and self.logprobs > num_tokens - len(banned):
            allowed = f"0 to {num_tokens - len(banned)}, the tokens that can be chosen"
            _refuse("logprobs", self.logprobs, allowed)
        if self.max_thinking_tokens is None:
            return self
        end = self.end_think_token_id
        if end is None:
            end = _end_of_thought(tokenizer)
        if end >= num_tokens or end in banned:
            _refuse("end_think_token_id", end, _choosable(num_tokens))
        return replace(self, end_think_token_id=end)


CONTROL_NAMES = tuple(field.name for field in fields(Control))


def _end_of_thought(tokenizer: Any) -> int:
    ids: list[int] = []
    if tokenizer is not None:
        ids = tokenizer(END_OF_THOUGHT, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise RequestError(
            f"end_think_token_id is None; give an id, since no single token of this model is"
            f" {END_OF_THOUGHT}"
        )
    return ids[0]


def is_unicode(text: str) -> bool:
    """Whether a string can be encoded: it holds no half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _choosable(num_tokens: int) -> str:
    return f"0 to {num_tokens - 1} without the mask token and padded rows"


def _refuse(name: str, value: Any, allowed: str) -> None:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise RequestError(f"{name} is {shown}; allowed: {allowed}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
