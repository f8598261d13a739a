"""A conversation on the terminal: messages, and lines that begin with a slash."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from trimode.cli.generate import print_pieces
from trimode.errors import RequestError

if TYPE_CHECKING:
    from trimode.runtime import Dialogue, Generation

COMMANDS = {
    "/mode": "[MODE]     show or set how answers are decoded",
    "/temperature": "[T] show or set how freely tokens are drawn; 0 is greedy",
    "/seed": "[N|none]   show or set the seed of all answers; none draws one for each",
    "/system": "[TEXT]   begin anew, with TEXT as the system's message; without it, with none",
    "/reset": "          begin anew",
    "/help": "           show this",
}
"""Name -> what it takes, what it does."""


def talk(dialogue: Dialogue, *, mode: str) -> None:
    """Read lines and answer until the input ends. Ctrl-C stops an answer.

    Args:
        dialogue: The conversation, with its options.
        mode: In force.
    """
    import readline  # noqa: F401  # line editing for `input`

    dialogue.options.setdefault("mode", mode)
    print("Ctrl-D ends the conversation, Ctrl-C an answer; /help for more", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # as in a shell
            print()
            continue
        if not line.strip():
            continue
        try:
            if line.startswith("/") and not line.startswith("//"):
                print(_done(dialogue, *line.split(maxsplit=1)), file=sys.stderr)
            else:
                _answer(dialogue, line.removeprefix("/") if line.startswith("//") else line)
        except RequestError as error:  # such as a full context; the conversation goes on
            print(f"trimode: error: {error}", file=sys.stderr)


def _answer(dialogue: Dialogue, message: str) -> None:
    before = dialogue.latest
    try:
        print_pieces(dialogue.say(message))
    except KeyboardInterrupt:
        print()
    if dialogue.latest is not None and dialogue.latest is not before:
        is_greedy = not dialogue.options.get("temperature")
        mode = str(dialogue.options["mode"])
        print(_cost(dialogue.latest, mode, is_greedy=is_greedy), file=sys.stderr)


def _cost(answer: Generation, mode: str, *, is_greedy: bool) -> str:
    stats, seed = answer.stats, "" if is_greedy else f", seed {answer.seed}"
    each = "" if stats.tpf_decode is None else f", {stats.tpf_decode:.2f} a forward"
    how = {"length": ", cut at the limit", "abort": ", stopped"}.get(answer.finish_reason or "", "")
    return (
        f"-- {mode}{seed}: {stats.new_tokens} tokens{how}, {stats.seconds:.2f} s,"
        f" {stats.tokens_per_second:.0f} tokens/s{each}; {stats.cached_tokens} of"
        f" {answer.prompt_tokens} prompt tokens kept from before"
    )


def _done(dialogue: Dialogue, command: str, argument: str = "") -> str:
    """Do what a line says; what to tell of it.

    Raises:
        RequestError: there is no such command, or it does not take that.
    """
    argument, options = argument.strip(), dialogue.options
    if command not in COMMANDS:
        raise RequestError(
            f"{command!r} is no command; allowed: {', '.join(COMMANDS)} (a message that begins with"
            " a slash: //...)"
        )
    if argument and command in ("/reset", "/help"):
        raise RequestError(f"{command} takes nothing, and got {argument!r}")
    if command == "/help":
        return "\n".join(f"{name} {what}" for name, what in COMMANDS.items())
    if command == "/mode":
        if argument:
            dialogue.check(mode=argument)
            options["mode"] = argument
        return f"mode {options['mode']}"
    if command == "/temperature":
        if argument:
            try:
                number = float(argument)
            except ValueError:
                raise RequestError(f"{command} takes {argument!r}; allowed: a number") from None
            dialogue.check(temperature=number)
            options["temperature"] = number
        return f"temperature {options.get('temperature', 'as the model has it')}"
    if command == "/seed":
        if argument == "none":
            options.pop("seed", None)
        elif argument:
            if not argument.isdecimal():
                raise RequestError(f"/seed takes {argument!r}; allowed: an integer >= 0, or none")
            dialogue.check(seed=int(argument))
            options["seed"] = int(argument)
        return f"seed {options.get('seed', 'drawn for each answer')}"
    kept = [one for one in dialogue.messages if one["role"] == "system"][:1]
    if command == "/system":
        kept = [{"role": "system", "content": argument}] if argument else []
    dialogue.messages = kept
    return "a new conversation" + (f"; system: {kept[0]['content']}" if kept else "")
