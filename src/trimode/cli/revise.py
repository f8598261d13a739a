"""`trimode revise`: show, and on request make, replacements of a file's least likely tokens."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from trimode.cli.generate import add_model_arguments, load_model
from trimode.cli.text_file import diff, line_range, read_file, write_file

NAME = "revise"
HELP = "replace a file's least likely tokens; shows a diff, writes on request"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = (
        "On stdout: a unified diff, nothing if nothing is to be replaced; on stderr: each token and"
        " what replacing it brings. The file stays as it is without --write."
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="UTF-8 text")
    parser.add_argument("--lines", metavar="A-B", help="only these lines may change, from 1")
    parser.add_argument(
        "--budget", type=int, metavar="N", help="at most so many tokens (default 4)"
    )
    parser.add_argument(
        "--min-gain",
        type=float,
        metavar="X",
        help="nats that a replacement must bring (default 16); low values rewrite what is merely"
        " unusual",
    )
    parser.add_argument("--write", action="store_true", help="change the file, all or nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object, not a diff")
    add_model_arguments(parser, default="pocket")


def run(args: argparse.Namespace) -> int:
    """Revise; 0 whether or not anything was found."""
    lines = None if args.lines is None else line_range(args.lines, name="--lines")
    text = read_file(args.file)

    lm = load_model(args)
    names = ("budget", "min_gain")
    options = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    revision = lm.revise(text, lines=lines, **options)
    is_written = bool(args.write and revision.edits)
    if is_written:
        write_file(args.file, revision.text, was=text)
    if args.json:
        record = {"file": str(args.file), "is_written": is_written, **asdict(revision)}
        print(json.dumps(record))
    else:
        for line in diff(text, revision.text, name=str(args.file), what="revised"):
            print(line, end="")
        for edit in revision.edits:
            print(
                f"-- line {edit.line}: {edit.old!r} -> {edit.new!r}, probability"
                f" {math.exp(edit.log_prob):.1e}, gain {edit.gain:.1f} nats",
                file=sys.stderr,
            )
        if not revision.edits:
            print("-- nothing to replace: no token gains as much as --min-gain", file=sys.stderr)
        if is_written:
            print(f"-- written: {args.file}", file=sys.stderr)
    return 0
