// The public API with the operator's key, which lives in this module's memory and nowhere else.

const SERVER = new URL(".", location.href).href.replace(/\/$/, ""); // also behind a proxy's prefix
let key = null;

export function useKey(given) {
  key = given || null;
}

/** A refusal of the server: `type` is that of its problem, `problem` all that it said. */
export class Refused extends Error {
  constructor(status, problem) {
    super(problem.detail ?? `status ${status}`);
    this.status = status;
    this.type = problem.type ?? "unknown";
    this.problem = problem;
  }
}

export const part = encodeURIComponent;

/** Ask the server; `body`: FormData as it is, anything else as JSON. Answers JSON, or text where `text` is asked for. */
export async function ask(method, path, { body, text = false, headers = {} } = {}) {
  const sent = { ...headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const json = body !== undefined && !(body instanceof FormData);
  if (json) sent["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(SERVER + path, { method, headers: sent, body: json ? JSON.stringify(body) : body, credentials: "omit", cache: "no-store" });
  } catch {
    throw new Error("The server did not answer. Is it still running?");
  }
  if (!answer.ok) {
    throw new Refused(answer.status, await answer.json().catch(() => ({})));
  }
  return text ? answer.text() : answer.json();
}
