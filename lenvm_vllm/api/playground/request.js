// The requests of a wish, and the guided one as code to copy.

import { aimOf } from "./form.js";
import { phrase } from "./units.js";

const ROOM = 1.5; // times what a text of plain English needs
const STREAM = {
  stream: true,
  stream_options: { include_usage: true, continuous_usage_stats: true },
};

// What a person would send, and what can be copied.
export function plain(wish) {
  return {
    model: wish.model,
    messages: [{ role: "user", content: promptOf(wish) }],
    temperature: wish.temperature,
    seed: wish.seed,
    length_target: wish.target,
  };
}

// The same, told token by token; bounded where the target does not bound it.
export function guided(wish, rails) {
  const limit = rails.last === null ? { max_tokens: Math.max(wish.most, roomFor(wish)) } : {};
  if (wish.endings) return { ...plain(wish), ...limit };
  const told = { progress: 1, endings: 1 }; // of each of its tokens
  return { ...plain(wish), ...STREAM, ...limit, length_target: { ...wish.target, ...told } };
}

export function unguided(wish) {
  const { length_target, ...request } = plain(wish);
  return { ...request, ...STREAM, max_tokens: wish.most };
}

export function asCurl(wish, base, hasKey) {
  const lines = [`curl -s ${base}/chat/completions`, "-H 'Content-Type: application/json'"];
  if (hasKey) lines.push('-H "Authorization: Bearer $API_KEY"');
  lines.push(`-d '${JSON.stringify(plain(wish), null, 2).replaceAll("'", "'\\''")}'`);
  return lines.join(" \\\n  ");
}

export function asPython(wish, base, hasKey) {
  const { length_target, ...request } = plain(wish);
  const fields = Object.entries(request).map(([name, value]) => `    ${name}=${literal(value)},`);
  const key = hasKey ? 'os.environ["API_KEY"]' : '"none"';
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(base)}, api_key=${key})`,
    "reply = client.chat.completions.create(",
    ...fields,
    `    extra_body=${literal({ length_target })},`,
    ")",
    "print(reply.choices[0].message.content)",
    "print(reply.choices[0].length_result)",
  ].join("\n");
}

// Tokens that do for a text of the length that is wanted.
function roomFor(wish) {
  const { low, high } = aimOf(wish);
  return Math.round(ROOM * wish.unit.tokens * (high ?? low ?? 0));
}

function promptOf(wish) {
  const { low, high } = aimOf(wish);
  if (!wish.stated || (low === null && high === null)) return wish.prompt;
  const bounds =
    low === high ? `exactly ${phrase(low, wish.unit)}`
    : low === null ? `at most ${phrase(high, wish.unit)}`
    : high === null ? `at least ${phrase(low, wish.unit)}`
    : `from ${low} to ${phrase(high, wish.unit)}`;
  return `${wish.prompt} Your answer must have ${bounds}.`;
}

// A JSON value as Python writes it; strings are the same in both.
function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value !== "object") return JSON.stringify(value);
  const parts = Object.entries(value).map(([k, v]) => `${JSON.stringify(k)}: ${literal(v)}`);
  return `{${parts.join(", ")}}`;
}
