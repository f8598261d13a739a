// One of the contestants: its header, its counts and its canvas.

import { Recording } from "./recording.js";

export const ABOUT = {
  ar: "One token a forward; the text all speculation must equal.",
  diffusion: "A block at a time, revealed in a few passes.",
  linear: "Drafts a block by diffusion, verifies it causally.",
  branching: "As linear, the next draft made while verifying.",
  quadratic: "As branching, a draft for every acceptance length.",
  auto: "Picks the speculation that is fastest right now.",
};

// Unseen characters could reorder or hide what stands beside them; they get a picture instead.
const UNSAFE = /[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g;

export function printable(text) {
  return text.replace(UNSAFE, (character) => {
    const code = character.charCodeAt(0);
    if (code === 0x7f) return "\u2421";
    return code < 0x20 ? String.fromCharCode(0x2400 + code) : "\ufffd";
  });
}

export const spelled = (number, digits) => (
  number === null || !Number.isFinite(number) ? "–" : number.toFixed(digits).replace("-", "\u2212"));

export class Lane {
  constructor(template, number) {
    this.element = template.content.firstElementChild.cloneNode(true);
    const find = (selector) => this.element.querySelector(selector);
    this.mode = find(".mode");
    this.badge = find(".badge");
    this.about = find(".about");
    this.bar = find(".track i");
    this.error = find(".error");
    this.canvas = find(".canvas");
    this.prompt = find(".prompt");
    this.text = find(".text");
    this.block = find(".block");
    this.cost = find(".cost");
    this.copy = find(".copy");
    this.counts = Object.fromEntries(
      [...this.element.querySelectorAll("[data-count]")].map((dd) => [dd.dataset.count, dd]));
    this.mode.setAttribute("aria-label", `Mode of lane ${number}`);
    this.canvas.setAttribute("aria-label", `Text of lane ${number}`);
    this.element.setAttribute("aria-label", `Lane ${number}`);
    this.copy.setAttribute("aria-label", `Copy the text of lane ${number}`);
    this.copy.addEventListener("click", () => this.#copy());
    this.reset("", 1);
  }

  get isOn() {
    return this.mode.value !== "";
  }

  showMode() {
    this.about.textContent = this.isOn ? ABOUT[this.mode.value] ?? "" : "Not in the race.";
    this.element.classList.toggle("idle", !this.isOn);
  }

  reset(prompt, maxTokens) {
    this.recording = new Recording();
    this.usage = null;
    this.reason = null;
    this.index = 0;
    this.maxTokens = maxTokens;
    this.text.replaceChildren();
    this.block.replaceChildren();
    this.prompt.textContent = printable(prompt);
    this.cost.textContent = "";
    this.copy.hidden = true;
    this.showError("");
    this.setState("ready");
    this.show(0);
  }

  setState(state, text = state) {
    this.state = state;
    this.badge.dataset.state = state;
    this.badge.textContent = text;
  }

  showError(message) {
    this.error.hidden = !message;
    this.error.textContent = message;
    if (message) this.setState("error");
  }

  // A chunk of the stream, as it comes.
  take(chunk) {
    if (chunk.trimode_event) this.recording.push(chunk.trimode_event);
    if (chunk.usage) this.usage = chunk.usage;
    const [choice] = chunk.choices ?? [];
    const piece = choice?.text ?? choice?.delta?.content;
    if (piece) this.recording.addText(piece);
    if (choice?.finish_reason) this.reason = choice.finish_reason;
  }

  // The stream is over, be it whole or broken off.
  finish() {
    if (this.state === "done") this.recording.finish();
    this.copy.hidden = !navigator.clipboard || !this.recording.text;
    const forwards = this.usage?.trimode?.forwards;
    if (!forwards) return;
    const kinds = Object.entries(forwards).filter(([kind, n]) => n && kind !== "total");
    this.cost.textContent = kinds.map(([kind, n]) => `${n} ${kind}`).join(" · ");
    const { drafted, accepted } = this.recording.last;
    if (drafted) this.cost.textContent += ` · ${accepted} of ${drafted} drafted accepted`;
  }

  // Put the frame of this index on the page, changing as little of it as may be.
  show(index) {
    const { recording } = this;
    const frame = recording.frames[index];
    const isFollowing = this.canvas.scrollTop + this.canvas.clientHeight
      >= this.canvas.scrollHeight - 24;
    this.index = index;
    const stale = Math.min(recording.firstStale, frame.numSettled);
    recording.firstStale = Infinity;
    while (this.text.childNodes.length > stale) this.text.lastChild.remove();
    const added = document.createDocumentFragment();
    for (let i = this.text.childNodes.length; i < frame.numSettled; i++) {
      added.append(fillCell(document.createElement("span"), recording.settled[i]));
    }
    this.text.append(added);
    while (this.block.childNodes.length > frame.block.length) this.block.lastChild.remove();
    frame.block.forEach((cell, i) => {
      const span = this.block.childNodes[i] ?? this.block.appendChild(document.createElement("span"));
      fillCell(span, cell);
    });
    this.#showCounts(frame);
    if (isFollowing) this.canvas.scrollTop = this.canvas.scrollHeight;
  }

  #showCounts(frame) {
    const { recording, counts } = this;
    const isEnd = frame === recording.last && this.usage?.trimode;
    const final = isEnd ? this.usage.trimode : null;
    const forwards = final?.forwards.total ?? frame.forwards;
    const tpf = final ? final.tokens_per_forward.decode : recording.tpf(frame);
    const rate = final?.tokens_per_second
      ?? (frame.elapsed > 0 ? frame.tokens / frame.elapsed : null);
    const tokens = isEnd ? this.usage.completion_tokens : frame.tokens;
    setText(counts.forwards, forwards ? String(forwards) : "–");
    setText(counts.tokens, forwards ? String(tokens) : "–");
    setText(counts.tpf, spelled(tpf, 2));
    setText(counts.rate, spelled(rate, rate < 100 ? 1 : 0));
    this.bar.style.transform = `scaleX(${Math.min(tokens / this.maxTokens, 1)})`;
  }

  async #copy() {
    try {
      await navigator.clipboard.writeText(this.recording.text);
      this.copy.textContent = "Copied";
    } catch {
      this.copy.textContent = "The browser does not allow it";
    }
    setTimeout(() => { this.copy.textContent = "Copy text"; }, 1500);
  }
}

function fillCell(span, cell) {
  const text = printable(cell.text);
  let name = `cell ${cell.state}`;
  if (cell.isGhost) name += " ghost";
  if (text.startsWith("\n")) name += " newline";
  if (text && !text.trim()) name += " space";
  if (span.className !== name) span.className = name;
  setText(span, text);
  if (cell.old === undefined) span.removeAttribute("title");
  else span.title = `was ${JSON.stringify(cell.old)}`;
  return span;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
