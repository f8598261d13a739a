"""Real clients against a real server: what each was asked, and what became of it.

    python -m tests.serving.clients.run --output benchmarks/results/clients

It installs the clients into a folder of their own, never beside torch: those of `requirements*.txt`
with pip, and those of `package.json` with npm where there is one. Two servers run meanwhile, the
default model tuned on conversations and the default model with a chat template that has tools. Each
client's script prints a line of JSON for each thing it asked. Exit code 1 if one is not ok.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

import trimode
from tests.chat_templates import HERMES
from tests.free_ports import free_ports
from tests.serve_command import SERVE

HERE = Path(__file__).parent
POCKET = Path(trimode.__file__).parent / "assets" / "pocket"
START_TIMEOUT_S = 180.0
SCRIPT_TIMEOUT_S = 300.0


def main() -> int:
    """Run them all; 1 if something is not ok."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("build/clients"), help="of the clients")
    parser.add_argument("--only", default="", help="scripts whose names have this in them")
    parser.add_argument("--output", type=Path, help="PATH.json and PATH.md")
    args = parser.parse_args()
    folder = args.folder.absolute()
    scripts = [path for path in sorted(HERE.glob("with_*")) if args.only in path.name]
    commands = {path: command for path in scripts if (command := _installed(path, folder))}
    with ExitStack() as stack:
        model = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        url = stack.enter_context(_serving("pocket", "--lora", "instruct_lora"))
        tools_url = stack.enter_context(_serving(_with_tools(model), "--name", "tools"))
        env = {
            **{name: text for name, text in os.environ.items() if name != "PYTHONPATH"},
            "TRIMODE_URL": url,
            "TRIMODE_TOOLS_URL": tools_url,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it asks the network for prices
        }
        results = [
            result
            for path, command in commands.items()
            for result in _run(path, command, cwd=folder / "node", env=env)
        ]
    if args.output is not None:
        _write(args.output, results)
    return int(not all(result["is_ok"] for result in results))


def _installed(script: Path, folder: Path) -> list[str] | None:
    """The command that runs a script, its client installed; None if there is no npm for it."""
    node = folder / "node"
    node.mkdir(parents=True, exist_ok=True)
    if script.suffix == ".py":
        own = HERE / f"requirements_{script.stem.removeprefix('with_')}.txt"
        wanted = own if own.exists() else HERE / "requirements.txt"
        python = folder / wanted.stem / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", folder / wanted.stem], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", wanted], check=True)
        return [str(python), str(script)]
    if shutil.which("npm") is None:
        print(f"no npm here: {script.name} is left out", file=sys.stderr)
        return None
    for path in (script, HERE / "checks.mjs", HERE / "package.json"):
        shutil.copy(path, node)
    subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund"], cwd=node, check=True)
    return ["node", script.name]


def _with_tools(folder: Path) -> str:
    """The default model, with a chat template that declares calls."""
    shutil.copytree(POCKET, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").write_text(HERMES, encoding="utf-8")
    return str(folder)


@contextmanager
def _serving(*words: str) -> Iterator[str]:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [*SERVE, *words, "--port", str(port), "--no-auto"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise SystemExit(f"{' '.join(command)} is not ready")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").is_success
    except httpx.TransportError:
        return False


def _run(
    path: Path, command: list[str], *, cwd: Path, env: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """The results of a script, each printed as it is read."""
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=env, timeout=SCRIPT_TIMEOUT_S
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    results = [json.loads(line) for line in lines]
    if ran.returncode or not results:
        error = ran.stderr.strip()[-600:] or "it printed nothing"
        script = {"client": path.name, "version": "", "asked": "to run to its end"}
        results.append({**script, "is_ok": False, "error": error, "shown": ""})
    for result in results:
        became = "ok" if result["is_ok"] else f"FAILED: {result['error']}"
        print(f"{result['client']} {result['version']}: {result['asked']}: {became}", flush=True)
        yield result


def _write(stem: Path, results: list[dict[str, Any]]) -> None:
    """The record, for programs and for readers."""
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    command = f"python -m tests.serving.clients.run --output {stem}"
    record = {"date": date, "trimode": trimode.__version__, "command": command, "results": results}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    stem.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    num_ok = sum(result["is_ok"] for result in results)
    lines = [
        f"Clients against `trimode serve` {trimode.__version__}, {date}: {num_ok} of"
        f" {len(results)} ok. `{command}`",
        "",
        "| client | version | was asked | became |",
        "|---|---|---|---|",
    ]
    for one in results:
        became = "ok" if one["is_ok"] else " ".join(one["error"].split()).replace("|", "\\|")
        lines.append(f"| {one['client']} | {one['version']} | {one['asked']} | {became} |")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
