"""A text with its doubtful tokens replaced: where tokens lie in it, what may change, the result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import index

from trimode.arguments import check_unicode, plain
from trimode.decoding.editing import revise
from trimode.errors import RequestError
from trimode.model import DrafterAdapter, TriModeModel
from trimode.vocabulary import Vocabulary

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
    vocabulary: Vocabulary | None,
    text: str,
    *,
    adapter: DrafterAdapter | None = None,
    lines: tuple[int, int] | None = None,
    budget: int = DEFAULT_BUDGET,
    min_gain: float = DEFAULT_MIN_GAIN,
) -> Revision:
    """Replace at most `budget` unlikely tokens of a text; see `trimode.decoding.editing`.

    Args:
        model, vocabulary: The model's.
        text: With at most as many tokens as the context holds; control tokens that it spells are
            text.
        adapter: The model's, on where it proposes if it serves that.
        lines: First and last line that may change, from 1; None for all. The rest is read only.
        budget: At most so many tokens.
        min_gain: Nats that each must bring. Low values rewrite what is merely unusual.

    Raises:
        RequestError: an argument is not valid, or the text does not fit.
    """
    if vocabulary is None:
        raise RequestError("revising text needs a tokenizer, and this checkpoint has none")
    if not isinstance(text, str):
        raise RequestError(f"text is a {type(text).__name__}; allowed: a string")
    check_unicode("text", text)
    budget, min_gain = plain(budget), plain(min_gain)
    is_int = isinstance(budget, int) and not isinstance(budget, bool)
    if not is_int or budget < 1:
        raise RequestError(f"budget is {budget!r}; allowed: an integer of at least 1")
    is_number = isinstance(min_gain, (int, float)) and not isinstance(min_gain, bool)
    if not is_number or not 0 <= min_gain < math.inf:
        raise RequestError(f"min_gain is {min_gain!r}; allowed: a number of at least 0")
    first_char, last_char = character_range(text, lines)
    prefix = [] if model.config.bos_token_id is None else [model.config.bos_token_id]
    ids = vocabulary.encode(text)
    context = model.config.max_position_embeddings
    if len(prefix) + len(ids) > context:
        raise RequestError(
            f"the text has {len(prefix) + len(ids)} tokens, beyond the context of {context}; give "
            "a shorter one"
        )
    spans, has_own_space = _spans(vocabulary, ids, text)
    editable = {
        len(prefix) + i
        for i, span in enumerate(spans)
        if span is not None
        and first_char <= span[0]
        and span[1] <= last_char
        and "\r" not in text[slice(*span)]  # half of a line's end
        and not (span[1] == len(text) and text.endswith("\n"))  # the file's last line break
    }

    def text_of(token_id: int) -> str:
        return vocabulary.shown(token_id)[0]

    made = revise(
        model,
        prefix + ids,
        editable=editable,
        budget=budget,
        block_length=model.config.block_size,
        adapter=adapter,
        min_gain=min_gain,
        banned=vocabulary.control_ids.union(model.config.banned_token_ids),
        # No half characters, and no half line ends.
        is_text=lambda token_id: not {"\ufffd", "\r"} & set(text_of(token_id)),
    )
    edits = []
    for one in sorted(made, key=lambda one: one.index):
        span = spans[one.index - len(prefix)]
        assert span is not None
        line, new = text.count("\n", 0, span[0]) + 1, text_of(one.new_id)
        if has_own_space and one.index == len(prefix):
            new = new.removeprefix(" ")
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
    vocabulary: Vocabulary, ids: list[int], text: str
) -> tuple[list[tuple[int, int] | None], bool]:
    """Start and end of every token in the text, None for parts of a character; and whether the
    first begins with a space that is the tokenizer's own.

    Raises:
        RequestError: The tokens do not say the text, as with tokenizers that change it.
    """
    octets, said = text.encode(), vocabulary.bytes_of(ids)
    has_own_space = said == b" " + octets
    if not has_own_space and said != octets:
        raise RequestError(
            "the model's tokenizer does not give this text back; it cannot be revised"
        )
    char_at: dict[int, int] = {0: 0}  # where characters begin, in bytes -> in characters
    num_bytes = 0
    for number, sign in enumerate(text, start=1):
        num_bytes += len(sign.encode())
        char_at[num_bytes] = number
    spans: list[tuple[int, int] | None] = []
    stop = -int(has_own_space)
    for token_id in ids:
        start, stop = max(stop, 0), stop + len(vocabulary.bytes_of([token_id]))
        is_whole = start < stop and start in char_at and stop in char_at
        spans.append((char_at[start], char_at[stop]) if is_whole else None)
    return spans, has_own_space
