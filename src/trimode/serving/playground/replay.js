// The scrubber: a moment on an axis (time or forwards), shown in all lanes at once.

export class Replay {
  // `lanes()` are those that have something to show.
  constructor(root, lanes) {
    this.root = root;
    const find = (selector) => root.querySelector(selector);
    this.lanes = lanes;
    this.scrub = find("#scrub");
    this.moment = find("#moment");
    this.speed = find("#speed");
    this.axisPick = find("#axis");
    this.playButton = find("[data-do=play]");
    this.playIcon = find("[data-do=play] path");
    this.at = 0;
    this.isPlaying = false;
    this.isFollowing = true; // the newest moment is shown as it comes
    this.frameAsked = 0;
    this.scrub.addEventListener("input", () => this.goTo(this.scrub.valueAsNumber));
    this.axisPick.addEventListener("change", () => this.#changeAxis());
    for (const button of root.querySelectorAll("[data-do]")) {
      button.addEventListener("click", () => this.act(button.dataset.do));
    }
    this.#showMoment();
  }

  get axis() {
    return this.axisPick.value;
  }

  get end() {
    return Math.max(0, ...this.lanes().map((lane) => lane.recording.last[this.axis]));
  }

  act(name) {
    if (name === "play") {
      if (this.isPlaying) this.pause();
      else this.play();
    } else if (name === "start") this.goTo(0);
    else if (name === "end") this.follow();
    else this.step(name === "back" ? -1 : 1);
  }

  // Something new came in: show it with the next picture, if the newest is what is being shown.
  refresh() {
    if (this.frameAsked) return;
    this.frameAsked = requestAnimationFrame(() => {
      this.frameAsked = 0;
      if (this.isFollowing) this.follow();
      else this.#showMoment();
    });
  }

  follow() {
    this.pause();
    this.isFollowing = true;
    this.at = this.end;
    for (const lane of this.lanes()) lane.show(lane.recording.frames.length - 1);
    this.#showMoment();
  }

  goTo(moment) {
    this.pause();
    this.isFollowing = false;
    this.#show(moment);
  }

  play() {
    if (!this.lanes().length) return;
    if (this.at >= this.end) this.#show(0);
    this.isFollowing = false;
    this.isPlaying = true;
    let before = performance.now();
    const tick = (now) => {
      if (!this.isPlaying) return;
      const seconds = ((now - before) / 1000) * Number(this.speed.value);
      before = now;
      this.#show(this.at + seconds * this.#unitsPerSecond());
      if (this.at >= this.end) this.pause();
      else requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
    this.#showMoment();
  }

  pause() {
    this.isPlaying = false;
    this.#showMoment();
  }

  // One frame on or back, in the lane that is next; by forwards, one forward in all.
  step(direction) {
    this.pause();
    this.isFollowing = false;
    if (this.axis === "forwards") {
      this.#show(Math.round(this.at) + direction);
      return;
    }
    let next = null;
    for (const lane of this.lanes()) {
      const index = direction > 0 ? lane.index + 1 : lane.index;
      const frame = lane.recording.frames[index];
      if (!frame || index === 0) continue;
      const isNearer = next === null || direction * (frame.elapsed - next.elapsed) < 0;
      if (isNearer) next = { lane, elapsed: frame.elapsed };
    }
    if (next === null) return;
    next.lane.show(next.lane.index + direction);
    this.at = Math.max(...this.lanes().map((l) => l.recording.frames[l.index].elapsed));
    this.#showMoment();
  }

  changeSpeed(direction) {
    const index = this.speed.selectedIndex - direction;
    this.speed.selectedIndex = Math.min(Math.max(index, 0), this.speed.options.length - 1);
  }

  // A replay by forwards takes as long as it took.
  #unitsPerSecond() {
    if (this.axis === "elapsed") return 1;
    const seconds = Math.max(0.1, ...this.lanes().map((lane) => lane.recording.last.elapsed));
    return this.end / seconds;
  }

  #changeAxis() {
    const share = this.scrub.max > 0 ? this.at / Number(this.scrub.max) : 0;
    if (this.isFollowing) this.follow();
    else this.goTo(share * this.end);
  }

  #show(moment) {
    this.at = Math.min(Math.max(moment, 0), this.end);
    for (const lane of this.lanes()) lane.show(lane.recording.indexAt(this.axis, this.at));
    this.#showMoment();
  }

  #showMoment() {
    const { end } = this;
    const text = this.axis === "elapsed"
      ? `${this.at.toFixed(2)} of ${end.toFixed(2)} s`
      : `${Math.floor(this.at)} of ${end} forwards`;
    this.scrub.max = end || 1;
    this.scrub.value = this.at;
    this.scrub.disabled = end === 0;
    this.root.classList.toggle("empty", end === 0);
    this.scrub.setAttribute("aria-valuetext", text);
    this.moment.textContent = end ? text : "nothing to replay yet";
    this.playIcon.setAttribute("d", this.isPlaying ? "M4 3h3v10H4zM9 3h3v10H9z" : "M4 2.5v11L13 8z");
    this.playButton.setAttribute("aria-label", this.isPlaying ? "Pause" : "Play");
  }
}
