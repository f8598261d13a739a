"""The `aider` command, which asks through an older LiteLLM of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import URL, Checks

checks = Checks("aider-chat")
QUIET = (
    *("--no-git", "--yes-always", "--no-check-update", "--no-show-model-warnings", "--no-pretty"),
    *("--analytics-disable", "--no-show-release-notes", "--no-detect-urls", "--map-tokens", "0"),
)

for form in ("whole", "ask"):
    with checks(f"--edit-format {form}") as show, tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.py").write_text("x = 1\n", encoding="utf-8")
        asked = ("--model", "openai/pocket", "--edit-format", form, "a.py")
        ran = subprocess.run(
            [
                sys.executable,
                "-m",
                "aider",
                *QUIET,
                *asked,
                "--message",
                "Write a function: Add two numbers.",
            ],
            capture_output=True,
            text=True,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            timeout=120,
            env={
                **os.environ,
                "HOME": folder,
                "OPENAI_API_BASE": f"{URL}/v1",
                "OPENAI_API_KEY": "none",
            },
        )
        if ran.returncode or " received." not in ran.stdout or "litellm." in ran.stdout:
            raise AssertionError(ran.stdout[-300:] + ran.stderr[-300:])
        show(ran.stdout[-300:])
