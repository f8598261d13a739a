"""`trimode selfgen`: a model writes prompts and answers them; conversations for training."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimode.cli.generate import add_model_arguments, check_template, load_model
from trimode.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from trimode.runtime import TriModeLM
    from trimode.selfgen import SelfgenOptions, Writing

NAME = "selfgen"
HELP = "have a model write its own training conversations"

DEFAULT_NUM = 2000
DEFAULT_BATCH = 64

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_COUNTS = 30.0
_MODEL_FILES = ("*.json", "*.jinja", "*.safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = (
        "The model is fed its chat template up to the user's turn and writes a prompt, which it"
        " then answers (Magpie, arXiv 2406.08464). OUT.jsonl.dropped.jsonl says what was dropped"
        " and why, OUT.jsonl.counts.json counts it. The same command goes on with an unfinished"
        " run."
    )
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", help="where to write")
    parser.add_argument(
        "--num",
        type=int,
        metavar="N",
        help=f"conversations to keep (default {DEFAULT_NUM}; with --prompts all of them); a larger"
        " N goes on with a finished run",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="answer these: .txt, one a line, or .jsonl with `prompt` or `messages`",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the template's)")
    writing = parser.add_argument_group("writing")
    for name, kind, default, what in (
        ("seed", int, 0, "fixes all conversations"),
        ("prompt-temperature", float, 1.0, "of prompts that the model writes"),
        ("prompt-top-p", float, 0.97, "likewise"),
        ("max-prompt-tokens", int, 128, "a longer prompt is dropped"),
        ("max-answer-tokens", int, 512, "an answer is cut there"),
        ("top-logprobs", int, 0, "keep the K likeliest tokens per answer token"),
        ("held-out", float, 0.0, "share of the conversations marked as held out"),
        ("near-duplicates", float, 0.8, "similarity from which a prompt is dropped; 1: if equal"),
    ):
        writing.add_argument(
            f"--{name}",
            type=kind,
            default=default,
            metavar="N" if kind is int else "X",
            help=f"{what} (default %(default)s)",
        )
    writing.add_argument(
        "--temperature",
        type=_temperatures,
        default=(0.0, 0.7),
        metavar="T,T,...",
        help="of the answers, dealt out in turn; 0 is greedy (default 0,0.7)",
    )
    writing.add_argument(
        "--keep-loops",
        action="store_true",
        help="keep answers of which 64 tokens repeat a piece of at most 16",
    )
    writing.add_argument(
        "--keep-cut",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep answers cut at --max-answer-tokens (default)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=DEFAULT_BATCH,
        metavar="N",
        help="sequences that run together; changes the speed only (default %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_arguments(parser, has_drafter=False)


def run(args: argparse.Namespace) -> int:
    """Write; 0 also if a signal stopped it, for the same command goes on."""
    from rich.console import Console

    from trimode.selfgen import Output, SelfgenOptions, Writing
    from trimode.selfgen.prompt_file import read_prompts
    from trimode.training.stop_signals import StopSignals

    if args.batch < 1:
        raise ConfigError(f"batch is {args.batch}; allowed: at least 1")
    prompts = None if args.prompts is None else read_prompts(Path(args.prompts))
    num = DEFAULT_NUM if args.num is None and prompts is None else args.num
    options = SelfgenOptions(
        num=num,
        prompt_temperature=args.prompt_temperature,
        prompt_top_p=args.prompt_top_p,
        temperatures=args.temperature,
        max_prompt_tokens=args.max_prompt_tokens,
        max_answer_tokens=args.max_answer_tokens,
        seed=args.seed,
        system=args.system,
        top_logprobs=args.top_logprobs,
        held_out=args.held_out,
        near_duplicates=args.near_duplicates,
        keeps_loops=args.keep_loops,
        keeps_cut=args.keep_cut,
    )
    lm = load_model(args)
    if lm.tokenizer is None:
        raise RequestError("writing conversations needs a tokenizer, and this checkpoint has none")
    check_template(lm, args)
    arguments = _arguments(args, options, lm)
    started_s = time.monotonic()
    console = Console(stderr=True)
    with Output(Path(args.output), arguments, is_overwritten=args.overwrite) as output:
        writing = Writing(
            lm, options, batch=args.batch, prompts=prompts, before=output.before, early=output.early
        )
        output.write_counts(writing.tally, is_finished=writing.is_finished)
        counted_s = time.monotonic()
        with StopSignals() as signals, _progress(console, writing, num) as show:
            for settled, early in writing.steps():
                output.write_early(early)
                output.write(settled)
                show()
                if time.monotonic() > counted_s + _SECONDS_BETWEEN_COUNTS:
                    output.write_counts(writing.tally, is_finished=False)
                    counted_s = time.monotonic()
                if signals.is_set:
                    break
        output.write_counts(writing.tally, is_finished=writing.is_finished)
    seconds = time.monotonic() - started_s
    _report(args, writing, seconds)
    return 0


def _temperatures(words: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in words.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{words!r}; allowed: numbers with commas between them, such as 0,0,0.7"
        ) from None


def _arguments(args: argparse.Namespace, options: SelfgenOptions, lm: TriModeLM) -> dict[str, Any]:
    """What the text depends on: the options but their number, the model and the prompts."""
    from dataclasses import asdict

    from trimode.checkpoint.model_cache import resolve

    given = asdict(options)
    del given["num"]
    given["model"] = _folder_facts(resolve(args.model))
    given["lora"] = args.lora
    given["dtype"] = str(lm.model.dtype).removeprefix("torch.")
    given["weights"] = args.weights
    given["prompts"] = None
    if args.prompts is not None:
        given["prompts"] = hashlib.sha256(Path(args.prompts).read_bytes()).hexdigest()
    return given


def _folder_facts(folder: Path) -> str:
    """A hash of a checkpoint's small files, and of names, sizes and first bytes of its large."""
    digest = hashlib.sha256()
    for pattern in _MODEL_FILES:
        for file in sorted(folder.glob(pattern)):
            with file.open("rb") as opened:
                digest.update(f"{file.name} {file.stat().st_size} ".encode())
                digest.update(opened.read(2**24))
    return digest.hexdigest()


@contextmanager
def _progress(console: Console, writing: Writing, num: int | None) -> Iterator[Callable[[], None]]:
    """Gives a function to call after every step: a bar on a terminal, else a line now and then."""
    started_s = time.monotonic()

    def text() -> str:
        tally = writing.tally
        rate = writing.num_tokens("answer") / max(time.monotonic() - started_s, 1e-9)
        dropped = tally.dropped.total()
        return f"kept {tally.num_kept}, dropped {dropped}, {rate:.0f} answer tokens/s"

    if not console.is_terminal:
        next_s = started_s

        def show_line() -> None:
            nonlocal next_s
            if time.monotonic() >= next_s:
                next_s = time.monotonic() + _SECONDS_BETWEEN_LINES
                of_num = "" if num is None else f" of {num}"
                console.print(text().replace(",", f"{of_num},", 1), highlight=False)

        yield show_line
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(text(), total=num, completed=writing.tally.num_kept)

        def show() -> None:
            bars.update(task, completed=writing.tally.num_kept, description=text())

        yield show


def _report(args: argparse.Namespace, writing: Writing, seconds: float) -> None:
    num_answer, num_prompt = writing.num_tokens("answer"), writing.num_tokens("prompt")
    record = {
        "output": args.output,
        "is_finished": writing.is_finished,
        "counts": writing.tally.as_record(),
        "seconds": round(seconds, 1),
        "answer_tokens_written": num_answer,
        "prompt_tokens_written": num_prompt,
        "answer_tokens_per_second": round(num_answer / max(seconds, 1e-9), 1),
    }
    print(json.dumps(record) if args.json else args.output)
    print(f"-- {writing.tally.line()}", file=sys.stderr)
    print(
        f"-- {num_answer} answer tokens and {num_prompt} prompt tokens in {seconds:.0f} s,"
        f" {num_answer / max(seconds, 1e-9):.0f} answer tokens/s",
        file=sys.stderr,
    )
    if not writing.is_finished:
        print("-- stopped; the same command goes on", file=sys.stderr)
