"""Every example runs, on the default model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
POCKET_MODEL = ROOT / "src" / "trimode" / "assets" / "pocket"


@pytest.mark.skipif(
    not (POCKET_MODEL / "config.json").is_file(),
    reason="the default model is not in the tree (src/trimode/assets/pocket)",
)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(path: Path, tmp_path: Path) -> None:
    """An example that fails is the first thing a new user sees."""
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:trimode", str(path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
    assert not list(tmp_path.iterdir()), "an example must leave nothing behind"
