"""Adapters and serving of `gpu_check.py`: what is on where, and many requests side by side."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from drafting_record import first_difference
from gpu_record import Record, Setting
from gpu_tokens import DRAFTER, LOSSLESS, Options, Reference, held_out_prompts, load, texts, wavers
from torch import Tensor

from trimode.decoding.step import Group, Step, causal_step, group_step
from trimode.engine import Engine
from trimode.engine.runner import Feed, Runner
from trimode.model import AdapterSwitch, DrafterAdapter, RowAttention, TriModeModel
from trimode.model.adapter import TARGETS, VIEWS, AdapterForm, new_adapter
from trimode.model.attention import RowFeed
from trimode.model.corrector import Corrector
from trimode.runtime import Generation, TriModeLM
from trimode.serving.engine_thread import EngineThread, Ticket

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Norm of a difference of logits over that of the reference."""

Answers = list[Tensor]


def random_adapter(model: TriModeModel) -> DrafterAdapter:
    """On every linear layer, in both views and forms, with mask embeddings and a corrector."""
    generator = torch.Generator().manual_seed(3)
    hidden, table = model.config.hidden_size, model.encoder.embed_tokens.weight.detach()
    before, state, candidate = (torch.randn(4, hidden, generator=generator) for _ in range(3))
    adapter = new_adapter(
        model.encoder.layers,
        rank=4,
        alpha=4,
        targets=TARGETS,
        seed=3,
        form=AdapterForm(
            views=VIEWS, adapts_clean=False, draft_forms=("skip", "block"), num_masks=4
        ),
        mask_embeddings=torch.randn(3, hidden, generator=generator) * float(table.float().std()),
        corrector=Corrector(before, 0.1 * state, candidate, num_candidates=16),
    )
    with torch.no_grad():
        for _, _, pair in adapter.items():
            pair.up.copy_(torch.randn(pair.up.shape, generator=generator) * len(pair.up) ** -0.5)
    weight = model.encoder.embed_tokens.weight
    return adapter.to(device=weight.device, dtype=weight.dtype).eval().requires_grad_(False)


def mixed_step(ids: list[int], length: int, form: AdapterForm, mask_token_id: int) -> Step:
    """Three trunk tokens behind `length` committed ones, then a block and masks that skip one."""
    trunk = causal_step("verify", ids[length : length + 3], start=length, wanted=range(3))
    block = Group(
        [ids[length + 1], *[mask_token_id] * 4], [False, *[True] * 4], length + 1, length, range(5)
    )
    skip = Group([mask_token_id] * 4, [True] * 4, length + 4, length + 2, range(4))
    return group_step("verify", [block, skip], form=form, trunk=trunk, wants_runner_up=True)


@dataclass
class Row:
    """One K/V row of a network with some tokens committed, on which a step can be run."""

    lm: TriModeLM
    ids: list[int]
    length: int

    def __post_init__(self) -> None:
        self.cache = self.lm.model.new_cache(num_rows=1, num_cells=len(self.ids) + 32)
        ids = self.ids[: self.length]
        self.logits(causal_step("prefill", ids, start=0, wanted=()), None, length=0)

    @torch.inference_mode()
    def logits(self, step: Step, adapter: DrafterAdapter | None, *, length: int) -> Tensor:
        """[T, V] float32 on the CPU: of every fed token."""
        model, device = self.lm.model, self.cache.keys.device
        feed = RowFeed(
            *(0, length), groups=step.groups, positions=step.positions, anchors=step.anchors
        )
        hidden = model.encode(
            torch.tensor(list(step.token_ids), device=device),
            torch.tensor(list(step.positions), device=device),
            attend=RowAttention(self.cache, [feed]),
            adapter=AdapterSwitch.of(
                adapter, list(step.is_drafter_on), list(step.mask_places), device=device
            ),
        )
        return model.diffusion_head(hidden).float().cpu()

    def readout(self, step: Step, adapter: DrafterAdapter | None) -> list[int]:
        """What a runner chooses, greedily."""
        seq = TriModeLM(self.lm.model, self.lm.tokenizer, adapter=adapter).prepare(
            self.ids[: self.length], mode="linear", max_new_tokens=8, seed=0
        )
        seq.length = self.length
        found = Runner(self.lm.model, self.cache, adapter=adapter).run([Feed(seq, 0, step)])[0]
        assert found is not None
        return found.token_ids


def adapters(setting: Setting, record: Record) -> None:
    """Switching changes the logits where the adapter is on, and no bit of the AR view."""
    cpu = load(None, torch.float32)
    ids = held_out_prompts(cpu, 4)[-1]
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        for name in (DRAFTER, "random"):
            what = f"{short}, {name}"
            if not record.has_time(setting, what):
                continue
            lm = load(setting, dtype, drafter=None if name == "random" else name)
            here, there = lm.adapter, load(None, torch.float32, drafter=DRAFTER).adapter
            if name == "random":
                here, there = random_adapter(lm.model), random_adapter(cpu.model)
            assert here is not None
            plain = TriModeLM(lm.model, lm.tokenizer)
            _switched(record, what, Row(plain, ids, 16), here, Row(cpu, ids, 16), there)
            _written(setting, record, what, plain, TriModeLM(lm.model, lm.tokenizer, adapter=here))


def _switched(
    record: Record,
    what: str,
    row: Row,
    adapter: DrafterAdapter,
    cpu: Row,
    cpu_adapter: DrafterAdapter | None,
) -> None:
    """One forward, off, on and off again."""
    mask_token_id = row.lm.model.config.mask_token_id
    step = mixed_step(row.ids, row.length, adapter.form, mask_token_id)
    off, on, again = (row.logits(step, a, length=row.length) for a in (None, adapter, None))
    is_trunk = torch.tensor(step.groups) == 0
    is_on = torch.tensor(step.is_drafter_on)
    record.check(f"{what}: no bit of the trunk changes", torch.equal(on[is_trunk], off[is_trunk]))
    record.check(f"{what}: nothing of it stays", torch.equal(off, again))
    moved = (on - off).norm(dim=1) / off.norm(dim=1)
    least = float(moved[is_on].min())
    record.check(f"{what}: every token it is on for changes", least > 1e-3, least=least)
    close = CLOSE[row.lm.model.dtype]
    for name, mine, own in (("off", off, None), ("on", on, cpu_adapter)):
        theirs = cpu.logits(step, own, length=cpu.length)
        off_by = float((mine - theirs).norm() / theirs.norm())
        record.check(f"{what}: {name}, as on the CPU", off_by < close, off_by=off_by, bound=close)
    if adapter.corrector is None:
        return
    corrector, adapter.corrector = adapter.corrector, None
    without = row.readout(step, adapter)
    adapter.corrector = corrector
    corrected, num_trunk = row.readout(step, adapter), int(is_trunk.sum())
    record.check(
        f"{what}: the corrector changes drafts, and the trunk's answers not",
        corrected[:num_trunk] == without[:num_trunk] and corrected != without,
        num_changed=sum(a != b for a, b in zip(corrected, without, strict=True)),
        drafts=len(corrected) - num_trunk,
    )
    if row.lm.model.dtype is torch.float32:
        theirs = cpu.readout(step, cpu_adapter)
        num_off = sum(a != b for a, b in zip(corrected, theirs, strict=True))
        record.check(f"{what}: corrected drafts as on the CPU", num_off <= 1, num_off=num_off)


def _written(
    setting: Setting, record: Record, what: str, plain: TriModeLM, adapted: TriModeLM
) -> None:
    """Texts with an adapter and without."""
    prompts, num_tokens = held_out_prompts(plain, setting.pick(8, 2)), setting.pick(32, 8)
    for law in ({}, {"temperature": 0.8, "top_p": 0.9}):
        kind = f"{what}, {'sampled' if law else 'greedy'}"
        ar = [
            texts(lm, prompts, mode="ar", max_new_tokens=num_tokens, logprobs=3, **law)
            for lm in (plain, adapted)
        ]
        pairs = [[(one.token_ids, one.logprobs) for one in found] for found in ar]
        record.check(f"{kind}: ar and its log-probabilities are the same bits", *_equal(pairs))
        reference = Reference(plain, prompts, [one.token_ids for one in ar[0]], law)
        for name in ("linear", "branching"):
            found = texts(adapted, prompts, max_new_tokens=num_tokens, **LOSSLESS[name], **law)
            reference.check(record, f"{kind}, {name}", [one.token_ids for one in found])
    if "denoise" in adapted.form.views:
        found = [texts(lm, prompts, mode="diffusion", max_new_tokens=8) for lm in (plain, adapted)]
        ids = [[one.token_ids for one in some] for some in found]
        record.check(f"{what}: block diffusion changes with it", ids[0] != ids[1])


def _equal(pairs: list[Any]) -> tuple[bool]:
    return (pairs[0] == pairs[1],)


SPECS: tuple[Options, ...] = (
    {"mode": "ar"},
    {"mode": "ar", "temperature": 0.8, "top_p": 0.9},
    {"mode": "linear"},
    {"mode": "linear", "block_length": 4, "temperature": 0.8, "top_p": 0.95},
    {"mode": "branching", "branches": 2, "temperature": 1.0},
    {"mode": "quadratic", "block_length": 4},
    {"mode": "auto"},
    {"mode": "auto", "temperature": 0.7, "top_k": 40},
    {"mode": "diffusion", "threshold": 0.6},
    {"mode": "diffusion", "steps": 3, "temperature": 0.6},
)
_LAW = ("temperature", "top_p", "top_k")
TIMEOUT_S = 20.0


@dataclass
class Load:
    """What became of the requests.

    Attributes:
        counts: By what became of them.
        failures: What must not have happened.
        others: Prompt, spec and text of those that differ from the text alone.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    others: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    num_tokens: int = 0


def serving(setting: Setting, record: Record) -> None:
    """Mixed modes on the thread that a server runs, two thirds in float32 and one in bfloat16."""
    record.figures["how"] = (
        "trimode.serving.engine_thread, which decodes for the server; asyncio clients submit to it"
        " without HTTP"
    )
    started_s = time.monotonic()
    prompts: list[list[int]] = []
    for dtype, share in ((torch.float32, 0.62), (torch.bfloat16, 1.0)):
        name = str(dtype).removeprefix("torch.")
        if not record.has_time(setting, name):
            continue
        lm = load(setting, dtype, drafter=DRAFTER)
        prompts = prompts or held_out_prompts(lm, setting.pick(3, 2))
        num_tokens = setting.pick(40, 8)
        alone = {
            (i, j): _alone(lm, prompt, i, spec, num_tokens)
            for i, prompt in enumerate(prompts)
            for j, spec in enumerate(SPECS)
        }
        until_s = started_s + share * (setting.until_s - started_s)
        if setting.is_small:
            until_s = min(until_s, time.monotonic() + 4)
        planner = lm.planner
        engine = Engine(
            lm.model,
            num_rows=setting.pick(12, 4),
            num_cells=512,
            adapter=lm.adapter,
            token_budget=256,
            time_slice=16,
            planner=planner,
        )
        thread, load_s = EngineThread(engine), time.monotonic()
        try:
            clients = setting.pick(24, 8)
            found = asyncio.run(
                _under_load(lm, thread, prompts, alone, until_s, clients, num_tokens)
            )
            is_whole = thread.is_alive and engine.num_running == engine.num_waiting == 0
        finally:
            thread.stop()
        seconds = time.monotonic() - load_s
        counts = engine.counts
        record.check(
            f"{name}: all finish without an error",
            not found.failures and is_whole,
            failures=found.failures[:5],
            **found.counts,
        )
        record.check(
            f"{name}: rows were preempted and prefixes reused",
            setting.is_small or (counts.preemptions > 0 and counts.reused_tokens > 0),
        )
        record.figures[name] = {
            "seconds": round(seconds, 1),
            "requests": sum(found.counts.values()),
            "tokens_per_second": round(found.num_tokens / seconds, 1),
            "forwards": counts.forwards,
            "tokens_fed": counts.tokens_fed,
            "preemptions": counts.preemptions,
            "reused_tokens": counts.reused_tokens,
        }
        _judge(record, name, lm, prompts, alone, found)


def _alone(lm: TriModeLM, prompt: list[int], seed: int, spec: Options, num_tokens: int) -> Any:
    found = lm.generate(prompt, seed=seed, max_new_tokens=num_tokens, ignore_eos=True, **spec)
    assert isinstance(found, Generation)
    return found.token_ids


async def _under_load(
    lm: TriModeLM,
    thread: EngineThread,
    prompts: list[list[int]],
    alone: dict[tuple[int, int], list[int]],
    until_s: float,
    num_clients: int,
    num_tokens: int,
) -> Load:
    """Clients side by side; one in six leaves in the middle."""
    load, chance = Load(), random.Random(0)

    async def client(number: int) -> None:
        while time.monotonic() < until_s:
            await asyncio.sleep(chance.uniform(0, 0.05))
            key = chance.choice(list(alone))
            ticket = Ticket(client=f"client {number}", timeout_s=None)
            ticket.seq = seq = lm.prepare(
                prompts[key[0]],
                seed=key[0],
                max_new_tokens=num_tokens,
                ignore_eos=True,
                **SPECS[key[1]],
            )
            leaves_at = chance.randrange(num_tokens) if number % 6 == 0 else num_tokens + 1
            thread.submit(ticket)
            try:
                while not ticket.is_over and ticket.num_ready < leaves_at:
                    await asyncio.wait_for(ticket.changed.wait(), TIMEOUT_S)
                    ticket.changed.clear()
            except TimeoutError:
                load.failures.append(f"{SPECS[key[1]]}: no token in {TIMEOUT_S:.0f} s")
                thread.abort(ticket)
                return
            load.num_tokens += len(seq.new_ids)
            if not ticket.is_over:
                thread.abort(ticket)
                load.counts["left"] += 1
            elif ticket.error is not None or seq.finish_reason != "length":
                why = f"{ticket.error!r}, {seq.finish_reason}, {seq.abort_reason}"
                load.failures.append(f"{SPECS[key[1]]}: {why}")
            elif seq.new_ids == alone[key]:
                load.counts["right"] += 1
            else:
                load.counts["other"] += 1
                load.others[key] = list(seq.new_ids)

    await asyncio.gather(*(client(number) for number in range(num_clients)))
    while thread.is_alive and not thread.engine.is_idle:
        await asyncio.sleep(0.01)
    return load


def _judge(
    record: Record,
    name: str,
    lm: TriModeLM,
    prompts: list[list[int]],
    alone: dict[tuple[int, int], list[int]],
    found: Load,
) -> None:
    """Texts that differ from those alone: by a near tie, or not."""
    for (i, j), text in found.others.items():
        spec, expected = SPECS[j], alone[i, j]
        place = first_difference(expected, text)
        assert place is not None
        if spec["mode"] != "diffusion":
            law = {key: spec[key] for key in _LAW if key in spec}
            reference = Reference(lm, {i: prompts[i]}, {i: expected}, law)  # type: ignore[arg-type]
            margin, bound = reference.margin(i, place, seed=i), reference.bound
            record.check(f"{name}: {spec}, prompt {i}", margin <= bound, margin=margin, bound=bound)
        elif lm.model.dtype is torch.float32:
            write = partial(_alone, prompt=prompts[i], seed=i, spec=spec, num_tokens=len(expected))
            num = wavers(lm, write)
            record.check(f"{name}: {spec}, prompt {i}", num > 0, num_moved_that_differ=num)
        else:
            record.figures.setdefault(f"{name}: block diffusion differs", []).append([i, j, place])
