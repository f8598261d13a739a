// The official npm package.
import OpenAI from "openai";
import { Checks, ASK, CALL, LOOK, URL, TOOLS_URL } from "./checks.mjs";

const check = Checks("openai");
const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: "none", maxRetries: 0 });
const tools = new OpenAI({ baseURL: `${TOOLS_URL}/v1`, apiKey: "none", maxRetries: 0 });
const chat = { model: "pocket", messages: ASK, max_tokens: 24 };

await check("models", async () => {
  const names = [];
  for await (const model of client.models.list()) {
    names.push((await client.models.retrieve(model.id)).id);
  }
  return names;
});

await check("completion, whole and streamed", async () => {
  const ask = { model: "pocket", prompt: "def add(a, b):\n", max_tokens: 12, seed: 1 };
  const whole = await client.completions.create(ask);
  let text = "";
  for await (const chunk of await client.completions.create({ ...ask, stream: true })) {
    text += chunk.choices[0].text;
  }
  if (text !== whole.choices[0].text) throw new Error(`${text} != ${whole.choices[0].text}`);
  return text;
});

await check("chat, streamed, with usage", async () => {
  const options = { stream: true, stream_options: { include_usage: true } };
  let text = "";
  let usage = null;
  for await (const chunk of await client.chat.completions.create({ ...chat, ...options })) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  if (!usage?.total_tokens) throw new Error("no usage");
  return text;
});

await check("chat, `stream` helper", async () => {
  const runner = client.chat.completions.stream(chat);
  const final = await runner.finalChatCompletion();
  return final.choices[0].message.content;
});

await check("chat, response_format", async () => {
  const schema = { type: "object", properties: { a: { type: "integer" } }, required: ["a"] };
  const answer = await client.chat.completions.parse({
    ...chat,
    max_tokens: 60,
    temperature: 0,
    response_format: { type: "json_schema", json_schema: { name: "n", strict: true, schema } },
  });
  return JSON.stringify(answer.choices[0].message.parsed);
});

await check("chat, `runTools`", async () => {
  let looked = null;
  const run = (given) => {
    looked = given;
    return "blue";
  };
  const look = { ...LOOK.function, function: run, parse: JSON.parse };
  const runner = tools.chat.completions.runTools(
    { model: "tools", messages: ASK, tools: [{ type: "function", function: look }], max_tokens: 60, regex: CALL },
    { maxChatCompletions: 2 },
  );
  await runner.done();
  if (looked?.at !== "sky") throw new Error(JSON.stringify(looked));
  return JSON.stringify(looked);
});

await check("a prompt beyond the context: BadRequestError", async () => {
  try {
    await client.completions.create({ model: "pocket", prompt: "x y ".repeat(30000) });
  } catch (error) {
    if (!(error instanceof OpenAI.BadRequestError)) throw error;
    if (error.code !== "context_length_exceeded") throw error;
    return error.message;
  }
  throw new Error("it was taken");
});
