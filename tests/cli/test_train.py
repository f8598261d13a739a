"""What a person sees of `trimode train`: lines or a bar, event files, W&B, the report."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.training.fake_stream import write_data
from trimode.cli import report
from trimode.cli.config_file import read_config
from trimode.cli.main import main
from trimode.cli.train_progress import bar_text, progress_bar, training_log
from trimode.errors import ConfigError
from trimode.training.config import TrainConfig
from trimode.training.trainer import train

Capture = pytest.CaptureFixture[str]

STEP = {
    "kind": "step",
    "stage": "joint",
    "step": 3,
    "tokens": 768,
    "ar_loss": 2.3456,
    "diffusion_loss": 4.5678,
    "grad_norm": 0.789,
    "rate_ratio": 1.0,
    "tokens_per_second": 1234.5,
    "seconds": 9.0,
    "eta_s": 3725.0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def config_path(tmp_path: Path, data: Path) -> Path:
    """Two steps `ar` and two `joint` of a tiny network, evaluated in the middle and at the end."""
    stage = {"tokens": 128, "sequence_length": 32, "batch_tokens": 64, "micro_batch_sequences": 2}
    config = {
        "data": str(data),
        "output_dir": str(tmp_path / "run"),
        "stages": [
            {"name": "ar", **stage, "diffusion_weight": 0.0, "block_lengths": [4]},
            {"name": "joint", **stage, "block_lengths": [4]},
        ],
        "model": {
            **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
            **{"max_position_embeddings": 128, "block_size": 4},
        },
        "evaluation": {"tokens": 64, "every_steps": 2},
        "precision": "fp32",
        "device": "cpu",
        "log_every_steps": 1,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def scalars(output_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Everything in the event files, nothing purged."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((output_dir / "tensorboard").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    place = (event.step, value.tensor.float_val[0])
                    found.setdefault(value.tag, []).append(place)
    return found


def logged(output_dir: Path, kind: str, name: str) -> list[tuple[int, Any]]:
    lines = (output_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == kind]
    numbers = [(r["step"], (r.get("report") or r).get(name)) for r in records]
    return [(step, pytest.approx(value)) for step, value in numbers if value is not None]


def test_a_run_without_a_terminal(config_path: Path, capsys: Capture) -> None:
    """Bars and colours in a log file, words among the JSON, numbers that nobody wrote down."""
    assert main(["train", str(config_path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    result = json.loads(out)
    assert set(result) == {"state", "is_finished", "final_dir", "heldout"}
    assert result["is_finished"]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", err)
    assert all(line.startswith("trimode: info: ") for line in err.splitlines())
    for words in ("ar loss", "diffusion loss", "gradient", "tokens/s", "s left", "held out"):
        assert words in err
    output_dir = config_path.parent / "run"
    assert err.splitlines()[-1] == f"trimode: info: report {output_dir / 'report.html'}"
    page = (output_dir / "report.html").read_text(encoding="utf-8")
    assert "Finished after 4 steps." in page
    assert "<h3>Prompt 3</h3>" in page
    found = scalars(output_dir)
    for name in ("ar_loss", "diffusion_loss", "grad_norm", "tokens_per_second"):
        assert found[f"train/{name}"] == logged(output_dir, "step", name)
    for name in ("ar_loss", "diffusion_loss", "acceptance_length"):
        assert found[f"held_out/{name}"] == logged(output_dir, "held_out", name)
    assert [step for step, _ in found["held_out/agreement_by_offset/3"]] == [2, 4]
    assert [step for step, _ in found["train/learning_rate"]] == [1, 2, 3, 4]


def test_event_files_of_a_resumed_run_hold_every_step_once(config_path: Path) -> None:
    """Steps that were logged, lost with the process and trained again drawn twice."""
    config = replace(read_config(TrainConfig, config_path), checkpoint_every_s=0.0)
    output_dir = Path(config.output_dir)

    class Killed(Exception):
        pass

    def run_until(last: int) -> None:
        with training_log(config, wandb_project=None, is_resumed=True) as log:

            def log_and_die(record: dict[str, Any]) -> None:
                log(record)
                if record["kind"] == "step" and record["step"] == last:
                    raise Killed

            train(config, log=log_and_die)

    with pytest.raises(Killed):  # after step 3 is logged, before its checkpoint
        run_until(3)
    assert [step for step, _ in scalars(output_dir)["train/ar_loss"]] == [1, 2, 3]
    run_until(99)
    found = scalars(output_dir)
    assert found["train/ar_loss"] == logged(output_dir, "step", "ar_loss")
    assert [step for step, _ in found["train/ar_loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in found["held_out/ar_loss"]] == [2, 4]
    run_until(99)  # a finished run evaluates again
    again = scalars(output_dir)
    assert again == found


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar torn apart by log lines, or beside lines that say the same."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    logger = logging.getLogger("trimode")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "level", logging.INFO)
    try:
        with progress_bar(12) as log:
            logger.info("checkpoint here")
            log(STEP)
            logging.getLogger("trimode.training").info("%(stage)s step %(step)d", STEP)
            logger.info("held out at step 3")
            log({"kind": "held_out", "step": 3, "report": {}})
        assert logger.handlers == [handler]
        assert handler.filters == []
    finally:
        logger.removeHandler(handler)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert shown.startswith("checkpoint here\n")
    assert "joint step 3" not in shown
    assert "\nheld out at step 3\n" in shown.replace("\r", "\n").replace(" \n", "\n")
    last = shown.rstrip("\n").split("\r")[-1]
    assert last.startswith("joint  25%|")
    assert last.endswith(f"| 3/12, {bar_text(STEP)}")


def test_what_stands_beside_the_bar() -> None:
    """A number that is missing from it, in either kind of run."""
    rest = "[1:02:05 left, 1,234 tokens/s, gradient 0.79]"
    assert bar_text(STEP) == f"ar 2.346 diffusion 4.568 {rest}"
    losses = {"lk_loss": 0.5, "ce_loss": 1.5, "overlap": 0.25, "acceptance_length": 1.75}
    record = {k: v for k, v in STEP.items() if not k.endswith("_loss")} | losses | {"eta_s": 65.2}
    assert bar_text(record).startswith("lk 0.500 ce 1.500 overlap 0.250 acceptance 1.750 [1:05 ")


def test_without_tensorboard(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A run that ends for want of a package that only draws."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["train", str(config_path), "max_seconds=0"]) == 0
    out, err = capsys.readouterr()
    assert out == "step 0, 0 tokens: stopped; run again to go on\n"
    [line] = [line for line in err.splitlines() if "warning" in line]
    assert line == (
        "trimode: warning: no TensorBoard events are written: pip install 'trimode[train]'"
    )
    assert not (config_path.parent / "run" / "report.html").exists()


def test_without_wandb(config_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """A missing package noticed after hours, or in many lines."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["train", str(config_path), "--wandb", "mine"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        "trimode: error: --wandb needs a package that is missing: pip install wandb\n",
    )
    assert not (config_path.parent / "run").exists()


def test_wandb_gets_the_same_numbers_and_one_run(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new W&B run at every resume, or steps under other numbers than ours."""
    runs: list[SimpleNamespace] = []

    class WandbError(Exception):
        pass

    def init(**arguments: Any) -> SimpleNamespace:
        if arguments["project"] == "closed":
            raise WandbError("no API key")
        run = SimpleNamespace(arguments=arguments, rows=[], exit_code=None)
        run.log = lambda values, step: run.rows.append((step, values))
        run.finish = lambda exit_code: setattr(run, "exit_code", exit_code)
        runs.append(run)
        return run

    fake = SimpleNamespace(init=init, Error=WandbError, Settings=lambda **values: values)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = read_config(TrainConfig, config_path)

    def log_once(*, is_resumed: bool) -> None:
        with training_log(config, wandb_project="mine", is_resumed=is_resumed) as log:
            path = Path(config.output_dir) / "log.jsonl"
            path.write_text(json.dumps(STEP) + "\n", encoding="utf-8")
            log(STEP)

    log_once(is_resumed=True)
    log_once(is_resumed=True)
    log_once(is_resumed=False)
    ids = [run.arguments["id"] for run in runs]
    assert ids[0] == ids[1] != ids[2]
    [(step, values)] = runs[0].rows
    assert step == 3
    assert values["train/ar_loss"] == 2.3456
    assert values["train/learning_rate"] == config.optimizer.learning_rate
    assert [run.exit_code for run in runs] == [0, 0, 0]
    with pytest.raises(ConfigError, match="W&B does not start: no API key"):
        training_log(config, wandb_project="closed", is_resumed=True).__enter__()


def test_a_report_that_fails_is_no_failed_run(
    config_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A finished run that looks like a failed one to a script, because of a picture."""
    monkeypatch.setattr(report, "make_report", failing)
    config = read_config(TrainConfig, config_path)
    report.report_finished(config)
    assert main(["train", str(config_path), "--no-report", "stages=" + ONE_STEP]) == 0
    assert "no report" not in capsys.readouterr().err
    assert main(["train", str(config_path), "stages=" + ONE_STEP]) == 0
    assert "trimode: warning: no report: oh no; `trimode report " in capsys.readouterr().err


ONE_STEP = json.dumps(
    [{"name": "ar", "tokens": 64, "sequence_length": 32, "batch_tokens": 64}
     | {"micro_batch_sequences": 2, "diffusion_weight": 0.0, "block_lengths": [4]}]
)  # fmt: skip


def failing(*args: Any, **kwargs: Any) -> Callable[..., Any]:
    raise ValueError("oh no")
