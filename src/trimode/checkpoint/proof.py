"""The proof that a converted checkpoint computes and reads what its source does.

Logits of the AR view are compared with those of transformers' own model of the source, and the
saved tokenizer with the source's. Where something differs, nothing is kept.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from trimode.checkpoint import io, key_maps
from trimode.checkpoint.mask_token import MaskToken
from trimode.checkpoint.source import Source
from trimode.errors import CheckpointError

PROBE_LEN = 48


def prove(
    source: Source, folder: Path, *, written_in: torch.dtype | None, proved_in: torch.dtype
) -> dict[str, Any]:
    """Compare AR logits of the written folder with those of transformers' model of the source.

    The source is rounded to `written_in` first, so that what is compared is the conversion and not
    the rounding that was asked for. One network at a time is in memory.

    Raises:
        CheckpointError: some logits differ by more than `PROOF_BOUNDS` of the largest, or
            transformers does not compute the source.
    """
    probes = make_probes(source)
    theirs = _their_logits(source, probes, written_in=written_in or proved_in, proved_in=proved_in)
    ours = _logits(io.load_model(folder, device="cpu", dtype=proved_in), probes)
    largest = max(float(logits.abs().max()) for logits in theirs)
    allowed = key_maps.PROOF_BOUNDS[proved_in] * largest
    differences = []
    for probe, expected, got in zip(probes, theirs, ours, strict=True):
        difference = float((got[:, : expected.shape[1]] - expected).abs().max())
        differences.append(difference)
        if not difference <= allowed < math.inf:  # NaN fails too
            raise CheckpointError(
                f"the result does not compute what {source.folder} does: logits of {probe.name!r}"
                f" differ by {difference:.3g}, allowed {allowed:.3g}; nothing was written"
            )
    return {
        "dtype": str(proved_in).removeprefix("torch."),
        "max_difference": max(differences),
        "allowed_difference": allowed,
        "largest_logit": largest,
        "probes": [asdict(probe) for probe in probes],
    }


@dataclass(frozen=True, slots=True)
class Probe:
    """Token ids fed at consecutive positions from `first_position`."""

    name: str
    ids: list[int]
    first_position: int = 0


def make_probes(source: Source) -> list[Probe]:
    """Random tokens and edge cases, also where YaRN's or Llama 3's original context ends."""
    config = source.config
    num_rows, context = config.vocab_size, source.context
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_LEN, context)
    ids = torch.randint(num_rows, (length,), generator=generator).tolist()
    special = sorted(i for i in source.special_ids if i < num_rows)
    probes = [
        Probe("random tokens", ids),
        Probe("first, last and special tokens", [0, num_rows - 1, *special][:context]),
        Probe("one token", ids[:1]),
        Probe("one token repeated", ids[:1] * length),
        Probe("end of the context", ids, context - length),
    ]
    original = config.rope_parameters.get("original_max_position_embeddings") or context
    if original < context:
        start = max(0, min(original - length // 2, context - length))
        probes.append(Probe("end of the original context", ids, start))
    return probes


def _their_logits(
    source: Source, probes: Iterable[Probe], *, written_in: torch.dtype, proved_in: torch.dtype
) -> list[Tensor]:
    auto = key_maps.AUTO_VISION if source.is_vision else key_maps.AUTO_TEXT
    loading = {"attn_implementation": "eager", "trust_remote_code": False}
    try:
        with io.quiet():
            model = getattr(transformers, auto).from_pretrained(
                source.folder, dtype=written_in, **loading
            )
        return _logits(model.to(proved_in).eval(), probes)
    except Exception as error:  # their models raise anything where a config is incomplete
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{source.folder}: transformers does not compute the source: {reason}"
        ) from error


@torch.inference_mode()
def _logits(model: torch.nn.Module, probes: Iterable[Probe]) -> list[Tensor]:
    """[T, V] float32 for each probe."""
    has_cache_position = "cache_position" in inspect.signature(model.forward).parameters
    found = []
    for probe in probes:
        positions = torch.arange(probe.first_position, probe.first_position + len(probe.ids))[None]
        # Older transformers scale Ministral's queries by these.
        options = {"cache_position": positions[0]} if has_cache_position else {}
        logits = model(torch.tensor([probe.ids]), position_ids=positions, **options).logits
        found.append(logits[0].float())
    return found


def prove_tokenizer(source: Source, folder: Path, mask: MaskToken) -> None:
    """The saved tokenizer reads as before, knows the mask token and has kept its settings.

    Raises:
        CheckpointError: it does not.
    """
    before = io.read_with(transformers.AutoTokenizer, source.folder, "tokenizer")
    after = io.load_tokenizer(folder)
    assert after is not None
    same = {
        "text": [t(key_maps.PROBE_TEXT)["input_ids"] for t in (before, after)],
        "roles": [t.special_tokens_map | {"mask_token": mask.token} for t in (before, after)],
        "special tokens": [sorted({*t.all_special_tokens, mask.token}) for t in (before, after)],
        "added tokens": [
            {i: repr(t) for i, t in t.added_tokens_decoder.items() if i != mask.token_id}
            for t in (before, after)
        ],
        "chat template": [t.chat_template for t in (before, after)],
        "mask token": [[mask.token_id], after.encode(mask.token, add_special_tokens=False)],
    }
    for what, (expected, got) in same.items():
        if expected != got:
            raise CheckpointError(
                f"{source.folder}: the tokenizer does not survive saving: {what} was {expected!r}"
                f" and is {got!r}; nothing was written"
            )
