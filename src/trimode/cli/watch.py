"""`trimode generate --watch`: the canvas filling live in the terminal.

`Canvas` turns events into coloured text and knows no terminal; `watch` shows it frame by frame.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

from trimode.cli.generate import acceptance_line, forwards_line, tokens_per_forward_line
from trimode.detokenize import GrowingText

if TYPE_CHECKING:
    from trimode.decoding import Event, Stats
    from trimode.runtime import Generation, TriModeLM

STYLES = {
    "prompt": "dim",
    "AR choice": "bold",
    "masked": "dim",
    "drafted": "yellow italic",
    "accepted": "green",
    "rejected": "red strike",
    "just revealed": "cyan reverse",
    "revealed": "cyan",
    "revised": "magenta underline",
}
"""By what became of a token. Attributes beside the colours tell most apart without colours, too."""

LEGENDS = {
    "ar": ("prompt", "AR choice"),
    "diffusion": ("masked", "just revealed", "revealed", "revised", "AR choice"),
    "linear": ("masked", "drafted", "accepted", "rejected", "AR choice"),
    "branching": ("masked", "drafted", "accepted", "rejected", "AR choice"),
    "quadratic": ("masked", "drafted", "accepted", "rejected", "AR choice"),
    "auto": ("masked", "drafted", "accepted", "rejected", "AR choice"),
}

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but newline and tab, line separators, writing direction, lone surrogates."""


def printable(text: str) -> str:
    """Text of the same length in which nothing can move the cursor or change the terminal."""
    return _UNSAFE.sub(lambda match: _stand_in(ord(match[0])), text)


def _stand_in(code: int) -> str:
    """The control picture of an ASCII control character, else the replacement character."""
    if code == 0x7F:
        return "\u2421"
    return chr(0x2400 + code) if code < 0x20 else "\ufffd"


def watch(
    lm: TriModeLM,
    prompt: str,
    *,
    options: dict[str, Any],
    mode: str,
    delay_s: float,
    console: Console | None = None,
) -> Generation:
    """Generate while showing every step; leaves the whole text, coloured, on the terminal.

    Args:
        lm: The model.
        prompt: The prompt.
        options: Further arguments of `lm.generate`.
        mode: The mode in force.
        delay_s: Pause after every frame.
        console: Where to show it; None is stdout.

    Returns:
        The result; the time spent on showing is not in its `stats.seconds`.
    """
    console = console or Console(highlight=False)
    mask = "_" if console.options.ascii_only else "░"
    is_revising = options.get("revision") is not None
    legend = [state for state in LEGENDS[mode] if state != "revised" or is_revising]
    started_s, showing_s, num_lines = time.perf_counter(), 0.0, 0

    def on_event(_: int, event: Event) -> None:
        nonlocal showing_s, num_lines
        begun_s = time.perf_counter()
        for text in canvas.frames(event):
            seconds = begun_s - started_s - showing_s
            footer = _footer(stream.stats, states=legend, mode=mode, seconds=seconds, mask=mask)
            lines = picture(text, footer, size=console.size, num_lines=num_lines)
            num_lines = len(lines)  # never fewer again, so that the footer does not jump about
            live.update(Text("\n", no_wrap=True, overflow="crop").join(lines), refresh=True)
            time.sleep(delay_s)
        showing_s += time.perf_counter() - begun_s

    stream = lm.stream(prompt, **options, on_event=on_event)
    canvas = Canvas(lm, prompt, growing=stream.growing_text(), mask=mask)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for _ in stream:
            pass
    generation = stream.generation
    assert generation is not None
    text = canvas.final(generation.text)
    console.print(text, soft_wrap=True, end="" if text.plain.endswith("\n") else "\n")
    seconds = generation.stats.seconds - showing_s
    return replace(generation, stats=replace(generation.stats, seconds=seconds))


class Canvas:
    """Prompt, continuation and the block being worked on, from the events of one sequence.

    Args:
        lm: Whose tokens they are.
        prompt: Text before the continuation.
        growing: The continuation, nothing of it pushed yet.
        mask: Shown for a masked token.
    """

    def __init__(
        self, lm: TriModeLM, prompt: str, *, growing: GrowingText, mask: str = "░"
    ) -> None:
        self._lm = lm
        self._mask = mask
        self._settled = Text().append(printable(prompt), STYLES["prompt"])
        self._prompt_len = len(prompt)
        self._growing = growing
        self._last: tuple[int, ...] = ()  # the newest emitted token
        self._block: list[tuple[int, str]] = []  # tokens after it and what became of each
        self._start = 0  # position of the first of them

    def frames(self, event: Event) -> Iterator[Text]:
        """Take an event in; yields the canvas as often as it is worth a look."""
        if event.kind == "emit":
            self._settle(event.token_ids)
            yield self.text
        elif event.kind == "revise":
            self._block[event.position - self._start] = (event.token_ids[0], "revised")
            yield self.text
        elif event.kind == "verify":
            if event.token_ids:
                self._block = _checked(event)
                yield self.text
        elif len(event.token_ids) > 1:
            if len(self._block) != len(event.token_ids) - 1:  # another block, or none yet
                self._block = [(token_id, "masked") for token_id in event.token_ids[1:]]
                self._start = event.position + 1
                yield self.text
            self._block = self._filled(event)
            yield self.text

    @property
    def text(self) -> Text:
        """Everything, the block included."""
        text = self._settled.copy()
        growing = GrowingText(self._lm.tokenizer)
        growing.push(self._last)  # context, and perhaps the first half of a character
        for token_id, state in self._block:
            if state == "masked" or token_id == self._lm.model.config.mask_token_id:
                text.append(printable(growing.rest) + self._mask, STYLES["masked"])
                growing = GrowingText(self._lm.tokenizer)
            else:
                text.append(printable(growing.push((token_id,))), STYLES[state])
        return text.append(printable(growing.rest), STYLES["masked"])

    def final(self, continuation: str) -> Text:
        """Prompt and continuation, cut where a stop string cut it."""
        text = self._settled.copy().append(printable(self._growing.rest), STYLES["AR choice"])
        return text[: self._prompt_len + len(continuation)]

    def _filled(self, event: Event) -> list[tuple[int, str]]:
        """The block after a pass over it; the first token of the event is emitted already."""
        fresh, old = (
            ("drafted", "drafted") if event.kind == "draft" else ("just revealed", "revealed")
        )
        after = {"masked": fresh, "revised": "revised"}
        was = [state for _, state in self._block]
        tokens = zip(event.token_ids[1:], event.is_masked[1:], was, strict=True)
        return [
            (token_id, "masked" if is_masked else after.get(state, old))
            for token_id, is_masked, state in tokens
        ]

    def _settle(self, token_ids: tuple[int, ...]) -> None:
        """Move emitted tokens out of the block; those it does not hold are the AR view's own."""
        states = ["revealed" if state == "just revealed" else state for _, state in self._block]
        for i, token_id in enumerate(token_ids):
            state = states[i] if i < len(states) else "AR choice"
            if state not in ("accepted", "revealed", "revised"):
                state = "AR choice"
            self._settled.append(printable(self._growing.push((token_id,))), STYLES[state])
        self._last, self._block = token_ids[-1:], []


def _checked(event: Event) -> list[tuple[int, str]]:
    """A draft with what the verifier made of it."""
    return [
        (token_id, "accepted" if i < event.num_accepted else "rejected")
        for i, token_id in enumerate(event.token_ids)
    ]


def picture(text: Text, footer: Text, *, size: tuple[int, int], num_lines: int = 0) -> list[Text]:
    """The end of `text` that fits above `footer` on a terminal, as lines.

    Args:
        text: The canvas.
        footer: Below it.
        size: Width and height of the terminal.
        num_lines: At least so many lines, where there is room.
    """
    width, height = size
    footer_lines = _fold(footer, width)[: (height - 1) // 2]
    room = max(height - len(footer_lines) - 1, 1)
    lines = _fold(text[max(len(text) - width * room, 0) :], width)[-room:]
    num_blank = min(num_lines, height - 1) - len(lines) - len(footer_lines)
    return lines + [Text()] * num_blank + footer_lines


def _fold(text: Text, width: int) -> list[Text]:
    """Lines of at most `width` cells, broken anywhere, as a terminal does."""
    text = text.copy()
    text.expand_tabs(4)
    lines: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        offsets, used = [], 0
        for i, character in enumerate(line.plain):
            size = cell_len(character)
            if used + size > width:
                offsets.append(i)
                used = 0
            used += size
        lines += line.divide(offsets)
    return lines


def _footer(stats: Stats, *, states: Iterable[str], mode: str, seconds: float, mask: str) -> Text:
    """Counts so far, and what the colours mean."""
    rate = stats.new_tokens / seconds if seconds > 0 else 0.0
    counts = [
        f"{mode}: {stats.new_tokens} tokens, {rate:.1f} tokens/s, {forwards_line(stats)}",
        tokens_per_forward_line(stats),
    ]
    if stats.acceptance_lengths:
        counts.append(acceptance_line(stats))
    footer = Text("\n" + "\n".join(counts) + "\n")
    for state in states:
        sample = f"{mask} {state}" if state == "masked" else state
        footer.append(sample, STYLES[state]).append("  ")
    return footer
