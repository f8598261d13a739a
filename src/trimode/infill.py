"""A text with its gaps filled: where they are, what the model sees of each, the result as text."""

from __future__ import annotations

import ast
import re
import secrets
import warnings
from collections.abc import Collection, Generator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from operator import index
from typing import Any, Protocol

from trimode.arguments import as_tuple, check_unicode, plain
from trimode.decoding import GenerationParams, Sequence, Stats
from trimode.decoding.bits import token_set
from trimode.decoding.gap import Edges, Gap
from trimode.detokenize import GrowingText, text_before
from trimode.engine import Engine
from trimode.errors import RequestError
from trimode.heal import EncodedPrompt
from trimode.model import TriModeModel
from trimode.model.adapter import AdapterForm
from trimode.prompts import encode_prompt
from trimode.revision import character_range
from trimode.vocabulary import Vocabulary

MARKER = "<FILL>"

DEFAULT_LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24)

DEFAULT_CONTEXT = 192
"""Tokens before a gap that are in view; the default model was trained on rows of 256 and fills a
gap behind 2,000 tokens with noise."""

MAX_LENGTH = 48
"""Longest fill, in tokens: a canvas holds the text behind it as well."""

LANGUAGES = ("python",)


class LanguageModel(Protocol):
    """What infilling needs of a `TriModeLM`."""

    model: TriModeModel
    vocabulary: Vocabulary | None

    @property
    def form(self) -> AdapterForm: ...

    def engine(self, sequences: Items[Sequence]) -> Engine: ...


@dataclass(frozen=True, slots=True)
class Fill:
    """One candidate for a gap.

    Attributes:
        text: What would stand in the gap.
        token_ids: The same as the model wrote it; its ends may hold some of the text around.
        fill_log_prob: Of the fill after the text before it, AR view, temperature 1, in nats.
        suffix_log_prob: Of the tokens behind the gap (at most 32) after both; a mask token there
            does not count, since none is ever likely.
        is_valid: Whether the whole text is valid with it; None if no language was given.
    """

    text: str
    token_ids: tuple[int, ...]
    fill_log_prob: float
    suffix_log_prob: float
    is_valid: bool | None

    @property
    def log_prob(self) -> float:
        """Of fill and text behind it together, which candidates are ranked by."""
        return self.fill_log_prob + self.suffix_log_prob


@dataclass(frozen=True, slots=True)
class FilledGap:
    """One gap of a text.

    Attributes:
        start: Where the fill begins in the filled text, in characters.
        candidates: The best first; the first is in the text. Those of space alone come last, and
            those that are no text: half a character at an end, or a special token.
    """

    start: int
    candidates: tuple[Fill, ...]

    @property
    def text(self) -> str:
        """What was put in."""
        return self.candidates[0].text


@dataclass(frozen=True, slots=True)
class Infilling:
    """A text with its gaps filled.

    Attributes:
        text: All of it.
        gaps: In the order of the text.
        seed: The seed that reproduces it.
        stats: What it cost; `new_tokens` are those of the fills, with the ones that also say how
            the text around a gap ends and begins.
    """

    text: str
    gaps: tuple[FilledGap, ...]
    seed: int
    stats: Stats = field(default_factory=Stats)


def infill_text(lm: LanguageModel, text: str, **options: Any) -> Infilling:
    """Fill the gaps of a text, from left to right; see `trimode.decoding.infilling`.

    A gap is filled with the nearest text before it and behind it in view: `context` tokens before,
    63 less the fill's behind, but 32 at least, and none beyond the next gap. In a text whose lines
    all end in CRLF, so do those of a fill.

    Args:
        lm: The model with its tokenizer.
        text: With `<FILL>` for every gap, unless `spans` are given.
        options: See `infill_steps`.

    Raises:
        RequestError: an argument is not valid, or there is no gap.
    """
    filling = infill_steps(lm, text, **options)
    while True:
        try:
            seq = next(filling)
        except StopIteration as end:
            found = end.value
            assert isinstance(found, Infilling)
            return found
        lm.engine([seq]).run()
        if seq.finish_reason == "abort":
            raise RequestError("the network gave non-finite numbers; nothing was filled in")


def infill_steps(
    lm: LanguageModel,
    text: str,
    *,
    spans: Items[tuple[int, int]] | None = None,
    lengths: Items[int] | None = None,
    language: str | None = None,
    context: int | None = None,
    threshold: float | None = None,
    steps: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = None,
    heal: bool = True,
) -> Generator[Sequence, None, Infilling]:
    """`infill_text` for one who runs the engine: yields a sequence for each gap, and goes on when
    that one has finished.

    Args:
        lm: The model with its tokenizer.
        text: With `<FILL>` for every gap, unless `spans` are given.
        spans: Start and end of every gap in characters; what stands there is replaced.
        lengths: Numbers of tokens that are tried for each gap, 1 to 48, without those that say
            how the text around the gap ends and begins.
        language: `python`: of the candidates with which the text parses, if there are any, the
            likeliest; None: the likeliest of all.
        context: Tokens of the text before a gap that are in view; None means 192.
        threshold, steps, temperature, top_k, top_p, min_p: As in block diffusion
            (`GenerationParams`); steps are spread over each length of its own.
        seed: Fixes the fills; None draws one.
        heal: Whether the tokens at both ends of a gap may be chosen anew.

    Raises:
        RequestError: as `infill_text`.
    """
    if lm.vocabulary is None:
        raise RequestError("infilling text needs a tokenizer, and this checkpoint has none")
    if not isinstance(text, str):
        raise RequestError(f"text is a {type(text).__name__}; allowed: a string")
    check_unicode("text", text)
    if language is not None and language not in LANGUAGES:
        raise RequestError(f"language is {language!r}; allowed: None, {', '.join(LANGUAGES)}")
    if not isinstance(heal, bool):
        raise RequestError(f"heal is {heal!r}; allowed: True or False")
    lengths = _checked_lengths(DEFAULT_LENGTHS if lengths is None else lengths)
    spans = _markers(text) if spans is None else _checked_spans(text, spans)
    seed = secrets.randbits(32) if seed is None else plain(seed)
    longest, steps, context = max(lengths), plain(steps), plain(context)
    if steps is not None and not (type(steps) is int and 1 <= steps <= longest):
        raise RequestError(
            f"steps is {steps!r}; allowed: None, or 1 to {longest}, the longest fill"
        )
    if context is not None and not (type(context) is int and context >= 1):
        raise RequestError(f"context is {context!r}; allowed: None, or an integer of at least 1")
    params = GenerationParams(
        mode="diffusion",
        max_new_tokens=longest + 2,
        block_length=longest + 3,
        threshold=plain(threshold),
        steps=steps,
        temperature=plain(temperature),
        top_k=plain(top_k),
        top_p=plain(top_p),
        min_p=plain(min_p),
        seed=seed,
    )
    has_crlf = "\r\n" in text and "\n" not in text.replace("\r\n", "")
    stats = Stats()
    gaps: list[FilledGap] = []
    done, reached = "", 0
    for number, (start, stop) in enumerate(spans):
        done += text[reached:start]
        reached = stop
        pieces = _between(text, spans[number:])
        later = "None".join(pieces)  # an expression and a statement
        behind = next((piece for piece in pieces if piece), "")
        edge = _edge(lm, done, behind, lengths, heal=heal)
        yield (seq := _sequence(lm, edge, context=context or DEFAULT_CONTEXT, params=params))
        candidates = _ranked(lm, seq, edge, done, later, language=language, has_crlf=has_crlf)
        gaps.append(FilledGap(len(done), candidates))
        done += candidates[0].text
        _add(stats, seq.stats, new_tokens=len(candidates[0].token_ids))
    return Infilling(done + text[reached:], tuple(gaps), seed, stats)


def line_span(text: str, first: int, last: int) -> tuple[int, int]:
    """Start and end of the lines `first` to `last`, from 1, in characters, as a gap.

    The indentation of the first line and the end of the last stay. If all of them are blank, the
    fill brings its own indentation.

    Raises:
        RequestError: There are no such lines.
    """
    start, stop = character_range(text, (first, last))
    stop = start + len(text[start:stop].rstrip("\r\n"))
    content = text[start:stop].lstrip(" \t")
    return (stop - len(content) if content.strip() else start), stop


@dataclass(frozen=True, slots=True)
class _Edge:
    """What the model sees of the text around a gap, and what of it a fill has to say.

    Attributes:
        prompt: Before the gap.
        suffix_ids: Behind it.
        head: Bytes between the gap and these.
        lengths: In tokens, with one more for each end that says what stands around the gap.
        edges: What a fill's ends may be.
    """

    prompt: EncodedPrompt
    suffix_ids: tuple[int, ...]
    head: bytes
    lengths: tuple[int, ...]
    edges: Edges


def _edge(
    lm: LanguageModel, before: str, behind: str, lengths: tuple[int, ...], *, heal: bool = True
) -> _Edge:
    """The gap's ends healed: a fill's first token covers what was taken back before the gap, its
    last one the beginning of what stands behind it. Each is one more than was asked for."""
    assert lm.vocabulary is not None
    prompt = encode_prompt(lm.vocabulary, lm.model.config, before, heal=heal)
    if heal:
        head, suffix_ids = _head(lm.vocabulary, behind)
    else:
        head, suffix_ids = b"", tuple(lm.vocabulary.encode(behind))
    tokens, num_tokens = lm.vocabulary.token_bytes, lm.model.config.vocab_size
    owed = prompt.healed_bytes
    text = token_set(tokens.beginning(b""), num_tokens) if tokens.longest else None
    edges = Edges(
        first=token_set(tokens.beginning(owed), num_tokens) if owed else text,
        last=token_set(tokens.ending(head), num_tokens) if head else text,
        inner=text,
    )
    lengths = tuple(length + bool(head) + bool(owed) for length in lengths)
    return _Edge(prompt, suffix_ids, head, lengths, edges)


def _head(vocabulary: Vocabulary, behind: str) -> tuple[bytes, tuple[int, ...]]:
    """The bytes at the beginning of a text that belong to a token which begins before it, if it
    goes on inside of a word or of an indentation; and the tokens of the rest."""
    probe = "\n" if behind.startswith(("  ", "\t")) else "x"
    ids = vocabulary.encode(probe + behind)
    num_own = len(vocabulary.bytes_of(ids)) - len((probe + behind).encode())
    for number in range(1, len(ids)) if num_own in (0, 1) else ():  # sentencepiece's space
        said = vocabulary.bytes_of(ids[:number])[num_own:]
        if len(said) >= len(probe):
            head = said[len(probe) :]
            if not (head and vocabulary.token_bytes.ending(head)):
                break
            return head, tuple(ids[number:])
    return b"", tuple(vocabulary.encode(behind))


def _sequence(
    lm: LanguageModel, edge: _Edge, *, context: int, params: GenerationParams
) -> Sequence:
    """What the model sees of one gap."""
    eos_token_ids = lm.model.config.eos_token_ids
    # With nothing behind it, any length would do; so the text's end is the document's.
    suffix_ids = edge.suffix_ids or (() if edge.head else tuple(eos_token_ids[:1]))
    gap = Gap(suffix_ids, edge.lengths, edge.edges)
    room = lm.model.config.max_position_embeddings - max(
        1 + length + len(gap.suffix_in_view(length)) for length in edge.lengths
    )
    if room < 1:
        raise RequestError(
            f"lengths has {max(edge.lengths)}, its ends included, too long for the context of "
            f"{lm.model.config.max_position_embeddings} beside the text behind the gap"
        )
    return Sequence(
        edge.prompt.token_ids[-min(room, context) :],
        params,
        mask_token_id=lm.model.config.mask_token_id,
        form=lm.form,
        gap=gap,
    )


def _ranked(
    lm: LanguageModel,
    seq: Sequence,
    edge: _Edge,
    before: str,
    later: str,
    *,
    language: str | None,
    has_crlf: bool,
) -> tuple[Fill, ...]:
    """All candidates as text, the best first."""
    assert seq.gap is not None
    assert lm.vocabulary is not None
    fills = []
    for one in seq.gap.candidates:
        text = _between_edges(lm.vocabulary, edge, one.token_ids)
        if has_crlf:
            text = re.sub(r"(?<!\r)\n", "\r\n", text)
        is_valid = None if language is None else _parses(before + text + later)
        fills.append(Fill(text, one.token_ids, one.fill_log_prob, one.suffix_log_prob, is_valid))
    best = dict[str, Fill]()  # of each text, since others may write it in other tokens
    for fill in fills:
        best.setdefault(fill.text, fill)
    fills = [*best.values()]
    special = lm.vocabulary.control_ids
    no_text = [not one.text.strip() or not _is_text(one, special) for one in fills]
    ranked = sorted(range(len(fills)), key=lambda i: (no_text[i], fills[i].is_valid is False))
    return tuple(fills[i] for i in ranked)


def _between_edges(vocabulary: Vocabulary, edge: _Edge, token_ids: Items[int]) -> str:
    """A fill without what its ends say of the text around it."""
    if not (edge.head or edge.prompt.healed_bytes):
        before = text_before(vocabulary, edge.prompt.token_ids)
        return GrowingText(vocabulary.tokenizer, before).whole(token_ids)
    octets = vocabulary.bytes_of(token_ids)
    inside = octets[len(edge.prompt.healed_bytes) : len(octets) - len(edge.head)]
    return inside.decode(errors="replace")


def _is_text(fill: Fill, special: Collection[int]) -> bool:
    """Whether it says just what its tokens do: no half characters, no special tokens."""
    return "\ufffd" not in fill.text and not any(i in special for i in fill.token_ids)


def _parses(source: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SyntaxWarning of the text, not ours
        try:
            ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def _between(text: str, spans: Items[tuple[int, int]]) -> list[str]:
    """The pieces of text behind each of the gaps."""
    starts = [start for start, _ in spans[1:]] + [len(text)]
    return [text[stop:start] for (_, stop), start in zip(spans, starts, strict=True)]


def _markers(text: str) -> list[tuple[int, int]]:
    spans, start = [], text.find(MARKER)
    while start >= 0:
        spans.append((start, start + len(MARKER)))
        start = text.find(MARKER, start + len(MARKER))
    if not spans:
        raise RequestError(f"the text has no gap; mark each with {MARKER}")
    return spans


def _checked_spans(text: str, spans: Items[tuple[int, int]]) -> list[tuple[int, int]]:
    try:
        found, reached = [(index(start), index(stop)) for start, stop in spans], 0
    except (TypeError, ValueError):
        raise RequestError(
            f"spans is {spans!r}; allowed: pairs of integers, start and end of every gap"
        ) from None
    if not found:
        raise RequestError("spans is empty; give start and end of at least one gap")
    for start, stop in found:
        if not reached <= start <= stop <= len(text):
            raise RequestError(
                f"spans has {start}-{stop}; allowed: in order, apart, within 0-{len(text)}"
            )
        reached = stop
    return found


def _checked_lengths(lengths: Items[int]) -> tuple[int, ...]:
    found = tuple(dict.fromkeys(as_tuple("lengths", lengths)))
    wrong = [n for n in found if type(n) is not int or not 1 <= n <= MAX_LENGTH]
    if wrong or not found:
        raise RequestError(f"lengths is {list(lengths)}; allowed: integers from 1 to {MAX_LENGTH}")
    return found


def _add(total: Stats, part: Stats, *, new_tokens: int) -> None:
    for kind, number in part.forwards.items():
        total.forwards[kind] += number
        total.tokens_fed[kind] += part.tokens_fed[kind]
    total.new_tokens += new_tokens
    total.seconds += part.seconds
