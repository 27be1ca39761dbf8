// The ledger: every request of this tab, with the bytes of its body, so that one can see that no picture is among them.

const rows = [];
let changed = () => {};

/** Count all that is asked from now on; `listener(rows)` is called after each change. No other way out is left open. */
export function openLedger(listener) {
  changed = () => listener(rows);
  const plain = globalThis.fetch.bind(globalThis);
  globalThis.fetch = (resource, options = {}) => counted(plain, resource, options);
  for (const name of ["XMLHttpRequest", "WebSocket", "EventSource", "RTCPeerConnection"]) delete globalThis[name];
  navigator.sendBeacon = () => false;
  new PerformanceObserver((list) => list.getEntries().forEach(settle)).observe({ type: "resource" });
}

async function counted(plain, resource, options) {
  const url = new URL(resource instanceof Request ? resource.url : resource, location.href);
  const row = {
    method: options.method ?? "GET",
    href: url.href,
    path: url.pathname + url.search,
    sent: await sizeOf(options.body),
    pixels: carriesPixels(options.body),
    received: null,
    status: null,
    ms: null,
  };
  const begun = performance.now();
  rows.push(row);
  changed();
  try {
    const answer = await plain(resource, options);
    row.status = answer.status;
    row.received ??= Number(answer.headers.get("content-length") ?? 0);
    return answer;
  } catch (error) {
    Object.assign(row, { status: "failed", settled: true });
    throw error;
  } finally {
    row.ms = performance.now() - begun;
    changed();
  }
}

/**
 * Take the bytes that really came over the network, once the browser lists the transfer: of what is in the cache only a
 * header came.
 */
function settle({ name, transferSize }) {
  const row = rows.find((one) => one.href === name && !one.settled);
  if (row) Object.assign(row, { received: transferSize, settled: true });
  changed();
}

async function sizeOf(body) {
  if (body === undefined || body === null) return 0;
  if (typeof body === "string") return new TextEncoder().encode(body).length;
  return (await new Response(body).arrayBuffer()).byteLength;
}

const carriesPixels = (body) =>
  body !== undefined && body !== null && (typeof body !== "string" || body.includes('"image_b64"'));

/** Write a number of bytes for people. */
export function bytes(count) {
  if (count < 1000) return `${count} B`;
  return count < 1e6 ? `${(count / 1e3).toFixed(1)} kB` : `${(count / 1e6).toFixed(2)} MB`;
}
