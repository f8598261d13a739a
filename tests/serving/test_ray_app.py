"""Replicas on a Ray of the tests' own, set up by `deploy/ray.yaml` as far as it fits two cores."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import trimode
from tests.free_ports import free_ports
from tests.serve_command import SERVE
from trimode.checkpoint.io import save_checkpoint
from trimode.cli.main import main
from trimode.errors import ConfigError
from trimode.runtime import TriModeLM
from trimode.serving.jobs import Done, Failed, Happening, Job, Piece, Update
from trimode.serving.worker import LocalBackend

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray's own
    ray = pytest.importorskip("ray")
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    from trimode.serving.ray_app import APP_NAME, build
    from trimode.serving.ray_backend import Merged, RayBackend, Report

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

CONFIG = Path(__file__).parents[2] / "deploy" / "ray.yaml"
LONG = 480
"""Tokens of a text that is not done before something happens to it."""

PATIENCE_S = 60.0
START_S = 200.0
"""For several processes to load torch and Ray, on a machine that has other things to do."""


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Any, byte_tokenizer: Any
) -> Path:
    """A tiny network in float64, for texts that are equal to the last token."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_checkpoint(tiny_model(torch.float64), folder, tokenizer=byte_tokenizer)
    return folder


@pytest.fixture(scope="module")
def lm(checkpoint: Path) -> TriModeLM:
    """The same in this process."""
    return trimode.load(checkpoint, dtype="float64")


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    """Two replicas and an ingress, one row each."""
    folder = tempfile.mkdtemp(prefix="ray")  # short: sockets lie in it
    (port,) = free_ports(1)
    config = yaml.safe_load(CONFIG.read_text("utf-8"))
    application = config["applications"][0]
    application["args"] = {
        "model": str(checkpoint),
        "dtype": "float64",
        "name": "tiny",
        "num_rows": 1,
        "has_auto": False,
    }
    for deployment in application["deployments"]:
        deployment["ray_actor_options"] = {"num_cpus": 0}
        if deployment["name"] == "Replica":
            del deployment["autoscaling_config"]
            deployment["num_replicas"] = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=80 * 2**20,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _temp_dir=folder,
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))
            _wait_for(lambda: _status() == "RUNNING", START_S)
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def two(url: str) -> None:
    """Both replicas are there, and idle."""
    _wait_for(lambda: [_gauge(one, "trimode_running") for one in _reports()] == [0, 0], START_S)


def _status() -> str:
    application = serve.status().applications.get(APP_NAME)
    assert application is None or application.status.value != "DEPLOY_FAILED", application
    return "" if application is None else application.status.value


def _wait_for(is_so: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    end_s = time.monotonic() + patience_s
    while not is_so():
        assert time.monotonic() < end_s, "it never came to be"
        time.sleep(0.02)


def _handle() -> Any:
    return serve.get_deployment_handle("Replica", APP_NAME)


def _reports() -> list[Report]:
    answers = _handle().broadcast("report").results(timeout_s=10, return_exceptions=True)
    return [answer for answer in answers if isinstance(answer, Report)]


def _gauge(report: Report, name: str) -> float:
    families = {one.name: one for one in text_string_to_metric_families(report.metrics)}
    return sum(sample.value for sample in families[name].samples if "_created" not in sample.name)


def _kill(report: Report) -> None:
    name = f"SERVE_REPLICA::{APP_NAME}#Replica#{report.replica}"
    ray.kill(ray.get_actor(name, namespace="serve"))


async def _kill_where(gauge: str) -> None:
    """Kill the replica that has a text that runs, or waits."""
    found: list[Report] = []
    end_s = time.monotonic() + PATIENCE_S
    while not found and time.monotonic() < end_s:
        found = [one for one in await asyncio.to_thread(_reports) if _gauge(one, gauge)]
    await asyncio.to_thread(_kill, found[0])


def _job(seed: int, *, num_tokens: int = 24, **more: Any) -> Job:
    options = {"max_new_tokens": num_tokens, "temperature": 0.9, "seed": seed, "ignore_eos": True}
    return Job(request_id="r", task="generate", inputs="def ", options=options | more)


def _expected(lm: TriModeLM, job: Job) -> list[int]:
    generation = lm.generate(job.inputs, **job.options)
    assert not isinstance(generation, list)
    return generation.token_ids


async def _all(updates: AsyncIterator[Update]) -> list[Update]:
    return [update async for update in updates]


def _check_whole(updates: list[Update], expected: list[int]) -> None:
    """Nothing is missing, nothing comes twice."""
    *pieces, done = updates
    assert isinstance(done, Done), done
    assert list(done.token_ids) == expected
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert [i for piece in pieces for i in piece.token_ids] == expected
    assert "".join(piece.text for piece in pieces) == done.text


def _with_backend(use: Callable[[RayBackend], Any]) -> None:
    backend = RayBackend(_handle())

    async def whole() -> None:
        try:
            await asyncio.wait_for(use(backend), PATIENCE_S)
        finally:
            await backend.close(timeout_s=5)

    asyncio.run(whole())


@pytest.mark.usefixtures("two")
def test_texts_of_replicas_are_those_of_one_process(url: str, lm: TriModeLM) -> None:
    """Prevents a text that depends on which replica made it; and a replica that gets no work."""
    before = {one.replica: _gauge(one, "trimode_new_tokens") for one in _reports()}
    jobs = [_job(seed, mode=mode) for seed in range(4) for mode in ("ar", "diffusion", "linear")]

    async def use(backend: RayBackend) -> None:
        assert backend.is_ready
        results = await asyncio.gather(*(_all(backend.run(job)) for job in jobs))
        for job, updates in zip(jobs, results, strict=True):
            _check_whole(updates, _expected(lm, job))

    def all_have_worked() -> bool:
        """Ray may pass over a replica that is slow to answer once, not for good."""
        _with_backend(use)
        after = {one.replica: _gauge(one, "trimode_new_tokens") for one in _reports()}
        assert after.keys() == before.keys()
        assert len(after) == 2
        return all(after[replica] > before[replica] for replica in after)

    _wait_for(all_have_worked)


@pytest.mark.usefixtures("two")
def test_http_through_the_ingress(url: str, lm: TriModeLM) -> None:
    """Prevents an ingress that answers otherwise than a single server: whole, streamed, refused."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    with client:
        whole = client.completions.create(
            model="tiny", prompt="def ", max_tokens=24, seed=3, temperature=0.9
        )
        expected = lm.generate("def ", max_new_tokens=24, seed=3, temperature=0.9)
        assert whole.choices[0].text == expected.text
        stream = client.completions.create(
            model="tiny", prompt="def ", max_tokens=24, seed=3, temperature=0.9, stream=True
        )
        pieces = [chunk.choices[0].text for chunk in stream]
        assert len(pieces) > 2
        assert "".join(pieces) == expected.text
        with pytest.raises(openai.BadRequestError, match="tempperature"):
            client.completions.create(model="tiny", prompt="def ", extra_body={"tempperature": 1.0})
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.get(f"{url}/ready").json() == {"status": "ready"}
    families = {
        one.name: one for one in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    }
    assert "trimode_http_requests" in families
    rows = [sample.labels["replica"] for sample in families["trimode_rows"].samples]
    assert sorted(rows) == sorted(report.replica for report in _reports())


@pytest.mark.usefixtures("two")
def test_a_client_that_leaves_frees_the_row(url: str) -> None:
    """Prevents work for nobody: the row stays taken until the text is done."""
    body = {"prompt": "def ", "max_tokens": LONG, "ignore_eos": True, "stream": True, "mode": "ar"}

    def has_left_in_the_middle() -> bool:
        """False where the machine is so busy that the text was done before anybody looked."""
        done = sum(_gauge(one, "trimode_new_tokens") for one in _reports())
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            assert next(answer.iter_lines()).startswith("data:")
            is_running = [_gauge(one, "trimode_running") for one in _reports()].count(1) == 1
        _wait_for(lambda: sum(_gauge(one, "trimode_running") for one in _reports()) == 0)
        now = sum(_gauge(one, "trimode_new_tokens") for one in _reports())
        assert not is_running or now == done
        return is_running

    _wait_for(has_left_in_the_middle)


@pytest.mark.usefixtures("two")
def test_letting_go_of_a_job_frees_the_row() -> None:
    """Prevents the same without HTTP between: `aclose` alone must reach the replica."""
    done = sum(_gauge(one, "trimode_new_tokens") for one in _reports())

    async def use(backend: RayBackend) -> None:
        async with aclosing(backend.run(_job(1, num_tokens=LONG, mode="ar"))) as updates:
            await anext(updates)

    _with_backend(use)
    _wait_for(lambda: sum(_gauge(one, "trimode_running") for one in _reports()) == 0)
    assert sum(_gauge(one, "trimode_new_tokens") for one in _reports()) == done


@pytest.mark.usefixtures("two")
def test_what_is_wrong_is_said_as_by_one_process() -> None:
    """Prevents a refusal from being taken for a lost replica, and tried three times."""

    async def use(backend: RayBackend) -> None:
        (failed,) = await _all(backend.run(_job(1, temperature=-1.0)))
        assert isinstance(failed, Failed)
        assert (failed.status, failed.param) == (400, "temperature")
        (late,) = await _all(
            backend.run(Job(request_id="r", task="generate", inputs="x", timeout_s=0.0))
        )
        assert isinstance(late, Failed)
        assert late.status == 504

    _with_backend(use)


@pytest.mark.usefixtures("two")
def test_closing_ends_what_runs() -> None:
    """Prevents a shutdown that hangs on long texts, or drops them without a word."""

    async def use(backend: RayBackend) -> None:
        updates = backend.run(_job(1, num_tokens=LONG, mode="ar"))
        await anext(updates)
        rest = asyncio.create_task(_all(updates))
        await backend.close(timeout_s=0.0)
        last = (await rest)[-1]
        assert isinstance(last, Failed)
        assert (last.status, last.message) == (503, "the server is shutting down")
        assert not backend.is_ready
        (refused,) = await _all(backend.run(_job(2)))
        assert refused == last

    _with_backend(use)


@pytest.mark.usefixtures("two")
def test_a_killed_replica_costs_no_text(lm: TriModeLM, caplog: pytest.LogCaptureFixture) -> None:
    """Prevents streams that break off, or of which something comes twice, and the loss of jobs of
    which nothing was sent yet; and one job's misfortune from becoming another's."""
    jobs = [_job(seed, num_tokens=LONG, mode="ar") for seed in (7, 8)]
    queued = [_job(seed, num_tokens=LONG, mode="ar") for seed in range(9, 15)]
    later = _job(15)

    async def use(backend: RayBackend) -> None:
        running = [backend.run(job) for job in jobs]
        firsts = await asyncio.gather(*(anext(updates) for updates in running))
        waiting = [asyncio.create_task(_all(backend.run(job))) for job in queued]
        await _kill_where("trimode_waiting")
        rests = await asyncio.gather(*(_all(updates) for updates in running))
        for job, first, rest in zip(jobs, firsts, rests, strict=True):
            _check_whole([first, *rest], _expected(lm, job))
        for job, updates in zip(queued, await asyncio.gather(*waiting), strict=True):
            _check_whole(updates, _expected(lm, job))
        _check_whole(await _all(backend.run(later)), _expected(lm, later))

    _with_backend(use)
    assert caplog.text.count("a replica was lost; another one makes its text anew") >= 2


@pytest.mark.usefixtures("two")
def test_a_watched_text_ends_in_one_clear_error() -> None:
    """Prevents a replay in which drafts and reveals come twice, and a stream without an end."""

    async def use(backend: RayBackend) -> None:
        job = _job(5, num_tokens=LONG, mode="linear")
        watched = Job(
            **{name: getattr(job, name) for name in ("request_id", "task", "inputs")},
            options=job.options,
            wants_events=True,
        )
        updates = backend.run(watched)
        assert isinstance(await anext(updates), Happening)
        await _kill_where("trimode_running")
        last = (await _all(updates))[-1]
        assert isinstance(last, Failed)
        assert (last.status, last.code) == (503, "unavailable")
        assert "replica" in last.message

    _with_backend(use)


def test_wrong_arguments_are_named() -> None:
    """Prevents a misspelt limit in a cluster's configuration from being ignored."""
    with pytest.raises(ConfigError, match="args has 'num_row'; did you mean 'num_rows'"):
        build({"num_row": 3})


def test_merged_metrics_parse(lm: TriModeLM) -> None:
    """Prevents a page on which a metric's head comes twice, which Prometheus refuses whole."""
    backend = LocalBackend(lm, name="tiny", num_rows=1, has_auto=False)
    reports = [
        Report(replica=name, card=backend.card, is_ready=True, metrics=backend.metrics())
        for name in ("a", "b")
    ]
    asyncio.run(backend.close(timeout_s=1))
    registry = CollectorRegistry()
    registry.register(Merged(reports))
    text = generate_latest(registry).decode()
    assert text.count("# TYPE trimode_engine_forwards_total counter") == 1
    families = {one.name: one for one in text_string_to_metric_families(text)}
    assert [(one.labels, one.value) for one in families["trimode_rows"].samples] == [
        ({"replica": "a"}, 1.0),
        ({"replica": "b"}, 1.0),
    ]


def test_the_command_starts_and_ends_replicas(checkpoint: Path) -> None:
    """Prevents processes of Ray that outlive the command, and a path that only its own folder
    knows."""
    folder = tempfile.mkdtemp(prefix="ray")
    command = [*SERVE, checkpoint.name, "--replicas", "2"]
    environment = {**os.environ, "RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [*command, "--port", "0", "--dtype", "float64", "--max-batch", "1", "--no-auto"],
        cwd=checkpoint.parent,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(START_S, server.kill)
    watchdog.start()
    try:
        assert server.stderr is not None
        assert server.stderr.readline() == "trimode: loading tiny\n"
        line = server.stderr.readline()
        assert line.startswith("trimode: tiny is ready at http://127.0.0.1:"), line
        url = line.split()[-1]
        body = {"prompt": "def ", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
        assert answer.json()["usage"]["completion_tokens"] == 8
        assert len(_processes_with(folder)) > 3
        server.send_signal(signal.SIGTERM)
        stdout, stderr = server.communicate(timeout=PATIENCE_S)
        assert (server.returncode, stdout) == (0, "")
        assert all(json.loads(line) for line in stderr.splitlines())
        _wait_for(lambda: not _processes_with(folder))
    finally:
        watchdog.cancel()
        server.kill()
        server.communicate()
        shutil.rmtree(folder, ignore_errors=True)


def _processes_with(folder: str) -> list[str]:
    """Processes that have the folder in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"RAY_TMPDIR={folder}".encode() in (process / "environ").read_bytes():
                found.append(process.name)
    return found


def test_without_ray_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a traceback for whoever has not installed the extra."""
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "--replicas", "2"]) == 2
    assert capsys.readouterr().err == (
        "trimode: error: --replicas needs ray, not installed here; pip install 'trimode[ray]'\n"
    )
