"""Noise and texts of `gpu_check.py`: what must be the same bits, and what may differ where.

A text that should equal the AR view's may differ from it only at a place where the reference's own
two best choices are closer than a bound, in logits. Sampled choices are compared with their noise,
times the temperature; a choice that depends on whether a token at the edge of top-k or top-p stays
has a margin of 0. Block diffusion and infilling have no such margin. There the CPU is asked again
with all weights moved by 1 part in 10,000, eight times; one of these texts must differ, too.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from drafting_record import first_difference
from gpu_record import Record, Setting
from torch import Tensor

import trimode
from trimode.checkpoint.io import POCKET_MODEL
from trimode.decoding.choose import choose
from trimode.decoding.noise import gumbel, noise_key, random_words
from trimode.decoding.params import GenerationParams
from trimode.runtime import Generation, TriModeLM

BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Logits; two forwards of the same tokens may differ by less. In bfloat16 on a CPU texts parted at
margins of at most 0.035."""

EDGES = {torch.float32: 1e-5, torch.bfloat16: 0.03}
"""Probability; the same for the mass that top-p keeps."""
MOVED, NUM_MOVED = 1e-4, 8

DRAFTER = "linear_spec_lora"
HERE = Path(__file__).resolve().parent
Options = dict[str, Any]

LAWS: dict[str, Options] = {
    "greedy": {},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
    "top_k": {"temperature": 1.0, "top_k": 40},
    "both": {"temperature": 0.7, "top_k": 100, "top_p": 0.95},
}
LOSSLESS: dict[str, Options] = {
    "linear": {"mode": "linear"},
    "linear, K 4, cutoff": {"mode": "linear", "block_length": 4, "draft_cutoff": 0.3},
    "linear, lookup": {"mode": "linear", "lookup": True},
    "linear, skip": {"mode": "linear", "draft_form": "skip"},
    "branching": {"mode": "branching"},
    "branching, 1, no guesses": {"mode": "branching", "branches": 1, "guesses": False},
    "branching, 7, K 4": {"mode": "branching", "branches": 7, "block_length": 4},
    "quadratic, K 4": {"mode": "quadratic", "block_length": 4},
    "auto": {"mode": "auto"},
}
DIFFUSION: dict[str, Options] = {
    "diffusion": {"mode": "diffusion"},
    "diffusion, 3 steps": {"mode": "diffusion", "steps": 3},
    "diffusion, ar_doubt": {"mode": "diffusion", "revision": "ar_doubt"},
}


def load(setting: Setting | None, dtype: torch.dtype, **options: Any) -> TriModeLM:
    """The model in the package, on the device of a setting, or on the CPU."""
    device = torch.device("cpu") if setting is None else setting.device
    lm = trimode.load("pocket", device=device, dtype=dtype, weights="plain", **options)
    return lm


def texts(lm: TriModeLM, prompts: list[list[int]], **options: Any) -> list[Generation]:
    """All prompts together; prompt i has seed i."""
    found = lm.generate(prompts, seed=list(range(len(prompts))), ignore_eos=True, **options)
    assert isinstance(found, list)
    return found


def held_out_prompts(lm: TriModeLM, number: int) -> list[list[int]]:
    """Token ids of the package's held-out prompts, of different lengths."""
    lines = (POCKET_MODEL / "heldout_prompts.jsonl").read_text("utf-8").splitlines()
    found = [lm.encode(json.loads(line)["prompt"]) for line in lines[:number]]
    return [ids[: 24 + 7 * i] for i, ids in enumerate(found)]


@dataclass(frozen=True)
class Reference:
    """The AR view that texts are compared with.

    Attributes:
        lm: Whose it is.
        prompts: Of the texts.
        found: Token ids of the text of each, in `law`.
        law: Temperature and filters.
    """

    lm: TriModeLM
    prompts: list[list[int]]
    found: list[list[int]]
    law: Options

    @classmethod
    def of(
        cls, lm: TriModeLM, prompts: list[list[int]], law: Options, num_tokens: int
    ) -> Reference:
        """Let it write."""
        found = texts(lm, prompts, mode="ar", max_new_tokens=num_tokens, **law)
        return cls(lm, prompts, [one.token_ids for one in found], law)

    def check(self, record: Record, name: str, found: list[list[int]]) -> None:
        """Note how many texts are equal, and the margin where each other one parts."""
        margins = []
        for number, (text, other) in enumerate(zip(self.found, found, strict=True)):
            place = first_difference(text, other)
            if place is not None:
                margins.append(self.margin(number, place, seed=number))
        record.check(
            name,
            all(margin <= self.bound for margin in margins),
            equal=len(found) - len(margins),
            texts=len(found),
            margins=margins,
            bound=self.bound,
        )

    @property
    def bound(self) -> float:
        """Margin up to which a text may part."""
        return BOUNDS[self.lm.model.dtype]

    @torch.inference_mode()
    def margin(self, number: int, place: int, *, seed: int) -> float:
        """How far the two best choices of a text are apart at a place, in logits."""
        prompt, text = self.prompts[number], self.found[number]
        if place >= len(text):
            return math.inf  # one text ends where the other goes on
        model = self.lm.model
        ids = torch.tensor([prompt + text[:place]], device=model.device)
        logits = model(ids).logits[0, -1].float().cpu()
        logits[list(model.config.banned_token_ids)] = -torch.inf
        temperature = self.law.get("temperature", 0.0)
        if not temperature:
            best, second = logits.topk(2).values.tolist()
            return float(best - second)
        noise = gumbel(torch.tensor([noise_key(seed, len(prompt) + place)]), len(logits))[0]
        ranked = logits.sort(descending=True).values
        top_k, edge = self.law.get("top_k"), EDGES[model.dtype]
        shifts = [0]
        if top_k is not None and ranked[top_k - 1] - ranked[top_k] < BOUNDS[model.dtype]:
            shifts += [-1, 1]
        winners, margin = set(), 0.0
        for shift in shifts:
            for extra in (0.0, edge, -edge):
                kept = filtered(
                    logits.double() / temperature,
                    None if top_k is None else top_k + shift,
                    self.law.get("top_p", 1.0) + extra,
                )
                best, second = (kept + noise).topk(2).values.tolist()
                winners.add(int((kept + noise).argmax()))
                if (shift, extra) == (0, 0.0):
                    margin = (best - second) * temperature
        return 0.0 if len(winners) > 1 else margin


def filtered(scores: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """[V]: the slow twin of the filters."""
    ranked, order = scores.sort(descending=True, stable=True)
    if top_k is not None:
        ranked[top_k:] = -torch.inf
    probabilities = ranked.softmax(0)
    before = probabilities.cumsum(0) - probabilities
    ranked[before >= top_p if top_p < 1 else before > 1] = -torch.inf
    return torch.full_like(scores, -torch.inf).scatter(0, order, ranked)


def wavers(lm: TriModeLM, write: Callable[[TriModeLM], Any]) -> int:
    """How many of `NUM_MOVED` copies of a model with slightly other weights write otherwise."""
    generator, expected, found = torch.Generator().manual_seed(0), write(lm), 0
    for _ in range(NUM_MOVED):
        model = copy.deepcopy(lm.model)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight.mul_(1 + MOVED * noise)
        found += write(TriModeLM(model, lm.tokenizer, adapter=lm.adapter)) != expected
    return found


def check_own_law(
    record: Record, name: str, cpu: TriModeLM, lm: TriModeLM, writers: list[Callable[..., Any]]
) -> None:
    """Compare what has a law of its own: each writer's text on the device and on the CPU."""
    moved = [wavers(cpu, write) for write in writers if write(lm) != write(cpu)]
    record.check(
        name,
        all(moved),
        equal=len(writers) - len(moved),
        texts=len(writers),
        num_moved_that_differ=moved,
        of=NUM_MOVED,
    )


def noise(setting: Setting, record: Record) -> None:
    """The bits of the noise, and choices from the same logits."""
    num_tokens = setting.pick(131_072, 4_096)
    seeds = [0, 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, *range(7, setting.pick(40, 9))]
    positions = [0, 1, 31, 4_095, 262_143, 2**31]
    pairs = [(seed, position) for seed in seeds for position in positions]
    done = 0
    for start in range(0, len(pairs), 16):
        if not record.has_time(setting, f"noise of pairs {start} to {len(pairs)}"):
            break
        some = pairs[start : start + 16]
        keys = torch.tensor([noise_key(*pair) for pair in some])
        for name, draw in (("random_words", random_words), ("gumbel", gumbel)):
            mine, theirs = draw(keys.to(setting.device), num_tokens).cpu(), draw(keys, num_tokens)
            num_off = int((mine.view(torch.int64) != theirs.view(torch.int64)).sum())
            if num_off:
                record.check(f"{name} of {some[0]} and on", False, num_off=num_off)
        done += len(some)
    record.check("noise bits", done > 0, pairs=done, vocabulary=num_tokens)
    generator = torch.Generator().manual_seed(0)
    rows = setting.pick(32, 4)
    for law, options in LAWS.items():
        for kind in ("smooth", "ties"):
            logits = 4 * torch.randn(rows, num_tokens, generator=generator)
            if kind == "ties":
                logits = logits.bfloat16().float().mul(2).round().div(2)
            found = [
                choose(
                    logits.clone().to(device),
                    params=[
                        GenerationParams(
                            mode="ar", max_new_tokens=1, block_length=8, seed=i, **options
                        )
                        for i in range(rows)
                    ],
                    positions=list(range(rows)),
                    banned=torch.tensor([2], device=device),
                ).token_ids
                for device in (setting.device, torch.device("cpu"))
            ]
            num_off = sum(a != b for a, b in zip(*found, strict=True))
            # The sum over the law that top-p needs is made in another order there.
            most = rows // 16 if "top_p" in options else 0
            record.check(f"choices, {law}, {kind}", num_off <= most, rows=rows, num_off=num_off)


def tokens(setting: Setting, record: Record) -> None:
    """Texts of every mode."""
    num_tokens, num_prompts = setting.pick(48, 8), setting.pick(16, 2)
    laws = dict(list(LAWS.items())[: setting.pick(len(LAWS), 2)])
    cpu = {name: load(None, torch.float32, drafter=name) for name in (None, DRAFTER)}
    prompts = held_out_prompts(cpu[None], num_prompts)
    for dtype in (torch.float32, torch.bfloat16):
        lms = {name: load(setting, dtype, drafter=name) for name in (None, DRAFTER)}
        short = str(dtype).removeprefix("torch.")
        for law, options in laws.items():
            is_narrow = dtype is not torch.float32
            base = lms[None] if is_narrow else cpu[None]
            reference = Reference.of(base, prompts, options, num_tokens)
            for name, adapter, mode in _cells(with_ar=not is_narrow):
                if setting.is_small and is_narrow and (name == "auto" or law != "greedy"):
                    continue  # its forwards would have to be measured first, which takes seconds
                what = f"{short}, {law}, {name}{', drafter' if adapter else ''}"
                if not record.has_time(setting, what):
                    continue
                lm = lms[adapter]
                found = texts(lm, prompts, max_new_tokens=num_tokens, **mode, **options)
                reference.check(record, what, [one.token_ids for one in found])
                lengths = [n for one in found for n in one.stats.acceptance_lengths]
                if lengths:
                    record.figures[what] = {
                        "acceptance_length": round(sum(lengths) / len(lengths), 3),
                        "lengths_reached": sorted(set(lengths)),
                    }
        if dtype is torch.float32:
            _own_laws(setting, record, cpu, lms, prompts[: setting.pick(8, 2)], num_tokens)


def _cells(*, with_ar: bool) -> Iterator[tuple[str, str | None, Options]]:
    """Names, adapters and options of all that must give the AR view's text."""
    if with_ar:
        yield "ar", None, {"mode": "ar"}
        yield "ar", DRAFTER, {"mode": "ar"}
    for name, mode in LOSSLESS.items():
        yield name, DRAFTER, mode
        if name in ("linear", "branching"):
            yield name, None, mode


def _own_laws(
    setting: Setting,
    record: Record,
    cpu: dict[str | None, TriModeLM],
    lms: dict[str | None, TriModeLM],
    prompts: list[list[int]],
    num_tokens: int,
) -> None:
    """Block diffusion and infilling."""
    for name, mode in DIFFUSION.items():
        for law in ("greedy", "top_p"):
            what = f"float32, {law}, {name}"
            if not record.has_time(setting, what):
                continue

            def writer(number: int, options: Options) -> Callable[[TriModeLM], Any]:
                def write(lm: TriModeLM) -> Any:
                    one = lm.generate(
                        prompts[number], seed=number, max_new_tokens=num_tokens, **options
                    )
                    assert isinstance(one, Generation)
                    return one.token_ids

                return write

            writers = [writer(i, {**mode, **LAWS[law]}) for i in range(len(prompts))]
            check_own_law(record, what, cpu[None], lms[None], writers)
    if record.has_time(setting, "float32, infilling"):
        lines = (HERE / "infill_cases.jsonl").read_text("utf-8").splitlines()
        cases = [json.loads(line) for line in lines[: setting.pick(8, 1)]]

        def filler(case: dict[str, Any]) -> Callable[[TriModeLM], Any]:
            span = (case["start"], case["stop"])
            return lambda lm: lm.infill(case["text"], spans=[span], lengths=[2, 6], seed=1).text

        writers = [filler(case) for case in cases]
        check_own_law(record, "float32, infilling", cpu[None], lms[None], writers)
