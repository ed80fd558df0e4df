/** Requests to the server: OpenAI's API for completions, and the runs of --runs. */

/** What the server answered, or that it did not. */
export class ServerError extends Error {
  /**
   * @param {string} message a sentence for the user
   * @param {{status?: number, retryAfterSeconds?: number}} answer status 0: no answer at all
   */
  constructor(message, { status = 0, retryAfterSeconds = 1 } = {}) {
    super(message);
    this.status = status;
    this.retryAfterSeconds = retryAfterSeconds;
  }
}

// sessionStorage ends with the browser's tab, so the key stays on no shared computer
const API_KEY = "bloomlm.apiKey";
export const apiKey = () => sessionStorage.getItem(API_KEY) ?? "";
export const setApiKey = (key) => sessionStorage.setItem(API_KEY, key.trim());

async function request(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      signal,
      body: body && JSON.stringify(body),
    });
  } catch (error) {
    throw asServerError(error);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const answer = await response.json().catch(() => ({}));
  const said = answer.error?.message ?? `the server answered ${response.status} ${response.statusText}`;
  // what the server says of a missing key is meant for programs
  const message =
    response.status === 401
      ? "This server asks for its API key: enter it beside the text, under Settings."
      : sentence(said);
  return new ServerError(message, {
    status: response.status,
    retryAfterSeconds: Math.max(1, Number(response.headers.get("Retry-After")) || 1),
  });
}

/** A message of the server, which begins with a small letter and has no full stop. */
const sentence = (message) => `${message[0].toUpperCase()}${message.slice(1)}${/[.?!]$/u.test(message) ? "" : "."}`;

/** An error of fetch as a ServerError; the user's own stop (AbortError) stays what it is. */
function asServerError(error) {
  if (error.name === "AbortError" || error instanceof ServerError) return error;
  return new ServerError("The server does not answer. Is bloomlm serve still running?");
}

/** The served models: [{id, parent, max_model_len}]. */
export async function listModels() {
  return (await (await request("v1/models")).json()).data;
}

/** Number of tokens of a text, and the most that the model reads. */
export async function countTokens(model, prompt, signal) {
  const answer = await (await request("tokenize", { body: { model, prompt }, signal })).json();
  return { count: answer.count, limit: answer.max_model_len };
}

/** The choices of a streamed completion as they arrive; throws ServerError, or AbortError when stopped. */
export async function* complete(body, signal) {
  const response = await request("v1/completions", { body: { ...body, stream: true }, signal });
  for await (const data of serverSentEvents(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(sentence(chunk.error.message), { status: 500 });
    if (chunk.choices.length) yield chunk.choices[0];
  }
  throw new ServerError("The connection ended before the text did.");
}

async function* serverSentEvents(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } catch (error) {
    throw asServerError(error);
  }
}

/** Runs with metrics: [{name, size, modified}], newest first; size in bytes, modified in seconds since 1970. */
export async function listRuns() {
  return (await (await request("runs")).json()).runs;
}

/** The lines of a run's metrics.jsonl from a byte on, and the byte to go on from. */
export async function readMetrics(name, offset) {
  const path = name.split("/").map(encodeURIComponent).join("/");
  const response = await request(`runs/${path}/metrics.jsonl?offset=${offset}`);
  return { text: await response.text(), next: Number(response.headers.get("X-Next-Offset")) };
}
