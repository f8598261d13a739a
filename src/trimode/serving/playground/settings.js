// The sliders: each a range with a number field beside it, and which modes it means something to.

const BLOCKS = ["diffusion", "linear", "branching", "quadratic", "auto"];

export const RACE_FIELDS = [
  { name: "max_tokens", label: "Max tokens", min: 1, max: 512, step: 1, value: 128 },
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.6 },
  { name: "seed", label: "Seed", min: 0, max: 999, most: Number.MAX_SAFE_INTEGER, step: 1, value: 3 },
  { name: "block_length", label: "Block length", min: 2, max: 32, step: 1, value: 8, modes: BLOCKS },
  {
    name: "reveal", label: "Reveal by", value: "threshold", modes: ["diffusion"],
    options: { threshold: "threshold", steps: "steps" },
  },
  {
    name: "threshold", label: "Threshold", min: 0, max: 1, step: 0.01, value: 0.9,
    modes: ["diffusion"], needs: ["reveal", "threshold"],
  },
  {
    name: "steps", label: "Steps per block", min: 1, max: 32, step: 1, value: 4,
    modes: ["diffusion"], needs: ["reveal", "steps"],
  },
  {
    name: "revision", label: "Revision", value: "", modes: ["diffusion"],
    options: { "": "none", joint_threshold: "joint threshold", ar_doubt: "AR doubt", remdm: "ReMDM" },
  },
  { name: "branches", label: "Branches", min: 0, max: 15, step: 1, value: 4, modes: ["branching"] },
  {
    name: "min_gain", label: "Feed what gains at least", min: 0, max: 0.5, step: 0.01, value: 0.08,
    modes: ["linear", "branching"],
  },
];

export const INFILL_FIELDS = [
  {
    name: "language", label: "Language", value: "python",
    options: { "": "any text", python: "Python" },
  },
  { name: "threshold", label: "Threshold", min: 0, max: 1, step: 0.01, value: 0.9 },
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0 },
  { name: "seed", label: "Seed", min: 0, max: 999, most: Number.MAX_SAFE_INTEGER, step: 1, value: 0 },
  { name: "context", label: "Tokens in view before a gap", min: 1, max: 512, step: 1, value: 192 },
];

export class Settings {
  #fields = new Map();

  constructor(root, fields) {
    this.root = root;
    for (const field of fields) {
      const made = field.options ? makeSelect(field, root.id) : makeSlider(field, root.id);
      this.#fields.set(field.name, { ...field, ...made });
      root.append(made.row);
    }
    root.addEventListener("input", () => this.#showNeeds());
    this.#showNeeds();
  }

  value(name) {
    const { input, options } = this.#fields.get(name);
    return options ? input.value : input.valueAsNumber;
  }

  set(name, value) {
    const { input } = this.#fields.get(name);
    input.value = value;
    input.dispatchEvent(new Event("input", { bubbles: true }));
  }

  // Move a slider's upper end; a number may be typed beyond it, up to `most`.
  setMax(name, max, most = max) {
    const { range, input } = this.#fields.get(name);
    range.max = max;
    input.max = most;
  }

  // Which modes are in the race: what means nothing to any of them is off.
  setModes(modes) {
    for (const field of this.#fields.values()) {
      field.isUsed = !field.modes || field.modes.some((mode) => modes.includes(mode));
    }
    this.#showNeeds();
  }

  // What a request in `mode` sends; only what means something there.
  values(mode = null) {
    const found = {};
    for (const field of this.#fields.values()) {
      if (field.name === "reveal" || (mode && field.modes && !field.modes.includes(mode))) continue;
      const [other, wanted] = field.needs ?? [];
      if (other && this.value(other) !== wanted) continue;
      const value = this.value(field.name);
      if (value !== "") found[field.name] = value;
    }
    return found;
  }

  // What is wrong with the first field whose number is not allowed, which gets the focus; null if
  // all are.
  problem() {
    for (const { input, label } of this.#fields.values()) {
      if (input.disabled || input.validity.valid) continue;
      input.focus();
      const steps = input.step === "1" ? "whole numbers" : `steps of ${input.step}`;
      const given = input.value || "no number";
      return `${label} is ${given}; allowed: ${input.min} to ${input.max} in ${steps}`;
    }
    return null;
  }

  #showNeeds() {
    for (const { isUsed = true, needs, row, input, range } of this.#fields.values()) {
      const isOn = isUsed && (!needs || this.value(needs[0]) === needs[1]);
      row.classList.toggle("off", !isOn);
      for (const control of [input, range]) if (control) control.disabled = !isOn;
    }
  }
}

function makeRow(field, id) {
  const row = document.createElement("div");
  row.className = "field";
  const label = document.createElement("label");
  label.htmlFor = id;
  label.textContent = field.label;
  if (field.modes) {
    const only = document.createElement("small");
    only.textContent = field.modes === BLOCKS ? "all but ar" : field.modes.join(", ");
    label.append(" ", only);
  }
  row.append(label);
  return row;
}

function makeSelect(field, prefix) {
  const id = `${prefix}-${field.name}`;
  const row = makeRow(field, id);
  const input = document.createElement("select");
  input.id = id;
  for (const [value, text] of Object.entries(field.options)) input.append(new Option(text, value));
  input.value = field.value;
  row.append(input);
  return { row, input };
}

function makeSlider(field, prefix) {
  const id = `${prefix}-${field.name}`;
  const row = makeRow(field, id);
  const input = document.createElement("input");
  const range = document.createElement("input");
  Object.assign(input, {
    id, type: "number", inputMode: "decimal", required: true,
    min: field.min, max: field.most ?? field.max, step: field.step < 1 ? 0.01 : 1,
    value: field.value,
  });
  Object.assign(range, {
    type: "range", min: field.min, max: field.max, step: field.step, value: field.value,
  });
  range.setAttribute("aria-label", `${field.label}, slider`);
  range.addEventListener("input", () => { input.value = range.value; });
  input.addEventListener("input", () => { range.value = input.value; });
  row.append(input, range);
  return { row, input, range };
}
