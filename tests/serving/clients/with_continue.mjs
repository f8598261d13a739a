// Continue's own adapter for servers like this one, asked as its editor extensions ask it.
import { constructLlmApi } from "@continuedev/openai-adapters";
import { Checks, ASK, URL } from "./checks.mjs";

const check = Checks("@continuedev/openai-adapters");
const signal = new AbortController().signal;
const config = { provider: "openai", apiBase: `${URL}/v1/`, apiKey: "none" };
const api = constructLlmApi(config);
const MARKS = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>", "<|endoftext|>"];
const stop = [...MARKS, "</fim_middle>", "</code>", "\n\n", "\r\n\r\n", "/src/", "#- coding: utf-8", "```"];

await check("list", async () => (await api.list()).map((model) => model.id));

await check("chatCompletionStream", async () => {
  let text = "";
  let usage = null;
  const body = { model: "pocket", messages: ASK, max_tokens: 24, stream: true };
  for await (const chunk of api.chatCompletionStream(body, signal)) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  if (!usage?.total_tokens) throw new Error("no usage");
  return text;
});

await check("chatCompletionNonStream", async () => {
  const body = { model: "pocket", messages: ASK, max_tokens: 24 };
  return (await api.chatCompletionNonStream(body, signal)).choices[0].message.content;
});

for (const more of [{}, { parse_special: true }]) {
  await check(`completionStream, the middle of a file ${JSON.stringify(more)}`, async () => {
    const prompt = "<fim_prefix>def add(a, b):\n    return <fim_suffix>\n<fim_middle>";
    const requestOptions = { extraBodyProperties: more };
    const one = constructLlmApi({ ...config, requestOptions });
    const body = { model: "pocket", prompt, max_tokens: 64, temperature: 0.01, stop, stream: true };
    let text = "";
    let reason = null;
    for await (const chunk of one.completionStream(body, signal)) {
      text += chunk.choices[0].text;
      reason = chunk.choices[0].finish_reason ?? reason;
    }
    if (!["stop", "length"].includes(reason)) throw new Error(reason);
    return text;
  });
}
