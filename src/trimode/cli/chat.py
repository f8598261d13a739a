"""`trimode chat`: answer a message, or hold a conversation on the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from trimode.cli.generate import (
    add_decoding_arguments,
    add_model_arguments,
    as_object,
    check_template,
    given_options,
    in_force,
    load_model,
    print_pieces,
    read_prompt,
    summary,
)
from trimode.errors import RequestError

if TYPE_CHECKING:
    from trimode.runtime import Generation, TriModeLM

NAME = "chat"
HELP = "answer a message, or talk"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = (
        "Without MESSAGE on a terminal: a conversation, a line a message, until Ctrl-D; /help says"
        " what else there is. Answers go to stdout, counts to stderr. The model's tokenizer must"
        " have a chat template. What is not given below is as the model's generation_config.json"
        " has it, if it has one; an answer in a conversation has 512 tokens at most."
    )
    parser.add_argument(
        "message",
        nargs="?",
        metavar="MESSAGE",
        help="answer this and end; `-`, or none with something piped in, reads stdin as it is",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the conversation begins with")
    parser.add_argument(
        "--prefill",
        metavar="TEXT",
        help="how the answer begins (with MESSAGE); printed is what comes behind it",
    )
    parser.add_argument(
        "--heal",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="choose the end of --prefill anew where a token may go on from inside of it (default)",
    )
    parser.add_argument(
        "--enable-thinking",
        action=argparse.BooleanOptionalAction,
        help="whether the model thinks before it answers, if its chat template knows of that",
    )
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="variables of the chat template, as one JSON object",
    )
    add_model_arguments(parser)
    add_decoding_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object (with MESSAGE)")


def run(args: argparse.Namespace) -> int:
    """Answer; 0 unless the network broke down on the way."""
    is_talk = args.message is None and sys.stdin is not None and sys.stdin.isatty()
    if is_talk and args.json:
        raise RequestError("--json prints one answer: give a MESSAGE, or pipe one in")
    if is_talk and args.prefill is not None:
        raise RequestError("--prefill begins one answer: give a MESSAGE, or pipe one in")
    message = None if is_talk else read_prompt(args.message)
    options = given_options(args) | _template_options(args)

    if is_talk:
        print("loading the model", file=sys.stderr)
    lm = load_model(args)
    check_template(lm, args)
    if message is None:
        from trimode.cli.talk import talk

        talk(lm.dialogue(system=args.system, **options), mode=in_force(lm, options)[0])
        return 0
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages.append({"role": "user", "content": message})
    if args.prefill is not None:
        messages.append({"role": "assistant", "content": args.prefill})
    if args.json:
        generation = lm.chat(messages, **options)
        mode, block_length = in_force(lm, options)
        print(json.dumps(as_object(generation, mode=mode, block_length=block_length)))
    else:
        generation = _answer(lm, messages, options)
    return 1 if generation.finish_reason == "abort" else 0


def _template_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `TriModeLM.chat` that the chat template reads."""
    options: dict[str, Any] = {}
    if args.enable_thinking is not None:
        options["enable_thinking"] = args.enable_thinking
    if args.chat_template_kwargs is not None:
        try:
            options["chat_template_kwargs"] = json.loads(
                args.chat_template_kwargs, object_pairs_hook=_each_key_once
            )
        except ValueError as error:
            raise RequestError(
                f"--chat-template-kwargs is {args.chat_template_kwargs!r}, which is not JSON:"
                f" {error}"
            ) from None
    return options


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise RequestError(f"--chat-template-kwargs has {name!r} twice; allowed: once")
        found[name] = value
    return found


def _answer(lm: TriModeLM, messages: list[dict[str, str]], options: dict[str, Any]) -> Generation:
    """The answer on stdout as it comes, its cost on stderr."""
    stream = lm.stream(**lm.answering(messages, options))
    print_pieces(stream)
    assert stream.generation is not None
    mode, block_length = in_force(lm, options)
    for line in summary(stream.generation, mode=mode, block_length=block_length):
        print(line, file=sys.stderr)
    return stream.generation
