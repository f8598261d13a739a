"""The choice over the vocabulary, bound: arrays in, one call, arrays out.

Structures mirror `source/choice_batch.h`. What a row is subject to is made in `trimode.decoding`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from trimode.errors import CapacityError
from trimode.model.corrector import Corrector
from trimode.model.native.library import ENVIRONMENT, Library, load
from trimode.model.native.step import PackedRows

_FORMS = {torch.float32: 0, torch.bfloat16: 1}


class ChoiceRow(ctypes.Structure):
    """What one row is subject to; see `source/choice_batch.h`. Pointers are addresses."""

    _fields_ = (
        ("seed", ctypes.c_uint64),
        ("position", ctypes.c_int64),
        ("top_p", ctypes.c_double),
        ("allowed", ctypes.c_void_p),
        ("seen", ctypes.c_void_p),
        ("fed", ctypes.c_void_p),
        ("bias_ids", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("counted", ctypes.c_void_p),
        ("num_fed", ctypes.c_int32),
        ("num_bias", ctypes.c_int32),
        ("num_counted", ctypes.c_int32),
        ("penalty", ctypes.c_float),
        ("frequency", ctypes.c_float),
        ("presence", ctypes.c_float),
        ("temperature", ctypes.c_float),
        ("min_p_depth", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("target", ctypes.c_int32),
        ("num_logprobs", ctypes.c_int32),
        ("before_id", ctypes.c_int32),
        ("before_row", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class CorrectorView(ctypes.Structure):
    """See `source/choice_batch.h`."""

    _fields_ = (
        ("before", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("candidate", ctypes.c_void_p),
        ("embedding", ctypes.c_void_p),
        ("rank", ctypes.c_int32),
        ("hidden_size", ctypes.c_int32),
        ("num_candidates", ctypes.c_int32),
    )


class ChoiceBatch(ctypes.Structure):
    """All rows of a forward; see `source/choice_batch.h`."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("rows", ctypes.POINTER(ChoiceRow)),
        ("banned", ctypes.c_void_p),
        ("log_table", ctypes.c_void_p),
        ("corrector", ctypes.POINTER(CorrectorView)),
        ("states", ctypes.c_void_p),
        ("num_rows", ctypes.c_int32),
        ("num_tokens", ctypes.c_int32),
        ("num_banned", ctypes.c_int32),
        ("none_id", ctypes.c_int32),
        ("most_logprobs", ctypes.c_int32),
        ("token_ids", ctypes.POINTER(ctypes.c_int32)),
        ("is_finite", ctypes.POINTER(ctypes.c_uint8)),
        ("confidences", ctypes.POINTER(ctypes.c_double)),
        ("runner_ups", ctypes.POINTER(ctypes.c_int32)),
        ("runner_up_confidences", ctypes.POINTER(ctypes.c_double)),
        ("entropies", ctypes.POINTER(ctypes.c_double)),
        ("log_probs", ctypes.POINTER(ctypes.c_double)),
        ("own_logprobs", ctypes.POINTER(ctypes.c_double)),
        ("top_ids", ctypes.POINTER(ctypes.c_int32)),
        ("top_logprobs", ctypes.POINTER(ctypes.c_double)),
    )


class PlainEmbedding:
    """Rows of an embedding as the library reads them.

    Args:
        weight: [V, H] float32 or bfloat16 on the CPU, contiguous. Not copied.
    """

    def __init__(self, weight: Tensor) -> None:
        if not self.takes(weight):
            raise AssertionError(f"an embedding of {weight.dtype} on {weight.device}")
        self._weight = weight
        self._c = loaded().c
        address = ctypes.c_void_p(weight.data_ptr())
        self.address = self._c.trimode_embedding_new(
            address, _FORMS[weight.dtype], weight.shape[-1]
        )

    @staticmethod
    def takes(weight: Tensor) -> bool:
        """Whether the library can read it."""
        return weight.is_cpu and weight.dtype in _FORMS and weight.is_contiguous()

    def __del__(self) -> None:
        if address := getattr(self, "address", None):
            self._c.trimode_embedding_free(ctypes.c_void_p(address))


class NativeCorrector:
    """A corrector as the library reads it.

    Args:
        corrector: Whose matrices are taken as they are now, copied if they are not float32.
        embedding: Of the base's input; anything with the `address` of an `EmbeddingView`.
    """

    def __init__(self, corrector: Corrector, embedding: PlainEmbedding | PackedRows) -> None:
        names = ("before", "state", "candidate")
        self._embedding = embedding
        self._matrices = [
            getattr(corrector, name).detach().to(torch.float32).contiguous() for name in names
        ]
        rank, hidden_size = corrector.before.shape
        self.view = CorrectorView(
            *(matrix.data_ptr() for matrix in self._matrices),
            embedding.address,
            rank,
            hidden_size,
            corrector.num_candidates,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """What corrects the rows of one forward that have a token before them.

    Attributes:
        corrector: Of the adapter.
        states: [W, H]. Hidden states that the logits were made from.
        before: [W] what stands before each row: a token, or -1 and the number of the earlier row
            that chooses it; (-1, -1) where nothing is to be corrected.
    """

    corrector: NativeCorrector
    states: Tensor
    before: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Readings:
    """What is asked for of each row beside its token; see `trimode.decoding.choice.Choice`."""

    confidence: bool = False
    runner_up: bool = False
    entropy: bool = False
    log_prob: bool = False


@dataclass(frozen=True, slots=True)
class NativeChoice:
    """What was chosen for W rows, and the readings that were asked for; the others are empty.

    `top_ids` and `top_logprobs` are [W * most_logprobs].
    """

    token_ids: list[int]
    is_finite: list[bool]
    confidences: list[float]
    runner_ups: list[int]
    runner_up_confidences: list[float]
    entropies: list[float]
    log_probs: list[float]
    own_logprobs: list[float]
    top_ids: list[int]
    top_logprobs: list[float]


def is_available() -> bool:
    """Whether there is a library, and it is not switched off."""
    return _loaded(os.environ.get(ENVIRONMENT, "")) is not None


def loaded(isa: str | None = None) -> Library:
    """The library, which must be available.

    Args:
        isa: Name of an instruction set; None for the one in use.
    """
    found = _loaded(os.environ.get(ENVIRONMENT, "") if isa is None else isa)
    assert found is not None
    return found


@cache
def _loaded(name: str) -> Library | None:
    return load(name)


def choose(
    logits: Tensor,
    rows: ctypes.Array[ChoiceRow],
    *,
    banned: Tensor,
    log_table: Tensor,
    none_id: int | None,
    readings: Readings,
    most_logprobs: int | None = None,
    correction: Correction | None = None,
    workers: ctypes.c_void_p | None = None,
    isa: str | None = None,
) -> NativeChoice:
    """Choose for all rows of a forward.

    Args:
        logits: [W, V] float32 on the CPU; the last dimension is contiguous. Overwritten.
        rows: [W]. What their pointers point to must live until this returns. What stands before
            them is in them, too.
        banned: [any] int64 on the CPU. Ids never chosen.
        log_table: [3, 4096] float64 on the CPU, contiguous. That of `trimode.decoding.noise`.
        none_id: What a row chooses that has nothing to choose; None: such a row is not finite.
        readings: What else is asked for.
        most_logprobs: The most that any row asks for; None where none does.
        correction: Of the rows that have a token before them; None where none has.
        workers: Handle of a pool of threads; None for the one that all share.
        isa: Name of an instruction set; None for the one in use.
    """
    num_rows, num_tokens = logits.shape
    if logits.stride(-1) != 1 or logits.dtype != torch.float32 or not logits.is_cpu:
        raise AssertionError(f"logits of {logits.dtype} on {logits.device}")
    ints, doubles = ctypes.c_int32 * num_rows, ctypes.c_double * num_rows
    num_top = num_rows * (most_logprobs or 0)
    has_logprobs = most_logprobs is not None
    token_ids, is_finite = ints(), (ctypes.c_uint8 * num_rows)()
    confidences = doubles() if readings.confidence else None
    runner_ups = ints() if readings.runner_up else None
    runner_up_confidences = doubles() if readings.runner_up else None
    entropies = doubles() if readings.entropy else None
    log_probs = doubles() if readings.log_prob else None
    own_logprobs = doubles() if has_logprobs else None
    top_ids = (ctypes.c_int32 * num_top)() if has_logprobs else None
    top_logprobs = (ctypes.c_double * num_top)() if has_logprobs else None
    batch = ChoiceBatch(
        logits.data_ptr(),
        logits.stride(0),
        rows,
        banned.data_ptr(),
        log_table.data_ptr(),
        None,
        None,
        num_rows,
        num_tokens,
        len(banned),
        -1 if none_id is None else none_id,
        most_logprobs or 0,
        *(token_ids, is_finite, confidences, runner_ups, runner_up_confidences),
        *(entropies, log_probs, own_logprobs, top_ids, top_logprobs),
    )
    if correction is not None:
        states = correction.states.to(torch.float32).contiguous()
        batch.corrector = ctypes.pointer(correction.corrector.view)
        batch.states = states.data_ptr()
    library = loaded(isa)
    threads = workers or library.threads
    if not library.c.trimode_choose(library.kernels, threads, ctypes.byref(batch)):
        raise CapacityError(f"choosing {num_rows} tokens at once does not fit into memory")
    return NativeChoice(
        list(token_ids),
        [found != 0 for found in is_finite],
        list(confidences or ()),
        list(runner_ups or ()),
        list(runner_up_confidences or ()),
        list(entropies or ()),
        list(log_probs or ()),
        list(own_logprobs or ()),
        list(top_ids or ()),
        list(top_logprobs or ()),
    )
