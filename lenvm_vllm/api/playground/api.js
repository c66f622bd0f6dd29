// Talks to the server that this page came from. All paths are relative: it may stand behind a
// proxy, below a path of its own.

export const BASE = new URL("v1", document.baseURI).href;
const RAILS = "lenvm/rails";

// An answer of the server that is no success, in its own words.
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// [{id, max_model_len}]
export async function models(key) {
  return (await (await call(`${BASE}/models`, { headers: headers(key) })).json()).data;
}

// {first, last, landing, unit}: where a text of this target may end, in its unit.
export async function railsOf(target, signal) {
  const query = new URLSearchParams({ length_target: JSON.stringify(target) });
  return (await call(`${RAILS}?${query}`, { signal })).json();
}

// The parts of an answer as they come: {text, answer, whole, told, finish, result}. answer: what
// of the text is no thinking. whole: it is the only part. told: what the server says of the text
// so far, {tokens, words, characters, expected, p_end, ...}. What it does not say is undefined.
export async function* answer(request, key, signal) {
  const reply = await call(`${BASE}/chat/completions`, {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify(request),
    signal,
  });
  if (!request.stream) {
    const whole = await reply.json();
    yield { ...partOf(whole, whole.choices[0].message), whole: true };
    return;
  }
  for await (const chunk of events(reply.body)) {
    if (chunk.error) throw new Refused(chunk.error.code, messageOf(chunk));
    if (chunk.choices.length) yield partOf(chunk, chunk.choices[0].delta);
  }
}

function partOf({ choices: [choice], usage }, said) {
  const told = choice.length_result ?? choice.length_progress;
  return {
    text: said.content || said.reasoning || "",
    answer: said.content || "",
    whole: false,
    told: told ?? { tokens: usage?.completion_tokens },
    finish: choice.finish_reason ?? undefined,
    result: choice.length_result,
  };
}

// The JSON objects of a stream of server-sent events.
async function* events(body) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of read(body)) {
    const parts = (rest + decoder.decode(bytes, { stream: true })).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith(":")) continue; // a comment that keeps the connection
      const data = part.slice(part.indexOf("data: ") + 6);
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// A stream's own iterator is not in every browser yet.
async function* read(body) {
  const reader = body.getReader();
  for (let part; !(part = await reader.read()).done; ) yield part.value;
}

async function call(path, options) {
  const reply = await fetch(path, options);
  if (reply.ok) return reply;
  const body = await reply.json().catch(() => ({}));
  throw new Refused(reply.status, messageOf(body) || `${reply.status} ${reply.statusText}`);
}

function messageOf({ error, detail, message }) {
  return error?.message ?? error ?? message ?? (detail && JSON.stringify(detail));
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}
