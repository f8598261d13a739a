"""`--watch`: what each token became, frames that fit, and text that cannot touch the terminal."""

from __future__ import annotations

import io
import itertools
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from tests.conftest import EOS, MASK
from trimode.cli.watch import STYLES, Canvas, picture, printable, watch
from trimode.decoding import MODES, Event, Sequence
from trimode.decoding.setting import Setting
from trimode.detokenize import GrowingText
from trimode.model import TriModeModel
from trimode.runtime import TriModeLM

M = MASK

STATES = {style: state for state, style in STYLES.items()} | {"dim": "dim"}
"""By style; the prompt and masks share theirs."""


@pytest.fixture(scope="module")
def lm(
    tiny_model: Callable[..., TriModeModel], byte_tokenizer: PreTrainedTokenizerFast
) -> TriModeLM:
    return TriModeLM(tiny_model(torch.float32), byte_tokenizer)


def states(text: Text) -> list[tuple[str, str]]:
    """Runs of characters with what became of them, as shown."""
    runs = [(text.plain[s.start : s.end], STATES[str(s.style)]) for s in text.spans]
    merged: list[tuple[str, str]] = []
    for run, state in filter(lambda run: run[0], runs):
        if merged and merged[-1][1] == state:
            run = merged.pop()[0] + run
        merged.append((run, state))
    return merged


def frames(canvas: Canvas, *events: Event) -> list[list[tuple[str, str]]]:
    return [states(text) for event in events for text in canvas.frames(event)]


class TestCanvas:
    def test_a_round_of_speculation(self, lm: TriModeLM) -> None:
        """Prevents: colours that tell another story than the round did."""
        canvas = Canvas(lm, "p", growing=GrowingText(lm.tokenizer))
        seen = frames(
            canvas,
            Event("emit", 1, (97,)),
            Event("draft", 1, (97, 98, 99, 100), is_masked=(False,) * 4),
            Event("verify", 2, (98, 99, 100), num_accepted=1),
            Event("emit", 2, (98, 120)),
        )
        start = [("p", "dim"), ("a", "AR choice")]
        assert seen == [
            start,
            [*start, ("░░░", "dim")],
            [*start, ("bcd", "drafted")],
            [*start, ("b", "accepted"), ("cd", "rejected")],
            [*start, ("b", "accepted"), ("x", "AR choice")],
        ]

    def test_a_draft_of_several_passes(self, lm: TriModeLM) -> None:
        """Prevents: masks that vanish before they are filled, and those a stop token left over."""
        canvas = Canvas(lm, "", growing=GrowingText(lm.tokenizer))
        seen = frames(
            canvas,
            Event("emit", 1, (97,)),
            Event("draft", 1, (97, M, 99, M), is_masked=(False, True, False, True)),
            Event("draft", 1, (97, 98, 99, M), is_masked=(False, False, False, True)),
            Event("verify", 2, (98, 99, M), num_accepted=2),
            Event("emit", 2, (98, 99, EOS)),
        )[1:]
        start = ("a", "AR choice")
        assert seen == [
            [start, ("░░░", "dim")],
            [start, ("░", "dim"), ("c", "drafted"), ("░", "dim")],
            [start, ("bc", "drafted"), ("░", "dim")],
            [start, ("bc", "accepted"), ("░", "dim")],
            [start, ("bc", "accepted")],
        ]

    def test_block_diffusion(self, lm: TriModeLM) -> None:
        """Prevents: not telling the newest tokens of a block from those before."""
        canvas = Canvas(lm, "", growing=GrowingText(lm.tokenizer), mask="_")
        seen = frames(
            canvas,
            Event("emit", 1, (97,)),
            Event("denoise", 1, (97, M, 99), is_masked=(False, True, False)),
            Event("denoise", 1, (97, 98, 99), is_masked=(False, False, False)),
            Event("emit", 2, (98, 99)),
            Event("emit", 4, (100,)),
        )[2:]
        start = ("a", "AR choice")
        assert seen == [
            [start, ("_", "dim"), ("c", "just revealed")],
            [start, ("b", "just revealed"), ("c", "revealed")],
            [start, ("bc", "revealed")],
            [start, ("bc", "revealed"), ("d", "AR choice")],
        ]

    def test_a_revision(self, lm: TriModeLM) -> None:
        """Prevents: a revised token that looks like any other, before or after it is emitted."""
        canvas = Canvas(lm, "", growing=GrowingText(lm.tokenizer))
        seen = frames(
            canvas,
            Event("emit", 1, (97,)),
            Event("denoise", 1, (97, 120, M, 99), is_masked=(False, False, True, False)),
            Event("revise", 2, (98,), old_ids=(120,), reason="joint_threshold"),
            Event("denoise", 1, (97, 98, 121, M), is_masked=(False, False, False, True)),
            Event("denoise", 1, (97, 98, 121, 100), is_masked=(False,) * 4),
            Event("revise", 4, (100,), old_ids=(99,), reason="remdm"),
            Event("emit", 2, (98, 121, 100)),
        )[2:]
        start = ("a", "AR choice")
        assert seen == [
            [start, ("x", "just revealed"), ("░", "dim"), ("c", "just revealed")],
            [start, ("b", "revised"), ("░", "dim"), ("c", "just revealed")],
            [start, ("b", "revised"), ("y", "just revealed"), ("░", "dim")],
            [start, ("b", "revised"), ("y", "revealed"), ("d", "just revealed")],
            [start, ("b", "revised"), ("y", "revealed"), ("d", "revised")],
            [start, ("b", "revised"), ("y", "revealed"), ("d", "revised")],
        ]

    def test_a_draft_of_nothing(self, lm: TriModeLM) -> None:
        """Prevents: an error at the last token, where there is nothing left to draft."""
        canvas = Canvas(lm, "", growing=GrowingText(lm.tokenizer))
        assert frames(canvas, Event("verify", 2, ()), Event("draft", 1, (97,), (False,))) == []

    def test_a_draft_that_another_mode_leaves_aside(self, lm: TriModeLM) -> None:
        """Prevents: an error, or the draft's end left standing, where the mode changes mid-text
        and the next block is longer."""
        seen = frames(
            Canvas(lm, "", growing=GrowingText(lm.tokenizer)),
            Event("emit", 1, (97,)),
            Event("draft", 1, (97, 98), is_masked=(False,) * 2),
            Event("denoise", 1, (97, 99, 100, M), is_masked=(False, False, False, True)),
        )[1:]
        start = ("a", "AR choice")
        assert seen == [
            [start, ("░", "dim")],
            [start, ("b", "drafted")],
            [start, ("░░░", "dim")],
            [start, ("cd", "just revealed"), ("░", "dim")],
        ]

    def test_half_characters(self, lm: TriModeLM) -> None:
        """Prevents: U+FFFD left behind, or an error, where a character is split over tokens."""
        canvas = Canvas(lm, "", growing=GrowingText(lm.tokenizer))
        first, second = "é".encode()
        waiting, masked, drafted, accepted, emitted = frames(
            canvas,
            Event("emit", 1, (first,)),
            Event("draft", 1, (first, second, 98), is_masked=(False,) * 3),
            Event("verify", 2, (second, 98), num_accepted=2),
            Event("emit", 2, (second, 98)),
        )
        assert waiting == [("\ufffd", "dim")]
        assert masked == [("\ufffd░░", "dim")]
        assert drafted == [("éb", "drafted")]
        assert accepted == emitted == [("éb", "accepted")]
        assert canvas.final("éb").plain == "éb"

    def test_final_text_is_cut_at_the_stop_string(self, lm: TriModeLM) -> None:
        """Prevents: showing at the end what is not in the text."""
        canvas = Canvas(lm, "p\x1b", growing=GrowingText(lm.tokenizer))
        frames(canvas, Event("emit", 1, tuple(b"ab\x07STOPc")))
        assert canvas.final("ab\x07").plain == "p\u241bab\u2407"
        frames(canvas, Event("emit", 1, (0xE2,)))
        assert canvas.final("ab\x07STOPc\ufffd").plain == "p\u241bab\u2407STOPc\ufffd"


class TestPicture:
    @pytest.mark.parametrize("size", [(80, 24), (20, 10), (7, 5), (2, 2), (1, 1)])
    def test_fits(self, size: tuple[int, int]) -> None:
        """Prevents: a frame higher than the terminal, which scrolls and cannot be erased."""
        text = Text("start" + "\tlong line 日本語 " * 90 + "\n\n" * 40 + "wide 😀" * 30 + "the end")
        footer = Text("\ncounts of all kinds\nlegend")
        lines = picture(text, footer, size=size, num_lines=50)
        width, height = size
        assert len(lines) <= max(height - 1, 1)
        assert all(line.cell_len <= max(width, 2) for line in lines)
        if width > 10:
            assert "the end" in "".join(line.plain for line in lines)

    def test_the_footer_stays_where_it_is(self) -> None:
        """Prevents: a footer that jumps up when a drafted newline is rejected."""
        footer = Text("\ncounts")
        many = picture(Text("a\nb\nc"), footer, size=(20, 20))
        few = picture(Text("a"), footer, size=(20, 20), num_lines=len(many))
        assert [line.plain for line in few] == ["a", "", "", "", "counts"]
        assert [line.plain for line in many] == ["a", "b", "c", "", "counts"]

    def test_printable(self) -> None:
        """Prevents: escapes in any of their spellings, and lengths that no longer match."""
        nasty = "".join(map(chr, [*range(32), *range(127, 160), 0x2028, 0x202E, 0x2066, 0xDC80]))
        shown = printable(nasty)
        assert len(shown) == len(nasty)
        assert {c for c in shown if not c.isprintable()} == {"\n", "\t"}
        assert printable("naïve 日本 😀 [red]") == "naïve 日本 😀 [red]"


class TestWatch:
    @pytest.mark.parametrize("mode", MODES)
    def test_leaves_the_whole_text(self, lm: TriModeLM, mode: str) -> None:
        """Prevents: a watched text that differs from the one generated unwatched, a mode that
        cannot be watched."""
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, width=60, height=12, color_system=None)
        options = {"mode": mode, "max_new_tokens": 30, "seed": 4, "temperature": 1.0}
        begun_s = time.perf_counter()
        generation = watch(
            lm, "[bold]p :smile:", options=options, mode=mode, delay_s=0.005, console=console
        )
        wall_s = time.perf_counter() - begun_s
        expected = lm.generate("[bold]p :smile:", **options)
        assert generation.token_ids == expected.token_ids
        assert 0 < generation.stats.seconds < wall_s - 0.005 * 5
        shown = without_codes(out.getvalue())
        assert shown.endswith(printable("[bold]p :smile:" + expected.text) + "\n")
        assert f"{mode}: {len(expected.token_ids)} tokens, " in shown
        assert f"{expected.stats.tpf_total:.2f} total" in shown

    def test_auto_changing_its_mind_every_round(
        self, tiny_model: Callable[..., TriModeModel], byte_tokenizer: PreTrainedTokenizerFast
    ) -> None:
        """Prevents: an error where modes and lengths of blocks change from round to round."""
        lm = TriModeLM(tiny_model(torch.float32), byte_tokenizer)
        options: dict[str, Any] = {"max_new_tokens": 40, "seed": 2, "ignore_eos": True}
        expected = lm.generate("abab", mode="ar", **options)
        options |= {"mode": "auto", "block_length": 8}
        lm.planner = Restless()
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, width=60, height=12)
        generation = watch(lm, "abab", options=options, mode="auto", delay_s=0, console=console)
        assert generation.token_ids == expected.token_ids
        forwards = generation.stats.forwards
        assert all(forwards[kind] for kind in ("decode", "draft", "verify"))
        assert forwards["draft"] < forwards["verify"]
        shown = without_codes(out.getvalue())
        assert shown.endswith(printable("abab" + expected.text) + "\n")

    def test_the_legend_has_what_can_happen(self, lm: TriModeLM) -> None:
        """Prevents: a colour explained that cannot occur, and one that can left unexplained."""
        for revision in (None, "joint_threshold", "ar_doubt"):
            out = io.StringIO()
            console = Console(file=out, force_terminal=True, width=80, height=12)
            options = {"mode": "diffusion", "max_new_tokens": 9, "seed": 0, "revision": revision}
            generation = watch(
                lm, "x", options=options, mode="diffusion", delay_s=0, console=console
            )
            assert generation.token_ids == lm.generate("x", **options).token_ids
            assert ("revised" in without_codes(out.getvalue())) == (revision is not None)

    def test_escapes_do_not_get_through(self, lm: TriModeLM) -> None:
        """Prevents: a prompt or a model that clears the screen or retitles the window."""
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, width=60, height=12)
        prompt = "\x1b[2J\x1b]0;title\x07\x9b31m[/red]"
        options = {"max_new_tokens": 40, "seed": 0, "temperature": 1.0, "mode": "ar"}
        watch(lm, prompt, options=options, mode="ar", delay_s=0, console=console)
        raw = out.getvalue()
        assert "\x1b[2J" not in raw.replace("\x1b[2K", "")
        assert not {"\x07", "\x9b", "\x08", "\x0b", "\x7f"} & set(raw)
        assert "\x1b" not in without_codes(raw)
        assert "\u241b[2J\u241b]0;title\u2407\ufffd31m[/red]" in raw

    def test_plain_masks_for_plain_terminals(self, lm: TriModeLM) -> None:
        """Prevents: an encoding error on a terminal that has no ░."""
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace")
        console = Console(file=file, force_terminal=True, width=60, height=12)
        options = {"max_new_tokens": 9, "mode": "diffusion", "seed": 0}
        watch(lm, "x", options=options, mode="diffusion", delay_s=0, console=console)
        file.flush()
        assert "_______" in without_codes(raw.getvalue().decode("ascii"))

    @pytest.mark.process
    def test_in_a_terminal(self, tiny_checkpoint: Callable[..., Path]) -> None:
        """Prevents: no picture in a real terminal, colours despite NO_COLOR, a hidden cursor."""
        folder = tiny_checkpoint()
        command = "generate --watch --watch-delay 0 --seed 1 --max-new-tokens 16 --mode linear"
        command += f" --model {folder}"
        shown = in_terminal([*command.split(), "def "])
        assert "\x1b[?25l" in shown
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
        assert "░░░░░░░" in without_codes(shown)
        assert re.search(r"\x1b\[[0-9;]*3[1236]", shown)
        plain = in_terminal([*command.split(), "def "], NO_COLOR="1")
        assert "░░░░░░░" in without_codes(plain)
        assert not re.search(r"\x1b\[([0-9]*;)*(3[0-7]|38|9[0-7])[;m]", plain)


class Restless:
    """A planner that picks another setting for every round."""

    def __init__(self) -> None:
        branching = (Setting("branching", length, 3, True) for length in (8, 3))
        self._settings = itertools.cycle(
            [*branching, Setting("linear", 5), Setting("ar", 8), Setting("linear", 2)]
        )

    def choose(self, seq: Sequence) -> Setting:
        return next(self._settings)

    def note_forward(self, fed: Any, num_tokens: int, *, drafts: bool) -> None:
        pass

    def note_seconds(self, seconds: float) -> None:
        pass


def without_codes(raw: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", raw)


def in_terminal(arguments: list[str], **environment: str) -> str:
    """What `trimode` writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "trimode", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env={
            **{k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")},
            "TERM": "xterm",
            "COLUMNS": "80",
            "LINES": "20",
            "PYTHONIOENCODING": "utf-8",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )
    os.close(theirs)
    raw = b""
    while select.select([ours], [], [], 60)[0]:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        raw += piece
    assert process.wait() == 0
    os.close(ours)
    return raw.decode()
