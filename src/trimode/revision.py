"""A text with its doubtful tokens replaced: where tokens lie in it, what may change, the result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import index

from transformers import PreTrainedTokenizerBase

from trimode.arguments import plain
from trimode.decoding.editing import revise
from trimode.errors import RequestError
from trimode.model import DrafterAdapter, TriModeModel

DEFAULT_BUDGET = 4
DEFAULT_MIN_GAIN = 16.0
"""On the default model a tenth of clean prompts get an edit at this, most of them at half of it
(benchmarks/bench_revise.py)."""


@dataclass(frozen=True, slots=True)
class Edit:
    """One token replaced by another.

    Attributes:
        start: Place of `old` in the text that was given, in characters.
        line: The same in lines, from 1.
        old, new: Text of the tokens.
        log_prob: Of the old token under the AR view, in nats, when it was doubted.
        gain: Nats by which the token and those after it became likelier.
    """

    start: int
    line: int
    old: str
    new: str
    log_prob: float
    gain: float


@dataclass(frozen=True, slots=True)
class Revision:
    """A text after its edits.

    Attributes:
        text: All of it, also what was not looked at.
        edits: In the order of the text.
    """

    text: str
    edits: tuple[Edit, ...]


def revise_text(
    model: TriModeModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: str,
    *,
    adapter: DrafterAdapter | None = None,
    lines: tuple[int, int] | None = None,
    budget: int = DEFAULT_BUDGET,
    min_gain: float = DEFAULT_MIN_GAIN,
) -> Revision:
    """Replace at most `budget` unlikely tokens of a text; see `trimode.decoding.editing`.

    Args:
        model, tokenizer: The model's.
        text: With at most as many tokens as the context holds.
        adapter: The model's, on where it proposes if it serves that.
        lines: First and last line that may change, from 1; None for all. The rest is read only.
        budget: At most so many tokens.
        min_gain: Nats that each must bring. Low values rewrite what is merely unusual.

    Raises:
        RequestError: an argument is not valid, or the text does not fit.
    """
    if tokenizer is None:
        raise RequestError("revising text needs a tokenizer, and this checkpoint has none")
    if not isinstance(text, str):
        raise RequestError(f"text is a {type(text).__name__}; allowed: a string")
    budget, min_gain = plain(budget), plain(min_gain)
    is_int = isinstance(budget, int) and not isinstance(budget, bool)
    if not is_int or budget < 1:
        raise RequestError(f"budget is {budget!r}; allowed: an integer of at least 1")
    is_number = isinstance(min_gain, (int, float)) and not isinstance(min_gain, bool)
    if not is_number or not 0 <= min_gain < math.inf:
        raise RequestError(f"min_gain is {min_gain!r}; allowed: a number of at least 0")
    first_char, last_char = character_range(text, lines)
    prefix = [] if model.config.bos_token_id is None else [model.config.bos_token_id]
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    context = model.config.max_position_embeddings
    if len(prefix) + len(ids) > context:
        raise RequestError(
            f"the text has {len(prefix) + len(ids)} tokens, beyond the context of {context}; give "
            "a shorter one"
        )
    spans = _spans(tokenizer, ids, text)
    editable = {
        len(prefix) + i
        for i, span in enumerate(spans)
        if span is not None
        and first_char <= span[0]
        and span[1] <= last_char
        and "\r" not in text[slice(*span)]  # half of a line's end
    }

    def text_of(token_id: int) -> str:
        return tokenizer.decode([token_id], clean_up_tokenization_spaces=False)

    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    made = revise(
        model,
        prefix + ids,
        editable=editable,
        budget=budget,
        block_length=model.config.block_size,
        adapter=adapter,
        min_gain=min_gain,
        banned=special.union(model.config.banned_token_ids),
        # No half characters, and no half line ends.
        is_text=lambda token_id: not {"\ufffd", "\r"} & set(text_of(token_id)),
    )
    edits = []
    for one in sorted(made, key=lambda one: one.index):
        span = spans[one.index - len(prefix)]
        assert span is not None
        line, new = text.count("\n", 0, span[0]) + 1, text_of(one.new_id)
        edits.append(Edit(span[0], line, text[slice(*span)], new, one.log_prob, one.gain))
    parts, reached = [], 0
    for edit in edits:
        parts += [text[reached : edit.start], edit.new]
        reached = edit.start + len(edit.old)
    return Revision("".join([*parts, text[reached:]]), tuple(edits))


def character_range(text: str, lines: tuple[int, int] | None) -> tuple[int, int]:
    """Start and end of the lines `first` to `last`, from 1, in characters; None is all of them.

    Raises:
        RequestError: There are no such lines.
    """
    if lines is None:
        return 0, len(text)
    starts = [0, *(i + 1 for i, sign in enumerate(text) if sign == "\n"), len(text)]
    num_lines = text.count("\n") + (not text.endswith("\n"))  # as editors count them
    try:
        first, last = map(index, lines)
    except (TypeError, ValueError):
        raise RequestError(f"lines is {lines!r}; allowed: None, or first and last line") from None
    if not 1 <= first <= last <= num_lines:
        raise RequestError(
            f"lines is {first}-{last}; allowed: a range within 1-{num_lines}, the text's lines"
        )
    return starts[first - 1], starts[last]


def _spans(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str
) -> list[tuple[int, int] | None]:
    """Start and end of every token in the text; None for parts of a character.

    Raises:
        RequestError: The tokens do not say the text, as with tokenizers that change it.
    """
    spans: list[tuple[int, int] | None] = []
    reached = 0
    pending: list[int] = []  # tokens of a character that is not whole yet
    for token_id in ids:
        pending.append(token_id)
        piece = tokenizer.decode(pending, clean_up_tokenization_spaces=False)
        is_whole = text.startswith(piece, reached)
        if not is_whole:
            spans.append(None)
            continue
        is_alone = len(pending) == 1
        spans.append((reached, reached + len(piece)) if is_alone else None)
        reached += len(piece)
        pending = []
    if reached != len(text):
        raise RequestError(
            "the model's tokenizer does not give this text back; it cannot be revised"
        )
    return spans
