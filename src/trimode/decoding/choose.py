"""The law of a choice, and the choice: the token at position i is argmax(log p_i + g(seed, i)).

Order of the law: ban, then those of `trimode.decoding.law`, temperature, min-p, top-k, top-p.
Greedy (temperature 0) is zero noise. Everything over the vocabulary happens on the device; one
small array comes back. On the CPU in float32 the compiled library does it all in one call; the
torch code here is its twin, and what other devices and dtypes run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from trimode.decoding.choice import Choice
from trimode.decoding.law import RowLaw, under
from trimode.decoding.native_choice import choose_natively, is_native, min_p_depth
from trimode.decoding.noise import gumbel, noise_key, noisy_argmax
from trimode.decoding.params import GenerationParams
from trimode.decoding.step import TokenLogprobs
from trimode.model.native.choice import Correction, Readings


def choose(
    logits: Tensor,
    *,
    params: Sequence[GenerationParams],
    positions: Sequence[int],
    banned: Tensor,
    wants_confidence: bool = False,
    wants_runner_up: bool = False,
    wants_entropy: bool = False,
    targets: Sequence[int | None] = (),
    laws: Sequence[RowLaw | None] = (),
    num_logprobs: Sequence[int | None] = (),
    none_id: int | None = None,
    correction: Correction | None = None,
) -> Choice:
    """Choose one token for each wanted position.

    Args:
        logits: [W, V]. Overwritten.
        params: [W] whose temperature, filters and seed apply.
        positions: [W] absolute position each answer is for.
        banned: [number banned] int64. Ids never chosen: the mask token and padded rows.
        wants_confidence: Whether anybody needs `confidences`.
        wants_runner_up: Whether anybody needs the second choices.
        wants_entropy: Whether anybody needs `entropies`.
        targets: [W] tokens whose log-probabilities are asked for, None where none is; empty for
            none at all.
        laws: [W] what else an answer is subject to, None where nothing; empty for none at all.
            Confidences, entropies and log-probabilities are of the law without them.
        num_logprobs: [W] how many of the likeliest tokens `logprobs` is to have, None where it is
            not asked for; empty for none at all.
        none_id: A banned id, the answer where a law leaves nothing to choose; None: such an answer
            is not finite. Drafts may lead where the text never goes, so it is an error only there.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    readings = Readings(
        confidence=wants_confidence,
        runner_up=wants_runner_up,
        entropy=wants_entropy,
        log_prob=any(target is not None for target in targets),
    )
    if not is_native(logits):
        if correction is not None:
            raise AssertionError("torch corrects row after row: see `choose_in_waves`")
        decide = choose_by_torch
    else:
        decide = partial(choose_natively, correction=correction)
    return decide(
        logits,
        params=params,
        positions=positions,
        banned=banned,
        readings=readings,
        targets=targets,
        laws=laws,
        num_logprobs=num_logprobs,
        none_id=none_id,
    )


def widened(logits: Tensor) -> Tensor:
    """In a dtype that choices are made in: float32, or float64 if they are."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def choose_by_torch(
    logits: Tensor,
    *,
    params: Sequence[GenerationParams],
    positions: Sequence[int],
    banned: Tensor,
    readings: Readings,
    targets: Sequence[int | None],
    laws: Sequence[RowLaw | None],
    num_logprobs: Sequence[int | None],
    none_id: int | None,
) -> Choice:
    """The same on any device; arguments as `choose_natively` has them.

    Args:
        logits: [W, V] float32 or float64. Overwritten.
        params: See `choose`, for the following ones too.
        positions: See there.
        banned: See there.
        readings: What is asked for of every row.
        targets: See there.
        laws: See there.
        num_logprobs: See there.
        none_id: See there.
    """
    logits[:, banned] = -torch.inf
    best, token_ids = logits.max(dim=-1)  # max propagates NaN
    is_finite, ruled = best.isfinite(), logits
    if any(law is not None for law in laws):
        ruled = under(logits, laws)
        best, token_ids = ruled.max(dim=-1)
        if none_id is None:
            is_finite &= best.isfinite()
    scores = ruled
    hot = [w for w, p in enumerate(params) if p.temperature > 0]
    if hot:
        rows = torch.tensor(hot, device=logits.device)
        hot_params = [params[w] for w in hot]
        hot_scores = _hot_scores(ruled[rows], hot_params)
        keys = _noise_keys(hot_params, [positions[w] for w in hot], device=logits.device)
        if readings.runner_up or not logits.is_cpu:
            noisy = hot_scores + gumbel(keys, logits.shape[-1]).to(hot_scores.dtype)
            token_ids[rows] = noisy.argmax(dim=-1)
            scores = ruled.index_copy(0, rows, noisy) if readings.runner_up else ruled
        else:
            token_ids[rows] = noisy_argmax(hot_scores, keys)
    if none_id is not None:
        token_ids = token_ids.masked_fill(~best.isfinite(), none_id)
    columns = {"token_ids": token_ids, "is_finite": is_finite}
    if readings.confidence:
        columns["confidences"] = _probabilities(logits, token_ids)
    if readings.runner_up:
        scores = scores.scatter(-1, token_ids[:, None], -torch.inf)
        score, second_ids = scores.max(dim=-1)
        columns["runner_ups"] = second_ids
        columns["runner_up_confidences"] = _probabilities(logits, second_ids) * score.isfinite()
    if readings.entropy:
        columns["entropies"] = _entropies(logits)
    if readings.log_prob:
        asked = torch.tensor([target or 0 for target in targets], device=logits.device)
        columns["log_probs"] = _log_probs(logits, asked)
    found = torch.stack([values.double() for values in columns.values()]).tolist()
    column = dict(zip(columns, found, strict=True))
    return Choice(
        token_ids=[int(i) for i in column["token_ids"]],
        is_finite=[bool(f) for f in column["is_finite"]],
        confidences=column.get("confidences", []),
        runner_ups=[int(i) for i in column.get("runner_ups", [])],
        runner_up_confidences=column.get("runner_up_confidences", []),
        entropies=column.get("entropies", []),
        log_probs=column.get("log_probs", []),
        logprobs=likeliest(logits, token_ids, num_logprobs),
    )


def _probabilities(logits: Tensor, token_ids: Tensor) -> Tensor:
    """[W]: of one token each, at temperature 1, unfiltered."""
    return _log_probs(logits, token_ids).exp()


def _log_probs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """[W]: the same in nats."""
    return logits.gather(-1, token_ids[:, None])[:, 0] - logits.logsumexp(dim=-1)


def likeliest(
    logits: Tensor, token_ids: Tensor, numbers: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """[W]: of one token each and of the likeliest, in nats; None where no number is given."""
    rows = [w for w, number in enumerate(numbers) if number is not None]
    if not rows:
        return [None] * len(numbers)
    most = max(number for number in numbers if number is not None)
    at = torch.tensor(rows, device=logits.device)
    law = logits[at].log_softmax(dim=-1)
    own = law.gather(-1, token_ids[at, None])
    top, ids = law.topk(most, dim=-1)
    found: list[TokenLogprobs | None] = [None] * len(numbers)
    for w, (first, *others) in zip(
        rows, torch.cat((own.double(), top.double(), ids.double()), dim=-1).tolist(), strict=True
    ):
        pairs = zip(map(int, others[most:]), others[:most], strict=True)
        found[w] = TokenLogprobs(first, tuple(pairs)[: numbers[w]])
    return found


def _entropies(logits: Tensor) -> Tensor:
    """[W] float64: entropy of the law at temperature 1, unfiltered, in nats."""
    return torch.special.entr(logits.double().softmax(dim=-1)).sum(dim=-1)


def _hot_scores(logits: Tensor, params: list[GenerationParams]) -> Tensor:
    """[W, V]: the filtered law, for temperatures above 0."""
    temperature = [[p.temperature] for p in params]
    return filter_logits(
        logits / torch.tensor(temperature, device=logits.device, dtype=logits.dtype),
        min_p=[p.min_p for p in params],
        top_k=[p.top_k for p in params],
        top_p=[p.top_p for p in params],
    )


def _noise_keys(
    params: list[GenerationParams], positions: list[int], *, device: torch.device
) -> Tensor:
    """[W] int64."""
    keys = [noise_key(p.seed, position) for p, position in zip(params, positions, strict=True)]
    return torch.tensor(keys, device=device)


def filter_logits(
    logits: Tensor,
    *,
    min_p: Sequence[float | None],
    top_k: Sequence[int | None],
    top_p: Sequence[float | None],
) -> Tensor:
    """Min-p, then top-k and top-p, each within what is left; what is dropped becomes -inf.

    Of equally likely tokens at the edge of top-k or top-p, the lower ids stay.

    Args:
        logits: [W, V], at temperature 1 of the law.
        min_p: [W] what is at least so many times as probable as the likeliest stays; None for all.
        top_k: [W] how many of the likeliest stay; None for all.
        top_p: [W] the smallest likeliest set of at least this probability stays; None for all.
    """
    filtered = [
        w for w, (k, p) in enumerate(zip(top_k, top_p, strict=True)) if (k, p) != (None, None)
    ]
    if any(share is not None for share in min_p):
        depths = torch.tensor([[min_p_depth(share)] for share in min_p], dtype=torch.float64)
        floors = logits.amax(dim=-1, keepdim=True) + depths.to(logits.device, logits.dtype)
        logits = logits.masked_fill(logits < floors, -torch.inf)
    if not filtered:
        return logits
    if len(filtered) < len(logits):  # sorting is slow
        rows = torch.tensor(filtered, device=logits.device)
        found = filter_logits(
            logits[rows],
            min_p=[None] * len(filtered),
            top_k=[top_k[w] for w in filtered],
            top_p=[top_p[w] for w in filtered],
        )
        return logits.index_copy(0, rows, found)
    num_tokens, device = logits.shape[-1], logits.device
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    kept = torch.tensor([min(k or num_tokens, num_tokens) for k in top_k], device=device)
    ranked = ranked.masked_fill(
        torch.arange(num_tokens, device=device) >= kept[:, None], -torch.inf
    )
    probabilities = ranked.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # A mass of 2 is never reached, so None and 1 keep everything whatever the rounding of the sum.
    mass = torch.tensor(
        [2.0 if p is None or p >= 1 else p for p in top_p], device=device, dtype=logits.dtype
    )
    ranked = ranked.masked_fill(before >= mass[:, None], -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, order, ranked)
