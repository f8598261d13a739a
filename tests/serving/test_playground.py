"""The playground in headless Chromium, over a server with the default model."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import uvicorn

import trimode
from trimode.serving.app import create_app
from trimode.serving.settings import Settings
from trimode.serving.worker import LocalBackend

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed"),
]

KEY = "a-key-of-the-tests"
HOSTILE = "<img src=x onerror=\"document.title='owned'\">"
DEADLINE_S = 60


@dataclass(frozen=True, slots=True)
class Served:
    """Two doors to one model.

    Attributes:
        url: Of a server without keys.
        guarded_url: Of one that asks for `KEY`.
    """

    url: str
    guarded_url: str


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    urls = [f"http://127.0.0.1:{one.getsockname()[1]}/" for one in sockets]
    servers: list[uvicorn.Server] = []
    is_up = threading.Event()

    async def serve() -> None:
        backend = LocalBackend(trimode.load("pocket"), name="pocket", num_rows=4, context_len=1024)
        for settings in (Settings(), Settings(api_keys=(KEY,))):
            app = create_app(backend, settings)
            config = uvicorn.Config(app, log_config=None, lifespan="off", access_log=False)
            servers.append(uvicorn.Server(config))
        is_up.set()
        try:
            pairs = zip(servers, sockets, strict=True)
            await asyncio.gather(*(server.serve(sockets=[one]) for server, one in pairs))
        finally:
            await backend.close(timeout_s=5)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert is_up.wait(DEADLINE_S)
    try:
        yield Served(*urls)
    finally:
        for server in servers:
            server.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    expect.set_options(timeout=DEADLINE_S * 1000)
    with playwright.sync_playwright() as p:
        launched = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


class Visit:
    """A page, and what went wrong in it.

    Attributes:
        page: Playwright's.
        problems: What the console said; answers with an error status are not among them.
    """

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.problems: list[str] = []
        page.set_default_timeout(DEADLINE_S * 1000)
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("request", lambda request: self._check(request.url, url))
        page.goto(url)

    def _note(self, message: Any) -> None:
        if "the server responded with a status of" not in message.text:
            self.problems.append(f"{message.type}: {message.text}")

    def _check(self, asked: str, url: str) -> None:
        if not asked.startswith(url):
            self.problems.append(f"left the origin: {asked}")

    def set(self, **values: Any) -> None:
        """Fields of the race's settings."""
        for name, value in values.items():
            field = self.page.locator(f"#fields-{name}")
            if field.evaluate("e => e.tagName") == "SELECT":
                field.select_option(str(value))
            else:
                field.fill(str(value))

    def race(self) -> None:
        """Run one to its end."""
        self.page.click("#run")
        self.wait()

    def wait(self) -> None:
        """For the end of what runs."""
        expect(self.page.locator("#stop")).to_be_disabled()
        expect(self.page.locator("#run")).to_be_enabled()

    def texts(self) -> list[str]:
        """What stands in each lane, without the prompt."""
        return [lane.text_content() for lane in self.page.locator(".lane .text").all()]

    def walk(self, way: str) -> list[str]:
        """All lanes' canvases and counts as markup, after each step of the replay that changes
        them."""
        return self.page.evaluate(
            """(way) => {
                 const markup = () => [...document.querySelectorAll(".lane .canvas, .lane dd")]
                   .map((e) => e.innerHTML).join();
                 const shown = [];
                 for (let before = markup(); ; before = shown.at(-1)) {
                   document.querySelector(`[data-do=${way}]`).click();
                   const now = markup();
                   if (now === before) return shown;
                   shown.push(now);
                 }
               }""",
            way,
        )

    def counts(self, lane: int) -> dict[str, str]:
        """A lane's numbers as shown."""
        cells = self.page.locator(".lane").nth(lane).locator("[data-count]").all()
        return {cell.get_attribute("data-count"): cell.text_content() for cell in cells}


@pytest.fixture
def visit(browser: Any, served: Served) -> Iterator[Visit]:
    with_page = browser.new_context(viewport={"width": 1280, "height": 900})
    visiting = Visit(with_page.new_page(), served.url)
    expect(visiting.page.locator("#model")).to_contain_text("pocket")
    yield visiting
    with_page.close()
    assert visiting.problems == []


def _metric(served: Served, name: str) -> float:
    with urllib.request.urlopen(f"{served.url}metrics", timeout=10) as response:
        text = response.read().decode()
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.M))


def _events(*chunks: dict[str, Any], end: str = "data: [DONE]\n\n") -> str:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end


def _answer_with(page: Any, body: str) -> None:
    """Have every completion answered so: what a model may write, but the default model hardly
    does."""
    page.route(
        "**/v1/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
    )


def _event(kind: str, position: int, texts: list[str], **more: Any) -> dict[str, Any]:
    event = {
        "kind": kind,
        "position": position,
        "token_ids": list(range(len(texts))),
        "texts": texts,
        "is_masked": [False] * len(texts),
        "num_accepted": 0,
        "old_texts": [],
        "reason": "",
        "num_forwards": 1,
        "new_tokens": 1,
        "elapsed_s": 0.5,
    }
    return {"choices": [], "trimode_event": {**event, **more}}


def test_race_ends_as_the_server_counts_it(visit: Visit) -> None:
    """Prevents: lanes that mix up their streams, and counts that are the page's own invention."""
    page = visit.page
    bodies: list[str] = []
    page.on("request", lambda r: "completions" in r.url and bodies.append(r.post_data))
    visit.set(max_tokens=24, temperature=0.7, seed=5)
    with page.expect_response("**/v1/completions") as first:
        page.click("#run")
    visit.wait()
    ar, diffusion, linear = visit.texts()
    assert ar
    assert ar == linear
    assert ar != diffusion
    expect(page.locator("#summary")).to_contain_text("ar and linear wrote the same text")
    assert first.value.headers["content-type"].startswith("text/event-stream")
    assert len(bodies) == 3
    for body in [*map(json.loads, bodies)]:
        lane = ["ar", "diffusion", "linear"].index(body["mode"])
        whole = {**body, "stream": False}
        del whole["events"], whole["stream_options"]
        answer = page.evaluate(
            """async (body) => (await fetch("v1/completions",
                 {method: "POST", headers: {"Content-Type": "application/json"},
                  body: JSON.stringify(body)})).json()""",
            whole,
        )
        own, counts = answer["usage"]["trimode"], visit.counts(lane)
        assert visit.texts()[lane] == answer["choices"][0]["text"]
        assert counts["forwards"] == str(own["forwards"]["total"])
        assert counts["tokens"] == str(answer["usage"]["completion_tokens"]) == "24"
        assert counts["tpf"] == f"{own['tokens_per_forward']['decode']:.2f}"
        assert float(counts["rate"]) > 0
    page.focus("#scrub")
    for _ in range(6):
        page.keyboard.press("ArrowLeft")
    counts = visit.counts(0)
    assert 2 < int(counts["tokens"]) < 24
    assert counts["forwards"] == counts["tokens"]
    assert counts["tpf"] == "1.00"


def test_scrubber_goes_to_any_moment(visit: Visit) -> None:
    """Prevents: a replay that shows other frames back than forth, or never all that was."""
    page = visit.page
    page.locator(".mode").nth(0).select_option("branching")
    page.locator(".mode").nth(2).select_option("")
    visit.set(max_tokens=32, threshold=0.3, revision="joint_threshold")
    visit.race()
    whole = visit.texts()
    assert [bool(text) for text in whole] == [True, True, False]
    page.focus("#scrub")
    page.keyboard.press("Home")
    assert visit.texts() == ["", "", ""]
    assert page.locator(".block .cell").count() == 0
    shown = visit.walk("forth")
    assert visit.texts() == whole
    assert len(set(shown)) == len(shown)
    states = set(re.findall(r'class="cell (\w+)', "".join(shown)))
    assert states == {
        *("mask", "fresh", "revealed", "revised"),
        *("drafted", "accepted", "rejected", "ar"),
    }
    assert visit.walk("back")[:-1] == shown[-2::-1]
    assert visit.texts() == ["", "", ""]
    page.select_option("#axis", "forwards")
    page.keyboard.press("Home")
    page.select_option("#speed", "1")
    page.click("[data-do=play]")
    expect(page.locator("[data-do=play]")).to_have_attribute("aria-label", "Play")
    assert visit.texts() == whole
    moment = page.locator("#moment").text_content()
    assert re.fullmatch(r"(\d+) of \1 forwards", moment)


def test_escape_stops_the_streams_and_frees_the_rows(visit: Visit, served: Served) -> None:
    """Prevents: a stop that only looks like one, while the server goes on writing."""
    page = visit.page
    visit.set(max_tokens=900, temperature=1)
    page.click("#run")
    expect(page.locator(".lane .text .cell").nth(3)).to_be_attached()
    assert _metric(served, "trimode_running") == 3
    page.keyboard.press("Escape")
    visit.wait()
    assert page.locator(".badge").all_text_contents() == ["stopped"] * 3
    for _ in range(400):  # a step or two of the engine
        if _metric(served, "trimode_running") == 0:
            break
        page.wait_for_timeout(25)
    assert _metric(served, "trimode_running") == 0
    stopped = visit.texts()
    assert all(stopped)
    page.click("[data-do=start]")
    page.click("[data-do=end]")
    assert visit.texts() == stopped


def test_infill_puts_a_candidate_in_place(visit: Visit) -> None:
    """Prevents: a candidate shown in another gap, and hostile text around it taken for markup."""
    page = visit.page
    page.click("#tab-infill")
    before = f"# {HOSTILE}\nfor i in range(<FILL>):\n    print(i)\n"
    page.fill("#source", f"{before}\nprint(<FILL>)\n")
    page.click("#fill")
    expect(page.locator("#gaps fieldset")).to_have_count(2)
    chosen = page.locator("#gaps fieldset").nth(1).locator(".candidate").nth(2)
    wanted = chosen.locator(".candidate-text").text_content()
    first = page.locator("#gaps fieldset").nth(0).locator(".candidate-text").first.text_content()
    chosen.locator("input").check()
    filled = f"{before.replace('<FILL>', first)}\nprint({wanted})\n"
    assert page.locator("#filled").text_content() == filled
    scores = [float(s.replace("\u2212", "-")) for s in page.locator(".score").all_text_contents()]
    assert len(scores) == page.locator(".candidate").count()
    assert max(scores) < 0
    assert page.locator("img").count() == 0
    page.fill("#source", "nothing to fill")
    page.click("#fill")
    expect(page.locator("#infill-error")).to_have_text(re.compile(r"^.*no gap.*<FILL>.*$"))


def test_hostile_text_stays_text(visit: Visit) -> None:
    """Prevents: a prompt or an answer that runs as code, or reorders what stands around it."""
    page = visit.page
    reordering = "a\u202eb\x1b[31m"
    text = f"{HOSTILE}{reordering}"
    events = [_event("emit", 0, [HOSTILE, reordering])]
    _answer_with(page, _events(*events, {"choices": [{"text": text, "finish_reason": "length"}]}))
    page.fill("#prompt", f"<script>document.title='owned'</script>{HOSTILE}")
    visit.race()
    assert visit.texts() == [f"{HOSTILE}a\ufffdb\u241b[31m"] * 3
    assert page.locator(".lane .prompt").first.text_content().endswith(HOSTILE)
    assert page.locator("img").count() == 0
    assert page.title() == "trimode playground"
    policy = page.request.get(page.url).headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy


def test_text_is_the_streamed_text_where_tokens_are_not(visit: Visit) -> None:
    """Prevents: half characters, a swallowed space or a stop string staying on the page, where
    what single tokens read as is not what the text says."""
    page = visit.page
    events = [
        _event("emit", 0, ["x", "\ufffd", "\ufffd\ufffd", "y"]),
        _event("draft", 3, ["y", "one", "two", ""], is_masked=[False, False, False, True]),
        _event("verify", 4, ["one", "two", "bad"], num_accepted=2),
        _event("emit", 4, ["one", "two", "STOP"], new_tokens=7),
    ]
    pieces = ["x", "\u20acy one", "two", "S"]
    said = [{"choices": [{"text": piece, "finish_reason": None}]} for piece in pieces]
    _answer_with(page, _events(*events[:1], said[0], *events[1:], *said[1:]))
    visit.race()
    assert visit.texts() == ["x\u20acy onetwoS"] * 3
    states = page.locator(".lane").first.locator(".text .cell")
    assert states.all_text_contents() == ["x", "\u20ac", "", "y", " one", "two", "S"]
    assert states.evaluate_all("all => all.map(e => e.classList[1])") == [
        *("ar", "ar", "ar", "ar", "accepted", "accepted", "ar"),
    ]
    page.focus("#scrub")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.locator(".rejected").count() > 0


@pytest.mark.parametrize("end", ["broken", "error", "refused", "gone"])
def test_an_error_is_one_readable_line(visit: Visit, end: str) -> None:
    """Prevents: an error that is shown as JSON or as nothing, and a half answer taken for whole."""
    page = visit.page
    if end == "broken":
        _answer_with(page, _events(_event("emit", 0, ["half"]), end=""))
        wanted = "The connection broke off before the end."
    elif end == "error":
        failed = {"error": {"message": "the request's\ntime was up", "code": "deadline"}}
        _answer_with(page, _events(_event("emit", 0, ["half"]), failed, end=""))
        wanted = "the request's time was up"
    elif end == "refused":
        visit.set(max_tokens=1023)
        page.fill("#prompt", "x = 1\n" * 40)
        wanted = re.compile("beyond the context of 1024")
    else:
        page.route("**/v1/completions", lambda route: route.abort())
        wanted = "The server does not answer. Is it still running?"
    visit.race()
    for lane in range(3):
        error = page.locator(".lane .error").nth(lane)
        expect(error).to_have_text(wanted)
        assert "\n" not in error.text_content()
    assert page.locator(".badge").all_text_contents() == ["error"] * 3
    visit.problems[:] = [one for one in visit.problems if "net::ERR_FAILED" not in one]


def test_a_number_out_of_range_is_not_sent(visit: Visit) -> None:
    """Prevents: a number that is clamped or dropped in silence."""
    page = visit.page
    visit.set(block_length=4, reveal="steps", steps=9)
    page.click("#run")
    wanted = "Steps per block is 9; allowed: 1 to 4 in whole numbers"
    expect(page.locator("#banner")).to_have_text(wanted)
    assert page.evaluate("document.activeElement.id") == "fields-steps"
    expect(page.locator("#fields-branches")).to_be_disabled()
    page.click("#tab-infill")
    expect(page.locator("#banner")).to_be_hidden()


def test_what_went_wrong_is_forgotten_when_it_goes_well(visit: Visit, served: Served) -> None:
    """Prevents: an error on top of the page long after what it spoke of has been put right."""
    page = visit.page
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    gone = "The server does not answer. Is it still running?"
    expect(page.locator("#banner")).to_have_text(gone)
    page.unroute("**/v1/models")
    page.click("#tab-infill")
    expect(page.locator("#banner")).to_have_text(gone)
    page.fill("#source", "x = <FILL>\n")
    page.click("#fill")
    expect(page.locator(".candidate").first).to_be_visible()
    expect(page.locator("#banner")).to_be_hidden()
    visit.problems[:] = [one for one in visit.problems if "net::ERR_FAILED" not in one]


def test_auto_races_like_any_other(visit: Visit) -> None:
    """Prevents: a mode on offer that the page sends what the server refuses."""
    page = visit.page
    page.locator(".mode").nth(1).select_option("auto")
    page.locator(".mode").nth(2).select_option("")
    visit.set(max_tokens=48, block_length=6)
    visit.race()
    ar, auto, _ = visit.texts()
    assert ar
    expect(page.locator("#summary")).to_contain_text("ar and auto wrote the same text")
    assert auto == ar
    assert page.locator(".badge").all_text_contents()[:2] in (["done"] * 2, ["ended itself"] * 2)


def test_a_late_refusal_of_an_earlier_key_is_ignored(browser: Any, served: Served) -> None:
    """Prevents: the field for a key back on a page that is connected."""
    context = browser.new_context()
    page = context.new_page()
    late: list[Any] = []

    def hold(route: Any) -> None:
        if route.request.headers.get("authorization") == "Bearer a-wrong-one":
            late.append(route)
        else:
            route.continue_()

    page.route("**/v1/models", hold)
    page.goto(served.guarded_url)
    for key in ("a-wrong-one", KEY):
        expect(page.locator("#key")).to_be_focused()
        page.fill("#key", key)
        page.keyboard.press("Enter")
    expect(page.locator("#model")).to_contain_text("pocket")
    with page.expect_response(lambda response: response.status == 401):
        late[0].continue_()
    page.wait_for_timeout(200)
    expect(page.locator("#key-form")).to_be_hidden()
    expect(page.locator("#banner")).to_be_hidden()
    context.close()


def test_a_server_with_keys_asks_for_one(browser: Any, served: Served) -> None:
    """Prevents: a playground that is useless behind keys, or a key that outlives its tab."""
    context = browser.new_context()
    visit = Visit(context.new_page(), served.guarded_url)
    page = visit.page
    expect(page.locator("#key")).to_be_focused()
    page.fill("#key", "a-wrong-one")
    page.keyboard.press("Enter")
    expect(page.locator("#banner")).to_be_visible()
    expect(page.locator("#key")).to_be_focused()
    page.fill("#key", KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_contain_text("pocket")
    expect(page.locator("#key-form")).to_be_hidden()
    visit.set(max_tokens=2)
    visit.race()
    assert all(visit.texts())
    assert KEY not in page.evaluate("JSON.stringify(localStorage) + document.cookie")
    context.close()
    assert visit.problems == []


def test_all_can_be_done_by_keyboard(visit: Visit) -> None:
    """Prevents: a control out of reach of the keyboard, an unseen focus, a shortcut that eats
    what is typed."""
    page = visit.page
    visit.set(max_tokens=12)
    visit.race()
    page.focus(".skip")
    walked = ["skip"]
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => { const e = document.activeElement; return [
                e.id || e.className || e.tagName, getComputedStyle(e).outlineStyle]; }"""
        )
        if name == "BODY" or name in walked[:1]:
            break
        assert outline != "none", name
        walked.append(name)
    wanted = ["skip", "tab-race", "theme", "help-open", "prompt", "run", "fields-max_tokens"]
    wanted += ["fields-threshold", "in-turn", "mode", "canvas", "scrub", "speed", "axis"]
    places = [walked.index(name) for name in wanted]
    assert all(one < other for one, other in pairwise(places)), walked
    assert walked.count("mode") == walked.count("canvas") == 3
    page.focus("#prompt")
    page.keyboard.press("Control+a")
    page.keyboard.type("def d[?]( ")
    assert page.input_value("#prompt") == "def d[?]( "
    expect(page.locator("#help")).to_be_hidden()
    page.keyboard.press("Control+Enter")
    visit.wait()
    assert all(visit.texts())
    page.focus(".canvas")
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    page.keyboard.press("d")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.focus("#tab-race")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-infill")).to_be_focused()
    expect(page.locator("#source")).to_be_visible()


def test_a_phone_needs_no_sideways_scrolling(browser: Any, served: Served) -> None:
    """Prevents: a page that is cut off or must be dragged about on a small screen."""
    context = browser.new_context(
        viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True
    )
    visit = Visit(context.new_page(), served.url)
    page = visit.page
    expect(page.locator("#model")).to_contain_text("pocket")
    page.fill("#prompt", "x" * 60 + " " * 60 + "y = ")
    page.locator("summary").first.tap()
    visit.set(max_tokens=16)
    visit.race()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    inner = "all => all.every(e => e.scrollWidth <= e.clientWidth)"
    assert page.locator(".lane .canvas").evaluate_all(inner)
    page.click("#tab-infill")
    page.fill("#source", "y" * 60 + " = <FILL>\n")
    page.click("#fill")
    expect(page.locator(".candidate").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    context.close()
    assert visit.problems == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(browser: Any, served: Served, scheme: str) -> None:
    """Prevents: a colour below WCAG AA's contrast of 4.5 to 1 in either scheme."""
    context = browser.new_context(color_scheme=scheme)
    visit = Visit(context.new_page(), served.url)
    page = visit.page
    expect(page.locator("#model")).to_contain_text("pocket")
    visit.set(max_tokens=8)
    visit.race()
    texts = page.evaluate(_CONTRASTS)
    assert len(texts) > 60
    faint = [(name, round(ratio, 2)) for name, ratio in texts if ratio < 4.5]
    assert faint == []
    context.close()
    assert visit.problems == []


_CONTRASTS = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const part = (x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const color = rgb(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.body.querySelectorAll("*")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const off = e.closest(".off, :disabled, option, .unseen, template, noscript, script");
    if (!own || off || !e.checkVisibility()) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))];
    found.push([`${e.tagName}.${e.className}`, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)]);
  }
  return found;
}"""


def test_a_model_that_chats_is_asked_a_question(browser: Any, served: Served) -> None:
    """Prevents: a chat model that is met with half a Python class, and a race without its drafter;
    a prompt of the visitor's own replaced."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    card = {"modes": ["ar", "diffusion", "linear", "branching", "auto"], "has_drafter": True}
    card |= {"has_chat": True, "num_parameters": 135e6, "context_len": 1024, "block_length": 8}
    models = {"data": [{"id": "talker", "trimode": card}]}
    page.route("**/v1/models", lambda route: route.fulfill(json=models))
    bodies: list[dict[str, Any]] = []

    def note(route: Any) -> None:
        bodies.append(route.request.post_data_json)
        route.fulfill(status=503, json={"error": {"message": "not today"}})

    page.route("**/v1/chat/completions", note)
    page.goto(served.url)
    expect(page.locator("#model")).to_contain_text("talker")
    expect(page.locator("[name=task][value=chat]")).to_be_checked()
    assert [lane.input_value() for lane in page.locator(".lane select").all()] == [
        *("ar", "linear", "auto")
    ]
    question = page.locator("#prompt").input_value()
    assert question.endswith("?")
    page.click("#run")
    expect(page.locator("#run")).to_be_enabled()
    assert [body["mode"] for body in bodies] == ["ar", "linear", "auto"]
    for body in bodies:
        assert body["messages"] == [{"role": "user", "content": question}]
        assert ("min_gain" in body) == (body["mode"] == "linear")
    page.locator("#examples button").nth(1).click()
    assert page.locator("#prompt").input_value() != question
    page.locator("#prompt").fill("My own")
    page.locator("[name=task][value=text]").check()
    assert page.locator("#prompt").input_value() == "My own"
    assert "class" in page.locator("#examples").text_content()
    page.context.close()
