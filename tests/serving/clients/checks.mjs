// The same as checks.py: one line of JSON for each thing that a client was asked.
import { readFileSync } from "node:fs";

export const URL = process.env.TRIMODE_URL;
export const TOOLS_URL = process.env.TRIMODE_TOOLS_URL;
export const CALL = String.raw`<tool_call>\n\{"name": "look", "arguments": \{"at": "sky"\}\}\n</tool_call>`;
export const ASK = [{ role: "user", content: "Write a function: Add two numbers." }];
export const LOOK = {
  type: "function",
  function: {
    name: "look",
    description: "Look at something.",
    parameters: { type: "object", properties: { at: { type: "string" } }, required: ["at"] },
  },
};

const versionOf = (name) =>
  JSON.parse(readFileSync(`node_modules/${name}/package.json`, "utf-8")).version;

export const Checks = (...names) => async (asked, ask) => {
  const result = {
    client: `${names.join(" + ")} (npm)`,
    version: names.map(versionOf).join(" + "),
    asked,
    is_ok: true,
  };
  let shown = "";
  try {
    shown = String((await ask()) ?? "");
  } catch (error) {
    result.is_ok = false;
    result.error = `${error.name}: ${error.message}`.slice(0, 600);
    if (process.env.TRIMODE_TRACE) console.error(error);
  }
  console.log(JSON.stringify({ ...result, shown: shown.slice(0, 300) }));
};
