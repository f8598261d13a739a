"""The choice by the compiled library: what `trimode.decoding.choose` does on the CPU in float32.

The order of the law, its edge cases and the bits of the noise are the same; sums are made in one
fixed order, so a row gets the same whatever else is chosen beside it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor

from trimode.decoding.bits import Bits
from trimode.decoding.choice import Choice
from trimode.decoding.law import Counts, RowLaw
from trimode.decoding.noise import log_table
from trimode.decoding.params import GenerationParams
from trimode.decoding.step import TokenLogprobs
from trimode.model.native import choice as native

_NOT_CORRECTED = (-1, -1)


def is_native(logits: Tensor) -> bool:
    """Whether the library chooses from such logits."""
    return logits.dtype == torch.float32 and logits.is_cpu and native.is_available()


def choose_natively(
    logits: Tensor,
    *,
    params: Items[GenerationParams],
    positions: Items[int],
    banned: Tensor,
    readings: native.Readings,
    targets: Items[int | None],
    laws: Items[RowLaw | None],
    num_logprobs: Items[int | None],
    none_id: int | None,
    correction: native.Correction | None = None,
    workers: ctypes.c_void_p | None = None,
    isa: str | None = None,
) -> Choice:
    """Choose for all rows in one call.

    Args:
        logits: [W, V] float32 on the CPU. Overwritten.
        params: See `trimode.decoding.choose.choose`, for the following ones too.
        positions: See there.
        banned: See there.
        readings: What is asked for of every row.
        targets: See there.
        laws: See there.
        num_logprobs: See there.
        none_id: See there.
        correction: See there.
        workers: Handle of a pool of threads; None for the one that all share.
        isa: Name of an instruction set; None for the one in use.
    """
    if logits.stride(-1) != 1:  # some products of torch are transposed
        logits = logits.contiguous()
    num_rows = len(logits)
    most = max((number for number in num_logprobs if number is not None), default=None)
    before = (_NOT_CORRECTED,) * num_rows if correction is None else correction.before
    kept = _Kept(logits.shape[-1])
    rows = (native.ChoiceRow * num_rows)(
        *(
            kept.row(
                *(one, position, law, before_it),
                -1 if target is None else target,
                -1 if number is None else number,
            )
            for one, position, law, before_it, target, number in zip(
                params,
                positions,
                laws or (None,) * num_rows,
                before,
                targets or (None,) * num_rows,
                num_logprobs or (None,) * num_rows,
                strict=True,
            )
        )
    )
    found = native.choose(
        *(logits, rows),
        banned=banned,
        log_table=log_table(),
        none_id=none_id,
        readings=readings,
        most_logprobs=most,
        correction=correction,
        workers=workers,
        isa=isa,
    )
    return Choice(
        token_ids=found.token_ids,
        is_finite=found.is_finite,
        confidences=found.confidences,
        runner_ups=found.runner_ups,
        runner_up_confidences=found.runner_up_confidences,
        entropies=found.entropies,
        log_probs=found.log_probs,
        logprobs=_logprobs(found, num_logprobs, most),
    )


def min_p_depth(min_p: float | None) -> float:
    """How far below the best score the last one is that min-p keeps, as a number to be added."""
    return -math.inf if not min_p else math.log(min_p)


class _Kept:
    """Makes rows, and keeps alive what their pointers point to.

    Args:
        num_tokens: Size of the vocabulary V. The library checks no id.
    """

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._alive: list[Any] = []
        self._biases: dict[int, tuple[int, int]] = {}  # by id of the mapping, which `_alive` keeps

    def row(
        self,
        params: GenerationParams,
        position: int,
        law: RowLaw | None,
        before: tuple[int, int],
        target: int,
        num_logprobs: int,
    ) -> native.ChoiceRow:
        top_p = params.top_p
        return native.ChoiceRow(
            *(params.seed, position, 1.0 if top_p is None else top_p, *self._law(law)),
            *(params.temperature, min_p_depth(params.min_p), params.top_k or 0),
            *(target, num_logprobs, *before),
        )

    def _law(self, law: RowLaw | None) -> tuple[Any, ...]:
        """From `allowed` to `presence`."""
        if law is None:
            return *(None,) * 7, 0, 0, 0, 1.0, 0.0, 0.0
        fed = law.fed if law.seen is not None else ()
        counted = law.counted if law.counts is not None else ()
        bias_ids, bias = self._bias(law.bias) if law.bias else (None, None)
        return (
            None if law.allowed is None else self._bits(law.allowed),
            None if law.seen is None else self._bits(law.seen),
            *(self._ids(fed) if fed else None, bias_ids, bias),
            None if law.counts is None else self._counts(law.counts),
            self._ids(counted) if counted else None,
            *(len(fed), len(law.bias), len(counted)),
            *(law.penalty, law.frequency, law.presence),
        )

    def _bits(self, bits: Bits) -> int:
        if 32 * bits.size < self._num_tokens or not bits.flags.c_contiguous:
            raise AssertionError(f"{bits.size} words for {self._num_tokens} tokens")
        self._alive.append(bits)
        address: int = bits.__array_interface__["data"][0]
        return address

    def _counts(self, counts: Counts) -> int:
        if counts.size != self._num_tokens or not counts.flags.c_contiguous:
            raise AssertionError(f"{counts.size} counts for {self._num_tokens} tokens")
        self._alive.append(counts)
        address: int = counts.__array_interface__["data"][0]
        return address

    def _bias(self, bias: Mapping[int, float]) -> tuple[int, int]:
        if id(bias) not in self._biases:
            self._alive.append(bias)
            self._biases[id(bias)] = (
                self._ids([*map(int, bias)]),
                self._address((ctypes.c_float * len(bias))(*map(float, bias.values()))),
            )
        return self._biases[id(bias)]

    def _ids(self, ids: Items[int]) -> int:
        if not 0 <= min(ids) <= max(ids) < self._num_tokens:
            raise AssertionError(f"ids from {min(ids)} to {max(ids)} of {self._num_tokens}")
        return self._address((ctypes.c_int32 * len(ids))(*ids))

    def _address(self, array: Any) -> int:
        self._alive.append(array)
        return ctypes.addressof(array)


def _logprobs(
    found: native.NativeChoice, numbers: Items[int | None], most: int | None
) -> list[TokenLogprobs | None]:
    if most is None:
        return [None] * len(numbers)
    logprobs: list[TokenLogprobs | None] = []
    for w, number in enumerate(numbers):
        if number is None:
            logprobs.append(None)
            continue
        at = slice(w * most, w * most + number)
        top = zip(found.top_ids[at], found.top_logprobs[at], strict=True)
        logprobs.append(TokenLogprobs(found.own_logprobs[w], tuple(top)))
    return logprobs
