"""The `llm` command, by its own list of further OpenAI models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from checks import URL, Checks

checks = Checks("llm")
MODELS = """\
- model_id: trimode
  model_name: pocket
  api_base: {url}/v1
  supports_schema: true
  supports_tools: true
- model_id: trimode-base
  model_name: pocket
  api_base: {url}/v1
  completion: true
"""
ASK = "Write a function: Add two numbers."


def llm(*words: str) -> str:
    """What the command prints."""
    ran = subprocess.run(
        [sys.executable, "-m", "llm", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "LLM_USER_PATH": folder},
        stdin=subprocess.DEVNULL,
    )
    if ran.returncode or not ran.stdout.strip():
        raise AssertionError(f"exit code {ran.returncode}: {ran.stdout}{ran.stderr}")
    return ran.stdout


with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "extra-openai-models.yaml"
    path.write_text(MODELS.format(url=URL), encoding="utf-8")

    with checks("prompt, streamed") as show:
        show(llm("-m", "trimode", "-o", "max_tokens", "24", ASK))

    with checks("prompt, --no-stream, with usage") as show:
        show(llm("-m", "trimode", "--no-stream", "-u", "-o", "max_tokens", "24", ASK))

    with checks("system prompt, seed, temperature") as show:
        options = ("-o", "seed", "3", "-o", "temperature", "0.2", "-o", "max_tokens", "24")
        texts = {llm("-m", "trimode", "-s", "Be brief.", *options, ASK) for _ in range(2)}
        assert len(texts) == 1
        show(texts)

    with checks("a conversation goes on (-c)") as show:
        show(llm("-c", "-o", "max_tokens", "16", "And three?"))

    with checks("--schema") as show:
        words = ("--schema", "a int, name", "-o", "max_tokens", "60", "-o", "temperature", "0")
        answer = json.loads(llm("-m", "trimode", *words, ASK))
        assert set(answer) >= {"a", "name"}  # the schema lets in others
        show(answer)

    with checks("completion: true") as show:
        words = ("-m", "trimode-base", "-o", "max_tokens", "12", "-o", "seed", "1")
        show(llm(*words, "def add(a, b):") + llm(*words, "--no-stream", "def add(a, b):"))

    with checks("logs keep the usage"):
        (last, *_) = json.loads(llm("logs", "--json", "-n", "1", "-m", "trimode"))
        assert last["input_tokens"] > 0
