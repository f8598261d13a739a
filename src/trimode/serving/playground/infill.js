// The infill tab: a text with gaps, what fills them, and every candidate to be tried in place.

import { request } from "./api.js";
import { printable, spelled } from "./lane.js";

const MARKER = "<FILL>";
const EXAMPLE = `class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.<FILL>

    def is_empty(self):
        return not <FILL>
`;

export class Infill {
  // `onRun()` hears of every start; `onError(error)` may deal with an error itself, and then
  // returns true.
  constructor({ settings, modelName, onRun, onError }) {
    const find = (id) => document.getElementById(id);
    Object.assign(this, { settings, modelName, onRun, onError, controller: null });
    this.source = find("source");
    this.button = find("fill");
    this.stopButton = find("fill-stop");
    this.error = find("infill-error");
    this.status = find("infill-status");
    this.filled = find("filled");
    this.gaps = find("gaps");
    this.source.value = EXAMPLE;
    find("insert-gap").addEventListener("click", () => this.#insertMarker());
    find("infill-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    this.stopButton.addEventListener("click", () => this.stop());
    this.#showPlain(this.source.value);
    this.source.addEventListener("input", () => {
      this.gaps.replaceChildren();
      this.#showPlain(this.source.value);
    });
  }

  stop() {
    this.controller?.abort();
  }

  async run() {
    if (this.controller) return;
    this.onRun();
    const problem = this.settings.problem();
    this.#showError(problem ?? "");
    if (problem) return;
    const text = this.source.value;
    this.controller = new AbortController();
    this.#setRunning(true);
    this.status.textContent = "Filling …";
    const body = { model: this.modelName(), text, ...this.settings.values() };
    try {
      const { signal } = this.controller;
      const response = await request("v1/infill", { body, signal });
      this.#show(text, await response.json());
    } catch (error) {
      this.status.textContent = error.name === "AbortError" ? "Stopped." : "";
      if (error.name !== "AbortError" && !this.onError(error)) this.#showError(error.message);
    } finally {
      this.controller = null;
      this.#setRunning(false);
    }
  }

  #setRunning(isRunning) {
    this.button.disabled = isRunning;
    this.stopButton.disabled = !isRunning;
    this.filled.classList.toggle("waiting", isRunning);
  }

  #showError(message) {
    this.error.hidden = !message;
    this.error.textContent = message;
  }

  #insertMarker() {
    this.source.setRangeText(
      MARKER, this.source.selectionStart, this.source.selectionEnd, "end");
    this.source.dispatchEvent(new Event("input"));
    this.source.focus();
  }

  #showPlain(text) {
    const parts = text.split(MARKER);
    this.filled.replaceChildren(...parts.flatMap((part, i) => (
      i ? [span("gap-mark", `gap ${i}`), printable(part)] : [printable(part)])));
  }

  #show(source, answer) {
    const pieces = source.split(MARKER);
    const chosen = answer.gaps.map((gap) => gap.candidates[0].text);
    const redraw = () => {
      this.filled.replaceChildren(printable(pieces[0]));
      chosen.forEach((text, i) => {
        this.filled.append(span("cell revealed fill", printable(text)), printable(pieces[i + 1]));
      });
    };
    this.gaps.replaceChildren(...answer.gaps.map((gap, i) => (
      candidateList(gap, i, (text) => { chosen[i] = text; redraw(); }))));
    redraw();
    this.status.textContent = summary(answer);
  }
}

function summary(answer) {
  const gaps = answer.gaps.length;
  const cost = answer.usage?.trimode;
  const forwards = cost ? ` ${cost.forwards.total} forwards, ${spelled(cost.seconds, 2)} s.` : "";
  const note = gaps > 1 ? " Later gaps were filled after the first choice of those before." : "";
  return `${gaps} gap${gaps > 1 ? "s" : ""} filled.${forwards}${note}`;
}

function candidateList(gap, index, onChoose) {
  const set = document.createElement("fieldset");
  const legend = document.createElement("legend");
  legend.textContent = `Gap ${index + 1}: ${gap.candidates.length} candidates, the best first`;
  set.append(legend);
  gap.candidates.forEach((candidate, rank) => {
    const label = document.createElement("label");
    label.className = "candidate";
    const radio = document.createElement("input");
    Object.assign(radio, { type: "radio", name: `gap-${index}`, checked: rank === 0 });
    radio.addEventListener("change", () => onChoose(candidate.text));
    label.append(radio, span("candidate-text", printable(candidate.text) || " "), scores(candidate));
    set.append(label);
  });
  return set;
}

function scores(candidate) {
  const { fill_log_prob: fill, suffix_log_prob: suffix, is_valid: isValid } = candidate;
  const found = span("scores", "");
  if (isValid !== null && isValid !== undefined) {
    found.append(span(isValid ? "valid" : "invalid", isValid ? "✓ valid" : "✗ invalid"));
  }
  const total = span("score", spelled(fill + suffix, 1));
  total.title = `log-probability in nats: fill ${spelled(fill, 1)}, text behind it ${spelled(suffix, 1)}`;
  found.append(total);
  return found;
}

function span(className, text) {
  const element = document.createElement("span");
  element.className = className;
  element.textContent = text;
  return element;
}
