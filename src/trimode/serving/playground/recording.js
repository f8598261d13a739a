// One text as it came to be: events in, frames out. Knows nothing of the page.
//
// A frame is a moment: how many tokens stand, and the block being worked on behind them. Tokens
// that stand never change, so a frame holds their number only, and any moment is shown at once.

const REPLACEMENT = "\ufffd";
const KEPT = new Set(["accepted", "revealed", "revised"]);
const NOTHING = {
  elapsed: 0, forwards: 0, tokens: 0, numSettled: 0, block: [], drafted: 0, accepted: 0,
};

export class Recording {
  constructor() {
    this.settled = []; // {text, state} of every token that stands
    this.frames = [NOTHING];
    this.text = ""; // as the server streams it: the truth where tokens are parts of characters
    this.prefills = null; // forwards before the first token
    this.firstStale = Infinity; // settled tokens from here on have other text than before
    this.start = 0; // position of the block's first token
    this.numPlaced = 0; // settled tokens whose text is taken from `text`, and where that ends
    this.placedLen = 0;
  }

  get last() {
    return this.frames[this.frames.length - 1];
  }

  push(event) {
    const { last } = this;
    const frame = {
      ...last,
      elapsed: Math.max(event.elapsed_s, last.elapsed),
      forwards: Math.max(event.num_forwards, last.forwards),
      tokens: event.new_tokens,
    };
    if (event.kind === "emit") this.#emit(event, frame);
    else if (event.kind === "verify") this.#verify(event, frame);
    else if (event.kind === "revise") this.#revise(event, frame);
    else if (event.token_ids.length > 1) this.#pass(event, frame);
    this.frames.push(frame);
  }

  addText(piece) {
    this.text += piece;
    this.#place(false);
  }

  // All of it is there: what the text leaves over belongs to the last tokens.
  finish() {
    this.#place(true);
    if (this.last.block.length) this.frames.push({ ...this.last, block: [] });
  }

  // Index of the last frame at or before a moment on an axis, `elapsed` or `forwards`.
  indexAt(axis, moment) {
    let low = 0;
    let high = this.frames.length;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.frames[middle][axis] <= moment) low = middle;
      else high = middle;
    }
    return low;
  }

  // Tokens per forward without the prefill, as the server counts it at the end.
  tpf(frame) {
    const forwards = frame.forwards - (this.prefills ?? 0);
    return frame.tokens && forwards > 0 ? (frame.tokens - 1) / forwards : null;
  }

  // A pass over a block; its first token stands already.
  #pass(event, frame) {
    const isSame = this.start === event.position + 1 && !frame.block.some((c) => c.isGhost);
    const before = isSame ? frame.block : [];
    const [fresh, old] = event.kind === "draft" ? ["drafted", "drafted"] : ["fresh", "revealed"];
    this.start = event.position + 1;
    frame.block = event.texts.slice(1).map((text, i) => {
      if (event.is_masked[i + 1]) return { text: "", state: "mask" };
      const was = before[i];
      if (!was || was.state === "mask") return { text, state: fresh };
      return { text, state: was.state === "revised" && was.text === text ? "revised" : old };
    });
  }

  #verify(event, frame) {
    this.start = event.position;
    frame.block = event.texts.map((text, i) => (
      { text, state: i < event.num_accepted ? "accepted" : "rejected" }));
    frame.drafted += event.texts.length;
    frame.accepted += event.num_accepted;
  }

  #revise(event, frame) {
    const at = event.position - this.start;
    frame.block = frame.block.map((cell, i) => (
      i === at ? { text: event.texts[0], state: "revised", old: event.old_texts[0] } : cell));
  }

  #emit(event, frame) {
    this.prefills ??= event.num_forwards;
    event.texts.forEach((text, i) => {
      const cell = frame.block[event.position + i - this.start];
      const state = cell?.state === "fresh" ? "revealed" : cell?.state;
      this.settled.push(
        KEPT.has(state) && !cell.isGhost ? { ...cell, text, state } : { text, state: "ar" });
    });
    frame.numSettled = this.settled.length;
    // What was rejected stays in view until the next pass, or it would never be seen.
    frame.block = frame.block.filter((cell) => cell.state === "rejected" && !cell.isGhost)
      .map((cell) => ({ ...cell, isGhost: true }));
  }

  // Give settled tokens their share of the streamed text. A token that is part of a character, or
  // loses its space when decoded alone, gets what lies before the next token that is clear.
  #place(isEnd) {
    let { numPlaced, placedLen } = this;
    for (let i = numPlaced; i < this.settled.length; i++) {
      const own = this.settled[i].text;
      if (!own || own.includes(REPLACEMENT)) continue;
      const at = this.text.indexOf(own, placedLen);
      if (at < 0 || at - placedLen > 1 + 4 * (i - numPlaced)) break;
      this.#assign(numPlaced, i, this.text.slice(placedLen, at), own);
      numPlaced = i + 1;
      placedLen = at + own.length;
    }
    if (isEnd) this.#assign(numPlaced, this.settled.length - 1, this.text.slice(placedLen), "");
    Object.assign(this, { numPlaced, placedLen });
  }

  // Tokens first..last say `between + own`.
  #assign(first, last, between, own) {
    for (let i = first; i <= last; i++) {
      let text = i === first && first < last ? between : "";
      if (i === last) text = (first < last ? "" : between) + own;
      if (this.settled[i].text === text) continue;
      this.settled[i].text = text;
      this.firstStale = Math.min(this.firstStale, i);
    }
  }
}
