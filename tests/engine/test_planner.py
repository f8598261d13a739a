"""Mode `auto`: what it picks on machines and texts of all kinds, simulated and in earnest."""

from __future__ import annotations

import gc
import json
import logging
import math
import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from trimode.decoding import GenerationParams, Sequence
from trimode.decoding.setting import Round, Setting
from trimode.engine import Engine, costs
from trimode.engine.costs import FEWEST_TOKENS, TOKENS, Costs, find_costs, measure
from trimode.engine.planner import MOST_SAVED, PROBE_SHARE, Planner, settings
from trimode.model.adapter import PUBLISHED_FORM, AdapterForm, new_adapter
from trimode.model.corrector import new_corrector
from trimode.runtime import TriModeLM

Cost = Callable[[int, float], float]
Chance = Callable[[int], float]


def free_width(num_rows: int, num_tokens: float) -> float:
    """A machine on which a forward costs the same whatever is in it, within reason."""
    return 10e-3 + 1e-6 * num_tokens


def by_token(num_rows: int, num_tokens: float) -> float:
    """A machine on which every token costs the same."""
    return 1e-3 * num_tokens


def laptop(num_rows: int, num_tokens: float) -> float:
    """About what the default model costs on two cores."""
    return 2.4e-3 + 0.05e-3 * num_rows + 0.2e-3 * num_tokens


@dataclass(eq=False)
class Simulated:
    """A request whose drafts hold by chance: `chance(new tokens so far)` for each position."""

    seq: Sequence
    chance: Chance
    left: list[int] = field(default_factory=list)
    has_draft: bool = False
    used: list[Setting] = field(default_factory=list)


class World:
    """Runs a planner on a machine of given costs, without a network."""

    def __init__(
        self,
        cost: Cost,
        chances: list[Chance],
        *,
        seed: int = 0,
        noise: float = 0.0,
        form: AdapterForm = PUBLISHED_FORM,
    ):
        per_row = cost(2, 2.0) - cost(1, 2.0)
        self.planner = Planner(Costs({t: cost(1, t) for t in TOKENS}, per_row))
        self.cost, self.noise, self.random = cost, noise, random.Random(seed)
        self.requests = [Simulated(simulated_sequence(form=form), chance) for chance in chances]
        self.seconds = 0.0
        self.fixed: Setting | None = None

    def run(self, num_tokens: int) -> float:
        """Until so many tokens were emitted by all together; tokens a second."""
        seconds, start = self.seconds, self.num_new
        while self.num_new - start < num_tokens:
            fed = 0
            for one in self.requests:
                if not one.left:
                    one.seq.setting = self.fixed or self.planner.choose(one.seq)
                    one.used.append(one.seq.setting)
                    one.left = self._forwards(one)
                fed += one.left[0]
            took = self.cost(len(self.requests), fed)
            self.seconds += took
            noisy = took * self.random.lognormvariate(0.0, self.noise)
            self.planner.note_forward([one.seq for one in self.requests], fed, drafts=False)
            self.planner.note_seconds(noisy)
            for one in self.requests:
                one.left.pop(0)
                if not one.left:
                    self._end(one)
        return (self.num_new - start) / (self.seconds - seconds)

    @property
    def num_new(self) -> int:
        return sum(len(one.seq.new_ids) for one in self.requests)

    def _forwards(self, one: Simulated) -> list[int]:
        """Tokens of each forward of the round."""
        setting = one.seq.setting
        if setting.mode == "ar":
            return [1]
        draft = [] if one.has_draft else [1 + setting.draft_len]
        return [*draft, 1 + setting.draft_len + setting.num_groups * setting.group_len]

    def _end(self, one: Simulated) -> None:
        setting, seq = one.seq.setting, one.seq
        num_accepted = num_opened = 0
        if setting.mode == "ar":
            one.has_draft = False
        else:
            chance = one.chance(len(seq.new_ids)) * (0.8 if one.has_draft else 1.0)
            is_fresh, num_checked = not one.has_draft, setting.draft_len
            num_opened = int(is_fresh and setting.num_masks is not None)
            while num_accepted < num_checked and self.random.random() < chance:
                num_accepted += 1
            ends = sorted(
                range(num_checked + 1),
                key=lambda a: -(chance**a) * (1.0 if a == num_checked else 1 - chance),
            )
            one.has_draft = num_accepted in ends[: setting.num_groups]
            seq.latest_round = Round(
                setting, num_checked, num_accepted, one.has_draft, is_fresh, num_opened
            )
        seq.new_ids += [1] * (num_opened + num_accepted + 1)
        seq.length = len(seq.prompt_ids) + len(seq.new_ids) - 1


def simulated_sequence(block_length: int = 8, form: AdapterForm = PUBLISHED_FORM) -> Sequence:
    params = GenerationParams(mode="auto", max_new_tokens=10**6, block_length=block_length, seed=0)
    seq = Sequence([1], params, mask_token_id=0, form=form)
    seq.new_ids.append(1)
    return seq


def usual(used: list[Setting]) -> Setting:
    """What was picked most."""
    return max(set(used), key=used.count)


def best_fixed(
    cost: Cost, chances: list[Chance], num_tokens: int, *, form: AdapterForm = PUBLISHED_FORM
) -> float:
    """Tokens a second of the best setting that is the same for all rounds."""
    rates = []
    for setting in (Setting("ar", 8), *settings(8, form.num_masks)):
        if setting.num_fed <= 16:  # wider ones are far behind on these machines
            world = World(cost, chances, form=form)
            world.fixed = setting
            rates.append(world.run(num_tokens))
    return max(rates)


@pytest.mark.parametrize("num_requests", [1, 8])
@pytest.mark.parametrize("chance", [0.3, 0.9])
def test_wide_forwards_for_free_are_filled(num_requests: int, chance: float) -> None:
    """Prevents: a planner that stays at ar where speculation costs nothing."""
    world = World(free_width, [lambda _: chance] * num_requests, noise=0.1)
    world.run(1000 * num_requests)
    assert all(usual(one.used).mode == "branching" for one in world.requests)
    later = [setting for one in world.requests for setting in one.used[300:]]  # it had to find out
    assert later
    assert not any(setting.mode == "ar" for setting in later)


@pytest.mark.parametrize("num_requests", [1, 8])
@pytest.mark.parametrize("chance", [0.3, 0.98])
def test_tokens_that_cost_their_full_price_are_not_wasted(num_requests: int, chance: float) -> None:
    """Prevents: speculation, or probes of it, where not even a perfect draft pays."""
    world = World(by_token, [lambda _: chance] * num_requests, noise=0.1)
    world.run(500 * num_requests)
    assert {setting.mode for one in world.requests for setting in one.used} == {"ar"}


@pytest.mark.parametrize("num_requests", [1, 4, 16])
@pytest.mark.parametrize("chance", [0.2, 0.6, 0.95])
def test_auto_is_close_to_the_best_fixed_setting(num_requests: int, chance: float) -> None:
    """Prevents: a choice that is wrong for the machine, the text or the number of requests."""
    chances: list[Chance] = [lambda _: chance] * num_requests
    world = World(laptop, chances, noise=0.1)
    world.run(300 * num_requests)
    assert world.run(4000) > 0.95 * best_fixed(laptop, chances, 4000)


SKIPPING = AdapterForm(draft_forms=("skip",), num_masks=6)


@pytest.mark.parametrize("num_requests", [1, 8])
@pytest.mark.parametrize("chance", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("cost", [laptop, free_width])
def test_masks_that_skip_the_bonus_are_planned_as_well(
    num_requests: int, chance: float, cost: Cost
) -> None:
    """Prevents: a planner that does not know that a forward which drafts gives a token too, or
    that counts the draft of such a setting as a block's."""
    chances: list[Chance] = [lambda _: chance] * num_requests
    world = World(cost, chances, noise=0.1, form=SKIPPING)
    world.run(400 * num_requests)
    used = {setting for one in world.requests for setting in one.used}
    assert all(setting.mode == "ar" or setting.num_masks for setting in used)
    assert world.run(4000) > 0.93 * best_fixed(cost, chances, 4000, form=SKIPPING)


def test_a_text_that_changes_is_followed() -> None:
    """Prevents: what a text was like at its start deciding for all of it."""
    chances: list[Chance] = [lambda num_new: 0.97 if num_new // 600 % 2 else 0.1]
    world = World(laptop, chances)
    assert world.run(6000) > 1.1 * best_fixed(laptop, chances, 6000)
    modes = [setting.mode for setting in world.requests[0].used]
    assert modes.count("ar") > 1000
    assert modes.count("linear") + modes.count("branching") > 300


def test_requests_of_two_kinds_are_told_apart() -> None:
    """Prevents: one setting for all, by what drafts are worth on average."""
    chances: list[Chance] = [lambda _: 0.02, lambda _: 0.98]
    world = World(laptop, chances)
    world.run(2000)
    hard, easy = world.requests
    assert usual(hard.used[-100:]).num_fed <= 2
    assert usual(easy.used[-100:]).block_length == 8


def test_a_batch_that_empties_is_noticed() -> None:
    """Prevents: a request going on as was right among 31 others."""
    world = World(laptop, [lambda _: 0.9] * 32)
    world.run(3000)
    assert {usual(one.used[-20:]).mode for one in world.requests} == {"ar"}
    del world.requests[1:]
    world.run(400)
    assert usual(world.requests[0].used[-20:]).block_length == 8


@pytest.mark.parametrize("chance", [0.5, 0.6, 0.66])
def test_it_does_not_flap_near_the_break_even(chance: float) -> None:
    """Prevents: noise in what is accepted and in what forwards take deciding the mode."""
    world = World(laptop, [lambda _: chance], noise=0.3)
    world.run(500)
    start, used = world.planner.num_switches, world.requests[0].used
    del used[:]
    world.run(8000)
    assert world.planner.num_switches - start <= 8 * len(used) / 1000


def test_drafts_that_never_hold_cost_what_probes_may() -> None:
    """Prevents: probes without a bound, and requests that are never probed."""
    chances: list[Chance] = [lambda _: 0.0] * 4
    world = World(laptop, chances)
    world.run(1000)
    assert usual(world.requests[0].used).mode == "ar"
    start = world.planner.num_probes
    rate = world.run(8000)
    assert world.planner.num_probes - start > 10
    world.fixed = Setting("ar", 8)
    assert rate > (1 - PROBE_SHARE - 0.005) * world.run(2000)


def test_a_probe_that_never_ran_is_paid_back() -> None:
    """Prevents: a request whose mode changes just before its probe bringing down the engine, or
    using up the time for probes."""
    world = World(laptop, [lambda _: 0.0])
    world.run(500)
    [one] = world.requests
    start = world.planner.num_probes
    for _ in range(200):
        world.planner.note_forward([one.seq], 1, drafts=False)
    found = [world.planner.choose(one.seq) for _ in range(100)]  # and each time it is asked anew
    assert {setting.mode for setting in found} <= {"ar", "linear"}
    assert world.planner.num_probes - start > MOST_SAVED


def test_settings_stay_within_what_a_row_was_measured_for() -> None:
    """Prevents: a round that is wider than the row of its request."""
    for block_length in (2, 3, 5, 8, 32):
        widest = simulated_sequence(block_length).params.setting("auto").num_fed
        found = settings(block_length)
        assert max(setting.num_fed for setting in found) <= widest
        assert {setting.block_length for setting in found} >= {2, block_length}
        assert len(set(found)) == len(found)
    for num_masks in (1, 2, 5, 8):
        form = AdapterForm(draft_forms=("skip",), num_masks=num_masks)
        widest = simulated_sequence(32, form).params.setting("auto", form).num_fed
        found = settings(32, num_masks)
        assert max(setting.num_fed for setting in found) <= widest
        assert {setting.num_masks for setting in found} >= {1, num_masks}
    for block_length in (2, 3, 32):  # more masks than a block has
        params = GenerationParams(
            mode="auto", max_new_tokens=1, block_length=block_length, seed=0, skip_masks=12
        )
        widest = params.setting("auto").num_fed
        assert max(setting.num_fed for setting in settings(block_length, 12)) == widest


def test_a_dropped_request_is_forgotten() -> None:
    """Prevents: a planner that keeps every request it ever saw."""
    world = World(laptop, [lambda _: 0.5])
    world.run(50)
    seen = weakref.ref(world.requests.pop().seq)
    gc.disable()
    try:
        assert seen() is None
    finally:
        gc.enable()


def flat(seconds: float) -> Costs:
    return Costs({tokens: seconds * tokens for tokens in TOKENS})


def test_costs_between_and_beyond_what_was_measured() -> None:
    """Prevents: jumps between points, and large batches for free."""
    found = flat(1e-3)
    for num_rows, num_tokens in ((1, 1), (3, 7), (5, 5), (12, 100), (40, 90), (32, 5000)):
        assert found.seconds_of(num_rows, num_tokens) == pytest.approx(1e-3 * num_tokens)
    with_rows = Costs(found.seconds, 0.5e-3)
    assert with_rows.seconds_of(3, 7) == pytest.approx(8e-3)


def test_costs_learn_slowly_and_survive_outliers() -> None:
    """Prevents: one stall, or a machine that slows down, looking like a dear setting."""
    found = flat(1e-3)
    found.note(4, 16, 10.0)
    found.note(4, 16, 1e-9)
    assert found.seconds_of(4, 16) == pytest.approx(16e-3, rel=0.02)
    for _ in range(500):  # three times slower, all of it alike
        found.note(4, 16, 3 * 16e-3)
        found.note(4, 4, 3 * 4e-3)
    assert found.seconds_of(4, 16) / found.seconds_of(4, 4) == pytest.approx(4.0, rel=0.05)
    for _ in range(500):  # one point dearer than it was measured
        found.note(4, 16, 2 * 16e-3)
        found.note(4, 4, 4e-3)
    assert found.seconds_of(4, 16) / found.seconds_of(4, 4) > 6


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_machine_that_changes_is_no_news_about_drafts(factor: float) -> None:
    """Prevents: drafts that look dear or cheap since the memory became slower while nobody drafted,
    and a planner that never tries them again."""
    found = Costs({tokens: 10e-3 for tokens in TOKENS})
    for _ in range(300):
        found.note(2, 2, factor * 10e-3)
    assert 0.65 < found.seconds_of(2, 8) / found.seconds_of(2, 2) < 1.5


def test_a_gap_beside_it_does_not_stop_auto() -> None:
    """Prevents: a division by zero where what runs beside emits nothing, as an infill does."""
    world = World(laptop, [lambda _: 0.5])
    [one] = world.requests
    gap = simulated_sequence()
    gap.mode, gap.new_ids = "linear", []
    gap.stats.count("denoise", 4)
    for _ in range(100):
        one.seq.setting = world.planner.choose(one.seq)
        world.planner.note_forward([one.seq, gap], 5, drafts=False)
        world.planner.note_seconds(laptop(2, 5))
    assert world.planner.choose(one.seq).mode in ("ar", "linear", "branching")


def test_costs_learn_what_is_done_around_drafts() -> None:
    """Prevents: speculation that looks quick at lengths that were not tried yet, since only the
    one that was tried is known to be dearer than measured."""
    found = Costs({tokens: 10e-3 for tokens in TOKENS})
    for _ in range(200):
        found.note(1, 1, 10e-3)
        found.note(1, 4, 13e-3)
    assert found.seconds_of(1, 1) == pytest.approx(10e-3, rel=0.06)
    for num_tokens in (3, 6, 12):
        assert found.seconds_of(1, num_tokens) == pytest.approx(13e-3, rel=0.1)


def test_a_probe_looks_nothing_up() -> None:
    """Prevents: a draft from the text taken for the drafter's, so that probes never end; and a gain
    below the least that was asked for."""
    planner = Planner(Costs({tokens: 10e-3 for tokens in TOKENS}))
    params = GenerationParams(mode="auto", block_length=8, seed=0, max_new_tokens=900, min_gain=0.3)
    seq = Sequence([1, 2], params, mask_token_id=9)
    found = []
    for _ in range(600):
        found.append(planner.choose(seq))
        if found[-1].mode != "ar":
            seq.latest_round = Round(found[-1], found[-1].draft_len, 0, False, True)
        planner.note_forward([seq], 1, drafts=False)
        planner.note_seconds(10e-3)
    probes = [setting for setting in found if not setting.has_lookup]
    assert probes
    assert len(probes) < 60
    assert all(setting.min_gain == 0.3 for setting in found)


def test_nothing_is_drafted_in_mere_hope() -> None:
    """Prevents: a model that nobody taught to draft, slowed down for its first requests."""
    planner = Planner(Costs({tokens: 10e-3 + 1e-4 * tokens for tokens in TOKENS}))
    params = GenerationParams(mode="auto", block_length=8, seed=0, max_new_tokens=900)
    seq = Sequence([1, 2], params, mask_token_id=9)
    num_drafting = 0
    for _ in range(400):
        setting = planner.choose(seq)
        num_drafting += setting.mode != "ar"
        if setting.mode != "ar":
            seq.latest_round = Round(setting, setting.draft_len, 0, False, True)
        planner.note_forward([seq], 1, drafts=False)
        planner.note_seconds(10e-3)
    assert num_drafting < 40


def test_what_drafting_costs() -> None:
    """Prevents: the adapter's time in the price of forwards that only verify."""
    found = Costs({tokens: 10e-3 for tokens in TOKENS}, drafting=5e-3)
    assert found.seconds_of(1, 4) == pytest.approx(10e-3)
    assert found.seconds_of(1, 4, drafting=0.5) == pytest.approx(12.5e-3)
    for _ in range(300):
        found.note(1, 4, 10e-3)
        found.note(1, 4, 15e-3, drafting=True)
    assert found.seconds_of(1, 4) == pytest.approx(10e-3, rel=0.05)
    assert found.seconds_of(1, 4, drafting=1.0) == pytest.approx(15e-3, rel=0.05)


@pytest.mark.parametrize(("drafting", "mode"), [(0.0, "branching"), (50e-3, "ar")])
def test_the_price_of_drafting_is_part_of_the_choice(drafting: float, mode: str) -> None:
    """Prevents: an adapter that is dear to turn on, turned on in every forward."""
    form = AdapterForm(draft_forms=("skip",), num_masks=5, acceptance=((0.8, 0.8, 0.8, 0.8, 0.8),))
    planner = Planner(Costs({tokens: 10e-3 for tokens in TOKENS}, drafting=drafting), form)
    params = GenerationParams(mode="auto", block_length=8, seed=0, max_new_tokens=100)
    seq = Sequence([1, 2], params, mask_token_id=9, form=form)
    setting = planner.choose(seq)
    assert setting.mode == mode
    assert 0 <= setting.min_gain < 0.01  # one more token costs nothing here


def test_a_token_has_to_bring_what_it_costs() -> None:
    """Prevents: unlikely drafts fed where forwards cost by the token."""
    form = AdapterForm(draft_forms=("skip",), num_masks=5, acceptance=((0.9, 0.9, 0.9, 0.9, 0.9),))
    seconds = {tokens: 8e-3 + 1e-3 * tokens for tokens in TOKENS}
    planner = Planner(Costs(seconds), form)
    params = GenerationParams(mode="auto", block_length=8, seed=0, max_new_tokens=100)
    setting = planner.choose(Sequence([1, 2], params, mask_token_id=9, form=form))
    assert setting.mode != "ar"
    assert 0.1 < setting.min_gain < 0.3  # a ms of some 13, in which two or three are emitted
    given = replace(params, min_gain=0.5)
    setting = planner.choose(Sequence([1, 2], given, mask_token_id=9, form=form))
    assert setting.min_gain == 0.5


def test_measuring_is_bounded_and_complete(tiny_model: Callable[..., Any]) -> None:
    """Prevents: a large model that measures for minutes, and short forwards that are unknown."""
    found, _ = measure(tiny_model(torch.float32), limit_s=0.0)
    assert list(found.seconds) == [tokens for tokens in TOKENS if tokens <= FEWEST_TOKENS]
    assert all(seconds > 0 for seconds in found.seconds.values())
    assert found.seconds[FEWEST_TOKENS] >= found.seconds[1]
    assert found.seconds_of(32, 32) >= found.seconds_of(1, 32)


@pytest.fixture
def measured(
    tiny_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, Path]:
    """A model whose costs were measured on a calm machine, and the file they are in."""

    def measure_calmly(*args: Any, **options: Any) -> Any:
        return measure(*args, **options)[0], True

    monkeypatch.setattr(costs, "measure", measure_calmly)
    monkeypatch.setattr(costs, "LIMIT_S", 0.05)
    model = tiny_model(torch.float32, tie_word_embeddings=True)
    find_costs(model, folder=tmp_path / "new")
    [path] = (tmp_path / "new").iterdir()
    return model, path


def test_costs_are_measured_once(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: measuring at every start, and a file taken for another model's."""
    model, path = measured
    kept = path.read_text()
    with monkeypatch.context() as patched:
        patched.setattr(costs, "measure", None)
        again = find_costs(model, folder=path.parent).seconds
    assert [list(point) for point in again.items()] == json.loads(kept)["seconds"]
    model.pack("native")
    find_costs(model, folder=path.parent / "other")
    assert path.name not in [one.name for one in (path.parent / "other").iterdir()]


def test_costs_are_those_of_the_adapter_that_drafts(tiny_model: Callable[..., Any]) -> None:
    """Prevents: costs measured with an adapter that is on for drafts taken for one that is not."""
    model, keys = tiny_model(torch.float32), []
    for views in (("draft",), ("denoise",)):
        for rank in (None, 2, 4):
            adapter = new_adapter(
                model.encoder.layers,
                rank=2,
                alpha=2.0,
                targets=("o_proj",),
                seed=0,
                form=AdapterForm(views),
                corrector=None
                if rank is None
                else new_corrector(64, rank=rank, num_candidates=4, seed=0),
            )
            keys.append(json.dumps(costs._key(model, adapter)))
    assert len(set(keys)) == 4  # all that are off for drafts cost alike


def _foreign(text: str) -> str:
    return text.replace('"hidden_size": 64', '"hidden_size": 65')


DAMAGE: list[Callable[[str], str]] = [
    lambda text: text[: len(text) // 2],
    lambda text: "",
    lambda text: "[]",
    lambda text: json.dumps({**json.loads(text), "seconds": json.loads(text)["seconds"][1:]}),
    lambda text: json.dumps({**json.loads(text), "seconds": [[t, -1.0] for t in TOKENS]}),
    lambda text: json.dumps({**json.loads(text), "per_row": -1.0}),
    lambda text: json.dumps({**json.loads(text), "drafting": math.inf}),
    lambda text: json.dumps({**json.loads(text), "seconds": None}),
    _foreign,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_measured_again(
    measured: Any, caplog: pytest.LogCaptureFixture, damage: Callable[[str], str]
) -> None:
    """Prevents: a server that does not start, or plans by nonsense, for half a file."""
    model, path = measured
    path.write_text(damage(path.read_text()))
    with caplog.at_level(logging.WARNING):
        find_costs(model, folder=path.parent)
    [record] = caplog.records
    assert "measuring again" in record.message
    assert json.loads(path.read_text())["key"]["hidden_size"] == 64
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_folder_that_cannot_be_written_is_no_error(
    measured: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents: no decoding where there is no home to write to."""
    model, path = measured
    with caplog.at_level(logging.WARNING):
        assert find_costs(model, folder=path / "below_a_file").seconds
    assert "cannot keep" in caplog.text


def test_a_disturbed_measurement_is_not_kept(
    measured: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Prevents: a busy moment deciding for every later run."""
    model, path = measured
    quick = costs.measure
    monkeypatch.setattr(costs, "measure", lambda *args, **o: (quick(*args, **o)[0], False))
    with caplog.at_level(logging.WARNING):
        find_costs(model, folder=path.parent / "other")
    assert "disturbed" in caplog.text
    assert not (path.parent / "other").exists()


LAWS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 20},
    {"temperature": 1.0, "repetition_penalty": 1.3, "logit_bias": {5: 2.0}},
    {"temperature": 1.0, "frequency_penalty": -0.6, "min_p": 0.02, "min_tokens": 9},
    {"temperature": 1.0, "regex": "[ab]{3}[cd]{40}"},
    {"temperature": 0.7, "draft_cutoff": 0.3},
    {"temperature": 0.7, "skip_masks": 4},
    {"skip_masks": 3, "lookup": True},
]


class Restless:
    """Picks anything of what there is, anew for every round."""

    def __init__(self) -> None:
        self._random = random.Random(0)

    def choose(self, seq: Sequence) -> Setting:
        length = seq.params.block_length
        num_masks = seq.params.setting("auto", seq.form).num_masks
        found = self._random.choice([Setting("ar", length), *settings(length, num_masks)])
        return replace(found, min_gain=self._random.choice([0.0, 0.02, 0.2]))

    def note_forward(self, fed: Any, num_tokens: int, *, drafts: bool) -> None:
        pass

    def note_seconds(self, seconds: float) -> None:
        pass


@pytest.fixture(scope="module")
def lm(
    tiny_model: Callable[..., Any], random_adapter: Callable[..., Any], byte_tokenizer: Any
) -> TriModeLM:
    model = tiny_model(torch.float64)
    return TriModeLM(model, byte_tokenizer, adapter=random_adapter(model))


@pytest.mark.parametrize("is_restless", [True, False])
def test_auto_writes_what_ar_writes(lm: TriModeLM, is_restless: bool) -> None:
    """Prevents: a text that shows when modes changed, in batches of all modes, with prompts fed in
    pieces and rows taken away."""
    planner: Any = Restless() if is_restless else World(free_width, []).planner
    prompts = ["ab", "once upon a time", "x" * 40]
    engine = Engine(
        *(lm.model,),
        **{"num_rows": 3, "num_cells": 256, "adapter": lm.adapter, "planner": planner},
        **{"token_budget": 24, "time_slice": 7},
    )
    made = []
    for number, law in enumerate(LAWS):
        for prompt in prompts:
            common: dict[str, Any] = {**law, "max_new_tokens": 24, "seed": number}
            plain = {**common, "draft_cutoff": None, "skip_masks": None, "lookup": None}
            expected = lm.generate(prompt, mode="ar", **plain)
            made.append((lm.prepare(prompt, mode="auto", **common), expected))
    others = [
        lm.prepare("cde", mode=mode, max_new_tokens=30) for mode in ("diffusion", "branching")
    ]
    for seq in [made[0][0], *others, *(seq for seq, _ in made[1:])]:
        engine.submit(seq)
    engine.run()
    for seq, expected in made:
        assert not isinstance(expected, list)
        assert seq.new_ids == expected.token_ids, seq.params
    assert engine.counts.preemptions
    for kind, least in {"draft": 6 if is_restless else 2, "verify": 6, "decode": 6}.items():
        assert sum(seq.stats.forwards[kind] for seq, _ in made) >= least


def test_generate_and_stream_have_a_planner(
    lm: TriModeLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents: a mode that only an engine made by hand can run; a measurement for each call."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(costs, "LIMIT_S", 0.05)
    options: dict[str, Any] = {"max_new_tokens": 20, "seed": 1, "temperature": 1.0}
    expected = lm.generate("abc", mode="ar", **options)
    found = lm.generate(["abc", "abc"], mode="auto", **options)
    assert isinstance(found, list)
    assert not isinstance(expected, list)
    assert [one.text for one in found] == [expected.text] * 2
    planner = lm.planner
    assert "".join(lm.stream("abc", mode="auto", **options)) == expected.text
    assert lm.planner is planner
    assert all(one.name.startswith("costs_") for one in (tmp_path / "trimode").glob("*"))
