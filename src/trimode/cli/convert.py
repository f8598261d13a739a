"""`trimode convert`: an autoregressive checkpoint to a tri-mode one."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

NAME = "convert"
HELP = "turn an autoregressive checkpoint into a tri-mode one"

_OF_NETWORKS = (
    "block_length",
    "mask_token",
    "untie",
    "max_shard_size",
    "proof_dtype",
    "max_context",
)
"""Options that mean nothing to an adapter."""

_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.epilog = (
        "Llama, Mistral, Ministral 3 (also the text part of its vision layout), Qwen2 and Qwen3."
        " The result is kept only if its logits are those of the source; the proof holds one"
        " network of the source's size in memory, in --proof-dtype. A converted network has yet to"
        " learn to denoise: until it is trained, its diffusion view guesses badly."
        " With --rank, SRC is an adapter's folder, and DST gets the nearest adapter of that rank."
    )
    parser.add_argument(
        "source", metavar="SRC", help="a folder or hub id with safetensors, a GGUF file, or smollm2"
    )
    parser.add_argument("destination", metavar="DST", help="a folder, new or empty")
    parser.add_argument(
        "--block-length",
        type=int,
        default=32,
        metavar="K",
        help="default diffusion block length (default %(default)s)",
    )
    parser.add_argument(
        "--mask-token",
        metavar="TOKEN",
        help="a token of the vocabulary or its id (default: a marker or slot that the source never"
        " used, else a new token)",
    )
    parser.add_argument(
        "--untie",
        action="store_true",
        help="write a copy of the embedding as the head, where the source ties the two; only so can"
        " the result have the published type",
    )
    parser.add_argument(
        "--dtype", metavar="D", help="write this type (default: the source's; of GGUF float32)"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="per file (default %(default)s)"
    )
    parser.add_argument(
        "--proof-dtype",
        default="float32",
        metavar="D",
        help="compare in this type; bfloat16 halves the memory and proves less"
        " (default %(default)s)",
    )
    parser.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="keep N positions only; within a source's sliding window this is exact",
    )
    parser.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="cut an adapter's updates to their R largest singular values; of the other options"
        " --dtype and --json go with it",
    )
    parser.add_argument("--json", action="store_true", help="print the record as one JSON object")
    parser.set_defaults(of_networks={name: parser.get_default(name) for name in _OF_NETWORKS})


def run(args: argparse.Namespace) -> int:
    """Convert; 0 if the result was proved and kept."""
    from trimode.checkpoint.compress import is_adapter
    from trimode.checkpoint.convert import convert

    if args.rank is not None or is_adapter(args.source):
        return _compress(args)
    record = convert(
        args.source,
        args.destination,
        block_length=args.block_length,
        mask_token=args.mask_token,
        untie=args.untie,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        proof_dtype=args.proof_dtype,
        max_context=args.max_context,
        on_plan=lambda plan: print(_plan(plan, args.proof_dtype), file=sys.stderr),
    )
    print(json.dumps(record) if args.json else _summary(record, args.destination))
    return 0


def _compress(args: argparse.Namespace) -> int:
    """Write an adapter of lower rank."""
    from trimode.checkpoint.compress import compress_adapter, is_adapter
    from trimode.checkpoint.io import as_dtype
    from trimode.errors import ConfigError

    if not is_adapter(args.source):
        raise ConfigError(f"rank is {args.rank}, but {args.source} is no adapter's folder")
    if args.rank is None:
        raise ConfigError(f"{args.source} is an adapter's folder: give --rank to compress it")
    for name, default in args.of_networks.items():
        if getattr(args, name, default) != default:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} means nothing to an adapter: leave it out")
    dtype = None if args.dtype is None else as_dtype(args.dtype)
    record = compress_adapter(args.source, args.destination, rank=args.rank, dtype=dtype)
    if args.json:
        print(json.dumps(record))
        return 0
    new, old = record["bytes"] / 1e6, record["source_bytes"] / 1e6
    print(
        f"wrote {args.destination}: {record['pairs']} pairs of rank {record['rank']} (they had"
        f" {record['source_rank']}), {new:.1f} MB ({old:.1f})\n"
        f"kept {record['kept']:.2%} of the updates' Frobenius norm, least"
        f" {record['least_kept']:.2%} ({record['least_kept_pair']})"
    )
    return 0


def _plan(record: dict[str, Any], proof_dtype: str) -> str:
    """What is about to be done: a line per kind of tensor, whatever the number of layers."""
    kinds: dict[tuple[str, str, str], int] = {}
    for tensor in record["tensors"]:
        source, name = (_LAYER.sub("*", tensor[key]) for key in ("source", "name"))
        kind = (source, name, f"{tensor['shape']} {tensor['dtype']}")
        kinds[kind] = kinds.get(kind, 0) + 1
    lines = [f"{s} -> {n} {what}{f' x{k}' if k > 1 else ''}" for (s, n, what), k in kinds.items()]
    for start, count in _by_start(record["ignored"]).items():
        lines.append(f"{start}* left behind, {count} tensors")
    if not record["has_tokenizer"]:
        lines.append("the source has no tokenizer; the result has none either")
    lines.append(f"copying, then proving with a network of {record['parameters']:,} {proof_dtype}")
    return "\n".join(lines)


def _by_start(names: list[str]) -> dict[str, int]:
    """How many names begin alike, up to the first number."""
    counts: dict[str, int] = {}
    for name in names:
        start = re.split(r"\d", name)[0] if "layers." in name else name.rpartition(".")[0]
        counts[start] = counts.get(start, 0) + 1
    return counts


def _summary(record: dict[str, Any], destination: str) -> str:
    """The lines a person wants to see first."""
    mask, proof = record["mask_token"], record["proof"]
    rows = f"{record['vocab_size']:,} rows, {record['num_new_rows']} of them new"
    if record["num_valid_tokens"] is not None:
        rows += f"; tokens are the first {record['num_valid_tokens']:,}"
    table = {
        "wrote": destination,
        "model": f"{record['source_model_type']} as {record['model_type']},"
        f" {record['parameters']:,} parameters, block length {record['block_size']}",
        "vocabulary": rows,
        "head": record["head"],
        "mask token": f"{mask['token'] or 'unnamed'}, id {mask['token_id']} ({mask['how']})",
        "tensors": f"{len(record['tensors'])} copied, {len(record['ignored'])} left behind",
        "proof": f"logits differ by {proof['max_difference']:.2g} at most, allowed"
        f" {proof['allowed_difference']:.2g}, largest {proof['largest_logit']:.3g}"
        f" ({proof['dtype']}, {len(proof['probes'])} inputs)",
    }
    if record["context"] < record["source_context"]:
        table["context"] = f"{record['context']:,} of the source's {record['source_context']:,}"
    return "\n".join(f"{name:<12}{value}" for name, value in table.items())
