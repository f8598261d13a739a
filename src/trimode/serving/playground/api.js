// Talking to the server: JSON requests, server-sent events, the API key.

const KEY = "trimode.key";

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);

export async function request(path, { body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  const init = { headers, signal, cache: "no-store" };
  if (body) Object.assign(init, { method: "POST", body: JSON.stringify(body) });
  let response;
  try {
    response = await fetch(path, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?", 0);
  }
  if (!response.ok) throw new ApiError(await readError(response), response.status);
  return response;
}

async function readError(response) {
  const text = await response.text().catch(() => "");
  let message = "";
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // Not from this server, but from something in between.
  }
  message ||= `The server answered ${response.status} ${response.statusText}`.trim();
  const seconds = response.headers.get("Retry-After");
  const wait = seconds ? ` (try again in ${seconds} s)` : "";
  return oneLine(message) + wait;
}

const oneLine = (message) => String(message).replace(/\s+/g, " ").trim();

// The JSON chunks of a stream, as they come. Ends at [DONE]; an error chunk is thrown.
export async function* stream(path, { body, signal }) {
  const response = await request(path, { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"))
          .map((line) => line.slice(5).replace(/^ /, "")).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(oneLine(chunk.error.message), 200);
        yield chunk;
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    throw new ApiError("The connection broke off before the end.", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ApiError("The connection broke off before the end.", 0);
}
