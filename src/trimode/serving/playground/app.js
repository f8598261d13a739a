// The page: what is served, the race, tabs, theme, keys.

import { request, setKey, stream } from "./api.js";
import { Infill } from "./infill.js";
import { Lane, spelled } from "./lane.js";
import { Replay } from "./replay.js";
import { INFILL_FIELDS, RACE_FIELDS, Settings } from "./settings.js";

const QUESTIONS = {
  "a question": "What is a hash table?",
  "a function": "Write a Python function that reverses a string.",
  "a list": "Give me three tips for a good night's sleep.",
};
const BEGINNINGS = {
  "a class": "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):",
  "a function": "def load_config(path):\n    with open(path) as",
  "a test": "import unittest\n\n\nclass TestParser(unittest.TestCase):\n    def setUp(self):",
};
const NUM_LANES = 3;
const THEMES = ["system", "light", "dark"];

const find = (id) => document.getElementById(id);
const banner = find("banner");
const prompt = find("prompt");
const lanes = Array.from({ length: NUM_LANES }, (_, i) => new Lane(find("lane"), i + 1));
const settings = new Settings(find("fields"), RACE_FIELDS);
const replay = new Replay(find("replay"), () => lanes.filter((lane) => lane.isOn));
let card = null;
let controller = null; // of the race that runs
let isPromptTouched = false;

const infill = new Infill({
  settings: new Settings(find("infill-fields"), INFILL_FIELDS),
  modelName: () => card?.name,
  onRun: () => showBanner(""),
  onError: askForKey,
});

// What is served.

let lastAttempt = 0;

// Only the latest attempt counts: an answer to an earlier key may come after that to a later one.
async function connect() {
  const attempt = ++lastAttempt;
  try {
    const { data } = await (await request("v1/models")).json();
    if (attempt !== lastAttempt) return;
    card = { name: data[0].id, ...data[0].trimode };
  } catch (error) {
    if (attempt !== lastAttempt) return;
    if (!askForKey(error)) showBanner(error.message);
    find("model").textContent = "not connected";
    return;
  }
  showBanner("");
  find("key-form").hidden = true;
  const millions = (card.num_parameters / 1e6).toFixed(1);
  find("model").textContent = `${card.name} · ${millions} M parameters · context ${card.context_len}`;
  find("task").hidden = !card.has_chat;
  settings.setMax("max_tokens", Math.min(512, card.context_len - 1), card.context_len - 1);
  settings.setMax("block_length", Math.max(32, card.block_length), card.context_len);
  settings.set("block_length", card.block_length);
  if (!isPromptTouched) suggest();
  // A drafter's model shows what drafting brings; one without, all three ways.
  const first = card.has_drafter ? ["ar", "linear", "auto"] : ["ar", "diffusion", "linear"];
  lanes.forEach((lane, i) => {
    const names = card.modes.map((mode) => new Option(mode, mode));
    lane.mode.replaceChildren(...names, new Option("– none –", ""));
    lane.mode.value = card.modes.includes(first[i]) ? first[i] : "";
  });
  showModes();
}

// A first prompt: a question for a model that chats, else the beginning of a text.
function suggest() {
  document.querySelector(`[name=task][value=${card?.has_chat ? "chat" : "text"}]`).checked = true;
  showExamples();
  prompt.value = Object.values(examples())[0];
  previewPrompt();
}

const examples = () => (isChat() ? QUESTIONS : BEGINNINGS);

function showExamples() {
  const buttons = Object.entries(examples()).map(([name, text]) => {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", className: "link", textContent: name });
    button.addEventListener("click", () => {
      prompt.value = text;
      isPromptTouched = false;
      previewPrompt();
    });
    return button;
  });
  find("examples").replaceChildren(...buttons.flatMap((button) => [button, " "]));
}

// What a block's length allows.
function limitByBlock() {
  const length = settings.value("block_length");
  if (!(length >= 2)) return;
  settings.setMax("steps", length);
  settings.setMax("branches", 2 * length - 1);
}

function showModes() {
  for (const lane of lanes) lane.showMode();
  settings.setModes(lanes.map((lane) => lane.mode.value));
}

function showBanner(message) {
  banner.hidden = !message;
  banner.textContent = message;
}

// A server with keys answers 401; then the field for one appears.
function askForKey(error) {
  if (error.status !== 401) return false;
  showBanner(error.message);
  find("key-form").hidden = false;
  find("key").focus();
  return true;
}

// The race.

async function race() {
  if (controller) return;
  showBanner("");
  if (!card) await connect();
  if (!card) return;
  const running = lanes.filter((lane) => lane.isOn);
  const problem = settings.problem() ?? (running.length ? null : "Choose a mode for a lane first.");
  if (problem) {
    showBanner(problem);
    return;
  }
  const asked = { text: prompt.value, isChat: isChat() };
  controller = new AbortController();
  setRunning(true);
  for (const lane of lanes) lane.reset(textGoneOnWith(), settings.value("max_tokens"));
  replay.follow();
  if (find("in-turn").checked) {
    for (const lane of running) if (!controller.signal.aborted) await runLane(lane, asked);
  } else {
    await Promise.all(running.map((lane) => runLane(lane, asked)));
  }
  controller = null;
  setRunning(false);
  replay.refresh();
  showVerdict(running);
}

async function runLane(lane, { text, isChat }) {
  const { signal } = controller;
  const mode = lane.mode.value;
  const body = {
    model: card.name, mode, ...settings.values(mode),
    ...(isChat ? { messages: [{ role: "user", content: text }] } : { prompt: text }),
    stream: true, events: true, stream_options: { include_usage: true },
  };
  lane.setState("running");
  try {
    const path = isChat ? "v1/chat/completions" : "v1/completions";
    for await (const chunk of stream(path, { body, signal })) {
      lane.take(chunk);
      replay.refresh();
    }
    lane.setState("done", lane.reason === "stop" ? "ended itself" : "done");
  } catch (error) {
    if (error.name === "AbortError") lane.setState("stopped");
    else {
      lane.showError(error.message);
      askForKey(error);
    }
  }
  lane.finish();
  replay.refresh();
}

const isChat = () => document.querySelector("[name=task]:checked").value === "chat";

// What stands in a lane before what is written; an answer stands alone.
const textGoneOnWith = () => (isChat() ? "" : prompt.value);

// Until there is something to see, the lanes show what they will go on with.
function previewPrompt() {
  for (const lane of lanes) if (lane.state === "ready") lane.reset(textGoneOnWith(), 1);
}

function setRunning(isRunning) {
  find("run").disabled = isRunning;
  find("stop").disabled = !isRunning;
  for (const lane of lanes) lane.mode.disabled = isRunning;
  if (!isRunning) return;
  const [counts, text] = find("summary").children;
  counts.textContent = "";
  text.textContent = "Running …";
}

// What came out: whose texts are equal, and for those who do not see the lanes, the counts.
function showVerdict(running) {
  const [counts, text] = find("summary").children;
  const done = running.filter((lane) => lane.state === "done");
  counts.textContent = done.filter((lane) => lane.usage?.trimode).map((lane) => {
    const { forwards, tokens_per_forward: tpf } = lane.usage.trimode;
    return `${lane.mode.value}: ${lane.usage.completion_tokens} tokens in ${forwards.total} forwards,`
      + ` ${spelled(tpf.decode, 2)} tokens per forward. `;
  }).join("");
  const [first, ...others] = done;
  const found = others.map((other) => {
    const names = `${first.mode.value} and ${other.mode.value}`;
    return first.recording.text === other.recording.text
      ? `${names} wrote the same text.`
      : `${names} differ from ${whereApart(first, other)} on.`;
  });
  if (running.some((lane) => lane.state === "stopped")) found.unshift("Stopped.");
  text.textContent = found.join(" ") || (done.length ? "Done." : "");
}

function whereApart(a, b) {
  const [one, two] = [a.recording.text, b.recording.text];
  let at = 0;
  while (one[at] === two[at]) at++;
  const lines = one.slice(0, at).split("\n");
  return `line ${lines.length}, character ${lines.at(-1).length + 1}`;
}

function stop() {
  controller?.abort();
  infill.stop();
}

// Tabs, theme, help.

const tabs = ["race", "infill"];

function openTab(name) {
  if (card && find("key-form").hidden) showBanner(""); // it spoke of what the other tab was asked
  for (const each of tabs) {
    const tab = find(`tab-${each}`);
    tab.setAttribute("aria-selected", String(each === name));
    tab.tabIndex = each === name ? 0 : -1;
    find(each).hidden = each !== name;
  }
}

for (const name of tabs) {
  const tab = find(`tab-${name}`);
  tab.addEventListener("click", () => openTab(name));
  tab.addEventListener("keydown", (event) => {
    const wanted = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!wanted) return;
    event.preventDefault();
    event.stopPropagation();
    const next = tabs[(tabs.indexOf(name) + wanted + tabs.length) % tabs.length];
    openTab(next);
    find(`tab-${next}`).focus();
  });
}

function setTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  localStorage.setItem("trimode.theme", theme);
  find("theme").textContent = { system: "◐ Auto", light: "☀ Light", dark: "☾ Dark" }[theme];
  find("theme").setAttribute("aria-label", `Colours: ${theme === "system" ? "as the system" : theme}`);
}

function nextTheme() {
  const now = localStorage.getItem("trimode.theme") ?? "system";
  setTheme(THEMES[(THEMES.indexOf(now) + 1) % THEMES.length]);
}

// Keys.

const SINGLE_KEYS = {
  " ": () => replay.act("play"),
  ArrowLeft: () => replay.act("back"),
  ArrowRight: () => replay.act("forth"),
  Home: () => replay.act("start"),
  End: () => replay.act("end"),
  "[": () => replay.changeSpeed(-1),
  "]": () => replay.changeSpeed(1),
  d: nextTheme,
  "?": () => find("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (find("help").open) return;
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (find("race").hidden) infill.run();
    else race();
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const act = SINGLE_KEYS[event.key];
  if (!act || !find("single-keys").checked || ownsKey(event.target, event.key)) return;
  event.preventDefault();
  act();
});

// Whether a key has a meaning of its own where the focus is.
function ownsKey(target, key) {
  if (target.id === "scrub") return false; // its own steps would be too coarse
  if (target.matches("textarea, select, input:not([type=checkbox])")) return true;
  if (key === " ") return target.matches("button, summary, input, label");
  return (key === "Home" || key === "End") && target.matches(".canvas");
}

// Start.

suggest();
prompt.addEventListener("input", () => {
  isPromptTouched = true;
  previewPrompt();
});
find("task").addEventListener("change", () => {
  showExamples();
  if (!isPromptTouched) prompt.value = Object.values(examples())[0];
  previewPrompt();
});
find("lanes").append(...lanes.map((lane) => lane.element));
for (const lane of lanes) {
  lane.mode.addEventListener("change", () => {
    lane.reset(textGoneOnWith(), 1); // what it shows was not written in this mode
    showModes();
    replay.refresh();
  });
}
settings.root.addEventListener("input", limitByBlock);
find("race-form").addEventListener("submit", (event) => {
  event.preventDefault();
  race();
});
find("stop").addEventListener("click", stop);
find("theme").addEventListener("click", nextTheme);
find("help-open").addEventListener("click", () => find("help").showModal());
find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(find("key").value);
  find("key").value = "";
  connect();
});
setTheme(localStorage.getItem("trimode.theme") ?? "system");
if (matchMedia("(max-width: 60rem)").matches) find("settings").open = false;
connect();
