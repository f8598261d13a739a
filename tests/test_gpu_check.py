"""benchmarks/gpu_check.py: its rehearsal on the CPU, and that its checks can fail."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.other_device import DEVICE, other_device
from trimode.runtime import TriModeLM

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = [[65, 66, 67], [70, 71, 72, 73]]


@pytest.fixture(scope="module")
def part() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of the benchmarks."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def lm(tiny_model: Callable[..., Any]) -> TriModeLM:
    return TriModeLM(tiny_model(torch.float32), None)


@pytest.mark.process
def test_rehearsal(tmp_path: Path) -> None:
    """Prevents: a part that only works where nobody can look, or that fails or skips in silence."""
    output = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--small"]
    done = subprocess.run(
        [*command, "--output", str(output)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(output.read_text())
    parts = record["parts"]
    names = ["noise", "tokens", "adapters", "serving", "training", "speed"]
    assert list(parts) == names
    for name, found in parts.items():
        assert found["status"] == "pass", (name, found)
        assert found["checks"], name
        assert found["figures"] or name in ("noise", "adapters")
        for what in found["left_out"]:  # what no CPU can do
            assert name == "training", found["left_out"]
            assert "FlexAttention" in what
        assert f"{name} " in done.stdout
    assert parts["speed"]["figures"]["batch 1"]["ar"]["tokens_per_second"] > 0
    assert parts["speed"]["figures"]["training"]["mfu_of_measured_product"] > 0
    assert parts["serving"]["figures"]["float32"]["requests"] > 0


@pytest.mark.process
def test_no_cuda_is_one_line(tmp_path: Path) -> None:
    """Prevents: a traceback, or a silent success, on a machine without a GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", "--output", str(tmp_path / "gpu.json")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.parametrize("law", ["greedy", "top_p", "top_k", "both"])
def test_a_wrong_token_fails(part: Callable[[str], ModuleType], lm: TriModeLM, law: str) -> None:
    """Prevents: a margin that excuses every difference."""
    tokens, record = part("gpu_tokens"), part("gpu_record").Record()
    reference = tokens.Reference.of(lm, PROMPTS, tokens.LAWS[law], 12)
    found = [list(text) for text in reference.found]
    reference.check(record, "equal", found)
    margins = [
        reference.margin(number, place, seed=number)
        for number in range(len(PROMPTS))
        for place in range(12)
    ]
    assert max(margins) > 10 * reference.bound
    worst = margins.index(max(margins))
    found[worst // 12][worst % 12] ^= 1
    reference.check(record, "wrong", found)
    found[0], found[1] = reference.found[0][:-1], reference.found[1]
    reference.check(record, "short", found)
    assert [check["is_good"] for check in record.checks] == [True, False, False]
    assert record.checks[1]["margins"] == [max(margins)]
    assert record.status == "fail"


def test_a_margin_is_of_the_choice(part: Callable[[str], ModuleType], lm: TriModeLM) -> None:
    """Prevents: margins taken at another place, or without the noise of that place."""
    tokens = part("gpu_tokens")
    law = {"temperature": 0.8, "top_k": 30}
    reference = tokens.Reference.of(lm, PROMPTS, law, 8)
    for place in range(8):
        margin = reference.margin(1, place, seed=1)
        chosen = reference.found[1][place]
        for push, is_same in ((-0.5 * margin, True), (-1.5 * margin, False)):
            ids = PROMPTS[1] + reference.found[1][:place]
            one = lm.generate(
                [[0], ids], seed=[0, 1], mode="ar", max_new_tokens=1, ignore_eos=True,
                logit_bias={chosen: push}, temperature=0.8,
            )  # fmt: skip
            assert isinstance(one, list)
            assert (one[1].token_ids == [chosen]) is is_same


def test_what_all_but_wavers_is_found(part: Callable[[str], ModuleType], lm: TriModeLM) -> None:
    """Prevents: moved copies that are the model itself, or that never differ."""
    tokens = part("gpu_tokens")
    assert tokens.wavers(lm, lambda one: float(one.model.encoder.norm.weight.sum())) == 8
    assert tokens.wavers(lm, lambda one: one.model.config.vocab_size) == 0


def test_texts_of_a_batch_are_judged(part: Callable[[str], ModuleType], lm: TriModeLM) -> None:
    """Prevents: a wrong text under load that passes, or a judgement that works on the CPU only."""
    engine, record = part("gpu_engine"), part("gpu_record").Record()
    with other_device():
        away = TriModeLM(copy.deepcopy(lm.model).to(DEVICE), None)
        keys = [(0, 0), (1, 1), (0, 8)]  # greedy and sampled AR, block diffusion
        alone = {(i, j): engine._alone(away, PROMPTS[i], i, engine.SPECS[j], 10) for i, j in keys}
        others = {key: [text[0] ^ 1, *text[1:]] for key, text in alone.items()}
        engine._judge(record, "x", away, PROMPTS, alone, engine.Load(others=others))
    margins = [check.get("margin") for check in record.checks]
    assert len(record.checks) == 3
    assert [m > record.checks[0]["bound"] for m in margins[:2]] == [
        not check["is_good"] for check in record.checks[:2]
    ]
    assert record.status == "fail"
    assert 0 <= record.checks[2]["num_moved_that_differ"] <= 8


def test_a_part_cannot_stop_the_others(part: Callable[[str], ModuleType]) -> None:
    """Prevents: a crash or a hang of one part that takes the record of the others with it."""
    check = part("gpu_check")

    def crash(write: Callable[[dict[str, Any]], None]) -> None:
        write({"figures": 1})
        os._exit(3)

    def hang(write: Callable[[dict[str, Any]], None]) -> None:
        time.sleep(60)

    crashed = check.in_own_process(crash, limit_s=20.0)
    assert crashed == {"figures": 1, "error": "ended with status 3"}
    started_s = time.monotonic()
    assert "limit" in check.in_own_process(hang, limit_s=0.5)["error"]
    assert time.monotonic() - started_s < 20


def test_what_was_found_outlasts_a_crash(part: Callable[[str], ModuleType]) -> None:
    """Prevents: a part that is ended at its limit and takes its own checks with it."""

    def work(write: Callable[[dict[str, Any]], None]) -> None:
        part("gpu_record").Record(keep=write).check("one", True, figure=2)
        os._exit(9)

    found = part("gpu_check").in_own_process(work, limit_s=20.0)
    assert found["checks"] == [{"name": "one", "is_good": True, "figure": 2}]
    assert found["error"] == "ended with status 9"


def test_numbers_that_json_has_not(part: Callable[[str], ModuleType]) -> None:
    """Prevents: a record that other programs cannot read."""
    record = part("gpu_record").Record()
    record.check("a", False, margins=[float("inf"), 0.5])
    text = json.dumps(record.as_dict(), allow_nan=False)
    assert json.loads(text)["checks"][0]["margins"] == ["inf", 0.5]
