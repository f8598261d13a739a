"""`trimode infill`: fill the gaps of a text or of a file, the text behind them in view."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimode.cli.generate import add_model_arguments, forwards_line, load_model, read_prompt
from trimode.cli.text_file import diff, line_range, read_file, write_file
from trimode.errors import RequestError

if TYPE_CHECKING:
    from trimode.infill import FilledGap, Infilling

NAME = "infill"
HELP = "fill the gaps of a text or file, with what stands behind them in view"

NUM_SHOWN = 3
"""Candidates of a gap shown on stderr."""

_LINES = re.compile(r"(?P<file>.+?):(?P<ranges>\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = (
        "On stdout: the text filled in, of a file a unified diff. On stderr: the"
        " likeliest candidates of each gap. A file stays as it is without --write."
    )
    parser.add_argument(
        "what",
        nargs="?",
        metavar="TEXT|FILE[:LINES]",
        help="text with <FILL> for every gap; a file that has them; or a file with the lines to"
        " write anew, like code.py:12 or code.py:3,10-12; `-`, or none with something piped in,"
        " reads text from stdin",
    )
    parser.add_argument(
        "--lengths",
        metavar="N,N,...",
        help="numbers of tokens to try for each gap, 1 to 48 (default: fourteen from 1 to 24)",
    )
    parser.add_argument(
        "--language",
        choices=["python", "none"],
        help="prefer candidates with which the text parses (default: python for files named *.py)",
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens before a gap in view (default 192)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="X",
        help="reveal what is at least so probable, 0 to 1 (default 0.9 without --steps)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="passes over a gap at most")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float, metavar="P", help="likeliest tokens of so much")
    parser.add_argument("--top-k", type=int, metavar="K", help="the K likeliest tokens only")
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="tokens of P times the likeliest's"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="fixes the fills (default: drawn)")
    parser.add_argument(
        "--heal",
        action=argparse.BooleanOptionalAction,
        help="choose the tokens at both ends of a gap anew (default)",
    )
    parser.add_argument("--write", action="store_true", help="change the file, all or nothing")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object with all candidates and scores"
    )
    add_model_arguments(parser, default="pocket")


def run(args: argparse.Namespace) -> int:
    """Fill in; 0 if all gaps got something."""
    file, text, ranges = _source(args.what)
    if args.write and file is None:
        raise RequestError("--write changes a file, and no file was named; give FILE or FILE:LINES")
    options = _options(args, file)
    if ranges:
        from trimode.infill import MARKER, line_span

        if MARKER in text:
            number = text[: text.index(MARKER)].count("\n") + 1
            raise RequestError(
                f"{file} has {MARKER} on line {number}, which would be read as text; fill it first"
            )
        options["spans"] = [line_span(text, *lines) for lines in ranges]
        if any(second[0] <= first[1] for first, second in pairwise(ranges)):
            raise RequestError(f"{args.what!r} names lines twice or out of order")

    filled = load_model(args).infill(text, **options)
    if args.write:
        assert file is not None
        if filled.gaps[-1].candidates[0].is_valid is False:  # the whole text, no gap left
            raise RequestError(
                f"{file} would not parse with any candidate, so nothing is written; --language none"
                " writes it all the same"
            )
        write_file(file, filled.text, was=text)
    if args.json:
        print(json.dumps(_as_object(filled, file=file, is_written=args.write)))
    elif file is not None:
        for line in diff(text, filled.text, name=str(file), what="filled"):
            print(line, end="")
    else:
        from trimode.cli.watch import printable

        print((printable if sys.stdout.isatty() else str)(filled.text), end="")
        if not filled.text.endswith("\n"):
            print()
    if not args.json:
        for line in _summary(filled):
            print(line, file=sys.stderr)
        if args.write:
            print(f"-- written: {file}", file=sys.stderr)
    return 0


def _source(what: str | None) -> tuple[Path | None, str, list[tuple[int, int]]]:
    """The file that was named, the text, and the lines of it that are to be written anew."""
    from trimode.infill import MARKER

    if what is None or what == "-" or MARKER in what:
        return None, read_prompt(what), []
    match = _LINES.fullmatch(what)
    if match is not None and not os.path.exists(what):
        file = Path(match["file"])
        ranges = [line_range(word, name="LINES") for word in match["ranges"].split(",")]
        return file, read_file(file), ranges
    colon = what.rpartition(":")
    if not os.path.exists(what) and os.path.isfile(colon[0]):
        raise RequestError(f"LINES is {colon[2]!r}; allowed: A, A-B or several like 3,10-12")
    if os.path.exists(what):  # unlike Path's, False for a text too long to be a name
        text = read_file(Path(what))
        if MARKER not in text:
            raise RequestError(f"{what} has no {MARKER}; mark a gap, or name lines: {what}:12")
        return Path(what), text, []
    shown = what if len(what) <= 60 else f"{what[:57]}..."
    raise RequestError(f"{shown!r} is no file and has no {MARKER}; give either")


def _options(args: argparse.Namespace, file: Path | None) -> dict[str, Any]:
    """What was given, as `TriModeLM.infill` takes it."""
    names = (
        *("context", "threshold", "steps", "temperature", "top_p", "top_k", "min_p", "seed"),
        "heal",
    )
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.lengths is not None:
        if not re.fullmatch(r"\d+(,\d+)*", args.lengths):
            raise RequestError(f"--lengths is {args.lengths!r}; allowed: integers like 4,8,12")
        options["lengths"] = [int(word) for word in args.lengths.split(",")]
    is_python = file is not None and file.suffix in (".py", ".pyi")
    language = args.language or ("python" if is_python else "none")
    options["language"] = None if language == "none" else language
    return options


def _as_object(filled: Infilling, *, file: Path | None, is_written: bool) -> dict[str, Any]:
    return {
        "file": None if file is None else str(file),
        "is_written": is_written,
        "text": filled.text,
        "gaps": [_gap_as_object(gap) for gap in filled.gaps],
        "new_tokens": filled.stats.new_tokens,
        "forwards": {**filled.stats.forwards, "total": filled.stats.num_forwards},
        "seconds": filled.stats.seconds,
        "seed": filled.seed,
    }


def _gap_as_object(gap: FilledGap) -> dict[str, Any]:
    candidates = [{**asdict(one), "log_prob": one.log_prob} for one in gap.candidates]
    return {"start": gap.start, "text": gap.text, "candidates": candidates}


def _summary(filled: Infilling) -> list[str]:
    """The likeliest candidates of each gap, and what all cost, in lines for a reader."""
    lines = []
    for number, gap in enumerate(filled.gaps, start=1):
        lines.append(f"-- gap {number} of {len(filled.gaps)}, line {_line_of(filled, gap)}:")
        for one in gap.candidates[:NUM_SHOWN]:
            broken = ", does not parse" if one.is_valid is False else ""
            lines.append(f"--   {one.log_prob:8.2f} nats{broken}  {one.text!r}")
    stats = filled.stats
    lines.append(f"-- seed {filled.seed}: {stats.seconds:.2f} s, {forwards_line(stats)}")
    return lines


def _line_of(filled: Infilling, gap: FilledGap) -> int:
    return filled.text.count("\n", 0, gap.start) + 1
