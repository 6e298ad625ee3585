// Requests to the server that this page came from. The key lives in the tab's session storage.

const STORED = "expertmesh-key";

export class KeyNeededError extends Error {}

export function setKey(key) {
  sessionStorage.setItem(STORED, key);
}

export function hasKey() {
  return sessionStorage.getItem(STORED) !== null;
}

function headers() {
  const key = sessionStorage.getItem(STORED);
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function checked(answer) {
  if (answer.ok) return answer;
  let message = `HTTP status ${answer.status}`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // no error object: the status remains the message
  }
  if (answer.status === 401 || answer.status === 403) throw new KeyNeededError(message);
  throw new Error(message);
}

export async function get(path, limitMs = 5000) {
  const signal = AbortSignal.timeout(limitMs);
  return (await checked(await fetch(path, { headers: headers(), signal }))).json();
}

export async function post(path, body, limitMs = 60000) {
  const signal = AbortSignal.timeout(limitMs);
  const options = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  return (await checked(await fetch(path, options))).json();
}

// The events of a streamed response, as they arrive.
export async function* stream(path, body, signal) {
  const options = { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  const answer = await checked(await fetch(path, options));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    text += part.value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      if (event.startsWith("data: ")) yield JSON.parse(data);
    }
  }
}
