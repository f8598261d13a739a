"""What the pages say of serving is run: commands, flags, metrics, and the files under `deploy`."""

from __future__ import annotations

import argparse
import configparser
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema_rs import is_valid

import trimode
from tests.serving.conftest import Served, serving
from trimode.checkpoint.model_cache import default_name
from trimode.cli import serve as command
from trimode.serving.jobs import Happening

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "serving.md"]
ADDRESS = "127.0.0.1:8000"

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The small model as `docs/serving.md` has it, with a chat template in use."""
    lm = trimode.load("pocket", lora="instruct_lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        with serving(lm, name="pocket", num_rows=4, context_len=512, has_auto=True) as served:
            yield served


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Served]:
    """The model of the README."""
    if default_name() != "smollm2":
        pytest.skip("the weights of smollm2 are not here")
    with serving(trimode.load(), name="smollm2", num_rows=4, context_len=512) as served:
        yield served


def _served(page: str, request: pytest.FixtureRequest) -> Served:
    found: Served = request.getfixturevalue("smollm2" if page == "README.md" else "pocket")
    return found


def _blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of each."""
    return _BLOCK.findall(page.read_text("utf-8"))


def _commands(page: Path, word: str) -> list[str]:
    """The commands of a page that begin with a word, variables before it left out."""
    text = "".join(text for _, text in _blocks(page)).replace("\\\n", " ")
    commands = []
    for line in text.splitlines():
        line = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line)
        if line.startswith(f"{word} "):
            commands.append(line)
    return commands


CURLS = [(page.name, line) for page in PAGES for line in _commands(page, "curl") if ADDRESS in line]


def test_there_are_examples() -> None:
    """Prevents a pattern that finds nothing from proving everything."""
    assert len(CURLS) >= 7
    assert len(_serve_lines()) >= 5


@pytest.mark.parametrize(("page", "line"), CURLS)
def test_curl_examples_run(page: str, line: str, request: pytest.FixtureRequest) -> None:
    """Prevents an example that does not work."""
    line = line.replace(f"http://{ADDRESS}", _served(page, request).url)
    line = line.replace("curl ", "curl --fail-with-body --max-time 60 ", 1)
    ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=90)
    assert ran.returncode == 0, (page, ran.stdout, ran.stderr)
    assert ran.stdout.strip()


@pytest.mark.process
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_client_examples_run(page: Path, request: pytest.FixtureRequest) -> None:
    """Prevents the same in Python, and a stream that gives nothing."""
    served = _served(page.name, request)
    for language, text in _blocks(page):
        if language == "python" and "OpenAI(" in text:
            ran = subprocess.run(
                [sys.executable, "-c", text.replace(f"http://{ADDRESS}", served.url)],
                capture_output=True,
                text=True,
                timeout=90,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            assert ran.returncode == 0, ran.stderr
            assert ran.stdout.strip()


def test_the_clients_of_the_page_are_those_that_are_run() -> None:
    """Prevents: a version on the page that nobody ran."""
    folder = Path(__file__).parent / "clients"
    pinned = dict(json.loads((folder / "package.json").read_text("utf-8"))["dependencies"])
    files = folder.glob("requirements*.txt")
    lines = [line for path in files for line in path.read_text("utf-8").split()]
    pinned |= dict(line.split("==") for line in lines) | {"openai (npm)": pinned["openai"]}
    text = PAGES[1].read_text("utf-8")
    table = text[text.index("## Clients") : text.index("openai for node")]
    rows = [re.split(r"\s*\|\s*", line)[1:3] for line in table.splitlines() if line[:2] == "| "]
    assert len(rows) >= 8
    for names, versions in rows[1:]:
        found = re.sub(r" \((?:Python|npm)\)", "", names).split(", ")
        found = [names] if names in pinned else found
        assert [pinned[name] for name in found] == versions.split(", "), names


def _unit() -> configparser.ConfigParser:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(ROOT / "deploy" / "trimode.service", encoding="utf-8")
    return parser


def _serve_lines() -> list[str]:
    """Every `trimode serve ...` of the pages, and what the service and the image run."""
    lines = [line for page in PAGES for line in _commands(page, "trimode")]
    unit = _unit()["Service"]["ExecStart"]
    image = (ROOT / "deploy" / "Containerfile").read_text("utf-8")
    entry = re.search(r"^ENTRYPOINT \[(.*)\]$", image, re.MULTILINE)
    assert entry is not None
    lines += [unit[unit.index("trimode serve") :], entry[1].replace('"', "").replace(",", "")]
    return [line for line in lines if line.startswith("trimode serve")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    command.add_arguments(parser)
    return parser


@pytest.mark.parametrize("line", _serve_lines())
def test_serve_commands_parse(line: str) -> None:
    """Prevents a flag in a page, a service or an image that is not there any more."""
    _parser().parse_args(shlex.split(line.split(" # ")[0])[2:])


def test_every_flag_is_on_the_page_and_there() -> None:
    """Prevents flags that nobody finds, and a table that promises others."""
    text = PAGES[1].read_text("utf-8")
    table = text[text.index("### Flags") : text.index("### What comes back when")]
    named = set(re.findall(r"`(--[a-z-]+)`", table))
    flags = {flag for flag in _parser()._option_string_actions if flag.startswith("--")}
    assert named == flags - {"--help"}


def test_every_metric_of_the_page_is_measured(pocket: Served) -> None:
    """Prevents a dashboard made by the page from staying empty."""
    text = PAGES[1].read_text("utf-8")
    table = text[text.index("### What is measured") : text.index("## Several replicas")]
    named = set(re.findall(r"`(trimode_[a-z_]+)", table))
    found = set(re.findall(r"^# TYPE (\S+)", httpx.get(f"{pocket.url}/metrics").text, re.MULTILINE))
    assert named == {name for name in found if not name.endswith("_created")}


def test_every_status_of_the_page_is_answered(pocket: Served) -> None:
    """Prevents a status that the page does not explain, or explains and nobody sends."""
    text = PAGES[1].read_text("utf-8")
    table = text[text.index("### What comes back when") : text.index("In a stream that has begun")]
    rows = re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE)
    named = [status for row in rows for status in row.split(", ")]
    routes = httpx.get(f"{pocket.url}/openapi.json").json()["paths"]
    sent = {
        status for route in routes.values() for one in route.values() for status in one["responses"]
    }
    assert sorted(named) == sorted((sent | {"405"}) - {"200"})


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_an_answer_is_as_described(pocket: Served, route: str) -> None:
    """Prevents: a client made from the description that does not know what a choice holds."""
    body: dict[str, Any] = {"max_tokens": 2, "temperature": 0}
    if route == "/v1/completions":
        body |= {"prompt": "the", "logprobs": 1, "echo": True}
    else:
        messages = [{"role": "user", "content": "the"}]
        body |= {"messages": messages, "logprobs": True, "top_logprobs": 1}
    described = httpx.get(f"{pocket.url}/openapi.json").json()
    content = described["paths"][route]["post"]["responses"]["200"]["content"]
    name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    schema = described["components"]["schemas"][name]
    [choice] = pocket.post(route.removeprefix("/v1/"), body).json()["choices"]
    items = schema["properties"]["choices"]["items"]
    assert is_valid(items, choice)
    assert sorted(items["required"]) == sorted(items["properties"]) == sorted(choice)
    if route == "/v1/chat/completions":
        function = {"name": "look", "arguments": "{}"}
        for key in ("name", "arguments"):
            call = {"id": "a", "type": "function", "function": function}
            message = {**choice["message"], "content": None, "tool_calls": [call]}
            called = {**choice, "message": message, "finish_reason": "tool_calls"}
            assert is_valid(items, called)
            call["function"] = {key: "look"}
            assert not is_valid(items, called)
    for key in choice:  # each of them is checked
        assert not is_valid(items, choice | {key: [1]})


def test_every_field_of_an_event_is_on_the_page() -> None:
    """Prevents watchers who have to guess what an event holds."""
    text = PAGES[1].read_text("utf-8")
    start = text.index("each with a `trimode_event`")
    table = text[start : text.index("Only `emit` is for good")]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = re.findall(r"`(\w+)`", " ".join(firsts))
    assert sorted(named) == sorted(["index", *(field.name for field in fields(Happening))])


def test_the_service_waits_for_the_server() -> None:
    """Prevents systemd from killing a server that still lets texts finish."""
    default = _parser().get_default("shutdown_timeout")
    assert float(_unit()["Service"]["TimeoutStopSec"]) > default


def test_the_image_is_made_of_what_is_there() -> None:
    """Prevents a build that fails at a file or an extra that has gone, and a server as root."""
    image = (ROOT / "deploy" / "Containerfile").read_text("utf-8")
    for sources in re.findall(r"^COPY (.*) \S+$", image, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = re.search(r'"\.\[(.*)\]"', image)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    assert re.search(r"^USER (?!root)\w+$", image, re.MULTILINE)
