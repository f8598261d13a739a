"""`trimode generate`: continue one prompt; as text, as JSON, or watched while it is made."""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

from trimode.cli.control_flags import CONTROL_FLAGS, read_controls
from trimode.cli.threads_flag import add_threads_argument, use_threads
from trimode.errors import RequestError

if TYPE_CHECKING:
    from trimode.decoding import Stats
    from trimode.decoding.step import TokenLogprobs
    from trimode.runtime import Generation, TriModeLM

NAME = "generate"
HELP = "continue a prompt, in any mode"

DECODING_FLAGS: dict[str, dict[str, Any]] = {
    "mode": {
        "metavar": "MODE",
        "help": "ar, diffusion, linear, branching, quadratic, or auto, the best of every round"
        " (default auto)",
    },
    "max_new_tokens": {"type": int, "metavar": "N", "help": "at most so many (default 128)"},
    "block_length": {
        "type": int,
        "metavar": "K",
        "help": "tokens per block (default: the model's)",
    },
    "threshold": {
        "type": float,
        "metavar": "X",
        "help": "reveal what is at least so probable, 0 to 1 (default 0.9 in diffusion without"
        " --steps; in linear one pass per draft)",
    },
    "steps": {
        "type": int,
        "metavar": "N",
        "help": "passes per block; alone it turns the threshold off",
    },
    "policy": {
        "metavar": "NAME",
        "help": "diffusion: which positions a pass reveals: confidence_threshold (default), steps,"
        " entropy_bound, leftmost, random or ar_weighted",
    },
    "entropy_bound": {
        "type": float,
        "metavar": "X",
        "help": "--policy entropy_bound: nats that the entropies revealed in a pass, less the"
        " largest, may sum to (default 0.1)",
    },
    "revision": {
        "metavar": "NAME",
        "help": "diffusion: let revealed tokens of a block change: joint_threshold, ar_doubt or"
        " remdm (default: none)",
    },
    "edit_threshold": {
        "type": float,
        "metavar": "X",
        "help": "--revision joint_threshold: replace by what is more probable than this"
        " (default 0.5)",
    },
    "edit_budget": {
        "type": int,
        "metavar": "N",
        "help": "--revision joint_threshold, ar_doubt: at most so many changes in a block"
        " (default: half a block)",
    },
    "doubt": {
        "type": float,
        "metavar": "X",
        "help": "--revision ar_doubt: reopen what the AR view finds less probable (default 0.1)",
    },
    "remask_schedule": {
        "metavar": "NAME",
        "help": "--revision remdm: conf (default), cap, rescale or loop",
    },
    "remask_rate": {
        "type": float,
        "metavar": "X",
        "help": "--revision remdm: how readily tokens are masked anew, 0 to 1 (default 0.5)",
    },
    "branches": {
        "type": int,
        "metavar": "M",
        "help": "branching: next drafts that a verify forward carries (default 4)",
    },
    "guesses": {
        "action": argparse.BooleanOptionalAction,
        "help": "branching: whether they may begin with a guess of the bonus token (default)",
    },
    "draft_form": {
        "metavar": "FORM",
        "help": "speculation: block, or skip, where masks skip the bonus token (default: what the"
        " drafter was trained for)",
    },
    "skip_masks": {
        "type": int,
        "metavar": "M",
        "help": "--draft-form skip: masks of a draft (default: what the drafter was trained with)",
    },
    "lookup": {
        "action": argparse.BooleanOptionalAction,
        "help": "speculation: draft from the text's own repetitions too (default: in auto)",
    },
    "draft_cutoff": {
        "type": float,
        "metavar": "X",
        "help": "speculation: end a draft before its first token less probable than this",
    },
    "min_gain": {
        "type": float,
        "metavar": "X",
        "help": "speculation: feed only what is expected to bring X tokens for each one fed, 0 to 1"
        " (default 0.08 where the drafter says how well it drafts, else 0; in auto what one"
        " costs)",
    },
    "temperature": {"type": float, "metavar": "T", "help": "0 is greedy (default 0.0)"},
    "top_p": {"type": float, "metavar": "P", "help": "likeliest tokens of this probability in all"},
    "top_k": {"type": int, "metavar": "K", "help": "the K likeliest tokens only; 0 and -1: all"},
    "min_p": {
        "type": float,
        "metavar": "P",
        "help": "tokens at least P times as probable as the likeliest, before --top-k; 0: all",
    },
    "seed": {"type": int, "metavar": "S", "help": "fixes the text (default: drawn, and reported)"},
    "stop": {
        "action": "append",
        "metavar": "STR",
        "help": "end the text before STR, taken as it is; may be given several times",
    },
    "min_tokens": {
        "type": int,
        "metavar": "N",
        "help": "do not end the text before it has N new tokens (default 0)",
    },
    "ignore_eos": {"action": "store_true", "help": "go on past the end-of-text token"},
    **CONTROL_FLAGS,
}
"""Arguments of `TriModeLM.generate`. Only those given are passed on: defaults live there."""

PROMPT_FLAGS: dict[str, dict[str, Any]] = {
    "heal": {
        "action": argparse.BooleanOptionalAction,
        "help": "choose the prompt's end anew where a token may go on from inside of it (default)",
    },
    "parse_special": {
        "action": "store_true",
        "help": "control tokens that the prompt spells are these tokens (default: they are text)",
    },
}
"""The same, of how a prompt is read."""

DEFAULT_WATCH_DELAY_MS = 40.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = (
        "On stdout: the prompt, its continuation as it is made, and a final newline if there is"
        " none; with --json one object, whose `text` is the continuation alone. On stderr: counts."
    )
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="text to continue; `-`, or none with something piped in, reads stdin as it is",
    )
    add_model_arguments(parser)
    add_decoding_arguments(parser)
    _add_flags(parser.add_argument_group("prompt"), PROMPT_FLAGS)
    output = parser.add_argument_group("output")
    how = output.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print one JSON object")
    how.add_argument(
        "--watch",
        action="store_true",
        help="show the tokens being drafted, accepted, rejected and revealed; plain output where"
        " stdout is not a terminal",
    )
    output.add_argument(
        "--watch-delay",
        type=float,
        default=DEFAULT_WATCH_DELAY_MS,
        metavar="MS",
        help="pause after every picture, left out of tokens/s (default %(default)g)",
    )


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `DECODING_FLAGS`."""
    _add_flags(parser.add_argument_group("decoding"), DECODING_FLAGS)


def _add_flags(group: argparse._ArgumentGroup, flags: dict[str, dict[str, Any]]) -> None:
    for name, flag in flags.items():
        group.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **flag)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The decoding arguments that were given, as `TriModeLM.generate` takes them."""
    names = (*DECODING_FLAGS, *PROMPT_FLAGS)
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return read_controls(given, is_json=args.json)


def load_model(args: argparse.Namespace) -> TriModeLM:
    """What the arguments of `add_model_arguments` ask for."""
    use_threads(args.threads)
    from trimode.checkpoint.names import NO_DRAFTER
    from trimode.loading import load

    return load(
        args.model,
        device=args.device,
        dtype=args.dtype,
        lora=args.lora,
        drafter=getattr(args, "drafter", NO_DRAFTER),
        weights=args.weights,
    )


def check_template(lm: TriModeLM, args: argparse.Namespace) -> None:
    """Refuse conversations with `pocket` where it has no chat template.

    Raises:
        RequestError: naming the LoRA that brings one; other models are left to `lm.chat`.
    """
    from trimode.checkpoint.model_cache import default_name
    from trimode.checkpoint.names import POCKET

    has_template = lm.tokenizer is not None and lm.tokenizer.chat_template
    if not has_template and (args.model or default_name()) == POCKET:
        raise RequestError(
            f"a conversation needs a chat template, and {POCKET} has none; give it the LoRA that"
            " was tuned on conversations: --lora instruct_lora"
        )


def add_model_arguments(
    parser: argparse.ArgumentParser, *, has_drafter: bool = True, default: str | None = None
) -> None:
    """Declare what `trimode.load` takes; no drafter for a command that drafts nothing."""
    model = parser.add_argument_group("model")
    named = default or "smollm2, or pocket where it is not at hand"
    model.add_argument(
        "--model",
        metavar="PATH",
        default=default,
        help=f"smollm2, pocket (built in), a folder, a GGUF file or a hub id (default: {named})",
    )
    model.add_argument(
        "--lora",
        metavar="PATH",
        help="PEFT LoRA folder to merge into the weights, or its name inside the model's folder",
    )
    if has_drafter:
        model.add_argument(
            "--drafter",
            metavar="PATH",
            help="the same for the diffusion view: on for drafts, or for what its files say; none"
            " turns off that of smollm2",
        )
    model.add_argument("--device", metavar="D", help="cpu, cuda, ... (default: cuda if there is)")
    model.add_argument(
        "--dtype",
        metavar="D",
        help="float32, bfloat16, ... (default: bfloat16 on cuda and in the native step, else"
        " float32)",
    )
    model.add_argument(
        "--weights",
        metavar="FORM",
        help="plain, native or int8: how weights lie in memory (default: native where that can run,"
        " which is on a CPU in float32 or bfloat16)",
    )
    add_threads_argument(model)


def run(args: argparse.Namespace) -> int:
    """Generate; 0 unless the network broke down on the way."""
    if not 0 <= args.watch_delay <= 60_000:
        raise RequestError(f"--watch-delay is {args.watch_delay:g}; allowed: 0 to 60000 ms")
    prompt = read_prompt(args.prompt)

    options, lm = given_options(args), load_model(args)
    mode, block_length = in_force(lm, options)
    if args.json:
        generation = cast("Generation", lm.generate(prompt, **options))
        print(json.dumps(as_object(generation, mode=mode, block_length=block_length)))
    else:
        if args.watch and _is_watchable():
            from trimode.cli.watch import watch

            generation = watch(
                lm, prompt, options=options, mode=mode, delay_s=args.watch_delay / 1000
            )
        else:
            generation = _print_as_it_comes(lm, prompt, options)
        for line in summary(generation, mode=mode, block_length=block_length):
            print(line, file=sys.stderr)
    return 1 if generation.finish_reason == "abort" else 0


def as_object(generation: Generation, *, mode: str, block_length: int | None) -> dict[str, Any]:
    """The object that `--json` prints; `block_length` is None where the mode has no blocks."""
    stats = generation.stats
    record: dict[str, Any] = {
        "text": generation.text,
        "token_ids": generation.token_ids,
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": stats.new_tokens,
        "finish_reason": generation.finish_reason,
        "mode": mode,
        "block_length": block_length,
        "forwards": {**stats.forwards, "total": stats.num_forwards},
        "tokens_per_forward": {"decode": stats.tpf_decode, "total": stats.tpf_total},
    }
    if generation.healed_bytes:
        record["healed_bytes"] = list(generation.healed_bytes)
    if mode not in ("ar", "diffusion"):
        record["acceptance_lengths"] = stats.acceptance_lengths
    for name, token_ids, scores in (
        ("prompt_logprobs", generation.prompt_ids, generation.prompt_logprobs),
        ("logprobs", generation.token_ids, generation.logprobs),
    ):
        if scores is not None:
            record[name] = [_as_object(*one) for one in zip(token_ids, scores, strict=True)]
    record["seconds"] = stats.seconds
    record["tokens_per_second"] = stats.tokens_per_second
    record["seed"] = generation.seed
    return record


def _as_object(token_id: int, one: TokenLogprobs | None) -> dict[str, Any]:
    """A token's log-probability and the likeliest in its place; null for a prompt's first."""
    if one is None:
        return {"token_id": token_id, "logprob": None, "top": []}
    top = [{"token_id": other, "logprob": logprob} for other, logprob in one.top]
    return {"token_id": token_id, "logprob": one.logprob, "top": top}


def summary(generation: Generation, *, mode: str, block_length: int | None) -> list[str]:
    """What the continuation cost, in lines for a reader."""
    stats = generation.stats
    block = "" if block_length is None else f", block length {block_length}"
    lines = [
        f"-- {mode}{block}, seed {generation.seed}: {stats.new_tokens} tokens in"
        f" {stats.seconds:.2f} s, {stats.tokens_per_second:.1f} tokens/s,"
        f" ended by {generation.finish_reason}",
        f"-- {forwards_line(stats)}; {tokens_per_forward_line(stats)}",
    ]
    if stats.acceptance_lengths:
        lines.append(f"-- {acceptance_line(stats)}, {len(stats.acceptance_lengths)} rounds")
    return lines


def forwards_line(stats: Stats) -> str:
    """Forwards by kind."""
    kinds = ", ".join(f"{number} {kind}" for kind, number in stats.forwards.items() if number)
    return f"{stats.num_forwards} forwards ({kinds})"


def tokens_per_forward_line(stats: Stats) -> str:
    """Both numbers, always together."""
    decode = "none" if stats.tpf_decode is None else f"{stats.tpf_decode:.2f}"
    return f"tokens per forward: {decode} decode, {stats.tpf_total:.2f} total"


def acceptance_line(stats: Stats) -> str:
    """Mean over the rounds so far."""
    mean = sum(stats.acceptance_lengths) / len(stats.acceptance_lengths)
    return f"acceptance length {mean:.2f} (a round's accepted drafts plus the AR view's own tokens)"


def read_prompt(word: str | None) -> str:
    """The prompt from the command line or from stdin, a newline at the end included."""
    if word is not None and word != "-":
        try:
            word.encode()
        except UnicodeEncodeError:  # Python hides undecodable bytes of an argument in surrogates
            raise RequestError("the prompt is not valid UTF-8; convert it first") from None
        return word
    if sys.stdin is None or (word is None and sys.stdin.isatty()):
        raise RequestError(
            "no prompt; give it as an argument or pipe it in (`-` reads the terminal)"
        )
    content = sys.stdin.buffer.read()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RequestError(
            f"the prompt on stdin is not valid UTF-8: byte 0x{content[error.start]:02x} at offset"
            f" {error.start}; convert it first"
        ) from None


def in_force(lm: TriModeLM, options: dict[str, Any]) -> tuple[str, int | None]:
    """Mode and block length, defaults filled in."""
    mode = options.get("mode", inspect.signature(lm.generate).parameters["mode"].default)
    if mode == "ar":
        return mode, None
    return mode, options.get("block_length", lm.model.config.block_size)


def _is_watchable() -> bool:
    from rich.console import Console

    return sys.stdout.isatty() and not Console().is_dumb_terminal


def _print_as_it_comes(lm: TriModeLM, prompt: str, options: dict[str, Any]) -> Generation:
    """The prompt and its continuation on stdout; on a terminal without what could upset it."""
    stream = lm.stream(prompt, **options)
    print_pieces(itertools.chain([prompt], stream))
    assert stream.generation is not None
    return stream.generation


def print_pieces(pieces: Iterable[str]) -> None:
    """Text on stdout as it comes, and a final newline if it has none."""
    from trimode.cli.watch import printable

    show = printable if sys.stdout.isatty() else str
    last = ""
    for piece in pieces:
        print(show(piece), end="", flush=True)
        last = piece or last
    if not last.endswith("\n"):
        print()
