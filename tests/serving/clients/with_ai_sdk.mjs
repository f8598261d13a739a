// Vercel's AI SDK with its provider for servers like this one.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { Checks, CALL, URL, TOOLS_URL } from "./checks.mjs";

const check = Checks("ai", "@ai-sdk/openai-compatible");
const make = (baseURL) =>
  createOpenAICompatible({
    name: "trimode",
    baseURL,
    apiKey: "none",
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
const pocket = make(`${URL}/v1`);
const prompt = "Write a function: Add two numbers.";
const common = { prompt, maxOutputTokens: 24, maxRetries: 0 };

await check("generateText", async () => {
  const { text, usage } = await generateText({ model: pocket("pocket"), ...common });
  if (!usage.totalTokens) throw new Error(JSON.stringify(usage));
  return text;
});

await check("streamText, with usage", async () => {
  const stream = streamText({ model: pocket("pocket"), ...common });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  const usage = await stream.usage;
  if (!usage.outputTokens) throw new Error(JSON.stringify(usage));
  return text;
});

await check("Output.object", async () => {
  const schema = z.object({ a: z.number().int(), is_odd: z.boolean() });
  const output = Output.object({ schema });
  const result = await generateText({ model: pocket("pocket"), ...common, maxOutputTokens: 60, temperature: 0, output });
  return JSON.stringify(result.output);
});

await check("completionModel, streamed", async () => {
  const stream = streamText({ model: pocket.completionModel("pocket"), ...common });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  if (!text) throw new Error("no text");
  return text;
});

await check("tools, streamed", async () => {
  const look = tool({
    description: "Look at something.",
    inputSchema: z.object({ at: z.string() }),
    execute: async ({ at }) => `${at} is blue`,
  });
  const stream = streamText({
    model: make(`${TOOLS_URL}/v1`)("tools"),
    ...common,
    maxOutputTokens: 60,
    tools: { look },
    stopWhen: stepCountIs(2),
    providerOptions: { trimode: { regex: CALL } },
  });
  const steps = await stream.steps;
  const result = steps[0].toolResults[0];
  if (result?.output !== "sky is blue") throw new Error(JSON.stringify(steps[0].content));
  return `${steps.length} steps: ${result.output}`;
});
